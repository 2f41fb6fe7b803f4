"""What the samples are worth: FID, Inception Score, PSNR, diversity, the noise left in an image.

Fréchet distances are computed from means and covariances in float64 with eigenvalues alone, so that
they survive near-singular covariances and any SciPy version; FID(X, X) is 0 up to rounding.
"""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import beta, binomtest
from tqdm import tqdm

from losses import NoiseSchedule
from outputs import read_cache, reason, write_cache
from rng import seed_at

# --------------------------------------------------------------------------------------------------
# distances between sets of features


def frechet_distance(mu1, cov1, mu2, cov2):
    """|mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2) for float64 arrays (d,), (d, d) ->
    float (Heusel et al., 2017).

    Only symmetric eigenproblems: exact zeros and slightly negative eigenvalues are clipped, nothing
    can turn complex.
    """
    for name, a in (("mu1", mu1), ("cov1", cov1), ("mu2", mu2), ("cov2", cov2)):
        if not np.isfinite(a).all():
            raise ValueError(f"frechet_distance: {name} holds NaN or infinity")
    w, v = np.linalg.eigh(cov1)
    root = (v * np.sqrt(np.clip(w, 0, None))) @ v.T
    cross = root @ cov2 @ root
    cross = np.sqrt(np.clip(np.linalg.eigvalsh((cross + cross.T) / 2), 0, None)).sum()
    return float(max(((mu1 - mu2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross, 0.0))


def moments(features):
    """features (n, d) -> mean (d,), covariance (d, d), float64."""
    features = np.asarray(features, dtype=np.float64)
    if len(features) < 2:
        raise ValueError(f"{len(features)} image(s): a covariance needs at least 2")
    return features.mean(0), np.cov(features, rowvar=False)


def inception_score(logits, splits=10):
    """exp E KL(p(y|x) || p(y)) over `splits` parts -> mean, std (Salimans et al., 2016); logits (n,
    classes).
    """
    p = torch.as_tensor(logits).double().log_softmax(1)
    scores = []
    for q in p.chunk(splits):  # xlogy(0, 0) = 0: a class that never occurs adds nothing
        marginal = q.exp().mean(0)
        terms = q.exp() * q.clamp_min(-1e4) - torch.xlogy(q.exp(), marginal)
        scores.append(terms.sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def clopper_pearson(k, n, level=0.95):
    """Exact confidence interval of a share k / n; k need not be whole -> (low, high)."""
    a = (1 - level) / 2
    low = beta.ppf(a, k, n - k + 1) if k > 0 else 0.0
    high = beta.ppf(1 - a, k + 1, n - k) if k < n else 1.0
    return float(low), float(high)


def mcnemar(right, first):
    """Two classifiers on the same images, arrays (n,) of 0 and 1: how many the one alone gets right
    (gained), how many the first alone (lost), p of McNemar's exact test that both are as likely."""
    gained = int(((right == 1) & (first == 0)).sum())
    lost = int(((right == 0) & (first == 1)).sum())
    p = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    return dict(gained=gained, lost=lost, p=p)


def rms_interval(squares, level=0.95, resamples=1000):
    """Bootstrap interval of sqrt(mean(squares)) over images, squares (n,) >= 0 -> (low, high).

    Percentiles (Efron & Tibshirani, 1993, ch. 13) with draws of their own, the same at every call.
    """
    squares = np.asarray(squares, np.float64)
    rng = np.random.default_rng(0)
    n = len(squares)
    drawn = [squares[rng.integers(n, size=n)].mean() for _ in range(resamples)]
    low, high = np.quantile(np.sqrt(drawn), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def judged_faulty(clean, faulty, *samples):
    """Fisher's linear discriminant between features (n, d) of clean and of faulty images, cut
    halfway between their means.

    -> share judged faulty of: held-out clean images, held-out faulty images, each of `samples`.
    Fitted on the even rows of clean and faulty, held out are the odd ones. What it says of samples
    is worth no more than those two shares (ours).
    """
    (mu0, cov0), (mu1, cov1) = moments(clean[::2]), moments(faulty[::2])
    within = (cov0 + cov1) / 2
    w = np.linalg.solve(
        within + 1e-6 * np.trace(within) / len(within) * np.eye(len(within)), mu1 - mu0
    )
    return [
        float((np.asarray(f, np.float64) @ w > (mu0 + mu1) @ w / 2).mean())
        for f in (clean[1::2], faulty[1::2], *samples)
    ]


def diversity(real, fake, k=5):
    """Precision, recall (Kynkäänniemi et al., 2019), density and coverage (Naeem et al., 2020) of
    features (n, d) -> dict.

    With the ball of a point reaching to its k-th neighbour in its own set: precision is the share
    of fake points in a real ball, recall of real points in a fake ball; density counts the real
    balls around a fake point, over k; coverage is the share of real balls that hold a fake point.
    Recall and coverage fall where variety is lost; all depend on both n.
    """
    real = torch.as_tensor(real, dtype=torch.float32)
    fake = torch.as_tensor(fake, dtype=torch.float32)
    if min(len(real), len(fake)) <= k:
        raise ValueError(
            f"diversity: {len(real)} and {len(fake)} images, need more than k = {k} of each"
        )
    radius_real = (
        torch.cdist(real, real).kthvalue(k + 1, dim=1).values
    )  # the nearest neighbour is the point itself
    radius_fake = torch.cdist(fake, fake).kthvalue(k + 1, dim=1).values
    distance = torch.cdist(real, fake)
    in_real = distance <= radius_real[:, None]
    return dict(
        precision=in_real.any(0).double().mean().item(),
        recall=(distance <= radius_fake).any(1).double().mean().item(),
        density=in_real.double().sum(0).mean().item() / k,
        coverage=in_real.any(1).double().mean().item(),
    )


# --------------------------------------------------------------------------------------------------
# single images


def image_statistics(x):
    """What a set of images x (n, C, S, S) in [-1, 1] looks like to no network -> dict of floats.

    noise_level: the mean of `noise_level`; brightness_std: standard deviation, over the set, of an
    image's mean; power_1 .. power_4: power per pixel in four bands of spatial frequency, up to 1/8,
    1/4, 1/2, 1 of the highest along an axis (and beyond), without each image's mean.
    """
    waves = torch.fft.fft2(x - x.mean((2, 3), keepdim=True), norm="forward")
    spectrum = waves.abs().square().mean((0, 1))
    # 1 is the highest along an axis
    frequency = torch.fft.fftfreq(x.shape[-1], device=x.device).abs() * 2
    radius = (frequency[:, None].square() + frequency.square()).sqrt()
    edges = [0.0, 1 / 8, 1 / 4, 1 / 2, 2.0]
    power = {
        f"power_{i}": spectrum[(radius > low) & (radius <= high)].sum().item()
        for i, (low, high) in enumerate(zip(edges, edges[1:]), 1)
    }
    return dict(
        noise_level=noise_level(x).mean().item(),
        brightness_std=x.flatten(1).mean(1).std().item() if len(x) > 1 else 0.0,
        **power,
    )


def psnr(x, y, peak=2.0):
    """Peak signal-to-noise ratio in dB over all but the first axis -> (B,); peak 2 for the [-1, 1]
    scale.
    """
    mse = (x - y).flatten(1).square().mean(1)
    return 10 * torch.log10(peak**2 / mse)


def noise_level(x):
    """Standard deviation of white noise, estimated from each image itself: x (B, C, H, W) -> (B,),
    in x's units.

    Immerkær (1996): a mask that annihilates planes, mean absolute response times sqrt(pi / 2) / 6.
    Fine texture counts as noise: clean photographs do not give 0, so quote the estimate for clean
    data beside it.
    """
    return _mask_response(x).abs().mean(1) * (np.pi / 2) ** 0.5 / 6


def noise_mad(x):
    """As `noise_level`, by the median absolute deviation / 0.6745, which edges and rare wild pixels
    hardly move.

    Texture adds to sigma: clean CIFAR-10 gives 0.02 at 32x32 and 0.05 at 16x16 (99 % of the images
    below 0.06 and 0.10), sigma = 0.02 reads 0.034 and 0.054, 0.1 reads 0.107 and 0.117, 0.4 reads
    0.402 and 0.406. It reads too low where noise was clipped (0.2 cut to uint8: 0.16 on white
    butterflies) or smoothed (JPEG at quality 75: 0.13 on CIFAR-10), gives 0 where over half of the
    image is flat, sees no blur, patch or foreign image, and sees salt and pepper from about 7 % of
    the pixels on, where the mask's 9 pixels make it touch half of the responses.
    """
    r = _mask_response(x)
    return (r - r.median(1, keepdim=True).values).abs().median(1).values / 0.6744897501960817 / 6


def estimate_noise(data, above):
    """noise_mad of every image of a data.CorruptedImages as it is -> (N,) float32, 0 where it is <=
    above.
    """
    sigma = torch.empty(len(data), device=data.device)
    parts = torch.arange(len(data), device=data.device).split(500)
    for index in tqdm(parts, "estimate the noise", leave=False, disable=len(parts) == 1):
        sigma[index] = noise_mad(data.batch(index))
    return torch.where(sigma > above, sigma, 0)


def _mask_response(x):
    """x (B, C, H, W) -> (B, C (H-2) (W-2)); white noise of standard deviation sigma gives 6 sigma,
    a plane 0.
    """
    mask = torch.tensor([[1.0, -2, 1], [-2, 4, -2], [1, -2, 1]], device=x.device, dtype=x.dtype)
    return F.conv2d(x.flatten(0, 1)[:, None], mask[None, None]).view(len(x), -1)


def nearest_distance(x, reference):
    """Root mean square per pixel between an image and its nearest in `reference`, averaged over x
    (n, C, S, S) -> float.

    Of clean images, it says how far samples are from any: noise and grey mush are far, whatever
    their noise level.
    """
    gaps = torch.cdist(x.flatten(1), reference.flatten(1)).amin(1)
    return (gaps / x[0].numel() ** 0.5).mean().item()


# --------------------------------------------------------------------------------------------------
# networks


@torch.no_grad()
def brightness_gain(model, schedule, x0, eps, t, shift=0.1):
    """How the mean of eps_theta answers a shift of the whole of x_t, averaged over x0 (B, C, S, S)
    at step t -> 0-dim tensor.

    Beside `gaussian_gain` it tells whether a network has learned the global content: with 0 it
    ignores brightness.
    """
    steps = torch.full((len(x0),), t, device=x0.device)
    x_t = schedule.q_sample(x0, steps, eps)
    up = model(x_t + shift, steps).to(x0.dtype)
    down = model(x_t - shift, steps).to(x0.dtype)
    return (up - down).mean() / (2 * shift)


def gaussian_gain(schedule, t, variance):
    """The gain of DDPM's minimiser for Gaussian data along a unit direction of this variance: k = s
    / (abar v + s^2).

    The direction of brightness is 1 / sqrt(numel) everywhere: v = numel times the variance of an
    image's mean.
    """
    abar = schedule.alphas_bar[t].item()
    return (1 - abar) ** 0.5 / (abar * variance + 1 - abar)


PROBED = (100, 300, 600, 900)  # t


def probe(data, seed):
    """A fixed batch for `diagnose`: dict(x0, eps, t), t over all steps, and the Gaussian gains."""
    x0 = data.batch(torch.arange(min(64, len(data)), device=data.device))
    generator = torch.Generator().manual_seed(seed_at(seed, 0, stream=5))
    eps = torch.randn(x0.shape, generator=generator).to(x0.device)
    many = data.batch(torch.arange(min(1000, len(data)), device=data.device))
    variance = many[0].numel() * many.mean((1, 2, 3)).var().item()
    schedule = NoiseSchedule()
    gains = {f"gauss_{t}": gaussian_gain(schedule, t, variance) for t in PROBED}
    t = torch.arange(len(x0), device=x0.device) * schedule.T // len(x0)
    return dict(x0=x0, eps=eps, t=t), gains


@torch.no_grad()
def diagnose(state, batch, gains):
    """Of the averaged weights: L_DM by quarter of t, and the gain of eps to brightness at a few t.

    gauss_t is the gain of the minimiser for Gaussian data; far below it, global content is missing.
    """
    x0, eps, t = batch["x0"], batch["eps"], batch["t"]
    with state.cast:
        answer = state.ema(state.schedule.q_sample(x0, t, eps), t)
        found = {
            f"gain_{k}": brightness_gain(state.ema, state.schedule, x0, eps, k).item()
            for k in PROBED
        }
    loss = (answer - eps).square().flatten(1).mean(1)
    quarters = {f"L_DM_q{i + 1}": part.mean().item() for i, part in enumerate(loss.chunk(4))}
    return quarters | found | gains


# --------------------------------------------------------------------------------------------------
# features


def to_uint8(x):
    """[-1, 1] -> uint8 by rounding, the images that every metric sees: (B, 3, H, W) -> the same."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class Inception(torch.nn.Module):
    """pytorch-fid's Inception: uint8 (B, 3, H, W) -> pool features (B, 2048), logits (B, 1008), in
    one pass.

    The logits leave out the classifier's bias, as the original Inception Score code does.
    weights: a local copy of pt_inception-2015-12-05-6726825d.pth, else it is downloaded.
    """

    def __init__(self, weights=None):
        super().__init__()
        from pytorch_fid import inception

        if weights is not None and not os.path.isfile(weights):
            raise ValueError(f"--inception-weights {weights}: no such file")
        names = inception.load_state_dict_from_url, inception.fid_inception_v3
        try:
            if weights is not None:
                state = torch.load(weights, map_location="cpu", weights_only=True)
                inception.load_state_dict_from_url = lambda *a, **k: state
            full = inception.fid_inception_v3()
            # InceptionV3 drops the head, which is kept here for the logits
            inception.fid_inception_v3 = lambda: full
            self.pool = inception.InceptionV3([3])
        except Exception as e:  # no network, or a file that is not these weights
            how = f"read from {weights}" if weights else "downloaded"
            raise ValueError(
                f"Inception weights could not be {how} ({reason(e)}); give --inception-weights "
                "PATH to pt_inception-2015-12-05-6726825d.pth, or --features CHECKPOINT"
            ) from None
        finally:
            inception.load_state_dict_from_url, inception.fid_inception_v3 = names
        self.head = full.fc.weight
        self.eval()

    @torch.no_grad()
    def forward(self, x):
        features = self.pool(x.float() / 255)[0].flatten(1)
        return features, features @ self.head.T


def extract(network, images, batch_size=250, device="cpu", desc="features"):
    """Run `network` on uint8 images (N, S, S, 3) array -> features (N, d), logits (N, k), float32
    arrays.
    """
    network = network.to(device)
    features, logits = [], []
    for i in tqdm(
        range(0, len(images), batch_size), desc=desc, leave=False, disable=len(images) <= batch_size
    ):
        batch = torch.from_numpy(np.array(images[i : i + batch_size]))
        batch = batch.permute(0, 3, 1, 2).to(device)
        f, y = network(batch)
        features.append(f.float().cpu())
        logits.append(y.float().cpu())
    return torch.cat(features).numpy(), torch.cat(logits).numpy()


def reference_moments(network, network_key, images, cache, batch_size=250, device="cpu"):
    """Moments of the reference images' features, cached under a key of the network and of every
    pixel.
    """
    path = Path(cache) / f"moments-{images_key(network_key, images)}.npz"
    found = read_cache(path, "mu", "cov")
    if found:
        return found
    mu, cov = moments(extract(network, images, batch_size, device, "reference")[0])
    write_cache(path, mu=mu, cov=cov)
    return mu, cov


def images_key(key, images):
    """A cache key of `key` and of every pixel of images (N, S, S, 3) uint8."""
    digest = hashlib.sha256(f"{key}|{images.shape}".encode())
    for i in range(0, len(images), 10_000):
        digest.update(np.ascontiguousarray(images[i : i + 10_000]))
    return digest.hexdigest()[:20]


def file_key(path):
    """sha256 of a file's content, for cache keys and records."""
    with open(path, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()[:16]
