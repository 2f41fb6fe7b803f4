"""classifier.py: it learns, its features serve the Fréchet distance, and FID(X, X) is 0 through the
whole command."""

import json
import sys

import numpy as np
import pytest
import torch

import classifier
import metrics
import runtime
import sample
from runtime import save_checkpoint
from unet import PRESETS, UNet


def run(script, *args):
    old, sys.argv = sys.argv, [f"{script.__name__}.py", *map(str, args)]
    try:
        runtime.cli(script.main)
    finally:
        sys.argv = old


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("classifier")
    run(
        classifier,
        "--data",
        "synthetic:400",
        "--image-size",
        16,
        "--model",
        "small",
        "--epochs",
        6,
        "--batch-size",
        32,
        "--device",
        "cpu",
        "--out",
        out,
        "--data-root",
        out,
    )
    return out


def test_it_learns_the_species(trained):
    assert json.loads((trained / "metrics.json").read_text())["test_accuracy"] > 0.5  # chance: 0.1


def test_known_sizes():
    assert (
        sum(p.numel() for p in classifier.WideResNet(28, 10, 10).parameters()) == 36_479_194
    )  # the published network


def test_random_crop_only_shifts():
    x = torch.arange(16.0 * 16).view(1, 1, 16, 16).expand(64, 3, 16, 16)
    y = classifier.random_crop(x, torch.Generator().manual_seed(0))
    steps = y[:, 0, 5:11, 6:11] - y[:, 0, 5:11, 5:10]  # inside, neighbours stay neighbours
    assert torch.equal(steps, torch.ones_like(steps))
    assert len({image[0, 8, 8].item() for image in y}) > 20  # and every image has its own shift


def test_frechet_distance_of_samples_in_its_features(trained, tmp_path):
    """The training images against themselves give 0; samples of an untrained network do not."""
    torch.manual_seed(0)
    net = UNet(**PRESETS["tiny"])
    save_checkpoint(
        tmp_path / "ckpt.pt",
        dict(
            kind="unet",
            config=net.config,
            image_size=16,
            model=net.state_dict(),
            ema=net.state_dict(),
            args=dict(data="synthetic:400"),
        ),
    )
    run(
        sample,
        "--ckpt",
        tmp_path / "ckpt.pt",
        "--n",
        40,
        "--steps",
        2,
        "--fid",
        "--features",
        trained / "classifier.pt",
        "--device",
        "cpu",
        "--out",
        tmp_path / "sample",
        "--data-root",
        tmp_path,
        "--no-png",
    )
    record = json.loads((tmp_path / "sample" / "metrics.json").read_text())
    assert record["Fréchet distance in classifier.pt features"] > 1 and record["n_reference"] == 400
    assert "FID" not in record  # it is not one

    from data import synthetic_butterflies

    images, _ = synthetic_butterflies(400, 16)
    features, logits = metrics.extract(classifier.load_features(trained / "classifier.pt"), images)
    assert features.shape == (400, 128) and logits.shape == (400, 10)
    assert metrics.frechet_distance(*metrics.moments(features), *metrics.moments(features)) < 1e-6


@pytest.mark.parametrize(
    "args, message", [(("--data", "folder:x"), "--test"), (("--epochs", 0), "--epochs 0")]
)
def test_bad_input_is_one_line(capsys, tmp_path, args, message):
    with pytest.raises(SystemExit) as e:
        run(classifier, "--out", tmp_path, "--device", "cpu", *args)
    err = capsys.readouterr().err.strip()
    assert e.value.code == 2 and message in err and "\n" not in err


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    save_checkpoint(tmp_path / "x.pt", dict(kind="unet"))
    with pytest.raises(ValueError, match="holds no classifier"):
        classifier.load_features(tmp_path / "x.pt")
    np.save(tmp_path / "y.npy", np.zeros(3))
    with pytest.raises(ValueError):
        classifier.load_features(tmp_path / "y.npy")
