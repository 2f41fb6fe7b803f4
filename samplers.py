"""DDPM, DDIM and EDM's Heun sampler: x_T ~ N(0, I) of shape (B, ..) -> x_0 of the same shape.

    x0 = ddpm_sample(model, schedule, torch.randn(64, 3, 32, 32))
    x0 = ddim_sample(model, schedule, x_T, steps=50, rederive=True)  # as the command line does

A model is any callable (x_t, t) -> eps, t (B,) integers; EDM's sampler asks one that has the
attribute real_t = True, as UNet, for t between them. `schedule` is a losses.NoiseSchedule. In the
steps, abar and abar_prev are (B,) float64 with abar < abar_prev <= 1. A new sampler is a function
and a row of SAMPLERS.
"""

import functools

import numpy as np
import torch

from losses import like, posterior_mean, predict_x0

# --------------------------------------------------------------------------------------------------
# one step of each


def clipped(x0, clip):
    """x^_0 cut to [-clip, clip]; True is 1, False leaves it."""
    return x0.clamp(-float(clip), float(clip)) if clip else x0


def ddpm_variance(abar, abar_prev, variance):
    """s_t^2 of Eq. 5: beta_t ("fixed-large"), or beta~_t ("fixed-small"), that of q(x_{t-1} | x_t,
    x_0).
    """
    beta = 1 - abar / abar_prev
    if variance == "fixed-large":
        return beta
    if variance == "fixed-small":
        return beta * (1 - abar_prev) / (1 - abar)
    raise ValueError(f"--variance {variance}: need fixed-large or fixed-small")


def ddpm_step(x_t, eps, z, abar, abar_prev, clip=True, variance="fixed-large"):
    """x_{t-1} = mu~(x_t, x^_0) + s_t z, which without clipping is Eq. 5; z is ignored where
    abar_prev = 1.
    """
    x0 = predict_x0(x_t, eps, abar)
    mean = posterior_mean(clipped(x0, clip), x_t, abar, abar_prev)
    var = ddpm_variance(abar, abar_prev, variance)
    return mean + like((var * (abar_prev < 1)).sqrt(), x_t) * z


def ddim_step(x_t, eps, z, abar, abar_prev, eta=0.0, clip=True, rederive=False):
    """DDIM, Eq. 12 of Song et al. (2021); eta = 0 is deterministic.

    rederive: eps becomes the noise between x_t and the clipped x^_0 (Dhariwal & Nichol, 2021).
    Without it, clipping at large t shrinks what x_t and x^_0 share by the network's gain at every
    step.
    """
    std = eta * ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)).sqrt()
    x0 = clipped(predict_x0(x_t, eps, abar), clip)
    if rederive:
        eps = (x_t - like(abar.sqrt(), x_t) * x0) / like((1 - abar).sqrt(), x_t)
    mean = like(abar_prev.sqrt(), x_t) * x0 + like((1 - abar_prev - std**2).sqrt(), x_t) * eps
    return mean + like(std, x_t) * z


def heun_slope(x, eps, sigma, clip):
    """dx/dsigma = (x - D(x; sigma)) / sigma with D = x - sigma eps (Karras et al., 2022, Eq. 3)."""
    if not clip:
        return eps.to(x.dtype)
    return (x - clipped(x - sigma * eps.to(x.dtype), clip)) / sigma


def heun_predict(x, eps, sigma, sigma_next, clip=True):
    """Euler's step from sigma to sigma_next -> (x_next, its slope)."""
    d = heun_slope(x, eps, sigma, clip)
    return x + (sigma_next - sigma) * d, d


def heun_correct(x, x_next, d, eps_next, sigma, sigma_next, clip=True):
    """The same step with the mean of the slopes at both ends."""
    d = (d + heun_slope(x_next, eps_next, sigma_next, clip)) / 2
    return x + (sigma_next - sigma) * d


# --------------------------------------------------------------------------------------------------
# which t


def ddpm_timesteps(T, steps=None, spacing="respaced"):
    """Pairs (t, t_prev), from noise to data; t_prev = -1 stands for x_0. steps: None for all T.

    respaced   evenly spaced t, betas re-derived between neighbours (Nichol & Dhariwal, 2021)
    naive      the same t, each step as if from t to t - 1 (Eq. 5 with a subset of the steps)
    truncated  t = steps-1 .. 0, started from N(0, I)
    """
    steps = T if steps is None else steps
    if not 1 <= steps <= T:
        raise ValueError(f"--steps {steps}: must lie in 1..{T}")
    if spacing not in ("respaced", "naive", "truncated"):
        raise ValueError(f"--spacing {spacing}: need respaced, naive or truncated")
    if spacing == "truncated":
        ts = list(range(steps))[::-1]
    else:
        ts = np.linspace(T - 1, 0, steps).round().astype(int).tolist()
    after = ts[1:] if spacing == "respaced" else [t - 1 for t in ts[:-1]]
    return list(zip(ts, after + [-1]))


def ddim_timesteps(T, steps=100):
    """Pairs (t, t_prev) at t = floor(i T / steps), DDIM's linear choice; t_prev = -1 stands for
    x_0.
    """
    if not 1 <= steps <= T:
        raise ValueError(f"--steps {steps}: must lie in 1..{T}")
    ts = [i * T // steps for i in range(steps)][::-1]
    return list(zip(ts, ts[1:] + [-1]))


def heun_levels(schedule, steps=18, sigma_max=None, real_t=True, sigma_min=0.002, rho=7.0):
    """EDM's noise levels, from sigma_max (default: the schedule's largest) to sigma_min (Karras et
    al., 2022, Eq. 5) -> `steps` numbers.

    For a network of integer t rounded to the schedule's and none below its smallest, which merges
    some, as round_sigma and sigma_min of EDM's code do for such a network.
    """
    if not 1 <= steps <= schedule.T:
        raise ValueError(f"heun: need --steps in 1..{schedule.T} (got {steps})")
    high = (sigma_max or schedule.sigmas[-1]) ** (1 / rho)
    low = (sigma_min if real_t else schedule.sigmas[0]) ** (1 / rho)
    levels = ((high + np.linspace(0, 1, steps) * (low - high)) ** rho).tolist()
    levels = {round_sigma(schedule, sigma, real_t) for sigma in levels}
    return sorted(levels, reverse=True)


def round_sigma(schedule, sigma, real_t):
    """sigma, or the schedule's level next to it for a network of integer t."""
    return sigma if real_t else min(schedule.sigmas, key=lambda level: abs(level - sigma))


def time_of(schedule, sigma):
    """The real t whose noise level is sigma: linear in log(1 + sigma^2) = -log abar between the
    schedule's steps.

    So beta is constant within a step, and in this variable EDM's VP wrapper solves for t. Below the
    smallest level, .01 at t = 0, it falls to -1 at sigma = 0; above the largest it is T - 1.
    """
    table = np.log1p(np.square([0, *schedule.sigmas]))
    return float(np.interp(np.log1p(sigma**2), table, np.arange(-1, schedule.T)))


def level_of(levels, t):
    """log(1 + sigma^2) at t (B,), integer or real > -1: the inverse of time_of -> (B,) float64.

    levels: those of sigma = 0 and of the schedule's steps, (T + 1,) float64 on t's device.
    """
    i = t.double() + 1
    k = i.floor().long().clamp(max=len(levels) - 2)
    return levels[k] + (i - k) * (levels[k + 1] - levels[k])


def from_denoiser(denoiser, schedule):
    """The eps-network of a denoiser D: (x_0 + sigma N(0, I), sigma (B,)) -> x_0, as EDM's are.

    eps = (x - D(x; sigma)) / sigma at x = x_t / sqrt(abar_t), for integer and real t > -1 (see
    time_of).
    """
    sigmas = torch.tensor([0, *schedule.sigmas], dtype=torch.float64)
    levels = sigmas.square().log1p()

    def model(x_t, t):
        level = level_of(levels.to(t.device), t)
        sigma = level.expm1().sqrt()
        x = like((level / 2).exp(), x_t) * x_t
        return (x - denoiser(x, sigma.to(x.dtype))) / like(sigma, x)

    model.real_t = True
    model.t_min = -1
    return model


# --------------------------------------------------------------------------------------------------
# samplers. noise(i): the z of step i, by default from the global generator. compiled: what follows
# the network, noise(i) with a tensor i included, is one compiled graph (worth it on a GPU)


def advance(step, noise, i, x, eps, abars, ts, ts_prev):
    """x_{t-1} = step(x_t, eps, z, abar_t, abar_t_prev), z = noise(i); ts, ts_prev (B,), abars at
    index t + 1.
    """
    z = torch.randn_like(x) if noise is None else noise(i)
    return step(x, eps.to(x.dtype), z, abars[ts + 1], abars[ts_prev + 1])


def follow(model, schedule, x_T, pairs, step, noise=None, on_step=None, compiled=False):
    """x <- step(x, eps_theta(x, t), z, abar_t, abar_t_prev) over all pairs (t, t_prev); keeps
    gradients.
    """
    abars = schedule.levels(x_T.device)
    update = torch.compile(advance, dynamic=False) if compiled else advance
    x = x_T
    for i, (t, t_prev) in enumerate(pairs):
        ts = torch.full((len(x),), t, device=x.device)
        if on_step is not None:
            x = on_step(i, t, x)
        if compiled:  # as a tensor, since a compiled graph belongs to the values of its integers
            i = torch.full((), i, device=x.device)
        x = update(step, noise, i, x, model(x, ts), abars, ts, torch.full_like(ts, t_prev))
    return x


@torch.no_grad()
def ddpm_sample(
    model, schedule, x_T, steps=None, spacing="respaced", clip=True, variance="fixed-large",
    noise=None, on_step=None, compiled=False,
):  # fmt: skip
    """Ancestral sampling (Eq. 5). steps, spacing: see ddpm_timesteps; variance: see ddpm_variance.

    clip: x^_0 to [-1, 1] (images), to [-clip, clip] for a number, False: not at all.
    on_step(i, t, x_t) -> x_t is called before the network at every step, to record or to perturb.
    """
    step = functools.partial(ddpm_step, clip=clip, variance=variance)
    pairs = ddpm_timesteps(schedule.T, steps, spacing)
    return follow(model, schedule, x_T, pairs, step, noise, on_step, compiled)


@torch.no_grad()
def ddim_sample(
    model, schedule, x_T, steps=100, eta=0.0, clip=True, rederive=False,
    noise=None, on_step=None, compiled=False,
):  # fmt: skip
    """DDIM (Song et al., 2021); eta = 0 uses no noise. rederive: see ddim_step. The rest as
    ddpm_sample.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"--eta {eta}: must lie in [0, 1]")
    step = functools.partial(ddim_step, eta=eta, clip=clip, rederive=rederive)
    pairs = ddim_timesteps(schedule.T, steps)
    return follow(model, schedule, x_T, pairs, step, noise if eta else no_noise, on_step, compiled)


def no_noise(i):
    return 0.0


def heun_follow(
    model, schedule, x_T, steps=18, S_churn=0.0, S_min=0.0, S_max=float("inf"), S_noise=1.0,
    clip=True, t_start=None, noise=None, compiled=False, real_t=None,
):  # fmt: skip
    """edm_follow between VP samples: x_T at t_start (default T - 1) -> x_0; keeps gradients."""
    t_start = schedule.T - 1 if t_start is None else t_start
    if not 0 <= t_start < schedule.T:
        raise ValueError(f"heun: need t_start in 0..{schedule.T - 1} (got {t_start})")
    sigma = schedule.sigmas[t_start]
    x = x_T * (1 + sigma**2) ** 0.5  # VP -> EDM: x / sqrt(abar) at sigma = sqrt((1 - abar) / abar)
    return edm_follow(
        model, schedule, x, sigma, steps, S_churn, S_min, S_max, S_noise, clip, noise, compiled,
        real_t,
    )  # fmt: skip


def edm_follow(
    model, schedule, x, sigma_max, steps=18, S_churn=0.0, S_min=0.0, S_max=float("inf"),
    S_noise=1.0, clip=True, noise=None, compiled=False, real_t=None, t_min=None,
):  # fmt: skip
    """EDM's Algorithm 2 (Karras et al., 2022) on an eps-network, from x = x_0 + sigma_max N(0, I)
    -> x_0, with 2 steps - 1 network calls; keeps gradients.

    The network is called with x / sqrt(1 + sigma^2) and t = time_of(sigma). S_churn > 0 adds noise
    within [S_min, S_max]. real_t: whether the network takes real t; default: whether it says so, as
    UNet does. Other networks are called at the schedule's levels (see heun_levels) and integer t.
    t_min: the smallest t that the network is asked for, in place of those below; default: what it
    says (from_denoiser -1), else 0, since no network was trained below.
    """
    if not 0 <= S_churn < float("inf"):
        raise ValueError(f"--s-churn {S_churn}: must be finite and at least 0")
    if real_t is None:
        real_t = getattr(model, "real_t", False)
    if t_min is None:
        t_min = getattr(model, "t_min", 0)
    predict, correct = heun_predict, heun_correct
    if compiled:
        predict = torch.compile(heun_predict, dynamic=False)
        correct = torch.compile(heun_correct, dynamic=False)

    def eps(x, sigma):
        t = max(time_of(schedule, sigma), t_min)
        t = x.new_full((len(x),), t) if real_t else torch.full((len(x),), round(t), device=x.device)
        answer = model(x / (1 + sigma**2) ** 0.5, t)
        # a CUDA graph writes its next output over this one
        return answer.clone() if compiled and not clip else answer

    sigmas = heun_levels(schedule, steps, sigma_max, real_t) + [0.0]
    hats = list(sigmas)
    if S_churn > 0:
        gamma = min(S_churn / steps, 2**0.5 - 1)
        for i, sigma in enumerate(sigmas[:-1]):
            if S_min <= sigma <= S_max:
                hats[i] = round_sigma(schedule, sigma * (1 + gamma), real_t)
    numbers = {sigma: sigma for sigma in hats + sigmas}
    if compiled:  # tensors, since a compiled graph belongs to the values of its numbers
        values = torch.tensor(list(numbers), dtype=torch.float64, device=x.device)
        numbers = dict(zip(numbers, values))
    for i, (sigma, hat, sigma_next) in enumerate(zip(sigmas, hats, sigmas[1:])):
        if hat > sigma:
            z = torch.randn_like(x) if noise is None else noise(i)
            x = x + S_noise * (hat**2 - sigma**2) ** 0.5 * z
        ends = numbers[hat], numbers[sigma_next]
        x_next, d = predict(x, eps(x, hat), *ends, clip)
        if sigma_next > 0:
            x_next = correct(x, x_next, d, eps(x_next, sigma_next), *ends, clip)
        x = x_next
    return x


heun_sample = torch.no_grad()(heun_follow)


SAMPLERS = {  # --sampler: (function, its own flags with their defaults, what it is)
    "ddpm": (
        ddpm_sample,
        dict(steps=None, spacing="respaced", variance="fixed-large"),
        "Eq. 5, variance fixed-large or fixed-small",
    ),
    "ddim": (
        ddim_sample,
        dict(steps=100, eta=0.0, rederive=True),
        "Song et al., 2021; eta 0: no noise; rederive: eps anew from the clipped x^_0",
    ),
    "heun": (
        heun_sample,
        dict(steps=18, S_churn=0.0),
        "EDM, Karras et al., 2022; S_churn: noise added along the way",
    ),
}


def own_flags():
    """{flag: (default, its sampler)} of all samplers, but for steps and spacing, which may be
    lists.
    """
    found = {}
    for sampler, (_, flags, _) in SAMPLERS.items():
        for name, default in flags.items():
            if name not in ("steps", "spacing"):
                found[name] = default, sampler
    return found
