"""Sample a checkpoint with DDPM, DDIM or EDM's Heun sampler, and score the samples.

    python sample.py --ckpt out/ckpt.pt --n 64 --sampler ddim --steps 100 --out samples
    python sample.py --ckpt out/ckpt.pt --fid                          # FID and IS of 10,000 images
    torchrun --nproc-per-node 8 -- sample.py --ckpt out/ckpt.pt --n 50000 --fid

Leaves --out/images/*.png (a folder `python -m pytorch_fid` reads), samples.npz, grid.png and
metrics.json. Image i is a function of --seed and i alone, whatever the batch size and the number of
processes. Several samples at once: compare.py. The samplers themselves: samplers.py.
"""

import argparse
import math
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import metrics
import outputs
import runtime
import weights
from classifier import load_features
from data import load_images, to_float
from ddpmpp import DDPMpp
from losses import NoiseSchedule
from rng import image_noise
from runtime import SEED, autocast, between, flag, layout, load_checkpoint, precision, setup
from samplers import SAMPLERS, own_flags
from unet import UNet

# --------------------------------------------------------------------------------------------------
# flags


FID_FLAGS = "features inception_weights"  # which --fid alone reads
COMPARED = 10_000  # images of either set at most in `diversity`, which compares all pairs


def add_arguments(parser):
    """The flags that every script which samples shares."""
    add = parser.add_argument
    kinds = "; ".join(f"{name}: {what}" for name, (_, _, what) in SAMPLERS.items())
    add("--sampler", choices=SAMPLERS, default="ddpm", help=kinds)
    for name, (default, owner) in own_flags().items():
        boolean = argparse.BooleanOptionalAction
        kind = dict(action=boolean) if isinstance(default, bool) else dict(type=type(default))
        add(
            flag(name), dest=name, default=default, help=f"{owner} alone; default {default}", **kind
        )
    add("--no-clip", action="store_true", help="do not clip x^_0 to [-1, 1]")
    add("--raw", action="store_true", help="raw instead of EMA weights")
    size = between(4, 4096, int)
    count = between(1, kind=int)
    add("--image-size", type=size, help="default: the size the checkpoint was trained at")
    add("--batch-size", type=count, default=250, help="changes memory and speed, not the images")
    add("--seed", type=SEED, default=0)
    add("--device", default="auto", help="auto | cpu | cuda | cuda:N")
    add("--amp", choices=["auto", "bf16", "fp16", "fp32"], default="auto")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default: on a GPU")
    add("--data", metavar="NAME", help="reference set of --fid; default: that of the training")
    add("--data-root", default="data")
    add("--features", metavar="CHECKPOINT", help="Fréchet distance in its features instead of FID")
    add("--inception-weights", metavar="PATH", help="pt_inception-2015-12-05-6726825d.pth")


def sampler_options(args, steps, spacing):
    """The keyword arguments of args.sampler's function; refuses values and flags without sense for
    it.
    """
    function, flags, _ = SAMPLERS[args.sampler]
    options = dict(flags, clip=not args.no_clip)
    for name, (default, owner) in own_flags().items():
        value = getattr(args, name, default)
        if name in flags:
            options[name] = value
        elif value != default:
            raise ValueError(f"{flag(name)} {value}: is for --sampler {owner}")
    if steps is not None:
        options["steps"] = steps
    if "spacing" in flags:
        options["spacing"] = spacing
    elif spacing != "respaced":
        raise ValueError(f"--spacing {spacing}: is for --sampler ddpm")
    one = torch.zeros(1, 1)  # a sample of one number, by a network that answers 0, tries them out
    function(lambda x, t: x * 0, NoiseSchedule(), one, noise=lambda i: one, **options)
    return options


# --------------------------------------------------------------------------------------------------
# images


def generate(model, schedule, index, shape, seed, device, sampler="ddpm", **options):
    """Images number index (B,) of the sample `seed` -> x_0 (B, *shape), each a function of (seed,
    i).
    """
    index = torch.as_tensor(index, device=device)

    def noise(stream):
        return image_noise(seed, index, stream, shape).contiguous(memory_format=torch.channels_last)

    function, flags, _ = SAMPLERS[sampler]
    options = dict(flags, compiled=index.is_cuda) | options
    return function(model, schedule, noise(0), noise=lambda i: noise(i + 1), **options)


def checkpoint_in(path):
    """PATH/ckpt.pt of a folder of train.py, else PATH."""
    inside = Path(path, "ckpt.pt")
    return inside if inside.is_file() else path


def load_model(path, args, device, graphs=True):
    """(model ready to sample, image size, training settings) of a checkpoint or a folder of
    train.py, of ddpmpp.py or of diffusers. graphs: CUDA graphs, whose outputs the next call
    overwrites.
    """
    path = checkpoint_in(path)
    if os.path.isdir(path):
        net, size, trained = UNet.from_diffusers(path), weights.sample_size(path), {}
    else:
        ckpt = load_checkpoint(path)
        if ckpt.get("kind") == "ddpmpp":
            if args.raw:
                raise ValueError(f"--raw: {path} holds averaged weights alone")
            net = weights.fitted(DDPMpp, ckpt, "ema", path)
        else:
            net = UNet.load(ckpt, ema=not args.raw, name=path)
        size = ckpt.get("image_size")
        trained = ckpt.get("args")
    if not (isinstance(size, int) and 4 <= size <= 4096 and isinstance(trained, dict)):
        raise ValueError(f"{path}: its image size {size!r} or its args are not those of train.py")
    size = args.image_size or size
    net.refuse_size(size, size)
    dtype = precision(torch.device(device), args.amp)
    net = net.to(device, memory_format=layout(device, args.amp)).eval().cast(dtype)
    on_gpu = torch.device(device).type == "cuda"
    if args.compile or (args.compile is None and on_gpu):
        net = torch.compile(net, mode="reduce-overhead" if on_gpu and graphs else None)
    return net, size, trained


def folder_name(path):
    """The name of a checkpoint's folder, by which a run is called."""
    path = Path(path).resolve()
    return path.name if path.is_dir() else path.parent.name


def folder_names(paths):
    names = [folder_name(path) for path in paths]
    twice = max(names, key=names.count)
    if names.count(twice) > 1:
        raise ValueError(f"--ckpt: two checkpoints lie in a folder {twice}; rename one's")
    return names


def is_compiled(model):
    return hasattr(model, "_orig_mod")


def batches(numbers, batch_size, padded):
    """The list `numbers` in lists of batch_size -> (list, how many of it count), one by one.

    padded: the last is filled up with its own first number, since a compiled network would be
    compiled again for another size.
    """
    size = min(batch_size, len(numbers))
    for i in range(0, len(numbers), batch_size):
        batch = numbers[i : i + batch_size]
        extra = size - len(batch) if padded else 0
        yield batch + batch[:1] * extra, len(batch)


def sample_uint8(model, size, n, args, options, device, rank, world):
    """n images -> (n, S, S, 3) uint8 on every process; each makes every world-th of them.

    Fewer, the first ones, where Ctrl-C stops a single process after its first batch.
    """
    schedule = NoiseSchedule().to(device)
    mine = list(range(n))[rank::world]
    images = np.zeros((n, size, size, 3), np.uint8)
    shape = (3, size, size)
    label = f"{args.sampler} {options['steps'] or schedule.T} steps"
    bar = tqdm(total=len(mine), desc=label, unit="img", disable=rank > 0)
    done = 0
    try:
        with autocast(device, args.amp), bar:
            for index, count in batches(mine, args.batch_size, is_compiled(model)):
                x0 = generate(
                    model, schedule, index, shape, args.seed, device, args.sampler, **options
                )
                if not x0[:count].isfinite().all():
                    raise outputs.Failed("samples hold NaN or infinity; did training diverge?")
                pixels = metrics.to_uint8(x0[:count]).permute(0, 2, 3, 1)
                images[index[:count]] = pixels.cpu().numpy()
                done += count
                bar.update(count)
    except KeyboardInterrupt:
        if world > 1 or done == 0:
            raise
        return images[:done]
    if world > 1:  # every row is written by one process; the others hold zeros
        dist.all_reduce(torch.from_numpy(images))  # in place
    return images


# --------------------------------------------------------------------------------------------------
# scores


def features_network(features, inception_weights):
    """The network of the Fréchet distance, the distance's name, a cache key: Inception, or a
    checkpoint of classifier.py.
    """
    if features is None:
        network = metrics.Inception(inception_weights)  # raises first for a missing file
        key = metrics.file_key(inception_weights) if inception_weights else "download"
        return network, "FID", f"inception-{key}"
    name = f"Fréchet distance in {Path(features).name} features"
    return load_features(features), name, metrics.file_key(features)


def reference_name(args, trained):
    """The set whose clean images --fid compares with."""
    if not (args.data or trained.get("data")):
        raise ValueError("--fid: this checkpoint names no training set; give --data NAME")
    return args.data or trained["data"]


def reference_of(data, size, args, scorer, device):
    """What `evaluate` compares with: the clean training images of `data`, measured once."""
    images, _ = load_images(data, size, root=args.data_root)
    network, _, network_key = scorer
    cache = Path(args.data_root) / "cache"
    mu, cov = metrics.reference_moments(
        network, network_key, images, cache, args.batch_size, device
    )
    few = images[:: math.ceil(len(images) / COMPARED)]
    real, _ = metrics.extract(network, few, args.batch_size, device)
    of_data = metrics.image_statistics(to_float(torch.from_numpy(np.array(few))))
    numbers = dict(n_reference=len(images))
    for name, value in of_data.items():
        numbers[f"data_{name}"] = value
    return SimpleNamespace(mu=mu, cov=cov, real=real, numbers=numbers)


def evaluate(images, args, scorer, reference, device):
    """Fréchet distance, class score and diversity of uint8 images (n, S, S, 3) against the
    reference of `reference_of`; diversity, whose numbers depend on n, of the first n_diversity."""
    network, name, _ = scorer
    features, logits = metrics.extract(network, images, args.batch_size, device)
    if not np.isfinite(features).all():
        raise outputs.Failed(f"{name}: the samples' features hold NaN; did training diverge?")
    moments = metrics.moments(features)
    numbers = {name: metrics.frechet_distance(*moments, reference.mu, reference.cov)}
    score = "IS" if name == "FID" else "class_score"  # the same formula, by another classifier
    numbers[score], numbers[f"{score}_std"] = metrics.inception_score(logits)
    if len(images) > 5 and len(reference.real) > 5:
        numbers |= metrics.diversity(reference.real, features[:COMPARED])
        numbers["n_diversity"] = min(len(images), COMPARED)
    return numbers | reference.numbers


def prepare_scorer(models, args):
    """The scorer of `evaluate`, or None. Before sampling, so that a missing set costs no work."""
    if args.fid or args.data:
        for _, size, trained in models.values():
            load_images(reference_name(args, trained), size, root=args.data_root)
    if not args.fid:
        return None
    scorer = features_network(args.features, args.inception_weights)
    if args.n < 10_000:
        print(f"note: n = {args.n}; fewer than 10,000 do not compare with published scores")
    return scorer


# --------------------------------------------------------------------------------------------------
# the command


def sample_and_score(runs, args):
    """Samples of runs, {folder: (checkpoint, steps, spacing)}, in their folders; what cannot work
    is refused before the first.

    -> {folder: (the first 64 images in [-1, 1], numbers, training settings)}; under torchrun on the
    first process alone.
    """
    if args.fid and args.n < 2:
        raise ValueError(f"--n {args.n}: --fid needs 2 images, a covariance")
    options = {}
    for out, (_, steps, spacing) in runs.items():
        options[out] = sampler_options(args, steps, spacing)
    device, rank, world = setup(args.device, True, args.compile)
    models = {}
    for path, _, _ in runs.values():
        if path not in models:
            models[path] = load_model(path, args, device)
    if rank == 0:
        outputs.claim(args.out)
        for out in runs:
            images = outputs.claim(out) / "images"
            if args.png and (images / "000000.png").exists() and not (images / ".count").exists():
                raise ValueError(f"--out {out}: {images} holds pictures of another origin")
    scorer = prepare_scorer(models, args) if rank == 0 else None
    results, references = {}, {}
    for out, (path, _, _) in runs.items():
        started = time.time()
        model, size, trained = models[path]
        images = sample_uint8(model, size, args.n, args, options[out], device, rank, world)
        if rank == 0:
            x = to_float(torch.from_numpy(images))
            outputs.save_sample(images, x, Path(out), args.png)
            numbers = metrics.image_statistics(x)
            settings = dict(ckpt=path, sampler=args.sampler, **options[out])
            if len(images) < args.n:
                settings["interrupted"] = True
            if scorer:
                settings["reference"] = data = reference_name(args, trained)
                if (data, size) not in references:
                    references[data, size] = reference_of(data, size, args, scorer, device)
                numbers |= evaluate(images, args, scorer, references[data, size], device)
            outputs.write_metrics(
                out, started, seed=args.seed, device=device, n=len(images), **settings, **numbers
            )
            shown = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
            print(f"{len(images)} images -> {out}/grid.png, {shown}")
            results[out] = x[:64].clone(), numbers, trained
        if len(images) < args.n:
            raise KeyboardInterrupt
    runtime.leave(world)  # once the first process has scored
    return results


def main():
    parser = runtime.parser(__doc__)
    add = parser.add_argument
    add("--ckpt", required=True, help="a checkpoint or folder of train.py, a folder of diffusers")
    count = between(1, kind=int)
    add("--n", type=count, default=10_000, help="images; FID below 10,000 is biased upwards")
    add("--steps", type=int, help="default: ddpm 1000, ddim 100, heun 18 (noise levels)")
    add("--spacing", default="respaced", help="fewer ddpm steps: respaced | naive | truncated")
    add("--out", default="samples")
    add("--fid", action="store_true", help="FID and IS against the clean images of --data")
    add("--png", action=argparse.BooleanOptionalAction, default=True, help="write the PNG folder")
    add("--export", metavar="FOLDER", help="write the network for diffusers, and no images")
    add_arguments(parser)
    args, rest = parser.parse_known_args()
    if rest:
        why = "not understood; for several --ckpt, --steps or --spacing use compare.py"
        raise ValueError(f"{' '.join(rest)}: {why}")
    idle = runtime.idle_flags(parser)
    idle(not args.fid, f"data {FID_FLAGS}", "without --fid")
    if args.export:
        outputs.claim(args.export)
        args.amp, args.compile = "fp32", False
        net, size, _ = load_model(args.ckpt, args, "cpu")
        if not isinstance(net, UNet):
            raise ValueError(f"--export: {args.ckpt} is no UNet of train.py")
        net.to_diffusers(args.export, size)
        print(f"{args.ckpt} -> {args.export}, for diffusers' DDPMPipeline.from_pretrained")
        return
    sample_and_score({args.out: (args.ckpt, args.steps, args.spacing)}, args)


if __name__ == "__main__":
    runtime.cli(main)
