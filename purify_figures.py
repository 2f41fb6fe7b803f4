"""The table and the figures of purify.py: P2's tables, accuracy by knowledge, Figs. 1, 3, 7, 8; and
sweeps.png of reproduce_purify.py."""

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import outputs
from losses import like
from outputs import plt
from purification import image_draws
from purify_attack import UNSEEN, gradient_of, loss_of, noises, over_draws, pgd

COLOURS = outputs.COLOURS[1:]  # without black, which is the intervals'
NAMES = {"white": "White-box", "fwd": "DW_Fwd", "both": "DW_Both", "no noise": "no purifier"}
ACCURACIES = {  # of an attack's row: what the table calls it; library_attack.py says what it is
    "robust": "",
    "selected": ", chosen",
    "judged": ", judged anew",
    "unrepaired": ", AutoAttack's own",
    "flags": ", its own count",
}


def of_group(record, name, sampler):
    return [row for row in record if (row["checkpoint"], row["purifier"]) == (name, sampler)]


def percent(row, key):
    low, high = row[key + "_ci"]
    return f"{100 * row[key]:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def table(record, args):
    """Like P2's, in Markdown: one row per checkpoint and purifier, percent with 95 % intervals."""
    heads = []
    columns = []
    for norm in args.norm:
        for knowledge in args.knowledge:
            for key, label in ACCURACIES.items():
                if key in record[0]:
                    columns.append((norm, knowledge, key))
                    heads.append(f"{norm} {knowledge}{label}")
    lines = [f"| checkpoint | purifier | calls | clean | {' | '.join(heads)} |"]
    lines.append("|---" * (4 + len(heads)) + "|")
    for name, sampler in dict.fromkeys((row["checkpoint"], row["purifier"]) for row in record):
        rows = of_group(record, name, sampler)
        cells = [name, sampler, str(rows[0]["calls"]), percent(rows[0], "clean")]
        for norm, knowledge, key in columns:
            for row in rows:
                if row["norm"] == norm and row["knowledge"] in (knowledge, "no noise"):
                    cells.append(percent(row, key))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def pairs(record):
    """Each checkpoint beside the first, image by image, in Markdown; nothing if there is one."""
    lines = ["", "Right where the first is wrong (+), wrong where it is right (-), p of McNemar's"]
    lines += ["exact test, not corrected for their number:"]
    lines += ["", "| checkpoint | purifier | attack | clean | attacked |", "|---" * 5 + "|"]
    rows = [row for row in record if "robust_p" in row and row["purifier"] != "none"]
    for row in rows:
        cells = [row["checkpoint"], row["purifier"], f"{row['norm']} {row['knowledge']}"]
        for key in ("clean", "robust"):
            cells.append(f"+{row[key + '_gained']} -{row[key + '_lost']}, {row[key + '_p']:.2g}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n" if rows else ""


def plot(record, args, styles, path):
    """Robust accuracy by purifier and knowledge, 95 % intervals; clean accuracy as a diamond."""
    kinds = list(dict.fromkeys((row["knowledge"], row["norm"]) for row in record))
    colours = {kind: COLOURS[k % len(COLOURS)] for k, kind in enumerate(kinds)}
    size = (max(4.5 * len(styles), 6), 3.8)
    fig, axes = plt.subplots(
        1, len(styles), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for ax, (name, (_, label)) in zip(axes[0], styles.items()):
        for i, sampler in enumerate(args.purifier):
            rows = of_group(record, name, sampler)
            for j, row in enumerate(rows):
                at = i + (j - (len(rows) - 1) / 2) * 0.8 / len(kinds)
                colour = colours[row["knowledge"], row["norm"]]
                error = interval(row, "robust")
                ax.bar(
                    at, 100 * row["robust"], 0.75 / len(kinds), color=colour, yerr=error, capsize=2
                )
            clean = dict(fmt="kD", markersize=5, capsize=3)
            ax.errorbar(i, 100 * rows[0]["clean"], interval(rows[0], "clean"), **clean)
        ax.set(title=label, xticks=range(len(args.purifier)), xticklabels=args.purifier)
        ax.tick_params(axis="x", rotation=20 if len(args.purifier) > 3 else 0)
        ax.grid(alpha=0.3, axis="y")
    axes[0, 0].set(ylabel="accuracy (%), 95 % interval", ylim=(0, 100))
    handles = [plt.Line2D([], [], color="k", marker="D", ls="", label="clean")]
    for kind, colour in colours.items():
        draws = max(row["eot"] for row in record if (row["knowledge"], row["norm"]) == kind)
        knowledge, norm = kind
        label = f"{NAMES.get(knowledge, knowledge)}, {norm}"
        if draws > 1:
            label += f", EoT-{draws}"
        handles.append(plt.Rectangle((0, 0), 1, 1, color=colour, label=label))
    fig.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    attack = {"pgd": "PGD", "aa-rand": "AutoAttack-rand"}[args.attack]
    fig.suptitle(f"Purification under {attack}-{args.pgd}, n = {args.n}", fontsize=11)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def interval(row, key):
    """Lengths (2, 1) below and above, in percent, as matplotlib wants them."""
    return 100 * np.abs(np.array(row[key + "_ci"]) - row[key])[:, None]


def directions(net, x, y, args):
    """P2 Fig. 7: cosine of the White-box EoT gradient with the DW_Both gradient at x; Fig. 8: loss
    at x + k / 255 sign(..)."""
    most = args.figures
    index = torch.arange(len(x), device=x.device)
    known = noises("both", args.seed, index, 0)
    semi = noises(f"semi-{most}", args.seed, index, 0)
    best = over_draws(gradient_of, net, x, y, known)
    total = torch.zeros_like(x)
    cosine = {}
    for j, noise in enumerate(tqdm(noises("white", args.seed, index, 0, most), desc="figures"), 1):
        total = total + over_draws(gradient_of, net, x, y, [noise])
        if j & (j - 1) == 0 or j == most:  # the powers of two
            cosine[j] = F.cosine_similarity(total.flatten(1), best.flatten(1)).mean().item()
    common = over_draws(gradient_of, net, x, y, semi, args.eot_batch)
    random = image_draws(args.seed, index, 3 * UNSEEN)(0, x)
    ways = {
        "all noise known (DW)": (best, known),
        f"{most} draws known (semi)": (common, semi),
        f"White-box EoT-{most}": (total, known),
        "random signs": (random, known),
    }
    ks = [-16, -12, -8, -4, -2, 0, 2, 4, 8, 12, 16]
    curves = {}
    for label, (way, draws) in ways.items():
        curves[label] = []
        for k in ks:
            at = (x + k / 255 * way.sign()).clamp(0, 1)
            loss = over_draws(loss_of, net, at, y, draws, args.eot_batch)
            curves[label].append(loss.mean().item())
    return dict(cosine=cosine, k=ks, loss=curves)


def plot_directions(curves, sampler, styles, path):
    size = (4.2 * (1 + len(curves)), 3.8)
    fig, axes = plt.subplots(1, 1 + len(curves), figsize=size, layout="constrained")
    for name, c in curves.items():
        colour, label = styles[name]
        axes[0].plot(list(c["cosine"]), list(c["cosine"].values()), "o-", color=colour, label=label)
    axes[0].set(xlabel="EoT draws", ylabel="cosine with the all-noise-known gradient")
    axes[0].set_title(f"Attack direction, {sampler}")
    axes[0].set_xscale("log", base=2)
    axes[0].xaxis.set_major_formatter("{x:g}")
    axes[0].set_ylim(bottom=0)
    for ax, (name, c) in zip(axes[1:], curves.items()):
        for (label, values), colour in zip(c["loss"].items(), COLOURS):
            ax.plot(c["k"], values, "o-", markersize=4, color=colour, label=label)
        ax.set(xlabel="k, in x + k/255 sign(direction)", ylabel="cross-entropy")
        ax.set_title(f"Loss along it, {styles[name][1]}")
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def plot_sweeps(rows, path):
    """Robust accuracy, with 95 % intervals, against EoT (P2 Fig. 7) and against the network calls
    (Tables 3, 10, Fig. 9)."""
    fig, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    panels = (("eot-sweep-", "draws averaged (EoT)"), ("nfe-", "network calls"))
    for ax, (prefix, label) in zip(axes, panels):
        lines = {}
        for row in rows:
            if row["norm"] != "linf" or not row["folder"].startswith(prefix):
                continue
            at = row["calls"] if prefix == "nfe-" else int(row["folder"].removeprefix(prefix))
            key = f"{row['checkpoint']}, {row['purifier']}, {row['knowledge']}"
            lines.setdefault(key, []).append((at, row))
        for key, points in lines.items():
            points = sorted(points, key=lambda point: point[0])
            at = [x for x, _ in points]
            robust = [100 * row["robust"] for _, row in points]
            ends = np.array([row["robust_ci"] for _, row in points]).T * 100
            error = np.abs(ends - robust)
            ax.errorbar(at, robust, error, marker="o", markersize=4, capsize=2, label=key)
        ax.set(xlabel=label, ylabel="robust accuracy (%), l_inf", xscale="log", ylim=(0, 100))
        ax.grid(alpha=0.3)
        if lines:
            ax.legend(fontsize=7)
    fig.savefig(path, dpi=120)
    plt.close(fig)


# --------------------------------------------------------------------------------------------------
# the way of an attack

REPEATS = 5  # evaluations of one image, each attacked by itself


def attack_path(net, x, y, index, args, knowledge, eot):
    """The delta of l_inf PGD after each step -> (K + 1, B, C, H, W); the first is 0."""
    path = [torch.zeros_like(x)]

    def draws(k):
        return noises(knowledge, args.seed, index, k, eot)

    pgd(net, x, y, draws, "linf", args.pgd, args.eot_batch, path)
    return torch.stack(path)


def landscape(net, x, y, args):
    """P2 Fig. 3, App. D: the mean loss under the evaluation's own noise (ours) on the plane
    x + a d_1 + b d_2, and the White-box EoT and DW_Both attacks projected on it.

    d_1: where DW_Both ends; d_2: the part orthogonal to d_1 of where White-box ends. Each image has
    its own plane. -> dict(a=, loss= (len(a), len(a)) with b along the rows, paths={name: [[a, b],
    ..]}).
    """
    index = torch.arange(len(x), device=x.device)
    known = noises("both", args.seed, index, 0)
    draws = len(noises("white", args.seed, index, 0, args.eot))
    ways = {
        f"White-box EoT-{draws}": attack_path(net, x, y, index, args, "white", draws),
        "all noise known (DW)": attack_path(net, x, y, index, args, "both", 1),
    }
    white, both = (way[-1] for way in ways.values())
    d_1 = both
    d_2 = white - like(dot(white, d_1) / dot(d_1, d_1), x) * d_1
    paths = {}
    for name, way in ways.items():
        a = [(dot(delta, d_1) / dot(d_1, d_1)).mean().item() for delta in way]
        b = [(dot(delta, d_2) / dot(d_2, d_2).clamp_min(1e-30)).mean().item() for delta in way]
        paths[name] = [list(pair) for pair in zip(a, b)]
    ends = np.linspace(-0.5, 1.5, args.landscape).tolist()
    loss = []
    for b in tqdm(ends, desc="landscape"):
        at = [(x + a * d_1 + b * d_2).clamp(0, 1) for a in ends]
        loss.append([over_draws(loss_of, net, one, y, known).mean().item() for one in at])
    return dict(a=ends, loss=loss, paths=paths)


def dot(a, b):
    return (a * b).flatten(1).sum(1)


def trajectories(net, x, y, args):
    """P2 Fig. 1: attacks on REPEATS evaluations of the first image, in the plane of their two
    leading principal components (ours; P2's t-SNE keeps no distances), with the loss under each
    evaluation's own noise. -> {name: dict(at= (REPEATS, K + 1, 2), loss= (REPEATS, K + 1))}."""
    x, y = x[:1].repeat(REPEATS, 1, 1, 1), y[:1].repeat(REPEATS)
    index = torch.arange(REPEATS, device=x.device)  # of its noise: five evaluations
    known = noises("both", args.seed, index, 0)
    draws = len(noises("white", args.seed, index, 0, args.eot))
    ways = {
        "White-box EoT-1": attack_path(net, x, y, index, args, "white", 1),
        f"White-box EoT-{draws}": attack_path(net, x, y, index, args, "white", draws),
        "all noise known (DW)": attack_path(net, x, y, index, args, "both", 1),
    }
    points = torch.stack(list(ways.values())).flatten(3)  # (ways, K + 1, REPEATS, pixels)
    centred = points.flatten(0, 2) - points.flatten(0, 2).mean(0)
    _, _, components = torch.linalg.svd(centred.float(), full_matrices=False)
    found = {}
    for (name, way), own in zip(ways.items(), points):
        at = own.float() @ components[:2].mT
        loss = torch.stack([over_draws(loss_of, net, x + delta, y, known) for delta in way])
        found[name] = dict(at=at.transpose(0, 1).tolist(), loss=loss.mT.tolist())
    return found


def plot_landscape(found, sampler, styles, path):
    """found: {checkpoint: (landscape, trajectories)}; Fig. 3 above, Fig. 1 below."""
    size = (5 * len(found), 8.5)
    fig, axes = plt.subplots(2, len(found), figsize=size, squeeze=False, layout="constrained")
    for (top, below), (name, (plane, ways)) in zip(axes.T, found.items()):
        levels = top.contourf(plane["a"], plane["a"], plane["loss"], 20, cmap="viridis")
        fig.colorbar(levels, ax=top, label="cross-entropy")
        for (label, way), colour in zip(plane["paths"].items(), COLOURS):
            top.plot(*zip(*way), "o-", markersize=3, color=colour, label=label)
        top.set(title=f"{styles[name][1]}, {sampler}")
        top.set(xlabel="share of the DW attack", ylabel="share of what White-box adds")
        losses = np.array([way["loss"] for way in ways.values()])
        scale = dict(vmin=losses.min(), vmax=losses.max(), cmap="viridis", s=14, zorder=3)
        for (label, way), colour in zip(ways.items(), COLOURS):
            for i, (at, loss) in enumerate(zip(way["at"], way["loss"])):
                below.plot(*zip(*at), color=colour, lw=1, label=label if i == 0 else None)
                dots = below.scatter(*zip(*at), c=loss, **scale)
        fig.colorbar(dots, ax=below, label="cross-entropy")
        below.set(title=f"{REPEATS} evaluations of one image")
        below.set(xlabel="first principal component", ylabel="second")
        for ax in (top, below):
            ax.legend(fontsize=8)
    fig.savefig(path, dpi=120)
    plt.close(fig)
