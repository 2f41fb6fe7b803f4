"""The README's commands exist, and no script writes over what another wrote."""

import importlib
import os
import re
import shlex
import sys
import zlib
from pathlib import Path

import pytest
import torch
from cli import call

import outputs
import reproduce
import rivals
import runner
import sample
import train
import training

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = re.findall(r"python (\w+\.py)([^`\n|]*)", (ROOT / "README.md").read_text())


def shared_flags():
    """What add_arguments gives to the scripts that sample."""
    return (ROOT / "sample.py").read_text() + (ROOT / "runner.py").read_text()


@pytest.mark.parametrize("script, flags", sorted(set(COMMANDS)))
def test_commands_of_the_readme_exist(script, flags):
    source = (ROOT / script).read_text() + shared_flags()
    for flag in shlex.split(flags, comments=True):
        if flag.startswith("--"):
            assert f'"{flag}"' in source, (script, flag)


def test_a_sample_does_not_fall_on_a_training(tmp_path, capsys):
    """`sample.py --ckpt ddpm/ckpt.pt --out ddpm`: metrics.json and grid.png would be those of the
    sample."""
    flags = "--model tiny --image-size 8 --data synthetic:16 --batch-size 8 --device cpu --iters 1"
    run = tmp_path / "ddpm"
    assert call(train, *flags.split(), "--out", run) == 0
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    small = ["--n", 2, "--steps", 2, "--device", "cpu", "--ckpt", run]
    assert call(sample, *small, "--out", run) == 2
    assert "holds the output of train.py" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert call(sample, *small, "--out", run / "ddim", "--sampler", "ddim") == 0
    assert outputs.owner_of(run) == "train.py" and outputs.owner_of(run / "ddim") == "sample.py"


TINY = "--image-size 8 --data synthetic:32 --device cpu"
TRAIN = f"--model tiny --batch-size 8 --iters 2 --sample-every 0 {TINY}"
SAMPLED = "--n 8 --steps 3 --device cpu"
SCORED = f"{SAMPLED} --features C/classifier.pt --data synthetic:32"
SMALLEST = {  # what is added to a script's commands in the README: the last of two flags holds
    "train.py": TRAIN,
    "sample.py": SCORED,
    "compare.py": f"{SCORED} --steps 3 2",
    "attack.py": f"{SCORED} --attacked 0.5",
    "memorization.py": f"{TINY} --features pixels --n 8 --steps 3",
    "classifier.py": f"--model small --epochs 1 --batch-size 16 {TINY}",
    "purify.py": "--n 4 --t-star 2 --pgd 1 --eot 1 --data synthetic:32 --device cpu",
    "toy3d.py": "--steps 2 --n 8 --points 8 --sample-steps 2 --seeds 1 --methods none adv",
    "butterflies_pca.py": "--components 5 --data synthetic:64 --iters 1 --sample-steps 1 "
    "--channels 32 --n-train 16 --n-eval 4 --methods none adv --device cpu",
    "reproduce.py first": "--device cpu",
    "reproduce.py full": "--device cpu --memorization-features pixels",
    "reproduce.py purify": "--device cpu",
    "rivals.py": "--device cpu",
    "bench.py": "--what sampling --model mini --image-size 8 --batch-size 1 --seconds-per 0.001 "
    "--repeats 1 --device cpu",
}
BEFORE = [  # what the README's letters stand for
    ("train.py", "--robust none --out A"),
    ("train.py", "--robust adv --reg-last 0.5 --out B"),
    ("classifier.py", "--out C"),
]
MEANING = {"C": "C/classifier.pt", "cifar10": "synthetic:32", "...": ""}
LISTS = ("reproduce.py", "rivals.py")
LISTED = dict(  # a size of reproduce.py
    image_size=8,
    train="--model tiny --batch-size 8 --iters 2 --sample-every 0".split(),
    n=8,
    ddpm=3,
    ddim=2,
    classifier="--model small --epochs 1 --batch-size 16".split(),
    attack="--steps 2 --attacked 0.5 --n 4".split(),
    bench=SMALLEST["bench.py"].split(),
    steps="--steps 3 2 --n 8".split(),
)


@pytest.fixture
def in_small(monkeypatch, tmp_path):
    """Networks of a few weights, lists of a few commands, run in this process; in an
    empty folder."""
    small = dict(channels=(8,), attention=(True,), blocks=1, dropout=0.0, groups=4)
    monkeypatch.setitem(train.PRESETS, "tiny", small)
    monkeypatch.setitem(train.PRESETS, "mini", small | dict(patch=2))
    monkeypatch.setattr(training, "generate", lambda *args, **kw: torch.zeros(64, 3, 8, 8))
    monkeypatch.setattr(reproduce, "FIRST_STEPS", ["--iters", "2"])
    monkeypatch.setattr(reproduce, "FIRST_SAMPLES", SAMPLED.split())
    monkeypatch.setattr(reproduce, "FIRST", [*reproduce.FIRST, "--data", "synthetic:64"])
    monkeypatch.setattr(reproduce, "ROWS", [reproduce.ROWS[i] for i in (0, 6, 7)])
    monkeypatch.setattr(reproduce, "FULL_ROWS", [])
    monkeypatch.setattr(reproduce, "OTHER_SETS", {})
    monkeypatch.setattr(reproduce, "MEMORISED", 6)
    monkeypatch.setitem(reproduce.SIZES, "full", LISTED)
    monkeypatch.setattr(rivals, "METHODS", {m: rivals.METHODS[m] for m in ("none", "ambient")})
    monkeypatch.setattr(rivals, "FAULTS", [(0.9, "gauss", 0.2, 0)])
    monkeypatch.setattr(rivals, "OFF", ())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def state(folder):
    """{file: (checksum, the script whose folder it is in)}"""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            owners = map(outputs.owner_of, path.parents)
            found[path] = zlib.crc32(path.read_bytes()), next(filter(None, owners), None)
    return found


def unread():
    """A stream without a reader."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def test_commands_of_the_readme_write_where_they_say(in_small, monkeypatch):
    """All of them in one folder: each writes into its --out and the cache alone, and only over what
    the same script wrote; and that nobody reads their output, as behind `| head`, stops none."""
    repository = {path.name for path in ROOT.iterdir()}
    claim = outputs.claim
    claimed = []

    def noted(out, *args):
        claimed.append(Path(out).resolve())
        return claim(out, *args)

    monkeypatch.setattr(outputs, "claim", noted)

    def run(script, argv):
        before = state(in_small)
        claimed.clear()
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, unread())
        assert call(importlib.import_module(script[:-3]), *argv) == 0, (script, argv)
        if script in LISTS:  # each of its commands has come by here
            return
        out = Path(argv[argv.index("--out") + 1]).resolve() if "--out" in argv else claimed[0]
        assert all(out in (folder, *folder.parents) for folder in claimed)
        after = state(in_small)
        for path in {*before, *after}:
            if path in before and before[path][0] != after.get(path, [None])[0]:
                assert before[path][1] == script, (script, argv, path)
            if path not in before:
                assert {out, in_small / "data" / "cache"} & {*path.parents}, (script, argv, path)

    monkeypatch.setattr(runner, "run", lambda done, argv, *more: run(argv[0], argv[1:]) or True)
    for script, flags in BEFORE:
        run(script, [*SMALLEST[script].split(), *flags.split()])
    for number, (script, flags) in enumerate(COMMANDS):
        words = [MEANING.get(word, word) for word in shlex.split(flags, comments=True)]
        small = SMALLEST.get(" ".join([script, *words[:1]])) or SMALLEST[script]
        own = ["--out", f"training{number}"] if script == "train.py" else []
        run(script, [*filter(None, words), *small.split(), *own])
    assert {path.name for path in ROOT.iterdir()} <= repository | {"__pycache__"}
