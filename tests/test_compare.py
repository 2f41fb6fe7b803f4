"""compare.py: what it tabulates is what it recorded, and each of its samples is the one sample.py
makes."""

import argparse
import json
import os
import socket
import subprocess
import sys
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from cli import call

import compare
import metrics
import outputs
import sample
from runtime import save_checkpoint
from unet import PRESETS, UNet

FLAGS = "--n 6 --device cpu --no-png --amp fp32".split()


class Colours(torch.nn.Module):
    """In Inception's place: features and logits from the mean colour."""

    def forward(self, x):
        c = x.float().mean((2, 3)) / 255
        return c, 50 * c


@pytest.fixture(scope="module")
def ckpts(tmp_path_factory):
    """Two untrained networks, as if trained on the same corrupted images."""
    root = tmp_path_factory.mktemp("ckpts")
    paths = [root / name / "ckpt.pt" for name in ("ddpm", "robust")]
    for path in paths:
        net = UNet(**PRESETS["tiny"])
        torch.nn.init.normal_(net.conv_out.weight, std=0.05)
        path.parent.mkdir()
        save_checkpoint(
            path,
            dict(
                kind="unet",
                config=net.config,
                image_size=8,
                model=net.state_dict(),
                ema=net.state_dict(),
                args=dict(data="synthetic:64", p=0.9, sigma=0.2, seed=0),
            ),
        )
    return paths


@pytest.fixture(scope="module")
def compared(ckpts, tmp_path_factory):
    """2 checkpoints x 2 numbers of steps x 3 rules, scored -> the folder."""
    out, loads, threads = tmp_path_factory.mktemp("compared"), [], torch.get_num_threads()
    torch.set_num_threads(1)  # as under torchrun
    with pytest.MonkeyPatch.context() as m:
        m.setattr(
            sample, "features_network", lambda *a: loads.append(a) or (Colours(), "FID", "colours")
        )
        assert (
            call(
                compare,
                "--ckpt",
                *ckpts,
                *FLAGS,
                "--steps",
                2,
                3,
                "--spacing",
                "respaced",
                "naive",
                "truncated",
                "--fid",
                "--data-root",
                out / "data",
                "--out",
                out,
            )
            == 0
        )
    assert len(loads) == 1  # the network that scores is loaded once
    yield out
    torch.set_num_threads(threads)


def test_as_trained_on_shows_the_share_of_faulty_images():
    args = argparse.Namespace(data=None, data_root="", n=6)
    for seed in (0, 1):
        (_, clean), (_, seen) = compare.training_rows(
            [("synthetic:9000", 0.3, 0.2, seed, "gauss", False)] * 2, 8, args
        )
        assert (
            len(clean) == 2000
            and ((clean != seen).flatten(1).any(1).double().mean() - 0.3).abs() < 0.04
        )


def record(folder):
    return json.loads((folder / "metrics.json").read_text())


def images(folder):
    return np.load(folder / "samples.npz")["images"]


def test_tables_hold_the_numbers_of_the_records(compared):
    lines = (compared / "steps.md").read_text().splitlines()
    assert (
        lines[0] == "ddpm, n = 6: noise_level / FID / IS / recall"
        and lines[2] == "| checkpoint | spacing | 3 | 2 |"
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[4:]]
    assert [row[:2] for row in rows] == [
        [c, s] for c in ("ddpm", "robust") for s in ("respaced", "naive", "truncated")
    ]
    table = dict(line.split(",", 1) for line in (compared / "table.csv").read_text().splitlines())
    columns = table.pop("name").split(",")
    assert {
        "noise_level",
        "brightness_std",
        "power_1",
        "FID",
        "IS",
        "recall",
        "coverage",
        "n_reference",
    } <= set(columns)
    for name, spacing, *cells in rows:
        for steps, cell in zip((3, 2), cells):
            r = record(compared / f"{name}-{steps}-{spacing}")
            assert (r["steps"], r["spacing"], r["n"], r["reference"]) == (
                steps,
                spacing,
                6,
                "synthetic:64",
            )
            assert cell == " / ".join(f"{r[k]:.4g}" for k in ("noise_level", "FID", "IS", "recall"))
            row = dict(zip(columns, table.pop(f"{name}-{steps}-{spacing}").split(",")))
            assert float(row.pop("from_clean")) > 0
            assert row == {k: outputs.cell(r[k]) for k in row}
    assert len({cell for row in rows for cell in row[2:]}) == 12  # no two samples alike
    clean, noisy = (
        float(table.pop(k).split(",")[0]) for k in ("clean training images", "as trained on")
    )
    assert not table and noisy > clean + 0.05
    assert (compared / "side_by_side.png").exists() and (compared / "steps.png").exists()
    written = record(compared)
    assert written["n"] == 6 and written["command"].startswith("python compare.py --ckpt")
    assert written["samples"]["ddpm-3-naive"]["FID"] == record(compared / "ddpm-3-naive")["FID"]


def test_samples_are_those_of_sample_py(compared, ckpts, tmp_path):
    flags = "--steps 3 --spacing truncated --batch-size 4".split()
    assert call(sample, "--ckpt", ckpts[1], *FLAGS, *flags, "--out", tmp_path) == 0
    assert np.array_equal(images(tmp_path), images(compared / "robust-3-truncated"))
    assert record(tmp_path)["noise_level"] == record(compared / "robust-3-truncated")["noise_level"]


def test_two_processes_make_the_same_samples(compared, ckpts, tmp_path, monkeypatch):
    """As under torchrun; the first process is this one."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        env = dict(
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(s.getsockname()[1]),
            WORLD_SIZE="2",
            RANK="0",
            OMP_NUM_THREADS="1",
        )
    for k, v in env.items():
        monkeypatch.setenv(k, v)
    join = dist.init_process_group
    monkeypatch.setattr(
        dist,
        "init_process_group",
        lambda backend, timeout: join(backend, timeout=timedelta(minutes=4)),
    )
    flags = ["--ckpt", *ckpts, *FLAGS, "--steps", "3", "--out", tmp_path]
    other = subprocess.Popen(
        [sys.executable, compare.__file__, *flags], env=os.environ | dict(RANK="1")
    )
    assert call(compare, *flags) == 0 and other.wait(240) == 0
    for name in ("ddpm", "robust"):  # what does not differ is not in the name
        assert np.array_equal(images(tmp_path / name), images(compared / f"{name}-3-respaced"))
    assert (tmp_path / "side_by_side.png").exists() and not (tmp_path / "steps.md").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--ckpt {0} {0}", "two samples would share"),
        ("--ckpt {0} --steps 2 2", "two samples would share"),
        ("--ckpt {0} --steps 3 0", "--steps 0"),
        ("--ckpt {0} --steps 3 --spacing respaced even", "--spacing even"),
        ("--ckpt {0} --steps 3 --spacing naive --sampler ddim", "--spacing naive"),
        ("--ckpt {0} --n 0", "--n 0"),
        ("--ckpt {0} none.pt", "no such checkpoint"),
        ("--ckpt {0} --fid --inception-weights none.pth", "no such file"),
    ],
)
def test_bad_input_is_refused_before_any_work(capsys, monkeypatch, ckpts, tmp_path, flags, message):
    monkeypatch.setattr(sample, "sample_uint8", None)
    assert call(compare, *FLAGS, *flags.format(ckpts[0]).split(), "--out", tmp_path / "o") == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and message in err[0]


def test_fid_needs_a_reference(capsys, monkeypatch, ckpts, tmp_path):
    """A checkpoint that does not say what it was trained on, and a set that is not here."""
    ckpt = torch.load(ckpts[0], weights_only=True)
    monkeypatch.setattr(sample, "features_network", lambda *a: (Colours(), "FID", "colours"))
    monkeypatch.setattr(sample, "sample_uint8", None)
    for trained, message in (
        ({}, "give --data NAME"),
        (dict(data="folder:/nowhere"), "no such folder"),
    ):
        save_checkpoint(tmp_path / "ckpt.pt", ckpt | dict(args=trained))
        assert (
            call(
                compare,
                "--ckpt",
                ckpts[0],
                tmp_path / "ckpt.pt",
                *FLAGS,
                "--fid",
                "--out",
                tmp_path / "o",
                "--data-root",
                tmp_path,
            )
            == 2
        )
        assert message in capsys.readouterr().err


def test_samples_of_two_sizes_stand_side_by_side(tmp_path):
    """But there are no training images to compare both with."""
    args = argparse.Namespace(data=None, data_root=str(tmp_path), n=2)
    trained = dict(data="synthetic:64", p=0.9, sigma=0.2, seed=0)
    results = {}
    for size in (8, 16):
        results[tmp_path / f"{size}"] = torch.zeros(2, 3, size, size), dict(noise_level=0), trained
    compare.side_by_side(results, tmp_path, args)
    names = [line.split(",")[0] for line in (tmp_path / "table.csv").read_text().splitlines()]
    assert names == ["name", "8", "16"]


@pytest.mark.parametrize(
    "data, drop, names",
    [
        (None, False, ["clean training images", "as trained on"]),
        ("synthetic:64", False, ["clean training images", "as trained on"]),
        ("synthetic:32", False, ["clean synthetic:32"]),  # other images than it was trained on
        (None, True, ["clean training images"]),  # --drop-noisy trained on some of them alone
    ],
)
def test_training_rows_are_called_what_they_are(data, drop, names):
    args = argparse.Namespace(data=data, data_root="data")
    rows = compare.training_rows([("synthetic:64", 0.9, 0.2, 0, None, drop)], 8, args)
    assert [name for name, _ in rows] == names


def test_diversity_compares_no_more_than_its_limit(monkeypatch, tmp_path):
    """All pairs of 50,000 samples would take 10 GB."""
    found = []
    monkeypatch.setattr(sample, "COMPARED", 10)
    monkeypatch.setattr(metrics, "diversity", lambda *sets: found.append([*map(len, sets)]) or {})
    args = argparse.Namespace(data_root=str(tmp_path), batch_size=32)
    scorer = Colours(), "FID", "colours"
    reference = sample.reference_of("synthetic:64", 8, args, scorer, "cpu")
    images = np.zeros((20, 8, 8, 3), np.uint8)
    numbers = sample.evaluate(images, args, scorer, reference, "cpu")
    assert found == [[10, 10]] and numbers["n_reference"] == 64


def test_a_diverged_network_is_failed_work(ckpts, capsys, tmp_path):
    ckpt = torch.load(ckpts[0], weights_only=True)
    ckpt["ema"]["conv_out.bias"].fill_(3e38)
    save_checkpoint(tmp_path / "huge.pt", ckpt)
    flags = [*FLAGS, "--steps", 2, "--no-clip", "--out", tmp_path / "o"]
    assert call(sample, "--ckpt", tmp_path / "huge.pt", *flags) == 1
    assert "did training diverge" in capsys.readouterr().err


def test_a_network_without_the_noisy_images_is_not_ddpm():
    assert outputs.method_of(dict(robust="none", drop_noisy=False)) == "none"
    assert outputs.method_of(dict(robust="none", drop_noisy=True)) == "drop"
    assert outputs.method_of(dict(robust="adv", drop_noisy=True)) is None
    assert outputs.method_of({}) is None


@pytest.mark.parametrize(
    "flags", ["--ckpt a b", "--ckpt a --steps 10 20", "--ckpt a --spacing naive respaced"]
)
def test_sample_py_points_here(capsys, flags):
    assert call(sample, *flags.split()) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and "compare.py" in err[0]
