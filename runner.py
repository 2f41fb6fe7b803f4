"""A resumable list of commands over the other scripts: [(result that says it is done, argv)].

A command whose result is there is skipped; a training that was stopped continues from its
checkpoint, an attack on purifiers from the images that it has done. So after a kill, or after
--minutes, the same line goes on.
"""

import contextlib
import ctypes
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from outputs import Failed, read_json, refuse_foreign
from runtime import SEED, between, setup

RESUMES = {"train.py": "ckpt.pt", "purify.py": "rows-0.pt"}  # script: what it continues from
HERE = Path(__file__).resolve().parent


def add_arguments(parser, sizes):
    """The flags that every list of commands shares."""
    add = parser.add_argument
    add("size", choices=sizes)
    add("--data", default="cifar10", metavar="NAME", help="as in train.py")
    add("--test", metavar="NAME", help="held-out images, for folder:PATH")
    add("--data-root", default="data")
    add("--inception-weights", metavar="PATH", help="FID and IS by a local copy of Inception")
    positive = between(0, above=True)
    add("--minutes", type=positive, help="stop after so long; the same line continues")
    add("--dry-run", action="store_true", help="print the commands and what is done")
    add("--device", default="auto", help="auto | cpu | cuda | cuda:N")
    add("--seed", type=SEED, default=0)
    add("--work", help="checkpoints and samples; default runs/SIZE")


def check(args):
    """Refuse what a late command would refuse, before the first; fills in --work."""
    args.work = args.work or f"runs/{args.size}"
    if args.data.startswith("folder:") and not args.test:
        raise ValueError("--data folder:PATH: give --test folder:PATH as well")
    for flag, name in (("--data", args.data), ("--test", args.test or "")):
        kind, _, path = name.partition(":")
        if kind == "folder" and not Path(path).is_dir():
            raise ValueError(f"{flag} {name}: no such folder")
    if args.inception_weights and not Path(args.inception_weights).is_file():
        raise ValueError(f"--inception-weights {args.inception_weights}: no such file")


def finished(done, argv=None):
    """Is the result there? A training that was stopped leaves a record too, of an earlier step.

    Raises ValueError for the record of another command than argv.
    """
    if not done.exists():
        return False
    record = read_json(done) if done.name == "metrics.json" else {}
    if argv and record:
        found = str(record.get("command")).removesuffix(" --resume")
        if found != "python " + " ".join(argv):
            raise ValueError(
                f"{done}: is of `{found}`, not of these settings; choose another --work and --out"
            )
    if record.get("interrupted"):
        return False
    return "step" not in record or record["step"] >= record["args"]["iters"]


def run(done, argv, deadline, first=True):
    """Runs a script to its end, or to the deadline; then it is asked to save and stop.

    first: it has had all of --minutes. -> whether it ended.
    """
    resumes = argv[0] in RESUMES and (done.parent / RESUMES[argv[0]]).exists()
    command = [sys.executable, str(HERE / argv[0]), *argv[1:]]
    process = subprocess.Popen(
        command + ["--resume"] if resumes else command, preexec_fn=end_with_parent
    )
    try:
        code = process.wait(timeout=deadline and max(1.0, deadline - time.time()))
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()
        if first and argv[0] not in RESUMES:
            raise Failed(
                f"{argv[0]}: does not fit into --minutes and cannot be continued in pieces; "
                "give more"
            ) from None
        return False
    except BaseException:  # Ctrl-C has reached the command as well; SIGTERM has not
        process.terminate()
        process.wait()
        raise
    if code or not finished(done):
        raise Failed(
            f"`{shlex.join(argv)}` ended with exit code {code}, its result {done} is "
            f"{'not whole' if done.exists() else 'missing'}; the same line again continues"
        )
    return True


def end_with_parent():
    """A script that was started here does not outlive a kill of this one (on Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def run_all(todo, args):
    """Runs what is not done -> True; --dry-run prints the list -> False.

    Raises Failed, exit code 1, when --minutes are over before that, so that `reproduce.py .. &&
    next` does not go on; ValueError before the first command, where the folder of one holds
    something else.
    """
    if args.dry_run:
        for done, argv in todo:
            print(f"{'done ' if finished(done, argv) else '     '} python {shlex.join(argv)}")
        return False
    setup(args.device)
    for folder in filter(None, (args.work, args.out)):
        Path(folder).mkdir(parents=True, exist_ok=True)
    for done, argv in todo:
        if not finished(done, argv):
            refuse_foreign(Path(argv[argv.index("--out") + 1]), argv[0])
    signal.signal(signal.SIGTERM, stop)
    deadline = args.minutes and time.time() + 60 * args.minutes
    first = True
    for i, (done, argv) in enumerate(todo):
        if finished(done, argv):
            continue
        print(f"[{i + 1}/{len(todo)}] python {shlex.join(argv)}", flush=True)
        if deadline and time.time() >= deadline or not run(done, argv, deadline, first):
            raise Failed(f"{args.minutes:g} minutes are over; the same line again continues")
        first = False
    return True


def stop(number, frame):
    """Passes through `run`, which stops its command."""
    sys.exit(128 + number)
