"""Data sets, corruption and random numbers that belong to an image.

    images, labels = load_images("folder:cifar/train", image_size=16)     # (N, S, S, 3) uint8, memory-mapped or in RAM
    data = CorruptedImages(images, labels, p=0.9, sigma=0.2, seed=0, device="cuda")
    x0 = data.batch(index, flip=torch.rand(len(index)) < 0.5)             # (B, 3, S, S) in [-1, 1], channels_last

Every set is decoded once into a memory-mapped uint8 array below ROOT/cache; what fits then lives on the training
device, what does not (LSUN: 3 M images) streams from the map. Corruption is a function of (seed, image index) alone.
"""

import hashlib
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from synthetic import DRAWS, draw_butterflies

NAMES = "cifar10 | cifar100 | celeba | lsun-bedroom | folder:PATH | synthetic | synthetic:N"
NATIVE_SIZE = {"cifar10": 32, "cifar100": 32, "celeba": 64, "lsun-bedroom": 64, "synthetic": 32}
EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}

# ---------------------------------------------------------------------------------------------------------------------
# counter-based random numbers: the same on every device, whatever the batch


def philox(seed, index, stream, blocks):
    """Philox4x32-10 (Salmon et al., 2011) -> (B, blocks, 4) int64 in [0, 2^32).

    seed: int; index: (B,) int64; stream: int, or a 0-dim int64 tensor, with which a compiled caller is compiled once for all.
    """
    mask = 0xFFFFFFFF
    index = index.view(-1, 1)
    zero = (
        index & 0
    )  # added to the counter: Inductor would compute a bare arange, and its product, in int32
    c = [
        torch.arange(blocks, device=index.device) + zero,
        zero + (stream & mask),
        index & mask,
        (index >> 32) & mask,
    ]
    k0, k1 = seed & mask, (seed >> 32) & mask
    for _ in range(10):
        p0, p1 = (
            c[0] * 0xD2511F53,
            c[2] * 0xCD9E8D57,
        )  # 64-bit products; int64 wraps, which leaves the bits right
        c = [(p1 >> 32 & mask) ^ c[1] ^ k0, p1 & mask, (p0 >> 32 & mask) ^ c[3] ^ k1, p0 & mask]
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return torch.stack(torch.broadcast_tensors(*c), dim=-1)


def image_uniform(seed, index, stream, shape):
    """As `image_noise`, uniform on (0, 1]: its logarithm is finite."""
    n = math.prod(shape)
    bits = philox(seed, index, stream, -(-n // 4)).flatten(1)[:, :n].reshape(-1, *shape)
    return ((bits >> 8).float() + 0.5) * 2**-24


def image_noise(seed, index, stream, shape):
    """Standard normal noise (B, *shape) float32 in which row i depends on (seed, index[i], stream) alone (Box-Muller)."""
    n = math.prod(shape)
    u = image_uniform(seed, index, stream, (-(-n // 4), 4))
    r, phi = (-2 * u[..., :2].log()).sqrt(), 2 * math.pi * u[..., 2:]
    return torch.cat([r * phi.cos(), r * phi.sin()], dim=-1).flatten(1)[:, :n].reshape(-1, *shape)


def seed_at(seed, k, stream):
    """A generator seed for step k: distinct k give distinct seeds, distinct streams are far apart."""
    return (seed * 0x9E3779B1 + stream * 0x85EBCA6B + k) % 2**32


CORRUPTION_STREAM = 2**32 - 1  # the samplers use streams 0, 1, 2, ...

# ---------------------------------------------------------------------------------------------------------------------
# corruption


CORRUPTIONS = {  # what becomes of a corrupted image, fixed per image; all but gauss are ours
    "gauss": "Gaussian noise of std SIGMA on the [-1, 1] scale, not clipped",
    "outliers": "replaced by uniform noise on [-1, 1]",
    "salt-pepper": "each pixel black or white with probability SIGMA",
    "blur": "Gaussian blur of std SIGMA pixels",
    "patch": "a square of one random colour and side SIGMA x S, anywhere",
    "class": "replaced by a synthetic butterfly",
}
FOREIGN = 4096  # different butterflies, at most: image i is replaced by number i % FOREIGN


def to_float(x):
    """uint8 (B, S, S, 3) -> (B, 3, S, S) float32 in [-1, 1], channels_last."""
    return x.permute(0, 3, 1, 2).float() / 127.5 - 1


class CorruptedImages:
    """Training images with a share p of them corrupted, fixed per image by the seed and never redrawn.

    images: (N, S, S, 3) uint8 array; labels (N,) or None. Exactly round(p N) images are corrupted, by default with Gaussian
    noise of standard deviation sigma on the [-1, 1] scale, not clipped (ours); CORRUPTIONS names the other kinds.
    Streams from the array if it is larger than `budget` bytes.
    """

    def __init__(
        self,
        images,
        labels=None,
        p=0.0,
        sigma=0.0,
        seed=0,
        device="cpu",
        corrupt="gauss",
        budget=None,
    ):
        if not 0 <= p <= 1:
            raise ValueError(f"--p {p}: the share of corrupted images must lie in [0, 1]")
        if not sigma >= 0:
            raise ValueError(f"--sigma {sigma}: the noise level must be >= 0")
        if corrupt not in CORRUPTIONS:
            raise ValueError(f"--corrupt {corrupt}: choose {' | '.join(CORRUPTIONS)}")
        if corrupt in ("salt-pepper", "patch") and sigma > 1:
            raise ValueError(f"--sigma {sigma}: for --corrupt {corrupt} it is a share, at most 1")
        if corrupt == "patch" and p > 0 and round(sigma * images.shape[1]) < 1:
            raise ValueError(
                f"--sigma {sigma}: a patch of less than one of {images.shape[1]} pixels"
            )
        self.device, self.seed, self.sigma, self.corrupt = (
            torch.device(device),
            seed,
            sigma,
            corrupt,
        )
        n = len(images)
        chosen = torch.randperm(
            n, generator=torch.Generator().manual_seed(seed_at(seed, 0, stream=0))
        )[: round(p * n)]
        self.corrupted = torch.zeros(
            n, dtype=torch.bool
        )  # which images; one byte each is all that is held
        self.corrupted[chosen] = True
        self.corrupted = self.corrupted.to(self.device)
        self.labels = None if labels is None else torch.as_tensor(labels, device=self.device)
        if budget is None:
            budget = (
                torch.cuda.mem_get_info(self.device)[0] // 4
                if self.device.type == "cuda"
                else 4 << 30
            )
        self.streams = images.nbytes > budget
        self.images = images if self.streams else torch.from_numpy(np.array(images)).to(self.device)
        if corrupt == "class" and len(chosen):
            self.foreign = torch.from_numpy(
                synthetic_butterflies(min(FOREIGN, n), images.shape[1], seed=2)[0]
            ).to(self.device)
        self._noise = image_noise
        if self.device.type == "cuda":  # one fused kernel instead of a hundred
            self._noise = torch.compile(image_noise, dynamic=False, fullgraph=True)

    def __len__(self):
        return len(self.images)

    @property
    def shape(self):
        s = self.images.shape[1]
        return (3, s, s)

    def read(self, index):
        """index (B,) int64 -> pixels (B, S, S, 3) uint8, on the device or, of a set that streams, on their way: a thread may
        read ahead, as nothing is computed here."""
        if not self.streams:
            return self.images[index]
        pixels = torch.from_numpy(self.images[index.cpu().numpy()])
        return pixels.pin_memory() if self.device.type == "cuda" else pixels

    def clean(self, index, pixels=None):
        """index (B,) int64 on the device -> x0 (B, 3, S, S) float32 in [-1, 1] without corruption, channels_last.

        pixels: what `read` gave for index, if it has been read already.
        """
        pixels = self.read(index) if pixels is None else pixels
        return to_float(pixels.to(self.device, non_blocking=True))

    def batch(self, index, flip=None, pixels=None):
        """As `clean`, with the corruption; flip (B,) bool mirrors the already corrupted image."""
        x0, index = self.clean(index, pixels), index.to(self.device, non_blocking=True)
        if self.corrupt != "gauss":
            x0 = torch.where(self.corrupted[index].view(-1, 1, 1, 1), self._corrupt(x0, index), x0)
        elif self.sigma > 0:
            noise = self._noise(self.seed, index, CORRUPTION_STREAM, self.shape)
            x0 = x0 + self.sigma * self.corrupted[index].float().view(-1, 1, 1, 1) * noise
        if flip is not None:
            x0 = torch.where(flip.view(-1, 1, 1, 1), x0.flip(3), x0)
        return x0.contiguous(memory_format=torch.channels_last)

    def _corrupt(self, x0, index):
        """All of x0 (B, 3, S, S) corrupted by a kind other than gauss."""
        s, kind = x0.shape[-1], self.corrupt
        if kind == "class":
            return to_float(self.foreign[index % len(self.foreign)])
        if kind == "blur":
            radius = min(
                math.ceil(3 * self.sigma), s - 1
            )  # as far as the image can be mirrored at its edges
            return (
                torchvision.transforms.functional.gaussian_blur(x0, 2 * radius + 1, self.sigma)
                if radius
                else x0
            )
        shape = {"outliers": (3, s, s), "salt-pepper": (1, s, s), "patch": (5, 1, 1)}[kind]
        u = image_uniform(self.seed, index, CORRUPTION_STREAM, shape)
        if kind == "outliers":
            return 2 * u - 1
        if kind == "salt-pepper":
            return torch.where(u <= self.sigma, 2.0 * (u > self.sigma / 2) - 1, x0)
        side, pixel = round(self.sigma * s), torch.arange(s, device=x0.device)
        top, left = (
            ((s - side + 1) * u[:, 3:]).ceil().long().sub(1).split(1, dim=1)
        )  # each place alike, (B, 1, 1, 1)
        rows, columns = ((pixel >= v) & (pixel < v + side) for v in (top, left))  # (B, 1, 1, S)
        return torch.where(rows.mT & columns, 2 * u[:, :3] - 1, x0)


class Order:
    """Which image stands at each position of an endless sequence of seeded permutations of 0..n-1."""

    def __init__(self, n, seed, device="cpu"):
        self.n, self.seed, self.device, self.perms = n, seed, device, {}

    def _perm(self, epoch):
        if epoch not in self.perms:
            g = torch.Generator().manual_seed(seed_at(self.seed, epoch, stream=1))
            self.perms = {e: p for e, p in self.perms.items() if e == epoch - 1}
            self.perms[epoch] = torch.randperm(self.n, generator=g).to(self.device)
        return self.perms[epoch]

    def __call__(self, first, count):
        """Indices at positions first .. first+count-1 -> (count,) int64."""
        parts = []
        while count > 0:
            epoch, k = divmod(first, self.n)
            part = self._perm(epoch)[k : k + count]
            parts.append(part)
            first, count = first + len(part), count - len(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)


# ---------------------------------------------------------------------------------------------------------------------
# loading


def load_images(name, image_size=None, split="train", root="data", labels_needed=False):
    """-> images (N, S, S, 3) uint8 (memory-mapped unless synthetic), labels (N,) int64 or None.

    name: cifar10 | cifar100 | celeba | lsun-bedroom | folder:PATH | synthetic[:N]; image_size: resized (antialiased
    bicubic, then centre crop) to S x S, default the set's own size. Raises ValueError with one line for bad input.
    """
    if image_size is not None and image_size < 4:
        raise ValueError(f"--image-size {image_size}: must be at least 4")
    if re.fullmatch(r"synthetic(:\d+)?", name):
        n = int(name.partition(":")[2] or 5_000)
        if n < 1:
            raise ValueError(f"--data {name}: needs at least one image")
        return synthetic_butterflies(
            n, image_size or NATIVE_SIZE["synthetic"], seed=0 if split == "train" else 1
        )
    if name.startswith("folder:"):
        source, key = _folder(name[len("folder:") :])
    elif name in NATIVE_SIZE:
        source, key = _torchvision(name, split, root), f"{name}-{split}"
        image_size = image_size or NATIVE_SIZE[name]
    else:
        raise ValueError(f"--data {name}: unknown data set; choose {NAMES}")
    images, labels = _cached(source, key, image_size, Path(root) / "cache")
    labels = None if labels is None or (labels < 0).all() else labels
    if labels_needed and labels is None:
        raise ValueError(f"--data {name}: has no labels (a folder needs one sub-folder per class)")
    return images, labels


def _folder(path):
    if not path:
        raise ValueError("--data folder: names no folder; write folder:PATH")
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"--data folder:{path}: no such folder")
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in EXTENSIONS)
    if not files:
        raise ValueError(f"--data folder:{path}: holds no images ({', '.join(sorted(EXTENSIONS))})")
    classes = sorted({f.parent for f in files})
    number = {c: (i if len(classes) > 1 else -1) for i, c in enumerate(classes)}
    digest = hashlib.sha256(f"{path.resolve()}\n".encode())
    for f in files:
        stat = f.stat()
        digest.update(f"{f.relative_to(path)}|{stat.st_size}|{stat.st_mtime_ns}\n".encode())

    class Folder:
        def __len__(self):
            return len(files)

        def __getitem__(self, i):
            try:
                with Image.open(files[i]) as image:
                    return image.convert("RGB"), number[files[i].parent]
            except (
                UnidentifiedImageError,
                Image.DecompressionBombError,
                OSError,
                SyntaxError,
                ValueError,
            ) as e:
                raise ValueError(
                    f"{files[i]}: not a readable image ({str(e).splitlines()[0]})"
                ) from None

        def name(self, i):
            return files[i]

    return Folder(), f"folder-{digest.hexdigest()[:16]}"


def _torchvision(name, split, root):
    sets = torchvision.datasets
    try:
        if name in ("cifar10", "cifar100"):
            cls = sets.CIFAR10 if name == "cifar10" else sets.CIFAR100
            return cls(root, train=split == "train", download=True)
        if name == "celeba":
            crop = torchvision.transforms.CenterCrop(140)  # ours: the usual crop to the face
            base = sets.CelebA(root, split=split, download=True, transform=crop)
        else:
            base = sets.LSUN(root, classes=[f"bedroom_{'train' if split == 'train' else 'val'}"])
    except Exception as e:  # network, quota, missing lmdb, broken archives: all end in one line
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise ValueError(
            f"--data {name}: could not be loaded or downloaded into {root}/ ({reason}); "
            "place it there, or use --data folder:PATH or --data synthetic"
        ) from None

    class Unlabelled:
        def __len__(self):
            return len(base)

        def __getitem__(self, i):
            return base[i][0], -1

    return Unlabelled()


def _cached(source, key, size, cache):
    """Decode `source` once into a memory-mapped array; memory stays bounded whatever its length."""
    path = cache / f"{key}-{size or 'native'}.npy"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        side = size or source[0][0].width
        tmp = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            images = np.lib.format.open_memmap(
                tmp, mode="w+", dtype=np.uint8, shape=(len(source), side, side, 3)
            )
            with open(
                tmp, "r+b"
            ) as f:  # a full disk is an error here, and a crash when a page of the map is written
                os.posix_fallocate(f.fileno(), 0, os.path.getsize(tmp))
            labels = np.empty(len(source), dtype=np.int64)

            def decode(i):
                image, labels[i] = source[i]
                if image.size != (side, side):
                    if size is None:
                        what = source.name(i) if hasattr(source, "name") else f"image {i}"
                        raise ValueError(
                            f"{what}: is {image.width}x{image.height}, not {side}x{side}; give --image-size"
                        )
                    image = _fit(image, side)
                images[i] = np.asarray(image)

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                for first in tqdm(
                    range(0, len(source), 1024), desc=f"decode {key}", unit="kimg", leave=False
                ):
                    list(pool.map(decode, range(first, min(first + 1024, len(source)))))
            images.flush()
            del images
            np.save(tmp.with_suffix(".labels.npy"), labels)
            os.replace(tmp.with_suffix(".labels.npy"), path.with_suffix(".labels.npy"))
            os.replace(tmp, path)
        finally:
            if tmp.exists():
                tmp.unlink()
    return np.load(path, mmap_mode="r"), np.load(path.with_suffix(".labels.npy"))


def _fit(image, side):
    """Shorter side to `side` (antialiased bicubic), then centre crop."""
    scale = side / min(image.size)
    image = image.resize(
        [max(side, round(scale * s)) for s in image.size], Image.Resampling.BICUBIC
    )
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


# ---------------------------------------------------------------------------------------------------------------------
# procedural butterflies


def synthetic_butterflies(n, size=32, seed=0):
    """n butterflies of synthetic.py -> images (n, size, size, 3) uint8, labels (n,) species 0..9.

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
