"""Attack the sampler: an adversarial delta is added to x_t on a share of the steps (P1 Algorithm 2, App. A.1, Fig. 7).

    python attack.py --ckpt ddpm/ckpt.pt robust/ckpt.pt --n 10000 --fid                     # Fig. 7
    python attack.py --ckpt ddpm/ckpt.pt robust/ckpt.pt --sampler ddim --steps 50 --n 64    # minutes, without Inception
    python attack.py --ckpt out/ckpt.pt --steps 100 --attack-iters 5 --eot 4                # projected steps, averaged noise

The claim (P1 §3.4): the attack ruins a DDPM, while Robust_adv bears it on up to half of the steps. On an attacked step, with
mean() the noiseless part of the sampler's own step and scale_t = sqrt(beta_t) of that step between its two noise levels
(`--scale var`: beta_t; P1's text says both, its formulas sigma(t) = beta_t),

    x'    = x_t + phi scale_t N(0, I)                      the random start: at x_t itself the gradient of J is 0
    J(x') = |mean(x_t) - mean(x')|^2                       summed over the elements of a sample
    delta = scale_t sign(grad J(x'));  the sampler goes on from x_t + delta.

Ours: phi = 1 (P1 gives no value); the gradient is of this J (Algorithm 2 prints L_DM, App. A.1 L_FGSM) with x^_0 predicted at
x' and clipped as the sampler does; `--attack-iters k`, projected steps; `--eot`, which averages over the sampler's noise; and
the control, a random delta = scale_t (+1 or -1): what the size of delta explains without its direction. Read the attack beside
it: where beta_t is small, mean(x) is nearly x whatever the network, and delta little more than the sign of its random start
(with P1's 1,000 steps in 99 % and more of its elements, on the networks tried).

The checks are always on: delta in the ball, gradients finite and not 0 (up to 1 in 1,000), a twentieth of scale_t along the
gradient's signs raises J over the start; and J(x_t + delta) above J of the start and of |delta| with random signs; each in 90 %
of (sample, step). The last two fail with a correct gradient too, where the attack is no stronger than its start: a finding, see
same_sign, the share of delta's signs that are the start's. J is compared on at most 20 evenly spaced attacked steps, as it
takes 4 more network calls. A violation is printed on stderr and kept in metrics.json; the run goes on.

Leaves --out/attack.png, rows.png, table.csv and metrics.json. Image i, attacked or not, is a function of --seed and i alone,
up to the network's rounding, which can turn the sign of a gradient near 0. Share 0 is the sample of sample.py, bit for bit.
"""

import argparse
import functools
import math
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
from torchvision.utils import make_grid
from tqdm import tqdm

import metrics
import runtime
import sample
from data import image_noise, load_images, to_float
from losses import NoiseSchedule, frozen, like
from samplers import ddim_step, ddim_timesteps, ddpm_step, ddpm_timesteps

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

PROBES, ENOUGH = (
    20,
    0.9,
)  # attacked steps on which J is compared; share of (sample, step) in which the attack must win
TALLY = [
    "outside",
    "steps",
    "size",
    "elements",
    "nonfinite",
    "zero",
    "probes",
    "ascends",
    "above_start",
    "above_random",
    "same_sign",
    "start_size",
    "J",
    "J_random",
    "change_abs",
    "change_square",
    "lost",
]  # counted per image

# ---------------------------------------------------------------------------------------------------------------------
# the attack


def attacked_steps(n_steps, share):
    """Indices, 0 the noisiest, of the steps attacked: floor(n_steps share) of them, uniformly spaced, the last one included."""
    if not 0 <= share <= 1:
        raise ValueError(f"--attacked {share}: a share of the steps must lie in [0, 1]")
    count = [math.floor(i * share + 1e-9) for i in range(n_steps + 1)]  # 100 * 0.29 is 28.999...
    return [i for i in range(n_steps) if count[i + 1] > count[i]]


def sampler_steps(sampler, options, T):
    """The pairs (t, t_prev) of ddpm_sample or ddim_sample and their step(x_t, eps, z, abar, abar_prev) -> x_{t-1}."""
    if sampler == "ddpm":
        pairs = ddpm_timesteps(T, options["steps"], options["spacing"])
        return pairs, functools.partial(
            ddpm_step, clip=options["clip"], variance=options["variance"]
        )
    return ddim_timesteps(T, options["steps"]), functools.partial(
        ddim_step, eta=options["eta"], clip=options["clip"]
    )


def stream(i, j):
    """The random stream of draw j at step i: above those of sample.generate (0..T), below data.CORRUPTION_STREAM."""
    return 2**31 + i * 2**20 + j


def attack(
    model,
    schedule,
    pairs,
    step,
    index,
    seed,
    attacked,
    kind="adversarial",
    scale="std",
    phi=1.0,
    iters=1,
    factor=2.0,
    eot=0,
    tally=None,
):
    """The hook on_step(i, t, x_t) -> x_t + delta for ddpm_sample and ddim_sample (P1 Algorithm 2).

    pairs, step: of sampler_steps; index (B,): the images' numbers; attacked: of attacked_steps. kind: "adversarial" or
    "random", whose delta is scale_t times random signs: of the norms of one FGSM step, at least those of a projected one.
    iters > 1: `iters` steps of factor scale_t / iters from the start, all in the l_inf ball of radius scale_t around x_t.
    eot = N > 0: J compares draws x_{t-1} = mean + s_t z, independent for both; gradients are averaged over N draws. A step
    is affine in z, so that the averaged z has the averaged gradient. N = 0 is the expectation: the noise adds a constant to it.
    tally: (B, len(TALLY)) float64, counted up in place. An element without a finite gradient is counted and not moved.
    Network calls per attacked step, beside the sampler's: 1 + iters (with gradient), and 4 on at most PROBES of them. No graph
    outlives a step, so that memory does not depend on T.
    """
    alphas_bar = schedule.alphas_bar.to(
        index.device
    )  # index lies where x_t does: no copies in the loop
    abars = torch.cat([torch.ones_like(alphas_bar[:1]), alphas_bar])  # at index t + 1
    chosen, probed = set(attacked), set()
    if tally is not None:
        probed = {
            attacked[round(k)]
            for k in np.linspace(0, len(attacked) - 1, min(PROBES, len(attacked)))
        }

    def count(**columns):
        for name, values in columns.items() if tally is not None else ():
            tally[:, TALLY.index(name)] += values

    def on_step(i, t, x_t):
        if i not in chosen:
            return x_t
        ts = torch.full((len(x_t),), t, device=x_t.device)
        abar, abar_prev = (abars[k + 1].expand(len(x_t)) for k in pairs[i])
        beta = 1 - abar / abar_prev
        r = like(beta.sqrt() if scale == "std" else beta, x_t)  # scale_t

        def draw(j):  # N(0, I) in x_t's dtype and memory format
            return torch.empty_like(x_t).copy_(
                image_noise(seed, index, stream(i, j), x_t.shape[1:])
            )

        def J(delta, z=(0.0, 0.0)):  # (B,)
            x = x_t + delta
            gap = step(x_t, eps_x, z[0], abar, abar_prev) - step(
                x, model(x, ts).to(x.dtype), z[1], abar, abar_prev
            )
            return gap.square().flatten(1).sum(1)

        def ascent(delta, k):  # sign(grad J)
            first = 2 + 2 * eot * k
            z = [
                sum(draw(j) for j in range(first + side, first + 2 * eot, 2)) / max(eot, 1)
                for side in (0, 1)
            ]
            with torch.enable_grad():
                delta = delta.detach().requires_grad_()
                # over scale_t^2, which leaves the sign and keeps half-precision gradients off 0
                (grad,) = torch.autograd.grad((J(delta, z) / r.flatten().square()).sum(), delta)
            finite = grad.isfinite()
            count(
                elements=grad[0].numel(),
                nonfinite=(~finite).flatten(1).sum(1),
                zero=(grad == 0).flatten(1).sum(1),
            )
            return grad.sign().where(finite, 0)

        signs = 1 - 2 * (draw(1) < 0).to(x_t.dtype)
        if kind == "random":
            delta = r * signs
        else:
            with torch.no_grad(), frozen(model):
                eps_x = (
                    model(x_t, ts).to(x_t.dtype).clone()
                )  # a CUDA graph writes its next output over this one
                start = phi * r * draw(0)
                if iters > 1:
                    start = start.clamp(-r, r)
                first = ascent(start, 0)
                delta = r * first  # from x_t, not from the start
                if iters > 1:
                    delta = (start + factor * r / iters * first).clamp(-r, r)
                    for k in range(1, iters):
                        delta = (delta + factor * r / iters * ascent(delta, k)).clamp(-r, r)
                if i in probed:
                    ours, theirs, randoms = J(delta), J(start), J(delta.abs() * signs)
                    count(
                        ascends=J(start + 0.05 * r * first) > theirs,
                        same_sign=(delta.sign() == start.sign()).flatten(1).double().mean(1),
                    )
                    sizes, unit = (
                        [d.flatten(1).norm(dim=1) for d in (start, delta)],
                        r.flatten().square(),
                    )
                    count(
                        probes=1,
                        above_start=ours > theirs,
                        above_random=ours > randoms,
                        J=ours / unit,
                        J_random=randoms / unit,
                        start_size=sizes[0] / sizes[1],
                    )
        ratio = (delta / r).flatten(1)
        count(steps=1, size=ratio.square().mean(1).sqrt(), outside=(ratio.abs() > 1 + 1e-5).sum(1))
        return x_t + delta

    return on_step


def summarise(rows):
    """rows (n, len(TALLY)) of an adversarial sample -> its checks, `violated` among them: one line for each that fails.

    rms_delta is in units of scale_t; J_above_*: shares of (sample, step); J_over_random: mean J over mean J of
    +-|delta|; start_over_delta: l2 norm of the start over delta's, without which J_above_start says little if phi is not 1.
    """
    s = dict(zip(TALLY, rows.sum(0).tolist()))
    probes, elements = max(s["probes"], 1), max(s["elements"], 1)
    c = dict(
        outside_ball=int(s["outside"]),
        rms_delta=s["size"] / max(s["steps"], 1),
        nonfinite_gradients=int(s["nonfinite"]),
        zero_gradients=s["zero"] / elements,
        probes=int(s["probes"]),
        ascends=s["ascends"] / probes,
        same_sign=s["same_sign"] / probes,
        J_above_start=s["above_start"] / probes,
        J_above_random=s["above_random"] / probes,
        J_over_random=s["J"] / (s["J_random"] or 1),
        start_over_delta=s["start_size"] / probes,
        lost=int(s["lost"]),
    )
    c["violated"] = [
        line
        for ok, line in (
            (s["outside"] == 0, f"ball: {c['outside_ball']} elements of delta exceed scale_t"),
            (
                s["nonfinite"] == 0,
                f"gradient: {c['nonfinite_gradients']} elements are NaN or infinite",
            ),
            (
                c["zero_gradients"] <= 1e-3,
                f"gradient: {c['zero_gradients']:.2%} of the elements are 0, where sign() makes no step",
            ),
            (
                c["ascends"] >= ENOUGH,
                f"gradient: a small step along its signs raises J in only {c['ascends']:.0%} of "
                f"{c['probes']} (sample, step)",
            ),
            (
                c["J_above_start"] >= ENOUGH,
                f"J: above the random start ({c['start_over_delta']:.2f} of delta's norm) in only "
                f"{c['J_above_start']:.0%} of {c['probes']} (sample, step)",
            ),
            (
                c["J_above_random"] >= ENOUGH,
                f"J: above random signs of equal norm in only {c['J_above_random']:.0%} of "
                f"{c['probes']} (sample, step): hardly stronger than the control",
            ),
            (s["lost"] == 0, f"samples: {c['lost']} hold NaN or infinity, shown and scored as 0"),
        )
        if not ok
    ]
    return c


# ---------------------------------------------------------------------------------------------------------------------
# the experiment


def attacked_samples(model, size, args, options, runs, device, rank, world, bar):
    """runs: (share, kind) -> images (R, n, S, S, 3) uint8, rows (R, n, len(TALLY)) float64, on every process."""
    schedule, mine = NoiseSchedule().to(device), list(range(args.n))[rank::world]
    pairs, step = sampler_steps(args.sampler, options, schedule.T)
    images = torch.zeros(len(runs), args.n, size, size, 3, dtype=torch.uint8)
    rows = torch.zeros(len(runs), args.n, len(TALLY), dtype=torch.float64)
    for numbers, count in sample.batches(mine, args.batch_size, sample.is_compiled(model)):
        index = torch.tensor(numbers, device=device)
        for k, (share, kind) in enumerate(runs):
            tally, on_step = (
                torch.zeros(len(index), len(TALLY), dtype=torch.float64, device=device),
                None,
            )
            if share > 0:
                on_step = attack(
                    model,
                    schedule,
                    pairs,
                    step,
                    index,
                    args.seed,
                    attacked_steps(len(pairs), share),
                    kind,
                    args.scale,
                    args.phi,
                    args.attack_iters,
                    args.attack_factor,
                    args.eot,
                    tally,
                )
            with runtime.autocast(device, args.amp):
                x = sample.generate(
                    model,
                    schedule,
                    index,
                    (3, size, size),
                    args.seed,
                    device,
                    args.sampler,
                    on_step=on_step,
                    **options,
                )
            finite = x.isfinite().flatten(1).all(1)
            if share == 0 and not finite.all():
                raise ValueError(
                    "the unattacked samples hold NaN or infinity; did training diverge?"
                )
            x = x.nan_to_num(0, 0, 0)
            if share == 0:
                clean = x
            change = (x - clean).flatten(1).double()
            tally[:, -3:] = torch.stack(
                [change.abs().mean(1), change.square().mean(1), ~finite], dim=1
            )
            images[k, numbers[:count]] = metrics.to_uint8(x[:count]).permute(0, 2, 3, 1).cpu()
            rows[k, numbers[:count]] = tally[:count].cpu()
            bar.update(count)
    if world > 1:  # every row is written by one process; the others hold zeros
        dist.all_reduce(images)
        dist.all_reduce(rows)
    return images.numpy(), rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ckpt", required=True, nargs="+", help="checkpoints of train.py, or diffusers folders")
    add(
        "--n",
        type=int,
        default=64,
        help="images of each kind; fewer than 10,000 do not compare with P1's Fig. 7",
    )
    add(
        "--attacked",
        type=float,
        nargs="+",
        default=[0, 0.25, 0.5, 0.75, 1],
        metavar="SHARE",
        help="of the steps; adds 0",
    )
    add(
        "--scale",
        choices=["std", "var"],
        default="std",
        help="scale_t, the size of delta: sqrt(beta_t) or beta_t",
    )
    add("--phi", type=float, default=1.0, help="the random start's standard deviation over scale_t")
    add("--attack-iters", type=int, default=1, metavar="K", help="1: FGSM; more: projected steps")
    add(
        "--attack-factor",
        type=float,
        default=2.0,
        help="projected steps are of this times scale_t / K",
    )
    add(
        "--eot",
        type=int,
        default=0,
        metavar="N",
        help="draws of the sampler's noise per gradient; 0: its expectation",
    )
    add(
        "--control",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also a random delta of the same size",
    )
    add("--steps", type=int, help="default: ddpm 1000, ddim 100")
    add("--spacing", default="respaced", help="ddpm, for fewer steps: respaced | naive | truncated")
    add("--fid", action="store_true", help="FID and IS against the clean images of --data")
    add("--out", default="attack")
    sample.add_arguments(parser)
    args, started = parser.parse_args(), time.time()
    if args.sampler == "heun":
        raise ValueError("--sampler heun: the attack is defined on the steps of ddpm and ddim")
    options = sample.sampler_options(args, args.steps, args.spacing)
    n_steps = len(sampler_steps(args.sampler, options, NoiseSchedule().T)[0])
    shares = sorted({0.0, *args.attacked})
    for share in shares:
        if not attacked_steps(n_steps, share) and share > 0:
            raise ValueError(
                f"--attacked {share}: is no step of {n_steps}; need at least {1 / n_steps:.3g}, or 0"
            )
    if args.n < 1 + args.fid or args.batch_size < 1:
        raise ValueError(
            f"--n {args.n} --batch-size {args.batch_size}: need at least {1 + args.fid} and 1"
        )
    if not 0 < args.phi < math.inf or not 1 <= args.attack_factor < math.inf:
        raise ValueError(
            f"--phi {args.phi} --attack-factor {args.attack_factor}: need > 0 (at 0 J has no gradient) and >= 1"
        )
    if args.attack_iters < 1 or args.eot < 0 or args.attack_iters * args.eot >= 2**19:  # see stream
        raise ValueError(
            f"--attack-iters {args.attack_iters} --eot {args.eot}: need >= 1 and >= 0, and a product below 2^19"
        )
    if args.eot and args.sampler == "ddim" and args.eta == 0:
        raise ValueError(f"--eot {args.eot}: ddim with --eta 0 adds no noise to average over")
    device, rank, world = runtime.setup(args.device)
    runtime.autocast(device, args.amp)
    names = [sample.folder_name(c) for c in args.ckpt]
    if len(set(names)) < len(names):
        raise ValueError(
            f"--ckpt: two checkpoints lie in a folder {max(names, key=names.count)}; rename one's"
        )
    models = {name: sample.load_model(path, args, device) for name, path in zip(names, args.ckpt)}
    sizes = sorted({size for _, size, _ in models.values()})
    if args.fid and len(sizes) > 1:
        raise ValueError(
            f"--ckpt: image sizes {sizes} differ, and --fid compares with one reference; give --image-size"
        )
    scorer = (
        sample.features_network(args.features, args.inception_weights)
        if args.fid and rank == 0
        else None
    )
    if scorer:  # before the sampling, so that a missing set or network costs no work
        for _, size, trained in models.values():
            load_images(sample.reference_name(args, trained), size, root=args.data_root)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    runs = [(0.0, "none")] + [
        (s, kind) for s in shares[1:] for kind in ["adversarial", "random"][: 1 + args.control]
    ]
    record, pictures = {}, {}
    total = len(range(args.n)[rank::world]) * len(runs) * len(names)
    with tqdm(
        total=total, desc=f"attack {args.sampler} {n_steps} steps", unit="img", disable=rank > 0
    ) as bar:
        for name, (model, size, trained) in models.items():
            model.requires_grad_(
                False
            )  # once: a compiled network would be compiled again for each state
            images, rows = attacked_samples(
                model, size, args, options, runs, device, rank, world, bar
            )
            pictures[name], record[name] = (
                torch.from_numpy(images[:, :10]).permute(0, 1, 4, 2, 3) / 255,
                [],
            )
            for (share, kind), x, tally in zip(runs, images, rows) if rank == 0 else ():
                numbers = dict(
                    share=share, kind=kind, attacked_steps=len(attacked_steps(n_steps, share))
                )
                record[name].append(
                    numbers
                    | score(x, tally, kind, args, scorer, args.data or trained.get("data"), device)
                )
                for line in record[name][-1].get("checks", {}).get("violated", ()):
                    tqdm.write(
                        f"CHECK VIOLATED: {name}, {share:.0%} of the steps: {line}", file=sys.stderr
                    )
    if rank == 0:
        write_table(record, out / "table.csv")
        panels = [scorer[1], "IS"] if scorer else ["noise_level", "change_abs"]
        plot_curves(record, [*panels, "change_rms"], args, n_steps, out / "attack.png")
        plot_rows(pictures, runs, out / "rows.png")
        violated = sum(
            len(d["checks"]["violated"]) for ds in record.values() for d in ds if "checks" in d
        )
        runtime.write_metrics(
            out,
            started,
            seed=args.seed,
            device=device,
            n=args.n,
            sampler=args.sampler,
            **options,
            scale=args.scale,
            phi=args.phi,
            attack_iters=args.attack_iters,
            eot=args.eot,
            attack_factor=args.attack_factor,
            violated=violated,
            checkpoints=record,
        )
        print(
            (out / "table.csv").read_text()
            + f"{violated} checks violated -> {out}/attack.png, rows.png, metrics.json"
        )
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def score(images, rows, kind, args, scorer, data, device):
    """The numbers of one sample (n, S, S, 3) uint8; change_abs and change_rms are |x - x unattacked| per pixel of [-1, 1]."""
    change_abs, change_square = rows[:, -3:-1].mean(0).tolist()
    x = to_float(torch.from_numpy(images))
    numbers = dict(
        noise_level=metrics.noise_level(x).mean().item(),
        change_abs=change_abs,
        change_rms=change_square**0.5,
    )
    if args.fid:
        numbers |= sample.evaluate(images, args, scorer, data, device)
    return numbers | (dict(checks=summarise(rows)) if kind == "adversarial" else {})


def write_table(record, path):
    """One line per checkpoint, share and kind: the numbers and, of an attack, its checks."""
    rows = [
        dict(name=name) | {k: v for k, v in d.items() if k != "checks"} | d.get("checks", {})
        for name, ds in record.items()
        for d in ds
    ]
    columns = list(dict.fromkeys(k for row in rows for k in row))
    lines = [
        [
            f"{v:.4g}" if isinstance(v, float) else str(len(v) if isinstance(v, list) else v)
            for v in (row.get(k, "") for k in columns)
        ]
        for row in rows
    ]
    path.write_text("\n".join(",".join(line) for line in [columns, *lines]) + "\n")


def plot_curves(record, quantities, args, n_steps, path):
    """Fig. 7: against the share of steps attacked, one colour per checkpoint; solid adversarial, dashed random."""
    labels = dict(
        noise_level="noise level ([-1, 1] scale)",
        change_abs="mean |x - unattacked| per pixel",
        change_rms="RMS of x - unattacked per pixel",
        IS="Inception Score",
    )
    fig, axes = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
    for ax, quantity in zip(axes, quantities):
        for (name, ds), colour in zip(record.items(), runtime.COLOURS * len(record)):
            for kind, line in (("adversarial", "o-"), ("random", "s--")):
                points = [
                    (100 * d["share"], d[quantity]) for d in ds if d["kind"] in ("none", kind)
                ]
                if len(points) > 1 or kind == "adversarial":
                    ax.plot(
                        *zip(*points),
                        line,
                        color=colour,
                        label=f"{name}, {kind}",
                        markersize=4,
                        alpha=0.85,
                    )
        ax.set(
            xlabel="attacked steps (%)",
            ylabel=labels.get(quantity, quantity.replace(" in ", "\nin ")),
        )
        ax.grid(alpha=0.3)
    fig.suptitle(
        f"Attack on {args.sampler.upper()}, {n_steps} steps, max |δ| = "
        f"{dict(std='√β', var='β')[args.scale]}$_t$, {args.attack_iters} gradient step(s), n = {args.n}",
        fontsize=11,
    )
    fig.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4,
        fontsize=9,
        frameon=False,
    )
    fig.savefig(path, dpi=120)
    plt.close(fig)


def plot_rows(pictures, runs, path):
    """The same images at every share: a block of rows per checkpoint, the attack on the left, the control on the right."""
    shares, kinds = (
        sorted({share for share, _ in runs}),
        list(dict.fromkeys(kind for _, kind in runs))[1:] or ["none"],
    )
    blocks = [(name, share) for name in pictures for share in shares]
    size = (5.2 * len(kinds), 0.8 * len(blocks))
    fig, axes = plt.subplots(
        len(blocks), len(kinds), figsize=size, squeeze=False, layout="constrained"
    )
    for row, (name, share) in zip(axes, blocks):
        for ax, kind in zip(row, kinds):
            ax.axis("off")
            x = pictures[name][runs.index((share, kind if share else "none"))]
            ax.imshow(
                make_grid(x, nrow=10, padding=1, pad_value=1).permute(1, 2, 0).numpy(),
                interpolation="nearest",
            )
            what = f"{share:.0%} of the steps, {kind}" if share else "no attack"
            ax.set_title(f"{name}, {what}", fontsize=9, loc="left", pad=2)
    fig.savefig(path, dpi=120)
    plt.close(fig)


if __name__ == "__main__":
    runtime.cli(main)
