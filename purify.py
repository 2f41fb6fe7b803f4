"""Purify images with a diffusion model before they are classified, and attack the two together (P2).

    python purify.py --ckpt ddpm/ckpt.pt addt/ckpt.pt --classifier wrn/classifier.pt --data cifar10 --n 1024
    python purify.py ... --purifier none ddpm ddim edm-sde --knowledge white fwd both --norm linf l2   # Fig. 2, Tables 2, 9
    python purify.py ... --n 32 --nfe 5 --pgd 5 --eot 2 --knowledge white both semi-8 --figures 16     # a laptop
    python purify.py ... --n 1024 --batch-size 128 --eot 10 --eot-batch 10                             # a large GPU

P2 = "Understanding and Enhancing the Robustness of Diffusion-Based Purification". The claim: purification is robust because
its noise is unknown, not because it removes the perturbation: an attacker who knows all the noise (DW_Both) breaks it; and
ADDT (`train.py --robust addt`) makes it more robust under either knowledge. An image is diffused to t* (Eq. 2), taken back to
0 by the sampler, and classified. The attack is PGD on the cross-entropy from a zero start with exact gradients through the
whole chain (every network call is checkpointed: memory hardly grows with the number of steps), averaged over --eot draws:

    white    fresh noise each time        both     all the noise of the evaluation
    fwd      the noise of Eq. 2           semi-N   N draws, one of which the evaluation will use

and one purification with noise that the attack has not seen (except as stated) decides. --evaluations M > 1 also lets M
purifications choose between the image and the attacked image, as P2's repaired AutoAttack does, and M others (ours) judge.

The checks are always on: image within the ball and [0, 1], gradients finite and not 0, loss above that of the start on 90 % of
the images. A violation is printed on stderr and kept in metrics.json; the run goes on.

Leaves --out/purify.png, table.csv, table.md and metrics.json; with --figures also figures.png (P2 Figs. 7, 8). Image i and
all its noise are functions of --seed and i alone.
"""

import argparse
import functools
import os
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.stats import beta as beta_distribution
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import runtime
import sample
import samplers
from classifier import load_classifier
from data import NAMES, image_noise, load_images
from losses import NoiseSchedule, like, scaled_gradient
from samplers import ddim_step, ddpm_step, ddpm_variance, heun_follow

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

COLOURS = runtime.COLOURS[1:]  # without black, which is the intervals'
NORMS = {"linf": (8 / 255, 2 / 255), "l2": (0.5, 0.1)}  # radius, step, in [0, 1] pixels
EDM = {
    "edm-ode": {},
    "edm-sde": dict(S_churn=6.0, S_min=0.01, S_max=0.46, S_noise=1.007),
}  # P2 App. F
SAMPLERS = [
    "none",
    "ddpm",
    "ddim",
    "vp-sde",
    "vp-sde-corrector",
    *EDM,
    "gdmp",
    "gdmp-mse",
    "gdmp-ssim",
]
# GDMP's code scales the gradient of the MSE over a batch of 100 CIFAR images by 60000 / (16 / 255 / 3); here it is per image.
GUIDANCE = 60_000 / (16 / 255 / 3) * 2 / (100 * 3 * 32 * 32)
ROUND = 4096  # draws reserved for one round of a purification
UNSEEN = (
    2**20
)  # draws from here on are the attack's own, from twice that on those that choose between candidates

# ---------------------------------------------------------------------------------------------------------------------
# the purifier


def purification_timesteps(t_star, nfe):
    """The t at which the network is called: nfe = 5 -> [100, 80, 60, 40, 20, 0]; nfe + 1 calls, as in P2's own code."""
    if not 1 <= nfe <= t_star:
        raise ValueError(f"--nfe {nfe}: must lie in 1..{t_star} (t*)")
    return [t_star * i // nfe for i in range(nfe, -1, -1)]


@functools.cache
def noise_on(kind):
    """data.image_noise on a kind of device: on a GPU one fused kernel, compiled once for all seeds and streams."""
    return torch.compile(image_noise, dynamic=False) if kind == "cuda" else image_noise


def image_draws(seed, index, draw=0, forward=None):
    """noise(k, x) -> the k-th N(0, I) of a purification, x's shape; row i is a function of (seed, index[i], draw, k) alone.

    index (B,): on x's device, or else every call copies it there. forward: another draw, from which the noise of Eq. 2
    (k = 0 of a round) is taken.
    """

    def number(value, x):  # as a tensor, filled in on the device; of a seed its lower 64 bits count
        return torch.full((), (value + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=x.device)

    def noise(k, x):
        d = draw if forward is None or k % ROUND else forward
        z = noise_on(x.device.type)(
            number(seed + ((d + 1) << 32), x), index.to(x.device), number(k, x), tuple(x.shape[1:])
        )
        return torch.empty_like(x, requires_grad=False).copy_(z)

    return noise


def together(draws):
    """The noise(k, x) of an x that holds the same images once for each of `draws`."""
    if len(draws) == 1:
        return draws[0]
    return lambda k, x: torch.cat(
        [noise(k, part) for noise, part in zip(draws, x.chunk(len(draws)))]
    )


def vp_sde_step(x_t, eps, z, abar, abar_prev):
    """Euler-Maruyama on the reverse VP-SDE (P2 Eq. 12): f = -beta x / 2, g^2 = beta, score = -eps / sqrt(1 - abar).

    The integral of beta over the step is log(abar_prev / abar), by Eq. 11. Noise at every step, no x^_0 to clip.
    """
    b = (abar_prev / abar).log()
    return (
        like(1 + b / 2, x_t) * x_t
        - like(b / (1 - abar).sqrt(), x_t) * eps
        + like(b.sqrt(), x_t) * z
    )


def ssim(x, y):
    """Structural similarity (Wang et al., 2004), as GDMP takes it: 11 x 11 window, zero padding, range 1 -> (B,)."""
    g = torch.exp(-((torch.arange(11, device=x.device, dtype=x.dtype) - 5) ** 2) / (2 * 1.5**2))
    window = (torch.outer(g, g) / g.sum() ** 2).expand(x.shape[1], 1, 11, 11)
    with runtime.autocast(x.device, "fp32"):  # differences of squares
        mx, my, xx, yy, xy = (
            F.conv2d(a, window, padding=5, groups=x.shape[1]) for a in (x, y, x * x, y * y, x * y)
        )
    top = (2 * mx * my + 0.01**2) * (2 * (xy - mx * my) + 0.03**2)
    return (
        (top / ((mx**2 + my**2 + 0.01**2) * (xx - mx**2 + yy - my**2 + 0.03**2))).flatten(1).mean(1)
    )


def guidance(x_t, y_t, kind):
    """-numel / 2 times the gradient of the MSE, or of 1 - SSIM, between x_t and y_t; differentiable."""
    if kind == "mse":
        return y_t - x_t
    with torch.enable_grad():
        x = x_t if x_t.requires_grad else x_t.detach().requires_grad_()
        (g,) = torch.autograd.grad(ssim(x, y_t).sum(), x, create_graph=x_t.requires_grad)
    return g * (x_t[0].numel() / 2)


class PurifiedClassifier(nn.Module):
    """x (B, C, H, W) in [0, 1] -> logits (B, classes) of the purified image; differentiable, for any attack library.

    model: (x_t, t) -> eps; classifier: [0, 1] images -> logits. Both are put in eval mode and lose their weight gradients.
    sampler: one of SAMPLERS. Defaults: t* = T / 10, for EDM the t of sigma = 0.5, for GDMP 36; nfe = t*, for EDM 50 Heun
    steps (their levels rounded to the schedule's, equal ones merged); rounds: 1, for GDMP 4, purifications in a row. `calls`
    counts the network calls of the last forward. snr: of the corrector, one Langevin step before each step (Song et al., 2021;
    0.16 is their CIFAR-10 value, with norms per image instead of per batch). scale: GDMP's guidance.
    noise(k, x), see image_draws: fixed noise instead of the global generator's, here, as the attribute, or in forward().
    Raises ValueError for images outside [0, 1]; check_range=False spares the look at them, for which a GPU must be waited for.
    """

    def __init__(
        self,
        model,
        schedule,
        classifier,
        sampler="ddpm",
        t_star=None,
        nfe=None,
        noise=None,
        clip=True,
        variance="fixed-large",
        snr=0.16,
        scale=GUIDANCE,
        rounds=None,
        checkpointed=True,
        check_range=True,
    ):
        super().__init__()
        if sampler not in SAMPLERS:
            raise ValueError(f"--purifier {sampler}: need one of {', '.join(SAMPLERS)}")
        gdmp = sampler.startswith("gdmp")
        if t_star is None:
            near_half = int(np.abs(np.array(schedule.sigmas) - 0.5).argmin())
            t_star = near_half if sampler in EDM else 36 if gdmp else schedule.T // 10
        nfe = (50 if sampler in EDM else t_star) if nfe is None else nfe
        self.rounds = (4 if gdmp else 1) if rounds is None else rounds
        if not 1 <= t_star < schedule.T or nfe < 1 or self.rounds < 1:
            raise ValueError(
                f"--t-star {t_star} --nfe {nfe}, rounds {self.rounds}: need 1 <= t* < {schedule.T}, others >= 1"
            )
        ts = [] if sampler == "none" or sampler in EDM else purification_timesteps(t_star, nfe)
        self.pairs = list(zip(ts, ts[1:] + [-1]))
        self.model, self.classifier, self.schedule, self.sampler = (
            model,
            classifier,
            schedule,
            sampler,
        )
        self.t_star, self.nfe, self.noise, self.clip, self.variance = (
            t_star,
            nfe,
            noise,
            clip,
            variance,
        )
        self.snr, self.scale, self.checkpointed, self.calls = snr, scale, checkpointed, 0
        self.check_range = check_range
        self.eval().requires_grad_(False)

    def forward(self, x, noise=None):
        if self.check_range or x.dim() != 4:
            low, high = torch.stack(x.detach().aminmax()).tolist()  # one wait for both
            if x.dim() != 4 or not (low >= -1e-6 and high <= 1 + 1e-6):  # also refuses NaN
                raise ValueError(
                    f"purifier: x {tuple(x.shape)} in {low:.3g}..{high:.3g}: need (B, C, H, W) in [0, 1]"
                )
        return self.classifier(
            x if self.sampler == "none" else (self.purify(2 * x - 1, noise) + 1) / 2
        )

    def purify(self, x, noise=None):
        """x (B, C, H, W) in [-1, 1] -> x^_0 of its shape."""
        self.calls, noise = 0, noise or self.noise or (lambda k, x: torch.randn_like(x))
        given = x
        for r in range(self.rounds):
            x = self._round(
                x, given, functools.partial(lambda first, k, x: noise(first + k, x), r * ROUND)
            )
        return x

    def _eps(self, x_t, t):
        self.calls += 1
        if self.checkpointed and torch.is_grad_enabled() and x_t.requires_grad:
            return checkpoint(self.model, x_t, t, use_reentrant=False, preserve_rng_state=False)
        return self.model(x_t, t)

    def _round(self, x0, given, noise):
        """One purification of x0; in every round GDMP is guided by the image that was given.

        Draw 0 is the noise of Eq. 2, draw 1 + 2 i that of step i, 2 + 2 i that of its corrector or guidance.
        """
        schedule, sampler = self.schedule, self.sampler
        x_t = schedule.q_sample(
            x0, torch.full((len(x0),), self.t_star, device=x0.device), noise(0, x0)
        )
        if sampler in EDM:  # without the no_grad of sampling
            return heun_follow(
                self._eps,
                schedule,
                x_t,
                self.nfe,
                clip=self.clip,
                t_start=self.t_star,
                noise=lambda i: noise(1 + 2 * i, x0),
                **EDM[sampler],
            )
        diffused = None

        def on_step(i, t, x):
            nonlocal diffused
            t = torch.full((len(x),), t, device=x.device)
            if sampler == "vp-sde-corrector":
                z, abar = noise(2 + 2 * i, x), schedule.at(schedule.alphas_bar, t)
                score = -self._eps(x, t).to(x.dtype) / like((1 - abar).sqrt(), x)
                ratio = z.flatten(1).norm(dim=1) / score.flatten(1).norm(dim=1)
                size = (
                    2 * (abar / schedule.at(schedule.alphas_bar_prev, t)) * (self.snr * ratio) ** 2
                )
                x = x + like(size, x) * score + like((2 * size).sqrt(), x) * z
            elif sampler in ("gdmp-mse", "gdmp-ssim"):
                diffused = schedule.q_sample(given, t, noise(2 + 2 * i, x))
            return x

        def step(x, eps, z, abar, abar_prev):
            if sampler == "ddim":
                return ddim_step(x, eps, z, abar, abar_prev, 0.0, self.clip)
            if sampler.startswith("vp-sde"):
                return vp_sde_step(x, eps, z, abar, abar_prev)
            after = ddpm_step(x, eps, z, abar, abar_prev, self.clip, self.variance)
            if diffused is None:
                return after
            var = ddpm_variance(abar, abar_prev, self.variance)
            pull = (
                self.scale * ((1 - abar) / abar).sqrt() * var
            )  # GDMP: the step's variance times its s_t
            return after + like(pull, x) * guidance(x, diffused, sampler[5:])

        return samplers.follow(
            self._eps, schedule, x_t, self.pairs, step, lambda i: noise(1 + 2 * i, x0), on_step
        )


# ---------------------------------------------------------------------------------------------------------------------
# the attack


def noises(knowledge, seed, index, k, eot=1):
    """The draws, known or fresh, over which step k of the attack averages; the evaluation's first is draw 0."""
    if knowledge in ("both", "no noise"):
        return [image_draws(seed, index)]
    if knowledge.startswith("semi-"):
        return [image_draws(seed, index, j) for j in range(int(knowledge[5:]))]
    return [
        image_draws(seed, index, UNSEEN + k * eot + j, 0 if knowledge == "fwd" else None)
        for j in range(eot)
    ]


def over_draws(quantity, net, x, y, draws, eot_batch=1):
    """quantity(net, x, y, noise) -> (B, ..), averaged over `draws`, of which eot_batch are evaluated in one larger batch."""
    total, draws = 0, list(draws)
    for group, count in sample.batches(
        draws, eot_batch, sample.is_compiled(getattr(net, "model", None))
    ):
        values = quantity(
            net, torch.cat([x.detach()] * len(group)), y.repeat(len(group)), together(group)
        )
        total = total + values.unflatten(0, (len(group), len(x)))[:count].sum(0)
    return total / len(draws)


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


def mean_loss(net, x, y, draws, gradient=False, eot_batch=1):
    """Cross-entropy (B,), or its gradient in x, averaged over draws."""
    return over_draws(gradient_of if gradient else loss_of, net, x, y, draws, eot_batch)


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


def pgd(net, x, y, draws, norm="linf", steps=20, eot_batch=1):
    """PGD from a zero start; draws(k): the noises of step k, draws(steps) those of the check -> x_adv, checks {name: (B,)}."""
    delta, bad, zero = torch.zeros_like(x), 0, 0
    for k in range(steps):
        grad = mean_loss(net, x + delta, y, draws(k), gradient=True, eot_batch=eot_batch)
        bad = bad + (~grad.isfinite()).flatten(1).any(1).double()
        grad = grad.nan_to_num(0, 0, 0)
        zero = zero + (grad == 0).flatten(1).all(1).double() / steps
        delta = ascend(x, delta, grad, norm)
    size = delta.flatten(1).norm(dim=1, p=float("inf") if norm == "linf" else 2)
    outside = (size > NORMS[norm][0] * (1 + 1e-4)) | (
        (x + delta - 0.5).abs().flatten(1).amax(1) > 0.5 + 1e-6
    )
    start, end = (mean_loss(net, a, y, draws(steps), eot_batch=eot_batch) for a in (x, x + delta))
    checks = dict(
        outside=outside,
        nonfinite=bad,
        zero=zero,
        rises=(end > start).double(),
        start=start,
        end=end,
    )
    return (x + delta).clamp(0, 1), checks


def clopper_pearson(k, n, level=0.95):
    """Exact confidence interval of a share k / n; k need not be whole."""
    a = (1 - level) / 2
    low = beta_distribution.ppf(a, k, n - k + 1) if k > 0 else 0.0
    return float(low), float(beta_distribution.ppf(1 - a, k + 1, n - k) if k < n else 1.0)


def correct(net, x, y, seed, index, knowledge, draws, eot_batch=1):
    """Share of the draws, numbered as the knowledge allows, with which each image is classified correctly, (B,)."""
    forward = 0 if knowledge == "fwd" else None
    return over_draws(
        hit_of, net, x, y, [image_draws(seed, index, d, forward) for d in draws], eot_batch
    )


def evaluate(net, x, y, index, args, knowledge, norm):
    """Attack a batch -> {name: (B,)}: right after the attack, over --evaluations, and the checks."""
    x_adv, row = pgd(
        net,
        x,
        y,
        lambda k: noises(knowledge, args.seed, index, k, args.eot),
        norm,
        args.pgd,
        args.eot_batch,
    )
    row["robust"] = correct(net, x_adv, y, args.seed, index, knowledge, [0])
    if args.evaluations > 1:
        known = (
            1
            if knowledge in ("both", "no noise")
            else int(knowledge[5:])
            if knowledge.startswith("semi-")
            else None
        )
        judges = range(min(args.evaluations, known or args.evaluations))
        choosers = judges if known else range(2 * UNSEEN, 2 * UNSEEN + args.evaluations)
        keep = [
            correct(net, a, y, args.seed, index, knowledge, choosers, args.eot_batch)
            for a in (x_adv, x)
        ]
        x_adv = torch.where(like(keep[1] < keep[0], x) > 0, x, x_adv)
        row["selected"] = correct(
            net, x_adv, y, args.seed, index, knowledge, judges, args.eot_batch
        )
    return row


def summarise(rows):
    """{name: (n,)} of an attack -> robust accuracy, its interval, the checks, `violated` among them."""
    n = len(rows["robust"])
    d = {}
    for key in (
        "robust",
        "selected",
    ):  # the latter are shares, which vary less than a coin of that mean: a safe interval
        if key in rows:
            d |= {
                key: rows[key].mean().item(),
                key + "_ci": clopper_pearson(rows[key].sum().item(), n),
            }
    d |= dict(
        outside=int(rows["outside"].sum()),
        nonfinite=int((rows["nonfinite"] > 0).sum()),
        zero=rows["zero"].mean().item(),
        rises=rows["rises"].mean().item(),
        loss_start=rows["start"].mean().item(),
        loss_end=rows["end"].mean().item(),
    )
    d["violated"] = [
        line
        for ok, line in (
            (d["outside"] == 0, f"ball: {d['outside']} images exceed the radius or [0, 1]"),
            (d["nonfinite"] == 0, f"gradient: NaN or infinite for {d['nonfinite']} images"),
            (d["zero"] == 0, f"gradient: exactly 0 in {d['zero']:.2%} of (image, step)"),
            (
                d["rises"] >= 0.9,
                f"loss: above that of the start on only {d['rises']:.0%} of the images",
            ),
        )
        if not ok
    ]
    return d


# ---------------------------------------------------------------------------------------------------------------------
# the experiment


def first_images(name, size, n, root):
    """x (n, 3, S, S) in [0, 1], labels (n,): the first n of the test split; of a folder, sorted by class, n spread evenly."""
    images, labels = load_images(name, size, "test", root, labels_needed=True)
    if n > len(images):
        raise ValueError(f"--n {n}: --data {name} has {len(images)} images")
    rows = np.arange(n) * len(images) // n if name.startswith("folder:") else np.arange(n)
    return torch.from_numpy(images[rows]).permute(0, 3, 1, 2).float() / 255, torch.as_tensor(
        labels
    )[torch.from_numpy(rows)]


def load_network(path, args, device):
    """The network of a checkpoint, compiled if asked for, and its image size. Without CUDA graphs, which would write one call's
    output over another's: an attack needs those of all steps until its gradient is there.
    """
    load = argparse.Namespace(raw=args.raw, compile=False, image_size=None, amp=args.amp)
    model, size, _ = sample.load_model(path, load, device)
    compiled = device.type == "cuda" if args.compile is None else args.compile
    return torch.compile(model, dynamic=False) if compiled else model, size


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ckpt", required=True, nargs="+", help="checkpoints of train.py, or diffusers folders")
    add("--classifier", required=True, metavar="PATH", help="a checkpoint of classifier.py")
    add(
        "--data",
        required=True,
        metavar="NAME",
        help=f"its test split (a folder has none: all of it); {NAMES}",
    )
    add("--data-root", default="data")
    add("--n", type=int, default=64, help="test images; P2: 1024")
    add("--purifier", nargs="+", choices=SAMPLERS, default=["none", "ddpm"])
    add("--knowledge", nargs="+", default=["white", "both"], help="white | fwd | both | semi-N")
    add(
        "--norm",
        nargs="+",
        choices=NORMS,
        default=["linf"],
        help="l_inf 8/255 in steps of 2/255, l_2 0.5 in steps of 0.1",
    )
    add("--pgd", type=int, default=20, metavar="K", help="steps of the attack")
    add(
        "--eot",
        type=int,
        default=10,
        metavar="N",
        help="draws averaged in each, under white and fwd",
    )
    add(
        "--evaluations",
        type=int,
        default=1,
        metavar="M",
        help="purifications that choose the candidate, and that judge it",
    )
    add(
        "--t-star",
        type=int,
        help="t to which images are diffused; default: 100, EDM sigma = 0.5, GDMP 36",
    )
    add("--nfe", type=int, help="steps back; default: t*, EDM 50")
    add(
        "--figures",
        type=int,
        default=0,
        metavar="N",
        help="figures.png of the first batch and purifier, EoT up to N draws",
    )
    add(
        "--variance",
        choices=["fixed-large", "fixed-small"],
        default="fixed-large",
        help="ddpm, gdmp: s_t^2 of Eq. 5",
    )
    add("--no-clip", action="store_true", help="do not clip x^_0 to [-1, 1]")
    add("--raw", action="store_true", help="raw instead of EMA weights")
    add("--batch-size", type=int, default=64, help="changes memory and speed, not the images")
    add("--seed", type=int, default=0)
    add(
        "--eot-batch",
        type=int,
        default=1,
        metavar="D",
        help="draws in one network call, which then holds D times the images",
    )
    add("--device", default="auto", help="auto | cpu | cuda | cuda:N")
    add("--amp", choices=["auto", "bf16", "fp16", "fp32"], default="auto")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default: on a GPU")
    add("--out", default="purify")
    args, started = parser.parse_args(), time.time()
    for name in ("n", "pgd", "eot", "eot_batch", "evaluations", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1"
            )
    for name in args.knowledge:
        if name not in ("white", "fwd", "both") and not (
            name.startswith("semi-") and name[5:].isdecimal() and int(name[5:])
        ):
            raise ValueError(f"--knowledge {name}: need white, fwd, both or semi-N with N >= 1")
    if args.figures < 0 or (args.figures and set(args.purifier) == {"none"}):
        raise ValueError(f"--figures {args.figures}: needs N >= 1 and a purifier other than none")
    options = dict(t_star=args.t_star, nfe=args.nfe, clip=not args.no_clip, variance=args.variance)
    for sampler in args.purifier:  # all refused before any is run
        PurifiedClassifier(nn.Identity(), NoiseSchedule(), nn.Identity(), sampler, **options)
    device, rank, world = runtime.setup(args.device)
    if args.n < world:
        raise ValueError(f"--n {args.n}: fewer than the {world} processes")
    cast = runtime.autocast(device, args.amp)
    classifier = load_classifier(args.classifier, device, args.compile)
    names = [sample.folder_name(c) for c in args.ckpt]
    if len(set(names)) < len(names):
        raise ValueError(
            f"--ckpt: two checkpoints lie in a folder {max(names, key=names.count)}; rename one's"
        )
    models = {name: load_network(path, args, device) for name, path in zip(names, args.ckpt)}
    local = int(os.environ.get("LOCAL_RANK", 0))
    if world > 1 and local > 0:
        dist.barrier()  # one process of each machine decodes the images first
    data = {
        size: first_images(args.data, size, args.n, args.data_root)
        for size in {size for _, size in models.values()}
    }
    if world > 1 and local == 0:
        dist.barrier()
    most, classes = max(int(y.max()) for _, y in data.values()), classifier.config["classes"]
    if most >= classes:
        raise ValueError(
            f"--classifier {args.classifier}: knows {classes} classes, but --data {args.data} has label {most}"
        )
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    runs = [
        (name, sampler, knowledge, norm)
        for name in names
        for sampler in args.purifier
        for norm in args.norm
        for knowledge in (args.knowledge if sampler != "none" else ["no noise"])
    ]
    record, mine = [], list(range(args.n))[rank::world]
    schedule = NoiseSchedule().to(device)
    with tqdm(total=len(mine) * len(runs), desc="attack", unit="img", disable=rank > 0) as bar:
        for name, sampler, knowledge, norm in runs:
            model, size = models[name]
            net = PurifiedClassifier(
                model, schedule, classifier, sampler, check_range=False, **options
            )  # `ascend` clamps
            (x, y), parts, began = data[size], [], time.time()
            for numbers, count in sample.batches(mine, args.batch_size, sample.is_compiled(model)):
                batch = x[numbers].to(device), y[numbers].to(device)
                index = torch.tensor(numbers, device=device)
                with cast:
                    row = evaluate(net, *batch, index, args, knowledge, norm)
                    row["clean"] = correct(net, *batch, args.seed, index, knowledge, [0])
                parts.append({k: v[:count] for k, v in row.items()})
                bar.update(count)
            rows = {k: torch.zeros(args.n, dtype=torch.float64) for k in parts[0]}
            for k, v in rows.items():
                v[mine] = torch.cat([p[k].double().cpu() for p in parts])
                if world > 1:  # every row is written by one process; the others hold zeros
                    dist.all_reduce(v)
            clean = int(rows["clean"].sum())
            record.append(
                dict(
                    checkpoint=name,
                    purifier=sampler,
                    knowledge=knowledge,
                    norm=norm,
                    calls=net.calls,
                    clean=clean / args.n,
                    clean_ci=clopper_pearson(clean, args.n),
                )
                | summarise(rows)
                | dict(seconds=time.time() - began)
            )
            for line in record[-1]["violated"] if rank == 0 else ():
                tqdm.write(
                    f"CHECK VIOLATED: {name}, {sampler}, {knowledge}, {norm}: {line}",
                    file=sys.stderr,
                )
            if rank == 0:
                write_tables(
                    record, args, out
                )  # after each: a kill loses the attack that runs, no other
    if rank == 0:
        plot(record, args, out / "purify.png")
        curves = {}
        if args.figures:
            sampler = next(s for s in args.purifier if s != "none")
            for name, (model, size) in models.items():
                x, y = (a[: args.batch_size].to(device) for a in data[size])
                net = PurifiedClassifier(model, schedule, classifier, sampler, **options)
                with cast:
                    curves[name] = directions(net, x, y, args.seed, args.figures, args.eot_batch)
            plot_directions(curves, sampler, args, out / "figures.png")
        runtime.write_metrics(
            out,
            started,
            seed=args.seed,
            device=device,
            n=args.n,
            pgd=args.pgd,
            eot=args.eot,
            world=world,
            data=args.data,
            classifier=args.classifier,
            evaluations=args.evaluations,
            **options,
            runs=record,
            directions=curves,
            violated=sum(len(d["violated"]) for d in record),
        )
        print(
            (out / "table.md").read_text()
            + f"-> {out}/purify.png, table.csv, table.md, metrics.json"
        )
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def write_tables(record, args, out):
    """table.csv: one line per attack; table.md, like P2's: one row per checkpoint and purifier, percent with 95 % intervals."""
    columns = list(record[0])
    lines = [
        [
            f"{v:.4g}"
            if isinstance(v, float)
            else "..".join(f"{a:.4f}" for a in v)
            if isinstance(v, tuple)
            else str(len(v) if isinstance(v, list) else v)
            for v in (d[k] for k in columns)
        ]
        for d in record
    ]
    (out / "table.csv").write_text("\n".join(",".join(line) for line in [columns, *lines]) + "\n")

    def percent(d, key):
        return f"{100 * d[key]:.1f} ({100 * d[key + '_ci'][0]:.1f}–{100 * d[key + '_ci'][1]:.1f})"

    several = ["robust"] + ["selected"] * ("selected" in record[0])
    columns = [(norm, k, key) for norm in args.norm for k in args.knowledge for key in several]
    heads = [f"{norm} {k}" + ", chosen" * (key == "selected") for norm, k, key in columns]
    rows = [
        "| checkpoint | purifier | calls | clean | " + " | ".join(heads) + " |",
        "|---" * (4 + len(heads)) + "|",
    ]
    for name, sampler in dict.fromkeys((d["checkpoint"], d["purifier"]) for d in record):
        ds = [d for d in record if (d["checkpoint"], d["purifier"]) == (name, sampler)]
        cells = [
            percent(d, key)
            for norm, k, key in columns
            for d in ds
            if d["norm"] == norm and d["knowledge"] in (k, "no noise")
        ]
        rows.append(
            f"| {name} | {sampler} | {ds[0]['calls']} | {percent(ds[0], 'clean')} | "
            + " | ".join(cells)
            + " |"
        )
    (out / "table.md").write_text("\n".join(rows) + "\n")


def plot(record, args, path):
    """One panel per checkpoint: robust accuracy by purifier and knowledge, with 95 % intervals; clean accuracy as a diamond."""
    names, kinds = (
        list(dict.fromkeys(f(d) for d in record))
        for f in (lambda d: d["checkpoint"], lambda d: f"{d['knowledge']}, {d['norm']}")
    )
    fig, axes = plt.subplots(
        1,
        len(names),
        figsize=(max(4.5 * len(names), 6), 3.8),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for ax, name in zip(axes[0], names):
        for i, sampler in enumerate(args.purifier):
            ds = [d for d in record if (d["checkpoint"], d["purifier"]) == (name, sampler)]
            for j, d in enumerate(ds):
                kind = kinds.index(f"{d['knowledge']}, {d['norm']}")
                at, error = (
                    i + (j - (len(ds) - 1) / 2) * 0.8 / len(kinds),
                    np.abs(np.array(d["robust_ci"]) - d["robust"]),
                )
                ax.bar(
                    at,
                    100 * d["robust"],
                    0.75 / len(kinds),
                    color=COLOURS[kind % 6],
                    yerr=100 * error[:, None],
                    capsize=2,
                )
            ax.errorbar(
                i,
                100 * ds[0]["clean"],
                100 * np.abs(np.array(ds[0]["clean_ci"]) - ds[0]["clean"])[:, None],
                fmt="kD",
                markersize=5,
                capsize=3,
            )
        ax.set(
            title=name, xticks=range(len(args.purifier)), xticklabels=args.purifier, ylim=(0, 100)
        )
        ax.tick_params(axis="x", rotation=20 if len(args.purifier) > 3 else 0)
        ax.grid(alpha=0.3, axis="y")
    axes[0, 0].set_ylabel("accuracy (%), 95 % interval")
    handles = [plt.Line2D([], [], color="k", marker="D", ls="", label="clean")]
    handles += [
        plt.Rectangle((0, 0), 1, 1, color=COLOURS[k % 6], label=kind)
        for k, kind in enumerate(kinds)
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    fig.suptitle(f"Purification under PGD-{args.pgd}, EoT-{args.eot}, n = {args.n}", fontsize=11)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def directions(net, x, y, seed, most, eot_batch=1):
    """P2 Fig. 7: cosine of the White-box EoT gradient with the DW_Both gradient at x; Fig. 8: loss at x + k / 255 sign(..)."""
    index = torch.arange(len(x), device=x.device)
    known, semi = noises("both", seed, index, 0), noises(f"semi-{most}", seed, index, 0)
    best, total, cosine = mean_loss(net, x, y, known, gradient=True), 0, {}
    for j, noise in enumerate(
        tqdm(noises("white", seed, index, 0, most), desc="figures", unit="draw"), start=1
    ):
        total = total + mean_loss(net, x, y, [noise], gradient=True)
        if j & (j - 1) == 0 or j == most:
            cosine[j] = F.cosine_similarity(total.flatten(1), best.flatten(1)).mean().item()
    common = mean_loss(net, x, y, semi, True, eot_batch)
    signs = 1 - 2 * (image_draws(seed, index, 3 * UNSEEN)(0, x) < 0).to(x.dtype)
    ks, curves = [-16, -12, -8, -4, -2, 0, 2, 4, 8, 12, 16], {}
    for label, way, draws in (
        ("all noise known (DW)", best, known),
        (f"{most} draws known (semi)", common, semi),
        (f"White-box EoT-{most}", total, known),
        ("random signs", signs, known),
    ):
        curves[label] = [
            mean_loss(net, (x + k / 255 * way.sign()).clamp(0, 1), y, draws, False, eot_batch)
            .mean()
            .item()
            for k in ks
        ]
    return dict(cosine=cosine, k=ks, loss=curves)


def plot_directions(curves, sampler, args, path):
    fig, axes = plt.subplots(
        1, 1 + len(curves), figsize=(4.2 * (1 + len(curves)), 3.8), layout="constrained"
    )
    for (name, c), colour, marker in zip(
        curves.items(), COLOURS * len(curves), "osD^v<>" * len(curves)
    ):
        axes[0].plot(
            list(c["cosine"]), list(c["cosine"].values()), marker=marker, color=colour, label=name
        )
    axes[0].set(
        xlabel="EoT draws",
        ylabel="cosine with the all-noise-known gradient",
        title=f"Attack direction, {sampler}",
    )
    axes[0].set_xscale("log", base=2)
    axes[0].xaxis.set_major_formatter("{x:g}")
    axes[0].set_ylim(bottom=0)
    for ax, (name, c) in zip(axes[1:], curves.items()):
        for (label, values), colour, marker in zip(c["loss"].items(), COLOURS, "osD^"):
            ax.plot(c["k"], values, marker=marker, markersize=4, color=colour, label=label)
        ax.set(
            xlabel="k, in x + k/255 sign(direction)",
            ylabel="cross-entropy",
            title=f"Loss along it, {name}",
        )
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    fig.savefig(path, dpi=120)
    plt.close(fig)


if __name__ == "__main__":
    runtime.cli(main)
