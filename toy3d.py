"""Outliers in three dimensions: Robust_adv rejects them, Robust_ran fewer, DDPM reproduces them.

A fifth of the training points is noise; invariance instead of equivariance adds more. The price is
variety: the samples lie closer to the middle of their mode. RESULTS.md has the numbers. Density and
score are known in closed form (toy3d_data.py); the losses are losses.py's, unchanged.

    python toy3d.py                             # outliers, five methods, one seed: 2 minutes
    python toy3d.py --full --out results/toy3d  # + clean and inliers, three seeds: 30 minutes
    python toy3d.py --noises inliers --share 0.5 --methods none,adv

Leaves in --out, as PNG and PDF: fig2a (samples), fig2b (score fields), fig2c (the ray), fig5 (the
flow); samples.npz with arrays set/noise/method, (n, 3) in data units, of the first seed; and
metrics.json. lambda, omega, gamma, and the networks at each t: toy3d_sweep.py.
"""

import argparse
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import outputs
import toy3d_data as toy
from losses import NoiseSchedule, ddpm_loss, perturbation_radius, robust_loss
from outputs import matplotlib, plt
from runtime import METHOD_STYLE, between, cli, idle_flags, setup, write_metrics
from samplers import ddim_sample, ddpm_sample

METHODS = {
    "none": None,
    "ran": ("ran", "equivariance"),
    "adv": ("adv", "equivariance"),
    "inv-ran": ("ran", "invariance"),
    "inv-adv": ("adv", "invariance"),
}
SIZES = [35, 128, 128, 128, 3]  # of the networks' layers: x_t and 16 sines and cosines of t -> eps
BATCH = 256
LR = 4e-3  # Adam's; falls to 0 as a cosine
DIVERGED = 10.0  # a path that leaves this cube, in standardised units, has diverged


# --------------------------------------------------------------------------------------------------
# the networks: one per job (set, noise, seed), trained and sampled side by side


class MLP(nn.Module):
    """M independent networks (x_t, t) -> eps, which losses.py sees as one model.

    Row i of a batch belongs to network i % M, which a torch.cat of batches keeps.
    """

    def __init__(self, M):
        super().__init__()
        self.M = M
        layers = list(zip(SIZES, SIZES[1:]))
        self.weight = nn.ParameterList((2 * torch.rand(M, i, o) - 1) / i**0.5 for i, o in layers)
        self.bias = nn.ParameterList(torch.zeros(M, 1, o) for _, o in layers)
        frequency = torch.logspace(math.log10(0.5e-3), math.log10(0.2), 16)  # rad per step
        self.register_buffer("frequency", frequency)

    def forward(self, x_t, t):
        phase = t[:, None] * self.frequency
        h = torch.cat([x_t, phase.sin(), phase.cos()], 1)
        h = h.view(-1, self.M, h.shape[1]).transpose(0, 1)  # (M, n, 35)
        for i, (weight, bias) in enumerate(zip(self.weight, self.bias)):
            if i > 0:
                h = F.silu(h)
            h = torch.baddbmm(bias, h, weight)
        return h.transpose(0, 1).reshape(x_t.shape)


def jobs_of(args):
    """[(set, noise, seed)], the seeds of a set and noise next to each other."""
    seeds = range(args.seed, args.seed + args.seeds)
    return [(name, noise, seed) for name in args.sets for noise in args.noises for seed in seeds]


def train(method, jobs, args, schedule):
    """Train one network per job (set, noise, seed) -> MLP. Each job's points are drawn once."""
    data = []
    for name, noise, seed in jobs:
        generator = torch.Generator().manual_seed(seed)
        points = toy.training_points(name, noise, args.points, args.share, generator)
        data.append(toy.to_standard(name, points))
    data = torch.stack(data).float().to(args.device)  # (M, points, 3)

    torch.manual_seed(args.seed)
    model = MLP(len(jobs)).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    every = torch.arange(len(jobs), device=args.device)
    late = args.steps - round(args.reg_last * args.steps)  # plain DDPM before
    regulariser = dict(lam=args.lam, omega=args.omega, gamma=args.gamma)
    regulariser["share"] = round(args.reg_share * BATCH) / BATCH
    for step in tqdm(range(args.steps), desc=method, mininterval=1, leave=False):
        index = torch.randint(args.points, (BATCH, len(jobs)), device=args.device)
        x0 = data[every, index].view(-1, 3)
        t = torch.randint(schedule.T, (len(x0),), device=args.device)
        eps = torch.randn_like(x0)
        if method == "none" or step < late:
            loss = ddpm_loss(model, schedule, x0, t, eps)
        else:
            loss, _ = robust_loss(model, schedule, x0, t, eps, *METHODS[method], **regulariser)
        optimizer.zero_grad()
        # the mean is over M networks: each gets the gradient of its own loss
        (loss * model.M).backward()
        optimizer.step()
        cosine.step()
    return model


def sample(model, jobs, args, schedule, ddim=False):
    """DDPM (Eq. 5) or DDIM, from the same x_T for every model.

    -> x_0 (M, n, 3) in data units, diverged (M, n), path of DDIM [(t, x_t (M, n, 3))]
    """
    path = []

    def to_data(x):
        x = x.double().cpu().view(-1, len(jobs), 3)
        return torch.stack([toy.from_standard(job[0], x[:, j]) for j, job in enumerate(jobs)])

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


# --------------------------------------------------------------------------------------------------
# figures

LABELS = {name: label for name, (_, label) in METHOD_STYLE.items()}
BLUE, VERMILION = "#0072B2", "#D55E00"
SHADES = plt.get_cmap("viridis")(np.linspace(0, 0.92, 256))  # yellow is lost on white
VIRIDIS = matplotlib.colors.ListedColormap(SHADES)


def frame(ax, name, title):
    """Equal axes around the set and its outliers; title: of the row, in its first panel."""
    mean, scale = toy.standard(name)
    cx, cy = toy.project(name, mean)
    half = (toy.BOX + 1) * scale
    ax.set(xlim=(cx - half, cx + half), ylim=(cy - half, cy + half), aspect="equal")
    ax.locator_params(nbins=4)
    ax.tick_params(labelsize=8, labelleft=title is not None)
    ax.set_xlabel(toy.AXIS_NAMES[name][0], fontsize=9)
    if title is not None:
        ax.set_ylabel(f"{title}\n{toy.AXIS_NAMES[name][1]}", fontsize=9)
    return cx, cy, half


def grid(rows, columns, width, height):
    size = (width * columns, height * rows + 0.5)
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    fig.get_layout_engine().set(h_pad=0.08)
    return fig, axes


def save(fig, out, name):
    fig.savefig(out / f"{name}.png", dpi=100)
    fig.set_layout_engine("none")  # keep the layout found
    fig.savefig(out / f"{name}.pdf", dpi=100)
    plt.close(fig)


def figure_2a(out, rows, methods, samples):
    """Data and samples of each method. samples: {set/noise/method or "training data": (n, 3)}."""
    columns = ["training data", *methods]
    fig, axes = grid(len(rows), len(columns), 1.7, 2.6)
    for (name, noise), line in zip(rows, axes):
        for ax, method in zip(line, columns):
            x = samples[f"{name}/{noise}/{method}"]
            off = toy.distance(name, x) > toy.SUPPORT
            for keep, colour in ((off, VERMILION), (~off, BLUE)):
                points = toy.project(name, x[keep]).T
                ax.scatter(*points, s=2.5, c=colour, lw=0, alpha=0.7, rasterized=True)
            frame(ax, name, f"{name}, {noise}" if ax is line[0] else None)
            title = LABELS.get(method, method)
            ax.set_title(f"{title}\n{100 * off.double().mean():.1f} % off", fontsize=9)
    title = f"Vermilion: off the support (farther than {toy.SUPPORT:g} from it). Data units"
    fig.suptitle(title, fontsize=10)
    save(fig, out, "fig2a")


def figure_2b(out, picked, models, M, schedule, t=100, cells=15):
    """Score fields: arrows of equal length, magnitude as colour.

    picked: {set: network}; models: {method: M networks side by side}
    """
    fig, axes = grid(len(picked), len(models), 3.1, 3.1)
    s = (1 - schedule.alphas_bar[t]).sqrt().item()
    for line, (name, j) in zip(axes, picked.items()):
        for ax, method in zip(line, models):
            cx, cy, half = frame(ax, name, name if ax is line[0] else None)
            ax.set_title(LABELS.get(method, method), fontsize=11)
        points = torch.linspace(-half, half, cells + 2, dtype=torch.float64)[1:-1]
        uv = torch.cartesian_prod(points, points)  # (cells^2, 2), in the slice through the mean
        x = (uv @ toy.AXES[name] / toy.standard(name)[1]).float().to(schedule.betas.device)
        x = x.repeat_interleave(M, 0)
        ts = torch.full((len(x),), t, device=x.device)
        with torch.no_grad():  # grad log p_t = -eps / sqrt(1 - abar)
            scores = [-eps(x, ts)[j::M].double().cpu() / s for eps in models.values()]
        fields = [toy.project(name, score) for score in scores]
        sizes = [np.linalg.norm(field, axis=1) for field in fields]
        norm = matplotlib.colors.LogNorm(*np.percentile(sizes, [2, 98]))
        style = dict(norm=norm, cmap=VIRIDIS, pivot="mid", width=0.008, headwidth=4)
        for ax, field, size in zip(line, fields, sizes):
            u, v = uv.T.numpy()
            du, dv = (field / np.maximum(size, 1e-9)[:, None]).T
            arrows = ax.quiver(cx + u, cy + v, du, dv, size, scale=cells * 1.15, **style)
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
        ray = s * perturbation_radius(schedule, t, 1.0, omega, gamma)
        ax.plot(ray.cpu(), color=colour, label=rf"$\omega$ = {omega}")
    ax.set(xlabel="t (steps)", xlim=(0, schedule.T))
    ax.set_ylabel(r"ray $\sqrt{1-\bar\alpha_t}\,r(t)$, units of $x_t$")
    ax.set_title(rf"Perturbation ray (Eq. 7), $\gamma$ = {255 * gamma:g}/255, $\beta$ = 1")
    ax.legend(fontsize=9)
    ax.grid(alpha=0.3)
    save(fig, out, "fig2c")


def figure_5(out, picked, paths, shown=(990, 300, 100, 0)):
    """Density (blue) and paths up to t (lines), from noise to data.

    picked: {set: network}; paths: {method: path of sample()}
    """
    rows = [(name, j, method) for name, j in picked.items() for method in paths]
    fig, axes = grid(len(rows), len(shown), 2.4, 2.3)
    for (name, j, method), line in zip(rows, axes):
        title = f"{name}, {LABELS[method]}"
        times = [t for t, _ in paths[method]]
        planar = np.stack([toy.project(name, x[j]) for _, x in paths[method]])  # (steps, n, 2)
        for ax, t in zip(line, shown):
            stop = times.index(t) if t else len(times) - 1
            cx, cy, half = frame(ax, name, title if ax is line[0] else None)
            box = [[cx - half, cx + half], [cy - half, cy + half]]
            style = dict(cmap="Blues", norm=matplotlib.colors.LogNorm(0.3, 100), rasterized=True)
            ax.hist2d(*planar[stop].T, bins=50, range=box, **style)
            ax.plot(*planar[: stop + 1, :60].transpose(2, 0, 1), c="k", lw=0.4, alpha=0.5)
            ax.plot(*planar[stop, :60].T, ".", c=VERMILION, ms=2.5)
            ax.set_title(f"t = {t}" if t else "data", fontsize=9)
    title = "The flow from noise to data (DDIM): density in 2-D, and 60 paths. Data units"
    fig.suptitle(title, fontsize=10)
    save(fig, out, "fig5")


# --------------------------------------------------------------------------------------------------
# the experiment


def experiment(args, out, schedule):
    """Every method on every set, noise and seed -> numbers for metrics.json.

    "truth", the ideal network of the clean set through the same sampler: the best to expect.
    """
    jobs = jobs_of(args)
    models = {"truth": toy.true_eps([name for name, _, _ in jobs], schedule)}
    results = {}
    samples = {}
    for method in ["truth", *args.methods]:
        if method != "truth":
            models[method] = train(method, jobs, args, schedule)
        x, diverged, _ = sample(models[method], jobs, args, schedule)  # (M, n, 3)
        for first in range(0, len(jobs), args.seeds):
            runs = []
            for j in range(first, first + args.seeds):
                name, noise, seed = jobs[j]
                share = diverged[j].double().mean().item()
                runs.append(dict(toy.measure(name, x[j], seed), diverged=share))
            key = f"{name}/{noise}/{method}"
            results[key] = toy.over_seeds(runs)
            samples[key] = x[first]
            print(line_of(key, results[key]), flush=True)
        arrays = {k: x.float().numpy() for k, x in samples.items() if not k.endswith("/truth")}
        np.savez(out / "samples.npz", **arrays)  # after each: Ctrl-C keeps those before
    data = {}
    for name, noise, _ in jobs[:: args.seeds]:
        generator = torch.Generator().manual_seed(args.seed)
        x = toy.training_points(name, noise, args.points, args.share, generator)
        samples[f"{name}/{noise}/training data"] = x
        data[f"{name}/{noise}"] = toy.measure(name, x, args.seed)
    figures(args, out, schedule, jobs, models, samples)
    return dict(results=results, training_data=data)


def figures(args, out, schedule, jobs, models, samples):
    """Fig. 2 and 5; 2b and 5 of DDPM and Robust_adv, trained with outliers if there are any."""
    noise = "outliers" if "outliers" in args.noises else args.noises[0]
    picked = {name: jobs.index((name, noise, args.seed)) for name in args.sets}
    pair = [m for m in ("none", "adv") if m in args.methods] or args.methods[:1]
    figure_2a(out, [job[:2] for job in jobs[:: args.seeds]], args.methods, samples)
    figure_2b(out, picked, {m: models[m] for m in ["truth", *pair]}, len(jobs), schedule)
    figure_2c(out, schedule, args.gamma)
    paths = {m: sample(models[m], jobs, args, schedule, ddim=True)[2] for m in pair}
    figure_5(out, picked, paths)


def line_of(key, numbers):
    """One line of a result for the terminal, means over the seeds."""
    names = ("off_support", "distance_mean", "sliced_w2", "spread", "diverged")
    return f"{key:<30}  " + "  ".join(f"{name} {numbers[name]['mean']:.3f}" for name in names)


# --------------------------------------------------------------------------------------------------
# the command line


def add_arguments(parser):
    """The flags that toy3d_sweep.py shares."""
    add = parser.add_argument
    share = between(0, 1, above=True)
    add("--full", action="store_true", help="all noises, three seeds")
    add("--sets", default=",".join(toy.CENTRES))
    add("--noises", help="of clean,inliers,outliers; default: outliers")
    add("--methods", default=",".join(METHODS), help="of none,ran,adv,inv-ran,inv-adv")
    add("--share", type=between(0, 1), default=0.2, help="share of the training points: noise")
    add("--points", type=between(2, kind=int), default=8000, help="a fixed set per seed")
    add("--lam", type=between(0), default=0.3)
    add("--omega", type=between(1, 100), default=2.0)
    add("--gamma", type=between(0, 100), default=8 / 255)
    add("--reg-last", type=share, default=1.0, help="regularise in this last share of the steps")
    add("--reg-share", type=share, default=1.0, help="regularise this share of a batch's rows")
    add("--steps", type=between(1, kind=int), default=3000, help="training steps")
    add("--sample-steps", type=between(1, 1000, int), default=500, help="of the DDPM sampler")
    add("--n", type=between(2, kind=int), default=2000, help="samples per network")
    add("--seeds", type=between(1, 1000, int), help="networks per method; default 1, --full 3")
    add("--seed", type=between(0, 2**32, int), default=0, help="the first seed")
    add("--device", default="auto", help="auto | cpu | cuda | cuda:N")
    add("--out", default="out/toy3d")


def check(args, idle):
    """Fills in and refuses; idle: of idle_flags."""
    idle(args.noises and args.seeds, "full", "with --noises and --seeds")
    idle(args.methods == "none", "lam omega reg_last reg_share", "with --methods none")
    idle(args.noises == "clean", "share", "with --noises clean")
    args.noises = args.noises or (",".join(toy.NOISES) if args.full else "outliers")
    args.seeds = args.seeds or (3 if args.full else 1)
    for key, known in (("sets", toy.CENTRES), ("noises", toy.NOISES), ("methods", METHODS)):
        text = getattr(args, key)
        chosen = text.split(",")
        if set(chosen) - set(known) or len(set(chosen)) < len(chosen):
            raise ValueError(f"--{key} {text}: need some of {','.join(known)}, each once")
        setattr(args, key, chosen)
    args.device = setup(args.device)[0]


def run(args, idle, function):
    """Writes function(args, out, schedule) -> numbers to --out/metrics.json."""
    started = time.time()
    check(args, idle)
    out = outputs.claim(args.out)
    numbers = function(args, out, NoiseSchedule().to(args.device))
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "device", "seed", "n")}
    about = dict(seed=args.seed, device=args.device, n=args.n, settings=settings)
    write_metrics(out, started, **about, **numbers)
    print(f"{time.time() - started:.0f} s -> {out}")


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add_arguments(parser)
    run(parser.parse_args(), idle_flags(parser), experiment)


if __name__ == "__main__":
    cli(main)
