"""Sample a checkpoint with DDPM, DDIM or EDM's Heun sampler, and score the samples.

    python sample.py --ckpt out/ckpt.pt --n 64 --sampler ddim --steps 100 --out samples
    python sample.py --ckpt out/ckpt.pt --fid                            # FID and IS of 10,000 images
    torchrun --nproc-per-node 8 -- sample.py --ckpt out/ckpt.pt --n 50000 --fid

Leaves --out/images/*.png (a folder `python -m pytorch_fid` reads), samples.npz, grid.png and metrics.json. Image i is a
function of --seed and i alone, whatever the batch size and the number of processes. Several samples at once: compare.py.
"""

import argparse
import functools
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torchvision.utils import save_image
from tqdm import tqdm

import metrics
import runtime
from classifier import load_features
from data import image_noise, load_images, to_float
from losses import NoiseSchedule, like, posterior_mean, predict_x0
from runtime import autocast, layout, load_checkpoint, precision, setup
from unet import UNet

# ---------------------------------------------------------------------------------------------------------------------
# one step of each sampler; abar and abar_prev are (B,) float64, abar < abar_prev <= 1. Samplers: x_T (B, ..) ~ N(0, I) -> x_0


def clipped(x0, clip):
    """x^_0 cut to [-clip, clip]; True is 1, False leaves it."""
    return x0.clamp(-float(clip), float(clip)) if clip else x0


def ddpm_variance(abar, abar_prev, variance):
    """s_t^2 of Eq. 5: beta_t ("fixed-large") or beta~_t, the variance of q(x_{t-1} | x_t, x_0) ("fixed-small")."""
    if variance not in ("fixed-large", "fixed-small"):
        raise ValueError(f"variance={variance!r}: need 'fixed-large' or 'fixed-small'")
    beta = 1 - abar / abar_prev
    return beta if variance == "fixed-large" else beta * (1 - abar_prev) / (1 - abar)


def ddpm_step(x_t, eps, z, abar, abar_prev, clip=True, variance="fixed-large"):
    """x_{t-1} = mu~(x_t, x^_0) + s_t z, which without clipping is Eq. 5; z is ignored where abar_prev = 1."""
    x0 = predict_x0(x_t, eps, abar)
    mean = posterior_mean(clipped(x0, clip), x_t, abar, abar_prev)
    var = ddpm_variance(abar, abar_prev, variance)
    return mean + like((var * (abar_prev < 1)).sqrt(), x_t) * z


def ddim_step(x_t, eps, z, abar, abar_prev, eta=0.0, clip=True):
    """DDIM, Eq. 12 of Song et al. (2021); eta = 0 is deterministic. eps is not re-derived from the clipped x^_0."""
    std = eta * ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)).sqrt()
    x0 = clipped(predict_x0(x_t, eps, abar), clip)
    return (
        like(abar_prev.sqrt(), x_t) * x0
        + like((1 - abar_prev - std**2).sqrt(), x_t) * eps
        + like(std, x_t) * z
    )


def ddpm_timesteps(T, steps=None, spacing="respaced"):
    """Pairs (t, t_prev), from noise to data; t_prev = -1 stands for x_0.

    respaced   evenly spaced t, betas re-derived between neighbours (Nichol & Dhariwal, 2021)
    naive      the same t, each step computed as if from t to t - 1 (Eq. 5 with a subset of the steps)
    truncated  t = steps-1 .. 0, started from N(0, I)
    """
    steps = T if steps is None else steps
    if not 1 <= steps <= T:
        raise ValueError(f"--steps {steps}: must lie in 1..{T}")
    if spacing not in ("respaced", "naive", "truncated"):
        raise ValueError(f"--spacing {spacing}: need respaced, naive or truncated")
    ts = (
        np.linspace(T - 1, 0, steps).round().astype(int).tolist()
        if spacing != "truncated"
        else list(range(steps))[::-1]
    )
    after = ts[1:] if spacing == "respaced" else [t - 1 for t in ts[:-1]]
    return list(zip(ts, after + [-1]))


def ddim_timesteps(T, steps=100):
    """Pairs (t, t_prev) at t = floor(i T / steps), DDIM's linear choice; t_prev = -1 stands for x_0."""
    if not 1 <= steps <= T:
        raise ValueError(f"--steps {steps}: must lie in 1..{T}")
    ts = [i * T // steps for i in range(steps)][::-1]
    return list(zip(ts, ts[1:] + [-1]))


def _advance(step, noise, i, x, eps, abars, ts, ts_prev):
    """x_{t-1} = step(x_t, eps, z, abar_t, abar_t_prev) with z = noise(i); ts, ts_prev (B,), abars at index t + 1."""
    z = torch.randn_like(x) if noise is None else noise(i)
    return step(x, eps.to(x.dtype), z, abars[ts + 1], abars[ts_prev + 1])


def _run(model, schedule, x_T, pairs, step, noise, on_step, compiled=False):
    """x <- step(x, eps_theta(x, t), z, abar_t, abar_t_prev) over all pairs."""
    alphas_bar = schedule.alphas_bar.to(x_T.device)
    abars = torch.cat([torch.ones_like(alphas_bar[:1]), alphas_bar])  # at index t + 1
    advance, x = torch.compile(_advance, dynamic=False) if compiled else _advance, x_T
    for i, (t, t_prev) in enumerate(pairs):
        ts = torch.full((len(x),), t, device=x.device)
        if on_step is not None:
            x = on_step(i, t, x)
        if compiled:  # as a tensor, since a compiled graph belongs to the values of its integers
            i = torch.full((), i, device=x.device)
        x = advance(step, noise, i, x, model(x, ts), abars, ts, torch.full_like(ts, t_prev))
    return x


@torch.no_grad()
def ddpm_sample(
    model,
    schedule,
    x_T,
    steps=None,
    spacing="respaced",
    clip=True,
    variance="fixed-large",
    noise=None,
    on_step=None,
    compiled=False,
):
    """Ancestral sampling (Eq. 5). steps: None for all T; spacing: see ddpm_timesteps; variance: see ddpm_step.

    clip: x^_0 to [-1, 1] (images), to [-clip, clip] for a number, False: not at all. noise(i): the z of step i, by default
    from the global generator.
    on_step(i, t, x_t) -> x_t is called before the network at every step, to record or to perturb. compiled: what follows the
    network, noise(i) with a tensor i included, is one compiled graph (worth it on a GPU).
    """
    step = functools.partial(ddpm_step, clip=clip, variance=variance)
    return _run(
        model,
        schedule,
        x_T,
        ddpm_timesteps(schedule.T, steps, spacing),
        step,
        noise,
        on_step,
        compiled,
    )


@torch.no_grad()
def ddim_sample(
    model, schedule, x_T, steps=100, eta=0.0, clip=True, noise=None, on_step=None, compiled=False
):
    """DDIM (Song et al., 2021); eta = 0 uses no noise. The other arguments as in ddpm_sample."""
    step = functools.partial(ddim_step, eta=eta, clip=clip)
    zero = (lambda i: 0.0) if eta == 0 else noise
    return _run(
        model, schedule, x_T, ddim_timesteps(schedule.T, steps), step, zero, on_step, compiled
    )


def heun_timesteps(schedule, steps=18, t_start=None, rho=7.0):
    """t of EDM's noise levels sigma_i (Karras et al., 2022, Eq. 5), rounded to the schedule, from t_start down to 0."""
    sigmas = np.array(schedule.sigmas)
    t_start = schedule.T - 1 if t_start is None else t_start
    if steps < 1 or not 0 <= t_start < schedule.T:
        raise ValueError(
            f"heun: need --steps >= 1 (got {steps}) and t_start in 0..{schedule.T - 1} (got {t_start})"
        )
    u = np.linspace(0, 1, steps)
    levels = (
        sigmas[t_start] ** (1 / rho) + u * (sigmas[0] ** (1 / rho) - sigmas[t_start] ** (1 / rho))
    ) ** rho
    ts = [int(np.abs(sigmas - s).argmin()) for s in levels]
    return sorted(set(ts), reverse=True)  # the rounding may merge the smallest levels


@torch.no_grad()
def heun_sample(
    model,
    schedule,
    x_T,
    steps=18,
    S_churn=0.0,
    S_min=0.0,
    S_max=float("inf"),
    S_noise=1.0,
    clip=True,
    t_start=None,
    noise=None,
):
    """EDM's Algorithm 2 (Karras et al., 2022) on an eps-network: 2 steps - 1 network calls.

    VP -> EDM: x / sqrt(abar) at sigma = sqrt((1 - abar) / abar). x_T is a VP sample at t_start (default T - 1).
    S_churn > 0 adds noise within [S_min, S_max]; all noise levels are rounded to the schedule's (ours).
    """
    abars, table = schedule.alphas_bar.to(x_T.device), schedule.sigmas
    ts = heun_timesteps(schedule, steps, t_start)

    def slope(x, t):  # dx/dsigma = (x - D(x; sigma)) / sigma, with D = x - sigma eps
        eps = model(x * abars[t].sqrt().to(x.dtype), torch.full((len(x),), t, device=x.device)).to(
            x.dtype
        )
        if not clip:
            return eps.clone()  # a CUDA graph writes its next output over this one
        return (x - clipped(x - table[t] * eps, clip)) / table[t]

    x = x_T / abars[ts[0]].sqrt().to(x_T.dtype)
    for i, t in enumerate(ts):
        if S_churn > 0 and S_min <= table[t] <= S_max:
            wanted = table[t] * (1 + min(S_churn / len(ts), 2**0.5 - 1))
            t_hat = max(t, int(np.abs(np.array(table) - wanted).argmin()))
            z = torch.randn_like(x) if noise is None else noise(i)
            x = x + S_noise * (table[t_hat] ** 2 - table[t] ** 2) ** 0.5 * z
            t = t_hat
        sigma_next = table[ts[i + 1]] if i + 1 < len(ts) else 0.0
        d = slope(x, t)
        if sigma_next > 0:
            d = (d + slope(x + (sigma_next - table[t]) * d, ts[i + 1])) / 2
        x = x + (sigma_next - table[t]) * d
    return x


# ---------------------------------------------------------------------------------------------------------------------
# running on one or many devices


def generate(model, schedule, index, shape, seed, device, sampler="ddpm", **options):
    """Images number index (B,) of the sample `seed` -> x_0 (B, *shape); image i depends on (seed, i) alone."""
    index = torch.as_tensor(index, device=device)

    def noise(stream):
        return image_noise(seed, index, stream, shape).contiguous(memory_format=torch.channels_last)

    run = dict(ddpm=ddpm_sample, ddim=ddim_sample, heun=heun_sample)[sampler]
    if sampler != "heun":
        options |= dict(compiled=index.is_cuda)
    return run(model, schedule, noise(0), noise=lambda i: noise(i + 1), **options)


def save_grid(x, path):
    """The first 64 of x (n, 3, S, S) in [-1, 1] as a PNG, small images enlarged to be seen."""
    scale = max(1, 64 // x.shape[-1])
    x = (x[:64].clamp(-1, 1) + 1) / 2
    save_image(x.repeat_interleave(scale, 2).repeat_interleave(scale, 3), path, nrow=8)


def save_sample(images, out, png):
    """OUT/samples.npz, grid.png and, if png, images/*.png of images (n, S, S, 3) uint8 -> x (n, 3, S, S) in [-1, 1]."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    for old in (out / "images").glob(
        "[0-9]" * 6 + ".png"
    ):  # of an earlier sample, perhaps a larger one
        old.unlink()
    for i in range(len(images) if png else 0):
        Image.fromarray(images[i]).save(out / "images" / f"{i:06d}.png", compress_level=1)
    np.savez_compressed(out / "samples.npz", images=images)
    x = to_float(torch.from_numpy(images))
    save_grid(x, out / "grid.png")
    return x


# ---------------------------------------------------------------------------------------------------------------------
# evaluation


def features_network(features, inception_weights):
    """The network for the Fréchet distance, its name and its cache key: Inception, or a checkpoint of classifier.py."""
    if features is None:
        network = metrics.Inception(inception_weights)  # raises first for a missing file
        return (
            network,
            "FID",
            f"inception-{metrics.file_key(inception_weights) if inception_weights else 'download'}",
        )
    return (
        load_features(features),
        f"Fréchet distance in {Path(features).name} features",
        metrics.file_key(features),
    )


def reference_name(args, trained):
    """The set whose clean images --fid compares with."""
    if not (args.data or trained.get("data")):
        raise ValueError(
            "--fid: a checkpoint of diffusers does not say what it was trained on; give --data NAME"
        )
    return args.data or trained["data"]


def evaluate(images, args, scorer, data, device):
    """Fréchet distance and Inception Score of uint8 images (n, S, S, 3) against the clean training images of `data`."""
    reference, _ = load_images(data, images.shape[1], root=args.data_root)
    network, name, key = scorer
    mu, cov = metrics.reference_moments(
        network, key, reference, Path(args.data_root) / "cache", args.batch_size, device
    )
    features, logits = metrics.extract(network, images, args.batch_size, device)
    if not np.isfinite(features).all():
        raise ValueError(f"{name}: the samples' features hold NaN; did training diverge?")
    score, spread = metrics.inception_score(logits)
    few = reference[
        :: -(-len(reference) // 10_000)
    ]  # at most 10,000: the balls are compared in pairs
    real, _ = metrics.extract(network, few, args.batch_size, device)
    varied = metrics.diversity(real, features) if len(images) > 5 and len(few) > 5 else {}
    of_data = metrics.image_statistics(to_float(torch.from_numpy(np.array(few))))
    return {
        name: metrics.frechet_distance(*metrics.moments(features), mu, cov),
        "IS": score,
        "IS_std": spread,
        **varied,
        "n_reference": len(reference),
        **{f"data_{k}": v for k, v in of_data.items()},
    }


def add_arguments(parser):
    """The flags that every script which samples shares."""
    add = parser.add_argument
    add("--sampler", choices=["ddpm", "ddim", "heun"], default="ddpm")
    add(
        "--variance",
        choices=["fixed-large", "fixed-small"],
        default="fixed-large",
        help="ddpm: s_t^2 of Eq. 5",
    )
    add("--eta", type=float, default=0.0, help="ddim: 0 is deterministic")
    add("--s-churn", type=float, default=0.0, help="heun: S_churn, noise added along the way")
    add("--no-clip", action="store_true", help="do not clip x^_0 to [-1, 1]")
    add("--raw", action="store_true", help="raw instead of EMA weights")
    add("--image-size", type=int, help="default: the size the checkpoint was trained at")
    add("--batch-size", type=int, default=250, help="changes memory and speed, not the images")
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto | cpu | cuda | cuda:N")
    add("--amp", choices=["auto", "bf16", "fp16", "fp32"], default="auto")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default: on a GPU")
    add(
        "--data",
        metavar="NAME",
        help="reference set of --fid; default: what the checkpoint was trained on",
    )
    add("--data-root", default="data")
    add("--features", metavar="CHECKPOINT", help="Fréchet distance in its features instead of FID")
    add(
        "--inception-weights",
        metavar="PATH",
        help="pt_inception-2015-12-05-6726825d.pth, a local copy",
    )


def sampler_options(args, steps, spacing):
    """The keyword arguments of args.sampler, with values that make no sense refused."""
    if args.sampler != "ddpm" and spacing != "respaced":
        raise ValueError(f"--spacing {spacing}: is for --sampler ddpm")
    if args.sampler == "ddpm":
        ddpm_timesteps(NoiseSchedule().T, steps, spacing)
        return dict(steps=steps, spacing=spacing, variance=args.variance, clip=not args.no_clip)
    steps = dict(ddim=100, heun=18)[args.sampler] if steps is None else steps
    if args.sampler == "ddim":
        if not 0 <= args.eta <= 1:
            raise ValueError(f"--eta {args.eta}: must lie in [0, 1]")
        ddim_timesteps(NoiseSchedule().T, steps)
        return dict(steps=steps, eta=args.eta, clip=not args.no_clip)
    heun_timesteps(NoiseSchedule(), steps)
    return dict(steps=steps, S_churn=args.s_churn, clip=not args.no_clip)


def load_model(path, args, device):
    """(model ready to sample, image size, training settings) of a checkpoint of train.py, its folder, or one of diffusers."""
    path = Path(path, "ckpt.pt") if Path(path, "ckpt.pt").is_file() else path
    if os.path.isdir(path):
        net, size, trained = UNet.from_diffusers(path), 32, {}
    else:
        ckpt = load_checkpoint(path)
        try:
            net, size, trained = UNet.load(ckpt, ema=not args.raw), ckpt["image_size"], ckpt["args"]
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from None
    dtype = precision(torch.device(device), args.amp)
    net = net.to(device, memory_format=layout(device, args.amp)).eval().cast(dtype)
    if args.compile or (args.compile is None and device.type == "cuda"):
        net = torch.compile(
            net, mode="reduce-overhead" if device.type == "cuda" else None
        )  # CUDA graphs
    return net, args.image_size or size, trained


def is_compiled(model):
    return hasattr(model, "_orig_mod")


def batches(numbers, batch_size, padded):
    """The list `numbers` in lists of batch_size -> (list, how many of it count), one by one.

    padded: the last is filled up with its own first number, as a compiled network would be compiled again for another size.
    """
    size = min(batch_size, len(numbers))
    for i in range(0, len(numbers), batch_size):
        batch = numbers[i : i + batch_size]
        yield batch + batch[:1] * ((size - len(batch)) * padded), len(batch)


def sample_uint8(model, size, n, args, options, device, rank, world):
    """n images -> (n, S, S, 3) uint8 on every process; each makes every world-th of them."""
    schedule, mine = NoiseSchedule().to(device), list(range(n))[rank::world]
    images = np.zeros((n, size, size, 3), np.uint8)
    label = f"{args.sampler} {options['steps'] or schedule.T} steps"
    with (
        autocast(device, args.amp),
        tqdm(total=len(mine), desc=label, unit="img", disable=rank > 0) as bar,
    ):
        for index, count in batches(mine, args.batch_size, is_compiled(model)):
            x0 = generate(
                model, schedule, index, (3, size, size), args.seed, device, args.sampler, **options
            )[:count]
            if not x0.isfinite().all():
                raise ValueError("the samples hold NaN or infinity; did training diverge?")
            images[index[:count]] = metrics.to_uint8(x0).permute(0, 2, 3, 1).cpu().numpy()
            bar.update(count)
    if world > 1:  # every row is written by one process; the others hold zeros
        dist.all_reduce(torch.from_numpy(images))  # in place
    return images


def folder_name(path):
    path = Path(path).resolve()
    return path.name if path.is_dir() else path.parent.name


def sample_and_score(runs, args):
    """Samples of runs, {folder: (checkpoint, steps, spacing)}, in their folders; what cannot work is refused before the first.

    -> {folder: (the first 64 images in [-1, 1], numbers, training settings)}; under torchrun on the first process alone.
    """
    if args.n < 1 or args.batch_size < 1:
        raise ValueError(f"--n {args.n} --batch-size {args.batch_size}: both must be at least 1")
    options = {
        out: sampler_options(args, steps, spacing) for out, (_, steps, spacing) in runs.items()
    }
    device, rank, world = setup(args.device)
    models = {
        path: load_model(path, args, device)
        for path in {path: None for path, _, _ in runs.values()}
    }
    Path(args.out).mkdir(parents=True, exist_ok=True)
    scorer, results = None, {}
    if (
        args.fid or args.data
    ) and rank == 0:  # before the sampling, so that a missing set or network costs no work
        for _, size, trained in models.values():
            load_images(reference_name(args, trained), size, root=args.data_root)
    if args.fid and rank == 0:
        scorer = features_network(args.features, args.inception_weights)
        if args.n < 10_000:
            print(
                f"note: n = {args.n}; distances and IS from fewer than 10,000 images do not compare with published ones"
            )
    for out, (path, _, _) in runs.items():
        started, (model, size, trained) = time.time(), models[path]
        images = sample_uint8(model, size, args.n, args, options[out], device, rank, world)
        if rank == 0:
            x = save_sample(images, Path(out), args.png)
            data = reference_name(args, trained) if args.fid else None
            numbers = metrics.image_statistics(x)
            numbers |= evaluate(images, args, scorer, data, device) if data else {}
            runtime.write_metrics(
                out,
                started,
                seed=args.seed,
                device=device,
                n=args.n,
                ckpt=path,
                sampler=args.sampler,
                **options[out],
                **(dict(reference=data) if data else {}),
                **numbers,
            )
            print(
                f"{args.n} images -> {out}/grid.png, "
                + ", ".join(f"{k} {v:.4g}" for k, v in numbers.items())
            )
            results[out] = x[:64].clone(), numbers, trained
    if world > 1:  # the others wait for the first process, which scores
        dist.barrier()
        dist.destroy_process_group()
    return results


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ckpt", required=True, help="a checkpoint of train.py or its folder, or one of diffusers")
    add(
        "--n", type=int, default=10_000, help="number of images; FID below 10,000 is biased upwards"
    )
    add("--steps", type=int, help="default: ddpm 1000, ddim 100, heun 18 (noise levels)")
    add(
        "--spacing",
        default="respaced",
        help="ddpm: the rule for fewer steps, respaced | naive | truncated",
    )
    add("--out", default="samples")
    add("--fid", action="store_true", help="FID and IS against the clean images of --data")
    add("--png", action=argparse.BooleanOptionalAction, default=True, help="write the PNG folder")
    add_arguments(parser)
    args, rest = parser.parse_known_args()
    if rest:
        raise ValueError(
            f"{' '.join(rest)}: not understood; for several --ckpt, --steps or --spacing use compare.py"
        )
    sample_and_score({args.out: (args.ckpt, args.steps, args.spacing)}, args)


if __name__ == "__main__":
    runtime.cli(main)
