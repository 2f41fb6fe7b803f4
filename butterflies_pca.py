r"""Butterflies on a known 25-dimensional subspace: does the model learn the images or their noise?

    python butterflies_pca.py                               # built-in, 8x8: an hour on a CPU
    python butterflies_pca.py --data folder:PATH --seeds 2  # the same on your images
    python butterflies_pca.py --iters 20 --methods none adv --sample-steps 20  # a smoke test
    python butterflies_pca.py --data smithsonian --image-size 32 --channels 64 128 128 \
        --batch-size 64 --lr 1e-3 --iters 10000             # the paper's set and size, for a GPU

The claim (P1 §2.2, §3.1, Fig. 3): images are replaced by x' = mu + sum_i lambda_i alpha_i U_i with
alpha ~ N(0, 1), so that the error of a sample x is known exactly: rho = |(x - mu) - U^T U (x -
mu)|, its distance from the subspace. Trained on clean images all methods do alike; with sigma = 0.1
noise on 90 % of them DDPM reproduces the noise, Robust_ran and Robust_adv remove most of it, and
the invariance ablation fails. rho alone rewards samples without variety: signal_std, the standard
deviation within the subspace over the truth, stands beside it. P1 samples by Eq. 5, the default
here; the runs of RESULTS.md were made with --sampler ddim. The paper's set needs `pip install
datasets` and the internet; it was not run.

Leaves --out/samples.npz (condition/method: (n, D) in [-1, 1] data units; mu (D,), U (25, D)),
rows.png (Fig. 3a), curves.png (Fig. 3b), table.md and metrics.json.
"""

import copy
import math
import time

import numpy as np
import torch
from tqdm import tqdm

import metrics
import outputs
import runtime
from data import load_images
from losses import NoiseSchedule, ddpm_loss, robust_loss
from outputs import METHOD_STYLE, plt
from rng import seed_at
from runtime import between, refuse_repeats, setup
from sample import generate
from unet import UNet

METHODS = {  # name: (perturb, constraint, lam)
    "none": None,
    "ran": ("ran", "equivariance", 0.3),
    "adv": ("adv", "equivariance", 0.3),
    "inv-adv": ("adv", "invariance", 0.3),
    "inv-adv-0.03": ("adv", "invariance", 0.03),
}
STYLE = METHOD_STYLE | {"inv-adv-0.03": ("#009E73", "invariance, λ = 0.03")}
STEPS = {"ddpm": 1000, "ddim": 50}  # of --sampler


def fit_subspace(x, components):
    """PCA of x (n, D) -> mu (D,), scales lambda (k,), U (k, D) with orthonormal rows, share of the
    variance kept.

    lambda_i is the standard deviation along U_i, so that alpha ~ N(0, 1) reproduces the covariance
    within the subspace.
    """
    most = min(len(x) - 1, x.shape[1])
    if not 1 <= components <= most:
        raise ValueError(
            f"--components {components}: need 1 .. {most} ({len(x)} images of {x.shape[1]} values)"
        )
    mu = x.mean(0)
    _, s, vt = np.linalg.svd(x - mu, full_matrices=False)
    scales = s[:components] / math.sqrt(len(x) - 1)
    kept = float((s[:components] ** 2).sum() / (s**2).sum())
    return mu, scales, vt[:components], kept


def project(x, mu, U):
    """The point of the subspace nearest to x (n, D)."""
    return mu + (x - mu) @ U.T @ U


def subspace_error(x, mu, U):
    """rho = |(x - mu) - U^T U (x - mu)| -> (n,), in data units over all D pixels (P1 §2.2, whose
    formula omits mu).
    """
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
                f"--data smithsonian: could not be downloaded ({outputs.reason(e)}); "
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
    torch.manual_seed(seed)
    attention = [False] * (len(args.channels) - 1) + [True]
    net = UNet(channels=args.channels, attention=attention, blocks=1, dropout=0.0, patch=args.patch)
    net = net.to(device, memory_format=torch.channels_last).train()
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr, fused=True)
    late = args.iters - max(1, round(args.reg_last * args.iters))  # plain DDPM before
    for step in tqdm(range(args.iters), desc=method, leave=False):
        torch.manual_seed(seed_at(seed, step, stream=4))  # equal draws for every method
        x0 = x[torch.randint(len(x), (args.batch_size,), device=device)]
        t = torch.randint(schedule.T, (args.batch_size,), device=device)
        eps = torch.randn_like(x0)
        if METHODS[method] is None or step < late:
            loss = ddpm_loss(net, schedule, x0, t, eps)  # Eq. 4
        else:  # Eq. 10, or Eq. 9
            settings = METHODS[method]
            loss, _ = robust_loss(net, schedule, x0, t, eps, *settings, share=args.reg_share)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate(step, args.iters)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
        if (step + 1) % args.eval_every == 0 or step + 1 == args.iters:
            evaluate(ema, step + 1)


def rate(step, iters):
    """A short warm-up, then a cosine to 0: a short run has no time to settle by itself."""
    return min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / iters))


def parse_args():
    parser = runtime.parser(__doc__)
    add = parser.add_argument
    count = between(1, kind=int)
    share = between(0, 1, above=True)
    add("--data", default="synthetic", help="smithsonian, or any set of train.py")
    add("--data-root", default="data")
    add("--image-size", type=between(4, 256, kind=int), default=8, help="P1's 32 wants a GPU")
    add("--components", type=count, default=25, help="dimensions of the subspace")
    add("--n-train", type=count, default=5000, help="linearised training images x'")
    add("--p", type=between(0, 1), default=0.9, help="share of noisy images if noisy")
    add("--sigma", type=between(0), default=0.1, help="std of their noise, [-1, 1] units")
    add("--conditions", nargs="+", choices=["clean", "noisy"], default=["clean", "noisy"])
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--patch", type=count, default=1, help="side of the patches that the U-Net sees as pixels")
    add("--channels", type=count, nargs="+", default=[64, 64], help="of the U-Net, times 32")
    add("--iters", type=count, default=1500)
    add("--reg-last", type=share, default=1.0, help="L_reg acts in the last share of the steps")
    add("--reg-share", type=share, default=1.0, help="L_reg acts on this share of a batch")
    add("--batch-size", type=count, default=16)
    add("--lr", type=between(0, above=True), default=3e-3)
    add("--eval-every", type=count, default=500)
    add("--n-eval", type=between(2, kind=int), default=64, help="samples behind each number")
    add("--sampler", choices=STEPS, default="ddpm", help="Eq. 5, as P1; ddim: 20 times as fast")
    add("--sample-steps", type=count, help="default ddpm 1000, ddim 50")
    add("--seeds", type=count, default=1, help="runs with seeds --seed, --seed + 1, ...")
    add("--seed", type=runtime.SEED, default=0)
    add("--device", default="auto", help="auto | cpu | cuda | cuda:N")
    add("--out", default="out_butterflies")
    args = parser.parse_args()
    args.sample_steps = args.sample_steps or STEPS[args.sampler]
    if args.sample_steps > 1000:
        raise ValueError(f"--sample-steps {args.sample_steps}: must lie in 1..1000")
    refuse_repeats(args, "methods", "conditions")
    idle = runtime.idle_flags(parser)
    idle("noisy" not in args.conditions, "p sigma", "without --conditions noisy")
    idle(args.methods == ["none"], "reg_last reg_share", "with --methods none")
    if not cells(args):
        raise ValueError("--methods: of several, invariance runs on --conditions noisy alone")
    factor = args.patch * 2 ** (len(args.channels) - 1)
    if any(c % 32 for c in args.channels) or args.image_size % factor:
        raise ValueError(
            f"--channels {args.channels} --patch {args.patch}: need multiples of 32, and "
            f"--image-size a multiple of {factor}"
        )
    return args


def cells(args):
    """[(condition, method)]; the ablation, which is about noise, is left out where others run
    clean.
    """
    found = []
    for condition in args.conditions:
        for method in args.methods:
            if condition == "noisy" or len(args.methods) == 1 or not method.startswith("inv"):
                found.append((condition, method))
    return found


class Subspace:
    """mu (D,), U (k, D) and scales (k,) of the training images, as tensors; their share of
    variance.
    """

    def __init__(self, args, device):
        found = fit_subspace(load(args), args.components)
        self.kept = found[3]
        tensors = [torch.tensor(a, dtype=torch.float32, device=device) for a in found[:3]]
        self.mu, self.scales, self.U = tensors

    def linearised(self, args, seed):
        """-> x' = mu + sum_i lambda_i alpha_i U_i (n, D), and the same with its fixed noise."""
        g = torch.Generator().manual_seed(seed_at(seed, 0, stream=5))
        device = self.mu.device
        alpha = torch.randn(args.n_train, args.components, generator=g).to(device)
        clean = self.mu + (alpha * self.scales) @ self.U
        noise = args.sigma * torch.randn(clean.shape, generator=g).to(device)
        chosen = torch.randperm(args.n_train, generator=g)[: round(args.p * args.n_train)]
        chosen = chosen.to(device)
        return clean, clean.index_add(0, chosen, noise[chosen])

    def scores(self, x):
        """Of samples x (n, D): means of rho and of the PSNR to the subspace, signal_std."""
        rho = subspace_error(x, self.mu, self.U).mean().item()
        quality = metrics.psnr(x, project(x, self.mu, self.U)).mean().item()
        inside = ((x - self.mu) @ self.U.T / self.scales).std(0).mean().item()
        return rho, quality, inside


def run_cell(condition, method, data, bound, subspace, args, seed, device):
    """Train on data (n, D) and sample along the way -> [(step, rho, psnr, signal_std)], last
    samples.

    bound: x' leaves [-1, 1] a little, so x^_0 is clipped to its largest value.
    """
    S = args.image_size
    schedule = NoiseSchedule().to(device)
    curve, last = [], []

    def evaluate(net, step):
        options = dict(steps=args.sample_steps, clip=bound)
        index = range(args.n_eval)
        x = generate(net, schedule, index, (3, S, S), seed, device, args.sampler, **options)
        last[:] = [x.flatten(1)]
        curve.append((step, *subspace.scores(last[0])))

    begun = time.time()
    x = data.view(-1, 3, S, S).contiguous(memory_format=torch.channels_last)
    train(method, x, args, seed, schedule, device, evaluate)
    _, rho, quality, inside = curve[-1]
    per_pixel = rho / len(subspace.mu) ** 0.5
    print(
        f"seed {seed} {condition}/{method:12s} rho {rho:6.2f} ({per_pixel:.4f} per pixel)  "
        f"PSNR {quality:5.2f} dB  signal std {inside:.2f}  {time.time() - begun:.0f} s",
        flush=True,
    )
    return curve, last[0].cpu().numpy()


def summary(curves):
    """{cell: {rho, psnr, signal_std: (mean, standard deviation over seeds or None)}}."""
    numbers = {}
    for key, runs in curves.items():
        last = np.array([run[-1][1:] for run in runs.values()])  # (seeds, 3)
        numbers[key] = {}
        for name, column in zip(("rho", "psnr", "signal_std"), last.T):
            spread = float(column.std(ddof=1)) if len(column) > 1 else None
            numbers[key][name] = dict(mean=float(column.mean()), std=spread)
    return numbers


def table(numbers):
    """-> lines of markdown."""
    lines = ["| trained on | method | ρ | PSNR, dB | std within / truth |", "|---" * 5 + "|"]
    for key, found in numbers.items():
        condition, method = key.split("/")
        shown = []
        for value in found.values():
            spread = "" if value["std"] is None else f" ± {value['std']:.3f}"
            shown.append(f"{value['mean']:.3f}{spread}")
        lines.append(f"| {condition} | {STYLE[method][1]} | {' | '.join(shown)} |")
    return lines


def main():
    args = parse_args()
    started = time.time()
    device, _, _ = setup(args.device)
    out = outputs.claim(args.out)
    subspace = Subspace(args, device)
    S = args.image_size
    print(
        f"{args.components} components keep {subspace.kept:.1%} of the variance of {args.data} "
        f"at {S}x{S}"
    )
    axes = dict(mu=subspace.mu.cpu().numpy(), U=subspace.U.cpu().numpy())
    samples = {}  # condition/method: (n, D), of the first seed
    curves = {}  # condition/method: {seed: [(step, rho, psnr, signal_std)]}
    shown = {}
    for seed in range(args.seed, args.seed + args.seeds):
        clean, noisy = subspace.linearised(args, seed)
        bound = clean.abs().max().item()
        if seed == args.seed:
            shown["training data x'"] = clean[:16].cpu()
            shown[f"with noise, p = {args.p:g}, σ = {args.sigma:g}"] = noisy[:16].cpu()
        for condition, method in cells(args):
            data = clean if condition == "clean" else noisy
            curve, x = run_cell(condition, method, data, bound, subspace, args, seed, device)
            key = f"{condition}/{method}"
            curves.setdefault(key, {})[seed] = curve
            samples.setdefault(key, x)
            numbers = summary(curves)  # after each: Ctrl-C keeps those before
            lines = table(numbers)
            (out / "table.md").write_text("\n".join(lines) + "\n")
            np.savez_compressed(out / "samples.npz", **axes, **samples)
    plot_rows(shown, samples, S, out / "rows.png")
    plot_curves(curves, args, out / "curves.png")
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    outputs.write_metrics(
        out, started, seed=args.seed, device=device, n=args.n_eval, args=settings, results=numbers,
        variance_kept=subspace.kept, curves=curves,
    )  # fmt: skip
    print("\n".join(lines))
    print(f"{out}/rows.png, {out}/curves.png, {out}/samples.npz")


def plot_rows(shown, samples, S, path):
    """Fig. 3a: data, corrupted data, samples of each method from the same noise."""
    rows = dict(shown)
    for key, x in samples.items():
        condition, method = key.split("/")
        rows[f"{STYLE[method][1]}, trained {condition}"] = x[:16]
    fig, axes = plt.subplots(len(rows), 1, figsize=(9, 0.62 * len(rows)), layout="constrained")
    for ax, (label, x) in zip(np.atleast_1d(axes), rows.items()):
        images = (np.asarray(x).reshape(-1, 3, S, S).transpose(0, 2, 3, 1) + 1) / 2
        ax.imshow(np.concatenate(list(np.clip(images, 0, 1)), axis=1), interpolation="nearest")
        ax.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
        ax.set(xticks=[], yticks=[])
    fig.savefig(path, dpi=130)
    plt.close(fig)


def plot_curves(curves, args, path):
    """Fig. 3b: PSNR and rho through training, clean above noisy; bands span the seeds."""
    height = len(args.conditions)
    fig, axes = plt.subplots(
        height, 2, figsize=(9, 3 * height), layout="constrained", squeeze=False, sharex=True
    )
    titles = dict(
        clean="trained on clean images",
        noisy=f"on noisy images (p = {args.p:g}, σ = {args.sigma:g})",
    )
    for key, seeds in curves.items():
        condition, method = key.split("/")
        colour, label = STYLE[method]
        runs = np.array(list(seeds.values()))  # (seeds, evaluations, 4)
        steps = runs[0, :, 0]
        for ax, column in zip(axes[args.conditions.index(condition)], (2, 1)):
            y = runs[:, :, column]
            ax.plot(steps, y.mean(0), color=colour, label=label, marker="o", ms=3)
            ax.fill_between(steps, y.min(0), y.max(0), color=colour, alpha=0.2, lw=0)
    for row, condition in zip(axes, args.conditions):
        row[0].set(ylabel="PSNR to the subspace, dB", title=titles[condition])
        row[1].set(ylabel="ρ, distance from the subspace", title=titles[condition])
        if condition == "noisy":
            row[1].set_yscale("log")
        for ax in row:
            ax.grid(alpha=0.3)
    for ax in axes[-1]:
        ax.set_xlabel("training step")
    handles, labels = axes[-1][0].get_legend_handles_labels()
    place = dict(loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    fig.legend(handles, labels, **place)
    fig.savefig(path, dpi=130)
    plt.close(fig)


if __name__ == "__main__":
    runtime.cli(main)
