"""Outliers in three dimensions: Robust_adv rejects them, Robust_ran fewer, DDPM reproduces them, invariance adds noise.

A fifth of the training points is uniform noise; share of the samples off the support, mean and deviation of three seeds:

                     DDPM           Robust_ran     Robust_adv     Inv_ran        Inv_adv
    oblique-plane    .170 +- .002   .104 +- .004   .040 +- .006   .308 +- .004   .686 +- .014
    3-gaussians      .323 +- .008   .155 +- .004   .127 +- .010   .835 +- .010   .981 +- .002

The price is variety: on the clean sets Robust_adv keeps 90 % of the plane's extent, 8 % of its thickness and 15 % of the
modes' width. All three modes stay. Density and score are known in closed form; the losses are losses.py's, unchanged.

    python toy3d.py                                   # outliers, five methods, one seed: 2 minutes on 2 cores
    python toy3d.py --full --out results/toy3d        # + clean and inliers, three seeds: 30 minutes
    python toy3d.py --sweep --out results/toy3d/sweep # lambda, omega, gamma, share of outliers: 15 minutes
    python toy3d.py --noises inliers --share 0.5 --methods none,adv

Leaves in --out, as PNG and PDF: fig2a (samples), fig2b (score fields), fig2c (the ray), fig5 (the flow), by_t (error of
the score, smoothness); samples.npz with arrays set/noise/method, (n, 3) in data units, of the first seed; metrics.json.
"""

import argparse
import math
import os
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from losses import NoiseSchedule, ddpm_loss, perturbation_radius, robust_loss
from runtime import between, cli, write_metrics
from samplers import ddim_sample, ddpm_sample

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# the sets: mixtures of equal Gaussians N(c_k, C), in float64 and data units
#
# P1 leaves the density on the plane and both noises open. Ours: on the plane, a Gaussian with PLANE_STD along it and
# SIGMA across; inliers: SIGMA -> INLIER_SIGMA; outliers: one point in each of k cells of a cubic grid, mean +- BOX scales.

SIGMA, PLANE_STD, INLIER_SIGMA, BOX = 0.25, 4.0, 1.5, 2.5
ONES = (
    torch.ones(3, 3, dtype=torch.float64) / 3
)  # the projection on the normal of the plane x + y + z = 30
EYE = torch.eye(3, dtype=torch.float64)
CENTRES = {
    "oblique-plane": torch.tensor([[10.0, 10, 10]], dtype=torch.float64),
    "3-gaussians": torch.tensor([[10.0, 10, 10], [20, 20, 20], [10, 30, 30]], dtype=torch.float64),
}
COVARIANCE = {
    "oblique-plane": PLANE_STD**2 * (EYE - ONES) + SIGMA**2 * ONES,
    "3-gaussians": SIGMA**2 * EYE,
}
NOISES = ["clean", "inliers", "outliers"]
METHODS = {
    "none": None,
    "ran": ("ran", "equivariance"),
    "adv": ("adv", "equivariance"),
    "inv-ran": ("ran", "invariance"),
    "inv-adv": ("adv", "invariance"),
}
TS = [
    0,
    5,
    20,
    50,
    100,
    200,
    350,
    500,
    700,
    900,
]  # where the score's error and the smoothness are measured
BY_T = "score_error_by_t", "lip_eps_by_t", "gain_x0_by_t"
SUPPORT = (
    4 * SIGMA
)  # farther than this is off the support: 6e-5 of the clean plane, 1e-3 of the clean Gaussians
WIDTH, DEPTH, FREQUENCIES, BATCH, LR = (
    128,
    3,
    16,
    256,
    4e-3,
)  # the networks, hidden layers; Adam, LR falls to 0 as a cosine
DIVERGED = 10.0  # a path that leaves this cube, in standardised units, has diverged


def standard(name):
    """The affine map of a set, from its definition alone: mean (3,) and scale, the root mean variance per coordinate.

    oblique-plane (10, 10, 10) and 3.269; 3-gaussians (13.333, 20, 20) and 7.205. The network sees (x - mean) / scale.
    """
    c = CENTRES[name]
    cov = COVARIANCE[name] + (c - c.mean(0)).T @ (c - c.mean(0)) / len(c)
    return c.mean(0), (cov.trace() / 3).sqrt().item()


def clean_points(name, n, generator, sigma=SIGMA):
    """n points of the set -> (n, 3); the modes take turns, so that their weights are equal."""
    z = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    z = PLANE_STD * (z - z @ ONES) + sigma * z @ ONES if name == "oblique-plane" else sigma * z
    return CENTRES[name][torch.arange(n) % len(CENTRES[name])] + z


def training_points(name, noise, n, share, generator):
    """n clean points, the first round(share n) of them replaced by noise -> (n, 3)."""
    x, k = clean_points(name, n, generator), round(share * n)
    if noise == "inliers":
        x[:k] = clean_points(name, k, generator, INLIER_SIGMA)
    elif noise == "outliers":
        (mean, scale), side = standard(name), max(1, math.ceil(k ** (1 / 3)))
        cell = torch.randperm(side**3, generator=generator)[:k]
        corner = torch.stack([cell // side**2, cell // side % side, cell % side], 1)
        u = (corner + torch.rand(k, 3, generator=generator, dtype=torch.float64)) / side
        x[:k] = mean + BOX * scale * (2 * u - 1)
    return x


def distance(name, x):
    """Distance of x (n, 3) from the support: the plane, or the nearest centre -> (n,)."""
    if name == "oblique-plane":
        return (x.sum(1) - 30).abs() / math.sqrt(3)
    return torch.cdist(x, CENTRES[name].to(x)).amin(1)


def diffused(name, abar):
    """p_t, still a mixture of Gaussians, in standardised units: means sqrt(abar) c_k (K, 3), abar C + (1 - abar) I (3, 3)."""
    mean, scale = standard(name)
    return math.sqrt(abar) * (CENTRES[name] - mean) / scale, abar * COVARIANCE[name] / scale**2 + (
        1 - abar
    ) * EYE


def true_score(name, x_t, abar):
    """grad log p_t(x_t) = -(abar C + (1 - abar) I)^-1 (x_t - sum_k w_k(x_t) m_k), w the modes' posterior -> (n, 3)."""
    m, cov = (a.to(x_t) for a in diffused(name, abar))
    precision = torch.linalg.inv(cov)
    r = x_t[:, None] - m  # (n, K, 3)
    w = (-0.5 * (r @ precision * r).sum(-1)).softmax(1)  # (n, K)
    return -(x_t - w @ m) @ precision


# ---------------------------------------------------------------------------------------------------------------------
# the networks: one per (set, noise, seed), trained and sampled side by side


class MLP(nn.Module):
    """M independent networks (x_t, t) -> eps. Row i of a batch belongs to network i % M, which a torch.cat of batches keeps,
    so that losses.py sees one model."""

    def __init__(self, M):
        super().__init__()
        self.M, sizes = M, [3 + 2 * FREQUENCIES] + [WIDTH] * DEPTH + [3]
        self.weight = nn.ParameterList(
            (2 * torch.rand(M, i, o) - 1) / i**0.5 for i, o in zip(sizes, sizes[1:])
        )
        self.bias = nn.ParameterList(torch.zeros(M, 1, o) for o in sizes[1:])
        self.register_buffer(
            "frequency", torch.logspace(math.log10(0.5e-3), math.log10(0.2), FREQUENCIES)
        )  # rad per step

    def forward(self, x_t, t):
        phase = t[:, None] * self.frequency
        h = torch.cat([x_t, phase.sin(), phase.cos()], 1)
        h = h.view(-1, self.M, h.shape[1]).transpose(0, 1)  # (M, n, 3 + 2 FREQUENCIES)
        for i, (weight, bias) in enumerate(zip(self.weight, self.bias)):
            h = torch.baddbmm(bias, F.silu(h) if i else h, weight)
        return h.transpose(0, 1).reshape(x_t.shape)


def train(method, jobs, args, schedule):
    """Train one network per job (set, noise, seed) -> MLP. Each job has its own points; they are drawn once."""
    data = []
    for name, noise, seed in jobs:
        (mean, scale), g = standard(name), torch.Generator().manual_seed(seed)
        data.append((training_points(name, noise, args.points, args.share, g) - mean) / scale)
    data = torch.stack(data).float().to(args.device)  # (M, points, 3)

    torch.manual_seed(args.seed)
    model = MLP(len(jobs)).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    every = torch.arange(len(jobs), device=args.device)
    late = args.steps - round(args.reg_last * args.steps)  # plain DDPM before
    for step in tqdm(
        range(args.steps), desc=f"train {method} x {len(jobs)}", mininterval=1, leave=False
    ):
        x0 = data[every, torch.randint(args.points, (BATCH, len(jobs)), device=args.device)].view(
            -1, 3
        )
        t = torch.randint(schedule.T, (len(x0),), device=args.device)
        eps = torch.randn_like(x0)
        if method == "none" or step < late:
            loss = ddpm_loss(model, schedule, x0, t, eps)
        else:
            perturb, constraint = METHODS[method]
            loss, _ = robust_loss(
                model,
                schedule,
                x0,
                t,
                eps,
                perturb=perturb,
                constraint=constraint,
                lam=args.lam,
                omega=args.omega,
                gamma=args.gamma,
                share=round(args.reg_share * BATCH) / BATCH,
            )
        optimizer.zero_grad()
        (
            loss * model.M
        ).backward()  # the mean is over M networks: each gets the gradient of its own loss
        optimizer.step()
        cosine.step()
    return model


def sample(model, jobs, args, schedule, ddim=False):
    """DDPM (Eq. 5) or DDIM -> x_0 (M, n, 3) in data units, diverged (M, n), path of DDIM [(t, x_t (M, n, 3))]."""
    path = []

    def to_data(x):
        x = x.double().cpu().view(-1, len(jobs), 3).transpose(0, 1)
        return torch.stack(
            [standard(name)[0] + standard(name)[1] * x_j for (name, _, _), x_j in zip(jobs, x)]
        )

    def record(i, t, x):
        outside.logical_or_(~(x.abs().amax(1) < DIVERGED))  # NaN counts
        if ddim:
            path.append((t, to_data(x)))
        return x

    torch.manual_seed(args.seed + 1)
    x_T = torch.randn(args.n * len(jobs), 3, device=args.device)
    outside = torch.zeros(len(x_T), dtype=torch.bool, device=args.device)
    if ddim:
        x = ddim_sample(model, schedule, x_T, steps=100, clip=False, on_step=record)
    else:
        x = ddpm_sample(model, schedule, x_T, steps=args.sample_steps, clip=False, on_step=record)
    record(0, 0, x)
    return to_data(x.nan_to_num(1e4, 1e4, -1e4)), outside.view(-1, len(jobs)).T.cpu(), path


# ---------------------------------------------------------------------------------------------------------------------
# numbers


def sliced_w2(x, y, triples=64):
    """Sliced Wasserstein-2 between equally many points x, y (n, 3) -> float.

    The directions are `triples` random orthonormal bases, so that a shift by c gives exactly |c| / sqrt(3).
    """
    q = torch.linalg.qr(
        torch.randn(triples, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    )[0]
    q = q.permute(1, 0, 2).reshape(3, -1)  # (3, 3 triples), unit columns
    return ((x @ q).sort(0).values - (y @ q).sort(0).values).square().mean().sqrt().item()


def measure(name, x, seed):
    """Samples x (n, 3) against the clean set -> numbers, in data units.

    mode_weights and spread are those of the points on the support; spread = their standard deviation about their mode
    over the clean set's.
    """
    d = distance(name, x)
    on = d <= SUPPORT
    r, mode = torch.cdist(x[on], CENTRES[name]).min(1)
    kept = max(1, len(r))
    weights = torch.bincount(mode, minlength=len(CENTRES[name])) / kept
    reference = clean_points(name, len(x), torch.Generator().manual_seed(10_000 + seed))
    return dict(
        off_support=1 - on.double().mean().item(),
        distance_mean=d.mean().item(),
        distance_95=d.quantile(0.95).item(),
        sliced_w2=sliced_w2(x, reference),
        spread=(r.square().sum() / kept / COVARIANCE[name].trace()).sqrt().item(),
        mode_weights=weights.tolist(),
        smallest_weight=weights.min().item(),
    )


def by_t(eps_of, names, schedule, n=1000):
    """At x_t of the clean sets, for each t of TS -> (3, T, M): error, lip_eps, gain_x0.

    error: |eps_theta - eps*| / |eps*| in root mean square, eps* = -sqrt(1 - abar) grad log p_t: that of the score;
    lip_eps: mean spectral norm of sqrt(1 - abar) d eps / d x_t, how far eps moves per unit of delta (Eq. 6);
    gain_x0: mean Frobenius norm / sqrt(3) of d x^_0 / d x_t = (I - sqrt(1 - abar) d eps / d x_t) / sqrt(abar), which Eq. 10
    penalises: how far x^_0 moves per unit of a random perturbation.
    """
    rows = []
    for t in TS:
        abar, g = schedule.alphas_bar[t].item(), torch.Generator().manual_seed(t)
        s = math.sqrt(1 - abar)
        x = [(clean_points(k, n, g) - standard(k)[0]) / standard(k)[1] for k in names]
        x = [
            math.sqrt(abar) * x_0 + s * torch.randn(n, 3, generator=g, dtype=torch.float64)
            for x_0 in x
        ]  # Eq. 2
        truth = torch.stack(
            [-s * true_score(k, x_t, abar) for k, x_t in zip(names, x)], 1
        )  # (n, M, 3)
        x = torch.stack(x, 1).view(-1, 3).float().to(schedule.betas.device).requires_grad_()
        eps = eps_of(x, torch.full((len(x),), t, device=x.device))
        jacobian = torch.stack(
            [torch.autograd.grad(eps[:, i].sum(), x, retain_graph=True)[0] for i in range(3)], 1
        )
        jacobian = s * jacobian.double().cpu()  # (n M, 3, 3)
        error = (
            (eps.detach().double().cpu().view(truth.shape) - truth).square().mean((0, 2))
        )  # (M,)
        lip_eps = torch.linalg.matrix_norm(jacobian, 2).view(n, -1).mean(0)
        gain_x0 = torch.linalg.matrix_norm(EYE - jacobian).view(n, -1).mean(0) / math.sqrt(3 * abar)
        rows.append(torch.stack([(error / truth.square().mean((0, 2))).sqrt(), lip_eps, gain_x0]))
    return torch.stack(rows, 1)


def true_eps(names, schedule):
    """The ideal networks, side by side as in MLP: (x_t, t) -> -sqrt(1 - abar_t) grad log p_t(x_t), one t per call."""

    def eps(x_t, t):
        abar = schedule.alphas_bar[t[0]].item()
        x = x_t.view(-1, len(names), 3)
        return torch.stack(
            [-math.sqrt(1 - abar) * true_score(k, x[:, j], abar) for j, k in enumerate(names)], 1
        ).view(-1, 3)

    return eps


def over_seeds(values):
    """Mean and standard deviation over seeds (first axis) as lists; no deviation of a single one."""
    v = np.asarray(values)
    return dict(mean=v.mean(0).tolist(), std=v.std(0, ddof=1).tolist() if len(v) > 1 else None)


# ---------------------------------------------------------------------------------------------------------------------
# figures: 2-D projections that keep the thickness of the plane, and the distances between the three modes

AXES = {
    "oblique-plane": (
        torch.tensor([[1.0, -1, 0], [1, 1, 1]]).double() / torch.tensor([[2.0], [3]]).sqrt(),
        ("$(x-y)/\\sqrt{2}$", "$(x+y+z)/\\sqrt{3}$"),
    ),
    "3-gaussians": (
        torch.tensor([[1.0, 0, 0], [0, 2**-0.5, 2**-0.5]]).double(),
        ("$x$", "$(y+z)/\\sqrt{2}$"),
    ),
}
LABEL = {
    "truth": "truth",
    "none": "DDPM",
    "ran": "Robust$_{ran}$",
    "adv": "Robust$_{adv}$",
    "inv-ran": "Inv$_{ran}$",
    "inv-adv": "Inv$_{adv}$",
}
STYLE = {
    "none": ("k", "o", "-"),
    "ran": ("#56B4E9", "s", "-"),
    "adv": ("#0072B2", "^", "-"),  # Okabe and Ito's colours
    "inv-ran": ("#E69F00", "s", "--"),
    "inv-adv": ("#D55E00", "^", "--"),
    "truth": ("#009E73", "", ":"),
}
VIRIDIS = matplotlib.colors.ListedColormap(
    plt.get_cmap("viridis")(np.linspace(0, 0.92, 256))
)  # yellow is lost on white


def project(name, x):
    return (x @ AXES[name][0].T.to(x)).numpy()


def frame(ax, name, labels=True):
    """Equal axes around the set, wide enough for the outliers."""
    (cx, cy), half = project(name, standard(name)[0]), (BOX + 1) * standard(name)[1]
    ax.set(xlim=(cx - half, cx + half), ylim=(cy - half, cy + half), aspect="equal")
    ax.locator_params(nbins=4)
    ax.tick_params(labelsize=8, labelleft=labels)
    ax.set_xlabel(AXES[name][1][0], fontsize=9)
    if labels:
        ax.set_ylabel(AXES[name][1][1], fontsize=9)
    return cx, cy, half


def grid(rows, columns, width, height):
    fig, axes = plt.subplots(
        rows,
        columns,
        figsize=(width * columns, height * rows + 0.5),
        squeeze=False,
        layout="constrained",
    )
    fig.get_layout_engine().set(h_pad=0.08)
    return fig, axes


def save(fig, out, name):
    fig.savefig(out / f"{name}.png", dpi=100)
    fig.set_layout_engine("none")  # keep the layout found
    fig.savefig(out / f"{name}.pdf", dpi=100)
    plt.close(fig)


def figure_2a(out, rows, methods, samples, data):
    """Data and samples per method. rows: (set, noise); samples: {set/noise/method: (n, 3)}; data: {(set, noise): (n, 3)}."""
    fig, axes = grid(len(rows), 1 + len(methods), 1.7, 2.6)
    for (name, noise), line in zip(rows, axes):
        for ax, m in zip(line, [None, *methods]):
            x = data[name, noise] if m is None else samples[f"{name}/{noise}/{m}"]
            off = distance(name, x) > SUPPORT
            for keep, colour in ((off, "#D55E00"), (~off, "#0072B2")):
                ax.scatter(
                    *project(name, x[keep]).T, s=2.5, c=colour, lw=0, alpha=0.7, rasterized=True
                )
            frame(ax, name, labels=m is None)
            ax.set_title(
                f"{'training data' if m is None else LABEL[m]}\n{100 * off.double().mean():.1f} % off",
                fontsize=9,
            )
        line[0].set_ylabel(f"{name}, {noise}\n{AXES[name][1][1]}", fontsize=9)
    fig.suptitle(
        f"Samples; vermilion: off the support (farther than {SUPPORT:g} from it). Data units",
        fontsize=10,
    )
    save(fig, out, "fig2a")


def figure_2b(out, picked, columns, M, schedule, t=100, cells=15):
    """Score fields: arrows of equal length, magnitude as colour. picked: {set: network}; columns: {method: eps}."""
    fig, axes = grid(len(picked), len(columns), 3.1, 3.1)
    s = (1 - schedule.alphas_bar[t]).sqrt().item()
    for line, (name, j) in zip(axes, picked.items()):
        cx, cy, half = frame(line[0], name)
        u, v = torch.cartesian_prod(
            *[torch.linspace(-half, half, cells + 2, dtype=torch.float64)[1:-1]] * 2
        ).T  # (cells^2,)
        x = (
            torch.stack([u, v], 1) @ AXES[name][0] / standard(name)[1]
        ).float()  # the slice through the mean
        x = x.to(schedule.betas.device)
        x, ts = x.repeat_interleave(M, 0), torch.full((M * len(x),), t, device=x.device)
        with torch.no_grad():  # grad log p_t = -eps / sqrt(1 - abar)
            fields = [
                project(name, -eps(x, ts)[j::M].double().cpu() / s) for eps in columns.values()
            ]
        size = [np.linalg.norm(f, axis=1) for f in fields]
        norm = matplotlib.colors.LogNorm(*np.percentile(size, [2, 98]))
        for ax, f, a, method in zip(line, fields, size, columns):
            frame(ax, name, labels=ax is line[0])
            arrows = ax.quiver(
                cx + u,
                cy + v,
                *(f / np.maximum(a, 1e-9)[:, None]).T,
                a,
                norm=norm,
                cmap=VIRIDIS,
                pivot="mid",
                scale=cells * 1.15,
                width=0.008,
                headwidth=4,
            )
            ax.set_title(LABEL[method], fontsize=11)
        line[0].set_ylabel(f"{name}\n{AXES[name][1][1]}", fontsize=10)
        fig.colorbar(arrows, ax=line, label=r"$|\nabla \log p_t|$, standardised units", shrink=0.9)
    fig.suptitle(f"Score field at t = {t} in a slice through the mean. Axes: data units")
    save(fig, out, "fig2b")


def figure_2c(out, schedule, gamma):
    """The ray sqrt(1 - abar) r(t) of Eq. 7 for several omega beside DDPM's sqrt(1 - abar)."""
    fig, ax = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    t = torch.arange(schedule.T, device=schedule.betas.device)
    s = (1 - schedule.alphas_bar).sqrt()
    ax.plot(s.cpu(), "k--", label=r"DDPM: $\sqrt{1-\bar\alpha_t}$")
    for omega, colour in zip((1, 1.5, 2, 3, 4), VIRIDIS(np.linspace(0, 1, 5))):
        ax.plot(
            (s * perturbation_radius(schedule, t, 1.0, omega, gamma)).cpu(),
            color=colour,
            label=rf"$\omega$ = {omega}",
        )
    ax.set(
        xlabel="t (steps)",
        ylabel=r"ray $\sqrt{1-\bar\alpha_t}\,r(t)$, units of $x_t$",
        title=rf"Perturbation ray (Eq. 7), $\gamma$ = {255 * gamma:g}/255, $\beta$ = 1",
        xlim=(0, schedule.T),
    )
    ax.legend(fontsize=9)
    ax.grid(alpha=0.3)
    save(fig, out, "fig2c")


def figure_5(out, rows, shown=(990, 300, 100, 0)):
    """Density (blue) and paths up to t (lines), from noise to data. rows: [(title, set, path of sample())]."""
    fig, axes = grid(len(rows), len(shown), 2.4, 2.3)
    for (title, name, path), line in zip(rows, axes):
        planar = np.stack([project(name, x) for _, x in path])  # (steps, n, 2)
        for ax, t in zip(line, shown):
            stop = [t for t, _ in path].index(t) if t else len(path) - 1
            cx, cy, half = frame(ax, name, labels=ax is line[0])
            ax.hist2d(
                *planar[stop].T,
                bins=50,
                range=[[cx - half, cx + half], [cy - half, cy + half]],
                cmap="Blues",
                norm=matplotlib.colors.LogNorm(0.3, 100),
                rasterized=True,
            )
            ax.plot(*planar[: stop + 1, :60].transpose(2, 0, 1), c="k", lw=0.4, alpha=0.5)
            ax.plot(*planar[stop, :60].T, ".", c="#D55E00", ms=2.5)
            ax.set_title(f"t = {t}" if t else "data", fontsize=9)
        line[0].set_ylabel(f"{title}\n{AXES[name][1][1]}", fontsize=9)
    fig.suptitle(
        "The flow from noise to data (DDIM): density of 2-D projections, and 60 paths. Data units",
        fontsize=10,
    )
    save(fig, out, "fig5")


def figure_by_t(out, curves):
    """curves: {set: {method or "truth": (3, T) of by_t}}."""
    titles = [
        "relative error of the score",
        r"Lipschitz of $\epsilon$: $\sqrt{1-\bar\alpha_t}\,\|\partial\epsilon/\partial x_t\|_2$",
        r"gain of $\hat x_0$: $\|\partial\hat x_0/\partial x_t\|_F/\sqrt{3}$",
    ]
    fig, axes = grid(len(curves), 3, 3.3, 2.9)
    for (name, lines), row in zip(curves.items(), axes):
        for k, (ax, title) in enumerate(zip(row, titles)):
            for method, line in lines.items():
                if k or method != "truth":  # whose error is 0
                    c, marker, dash = STYLE[method]
                    ax.plot(
                        [t + 1 for t in TS],
                        line[k],
                        dash,
                        c=c,
                        marker=marker,
                        ms=4,
                        label=LABEL[method],
                    )
            ax.set_title(title, fontsize=10)
            ax.set(xlabel="t + 1 (steps)", xscale="log", yscale="log")
            ax.grid(alpha=0.3)
        row[0].set_ylabel(name)
    axes[0, 2].legend(fontsize=8)
    fig.suptitle("Against the true score, at points of the clean set diffused to t")
    save(fig, out, "by_t")


KNOBS = {
    "lam": ("$\\lambda$", [0.03, 0.1, 0.3, 1, 3]),
    "omega": ("$\\omega$", [1, 1.5, 2, 3, 4]),
    "gamma": ("$\\gamma$", [g / 255 for g in (1, 3, 8, 24, 64)]),
    "share": ("share of outliers", [0, 0.1, 0.2, 0.4, 0.6, 0.8]),
}


def figure_sweep(out, args, results):
    """results: {"knob=value/set/method": {number: over_seeds}}."""
    titles = dict(
        off_support="off support",
        sliced_w2="sliced W2",
        spread="spread / true",
        smallest_weight="smallest mode",
    )
    panels = [
        (name, k)
        for name in args.sets
        for k in titles
        if k != "smallest_weight" or len(CENTRES[name]) > 1
    ]
    fig, axes = grid(len(panels), len(KNOBS), 2.5, 1.7)
    for line, (name, key) in zip(axes, panels):
        for ax, (knob, (label, values)) in zip(line, KNOBS.items()):
            for method in args.methods:
                r = [results[f"{knob}={value:g}/{name}/{method}"][key] for value in values]
                c, marker, dash = STYLE[method]
                ax.errorbar(
                    values,
                    [v["mean"] for v in r],
                    [v["std"] or 0 for v in r],
                    c=c,
                    marker=marker,
                    ls=dash,
                    ms=4,
                    capsize=2,
                    label=LABEL[method],
                )
            ax.axvline(getattr(args, knob), color="0.6", lw=0.8, ls=":")
            ax.set_xscale("log" if knob in ("lam", "gamma") else "linear")
            ax.set_ylim(bottom=0)
            ax.grid(alpha=0.3)
            ax.set_xlabel(label if (name, key) == panels[-1] else "")
        line[0].set_ylabel(f"{name}\n{titles[key]}", fontsize=9)
    axes[0, -1].legend(fontsize=8)
    fig.suptitle("One knob at a time, the others at the dotted defaults; trained with outliers")
    save(fig, out, "sweep")


# ---------------------------------------------------------------------------------------------------------------------
# the two experiments


def compare(args, out, schedule):
    """Every method on every set, noise and seed, with all figures but the sweep -> numbers for metrics.json.

    "truth" is the ideal network of the clean set through the same sampler and the same measures: the best to expect.
    """
    seeds = range(args.seed, args.seed + args.seeds)
    rows = [(name, noise) for name in args.sets for noise in args.noises]
    jobs = [(*row, seed) for row in rows for seed in seeds]
    names, M = [name for name, _, _ in jobs], len(jobs)
    of_row = {
        row: range(i * len(seeds), (i + 1) * len(seeds)) for i, row in enumerate(rows)
    }  # its networks
    shown = (
        "outliers" if "outliers" in args.noises else args.noises[0]
    )  # Fig. 2b and 5, with this pair of methods
    pair = [m for m in ("none", "adv") if m in args.methods] or args.methods[:1]

    samples, results, curves, models = {}, {}, {}, {"truth": true_eps(names, schedule)}
    for method in ["truth", *args.methods]:
        if method != "truth":
            models[method] = train(method, jobs, args, schedule)
        x, diverged, _ = sample(models[method], jobs, args, schedule)  # (M, n, 3)
        curves[method] = by_t(models[method], names, schedule)  # (3, T, M)
        for row, js in of_row.items():
            key, numbers = "/".join((*row, method)), []
            for j in js:
                found = measure(row[0], x[j], jobs[j][2])
                found["diverged"] = diverged[j].double().mean().item()
                numbers.append({**found, **dict(zip(BY_T, curves[method][:, :, j].tolist()))})
            results[key] = {k: over_seeds([f[k] for f in numbers]) for k in numbers[0]}
            samples[key] = x[js[0]]
            print(line_of(key, results[key]), flush=True)
    np.savez(
        out / "samples.npz",
        **{k: v.float().numpy() for k, v in samples.items() if not k.endswith("/truth")},
    )

    data = {
        row: training_points(
            *row, args.points, args.share, torch.Generator().manual_seed(args.seed)
        )
        for row in rows
    }
    picked = {name: of_row[name, shown][0] for name in args.sets}
    figure_2a(out, rows, args.methods, samples, data)
    figure_2b(out, picked, {m: models[m] for m in ["truth", *pair]}, M, schedule)
    figure_2c(out, schedule, args.gamma)
    paths = {m: sample(models[m], jobs, args, schedule, ddim=True)[2] for m in pair}
    figure_5(
        out,
        [
            (f"{name}, {LABEL[m]}", name, [(t, x[j]) for t, x in paths[m]])
            for name, j in picked.items()
            for m in pair
        ],
    )
    figure_by_t(
        out,
        {
            name: {m: c[:, :, list(of_row[name, shown])].mean(2) for m, c in curves.items()}
            for name in args.sets
        },
    )
    data = {"/".join(row): measure(row[0], x, args.seed) for row, x in data.items()}
    return dict(ts=TS, results=results, training_data=data)


def line_of(key, r):
    """One line of a result for the terminal."""

    def show(k):
        return f"{r[k]['mean']:.3f}" + (f" +- {r[k]['std']:.3f}" if r[k]["std"] is not None else "")

    weights = " ".join(f"{w:.3f}" for w in r["mode_weights"]["mean"])
    return (
        f"{key:<30} off {show('off_support')}  distance {show('distance_mean')}  SW2 {show('sliced_w2')}  "
        f"spread {show('spread')}  weights {weights}  diverged {show('diverged')}"
    )


def sweep(args, out, schedule):
    """One knob at a time, the others at their defaults; DDPM moves with the share alone -> numbers for metrics.json."""
    jobs = [
        (name, "outliers", seed)
        for name in args.sets
        for seed in range(args.seed, args.seed + args.seeds)
    ]
    done, results = {}, {}
    for knob, (_, values) in KNOBS.items():
        for value in tqdm(values, desc=knob):
            for method in args.methods:
                changed = (
                    {}
                    if value == getattr(args, knob) or (method == "none" and knob != "share")
                    else {knob: value}
                )
                run = (method, *changed.items())
                if run not in done:
                    settings = argparse.Namespace(**{**vars(args), **changed})
                    x, _, _ = sample(train(method, jobs, settings, schedule), jobs, args, schedule)
                    done[run] = [measure(name, x_j, seed) for (name, _, seed), x_j in zip(jobs, x)]
                for i, name in enumerate(args.sets):
                    numbers = done[run][i * args.seeds : (i + 1) * args.seeds]
                    results[f"{knob}={value:g}/{name}/{method}"] = {
                        k: over_seeds([f[k] for f in numbers]) for k in numbers[0]
                    }
    figure_sweep(out, args, results)
    return dict(results=results)


# ---------------------------------------------------------------------------------------------------------------------


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--full", action="store_true", help="all noises, three seeds")
    add(
        "--sweep",
        action="store_true",
        help="move lambda, omega, gamma and the share instead; DDPM, ran and adv",
    )
    add("--sets", default=",".join(CENTRES))
    add("--noises", help="of clean,inliers,outliers; default: outliers")
    add("--methods", help="of none,ran,adv,inv-ran,inv-adv; default: all")
    add("--share", type=float, default=0.2, help="share of the training points that is noise")
    add("--points", type=int, default=8000, help="training points, a fixed set per seed")
    add("--lam", type=float, default=0.3)
    add("--omega", type=float, default=2.0)
    add("--gamma", type=float, default=8 / 255)
    share = between(0, 1, above=True)
    add(
        "--reg-last",
        type=share,
        default=1.0,
        metavar="F",
        help="regularise in the last share F of the steps; 1: always",
    )
    add(
        "--reg-share",
        type=share,
        default=1.0,
        metavar="Q",
        help="regularise the first Q of the rows of a batch; 1: all",
    )
    add("--steps", type=int, default=3000, help="training steps")
    add("--sample-steps", type=int, default=500, help="of the DDPM sampler")
    add("--n", type=int, default=2000, help="samples per network")
    add(
        "--seeds",
        type=int,
        help="networks per method, at seed, seed + 1, ..; default: 1, with --full 3",
    )
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto | cpu | cuda | cuda:N")
    add("--out", default="out/toy3d")
    args = parser.parse_args()

    args.noises = args.noises or (",".join(NOISES) if args.full else "outliers")
    args.methods = args.methods or ("none,ran,adv" if args.sweep else ",".join(METHODS))
    args.seeds = (3 if args.full else 1) if args.seeds is None else args.seeds
    for key, known in (("sets", CENTRES), ("noises", NOISES), ("methods", METHODS)):
        chosen = getattr(args, key).split(",")
        if set(chosen) - set(known) or len(set(chosen)) < len(chosen):
            raise ValueError(
                f"--{key} {getattr(args, key)}: need some of {','.join(known)}, each once"
            )
        setattr(args, key, chosen)
    bounds = dict(
        share=(0, 1),
        points=(2, 10**7),
        lam=(0, 10**6),
        omega=(1, 100),
        gamma=(0, 100),
        steps=(1, 10**9),
        sample_steps=(1, 1000),
        n=(2, 10**6),
        seeds=(1, 1000),
        seed=(0, 2**32),
    )
    for key, (low, high) in bounds.items():
        if not low <= getattr(args, key) <= high:
            raise ValueError(
                f"--{key.replace('_', '-')} {getattr(args, key)}: must lie in {low}..{high}"
            )
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {args.device}: not available here") from None
    return args


def main():
    started = time.time()
    args = parse()
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ValueError(f"--out {out}: {e.strerror}") from None
    if not os.access(out, os.W_OK):
        raise ValueError(f"--out {out}: not writable")
    schedule = NoiseSchedule().to(args.device)
    numbers = (sweep if args.sweep else compare)(args, out, schedule)
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "device", "seed", "n")}
    write_metrics(
        out, started, seed=args.seed, device=args.device, n=args.n, settings=settings, **numbers
    )
    print(f"{time.time() - started:.0f} s -> {out}")


if __name__ == "__main__":
    cli(main)
