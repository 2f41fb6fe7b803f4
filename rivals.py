"""Rivals that also know nothing: when is adversarial training the right choice?

    python rivals.py toy --data folder:cifar10/train --test folder:cifar10/test   # CPU, 16x16, mini network, about 3 hours
    python rivals.py full --data cifar10 --inception-weights PATH                 # the published length; not run yet

The claim put to the test (P1): Robust_adv learns clean images from faulty ones and is told nothing about the fault. Nor are
these: the pseudo-Huber loss, Ambient training with the noise estimated per image, and leaving out the images that are judged
noisy. Six methods on seven faults of the training images, each fixed per image; every method has the same network, images,
seeds and steps, those of `reproduce.py SIZE`, whose runs are used where they are the same. As there, what is done is skipped.

Leaves --out/table.md, rivals.png, samples.png, records/ and metrics.json: Fréchet distance to the clean images, noise left,
and the share of the samples that metrics.judged_faulty takes for faulty images.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch

import metrics
import runtime
from compare import pictures, some_of
from data import FOREIGN, CorruptedImages, load_images, to_float
from reproduce import CLEAN, NOISY, PAPER, SIZES, add_arguments, cell, check, run_all, shared
from runtime import setup
from sample import features_network

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

METHODS = {
    "none": "--robust none",
    "ran": "--robust ran" + PAPER,
    "adv": "--robust adv" + PAPER,
    "huber": "--robust huber",
    "ambient": "--robust ambient",
    "drop": "--drop-noisy",
}
FAULTS = [  # p, --corrupt, sigma, further seeds
    (0.9, "gauss", 0.2, 1),
    (0.3, "gauss", 0.2, 0),
    (0.3, "outliers", 0, 1),
    (0.3, "class", 0, 0),
    (0.9, "salt-pepper", 0.05, 0),
    (0.3, "patch", 0.4, 0),
    (0.3, "blur", 1, 0),
]
OFF = (0.8, 1.2)  # the estimated sigma times this, in Ambient training on the first fault


def name_of(method, p, kind, sigma, k=0):
    """The folder of one training; k = 0 is the first seed."""
    return (
        f"{method}-{p}"
        + f"-{kind}" * (kind != "gauss")
        + f"-{sigma}" * (sigma > 0)
        + f"-seed{k}" * (k > 0)
    )


def clean_name(k):
    return name_of("none", 0, "gauss", 0, k)


def commands(args):
    """[(result that says it is done, argv)], the first seed of all faults first."""
    *_, todo = shared(args)
    for k in range(1 + max(more for *_, more in FAULTS)):
        todo += cell(args, clean_name(k), METHODS["none"], CLEAN, args.seed + k, ["ddpm"])
        for p, kind, sigma, more in FAULTS:
            corruption = (
                f"--p {p}"
                + f" --sigma {sigma}" * (sigma > 0)
                + f" --corrupt {kind}" * (kind != "gauss")
            )
            for method, flags in METHODS.items() if k <= more else ():
                todo += cell(
                    args,
                    name_of(method, p, kind, sigma, k),
                    flags,
                    corruption,
                    args.seed + k,
                    ["ddpm"],
                )
    for x in OFF:
        todo += cell(
            args,
            name_of(f"ambient-x{x}", *FAULTS[0][:3]),
            f"--robust ambient --sigma-scale {x}",
            NOISY,
            args.seed,
            ["ddpm"],
        )
    return todo


def read_records(todo, args):
    """The record of every sample, by the folder of its training; all records are copied to OUT/records."""
    records = {}
    (Path(args.out) / "records").mkdir(parents=True, exist_ok=True)
    for done, _ in todo:
        parts = done.relative_to(args.work).parts[:-1]
        shutil.copy(done, Path(args.out) / "records" / f"{'-'.join(parts)}.json")
        if parts[-1] == "ddpm":
            records[parts[0]] = json.loads(done.read_text())
    return records


def sampled(name, args):
    with np.load(Path(args.work) / name / "ddpm/samples.npz") as f:
        return f["images"]


def judge(images, args):
    """{(fault, k): shares judged faulty of clean images, faulty images, samples of DDPM on clean images, of each method}."""
    device, shares = setup(args.device)[0], {}
    network, *_ = features_network(
        None if args.inception_weights else f"{args.work}/classifier/classifier.pt",
        args.inception_weights,
    )

    def features(x):  # uint8 (n, S, S, 3) -> (n, d)
        return metrics.extract(network, x, device=device)[0].astype(np.float64)

    index = some_of(len(images), 8000)
    index = index[
        np.unique(index % FOREIGN, return_index=True)[1]
    ]  # --corrupt class repeats its images
    clean = features(np.array(images[index]))
    baseline = [
        features(sampled(clean_name(k), args)) for k in range(1 + max(more for *_, more in FAULTS))
    ]
    for fault in FAULTS:
        p, kind, sigma, more = fault
        data = CorruptedImages(images, None, 1.0, sigma, args.seed, corrupt=kind)
        faulty = features(metrics.to_uint8(data.batch(index)).permute(0, 2, 3, 1).numpy())
        for k in range(1 + more):
            samples = [features(sampled(name_of(m, p, kind, sigma, k), args)) for m in METHODS]
            shares[fault, k] = metrics.judged_faulty(clean, faulty, baseline[k], *samples)
    return shares


def title_of(p, kind, sigma, *_):
    return f"{kind} {sigma or ''}".strip() + f", p = {p}"


def table(records, shares, distance, first_seed):
    """-> lines of markdown, one per fault and seed."""

    def numbers(name, *share):
        r = records[name]
        return " / ".join(
            [f"{r[distance]:.2f}", f"{r['noise_level']:.3f}", *(f"{v:.2f}" for v in share)]
        )

    lines = [
        f"{distance} / noise left / share of the samples judged faulty; {records[clean_name(0)]['n']} samples of "
        f"{records[clean_name(0)]['steps']}-step DDPM.",
        "",
        f"| fault | seed | judged faulty: clean images, faulty images | DDPM on clean images | {' | '.join(METHODS)} |",
        "|---" * (4 + len(METHODS)) + "|",
    ]
    for (fault, k), (clean, faulty, base, *each) in shares.items():
        cells = [numbers(name_of(m, *fault[:3], k), share) for m, share in zip(METHODS, each)]
        lines.append(
            f"| {title_of(*fault)} | {first_seed + k} | {clean:.2f}, {faulty:.2f} | "
            f"{numbers(clean_name(k), base)} | {' | '.join(cells)} |"
        )
    first = FAULTS[0][:3]
    off = {1.0: name_of("ambient", *first)} | {x: name_of(f"ambient-x{x}", *first) for x in OFF}
    return lines + [
        "",
        f"ambient, {title_of(*FAULTS[0])}, with the estimates times "
        + ", ".join(f"{x}: {numbers(off[x])}" for x in sorted(off))
        + ".",
    ]


def plot(records, shares, distance, path):
    """Above the distances, below the shares judged faulty: a panel per fault, a point per method and seed."""
    fig, axes = plt.subplots(
        2, len(FAULTS), figsize=(13, 5), layout="constrained", sharex=True, squeeze=False
    )
    for (fault, k), (_, _, base, *each) in shares.items():
        names = [name_of(m, *fault[:3], k) for m in METHODS]
        for ax, values, clean in zip(
            axes[:, FAULTS.index(fault)],
            ([records[name][distance] for name in names], each),
            (records[clean_name(k)][distance], base),
        ):
            ax.scatter(
                range(len(names)),
                values,
                s=45,
                c=runtime.COLOURS[: len(names)],
                marker="os^v"[k % 4],
            )
            ax.axhline(clean, color="grey", ls=["--", ":"][k % 2], lw=1)
            ax.set_xticks(range(len(METHODS)), METHODS, rotation=60)
            ax.grid(alpha=0.3)
    for (above, below), fault in zip(axes.T, FAULTS):
        above.set_title(title_of(*fault).replace(", ", "\n"), fontsize=10)
        below.set_ylim(-0.03, 1.03)
    axes[0, 0].set_ylabel(distance.replace(" in ", "\nin "))
    axes[1, 0].set_ylabel("share judged faulty")
    fig.suptitle(
        "A point per seed (circle, square); lines: DDPM trained on clean images with that seed",
        fontsize=10,
    )
    fig.savefig(path, dpi=110)
    plt.close(fig)


def plot_samples(images, args, path):
    """The first images as trained on, and the first samples of each method, for each fault and the first seed."""
    fig, axes = plt.subplots(
        1 + len(METHODS), len(FAULTS), figsize=(13, 10.6), layout="constrained", squeeze=False
    )
    index = some_of(len(images), 12)
    for column, (p, kind, sigma, more) in zip(axes.T, FAULTS):
        rows = [CorruptedImages(images, None, p, sigma, args.seed, corrupt=kind).batch(index)]
        rows += [
            to_float(torch.from_numpy(sampled(name_of(m, p, kind, sigma), args)[:12]))
            for m in METHODS
        ]
        for ax, x in zip(column, rows):
            ax.imshow(pictures(x, nrow=4))
            ax.set(xticks=[], yticks=[])
        column[0].set_title(title_of(p, kind, sigma, more), fontsize=10)
    for ax, name in zip(axes[:, 0], ["trained on", *METHODS]):
        ax.set_ylabel(name)
    fig.savefig(path, dpi=75)
    plt.close(fig)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, SIZES)
    parser.add_argument("--out", help="default WORK/rivals")
    args = parser.parse_args()
    check(args)
    args.out = args.out or f"{args.work}/rivals"
    started, todo = time.time(), commands(args)
    if not run_all(todo, args):
        return
    records, out = read_records(todo, args), Path(args.out)
    images, _ = load_images(
        args.data, int((SIZES[args.size]["image"].split() or [0, 32])[-1]), root=args.data_root
    )
    shares = judge(images, args)
    distance = next(key for key in records[clean_name(0)] if key.startswith(("FID", "Fréchet")))
    lines = table(records, shares, distance, args.seed)
    (out / "table.md").write_text("\n".join(lines) + "\n")
    plot(records, shares, distance, out / "rivals.png")
    plot_samples(images, args, out / "samples.png")
    runtime.write_metrics(
        out, started, seed=args.seed, device=setup(args.device)[0], n=len(records), table=lines
    )
    print("\n".join(lines))


if __name__ == "__main__":
    runtime.cli(main)
