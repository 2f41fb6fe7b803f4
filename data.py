"""The training images: their corruption, fixed per image, and their order.

    images, labels = load_images("folder:cifar/train", image_size=16)  # (N, S, S, 3) uint8
    data = CorruptedImages(images, labels, p=0.9, sigma=0.2, seed=0)
    x0 = data.batch(index, flip=torch.rand(len(index)) < 0.5)  # (B, 3, S, S) in [-1, 1]

What fits lives on the training device, what does not (LSUN: 3 M images) streams from its file.
Corruption is a function of (seed, image index) alone.
"""

import functools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torchvision

from images import NAMES, load_images  # noqa: F401, part of this file's interface
from losses import acting_rows
from rng import image_uniform, noise_on, scramble, seed_at
from synthetic import synthetic_butterflies

CORRUPTION_STREAM = 2**32 - 1  # the samplers use streams 0, 1, 2, ...


def to_float(x):
    """uint8 (B, S, S, 3) -> (B, 3, S, S) float32 in [-1, 1], channels_last."""
    return x.permute(0, 3, 1, 2).float() / 127.5 - 1


# --------------------------------------------------------------------------------------------------
# corruptions: x0 (B, 3, S, S), the CorruptedImages they are of, index (B,) -> all of x0 corrupted


def gauss(x0, data, index):
    return x0 + data.sigma * data.noise(data.seed, index, CORRUPTION_STREAM, x0.shape[1:])


def outliers(x0, data, index):
    return 2 * data.uniform(index, x0.shape[1:]) - 1


def salt_pepper(x0, data, index):
    u = data.uniform(index, (1, *x0.shape[2:]))
    return torch.where(u <= data.sigma, 2.0 * (u > data.sigma / 2) - 1, x0)


def blur(x0, data, index):
    radius = min(math.ceil(3 * data.sigma), x0.shape[-1] - 1)  # as far as edges can be mirrored
    return torchvision.transforms.functional.gaussian_blur(x0, 2 * radius + 1, data.sigma)


def patch(x0, data, index):
    S = x0.shape[-1]
    side = round(data.sigma * S)
    u = data.uniform(index, (5, 1, 1))
    corner = ((S - side + 1) * u[:, 3:]).ceil().long() - 1  # each place alike
    top, left = corner.split(1, dim=1)
    x = torch.arange(S, device=x0.device)
    y = x.view(-1, 1)
    inside = (y >= top) & (y < top + side) & (x >= left) & (x < left + side)  # (B, 1, S, S)
    return torch.where(inside, 2 * u[:, :3] - 1, x0)


def butterfly(x0, data, index):
    return to_float(data.foreign[index % len(data.foreign)])


CORRUPTIONS = {  # --corrupt: (function, what --sigma is, help); all but gauss are ours
    "gauss": (gauss, "std", "Gaussian noise of std SIGMA on the [-1, 1] scale, not clipped"),
    "outliers": (outliers, None, "replaced by uniform noise on [-1, 1]"),
    "salt-pepper": (salt_pepper, "share", "each pixel black or white with probability SIGMA"),
    "blur": (blur, "std", "Gaussian blur of std SIGMA pixels"),
    "patch": (patch, "share", "a square of one random colour and side SIGMA x S, anywhere"),
    "class": (butterfly, None, "replaced by a synthetic butterfly"),
}
FOREIGN = 4096  # different butterflies, at most: image i is replaced by number i % FOREIGN


class CorruptedImages:
    """Training images with a share p of them corrupted, fixed per image by the seed, never redrawn.

    images: (N, S, S, 3) uint8 array; labels (N,) or None. Exactly round(p N) images are corrupted,
    by default with Gaussian noise of standard deviation sigma on the [-1, 1] scale, not clipped
    (ours); CORRUPTIONS names the other kinds. Streams from the array if it is larger than `budget`
    bytes.
    """

    def __init__(
        self, images, labels=None, p=0.0, sigma=0.0, seed=0, device="cpu", corrupt="gauss",
        budget=None,
    ):  # fmt: skip
        if not 0 <= p <= 1:
            raise ValueError(f"--p {p}: the share of corrupted images must lie in [0, 1]")
        if not sigma >= 0:
            raise ValueError(f"--sigma {sigma}: the noise level must be >= 0")
        if corrupt not in CORRUPTIONS:
            raise ValueError(f"--corrupt {corrupt}: choose {' | '.join(CORRUPTIONS)}")
        n, S = images.shape[:2]
        self.corrupt, unit, _ = CORRUPTIONS[corrupt]
        if unit == "share" and sigma > 1:
            raise ValueError(f"--sigma {sigma}: for --corrupt {corrupt} it is a share, at most 1")
        if corrupt == "patch" and p > 0 and round(sigma * S) < 1:
            raise ValueError(f"--sigma {sigma}: a patch of less than one of {S} pixels")
        self.device = torch.device(device)
        self.seed = seed
        self.sigma = sigma
        order = torch.Generator().manual_seed(seed_at(seed, 0, stream=0))
        chosen = torch.randperm(n, generator=order)[: round(p * n)]
        corrupted = torch.zeros(n, dtype=torch.bool)  # one byte an image is all that is held
        corrupted[chosen] = True
        self.corrupted = corrupted.to(self.device)
        self.intact = len(chosen) == 0 or (unit is not None and sigma == 0)
        self.labels = None if labels is None else torch.as_tensor(labels, device=self.device)
        on_gpu = self.device.type == "cuda"
        if budget is None:
            budget = torch.cuda.mem_get_info(self.device)[0] // 4 if on_gpu else 4 << 30
        self.streams = images.nbytes > budget
        self.images = images
        if not self.streams:
            self.images = torch.from_numpy(np.array(images)).to(self.device)
        self.noise = noise_on(self.device.type)

    def __len__(self):
        return len(self.images)

    @property
    def shape(self):
        S = self.images.shape[1]
        return (3, S, S)

    def read(self, index):
        """index (B,) int64 -> pixels (B, S, S, 3) uint8, on the device or, of a set that streams,
        on their way: a thread may read ahead, as nothing is computed here.
        """
        if not self.streams:
            return self.images[index]
        pixels = torch.from_numpy(self.images[index.cpu().numpy()])
        return pixels.pin_memory() if self.device.type == "cuda" else pixels

    def clean(self, index, pixels=None):
        """index (B,) int64 on the device -> x0 (B, 3, S, S) float32 in [-1, 1], not corrupted.

        channels_last. pixels: what `read` gave for index, if it has been read already.
        """
        pixels = self.read(index) if pixels is None else pixels
        return to_float(pixels.to(self.device, non_blocking=True))

    def batch(self, index, flip=None, pixels=None):
        """As `clean`, with the corruption; flip (B,) bool mirrors the already corrupted image."""
        x0 = self.clean(index, pixels)
        index = index.to(self.device, non_blocking=True)
        if not self.intact:
            chosen = self.corrupted[index].view(-1, 1, 1, 1)
            x0 = torch.where(chosen, self.corrupt(x0, self, index), x0)
        if flip is not None:
            x0 = torch.where(flip.view(-1, 1, 1, 1), x0.flip(3), x0)
        return x0.contiguous(memory_format=torch.channels_last)

    def uniform(self, index, shape):
        """Random numbers (B, *shape) on (0, 1] that belong to the images, for their corruption."""
        return image_uniform(self.seed, index, CORRUPTION_STREAM, shape)

    @functools.cached_property
    def foreign(self):
        images, _ = synthetic_butterflies(min(FOREIGN, len(self)), self.shape[1], seed=2)
        return torch.from_numpy(images).to(self.device)


class Order:
    """Which image stands at each position of an endless sequence of seeded permutations
    of 0..n-1."""

    def __init__(self, n, seed, device="cpu"):
        self.n = n
        self.seed = seed
        self.device = device
        self.epoch = None

    def _perm(self, epoch):
        if epoch != self.epoch:
            g = torch.Generator().manual_seed(seed_at(self.seed, epoch, stream=1))
            self.perm = torch.randperm(self.n, generator=g).to(self.device)
            self.epoch = epoch
        return self.perm

    def __call__(self, first, count):
        """Indices at positions first .. first+count-1 -> (count,) int64."""
        parts = []
        while count > 0:
            epoch, k = divmod(first, self.n)
            part = self._perm(epoch)[k : k + count]
            parts.append(part)
            first, count = first + len(part), count - len(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class Batches:
    """batches(step) -> the batch of a step in the --accum parts of this process, dicts by name.

    Part i of n holds the rows i, i + n, i + 2 n, ..: the first rows of all parts together are the
    first rows of the batch, at which draw() puts the t that Eq. 10's second term acts on.
    draw_numbers: see train.py.
    """

    def __init__(self, args, run, draw_numbers, T):
        self.args = args
        self.data = run.data
        self.sigma_y = run.sigma_y
        self.draw_numbers = draw_numbers
        self.T = T
        self.device = device = run.device
        where = "cpu" if run.data.streams else device
        self.kept = torch.arange(len(run.data), device=where)
        if args.drop_noisy:
            self.kept = self.kept[run.sigma_y.to(where) == 0]
        self.order = Order(len(self.kept), args.seed, where)
        parts = run.world * args.accum
        mine = range(run.rank * args.accum, (run.rank + 1) * args.accum)
        self.rows = [slice(i, args.batch_size, parts) for i in mine]
        self.generator = torch.Generator(device)
        self.pool = ThreadPoolExecutor(1, initializer=self.on_device)
        self.ahead = None

    def __call__(self, step):
        if not self.data.streams:
            return self.draw(step, self.read(step))
        loaded = (self.ahead or self.pool.submit(self.read, step)).result()
        self.ahead = self.pool.submit(self.read, step + 1)  # reads from disk meanwhile, no more:
        return self.draw(step, loaded)  # what may be compiled runs in this thread alone

    def on_device(self):
        """The reading thread's first act: pinned memory belongs to the current GPU."""
        if self.generator.device.type == "cuda":
            torch.cuda.set_device(self.generator.device)

    def read(self, step):
        """[(image numbers, pixels)] of the parts."""
        index = self.kept[self.order(step * self.args.batch_size, self.args.batch_size)]
        return [(index[rows], self.data.read(index[rows])) for rows in self.rows]

    def draw(self, step, loaded):
        """The parts of the batch: the images with their corruption, and the random numbers."""
        args = self.args
        B = args.batch_size
        size = self.data.shape[1]
        numbers = self.draw_numbers(self.generator, args.seed, step, self.T, B, size)
        flip = numbers.pop("flip")
        # rows that Eq. 10's second term acts on come first, in each part alike, where their dropout
        # masks also stand in its second forward; t is independent of all else
        t = numbers["t"]
        numbers["t"] = t[acting_rows(t, args.reg_from, args.reg_until)]
        batches = []
        for rows, (index, pixels) in zip(self.rows, loaded):
            batch = {name: value[rows] for name, value in numbers.items()}
            batch["x0"] = self.data.batch(index, flip[rows] if args.flip else None, pixels)
            if args.dropout > 0:  # one mask per row and step, whatever the division
                keys = torch.arange(rows.start, B, rows.step, device=self.device)
                seed = torch.tensor(seed_at(args.seed, step, stream=4)).to(torch.int32)
                batch["keys"] = keys + int(scramble(seed))  # else those of the next step overlap
            index = index.to(self.device, non_blocking=True)
            if args.classifier:
                batch["y"] = self.data.labels[index]
            if args.robust == "ambient":
                batch["sigma_y"] = self.sigma_y[index]
            batches.append(batch)
        return batches

    def close(self):
        self.pool.shutdown(cancel_futures=True)
