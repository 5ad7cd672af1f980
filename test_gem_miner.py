# SPDX-License-Identifier: MIT
"""Tests of all three files: offline, and on the CPU.

Where it can, a test compares with an oracle that it states itself: slower, plainer, and independent.
"""

import ast
import contextlib
import copy
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import types
import urllib.error
import urllib.request
import zipfile
import zlib
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.datasets import folder as tv_folder
from torchvision.datasets import utils as tv_utils
from torchvision.transforms import functional as tv

import baselines as bl
import gem_miner as gm
import models

HERE = Path(gm.__file__).parent
pytestmark = pytest.mark.filterwarnings(
    "error:::(gem_miner|baselines|models)",  # our code warns of nothing,
    "ignore:no weight is left",  # but of what it means to say
)


class Tiny(nn.Module):
    """d = 2 * 9 + 3 * 8 = 42, and a bias and an affine BatchNorm, which must never count."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
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
    ys = torch.randint(3, (n, size), generator=gen)
    return list(zip(xs, ys))


def same(a, b):
    """Whether nested dicts and lists of tensors and plain values are equal to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


# --- models.py ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, classes, size, d, tensors", [
    ("resnet20", 10, 32, 268_336, 20),
    ("resnet32", 100, 32, 467_632, 32),
    ("resnet32x2", 100, 32, 1_856_864, 32),
    ("resnet18", 10, 32, 11_164_352, 21),
    ("resnet18", 200, 64, 11_269_312, 21),
    ("resnet50", 200, 64, 23_864_512, 54),
    ("vgg16", 10, 32, 14_715_584, 14),
    ("mobilenetv2", 10, 32, 2_261_824, 58),
    ("wrn28_2", 10, 32, 1_463_984, 29),
])  # fmt: skip
def test_networks_have_the_papers_sizes(name, classes, size, d, tensors):
    with torch.device("meta"):  # shapes alone
        model = models.build(name, classes, image_size=size)
        x = torch.randn(2, 3, size, size)
        affine = models.build(name, classes, affine=True)
    f = gm.Network(model)
    assert (f.d, len(f.names)) == (d, tensors)
    assert f"{d:,}" in models.__doc__
    assert sum(p.numel() for p in model.parameters()) == d  # no bias, and no affine BatchNorm
    assert model(x).shape == (2, classes)
    norms = [layer for layer in affine.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert {layer.affine for layer in norms} == {True}


def test_option_a_takes_every_second_pixel_and_adds_empty_channels():
    x = torch.randn(2, 16, 8, 8)
    expected = torch.zeros(2, 32, 4, 4)
    expected[:, 8:24] = x[:, :, [0, 2, 4, 6]][:, :, :, [0, 2, 4, 6]]
    assert torch.equal(models.OptionA(16)(x), expected)


def test_resnet50_takes_torchvisions_weights():
    theirs = torchvision.models.resnet50().eval()
    ours = models.resnet50(1000, affine=True).eval()
    ours.load_state_dict({name: t for name, t in theirs.state_dict().items() if name != "fc.bias"})
    nn.init.zeros_(theirs.fc.bias)
    x = torch.randn(1, 3, 64, 64)
    assert torch.allclose(theirs(x), ours(x), atol=1e-5)


# --- Network: a module as a function of one vector ------------------------------------------------------------


def test_the_function_is_the_module_and_views_are_the_inverse_of_vector():
    model = tiny()
    f = gm.Network(model)
    v, other = f.vector(), torch.randn(42, dtype=torch.float64)
    assert (f.d, f.names, f.shapes) == (42, ["conv.weight", "fc.weight"], [(2, 1, 3, 3), (3, 8)])
    assert same(f.views(v), {"conv.weight": model.conv.weight, "fc.weight": model.fc.weight})
    assert torch.equal(f.vector(f.views(v)), v)
    x = torch.randn(5, 1, 4, 4, dtype=torch.float64)
    assert torch.allclose(f.eval()(v, x), model.eval()(x), atol=1e-12)
    expected = f(other, x)
    assert not torch.allclose(expected, model(x))  # the module itself is untouched
    f.load(other)
    assert torch.allclose(expected, model(x))


def test_convolutions_are_viewed_channels_last_without_a_copy():
    f = gm.Network(models.resnet20())
    v = f.vector()
    for view in f.views(v).values():
        assert view.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
        if view.dim() == 4:
            assert view.is_contiguous(memory_format=torch.channels_last)


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


def test_a_shared_weight_counts_once_and_all_else_is_the_rest():
    f = gm.Network(Tied())
    assert (f.names, f.sizes) == (["a.weight", "out.weight"], [36, 42])
    before, bias, doubled = f.rest(), f.model.b.bias.clone(), f.vector() * 2
    assert set(before) == {"a.bias", "b.bias", "out.bias", "norm.weight", "norm.bias"}
    nn.init.ones_(f.model.b.bias)
    f.load(doubled)
    f.restore(before)
    assert torch.equal(f.model.b.bias, bias)
    assert torch.equal(f.vector(), doubled)
    assert f.model.embed.weight is f.model.out.weight  # still tied
    with pytest.raises(ValueError, match="nothing to prune"):
        gm.Network(nn.Embedding(5, 6))


def test_bfloat16_is_autocast_of_every_layer():
    """The output and the gradient are those of plain autocast, and the output is float32."""
    f, x, y = gm.Network(models.resnet20(), bf16=True), torch.randn(4, 3, 32, 32), torch.arange(4)
    v = f.vector().requires_grad_()
    ours, full = f(v, x), gm.Network(f.model)(v, x)
    with torch.autocast("cpu", torch.bfloat16):
        plain = torch.func.functional_call(f.model, f.views(v), (x,)).float()
    assert torch.equal(ours, plain)
    assert ours.dtype == torch.float32
    assert 0 < (ours - full).abs().max() < 0.05 * full.abs().max()
    gradients = [torch.autograd.grad(F.cross_entropy(out, y), v)[0] for out in (ours, plain)]
    assert torch.equal(*gradients)


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_compiled_equals_eager():
    """Where scores are learned, and where weights are; BatchNorm's statistics too."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3))
    data, ends = [(torch.randn(8, 4), torch.randint(3, (8,)))], []
    for compiled in (False, True):
        f = gm.Network(copy.deepcopy(net), compile=compiled)
        gem = gm.mine(f, data, sparsity=0.5, epochs=2)
        ends.append([gem.p, gm.finetune(f, gem.w, gem.q, data, epochs=2, lr=0.1), f.rest()["1.running_mean"]])
    for eager, compiled in zip(*ends):
        assert torch.allclose(eager, compiled, atol=1e-5)


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a GPU: to read numbers, or a size that depends on them."""

    WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"}

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.n += name in self.WAITING
        if name in ("index", "index_put", "index_put_"):
            self.n += any(i is not None and i.dtype == torch.bool for i in args[1])  # t[mask]
            self.n += name != "index" and args[2].dim() == 0  # t[i] = 1: copies a number to the GPU
        return func(*args, **(kwargs or {}))


def test_waiting_is_seen():
    t, mask, one = torch.rand(3), torch.tensor([True, False, True]), torch.tensor([1])
    for wait in (lambda: t[mask], lambda: t.__setitem__(one, 1.0), lambda: t.sum().item(), lambda: mask.nonzero()):
        with Waits() as waits:
            wait()
        assert waits.n


@pytest.mark.parametrize("search", [
    lambda f, data: gm.mine(f, data, sparsity=0.5, epochs=1),
    lambda f, data: gm.mine(f, data, sparsity=0.5, epochs=1, r=gm.round_random, norm=gm.l1, lam=1e-4),
    lambda f, data: gm.finetune(f, f.vector(), torch.ones(f.d), data, epochs=1),
    lambda f, data: bl.edge_popup(f, data, sparsity=0.5, epochs=1),
    lambda f, data: bl.edge_popup(f, data, sparsity=0.5, epochs=1, period=1, regularize=True),
    lambda f, data: bl.tune_densities(f, data, bl.smart_ratio(f.sizes, 0.5), epochs=1),
])  # fmt: skip
def test_no_step_waits_for_the_device(search, monkeypatch):
    split = gm.Split(torch.randint(256, (20, 8, 8, 3)).to(torch.uint8), torch.arange(20) % 10)
    waits, seen = Waits(), []

    class Watched(gm.Batches):
        def __iter__(self):
            for batch in super().__iter__():
                yield batch
                seen.append(waits.n)

    for name in ("cpu", "tolist"):  # which no dispatch shows for tensors on the CPU
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda t, method=method: [setattr(waits, "n", waits.n + 1), method(t)][1]
        )
    with waits:
        search(gm.Network(models.resnet20()), Watched(split, ([127.5] * 3, [60.0] * 3), 5, train=True, pad=4))
    assert len(seen) == 4
    assert seen[0] == seen[-1]
    assert waits.n > seen[-1]  # the end of an epoch does read its figures, and is seen


# --- Algorithm 1 ----------------------------------------------------------------------------------------------


def oracle(model, batches, w, p, s, E, T, eta, lam, norm, invert):
    """The paper's lines 1 to 16 in plain Python, a weight at a time; SGD with momentum 0.9, cosine schedule.

    Returns p, q, and for each epoch its mean loss and how many images were right.
    """
    d, layers, figures = len(p), [model.conv.weight, model.fc.weight], []
    w, p, velocity, q = w.tolist(), p.tolist(), [0.0] * d, [1] * d
    c = math.log(1 / s) / (E // T * T)  # line 1; E in the paper, where T divides it
    for j in range(1, E + 1):  # line 4
        lr = eta * 0.5 * (1 + math.cos(math.pi * (j - 1) / E))
        losses, right = [], 0
        for x, y in batches:  # line 5
            w_eff = [w[i] * q[i] * (1.0 if p[i] >= 0.5 else 0.0) for i in range(d)]  # line 6
            with torch.no_grad():
                layers[0].copy_(torch.tensor(w_eff[:18]).reshape(2, 3, 3, 1).permute(0, 3, 1, 2))
                layers[1].copy_(torch.tensor(w_eff[18:]).reshape(3, 8))
            model.train().zero_grad()
            out = model(x)
            loss = F.cross_entropy(out, y)
            loss.backward()
            losses.append(loss.item())
            right += (out.argmax(1) == y).sum().item()
            grad = layers[0].grad.permute(0, 2, 3, 1).flatten().tolist() + layers[1].grad.flatten().tolist()
            for i in range(d):
                penalty = 2 * lam * p[i] if norm == "l2" else lam * (p[i] > 0)
                velocity[i] = 0.9 * velocity[i] + grad[i] * w[i] * q[i] + penalty  # straight-through
                p[i] = min(1.0, max(0.0, p[i] - lr * velocity[i]))  # lines 7, 8
        if j % T == 0:  # line 10
            I1 = sorted((i for i in range(d) if q[i]), key=lambda i: p[i], reverse=invert)  # lines 11, 12
            for i in I1[: len(I1) - round(d * math.exp(-c * j))]:  # lines 13 to 15
                q[i] = 0
        figures.append((sum(losses) / len(losses), right))
    return torch.tensor(p, dtype=torch.float64), torch.tensor(q), figures


@pytest.mark.parametrize(
    "case", [{}, {"norm": "l1"}, {"invert": True}, {"T": 1}, {"E": 7}, {"lam": 0.0, "eta": 0.2}], ids=str
)
def test_mine_is_algorithm_1(case):
    case = {"s": 0.2, "E": 6, "T": 2, "eta": 0.05, "lam": 0.02, "norm": "l2", "invert": False, **case}
    model, batches, drawn, rows = tiny().eval(), tiny_batches(), {}, []
    others = {name: p.clone() for name, p in model.named_parameters() if name not in ("conv.weight", "fc.weight")}

    def init(f):
        """Remembers w, and the p that mine() draws next."""
        drawn["w"] = gm.signed_constant(f)
        state = torch.get_rng_state()
        drawn["p"] = torch.rand(42, dtype=torch.float64)
        torch.set_rng_state(state)
        return drawn["w"].clone()

    gem = gm.mine(
        model, batches, sparsity=case["s"], epochs=case["E"], period=case["T"], lr=case["eta"], lam=case["lam"],
        norm=getattr(gm, case["norm"]), invert=case["invert"], init=init, on_epoch=lambda row, *_: rows.append(row),
    )  # fmt: skip
    p, q, figures = oracle(tiny(), batches, **drawn, **case)
    assert len(p.unique()) > 20  # few ties: the order of scores is the same in both
    assert torch.allclose(gem.p, p, atol=1e-9)
    assert torch.equal(gem.q, q.double())
    assert torch.equal(gem.m, (gem.p >= 0.5) * gem.q)
    assert torch.equal(gem.w, drawn["w"])  # not a weight was trained,
    for name, t in others.items():  # nor anything else
        assert torch.equal(model.get_parameter(name), t)
    assert torch.equal(gm.Network(model).vector(), gem.w * gem.m)  # the model is the gem now
    assert not model.training
    for row, (loss, right) in zip(rows, figures, strict=True):
        assert row["loss"] == pytest.approx(loss)
        assert row["train_acc"] == pytest.approx(100 * right / 32)


def test_rounding_is_exact_and_straight_through():
    p = torch.tensor([0.0, 0.3, 0.49999997, 0.5, 0.7, 1.0], requires_grad=True)
    weight = torch.arange(6.0)
    assert gm.round_ste(p).tolist() == [0, 0, 0, 1, 1, 1]
    (gm.round_ste(p) * weight).sum().backward()
    assert torch.equal(p.grad, weight)
    p = torch.full((40_000,), 0.3, requires_grad=True)
    drawn = gm.round_random(p)  # p is the probability
    assert set(drawn.tolist()) == {0.0, 1.0}
    assert drawn.mean().item() == pytest.approx(0.3, abs=0.02)
    drawn.sum().backward()
    assert torch.equal(p.grad, torch.ones_like(p))


@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize("distinct", [0, 100, 1000])  # the other scores are all 0
def test_freezing_is_exact_under_ties_and_takes_the_worst(distinct, invert):
    p = torch.cat([torch.zeros(1000 - distinct), torch.rand(distinct)])
    q = (torch.arange(1000) % 4 > 0).float()
    new = gm.freeze(p, q, 500, invert)
    assert new.sum() == 500
    assert (new <= q).all()
    assert q.sum() == 750  # its argument is unchanged
    frozen, kept = p[(q - new) == 1], p[new == 1]
    if invert:
        assert frozen.min() >= kept.max()
    else:
        assert frozen.max() <= kept.min()
    assert torch.equal(gm.freeze(p, q, 751, invert), q)
    if distinct == 0:
        assert new[:500].sum().item() == pytest.approx(250, abs=50)  # ties fall at random, not by position


@pytest.mark.parametrize("bad, word", [
    ({"sparsity": 0}, "sparsity"), ({"sparsity": 1.44}, "1.44"), ({"sparsity": 0.001}, "1/42"),
    ({"sparsity": math.nan}, "nan"), ({"period": 11}, "11"), ({"period": 0}, "period"), ({"period": 1.5}, "whole"),
    ({"lam": -1}, "lambda"), ({"lam": math.nan}, "lambda"), ({"epochs": 0}, "epochs"),
    ({"train": iter(tiny_batches())}, "no batch"),  # an iterator is spent after one epoch
    ({"train": (torch.zeros(8, 1, 4, 4), torch.zeros(7))}, "8 inputs, but 7 labels"),
])  # fmt: skip
def test_values_out_of_range_are_refused(bad, word):
    with pytest.raises(ValueError, match=word):
        gm.mine(tiny(), **{"train": tiny_batches(), "sparsity": 0.5, "epochs": 10, "period": 1, **bad})


def test_lost_layers_are_named_once():
    with pytest.warns(UserWarning, match="conv.weight, fc.weight") as said:
        gem = gm.mine(tiny(), tiny_batches(), sparsity=0.5, epochs=4, period=1, lam=10.0)
    assert len(said) == 1
    assert gem.q.sum() == 21
    assert gem.m.sum() == 0


def test_a_loss_or_scores_that_are_not_finite_stop_the_run():
    x, y = tiny_batches()[0]
    lost = [(x * math.nan, y)]
    with pytest.raises(FloatingPointError, match="epoch 1"):
        gm.mine(tiny(), lost, sparsity=0.5, epochs=2)
    with pytest.raises(FloatingPointError):  # in the last step: no loss shows it any more
        gm.mine(tiny(), [(x, y)], sparsity=0.5, epochs=1, lam=1, norm=lambda p: (p * math.nan).sum())
    with pytest.raises(FloatingPointError):
        gm.finetune(tiny(), torch.ones(42).double(), torch.ones(42), lost, epochs=1)


def test_each_epoch_has_its_own_randomness():
    data = Draws()
    for seed in (0, 0, 1):
        gm.mine(tiny(), data, sparsity=0.5, epochs=3, seed=seed)
        gm.finetune(tiny(), torch.ones(42).double(), torch.ones(42), data, epochs=3, seed=seed)
    assert data.seen[:6] == data.seen[6:12]
    assert len(set(data.seen)) == 12


@pytest.mark.parametrize("kind", ["tuple", "list", "loader"])
def test_mining_takes_tensors_or_a_loader_and_ones_own_optimizer(kind):
    x, y = torch.randn(40, 1, 4, 4), torch.randint(3, (40,))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16, shuffle=True)
    data, rates, scores = {"tuple": (x, y), "list": [x, y], "loader": loader}[kind], [], []

    class Recorded(torch.optim.Adam):
        def step(self):
            rates.append(self.param_groups[0]["lr"])
            super().step()

    for seed in (0, 0, 1):
        gem = gm.mine(
            tiny(torch.float32), data, sparsity=0.5, epochs=2, lr=0.1, batch_size=16, seed=seed,
            optimizer=Recorded, schedule=lambda lr, j, E: lr + j + 10 * E, lam=1e-4,
        )  # fmt: skip
        scores.append(gem.p)
    assert torch.equal(scores[0], scores[1])  # the seed fixes the loader's order, too
    assert not torch.equal(scores[0], scores[2])
    assert rates == 3 * ([21.1] * 3 + [22.1] * 3)  # batches of 16, 16 and 8


def test_another_criterion_is_learned_and_has_no_accuracy():
    """The squared error, which a step of mining or finetuning lowers to what autograd says."""
    model, x, y, rows = nn.Linear(3, 2, bias=False), torch.randn(5, 3), torch.randn(5, 2), []
    w, m = torch.randn(6), torch.ones(6)
    kw = {"epochs": 2, "lr": 0.1, "criterion": F.mse_loss, "on_epoch": lambda row, *_: rows.append(row)}
    gm.finetune(model, w, m, [(x, y)], schedule=lambda lr, j, E: lr, **kw)
    w.requires_grad_()
    for row in rows:
        loss = ((x @ w.view(2, 3).T - y) ** 2).mean()
        assert row["loss"] == pytest.approx(loss.item())
        w = w - 0.1 * (torch.autograd.grad(loss, w)[0] + 1e-4 * w)
    gm.mine(model, [(x, y)], sparsity=0.5, **kw)
    assert [row["train_acc"] for row in rows] == [None] * 4
    assert gm.accuracy(model, [(x, y)]) is None


class Ties(torch.optim.Optimizer):
    """Sets every score to one and the same value."""

    def __init__(self, params, value):
        super().__init__(params, {"lr": 0, "value": value})

    def step(self):
        for group in self.param_groups:
            group["params"][0].data.fill_(group["value"])


@pytest.mark.parametrize("seed", range(15))
def test_algorithm_1_holds_on_any_network(seed):
    """Random sizes (d from 1, layers of one weight), sparsities, periods, lambdas, steps; and scores that all tie."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    widths = [rng.choice((1, 1, 2, 3, 7)) for _ in range(rng.randint(2, 4))]
    layers = [nn.Linear(a, b, bias=rng.random() < 0.5) for a, b in zip(widths, widths[1:])]
    model, d = nn.Sequential(*layers).double(), sum(layer.weight.numel() for layer in layers)
    E = rng.randint(1, 9)
    T, n = rng.randint(1, E), rng.choice((1, d, rng.randint(1, d)))
    optimizer = [gm.sgd, gm.adam, lambda params, lr: Ties(params, rng.choice((0.0, 0.5, 1.0)))][seed % 3]
    lam, lr = rng.choice((0, 1e-4, 1.0, 1e6)), rng.choice((1e-3, 1.0, 1e3))
    data = torch.randn(6, widths[0], dtype=torch.float64), torch.randint(widths[-1], (6,))
    seen = []

    def on_epoch(row, v, state):
        assert torch.equal(v, state["w"] * state["m"])
        assert row["q"] == state["q"].sum()
        assert row["m"] == state["m"].sum()
        seen.append(copy.deepcopy(state))

    gem = gm.mine(
        model, data, sparsity=n / d, epochs=E, period=T, lr=lr, lam=lam, optimizer=optimizer, batch_size=3,
        on_epoch=on_epoch,
    )  # fmt: skip
    before = torch.ones(d, dtype=torch.bool)
    for j, state in enumerate(seen, 1):
        p, q = state["p"], state["q"]
        assert 0 <= p.min() <= p.max() <= 1
        assert not (q & ~before).any()  # what is frozen stays frozen
        assert torch.equal(state["m"], q & (p >= 0.5))
        assert torch.equal(state["w"], gem.w)
        kept = round(d * (n / d) ** (j / (E // T * T))) if j % T == 0 else before.sum()
        assert q.sum() == kept
        before = q
    assert gem.q.sum() == n
    assert torch.equal(gm.Network(model).vector(), gem.w * gem.m)


def convolutions(kind, norm, size):
    return nn.Sequential(
        kind(3, 4, 3, padding=1), norm(4), nn.ReLU(), kind(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(size, 3)
    )  # fmt: skip


NETWORKS = {  # what it is: (the network, the shape of its input, its tensors of weights)
    "vit": (lambda: torchvision.models.VisionTransformer(8, 4, 2, 2, 8, 16, num_classes=3), (3, 8, 8), 8),
    "tied": (Tied, (9,), 2),
    "conv1d": (lambda: convolutions(nn.Conv1d, nn.BatchNorm1d, 16), (3, 6), 3),
    "conv3d": (lambda: convolutions(nn.Conv3d, nn.BatchNorm3d, 32), (3, 4, 4, 4), 3),
    "transposed": (lambda: convolutions(nn.ConvTranspose2d, nn.BatchNorm2d, 144), (3, 4, 4), 3),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_others_are_mined_and_finetuned(name):
    build, shape, tensors = NETWORKS[name]
    torch.manual_seed(0)
    model, x, y = build(), 3 * torch.randn(8, *shape), torch.randint(3, (8,))
    f = gm.Network(model)
    assert len(f.names) == tensors
    for view in f.views(gm.signed_constant(f)).values():
        assert torch.allclose(view.abs(), torch.tensor((2 / view[0].numel()) ** 0.5))
    for training in (True, False):  # the function is the module, in either mode
        plain, function = copy.deepcopy(model).train(training), gm.Network(copy.deepcopy(model)).train(training)
        torch.manual_seed(1)
        expected = plain(x)
        torch.manual_seed(1)
        assert torch.allclose(function(f.vector(), x), expected, atol=1e-4)

    others = {name: p.clone() for name, p in f.others().items()}
    gem = gm.mine(f, (x, y), sparsity=0.25, epochs=2, lr=0.5, batch_size=4)
    assert gem.q.sum() == round(0.25 * f.d)
    assert torch.equal(f.vector(), gem.w * gem.m)
    assert same(others, f.others())  # mining trains nothing
    v = gm.finetune(f, gem.w, gem.q, (x, y), epochs=2, batch_size=4)
    assert torch.equal(f.vector(), v)
    assert not v[gem.q == 0].any()
    assert not torch.equal(v, gem.w * gem.q)
    assert not same(others, f.others())  # biases and norms are trained now
    assert gm.accuracy(model, (x, y)) == gm.accuracy(f, (x, y), v)  # dropout is off


X, Y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)


@pytest.mark.parametrize("build, d", [
    (lambda: nn.LSTM(4, 3), 12 * (4 + 3)), (lambda: nn.GRU(4, 3, 2, bidirectional=True), 2 * 9 * (4 + 3 + 6 + 3)),
    (Attention, 4 * 16), (lambda: nn.Sequential(nn.Linear(4, 3), nn.Unflatten(0, (1, -1))), 12),
])  # fmt: skip
def test_prune_chooses_the_parameters(build, d):
    """All matrices, here: the function of them has the module's output and gradient."""
    model, x = build(), torch.randn(5, 2, 4)
    f = gm.Network(model, prune=lambda name, parameter: parameter.dim() == 2)
    assert f.d == d
    v = f.vector().requires_grad_()
    for out in (f.train()(v, x), model(x)):
        out[0].square().sum().backward()
    assert torch.allclose(v.grad, f.vector({name: p.grad for name, p in f.weights.items()}), atol=1e-6)
    stds = torch.cat([torch.full((p.numel(),), (2 / p.shape[1]) ** 0.5) for p in f.weights.values()])
    assert torch.allclose(gm.signed_constant(f).abs(), stds)
    with pytest.raises(ValueError, match="nothing to prune"):
        gm.Network(model, prune=lambda name, parameter: False)


def test_a_layer_that_a_model_has_twice_counts_once():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, 3))
    f = gm.Network(model)
    assert (f.names, f.d) == (["0.weight", "4.weight"], 28)
    gem = gm.mine(f, (X, Y), sparsity=0.5, epochs=2)
    assert torch.equal(f.vector(), gem.w * gem.m)
    assert model[2].weight is model[0].weight is layer.weight
    v = f.vector().requires_grad_()
    for out in (f(v, X), model(X)):
        out.square().sum().backward()
    assert torch.allclose(v.grad, f.vector({name: p.grad for name, p in f.weights.items()}), atol=1e-6)


def test_accuracy_is_of_classes_alone_and_counts_examples():
    mask, model = torch.ones(1, 4), nn.Bilinear(4, 4, 3)
    f = gm.Network(model, prune=lambda name, parameter: name == "weight")
    right = 100 * (model(mask.expand(6, 4), X).argmax(1) == Y).float().mean().item()
    assert gm.accuracy(f, [((mask.expand(6, 4), X), Y)]) == pytest.approx(right, abs=1e-3)
    network = gm.Network(nn.Linear(4, 1))
    assert gm.accuracy(network, (X, Y)) is None  # one column
    stats = gm.Stats(1, 0.1, network)
    for _ in range(2):
        stats.add(torch.tensor(6e4, dtype=torch.float16), None, (torch.ones(1), X), Y)
    assert stats.row(X)["loss"] == pytest.approx(6e4, rel=1e-3)  # by the examples of y, in float32


def test_a_head_can_stay_dense_and_embeddings_can_be_pruned():
    with pytest.warns(UserWarning, match="only 48 of 109"):
        f = gm.Network(Tied(), prune=lambda name, parameter: name in ("embed.weight", "a.bias"))
    assert (f.names, f.sizes) == (["embed.weight", "a.bias"], [42, 6])
    assert not {"out.weight", "embed.weight", "a.bias"} & set(f.rest())  # tied, so pruned with it
    gm.mine(f, (torch.randint(9, (8, 5)) % 7, torch.randint(7, (8,))), sparsity=0.5, epochs=2)


def test_what_would_be_left_out_silently_is_said():
    pruned, normed = nn.Linear(4, 3, bias=False), nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
    torch.nn.utils.prune.l1_unstructured(pruned, "weight", 0.5)
    lstm = nn.utils.spectral_norm(nn.LSTM(4, 3), "weight_hh_l0")
    for model, word in ((nn.Sequential(nn.Linear(4, 4), pruned), "layer '1'.*prune.remove"), (normed, "layer '0'"),
                        (nn.ModuleList([lstm]), "layer '0'"), (nn.LazyLinear(3), "lazy")):  # fmt: skip
        for prune in (None, lambda name, parameter: parameter.dim() == 2):
            with pytest.raises(ValueError, match=word):
                gm.Network(model, prune)
    with pytest.warns(UserWarning, match="only 12 of 115 parameters"):
        gm.Network(nn.Sequential(nn.Embedding(25, 4), nn.Linear(4, 3)))


class Named(nn.Module):
    """Takes its arguments by name, and gives back what no criterion of PyTorch takes."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, inputs, scale):
        return {"logits": self.fc(inputs * scale[:, None])}


def test_batches_and_outputs_of_every_kind_are_learned_alike():
    x, scale, y = torch.randn(40, 4), torch.rand(40), torch.randint(3, (40,))
    inputs, rows = {"inputs": x, "scale": scale}, []
    torch.manual_seed(0)
    model, kw = Named(), {"sparsity": 0.5, "epochs": 2, "batch_size": 16}

    def criterion(out, y):
        return F.cross_entropy(out["logits"], y["classes"] if isinstance(y, dict) else y)

    numpy = {name: t.double().numpy() for name, t in inputs.items()}
    scores = [gm.mine(model.fc, (x * scale[:, None], y), **kw).p]
    for data in ((inputs, y), ((x, scale), y), ([x, scale], y), (numpy, y.int().numpy()), (inputs, {"classes": y})):
        scores.append(gm.mine(model, data, criterion=criterion, on_epoch=lambda row, *_: rows.append(row), **kw).p)
    gem = gm.mine(model, [(inputs, {"classes": y})], criterion=criterion, **{**kw, "epochs": 1})  # batches of it
    gm.finetune(model, gem.w, gem.q, [((x, scale), y)], epochs=1, criterion=criterion)
    assert all(torch.allclose(p, scores[0], atol=1e-5) for p in scores)
    assert {row["train_acc"] for row in rows} == {None}
    assert gm.accuracy(model, (inputs, y)) is None


@pytest.mark.parametrize("train, word", [
    ([(X, Y, Y)], "batches"), ((X, Y, Y), "batches"), (X, "batches"), ([{"x": X, "y": Y}], "batches"),
    ([(x, y) for x, y in zip(X, Y)], "batches"), ([(x, int(y)) for x, y in zip(X, Y)], "batches"),
    (torch.utils.data.TensorDataset(X, Y), "DataLoader"), ((X, Y.tolist()), "tensors or arrays"),
    (({"inputs": X, "scale": X[:5]}, Y), "6 inputs"), (None, "NoneType"), ([{"x": X}, {"x": X}], "batches"),
])  # fmt: skip
def test_what_is_no_data_is_refused_in_a_line(train, word):
    with pytest.raises(ValueError, match=word):
        gm.mine(nn.Linear(4, 3), train, sparsity=0.5, epochs=1)


def test_scores_are_not_swallowed_by_bfloat16():
    """Steps of 1e-4 are far below bfloat16's resolution at 0.5."""
    model, data = nn.Linear(4, 3).bfloat16(), (X.bfloat16(), Y)
    f, one = gm.Network(model), gm.mine(model, data, sparsity=1, epochs=1, lr=1e-4, lam=0)
    gm.reseed(0, "init")
    gm.signed_constant(f)
    moved = (one.p - torch.rand(f.d)).abs()
    assert one.p.dtype == one.w.dtype == torch.float32
    assert 0 < moved.max() < 1e-3
    bias, single = model.bias.clone(), nn.Linear(4, 3)
    single.load_state_dict(model.state_dict())
    v = gm.finetune(model, one.w, one.q, data, epochs=200, lr=1e-4)
    gm.finetune(single, one.w, one.q, (X, Y), epochs=200, lr=1e-4)
    assert torch.equal(f.vector(), v.bfloat16().float())
    assert not torch.equal(model.bias, bias)
    assert torch.allclose(model.bias.float(), single.bias, atol=0.003)


def test_checkpointed_blocks_get_the_right_gradient():
    block, head, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh()), nn.Linear(4, 3), X
    plain = nn.Sequential(block, head)
    saving = copy.deepcopy(plain)
    inner = saving[0].forward
    saving[0].forward = lambda x: torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False)
    grads = []
    for training, model in itertools.product((True, False), (plain, saving)):
        f = gm.Network(model)
        v = torch.linspace(-1, 1, f.d).requires_grad_()
        F.cross_entropy(f.train(training)(v, x), Y).backward()
        grads.append(v.grad)
    assert all(torch.allclose(grads[0], grad) for grad in grads)
    before = f.vector()
    f(torch.zeros(f.d), x)
    assert torch.equal(f.vector(), before)  # without a gradient, the model is as it was


def test_a_search_can_be_stopped_and_goes_on_only_from_its_own_state():
    model, states, kw = nn.Linear(4, 3), [], {"sparsity": 0.2, "epochs": 6, "lr": 1}

    class Unsized:
        def __iter__(self):
            return iter([(X, Y)] * 9)

    def on_epoch(row, v, state):
        states.append(copy.deepcopy(state))
        return row["epoch"] == 2

    whole = gm.mine(model, Unsized(), **kw)
    gm.mine(model, Unsized(), on_epoch=on_epoch, **kw)
    gm.finetune(model, whole.w, whole.q, (X, Y), epochs=5, on_epoch=on_epoch)
    assert [state["epoch"] for state in states] == [1, 2, 1, 2]
    with pytest.raises(ValueError, match="its names is"):
        gm.mine(nn.Sequential(model), Unsized(), state=states[1], **kw)
    assert torch.equal(gm.mine(model, Unsized(), state=states[1], **kw).p, whole.p)
    for change, word in (({"sparsity": 0.4}, "sparsity"), ({"epochs": 5}, "epochs"), ({"seed": 1}, "seed")):
        with pytest.raises(ValueError, match=f"its {word} is"):
            gm.mine(model, (X, Y), state=states[1], **{**kw, **change})
    with pytest.raises(ValueError, match="its d is 12, not 8"):
        gm.mine(nn.Linear(4, 2), (X, Y % 2), state=states[1], **kw)
    with pytest.raises(ValueError, match="its size is 12, not 8"):
        gm.finetune(nn.Linear(4, 2), torch.ones(8), torch.ones(8), (X, Y % 2), epochs=5, state=states[3])


def test_a_schedule_is_asked_once_an_epoch_and_none_leaves_all_rates_alone():
    asked, rates, model = [], [], nn.Linear(4, 3)

    def optimizer(params, lr):
        return torch.optim.AdamW([{"params": params[:1], "lr": 0.1}, {"params": params[1:], "lr": lr}])

    for schedule in (None, lambda eta, j, E: asked.append(j) or eta):
        gm.finetune(
            model, torch.ones(12), torch.ones(12), (X, Y), epochs=2, lr=0.3, optimizer=optimizer, schedule=schedule,
            on_epoch=lambda row, v, state: rates.append([g["lr"] for g in state["optimizer"]["param_groups"]]),
        )  # fmt: skip
    assert asked == [1, 2]
    assert rates == 2 * [[0.1, 0.3]] + 2 * [[0.3, 0.3]]


@pytest.mark.parametrize("kind", ["tensors", "loader", "iterable"])
def test_lambda_by_itself_reaches_the_density_in_half_the_epochs(kind):
    """Where the loss moves no score (every input is 0), r(p) * q is as dense as wanted after every epoch."""
    x, y, seen = torch.zeros(200, 50), torch.zeros(200).long(), []
    batches = list(zip(x.split(2), y.split(2)))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=2)

    class Iterable:
        def __iter__(self):
            return iter(batches)

    train = {"tensors": (x, y), "loader": loader, "iterable": Iterable()}[kind]
    gem = gm.mine(
        nn.Linear(50, 40, bias=False), train, sparsity=0.05, epochs=10, period=3, batch_size=2,
        on_epoch=lambda row, v, state: seen.append((row["m"] / 2000, row["lam"])),
    )  # fmt: skip
    for j, (density, lam) in enumerate(seen, 1):
        wanted = 0.05 ** min(1, j / 5)
        if j > 1 and wanted < 0.5:  # uniform scores leave half of the weights by themselves
            assert density == pytest.approx(wanted, rel=0.15)
            assert lam > 0 or j > 5
    assert gem.q.sum() == 100
    assert seen[0][1] == 0 or kind != "iterable"


def test_lambda_by_itself_does_not_overshoot_in_few_steps():
    """With ten steps an epoch, most of what a lambda does comes later, by momentum."""
    x, y = torch.zeros(200, 50), torch.zeros(200).long()
    gem = gm.mine(nn.Linear(50, 40, bias=False), (x, y), sparsity=0.05, epochs=10, period=3, batch_size=20)
    assert gem.m.sum() == gem.q.sum() == 100


def test_lambda_by_itself_is_for_what_it_was_derived_for():
    for kw in ({"optimizer": gm.adam}, {"norm": gm.l1}, {"r": gm.round_random}):
        with pytest.raises(ValueError, match="give lambda as a number"):
            gm.mine(tiny(), tiny_batches(), sparsity=0.5, **kw)


# --- weights, schedules, finetuning and the checks --------------------------------------------------------------


def test_initial_weights():
    """Signed constants and Kaiming normal: sqrt(2 / fan_in) of each layer, worked out by hand for ResNet-20."""
    f = gm.Network(models.resnet20())
    w, normal = f.views(gm.signed_constant(f)), f.views(gm.kaiming_normal(f))
    for name, std in (("conv1", 0.2721655), ("layer2.2.conv2", 0.0833333), ("fc", 0.1767767)):
        assert torch.allclose(w[f"{name}.weight"].abs(), torch.tensor(std), atol=1e-6)
        assert abs(w[f"{name}.weight"].sign().mean()) < 0.2
        assert normal[f"{name}.weight"].std().item() == pytest.approx(std, rel=0.1)
    assert torch.equal(gm.given(f), f.vector())


def test_cosine_is_torchs():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
    for j in range(1, 31):
        assert gm.cosine(0.1, j, 30) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_multistep_is_table_15():
    rates = [gm.multistep(0.01, j, 150) for j in range(1, 151)]
    assert rates == pytest.approx([0.01] * 80 + [0.001] * 40 + [0.0001] * 30)
    assert [gm.multistep(1.0, j, 2, (0.1, 0.8)) for j in (1, 2)] == pytest.approx([1.0, 0.1])
    assert gm.multistep(1.0, 1, 1, (0.1, 0.8)) == 1.0  # never before one epoch is over


def test_finetune_is_masked_sgd():
    """Against module-by-module training with a mask multiplied in; SGD, momentum 0.9, weight decay 1e-4."""
    model, twin, batches = tiny().eval(), tiny(), tiny_batches()
    f = gm.Network(model)
    m = (torch.arange(42) % 3 == 0).double()
    w = f.vector()
    result = gm.finetune(f, w, m, batches, epochs=3, lr=0.1)
    assert torch.allclose(result, masked_sgd(twin, w, m, batches, E=3), atol=1e-10)
    assert (result[m == 0] == 0).all()
    assert not torch.allclose(result, w * m)
    assert torch.equal(f.vector(), result)
    assert torch.allclose(model.bn.weight, twin.bn.weight, atol=1e-10)  # what is not pruned is trained too
    assert torch.allclose(model.conv.bias, twin.conv.bias, atol=1e-10)


@pytest.mark.parametrize("w, m", [
    (torch.ones(42), torch.ones(1)), (torch.ones(1), torch.ones(42)), (torch.ones(42), torch.full((42,), 0.5)),
])  # fmt: skip
def test_finetune_refuses_what_is_no_mask(w, m):
    with pytest.raises(ValueError, match="vectors of 42 numbers"):
        gm.finetune(tiny(), w, m, tiny_batches(), epochs=1)


def test_shuffling_keeps_the_counts_of_the_layers_alone():
    f = gm.Network(models.resnet20())
    torch.manual_seed(0)
    m = (torch.rand(f.d) < 0.1).float()
    mixed = gm.shuffle(f, m, seed=1)
    assert f.counts(mixed) == f.counts(m)
    assert torch.equal(mixed, gm.shuffle(f, m, seed=1))
    assert not torch.equal(mixed, gm.shuffle(f, m, seed=2))
    assert (mixed * m).sum() / m.sum() == pytest.approx(0.1, abs=0.02)  # places in common by chance


def test_reinitialisation_is_a_new_draw():
    f = gm.Network(models.resnet20())
    w = gm.mine(f, (torch.randn(2, 3, 8, 8), torch.arange(2)), sparsity=0.5, epochs=1, seed=1).w
    drawn = gm.reinit(f, seed=1)
    assert torch.equal(drawn.abs(), w.abs())
    assert (drawn == w).float().mean() == pytest.approx(0.5, abs=0.01)  # of the same seed, but not the same
    assert torch.equal(drawn, gm.reinit(f, seed=1))
    assert len(gm.reinit(f, gm.kaiming_normal).unique()) > 1000


def test_reestimated_statistics_are_the_mean_over_batches():
    """Of the layer's inputs under v, whatever they were before; and nothing else changes."""
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2))
    net(7 + torch.randn(20, 4))  # leaves statistics that must be forgotten
    f, parts = gm.Network(net), torch.randn(3, 20, 4)
    v, before = torch.randn(f.d), copy.deepcopy(net.state_dict())
    gm.reestimate(net, v, [(part, torch.zeros(20)) for part in parts], batches=2)
    inputs = [part @ v[:12].view(3, 4).T + net[0].bias for part in parts[:2]]
    assert torch.allclose(net[1].running_mean, (inputs[0].mean(0) + inputs[1].mean(0)) / 2, atol=1e-6)
    assert torch.allclose(net[1].running_var, (inputs[0].var(0) + inputs[1].var(0)) / 2, rtol=1e-5)
    changed = [name for name, t in net.state_dict().items() if not torch.equal(t, before[name])]
    assert changed == ["1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert net[1].momentum == 0.1
    assert not net.training

    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="batches"):  # after a good one
        gm.reestimate(net, v, [(parts[0], torch.zeros(20)), parts[1], parts[2]])
    net[1].train = lambda mode: net[1]  # frozen by its owner
    gm.reestimate(net, v, [(parts[2], torch.zeros(20))])
    with pytest.raises(ValueError, match="no batch"):
        gm.reestimate(net, v, iter(()))
    assert same(net.state_dict(), before)
    assert net[1].momentum == 0.1
    assert not net.training


# --- data -----------------------------------------------------------------------------------------------------


def test_batched_crop_and_flip_are_the_per_image_ones():
    gen = torch.Generator().manual_seed(0)
    split = gm.Split(torch.randint(256, (10, 6, 6, 3), generator=gen, dtype=torch.uint8), torch.arange(10))
    mean, std = [100.0, 110.0, 120.0], [50.0, 60.0, 70.0]
    batches = gm.Batches(split, (mean, std), 4, train=True, pad=2)
    torch.manual_seed(7)
    result = list(batches)
    torch.manual_seed(7)  # the draws of an epoch, in their order
    order, (top, left), mirror = torch.randperm(10), torch.randint(5, (2, 10, 1)), torch.rand(10, 1) < 0.5
    assert len(batches) == 3
    assert [len(y) for _, y in result] == [4, 4, 2]
    assert torch.equal(torch.cat([y for _, y in result]), order)
    for x, i in zip(torch.cat([x for x, _ in result]), order.tolist()):
        image = tv.pad(tv.to_pil_image(split.x[i].permute(2, 0, 1)), 2)
        image = tv.crop(image, top[i].item(), left[i].item(), 6, 6)
        if mirror[i]:
            image = tv.hflip(image)
        assert torch.allclose(x, tv.normalize(tv.pil_to_tensor(image).float(), mean, std))
    assert not torch.equal(torch.cat([y for _, y in batches]), order)  # another epoch, another order
    [(x, y)] = gm.Batches(split, (mean, std), 10)  # those to test on: in order, as they are
    assert y.tolist() == list(range(10))
    assert torch.allclose(x, tv.normalize(split.x.permute(0, 3, 1, 2).float(), mean, std))


def test_no_batch_of_one_reaches_batchnorm():
    split = gm.Split(torch.zeros(9, 4, 4, 3, dtype=torch.uint8), torch.arange(9))
    batches = gm.Batches(split, ([0.0] * 3, [1.0] * 3), 4, train=True)
    assert [len(y) for _, y in batches] == [4, 5]
    assert len(batches) == 2
    assert [len(y) for _, y in gm.minibatches(gm.Network(tiny()), (split.x, split.y), 8)] == [9]


def test_pixel_stats():
    x = torch.randint(256, (50, 4, 4, 3), dtype=torch.uint8)
    means, stds = gm.pixel_stats(x)
    assert means == pytest.approx(x.float().mean((0, 1, 2)).tolist(), abs=1e-3)
    assert stds == pytest.approx(x.float().std((0, 1, 2), correction=0).tolist(), abs=1e-3)
    assert gm.pixel_stats(torch.zeros(2, 4, 4, 3, dtype=torch.uint8))[1] == [1.0, 1.0, 1.0]


def test_shapes_is_fixed_and_balanced():
    data = gm.shapes()
    assert (data.train.x.shape, data.train.x.dtype) == ((4500, 32, 32, 3), torch.uint8)
    assert data.train.y.bincount().tolist() == [450] * 10
    assert data.test.y.bincount().tolist() == [100] * 10
    assert torch.equal(gm.draw_shapes(1000, 2).x, data.test.x)


def test_validation_split_is_the_papers_and_disjoint(monkeypatch):
    x = torch.arange(500).view(500, 1, 1, 1).expand(500, 1, 1, 3)
    data = gm.Data(gm.Split(x, torch.arange(500)), gm.Split(x[:9], torch.arange(9)), 10)
    monkeypatch.setitem(gm.LOADERS, "cifar10", lambda root: data)
    full, held, again = (gm.load_data("cifar10", "data", held_out=out) for out in (False, True, True))
    assert (len(full.train.y), len(full.test.y)) == (500, 9)
    assert (len(held.train.y), len(held.test.y)) == (450, 50)  # 45,000 + 5,000 of CIFAR-10's 50,000
    assert sorted(torch.cat([held.train.y, held.test.y]).tolist()) == list(range(500))
    assert torch.equal(held.test.y, held.test.x[:, 0, 0, 0])  # images keep their labels
    assert torch.equal(held.test.y, again.test.y)


def picture(i, size=(8, 8)):
    """Noise; brighter for i from 100 on, so that the second class of make_folder can be told from the first."""
    gen = torch.Generator().manual_seed(i)
    return tv.to_pil_image(torch.randint(256, (3, *size), generator=gen).clamp(90 * (i >= 100), 255).to(torch.uint8))


def make_folder(root, train=6, test=4, size=(8, 8), classes=("cat", "dog")):
    for part, n in (("train", train), ("test", test)):
        for k, name in enumerate(classes):
            (root / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(n):
                picture(100 * k + i + (part == "test") * 50, size).save(root / part / name / f"{i:03}.png")
    return root


def cifar_archive(folder, cls, monkeypatch, n=3):
    """CIFAR's real format: a tar.gz of pickled dicts of uint8 rows, red plane first. Its md5s become the right ones.

    Returns the rows of the training images.
    """
    labels = "fine_labels" if cls is torchvision.datasets.CIFAR100 else "labels"
    rows = [torch.randint(256, (n, 3072), dtype=torch.uint8) for _ in cls.train_list + cls.test_list]
    files = {cls.meta["filename"]: {cls.meta["key"]: [f"class{i}" for i in range(100 if "fine" in labels else 10)]}}
    for k, (name, _) in enumerate(cls.train_list + cls.test_list):
        files[name] = {"data": rows[k].numpy(), labels: [(k + i) % 10 for i in range(n)]}
    md5 = {}
    with tarfile.open(folder / cls.filename, "w:gz") as tar:
        for name, content in files.items():
            (folder / name).write_bytes(pickle.dumps(content))
            md5[name] = tv_utils.calculate_md5(folder / name)
            tar.add(folder / name, f"{cls.base_folder}/{name}")
    for part in ("train_list", "test_list"):
        monkeypatch.setattr(cls, part, [[name, md5[name]] for name, _ in getattr(cls, part)])
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": md5[cls.meta["filename"]]})
    monkeypatch.setattr(cls, "tgz_md5", tv_utils.calculate_md5(folder / cls.filename))
    return torch.cat(rows[: len(cls.train_list)])


def no_network(monkeypatch, serve=None):
    """Downloads fail, but those from serve = {part of the address: file}. Returns the list of what was asked for."""
    asked = []

    def urlopen(request, *args, **kw):
        asked.append(getattr(request, "full_url", request))
        for part, path in (serve or {}).items():
            if part in asked[-1]:
                response = io.BytesIO(path.read_bytes())
                response.url, response.length, response.headers = asked[-1], path.stat().st_size, {}
                return response
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return asked


@pytest.mark.parametrize("name, cls, classes", [
    ("cifar10", torchvision.datasets.CIFAR10, 10), ("cifar100", torchvision.datasets.CIFAR100, 100),
])  # fmt: skip
def test_cifar_from_an_archive_put_there_by_hand(name, cls, classes, tmp_path, monkeypatch):
    asked = no_network(monkeypatch)
    rows = cifar_archive(tmp_path, cls, monkeypatch)
    for _ in range(2):  # unpacked the first time, found the second
        data = gm.load_data(name, tmp_path)
        assert (data.classes, data.pad, len(data.test.y)) == (classes, 4, 3)
        assert torch.equal(data.train.x.permute(0, 3, 1, 2).flatten(1), rows)
        assert data.train.y[:3].tolist() == [0, 1, 2]
    assert not asked


def test_cifar10_tries_the_mirror_first_and_checks_what_it_sends(tmp_path, monkeypatch):
    cls = torchvision.datasets.CIFAR10
    cifar_archive(tmp_path, cls, monkeypatch)
    broken = tmp_path / "broken"
    broken.write_bytes(b"not what it should be")
    asked = no_network(monkeypatch, {"brainchip": broken, "toronto": tmp_path / cls.filename})
    data = gm.load_data("cifar10", tmp_path / "data")
    assert len(data.train.y) == 15
    assert "brainchip" in asked[0]
    assert "toronto" in asked[-1]


def test_tinyimagenet_from_its_zip(tmp_path, monkeypatch):
    jpeg = io.BytesIO()
    picture(0, (64, 64)).save(jpeg, "JPEG")
    with zipfile.ZipFile(tmp_path / "tiny-imagenet-200.zip", "w") as file:
        for wnid in ("n01443537", "n01629819"):
            for i in range(2):
                file.writestr(f"tiny-imagenet-200/train/{wnid}/images/{wnid}_{i}.JPEG", jpeg.getvalue())
            file.writestr(f"tiny-imagenet-200/train/{wnid}/{wnid}_boxes.txt", f"{wnid}_0.JPEG\t0\t0\t9\t9\n")
        labels = ""
        for i, wnid in enumerate(("n01629819", "n01443537", "n01629819")):
            file.writestr(f"tiny-imagenet-200/val/images/val_{i}.JPEG", jpeg.getvalue())
            labels += f"val_{i}.JPEG\t{wnid}\t0\t0\t9\t9\n"
        file.writestr("tiny-imagenet-200/val/val_annotations.txt", labels)
    no_network(monkeypatch)
    monkeypatch.setattr(tv_utils, "check_md5", lambda *args, **kw: True)
    data = gm.load_data("tinyimagenet", tmp_path)
    assert data.train.x.shape == (4, 64, 64, 3)
    assert data.train.y.tolist() == [0, 0, 1, 1]
    assert data.test.y.tolist() == [1, 0, 1]


def test_caltech101_from_its_folder(tmp_path, monkeypatch):
    for name, n in (("accordion", 6), ("BACKGROUND_Google", 2), ("Faces", 4)):
        home = tmp_path / "caltech101" / "101_ObjectCategories" / name
        home.mkdir(parents=True)
        for i in range(1, n + 1):
            picture(i, (20 + i, 30)).convert("L" if i == 1 else "RGB").save(home / f"image_{i:04}.jpg")
    (tmp_path / "caltech101" / "Annotations").mkdir()
    no_network(monkeypatch)
    (home / "Thumbs.db").touch()
    with pytest.warns(UserWarning, match="2 categories, not 101|1 files"):
        data, held = gm.load_data("caltech101", tmp_path), gm.load_data("caltech101", tmp_path, held_out=True)
    assert data.train.x.shape == (6, 224, 224, 3)  # 60%, and 20% each
    assert (len(data.test.y), len(held.test.y)) == (2, 2)
    assert (data.classes, data.pad) == (2, 0)
    assert data.stats[0][0] == 255 * 0.485
    assert not torch.equal(data.test.x, held.test.x)
    assert torch.equal(data.train.x, held.train.x)


def test_folder_of_images(tmp_path):
    data = gm.load_data(f"folder:{make_folder(tmp_path)}", None)
    assert data.train.x.shape == (12, 8, 8, 3)
    assert data.train.y.tolist() == [0] * 6 + [1] * 6
    assert data.classes == 2
    assert torch.equal(data.train.x[9], tv.pil_to_tensor(picture(103)).permute(1, 2, 0))
    assert gm.load_data(f"folder:{tmp_path}", None, image_size=16).test.x.shape == (8, 16, 16, 3)
    shutil.copytree(tmp_path / "test", tmp_path / "val")
    shutil.rmtree(tmp_path / "test" / "dog")  # no labels: val serves, also as the validation set
    (tmp_path / "test" / "unknown").mkdir()
    with pytest.warns(UserWarning, match="test is left out"):
        for out in (False, True):
            data = gm.load_data(f"folder:{tmp_path}", None, held_out=out)
            assert (len(data.train.y), len(data.test.y)) == (12, 8)
    shutil.rmtree(tmp_path / "test")
    assert len(gm.load_data(f"folder:{tmp_path}", None).test.y) == 8


def test_folders_as_people_have_them(tmp_path):
    make_folder(tmp_path)
    for hidden in (".ipynb_checkpoints/000.png", "dog/.ipynb_checkpoints/000.png", "dog/._000.png"):
        (tmp_path / "train" / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / "train" / hidden).write_bytes(b"not a picture")
    for other in ("1.jfif", "2.GIF", "3.avif"):
        (tmp_path / "train" / "cat" / other).touch()
    upright = picture(7, (8, 8))
    (tmp_path / "train" / "5.png").touch()
    (tmp_path / "train" / "dog").rename(tmp_path / "dog")
    (tmp_path / "train" / "dog").mkdir()
    (tmp_path / "train" / "dog" / "link").symlink_to(tmp_path / "dog")
    turns = {3: 180, 6: 90, 8: -90}
    for (orientation, turn), kind in itertools.product(turns.items(), ("000.png", "000.tif")):
        exif = tv_folder.Image.Exif()
        exif[0x0112] = orientation
        (tmp_path / "dog" / "000.png").unlink(missing_ok=True)
        (tmp_path / "dog" / "000.tif").unlink(missing_ok=True)
        upright.rotate(turn).save(tmp_path / "dog" / kind, exif=exif)
        with pytest.warns(UserWarning, match="4 files"):
            data = gm.load_data(f"folder:{tmp_path}", None)
        assert (data.classes, len(data.train.y)) == (2, 12)
        assert torch.equal(data.train.x[6], tv.pil_to_tensor(upright).permute(1, 2, 0))


# --- the paper's settings -------------------------------------------------------------------------------------


def test_settings_are_the_papers():
    at = gm.paper_setting
    assert at("resnet20", "cifar10", 0.0144)[3:] == (150, 128, 5, "sgd", 0.1, 1e-4, 0.01, (80, 120))
    assert at("resnet20", "cifar10", 0.6)[3:] == (150, 128, 8, "sgd", 0.05, 1e-8, 0.1, (80, 120))
    assert at("resnet20", "cifar10", 0.03).sparsity == 0.0373
    assert at("resnet20", "cifar10", 0.006).sparsity == 0.0059
    assert at("mobilenetv2", "cifar10", 0.0144).lam == 1.5e-5
    assert at("vgg16", "cifar10", 0.01).optimizer == "adam"
    assert at("resnet18", "tinyimagenet", 0.05)[3:8] == (200, 256, 5, "adam", 0.001)
    assert at("resnet50", "caltech101", 0.05)[3:] == (50, 16, 5, "adam", 0.01, 1e-6, 1e-4, (20, 40))
    assert at("resnet20", "folder:x", 0.0144).dataset == "cifar10"
    assert at("resnet32", "cifar100", 0.05).model == "resnet20"


def settings(flags):
    return gm.complete(gm.arguments(gm.parser(), shlex.split(flags)))


@pytest.mark.parametrize("flags, period", [
    ("", 5), ("--epochs 60", 2), ("--epochs 10", 1), ("--epochs 3000", 100), ("--epochs 3000 --period 150", 150),
])  # fmt: skip
def test_the_period_shrinks_with_the_epochs(flags, period):
    assert settings(flags).period == period


@pytest.mark.parametrize("flags, lam", [
    ("", 1e-4), ("--sparsity 0.0145", 1e-4), ("--epochs 150", 1e-4), ("--epochs 20 --lam 0.5", 0.5),
    ("--epochs 20", "auto"), ("--sparsity 0.03", "auto"), ("--batch-size 64", "auto"), ("--lam auto", "auto"),
    ("--dataset cifar100", "auto"), ("--model vgg16 --epochs 20", 1e-6), ("--epochs 20 --penalty l1", 1e-4),
])  # fmt: skip
def test_lambda_is_the_papers_in_its_own_runs_alone(flags, lam):
    assert settings(flags).lam == lam


# --- the command line -----------------------------------------------------------------------------------------

PHASES = ["mine", "finetune", "shuffle", "reinit", "mine inverted", "invert"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("pictures"), train=16, test=10)


def command(pictures, out, more=""):
    flags = "--epochs 2 --batch-size 16 --sparsity 0.3 --lr 1 --lam 0.03 --seed 1 --device cpu"
    return ["--dataset", f"folder:{pictures}", "--out", str(out), *flags.split(), *more.split()]


def artefacts(out):
    """What a run leaves, without what may depend on time or interruptions."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    result = json.loads((out / "result.json").read_text())
    for row in [*rows, result]:
        del row["seconds"]
    del result["command"]
    gem = torch.load(out / "gem.pt", weights_only=True)
    return {"rows": rows, "result": result, "gem": gem}


@pytest.fixture(scope="module")
def finished(pictures, tmp_path_factory):
    """One undisturbed run with all checks: its folder (out), what it leaves, and what it showed (shown, said)."""
    out, shown, said = tmp_path_factory.mktemp("finished") / "run", io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(said):
        assert gm.main(command(pictures, out, "--checks")) == 0
    return types.SimpleNamespace(out=out, shown=shown.getvalue(), said=said.getvalue(), **artefacts(out))


def test_a_run_leaves_its_figures(finished):
    files = "mine.pt finetune.pt shuffle.pt reinit.pt mine-inverted.pt invert.pt gem.pt log.jsonl result.json"
    assert {path.name for path in finished.out.iterdir()} == set(files.split())
    result, rows, kept = finished.result, finished.rows, round(0.3 * 267_824)
    assert [(row["phase"], row["epoch"]) for row in rows] == [(phase, j) for phase in PHASES for j in (1, 2)]
    assert result["total"] == sum(layer["total"] for layer in result["layers"]) == 267_824
    assert result["kept"] == result["kept_q"] == sum(layer["kept"] for layer in result["layers"]) == kept
    assert result["kept_m"] == rows[1]["m"] < kept
    assert result["pre_finetune_acc"] == rows[1]["test_acc"]
    acc = rows[3]["test_acc"]
    assert result["post_finetune_acc"] == acc
    for name, i in (("shuffle", 5), ("reinit", 7), ("invert", 11)):
        its = rows[i]["test_acc"]
        error = (acc * (100 - acc) / 20 + its * (100 - its) / 20) ** 0.5  # of 20 test images
        expected = {"post_finetune_acc": its, "kept": kept, "passed": acc - its > 3 * error}
        assert result["checks"][name] == expected
    assert {"model", "dataset", "method", "sparsity", "epochs", "seed", "device", "torch"} < set(result)
    assert {"python", "processor", "threads", "commit", "date"} < set(result)


def test_the_gem_loads_into_a_plain_module(finished, pictures):
    """Each network in gem.pt gives the accuracy that was reported, and holds what its name says."""
    gem, data = finished.gem, gm.load_data(f"folder:{pictures}", None)
    test = gm.Batches(data.test, gm.pixel_stats(data.train.x), 1000)
    model = models.build(gem["model"], **gem["build"])
    for part, acc in (("gem", "pre_finetune_acc"), ("finetuned", "post_finetune_acc")):
        model.load_state_dict(gem[part])
        assert gm.accuracy(model, test) == pytest.approx(finished.result[acc], abs=1e-4)
    model.load_state_dict(gem["initial"])
    assert same([gem["mean"], gem["std"]], [test.mean, test.std])
    assert sum(int(m.sum()) for m in gem["mask"].values()) == 80_347
    for name, m in gem["mask"].items():
        p, w = gem["scores"][name], gem["initial"][name]
        assert 0 <= p.min() <= p.max() <= 1
        assert len(w.unique()) == 2  # +c and -c, untouched
        assert torch.equal(gem["gem"][name], w * ((p >= 0.5) & gem["q"][name]))
        assert not gem["finetuned"][name][~m].any()
    assert not torch.equal(gem["gem"]["bn1.running_var"], gem["finetuned"]["bn1.running_var"])


def test_what_a_run_shows(finished):
    for part in ("d = 267,824; keep 80,347 weights (30%)", "freezing every 1", "weight reinitialisation", "##########",
                 "80,347 of 267,824 weights: 30.000%"):  # fmt: skip
        assert part in finished.shown
    first = re.compile("(phase|mine|finetune|shuffle|reinit|invert) ")
    table = [line for line in finished.shown.splitlines() if first.match(line)]
    assert len(table) == 13
    assert len({len(line) for line in table}) == 1  # its columns stand below each other
    assert finished.said.count("\n") == finished.said.count("warning: no weight is left")


def stop_after(monkeypatch, n):
    """Ctrl-C right after the n-th time that a phase's file is written."""
    real, written = gm.write, []

    def write(path, content):
        real(path, content)
        if path.suffix == ".pt" and path.name != "gem.pt":
            written.append(path)
            if len(written) == n:
                raise KeyboardInterrupt

    monkeypatch.setattr(gm, "write", write)


@pytest.mark.parametrize("stops", [(1, 2, 3), (2, 2, 5), (7, 4), (12,)])
def test_resumed_equals_uninterrupted(stops, finished, pictures, tmp_path, monkeypatch, capsys):
    """Interrupted in and between phases: after 1, 3 and 6 epochs, or 2, 4 and 9, or 7 and 11, or all 12."""
    argv, resume = command(pictures, tmp_path, "--checks"), []
    for n in stops:
        with monkeypatch.context() as patch:
            stop_after(patch, n)
            assert gm.main(argv + resume) == 130
        assert "--resume" in capsys.readouterr().err
        resume = ["--resume"]
    assert gm.main(argv + resume) == 0
    assert same(artefacts(tmp_path), artefacts(finished.out))


KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
import gem_miner

def write_bytes(path, content, real=Path.write_bytes):
    if path.name.startswith("reinit"):
        real(path, content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    real(path, content)

Path.write_bytes = write_bytes
gem_miner.main(sys.argv[1:])
"""


def test_killed_with_half_a_file_written_a_run_goes_on(finished, pictures, tmp_path):
    argv = command(pictures, tmp_path, "--checks")
    process = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, *argv], cwd=HERE, capture_output=True)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "reinit.pt").exists()
    assert gm.main([*argv, "--resume"]) == 0
    assert same(artefacts(tmp_path), artefacts(finished.out))


def test_checks_can_be_added_and_are_not_lost(finished, pictures, tmp_path):
    """And the same seed gives the same bits."""
    assert gm.main(command(pictures, tmp_path, "--checks shuffle")) == 0
    assert set(artefacts(tmp_path)["result"]["checks"]) == {"shuffle"}
    for more in ("--resume --checks", "--resume"):
        assert gm.main(command(pictures, tmp_path, more)) == 0
        assert same(artefacts(tmp_path), artefacts(finished.out))


def test_every_check_starts_from_the_same_state_as_the_gem(pictures, tmp_path, monkeypatch):
    """Also where weights are pretrained, which the model itself no longer holds when the inversion is mined."""
    built, seen, prepare = {}, {"mine": [], "finetune": []}, gm.prepare

    def pretrained(args):
        f, *data, _ = prepare(args)
        built.update({"w": f.vector(), **f.rest()})
        return f, *data, {"affine": True}  # as for Caltech-101

    def watched(f, *args, method, **kw):
        state = f.rest()
        if "init" in kw:
            state |= {"w": kw["init"](f), "invert": kw.get("invert", False)}
        seen[method.__name__].append(state)
        return method(f, *args, **kw)

    monkeypatch.setattr(gm, "prepare", pretrained)
    for method in (gm.mine, gm.finetune):
        monkeypatch.setattr(gm, method.__name__, partial(watched, method=method))
    assert gm.main(command(pictures, tmp_path, "--epochs 1 --checks")) == 0
    assert same(seen["mine"], [built | {"invert": False}, built | {"invert": True}])
    assert same(seen["finetune"], seen["finetune"][:1] * 4)


def test_testing_less_often_changes_nothing_else(finished, pictures, tmp_path):
    assert gm.main(command(pictures, tmp_path, "--eval-every 2")) == 0
    less = artefacts(tmp_path)
    assert [row["test_acc"] is None for row in less["rows"]] == [True, False, True, False]
    for row, often in zip(less["rows"], finished.rows):
        assert {**row, "test_acc": 0} == {**often, "test_acc": 0}
    assert less["result"]["post_finetune_acc"] == finished.result["post_finetune_acc"]
    assert same(less["gem"]["finetuned"], finished.gem["finetuned"])


def test_random_rounding_and_adam_resume_too(pictures, tmp_path, monkeypatch):
    more = "--rounding random --optimizer adam --lr 0.05 --finetune-mask m --finetune-epochs 1"
    assert gm.main(command(pictures, tmp_path / "a", more)) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        assert gm.main(command(pictures, tmp_path / "b", more)) == 130
    assert gm.main(command(pictures, tmp_path / "b", f"{more} --resume")) == 0
    assert same(artefacts(tmp_path / "a"), artefacts(tmp_path / "b"))


@pytest.mark.parametrize("flags", [
    "--sparsity 0.1", "--image-size 16", "--val", "--seed 2", "--period 2", "--batch-size 8", "--bf16",
    "--optimizer adam", "--lr 0.5", "--lam 0.1", "--lam auto", "--penalty l1", "--rounding random",
    "--finetune-mask m", "--finetune-epochs 1", "--finetune-lr 0.2", "--finetune-schedule cosine",
])  # fmt: skip
def test_every_flag_changes_the_mining_or_the_finetuning_alone(flags, finished, pictures, tmp_path):
    finetuning = flags.startswith("--finetune")
    flags = flags if finetuning else f"{flags} --finetune-epochs 0"
    assert gm.main(command(pictures, tmp_path, flags)) == 0
    gem = artefacts(tmp_path)["gem"]
    assert same(gem["scores"], finished.gem["scores"]) == finetuning
    assert not same(gem["finetuned"], finished.gem["finetuned"])
    if "mask" in flags:
        assert same(gem["mask"], {name: (p >= 0.5) & gem["q"][name] for name, p in gem["scores"].items()})


def test_the_transfer_task_starts_from_pretrained_weights(tmp_path, monkeypatch):
    """--model resnet50 --dataset caltech101: torchvision's weights, affine BatchNorm, a new last layer without bias."""
    theirs = torchvision.models.resnet50()
    kind = type(torchvision.models.ResNet50_Weights.IMAGENET1K_V1)
    monkeypatch.setattr(kind, "get_state_dict", lambda self, progress: theirs.state_dict())
    split = gm.Split(torch.randint(256, (4, 32, 32, 3), dtype=torch.uint8), torch.tensor([0, 1, 2, 100]))
    data = gm.Data(split, split, 101, pad=0, stats=([120.0] * 3, [60.0] * 3))
    monkeypatch.setitem(gm.LOADERS, "caltech101", lambda root: data)
    f, train, _, build = gm.prepare(settings("--model resnet50 --dataset caltech101 --device cpu"))
    assert build == {"num_classes": 101, "affine": True, "image_size": 32}
    assert (f.shapes[-1], f.model.fc.bias) == ((101, 2048), None)
    assert f.model.bn1.affine
    assert torch.equal(f.views(gm.given(f))["layer3.5.conv2.weight"], theirs.layer3[5].conv2.weight)
    assert train.mean.tolist() == [120.0] * 3


# --- bad input: exit code 2 and one line ----------------------------------------------------------------------


def refused(argv, capsys, *words, program=gm):
    capsys.readouterr()
    assert program.main([str(a) for a in argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"{program.__name__}.py: error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


@pytest.mark.parametrize("flags, words", [
    ("--sparsity 0", ["KEPT"]), ("--sparsity 1.44", ["0.0144"]), ("--sparsity 1.44%", ["0.0144"]),
    ("--sparsity 144", ["KEPT"]), ("--sparsity abc", ["--sparsity", "abc"]), ("--sparsity nan", ["KEPT"]),
    ("--sparsity 1e-9", ["1e-09", "weights"]), ("--spar 0.1", ["--spar"]), ("--nonsense", ["--nonsense"]),
    ("--epochs 0", ["--epochs", "from 1"]), ("--epochs 2.5", ["--epochs"]), ("--lr nan", ["--lr"]),
    ("--period 3", ["--period 3", "--epochs 2"]), ("--lam -1", ["--lam"]), ("--lam inf", ["--lam"]),
    ("--batch-size 1", ["--batch-size", "from 2"]), ("--seed -1", ["--seed"]), ("--image-size 5000", ["4096"]),
    ("--finetune-epochs -1", ["--finetune-epochs"]), ("--checks --finetune-epochs 0", ["--checks", "1 or more"]),
    ("--model resnet21", ["resnet21", "vgg16"]), ("--model vgg16", ["vgg16", "8 pixels", "--image-size"]),
    ("--dataset mnist", ["mnist", "cifar10", "folder:PATH"]), ("--dataset folder:/nowhere", ["/nowhere", "'train'"]),
    ("--dataset shapes --image-size 16", ["--image-size"]), ("--optimizer rms", ["rms"]), ("--device tpu", ["tpu"]),
    ("--device mps", ["mps", "--device cpu"]), ("--resume", ["nothing to resume"]),
])  # fmt: skip
def test_bad_flags(flags, words, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    refused(command(pictures, tmp_path / "run", flags), capsys, *words)
    assert not (tmp_path / "run").exists()


def test_bad_folders(tmp_path, capsys):
    argv = command(tmp_path, tmp_path / "run")
    make_folder(tmp_path, train=2, test=1)
    bad = tmp_path / "train" / "dog" / "001.png"
    content = bad.read_bytes()
    picture(0, (8, 9)).save(bad)
    refused(argv, capsys, "001.png", "9x8", "8x8", "--image-size")
    bad.write_bytes(content[:60])
    refused(argv, capsys, "cannot read", "001.png", "remove it")
    bad.write_bytes(content)
    refused([*argv, "--val"], capsys, "4 training images are too few")
    for mode in ("I", "I;16", "F"):  # PIL makes such pictures white
        tv_folder.Image.new(mode, (8, 8)).save(tmp_path / "train" / "dog" / "001.tif")
        refused(argv, capsys, "001.tif", "8-bit RGB")
        (tmp_path / "train" / "dog" / "001.tif").unlink()
    bits = [b"IHDR" + struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0), b"IDAT" + zlib.compress(bytes(8 * 49)), b"IEND"]
    png = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in bits]
    bad.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(png))  # 16 bits a channel, which PIL calls RGB
    refused(argv, capsys, "001.png", "8-bit RGB")
    bad.write_bytes(content)
    (tmp_path / "train" / "cow").mkdir()
    refused(argv, capsys, "cow")
    picture(0).save(tmp_path / "train" / "cow" / "000.png")
    refused(argv, capsys, "same class folders", "'cow'")
    make_folder(tmp_path / "one", classes=["cat"])
    refused(command(tmp_path / "one", tmp_path / "run"), capsys, "two classes or more")


def test_bad_run_folders(finished, pictures, tmp_path, capsys):
    shutil.copytree(finished.out, tmp_path / "run")
    argv = command(pictures, tmp_path / "run")
    refused(argv, capsys, "already holds a run", "--resume")
    refused([*argv, "--resume", "--sparsity", "0.05"], capsys, "--sparsity is 0.3", "not 0.05")
    refused([*argv, "--resume", "--model", "resnet32"], capsys, "--model is resnet20", "not resnet32")
    (tmp_path / "file").write_text("")
    refused(command(pictures, tmp_path / "file"), capsys, "cannot write")
    refused(command(pictures, tmp_path / "file" / "below"), capsys, "cannot write")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "log.jsonl").write_text("of another program")
    refused(command(pictures, tmp_path / "other"), capsys, "already holds")
    assert (tmp_path / "other" / "log.jsonl").read_text() == "of another program"
    (tmp_path / "run" / "checkpoint.pt").touch()

def test_a_run_on_other_images_is_not_continued(pictures, tmp_path, capsys):
    shutil.copytree(pictures, tmp_path / "pictures")
    argv = command(tmp_path / "pictures", tmp_path / "run", "--finetune-epochs 0")
    assert gm.main(argv) == 0
    picture(77).save(tmp_path / "pictures" / "train" / "cat" / "000.png")
    refused([*argv, "--resume"], capsys, "mine.pt", "set of images")


class Evil:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def saved(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def test_damaged_files_of_a_run_are_named_and_never_executed(finished, pictures, tmp_path, capsys):
    shutil.copytree(finished.out, tmp_path / "run")
    path, evil = tmp_path / "run" / "finetune.pt", tmp_path / "evil"
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    damages = [b"", content[:1000], flipped, pickle.dumps(Evil(evil)), saved({"settings": Evil(evil)}), saved([1, 2])]
    argv = command(pictures, tmp_path / "run", "--resume")
    for damaged in damages:
        path.write_bytes(damaged)
        refused(argv, capsys, "finetune.pt is damaged")
        assert not evil.exists()
    path.write_bytes(saved({"other": "content"}))
    refused(argv, capsys, "finetune.pt")
    path.write_bytes(content)
    assert gm.main(argv) == 0
    assert same(artefacts(tmp_path / "run"), artefacts(finished.out))


@pytest.mark.parametrize("name, file", [
    ("cifar10", "cifar-10-python.tar.gz"), ("cifar100", "cifar-100-python.tar.gz"),
    ("tinyimagenet", "tiny-imagenet-200.zip"), ("caltech101", "101_ObjectCategories"),
])  # fmt: skip
def test_a_failed_download_says_what_to_do(name, file, tmp_path, capsys, monkeypatch):
    no_network(monkeypatch)
    argv = ["--dataset", name, "--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    refused(argv, capsys, file, "by hand", "--dataset shapes")


@pytest.mark.parametrize("error, word", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "a smaller --batch-size"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "out of memory"),
    (MemoryError(), "out of memory"),
    (FloatingPointError("the loss is not finite in epoch 7"), "epoch 7"),
    (torch._dynamo.exc.TorchDynamoException("no C++ compiler\nA long story."), "--compile does not work here"),
])  # fmt: skip
def test_what_stops_a_step_is_one_line(error, word, pictures, tmp_path, monkeypatch, capsys):
    def mine(*args, **kw):
        raise error

    monkeypatch.setattr(gm, "mine", mine)
    refused(command(pictures, tmp_path), capsys, word)


def test_a_full_disk_leaves_the_old_file(tmp_path):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    gm.write(tmp_path / "a", "first")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(gm.InputError, match="cannot write .*/a .*--resume"):
            gm.write(tmp_path / "a", "second" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "a").read_text() == "first"
    assert len(list(tmp_path.iterdir())) == 1


class Draws:
    """Data that draws a random number in each epoch."""

    def __init__(self):
        self.seen = []

    def __iter__(self):
        self.seen.append(torch.rand(1).item())
        return iter(tiny_batches(1))


# --- baselines.py: pruning at initialisation ----------------------------------------------------------------------


@torch.no_grad()
def central_differences(function, c, h=1e-5):
    steps = h * torch.eye(len(c), dtype=c.dtype)
    return torch.stack([(function(c + e) - function(c - e)) / (2 * h) for e in steps])


def test_snip_is_the_change_of_the_loss_with_c():
    x, y = tiny_batches(1)[0]
    f = gm.Network(tiny()).eval()
    w = f.vector()
    slopes = central_differences(lambda c: F.cross_entropy(f(c * w, x), y), torch.ones_like(w))
    assert torch.allclose(bl.snip(f, w, lambda: iter([(x, y)])), slopes.abs(), atol=1e-8)


@pytest.mark.parametrize("k", [1, 5, 100])
def test_grasp_is_w_times_the_hessian_times_the_gradient(k):
    """Of the first k images of each class, or as many as there are, in batches of at most 8; at temperature 200.

    Its authors remove the largest of the negative of this: so the largest of this are kept, as in every method.
    """
    batches = tiny_batches(3)
    x, y = (torch.cat(parts) for parts in zip(*batches))
    picked = [i for i in range(24) if (y[:i] == y[i]).sum() < k]
    parts = torch.tensor(picked).chunk(math.ceil(len(picked) / 8))
    f = gm.Network(tiny()).train()
    w = f.vector()

    def loss(v):
        return sum(F.cross_entropy(f(v, x[part]) / 200, y[part], reduction="sum") for part in parts)

    gradient = torch.autograd.functional.jacobian(loss, w)
    hessian = torch.autograd.functional.hessian(loss, w)
    p = bl.grasp(gm.Network(tiny()), w, lambda: iter(batches), per_class=k)
    assert torch.allclose(p, w * (hessian @ gradient), rtol=1e-6, atol=1e-12)


def sequential(width=6):
    layers = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(width, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(64, 5, bias=False))


def test_synflow_conserves_the_sum_of_scores():
    """In a sequential network, every layer's scores sum to R, which is computed by hand; also of a masked network."""
    torch.manual_seed(0)
    f = gm.Network(sequential().double())
    w = gm.kaiming_normal(f) * (torch.rand(f.d) < 0.5)
    p = bl.synflow(f, w, lambda: iter([(torch.randn(2, 3, 8, 8), None)]))
    x, bn = torch.ones(1, 3, 8, 8).double(), (1 + 1e-5) ** -0.5
    first, second, last = f.views(w.abs()).values()
    x = F.max_pool2d(F.conv2d(x, first, padding=1) * bn, 2)
    x = F.conv2d(x, second, padding=1) * bn
    R = (x.flatten(1) @ last.T).sum()
    for part in p.split(f.sizes):
        assert torch.isclose(part.sum(), R, rtol=1e-9)


def test_synflow_takes_biases_as_absolute_values():
    f, scores = gm.Network(tiny()), []
    for bias in ([1.0, 2.0], [-1.0, -2.0]):
        f.restore({"conv.bias": torch.tensor(bias)})
        scores.append(bl.synflow(f, f.vector(), lambda: iter(tiny_batches())))
    assert torch.equal(*scores)
    assert scores[0].min() > 0


def test_synflow_prunes_in_100_exponential_steps_in_float64(monkeypatch):
    left = []

    def score(f, v, batches):
        assert v.dtype == torch.float64
        left.append(int(v.count_nonzero()))
        return v.abs()

    monkeypatch.setitem(bl.SCORES, "synflow", bl.SCORES["synflow"]._replace(score=score))
    gem = bl.at_init(models.resnet20(), tiny_batches(), score="synflow", sparsity=0.0144)
    assert gem.p.dtype == torch.float32
    expected = [268_336 * 0.0144 ** (k / 100) for k in range(101)]
    assert [*left, int(gem.m.sum())] == pytest.approx(expected, abs=1)


def test_synflow_does_not_overflow_on_mobilenet(monkeypatch):
    monkeypatch.setitem(bl.SCORES, "synflow", bl.SCORES["synflow"]._replace(rounds=2))
    data = (torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
    gem = bl.at_init(models.mobilenetv2(), data, score="synflow", sparsity=0.05)
    assert gem.m.sum() == 113_092


def test_prospr_without_steps_is_snip():
    """On a network without BatchNorm, whose statistics the two take from different places."""
    f = gm.Network(nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 3)).double())
    batches = tiny_batches(1)
    p = bl.prospr(f, f.vector(), lambda: iter(batches), K=0)
    assert torch.allclose(p, bl.snip(f, f.vector(), lambda: iter(batches)))


def test_prospr_is_scored_in_float64():
    """In float32 on a CPU, a third of its mask would be noise."""
    data, model = (torch.randn(16, 3, 8, 8), torch.arange(16) % 4), models.resnet20()
    kw = {"score": "prospr", "sparsity": 0.05, "init": gm.given}
    ours, exact = (bl.at_init(net, data, **kw) for net in (model, copy.deepcopy(model).double()))
    assert torch.allclose(ours.p.double(), exact.p, rtol=1e-6, atol=0)
    assert torch.equal(ours.m.double(), exact.m)


@pytest.mark.parametrize("affine", [True, False])
def test_prospr_differentiates_through_three_steps(affine):
    """Biases and affine BatchNorm take the steps too, unless they are not to be trained."""
    x, y = tiny_batches(1)[0]
    model = tiny()
    model.bn.requires_grad_(affine)
    f = gm.Network(model)
    w = f.vector()

    def loss_after_steps(c):
        stepped = tiny()
        gm.Network(stepped).load(c * w)
        stepped.train()
        parameters = [p for name, p in stepped.named_parameters() if affine or "bn" not in name]
        for _ in range(3):
            with torch.enable_grad():
                grads = torch.autograd.grad(F.cross_entropy(stepped(x), y), parameters)
            for parameter, grad in zip(parameters, grads):
                parameter -= 0.1 * grad
        return F.cross_entropy(stepped(x), y)

    slopes = central_differences(loss_after_steps, torch.ones_like(w))
    assert torch.allclose(bl.prospr(f, w, lambda: iter([(x, y)])), slopes.abs(), atol=1e-8)


@pytest.mark.parametrize("method, counts", [
    ("snip", [3864, 1583, 13417]), ("grasp", [3866, 1585, 13418]), ("synflow", [3865, 1584, 13417]),
    ("prospr", [3865, 1584, 13417]), ("random", [3864, 1583, 13417]), ("magnitude", [3864, 1583, 13417]),
    ("dense", [268_336] * 3),
])  # fmt: skip
def test_scored_methods_keep_what_their_authors_rule_says(method, counts, monkeypatch):
    monkeypatch.setitem(bl.SCORES, method, bl.SCORES[method]._replace(score=bl.random, rounds=3))
    f = gm.Network(models.resnet20())
    kept = [bl.at_init(f, tiny_batches(), score=method, sparsity=s).m.sum() for s in (0.0144, 0.0059, 0.05)]
    assert kept == counts


@pytest.mark.parametrize("method", bl.SCORES)
def test_scores_decide_and_leave_no_trace(method, monkeypatch):
    """Kept are the largest, inverted the smallest; the model holds w * m; BatchNorm and biases are as they were."""
    monkeypatch.setitem(bl.SCORES, method, bl.SCORES[method]._replace(rounds=1))
    f, batches = gm.Network(tiny()), tiny_batches()
    before = f.rest()
    gem = bl.at_init(f, batches, score=method, sparsity=0.4)
    assert torch.equal(f.vector(), gem.w * gem.m)
    assert same(f.rest(), before)
    if method == "magnitude":
        assert torch.equal(gem.p, gem.w.abs())
    if method != "dense":
        low = bl.at_init(f, batches, score=method, sparsity=0.4, invert=True)
        assert gem.p[gem.m == 1].min() >= gem.p[gem.m == 0].max()
        assert low.m.sum() == gem.m.sum()
        assert not (low.m * gem.m).any()


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(FloatingPointError, match="snip's scores are not finite"):
        bl.at_init(tiny(), [(x * math.nan, y) for x, y in tiny_batches()], score="snip", sparsity=0.5)


# --- baselines.py: what all methods share ------------------------------------------------------------------------

SEARCHES = {
    "imp": partial(bl.imp, sparsity=0.5, epochs=3, rewind=1),
    "lrr": partial(bl.imp, sparsity=0.5, epochs=3, rewind=None),
    "ep": partial(bl.edge_popup, sparsity=0.5, epochs=2),
    "sr": partial(bl.smart_ratio_ticket, sparsity=0.5),
    **{name: partial(bl.at_init, score=name, sparsity=0.5) for name in bl.SCORES},
}


@pytest.mark.parametrize("name", SEARCHES)
def test_the_seed_and_nothing_else_fixes_every_method(name):
    x, y = torch.randn(40, 1, 4, 4).double(), torch.arange(40) % 3
    first = SEARCHES[name](tiny(), (x, y), seed=3)
    torch.manual_seed(5)
    again = SEARCHES[name](tiny(), (x, y), seed=3)
    other = SEARCHES[name](tiny(), (x, y), seed=4)
    assert same(first._asdict(), again._asdict())
    assert not torch.equal(first.w, other.w)
    assert torch.equal(first.m, other.m) == (name == "dense")


@pytest.mark.parametrize("search, word", [
    (partial(bl.imp, sparsity=0.5, epochs=2), "3 rounds need 3 epochs or more, not 2"),
    (partial(bl.imp, sparsity=0.95, epochs=2), "to 0.89, not 0.95"),
    (partial(bl.imp, sparsity=0.5, epochs=9, rewind=13), "no step 13: 3 epochs have 12"),
    (partial(bl.at_init, sparsity=0.5, score="sinp"), "the scores are snip, grasp, .*, not 'sinp'"),
    (partial(bl.at_init, sparsity=10, score="snip"), "not 10"),
    (partial(bl.edge_popup, sparsity=0, epochs=2), "not 0"),
    (partial(bl.smart_ratio_ticket, sparsity=0.1), "30% of the last layer: take a sparsity above 0.17, not 0.1"),
])  # fmt: skip
def test_what_a_method_cannot_do_is_refused(search, word):
    with pytest.raises(gm.InputError, match=word):
        search(tiny(), tiny_batches())


# --- baselines.py: edge-popup ------------------------------------------------------------------------------------


def top(p, n, descending=True):
    """1 for the n largest |p|."""
    return torch.zeros_like(p).scatter(0, p.abs().argsort(descending=descending)[:n], 1)


@pytest.mark.parametrize("variant", [
    {}, {"whole": True}, {"period": 1}, {"period": 1, "regularize": True}, {"invert": True},
])  # fmt: skip
def test_edge_popup_is_sgd_on_scores(variant):
    """On those of a plain module: |p|, the top of each layer, momentum 0.9, weight decay 5e-4, cosine.

    The gradient of a score is that of the effective weight times w times p's sign. regularize: with lambda = 1e-4, so
    2e-4 more weight decay. period: with E = 4 and T = 1, three steps of 0.4^(1/3), the first in two epochs.
    """
    batches, E, lr, s = tiny_batches(), 4, 2.0, 0.4
    f = gm.Network(tiny())
    w = bl.draw(f, gm.signed_constant, 0)
    gm.reseed(0, "scores")
    bound = torch.tensor([1 / 3] * 18 + [8**-0.5] * 24, dtype=torch.float64)
    p = (2 * torch.rand(42, dtype=torch.float64) - 1) * bound
    velocity = torch.zeros_like(p)
    decay = 7e-4 if "regularize" in variant else 5e-4
    model = tiny()

    def mask(p, j):
        if "period" in variant:
            return top(p, 42 - math.ceil(42 * (1 - s ** (max(1, j - 1) / 3))))
        if "whole" in variant:
            return top(p, 42 - math.ceil(42 * 0.6))
        largest = "invert" not in variant
        return torch.cat([top(p[:18], 18 - int(18 * 0.6), largest), top(p[18:], 24 - int(24 * 0.6), largest)])

    for j in range(1, E + 1):
        for x, y in batches:
            gm.Network(model).load(w * mask(p, j))
            model.train()
            grads = torch.autograd.grad(F.cross_entropy(model(x), y), [model.conv.weight, model.fc.weight])
            slope = f.vector(dict(zip(f.names, grads))) * w * p.sign()
            velocity = 0.9 * velocity + slope + decay * p
            p = p - lr * (1 + math.cos(math.pi * (j - 1) / E)) / 2 * velocity
    gem = bl.edge_popup(f, batches, sparsity=s, epochs=E, lr=lr, **variant)
    assert torch.equal(gem.w, w)
    assert torch.allclose(gem.p, p.abs(), atol=1e-10)
    assert torch.equal(gem.m, mask(p, E))


def test_edge_popup_keeps_the_authors_counts_of_each_layer():
    f, data = gm.Network(models.resnet20()), (torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))
    gem = bl.edge_popup(f, data, sparsity=0.005, epochs=1)
    assert list(f.counts(gem.m).values()) == [3, *[12] * 6, 24, *[47] * 5, 93, *[185] * 5, 4]
    gem = bl.edge_popup(f, data, sparsity=0.0144, epochs=1)
    assert list(f.counts(gem.m).values()) == [7, *[34] * 6, 67, *[133] * 5, 266, *[531] * 5, 10]


def test_gradual_pruning_keeps_the_authors_counts_of_each_epoch():
    """Which never grow, and never fall below the target."""
    counts = [bl.popup_count(268_336, 0.0059, j, 150, 5) for j in range(1, 151)]
    assert counts[:11] + counts[11:16] == [224_808] * 11 + [188_340] * 5
    assert [counts[j] for j in (16, 21, 136, 141, 146, 149)] == [157_789, 132_193, 2255, 1889, 1583, 1583]
    for E, T in ((1, 1), (2, 1), (7, 3), (10, 1), (150, 8)):
        counts = [bl.popup_count(268_336, 0.0059, j, E, T) for j in range(1, E + 1)]
        assert counts == sorted(counts, reverse=True)
        assert counts[-1] >= 1583
    assert bl.popup_count(100, 0.001, 10, 10, 1) == 1


# --- baselines.py: IMP and learning-rate rewinding ---------------------------------------------------------------


def grey_levels(n):
    """A Batches of n images of 4x4, that of label i all of grey level i."""
    y = torch.arange(n)
    x = y[:, None, None, None].expand(n, 4, 4, 3).to(torch.uint8)
    return gm.Batches(gm.Split(x, y), ([0.0] * 3, [1.0] * 3), 8, train=True, pad=2)


def test_imp_keeps_the_authors_counts():
    """In 29 rounds, each of which removes a fifth, rounded up, and one more; and in as many rounds."""
    kept = []

    def phase(name, method, f, w, m, *args, **kw):
        kept.append(int(m.sum()))
        return w * m

    gem = bl.imp(models.resnet20(), tiny_batches(), sparsity=0.8**29, epochs=29, phase=phase)
    assert [*kept, int(gem.m.sum())] == [
        268336, 214667, 171732, 137384, 109906, 87923, 70337, 56268, 45013, 36009, 28806, 23043, 18433, 14745, 11795,
        9435, 7547, 6036, 4827, 3860, 3087, 2468, 1973, 1577, 1260, 1007, 804, 642, 512, 408,
    ]  # fmt: skip
    rounds = [bl.imp_rounds(s) for s in (0.5, 0.1374, 0.0373, 0.0144, 0.0059, 0.8, 0.89)]
    assert rounds == [3, 9, 15, 19, 23, 1, 1]


def masked_sgd(model, w, m, batches, E, steps=math.inf):
    """w after E epochs, or so many steps, of SGD on `model` (momentum 0.9, weight decay 1e-4, multistep from 0.1)."""
    f, done = gm.Network(model), 0
    f.load(w * m)
    model.train()
    masks, parameters = f.views(m), dict(model.named_parameters())
    velocity = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for j in range(1, E + 1):
        for x, y in batches:
            if done == steps:
                break
            done += 1
            grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(parameters.values()))
            with torch.no_grad():
                for (name, p), grad in zip(parameters.items(), grads):
                    velocity[name] = 0.9 * velocity[name] + masks.get(name, 1) * grad + 1e-4 * p
                    p -= gm.multistep(0.1, j, E) * velocity[name]
    return f.vector()


@pytest.mark.parametrize("rounds, rewind", [(3, 0), (3, 6), (3, None), (1, 6)])
def test_imp_and_lrr_are_train_prune_rewind(rounds, rewind):
    """Cold, warm after 6 of the first round's 12 steps, and never rewound."""
    batches, E = tiny_batches(), 3
    f = gm.Network(tiny())
    gem = bl.imp(f, batches, sparsity=0.8**rounds, epochs=rounds * E, rewind=rewind)
    w = bl.draw(gm.Network(tiny()), gm.kaiming_normal, 0)
    m, model, start_model, counts = torch.ones_like(w), tiny(), tiny(), []
    start = masked_sgd(start_model, w, m, batches, E, steps=rewind or 0)
    for _ in range(rounds):
        trained = masked_sgd(model, w, m, batches, E)
        alive = m.nonzero().flatten()
        m[alive[trained[alive].abs().argsort()[: math.ceil(len(alive) / 5) + 1]]] = 0
        counts.append(int(m.sum()))
        if rewind is None:
            w = trained  # and BatchNorm and the bias go on, too
        else:
            w, model = start, copy.deepcopy(start_model)
    assert counts == [32, 24, 18][:rounds]
    assert torch.equal(gem.m, m)
    assert torch.allclose(gem.p, trained.abs(), atol=1e-10)
    assert torch.allclose(gem.w * m, w * m, atol=1e-10)
    assert torch.allclose(f.model.conv.bias, model.conv.bias, atol=1e-10)
    assert torch.allclose(f.model.bn.running_var, model.bn.running_var, atol=1e-10)


def test_every_round_of_imp_has_its_own_randomness():
    """But the steps to the rewinding point are those that the first round takes."""
    data = Draws()
    bl.imp(tiny(), data, sparsity=0.5, epochs=6, rewind=1)
    assert data.seen[0] == data.seen[1]
    assert len(data.seen) == 7
    assert len(set(data.seen)) == 6


def test_imp_says_before_any_epoch_when_it_cannot_rewind_that_far():
    with pytest.raises(gm.InputError, match="no step 13 to rewind to: a round has 12"):
        bl.imp(models.resnet20(), grey_levels(32), sparsity=0.5, epochs=9, rewind=13, phase=None)


# --- baselines.py: smart ratio -----------------------------------------------------------------------------------


def test_smart_ratio_is_the_hand_computed_one():
    """For ResNet-20 as the authors' own file lists it; for VGG-16 the first layer carries over what exceeds it."""
    f = gm.Network(models.resnet20())
    p = bl.smart_ratio(f.sizes, 0.0144)
    assert [p[0], p[18], p[19]] == pytest.approx([0.10079916, 0.00143999, 0.3], abs=1e-8)
    kept = [43, 210, 189, 169, 150, 132, 116, 201, 345, 291, 243, 199, 159, 247, 371, 265, 176, 106, 53, 192]
    gem = bl.smart_ratio_ticket(f, tiny_batches(), sparsity=0.0144)
    assert list(f.counts(gem.m).values()) == kept
    assert bl.smart_ratio_ticket(f, tiny_batches(), sparsity=0.5).m.sum() == 134_160  # as both originals keep
    with torch.device("meta"):
        sizes = gm.Network(models.vgg16()).sizes
    p = bl.smart_ratio(sizes, 0.005, vgg=True)
    assert [p[0], p[1], p[12]] == pytest.approx([1, 0.29080379, 0.00021662], abs=1e-8)
    kept = [1728, 10720, 7797, 7422, 7917, 8997, 5288, 6297, 7464, 4318, 2379, 1199, 511, 1536]
    assert [int(n * x + 1e-6) for n, x in zip(sizes, p)] == kept


def test_the_grid_around_imp_holds_what_the_authors_found_best():
    f = gm.Network(models.resnet20())
    kept = [194, 244, 227, 201, 179, 182, 166, 285, 300, 308, 221, 186, 158, 217, 171, 124, 128, 116, 81, 172]
    best = [54.907, 11.590, 10.852, 8.724, 7.769, 7.899, 6.205, 5.185, 3.255, 3.342, 2.398, 2.018, 1.714, 1.177, 0.5639,
            0.3364, 0.3472, 0.3147, 0.1197, 16.875]  # fmt: skip
    grid = bl.ratio_grid([k / n for k, n in zip(kept, f.sizes)])
    assert len(grid) == 144
    assert len(set(map(tuple, grid))) == 144
    assert sum(100 * torch.tensor(p) == pytest.approx(best, abs=1e-3) for p in grid) == 1
    for L in (2, 3, 14, 58):  # networks of other depths
        other = torch.tensor(bl.ratio_grid([0.0, *[0.5] * (L - 2), 1.0]))
        assert other.shape == (144, L)
        assert 0 <= other.min() <= other.max() <= 1


def test_equation_1_moves_densities_downhill():
    """The mean loss over masks of signed constants falls, and nothing else changes."""
    torch.manual_seed(0)
    x = torch.randn(400, 6)
    y = (x @ torch.tensor([1.0, -1, 1, 1, -1, 1]) > 0).long()
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 2, bias=False), nn.BatchNorm1d(2))
    f, start = gm.Network(model), [0.3, 0.6]
    before, w = f.rest(), bl.draw(f, gm.signed_constant, 0)

    def watch(row, v, state):
        assert torch.equal(v.abs(), w.abs() * (v != 0))  # kept whole or not at all
        assert row["lr"] == 0.02

    tuned = bl.tune_densities(f, [(x, y)] * 20, start, epochs=5, lr=0.02, on_epoch=watch)
    assert same(f.rest(), before)

    def expected_loss(p, n=400):
        torch.manual_seed(1)
        masks = torch.rand(n, f.d) < torch.tensor(p).repeat_interleave(torch.tensor(f.sizes))
        f.train()
        return sum(F.cross_entropy(f(w * m, x), y).item() for m in masks) / n

    assert expected_loss(tuned) < expected_loss(start) - 0.01
    boxed = bl.tune_densities(f, [(x, y)] * 2, start, epochs=1, lr=1e6)
    assert set(boxed) <= {0.0, 1.0}


def test_sr_v4_takes_the_trial_that_is_best_on_images_it_was_not_trained_on(monkeypatch):
    """They are a tenth of the training images, neither cropped nor flipped."""
    f = gm.Network(nn.Sequential(*[nn.Linear(20, 20) for _ in range(20)], nn.BatchNorm1d(20)))
    w, fresh = bl.draw(f, gm.kaiming_normal, 0), f.rest()
    masks, trained, accs = [], [], iter([10.0, 30.0, 20.0])

    def phase(name, method, f, w, m, data, **kw):
        assert name == f"trial {len(masks)}"
        assert [kw["epochs"], data.train, data.pad] == [2, True, 2]
        assert same(f.rest(), fresh)
        f.model[20].running_mean += 1
        masks.append(m)
        trained.append(set(data.y.tolist()))
        return w * m

    def accuracy(f, data, v):
        [(x, y)] = data
        assert torch.equal(v, w * masks[-1])
        assert len(y) == 4
        assert set(y.tolist()) == set(range(40)) - trained[-1]
        assert torch.equal(x, y[:, None, None, None].float().expand(4, 3, 4, 4))
        return next(accs)

    monkeypatch.setattr(gm, "accuracy", accuracy)
    gem = bl.smart_ratio_search(f, grey_levels(40), densities=[0.5] * 20, trials=3, epochs=6, phase=phase)
    assert len(masks) == 3
    assert not torch.equal(masks[0], masks[1])
    assert torch.equal(gem.m, masks[1])
    assert torch.equal(gem.w, w)
    assert same(f.rest(), fresh)


# --- baselines.py: its command line ------------------------------------------------------------------------------


def baseline(pictures, out, flags):
    method, *more = flags.split()
    settings = f"--dataset folder:{pictures} --epochs 1 --batch-size 8 --sparsity 0.4 --device cpu".split()
    return [method, *settings, "--out", str(out), *more]


RUNS = {  # flags, epochs of the search, weights kept (d = 267,824; IMP takes 4 rounds), learning rates of finetuning
    "dense": ("dense", 0, 267_824, [0.1]),
    "imp": ("imp --rewind 5 --round-epochs 2", 8, 109_697, [0.1]),
    "lrr": ("lrr --round-epochs 1 --finetune-epochs 2", 4, 109_697, [0.1, 0.01]),
    "ep": ("ep --gradual --epochs 3 --finetune-epochs 2", 3, 107_129, [0.1, 0.05]),
    "global": ("ep --global", 1, 107_129, [0.1]),
    "snip": ("snip --checks", 1, 107_130, [0.1]),
    "sr4": ("sr --version 4 --trials 2 --round-epochs 2 --from {home}/imp", 4, None, [0.1]),
    "sr5": ("sr --version 5 --epochs 2 --finetune-epochs 1 --lr 0.01 --from {home}/ep", 2, None, [0.1]),
}


@pytest.fixture(scope="module")
def done(pictures, tmp_path_factory):
    """The folder of the finished RUNS."""
    home = tmp_path_factory.mktemp("baselines")
    for name, (flags, *_) in RUNS.items():
        assert bl.main(baseline(pictures, home / name, flags.format(home=home))) == 0
    return home


@pytest.mark.parametrize("name", RUNS)
def test_every_method_runs_as_gem_miner_does(name, done):
    flags, search_epochs, kept, lrs = RUNS[name]
    run = artefacts(done / name)
    result, gem = run["result"], run["gem"]
    tuning = [row for row in run["rows"] if row["phase"] == "finetune"]
    assert result["method"] == flags.split()[0]
    assert result["search_epochs"] == search_epochs
    assert result["kept"] == (kept or result["kept_q"])
    assert [row["lr"] for row in tuning] == pytest.approx(lrs)
    assert result["post_finetune_acc"] == tuning[-1]["test_acc"]
    assert set(result.get("checks", ())) == (set(gm.CHECKS) if name == "snip" else set())
    for part, mask in gem["mask"].items():
        assert not gem["finetuned"][part][~mask].any()
        assert torch.equal(gem["gem"][part], gem["initial"][part] * mask)
    assert (gem["initial"]["conv1.weight"].abs().unique().numel() == 1) == flags.startswith("ep")  # signed constants
    if name == "ep":
        counts = [row["q"] for row in run["rows"] if row["phase"] == "mine"]
        assert counts == [bl.popup_count(267_824, 0.4, j, 3, 1) for j in (1, 2, 3)]


def test_each_version_of_smart_ratio_starts_from_the_right_densities(done, pictures, tmp_path):
    f = gm.Network(models.resnet20(2))
    v1 = bl.smart_ratio(f.sizes, 0.4)
    kept = {name: [layer["kept"] for layer in artefacts(done / name)["result"]["layers"]] for name in RUNS}
    gem, imp = ([k / n for k, n in zip(kept[name], f.sizes)] for name in ("ep", "imp"))
    like_gem = [gem[0], *v1[1:-1], gem[-1]]
    expected = {1: v1, 2: like_gem, 3: [1, *v1[1:-1], 1], 4: imp, 5: like_gem, 6: imp}
    for version, p in expected.items():
        source = done / ("imp" if version in (4, 6) else "ep")
        flags = f"sr --version {version} --from {source}"
        assert bl.densities(bl.complete(baseline(pictures, tmp_path, flags)), f) == p
    untuned, *grid = [[int(n * x + 1e-6) for n, x in zip(f.sizes, p)] for p in [like_gem, *bl.ratio_grid(imp)]]
    assert kept["sr4"] in grid
    assert kept["sr5"] != untuned
    vgg = bl.complete(baseline(pictures, tmp_path, "sr --model vgg16"))
    with torch.device("meta"):
        f = gm.Network(models.vgg16())
    assert bl.densities(vgg, f) == bl.smart_ratio(f.sizes, 0.4, vgg=True)


@pytest.mark.parametrize("name, stops", [("imp", (1, 4)), ("ep", (1, 2)), ("sr4", (2,)), ("sr5", (1,))])
def test_every_method_resumes_to_the_same_bits(name, stops, done, pictures, tmp_path, monkeypatch):
    """Interrupted in and between phases: for imp before the rewinding point and in the second round."""
    argv, resume = baseline(pictures, tmp_path, RUNS[name][0].format(home=done)), []
    for n in stops:
        with monkeypatch.context() as patch:
            stop_after(patch, n)
            assert bl.main(argv + resume) == 130
        resume = ["--resume"]
    assert bl.main(argv + resume) == 0
    assert same(artefacts(tmp_path), artefacts(done / name))


def test_the_test_set_chooses_nothing(done, pictures, tmp_path):
    """Of SR-v4's trials, either: the same training images with other test images give the same mask."""
    other = make_folder(tmp_path, train=16, test=10)
    for i, path in enumerate(sorted((other / "test").glob("*/*.png"))):
        picture(1000 + 7 * i).save(path)
    assert bl.main(baseline(other, tmp_path / "run", RUNS["sr4"][0].format(home=done))) == 0
    assert same(artefacts(tmp_path / "run")["gem"]["mask"], artefacts(done / "sr4")["gem"]["mask"])


@pytest.mark.parametrize("flags, words", [
    ("imp --rewind -1", ["--rewind", "from 0"]), ("imp --rewind 9 --round-epochs 2", ["step 9", "has 8"]),
    ("dense --checks", ["--checks"]), ("lrr --checks", ["--checks"]), ("sr --version 7", ["--version"]),
    ("sr --sparsity 1e-4", ["30%", "above 0.00014"]), ("sr --version 4", ["IMP", "--from"]), ("nonsense", ["nonsense"]),
    ("sr --version 2 --from /nowhere", ["/nowhere", "gem.pt"]), ("sr --trials 0", ["--trials", "from 1"]),
    ("sr --version 2 --from {home}/snip --model resnet32", ["not a gem of this network", "snip"]),
    ("sr --version 2 --from {home}/snip --sparsity 0.2", ["--sparsity is 0.4, not 0.2"]),
    ("snip --resume", ["nothing to resume"]), ("ep --gradual --period 9", ["--period 9"]), ("snip --lam 1", ["--lam"]),
])  # fmt: skip
def test_bad_flags_of_baselines(flags, words, done, pictures, tmp_path, capsys):
    refused(baseline(pictures, tmp_path, flags.format(home=done)), capsys, *words, program=bl)


# --- baselines.py: the paper's tables and figures ----------------------------------------------------------------


def printed(capsys, *argv):
    """What baselines.py paper prints."""
    capsys.readouterr()
    assert bl.main(["paper", *argv]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", bl.EXPERIMENTS)
def test_every_experiment_names_what_exists_and_can_be_listed(name, capsys, tmp_path, monkeypatch):
    """At full size, with its cost: Table 1 (most with their checks) and Table 4 in the order of the rows."""
    monkeypatch.chdir(tmp_path)
    *runs, last = printed(capsys, name, "--dry-run").splitlines()
    costs = [int(re.fullmatch(r"python .*  # ([\d,]+) epochs", run)[1].replace(",", "")) for run in runs]
    known = {"table1": [3300, 602, 602, 602, 900, 450, 3000, 900, 150], "table4": [300, 3150, 3000, 3000]}
    assert costs == known.get(name, costs)
    assert last == f"# {len(runs)} runs, {sum(costs):,} epochs"
    experiment = bl.EXPERIMENTS[name]
    assert set(experiment.columns) <= set(bl.COLUMNS)
    assert set(experiment.curves) <= set(bl.CURVES)
    assert {*experiment.checked, *experiment.own} <= set(experiment.rows)
    for figures in experiment.rows.values():  # of Fig. 3, 4 and 8 alike
        assert set(figures) <= {*experiment.columns, "after"}


@pytest.mark.parametrize("argv, words", [
    ("table4 --epochs 20", ["--epochs 400 --period 20 --finetune-epochs 20", "--rewind 133"]),
    ("fig10 --epochs 75 --sparsity 0.0144 --bf16", ["--round-epochs 4 --rewind 500", "--bf16"]),
    ("table4 --dataset shapes", ["--epochs 200 --period 10 --finetune-epochs 10", "--rewind 67"]),  # whose E is 10
    ("table16 --epochs 20", ["--trials 19", "--epochs 1 --finetune-epochs 20"]),
    ("table16 --epochs 300", ["--trials 144"]),
    ("table2", ["--finetune-epochs 200", "--checks shuffle reinit"]),
    ("fig3 --model vgg16 --dataset tinyimagenet", ["--rewind 2000", "--epochs 200 --model vgg16"]),
    ("fig4", ["--rewind 1000 --epochs 50 --model resnet50 --dataset caltech101 --sparsity 0.05"]),
])  # fmt: skip
def test_all_numbers_of_a_command_scale_with_the_epochs(argv, words, capsys):
    runs = printed(capsys, *argv.split(), "--dry-run")
    for word in words:
        assert word in runs


def table(text):
    """{the first three cells: the others} of the Markdown table in a text."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    return {tuple(row[:3]): row[3:] for row in rows}


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def test_commands_run_as_printed_and_make_the_table(pictures, tmp_path, capsys):
    """Also where those of SR-v2 and others need the folder of an earlier one, and its name has a space."""
    home = tmp_path / "my tables"
    flags = f"--dataset folder:{pictures} --batch-size 4 --epochs 1 --sparsity 0.4 --out".split() + [str(home)]
    for run in printed(capsys, "table16", "--dry-run", *flags).splitlines()[:-1]:
        _, program, *argv = shlex.split(run, comments=True)
        assert {"gem_miner.py": gm, "baselines.py": bl}[program].main(argv) == 0
    rows = table(printed(capsys, "table16", "--so-far", *flags))
    assert rows.pop(("method", "network", "sparsity")) == ["kept %", "after"]
    assert [row[0] for row in rows if row[2] == "40%"] == list(bl.EXPERIMENTS["table16"].rows)
    result = result_of(next(home.glob("SR-v6-resnet20-*")))
    cells = [f"{100 * result['kept'] / 267_824:.3f}", f"{result['post_finetune_acc']:.2f}"]
    assert rows["SR-v6", "resnet20", "40%"] == cells


def test_tables_share_runs_and_show_the_papers_figures_beside_ours(pictures, tmp_path, capsys):
    """A run's folder is its label's, whatever the table, the order of the flags, and flags that repeat a default."""
    flags = f"--dataset folder:{pictures} --epochs 1 --batch-size 8 --out {tmp_path}".split()
    run = printed(capsys, "table4", "--dry-run", *flags).splitlines()[0]
    assert gm.main(shlex.split(run, comments=True)[2:]) == 0
    more = "--so-far --sparsity 0.0144 --sparsity 0.4".split()
    text = printed(capsys, "table4", *flags[4:], *flags[:4], *more)
    assert f"no settings for resnet20 on folder:{pictures}, so those of resnet20 on cifar10" in text
    rows = table(text)
    assert rows["method", "network", "sparsity"][::2] == ["all epochs", "kept %", "paper (CIFAR-10)"]
    assert rows["Gem-Miner", "resnet20", "1.44%"][:3] == ["2", "300", "1.440"]
    assert rows["Gem-Miner", "resnet20", "1.44%"][4] == "77.89"
    assert rows["Gem-Miner", "resnet20", "not run"] == ["not run", "none", "not run", "not run", "none"]

    rows = table(printed(capsys, "table1", "--so-far", *flags, "--finetune-epochs", "1"))
    assert rows["Gem-Miner", "resnet20", "1.44%"][-3:] == ["not checked"] * 3
    assert "complete" not in printed(capsys, "table1", "--dry-run", *flags)


@pytest.fixture(scope="module")
def mined(pictures, tmp_path_factory):
    """Flags of `paper`, for which Gem-Miner's and Random's run of Table 1 are complete; and the first one's folder."""
    home = tmp_path_factory.mktemp("mined")
    flags = f"--dataset folder:{pictures} --model resnet20 --epochs 2 --batch-size 16 --sparsity 0.4 --out {home}"
    args, more = bl.parser().parse_known_args(["paper", "table1", *flags.split()])
    for label, *_, run in bl.runs_of(bl.EXPERIMENTS["table1"], args, more):
        if label in ("Gem-Miner", "Random"):
            gm.run_command(run, **bl.plan(run))
    return flags.split(), next(home.glob("Gem-Miner-*"))


def test_every_column_shows_its_figure(mined, capsys):
    """Table 1, and Fig. 4, which shares its run of Gem-Miner. Its figures are first made all different."""
    flags, folder = mined
    result = result_of(folder)
    found = copy.deepcopy(result) | {"pre_finetune_acc": 5.0, "reestimated_acc": 10.0, "post_finetune_acc": 99.0}
    for name, acc in (("shuffle", 20.0), ("reinit", 30.0), ("invert", 98.0)):
        found["checks"][name] |= {"post_finetune_acc": acc, "passed": acc < 90}
    (folder / "result.json").write_text(json.dumps(found))
    row = table(printed(capsys, "table1", "--so-far", *flags))["Gem-Miner", "resnet20", "40%"]
    assert row[:5] == ["yes", "yes", "no: score inversion", "2", "40.000"]
    assert row[5:] == ["5.00", "10.00", "99.00", "20.00", "30.00", "98.00"]
    row = table(printed(capsys, "fig4", "--so-far", *flags))["Gem-Miner", "resnet20", "40%"]
    assert row == ["40.000", "5.00", "99.00", "20.00", "30.00", "98.00"]
    (folder / "result.json").write_text(json.dumps(result))


@pytest.mark.parametrize("after, shuffled, expected", [
    (80.0, 70.0, ["yes", "yes", "yes"]),
    (80.0, 79.0, ["yes", "yes", "no: random shuffling"]),  # a point is less than 3 standard errors of 0.57
    (61.0, 50.0, ["yes", "no", "yes"]),  # not clearly above random weights, trained
    (None, 50.0, ["yes", "not trained", "yes"]),
])  # fmt: skip
def test_the_ticks_of_table_1(after, shuffled, expected):
    checks = {"shuffle": {"passed": after is None or gm.clearly_above(after, shuffled, 10_000)}}
    result = {"method": "snip", "post_finetune_acc": after, "pre_finetune_acc": 10.0, "random_acc": 60.0,
              "images": [50_000, 10_000], "checks": checks}  # fmt: skip
    assert [bl.cell(bl.COLUMNS[tick], [result]) for tick in bl.TICKS] == expected
    assert bl.at_initialisation({"method": "imp", "rewind": 1000}) == "no"


def test_charts_by_epoch_and_by_layer(mined, capsys):
    flags, folder = mined
    accs = [f"{row['test_acc']:.4g}" for row in artefacts(folder)["rows"] if row["phase"] in ("mine", "finetune")]
    text = printed(capsys, "fig5", "--so-far", *flags)
    assert f'accuracy (%)"\n    x-axis ["1", "2", "3", "4"]\n    line [{", ".join(accs)}]\n```\n' in text
    layers = artefacts(folder)["result"]["layers"]
    names = ", ".join(f'"{layer["name"]}"' for layer in layers)
    shares = ", ".join(f"{100 * layer['kept'] / layer['total']:.4g}" for layer in layers)
    text = printed(capsys, "fig7", "--so-far", *flags)
    assert text.endswith(f"x-axis [{names}]\n    line [{shares}]\n```\n\n")  # the authors' are of CIFAR-10


def test_what_charts_show_is_the_mean_of_the_seeds():
    def result(accs, **kw):
        log = [{"phase": "mine", "test_acc": acc} for acc in accs]
        return {"post_finetune_acc": accs[-1], "log": log, **kw}

    ours = {("Gem-Miner", "vgg16", 0.5): [result([10.0, 20.0]), result([30.0, 60.0])],
            ("Dense", "vgg16", 0.5): [result([50.0])],
            ("Gem-Miner", "vgg16", 0.1): [result([8.0])], ("Dense", "vgg16", 0.1): [result([None])]}  # fmt: skip
    [(title, xs, lines)] = bl.charts(bl.EXPERIMENTS["fig3"], ours)  # Dense: not everywhere trained
    assert (title, xs, lines) == ("vgg16: accuracy after finetuning (%)", ["50%", "10%"], {"Gem-Miner": [40.0, 8.0]})
    here = {point: found for point, found in ours.items() if point[2] == 0.5}
    [(title, xs, lines)] = bl.charts(bl.EXPERIMENTS["fig5"], here)
    assert lines == {"Gem-Miner": [20.0, 40.0], "Dense": [50.0]}
    layers = [{"name": f"layer {i}", "kept": i, "total": 200} for i in range(20)]
    point = "Gem-Miner", "resnet20", 0.0144
    [(_, _, lines)] = bl.charts(bl.EXPERIMENTS["fig7"], {point: [{"layers": layers, "dataset": "cifar10"}]})
    assert lines["Gem-Miner"][2] == 1
    assert lines["Gem-Miner (authors)"][:2] == [100 * 149 / 200, 100 * 165 / 200]
    text = bl.chart("title", range(1, 101), {"a": range(100), "b": [6, 7]})
    assert text.startswith("blue: a, orange: b\n")
    assert '    x-axis ["1", "3", ' in text  # of many points, every second
    assert f"    line [6, {', '.join(['7'] * 49)}]\n" in text  # the shorter goes on as it ends


def test_a_run_stopped_before_its_first_epoch_is_not_resumed(tmp_path, capsys):
    """SR writes gem.pt at once, and there is nothing else yet to go on from."""
    folder = tmp_path / "SR-resnet20-cifar10-0.0144-seed0"
    folder.mkdir()
    (folder / "gem.pt").touch()
    assert "--resume" not in printed(capsys, "table16", "--dry-run", "--out", str(tmp_path))
    (folder / "mine.pt").touch()
    assert "--resume" in printed(capsys, "table16", "--dry-run", "--out", str(tmp_path))


def test_a_table_is_run_resumed_and_printed(pictures, tmp_path, capsys, monkeypatch):
    """And a complete one is printed again without a run; a damaged result is made again, to the same bits."""
    flags = f"--dataset folder:{pictures} --epochs 1 --batch-size 32 --sparsity 0.4 --out {tmp_path} --seeds 2".split()
    argv = ["table2", *flags]
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert bl.main(["paper", *argv]) == 130
    assert "give the same command again" in capsys.readouterr().err
    assert printed(capsys, *argv, "--dry-run").count(" --resume  # ") == 1
    refused(["paper", *argv, "--so-far"], capsys, "no run of table2", str(tmp_path), program=bl)
    out = printed(capsys, *argv)
    paths = sorted(tmp_path.glob("ProsPr-resnet20-*"))
    first, second = (result_of(path)["post_finetune_acc"] for path in paths)
    after = f"{(first + second) / 2:.2f} ± {abs(first - second) / 2**0.5:.2f}"
    assert table(out)["ProsPr", "resnet20", "40%"][:2] == ["40.000 ± 0.000", after]
    with monkeypatch.context() as patch:
        patch.setattr(gm, "run_command", None)  # nothing is left to run
        assert printed(capsys, *argv) == out
        assert printed(capsys, *argv, "--seeds", "3", "--so-far") == out.replace("2 seeds", "up to 3 seeds")
        assert table(printed(capsys, *argv, "--seeds", "1"))["ProsPr", "resnet20", "40%"][0] == "40.000"
        assert printed(capsys, *argv, "--dry-run").count("# complete: python") == 4
        other = ["paper", *argv, "--batch-size", "16"]
        refused(other, capsys, "--batch-size is 32, not 16", "another --out", program=bl)
    path = paths[1] / "result.json"
    path.write_text(path.read_text()[:-9])
    assert printed(capsys, *argv) == out
    path.write_text(json.dumps(json.loads(path.read_text()) | {"images": [1]}))
    refused(["paper", *argv], capsys, "not all on the same images", program=bl)


@pytest.mark.parametrize("flags, words", [
    ("fig3 --model resnet19", ["resnet19", "resnet18"]), ("table3 --lam 1e-4", ["--lam"]), ("table9", ["table1"]),
    ("table3 --seeds 0", ["--seeds"]), ("table3 --sparsity 2", ["KEPT"]), ("table3 --bf16 --seed=3", ["--seeds"]),
    ("table3 more", ["more"]), ("fig5 --eval-every=2", ["--eval-every"]),
])  # fmt: skip
def test_bad_flags_of_paper_are_refused_before_anything_runs(flags, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gm, "run_command", None)
    refused(["paper", *flags.split(), "--out", tmp_path], capsys, *words, program=bl)


def test_bench_prints_three_rows_and_a_sentence(capsys):
    assert bl.main("bench --rounds 2 --batch-size 2 --device cpu".split()) == 0
    out = capsys.readouterr().out
    rows = re.findall(r"^\| (\w+) \| [\d.]+ ± [\d.]+ \| [\d.]+ ± [\d.]+ \|$", out, re.M)
    assert rows == ["dense", "mining", "finetuning"]
    assert "the paper's 150 + 150 epochs would take" in out


# --- baselines.py: the README and the header -----------------------------------------------------------------------


def test_the_readmes_and_the_headers_use_of_baselines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = bl.__doc__.splitlines() + [line for block in blocks("bash") for line in block.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if line.strip().startswith("python baselines.py")]
    assert len(commands) > 4
    for _, _, method, *flags in commands:
        if method == "paper":
            assert bl.main([method, *flags, "--dry-run"]) == 0
        elif method == "bench":
            bl.parser().parse_args([method, *flags])
        else:
            bl.complete([method, *flags])
    [example] = [block for block in blocks("python") if "baselines" in block]
    exec(example, {})


# --- for one's own network; the README ------------------------------------------------------------------------

README = (HERE / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_the_file_alone_can_be_copied(tmp_path):
    """The README's examples run with gem_miner.py alone, without torchvision; its import prints and draws nothing."""
    shutil.copy(HERE / "gem_miner.py", tmp_path)
    examples = [block for block in blocks("python") if "mine(f, " in block]
    assert len(examples) == 3
    example = re.sub(r"epochs=\d+", "epochs=1", "".join(examples)).replace("randint(50, (64", "randint(50, (4")
    script = f"""
import sys, torch
before = torch.get_rng_state()
import gem_miner
assert torch.equal(before, torch.get_rng_state())
print("imported")
{example}
assert not {{'torchvision', 'models'}} & set(sys.modules)
"""
    argv = [sys.executable, "-W", "error", "-W", "ignore:no weight is left", "-c", script]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("imported")


def test_the_commands_in_the_readme_and_the_header_are_understood(tmp_path, monkeypatch):
    """The first, the demonstration, also runs, made small."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    lines = gm.__doc__.splitlines() + [line for block in blocks("bash") for line in block.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if line.strip().startswith("python gem_miner.py")]
    assert len(commands) > 4
    for _, _, *argv in commands:
        settings(shlex.join(argv))
    monkeypatch.undo()
    small = gm.Data(gm.draw_shapes(40, 1), gm.draw_shapes(20, 2), 10)
    monkeypatch.setitem(gm.LOADERS, "shapes", lambda root: small)
    demonstration = commands[0][2:]
    assert "shapes" in demonstration
    assert gm.main([*demonstration, "--epochs", "1", "--out", str(tmp_path)]) == 0


def test_the_header_lists_every_deviation():
    source = Path(gm.__file__).read_text().replace(gm.__doc__, "")
    listed = re.findall(r"^    (\d)\. ", gm.__doc__, re.M)
    assert listed == [str(i) for i in range(1, len(listed) + 1)]
    for i in listed:
        assert f"Deviation {i}" in source
        assert re.search(rf"^{i}\. ", README, re.M)


def test_only_the_allowed_packages_are_imported():
    allowed = set(sys.stdlib_module_names) | {"torch", "torchvision", "pytest", "models", "gem_miner", "baselines"}
    for path in HERE.glob("*.py"):
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.split(".")[0])
        assert names <= allowed
        if path.name == "models.py":
            assert names == {"torch"}  # it knows nothing of pruning


# --- several processes ----------------------------------------------------------------------------------------

TOGETHER = """
import copy, os, sys, torch
import torch.distributed as dist
import gem_miner as gm

def result(join):
    torch.manual_seed(0)
    x, y, states = torch.randn(22, 4), torch.arange(22) % 3, []
    f = gm.Network(torch.nn.Sequential(torch.nn.Linear(4, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3)))
    if join:
        gm.join(f)
    how = {"sparsity": 0.3, "epochs": 4, "batch_size": 8, "lr": 1.0}  # batches of 8, 8 and 6
    gem = gm.mine(f, (x, y), **how, on_epoch=lambda row, v, state: states.append((row, copy.deepcopy(state))))
    again = gm.mine(f, (x, y), **how, state=states[1][1])
    assert torch.equal(gem.p, again.p) and torch.equal(gem.q, again.q)
    w = gm.finetune(f, gem.w, gem.q, (x, y), epochs=2, batch_size=8, lr=0.1)
    rows = torch.tensor([[row["loss"], row["train_acc"]] for row, _ in states])
    return [gem.p, gem.q, w, *f.others().values(), rows]

def same_everywhere(tensors):
    ends = [None] * dist.get_world_size()
    dist.all_gather_object(ends, [t.tolist() for t in tensors])
    assert all(end == ends[0] for end in ends)

rank, out = gm.RANK, sys.argv[-1]
alone = result(join=False)
for world in (2, 3):
    if rank < world:
        dist.init_process_group("gloo", init_method=f"file://{out}-{world}", rank=rank, world_size=world)
        together = result(join=True)
        assert torch.equal(alone[1], together[1])
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(alone, together)), (alone, together)
        same_everywhere(together)
        x, f = torch.randn(6, 4), gm.Network(torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3)))
        dist.broadcast(x, 0)
        gm.join(f)
        gm.reestimate(f, f.vector(), (x, torch.zeros(6)))  # the shares are equal, so the mean of means is the mean
        assert torch.allclose(f.model[0].running_mean, x.mean(0), atol=1e-6)
        try:
            f = gm.Network(torch.nn.Linear(4, 3))
            gm.join(f)
            gm.mine(f, (torch.randn(3, 4), torch.arange(3) % 3), sparsity=0.5, epochs=1)
            raise SystemExit("accepted a batch that is too small")
        except gm.InputError as e:
            assert "too small" in str(e)
        dist.destroy_process_group()
seen, report = [], gm.report
def watched(run, args, gem, *rest):
    seen.extend([gem.p, *run.f.state_dict().values()])
    report(run, args, gem, *rest)
gm.report = watched
run = "--model resnet20 --epochs 1 --batch-size 8 --sparsity 0.3 --device cpu".split() + sys.argv[1:]
assert gm.main(run) == gm.main([*run, "--resume", "--checks", "shuffle"]) == 0
same_everywhere(seen)
"""


def test_several_processes_are_as_one(pictures, tmp_path):
    """Of torchrun: the same scores, masks, weights and figures as one; and each has the same, after a resume too."""
    (tmp_path / "together.py").write_text(TOGETHER)
    argv = ["torch.distributed.run", "--standalone", "--nproc-per-node", "3", str(tmp_path / "together.py")]
    flags = ["--dataset", f"folder:{pictures}", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", *argv, *flags], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("post-finetune") == 2  # printed by one of them alone, twice
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert list(result["checks"]) == ["shuffle"]


# --- GPU ------------------------------------------------------------------------------------------------------


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture
def exact(monkeypatch):
    """Convolutions in float32: by default GPUs round their inputs to TF32, and mining is chaotic in single scores."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)


@needs_gpu
def test_gpu_agrees_with_cpu(pictures, exact):
    data, gems = gm.load_data(f"folder:{pictures}", None), []
    stats = gm.pixel_stats(data.train.x)
    for device in ("cpu", "cuda"):
        split = gm.Split(data.train.x.to(device), data.train.y.to(device))
        torch.manual_seed(0)
        model = models.resnet20(2).to(device)
        gems.append(gm.mine(model, gm.Batches(split, stats, 8, train=True, pad=2), sparsity=0.5, epochs=1))
    assert torch.equal(gems[0].w, gems[1].w.cpu())
    assert (gems[0].p - gems[1].p.cpu()).abs().mean() < 1e-3
    assert (gems[0].q != gems[1].q.cpu()).float().mean() < 0.01


@needs_gpu
def test_gpu_compiled_equals_eager(exact):
    """As CUDA graphs, with a last batch that is smaller."""
    data = [(torch.randn(n, 3, 32, 32).cuda(), torch.arange(n).cuda() % 10) for n in (16, 16, 5)]
    model, ends = models.resnet20().cuda(), []
    for compiled in (False, True):
        f = gm.Network(copy.deepcopy(model), compile=compiled)
        gem = gm.mine(f, data, sparsity=0.5, epochs=3, period=1)
        ends.append((gem.p, gm.finetune(f, gem.w, torch.ones_like(gem.w), data, epochs=3)))
    for eager, compiled in zip(*ends):
        assert (eager - compiled).abs().mean() < 1e-3


@needs_gpu
@pytest.mark.parametrize("score", ["snip", "grasp", "synflow", "prospr", "random"])
def test_gpu_scores_as_cpu(score, exact):
    data = (torch.randn(20, 3, 8, 8, dtype=torch.float64), torch.arange(20) % 4)
    model = models.resnet20().double()
    cpu = bl.at_init(model, data, score=score, sparsity=0.1)
    gpu = bl.at_init(model.cuda(), data, score=score, sparsity=0.1)
    assert gpu.m.is_cuda
    assert (cpu.m != gpu.m.cpu()).double().mean() < 0.001
