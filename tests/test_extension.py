"""CONTRIBUTING.md's promise: an objective, a sampler or a corruption is one function and
one row."""

import json

import torch
from cli import call

import sample
import samplers
import train
from data import CORRUPTIONS

SMALL = "--model tiny --image-size 8 --data synthetic:16 --batch-size 8 --device cpu --amp fp32"
SHORT = "--iters 2 --sample-every 0"


def toy_objective(model, schedule, args, x0, t, eps, **_):
    loss = (model(schedule.q_sample(x0, t, eps), t) - eps).abs().mean()
    return loss, dict(L_toy=loss.detach())


def toy_corruption(x0, data, index):
    return -data.sigma * x0


@torch.no_grad()
def toy_sampler(model, schedule, x_T, steps=3, shrink=0.5, clip=True, noise=None, compiled=False):
    if shrink > 1:
        raise ValueError(f"--shrink {shrink}: at most 1")
    x = x_T
    for i in range(steps):
        x = shrink * x + 0.01 * noise(i)
    return x.clamp(-1, 1) if clip else x


def test_an_objective_a_corruption_and_a_sampler_are_one_row_each(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(train.OBJECTIVES, "toy", (toy_objective, [], "mean absolute error"))
    monkeypatch.setitem(CORRUPTIONS, "toy", (toy_corruption, "share", "the negative"))
    row = toy_sampler, dict(steps=3, shrink=0.5), "shrinks"
    monkeypatch.setitem(samplers.SAMPLERS, "toy", row)

    flags = [*SMALL.split(), *SHORT.split(), "--out", tmp_path / "run"]
    toy = "--robust toy --corrupt toy --p 1 --sigma 0.5".split()
    assert call(train, *flags, *toy) == 0
    record = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert record["L_toy"] > 0 and record["args"]["corrupt"] == "toy"
    assert call(train, "--resume", "--iters", 3, "--device", "cpu", "--out", tmp_path / "run") == 0

    ckpt = ["--ckpt", tmp_path / "run", "--n", 4, "--device", "cpu", "--out", tmp_path / "s"]
    assert call(sample, *ckpt, "--sampler", "toy", "--shrink", 0.25, "--steps", 2) == 0
    record = json.loads((tmp_path / "s" / "metrics.json").read_text())
    assert record["sampler"] == "toy" and record["shrink"] == 0.25 and record["steps"] == 2
    capsys.readouterr()

    # what the tables refuse, they refuse for the new rows too
    assert call(train, *flags, "--overwrite", *toy[:-1], 2) == 2
    assert "--sigma 2.0: for --corrupt toy it is a share" in capsys.readouterr().err
    assert call(sample, *ckpt, "--shrink", 0.25) == 2
    assert "--shrink 0.25: is for --sampler toy" in capsys.readouterr().err
    assert call(sample, *ckpt, "--sampler", "toy", "--shrink", 2) == 2
    assert "--shrink 2.0: at most 1" in capsys.readouterr().err
