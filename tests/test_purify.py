"""purification.py: exact gradients, known noise, every sampler on Gaussian data; purify.py: the
command."""

import json
import math
import shutil

import cli
import numpy as np
import pytest
import torch
from PIL import Image
from purifiers import INDEX, SCHEDULE, Eps, draw, images, linear, purifier
from torch import nn

import purification
import purify
import purify_attack
from classifier import WideResNet
from purification import image_draws, purification_timesteps
from runtime import save_checkpoint
from samplers import ddpm_sample, edm_follow, heun_sample
from unet import UNet

# the purifier -------------------------------------------------------------------------------------


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
    """Checkpointed = plain, and = finite differences along a random direction, clipping
    included."""
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
    """With the true score of N(0, v), purified samples of N(0, v) are N(0, v), and follow their
    image as posteriors do."""
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
    """Same noise, path by path; the difference is of first order in the step. EM's noise of the
    last step is left out."""
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


def test_vp_sde_with_and_without_the_noise_of_the_last_step():
    """DiffPure's last step, from t = 0, is mean + sqrt(beta_0) z; P2's code returns the mean."""
    for sampler in ("vp-sde", "vp-sde-corrector"):
        x, noise = draw(2, 3, 6, 6), image_draws(3, torch.arange(2))
        kept, removed = (
            purifier(sampler, noise_removal=flag).purify(x, noise) for flag in (False, True)
        )
        beta = -math.log(1 - SCHEDULE.betas[0])
        torch.testing.assert_close(kept - removed, math.sqrt(beta) * noise(1 + 2 * 5, x))


def test_corrector_step_has_the_signal_to_noise_ratio():
    """Song et al. (2021), Alg. 5: x + size score + sqrt(2 size) z with |size score| = snr
    sqrt(alpha_t) |sqrt(2 size) z|."""
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
    x_t = SCHEDULE.q_sample(x, t, noise(0, x))
    churn = dict(S_churn=6, S_min=0.01, S_max=0.46, S_noise=1.007)
    expected = heun_sample(
        net.model, SCHEDULE, x_t, 8, **churn, clip=False, t_start=60,
        noise=lambda i: noise(1 + 2 * i, x),
    )  # fmt: skip
    assert expected.abs().max() > 1
    torch.testing.assert_close(net.purify(x, noise), expected.clamp(-1, 1))


@pytest.mark.parametrize("sampler, churn", [("edm-ode", 0.0), ("edm-sde", 6.0)])
def test_edm_as_in_p2(sampler, churn):
    """App. F: from x + .5 N(0, I), 50 steps at continuous sigma, x^_0 clamped at the
    output alone."""
    x, noise = 2 * images() - 1, image_draws(5, INDEX)
    expected = edm_follow(
        Eps(), SCHEDULE, x + 0.5 * noise(0, x), 0.5, 50, churn, 0.01, 0.46, 1.007, False,
        lambda i: noise(1 + 2 * i, x),
    )  # fmt: skip
    net = purifier(sampler, nfe=None)
    assert expected.abs().max() > 1 and net.sigma_max == 0.5
    torch.testing.assert_close(net.purify(x, noise), expected.clamp(-1, 1))
    assert net.calls == 99
    net = purifier(sampler, nfe=None, clip=False)
    torch.testing.assert_close(net.purify(x, noise), expected)


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


@pytest.mark.parametrize("kind", ["mse", "ssim"])
def test_gdmp_pull_is_the_gradient_times_the_variance(kind):
    """Added to DDPM's step: - scale s_t beta numel / 2 grad_x_t (MSE or 1 - SSIM) against the given
    image, diffused to the same t, with s_t = sqrt((1 - abar) / abar)."""
    x, noise = 2 * images(shape=(3, 12, 12)) - 1, image_draws(0, INDEX)

    def inputs(sampler):
        """x_t at t = 36 and at t = 0."""
        seen = []

        def model(x_t, t):
            seen.append(x_t)
            return 0.3 * x_t

        net = purifier(sampler, model, t_star=36, nfe=1, rounds=1, scale=40.0)
        net.purify(x, noise)
        return seen

    x_t, after = inputs("gdmp")
    x_t.requires_grad_()
    abar, abar_prev = SCHEDULE.alphas_bar[36], SCHEDULE.alphas_bar[0]
    guide = abar.sqrt() * x + (1 - abar).sqrt() * noise(2, x)
    if kind == "mse":
        distance = (x_t - guide).square().flatten(1).mean(1)
    else:
        distance = 1 - purification.ssim(x_t, guide)
    (gradient,) = torch.autograd.grad(distance.sum(), x_t)
    variance = 1 - abar / abar_prev
    moved = -40 * ((1 - abar) / abar).sqrt() * variance * 432 / 2 * gradient
    torch.testing.assert_close(inputs(f"gdmp-{kind}")[1], after + moved)


def test_coup_adds_the_slope_of_the_log_confidence_to_the_score():
    """Two classes, log p in closed form: its slope is (1 - p) times the weights' difference, halved
    by x = (x_t + 1) / 2; one step by hand (P2 Eq. 12)."""
    classifier, x, noise = linear(), 2 * images() - 1, image_draws(0, INDEX)
    net = purifier("coup", lambda x, t: 0.3 * x, classifier, t_star=50, nfe=1, coup=2.5)
    w = (classifier[1].weight[0] - classifier[1].weight[1]).detach()
    bias = (classifier[1].bias[0] - classifier[1].bias[1]).item()
    abar = torch.cat([torch.ones(1), SCHEDULE.alphas_bar]).double()  # at t + 1
    x_t = SCHEDULE.q_sample(x, torch.full((3,), 50), noise(0, x))
    for i, (t, t_prev) in enumerate(((50, 0), (0, -1))):
        margin = ((x_t + 1) / 2).flatten(1) @ w + bias
        slope = torch.sigmoid(-margin.abs()) * margin.sign() / 2
        score = -0.3 * x_t / (1 - abar[t + 1]).sqrt()
        score = score + 2.5 * slope.view(3, 1, 1, 1) * w.view(3, 6, 6)
        b = (abar[t_prev + 1] / abar[t + 1]).log()
        x_t = (1 + b / 2) * x_t + b * score + b.sqrt() * noise(1 + 2 * i, x)
    torch.testing.assert_close(net.purify(x, noise), x_t, rtol=1e-6, atol=1e-6)
    plain = purifier("vp-sde", lambda x, t: 0.3 * x, t_star=50, nfe=1).purify(x, noise)
    off = purifier("coup", lambda x, t: 0.3 * x, classifier, t_star=50, nfe=1, coup=0)
    torch.testing.assert_close(off.purify(x, noise), plain)


def test_the_slope_of_a_guide_keeps_its_arguments_alone():
    """Its derivatives are autograd's of autograd, in both arguments; of what lies between nothing
    is kept."""
    x, y = (draw(2, 3, 12, 12, seed=seed).requires_grad_() for seed in (0, 1))
    v = draw(2, 3, 12, 12, seed=2)
    (plain,) = torch.autograd.grad(purification.ssim(x, y).sum(), x, create_graph=True)
    wanted = torch.autograd.grad((plain * v).sum(), (x, y))
    slope = purification.Slope.apply(purification.ssim, x, y)
    assert [kept.shape for kept in slope.grad_fn.saved_tensors] == [x.shape, y.shape]
    assert [type(f).__name__ for f, _ in slope.grad_fn.next_functions] == ["AccumulateGrad"] * 2
    torch.testing.assert_close(slope, plain)
    found = torch.autograd.grad((slope * v).sum(), (x, y))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    assert all(g.abs().max() > 0 for g in found)


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


def test_the_range_is_looked_at_unless_told_otherwise():
    net, bad = purifier("none", strict=False), 2 * images() - 1
    assert torch.equal(net(bad), net.classifier(bad))
    with pytest.raises(ValueError, match="need .B, C, H, W."):
        net(bad[0])


def test_gdmp_is_guided_by_the_given_image_in_every_round(monkeypatch):
    """A model that denoises to 0: from the second round on, the sample has forgotten the image, the
    guide has not."""
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


def test_ssim_guidance_raises_ssim():
    x, y = 0.3 * draw(2, 3, 12, 12), 0.3 * draw(2, 3, 12, 12, seed=1)
    way = purification.guidance(x, y, "ssim")
    change = purification.ssim(x + 1e-6 * way, y) - purification.ssim(x, y)
    slope = way.square().flatten(1).sum(1) / (x[0].numel() / 2)  # guidance: numel / 2 x gradient
    torch.testing.assert_close(change / 1e-6, slope, rtol=1e-4, atol=1e-9)


def test_defaults_of_p2():
    assert purify_attack.NORMS == {"linf": (8 / 255, 2 / 255), "l2": (0.5, 0.1)}
    assert purifier("edm-sde", nfe=None).nfe == 50 and purifier().snr == 0.16


# the command --------------------------------------------------------------------------------------


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
            "--eot",
            1,
            "--evaluations",
            2,
            "--figures",
            2,
            "--landscape",
            2,
            "--batch-size",
            4,
            "--out",
            tmp_path / "one",
        )
        == 0
    )
    names = {f.name for f in (tmp_path / "one").iterdir()}
    assert {"purify.png", "figures.png", "landscape.png", "table.csv", "table.md"} <= names
    record = json.loads((tmp_path / "one" / "metrics.json").read_text())
    assert [d["calls"] for d in record["runs"]] == [0, 2, 2] * 2 and set(record["directions"]) == {
        "a",
        "b",
    }
    paired = [f"{key}_{of}" for key in ("clean", "robust") for of in ("gained", "lost", "p")]
    assert [[d.get(key) for key in paired] for d in record["runs"][3:]] == [[0, 0, 1.0] * 2] * 3
    a, b = (
        [
            {k: v for k, v in d.items() if k not in ("checkpoint", "seconds", *paired)}
            for d in record["runs"][i : i + 3]
        ]
        for i in (0, 3)
    )
    assert a == b  # equal weights
    lines = (tmp_path / "one" / "table.md").read_text().splitlines()
    assert (
        len(lines) == 2 + 4 + 6 + 2
        and lines[-1] == "| b | ddpm | linf semi-2 | +0 -0, 1 | +0 -0, 1 |"
    )
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


@pytest.mark.parametrize("flags", ["", "--noise-removal", "--no-checkpoint"])
def test_flags_reach_the_purifier(files, tmp_path, monkeypatch, flags):
    seen, attack = [], purify.pgd

    def watched(net, *rest):
        seen.append((net.noise_removal, net.checkpointed))
        return attack(net, *rest)

    monkeypatch.setattr(purify, "pgd", watched)
    common = "--data synthetic:64 --n 2 --nfe 1 --device cpu --purifier vp-sde --pgd 1 --eot 1"
    paths = ["--ckpt", files / "a/ckpt.pt", "--classifier", files / "classifier.pt"]
    assert run(*paths, *common.split(), *flags.split(), "--out", tmp_path) == 0
    assert set(seen) == {(flags == "--noise-removal", flags != "--no-checkpoint")}


def test_a_stopped_run_goes_on_bit_for_bit(files, tmp_path, monkeypatch, capsys):
    """Killed in the second batch of the second attack: what was done is not done again."""
    flags = (
        "--data synthetic:64 --n 5 --pgd 1 --eot 1 --nfe 1 --device cpu --amp fp32 --batch-size 2"
    )
    argv = ["--ckpt", files / "a/ckpt.pt", "--classifier", files / "classifier.pt", *flags.split()]
    argv += ["--purifier", "ddpm"]
    assert run(*argv, "--out", tmp_path / "whole") == 0
    attack, seen = purify.evaluate, []

    def watched(net, x, y, index, *rest):
        seen.append(index.tolist())
        if len(seen) == 5:
            raise KeyboardInterrupt
        return attack(net, x, y, index, *rest)

    monkeypatch.setattr(purify, "evaluate", watched)
    assert run(*argv, "--out", tmp_path / "parts") == 130
    assert not (tmp_path / "parts/metrics.json").exists()
    shutil.copytree(tmp_path / "parts", tmp_path / "threes")
    assert run(*argv, "--out", tmp_path / "parts", "--resume") == 0
    assert seen == [[0, 1], [2, 3], [4], [0, 1], [2, 3], [2, 3], [4]]
    whole, parts = (torch.load(tmp_path / f / "rows-0.pt")["attacks"] for f in ("whole", "parts"))
    assert list(whole) == list(parts) and len(whole) == 2
    for key, value in whole.items():
        assert value["calls"] == parts[key]["calls"] == 2
        for name, row in value["rows"].items():
            assert torch.equal(row, parts[key]["rows"][name])
    records = [json.loads((tmp_path / f / "metrics.json").read_text()) for f in ("whole", "parts")]
    for record in records:
        for row in record["runs"]:
            del row["seconds"]
    assert records[0]["runs"] == records[1]["runs"]
    assert run(*argv, "--batch-size", 3, "--out", tmp_path / "threes", "--resume") == 0
    assert seen[7:] == [[2, 3, 4]]
    assert run(*argv, "--eot", 2, "--out", tmp_path / "parts", "--resume") == 2
    assert "is of another --eot" in capsys.readouterr().err


def test_the_pairs_of_two_checkpoints(files, tmp_path, monkeypatch):
    """The first is wrong on image 0, which the second gets right."""
    right = iter([[0, 1, 1], [1, 1, 1]])

    def known(net, x, y, index, *rest):
        row = torch.tensor(next(right)).double()
        ones = torch.ones(len(x), dtype=torch.float64)
        checks = dict(outside=0 * ones, nonfinite=0 * ones, zero=0 * ones, rises=ones)
        return dict(robust=row, clean=ones, start=ones, end=ones, **checks)

    monkeypatch.setattr(purify, "evaluate", known)
    argv = ["--ckpt", files / "a/ckpt.pt", files / "b/ckpt.pt"]
    argv += ["--classifier", files / "classifier.pt", "--purifier", "ddpm", "--nfe", 1]
    argv += "--data synthetic:64 --n 3 --knowledge both --device cpu".split()
    assert run(*argv, "--out", tmp_path) == 0
    last = (tmp_path / "table.md").read_text().splitlines()[-1]
    assert last == "| b | ddpm | linf both | +0 -0, 1 | +1 -0, 1 |"


def test_more_images_and_attacks_join_a_finished_run(files, tmp_path, monkeypatch, capsys):
    """Of a folder too: its first images are the first of a larger n, and of all classes."""
    rng = np.random.default_rng(0)
    for name in "abcd":
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(20):
            image = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            image.save(tmp_path / f"data/{name}/{i}.png")
    common = ["--ckpt", files / "a/ckpt.pt", "--classifier", files / "classifier.pt"]
    common += ["--data", f"folder:{tmp_path / 'data'}", "--data-root", tmp_path / "cache"]
    common += "--pgd 1 --nfe 1 --device cpu --amp fp32 --purifier ddpm".split()
    whole, parts = (["--out", tmp_path / name] for name in ("whole", "parts"))
    assert run(*common, "--n", 12, "--knowledge", "both", "fwd", *whole) == 0
    assert run(*common, "--n", 8, "--knowledge", "both", *parts) == 0
    attack, seen = purify.evaluate, []

    def watched(net, x, y, index, *rest):
        seen.append((rest[-2], len(y)))
        return attack(net, x, y, index, *rest)

    monkeypatch.setattr(purify, "evaluate", watched)
    assert run(*common, "--n", 12, "--knowledge", "both", "fwd", *parts, "--resume") == 0
    assert seen == [("both", 4), ("fwd", 12)]
    assert run(*common, "--n", 5, "--knowledge", "fwd", *parts, "--resume") == 0
    assert len(seen) == 2  # fewer: nothing is left to do
    assert json.loads((tmp_path / "parts/metrics.json").read_text())["n"] == 5
    rows = [torch.load(tmp_path / name / "rows-0.pt")["attacks"] for name in ("whole", "parts")]
    assert list(rows[0]) == list(rows[1]) and len(rows[0]) == 2
    for key, value in rows[0].items():
        for name, row in value["rows"].items():
            assert torch.equal(row, rows[1][key]["rows"][name])
    shutil.rmtree(tmp_path / "data/d")
    assert run(*common, "--n", 12, "--knowledge", "both", *parts, "--resume") == 2
    assert "is of another --data" in capsys.readouterr().err
    (tmp_path / "data/d").mkdir()
    shutil.copytree(tmp_path / "data/c", tmp_path / "data/d", dirs_exist_ok=True)
    x, y = purify.first_images(common[5], 16, 12, tmp_path / "cache")
    first = purify.first_images(common[5], 16, 8, tmp_path / "cache")
    assert torch.equal(x[:8], first[0]) and torch.equal(y[:8], first[1])
    assert len(set(y.tolist())) == 4


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
    assert "--landscape 1" in refuse("--landscape", 1)
    assert "--figures: has no effect" in refuse("--figures", 2, "--purifier", "none")
    assert "--noise-removal" in refuse("--noise-removal", "--purifier", "ddpm")
    assert "two checkpoints lie in a folder a" in refuse(
        "--ckpt", files / "a/ckpt.pt", files / "a/ckpt.pt"
    )
    assert "holds no classifier" in refuse("--classifier", files / "a/ckpt.pt")
    few = WideResNet(10, 1, 3)
    save_checkpoint(
        tmp_path / "few.pt", dict(kind="classifier", config=few.config, model=few.state_dict())
    )
    assert "knows 3 classes" in refuse("--classifier", tmp_path / "few.pt")
