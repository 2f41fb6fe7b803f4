"""The tables and figures of P1, and P1's method against its rivals, as a list of commands over the other scripts.

    python reproduce.py toy --data folder:cifar10/train --test folder:cifar10/test     # CPU, 16x16, mini network, about 2 hours
    python reproduce.py rivals --data folder:cifar10/train --test folder:cifar10/test  # 6 methods x 7 faults; uses toy's runs
    python reproduce.py short --data cifar10 --minutes 9                               # one large GPU, in pieces; not run yet
    python reproduce.py full --data cifar10 --inception-weights PATH                   # the published length
    python reproduce.py toy --data folder:cifar10/train --test folder:cifar10/test --dry-run

A command whose result is there is skipped; a training that was stopped continues from its checkpoint: after a kill, or after
--minutes, run the same line again. Checkpoints and samples stay in --work; results/SIZE/ gets table.md, the figures and the
records. In P1's table "as P1" says whether the row stands to DDPM on the same data as it does in the paper. In that of the
rivals every method has the same network, images, seeds and steps; "judged faulty" is metrics.judged_faulty.
"""

import argparse
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torchvision.utils import make_grid

import metrics
from data import CorruptedImages, load_images
from sample import features_network

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

SIZES = {  # n images behind each number, made in `ddpm` or `ddim` steps
    "toy": dict(
        image="--image-size 16", train="--model mini --iters 600 --sample-every 0", n=400, ddpm=100, ddim=50,
        classifier="--model small --epochs 8", attack="--steps 50 --scale var --n 32", bench="--model mini --image-size 16",
        steps="--steps 300 100 50 --n 64"),
    "short": dict(
        image="", train="--iters 5000 --ema 0.999 --warmup 500 --sample-every 0", n=10_000, ddpm=100, ddim=50,
        classifier="--model wrn-28-10 --epochs 15", attack="--steps 100 --n 500", bench="",
        steps="--steps 500 300 100 --n 1000"),
    "full": dict(
        image="", train="", n=10_000, ddpm=1000, ddim=100, classifier="--model wrn-28-10", attack="--n 10000", bench="",
        steps="--steps 1000 500 300 100 50 --n 10000"),
}
SIZES["rivals"] = SIZES["toy"]
NOISY, MILD, CLEAN = "--p 0.9 --sigma 0.2", "--p 0.9 --sigma 0.1", ""
ROWS = [  # name, corruption, method, FID / IS of P1's Tables 1 and 2 with DDPM and with DDIM; the most telling first
    ("none-0.9-0.2", NOISY, "--robust none", (102.68, 4.19), (105.43, 4.09)),
    ("adv-0.9-0.2", NOISY, "--robust adv", (24.81, 7.07), (24.93, 6.69)),
    ("adv-eps-0.9-0.2", NOISY, "--robust adv --ray-units eps", None, None),
    ("ran-0.9-0.2", NOISY, "--robust ran", (68.04, 4.34), None),
    ("inv-adv-0.9-0.2", NOISY, "--robust inv-adv", None, None),
    ("none-0", CLEAN, "--robust none", (7.2, 8.95), (11.62, 8.36)),
    ("adv-0", CLEAN, "--robust adv", (28.68, 7.04), (31.20, 6.38)),
    ("none-0.9-0.1", MILD, "--robust none", (58.05, 6.93), (59.28, 6.89)),
    ("adv-0.9-0.1", MILD, "--robust adv", (24.70, 7.21), (25.48, 6.85)),
    ("ran-0.9-0.1", MILD, "--robust ran", (79.21, 5.21), None),
]
RIVALS = {"none": "--robust none", "ran": "--robust ran", "adv": "--robust adv", "huber": "--robust huber",
          "ambient": "--robust ambient", "drop": "--drop-noisy"}
FAULTS = [  # p, --corrupt, sigma, further seeds; the main cells first
    (0.9, "gauss", 0.2, 1), (0.3, "outliers", 0, 0), (0.3, "class", 0, 0), (0.3, "gauss", 0.2, 0),
    (0.9, "salt-pepper", 0.05, 0), (0.3, "patch", 0.4, 0), (0.3, "blur", 1, 0),
]


def commands(args):
    """[(result that says it is done, argv)]; a training's result is its metrics.json at the last step."""
    size, work, out, todo = SIZES[args.size], Path(args.work), Path(args.out), []
    common, image = ["--data-root", args.data_root, "--device", args.device], size["image"].split()
    data, test = ["--data", args.data], ["--test", args.test] if args.test else []
    score = ["--fid", "--inception-weights", args.inception_weights]
    if not args.inception_weights:  # Inception's stand-in
        score = ["--fid", "--features", f"{work}/classifier/classifier.pt"]
        flags = [*size["classifier"].split(), *data, *test, *image, *common]
        todo.append((work / "classifier/metrics.json", ["classifier.py", *flags, "--out", f"{work}/classifier"]))

    def ckpts(*names):
        return ["--ckpt", *(f"{work}/{name}/ckpt.pt" for name in names)]

    def cell(name, method, corruption, seed, samplers):
        flags = f"{method} {corruption} {size['train']} {size['image']} --seed {seed}".split()
        todo.append((work / name / "metrics.json", ["train.py", *flags, *data, *common, "--out", f"{work}/{name}"]))
        for sampler in samplers:
            flags = [*f"--n {size['n']} --sampler {sampler} --steps {size[sampler]}".split(), *score, "--no-png", *common]
            todo.append((work / name / sampler / "metrics.json", ["sample.py", *ckpts(name), *flags,
                                                                  "--out", f"{work}/{name}/{sampler}"]))

    if args.size == "rivals":
        for name, method, corruption, seed in rival_cells(args.seed):
            cell(name, method, corruption, seed, ["ddpm"])
        return todo
    for name, corruption, method, _, _ in ROWS:
        if name not in args.skip:
            cell(name, method, corruption, args.seed, ["ddpm", "ddim"])
    noisy = [name for name, corruption, *_ in ROWS if corruption == NOISY and name not in args.skip]
    pair, flags = ckpts("none-0", "adv-0"), f"--sampler ddpm --steps {size['ddpm']} --n 64 --no-png".split()
    samples = ["--samples", f"{work}/none-0/ddpm", f"{work}/adv-0/ddpm", "--names", "DDPM", "Robust_adv"]
    todo += [
        (out / "samples/side_by_side.png", ["compare.py", *ckpts(*noisy), *flags, *common, "--out", f"{out}/samples"]),
        (out / "attack/metrics.json", ["attack.py", *pair, *size["attack"].split(), *score, *common, "--out", f"{out}/attack"]),
        (out / "memorization/metrics.json", ["memorization.py", *samples, *data, *test, *image, "--features",
                                             args.memorization_features, *common, "--out", f"{out}/memorization"]),
        (out / "bench/metrics.json", ["bench.py", "--what", "methods", *size["bench"].split(), "--device", args.device,
                                      "--out", f"{out}/bench"]),
        (out / "steps/steps.md", ["compare.py", *pair, *size["steps"].split(), "--spacing", "respaced", "naive", "truncated",
                                  *score, "--no-png", *common, "--out", f"{out}/steps"]),
    ]
    return todo


def cell_name(method, p, kind, sigma, seed, first):
    return f"{method}-{p}" + f"-{kind}" * (kind != "gauss") + f"-{sigma}" * (sigma > 0) + f"-seed{seed}" * (seed != first)


def rival_cells(first):
    """[(name, method, corruption, seed)]: all faults with the first seed, the further seeds, sigma^ 20 % off."""
    cells = []
    for seed in range(first, first + 1 + max(more for *_, more in FAULTS)):
        cells.append((cell_name("none", 0, "gauss", 0, seed, first), "--robust none", CLEAN, seed))
        for p, kind, sigma, more in FAULTS:
            if seed <= first + more:
                corruption = f"--p {p}" + f" --sigma {sigma}" * (sigma > 0) + f" --corrupt {kind}" * (kind != "gauss")
                cells += [(cell_name(m, p, kind, sigma, seed, first), flags, corruption, seed) for m, flags in RIVALS.items()]
    return cells + [(f"ambient-x{x}-0.9-0.2", f"--robust ambient --sigma-scale {x}", NOISY, first) for x in (0.8, 1.2)]


def finished(done, argv=None):
    """Is the result there? A training that was stopped leaves a record too, of an earlier step.

    Raises ValueError for the record of another command than argv: other settings need another --work and --out.
    """
    if not done.exists():
        return False
    record = json.loads(done.read_text()) if done.name == "metrics.json" else {}
    if argv and record and record["command"].removesuffix(" --resume") != "python " + " ".join(argv):
        raise ValueError(f"{done}: is of `{record['command']}`, not of these settings; choose another --work and --out")
    return "step" not in record or record["step"] >= record["args"]["iters"]


def run(done, argv, deadline, first=True):
    """Runs a script to its end, or to the deadline; then it is asked to save and stop. -> whether it ended."""
    resume = ["--resume"] if argv[0] == "train.py" and (done.parent / "ckpt.pt").exists() else []
    process = subprocess.Popen([sys.executable, str(Path(__file__).resolve().parent / argv[0]), *argv[1:], *resume])
    try:
        code = process.wait(timeout=deadline and max(1.0, deadline - time.time()))
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()
        if first and argv[0] != "train.py":
            raise ValueError(f"{argv[0]}: does not fit into --minutes and cannot be continued in pieces; give more") from None
        return False
    except BaseException:  # Ctrl-C has reached the command as well; SIGTERM has not
        process.terminate()
        process.wait()
        raise
    if code or not finished(done):
        raise ValueError(f"`{shlex.join(argv)}` ended with exit code {code} and without {done}; the same line again continues")
    return True


# ---------------------------------------------------------------------------------------------------------------------
# the table


def table(args):
    """-> lines of markdown: P1's numbers beside ours, row by row; copies the records to --out."""
    work, out = Path(args.work), Path(args.out)
    records = {}
    for name, *_ in ROWS:
        for kind, path in (("train", work / name), ("ddpm", work / name / "ddpm"), ("ddim", work / name / "ddim")):
            if finished(path / "metrics.json"):
                records[name, kind] = json.loads((path / "metrics.json").read_text())
                (out / "records").mkdir(parents=True, exist_ok=True)
                shutil.copy(path / "metrics.json", out / "records" / f"{name}-{kind}.json")
    distance = next((k for r in records.values() for k in r if k.startswith(("FID", "Fréchet"))), "FID")
    lines = [f"| row | FID / IS, P1: DDPM | DDIM | {distance} / IS, here: DDPM | DDIM | noise left: DDPM | DDIM "
             "| as P1: DDPM, DDIM |",
             "|---|---|---|---|---|---|---|---|"]

    def number(pair):
        return " / ".join(f"{v:.4g}" for v in pair) if pair else "-"

    def here(name, sampler):
        r = records.get((name, sampler))
        return (r[distance], r["IS"]) if r else None

    for name, corruption, _, ddpm, ddim in ROWS:
        plain = next(row for row in ROWS if row[1] == corruption)  # DDPM on the same data
        verdict = []
        for sampler, paper, paper_plain in (("ddpm", ddpm, plain[3]), ("ddim", ddim, plain[4])):
            ours, ours_plain = here(name, sampler), here(plain[0], sampler)
            if name.startswith("inv"):  # P1 has no number for it here; it must do worse
                paper, paper_plain = (1,), (0,)
            if name != plain[0] and paper and ours and ours_plain:
                verdict.append("yes" if (ours[0] < ours_plain[0]) == (paper[0] < paper_plain[0]) else "no")
        noise = [f"{records[name, s]['noise_level']:.3f}" if (name, s) in records else "-" for s in ("ddpm", "ddim")]
        ran = (name, "ddpm") in records or (name, "ddim") in records
        cells = [name, number(ddpm), number(ddim), number(here(name, "ddpm")), number(here(name, "ddim")), *noise,
                 (", ".join(verdict) or "-") if ran else "not run"]
        lines.append(f"| {' | '.join(cells)} |")
    steps = [r.get("step") for (_, kind), r in records.items() if kind == "train"]
    n = sorted({r["n"] for (_, kind), r in records.items() if kind != "train"})
    hardware = sorted({r["device"] for r in records.values()})
    lines += ["", f"Size `{args.size}`, seed {args.seed}; {' or '.join(map(str, sorted(set(steps))))} training steps; "
                  f"{', '.join(map(str, n))} samples per number; {'; '.join(hardware)}. The noise of the training images is in "
                  "samples/table.csv."]
    return lines


def rivals(args, todo):
    """-> lines of markdown; copies the records, draws rivals.png and rivals_samples.png."""
    work, out = Path(args.work), Path(args.out)
    size = int(SIZES["rivals"]["image"].split()[-1])
    network, distance, _ = features_network(None if args.inception_weights else work / "classifier/classifier.pt",
                                            args.inception_weights)
    images, _ = load_images(args.data, size, root=args.data_root)
    index = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:6000]

    def features(x):  # uint8 (n, S, S, 3) -> (n, d) float64
        return metrics.extract(network, x)[0].astype(np.float64)

    def sampled(name):
        with np.load(work / name / "ddpm/samples.npz") as f:
            return f["images"]

    (out / "records").mkdir(parents=True, exist_ok=True)
    records = {}
    for done, _ in todo:  # the classifier's, then each training's and sample's
        name = "-".join(done.relative_to(work).parts[:-1])
        shutil.copy(done, out / "records" / f"{name}.json")
        records[name] = json.loads(done.read_text())
    def cell(r, *share):
        return " / ".join([f"{r[distance]:.2f}", f"{r['noise_level']:.3f}", *(f"{v:.2f}" for v in share)])

    baseline = [r for name, r in records.items() if name.startswith("none-0-") and name.endswith("ddpm")]
    clean = features(np.array(images[index]))
    lines = [f"{distance} / noise left (metrics.noise_level) / share of the samples judged faulty; {baseline[0]['n']} samples, "
             "DDPM sampler. A line per seed.", "",
             f"| fault | fault found in: clean, faulty images, samples of a clean DDPM | {' | '.join(RIVALS)} |",
             "|---" * (2 + len(RIVALS)) + "|",
             f"| no fault | | {', '.join(map(cell, baseline))} |"
             + " |" * (len(RIVALS) - 1)]
    fig, axes = plt.subplots(2, len(FAULTS), figsize=(13, 5), layout="constrained", sharex=True, squeeze=False)
    sheet, sheet_axes = plt.subplots(len(RIVALS) + 1, len(FAULTS), figsize=(13, 12), layout="constrained",
                                      squeeze=False)
    for column, (p, kind, sigma, more) in enumerate(FAULTS):
        title = " ".join([kind, *([str(sigma)] if sigma else [])]) + f", p = {p}"
        names = [[cell_name(m, p, kind, sigma, args.seed + k, args.seed) for m in RIVALS] for k in range(1 + more)]
        data = CorruptedImages(images, None, 1.0, sigma, args.seed, corrupt=kind)
        shares = metrics.judged_faulty(
            clean, features(metrics.to_uint8(data.batch(index)).permute(0, 2, 3, 1).numpy()), features(sampled("none-0")),
            *(features(sampled(name)) for row in names for name in row))
        for k, row in enumerate(names):
            mine = shares[3 + k * len(row) :][: len(row)]
            mine_records = [records[f"{name}-ddpm"] for name in row]
            cells = map(cell, mine_records, mine)
            lines.append(f"| {title} | {', '.join(f'{v:.2f}' for v in shares[:3])} | {' | '.join(cells)} |")
            for ax, values in zip(axes[:, column], ([r[distance] for r in mine_records], mine)):
                ax.scatter(range(len(row)), values, s=45, c=metrics.COLOURS[: len(row)], marker="os^v"[k % 4])
        axes[0, column].axhline(np.mean([r[distance] for r in baseline]), color="grey", ls="--", lw=1)
        axes[1, column].axhline(shares[2], color="grey", ls="--", lw=1)
        axes[0, column].set_title(title.replace(", ", "\n"), fontsize=10)
        axes[1, column].set_ylim(-0.03, 1.03)
        axes[1, column].set_xticks(range(len(RIVALS)), RIVALS, rotation=60)
        pictures = [CorruptedImages(images, None, p, sigma, args.seed, corrupt=kind).batch(index[:12])]
        pictures += [torch.from_numpy(sampled(name)[:12]).permute(0, 3, 1, 2) / 127.5 - 1 for name in names[0]]
        for ax, x, name in zip(sheet_axes[:, column], pictures, ["trained on", *RIVALS]):
            ax.imshow(make_grid((x.clamp(-1, 1) + 1) / 2, nrow=4, padding=1, pad_value=1).permute(1, 2, 0).numpy())
            ax.set(xticks=[], yticks=[], ylabel=name if column == 0 else "")
        sheet_axes[0, column].set_title(title, fontsize=10)
    for ax, label in zip(axes[:, 0], (distance.replace(" in ", "\nin "), "share judged faulty")):
        ax.set_ylabel(label)
    for ax in axes.flat:
        ax.grid(alpha=0.3)
    fig.suptitle("One point per seed; dashed: DDPM trained on clean images", fontsize=10)
    fig.savefig(out / "rivals.png", dpi=110)
    sheet.savefig(out / "rivals_samples.png", dpi=100)
    plt.close("all")
    off = {x: records[f"ambient-x{x}-0.9-0.2-ddpm"] for x in (0.8, 1.2)} | {1.0: records["ambient-0.9-0.2-ddpm"]}
    return lines + ["", "ambient on gauss 0.2, p = 0.9, with σ̂ times " + ", ".join(f"{x}: {cell(off[x])}" for x in sorted(off))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("size", choices=SIZES)
    add("--data", default="cifar10", metavar="NAME", help="cifar10 | folder:PATH | synthetic, as in train.py")
    add("--test", metavar="NAME", help="held-out images, for folder:PATH")
    add("--data-root", default="data")
    add("--inception-weights", metavar="PATH", help="FID and IS with Inception; default: a classifier trained first")
    add("--memorization-features", help="dinov2 (default of full) | pixels | a checkpoint of classifier.py")
    add("--skip", nargs="+", default=[], choices=[name for name, *_ in ROWS], metavar="ROW", help="rows not to run")
    add("--minutes", type=float, help="stop after so long; the same line continues")
    add("--dry-run", action="store_true", help="print the commands and what is done")
    add("--device", default="auto", help="auto | cpu | cuda | cuda:N")
    add("--seed", type=int, default=0)
    add("--work", help="checkpoints and samples; default runs/SIZE, rivals: runs/toy")
    add("--out", help="default results/SIZE")
    args = parser.parse_args()
    args.memorization_features = args.memorization_features or ("dinov2" if args.size == "full" else "pixels")
    args.work, args.out = args.work or f"runs/{args.size.replace('rivals', 'toy')}", args.out or f"results/{args.size}"
    if args.data.startswith("folder:") and not args.test:
        raise ValueError("--data folder:PATH: give --test folder:PATH as well")
    if args.minutes is not None and not args.minutes > 0:
        raise ValueError(f"--minutes {args.minutes}: must be above 0")
    needed = {"none-0", "adv-0"} & set(args.skip)
    if needed:
        raise ValueError(f"--skip {needed.pop()}: the attack, memorisation and fewer-steps figures need it")
    todo = commands(args)
    if args.dry_run:
        lines = [f"{'done ' if finished(done, argv) else '     '} python {shlex.join(argv)}" for done, argv in todo]
        return print("\n".join(lines))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # passes through run(), which stops the command
    started, deadline = time.time(), args.minutes and time.time() + 60 * args.minutes
    Path(args.out).mkdir(parents=True, exist_ok=True)
    first = True
    for i, (done, argv) in enumerate(todo):
        if finished(done, argv):
            continue
        print(f"[{i + 1}/{len(todo)}] python {shlex.join(argv)}", flush=True)
        if deadline and time.time() >= deadline or not run(done, argv, deadline, first):
            return print(f"{args.minutes:g} minutes are over; the same line again continues")
        first = False
    lines = rivals(args, todo) if args.size == "rivals" else table(args)
    (Path(args.out) / "table.md").write_text("\n".join(lines) + "\n")
    metrics.write_metrics(args.out, started, seed=args.seed, device="cpu", n=len(todo), table=lines)
    print("\n".join(lines))


if __name__ == "__main__":
    metrics.cli(main)
