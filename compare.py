"""Several checkpoints, numbers of sampling steps and spacing rules: a sample of each, side by side.

    python compare.py --ckpt ddpm robust --sampler ddim --steps 100 --n 64     # the figure: minutes
    python compare.py --ckpt ddpm robust --steps 1000 300 --fid --spacing naive truncated  # Table 1
    torchrun --nproc-per-node 8 -- compare.py --ckpt ddpm robust --steps 1000 300 --n 50000 --fid

The claim (P1 §3.3, "Faster Sampling", Table 1 right): with fewer steps of Eq. 5, Robust_adv
degrades gracefully where DDPM collapses, most of all at 300 of 1,000. P1 does not say which steps
it leaves out, and the claim hangs on that: the three rules of samplers.ddpm_timesteps (ours) are
there to find out which of them shows it; in our runs `truncated`, at 100 and 50 steps (RESULTS.md).

Leaves, for each sample, --out/NAME/ as sample.py leaves its --out, with NAME =
FOLDER[-STEPS][-SPACING], the folder of the checkpoint and what else differs; and
--out/metrics.json, side_by_side.png and table.csv, the first rows of these two being the training
images, clean and as trained on; with several numbers of steps also steps.md and steps.png. Image i
is that of sample.py with the same flags.
"""

import argparse
import itertools
import time
from pathlib import Path

import torch
from torchvision.utils import make_grid

import metrics
import outputs
import runtime
from data import CorruptedImages, load_images
from outputs import plt
from runtime import between
from sample import FID_FLAGS, add_arguments, folder_name, sample_and_score


def run_name(args, path, steps, spacing):
    """The folder of one sample: the checkpoint's, with what else differs between the samples."""
    parts = [folder_name(path)]
    if len(args.steps) > 1:
        parts.append(str(steps))
    if len(args.spacing) > 1:
        parts.append(spacing)
    return "-".join(parts)


def parse_args():
    parser = runtime.parser(__doc__)
    add = parser.add_argument
    add("--ckpt", required=True, nargs="+", help="checkpoints or folders, as of sample.py")
    count = dict(type=between(1, kind=int), default=10_000)
    add("--n", **count, help="images of each; FID below 10,000 is biased upwards")
    steps = dict(type=int, nargs="+", default=[None])
    add("--steps", **steps, help="default: ddpm 1000, ddim 100, heun 18")
    add("--spacing", nargs="+", default=["respaced"], help="ddpm: respaced | naive | truncated")
    add("--out", default="compare", help="a folder for each sample, the table and the figures")
    add("--fid", action="store_true", help="FID and IS against the clean images of --data")
    add("--png", action=argparse.BooleanOptionalAction, default=True, help="write the PNG folders")
    add_arguments(parser)
    args = parser.parse_args()
    runtime.idle_flags(parser)(not args.fid, FID_FLAGS, "without --fid")
    return args


def main():
    args = parse_args()
    started = time.time()
    out = Path(args.out)
    runs = {}
    for path, steps, spacing in itertools.product(args.ckpt, args.steps, args.spacing):
        name = run_name(args, path, steps, spacing)
        if name in runs:
            what = f"--ckpt, --steps, --spacing: two samples would share {out}/{name}"
            raise ValueError(f"{what}; rename a checkpoint's folder, give no value twice")
        runs[name] = path, steps, spacing
    device, _, _ = runtime.setup(args.device, True, args.compile)
    results = sample_and_score({out / name: run for name, run in runs.items()}, args)
    if not results:  # under torchrun the first process has them
        return
    side_by_side(results, out, args)
    if len(args.steps) > 1:
        numbers = {run: results[out / name][1] for name, run in runs.items()}
        methods = {}
        for name, (path, _, _) in runs.items():
            methods[folder_name(path)] = outputs.method_of(results[out / name][2])
        fewer_steps(numbers, outputs.styles(methods), out, args)
    scores = {name: results[out / name][1] for name in runs}
    outputs.write_metrics(out, started, seed=args.seed, device=device, n=args.n, samples=scores)


def pictures(x, nrow):
    """x (n, 3, S, S) in [-1, 1], cut to it -> one picture (H, W, 3) for imshow, nrow in a row."""
    grid = make_grid((x.clamp(-1, 1) + 1) / 2, nrow=nrow, padding=1, pad_value=1)
    return grid.permute(1, 2, 0).numpy()


def some_of(n, count):
    """`count` of n image numbers at random, not in the order in which data.py picks the faulty."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(1))[:count]


def training_rows(settings, size, args):
    """[(name, images (n, 3, size, size) in [-1, 1])] of the training images: clean, and as all the
    checkpoints saw them; [] where the set is not on this machine."""
    trained_on, p, sigma, seed, corrupt, drop_noisy = settings[0]
    name = args.data or trained_on or ""
    try:
        clean, _ = load_images(name, size, root=args.data_root)
        corrupt = corrupt or "gauss"
        data = CorruptedImages(clean, None, p or 0, sigma or 0, seed or 0, corrupt=corrupt)
    except ValueError:
        return []
    index = some_of(len(data), 2000)
    known = all(sets == name for sets, *_ in settings)
    rows = [("clean training images" if known else f"clean {name}", data.clean(index))]
    if p and known and not drop_noisy and len(set(settings)) == 1:
        rows.append(("as trained on", data.batch(index)))
    return rows


TRAINED_ON = "data p sigma seed corrupt drop_noisy".split()
SHOWN = ("noise_level", "from_clean", "IS", "class_score", "recall")


def shown_of(numbers):
    """The few numbers of a sample that figures and steps.md show: the noise never stands alone."""
    return [k for k in numbers if k in SHOWN or k.startswith(("FID", "Fréchet"))]


def side_by_side(results, out, args):
    """OUT/table.csv and side_by_side.png: the training images, then each sample.

    results: as of sample_and_score.
    """
    samples, _, trained = zip(*results.values())
    settings = [tuple(t.get(k) for k in TRAINED_ON) for t in trained]
    sets = {args.data or t.get("data") for t in trained}
    training = []
    if len(sets) == 1 and len({x.shape for x in samples}) == 1:
        training = training_rows(settings, samples[0].shape[-1], args)
    rows = [(name, x, metrics.image_statistics(x)) for name, x in training]
    rows += [(folder.name, x, dict(numbers)) for folder, (x, numbers, _) in results.items()]
    if training:
        clean = training[0][1]
        for _, x, numbers in rows[1:]:
            numbers["from_clean"] = metrics.nearest_distance(x[:64], clean)  # no more of any row
    outputs.write_table(out / "table.csv", [dict(name=name) | numbers for name, _, numbers in rows])
    print((out / "table.csv").read_text(), end="")
    draw_rows(rows, out / "side_by_side.png", min(32, args.n))


def draw_rows(rows, path, shown):
    """rows: [(name, images, numbers)]; the first `shown` images of each, with a title."""
    height = 0.25 + 0.55 * (1 + (shown > 16))
    size = (9, height * len(rows))
    fig, axes = plt.subplots(len(rows), 1, figsize=size, layout="constrained", squeeze=False)
    for ax, (name, x, numbers) in zip(axes[:, 0], rows):
        ax.imshow(pictures(x[:shown], nrow=16), interpolation="nearest")
        title = ", ".join(f"{k.replace('_', ' ')} {numbers[k]:.3f}" for k in shown_of(numbers))
        ax.set_title(f"{name}: {title}", fontsize=10, loc="left", pad=3)
        ax.axis("off")
    fig.savefig(path, dpi=120)
    plt.close(fig)


TITLES = {
    "noise_level": "noise level ([-1, 1] scale)",
    "IS": "Inception Score",
    "class_score": "class score",
}


def fewer_steps(numbers, styles, out, args):
    """OUT/steps.md and steps.png (Table 1, right): each number over the steps.

    numbers: {(checkpoint, steps, spacing): {name: value}}; styles: {folder: (colour, label)}.
    """
    keys = shown_of(next(iter(numbers.values())))
    steps = sorted(args.steps, reverse=True)
    lines = [
        f"{args.sampler}, n = {args.n}: {' / '.join(keys)}",
        "",
        f"| checkpoint | spacing | {' | '.join(map(str, steps))} |",
        "|---" * (2 + len(steps)) + "|",
    ]
    fig, axes = plt.subplots(1, len(keys), figsize=(9, 3.4), layout="constrained", squeeze=False)
    for path in args.ckpt:
        name = folder_name(path)
        colour, label = styles[name]
        for spacing, line in zip(args.spacing, ("o-", "s--", "^:")):
            row = [numbers[path, s, spacing] for s in steps]
            cells = [" / ".join(f"{found[k]:.4g}" for k in keys) for found in row]
            lines.append(f"| {name} | {spacing} | {' | '.join(cells)} |")
            for ax, key in zip(axes[0], keys):
                values = [found[key] for found in row]
                ax.plot(steps, values, line, color=colour, ms=4, label=f"{label}, {spacing}")
                ax.set_title(TITLES.get(key, key.replace(" in ", "\nin ")))
    for ax in axes[0]:
        ax.set(xscale="log", xlabel="sampling steps")
        ax.set_xticks(steps, map(str, steps))
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    place = dict(loc="outside lower center", ncols=len(args.ckpt), fontsize=8, frameon=False)
    fig.legend(handles, labels, **place)
    fig.savefig(out / "steps.png", dpi=130)
    plt.close(fig)
    (out / "steps.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    runtime.cli(main)
