# SPDX-License-Identifier: MIT
"""Tests of all three files: offline, on the CPU, in about four minutes on two cores.

Where it can, a test compares with an oracle that it states itself: slower, plainer, and independent.
"""

import argparse
import ast
import contextlib
import copy
import functools
import io
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import urllib.error
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.datasets import utils as tv_utils
from torchvision.transforms.functional import to_pil_image

import baselines as b
import gem_miner as g
import models

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text()
g.Run.SHARE = math.inf  # a checkpoint after every epoch, however short
pytestmark = pytest.mark.filterwarnings(  # of our own code, only what it means to say is no error
    "error:::(gem_miner|baselines|models)",
    "ignore:no weight is left",
    "ignore:torch.compile does not work",
    "ignore:lambda .* is small",
)


def imports(path):
    """Names of the packages that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


class Tiny(nn.Module):
    """d = 2*9 + 3*8 = 42, with a bias and an affine BatchNorm that must never count."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, bias=True)
        self.bn = nn.BatchNorm2d(2)
        self.fc = nn.Linear(8, 3, bias=False)

    def forward(self, x):
        return self.fc(F.relu(self.bn(self.conv(x))).flatten(1))


def tiny(dtype=torch.float64):
    torch.manual_seed(0)
    return Tiny().to(dtype)


def tiny_batches(n=4, size=8, dtype=torch.float64):
    gen = torch.Generator().manual_seed(1)
    xs = torch.randn(n, size, 1, 4, 4, generator=gen, dtype=dtype)
    return list(zip(xs, torch.randint(3, (n, size), generator=gen)))


# --- models.py ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, classes, size, d, tensors",
    [
        ("resnet20", 10, 32, 268_336, 20),
        ("resnet32", 10, 32, 461_872, 32),
        ("resnet32", 100, 32, 467_632, 32),
        ("resnet32x2", 100, 32, 1_856_864, 32),
        ("resnet18", 10, 32, 11_164_352, 21),
        ("resnet18", 200, 64, 11_269_312, 21),
        ("resnet50", 200, 64, 23_864_512, 54),
        ("vgg16", 10, 32, 14_715_584, 14),
        ("mobilenetv2", 10, 32, 2_261_824, 58),
        ("wrn28_2", 10, 32, 1_463_984, 29),
    ],
)
def test_networks(name, classes, size, d, tensors):
    model = models.build(name, classes, image_size=size)
    f = g.Network(model)
    assert (f.d, len(f.names)) == (d, tensors)
    assert f"{d:,}" in models.__doc__ or (name, classes) == ("resnet32", 10)
    assert sum(p.numel() for p in model.parameters()) == d  # so no bias, and no affine BatchNorm
    assert f(f.vector(), torch.randn(2, 3, size, size)).shape == (2, classes)
    norms = [m for m in models.build(name, classes, affine=True).modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(m.affine for m in norms)


def test_every_network_is_tested_and_knows_nothing_of_pruning():
    assert set(models.MODELS) == {
        "resnet20",
        "resnet32",
        "resnet32x2",
        "resnet18",
        "resnet50",
        "vgg16",
        "mobilenetv2",
        "wrn28_2",
    }
    imported = imports(HERE / "models.py")
    assert imported == {"torch"}


def test_resnet20_is_he_et_als():
    """Layer sizes of FACTS 12.1, and the option-A shortcut against a plain statement of it."""
    f = g.Network(models.resnet20())
    assert f.sizes == [432] + [2304] * 6 + [4608] + [9216] * 5 + [18432] + [36864] * 5 + [640]
    x = torch.randn(2, 16, 8, 8)
    out = models.OptionA(16)(x)
    expected = torch.zeros(2, 32, 4, 4)
    expected[:, 8:24] = x[:, :, [0, 2, 4, 6]][:, :, :, [0, 2, 4, 6]]
    assert torch.equal(out, expected)


def test_resnet50_takes_torchvisions_weights():
    theirs, ours = torchvision.models.resnet50().eval(), models.resnet50(1000, affine=True).eval()
    ours.load_state_dict({n: t for n, t in theirs.state_dict().items() if n != "fc.bias"})
    nn.init.zeros_(theirs.fc.bias)
    x = torch.randn(1, 3, 64, 64)
    assert torch.allclose(theirs(x), ours(x), atol=1e-5)


# --- Network: a module as a function of one vector ------------------------------------------------------------


def test_vector_and_views_are_inverse_and_the_function_is_the_module():
    model = tiny()
    f = g.Network(model)
    assert (f.d, f.names, f.shapes) == (42, ["conv.weight", "fc.weight"], [(2, 1, 3, 3), (3, 8)])
    v = f.vector()
    assert torch.equal(f.views(v)["conv.weight"], model.conv.weight) and torch.equal(
        f.views(v)["fc.weight"], model.fc.weight
    )
    assert torch.equal(f.vector(f.views(v)), v)
    x = torch.randn(5, 1, 4, 4, dtype=torch.float64)
    assert torch.allclose(f.eval()(v, x), model.eval()(x), atol=1e-12)
    other = torch.randn(42, dtype=torch.float64)
    expected = f(other, x)
    assert not torch.allclose(expected, model(x))
    f.load(other)
    assert torch.allclose(model(x), expected)


def test_convolutions_are_viewed_channels_last_without_a_copy():
    f = g.Network(models.resnet20())
    v = f.vector()
    for u in f.views(v).values():
        assert u.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
        assert u.dim() != 4 or u.is_contiguous(memory_format=torch.channels_last)


def test_any_conv_or_linear_counts_once_and_nothing_else():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv1d(3, 4, 5), nn.ConvTranspose2d(4, 2, 3)
            self.c = nn.Linear(6, 6)
            self.d = nn.Linear(6, 6, bias=False)
            self.d.weight = self.c.weight
            self.e, self.norm = nn.Embedding(5, 6), nn.LayerNorm(6)

        def forward(self, x):
            return self.d(self.norm(self.c(x)))

    f = g.Network(Odd())
    assert f.names == ["a.weight", "b.weight", "c.weight"] and f.sizes == [60, 72, 36]
    before = f.rest()
    assert "d.weight" not in before and "c.bias" in before
    f.load(f.vector() * 2)
    doubled = f.vector()
    f.restore(before)
    assert f.model.d.weight is f.model.c.weight and torch.equal(f.vector(), doubled)
    x = torch.randn(2, 6)
    assert torch.allclose(f(f.vector(), x), f.model(x))
    with pytest.raises(ValueError, match="nothing to prune"):
        g.Network(nn.ReLU())


def test_bfloat16_returns_float32_close_to_float32():
    model = models.resnet20()
    x = torch.randn(4, 3, 32, 32)
    full, half = g.Network(model).eval(), g.Network(model, bf16=True).eval()
    a, b = full(full.vector(), x), half(half.vector(), x)
    assert b.dtype == torch.float32 and not torch.equal(a, b)
    assert torch.allclose(a, b, atol=0.05 * a.abs().max().item())


def test_bfloat16_of_the_vector_is_autocast_of_every_layer():
    f, x, y = g.Network(models.resnet20(), bf16=True), torch.randn(4, 3, 32, 32), torch.arange(4)
    v = f.vector().requires_grad_()
    at_once = f(v, x)
    with torch.autocast("cpu", torch.bfloat16):
        by_layer = torch.func.functional_call(f.model, f.views(v), (x,)).float()
    ours, plain = (torch.autograd.grad(F.cross_entropy(logits, y), v)[0] for logits in (at_once, by_layer))
    assert torch.equal(at_once, by_layer) and torch.equal(ours, plain) and ours.abs().max() > 0


def batches_of_two_sizes():
    return [(x[:size], y[:size]) for (x, y), size in zip(tiny_batches(dtype=torch.float32), (8, 8, 5))]


def test_compiled_equals_eager():
    """Where the weights are scores, where they are trained, and with a last batch that is smaller."""
    found, data = {False: [], True: []}, batches_of_two_sizes()
    for compiled, vectors in found.items():
        f = g.Network(tiny(torch.float32), compile=compiled)
        gem = g.mine(f, data, sparsity=0.5, epochs=2, period=1)
        vectors += [gem.p, gem.q, g.finetune(f, gem.w, gem.q, data, epochs=2, lr=0.1)]
        vectors += [*b.edge_popup(f, data, sparsity=0.5, epochs=2)[1:3], *f.rest().values()]
        if compiled and not f.compiled:
            pytest.skip("no C++ compiler here")
    assert len(found[True]) > 5
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(found[False], found[True]))


def test_without_a_compiler_it_says_so_once_and_goes_on(monkeypatch):
    def fails(call, **_):
        def compiled(*_):
            raise torch._dynamo.exc.TorchDynamoException("\nno C++ compiler\na long story")

        return compiled

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.warns(UserWarning, match="without: no C.. compiler$") as said:
        f = g.Network(tiny(), compile=True)
        gem = g.mine(f, tiny_batches(), sparsity=0.5, epochs=2, period=1)
    assert len(said) == 1 and torch.equal(gem.p, g.mine(tiny(), tiny_batches(), sparsity=0.5, epochs=2, period=1).p)


@pytest.mark.parametrize("ours, plain", [
    (g.sgd_decayed, functools.partial(torch.optim.SGD, momentum=0.9, weight_decay=1e-4)), (g.adam, torch.optim.Adam),
])  # fmt: skip
def test_fused_optimizers_are_the_plain_ones(ours, plain):
    ends = []
    for make in (lambda p: ours(p, 0.01), lambda p: plain(p, lr=0.01, foreach=False)):
        gen = torch.Generator().manual_seed(0)
        p = torch.rand(1000, generator=gen).requires_grad_()
        opt = make([p])
        for _ in range(20):
            p.grad = torch.randn(1000, generator=gen)
            opt.step()
        ends.append(p.detach())
    assert torch.allclose(*ends, atol=1e-6) and (ends[0] - p.grad).abs().max() > 0.1


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a GPU: reading a number, or a size that depends on values."""

    WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"}

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.n += name in self.WAITING or (name == "repeat_interleave" and not (kwargs or {}).get("output_size"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("search", [
    lambda f, data: g.mine(f, data, sparsity=0.5, epochs=1),
    lambda f, data: g.mine(f, data, sparsity=0.5, epochs=1, r=g.round_random, penalty=g.l1),
    lambda f, data: g.finetune(f, g.given(f), torch.ones(f.d), data, epochs=1),
    lambda f, data: b.edge_popup(f, data, sparsity=0.5, epochs=1),
    lambda f, data: b.edge_popup(f, data, sparsity=0.5, epochs=1, period=1),
    lambda f, data: b.imp(f, data, sparsity=0.8, epochs=1),
    lambda f, data: b.smart_ratio_ticket(f, data, densities=lambda f: [0.5] * len(f.sizes), tune=0.1, epochs=1),
])  # fmt: skip
def test_no_step_waits_for_the_device(search):
    split = g.draw_shapes(40, 1)
    waits, seen = Waits(), []

    class Watched(g.Batches):
        def __iter__(self):
            for batch in super().__iter__():
                yield batch
                seen.append(waits.n)

    with waits:
        search(g.Network(models.resnet20()), Watched(split, ([127.5] * 3, [60.0] * 3), 8, True, 4))
        assert torch.ones(1).item() and waits.n > seen[-1]  # it does see such a read
    assert len(seen) == 5 and seen[0] == seen[-1]


# --- Algorithm 1 ----------------------------------------------------------------------------------------------


def oracle(model, batches, w, p, s, E, T, eta, lam, norm=2, invert=False):
    """The paper's lines 1 to 16 in plain Python, a weight at a time; SGD with momentum 0.9, cosine schedule."""
    layers = [model.conv.weight, model.fc.weight]
    d = len(p)
    p, velocity, q = p.tolist(), [0.0] * d, [1] * d
    c = math.log(1 / s) / E  # line 1
    for j in range(1, E + 1):  # line 4
        lr = eta * 0.5 * (1 + math.cos(math.pi * (j - 1) / E))
        for x, y in batches:  # line 5
            w_eff = [w[i].item() * q[i] * (1.0 if p[i] >= 0.5 else 0.0) for i in range(d)]  # line 6
            with torch.no_grad():
                layers[0].copy_(torch.tensor(w_eff[:18]).reshape(2, 3, 3, 1).permute(0, 3, 1, 2))
                layers[1].copy_(torch.tensor(w_eff[18:]).reshape(3, 8))
            model.train().zero_grad()
            F.cross_entropy(model(x), y).backward()
            grad = layers[0].grad.permute(0, 2, 3, 1).flatten().tolist() + layers[1].grad.flatten().tolist()
            for i in range(d):
                penalty = 2 * lam * p[i] if norm == 2 else lam * (p[i] > 0)
                velocity[i] = 0.9 * velocity[i] + grad[i] * w[i].item() * q[i] + penalty  # straight-through
                p[i] = min(1.0, max(0.0, p[i] - lr * velocity[i]))  # lines 7, 8
        if j % T == 0:  # line 10
            I1 = sorted((i for i in range(d) if q[i]), key=lambda i: p[i], reverse=invert)  # lines 11, 12
            for i in I1[: len(I1) - round(d * math.exp(-c * j))]:  # lines 13 to 15
                q[i] = 0
    return p, q


@pytest.mark.parametrize("case", [{}, {"norm": 1}, {"invert": True}, {"T": 1}, {"lam": 0.0}])
def test_mine_is_algorithm_1(case):
    case = {"s": 0.2, "E": 6, "T": 2, "eta": 0.05, "lam": 0.02, "norm": 2, "invert": False, **case}
    model, batches = tiny(), tiny_batches()
    others = {n: p.clone() for n, p in model.named_parameters() if n not in ("conv.weight", "fc.weight")}
    first = {}

    def start(f):
        first["w"] = g.signed_constant(f)
        return first["w"]

    kw = {"penalty": {1: g.l1, 2: g.l2}[case["norm"]], "lam": case["lam"], "invert": case["invert"]}
    settings = dict(sparsity=case["s"], epochs=case["E"], period=case["T"], lr=case["eta"], init=start, **kw)
    gem = g.mine(model, batches, **settings)
    with g.seeded(torch.device("cpu"), 0, "init"):
        g.signed_constant(g.Network(model))
        p0 = torch.rand(42, dtype=torch.float64)
    p, q = oracle(tiny(), batches, first["w"], p0, *(case[k] for k in ("s", "E", "T", "eta", "lam", "norm", "invert")))
    assert sum(1 for v in p if v == 0) < 42 and len(set(p)) > 20  # scores that moved, few ties: a fair comparison
    assert torch.allclose(gem.p, torch.tensor(p, dtype=torch.float64), atol=1e-9)
    assert gem.q.int().tolist() == q
    assert torch.equal(gem.m, (gem.p >= 0.5) * gem.q)
    assert torch.equal(gem.w, first["w"])  # not a weight was trained
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in others.items())
    assert torch.equal(g.Network(model).vector(), gem.w * gem.m)  # the model is the gem now


def test_rounding_is_exact_and_straight_through():
    p = torch.tensor([0.0, 0.3, 0.49999997, 0.5, 0.7, 1.0], requires_grad=True)
    weight = torch.arange(6.0)
    assert g.round_ste(p).tolist() == [0, 0, 0, 1, 1, 1]
    (g.round_ste(p) * weight).sum().backward()
    assert torch.equal(p.grad, weight)
    p = torch.full((40_000,), 0.3, requires_grad=True)
    drawn = g.round_random(p)
    assert set(drawn.unique().tolist()) == {0.0, 1.0} and abs(drawn.mean().item() - 0.3) < 0.02
    drawn.sum().backward()
    assert torch.equal(p.grad, torch.ones_like(p))


def test_penalties_are_gradients():
    p = torch.tensor([0.0, 0.25, 1.0], requires_grad=True)
    for penalty, norm in ((g.l2, lambda p: p.square().sum()), (g.l1, lambda p: p.abs().sum())):
        assert torch.equal(penalty(p.detach(), 0.5), torch.autograd.grad(0.5 * norm(p), p)[0])


def test_straight_through_gradient_is_dL_dweff_times_w_times_q():
    f = g.Network(tiny())
    (x, y), *_ = tiny_batches()
    w, p = g.signed_constant(f), torch.rand(42, dtype=torch.float64, requires_grad=True)
    q = (torch.rand(42) < 0.7).double()
    F.cross_entropy(f((w * q) * g.round_ste(p), x), y).backward()
    w_eff = ((w * q) * (p.detach() >= 0.5)).requires_grad_()
    F.cross_entropy(f(w_eff, x), y).backward()
    assert torch.allclose(p.grad, w_eff.grad * w * q, atol=1e-14) and (p.grad[q == 0] == 0).all()
    assert p.grad[(p < 0.5) & (q == 1)].abs().sum() > 0  # a weight that r rounds away still learns


@pytest.mark.parametrize(
    "s, E, T", [(0.0144, 10, 1), (0.0144, 10, 3), (0.3, 7, 7), (0.5, 5, 4), (1.0, 4, 1), (0.024, 3, 2), (1.0, 5, 3)]
)
def test_ends_with_exactly_round_sd_weights_not_frozen(s, E, T):
    seen = []
    s = max(s, 1 / 42)
    gem = g.mine(
        tiny(), tiny_batches(1), sparsity=s, epochs=E, period=T, lam=0.5, lr=0.5,
        on_epoch=lambda row, v, state: seen.append(state["q"].clone()),
    )  # fmt: skip
    assert gem.q.sum() == round(s * 42) and seen[-1].sum() == round(s * 42)
    for j, (before, after) in enumerate(zip([torch.ones(42)] + seen, seen), 1):
        assert (after <= before).all()  # what is frozen stays frozen
        assert j % T == 0 or torch.equal(before.bool(), after)
    assert set(gem.m.unique().tolist()) <= {0.0, 1.0} and (gem.m <= gem.q).all()


def test_freezing_counts_are_the_papers_where_T_divides_E():
    """FACTS 12.5, Algorithm 1 literally: 30 freezes; and T = 8, which the paper's formula misses the target with."""
    counts = [g.bound(0.0144, 268_336, j, 150, 5) for j in range(5, 151, 5)]
    assert counts[:3] == [232_965, 202_257, 175_596] or counts[:3] == [232_965, 202_256, 175_595]
    assert len(counts) == 30 and counts[-1] == round(0.0144 * 268_336) == 3864
    assert g.bound(0.0059, 268_336, 144, 150, 8) == round(0.0059 * 268_336) == 1583
    assert [g.bound(1.0, 100, j, 10, 3) for j in (3, 6, 9)] == [100] * 3


@pytest.mark.parametrize(
    "p", [torch.zeros(1000), torch.ones(1000), torch.full((1000,), 0.5), torch.cat([torch.zeros(900), torch.rand(100)])]
)
@pytest.mark.parametrize("invert", [False, True])
def test_freezing_is_exact_under_ties_and_takes_the_worst(p, invert):
    q = (torch.arange(1000) % 4 > 0).float()
    new = g.freeze(p, q, 500, invert)
    assert new.sum() == 500 and (new <= q).all() and q.sum() == 750
    frozen, kept = p[(q - new) == 1], p[new == 1]
    assert (frozen >= kept.max()).all() if invert else (frozen <= kept.min()).all()
    assert torch.equal(g.freeze(p, q, 750), q)


def test_ties_are_broken_at_random_over_the_whole_vector():
    torch.manual_seed(0)
    kept = g.freeze(torch.zeros(10_000), torch.ones(10_000), 5000)
    assert abs(kept[:5000].sum().item() - 2500) < 150


def test_freezing_never_revives_and_never_overshoots():
    q = torch.tensor([1.0, 0.0, 1.0, 1.0])
    assert torch.equal(g.freeze(torch.rand(4), q, 4), q)


def test_values_out_of_range_are_refused():
    for bad in (
        {"sparsity": 0},
        {"sparsity": 1.44},
        {"sparsity": 0.001},
        {"period": 11},
        {"period": 0},
        {"sparsity": math.nan},
    ):
        with pytest.raises(ValueError):
            g.mine(tiny(), tiny_batches(), **{"sparsity": 0.5, "epochs": 10, "period": 1, **bad})
    with pytest.raises(ValueError, match="no batch"):
        g.mine(tiny(), iter(tiny_batches()), sparsity=0.5, epochs=2, period=1)  # an iterator is spent after one epoch
    with pytest.raises(ValueError, match="no batch"):
        g.accuracy(tiny(), [])
    for bad, word in (({"period": 1.5}, "whole"), ({"lam": -1}, "lambda"), ({"lam": math.nan}, "lambda")):
        with pytest.raises(ValueError, match=word):
            g.mine(tiny(), tiny_batches(), **{"sparsity": 0.5, "epochs": 10, **bad})
    x, y = tiny_batches()[0]
    with pytest.raises(ValueError, match="8 inputs, but 7 labels"):
        g.accuracy(tiny(), (x, y[:7]))
    with pytest.raises(ValueError, match="class indices"):  # not one-hot
        g.accuracy(tiny(), (x, F.one_hot(y, 3)))
    for w, m in (
        (torch.ones(42), torch.ones(1)),
        (torch.ones(1), torch.ones(42)),
        (torch.ones(42), torch.full((42,), 0.5)),
    ):
        with pytest.raises(ValueError, match="vectors of 42 numbers"):
            g.finetune(tiny(), w, m, tiny_batches(), epochs=1)


def test_a_lost_layer_is_named_once_and_a_lost_loss_stops_the_run():
    with pytest.warns(UserWarning, match="fc.weight") as caught:
        gem = g.mine(tiny(), tiny_batches(), sparsity=0.5, epochs=4, period=1, lam=10.0)
    assert len(caught) == 1 and gem.q.sum() == 21
    x, y = tiny_batches()[0]
    with pytest.raises(FloatingPointError, match="epoch 1"):
        g.mine(tiny(), [(x * math.nan, y)], sparsity=0.5, epochs=2, period=1)
    with pytest.raises(FloatingPointError):  # the last step of an epoch leaves scores, but no loss, that are not finite
        g.mine(tiny(), [(x, y)], sparsity=0.5, epochs=1, period=1, penalty=lambda p, lam: p * math.nan)
    with pytest.raises(FloatingPointError):
        f = g.Network(tiny())
        g.finetune(f, f.vector(), torch.ones(42).double(), [(x * math.nan, y)], epochs=1)


def test_each_epoch_has_its_own_randomness():
    class Draws:
        def __init__(self):
            self.seen = []

        def __iter__(self):
            self.seen.append(torch.rand(1).item())
            return iter(tiny_batches(1))

    w, m = torch.rand(42).double(), torch.ones(42).double()
    for method in (
        lambda data, seed: g.mine(tiny(), data, sparsity=0.5, epochs=3, seed=seed),
        lambda data, seed: g.finetune(tiny(), w, m, data, epochs=3, seed=seed),
    ):
        first, again, other = Draws(), Draws(), Draws()
        for data, seed in ((first, 0), (again, 0), (other, 1)):
            method(data, seed)
        assert len(set(first.seen)) == 3 and first.seen == again.seen and not set(first.seen) & set(other.seen)


def test_mining_takes_tensors_a_loader_and_ones_own_optimizer():
    x, y = torch.randn(40, 1, 4, 4), torch.randint(3, (40,))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8, shuffle=True)
    used = []

    def schedule(lr, j, E):
        used.append(j)
        return lr

    for data in ((x, y), [x, y], loader):
        gems = [
            g.mine(
                tiny(torch.float32),
                data,
                sparsity=0.5,
                epochs=3,
                period=1,
                optimizer=g.adam,
                schedule=schedule,
                batch_size=16,
            )
            for _ in range(2)
        ]
        assert torch.equal(gems[0].p, gems[1].p)  # the seed fixes the loader's order too
        f = g.Network(tiny(torch.float32))
        assert torch.equal(gems[0].w.abs(), f.he_std()) and set(gems[0].w.sign().tolist()) == {-1.0, 1.0}
    assert set(used) == {1, 2, 3}
    orders = [torch.cat([y for _, y in g.minibatches((x, torch.arange(40)), 16, f.device)]) for _ in range(2)]
    assert all(torch.equal(order.sort().values, torch.arange(40)) for order in orders)
    assert not torch.equal(*orders) and not torch.equal(orders[0], torch.arange(40))
    a, b = (g.mine(tiny(torch.float32), (x, y), sparsity=0.5, epochs=3, period=1, seed=s).p for s in (0, 1))
    assert not torch.equal(a, b)


# --- weights and schedules ------------------------------------------------------------------------------------


def test_initial_weights():
    f = g.Network(models.resnet20())
    w = f.views(g.signed_constant(f))
    expected = {
        "conv1": 0.2721655,
        "layer1.0.conv1": 0.1178511,
        "layer2.2.conv2": 0.0833333,
        "layer3.2.conv2": 0.0589256,
    }
    for name, c in [*expected.items(), ("fc", 0.1767767)]:
        name += ".weight"
        assert torch.allclose(w[name].abs(), torch.tensor(c), atol=1e-6)
        assert abs(w[name].sign().mean()) < 0.2
    w = f.views(g.kaiming_normal(f))
    assert abs(w["layer3.2.conv2.weight"].std().item() / 0.0589256 - 1) < 0.02
    assert torch.equal(g.given(f), f.vector())


def test_schedules_end_where_they_should():
    assert (
        g.cosine(0.1, 1, 150) == 0.1
        and math.isclose(g.cosine(0.1, 76, 150), 0.05)
        and 0 < g.cosine(0.1, 150, 150) < 2e-5
    )
    rates = [g.multistep(0.01, j, 150) for j in range(1, 151)]
    assert [sum(math.isclose(v, r) for v in rates) for r in (0.01, 0.001, 0.0001)] == [80, 40, 30]
    assert [g.multistep(1.0, j, 2, (0.1, 0.8)) for j in (1, 2)] == pytest.approx(
        [1.0, 0.1]
    )  # one epoch in full at least
    assert g.multistep(1.0, 1, 1, (0.1, 0.8)) == 1.0
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
    for j in range(1, 31):
        assert math.isclose(g.cosine(0.1, j, 30), theirs.get_last_lr()[0], abs_tol=1e-12)
        optimizer.step()
        theirs.step()


def test_seeded_leaves_the_callers_random_state_alone():
    cpu = torch.device("cpu")
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with g.seeded(cpu, 0, "mine", 1):
        a = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    draws = []
    for key in [(0, "mine", 1), (1, "mine", 1), (0, "mine", 2), (0, "finetune", 1)]:
        with g.seeded(cpu, *key):
            draws.append(torch.rand(3))
    assert torch.equal(draws[0], a) and all(not torch.equal(a, other) for other in draws[1:])


# --- finetuning and the checks --------------------------------------------------------------------------------


def test_finetune_is_masked_sgd():
    """Against module-by-module training with a mask multiplied in; SGD, momentum 0.9, weight decay 1e-4."""
    model, batches = tiny(), tiny_batches()
    f = g.Network(model)
    w0 = f.vector()
    m = (torch.arange(42) % 3 == 0).double()
    result = g.finetune(f, w0, m, batches, epochs=3, lr=0.1)
    twin = tiny()
    conv, fc, mc, mf = twin.conv.weight, twin.fc.weight, *f.views(m).values()
    velocity = {n: torch.zeros_like(p) for n, p in twin.named_parameters()}
    for j in range(1, 4):
        for x, y in batches:
            twin.train()
            with torch.no_grad():
                conv.mul_(mc), fc.mul_(mf)
            loss = F.cross_entropy(twin(x), y)
            grads = dict(zip(velocity, torch.autograd.grad(loss, list(twin.parameters()))))
            grads["conv.weight"] = grads["conv.weight"] * mc
            grads["fc.weight"] = grads["fc.weight"] * mf
            with torch.no_grad():
                for n, p in twin.named_parameters():
                    velocity[n].mul_(0.9).add_(grads[n] + 1e-4 * p)
                    p -= g.multistep(0.1, j, 3) * velocity[n]
    expected = f.vector({"conv.weight": conv * mc, "fc.weight": fc * mf})
    assert torch.allclose(result, expected, atol=1e-10) and not torch.allclose(result, w0 * m)
    assert (result[m == 0] == 0).all() and torch.equal(f.vector(), result)
    assert torch.allclose(model.bn.weight, twin.bn.weight, atol=1e-10) and not torch.equal(
        model.bn.weight, tiny().bn.weight
    )


def test_checks_change_what_they_must_and_keep_what_they_must():
    f = g.Network(models.resnet20())
    torch.manual_seed(0)
    m = (torch.rand(f.d) < 0.1).float()
    mixed = g.shuffle(f, m, seed=1)
    assert f.counts(mixed) == f.counts(m) and not torch.equal(mixed, m) and torch.equal(mixed, g.shuffle(f, m, seed=1))
    overlap = (mixed * m).sum().item() / m.sum().item()
    assert abs(overlap - 0.1) < 0.02  # K^2/m positions in common (FACTS 12.10)
    w = g.signed_constant(f)
    drawn = g.reinit(f, seed=1)
    assert torch.allclose(drawn.abs(), w.abs()) and 0.45 < (drawn == w).float().mean() < 0.55
    with g.seeded(torch.device("cpu"), 1, "init"):
        assert not torch.equal(g.signed_constant(f), drawn)  # not the very draw that mine() makes from this seed
    assert g.reinit(f, g.kaiming_normal).abs().unique().numel() > 1000


def test_reestimated_statistics_are_the_mean_over_batches():
    """Of the layer's inputs under v, whatever they were before; and nothing else changes."""
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2))
    nn.init.constant_(net[1].running_mean, 7.0)
    f, x = g.Network(net), torch.randn(60, 4)
    v, before = torch.randn(f.d), copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    g.reestimate(net, v, [(part, torch.zeros(20)) for part in x.split(20)], batches=2)
    inputs = [part @ v[:12].view(3, 4).T + net[0].bias for part in x.split(20)[:2]]
    assert torch.allclose(net[1].running_mean, torch.stack([u.mean(0) for u in inputs]).mean(0), atol=1e-6)
    assert torch.allclose(net[1].running_var, torch.stack([u.var(0) for u in inputs]).mean(0), rtol=1e-5)
    changed = [n for n, t in net.state_dict().items() if not torch.equal(t, before[n])]
    assert changed == ["1.running_mean", "1.running_var", "1.num_batches_tracked"] and net[1].momentum == 0.1
    assert torch.equal(state, torch.get_rng_state()) and not net.training


# --- data -----------------------------------------------------------------------------------------------------


def test_batched_crop_and_flip_equal_the_per_image_ones():
    gen = torch.Generator().manual_seed(0)
    split = g.Split(torch.randint(256, (10, 6, 6, 3), generator=gen, dtype=torch.uint8), torch.arange(10))
    stats = ([100.0, 110.0, 120.0], [50.0, 60.0, 70.0])
    batches = g.Batches(split, stats, 4, train=True, pad=2)
    torch.manual_seed(7)
    result = list(batches)
    torch.manual_seed(7)
    order, shift, mirror = torch.randperm(10), torch.randint(5, (2, 10, 1)), torch.rand(10, 1) < 0.5
    assert len(batches) == 3 and [len(y) for _, y in result] == [4, 4, 2]
    assert torch.equal(torch.cat([y for _, y in result]), order)
    for x, i in zip(torch.cat([x for x, _ in result]), order.tolist()):
        image = to_pil_image(split.x[i].permute(2, 0, 1))
        image = torchvision.transforms.functional.pad(image, 2)
        image = torchvision.transforms.functional.crop(image, shift[0, i].item(), shift[1, i].item(), 6, 6)
        if mirror[i]:
            image = torchvision.transforms.functional.hflip(image)
        pixels = torchvision.transforms.functional.pil_to_tensor(image).float()
        expected = (pixels - torch.tensor(stats[0])[:, None, None]) / torch.tensor(stats[1])[:, None, None]
        assert torch.allclose(x, expected)
    assert not torch.equal(torch.cat([y for _, y in batches]), order)  # another epoch, another order
    plain = g.Batches(split, stats, 4)
    x = torch.cat([x for x, _ in plain])
    assert torch.allclose(
        x * torch.tensor(stats[1])[:, None, None] + torch.tensor(stats[0])[:, None, None],
        split.x.permute(0, 3, 1, 2).float(),
    )
    assert x.shape == (10, 3, 6, 6) and torch.cat([y for _, y in plain]).tolist() == list(range(10))


def test_no_batch_of_one_reaches_batchnorm():
    split = g.Split(torch.zeros(9, 4, 4, 3, dtype=torch.uint8), torch.arange(9))
    for train in (True, False):
        batches = g.Batches(split, ([0.0] * 3, [1.0] * 3), 4, train=train)
        assert [len(y) for _, y in batches] == [4, 5] and len(batches) == 2
    assert [len(y) for _, y in g.minibatches((split.x, split.y), 8, "cpu")] == [9]


def test_pixel_stats():
    x = torch.randint(256, (50, 4, 4, 3), dtype=torch.uint8)
    means, stds = g.pixel_stats(x)
    assert torch.allclose(torch.tensor(means), x.float().mean((0, 1, 2)), atol=1e-3)
    assert torch.allclose(torch.tensor(stds), x.float().std((0, 1, 2), correction=0), atol=1e-3)
    assert g.pixel_stats(torch.zeros(2, 4, 4, 3, dtype=torch.uint8))[1] == [1.0, 1.0, 1.0]


def test_shapes_is_fixed_balanced_and_not_linear():
    data = g.shapes()
    assert (
        data.train.x.shape == (4500, 32, 32, 3)
        and data.test.x.shape == (1000, 32, 32, 3)
        and data.train.x.dtype == torch.uint8
    )
    assert data.train.y.bincount().tolist() == [450] * 10 and data.test.y.bincount().tolist() == [100] * 10
    assert torch.equal(g.draw_shapes(1000, 2).x, data.test.x)
    # A linear classifier in closed form (ridge regression on the pixels), far below what a network reaches.
    flat = [
        torch.cat([s.x.flatten(1).float() / 255 - 0.5, torch.ones(len(s.y), 1)], 1) for s in (data.train, data.test)
    ]
    weights = torch.linalg.solve(
        flat[0].T @ flat[0] + 30 * torch.eye(flat[0].shape[1]), flat[0].T @ F.one_hot(data.train.y).float()
    )
    assert ((flat[1] @ weights).argmax(1) == data.test.y).float().mean() < 0.4


def test_validation_split_is_the_papers_and_disjoint(monkeypatch):
    x = torch.arange(500).view(500, 1, 1, 1).expand(500, 1, 1, 3)
    monkeypatch.setitem(
        g.LOADERS, "cifar10", lambda root: g.Data(g.Split(x, torch.arange(500)), g.Split(x[:9], torch.arange(9)), 10)
    )
    full, held = g.load_data("cifar10", "data"), g.load_data("cifar10", "data", held_out=True)
    assert len(full.train.y) == 500 and len(full.test.y) == 9
    assert len(held.train.y) == 450 and len(held.test.y) == 50  # 45,000 + 5,000 of 50,000
    assert sorted(torch.cat([held.train.y, held.test.y]).tolist()) == list(range(500))
    assert torch.equal(held.test.y, held.test.x[:, 0, 0, 0]) and torch.equal(
        held.test.y, g.load_data("cifar10", "data", held_out=True).test.y
    )


def picture(i, size=(8, 8)):
    """Noise; brighter for i from 100 on, so that the second class of make_folder can be told from the first."""
    gen = torch.Generator().manual_seed(i)
    return to_pil_image(torch.randint(256, (3, *size), generator=gen).clamp(90 * (i >= 100), 255).to(torch.uint8))


def make_folder(root, train=6, test=4, size=(8, 8), classes=("cat", "dog")):
    for part, n in (("train", train), ("test", test)):
        for k, name in enumerate(classes):
            (root / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(n):
                picture(100 * k + i + (part == "test") * 50, size).save(root / part / name / f"{i:03}.png")
    return root


def archive(path, files):
    """A .tar.gz of {name: bytes}."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def cifar_archive(path, cls, monkeypatch, n=3):
    """CIFAR's real format: a tar.gz of pickled dicts of uint8 rows, red plane first. Its md5s become the right ones."""
    numpy = pytest.importorskip("numpy")
    fine = cls is torchvision.datasets.CIFAR100
    key, labels = cls.meta["key"], "fine_labels" if fine else "labels"
    files, rows = {}, {}
    for k, (name, _) in enumerate(cls.train_list + cls.test_list):
        rows[name] = numpy.random.default_rng(k).integers(0, 256, (n, 3072), dtype="uint8")
        files[name] = pickle.dumps({"data": rows[name], labels: [(k + i) % 10 for i in range(n)]})
    classes = [f"class{i}" for i in range(100 if fine else 10)]
    files[cls.meta["filename"]] = pickle.dumps({key: classes})
    archive(path, {f"{cls.base_folder}/{name}": content for name, content in files.items()})
    md5 = lambda name: tv_utils.calculate_md5(path.parent / name)  # noqa: E731
    for name, content in files.items():
        (path.parent / name).write_bytes(content)
    for part in ("train_list", "test_list"):
        monkeypatch.setattr(cls, part, [[name, md5(name)] for name, _ in getattr(cls, part)])
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": md5(cls.meta["filename"])})
    monkeypatch.setattr(cls, "tgz_md5", md5(path.name))
    return torch.from_numpy(numpy.concatenate([rows[name] for name, _ in cls.train_list]))


def no_network(monkeypatch, serve=None):
    """Downloads fail, but those from serve = {part of the address: file}. Returns the list of what was asked for."""
    asked = []

    def urlopen(request, *args, **kw):
        url = getattr(request, "full_url", request)
        asked.append(url)
        for part, path in (serve or {}).items():
            if part in url:
                response = io.BytesIO(path.read_bytes())
                response.url, response.length, response.headers = url, len(path.read_bytes()), {}
                return response
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return asked


@pytest.mark.parametrize(
    "name, cls, classes",
    [("cifar10", torchvision.datasets.CIFAR10, 10), ("cifar100", torchvision.datasets.CIFAR100, 100)],
)
def test_cifar_from_an_archive_put_there_by_hand(name, cls, classes, tmp_path, monkeypatch):
    asked = no_network(monkeypatch)
    rows = cifar_archive(tmp_path / cls.filename, cls, monkeypatch)
    for _ in range(2):  # unpacked the first time, found the second
        data = g.load_data(name, tmp_path)
        assert data.classes == classes and data.pad == 4 and len(data.test.y) == 3
        assert torch.equal(data.train.x.permute(0, 3, 1, 2).flatten(1), rows) and data.train.y.dtype == torch.int64
        assert data.train.y[:3].tolist() == [0, 1, 2]
        if asked:
            pytest.fail(f"asked the network for {asked}")


def test_cifar10_tries_the_mirror_first_and_checks_what_it_sends(tmp_path, monkeypatch):
    cls, source = torchvision.datasets.CIFAR10, tmp_path / "source"
    source.mkdir()
    cifar_archive(source / cls.filename, cls, monkeypatch)
    broken = source / "broken"
    broken.write_bytes(b"not what it should be")
    asked = no_network(monkeypatch, {"brainchip": broken, "toronto": source / cls.filename})
    data = g.load_data("cifar10", tmp_path / "data")
    assert len(data.train.y) == 15 and "brainchip" in asked[0] and "toronto" in asked[-1]
    no_network(monkeypatch)
    with pytest.raises(g.InputError, match=r"cifar-10-python.tar.gz.*--dataset shapes"):
        g.load_data("cifar10", tmp_path / "empty")


def test_tinyimagenet_from_its_zip(tmp_path, monkeypatch):
    file = tmp_path / "tiny-imagenet-200.zip"
    jpeg = io.BytesIO()
    picture(0, (64, 64)).save(jpeg, "JPEG")
    with zipfile.ZipFile(file, "w") as z:
        for wnid in ("n01443537", "n01629819"):
            for i in range(2):
                z.writestr(f"tiny-imagenet-200/train/{wnid}/images/{wnid}_{i}.JPEG", jpeg.getvalue())
            z.writestr(f"tiny-imagenet-200/train/{wnid}/{wnid}_boxes.txt", f"{wnid}_0.JPEG\t0\t0\t9\t9\n")
        held = ("n01629819", "n01443537", "n01629819")
        for i in range(3):
            z.writestr(f"tiny-imagenet-200/val/images/val_{i}.JPEG", jpeg.getvalue())
        labels = "".join(f"val_{i}.JPEG\t{wnid}\t0\t0\t9\t9\n" for i, wnid in enumerate(held))
        z.writestr("tiny-imagenet-200/val/val_annotations.txt", labels)
    no_network(monkeypatch)
    monkeypatch.setattr(tv_utils, "check_md5", lambda *a, **kw: True)
    data = g.load_data("tinyimagenet", tmp_path)
    assert data.train.x.shape == (4, 64, 64, 3) and data.train.y.tolist() == [0, 0, 1, 1]
    assert data.test.y.tolist() == [1, 0, 1] and data.classes == 2
    with pytest.raises(g.InputError, match="tiny-imagenet-200.zip"):
        g.load_data("tinyimagenet", tmp_path / "empty")


def test_caltech101_from_its_folder(tmp_path, monkeypatch):
    for name, n in (("accordion", 6), ("BACKGROUND_Google", 2), ("Faces", 4)):
        home = tmp_path / "caltech101" / "101_ObjectCategories" / name
        home.mkdir(parents=True)
        for i in range(1, n + 1):
            image = picture(i, (20 + i, 30))
            (image.convert("L") if i == 1 else image).save(home / f"image_{i:04}.jpg")
    (tmp_path / "caltech101" / "Annotations").mkdir()
    no_network(monkeypatch)
    data, held = g.load_data("caltech101", tmp_path), g.load_data("caltech101", tmp_path, held_out=True)
    assert data.train.x.shape == (6, 224, 224, 3) and len(data.test.y) == 2 and len(held.test.y) == 2  # 60/20/20
    assert data.classes == 2 and data.pad == 0 and data.stats[0][0] == 255 * 0.485
    assert not torch.equal(data.test.x, held.test.x) and torch.equal(data.train.x, held.train.x)
    with pytest.raises(g.InputError, match="101_ObjectCategories"):
        g.load_data("caltech101", tmp_path / "empty")


def test_folder_of_images(tmp_path):
    data = g.load_data(f"folder:{make_folder(tmp_path)}", None)
    assert data.train.x.shape == (12, 8, 8, 3) and data.train.y.tolist() == [0] * 6 + [1] * 6 and data.classes == 2
    expected = torchvision.transforms.functional.pil_to_tensor(picture(103)).permute(1, 2, 0)
    assert torch.equal(data.train.x[9], expected)
    assert g.load_data(f"folder:{tmp_path}", None, image_size=16).test.x.shape == (8, 16, 16, 3)
    (tmp_path / "test").rename(tmp_path / "val")
    assert len(g.load_data(f"folder:{tmp_path}", None).test.y) == 8


# --- the paper's settings -------------------------------------------------------------------------------------


def test_settings_are_the_papers():
    at = g.paper_setting
    assert at("resnet20", "cifar10", 0.0144)[3:] == (150, 128, 5, "sgd", 0.1, 1e-4, 0.01, (80, 120))
    assert at("resnet20", "cifar10", 0.6)[5:10] == (8, "sgd", 0.05, 1e-8, 0.1)
    assert at("resnet20", "cifar10", 0.03).sparsity == 0.0373 and at("resnet20", "cifar10", 0.006).sparsity == 0.0059
    assert at("mobilenetv2", "cifar10", 0.0144).lam == 1.5e-5 and at("vgg16", "cifar10", 0.01).optimizer == "adam"
    assert at("resnet18", "tinyimagenet", 0.05)[3:8] == (200, 256, 5, "adam", 0.001)
    assert at("resnet50", "caltech101", 0.05)[3:] == (50, 16, 5, "adam", 0.01, 1e-6, 1e-4, (20, 40))
    assert (
        at("resnet20", "folder:x", 0.0144)[:2] == ("resnet20", "cifar10")
        and at("resnet32", "cifar100", 0.05).model == "resnet20"
    )
    for row in map(lambda row: g.Setting(*row), g.PAPER):
        assert row.model in models.MODELS and row.dataset in g.LOADERS and 0 < row.sparsity <= 1
        assert row.period <= row.epochs and all(0 < t < row.epochs for t in row.milestones)


def test_a_lambda_too_small_for_the_steps_is_named(pictures, tmp_path, capsys):
    """What it warns of is what happens: scores that the loss never moves, because every input is 0."""
    with pytest.warns(UserWarning, match=r"^lambda 0.0002 is small for 400 steps.*--lam") as found:
        g.check_lambda(0.0002, 0.1, 0.3, 10, 40)
    left, enough, s = re.search(r"leaves ([\d.]+)%.*--lam (\S+) leaves ([\d.]+)%", str(found[0].message)).groups()
    for lam, percent in ((0.0002, left), (float(enough), s)):
        data = [(torch.zeros(2, 200), torch.zeros(2).long())] * 40
        gem = g.mine(nn.Linear(200, 200, bias=False), data, sparsity=0.1, epochs=10, lr=0.3, lam=lam)
        assert abs(100 * (gem.p >= 0.5).float().mean() - float(percent)) < 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        g.check_lambda(0.0, 0.1, 0.3, 10, 40)
        g.check_lambda(1e-9, 0.5, 0.3, 10, 40)
        g.check_lambda(1e9, 0.1, 0.3, 10, 40)
        for row in map(lambda row: g.Setting(*row), g.PAPER):  # CIFAR-10 has 391 batches of 128, shapes 141 of 32
            if row.optimizer == "sgd":
                g.check_lambda(row.lam, row.sparsity, row.lr, row.epochs, 141 if row.dataset == "shapes" else 391)
    flags = "--epochs 1 --sparsity 0.05 --lam 1e-9 --finetune-epochs 0 --device cpu --dataset".split()
    for more in ((), ("--optimizer", "adam"), ("--penalty", "l1"), ("--rounding", "random")):
        out = tmp_path / "-".join(["run", *more])
        assert g.main([*flags, f"folder:{pictures}", "--out", str(out), *more]) == 0
        assert ("lambda 1e-09 is small for 1 steps" in capsys.readouterr().err) == (not more)


def test_the_period_shrinks_with_the_epochs():
    def plan(*argv):
        return g.complete(g.read(g.parser(), argv))

    assert (plan().epochs, plan().period) == (150, 5)
    assert (
        plan("--epochs", "60").period == 2
        and plan("--epochs", "10").period == 1
        and plan("--epochs", "3000").period == 100
    )
    assert plan("--epochs", "10").milestones == [80 / 150, 120 / 150]
    assert plan("--model", "mobilenetv2").milestones == [150 / 300, 250 / 300]
    assert plan("--epochs", "3000", "--period", "150").period == 150 and plan("--epochs", "10").finetune_epochs == 10


# --- the command line -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("pictures"), train=16, test=10)


def command(pictures, out, *more):
    settings = "--epochs 3 --batch-size 8 --sparsity 0.3 --lr 2 --lam 0.008 --device cpu".split()
    return ["--dataset", f"folder:{pictures}", "--out", str(out), *settings, *more]


def stop_after(monkeypatch, n):
    """Ctrl-C right after the n-th checkpoint."""
    real, left = g.save, [n]

    def save(path, content):
        real(path, content)
        left[0] -= path.name == "checkpoint.pt"
        if left[0] == 0 and path.name == "checkpoint.pt":
            raise KeyboardInterrupt

    monkeypatch.setattr(g, "save", save)


def artefacts(out):
    """Everything a run leaves that must not depend on time or interruptions."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    result = json.loads((out / "result.json").read_text())
    for row in [*rows, result]:
        row.pop("seconds")
    del result["command"], result["checksum"]
    return rows, result, torch.load(out / "gem.pt", weights_only=True)


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.fixture(scope="module")
def finished(pictures, tmp_path_factory):
    """One undisturbed run with all checks."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert g.main(command(pictures, out, "--checks")) == 0
    return out


def test_a_run_leaves_what_it_promises(finished, pictures, capsys):
    rows, result, file = artefacts(finished)
    d, kept = g.Network(models.resnet20(2)).d, round(0.3 * 267_824)
    assert d == 267_824 and result["total"] == d and result["kept"] == result["kept_q"] == kept >= result["kept_m"]
    assert (
        sum(layer["kept"] for layer in result["layers"]) == kept
        and sum(layer["total"] for layer in result["layers"]) == d
    )
    for key in ("model", "dataset", "method", "sparsity", "epochs", "seed", "device", "torch"):
        assert key in result
    assert [(row["phase"], row["epoch"]) for row in rows] == [
        (phase, j) for phase in ("mine", "finetune", "shuffle", "reinit", "invert (mine)", "invert") for j in (1, 2, 3)
    ]
    assert result["pre_finetune_acc"] == rows[2]["test_acc"] and result["post_finetune_acc"] == rows[5]["test_acc"]
    checks = {row["phase"]: row for row in rows if row["epoch"] == 3}
    for name in ("shuffle", "reinit", "invert"):
        its, acc = checks[name]["test_acc"], result["post_finetune_acc"]
        error = 100 * ((acc / 100 * (1 - acc / 100) + its / 100 * (1 - its / 100)) / 20) ** 0.5
        expected = {"post_finetune_acc": its, "kept": kept, "passed": acc - its > 3 * error}
        assert result["checks"][name] == expected

    # gem.pt: each network in it, loaded into a plain module, gives the accuracy that was reported.
    _, test = load_pictures(pictures)
    for part, acc in (("gem", "pre_finetune_acc"), ("finetuned", "post_finetune_acc")):
        model = models.build(file["model"], **file["build"])
        model.load_state_dict(file[part])
        assert math.isclose(g.accuracy(model, test), result[acc], abs_tol=1e-4)
    assert torch.equal(file["mean"], test.mean) and torch.equal(file["std"], test.std)
    weights = {n: t for n, t in file["finetuned"].items() if n in file["mask"]}
    assert sum(int((t != 0).sum()) for t in weights.values()) <= kept
    assert all((t[~file["mask"][n]] == 0).all() for n, t in weights.items())
    assert sum(int(t.sum()) for t in file["mask"].values()) == kept
    models.build("resnet20", 2).load_state_dict(file["initial"])
    assert all(t.unique().numel() == 2 for n, t in file["initial"].items() if n in file["mask"])  # +-c, untouched
    for n, p in file["scores"].items():
        assert 0 <= p.min() and p.max() <= 1
        assert torch.equal(file["gem"][n], file["initial"][n] * ((p >= 0.5) & file["q"][n]))
    assert not torch.equal(file["gem"]["bn1.running_var"], file["finetuned"]["bn1.running_var"])


def load_pictures(pictures):
    data = g.load_data(f"folder:{pictures}", None)
    stats = g.pixel_stats(data.train.x)
    return g.Batches(data.train, stats, 8), g.Batches(data.test, stats, 1000)


def test_what_a_run_shows(pictures, tmp_path, capsys):
    assert g.main(command(pictures, tmp_path / "run", "--epochs", "2")) == 0
    out, err = capsys.readouterr()
    assert "d = 267,824; keep 80,347 weights (30%)" in out and "freezing every 1" in out
    assert "80,347 of 267,824 weights: 30.000%" in out
    lines = [line for line in out.splitlines() if line.startswith(("mine ", "finetune "))]
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1 == len(
        {len(line) for line in [*lines[:1], g.Run.HEAD]}
    )
    assert out.count("#") > 10 and "conv1.weight" in out and not err


def test_same_seed_same_bits(finished, pictures, tmp_path):
    assert g.main(command(pictures, tmp_path / "run", "--checks")) == 0
    assert all(same(a, b) for a, b in zip(artefacts(tmp_path / "run"), artefacts(finished)))


@pytest.mark.parametrize("stops", [(1,), (3,), (4, 1), (6,), (7, 5), (13,), (15,), (17,)])
def test_resumed_equals_uninterrupted(stops, finished, pictures, tmp_path, monkeypatch, capsys):
    """Interrupted in and between all phases: 1 mining, 3 its end, 4 finetuning, 6 its end, 7.. the checks."""
    argv, resume = command(pictures, tmp_path / "run", "--checks"), []
    for n in stops:
        with monkeypatch.context() as patch:
            stop_after(patch, n)
            assert g.main(argv + resume) == 130
        assert "--resume" in capsys.readouterr().err
        resume = ["--resume"]
    assert g.main(argv + resume) == 0
    assert all(same(a, b) for a, b in zip(artefacts(tmp_path / "run"), artefacts(finished)))


def test_checks_can_be_added_to_a_finished_run(finished, pictures, tmp_path):
    argv = command(pictures, tmp_path / "run")
    assert g.main(argv) == 0 and "checks" not in artefacts(tmp_path / "run")[1]
    for more in (["--checks"], []):  # and they stay when it is resumed without
        assert g.main([*argv, "--resume", *more]) == 0
        assert all(same(a, b) for a, b in zip(artefacts(tmp_path / "run"), artefacts(finished)))


def test_every_check_starts_from_the_same_state_as_the_gem(pictures, tmp_path, monkeypatch):
    """Also where the weights are pretrained, which the model itself no longer holds when the inversion is mined."""
    mined, retrained, prepare, mine, finetune = [], [], g.prepare, g.mine, g.finetune

    def watch_mine(f, *args, init, invert=False, **kw):
        mined.append({"invert": invert, "w": init(f), **f.rest()})
        return mine(f, *args, init=init, invert=invert, **kw)

    def watch_finetune(f, *args, **kw):
        retrained.append(f.rest())
        return finetune(f, *args, **kw)

    monkeypatch.setattr(g, "mine", watch_mine)
    monkeypatch.setattr(g, "finetune", watch_finetune)
    monkeypatch.setattr(g, "prepare", lambda args: [*prepare(args)[:3], {"affine": True}])  # as for Caltech-101
    assert g.main(command(pictures, tmp_path / "run", "--epochs", "1", "--checks")) == 0
    assert [start.pop("invert") for start in mined] == [False, True] and same(*mined)
    assert len(retrained) == 4 and all(same(start, retrained[0]) for start in retrained)


def test_checkpoints_take_their_share_of_the_time_and_no_more(finished, pictures, tmp_path, monkeypatch, capsys):
    argv, real, rows = command(pictures, tmp_path / "run", "--checks"), g.save, []

    def save(path, content):
        real(path, content)
        if path.name == "checkpoint.pt":
            rows.append(len(content["rows"]))

    monkeypatch.setattr(g, "save", save)
    monkeypatch.setattr(g.Run, "SHARE", 1e-9)
    with monkeypatch.context() as patch:
        real_show, shown = g.Run.show, []
        patch.setattr(g.Run, "show", lambda *a: shown.append(1) if len(shown) < 4 else real_show(1 / 0))
        with pytest.raises(ZeroDivisionError):  # killed in the fifth epoch
            g.main(argv)
    assert rows == [1, 3]  # the first, and the end of mining
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 5
    assert g.main([*argv, "--resume"]) == 0
    assert rows[2:] == [4, 6, 9, 12, 15, 18]  # of this process the first; then, where a phase ends
    assert all(same(a, b) for a, b in zip(artefacts(tmp_path / "run"), artefacts(finished)))


def test_testing_less_often_changes_nothing_else(pictures, tmp_path, capsys):
    for name, more in (("often", ()), ("less", ("--eval-every", "2"))):
        assert g.main(command(pictures, tmp_path / name, *more)) == 0
    often, less = (artefacts(tmp_path / name) for name in ("often", "less"))
    assert [row["test_acc"] for row in less[0]] == [
        row["test_acc"] if row["epoch"] in (2, 3) else None for row in often[0]
    ]
    assert [{**row, "test_acc": 0} for row in less[0]] == [{**row, "test_acc": 0} for row in often[0]]
    assert less[1].pop("eval_every") == 2 and often[1].pop("eval_every") == 1
    del often[2]["settings"]["eval_every"], less[2]["settings"]["eval_every"]
    assert same(often[1], less[1]) and same(often[2], less[2])


def test_random_rounding_and_adam_resume_too(pictures, tmp_path, monkeypatch):
    more = ("--rounding", "random", "--optimizer", "adam", "--lr", "0.05", "--finetune-mask", "m")
    assert g.main(command(pictures, tmp_path / "a", *more)) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert g.main(command(pictures, tmp_path / "b", *more)) == 130
    assert g.main(command(pictures, tmp_path / "b", *more, "--resume")) == 0
    assert all(same(a, b) for a, b in zip(artefacts(tmp_path / "a"), artefacts(tmp_path / "b")))


@pytest.mark.parametrize(
    "flags",
    ["--model resnet32", "--sparsity 0.1", "--image-size 32", "--val", "--seed 1", "--epochs 2", "--period 2", "--batch-size 4",
     "--optimizer adam", "--lr 0.5", "--lam 0.1", "--penalty l1 --lam 0.01", "--rounding random", "--bf16"],
)  # fmt: skip
def test_every_flag_of_mining_changes_the_mining(flags, finished, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(
        g,
        "finetune",
        lambda f, w, m, *a, on_epoch, **kw: on_epoch(dict(epoch=1, lr=0, q=1, m=1, loss=0, train_acc=0), w, {}) or w,
    )
    assert g.main(command(pictures, tmp_path / "run", *flags.split())) == 0
    _, result, file = artefacts(tmp_path / "run")
    assert not same(file["scores"], artefacts(finished)[2]["scores"])


@pytest.mark.parametrize(
    "flags", ["--finetune-mask m", "--finetune-epochs 2", "--finetune-lr 0.2", "--finetune-schedule cosine"]
)
def test_every_flag_of_finetuning_changes_the_finetuning_alone(flags, finished, pictures, tmp_path):
    assert g.main(command(pictures, tmp_path / "run", *flags.split())) == 0
    file, base = artefacts(tmp_path / "run")[2], artefacts(finished)[2]
    assert same(file["scores"], base["scores"]) and not same(file["finetuned"], base["finetuned"])
    if "mask" in flags:
        m = {n: (file["scores"][n] >= 0.5) & file["q"][n] for n in file["q"]}
        assert same(file["mask"], m)


def test_the_other_flags_do_something(pictures, tmp_path, monkeypatch, capsys):
    """--data-dir, --compile, --device and the default of --out; --checks, --resume and --out are tested above."""
    seen = {}
    monkeypatch.setitem(
        g.LOADERS, "cifar10", lambda root: seen.update(root=root) or g.load_data(f"folder:{pictures}", None)
    )
    monkeypatch.setattr(torch, "compile", lambda call, **_: seen.update(compiled=True) or call)
    monkeypatch.chdir(tmp_path)
    assert g.main(["--epochs", "1", "--data-dir", "elsewhere", "--compile", "--device", "cpu"]) == 0
    assert seen == {"root": Path("elsewhere"), "compiled": True}
    assert (tmp_path / "runs" / "gem-miner-resnet20-cifar10-0.0144-seed0" / "result.json").exists()
    handled = {a.option_strings[0] for a in g.parser()._actions} - {"-h"}
    assert handled == set(
        "--model --dataset --sparsity --image-size --val --seed --epochs --period --batch-size --optimizer --lr --lam --penalty --rounding"
        " --finetune-mask --finetune-epochs --finetune-lr --finetune-schedule --checks --out --resume --data-dir --eval-every --device --bf16 --compile".split()
    )  # a new flag needs a test


def refused(argv, capsys, *words):
    """The command ends with code 2 and one line that says all of the words."""
    capsys.readouterr()
    assert g.main([str(a) for a in argv]) == 2
    out, err = capsys.readouterr()
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err and err.startswith("gem_miner.py: error: "), (
        err
    )
    assert all(word in err for word in words), err


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--sparsity 0", ["KEPT"]), ("--sparsity -0.1", ["KEPT"]), ("--sparsity 1.44", ["0.0144"]), ("--sparsity 1.44%", ["0.0144"]), ("--sparsity 144", ["KEPT"]),
        ("--sparsity abc", ["--sparsity", "abc"]), ("--sparsity nan", ["KEPT"]), ("--sparsity 1e-9", ["1e-09", "weights"]),
        ("--epochs 0", ["--epochs", "from 1"]), ("--epochs 2.5", ["--epochs"]), ("--period 0", ["--period"]), ("--period 4", ["--period 4", "--epochs 3"]),
        ("--lr nan", ["--lr"]), ("--lr 0", ["--lr"]), ("--lam -1", ["--lam"]), ("--lam inf", ["--lam"]), ("--batch-size 0", ["--batch-size"]),
        ("--seed -1", ["--seed"]), ("--finetune-epochs -1", ["--finetune-epochs"]), ("--image-size 0", ["--image-size"]), ("--image-size 5000", ["4096"]),
        ("--model resnet21", ["resnet21", "vgg16"]), ("--dataset mnist", ["mnist", "cifar10", "folder:PATH"]),
        ("--dataset shapes --image-size 16", ["--image-size"]), ("--optimizer rms", ["rms"]), ("--nonsense", ["--nonsense"]),
        ("--resume", ["nothing to resume"]), ("--device cuda", ["cuda"]), ("--device tpu", ["tpu"]), ("--model vgg16", ["vgg16", "8x8", "--image-size"]),
        ("--dataset folder:", ["folder"]), ("--checks --finetune-epochs 0", ["--checks", "--finetune-epochs"]), ("--spar 0.1", ["--spar"]), ("--dataset folder:/nowhere", ["/nowhere", "train"]), ("--finetune-lr 1e9 --lam 0", ["not finite"]),
    ],
)  # fmt: skip
def test_bad_flags(flags, words, pictures, tmp_path, capsys, monkeypatch):
    if "cuda" in flags:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(command(pictures, tmp_path / "run", *flags.split()), capsys, *words)


def test_bad_folders(tmp_path, capsys):
    def try_folder(*words, **kw):
        refused(command(tmp_path, tmp_path / "run"), capsys, *words)

    try_folder("'train'")
    make_folder(tmp_path)
    (tmp_path / "train" / "cow").mkdir()
    try_folder("cow")
    make_folder(tmp_path, classes=["cow"])
    (tmp_path / "test" / "cow").rename(tmp_path / "cow")
    try_folder("same class folders", "cow")
    (tmp_path / "cow").rename(tmp_path / "test" / "cow")
    picture(0, (8, 9)).save(tmp_path / "train" / "dog" / "002.png")
    try_folder("002.png", "9x8", "8x8", "--image-size")
    (tmp_path / "train" / "dog" / "002.png").write_bytes(b"no picture")
    try_folder("cannot read", "002.png")
    (tmp_path / "train" / "dog" / "002.png").write_bytes((tmp_path / "train" / "dog" / "001.png").read_bytes()[:60])
    try_folder("cannot read", "002.png")


def test_bad_run_folders(finished, pictures, tmp_path, capsys):
    refused(command(pictures, finished), capsys, "already holds a run", "--resume")
    refused(command(pictures, finished, "--resume", "--sparsity", "0.05"), capsys, "--sparsity is 0.3", "not 0.05")
    refused(
        command(pictures, finished, "--resume", "--model", "resnet32"), capsys, "--model is resnet20", "not resnet32"
    )
    refused(command(pictures, tmp_path / "new", "--resume"), capsys, "nothing to resume")
    (tmp_path / "file").write_text("")
    refused(command(pictures, tmp_path / "file"), capsys, "cannot write")
    refused(command(pictures, tmp_path / "file" / "below"), capsys, "cannot write")
    content = (finished / "checkpoint.pt").read_bytes()
    for damage in (content[:1000], b"", b"x" * 500, content[:-300]):
        (tmp_path / "damaged").mkdir(exist_ok=True)
        (tmp_path / "damaged" / "checkpoint.pt").write_bytes(damage)
        refused(command(pictures, tmp_path / "damaged", "--resume"), capsys, "checkpoint.pt", "damaged")
    torch.save({"a": 1}, tmp_path / "damaged" / "checkpoint.pt")
    refused(command(pictures, tmp_path / "damaged", "--resume"), capsys, "not a checkpoint")
    shutil.copytree(finished, tmp_path / "mixed")
    gem = torch.load(tmp_path / "mixed" / "gem.pt", weights_only=True)
    gem["settings"]["seed"] = 1
    torch.save(gem, tmp_path / "mixed" / "gem.pt")
    refused(command(pictures, tmp_path / "mixed", "--resume"), capsys, "gem.pt", "--seed is 1, not 0")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "log.jsonl").write_text("of another program")
    refused(command(pictures, tmp_path / "other"), capsys, "already holds")
    assert (tmp_path / "other" / "log.jsonl").read_text() == "of another program"


def test_a_failed_download_says_what_to_do(tmp_path, capsys, monkeypatch):
    no_network(monkeypatch)
    for name, file in (
        ("cifar10", "cifar-10-python.tar.gz"),
        ("cifar100", "cifar-100-python.tar.gz"),
        ("tinyimagenet", "tiny-imagenet-200.zip"),
        ("caltech101", "101_ObjectCategories"),
    ):
        refused(
            ["--dataset", name, "--data-dir", tmp_path / "data", "--out", tmp_path / name],
            capsys,
            file,
            "--dataset shapes",
        )


def test_a_loss_that_is_not_finite_leaves_the_last_good_checkpoint(pictures, tmp_path, monkeypatch, capsys):
    argv = command(pictures, tmp_path / "run")
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        assert g.main(argv) == 130
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(g, "l2", lambda p, lam: p * math.nan)
        refused([*argv, "--resume"], capsys, "not finite in epoch 2")
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    assert g.main([*argv, "--resume"]) == 0


def test_too_little_memory_is_one_line(pictures, tmp_path, monkeypatch, capsys):
    for name, e in (
        ("mine", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")),
        (
            "mine",
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        ),
        ("mine", MemoryError()),
        ("plain", RuntimeError("DefaultCPUAllocator: can't allocate memory")),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(g if name == "mine" else g.Network, name, lambda *_, e=e, **__: (_ for _ in ()).throw(e))
            refused(command(pictures, tmp_path / "run"), capsys, "out of memory", "a smaller --batch-size")


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    g.save(tmp_path / "a", "first")
    monkeypatch.setattr(g.os, "replace", lambda *a: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(g.InputError, match="cannot write .*/a"):
        g.save(tmp_path / "a", "second, cut short")
    assert (tmp_path / "a").read_text() == "first" and len(list(tmp_path.iterdir())) == 1


def test_the_transfer_task_starts_from_pretrained_weights(tmp_path, monkeypatch):
    """--model resnet50 --dataset caltech101: torchvision's weights, affine BatchNorm, a new bias-free last layer."""
    theirs = torchvision.models.resnet50()
    monkeypatch.setattr(
        torchvision.models.ResNet50_Weights.IMAGENET1K_V1.__class__,
        "get_state_dict",
        lambda self, progress: theirs.state_dict(),
    )
    x = torch.randint(256, (4, 64, 64, 3), dtype=torch.uint8)
    split = g.Split(x, torch.tensor([0, 1, 2, 100]))
    monkeypatch.setitem(
        g.LOADERS,
        "caltech101",
        lambda root: g.Data(split, split, 101, pad=0, stats=([120.0] * 3, [60.0] * 3), val=split),
    )
    argv = ["--model", "resnet50", "--dataset", "caltech101", "--out", str(tmp_path), "--device", "cpu"]
    f, train, _, build = g.prepare(g.complete(g.read(g.parser(), argv)))
    assert build["affine"] and f.shapes[-1] == (101, 2048) and f.model.bn1.affine and f.model.fc.bias is None
    assert torch.equal(f.views(g.given(f))["layer3.5.conv2.weight"], theirs.layer3[5].conv2.weight)
    x = next(iter(train))[0]
    assert torch.allclose(x.mean((0, 2, 3)), torch.full((3,), 0.1), atol=0.2)


# --- baselines.py: each method against an oracle of its own ---------------------------------------------------


def loss_of(model, x, y, T=1):
    return F.cross_entropy(model(x) / T, y)


def with_weights(v, mode):
    """tiny() in train or eval mode, holding the weights v."""
    model = tiny().train(mode)
    g.Network(model).load(v)
    return model


def central_differences(function, c, h=1e-5):
    steps = h * torch.eye(len(c), dtype=c.dtype)
    return torch.stack([(function(c + e) - function(c - e)) / (2 * h) for e in steps])


def data_of(batches):
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def test_snip_is_the_change_of_the_loss_with_c():
    x, y = tiny_batches(1)[0]
    w = g.Network(tiny()).vector()
    slopes = central_differences(lambda c: loss_of(with_weights(c * w, False), x, y).detach(), torch.ones(42).double())
    p = b.snip(g.Network(tiny()), w, lambda: iter([(x, y)]))
    assert torch.allclose(p, slopes.abs(), atol=1e-8) and p.max() > 1e-3


def test_grasp_is_w_times_the_hessian_times_the_gradient():
    batches = tiny_batches(3)
    w = g.Network(tiny()).vector()
    counts = torch.bincount(data_of(batches)[1])
    k = int(counts.min())

    def gradient(v):  # of all k images of each class; by autograd through plain modules, no second derivative
        f, total, seen = g.Network(with_weights(v, True)), 0, {}
        picked = []
        for x, y in batches:
            for image, label in zip(x, y.tolist()):
                seen[label] = seen.get(label, 0) + 1
                if seen[label] <= k:
                    picked.append((image, label))
        n = -(-len(picked) // len(batches[0][1]))  # as many batches as they need
        for part in torch.arange(len(picked)).chunk(n):
            x, y = torch.stack([picked[i][0] for i in part]), torch.tensor([picked[i][1] for i in part])
            total = total + loss_of(f.model, x, y, T=200) * len(y)
        return f.vector(dict(zip(f.names, torch.autograd.grad(total, list(f.weights.values())))))

    h = gradient(w)
    hessian = central_differences(gradient, w)
    p = b.grasp(g.Network(tiny()), w, lambda: iter(batches), per_class=k)
    assert torch.allclose(p, w * (hessian @ h), rtol=1e-4, atol=1e-10) and (p < 0).any() and (p > 0).any()
    # The end that is removed: theirs is S = -w * (H g), the largest S go.
    gem = b.at_init(tiny(), batches, score="grasp", sparsity=0.5, init=g.given)
    S = -b.grasp(g.Network(tiny()), w, lambda: iter(batches))
    assert int(gem.m.sum()) == 42 - 21 + 1 and S[gem.m == 1].max() <= S[gem.m == 0].min()


def test_grasp_sees_as_many_images_of_each_class():
    y = torch.tensor([0, 0, 0, 0, 1, 0, 1, 2, 1, 2, 2, 0])
    x = torch.arange(12.0)[:, None].double()
    model = nn.Linear(1, 3).double()
    f = g.Network(model)
    parts = b.balanced(f, f.vector(), [(x[:4], y[:4]), (x[4:8], y[4:8]), (x[8:], y[8:])], 2)
    assert data_of(parts)[0].flatten().tolist() == [0, 1, 4, 6, 7, 9] and len(parts) == 2
    parts = b.balanced(f, f.vector(), [(x, y)], 100)  # fewer, where the data have fewer
    assert sorted(data_of(parts)[0].flatten().tolist()) == list(range(12))


def sequential(width=6):
    layers = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(width, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(64, 5, bias=False))


def test_synflow_conserves_the_sum_of_scores():
    """In a sequential network every layer's scores sum to R, also for a masked one; R by hand."""
    torch.manual_seed(0)
    f = g.Network(sequential().double())
    w = g.kaiming_normal(f) * (torch.rand(f.d) < 0.5)
    sums = [u.sum() for u in b.synflow(f, w, lambda: iter([(torch.randn(2, 3, 8, 8), None)])).split(f.sizes)]
    x, bn = torch.ones(1, 3, 8, 8).double(), (1 + 1e-5) ** -0.5
    v = list(f.views(w.abs()).values())
    x = F.max_pool2d(F.conv2d(x, v[0], padding=1) * bn, 2)
    R = (F.conv2d(x, v[1], padding=1) * bn).flatten(1) @ v[2].T
    assert all(math.isclose(s, R.sum(), rel_tol=1e-9) for s in sums)
    f, x = g.Network(tiny()), tiny_batches()[0]  # biases count with their absolute values
    w, scores = g.kaiming_normal(f), []
    for sign in (1, -1):
        f.restore({"conv.bias": sign * torch.tensor([1.0, 2.0])})
        scores.append(b.synflow(f, w, lambda: iter([x])))
    assert torch.equal(*scores) and scores[0].min() > 0


def test_synflow_empties_no_layer_where_one_shot_methods_do():
    torch.manual_seed(0)
    f, data = g.Network(sequential(64)), (torch.randn(20, 3, 8, 8), torch.arange(20) % 5)
    kept = [f.counts(b.at_init(f, data, score="synflow", sparsity=s).m) for s in (0.1, 0.02, 0.005)]
    assert all(min(counts.values()) > 0 for counts in kept)
    with pytest.warns(UserWarning, match="no weight is left in 4.weight"):
        b.at_init(f, data, score="magnitude", sparsity=0.005)


def test_synflow_prunes_in_100_exponential_steps_in_float64(monkeypatch):
    seen, largest = [], b.largest
    monkeypatch.setattr(
        b,
        "largest",
        lambda p, sizes, counts, invert: seen.append((len(p), *counts, p.dtype)) or largest(p, sizes, counts, invert),
    )
    f = g.Network(models.resnet20())
    b.at_init(f, (torch.randn(2, 3, 8, 8), torch.tensor([0, 1])), score="synflow", sparsity=0.0144)
    before, after, dtypes = zip(*seen)
    assert len(seen) == 100 and set(dtypes) == {torch.float64} and before == (f.d, *after[:-1])
    for k, keep in ((1, 0.958481), (2, 0.918686), (50, 0.12), (99, 0.0150238), (100, 0.0144)):  # FACTS 12.8
        assert abs(after[k - 1] - keep * f.d) < 1.5


def test_synflow_does_not_overflow_on_mobilenet(monkeypatch):
    monkeypatch.setitem(b.SCORES, "synflow", b.SCORES["synflow"]._replace(rounds=2))
    data = (torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
    assert b.at_init(models.mobilenetv2(), data, score="synflow", sparsity=0.05).m.sum() == 113_092


def test_prospr_without_steps_is_snip_and_with_one_differentiates_through_it():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    f, (x, y) = g.Network(model), tiny_batches(1)[0]
    assert torch.allclose(
        b.prospr(f, f.vector(), lambda: iter([(x, y)]), K=0), b.snip(f, f.vector(), lambda: iter([(x, y)]))
    )
    w, eta = g.Network(tiny()).vector(), 0.1

    def after_a_step(c):
        model = with_weights(c * w, True)
        parameters = list(model.parameters())
        grads = torch.autograd.grad(loss_of(model, x, y), parameters)
        with torch.no_grad():
            for p, grad in zip(parameters, grads):
                p -= eta * grad
        return loss_of(model, x, y).detach()

    frozen = tiny()
    frozen.bn.requires_grad_(False)  # must neither fail nor take a step
    assert not torch.allclose(
        b.prospr(g.Network(frozen), w, lambda: iter([(x, y)])), b.prospr(g.Network(tiny()), w, lambda: iter([(x, y)]))
    )
    p = b.prospr(g.Network(tiny()), w, lambda: iter([(x, y)]), K=1, eta=eta)
    assert torch.allclose(p, central_differences(after_a_step, torch.ones(42).double()).abs(), atol=1e-8)
    assert not torch.allclose(p, b.prospr(g.Network(tiny()), w, lambda: iter([(x, y)]), K=0), rtol=1e-2)


@pytest.mark.parametrize("method, counts", [
    ("snip", (3864, 1583, 13417)), ("grasp", (3866, 1585, 13418)), ("synflow", (3865, 1584, 13417)), ("prospr", (3865, 1584, 13417)),
    ("random", (3864, 1583, 13417)), ("magnitude", (3864, 1583, 13417)), ("dense", (268_336,) * 3),
])  # fmt: skip
def test_scored_methods_keep_what_their_authors_rule_says_and_leave_no_trace(method, counts, monkeypatch):
    """FACTS 12.8; and BatchNorm, the model's mode of evaluation, the random state, the seed."""
    monkeypatch.setitem(b.SCORES, "synflow", b.SCORES["synflow"]._replace(rounds=3))
    f = g.Network(models.resnet20())
    data = (torch.randn(8, 3, 8, 8), torch.arange(8) % 4)
    before, state = f.rest(), torch.get_rng_state()
    for s, n in zip((0.0144, 0.0059, 0.05), counts):
        gem = b.at_init(f, data, score=method, sparsity=s)
        assert int(gem.m.sum()) == n and gem.m.unique().numel() <= 2 and torch.equal(f.vector(), gem.w * gem.m)
    assert same(f.rest(), before) and torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    again = b.at_init(models.resnet20(), data, score=method, sparsity=0.05)
    assert torch.equal(gem.m, again.m) and torch.equal(gem.w, again.w)
    if method != "dense":
        assert not torch.equal(gem.m, b.at_init(f, data, score=method, sparsity=0.05, seed=1).m)
        assert gem.p[gem.m == 1].min() >= gem.p[gem.m == 0].max()
        if method == "magnitude":
            assert torch.equal(gem.p, gem.w.abs())
        if method != "random":
            low = b.at_init(f, data, score=method, sparsity=0.05, invert=True)
            assert low.m.sum() == gem.m.sum() and (low.m * gem.m).sum() == 0


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(FloatingPointError, match="snip"):
        b.at_init(tiny(), [(x * math.nan, y) for x, y in tiny_batches()], score="snip", sparsity=0.5)


@pytest.mark.parametrize(
    "variant",
    [{}, {"whole": True}, {"whole": True, "period": 1}, {"whole": True, "regularize": True}, {"invert": True}],
)
def test_edge_popup_is_the_papers(variant):
    """Against explicit SGD on the scores of a plain module: momentum 0.9, weight decay, cosine, |s|, top by layer."""
    batches, E, lr, s = tiny_batches(), 4, 2.0, 0.4
    f = g.Network(tiny())
    with g.seeded(f.device, 0, "scores"):
        bound = torch.tensor([1 / 3] * 18 + [8**-0.5] * 24, dtype=torch.float64)
        p = (2 * torch.rand(42, dtype=torch.float64) - 1) * bound
    w, velocity = b.draw(f, g.signed_constant, 0), torch.zeros(42).double()

    def top(p, j):
        n = [42] if "whole" in variant else [18, 24]
        kept = [42 - math.ceil(0.6 * 42)] if "whole" in variant else [18 - int(0.6 * 18), 24 - int(0.6 * 24)]
        if "period" in variant:  # E = 4, T = 1: three steps of 0.4^(1/3)
            kept = [42 - math.ceil(42 * (1 - 0.4 ** (min(3, max(1, j - 1)) / 3)))]
        order = [u.abs().argsort(descending="invert" not in variant) for u in p.split(n)]
        return torch.cat([torch.zeros(len(o)).double().scatter(0, o[:k], 1) for o, k in zip(order, kept)])

    model = tiny().train()
    for j in range(1, E + 1):
        for x, y in batches:
            g.Network(model).load(w * top(p, j))
            grads = torch.autograd.grad(loss_of(model, x, y), [model.conv.weight, model.fc.weight])
            slope = g.Network(model).vector(dict(zip(f.names, grads))) * w * p.sign()
            decay = 7e-4 if "regularize" in variant else 5e-4
            velocity = 0.9 * velocity + slope + decay * p
            p = p - lr * (1 + math.cos(math.pi * (j - 1) / E)) / 2 * velocity
    gem = b.edge_popup(f, batches, sparsity=s, epochs=E, lr=lr, **variant)
    assert torch.allclose(gem.p, p.abs(), atol=1e-10) and torch.equal(gem.w, w)
    assert torch.equal(gem.m, top(p, E))


def test_edge_popup_counts():
    """FACTS 12.7: of each layer, of the whole network, and gradually."""
    f = g.Network(models.resnet20())
    for s, expected in (
        (0.005, [3, *[12] * 6, 24, *[47] * 5, 93, *[185] * 5, 4]),
        (0.0144, [7, *[34] * 6, 67, *[133] * 5, 266, *[531] * 5, 10]),
    ):
        gem = b.edge_popup(f, [(torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))], sparsity=s, epochs=1)
        assert list(f.counts(gem.m).values()) == expected
    assert b.floor((1 - 0.9) * 10) == 1
    counts = [b.popup_count(f.d, 0.0059, j, 150, 5) for j in range(1, 151)]
    assert (
        counts[:11] == [224808] * 11 and counts[11:16] == [188340] * 5 and counts[16] == 157789 and counts[21] == 132193
    )
    assert counts[136] == 2255 and counts[141] == 1889 and counts[146:] == [1583] * 4
    for E, T in ((1, 1), (2, 1), (7, 3), (10, 1), (150, 8)):  # never below the target, never growing
        counts = [b.popup_count(f.d, 0.0059, j, E, T) for j in range(1, E + 1)]
        assert counts == sorted(counts, reverse=True) and counts[-1] >= 1583
    assert b.popup_count(100, 0.001, 10, 10, 1) == 1  # but never none at all


def test_imp_counts_are_the_authors():
    n, counts = 268_336, []
    for _ in range(29):
        counts.append(n := n - math.ceil(n / 5) - 1)
    authors = "214667 171732 137384 109906 87923 70337 56268 45013 36009 28806 23043 18433 14745 11795 9435 7547 6036 4827 3860 3087 2468 1973 1577 1260 1007 804 642 512 408"
    assert counts == list(map(int, authors.split()))
    assert [b.imp_rounds(s) for s in (0.5, 0.1374, 0.0373, 0.0144, 0.0059, 0.8)] == [3, 9, 15, 19, 23, 1]
    with pytest.raises(g.InputError, match="below 0.9"):
        b.imp_rounds(0.95)


def masked_sgd(w, m, batches, E, state, steps=None):
    """w after E epochs of SGD (momentum 0.9, weight decay 1e-4, multistep) on `state`; or after so many steps."""
    model = state
    f, parameters = g.Network(model.train()), dict(model.named_parameters())
    f.load(w * m)
    masks = dict(f.views(m))
    velocity = {n: torch.zeros_like(p) for n, p in parameters.items()}
    done = 0
    for j in range(1, E + 1):
        for x, y in batches:
            if done == steps:
                return f.vector()
            grads = torch.autograd.grad(loss_of(model, x, y), list(parameters.values()))
            with torch.no_grad():
                for (n, p), grad in zip(parameters.items(), grads):
                    velocity[n] = 0.9 * velocity[n] + masks.get(n, 1) * grad + 1e-4 * p
                    p -= g.multistep(0.1, j, E) * velocity[n]
            done += 1
    return f.vector()


@pytest.mark.parametrize("rewind", [0, 6, None])
def test_imp_and_lrr_are_train_prune_rewind(rewind):
    """Cold, warm after 6 of the first round's 12 steps, and never rewound; s = 0.5 takes three rounds."""
    batches, E = tiny_batches(), 3
    f = g.Network(tiny())
    result = b.imp(f, batches, sparsity=0.5, epochs=3 * E, rewind=rewind)
    w = b.draw(g.Network(tiny()), g.kaiming_normal, 0)
    model, start_model, m, counts = tiny(), tiny(), torch.ones(42).double(), []
    start = masked_sgd(w, m, batches, E, start_model, steps=rewind or 0)
    for _ in range(3):
        trained = masked_sgd(w, m, batches, E, model)
        alive = m.nonzero().flatten()
        gone = alive[trained[alive].abs().argsort()[: math.ceil(len(alive) / 5) + 1]]
        m[gone] = 0
        counts.append(int(m.sum()))
        if rewind is None:
            w = trained  # and BatchNorm and the bias go on, too
        else:
            w, model = start, copy.deepcopy(start_model)
    assert counts == [32, 24, 18] and torch.equal(result.m, m) and torch.equal(result.q, m)
    assert torch.allclose(result.w * m, w * m, atol=1e-10)
    rest = {n: t for n, t in model.state_dict().items() if n not in f.weights}
    assert all(torch.allclose(t, rest[n].double() if t.is_floating_point() else rest[n]) for n, t in f.rest().items())
    if rewind == 0:
        assert torch.equal(result.w, w)  # to the bit


def test_every_round_of_imp_has_its_own_randomness():
    drawn = []

    class Data:
        def __iter__(self):
            drawn.append(torch.rand(()).item())
            return iter(tiny_batches())

    b.imp(tiny(), Data(), sparsity=0.5, epochs=6)
    assert len(drawn) == len(set(drawn)) == 6


def test_values_that_would_quietly_do_something_else_are_refused():
    with pytest.raises(g.InputError, match="3 rounds"):
        b.imp(tiny(), tiny_batches(), sparsity=0.5, epochs=2)
    with pytest.raises(g.InputError, match="not 10"):
        b.at_init(tiny(), tiny_batches(), score="snip", sparsity=10)
    counts = [b.edge_popup(tiny(), tiny_batches(), sparsity=0.5, epochs=2, period=1, whole=v).m for v in (False, True)]
    assert torch.equal(*counts)  # gradual pruning is of the whole network


def test_imp_says_when_it_cannot_rewind_that_far(pictures, tmp_path, capsys):
    with pytest.raises(g.InputError, match="step 13.* has 12"):
        b.imp(tiny(), tiny_batches(), sparsity=0.5, epochs=9, rewind=13)
    flags = "imp --rewind 9 --round-epochs 2 --sparsity 0.8"
    refused_baseline(baseline(pictures, tmp_path, flags), capsys, "step 9", "has 8")
    assert (tmp_path / "log.jsonl").read_text() == ""  # not after a round of perhaps 150 epochs


def test_smart_ratio_is_the_hand_computed_one():
    """FACTS 12.3 and 12.4; the first is what the authors' own file says for all layers."""
    f = g.Network(models.resnet20())
    p = b.smart_ratio(f.sizes, 0.0144)
    assert math.isclose(p[0], 0.10079916, abs_tol=1e-8) and math.isclose(p[18], 0.00143999, abs_tol=1e-8)
    kept = [43, 210, 189, 169, 150, 132, 116, 201, 345, 291, 243, 199, 159, 247, 371, 265, 176, 106, 53, 192]
    m = b.smart_ratio_ticket(f, tiny_batches(), densities=lambda f: p).m
    assert torch.equal(m, b.random_mask(f, p, 0)) and list(f.counts(m).values()) == kept and sum(kept) == 3857
    assert not torch.equal(m, b.random_mask(f, p, 1)) and torch.equal(m, b.random_mask(f, p, 0))
    for ends, total in (((149 / 432, 166 / 640), 3937), ((1.0, 1.0), 4694)):  # v2 and v3
        v = [ends[0], *p[1:-1], ends[1]]
        assert b.smart_ratio_ticket(f, tiny_batches(), densities=lambda f, v=v: v).m.sum() == total
    sizes = [1728, 36864, 73728, 147456, 294912, 589824, 589824, 1179648, *[2359296] * 5, 5120]
    p = b.smart_ratio(sizes, 0.005, vgg=True)
    assert p[0] == 1 and math.isclose(p[1], 0.29080379, abs_tol=1e-8) and math.isclose(p[12], 0.00021662, abs_tol=1e-8)
    assert [b.floor(n * x) for n, x in zip(sizes, p)] == [
        1728, 10720, 7797, 7422, 7917, 8997, 5288, 6297, 7464, 4318, 2379, 1199, 511, 1536]  # fmt: skip
    with pytest.raises(g.InputError, match="0.00072"):
        b.smart_ratio(f.sizes, 0.0005)


def test_the_grid_around_imp_holds_what_the_authors_found_best():
    f = g.Network(models.resnet20())
    kept = [194, 244, 227, 201, 179, 182, 166, 285, 300, 308, 221, 186, 158, 217, 171, 124, 128, 116, 81, 172]
    best = [
        54.907,
        11.590,
        10.852,
        8.724,
        7.769,
        7.899,
        6.205,
        5.185,
        3.255,
        3.342,
        2.398,
        2.018,
        1.714,
        1.177,
        0.5639,
        0.3364,
        0.3472,
        0.3147,
        0.1197,
        16.875,
    ]
    grid = b.ratio_grid([k / n for k, n in zip(kept, f.sizes)])
    assert len(grid) == 144 == len(set(map(tuple, grid)))
    assert sum(all(abs(100 * x - y) < 1e-3 for x, y in zip(p, best)) for p in grid) == 1
    for L in (2, 3, 14, 58):
        assert len(b.ratio_grid([0.5] * L)) == 144 and all(len(p) == L for p in b.ratio_grid([0.5] * L))
    assert all(0 <= x <= 1 for p in b.ratio_grid([0.0, 1.0, 0.5]) for x in p)


def test_equation_1_moves_densities_downhill():
    """Two layers, each a single useful weight and noise: the mean loss over masks falls; the first step is its slope."""
    torch.manual_seed(0)
    x = torch.randn(400, 6)
    y = (x @ torch.tensor([1.0, -1, 1, 1, -1, 1]) > 0).long()
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 2, bias=False), nn.BatchNorm1d(2))
    f, start = g.Network(model), [0.3, 0.6]
    found, before = {}, f.rest()

    def watch(row, v, state):
        found[row["epoch"]] = state.get("u")
        if "stage" not in row:  # the weights are signed constants
            assert all(u.abs().unique().numel() <= 2 for u in v.split(f.sizes)) and row["lr"] in (0.02, 1e6)

    b.smart_ratio_ticket(f, [(x, y)] * 20, densities=lambda f: start, tune=0.02, epochs=5, on_epoch=watch)
    assert same(f.rest(), before)  # the ticket is not tested on the statistics of other weights
    w, sizes = b.draw(f, g.signed_constant, 0), torch.tensor(f.sizes)

    def expected_loss(p, n=400):
        torch.manual_seed(1)
        masks = torch.rand(n, f.d) < torch.tensor(p).repeat_interleave(sizes)
        f.train()
        return sum(F.cross_entropy(f(w * m, x), y).item() for m in masks) / n

    tuned = found[4].tolist()
    assert expected_loss(tuned) < expected_loss(start) - 0.01 and tuned != start and all(0 <= p <= 1 for p in tuned)
    b.smart_ratio_ticket(f, [(x, y)] * 20, densities=lambda f: start, tune=1e6, epochs=3, on_epoch=watch)
    assert set(found[2].tolist()) <= {0.0, 1.0}  # kept in the box


# --- baselines.py: its command line ---------------------------------------------------------------------------


def baseline(pictures, out, flags):
    """A run of a method in a second or two."""
    name, *flags = flags.split()
    settings = "--epochs 2 --batch-size 8 --sparsity 0.3 --device cpu".split()
    return [name, "--dataset", f"folder:{pictures}", "--out", str(out), *settings, *flags]


RUNS = [
    "dense", "imp --rewind 3", "lrr --round-epochs 1", "ep", "ep --global", "ep --gradual --epochs 3", "ep --regularize --lr 0.5",
    "snip", "grasp", "synflow", "prospr", "random", "magnitude", "sr", "sr --version 2", "sr --version 3",
    "sr --version 4 --trials 2 --round-epochs 1", "sr --version 5 --lr 0.01", "sr --version 6 --trials 1 --round-epochs 1 --lr 0.01",
]  # fmt: skip


@pytest.fixture(scope="module")
def baselines_done(pictures, tmp_path_factory):
    """{flags: folder} of a finished run of every method, with its checks."""
    home, done = tmp_path_factory.mktemp("baselines"), {}
    for i, flags in enumerate(RUNS):
        done[flags] = home / str(i)
        checks = [] if flags.split()[0] in ("dense", "lrr") else ["--checks"]
        assert b.main([*baseline(pictures, done[flags], flags), *checks]) == 0
    return done


@pytest.mark.parametrize("flags", RUNS)
def test_every_method_runs_as_gem_miner_does(flags, baselines_done, pictures):
    rows, result, file = artefacts(baselines_done[flags])
    method, f = flags.split()[0], g.Network(models.resnet20(2))
    assert result["sparsity"] == (1 if method == "dense" else 0.3) and result["finetune_lr"] == 0.1
    lrs = [row["lr"] for row in rows if row["phase"] == "finetune"]
    assert lrs[:2] == pytest.approx([0.1, 0.075 if len(lrs) == 3 else 0.05 if method == "ep" else 0.01])
    assert (
        result["method"] == method
        and result["total"] == f.d
        and result["post_finetune_acc"] == [r for r in rows if r["phase"] == "finetune"][-1]["test_acc"]
    )
    searched = [row for row in rows if row["phase"] == "mine"]
    assert searched[-1]["stage"] == "ticket" and result["pre_finetune_acc"] == searched[-1]["test_acc"]
    epochs = {
        "imp": 10,
        "lrr": 5,
        "ep": 3 if "3" in flags else 2,
        "snip": 1,
        "grasp": 1,
        "synflow": 1,
        "prospr": 1,
    }.get(method, 0)
    epochs = {"4": 2, "5": 2, "6": 2}.get(flags[13:14], 0) if method == "sr" else epochs
    assert result["search_epochs"] == epochs and len(searched) == (epochs if epochs > 1 else 0) + 1
    kept = {"dense": f.d, "imp": 87_756, "lrr": 87_756, "grasp": 80_349, "synflow": 80_348, "prospr": 80_348}.get(
        method, 80_347
    )
    if method != "sr" and flags != "ep":
        assert result["kept"] == kept == sum(int(m.sum()) for m in file["mask"].values())
    checks = {"dense": None, "lrr": None, "imp": 2, "random": 2, "sr": 2}.get(method, 3)
    assert len(result["checks"]) == checks if checks else "checks" not in result
    for name, check in result.get("checks", {}).items():
        assert check["kept"] == (result["kept"]) and name in g.CHECKS
    # Pruned weights have not come back, and the others were trained from what the file says.
    for n, m in file["mask"].items():
        assert (file["finetuned"][n][~m] == 0).all() and torch.equal(file["gem"][n], file["initial"][n] * m)
    assert not same(file["finetuned"], file["gem"])
    magnitudes = file["initial"]["conv1.weight"].abs().unique().numel()
    assert magnitudes == 1 if method == "ep" else magnitudes > 100  # signed constant, Kaiming normal
    model = models.build(file["model"], **file["build"])
    model.load_state_dict(file["gem"])
    data, (_, test) = g.load_data(f"folder:{pictures}", None), load_pictures(pictures)
    assert math.isclose(g.accuracy(model, test), result["pre_finetune_acc"], abs_tol=1e-4)
    train = g.Batches(data.train, g.pixel_stats(data.train.x), 8, train=True, pad=data.pad)
    g.reestimate(model, g.Network(model).vector(), train)
    assert math.isclose(g.accuracy(model, test), result["reestimated_acc"], abs_tol=1e-4)


def test_variants_differ(baselines_done):
    masks = [artefacts(baselines_done[flags])[2]["mask"] for flags in RUNS]
    alike = [(RUNS[i], RUNS[j]) for i in range(len(RUNS)) for j in range(i) if same(masks[i], masks[j])]
    assert alike == []


def test_smart_ratio_takes_the_densities_it_should(baselines_done, pictures, tmp_path):
    def shares(folder):
        return {n: m.double().mean().item() for n, m in artefacts(folder)[2]["mask"].items()}

    v1, v2, v3 = (shares(baselines_done[flags]) for flags in ("sr", "sr --version 2", "sr --version 3"))
    source = baselines_done["sr --version 2"] / "source"
    assert artefacts(source)[1]["method"] == "gem-miner" and artefacts(source)[1]["post_finetune_acc"] is None
    for n in v1:
        end = n in ("conv1.weight", "fc.weight")
        assert v2[n] == (shares(source)[n] if end else v1[n]) and v3[n] == (1 if end else v1[n])
    v4 = baselines_done["sr --version 4 --trials 2 --round-epochs 1"]
    imp = list(shares(v4 / "source").values())
    sizes = [layer["total"] for layer in artefacts(v4)[1]["layers"]]
    grid = [[int(n * x + 1e-6) for n, x in zip(sizes, p)] for p in b.ratio_grid(imp)]
    assert [layer["kept"] for layer in artefacts(v4)[1]["layers"]] in grid
    v6 = baselines_done["sr --version 6 --trials 1 --round-epochs 1 --lr 0.01"]
    assert artefacts(v6 / "source")[1]["version"] == 4 and (v6 / "source" / "source" / "gem.pt").exists()
    # --from: an existing run instead, which gives the same
    assert b.main(baseline(pictures, tmp_path / "run", f"sr --version 2 --from {source}")) == 0
    assert shares(tmp_path / "run") == v2 and not (tmp_path / "run" / "source").exists()


@pytest.mark.parametrize("flags, stops", [
    ("imp --rewind 3", (2, 1)), ("imp --rewind 7", (1, 2, 6)), ("lrr --round-epochs 1", (1, 3)), ("ep --gradual", (1, 2)), ("snip", (1,)),
    ("sr --version 4 --trials 2 --round-epochs 2", (12, 1, 2)), ("sr --version 5 --lr 0.01", (3, 1, 1)),
])  # fmt: skip
def test_every_method_resumes_to_the_same_bits(flags, stops, pictures, tmp_path, monkeypatch, capsys):
    assert b.main(baseline(pictures, tmp_path / "a", flags)) == 0
    resume = []
    for n in stops:
        with monkeypatch.context() as patch:
            stop_after(patch, n)
            assert b.main([*baseline(pictures, tmp_path / "b", flags), *resume]) == 130
        assert "to continue: python baselines.py" in capsys.readouterr().err
        resume = ["--resume"] if (tmp_path / "b" / "checkpoint.pt").exists() else []
    assert b.main([*baseline(pictures, tmp_path / "b", flags), *resume]) == 0
    assert all(same(x, y) for x, y in zip(artefacts(tmp_path / "a"), artefacts(tmp_path / "b")))


def test_no_method_looks_at_the_test_set(baselines_done, pictures, tmp_path):
    """The same training images with other test images give the same masks."""
    other = tmp_path / "other"
    make_folder(other, train=16, test=10)
    for i, path in enumerate(sorted((other / "test").glob("*/*.png"))):
        picture(1000 + 7 * i).save(path)
    for flags in RUNS:
        if "version" not in flags or "4" in flags:
            assert b.main([*baseline(other, tmp_path / "run" / flags, flags), "--finetune-epochs", "0"][:None]) == 0
            assert same(artefacts(tmp_path / "run" / flags)[2]["mask"], artefacts(baselines_done[flags])[2]["mask"]), (
                flags
            )


def test_sr_v4_is_the_trial_that_does_best_on_images_it_was_not_trained_on(monkeypatch):
    split = g.Split(torch.zeros(40, 4, 4, 3, dtype=torch.uint8), torch.arange(40))
    train = g.Batches(split, ([0.0] * 3, [1.0] * 3), 8, train=True, pad=2)
    f = g.Network(nn.Sequential(*[nn.Linear(20, 20) for _ in range(20)], nn.BatchNorm1d(20)))
    tried, trained, judged, accs, fresh = [], [], [], iter([10.0, 30.0, 20.0]), f.rest()

    def finetune(f, w, m, data, **kw):
        assert same(f.rest(), fresh)
        f.model[20].running_mean += 1
        tried.append(m)
        trained.append(set(data.y.tolist()))
        return w * m

    def accuracy(f, data, v):
        judged.append(set(data.y.tolist()))
        return next(accs)

    monkeypatch.setattr(g, "finetune", finetune)
    monkeypatch.setattr(g, "accuracy", accuracy)
    gem = b.smart_ratio_search(f, train, densities=lambda f: [0.5] * 20, trials=3, epochs=3)
    assert torch.equal(gem.m, tried[1]) and not torch.equal(tried[1], tried[0]) and same(f.rest(), fresh)
    assert len(trained) == len(judged) == 3 and all(len(held) == 4 for held in judged)
    assert all(seen | held == set(range(40)) and not seen & held for seen, held in zip(trained, judged))


def test_held_out_images_are_not_trained_on():
    split = g.Split(
        torch.arange(30, dtype=torch.uint8)[:, None, None, None].expand(30, 4, 4, 3).clone(), torch.arange(30)
    )
    rest, held = b.hold_out(g.Batches(split, ([0.0] * 3, [1.0] * 3), 8, train=True, pad=2))
    ys = [torch.cat([y for _, y in data]) for data in (rest, held)]
    assert [len(y) for y in ys] == [27, 3] and sorted(torch.cat(ys).tolist()) == list(range(30))
    for x, y in held:  # neither cropped nor flipped
        assert torch.equal(x, y[:, None, None, None].float().expand(-1, 3, 4, 4))
    assert rest.pad == 2 and rest.train and not held.train


def refused_baseline(argv, capsys, *words):
    capsys.readouterr()
    assert b.main([str(a) for a in argv]) == 2
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1 and err.startswith("baselines.py: error: "), err
    assert all(word in err for word in words), err


@pytest.mark.parametrize("flags, words", [
    ("imp --rewind -1", ["--rewind"]), ("dense --checks", ["--checks"]), ("lrr --checks", ["--checks"]),
    ("sr --version 7", ["--version"]), ("sr --sparsity 1e-4", ["30%", "above 0.00014"]), ("sr --version 2 --from /nowhere", ["/nowhere", "gem.pt"]),
    ("ep --lam 1", ["--lam"]), ("snip --rewind 3", ["--rewind"]), ("nonsense", ["nonsense"]), ("snip --sparsity 2", ["KEPT"]), ("snip --resume", ["nothing to resume"]),
    ("sr --trials 0", ["--trials"]), ("sr --lr=1", ["--lr=1 changes nothing"]), ("sr --version 3 --from x", ["--from"]), ("ep --global --period 1", ["--period"]), ("ep --period 9 --gradual", ["--period 9"]), ("random --sparsity 1e-9", ["1e-09"]),
])  # fmt: skip
def test_bad_flags_of_baselines(flags, words, pictures, tmp_path, capsys):
    refused_baseline(baseline(pictures, tmp_path / "run", flags), capsys, *words)


def test_densities_of_another_network_are_refused(baselines_done, pictures, tmp_path, capsys):
    flags = f"sr --version 2 --from {baselines_done['snip']} --model resnet32"
    refused_baseline(
        baseline(pictures, tmp_path / "run", flags), capsys, "not a gem of this network", str(baselines_done["snip"])
    )
    flags = f"sr --version 2 --from {baselines_done['snip']} --sparsity 0.2"
    refused_baseline(baseline(pictures, tmp_path / "other", flags), capsys, "--sparsity is 0.3, not 0.2")


# --- baselines.py: the paper's tables and figures -------------------------------------------------------------


def paper(pictures, out, name, *more):
    small = "--epochs 2 --batch-size 2 --device cpu --model resnet20".split()
    return ["paper", name, "--dataset", f"folder:{pictures}", "--out", str(out), *small, *more]


@pytest.mark.parametrize("name", b.EXPERIMENTS)
def test_every_experiment_can_be_listed(name, capsys):
    """At full size: what each run costs, on the paper's networks and sparsities."""
    assert b.main(["paper", name, "--dry-run", "--seeds", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    costs = [int(line.split("|")[-2].replace(",", "")) for line in lines[2:] if line.startswith("| `python")]
    assert len(costs) >= 4 and f"| {len(costs)} runs | {sum(costs):,} |" in lines
    runs = {
        "table1": 16,
        "table2": 4,
        "table3": 10,
        "table4": 8,
        "table16": 16,
        "fig2": 10,
        "fig5": 6,
        "fig9": 24,
        "fig10": 50,
        "fig7": 32,
    }
    assert len(costs) == runs.get(name, len(costs))
    # Table 1: imp, three of one batch, ep, sr, lrr and Gem-Miner, with their checks; and Table 4.
    totals = {"table1": [3300, *[602] * 3, 900, 450, 3000, 900], "table4": [300, 3150, 3000, 3000]}
    assert name not in totals or costs[: len(costs) // 2] == totals[name]


def test_experiments_name_what_exists():
    for name, experiment in b.EXPERIMENTS.items():
        for label, (command, figures) in experiment.rows.items():
            assert set(figures) <= set(experiment.columns) <= set(b.COLUMNS), name
            for other in re.findall(r"@(\S+)", command):
                assert list(experiment.rows).index(other) < list(experiment.rows).index(label)
        assert set(experiment.curves) <= set(b.CURVES) and set(experiment.models) <= set(models.MODELS)
        assert experiment.at or (experiment.models and experiment.sparsities)
    text = {"table2": "82.67 82.15 81.64 83.4 78.73 78.6", "table3": "19.57 24.47 22.22 34.42 31.56 63.54 19.67 63.72 45.3 66.15",
            "table4": "300 77.89 3000 79.5 3000 74.52 3000 80.21", "table16": "1.44 77.89 1.44 65.61 1.47 68.59 1.75 69.78 1.44 69.92 1.53 69.01 1.47 69.08"}  # fmt: skip
    for name, figures in text.items():
        ours = [f"{v:g}" for _, row in b.EXPERIMENTS[name].rows.values() for v in row.values() if v not in (5, 3.72)]
        assert ours == figures.split()


def test_all_numbers_of_a_command_scale_with_the_epochs(capsys):
    def listed(*argv):
        assert b.main(["paper", *argv, "--dry-run"]) == 0
        return capsys.readouterr().out

    assert "--epochs 400 --period 20 --finetune-epochs 20" in listed("table4", "--epochs", "20")
    out = listed("fig10", "--epochs", "75", "--sparsity", "0.0144", "--bf16")
    assert "--round-epochs 4 --rewind 500" in out and "--rewind 500" in out and out.count("--bf16") >= 5
    out = listed("table4", "--dataset", "shapes")  # whose own epochs are 10
    assert "--epochs 200 --period 10 --finetune-epochs 10" in out and "--rewind 67" in out
    assert "--rewind 2000" in listed("fig3", "--model", "vgg16") and "--epochs" not in listed("fig3")
    assert "--trials 19" in listed("table16", "--epochs", "20") and "--sparsity 0.2" in listed(
        "table2", "--sparsity", "0.2"
    )


def test_a_table_is_run_resumed_and_printed(pictures, tmp_path, capsys, monkeypatch):
    argv = paper(pictures, tmp_path, "table2", "--seeds", "2", "--sparsity", "0.3")
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        assert b.main(argv) == 130
    err = capsys.readouterr().err
    assert f"to continue: python baselines.py {shlex.join(argv)}\n" in err and "Traceback" not in err
    refused_baseline([*argv, "--so-far"], capsys, "no run of table2", str(tmp_path))
    assert b.main(argv) == 0
    out = capsys.readouterr().out
    results = [json.loads(p.read_text()) for p in sorted(tmp_path.glob("*/result.json"))]
    assert len(results) == 4 and all(r["checks"] for r in results)
    [row] = [line.split("|")[1:-1] for line in out.splitlines() if line.startswith("| ProsPr")]
    accs = [r["post_finetune_acc"] for r in results if r["method"] == "prospr"]
    assert row[1:5] == [
        " resnet20 ",
        " 30% ",
        " 30.000 ± 0.000 ",
        f" {sum(accs) / 2:.2f} ± {abs(accs[0] - accs[1]) / 2**0.5:.2f} ",
    ]
    monkeypatch.setattr(b.gm, "run_command", None)  # nothing is left to run
    assert b.main(argv) == 0 and capsys.readouterr().out == out
    assert b.main([*argv, "--seeds", "3", "--so-far"]) == 0
    assert capsys.readouterr().out == out.replace("2 seeds", "up to 3 seeds")
    completed = b.completed
    monkeypatch.setattr(b, "completed", lambda argv, make: completed(argv, make) | {"images": argv[0]})
    refused_baseline(argv, capsys, "same images")
    monkeypatch.undo()
    folder = next(tmp_path.glob("prospr*"))
    for name in ("result.json", "log.jsonl"):  # damaged files are made again, without a new epoch
        (folder / name).write_text('{"epoch": ')
        assert b.main(argv) == 0 and capsys.readouterr().out == out
    result = json.loads((folder / "result.json").read_text())
    for key, value in (("post_finetune_acc", 99.9), ("bf16", True)):  # a digit that a bit flip changed; another run
        (folder / "result.json").write_text(json.dumps(result | {key: value}))
        assert b.main(argv) == 0 and capsys.readouterr().out == out
    result.pop("checksum")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    result["milestones"] = [0.1]
    (folder / "result.json").write_text(json.dumps(result | {"checksum": g.checksum(result, log)}))
    refused_baseline(argv, capsys, "python baselines.py prospr", "milestones")


@pytest.mark.parametrize("name", ["fig2", "fig3", "fig7"])
def test_a_table_shows_what_is_complete_so_far(name, pictures, tmp_path, capsys):
    """A run without its checks too; nothing is run."""
    argv = paper(pictures, tmp_path, name, "--sparsity", "0.3", "--sparsity", "0.2", "--finetune-epochs", "1")
    runs = b.runs_of(b.EXPERIMENTS[name], *b.parser().parse_known_args(argv))
    key = next(key for key in runs if key[2] == 0.2)
    b.completed([a for a in runs[key] if a != "--checks"])
    capsys.readouterr()
    assert b.main([*argv, "--so-far"]) == 0 and len(list(tmp_path.glob("*/log.jsonl"))) == 1
    out = capsys.readouterr().out
    assert out.count("| not run |") == len(runs) - 1 and f"| {key[0]} | resnet20 | 20% |" in out
    assert out.count("mermaid") == {"fig2": 2, "fig3": 0, "fig7": 1}[name]


def test_the_papers_figures_stand_beside_ours_where_they_belong(pictures, tmp_path, capsys):
    """At the paper's own sparsity, and nowhere else."""
    more = ("--sparsity", "0.3", "--sparsity", "0.0059", "--epochs", "1", "--batch-size", "8")
    assert b.main(paper(pictures, tmp_path, "table3", *more)) == 0
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    rows = {tuple(row[:3]): row[3:] for row in cells if len(row) > 3}
    assert rows["method", "network", "sparsity"] == [
        "kept %",
        "before",
        "paper (CIFAR-10)",
        "BN re-estimated",
        "after",
        "paper (CIFAR-10)",
    ]
    assert rows["Gem-Miner", "resnet20", "0.59%"][2::3] == ["45.3", "66.15"]
    assert rows["Global EP", "resnet20", "30%"][2::3] == ["", ""]
    assert rows["Global EP", "resnet20", "0.59%"][0] == "0.590" and rows["EP", "resnet20", "30%"][0] == "30.004"


@pytest.mark.parametrize("flags, words", [
    ("fig3 --model resnet18", ["resnet18", "--sparsity"]), ("fig3 --model nonsense", ["nonsense", "resnet20"]), ("table3 --lam 1e-4", ["--lam"]),
    ("table9", ["table9", "table1"]), ("table3 --seeds 0", ["--seeds"]), ("table3 --sparsity 2", ["KEPT"]), ("table3 --nonsense 3", ["--nonsense"]),
    ("table3 --seed 3", ["--seeds"]), ("table3 --bf16 --seed=3", ["--seeds"]), ("fig5 --eval-every=2", ["--eval-every"]), ("table3 more", ["more"]),
])  # fmt: skip
def test_bad_flags_of_paper_are_refused_before_anything_runs(flags, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(g, "run_command", None)
    refused_baseline(["paper", *flags.split(), "--out", tmp_path], capsys, *words)
    assert not list(tmp_path.iterdir())


def test_a_flag_given_twice_counts_once(capsys):
    assert b.main("paper table2 --dry-run --sparsity 0.05 --finetune-epochs 7".split()) == 0
    out = capsys.readouterr().out
    assert (
        "0.0372" not in out
        and "200" not in out
        and out.count("--sparsity 0.05 ") == out.count("--finetune-epochs 7 ") == 2
    )


def test_the_readmes_use_of_a_baseline(tmp_path):
    [example] = [block for block in blocks("python") if "baselines" in block]
    done = subprocess.run([sys.executable, "-c", example], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_figure_of_searches_alone_has_no_accuracy_after(pictures, tmp_path, capsys):
    more = ("--sparsity", "0.3", "--sparsity", "0.2", "--finetune-epochs", "0")
    assert b.main(paper(pictures, tmp_path, "fig9", *more)) == 0
    assert capsys.readouterr().out.count("|  |\n") == 12  # six rows at two sparsities


def test_figures_come_as_points_and_as_charts_that_mermaid_draws(pictures, tmp_path, capsys):
    more = ("--sparsity", "0.3", "--finetune-epochs", "1")
    assert b.main(paper(pictures, tmp_path, "fig2", *more)) == 0
    out = capsys.readouterr().out
    assert out.count("```mermaid\n") == 2 and out.count("xychart-beta") == 2 and out.count("    line [") == 10
    assert len([line for line in out.splitlines() if re.match(r"\| \d+ \|", line)]) == 2 * 2  # two epochs, two tables
    assert b.main(paper(pictures, tmp_path, "fig7", *more)) == 0
    out = capsys.readouterr().out
    assert len([line for line in out.splitlines() if ".weight" in line and line.startswith("| ")]) == 20
    assert b.main(paper(pictures, tmp_path, "fig6", *more, "--sparsity", "0.2")) == 0
    out = capsys.readouterr().out
    assert '    x-axis ["30%", "20%"]' in out and out.count("```mermaid") == 1
    assert b.main(paper(pictures, tmp_path, "fig5", *more)) == 0
    out = capsys.readouterr().out
    assert [line.split("|")[1:3] for line in out.splitlines() if re.match(r"\| \d ", line)][-1][
        0
    ] == " 3 "  # 2 + 1 epochs


def test_spread_and_chart():
    assert b.spread([1.0], 2) == "1.00" and b.spread([1.0, 3.0], 1) == "2.0 ± 1.4" and b.spread([], 2) == ""
    text = b.chart("title", range(1, 101), {"a": list(range(100)), "b": [7]})
    assert "blue: a, orange: b" in text and text.count('", "') == 49 and text.count("7, 7") > 10


# --- bench ----------------------------------------------------------------------------------------------------


def test_bench_reports_and_mining_needs_no_more_memory_than_promised(monkeypatch, capsys):
    monkeypatch.setattr(models, "MODELS", {n: models.MODELS[n] for n in ("resnet20", "wrn28_2")})
    assert b.main("bench --all --rounds 2 --batch-size 4 --device cpu".split()) == 0
    about, _, head, _, *rows = capsys.readouterr().out.splitlines()
    assert about.startswith("cpu, float32, eager, torch ") and len(rows) == 2
    for row, (name, d) in zip(rows, (("resnet20", 268_336), ("wrn28_2", 1_463_984))):
        cells = dict(zip(*([c.strip() for c in line.strip("|").split("|")] for line in (head, row))))
        assert (cells["network"], cells["d"], cells["batch"]) == (name, f"{d:,}", "4 of 32x32")
        for what in ("mining / dense", "finetuning / dense", "epoch / its steps"):
            middle, spread = map(float, cells[what].split(" ± "))
            assert 0.1 < middle < 10 and spread >= 0
        dense, mining, finetuning = (int(n) for n in cells["peak MB: dense, mining, finetuning"].split(", "))
        assert dense <= finetuning <= mining
        if name == "resnet20":  # of the other, four images take less memory than freezing
            assert float(cells["mining - dense, floats"].removesuffix(" d")) <= 6
        assert 0 <= float(cells["of an epoch"].rstrip("%")) < 100


def test_a_stopwatch_takes_what_is_done_between_batches(monkeypatch):
    now = [10.0]
    monkeypatch.setattr(b.time, "perf_counter", lambda: now[0])
    watch = b.Stopwatch("ab", torch.device("cpu"))
    for work in (3, 1):
        for _ in watch:
            now[0] += work
    assert watch.seconds == [6, 2]


def test_peak_is_the_most_that_is_held_at_a_time():
    def work():
        a = torch.ones(1_000_000)
        b = a + 1  # 8 MB are held here
        del a, b
        return torch.ones(1_500_000)

    assert b.peak(work, torch.device("cpu")) == pytest.approx(8e6, rel=0.01)


# --- trust: numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_algorithm_1_holds_on_any_network(seed):
    """Random sizes (d from 1, layers of one weight), sparsities, periods, lambdas, steps; and scores that all tie."""
    rng = random.Random(seed)
    widths = [rng.choice((1, 1, 2, 3, 7)) for _ in range(rng.randint(2, 4))]
    layers = [nn.Linear(a, b, bias=rng.random() < 0.5) for a, b in zip(widths, widths[1:])]
    model, d = nn.Sequential(*layers).double(), sum(layer.weight.numel() for layer in layers)
    E = rng.randint(1, 9)
    T, n = rng.randint(1, E), rng.choice((1, d, rng.randint(1, d)))
    data = torch.randn(6, widths[0], dtype=torch.float64), torch.randint(widths[-1], (6,))
    seen, s = [], n / d
    kw = dict(sparsity=s, epochs=E, period=T, lr=rng.choice((1e-3, 1.0, 1e3)), lam=rng.choice((0, 1e-4, 1.0, 1e6)))
    if seed % 4:  # where all scores tie: at 0, at 1, at the threshold
        p = torch.full((d,), (None, 0.0, 1.0, 0.5)[seed % 4], dtype=torch.float64)
        g.mine(model, data, **kw, batch_size=3, on_epoch=lambda row, v, state: seen.append(copy.deepcopy(state)))
        fresh = {**seen.pop(), "epoch": 0, "p": p, "q": torch.ones(d), "optimizer": g.sgd([p], 1.0).state_dict()}
        kw, seen = {**kw, "state": fresh, "lam": 0, "lr": 1e-30}, []

    def on_epoch(row, v, state):
        assert torch.equal(v, state["w"] * state["m"]) and row["q"] == state["q"].sum() and row["m"] == state["m"].sum()
        seen.append(copy.deepcopy(state))

    gem = g.mine(model, data, **kw, batch_size=3, on_epoch=on_epoch)
    before, last = torch.ones(d, dtype=torch.bool), T * (E // T)
    for j, state in enumerate(seen, 1):
        q, m, p = state["q"], state["m"], state["p"]
        assert not (q & ~before).any() and torch.equal(m, q & (p >= 0.5)) and 0 <= p.min() and p.max() <= 1
        assert q.sum() == (round(d * s ** (j / last)) if j % T == 0 else before.sum())
        before = q
    assert gem.q.sum() == n and torch.equal(gem.m, (gem.p >= 0.5) * gem.q) and torch.equal(gem.w, seen[0]["w"])
    assert torch.equal(g.Network(model).vector(), gem.w * gem.m) and not model.training


def test_an_absurd_lambda_is_survived_and_reported(pictures, tmp_path, capsys):
    assert g.main(command(pictures, tmp_path, "--lam", "1000", "--finetune-mask", "m")) == 0
    out, err = capsys.readouterr()
    assert "r(p)*q 0)" in out and err.count("\n") == 1 and "lower lambda" in err
    assert artefacts(tmp_path)[1]["post_finetune_acc"] == 50.0  # of two classes


@pytest.mark.parametrize("flags", RUNS)
def test_the_seed_fixes_every_method(flags, baselines_done, pictures, tmp_path):
    one = artefacts(baselines_done[flags])[2]
    for seed in (0, 1):
        assert b.main([*baseline(pictures, tmp_path / str(seed), flags), "--seed", str(seed)]) == 0
        other = artefacts(tmp_path / str(seed))[2]
        for part in ("initial", "gem", "finetuned", "mask"):
            assert same(one[part], other[part]) == (seed == 0 or (part == "mask" and flags == "dense"))


# --- trust: any network ---------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Token and output embedding share a weight, and so do two layers; dropout, LayerNorm, biases."""

    def __init__(self):
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.drop, self.norm, self.out = nn.Dropout(0.2), nn.LayerNorm(6), nn.Linear(6, 7)
        self.b.weight, self.out.weight = self.a.weight, self.embed.weight

    def forward(self, x):
        x = self.embed(x.flatten(1).abs().long() % 7).mean(1)
        return self.out(self.drop(self.norm(self.b(self.a(x).relu()))))


def conv(kind, dims):
    layers = [kind(3, 4, 3, padding=1), getattr(nn, f"BatchNorm{dims}d")(4), nn.ReLU(), kind(4, 4, 3, groups=2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3))


NETWORKS = {  # what it is: (the network, the shape of its input, its tensors of weights)
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=3), (3, 32, 32), 21),
    "mobilenet": (lambda: torchvision.models.mobilenet_v3_small(num_classes=3), (3, 32, 32), 54),
    "vit": (lambda: torchvision.models.VisionTransformer(8, 4, 2, 2, 8, 16, num_classes=3), (3, 8, 8), 8),
    "tied": (Tied, (9,), 2),
    "conv1d": (lambda: conv(nn.Conv1d, 1), (3, 6), 3),
    "conv3d": (lambda: conv(nn.Conv3d, 3), (3, 4, 4, 4), 3),
    "transposed": (lambda: conv(nn.ConvTranspose2d, 2), (3, 4, 4), 3),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_others_are_mined_and_finetuned(name):
    build, shape, tensors = NETWORKS[name]
    torch.manual_seed(0)
    model, x, y = build(), 3 * torch.randn(16, *shape), torch.randint(3, (16,))
    model(x)  # a lazy layer takes its shape
    f, steps = g.Network(model), []
    assert len(f.names) == tensors and f.d < sum(p.numel() for p in model.parameters())  # the shared ones once
    for u in f.views(g.signed_constant(f)).values():
        assert torch.allclose(u.abs(), torch.tensor((2 / u[0].numel()) ** 0.5))
    for training in (True, False):  # the function is the module, in either mode
        f.train(training)
        outputs = []
        for call in (lambda model: model(x), lambda model: g.Network(model)(f.vector(), x)):
            torch.manual_seed(1)
            outputs.append(call(copy.deepcopy(model)))
        assert torch.allclose(*outputs, atol=1e-4)

    others = {n: t.clone() for n, t in model.named_parameters() if all(t is not w for w in f.weights.values())}
    gem = g.mine(f, (x, y), sparsity=0.25, epochs=3, lr=0.5, batch_size=8)
    assert gem.q.sum() == round(0.25 * f.d) and torch.equal(f.vector(), gem.w * gem.m) and not model.training
    assert all(torch.equal(model.get_parameter(n), t) for n, t in others.items())  # mining trains nothing

    def schedule(lr, j, E):
        steps.append(j)
        return lr / j

    def rmsprop(params, lr):
        return torch.optim.RMSprop(params, lr, weight_decay=1e-3)

    for kw in ({}, {"optimizer": rmsprop, "schedule": schedule, "lr": 1e-3}):  # and under one's own optimizer
        v = g.finetune(f, gem.w, gem.q, (x, y), epochs=2, batch_size=8, **kw)
        assert torch.equal(f.vector(), v) and not v[gem.q == 0].any() and not torch.equal(v, gem.w * gem.q)
    assert set(steps) == {1, 2}
    assert any(not torch.equal(model.get_parameter(n), t) for n, t in others.items())  # biases and norms are trained
    before = g.accuracy(model, (x, y))
    assert before == g.accuracy(f, (x, y), v) == g.accuracy(model, (x, y))  # dropout is off


# --- trust: bad input -----------------------------------------------------------------------------------------

WRONG = ["", " ", "abc", "0", "-1", "2.5", "1e400", "-inf", "nan", "1" * 400, "1e99", "½", "\udcff", "x" * 300]


def flags_with_values(cli):
    """{flag: action} of a parser and of its subparsers'."""
    found = {}
    for action in cli._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                found |= {(name, *key): a for key, a in flags_with_values(sub).items()}
        elif action.option_strings and action.nargs is None:
            found[action.option_strings[0],] = action
    return found


CASES = [(g, key) for key in flags_with_values(g.parser())] + [(b, key) for key in flags_with_values(b.parser())]
CASES = list({(module, key[-1]): (module, key) for module, key in CASES}.values())  # of a flag of many methods, one


@pytest.mark.parametrize("module, key", CASES, ids=lambda c: " ".join(c) if isinstance(c, tuple) else None)
def test_wrong_values_are_refused_in_one_line(module, key, tmp_path, capsys, monkeypatch):
    """Each flag of both scripts with WRONG values: what is not refused at once stops before the data are read."""

    def accepted(*_):
        raise g.InputError("accepted")

    for owner, name in ((g, "load_data"), (b, "completed"), (b, "costs")):
        monkeypatch.setattr(owner, name, accepted)
    monkeypatch.chdir(tmp_path)
    start = [*key[:-1], *(["table3"] if key[0] == "paper" else [])]
    for i, words in enumerate([[key[-1]], [f"{key[-1]}="], *([key[-1], value] for value in WRONG)]):
        more = ["--out", f"out{i}"] if key[0] not in ("bench", "paper") and key[-1] != "--out" else []
        assert module.main([*start, *more, *words]) == 2, words
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and err.startswith((b if module is b else g).__name__) and ".py: error: " in err, (
            err
        )
        accepts = set(WRONG) - {""} if key[-1] in ("--out", "--data-dir") else {"0", "2.5"}
        assert "accepted" not in err or words[-1] in accepts or key[-1] == "--from", err


@pytest.mark.parametrize("flags", [
    "--lr 1e9", "--lr 1e-300", "--lam 1e9", "--lam 1e-300", "--finetune-lr 1e9", "--finetune-lr 1e-300", "--sparsity 4e-6", "--sparsity 1",
    "--batch-size 1", "--batch-size 1000000000", "--eval-every 1000000000", "--seed 1000000000", "--image-size 1", "--image-size 2 --batch-size 1",
    "--optimizer adam --lr 1e9", "--rounding random --lam 1e9", "--bf16 --finetune-lr 1e9", "--penalty l1 --lam 1e9", "--finetune-mask m --lam 1e9",
])  # fmt: skip
def test_extreme_values_end_in_a_result_or_in_one_line(flags, pictures, tmp_path, capsys):
    code, err = g.main(command(pictures, tmp_path, "--epochs", "1", *flags.split())), capsys.readouterr().err
    lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert (code, len(lines)) == (0, 0) or (code, len(lines)) == (2, 1) and lines[0].startswith("gem_miner.py: error: ")
    assert (code == 0) == (tmp_path / "result.json").exists()


class Evil:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def damages(content, evil, seed=0, flips=12):
    """{what was done: what then stands in the place of the file `content`}."""
    rng, zipped = random.Random(seed), io.BytesIO()
    torch.save({"settings": Evil(evil)}, zipped)
    yield from {
        "emptied": b"",
        "text": b"no such thing",
        "pickle": pickle.dumps(Evil(evil)),
        "zip": zipped.getvalue(),
    }.items()
    for name, other in {
        "list": [1, 2],
        "tensor": torch.ones(3),
        "dict": {"mask": 1, "rows": 2, "settings": 3, "phase": 4, "state": 5},
    }.items():
        torch.save(other, buffer := io.BytesIO())
        yield name, buffer.getvalue()
    picture(0).save(buffer := io.BytesIO(), "PNG")
    yield "picture", buffer.getvalue()
    yield "folder", None
    for _ in range(flips):
        i = rng.randrange(len(content))
        yield f"cut at {i}", content[:i]
        yield f"flipped at {i}", content[:i] + bytes([content[i] ^ 1 << rng.randrange(8)]) + content[i + 1 :]


def put(path, content):
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.mkdir() if content is None else path.write_bytes(content)


@pytest.mark.parametrize("name", ["checkpoint.pt", "gem.pt", "source/gem.pt"])
def test_damaged_files_of_a_run_are_named_and_never_executed(
    name, finished, baselines_done, pictures, tmp_path, capsys
):
    shutil.copytree(finished, tmp_path / "run")
    shutil.copytree(finished, tmp_path / "source")
    path, evil, survived = (tmp_path / name if "/" in name else tmp_path / "run" / name), tmp_path / "evil", []
    main, argv = g.main, [*command(pictures, tmp_path / "run"), "--resume"]
    if "/" in name:
        main, argv = b.main, baseline(pictures, tmp_path / "sr", f"sr --version 2 --from {path.parent}")
    content = path.read_bytes()
    for what, damaged in damages(content, evil, flips=60 if name == "checkpoint.pt" else 8):
        put(path, damaged)
        if main(argv) == 0:
            survived.append(what)
            shutil.rmtree(tmp_path / "sr", ignore_errors=True)
            capsys.readouterr()
        else:
            err = capsys.readouterr().err
            assert err.count("\n") == 1 and (name in err or "nothing to resume" in err) and "error: " in err, (
                what,
                err,
            )
            assert not evil.exists() and (path.is_dir() or path.read_bytes() == damaged)
    assert all(what.startswith("flipped") for what in survived) and len(survived) < 4  # in bytes that mean nothing
    put(path, content)
    assert main(argv) == 0 and all(same(a, b) for a, b in zip(artefacts(tmp_path / "run"), artefacts(finished)))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize(
    "ending, more", [("png", {}), ("jpg", {}), ("bmp", {}), ("webp", {}), ("tiff", {"compression": "tiff_lzw"})]
)
def test_damaged_pictures_are_named(ending, more, tmp_path):
    make_folder(tmp_path, train=2, test=1)
    path = tmp_path / "train" / "cat" / f"damaged.{ending}"
    picture(1).save(path, **more)
    content, named = path.read_bytes(), 0
    for _, damaged in damages(content, tmp_path / "evil", flips=40):
        if damaged is None:
            continue  # a folder among the pictures is no picture
        path.write_bytes(damaged)
        try:  # a flipped bit may well be another picture
            assert g.load_data(f"folder:{tmp_path}", None, 8).train.x.shape == (5, 8, 8, 3)
        except g.InputError as e:
            named += 1
            assert str(path) in str(e) and "remove it" in str(e)
    assert named > 8 and not (tmp_path / "evil").exists()


def test_damaged_data_sets_are_named(tmp_path, monkeypatch):
    cls, asked = torchvision.datasets.CIFAR10, no_network(monkeypatch)
    cifar_archive(tmp_path / cls.filename, cls, monkeypatch)
    content = (tmp_path / cls.filename).read_bytes()
    for _, damaged in damages(content, tmp_path / "evil"):
        shutil.rmtree(tmp_path / cls.base_folder, ignore_errors=True)
        put(tmp_path / cls.filename, damaged)
        with pytest.raises(g.InputError, match=f"{cls.filename}.*by hand"):
            g.load_data("cifar10", tmp_path)
    assert asked and not (tmp_path / "evil").exists()
    put(tmp_path / cls.filename, content)
    g.load_data("cifar10", tmp_path)
    (tmp_path / cls.filename).unlink()
    for file in sorted((tmp_path / cls.base_folder).iterdir()):
        content = file.read_bytes()
        for _, damaged in damages(content, tmp_path / "evil", flips=2):
            put(file, damaged)
            with pytest.raises(g.InputError, match=f"{cls.filename}.*by hand"):
                g.load_data("cifar10", tmp_path)
        put(file, content)
    g.load_data("cifar10", tmp_path)

    home = make_folder(tmp_path / "tiny-imagenet-200", size=(64, 64))
    labels = home / "val" / "val_annotations.txt"
    (home / "val" / "images").mkdir(parents=True)
    picture(0, (64, 64)).save(home / "val" / "images" / "val_0.JPEG")
    for damaged in (b"\xff\xfe\x00", b"val_0.JPEG", b"val_0.JPEG\tcow\t0", b"\n", b"val_1.JPEG\tcat\n", None):
        shutil.rmtree(labels) if labels.is_dir() else labels.unlink(missing_ok=True)
        labels.mkdir() if damaged is None else labels.write_bytes(damaged)
        with pytest.raises((g.InputError, OSError), match="val_annotations|val_1"):
            g.load_data("tinyimagenet", tmp_path)
    labels.rmdir()
    labels.write_text("val_0.JPEG\tcat\t0")
    assert len(g.load_data("tinyimagenet", tmp_path).test.y) == 1


def test_too_little_data_is_refused(tmp_path, capsys):
    make_folder(tmp_path / "one", classes=["cat"])
    refused(command(tmp_path / "one", tmp_path / "a"), capsys, "'cat'", "tell apart")
    make_folder(tmp_path / "dark")
    for file in (tmp_path / "dark").rglob("*.png"):
        to_pil_image(torch.full((3, 8, 8), 255, dtype=torch.uint8)).save(file)  # as PIL cuts those of 16 bits
    refused(command(tmp_path / "dark", tmp_path / "a"), capsys, "same colour", "8-bit")
    make_folder(tmp_path / "few", train=2, test=1)
    refused(command(tmp_path / "few", tmp_path / "b", "--val"), capsys, "4 training images are too few")
    refused_baseline(baseline(tmp_path / "few", tmp_path / "c", "sr --version 4 --trials 1"), capsys, "too few")
    make_folder(tmp_path / "tiny", train=3, test=1, size=(4, 4))
    f = g.prepare(g.complete(g.read(g.parser(), command(tmp_path / "tiny", tmp_path / "d"))))[0]
    assert f.model.bn1.num_batches_tracked == 0  # trying a batch leaves no trace
    words = ["a batch of 1 images of 4x4", "--batch-size"]
    refused(command(tmp_path / "tiny", tmp_path / "d", "--batch-size", "1"), capsys, *words)
    refused_baseline("bench --model resnet50 --batch-size 1 --rounds 1 --dataset cifar10".split(), capsys, "batch of 1")


def test_a_run_on_other_images_is_not_continued(pictures, tmp_path, monkeypatch, capsys):
    shutil.copytree(pictures, tmp_path / "pictures")
    argv = command(tmp_path / "pictures", tmp_path / "run")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert g.main(argv) == 130
    path = tmp_path / "pictures" / "train" / "cat" / "000.png"
    content = path.read_bytes()
    dog = path.parents[1] / "dog"
    changes = (
        path.unlink,
        lambda: picture(77).save(path),
        lambda: picture(0).transpose(0).save(path),  # mirrored
        lambda: path.write_bytes(path.with_name("001.png").read_bytes()),
        lambda: path.rename(dog / "x.png"),
    )
    for change in changes:
        change()
        refused([*argv, "--resume"], capsys, "other images")
        path.write_bytes(content)
    (dog / "x.png").unlink()
    assert g.main([*argv, "--resume"]) == 0


# --- trust: faults --------------------------------------------------------------------------------------------


def script(name, *argv, **kw):
    """The command line, in a process of its own."""
    return subprocess.Popen([sys.executable, HERE / name, *map(str, argv)], text=True, stderr=subprocess.PIPE, **kw)


KILLED_INSIDE = """
import os, signal, sys, threading
import gem_miner as g, baselines
signals, where, n, prog, *argv = sys.argv[1:]
left = int(n)

def kill(*_):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), int(signals))
        threading.Event().wait(0.5)  # SIGINT becomes KeyboardInterrupt here

if where == "freezing":
    freeze = g.freeze
    g.freeze = lambda *a: kill() or freeze(*a)
else:  # with half of a file written
    write = g.Path.write_bytes
    g.Path.write_bytes = lambda path, content: write(path, content[: len(content) // 2]) and kill() or write(path, content)
sys.argv = [prog, *argv]
sys.exit({"gem_miner.py": g, "baselines.py": baselines}[prog].main())
"""


def stress(home, prog, argv, outs, kills, rng):
    """Run `prog argv` undisturbed, then killed at random moments and resumed; both must leave the same.

    outs: the folders of its runs, below --out. Half of the kills come from outside, at any time; the others are while
    scores are frozen, or while a file is half written. Returns how many processes died of it.
    """
    shutil.rmtree(home, ignore_errors=True)
    start = time.monotonic()
    quiet = dict(cwd=HERE, stdout=subprocess.PIPE)
    process = script(prog, *argv, "--out", home / "calm", **quiet)
    shown = process.communicate()[0]
    assert process.returncode == 0
    lasts, died, resume = time.monotonic() - start, 0, []
    while True:
        sign = rng.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
        last = [*argv, "--out", home / "killed", *resume]
        if died >= kills:
            process = script(prog, *last, **quiet)
        elif rng.random() < 0.5:
            process = script(prog, *last, **quiet)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0.05, 0.6) * lasts)
            process.send_signal(sign)
        else:
            where, n = rng.choice((("freezing", 1), ("freezing", 2), ("saving", rng.randint(1, 6))))
            words = [sys.executable, "-c", KILLED_INSIDE, int(sign), where, n, prog, *last]
            process = subprocess.Popen([*map(str, words)], text=True, stderr=subprocess.PIPE, **quiet)
        ours, err = process.communicate()
        died += process.returncode != 0
        begun = list((home / "killed").rglob("checkpoint.pt"))
        resume = ["--resume"] if begun and argv[0] != "paper" else []
        if process.returncode == 0:
            if died >= kills:
                break
            shutil.rmtree(home / "killed")  # it got through: once more
            resume = []
        elif sign == signal.SIGINT and process.returncode == 130:
            assert err.strip().splitlines()[-1].startswith("interrupted"), err
        else:  # the signal itself, or (SIGINT) while Python was starting
            assert process.returncode == -sign or (sign == signal.SIGINT and not begun), (process.returncode, err)
    for out in outs(home / "calm"):
        twin = home / "killed" / out.relative_to(home / "calm")
        assert all(same(a, b) for a, b in zip(artefacts(out), artefacts(twin))), out
        keys = [(row["phase"], row.get("stage"), row["epoch"]) for row in artefacts(twin)[0]]
        assert len(keys) == len(set(keys))  # no row twice; none is missing, since they are the same
    if argv[0] == "paper":
        assert ours == shown
    return died


def stressed(data, batch_size):
    """{name: what stress() takes}."""
    start = ["--dataset", data, "--batch-size", batch_size, "--epochs"]
    return {
        "gem-miner": ("gem_miner.py", [*start, 2, "--sparsity", "0.1", "--lr", "0.5"], lambda out: [out]),
        "imp": ("baselines.py", ["imp", *start, 1, "--sparsity", "0.5", "--rewind", 3], lambda out: [out]),
        "paper": ("baselines.py", ["paper", "table2", *start, 1], lambda out: [p.parent for p in out.rglob("gem.pt")]),
    }


@pytest.mark.parametrize("name", ["gem-miner", "imp", "paper"])
def test_killed_runs_resume_to_the_same_bits(name, pictures, tmp_path):
    prog, argv, outs = stressed(f"folder:{pictures}", 8)[name]
    assert stress(tmp_path / "runs", prog, argv, outs, 1, random.Random(name)) >= 1


@pytest.mark.skipif("STRESS" not in os.environ, reason="an hour: STRESS=1 pytest -k on_shapes")
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ["gem-miner", "imp", "paper"])
def test_killed_runs_on_shapes_resume_to_the_same_bits(name, seed, tmp_path):
    """54 kills."""
    prog, argv, outs = stressed("shapes", 300)[name]
    assert stress(tmp_path / "runs", prog, argv, outs, 9, random.Random(f"{name} {seed}")) >= 9


def test_a_full_disk_is_one_line_and_costs_nothing(finished, pictures, tmp_path):
    resource = pytest.importorskip("resource")
    argv = command(pictures, tmp_path / "run", "--lam", "0", "--finetune-epochs", "1")
    limit = (finished / "gem.pt").stat().st_size - 600_000  # too small for all that the run has in the end
    first = dict(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)), cwd=HERE)
    process = script("gem_miner.py", *argv, stdout=subprocess.DEVNULL, **first)
    err = process.communicate()[1]
    assert process.returncode == 2 and err.count("\n") == 1 and "cannot write" in err and "--resume" in err, err
    assert not list((tmp_path / "run").glob("*.part"))
    process = script("gem_miner.py", *argv, "--resume", stdout=subprocess.DEVNULL, cwd=HERE)
    assert process.communicate() == (None, "") and process.returncode == 0
    assert g.main(command(pictures, tmp_path / "calm", *argv[-4:])) == 0
    assert all(same(a, b) for a, b in zip(artefacts(tmp_path / "run"), artefacts(tmp_path / "calm")))


def test_a_folder_that_vanishes_is_one_line(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(g.Run, "show", lambda self, *_: shutil.rmtree(self.out, ignore_errors=True))
    refused(command(pictures, tmp_path / "run", "--lam", "0"), capsys, "cannot write", "No such file")


def test_the_second_process_in_a_folder_is_refused(finished, pictures, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    argv, before = command(pictures, tmp_path / "run", "--checks", "--resume"), artefacts(tmp_path / "run")
    code = f"import gem_miner as g, sys\ng.pipeline = lambda *_: print('in', flush=True) or sys.stdin.read()\nsys.exit(g.main({argv}))"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=HERE)
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as other:
        assert other.stdout.readline() == "in\n"
        refused(argv, capsys, "another process", "run")
        other.kill()  # which frees the folder
    assert g.main(argv) == 0 and all(same(a, b) for a, b in zip(artefacts(tmp_path / "run"), before))


@pytest.mark.parametrize("argv", ["gem_miner.py --help", "baselines.py paper table3 --dry-run"])
def test_a_full_disk_under_the_output_is_one_line(argv):
    with open("/dev/full", "w") as full:
        process = script(*argv.split(), stdout=full, cwd=HERE)
        err = process.communicate()[1]
    assert process.returncode == 2 and err.count("\n") == 1 and "cannot write the output (No space" in err, err


def test_output_that_nobody_reads_is_one_line(pictures, tmp_path):
    process = script("gem_miner.py", *command(pictures, tmp_path / "run"), stdout=subprocess.PIPE, cwd=HERE)
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait() == 2 and err.count("\n") == 1 and "--resume" in err, err


def test_names_that_the_terminal_cannot_show_are_no_fault(pictures, tmp_path):
    out = tmp_path / "r\u00fcn\udcff"
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    argv = command(pictures, out, "--epochs", "1")
    process = subprocess.run([sys.executable, HERE / "gem_miner.py", *argv], capture_output=True, cwd=HERE, env=env)
    assert process.returncode == 0 and b"r\\xfcn\\udcff" in process.stdout and not process.stderr


# --- for one's own network; the README ------------------------------------------------------------------------


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_the_file_alone_can_be_copied(tmp_path):
    """gem_miner.py alone: no models.py, no torchvision, nothing printed, nothing drawn at import."""
    (tmp_path / "gem_miner.py").write_text((HERE / "gem_miner.py").read_text())
    [example] = [b for b in blocks("python") if "mine(f, train" in b]
    script = f"import sys, torch\nbefore = torch.get_rng_state()\nimport gem_miner\nassert torch.equal(before, torch.get_rng_state())\n{example}\nassert not {{'torchvision', 'models'}} & set(sys.modules)\n"
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__") == ["gem_miner.py"]


def test_the_readmes_photographs_are_made_from_cifar10(tmp_path, monkeypatch):
    [example] = [block for block in blocks("python") if "PIL" in block]
    no_network(monkeypatch)
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    cls = torchvision.datasets.CIFAR10
    cifar_archive(tmp_path / "data" / cls.filename, cls, monkeypatch, n=10)
    exec(example, {})
    originals, photographs = g.load_data("cifar10", Path("data")), g.load_data("folder:cifar10-jpeg", None)
    for x, y in zip(originals, photographs[:2]):
        order = x.y.argsort(stable=True)
        assert torch.equal(x.y[order], y.y) and not torch.equal(x.x[order], y.x)  # JPEG loses something,
        x, y = ((z.float().mean(3) - 127).flatten(1) for z in (x.x[order], y.x))
        assert torch.cosine_similarity(x, y).min() > 0.8  # but these are noise


def test_the_readmes_commands_run(tmp_path, monkeypatch, capsys):
    """Every `python gem_miner.py ...` and `python baselines.py ...` of the README, and of the files' own headers, is
    understood; those of the README that need no download also run, made small."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    commands = [line.split("#")[0] for line in lines if line.startswith(("python gem_miner.py", "python baselines.py"))]
    headers = re.findall(r"^    (python .*?)(?:  #|$)", g.__doc__ + b.__doc__, re.M)
    assert len(commands) >= 8 and len(headers) >= 6
    monkeypatch.setattr(g, "shapes", None)
    monkeypatch.setitem(g.LOADERS, "shapes", lambda root: g.Data(g.draw_shapes(40, 1), g.draw_shapes(20, 2), 10))
    monkeypatch.chdir(tmp_path)
    ran = set()
    for command in [*commands, *headers]:
        _, program, *argv = shlex.split(command)
        small = [*argv, "--epochs", "1", "--out", str(tmp_path / str(len(ran)))]
        if "paper" in argv:
            assert b.main([*argv, "--dry-run"]) == 0
        elif "bench" in argv:
            b.parser().parse_args(argv)
        else:
            b.prepared(["gem-miner", *argv] if program == "gem_miner.py" else argv) if "cuda" not in argv else None
        if "shapes" in argv and "--resume" not in argv and command in commands:
            ran.add(command)
            assert {"gem_miner.py": g, "baselines.py": b}[program].main(small) == 0
    assert len(ran) >= 3


def test_the_readmes_setup_and_test_commands_are_what_ci_runs():
    ci = (HERE / ".ci" / "run").read_text()
    assert "README.md" in ci and "pip install -r requirements.txt" in README
    assert any(
        line.startswith("pytest") or line.startswith("python -m pytest")
        for b in blocks("bash")
        for line in b.splitlines()
    )


def test_the_header_lists_every_deviation():
    source = (HERE / "gem_miner.py").read_text()
    listed = re.findall(r"^    (\d)\. ", g.__doc__, re.M)
    assert listed == [str(i) for i in range(1, len(listed) + 1)]
    for i in listed:
        assert f"Deviation {i}" in source.replace(g.__doc__, ""), i
        assert re.search(rf"^{i}\. ", README, re.M)


def test_only_the_allowed_packages_are_imported():
    allowed = set(sys.stdlib_module_names) | {"torch", "torchvision", "pytest", "models", "gem_miner", "baselines"}
    for file in ("gem_miner.py", "models.py", "baselines.py", "test_gem_miner.py"):
        assert imports(HERE / file) <= allowed


# --- GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gpu_agrees_with_cpu(pictures):
    data = g.load_data(f"folder:{pictures}", None)
    stats = g.pixel_stats(data.train.x)
    gems = []
    for device in ("cpu", "cuda"):
        split = g.Split(*(t.to(device) for t in data.train))
        torch.manual_seed(0)
        model = models.resnet20(2).to(device)
        gems.append(g.mine(model, g.Batches(split, stats, 8, train=True, pad=2), sparsity=0.5, epochs=1, period=1))
    assert torch.equal(gems[0].w, gems[1].w.cpu())
    assert torch.allclose(gems[0].p, gems[1].p.cpu(), atol=1e-3)
    assert (gems[0].q != gems[1].q.cpu()).float().mean() < 0.01


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gpu_compiled_equals_eager():
    """As CUDA graphs, with a last batch that is smaller."""
    data = [(torch.randn(n, 3, 32, 32).cuda(), torch.arange(n).cuda() % 10) for n in (16, 16, 5)]
    torch.manual_seed(0)
    model, ends = models.resnet20().cuda(), []
    for compiled in (False, True):
        f = g.Network(copy.deepcopy(model), compile=compiled)
        gem = g.mine(f, data, sparsity=0.5, epochs=3, period=1)
        ends.append((gem.p, g.finetune(f, gem.w, torch.ones_like(gem.w), data, epochs=3)))
        assert bool(f.compiled) == compiled
    for x, y in zip(*ends):
        assert torch.allclose(x, y, atol=1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("score", ["snip", "grasp", "synflow", "prospr", "random"])
def test_gpu_scores_as_cpu(score):
    x, y = torch.randn(20, 3, 8, 8), torch.arange(20) % 4
    masks = [b.at_init(models.resnet20().to(device), (x, y), score=score, sparsity=0.1).m for device in ("cpu", "cuda")]
    assert masks[1].is_cuda and (masks[0] != masks[1].cpu()).float().mean() < 0.01
