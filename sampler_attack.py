"""An adversarial delta on the steps of a sampler (P1 Algorithm 2, App. A.1); see attack.py.

    hook = Attack(model, schedule, "ddpm", options, index, seed, share=0.5)
    x = generate(model, schedule, index, shape, seed, device, "ddpm", on_step=hook, **options)

On an attacked step, with scale_t = sqrt(beta_t) of that step between its two noise levels (or
beta_t: P1's text says both, its formulas sigma(t) = beta_t),

    x'    = x_t + phi scale_t N(0, I)      the random start
    delta = scale_t sign(grad J(x'));      the sampler goes on from x_t + delta.

J is summed over the elements of a sample. `objective`:

    ldm   J = |eps_theta(x') - eps'|^2, the default: the L_DM whose gradient Algorithm 2 prints.
          eps' is the noise in x' if x^_0(x_t), clipped as the sampler clips it, is the image (ours:
          P1 names none). Where nothing is clipped it is abar / (1 - abar) times the J of x0, hence
          the same attack. Where x^_0 overshoots, J has a gradient at x_t itself, which points the
          same way at every step: of one-step attacks on the networks tried it moves samples of 50
          steps farthest, to black or white.
    x0    J = |q(x') - q(x_t)|^2, q = x^_0, the denoised image (ours). With through = K > 1, for
          DDIM without noise, q is x^_0 at the last of K steps from here, hence the final sample
          where fewer are left. The steps in between are the sampler's own, their clipping included.
    mean  the same with q = the step without its noise: J as P1's App. A.1 prints it. It says little
          about the network: where beta_t is small this is nearly x_t itself, whatever the network,
          and delta little more than the signs of its own random start.
    eps   the same with q = eps_theta, as in Eq. 8 (ours).

At x_t itself the last three have no gradient, hence the random start. q is not clipped: where x^_0
is cut, it would have no gradient either.

Ours too: phi = 1 (P1 gives no value), steps that are projected on the ball of scale_t, and of
several random starts the delta with the largest J, image by image.

The checks are always on: delta in the ball, gradients finite and not 0 (up to 1 in 1,000), a
twentieth of scale_t along the gradient's signs raises J over the start; and J(x_t + delta) above J
of the first start and of |delta| with random signs; each in 90 % of (sample, step). The last two
can fail with a correct gradient, where the attack is no stronger than its start: see same_sign, the
share of delta's signs that are the start's. J is compared on a few attacked steps, as it takes 4
more evaluations.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from losses import NoiseSchedule, frozen, like, predict_x0, scaled_gradient
from rng import noise_on
from samplers import clipped, ddim_step, ddim_timesteps, ddpm_step, ddpm_timesteps

OBJECTIVES = ["ldm", "x0", "mean", "eps"]
COUNTED = (  # per image, summed over its attacked steps
    ["steps", "size", "outside"]  # size: RMS of delta over scale_t; outside: elements beyond it
    + ["nonfinite", "zero"]  # elements of the gradient; share of them
    + ["probes", "ascends", "same_sign", "above_start", "above_random", "J", "J_random"]
)
AT_MOST = {  # a check fails above this number
    "outside_ball": (0, "elements of delta exceed scale_t"),
    "nonfinite_gradients": (0, "elements of the gradient are NaN or infinite"),
    "zero_gradients": (1e-3, "of the gradient's elements are 0"),
    "lost": (0, "samples hold NaN or infinity, shown and scored as 0"),
}
ENOUGH = 0.9  # share of (sample, step) below which a check fails
AT_LEAST = {
    "ascends": "a small step along the gradient's signs raises J",
    "J_above_start": "J is above that of the random start",
    "J_above_random": "J is above that of random signs of equal norm",
}


def attacked_steps(n_steps, share):
    """Indices, 0 the noisiest, of the floor(n_steps share) steps attacked: evenly spaced, the last
    one included."""
    if not 0 <= share <= 1:
        raise ValueError(f"--attacked {share}: a share of the steps must lie in [0, 1]")
    count = [math.floor(i * share + 1e-9) for i in range(n_steps + 1)]  # 100 * 0.29 is 28.999...
    return [i for i in range(n_steps) if count[i + 1] > count[i]]


def sampler_steps(sampler, options, T):
    """-> the pairs (t, t_prev) of ddpm_sample or ddim_sample; its step without noise."""
    if sampler == "ddpm":
        pairs = ddpm_timesteps(T, options["steps"], options["spacing"])
        return pairs, functools.partial(ddpm_step, z=0.0, clip=options["clip"])
    pairs = ddim_timesteps(T, options["steps"])
    settings = {name: options[name] for name in ("eta", "clip", "rederive") if name in options}
    return pairs, functools.partial(ddim_step, z=0.0, **settings)


def check_through(through, objective, sampler, options):
    """Raises ValueError where the gradient cannot go through the next steps."""
    if through < 1:
        raise ValueError(f"--through {through}: must be at least 1")
    if through > 1 and objective != "x0":
        raise ValueError(f"--through {through}: is of --objective x0, not of {objective}")
    if through > 1 and (sampler != "ddim" or options["eta"] > 0):
        raise ValueError(f"--through {through}: needs steps without noise, --sampler ddim --eta 0")


def stream(i, j):
    """The random stream of draw j at step i: above those of sample.generate (0..T), below
    data.CORRUPTION_STREAM."""
    return 2**31 + i * 2**20 + j


@dataclass
class Attack:
    """The hook on_step(i, t, x_t) -> x_t + delta of ddpm_sample and ddim_sample (P1 Algorithm 2).

    sampler, options: of sample.generate, "ddpm" or "ddim"; index (B,): the images' numbers, on
    x_t's device; share: of attacked_steps. kind: "adversarial" or "random", whose delta is scale_t
    times random signs. iters > 1: that many steps of factor scale_t / iters from the start, all in
    the l_inf ball of radius scale_t around x_t. restarts: random starts, of which the best counts.
    through: see the objective x0. probes: attacked steps on which J is compared.
    Leaves counts: {name: (B,) float64}, see COUNTED. An element without a finite gradient is
    counted and not moved. Network calls per attacked step, beside the sampler's: 1 + iters (with
    gradient); restarts = R > 1: 1 + R (iters + 1). through = K: K times as many, and each call with
    gradient twice, as its activations are computed again instead of kept. No graph outlives a step.
    So memory depends neither on T nor, but for a few tensors of x's shape, on K.
    """

    model: Any
    schedule: NoiseSchedule
    sampler: str
    options: dict
    index: torch.Tensor
    seed: int
    share: float = 1.0
    kind: str = "adversarial"
    objective: str = "ldm"
    scale: str = "std"
    phi: float = 1.0
    iters: int = 1
    factor: float = 2.0
    restarts: int = 1
    through: int = 1
    probes: int = 5

    def __post_init__(self):
        if self.objective not in OBJECTIVES:
            raise ValueError(f"--objective {self.objective}: need one of {', '.join(OBJECTIVES)}")
        check_through(self.through, self.objective, self.sampler, self.options)
        self.pairs, self.step = sampler_steps(self.sampler, self.options, self.schedule.T)
        self.steps = attacked_steps(len(self.pairs), self.share)
        spread = np.linspace(0, len(self.steps) - 1, min(self.probes, len(self.steps)))
        self.probed = {self.steps[round(k)] for k in spread}
        self.abars = self.schedule.levels(self.index.device)  # no copies in the loop
        zeros = torch.zeros(len(self.index), dtype=torch.float64, device=self.index.device)
        self.counts = {name: zeros.clone() for name in COUNTED}
        self.noise = noise_on(self.index.device.type)

    def __call__(self, i, t, x_t):
        if i not in self.steps:
            return x_t
        abar, abar_prev = self.levels(i)
        beta = 1 - abar / abar_prev
        scale = like(beta.sqrt() if self.scale == "std" else beta, x_t)
        signs = 1 - 2 * (self.draw(i, 1, x_t) < 0).to(x_t.dtype)
        if self.kind == "random":
            delta = scale * signs
        else:
            with torch.no_grad(), frozen(self.model):
                delta = self.best_delta(i, x_t, scale, signs)
        ratio = (delta / scale).flatten(1)
        outside = (ratio.abs() > 1 + 1e-5).sum(1)
        self.count(steps=1, size=ratio.square().mean(1).sqrt(), outside=outside)
        return x_t + delta

    def levels(self, i):
        """abar and abar_prev of step i, (B,) float64."""
        return [self.abars[t + 1].expand(len(self.index)) for t in self.pairs[i]]

    def draw(self, i, j, x):
        """Draw j of step i, N(0, I) in x's dtype and memory format."""
        number = stream(i, j)
        if x.is_cuda:  # a compiled graph belongs to the values of its integers
            number = torch.full((), number, device=x.device)
        return torch.empty_like(x).copy_(self.noise(self.seed, self.index, number, x.shape[1:]))

    def count(self, **values):
        for name, value in values.items():
            self.counts[name] += value

    def eps(self, i, x):
        """eps_theta of step i, x's shape and dtype."""
        t = torch.full((len(x),), self.pairs[i][0], device=x.device)
        if self.through > 1 and x.requires_grad:
            eps = checkpoint(self.model, x, t, use_reentrant=False, preserve_rng_state=False)
        else:
            eps = self.model(x, t)
        return eps.to(x.dtype).clone()  # a CUDA graph writes its next output over this one

    def x0_ahead(self, i, x):
        """x^_0 at the last of `through` steps of the sampler from x at step i, or of those left."""
        last = min(i + self.through, len(self.pairs)) - 1
        for k in range(i, last):
            abar, abar_prev = self.levels(k)
            x = self.step(x, self.eps(k, x), abar=abar, abar_prev=abar_prev)
        return predict_x0(x, self.eps(last, x), self.levels(last)[0])

    def gap_at(self, i, x_t):
        """-> gap(delta), of x_t's shape, whose squared norm is J: q(x_t + delta) - q(x_t)."""
        abar, abar_prev = self.levels(i)
        if self.objective == "ldm":
            with torch.no_grad():
                image = clipped(predict_x0(x_t, self.eps(i, x_t), abar), self.options["clip"])

            def gap(delta):
                x = x_t + delta
                noise = (x - like(abar.sqrt(), x) * image) / like((1 - abar).sqrt(), x)
                return self.eps(i, x) - noise

            return gap

        def mean(x):
            return self.step(x, self.eps(i, x), abar=abar, abar_prev=abar_prev, clip=False)

        x0 = functools.partial(self.x0_ahead, i)
        eps = functools.partial(self.eps, i)
        q = dict(x0=x0, mean=mean, eps=eps)[self.objective]
        with torch.no_grad():
            target = q(x_t)
        return lambda delta: q(x_t + delta) - target

    def best_delta(self, i, x_t, scale, random_signs):
        """Of the random starts' deltas the one with the largest J, image by image."""
        gap = self.gap_at(i, x_t)
        starts = []
        for j in [0, *range(2, self.restarts + 1)]:  # draw 1: the random signs
            start = self.phi * scale * self.draw(i, j, x_t)
            starts.append(start if self.iters == 1 else start.clamp(-scale, scale))
        deltas, signs = zip(*[self.ascend(gap, start, scale) for start in starts])
        best = deltas[0]
        if self.restarts > 1:
            J = torch.stack([value(gap, delta) for delta in deltas])
            best = torch.stack(deltas)[J.argmax(0), torch.arange(len(x_t), device=x_t.device)]
        if i in self.probed:
            nudged = starts[0] + 0.05 * scale * signs[0]
            self.compare(gap, starts[0], nudged, best, random_signs, scale)
        return best

    def ascend(self, gap, start, scale):
        """-> delta, by one step of FGSM from x_t or projected steps from the start; and the signs
        of the gradient at the start."""
        first = self.gradient_signs(gap, start)
        if self.iters == 1:
            return scale * first, first  # from x_t, not from the start
        step = self.factor * scale / self.iters
        delta = (start + step * first).clamp(-scale, scale)
        for _ in range(1, self.iters):
            signs = self.gradient_signs(gap, delta)
            delta = (delta + step * signs).clamp(-scale, scale)
        return delta, first

    def gradient_signs(self, gap, delta):
        grad = gradient(gap, delta)
        finite = grad.isfinite()
        zero = (grad == 0).flatten(1).double().mean(1) / (self.iters * self.restarts)
        self.count(nonfinite=(~finite).flatten(1).sum(1), zero=zero)
        return grad.sign().where(finite, 0)

    def compare(self, gap, start, nudged, delta, random_signs, scale):
        """Counts where J of delta is above that of the start and of random signs."""
        unit = scale.flatten().square()
        of_start, of_delta = value(gap, start), value(gap, delta)
        of_random = value(gap, delta.abs() * random_signs)
        self.count(
            probes=1,
            ascends=value(gap, nudged) > of_start,
            same_sign=(delta.sign() == start.sign()).flatten(1).double().mean(1),
            above_start=of_delta > of_start,
            above_random=of_delta > of_random,
            J=of_delta / unit,
            J_random=of_random / unit,
        )


def value(gap, delta):
    """J = |gap(delta)|^2 -> (B,)."""
    return gap(delta).square().flatten(1).sum(1)


def gradient(gap, delta):
    """The gradient of J = |gap(delta)|^2 in delta, delta's shape; float16 does not underflow."""
    with torch.enable_grad():
        delta = delta.detach().requires_grad_()
        d = gap(delta)
        return scaled_gradient(d.square().sum(), d, delta)


def summarise(rows):
    """{name: (n,)} of an adversarial sample -> its checks, `violated` among them: what failed.

    rows: COUNTED, and lost: samples that are not finite. rms_delta is in units of scale_t; ascends,
    same_sign, J_above_*: shares of (sample, step); J_over_random: mean J over the mean J of |delta|
    with random signs.
    """
    s = {name: values.sum().item() for name, values in rows.items()}
    steps = max(s["steps"], 1)
    probes = max(s["probes"], 1)
    checks = dict(
        outside_ball=int(s["outside"]),
        rms_delta=s["size"] / steps,
        nonfinite_gradients=int(s["nonfinite"]),
        zero_gradients=s["zero"] / steps,
        probes=int(s["probes"]),
        ascends=s["ascends"] / probes,
        same_sign=s["same_sign"] / probes,
        J_above_start=s["above_start"] / probes,
        J_above_random=s["above_random"] / probes,
        J_over_random=s["J"] / (s["J_random"] or 1),
        lost=int(s["lost"]),
    )
    violated = []
    for name, (most, what) in AT_MOST.items():
        if checks[name] > most:
            violated.append(f"{checks[name]:.4g} {what}")
    for name, what in AT_LEAST.items():
        if checks[name] < ENOUGH:
            violated.append(f"{what} in only {checks[name]:.0%} of {probes:.0f} (sample, step)")
    return checks | dict(violated=violated)
