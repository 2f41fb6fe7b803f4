"""Damaged files and absurd flags: one line and an exit code, never a traceback, never wrong weights.

HOSTILE=3000 in the environment tries as many mutations of each kind instead of 60.
"""

import copy
import io
import os
import random

import numpy as np
import pytest
import torch
from cli import call
from PIL import Image

import classifier
import sample
import train
from images import load_images
from runtime import load_checkpoint, save_checkpoint
from unet import UNet

TRIES = int(os.environ.get("HOSTILE", 60))
SMALL = "--model tiny --image-size 8 --data synthetic:16 --batch-size 8 --device cpu --amp fp32"
JUNK = [None, -1, 0, 10**12, float("nan"), "x", [], {}, [10**9], torch.zeros(7), True]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Two steps of a network small enough to be damaged often."""
    out = tmp_path_factory.mktemp("hostile")
    small = dict(channels=(8,), attention=(True,), blocks=1, dropout=0.0, groups=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.PRESETS, "tiny", small)
        flags = [*SMALL.split(), "--iters", 2, "--sample-every", 0, "--out", out]
        assert call(train, *flags) == 0
    return out / "ckpt.pt"


def same_weights(a, b):
    return all(torch.equal(a.state_dict()[key], value) for key, value in b.state_dict().items())


def refused(load, path):
    """What load(path) gives, or None where it ends in a ValueError of one line."""
    try:
        return load(path)
    except ValueError as e:
        assert "\n" not in str(e) and str(path) in str(e)
        return None


def test_damaged_bytes_are_refused_or_change_nothing(checkpoint, tmp_path):
    whole = checkpoint.read_bytes()
    right = UNet.load(checkpoint)
    rng = random.Random(0)
    path = tmp_path / "ckpt.pt"
    for _ in range(TRIES):
        data = bytearray(whole)
        kind = rng.randrange(3)
        if kind == 0:
            del data[rng.randrange(len(data)) :]
        elif kind == 1:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        else:
            start = rng.randrange(len(data))
            data[start : start + 64] = rng.randbytes(64)
        path.write_bytes(data)
        net = refused(UNet.load, path)
        assert net is None or same_weights(net, right)


def places(value, path=()):
    """All places in nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, (dict, list)):
            yield from places(inner, (*path, key))


def test_damaged_fields_are_refused_or_change_nothing(checkpoint, tmp_path):
    whole = load_checkpoint(checkpoint)
    right = UNet.load(checkpoint)
    rng = random.Random(1)
    spots = [p for p in places(whole) if p[0] in ("kind", "config", "ema", "image_size")]
    path = tmp_path / "ckpt.pt"
    for _ in range(TRIES):
        ckpt = copy.deepcopy(whole)
        *above, last = rng.choice(spots)
        inner = ckpt
        for key in above:
            inner = inner[key]
        if rng.random() < 0.3:
            del inner[last]
        else:
            inner[last] = rng.choice(JUNK)
        save_checkpoint(path, ckpt)
        net = refused(UNet.load, path)
        assert net is None or same_weights(net, right)


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
    for kind in ("png", "jpeg", "bmp", "webp"):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind)
        whole = buffer.getvalue()
        folder = tmp_path / kind
        folder.mkdir()
        path = folder / f"a.{kind}"
        for i in range(TRIES // 4):
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


ABSURD = [  # script, flags, what the line says
    (train, "--image-size -4", "--image-size -4"),
    (train, "--lr 1e39 --iters 0", "--iters 0"),
    (train, "--seed -1", "--seed"),
    (train, "--data synthetic:0", "synthetic:0"),
    (train, "--data synthetic:1000000000000", "synthetic:1000000000000"),
    (train, "--batch-size 1000000000", "--batch-size 1000000000"),
    (train, "--ema nan", "--ema"),
    (train, "--resume --init x", "no such checkpoint"),
    (sample, "--ckpt CKPT --n 0", "--n 0"),
    (sample, "--ckpt CKPT --n 1000000000000", "--n 1000000000000"),
    (sample, "--ckpt CKPT --batch-size 0", "--batch-size 0"),
    (sample, "--ckpt CKPT --eta 0.5", "--eta 0.5: is for --sampler ddim"),
    (sample, "--ckpt CKPT --sampler ddim --eta nan", "--eta nan"),
    (sample, "--ckpt CKPT --sampler ddim --variance fixed-small", "--variance"),
    (sample, "--ckpt CKPT --steps 2000", "--steps 2000"),
    (sample, "--ckpt CKPT --image-size 3", "--image-size 3"),
    (sample, "--ckpt CKPT --image-size 1000000", "--image-size 1000000"),
    (sample, "--ckpt nowhere.pt", "nowhere.pt"),
    (sample, "--ckpt CKPT --fid --features CKPT --n 4", "holds no classifier"),
    (classifier, "--epochs 0", "--epochs"),
    (classifier, "--lr nan", "--lr"),
    (classifier, "--data folder:x", "--test"),
]


@pytest.mark.parametrize("script, flags, line", ABSURD)
def test_absurd_flags_end_in_one_line(script, flags, line, checkpoint, tmp_path, capsys):
    flags = flags.replace("CKPT", str(checkpoint)).split()
    base = SMALL.split() + ["--iters", "1"] if script is train else ["--device", "cpu"]
    if script is classifier:
        base += ["--data", "synthetic:16", "--model", "small"]
    assert call(script, *base, *flags, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err.strip()
    assert line in error and error.count("\n") == 0
    assert not list((tmp_path / "out").glob("*.pt"))
