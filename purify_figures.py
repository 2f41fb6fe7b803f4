"""The table and the figures of purify.py: P2's tables, accuracy by knowledge, Figs. 7 and 8."""

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import outputs
from purification import image_draws
from purify_attack import UNSEEN, gradient_of, loss_of, noises, over_draws

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

COLOURS = outputs.COLOURS[1:]  # without black, which is the intervals'


def of_group(record, name, sampler):
    return [row for row in record if (row["checkpoint"], row["purifier"]) == (name, sampler)]


def percent(row, key):
    low, high = row[key + "_ci"]
    return f"{100 * row[key]:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def table(record, args):
    """Like P2's, in Markdown: one row per checkpoint and purifier, percent with 95 % intervals."""
    accuracies = {"robust": "", "selected": ", chosen"}
    heads = []
    columns = []
    for norm in args.norm:
        for knowledge in args.knowledge:
            for key, label in accuracies.items():
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
        handles.append(plt.Rectangle((0, 0), 1, 1, color=colour, label=", ".join(kind)))
    fig.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    draws = max(row["eot"] for row in record)
    title = f"Purification under PGD-{args.pgd}, EoT-{draws}, n = {args.n}"
    fig.suptitle(title, fontsize=11)
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
