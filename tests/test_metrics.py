"""Metrics, in float64, against closed forms, SciPy and pytorch-fid."""

import math

import numpy as np
import pytest
import torch
from scipy import linalg, signal, stats
from torch import nn

import metrics
from losses import NoiseSchedule
from metrics import (
    Inception,
    extract,
    frechet_distance,
    inception_score,
    judged_faulty,
    moments,
    noise_level,
    noise_mad,
    psnr,
    reference_moments,
    to_uint8,
)


def spd(d, rank=None, seed=0):
    a = np.random.default_rng(seed).normal(size=(d, rank or 2 * d))
    return a @ a.T / a.shape[1]


def test_judged_faulty_errs_as_often_as_normal_theory_says():
    """Equal covariances, means D apart in their metric: a share Phi(-D / 2) of either kind falls on
    the wrong side."""
    rng, root, D = np.random.default_rng(0), linalg.cholesky(spd(5)), 2.5
    shift = D * root[0] / np.linalg.norm(linalg.solve_triangular(root, root[0], trans="T"))
    x = rng.normal(size=(60_000, 5)) @ root
    clean, faulty, mixed = (
        x[:20_000],
        x[20_000:40_000] + shift,
        x[40_000:] + np.outer(rng.random(20_000) < 0.3, shift),
    )
    wrong = stats.norm.cdf(-D / 2)
    assert judged_faulty(clean, faulty, mixed) == pytest.approx(
        [wrong, 1 - wrong, 0.3 + 0.4 * wrong], abs=0.012
    )
    assert judged_faulty(faulty, clean, clean)[2] == pytest.approx(1 - wrong, abs=0.012)


# Fréchet distance ---------------------------------------------------------------------------------


def test_fid_of_equal_covariances():
    """|mu1 - mu2|^2."""
    mu, c = np.array([3.0, 0, 4]), spd(3)
    assert frechet_distance(mu, c, 0 * mu, c) == pytest.approx(25, rel=1e-9)
    assert frechet_distance(0 * mu, c, mu, c) == pytest.approx(25, rel=1e-9)


def test_fid_of_commuting_covariances():
    """sum (sqrt(a_i) - sqrt(b_i))^2, in any common eigenbasis."""
    a, b = np.array([4.0, 9, 1, 0]), np.array([1.0, 1, 1, 4])
    Q = linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
    assert frechet_distance(np.zeros(4), Q * a @ Q.T, np.zeros(4), Q * b @ Q.T) == pytest.approx(
        1 + 4 + 0 + 4, rel=1e-6
    )


def test_fid_against_scipy():
    """tr (C1 C2)^1/2 by a Schur decomposition of the unsymmetric product."""
    for d in (2, 10, 60):
        c1, c2, mu = spd(d), spd(d, seed=1), np.linspace(0, 1, d)
        expected = (mu**2).sum() + np.trace(c1 + c2 - 2 * linalg.sqrtm(c1 @ c2).real)
        assert frechet_distance(mu, c1, 0 * mu, c2) == pytest.approx(expected, rel=1e-9)


def test_fid_against_pytorch_fid():
    fid_score = pytest.importorskip("pytorch_fid.fid_score")
    a, b = (np.random.default_rng(s).normal(size=(500, 40)) @ spd(40, seed=s) + s for s in (0, 1))
    try:
        expected = fid_score.calculate_frechet_distance(
            a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T)
        )
    except TypeError:
        pytest.skip("this pytorch-fid does not work with this SciPy")
    assert frechet_distance(*moments(a), *moments(b)) == pytest.approx(expected, rel=1e-7)


def test_fid_of_singular_covariances():
    """Fewer images than features. For two lines C = u u', tr (C1^1/2 C2 C1^1/2)^1/2 = |u1 . u2|."""
    x = np.random.default_rng(0).normal(size=(20, 100))
    assert 0 <= frechet_distance(*moments(x), *moments(x)) < 1e-6
    u1, u2 = np.array([3.0, 4, 0]), np.array([0.0, 2, 1])
    zero = np.zeros(3)
    assert frechet_distance(zero, np.outer(u1, u1), zero, np.outer(u2, u2)) == pytest.approx(
        25 + 5 - 2 * 8, abs=1e-6
    )
    assert frechet_distance(zero, np.outer(u1, u1), zero, np.zeros((3, 3))) == pytest.approx(25)


def test_fid_of_a_set_with_itself():
    x = np.random.default_rng(0).normal(size=(1000, 200)) @ spd(200)
    assert frechet_distance(*moments(x), *moments(x[::-1])) < 1e-6


def test_fid_refuses_nan_and_single_images():
    with pytest.raises(ValueError, match="cov2"):
        frechet_distance(np.zeros(2), np.eye(2), np.zeros(2), np.full((2, 2), np.nan))
    with pytest.raises(ValueError, match="1 image"):
        moments(np.zeros((1, 3)))


def test_moments_are_unbiased():
    mu, cov = moments(np.array([[0, 0], [2, 4]], dtype=np.float32))
    assert mu.tolist() == [1, 2] and cov.tolist() == [[2, 4], [4, 8]] and cov.dtype == np.float64


# Inception Score ----------------------------------------------------------------------------------


def test_inception_score_closed_forms():
    """Certain and evenly spread over n classes: n. The same prediction for all: 1."""
    certain = 30 * torch.eye(10, dtype=torch.float64).repeat(20, 1)
    assert inception_score(certain) == pytest.approx((10, 0), abs=1e-6)
    assert inception_score(torch.randn(1, 10).repeat(200, 1)) == pytest.approx((1, 0), abs=1e-6)
    # p(y|x) = (1 - q, q) or (q, 1 - q): the score is 2 exp(-H(q))
    q = 0.2
    logits = torch.tensor([[1 - q, q], [q, 1 - q]]).log().repeat(50, 1)
    assert inception_score(logits)[0] == pytest.approx(2 * (1 - q) ** (1 - q) * q**q, rel=1e-6)


def test_inception_score_of_splits():
    """Two classes in the first half, one in the second: 2 and 1, hence 1.5 +- 0.5; taken together
    another number."""
    logits = 30 * torch.eye(10)[[0, 1] * 10 + [2] * 20]
    assert inception_score(logits, splits=2) == pytest.approx((1.5, 0.5), abs=1e-6)
    entropy = 0.25 * math.log(4) * 2 + 0.5 * math.log(2)
    assert inception_score(logits, splits=1)[0] == pytest.approx(math.exp(entropy), rel=1e-6)


def test_inception_score_survives_zero_probabilities():
    """A class whose probability underflows everywhere contributes nothing."""
    assert inception_score(2000 * torch.eye(10)[[0, 1, 2] * 20], splits=1)[0] == pytest.approx(
        3, rel=1e-6
    )


# single images ------------------------------------------------------------------------------------


def test_psnr():
    """A constant difference d on a scale of peak 2: 20 log10(2 / d)."""
    x = torch.zeros(3, 3, 4, 4, dtype=torch.float64)
    d = torch.tensor([0.2, 2.0, 0.002], dtype=torch.float64)
    torch.testing.assert_close(
        psnr(x, x + d.view(3, 1, 1, 1)), torch.tensor([20.0, 0, 60], dtype=torch.float64)
    )
    half = x.clone()
    half[..., :2] = 0.2  # half of the pixels differ
    assert psnr(x, half)[0].item() == pytest.approx(20 + 10 * math.log10(2))
    assert psnr(x, x + 0.2, peak=1.0)[0].item() == pytest.approx(20 * math.log10(5))


def test_noise_level():
    """White noise gives its own sigma, planes give 0, and each image is judged by itself."""
    torch.manual_seed(0)
    z = torch.randn(8, 3, 64, 64, dtype=torch.float64)
    i, j = torch.meshgrid(
        torch.linspace(-1, 1, 64, dtype=torch.float64),
        torch.arange(64.0).double() / 64,
        indexing="ij",
    )
    plane = 0.5 * i - 0.3 * j + 0.1
    for sigma in (0.05, 0.2, 1.0):
        assert noise_level(plane + sigma * z).mean().item() == pytest.approx(sigma, rel=0.02)
    assert noise_level(plane.expand(2, 3, 64, 64)).max() < 1e-12
    mixed = torch.stack([0.1 * z[0], 0.3 * z[1]])
    assert noise_level(mixed).tolist() == pytest.approx([0.1, 0.3], rel=0.05)


def test_to_uint8():
    """Every 8-bit value survives; between them it rounds; beyond them it clips."""
    v = torch.arange(256).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(v / 127.5 - 1), v.to(torch.uint8))
    assert to_uint8(torch.tensor([-3.0, 3, 0.6 / 127.5 - 1, 1.4 / 127.5 - 1])).tolist() == [
        0,
        255,
        1,
        1,
    ]


# features -----------------------------------------------------------------------------------------


def mean_colour():
    """A network: uint8 images -> mean colour, one logit."""
    net = nn.Module()
    net.forward = lambda x: (x.float().mean((2, 3)), x.float().amax((1, 2, 3))[:, None])
    return net


def test_extract_sees_every_image_once():
    images = np.random.default_rng(0).integers(0, 256, (23, 4, 4, 3), dtype=np.uint8)
    for batch_size in (1, 7, 23, 100):
        features, logits = extract(mean_colour(), images, batch_size)
        np.testing.assert_allclose(features, images.mean((1, 2)), rtol=1e-6)
        np.testing.assert_allclose(logits[:, 0], images.max((1, 2, 3)))


def test_reference_moments_are_cached_by_network_and_pixels(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (23, 4, 4, 3), dtype=np.uint8)
    mu, cov = reference_moments(mean_colour(), "a", images, tmp_path)
    np.testing.assert_allclose(mu, images.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(cov, np.cov(images.mean((1, 2)).T), rtol=1e-5)

    unused = mean_colour()
    unused.forward = lambda x: 1 / 0
    again = reference_moments(unused, "a", images, tmp_path)
    assert np.array_equal(mu, again[0]) and np.array_equal(cov, again[1])

    changed = images.copy()
    changed[22, 3, 3, 2] ^= 1
    assert not np.array_equal(reference_moments(mean_colour(), "a", changed, tmp_path)[0], mu)
    with pytest.raises(ZeroDivisionError):
        reference_moments(unused, "b", images, tmp_path)
    assert (
        len([f for f in tmp_path.iterdir() if f.suffix == ".npz"])
        == len(list(tmp_path.iterdir()))
        == 2
    )


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory):
    """pytorch-fid's network with random weights in place of the download, and the file of its
    weights."""
    inception = pytest.importorskip("pytorch_fid.inception")
    torch.manual_seed(0)
    net = inception._inception_v3(num_classes=1008, aux_logits=False, weights=None)
    net.Mixed_5b = inception.FIDInceptionA(192, pool_features=32)
    net.Mixed_5c = inception.FIDInceptionA(256, pool_features=64)
    net.Mixed_5d = inception.FIDInceptionA(288, pool_features=64)
    net.Mixed_6b = inception.FIDInceptionC(768, channels_7x7=128)
    net.Mixed_6c = inception.FIDInceptionC(768, channels_7x7=160)
    net.Mixed_6d = inception.FIDInceptionC(768, channels_7x7=160)
    net.Mixed_6e = inception.FIDInceptionC(768, channels_7x7=192)
    net.Mixed_7b = inception.FIDInceptionE_1(1280)
    net.Mixed_7c = inception.FIDInceptionE_2(2048)
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight)  # keeps the signal alive through all layers
    path = tmp_path_factory.mktemp("inception") / "weights.pt"
    torch.save(net.state_dict(), path)
    return net.eval(), path


@pytest.fixture
def inception(monkeypatch):
    """pytorch-fid's module, put back as it was after the test."""
    module = pytest.importorskip("pytorch_fid.inception")
    for name in ("fid_inception_v3", "load_state_dict_from_url"):
        monkeypatch.setattr(module, name, getattr(module, name))
    return module


@torch.no_grad()
def test_inception_wiring(inception, random_inception, monkeypatch):
    """Features as in pytorch-fid, logits as in the whole network without the classifier's bias."""
    net, path = random_inception
    images = torch.randint(
        0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    features, logits = Inception(path)(images)
    assert features.shape == (2, 2048) and logits.shape == (2, 1008)
    assert (features[0] - features[1]).abs().max() > 1e-3 * features.std()

    monkeypatch.undo()
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *a, **k: net.state_dict())
    torch.testing.assert_close(
        features, inception.InceptionV3([3]).eval()(images / 255)[0].flatten(1)
    )
    resized = nn.functional.interpolate(
        images / 255, size=(299, 299), mode="bilinear", align_corners=False
    )
    torch.testing.assert_close(
        logits, net(2 * resized - 1) - net.fc.bias, rtol=1e-4, atol=1e-4 * logits.std().item()
    )


def test_inception_refuses_a_wrong_file(inception, random_inception, tmp_path):
    """Also after a right one: nothing of the first may stay behind in pytorch-fid's module."""
    torch.save(dict(weight=torch.zeros(3)), tmp_path / "wrong.pt")
    (tmp_path / "text.pt").write_text("not weights")
    for name in ("missing.pt", "wrong.pt", "text.pt"):
        with pytest.raises(ValueError, match="--inception-weights") as error:
            Inception(tmp_path / name)
        assert "\n" not in str(error.value) and str(tmp_path / name) in str(error.value)
    Inception(random_inception[1])
    with pytest.raises(ValueError):
        Inception(tmp_path / "wrong.pt")


# noise of single images, by the median ------------------------------------------------------------


def test_noise_mad():
    """White noise gives its own sigma, planes and half flat images give 0; each image is judged by
    itself."""
    z = torch.randn(8, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plane = torch.linspace(-1, 1, 64, dtype=torch.float64) * 0.5 + 0.1
    for sigma in (0.05, 0.2, 1.0):
        assert noise_mad(plane + sigma * z).mean().item() == pytest.approx(sigma, rel=0.02)
    assert noise_mad(plane.expand(2, 3, 64, 64)).max() < 1e-12
    assert noise_mad(torch.stack([0.1 * z[0], 0.3 * z[1]])).tolist() == pytest.approx(
        [0.1, 0.3], rel=0.05
    )
    z[..., :36] = 0.7
    assert noise_mad(z).max() < 1e-12 < 0.2 < noise_level(z).min()


def test_noise_mad_bears_wild_pixels():
    """One pixel in 100 is far off: 9 % of the responses, which move the mean absolute response by
    much more."""
    g = torch.Generator().manual_seed(0)
    x = 0.1 * torch.randn(8, 3, 64, 64, dtype=torch.float64, generator=g)
    x = torch.where(torch.rand(8, 1, 64, 64, generator=g) < 0.01, 3.0, x)
    assert noise_mad(x).mean().item() == pytest.approx(0.1, rel=0.15)
    assert noise_level(x).mean() > 0.15


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_noise_mad_against_scipy(layout):
    x = np.random.default_rng(0).normal(size=(4, 3, 7, 7)) ** 3
    mask = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]])
    responses = [
        np.stack([signal.convolve2d(channel, mask, mode="valid") for channel in image]).ravel()
        for image in x
    ]
    expected = [stats.median_abs_deviation(r, scale="normal") / 6 for r in responses]
    np.testing.assert_allclose(
        noise_mad(torch.from_numpy(x).contiguous(memory_format=layout)), expected, rtol=1e-12
    )


def test_diversity_against_definition():
    """Precision, recall, density and coverage by loops over all pairs."""
    g = np.random.default_rng(0)
    real, fake, k = g.normal(size=(40, 3)), g.normal(size=(30, 3)) * 0.6 + 0.3, 4

    def radii(a):
        return [sorted(np.linalg.norm(a - p, axis=1))[k] for p in a]

    def inside(points, centres, r):
        return np.array(
            [[np.linalg.norm(p - c) <= ri for c, ri in zip(centres, r)] for p in points]
        )

    fake_in_real, real_in_fake = inside(fake, real, radii(real)), inside(real, fake, radii(fake))
    expected = dict(
        precision=fake_in_real.any(1).mean(),
        recall=real_in_fake.any(1).mean(),
        density=fake_in_real.sum() / (k * len(fake)),
        coverage=fake_in_real.any(0).mean(),
    )
    assert metrics.diversity(real, fake, k) == pytest.approx(expected)
    assert len(set(expected.values())) == 4  # none could stand in for another


def test_diversity_sees_collapse():
    """Copies of one real image are precise but not varied; another sample of the same
    kind is both."""
    g = torch.Generator().manual_seed(0)
    real, other = torch.randn(2, 500, 4, generator=g)
    alike, collapsed = (
        metrics.diversity(real, other),
        metrics.diversity(real, real[:1] + 1e-3 * other),
    )
    assert (
        collapsed["precision"] == 1 and collapsed["recall"] < 0.05 and collapsed["coverage"] < 0.1
    )
    assert alike["recall"] > 0.8 and alike["coverage"] > 0.9 and abs(alike["density"] - 1) < 0.15
    with pytest.raises(ValueError, match="need more than"):
        metrics.diversity(real[:5], other)


def test_image_statistics():
    """A wave lies in its band with power 1/2; white noise has its variance in all bands; brightness
    is the mean's."""
    size = 32
    x = torch.arange(size) / size
    for band, cycles in ((1, 2), (2, 4), (3, 8), (4, 16)):
        wave = torch.cos(2 * np.pi * cycles * x).expand(2, 3, size, size)
        s = metrics.image_statistics(wave)
        power = [s[f"power_{i}"] for i in range(1, 5)]
        assert power[band - 1] == pytest.approx(1.0 if cycles == size / 2 else 0.5, rel=1e-4)
        assert sum(power) == pytest.approx(power[band - 1], rel=1e-4)
    noise = 0.3 * torch.randn(200, 3, size, size, generator=torch.Generator().manual_seed(0))
    level = torch.linspace(-1, 1, 200).view(-1, 1, 1, 1)
    s = metrics.image_statistics(noise + level)
    assert sum(s[f"power_{i}"] for i in range(1, 5)) == pytest.approx(0.09, rel=0.01)
    assert s["noise_level"] == pytest.approx(0.3, rel=0.01)
    assert s["brightness_std"] == pytest.approx(level.std().item(), rel=0.01)


@pytest.mark.parametrize("t", [100, 600, 900])
def test_brightness_gain_of_the_gaussian_minimiser(t):
    """eps* = s Sigma_t^-1 x_t with Sigma_t = abar Sigma + s^2: for data of bright and dark images,
    in float64."""
    schedule, numel = NoiseSchedule(), 3 * 4 * 4
    ones = torch.ones(numel, 1, dtype=torch.float64) / numel**0.5
    cov = 0.05 * torch.eye(numel, dtype=torch.float64) + 2.0 * ones @ ones.T
    abar = schedule.alphas_bar[t]
    k = (1 - abar).sqrt() * torch.linalg.inv(
        abar * cov + (1 - abar) * torch.eye(numel, dtype=torch.float64)
    )

    def model(x, steps):
        return (x.flatten(1) @ k).view(x.shape)

    x0 = (torch.randn(5, numel, dtype=torch.float64) @ torch.linalg.cholesky(cov).T).view(
        5, 3, 4, 4
    )
    gain = metrics.brightness_gain(model, schedule, x0, torch.randn_like(x0), t).item()
    assert gain == pytest.approx(metrics.gaussian_gain(schedule, t, 2.05), rel=1e-9)
    assert metrics.brightness_gain(
        lambda x, s: 0.3 * x, schedule, x0, x0, t
    ).item() == pytest.approx(0.3)


def test_nearest_distance():
    x = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    reference = torch.tensor([0.25, 3.0, 1.5]).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    assert metrics.nearest_distance(x, reference) == pytest.approx((0.25 + 0.5) / 2)


def test_clopper_pearson():
    for k, n in ((0, 10), (3, 10), (47, 64), (64, 64)):
        low, high = metrics.clopper_pearson(k, n)

        def tail(p, counts, n=n):
            return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in counts)

        assert low == 0 if k == 0 else tail(low, range(k, n + 1)) == pytest.approx(0.025, rel=1e-6)
        assert high == 1 if k == n else tail(high, range(k + 1)) == pytest.approx(0.025, rel=1e-6)


def test_rms_interval():
    """Against the normal law of the mean of squares, for n large; covers the true RMS in 95 % of
    samples of 60."""
    rng = np.random.default_rng(0)
    squares = rng.gamma(3.0, 0.5, size=20_000)  # mean 1.5, variance .75
    half = 1.96 * np.sqrt(0.75 / 20_000) / (2 * np.sqrt(1.5))
    ends = np.sqrt(squares.mean()) + np.array([-half, half])
    np.testing.assert_allclose(metrics.rms_interval(squares), ends, rtol=0, atol=0.15 * half)
    covered = 0
    for _ in range(200):
        low, high = metrics.rms_interval(rng.gamma(3.0, 0.5, size=60), resamples=300)
        covered += low < np.sqrt(1.5) < high
    assert 0.89 <= covered / 200 <= 0.99
    assert metrics.rms_interval([0.25]) == (0.5, 0.5)
    assert metrics.rms_interval(squares) == metrics.rms_interval(squares)


def test_mcnemar_against_the_binomial():
    """p = 2 P(X <= 2), X ~ B(10, 1/2): 8 gained, 2 lost."""
    rng = np.random.default_rng(0)
    both = np.array([[0] * 8 + [1] * 2 + [0] * 5 + [1] * 9, [1] * 8 + [0] * 7 + [1] * 9])
    first, second = both[:, rng.permutation(24)]
    found = metrics.mcnemar(second, first)
    assert found == dict(gained=8, lost=2, p=pytest.approx(2 * (1 + 10 + 45) / 1024))
    assert metrics.mcnemar(first, first) == dict(gained=0, lost=0, p=1.0)
