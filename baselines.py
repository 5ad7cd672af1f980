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
import inspect
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

# --- What all methods share ---------------------------------------------------------------------------------


def floor(x):
    return int(x + 1e-6)  # int((1 - 0.9) * 10) is 0


def largest(p, sizes, counts, invert=False):
    """A mask (d,) in bool: of each part of p (d,), cut into `sizes`, the counts[l] largest (invert: the smallest)."""
    m = torch.zeros_like(p, dtype=torch.bool)
    for part, scores, n in zip(m.split(sizes), p.split(sizes), counts):
        part.index_fill_(0, scores.topk(n, largest=not invert, sorted=False).indices, True)  # waits for no GPU
    return m


def at_once(name, method, *args, **kw):
    """A phase of a method that has several: just the call. The command line's, gm.Run.phase, saves and shows."""
    return method(*args, **kw)


# --- Pruning by training: IMP and learning-rate rewinding ---------------------------------------------------


def imp_rounds(s):
    """Rounds of 20% that come nearest to s, by ratio: 19 for 1.44%."""
    if not 0 < s <= 0.89:
        raise gm.InputError(f"each round removes 20% of the weights: take a sparsity from above 0 to 0.89, not {s:g}")
    return round(math.log(s) / math.log(0.8))


def imp(
    model, train, *, sparsity, epochs, rewind=0, lr=0.1, schedule=gm.multistep, init=gm.kaiming_normal,
    criterion=F.cross_entropy, batch_size=128, seed=0, phase=at_once,
):  # fmt: skip
    """Iterative magnitude pruning (Frankle & Carbin, 2019; Frankle et al., 2020). Cost: `epochs`, over all rounds.

    A round trains the surviving weights, removes the 20% of them that are smallest in absolute value, over the whole
    network, and sets the others back to what they were after `rewind` steps of the first round: 0 is "cold",
    1000 "warm". None never sets them back: learning-rate rewinding (Renda et al., 2020), since every round's
    learning rate starts anew. (Theirs: BatchNorm and biases are rewound too; Rare Gems leaves them. In Frankle's
    warm rounds the learning rate goes on from that step; here, as in Rare Gems, it starts anew.)
    """
    f, rounds = gm.Network.of(model), imp_rounds(sparsity)
    E = epochs // rounds
    if not E:
        raise gm.InputError(f"{rounds} rounds need {rounds} epochs or more, not {epochs}")
    steps = E * gm.count_batches(train, batch_size)
    if rewind and 0 < steps < rewind:
        raise gm.InputError(f"there is no step {rewind} to rewind to: a round has {steps}")

    def trained(name, i, w, m, **kw):
        return phase(
            name, gm.finetune, f, w, m, train, epochs=E, lr=lr, schedule=schedule, criterion=criterion,
            batch_size=batch_size, seed=f"{seed}, round {i}", **kw,
        )  # fmt: skip

    w = start = gm.draw(f, init, seed)
    m, rest = torch.ones_like(w), f.rest()
    if rewind:  # the first steps of the first round, which the first round then takes once more
        start = trained("rewind", 0, w, m, steps=rewind)
        fresh, rest = rest, f.rest()
        f.restore(fresh)
    for i in range(rounds):
        w = trained(f"round {i}", i, w, m)
        p, alive = w.abs(), int(m.count_nonzero())
        gm.reseed(seed, "prune", i)
        # One more than 20%: theirs (open_lth) keeps what is strictly above the threshold.
        m = gm.freeze(p, m, max(1, alive - math.ceil(alive / 5) - 1))
        if rewind is not None:
            w = start
            f.restore(rest)
    return f.settle(w, p, m, m)


# --- Pruning at initialisation: a score for each weight -----------------------------------------------------


def snip(f, w, batches):
    """SNIP (Lee et al., 2019): |dL/dc| at c = 1 for weights c * w, which is |w * dL/dw|. Cost: one batch."""
    # Theirs: BatchNorm's initial statistics (0, 1), not the batch's. And they train a second draw of the weights; here
    # that is the check "weight reinitialisation".
    f.eval()
    x, y = next(batches())
    w = w.clone().requires_grad_()
    return (w * torch.autograd.grad(F.cross_entropy(f(w, x), y), w)[0]).abs().detach()


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
    others = f.others()
    theta = [c * w, *others.values()]

    def loss():
        return F.cross_entropy(f.call(theta[0], x, dict(zip(others, theta[1:]))), y)

    for _ in range(K):
        theta = [t - eta * g for t, g in zip(theta, torch.autograd.grad(loss(), theta, create_graph=True))]
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
    "grasp": Score(grasp, lambda d, s: min(d, math.ceil(d * s - 1e-6) + 1)),
    "synflow": Score(synflow, lambda d, s: math.ceil(d * s - 1e-6), rounds=100, dtype=torch.float64),
    # In float32 on a CPU, a third of ProsPr's mask would be noise.
    "prospr": Score(prospr, lambda d, s: math.ceil(d * s - 1e-6), dtype=torch.float64),
    # With Kaiming's distribution, what remains is in the layers with few inputs.
    "magnitude": Score(lambda f, w, batches: w.abs()),
    "random": Score(random),
    "dense": Score(lambda f, w, batches: w.abs(), lambda d, s: d),
}


def at_init(model, train, *, score, sparsity, init=gm.kaiming_normal, invert=False, batch_size=128, seed=0):
    """Keep the weights with the largest scores (invert: the smallest); score is a key of SCORES.

    Scores are computed on a copy of the network, so that BatchNorm's statistics stay as they are.
    """
    if score not in SCORES:
        raise gm.InputError(f"the scores are {', '.join(SCORES)}, not {score!r}")
    ours, how = gm.Network.of(model), SCORES[score]
    gm.check_sparsity(sparsity, ours.d)
    w = gm.draw(ours, init, seed)
    device = "cpu" if how.dtype and ours.device.type == "mps" else ours.device  # MPS has no float64
    model = copy.deepcopy(ours.model).to(device, how.dtype)
    f = gm.Network(model, prune=lambda name, _: name in ours.names)
    batches = partial(gm.minibatches, f, train, batch_size)
    v, m = w.to(f.device, f.dtype), torch.ones(f.d, dtype=torch.bool, device=f.device)
    gm.reseed(seed, "score")
    for k in range(1, how.rounds + 1):
        p = how.score(f, v * m, batches)
        if not p.sum().isfinite():
            raise FloatingPointError(f"{score}'s scores are not finite on this network")
        alive, n = p[m], how.count(f.d, sparsity ** (k / how.rounds))
        m = m.masked_scatter(m, largest(alive, [len(alive)], [n], invert))
    return ours.settle(w, p, m.to(w), m.to(w))


# --- Edge-popup, and the variants of Table 3 ----------------------------------------------------------------


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
    invert=False, criterion=F.cross_entropy, batch_size=128, seed=0, on_epoch=None, state=None,
):  # fmt: skip
    """Edge-popup (Ramanujan et al., 2020): learn scores p; the network is w * m, m the top s of |p| in every layer.

    Nothing is frozen, and the gradient reaches p as if m were |p|. Variants of Table 3, each on top of the one
    before: whole: the top s of the whole network; period: starting from more than s, and fewer from period to period
    (weights may return); regularize: with lambda * ||p||^2, lambda = 1e-4. Cost: `epochs`.
    """
    f = gm.Network.of(model)
    d, s, whole = f.d, sparsity, whole or period
    gm.check_sparsity(s, d)
    w = gm.draw(f, init, seed)
    gm.reseed(seed, "scores")  # U(-1/sqrt(fan_in), 1/sqrt(fan_in)); he_std is sqrt(2/fan_in)
    p = ((2 * torch.rand(d, dtype=f.dtype) - 1) * f.he_std() / 2**0.5).to(w)
    if whole:
        sizes, goal = [d], [max(1, floor(d * s))]
    else:
        sizes, goal = f.sizes, [math.ceil(n * s - 1e-6) for n in f.sizes]

    def effective(p, j):
        counts = [popup_count(d, s, j, epochs, period)] if period else goal
        return w * gm.straight_through(p.abs(), largest(p.detach().abs(), sizes, counts, invert))

    # Theirs: weight decay 5e-4 on the scores. lambda * ||p||^2 has the gradient of a weight decay of 2 * lambda.
    p = gm.fit(
        f, p, effective, train, phase="edge-popup", epochs=epochs, lr=lr, schedule=gm.cosine,
        optimizer=partial(gm.sgd, weight_decay=7e-4 if regularize else 5e-4), criterion=criterion,
        batch_size=batch_size, seed=seed, on_epoch=on_epoch, state=state,
    ).abs()  # fmt: skip
    m = largest(p, sizes, goal, invert).to(w)
    return f.settle(w, p, m, m)


# --- Smart ratio: only the densities of the layers matter ---------------------------------------------------


def smart_ratio(sizes, s, vgg=False, last=0.3):
    """The densities p_1, ..., p_L of Su et al. (2020), for layers of these sizes in forward order. No cost.

    p_l is in proportion to (L-l+1)^2 + (L-l+1), for VGG divided by l^2; p_L = 0.3. What would exceed 1 is carried
    over to the next layer.
    """
    gm.check_sparsity(s, sum(sizes))
    L, budget = len(sizes), s * sum(sizes) - last * sizes[-1]
    if L < 2:
        raise gm.InputError("smart ratio is for networks of two layers or more")
    if budget <= 0:
        least = last * sizes[-1] / sum(sizes)
        raise gm.InputError(f"smart ratio keeps 30% of the last layer: take a sparsity above {least:.2g}, not {s:g}")
    raw = [((L - l + 1) ** 2 + (L - l + 1)) / (l**2 if vgg else 1) for l in range(1, L)]
    g = budget / sum(n * r for n, r in zip(sizes, raw))
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
    m = random_mask(f, densities or smart_ratio(f.sizes, sparsity or 0), seed)
    return f.settle(gm.draw(f, init, seed), m, m, m)


def tune_densities(
    model, train, p, *, epochs, lr=1e-6, criterion=F.cross_entropy, batch_size=128, seed=0, on_epoch=None, state=None
):
    """Minimise equation (1) of appendix B by SGD over the densities p (SR-v5, v6). Returns the new ones.

    The weights are signed constants, each kept with the probability of its layer, drawn anew in every step.
    """
    f = gm.Network.of(model)
    w, own, fresh = gm.draw(f, gm.signed_constant, seed), f.vector(), f.rest()

    def boxed(params, eta):
        opt = gm.sgd(params, eta)
        opt.register_step_post_hook(lambda *_: params[0].data.clamp_(0, 1))
        return opt

    p = gm.fit(
        f, torch.tensor(p, dtype=f.dtype),
        lambda p, j: w * gm.round_random(torch.cat([x.expand(n) for x, n in zip(p, f.sizes)])), train,
        # Rare Gems' code: a cosine over 150 epochs, of which the paper has the tenth. Until there it hardly falls.
        phase="equation 1", epochs=epochs, lr=lr, optimizer=boxed, schedule=lambda eta, j, E: eta,
        criterion=criterion, batch_size=batch_size, seed=seed, on_epoch=on_epoch, state=state,
    ).tolist()  # fmt: skip
    f.load(own)
    f.restore(fresh)
    return p


def smart_ratio_search(
    model, train, *, densities, trials, epochs, lr=0.1, schedule=gm.multistep, init=gm.kaiming_normal, batch_size=128,
    seed=0, phase=at_once,
):  # fmt: skip
    """SR-v4: of `trials` of the sets of densities around these, the one that trains best. train: a Batches.

    Judged by a tenth of the training images, held out (the authors' code judges by the test set). Cost: `epochs`.
    """
    f = gm.Network.of(model)
    rest, held = hold_out(train)
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
    return f.settle(w, m, m, m)


def hold_out(train):
    """Two Batches: nine tenths of a Batches, and the other tenth as it is, neither cropped nor flipped."""
    (h, w), pad, stats = train.size, train.pad, (train.mean, train.std)
    rest, held = gm.divide(gm.Split(train.x[:, pad : pad + h, pad : pad + w], train.y), 0.1)
    return type(train)(rest, stats, train.batch_size, True, pad), gm.Batches(held, stats)


# --- The command line of a method ---------------------------------------------------------------------------


def parser():
    import models

    raw = argparse.RawDescriptionHelpFormatter
    cli = gm.Parser(prog="baselines.py", description=__doc__, formatter_class=raw)
    methods = cli.add_subparsers(dest="method", metavar="METHOD", required=True)
    subs, rate = {}, "0.1; ep, except on ResNet-20: 0.01; Caltech-101: Table 15's"
    for name in ("imp", "lrr", "ep", "sr", *SCORES):
        subs[name] = methods.add_parser(name)
        gm.flags_of_all_methods(subs[name], rate, "multistep; ep on ResNet-20: cosine")
        subs[name].set_defaults(finetune_mask="q")
    for name in ("imp", "lrr", "sr"):
        subs[name].add_argument("--round-epochs", type=int, help="of a round or trial (default: --finetune-epochs)")
    subs["imp"].add_argument("--rewind", type=int, default=0, help="to this step; 0, cold, is the default")
    g = subs["ep"].add_argument_group("variants of Table 3")
    g.add_argument("--global", action="store_true", help="the top scores of the whole network, not of each layer")
    g.add_argument("--gradual", action="store_true", help="--global, with fewer from period to period")
    g.add_argument("--regularize", action="store_true", help="--gradual, with an L2 penalty on the scores")
    g.add_argument("--period", type=int, help="T of --gradual (default: Gem-Miner's)")
    g.add_argument("--lr", type=float, help="learning rate of the scores (default: 0.1; more, in fewer epochs)")
    g = subs["sr"].add_argument_group("variants of Table 16")
    about = "SR-v1 to SR-v6 (default: 1; for 5 and 6, the paper's --epochs are 10)"
    g.add_argument("--version", type=int, choices=range(1, 7), default=1, help=about)
    g.add_argument("--from", metavar="RUN", help="the folder of a gem's run for 2 and 5, IMP's for 4, SR-v4's for 6")
    g.add_argument("--trials", type=int, default=144, help="how many of SR-v4's 144 densities (default: all)")
    g.add_argument("--lr", type=float, default=1e-6, help="learning rate of the densities, 5 and 6 (default: 1e-6)")

    names = "\n".join(f"  {name:<8} {experiment.about}" for name, experiment in EXPERIMENTS.items())
    about = inspect.cleandoc(paper.__doc__)
    g = methods.add_parser("paper", description=about, epilog=f"NAME:\n{names}", formatter_class=raw)
    g.add_argument("experiment", metavar="NAME", choices=EXPERIMENTS, help="see below")
    g.add_argument("--epochs", type=int, help="instead of the paper's; all else scales with it")
    g.add_argument("--model", action="append", choices=models.MODELS, help="likewise; may be repeated, as --sparsity")
    g.add_argument("--dataset", help="likewise")
    g.add_argument("--sparsity", action="append", type=gm.fraction, help="likewise: fraction of weights KEPT")
    g.add_argument("--seeds", type=int, default=1, help="how many, from 0 on (default: 1)")
    g.add_argument("--dry-run", action="store_true", help="only print the runs, a command a line, and their cost")
    g.add_argument("--so-far", action="store_true", help="run nothing: print the runs that are complete in --out")
    g.add_argument("--out", type=gm.place, default=Path("runs/paper"), help="of all runs (default: runs/paper)")

    g = methods.add_parser("bench", description=bench.__doc__)
    g.add_argument("--model", choices=models.MODELS, default="resnet20", help="(default: resnet20)")
    g.add_argument("--batch-size", type=int, help="(default: the paper's)")
    g.add_argument("--rounds", type=int, default=11, help="how often each is measured (default: 11)")
    gm.flags_of_hardware(g)
    return cli


def complete(argv):
    """The arguments of the run `METHOD ...`, or `gem-miner ...`, with all that was not given."""
    if argv[0] == "gem-miner":
        return gm.complete(gm.arguments(gm.parser(), argv[1:]))
    args = gm.arguments(parser(), argv)
    named = args.checks
    if args.method == "dense":
        args.sparsity = 1.0
    if args.finetune_lr is None and args.dataset != "caltech101":  # there the weights are pretrained: Table 15
        args.finetune_lr = 0.01 if args.method == "ep" and args.model != "resnet20" else 0.1
    if args.finetune_schedule is None and args.method == "ep" and args.model == "resnet20":
        args.finetune_schedule = "cosine"
    if args.method == "ep" and args.lr is None:
        args.lr = 0.1 * gm.rate_factor(args, gm.paper_setting(args.model, args.dataset, args.sparsity))
    gm.complete(args)
    if "round_epochs" in args:
        args.round_epochs = args.round_epochs or args.finetune_epochs or args.epochs
    if args.method == "sr":
        args.trials = min(args.trials, 144)
        if args.version in SOURCES and getattr(args, "from") is None:
            needs = f"needs the densities of {SOURCES[args.version]}"
            raise gm.InputError(f"sr --version {args.version} {needs}: give the folder of such a run as --from")
    possible = plan(args)["checks"]
    if args.checks and not possible:
        raise gm.InputError(f"{args.method} finds no ticket at initialisation to check: leave --checks out")
    if not set(named or ()) <= set(possible):
        raise gm.InputError(f"the checks of {args.method} are {' and '.join(possible)}")
    args.checks = [check for check in possible if check in args.checks]
    return args


def plan(args):
    """A method, as the arguments of gem_miner.run_command."""
    name, s, epochs = args.method, args.sparsity, args.epochs
    if name == "gem-miner":
        return gm.plan(args)
    training = {"lr": args.finetune_lr, "schedule": gm.finetune_schedule(args)}
    init, checks = gm.kaiming_normal, tuple(gm.CHECKS)
    if name in SCORES:
        epochs = int(name not in ("dense", "magnitude", "random"))  # 1 for a batch, as in Table 1
        text, checks = "scores at initialisation", {"dense": (), "random": checks[:2]}.get(name, checks)

        def find(run, phase, f, train, **kw):
            return run.once(phase, at_init, f, train, score=name, sparsity=s, **kw)

    elif name in ("imp", "lrr"):
        rounds, rewind = imp_rounds(s), args.rewind if name == "imp" else None
        epochs, checks = rounds * args.round_epochs, checks[:2] if name == "imp" else ()
        text = f"{rounds} rounds of {args.round_epochs} epochs, down to {100 * 0.8**rounds:.3g}%"

        def find(run, phase, f, train, **kw):
            return imp(f, train, sparsity=s, epochs=epochs, rewind=rewind, phase=run.phase, **training, **kw)

    elif name == "ep":
        gradual = args.gradual or args.regularize
        whole, init = gradual or getattr(args, "global"), gm.signed_constant
        variant = {"whole": whole, "period": args.period if gradual else None, "regularize": args.regularize}
        text = f"{epochs} epochs, lr {args.lr:g}; the top of {'the network' if whole else 'each layer'}"
        text += (f", fewer every {args.period} epochs" if gradual else "") + ", penalised" * args.regularize

        def find(run, phase, f, train, **kw):
            return run.phase(phase, edge_popup, f, train, epochs=epochs, sparsity=s, lr=args.lr, **variant, **kw)

    else:
        epochs = {4: args.trials * args.round_epochs, 5: epochs, 6: epochs}.get(args.version, 0)
        text, checks = f"smart ratio, version {args.version}", checks[:2]

        def find(run, phase, f, train, init, seed):
            p = densities(args, f)
            if args.version == 4:
                search = {"trials": args.trials, "epochs": epochs, "phase": run.phase, **training}
                return smart_ratio_search(f, train, densities=p, init=init, seed=seed, **search)
            if args.version > 4:
                p = run.phase("densities", tune_densities, f, train, p, epochs=epochs, lr=args.lr, seed=seed)
            return smart_ratio_ticket(f, train, densities=p, init=init, seed=seed)

    return {"find": find, "epochs": epochs, "text": text, "init": init, "checks": checks}


SOURCES = {2: "Gem-Miner", 4: "IMP", 5: "Gem-Miner", 6: "SR-v4"}  # of the densities of a version of smart ratio


def densities(args, f):
    """The p_1, ..., p_L that version args.version of the smart ratio starts from (appendix B).

    1: smart_ratio. 2: the same, but first and last layer as in a gem. 3: but first and last layer dense.
    4: those of IMP, then smart_ratio_search. 5 and 6: those of 2 and 4, then tuned by equation (1).
    """
    first, last = 1.0, 1.0
    if args.version in SOURCES:
        path = gm.place(getattr(args, "from")) / "gem.pt"
        if not path.is_file():
            raise gm.InputError(f"there is no {path}, which a finished search leaves: choose another --from")
        found = gm.read(path)
        masks = found.get("mask", {})
        if {name: tuple(m.shape) for name, m in masks.items()} != dict(zip(f.names, f.shapes)):
            raise gm.InputError(f"{path} is not a gem of this network: choose another --from")
        if found["settings"]["sparsity"] != args.sparsity:
            raise gm.InputError(f"{path} is of --sparsity {found['settings']['sparsity']}: choose another --from")
        theirs = [m.count_nonzero().item() / m.numel() for m in masks.values()]
        if args.version in (4, 6):
            return theirs
        first, last = theirs[0], theirs[-1]
    p = smart_ratio(f.sizes, args.sparsity, args.model.startswith("vgg"))
    return p if args.version == 1 else [first, *p[1:-1], last]


# --- The paper's tables and figures -------------------------------------------------------------------------


def commands(model, E, scale, folder):
    """{label: its command} of all runs. E: epochs; scale: E by the paper's; folder: label -> folder of that run."""

    def n(number):
        return max(1, round(number * scale))

    warm = n(2000 if model in ("vgg16", "wrn28_2") else 1000)
    return {
        "Gem-Miner": "gem-miner",
        "Long Gem-Miner": f"gem-miner --epochs {20 * E} --period {E} --finetune-epochs {E}",
        "Dense": "dense",
        "IMP (warm)": f"imp --rewind {warm}",
        "IMP (cold)": "imp",
        "Short IMP (warm)": f"imp --round-epochs {n(8)} --rewind {warm}",
        "Short IMP (cold)": f"imp --round-epochs {n(8)}",
        "Renda et al.": "lrr",
        "Random": "random",
        "SNIP": "snip",
        "GraSP": "grasp",
        "SynFlow": "synflow",
        "ProsPr": f"prospr --finetune-epochs {n(200)}",
        "EP": "ep",
        "EP (Table 3)": "ep --batch-size 256",
        "Global EP": "ep --global --batch-size 256",
        "+ Gradual Pruning": "ep --gradual --batch-size 256",
        "+ Regularization": "ep --regularize --batch-size 256",
        "SR": "sr",
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


TICKS = ("at initialisation", "finetunable", "passes the checks")


def ticks(*paper):
    return dict(zip((*TICKS, "search epochs"), paper))


def finetunable(r):
    """Clearly better than before the training, and than random weights, as many, after theirs."""
    after, others = r["post_finetune_acc"], (r["pre_finetune_acc"], r["random_acc"])
    if after is not None and r["random_acc"] is None:
        return "no random run"
    if None in (after, *others):
        return None
    return "yes" if all(gm.clearly_above(after, other, r["images"][1]) for other in others) else "no"


def passes(r):
    failed = [gm.CHECKS[name] for name, check in r["checks"].items() if not check["passed"]]
    return "no: " + ", ".join(failed) if failed else "yes"


COLUMNS = {  # from a result.json
    "at initialisation": lambda r: "no" if r["method"] in ("lrr", "dense") or r.get("rewind") else "yes",
    "finetunable": finetunable,
    "passes the checks": passes,
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
LAYERS = "kept of each layer (%)"
CURVES = {  # title: from a result.json and its log
    "r(p)q (%)": lambda r: [100 * row["m"] / r["total"] for row in r["log"] if row["phase"] == "mine"],
    "upper bound q (%)": lambda r: [100 * row["q"] / r["total"] for row in r["log"] if row["phase"] == "mine"],
    "accuracy (%)": lambda r: [row["test_acc"] for row in r["log"] if row["phase"] in ("mine", "finetune")],
    LAYERS: lambda r: [100 * layer["kept"] / layer["total"] for layer in r["layers"]],
}


class Experiment(NamedTuple):
    about: str
    networks: tuple  # (model, data set)
    sparsities: tuple  # (): those of Tables 8 to 14; (None,): the rows have their own
    columns: tuple  # keys of COLUMNS
    rows: dict  # label (a key of commands): {column: the paper's figure}
    at: tuple = ()  # the (model, sparsity) that the paper's figures are for; (): of the first network and sparsity
    checked: tuple = ()  # labels of the runs that take the sanity checks
    checks: str = "--checks"  # how
    own: dict = {}  # label: its own sparsity
    curves: tuple = ()  # keys of CURVES, to draw
    authors: dict = {}  # (model, sparsity): {label: how many weights of each layer the authors' own keeps}

    def sparsity_of(self, label, s):
        return 1.0 if label == "Dense" else s or self.own[label]


RESNET20, MOBILENET, VGG = (("resnet20", "cifar10"),), (("mobilenetv2", "cifar10"),), (("vgg16", "cifar10"),)
CIFAR = (*RESNET20, *MOBILENET, *VGG, ("wrn28_2", "cifar10"))
CHECKED = ("shuffled", "reinitialised", "inverted")
COMPARED = {
    "Gem-Miner": {"after": 77.89}, "IMP (warm)": {"after": 74.52}, "Renda et al.": {"after": 80.21}, "EP": {},
    "SR": {"after": 65.61}, "Dense": {},
}  # fmt: skip
EXPERIMENTS = {
    "table1": Experiment(
        "Table 1: what each method takes to find 1.4% of ResNet-20", RESNET20, (0.0144,),
        (*TICKS, "search epochs", "kept %", "before", "BN re-estimated", "after", *CHECKED), {
            # The marks as the paper's sentences have them; of edge-popup's checks they say nothing.
            "IMP (warm)": ticks("no", "yes", "yes", 2850),
            "SNIP": ticks("yes", "yes", "no", 1),
            "GraSP": ticks("yes", "yes", "no", 1),
            "SynFlow": ticks("yes", "yes", "no", 1),
            "EP": ticks("yes", "no", "none", 150),
            "SR": ticks("yes", "yes", "no", "O(1)"),
            "Renda et al.": ticks("no", "yes", "n/a", 3000),  # with the last training
            "Gem-Miner": ticks("yes", "yes", "yes", 150),
            "Random": {},
        }, checked=("IMP (warm)", "SNIP", "GraSP", "SynFlow", "EP", "SR", "Gem-Miner")),
    "table2": Experiment(
        # ProsPr's 82.67% is with its authors' recipe: weight decay 5e-4, batch 256, drops after epochs 100 and 150.
        "Table 2: ProsPr and Gem-Miner", RESNET20, (None,),
        ("kept %", "after", "shuffled", "reinitialised", "passes the checks"), {
            "ProsPr": {"kept %": 5, "after": 82.67, "shuffled": 82.15, "reinitialised": 81.64},
            "Gem-Miner": {"kept %": 3.72, "after": 83.4, "shuffled": 78.73, "reinitialised": 78.6},
        }, checked=("ProsPr", "Gem-Miner"), checks="--checks shuffle reinit",
        own={"ProsPr": 0.05, "Gem-Miner": 0.0372}),
    "table3": Experiment(
        "Table 3: from edge-popup to Gem-Miner", RESNET20, (0.0059,),
        ("kept %", "before", "BN re-estimated", "after"), {
            "EP (Table 3)": {"before": 19.57, "after": 24.47},
            "Global EP": {"before": 22.22, "after": 34.42},
            "+ Gradual Pruning": {"before": 31.56, "after": 63.54},
            "+ Regularization": {"before": 19.67, "after": 63.72},
            "Gem-Miner": {"before": 45.30, "after": 66.15},
        }),
    "table4": Experiment(
        # The paper's 3000 are 19 rounds and a last training of 150 epochs. Long Gem-Miner: 3000 to mine, 150 to train.
        "Table 4: Long Gem-Miner", RESNET20, (0.0144,), ("all epochs", "kept %", "after"), {
            "Gem-Miner": {"all epochs": 300, "after": 77.89},
            "Long Gem-Miner": {"all epochs": 3000, "after": 79.50},
            "IMP (warm)": {"all epochs": 3000, "after": 74.52},
            "Renda et al.": {"all epochs": 3000, "after": 80.21},
        }),
    "table16": Experiment(
        "Table 16: how far random pruning goes (IMP, not in the table, is where SR-v4 starts)",
        RESNET20, (0.0144,), ("kept %", "after"), {
            "Gem-Miner": {"kept %": 1.44, "after": 77.89},
            "IMP (warm)": {},
            "SR": {"kept %": 1.44, "after": 65.61},
            "SR-v2": {"kept %": 1.47, "after": 68.59},
            "SR-v3": {"kept %": 1.75, "after": 69.78},
            "SR-v4": {"kept %": 1.44, "after": 69.92},
            "SR-v5": {"kept %": 1.53, "after": 69.01},
            "SR-v6": {"kept %": 1.47, "after": 69.08},
        }),
    "fig2": Experiment(
        "Fig. 2: density while mining MobileNet-V2 (q is the upper bound)", MOBILENET, (None,),
        ("r(p)q %", "before", "after"), {  # lambda and s as in Table 9
            "GM lambda 0": {"r(p)q %": "around 50"},
            "GM lambda 3e-6": {},
            "GM lambda 7e-6": {"r(p)q %": 2.5},
            "GM lambda 1.5e-5": {"r(p)q %": 1.4, "before": 84.62, "after": 87.37},
            "EP": {},
        }, own={"GM lambda 0": 0.5, "GM lambda 3e-6": 0.2, "GM lambda 7e-6": 0.05, "GM lambda 1.5e-5": 0.0144,
                "EP": 0.0144}, curves=("r(p)q (%)", "upper bound q (%)")),
    "fig3": Experiment(
        "Fig. 3 (and Fig. 1, a point of it): accuracy after finetuning, and Gem-Miner's sanity checks", CIFAR, (),
        ("kept %", "after", *CHECKED), COMPARED, at=("resnet20", 0.0144), checked=("Gem-Miner",)),
    "fig4": Experiment(
        "Fig. 4: other data sets: accuracy before and after finetuning, and Gem-Miner's sanity checks",
        (("resnet32x2", "cifar100"), ("resnet18", "tinyimagenet"), ("resnet50", "tinyimagenet"),
         ("resnet50", "caltech101")), (), ("kept %", "before", "after", *CHECKED), COMPARED, checked=("Gem-Miner",)),
    "fig5": Experiment(
        "Fig. 5: accuracy by epoch: mining, then finetuning", MOBILENET, (0.0144,),
        ("kept %", "before", "after"), {"Gem-Miner": {"kept %": 1.16}, "Dense": {}, "IMP (warm)": {}},
        curves=("accuracy (%)",)),
    "fig6": Experiment(
        "Fig. 6: accuracy before finetuning", CIFAR, (), ("kept %", "before", "BN re-estimated"),
        {"Gem-Miner": {"before": 84.62}, "IMP (warm)": {}, "EP": {}, "SR": {}}, at=("mobilenetv2", 0.0144)),
    "fig7": Experiment(
        "Fig. 7: what is kept of each layer", RESNET20, (0.5, 0.0373, 0.0144, 0.0059), ("kept %",),
        {"Gem-Miner": {}, "IMP (warm)": {}, "SR": {}, "EP": {}}, curves=(LAYERS,), authors={
            ("resnet20", 0.0144): {
                "Gem-Miner": (
                    149, 165, 190, 200, 165, 160, 147, 189, 296, 290, 250, 209, 169, 125, 232, 136, 244, 120, 258, 166),
                "IMP (warm)": (
                    194, 244, 227, 201, 179, 182, 166, 285, 300, 308, 221, 186, 158, 217, 171, 124, 128, 116, 81, 172),
            },
            ("resnet20", 0.0059): {
                "Gem-Miner": (111, 78, 103, 106, 80, 86, 60, 71, 113, 162, 103, 103, 39, 40, 40, 44, 29, 26, 33, 153),
            },
        }),
    "fig8": Experiment(
        "Fig. 8: further networks: accuracy before and after finetuning, and Gem-Miner's sanity checks",
        (("mobilenetv2", "tinyimagenet"), ("resnet18", "cifar10")), (), ("kept %", "before", "after", *CHECKED),
        COMPARED, checked=("Gem-Miner",)),
    "fig9": Experiment(
        "Fig. 9: accuracy before and after finetuning, VGG-16", VGG, (0.014, 0.005),
        ("kept %", "before", "after"), {
            "GM lr 0.01": {}, "GM lr 0.001": {}, "GM lr 0.0001": {}, "GM lr 0.00001": {}, "EP": {}, "SR": {}}),
    "fig10": Experiment(
        "Fig. 10: four kinds of IMP", RESNET20, (), ("kept %", "before", "after"), {
            "Gem-Miner": {"after": 77.89},
            "Short IMP (cold)": {},
            "Short IMP (warm)": {},
            "IMP (cold)": {},
            "IMP (warm)": {"after": 74.52},
        }, at=("resnet20", 0.0144)),
}  # fmt: skip
EXPERIMENTS["fig1"] = EXPERIMENTS["fig3"]


def runs_of(experiment, args, more):
    """[(label, network, sparsity, seed, arguments)] of the runs of an Experiment, in order."""
    runs = []
    networks = []
    for model in dict.fromkeys(args.model or [model for model, _ in experiment.networks]):
        own = [pair for pair in experiment.networks if pair[0] == model]
        networks += own or [(model, experiment.networks[0][1])]
    if args.dataset:
        networks = dict.fromkeys((model, args.dataset) for model, _ in networks)
    for model, dataset in networks:
        rows = gm.paper_rows(model, "cifar10" if dataset == "shapes" else dataset)
        E = args.epochs or gm.paper_setting(model, dataset, 1).epochs
        network = model if len({d for _, d in networks}) == 1 else f"{model} on {dataset}"
        listed = experiment.sparsities or dict.fromkeys(row.sparsity for row in rows)
        for s, seed, label in itertools.product(args.sparsity or listed, range(args.seeds), experiment.rows):
            kept = experiment.sparsity_of(label, s)
            place = f"{model}-{dataset}-{kept:g}-seed{seed}"

            def folder(label, place=place):
                words = "".join(c if c.isalnum() or c in "-." else " " for c in f"{label}-{place}").split()
                return shlex.quote(str(args.out / "-".join(words)))

            argv = shlex.split(commands(model, E, E / rows[0].epochs, folder)[label])
            argv += [] if "--epochs" in argv else ["--epochs", str(E)]
            argv += ["--model", model, "--dataset", dataset, "--sparsity", str(kept), "--seed", str(seed)]
            argv += experiment.checks.split() * (label in experiment.checked) + more
            runs.append((label, network, s, seed, complete([*argv, "--out", *shlex.split(folder(label))])))
    return runs


def result_of(run):
    """The result of a run, its log included, or None."""
    path = run.out / "result.json"
    try:
        result = json.loads(path.read_text())
        result["log"] = [json.loads(line) for line in (run.out / "log.jsonl").read_text().splitlines()]
    except (OSError, ValueError):  # not there, or damaged: a run writes it anew
        return None
    gm.same_settings(gm.settings(run), result, path)
    return result


def is_complete(run):
    result = result_of(run)
    return bool(result) and set(run.checks) <= set(result.get("checks", ()))


def paper(args, more):
    """Run what a table or figure of the paper needs, and print it in Markdown, the paper's own figures beside ours.

    Complete runs in --out are taken as they are, others resumed. Other flags, such as --bf16, go to every run.
    """
    experiment = EXPERIMENTS[args.experiment]
    flags = {a.split("=")[0] for a in more}
    if "--seed" in flags:
        raise gm.InputError(f"not for paper: {shlex.join(more)} (for seeds, --seeds HOW_MANY)")
    if "--eval-every" in flags and "accuracy (%)" in experiment.curves:
        raise gm.InputError(f"{args.experiment} draws the accuracy of every epoch: leave --eval-every out")
    runs = runs_of(experiment, args, more)
    if args.dry_run:
        dry_run(run for *_, run in runs)
        return
    results, failed = {}, []  # results: {(label, network, sparsity): {seed: its result}}
    for label, network, s, seed, run in runs:
        if not args.so_far and not is_complete(run):
            try:
                make(run)
            except gm.InputError as e:  # the others may go well
                failed.append(str(e))
                warnings.warn(f"left out: {e}", stacklevel=2)
        found = results.setdefault((label, network, s), {})
        if result := result_of(run):
            found[seed] = result
    for (_, network, s), found in results.items():
        for seed, result in found.items():
            chance = results.get(("Random", network, s), {}).get(seed)
            result["random_acc"] = chance and chance["post_finetune_acc"]
    if any(results.values()):
        show(experiment, args, {point: list(found.values()) for point, found in results.items()})
    elif not failed:
        raise gm.InputError(f"no run of {args.experiment} with these flags is complete in {args.out}")
    if failed:
        raise gm.InputError(f"{len(failed)} of {len(runs)} runs could not be made; the first is {failed[0]}")


def make(run):
    """Make a run, or what is left of it. It prints to stderr, so that the table can go to a file."""
    run.resume = gm.is_begun(run.out)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            gm.run_command(run, **plan(run))
    except (gm.InputError, FloatingPointError) as e:
        raise gm.InputError(f"{run.command}: {e}") from e


def dry_run(runs):
    """Print the commands, those of complete runs as comments, and what they cost."""
    costs = []  # of what is not complete
    for run in {run.command: run for run in runs}.values():
        cost, done = gm.cost(run, plan(run)["epochs"], run.checks), is_complete(run)
        resume = " --resume" if gm.is_begun(run.out) else ""
        print(f"{'# complete: ' * done}{run.command}{resume}  # {cost:,} epochs")
        costs += [] if done else [cost]
    print(f"# to do: {len(costs)} runs, {sum(costs):,} epochs")


def show(experiment, args, results):
    """Print an experiment: a table and charts. results: {(label, network, sparsity): [the result of each seed]}."""
    complete = [r for found in results.values() for r in found]
    first = complete[0]
    if any(r["images"] != first["images"] for r in complete if r["dataset"] == first["dataset"]):
        raise gm.InputError(f"the runs in {args.out} are not all on the same images: choose another --out")
    seeds = "1 seed" if args.seeds == 1 else f"{args.seeds} seeds, mean ± standard deviation"
    datasets = ", ".join(dict.fromkeys(r["dataset"] for r in complete))
    print(
        f"## {experiment.about}\n\n{datasets}, {'up to ' * args.so_far}{seeds}; {first['device']}"
        f" ({first['processor']}), torch {first['torch']}; accuracies in % of the"
        f" {'validation' if first['val'] else 'test'} images. The paper's figures are at its full number of epochs.\n"
    )
    for ours in dict.fromkeys((r["model"], r["dataset"]) for r in complete):
        theirs = gm.paper_rows(*ours)[0][:2]
        if ours != theirs:
            print(f"The paper has no settings for {' on '.join(ours)}, so those of {' on '.join(theirs)} are taken.\n")
    at = experiment.at or (experiment.networks[0][0], *experiment.sparsities[:1])
    shown = {(network, s) for _, network, s in results}
    given = {c for figures in experiment.rows.values() for c in figures}
    known = given if at in shown else set()  # the columns that have the paper's figures beside ours
    head = ["method", "network", "sparsity"]
    for c in experiment.columns:
        head += [c, "paper" if datasets == "cifar10" else "paper (CIFAR-10)"] if c in known else [c]
    rows = []
    for (label, network, s), found in results.items():
        row = [label, network, f"{100 * experiment.sparsity_of(label, s):g}%"]
        for c in experiment.columns:
            row.append(cell(COLUMNS[c], found, 3 if "%" in c else 2))
            if c in known:
                row.append(experiment.rows[label].get(c, "none") if (network, s) == at else "none")
        rows.append(row)
    print(markdown(head, rows))
    for title, xs, lines in charts(experiment, {point: found for point, found in results.items() if found}):
        if any(lines.values()):
            print(f"### {title}\n\n{chart(title, xs, {label: line for label, line in lines.items() if line})}")


def cell(read, found, digits=2):
    """What read() finds in the results of all seeds: mean and deviation, or words; or why there is nothing."""
    if not found:
        return "not run"
    try:
        values = [read(r) for r in found]
    except KeyError:
        return "not checked"
    if None in values:
        return "not trained"
    if not isinstance(values[0], float):
        return ", ".join(dict.fromkeys(map(str, values)))
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def markdown(head, rows):
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in [head, ["---"] * len(head), *rows])


def charts(experiment, results):
    """(title, values of x, {label: those of y}) of all that can be drawn; y: means over the seeds."""
    measure = [c for c in experiment.columns if c in ("before", "after")][-1:]
    places = list(dict.fromkeys((network, s) for _, network, s in results))
    for network in dict.fromkeys(network for network, _ in places):
        sparsities = [s for other, s in places if other == network]
        if measure and len(sparsities) > 1:
            lines = {}
            for label in experiment.rows:
                accs = [[COLUMNS[measure[0]](r) for r in results.get((label, network, s), ())] for s in sparsities]
                if all(of_seeds and None not in of_seeds for of_seeds in accs):
                    lines[label] = list(map(statistics.mean, accs))
            yield f"{network}: accuracy {measure[0]} finetuning (%)", [f"{100 * s:g}%" for s in sparsities], lines
    for (network, s), title in itertools.product(places, experiment.curves):
        found = {label: of_seeds for (label, *place), of_seeds in results.items() if place == [network, s]}
        lines = {label: list(map(statistics.mean, zip(*map(CURVES[title], found[label])))) for label in found}
        xs = range(1, 1 + max(map(len, lines.values())))
        if title == LAYERS:
            first = next(iter(found.values()))[0]
            xs = [layer["name"] for layer in first["layers"]]
            theirs = experiment.authors.get((network, s), {}) if first["dataset"] == "cifar10" else {}
            for label, counts in theirs.items():
                lines[f"{label} (authors)"] = [100 * n / layer["total"] for n, layer in zip(counts, first["layers"])]
        yield f"{network} {100 * s:g}%: {title}" if s else f"{network}: {title}", xs, lines


COLOURS = dict(
    blue="#1f77b4", orange="#ff7f0e", green="#2ca02c", red="#d62728", purple="#9467bd", brown="#8c564b",
    pink="#e377c2", grey="#7f7f7f", olive="#bcbd22",
)  # fmt: skip


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


# --- Speed --------------------------------------------------------------------------------------------------


def bench(args):
    """What a step costs here: of training as anybody writes it, of mining, and of finetuning, in turn."""
    import models

    gm.hardware(args)
    paper, device = gm.paper_setting(args.model, None, 0.0144), args.device
    side, classes, images = (32, 10, 50_000) if paper.dataset == "cifar10" else (64, 200, 100_000)
    size, steps = args.batch_size or paper.batch_size, 4 if device.type == "cpu" else 20
    f = gm.Network(models.build(args.model, classes, image_size=side).to(device), bf16=args.bf16, compile=args.compile)
    w, plain = gm.draw(f, gm.signed_constant, 0), copy.deepcopy(f.model).to(memory_format=torch.channels_last)
    call = torch.compile(plain, dynamic=False, mode="reduce-overhead") if args.compile else plain
    x = [torch.randn(size, 3, side, side, device=device).to(memory_format=torch.channels_last) for _ in range(steps)]
    batches = list(zip(x, torch.randint(classes, (steps, size), device=device)))

    def dense(batches):
        opt = torch.optim.SGD(plain.train().parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        for x, y in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                loss = F.cross_entropy(call(x), y)
            opt.zero_grad()
            loss.backward()
            opt.step()

    def timed(ms):
        """The batches; notes the time of a step, without what comes before and after them all."""
        start = time.perf_counter()
        yield from batches
        getattr(torch, device.type).synchronize()
        ms.append(1000 * (time.perf_counter() - start) / steps)

    ms = {"dense": [], "mining": [], "finetuning": []}
    for _ in range(args.rounds + 1):
        dense(timed(ms["dense"]))
        gm.mine(f, timed(ms["mining"]), sparsity=0.0144, epochs=1)
        gm.finetune(f, w, torch.ones_like(w), timed(ms["finetuning"]), epochs=1)
    ms = {name: times[1:] for name, times in ms.items()}  # the first: warming up

    def spread(values):
        low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else 3 * values
        return f"{middle:.3g} ± {(high - low) / 2:.2g}"

    precision = "bfloat16" if args.bf16 else "float32"
    print(f"{args.model} on {device.type}, {precision}, batches of {size} images of {side}x{side}\n")
    rows = [[name, spread(ms[name]), spread([a / b for a, b in zip(ms[name], ms["dense"])])] for name in ms]
    print(markdown(["a step of", "ms", "/ dense"], rows))
    speed, E = 1000 * size / statistics.median(ms["mining"]), paper.epochs
    hours = 2 * E * images / speed / 3600
    print(f"mining: {speed:,.0f} images a second; the paper's {E} + {E} epochs would take {hours:.1f} hours here")


def main(argv):
    """The command line; returns its exit code, as gem_miner.main."""
    gm.warn_plainly()
    try:
        args, more = parser().parse_known_args(argv)
        gm.check_values(args)
        if args.method == "paper":
            paper(args, more)
        elif args.method == "bench":
            bench(gm.arguments(parser(), argv))
        else:
            args = complete(argv)
            gm.run_command(args, **plan(args))
        return 0
    except (Exception, KeyboardInterrupt) as e:
        return gm.exit_code("baselines.py", e)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
