"""The figures of toy3d.py: P1 Fig. 2 (samples, score fields, the ray) and Fig. 5 (the flow)."""

import numpy as np
import torch

import toy3d_data as toy
from losses import perturbation_radius
from outputs import METHOD_STYLE, matplotlib, plt

STYLE = METHOD_STYLE | {"late-ran": ("#009E73", "late ran"), "late-adv": ("#CC79A7", "late adv")}
LABELS = {name: label for name, (_, label) in STYLE.items()}
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
    """Data and samples of each method. samples: {set/noise/method or "data": (n, 3)}."""
    columns = ["data", *methods]
    fig, axes = grid(len(rows), len(columns), 1.7, 2.6)
    for (name, noise), line in zip(rows, axes):
        for ax, method in zip(line, columns):
            x = samples[f"{name}/{noise}/{method}"]
            off = toy.distance(name, x) > toy.SUPPORT
            for keep, colour in ((off, VERMILION), (~off, BLUE)):
                points = toy.project(name, x[keep]).T
                ax.scatter(*points, s=2.5, c=colour, lw=0, alpha=0.7, rasterized=True)
            frame(ax, name, f"{name}, {noise}" if ax is line[0] else None)
            title = LABELS.get(method, "training data")
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
