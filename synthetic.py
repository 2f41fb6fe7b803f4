"""Procedural butterflies: images that every machine has."""

import numpy as np
import torch

from rng import philox

DRAWS = 32  # random numbers per image


def draw_butterflies(draws, species, size):
    """Butterflies on white, exactly symmetric -> (B, size, size, 3) uint8.

    draws (B, DRAWS) float32 in [0, 1); species (B,) int in 0..9. A species fixes the base hue
    and the wing pattern; shape, tint, spots and bands vary with the draws. Drawn at twice the size,
    then averaged.
    """
    column = iter(np.moveaxis(draws, 1, 0)[:, :, None, None])

    def between(low, high):
        """The next random number of each image, on [low, high) -> (B, 1, 1)."""
        return low + (high - low) * next(column)

    u, v = half_plane(size)
    soft = 0.75 / size  # how gradually an edge goes from one colour to the next
    species = species[:, None, None].astype(np.float32)

    # the shape: two wings, each inside an ellipse
    fore_angle = between(0.35, 0.95)
    hind_angle = between(-1.0, -0.45)
    fore_a = between(0.36, 0.46)
    fore_b = between(0.2, 0.29)
    hind_a = between(0.26, 0.36)
    hind_b = between(0.18, 0.25)
    fore_x = fore_a * 0.85 * np.cos(fore_angle)
    fore_y = 0.05 + fore_a * 0.85 * np.sin(fore_angle)
    hind_x = hind_a * 0.85 * np.cos(hind_angle)
    hind_y = hind_a * 0.85 * np.sin(hind_angle) - 0.02
    fore = ellipse(u, v, fore_x, fore_y, fore_a, fore_b, fore_angle)
    hind = ellipse(u, v, hind_x, hind_y, hind_a, hind_b, hind_angle)
    wing = np.minimum(fore, hind)

    # the colours
    hue = (species / 10 + between(-0.03, 0.03)) % 1
    base = rgb(hue, between(0.55, 0.95), between(0.65, 1.0))
    second = rgb((hue + between(0.05, 0.2)) % 1, between(0.4, 0.9), between(0.75, 1.0))
    dark = rgb(hue, between(0.3, 0.8), between(0.05, 0.3))
    light = rgb((hue + 0.5) % 1, between(0.0, 0.5), between(0.85, 1.0))

    # the pattern: bands on odd species, veins on even ones, a dark margin, two light spots
    radius = np.sqrt(u**2 + v**2)
    banded = species % 2
    band = 0.5 + 0.5 * np.sin(between(9, 16) * radius + between(0, 6.28))
    margin = between(0.03, 0.09)
    vein = 0.5 + 0.5 * np.cos(between(8, 14) * np.arctan2(v, u))
    fore_spot = between(0.4, 0.6), between(0.25, 0.5)  # x, y
    hind_spot = between(0.2, 0.4), between(-0.45, -0.2)
    colour = base + (second - base) * (hind < fore)[..., None]
    colour = paint(colour, dark, banded * band**3 * 0.8 + (1 - banded) * vein**8 * 0.5)
    colour = paint(colour, dark, inside(-(wing + margin), soft))
    for (x, y), spotted in ((fore_spot, fore), (hind_spot, hind)):
        disc = np.hypot(u - x, v - y) - between(0.05, 0.11)
        colour = paint(colour, light, inside(np.maximum(disc, spotted + margin), soft))
    image = paint(np.ones_like(colour), colour, inside(wing, soft))

    # the body: a long ellipse, and two feelers
    zero = 0 * hue
    trunk = ellipse(u, v, zero, zero - 0.02, zero + 0.06, 0.3 + between(0, 0.08), zero)
    slant = between(0.4, 0.8)
    feelers = np.maximum(np.abs(u - (v - 0.25) * slant) - 0.02, np.abs(v - 0.42) - 0.2)
    image = paint(image, dark * 0.7, inside(np.minimum(trunk, feelers), soft))

    image = image.reshape(len(draws), size, 2, size, 2, 3).mean((2, 4))
    image = (image + image[:, :, ::-1]) / 2  # exact symmetry, whatever the order of the sums above
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)


def half_plane(size):
    """Coordinates u = |x|, for the symmetry, and v, upwards -> (1, 2 size, 2 size) each."""
    axis = 0.76 * ((np.arange(2 * size, dtype=np.float32) + 0.5) / size - 1)
    v, u = np.meshgrid(-axis, np.abs(axis), indexing="ij")
    return u[None], v[None]


def ellipse(u, v, x, y, a, b, angle):
    """About the signed distance from an ellipse at (x, y); its half-axis a points at `angle`."""
    cos = np.cos(angle)
    sin = np.sin(angle)
    along = (u - x) * cos + (v - y) * sin
    across = (v - y) * cos - (u - x) * sin
    f = np.sqrt((along / a) ** 2 + (across / b) ** 2)
    slope = np.sqrt((along / a**2) ** 2 + (across / b**2) ** 2)
    return f * (f - 1) / np.maximum(slope, 1e-6)


def inside(distance, soft):
    """1 where the signed distance is negative, 0 where it is positive, smooth over `soft`."""
    return 1 / (1 + np.exp(np.clip(distance / soft, -40, 40)))


def paint(image, colour, amount):
    """`colour` over `image` (B, H, W, 3), with opacity `amount` (B, H, W) in [0, 1]."""
    return image + (colour - image) * amount[..., None]


def rgb(h, s, v):
    """Hue, saturation, value (B, 1, 1) in [0, 1] -> RGB (B, 1, 1, 3)."""
    k = (np.float32([5, 3, 1]) + 6 * h[..., None]) % 6
    return v[..., None] * (1 - s[..., None] * np.clip(np.minimum(k, 4 - k), 0, 1))


def synthetic_butterflies(n, size=32, seed=0):
    """n butterflies -> images (n, size, size, 3) uint8, labels (n,) species 0..9.

    Image i depends on (seed, i) alone.
    """
    images = np.empty((n, size, size, 3), np.uint8)
    labels = np.arange(n) * 7919 % 10
    for first in range(0, n, 512):
        index = torch.arange(first, min(first + 512, n))
        bits = philox(1_000 + seed, index, 0, DRAWS // 4).flatten(1)
        draws = (bits.double() / 2**32).float().numpy()  # (B, DRAWS)
        images[first : first + len(index)] = draw_butterflies(
            draws, labels[first : first + len(index)], size
        )
    return images, labels
