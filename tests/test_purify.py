"""purification.py, purify.py: exact gradients, known noise, every sampler on Gaussian data, attacks
in closed form, the command."""

import argparse
import importlib
import json
import math

import cli
import numpy as np
import pytest
import torch
from torch import nn

import purification
import purify
from classifier import WideResNet
from data import image_noise
from losses import NoiseSchedule
from purification import (
    PurifiedClassifier,
    following,
    gradient_of,
    image_draws,
    loss_of,
    over_draws,
    purification_timesteps,
)
from runtime import save_checkpoint
from samplers import ddpm_sample, heun_sample
from unet import UNet

SCHEDULE = NoiseSchedule()
INDEX = torch.arange(3)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Eps(nn.Module):
    """A small smooth eps-network, float64."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 3, padding=1).double()

    def forward(self, x, t):
        return 0.6 * x + torch.tanh(self.conv(x) + t.view(-1, 1, 1, 1) / 1000)


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


def linear(shape=(3, 6, 6), seed=4):
    net = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 2)).double()
    net[1].weight.data = draw(2, math.prod(shape), seed=seed)
    return net


def purifier(sampler="ddpm", model=None, classifier=None, **kw):
    if sampler != "none":
        kw = dict(nfe=5) | kw
    return PurifiedClassifier(model or Eps(), SCHEDULE, classifier or linear(), sampler, **kw)


def images(n=3, shape=(3, 6, 6)):
    return 0.1 + 0.8 * torch.rand(
        n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


# the purifier --------------------------------------------------------------------------------------------------------


def test_timesteps():
    assert purification_timesteps(100, 5) == [100, 80, 60, 40, 20, 0]
    assert purification_timesteps(100, 10) == list(range(100, -1, -10))
    for nfe in (20, 50, 100):
        assert purification_timesteps(100, nfe) == list(range(100, -1, -100 // nfe))
    for bad in (0, 101):
        with pytest.raises(ValueError, match="--nfe"):
            purification_timesteps(100, bad)
    assert purifier(nfe=None).t_star == 100 and purifier("gdmp").rounds == 4
    abar = SCHEDULE.alphas_bar[purifier("edm-ode").t_star].item()
    assert math.sqrt((1 - abar) / abar) == pytest.approx(0.5, abs=0.003)


@pytest.mark.parametrize("sampler", purification.SAMPLERS)
def test_gradient_is_exact(sampler):
    """Checkpointed = plain, and = finite differences along a random direction, clipping included."""
    noise, x, v = image_draws(0, INDEX), images(), draw(3, 3, 6, 6, seed=2)
    grads = []
    for checkpointed in (True, False):
        net, at = purifier(sampler, checkpointed=checkpointed), x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(net(at, noise).sum(0)[0], at)
        grads.append(grad)
        assert (
            net.calls
            == {"none": 0, "vp-sde-corrector": 12, "edm-ode": 9, "edm-sde": 9}.get(sampler, 6)
            * net.rounds
        )
        assert not any(p.requires_grad for p in net.parameters()) and not net.training
    assert torch.equal(*grads) and grads[0].abs().max() > 0
    with torch.no_grad():
        slope = (net(x + 1e-6 * v, noise) - net(x - 1e-6 * v, noise)).sum(0)[0] / 2e-6
    torch.testing.assert_close((grads[0] * v).sum(), slope, rtol=1e-5, atol=1e-7)


def test_checkpointing_runs_the_network_again_instead_of_keeping_it():
    class Counting(Eps):
        runs = 0

        def forward(self, x, t):
            self.runs += 1
            return super().forward(x, t)

    for checkpointed in (True, False):
        net, x = purifier(model=Counting(), checkpointed=checkpointed), images().requires_grad_()
        net(x).sum().backward()
        assert (net.calls, net.model.runs) == (6, 12 if checkpointed else 6)


@pytest.mark.parametrize(
    "sampler", ["ddpm", "ddim", "vp-sde", "vp-sde-corrector", "edm-ode", "edm-sde"]
)
def test_gaussian_data_stay_what_they_are(sampler):
    """With the true score of N(0, v), purified samples of N(0, v) are N(0, v), and follow their image as posteriors do."""
    v = 0.25

    def model(x, t):
        abar = SCHEDULE.at(SCHEDULE.alphas_bar, t).view(-1, 1, 1, 1)
        return (1 - abar).sqrt() / (abar * v + 1 - abar) * x

    x = math.sqrt(v) * draw(2, 3, 64, 64)
    net = purifier(sampler, model, t_star=100, nfe=None, clip=False)
    y = net.purify(x, image_draws(0, INDEX[:2]))
    assert y.var().item() == pytest.approx(v, rel=0.05)
    abar = SCHEDULE.alphas_bar[100].item()
    share = abar * v / (abar * v + 1 - abar)  # of the posterior's mean
    slope = (x * y).mean().item() / v
    if sampler in (
        "ddpm",
        "vp-sde",
    ):  # stochastic: a draw of the posterior, whose mean is that share of x
        assert slope == pytest.approx(share, abs=0.03)
    elif sampler in ("ddim", "edm-ode"):  # deterministic: rescaled to the variance instead
        assert slope == pytest.approx(math.sqrt(share), abs=0.03)


def test_vp_sde_tends_to_ddpm():
    """Same noise, path by path; the difference is of first order in the step. EM's noise of the last step is left out."""
    errors = []
    for nfe in (20, 100):

        def noise(k, x, nfe=nfe):
            return draw(*x.shape, seed=k) * (k != 1 + 2 * nfe)

        a, b = (
            purifier(s, lambda x, t: 0.4 * x, nfe=nfe, clip=False).purify(draw(2, 3, 8, 8), noise)
            for s in ("ddpm", "vp-sde")
        )
        errors.append((a - b).abs().max().item())
    assert errors[1] < 0.003 and 3 < errors[0] / errors[1] < 9


def test_corrector_step_has_the_signal_to_noise_ratio():
    """Song et al. (2021), Alg. 5: x + size score + sqrt(2 size) z with |size score| = snr sqrt(alpha_t) |sqrt(2 size) z|."""
    eps, seen = draw(2, 3, 6, 6, seed=7), []
    eps[1] *= 3  # each image has its own step

    def model(x, t):
        seen.append((x, t))
        return eps

    noise = image_draws(3, torch.arange(2))
    purifier("vp-sde-corrector", model, t_star=100, nfe=1, snr=0.25).purify(draw(2, 3, 6, 6), noise)
    (before, t), (after, _) = seen[:2]
    t, z, moved = t[0], noise(2, before), after - before
    for d, e, w in zip(moved, eps, z):
        (a, b), *_ = np.linalg.lstsq(
            np.stack([-e.flatten(), w.flatten()], 1), d.flatten(), rcond=None
        )
        np.testing.assert_allclose(-a * e + b * w, d, atol=1e-12)
        size = a * (1 - SCHEDULE.alphas_bar[t]).sqrt()
        assert b == pytest.approx(math.sqrt(2 * size), rel=1e-9)
        assert a * e.norm() / (b * w.norm()) == pytest.approx(
            0.25 * math.sqrt(1 - SCHEDULE.betas[t]), rel=1e-9
        )


def test_it_is_the_sampler_of_sample_py():
    x, noise = 2 * images() - 1, image_draws(5, INDEX)
    t = torch.full((3,), 60)
    net = purifier("ddpm", t_star=60, nfe=60)
    expected = ddpm_sample(
        net.model,
        SCHEDULE,
        SCHEDULE.q_sample(x, t, noise(0, x)),
        61,
        "truncated",
        noise=lambda i: noise(1 + 2 * i, x),
    )
    assert torch.equal(net.purify(x, noise), expected)
    net = purifier("edm-sde", t_star=60, nfe=8)
    expected = heun_sample(
        net.model,
        SCHEDULE,
        SCHEDULE.q_sample(x, t, noise(0, x)),
        8,
        6,
        0.01,
        0.46,
        1.007,
        t_start=60,
        noise=lambda i: noise(1 + 2 * i, x),
    )
    assert torch.equal(net.purify(x, noise), expected)


def test_gdmp_guidance():
    x, y = (a.requires_grad_() for a in (draw(2, 3, 12, 12), draw(2, 3, 12, 12, seed=1)))
    (grad,) = torch.autograd.grad((x - y).square().flatten(1).mean(1).sum(), x)
    torch.testing.assert_close(purification.guidance(x, y, "mse"), -grad * 216)
    assert torch.allclose(purification.ssim(x, x), torch.ones(2, dtype=torch.float64))
    p, q = np.full((1, 1, 21, 21), 0.3), np.full((1, 1, 21, 21), 0.7)
    p[0, 0, 10, 10] = 0.5  # one pixel: its window weighs it by w
    g = np.exp(-((np.arange(11) - 5.0) ** 2) / 4.5)
    w = np.outer(g, g) / g.sum() ** 2
    m, var = 0.3 + 0.2 * w, 0.04 * w * (1 - w)
    inner = (
        (2 * m * 0.7 + 1e-4) / (m**2 + 0.49 + 1e-4) * 9e-4 / (var + 9e-4)
    )  # where the window lies inside: 11 x 11 places
    flat = purification.ssim(
        torch.full((1, 1, 21, 21), 0.3, dtype=torch.float64), torch.from_numpy(q)
    ).item()
    away = (2 * 0.3 * 0.7 + 1e-4) / (0.09 + 0.49 + 1e-4)
    change = purification.ssim(torch.from_numpy(p), torch.from_numpy(q)).item() - flat
    assert change == pytest.approx((inner - away).sum() / 441, rel=1e-9)
    x0, noise = 2 * images() - 1, image_draws(0, INDEX)
    plain, off, on = (
        purifier(s, scale=scale, rounds=1).purify(x0, noise)
        for s, scale in (("gdmp", 1), ("gdmp-mse", 0), ("gdmp-mse", 400))
    )
    assert torch.equal(plain, off) and (on - x0).norm() < 0.9 * (off - x0).norm()


def test_known_and_unknown_noise():
    net, x = purifier(), images()
    both, fwd = image_draws(0, INDEX), image_draws(0, INDEX, draw=9, forward=0)
    assert torch.equal(net(x, both), net(x, both))  # DW_Both is deterministic
    assert not torch.equal(net(x), net(x))  # White-box is not
    assert torch.equal(fwd(0, x), both(0, x)) and torch.equal(
        fwd(purification.ROUND, x), both(purification.ROUND, x)
    )
    assert not torch.equal(fwd(1, x), both(1, x)) and not torch.equal(
        fwd(0, x), image_draws(0, INDEX, 9)(0, x)
    )
    torch.testing.assert_close(
        net(x[1:2], image_draws(0, INDEX[1:2])), net(x, both)[1:2]
    )  # whatever the batch
    net.noise = both  # what an attack library runs on
    assert torch.equal(net(x), net(x, both))
    ddim = purifier("ddim")
    torch.testing.assert_close(
        ddim(x, fwd), ddim(x, both), rtol=0, atol=0
    )  # DDIM has no other noise


def test_known_noise_of_another_number_of_images_is_refused():
    """One row would else be broadcast to all, and a library that drops images get other noise."""
    for index in (INDEX[:1], INDEX[:2]):
        with pytest.raises(ValueError, match=r"known noise of \d images for 3"):
            purifier()(images(), image_draws(0, index))


@pytest.mark.parametrize("sampler", ["ddpm", "gdmp", "edm-sde"])
def test_known_noise_follows_its_image(sampler):
    """Attacked images in another order, one left out, one twice, as APGD calls its model."""
    clean = images()
    net = purifier(sampler)
    net.noise = following(clean, seed=0)
    right = net(clean, image_draws(0, torch.arange(3)))
    attacked = (clean + 8 / 255 * draw(3, 3, 6, 6).sign()).clamp(0, 1)
    wanted = net(attacked, image_draws(0, torch.arange(3)))
    assert torch.equal(net(clean), right)
    for rows in ([2, 0], [1], [0, 0, 2, 1]):
        torch.testing.assert_close(net(attacked[rows]), wanted[rows], rtol=1e-9, atol=1e-11)


def test_what_the_attack_knows():
    def values(knowledge, k, **kw):
        return [
            noise(1, images()).double()
            for noise in purification.noises(knowledge, 0, INDEX, k, **kw)
        ]

    evaluation = image_draws(0, INDEX)(1, images())
    assert torch.equal(values("both", 0)[0], evaluation) and torch.equal(
        values("both", 5)[0], evaluation
    )
    semi = values("semi-3", 2)
    assert (
        len(semi) == 3
        and torch.equal(semi[0], evaluation)
        and torch.equal(semi[2], values("semi-3", 0)[2])
    )
    for knowledge in ("white", "fwd"):
        fresh = [v for k in range(3) for v in values(knowledge, k, eot=2)] + [evaluation]
        assert len({v.sum().item() for v in fresh}) == 7
    assert torch.equal(
        *(purification.noises(k, 0, INDEX, 1)[0](0, images()) for k in ("fwd", "both"))
    )


def test_input_outside_the_unit_interval_is_refused():
    net = purifier()
    for bad in (2 * images() - 1, 255 * images(), images() * math.nan, images()[0]):
        with pytest.raises(ValueError, match="need .B, C, H, W. in .0, 1."):
            net(bad)
    for kw in (
        dict(sampler="ddpm2"),
        dict(t_star=1000),
        dict(nfe=0),
        dict(t_star=10, nfe=20),
        dict(rounds=0),
    ):
        with pytest.raises(ValueError):
            purifier(**kw)


# the attack ----------------------------------------------------------------------------------------------------------


def test_pgd_on_a_linear_classifier():
    """Two classes: the gradient's direction never changes, so the end is at the border of the ball and of the box."""
    classifier, y = linear(), torch.tensor([0, 1, 0])
    net, x = purifier("none", classifier=classifier), images()
    x[0, 0, 0, :3], x[1, 1, 1, :3] = 0.0, 1.0
    w = (classifier[1].weight[1] - classifier[1].weight[0]).view(3, 6, 6).detach()
    way = torch.stack([w, -w, w])
    x_adv, checks = purification.pgd(net, x, y, lambda k: [None], "linf", steps=5)
    torch.testing.assert_close(x_adv, (x + 8 / 255 * way.sign()).clamp(0, 1))
    assert (
        not checks["outside"].any()
        and checks["rises"].all()
        and not checks["zero"].any()
        and not checks["nonfinite"].any()
    )
    x = images() * 0.2 + 0.4  # away from the box
    x_adv, checks = purification.pgd(net, x, y, lambda k: [None], "l2", steps=7)
    torch.testing.assert_close(x_adv, x + 0.5 * way / w.norm())
    assert not checks["outside"].any() and checks["rises"].all()
    few, _ = purification.pgd(net, x, y, lambda k: [None], "l2", steps=3)
    torch.testing.assert_close(few, x + 0.3 * way / w.norm())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_keeps_to_the_ball_and_the_box(norm):
    x = images().round()  # on the border of the box
    x_adv, checks = purification.pgd(
        purifier(),
        x,
        INDEX % 2,
        lambda k: purification.noises("white", 0, INDEX, k, 2),
        norm,
        steps=8,
    )
    size = (x_adv - x).flatten(1).norm(dim=1, p=math.inf if norm == "linf" else 2)
    assert x_adv.min() >= 0 and x_adv.max() <= 1 and (size > 0.01).all()
    assert (size <= purification.NORMS[norm][0] + 1e-9).all() and not checks["outside"].any()


def test_eot_averages_gradients():
    net, x, draws = purifier(), images(), [image_draws(0, INDEX, d) for d in range(3)]
    both = over_draws(gradient_of, net, x, INDEX % 2, draws)
    each = [over_draws(gradient_of, net, x, INDEX % 2, [d]) for d in draws]
    torch.testing.assert_close(both, sum(each) / 3)


@pytest.mark.parametrize("eot_batch", [2, 3, 7])
@pytest.mark.parametrize("knowledge", ["white", "fwd", "semi-4"])
def test_batched_draws_are_the_draws(knowledge, eot_batch):
    """5 draws (of semi 4) in one larger batch, or in some: the loss, its gradient and the hits are those of single draws."""
    net, x, y = purifier("vp-sde-corrector"), images(), INDEX % 2
    draws = purification.noises(knowledge, 0, INDEX, 1, 5)
    for quantity in (loss_of, gradient_of):
        one = over_draws(quantity, net, x, y, draws)
        many = over_draws(quantity, net, x, y, draws, eot_batch)
        torch.testing.assert_close(many, one, rtol=1e-9, atol=1e-12)
    hits = [
        purification.correct(net, x, y, 0, INDEX, knowledge, range(4), b) for b in (1, eot_batch)
    ]
    assert torch.equal(*hits)


def test_noise_is_a_function_of_seed_image_draw_and_number():
    """As data.image_noise gives it; also for a seed beyond 64 bits, of which the lower 64 count."""
    x = images()
    for seed in (0, 3, 2**63 + 5, 2**70 + 3):
        want = image_noise(seed + (8 << 32), INDEX, 4, x.shape[1:]).double()
        assert torch.equal(image_draws(seed, INDEX, 7)(4, x), want)


def test_gradient_survives_float16():
    """A classifier that runs in float16 and is sure: its gradients, about 1e-9, would be 0 there."""
    w = (0.01 * draw(2, 108)).half()

    def classifier(x):
        return x.flatten(1).half() @ w.T + torch.tensor([[14.0, 0], [0, 14], [14, 0]]).half()

    net = PurifiedClassifier(nn.Identity(), SCHEDULE, Function(classifier), "none")
    grad = over_draws(gradient_of, net, images().float(), INDEX % 2, [None]).double()
    way = torch.stack([w[1] - w[0], w[0] - w[1], w[1] - w[0]]).double()
    assert torch.cosine_similarity(grad.flatten(1), way, dim=1).min() > 0.99
    assert (grad.abs().amax((1, 2, 3)) < 1e-6).all()  # not scaled


def test_the_range_is_looked_at_unless_told_otherwise():
    net, bad = purifier("none", check_range=False), 2 * images() - 1
    assert torch.equal(net(bad), net.classifier(bad))
    with pytest.raises(ValueError, match="need .B, C, H, W."):
        net(bad[0])


def test_checks_report_what_goes_wrong():
    class Broken(nn.Module):
        factor = 0.0

        def forward(self, x):
            return torch.stack([self.factor * x.sum((1, 2, 3)), x.new_zeros(len(x))], dim=1)

    def violated(factor):
        net = purifier("none", classifier=Broken())
        net.classifier.factor = factor
        _, row = purification.pgd(net, images(), INDEX % 2, lambda k: [None], steps=2)
        return " ".join(
            purify.summarise(row | dict(robust=torch.ones(3, dtype=torch.float64)))["violated"]
        )

    assert "exactly 0 in 100" in violated(0.0) and "only 0% of the images" in violated(0.0)
    assert "NaN or infinite for 3" in violated(math.nan)
    assert violated(0.01) == ""


class Spy(nn.Module):
    """Classifies by a linear network; records draw 0 (of Eq. 2) and draw 1 of every call."""

    def __init__(self):
        super().__init__()
        self.linear = linear()
        self.gradients = []
        self.values = []

    def forward(self, x, noise):
        calls = self.gradients if x.requires_grad else self.values
        calls.append(tuple(round(noise(k, x).sum().item(), 9) for k in (0, 1)))
        return self.linear(x)


def settings(**kw):
    return argparse.Namespace(**(dict(seed=0, eot=2, eot_batch=1, pgd=3, evaluations=1) | kw))


@pytest.mark.parametrize("knowledge", ["white", "fwd", "both", "semi-4"])
def test_noise_of_the_attack_and_of_the_evaluation(knowledge):
    """P2's Algorithm: fresh draws in every step and an unseen one to judge, but for what is known."""
    spy, x = Spy(), images()
    purify.evaluate(spy, x, INDEX % 2, INDEX, settings(), knowledge, "linf")
    judge = tuple(round(image_draws(0, INDEX)(k, x).sum().item(), 9) for k in (0, 1))
    assert spy.values[-2:] == [judge, judge]  # after the attack and before it
    losses = spy.values[:-2]
    start, end = losses[: len(losses) // 2], losses[len(losses) // 2 :]
    assert start == end  # the rise of the loss is measured with equal noise
    if knowledge == "both":
        assert spy.gradients == [judge] * 3 and start == [judge]
    elif knowledge == "semi-4":
        draws = spy.gradients[:4]
        assert len(set(draws)) == 4 and judge in draws
        assert spy.gradients == 3 * draws and start == draws
    else:
        assert (len(spy.gradients), len(start)) == (3 * 2, 2)  # pgd x eot
        later = [draw[1] for draw in spy.gradients + start + [judge]]
        assert len(set(later)) == len(later)
        of_eq2 = {draw[0] for draw in spy.gradients + start}
        if knowledge == "fwd":
            assert of_eq2 == {judge[0]}
        else:
            assert len(of_eq2) == 8 and judge[0] not in of_eq2


def test_clean_and_robust_accuracy_differ():
    """Images 1, 2 and 10 hundredths from the border of a linear classifier, in steps of 2/255."""
    classifier = linear()
    w = (classifier[1].weight[1] - classifier[1].weight[0]).detach()
    classifier[1].bias.data = torch.stack([w.sum() / 2, torch.zeros(())])  # 0.5 is on the border
    margins = torch.tensor([0.01, 0.02, 0.1], dtype=torch.float64)
    x = 0.5 + margins.view(-1, 1, 1, 1) * w.sign().view(3, 6, 6)
    net, y = purifier("none", classifier=classifier), torch.ones(3, dtype=torch.long)
    for steps, robust in ((1, [1, 1, 1]), (2, [0, 1, 1]), (3, [0, 0, 1]), (20, [0, 0, 1])):
        row = purify.evaluate(net, x, y, INDEX, settings(pgd=steps), "no noise", "linf")
        assert row["clean"].tolist() == [1, 1, 1] and row["robust"].tolist() == robust
        found = purify.summarise(row)
        assert found["clean"] == 1 and found["robust"] == pytest.approx(sum(robust) / 3)


def test_the_flags_reach_the_attack(files, tmp_path, monkeypatch):
    seen, attack = [], purify.pgd

    def watched(net, x, y, draws, norm, steps, eot_batch):
        seen.append((norm, steps, len(draws(0)), eot_batch))
        return attack(net, x, y, draws, norm, steps, eot_batch)

    monkeypatch.setattr(purify, "pgd", watched)
    flags = "--purifier ddpm --knowledge white semi-2 --norm linf l2 --pgd 2 --eot 3 --eot-batch 2"
    common = "--data synthetic:64 --n 2 --nfe 1 --device cpu --amp fp32"
    paths = ["--ckpt", files / "a/ckpt.pt", "--classifier", files / "classifier.pt"]
    assert run(*paths, *common.split(), *flags.split(), "--out", tmp_path) == 0
    assert seen == [(norm, 2, eot, 2) for norm in ("linf", "l2") for eot in (3, 2)]


def test_ssim_guidance_raises_ssim():
    x, y = 0.3 * draw(2, 3, 12, 12), 0.3 * draw(2, 3, 12, 12, seed=1)
    way = purification.guidance(x, y, "ssim")
    change = purification.ssim(x + 1e-6 * way, y) - purification.ssim(x, y)
    slope = way.square().flatten(1).sum(1) / (x[0].numel() / 2)  # guidance: numel / 2 x gradient
    torch.testing.assert_close(change / 1e-6, slope, rtol=1e-4, atol=1e-9)


def test_defaults_of_p2():
    assert purification.NORMS == {"linf": (8 / 255, 2 / 255), "l2": (0.5, 0.1)}
    assert purifier("edm-sde", nfe=None).nfe == 50 and purifier().snr == 0.16


def test_candidates_are_chosen_by_several_evaluations(monkeypatch):
    """A candidate that fools one purification in two loses to the image itself if that is always misclassified."""

    class Coin(nn.Module):
        def forward(self, x, noise):
            right = torch.where(
                x.flatten(1)[:, 0] > 0.5, noise(0, x).flatten(1)[:, 0] > 0, False
            ).double()
            return torch.stack([right, 1 - right], dim=1)

    args = settings(eot=1, pgd=1, evaluations=40)
    x, y = torch.full((3, 3, 6, 6), 0.4, dtype=torch.float64), torch.zeros(3, dtype=torch.long)
    monkeypatch.setattr(purify, "pgd", lambda net, x, *a: (x + 0.2, {}))
    assert purify.evaluate(Coin(), x, y, INDEX, args, "white", "linf")["selected"].tolist() == [
        0,
        0,
        0,
    ]
    monkeypatch.setattr(purify, "pgd", lambda net, x, *a: (x + 0.1, {}))  # 0.5: never right
    row = purify.evaluate(Coin(), x + 0.2, y, INDEX, args, "white", "linf")
    assert 0.2 < row["selected"].mean() < 0.8  # both are right by chance


# the command ---------------------------------------------------------------------------------------------------------


def run(*args):
    return cli.call(purify, *args)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    out = tmp_path_factory.mktemp("purify")
    torch.manual_seed(0)
    net, clf = (
        UNet(channels=(32, 32), attention=(False, False), blocks=1, dropout=0.0),
        WideResNet(10, 1, 10),
    )
    nn.init.normal_(net.conv_out.weight, std=0.02)
    for name in ("a", "b"):
        (out / name).mkdir()
        save_checkpoint(
            out / name / "ckpt.pt",
            dict(
                kind="unet",
                config=net.config,
                image_size=8,
                model=net.state_dict(),
                ema=net.state_dict(),
                args=dict(data="synthetic:64"),
            ),
        )
    save_checkpoint(
        out / "classifier.pt", dict(kind="classifier", config=clf.config, model=clf.state_dict())
    )
    return out


def test_command(files, tmp_path):
    common = [
        "--ckpt",
        files / "a/ckpt.pt",
        files / "b/ckpt.pt",
        "--classifier",
        files / "classifier.pt",
        "--data",
        "synthetic:64",
        "--n",
        4,
        "--pgd",
        1,
        "--eot",
        1,
        "--nfe",
        1,
        "--device",
        "cpu",
        "--amp",
        "fp32",
    ]
    assert (
        run(
            *common,
            "--purifier",
            "none",
            "ddpm",
            "--knowledge",
            "white",
            "semi-2",
            "--evaluations",
            2,
            "--figures",
            2,
            "--batch-size",
            4,
            "--out",
            tmp_path / "one",
        )
        == 0
    )
    names = {f.name for f in (tmp_path / "one").iterdir()}
    assert {"purify.png", "figures.png", "table.csv", "table.md", "metrics.json"} <= names
    record = json.loads((tmp_path / "one" / "metrics.json").read_text())
    assert [d["calls"] for d in record["runs"]] == [0, 2, 2] * 2 and set(record["directions"]) == {
        "a",
        "b",
    }
    a, b = (
        [
            {k: v for k, v in d.items() if k not in ("checkpoint", "seconds")}
            for d in record["runs"][i : i + 3]
        ]
        for i in (0, 3)
    )
    assert a == b  # equal weights
    assert (tmp_path / "one" / "table.md").read_text().count("\n") == 2 + 4
    assert (
        run(
            *common,
            "--purifier",
            "ddpm",
            "--knowledge",
            "semi-2",
            "--batch-size",
            3,
            "--out",
            tmp_path / "two",
        )
        == 0
    )
    again = json.loads((tmp_path / "two" / "metrics.json").read_text())["runs"][0]
    assert again["loss_end"] == pytest.approx(a[2]["loss_end"], rel=1e-4)  # whatever the batch
    assert (
        run(
            *common,
            "--purifier",
            "ddpm",
            "--knowledge",
            "semi-2",
            "--eot-batch",
            2,
            "--amp",
            "bf16",
            "--out",
            tmp_path / "three",
        )
        == 0
    )
    half = json.loads((tmp_path / "three" / "metrics.json").read_text())["runs"][0]
    assert half["loss_end"] != again["loss_end"] and half["loss_end"] == pytest.approx(
        again["loss_end"], rel=0.02
    )


def test_command_refuses_bad_input(capsys, files, tmp_path):
    def refuse(*args):
        assert (
            run(
                "--ckpt",
                files / "a/ckpt.pt",
                "--classifier",
                files / "classifier.pt",
                "--data",
                "synthetic:64",
                "--device",
                "cpu",
                "--out",
                tmp_path,
                *args,
            )
            == 2
        )
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        return lines[0]

    assert "--knowledge grey" in refuse("--knowledge", "grey")
    assert "--knowledge semi-0" in refuse("--knowledge", "semi-0")
    assert "--n 65" in refuse("--n", 65)
    assert "--eot 0" in refuse("--eot", 0)
    assert "--eot-batch 0" in refuse("--eot-batch", 0)
    assert "--amp fp16" in refuse("--amp", "fp16")
    assert "--nfe 101" in refuse("--nfe", 101)
    assert "--t-star 1000" in refuse("--t-star", 1000)
    assert "--figures" in refuse("--figures", 2, "--purifier", "none")
    assert "two checkpoints lie in a folder a" in refuse(
        "--ckpt", files / "a/ckpt.pt", files / "a/ckpt.pt"
    )
    assert "holds no classifier" in refuse("--classifier", files / "a/ckpt.pt")
    few = WideResNet(10, 1, 3)
    save_checkpoint(
        tmp_path / "few.pt", dict(kind="classifier", config=few.config, model=few.state_dict())
    )
    assert "knows 3 classes" in refuse("--classifier", tmp_path / "few.pt")


@pytest.mark.parametrize("library", ["torchattacks", "foolbox", "autoattack"])
def test_public_attack_libraries_run_on_it(library):
    module = pytest.importorskip(library)
    net, x, y = (
        purifier(model=Eps().float(), classifier=linear().float()),
        images().float(),
        INDEX % 2,
    )
    if library == "torchattacks":
        x_adv = module.PGD(net, eps=8 / 255, alpha=2 / 255, steps=2)(x, y)
    elif library == "foolbox":
        fmodel = module.PyTorchModel(net, bounds=(0, 1), device="cpu")
        _, x_adv, _ = importlib.import_module("foolbox.attacks").LinfPGD(steps=2)(
            fmodel, x, y, epsilons=8 / 255
        )
    else:
        attack = module.AutoAttack(
            net,
            eps=8 / 255,
            version="custom",
            attacks_to_run=["apgd-ce"],
            device="cpu",
            verbose=False,
        )
        attack.apgd.n_iter = 2
        x_adv = attack.run_standard_evaluation(x, y, bs=3)
    assert x_adv.shape == x.shape and (x_adv - x).abs().max() <= 8 / 255 + 1e-6


def test_gdmp_is_guided_by_the_given_image_in_every_round(monkeypatch):
    """A model that denoises to 0: from the second round on, the sample has forgotten the image, the guide has not."""
    guides = []
    monkeypatch.setattr(
        purification, "guidance", lambda x, y, kind: guides.append(y.clone()) or torch.zeros_like(x)
    )

    def model(x, t):  # x^_0 = 0
        return x / (1 - SCHEDULE.alphas_bar[t]).sqrt().view(-1, 1, 1, 1)

    net = purification.PurifiedClassifier(
        model,
        SCHEDULE,
        torch.nn.Identity(),
        "gdmp-mse",
        t_star=20,
        nfe=2,
        rounds=2,
        noise=lambda k, x: torch.zeros_like(x),
    )
    given = torch.full((1, 3, 8, 8), 0.9, dtype=torch.float64)
    net.purify(given)
    want = [SCHEDULE.alphas_bar[t].sqrt() * 0.9 for t in (20, 10, 0)] * 2
    assert len(guides) == 6 and all(torch.allclose(g, w.expand_as(g)) for g, w in zip(guides, want))
