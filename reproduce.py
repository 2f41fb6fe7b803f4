"""The tables and figures of P1, re-run as a list of commands over the other scripts.

    python reproduce.py first                     # 4 minutes on 2 CPU cores: DDPM and Robust_adv on noisy butterflies
    python reproduce.py toy --data folder:cifar10/train --test folder:cifar10/test     # CPU, 16x16, mini network, about 2 hours
    python reproduce.py short --data cifar10 --minutes 9                               # one large GPU, in pieces; not run yet
    python reproduce.py full --data cifar10 --inception-weights PATH                   # the published length
    python reproduce.py toy --data folder:cifar10/train --test folder:cifar10/test --dry-run

A command whose result is there is skipped; a training that was stopped continues from its checkpoint: after a kill, or after
--minutes, run the same line again. Checkpoints and samples stay in --work; --out gets table.md, the figures and the records.
In the table "as P1" says whether the row stands to DDPM on the same data as it does in the paper. The rivals: rivals.py.
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

import runtime
from runtime import fast_bf16

SIZES = {  # n images behind each number, made in `ddpm` or `ddim` steps
    "toy": dict(
        image="--image-size 16",
        train="--model mini --iters 600 --sample-every 0",
        n=400,
        ddpm=100,
        ddim=50,
        classifier="--model small --epochs 8",
        attack="--steps 50 --scale var --n 32",
        bench="--model mini --image-size 16",
        steps="--steps 300 100 50 --n 64",
    ),
    "short": dict(
        image="",
        train="--iters 5000 --ema 0.999 --warmup 500 --sample-every 0",
        n=10_000,
        ddpm=100,
        ddim=50,
        classifier="--model wrn-28-10 --epochs 15",
        attack="--steps 100 --n 500",
        bench="",
        steps="--steps 500 300 100 --n 1000",
    ),
    "full": dict(
        image="",
        train="",
        n=10_000,
        ddpm=1000,
        ddim=100,
        classifier="--model wrn-28-10",
        attack="--n 10000",
        bench="",
        steps="--steps 1000 500 300 100 50 --n 10000",
    ),
}
FIRST = (
    "--model mini --data synthetic --image-size 16 --p 0.9 --sigma 0.2 --iters 800 --sample-every 0"
)
FIRST_ADV = "--reg-last 0.2"
FIRST_SAMPLES = "--n 64 --sampler ddpm --steps 100 --no-png"
NOISY, MILD, CLEAN = "--p 0.9 --sigma 0.2", "--p 0.9 --sigma 0.1", ""
PAPER = " --reg-last 1 --reg-share 1"  # Eq. 10 in every step and on every row, as P1 prints it; without: this project's own
ROWS = [  # name, corruption, method, FID / IS of P1's Tables 1 and 2 with DDPM and with DDIM; the most telling first
    ("none-0.9-0.2", NOISY, "--robust none", (102.68, 4.19), (105.43, 4.09)),
    ("adv-0.9-0.2", NOISY, "--robust adv" + PAPER, (24.81, 7.07), (24.93, 6.69)),
    ("late-0.9-0.2", NOISY, "--robust adv", None, None),
    ("adv-eps-0.9-0.2", NOISY, "--robust adv --ray-units eps" + PAPER, None, None),
    ("ran-0.9-0.2", NOISY, "--robust ran" + PAPER, (68.04, 4.34), None),
    ("inv-adv-0.9-0.2", NOISY, "--robust inv-adv" + PAPER, None, None),
    ("none-0", CLEAN, "--robust none", (7.2, 8.95), (11.62, 8.36)),
    ("adv-0", CLEAN, "--robust adv" + PAPER, (28.68, 7.04), (31.20, 6.38)),
    ("none-0.9-0.1", MILD, "--robust none", (58.05, 6.93), (59.28, 6.89)),
    ("adv-0.9-0.1", MILD, "--robust adv" + PAPER, (24.70, 7.21), (25.48, 6.85)),
    ("ran-0.9-0.1", MILD, "--robust ran" + PAPER, (79.21, 5.21), None),
]


def shared(args):
    """-> flags of every script, flags that score samples, and the commands that must come before: Inception's stand-in."""
    size, work = SIZES[args.size], Path(args.work)
    common = ["--data-root", args.data_root, "--device", args.device]
    if args.inception_weights:
        return common, ["--fid", "--inception-weights", args.inception_weights], []
    flags = [
        *size["classifier"].split(),
        "--data",
        args.data,
        *(["--test", args.test] if args.test else []),
        *size["image"].split(),
        *common,
        "--out",
        f"{work}/classifier",
    ]
    score = ["--fid", "--features", f"{work}/classifier/classifier.pt"]
    return common, score, [(work / "classifier/metrics.json", ["classifier.py", *flags])]


def cell(args, name, method, corruption, seed, samplers):
    """-> [(result that says it is done, argv)]: one training, and a sample of it by each sampler."""
    size, work, (common, score, _) = SIZES[args.size], Path(args.work), shared(args)
    flags = f"{method} {corruption} {size['train']} {size['image']} --seed {seed}".split()
    todo = [
        (
            work / name / "metrics.json",
            ["train.py", *flags, "--data", args.data, *common, "--out", f"{work}/{name}"],
        )
    ]
    for sampler in samplers:
        flags = f"--ckpt {work}/{name}/ckpt.pt --n {size['n']} --sampler {sampler} --steps {size[sampler]}".split()
        todo.append(
            (
                work / name / sampler / "metrics.json",
                [
                    "sample.py",
                    *flags,
                    *score,
                    "--no-png",
                    *common,
                    "--out",
                    f"{work}/{name}/{sampler}",
                ],
            )
        )
    return todo


def commands(args):
    """[(result that says it is done, argv)]; a training's result is its metrics.json at the last step."""
    size, work, out, (common, score, todo) = (
        SIZES[args.size],
        Path(args.work),
        Path(args.out),
        shared(args),
    )
    data, test = ["--data", args.data], ["--test", args.test] if args.test else []

    def ckpts(*names):
        return ["--ckpt", *(f"{work}/{name}/ckpt.pt" for name in names)]

    for name, corruption, method, _, _ in ROWS:
        if name not in args.skip:
            todo += cell(args, name, method, corruption, args.seed, ["ddpm", "ddim"])
    noisy = [name for name, corruption, *_ in ROWS if corruption == NOISY and name not in args.skip]
    pair, flags = (
        ckpts("none-0", "adv-0"),
        f"--sampler ddpm --steps {size['ddpm']} --n 64 --no-png".split(),
    )
    samples = [
        "--samples",
        f"{work}/none-0/ddpm",
        f"{work}/adv-0/ddpm",
        "--names",
        "DDPM",
        "Robust_adv",
    ]
    if noisy:
        todo.append(
            (
                out / "samples/side_by_side.png",
                ["compare.py", *ckpts(*noisy), *flags, *common, "--out", f"{out}/samples"],
            )
        )
    todo += [
        (
            out / "attack/metrics.json",
            [
                "attack.py",
                *pair,
                *size["attack"].split(),
                *score,
                *common,
                "--out",
                f"{out}/attack",
            ],
        ),
        (
            out / "memorization/metrics.json",
            [
                "memorization.py",
                *samples,
                *data,
                *test,
                *size["image"].split(),
                "--features",
                args.memorization_features,
                *common,
                "--out",
                f"{out}/memorization",
            ],
        ),
        (
            out / "bench/metrics.json",
            [
                "bench.py",
                "--what",
                "methods",
                *size["bench"].split(),
                "--device",
                args.device,
                "--out",
                f"{out}/bench",
            ],
        ),
        (
            out / "steps/steps.md",
            [
                "compare.py",
                *pair,
                *size["steps"].split(),
                "--spacing",
                "respaced",
                "naive",
                "truncated",
                *score,
                "--no-png",
                *common,
                "--out",
                f"{out}/steps",
            ],
        ),
    ]
    return todo


def finished(done, argv=None):
    """Is the result there? A training that was stopped leaves a record too, of an earlier step.

    Raises ValueError for the record of another command than argv: other settings need another --work and --out.
    """
    if not done.exists():
        return False
    record = json.loads(done.read_text()) if done.name == "metrics.json" else {}
    if (
        argv
        and record
        and record["command"].removesuffix(" --resume") != "python " + " ".join(argv)
    ):
        raise ValueError(
            f"{done}: is of `{record['command']}`, not of these settings; choose another --work and --out"
        )
    return "step" not in record or record["step"] >= record["args"]["iters"]


def run(done, argv, deadline, first=True):
    """Runs a script to its end, or to the deadline; then it is asked to save and stop. -> whether it ended."""
    resume = ["--resume"] if argv[0] == "train.py" and (done.parent / "ckpt.pt").exists() else []
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve().parent / argv[0]), *argv[1:], *resume]
    )
    try:
        code = process.wait(timeout=deadline and max(1.0, deadline - time.time()))
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()
        if first and argv[0] != "train.py":
            raise ValueError(
                f"{argv[0]}: does not fit into --minutes and cannot be continued in pieces; give more"
            ) from None
        return False
    except BaseException:  # Ctrl-C has reached the command as well; SIGTERM has not
        process.terminate()
        process.wait()
        raise
    if code or not finished(done):
        raise ValueError(
            f"`{shlex.join(argv)}` ended with exit code {code} and without {done}; the same line again continues"
        )
    return True


def first(args):
    """The claim in a few minutes: DDPM and Robust_adv on equal images, seeds and steps, then their samples in one picture."""
    out, device = args.out or "first", ["--device", args.device]
    todo, names = [], ("DDPM", "Robust_adv")
    for name, method in zip(names, (["none"], ["adv", *FIRST_ADV.split()])):
        flags = [
            "--robust",
            *method,
            *FIRST.split(),
            "--seed",
            str(args.seed),
            "--amp",
            "bf16" if fast_bf16() else "auto",
        ]
        todo.append(
            (
                Path(out, name, "metrics.json"),
                ["train.py", *flags, *device, "--out", f"{out}/{name}"],
            )
        )
    samples = [
        "compare.py",
        "--ckpt",
        *(f"{out}/{name}" for name in names),
        *FIRST_SAMPLES.split(),
        *device,
        "--out",
        out,
    ]
    return [*todo, (Path(out, "side_by_side.png"), samples)]


def run_all(todo, args):
    """Runs what is not done, for --minutes if given. -> whether all is done; with --dry-run nothing is run."""
    if args.dry_run:
        print(
            "\n".join(
                f"{'done ' if finished(done, argv) else '     '} python {shlex.join(argv)}"
                for done, argv in todo
            )
        )
        return False
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # passes through run(), which stops the command
    deadline, first = args.minutes and time.time() + 60 * args.minutes, True
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for i, (done, argv) in enumerate(todo):
        if finished(done, argv):
            continue
        print(f"[{i + 1}/{len(todo)}] python {shlex.join(argv)}", flush=True)
        if deadline and time.time() >= deadline or not run(done, argv, deadline, first):
            print(f"{args.minutes:g} minutes are over; the same line again continues")
            return False
        first = False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# the table


def table(args):
    """-> lines of markdown: P1's numbers beside ours, row by row; copies the records to --out."""
    work, out = Path(args.work), Path(args.out)
    records = {}
    for name, *_ in ROWS:
        for kind, path in (
            ("train", work / name),
            ("ddpm", work / name / "ddpm"),
            ("ddim", work / name / "ddim"),
        ):
            if finished(path / "metrics.json"):
                records[name, kind] = json.loads((path / "metrics.json").read_text())
                (out / "records").mkdir(parents=True, exist_ok=True)
                shutil.copy(path / "metrics.json", out / "records" / f"{name}-{kind}.json")
    distance = next(
        (k for r in records.values() for k in r if k.startswith(("FID", "Fréchet"))), "FID"
    )
    lines = [
        f"| row | FID / IS, P1: DDPM | DDIM | {distance} / IS, here: DDPM | DDIM | noise left: DDPM | DDIM "
        "| as P1: DDPM, DDIM |",
        "|---|---|---|---|---|---|---|---|",
    ]

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
                verdict.append(
                    "yes" if (ours[0] < ours_plain[0]) == (paper[0] < paper_plain[0]) else "no"
                )
        noise = [
            f"{records[name, s]['noise_level']:.3f}" if (name, s) in records else "-"
            for s in ("ddpm", "ddim")
        ]
        ran = (name, "ddpm") in records or (name, "ddim") in records
        cells = [
            name,
            number(ddpm),
            number(ddim),
            number(here(name, "ddpm")),
            number(here(name, "ddim")),
            *noise,
            (", ".join(verdict) or "-") if ran else "not run",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    steps = [r.get("step") for (_, kind), r in records.items() if kind == "train"]
    n = sorted({r["n"] for (_, kind), r in records.items() if kind != "train"})
    hardware = sorted({r["device"] for r in records.values()})
    lines += [
        "",
        f"Size `{args.size}`, seed {args.seed}; {' or '.join(map(str, sorted(set(steps))))} training steps; "
        f"{', '.join(map(str, n))} samples per number; {'; '.join(hardware)}. The noise of the training images is in "
        "samples/table.csv.",
    ]
    return lines


def add_arguments(parser, sizes):
    """The flags that every list of commands shares."""
    add = parser.add_argument
    add("size", choices=sizes)
    add(
        "--data",
        default="cifar10",
        metavar="NAME",
        help="cifar10 | folder:PATH | synthetic, as in train.py",
    )
    add("--test", metavar="NAME", help="held-out images, for folder:PATH")
    add("--data-root", default="data")
    add(
        "--inception-weights",
        metavar="PATH",
        help="FID and IS with Inception; default: a classifier trained first",
    )
    add("--minutes", type=float, help="stop after so long; the same line continues")
    add("--dry-run", action="store_true", help="print the commands and what is done")
    add("--device", default="auto", help="auto | cpu | cuda | cuda:N")
    add("--seed", type=int, default=0)
    add("--work", help="checkpoints and samples; default runs/SIZE")


def check(args):
    args.work = args.work or f"runs/{args.size}"
    if args.data.startswith("folder:") and not args.test:
        raise ValueError("--data folder:PATH: give --test folder:PATH as well")
    if args.minutes is not None and not args.minutes > 0:
        raise ValueError(f"--minutes {args.minutes}: must be above 0")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add_arguments(parser, ["first", *SIZES])
    add(
        "--memorization-features",
        help="dinov2 (default of full) | pixels | a checkpoint of classifier.py",
    )
    add(
        "--skip",
        nargs="+",
        default=[],
        choices=[name for name, *_ in ROWS],
        metavar="ROW",
        help="rows not to run",
    )
    add("--out", help="default WORK/results")
    args = parser.parse_args()
    if args.size == "first":
        args.out = args.out or "first"
        if run_all(first(args), args):
            print(f"-> {args.out}/side_by_side.png")
        return
    check(args)
    args.memorization_features = args.memorization_features or (
        "dinov2" if args.size == "full" else "pixels"
    )
    args.out = (
        args.out or f"{args.work}/results"
    )  # not results/, which holds the runs of the README
    needed = {"none-0", "adv-0"} & set(args.skip)
    if needed:
        raise ValueError(
            f"--skip {needed.pop()}: the attack, memorisation and fewer-steps figures need it"
        )
    todo = commands(args)
    started = time.time()
    if not run_all(todo, args):
        return
    lines = table(args)
    (Path(args.out) / "table.md").write_text("\n".join(lines) + "\n")
    runtime.write_metrics(args.out, started, seed=args.seed, device="cpu", n=len(todo), table=lines)
    print("\n".join(lines))


if __name__ == "__main__":
    runtime.cli(main)
