"""Counter-based random numbers: the same on every device, whatever the batch."""

import functools
import math

import torch


def philox(seed, index, stream, blocks):
    """Philox4x32-10 (Salmon et al., 2011) -> (B, blocks, 4) int64 in [0, 2^32).

    seed: int; index: (B,) int64; stream: int, or a 0-dim int64 tensor, with which a compiled caller
    is compiled once for all.
    """
    mask = 0xFFFFFFFF
    index = index.view(-1, 1)
    # added to the counter: Inductor would compute a bare arange, and its product, in int32
    zero = index & 0
    c = [
        torch.arange(blocks, device=index.device) + zero,
        zero + (stream & mask),
        index & mask,
        (index >> 32) & mask,
    ]
    k0, k1 = seed & mask, (seed >> 32) & mask
    for _ in range(10):
        # 64-bit products; int64 wraps, which leaves the bits right
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32 & mask) ^ c[1] ^ k0, p1 & mask, (p0 >> 32 & mask) ^ c[3] ^ k1, p0 & mask]
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return torch.stack(torch.broadcast_tensors(*c), dim=-1)


def image_uniform(seed, index, stream, shape):
    """As `image_noise`, uniform on (0, 1]: its logarithm is finite."""
    n = math.prod(shape)
    bits = philox(seed, index, stream, -(-n // 4)).flatten(1)[:, :n].reshape(-1, *shape)
    return ((bits >> 8).float() + 0.5) * 2**-24


def image_noise(seed, index, stream, shape):
    """Standard normal noise (B, *shape) float32 in which row i depends on (seed, index[i], stream)
    alone (Box-Muller).
    """
    n = math.prod(shape)
    u = image_uniform(seed, index, stream, (-(-n // 4), 4))
    r, phi = (-2 * u[..., :2].log()).sqrt(), 2 * math.pi * u[..., 2:]
    return torch.cat([r * phi.cos(), r * phi.sin()], dim=-1).flatten(1)[:, :n].reshape(-1, *shape)


@functools.cache
def noise_on(kind):
    """image_noise for a kind of device: on a GPU one fused kernel instead of a hundred. There a
    seed or a stream that changes should be a tensor: each number would be compiled anew.
    """
    if kind != "cuda":
        return image_noise
    return torch.compile(image_noise, dynamic=False)


def seed_at(seed, k, stream):
    """A generator's seed for step k: other k give other seeds, other streams lie far apart."""
    return (seed * 0x9E3779B1 + stream * 0x85EBCA6B + k) % 2**32


def scramble(x):
    """A permutation of the 32-bit integers that leaves no pattern (lowbias32, C. Wellons): int32 ->
    int32, elementwise.

    Products wrap. A shift to the right repeats the sign, which is masked out. int64 takes a CPU
    three times as long.
    """
    x = (x ^ x >> 16 & 0xFFFF) * 0x7FEB352D
    x = (x ^ x >> 15 & 0x1FFFF) * (0x846CA68B - 2**32)
    return x ^ x >> 16 & 0xFFFF
