"""The toy sets of P1 §2.2 in three dimensions: points, noise, true score, measures.

Both sets are mixtures of equal Gaussians N(c_k, C), in float64 and data units. P1 leaves the
density on the plane and both noises open. Ours: on the plane, a Gaussian with PLANE_STD along it
and SIGMA across; inliers: SIGMA -> INLIER_SIGMA; outliers: one point in each of k cells of a cubic
grid, mean +- BOX scales.
"""

import math

import numpy as np
import torch

SIGMA = 0.25
PLANE_STD = 4.0
INLIER_SIGMA = 1.5
BOX = 2.5
# farther than this is off the support: 6e-5 of the clean plane, 1e-3 of the clean Gaussians
SUPPORT = 4 * SIGMA
# the projection on the normal of the plane x + y + z = 30
ONES = torch.ones(3, 3, dtype=torch.float64) / 3
EYE = torch.eye(3, dtype=torch.float64)
CENTRES = {
    "oblique-plane": torch.tensor([[10.0, 10, 10]], dtype=torch.float64),
    "3-gaussians": torch.tensor([[10.0, 10, 10], [20, 20, 20], [10, 30, 30]], dtype=torch.float64),
}
COVARIANCE = {
    "oblique-plane": PLANE_STD**2 * (EYE - ONES) + SIGMA**2 * ONES,
    "3-gaussians": SIGMA**2 * EYE,
}
NOISES = ["clean", "inliers", "outliers"]


def standard(name):
    """The affine map of a set, from its definition alone -> mean (3,), scale.

    The scale is the root mean variance per coordinate. oblique-plane: (10, 10, 10) and 3.269;
    3-gaussians: (13.333, 20, 20) and 7.205. The networks see (x - mean) / scale.
    """
    c = CENTRES[name]
    mean = c.mean(0)
    cov = COVARIANCE[name] + (c - mean).T @ (c - mean) / len(c)
    return mean, (cov.trace() / 3).sqrt().item()


def to_standard(name, x):
    mean, scale = standard(name)
    return (x - mean) / scale


def from_standard(name, x):
    mean, scale = standard(name)
    return mean + scale * x


def clean_points(name, n, generator, sigma=SIGMA):
    """n points of the set -> (n, 3); the modes take turns, so that their weights are equal."""
    z = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    if name == "oblique-plane":
        z = PLANE_STD * (z - z @ ONES) + sigma * z @ ONES
    else:
        z = sigma * z
    return CENTRES[name][torch.arange(n) % len(CENTRES[name])] + z


def training_points(name, noise, n, share, generator):
    """n clean points, the first round(share n) of them replaced by noise -> (n, 3)."""
    x = clean_points(name, n, generator)
    k = round(share * n)
    if noise == "inliers":
        x[:k] = clean_points(name, k, generator, INLIER_SIGMA)
    elif noise == "outliers":
        mean, scale = standard(name)
        side = max(1, math.ceil(k ** (1 / 3)))
        cell = torch.randperm(side**3, generator=generator)[:k]
        corner = torch.stack([cell // side**2, cell // side % side, cell % side], 1)
        u = (corner + torch.rand(k, 3, generator=generator, dtype=torch.float64)) / side
        x[:k] = mean + BOX * scale * (2 * u - 1)
    return x


def distance(name, x):
    """Distance of x (n, 3) from the support: the plane, or the nearest centre -> (n,)."""
    if name == "oblique-plane":
        return (x.sum(1) - 30).abs() / math.sqrt(3)
    return torch.cdist(x, CENTRES[name].to(x)).amin(1)


def diffused(name, abar):
    """p_t, still a mixture of Gaussians, in standardised units.

    -> means sqrt(abar) c_k (K, 3), covariance abar C + (1 - abar) I (3, 3)
    """
    mean, scale = standard(name)
    means = math.sqrt(abar) * (CENTRES[name] - mean) / scale
    return means, abar * COVARIANCE[name] / scale**2 + (1 - abar) * EYE


def true_score(name, x_t, abar):
    """grad log p_t(x_t) = -(abar C + (1 - abar) I)^-1 (x_t - sum_k w_k(x_t) m_k) -> (n, 3).

    w: the modes' posterior at x_t.
    """
    m, cov = (a.to(x_t) for a in diffused(name, abar))
    precision = torch.linalg.inv(cov)
    r = x_t[:, None] - m  # (n, K, 3)
    w = (-0.5 * (r @ precision * r).sum(-1)).softmax(1)  # (n, K)
    return -(x_t - w @ m) @ precision


def true_eps(names, schedule):
    """The ideal networks of several sets, side by side as in toy3d.MLP.

    -> a function (x_t, t) -> -sqrt(1 - abar_t) grad log p_t(x_t), one t per call
    """

    def eps(x_t, t):
        abar = schedule.alphas_bar[t[0]].item()
        x = x_t.view(-1, len(names), 3)
        scores = [true_score(name, x[:, j], abar) for j, name in enumerate(names)]
        return (-math.sqrt(1 - abar) * torch.stack(scores, 1)).view(-1, 3)

    return eps


# --------------------------------------------------------------------------------------------------
# 2-D projections that keep the plane's thickness and the distances between the three modes

AXES = {
    "oblique-plane": torch.tensor([[0.5**0.5, -(0.5**0.5), 0], [3**-0.5] * 3]).double(),
    "3-gaussians": torch.tensor([[1.0, 0, 0], [0, 0.5**0.5, 0.5**0.5]]).double(),
}
AXIS_NAMES = {
    "oblique-plane": ("$(x-y)/\\sqrt{2}$", "$(x+y+z)/\\sqrt{3}$"),
    "3-gaussians": ("$x$", "$(y+z)/\\sqrt{2}$"),
}


def project(name, x):
    """x (n, 3) -> (n, 2) as numpy."""
    return (x @ AXES[name].T.to(x)).numpy()


# --------------------------------------------------------------------------------------------------
# measures


def sliced_w2(x, y, x_weights=None, y_weights=None, triples=64):
    """Sliced Wasserstein-2 between points x (n, 3) and y (m, 3) -> float.

    Weights (n,), (m,) of the points sum to 1; by default they are equal. The directions are
    `triples` random orthonormal bases, so that a shift by c gives exactly |c| / sqrt(3).
    """
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(triples, 3, 3, generator=generator, dtype=torch.float64)
    q = torch.linalg.qr(z)[0].permute(1, 0, 2).reshape(3, -1)  # (3, 3 triples), unit columns
    values = []
    steps = []
    for points, weights in ((x, x_weights), (y, y_weights)):
        if weights is None:
            weights = torch.full((len(points),), 1 / len(points), dtype=torch.float64)
        value, order = (points @ q).T.contiguous().sort(1)  # (3 triples, n)
        values.append(value)
        steps.append(weights[order].cumsum(1))
    # both quantile functions are steps: the integral of their squared difference is a sum
    ends = torch.cat(steps, 1).sort(1).values
    lengths = ends.diff(dim=1, prepend=torch.zeros(len(ends), 1, dtype=torch.float64))
    middle = ends - lengths / 2
    at_x, at_y = (torch.searchsorted(step, middle).clamp(max=step.shape[1] - 1) for step in steps)
    gap = values[0].gather(1, at_x) - values[1].gather(1, at_y)
    return (lengths * gap.square()).sum(1).mean().sqrt().item()


def mode_matched(name, x):
    """Weights (n,) of points x that give every mode its true weight; a point is its nearest mode's.

    A mode without points leaves its weight to the others.
    """
    mode = torch.cdist(x, CENTRES[name]).argmin(1)
    count = torch.bincount(mode, minlength=len(CENTRES[name]))
    return 1 / count[mode].double() / (count > 0).sum()


def measure(name, x, seed):
    """Samples x (n, 3) against the clean set -> numbers, in data units.

    mode_weights and spread are those of the points on the support; spread = their standard
    deviation about their mode over the clean set's. sliced_w2 is between equal weights of the modes
    (mode_matched): the chance of 2,000 draws alone moves the weights so far that the distance of
    exact samples would be near 1 on 3-gaussians.
    """
    d = distance(name, x)
    on = d <= SUPPORT
    r, mode = torch.cdist(x[on], CENTRES[name]).min(1)
    kept = max(1, len(r))
    weights = torch.bincount(mode, minlength=len(CENTRES[name])) / kept
    reference = clean_points(name, len(x), torch.Generator().manual_seed(10_000 + seed))
    return dict(
        off_support=1 - on.double().mean().item(),
        distance_mean=d.mean().item(),
        distance_95=d.quantile(0.95).item(),
        sliced_w2=sliced_w2(x, reference, *(mode_matched(name, p) for p in (x, reference))),
        spread=(r.square().sum() / kept / COVARIANCE[name].trace()).sqrt().item(),
        mode_weights=weights.tolist(),
        smallest_weight=weights.min().item(),
    )


def over_seeds(runs):
    """[numbers of a seed] -> {name: mean and standard deviation over the seeds}.

    A single seed has no deviation.
    """
    summary = {}
    for name in runs[0]:
        v = np.asarray([numbers[name] for numbers in runs])
        std = v.std(0, ddof=1).tolist() if len(v) > 1 else None
        summary[name] = dict(mean=v.mean(0).tolist(), std=std)
    return summary
