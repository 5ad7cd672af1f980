# SPDX-License-Identifier: MIT
"""Every method that "Rare Gems" compares Gem-Miner with, on the same networks, data, training loop and output.

    python baselines.py imp --rewind 1000 --sparsity 0.0144      # METHOD, and the flags of gem_miner.py
    python baselines.py paper table1 --dataset digits --epochs 10  # the paper's Table 1 in half an hour, no download
    python baselines.py paper table3 --dry-run                   # a table or figure of the paper: its runs, their cost
    python baselines.py paper table3 --epochs 20 --seeds 3       # the same, run, each 150 epochs scaled down to 20
    python baselines.py bench                                    # what a step of training costs on this machine

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

As a library: find(model, train, sparsity=..., seed=0, ...) -> Gem(w, scores, m, m), where find is at_init(...,
score="snip"), smart_ratio_ticket, or, with epochs=..., imp or edge_popup; then gem_miner.finetune(model, gem.w, gem.m,
train, lr=0.1). model, train and batch_size are as for gem_miner.mine, and so is the criterion of imp and edge_popup
(scores need tensors and class indices). The model is left in eval mode, holding w * m. New weights are drawn, except
with init=gem_miner.given.

"Theirs:" is what the authors of a method do; we do the same, unless "here" follows. All are trained alike:
Kaiming-normal weights (ep: signed constants; Caltech-101: pretrained), SGD with momentum 0.9 and weight decay 1e-4,
the epochs, batches and milestones of Table 15, and a learning rate of 0.1 (ep: 0.1 and a cosine on ResNet-20, else
0.01; Caltech-101: Table 15's), as the authors of Rare Gems trained them on ResNet-20.
"""

import argparse
import collections
import contextlib
import copy
import itertools
import json
import math
import shlex
import statistics
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import gem_miner as gm

# --- Pruning by training: IMP and learning-rate rewinding ---------------------------------------------------


def floor(x):
    return int(x + 1e-6)  # int((1 - 0.9) * 10) is 0


def ceil(x):
    return math.ceil(x - 1e-6)


def call(name, method, *args, **kw):
    """A phase of a method that has several: just the call. The command line's, gm.Run.phase, saves and shows."""
    return method(*args, **kw)


def imp_rounds(s):
    """Rounds of 20% that come nearest to s, by ratio: 19 for 1.44%."""
    if not 0 < s <= 0.89:
        raise gm.InputError(f"each round removes 20% of the weights: take a sparsity from above 0 to 0.89, not {s:g}")
    return round(math.log(s) / math.log(0.8))


def imp(
    model, train, *, sparsity, epochs, rewind=0, lr=0.1, schedule=gm.multistep, init=gm.kaiming_normal,
    criterion=gm.cross_entropy, batch_size=128, seed=0, phase=call,
):  # fmt: skip
    """Iterative magnitude pruning (Frankle & Carbin, 2019; Frankle et al., 2020). Cost: `epochs`, over all rounds.

    A round trains the surviving weights, removes the 20% of them that are smallest in absolute value, over the whole
    network, and sets the others back to what they were after `rewind` steps of the first round: 0 is "cold",
    1000 "warm". None never sets them back: learning-rate rewinding (Renda et al., 2020), since every round's
    learning rate starts anew. (Theirs: BatchNorm and biases are rewound too; Rare Gems leaves them. In Frankle's
    warm rounds the learning rate goes on from that step; here, as in Rare Gems, it starts anew.)
    """
    f, rounds = gm.Network.of(model), imp_rounds(sparsity)
    E = int(epochs) // rounds
    if not E:
        raise gm.InputError(f"{rounds} rounds need {rounds} epochs or more, not {epochs}")
    steps = E * gm.count_batches(train, batch_size) if rewind else 0
    if rewind and rewind > steps:
        raise gm.InputError(f"there is no step {rewind} to rewind to: a round has {steps}")
    how = {"epochs": E, "lr": lr, "schedule": schedule, "criterion": criterion, "batch_size": batch_size}
    w = start = gm.draw(f, init, seed)
    m, rest = torch.ones_like(w), f.rest()
    if rewind:  # the first steps of the first round, which the first round then takes once more
        start = phase("rewind", gm.finetune, f, w, m, train, steps=rewind, seed=f"{seed}, round 0", **how)
        fresh, rest = rest, f.rest()
        f.restore(fresh)
    for i in range(rounds):
        w = phase(f"round {i}", gm.finetune, f, w, m, train, seed=f"{seed}, round {i}", **how)
        p, alive = w.abs(), int(m.sum())
        gm.reseed(seed, "prune", i)
        # One more than 20%: theirs (open_lth) keeps what is strictly above the threshold.
        m = gm.freeze(p, m, max(1, alive - math.ceil(alive / 5) - 1))
        if rewind is not None:
            w = start
            f.restore(rest)
    f.finish(w, m)
    return gm.Gem(w, p, m, m)


# --- Pruning at initialisation: a score for each weight -----------------------------------------------------


def snip(f, w, batches):
    """SNIP (Lee et al., 2019): |dL/dc| at c = 1 for weights c * w, which is |w * dL/dw|. Cost: one batch."""
    # Theirs: BatchNorm's initial statistics (0, 1), not the batch's. And they train a second draw of the weights; here
    # that is the check "weight reinitialisation".
    f.eval()
    x, y = next(batches())
    w = w.clone().requires_grad_()
    return (w * torch.autograd.grad(gm.cross_entropy(f(w, x), y), w)[0]).abs().detach()


def grasp(f, w, batches, per_class=10, T=200):
    """GraSP (Wang et al., 2020): w * (H g), g = dL/dw, H the Hessian. Cost: 10 images a class, twice.

    Their score is -w * (H g), and they remove the LARGEST: so what we keep is the largest w * (H g). The logits are
    divided by T before the softmax. g is summed over all batches; H is that of each batch, applied to that sum.
    Here a batch mixes all classes, and the weights are those that are trained; theirs are two, of classes 0-4 and 5-9
    (with BatchNorm, another mask), and their default draws the Linear layers anew to score.
    """
    f.train()  # Theirs: the .eval() is commented out.
    w = w.clone().requires_grad_()
    parts = balanced(f, w, batches(), per_class)

    def gradient(x, y):
        return torch.autograd.grad(gm.cross_entropy(f(w, x) / T, y, reduction="sum"), w, create_graph=True)[0]

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
    f.restore({n: t.abs() if t.is_floating_point() else t for n, t in f.rest().items()})
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
    x = x.to(w.dtype) if x.is_floating_point() else x
    c = torch.ones_like(w).requires_grad_()
    others = f.unpruned()
    theta = [c * w, *others.values()]

    def loss():
        return gm.cross_entropy(f.call(theta[0], x, dict(zip(others, theta[1:]))), y)

    for _ in range(K):
        slopes = torch.autograd.grad(loss(), theta, create_graph=True, materialize_grads=True)
        theta = [t - eta * g for t, g in zip(theta, slopes)]
    return torch.autograd.grad(loss(), c)[0].abs()


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
    # Theirs removes what is worse than the int(d * (1 - s))-th worst score, but not that one: one more is kept.
    "grasp": Score(grasp, lambda d, s: min(d, ceil(d * s) + 1)),
    "synflow": Score(synflow, lambda d, s: ceil(d * s), rounds=100, dtype=torch.float64),
    # In float32 on a CPU, a third of ProsPr's mask would be noise.
    "prospr": Score(prospr, lambda d, s: ceil(d * s), dtype=torch.float64),
    # With Kaiming's distribution, what remains is in the layers with few inputs.
    "magnitude": Score(lambda f, w, batches: w.abs()),
    "random": Score(random),
    "dense": Score(lambda f, w, batches: w.abs(), lambda d, s: d),
}


def at_init(model, train, *, score, sparsity, init=gm.kaiming_normal, invert=False, batch_size=128, seed=0):
    """Keep the weights with the largest scores (invert: the smallest); score is a key of SCORES. Ties fall at random.

    Scores are computed on a copy of the network, so that BatchNorm's statistics stay as they are.
    """
    if score not in SCORES:
        raise gm.InputError(f"the scores are {', '.join(SCORES)}, not {score!r}")
    network, how, s = gm.Network.of(model), SCORES[score], float(sparsity)
    gm.check_sparsity(s, network.d)
    w = gm.draw(network, init, seed)
    f = gm.Network(copy.deepcopy(network.model).to(how.dtype), prune=lambda name, _: name in network.names)
    batches = partial(gm.minibatches, f, train, batch_size)
    v, m = w.to(f.dtype), torch.ones(f.d, dtype=f.dtype, device=f.device)
    gm.reseed(seed, "score")
    for k in range(1, how.rounds + 1):
        p = how.score(f, v * m, batches)
        if not p.sum().isfinite():
            raise FloatingPointError(f"{score}'s scores are not finite on this network")
        m = gm.freeze(p, m, how.count(f.d, s ** (k / how.rounds)), invert)
    network.finish(w, m.to(w))
    return gm.Gem(w, p, m.to(w), m.to(w))


# --- Edge-popup, and the variants of Table 3 ----------------------------------------------------------------


def largest(p, sizes, counts, invert=False):
    """A mask (d,) in bool: of each part of p (d,), cut into `sizes`, the counts[l] largest (invert: the smallest)."""
    m = torch.zeros_like(p, dtype=torch.bool)
    for part, scores, n in zip(m.split(sizes), p.split(sizes), counts):
        part.index_fill_(0, scores.topk(n, largest=not invert, sorted=False).indices, True)  # waits for no GPU
    return m


def popup_count(d, s, j, E, T):
    """Gradual pruning: how many of d weights are in the mask in epoch j: d * s^(k/n); T: period.

    k grows from 1, and may not have reached n in the last epoch; the mask that is returned has d * s.
    """
    n = max(1, (E - 1) // T)
    updated = T * max(0, (j - 2) // T)  # Rare Gems' code updates at the end of epochs T, 2T, ..., counted from 0
    k = min(n, max(1, (updated + 1) // T))
    return max(1, floor(d * s ** (k / n)))


def edge_popup(
    model, train, *, sparsity, epochs, whole=False, period=None, regularize=False, lr=0.1, init=gm.signed_constant,
    invert=False, criterion=gm.cross_entropy, batch_size=128, seed=0, on_epoch=None, state=None,
):  # fmt: skip
    """Edge-popup (Ramanujan et al., 2020): learn scores p; the network is w * m, m the top s of |p| in every layer.

    Nothing is frozen, and the gradient reaches p as if m were |p|. Variants of Table 3, each on top of the one
    before: whole: the top s of the whole network; period: starting from more than s, and fewer from period to period
    (weights may return); regularize: with lambda * ||p||^2, lambda = 1e-4. Cost: `epochs`.
    """
    f = gm.Network.of(model)
    d, s, E, first = f.d, float(sparsity), int(epochs), 1
    gm.check_sparsity(s, d)
    w = gm.draw(f, init, seed)
    gm.reseed(seed, "scores")  # U(-1/sqrt(fan_in), 1/sqrt(fan_in)); he_std is sqrt(2/fan_in)
    p = ((2 * torch.rand(d, dtype=f.dtype) - 1) * f.he_std() / 2**0.5).to(w).requires_grad_()
    # Theirs: weight decay 5e-4 on the scores. lambda * ||p||^2 has the gradient of a weight decay of 2 * lambda.
    opt = gm.sgd([p], lr, weight_decay=7e-4 if regularize else 5e-4)
    sizes, counts = f.sizes, [ceil(n * s) for n in f.sizes]
    if whole or period:
        sizes, counts = [d], [max(1, floor(d * s))]
    if state:
        first = state["epoch"] + 1
        gm.resume(state, f, opt, p)
    for j in range(first, E + 1):
        stats = gm.begin_epoch(f, opt, gm.cosine(lr, j, E), seed, "edge-popup", j)
        now = [popup_count(d, s, j, E, period)] if period else counts
        for x, y in gm.minibatches(f, train, batch_size):
            m = largest(p.detach().abs(), sizes, now, invert)
            out = f(w * gm.straight_through(p.abs(), m), x)
            loss = criterion(out, y)
            opt.zero_grad()
            loss.backward(inputs=[p])
            opt.step()
            stats.add(loss, out, y)
        row = stats.row(p, q=sum(now), m=sum(now))
        if on_epoch:
            v = w * largest(p.detach().abs(), sizes, now, invert)
            on_epoch(row, v, gm.snapshot(f, opt, p, epoch=j))
    p = p.detach().abs()
    m = largest(p, sizes, counts, invert).to(w)
    f.finish(w, m)
    return gm.Gem(w, p, m, m)


# --- Smart ratio: only the densities of the layers matter ---------------------------------------------------


def smart_ratio(sizes, s, vgg=False, last=0.3):
    """The densities p_1, ..., p_L of Su et al. (2020), for layers of these sizes in forward order. No cost.

    p_l is in proportion to (L-l+1)^2 + (L-l+1), for VGG divided by l^2; p_L = 0.3. What would exceed 1 is carried
    over to the next layer.
    """
    L, total, fixed = len(sizes), sum(sizes), last * sizes[-1]
    least, most = fixed / total, 1 - (sizes[-1] - fixed) / total
    if L < 2 or not least < s <= most:
        between = f"above {least:.2g}, at most {math.floor(1e4 * most) / 1e4:g}"
        raise gm.InputError(f"smart ratio keeps 30% of the last of two or more layers: take s {between}, not {s:g}")
    raw = [((L - l + 1) ** 2 + (L - l + 1)) / (l**2 if vgg else 1) for l in range(1, L)]
    g = (s * total - fixed) / sum(n * r for n, r in zip(sizes, raw))
    p, carry = [g * r for r in raw], 0
    for l, n in enumerate(sizes[:-1]):
        if p[l] + carry / n <= 1:
            p[l] += carry / n
            break
        carry -= int((1 - p[l]) * n)
        p[l] = 1.0
    return [*p, last]


def ratio_grid(p):
    """SR-v4: up to 144 sets of densities around p (those of IMP), as in the authors' grid search on ResNet-20.

    Of the first and last layer, one gains and the other loses 10 points, or neither. Of the 7, 6 and 5 layers between
    them, up to half at the front gain, and as many at the back lose, 1, 0.5 and 0.1 points. (Other depths: in
    proportion; where layers are few, sets coincide.)
    """
    inner = len(p) - 2
    cuts = [0, round(7 * inner / 18), round(13 * inner / 18), inner]
    changes = [[(0.1,), (0.0,), (-0.1,)]]
    for a, b, step, of in zip(cuts, cuts[1:], (0.01, 0.005, 0.001), (7, 6, 5)):
        some = [(b - a) * k // of for k in range(of // 2, -1, -1)]
        changes.append([[step] * k + [0.0] * (b - a - 2 * k) + [-step] * k for k in some])
    grid = [[ends[0], *front, *middle, *back, -ends[0]] for ends, front, middle, back in itertools.product(*changes)]
    return list(dict.fromkeys(tuple(min(1.0, max(0.0, x + y)) for x, y in zip(p, change)) for change in grid))


def random_mask(f, p, seed):
    """int(p_l * n_l) weights, uniformly at random, of each layer."""
    m = torch.cat([torch.arange(n) < floor(x * n) for n, x in zip(f.sizes, p)])
    return gm.shuffle(f, m.to(f.device, f.dtype), f"{seed}, smart ratio")


def smart_ratio_ticket(model, train, *, sparsity=None, densities=None, init=gm.kaiming_normal, seed=0):
    """Random weights of every layer; densities: p_1, ..., p_L (default: those of smart_ratio(f.sizes, sparsity))."""
    f = gm.Network.of(model)
    m = random_mask(f, densities or smart_ratio(f.sizes, float(sparsity)), seed)
    w = gm.draw(f, init, seed)
    f.finish(w, m)
    return gm.Gem(w, m, m, m)


def per_weight(f, p):
    """The density (d,) of the layer that each weight belongs to."""
    return torch.cat([x.expand(n) for x, n in zip(p, f.sizes)])


def tune_densities(
    model, train, p, *, epochs, lr=1e-6, criterion=gm.cross_entropy, batch_size=128, seed=0, on_epoch=None, state=None
):
    """Minimise equation (1) of appendix B by SGD over the densities p (SR-v5, v6). Returns the new ones.

    The weights are signed constants, each kept with the probability of its layer, drawn anew in every step.
    """
    f, first = gm.Network.of(model), 1
    w, own, fresh = gm.draw(f, gm.signed_constant, seed), f.vector(), f.rest()
    p = torch.tensor(p, dtype=f.dtype, device=f.device, requires_grad=True)
    opt = gm.sgd([p], lr)
    if state:
        first = state["epoch"] + 1
        gm.resume(state, f, opt, p)
    for j in range(first, int(epochs) + 1):
        # Rare Gems' code: a cosine over 150 epochs, of which the paper has the tenth. Until there it hardly falls.
        stats = gm.begin_epoch(f, opt, lr, seed, "equation 1", j)
        for x, y in gm.minibatches(f, train, batch_size):
            out = f(w * gm.round_random(per_weight(f, p)), x)
            loss = criterion(out, y)
            opt.zero_grad()
            loss.backward(inputs=[p])
            opt.step()
            p.data.clamp_(0, 1)
            stats.add(loss, out, y)
        v = w * gm.round_random(per_weight(f, p.detach()))
        kept = int(v.count_nonzero())
        row = stats.row(p, q=kept, m=kept)
        if on_epoch:
            on_epoch(row, v, gm.snapshot(f, opt, p, epoch=j))
    f.load(own)
    f.restore(fresh)
    return p.tolist()


def smart_ratio_search(
    model, train, *, densities, trials, epochs, lr=0.1, schedule=gm.multistep, init=gm.kaiming_normal, batch_size=128,
    seed=0, phase=call,
):  # fmt: skip
    """SR-v4: of `trials` of the sets of densities around these, the one that trains best. train: a gm.Batches.

    Judged by a tenth of the training images, held out (the authors' code judges by the test set). Cost: `epochs`.
    """
    f, pad, (h, w), stats = gm.Network.of(model), train.pad, train.size, (train.mean, train.std)
    rest, held = gm.divide(gm.Split(train.x[:, pad : pad + h, pad : pad + w], train.y), 0.1)
    rest, held = gm.Batches(rest, stats, train.batch_size, True, pad), gm.Batches(held, stats)
    grid, fresh, w = ratio_grid(densities), f.rest(), gm.draw(f, init, seed)
    gm.reseed(seed, "trials")
    tried, accs = torch.randperm(len(grid))[:trials].tolist(), []
    for i, k in enumerate(tried):
        v = phase(
            f"trial {i}", gm.finetune, f, w, random_mask(f, grid[k], seed), rest, epochs=epochs // trials, lr=lr,
            schedule=schedule, batch_size=batch_size, seed=seed,
        )  # fmt: skip
        accs.append(gm.accuracy(f, held, v))
        f.restore(fresh)
    m = random_mask(f, grid[tried[accs.index(max(accs))]], seed)
    f.finish(w, m)
    return gm.Gem(w, m, m, m)


# --- The command line of a method ---------------------------------------------------------------------------

ALL, TWO = ("shuffle", "reinit", "invert"), ("shuffle", "reinit")
POSSIBLE = {  # the checks that make sense
    **dict.fromkeys(("snip", "grasp", "synflow", "prospr", "magnitude", "ep"), ALL),
    **dict.fromkeys(("imp", "sr", "random"), TWO), "lrr": (), "dense": (),
}  # fmt: skip
SOURCES = {2: "Gem-Miner", 4: "IMP", 5: "Gem-Miner", 6: "SR-v4"}  # of the densities of a version of smart ratio


def parser():
    import models

    raw, quiet = argparse.RawDescriptionHelpFormatter, {"usage": argparse.SUPPRESS, "allow_abbrev": False}
    cli = argparse.ArgumentParser("baselines.py", description=__doc__, formatter_class=raw, **quiet)
    methods = cli.add_subparsers(dest="method", metavar="METHOD", required=True, prog="baselines.py")
    subs, rate = {}, "0.1; ep, except on ResNet-20: 0.01; Caltech-101: Table 15's"
    for name in POSSIBLE:
        subs[name] = methods.add_parser(name, **quiet)
        gm.flags_of_all_methods(subs[name], rate, "multistep; ep on ResNet-20: cosine")
        subs[name].set_defaults(finetune_mask="q")
    for name in ("imp", "lrr", "sr"):
        about = "of a round or trial (default: --finetune-epochs)"
        subs[name].add_argument("--round-epochs", type=gm.number(int, 1), help=about)
    about = "to this step; 0, cold, is the default"
    subs["imp"].add_argument("--rewind", type=gm.number(int, 0), default=0, help=about)
    add = subs["ep"].add_argument_group("variants of Table 3").add_argument
    add("--global", action="store_true", help="the top scores of the whole network, not of each layer")
    add("--gradual", action="store_true", help="--global, with fewer from period to period")
    add("--regularize", action="store_true", help="--gradual, with an L2 penalty on the scores")
    add("--period", type=gm.number(int, 1), help="T of --gradual (default: Gem-Miner's)")
    add("--lr", type=gm.number(float, 1e-12), help="learning rate of the scores (default: 0.1; more, in fewer epochs)")
    add = subs["sr"].add_argument_group("variants of Table 16").add_argument
    about = "SR-v1 to SR-v6 (default: 1; for 5 and 6, the paper's --epochs are 10)"
    add("--version", type=int, choices=range(1, 7), default=1, help=about)
    add("--from", metavar="RUN", help="the folder of a gem's run for 2 and 5, IMP's for 4, SR-v4's for 6")
    add("--trials", type=gm.number(int, 1), default=144, help="how many of SR-v4's 144 densities (default: all)")
    add("--lr", type=gm.number(float, 1e-12), default=1e-6, help="of the densities, 5 and 6 (default: 1e-6)")

    names = "\n".join(f"  {name:<8} {experiment.about}" for name, experiment in EXPERIMENTS.items())
    about = {"description": paper.__doc__, "epilog": f"NAME:\n{names}", "formatter_class": raw}
    add = methods.add_parser("paper", **about, **quiet).add_argument
    add("experiment", metavar="NAME", choices=EXPERIMENTS, help="see below")
    add("--epochs", type=gm.number(int, 1), help="instead of the paper's; all else scales with it")
    add("--model", action="append", choices=models.MODELS, help="likewise; may be repeated, as --sparsity")
    add("--dataset", help="likewise")
    add("--sparsity", action="append", type=gm.fraction, help="likewise: fraction of weights KEPT")
    add("--seeds", type=gm.number(int, 1), default=1, help="how many, from 0 on (default: 1)")
    add("--dry-run", action="store_true", help="only print the runs, a command a line, and their cost")
    add("--so-far", action="store_true", help="run nothing: print the runs that are complete in --out")
    add("--out", type=Path, default=Path("runs/paper"), help="of all runs (default: runs/paper)")
    methods.add_parser("bench", description=bench.__doc__)
    return cli


def complete(argv):
    """The arguments of the run `METHOD ...`, or `gem-miner ...`, with all that was not given."""
    if argv[:1] == ["gem-miner"]:
        return gm.complete(gm.arguments(gm.parser(), argv[1:]))
    args = gm.arguments(parser(), argv)
    name, named, possible = args.method, args.checks, POSSIBLE[args.method]
    if name == "dense":
        args.sparsity = 1.0
    resnet20_ep = name == "ep" and args.model == "resnet20"
    if args.dataset != "caltech101":  # there the weights are pretrained: Table 15
        gm.fill(args, finetune_lr=0.01 if name == "ep" and not resnet20_ep else 0.1)
    gm.fill(args, finetune_schedule="cosine" if resnet20_ep else "multistep")
    if name == "ep":
        paper = gm.paper_setting(args.model, args.dataset, args.sparsity)
        gm.fill(args, lr=max(0.1, paper.lr) * gm.rate_factor(args, paper))
    gm.complete(args)
    if "round_epochs" in args:
        gm.fill(args, round_epochs=args.finetune_epochs or args.epochs)
    if name == "sr":
        args.trials = min(args.trials, 144)
        if args.version in SOURCES and vars(args)["from"] is None:
            needs = f"needs the densities of {SOURCES[args.version]}"
            raise gm.InputError(f"sr --version {args.version} {needs}: give the folder of such a run as --from")
    if args.checks and not set(named or possible) <= set(possible) or named is not None and not possible:
        raise gm.InputError(f"--checks: {name} can be checked by {' and '.join(possible) or 'none of them'}")
    args.checks = [check for check in possible if check in args.checks]
    args.search_epochs, args.search = search_cost(args)
    return args


def search_cost(args):
    """The epochs of a method's search, 1 for a batch as in Table 1; and what it does, in words."""
    name, s = args.method, args.sparsity
    if name in SCORES:
        return int(name in ("snip", "grasp", "synflow", "prospr")), "scores at initialisation"
    if name in ("imp", "lrr"):
        rounds = imp_rounds(s)
        return rounds * args.round_epochs, f"{rounds} rounds of {args.round_epochs}, down to {100 * 0.8**rounds:.3g}%"
    if name == "sr":
        epochs = {4: args.trials * args.round_epochs, 5: args.epochs, 6: args.epochs}
        return epochs.get(args.version, 0), f"smart ratio, version {args.version}"
    args.gradual = args.gradual or args.regularize
    whole = "the network" if args.gradual or vars(args)["global"] else "each layer"
    text = f", fewer every {args.period} epochs" * args.gradual + ", penalised" * args.regularize
    return args.epochs, f"{args.epochs} epochs, lr {args.lr:g}; the top of {whole}{text}"


def search(args, run, phase, f, train, **kw):
    """What a method finds, as gem_miner.run_command wants it. kw: init, seed, perhaps invert=True."""
    s, epochs = args.sparsity, args.search_epochs
    training = {"lr": args.finetune_lr, "schedule": gm.finetune_schedule(args)}
    if args.method in SCORES:
        return run.once(phase, at_init, f, train, score=args.method, sparsity=s, **kw)
    if args.method in ("imp", "lrr"):
        rewind = args.rewind if args.method == "imp" else None
        return imp(f, train, sparsity=s, epochs=epochs, rewind=rewind, phase=run.phase, **training, **kw)
    if args.method == "ep":
        kw |= {"whole": vars(args)["global"], "period": args.period if args.gradual else None}
        kw |= {"regularize": args.regularize, "lr": args.lr}
        return run.phase(phase, edge_popup, f, train, epochs=epochs, sparsity=s, **kw)
    p = densities(args, f)
    if args.version == 4:
        kw |= {"trials": args.trials, "epochs": epochs, "phase": run.phase, **training}
        return smart_ratio_search(f, train, densities=p, **kw)
    if args.version > 4:
        p = run.phase("densities", tune_densities, f, train, p, epochs=epochs, lr=args.lr, seed=args.seed)
    return smart_ratio_ticket(f, train, densities=p, **kw)


def densities(args, f):
    """The p_1, ..., p_L that version args.version of the smart ratio starts from (appendix B).

    1: smart_ratio. 2: the same, but first and last layer as in a gem. 3: but first and last layer dense.
    4: those of IMP, then smart_ratio_search. 5 and 6: those of 2 and 4, then tuned by equation (1).
    """
    first, last = 1.0, 1.0
    if args.version in SOURCES:
        path = Path(vars(args)["from"]) / "gem.pt"
        if not path.is_file():
            raise gm.InputError(f"there is no {path}, which a finished search leaves: choose another --from")
        gem = gm.read(path)
        shapes = {name: tuple(m.shape) for name, m in gem["mask"].items()}
        if shapes != dict(zip(f.names, f.shapes)) or gem["settings"]["sparsity"] != args.sparsity:
            raise gm.InputError(f"{path} is of another network or --sparsity: choose another --from")
        theirs = [m.count_nonzero().item() / m.numel() for m in gem["mask"].values()]
        if args.version in (4, 6):
            return theirs
        first, last = theirs[0], theirs[-1]
    p = smart_ratio(f.sizes, args.sparsity, args.model.startswith("vgg"))
    return p if args.version == 1 else [first, *p[1:-1], last]


def run_command(args):
    """A method's run, or Gem-Miner's."""
    if args.method == "gem-miner":
        gm.run_command(args, gm.mine_command, gm.signed_constant)
    else:
        gm.run_command(args, search, gm.signed_constant if args.method == "ep" else gm.kaiming_normal)


# --- The paper's tables and figures -------------------------------------------------------------------------


def commands(model, E, scale, batch, folder):
    """{label: its command} of all runs. E: epochs; scale: E by the paper's; folder: label -> folder of that run."""

    def n(number):
        return max(1, round(number * scale))

    warm = n(2000 if model in ("vgg16", "wrn28_2") else 1000)
    return {
        **{label: label.lower() for label in ("Dense", "Random", "SNIP", "GraSP", "SynFlow", "EP", "SR")},
        "Gem-Miner": "gem-miner",
        "Long Gem-Miner": f"gem-miner --epochs {20 * E} --period {E} --finetune-epochs {E}",
        "IMP (warm)": f"imp --rewind {warm}",
        "IMP (cold)": "imp",
        "Short IMP (warm)": f"imp --round-epochs {n(8)} --rewind {warm}",
        "Short IMP (cold)": f"imp --round-epochs {n(8)}",
        "Renda et al.": "lrr",
        "ProsPr": f"prospr --finetune-epochs {n(200)}",
        "EP (Table 3)": f"ep --batch-size {2 * batch}",  # as in the authors' files
        "Global EP": f"ep --global --batch-size {2 * batch}",
        "+ Gradual Pruning": f"ep --gradual --batch-size {2 * batch}",
        "+ Regularization": f"ep --regularize --batch-size {2 * batch}",
        "SR-v2": f"sr --version 2 --from {folder('Gem-Miner')}",
        "SR-v3": "sr --version 3",
        "SR-v4": f"sr --version 4 --from {folder('IMP (warm)')} --trials {min(144, n(144))}",
        # 1.53 and 1.47% in Table 16 are the densities of the authors' tuning after 10 epochs.
        "SR-v5": f"sr --version 5 --from {folder('Gem-Miner')} --epochs {n(10)} --finetune-epochs {E}",
        "SR-v6": f"sr --version 6 --from {folder('SR-v4')} --epochs {n(10)} --finetune-epochs {E}",
        # In fewer steps the penalty must be larger to move a score as far.
        **{f"GM lambda {lam}": f"gem-miner --lam {float(lam) / scale:.3g}" for lam in ("0", "3e-6", "7e-6", "1.5e-5")},
        **{f"GM lr {lr}": f"gem-miner --lr {lr}" for lr in ("0.01", "0.001", "0.0001", "0.00001")},
    }


class Experiment(NamedTuple):
    """A table or figure. A label with a * takes the sanity checks."""

    about: str
    networks: str  # MODEL DATASET, ...
    sparsities: tuple  # (): those of Tables 8 to 14
    columns: str  # what to print, keys of figures_of; the first of them are those of `rows`
    rows: dict  # label (a key of commands): the paper's figures
    at: str = ""  # MODEL SPARSITY that the paper's figures are for, if not all
    own: dict = {}  # label: its own sparsity
    curves: tuple = ()  # what to draw


RESNET20, MOBILENET, VGG = "resnet20 cifar10", "mobilenetv2 cifar10", "vgg16 cifar10"
CIFAR = f"{RESNET20}, {MOBILENET}, {VGG}, wrn28_2 cifar10"
OTHERS = "resnet32x2 cifar100, resnet18 tinyimagenet, resnet50 tinyimagenet, resnet50 caltech101"
CHECKED = "shuffled, drawn anew, inverted"
COMPARED = {
    "Gem-Miner*": (77.89,), "IMP (warm)": (74.52,), "Renda et al.": (80.21,), "EP": (), "SR": (65.61,), "Dense": (),
}  # fmt: skip
EXPERIMENTS = {
    "table1": Experiment(
        "Table 1: what each method takes to find a ticket", RESNET20, (0.0144,),
        f"at initialisation, finetunable, passes the checks, search epochs, BN re-estimated, after, {CHECKED}", {
            # The marks as the paper's sentences have them; of edge-popup's checks they say nothing.
            "IMP (warm)*": ("no", "yes", "yes", 2850),
            "SNIP*": ("yes", "yes", "no", 1),
            "GraSP*": ("yes", "yes", "no", 1),
            "SynFlow*": ("yes", "yes", "no", 1),
            "EP*": ("yes", "no", None, 150),
            "SR*": ("yes", "yes", "no", "O(1)"),
            "Renda et al.": ("no", "yes", None, 3000),  # with the last training
            "Gem-Miner*": ("yes", "yes", "yes", 150),
            "Random": (),
        }),
    "table2": Experiment(
        # ProsPr's 82.67% is with its authors' recipe: weight decay 5e-4, batch 256, drops after epochs 100 and 150.
        "Table 2: ProsPr and Gem-Miner", RESNET20, (0.0372,),
        "kept %, after, shuffled, drawn anew, passes the checks", {
            "ProsPr*": (5, 82.67, 82.15, 81.64),
            "Gem-Miner*": (3.72, 83.4, 78.73, 78.6),
        }, own={"ProsPr": 0.05}),
    "table3": Experiment(
        "Table 3: from edge-popup to Gem-Miner", RESNET20, (0.0059,), "before, after, kept %, BN re-estimated", {
            "EP (Table 3)": (19.57, 24.47),
            "Global EP": (22.22, 34.42),
            "+ Gradual Pruning": (31.56, 63.54),
            "+ Regularization": (19.67, 63.72),
            "Gem-Miner": (45.30, 66.15),
        }),
    "table4": Experiment(
        # The paper's 3000 are 19 rounds and a last training of 150 epochs. Long Gem-Miner: 3000 to mine, 150 to train.
        "Table 4: Long Gem-Miner", RESNET20, (0.0144,), "all epochs, after, kept %", {
            "Gem-Miner": (300, 77.89),
            "Long Gem-Miner": (3000, 79.50),
            "IMP (warm)": (3000, 74.52),
            "Renda et al.": (3000, 80.21),
        }),
    "table16": Experiment(
        "Table 16: how far random pruning goes (IMP, not in the table, is where SR-v4 starts)",
        RESNET20, (0.0144,), "kept %, after", {
            "Gem-Miner": (1.44, 77.89),
            "IMP (warm)": (),
            "SR": (1.44, 65.61),
            "SR-v2": (1.47, 68.59),
            "SR-v3": (1.75, 69.78),
            "SR-v4": (1.44, 69.92),
            "SR-v5": (1.53, 69.01),
            "SR-v6": (1.47, 69.08),
        }),
    "fig2": Experiment(
        "Fig. 2: density while mining (q is the upper bound)", MOBILENET, (0.0144,), "r(p)q %, before, after", {
            "GM lambda 0": ("around 50",),
            "GM lambda 3e-6": (),
            "GM lambda 7e-6": (2.5,),
            "GM lambda 1.5e-5": (1.4, 84.62, 87.37),
            "EP": (),
        }, own={"GM lambda 0": 0.5, "GM lambda 3e-6": 0.2, "GM lambda 7e-6": 0.05}, curves=("r(p)q %", "q %")),
    "fig3": Experiment(
        "Fig. 3 (and Fig. 1, a point of it): accuracy after finetuning, and Gem-Miner's sanity checks", CIFAR, (),
        f"after, kept %, {CHECKED}", COMPARED, at="resnet20 1.44%"),
    "fig4": Experiment(
        "Fig. 4: other data sets: accuracy before and after finetuning, and Gem-Miner's sanity checks", OTHERS, (),
        f"after, kept %, before, {CHECKED}", dict.fromkeys(COMPARED, ())),
    "fig5": Experiment(
        "Fig. 5: accuracy by epoch: mining, then finetuning", MOBILENET, (0.0144,), "kept %, before, after",
        {"Gem-Miner": (1.16,), "Dense": (), "IMP (warm)": ()}, curves=("test accuracy %",)),
    "fig6": Experiment(
        "Fig. 6: accuracy before finetuning", CIFAR, (), "before, kept %, BN re-estimated",
        {"Gem-Miner": (84.62,), "IMP (warm)": (), "EP": (), "SR": ()}, at="mobilenetv2 1.44%"),
    "fig7": Experiment(
        "Fig. 7: what is kept of each layer", RESNET20, (0.5, 0.0373, 0.0144, 0.0059), "kept %",
        {"Gem-Miner": (), "IMP (warm)": (), "SR": (), "EP": ()}, curves=("kept of each layer %",)),
    "fig8": Experiment(
        "Fig. 8: further networks: accuracy before and after finetuning, and Gem-Miner's sanity checks",
        "mobilenetv2 tinyimagenet, resnet18 cifar10", (), f"after, kept %, before, {CHECKED}",
        dict.fromkeys(COMPARED, ())),
    "fig9": Experiment(
        "Fig. 9: accuracy before and after finetuning", VGG, (0.014, 0.005), "kept %, before, after",
        dict.fromkeys(("GM lr 0.01", "GM lr 0.001", "GM lr 0.0001", "GM lr 0.00001", "EP", "SR"), ())),
    "fig10": Experiment(
        "Fig. 10: four kinds of IMP", RESNET20, (), "after, kept %, before", {
            "Gem-Miner": (77.89,),
            "Short IMP (cold)": (),
            "Short IMP (warm)": (),
            "IMP (cold)": (),
            "IMP (warm)": (74.52,),
        }, at="resnet20 1.44%"),
}  # fmt: skip
EXPERIMENTS["fig1"] = EXPERIMENTS["fig3"]


def runs_of(experiment, args, more):
    """{(label, network, fraction kept): [the run of each seed]} of an Experiment, in order."""
    runs, networks = {}, [network.split() for network in experiment.networks.split(", ")]
    for model, dataset in networks if not args.model else [(model, networks[0][1]) for model in args.model]:
        rows = gm.paper_rows(model, dataset)
        dataset = args.dataset or dataset
        own = gm.paper_setting(model, dataset, 1)
        E = args.epochs or own.epochs
        listed = args.sparsity or experiment.sparsities or dict.fromkeys(row.sparsity for row in rows)
        for s, seed, label in itertools.product(listed, range(args.seeds), experiment.rows):
            checks, label = ["--checks"] * label.endswith("*"), label.rstrip("*")
            kept = 1.0 if label == "Dense" else s if args.sparsity else experiment.own.get(label, s)
            place = f"{model}-{dataset}-{kept:g}-seed{seed}"

            def folder(label, place=place):
                words = "".join(c if c.isalnum() or c in "-." else " " for c in f"{label}-{place}").split()
                return shlex.quote(str(args.out / "-".join(words)))

            argv = shlex.split(commands(model, E, E / rows[0].epochs, own.batch_size, folder)[label])
            argv += [] if "--epochs" in argv else ["--epochs", str(E)]
            argv += ["--model", model, "--dataset", dataset, "--sparsity", str(kept), "--seed", str(seed)]
            run = complete([*argv, *checks, *more, "--out", *shlex.split(folder(label))])
            runs.setdefault((label, f"{model} {dataset}", kept), []).append(run)
    return runs


def result_of(run):
    """The result of a complete run, or None."""
    result = gm.read_json(run.out / "result.json")
    if not result or not set(run.checks) <= set(result.get("checks", ())):
        return None
    gm.same_settings(gm.settings(run), result, run.out, free=["eval_every"])
    rows = (run.out / "log.jsonl").read_text().splitlines()
    return result | {"rows": [json.loads(row) for row in rows]}


def paper(args, more):
    """Run what a table or figure of the paper needs, and print it in Markdown, the paper's own figures in brackets.

    Complete runs in --out are taken as they are, others resumed. Other flags, such as --bf16, go to every run. With
    --dataset digits --epochs 10 every table and figure of ResNet-20 has its miniature: table1 takes half an hour.
    """
    experiment, costs, failed = EXPERIMENTS[args.experiment], [], []  # costs: of what is not complete
    if any(flag.split("=")[0] == "--seed" for flag in more):
        raise gm.InputError(f"not for paper: {shlex.join(more)} (for seeds, --seeds HOW_MANY)")
    points = runs_of(experiment, args, more)
    for run in {run.command: run for runs in points.values() for run in runs}.values():
        run.resume, done = (run.out / "settings.json").exists(), result_of(run)
        if args.dry_run:
            print(f"{'# complete: ' * bool(done)}{run.command}{' --resume' * run.resume}  # {gm.cost(run):,} epochs")
            costs += [] if done else [gm.cost(run)]
        elif not done and not args.so_far:
            try:
                with contextlib.redirect_stdout(sys.stderr):  # so that the table can go to a file
                    run_command(run)
            except (gm.InputError, FloatingPointError) as e:  # the others may go well
                failed.append(f"{run.command}: {e}")
                warnings.warn(f"left out: {failed[-1]}", stacklevel=2)
    if args.dry_run:
        print(f"# to do: {len(costs)} runs, {sum(costs):,} epochs")
    else:
        show(experiment, args, {point: [r for r in map(result_of, runs) if r] for point, runs in points.items()})
    if failed:
        raise gm.InputError(f"{len(failed)} runs could not be made; the first is {failed[0]}")


def show(experiment, args, results):
    """Print a table and charts. results: {(label, network, fraction kept): [the result of each seed]}."""
    complete = [r for found in results.values() for r in found]
    if not complete:
        raise gm.InputError(f"no run of this experiment with these flags is complete in {args.out}")
    if len({(r["dataset"], str(r["images"])) for r in complete}) > len({r["dataset"] for r in complete}):
        raise gm.InputError(f"the runs in {args.out} are not all on the same images: choose another --out")
    networks, kept = (list(dict.fromkeys(point[i] for point in results if point[0] != "Dense")) for i in (1, 2))
    where = f" {networks[0]}" * (len(networks) == 1) + f" at {100 * kept[0]:g}%" * (len(kept) == 1)
    print(
        f"## {experiment.about}\n\nOurs:{where}; seeds: {args.seeds} (mean ± standard deviation); accuracies in %"
        f" of {'validation' if complete[0]['val'] else 'test'} images.\n(The paper, {experiment.networks})\n"
    )
    columns = experiment.columns.split(", ")
    theirs = {label.rstrip("*"): dict(zip(columns, values)) for label, values in experiment.rows.items()}
    several = ["network"] * (len(networks) > 1) + ["sparsity"] * (len(kept) > 1)
    for row in [["method", *several, *columns], ["---"] * (1 + len(several) + len(columns))]:
        print(f"| {' | '.join(row)} |")
    for (label, network, s), found in results.items():
        chance = {r["seed"]: r for r in results.get(("Random", network, s), ())}
        figures = [figures_of(r, chance.get(r["seed"])) for r in found]
        named = {"network": network, "sparsity": f"{100 * s:g}%"}
        row = [label, *(named[c] for c in several)]
        papers = theirs[label] if experiment.at in ("", f"{network.split()[0]} {100 * s:g}%") else {}
        for c in columns:
            row.append(cell([f[c] for f in figures if f.get(c) is not None], papers.get(c)))
        print(f"| {' | '.join(row)} |")
    for title, network, s in itertools.product(experiment.curves, networks, kept):
        runs = {label: found for (label, *point), found in results.items() if found and point == [network, s]}
        chart(f"{network} at {100 * s:g}%: {title}", {label: curve(title, found) for label, found in runs.items()})


def figures_of(r, chance):
    """{column: its figure} from a result.json; chance: that of as many random weights, or None."""
    checks, after = r.get("checks", {}), r["post_finetune_acc"]
    figures = {
        "at initialisation": "no" if r["method"] in ("lrr", "dense") or r.get("rewind") else "yes",
        "search epochs": r["search_epochs"],
        "all epochs": r["search_epochs"] + r["finetune_epochs"],
        "kept %": 100 * r["kept"] / r["total"],
        "r(p)q %": 100 * r["kept_m"] / r["total"],
        "before": r["pre_finetune_acc"],
        "BN re-estimated": r["reestimated_acc"],
        "after": after,
    }
    for name, column in zip(ALL, CHECKED.split(", ")):
        figures[column] = checks[name]["post_finetune_acc"] if name in checks else None
    if checks:
        figures["passes the checks"] = "yes" if all(check["passed"] for check in checks.values()) else "no"
    if chance and after is not None:  # clearly better than before training, and than random weights after theirs
        others = r["pre_finetune_acc"], chance["post_finetune_acc"]
        better = all(other is not None and gm.clearly_above(after, other, r["images"][1]) for other in others)
        figures["finetunable"] = "yes" if better else "no"
    return figures


def cell(ours, paper):
    """Mean and deviation over the seeds, or words and how often; and the paper's in brackets."""
    words = collections.Counter(map(str, ours))
    text = ", ".join(words if len(words) < 2 else (f"{word}: {n}" for word, n in words.items())) or "-"
    if ours and isinstance(ours[0], float):
        text = f"{statistics.mean(ours):.2f}" + (f" ± {statistics.stdev(ours):.2f}" if len(ours) > 1 else "")
    return text if paper is None else f"{text} ({paper})"


def curve(title, found):
    """Values of a chart: the mean over the seeds."""
    lines = []
    for r in found:
        mining = [row for row in r["rows"] if row["phase"] == "mine"]
        lines.append({
            "q %": [100 * row["q"] / r["total"] for row in mining],
            "r(p)q %": [100 * row["m"] / r["total"] for row in mining],
            "test accuracy %": [row["test_acc"] for row in r["rows"] if row["phase"] in ("mine", "finetune")],
            "kept of each layer %": [100 * layer["kept"] / layer["total"] for layer in r["layers"]],
        }[title])  # fmt: skip
    return [statistics.mean(values) for values in zip(*lines) if None not in values]


def chart(title, lines):
    """Lines that GitHub draws by mermaid, which has no legend; of many points, about 50."""
    colours = {"blue": "#1f77b4", "orange": "#ff7f0e", "green": "#2ca02c", "red": "#d62728", "purple": "#9467bd"}
    lines = {label: line for label, line in lines.items() if line}
    longest = max(map(len, lines.values()), default=0)
    some = range(0, longest, math.ceil(longest / 50) or 1)
    if longest:
        palette = f'"xyChart": {{"plotColorPalette": "{", ".join(colours.values())}"}}'
        print(f"\n{', '.join(f'{colour}: {label}' for colour, label in zip(colours, lines))}\n\n```mermaid")
        print(f'%%{{init: {{"themeVariables": {{{palette}}}}}}}%%\nxychart-beta\n    title "{title}"')
        print(f"    x-axis [{', '.join(str(i + 1) for i in some)}]")
        for line in lines.values():  # a shorter one goes on as it ends
            print(f"    line [{', '.join(f'{line[min(i, len(line) - 1)]:.4g}' for i in some)}]")
        print("```")


# --- Speed --------------------------------------------------------------------------------------------------


def bench(args):
    """What a step costs here: of training as anybody writes it, of mining, and of finetuning, in turn."""
    f, train, *_ = gm.prepare(args)
    device, w = args.device.type, gm.draw(f, gm.signed_constant, 0)
    batches = list(itertools.islice(train, 4 if device == "cpu" else 20))
    plain = copy.deepcopy(f.model).to(memory_format=torch.channels_last)
    forward = torch.compile(plain, dynamic=False, mode="reduce-overhead") if args.compile else plain
    opt = torch.optim.SGD(plain.train().parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    ms = {"dense": [], "mining": [], "finetuning": []}

    def timed(name):
        """The batches; notes the time of a step, without what comes before and after them all."""
        start = time.perf_counter()
        yield from batches
        getattr(torch, device).synchronize()
        ms[name].append(1000 * (time.perf_counter() - start) / len(batches))

    for _ in range(12):  # the first: warming up
        for x, y in timed("dense"):
            with torch.autocast(device, torch.bfloat16, enabled=args.bf16):
                loss = F.cross_entropy(forward(x), y)
            opt.zero_grad()
            loss.backward()
            opt.step()
        gm.mine(f, timed("mining"), sparsity=0.0144, epochs=1, lam=1e-4)
        gm.finetune(f, w, torch.ones_like(w), timed("finetuning"), epochs=1)
    for name, times in ms.items():
        low, middle, high = statistics.quantiles([a / b for a, b in zip(times[1:], ms["dense"][1:])], n=4)
        step = statistics.median(times[1:])
        print(f"{name:<10} {step:8.1f} ms a step, {middle:.2f} ± {(high - low) / 2:.2f} of dense")


def main(argv):
    """The command line; returns its exit code, as gem_miner.main."""
    gm.warn_plainly()
    try:
        if argv[:1] == ["paper"]:
            paper(*parser().parse_known_args(argv))
        elif argv[:1] == ["bench"]:  # with the flags of dense
            bench(complete(["dense", "--dataset", "digits", "--batch-size", "128", *argv[1:]]))
        else:
            run_command(complete(argv))
        return 0
    except (Exception, KeyboardInterrupt, SystemExit) as e:
        return gm.exit_code("baselines.py", e)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
