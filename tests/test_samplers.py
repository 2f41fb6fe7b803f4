"""Samplers, in float64: Gaussian data, whose ideal network is affine, and diffusers' schedulers.

With an affine network a sampler is an affine map of x_T and the noises. Running it on unit vectors
yields that map, hence the mean and the covariance of its samples without drawing any.
"""

import math

import numpy as np
import pytest
import torch

from losses import NoiseSchedule
from rng import image_noise
from samplers import (
    ddim_sample,
    ddim_step,
    ddim_timesteps,
    ddpm_sample,
    ddpm_timesteps,
    edm_follow,
    from_denoiser,
    heun_levels,
    heun_sample,
    time_of,
)

SCHEDULE = NoiseSchedule()
BETAS = np.linspace(1e-4, 0.02, 1000)
ABAR = np.cumprod(1 - BETAS)
MU = np.array([0.5, -0.3, 2.0])
COV = np.array([[1.0, 0.3, 0.0], [0.3, 0.25, 0.1], [0.0, 0.1, 0.36]])


def gaussian_eps(mu, cov):
    """eps*(x, t) = sqrt(1 - abar) (abar C + (1 - abar) I)^-1 (x - sqrt(abar) mu) for data
    N(mu, C)."""

    def eps(x, t):
        abar = ABAR[t[0]]
        m = math.sqrt(1 - abar) * np.linalg.inv(abar * cov + (1 - abar) * np.eye(len(mu)))
        return (x - torch.from_numpy(math.sqrt(abar) * mu)) @ torch.from_numpy(m)

    return eps


def line_eps(v, mu=0.0):
    return gaussian_eps(np.array([mu]), np.array([[v]]))


def exact_moments(sample, d, draws):
    """sample(x_T, noise) affine in x_T and noise(0 .. draws-1) -> mean and covariance of its output
    for N(0, I) inputs."""
    x_T = torch.zeros(1 + d * (1 + draws), d, dtype=torch.float64)
    x_T[1 : 1 + d] = torch.eye(d)

    def noise(i):
        z = torch.zeros_like(x_T)
        z[1 + d * (1 + i) : 1 + d * (2 + i)] = torch.eye(d)
        return z

    out = sample(x_T, noise).numpy()
    jacobian = out[1:] - out[0]
    return out[0], jacobian.T @ jacobian


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def seeded_noise(shape, seed=5):
    g = torch.Generator().manual_seed(seed)
    return lambda i: torch.randn(shape, dtype=torch.float64, generator=g)


def toy_eps(x, t):
    """Not affine, depends on t; its x^_0 leaves [-1, 1]."""
    return torch.sin(2 * x) + 0.3 * x + torch.cos(t / 150.0).view(-1, 1, 1, 1)


def record(into):
    def on_step(i, t, x):
        into.append((i, t, x.clone()))
        return x

    return on_step


# DDPM ---------------------------------------------------------------------------------------------


def ddpm_moments(mu, cov, pairs, variance):
    """Conditioning Gaussians, E[x_s | x_t] has the slope G = sqrt(abar_t / abar_s) V_s V_t^-1,
    where V_t = Cov(x_t).

    The samples' covariance is P <- G P G' + var I from P = I, with var = beta or, by Bayes, beta~,
    and 0 at the last step.
    """
    eye = np.eye(len(mu))
    mean, P = 0 * mu, eye
    for t, s in pairs:
        a, b = ABAR[t], ABAR[s] if s >= 0 else 1.0
        beta = 1 - a / b
        G = math.sqrt(1 - beta) * (b * cov + (1 - b) * eye) @ np.linalg.inv(a * cov + (1 - a) * eye)
        mean = math.sqrt(b) * mu + G @ (mean - math.sqrt(a) * mu)
        var = (
            0
            if s < 0
            else beta
            if variance == "fixed-large"
            else 1 / (1 / (1 - b) + (1 - beta) / beta)
        )
        P = G @ P @ G.T + var * eye
    return mean, P


@pytest.mark.parametrize("variance", ["fixed-small", "fixed-large"])
def test_eq5_gaussian_data(variance):
    def sample(x_T, noise):
        return ddpm_sample(
            gaussian_eps(MU, COV), SCHEDULE, x_T, clip=False, variance=variance, noise=noise
        )

    mean, cov = exact_moments(sample, 3, 1000)
    expected_mean, expected_cov = ddpm_moments(
        MU, COV, [(t, t - 1) for t in reversed(range(1000))], variance
    )
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-9)
    np.testing.assert_allclose(cov, expected_cov, rtol=1e-7, atol=1e-9)
    # T = 1000 is large: nearly the data
    np.testing.assert_allclose(mean, MU, atol=0.01)
    np.testing.assert_allclose(cov, COV, atol=0.03)


def test_eq5_default_is_fixed_large():
    x_T = draw(4, 3)
    runs = [
        ddpm_sample(
            gaussian_eps(MU, COV), SCHEDULE, x_T, 20, clip=False, noise=seeded_noise((4, 3)), **kw
        )
        for kw in ({}, dict(variance="fixed-large"), dict(variance="fixed-small"))
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.allclose(runs[0], runs[2], atol=1e-3)


def test_eq5_draws_its_own_noise():
    """Without `noise` the seed decides, and the samples have the variance of the closed form."""

    def run():
        torch.manual_seed(0)
        return ddpm_sample(line_eps(0.25), SCHEDULE, draw(20_000, 1), 100, clip=False)

    x = run()
    _, cov = ddpm_moments(np.zeros(1), 0.25 * np.eye(1), ddpm_timesteps(1000, 100), "fixed-large")
    assert x.var().item() == pytest.approx(cov.item(), rel=0.05)
    assert torch.equal(x, run())


@pytest.mark.parametrize(
    "ray_units, lam, t_min, t_max, expected",
    [
        ("pixel", 0.3, 0, 1000, (0.92, 0.87, 0.77, 0.44, 0.18)),
        ("pixel", 0.3, 5, 1000, (0.92, 0.88, 0.82, 0.65, 0.55)),
        ("pixel", 0.3, 5, 100, (1.00, 0.95, 0.86, 0.65, 0.55)),
        ("pixel", 0.6, 5, 100, (0.99, 0.91, 0.75, 0.49, 0.45)),
        ("eps", 0.3, 0, 1000, (0.92, 0.95, 0.95, 0.93, 0.89)),
    ],
)
def test_eq10_shrinks_gaussian_data(ray_units, lam, t_min, t_max, expected):
    """NOTES.md: sampling with Eq. 10's minimiser for N(0, v), k = s (1 + c) / (abar v + s^2 (1 +
    c)), c = 0 outside t_min <= t < t_max: std / sqrt(v) below 1."""
    for v, ratio in zip((100.0, 1.0, 0.25, 0.04, 0.01), expected):

        def k_eps(x, t, v=v):
            s2 = 1 - ABAR[t[0]]
            ray = s2 if ray_units == "pixel" else math.sqrt(s2)
            c = lam / math.sqrt(3) * (s2 + 1.25 * 8 / 255) / ray * (t_min <= t[0] < t_max)
            return math.sqrt(s2) * (1 + c) / (ABAR[t[0]] * v + s2 * (1 + c)) * x

        def sample(x_T, noise, model=k_eps):
            return ddpm_sample(
                model, SCHEDULE, x_T, clip=False, variance="fixed-small", noise=noise
            )

        kept = math.sqrt(exact_moments(sample, 1, 1000)[1].item() / v)
        assert kept == pytest.approx(ratio, abs=0.006)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", ["fixed-large", "fixed-small"])
@pytest.mark.parametrize("steps", [1000, 37])
def test_ddpm_against_diffusers(variance, clip, steps):
    """The whole trajectory. diffusers re-derives the betas for a list of timesteps: `respaced`."""
    diffusers = pytest.importorskip("diffusers")
    ref = diffusers.DDPMScheduler(1000, variance_type=variance.replace("-", "_"), clip_sample=clip)
    ref.alphas_cumprod, ref.one = torch.from_numpy(ABAR), torch.ones((), dtype=torch.float64)
    if steps == 1000:
        ref.set_timesteps(1000)  # timestep_spacing="leading"
    else:
        ref.set_timesteps(timesteps=np.linspace(999, 0, steps).round().astype(int).tolist())
    x_T, g, ours, theirs = draw(2, 3, 4, 4), torch.Generator().manual_seed(5), [], []
    x = x_T
    for t in ref.timesteps:
        theirs.append(x)
        x = ref.step(toy_eps(x, t.view(1)), t, x, generator=g).prev_sample
    final = ddpm_sample(
        toy_eps,
        SCHEDULE,
        x_T,
        steps,
        clip=clip,
        variance=variance,
        noise=seeded_noise(x_T.shape),
        on_step=record(ours),
    )
    assert [t for _, t, _ in ours] == ref.timesteps.tolist()
    scale = max(1.0, x.abs().max().item())
    for (_, _, a), b in zip(ours + [(0, 0, final)], theirs + [x]):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9 * scale)


# spacing ------------------------------------------------------------------------------------------


def test_spacing_timesteps():
    assert ddpm_timesteps(1000, 4) == [(999, 666), (666, 333), (333, 0), (0, -1)]
    assert ddpm_timesteps(1000, 4, "naive") == [(999, 998), (666, 665), (333, 332), (0, -1)]
    assert ddpm_timesteps(1000, 4, "truncated") == [(3, 2), (2, 1), (1, 0), (0, -1)]
    assert ddpm_timesteps(1000, 1) == [(999, -1)]
    assert ddim_timesteps(1000, 4) == [(750, 500), (500, 250), (250, 0), (0, -1)]
    assert ddim_timesteps(10, 3) == [(6, 3), (3, 0), (0, -1)]
    for steps in (1, 2, 300, 500, 999, 1000):  # no step twice, however the rounding falls
        for pairs in (ddpm_timesteps(1000, steps), ddim_timesteps(1000, steps)):
            ts = [t for t, _ in pairs]
            assert (
                len(set(ts)) == steps
                and ts == sorted(ts, reverse=True)
                and [p for _, p in pairs] == ts[1:] + [-1]
            )


def test_spacing_rules_agree_at_all_steps():
    x_T = draw(3, 3, 4, 4)
    runs = [
        ddpm_sample(toy_eps, SCHEDULE, x_T, steps, spacing, noise=seeded_noise(x_T.shape))
        for steps, spacing in (
            (None, "respaced"),
            (1000, "respaced"),
            (1000, "naive"),
            (1000, "truncated"),
        )
    ]
    assert all(torch.equal(runs[0], run) for run in runs[1:])


def sampled_moments(v, mu, steps, spacing, variance):
    def sample(x_T, noise):
        return ddpm_sample(
            line_eps(v, mu),
            SCHEDULE,
            x_T,
            steps,
            spacing,
            clip=False,
            variance=variance,
            noise=noise,
        )

    mean, cov = exact_moments(sample, 1, steps)
    return mean.item(), cov.item()


def test_respaced_keeps_unit_variance():
    """For N(0, 1) the re-derived beta is the exact reverse variance: every x_t is N(0, 1), and x_0
    keeps abar_0 of it, as the last step adds no noise."""
    for steps in (5, 50, 300):
        assert sampled_moments(1.0, 0.0, steps, "respaced", "fixed-large")[1] == pytest.approx(
            ABAR[0], rel=1e-9
        )


@pytest.mark.parametrize("variance", ["fixed-small", "fixed-large"])
def test_spacing_on_gaussian_data(variance):
    """All three rules against the closed form; respaced alone ends near the data N(0.5, 0.25)."""
    ts = np.linspace(999, 0, 100).round().astype(int).tolist()
    pairs = dict(
        respaced=list(zip(ts, ts[1:] + [-1])),
        naive=[(t, t - 1) for t in ts],
        truncated=[(t, t - 1) for t in reversed(range(100))],
    )
    for spacing in pairs:
        mean, cov = ddpm_moments(np.array([0.5]), np.array([[0.25]]), pairs[spacing], variance)
        ours = sampled_moments(0.25, 0.5, 100, spacing, variance)
        assert ours == pytest.approx((mean.item(), cov.item()), rel=1e-9)
        near = abs(ours[0] - 0.5) < 0.01 and abs(ours[1] - 0.25) < 0.05
        assert near == (spacing == "respaced"), ours


# NOTES.md, "Fewer steps": std over that of the data, for v = 75, 2, .08, .0022
KEPT = {
    ("respaced", 500): (0.994, 0.999, 1.007, 1.037),
    ("respaced", 300): (0.990, 0.998, 1.013, 1.082),
    ("naive", 500): (0.409, 0.886, 1.424, 1.936),
    ("naive", 300): (0.272, 0.826, 1.885, 4.095),
    ("truncated", 500): (0.511, 0.994, 1.004, 1.007),
    ("truncated", 300): (0.228, 0.915, 1.017, 1.008),
}


@pytest.mark.parametrize("spacing, steps", KEPT)
def test_what_fewer_steps_keep(spacing, steps):
    """The table of NOTES.md; and truncated is the posterior mean and variance of x_0 given an x_t
    drawn from N(0, 1) instead of the diffused data."""
    for v, kept in zip((75, 2, 0.08, 0.0022), KEPT[spacing, steps]):
        _, variance = sampled_moments(v, 0.0, steps, spacing, "fixed-large")
        assert (variance / v) ** 0.5 == pytest.approx(kept, abs=6e-4)
        if spacing == "truncated":
            abar = ABAR[steps - 1]
            total = abar * v + 1 - abar
            exact = v * (1 - abar) / total + abar * (v / total) ** 2
            assert (exact / v) ** 0.5 == pytest.approx(kept, abs=0.01)


# one graph ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampler, options",
    [
        (ddpm_sample, {}),
        (ddpm_sample, dict(spacing="naive", variance="fixed-small", clip=False)),
        (ddim_sample, {}),
        (ddim_sample, dict(eta=1.0)),
    ],
)
def test_compiled_step_is_one_graph_for_all_steps(sampler, options, monkeypatch):
    """Noise and update are one graph without a break; neither another step, batch nor number of
    steps compiles another."""
    graphs, compile_ = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(
        torch, "compile", lambda f, **kw: compile_(f, **kw, backend=backend, fullgraph=True)
    )
    torch.compiler.reset()
    for first, steps in ((0, 3), (5, 7)):
        index = torch.arange(first, first + 4)

        def noise(stream, index=index):
            return image_noise(3, index, stream, (3, 4, 4))

        def run(compiled, steps=steps, noise=noise):
            return sampler(
                toy_eps,
                SCHEDULE,
                noise(0),
                steps,
                noise=lambda i: noise(i + 1),
                compiled=compiled,
                **options,
            )

        expected = run(False)
        assert expected.std() > 0.05 and torch.equal(run(True), expected)
    assert len(graphs) == 1


@pytest.mark.parametrize("options", [{}, dict(clip=False), dict(S_churn=5.0)])
def test_compiled_heun_step_is_two_graphs_for_all_steps(options, monkeypatch):
    """One before and one after the second network call, whatever the step; the values are
    eager's."""
    graphs = []
    compile_ = torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def compiles(function, **kwargs):
        return compile_(function, **kwargs, backend=backend, fullgraph=True)

    monkeypatch.setattr(torch, "compile", compiles)
    torch.compiler.reset()
    index = torch.arange(4)
    x_T = image_noise(3, index, 0, (3, 4, 4))
    for steps in (3, 7):
        samples = [
            heun_sample(
                toy_eps,
                SCHEDULE,
                x_T,
                steps,
                noise=lambda i: image_noise(3, index, i + 1, x_T.shape[1:]),
                compiled=compiled,
                **options,
            )
            for compiled in (False, True)
        ]
        assert samples[0].std() > 0.05
        assert torch.equal(*samples)
    assert len(graphs) == 2


# details of the loop ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampler, pairs",
    [
        (lambda *a, **k: ddpm_sample(*a, 7, **k), ddpm_timesteps(1000, 7)),
        (lambda *a, **k: ddpm_sample(*a, 7, "naive", **k), ddpm_timesteps(1000, 7, "naive")),
        (
            lambda *a, **k: ddpm_sample(*a, 7, "truncated", **k),
            ddpm_timesteps(1000, 7, "truncated"),
        ),
        (lambda *a, **k: ddim_sample(*a, 7, **k), ddim_timesteps(1000, 7)),
    ],
)
def test_on_step_sees_and_changes_every_step(sampler, pairs):
    seen, fed = [], []

    def model(x, t):
        fed.append((t.tolist(), x.clone()))
        return toy_eps(x, t)

    def shift(i, t, x):
        seen.append((i, t))
        return x + 0.1

    x_T = draw(2, 3, 4, 4)
    out = sampler(model, SCHEDULE, x_T, on_step=shift)
    assert seen == [(i, t) for i, (t, _) in enumerate(pairs)]
    assert [t for t, _ in fed] == [[t, t] for t, _ in pairs]
    assert torch.equal(fed[0][1], x_T + 0.1)
    assert out.shape == x_T.shape and out.dtype == x_T.dtype


@pytest.mark.parametrize("sampler", [ddpm_sample, ddim_sample, heun_sample])
def test_clipping_enters_the_chain(sampler):
    """A network that believes x_0 = 3: the samples are 3, but with clipping 1, and every x_t on the
    way differs too."""
    x_T, seen = draw(2, 3, 4, 4), {True: [], False: []}
    for clip in (True, False):

        def model(x, t, clip=clip):
            seen[clip].append(x.clone())
            return (x - math.sqrt(ABAR[t[0]]) * 3) / math.sqrt(1 - ABAR[t[0]])

        noise = {} if sampler is heun_sample else dict(noise=seeded_noise(x_T.shape))
        out = sampler(model, SCHEDULE, x_T, steps=20, clip=clip, **noise)
        torch.testing.assert_close(out, torch.full_like(x_T, 1.0 if clip else 3.0))
    assert all((a - b).abs().min() > 1e-3 for a, b in zip(seen[True][1:], seen[False][1:]))


@pytest.mark.parametrize(
    "kw", [dict(spacing="respaced"), dict(spacing="naive"), dict(spacing="truncated")]
)
@pytest.mark.parametrize("variance", ["fixed-large", "fixed-small"])
def test_no_noise_at_the_last_step(kw, variance):
    x_T = draw(2, 3, 4, 4)

    def run(silent):
        return ddpm_sample(
            toy_eps,
            SCHEDULE,
            x_T,
            5,
            clip=False,
            variance=variance,
            **kw,
            noise=lambda i: torch.full_like(x_T, 0.0 if i == silent else 1.0),
        )

    usual = run(None)
    assert torch.equal(run(4), usual)
    assert not torch.equal(run(3), usual)


def test_bad_arguments():
    x_T = draw(1, 3)
    for steps in (0, -1, 1001):
        for sampler in (ddpm_sample, ddim_sample):
            with pytest.raises(ValueError, match=str(steps)):
                sampler(toy_eps, SCHEDULE, x_T, steps)
    with pytest.raises(ValueError, match="even"):
        ddpm_sample(toy_eps, SCHEDULE, x_T, 10, "even")
    for kw in (dict(steps=0), dict(t_start=1000), dict(t_start=-1)):
        with pytest.raises(ValueError, match="heun"):
            heun_sample(toy_eps, SCHEDULE, x_T, **kw)


# DDIM ---------------------------------------------------------------------------------------------


def test_ddim_gaussian_data():
    """eta = 0: x'_t - sqrt(abar') mu = (sqrt(abar abar') C + s s' I) V_t^-1 (x_t - sqrt(abar) mu),
    step by step."""
    mean, A = -math.sqrt(ABAR[950]) * MU, np.eye(3)
    for t in range(950, -1, -50):
        a, b = ABAR[t], ABAR[t - 50] if t > 0 else 1.0
        step = math.sqrt(a * b) * COV + math.sqrt((1 - a) * (1 - b)) * np.eye(3)
        A = step @ np.linalg.inv(a * COV + (1 - a) * np.eye(3)) @ A

    def sample(steps):
        return lambda x_T, noise: ddim_sample(
            gaussian_eps(MU, COV), SCHEDULE, x_T, steps, clip=False
        )

    ours_mean, ours_cov = exact_moments(sample(20), 3, 0)
    np.testing.assert_allclose(ours_mean, MU + A @ mean, rtol=1e-9)
    np.testing.assert_allclose(ours_cov, A @ A.T, rtol=1e-9, atol=1e-12)
    # many steps: the data
    ours_mean, ours_cov = exact_moments(sample(1000), 3, 0)
    np.testing.assert_allclose(ours_mean, MU, atol=0.02)
    np.testing.assert_allclose(ours_cov, COV, atol=0.02)


def test_ddim_eta_1_is_ddpm_fixed_small():
    x_T = draw(2, 3, 4, 4)
    ours = ddim_sample(
        toy_eps, SCHEDULE, x_T, 1000, eta=1.0, clip=False, noise=seeded_noise(x_T.shape)
    )
    ddpm = ddpm_sample(
        toy_eps, SCHEDULE, x_T, clip=False, variance="fixed-small", noise=seeded_noise(x_T.shape)
    )
    torch.testing.assert_close(ours, ddpm, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("clip, rederive", [(True, False), (True, True), (False, False)])
def test_ddim_against_diffusers(eta, clip, rederive):
    diffusers = pytest.importorskip("diffusers")
    ref = diffusers.DDIMScheduler(
        1000, clip_sample=clip, set_alpha_to_one=True, timestep_spacing="leading"
    )
    ref.alphas_cumprod = torch.from_numpy(ABAR)
    ref.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    ref.set_timesteps(100)
    x_T = draw(2, 3, 4, 4)
    noise = seeded_noise(x_T.shape)
    theirs = []
    x = x_T
    for i, t in enumerate(ref.timesteps):
        theirs.append(x)
        z = noise(i) if eta > 0 else None
        step = ref.step(
            toy_eps(x, t.view(1)), t, x, eta, use_clipped_model_output=rederive, variance_noise=z
        )
        x = step.prev_sample
    ours = []
    final = ddim_sample(
        toy_eps, SCHEDULE, x_T, 100, eta, clip, rederive, seeded_noise(x_T.shape), record(ours)
    )
    assert [t for _, t, _ in ours] == ref.timesteps.tolist()
    for (_, _, a), b in zip(ours + [(0, 0, final)], theirs + [x]):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_clipping_in_ddim_keeps_the_brightness_only_where_eps_is_rederived():
    """A network whose gain to a shift of the whole image is .7, at large t, where x^_0 is clipped.

    There sqrt(abar) x^_0 is negligible, so that the shift is multiplied by the gain at every step
    unless eps is taken from x_t and the clipped x^_0.
    """
    x_t = draw(4, 3, 8, 8) + 1
    abar = torch.full((4,), ABAR[950], dtype=torch.float64)
    abar_prev = torch.full((4,), ABAR[930], dtype=torch.float64)
    eps = x_t - 0.3 * x_t.mean()
    kept = {}
    for rederive in (False, True):
        x = ddim_step(x_t, eps, 0.0, abar, abar_prev, rederive=rederive)
        kept[rederive] = (x.mean() / x_t.mean()).item()
    assert kept[False] == pytest.approx(0.7, abs=0.02)
    assert kept[True] == pytest.approx(1.0, abs=0.02)


# EDM ----------------------------------------------------------------------------------------------


SIGMA = np.sqrt((1 - ABAR) / ABAR)


def test_heun_levels():
    """EDM's Eq. 5: sigma^(1/7) evenly spaced down to .002; of a network of integer t up to the
    rounding to the schedule, whose smallest level they do not go below."""
    levels = heun_levels(SCHEDULE, 10)
    np.testing.assert_allclose([levels[0], levels[-1]], [SIGMA[-1], 0.002], rtol=1e-9)
    gaps = np.diff(np.array(levels) ** (1 / 7))
    np.testing.assert_allclose(gaps, gaps.mean(), rtol=1e-9)
    assert len(heun_levels(SCHEDULE, 50, 0.5)) == 50
    assert heun_levels(SCHEDULE, 1, 0.5) == pytest.approx([0.5])
    rounded = heun_levels(SCHEDULE, 10, real_t=False)
    assert rounded[0] == SCHEDULE.sigmas[-1] and rounded[-1] == SCHEDULE.sigmas[0]
    assert len(rounded) == 10 and set(rounded) <= set(SCHEDULE.sigmas)
    gaps = np.diff(np.array(rounded) ** (1 / 7))
    np.testing.assert_allclose(gaps, gaps.mean(), rtol=0.15)


def test_time_of_a_noise_level():
    """t of the schedule's levels, in between linear in log abar, and -1 at sigma = 0.

    EDM's VP wrapper solves (beta_min + beta_d t / 2) t = log(1 + sigma^2) for t in [0, 1]; on a
    schedule whose abar is that function of t = (i + 1) / T it is the same.
    """
    ts = [time_of(SCHEDULE, sigma) for sigma in SIGMA]
    np.testing.assert_allclose(ts, np.arange(1000), atol=1e-8)
    between = math.sqrt(1 / math.sqrt(ABAR[7] * ABAR[8]) - 1)
    assert time_of(SCHEDULE, between) == pytest.approx(7.5, abs=1e-9)
    assert time_of(SCHEDULE, 0.0) == -1 and time_of(SCHEDULE, 200.0) == 999
    below = time_of(SCHEDULE, 0.002)
    assert below + 1 == pytest.approx(math.log1p(0.002**2) / -math.log(ABAR[0]), abs=1e-9)
    vp = NoiseSchedule()
    t = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    vp.alphas_bar = torch.exp(-(0.1 * t + 19.9 / 2 * t**2))
    for sigma in (0.02, 0.1, 0.5, 3.0, 80.0):
        log = math.log(1 + sigma**2)
        edm = (math.sqrt(0.1**2 + 2 * 19.9 * log) - 0.1) / 19.9
        assert time_of(vp, sigma) + 1 == pytest.approx(1000 * edm, abs=0.03)


def real_eps(x, t):
    """Not affine, and another function at every real t."""
    return torch.sin(2 * x) + 0.3 * x + torch.cos(t.double() / 15).view(-1, *[1] * (x.dim() - 1))


real_eps.real_t = True


def karras_algorithm_2(eps, x, sigma_max, steps, churn, noise, low=0.01, high=0.46, scale=1.007):
    """Karras et al. (2022), Algorithm 2, in NumPy, with P2's S_min, S_max, S_noise."""

    def slope(x, sigma):
        t = np.interp(-math.log(1 / (1 + sigma**2)), -np.log(ABAR), np.arange(1000))
        t = torch.full((len(x),), t, dtype=torch.float64)
        F = eps(torch.from_numpy(x / math.sqrt(sigma**2 + 1)), t).numpy()
        return (x - (x - sigma * F)) / sigma

    i = np.arange(steps)
    levels = sigma_max ** (1 / 7) + i / (steps - 1) * (0.002 ** (1 / 7) - sigma_max ** (1 / 7))
    levels = [*levels**7, 0.0]
    for i in range(steps):
        gamma = min(churn / steps, math.sqrt(2) - 1) if low <= levels[i] <= high else 0
        hat = levels[i] + gamma * levels[i]
        x_hat = x + math.sqrt(hat**2 - levels[i] ** 2) * scale * noise[i]
        d = slope(x_hat, hat)
        x = x_hat + (levels[i + 1] - hat) * d
        if levels[i + 1] > 0:
            x = x_hat + (levels[i + 1] - hat) * (d + slope(x, levels[i + 1])) / 2
    return x


@pytest.mark.parametrize("churn, steps", [(0.0, 50), (6.0, 50), (6.0, 9)])
def test_edm_is_karras_algorithm_2(churn, steps):
    """Continuous levels and t, gamma = min(S_churn / steps, sqrt 2 - 1), on recorded noise."""
    x = 0.8 * draw(2, 3, 4, 4)
    noise = [draw(2, 3, 4, 4, seed=i) for i in range(steps)]
    settings = dict(S_churn=churn, S_min=0.01, S_max=0.46, S_noise=1.007, clip=False)
    ours = edm_follow(real_eps, SCHEDULE, x, 0.5, steps, **settings, noise=lambda i: noise[i])
    drawn = [z.numpy() for z in noise]
    theirs = karras_algorithm_2(real_eps, x.numpy(), 0.5, steps, churn, drawn)
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-11)


def test_heun_sample_is_edm_between_vp_samples():
    """x_T = sqrt(abar) x at the level of t_start; a network that does not say so gets integer t."""
    x = draw(2, 3, 4, 4)
    ours = heun_sample(real_eps, SCHEDULE, x, 12, clip=False, t_start=400)
    scaled = x / math.sqrt(ABAR[400])
    theirs = edm_follow(real_eps, SCHEDULE, scaled, SIGMA[400], 12, clip=False)
    torch.testing.assert_close(ours, theirs)
    seen = []

    def integer(x, t):
        seen.append(t)
        return toy_eps(x, t)

    heun_sample(integer, SCHEDULE, x, 12, S_churn=6.0)
    assert not any(t.is_floating_point() for t in seen)
    assert len({t[0].item() for t in seen}) > 12


def test_heun_calls():
    calls = []

    def model(x, t):
        calls.append(t[0].item())
        return 0 * x

    heun_sample(model, SCHEDULE, draw(2, 3), 10)
    assert len(calls) == 2 * 10 - 1 and calls[0] == 999 and calls[-1] == 0


def test_heun_gaussian_data():
    def sample(x_T, noise):
        return heun_sample(gaussian_eps(MU, COV), SCHEDULE, x_T, 100, clip=False)

    mean, cov = exact_moments(sample, 3, 0)
    np.testing.assert_allclose(mean, MU, atol=0.01)  # N(0, I) lacks the mean sqrt(abar_T) mu of x_T
    np.testing.assert_allclose(cov, COV, atol=4e-3)


def test_heun_is_second_order():
    """On N(0, 1) twice the steps leave a quarter of the error (Euler: half).

    The ODE's solution is proportional to sqrt(1 + sigma^2); the step to sigma = 0 returns the
    posterior mean x / (1 + sigma^2).
    """
    sigma = np.sqrt((1 - ABAR) / ABAR)
    exact = (
        math.sqrt((1 + sigma[0] ** 2) / (1 + sigma[-1] ** 2))
        / (1 + sigma[0] ** 2)
        / math.sqrt(ABAR[-1])
    )
    x_T = torch.ones(1, 1, dtype=torch.float64)
    errors = [
        heun_sample(line_eps(1.0), SCHEDULE, x_T, steps, clip=False).item() - exact
        for steps in (10, 20)
    ]
    assert 3.2 < errors[0] / errors[1] < 6, errors


def test_heun_from_t_start():
    """Started from the marginal of x_t at t_start, it returns the data."""
    v, mu, t = 0.25, 0.5, 300
    start = (math.sqrt(ABAR[t]) * mu, math.sqrt(ABAR[t] * v + 1 - ABAR[t]))

    def sample(x, noise):
        return heun_sample(
            line_eps(v, mu), SCHEDULE, start[0] + start[1] * x, 40, clip=False, t_start=t
        )

    mean, cov = exact_moments(sample, 1, 0)
    assert mean.item() == pytest.approx(mu, abs=1e-3) and cov.item() == pytest.approx(v, rel=5e-3)


def test_heun_churn():
    """Noise added and removed again: the data's moments stay, the samples change; outside [S_min,
    S_max] nothing does."""

    def sample(**kw):
        return lambda x_T, noise: heun_sample(
            line_eps(0.25, 0.5), SCHEDULE, x_T, 50, clip=False, noise=noise, **kw
        )

    mean, cov = exact_moments(sample(S_churn=6.0), 1, 50)
    assert mean.item() == pytest.approx(0.5, abs=5e-3) and cov.item() == pytest.approx(
        0.25, rel=0.03
    )
    noisier = exact_moments(sample(S_churn=6.0, S_noise=1.5), 1, 50)[1]
    assert noisier.item() > 1.05 * cov.item()

    x_T = draw(4, 1)
    plain = sample()(x_T, None)
    assert not torch.allclose(sample(S_churn=6.0)(x_T, seeded_noise(x_T.shape)), plain, atol=1e-3)
    assert torch.equal(sample(S_churn=6.0, S_min=1e3)(x_T, seeded_noise(x_T.shape)), plain)


def test_eps_of_a_denoiser():
    """Of N(0, v): D(x; sigma) = v x / (v + sigma^2), eps = sqrt(1 - abar) x_t / (abar v + 1 -
    abar); between two steps sigma is the one whose t that is."""
    v, asked = 0.3, []

    def denoiser(x, sigma):
        asked.append(sigma)
        return v / (v + sigma.view(-1, 1, 1, 1) ** 2) * x

    model = from_denoiser(denoiser, SCHEDULE)
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    t = torch.tensor([0, 100, 500, 999])
    abar = SCHEDULE.alphas_bar[t].view(-1, 1, 1, 1)
    torch.testing.assert_close(model(x, t), (1 - abar).sqrt() / (abar * v + 1 - abar) * x)
    sigmas = [0.002, 0.0099, 0.011, 0.5, 3.0, 80.0]
    t = torch.tensor([time_of(SCHEDULE, sigma) for sigma in sigmas], dtype=torch.float64)
    model(torch.randn(6, 3, 2, 2, dtype=torch.float64), t)
    torch.testing.assert_close(asked[-1].tolist(), sigmas, rtol=1e-9, atol=0)


def test_edm_asks_a_denoiser_down_to_its_smallest_level():
    """.002, as EDM's own sampler; a network that begins at t = 0 is asked there instead."""
    asked = []

    def denoiser(x, sigma):
        asked.append(sigma[0].item())
        return x / (1 + sigma.view(-1, 1, 1, 1) ** 2)

    def network(x, t):
        times.append(t[0].item())
        return x

    x = torch.randn(1, 3, 2, 2, dtype=torch.float64)
    edm_follow(from_denoiser(denoiser, SCHEDULE), SCHEDULE, x, 0.5, 10)
    levels = heun_levels(SCHEDULE, 10, 0.5)
    assert levels[-1] == pytest.approx(0.002) and levels[-2] < 0.01
    each = sorted({round(sigma, 9) for sigma in asked}, reverse=True)
    np.testing.assert_allclose(each, levels, atol=1e-8)
    times = []
    network.real_t = True
    edm_follow(network, SCHEDULE, x, 0.5, 10)
    assert min(times) == 0
