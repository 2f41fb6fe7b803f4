"""Noise schedule, perturbations and objectives of adversarial training for diffusion models.

Copy this file: it needs torch alone. A model is any callable (x_t, t) -> eps of x_t's shape, t a
(B,) integer tensor in 0..T-1; x is (B, C, H, W) images in [-1, 1] or (B, d) vectors. P1 = "What is
Adversarial Training for Diffusion Models?", whose equation numbers are used throughout. Its
sigma(t) is beta_t here and its alpha_t is alphas_bar.

    schedule = NoiseSchedule()
    t = torch.randint(schedule.T, (len(x0),))
    loss, parts = robust_loss(model, schedule, x0, t, torch.randn_like(x0), perturb="adv")
"""

import contextlib
import functools
import math

import torch
from torch import nn


class NoiseSchedule:
    """beta_t linear over T steps (Eq. 1). Arrays (T,) in float64: betas; alphas_bar = prod(1 -
    beta); alphas_bar_prev, the same one step earlier, 1 at t = 0.
    """

    def __init__(self, T=1000, beta_start=1e-4, beta_end=0.02):
        if T < 1 or not 0 < beta_start <= beta_end < 1:
            raise ValueError(
                f"NoiseSchedule: need T >= 1 and 0 < beta_start <= beta_end < 1, got "
                f"{T}, {beta_start}, {beta_end}"
            )
        self.T = T
        self.betas = torch.linspace(beta_start, beta_end, T, dtype=torch.float64)
        self.alphas_bar = torch.cumprod(1 - self.betas, dim=0)
        self.alphas_bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_bar[:-1]])

    @functools.cached_property
    def sigmas(self):
        """EDM's noise levels sqrt((1 - abar) / abar): T numbers, to be read without a GPU."""
        return ((1 - self.alphas_bar) / self.alphas_bar).sqrt().tolist()

    def to(self, device):
        """Move the arrays; worth doing once before a loop on a GPU."""
        for name in ("betas", "alphas_bar", "alphas_bar_prev"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def levels(self, device):
        """abar_t at index t + 1, (T + 1,) float64; index 0 is x_0's, where samplers end."""
        abar = self.alphas_bar.to(device)
        return torch.cat([torch.ones_like(abar[:1]), abar])

    def at(self, values, t):
        """values[t] in float64 on t's device, (B,)."""
        return values.to(t.device)[t]

    def q_sample(self, x0, t, eps):
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps  (Eq. 2)."""
        abar = self.at(self.alphas_bar, t)
        return like(abar.sqrt(), x0) * x0 + like((1 - abar).sqrt(), x0) * eps

    def predict_x0(self, x_t, t, eps):
        """x^_0 = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t): Eq. 2 solved for x_0 (App. A.1)."""
        return predict_x0(x_t, eps, self.at(self.alphas_bar, t))

    def posterior_mean(self, x0, x_t, t):
        """mu~_t(x_t, x_0), the mean of q(x_{t-1} | x_t, x_0) (P1 App. A.1). At t = 0 it is x_0."""
        return posterior_mean(
            x0, x_t, self.at(self.alphas_bar, t), self.at(self.alphas_bar_prev, t)
        )


def like(v, x):
    """(B,) float64 coefficients -> (B, 1, ..) in x's dtype."""
    return v.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


def predict_x0(x_t, eps, abar):
    """Eq. 2 solved for x_0, with abar given as (B,)."""
    return (x_t - like((1 - abar).sqrt(), x_t) * eps) / like(abar.sqrt(), x_t)


def posterior_mean(x0, x_t, abar, abar_prev):
    """mu~ for a step between any two noise levels, given as (B,) abar < abar_prev (P1 App. A.1)."""
    beta = 1 - abar / abar_prev
    a = abar_prev.sqrt() * beta / (1 - abar)
    b = (1 - beta).sqrt() * (1 - abar_prev) / (1 - abar)
    return like(a, x_t) * x0 + like(b, x_t) * x_t


# --------------------------------------------------------------------------------------------------
# the perturbation delta, in units of eps


def perturbation_radius(schedule, t, beta=1.0, omega=2.0, gamma=8 / 255):
    """r_beta(t) = (sqrt(1 - abar_t)^omega + gamma beta) / sqrt(1 - abar_t)  (Eq. 7) -> (B,)
    float64, units of eps.

    beta: a number or (B,), U[0.5, 2] in training; omega >= 1 shrinks the ray where the content
    forms, gamma is its floor. In pixels the ray is sqrt(1 - abar_t) r_beta(t).
    """
    s = (1 - schedule.at(schedule.alphas_bar, t)).sqrt()
    return (s**omega + gamma * beta) / s


def random_delta(x, radius):
    """delta_ran ~ U(-r, r) per element (Eq. 7), x's shape; standard deviation r / sqrt(3)."""
    return (2 * torch.rand_like(x) - 1) * like(radius, x)


def adversarial_delta(model, schedule, x_t, t, eps, radius, start, objective="eq8", eps_x=None):
    """delta_adv = clamp(start + r / sqrt(3) sign(grad_delta J), -r, r): one FGSM step that raises J
    (Eq. 8).

    start: delta_ran. It must not be 0, where the gradient of Eq. 8 vanishes. objective, with x' =
    x_t + sqrt(1-abar) delta:
      "eq8"  J = |eps(x', t) - eps(x_t, t)|^2          (Eq. 8; printed there as an argmin, a slip)
      "ldm"  J = |eps(x', t) - eps|^2                  (the other reading, the formula below Eq. 8)
      "reg"  J = |eps(x', t) - eps(x_t, t) - delta|^2  (ours: the regulariser itself)
    eps_x: eps(x_t, t) if known, which saves a forward. Returns a constant.
    """
    if objective not in ("eq8", "ldm", "reg"):
        raise ValueError(f"objective={objective!r}: need 'eq8', 'ldm' or 'reg'")
    s = like((1 - schedule.at(schedule.alphas_bar, t)).sqrt(), x_t)
    r = like(radius, x_t)
    with frozen(model):
        if objective == "ldm":
            target = eps
        elif eps_x is None:
            with torch.no_grad():
                target = model(x_t, t).to(x_t.dtype)
        else:
            target = eps_x.detach()
        with torch.enable_grad():
            delta = start.detach().requires_grad_()
            residual = model(x_t.detach() + s * delta, t).to(x_t.dtype) - target  # Eq. 6 inside
            if objective == "reg":
                residual = residual - delta
            (grad,) = torch.autograd.grad(residual.square().sum(), delta)
    return torch.clamp(start.detach() + r / math.sqrt(3) * grad.sign(), -r, r)


@contextlib.contextmanager
def frozen(model):
    """No weight gradients: a compiled graph computes them even where only delta's is asked for."""
    params = []
    if isinstance(model, nn.Module):
        params = [p for p in model.parameters() if p.requires_grad]
    for p in params:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in params:
            p.requires_grad_(True)


def scaled_gradient(objective, output, x):
    """d objective / dx (B, ..), by way of output (B, ..) in float32 or float64, on which alone
    objective depends.

    In float16 the gradients of a sure classifier, or of an error of one grey level, underflow to 0
    on their way to x. So each sample's gradient in output is multiplied by the power of two that
    brings its largest element to [1/2, 1), and the gradient in x divided by it: exact in float32
    and float64, where row i of output must depend on row i of x alone.
    """
    (start,) = torch.autograd.grad(objective, output)
    # 2^100 is a float32, 0 has exponent 0
    exponent = torch.frexp(start.abs().flatten(1).amax(1)).exponent.clamp(-100, 100)
    scale = torch.ldexp(torch.ones_like(start.flatten(1)[:, 0]), -exponent)
    (grad,) = torch.autograd.grad(output, x, start * like(scale, start))
    return grad / like(scale, grad)


# --------------------------------------------------------------------------------------------------
# objectives


def ddpm_loss(model, schedule, x0, t, eps):
    """L_DM = E |eps - eps_theta(x_t, t)|^2, mean over elements (Eq. 4) -> scalar."""
    return (model(schedule.q_sample(x0, t, eps), t).to(x0.dtype) - eps).square().mean()


def ambient_loss(model, schedule, y, t, eps, sigma_y):
    """E |eps - sqrt(a) eps_theta(x_t, t)|^2 on images y that hold noise of known sigma_y, (B,) in
    y's units -> scalar.

    Ambient training (Daras et al., arXiv 2411.02780; Tweedie twice: 2404.10177). With sigma_t^2 =
    (1 - abar_t) / abar_t an image serves the steps with sigma_t > sigma_y: x_t = sqrt(abar_t) (y +
    sqrt(sigma_t^2 - sigma_y^2) eps), and a x^_0 + (1 - a) x_t / sqrt(abar_t), a = 1 - sigma_y^2 /
    sigma_t^2, is compared with y. That residual is a sigma_t (eps / sqrt(a) - eps_theta). Ours is
    its weight: a target of unit variance at every t and sigma_y, so that no sample outweighs others
    near sigma_t = sigma_y. For sigma_y = 0 it is Eq. 4. Ours too: t is squeezed onto the image's
    allowed steps t_min..T-1 in order; low sigma_t thus learns from clean images alone. sigma_y
    beyond all steps (157) gives NaN.
    """
    s2_y = sigma_y.to(torch.float64).square()
    abar = schedule.alphas_bar.to(t.device)
    t_min = torch.searchsorted((1 - abar) / abar, s2_y, right=True).clamp(max=schedule.T - 1)
    t = t_min + t * (schedule.T - t_min) // schedule.T
    abar = schedule.at(abar, t)
    noise = (1 - abar) - abar * s2_y  # the variance that y lacks at step t
    x_t = like(abar.sqrt(), y) * y + like(noise.sqrt(), y) * eps
    root_a = like((noise / (1 - abar)).sqrt(), y)
    return (root_a * model(x_t, t).to(y.dtype) - eps).square().mean()


def huber_loss(model, schedule, x0, t, eps, c=0.1):
    """E 2 c_t^2 (sqrt(1 + r^2 / c_t^2) - 1), r = eps_theta - eps per element: scheduled
    pseudo-Huber -> scalar.

    Khrapov et al., arXiv 2403.16728: c_t = c^(t / T) falls from 1 to c, so that it is robust where
    the content forms: the authors' exponential schedule (in their pull request
    kohya-ss/sd-scripts#1228). The factor 2 (r^2 for small r), residuals per element and c = 0.1 are
    as in the trainers that took it over. c = 1 is constant in t; c_t -> infinity is Eq. 4.
    """
    c_t = like(c ** (t.double() / schedule.T), x0)
    r = model(schedule.q_sample(x0, t, eps), t).to(x0.dtype) - eps
    loss = 2 * r.square() / (1 + (1 + (r / c_t).square()).sqrt())  # the same, exact for small r
    return loss.mean()


def regulariser_weight(schedule, t, beta=1.0, lam=0.3, omega=2.0, gamma=8 / 255, ray_units="pixel"):
    """lambda_t -> (B,) float64: lam over the standard deviation of delta_ran, in pixels or in eps.

    The paper prints lam sqrt(3) / (beta r(t)) and leaves the units of the ray open:
      "pixel"  lam sqrt(3) / (sqrt(1 - abar_t) r_beta(t))  (ours, by evidence: see NOTES.md)
      "eps"    lam sqrt(3) / r_beta(t)
    """
    if ray_units not in ("pixel", "eps"):
        raise ValueError(f"ray_units={ray_units!r}: need 'pixel' or 'eps'")
    ray = perturbation_radius(schedule, t, beta, omega, gamma)
    if ray_units == "pixel":
        ray = (1 - schedule.at(schedule.alphas_bar, t)).sqrt() * ray
    return lam * math.sqrt(3) / ray


def acting_rows(t, t_min, t_max):
    """The order of a batch in which rows with t_min <= t < t_max come first -> (B,) int64."""
    return ((t >= t_min) & (t < t_max)).int().argsort(descending=True, stable=True)


def regularised_rows(t, share=1.0, t_min=0, t_max=math.inf):
    """Which rows of a batch Eq. 10's second term is computed on -> rows (n,), weight (n,) float64.

    n = round(share B), at least 1, and those first that act. The weight of others is 0; that of
    these makes the mean over the n rows an unbiased estimate of the mean over the batch.
    """
    acts = (t >= t_min) & (t < t_max)
    n = max(1, round(share * len(t)))
    rows = acting_rows(t, t_min, t_max)[:n]
    chosen = acts[rows].double()
    return rows, chosen * (acts.double().mean() * n / chosen.sum().clamp(min=1))


def robust_loss(
    model, schedule, x0, t, eps, perturb="adv", constraint="equivariance", lam=0.3, omega=2.0,
    gamma=8 / 255, ray_units="pixel", objective="eq8", detach=False, beta=None, u=None, share=1.0,
    t_min=0, t_max=math.inf,
):  # fmt: skip
    """L_AT = |eps(x_t) - eps|^2 + lambda_t |eps(x_t^adv) - eps(x_t) - delta|^2  (Eq. 10).

    -> (scalar, parts). Norms are means over elements, lambda_t is per sample.

    perturb     "adv", or "ran", which calls the model once, on [x_t, x_t + s delta] and [t, t]: a
                model that closes over a condition must repeat it
    constraint  "equivariance", or "invariance", without "- delta" (Eq. 9: the ablation that fails)
    objective   what delta_adv maximises, see adversarial_delta
    detach      stops the gradient through eps(x_t) in the second term (ours; as printed it flows)
    beta, u     (B,) in [0.5, 2], and in [-1, 1] of x0's shape with delta_ran = r_beta u; by default
                drawn from the global generator
    share       q: the second term is computed on round(q B) rows, at least one, which is unbiased
                (ours). A step costs 1 + q (ran) or 1 + 5 q / 3 (adv) times one of DDPM
    t_min, t_max  lambda_t is 0 but for t_min <= t < t_max (ours: NOTES.md, "What it costs")
    parts       detached scalars: L_DM and L_reg, which sum to the loss; means of lambda_t, |delta|
    """
    if perturb not in ("ran", "adv"):
        raise ValueError(f"perturb={perturb!r}: need 'ran' or 'adv'")
    if constraint not in ("equivariance", "invariance"):
        raise ValueError(f"constraint={constraint!r}: need 'equivariance' or 'invariance'")
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: the share of regularised rows must lie in (0, 1]")
    if beta is None:
        beta = torch.empty(len(t), device=t.device).uniform_(0.5, 2)
    rows, weight = regularised_rows(t, share, t_min, t_max)
    t_n = t[rows]
    beta_n = beta[rows]
    radius = perturbation_radius(schedule, t_n, beta_n, omega, gamma)  # Eq. 7
    lambda_t = weight * regulariser_weight(schedule, t_n, beta_n, lam, omega, gamma, ray_units)
    s = like((1 - schedule.at(schedule.alphas_bar, t_n)).sqrt(), x0)

    x_t = schedule.q_sample(x0, t, eps)  # Eq. 2
    x_n = x_t[rows]
    delta = random_delta(x_n, radius) if u is None else like(radius, x0) * u[rows]
    if perturb == "ran":  # one forward over both
        both = model(torch.cat([x_t, x_n + s * delta]), torch.cat([t, t_n])).to(x0.dtype)
        eps_x, eps_adv = both.split([len(t), len(t_n)])
    else:  # the attack reuses the clean forward
        eps_x = model(x_t, t).to(x0.dtype)
        delta = adversarial_delta(  # Eq. 8
            model, schedule, x_n, t_n, eps[rows], radius, delta, objective, eps_x[rows]
        )
        eps_adv = model(x_n + s * delta, t_n).to(x0.dtype)  # Eq. 6

    target = eps_x.index_select(0, rows)
    if detach:
        target = target.detach()
    residual = eps_adv - target
    if constraint == "equivariance":
        residual = residual - delta
    l_dm = (eps_x - eps).square().mean()
    l_reg = (lambda_t.to(x0.dtype) * residual.square().flatten(1).mean(1)).mean()
    parts = dict(
        L_DM=l_dm.detach(), L_reg=l_reg.detach(), lambda_t=lambda_t.mean(), delta=delta.abs().mean()
    )
    return l_dm + l_reg, parts


# --------------------------------------------------------------------------------------------------
# ADDT, for purification (P2 = "Understanding and Enhancing the Robustness of Diffusion-Based
# Purification")


def rank_gaussian_map(delta, noise):
    """RBGM (P2 §5.1): delta (B, C, H, W) with its elements replaced by those of `noise` of equal
    rank, per image and channel.

    What comes back is a permutation of `noise`, ordered in space as delta is. No gradient flows to
    delta.
    """
    if delta.shape != noise.shape or delta.dim() < 3:
        raise ValueError(
            f"rank_gaussian_map: delta {tuple(delta.shape)} and noise {tuple(noise.shape)} must be "
            "(B, C, H, W)"
        )
    order = delta.detach().flatten(2).argsort(dim=2)
    values = noise.flatten(2).sort(dim=2).values
    return torch.empty_like(values).scatter_(2, order, values).view(noise.shape)


def addt_weight(schedule, t, unit=0.03, high=0.3):
    """lambda_t = clip(gamma_t unit, 0, high), gamma_t = sqrt(abar_t / (1 - abar_t)) -> (B,) float64
    (P2 Eq. 7)."""
    abar = schedule.at(schedule.alphas_bar, t)
    return ((abar / (1 - abar)).sqrt() * unit).clamp(0, high)


def addt_loss(
    model, schedule, classifier, x0, y, t, eps, guide="classifier", perturb="rbgm", passes=5,
    unit=None, high=None,
):  # fmt: skip
    """ADDT (P2 Algorithm 1): the eps-MSE on noise that CGPO has bent against the classifier ->
    (scalar, parts).

    x0 (B, C, H, W) in [-1, 1]; y (B,) labels; classifier: images in [0, 1] -> logits. With P(x, t)
    = x^_0 (P2 Eq. 4),
      noise = sqrt(1 - lambda_t^2) eps + lambda_t delta, delta ~ N(0, I) before the first pass
      x'_t  = sqrt(abar) x_0 + sqrt(1 - abar) noise                               (P2 Eq. 6)
      CGPO: `passes` times at the same t, eps fresh,
            total += grad_delta L(classifier(P(x'_t, t)), y), delta = RBGM(total)   (P2 Eq. 9)
      loss  = |sqrt(abar) / sqrt(1 - abar) (x_0 - P(x'_t, t))|^2
            = |eps_theta(x'_t, t) - noise|^2, a mean over elements                (P2 Eq. 8)
    guide: L is the cross-entropy, "mse" |eps_theta - eps|^2 with the eps of the pass, "none": no
    CGPO, i.e. plain fine-tuning. y and classifier may be None for these two. perturb="linf" (P2
    App. I, and its code): noise = eps + lambda_t delta, and PGD on delta from 0 in the place of
    RBGM, in steps of 4/255 within 8/255 of a [0, 1] pixel, with x_0 + delta in [-1, 1]. unit, high:
    of addt_weight; default .03, .3, for linf 1, 10. eps is that of the update; all other draws come
    from the global generator, RBGM's apart from eps (P2 §5.1). Ours: total starts at 1e-30 N(0, I),
    which only breaks ties; L is a sum, a factor that no rank and no sign sees; an x_0 outside its
    box is not moved inwards. parts: detached, L_guide is L's last mean, guided the share of (image,
    pass) whose gradient is finite and not 0 (another pass is left out: 0 for guide="none"). The
    classifier must treat the images of a batch apart, as in eval mode: see scaled_gradient.
    """
    if guide not in ("classifier", "mse", "none") or perturb not in ("rbgm", "linf"):
        raise ValueError(
            f"guide={guide!r}, perturb={perturb!r}: need 'classifier', 'mse' or 'none', and 'rbgm' "
            "or 'linf'"
        )
    if guide == "classifier" and (y is None or classifier is None):
        raise ValueError("guide='classifier': needs the labels y and a classifier")
    rbgm = perturb == "rbgm"
    unit = (0.03 if rbgm else 1) if unit is None else unit
    high = (0.3 if rbgm else 10) if high is None else high
    if rbgm and not 0 <= high <= 1:
        raise ValueError(f"lambda_max {high}: must lie in [0, 1], as sqrt(1 - lambda_t^2) is taken")
    lambda_t = addt_weight(schedule, t, unit, high)
    keep = like((1 - lambda_t**2).sqrt(), x0) if rbgm else 1.0
    bend = like(lambda_t, x0)
    up, down = (1 - x0).clamp_min(0), (-1 - x0).clamp_max(0)

    delta = torch.randn_like(x0) if rbgm else torch.zeros_like(x0)
    total = 1e-30 * torch.randn_like(x0)
    objective = guided = torch.zeros((), device=x0.device)
    with frozen(model), frozen(classifier):
        for _ in range(0 if guide == "none" else passes):
            fresh = torch.randn_like(x0)
            with torch.enable_grad():
                delta.requires_grad_()
                x_t = schedule.q_sample(x0, t, keep * fresh + bend * delta)
                output = model(x_t, t).to(x0.dtype)
                if guide == "classifier":
                    x0_hat = schedule.predict_x0(x_t, t, output)
                    output = classifier((x0_hat + 1) / 2).to(x0.dtype)
                    objective = nn.functional.cross_entropy(output, y, reduction="sum")
                else:
                    objective = (output - fresh).square().sum()
                grad = scaled_gradient(objective, output, delta)
            usable = grad.isfinite().flatten(1).all(1) & (grad != 0).flatten(1).any(1)
            grad = torch.where(usable.view(-1, *[1] * (grad.dim() - 1)), grad, 0)
            guided = guided + usable.to(x0.dtype).mean() / passes
            total = total + grad
            if rbgm:
                delta = rank_gaussian_map(total, torch.randn_like(x0))
            else:  # a pixel of [0, 1] is 2 units of x_0
                delta = (delta.detach() + 2 * 4 / 255 * grad.sign()).clamp(-16 / 255, 16 / 255)
                delta = torch.minimum(torch.maximum(delta, down), up)
    noise = keep * eps + bend * delta.detach()
    loss = ddpm_loss(model, schedule, x0, t, noise)
    parts = dict(L_ADDT=loss.detach(), L_guide=objective.detach() / len(x0))
    return loss, parts | dict(lambda_t=lambda_t.mean(), guided=guided)
