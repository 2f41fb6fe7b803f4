"""Attack the sampler on a share of its steps, and see what becomes of the samples (P1 Fig. 7).

    python attack.py --ckpt ddpm/ckpt.pt robust/ckpt.pt --n 10000 --fid                   # Fig. 7
    python attack.py --ckpt ddpm/ckpt.pt robust/ckpt.pt --sampler ddim --steps 50 --n 64  # minutes
    python attack.py --ckpt out/ckpt.pt --steps 100 --objective mean ldm       # J as P1 prints it
    python attack.py --ckpt out/ckpt.pt --steps 100 --attack-iters 1 5 --restarts 1 3
    python attack.py --ckpt out/ckpt.pt --sampler ddim --steps 50 --objective x0 --through 1 50

The claim (P1 §3.4): the attack ruins a DDPM, while Robust_adv bears it on up to half of the steps.
The attack, its objectives and its checks: sampler_attack.py. Of several --objective,
--attack-iters, --restarts and --through every combination is an attack of its own, at every share.
Beside them always stands a control, a random delta = scale_t (+1 or -1): what the size of delta
explains without its direction (ours).

Leaves --out/attack.png, rows.png, table.csv and metrics.json. A violated check is printed on stderr
and kept in metrics.json; the run goes on. Image i, attacked or not, is a function of --seed and i
alone, up to the network's rounding, which can turn the sign of a gradient near 0. Share 0 is the
sample of sample.py, bit for bit in equal precision: --amp fp32 is the default here, since bf16
rounds the small delta of 1,000 steps away.
"""

import itertools
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
from sampler_attack import (
    COUNTED,
    OBJECTIVES,
    Attack,
    attacked_steps,
    check_through,
    sampler_steps,
    summarise,
)


def attacks(args):
    """Every combination of the values given -> [keyword arguments of Attack]."""
    names = ["objective", "iters", "restarts", "through"]
    values = [args.objective, args.attack_iters, args.restarts, args.through]
    return [dict(zip(names, chosen)) for chosen in itertools.product(*values)]


def describe(settings):
    """An attack in a few words."""
    words = [f"J: {settings['objective']}"]
    for name, unit in [("iters", "steps"), ("restarts", "starts"), ("through", "steps ahead")]:
        if settings[name] > 1:
            words.append(f"{settings[name]} {unit}")
    return ", ".join(words)


def attacked_samples(model, size, runs, args, options, where, bar):
    """-> images (R, n, S, S, 3) uint8 and counts {name: (R, n)}, the same on every process.

    runs: R times (share, kind, settings of the attack), the first unattacked; where: (device, rank,
    world).
    """
    device, rank, world = where
    schedule = NoiseSchedule().to(device)
    mine = list(range(args.n))[rank::world]
    images = torch.zeros(len(runs), args.n, size, size, 3, dtype=torch.uint8)
    zeros = torch.zeros(len(runs), args.n, dtype=torch.float64)
    rows = {name: zeros.clone() for name in [*COUNTED, "change_square", "lost"]}
    common = dict(scale=args.scale, phi=args.phi, factor=args.attack_factor)
    for numbers, count in sample.batches(mine, args.batch_size, sample.is_compiled(model)):
        index = torch.tensor(numbers, device=device)
        kept = numbers[:count]
        for k, (share, kind, settings) in enumerate(runs):
            hook = None
            if share > 0:
                attack = (model, schedule, args.sampler, options, index, args.seed, share, kind)
                hook = Attack(*attack, **common, **settings)
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


def score(images, counts, kind, args, scorer, reference, device):
    """The numbers of one sample (n, S, S, 3) uint8; change_rms is the RMS of x - x unattacked, per
    pixel of [-1, 1], change_95 its 95 % interval over images."""
    squares = counts["change_square"]
    x = to_float(torch.from_numpy(images))
    numbers = dict(
        noise_level=metrics.noise_level(x).mean().item(),
        change_rms=squares.mean().sqrt().item(),
        change_95=metrics.rms_interval(squares),
    )
    if args.fid:
        numbers |= sample.evaluate(images, args, scorer, reference, device)
    if kind == "adversarial":
        numbers["checks"] = summarise(counts)
    return numbers


def parse():
    """-> args, and the sampler's options; what cannot work is refused."""
    parser = runtime.parser(__doc__)
    add = parser.add_argument
    shares = dict(type=between(0, 1), nargs="+", default=[0, 0.25, 0.5, 0.75, 1])
    positive = between(0, above=True)
    count = between(1, kind=int)
    add("--ckpt", required=True, nargs="+", help="checkpoints of train.py, or diffusers folders")
    add("--n", type=count, default=64, help="images of each kind; P1's Fig. 7 needs 10,000")
    add("--attacked", **shares, metavar="SHARE", help="shares of the steps; adds 0")
    many = dict(type=count, nargs="+", default=[1])
    what = dict(choices=OBJECTIVES, nargs="+", default=["ldm"])
    add("--objective", **what, help="what J measures; P1 prints mean")
    add("--scale", choices=["std", "var"], default="std", help="|delta|: sqrt(beta_t) or beta_t")
    add("--phi", type=positive, default=1.0, help="the random start's std over scale_t")
    add("--attack-iters", **many, metavar="K", help="1: FGSM; more: projected steps")
    add("--restarts", **many, metavar="R", help="random starts, of which the best counts")
    add("--through", **many, metavar="K", help="x0 is that of the K-th step from here; ddim, eta 0")
    add("--attack-factor", type=between(1), default=2.0, help="size of those, times scale_t / K")
    add("--steps", type=int, help="default: ddpm 1000, ddim 100")
    add("--spacing", default="respaced", help="ddpm, for fewer steps: respaced | naive | truncated")
    add("--fid", action="store_true", help="FID and IS against the clean images of --data")
    add("--out", default="attack")
    sample.add_arguments(parser)
    parser.set_defaults(amp="fp32")  # bf16 rounds a delta of beta_t away, and its gradient with it
    args = parser.parse_args()
    idle = runtime.idle_flags(parser)
    idle(not args.fid, f"data {sample.FID_FLAGS}", "without --fid")
    idle(set(args.attack_iters) == {1}, "attack_factor", "with --attack-iters 1")
    if args.sampler == "heun":
        raise ValueError("--sampler heun: the attack is defined on the steps of ddpm and ddim")
    options = sample.sampler_options(args, args.steps, args.spacing)
    runtime.refuse_repeats(args, "objective", "attack_iters", "restarts", "through")
    for settings in attacks(args):
        check_through(settings["through"], settings["objective"], args.sampler, options)
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
    graphs = max(args.through) == 1  # a gradient through several steps needs the outputs of all
    models = {
        name: sample.load_model(path, args, device, graphs) for name, path in zip(names, args.ckpt)
    }
    if not args.fid:
        return models, None
    sizes = sorted({size for _, size, _ in models.values()})
    if len(sizes) > 1:
        raise ValueError(f"--ckpt: image sizes {sizes} differ; --fid needs one; give --image-size")
    return models, sample.prepare_scorer(models, args) if rank == 0 else None


def main():
    started = time.time()
    args, options = parse()
    device, rank, world = where = runtime.setup(args.device, True, args.compile)
    if args.amp == "fp32":
        # not TF32, whose 10 bits would round a small delta away
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
    models, scorer = load(args, device, rank)
    out = outputs.claim(args.out) if rank == 0 else Path(args.out)
    runs = [(0.0, "none", {})]
    for share in args.attacked[1:]:
        runs += [(share, "adversarial", settings) for settings in attacks(args)]
        runs += [(share, "random", {})]
    record, pictures = {}, {}
    references = {None: None}  # of a set: what --fid compares with
    total = len(range(args.n)[rank::world]) * len(runs) * len(models)
    label = f"attack {args.sampler} {args.n_steps} steps"
    with tqdm(total=total, desc=label, unit="img", disable=rank > 0) as bar:
        for name, (model, size, trained) in models.items():
            model.requires_grad_(False)  # once: each state would compile a network again
            images, counts = attacked_samples(model, size, runs, args, options, where, bar)
            pictures[name] = torch.from_numpy(images[:, :10]).permute(0, 1, 4, 2, 3) / 255
            record[name] = []
            data = sample.reference_name(args, trained) if scorer else None
            if data not in references:
                references[data] = sample.reference_of(data, size, args, scorer, device)
            for k, (share, kind, settings) in enumerate(runs if rank == 0 else []):
                of_run = {key: values[k] for key, values in counts.items()}
                steps = len(attacked_steps(args.n_steps, share))
                numbers = dict(share=share, kind=kind, attacked_steps=steps) | settings
                numbers |= score(images[k], of_run, kind, args, scorer, references[data], device)
                record[name].append(numbers)
                for line in numbers.get("checks", {}).get("violated", []):
                    which = f"{name}, {describe(settings)}, {share:.0%} of the steps"
                    text = f"CHECK VIOLATED: {which}: {line}"
                    tqdm.write(text, file=sys.stderr)
            if rank == 0:  # after each: Ctrl-C keeps those before
                outputs.write_table(out / "table.csv", table(record))
    if rank == 0:
        methods = {name: outputs.method_of(trained) for name, (_, _, trained) in models.items()}
        panels = [scorer[1], "change_rms"] if scorer else ["noise_level", "change_rms"]
        plot_curves(record, panels, args, outputs.styles(methods), out / "attack.png")
        plot_rows(pictures, runs, out / "rows.png")
        of_attacks = [d for ds in record.values() for d in ds if "checks" in d]
        violated = sum(len(d["checks"]["violated"]) for d in of_attacks)
        settings = ["n", "sampler", "scale", "phi", "attack_factor"]
        settings = {name: getattr(args, name) for name in settings} | options
        settings |= dict(violated=violated, checkpoints=record)
        outputs.write_metrics(out, started, seed=args.seed, device=device, **settings)
        print((out / "table.csv").read_text(), end="")
        print(f"{violated} checks violated -> {out}/attack.png, rows.png, metrics.json")
    runtime.leave(world)


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
    """Fig. 7: over the share of steps attacked; solid adversarial, dashed random. A row of panels
    for each attack; bars: 95 % intervals over images."""
    labels = dict(
        noise_level="noise level ([-1, 1] scale)",
        change_rms="RMS of x - unattacked per pixel",
        IS="Inception Score",
    )
    rows = attacks(args)
    size = (10, 0.8 + 2.6 * len(rows))
    grid = dict(figsize=size, squeeze=False, sharey="col", layout="constrained")
    fig, axes = plt.subplots(len(rows), len(quantities), **grid)
    for row, settings in zip(axes, rows):
        for ax, quantity in zip(row, quantities):
            for name, ds in record.items():
                plot_lines(ax, ds, quantity, settings, *styles[name])
            ylabel = labels.get(quantity, quantity.replace(" in ", "\nin "))
            ax.set(title=describe(settings), xlabel="attacked steps (%)", ylabel=ylabel)
            ax.grid(alpha=0.3)
    size = dict(std="√β", var="β")[args.scale]
    about = f"{args.sampler.upper()}, {args.n_steps} steps, max |δ| = {size}$_t$, n = {args.n}"
    fig.suptitle(f"Attack on {about}", fontsize=11)
    handles = axes[0, 0].get_legend_handles_labels()
    fig.legend(*handles, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def plot_lines(ax, ds, quantity, settings, colour, label):
    """One attack and the control on one checkpoint, whose rows are ds."""
    none = [d for d in ds if d["kind"] == "none"]
    attacked = [d for d in ds if d["kind"] == "adversarial" and settings.items() <= d.items()]
    random = [d for d in ds if d["kind"] == "random"]
    for kind, line, of_kind in (("adversarial", "o-", attacked), ("random", "s--", random)):
        points = none + of_kind
        share = [100 * d["share"] for d in points]
        values = [d[quantity] for d in points]
        bars = None
        if quantity == "change_rms":
            below = [max(0, v - d["change_95"][0]) for v, d in zip(values, points)]
            above = [max(0, d["change_95"][1] - v) for v, d in zip(values, points)]
            bars = [below, above]
        ax.errorbar(share, values, bars, fmt=line, color=colour, label=f"{label}, {kind}", ms=4)


def plot_rows(pictures, runs, path):
    """The same images at every share, by checkpoint; the attacks left, the control right."""
    shares = sorted({share for share, _, _ in runs})
    columns = [(kind, settings) for share, kind, settings in runs if share == shares[-1]]
    blocks = [(name, share) for name in pictures for share in shares]
    size = (5.2 * len(columns), 0.8 * len(blocks))
    grid = dict(figsize=size, squeeze=False, layout="constrained")
    fig, axes = plt.subplots(len(blocks), len(columns), **grid)
    for row, (name, share) in zip(axes, blocks):
        for ax, (kind, settings) in zip(row, columns):
            ax.axis("off")
            k = runs.index((share, kind, settings)) if share else 0
            x = make_grid(pictures[name][k], nrow=10, padding=1, pad_value=1)
            ax.imshow(x.permute(1, 2, 0).numpy(), interpolation="nearest")
            attack = describe(settings) if settings else kind
            what = f"{share:.0%} of the steps, {attack}" if share else "no attack"
            ax.set_title(f"{name}, {what}", fontsize=9, loc="left", pad=2)
    fig.savefig(path, dpi=120)
    plt.close(fig)


if __name__ == "__main__":
    runtime.cli(main)
