"""The closed forms behind butterflies_pca.py, and a very small run of it."""

import sys

import numpy as np
import pytest
import torch

import butterflies_pca
import metrics
import runtime
from butterflies_pca import fit_subspace, project, subspace_error


@pytest.fixture
def subspace():
    """A random 5-dimensional subspace of R^48 through mu, as float64 tensors."""
    g = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(48, 5, generator=g, dtype=torch.float64))[0].T
    return torch.randn(48, generator=g, dtype=torch.float64), U, g


def test_rho_of_a_point_of_the_subspace_is_0_and_its_psnr_infinite(subspace):
    mu, U, g = subspace
    coefficients = torch.randn(7, 5, generator=g, dtype=torch.float64)
    x = mu + coefficients @ U
    assert subspace_error(x, mu, U).max() < 1e-12
    on = mu.repeat(3, 1)  # mu itself is projected without rounding
    assert metrics.psnr(on, project(on, mu, U)).isinf().all()
    assert metrics.psnr(x, project(x, mu, U)).min() > 280  # rounding alone


def test_rho_of_a_known_offset_is_its_norm(subspace):
    mu, U, g = subspace
    offset = torch.randn(7, 48, generator=g, dtype=torch.float64)
    offset = offset - offset @ U.T @ U  # orthogonal to the subspace
    x = mu + torch.randn(7, 5, generator=g, dtype=torch.float64) @ U + offset
    assert torch.allclose(subspace_error(x, mu, U), offset.norm(dim=1), rtol=1e-12)
    expected = 10 * torch.log10(4 * 48 / offset.square().sum(1))  # peak 2 on the [-1, 1] scale
    assert torch.allclose(metrics.psnr(x, project(x, mu, U)), expected, rtol=1e-12)


def test_white_noise_leaves_the_expected_share_outside(subspace):
    """E rho^2 = (D - k) sigma^2: what a model that learns the noise must show."""
    mu, U, g = subspace
    x = mu + 0.1 * torch.randn(20_000, 48, generator=g, dtype=torch.float64)
    assert abs(subspace_error(x, mu, U).square().mean().item() / (43 * 0.01) - 1) < 0.01


def test_pca_recovers_a_known_subspace_and_its_scales(subspace):
    mu, U, g = subspace
    scales = torch.tensor([5.0, 4, 3, 2, 1], dtype=torch.float64)
    x = mu + torch.randn(20_000, 5, generator=g, dtype=torch.float64) * scales @ U
    mu_hat, scales_hat, U_hat, kept = fit_subspace(x.numpy(), 5)
    assert kept == pytest.approx(1, abs=1e-12)
    assert np.abs(U_hat @ U_hat.T - np.eye(5)).max() < 1e-12
    assert np.abs(U_hat.T @ U_hat - (U.T @ U).numpy()).max() < 1e-10
    assert np.abs(scales_hat / scales.numpy() - 1).max() < 0.02
    assert np.abs(mu_hat - mu.numpy()).max() < 0.2
    assert 0 < fit_subspace(x.numpy(), 2)[3] < 0.8  # (25 + 16) / 55
    with pytest.raises(ValueError, match="need 1 .. 12"):  # more images than values of one
        fit_subspace(np.random.default_rng(0).normal(size=(30, 12)), 13)


def test_rows_are_images_in_the_order_the_network_sees():
    from argparse import Namespace

    from data import synthetic_butterflies

    rows = butterflies_pca.load(Namespace(data="synthetic:9", image_size=16, data_root="unused"))
    images = rows.reshape(-1, 3, 16, 16)
    known = {x.tobytes() for x in synthetic_butterflies(9, 16)[0]}
    assert {
        np.round((x.transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8).tobytes() for x in images
    } == known


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["butterflies_pca.py", *map(str, args)])
    runtime.cli(butterflies_pca.main)


def test_a_small_run_leaves_its_files(monkeypatch, tmp_path):
    run(
        monkeypatch,
        "--data",
        "synthetic:60",
        "--image-size",
        8,
        "--iters",
        4,
        "--eval-every",
        2,
        "--n-eval",
        16,
        "--device",
        "cpu",
        "--sample-steps",
        3,
        "--n-train",
        50,
        "--channels",
        32,
        "--patch",
        2,
        "--out",
        tmp_path,
    )
    assert {"samples.npz", "rows.png", "curves.png", "metrics.json"} <= {
        f.name for f in tmp_path.iterdir()
    }
    with np.load(tmp_path / "samples.npz") as f:
        wanted = {"mu", "U", *(f"clean/{m}" for m in ("none", "ran", "adv"))}
        wanted |= {f"noisy/{m}" for m in butterflies_pca.METHODS}
        assert set(f.files) == wanted
        assert (
            f["noisy/adv"].shape == (16, 192)
            and f["mu"].shape == (192,)
            and f["U"].shape == (25, 192)
        )
        assert np.abs(f["noisy/adv"]).max() < 3


def test_regulariser_in_the_last_steps_on_a_share(monkeypatch, tmp_path):
    shares, real = [], butterflies_pca.robust_loss
    monkeypatch.setattr(
        butterflies_pca,
        "robust_loss",
        lambda *a, share: shares.append(share) or real(*a, share=share),
    )
    run(
        monkeypatch,
        "--data",
        "synthetic:60",
        "--image-size",
        8,
        "--iters",
        10,
        "--eval-every",
        10,
        "--n-eval",
        2,
        "--device",
        "cpu",
        "--sample-steps",
        2,
        "--n-train",
        50,
        "--channels",
        32,
        "--patch",
        2,
        "--out",
        tmp_path,
        "--methods",
        "none",
        "adv",
        "--conditions",
        "noisy",
        "--reg-last",
        0.3,
        "--reg-share",
        0.25,
    )
    assert shares == [0.25] * 3


@pytest.mark.parametrize(
    "args, message",
    [
        (("--p", 2), "--p 2"),
        (("--channels", 20), "--channels"),
        (("--iters", 0), "--iters"),
        (("--data", "folder:/nowhere"), "no such folder"),
        (("--data", "synthetic:20"), "--components 25"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, tmp_path, args, message):
    with pytest.raises(SystemExit) as e:
        run(monkeypatch, "--out", tmp_path, "--device", "cpu", *args)
    err = capsys.readouterr().err.strip()
    assert e.value.code == 2 and message in err and "\n" not in err
