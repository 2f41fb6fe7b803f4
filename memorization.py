"""Do the samples copy training images? Cosine similarity of features to the nearest training image.

    python memorization.py --samples ddpm/samples.npz robust/samples.npz --data cifar10              # P1 Fig. 6
    python memorization.py --samples ddpm/ckpt.pt robust/ckpt.pt --data cifar10 --n 50000 --sampler ddim --steps 100
    python memorization.py --samples samples --data folder:cifar10/train --test folder:cifar10/test --features pixels
    python memorization.py --bench 50000                                                    # time and memory of the search

The claim (P1 §3.2, Fig. 6): trained on clean images, Robust_adv has far fewer samples than DDPM whose DINOv2 similarity to
a training image is >= 0.9 ("the same image" there; >= 0.94 "nearly identical"). How similar two different images come out
depends on the features, so held-out images are searched in the same way (ours): the null, what a sampler that copies nothing
would show. The search is exact, and includes the training set's mirror images, since models are trained with flips (ours).

Leaves --out/histogram.png, pairs.png (the closest pairs), table.csv (counts with 95 % intervals), nearest.npz (per set:
similarity (n,), index (n,) into the training set, mirrored (n,)) and metrics.json.
"""

import argparse
import hashlib
import os
import resource
import sys
import time
import zipfile
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from tqdm import tqdm

import metrics
import runtime
from classifier import load_features
from data import NAMES, CorruptedImages, load_images
from runtime import load_checkpoint, setup
from sample import add_arguments, load_model, sample_uint8, sampler_options

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

NULL = "test images (null)"

# ---------------------------------------------------------------------------------------------------------------------
# features: networks as metrics.extract wants them, uint8 (B, 3, S, S) -> features (B, d), logits (B, 0)


class DINOv2(torch.nn.Module):
    """CLS token of DINOv2's ViT-B/14 (d = 768) at 224 px: bicubic, antialiased, clipped to [0, 1] (ours); no autocast.

    hub: a local clone of github.com/facebookresearch/dinov2, else torch.hub downloads it; weights: a local copy of
    dinov2_vitb14_pretrain.pth, likewise. Raises ValueError where neither can be had.
    """

    def __init__(self, hub=None, weights=None):
        super().__init__()
        state = load_checkpoint(weights) if weights else None
        try:
            self.vit = torch.hub.load(
                hub or "facebookresearch/dinov2",
                "dinov2_vitb14",
                source="local" if hub else "github",
                pretrained=state is None,
                verbose=False,
            )
            if state is not None and (
                missing := self.vit.load_state_dict(state, strict=False).missing_keys
            ):
                raise KeyError(f"{weights} lacks {missing[0]}")
        except Exception as e:  # no network, no hubconf.py, or weights of another network
            raise ValueError(
                f"DINOv2 could not be loaded ({(str(e) or type(e).__name__).splitlines()[0]}); give --dino-hub "
                "FOLDER, a clone of github.com/facebookresearch/dinov2, and --dino-weights PATH to "
                "dinov2_vitb14_pretrain.pth, or --features pixels"
            ) from None
        self.register_buffer(
            "mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
        )  # of ImageNet
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        self.eval()

    @torch.no_grad()
    def forward(self, x):
        x = F.interpolate(
            x.float() / 255, size=(224, 224), mode="bicubic", antialias=True, align_corners=False
        ).clamp(0, 1)
        f = self.vit((x - self.mean) / self.std)
        return f, f[:, :0]


class Pixels(torch.nn.Module):
    """Pixels minus the mean training image: without it every two images in [0, 1] have a cosine near 1."""

    def __init__(self, images, flips):
        super().__init__()
        total = sum(
            images[i : i + 10_000].sum(0, dtype=np.int64) for i in range(0, len(images), 10_000)
        )
        mean = torch.from_numpy(total / (255 * len(images))).permute(2, 0, 1)
        mean = (mean + mean.flip(2)) / 2 if flips else mean  # the mirror images are searched too
        self.register_buffer("mean", mean.float())

    def forward(self, x):
        f = (x.float() / 255 - self.mean).flatten(1)
        return f, f[:, :0]


def features_network(args, train):
    """-> the network, what it does in words, its key for the cache (None: too cheap to cache)."""
    if args.features == "pixels":
        return (
            Pixels(train, args.flips),
            f"pixels minus the mean training image{' and its mirror' if args.flips else ''}",
            None,
        )
    if (
        args.features != "dinov2"
    ):  # post-ReLU features share a large common direction: see the null before any threshold
        return (
            load_features(args.features),
            f"pooled features of {Path(args.features).name}",
            metrics.file_key(args.features),
        )
    network, key = DINOv2(args.dino_hub, args.dino_weights), hashlib.sha256()
    for v in (
        network.vit.state_dict().values()
    ):  # of the weights themselves: downloaded ones have no path
        key.update(v.contiguous().numpy())
    return (
        network,
        "DINOv2 ViT-B/14 CLS token; 224 px, bicubic, clipped, ImageNet mean and std",
        key.hexdigest(),
    )


def unit_features(network, images, args, device, desc, key=None):
    """Features of uint8 images (N, S, S, 3), divided by their norm -> (N, d) float32 tensor on the CPU.

    With a key, cached under it and every pixel. Raises ValueError for NaN or infinity.
    """
    path = None
    if key is not None:
        path = Path(args.data_root) / "cache" / f"features-{metrics.images_key(key, images)}.npy"
        if path.exists():
            return F.normalize(torch.from_numpy(np.load(path)))
    features, _ = metrics.extract(network, images, args.batch_size, device, f"features, {desc}")
    bad = (~np.isfinite(features).all(1)).sum()
    if bad:
        raise ValueError(
            f"{desc}: {bad} of {len(images)} images have NaN or infinite features (--features {args.features})"
        )
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        tmp = path.with_suffix(f".{os.getpid()}.tmp.npy")
        np.save(tmp, features)
        os.replace(tmp, path)
    return F.normalize(torch.from_numpy(features))


# ---------------------------------------------------------------------------------------------------------------------
# the search

TIE = 1e-6  # float32 products of one pair differ by less than this between one chunking and another


def nearest(queries, keys, chunk_q=2048, chunk_k=8192, device="cpu", desc="nearest"):
    """The key with the largest inner product, for unit rows queries (n, d), keys (m, d) float32 on the CPU.

    -> similarity (n,) float64, index (n,) int64. Exhaustive; holds chunk_q x chunk_k products at a time. Among keys that
    are equal to TIE the lowest index wins; the similarity is computed again in float64, and is the largest to within TIE.
    """
    if queries.shape[1] != keys.shape[1] or len(keys) < 1 or min(chunk_q, chunk_k) < 1:
        raise ValueError(
            f"nearest: queries {tuple(queries.shape)}, keys {tuple(keys.shape)}, chunks {chunk_q} and {chunk_k}"
        )
    index = torch.zeros(len(queries), dtype=torch.int64)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # no TF32: it rounds to 1e-3
    try:
        for i in tqdm(
            range(0, len(queries), chunk_q),
            desc=desc,
            unit="chunk",
            leave=False,
            disable=len(queries) <= chunk_q,
        ):
            q = queries[i : i + chunk_q].to(device)
            best = torch.full((len(q),), -torch.inf, device=device)
            where = torch.zeros(len(q), dtype=torch.int64, device=device)
            for j in range(0, len(keys), chunk_k):
                products = q @ keys[j : j + chunk_k].to(device).T  # (chunk_q, chunk_k)
                value = products.amax(1)
                first = (products >= value[:, None] - TIE).to(torch.uint8).argmax(1)
                better = value > best + TIE
                best, where = (
                    torch.where(better, value, best),
                    torch.where(better, first + j, where),
                )
            index[i : i + chunk_q] = where.cpu()
    finally:
        torch.set_float32_matmul_precision(precision)
    similarity = [
        (queries[i : i + 1024].double() * keys[index[i : i + 1024]].double()).sum(1)
        for i in range(0, len(queries), 1024)
    ]
    return torch.cat(similarity).clamp(-1, 1), index


def bench(n, device):
    """Time and peak memory of n x n random 768-d features, with 100 copies planted, which must be found."""
    g, copies = torch.Generator().manual_seed(0), min(n, 100)
    queries, keys = (F.normalize(torch.randn(n, 768, generator=g)) for _ in range(2))
    queries[:copies] = keys[n - copies :]
    started = time.time()
    similarity, index = nearest(queries, keys, device=device, desc=f"{n} x {n}")
    seconds = time.time() - started
    found = (
        ((index[:copies] == torch.arange(n - copies, n)) & (similarity[:copies] > 1 - TIE))
        .sum()
        .item()
    )
    # of the process, features and libraries included; ru_maxrss counts KiB on Linux, bytes on macOS
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    numbers = dict(search_seconds=seconds, peak_memory_MB=peak / 1e6, planted=copies, found=found)
    return numbers | (
        dict(peak_gpu_MB=torch.cuda.max_memory_allocated(device) / 1e6)
        if device.type == "cuda"
        else {}
    )


def counts(similarity, thresholds):
    """Per threshold: how many similarities (n,) reach it, their share, its 95 % interval (Clopper and Pearson's, exact)."""
    n, hits = len(similarity), [int((similarity >= t).sum()) for t in thresholds]
    intervals = [binomtest(k, n).proportion_ci(0.95, method="exact") for k in hits]
    return [
        dict(threshold=t, count=k, share=k / n, low=c.low, high=c.high)
        for t, k, c in zip(thresholds, hits, intervals)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# what is compared


def open_samples(path, args, options, device):
    """--samples PATH -> its name, image size S, and a function that gives the images (n, S, S, 3) uint8."""
    path = Path(path).resolve()
    name = (
        path.name
        if path.is_dir()
        else path.parent.name
        if path.name in ("samples.npz", "ckpt.pt")
        else path.stem
    )
    if path.suffix == ".pt" or (path / "config.json").is_file():
        model, size, _ = load_model(path, args, device)
        return (
            name,
            size,
            lambda: sample_uint8(model, size, args.n or 50_000, args, options, device, 0, 1),
        )
    if path.is_dir() and not (path / "samples.npz").is_file():
        try:
            images, _ = load_images(f"folder:{path}", root=args.data_root)
        except ValueError as e:
            raise ValueError(
                str(e).replace("--data folder:", "--samples ").replace("; give --image-size", "")
            ) from None
    else:
        try:
            with np.load(path / "samples.npz" if path.is_dir() else path) as f:
                images = f["images"]
            if (
                images.dtype != np.uint8
                or not len(images)
                or images.shape[1:] != (images.shape[1], images.shape[1], 3)
            ):
                raise ValueError(f"`images` is {images.dtype} {images.shape}")
        except (
            KeyError,
            IndexError,
            TypeError,
            ValueError,
            OSError,
            EOFError,
            zipfile.BadZipFile,
        ) as e:
            raise ValueError(
                f"--samples {path}: need a folder of images, a checkpoint .pt, or an .npz with uint8 `images` of "
                f"shape (n, S, S, 3), n >= 1 ({str(e).splitlines()[0]})"
            ) from None
    return name, images.shape[1], lambda: images[: args.n]


def as_trained_on(images, p, sigma, seed):
    """The corrupted training images (data.py), rounded and clipped to uint8."""
    data, n = CorruptedImages(images, None, p, sigma, seed), len(images)
    return np.concatenate(
        [
            metrics.to_uint8(data.batch(torch.arange(i, min(i + 1000, n))))
            .permute(0, 2, 3, 1)
            .numpy()
            for i in range(0, n, 1000)
        ]
    )


# ---------------------------------------------------------------------------------------------------------------------
# figures


def histogram(results, thresholds, title, path):
    """Fig. 6 of P1, and beside it the share of images above each similarity. results: name -> (n,) similarities."""
    fig, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    bins = np.linspace(min(0.9, *(s.min() for s in results.values())), 1, 51)
    for i, (name, s) in enumerate(results.items()):
        colour, dash = (
            ("0.45", "-")
            if name == NULL
            else (runtime.COLOURS[i % 7], ["-", "--", ":"][i // 7 % 3])
        )
        fill = dict(histtype="stepfilled", fc="0.85") if name == NULL else dict(histtype="step")
        axes[0].hist(
            s,
            bins,
            weights=np.full(len(s), 1 / len(s)),
            ec=colour,
            ls=dash,
            lw=1.6,
            label=f"{name}, n = {len(s)}",
            **fill,
        )
        axes[1].ecdf(s, complementary=True, color=colour, ls=dash, lw=1.6)
    bottom = 0.7 / max(len(s) for s in results.values())
    for ax, what in zip(
        axes,
        (f"share of the images per bin of {bins[1] - bins[0]:.3f}", "share of the images above"),
    ):
        for i, t in enumerate(thresholds):
            ax.axvline(
                t,
                color="k",
                lw=0.8,
                ls=":",
                label=f"thresholds {', '.join(map(str, thresholds))}" * (i == 0) or None,
            )
        ax.set(
            yscale="log",
            ylim=(bottom, 1.5),
            xlabel="cosine similarity to the nearest training image",
            ylabel=what,
        )
        ax.spines[["top", "right"]].set_visible(False)
    fig.legend(
        *axes[0].get_legend_handles_labels(),
        fontsize=9,
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )
    fig.suptitle(title, fontsize=10)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def pairs(sets, train, title, path, columns=8):
    """The closest pairs of each set: name -> (images, similarity, index, mirrored); a sample above its training image."""
    side, pad = train.shape[1], max(1, train.shape[1] // 16)
    fig, axes = plt.subplots(
        len(sets), 1, figsize=(9, 2.75 * len(sets) + 0.4), squeeze=False, layout="constrained"
    )
    for ax, (name, (images, similarity, index, mirrored)) in zip(axes[:, 0], sets.items()):
        canvas = np.full((2 * side + pad, columns * (side + pad) - pad, 3), 255, np.uint8)
        chosen = torch.argsort(similarity, descending=True, stable=True)[:columns].tolist()
        for k, i in enumerate(chosen):
            key = train[int(index[i])]
            canvas[:side, k * (side + pad) :][:, :side] = images[i]
            canvas[side + pad :, k * (side + pad) :][:, :side] = (
                key[:, ::-1] if mirrored[i] else key
            )
        ax.imshow(canvas, interpolation="nearest")
        ax.xaxis.tick_top()
        ax.set_xticks(
            [k * (side + pad) + side / 2 - 0.5 for k in range(len(chosen))],
            [f"{similarity[i]:.3f}" + "\nmirrored" * bool(mirrored[i]) for i in chosen],
            fontsize=9,
        )
        ax.set_yticks(
            [side / 2 - 0.5, 1.5 * side + pad - 0.5],
            ["test image" if name == NULL else "sample", "nearest\ntraining image"],
            fontsize=9,
        )
        ax.tick_params(length=0)
        ax.set_frame_on(False)
        ax.set_title(name, fontsize=10, loc="left")
    fig.suptitle(title, fontsize=9)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        conflict_handler="resolve",
    )
    add = parser.add_argument
    add_arguments(parser)
    add(
        "--samples",
        nargs="+",
        metavar="PATH",
        help="folders of images, sample.py's samples.npz, or checkpoints to sample",
    )
    add(
        "--names",
        nargs="+",
        metavar="NAME",
        help="one per sample, for figures and table; default: of the folder or file",
    )
    add("--data", metavar="NAME", help="training set: " + NAMES)
    add(
        "--test",
        metavar="NAME",
        help="held-out set of the null; default: the test split of --data; folder:PATH needs it",
    )
    add(
        "--null",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="search the held-out images as well",
    )
    add(
        "--p",
        type=float,
        default=0.0,
        help="with --sigma: compare against the images as trained on, default the clean ones",
    )
    add("--sigma", type=float, default=0.0)
    add("--data-seed", type=int, default=0, help="the --seed of that training")
    add(
        "--image-size",
        type=int,
        metavar="S",
        help="of the training set and of checkpoints; default: the set's own",
    )
    add("--features", default="dinov2", help="dinov2 | pixels | a checkpoint of classifier.py")
    add("--dino-hub", metavar="FOLDER", help="a local clone of github.com/facebookresearch/dinov2")
    add("--dino-weights", metavar="PATH", help="dinov2_vitb14_pretrain.pth, a local copy")
    add(
        "--flips",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="search mirror images of the training set too",
    )
    add("--thresholds", type=float, nargs="+", default=[0.9, 0.94, 0.95, 0.99])
    add(
        "--n",
        type=int,
        help="images: of a checkpoint 50,000 by default, else the first n of those there",
    )
    add("--steps", type=int, help="default: ddpm 1000, ddim 100, heun 18")
    add("--bench", type=int, metavar="N", help="only time the search, on N x N random features")
    add("--out", default="out_memorization")
    args = parser.parse_args()
    started = time.time()
    if min(v for v in (args.batch_size, args.n, args.bench, 1) if v is not None) < 1:
        raise ValueError(
            f"--batch-size {args.batch_size} --n {args.n} --bench {args.bench}: all must be at least 1"
        )
    if args.inception_weights:
        raise ValueError("--inception-weights: no Inception here; see --features")
    options = sampler_options(args, args.steps, "respaced")
    device, _, world = setup(args.device)
    if world > 1:
        raise ValueError(
            "torchrun: this runs in one process; sample with sample.py under torchrun and give its samples.npz"
        )
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if args.bench:
        numbers = bench(args.bench, device)
        runtime.write_metrics(out, started, seed=0, device=device, n=args.bench, d=768, **numbers)
        return print(", ".join(f"{k} {v:.4g}" for k, v in numbers.items()))

    if not args.samples or not args.data:
        raise ValueError("give --samples PATH and --data NAME, the training set")
    if args.null and args.data.startswith("folder:") and args.test in (None, args.data):
        raise ValueError(
            f"--data {args.data}: give --test, other images for the null, or say --no-null"
        )
    if bool(args.p) != bool(args.sigma):
        raise ValueError(f"--p {args.p} --sigma {args.sigma}: give both, or neither")
    samples = [open_samples(path, args, options, device) for path in args.samples]
    names = args.names or [name for name, _, _ in samples]
    if len(set(names) | {NULL}) <= len(names) or len(names) != len(samples):
        raise ValueError(
            f"--names: need {len(samples)} different names, one per sample, not {' '.join(names)}"
        )
    train, _ = load_images(args.data, args.image_size, root=args.data_root)
    test = (
        load_images(args.test or args.data, args.image_size, "test", args.data_root)[0]
        if args.null
        else None
    )
    sizes = zip(
        [*args.samples, "--test"],
        [size for _, size, _ in samples] + ([test.shape[1]] if args.null else []),
    )
    for path, size in sizes:
        if size != train.shape[1]:
            raise ValueError(
                f"{path}: images of {size} x {size}, --data of {train.shape[1]} x {train.shape[1]}; "
                f"give --image-size {size}"
            )
    if args.p:
        train = as_trained_on(train, args.p, args.sigma, args.data_seed)
    network, description, key = features_network(args, train)
    sets = {name: images() for name, (_, _, images) in zip(names, samples)} | (
        {NULL: test} if args.null else {}
    )

    key = key and f"{description}|{key}"
    keys = unit_features(network, train, args, device, "training images", key)
    if args.flips:
        keys = torch.cat(
            [keys, unit_features(network, train[:, :, ::-1], args, device, "mirror images", key)]
        )
    results, numbers, lines = {}, {}, ["name,n,threshold,count,share,low,high"]
    for name, images in sets.items():
        queries = unit_features(network, images, args, device, name, key if name == NULL else None)
        similarity, index = nearest(queries, keys, device=device, desc=f"nearest, {name}")
        results[name] = images, similarity, index % len(train), index >= len(train)
        rows = counts(similarity, args.thresholds)
        numbers[name] = dict(
            n=len(images),
            median=similarity.median().item(),
            max=similarity.max().item(),
            counts=rows,
        )
        lines += [
            f"{name},{len(images)}," + ",".join(f"{v:.6g}" for v in row.values()) for row in rows
        ]
    (out / "table.csv").write_text("\n".join(lines) + "\n")
    np.savez_compressed(
        out / "nearest.npz",
        **{
            f"{name}/{k}": v.numpy()
            for name, r in results.items()
            for k, v in zip(("similarity", "index", "mirrored"), r[1:])
        },
    )
    title = (
        f"{len(train)} {'corrupted ' if args.p else ''}training images{' and their mirror images' if args.flips else ''}, "
        f"{train.shape[1]} x {train.shape[1]}\n{description}"
    )
    histogram(
        {name: r[1].numpy() for name, r in results.items()},
        args.thresholds,
        title,
        out / "histogram.png",
    )
    pairs(results, train, title, out / "pairs.png")
    runtime.write_metrics(
        out,
        started,
        seed=args.seed,
        device=device,
        n={name: v["n"] for name, v in numbers.items()},
        n_train=len(train),
        image_size=train.shape[1],
        flips=args.flips,
        p=args.p,
        sigma=args.sigma,
        features=description,
        samples=dict(zip(names, args.samples)),
        results=numbers,
        sampler_if_sampled=dict(options, sampler=args.sampler),
    )
    print("\n".join(lines) + f"\n-> {out}/histogram.png, pairs.png")


if __name__ == "__main__":
    runtime.cli(main)
