"""Do the samples copy training images? Cosine similarity to the nearest training image.

    python memorization.py --samples ddpm/samples.npz robust/samples.npz --data cifar10  # P1 Fig. 6
    python memorization.py --samples ddpm/ckpt.pt robust/ckpt.pt --data cifar10 --sampler ddim
    python memorization.py --samples out --data folder:train --test folder:test --features pixels

The claim (P1 §3.2, Fig. 6): trained on clean images, Robust_adv has far fewer samples than DDPM
whose DINOv2 similarity to a training image is >= 0.9 ("the same image" there; >= 0.94 "nearly
identical"). How similar two different images come out depends on the features, so held-out images
are searched too: the null, what a sampler that copies nothing would show. The search is exact, and
includes the mirror images of the training set, as models are trained with flips (both ours).

Leaves --out/histogram.png, pairs.png (the closest pairs), table.csv (counts with 95 % intervals),
nearest.npz (per set: similarity (n,), index (n,) into the training set, mirrored (n,)) and
metrics.json.
"""

import argparse
import hashlib
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import metrics
import outputs
import runtime
from classifier import load_features
from features import DINOv2, Pixels
from images import NAMES, load_images
from outputs import plt
from runtime import between, setup
from sample import add_arguments, load_model, sample_uint8, sampler_options
from samplers import own_flags

NULL = "test images (null)"


class Found(NamedTuple):
    """A set of images and the nearest training image of each."""

    images: np.ndarray  # (n, S, S, 3) uint8
    similarity: torch.Tensor  # (n,) float64
    index: torch.Tensor  # (n,) int64, into the training set
    mirrored: torch.Tensor  # (n,) bool


# --------------------------------------------------------------------------------------------------
# features


def search_features(args, train):
    """-> the network, what it does in words, its key for the cache (None: too cheap to cache)."""
    if args.features == "pixels":
        of = "training image and its mirror" if args.flips else "training image"
        return Pixels(train, args.flips), f"pixels minus the mean {of}", None
    if args.features == "dinov2":
        network = DINOv2(args.dino_hub, args.dino_weights)
        key = hashlib.sha256()
        for v in network.vit.state_dict().values():  # the weights: downloaded ones have no path
            key.update(v.contiguous().numpy())
        description = "DINOv2 ViT-B/14 CLS token; 224 px, bicubic, clipped, ImageNet mean and std"
        return network, description, key.hexdigest()
    # post-ReLU features share a large common direction: see the null before any threshold
    description = f"pooled features of {Path(args.features).name}"
    return load_features(args.features), description, metrics.file_key(args.features)


def unit_features(network, images, args, device, desc, key=None):
    """Features of uint8 images (N, S, S, 3), divided by their norm -> (N, d) float32 on the CPU.

    With a key, cached under it and every pixel. Raises ValueError for NaN or infinity.
    """
    path = None
    if key is not None:
        path = Path(args.data_root) / "cache" / f"features-{metrics.images_key(key, images)}.npz"
        found = outputs.read_cache(path, "features")
        if found:
            return F.normalize(torch.from_numpy(found[0]))
    features, _ = metrics.extract(network, images, args.batch_size, device, f"features, {desc}")
    bad = (~np.isfinite(features).all(1)).sum()
    if bad:
        what = f"NaN or infinite features (--features {args.features})"
        raise ValueError(f"{desc}: {bad} of {len(images)} images have {what}")
    if path is not None:
        outputs.write_cache(path, features=features)
    return F.normalize(torch.from_numpy(features))


# --------------------------------------------------------------------------------------------------
# the search

TIE = 1e-6  # float32 products of a pair differ by less between one chunking and another


def nearest(queries, keys, chunk_q=2048, chunk_k=8192, device="cpu", desc="nearest"):
    """The key with the largest inner product: unit rows queries (n, d), keys (m, d), float32, CPU.

    -> similarity (n,) float64, index (n,) int64. Exhaustive; holds chunk_q x chunk_k products at a
    time. Among keys that are equal to TIE the lowest index wins; the similarity is computed again
    in float64, and is the largest to within TIE.
    """
    if queries.shape[1] != keys.shape[1] or len(keys) < 1 or min(chunk_q, chunk_k) < 1:
        raise ValueError(
            f"nearest: queries {tuple(queries.shape)}, keys {tuple(keys.shape)}, "
            f"chunks {chunk_q} and {chunk_k}"
        )
    index = torch.zeros(len(queries), dtype=torch.int64)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # no TF32: it rounds to 1e-3
    try:
        chunks = range(0, len(queries), chunk_q)
        for i in tqdm(chunks, desc, unit="chunk", leave=False, disable=len(chunks) <= 1):
            q = queries[i : i + chunk_q].to(device)
            best = torch.full((len(q),), -torch.inf, device=device)
            where = torch.zeros(len(q), dtype=torch.int64, device=device)
            for j in range(0, len(keys), chunk_k):
                products = q @ keys[j : j + chunk_k].to(device).T  # (chunk_q, chunk_k)
                value = products.amax(1)
                first = (products >= value[:, None] - TIE).to(torch.uint8).argmax(1)
                better = value > best + TIE
                best = torch.where(better, value, best)
                where = torch.where(better, first + j, where)
            index[i : i + chunk_q] = where.cpu()
    finally:
        torch.set_float32_matmul_precision(precision)
    similarity = torch.zeros(len(queries), dtype=torch.float64)
    for i in range(0, len(queries), 1024):
        rows = slice(i, i + 1024)
        similarity[rows] = (queries[rows].double() * keys[index[rows]].double()).sum(1)
    return similarity.clamp(-1, 1), index


def counts(similarity, thresholds):
    """Per threshold: how many similarities (n,) reach it, their share, its 95 % interval."""
    n = len(similarity)
    rows = []
    for threshold in thresholds:
        hits = int((similarity >= threshold).sum())
        low, high = metrics.clopper_pearson(hits, n)
        rows.append(dict(threshold=threshold, count=hits, share=hits / n, low=low, high=high))
    return rows


# --------------------------------------------------------------------------------------------------
# what is compared


def is_checkpoint(path):
    """Also a folder of train.py, unless it is sampled already, or of diffusers."""
    inside = any((path / name).is_file() for name in ("ckpt.pt", "config.json"))
    return path.suffix == ".pt" or (inside and not (path / "samples.npz").is_file())


def open_samples(path, args, options, device):
    """--samples PATH -> its name, image size S, a function that gives images (n, S, S, 3) uint8."""
    if not Path(path).exists():
        raise ValueError(f"--samples {path}: no such folder, checkpoint or .npz file")
    path = Path(path).resolve()
    if path.is_dir():
        name = path.name
    else:
        name = path.parent.name if path.name in ("samples.npz", "ckpt.pt") else path.stem
    if is_checkpoint(path):
        model, size, _ = load_model(path, args, device)
        n = args.n or 50_000

        def sampled():
            images = sample_uint8(model, size, n, args, options, device, 0, 1)
            if len(images) < n:  # Ctrl-C: no table of a part
                raise KeyboardInterrupt
            return images

        return name, size, sampled
    if path.is_dir() and not (path / "samples.npz").is_file():
        try:
            images = load_images(f"folder:{path}", root=args.data_root)[0]  # never resized
        except ValueError as e:
            why = str(e).removesuffix("; give --image-size")
            raise ValueError(f"--samples {path}: {why}") from None
    else:
        images = read_npz(path / "samples.npz" if path.is_dir() else path)
    return name, images.shape[1], lambda: images[: args.n]


def read_npz(path):
    (images,) = outputs.read_arrays(path, "images")
    square = images.ndim == 4 and images.shape[1:] == (images.shape[1], images.shape[1], 3)
    if images.dtype != np.uint8 or not len(images) or not square:
        found = f"{images.dtype} {images.shape}"
        raise ValueError(f"{path}: `images` is {found}, need uint8 (n, S, S, 3), n >= 1")
    return images


# --------------------------------------------------------------------------------------------------
# figures


def histogram(results, thresholds, title, path):
    """Fig. 6 of P1, and beside it the share of images above each similarity."""
    fig, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    similarities = {name: found.similarity.numpy() for name, found in results.items()}
    bins = np.linspace(min(0.9, *(s.min() for s in similarities.values())), 1, 51)
    by_label = {label: method for method, (_, label) in outputs.METHOD_STYLE.items()}
    styles = outputs.styles({name: by_label.get(name) for name in results if name != NULL})
    for name, s in similarities.items():
        colour, fill = "0.45", dict(histtype="stepfilled", fc="0.85")
        if name != NULL:
            colour, fill = styles[name][0], dict(histtype="step")
        share = np.full(len(s), 1 / len(s))
        label = f"{name}, n = {len(s)}"
        axes[0].hist(s, bins, weights=share, ec=colour, lw=1.6, label=label, **fill)
        axes[1].ecdf(s, complementary=True, color=colour, lw=1.6)
    axes[0].set_ylabel(f"share of the images per bin of {bins[1] - bins[0]:.3f}")
    axes[1].set_ylabel("share of the images above")
    bottom = 0.7 / max(len(s) for s in similarities.values())
    for ax in axes:
        for t in thresholds:
            line = ax.axvline(t, color="k", lw=0.8, ls=":")
        ax.set(yscale="log", ylim=(bottom, 1.5), xlabel="cosine, nearest training image")
    handles, labels = axes[0].get_legend_handles_labels()
    handles.append(line)
    labels.append(f"thresholds {', '.join(map(str, thresholds))}")
    fig.legend(handles, labels, fontsize=9, loc="outside lower center", ncols=4, frameon=False)
    fig.suptitle(title, fontsize=10)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def pairs(results, train, title, path, columns=8):
    """The closest pairs of each set: a sample above its training image."""
    side = train.shape[1]
    pad = max(1, side // 16)
    size = (9, 2.75 * len(results) + 0.4)
    fig, axes = plt.subplots(len(results), 1, figsize=size, squeeze=False, layout="constrained")
    for ax, (name, found) in zip(axes[:, 0], results.items()):
        canvas = np.full((2 * side + pad, columns * (side + pad) - pad, 3), 255, np.uint8)
        order = torch.argsort(found.similarity, descending=True, stable=True)
        labels = []
        for k, i in enumerate(order[:columns].tolist()):
            key = train[int(found.index[i])]
            if found.mirrored[i]:
                key = key[:, ::-1]
            left = k * (side + pad)
            canvas[:side, left : left + side] = found.images[i]
            canvas[side + pad :, left : left + side] = key
            mirrored = "\nmirrored" if found.mirrored[i] else ""
            labels.append(f"{found.similarity[i]:.3f}{mirrored}")
        ax.imshow(canvas, interpolation="nearest")
        ax.xaxis.tick_top()
        middle = side / 2 - 0.5
        ax.set_xticks([middle + k * (side + pad) for k in range(len(labels))], labels, fontsize=9)
        rows = ["test image" if name == NULL else "sample", "nearest\ntraining image"]
        ax.set_yticks([middle, middle + side + pad], rows, fontsize=9)
        ax.set_frame_on(False)
        ax.set_title(name, fontsize=10, loc="left")
    fig.suptitle(title, fontsize=9)
    fig.savefig(path, dpi=110)
    plt.close(fig)


# --------------------------------------------------------------------------------------------------
# the command


def parse():
    parser = runtime.parser(__doc__, conflict_handler="resolve")
    add = parser.add_argument
    add_arguments(parser)
    count = between(1, kind=int)
    yes = dict(action=argparse.BooleanOptionalAction, default=True)
    paths = "folders of images, sample.py's samples.npz, or checkpoints to sample"
    add("--samples", nargs="+", required=True, metavar="PATH", help=paths)
    add("--names", nargs="+", metavar="NAME", help="one per sample; default: of the folder or file")
    add("--data", required=True, metavar="NAME", help="training set: " + NAMES)
    add("--test", metavar="NAME", help="set of the null; default: --data's test split")
    add("--null", **yes, help="search the held-out images as well")
    size = between(4, 4096, int)
    add("--image-size", type=size, metavar="S", help="of the training set and of checkpoints")
    add("--features", default="dinov2", help="dinov2 | pixels | a checkpoint of classifier.py")
    add("--dino-hub", metavar="FOLDER", help="a clone of github.com/facebookresearch/dinov2")
    add("--dino-weights", metavar="PATH", help="a copy of dinov2_vitb14_pretrain.pth")
    add("--flips", **yes, help="search mirror images of the training set too")
    add("--thresholds", type=between(-1, 1), nargs="+", default=[0.9, 0.94, 0.95, 0.99])
    add("--batch-size", type=count, default=250, help="changes memory and speed, not the images")
    add("--n", type=count, help="images: of a checkpoint 50,000, else the first n of those there")
    add("--steps", type=int, help="default: ddpm 1000, ddim 100, heun 18")
    add("--out", default="out_memorization")
    args = parser.parse_args()
    if args.inception_weights:
        raise ValueError("--inception-weights: no Inception here; see --features")
    runtime.refuse_repeats(args, "thresholds")
    idle = runtime.idle_flags(parser)
    idle(not args.null, "test", "with --no-null")
    idle(args.features != "dinov2", "dino_hub dino_weights", "without --features dinov2")
    of_checkpoints = " ".join(["sampler steps no_clip raw seed compile amp", *own_flags()])
    unsampled = not any(is_checkpoint(Path(path)) for path in args.samples)
    idle(unsampled, of_checkpoints, "without a checkpoint among --samples")
    if args.null and args.data.startswith("folder:") and args.test in (None, args.data):
        raise ValueError(f"--data {args.data}: give --test, other images, or say --no-null")
    return args, sampler_options(args, args.steps, "respaced")


def load_sets(args, options, device):
    """-> {name: a function that gives the images}, the null among them, and the training images."""
    samples = [open_samples(path, args, options, device) for path in args.samples]
    names = args.names or [name for name, _, _ in samples]
    if len(set(names)) < len(names) or NULL in names or len(names) != len(samples):
        need = f"need {len(samples)} different names, one per sample"
        raise ValueError(f"--names: {need}, not {' '.join(names)}")
    train, _ = load_images(args.data, args.image_size, root=args.data_root)
    sets = {name: images for name, (_, _, images) in zip(names, samples)}
    sizes = {path: size for path, (_, size, _) in zip(args.samples, samples)}
    if args.null:
        test, _ = load_images(args.test or args.data, args.image_size, "test", args.data_root)
        sets[NULL] = lambda: test
        sizes["--test"] = test.shape[1]
    for path, size in sizes.items():
        if size != train.shape[1]:
            what = f"images of {size} x {size}, but --data of {train.shape[1]}"
            raise ValueError(f"{path}: {what}; give --image-size {size}")
    return sets, train


def search(sets, train, network, key, args, device):
    """-> {name: Found}: each set's nearest training images."""
    keys = unit_features(network, train, args, device, "training images", key)
    if args.flips:
        mirror = unit_features(network, train[:, :, ::-1], args, device, "mirror images", key)
        keys = torch.cat([keys, mirror])
    results = {}
    for name, get in sets.items():
        images = get()
        queries = unit_features(network, images, args, device, name, key if name == NULL else None)
        similarity, index = nearest(queries, keys, device=device, desc=f"nearest, {name}")
        results[name] = Found(images, similarity, index % len(train), index >= len(train))
    return results


def main():
    started = time.time()
    args, options = parse()
    device, _, _ = setup(args.device, compiled=args.compile)
    out = outputs.claim(args.out)
    sets, train = load_sets(args, options, device)
    network, description, key = search_features(args, train)
    results = search(sets, train, network, key and f"{description}|{key}", args, device)

    numbers, rows, arrays = {}, [], {}
    for name, found in results.items():
        n = len(found.images)
        similarity = found.similarity
        numbers[name] = dict(n=n, median=similarity.median().item(), max=similarity.max().item())
        numbers[name]["counts"] = counts(similarity, args.thresholds)
        rows += [dict(name=name, n=n) | row for row in numbers[name]["counts"]]
        for part in ("similarity", "index", "mirrored"):
            arrays[f"{name}/{part}"] = getattr(found, part).numpy()
    outputs.write_table(out / "table.csv", rows)
    np.savez_compressed(out / "nearest.npz", **arrays)
    size = train.shape[1]
    mirrors = " and their mirror images" if args.flips else ""
    title = f"{len(train)} training images{mirrors}, {size} x {size}\n{description}"
    histogram(results, args.thresholds, title, out / "histogram.png")
    pairs(results, train, title, out / "pairs.png")
    settings = dict(flips=args.flips, samples=args.samples, n_train=len(train), image_size=size)
    settings |= dict(features=description, results=numbers)
    settings["sampler_if_sampled"] = dict(options, sampler=args.sampler)
    n = {name: v["n"] for name, v in numbers.items()}
    outputs.write_metrics(out, started, seed=args.seed, device=device, n=n, **settings)
    print((out / "table.csv").read_text() + f"-> {out}/histogram.png, pairs.png")


if __name__ == "__main__":
    runtime.cli(main)
