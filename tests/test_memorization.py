"""memorization.py: planted copies are found and ranked, the search is exact, the null and the
counts are right."""

import argparse
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.distance import cdist
from scipy.stats import beta
from torchvision.transforms.v2 import functional as vision

import classifier
import features
import memorization
import metrics
import runtime
from memorization import NULL, counts, nearest
from runtime import save_checkpoint
from unet import PRESETS, UNet

HUB = """import torch
dependencies = ["torch"]
def dinov2_vitb14(pretrained=True):
    if pretrained:
        raise RuntimeError("no internet")
    layers = torch.nn.Conv2d(3, 8, 14, 14), torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten()
    return torch.nn.Sequential(*layers)
"""


def unit(n, d, seed):
    return torch.nn.functional.normalize(
        torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """train/ and test/ of 40 and 10 random images; copies.npz: an exact, a mirrored and a noised
    copy of training images 5, 6, 7, then three new images; a stand-in for DINOv2; untrained
    checkpoints."""
    root, rng = tmp_path_factory.mktemp("memorization"), np.random.default_rng(0)
    images = rng.integers(0, 256, (53, 8, 8, 3), dtype=np.uint8)
    for i, image in enumerate(images[:50]):
        folder = root / ("train" if i < 40 else "test")
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    noised = (images[7] + rng.normal(0, 20, (8, 8, 3))).clip(0, 255).astype(np.uint8)
    np.savez(
        root / "copies.npz", images=np.stack([images[5], images[6][:, ::-1], noised, *images[50:]])
    )
    np.savez(root / "other.npz", x=images)
    (root / "empty").mkdir()
    (root / "hub").mkdir()
    (root / "hub" / "hubconf.py").write_text(HUB)
    torch.manual_seed(0)
    namespace = {}
    exec(HUB, namespace)
    state = namespace["dinov2_vitb14"](pretrained=False).state_dict()
    torch.save(state, root / "dino.pth")
    torch.save({k: v * torch.nan for k, v in state.items()}, root / "nan.pth")
    torch.save({"0.bias": state["0.bias"]}, root / "part.pth")
    net, wrn = UNet(**PRESETS["tiny"]), classifier.WideResNet(10, 1, 10)
    save_checkpoint(
        root / "ckpt.pt",
        dict(
            kind="unet",
            config=net.config,
            image_size=8,
            model=net.state_dict(),
            ema=net.state_dict(),
            args={},
        ),
    )
    save_checkpoint(
        root / "classifier.pt", dict(kind="classifier", config=wrn.config, model=wrn.state_dict())
    )
    return root


@pytest.fixture
def run(root, tmp_path, monkeypatch):
    """Runs the script in `root` -> metrics.json, nearest.npz."""

    def run(args, sets="--data folder:train --test folder:test"):
        monkeypatch.chdir(root)
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "memorization.py",
                "--device",
                "cpu",
                "--out",
                str(tmp_path),
                *sets.split(),
                *args.split(),
            ],
        )
        runtime.cli(memorization.main)
        found = dict(np.load(tmp_path / "nearest.npz"))
        return json.loads((tmp_path / "metrics.json").read_text()), found

    return run


# the search ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [(1, 1), (7, 5), (70, 89), (1000, 1000)])
def test_nearest_against_scipy_whatever_the_chunks(chunks):
    queries, keys = unit(70, 768, 0), unit(90, 768, 1)
    keys[40], keys[89], queries[:20] = (
        keys[3],
        keys[3],
        keys[3] + 0.1 * queries[:20],
    )  # ties: the lowest index wins
    queries = torch.nn.functional.normalize(queries)
    expected = 1 - cdist(queries.double(), keys.double(), "cosine")
    similarity, index = nearest(queries, keys, *chunks)
    assert (index[:20] == 3).all() and np.array_equal(index[20:], expected[20:].argmax(1))
    np.testing.assert_allclose(similarity, expected.max(1), rtol=0, atol=3e-7)  # float32 features
    whole = nearest(queries, keys)
    assert torch.equal(similarity, whole[0]) and torch.equal(index, whole[1])


def test_counts_and_intervals():
    """Clopper and Pearson's limits are quantiles of beta distributions."""
    rows = counts(
        torch.tensor([0.5] * 90 + [0.9] * 4 + [0.96] * 6, dtype=torch.float64), [0.9, 0.95, 0.99]
    )
    assert [row["count"] for row in rows] == [10, 6, 0] and rows[1][
        "share"
    ] == 0.06  # at the threshold counts
    assert rows[1]["low"] == pytest.approx(beta.ppf(0.025, 6, 95)) and rows[1][
        "high"
    ] == pytest.approx(beta.ppf(0.975, 7, 94))
    assert rows[2]["low"] == 0 and rows[2]["high"] == pytest.approx(1 - 0.025**0.01)


# the whole command --------------------------------------------------------------------------------


def test_planted_copies_are_found_and_ranked(run, root, tmp_path):
    record, found = run("--samples copies.npz --features pixels --thresholds 0.9 0.999")
    s, index, mirrored = (found[f"copies/{k}"] for k in ("similarity", "index", "mirrored"))
    assert list(index[:3]) == [5, 6, 7] and list(mirrored[:3]) == [False, True, False]
    assert s[:2] == pytest.approx([1, 1], abs=1e-6) and 0.999 > s[2] > 0.9 > 0.6 > s[3:].max()
    assert [row["count"] for row in record["results"]["copies"]["counts"]] == [3, 2]
    assert (
        len(found[f"{NULL}/similarity"]) == 10
        and record["results"][NULL]["counts"][0]["count"] == 0
    )
    table = (tmp_path / "table.csv").read_text().splitlines()
    assert table[1].startswith("copies,6,0.9,3,0.5,") and len(table) == 5
    for name in ("histogram.png", "pairs.png"):
        assert np.asarray(Image.open(tmp_path / name)).std() > 10

    unsearched = "--data folder:train --data-root ."
    _, found = run("--samples copies.npz --features pixels --no-flips --no-null", unsearched)
    assert found["copies/similarity"][1] < 0.6 and found["copies/similarity"][0] == pytest.approx(
        1, abs=1e-6
    )
    assert f"{NULL}/similarity" not in found


def test_pixels_are_centred(root):
    """Also by the mean of the mirror images, when those are searched: a mirrored pair is as similar
    as the pair."""
    x = np.random.default_rng(1).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    f = {flips: metrics.extract(features.Pixels(x, flips), x)[0] for flips in (True, False)}
    np.testing.assert_allclose(
        f[False], (x / 255 - (x / 255).mean(0)).transpose(0, 3, 1, 2).reshape(5, -1), atol=1e-6
    )
    mirrored = metrics.extract(features.Pixels(x, True), x[:, :, ::-1])[0]
    np.testing.assert_allclose(mirrored @ mirrored.T, f[True] @ f[True].T, atol=1e-4)


def test_folders_and_checkpoints_in_classifier_features(run):
    """Training images as a folder are copies; a sampled checkpoint stands beside them; all go
    through one network."""
    record, found = run(
        "--samples train ckpt.pt --names a b --n 3 --steps 2 --sampler ddim "
        "--features classifier.pt"
    )
    assert found["a/similarity"] == pytest.approx([1] * 3, abs=1e-6) and list(found["a/index"]) == [
        0,
        1,
        2,
    ]
    assert len(found["b/similarity"]) == 3 and "classifier.pt" in record["features"]


def test_an_interrupted_sample_is_not_searched(root, monkeypatch):
    monkeypatch.setattr(memorization, "sample_uint8", lambda model, size, n, *_: np.zeros((n - 1,)))
    args = argparse.Namespace(n=3, raw=False, compile=False, image_size=None, amp="fp32")
    _, _, images = memorization.open_samples(root / "ckpt.pt", args, {}, torch.device("cpu"))
    with pytest.raises(KeyboardInterrupt):
        images()


def test_dinov2_from_a_local_clone(run, root, monkeypatch):
    """Against torchvision's resize and normalise; the second run takes all but the samples'
    features from the cache."""
    calls, extract = [], metrics.extract
    monkeypatch.setattr(metrics, "extract", lambda *args: calls.append(args[-1]) or extract(*args))
    flags = "--samples copies.npz --dino-hub hub --dino-weights dino.pth --data-root dino_data"
    _, found = run(flags)
    assert (
        list(found["copies/index"][:3]) == [5, 6, 7]
        and found["copies/mirrored"][1]
        and len(calls) == 4
    )
    _, again = run(flags)
    assert len(calls) == 5 and all(np.array_equal(found[k], again[k]) for k in found)

    network = features.DINOv2(str(root / "hub"), root / "dino.pth")
    x = torch.from_numpy(np.load(root / "copies.npz")["images"]).permute(0, 3, 1, 2)
    y = vision.resize(x / 255, [224, 224], vision.InterpolationMode.BICUBIC, antialias=True).clip(
        0, 1
    )
    y = vision.normalize(y, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    state = torch.load(root / "dino.pth")
    y = torch.nn.functional.conv2d(y, state["0.weight"], state["0.bias"], stride=14)
    torch.testing.assert_close(
        network(x)[0], torch.nn.functional.adaptive_avg_pool2d(y, 4).flatten(1).detach()
    )


@pytest.mark.parametrize(
    "args, sets, message",
    [
        ("--samples missing.npz", None, "--samples missing.npz: no such"),
        ("--samples other.npz", None, "no .npz with images"),
        ("--samples hub/hubconf.py", None, "hubconf.py: no .npz"),
        ("--samples empty", None, "--samples"),
        ("--samples classifier.pt", None, "holds no UNet"),
        ("--samples copies.npz --features ckpt.pt", None, "holds no classifier"),
        (
            "--samples copies.npz",
            "--data folder:train --test folder:test --image-size 16",
            "give --image-size 8",
        ),
        (
            "--samples train",  # images of a folder are compared as they are
            "--data folder:train --test folder:test --image-size 16",
            "give --image-size 8",
        ),
        ("--samples copies.npz", "--data folder:train", "--test"),
        ("--samples copies.npz", "--data folder:train --test folder:train", "--test"),
        ("--samples copies.npz", "", "--data"),
        ("--samples copies.npz copies.npz", None, "--names"),
        ("--samples copies.npz --n 0", None, "--n 0"),
        ("--samples copies.npz --dino-hub hub", None, "--dino-weights PATH"),
        ("--samples copies.npz --dino-hub hub --dino-weights part.pth", None, "lacks 0.weight"),
        (
            "--samples copies.npz --dino-hub hub --dino-weights nan.pth",
            None,
            "40 of 40 images have NaN",
        ),
    ],
)
def test_bad_input_is_one_line(run, capsys, args, sets, message):
    with pytest.raises(SystemExit) as e:
        run(args, *([] if sets is None else [sets]))
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert e.value.code == 2 and message in err and err.startswith("memorization.py: ")
