"""The toy's oracles: densities, distances and moments in closed form; networks side by side; the
command line."""

import argparse
import json
import math
import sys

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

import toy3d
import toy3d_data
import toy3d_sweep
from losses import NoiseSchedule, ddpm_loss, perturbation_radius, regulariser_weight, robust_loss

SETS = list(toy3d_data.CENTRES)
SCHEDULE = NoiseSchedule()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("t", [0, 50, 100, 500, 999])
def test_true_score_is_the_gradient_of_the_log_density(name, t):
    """Against autograd through torch.distributions' mixture, built from the definition of
    the set."""
    abar = SCHEDULE.alphas_bar[t].item()
    mean, scale = toy3d_data.standard(name)
    centres, cov = (toy3d_data.CENTRES[name] - mean) / scale, toy3d_data.COVARIANCE[name] / scale**2
    p_t = MixtureSameFamily(
        Categorical(torch.ones(len(centres), dtype=torch.float64)),
        MultivariateNormal(
            math.sqrt(abar) * centres, abar * cov + (1 - abar) * torch.eye(3).double()
        ),
    )
    x = torch.cat([p_t.sample((50,)), torch.randn(50, 3, dtype=torch.float64)]).requires_grad_()
    (grad,) = torch.autograd.grad(p_t.log_prob(x).sum(), x)
    assert (toy3d_data.true_score(name, x.detach(), abar) - grad).abs().max() < 1e-8 * max(
        1, grad.abs().max()
    )


@pytest.mark.parametrize("name", SETS)
def test_clean_points_have_the_stated_moments(name):
    x = toy3d_data.clean_points(name, 60_000, seeded())
    mean, scale = toy3d_data.standard(name)
    assert (x.mean(0) - mean).abs().max() < 0.07
    assert abs((x - mean).square().mean().sqrt().item() / scale - 1) < 0.01
    mode = torch.cdist(x, toy3d_data.CENTRES[name]).argmin(1)
    assert torch.bincount(mode).tolist() == [60_000 // len(toy3d_data.CENTRES[name])] * len(
        toy3d_data.CENTRES[name]
    )
    residual = x - toy3d_data.CENTRES[name][mode]
    assert (
        residual.T @ residual / len(x) - toy3d_data.COVARIANCE[name]
    ).abs().max() < 0.01 * toy3d_data.COVARIANCE[name].max()
    assert [round(toy3d_data.standard(n)[1], 3) for n in SETS] == [3.269, 7.205]  # the docstring's


def test_noise_is_the_stated_share_and_kind():
    n, share = 30_000, 0.3
    for name in SETS:
        mean, scale = toy3d_data.standard(name)
        clean = toy3d_data.training_points(name, "clean", n, share, seeded())
        outliers = toy3d_data.training_points(name, "outliers", n, share, seeded())
        inliers = toy3d_data.training_points(name, "inliers", n, share, seeded())
        k = round(share * n)
        for noisy in (outliers, inliers):
            assert torch.equal(noisy[k:], clean[k:]) and not (noisy[:k] == clean[:k]).all(1).any()
        u = (outliers[:k] - mean) / (toy3d_data.BOX * scale)  # uniform on [-1, 1]^3
        assert (
            u.abs().max() <= 1
            and u.mean(0).abs().max() < 0.01
            and (u.var(0) - 1 / 3).abs().max() < 0.01
        )
        d = toy3d_data.distance(name, inliers[:k])
        dims = 1 if name == "oblique-plane" else 3
        assert abs(d.square().mean().sqrt() / (toy3d_data.INLIER_SIGMA * dims**0.5) - 1) < 0.03
        for none in (0.0, 1.0):
            assert (
                toy3d_data.training_points(name, "outliers", 100, none, seeded()).isfinite().all()
            )


def test_distance_and_shares_in_closed_form():
    plane = torch.tensor([[10.0, 10, 10], [0, 0, 30], [11, 11, 11], [0, 0, 0]]).double()
    assert torch.allclose(
        toy3d_data.distance("oblique-plane", plane),
        torch.tensor([0, 0, 3**0.5, 10 * 3**0.5]).double(),
    )
    modes = torch.tensor([[10.0, 10, 10], [20, 20, 24], [10, 27, 26]]).double()
    assert torch.allclose(
        toy3d_data.distance("3-gaussians", modes), torch.tensor([0.0, 4, 5]).double()
    )
    numbers = toy3d_data.measure(
        "3-gaussians", toy3d_data.CENTRES["3-gaussians"][[0, 0, 1, 2]].repeat(250, 1), 0
    )
    assert (
        numbers["mode_weights"] == [0.5, 0.25, 0.25]
        and numbers["off_support"] == numbers["spread"] == 0
    )
    clean = toy3d_data.measure(
        "oblique-plane", toy3d_data.clean_points("oblique-plane", 20_000, seeded(1)), 0
    )
    # across the plane |N(0, SIGMA)|: mean SIGMA sqrt(2 / pi), 95 % at 1.96 SIGMA, 6e-5 beyond 4
    assert clean["off_support"] < 5e-4 and clean["spread"] == pytest.approx(1, abs=0.02)
    assert clean["distance_mean"] == pytest.approx(
        toy3d_data.SIGMA * (2 / math.pi) ** 0.5, rel=0.03
    )
    assert clean["distance_95"] == pytest.approx(1.96 * toy3d_data.SIGMA, rel=0.03)
    far = toy3d_data.measure(
        "3-gaussians", torch.full((10, 3), 1e4).double(), 0
    )  # a method that kept no point at all
    assert far["off_support"] == 1 and far["mode_weights"] == [0, 0, 0]


def test_sliced_w2_of_a_shift_and_of_a_scaling():
    x, c = (
        toy3d_data.clean_points("3-gaussians", 500, seeded()),
        torch.tensor([1.0, -2, 2]).double(),
    )
    assert toy3d_data.sliced_w2(x, x) == 0
    assert toy3d_data.sliced_w2(x, x[torch.randperm(500)] + c) == pytest.approx(
        3 / 3**0.5, abs=1e-12
    )
    z = x - x.mean(
        0
    )  # along each direction the optimal map of z to 2 z moves by z: the RMS of z over all
    assert toy3d_data.sliced_w2(z, 2 * z) == pytest.approx(
        z.square().mean().sqrt().item(), abs=1e-12
    )


def test_sliced_w2_of_weighted_points():
    """Along a direction q a quarter of the mass moves by |q_1|: W2^2 = q_1^2 / 4, 1/3 of it on
    average."""
    x = torch.tensor([[0.0, 0, 0], [1, 0, 0]]).double()
    uneven = torch.tensor([0.25, 0.75]).double()
    expected = math.sqrt(0.25 / 3)
    assert toy3d_data.sliced_w2(x, x, uneven) == pytest.approx(expected, abs=1e-12)
    assert toy3d_data.sliced_w2(x, x, None, uneven) == pytest.approx(expected, abs=1e-12)
    repeated = x[[0, 1, 1, 1]]  # the same mass as points
    assert toy3d_data.sliced_w2(repeated, x) == pytest.approx(expected, abs=1e-12)
    assert toy3d_data.sliced_w2(repeated, x, None, uneven) < 1e-12


def test_measure_matches_the_weights_of_the_modes():
    """Samples that are the reference but for their modes' weights: at distance 0; shifted, at |c| /
    sqrt(3)."""
    reference = toy3d_data.clean_points("3-gaussians", 300, seeded(10_000))
    x = torch.cat([reference, reference[0::3], reference[0::3], reference[1::3]])
    weights = toy3d_data.mode_matched("3-gaussians", x)
    mode = torch.cdist(x, toy3d_data.CENTRES["3-gaussians"]).argmin(1)
    assert torch.allclose(torch.bincount(mode, weights), torch.full((3,), 1 / 3).double())
    assert toy3d_data.sliced_w2(x, reference) > 1
    equal = toy3d_data.mode_matched("3-gaussians", reference)
    assert toy3d_data.sliced_w2(x, reference, weights, equal) < 1e-6
    shifted = toy3d_data.sliced_w2(x + 1, reference, weights, equal)
    assert shifted == pytest.approx(1, abs=1e-6)
    numbers = toy3d_data.measure("3-gaussians", x[torch.randperm(len(x))], 0)
    assert numbers["sliced_w2"] < 0.15 and numbers["mode_weights"][0] == pytest.approx(
        3 / 6.5, abs=0.05
    )
    lost = x[mode != 2]  # a mode without points: its weight is the others'
    assert toy3d_data.mode_matched("3-gaussians", lost).sum() == pytest.approx(1)


def test_networks_side_by_side_do_not_mix():
    """Row i belongs to network i % M in every loss: one job's gradient ignores the other jobs'
    points."""
    torch.manual_seed(0)
    M, n = 3, 16
    model = toy3d.MLP(M)
    x0, eps, t = torch.randn(n * M, 3), torch.randn(n * M, 3), torch.randint(1000, (n * M,))
    u, beta = 2 * torch.rand(n * M, 3) - 1, torch.ones(n * M)
    other = torch.where((torch.arange(n * M) % M == 1)[:, None], x0, 5 * x0 + 1)
    for loss in (
        lambda x: ddpm_loss(model, SCHEDULE, x, t, eps),
        lambda x: robust_loss(model, SCHEDULE, x, t, eps, perturb="ran", u=u, beta=beta)[0],
        lambda x: robust_loss(model, SCHEDULE, x, t, eps, perturb="adv", u=u, beta=beta)[0],
    ):
        a, b = (torch.autograd.grad(loss(x), model.weight[0])[0] for x in (x0, other))
        assert torch.allclose(a[1], b[1], atol=1e-7) and not torch.allclose(a[0], b[0], atol=1e-7)


def test_ideal_network_has_no_error_and_samples_the_set():
    names = SETS
    ideal = toy3d_data.true_eps(names, SCHEDULE)
    error, lip_eps, gain_x0 = toy3d_sweep.by_t(ideal, names, SCHEDULE, n=50)
    assert error.max() < 1e-3  # float32
    # the plane alone is Gaussian: eps is linear, steepest across the plane,
    # s^2 / (abar SIGMA^2 / scale^2 + s^2)
    abar, v = (
        SCHEDULE.alphas_bar[toy3d_sweep.TS].double(),
        (toy3d_data.SIGMA / toy3d_data.standard("oblique-plane")[1]) ** 2,
    )
    assert torch.allclose(lip_eps[:, 0], (1 - abar) / (abar * v + 1 - abar), rtol=1e-3)
    assert gain_x0.shape == (len(toy3d_sweep.TS), 2)

    args = argparse.Namespace(seed=0, n=600, sample_steps=200, variance="fixed-large", device="cpu")
    x, diverged, _ = toy3d.sample(ideal, [(name, "clean", 0) for name in names], args, SCHEDULE)
    for name, x_j in zip(names, x):
        numbers = toy3d_data.measure(name, x_j, 0)
        assert (
            numbers["off_support"] < 0.04 and 0.9 < numbers["spread"] < 1.3
        )  # Eq. 5 in 200 steps: the modes widen
        assert (
            np.abs(np.array(numbers["mode_weights"]) * len(numbers["mode_weights"]) - 1).max() < 0.2
        )
    assert not diverged.any()


@pytest.mark.parametrize(
    "name, truth, robust", [("3-gaussians", 0.841, 0.051), ("oblique-plane", 0.919, 0.133)]
)
def test_exact_minimiser_of_eq10_collapses_a_thin_set(name, truth, robust):
    """NOTES.md: eps* = k x_t for N(0, v); v is that of a mode, or across the plane. Standard
    deviation of the samples over the true one, with lambda = 0 and 0.3: those of RESULTS.md."""
    v = (toy3d_data.SIGMA / toy3d_data.standard(name)[1]) ** 2
    args = argparse.Namespace(
        seed=0, n=3000, sample_steps=500, variance="fixed-small", device="cpu"
    )
    beta = torch.linspace(0.5, 2, 101).double()

    def minimiser(lam):
        def eps(x_t, t):
            ts = t[:1].expand(len(beta))
            radius = perturbation_radius(SCHEDULE, ts, beta)
            c = (regulariser_weight(SCHEDULE, ts, beta, lam) * radius.square() / 3).mean()
            abar = SCHEDULE.alphas_bar[t[0]]
            s2 = 1 - abar
            return (s2.sqrt() * (1 + c) / (abar * v + s2 * (1 + c))).float() * x_t

        return eps

    for lam, expected in ((0.0, truth), (0.3, robust)):
        x, _, _ = toy3d.sample(minimiser(lam), [(name, "clean", 0)], args, SCHEDULE)
        x = toy3d_data.to_standard(name, x[0])
        assert x.std().item() / v**0.5 == pytest.approx(expected, rel=0.03)


BAD = [
    ["--share", 1.5],
    ["--sets", "moons"],
    ["--methods", "none", "none"],
    ["--noises", "salt"],
    ["--steps", 0],
    ["--lam", "nan"],
    ["--sample-steps", 2000],
    ["--variance", "none"],
    ["--device", "abacus"],
    ["--out", toy3d.__file__],
    ["--out", "/proc/nowhere/toy"],
    ["--seed", -1],
]


def test_bad_input_is_one_line_before_any_work(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(toy3d, "train", lambda *a: pytest.fail("work began"))
    for bad in BAD:
        out = [] if "--out" in bad else ["--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["toy3d.py", *map(str, bad), *out])
        with pytest.raises(SystemExit) as end:
            toy3d.cli(toy3d.main)
        err = capsys.readouterr().err
        assert (
            end.value.code == 2
            and err.count("\n") == 1
            and err.startswith("toy3d.py: ")
            and bad[0] in err
        ), (bad, err)


SMALL = [
    "toy3d.py",
    "--steps",
    "2",
    "--n",
    "30",
    "--points",
    "60",
    "--sample-steps",
    "3",
    "--device",
    "cpu",
]


def test_a_small_run_leaves_every_file(tmp_path, monkeypatch):
    flags = ["--seeds", "2", "--methods", "none", "late-adv", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*SMALL, *flags])
    toy3d.main()
    for name in ("fig2a", "fig2b", "fig2c", "fig5"):
        for kind in ("png", "pdf"):
            assert (tmp_path / f"{name}.{kind}").stat().st_size > 5000
    with np.load(tmp_path / "samples.npz") as f:
        assert sorted(f) == sorted(
            f"{name}/outliers/{m}" for name in SETS for m in ("none", "late-adv")
        )
        assert all(f[k].shape == (30, 3) and np.isfinite(f[k]).all() for k in f)
    record = json.loads((tmp_path / "metrics.json").read_text())
    numbers = record["results"]["3-gaussians/outliers/late-adv"]
    assert {
        "off_support",
        "distance_mean",
        "distance_95",
        "sliced_w2",
        "mode_weights",
        "diverged",
    } <= set(numbers)
    assert len(numbers["off_support"]) == 2 and len(numbers["mode_weights"]["std"]) == 3


def test_the_networks_at_each_t(tmp_path, monkeypatch):
    flags = "--by-t --steps 2 --points 60 --seeds 2 --methods inv-adv --device cpu".split()
    monkeypatch.setattr(sys, "argv", ["toy3d_sweep.py", *flags, "--out", str(tmp_path)])
    toy3d_sweep.main()
    assert (tmp_path / "by_t.png").stat().st_size > 5000
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert len(record["results"]) == 2 * 2  # two sets, the truth and one method
    for name in SETS:
        truth = record["results"][f"{name}/outliers/truth"]["score_error_by_t"]
        numbers = record["results"][f"{name}/outliers/inv-adv"]["score_error_by_t"]
        assert len(truth["mean"]) == len(numbers["mean"]) == len(record["ts"])
        assert max(truth["mean"]) < 1e-3 < min(numbers["mean"])


def test_seeds_repeat_and_differ():
    args = argparse.Namespace(
        seed=3,
        n=20,
        steps=3,
        points=60,
        share=0.2,
        sample_steps=4,
        variance="fixed-small",
        lam=0.3,
        omega=2.0,
        gamma=8 / 255,
        reg_last=1.0,
        reg_share=1.0,
        device="cpu",
    )

    def draw(seed):
        torch.rand(1)  # whatever came before
        args.seed, jobs = (
            seed,
            [("3-gaussians", "outliers", seed), ("3-gaussians", "outliers", seed + 1)],
        )
        return toy3d.sample(toy3d.train("inv-adv", jobs, args, SCHEDULE), jobs, args, SCHEDULE)[0]

    x = draw(3)
    assert (
        torch.allclose(x, draw(3), atol=1e-4)
        and (x[0] - x[1]).abs().max() > 0.1
        and (x - draw(4)).abs().max() > 0.1
    )


def test_regulariser_in_the_last_steps_on_a_share(monkeypatch):
    """late-adv: of 10 steps the last 3, on a quarter of each network's rows, from half the rate;
    adv: always, on all. The first phase is plain DDPM's, kept or trained anew."""
    args = argparse.Namespace(
        seed=0, steps=10, points=60, share=0.2, lam=0.3, omega=2.0, gamma=8 / 255, reg_last=0.3,
        reg_share=0.25, device="cpu",
    )  # fmt: skip
    jobs, calls, rates = [("3-gaussians", "outliers", 0)] * 2, [], []

    def noted(name, function):
        def call(*args, **options):
            calls.append((name, options.get("share", 1.0)))
            return function(*args, **options)

        return call

    class Adam(torch.optim.Adam):
        def step(self):
            rates.append(self.param_groups[0]["lr"] / toy3d.LR)
            super().step()

    monkeypatch.setattr(toy3d, "ddpm_loss", noted("ddpm", ddpm_loss))
    monkeypatch.setattr(toy3d, "robust_loss", noted("robust", robust_loss))
    monkeypatch.setattr(torch.optim, "Adam", Adam)
    plain = {}
    anew = toy3d.train("late-adv", jobs, args, SCHEDULE, plain)
    assert calls == [("ddpm", 1.0)] * 7 + [("robust", 0.25)] * 3
    assert (
        rates[0] == 1 and rates[6] < 0.06 and rates[7] == 0.5 and rates[9] == pytest.approx(0.125)
    )
    calls.clear()
    kept = toy3d.train("late-adv", jobs, args, SCHEDULE, plain)
    assert calls == [("robust", 0.25)] * 3 and list(plain) == [7]
    assert all(torch.equal(a, b) for a, b in zip(anew.parameters(), kept.parameters()))
    calls.clear()
    toy3d.train("adv", jobs, args, SCHEDULE)
    assert calls == [("robust", 1.0)] * 10


def test_a_small_sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(
        toy3d_sweep, "KNOBS", {"lam": ("lambda", [0.1, 0.3]), "share": ("share", [0, 0.2])}
    )
    monkeypatch.setattr(sys, "argv", [*SMALL, "--sets", "3-gaussians", "--out", str(tmp_path)])
    toy3d_sweep.main()
    assert (tmp_path / "sweep.png").exists() and (tmp_path / "sweep.pdf").exists()
    results = json.loads((tmp_path / "metrics.json").read_text())["results"]
    assert (
        results["lam=0.3/3-gaussians/adv"] == results["share=0.2/3-gaussians/adv"]
    )  # the same run


def test_a_small_grid_of_late_phases(tmp_path, monkeypatch):
    monkeypatch.setattr(toy3d_sweep, "LASTS", [0.5, 1])
    monkeypatch.setattr(toy3d_sweep, "SHARES", [0.25, 1])
    monkeypatch.setattr(toy3d_sweep, "LAMBDAS", [0.3, 1])
    flags = "--late --steps 2 --points 60 --n 30 --sample-steps 5 --sets 3-gaussians --device cpu"
    monkeypatch.setattr(sys, "argv", ["toy3d_sweep.py", *flags.split(), "--out", str(tmp_path)])
    toy3d_sweep.main()
    assert (tmp_path / "late.png").stat().st_size > 5000
    results = json.loads((tmp_path / "metrics.json").read_text())["results"]
    assert len(results) == 1 + 2 * 3 * 2
    assert "0.5/0.25/1/3-gaussians/late-adv" in results and "3-gaussians/none" in results


def test_late_phases_have_their_own_methods(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["toy3d_sweep.py", "--late", "--methods", "ran"])
    with pytest.raises(ValueError, match="--methods: has no effect with --late"):
        toy3d_sweep.main()
