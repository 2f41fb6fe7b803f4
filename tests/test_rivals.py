"""rivals.py: its commands, and that every number stands in its own cell."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import rivals
from data import synthetic_butterflies


def arguments(tmp_path):
    return argparse.Namespace(
        size="toy",
        data="synthetic:300",
        test=None,
        data_root=f"{tmp_path}/data",
        inception_weights=None,
        seed=3,
        device="cpu",
        work=f"{tmp_path}/runs",
        out=f"{tmp_path}/results",
    )


def test_commands_are_those_of_the_table(tmp_path):
    todo = rivals.commands(arguments(tmp_path))
    assert len({str(done) for done, _ in todo}) == len(todo)
    trained = {done.parent.name: " ".join(argv) for done, argv in todo if argv[0] == "train.py"}
    assert len(trained) == 2 + len(rivals.METHODS) * sum(1 + more for *_, more in rivals.FAULTS) + 2
    assert "--drop-noisy --p 0.9 --sigma 0.2 --model" in trained["drop-0.9-0.2-seed1"]
    assert "--seed 4 " in trained["drop-0.9-0.2-seed1"] and "--seed 3 " in trained["drop-0.9-0.2"]
    assert "--robust adv --paper --p 0.3 --corrupt outliers --model" in trained["adv-0.3-outliers"]
    assert (
        "--robust huber --p 0.9 --sigma 0.05 --corrupt salt-pepper --model"
        in trained["huber-0.9-salt-pepper-0.05"]
    )
    assert (
        "--robust none --model" in trained["none-0"]
        and "--sigma-scale 0.8 --p 0.9" in trained["ambient-x0.8-0.9-0.2"]
    )
    sample = {
        done.parent.parent.name: " ".join(argv) for done, argv in todo if argv[0] == "sample.py"
    }
    assert (
        sample.keys() == trained.keys()
        and f"--ckpt {tmp_path}/runs/none-0-seed1/ckpt.pt" in sample["none-0-seed1"]
    )


class Roughness(torch.nn.Module):
    def forward(self, x):
        return (x.float() / 255).diff(dim=3).square().mean((2, 3)), x[:, 0, 0]


def test_every_number_stands_in_its_cell(tmp_path, monkeypatch):
    """Sample k of the list has distance k and a share (k % 19) / 20 of wild images, in all faults
    and seeds."""
    monkeypatch.setattr(rivals, "FAULTS", [(0.9, "gauss", 0.2, 0), (0.3, "outliers", 0, 1)])
    monkeypatch.setattr(rivals, "features_network", lambda *a: (Roughness(), "FID", ""))
    monkeypatch.setattr(rivals, "run_all", lambda *a: True)
    monkeypatch.setattr(
        "sys.argv",
        [
            "rivals.py",
            "toy",
            "--data",
            "synthetic:300",
            "--seed",
            "3",
            "--device",
            "cpu",
            "--data-root",
            f"{tmp_path}",
            "--work",
            f"{tmp_path}/runs",
            "--out",
            f"{tmp_path}/out",
        ],
    )
    todo = [done for done, argv in rivals.commands(arguments(tmp_path)) if argv[0] == "sample.py"]
    clean = synthetic_butterflies(20, 16)[0]
    wild = np.random.default_rng(0).integers(0, 256, clean.shape, dtype=np.uint8)
    expected = {}
    for k, done in enumerate(todo):
        name, n = done.parent.parent.name, k % 19
        expected[name] = f"{k:.2f} / 0.{k:02d}0 / {n / 20:.2f}"
        done.parent.mkdir(parents=True)
        np.savez(done.parent / "samples.npz", images=np.concatenate([wild[:n], clean[n:]]))
    for done, _ in rivals.commands(arguments(tmp_path)):
        k = todo.index(done) if done in todo else 0
        done.parent.mkdir(parents=True, exist_ok=True)
        done.write_text(json.dumps(dict(FID=k, noise_level=k / 100, n=20, steps=7, seed=0)))
    rivals.main()
    lines = [
        [cell.strip() for cell in line.split("|")]
        for line in (tmp_path / "out/table.md").read_text().splitlines()
    ]
    rows = {(line[1], line[2]): line[3:-1] for line in lines[4:7]}
    for seed, suffix in (("3", ""), ("4", "-seed1")):
        found, *cells = rows["outliers, p = 0.3", seed]
        assert found == "0.00, 1.00"
        assert cells == [
            expected[f"none-0{suffix}"],
            *(expected[f"{m}-0.3-outliers{suffix}"] for m in rivals.METHODS),
        ]
    cells = [cell.split(" / ")[:2] for cell in rows["gauss 0.2, p = 0.9", "3"][2:]]  # its own judge
    assert cells == [expected[f"{m}-0.9-0.2"].split(" / ")[:2] for m in rivals.METHODS]
    numbers = expected["ambient-x1.2-0.9-0.2"].rpartition(" / ")[0]
    assert "times 0.8: " in lines[-1][0] and f"1.2: {numbers}." in lines[-1][0]
    assert all(
        (tmp_path / "out" / name).exists() for name in ("rivals.png", "samples.png", "records.json")
    )


@pytest.mark.parametrize("size, own", [("toy", "runs/classifier/classifier.pt"), ("full", None)])
def test_who_judges(size, own, monkeypatch):
    """A classifier of its own where the list trains one, else Inception."""

    def network(features, inception_weights):
        raise LookupError(features)

    monkeypatch.setattr(rivals, "features_network", network)
    args = argparse.Namespace(size=size, inception_weights=None, work="runs", device="cpu")
    with pytest.raises(LookupError, match=str(own)):
        rivals.judge(None, args)


def test_bad_input(monkeypatch, tmp_path):
    for flags, message in (
        (["--data", "folder:x"], "--test"),
        (["--inception-weights", "x"], "no such file"),
    ):
        monkeypatch.setattr(
            "sys.argv", ["rivals.py", "toy", *flags, "--dry-run", "--out", str(tmp_path / "o")]
        )
        with pytest.raises(ValueError, match=message):
            rivals.main()
    assert not Path(tmp_path / "o").exists()
