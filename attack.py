"""Attack the sampler on a share of its steps, and see what becomes of the samples (P1 Fig. 7).

    python attack.py --ckpt ddpm/ckpt.pt robust/ckpt.pt --n 10000 --fid                   # Fig. 7
    python attack.py --ckpt ddpm/ckpt.pt robust/ckpt.pt --sampler ddim --steps 50 --n 64  # minutes
    python attack.py --ckpt out/ckpt.pt --steps 100 --attack-iters 5           # projected steps
    python attack.py --ckpt out/ckpt.pt --steps 100 --objective mean           # J as P1 prints it

The claim (P1 §3.4): the attack ruins a DDPM, while Robust_adv bears it on up to half of the steps.
The attack, its objectives and its checks: sampler_attack.py. Beside it always stands a control, a
random delta = scale_t (+1 or -1): what the size of delta explains without its direction (ours).

Leaves --out/attack.png, rows.png, table.csv and metrics.json. A violated check is printed on stderr
and kept in metrics.json; the run goes on. Image i, attacked or not, is a function of --seed and i
alone, up to the network's rounding, which can turn the sign of a gradient near 0. Share 0 is the
sample of sample.py, bit for bit.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torchvision.utils import make_grid
from tqdm import tqdm

import metrics
import outputs
import runtime
import sample
from data import to_float
from losses import NoiseSchedule
from outputs import plt
from runtime import between
from sampler_attack import COUNTED, OBJECTIVES, Attack, attacked_steps, sampler_steps, summarise


def attacked_samples(model, size, runs, args, options, where, bar):
    """-> images (R, n, S, S, 3) uint8 and counts {name: (R, n)}, the same on every process.

    runs: R times (share, kind), the first unattacked; where: (device, rank, world).
    """
    device, rank, world = where
    schedule = NoiseSchedule().to(device)
    mine = list(range(args.n))[rank::world]
    images = torch.zeros(len(runs), args.n, size, size, 3, dtype=torch.uint8)
    zeros = torch.zeros(len(runs), args.n, dtype=torch.float64)
    rows = {name: zeros.clone() for name in [*COUNTED, "change_square", "lost"]}
    settings = dict(objective=args.objective, scale=args.scale, phi=args.phi)
    settings |= dict(iters=args.attack_iters, factor=args.attack_factor)
    for numbers, count in sample.batches(mine, args.batch_size, sample.is_compiled(model)):
        index = torch.tensor(numbers, device=device)
        kept = numbers[:count]
        for k, (share, kind) in enumerate(runs):
            hook = None
            if share > 0:
                attack = (model, schedule, args.sampler, options, index, args.seed, share, kind)
                hook = Attack(*attack, **settings)
            with runtime.autocast(device, args.amp):
                x = sample.generate(
                    model,
                    schedule,
                    index,
                    (3, size, size),
                    args.seed,
                    device,
                    args.sampler,
                    on_step=hook,
                    **options,
                )
            finite = x.isfinite().flatten(1).all(1)
            if hook is None and not finite.all():
                raise outputs.Failed("samples hold NaN or infinity; did training diverge?")
            x = x.nan_to_num(0, 0, 0)
            if hook is None:
                clean = x
            counts = {} if hook is None else hook.counts
            change = (x - clean).flatten(1).double()
            counts |= dict(change_square=change.square().mean(1), lost=~finite)
            images[k, kept] = metrics.to_uint8(x[:count]).permute(0, 2, 3, 1).cpu()
            for name, values in counts.items():
                rows[name][k, kept] = values[:count].cpu().double()
            bar.update(count)
    if world > 1:  # every row is written by one process; the others hold zeros
        for part in (images, *rows.values()):
            dist.all_reduce(part)
    return images.numpy(), rows


def score(images, counts, kind, args, scorer, data, device):
    """The numbers of one sample (n, S, S, 3) uint8; change_rms is the RMS of x - x unattacked, per
    pixel of [-1, 1]."""
    x = to_float(torch.from_numpy(images))
    numbers = dict(
        noise_level=metrics.noise_level(x).mean().item(),
        change_rms=counts["change_square"].mean().sqrt().item(),
    )
    if args.fid:
        numbers |= sample.evaluate(images, args, scorer, data, device)
    if kind == "adversarial":
        numbers["checks"] = summarise(counts)
    return numbers


def parse():
    """-> args, and the sampler's options; what cannot work is refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    shares = dict(type=between(0, 1), nargs="+", default=[0, 0.25, 0.5, 0.75, 1])
    positive = between(0, above=True)
    count = between(1, kind=int)
    add("--ckpt", required=True, nargs="+", help="checkpoints of train.py, or diffusers folders")
    add("--n", type=count, default=64, help="images of each kind; P1's Fig. 7 needs 10,000")
    add("--attacked", **shares, metavar="SHARE", help="shares of the steps; adds 0")
    add("--objective", choices=OBJECTIVES, default="x0", help="what J measures; P1 prints mean")
    add("--scale", choices=["std", "var"], default="std", help="|delta|: sqrt(beta_t) or beta_t")
    add("--phi", type=positive, default=1.0, help="the random start's std over scale_t")
    add("--attack-iters", type=count, default=1, help="1: FGSM; more: projected steps")
    add("--attack-factor", type=between(1), default=2.0, help="size of those, times scale_t / K")
    add("--steps", type=int, help="default: ddpm 1000, ddim 100")
    add("--spacing", default="respaced", help="ddpm, for fewer steps: respaced | naive | truncated")
    add("--fid", action="store_true", help="FID and IS against the clean images of --data")
    add("--out", default="attack")
    sample.add_arguments(parser)
    args = parser.parse_args()
    idle = runtime.idle_flags(parser)
    idle(not args.fid, f"data {sample.UNSCORED}", "without --fid")
    idle(args.attack_iters == 1, "attack_factor", "with --attack-iters 1")
    if args.sampler == "heun":
        raise ValueError("--sampler heun: the attack is defined on the steps of ddpm and ddim")
    options = sample.sampler_options(args, args.steps, args.spacing)
    args.n_steps = len(sampler_steps(args.sampler, options, NoiseSchedule().T)[0])
    args.attacked = sorted({0.0, *args.attacked})
    if len(args.attacked) > 1 and not attacked_steps(args.n_steps, args.attacked[1]):
        least = f"need at least {1 / args.n_steps:.3g}, or 0"
        raise ValueError(f"--attacked {args.attacked[1]}: is no step of {args.n_steps}; {least}")
    if args.n < 1 + args.fid:
        raise ValueError(f"--n {args.n}: --fid needs 2 images, a covariance")
    return args, options


def load(args, device, rank):
    """-> {folder of a checkpoint: (model, size, training settings)}, and the network of --fid."""
    names = sample.folder_names(args.ckpt)
    models = {name: sample.load_model(path, args, device) for name, path in zip(names, args.ckpt)}
    if not args.fid:
        return models, None
    sizes = sorted({size for _, size, _ in models.values()})
    if len(sizes) > 1:
        raise ValueError(
            f"--ckpt: image sizes {sizes} differ, and --fid compares with one reference; "
            "give --image-size"
        )
    return models, sample.prepare_scorer(models, args) if rank == 0 else None


def main():
    started = time.time()
    args, options = parse()
    device, rank, world = where = runtime.setup(args.device, parallel=True)
    models, scorer = load(args, device, rank)
    out = outputs.claim(args.out) if rank == 0 else Path(args.out)
    runs = [(0.0, "none")]
    for share in args.attacked[1:]:
        runs += [(share, "adversarial"), (share, "random")]
    record, pictures = {}, {}
    total = len(range(args.n)[rank::world]) * len(runs) * len(models)
    label = f"attack {args.sampler} {args.n_steps} steps"
    with tqdm(total=total, desc=label, unit="img", disable=rank > 0) as bar:
        for name, (model, size, trained) in models.items():
            model.requires_grad_(False)  # once: each state would compile a network again
            images, counts = attacked_samples(model, size, runs, args, options, where, bar)
            pictures[name] = torch.from_numpy(images[:, :10]).permute(0, 1, 4, 2, 3) / 255
            record[name] = []
            data = args.data or trained.get("data")
            for k, (share, kind) in enumerate(runs if rank == 0 else []):
                of_run = {key: values[k] for key, values in counts.items()}
                steps = len(attacked_steps(args.n_steps, share))
                numbers = dict(share=share, kind=kind, attacked_steps=steps)
                numbers |= score(images[k], of_run, kind, args, scorer, data, device)
                record[name].append(numbers)
                for line in numbers.get("checks", {}).get("violated", []):
                    text = f"CHECK VIOLATED: {name}, {share:.0%} of the steps: {line}"
                    tqdm.write(text, file=sys.stderr)
            if rank == 0:  # after each: Ctrl-C keeps those before
                outputs.write_table(out / "table.csv", table(record))
    if rank == 0:
        methods = {name: trained.get("robust") for name, (_, _, trained) in models.items()}
        panels = [scorer[1], "change_rms"] if scorer else ["noise_level", "change_rms"]
        plot_curves(record, panels, args, outputs.styles(methods), out / "attack.png")
        plot_rows(pictures, runs, out / "rows.png")
        of_attacks = [d for ds in record.values() for d in ds if "checks" in d]
        violated = sum(len(d["checks"]["violated"]) for d in of_attacks)
        settings = ["n", "sampler", "objective", "scale", "phi", "attack_iters", "attack_factor"]
        settings = {name: getattr(args, name) for name in settings} | options
        settings |= dict(violated=violated, checkpoints=record)
        runtime.write_metrics(out, started, seed=args.seed, device=device, **settings)
        print((out / "table.csv").read_text(), end="")
        print(f"{violated} checks violated -> {out}/attack.png, rows.png, metrics.json")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def table(record):
    """A row for each checkpoint, share and kind: the numbers and, of an attack, its checks."""
    rows = []
    for name, ds in record.items():
        for d in ds:
            row = dict(name=name) | d
            checks = row.pop("checks", {})
            rows.append(row | checks)
    return rows


def plot_curves(record, quantities, args, styles, path):
    """Fig. 7: over the share of steps attacked; solid adversarial, dashed random."""
    labels = dict(
        noise_level="noise level ([-1, 1] scale)",
        change_rms="RMS of x - unattacked per pixel",
        IS="Inception Score",
    )
    fig, axes = plt.subplots(1, len(quantities), figsize=(10, 3.4), layout="constrained")
    for ax, quantity in zip(axes, quantities):
        for name, ds in record.items():
            colour, label = styles[name]
            for kind, line in (("adversarial", "o-"), ("random", "s--")):
                points = [
                    (100 * d["share"], d[quantity]) for d in ds if d["kind"] in ("none", kind)
                ]
                if len(points) > 1 or kind == "adversarial":
                    ax.plot(*zip(*points), line, color=colour, label=f"{label}, {kind}", ms=4)
        ylabel = labels.get(quantity, quantity.replace(" in ", "\nin "))
        ax.set(xlabel="attacked steps (%)", ylabel=ylabel)
        ax.grid(alpha=0.3)
    size = dict(std="√β", var="β")[args.scale]
    fig.suptitle(
        f"Attack on {args.sampler.upper()}, {args.n_steps} steps, J: {args.objective}, "
        f"max |δ| = {size}$_t$, {args.attack_iters} gradient step(s), n = {args.n}",
        fontsize=11,
    )
    handles = axes[0].get_legend_handles_labels()
    fig.legend(*handles, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def plot_rows(pictures, runs, path):
    """The same images at every share, by checkpoint; attack left, control right."""
    shares = sorted({share for share, _ in runs})
    kinds = list(dict.fromkeys(kind for _, kind in runs))[1:] or ["none"]
    blocks = [(name, share) for name in pictures for share in shares]
    size = (5.2 * len(kinds), 0.8 * len(blocks))
    fig, axes = plt.subplots(
        len(blocks), len(kinds), figsize=size, squeeze=False, layout="constrained"
    )
    for row, (name, share) in zip(axes, blocks):
        for ax, kind in zip(row, kinds):
            ax.axis("off")
            x = pictures[name][runs.index((share, kind if share else "none"))]
            grid = make_grid(x, nrow=10, padding=1, pad_value=1)
            ax.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
            what = f"{share:.0%} of the steps, {kind}" if share else "no attack"
            ax.set_title(f"{name}, {what}", fontsize=9, loc="left", pad=2)
    fig.savefig(path, dpi=120)
    plt.close(fig)


if __name__ == "__main__":
    runtime.cli(main)
