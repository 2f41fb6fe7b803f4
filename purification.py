"""Purification of images by a diffusion model before they are classified (P2); the attack on both
is in purify_attack.py.

    net = PurifiedClassifier(UNet.load("ckpt.pt"), NoiseSchedule(), classifier, "ddpm", nfe=10)
    logits = net(x)                                        # x in [0, 1]; for any attack library

P2 = "Understanding and Enhancing the Robustness of Diffusion-Based Purification". An image is
diffused to t* (Eq. 2), taken back to 0 by a sampler, and classified; exact gradients flow through
the whole chain (every network call is checkpointed: memory hardly grows with the number of steps).
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import runtime
from losses import like
from rng import noise_on
from samplers import clipped, ddim_step, ddpm_step, ddpm_variance, edm_follow

EDM = {  # P2 App. F
    "edm-ode": {},
    "edm-sde": dict(S_churn=6.0, S_min=0.01, S_max=0.46, S_noise=1.007),
}
GDMP = ["gdmp", "gdmp-mse", "gdmp-ssim"]
NOISELESS = ["ddim", "edm-ode"]  # on the way back: who knows the noise of Eq. 2 knows all
SAMPLERS = ["none", "ddpm", "ddim", "vp-sde", "vp-sde-corrector", "coup", *EDM, *GDMP]
# GDMP's code scales the gradient of the MSE over a batch of 100 CIFAR images by
# 60000 / (16 / 255 / 3); here it is per image.
GUIDANCE = 60_000 / (16 / 255 / 3) * 2 / (100 * 3 * 32 * 32)
ROUND = 4096  # draws reserved for one round of a purification

# --------------------------------------------------------------------------------------------------
# noise


def image_draws(seed, index, draw=0, forward=None):
    """noise(k, x) -> the k-th N(0, I) of a purification, x's shape; row i is a function of
    (seed, index[i], draw, k) alone.

    index (B,): on x's device, or else every call copies it there. forward: another draw, from which
    the noise of Eq. 2 (k = 0 of a round) is taken.
    """

    def number(value, x):  # as a tensor, filled in on the device; of a seed its lower 64 bits count
        return torch.full((), (value + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=x.device)

    def noise(k, x):
        if len(index) != len(x):
            raise ValueError(
                f"known noise of {len(index)} images for {len(x)}: an attack library that picks "
                "images needs library_attack.Attackable"
            )
        of_eq2 = forward is not None and k % ROUND == 0
        key = seed + (((forward if of_eq2 else draw) + 1) << 32)
        at = (number(key, x), index.to(x.device), number(k, x), tuple(x.shape[1:]))
        return torch.empty_like(x, requires_grad=False).copy_(noise_on(x.device.type)(*at))

    return noise


def shifted(noise, first):
    return lambda k, x: noise(first + k, x)


# --------------------------------------------------------------------------------------------------
# the purifier


def purification_timesteps(t_star, nfe):
    """The t at which the network is called: nfe = 5 -> [100, 80, 60, 40, 20, 0]; nfe + 1 calls, as
    in P2's own code."""
    if not 1 <= nfe <= t_star:
        raise ValueError(f"--nfe {nfe}: must lie in 1..{t_star} (t*)")
    return [t_star * i // nfe for i in range(nfe, -1, -1)]


def vp_sde_step(x_t, eps, z, abar, abar_prev):
    """Euler-Maruyama on the reverse VP-SDE (P2 Eq. 12): f = -beta x / 2, g^2 = beta, score =
    -eps / sqrt(1 - abar).

    The integral of beta over the step is log(abar_prev / abar), by Eq. 11. Noise at every step, no
    x^_0 to clip. Ours: the steps are the schedule's, where P2's code follows a continuous t.
    """
    b = (abar_prev / abar).log()
    mean = like(1 + b / 2, x_t) * x_t - like(b / (1 - abar).sqrt(), x_t) * eps
    return mean + like(b.sqrt(), x_t) * z


def langevin_step(x_t, eps, z, abar, abar_prev, snr):
    """The corrector (Song et al., 2021, Alg. 5): one step along the score, with norms per image, as
    in P2's code; Song et al. average them over the batch."""
    score = -eps / like((1 - abar).sqrt(), x_t)
    ratio = z.flatten(1).norm(dim=1) / score.flatten(1).norm(dim=1)
    size = 2 * (abar / abar_prev) * (snr * ratio) ** 2
    return x_t + like(size, x_t) * score + like((2 * size).sqrt(), x_t) * z


def ssim(x, y):
    """Structural similarity (Wang et al., 2004), as GDMP takes it: 11 x 11 window, zero padding,
    range 1 -> (B,)."""
    channels = x.shape[1]
    g = torch.exp(-((torch.arange(11, device=x.device, dtype=x.dtype) - 5) ** 2) / (2 * 1.5**2))
    window = (torch.outer(g, g) / g.sum() ** 2).expand(channels, 1, 11, 11)

    def blurred(a):
        return F.conv2d(a, window, padding=5, groups=channels)

    with runtime.autocast(x.device, "fp32"):  # differences of squares
        mx, my = blurred(x), blurred(y)
        xx, yy, xy = blurred(x * x), blurred(y * y), blurred(x * y)
    top = (2 * mx * my + 0.01**2) * (2 * (xy - mx * my) + 0.03**2)
    bottom = (mx**2 + my**2 + 0.01**2) * (xx - mx**2 + yy - my**2 + 0.03**2)
    return (top / bottom).flatten(1).mean(1)


class Slope(torch.autograd.Function):
    """Slope.apply(function, x, y): the gradient in x of function(x, y).sum(), differentiable once.

    Nothing but x and y is kept for that: function is evaluated again.
    """

    @staticmethod
    def forward(ctx, function, x, y):
        ctx.function = function
        ctx.save_for_backward(x, y)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(function(x, y).sum(), x)[0]

    @staticmethod
    def backward(ctx, v):
        with torch.enable_grad():
            x, y = (a.detach().requires_grad_() for a in ctx.saved_tensors)
            (slope,) = torch.autograd.grad(ctx.function(x, y).sum(), x, create_graph=True)
            return None, *torch.autograd.grad(slope, (x, y), v, allow_unused=True)


def guidance(x_t, y_t, kind):
    """-numel / 2 times the gradient of MSE or 1 - SSIM between x_t and y_t; differentiable."""
    if kind == "mse":
        return y_t - x_t
    return Slope.apply(ssim, x_t, y_t) * (x_t[0].numel() / 2)


def confidence(classifier):
    """-> function (x_t in [-1, 1], y), as Slope takes it: log of the largest probability that the
    classifier gives x_t, (B,); y counts for nothing."""
    plain = getattr(classifier, "_orig_mod", classifier)  # compiled, it has no second derivative

    def logarithm(x_t, y):
        with runtime.autocast(x_t.device, "fp32"):
            return plain((x_t + 1) / 2).flatten(1).log_softmax(1).amax(1)

    return logarithm


class PurifiedClassifier(nn.Module):
    """x (B, C, H, W) in [0, 1] -> logits (B, classes) of the purified image; differentiable, for
    any attack library.

    model: (x_t, t) -> eps; classifier: [0, 1] images -> logits. Both are put in eval mode and lose
    their weight gradients. sampler: one of SAMPLERS. Defaults: t* = T / 10, for EDM sigma = 0.5
    instead of the sigma of a t*, for GDMP 36; nfe = t*, for EDM 50 Heun steps; rounds: 1, for GDMP
    4, purifications in a row. clip: x^_0 of each step, for EDM the output alone. snr: of the
    corrector, one Langevin step before each step (Song et al., 2021; 0.16 is their CIFAR-10 value).
    noise_removal: VP-SDE's last step is its mean, as in P2's code; else it has noise like any
    other, as in DiffPure. scale: GDMP's guidance. coup: the weight of the classifier's confidence
    in COUP (Zhang et al., 2024), vp-sde whose score has the gradient of its logarithm added; P2
    prints neither the formula nor the weight, 1 is ours. `calls` counts the network calls of the
    last forward.
    noise(k, x), see image_draws: fixed noise instead of the global generator's, here, as the
    attribute, or in forward().
    Raises ValueError for images outside [0, 1]. strict=False takes them as they are, for libraries
    that probe beyond the border, and spares the look, for which a GPU must be waited for.
    """

    def __init__(
        self, model, schedule, classifier, sampler="ddpm", t_star=None, nfe=None, noise=None,
        clip=True, variance="fixed-large", snr=0.16, noise_removal=False, scale=GUIDANCE,
        coup=1.0, rounds=None, checkpointed=True, strict=True,
    ):  # fmt: skip
        super().__init__()
        if sampler not in SAMPLERS:
            raise ValueError(f"--purifier {sampler}: need one of {', '.join(SAMPLERS)}")
        sigma_is_free = sampler in EDM and t_star is None
        if t_star is None:
            t_star = default_t_star(sampler, schedule)
        if nfe is None:
            nfe = 50 if sampler in EDM else t_star
        if rounds is None:
            rounds = 4 if sampler in GDMP else 1
        if not 1 <= t_star < schedule.T or nfe < 1 or rounds < 1:
            raise ValueError(
                f"--t-star {t_star} --nfe {nfe}, rounds {rounds}: need 1 <= t* < {schedule.T}, "
                "others >= 1"
            )
        self.pairs = []  # (t, t_prev)
        if sampler != "none" and sampler not in EDM:
            ts = purification_timesteps(t_star, nfe)
            self.pairs = list(zip(ts, ts[1:] + [-1]))
        self.real_t = getattr(model, "real_t", False)  # see samplers.edm_follow
        self.t_min = getattr(model, "t_min", 0)
        if sampler in EDM:  # a network of integer t begins at a level of the schedule
            self.sigma_max = 0.5 if sigma_is_free and self.real_t else schedule.sigmas[t_star]
        self.model = model
        self.classifier = classifier
        self.schedule = schedule
        self.sampler = sampler
        self.t_star = t_star
        self.nfe = nfe
        self.rounds = rounds
        self.noise = noise
        self.clip = clip
        self.variance = variance
        self.snr = snr
        self.noise_removal = noise_removal
        self.scale = scale
        self.coup = coup
        self.checkpointed = checkpointed
        self.strict = strict
        self.calls = 0
        self.eval().requires_grad_(False)

    def forward(self, x, noise=None):
        if self.strict or x.dim() != 4:
            low, high = torch.stack(x.detach().aminmax()).tolist()  # one wait for both
            if x.dim() != 4 or not (low >= -1e-6 and high <= 1 + 1e-6):  # also refuses NaN
                raise ValueError(
                    f"purifier: x {tuple(x.shape)} in {low:.3g}..{high:.3g}: need (B, C, H, W) in "
                    "[0, 1]"
                )
        if self.sampler != "none":
            x = (self.purify(2 * x - 1, noise) + 1) / 2
        return self.classifier(x)

    def purify(self, x, noise=None):
        """x (B, C, H, W) in [-1, 1] -> x^_0 of its shape."""
        self.calls = 0
        noise = noise or self.noise or (lambda k, x: torch.randn_like(x))
        given = x
        for r in range(self.rounds):
            x = self.one_round(x, given, shifted(noise, r * ROUND))
        return x

    def eps(self, x_t, t):
        """eps_theta; under a gradient its activations are computed again instead of kept."""
        self.calls += 1
        if self.checkpointed and torch.is_grad_enabled() and x_t.requires_grad:
            return checkpoint(self.model, x_t, t, use_reentrant=False, preserve_rng_state=False)
        return self.model(x_t, t)

    def one_round(self, x, given, noise):
        """One purification of x; in every round GDMP is guided by the image that was given.

        Draw 0 is the noise of Eq. 2, draw 1 + 2 i that of step i, 2 + 2 i that of its corrector or
        guidance.
        """
        if self.sampler in EDM:
            settings = dict(EDM[self.sampler], clip=False, real_t=self.real_t, t_min=self.t_min)
            settings["noise"] = lambda i: noise(1 + 2 * i, x)
            start = x + self.sigma_max * noise(0, x)
            x_0 = edm_follow(self.eps, self.schedule, start, self.sigma_max, self.nfe, **settings)
            return clipped(x_0, self.clip)
        t_star = torch.full((len(x),), self.t_star, device=x.device)
        x = self.schedule.q_sample(x, t_star, noise(0, x))
        abars = self.schedule.levels(x.device)
        for i, (t, t_prev) in enumerate(self.pairs):
            abar = abars[t + 1].expand(len(x))
            abar_prev = abars[t_prev + 1].expand(len(x))
            t = torch.full((len(x),), t, device=x.device)
            if self.sampler == "vp-sde-corrector":
                before = self.schedule.at(self.schedule.alphas_bar_prev, t)
                eps = self.eps(x, t).to(x.dtype)
                x = langevin_step(x, eps, noise(2 + 2 * i, x), abar, before, self.snr)
            eps = self.eps(x, t).to(x.dtype)
            if self.sampler == "coup":  # eps = -sqrt(1 - abar) score
                slope = Slope.apply(confidence(self.classifier), x, given)
                eps = eps - self.coup * like((1 - abar).sqrt(), x) * slope
            x_next = self.step(x, eps, noise(1 + 2 * i, x), abar, abar_prev)
            if self.sampler in ("gdmp-mse", "gdmp-ssim"):
                guide = self.schedule.q_sample(given, t, noise(2 + 2 * i, x))
                x_next = x_next + self.pull(x, guide, abar, abar_prev)
            x = x_next
        return x

    def step(self, x, eps, z, abar, abar_prev):
        if self.sampler == "ddim":
            return ddim_step(x, eps, 0.0, abar, abar_prev, 0.0, self.clip)
        if self.sampler in ("vp-sde", "vp-sde-corrector", "coup"):
            if self.noise_removal:
                z = like(abar_prev < 1, x) * z
            return vp_sde_step(x, eps, z, abar, abar_prev)
        return ddpm_step(x, eps, z, abar, abar_prev, self.clip, self.variance)

    def pull(self, x, guide, abar, abar_prev):
        """GDMP's guidance: the step's variance times its s_t."""
        variance = ddpm_variance(abar, abar_prev, self.variance)
        strength = self.scale * ((1 - abar) / abar).sqrt() * variance
        return like(strength, x) * guidance(x, guide, self.sampler.removeprefix("gdmp-"))


def default_t_star(sampler, schedule):
    if sampler in EDM:
        return int(np.abs(np.array(schedule.sigmas) - 0.5).argmin())
    return 36 if sampler in GDMP else schedule.T // 10
