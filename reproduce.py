"""The tables and figures of P1, re-run as a list of commands over the other scripts.

    python reproduce.py first                     # 2 CPU cores, minutes: butterflies with noise
    python reproduce.py toy --data folder:cifar10/train --test folder:cifar10/test  # CPU, 2 hours
    python reproduce.py short --data cifar10 --minutes 9              # one large GPU, in pieces
    python reproduce.py full --data cifar10 --inception-weights PATH  # the published length
    python reproduce.py full --data cifar10 --dry-run
    python reproduce.py purify toy --data ...       # the second paper's, see reproduce_purify.py

How a list is run, stopped and continued: runner.py. Checkpoints and samples stay in --work; --out
gets table.md, the figures and the records. `short` and `full` score with Inception; `toy` trains a
classifier first, in whose features its distances are. In the table "as P1" says whether the row
stands to DDPM on the same data as it does in the paper. The rivals: rivals.py.
"""

import json
import sys
import time
from pathlib import Path

import outputs
import reproduce_purify
import runtime
from runner import add_arguments, check, finished, run_all

SIZES = {  # n images behind each number, made in `ddpm` or `ddim` steps
    "toy": dict(
        image_size=16,
        train="--model mini --iters 600 --sample-every 0".split(),
        n=400,
        ddpm=100,
        ddim=50,
        classifier="--model small --epochs 8".split(),
        attack="--steps 50 --scale var --n 32 --objective mean x0 ldm".split(),
        bench="--model mini --image-size 16".split(),
        steps="--steps 300 100 50 --n 64".split(),
    ),
    "short": dict(
        image_size=None,  # the set's own
        train="--iters 5000 --ema 0.999 --warmup 500 --sample-every 0".split(),
        n=10_000,
        ddpm=100,
        ddim=50,
        attack="--steps 100 --n 500 --objective mean x0 ldm".split(),
        bench=[],
        steps="--steps 500 300 100 --n 1000".split(),
    ),
    "full": dict(
        image_size=None,  # the set's own
        train=[],
        n=10_000,
        ddpm=1000,
        ddim=100,
        attack="--n 10000 --objective mean x0 ldm".split(),
        bench=[],
        steps="--steps 1000 500 300 100 50 --n 10000".split(),
    ),
}
MEMORISED = 50_000  # samples of which the nearest training image is searched, in full
FIRST = "--model mini --data synthetic --image-size 16 --p 0.9 --sigma 0.2 --sample-every 0".split()
FIRST_STEPS = ["--iters", "650"]
FIRST_ADV = ["--reg-last", "0.2"]
FIRST_SAMPLES = "--n 64 --sampler ddpm --steps 100 --no-png".split()

NOISY = "--p 0.9 --sigma 0.2".split()
MILD = "--p 0.9 --sigma 0.1".split()
CLEAN = []
DDPM = ["--robust", "none"]
# this project's own: in the last steps, on a share of the rows, at 5 <= t < 100, lambda 0.6
LATE = ["--robust", "adv"]
LATE_RAN = ["--robust", "ran"]
# Eq. 10 in every step, on every row, at every t, as P1 prints it
P1 = ["--paper"]
ADV = ["--robust", "adv", *P1]
RAN = ["--robust", "ran", *P1]
INVARIANT = ["--robust", "inv-adv", *P1]
ROWS = [  # name, corruption, method, P1's FID / IS with DDPM and with DDIM; the most telling first
    ("none-0.9-0.2", NOISY, DDPM, (102.68, 4.19), (105.43, 4.09)),
    ("adv-0.9-0.2", NOISY, ADV, (24.81, 7.07), (24.93, 6.69)),
    ("late-0.9-0.2", NOISY, LATE, None, None),
    ("adv-eps-0.9-0.2", NOISY, [*ADV, "--ray-units", "eps"], None, None),
    ("ran-0.9-0.2", NOISY, RAN, (68.04, 4.34), None),
    ("inv-adv-0.9-0.2", NOISY, INVARIANT, None, None),
    ("none-0", CLEAN, DDPM, (7.2, 8.95), (11.62, 8.36)),
    ("adv-0", CLEAN, ADV, (28.68, 7.04), (31.20, 6.38)),
    ("none-0.9-0.1", MILD, DDPM, (58.05, 6.93), (59.28, 6.89)),
    ("adv-0.9-0.1", MILD, ADV, (24.70, 7.21), (25.48, 6.85)),
    ("ran-0.9-0.1", MILD, RAN, (79.21, 5.21), None),
]
FULL_ROWS = [  # of P1's later version, and what it leaves out; after the others, in short and full
    ("inv-adv-0", CLEAN, INVARIANT, (356.9, None), None),
    ("late-0", CLEAN, LATE, None, None),
    ("lam-0.1-0.9-0.2", NOISY, [*ADV, "--lam", "0.1"], None, None),
    ("lam-1-0.9-0.2", NOISY, [*ADV, "--lam", "1"], None, None),
]
# --data: P1's FID of DDPM and of Robust_adv at p 0.9, sigma 0.2; late: 25.8 on CelebA
OTHER_SETS = {"celeba": (96.03, 16.53), "lsun-bedroom": (95.85, 44.27)}


def image_flags(size):
    S = SIZES[size]["image_size"]
    return ["--image-size", str(S)] if S else []


def rows_of(size):
    return ROWS if size == "toy" else ROWS + FULL_ROWS


def shared(args):
    """-> flags of every script, flags that score samples, the commands that must come before."""
    common = ["--data-root", args.data_root, "--device", args.device]
    size = SIZES[args.size]
    if args.inception_weights:
        return common, ["--fid", "--inception-weights", args.inception_weights], []
    if "classifier" not in size:  # Inception is downloaded
        return common, ["--fid"], []
    out = Path(args.work) / "classifier"
    argv = ["classifier.py", *size["classifier"], "--data", args.data]
    if args.test:
        argv += ["--test", args.test]
    argv += [*image_flags(args.size), *common, "--out", str(out)]
    score = ["--fid", "--features", str(out / "classifier.pt")]
    return common, score, [(out / "metrics.json", argv)]


def training(args, name, flags, seed, data=None):
    """(result, argv) of one training."""
    size = SIZES[args.size]
    out = Path(args.work) / name
    common, _, _ = shared(args)
    argv = ["train.py", *flags, *size["train"], *image_flags(args.size), "--seed", str(seed)]
    argv += ["--data", data or args.data, *common, "--out", str(out)]
    return out / "metrics.json", argv


def sampling(args, name, sampler, n=None, folder=None):
    """(result, argv) of a scored sample of that training."""
    size = SIZES[args.size]
    common, score, _ = shared(args)
    run = Path(args.work) / name
    out = run / (folder or sampler)
    argv = ["sample.py", "--ckpt", str(run / "ckpt.pt"), "--n", str(n or size["n"])]
    argv += ["--sampler", sampler, "--steps", str(size[sampler]), *score, "--no-png", *common]
    return out / "metrics.json", [*argv, "--out", str(out)]


def cell(args, name, method, corruption, seed, samplers):
    """A training, and a sample of it by each sampler."""
    todo = [training(args, name, [*method, *corruption], seed)]
    return todo + [sampling(args, name, sampler) for sampler in samplers]


def commands(args):
    """[(result that says it is done, argv)]; a training's result is its record at the last step."""
    _, _, todo = shared(args)
    for name, corruption, method, _, _ in rows_of(args.size):
        if name not in args.skip:
            todo += cell(args, name, method, corruption, args.seed, ["ddpm", "ddim"])
    todo += figures(args)
    if args.size == "full":
        for data in OTHER_SETS:
            for name, method in (("none", DDPM), ("adv", ADV), ("late", LATE)):
                flags = [*method, *NOISY, "--model", "ddpm64"]
                todo.append(training(args, f"{name}-{data}", flags, args.seed, data))
                todo.append(sampling(args, f"{name}-{data}", "ddpm"))
    return todo


def figures(args):
    """The commands behind P1's figures, and the cost of a step."""
    size = SIZES[args.size]
    work = Path(args.work)
    out = Path(args.out)
    common, score, _ = shared(args)
    ddpm, adv = work / "none-0", work / "adv-0"
    pair = ["--ckpt", str(ddpm / "ckpt.pt"), str(adv / "ckpt.pt")]
    todo = []

    noisy = []
    for name, corruption, *_ in rows_of(args.size):
        if corruption == NOISY and name not in args.skip:
            noisy.append(str(work / name / "ckpt.pt"))
    if noisy:
        argv = ["compare.py", "--ckpt", *noisy, "--sampler", "ddpm", "--steps", str(size["ddpm"])]
        argv += ["--n", "64", "--no-png", *common, "--out", str(out / "samples")]
        todo.append((out / "samples/metrics.json", argv))

    argv = ["attack.py", *pair, *size["attack"], *score, *common, "--out", str(out / "attack")]
    todo.append((out / "attack/metrics.json", argv))

    folder = "ddpm"
    if args.size == "full":
        folder = f"ddpm-{MEMORISED}"
        for name in ("none-0", "adv-0"):
            todo.append(sampling(args, name, "ddpm", MEMORISED, folder))
    argv = ["memorization.py", "--samples", str(ddpm / folder), str(adv / folder)]
    argv += ["--names", "DDPM", "Robust_adv", "--data", args.data, *image_flags(args.size)]
    if args.test:
        argv += ["--test", args.test]
    argv += ["--features", args.memorization_features, *common]
    todo.append((out / "memorization/metrics.json", [*argv, "--out", str(out / "memorization")]))

    argv = ["bench.py", "--what", "methods", *size["bench"], "--device", args.device]
    todo.append((out / "bench/metrics.json", [*argv, "--out", str(out / "bench")]))

    argv = ["compare.py", *pair, *size["steps"], "--spacing", "respaced", "naive", "truncated"]
    argv += [*score, "--no-png", *common, "--out", str(out / "steps")]
    todo.append((out / "steps/metrics.json", argv))
    return todo


def first(args):
    """The claim in minutes: DDPM and Robust_adv, on equal images, seeds, steps, in one picture."""
    device = ["--device", args.device]
    methods = {"DDPM": DDPM, "Robust_adv": [*LATE, *FIRST_ADV]}
    todo = []
    for name, method in methods.items():
        out = Path(args.out) / "networks" / name
        argv = ["train.py", *method, *FIRST, *FIRST_STEPS, "--seed", str(args.seed), *device]
        todo.append((out / "metrics.json", [*argv, "--out", str(out)]))
    ckpts = [str(Path(args.out) / "networks" / name) for name in methods]
    argv = ["compare.py", "--ckpt", *ckpts, *FIRST_SAMPLES, *device, "--out", args.out]
    return [*todo, (Path(args.out) / "metrics.json", argv)]


# --------------------------------------------------------------------------------------------------
# the table


def read_records(args):
    """{(row, "train" | "ddpm" | "ddim"): its record}; all are copied into OUT/records.json."""
    records = {}
    for name, *_ in rows_of(args.size):
        for kind in ("train", "ddpm", "ddim"):
            folder = Path(args.work) / name
            path = (folder if kind == "train" else folder / kind) / "metrics.json"
            if finished(path):
                records[name, kind] = outputs.read_json(path)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    together = {" ".join(key): record for key, record in records.items()}
    (Path(args.out) / "records.json").write_text(json.dumps(together, indent=1) + "\n")
    return records


def scores(records, name, sampler, distance):
    """(distance, class score) of a sample, or None where it was not made."""
    record = records.get((name, sampler))
    return record and (record[distance], record.get("IS", record.get("class_score")))


def as_paper(ours, ours_plain, paper, paper_plain):
    """Whether a row lies on the side of DDPM on which P1 has it: "yes", "no"; None if unknown."""
    if not (ours and ours_plain and paper and paper_plain):
        return None
    return "yes" if (ours[0] < ours_plain[0]) == (paper[0] < paper_plain[0]) else "no"


def number(pair):
    return " / ".join(f"{v:.4g}" for v in pair if v is not None) if pair else "-"


def table(args):
    """-> lines of markdown: P1's numbers beside ours, row by row."""
    records = read_records(args)
    names = {key for record in records.values() for key in record}
    distance = min((k for k in names if k.startswith(("FID", "Fréchet"))), default="FID")
    score = "IS" if distance == "FID" else "class score"
    lines = [
        f"| row | FID / IS, P1: DDPM | DDIM | {distance} / {score}, here: DDPM | DDIM "
        "| noise left: DDPM | DDIM | as P1: DDPM, DDIM |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, corruption, _, *paper in rows_of(args.size):
        plain = next(row for row in ROWS if row[1] == corruption)  # DDPM on the same data
        ours, noise, verdicts = [], [], []
        for sampler, theirs, theirs_plain in zip(("ddpm", "ddim"), paper, plain[3:]):
            found = scores(records, name, sampler, distance)
            found_plain = scores(records, plain[0], sampler, distance)
            if name.startswith("inv"):  # P1 has no number for most; it must do worse
                theirs, theirs_plain = (1,), (0,)
            if name != plain[0]:
                verdicts.append(as_paper(found, found_plain, theirs, theirs_plain))
            ours.append(number(found))
            noise.append(f"{records[name, sampler]['noise_level']:.3f}" if found else "-")
        verdict = ", ".join(v for v in verdicts if v) or "-"
        if ours == ["-", "-"]:
            verdict = "not run"
        cells = [name, *map(number, paper), *ours, *noise, verdict]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, *other_sets(args), "", footnote(args, records)]


def other_sets(args):
    """-> rows of the table: P1's CelebA and LSUN, of `full` alone."""
    if args.size != "full":
        return []
    lines = []
    for data, paper in OTHER_SETS.items():
        for method, fid in zip(("none", "adv", "late"), (*paper, None)):
            name = f"{method}-{data}"
            path = Path(args.work) / name / "ddpm/metrics.json"
            record = outputs.read_json(path) if finished(path) else None
            ours = (
                [f"{record['FID']:.4g}", f"{record['noise_level']:.3f}"] if record else ["-", "-"]
            )
            cells = [name, number((fid,)) or "-", "-", ours[0], "-", ours[1], "-", "-"]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def footnote(args, records):
    steps = {str(r.get("step")) for (_, kind), r in records.items() if kind == "train"}
    n = {str(r["n"]) for (_, kind), r in records.items() if kind != "train"}
    hardware = {r["device"] for r in records.values()}
    return (
        f"Size `{args.size}`, training seed {args.seed}, samples of seed 0; "
        f"{' or '.join(sorted(steps))} training steps; {', '.join(sorted(n))} samples per number; "
        f"{'; '.join(sorted(hardware))}. "
        "The noise of the training images is in samples/table.csv."
    )


def parse_args():
    parser = runtime.parser(__doc__)
    add = parser.add_argument
    names = [name for name, *_ in ROWS + FULL_ROWS]
    add_arguments(parser, ["first", *SIZES])
    add("--memorization-features", help="dinov2 (default of full) | pixels | a classifier's file")
    add("--skip", nargs="+", default=[], choices=names, metavar="ROW", help="rows not to run")
    add("--out", help="default WORK/results")
    args = parser.parse_args()
    if args.size == "first":
        names = "data data_root test work skip inception_weights memorization_features"
        runtime.idle_flags(parser)(True, names, "with first")
        args.out = args.out or "first"
        return args
    check(args)
    if args.memorization_features is None:
        args.memorization_features = "dinov2" if args.size == "full" else "pixels"
    elif args.memorization_features not in ("dinov2", "pixels"):
        if not Path(args.memorization_features).is_file():
            raise ValueError(f"--memorization-features {args.memorization_features}: no such file")
    args.out = args.out or f"{args.work}/results"  # not results/, which holds the README's runs
    for name in ("none-0", "adv-0"):
        if name in args.skip:
            raise ValueError(f"--skip {name}: the attack, memorisation and fewer steps need it")
    return args


def main():
    if sys.argv[1:2] == ["purify"]:
        return reproduce_purify.main(sys.argv[2:])
    args = parse_args()
    if args.size == "first":  # its folder is compare.py's
        if run_all(first(args), args):
            print(f"-> {args.out}/side_by_side.png")
        return
    if not args.dry_run:
        outputs.claim(args.out)
    todo = commands(args)
    started = time.time()
    if not run_all(todo, args):
        return
    lines = table(args)
    (Path(args.out) / "table.md").write_text("\n".join(lines) + "\n")
    outputs.write_metrics(args.out, started, seed=args.seed, device="cpu", n=len(todo), table=lines)
    print("\n".join(lines))


if __name__ == "__main__":
    runtime.cli(main)
