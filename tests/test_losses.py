"""Equations 2 to 10, in float64, against closed forms or NumPy."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from losses import (
    NoiseSchedule,
    adversarial_delta,
    ambient_loss,
    ddpm_loss,
    huber_loss,
    perturbation_radius,
    random_delta,
    regulariser_weight,
    robust_loss,
    scaled_gradient,
)
from samplers import ddim_sample, ddpm_step

SCHEDULE = NoiseSchedule()
BETAS = np.linspace(1e-4, 0.02, 1000)
ABAR = np.cumprod(1 - BETAS)
GAMMA = 8 / 255


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rand_like(x, low=-1.0, high=1.0, seed=1):
    u = torch.rand(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return low + (high - low) * u


def column(a, t, dims=2):
    """a[t] as (B, 1, ..)."""
    return torch.from_numpy(np.asarray(a))[t].view(-1, *[1] * (dims - 1))


def mlp(d=3, width=32, seed=0):
    """A smooth network of x and t, float64."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(d + 1, width), nn.Tanh(), nn.Linear(width, d)).double()
    nn.init.normal_(net[0].weight)  # curved at the scale of the data

    model = nn.Module()
    model.net = net
    model.forward = lambda x, t: net(torch.cat([x, t[:, None] / 1000], dim=1))
    return model


def batch(n=64, d=3):
    t = torch.randint(1000, (n,), generator=torch.Generator().manual_seed(2))
    return draw(n, d), t, draw(n, d, seed=3)


# schedule -----------------------------------------------------------------------------------------


def test_eq1_schedule_against_numpy():
    for ours, ref in (
        (SCHEDULE.betas, BETAS),
        (SCHEDULE.alphas_bar, ABAR),
        (SCHEDULE.alphas_bar_prev, np.r_[1, ABAR[:-1]]),
    ):
        assert ours.dtype == torch.float64
        np.testing.assert_allclose(ours.numpy(), ref, rtol=1e-12)
    assert NoiseSchedule(T=10, beta_start=0.1, beta_end=0.5).alphas_bar[1].item() == pytest.approx(
        0.9 * (0.9 - 0.4 / 9)
    )


def test_posterior_variance_is_bayes():
    """Precisions add: 1/beta~_t = 1/(1 - abar_{t-1}) + (1 - beta_t)/beta_t; at t = 0 x_0 is known,
    so 0."""
    zero, (abar, before) = (
        torch.zeros(1000, 1, dtype=torch.float64),
        (SCHEDULE.alphas_bar, SCHEDULE.alphas_bar_prev),
    )
    var = (
        ddpm_step(zero, zero, zero + 1, abar, before, variance="fixed-small").flatten().numpy() ** 2
    )
    np.testing.assert_allclose(
        1 / var[1:], 1 / (1 - ABAR[:-1]) + (1 - BETAS[1:]) / BETAS[1:], rtol=1e-9
    )
    assert var[0] == 0


def test_schedule_refuses_nonsense():
    for bad in (
        dict(T=0),
        dict(beta_start=0.0),
        dict(beta_end=1.0),
        dict(beta_start=0.5, beta_end=0.1),
    ):
        with pytest.raises(ValueError, match="NoiseSchedule"):
            NoiseSchedule(**bad)


def test_eq2_q_sample():
    """x_t is the end of the Markov chain x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) z: its mean
    factor and variance."""
    mean, var, means, variances = 1.0, 0.0, [], []
    for beta in BETAS:
        mean, var = mean * math.sqrt(1 - beta), var * (1 - beta) + beta
        means.append(mean)
        variances.append(var)
    t = torch.arange(1000)
    one, zero = torch.ones(1000, 1, dtype=torch.float64), torch.zeros(1000, 1, dtype=torch.float64)
    np.testing.assert_allclose(SCHEDULE.q_sample(one, t, zero)[:, 0], means, rtol=1e-10)
    np.testing.assert_allclose(SCHEDULE.q_sample(zero, t, one)[:, 0] ** 2, variances, rtol=1e-10)
    assert SCHEDULE.q_sample(one.float(), t, zero.float()).dtype == torch.float32


def test_eq2_predict_x0_inverts_q_sample():
    t = torch.tensor([0, 1, 100, 500, 999])
    x0, eps = draw(5, 3, 4, 4), draw(5, 3, 4, 4, seed=1)
    torch.testing.assert_close(
        SCHEDULE.predict_x0(SCHEDULE.q_sample(x0, t, eps), t, eps), x0, rtol=0, atol=1e-10
    )


def test_eq4_ddpm_loss():
    """eps_theta = x_t / sqrt(1 - abar) misses eps by sqrt(abar / (1 - abar)) x_0; eps_theta = 0 by
    eps."""
    x0, t, eps = batch()
    snr = column(ABAR / (1 - ABAR), t)
    loss = ddpm_loss(lambda x, t: x / column(np.sqrt(1 - ABAR), t), SCHEDULE, x0, t, eps)
    torch.testing.assert_close(loss, (snr * x0**2).mean(), rtol=1e-10, atol=0)
    torch.testing.assert_close(ddpm_loss(lambda x, t: 0 * x, SCHEDULE, x0, t, eps), (eps**2).mean())


def test_eq5_posterior_mean():
    """Eq. 5's form, (x_t - beta_t / sqrt(1 - abar_t) eps) / sqrt(1 - beta_t), when x_0 is the one
    that eps implies."""
    x_t, eps = draw(1000, 3), draw(1000, 3, seed=1)
    t = torch.arange(1000)
    expected = (x_t - column(BETAS / np.sqrt(1 - ABAR), t) * eps) / column(np.sqrt(1 - BETAS), t)
    ours = SCHEDULE.posterior_mean(SCHEDULE.predict_x0(x_t, t, eps), x_t, t)
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-8)


def test_eq5_posterior_mean_is_bayes():
    """Product of the Gaussians N(x_{t-1}; sqrt(abar') x_0, 1 - abar') and N(x_t; sqrt(1 - beta)
    x_{t-1}, beta)."""
    x0, x_t, t = draw(999, 2), draw(999, 2, seed=1), torch.arange(1, 1000)
    prior, noise = column(1 / (1 - np.r_[1, ABAR[:-1]][1:]), t - 1), column((1 - BETAS) / BETAS, t)
    expected = prior * column(np.sqrt(ABAR), t - 1) * x0 + noise * x_t / column(
        np.sqrt(1 - BETAS), t
    )
    torch.testing.assert_close(
        SCHEDULE.posterior_mean(x0, x_t, t), expected / (prior + noise), rtol=1e-9, atol=1e-9
    )
    first = torch.zeros(1, dtype=torch.long)
    torch.testing.assert_close(
        SCHEDULE.posterior_mean(x0[:1], x_t[:1], first), x0[:1]
    )  # t = 0: x_0 itself


# perturbation -------------------------------------------------------------------------------------


def test_eq6_perturbed_input():
    """x_t^adv = sqrt(abar) x_0 + sqrt(1 - abar) (eps + delta), as the network sees it."""
    x0, t, eps = batch()
    beta, u = rand_like(t, 0.5, 2), rand_like(x0)
    seen = []

    def model(x, t):
        seen.append(x.detach())
        return torch.tanh(x)

    _, parts = robust_loss(model, SCHEDULE, x0, t, eps, perturb="ran", beta=beta, u=u)
    rows = torch.cat(seen)
    s = column(np.sqrt(1 - ABAR), t)
    delta = perturbation_radius(SCHEDULE, t, beta)[:, None] * u
    torch.testing.assert_close(rows[:64], column(np.sqrt(ABAR), t) * x0 + s * eps)
    torch.testing.assert_close(rows[-64:], column(np.sqrt(ABAR), t) * x0 + s * (eps + delta))
    torch.testing.assert_close(parts["delta"], delta.abs().mean())

    start = delta
    for objective in ("eq8", "ldm", "reg"):
        r = perturbation_radius(SCHEDULE, t, beta)
        delta = adversarial_delta(model, SCHEDULE, rows[:64], t, eps, r, start, objective)
        seen.clear()
        _, parts = robust_loss(
            model, SCHEDULE, x0, t, eps, "adv", objective=objective, beta=beta, u=u
        )
        torch.testing.assert_close(seen[0], column(np.sqrt(ABAR), t) * x0 + s * eps)
        torch.testing.assert_close(seen[-1], column(np.sqrt(ABAR), t) * x0 + s * (eps + delta))
        torch.testing.assert_close(parts["delta"], delta.abs().mean())


def test_eq7_radius_check_values():
    """In pixels, s r = s^omega + gamma beta with s = sqrt(1 - abar)."""
    t = torch.tensor([0, 100, 200, 500, 999])
    s = np.sqrt(1 - ABAR[t])
    r = perturbation_radius(SCHEDULE, t)
    assert r.shape == (5,) and r.dtype == torch.float64
    assert (
        abs(s * r.numpy() - [0.031, 0.136, 0.375, 0.95, 1.03]) <= [5e-4, 5e-4, 5e-4, 5e-3, 5e-3]
    ).all()
    np.testing.assert_allclose(s * r.numpy(), 1 - ABAR[t] + GAMMA, rtol=1e-12)
    beta = torch.tensor([0.5, 1.0, 1.5, 2.0, 2.0], dtype=torch.float64)
    np.testing.assert_allclose(
        perturbation_radius(SCHEDULE, t, beta) - r, (beta.numpy() - 1) * GAMMA / s, rtol=1e-9
    )
    np.testing.assert_allclose(
        perturbation_radius(SCHEDULE, t, omega=1.0), 1 + GAMMA / s, rtol=1e-12
    )
    np.testing.assert_allclose(
        perturbation_radius(SCHEDULE, t, omega=3.0, gamma=0.0), s**2, rtol=1e-12
    )


def test_eq7_delta_ran():
    """Uniform on [-r, r]: mean 0, standard deviation r / sqrt(3), nothing outside, fresh for every
    element."""
    torch.manual_seed(0)
    r = torch.tensor([0.1, 2.0], dtype=torch.float64)
    delta = random_delta(torch.zeros(2, 1000, 100, dtype=torch.float64), r).flatten(1) / r[:, None]
    assert (
        delta.abs().max() <= 1 and (delta.amax(1) > 0.999).all() and (delta.amin(1) < -0.999).all()
    )
    np.testing.assert_allclose(delta.std(1), 1 / math.sqrt(3), rtol=0.01)
    assert delta.mean(1).abs().max() < 0.01
    assert (
        abs((delta[:, 1:] * delta[:, :-1]).mean()) < 0.01
        and abs((delta[0] * delta[1]).mean()) < 0.01
    )


def test_eq7_beta_is_uniform():
    """beta ~ U[0.5, 2] of 1 / (s^2 + gamma beta) integrates to ln((s^2 + 2 gamma) / (s^2 + gamma /
    2)) / (1.5 gamma)."""
    torch.manual_seed(0)
    x0 = torch.zeros(100_000, 1, dtype=torch.float64)
    t = torch.full((len(x0),), 10)
    _, parts = robust_loss(lambda x, t: x, SCHEDULE, x0, t, x0, perturb="ran")
    var = 1 - ABAR[10]
    expected = (
        0.3 * math.sqrt(3) / (1.5 * GAMMA) * math.log((var + 2 * GAMMA) / (var + 0.5 * GAMMA))
    )
    assert parts["lambda_t"].item() == pytest.approx(expected, rel=0.01)
    assert parts["delta"].item() == pytest.approx(
        (var + 1.25 * GAMMA) / math.sqrt(var) / 2, rel=0.01
    )


@pytest.mark.parametrize("objective", ["eq8", "ldm", "reg"])
def test_eq8_linear_network(objective):
    """eps_theta = A x: grad J is A'A delta (Eq. 8), A'(A (x + s delta) - eps) (L_DM), (sA - I)'(sA
    - I) delta (ours)."""
    x_t, t, eps = batch(200)
    A = draw(3, 3, seed=5)
    r = perturbation_radius(SCHEDULE, t, rand_like(t, 0.5, 2))
    start = r[:, None] * rand_like(x_t)
    delta = adversarial_delta(lambda x, t: x @ A.T, SCHEDULE, x_t, t, eps, r, start, objective)

    a, d, s = A.numpy(), start.numpy(), np.sqrt(1 - ABAR[t])[:, None]
    if objective == "eq8":
        grad = d @ (a.T @ a)
    elif objective == "ldm":
        grad = ((x_t.numpy() + s * d) @ a.T - eps.numpy()) @ a
    else:
        jac = s[..., None] * a - np.eye(3)  # (B, 3, 3)
        grad = np.einsum("bji,bjk,bk->bi", jac, jac, d)
    bound = r.numpy()[:, None]
    np.testing.assert_allclose(
        delta, np.clip(d + bound / math.sqrt(3) * np.sign(grad), -bound, bound), rtol=1e-12
    )


@pytest.mark.parametrize("objective", ["eq8", "ldm", "reg"])
def test_eq8_raises_the_objective(objective):
    """On a curved network the step raises J for nearly all samples, and leaves the ball
    for none."""
    torch.manual_seed(0)
    model = mlp()
    x_t, t, eps = batch(1000)
    r = perturbation_radius(SCHEDULE, t)
    start = random_delta(x_t, r)
    delta = adversarial_delta(model, SCHEDULE, x_t, t, eps, r, start, objective)
    assert (delta.abs() <= r[:, None]).all()
    assert not delta.requires_grad

    def J(delta):
        with torch.no_grad():
            residual = model(x_t + column(np.sqrt(1 - ABAR), t) * delta, t) - (
                eps if objective == "ldm" else model(x_t, t)
            )
        return ((residual - delta if objective == "reg" else residual) ** 2).sum(1)

    share = (J(delta) > J(start)).double().mean().item()
    assert share > 0.9, share


def test_eq8_needs_the_random_start():
    """At delta = 0 the gradient of Eq. 8 vanishes, so nothing moves; that of L_DM does not."""
    model = mlp()
    x_t, t, eps = batch()
    r, zero = perturbation_radius(SCHEDULE, t), torch.zeros_like(x_t)
    assert adversarial_delta(model, SCHEDULE, x_t, t, eps, r, zero).abs().max() == 0
    moved = adversarial_delta(model, SCHEDULE, x_t, t, eps, r, zero, "ldm")
    torch.testing.assert_close(moved.abs(), (r / math.sqrt(3))[:, None].expand(-1, 3))


def test_eq8_reuses_the_clean_forward():
    model = mlp()
    x_t, t, eps = batch()
    r = perturbation_radius(SCHEDULE, t)
    start = rand_like(x_t) * r[:, None]
    args = (model, SCHEDULE, x_t, t, eps, r, start)
    assert torch.equal(adversarial_delta(*args), adversarial_delta(*args, eps_x=model(x_t, t)))


def test_eq8_leaves_the_weights_alone():
    """No weight gradient in the attack, requires_grad as before also after an error, and training
    still works."""
    model = mlp()
    model.net[0].bias.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    x0, t, eps = batch()
    r = perturbation_radius(SCHEDULE, t)
    start = rand_like(x0) * r[:, None]
    with torch.no_grad():  # a caller's no_grad must not switch the attack off
        delta = adversarial_delta(model, SCHEDULE, x0, t, eps, r, start)
    assert not torch.equal(delta, start)
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == flags

    forward = model.forward
    model.forward = lambda x, t: 1 / 0
    with pytest.raises(ZeroDivisionError):
        adversarial_delta(model, SCHEDULE, x0, t, eps, r, start)
    assert [p.requires_grad for p in model.parameters()] == flags

    model.forward = forward
    robust_loss(model, SCHEDULE, x0, t, eps)[0].backward()
    assert all((p.grad is not None) == flag for p, flag in zip(model.parameters(), flags))
    assert model.net[0].weight.grad.abs().max() > 0


# objectives ---------------------------------------------------------------------------------------


def test_lambda_check_values():
    t = torch.tensor([0, 20, 50, 100, 200, 500, 999])
    pixel, eps = regulariser_weight(SCHEDULE, t), regulariser_weight(SCHEDULE, t, ray_units="eps")
    np.testing.assert_allclose(pixel, [16.51, 13.81, 8.46, 3.81, 1.386, 0.545, 0.504], rtol=1.5e-3)
    np.testing.assert_allclose(eps, [0.165, 1.093, 1.466, 1.235, 0.812, 0.523, 0.504], rtol=2e-3)
    np.testing.assert_allclose(regulariser_weight(SCHEDULE, t, lam=0.03), pixel / 10, rtol=1e-12)


@pytest.mark.parametrize("ray_units", ["pixel", "eps"])
@pytest.mark.parametrize("constraint", ["equivariance", "invariance"])
def test_eq9_eq10_against_numpy(constraint, ray_units):
    x0, t, eps = batch(50, 4)
    beta, u, W = rand_like(t, 0.5, 2), rand_like(x0), draw(4, 4, seed=7)
    loss, parts = robust_loss(
        lambda x, t: torch.tanh(x @ W.T) + 0.001 * t[:, None].double(),
        SCHEDULE,
        x0,
        t,
        eps,
        "ran",
        constraint,
        ray_units=ray_units,
        lam=0.2,
        omega=1.5,
        gamma=0.05,
        beta=beta,
        u=u,
    )

    w, b, s2 = W.numpy(), beta.numpy(), 1 - ABAR[t]
    r = (s2**0.75 + 0.05 * b) / s2**0.5
    lam = 0.2 * 3**0.5 / (r * s2**0.5 if ray_units == "pixel" else r)
    l_dm, l_reg = [], []
    for i in range(50):
        x_t = ABAR[t[i]] ** 0.5 * x0[i].numpy() + s2[i] ** 0.5 * eps[i].numpy()
        delta = r[i] * u[i].numpy()
        clean, moved = (
            np.tanh(w @ x) + 0.001 * t[i].item() for x in (x_t, x_t + s2[i] ** 0.5 * delta)
        )
        l_dm.append(np.mean((clean - eps[i].numpy()) ** 2))
        l_reg.append(
            lam[i] * np.mean((moved - clean - (delta if constraint == "equivariance" else 0)) ** 2)
        )
    assert parts["L_DM"].item() == pytest.approx(np.mean(l_dm), rel=1e-10)
    assert parts["L_reg"].item() == pytest.approx(np.mean(l_reg), rel=1e-10)
    assert loss.item() == pytest.approx(np.mean(l_dm) + np.mean(l_reg), rel=1e-10)


@pytest.mark.parametrize("perturb", ["ran", "adv"])
def test_eq10_equivariance_residual(perturb):
    """eps_theta = x / sqrt(1 - abar) shifts by exactly delta: Eq. 10 costs nothing, invariance
    lambda_t delta^2."""
    x0, t, eps = batch()
    beta, u = rand_like(t, 0.5, 2), rand_like(x0)

    def model(x, t):
        return x / column(np.sqrt(1 - ABAR), t)

    _, parts = robust_loss(model, SCHEDULE, x0, t, eps, perturb, beta=beta, u=u)
    assert parts["L_reg"] < 1e-20
    _, parts = robust_loss(model, SCHEDULE, x0, t, eps, perturb, "invariance", beta=beta, u=u)
    # here grad J of Eq. 8 is 2 delta, so the attack moves outwards from the random start
    u = u if perturb == "ran" else u.sign() * (u.abs() + 1 / math.sqrt(3)).clamp(max=1)
    r = perturbation_radius(SCHEDULE, t, beta)
    expected = (regulariser_weight(SCHEDULE, t, beta) * r**2 * (u**2).mean(1)).mean()
    torch.testing.assert_close(parts["L_reg"], expected, rtol=1e-10, atol=0)


def test_eq10_is_invariance_of_the_denoised_image():
    """eps(x^adv) - eps(x) - delta = -sqrt(abar / (1 - abar)) (x^_0(x^adv) - x^_0(x)), for any
    network."""
    model = mlp()
    x0, t, eps = batch()
    beta, u = rand_like(t, 0.5, 2), rand_like(x0)
    _, parts = robust_loss(model, SCHEDULE, x0, t, eps, "ran", beta=beta, u=u)
    x_t = SCHEDULE.q_sample(x0, t, eps)
    x_adv = x_t + column(np.sqrt(1 - ABAR), t) * perturbation_radius(SCHEDULE, t, beta)[:, None] * u
    change = SCHEDULE.predict_x0(x_adv, t, model(x_adv, t)) - SCHEDULE.predict_x0(
        x_t, t, model(x_t, t)
    )
    weight = regulariser_weight(SCHEDULE, t, beta)[:, None] * column(ABAR / (1 - ABAR), t)
    torch.testing.assert_close(
        parts["L_reg"], (weight * change**2).mean().detach(), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("perturb", ["ran", "adv"])
def test_eq10_on_all_rows_is_eq10_without_rows(perturb):
    """share = 1, all t: bit for bit the loss and the gradients of the formula written out."""
    model = mlp()
    x0, t, eps = (value.float() if value.is_floating_point() else value for value in batch())
    model.float()
    beta, u = rand_like(t.double(), 0.5, 2), rand_like(x0).float()

    radius = perturbation_radius(SCHEDULE, t, beta)
    s = (1 - SCHEDULE.alphas_bar[t]).sqrt().float()[:, None]
    x_t = SCHEDULE.q_sample(x0, t, eps)
    delta = radius.float()[:, None] * u
    if perturb == "adv":
        eps_x = model(x_t, t)
        delta = adversarial_delta(model, SCHEDULE, x_t, t, eps, radius, delta, eps_x=eps_x)
        eps_adv = model(x_t + s * delta, t)
    else:
        both = model(torch.cat([x_t, x_t + s * delta]), torch.cat([t, t]))
        eps_x, eps_adv = both.chunk(2)
    weight = regulariser_weight(SCHEDULE, t, beta).float()
    regulariser = (weight * (eps_adv - eps_x - delta).square().mean(1)).mean()
    written_out = (eps_x - eps).square().mean() + regulariser

    loss, _ = robust_loss(model, SCHEDULE, x0, t, eps, perturb, beta=beta, u=u)
    assert torch.equal(loss, written_out)
    weights = list(model.parameters())
    for a, b in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(written_out, weights)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("perturb", ["ran", "adv"])
@pytest.mark.parametrize("constraint", ["equivariance", "invariance"])
def test_eq10_gradient_is_finite_differences(perturb, constraint):
    """delta_adv depends on the weights through a sign alone, which tiny steps do not flip: its
    gradient is 0."""
    model = mlp(width=8)
    x0, t, eps = batch(16)
    beta, u = rand_like(t, 0.5, 2), rand_like(x0)

    def loss():
        return robust_loss(model, SCHEDULE, x0, t, eps, perturb, constraint, beta=beta, u=u)[0]

    loss().backward()
    for p in model.parameters():
        direction = draw(*p.shape, seed=11)
        values = []
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                p.add_(step * direction)
            values.append(loss().item())
        with torch.no_grad():
            p.add_(1e-6 * direction)
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(
            (p.grad * direction).sum().item(), rel=1e-5
        )


@pytest.mark.parametrize("perturb", ["ran", "adv"])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("steps", [dict(), dict(t_min=10, t_max=400)])
def test_eq10_share_is_unbiased(perturb, share, steps):
    """On a share of the rows, the mean over all orders of the batch is the full term, and so are
    its gradients; also where two rows of four act, of which one, two, or these and another are
    computed."""
    model = mlp()
    x0, _, eps = batch(4)
    t = torch.tensor([20, 5, 300, 800])  # lambda_t is large at 20
    beta, u = rand_like(t.double(), 0.5, 2), rand_like(x0)

    def loss_and_gradients(order, share):
        rows = [v[list(order)] for v in (x0, t, eps)]
        own = dict(beta=beta[list(order)], u=u[list(order)])
        loss, parts = robust_loss(model, SCHEDULE, *rows, perturb, **own, **steps, share=share)
        return torch.cat(
            [
                loss.detach()[None],
                parts["L_reg"][None],
                *(g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))),
            ]
        )

    orders = list(itertools.permutations(range(4)))
    mean = torch.stack([loss_and_gradients(order, share) for order in orders]).mean(0)
    full = loss_and_gradients(orders[0], 1.0)
    torch.testing.assert_close(mean, full, rtol=1e-10, atol=1e-12)
    one = loss_and_gradients(orders[0], share)
    if steps and share >= 0.5:  # all rows that act are computed, in any order
        torch.testing.assert_close(one, full, rtol=1e-10, atol=1e-12)
    else:
        assert not torch.allclose(one, full, rtol=1e-3)  # one order alone is another number


@pytest.mark.parametrize("perturb", ["ran", "adv"])
@pytest.mark.parametrize("share", [1, 0.5])
def test_eq10_from_t_min_to_t_max_is_the_term_of_those_rows(perturb, share):
    """Row by row: lambda_t is 0 outside t_min <= t < t_max, the rest is divided by all rows, and
    L_DM stays. Half of the rows is enough, since those that act come first."""
    x0, eps, u = draw(6, 3, 4, 4), draw(6, 3, 4, 4), draw(6, 3, 4, 4).clamp(-1, 1)
    t = torch.tensor([0, 9, 10, 11, 500, 999])
    beta = torch.linspace(0.5, 2, 6, dtype=torch.float64)

    def model(x, t):
        return (x * (1 + t.view(-1, 1, 1, 1) / 500)).tanh()

    def terms(rows, **options):
        batch = (x0[rows], t[rows], eps[rows])
        own = dict(beta=beta[rows], u=u[rows])
        return robust_loss(model, SCHEDULE, *batch, perturb, **own, **options)[1]

    single = [terms(slice(i, i + 1))["L_reg"].item() for i in range(6)]
    found = terms(slice(0, 6), t_min=10, t_max=500, share=share)
    assert found["L_reg"].item() == pytest.approx(sum(single[2:4]) / 6, rel=1e-9)
    assert terms(slice(0, 6), t_min=12, t_max=500, share=share)["L_reg"] == 0
    assert torch.equal(found["L_DM"], terms(slice(0, 6))["L_DM"])
    assert terms(slice(0, 6))["L_reg"].item() == pytest.approx(sum(single) / 6, rel=1e-9)


@pytest.mark.parametrize("perturb, rows", [("ran", [8 + 2]), ("adv", [8, 2, 2])])
def test_eq10_share_is_the_work_done(perturb, rows):
    """share = 1/4 of 8 rows: one forward over 10 (ran), or 8 clean, 2 in the attack, 2 perturbed
    (adv)."""
    model, seen = mlp(), []

    def counted(x, t):
        seen.append(len(x))
        assert len(x) == len(t)
        return model(x, t)

    robust_loss(counted, SCHEDULE, *batch(8), perturb, share=0.25)
    assert seen == rows
    with pytest.raises(ValueError, match="share"):
        robust_loss(model, SCHEDULE, *batch(8), perturb, share=0.0)


@pytest.mark.parametrize("detach", [False, True])
def test_eq10_detach(detach):
    """eps_theta = k x: d/dk of the residual k s delta - delta is s delta; x + s delta if eps(x_t)
    is held constant."""
    x0, t, eps = batch()
    beta, u = rand_like(t, 0.5, 2), rand_like(x0)
    k = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    loss, _ = robust_loss(
        lambda x, t: k * x, SCHEDULE, x0, t, eps, "ran", detach=detach, beta=beta, u=u
    )
    loss.backward()
    x, s = SCHEDULE.q_sample(x0, t, eps), column(np.sqrt(1 - ABAR), t)
    r, lam = (
        perturbation_radius(SCHEDULE, t, beta)[:, None],
        regulariser_weight(SCHEDULE, t, beta)[:, None],
    )
    moved = (x if detach else 0) + s * r * u
    expected = 2 * ((0.7 * x - eps) * x).mean() + 2 * (lam * (0.7 * s - 1) * r * u * moved).mean()
    torch.testing.assert_close(k.grad, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("perturb", ["ran", "adv"])
def test_robust_loss_of_images_and_vectors(perturb):
    """An element-wise network cannot tell images from their flattened vectors, nor can the loss."""
    images, t, eps = draw(6, 3, 4, 4), torch.arange(6) * 190, draw(6, 3, 4, 4, seed=1)
    beta, u = rand_like(t, 0.5, 2), rand_like(images)

    def model(x, t):
        return torch.sin(3 * x)

    one, _ = robust_loss(model, SCHEDULE, images, t, eps, perturb, beta=beta, u=u)
    two, _ = robust_loss(
        model, SCHEDULE, images.flatten(1), t, eps.flatten(1), perturb, beta=beta, u=u.flatten(1)
    )
    assert one.shape == () and one.item() == pytest.approx(two.item(), rel=1e-12)
    assert (
        robust_loss(model, SCHEDULE, images.float(), t, eps.float(), perturb)[0].dtype
        == torch.float32
    )


def test_robust_loss_refuses_unknown_names():
    x0, t, eps = batch(4)
    for bad in (
        dict(perturb="none"),
        dict(constraint="inv"),
        dict(ray_units="x"),
        dict(objective="eq9"),
    ):
        with pytest.raises(ValueError, match=next(iter(bad.values()))):
            robust_loss(lambda x, t: x, SCHEDULE, x0, t, eps, **bad)


@pytest.mark.parametrize("ray_units", ["pixel", "eps"])
@pytest.mark.parametrize("constraint", ["equivariance", "invariance"])
def test_gaussian_data_minimiser(constraint, ray_units):
    """Data N(mu, v), eps_theta = k (x_t - sqrt(abar) mu), random delta: k = s (1 + c) / (abar v +
    s^2 (1 + c)), Eq. 10.

    c = E_beta lambda_t r^2 / 3, in which lambda_t r^2 = lam sqrt(3) r / s (pixel) or lam sqrt(3) r
    (eps) is linear in beta, so that beta = 1.25 gives the mean. Invariance loses the (1 + c) of the
    numerator. The loss is quadratic: the 16 combinations of x0 = mu +- sqrt(v), eps = +-1, u =
    +-1/sqrt(3), beta = 0.5 or 2 have the exact moments.
    """
    mu, v = 0.3, 0.25
    sign = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    x0, eps, u, beta = torch.cartesian_prod(
        mu + sign * math.sqrt(v), sign, sign / math.sqrt(3), 1.25 + 0.75 * sign
    ).T
    for step in (0, 20, 100, 300, 999):
        t = torch.full((16,), step)
        abar, s = ABAR[step], math.sqrt(1 - ABAR[step])
        c = 0.3 * (s**2 + 1.25 * GAMMA) / (math.sqrt(3) * s) / (s if ray_units == "pixel" else 1)
        best = s * (1 + c if constraint == "equivariance" else 1) / (abar * v + s**2 * (1 + c))

        def gradient(value, t=t, abar=abar):
            k = torch.tensor(value, dtype=torch.float64, requires_grad=True)
            loss, _ = robust_loss(
                lambda x, t: k * (x - math.sqrt(abar) * mu),
                SCHEDULE,
                x0[:, None],
                t,
                eps[:, None],
                "ran",
                constraint,
                ray_units=ray_units,
                beta=beta,
                u=u[:, None],
            )
            loss.backward()
            return k.grad.item()

        slope = gradient(1.1 * best) - gradient(0.9 * best)
        assert slope > 0
        assert abs(gradient(best)) < 1e-9 * slope, step


# rivals -------------------------------------------------------------------------------------------


def test_ambient_without_noise_is_eq4():
    x0, t, eps = draw(8, 3, 4, 4), torch.arange(8) * 140, draw(8, 3, 4, 4, seed=1)
    for dtype in (torch.float32, torch.float64):
        args = (lambda x, t: torch.sin(3 * x), SCHEDULE, x0.to(dtype), t, eps.to(dtype))
        assert torch.equal(ambient_loss(*args, torch.zeros(8)), ddpm_loss(*args))


def test_ambient_is_tweedie_twice():
    """x^_0 mapped to the level of y, (s_t^2 - s_y^2) x^_0 + s_y^2 x_t^VE over s_t^2, against y,
    over sqrt(a) s_t."""
    y, t, eps = batch()
    sigma_y, W, seen = rand_like(t, 0.0, 0.5), draw(3, 3, seed=7), []

    def model(x, t):
        seen[:] = x, t
        return torch.tanh(x @ W.T)

    loss = ambient_loss(model, SCHEDULE, y, t, eps, sigma_y)
    s_t, expected = np.sqrt((1 - ABAR) / ABAR), []
    for i in range(64):
        s_y = sigma_y[i].item()
        t_min = np.flatnonzero(s_t > s_y)[0]
        k = seen[1][i].item()
        assert k == t_min + math.floor(t[i].item() * (1000 - t_min) / 1000)
        x_ve = y[i].numpy() + math.sqrt(s_t[k] ** 2 - s_y**2) * eps[i].numpy()
        np.testing.assert_allclose(seen[0][i], math.sqrt(ABAR[k]) * x_ve, rtol=1e-9)
        x0 = x_ve - s_t[k] * np.tanh(W.numpy() @ (math.sqrt(ABAR[k]) * x_ve))
        at_y = ((s_t[k] ** 2 - s_y**2) * x0 + s_y**2 * x_ve) / s_t[k] ** 2
        expected.append((at_y - y[i].numpy()) ** 2 / (1 - s_y**2 / s_t[k] ** 2) / s_t[k] ** 2)
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-9)


def test_ambient_steps():
    """t in 0..T-1 covers t_min..T-1 in order, each step alike up to rounding; a level beyond the
    schedule gives NaN."""
    seen = []

    def steps(sigma_y):
        t, x = torch.arange(1000), torch.zeros(1000, 1)
        loss = ambient_loss(
            lambda x, t: seen.append(t) or x, SCHEDULE, x, t, x, torch.full((1000,), sigma_y)
        )
        return seen.pop(), loss

    for sigma_y in (0.0, 0.005, 0.2, 3.0):
        t_min = np.flatnonzero((1 - ABAR) / ABAR > sigma_y**2)[0]
        t, count = steps(sigma_y)[0].unique_consecutive(return_counts=True)
        assert torch.equal(t, torch.arange(t_min, 1000)) and count.max() - count.min() <= 1
    assert steps(200.0)[1].isnan()


def linear_minimiser(loss):
    """k (T,), eps_theta = k_t x_t, that minimises a loss quadratic in k: one Newton step for each
    t."""

    def gradient(value):
        k = torch.full((1000,), value, dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(loss(lambda x, t: k[t, None] * x), k)[0]

    g0, g1 = gradient(0.0), gradient(1.0)
    return -g0 / (g1 - g0)


@pytest.mark.parametrize("v", [0.25, 0.04])
def test_ambient_removes_the_noise_of_gaussian_data(v):
    """N(0, v), 9 of 10 images with noise 0.2: ambient learns the score of N(0, v) at all t, DDPM
    that of N(0, v + .9 noise).

    The sampler is linear: from x_T = 1 it returns the standard deviation of the samples. Moments
    are exact: x = +-std, eps = +-1. If the noise is over-estimated by a fifth, the learnt variance
    is v + s^2 - (1.2 s)^2, as soon as s_t > 1.2 s.
    """
    sigma, sign = 0.2, torch.tensor([-1.0, 1.0], dtype=torch.float64)
    noise = sigma * (torch.arange(10) > 0).double()
    s_y, x, eps, t = torch.cartesian_prod(noise, sign, sign, torch.arange(1000).double()).T
    y, eps, t = (x * (v + s_y**2).sqrt())[:, None], eps[:, None], t.long()
    abar = torch.from_numpy(ABAR)

    def score(variance):
        return (1 - abar).sqrt() / (abar * variance + 1 - abar)

    ambient = linear_minimiser(lambda model: ambient_loss(model, SCHEDULE, y, t, eps, s_y))
    plain = linear_minimiser(lambda model: ddpm_loss(model, SCHEDULE, y, t, eps))
    torch.testing.assert_close(ambient, score(v), rtol=1e-9, atol=0)
    torch.testing.assert_close(plain, score(v + 0.9 * sigma**2), rtol=1e-9, atol=0)
    for k, variance in ((ambient, v), (plain, v + 0.9 * sigma**2)):
        one = torch.ones(1, 1, dtype=torch.float64)
        std = ddim_sample(
            lambda x, t, k=k: k[t, None] * x, SCHEDULE, one, steps=1000, clip=False
        ).item()
        assert std / math.sqrt(variance) == pytest.approx(1, abs=0.02)

    noisy = s_y > 0
    off = linear_minimiser(
        lambda model: ambient_loss(
            model, SCHEDULE, y[noisy], t[noisy], eps[noisy], 1.2 * s_y[noisy]
        )
    )
    allowed = (1 - abar) / abar > (1.2 * sigma) ** 2
    torch.testing.assert_close(
        off[allowed], score(v + sigma**2 - (1.2 * sigma) ** 2)[allowed], rtol=1e-9, atol=0
    )


def test_huber():
    """NumPy's pseudo-Huber with c_t = c^(t / T); Eq. 4 for large c_t, 2 c_t |r| for small."""
    x0, t, eps = batch()

    def loss(c, t):
        return huber_loss(lambda x, t: torch.tanh(x), SCHEDULE, x0, t, eps, c).item()

    def residual(t):
        return (torch.tanh(SCHEDULE.q_sample(x0, t, eps)) - eps).numpy()

    c_t = 0.1 ** (t.numpy()[:, None] / 1000)
    assert loss(0.1, t) == pytest.approx(
        np.mean(2 * c_t**2 * (np.sqrt(1 + (residual(t) / c_t) ** 2) - 1)), rel=1e-12
    )
    last = torch.full_like(t, 999)
    assert loss(1e6, last) == pytest.approx(
        ddpm_loss(lambda x, t: torch.tanh(x), SCHEDULE, x0, last, eps).item(), rel=1e-9
    )
    assert loss(1e-9, last) == pytest.approx(2 * 1e-9**0.999 * abs(residual(last)).mean(), rel=1e-5)


# scaled_gradient ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scaled_gradient_is_exact(dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(128, 4)).to(dtype)
    x, y = draw(5, 3, 6, 6).to(dtype).requires_grad_(), torch.tensor([0, 1, 2, 3, 0])
    output = net(x) * torch.tensor([1e-3, 1, 3, 10, 30], dtype=dtype).view(-1, 1)
    objective = nn.functional.cross_entropy(output, y, reduction="sum")
    (plain,) = torch.autograd.grad(objective, x, retain_graph=True)
    assert torch.equal(scaled_gradient(objective, output, x), plain)
