"""Butterflies on a known 25-dimensional subspace: does the model learn the images or their noise?

    python butterflies_pca.py                                  # built-in butterflies at 8x8: half an hour on a CPU
    python butterflies_pca.py --data folder:PATH --seeds 2     # the same on your images
    python butterflies_pca.py --iters 20 --methods none adv    # a smoke test, under a minute
    python butterflies_pca.py --data smithsonian --image-size 32 --channels 64 128 128 --batch-size 64 --lr 1e-3 --iters 10000
                    # the paper's set and size (pip install datasets; needs the internet), for a GPU; not run here

The claim (P1 §2.2, §3.1, Fig. 3): images are replaced by x' = mu + sum_i lambda_i alpha_i U_i, alpha ~ N(0, 1), so the
error of a sample x is known exactly: rho = |(x - mu) - U^T U (x - mu)|, its distance from the subspace. Trained on clean
images all methods do alike; with sigma = 0.1 noise on 90 % of them DDPM reproduces the noise, Robust_ran and Robust_adv
remove most of it, and the invariance ablation fails.

Leaves --out/samples.npz (condition/method: (n, D) in [-1, 1] data units; mu (D,), U (25, D)), rows.png (Fig. 3a),
curves.png (Fig. 3b) and metrics.json.
"""

import argparse
import copy
import math
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from tqdm import tqdm

import metrics
import runtime
from data import load_images, seed_at
from losses import NoiseSchedule, ddpm_loss, robust_loss
from runtime import between, setup
from sample import generate
from samplers import ddim_timesteps
from unet import UNet

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

METHODS = {  # name -> (perturb, constraint, lam), colour (Okabe-Ito), label
    "none": (None, "#000000", "DDPM"),
    "ran": (("ran", "equivariance", 0.3), "#0072B2", "Robust$_{ran}$"),
    "adv": (("adv", "equivariance", 0.3), "#D55E00", "Robust$_{adv}$"),
    "inv-adv": (("adv", "invariance", 0.3), "#CC79A7", "Inv$_{adv}$, λ = 0.3"),
    "inv-adv-0.03": (("adv", "invariance", 0.03), "#009E73", "Inv$_{adv}$, λ = 0.03"),
}


def fit_subspace(x, components):
    """PCA of x (n, D) -> mu (D,), scales lambda (k,), U (k, D) with orthonormal rows, share of the variance kept.

    lambda_i is the standard deviation along U_i, so that alpha ~ N(0, 1) reproduces the covariance within the subspace.
    """
    if not 1 <= components < len(x):
        raise ValueError(
            f"--components {components}: need 1 .. number of images - 1 = {len(x) - 1}"
        )
    mu = x.mean(0)
    _, s, vt = np.linalg.svd(x - mu, full_matrices=False)
    return (
        mu,
        s[:components] / math.sqrt(len(x) - 1),
        vt[:components],
        float((s[:components] ** 2).sum() / (s**2).sum()),
    )


def project(x, mu, U):
    """The point of the subspace nearest to x (n, D)."""
    return mu + (x - mu) @ U.T @ U


def subspace_error(x, mu, U):
    """rho = |(x - mu) - U^T U (x - mu)| -> (n,), in data units over all D pixels (P1 §2.2, whose formula omits mu)."""
    return (x - project(x, mu, U)).norm(dim=1)


def load(args):
    """The images as rows in [-1, 1], (n, D = 3 S S) float64, in the order (3, S, S)."""
    if args.data == "smithsonian":
        try:
            from datasets import load_dataset
        except ImportError:
            raise ValueError(
                "--data smithsonian: needs `pip install datasets`, or a copy as --data folder:PATH"
            ) from None
        try:
            rows = load_dataset(
                "huggan/smithsonian_butterflies_subset",
                split="train",
                cache_dir=f"{args.data_root}/datasets",
            )
        except Exception as e:  # no network or a moved set
            raise ValueError(
                f"--data smithsonian: could not be downloaded ({str(e).splitlines()[0]}); "
                "use --data folder:PATH"
            ) from None
        s = args.image_size
        images = np.stack([np.asarray(row["image"].convert("RGB").resize((s, s))) for row in rows])
    else:
        images, _ = load_images(args.data, args.image_size, root=args.data_root)
    # the size of the paper's set; enough for 25 dimensions
    images = images[np.random.default_rng(0).permutation(len(images))[:1000]]
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1) / 127.5 - 1


def train(method, x, args, seed, schedule, device, evaluate):
    """Train one network on x (N, 3, S, S), calling evaluate(ema, step) along the way."""
    loss_args = METHODS[method][0]
    torch.manual_seed(seed)
    attention = [False] * (len(args.channels) - 1) + [True]
    net = UNet(channels=args.channels, attention=attention, blocks=1, dropout=0.0, patch=args.patch)
    net = net.to(device, memory_format=torch.channels_last).train()
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr, fused=True)
    late = args.iters - round(args.reg_last * args.iters)  # plain DDPM before
    for step in tqdm(range(args.iters), desc=method, leave=False):
        torch.manual_seed(
            seed_at(seed, step, stream=4)
        )  # the same images, t and noise for every method
        x0 = x[torch.randint(len(x), (args.batch_size,), device=device)]
        t = torch.randint(schedule.T, (args.batch_size,), device=device)
        eps = torch.randn_like(x0)
        if loss_args is None or step < late:
            loss = ddpm_loss(net, schedule, x0, t, eps)  # Eq. 4
        else:
            perturb, constraint, lam = loss_args
            loss, _ = robust_loss(
                net,
                schedule,
                x0,
                t,
                eps,
                perturb,
                constraint,
                lam,  # Eq. 10, Eq. 9
                share=args.reg_share,
            )
        for group in (
            optimizer.param_groups
        ):  # short warm-up, then cosine to 0: a short run has no time to settle by itself
            group["lr"] = (
                args.lr
                * min(1, (step + 1) / 50)
                * 0.5
                * (1 + math.cos(math.pi * step / args.iters))
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(
                list(ema.parameters()),
                list(net.parameters()),
                1 - min(0.999, (1 + step) / (10 + step)),
            )
        if (step + 1) % args.eval_every == 0 or step + 1 == args.iters:
            evaluate(ema, step + 1)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--data",
        default="synthetic",
        help="synthetic[:N] | folder:PATH | smithsonian | any set of train.py",
    )
    add("--data-root", default="data")
    add("--image-size", type=int, default=8, help="the paper's 32 wants a GPU")
    add("--components", type=int, default=25, help="dimensions of the subspace")
    add("--n-train", type=int, default=5000, help="linearised training images x'")
    add("--p", type=float, default=0.9, help="share of noisy images in the noisy condition")
    add("--sigma", type=float, default=0.1, help="std of their Gaussian noise, [-1, 1] units")
    add("--conditions", nargs="+", choices=["clean", "noisy"], default=["clean", "noisy"])
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add(
        "--patch",
        type=int,
        default=1,
        help="the U-Net sees S/patch x S/patch patches of patch x patch pixels; 1: pixels",
    )
    add(
        "--channels",
        type=int,
        nargs="+",
        default=[64, 64],
        help="widths of the U-Net, multiples of 32",
    )
    add("--iters", type=int, default=1500)
    share = between(0, 1, above=True)
    add(
        "--reg-last",
        type=share,
        default=1.0,
        metavar="F",
        help="regularise in the last share F of the steps; 1: always",
    )
    add(
        "--reg-share",
        type=share,
        default=1.0,
        metavar="Q",
        help="regularise the first Q of the rows of a batch; 1: all",
    )
    add("--batch-size", type=int, default=16)
    add("--lr", type=float, default=3e-3)
    add("--eval-every", type=int, default=500)
    add("--n-eval", type=int, default=64, help="samples behind each number")
    add("--sample-steps", type=int, default=50, help="DDIM steps")
    add("--seeds", type=int, default=1, help="runs with seeds --seed, --seed + 1, ...")
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto | cpu | cuda | cuda:N")
    add("--out", default="out_butterflies")
    args = parser.parse_args()
    for name in ("n_train", "iters", "batch_size", "eval_every", "n_eval", "sample_steps", "seeds"):
        if getattr(args, name) < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1"
            )
    if not 0 <= args.p <= 1 or not args.sigma >= 0:
        raise ValueError(f"--p {args.p} --sigma {args.sigma}: need p in [0, 1] and sigma >= 0")
    ddim_timesteps(NoiseSchedule().T, args.sample_steps)  # refuses too many
    if args.n_eval < 2:
        raise ValueError(f"--n-eval {args.n_eval}: a spread needs at least 2 samples")
    if (
        "noisy" not in args.conditions
        and len(args.methods) > 1
        and all(m.startswith("inv") for m in args.methods)
    ):
        raise ValueError(
            "--methods: of several, the invariance ablation runs on --conditions noisy alone"
        )
    factor = args.patch * 2 ** (len(args.channels) - 1)
    if any(c % 32 for c in args.channels) or args.patch < 1 or args.image_size % factor:
        raise ValueError(
            f"--channels {args.channels} --patch {args.patch}: need multiples of 32, and --image-size a multiple "
            f"of {factor}"
        )
    started = time.time()
    device, _, _ = setup(args.device)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    mu, scales, U, kept = fit_subspace(load(args), args.components)
    print(
        f"{args.components} components keep {kept:.1%} of the variance of {args.data} at {args.image_size}x{args.image_size}"
    )
    S, schedule = args.image_size, NoiseSchedule().to(device)
    mu_t, U_t = (
        torch.tensor(mu, dtype=torch.float32, device=device),
        torch.tensor(U, dtype=torch.float32, device=device),
    )
    scales_t = torch.tensor(scales, dtype=torch.float32, device=device)

    samples, curves = (
        {},
        {},
    )  # condition/method -> (n, D); -> {seed: [(step, rho, psnr, signal std)]}
    shown = {}
    for seed in range(args.seed, args.seed + args.seeds):
        g = torch.Generator().manual_seed(seed_at(seed, 0, stream=5))
        alpha = torch.randn(args.n_train, args.components, generator=g).to(device)
        clean = mu_t + (alpha * scales_t) @ U_t  # x' = mu + sum_i lambda_i alpha_i U_i
        noise = args.sigma * torch.randn(clean.shape, generator=g).to(device)
        chosen = torch.randperm(args.n_train, generator=g)[: round(args.p * args.n_train)].to(
            device
        )
        noisy = clean.index_add(0, chosen, noise[chosen])  # fixed once and for all
        bound = (
            clean.abs().max().item()
        )  # x' leaves [-1, 1] a little: x^_0 is clipped to its largest value
        shown.setdefault("training data x'", clean[:16].cpu())
        shown.setdefault(f"with noise, p = {args.p:g}, σ = {args.sigma:g}", noisy[:16].cpu())
        for condition, method in [(c, m) for c in args.conditions for m in args.methods]:
            if condition == "clean" and method.startswith("inv") and len(args.methods) > 1:
                continue  # the ablation is about noise
            key = f"{condition}/{method}"
            curve = curves.setdefault(key, {}).setdefault(seed, [])

            def evaluate(net, step, key=key, curve=curve, seed=seed, bound=bound):
                x = generate(
                    net,
                    schedule,
                    range(args.n_eval),
                    (3, S, S),
                    seed,
                    device,
                    "ddim",
                    steps=args.sample_steps,
                    clip=bound,
                ).flatten(1)
                rho = subspace_error(x, mu_t, U_t)
                quality = metrics.psnr(x, project(x, mu_t, U_t))
                signal = (
                    ((x - mu_t) @ U_t.T / scales_t).std(0).mean()
                )  # 1: all the variance of the subspace is kept
                curve.append((step, rho.mean().item(), quality.mean().item(), signal.item()))
                if seed == args.seed:
                    samples[key] = x.cpu().numpy()

            x = clean if condition == "clean" else noisy
            begun = time.time()
            x = x.view(-1, 3, S, S).contiguous(memory_format=torch.channels_last)
            train(method, x, args, seed, schedule, device, evaluate)
            step, rho, quality, signal = curve[-1]
            print(
                f"seed {seed} {key:20s} rho {rho:6.2f} ({rho / math.sqrt(len(mu)):.4f} per pixel)  PSNR {quality:5.2f} dB  "
                f"signal std {signal:.2f}  {time.time() - begun:.0f} s",
                flush=True,
            )

    numbers = {}
    for key, runs in curves.items():
        last = np.array([run[-1][1:] for run in runs.values()])  # (seeds, 3)
        spread = last.std(0, ddof=1) if len(last) > 1 else np.full(3, np.nan)
        numbers[key] = {
            name: dict(mean=m, std=None if np.isnan(s) else s)
            for name, m, s in zip(("rho", "psnr", "signal_std"), last.mean(0), spread)
        }
    np.savez_compressed(
        out / "samples.npz", mu=mu.astype(np.float32), U=U.astype(np.float32), **samples
    )
    plot_rows(shown, samples, args, S, out / "rows.png")
    plot_curves(curves, args, out / "curves.png")
    runtime.write_metrics(
        out,
        started,
        seed=args.seed,
        device=device,
        n=args.n_eval,
        variance_kept=kept,
        args={k: v for k, v in vars(args).items() if k != "out"},
        results=numbers,
        curves=curves,
    )
    print(f"{out}/rows.png, {out}/curves.png, {out}/samples.npz")


def plot_rows(shown, samples, args, S, path):
    """Fig. 3a: data, corrupted data, samples of each method from the same noise."""
    order = [f"{c}/{m}" for c in args.conditions for m in args.methods if f"{c}/{m}" in samples]
    rows = list(shown.items()) + [
        (f"{METHODS[k.split('/')[1]][2]}, trained {k.split('/')[0]}", samples[k][:16])
        for k in order
    ]
    fig, axes = plt.subplots(len(rows), 1, figsize=(9, 0.62 * len(rows)), layout="constrained")
    for ax, (label, x) in zip(np.atleast_1d(axes), rows):
        images = (np.asarray(x).reshape(-1, 3, S, S).transpose(0, 2, 3, 1) + 1) / 2
        ax.imshow(np.concatenate(list(np.clip(images, 0, 1)), axis=1), interpolation="nearest")
        ax.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
        ax.set(xticks=[], yticks=[])
    fig.savefig(path, dpi=130)
    plt.close(fig)


def plot_curves(curves, args, path):
    """Fig. 3b: PSNR and rho through training, clean above noisy; bands span the seeds."""
    fig, axes = plt.subplots(
        len(args.conditions),
        2,
        figsize=(9, 3 * len(args.conditions)),
        layout="constrained",
        squeeze=False,
        sharex=True,
    )
    for row, condition in zip(axes, args.conditions):
        for method in args.methods:
            if f"{condition}/{method}" not in curves:
                continue
            runs = np.array(
                list(curves[f"{condition}/{method}"].values())
            )  # (seeds, evaluations, 4)
            _, colour, label = METHODS[method]
            for ax, column in zip(row, (2, 1)):
                steps, y = runs[0, :, 0], runs[:, :, column]
                ax.plot(steps, y.mean(0), color=colour, label=label, marker="o", ms=3)
                ax.fill_between(steps, y.min(0), y.max(0), color=colour, alpha=0.2, lw=0)
        title = (
            "trained on clean images"
            if condition == "clean"
            else f"on noisy images (p = {args.p:g}, σ = {args.sigma:g})"
        )
        row[0].set(ylabel="PSNR to the subspace, dB", title=title)
        row[1].set(
            ylabel="ρ, distance from the subspace",
            title=title,
            yscale="log" if condition == "noisy" else "linear",
        )
        for ax in row:
            ax.grid(alpha=0.3)
    for ax in axes[-1]:
        ax.set_xlabel("training step")
    fig.legend(
        *axes[-1][0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=5,
        fontsize=9,
        frameon=False,
    )
    fig.savefig(path, dpi=130)
    plt.close(fig)


if __name__ == "__main__":
    runtime.cli(main)
