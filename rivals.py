"""Rivals that also know nothing: when is adversarial training the right choice?

    python rivals.py toy --data cifar10   # on a CPU, about 6 hours
    python rivals.py full --data cifar10  # the published length

The claim put to the test (P1): Robust_adv learns clean images from faulty ones and is told nothing
about the fault. Nor are these: the pseudo-Huber loss, Ambient training with the noise estimated per
image, and leaving out the images that are judged noisy. Robust_ran and Robust_adv come in P1's
setting, in this project's (late, on an eighth of the rows, 5 <= t < 100) and together with leaving
out. Eight faults of the training images, each fixed per image; every method has the same network,
images, seeds and steps, those of `reproduce.py SIZE`, whose runs are used where they are the same.
As there, what is done is skipped.

Leaves --out/table.md, rivals.png, samples.png, records.json and metrics.json: Fréchet distance to
the clean images, noise left, and the share of the samples that metrics.judged_faulty takes for
faulty images.
"""

import json
import time
from pathlib import Path

import numpy as np
import torch

import metrics
import outputs
import runtime
from compare import pictures, some_of
from data import FOREIGN, CorruptedImages, load_images, to_float
from outputs import METHOD_STYLE, plt
from reproduce import ADV, CLEAN, DDPM, LATE, LATE_RAN, NOISY, RAN, SIZES, cell, shared
from runner import add_arguments, check, run_all
from runtime import setup
from sample import features_network

METHODS = {
    "none": DDPM,
    "ran": RAN,
    "adv": ADV,
    "late-ran": LATE_RAN,
    "late": LATE,
    "huber": ["--robust", "huber"],
    "ambient": ["--robust", "ambient"],
    "drop": ["--drop-noisy"],
    "drop-ran": [*LATE_RAN, "--drop-noisy"],
    "drop-adv": [*LATE, "--drop-noisy"],
}
STYLE = METHOD_STYLE | {
    "late-ran": ("#F0E442", "Robust_ran, late"),
    "late": ("#882255", "Robust_adv, late"),
    "drop-ran": ("#44AA99", "drop, late ran"),
    "drop-adv": ("#332288", "drop, late adv"),
}
FAULTS = [  # p, --corrupt, sigma, further seeds
    (0.9, "gauss", 0.2, 1),
    (0.3, "gauss", 0.2, 0),
    (0.1, "gauss", 0.2, 0),
    (0.3, "outliers", 0, 1),
    (0.3, "class", 0, 0),
    (0.9, "salt-pepper", 0.05, 0),
    (0.3, "patch", 0.4, 0),
    (0.3, "blur", 1, 0),
]
OFF = (0.8, 1.2)  # the estimated sigma times this, in Ambient training on the first fault


def name_of(method, p, kind, sigma, k=0):
    """The folder of one training; k = 0 is the first seed."""
    parts = [method, str(p)]
    if kind != "gauss":
        parts.append(kind)
    if sigma > 0:
        parts.append(str(sigma))
    if k > 0:
        parts.append(f"seed{k}")
    return "-".join(parts)


def clean_name(k):
    return name_of("none", 0, "gauss", 0, k)


def flags_of(p, kind, sigma):
    """The flags of a fault."""
    flags = ["--p", str(p)]
    if sigma > 0:
        flags += ["--sigma", str(sigma)]
    if kind != "gauss":
        flags += ["--corrupt", kind]
    return flags


def seeds():
    """The numbers of the seeds; not every fault has all of them."""
    return range(1 + max(more for *_, more in FAULTS))


def commands(args):
    """[(result that says it is done, argv)], the first seed of all faults first."""
    *_, todo = shared(args)
    for k in seeds():
        todo += cell(args, clean_name(k), METHODS["none"], CLEAN, args.seed + k, ["ddpm"])
        for p, kind, sigma, more in FAULTS:
            if k > more:
                continue
            for method, flags in METHODS.items():
                name = name_of(method, p, kind, sigma, k)
                todo += cell(args, name, flags, flags_of(p, kind, sigma), args.seed + k, ["ddpm"])
    for x in OFF:
        name = name_of(f"ambient-x{x}", *FAULTS[0][:3])
        method = ["--robust", "ambient", "--sigma-scale", str(x)]
        todo += cell(args, name, method, NOISY, args.seed, ["ddpm"])
    return todo


def read_records(todo, args):
    """The record of every sample, by the folder of its training; all are in OUT/records.json."""
    together, samples = {}, {}
    for done, _ in todo:
        *folders, _ = done.relative_to(args.work).parts
        record = outputs.read_json(done)
        together[" ".join(folders)] = record
        if folders[-1] == "ddpm":
            samples[folders[0]] = record
    (Path(args.out) / "records.json").write_text(json.dumps(together, indent=1) + "\n")
    return samples


def sampled(name, args):
    return outputs.read_arrays(Path(args.work) / name / "ddpm/samples.npz", "images")[0]


def judge(images, args):
    """{(fault, k): shares judged faulty of clean images, faulty images, samples of DDPM on clean
    images, samples of each method}."""
    device, _, _ = setup(args.device)
    own = None
    if "classifier" in SIZES[args.size] and not args.inception_weights:
        own = f"{args.work}/classifier/classifier.pt"
    network, *_ = features_network(own, args.inception_weights)

    def features(x):  # uint8 (n, S, S, 3) -> (n, d)
        return metrics.extract(network, x, device=device)[0].astype(np.float64)

    index = some_of(len(images), 8000)
    _, once = np.unique(index % FOREIGN, return_index=True)  # --corrupt class repeats its images
    index = index[once]
    clean = features(np.array(images[index]))
    baseline = [features(sampled(clean_name(k), args)) for k in seeds()]
    shares = {}
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

    of = records[clean_name(0)]
    lines = [
        f"{distance} / noise left / share of the samples judged faulty; {of['n']} samples of "
        f"{of['steps']}-step DDPM.",
        "",
        "| fault | seed | judged faulty: clean images, faulty images | DDPM on clean images | "
        f"{' | '.join(METHODS)} |",
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
    """Above the distances, below the shares judged faulty: a panel for each fault, a point for each
    method and seed."""
    fig, axes = plt.subplots(
        2, len(FAULTS), figsize=(15, 5.5), layout="constrained", sharex=True, squeeze=False
    )
    colours = [STYLE[method][0] for method in METHODS]
    labels = [STYLE[method][1] for method in METHODS]
    for (fault, k), (_, _, base, *each) in shares.items():
        distances = [records[name_of(m, *fault[:3], k)][distance] for m in METHODS]
        above, below = axes[:, FAULTS.index(fault)]
        clean = records[clean_name(k)][distance]
        for ax, values, line in ((above, distances, clean), (below, each, base)):
            ax.scatter(range(len(METHODS)), values, s=45, c=colours, marker="os^v"[k % 4])
            ax.axhline(line, color="grey", ls=["--", ":"][k % 2], lw=1)
            ax.set_xticks(range(len(METHODS)), labels, rotation=90)
            ax.grid(alpha=0.3)
    for (above, below), fault in zip(axes.T, FAULTS):
        above.set_title(title_of(*fault).replace(", ", "\n"), fontsize=10)
        below.set_ylim(-0.03, 1.03)
    axes[0, 0].set_ylabel(distance.replace(" in ", "\nin "))
    axes[1, 0].set_ylabel("share judged faulty")
    title = "A point per seed (circle, square); lines: DDPM trained on clean images with that seed"
    fig.suptitle(title, fontsize=10)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def plot_samples(images, args, path):
    """The first images as trained on, and the first samples of each method, for each fault and the
    first seed."""
    fig, axes = plt.subplots(
        1 + len(METHODS), len(FAULTS), figsize=(14, 16), layout="constrained", squeeze=False
    )
    index = some_of(len(images), 12)
    for column, (p, kind, sigma, more) in zip(axes.T, FAULTS):
        rows = [CorruptedImages(images, None, p, sigma, args.seed, corrupt=kind).batch(index)]
        for method in METHODS:
            samples = sampled(name_of(method, p, kind, sigma), args)[:12]
            rows.append(to_float(torch.from_numpy(samples)))
        for ax, x in zip(column, rows):
            ax.imshow(pictures(x, nrow=4))
            ax.set(xticks=[], yticks=[])
        column[0].set_title(title_of(p, kind, sigma, more), fontsize=10)
    for ax, method in zip(axes[1:, 0], METHODS):
        ax.set_ylabel(STYLE[method][1])
    axes[0, 0].set_ylabel("trained on")
    fig.savefig(path, dpi=75)
    plt.close(fig)


def main():
    parser = runtime.parser(__doc__)
    add_arguments(parser, SIZES)
    parser.add_argument("--out", help="default WORK/rivals")
    args = parser.parse_args()
    check(args)
    args.out = args.out or f"{args.work}/rivals"
    if not args.dry_run:
        outputs.claim(args.out)
    started = time.time()
    todo = commands(args)
    if not run_all(todo, args):
        return
    records = read_records(todo, args)
    out = Path(args.out)
    images, _ = load_images(args.data, SIZES[args.size]["image_size"], root=args.data_root)
    shares = judge(images, args)
    distance = next(key for key in records[clean_name(0)] if key.startswith(("FID", "Fréchet")))
    lines = table(records, shares, distance, args.seed)
    (out / "table.md").write_text("\n".join(lines) + "\n")
    plot(records, shares, distance, out / "rivals.png")
    plot_samples(images, args, out / "samples.png")
    device, _, _ = setup(args.device)
    n = len(records)
    outputs.write_metrics(out, started, seed=args.seed, device=device, n=n, table=lines)
    print("\n".join(lines))


if __name__ == "__main__":
    runtime.cli(main)
