# SPDX-License-Identifier: MIT
"""Every method that "Rare Gems" compares Gem-Miner with, on the same networks, data, training loop and output.

    python baselines.py imp --rewind 1000 --sparsity 0.0144    # METHOD, and the flags of gem_miner.py
    python baselines.py paper table3 --dry-run                 # a table or figure of the paper: its runs, their cost
    python baselines.py paper table3 --epochs 20 --seeds 3     # the same, run, each 150 epochs scaled down to 20
    python baselines.py bench                                  # what a step of training costs on this machine

A method finds, for weights w, a mask m of what to keep; gem_miner.finetune then trains w under m. In the order of
the paper's Table 1, with the epochs that the search costs at 1.44% where the paper trains for 150:

    imp        iterative magnitude pruning: train, remove 20%, rewind             19 * 150   Frankle & Carbin 2019
    snip       |w * dL/dw|, one batch                                             1 batch    Lee et al. 2019
    grasp      w * (H dL/dw), 10 images a class                                   1 batch    Wang et al. 2020
    synflow    |w| * dR/d|w|, no data, 100 rounds                                 no data    Tanaka et al. 2020
    ep         edge-popup: learned scores, the top of each layer                  150        Ramanujan et al. 2020
    sr         smart ratio: random within layers of given densities               none       Su et al. 2020
    lrr        learning-rate rewinding: imp, but the weights stay as trained      19 * 150   Renda et al. 2020
    prospr     |dL/dm| through a few steps of training                            1 batch    Alizadeh et al. 2022
    magnitude  |w| as drawn;   random  uniformly random;   dense  everything      none       controls

Long Gem-Miner (Table 4) is  python gem_miner.py --epochs 3000 --period 150 --finetune-epochs 150.

As a library: METHOD(model, train, sparsity=..., epochs=..., seed=0, ...) -> Gem(w, scores, m, m), where METHOD is
imp, edge_popup, smart_ratio_ticket or at_init(..., score="snip"); then gem_miner.finetune(model, gem.w, gem.m, train).
New weights are drawn, except with init=gem_miner.given.

Where the authors of a method and the code of Rare Gems differ, a comment says so ("Theirs:" the method's).
All are trained alike: Kaiming-normal weights (ep: signed constants), SGD with momentum 0.9 and weight decay 1e-4, the
epochs, batches and milestones of Table 15, and a learning rate of 0.1 (ep: 0.1 and a cosine on ResNet-20, else 0.01),
as the authors of Rare Gems trained them on ResNet-20.
"""

import collections
import contextlib
import copy
import functools
import itertools
import json
import math
import os
import re
import shlex
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.func import functional_call

import gem_miner as gm

# ------------------------------------------------------------------------------------------------------------
# What all methods share
# ------------------------------------------------------------------------------------------------------------


def method(find):
    """Turn find(f, train, **settings) -> (w, scores, m) into what gem_miner.run_command needs.

    The result takes a model or Network, and returns a Gem whose q is m, leaving the model in eval mode, holding
    w * m. Its last row is that of the untrained ticket itself: f(w * m, x), its loss that of one batch.
    """

    @functools.wraps(find)
    def wrapped(model, train, *, epochs=1, seed=0, batch_size=128, on_epoch=None, state=None, **settings):
        f = gm.Network.of(model)
        if not 0 < settings.get("sparsity", 1) <= 1:
            raise gm.InputError(f"sparsity is the fraction of weights kept, in (0, 1], not {settings['sparsity']}")
        if state and "ticket" in state:
            w, p, m = state["ticket"]
            f.restore(state["rest"])
        else:
            common = dict(epochs=epochs, seed=seed, batch_size=batch_size, on_epoch=on_epoch, state=state)
            w, p, m = find(f, train, **common, **settings)
            empty = [name for name, n in f.counts(m).items() if n == 0]
            if empty:
                warnings.warn(f"no weight is left in {', '.join(empty)}: raise the sparsity", stacklevel=2)
            if on_epoch:
                tally, kept = gm.Tally(), int(m.count_nonzero())
                with gm.seeded(f.device, seed, "ticket"), torch.no_grad():
                    x, y = next(gm.minibatches(train, batch_size, f.device))
                    tally(f.eval()(w * m, x), y)
                row = tally.row(epochs, 0.0, w) | {"q": kept, "m": kept, "stage": "ticket"}
                on_epoch(row, w * m, {"epoch": epochs, "ticket": (w, p, m), "rest": f.rest()})
        f.eval()
        f.load(w * m)
        return gm.Gem(w, p, m, m)

    return wrapped


def draw(f, init, seed):
    """The weights w (d,) that mine() would draw from this seed."""
    with gm.seeded(f.device, seed, "init"):
        return init(f).to(f.device)


def floor(x):
    return int(x + 1e-6)  # int((1 - 0.9) * 10) is 0


def largest(p, sizes, counts, invert=False):
    """The mask, in bool, of the counts[l] largest of each part of p, (d,), of sizes[l] (invert: the smallest)."""
    best = [u.topk(n, largest=not invert, sorted=False).indices for u, n in zip(p.split(sizes), counts)]
    m = torch.zeros_like(p, dtype=torch.bool)
    for u, i in zip(m.split(sizes), best):
        u[i] = True
    return m


def several(on_epoch, i, name, epochs, more):
    """on_epoch for the i-th of several trainings: rows say which it is, states hold what more() gives as well."""

    def inner(row, v, state):
        row = row | {"epoch": i * epochs + row["epoch"], "stage": f"{name} {i}"}
        on_epoch(row, v, {"epoch": row["epoch"], "number": i, "inner": state, **more()})

    return on_epoch and inner


# ------------------------------------------------------------------------------------------------------------
# Pruning by training: IMP and learning-rate rewinding
# ------------------------------------------------------------------------------------------------------------


def imp_rounds(s):
    """Rounds of 20% that come nearest to s, by ratio: 19 for 1.44%."""
    if s > 0.89:
        raise gm.InputError(f"each round removes 20% of the weights: take a sparsity below 0.9, not {s:g}")
    return round(math.log(s) / math.log(0.8))


@method
def imp(
    f, train, *, sparsity, epochs, rewind=0, lr=0.1, schedule=gm.multistep, init=gm.kaiming_normal,
    seed, batch_size, on_epoch, state,
):  # fmt: skip
    """Iterative magnitude pruning (Frankle & Carbin, 2019; Frankle et al., 2020). Cost: `epochs`, over all rounds.

    A round trains the surviving weights, removes the 20% of them that are smallest in absolute value, over the whole
    network, and sets the others back to what they were after `rewind` steps of the first round: 0 is "cold",
    1000 "warm". None never sets them back: learning-rate rewinding (Renda et al., 2020), since every round's
    learning rate starts anew. (Theirs: BatchNorm and biases are rewound too; Rare Gems leaves them. In Frankle's
    warm rounds the learning rate goes on from that step; here, as in Rare Gems, it starts anew.)
    """
    rounds = imp_rounds(sparsity)
    if epochs < rounds:
        raise gm.InputError(f"{rounds} rounds need {rounds} epochs or more, not {epochs}")

    def check(steps):
        if rewind and steps < rewind:
            raise gm.InputError(
                f"there is no step {rewind} to rewind to: the first round has {steps}; take less, or longer rounds"
            )

    if isinstance(train, gm.Batches):  # whose length is known
        check(len(train) * (epochs // rounds))
    w = start = draw(f, init, seed)
    m, first, steps, rest = torch.ones_like(w), 0, 0, f.rest()
    if state:
        start, m, first, steps = state["start"].to(w), state["m"].to(w), state["number"], state["steps"]
        rest = state["rest"]

    def remembering(params, eta):
        """sgd_decayed, which also records weights and BatchNorm after step `rewind`."""

        def after_step(*_):
            nonlocal start, rest, steps
            steps += 1
            if steps == rewind:
                start, rest = params[0].detach().clone(), f.rest()

        opt = gm.sgd_decayed(params, eta)
        opt.register_step_post_hook(after_step)
        return opt

    for i in range(first, rounds):
        w = gm.finetune(
            f, w, m, train, epochs=epochs // rounds, lr=lr, optimizer=remembering, schedule=schedule,
            batch_size=batch_size, seed=f"{seed}, round {i}", state=state["inner"] if state and i == first else None,
            on_epoch=several(
                on_epoch, i, "round", epochs // rounds,
                lambda m=m: dict(start=start, rest=rest, m=m.bool(), steps=steps),
            ),
        )  # fmt: skip
        check(steps)
        p, alive = w.abs(), int(m.count_nonzero())
        with gm.seeded(f.device, seed, "prune", i):
            # One more than 20%: theirs (open_lth) keeps what is strictly above the threshold.
            m = gm.freeze(p, m, max(1, alive - math.ceil(alive / 5) - 1))
        if rewind is not None:
            w = start
            f.restore(rest)
    return w, p, m


# ------------------------------------------------------------------------------------------------------------
# Pruning at initialisation: a score for each weight
# ------------------------------------------------------------------------------------------------------------


def snip(f, w, batches):
    """SNIP (Lee et al., 2019): |dL/dc| at c = 1 for weights c * w, which is |w * dL/dw|. Cost: one batch."""
    # Theirs: BatchNorm's initial statistics (0, 1), not the batch's. And they train a second draw of the weights,
    # which here is the check "weight reinitialisation".
    f.eval()
    x, y = next(batches())
    w = w.clone().requires_grad_()
    return (w * torch.autograd.grad(F.cross_entropy(f(w, x), y), w)[0]).abs().detach()


def grasp(f, w, batches, per_class=10, T=200):
    """GraSP (Wang et al., 2020): w * (H g), g = dL/dw, H the Hessian. Cost: 10 images a class, twice.

    Their score is -w * (H g), and they remove the LARGEST: so what we keep is the largest w * (H g). The logits are
    divided by T before the softmax. g is summed over all batches; H is that of each batch, applied to that sum.
    """
    f.train()  # Theirs: the .eval() is commented out.
    w = w.clone().requires_grad_()
    parts = balanced(f, w, batches(), per_class)

    def gradient(x, y):
        return torch.autograd.grad(F.cross_entropy(f(w, x) / T, y, reduction="sum"), w, create_graph=True)[0]

    g = sum(gradient(x, y).detach() for x, y in parts)
    Hg = sum(torch.autograd.grad(gradient(x, y) @ g, w)[0] for x, y in parts)
    return w.detach() * Hg


def balanced(f, w, batches, per_class):
    """The first per_class images of every class (fewer, where there are not as many), in batches."""
    xs, ys, seen = [], [], collections.Counter()
    for x, y in batches:
        if not xs:
            with torch.no_grad():
                classes, size = f(w, x).shape[1], len(y)
        for i, label in enumerate(y.tolist()):
            if seen[label] < per_class:
                seen[label] += 1
                xs.append(x[i].clone())
                ys.append(y[i])
        if len(ys) == classes * per_class:
            break
    pieces = math.ceil(len(ys) / size)
    return list(zip(torch.stack(xs).chunk(pieces), torch.stack(ys).chunk(pieces)))


def synflow(f, w, batches):
    """SynFlow (Tanaka et al., 2020): |w| * dR/d|w|, where R sums the logits of an image of ones under |w|. No data.

    Iterated over 100 rounds and in float64: R overflows float32 on MobileNet-V2 and ResNet-50.
    """
    f.eval()  # BatchNorm's initial statistics make it the identity; a batch's own would be 0 / 0.
    f.restore({n: t.abs() for n, t in f.rest().items()})
    x = torch.ones_like(next(batches())[0][:1], dtype=w.dtype)
    v = w.abs().requires_grad_()
    return torch.autograd.grad(f(v, x).sum(), v)[0].mul_(v.detach())


def prospr(f, w, batches, K=3, eta=0.1):
    """ProsPr (Alizadeh et al., 2022): |dL(theta_K)/dc| at c = 1, theta_0 = c * w, after K steps of SGD on one batch.

    c acts once, before the steps, and the gradient goes back through all of them. K = 0 is SNIP (on the batch's own
    BatchNorm statistics). Biases and affine BatchNorm take the steps too. K, eta and the single batch are their
    command line's. Cost: K + 1 steps, differentiated twice.
    """
    f.train()
    x, y = next(batches())
    x = x.contiguous()  # for MPS, as in Network.forward
    c = torch.ones_like(w).requires_grad_()
    others = [n for n, p in f.model.named_parameters() if n not in f.weights and p.requires_grad]
    theta = [c * w, *(f.model.get_parameter(n) for n in others)]

    def loss():
        return F.cross_entropy(functional_call(f.model, {**f.views(theta[0]), **dict(zip(others, theta[1:]))}, (x,)), y)

    for _ in range(K):
        theta = [t - eta * g for t, g in zip(theta, torch.autograd.grad(loss(), theta, create_graph=True))]
    return torch.autograd.grad(loss(), c)[0].abs()


def magnitude(f, w, batches):
    """|w| as drawn: with Kaiming's distribution, what remains is in the layers with few inputs."""
    return w.abs()


def random(f, w, batches):
    return torch.rand(f.d, dtype=w.dtype).to(w)


class Score(NamedTuple):
    """A method of this section: its score, and how many of d weights its authors' rule keeps at sparsity s."""

    score: object  # (f, w (d,), batches) -> (d,), the largest are kept
    count: object = lambda d, s: round(d * s)
    rounds: int = 1  # after round k of n, s^(k/n) of the weights are left
    dtype: torch.dtype | None = None  # to score in; default: the network's


SCORES = {
    "snip": Score(snip),
    # Theirs removes what is above the smallest of the d * (1 - s) largest scores, but not that one.
    "grasp": Score(grasp, lambda d, s: min(d, d - floor(d * (1 - s)) + 1)),
    "synflow": Score(synflow, lambda d, s: d - floor(d * (1 - s)), rounds=100, dtype=torch.float64),
    "prospr": Score(prospr, lambda d, s: math.ceil(d * s - 1e-6)),
    "magnitude": Score(magnitude),
    "random": Score(random),
    "dense": Score(magnitude, lambda d, s: d),
}


@method
def at_init(
    f, train, *, score, sparsity, init=gm.kaiming_normal, invert=False, seed, batch_size, epochs, on_epoch, state
):
    """Keep the weights with the largest scores (invert: the smallest); score is a key of SCORES.

    Scores are computed on a copy of the network, so that BatchNorm's statistics stay as they are.
    """
    how, w = SCORES[score], draw(f, init, seed)
    cpu = how.dtype and f.device.type == "mps"  # MPS has no float64
    f = gm.Network(copy.deepcopy(f.model).to("cpu" if cpu else f.device, how.dtype or f.dtype))
    batches = functools.partial(gm.minibatches, train, batch_size, f.device)
    v, m = w.to(f.device, f.dtype), torch.ones(f.d, dtype=torch.bool, device=f.device)
    with gm.seeded(f.device, seed, "score"):
        for k in range(1, how.rounds + 1):
            p = how.score(f, v * m, batches)
            if not p.sum().isfinite():
                raise FloatingPointError(f"{score}'s scores are not finite on this network")
            alive, n = p[m], max(1, how.count(f.d, sparsity ** (k / how.rounds)))
            m = m.masked_scatter(m, largest(alive, [len(alive)], [n], invert))
    return w, p.to(w), m.to(w)


# ------------------------------------------------------------------------------------------------------------
# Edge-popup, and the variants of Table 3
# ------------------------------------------------------------------------------------------------------------


def popup_count(d, s, j, E, T):
    """Gradual pruning: how many of d weights are in the mask in epoch j; T: period. From s^(1/n) on, in n steps."""
    n = max(1, (E - 1) // T)
    updated = T * max(0, (j - 2) // T)  # Rare Gems' code, counting epochs from 0: at the end of epochs T, 2T, ...
    return max(1, d - math.ceil(d * (1 - s ** (min(n, max(1, (updated + 1) // T)) / n)) - 1e-6))


@method
def edge_popup(
    f, train, *, sparsity, epochs, whole=False, period=None, regularize=False, lr=0.1, init=gm.signed_constant,
    invert=False, seed, batch_size, on_epoch, state,
):  # fmt: skip
    """Edge-popup (Ramanujan et al., 2020): learn scores p; the network is w * m, m the top s of |p| in every layer.

    Nothing is frozen, and the gradient reaches p as if m were |p|. Variants of Table 3, each on top of the one
    before: whole: the top s of the whole network; period: starting from more than s, and fewer from period to period
    (weights may return); regularize: with lambda * ||p||^2, lambda = 1e-4. Cost: `epochs`.
    """
    w, d, s, whole = draw(f, init, seed), f.d, sparsity, whole or period
    with gm.seeded(f.device, seed, "scores"):  # U(-1/sqrt(fan_in), 1/sqrt(fan_in)); he_std is sqrt(2/fan_in)
        p = ((2 * torch.rand(d, dtype=f.dtype) - 1) * f.he_std() / 2**0.5).to(w)
    if whole:
        sizes, goal = [d], [max(1, d - math.ceil(d * (1 - s) - 1e-6))]
    else:
        sizes, goal = f.sizes, [n - floor(n * (1 - s)) for n in f.sizes]

    def effective(p, j):
        counts = [popup_count(d, s, j, epochs, period)] if period else goal
        return w * gm.StraightThrough.apply(p.abs(), largest(p.detach().abs(), sizes, counts, invert))

    # Theirs: weight decay 5e-4 on the scores. lambda * ||p||^2 has the gradient of a weight decay of 2 * lambda.
    decayed = functools.partial(gm.sgd, weight_decay=7e-4 if regularize else 5e-4)
    p = gm.fit(
        f, p, effective, train, phase="edge-popup", epochs=epochs, lr=lr, optimizer=decayed, schedule=gm.cosine,
        batch_size=batch_size, seed=seed, on_epoch=on_epoch, state=state,
    ).abs()  # fmt: skip
    return w, p, largest(p, sizes, goal, invert).to(w)


# ------------------------------------------------------------------------------------------------------------
# Smart ratio: only the densities of the layers matter
# ------------------------------------------------------------------------------------------------------------


def smart_ratio(sizes, s, vgg=False, last=0.3):
    """The densities p_1, ..., p_L of Su et al. (2020), for layers of these sizes in forward order. No cost.

    p_l is in proportion to (L-l+1)^2 + (L-l+1), for VGG divided by l^2; p_L = 0.3. What would exceed 1 is carried
    over to the next layer.
    """
    L, budget = len(sizes), s * sum(sizes) - last * sizes[-1]
    if L < 2 or budget <= 0:
        least = last * sizes[-1] / sum(sizes)
        raise gm.InputError(f"smart ratio keeps 30% of the last layer: take a sparsity above {least:.2g}, not {s:g}")
    raw = [((L - l + 1) ** 2 + (L - l + 1)) / (l**2 if vgg else 1) for l in range(1, L)]
    g = budget / sum(n * r for n, r in zip(sizes, raw))
    p, carry = [g * r for r in raw], 0
    for l in range(L - 1):
        p[l] += carry / sizes[l]
        carry = floor((p[l] - 1) * sizes[l]) if p[l] > 1 else 0
        p[l] = min(p[l], 1.0)
        if not carry:
            break
    return [*p, last]


def ratio_grid(p):
    """SR-v4: 144 sets of densities around p (those of IMP), as in the authors' grid search on ResNet-20.

    The first and last layers gain and lose 10 points, or nothing. Of the 7, 6 and 5 layers between them, up to half
    at the front gain, and as many at the back lose, 1, 0.5 and 0.1 points. (Other depths: in proportion.)
    """
    inner = len(p) - 2
    cuts = [0, round(7 * inner / 18), round(13 * inner / 18), inner]
    changes = [[(0.1,), (0.0,), (-0.1,)]]
    for a, b, step, of in zip(cuts, cuts[1:], (0.01, 0.005, 0.001), (7, 6, 5)):
        some = [(b - a) * k // of for k in range(of // 2, -1, -1)]
        changes.append([[step] * k + [0.0] * (b - a - 2 * k) + [-step] * k for k in some])
    grid = [[ends[0], *front, *middle, *back, -ends[0]] for ends, front, middle, back in itertools.product(*changes)]
    return [[min(1.0, max(0.0, x + y)) for x, y in zip(p, change)] for change in grid]


def random_mask(f, p, seed):
    """int(p_l * n_l) weights, uniformly at random, of each layer."""
    m = torch.cat([torch.arange(n) < floor(x * n) for n, x in zip(f.sizes, p)])
    return gm.shuffle(f, m.to(f.device, f.dtype), f"{seed}, smart ratio")


@method
def smart_ratio_ticket(
    f, train, *, densities, tune=None, epochs, init=gm.kaiming_normal, seed, batch_size, on_epoch, state
):
    """Random weights of every layer; densities: f -> (p_1, ..., p_L).

    tune: with this learning rate, first minimise equation (1) of appendix B by SGD over p, with the layer's weights,
    signed constants, kept with probability p_l, redrawn in every step (SR-v5, v6). Cost: then `epochs`.
    """
    p = densities(f)
    if tune:
        sizes, fixed, fresh = torch.tensor(f.sizes, device=f.device), draw(f, gm.signed_constant, seed), f.rest()

        def boxed(params, eta):
            opt = gm.sgd(params, eta)
            opt.register_step_post_hook(lambda *_: params[0].data.clamp_(0, 1))
            return opt

        p = gm.fit(
            f, torch.tensor(p, dtype=f.dtype),
            lambda p, j: fixed * gm.round_random(p.repeat_interleave(sizes, output_size=f.d)), train,
            # Rare Gems' code: a cosine over 150 epochs, of which the paper has the tenth. That is all but constant.
            phase="equation 1", epochs=epochs, lr=tune, optimizer=boxed, schedule=lambda eta, j, E: eta,
            batch_size=batch_size, seed=seed, on_epoch=on_epoch, state=state,
        ).tolist()  # fmt: skip
        f.restore(fresh)
    m = random_mask(f, p, seed)
    return draw(f, init, seed), m, m


@method
def smart_ratio_search(
    f, train, *, densities, trials, epochs, lr=0.1, schedule=gm.multistep, init=gm.kaiming_normal,
    seed, batch_size, on_epoch, state,
):  # fmt: skip
    """SR-v4: of `trials` of the sets of densities around f's, the one that trains best. train: a Batches.

    Judged by a tenth of the training images, held out (the authors' code judges by the test set). Cost: `epochs`.
    """
    rest, held = hold_out(train)
    grid, fresh, w = ratio_grid(densities(f)), f.rest(), draw(f, init, seed)
    with gm.seeded(f.device, seed, "trials"):
        order = torch.randperm(len(grid))[:trials].tolist()
    first, accs = (state["number"], state["accs"]) if state else (0, [])
    for i in range(first, len(order)):
        f.restore(fresh)
        m = random_mask(f, grid[order[i]], seed)
        v = gm.finetune(
            f, w, m, rest, epochs=epochs // trials, lr=lr, schedule=schedule, batch_size=batch_size, seed=seed,
            state=state["inner"] if state and i == first else None,
            on_epoch=several(on_epoch, i, "trial", epochs // trials, lambda: dict(accs=list(accs))),
        )  # fmt: skip
        accs.append(gm.accuracy(f, held, v))
    f.restore(fresh)
    m = random_mask(f, grid[order[accs.index(max(accs))]], seed)
    return w, m, m


def hold_out(train):
    """Two Batches: nine tenths of a Batches, and the other tenth as it is, neither cropped nor flipped."""
    (h, w), pad, stats = train.size, train.pad, (train.mean, train.std)
    rest, held = gm.divide(gm.Split(train.x[:, pad : pad + h, pad : pad + w], train.y), 0.1)
    size = max(1, 1_000_000 // train.size.numel())
    return gm.Batches(rest, stats, train.batch_size, True, pad, train.shown), gm.Batches(held, stats, size)


# ------------------------------------------------------------------------------------------------------------
# The command line of a method
# ------------------------------------------------------------------------------------------------------------

METHODS = {
    "dense": "train all weights",
    "imp": "iterative magnitude pruning",
    "snip": "|w * dL/dw|, one batch",
    "grasp": "w * (Hessian * gradient), 10 images a class",
    "synflow": "|w| * dR/d|w|, 100 rounds, no data",
    "ep": "edge-popup: learned scores",
    "sr": "smart ratio: random, with given densities of the layers",
    "lrr": "learning-rate rewinding: IMP that keeps the trained weights",
    "prospr": "|dL/dm| through 3 steps of training",
    "magnitude": "|w| at initialisation",
    "random": "uniformly at random",
}


def parser():
    import models

    cli = gm.Parser(prog="baselines.py", description="What Rare Gems compares Gem-Miner with.")
    methods = cli.add_subparsers(dest="method", metavar="METHOD", required=True)
    subs = {}
    for name, about in METHODS.items():
        subs[name] = methods.add_parser(name, help=about, description=about)
        gm.flags_of_all_methods(subs[name])
        subs[name].set_defaults(finetune_mask="q")
    count, rate = gm.count, gm.rate
    g = subs["imp"].add_argument_group("pruning")
    g.add_argument("--rewind", type=gm.natural, default=0, help="to this iteration; 0, cold, is the default")
    for name in ("imp", "lrr", "sr"):
        about = "of a round, or of a trial of sr (default: as --finetune-epochs)"
        subs[name].add_argument("--round-epochs", type=count, help=about)
    g = subs["ep"].add_argument_group("variants of Table 3")
    g.add_argument("--global", action="store_true", help="the top scores of the whole network, not of each layer")
    g.add_argument("--gradual", action="store_true", help="--global, with fewer from period to period")
    g.add_argument("--regularize", action="store_true", help="--gradual, with an L2 penalty on the scores")
    g.add_argument("--period", type=count, help="T of --gradual (default: Gem-Miner's)")
    subs["ep"].add_argument("--lr", type=rate, default=0.1, help="learning rate of the scores (default: 0.1)")
    g = subs["sr"].add_argument_group("variants of Table 16")
    g.add_argument("--version", type=int, choices=range(1, 7), default=1, help="SR-v1 to SR-v6 (default: 1)")
    about = (
        "folder of the run to take densities from: a gem's for 2 and 5, IMP's (made here: cold) for 4, SR-v4's for 6"
    )
    g.add_argument("--from", metavar="RUN", help=f"{about} (default: make it first, below --out)")
    g.add_argument("--trials", type=count, default=144, help="how many of SR-v4's 144 densities (default: all)")
    g.add_argument("--lr", type=rate, default=1e-6, help="learning rate of the densities, 5 and 6 (default: 1e-6)")
    about = "a table or figure of the paper"
    paper = methods.add_parser("paper", help=about, description=ABOUT)
    paper.add_argument("experiment", choices=EXPERIMENTS)
    paper.add_argument("--epochs", type=count, help="instead of the paper's; all else scales with it")
    paper.add_argument("--seeds", type=count, default=1, help="how many, from 0 on (default: 1)")
    about = "instead of the paper's; may be repeated, as --sparsity"
    paper.add_argument("--model", action="append", choices=models.MODELS, help=about)
    paper.add_argument("--dataset", default="cifar10", help="(default: cifar10)")
    paper.add_argument("--sparsity", action="append", type=gm.fraction)
    paper.add_argument("--dry-run", action="store_true", help="only list the runs, and their cost in epochs")
    paper.add_argument("--so-far", action="store_true", help="run nothing: print the runs that are complete in --out")
    paper.add_argument(
        "--out", type=gm.place, default=Path("runs/paper"), help="folder of the runs (default: runs/paper)"
    )
    about = "what a step of training costs here, dense, mining and finetuning: a table in Markdown"
    speed = methods.add_parser("bench", help=about, description=about)
    speed.add_argument("--model", choices=models.MODELS, default="resnet20", help="(default: resnet20)")
    speed.add_argument("--all", action="store_true", help="every network")
    about = "whose number, size and classes of images (random ones) to take (default: the network's in the paper)"
    speed.add_argument("--dataset", choices=IMAGES, help=about)
    speed.add_argument("--batch-size", type=count, help="(default: the paper's)")
    speed.add_argument("--rounds", type=count, default=11, help="how often each is measured (default: 11)")
    gm.flags_of_hardware(speed)
    return cli


def prepared(argv):
    """The arguments and the Plan of the run `METHOD ...`, or `gem-miner ...`."""
    if argv[0] == "gem-miner":
        args = gm.complete(gm.read(gm.parser(), argv[1:]))
        return args, gm.plan(args)
    args = gm.read(parser(), argv)
    idle = []  # flags that would change nothing
    if args.method == "sr":
        versions = {"--from": (2, 4, 5, 6), "--lr": (5, 6), "--trials": (4, 6), "--round-epochs": (4, 6)}
        idle = [flag for flag, those in versions.items() if args.version not in those]
    elif args.method == "ep" and not (args.gradual or args.regularize):
        idle = ["--period"]
    for word in argv:
        if word.split("=")[0] in idle:
            raise gm.InputError(f"{word} changes nothing in this {args.method}: leave it out")
    if args.method == "dense":
        args.sparsity = 1.0
    if args.finetune_lr is None and args.dataset != "caltech101":  # there the weights are pretrained: Table 15
        args.finetune_lr = 0.01 if args.method == "ep" and args.model != "resnet20" else 0.1
    if args.finetune_schedule is None and args.method == "ep" and args.model == "resnet20":
        args.finetune_schedule = "cosine"
    gm.complete(args)
    if "round_epochs" in args:
        args.round_epochs = args.round_epochs or args.finetune_epochs or args.epochs
    if "trials" in args:
        args.trials = min(args.trials, 144)
    how = plan(args)
    if args.checks and not how.checks:
        raise gm.InputError(f"{args.method} finds no ticket at initialisation to check: leave --checks out")
    return args, how


def plan(args):
    """A method as gem_miner.run_command needs it."""
    name, s, text, draws = args.method, args.sparsity, METHODS[args.method], gm.kaiming_normal
    training = dict(lr=args.finetune_lr, schedule=gm.finetune_schedule(args))
    if name in SCORES:
        epochs = int(name not in ("dense", "magnitude", "random"))  # 1 for a batch, as in Table 1
        checks = {"dense": (), "random": ("shuffle", "reinit")}.get(name, ("shuffle", "reinit", "invert"))
        return gm.Plan(functools.partial(at_init, score=name, sparsity=s), epochs, text, draws, checks=checks)
    if name in ("imp", "lrr"):
        find = functools.partial(imp, sparsity=s, rewind=args.rewind if name == "imp" else None, **training)
        checks = ("shuffle", "reinit") if name == "imp" else ()
        rounds, E = imp_rounds(s), args.round_epochs
        return gm.Plan(find, rounds * E, f"{text}: {rounds} rounds of {E} epochs", draws, checks=checks)
    if name == "ep":
        gradual = args.gradual or args.regularize
        whole = gradual or getattr(args, "global")
        variant = dict(whole=whole, period=args.period if gradual else None, regularize=args.regularize)
        text += f", {args.epochs} epochs, lr {args.lr:g}; the top of {'the network' if whole else 'each layer'}"
        text += (f", fewer every {args.period} epochs" if gradual else "") + ", penalised" * args.regularize
        find = functools.partial(edge_popup, sparsity=s, lr=args.lr, **variant)
        return gm.Plan(find, args.epochs, text)
    start = functools.partial(densities, args)
    if args.version == 4:
        find = functools.partial(smart_ratio_search, densities=start, trials=args.trials, **training)
    else:
        find = functools.partial(smart_ratio_ticket, densities=start, tune=args.lr if args.version > 4 else None)
    epochs = {4: args.trials * args.round_epochs, 5: args.epochs, 6: args.epochs}.get(args.version, 0)
    return gm.Plan(find, epochs, f"{text}, version {args.version}", draws, checks=("shuffle", "reinit"))


def densities(args, f):
    """The p_1, ..., p_L that version args.version of the smart ratio starts from (appendix B).

    1: smart_ratio. 2: the same, but first and last layer as in a gem. 3: but first and last layer dense.
    4: those of IMP, then smart_ratio_search. 5 and 6: those of 2 and 4, then tuned by equation (1).
    """
    if args.version in (4, 6):
        return densities_of(source(args), f, args.sparsity)
    p = smart_ratio(f.sizes, args.sparsity, args.model.startswith("vgg"))
    if args.version == 3:
        p[0] = p[-1] = 1.0
    elif args.version in (2, 5):
        gem = densities_of(source(args), f, args.sparsity)
        p[0], p[-1] = gem[0], gem[-1]
    return p


def densities_of(folder, f, s):
    """The fraction that the run in `folder`, which is of sparsity s, keeps of each layer of f."""
    found = gm.load_gem(folder, f)
    gm.same_settings({"sparsity": s}, found["settings"], folder)
    return [m.count_nonzero().item() / m.numel() for m in found["mask"].values()]


def source(args):
    """The folder of the run that args.version builds on: --from, or a search made now."""
    found = getattr(args, "from")
    if found is None:
        found = args.out / "source"
        rounds = ["--round-epochs", args.round_epochs, "--finetune-lr", args.finetune_lr]
        argv = {4: ["imp", *rounds], 6: ["sr", "--version", 4, "--trials", args.trials, *rounds]}
        argv = argv.get(args.version, ["gem-miner"])
        for name in ("model", "dataset", "sparsity", "image_size", "seed", "batch_size", "data_dir"):
            if getattr(args, name) is not None:
                argv += ["--" + name.replace("_", "-"), getattr(args, name)]
        argv += ["--device", args.device.type, "--bf16" if args.bf16 else "--no-bf16", *["--val"] * args.val]
        argv += ["--epochs", args.finetune_epochs or args.epochs, "--finetune-epochs", 0, "--out", found]
        completed([str(a) for a in argv])
    return Path(found)


def completed(argv, make=True):
    """The result of the run `argv`, log included: the one in its folder, or else None, or (make) run or resumed now."""
    args, how = prepared(argv)

    def result():
        try:
            log = [json.loads(line) for line in (args.out / "log.jsonl").read_text().splitlines()]
            found = json.loads((args.out / "result.json").read_text())
            return found | {"log": log} if found.pop("checksum") == gm.checksum(found, log) else None
        except (AttributeError, KeyError, OSError, TypeError, ValueError):  # not there, or damaged
            return None

    try:
        found = result()
        if found:
            gm.same_settings(gm.settings(args), found, args.out)
        if make and (not found or (args.checks and "checks" not in found)):
            args.resume = (args.out / "checkpoint.pt").exists()
            gm.run_command(args, how)
            found = result()
    except (gm.InputError, FloatingPointError) as e:
        raise gm.InputError(f"{args.command}: {e}") from e
    return found


# ------------------------------------------------------------------------------------------------------------
# The paper's tables and figures
# ------------------------------------------------------------------------------------------------------------

ABOUT = """Run what a table or figure of the paper needs, one run after the other (complete runs in --out are taken as
they are, others resumed), and print it in Markdown, the paper's own figures beside ours. Other flags, such as
--bf16, go to every run."""

COLUMNS = {  # from a result.json
    "search epochs": lambda r: r["search_epochs"],
    "all epochs": lambda r: r["search_epochs"] + r["finetune_epochs"],
    "kept %": lambda r: 100 * r["kept"] / r["total"],
    "r(p)q %": lambda r: 100 * r["kept_m"] / r["total"],
    "before": lambda r: r["pre_finetune_acc"],
    "BN re-estimated": lambda r: r["reestimated_acc"],
    "after": lambda r: r["post_finetune_acc"],
    "shuffled": lambda r: r["checks"]["shuffle"]["post_finetune_acc"],
    "reinitialised": lambda r: r["checks"]["reinit"]["post_finetune_acc"],
    "inverted": lambda r: r["checks"]["invert"]["post_finetune_acc"],
}
CURVES = {  # title: (phases, what to read of a row of log.jsonl)
    "r(p)q, %": (("mine",), lambda row, r: 100 * row["m"] / r["total"]),
    "q, the upper bound, %": (("mine",), lambda row, r: 100 * row["q"] / r["total"]),
    "accuracy, %": (("mine", "finetune"), lambda row, r: row["test_acc"]),
}


def by_epoch(phases, read, r):
    """What read() finds in the log of the result r; rows of a stage belong to no epoch of the run as a whole."""
    return [read(row, r) for row in r["log"] if row["phase"] in phases and "stage" not in row]


CHECKED = ("shuffled", "reinitialised", "inverted")


class Experiment(NamedTuple):
    about: str
    models: tuple
    sparsities: tuple  # (): those of Tables 8 to 11; (None,): the rows have their own
    columns: tuple  # keys of COLUMNS
    rows: dict  # label: (command, {column: the paper's figure}); @LABEL stands for the folder of that row's run
    at: tuple = ()  # the (model, sparsity) that the paper's figures are for; (): the first
    curves: tuple = ()  # keys of CURVES, to give by epoch
    layers: dict | None = None  # to give by layer; (label, model, sparsity): what the authors' own keeps of each


CIFAR = ("resnet20", "mobilenetv2", "vgg16", "wrn28_2")
WARM = {"vgg16": 2000, "wrn28_2": 2000}  # iterations that warm IMP rewinds to, where not 1000
COMPARED = {
    "Gem-Miner": ("gem-miner --checks", {"after": 77.89}),
    "IMP (warm)": ("imp --rewind {warm}", {"after": 74.52}),
    "Renda et al.": ("lrr", {"after": 80.21}),
    "EP": ("ep", {}),
    "SR": ("sr", {"after": 65.61}),
}
EXPERIMENTS = {
    "table1": Experiment(
        "Table 1: what each method takes to find 1.4% of ResNet-20", ("resnet20",), (0.0144,),
        ("search epochs", "kept %", "before", "BN re-estimated", "after", *CHECKED), {
            "IMP": ("imp --rewind {warm} --checks", {"search epochs": 2850}),
            "SNIP": ("snip --checks", {"search epochs": 1}),
            "GraSP": ("grasp --checks", {"search epochs": 1}),
            "SynFlow": ("synflow --checks", {"search epochs": 1}),
            "Edge-popup": ("ep --checks", {"search epochs": 150}),
            "Smart Ratio": ("sr --checks", {"search epochs": "O(1)"}),
            "Learning Rate Rewinding": ("lrr", {"search epochs": 3000}),  # with the last training
            "Gem-Miner": ("gem-miner --checks", {"search epochs": 150}),
        }),
    "table2": Experiment(
        # ProsPr's 82.67% is with its authors' recipe: weight decay 5e-4, batches of 256, drops after 100 and 150 epochs.
        "Table 2: ProsPr and Gem-Miner", ("resnet20",), (None,), ("kept %", "after", "shuffled", "reinitialised"), {
            "ProsPr": ("prospr --sparsity 0.05 --finetune-epochs 200 --checks",
                       {"kept %": 5, "after": 82.67, "shuffled": 82.15, "reinitialised": 81.64}),
            "Gem-Miner": ("gem-miner --sparsity 0.0372 --checks",
                          {"kept %": 3.72, "after": 83.4, "shuffled": 78.73, "reinitialised": 78.6}),
        }),
    "table3": Experiment(
        "Table 3: from edge-popup to Gem-Miner", ("resnet20",), (0.0059,),
        ("kept %", "before", "BN re-estimated", "after"), {
            "EP": ("ep --batch-size 256", {"before": 19.57, "after": 24.47}),
            "Global EP": ("ep --global --batch-size 256", {"before": 22.22, "after": 34.42}),
            "+ Gradual Pruning": ("ep --gradual --batch-size 256", {"before": 31.56, "after": 63.54}),
            "+ Regularization": ("ep --regularize --batch-size 256", {"before": 19.67, "after": 63.72}),
            "Gem-Miner": ("gem-miner", {"before": 45.30, "after": 66.15}),
        }),
    "table4": Experiment(
        # The paper's 3000 are 19 rounds and a last training of 150 epochs. Long Gem-Miner: 3000 to mine, 150 to train.
        "Table 4: Long Gem-Miner", ("resnet20",), (0.0144,), ("all epochs", "kept %", "after"), {
            "GM (cold)": ("gem-miner", {"all epochs": 300, "after": 77.89}),
            "Long GM (cold)": ("gem-miner --epochs {long} --period {E} --finetune-epochs {E}",
                               {"all epochs": 3000, "after": 79.50}),
            "IMP (warm)": ("imp --rewind {warm}", {"all epochs": 3000, "after": 74.52}),
            "Renda et al.": ("lrr", {"all epochs": 3000, "after": 80.21}),
        }),
    "table16": Experiment(
        "Table 16: how far random pruning goes (IMP, not in the table, is where SR-v4 starts)",
        ("resnet20",), (0.0144,), ("kept %", "after"), {
            "Gem-Miner": ("gem-miner", {"kept %": 1.44, "after": 77.89}),
            "IMP": ("imp --rewind {warm}", {}),
            "SR-v1": ("sr", {"kept %": 1.44, "after": 65.61}),
            "SR-v2": ("sr --version 2 --from @Gem-Miner", {"kept %": 1.47, "after": 68.59}),
            "SR-v3": ("sr --version 3", {"kept %": 1.75, "after": 69.78}),
            "SR-v4": ("sr --version 4 --from @IMP --trials 144", {"kept %": 1.44, "after": 69.92}),
            # 1.53 and 1.47% are the densities of the authors' tuning after 10 epochs.
            "SR-v5": ("sr --version 5 --from @Gem-Miner --epochs 10 --finetune-epochs {E}",
                      {"kept %": 1.53, "after": 69.01}),
            "SR-v6": ("sr --version 6 --from @SR-v4 --epochs 10 --finetune-epochs {E}",
                      {"kept %": 1.47, "after": 69.08}),
        }),
    "fig2": Experiment(
        "Fig. 2: density while mining MobileNet-V2 (q is the upper bound)", ("mobilenetv2",), (None,),
        ("r(p)q %", "before", "after"), {  # lambda and s as in Table 9
            "GM, lambda 0": ("gem-miner --lam 0 --sparsity 0.5", {"r(p)q %": "around 50"}),
            "GM, lambda 3e-6": ("gem-miner --lam 3e-6 --sparsity 0.2", {}),
            "GM, lambda 7e-6": ("gem-miner --lam 7e-6 --sparsity 0.05", {"r(p)q %": 2.5}),
            "GM, lambda 1.5e-5": ("gem-miner --lam 1.5e-5 --sparsity 0.0144",
                                  {"r(p)q %": 1.4, "before": 84.62, "after": 87.37}),
            "EP": ("ep --sparsity 0.0144", {}),
        }, curves=("r(p)q, %", "q, the upper bound, %")),
    "fig3": Experiment(
        "Fig. 3: accuracy after finetuning, and Gem-Miner's sanity checks", CIFAR, (), ("kept %", "after", *CHECKED),
        {**COMPARED, "Dense": ("dense", {})}, at=("resnet20", 0.0144)),
    "fig5": Experiment(
        "Fig. 5: accuracy by epoch: mining, then finetuning", ("mobilenetv2",), (0.0144,), ("kept %", "before", "after"), {
            "Gem-Miner": ("gem-miner", {"kept %": 1.16}),
            "Weight training": ("dense", {}),
            "IMP, finetuned": ("imp --rewind {warm}", {}),
        }, curves=("accuracy, %",)),
    "fig6": Experiment(
        "Fig. 6: accuracy before finetuning", CIFAR, (), ("kept %", "before", "BN re-estimated"),
        {label: (command.removesuffix(" --checks"), {"before": 84.62} if label == "Gem-Miner" else {})
         for label, (command, _) in COMPARED.items() if label != "Renda et al."}, at=("mobilenetv2", 0.0144)),
    "fig7": Experiment(
        "Fig. 7: what is kept of each layer", ("resnet20",), (0.5, 0.0373, 0.0144, 0.0059), ("kept %",), {
            "Gem-Miner": ("gem-miner", {}),
            "IMP": ("imp --rewind {warm}", {}),
            "SR": ("sr", {}),
            "EP": ("ep", {}),
        }, layers={
            ("Gem-Miner", "resnet20", 0.0144): (
                149, 165, 190, 200, 165, 160, 147, 189, 296, 290, 250, 209, 169, 125, 232, 136, 244, 120, 258, 166),
            ("IMP", "resnet20", 0.0144): (
                194, 244, 227, 201, 179, 182, 166, 285, 300, 308, 221, 186, 158, 217, 171, 124, 128, 116, 81, 172),
            ("Gem-Miner", "resnet20", 0.0059): (
                111, 78, 103, 106, 80, 86, 60, 71, 113, 162, 103, 103, 39, 40, 40, 44, 29, 26, 33, 153),
        }),
    "fig9": Experiment(
        "Fig. 9: accuracy before and after finetuning, VGG-16", ("vgg16",), (0.014, 0.005),
        ("kept %", "before", "after"), {
            **{f"GM, lr {lr}": (f"gem-miner --lr {lr}", {}) for lr in ("0.01", "0.001", "0.0001", "0.00001")},
            "EP": ("ep", {}),
            "SR": ("sr", {}),
        }),
    "fig10": Experiment(
        "Fig. 10: four kinds of IMP", ("resnet20",), (), ("kept %", "before", "after"), {
            "Gem-Miner": ("gem-miner", {"after": 77.89}),
            "IMP, short, cold": ("imp --round-epochs 8", {}),
            "IMP, short, warm": ("imp --round-epochs 8 --rewind {warm}", {}),
            "IMP, long, cold": ("imp", {}),
            "IMP, long, warm": ("imp --rewind {warm}", {"after": 74.52}),
        }, at=("resnet20", 0.0144)),
}  # fmt: skip
SCALED = ("--epochs", "--period", "--finetune-epochs", "--round-epochs", "--rewind", "--trials")


def runs_of(experiment, args, more):
    """{(label, model, sparsity, seed): argv} of all runs of an Experiment, in order."""
    runs = {}
    for model in args.model or experiment.models:
        listed = [row[2] for row in gm.PAPER if row[:2] == (model, "cifar10")]
        sparsities = args.sparsity or experiment.sparsities or listed
        if not sparsities:
            raise gm.InputError(f"the paper has no sparsities for --model {model} here: give --sparsity")
        E = gm.paper_setting(model, "cifar10", 1).epochs  # what the numbers in EXPERIMENTS are for
        epochs = args.epochs or gm.paper_setting(model, args.dataset, 1).epochs
        for s, seed in itertools.product(sparsities, range(args.seeds)):
            for label, (command, _) in experiment.rows.items():
                argv = command.format(warm=WARM.get(model, 1000), E=E, long=20 * E).split()
                for name, value in (("--model", model), ("--dataset", args.dataset), ("--seed", seed)):
                    argv += [name, str(value)]
                if s and argv[0] != "dense":
                    argv += ["--sparsity", str(s)]
                if epochs != E:
                    argv += [] if "--epochs" in argv else ["--epochs", str(E)]
                    for i in range(1, len(argv)):
                        if argv[i - 1] in SCALED and argv[i] != "0":
                            argv[i] = str(max(1, round(int(argv[i]) * epochs / E)))
                source = [runs[a[1:], model, s, seed][-1] for a in argv if a.startswith("@")]
                options = {}
                for a in [*(source[0] if a.startswith("@") else a for a in argv[1:]), *more]:
                    if a.startswith("--"):
                        values = options[a] = []  # given twice, the later counts
                    else:
                        values.append(a)
                argv = [argv[0], *itertools.chain(*([name, *values] for name, values in options.items()))]
                for aside in ("--checks", "--from", "--device", "--data-dir", "--compile"):
                    options.pop(aside, None)
                words = itertools.chain([argv[0]], *([name, *values] for name, values in options.items()))
                plain = ("--model", "--dataset", "--sparsity")
                name = re.sub(r"[^\w.]+", "-", " ".join(a for a in words if a not in plain))
                runs[label, model, s, seed] = [*argv, "--out", str(args.out / name)]
    return runs


def paper(args, more, command):
    """Run an experiment, and print it in Markdown."""
    experiment = EXPERIMENTS[args.experiment]
    more = [a for a in more if a != "--resume"]  # it always does
    if any(a.split("=")[0] == "--seed" for a in more) or (more and not more[0].startswith("--")):
        raise gm.InputError(f"not for paper: {shlex.join(more)} (for seeds, --seeds HOW_MANY)")
    if "accuracy, %" in experiment.curves and any(a.split("=")[0] == "--eval-every" for a in more):
        raise gm.InputError(f"{args.experiment} draws the accuracy of every epoch: leave --eval-every out")
    runs = runs_of(experiment, args, more)
    costs = {args.command: how.cost(args) for args, how in map(prepared, runs.values())}
    if args.dry_run:
        rows = [[f"`{name}`", f"{cost:,}"] for name, cost in costs.items()]
        print(markdown(["run", "epochs, all in all"], [*rows, [f"{len(rows)} runs", f"{sum(costs.values()):,}"]]))
        return
    try:
        with contextlib.redirect_stdout(sys.stderr):  # so that stdout can go to a file
            found = {key: completed(argv, not args.so_far) for key, argv in runs.items()}
    except KeyboardInterrupt:
        raise KeyboardInterrupt(command) from None
    results = {key: result for key, result in found.items() if result}
    if not results:
        raise gm.InputError(f"no run of {args.experiment} with these flags is complete in {args.out}")

    def of_seeds(read, *key):
        """What read() finds in the result of each seed; nothing where it has no such check."""
        values = []
        with contextlib.suppress(KeyError):
            values = [read(results[*key, seed]) for seed in range(args.seeds) if (*key, seed) in results]
        return [] if None in values else values

    first = next(iter(results.values()))
    if any(r["images"] != first["images"] for r in results.values()):
        raise gm.InputError(f"the runs in {args.out} are not all on the same images: choose another --out")
    print(
        f"## {experiment.about}\n\n{args.dataset}, {'up to ' * args.so_far}{args.seeds} seed{'s, mean ± standard deviation' * (args.seeds > 1)},"
        f" {first['device']}, torch {first['torch']}; accuracies in % of the"
        f" {'validation' if first['val'] else 'test'} images. The paper's figures are at its full number of epochs.\n"
    )
    points = list(dict.fromkeys(key[:3] for key in runs))
    at = experiment.at or (experiment.models[0], experiment.sparsities[0])
    known = {c for _, figures in experiment.rows.values() for c in figures if at in [key[1:] for key in points]}
    head, rows = ["method", "network", "sparsity"], []
    for c in experiment.columns:
        head += [c, "paper" if args.dataset == "cifar10" else "paper (CIFAR-10)"] if c in known else [c]
    for label, model, s in points:
        found = of_seeds(lambda r: r["sparsity"], label, model, s)
        rows.append([label, model, percent(found[0]) if found else "not run"])
        for c in experiment.columns:
            rows[-1].append(spread(of_seeds(COLUMNS[c], label, model, s), 3 if "%" in c else 2))
            if c in known:
                rows[-1].append(experiment.rows[label][1].get(c, "") if (model, s) == at else "")
    print(markdown(head, rows))
    for title, x, xs, lines in pictures(experiment, [key for key in points if of_seeds(len, *key)], of_seeds):
        if x != "sparsity":  # those points are in the table already
            columns = [[f"{y:.2f}" for y in line] + [""] * (len(xs) - len(line)) for line in lines.values()]
            print(markdown([x, *lines], zip(xs, *columns)))
        print(chart(title, xs, lines))


def pictures(experiment, points, of_seeds):
    """(title, meaning of x, its values, {label: the means for each of them}) of what can be drawn."""

    def means(read, *key):
        return [statistics.mean(values) for values in zip(*of_seeds(read, *key))]

    for model in dict.fromkeys(model for _, model, _ in points):
        sparsities = list(dict.fromkeys(s for _, m, s in points if m == model))
        if len(sparsities) > 1 and not experiment.layers:
            c = [c for c in experiment.columns if c in ("before", "after")][-1]
            found = {label: [of_seeds(COLUMNS[c], label, model, s) for s in sparsities] for label in experiment.rows}
            lines = {label: list(map(statistics.mean, values)) for label, values in found.items() if all(values)}
            if lines:
                yield f"{model}: accuracy {c} finetuning (%)", "sparsity", [percent(s) for s in sparsities], lines
        for s in sparsities if experiment.curves else ():
            for title in experiment.curves:
                curve = functools.partial(by_epoch, *CURVES[title])
                lines = {label: means(curve, label, model, s) for label in experiment.rows}
                lines = {label: line for label, line in lines.items() if line}
                yield f"{model}: {title}", "epoch", range(1, 1 + max(map(len, lines.values()))), lines
        for s in sparsities if experiment.layers else ():
            labels = [label for label in experiment.rows if (label, model, s) in points]
            listed, lines = of_seeds(lambda r: r["layers"], labels[0], model, s)[0], {}
            for label in labels:
                lines[label] = means(lambda r: [100 * u["kept"] / u["total"] for u in r["layers"]], label, model, s)
                if (label, model, s) in experiment.layers:
                    theirs = zip(experiment.layers[label, model, s], listed)
                    lines[f"{label}, authors"] = [100 * k / u["total"] for k, u in theirs]
            yield f"{model}, {percent(s)}: kept of each layer (%)", "layer", [u["name"] for u in listed], lines


def percent(s):
    return f"{100 * s:g}%"


def spread(values, digits):
    """Mean and, of several values, their standard deviation."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def markdown(head, rows):
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in [head, ["---"] * len(head), *rows])


COLOURS = dict(blue="#1f77b4", orange="#ff7f0e", green="#2ca02c", red="#d62728", purple="#9467bd", brown="#8c564b")


def chart(title, xs, lines):
    """Lines that GitHub draws by mermaid, which has no legend; of many points, about 50."""
    some = range(0, len(xs), math.ceil(len(xs) / 50))
    legend = ", ".join(f"{colour}: {label}" for colour, label in zip(COLOURS, lines))
    palette = f'{{"themeVariables": {{"xyChart": {{"plotColorPalette": "{", ".join(COLOURS.values())}"}}}}}}'
    axis = ", ".join(f'"{xs[i]}"' for i in some)
    text = f'{legend}\n\n```mermaid\n%%{{init: {palette}}}%%\nxychart-beta\n    title "{title}"\n    x-axis [{axis}]\n'
    for line in lines.values():  # a shorter one goes on as it ends
        text += f"    line [{', '.join(f'{line[min(i, len(line) - 1)]:.4g}' for i in some)}]\n"
    return text + "```\n"


# ------------------------------------------------------------------------------------------------------------
# Speed
# ------------------------------------------------------------------------------------------------------------

IMAGES = {  # side, classes, images to train on
    "cifar10": (32, 10, 50_000),
    "cifar100": (32, 100, 50_000),
    "tinyimagenet": (64, 200, 100_000),
    "caltech101": (224, 101, 5_205),
    "shapes": (32, 10, 4_500),
}


class Stopwatch:
    """What `batches` gives; each pass adds to `seconds` how long it took, with all that was done in between."""

    def __init__(self, batches, device):
        self.batches, self.wait, self.seconds = batches, getattr(torch, device.type).synchronize, []

    def __iter__(self):
        self.wait()
        start = time.perf_counter()
        yield from self.batches
        self.wait()
        self.seconds.append(time.perf_counter() - start)


def peak(work, device):
    """The most memory, in bytes, that tensors of work() hold at a time."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ["KINETO_LOG_LEVEL"] = "9"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof:
        work()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def bench(args):
    """Print what the networks cost."""
    import models

    gm.hardware(args)
    print(
        f"{args.device.type}, {'bfloat16' if args.bf16 else 'float32'}, {'compiled' if args.compile else 'eager'},"
        f" torch {torch.__version__}; {args.rounds} rounds; medians ± half the interquartile range. Seconds are noise"
        " on a shared machine, the ratios less so.\n"
    )
    names = list(models.MODELS) if args.all else [args.model]
    for name in names:
        cells = costs(name, args)
        if name == names[0]:
            print(markdown(cells, []), end="")
        print(f"| {' | '.join(cells.values())} |", flush=True)


def costs(name, args):
    """{column: what the network called `name` costs}."""
    import models

    paper = gm.paper_setting(name, args.dataset, 0.0144)
    side, classes, images = IMAGES[args.dataset or paper.dataset]
    size, k = args.batch_size or paper.batch_size, 4 if args.device.type == "cpu" else 20
    f = gm.Network(models.build(name, classes, image_size=side).to(args.device), args.bf16, args.compile)
    split = torch.randint(256, (k * size, side, side, 3), dtype=torch.uint8), torch.randint(classes, (k * size,))
    data = gm.Batches(gm.Split(*(t.to(args.device) for t in split)), ([127.5] * 3, [60.0] * 3), size, True, 4)
    gm.try_out(f, name, next(iter(data))[0][:2])
    w, state = draw(f, gm.signed_constant, 0), {}
    plain = copy.deepcopy(f.model).to(memory_format=torch.channels_last)
    call = torch.compile(plain, dynamic=False, mode="reduce-overhead") if args.compile else plain

    def dense(batches):
        """Training as anybody writes it."""
        opt = torch.optim.SGD(plain.train().parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        for x, y in batches:
            with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
                loss = F.cross_entropy(call(x), y)
            loss.backward()
            opt.step()
            opt.zero_grad()

    def mining(batches):
        gm.mine(f, batches, sparsity=0.0144, epochs=1, on_epoch=lambda row, v, found: state.update(found))

    def finetuning(batches):
        gm.finetune(f, w, torch.ones_like(w), batches, epochs=1)

    ready = list(data)
    work = {
        "dense": (dense, ready),
        "mining": (mining, ready),
        "finetuning": (finetuning, ready),
        "epoch": (mining, data),
    }
    # All in turn, and each time in another order: what else the machine does meets them alike.
    watches = {what: Stopwatch(batches, args.device) for what, (_, batches) in work.items()}
    for i in range(args.rounds + 1):
        for what in [*work][i % 4 :] + [*work][: i % 4]:
            work[what][0](watches[what])
    seconds = {what: [t / k for t in watch.seconds[1:]] for what, watch in watches.items()}  # the first: warming up
    state.clear()
    memory = [
        peak(functools.partial(work[what][0], ready[:2]), args.device) for what in ("dense", "mining", "finetuning")
    ]

    start = time.perf_counter()
    gm.freeze(state["p"], torch.ones_like(w), round(f.d / 2)).sum().item()
    freezing = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as out:
        start = time.perf_counter()
        gm.save(Path(out) / "checkpoint.pt", state)
        saving = time.perf_counter() - start

    def ratio(a, b):
        return quartiles([x / y for x, y in zip(seconds[a], seconds[b])])

    step = statistics.median(seconds["mining"])
    return {
        "network": name,
        "d": f"{f.d:,}",
        "batch": f"{size} of {side}x{side}",
        **{
            f"{what}, ms": quartiles([1000 * t for t in seconds[what]], 1) for what in ("dense", "mining", "finetuning")
        },
        "mining / dense": ratio("mining", "dense"),
        "finetuning / dense": ratio("finetuning", "dense"),
        "epoch / its steps": ratio("epoch", "mining"),
        "images/s, mining": f"{size / step:,.0f}",
        "peak MB: dense, mining, finetuning": ", ".join(f"{b / 1e6:,.0f}" for b in memory),
        "mining - dense, floats": f"{(memory[1] - memory[0]) / f.d / w.element_size():.1f} d",
        "freezing, checkpoint, ms": f"{1000 * freezing:.0f}, {1000 * saving:.0f}",
        "of an epoch": f"{100 * (freezing / paper.period + saving) / (math.ceil(images / size) * step):.2f}%",
    }


def quartiles(values, digits=3):
    """Median and, of several values, half the interquartile range."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.{digits}f} ± {(high - low) / 2:.{digits}f}"


def main(argv=None):
    """The command line; returns its exit code, as gem_miner.main."""

    def work():
        given = sys.argv[1:] if argv is None else argv
        args, more = parser().parse_known_args(given)
        if args.method == "paper":
            paper(args, more, shlex.join(["python", "baselines.py", *given]))
        elif args.method == "bench":
            bench(gm.read(parser(), given))
        else:
            gm.run_command(*prepared(given))

    return gm.guarded("baselines.py", work)


if __name__ == "__main__":
    sys.exit(main())
