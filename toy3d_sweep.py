"""What each knob does on the toy sets of toy3d.py, and how smooth the networks are at each t.

    python toy3d_sweep.py          # lambda, omega, gamma, share of outliers
    python toy3d_sweep.py --by-t   # the networks of toy3d.py against the true score
    python toy3d_sweep.py --late --steps 10000  # how late, on how many rows, how strongly

One knob moves at a time, the others stay at their defaults; DDPM moves with the share alone.
--late: every --reg-last with every --reg-share, and with every lambda at a --reg-share of 1/4.
Leaves in --out sweep, by_t or late, as PNG and PDF, and metrics.json. --by-t measures at x_t of the
clean sets, trained with outliers unless --noises or --full say otherwise.
"""

import argparse
import math

import torch
from tqdm import tqdm

import runtime
import toy3d_data as toy
from runtime import cli, idle_flags
from toy3d import add_arguments, jobs_of, line_of, run, sample, train
from toy3d_figures import STYLE, VIRIDIS, grid, save

KNOBS = {
    "lam": ("$\\lambda$", [0.03, 0.1, 0.3, 1, 3]),
    "omega": ("$\\omega$", [1, 1.5, 2, 3, 4]),
    "gamma": ("$\\gamma$", [g / 255 for g in (1, 3, 8, 24, 64)]),
    "share": ("share of outliers", [0, 0.1, 0.2, 0.4, 0.6, 0.8]),
}
LASTS = [0.05, 0.1, 0.2, 0.4, 1]  # --reg-last of --late
SHARES = [0.125, 0.25, 0.5, 1]  # --reg-share
LAMBDAS = [0.1, 0.3, 1]
TITLES = {
    "off_support": "off support",
    "sliced_w2": "sliced W2",
    "spread": "spread / true",
    "smallest_weight": "smallest mode",
}
TS = [0, 5, 20, 50, 100, 200, 350, 500, 700, 900]
BY_T = {
    "score_error_by_t": "relative error of the score",
    "lip_eps_by_t": r"Lipschitz of $\epsilon$:"
    r" $\sqrt{1-\bar\alpha_t}\,\|\partial\epsilon/\partial x_t\|_2$",
    "gain_x0_by_t": r"gain of $\hat x_0$: $\|\partial\hat x_0/\partial x_t\|_F/\sqrt{3}$",
}
MARKERS = {"none": "o", "ran": "s", "adv": "^", "inv-ran": "s", "inv-adv": "^", "late-ran": "s"}
MARKERS |= {"late-adv": "^", "truth": ""}


def style(method):
    """Of a curve: invariance is dashed, the truth dotted."""
    colour, label = STYLE.get(method, ("0.6", method))
    dash = {"inv-ran": "--", "inv-adv": "--", "truth": ":"}.get(method, "-")
    return dict(color=colour, label=label, ls=dash, marker=MARKERS[method], ms=4)


# --------------------------------------------------------------------------------------------------
# one knob at a time


def sweep(args, out, schedule):
    """-> numbers for metrics.json."""
    args.noises = ["outliers"]
    jobs = jobs_of(args)
    done = {}  # a setting that several knobs pass through is trained once
    results = {}
    for knob, (_, values) in KNOBS.items():
        for value in tqdm(values, desc=knob):
            for method in args.methods:
                setting = (method, knob, value)
                if value == getattr(args, knob) or (method == "none" and knob != "share"):
                    setting = (method, None, None)
                if setting not in done:
                    change = {knob: value} if setting[1] else {}
                    done[setting] = measured(method, change, jobs, args, schedule)
                for name, numbers in done[setting].items():
                    results[f"{knob}={value:g}/{name}/{method}"] = numbers
    figure_sweep(out, args, results)
    return dict(results=results)


def measured(method, change, jobs, args, schedule, plain=None):
    """Train and sample with the settings `change` -> {set: numbers over the seeds}."""
    changed = argparse.Namespace(**(vars(args) | change))
    model = train(method, jobs, changed, schedule, plain)
    x, diverged, _ = sample(model, jobs, args, schedule)
    runs = {name: [] for name in args.sets}
    for (name, _, seed), x_j, lost in zip(jobs, x, diverged):
        share = lost.double().mean().item()
        runs[name].append(dict(toy.measure(name, x_j, seed), diverged=share))
    return {name: toy.over_seeds(numbers) for name, numbers in runs.items()}


def figure_sweep(out, args, results):
    """results: {"knob=value/set/method": {number: over_seeds}}."""
    panels = []
    for name in args.sets:
        for key in TITLES:
            if key != "smallest_weight" or len(toy.CENTRES[name]) > 1:
                panels.append((name, key))
    fig, axes = grid(len(panels), len(KNOBS), 2.5, 1.7)
    for line, (name, key) in zip(axes, panels):
        for ax, (knob, (_, values)) in zip(line, KNOBS.items()):
            for method in args.methods:
                r = [results[f"{knob}={value:g}/{name}/{method}"][key] for value in values]
                means = [v["mean"] for v in r]
                bars = [v["std"] or 0 for v in r]
                ax.errorbar(values, means, bars, capsize=2, **style(method))
            ax.axvline(getattr(args, knob), color="0.6", lw=0.8, ls=":")
            ax.set_xscale("log" if knob in ("lam", "gamma") else "linear")
            ax.set_ylim(bottom=0)
            ax.grid(alpha=0.3)
        line[0].set_ylabel(f"{name}\n{TITLES[key]}", fontsize=9)
    for ax, (label, _) in zip(axes[-1], KNOBS.values()):
        ax.set_xlabel(label)
    axes[0, -1].legend(fontsize=8)
    fig.suptitle("One knob at a time, the others at the dotted defaults; trained with outliers")
    save(fig, out, "sweep")


# --------------------------------------------------------------------------------------------------
# the regulariser in the last steps, on some of the rows


def late(args, out, schedule):
    """-> numbers for metrics.json, {"last/share/lam/set/method": ..., "set/none": ...}."""
    args.noises = ["outliers"]
    jobs = jobs_of(args)
    plain = {}
    results = {}
    for name, numbers in measured("none", {}, jobs, args, schedule).items():
        results[f"{name}/none"] = numbers
        print(line_of(f"{name}/none", numbers), flush=True)
    cells = [(share, 0.3) for share in SHARES]
    cells += [(0.25, lam) for lam in LAMBDAS if lam != 0.3]
    for last in LASTS:
        for share, lam in tqdm(cells, desc=f"last {last:g}"):
            for method in ("late-adv", "late-ran"):
                change = dict(reg_last=last, reg_share=share, lam=lam)
                found = measured(method, change, jobs, args, schedule, plain)
                for name, numbers in found.items():
                    key = f"{last:g}/{share:g}/{lam:g}/{name}/{method}"
                    results[key] = numbers
                    print(line_of(key, numbers), flush=True)
    figure_late(out, args, results)
    return dict(results=results)


def figure_late(out, args, results):
    """Measures over --reg-last: a line per --reg-share on the left, per lambda on the right."""
    panels = [(name, key) for name in args.sets for key in ("off_support", "sliced_w2", "spread")]
    shares = [(f"on {share:g} of the rows", share, 0.3) for share in SHARES]
    lambdas = [(rf"$\lambda$ = {lam:g}", 0.25, lam) for lam in LAMBDAS]
    columns = []
    for lines, title in ((shares, r"$\lambda$ = 0.3"), (lambdas, "on 0.25 of the rows")):
        columns += [(method, lines, title) for method in ("late-adv", "late-ran")]
    fig, axes = grid(len(panels), len(columns), 2.7, 1.9)
    for row, (name, key) in zip(axes, panels):
        for ax, (method, lines, title) in zip(row, columns):
            ax.axhline(results[f"{name}/none"][key]["mean"], color="k", ls=":", lw=1, label="DDPM")
            for k, (label, share, lam) in enumerate(lines):
                cells = [results[f"{last:g}/{share:g}/{lam:g}/{name}/{method}"] for last in LASTS]
                means = [cell[key]["mean"] for cell in cells]
                colour = VIRIDIS(k / (len(lines) - 1))
                ax.plot(LASTS, means, color=colour, marker="o", ms=3, label=label)
            ax.set_xscale("log")
            ax.set_xticks(LASTS, [f"{last:g}" for last in LASTS], fontsize=8)
            ax.minorticks_off()
            ax.set_ylim(bottom=0)
            ax.grid(alpha=0.3)
            if ax in axes[0]:
                ax.set_title(f"{STYLE[method][1]}, {title}", fontsize=9)
        row[0].set_ylabel(f"{name}\n{TITLES[key]}", fontsize=9)
    for ax in axes[-1]:
        ax.set_xlabel("regularised share of the steps", fontsize=9)
    for ax in axes[0, 1::2]:
        ax.legend(fontsize=7)
    fig.suptitle("Eq. 10 in the last share of the steps (1: from scratch); trained with outliers")
    save(fig, out, "late")


# --------------------------------------------------------------------------------------------------
# the networks at each t


def by_t(eps_of, names, schedule, n=1000):
    """At x_t of the clean sets, for each t of TS -> (3, T, M): error, lip_eps, gain_x0.

    error: |eps_theta - eps*| / |eps*| in root mean square, eps* = -sqrt(1 - abar) grad log p_t:
    that of the score; lip_eps: mean spectral norm of sqrt(1 - abar) d eps / d x_t, how far eps
    moves per unit of delta (Eq. 6); gain_x0: mean Frobenius norm / sqrt(3) of d x^_0 / d x_t =
    (I - sqrt(1 - abar) d eps / d x_t) / sqrt(abar), which Eq. 10 penalises: how far x^_0 moves per
    unit of a random perturbation.
    """
    rows = []
    for t in TS:
        abar = schedule.alphas_bar[t].item()
        s = math.sqrt(1 - abar)
        generator = torch.Generator().manual_seed(t)
        x0 = [toy.to_standard(name, toy.clean_points(name, n, generator)) for name in names]
        points = []
        truth = []
        for name, x in zip(names, x0):
            noise = torch.randn(n, 3, generator=generator, dtype=torch.float64)
            x_t = math.sqrt(abar) * x + s * noise  # Eq. 2
            points.append(x_t)
            truth.append(-s * toy.true_score(name, x_t, abar))
        truth = torch.stack(truth, 1)  # (n, M, 3)
        x = torch.stack(points, 1).view(-1, 3).float().to(schedule.betas.device).requires_grad_()
        eps = eps_of(x, torch.full((len(x),), t, device=x.device))
        columns = [torch.autograd.grad(eps[:, i].sum(), x, retain_graph=True)[0] for i in range(3)]
        jacobian = s * torch.stack(columns, 1).double().cpu()  # (n M, 3, 3)
        error = (eps.detach().double().cpu().view(truth.shape) - truth).square().mean((0, 2))
        error = (error / truth.square().mean((0, 2))).sqrt()  # (M,)
        lip_eps = torch.linalg.matrix_norm(jacobian, 2).view(n, -1).mean(0)
        gain = torch.linalg.matrix_norm(toy.EYE - jacobian).view(n, -1).mean(0)
        rows.append(torch.stack([error, lip_eps, gain / math.sqrt(3 * abar)]))
    return torch.stack(rows, 1)


def smoothness(args, out, schedule):
    """by_t of every method's networks and of the ideal ones -> numbers for metrics.json."""
    jobs = jobs_of(args)
    names = [name for name, _, _ in jobs]
    shown = "outliers" if "outliers" in args.noises else args.noises[0]
    curves = {name: {} for name in args.sets}
    results = {}
    for method in ["truth", *args.methods]:
        if method == "truth":
            model = toy.true_eps(names, schedule)
        else:
            model = train(method, jobs, args, schedule)
        found = by_t(model, names, schedule)  # (3, T, M)
        for first in range(0, len(jobs), args.seeds):
            name, noise, _ = jobs[first]
            of_seeds = found[:, :, first : first + args.seeds]
            runs = [dict(zip(BY_T, of_seeds[:, :, k].tolist())) for k in range(args.seeds)]
            results[f"{name}/{noise}/{method}"] = toy.over_seeds(runs)
            if noise == shown:
                curves[name][method] = of_seeds.mean(2)
    figure_by_t(out, curves)
    return dict(ts=TS, results=results)


def figure_by_t(out, curves):
    """curves: {set: {method or "truth": (3, T) of by_t}}."""
    fig, axes = grid(len(curves), len(BY_T), 3.3, 2.9)
    for (name, lines), row in zip(curves.items(), axes):
        for k, (ax, title) in enumerate(zip(row, BY_T.values())):
            for method, line in lines.items():
                if k > 0 or method != "truth":  # whose error is 0
                    ax.plot([t + 1 for t in TS], line[k], **style(method))
            ax.set_title(title, fontsize=10)
            ax.set(xlabel="t + 1 (steps)", xscale="log", yscale="log")
            ax.grid(alpha=0.3)
        row[0].set_ylabel(name)
    axes[0, -1].legend(fontsize=8)
    fig.suptitle("Against the true score, at points of the clean set diffused to t")
    save(fig, out, "by_t")


def main():
    parser = runtime.parser(__doc__)
    add_arguments(parser)
    parser.set_defaults(methods=["none", "ran", "adv"], out="out/toy3d_sweep")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--by-t", action="store_true", help="the networks at each t instead")
    what.add_argument("--late", action="store_true", help="late-adv, late-ran and when instead")
    args = parser.parse_args()
    idle = idle_flags(parser)
    idle(args.by_t, "n sample_steps", "with --by-t")
    idle(not args.by_t, "noises", "without --by-t")
    idle(args.late, "methods reg_last reg_share lam", "with --late, which has its own")
    run(args, idle, smoothness if args.by_t else late if args.late else sweep)


if __name__ == "__main__":
    cli(main)
