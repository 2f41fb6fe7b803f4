"""Where pictures come from: torchvision's sets, folders, and butterflies drawn here.

    images, labels = load_images("folder:cifar/train", image_size=16)  # (N, S, S, 3) uint8

Every set is decoded once into a memory-mapped uint8 array below ROOT/cache.
"""

import hashlib
import os
import re
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torchvision
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from outputs import read_arrays, reason, write_cache
from synthetic import synthetic_butterflies

NAMES = (
    "cifar10 | cifar100 | tiny-imagenet | celeba | lsun-bedroom | folder:PATH | synthetic | "
    "synthetic:N"
)
NATIVE_SIZE = dict(cifar10=32, cifar100=32, celeba=64, synthetic=32)
NATIVE_SIZE |= {"lsun-bedroom": 64, "tiny-imagenet": 64}
EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}
UNREADABLE = (
    UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError,
    UserWarning,
)  # fmt: skip


def load_images(name, image_size=None, split="train", root="data", labels_needed=False):
    """-> images (N, S, S, 3) uint8 (memory-mapped unless synthetic), labels (N,) int64 or None.

    name: one of NAMES; tiny-imagenet is ROOT/tiny-imagenet-200 as it is distributed, whose 200
    classes are numbered in the order of their names, and its test split is val. image_size: resized
    (antialiased bicubic, then centre crop) to S x S, default the set's own size. Raises
    ValueError with one line for bad input.
    """
    if image_size is not None and not 4 <= image_size <= 4096:
        raise ValueError(f"--image-size {image_size}: must lie in 4..4096")
    if re.fullmatch(r"synthetic(:\d+)?", name):
        n = int(name.partition(":")[2] or 5_000)
        if not 1 <= n <= 1_000_000:
            raise ValueError(f"--data {name}: needs 1 to 1,000,000 images")
        return synthetic_butterflies(
            n, image_size or NATIVE_SIZE["synthetic"], seed=0 if split == "train" else 1
        )
    if name.startswith("folder:"):
        source, key = _folder(name[len("folder:") :])
    elif name == "tiny-imagenet":
        source, key = _tiny_imagenet(Path(root) / "tiny-imagenet-200", split), f"{name}-{split}"
        image_size = image_size or NATIVE_SIZE[name]
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


def class_names(name):
    """The sub-folders with images of folder:PATH; None for a set that has its own classes."""
    kind, _, path = name.partition(":")
    if kind != "folder":
        return None
    files = [f for f in Path(path).rglob("*") if f.suffix.lower() in EXTENSIONS]
    return sorted({str(f.parent.relative_to(path)) for f in files})


def refuse_other_classes(what, known, name):
    """Raises ValueError where a label means another class in --data NAME than in `known`."""
    found = class_names(name)
    if isinstance(known, list) and found and sorted(map(str, known)) != found:
        wrong = min({*map(str, known)} ^ {*found}, default=found[0])
        raise ValueError(f"{what}: its classes are not those of {name}, such as {wrong!r}")


def to_rgb(image):
    """A Pillow image upright, of 8 bits and without alpha: what was transparent becomes white."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image, dtype=np.float64)
        top = 65535.0
        if image.mode == "F":
            top = 1.0 if values.max() <= 1 else 255.0
        if not (values.min() >= 0 and values.max() <= top):
            raise ValueError(f"values {values.min():g}..{values.max():g}, need 0..{top:g}")
        image = Image.fromarray((values * (255 / top)).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _folder(path):
    if not path:
        raise ValueError("--data folder: names no folder; write folder:PATH")
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"--data folder:{path}: no such folder")
    found = sorted(f for f in path.rglob("*") if f.is_file())
    files = [f for f in found if f.suffix.lower() in EXTENSIONS]
    if not files:
        raise ValueError(f"--data folder:{path}: holds no images ({', '.join(sorted(EXTENSIONS))})")
    if len(files) < len(found):
        others = ", ".join(sorted({f.suffix for f in found} - EXTENSIONS))
        left_out = len(found) - len(files)
        print(f"--data folder:{path}: {left_out} other files are left out ({others})")
    classes = sorted({f.parent for f in files})
    number = {c: (i if len(classes) > 1 else -1) for i, c in enumerate(classes)}
    digest = hashlib.sha256(b"3 %s\n" % os.fsencode(path.resolve()))  # 3: of `to_rgb` and `_read`
    for f in files:
        stat = f.stat()
        digest.update(os.fsencode(f.relative_to(path)))
        digest.update(f"|{stat.st_size}|{stat.st_mtime_ns}\n".encode())

    labels = [number[f.parent] for f in files]
    return Files(files, labels), f"folder-{digest.hexdigest()[:16]}"


class Files:
    """(image, label) of image files."""

    def __init__(self, files, labels):
        self.files = files
        self.labels = labels

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        try:
            with Image.open(self.files[i]) as image:
                return to_rgb(image), self.labels[i]
        except UNREADABLE as e:
            raise ValueError(f"{self.files[i]}: not a readable image ({reason(e)})") from None


def _tiny_imagenet(root, split):
    """ROOT/train/CLASS/images/*.JPEG; ROOT/val/images with the classes in val_annotations.txt."""
    if not (root / "train").is_dir():
        why = f"{root} holds no train/; unpack tiny-imagenet-200.zip there"
        raise ValueError(f"--data tiny-imagenet: {why}")
    classes = sorted(folder.name for folder in (root / "train").iterdir() if folder.is_dir())
    number = {name: i for i, name in enumerate(classes)}
    files, labels = [], []
    if split == "train":
        for name in classes:
            found = sorted((root / "train" / name / "images").glob("*.JPEG"))
            files += found
            labels += [number[name]] * len(found)
        return Files(files, labels)
    path = root / "val" / "val_annotations.txt"
    try:
        for line in path.read_text().splitlines():
            file, name, *_ = line.split("\t")
            files.append(root / "val" / "images" / file)
            labels.append(number[name])
    except (OSError, ValueError, KeyError) as e:
        raise ValueError(f"{path}: not the list of the val images ({e})") from None
    return Files(files, labels)


def no_label(target):
    return -1


def _torchvision(name, split, root):
    sets = torchvision.datasets
    try:
        if name in ("cifar10", "cifar100"):
            cls = sets.CIFAR10 if name == "cifar10" else sets.CIFAR100
            return cls(root, train=split == "train", download=True)
        if name == "celeba":
            crop = torchvision.transforms.CenterCrop(140)  # ours: the usual crop to the face
            own = dict(transform=crop, target_transform=no_label)
            return sets.CelebA(root, split=split, download=True, **own)
        part = "bedroom_train" if split == "train" else "bedroom_val"
        return sets.LSUN(root, classes=[part], target_transform=no_label)
    except Exception as e:  # network, quota, missing lmdb, broken archives: all end in one line
        raise ValueError(
            f"--data {name}: could not be loaded or downloaded into {root}/ ({reason(e)}); "
            "place it there, or use --data folder:PATH or --data synthetic"
        ) from None


def _cached(source, key, size, cache):
    """Decode `source` once into a memory-mapped array; memory stays bounded whatever its length."""
    path = cache / f"{key}-{size or 'native'}.npy"
    found = _read(path, len(source), size)
    if found is None:
        cache.mkdir(parents=True, exist_ok=True)
        for left in cache.glob(f"{path.stem}.*.tmp"):  # of decodings that were killed
            if time.time() - left.stat().st_mtime > 86400:
                left.unlink()
        tmp = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            labels = _decode(source, key, size, tmp)
            check = _checksum(np.load(tmp, mmap_mode="r"))
            write_cache(path.with_suffix(".labels.npz"), labels=labels, check=check)
            os.replace(tmp, path)
        finally:
            tmp.unlink(missing_ok=True)
        found = _read(path, len(source), size)
    return found


def _read(path, n, size):
    """(images, labels) of a cache; None where there is none, or a damaged one, which is removed."""
    if not path.exists():
        return None
    try:
        images = np.load(path, mmap_mode="r")
        labels, check = read_arrays(path.with_suffix(".labels.npz"), "labels", "check")
        side = size or images.shape[1]
        good = images.shape == (n, side, side, 3) and images.dtype == np.uint8
        if good and labels.shape == (n,) and check == _checksum(images):
            return images, labels
    except (ValueError, OSError, EOFError, IndexError):  # truncated, empty, no array
        pass
    print(f"{path}: damaged, decoded anew")
    path.unlink()
    return None


def _checksum(images):
    """Of up to 1,000 of the images and the last, so that large sets are not read as a whole."""
    some = images[:: len(images) // 1000 + 1]
    return zlib.crc32(images[-1].tobytes(), zlib.crc32(some.tobytes()))


def _decode(source, key, size, path):
    """The images of `source` as an .npy file at path -> labels (N,)."""
    n = len(source)
    side = size or source[0][0].width
    shape = (n, side, side, 3)
    images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    with open(path, "r+b") as f:  # a full disk is an error here, but a crash at a page of the map
        os.posix_fallocate(f.fileno(), 0, os.path.getsize(path))
    labels = np.empty(n, dtype=np.int64)

    def decode(i):
        image, labels[i] = source[i]
        if image.size != (side, side):
            if size is None:
                what = source.files[i] if isinstance(source, Files) else f"image {i}"
                found = f"{image.width}x{image.height}"
                raise ValueError(f"{what}: is {found}, not {side}x{side}; give --image-size")
            image = _fit(image, side)
        images[i] = np.asarray(image)

    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.filterwarnings("error", "Truncated|Tag data larger", UserWarning)  # Pillow's
        for first in tqdm(range(0, n, 1024), desc=f"decode {key}", unit="kimg", leave=False):
            list(pool.map(decode, range(first, min(first + 1024, n))))
    images.flush()
    return labels


def _fit(image, side):
    """Shorter side to `side` (antialiased bicubic), then centre crop."""
    scale = side / min(image.size)
    image = image.resize(
        [max(side, round(scale * s)) for s in image.size], Image.Resampling.BICUBIC
    )
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))
