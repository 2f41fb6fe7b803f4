"""Damaged files and absurd flags: one line and an exit code, never a traceback, never wrong
weights.

HOSTILE=3000 in the environment tries as many mutations of each kind instead of 60. They are plain
seeded loops: a failure is told by its bytes, which shrinking (hypothesis) would not make clearer.
"""

import argparse
import copy
import io
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import call
from PIL import Image

import attack
import bench
import butterflies_pca
import classifier
import compare
import images
import memorization
import purify
import reproduce
import rivals
import runner
import sample
import toy3d
import toy3d_sweep
import train
import training
import weights
from images import load_images
from outputs import Failed
from runtime import load_checkpoint, save_checkpoint
from unet import UNet

TRIES = int(os.environ.get("HOSTILE", 60))
SMALL = "--model tiny --image-size 8 --data synthetic:16 --batch-size 8 --device cpu --amp fp32"
NETWORK = dict(channels=(8,), attention=(True,), blocks=1, dropout=0.0, groups=4)
JUNK = [None, -1, 0, 10**12, float("nan"), "x", [], {}, [10**9], torch.zeros(7), True]
TOY = "--steps 2 --n 8 --points 8 --sample-steps 2 --methods none --device cpu"
SCRIPTS = {  # script: flags of its smallest run, in the folder `place`
    train: f"{SMALL} --iters 1 --sample-every 0",
    sample: "--ckpt A --n 4 --steps 2 --device cpu",
    compare: "--ckpt A --n 4 --steps 2 --device cpu",
    attack: "--ckpt A --n 4 --steps 2 --attacked 0.5 --device cpu",
    memorization: "--samples S --data synthetic:16 --image-size 8 --features pixels --device cpu",
    classifier: "--data synthetic:16 --image-size 8 --model small --epochs 1 --batch-size 8 "
    "--device cpu",
    purify: "--ckpt A --classifier C/classifier.pt --data synthetic:16 --n 4 --t-star 1 --pgd 1 "
    "--device cpu",
    toy3d: TOY,
    toy3d_sweep: TOY,
    butterflies_pca: "--components 5 --data synthetic:64 --methods none --conditions clean "
    "--iters 1 --sample-steps 1 --channels 32 --n-train 16 --n-eval 4 --device cpu",
    bench: "--what sampling --model mini --image-size 8 --batch-size 1 --seconds-per 0.001 "
    "--repeats 1 --device cpu",
    reproduce: "toy --data synthetic --device cpu --work w",
    rivals: "toy --data synthetic --device cpu --work w",
}
PARALLEL = (train, sample, compare, attack, purify)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with A/ckpt.pt of a network small enough to be damaged often, C/classifier.pt,
    S/samples.npz, and the files of the table below."""
    place = tmp_path_factory.mktemp("hostile")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.PRESETS, "tiny", NETWORK)
        patch.setattr(training, "generate", lambda *args, **kw: torch.zeros(64, 3, 8, 8))
        flags = [*SMALL.split(), "--iters", 2, "--sample-every", 0, "--out", place / "A"]
        assert call(train, *flags) == 0
    assert call(classifier, *SCRIPTS[classifier].split(), "--out", place / "C") == 0
    (place / "S").mkdir()
    np.savez_compressed(place / "S" / "samples.npz", images=load_images("synthetic:4", 8)[0])
    for name, size in dict(D=8, size_list=[], size_huge=10**9, size_name="x").items():
        weights.write_diffusers(*wide().values(), place / name, size)
    configs = dict(null=b"null", cut=b'{"a": 1', deep=b"[" * 10**5, latin=b'{"a": "\xe9"}')
    for name, content in configs.items():
        (place / name).mkdir()
        (place / name / "config.json").write_bytes(content)
    for name, content in dict(broken="{", unlike='{"command": 3}', other='{"step": 7}').items():
        (place / name / "none-0").mkdir(parents=True)  # a late training of reproduce.py
        (place / name / "none-0" / "metrics.json").write_text(content)
    folders = "train/a train/b train/c test/a test/c pets/cat pets/dog"
    for name in (f"{folder}/0.png" for folder in folders.split()):
        (place / name).parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(place / name)
    ckpt = load_checkpoint(place / "C" / "classifier.pt") | dict(classes=["a", "b"])
    save_checkpoint(place / "ab.pt", ckpt)
    (place / "fifo").mkdir()
    os.mkfifo(place / "fifo" / "0.png")
    (place / "mine").mkdir()
    (place / "mine" / "table.csv").write_text("mine")
    return place


@pytest.fixture
def inside(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setitem(train.PRESETS, "tiny", NETWORK)
    yield place
    shutil.rmtree("o", ignore_errors=True)


@pytest.fixture(scope="module")
def checkpoint(place):
    return place / "A" / "ckpt.pt"


def wide():
    """The state dict and config of a network that diffusers' groups of 32 fit."""
    torch.manual_seed(0)
    net = UNet(**NETWORK | dict(channels=(32,), groups=32))
    return dict(state=net.state_dict(), config=net.config)


# --------------------------------------------------------------------------------------------------
# flags and files: script, [VARIABLE=value] flags, what the line says

TABLE = [
    # sizes and numbers without sense, before anything is allocated
    (train, "--image-size -4", "--image-size -4"),
    (train, "--image-size 7 --data folder:nowhere --model mini", "7x7 does not divide by 4"),
    (train, "--iters 0", "--iters 0"),
    (train, "--seed -1", "--seed"),
    (train, "--data synthetic:0", "synthetic:0"),
    (train, "--data synthetic:1000000000000", "synthetic:1000000000000"),
    (train, "--batch-size 1000000000", "--batch-size 1000000000"),
    (train, "--robust adv --reg-from 100", "--reg-from 100: must lie below --reg-until 100"),
    (train, "--paper", "--paper: has no effect with --robust none"),
    (train, "--ema nan", "--ema"),
    (sample, "--n 0", "--n 0"),
    (sample, "--n 1000000000000", "--n 1000000000000"),
    (sample, "--batch-size 0", "--batch-size 0"),
    (sample, "--sampler ddim --eta nan", "--eta nan"),
    (sample, "--sampler heun --s-churn inf", "--s-churn inf"),
    (sample, "--steps 2000", "--steps 2000"),
    (sample, "--image-size 3", "--image-size 3"),
    (sample, "--image-size 1000000", "--image-size 1000000"),
    (sample, "--seed 1000000000000000000000", "--seed 1000000000000000000000"),
    (sample, "--fid --n 1 --features C/classifier.pt", "--n 1: --fid needs 2"),
    (compare, "--n 1000000000000", "--n 1000000000000"),
    (compare, "--fid --n 1 --features C/classifier.pt", "--n 1: --fid needs 2"),
    (attack, "--n 1000000000000", "--n 1000000000000"),
    (attack, "--attack-iters 1000000000000000000000", "--attack-iters"),
    (attack, "--attacked nan", "--attacked nan"),
    (attack, "--fid --n 1 --features C/classifier.pt", "--n 1: --fid needs 2"),
    (memorization, "--thresholds nan", "--thresholds nan"),
    (memorization, "--n 1000000000000", "--n 1000000000000"),
    (memorization, "--image-size -4", "--image-size -4"),
    (classifier, "--epochs 0", "--epochs"),
    (classifier, "--epochs 1e300", "--epochs"),
    (classifier, "--lr nan", "--lr"),
    (classifier, "--image-size 4", "--image-size 4"),
    (classifier, "--seed 1000000000000000000000", "--seed"),
    (purify, "--n 1000", "--n 1000: --data synthetic:16 has 16"),
    (purify, "--eot 1000000000000", "--eot"),
    (purify, "--evaluations 1000000000000", "--evaluations"),
    (purify, "--knowledge semi-1000000000000", "--knowledge semi-1000000000000"),
    (purify, "--seed -1", "--seed -1"),
    (purify, "--t-star 5000", "t"),
    (toy3d, "--n 1000000000000", "--n 1000000000000"),
    (toy3d, "--points 1000000000000", "--points 1000000000000"),
    (toy3d, "--steps 1000000000000000000000", "--steps"),
    (toy3d_sweep, "--n 1000000000000", "--n 1000000000000"),
    (butterflies_pca, "--components 200", "need 1 .. 63 (64 images of 192 values)"),
    (butterflies_pca, "--n-train 1000000000000", "--n-train"),
    (butterflies_pca, "--n-eval 1000000000000", "--n-eval"),
    (butterflies_pca, "--channels 1000000000000", "--channels"),
    (butterflies_pca, "--batch-size 1000000000000", "--batch-size"),
    (butterflies_pca, "--seed 1000000000000000000000", "--seed"),
    (bench, "--threads 1000000", "--threads 1000000"),
    (bench, "--image-size 1000000000", "--image-size"),
    (bench, "--batch-size 1000000000", "--batch-size"),
    (bench, "--repeats 1000000000000", "--repeats"),
    (reproduce, "--seed 1000000000000000000000", "--seed"),
    (rivals, "--seed -1", "--seed"),
    # flags without effect, and values given twice
    (sample, "--eta 0.5", "--eta 0.5: is for --sampler ddim"),
    (sample, "--sampler ddim --variance fixed-small", "--variance"),
    (sample, "--features C/classifier.pt", "--features: has no effect without --fid"),
    (sample, "--inception-weights x", "--inception-weights: has no effect without --fid"),
    (sample, "--data synthetic:16", "--data: has no effect without --fid"),
    (compare, "--features C/classifier.pt", "--features: has no effect without --fid"),
    (compare, "--steps 2 2", "give no value twice"),
    (compare, "--ckpt A A", "give no value twice"),
    (compare, "--sampler ddim --spacing naive", "--spacing naive: is for --sampler ddpm"),
    (attack, "--features C/classifier.pt", "--features: has no effect without --fid"),
    (attack, "--attack-factor 3", "--attack-factor: has no effect with --attack-iters 1"),
    (attack, "--ckpt A A", "two checkpoints lie in a folder A"),
    (memorization, "--sampler ddim --eta 1", "--eta: has no effect without a checkpoint"),
    (memorization, "--steps 5", "--steps: has no effect without a checkpoint"),
    (memorization, "--test synthetic:16 --no-null", "--test: has no effect with --no-null"),
    (memorization, "--dino-hub x", "--dino-hub: has no effect without --features dinov2"),
    (memorization, "--thresholds 0.9 0.9", "--thresholds: 0.9 is given twice"),
    (memorization, "--samples S S", "--names: need 2 different names"),
    (purify, "--knowledge white white", "--knowledge: white is given twice"),
    (purify, "--purifier ddim ddim", "--purifier: ddim is given twice"),
    (purify, "--purifier none", "has no effect with --purifier none alone"),
    (purify, "--knowledge both --eot 3", "--eot: has no effect without --knowledge white or fwd"),
    (purify, "--purifier ddim --variance fixed-small", "--variance: has no effect without"),
    (toy3d, "--lam 3", "--lam: has no effect with --methods none"),
    (toy3d, "--noises clean --share 0.5", "--share: has no effect with --noises clean"),
    (toy3d, "--full --noises clean --seeds 1", "--full: has no effect with --noises and --seeds"),
    (toy3d, "--methods none none", "--methods: none is given twice"),
    (toy3d_sweep, "--noises clean", "--noises: has no effect without --by-t"),
    (toy3d_sweep, "--by-t", "has no effect with --by-t"),
    (butterflies_pca, "--p 0.5", "--p: has no effect without --conditions noisy"),
    (butterflies_pca, "--reg-last 0.5", "--reg-last: has no effect with --methods none"),
    (butterflies_pca, "--methods none none", "--methods: none is given twice"),
    (bench, "--what sampling sampling", "--what: sampling is given twice"),
    (bench, "--what methods --methods none none", "--methods: none is given twice"),
    (bench, "--what modes --methods none", "without --what methods or kernels"),
    (bench, "--peak 3", "--peak: has no effect without --what kernels"),
    (reproduce, "first", "unrecognized arguments: first"),
    # files that are missing, damaged or of something else
    (train, "--resume --init x", "no such checkpoint"),
    (train, "--data folder:fifo", "holds no images"),
    (sample, "--ckpt nowhere.pt", "nowhere.pt"),
    (sample, "--ckpt C/classifier.pt", "holds no UNet"),
    (sample, "--fid --features A/ckpt.pt", "holds no classifier"),
    (sample, "--ckpt null", "null/config.json: holds no object"),
    (sample, "--ckpt cut", "cut/config.json: not a whole JSON file"),
    (sample, "--ckpt deep", "deep/config.json: not a whole JSON file"),
    (sample, "--ckpt latin", "latin/config.json: not a whole JSON file"),
    (sample, "--ckpt size_list", "size_list: its image size"),
    (sample, "--ckpt size_huge", "size_huge: its image size"),
    (sample, "--ckpt size_name", "size_name: its image size"),
    (sample, "--export mine", "--out mine: holds files of another origin"),
    (sample, "--export A", "--out A: holds the output of train.py"),
    (compare, "--out .", "--out .: holds files of another origin"),
    (purify, "--classifier ab.pt --data folder:pets", "its classes are not those of folder:pets"),
    (classifier, "--data folder:train", "--test"),
    (
        classifier,
        "--data folder:train --test folder:test",
        "--test folder:test: its classes are not those of folder:train, such as 'b'",
    ),
    (reproduce, "--data folder:nowhere --test folder:x", "folder:nowhere: no such folder"),
    (reproduce, "--inception-weights nowhere", "--inception-weights nowhere: no such file"),
    (reproduce, "--work broken", "none-0/metrics.json: not a whole JSON file"),
    (reproduce, "--work unlike", "is of `3`, not of these settings"),
    (rivals, "--work other", "is of `None`, not of these settings"),
    (reproduce, "--work mine/table.csv/w", "Not a directory"),
    # the environment
    (train, "WORLD_SIZE=abc", "WORLD_SIZE=abc: in the environment, but no whole number"),
    (train, "RANK=3 WORLD_SIZE=2", "RANK=3 WORLD_SIZE=2"),
    (train, "WORLD_SIZE=2 LOCAL_RANK=-1", "LOCAL_RANK=-1"),
    (train, "--device cuda:99", "--device cuda:99"),
    (reproduce, "--device cuda:99", "--device cuda:99"),
    (rivals, "--device tpu", "--device tpu"),
]
for script in SCRIPTS:
    TABLE.append((script, "--out A/ckpt.pt/x", "Not a directory"))
    TABLE.append((script, "--out mine", "--out mine: holds files of another origin"))
    TABLE.append((script, f"--out {'A' if script is not train else 'C'}", "holds the output of "))
    if script not in PARALLEL:
        TABLE.append((script, "WORLD_SIZE=2", "torchrun: this script runs in one process"))


def case(row):
    return f"{row[0].__name__} {row[1]}"


@pytest.mark.parametrize("row", TABLE, ids=case)
def test_bad_input_ends_in_one_line(row, inside, capsys, monkeypatch):
    script, flags, line = row
    ran = []
    monkeypatch.setattr(runner, "run", lambda *args: ran.append(args) or True)
    words = shlex.split(flags)
    while words and words[0].partition("=")[0].isupper():
        monkeypatch.setenv(*words.pop(0).split("="))
    before = stamps(inside)
    assert call(script, *SCRIPTS[script].split(), "--out", "o", *words) == 2
    error = capsys.readouterr().err.split("\r")[-1].strip()  # without the bar of a decoding
    assert line in error and error.count("\n") == 0 and not ran
    after = stamps(inside)
    changed = [path for path in {*before, *after} if before.get(path) != after.get(path)]
    assert all(path.name == ".owner" or "cache" in path.parts for path in changed)


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# --------------------------------------------------------------------------------------------------
# Ctrl-C, failing work, and what is kept of it


@pytest.mark.parametrize(
    "script, flags, module, function, kept",
    [
        (attack, "--ckpt A A2", attack, "attacked_samples", "table.csv"),
        (purify, "--eot 1", purify, "run_attack", "table.csv"),
        (toy3d, "--sets 3-gaussians", toy3d, "train", "samples.npz"),
        (butterflies_pca, "--methods none ran", butterflies_pca, "train", "table.md"),
        (bench, "--what sampling modes", bench, "interleaved", "table.md"),
        (classifier, "", classifier, "random_crop", None),
        (memorization, "", memorization, "nearest", None),
        (reproduce, "", reproduce, "run_all", None),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_ctrl_c_keeps_what_is_done(
    script, flags, module, function, kept, inside, capsys, monkeypatch
):
    if not Path("A2").exists():
        shutil.copytree("A", "A2")
    calls = []
    real = getattr(module, function)

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == (1 if script is toy3d or not kept else 2):  # toy3d: after the truth's
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(module, function, interrupted)
    code = call(script, *SCRIPTS[script].split(), *flags.split(), "--out", "o")
    assert code == 128 + signal.SIGINT
    assert capsys.readouterr().err.strip().endswith("interrupted")
    assert kept is None or (inside / "o" / kept).stat().st_size > 0


def test_overwritten_and_killed_is_not_resumed(inside, capsys, monkeypatch):
    """`--overwrite`, killed before its first checkpoint: --resume would continue the old
    network."""
    flags = [*SCRIPTS[train].split(), "--out", "o"]
    monkeypatch.setattr(training, "generate", lambda *args, **kw: torch.zeros(64, 3, 8, 8))
    assert call(train, *flags) == 0
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", lambda *args: 1 / 0)
        assert call(train, *flags, "--overwrite") == 1
    assert call(train, *flags, "--resume") == 2
    assert "no such checkpoint file" in capsys.readouterr().err


@pytest.mark.parametrize("step", [0, -5])
def test_a_clock_that_stands_still_or_goes_back(step, inside, monkeypatch):
    now = [1e9]

    def clock():
        now[0] += step
        return now[0]

    monkeypatch.setattr("time.time", clock)
    monkeypatch.setattr(training, "generate", lambda *args, **kw: torch.zeros(64, 3, 8, 8))
    assert call(train, *SCRIPTS[train].split(), "--out", "o") == 0
    line = json.loads(Path("o/metrics.jsonl").read_text())
    assert np.isfinite(line["img_per_s"])


def test_a_full_disk_is_named(tmp_path):
    """torch says "unexpected pos" where the system said that the disk is full."""
    os.symlink("/dev/full", tmp_path / "a.pt.tmp")
    with pytest.raises(Failed, match="No space left on device"):
        save_checkpoint(tmp_path / "a.pt", dict(a=torch.zeros(10**6)))


def test_a_script_ends_with_the_list_that_started_it():
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        child = subprocess.Popen(["sleep", "60"], preexec_fn=runner.end_with_parent)
        os.write(write, str(child.pid).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    stat = Path(f"/proc/{os.read(read, 20).decode()}/stat")
    for _ in range(1000):
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            return
        os.sched_yield()
    raise AssertionError("it lives on")


def test_names_that_are_not_utf_8(tmp_path):
    folder = os.fsencode(tmp_path / "images")
    os.mkdir(folder)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", folder + b"/\xff.png")
    assert load_images(f"folder:{tmp_path / 'images'}", root=tmp_path)[0].shape == (1, 8, 8, 3)


@pytest.mark.parametrize("data, size", [("celeba", 64), ("cifar10", 32)])
def test_rivals_judges_at_the_size_of_its_trainings(data, size, inside, monkeypatch):
    asked = []

    def load(name, image_size, root):
        asked.append(image_size or images.NATIVE_SIZE[name])
        raise Failed("enough")

    monkeypatch.setattr(rivals, "run_all", lambda *args: True)
    monkeypatch.setattr(rivals, "read_records", lambda *args: {})
    monkeypatch.setattr(rivals, "load_images", load)
    flags = ["full", "--data", data, "--work", "w", "--out", "o", "--device", "cpu"]
    assert call(rivals, *flags) == 1 and asked == [size]
    todo = rivals.commands(rivals_arguments(data))
    assert not any("--image-size" in argv for _, argv in todo)


def rivals_arguments(data):
    return argparse.Namespace(
        size="full", data=data, test=None, data_root="d", device="cpu", work="w", seed=0,
        inception_weights=None,
    )  # fmt: skip


def process(code, **environment):
    """Python code as a process -> (exit code, stderr)."""
    root = Path(train.__file__).parent
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=os.environ | environment, text=True,
        capture_output=True,
    )  # fmt: skip
    return found.returncode, found.stderr


def test_the_figures_of_a_notebook(tmp_path):
    """`!python compare.py` in Jupyter sets MPLBACKEND to one that a plain Python may lack."""
    code = "import compare; print(compare.plt.get_backend())"
    assert process(code, MPLBACKEND="module://matplotlib_inline.backend_inline") == (0, "")


def test_compile_without_a_compiler(inside, capsys, monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("nowhere",))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    torch._dynamo.reset()
    code = call(train, *SCRIPTS[train].split(), "--compile", "--out", "o")
    torch._dynamo.reset()
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 1 and error.startswith("train.py: failed (") and "TRACEBACK=1" in error


# --------------------------------------------------------------------------------------------------
# mutations


def same_weights(a, b):
    return all(torch.equal(a.state_dict()[key], value) for key, value in b.state_dict().items())


def refused(load, path):
    """What load(path) gives, or None where it ends in a ValueError of one line that names it."""
    try:
        return load(path)
    except ValueError as e:
        assert "\n" not in str(e) and str(path) in str(e)
        return None


def mutated(whole, rng):
    """Bytes cut short, with a bit flipped, or with 64 of them replaced."""
    data = bytearray(whole)
    kind = rng.randrange(3)
    if kind == 0:
        del data[rng.randrange(len(data)) :]
    elif kind == 1:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    else:
        start = rng.randrange(len(data))
        data[start : start + 64] = rng.randbytes(64)
    return bytes(data)


def diffusers(path):
    """The network of a folder, by the path of one of its files."""
    return UNet.from_diffusers(path.parent.parent)


KINDS = {  # file in `place`: (how it is read, equality)
    "A/ckpt.pt": (UNet.load, same_weights),
    "C/classifier.pt": (classifier.load_classifier, same_weights),
    "D/unet/config.json": (diffusers, same_weights),
    "D/unet/diffusion_pytorch_model.bin": (diffusers, same_weights),
    "S/samples.npz": (memorization.read_npz, np.array_equal),
}


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_bytes_are_refused_or_change_nothing(kind, place, tmp_path):
    load, same = KINDS[kind]
    shutil.copytree((place / kind).parents[-len(place.parts) - 1], tmp_path / kind.split("/")[0])
    path = tmp_path / kind
    whole = path.read_bytes()
    right = load(path)
    rng = random.Random(0)
    for _ in range(TRIES):
        path.write_bytes(mutated(whole, rng))
        try:
            found = load(path)
        except ValueError as e:
            assert "\n" not in str(e) and path.parent.name in str(e)
        else:
            assert same(found, right)


def places(value, path=()):
    """All places in nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, (dict, list)):
            yield from places(inner, (*path, key))


def damage(whole, spots, rng, junk):
    """A copy in which one of the places is gone or holds junk."""
    content = copy.deepcopy(whole)
    *above, last = rng.choice(spots)
    inner = content
    for key in above:
        inner = inner[key]
    if rng.random() < 0.3:
        del inner[last]
    else:
        inner[last] = rng.choice(junk)
    return content


@pytest.mark.parametrize("kind", ["A/ckpt.pt", "C/classifier.pt"])
def test_damaged_fields_are_refused_or_change_nothing(kind, place, tmp_path):
    load, same = KINDS[kind]
    whole = load_checkpoint(place / kind)
    right = load(place / kind)
    rng = random.Random(1)
    read = ("kind", "config", "ema", "image_size", "classes")
    read += ("model",) if kind == "C/classifier.pt" else ()
    spots = [p for p in places(whole) if p[0] in read]
    path = tmp_path / "ckpt.pt"
    for _ in range(TRIES):
        torch.save(damage(whole, spots, rng, JUNK), path)
        net = refused(load, path)
        assert net is None or same(net, right)


def test_damaged_configs_are_refused_or_change_nothing(place, tmp_path):
    """Values in a config.json of diffusers, its image size among them."""
    shutil.copytree(place / "D", tmp_path / "D")
    path = tmp_path / "D/unet/config.json"
    whole = json.loads(path.read_text())
    right = diffusers(path)
    rng = random.Random(3)
    junk = [value for value in JUNK if not isinstance(value, torch.Tensor)]
    args = argparse.Namespace(raw=False, compile=False, image_size=None, amp="fp32")
    for _ in range(TRIES):
        path.write_text(json.dumps(damage(whole, list(places(whole)), rng, junk)))
        found = refused(lambda path: sample.load_model(path, args, "cpu"), tmp_path / "D")
        assert found is None or (same_weights(found[0], right) and found[1] in (8, 32))


@pytest.mark.parametrize("part", ["step", "args", "model", "ema", "optimizer", "scaler", "config"])
@pytest.mark.parametrize("junk", [None, "x", {}, [1]])
def test_a_damaged_part_is_not_resumed(part, junk, checkpoint, tmp_path, capsys):
    ckpt = load_checkpoint(checkpoint)
    if ckpt[part] == junk or (part, junk) == ("config", None):
        junk = 3.5
    ckpt[part] = junk
    save_checkpoint(tmp_path / "ckpt.pt", ckpt)
    before = (tmp_path / "ckpt.pt").read_bytes()
    code = call(train, "--resume", "--iters", 3, "--device", "cpu", "--out", tmp_path)
    error = capsys.readouterr().err
    if part == "config":  # training builds the network from --model
        return
    assert code == 2, error
    assert error.strip().count("\n") == 0 and "Traceback" not in error
    assert (tmp_path / "ckpt.pt").read_bytes() == before


def test_damaged_images_are_refused_or_decoded(tmp_path):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    rng = random.Random(2)
    for kind in ("png", "jpeg", "bmp", "webp", "tiff", "ppm"):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind)
        whole = buffer.getvalue()
        folder = tmp_path / kind
        folder.mkdir()
        path = folder / f"a.{kind}"
        for i in range(TRIES // 6):
            data = bytearray(whole)
            for _ in range(rng.randrange(1, 4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            path.write_bytes(data[: rng.randrange(1, len(data) + 1)] if i % 3 == 0 else data)
            try:
                images, _ = load_images(f"folder:{folder}", 8, root=tmp_path)
            except ValueError as e:
                assert "\n" not in str(e) and str(path) in str(e)
            else:
                assert images.shape == (1, 8, 8, 3)
