# SPDX-License-Identifier: MIT
"""Tests of all three files: offline, and on the CPU.

Where it can, a test compares with an oracle that it states itself: slower, plainer, and independent.
"""

import contextlib
import copy
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import struct
import subprocess
import sys
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


class Draws:
    """Data that draws a random number in each epoch."""

    def __init__(self):
        self.seen = []

    def __iter__(self):
        self.seen.append(torch.rand(1).item())
        return iter(tiny_batches(1))


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


def test_option_a_takes_every_second_pixel():
    x = torch.randn(2, 16, 8, 8)
    expected = torch.zeros(2, 32, 4, 4)
    expected[:, 8:24] = x[:, :, [0, 2, 4, 6]][:, :, :, [0, 2, 4, 6]]
    assert torch.equal(models.OptionA(16)(x), expected)


def test_resnet50_takes_torchvisions_weights():
    theirs = torchvision.models.resnet50().eval()
    ours = models.build("resnet50", 1000, affine=True).eval()
    ours.load_state_dict({name: t for name, t in theirs.state_dict().items() if name != "fc.bias"})
    nn.init.zeros_(theirs.fc.bias)
    x = torch.randn(1, 3, 32, 32)
    assert torch.allclose(theirs(x), ours(x), atol=1e-5)


# --- Network: a module as a function of one vector ------------------------------------------------------------


def test_views_are_the_inverse_of_vector():
    """And the module itself is untouched by what its function is given."""
    model = tiny()
    f = gm.Network(model)
    v, other = f.vector(), torch.randn(42, dtype=torch.float64)
    assert (f.d, f.names, f.shapes) == (42, ["conv.weight", "fc.weight"], [(2, 1, 3, 3), (3, 8)])
    assert same(f.views(v), {"conv.weight": model.conv.weight, "fc.weight": model.fc.weight})
    assert torch.equal(f.vector(f.views(other)), other)
    f.eval()(other, torch.randn(5, 1, 4, 4, dtype=torch.float64))
    assert torch.equal(f.vector(), v)


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


def test_a_shared_weight_counts_once():
    """And all that is not in the vector is the rest, which can be restored."""
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


def test_bfloat16_is_autocast_of_every_layer():
    """The output and the gradient are those of plain autocast, and the output is float32."""
    f, x, y = gm.Network(models.build("resnet20"), bf16=True), torch.randn(4, 3, 8, 8), torch.arange(4)
    v = f.vector().requires_grad_()
    ours, full = f(v, x), gm.Network(f.model)(v, x)
    with torch.autocast("cpu", torch.bfloat16):
        plain = torch.func.functional_call(f.model, f.views(v), (x,)).float()
    assert torch.equal(ours, plain)
    assert ours.dtype == torch.float32
    assert 0 < (ours - full).abs().max() < 0.1 * full.abs().max()
    gradients = [torch.autograd.grad(F.cross_entropy(out, y), v)[0] for out in (ours, plain)]
    assert torch.equal(*gradients)


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_compiled_equals_eager():
    """Also what is trained besides the vector, and BatchNorm's statistics."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3))
    data, ends = [(torch.randn(8, 4), torch.randint(3, (8,)))], []
    for compiled in (False, True):
        f = gm.Network(copy.deepcopy(net), compile=compiled)
        w = gm.finetune(f, f.vector(), torch.ones(f.d), data, epochs=2, lr=0.1)
        ends.append([w, *f.rest().values()])
    for eager, compiled in zip(*ends):
        assert torch.allclose(eager, compiled, atol=1e-5)


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a GPU: to read numbers, or a size that depends on them."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.n += name in ("_local_scalar_dense", "nonzero", "masked_select", "equal")
        if name in ("index", "index_put_"):
            self.n += any(i is not None and i.dtype == torch.bool for i in args[1])  # t[mask]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("search", [
    lambda f, data: gm.mine(f, data, sparsity=0.5, epochs=1),
    lambda f, data: gm.mine(f, data, sparsity=0.5, epochs=1, r=gm.round_random, norm=gm.l1, lam=1e-4),
    lambda f, data: gm.finetune(f, f.vector(), torch.ones(f.d), data, epochs=1),
    lambda f, data: bl.edge_popup(f, data, sparsity=0.5, epochs=1, period=1, regularize=True),
    lambda f, data: bl.tune_densities(f, data, [0.5, 0.5], epochs=1),
])  # fmt: skip
def test_no_step_waits_for_the_device(search):
    waits, seen = Waits(), []

    class Watched:
        def __iter__(self):
            for batch in tiny_batches():
                yield batch
                seen.append(waits.n)

    with waits:
        search(gm.Network(tiny()), Watched())
    assert seen[0] == seen[3] < waits.n  # the end of an epoch does read its figures, and is seen


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


@pytest.mark.parametrize("case", [{}, {"norm": "l1"}, {"invert": True}, {"E": 7}, {"lam": 0.0, "eta": 0.2}], ids=str)
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
@pytest.mark.parametrize("distinct", [0, 100])  # the other scores are all 0
def test_freezing_is_exact_and_takes_the_worst(distinct, invert):
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


X, Y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize("bad, word", [
    ({"sparsity": 0}, "sparsity"), ({"sparsity": 1.44}, "1.44"), ({"sparsity": 0.01}, "1/12"),
    ({"sparsity": math.nan}, "nan"), ({"period": 11}, "11"), ({"period": 0}, "period"), ({"period": 1.5}, "whole"),
    ({"lam": -1}, "lambda"), ({"lam": math.nan}, "lambda"), ({"epochs": 0}, "epochs"),
    ({"optimizer": gm.adam}, "give lambda"), ({"norm": gm.l1}, "give lambda"), ({"r": gm.round_random}, "give lambda"),
    ({"train": iter([(X, Y)])}, "no batch"),  # an iterator is spent after one epoch
    ({"train": (X, Y[:5])}, "6 inputs, but 5 labels"), ({"train": (({"x": X, "scale": X[:5]}, Y))}, "6 inputs"),
    ({"train": (X, Y.tolist())}, "tensors or arrays"), ({"train": None}, "NoneType"), ({"train": X}, "batches"),
    ({"train": [(X, Y, Y)]}, "batches"), ({"train": (X, Y, Y)}, "batches"), ({"train": [{"x": X, "y": Y}]}, "batches"),
    ({"train": list(zip(X, Y))}, "batches"), ({"train": [(x, int(y)) for x, y in zip(X, Y)]}, "batches"),
    ({"train": torch.utils.data.TensorDataset(X, Y)}, "DataLoader"),
])  # fmt: skip
def test_what_mine_cannot_use_is_refused(bad, word):
    with pytest.raises(gm.InputError, match=word):
        gm.mine(nn.Linear(4, 3), **{"train": (X, Y), "sparsity": 0.5, "epochs": 10, "period": 1, **bad})


def test_lost_layers_are_named_once():
    with pytest.warns(UserWarning, match="conv.weight, fc.weight") as said:
        gem = gm.mine(tiny(), tiny_batches(), sparsity=0.5, epochs=4, period=1, lam=10.0)
    assert len(said) == 1
    assert gem.q.sum() == 21
    assert gem.m.sum() == 0


def test_what_is_not_finite_stops_the_run():
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


def test_the_seed_fixes_the_order_of_batches():
    """A DataLoader's, too; tensors are shuffled."""
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=2, shuffle=True)
    in_order = list(zip(X.split(2), Y.split(2)))
    how = {"sparsity": 0.5, "epochs": 2, "lr": 1.0, "batch_size": 2, "lam": 0, "init": lambda f: torch.ones(12)}
    for data in (loader, (X, Y)):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        first, again, plain = (gm.mine(model, train, **how).p for train in (data, data, in_order))
        assert torch.equal(first, again)
        assert not torch.equal(first, plain)


@pytest.mark.parametrize("seed", range(8))
def test_algorithm_1_holds_on_any_network(seed):
    """Random sizes (d from 1, layers of one weight), sparsities, periods, and lambdas and steps up to absurd ones."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    a, b, c = (rng.choice((1, 1, 2, 3, 7)) for _ in range(3))
    model, d, E = nn.Sequential(nn.Linear(a, b), nn.Linear(b, c)), (a + c) * b, rng.randint(1, 9)
    T, n, states = rng.randint(1, E), rng.choice((1, d, rng.randint(1, d))), []
    gem = gm.mine(
        model, (torch.randn(6, a), torch.randint(c, (6,))), sparsity=n / d, epochs=E, period=T, batch_size=3,
        lr=rng.choice((1e-3, 1.0, 1e3)), lam=rng.choice((0, 1e-4, 1.0, 1e6)), optimizer=[gm.sgd, gm.adam][seed % 2],
        on_epoch=lambda row, v, state: states.append(copy.deepcopy({**state, "row": row, "v": v})),
    )  # fmt: skip
    before = torch.ones(d, dtype=torch.bool)
    for j, state in enumerate(states, 1):
        p, q, m = state["p"], state["q"], state["m"]
        assert 0 <= p.min() <= p.max() <= 1
        assert not (q & ~before).any()  # what is frozen stays frozen
        assert q.sum() == (round(d * (n / d) ** (j / (E // T * T))) if j % T == 0 else before.sum())
        assert torch.equal(m, q & (p >= 0.5))
        assert torch.equal(state["v"], gem.w * m)
        assert (state["row"]["q"], state["row"]["m"]) == (q.sum(), m.sum())
        before = q
    assert gem.q.sum() == n


def convolutions(kind, norm, size):
    return nn.Sequential(
        kind(3, 4, 3, padding=1), norm(4), nn.ReLU(), kind(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(size, 3)
    )  # fmt: skip


def twice():
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, 3))


class TwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = self.two = nn.Parameter(torch.randn(4, 4))
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc((x @ self.one).tanh() @ self.two)


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.lstm = nn.MultiheadAttention(4, 2, batch_first=True), nn.LSTM(4, 3, batch_first=True)

    def forward(self, x):
        return self.lstm(self.attention(x, x, x)[0])[0][:, -1]


class Checkpointed(nn.Sequential):
    """Its layers run again in the backward pass, which must not meet other weights."""

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)


def matrices(name, parameter):
    return parameter.dim() == 2


def embedding(name, parameter):
    return name in ("embed.weight", "a.bias")


NETWORKS = {  # what it is: (the network, what to prune, the shape of its input, its tensors of weights)
    "vit": (lambda: torchvision.models.VisionTransformer(8, 4, 2, 2, 8, 16, num_classes=3), None, (3, 8, 8), 8),
    "tied": (Tied, None, (9,), 2),
    "embedding": (Tied, embedding, (9,), 2),
    "a layer twice": (twice, None, (4,), 2),
    "a weight twice": (TwoNames, matrices, (4,), 2),
    "conv2d": (lambda: tiny(torch.float32), None, (1, 4, 4), 2),
    "conv1d": (lambda: convolutions(nn.Conv1d, nn.BatchNorm1d, 16), None, (3, 6), 3),
    "transposed": (lambda: convolutions(nn.ConvTranspose2d, nn.BatchNorm2d, 144), None, (3, 4, 4), 3),
    "sequence": (Sequence, matrices, (5, 4), 4),
    "checkpointed": (lambda: Checkpointed(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), None, (4,), 2),
}


@pytest.mark.filterwarnings("ignore:only 48 of 109")
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_others_are_mined_and_finetuned(name):
    build, prune, shape, tensors = NETWORKS[name]
    torch.manual_seed(0)
    model, x, y = build(), 3 * torch.randn(8, *shape), torch.randint(3, (8,))
    f = gm.Network(model, prune)
    assert len(f.names) == tensors
    w = gm.signed_constant(f)
    for view in f.views(w).values():
        assert view.untyped_storage().data_ptr() == w.untyped_storage().data_ptr()  # no copy
        assert view.dim() != 4 or view.is_contiguous(memory_format=torch.channels_last)  # which is fast
        assert torch.allclose(view.abs(), torch.tensor((2 / view[0].numel()) ** 0.5))
    for training in (True, False):  # the function is the module that holds v, in either mode, and so is its gradient
        function, plain = (gm.Network(copy.deepcopy(model), prune).train(training) for _ in range(2))
        v = (f.vector() + 0.1 * torch.randn(f.d)).requires_grad_()
        plain.load(v.detach())
        outs = []
        for run in (partial(function, v), plain.model):
            torch.manual_seed(1)
            outs.append(run(x))
            F.cross_entropy(outs[-1], y).backward()
        assert torch.allclose(*outs, atol=1e-4)
        assert torch.allclose(v.grad, plain.vector({name: p.grad for name, p in plain.weights.items()}), atol=1e-4)

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
    assert gm.accuracy(f, (x, y)) == gm.accuracy(f, (x, y), v)  # dropout is off


def test_networks_that_cannot_be_pruned_well_are_named():
    pruned, normed = nn.Linear(4, 3, bias=False), nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
    torch.nn.utils.prune.l1_unstructured(pruned, "weight", 0.5)
    lstm = nn.utils.spectral_norm(nn.LSTM(4, 3), "weight_hh_l0")
    for model, word in ((nn.Sequential(nn.Linear(4, 4), pruned), "layer '1'.*prune.remove"), (normed, "layer '0'"),
                        (nn.ModuleList([lstm]), "layer '0'"), (nn.LazyLinear(3), "lazy"),
                        (nn.Embedding(5, 6), "nothing to prune")):  # fmt: skip
        with pytest.raises(gm.InputError, match=word):
            gm.Network(model)
    with pytest.warns(UserWarning, match="only 48 of 109"):
        gm.Network(Tied(), embedding)


class Named(nn.Module):
    """Takes its arguments by name, and gives back what no criterion of PyTorch takes."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, scale, inputs):
        return {"logits": self.fc(inputs * scale)}


def test_batches_and_outputs_of_every_kind_are_learned():
    """Arguments by name or in order, arrays, labels in a dict: as plain tensors are. There is no accuracy then."""
    x, scale, y = torch.randn(40, 4), torch.rand(40, 1), torch.randint(3, (40,))
    inputs, rows = {"inputs": x, "scale": scale}, []
    torch.manual_seed(0)
    model, kw = Named(), {"sparsity": 0.5, "epochs": 2, "batch_size": 16}

    def criterion(out, y):
        return F.cross_entropy(out["logits"], y["classes"] if isinstance(y, dict) else y)

    numpy = {name: t.double().numpy() for name, t in inputs.items()}
    scores = [gm.mine(model.fc, data, **kw).p for data in ((x * scale, y), [x * scale, y])]
    for data in ((inputs, y), ((scale, x), y), ([scale, x], y), (numpy, y.int().numpy()), (inputs, {"classes": y})):
        scores.append(gm.mine(model, data, criterion=criterion, on_epoch=lambda row, *_: rows.append(row), **kw).p)
    gem = gm.mine(model, [(inputs, {"classes": y})], criterion=criterion, **{**kw, "epochs": 1})  # batches of it
    gm.finetune(model, gem.w, gem.q, [((scale, x), y)], epochs=1, criterion=criterion)
    assert all(torch.allclose(p, scores[0], atol=1e-5) for p in scores)
    assert {row["train_acc"] for row in rows} == {None}
    assert gm.accuracy(model, (inputs, y)) is None
    assert gm.mine(model.fc.double(), ((x * scale).double().numpy(), y.numpy()), **kw).p.dtype == torch.float64


def test_the_period_is_a_thirtieth_of_the_epochs():
    """As in Table 8, 5 of 150."""
    periods = []
    for E in (150, 60, 10):
        gm.mine(
            nn.Linear(4, 3), (X, Y), sparsity=0.5, epochs=E,
            on_epoch=lambda row, v, state: periods.append(state["period"]) or True,
        )  # fmt: skip
    assert periods == [5, 2, 1]


def test_figures_count_examples_in_float32():
    """The examples are those of y: an input may have another length. Neither regression nor one column has classes."""
    model, rows = nn.Bilinear(4, 4, 3), []
    f = gm.Network(model, prune=lambda name, parameter: name == "weight")
    right = 100 * (model(X, X).argmax(1) == Y).float().mean().item()
    assert gm.accuracy(f, [((X, X), Y)]) == pytest.approx(right, abs=1e-3)
    named, broadcast = Named(), torch.ones(1, 1)
    named.forward = lambda scale, inputs: Named.forward(named, scale, inputs)["logits"]
    assert gm.accuracy(named, [((broadcast, X), Y)]) <= 100
    assert gm.accuracy(nn.Linear(4, 1), (X, Y)) is None
    assert gm.accuracy(nn.Linear(4, 2), (X, X[:, :2])) is None
    assert gm.accuracy(nn.Linear(4, 2), (X, X[:, 0])) is None
    how = {"criterion": lambda out, y: (0 * out.sum() + 6e4).half(), "on_epoch": lambda row, *_: rows.append(row)}
    gm.mine(nn.Linear(4, 3), [(X, Y)] * 2, sparsity=0.5, epochs=1, **how)
    assert rows[0]["loss"] == pytest.approx(6e4, rel=1e-3)


def test_bfloat16_swallows_no_small_steps():
    """Steps of 1e-4 are far below its resolution at 0.5: so scores, weights and biases are learned in float32."""
    torch.manual_seed(0)
    model, data, single = nn.Linear(4, 3).bfloat16(), (X.bfloat16(), Y), nn.Linear(4, 3)
    gem = gm.mine(model, data, sparsity=1, epochs=1, lr=1e-4, lam=0)
    assert gem.p.dtype == gem.w.dtype == torch.float32
    assert not torch.equal(gem.p, gem.p.bfloat16().float())
    single.load_state_dict(model.state_dict())
    before = model.bias.float()
    v = gm.finetune(model, gem.w, gem.q, data, epochs=100, lr=5e-4)
    gm.finetune(single, gem.w, gem.q, (X, Y), epochs=100, lr=5e-4)
    assert torch.equal(gm.Network(model).vector(), v.bfloat16().float())
    assert (model.bias.float() - single.bias).abs().max() < 0.003 < (before - single.bias).abs().max()
    states, how = [], {"epochs": 2, "on_epoch": lambda row, v, state: states.append(copy.deepcopy(state))}
    gm.finetune(model, gem.w, gem.q, data, **how)
    gm.finetune(model, gem.w, gem.q, data, **how, state=states[0])
    assert torch.equal(states[1]["others"][0], states[2]["others"][0])


class Unsized:
    def __iter__(self):
        return iter([(X, Y)] * 9)


@pytest.mark.parametrize("how", [{}, {"optimizer": gm.adam, "r": gm.round_random, "lam": 1e-3}], ids=["sgd", "adam"])
def test_a_search_stopped_goes_on_as_if_not(how):
    """But only from a state of its own."""
    model, states, kw = nn.Linear(4, 3), [], {"sparsity": 0.2, "epochs": 6, "lr": 1, **how}

    def on_epoch(row, v, state):
        states.append(copy.deepcopy(state))
        return row["epoch"] == 2

    whole = gm.mine(model, Unsized(), **kw)
    gm.mine(model, Unsized(), on_epoch=on_epoch, **kw)
    gm.finetune(model, whole.w, whole.q, (X, Y), epochs=5, on_epoch=on_epoch)
    assert [state["epoch"] for state in states] == [1, 2, 1, 2]
    assert torch.equal(gm.mine(model, Unsized(), state=states[1], **kw).p, whole.p)
    for net, change, word in (
        (model, {"sparsity": 0.4}, "sparsity"), (model, {"epochs": 5}, "epochs"), (model, {"seed": 1}, "seed"),
        (nn.Sequential(model), {}, "names"), (nn.Linear(4, 2), {}, "d is 12, not 8"),
    ):  # fmt: skip
        with pytest.raises(gm.InputError, match=f"its {word}"):
            gm.mine(net, (X, Y % 2), state=states[1], **{**kw, **change})
    with pytest.raises(gm.InputError, match="its d is None"):
        gm.mine(model, (X, Y), state=states[3], **kw)  # one of finetuning
    with pytest.raises(gm.InputError, match="its size is 12, not 8"):
        gm.finetune(nn.Linear(4, 2), torch.ones(8), torch.ones(8), (X, Y % 2), epochs=5, state=states[3])


def test_a_schedule_sets_all_rates_and_none_leaves_them():
    rates = []

    def optimizer(params, lr):
        return torch.optim.AdamW([{"params": params[:1], "lr": 0.1}, {"params": params[1:], "lr": lr}])

    for schedule in (None, lambda eta, j, E: eta * j, "cosine"):
        gm.finetune(
            nn.Linear(4, 3), torch.ones(12), torch.ones(12), (X, Y), epochs=2, lr=3, optimizer=optimizer,
            schedule=schedule,
            on_epoch=lambda row, v, state: rates.append([g["lr"] for g in state["optimizer"]["param_groups"]]),
        )  # fmt: skip
    assert rates == [[0.1, 3], [0.1, 3], [3, 3], [6, 6], [3, 3], [1.5, 1.5]]
    with pytest.raises(gm.InputError, match="'multistep'.* not 'step'"):
        gm.mine(nn.Linear(4, 3), (X, Y), sparsity=0.5, schedule="step")


@pytest.mark.parametrize("kind", ["tensors", "batches", "unsized"])
def test_lambda_by_itself_reaches_the_density(kind):
    """In half of the epochs. The loss moves no score (inputs are 0), so r(p) * q is as dense as wanted each time."""
    x, y, seen = torch.zeros(100, 40), torch.zeros(100).long(), []
    batches = list(zip(x.split(2), y.split(2)))

    class Iterable:
        def __iter__(self):
            return iter(batches)

    gem = gm.mine(
        nn.Linear(40, 40, bias=False), {"tensors": (x, y), "batches": batches, "unsized": Iterable()}[kind],
        sparsity=0.02, epochs=10, period=3, batch_size=2,
        on_epoch=lambda row, v, state: seen.append((row["m"] / 1600, row["lam"])),
    )  # fmt: skip
    for j, (density, lam) in enumerate(seen, 1):
        wanted = 0.02 ** min(1, j / 5)
        if j == 1 and kind == "unsized":  # the steps of an epoch are not known yet
            assert lam == 0
        else:
            assert density == pytest.approx(wanted, rel=0.3)
            assert lam > 0 or j > 5
    assert gem.q.sum() == 32


def test_lambda_by_itself_does_not_overshoot():
    """With ten steps an epoch, most of what a lambda does comes later, by momentum."""
    x, y = torch.zeros(200, 50), torch.zeros(200).long()
    gem = gm.mine(nn.Linear(50, 40, bias=False), (x, y), sparsity=0.05, epochs=10, period=3, batch_size=20)
    assert gem.m.sum() == gem.q.sum() == 100


# --- weights, schedules, finetuning and the checks --------------------------------------------------------------


def test_initial_weights_and_their_new_draw():
    """sqrt(2 / fan_in) of each layer, by hand for ResNet-20; reinit draws others of the same distribution."""
    f = gm.Network(models.build("resnet20"))
    w, normal = f.views(gm.signed_constant(f)), f.views(gm.kaiming_normal(f))
    for name, std in (("conv1", 0.2721655), ("layer2.2.conv2", 0.0833333), ("fc", 0.1767767)):
        assert torch.allclose(w[f"{name}.weight"].abs(), torch.tensor(std), atol=1e-6)
        assert abs(w[f"{name}.weight"].sign().mean()) < 0.2
        assert normal[f"{name}.weight"].std().item() == pytest.approx(std, rel=0.1)
    assert torch.equal(gm.given(f), f.vector())
    w = gm.mine(f, (torch.randn(2, 3, 8, 8), torch.arange(2)), sparsity=0.5, epochs=1, seed=1).w
    drawn = gm.reinit(f, seed=1)
    assert torch.equal(drawn.abs(), w.abs())
    assert (drawn == w).float().mean() == pytest.approx(0.5, abs=0.01)  # of the same seed, but not the same
    assert torch.equal(drawn, gm.reinit(f, seed=1))
    assert len(gm.reinit(f, gm.kaiming_normal).unique()) > 1000


def test_schedules_are_torchs_cosine_and_table_15():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
    for j in range(1, 31):
        assert gm.cosine(0.1, j, 30) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()
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
    for bad in ((w, m[:1]), (w[:1], m), (w, 0 * m + 0.5)):
        with pytest.raises(gm.InputError, match="vectors of 42 numbers"):
            gm.finetune(model, *bad, batches, epochs=1)


def test_shuffling_keeps_the_counts_of_the_layers():
    f = gm.Network(models.build("resnet20"))
    torch.manual_seed(0)
    m = (torch.rand(f.d) < 0.1).float()
    mixed = gm.shuffle(f, m, seed=1)
    assert f.counts(mixed) == f.counts(m)
    assert torch.equal(mixed, gm.shuffle(f, m, seed=1))
    assert not torch.equal(mixed, gm.shuffle(f, m, seed=2))
    assert (mixed * m).sum() / m.sum() == pytest.approx(0.1, abs=0.02)  # places in common by chance


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
    with pytest.raises(gm.InputError, match="batches"):  # after a good one
        gm.reestimate(net, v, [(parts[0], torch.zeros(20)), parts[1], parts[2]])
    net[1].train = lambda mode: net[1]  # frozen by its owner
    gm.reestimate(net, v, [(parts[2], torch.zeros(20))])
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
    assert [len(y) for _, y in gm.Batches(split, (mean, std), 3, train=True)] == [3, 3, 4]  # BatchNorm fails on one


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


def no_network(monkeypatch):
    def urlopen(*args, **kw):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)


def test_cifar10_comes_from_elsewhere_if_a_mirror_fails(monkeypatch):
    asked = []

    class CIFAR10:
        url, classes = "the original host", list("abcdefghij")

        def __init__(self, root, train, download):
            asked.append(self.url)
            if self.url != "the original host":
                raise RuntimeError("not what it should be: its md5 is another")
            self.data, self.targets = torch.full((3, 32, 32, 3), int(train), dtype=torch.uint8).numpy(), [2, 1, 0]

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", CIFAR10)
    data = gm.load_data("cifar10", "data")
    assert len(asked) == 3
    assert (data.classes, data.pad, data.test.y.tolist()) == (10, 4, [2, 1, 0])
    assert data.train.x.all()
    assert not data.test.x.any()


def test_tinyimagenet_from_its_zip(tmp_path, monkeypatch):
    jpeg, wnids = io.BytesIO(), ("n01443537", "n01629819")
    picture(0, (64, 64)).save(jpeg, "JPEG")
    with zipfile.ZipFile(tmp_path / "tiny-imagenet-200.zip", "w") as file:
        for wnid, i in itertools.product(wnids, range(2)):
            file.writestr(f"tiny-imagenet-200/train/{wnid}/images/{wnid}_{i}.JPEG", jpeg.getvalue())
        for i in range(3):
            file.writestr(f"tiny-imagenet-200/val/images/val_{i}.JPEG", jpeg.getvalue())
        labels = "".join(f"val_{i}.JPEG\t{wnids[k]}\t0\t0\t9\t9\n" for i, k in enumerate((1, 0, 1)))
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
    no_network(monkeypatch)
    with pytest.warns(UserWarning, match="2 categories, not 101"):
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
    (tmp_path / "val" / "dog" / "003.png").unlink()
    assert [len(gm.load_data(f"folder:{tmp_path}", None, held_out=out).test.y) for out in (False, True)] == [8, 7]
    shutil.rmtree(tmp_path / "test" / "dog")  # no labels: val serves, also as the validation set
    with pytest.warns(UserWarning, match="test is left out"):
        for out in (False, True):
            data = gm.load_data(f"folder:{tmp_path}", None, held_out=out)
            assert (len(data.train.y), len(data.test.y)) == (12, 7)
    shutil.rmtree(tmp_path / "test")
    assert len(gm.load_data(f"folder:{tmp_path}", None).test.y) == 7


def test_folders_as_people_have_them(tmp_path):
    """Hidden files, other files, links, and pictures that a camera took turned."""
    make_folder(tmp_path)
    for hidden in (".ipynb_checkpoints/000.png", "dog/.ipynb_checkpoints/000.png", "dog/._000.png", "dog/@eaDir/0.png"):
        (tmp_path / "train" / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / "train" / hidden).write_bytes(b"not a picture")
    for other in ("cat/1.jfif", "cat/2.GIF", "5.png"):
        (tmp_path / "train" / other).touch()
    (tmp_path / "train" / "dog").rename(tmp_path / "dog")
    (tmp_path / "train" / "dog").mkdir()
    (tmp_path / "train" / "dog" / "link").symlink_to(tmp_path / "dog")
    (tmp_path / "dog" / "000.png").unlink()
    for orientation, turn, kind in ((3, 180, "png"), (6, 90, "png"), (8, -90, "png"), (6, 90, "tif")):
        exif, path = tv_folder.Image.Exif(), tmp_path / "dog" / f"000.{kind}"
        exif[0x0112] = orientation
        picture(7).rotate(turn).save(path, exif=exif)
        with pytest.warns(UserWarning, match="3 files"):
            data = gm.load_data(f"folder:{tmp_path}", None)
        path.unlink()
        assert (data.classes, len(data.train.y)) == (2, 12)
        assert torch.equal(data.train.x[6], tv.pil_to_tensor(picture(7)).permute(1, 2, 0))


# --- the paper's settings -------------------------------------------------------------------------------------


def test_settings_are_the_papers():
    at = gm.paper_setting
    assert at("resnet20", "cifar10", 0.0144)[3:] == (150, 128, 5, "sgd", 0.1, 1e-4, 0.01, (80, 120))
    assert at("resnet20", "cifar10", 0.6)[3:] == (150, 128, 8, "sgd", 0.05, 1e-8, 0.1, (80, 120))
    assert at("resnet20", "cifar10", 0.03).sparsity == 0.0373
    assert at("resnet20", "cifar10", 0.0096).sparsity == 0.0144  # by ratio
    assert at("mobilenetv2", "cifar10", 0.0144).lam == 1.5e-5
    assert at("vgg16", "cifar10", 0.01).optimizer == "adam"
    assert at("resnet18", "tinyimagenet", 0.05)[3:8] == (200, 256, 5, "adam", 0.001)
    assert at("resnet50", "caltech101", 0.05)[3:] == (50, 16, 5, "adam", 0.01, 1e-6, 1e-4, (20, 40))
    assert at("resnet20", "folder:x", 0.0144).dataset == "cifar10"
    assert at("resnet32", "cifar100", 0.05).model == "resnet20"


def settings(flags):
    return gm.complete(gm.arguments(gm.parser(), shlex.split(flags)))


@pytest.mark.parametrize("flags, period, lr, lam", [
    ("", 5, 0.1, 1e-4), ("--sparsity 0.0145", 5, 0.1, 1e-4), ("--epochs 150", 5, 0.1, 1e-4),
    ("--epochs 60 --lam 0.5", 2, 0.1, 0.5), ("--epochs 20", 1, 0.75, "auto"), ("--epochs 1", 1, 1.0, "auto"),
    ("--epochs 20 --lr 0.3", 1, 0.3, "auto"), ("--epochs 3000 --period 150", 150, 0.1, "auto"),
    ("--sparsity 0.03", 5, 0.1, "auto"), ("--batch-size 64", 5, 0.1, "auto"), ("--lam auto", 5, 0.1, "auto"),
    ("--dataset cifar100", 5, 0.1, "auto"), ("--dataset shapes", 1, 0.5, 2e-4),
    ("--model vgg16 --epochs 20", 1, 0.01, 1e-6), ("--epochs 20 --penalty l1", 1, 0.1, 1e-4),
])  # fmt: skip
def test_period_rate_and_lambda_where_not_given(flags, period, lr, lam):
    """The period scales with the epochs; lambda is the paper's in its own runs alone; where it is auto, lr grows."""
    args = settings(flags)
    assert (args.period, args.lr, args.lam) == (period, pytest.approx(lr), lam)


# --- the command line -----------------------------------------------------------------------------------------


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


def test_a_run_leaves_and_shows_its_figures(finished):
    files = "mine.pt finetune.pt shuffle.pt reinit.pt mine-inverted.pt invert.pt gem.pt log.jsonl result.json"
    assert {path.name for path in finished.out.iterdir()} == set(files.split())
    result, rows, kept = finished.result, finished.rows, round(0.3 * 267_824)
    phases = ["mine", "finetune", "shuffle", "reinit", "mine inverted", "invert"]
    assert [(row["phase"], row["epoch"]) for row in rows] == [(phase, j) for phase in phases for j in (1, 2)]
    assert len({row["loss"] for row in rows if "mine" not in row["phase"]}) == 8  # each check trains something else
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
    assert {"model", "dataset", "method", "sparsity", "epochs", "seed", "torch", "processor", "commit"} < set(result)
    assert "80,347 of 267,824 weights: 30.000%" in finished.shown
    first = re.compile("(phase|mine|finetune|shuffle|reinit|invert) ")
    assert len({len(line) for line in finished.shown.splitlines() if first.match(line)}) == 1  # columns
    assert finished.said.count("\n") == finished.said.count("warning: no weight is left")


def test_the_gem_loads_into_a_plain_module(finished, pictures):
    """Each network in gem.pt gives the accuracy that was reported, and holds what its name says."""
    gem, data = finished.gem, gm.load_data(f"folder:{pictures}", None)
    test = gm.Batches(data.test, gm.pixel_stats(data.train.x), 1000)
    model = models.build(gem["model"], **gem["build"])
    for part, acc in (("gem", "pre_finetune_acc"), ("finetuned", "post_finetune_acc")):
        model.load_state_dict(gem[part])
        assert gm.accuracy(model, test) == pytest.approx(finished.result[acc], abs=1e-4)
    model.load_state_dict(gem["initial"])
    assert not model.bn1.running_mean.any()  # as built
    assert same([gem["mean"], gem["std"]], [test.mean, test.std])
    assert sum(int(m.sum()) for m in gem["mask"].values()) == 80_347
    for name, m in gem["mask"].items():
        p, w = gem["scores"][name], gem["initial"][name]
        assert 0 <= p.min() <= p.max() <= 1
        assert len(w.unique()) == 2  # +c and -c, untouched
        assert torch.equal(gem["gem"][name], w * ((p >= 0.5) & gem["q"][name]))
        assert not gem["finetuned"][name][~m].any()
    assert not torch.equal(gem["gem"]["bn1.running_var"], gem["finetuned"]["bn1.running_var"])
    f, stats = gm.Network(model), gm.pixel_stats(data.train.x)
    model.load_state_dict(gem["gem"])
    gm.reestimate(f, f.vector(), gm.Batches(data.train, stats, 16, train=True, pad=4), seed=1)
    assert gm.accuracy(f, test) == finished.result["reestimated_acc"]


def stop_after(monkeypatch, n):
    """Ctrl-C right after the n-th time that a phase's file is written."""
    real, written = os.replace, []

    def replace(part, path):
        real(part, path)
        if str(path).endswith(".pt") and Path(path).name != "gem.pt":
            written.append(path)
            if len(written) == n:
                raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace)


def test_resumed_equals_uninterrupted(finished, pictures, tmp_path, monkeypatch, capsys):
    """Interrupted in and between phases, after 1, 4, 9 and 11 epochs, and killed with half a file written.

    The checks may be asked for later, and are not lost when they are not asked for again.
    """
    for flags, n in (("", 1), ("--resume", 3), ("--resume --checks", 5), ("--resume", 2)):
        with monkeypatch.context() as patch:
            stop_after(patch, n)
            assert gm.main(command(pictures, tmp_path, flags)) == 130
        assert "--resume" in capsys.readouterr().err

    def save_half(content, path, real=torch.save):
        real(content, path)
        os.truncate(path, path.stat().st_size // 2)
        raise SystemExit("killed")

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(torch, "save", save_half)
        gm.main(command(pictures, tmp_path, "--resume --checks"))
    for _ in range(2):  # the second time, nothing is left to do
        assert gm.main(command(pictures, tmp_path, "--resume")) == 0
        assert same(artefacts(tmp_path), artefacts(finished.out))


def test_every_check_starts_from_the_same_state(pictures, tmp_path, monkeypatch):
    """As the gem: also where weights are pretrained, which the model no longer holds when the inversion is mined."""
    built, seen, prepare = {}, {"mine": [], "finetune": []}, gm.prepare

    def pretrained(args):
        f, *data, _ = prepare(args)
        built.update({"w": f.vector(), **f.rest()})
        return f, *data, {"num_classes": 2, "affine": True}  # as for Caltech-101

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


@pytest.mark.parametrize("flags", [
    "--seed 2", "--period 2", "--bf16", "--optimizer adam", "--lam 0.1", "--lam auto", "--penalty l1",
    "--rounding random", "--finetune-mask m", "--finetune-lr 0.2", "--finetune-schedule cosine",
])  # fmt: skip
def test_every_flag_changes_mining_or_finetuning_alone(flags, finished, pictures, tmp_path):
    finetuning = flags.startswith("--finetune")
    assert gm.main(command(pictures, tmp_path, flags if finetuning else f"{flags} --finetune-epochs 0")) == 0
    gem = artefacts(tmp_path)["gem"]
    assert same(gem["scores"], finished.gem["scores"]) == finetuning
    assert not finetuning or not same(gem["finetuned"], finished.gem["finetuned"])
    if "mask" in flags:
        assert same(gem["mask"], {name: (p >= 0.5) & gem["q"][name] for name, p in gem["scores"].items()})


def test_testing_less_often_changes_nothing_else(finished, pictures, tmp_path):
    assert gm.main(command(pictures, tmp_path, "--eval-every 3")) == 0
    less = artefacts(tmp_path)
    assert [row["test_acc"] is None for row in less["rows"]] == [True, False, True, False]
    for row, often in zip(less["rows"], finished.rows):
        assert {**row, "test_acc": 0} == {**often, "test_acc": 0}
    assert less["result"]["post_finetune_acc"] == finished.result["post_finetune_acc"]
    assert same(less["gem"]["finetuned"], finished.gem["finetuned"])


def test_the_transfer_task_starts_from_pretrained_weights(monkeypatch):
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
    ("--sparsity abc", ["--sparsity", "abc"]), ("--sparsity nan", ["KEPT"]), ("--sparsity 1e-9", ["1e-09", "weights"]),
    ("--spar 0.1", ["--spar"]), ("--epochs 0", ["--epochs", "from 1"]), ("--lr nan", ["--lr"]), ("--lam -1", ["--lam"]),
    ("--period 3", ["--period 3", "--epochs 2"]), ("--batch-size 1", ["--batch-size", "from 2"]),
    ("--image-size 5000", ["4096"]), ("--checks --finetune-epochs 0", ["--checks", "1 or more"]),
    ("--model resnet21", ["resnet21", "vgg16"]), ("--model vgg16", ["vgg16", "8 pixels", "--image-size"]),
    ("--dataset mnist", ["mnist", "cifar10", "folder:PATH"]), ("--dataset folder:/nowhere", ["/nowhere", "'train'"]),
    ("--dataset shapes --image-size 16", ["--image-size"]), ("--device mps", ["mps", "--device cpu"]),
    ("--lam auto --penalty l1", ["--lam auto is for --optimizer sgd, --penalty l2"]),
    ("--resume", ["nothing to resume"]), ("--out {file}", ["cannot write"]), ("--out {file}/below", ["cannot write"]),
    ("--dataset cifar10 --data-dir {out}", ["cifar-10-python.tar.gz", "by hand", "--dataset shapes"]),
    ("--dataset caltech101 --data-dir {out}", ["101_ObjectCategories", "by hand"]),
])  # fmt: skip
def test_bad_flags(flags, words, pictures, tmp_path, capsys, monkeypatch):
    no_network(monkeypatch)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    (tmp_path / "file").touch()
    more = flags.format(file=tmp_path / "file", out=tmp_path / "data")
    refused(command(pictures, tmp_path / "run", more), capsys, *words)
    assert not (tmp_path / "run").exists()


def png_of_16_bits(path):
    """A picture with 16 bits a channel, which PIL calls RGB."""
    bits = [b"IHDR" + struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0), b"IDAT" + zlib.compress(bytes(8 * 49)), b"IEND"]
    png = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in bits]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(png))


@pytest.mark.parametrize("spoil, words", [
    (lambda root: picture(0, (8, 9)).save(root / "train/dog/001.png"), ["001.png", "9x8", "8x8", "--image-size"]),
    (lambda root: (root / "train/dog/001.png").write_bytes(b"\x89PNG"), ["cannot read", "001.png", "remove it"]),
    (lambda root: tv_folder.Image.new("I;16", (8, 8)).save(root / "train/dog/1.tif"), ["1.tif", "8-bit RGB"]),
    (lambda root: png_of_16_bits(root / "train/dog/001.png"), ["001.png", "8-bit RGB"]),
    (lambda root: (root / "train/cow").mkdir(), ["'cow'", "same class folders"]),
    (lambda root: [(root / part / "cow").mkdir() for part in ("train", "test")], ["cow has no picture"]),
    (lambda root: [shutil.rmtree(root / part / "cat") for part in ("train", "test")], ["two classes or more"]),
    (lambda root: make_folder(root, 0, 2, (9, 9)), ["differ in size"]),
    (lambda root: None, ["4 training images are too few"]),
])  # fmt: skip
def test_bad_folders(spoil, words, tmp_path, capsys):
    spoil(make_folder(tmp_path, train=2, test=2))
    refused(command(tmp_path, tmp_path / "run", "--val"), capsys, *words)


class Evil:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_bad_run_folders(finished, pictures, tmp_path, capsys, monkeypatch):
    """Another run's, an older program's, and damaged files: these are named, and never executed."""
    run, evil, other = tmp_path / "run", tmp_path / "evil", tmp_path / "other"
    shutil.copytree(finished.out, run)
    argv = command(pictures, run)
    refused(argv, capsys, "already holds a run", "--resume")
    refused([*argv, "--resume", "--sparsity", "0.05"], capsys, "--sparsity is 0.3", "not 0.05")
    image = pictures / "train" / "cat" / "000.png"
    content = image.read_bytes()
    picture(77).save(image)
    refused([*argv, "--resume"], capsys, "finetune.pt", "set of images")
    image.write_bytes(content)
    other.mkdir()
    (other / "log.jsonl").write_text("of another program")
    refused(command(pictures, other), capsys, "already holds")
    assert (other / "log.jsonl").read_text() == "of another program"

    # With --resume it goes on, as where the only phase's file was damaged, and therefore deleted.
    assert gm.main(command(pictures, other, "--resume --epochs 1 --finetune-epochs 0")) == 0
    assert "finetuned" not in artefacts(other)["gem"]

    # A gem can be finetuned later: mining does not depend on how.
    mined = (other / "mine.pt").stat().st_mtime_ns
    assert gm.main(command(pictures, other, "--resume --epochs 1")) == 0
    assert (other / "mine.pt").stat().st_mtime_ns == mined
    refused(command(pictures, other, "--resume --epochs 1 --finetune-lr 0.2"), capsys, "finetune.pt", "--finetune-lr")
    assert "finetuned" in artefacts(other)["gem"]
    path = run / "finetune.pt"
    content = path.read_bytes()
    torch.save({"settings": Evil(evil)}, tmp_path / "evil.pt")
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    for damaged in (b"", content[:1000], flipped, (tmp_path / "evil.pt").read_bytes()):
        path.write_bytes(damaged)
        refused([*argv, "--resume"], capsys, "finetune.pt is damaged")
        assert not evil.exists()
    path.write_bytes(content)

    def full(*args, **kw):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "load", full)
    refused([*argv, "--resume"], capsys, "out of memory: try")  # and not: damaged, delete it


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


# --- baselines.py: pruning at initialisation ----------------------------------------------------------------------


@torch.no_grad()
def central_differences(function, c, h=1e-5):
    steps = h * torch.eye(len(c), dtype=c.dtype)
    return torch.stack([(function(c + e) - function(c - e)) / (2 * h) for e in steps])


def test_snip_is_the_change_of_the_loss():
    x, y = tiny_batches(1)[0]
    f = gm.Network(tiny()).eval()
    w = f.vector()
    slopes = central_differences(lambda c: F.cross_entropy(f(c * w, x), y), torch.ones_like(w))
    assert torch.allclose(bl.snip(f, w, lambda: iter([(x, y)])), slopes.abs(), atol=1e-8)
    with pytest.raises(FloatingPointError, match="snip's scores are not finite"):
        bl.at_init(f, [(x * math.nan, y)], score="snip", sparsity=0.5)


@pytest.mark.parametrize("k", [1, 5, 100])
def test_grasp_is_w_times_hessian_times_gradient(k):
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


def test_synflow_conserves_the_sum_of_scores():
    """In a sequential network, every layer's scores sum to R, which is computed by hand; also of a masked network."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten()]
    f = gm.Network(nn.Sequential(*layers, nn.Linear(96, 5)).double())
    w = gm.kaiming_normal(f) * (torch.rand(f.d) < 0.5)
    p = bl.synflow(f, w, lambda: iter([(torch.randn(2, 3, 4, 4), None)]))
    first, last = f.views(w.abs()).values()
    x = F.conv2d(torch.ones(1, 3, 4, 4).double(), first, padding=1) * (1 + 1e-5) ** -0.5
    R = (x.flatten(1) @ last.T).sum()
    for part in p.split(f.sizes):
        assert torch.isclose(part.sum(), R, rtol=1e-9)


def test_synflow_takes_biases_as_absolute_values():
    f, scores = gm.Network(tiny()), []
    f.model.register_buffer("attention", torch.tensor([True]))  # has no absolute value
    for bias in ([1.0, 2.0], [-1.0, -2.0]):
        f.restore({"conv.bias": torch.tensor(bias)})
        scores.append(bl.synflow(f, f.vector(), lambda: iter(tiny_batches())))
    assert torch.equal(*scores)
    assert scores[0].min() > 0


def test_synflow_prunes_in_100_exponential_steps(monkeypatch):
    """In float64, since R overflows float32 on some networks."""
    left = []

    def score(f, v, batches):
        assert v.dtype == torch.float64
        left.append(int(v.count_nonzero()))
        return v.abs()

    monkeypatch.setitem(bl.SCORES, "synflow", bl.SCORES["synflow"]._replace(score=score))
    gem = bl.at_init(nn.Linear(100, 100), tiny_batches(), score="synflow", sparsity=0.0144)
    assert gem.p.dtype == torch.float64  # float32 overflows on ResNet-50
    expected = [10_000 * 0.0144 ** (k / 100) for k in range(101)]
    assert [*left, int(gem.m.sum())] == pytest.approx(expected, abs=1)


def test_prospr_without_steps_is_snip():
    """On a network without BatchNorm, whose statistics the two take from different places. In float64, in any case."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 3))
    f, batches = gm.Network(copy.deepcopy(model).double()), tiny_batches(1)
    p = bl.prospr(f, f.vector(), lambda: iter(batches), K=0)
    assert torch.allclose(p, bl.snip(f, f.vector(), lambda: iter(batches)))
    kw = {"score": "prospr", "sparsity": 0.05, "init": gm.given}
    single, double = (bl.at_init(net, batches, **kw) for net in (model, f))
    assert torch.equal(single.p, double.p)


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
def test_scored_methods_keep_the_authors_counts(method, counts, monkeypatch):
    monkeypatch.setitem(bl.SCORES, method, bl.SCORES[method]._replace(score=bl.random, rounds=3))
    f = gm.Network(models.build("resnet20"))
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


# --- baselines.py: what all methods share ------------------------------------------------------------------------

SEARCHES = {
    "imp": partial(bl.imp, sparsity=0.5, epochs=3, rewind=1),
    "ep": partial(bl.edge_popup, sparsity=0.5, epochs=2),
    "sr": partial(bl.smart_ratio_ticket, sparsity=0.5),
    **{name: partial(bl.at_init, score=name, sparsity=0.5) for name in bl.SCORES},
}


@pytest.mark.parametrize("name", SEARCHES)
def test_the_seed_alone_fixes_every_method(name):
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
    (partial(bl.imp, sparsity=0.5, epochs=9, rewind=13), "no step 13 to rewind to: a round has 12"),
    (partial(bl.at_init, sparsity=0.5, score="sinp"), "the scores are snip, grasp, .*, not 'sinp'"),
    (partial(bl.at_init, sparsity=10, score="snip"), "not 10"),
    (partial(bl.edge_popup, sparsity=0, epochs=2), "not 0"),
    (partial(bl.smart_ratio_ticket, sparsity=0.1), "30% of the last layer: take a sparsity above 0.17, not 0.1"),
    (partial(bl.smart_ratio_ticket, sparsity=14.4), "not 14.4"),
])  # fmt: skip
def test_what_a_method_cannot_do_is_refused(search, word):
    with pytest.raises(gm.InputError, match=word):
        search(tiny(), tiny_batches())


# --- baselines.py: edge-popup ------------------------------------------------------------------------------------


def top(p, n, descending=True):
    """1 for the n largest |p|."""
    return torch.zeros_like(p).scatter(0, p.abs().argsort(descending=descending)[:n], 1)


@pytest.mark.parametrize("variant", [{}, {"whole": True}, {"period": 1, "regularize": True}, {"invert": True}])
def test_edge_popup_is_sgd_on_scores(variant):
    """On those of a plain module: |p|, the top of each layer, momentum 0.9, weight decay 5e-4, cosine.

    The gradient of a score is that of the effective weight times w times p's sign. regularize: with lambda = 1e-4, so
    2e-4 more weight decay. period: with E = 4 and T = 1, three steps of 0.4^(1/3), the first in two epochs.
    """
    batches, E, lr, s = tiny_batches(), 4, 2.0, 0.4
    f = gm.Network(tiny())
    w = gm.draw(f, gm.signed_constant, 0)
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


def test_edge_popup_keeps_the_authors_counts():
    """Of each layer; and of each epoch, if gradual, where they never grow, and never fall below the target."""
    f, data = gm.Network(models.build("resnet20")), (torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))
    gem = bl.edge_popup(f, data, sparsity=0.005, epochs=1)
    assert list(f.counts(gem.m).values()) == [3, *[12] * 6, 24, *[47] * 5, 93, *[185] * 5, 4]
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

    gem = bl.imp(models.build("resnet20"), tiny_batches(), sparsity=0.8**29, epochs=29, phase=phase)
    assert [*kept, int(gem.m.sum())] == [
        268336, 214667, 171732, 137384, 109906, 87923, 70337, 56268, 45013, 36009, 28806, 23043, 18433, 14745, 11795,
        9435, 7547, 6036, 4827, 3860, 3087, 2468, 1973, 1577, 1260, 1007, 804, 642, 512, 408,
    ]  # fmt: skip
    rounds = [bl.imp_rounds(s) for s in (0.5, 0.1374, 0.0373, 0.0144, 0.0059, 0.8, 0.89)]
    assert rounds == [3, 9, 15, 19, 23, 1, 1]
    with pytest.raises(gm.InputError, match="no step 13 to rewind to: a round has 12"):  # before any epoch
        bl.imp(models.build("resnet20"), grey_levels(32), sparsity=0.5, epochs=9, rewind=13, phase=None)


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
    w = gm.draw(gm.Network(tiny()), gm.kaiming_normal, 0)
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


# --- baselines.py: smart ratio -----------------------------------------------------------------------------------


def test_smart_ratio_is_the_hand_computed_one():
    """For ResNet-20 as the authors' own file lists it; for VGG-16 the first layer carries over what exceeds it."""
    f = gm.Network(models.build("resnet20"))
    p = bl.smart_ratio(f.sizes, 0.0144)
    assert [p[0], p[18], p[19]] == pytest.approx([0.10079916, 0.00143999, 0.3], abs=1e-8)
    kept = [43, 210, 189, 169, 150, 132, 116, 201, 345, 291, 243, 199, 159, 247, 371, 265, 176, 106, 53, 192]
    gem = bl.smart_ratio_ticket(f, tiny_batches(), sparsity=0.0144)
    assert list(f.counts(gem.m).values()) == kept
    assert bl.smart_ratio_ticket(f, tiny_batches(), sparsity=0.5).m.sum() == 134_160  # as both originals keep
    with torch.device("meta"):
        sizes = gm.Network(models.build("vgg16")).sizes
    p = bl.smart_ratio(sizes, 0.005, vgg=True)
    assert [p[0], p[1], p[12]] == pytest.approx([1, 0.29080379, 0.00021662], abs=1e-8)
    kept = [1728, 10720, 7797, 7422, 7917, 8997, 5288, 6297, 7464, 4318, 2379, 1199, 511, 1536]
    assert [int(n * x + 1e-6) for n, x in zip(sizes, p)] == kept


def test_the_grid_around_imp_holds_the_authors_best():
    f = gm.Network(models.build("resnet20"))
    kept = [194, 244, 227, 201, 179, 182, 166, 285, 300, 308, 221, 186, 158, 217, 171, 124, 128, 116, 81, 172]
    best = [54.907, 11.590, 10.852, 8.724, 7.769, 7.899, 6.205, 5.185, 3.255, 3.342, 2.398, 2.018, 1.714, 1.177, 0.5639,
            0.3364, 0.3472, 0.3147, 0.1197, 16.875]  # fmt: skip
    grid = bl.ratio_grid([k / n for k, n in zip(kept, f.sizes)])
    assert len(grid) == 144
    assert len(set(map(tuple, grid))) == 144
    assert sum(100 * torch.tensor(p) == pytest.approx(best, abs=1e-3) for p in grid) == 1
    for L, n in ((2, 2), (3, 2), (14, 36), (58, 96)):  # networks of other depths, where some sets coincide
        other = torch.tensor(bl.ratio_grid([0.0, *[0.5] * (L - 2), 1.0]))
        assert other.shape == other.unique(dim=0).shape == (n, L)
        assert 0 <= other.min() <= other.max() <= 1


def test_equation_1_moves_densities_downhill():
    """The mean loss over masks of signed constants falls, and nothing else changes."""
    torch.manual_seed(0)
    x = torch.randn(400, 6)
    y = (x @ torch.tensor([1.0, -1, 1, 1, -1, 1]) > 0).long()
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 2, bias=False), nn.BatchNorm1d(2))
    f, start = gm.Network(model), [0.3, 0.6]
    before, given, w = f.rest(), f.vector(), gm.draw(f, gm.signed_constant, 0)

    def watch(row, v, state):
        assert torch.equal(v.abs(), w.abs() * (v != 0))  # kept whole or not at all
        assert row["lr"] == 0.02

    tuned = bl.tune_densities(f, [(x, y)] * 20, start, epochs=5, lr=0.02, on_epoch=watch)
    assert same([f.rest(), f.vector()], [before, given])

    def expected_loss(p, n=400):
        torch.manual_seed(1)
        masks = torch.rand(n, f.d) < torch.tensor(p).repeat_interleave(torch.tensor(f.sizes))
        f.train()
        return sum(F.cross_entropy(f(w * m, x), y).item() for m in masks) / n

    assert expected_loss(tuned) < expected_loss(start) - 0.01
    boxed = bl.tune_densities(f, [(x, y)] * 2, start, epochs=1, lr=1e6)
    assert set(boxed) <= {0.0, 1.0}


def test_sr_v4_takes_the_trial_that_held_out_images_prefer(monkeypatch):
    """They are a tenth of the training images, neither cropped nor flipped."""
    f = gm.Network(nn.Sequential(*[nn.Linear(20, 20) for _ in range(20)], nn.BatchNorm1d(20)))
    w, fresh = gm.draw(f, gm.kaiming_normal, 0), f.rest()
    masks, trained, accs = [], [], iter([10.0, 30.0, 20.0])

    def phase(name, method, f, w, m, data, **kw):
        assert [name, kw["epochs"], data.train, data.pad] == [f"trial {len(masks)}", 2, True, 2]
        assert same(f.rest(), fresh)
        f.model[20].running_mean += 1
        masks.append(m)
        trained.append(set(data.y.tolist()))
        return w * m

    def accuracy(f, data, v):
        [(x, y)] = data
        assert torch.equal(v, w * masks[-1])
        assert sorted([*y.tolist(), *trained[-1]]) == list(range(40))
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
    "sr5": ("sr --version 5 --epochs 2 --lr 0.01 --from {home}/ep", 2, None, [0.1, 0.01]),
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
    f = gm.Network(models.build("resnet20", 2))
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
        f = gm.Network(models.build("vgg16"))
    assert bl.densities(vgg, f) == bl.smart_ratio(f.sizes, 0.4, vgg=True)


@pytest.mark.parametrize("name, stops", [("imp", (1, 4)), ("ep", (1, 2)), ("sr4", (2,)), ("sr5", (1,))])
def test_every_method_resumes_to_the_same_bits(name, stops, done, pictures, tmp_path, monkeypatch):
    """Interrupted in and between phases: for imp before the rewinding point and in the second round.

    Whether the gem will be finetuned can be left open until then.
    """
    argv, more = baseline(pictures, tmp_path, RUNS[name][0].format(home=done)), ["--finetune-epochs", "0"]
    for n in stops:
        with monkeypatch.context() as patch:
            stop_after(patch, n)
            assert bl.main(argv + more) == 130
        more = ["--resume"]
    assert bl.main(argv + more) == 0
    assert same(artefacts(tmp_path), artefacts(done / name))


def test_the_test_set_chooses_nothing(done, pictures, tmp_path):
    """Of SR-v4's trials, either: the same training images with other test images give the same mask."""
    other = make_folder(tmp_path, train=16, test=10)
    for i, path in enumerate(sorted((other / "test").glob("*/*.png"))):
        picture(1000 + 7 * i).save(path)
    assert bl.main(baseline(other, tmp_path / "run", RUNS["sr4"][0].format(home=done))) == 0
    assert same(artefacts(tmp_path / "run")["gem"]["mask"], artefacts(done / "sr4")["gem"]["mask"])


@pytest.mark.parametrize("flags, lr", [("", 0.1), ("--epochs 20", 0.75), ("--epochs 20 --lr 0.3", 0.3)])
def test_edge_popups_scores_are_as_quick_as_gem_miners(flags, lr):
    assert bl.complete(["ep", *flags.split()]).lr == pytest.approx(lr)


@pytest.mark.parametrize("flags, words", [
    ("imp --rewind -1", ["--rewind", "from 0"]), ("imp --rewind 9 --round-epochs 2", ["step 9", "has 8"]),
    ("dense --checks", ["--checks"]), ("lrr --checks", ["--checks"]), ("sr --version 7", ["--version"]),
    ("sr --sparsity 1e-4", ["30%", "above 0.00014"]), ("sr --version 4", ["IMP", "--from"]), ("nonsense", ["nonsense"]),
    ("sr --version 2 --from /nowhere", ["/nowhere", "gem.pt"]), ("sr --trials 0", ["--trials", "from 1"]),
    ("sr --version 2 --from ~nobody9", ["~nobody9", "gem.pt"]),
    ("sr --version 2 --from {home}/snip --model resnet32", ["not a gem of this network", "snip"]),
    ("sr --version 2 --from {home}/snip --sparsity 0.2", ["is of --sparsity 0.4", "another --from"]),
    ("sr --checks invert", ["the checks of sr are shuffle and reinit"]),
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
    assert last == f"# to do: {len(runs)} runs, {sum(costs):,} epochs"
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
    ("table2", ["--finetune-epochs 200", "--checks shuffle reinit"]), ("fig2 --epochs 30", ["--lam 0.00015"]),
    ("table3 --model resnet20 --model wrn28_2", ["--model resnet20", "--model wrn28_2 --dataset cifar10"]),
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
    assert not any("not run" in cells for cells in rows.values())
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
    assert rows["Gem-Miner", "resnet20", "40%"] == ["not run", "none", "not run", "not run", "none"]

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
    (80.0, None, ["yes", "no random run", "yes"]),
])  # fmt: skip
def test_the_ticks_of_table_1(after, shuffled, expected):
    checks = {"shuffle": {"passed": None in (after, shuffled) or gm.clearly_above(after, shuffled, 10_000)}}
    result = {"method": "snip", "post_finetune_acc": after, "pre_finetune_acc": 10.0,
              "random_acc": shuffled and 60.0, "images": [50_000, 10_000], "checks": checks}  # fmt: skip
    assert [bl.cell(bl.COLUMNS[tick], [result]) for tick in bl.TICKS] == expected
    assert bl.COLUMNS["at initialisation"]({"method": "imp", "rewind": 1000}) == "no"


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
        listed = printed(capsys, *argv, "--dry-run")
        assert listed.count("# complete: python") == 4
        assert listed.endswith("# to do: 0 runs, 0 epochs\n")
        other = ["paper", *argv, "--batch-size", "16"]
        refused(other, capsys, "--batch-size is 32, not 16", "another --out", program=bl)
    path = paths[1] / "result.json"
    path.write_text(path.read_text()[:-9])
    assert printed(capsys, *argv) == out
    path.write_text(json.dumps(json.loads(path.read_text()) | {"images": [1]}))
    refused(["paper", *argv], capsys, "not all on the same images", program=bl)


def test_a_run_that_cannot_be_made_leaves_the_others(pictures, tmp_path, capsys):
    """Smart ratio on ResNet-20 at 0.01%."""
    flags = f"--dataset folder:{pictures} --epochs 1 --batch-size 32 --finetune-epochs 0 --out {tmp_path}".split()
    assert bl.main(["paper", "fig9", "--model", "resnet20", "--sparsity", "0.0001", *flags]) == 2
    out, err = capsys.readouterr()
    assert "30% of the last layer" in err.splitlines()[-1]
    assert "1 of 6 runs could not be made" in err.splitlines()[-1]
    assert [row[0] for row, cells in table(out).items() if cells[0] == "not run"] == ["SR"]


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


def test_the_readmes_and_the_headers_commands_are_understood(tmp_path, monkeypatch):
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


# --- several processes ----------------------------------------------------------------------------------------

TOGETHER = """
import copy, sys, torch
import torch.distributed as dist
import gem_miner as gm

def result(join):
    torch.manual_seed(0)
    x, y, states = torch.randn(22, 4), torch.arange(22) % 3, []
    f = gm.Network(torch.nn.Sequential(torch.nn.Linear(4, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3)))
    if join:
        f.rank, f.world = dist.get_rank(), dist.get_world_size()
    how = {"sparsity": 0.3, "epochs": 4, "batch_size": 7, "lr": 1.0}  # batches of 7, 7 and 8
    gem = gm.mine(f, (x, y), **how, on_epoch=lambda row, v, state: states.append((row, copy.deepcopy(state))))
    assert torch.equal(gem.p, gm.mine(f, (x, y), **how, state=states[1][1]).p)
    w = gm.finetune(f, gem.w, gem.q, (x, y), epochs=2, batch_size=7, lr=0.1)
    rows = torch.tensor([[row["loss"], row["train_acc"]] for row, _ in states])
    return [gem.p, gem.q, w, *f.others().values(), rows]

def same_everywhere(tensors):
    ends = [None] * dist.get_world_size()
    dist.all_gather_object(ends, [t.tolist() for t in tensors])
    assert all(end == ends[0] for end in ends)

alone = result(join=False)
seen, report = [], gm.report
def watched(run, args, gem, *rest):
    seen.extend([gem.p, *run.f.state_dict().values()])
    report(run, args, gem, *rest)
gm.report = watched
run = "--model resnet20 --epochs 1 --batch-size 16 --sparsity 0.3 --device cpu".split() + sys.argv[1:]
assert gm.main(run) == gm.main([*run, "--resume", "--checks", "shuffle"]) == 0
same_everywhere(seen)

together = result(join=True)
assert torch.equal(alone[1], together[1])
assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(alone, together)), (alone, together)
same_everywhere(together)
x, f = torch.randn(6, 4), gm.Network(torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3)))
dist.broadcast(x, 0)
f.rank, f.world = dist.get_rank(), dist.get_world_size()
gm.reestimate(f, f.vector(), (x, torch.zeros(6)))  # the shares are equal, so the mean of means is the mean
assert torch.allclose(f.model[0].running_mean, x.mean(0), atol=1e-6)
try:
    gm.mine(f, (x[:3], torch.arange(3)), sparsity=0.5, epochs=1)
    raise SystemExit("accepted a batch that is too small")
except gm.InputError as e:
    assert "too small" in str(e)
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
        model = models.build("resnet20", 2).to(device)
        gems.append(gm.mine(model, gm.Batches(split, stats, 8, train=True, pad=2), sparsity=0.5, epochs=1))
    assert torch.equal(gems[0].w, gems[1].w.cpu())
    assert (gems[0].p - gems[1].p.cpu()).abs().mean() < 1e-3
    assert (gems[0].q != gems[1].q.cpu()).float().mean() < 0.01


@needs_gpu
def test_gpu_compiled_equals_eager(exact):
    """As CUDA graphs, with a last batch that is smaller."""
    data = [(torch.randn(n, 3, 32, 32).cuda(), torch.arange(n).cuda() % 10) for n in (16, 16, 5)]
    model, ends = models.build("resnet20").cuda(), []
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
    model = models.build("resnet20").double()
    cpu = bl.at_init(model, data, score=score, sparsity=0.1)
    gpu = bl.at_init(model.cuda(), data, score=score, sparsity=0.1)
    assert gpu.m.is_cuda
    assert (cpu.m != gpu.m.cpu()).double().mean() < 0.001
