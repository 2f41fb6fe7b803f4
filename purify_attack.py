"""PGD on a purified classifier, and what it may know of the noise of the evaluation (P2).

    x_adv, checks = pgd(net, x, y, lambda k: noises("white", seed, index, k))

The attack is PGD on the cross-entropy from a zero start, with exact gradients through the whole
chain of purification.PurifiedClassifier, averaged over draws of the noise (EoT). What it knows of
the noise of the evaluation:

    white    nothing: fresh noise each time    both     all of it
    fwd      the noise of Eq. 2                semi-N   N draws, one of which the evaluation uses
"""

import torch
import torch.nn.functional as F

import sample
from losses import like, scaled_gradient
from purification import image_draws

NORMS = {"linf": (8 / 255, 2 / 255), "l2": (0.5, 0.1)}  # radius, step, in [0, 1] pixels
UNSEEN = 2**20  # draws from here on are the attack's own; twice that: choose between candidates

# --------------------------------------------------------------------------------------------------
# draws of the noise


def noises(knowledge, seed, index, k, eot=None):
    """The draws, known or fresh, over which step k of the attack averages; the evaluation's first
    is draw 0. eot: the number of fresh ones; default 10, under fwd 1, as in P2's code."""
    if eot is None:
        eot = 1 if knowledge == "fwd" else 10
    if knowledge in ("both", "no noise"):
        return [image_draws(seed, index)]
    if knowledge.startswith("semi-"):
        return [image_draws(seed, index, j) for j in range(int(knowledge[5:]))]
    forward = 0 if knowledge == "fwd" else None
    first = UNSEEN + k * eot
    return [image_draws(seed, index, first + j, forward) for j in range(eot)]


def together(draws):
    """The noise(k, x) of an x that holds the same images once for each of `draws`."""
    if len(draws) == 1:
        return draws[0]

    def noise(k, x):
        parts = x.chunk(len(draws))
        return torch.cat([draw(k, part) for draw, part in zip(draws, parts)])

    return noise


def over_draws(quantity, net, x, y, draws, eot_batch=1):
    """quantity(net, x, y, noise) -> (B, ..), averaged over the list `draws`, of which eot_batch are
    evaluated in one larger batch."""
    total = 0
    compiled = sample.is_compiled(getattr(net, "model", None))
    for group, count in sample.batches(draws, eot_batch, compiled):
        repeated = torch.cat([x.detach()] * len(group))
        values = quantity(net, repeated, y.repeat(len(group)), together(group))
        total = total + values.unflatten(0, (len(group), len(x)))[:count].sum(0)
    return total / len(draws)


# --------------------------------------------------------------------------------------------------
# PGD


@torch.no_grad()
def loss_of(net, x, y, noise):
    """Cross-entropy (B,) under one draw for each image."""
    return F.cross_entropy(net(x, noise).to(x.dtype), y, reduction="none")


def gradient_of(net, x, y, noise):
    """The gradient in x of loss_of, x's shape."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = net(x, noise).to(x.dtype)
        return scaled_gradient(F.cross_entropy(logits, y, reduction="sum"), logits, x)


@torch.no_grad()
def hit_of(net, x, y, noise):
    """1 where the image is classified correctly, else 0; (B,) float64."""
    return (net(x, noise).argmax(1) == y).double()


def ascend(x, delta, grad, norm):
    """One step of projected gradient ascent on delta, in the ball and with x + delta in [0, 1]."""
    radius, step = NORMS[norm]
    if norm == "linf":
        delta = (delta + step * grad.sign()).clamp(-radius, radius)
    else:
        size = like(grad.flatten(1).norm(dim=1).clamp_min(torch.finfo(grad.dtype).tiny), x)
        delta = delta + step * grad / size
        delta = delta * (radius / like(delta.flatten(1).norm(dim=1), x).clamp_min(radius))
    return (x + delta).clamp(0, 1) - x


def outside(x, delta, norm):
    """Whether delta leaves the ball, or x + delta the box [0, 1], by more than rounding; (B,)."""
    size = delta.flatten(1).norm(dim=1, p=float("inf") if norm == "linf" else 2)
    beyond = (x + delta - 0.5).abs().flatten(1).amax(1) > 0.5 + 1e-6
    return (size > NORMS[norm][0] * (1 + 1e-4)) | beyond


def pgd(net, x, y, draws, norm="linf", steps=20, eot_batch=1, path=None):
    """PGD from a zero start -> x_adv, checks {name: (B,)}.

    draws(k): the noises of step k, a list; draws(steps) those under which the losses of start and
    end are compared. path: a list, to which delta is added after each step.
    """
    delta = torch.zeros_like(x)
    nonfinite = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    zero = torch.zeros_like(nonfinite)
    for k in range(steps):
        grad = over_draws(gradient_of, net, x + delta, y, draws(k), eot_batch)
        nonfinite += (~grad.isfinite()).flatten(1).any(1)
        grad = grad.nan_to_num(0, 0, 0)
        zero += (grad == 0).flatten(1).all(1).double() / steps
        delta = ascend(x, delta, grad, norm)
        if path is not None:
            path.append(delta)
    start = over_draws(loss_of, net, x, y, draws(steps), eot_batch)
    end = over_draws(loss_of, net, x + delta, y, draws(steps), eot_batch)
    checks = dict(
        outside=outside(x, delta, norm),
        nonfinite=nonfinite,
        zero=zero,
        rises=(end > start).double(),
        start=start,
        end=end,
    )
    return (x + delta).clamp(0, 1), checks


def correct(net, x, y, seed, index, knowledge, draws, eot_batch=1):
    """Share of the draws, numbered as the knowledge allows, with which each image is classified
    correctly, (B,)."""
    forward = 0 if knowledge == "fwd" else None
    known = [image_draws(seed, index, d, forward) for d in draws]
    return over_draws(hit_of, net, x, y, known, eot_batch)


def judging_draws(knowledge, evaluations):
    """-> numbers of the draws that choose between candidates, and of those that judge; the same
    where the attack knows them."""
    if knowledge in ("white", "fwd"):
        choosers = range(2 * UNSEEN, 2 * UNSEEN + evaluations)
        return list(choosers), list(range(evaluations))
    known = int(knowledge[5:]) if knowledge.startswith("semi-") else 1
    judges = list(range(min(evaluations, known)))
    return judges, judges
