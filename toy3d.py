"""Outliers in three dimensions: DDPM reproduces them, Robust_ran draws fewer, Robust_adv fewest.

A fifth of the training points is noise; invariance instead of equivariance adds more. The price is
variety: the samples lie closer to the middle of their mode. RESULTS.md has the numbers. Density and
score are known in closed form (toy3d_data.py); the losses are losses.py's, unchanged.

    python toy3d.py           # outliers, seven methods, one seed, 3,000 steps: 1 minute
    python toy3d.py --full    # + clean and inliers, three seeds, 10,000 steps: half an hour
    python toy3d.py --noises inliers --share 0.5 --methods none late-adv

Leaves in --out, as PNG and PDF: fig2a (samples), fig2b (score fields), fig2c (the ray), fig5 (the
flow); samples.npz with arrays set/noise/method, (n, 3) in data units, of the first seed; and
metrics.json. lambda, omega, gamma, and the networks at each t: toy3d_sweep.py.
"""

import copy
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import outputs
import runtime
import toy3d_data as toy
from losses import NoiseSchedule, ddpm_loss, robust_loss
from runtime import between, cli, idle_flags, setup
from samplers import ddim_sample, ddpm_sample
from toy3d_figures import figure_2a, figure_2b, figure_2c, figure_5

METHODS = {
    "none": None,
    "ran": ("ran", "equivariance"),
    "adv": ("adv", "equivariance"),
    "late-ran": ("ran", "equivariance"),  # late: with --reg-last and --reg-share; the others always
    "late-adv": ("adv", "equivariance"),
    "inv-ran": ("ran", "invariance"),
    "inv-adv": ("adv", "invariance"),
}
OCTAVES = [1.0, 2.0, 4.0, 8.0]  # of the sines and cosines of x_t: see MLP
SIZES = [59, 64, 64, 64, 3]  # of the networks' layers: x_t, its 24 waves, 32 of t -> eps
BATCH = 128
LR = 4e-3  # Adam's; falls to 0 as a cosine
DIVERGED = 10.0  # a path that leaves this cube, in standardised units, has diverged


# --------------------------------------------------------------------------------------------------
# the networks: one per job (set, noise, seed), trained and sampled side by side


class MLP(nn.Module):
    """M independent networks (x_t, t) -> eps, which losses.py sees as one model.

    Row i of a batch belongs to network i % M, which a torch.cat of batches keeps. A mode is 0.035
    wide in the units of x_t: from x_t alone the networks do not learn eps at t < 50, whose slope is
    1 / 0.07 there; from its sines and cosines they do, in a fraction of the steps.
    """

    def __init__(self, M):
        super().__init__()
        self.M = M
        layers = list(zip(SIZES, SIZES[1:]))
        self.weight = nn.ParameterList((2 * torch.rand(M, i, o) - 1) / i**0.5 for i, o in layers)
        self.bias = nn.ParameterList(torch.zeros(M, 1, o) for _, o in layers)
        frequency = torch.logspace(math.log10(0.5e-3), math.log10(0.2), 16)  # rad per step
        self.register_buffer("frequency", frequency)
        self.register_buffer("octaves", torch.tensor(OCTAVES))

    def forward(self, x_t, t):
        waves = (x_t[:, :, None] * self.octaves).flatten(1)
        phase = torch.cat([t[:, None] * self.frequency, waves], 1)
        h = torch.cat([x_t, phase.sin(), phase.cos()], 1)
        h = h.view(-1, self.M, h.shape[1]).transpose(0, 1)  # (M, n, 59)
        for i, (weight, bias) in enumerate(zip(self.weight, self.bias)):
            if i > 0:
                h = F.silu(h)
            h = torch.baddbmm(bias, h, weight)
        return h.transpose(0, 1).reshape(x_t.shape)


def jobs_of(args):
    """[(set, noise, seed)], the seeds of a set and noise next to each other."""
    seeds = range(args.seed, args.seed + args.seeds)
    return [(name, noise, seed) for name in args.sets for noise in args.noises for seed in seeds]


def train(method, jobs, args, schedule, plain=None):
    """Train one network per job (set, noise, seed) -> MLP. Each job's points are drawn once.

    late-*: plain DDPM (Eq. 4) before the last share --reg-last of the steps, then from half the
    rate. plain: a dict that keeps these first phases, {steps: MLP}, for calls equal but for that.
    """
    data = []
    for name, noise, seed in jobs:
        generator = torch.Generator().manual_seed(seed)
        points = toy.training_points(name, noise, args.points, args.share, generator)
        data.append(toy.to_standard(name, points))
    data = torch.stack(data).float().to(args.device)  # (M, points, 3)

    torch.manual_seed(args.seed)
    model = MLP(len(jobs)).to(args.device)
    late = max(1, round(args.reg_last * args.steps)) if method.startswith("late") else args.steps
    if late == args.steps:
        fit(model, method, args.steps, LR, data, args, schedule)
        return model
    plain = {} if plain is None else plain
    if args.steps - late not in plain:
        fit(model, "none", args.steps - late, LR, data, args, schedule)
        plain[args.steps - late] = model
    model = copy.deepcopy(plain[args.steps - late])
    torch.manual_seed(args.seed + 1)
    fit(model, method, late, LR / 2, data, args, schedule)
    return model


def fit(model, method, steps, lr, data, args, schedule):
    """Steps of Adam on Eq. 4, or Eq. 10, or Eq. 9, from the rate lr to 0. data (M, points, 3)."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    every = torch.arange(model.M, device=data.device)
    regulariser = dict(lam=args.lam, omega=args.omega, gamma=args.gamma)
    if method.startswith("late"):
        regulariser["share"] = max(1, round(args.reg_share * BATCH)) / BATCH
    for _ in tqdm(range(steps), desc=method, mininterval=1, leave=False):
        index = torch.randint(data.shape[1], (BATCH, model.M), device=data.device)
        x0 = data[every, index].view(-1, 3)
        t = torch.randint(schedule.T, (len(x0),), device=data.device)
        eps = torch.randn_like(x0)
        if method == "none":
            loss = ddpm_loss(model, schedule, x0, t, eps)
        else:
            loss, _ = robust_loss(model, schedule, x0, t, eps, *METHODS[method], **regulariser)
        optimizer.zero_grad()
        # the mean is over M networks: each gets the gradient of its own loss
        (loss * model.M).backward()
        optimizer.step()
        cosine.step()


def sample(model, jobs, args, schedule, ddim=False):
    """DDPM (Eq. 5) or DDIM, from the same x_T for every model.

    -> x_0 (M, n, 3) in data units, diverged (M, n), path of DDIM [(t, x_t (M, n, 3))]
    """
    path = []

    def to_data(x):
        x = x.double().cpu().view(-1, len(jobs), 3)
        return torch.stack([toy.from_standard(job[0], x[:, j]) for j, job in enumerate(jobs)])

    def record(i, t, x):
        outside.logical_or_(~(x.abs().amax(1) < DIVERGED))  # NaN counts
        if ddim:
            path.append((t, to_data(x)))
        return x

    torch.manual_seed(args.seed + 1)
    x_T = torch.randn(args.n * len(jobs), 3, device=args.device)
    outside = torch.zeros(len(x_T), dtype=torch.bool, device=args.device)
    if ddim:
        x = ddim_sample(model, schedule, x_T, steps=100, clip=False, on_step=record)
    else:
        options = dict(steps=args.sample_steps, variance=args.variance, clip=False)
        x = ddpm_sample(model, schedule, x_T, on_step=record, **options)
    record(0, 0, x)
    return to_data(x.nan_to_num(1e4, 1e4, -1e4)), outside.view(-1, len(jobs)).T.cpu(), path


# --------------------------------------------------------------------------------------------------
# the experiment


def experiment(args, out, schedule):
    """Every method on every set, noise and seed -> numbers for metrics.json.

    "data" are the training points themselves; "truth", the ideal network of the clean set through
    the same sampler: the best to expect.
    """
    jobs = jobs_of(args)
    models = {"truth": toy.true_eps([name for name, _, _ in jobs], schedule)}
    results = {}
    samples = {}
    plain = {}
    for method in ["data", "truth", *args.methods]:
        diverged = torch.zeros(len(jobs), 1)
        if method == "data":
            x = training_data(jobs, args)
        else:
            if method != "truth":
                models[method] = train(method, jobs, args, schedule, plain)
            x, diverged, _ = sample(models[method], jobs, args, schedule)  # (M, n, 3)
        for first in range(0, len(jobs), args.seeds):
            runs = []
            for j in range(first, first + args.seeds):
                name, noise, seed = jobs[j]
                share = diverged[j].double().mean().item()
                runs.append(dict(toy.measure(name, x[j], seed), diverged=share))
            key = f"{name}/{noise}/{method}"
            results[key] = toy.over_seeds(runs)
            samples[key] = x[first]
            print(line_of(key, results[key]), flush=True)
        of_methods = (k for k in samples if k.rsplit("/", 1)[1] in args.methods)
        arrays = {k: samples[k].float().numpy() for k in of_methods}
        np.savez(out / "samples.npz", **arrays)  # after each: Ctrl-C keeps those before
    figures(args, out, schedule, jobs, models, samples)
    return dict(results=results)


def training_data(jobs, args):
    """Up to n of each job's own training points, noise included, in random order -> (M, n, 3)."""
    found = []
    for name, noise, seed in jobs:
        generator = torch.Generator().manual_seed(seed)
        x = toy.training_points(name, noise, args.points, args.share, generator)
        found.append(x[torch.randperm(len(x), generator=generator)[: args.n]])
    return torch.stack(found)


def figures(args, out, schedule, jobs, models, samples):
    """Fig. 2 and 5; 2b and 5 of DDPM and Robust_adv, trained with outliers if there are any."""
    noise = "outliers" if "outliers" in args.noises else args.noises[0]
    picked = {name: jobs.index((name, noise, args.seed)) for name in args.sets}
    pair = [m for m in ("none", "adv") if m in args.methods] or args.methods[:1]
    figure_2a(out, [job[:2] for job in jobs[:: args.seeds]], args.methods, samples)
    figure_2b(out, picked, {m: models[m] for m in ["truth", *pair]}, len(jobs), schedule)
    figure_2c(out, schedule, args.gamma)
    paths = {m: sample(models[m], jobs, args, schedule, ddim=True)[2] for m in pair}
    figure_5(out, picked, paths)


def line_of(key, numbers):
    """One line of a result for the terminal: mean and standard deviation over the seeds."""
    line = f"{key:<30}"
    for name in ("off_support", "sliced_w2", "spread", "smallest_weight", "diverged"):
        std = numbers[name]["std"]
        line += f"  {name} {numbers[name]['mean']:.3f}" + ("" if std is None else f" ± {std:.3f}")
    return line


# --------------------------------------------------------------------------------------------------
# the command line


def add_arguments(parser):
    """The flags that toy3d_sweep.py shares."""
    add = parser.add_argument
    share = between(0, 1, above=True)
    add("--full", action="store_true", help="all noises, three seeds")
    add("--sets", nargs="+", choices=toy.CENTRES, default=[*toy.CENTRES])
    add("--noises", nargs="+", choices=toy.NOISES, help="default outliers, --full all")
    add("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    add("--share", type=between(0, 1), default=0.2, help="share of the training points: noise")
    add("--points", type=between(2, kind=int), default=8000, help="a fixed set per seed")
    add("--lam", type=between(0), default=0.3)
    add("--omega", type=between(1, 100), default=2.0)
    add("--gamma", type=between(0, 100), default=8 / 255)
    add("--reg-last", type=share, default=0.1, help="late-*: the last share of the steps")
    add("--reg-share", type=share, default=0.25, help="late-*: the share of a batch's rows")
    add("--steps", type=between(1, kind=int), help="of training; default 3000, --full 10000")
    add("--sample-steps", type=between(1, 1000, int), default=500, help="of the DDPM sampler")
    add("--variance", choices=["fixed-small", "fixed-large"], default="fixed-small", help="Eq. 5's")
    add("--n", type=between(2, kind=int), default=2000, help="samples per network")
    add("--seeds", type=between(1, 1000, int), help="networks per method; default 1, --full 3")
    add("--seed", type=between(0, 2**32, int), default=0, help="the first seed")
    add("--device", default="auto", help="auto | cpu | cuda | cuda:N")
    add("--out", default="out/toy3d")


def check(args, idle):
    """Fills in and refuses; idle: of idle_flags."""
    idle(args.noises and args.seeds, "full", "with --noises and --seeds")
    idle(args.methods == ["none"], "lam omega", "with --methods none")
    late = any(method.startswith("late") for method in args.methods)
    idle(not late, "reg_last reg_share", "without late-ran or late-adv")
    idle(args.noises == ["clean"], "share", "with --noises clean")
    args.noises = args.noises or ([*toy.NOISES] if args.full else ["outliers"])
    args.seeds = args.seeds or (3 if args.full else 1)
    args.steps = args.steps or (10_000 if args.full else 3000)
    runtime.refuse_repeats(args, "sets", "noises", "methods")
    args.device = setup(args.device)[0]


def run(args, idle, function):
    """Writes function(args, out, schedule) -> numbers to --out/metrics.json."""
    started = time.time()
    check(args, idle)
    out = outputs.claim(args.out)
    numbers = function(args, out, NoiseSchedule().to(args.device))
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "device", "seed", "n")}
    about = dict(seed=args.seed, device=args.device, n=args.n, settings=settings)
    outputs.write_metrics(out, started, **about, **numbers)
    print(f"{time.time() - started:.0f} s -> {out}")


def main():
    parser = runtime.parser(__doc__)
    add_arguments(parser)
    run(parser.parse_args(), idle_flags(parser), experiment)


if __name__ == "__main__":
    cli(main)
