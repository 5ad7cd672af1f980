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
import pickle
import random
import re
import shlex
import shutil
import socket
import subprocess
import sys
import types
from collections import OrderedDict
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
import torchvision
from PIL import Image
from torch import nn
from torch.distributed.run import main as torchrun
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.datasets import utils as tv_utils
from torchvision.models import VisionTransformer
from torchvision.transforms import functional as tv

import baselines as bl
import gem_miner as gm
import models

HERE = Path(gm.__file__).parent
torch.set_num_threads(1)  # the networks are tiny: more threads would wait for each other
pytestmark = pytest.mark.filterwarnings(
    "error:::(gem_miner|baselines|models)",  # our code warns of nothing,
    "ignore:no weight is left",  # but of what it means to say
)


X, Y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2])


def tiny():
    """d = 2 * 9 + 3 * 8 = 42, and a bias and an affine BatchNorm, which must never count."""
    torch.manual_seed(0)
    layers = {"conv": nn.Conv2d(1, 2, 3), "bn": nn.BatchNorm2d(2), "relu": nn.ReLU(), "flat": nn.Flatten()}
    return nn.Sequential(OrderedDict(layers, fc=nn.Linear(8, 3, bias=False))).double()


def tiny_batches(n=4):
    gen = torch.Generator().manual_seed(1)
    xs = torch.randn(n, 8, 1, 4, 4, generator=gen, dtype=torch.float64)
    return list(zip(xs, torch.randint(3, (n, 8), generator=gen)))


def same(a, b):
    """Whether nested dicts and lists of tensors and plain values are equal to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


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
    f = gm.Network(model)
    assert (f.d, len(f.names)) == (d, tensors)
    assert f"{d:,}" in models.__doc__
    assert sum(p.numel() for p in model.parameters()) == d  # no bias, and no affine BatchNorm
    assert model(x).shape == (2, classes)


def test_bfloat16_is_autocast_of_every_layer():
    """Outputs, whatever their form, and gradients are those of plain autocast; the loss is computed in float32."""
    net, x, y = models.build("resnet20"), torch.randn(4, 3, 8, 8), torch.arange(4)
    f, full, v = gm.Network(net, bf16=True), gm.Network(net), gm.Network(net).vector().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        plain = torch.func.functional_call(net, f.views(v), (x,)).float()
    assert 0 < (plain - full(v, x)).abs().max() < 0.1 * plain.abs().max()
    gradient = torch.autograd.grad(F.cross_entropy(plain, y), v)[0]
    for wrap in (lambda out: [out], lambda out: (0, [out]), lambda out: {"logits": out}):
        with net.register_forward_hook(lambda layer, args, out: wrap(out)):
            [out] = [t for t in torch.utils._pytree.tree_leaves(f(v, x)) if torch.is_tensor(t)]
        assert out.dtype == torch.float32 and torch.equal(out, plain)
        assert torch.equal(torch.autograd.grad(F.cross_entropy(out, y), v)[0], gradient)


def test_compiled_equals_eager(monkeypatch):
    """Also what is trained besides the vector, and BatchNorm's statistics; a copy trains itself, not its original."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, **kw: compiler(call, dynamic=False, backend="eager"))  # is quick
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3))
    eager, original, ends = gm.Network(copy.deepcopy(net)), gm.Network(net, compile=True), []
    before = copy.deepcopy(net.state_dict())
    pickle.dumps(original)
    for f in (eager, copy.deepcopy(original), original):
        assert same(net.state_dict(), before)
        w = gm.finetune(f, f.vector(), torch.ones(f.d), [(X, Y)], epochs=2, lr=0.1)
        ends.append(torch.cat([w, *(t.flatten() for t in f.rest().values())]))
    assert all(torch.allclose(end, ends[0], atol=1e-5) for end in ends[1:])


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

    class Watched(list):
        def __iter__(self):
            for batch in super().__iter__():
                yield batch
                seen.append(waits.n)

    with waits:
        search(gm.Network(tiny()), Watched(tiny_batches()))
    assert seen[0] == seen[3] < waits.n  # the end of an epoch does read its figures, and is seen


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
    assert frozen.min() >= kept.max() if invert else frozen.max() <= kept.min()
    assert torch.equal(gm.freeze(p, q, 751, invert), q)
    if distinct == 0:
        assert new[:500].sum().item() == pytest.approx(250, abs=50)  # ties fall at random, not by position


@pytest.mark.parametrize("bad, word", [
    ({"sparsity": 0}, "sparsity"), ({"sparsity": 1.44}, "1.44"), ({"sparsity": 0.01}, "1/12"),
    ({"sparsity": math.nan}, "nan"), ({"period": 11}, "11"), ({"epochs": 0}, "epochs"), ({"lam": -1}, "lambda"),
    ({"optimizer": gm.adam}, "give lambda"), ({"norm": gm.l1}, "lambda"), ({"r": gm.round_random}, "lambda"),
    ({"train": iter([(X, Y)])}, "len"), ({"train": iter([(X, Y)]), "lam": 0}, "no batch"),  # spent after one epoch
    ({"train": (X, Y[:5])}, "length"), ({"train": (X.numpy(), Y.numpy())}, "from_numpy"), ({"train": None}, "data"),
    ({"train": ((X, Y), (X, Y))}, "tuple"), ({"train": (X, Y, Y)}, "tuple"), ({"train": [X, Y]}, "batch"),
    ({"train": torch.utils.data.TensorDataset(X, Y)}, "DataLoader"), ({"train": (X, Y.float())}, "criterion="),
    ({"train": (X, Y[:, None])}, "criterion="), ({"train": (X, Y.int())}, "criterion="),
    # Cross-entropy of a single output is 0: nothing would be learned, and nothing said.
    ({"model": nn.Linear(4, 1), "train": (X, X[:, :1])}, "criterion="), ({"train": (X, X[:, :3])}, "criterion="),
    ({"model": nn.Linear(4, 1), "train": (X, 0 * Y)}, "criterion="),
    ({"model": nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), "train": (X, X[:, 0])}, "criterion="),
    ({"model": nn.Embedding(5, 6)}, "nothing to prune"), ({"model": nn.Linear(4, 3).half()}, "bf16=True"),
    ({"model": nn.Linear(4, 3, dtype=torch.complex64)}, "float32"),
    ({"model": nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4).double())}, "float32"),
    ({"model": nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))}, "layer '0'"),
    ({"model": nn.Sequential(nn.utils.prune.identity(nn.Linear(4, 3), "weight"))}, "layer '0'.*prune.remove"),
])  # fmt: skip
def test_what_mine_cannot_use_is_refused(bad, word):
    kw = {"model": nn.Linear(4, 3), "train": (X, Y), "sparsity": 0.5, "epochs": 10, "period": 1}
    with pytest.raises(gm.InputError, match=word) as said:
        gm.mine(**kw | bad)
    assert "\n" not in str(said.value)


def test_lost_layers_are_named_and_what_is_not_finite_stops():
    """Also if it arises in the last step, so that no loss shows it."""
    with pytest.warns(UserWarning, match="conv.weight, fc.weight") as said:
        gem = gm.mine(tiny(), tiny_batches(), sparsity=0.5, epochs=4, period=1, lam=10.0)
    assert (len(said), gem.q.sum(), gem.m.sum()) == (1, 21, 0)
    [(x, y)], ones = tiny_batches(1), torch.ones(42).double()
    with pytest.raises(FloatingPointError, match="epoch 1"):
        gm.mine(tiny(), [(x, y)], sparsity=0.5, epochs=1, lam=1, norm=lambda p: (p * math.nan).sum())
    with pytest.raises(FloatingPointError, match="epoch 1"):
        gm.finetune(tiny(), ones, ones, [(x * math.nan, y)], epochs=1)


def test_the_seed_and_the_epoch_fix_all_that_is_random():
    """What the data draw (in a round of IMP anew, but not up to the rewinding point), and the order of batches."""
    drawn = []

    class Draws(list):
        def __iter__(self):
            drawn.append(torch.rand(1).item())
            return super().__iter__()

    data = Draws(tiny_batches(1))
    for seed in (0, 0, 1):
        gm.mine(tiny(), data, sparsity=0.5, epochs=3, lam=0, seed=seed)
        gm.finetune(tiny(), torch.ones(42).double(), torch.ones(42), data, epochs=3, seed=seed)
    assert drawn[:6] == drawn[6:12] and len(set(drawn)) == 12
    bl.imp(tiny(), data, sparsity=0.5, epochs=6, rewind=1)
    assert drawn[18] == drawn[19] and len(drawn[18:]) == 7 and len(set(drawn[18:])) == 6
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=2, shuffle=True)
    how = {"sparsity": 0.5, "epochs": 2, "lr": 1.0, "batch_size": 2, "lam": 0, "init": lambda f: torch.ones(12)}
    torch.manual_seed(0)
    model, in_order = nn.Linear(4, 3), list(zip(X.split(2), Y.split(2)))
    for data in (loader, (X, Y)):
        first, again, plain = (gm.mine(model, train, **how).p for train in (data, data, in_order))
        assert torch.equal(first, again) and not torch.equal(first, plain)


def test_numpys_numbers_are_numbers():
    """Of one seed, the same bits; and what on_epoch is given can be saved, and loaded with weights_only."""
    np, ends = pytest.importorskip("numpy"), []
    for whole, real in ((int, float), (np.int64, np.float64)):
        torch.manual_seed(0)
        model, states, file = nn.Linear(4, 3), [], io.BytesIO()
        how = {"epochs": whole(4), "lr": real(0.5), "seed": whole(7), "batch_size": whole(2)}
        how["on_epoch"] = lambda *seen: states.append(seen)
        gem = gm.mine(model, (X, Y), sparsity=real(0.5), period=whole(2), lam=real(0.1), optimizer=gm.adam, **how)
        v = gm.finetune(model, gem.w, gem.q, (X, Y), steps=whole(9), **how)
        torch.save(states, file)
        torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        ends.append([*gem, v, gm.reinit(gm.Network(model), seed=whole(7))])
    assert same(*ends)


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
        criterion=F.cross_entropy,  # also of one class
        on_epoch=lambda row, v, state: states.append(copy.deepcopy({**state, "row": row, "v": v})),
    )  # fmt: skip
    before = torch.ones(d, dtype=torch.bool)
    for j, state in enumerate(states, 1):
        p, q, m = state["learned"], state["q"].bool(), state["m"].bool()
        assert 0 <= p.min() <= p.max() <= 1
        assert not (q & ~before).any()  # what is frozen stays frozen
        assert q.sum() == (round(d * (n / d) ** (j / (E // T * T))) if j % T == 0 else before.sum())
        assert torch.equal(m, q & (p >= 0.5))
        assert torch.equal(state["v"], gem.w * m)
        assert (state["row"]["q"], state["row"]["m"]) == (q.sum(), m.sum())
        before = q
    assert gem.q.sum() == n


class OwnConv(nn.Conv2d):
    """As in weight standardisation: it takes its weight to be contiguous."""

    def forward(self, x):
        rows = self.weight.view(self.out_channels, -1)
        return self._conv_forward(x, (rows - rows.mean(1, keepdim=True)).view(self.weight.shape), self.bias)


class Odd(nn.Module):
    """A convolution of one's own, a layer that runs twice (the first time again in the backward pass), a frozen one,
    one that does not run, an empty one, dropout, and an output embedding that shares its weight with the tokens'.
    """

    def __init__(self):
        super().__init__()
        self.own, self.twice, self.frozen = OwnConv(3, 4, 3), nn.Linear(16, 16), nn.Linear(16, 16).requires_grad_(False)
        self.unused, self.empty, self.drop = nn.Linear(4, 3), nn.Linear(8, 0), nn.Dropout(0.2)
        self.embed, self.out = nn.Embedding(7, 16), nn.Linear(16, 7)
        self.out.weight = self.embed.weight

    def forward(self, x):
        tokens = self.embed(x.flatten(1).abs().long() % 7).mean(1)
        x = torch.utils.checkpoint.checkpoint(self.twice, self.own(x).flatten(1).tanh(), use_reentrant=False)
        return self.out(self.drop(self.frozen(self.twice(x.tanh()) + tokens)))


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("build, prune, shape, tensors", [
    (lambda: VisionTransformer(8, 4, 1, 2, 8, 16), lambda name, t: t.dim() in (2, 4), (3, 8, 8), 6),
    (lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=2), nn.BatchNorm2d(4), nn.Flatten()), None, (4, 4, 4), 1),
    (Odd, None, (3, 4, 4), 4),
], ids=["vit", "transposed", "odd"])  # fmt: skip
def test_networks_of_others_are_mined_and_finetuned(build, prune, shape, tensors):
    """The function is the module that holds v, in either mode, and so is its gradient; what is frozen stays so."""
    torch.manual_seed(0)
    model, x, y = build(), 3 * torch.randn(8, *shape), torch.randint(3, (8,))
    f = gm.Network(model, prune)
    assert len(f.names) == tensors  # a shared weight counts once
    w, before = gm.signed_constant(f), copy.deepcopy(model.state_dict())
    assert torch.equal(f.vector(f.views(w)), w)
    for view in f.views(w).values():
        assert view.untyped_storage().data_ptr() == w.untyped_storage().data_ptr()  # no copy
        assert view.dim() != 4 or build is Odd or view.is_contiguous(memory_format=torch.channels_last)  # fast
        assert torch.allclose(view.abs(), torch.tensor((2 / view[0].numel()) ** 0.5))
    f.eval()(w, x)
    assert same(before, model.state_dict())  # untouched by what its function is given
    for training in (True, False):
        function, plain = (gm.Network(copy.deepcopy(model), prune).train(training) for _ in range(2))
        v, outs = (f.vector() + 0.1 * torch.randn(f.d)).requires_grad_(), []
        plain.load(v.detach())
        for run in (partial(function, v), plain.model):
            torch.manual_seed(1)
            outs.append(run(x))
            F.cross_entropy(outs[-1], y).backward()
        held = {key: plain.model.get_parameter(key) for key in plain.names}
        grads = {key: 0 * p if p.grad is None else p.grad for key, p in held.items()}
        assert torch.allclose(*outs, atol=1e-4)
        assert torch.allclose(v.grad, plain.vector(grads), atol=1e-4)
    others = {key: p for key, p in model.named_parameters() if key in f.rest()}
    before = copy.deepcopy(others)
    gem = gm.mine(f, (x, y), sparsity=0.25, epochs=2, lr=0.5, batch_size=4)
    assert gem.q.sum() == round(0.25 * f.d)
    assert torch.equal(f.vector(), gem.w * gem.m)
    assert same(others, before)  # mining trains nothing
    v = gm.finetune(f, gem.w, gem.q, (x, y), epochs=2, batch_size=4)
    assert torch.equal(f.vector(), v)
    assert not v[gem.q == 0].any() and not torch.equal(v, gem.w * gem.q)
    changed = {key for key, t in others.items() if not torch.equal(t, before[key])}
    assert changed  # biases and norms are trained now,
    assert all(model.get_parameter(key).requires_grad for key in changed)  # and nothing that is frozen
    assert gm.accuracy(f, (x, y)) == gm.accuracy(f, (x, y), v)  # dropout is off


def test_arguments_by_name_or_in_order_are_learned_alike():
    x, scale, y = torch.randn(40, 4), torch.rand(40, 1), torch.randint(3, (40,))
    model, plain = nn.Bilinear(4, 1, 3, bias=False), []
    f = gm.Network(model, prune=lambda name, p: True)
    for batch in (((x, scale), y), ([x, scale], y), ({"input1": x, "input2": scale}, y)):
        plain.append(gm.mine(f, [batch], sparsity=0.5, epochs=2, lr=1.0).p)
    assert torch.equal(plain[0], plain[1])
    assert torch.equal(plain[0], plain[2])


def test_figures_count_labelled_examples_and_the_mask():
    """-100 is cross-entropy's "no label"; regression has no classes. What on_epoch returns stops nothing."""
    torch.manual_seed(0)
    model, rows, how = nn.Linear(4, 3), [], {"epochs": 1, "lr": 0, "on_epoch": lambda row, *_: rows.append(row)}
    data = [(X, torch.where(torch.arange(6) < n, Y, -100)) for n in (4, 1)]  # so many have a label
    right, losses = (model(X).argmax(1) == Y).float(), F.cross_entropy(model(X), Y, reduction="none").detach()
    acc, loss = (float(t[[0, 1, 2, 3, 0]].mean()) for t in (100 * right, losses))
    gm.finetune(model, gm.Network(model).vector(), torch.ones(12), data, **how)
    assert (rows[0]["loss"], rows[0]["train_acc"]) == pytest.approx((loss, acc), abs=1e-3)
    assert gm.accuracy(model, data) == pytest.approx(acc, abs=1e-3)
    for outputs, y in ((1, Y), (2, X[:, :2]), (2, X[:, 0])):
        assert gm.accuracy(nn.Linear(4, outputs), (X, y)) is None
    rows, how = [], {"lam": 0, "sparsity": 0.1, "epochs": 60, "init": lambda f: torch.zeros(12)}
    gm.mine(model, (X, Y), on_epoch=lambda *seen: rows.append(seen) or "stop", **how)  # where T is 60 / 30
    assert [row["q"] for row, *_ in rows] == [round(12 * 0.1 ** (j // 2 * 2 / 60)) for j in range(1, 61)]
    assert all(row["m"] == state["m"].sum() for row, _, state in rows)


@pytest.mark.parametrize("how", [{}, {"optimizer": gm.adam, "r": gm.round_random, "lam": 1e-3}], ids=["sgd", "adam"])
def test_a_search_stopped_goes_on_as_if_not(how):
    """And so does finetuning; but only from a state of the same network."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 3))
    kw = {"train": (X, Y), "epochs": 6, "lr": 1.0, "batch_size": 3}
    gem = gm.mine(copy.deepcopy(model), sparsity=0.2, **how, **kw)
    for run in (partial(gm.mine, sparsity=0.2, **how), partial(gm.finetune, w=gem.w, m=gem.q)):
        ends, states, state = [], [], None
        for _ in range(2):
            net = copy.deepcopy(model)
            found = run(net, state=state, on_epoch=lambda *seen: states.append(copy.deepcopy([*seen])), **kw)
            ends.append([*found, net.state_dict()])
            state = states[1][2]
        assert [row["epoch"] for row, *_ in states] == [1, 2, 3, 4, 5, 6, 3, 4, 5, 6]
        assert same(states[2:6], states[6:])
        assert same(*ends)
        with pytest.raises(gm.InputError, match="another network|vectors of 12"):
            run(nn.Linear(4, 3), state=state, **kw)


def test_lambda_by_itself_reaches_the_density():
    """In half of the epochs. The loss moves no score (inputs are 0), so r(p) * q is as dense as wanted each time."""
    x, y, seen = torch.zeros(100, 40), torch.zeros(100).long(), []
    batches, model = list(zip(x.split(2), y.split(2))), nn.Linear(40, 40, bias=False)
    how = {"epochs": 10, "period": 3, "on_epoch": lambda row, *_: seen.append((row["m"] / 1600, row["lam"]))}
    gem = gm.mine(model, batches, sparsity=0.02, **how)
    for j, (density, lam) in enumerate(seen, 1):
        assert density == pytest.approx(0.02 ** min(1, j / 5), rel=0.3)
        assert lam > 0 or j > 5
    assert gem.q.sum() == 32
    gem = gm.mine(model, (x, y), sparsity=0.05, batch_size=10, **how)  # few steps: most comes later, by momentum
    assert gem.m.sum() == gem.q.sum() == 80


def test_weights_and_masks_of_the_checks():
    """Weights: sqrt(2 / fan_in) by hand for ResNet-20; reinit draws others so distributed. shuffle keeps all counts."""
    f = gm.Network(models.build("resnet20"))
    w, m, normal = gm.draw(f, gm.signed_constant, 1), (torch.rand(f.d) < 0.1).float(), f.views(gm.kaiming_normal(f))
    for name, std in (("conv1", 0.2721655), ("layer2.2.conv2", 0.0833333), ("fc", 0.1767767)):
        assert torch.allclose(f.views(w)[f"{name}.weight"].abs(), torch.tensor(std), atol=1e-6)
        assert normal[f"{name}.weight"].std().item() == pytest.approx(std, rel=0.1)
    drawn = gm.reinit(f, seed=1)
    assert torch.equal(drawn.abs(), w.abs())
    assert (drawn == w).float().mean() == pytest.approx(0.5, abs=0.01)  # of the same seed, but not the same
    mixed = gm.shuffle(f, m, seed=1)
    assert f.counts(mixed) == f.counts(m)
    assert torch.equal(mixed, gm.shuffle(f, m, seed=1)) and not torch.equal(mixed, gm.shuffle(f, m, seed=2))
    assert (mixed * m).sum() / m.sum() == pytest.approx(0.1, abs=0.02)  # places in common by chance


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


def test_weights_that_are_not_kept_shrink_as_in_the_authors_file():
    """By weight decay alone, in 150 epochs of 391 steps: to 0.7194 in their finetuned gem. (Ours leaves them out.)"""
    how, w, velocity = gm.sgd_with_decay([torch.ones(1, requires_grad=True)], 0.01).defaults, 1.0, 0.0
    for j in range(1, 151):
        for _ in range(391):
            velocity = how["momentum"] * velocity + how["weight_decay"] * w
            w -= gm.multistep(0.01, j, 150) * velocity
    assert w == pytest.approx(0.7192, abs=3e-4)


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
    for bad in ((w[:1], m), (w, 0 * m + 0.5)):
        with pytest.raises(gm.InputError, match="vectors of 42 numbers"):
            gm.finetune(model, *bad, batches, epochs=1)
    for steps in (4, 6):  # as IMP's rewinding needs it
        result = gm.finetune(tiny(), w, m, batches, epochs=3, lr=0.1, steps=steps)
        assert torch.allclose(result, masked_sgd(tiny(), w, m, batches, E=3, steps=steps), atol=1e-10)


def test_reestimated_statistics_are_the_mean_over_batches():
    """Of the layer's inputs under v, whatever they were before; nothing else changes, nor what its owner froze."""
    net, parts, v = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), torch.randn(3, 20, 4), torch.randn(12)
    net(7 + torch.randn(20, 4))  # leaves statistics that must be forgotten
    for i in (0, 1):
        before = copy.deepcopy(net.state_dict())
        gm.reestimate(net, v, [(part, torch.zeros(20)) for part in parts[i:]], batches=2)
        changed = [name for name, t in net.state_dict().items() if not torch.equal(t, before[name])]
        assert changed == [["1.running_mean", "1.running_var", "1.num_batches_tracked"], []][i]
        net[1].train = lambda mode: net[1]
    inputs = [part @ v.view(3, 4).T + net[0].bias for part in parts[:2]]
    assert torch.allclose(net[1].running_mean, (inputs[0].mean(0) + inputs[1].mean(0)) / 2, atol=1e-6)
    assert torch.allclose(net[1].running_var, (inputs[0].var(0) + inputs[1].var(0)) / 2, rtol=1e-5)
    assert (net[1].momentum, net.training) == (0.1, False)


# --- data and the paper's settings ----------------------------------------------------------------------------


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


def test_digits_are_fixed_and_balanced(tmp_path):
    """Held-out images are the same ones every time; the statistics are those of all pixels of a channel."""
    data, again = (gm.load_data("digits", tmp_path) for _ in range(2))
    x, y, channels = data.train.x, data.train.y, data.train.x.double().flatten(0, 2)
    assert (x.shape, x.dtype, data.classes, data.pad) == ((1600, 16, 16, 3), torch.uint8, 10, 0)  # a flipped 2 is a 5
    assert (y.bincount().tolist(), data.test.y.bincount().tolist()) == ([160] * 10, [100] * 10)
    assert torch.equal(x, again.train.x) and not (x[:1000] == data.test.x).all((1, 2, 3)).any()
    assert gm.pixel_stats(x)[0] == pytest.approx(channels.mean(0).tolist())
    assert gm.pixel_stats(x)[1] == pytest.approx(channels.std(0, correction=0).tolist())
    held, again = (gm.load_data("digits", tmp_path, held_out=True) for _ in range(2))
    assert (len(held.train.y), len(held.test.y)) == (1440, 160)  # 45,000 + 5,000 of CIFAR-10's 50,000
    assert torch.equal(held.test.x, again.test.x)
    parts = zip(torch.cat([held.train.x, held.test.x]), torch.cat([held.train.y, held.test.y]))
    assert {(str(a.tolist()), int(b)) for a, b in parts} == {(str(a.tolist()), int(b)) for a, b in zip(x, y)}


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


def test_archives(tmp_path, monkeypatch):
    """TinyImageNet and Caltech-101, in their own forms but small."""
    home = make_folder(tmp_path / "tiny-imagenet-200", 2, 2, (64, 64), ("n01443537", "n01629819"))
    (home / "test" / "n01443537").rename(home / "test" / "images")
    (home / "test").rename(home / "val")
    labels = (f"00{i}.png\tn0{number}\t0\t0\t9\t9\n" for i, number in enumerate((1629819, 1443537)))
    (home / "val" / "val_annotations.txt").write_text("".join(labels))
    shutil.make_archive(home, "zip", tmp_path, home.name)
    shutil.rmtree(home)
    monkeypatch.setattr(tv_utils, "check_md5", lambda *args, **kw: True)
    data = gm.load_data("tinyimagenet", tmp_path)
    assert (data.train.x.shape, data.train.y.tolist(), data.test.y.tolist()) == ((4, 64, 64, 3), [0, 0, 1, 1], [1, 0])
    for name, n in (("accordion", 6), ("BACKGROUND_Google", 2), ("Faces", 4)):
        (tmp_path / "caltech101" / "101_ObjectCategories" / name).mkdir(parents=True)
        for i in range(n):
            picture(i, (20 + i, 30)).save(tmp_path / "caltech101" / "101_ObjectCategories" / name / f"image_{i:04}.jpg")
    data, held = (gm.load_data("caltech101", tmp_path, held_out=out) for out in (False, True))
    assert (data.train.x.shape, len(data.test.y), len(held.test.y)) == ((6, 224, 224, 3), 2, 2)  # 60%, and 20% each
    assert torch.equal(data.train.x, held.train.x) and not torch.equal(data.test.x, held.test.x)


def test_folder_of_images(tmp_path):
    """With val/, which serves as test set where there is none; hidden and other files; pictures taken turned."""
    train = make_folder(tmp_path) / "train"
    data = gm.load_data(f"folder:{tmp_path}", None)
    assert (data.train.x.shape, data.train.y.tolist(), data.classes) == ((12, 8, 8, 3), [0] * 6 + [1] * 6, 2)
    assert torch.equal(data.train.x[9], tv.pil_to_tensor(picture(103)).permute(1, 2, 0))
    assert gm.load_data(f"folder:{tmp_path}", None, image_size=16).test.x.shape == (8, 16, 16, 3)
    for junk in (".git/0.png", "dog/.git/0.png", "dog/._0.png", "dog/@eaDir/0.png", "cat/1.txt", "5.png"):
        (train / junk).parent.mkdir(exist_ok=True)
        (train / junk).write_bytes(b"not a picture")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture(103).rotate(90).save(train / "dog" / "003.png", exif=exif)
    assert torch.equal(gm.load_data(f"folder:{tmp_path}", None).train.x, data.train.x)
    shutil.copytree(tmp_path / "test", tmp_path / "val")
    (tmp_path / "val" / "dog" / "003.png").unlink()
    for tests in ([8, 7], [7, 7]):
        splits = [gm.load_data(f"folder:{tmp_path}", None, held_out=out) for out in (False, True)]
        assert [(len(data.train.y), len(data.test.y)) for data in splits] == [(12, n) for n in tests]
        shutil.rmtree(tmp_path / "test", ignore_errors=True)
    for spoil, word in (
        (lambda: picture(0, (8, 9)).save(train / "dog/001.png"), "001.png.*--image-size"),
        (lambda: (train / "dog/001.png").write_bytes(b"\x89PNG"), "001.png.*remove it"),
        (lambda: (train / "cow").mkdir(), "same class folders"),
    ):
        spoil()
        with pytest.raises(gm.InputError, match=word):
            gm.load_data(f"folder:{tmp_path}", None)


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
    for flags, period, lr, lam in (  # the period scales with E; elsewhere lambda is found, and in few steps lr grows
        ("", 5, 0.1, 1e-4), ("--epochs 60 --lam 0.5", 2, 0.1, 0.5), ("--epochs 20", 1, 0.75, "auto"),
        ("--sparsity 0.03", 5, 0.1, "auto"), ("--epochs 20 --penalty l1", 1, 0.1, 1e-4),
    ):  # fmt: skip
        args = settings(flags)
        assert (args.period, args.lr, args.lam) == (period, pytest.approx(lr), lam)


def settings(flags):
    return gm.complete(gm.arguments(gm.parser(), shlex.split(flags, comments=True)))


# --- the command line: a run, and going on with it ------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("pictures"), train=16, test=10)


def command(pictures, out, more=""):
    flags = "--epochs 2 --batch-size 16 --sparsity 0.3 --lr 1 --lam 0.03 --seed 1 --device cpu"
    return ["--dataset", f"folder:{pictures}", "--out", str(out), *flags.split(), *more.split()]


def artefacts(out):
    """What a run leaves, without what may depend on time or interruptions."""
    result = json.loads((out / "result.json").read_text()) | {"command": "", "seconds": 0}
    rows = [json.loads(line) | {"seconds": 0} for line in (out / "log.jsonl").read_text().splitlines()]
    return {"rows": rows, "result": result, "gem": torch.load(out / "gem.pt", weights_only=True)}


@pytest.fixture(scope="module")
def finished(pictures, tmp_path_factory):
    """One undisturbed run with all checks: its folder (out), what it leaves, and what it showed."""
    out, shown = tmp_path_factory.mktemp("finished") / "run", io.StringIO()
    with contextlib.redirect_stdout(shown):
        assert gm.main(command(pictures, out, "--checks")) == 0
    return types.SimpleNamespace(out=out, shown=shown.getvalue(), **artefacts(out))


def test_a_run_leaves_and_shows_its_figures(finished):
    """Each phase its epochs, every check the gem's number of weights, and a verdict of three standard errors."""
    result, rows, kept = finished.result, finished.rows, round(0.3 * 267_824)
    phases = ["mine", "finetune", "shuffle", "reinit", "mine inverted", "invert"]
    assert [(row["phase"], row["epoch"]) for row in rows] == [(phase, j) for phase in phases for j in (1, 2)]
    assert len({row["loss"] for row in rows if "mine" not in row["phase"]}) == 8  # each check trains something else
    assert result["total"] == sum(layer["total"] for layer in result["layers"]) == 267_824
    assert result["kept"] == result["kept_q"] == sum(layer["kept"] for layer in result["layers"]) == kept
    assert [result[name] for name in ("pre_finetune_acc", "kept_m")] == [rows[1]["test_acc"], rows[1]["m"]]
    acc = result["post_finetune_acc"]
    for name, i in ((None, 3), ("shuffle", 5), ("reinit", 7), ("invert", 11)):
        its = rows[i]["test_acc"]
        error = (acc * (100 - acc) / 20 + its * (100 - its) / 20) ** 0.5  # of 20 test images
        check = {"post_finetune_acc": its, "kept": kept, "passed": acc - its > 3 * error}
        assert result["checks"][name] == check if name else acc == its
    assert {"model", "dataset", "method", "sparsity", "epochs", "seed", "torch", "device", "commit"} < set(result)
    assert "80,347 of 267,824 weights: 30.000%" in finished.shown


def test_the_gem_loads_into_a_plain_module(finished, pictures):
    """Each network in gem.pt gives the accuracy that was reported, and holds what its name says."""
    gem, data = finished.gem, gm.load_data(f"folder:{pictures}", None)
    stats, model = (gem["mean"], gem["std"]), models.build(gem["model"], **gem["build"])
    for name, when in (("finetuned", "post"), ("gem", "pre")):
        model.load_state_dict(gem[name])
        acc = gm.accuracy(model, gm.Batches(data.test, stats))
        assert acc == pytest.approx(finished.result[f"{when}_finetune_acc"], abs=1e-4)
    gm.reestimate(model, gm.Network(model).vector(), gm.Batches(data.train, stats, 16, train=True, pad=4), seed=1)
    assert gm.accuracy(model, gm.Batches(data.test, stats)) == finished.result["reestimated_acc"]
    assert not gem["initial"]["bn1.running_mean"].any()  # as built
    for name, m in gem["mask"].items():
        p, w = gem["scores"][name], gem["initial"][name]
        assert len(w.unique()) == 2  # +c and -c, untouched
        assert torch.equal(gem["gem"][name], w * ((p >= 0.5) & gem["q"][name]))
        assert not gem["finetuned"][name][~m].any()


def stop_after(monkeypatch, n):
    """Ctrl-C right after the n-th time that a phase's file is written."""

    def replace(part, path, real=os.replace, left=iter(range(n - 1, -1, -1))):
        real(part, path)
        if path.suffix == ".pt" and path.name != "gem.pt" and next(left) == 0:
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

    def save(content, path, real=torch.save):
        real(content, path)
        if path.name.startswith("invert"):
            os.truncate(path, 99)
            raise SystemExit("killed")

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(torch, "save", save)
        gm.main(command(pictures, tmp_path, "--resume"))
    for _ in range(2):  # the second time, nothing is left to do
        assert gm.main(command(pictures, tmp_path, "--resume")) == 0
        assert same(artefacts(tmp_path), artefacts(finished.out))


def test_every_check_starts_from_the_same_state(pictures, tmp_path, monkeypatch):
    """As the gem: also where weights are pretrained, which the model no longer holds when the inversion is mined."""
    seen, prepare = {gm.mine: [], gm.finetune: []}, gm.prepare

    def watched(f, *args, method, **kw):
        seen[method].append([f.rest(), kw.get("init", type)(f)])
        return method(f, *args, **kw)

    for method in seen:
        monkeypatch.setattr(gm, method.__name__, partial(watched, method=method))
    affine = {"num_classes": 2, "affine": True}  # as for Caltech-101
    monkeypatch.setattr(gm, "prepare", lambda args: (*prepare(args)[:3], affine))
    assert gm.main(command(pictures, tmp_path, "--epochs 1 --checks")) == 0
    (first, inverted), tuned = seen.values()
    assert same(first, inverted)
    assert same(tuned, tuned[:1] * 4)


@pytest.mark.parametrize("flags", [
    "--seed 2", "--bf16", "--optimizer adam", "--lam auto", "--penalty l1", "--rounding random",
    "--finetune-mask m --checks", "--finetune-schedule cosine",
])  # fmt: skip
def test_every_flag_changes_mining_or_finetuning_alone(flags, finished, pictures, tmp_path):
    finetuning = flags.startswith("--finetune")
    assert gm.main(command(pictures, tmp_path, flags if finetuning else f"{flags} --finetune-epochs 0")) == 0
    run = artefacts(tmp_path)
    gem, checks, m = run["gem"], run["result"].get("checks", {}), {row["phase"]: row["m"] for row in run["rows"]}
    assert same(gem["scores"], finished.gem["scores"]) == finetuning
    assert not finetuning or not same(gem["finetuned"], finished.gem["finetuned"])
    if checks:  # those of the gem's size are compared with it; the inverted r(p) * q has a size of its own
        assert m["mine"] == m["shuffle"] == m["reinit"] == run["result"]["kept"] < 80_347
        assert m["mine"] != m["mine inverted"] == m["invert"] == checks["invert"]["kept"]
        assert [check["passed"] is None for check in checks.values()] == [False, False, True]


def test_testing_less_often_changes_nothing_else(finished, pictures, tmp_path, monkeypatch):
    """And how often may be changed when a run goes on. Nor does a folder whose letters the console cannot show."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    for flags in ("--eval-every 3 --finetune-epochs 0", "--eval-every 5 --resume"):
        assert gm.main(command(pictures, tmp_path / "Жемчуг", flags)) == 0
    less = artefacts(tmp_path / "Жемчуг")
    assert [row["test_acc"] is None for row in less["rows"]] == [True, False, True, False]
    assert [row | {"test_acc": 0} for row in less["rows"]] == [row | {"test_acc": 0} for row in finished.rows[:4]]
    assert same(less["gem"]["finetuned"], finished.gem["finetuned"])


@pytest.mark.parametrize("n", [1, 2])
def test_two_runs_in_one_folder_are_not_mixed(n, pictures, tmp_path, capsys, monkeypatch):
    """The one that finds, at the end of its n-th epoch, a file that it did not write stops, and leaves that file."""
    real, calls, file = gm.accuracy, [], tmp_path / "mine.pt"

    def accuracy(*args):
        calls.append(file.write_bytes(b"of the other run") if len(calls) == n - 1 else None)
        return real(*args)

    monkeypatch.setattr(gm, "accuracy", accuracy)
    for words in (["another process", "--out"], ["already holds a run", "--resume"]):
        refused(command(pictures, tmp_path), capsys, *words)
        assert file.read_bytes() == b"of the other run"


def refused(argv, capsys, *words, program=gm):
    capsys.readouterr()
    assert program.main([str(a) for a in argv]) == 2
    err = capsys.readouterr().err
    assert re.match(rf"{program.__name__}\.py( \w+)?: error: .+\n$", err), err
    assert all(word in err for word in words), err


@pytest.mark.parametrize("flags, words", [
    ("--sparsity 1.44", ["KEPT", "0.0144"]), ("--sparsity 1.44%", ["0.0144"]), ("--sparsity abc", ["--sparsity"]),
    ("--sparsity 1e-9", ["1e-09", "KEEP"]), ("--spar 0.1", ["--spar"]), ("--epochs 1.5", ["--epochs"]),
    ("--lr nan", ["--lr"]), ("--period 3", ["--period 3", "--epochs 2"]), ("--batch-size 1", ["--batch-size"]),
    ("--checks --finetune-epochs 0", ["--checks", "--finetune-epochs"]), ("--model resnet21", ["resnet21", "vgg16"]),
    ("--model vgg16", ["vgg16", "8 pixels", "--image-size"]), ("--dataset mnist", ["mnist", "cifar10", "folder:PATH"]),
    ("--dataset folder:/nowhere", ["/nowhere", "'train'"]), ("--dataset digits --image-size 16", ["--image-size"]),
    ("--device cuda", ["--device cpu"]), ("--lam auto --penalty l1", ["--lam auto"]), ("--resume", ["nothing to"]),
    ("--out {file}/below", ["cannot write"]), ("--dataset cifar10 --data-dir {out}", ["cifar10", "--dataset digits"]),
    ("--dataset caltech101 --data-dir {out}", ["caltech101"]), ("--dataset tinyimagenet --data-dir {out}", ["tiny"]),
])  # fmt: skip
def test_bad_flags(flags, words, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kw: socket.inet_aton("no network in tests"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "file").touch()
    more = flags.format(file=tmp_path / "file", out=tmp_path / "data")
    refused(command(pictures, tmp_path / "run", more), capsys, *words)
    assert not (tmp_path / "run").exists()
    assert socket.getdefaulttimeout() is None  # nothing global is changed, by downloads either


def test_bad_run_folders(finished, pictures, tmp_path, capsys, monkeypatch):
    """Another run's, and damaged files, are named, and only plain values loaded; what stops a step is one line."""
    run = shutil.copytree(finished.out, tmp_path / "run")
    again, path, image = command(pictures, run, "--resume"), run / "finetune.pt", pictures / "train/cat/000.png"
    refused([*again, "--sparsity", "0.05"], capsys, "--sparsity is 0.3", "not 0.05")
    refused([*again, "--finetune-lr", "0.3"], capsys, "--finetune-lr")  # too late: it is under way
    pixels, content = image.read_bytes(), path.read_bytes()
    picture(77).save(image)
    refused(again, capsys, "set of images")
    image.write_bytes(pixels)
    torch.save({"rows": partial(print)}, tmp_path / "code.pt")
    for damaged in (content[:1000], content[:9999] + b"?" + content[10000:], (tmp_path / "code.pt").read_bytes()):
        path.write_bytes(damaged)
        refused(again, capsys, "finetune.pt is damaged")
    for error, word in ((RuntimeError("can't allocate memory"), "memory"), (FloatingPointError("epoch 7"), "epoch 7")):
        monkeypatch.setattr(gm, "begin_epoch", lambda *args, error=error: (_ for _ in ()).throw(error))
        refused(command(pictures, tmp_path / word), capsys, word)


# --- baselines.py: the methods --------------------------------------------------------------------------------


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


def test_synflow_prunes_in_100_exponential_steps(monkeypatch):
    """In float64, since R overflows float32 on some networks."""
    left = []

    def score(f, v, batches):
        assert v.dtype == torch.float64
        left.append(int(v.count_nonzero()))
        return v.abs()

    monkeypatch.setitem(bl.SCORES, "synflow", bl.SCORES["synflow"]._replace(score=score))
    gem = bl.at_init(nn.Linear(100, 100), tiny_batches(), score="synflow", sparsity=0.0144)
    assert [*left, int(gem.m.sum())] == pytest.approx([10_000 * 0.0144 ** (k / 100) for k in range(101)], abs=1)


@pytest.mark.parametrize("score, steps, affine", [("snip", 0, True), ("prospr", 3, True), ("prospr", 3, False)])
def test_snip_and_prospr_are_the_change_of_the_loss_after_0_and_3_steps(score, steps, affine):
    """Biases and affine BatchNorm take the steps too, unless they are not to be trained."""
    x, y = tiny_batches(1)[0]
    model = tiny()
    model.bn.requires_grad_(affine)
    f = gm.Network(model).train(score == "prospr")
    w = f.vector()

    def loss_after_steps(c):
        stepped = tiny()
        gm.Network(stepped).load(c * w)
        stepped.train(score == "prospr")
        parameters = [p for name, p in stepped.named_parameters() if affine or "bn" not in name]
        for _ in range(steps):
            with torch.enable_grad():
                grads = torch.autograd.grad(F.cross_entropy(stepped(x), y), parameters)
            for parameter, grad in zip(parameters, grads):
                parameter -= 0.1 * grad
        return F.cross_entropy(stepped(x), y)

    with torch.no_grad():  # central differences
        ends = [(loss_after_steps(1 + h), loss_after_steps(1 - h)) for h in 1e-5 * torch.eye(42).double()]
    slopes = torch.stack([(b - a) / 2e-5 for b, a in ends])
    assert torch.allclose(getattr(bl, score)(f, w, lambda: iter([(x, y)])), slopes.abs(), atol=1e-8)
    with pytest.raises(FloatingPointError, match=f"{score}'s scores are not finite"):
        bl.at_init(f, [(x * math.nan, y)], score=score, sparsity=0.5)


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
    """Kept are the largest, inverted the smallest, an unused layer last; the seed fixes all; BatchNorm is as before."""
    monkeypatch.setitem(bl.SCORES, method, bl.SCORES[method]._replace(rounds=1))
    model = tiny()
    model.fc.unused = nn.Linear(3, 3).double()
    f, search = gm.Network(model), partial(bl.at_init, score=method, sparsity=0.4)
    before, data = f.rest(), (torch.randn(40, 1, 4, 4).double(), torch.arange(40) % 3)
    gem = search(f, data, seed=3)
    assert torch.equal(f.vector(), gem.w * gem.m)
    assert same(f.rest(), before)
    assert method not in ("snip", "grasp", "prospr") or gem.p[:42].all() and not gem.p[42:].any()
    assert method != "magnitude" or torch.equal(gem.p, gem.w.abs())
    if method != "dense":
        low = search(f, data, seed=3, invert=True)
        assert gem.p[gem.m == 1].min() >= gem.p[gem.m == 0].max()
        assert low.p[low.m == 1].max() <= low.p[low.m == 0].min()
        assert low.m.sum() == gem.m.sum()
    torch.manual_seed(5)
    assert same(search(f, data, seed=3)._asdict(), gem._asdict())
    assert not torch.equal(search(f, data, seed=4).w, gem.w)


@pytest.mark.parametrize("method", ["snip", "grasp", "synflow", "magnitude"])
def test_among_equal_scores_chance_decides(method, monkeypatch):
    """Not the place in the vector. The gamma of each block's last BatchNorm is 0, so its layers' scores are 0, too."""
    monkeypatch.setitem(bl.SCORES, method, bl.SCORES[method]._replace(rounds=min(3, bl.SCORES[method].rounds)))
    model = models.build("resnet20", affine=True)
    for name, gamma in model.named_parameters():
        if name.endswith("bn2.weight"):
            nn.init.zeros_(gamma)
    f, data = gm.Network(model), (torch.randn(20, 3, 4, 4), torch.arange(20) % 10)
    init = gm.signed_constant if method == "magnitude" else gm.kaiming_normal
    gem = bl.at_init(f, data, score=method, sparsity=0.04, init=init)
    assert len(f.vector(f.views(gem.p))[432:-640].unique()) <= 6  # 0; or one a fan-in
    kept = [n for name, n in f.counts(gem.m).items() if "layer1" in name]  # six equal layers
    assert max(kept) - min(kept) < 0.6 * sum(kept) / 6


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
    # The grid around the densities of IMP (SR-v4): 144 sets, the authors' best among them.
    kept = [194, 244, 227, 201, 179, 182, 166, 285, 300, 308, 221, 186, 158, 217, 171, 124, 128, 116, 81, 172]
    best = [54.907, 11.590, 10.852, 8.724, 7.769, 7.899, 6.205, 5.185, 3.255, 3.342, 2.398, 2.018, 1.714, 1.177, 0.5639,
            0.3364, 0.3472, 0.3147, 0.1197, 16.875]  # fmt: skip
    grid = bl.ratio_grid([k / n for k, n in zip(kept, f.sizes)])
    assert len(set(grid)) == 144 and sum(100 * torch.tensor(p) == pytest.approx(best, abs=1e-3) for p in grid) == 1


@pytest.mark.parametrize("widths", [(20, 200, 20, 64), (4, 9, 3), (40, 30, 30, 30, 500)])
def test_smart_ratio_keeps_what_is_asked_for_or_says_how_much_it_can(widths):
    model = nn.Sequential(*[nn.Linear(a, b) for a, b in itertools.pairwise(widths)])
    for s in (0.99, 1.0):
        with pytest.raises(gm.InputError, match=r"at most [\d.]+") as refusal:
            bl.smart_ratio_ticket(model, None, sparsity=s)
    most = float(re.search(r"at most ([\d.]+)", str(refusal.value))[1])
    d, layers = gm.Network(model).d, len(widths) - 1
    for s in (most, 0.8 * most):
        kept = bl.smart_ratio_ticket(model, None, sparsity=s).m.sum()
        assert s * d - layers <= kept <= s * d + 1e-3  # each layer's number is rounded down


def test_equation_1_moves_densities_downhill():
    """The mean loss over masks of signed constants falls, and nothing else changes."""
    torch.manual_seed(0)
    x, start = torch.randn(400, 6), [0.3, 0.6]
    y = (x @ torch.tensor([1.0, -1, 1, 1, -1, 1]) > 0).long()
    f = gm.Network(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2), nn.BatchNorm1d(2)))
    before, w = copy.deepcopy(f.model.state_dict()), gm.draw(f, gm.signed_constant, 0)
    tuned, losses = bl.tune_densities(f, [(x, y)] * 20, start, epochs=5, lr=0.02), []
    assert same(f.model.state_dict(), before)
    for p in (start, tuned):
        masks = torch.rand(400, f.d) < torch.tensor(p).repeat_interleave(torch.tensor(f.sizes))
        losses.append(sum(F.cross_entropy(f.train()(w * m, x), y).item() for m in masks) / 400)
    assert losses[1] < losses[0] - 0.01
    assert set(bl.tune_densities(f, [(x, y)] * 2, start, epochs=1, lr=1e6)) <= {0.0, 1.0}


def test_sr_v4_takes_the_trial_that_held_out_images_prefer(monkeypatch):
    """They are a tenth of the training images, and not trained on."""
    split, seen, accs = gm.Split(torch.zeros(40, 4, 4, 3), torch.arange(40)), [], iter([1.0, 3.0, 2.0])
    f = gm.Network(nn.Sequential(*[nn.Linear(20, 20) for _ in range(20)]))

    def accuracy(f, data, v):
        assert (len(data.y), sorted([*data.y.tolist(), *seen[-1][5].y.tolist()])) == (4, list(range(40)))
        return next(accs)

    monkeypatch.setattr(gm, "accuracy", accuracy)
    how = {"trials": 3, "epochs": 6, "phase": lambda *args, **kw: seen.append(args)}
    gem = bl.smart_ratio_search(f, gm.Batches(split, ([0.0] * 3, [1.0] * 3), 8, True), densities=[0.5] * 20, **how)
    assert torch.equal(gem.m, seen[1][4]) and not torch.equal(gem.m, seen[0][4])


# --- baselines.py: its command line and tables; the README, several processes, and a GPU ----------------------


def baseline(pictures, out, flags):
    method, *more = flags.split()
    settings = f"--dataset folder:{pictures} --epochs 1 --batch-size 8 --sparsity 0.4 --device cpu".split()
    return [method, *settings, "--out", str(out), *more]


RUNS = {  # flags, epochs of the search, weights kept (d = 267,824; IMP takes 4 rounds), rates of finetuning, stops
    "imp": ("imp --rewind 5 --round-epochs 2", 8, 109_697, [0.1], [1, 4]),
    "ep": ("ep --gradual --epochs 2 --finetune-epochs 2", 2, 107_129, [0.1, 0.05], [1, 2]),
    "snip": ("snip --checks", 1, 107_130, [0.1], [2]),
    "sr4": ("sr --version 4 --trials 2 --round-epochs 2 --from {home}/imp", 4, None, [0.1], [2]),
    "sr5": ("sr --version 5 --epochs 2 --lr 0.01 --from {home}/ep", 2, None, [0.1, 0.01], [1]),
}


@pytest.fixture(scope="module")
def done(pictures, tmp_path_factory):
    """The folder of the finished RUNS."""
    home = tmp_path_factory.mktemp("baselines")
    for name, (flags, *_) in RUNS.items():
        assert bl.main(baseline(pictures, home / name, flags.format(home=home))) == 0
    return home


def test_each_version_of_smart_ratio_starts_from_the_right_densities(done, pictures, tmp_path):
    f = gm.Network(models.build("resnet20", 2))
    kept = {name: [layer["kept"] for layer in artefacts(done / name)["result"]["layers"]] for name in RUNS}
    gem, imp = ([k / n for k, n in zip(kept[name], f.sizes)] for name in ("ep", "imp"))
    v1 = bl.smart_ratio(f.sizes, 0.4)
    like_gem = [gem[0], *v1[1:-1], gem[-1]]
    for version, p in {1: v1, 2: like_gem, 3: [1, *v1[1:-1], 1], 4: imp, 5: like_gem, 6: imp}.items():
        flags = f"sr --version {version} --from {done / ('imp' if version in (4, 6) else 'ep')}"
        assert bl.densities(bl.complete(baseline(pictures, tmp_path, flags)), f) == p
    assert kept["sr4"] in [[int(n * x + 1e-6) for n, x in zip(f.sizes, p)] for p in bl.ratio_grid(imp)]
    assert kept["sr5"] != [int(n * x + 1e-6) for n, x in zip(f.sizes, like_gem)]  # tuned


@pytest.mark.parametrize("name", RUNS)
def test_every_method_runs_and_resumes_to_the_same_bits(name, done, pictures, tmp_path, monkeypatch):
    """With its own epochs, counts, rates and kind of weights. Interrupted in and between phases: for imp before the
    rewinding point and in the second round. Whether the gem will be finetuned can be left open until then.
    """
    flags, search_epochs, kept, lrs, stops = RUNS[name]
    argv, more = baseline(pictures, tmp_path, flags.format(home=done)), ["--finetune-epochs", "0"]
    for n in stops:
        with monkeypatch.context() as patch:
            stop_after(patch, n)
            assert bl.main(argv + more * (name != "snip")) == 130
        more = ["--resume"]
    assert bl.main(argv + more) == 0
    run = artefacts(tmp_path)
    assert same(run, artefacts(done / name))
    result, gem = run["result"], run["gem"]
    assert [result["search_epochs"], result["kept"]] == [search_epochs, kept or result["kept_q"]]
    assert [row["lr"] for row in run["rows"] if row["phase"] == "finetune"] == pytest.approx(lrs)
    assert set(result.get("checks", ())) == (set(gm.CHECKS) if name == "snip" else set())
    for part, mask in gem["mask"].items():
        assert not gem["finetuned"][part][~mask].any()
        assert torch.equal(gem["gem"][part], gem["initial"][part] * mask)
    assert (gem["initial"]["conv1.weight"].abs().unique().numel() == 1) == (name == "ep")  # signed constants


@pytest.mark.parametrize("flags, words", [
    ("imp --rewind 9 --round-epochs 2", ["step 9", "has 8"]), ("imp --sparsity 0.95", ["0.89"]),
    ("ep --sparsity 40", ["0.4"]), ("sr --sparsity 1e-4", ["above 0.00014"]), ("dense --checks", ["--checks"]),
    ("sr --checks invert", ["shuffle and reinit"]), ("sr --sparsity 1", ["30%", "at most 0.9"]),
    ("sr --version 4", ["IMP", "--from"]), ("sr --version 2 --from /nowhere", ["/nowhere", "gem.pt"]),
    ("sr --version 2 --from {home}/snip --model resnet32", ["another network", "snip"]),
    ("sr --version 2 --from {home}/snip --sparsity 0.2", ["--sparsity", "another --from"]),
    ("snip --lam 1", ["--lam"]), ("snip --resume", ["nothing to resume"]), ("nonsense", ["nonsense"]),
    ("paper fig3 --model resnet19", ["resnet19", "resnet18"]), ("paper table3 --lam 1e-4", ["--lam"]),
    ("paper table9", ["table1"]), ("paper table3 --bf16 --seed=3", ["--seeds"]),
])  # fmt: skip
def test_bad_flags_of_baselines(flags, words, done, pictures, tmp_path, capsys):
    flags = flags.format(home=done)
    argv = [*flags.split(), "--out", tmp_path] if flags[:5] == "paper" else baseline(pictures, tmp_path, flags)
    refused(argv, capsys, *words, program=bl)


def printed(capsys, *argv):
    """What baselines.py paper prints."""
    capsys.readouterr()
    assert bl.main(["paper", *argv]) == 0
    return capsys.readouterr().out


def table(text):
    """{method: {column: cell}} of the Markdown table in a text."""
    head, _, *rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"]
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def test_every_experiment_can_be_listed(capsys, tmp_path, monkeypatch):
    """With its cost: Table 1 (most with their checks) and Table 4 in the order of the rows. All numbers scale."""
    monkeypatch.chdir(tmp_path)
    for name in bl.EXPERIMENTS:
        *runs, last = printed(capsys, name, "--dry-run").splitlines()
        costs = [int(re.fullmatch(r"python .*  # ([\d,]+) epochs", run)[1].replace(",", "")) for run in runs]
        known = {"table1": [3300, 602, 602, 602, 900, 450, 3000, 900, 150], "table4": [300, 3150, 3000, 3000]}
        assert costs == known.get(name, costs)
        assert last == f"# to do: {len(runs)} runs, {sum(costs):,} epochs"
    for argv, some in (
        ("table4 --epochs 20", ["--epochs 400 --period 20 --finetune-epochs 20", "--rewind 133"]),
        ("fig10 --epochs 75 --sparsity 0.0144 --bf16", ["--round-epochs 4 --rewind 500", "--bf16"]),
        ("table16 --epochs 20", ["--trials 19", "--epochs 1 --finetune-epochs 20"]),
        ("fig3 --model vgg16 --dataset tinyimagenet", ["--rewind 2000", "--epochs 200 --model vgg16"]),
    ):  # fmt: skip
        assert set(some) <= set(re.findall("|".join(some), printed(capsys, *argv.split(), "--dry-run")))


def test_a_table_is_run_resumed_and_printed(pictures, tmp_path, capsys, monkeypatch):
    """A complete one is printed again without a run; a damaged result is made again; of its gem there is a chart."""
    home = tmp_path / "my tables"  # commands need quotes
    flags = f"--dataset folder:{pictures} --epochs 1 --batch-size 32 --sparsity 0.4 --model resnet20 --out".split()
    flags = [*flags, str(home)]
    argv = ["table2", *flags, "--seeds", "2"]
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert bl.main(["paper", *argv]) == 130
    refused(["paper", *argv, "--so-far"], capsys, "no run", str(home), program=bl)
    first, *_ = printed(capsys, *argv, "--dry-run").splitlines()
    assert bl.main(shlex.split(first, comments=True)[2:]) == 0  # as printed: with --resume
    out = printed(capsys, *argv)
    paths = sorted(home.glob("ProsPr-resnet20-*/result.json"))
    a, b = (json.loads(path.read_text())["post_finetune_acc"] for path in paths)
    assert table(out)["ProsPr"]["kept %"] == "40.00 ± 0.00 (5)"
    assert table(out)["ProsPr"]["after"] == f"{(a + b) / 2:.2f} ± {abs(a - b) / 2**0.5:.2f} (82.67)"
    with monkeypatch.context() as patch:
        patch.setattr(gm, "run_command", None)  # nothing is left to run
        assert printed(capsys, *argv) == printed(capsys, *argv, "--so-far") == out
        assert printed(capsys, *argv, "--dry-run").endswith("# to do: 0 runs, 0 epochs\n")
        refused(["paper", *argv, "--batch-size", "16"], capsys, "--batch-size is 32, not 16", "--out", program=bl)
        fig7 = printed(capsys, "fig7", "--so-far", *flags)  # which shares the run of Gem-Miner
        assert re.search(r"\n    line \[([\d.e-]+(, )?){20}\]\n", fig7)
        assert set(table(fig7)["EP"].values()) == {"EP", "-"}
    paths[1].write_text(paths[1].read_text()[:-9])
    assert printed(capsys, *argv) == out
    # Smart ratio cannot keep 0.01%: the others are made and printed, and the exit code is 2.
    assert bl.main(["paper", "fig9", *flags, "--sparsity", "0.0001", "--finetune-epochs", "0"]) == 2
    out, err = capsys.readouterr()
    assert re.search("error: 1 run.* sr .*30%", err.splitlines()[-1])
    assert [row for row, cells in table(out).items() if cells["before"] == "-"] == ["SR"]


@pytest.mark.parametrize("change, ticks", [
    ({}, ("yes", "yes", "yes")), ({"rewind": 1000}, ("no", "yes", "yes")), ({"method": "lrr"}, ("no", "yes", "yes")),
    ({"passed": False}, ("yes", "yes", "no")), ({"passed": None}, ("yes", "yes", "no")),  # of another size: not passed
    ({"post_finetune_acc": 61.0}, ("yes", "no", "yes")),  # 3 standard errors of the difference are 2.1 points
    ({"pre_finetune_acc": 79.0}, ("yes", "no", "yes")), ({"post_finetune_acc": None}, ("yes", None, "yes")),
])  # fmt: skip
def test_every_column_shows_its_figure(change, ticks):
    """And Table 1's ticks are right: clearly better than untrained and than random weights; all checks passed."""
    r = {"method": "snip", "images": [9, 10_000], "search_epochs": 2, "finetune_epochs": 3, "reestimated_acc": 12.5}
    r |= {"kept": 40, "kept_m": 10, "total": 100, "pre_finetune_acc": 11.0, "post_finetune_acc": 80.0} | change
    r["checks"] = {name: {"post_finetune_acc": 20.0 + i, "passed": True} for i, name in enumerate(gm.CHECKS)}
    r["checks"]["reinit"]["passed"] = change.get("passed", True)
    figures = {
        "search epochs": 2, "all epochs": 5, "kept %": 40, "r(p)q %": 10, "before": r["pre_finetune_acc"],
        "BN re-estimated": 12.5, "after": r["post_finetune_acc"], "shuffled": 20, "drawn anew": 21, "inverted": 22,
        **dict(zip(("at initialisation", "finetunable", "passes the checks"), ticks)),
    }  # fmt: skip
    shown = bl.figures_of(r, {"post_finetune_acc": 60.0})
    assert figures == {column: shown.get(column) for column in figures}
    assert all(set(experiment.columns.split(", ")) <= set(figures) for experiment in bl.EXPERIMENTS.values())
    assert bl.cell(["yes", "no", "yes"], "no") == "yes: 2, no: 1 (no)"  # of three seeds


README = (HERE / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_every_command_of_the_readme_and_the_headers_is_understood(tmp_path, monkeypatch):
    """Also those for a GPU, where there is none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    text = "\n".join([gm.__doc__, bl.__doc__, *blocks("bash")])
    commands = re.findall(r"^ *python (gem_miner.py|baselines.py) (.+)", text, re.M)
    assert len({program for program, _ in commands}) == 2
    for program, flags in commands:
        method, *more = argv = shlex.split(flags, comments=True)
        if method == "paper":
            assert bl.main([*argv, "--dry-run"]) == 0
        elif program == "baselines.py":
            bl.complete([method.replace("bench", "dense"), *more])
        else:
            settings(flags)


def test_the_readme_and_the_header_agree_with_the_code():
    """Every deviation has its comment and its reason; what there is to read exists; how to test is said."""
    code = {path.name: path.read_text() for path in HERE.glob("*.py")}
    listed = re.findall(r"^    (\d)\. ", gm.__doc__, re.M)
    assert listed == list("123456789")
    for i in listed:
        assert f"Deviation {i}" in code["gem_miner.py"].replace(gm.__doc__, "")
        assert re.search(rf"^{i}\. ", README, re.M)
    to_read = README.split("\n## How to read the code\n")[1].split("\n## ")[0]
    for name in re.findall("`([^`]+)`", to_read):
        defined = r"^(?: *(?:def|class) {0}\b|# --- .*{0}|{0} = )".format(re.escape(name))
        assert name in code or re.search(defined, "\n".join(code.values()), re.M), name
    assert "\n## Tests\n" in README
    assert "\npytest -q\n" in README.split("\n## Tests\n")[1]


def test_the_readmes_examples_run(tmp_path, monkeypatch, capsys):
    """Every one prints. gem_miner.py needs neither its neighbours nor torchvision, and its import draws nothing."""
    monkeypatch.chdir(tmp_path)
    for example in blocks("python"):
        if "gem_miner import" in example:
            exec(re.sub(r"epochs=\d+", "epochs=1", example).replace("range(steps)", "range(3)"), {})
            assert capsys.readouterr().out
    shutil.copy(HERE / "gem_miner.py", tmp_path)
    script = "import sys, torch; before = torch.get_rng_state(); import gem_miner\n"
    script += "assert torch.equal(before, torch.get_rng_state()) and not {'torchvision', 'models'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)


TOGETHER = """
import sys, torch
import torch.distributed as dist
import gem_miner as gm

assert gm.main(sys.argv[1:]) == 0
torch.manual_seed(0)
x, y = torch.randn(15, 4), torch.arange(15) % 3
data, ends = list(zip(x.split(6), y.split(6))), []  # 6, 6, and 3 examples, which are too few for two processes
for train, rank, world in ((data[:2], 0, 1), (data, dist.get_rank(), 2)):
    torch.manual_seed(0)
    f = gm.Network(torch.nn.Sequential(torch.nn.Linear(4, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3)))
    f.rank, f.world = rank, world
    gem = gm.mine(f, train, sparsity=0.3, epochs=4, lr=1.0, lam=0.01)
    v = gm.finetune(f, gem.w, gem.q, train, epochs=2, lr=0.1)
    ends.append(torch.cat([gem.p, gem.q, v, *(p.flatten() for p in f.unpruned().values())]))
assert torch.allclose(*ends, atol=1e-5), ends
both = [None, None]
dist.all_gather_object(both, ends[1].tolist())
assert both[0] == both[1]
"""


def test_several_processes_are_as_one(pictures, tmp_path, monkeypatch, capfd):
    """Of torchrun: the same scores, masks and weights as one, and each has the same; one alone prints and writes.

    A remainder that has fewer than two examples for each is left out: of 32 images in batches of 29, three.
    """
    (tmp_path / "together.py").write_text(TOGETHER)
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    argv = f"--standalone --nproc-per-node 2 {tmp_path / 'together.py'} --dataset folder:{pictures} --model resnet20"
    argv += f" --out {tmp_path / 'run'} --sparsity 0.3 --device cpu --epochs 1 --finetune-epochs 0 --batch-size 29"
    torchrun(argv.split())
    assert capfd.readouterr().out.count("pre-finetune") == 1
    assert json.loads((tmp_path / "run" / "result.json").read_text())["kept"] == 80_347


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gpu_agrees_with_cpu(pictures, monkeypatch):
    """In float32: by default GPUs round the inputs of convolutions to TF32, and mining is chaotic in single scores."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    data, gems = gm.load_data(f"folder:{pictures}", None), []
    for device in ("cpu", "cuda"):
        split = gm.Split(data.train.x.to(device), data.train.y.to(device))
        torch.manual_seed(0)
        model, train = models.build("resnet20", 2).to(device), gm.Batches(split, gm.pixel_stats(split.x), 8, True, 2)
        gems.append(gm.mine(model, train, sparsity=0.5, epochs=1))
    assert torch.equal(gems[0].w, gems[1].w.cpu())
    assert (gems[0].p - gems[1].p.cpu()).abs().mean() < 1e-3
    assert (gems[0].q != gems[1].q.cpu()).float().mean() < 0.01
    model, data = models.build("resnet20").double(), (torch.randn(20, 3, 8, 8).double(), torch.arange(20) % 4)
    for score in ("snip", "grasp", "synflow", "prospr", "random"):
        cpu, gpu = (bl.at_init(model.to(device), data, score=score, sparsity=0.1) for device in ("cpu", "cuda"))
        assert gpu.m.is_cuda
        assert (cpu.m != gpu.m.cpu()).double().mean() < 0.001

