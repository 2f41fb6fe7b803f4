"""ADDT (P2), in float64: an independent Algorithm 1 on recorded draws, closed forms, what cannot
work."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from losses import NoiseSchedule, addt_loss, addt_weight, rank_gaussian_map

SCHEDULE = NoiseSchedule()
ABAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# Algorithm 1 --------------------------------------------------------------------------------------


def networks():
    """An eps-network and a classifier, curved, float64; t in hundreds matters to the former."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 3, 3, padding=1).double()
    layers = [nn.Flatten(), nn.Linear(75, 16), nn.Tanh(), nn.Linear(16, 3)]
    classifier = nn.Sequential(*layers).double()
    nn.init.normal_(classifier[1].weight)
    nn.init.normal_(classifier[3].weight)

    def model(x, t):
        return 0.5 * x + torch.tanh(2 * conv(x) + t.view(-1, 1, 1, 1) / 300)

    return model, classifier, conv


def ranked(total, gaussian):
    """RBGM by SciPy's ranks, image by image and channel by channel."""
    stats = pytest.importorskip("scipy.stats")
    out = torch.empty_like(total)
    for i, c in np.ndindex(*total.shape[:2]):
        rank = stats.rankdata(total[i, c], "ordinal").astype(int) - 1
        out[i, c] = gaussian[i, c].flatten().sort().values[rank].view(total.shape[2:])
    return out


def algorithm_1(model, classifier, x0, y, t, eps, draws, guide, perturb, unit, high):
    """P2's Algorithm 1, and its l_inf and MSE-guided forms, written a second time -> loss, delta.

    draws: the Gaussian draws in the order in which they are asked for.
    """
    abar = torch.from_numpy(ABAR)[t].view(-1, 1, 1, 1)
    lam = torch.clip(unit * abar.sqrt() / (1 - abar).sqrt(), 0, high)
    keep = (1 - lam**2).sqrt() if perturb == "rbgm" else 1

    def diffused(noise):
        return abar.sqrt() * x0 + (1 - abar).sqrt() * noise

    delta = next(draws) if perturb == "rbgm" else torch.zeros_like(x0)
    next(draws)  # breaks ties
    total = 0
    for _ in range(5):
        fresh = next(draws)
        delta = delta.clone().requires_grad_()
        x = diffused(keep * fresh + lam * delta)
        guess = model(x, t)
        if guide == "classifier":
            P = (x - (1 - abar).sqrt() * guess) / abar.sqrt()
            value = F.cross_entropy(classifier(P / 2 + 0.5), y)
        else:
            value = F.mse_loss(guess, fresh)
        value.backward()
        if perturb == "rbgm":
            total = total + delta.grad
            delta = ranked(total, next(draws))
        else:
            pixels = (delta.detach() + 8 / 255 * delta.grad.sign()).clamp(-16 / 255, 16 / 255)
            delta = torch.max(torch.min(pixels, 1 - x0), -1 - x0)
    noise = keep * eps + lam * delta
    return F.mse_loss(model(diffused(noise), t), noise), delta


@pytest.mark.parametrize(
    "guide, perturb, flags",
    [
        ("classifier", "rbgm", {}),
        ("classifier", "rbgm", dict(unit=0.1, high=0.6)),
        ("mse", "rbgm", {}),
        ("classifier", "linf", {}),
    ],
)
def test_p2_algorithm_1(guide, perturb, flags, monkeypatch):
    """On curved networks, at three t, with the draws that were used: the loss and its gradient."""
    model, classifier, conv = networks()
    x0 = draw(4, 3, 5, 5).clamp(-1, 1)
    y, t = torch.tensor([0, 1, 2, 1]), torch.tensor([3, 60, 100, 500])
    eps = draw(4, 3, 5, 5, seed=1)
    seen = []
    randn_like = torch.randn_like

    def recorded(x):
        seen.append(randn_like(x))
        return seen[-1].clone()

    torch.manual_seed(0)
    monkeypatch.setattr(torch, "randn_like", recorded)
    loss, parts = addt_loss(
        model, SCHEDULE, classifier, x0, y, t, eps, guide=guide, perturb=perturb, **flags
    )
    settings = dict(unit=0.03, high=0.3) if perturb == "rbgm" else dict(unit=1.0, high=10.0)
    draws = iter(seen)
    expected, _ = algorithm_1(
        model, classifier, x0, y, t, eps, draws, guide, perturb, **(settings | flags)
    )
    assert next(draws, None) is None  # it asked for no other
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    ours, theirs = (torch.autograd.grad(value, conv.weight)[0] for value in (loss, expected))
    torch.testing.assert_close(ours, theirs)
    assert parts["guided"] == 1


# its parts ----------------------------------------------------------------------------------------


def test_rank_gaussian_map_is_a_permutation_in_rank_order():
    delta, noise = draw(2, 3, 5, 4).square(), draw(2, 3, 5, 4, seed=1)
    mapped = rank_gaussian_map(delta, noise).numpy()
    for i in range(2):
        for c in range(3):
            np.testing.assert_array_equal(
                np.sort(mapped[i, c], None), np.sort(noise[i, c].numpy(), None)
            )
            np.testing.assert_array_equal(
                np.argsort(mapped[i, c], None), np.argsort(delta[i, c].numpy(), None)
            )
    for bad in (noise[:1], noise.flatten(1)):
        with pytest.raises(ValueError, match="rank_gaussian_map"):
            rank_gaussian_map(bad, bad if bad.dim() < 3 else noise)


def test_addt_weight_check_values():
    w = addt_weight(SCHEDULE, torch.arange(1000)).numpy()
    assert (w[:27] == 0.3).all() and w[27] < 0.3
    np.testing.assert_allclose(w, np.clip(0.03 * np.sqrt(ABAR / (1 - ABAR)), 0, 0.3), rtol=1e-12)
    assert w[100] == pytest.approx(0.088, abs=5e-4) and w[500] == pytest.approx(0.0087, abs=5e-5)


def addt(t, n=3, size=6, k=0.4, **kw):
    """ADDT, eps_theta = k x, a linear two-class classifier -> loss, parts, x0, eps, noise of x'_t,
    its weights, all x_t."""
    x0, eps, t, seen = (
        draw(n, 3, size, size),
        draw(n, 3, size, size, seed=1),
        torch.full((n,), t),
        [],
    )
    x0 = kw.pop("x0", x0)
    w = draw(2, 3 * size * size, seed=2)

    def model(x, t):
        seen.append(x.detach())
        return k * x

    torch.manual_seed(0)
    classifier, y = kw.pop("classifier", lambda x: x.flatten(1) @ w.T), torch.arange(n) % 2
    loss, parts = addt_loss(model, SCHEDULE, classifier, x0, y, t, eps, **kw)
    abar = torch.from_numpy(ABAR)[t].view(-1, 1, 1, 1)
    noise = (seen[-1] - abar.sqrt() * x0) / (1 - abar).sqrt()
    return loss, parts, x0, eps, noise, w.view(2, 3, size, size), seen


def test_addt_loss_is_eq8_of_p2():
    for t in (3, 100, 700):
        loss, parts, x0, _, noise, _, seen = addt(t)
        P = (seen[-1] - math.sqrt(1 - ABAR[t]) * 0.4 * seen[-1]) / math.sqrt(ABAR[t])
        assert loss.item() == pytest.approx(
            (ABAR[t] / (1 - ABAR[t]) * (x0 - P).square()).mean().item(), rel=1e-9
        )
        assert loss.item() == pytest.approx(
            (0.4 * seen[-1] - noise).square().mean().item(), rel=1e-9
        )
        assert len(seen) == 6 and parts["L_ADDT"] == loss


def test_addt_noise_has_unit_variance():
    """delta orders a Gaussian draw that is independent of eps. guide='none' leaves delta random:
    plain fine-tuning."""
    for guide in ("none", "classifier"):
        noise = addt(3, n=2, size=96, guide=guide)[4]
        assert noise.var().item() == pytest.approx(1, abs=0.03) and abs(noise.mean().item()) < 0.02


def test_cgpo_in_closed_form():
    """Linear networks: the gradient is along w_other - w_y throughout; RBGM keeps its order."""
    _, parts, _, eps, noise, w, _ = addt(100)
    lam = 0.03 * math.sqrt(ABAR[100] / (1 - ABAR[100]))
    mapped = (noise - math.sqrt(1 - lam**2) * eps) / lam
    assert parts["lambda_t"].item() == pytest.approx(lam)
    way = torch.stack([w[1] - w[0], w[0] - w[1], w[1] - w[0]])
    assert torch.equal(mapped.flatten(2).argsort(2), way.flatten(2).argsort(2))


def test_cgpo_guided_by_the_mse_in_closed_form():
    """eps_theta = k x: |eps_theta - eps|^2 grows with delta along k sqrt(abar) x_0 + noise, so
    along x_0; |x_0 - P|^2 would against it."""
    _, _, x0, eps, noise, _, _ = addt(100, guide="mse")
    lam = 0.03 * math.sqrt(ABAR[100] / (1 - ABAR[100]))
    mapped = (noise - math.sqrt(1 - lam**2) * eps) / lam
    assert (torch.cosine_similarity(mapped.flatten(1), x0.flatten(1)) > 0.3).all()


def test_addt_linf_in_closed_form():
    """noise = eps + lambda_t delta, lambda_t = gamma_t: x_0 moves by 16/255 of its [-1, 1] towards
    the other class, and stays in the box; one outside it is not moved back."""
    x0 = draw(3, 3, 6, 6).clamp(-1, 1)
    x0[0, 0, 0, :2] = torch.tensor([-1.5, 1.5])
    _, _, _, eps, noise, w, _ = addt(100, perturb="linf", x0=x0)
    way = torch.stack([w[1] - w[0], w[0] - w[1], w[1] - w[0]])
    moved = x0 + 16 / 255 * way.sign()
    outside = x0.abs() > 1
    inwards = way * x0 < 0
    moved = torch.where(outside, torch.where(inwards, moved, x0), moved.clamp(-1, 1))
    gamma = math.sqrt(ABAR[100] / (1 - ABAR[100]))
    torch.testing.assert_close(noise, eps + gamma * (moved - x0))
    assert ((moved - x0).abs() < 15 / 255).any()
    one = addt(100, perturb="linf", passes=1)[4]  # of steps of 8/255 = 2 x 4/255
    inside = draw(3, 3, 6, 6).abs() < 0.9
    step = (one - eps) / gamma
    torch.testing.assert_close(step[inside], (8 / 255 * way.sign())[inside])


def test_addt_leaves_no_weight_gradient_behind_and_repeats():
    torch.manual_seed(0)
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(108, 2)).double()
    one, two = addt(100, classifier=classifier)[0], addt(100, classifier=classifier)[0]
    assert one == two  # the global generator is all that it draws from
    assert all(p.grad is None and p.requires_grad for p in classifier.parameters())
    for bad in (dict(guide="x"), dict(perturb="x"), dict(classifier=None)):
        with pytest.raises(ValueError, match="guide="):
            addt(100, **bad)
    with pytest.raises(ValueError, match="lambda_max 1.5"):
        addt(100, high=1.5)
    assert addt(100, perturb="linf", unit=0.5)[1]["lambda_t"] > 0.5
    assert addt(100, classifier=None, guide="mse")[0] > 0


def test_addt_trains_the_weights_by_one_backward():
    net = nn.Conv2d(3, 3, 1).double()
    loss, _ = addt_loss(
        lambda x, t: net(x),
        SCHEDULE,
        None,
        draw(2, 3, 4, 4),
        None,
        torch.tensor([10, 500]),
        draw(2, 3, 4, 4, seed=1),
        guide="none",
    )
    loss.backward()
    assert net.weight.grad.abs().sum() > 0


def sure_in_half(x):
    """A linear classifier in float16, sure of class i % 2 of image i: its gradients, about 1e-9,
    are 0 there."""
    w = draw(2, 108, seed=2)
    w = (0.01 * w).half()
    sure = torch.tensor([[14.0, 0], [0, 14], [14, 0]])
    return x.flatten(1).half() @ w.T + sure.half()


def test_cgpo_survives_float16():
    """delta follows the gradient of a classifier that runs in float16, not the noise that breaks
    ties."""
    _, parts, _, eps, noise, w, _ = addt(100, classifier=sure_in_half)
    lam = 0.03 * math.sqrt(ABAR[100] / (1 - ABAR[100]))
    mapped = (noise - math.sqrt(1 - lam**2) * eps) / lam
    way = torch.stack([w[1] - w[0], w[0] - w[1], w[1] - w[0]])
    ranks = [v.flatten(2).argsort(2).argsort(2).double().flatten() for v in (mapped, way)]
    assert np.corrcoef(ranks)[0, 1] > 0.99
    assert parts["guided"] == 1


def test_cgpo_leaves_out_a_gradient_that_overflows():
    """Image 0's is infinite: it is not moved, nothing turns NaN, and the others are guided as
    before."""
    w = draw(2, 108, seed=2)

    def overflowing(x):
        infinite = torch.zeros_like(x)
        infinite[0] = math.inf
        x.register_hook(lambda g: g + infinite)
        return x.flatten(1) @ w.T

    _, parts, _, _, noise, _, _ = addt(100, classifier=overflowing)
    assert noise.isfinite().all() and parts["guided"].item() == pytest.approx(2 / 3)
    assert torch.equal(noise[1:], addt(100)[4][1:])
