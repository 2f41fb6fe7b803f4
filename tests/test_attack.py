"""attack.py: gradients in closed form (a linear network) and by finite differences, budgets,
self-checks that fail when they must, the command."""

import argparse
import gc
import json
import math
import weakref

import cli
import numpy as np
import pytest
import torch

import attack
import sample
import sampler_attack
import samplers
from data import CORRUPTION_STREAM
from losses import NoiseSchedule
from rng import image_noise
from runtime import save_checkpoint
from sampler_attack import Attack
from unet import PRESETS, UNet

SCHEDULE = NoiseSchedule()
ABAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
SHAPE, INDEX = (2, 3, 2), torch.tensor([3, 0, 7])
A = 0.6 * torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
DDPM = dict(steps=20, spacing="respaced", variance="fixed-large", clip=False)
DDIM = dict(steps=20, eta=0.0, clip=False)
SAMPLERS = pytest.mark.parametrize(
    "sampler, options",
    [
        ("ddpm", DDPM),
        ("ddpm", DDPM | dict(spacing="naive")),
        ("ddim", DDIM),
        ("ddim", DDIM | dict(eta=1.0)),
    ],
)


def linear(x, t):
    return (x.flatten(1) @ A.T).view_as(x)


def curved(x, t):
    return torch.tanh(1.5 * linear(x, t)) + 0.5 * torch.sin(3 * x)


def draw(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def noise(i, j, index=INDEX):
    return image_noise(5, index, sampler_attack.stream(i, j), SHAPE).double()


def hook(model, sampler="ddpm", options=DDPM, index=INDEX, share=1.0, objective="mean", **kw):
    """P1's J unless another is asked for; without the calls that only compare J."""
    kw = dict(probes=0) | kw
    on_step = Attack(model, SCHEDULE, sampler, options, index, 5, share, objective=objective, **kw)
    return on_step, on_step.pairs


def closed_form(sampler, options, t, t_prev):
    """M = d mean / dx of a step without clipping, the s_t of its noise and beta; DDPM by Eq. 5, not
    by mu~ of x^_0."""
    a, b = ABAR[t], ABAR[t_prev] if t_prev >= 0 else 1.0
    beta, eye = 1 - a / b, torch.eye(12, dtype=torch.float64)
    if sampler == "ddpm":
        return (
            (eye - beta / math.sqrt(1 - a) * A) / math.sqrt(1 - beta),
            math.sqrt(beta) if t_prev >= 0 else 0.0,
            beta,
        )
    s = options["eta"] * math.sqrt((1 - b) / (1 - a) * beta)
    return math.sqrt(b / a) * (eye - math.sqrt(1 - a) * A) + math.sqrt(1 - b - s * s) * A, s, beta


def test_attacked_steps():
    for n in (1, 7, 50, 1000):
        for share in (0, 0.1, 0.25, 0.29, 0.5, 2 / 3, 0.75, 1):
            steps = sampler_attack.attacked_steps(n, share)
            assert len(steps) == math.floor(n * share + 1e-9)
            assert not steps or np.ptp(np.diff([-1, *steps])) <= 1  # evenly
    assert sampler_attack.attacked_steps(8, 0.25) == [3, 7] and sampler_attack.attacked_steps(
        8, 1
    ) == list(range(8))
    for bad in (-0.1, 1.01, float("nan")):
        with pytest.raises(ValueError, match="share"):
            sampler_attack.attacked_steps(10, bad)


def test_streams_are_apart():
    streams = [sampler_attack.stream(i, j) for i in (0, 1, 999) for j in (0, 1, 2**20 - 1)]
    assert (
        min(streams) > 1000
        and max(streams) < CORRUPTION_STREAM
        and len(set(streams)) == len(streams)
    )


@SAMPLERS
@pytest.mark.parametrize("scale", ["std", "var"])
def test_fgsm_of_a_linear_network(sampler, options, scale):
    """J = |M (x' - x_t)|^2, so that delta = scale_t sign(M' M (x' - x_t)), at every step."""
    on_step, pairs = hook(linear, sampler, options, scale=scale, phi=0.7)
    x_t = draw(3, *SHAPE)
    for i, (t, t_prev) in enumerate(pairs):
        M, _, beta = closed_form(sampler, options, t, t_prev)
        r = math.sqrt(beta) if scale == "std" else beta
        start = 0.7 * r * noise(i, 0).flatten(1)
        delta = (on_step(i, t, x_t) - x_t).flatten(1)
        torch.testing.assert_close(delta, r * torch.sign(start @ M.T @ M), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("objective", ["x0", "eps", "ldm"])
def test_objectives_of_a_linear_network(objective):
    """J = |Q (x' - x_t)|^2 with Q of x^_0, of eps, or of L_DM, at every step of a DDPM."""
    on_step, pairs = hook(linear, objective=objective)
    x_t = draw(3, *SHAPE)
    eye = torch.eye(12, dtype=torch.float64)
    for i, (t, t_prev) in enumerate(pairs):
        s = math.sqrt(1 - ABAR[t])
        Q = dict(x0=(eye - s * A) / math.sqrt(ABAR[t]), eps=A, ldm=A - eye / s)[objective]
        r = math.sqrt(closed_form("ddpm", DDPM, t, t_prev)[2])
        delta = (on_step(i, t, x_t) - x_t).flatten(1)
        start = r * noise(i, 0).flatten(1)
        torch.testing.assert_close(delta, r * torch.sign(start @ Q.T @ Q), rtol=1e-9, atol=1e-12)


def values_of_J(objective, t, t_prev, x_t, x):
    """J (B,) of a curved network for a DDPM that clips, written out from P1's formulas."""
    ts = torch.full((len(x),), t)
    s, root = math.sqrt(1 - ABAR[t]), math.sqrt(ABAR[t])
    previous = ABAR[t_prev] if t_prev >= 0 else 1.0
    beta = 1 - ABAR[t] / previous

    def denoised(x):
        return (x - s * curved(x, ts)) / root

    def mean(x):  # mu~ of App. A.1
        to_image = math.sqrt(previous) * beta / (1 - ABAR[t])
        return to_image * denoised(x) + math.sqrt(1 - beta) * (1 - previous) / (1 - ABAR[t]) * x

    if objective == "x0":
        gap = denoised(x) - denoised(x_t)
    elif objective == "mean":
        gap = mean(x) - mean(x_t)
    elif objective == "eps":
        gap = curved(x, ts) - curved(x_t, ts)
    else:
        gap = curved(x, ts) - (x - root * denoised(x_t).clamp(-1, 1)) / s
    return gap.square().flatten(1).sum(1)


@pytest.mark.parametrize("objective", sampler_attack.OBJECTIVES)
def test_gradient_by_finite_differences(objective):
    """Of a sampler that clips x^_0, at points most of whose x^_0 is clipped: J is not."""
    on_step, pairs = hook(curved, options=DDPM | dict(clip=True), objective=objective)
    for i in (0, 7, 14, 19):
        t, t_prev = pairs[i]
        x_t, start, way = (draw(3, *SHAPE, seed=seed) for seed in (1, 2, 3))
        x_t = 2 * x_t
        start = 0.1 * start
        grad = sampler_attack.gradient(on_step.gap_at(i, x_t), start)
        slope = (grad * way).flatten(1).sum(1)
        h = 1e-5
        up = values_of_J(objective, t, t_prev, x_t, x_t + start + h * way)
        down = values_of_J(objective, t, t_prev, x_t, x_t + start - h * way)
        torch.testing.assert_close(slope, (up - down) / (2 * h), rtol=1e-6, atol=1e-6)
        delta = on_step(i, t, x_t) - x_t
        r = math.sqrt(1 - ABAR[t] / (ABAR[t_prev] if t_prev >= 0 else 1.0))
        torch.testing.assert_close(delta.abs(), torch.full_like(delta, r))  # no gradient is 0


@pytest.mark.parametrize("phi, iters, factor", [(1.0, 1, 2.0), (3.0, 4, 2.0), (3.0, 4, 1.0)])
def test_projected_steps(phi, iters, factor):
    """Every iterate from the closed form: the start clamped to the ball, steps of factor scale_t /
    k, projected."""
    on_step, pairs = hook(linear, phi=phi, iters=iters, factor=factor)
    x_t = draw(3, *SHAPE)
    for i in (0, 10, 19):
        M, _, beta = closed_form("ddpm", DDPM, *pairs[i])
        r = math.sqrt(beta)
        delta = phi * r * noise(i, 0).flatten(1)
        if iters == 1:
            delta = r * torch.sign(delta @ M.T @ M)
        else:
            delta = delta.clamp(-r, r)
            for _ in range(iters):
                delta = (delta + factor * r / iters * torch.sign(delta @ M.T @ M)).clamp(-r, r)
        ours = (on_step(i, pairs[i][0], x_t) - x_t).flatten(1)
        torch.testing.assert_close(ours, delta, rtol=1e-9, atol=1e-12)
        assert ours.abs().max() <= r * (1 + 1e-9)


@pytest.mark.parametrize(
    "sampler, options", [("ddpm", DDPM | dict(steps=5)), ("ddim", DDIM | dict(steps=5))]
)
@pytest.mark.parametrize("kw", [dict(), dict(iters=3), dict(objective="x0"), dict(kind="random")])
def test_image_i_does_not_depend_on_the_batch(sampler, options, kw):
    def model(x, t):
        return curved(x.double(), t).to(x.dtype)

    def run(index):
        on_step, _ = hook(model, sampler, options, index, **kw)
        return sample.generate(
            model, SCHEDULE, index, SHAPE, 5, "cpu", sampler, on_step=on_step, **options
        )

    torch.testing.assert_close(
        run(torch.tensor([4, 9, 2]))[1:2], run(torch.tensor([9])), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "sampler, options", [("ddpm", DDPM), ("ddim", DDIM), ("ddpm", DDPM | dict(spacing="naive"))]
)
def test_attack_beats_the_random_control(sampler, options):
    """And more steps beat one. Where beta is small, mean(x) is nearly x, whatever the network: J
    has no direction to find."""
    gain, index = [], torch.arange(30)
    for iters in (1, 5):
        on_step, pairs = hook(curved, sampler, options, index, iters=iters, probes=20)
        for i, (t, _) in enumerate(pairs):
            on_step(i, t, draw(30, *SHAPE, seed=i))
        checks = checks_of(on_step)
        assert checks["probes"] == 30 * 20 and checks["outside_ball"] == 0
        assert checks["nonfinite_gradients"] == 0 and checks["zero_gradients"] == 0
        gain.append((checks["J_above_random"], checks["J_over_random"]))
    if options.get("spacing") == "naive":
        assert abs(gain[0][1] - 1) < 0.01
    else:
        assert gain[0][0] > 0.6 and gain[0][1] > 1.1 and gain[1][1] > gain[0][1], gain


def test_random_control():
    on_step, pairs = hook(None, kind="random")  # needs no network
    x_t, r = draw(3, *SHAPE), math.sqrt(closed_form("ddpm", DDPM, *pairs[4])[2])
    delta = on_step(4, pairs[4][0], x_t) - x_t
    torch.testing.assert_close(delta.abs(), torch.full_like(delta, r))
    assert 0 < (delta > 0).double().mean() < 1


@pytest.mark.parametrize("iters", [1, 3])
def test_calls_and_memory(iters):
    """1 + iters calls on an attacked step, none elsewhere; after a step no graph is alive, nor more
    tensors for more steps."""
    live = []
    for steps in (8, 40):
        calls, graphs, attacked = [], [], sampler_attack.attacked_steps(steps, 0.5)

        def model(x, t, calls=calls, graphs=graphs):
            y = curved(x, t)
            calls.append(x.requires_grad)
            graphs += [weakref.ref(y)] if y.requires_grad else []
            return y

        on_step, _ = hook(model, options=DDPM | dict(steps=steps), share=0.5, iters=iters)

        def watch(
            i, t, x, on_step=on_step, calls=calls, graphs=graphs, attacked=attacked, steps=steps
        ):
            before = len(calls)
            x = on_step(i, t, x)
            assert (
                calls[before:] == ([False] + [True] * iters if i in attacked else [])
                and not x.requires_grad
            )
            assert all(ref() is None for ref in graphs)
            if i == steps - 1:
                live.append(sum(type(o) is torch.Tensor for o in gc.get_objects()))
            return x

        samplers.ddpm_sample(model, SCHEDULE, draw(3, *SHAPE), steps, on_step=watch)
        assert len(graphs) == iters * len(attacked)
    assert live[0] == live[1]


def test_weights_get_no_gradient():
    class Net(torch.nn.Linear):
        calls = 0

        def forward(self, x, t):
            assert not self.weight.requires_grad
            self.calls += 1
            return super().forward(x.flatten(1)).view_as(x)

    net = Net(12, 12).double()
    on_step, pairs = hook(net)
    on_step(0, pairs[0][0], draw(3, *SHAPE))
    assert net.calls == 2 and net.weight.grad is None and net.weight.requires_grad


def checks_of(on_step):
    lost = torch.zeros(len(on_step.index))
    return sampler_attack.summarise(on_step.counts | dict(lost=lost))


def violated(model, **kw):
    on_step, pairs = hook(model, probes=20, **kw)
    out = [on_step(i, t, draw(3, *SHAPE)) for i, (t, _) in enumerate(pairs)]
    assert all(x.isfinite().all() for x in out)  # the run goes on
    return " | ".join(checks_of(on_step)["violated"])


def test_violations_are_reported():
    def spoilt(x, t):  # a NaN in the gradient alone
        if x.requires_grad:
            x.register_hook(lambda g: g.index_fill(2, torch.tensor([1]), float("nan")))
        return curved(x, t)

    def vanishing(x, t):  # the gradient is 0
        if x.requires_grad:
            x.register_hook(torch.zeros_like)
        return linear(x, t)

    def reversed_(x, t):  # its sign is wrong
        if x.requires_grad:
            x.register_hook(lambda g: linear(g, t).neg())
        return curved(x, t)

    assert "NaN or infinite" in violated(spoilt) and "are 0" not in violated(spoilt)
    assert "are 0" in violated(vanishing) and "random start" in violated(vanishing)
    assert "signs of equal norm" in violated(reversed_) and "small step" in violated(reversed_)
    # mean is a multiple of x_t: every direction is alike
    constant = violated(lambda x, t: torch.zeros_like(x))
    assert "signs of equal norm" in constant and "random start" in constant
    assert "small step" not in constant
    assert "random start" in violated(linear, phi=4.0)  # a start of four times the norm wins
    assert "are 0" not in violated(linear) and "exceed" not in violated(linear)
    on_step, _ = hook(linear)
    on_step.counts["outside"][1] = 5
    rows = on_step.counts | dict(lost=torch.tensor([0, 0, 1]))
    lines = " | ".join(sampler_attack.summarise(rows)["violated"])
    assert "5 elements of delta" in lines and "1 samples hold" in lines


# several DDIM steps ahead -------------------------------------------------------------------------


def chain_of_ddim(i, through, pairs, x, clip):
    """x^_0, unclipped, at the last of `through` steps of a DDIM that re-derives eps; from Song et
    al., Eq. 12."""
    for t, t_prev in pairs[i : i + through]:
        s, root = math.sqrt(1 - ABAR[t]), math.sqrt(ABAR[t])
        image = (x - s * curved(x, None)) / root
        shown = image.clamp(-1, 1) if clip else image
        after = ABAR[t_prev] if t_prev >= 0 else 1.0
        x = math.sqrt(after) * shown + math.sqrt(1 - after) * (x - root * shown) / s
    return image


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("through", [1, 3, 100])
def test_gradient_through_several_steps_by_finite_differences(through, clip):
    """J = |x^_0 of the chain from x_t + delta - x^_0 of the chain from x_t|^2; one step: the J of
    x0."""
    options = DDIM | dict(clip=clip, rederive=True)
    on_step, pairs = hook(curved, "ddim", options, objective="x0", through=through)
    for i in (0, 9, 18, 19):
        x_t, start, way = (draw(3, *SHAPE, seed=seed) for seed in (1, 2, 3))
        start = 0.1 * start

        def J(delta, i=i, x_t=x_t):
            gap = chain_of_ddim(i, through, pairs, x_t + delta, clip) - chain_of_ddim(
                i, through, pairs, x_t, clip
            )
            return gap.square().flatten(1).sum(1)

        gap = on_step.gap_at(i, x_t)
        torch.testing.assert_close(sampler_attack.value(gap, start), J(start))
        if through == 1:
            torch.testing.assert_close(J(start), values_of_J("x0", *pairs[i], x_t, x_t + start))
        slope = (sampler_attack.gradient(gap, start) * way).flatten(1).sum(1)
        h = 1e-6
        difference = (J(start + h * way) - J(start - h * way)) / (2 * h)
        torch.testing.assert_close(slope, difference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("clip", [False, True])
def test_through_all_steps_is_the_samplers_own_end(clip):
    options = DDIM | dict(clip=clip, rederive=True)
    on_step, _ = hook(curved, "ddim", options, objective="x0", through=20)
    x_T = draw(3, *SHAPE)
    end = on_step.x0_ahead(0, x_T)
    sampled = samplers.ddim_sample(curved, SCHEDULE, x_T, **options)
    torch.testing.assert_close(end.clamp(-1, 1) if clip else end, sampled)


@pytest.mark.parametrize("through", [1, 4, 16])
def test_activations_of_one_call_are_kept_at_a_time(through):
    """And each call of the chain is made twice for a gradient: the network is called again instead
    of kept."""
    W, calls, most, kept = draw(12, 30) / 6, [0], [0], []

    def model(x, t):
        calls[0] += 1
        hidden = torch.tanh(x.flatten(1) @ W)  # tanh keeps its result for the backward
        kept.append(weakref.ref(hidden))
        most[0] = max(most[0], sum(ref() is not None for ref in kept))
        return (hidden @ W.T).view_as(x)

    on_step, _ = hook(model, "ddim", DDIM, objective="x0", through=through)
    x_t = draw(3, *SHAPE)
    delta = on_step(0, on_step.pairs[0][0], x_t) - x_t
    assert delta.abs().min() > 0
    assert calls[0] == (2 if through == 1 else 3 * through)
    assert most[0] <= 2 and not any(ref() is not None for ref in kept)


@pytest.mark.parametrize("iters", [1, 3])
def test_of_several_starts_the_best_is_taken(iters):
    """J = |M delta|^2 of a linear network: the largest of those of each start alone; 1 + R (iters +
    1) calls."""
    calls = []

    def model(x, t):
        calls.append(1)
        return linear(x, t)

    x_t, chosen = draw(3, *SHAPE), []
    on_step, pairs = hook(model, iters=iters, restarts=4)
    for i in (2, 11):
        M, _, beta = closed_form("ddpm", DDPM, *pairs[i])
        r, values, deltas = math.sqrt(beta), [], []
        for j in (0, 2, 3, 4):
            delta = r * noise(i, j).flatten(1)
            if iters == 1:
                delta = r * torch.sign(delta @ M.T @ M)
            else:
                delta = delta.clamp(-r, r)
                for _ in range(iters):
                    step = 2 * r / iters * torch.sign(delta @ M.T @ M)
                    delta = (delta + step).clamp(-r, r)
            deltas.append(delta)
            values.append((delta @ M.T).square().sum(1))
        best = torch.stack(values).argmax(0)
        calls.clear()
        ours = (on_step(i, pairs[i][0], x_t) - x_t).flatten(1)
        assert len(calls) == 1 + 4 * (iters + 1)
        expected = torch.stack([deltas[k][row] for row, k in enumerate(best)])
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
        chosen += best.tolist()
    assert len(set(chosen)) > 1


@pytest.mark.parametrize(
    "through, objective, sampler, eta, message",
    [(0, "x0", "ddim", 0.0, "at least 1"), (2, "mean", "ddim", 0.0, "not of mean"),
     (2, "x0", "ddim", 0.5, "without noise"), (2, "x0", "ddpm", 0.0, "without noise")],
)  # fmt: skip
def test_through_is_refused(through, objective, sampler, eta, message):
    options = DDPM if sampler == "ddpm" else DDIM | dict(eta=eta)
    with pytest.raises(ValueError, match=message):
        hook(curved, sampler, options, objective=objective, through=through)


# the command --------------------------------------------------------------------------------------


def call(*args):
    return cli.call(attack, *args, "--device", "cpu", "--amp", "fp32")


@pytest.fixture(scope="module")
def ckpts(tmp_path_factory):
    root, paths = tmp_path_factory.mktemp("attack"), []
    for seed, size in ((0, 8), (1, 16)):
        torch.manual_seed(seed)
        net = UNet(**PRESETS["tiny"])
        torch.nn.init.normal_(net.conv_out.weight, std=0.05)
        (root / f"net{seed}").mkdir()
        paths.append(root / f"net{seed}" / "ckpt.pt")
        save_checkpoint(
            paths[-1],
            dict(
                kind="unet",
                config=net.config,
                image_size=size,
                model=net.state_dict(),
                ema=net.state_dict(),
                args=dict(data="synthetic:40"),
            ),
        )
    return paths


def test_every_combination_is_an_attack():
    lists = dict(objective=["x0"], attack_iters=[1, 5], restarts=[1, 3], through=[2])
    found = attack.attacks(argparse.Namespace(**lists))
    assert [(d["iters"], d["restarts"]) for d in found] == [(1, 1), (1, 3), (5, 1), (5, 3)]
    words = [attack.describe(d) for d in found]
    assert words[0] == "J: x0, 2 steps ahead" and words[3].startswith("J: x0, 5 steps, 3 starts")
    assert len(set(words)) == 4


def test_figures_hold_every_attack(tmp_path):
    """The RMS of each attack at each share, with its interval, in the panel of that attack."""
    axes = attack.plt.figure().subplots()
    ds = [dict(share=0, kind="none", change_rms=0.0, change_95=(0.0, 0.0))]
    settings = [dict(objective=name, iters=1) for name in ("x0", "mean")]
    for share in (0.5, 1.0):
        for k, d in enumerate(settings):
            value = share + k
            row = dict(
                share=share,
                kind="adversarial",
                change_rms=value,
                change_95=(value - 0.1, value + 0.2),
            )
            ds.append(row | d)
        ds.append(dict(share=share, kind="random", change_rms=3.0, change_95=(3.0, 3.0)))
    attack.plot_lines(axes, ds, "change_rms", settings[1], "black", "net")
    of_attack, control = axes.containers
    assert of_attack.lines[0].get_xydata().tolist() == [[0, 0], [50, 1.5], [100, 2.0]]
    bars = [segment[:, 1].tolist() for segment in of_attack.lines[2][0].get_segments()]
    np.testing.assert_allclose(bars, [[0, 0], [1.4, 1.7], [1.9, 2.2]])
    assert control.lines[0].get_xydata().tolist() == [[0, 0], [50, 3], [100, 3]]
    attack.plt.close()


def test_command(ckpts, tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(attack.metrics, "noise_level", lambda x: drawn.append(x) or torch.zeros(1))
    assert (
        call(
            "--ckpt",
            ckpts[0],
            "--n",
            3,
            "--batch-size",
            2,
            "--steps",
            2,
            "--attacked",
            0.5,
            "--objective",
            "x0",
            "mean",
            "--out",
            tmp_path,
        )
        == 0
    )
    assert all(
        (tmp_path / f).stat().st_size > 300
        for f in ("attack.png", "rows.png", "table.csv", "metrics.json")
    )
    record = json.loads((tmp_path / "metrics.json").read_text())
    rows = record["checkpoints"]["net0"]
    assert [(r["share"], r["kind"], r["attacked_steps"]) for r in rows] == [
        (0, "none", 0),
        (0.5, "adversarial", 1),
        (0.5, "adversarial", 1),
        (0.5, "random", 1),
    ]
    assert [r.get("objective") for r in rows] == [None, "x0", "mean", None]
    for r in rows:
        low, high = r["change_95"]
        assert low <= r["change_rms"] * (1 + 1e-9) and r["change_rms"] <= high * (1 + 1e-9)
    assert rows[0]["change_rms"] == 0 and min(r["change_rms"] for r in rows[1:]) > 1e-3
    assert (
        record["violated"]
        == sum(len(r["checks"]["violated"]) for r in rows[1:3])
        == capsys.readouterr().err.count("CHECK VIOLATED")
    )
    # share 0 is sample.py's sample, bit for bit
    args = argparse.Namespace(
        raw=False, compile=False, image_size=None, amp="fp32", batch_size=2, seed=0, sampler="ddpm"
    )
    model, size, _ = sample.load_model(ckpts[0], args, "cpu")
    options = dict(steps=2, spacing="respaced", variance="fixed-large", clip=True)
    plain = sample.sample_uint8(model, size, 3, args, options, torch.device("cpu"), 0, 1)
    assert torch.equal(
        ((drawn[0] + 1) * 127.5).round().byte().permute(0, 2, 3, 1), torch.from_numpy(plain)
    )


@pytest.mark.parametrize(
    "args, message",
    [
        (("--attacked", 0.5, 1.5), "--attacked 1.5"),
        (("--attacked", "nan"), "--attacked nan"),
        (("--attacked", 0.01), "no step"),
        (("--sampler", "heun"), "--sampler heun"),
        (("--phi", 0), "--phi 0"),
        (("--attack-factor", 0.5), "--attack-factor 0.5"),
        (("--attack-iters", 0), "--attack-iters 0"),
        (("--attack-iters", 2, 2), "2 is given twice"),
        (("--restarts", 0), "--restarts 0"),
        (("--through", 3), "not of ldm"),
        (("--through", 3, "--objective", "x0"), "--through 3: needs steps without noise"),
        (("--through", 3, "--sampler", "ddim", "--objective", "x0", "eps"), "not of eps"),
        (("--steps", 0), "--steps 0"),
        (("--objective", "l2"), "--objective"),
        (("--n", 1, "--fid"), "--n 1"),
        (("--fid",), "image sizes [8, 16]"),
        (("--ckpt", "SAME"), "two checkpoints"),
        (("--ckpt", __file__), "test_attack.py"),
    ],
)
def test_bad_input_is_one_line(ckpts, tmp_path, capsys, args, message):
    args = [ckpts[0] if a == "SAME" else a for a in args]
    args = (
        ["--ckpt", *ckpts, "--steps", 20, *args]
        if "--ckpt" not in args
        else ["--ckpt", ckpts[0], *args[1:]]
    )
    assert call(*args, "--out", tmp_path / "out") == 2
    err = capsys.readouterr().err.strip()
    assert message in err and "\n" not in err and not (tmp_path / "out").exists()


def test_the_default_is_full_precision(monkeypatch):
    """bf16 does not see a delta of beta_t: in 1,000 steps J rises in some cases only."""
    monkeypatch.setattr("sys.argv", ["attack.py", "--ckpt", "a"])
    assert attack.parse()[0].amp == "fp32"
    monkeypatch.setattr("sys.argv", ["attack.py", "--ckpt", "a", "--amp", "bf16"])
    assert attack.parse()[0].amp == "bf16"
