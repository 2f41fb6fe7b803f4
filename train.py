"""Train a diffusion model, plainly or adversarially.

    python train.py --robust adv --p 0.9 --sigma 0.2 --data cifar10       # corrupted CIFAR-10
    python train.py --robust none --p 0.9 --sigma 0.2 --data cifar10      # DDPM on the same images
    python train.py --model mini --data synthetic --image-size 16         # minutes on a CPU
    torchrun --nproc-per-node 8 train.py --robust adv --p 0.9 --sigma 0.2 --data cifar10

The claim (P1): with 90 % of the training images noisy, plain DDPM learns to draw the noise; with
the equivariance regulariser of Eq. 10 the same network on the same images draws clean ones. Here
the regulariser acts in the last share --reg-last of the steps, on a share --reg-share of each
batch, on --reg-from <= t < --reg-until; with --paper always and on all, as P1 prints it.

Leaves --out/ckpt.pt (raw and EMA weights, optimizer, settings), metrics.jsonl, loss.png, grid.png
and metrics.json. All randomness is a function of (--seed, step): a resumed run equals an
uninterrupted one. 2 processes, or --accum 2, equal one but for ADDT and steps in which more
rows act than --reg-share holds.
"""

import argparse
import copy
import functools
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

import metrics
import runtime
import training
from data import CORRUPTIONS, NAMES, Batches
from losses import NoiseSchedule, addt_loss, ambient_loss, ddpm_loss, huber_loss, robust_loss
from rng import seed_at
from runtime import between, given_flags, precision, setup
from unet import PRESETS

# --------------------------------------------------------------------------------------------------
# objectives: (model, schedule, args, the batch by name) -> scalar, dict of detached scalars


def ddpm(model, schedule, args, x0, t, eps, **_):
    loss = ddpm_loss(model, schedule, x0, t, eps)  # Eq. 4
    return loss, dict(L_DM=loss.detach())


def regularised(perturb, constraint):
    def objective(model, schedule, args, x0, t, eps, beta, u, **_):  # Eq. 10
        return robust_loss(
            model, schedule, x0, t, eps, perturb, constraint, lam=args.lam, omega=args.omega,
            gamma=args.gamma, ray_units=args.ray_units, objective=args.objective,
            detach=args.detach, beta=beta, u=u, share=args.reg_share, t_min=args.reg_from,
            t_max=args.reg_until,
        )  # fmt: skip

    return objective


def ambient(model, schedule, args, x0, t, eps, sigma_y, **_):
    loss = ambient_loss(model, schedule, x0, t, eps, sigma_y)
    return loss, dict(L_ambient=loss.detach())


def huber(model, schedule, args, x0, t, eps, **_):
    loss = huber_loss(model, schedule, x0, t, eps, args.huber_c)
    return loss, dict(L_Huber=loss.detach())


def addt(model, schedule, args, x0, t, eps, y=None, classifier=None, **_):
    return addt_loss(  # P2 Algorithm 1
        model, schedule, classifier, x0, y, t, eps, args.addt_guide, args.addt_perturb,
        unit=args.addt_unit, high=args.addt_max,
    )  # fmt: skip


REGULARISER = [*training.PAPER, *"omega gamma ray_units detach paper reg_lr".split()]
ATTACK = [*REGULARISER, "objective"]
ADDT = "classifier addt_guide addt_perturb addt_unit addt_max".split()
OBJECTIVES = {  # --robust: (objective, the flags that it alone reads, what it is)
    "none": (ddpm, [], "DDPM (Eq. 4)"),
    "ran": (regularised("ran", "equivariance"), REGULARISER, "Robust_ran (Eq. 10)"),
    "adv": (regularised("adv", "equivariance"), ATTACK, "Robust_adv (Eq. 10)"),
    "inv-ran": (regularised("ran", "invariance"), REGULARISER, "invariance (Eq. 9), must fail"),
    "inv-adv": (regularised("adv", "invariance"), ATTACK, "the same, adversarial"),
    "addt": (addt, ADDT, "fine-tunes --init, by default with P2's recipe"),
    "ambient": (ambient, ["sigma_scale", "noisy_above"], "rival: noise estimated per image"),
    "huber": (huber, ["huber_c"], "rival: pseudo-Huber loss"),
}
RECIPES = {  # defaults of --iters, --batch-size, --lr: DDPM's own, tiny and mini are ours
    "ddpm": dict(iters=800_000, batch_size=128, lr=2e-4),
    "ddpm64": dict(iters=500_000, batch_size=128, lr=2e-4),
    "tiny": dict(iters=1200, batch_size=64, lr=5e-4),
    "mini": dict(iters=1200, batch_size=64, lr=1e-3),
}


# --------------------------------------------------------------------------------------------------
# flags


def parse_args(argv=None):
    parser = runtime.parser(__doc__)
    add = parser.add_argument
    share = between(0, 1)
    part = between(0, 1, above=True)
    below_1 = between(0, 1, below=True)
    positive = between(0, above=True)
    number = between(0)
    count = between(1, 10**8, int)
    steps = between(0, kind=int)
    on_off = argparse.BooleanOptionalAction
    guides = ["classifier", "mse", "none"]
    methods = "; ".join(f"{name}: {what}" for name, (_, _, what) in OBJECTIVES.items())
    kinds = "; ".join(f"{name}: {what}" for name, (_, _, what) in CORRUPTIONS.items())
    # the objective
    add("--robust", choices=OBJECTIVES, default="none", help=methods)
    add("--lam", type=number, help="lambda of Eq. 10; default 0.6 (ours), with --paper 0.3")
    add("--omega", type=between(1), default=2.0, help="omega, exponent of the ray (Eq. 7)")
    add("--gamma", type=number, default=8 / 255, help="gamma, floor of the ray (Eq. 7)")
    add("--ray-units", choices=["pixel", "eps"], default="pixel", help="lambda_t's; pixel is ours")
    add("--objective", choices=["eq8", "ldm", "reg"], default="eq8", help="of delta_adv; reg: ours")
    add("--detach", action="store_true", help="no gradient through eps(x_t) in L_reg (ours)")
    add(
        "--paper",
        action="store_true",
        help="L_reg as P1 prints it: always, all rows, all t, lambda 0.3",
    )
    add("--reg-last", type=part, help="L_reg acts in the last share of the steps; default 0.1")
    add("--reg-share", type=part, help="on this share of a batch; default 0.125 (ours)")
    add("--reg-from", type=between(0, 999, int), help="on t >= this; default 5 (ours)")
    add("--reg-until", type=between(1, 1000, int), help="on t < this; default 100 (ours)")
    add("--reg-lr", type=part, default=0.5, help="times --lr where L_reg follows plain DDPM (ours)")
    add("--drop-noisy", action="store_true", help="leave out images judged noisy (a rival, ours)")
    add("--noisy-above", type=number, default=0.08, help="noise at which an image is judged noisy")
    add("--sigma-scale", type=positive, default=1.0, help="ambient: estimates times this")
    add("--huber-c", type=positive, default=0.1, help="huber: c_t = c^(t/T)")
    add("--classifier", metavar="PATH", help="addt: a checkpoint of classifier.py")
    add("--addt-guide", choices=guides, default=guides[0], help="addt: what its delta raises")
    add("--addt-perturb", choices=["rbgm", "linf"], default="rbgm", help="addt: linf: an ablation")
    add("--addt-unit", type=number, help="addt: lambda_unit (P2 Eq. 7); default .03, linf 1")
    add("--addt-max", type=number, help="addt: lambda_max; default .3, linf 10")
    # the data
    add("--data", default="synthetic", metavar="NAME", help=NAMES)
    add("--data-root", default="data", help="downloads and decoded caches")
    add("--image-size", type=int, metavar="S", help="resize to S x S; default: the set's own size")
    add("--p", type=share, default=0.0, help="share of the training images that is corrupted")
    add("--sigma", type=number, default=0.0, help="std of their noise on the [-1, 1] scale")
    add("--corrupt", choices=CORRUPTIONS, default="gauss", help=kinds)
    add("--flip", action=on_off, default=True, help="random mirror images")
    # the network and its training
    add("--model", choices=PRESETS, default="ddpm", help="ddpm: 35.7 M; mini, tiny: for a CPU")
    add("--init", metavar="PATH", help="start from a checkpoint's EMA weights or diffusers folder")
    add("--dropout", type=below_1, help="default ddpm 0.1, tiny, mini 0")
    add("--iters", type=count, help="default ddpm 800000, ddpm64 500000, others 1200; addt 19600")
    add("--batch-size", type=count, help="in all processes; default 128, tiny, mini 64; addt 256")
    add("--accum", type=count, default=1, help="gradient accumulation steps within a batch")
    add("--lr", type=number, help="default ddpm 2e-4, tiny 5e-4, mini 1e-3; addt 2e-4")
    add("--warmup", type=steps, help="linear; default 5000, at most a tenth of --iters; addt 0")
    add("--optimizer", choices=["adam", "adamw"], help="default adam; addt adamw")
    add("--beta1", type=below_1, help="of the optimizer; default 0.9; addt 0.95")
    add("--weight-decay", type=number, help="default 0, adamw 0.01; addt 1e-6")
    add("--clip-grad", type=number, default=1.0, help="0: no clipping")
    add("--ema", type=below_1, default=0.9999, help="decay of the averaged weights, at most")
    add("--ema-ramp", choices=training.EMA_RAMPS, help="before that; default tenth; addt power")
    add("--seed", type=runtime.SEED, default=0)
    # the run
    add("--out", default="out")
    add("--resume", action="store_true", help="continue OUT/ckpt.pt; --iters may grow")
    add("--overwrite", action="store_true", help="start again although OUT holds a checkpoint")
    add("--device", default="auto", help="auto | cpu | cuda | cuda:N")
    add("--amp", choices=["auto", "bf16", "fp16", "fp32"], default="auto", help="auto: the fastest")
    add("--compile", action=on_off, help="default: on a GPU")
    add("--save-every", type=count, metavar="K", help="default 5000, at most iters / 10")
    add("--sample-every", type=steps, metavar="K", help="default iters / 4; 0: only at the end")
    add("--log-every", type=count, metavar="K", help="default 50; 10 for tiny, mini")
    args = parser.parse_args(argv)
    args.given = given_flags(parser, argv)
    training.complete(args, RECIPES[args.model])
    return args


# --------------------------------------------------------------------------------------------------
# one step


def phase(args, step):
    """-> whether --robust's objective acts, steps since the phase began, its rate, its warm-up.

    Before the last share --reg-last of --iters, training is plain DDPM. The second phase warms up
    anew, its rate falls linearly to 0, and the average of the weights starts anew, which would hold
    those of the first phase for too long (how is ours; P1's later version regularises late too).
    """
    begin = regulariser_begins(args)
    if 0 < begin <= step:
        left = (args.iters - step) / (args.iters - begin)
        return True, step - begin, args.lr * args.reg_lr * left, args.warmup // 10
    return begin == 0, step, args.lr, args.warmup


def regulariser_begins(args):
    """The first step at which --robust's own objective acts; before it, training is plain DDPM."""
    if "reg_last" not in OBJECTIVES[args.robust][1]:
        return 0
    return args.iters - max(1, round(args.reg_last * args.iters))


def draw_numbers(generator, seed, step, T, B, size):
    """All random numbers of a step, for the whole batch, so that they do not depend on how it is
    divided -> dict(flip, t, beta (B,), eps, u (B, 3, S, S), channels_last)."""
    generator.manual_seed(seed_at(seed, step, stream=2))
    own = dict(generator=generator, device=generator.device)
    shape = (B, size, size, 3)
    return dict(
        flip=torch.rand(B, **own) < 0.5,
        t=torch.randint(T, (B,), **own),  # t ~ U{0..T-1}
        beta=0.5 + 1.5 * torch.rand(B, **own),  # beta ~ U[0.5, 2]
        eps=torch.randn(shape, **own).permute(0, 3, 1, 2),
        u=2 * torch.rand(shape, **own).permute(0, 3, 1, 2) - 1,  # delta_ran = r u
    )


def prepare(net, args, device, world=1, backend=None, cast_once=None):
    """-> what `train_step` works on. backend: torch.compile's, or None.

    params are the float32 weights, which the optimizer moves. weights are those of the network that
    computes: with cast_once copies of params in lower precision, made once a step, else params
    themselves, which autocast casts at each use. cast_once: by default on a GPU, where each cast is
    a launch.
    """
    optimizer = dict(adam=torch.optim.Adam, adamw=torch.optim.AdamW)[args.optimizer]
    options = dict(lr=args.lr, betas=(args.beta1, 0.999), weight_decay=args.weight_decay)
    params = list(net.parameters())
    dtype = precision(device, args.amp)
    once = device.type == "cuda" if cast_once is None else cast_once
    model = copy.deepcopy(net).cast(dtype) if once and dtype != torch.float32 else net
    return SimpleNamespace(
        net=net,
        params=params,
        computing=model,
        weights=list(model.parameters()),
        world=world,
        model=torch.compile(model, backend=backend, dynamic=False) if backend else model,
        ema=copy.deepcopy(net).eval().requires_grad_(False),
        optimizer=optimizer(params, **options, fused=True),
        schedule=NoiseSchedule().to(device),
        cast=runtime.autocast(device, args.amp),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
    )


def train_step(state, args, step, batches, classifier=None):
    """Algorithm 1: one update on a batch in parts -> scalars to log, on the device, for which
    nothing here waits.

    batches: dicts of x0, t, eps, beta, u and, if they are read, y, sigma_y, keys (of dropout).
    """
    acts, since, rate, warmup = phase(args, step)
    objective = OBJECTIVES[args.robust if acts else "none"][0]
    for group in state.optimizer.param_groups:
        group["lr"] = rate * min(1.0, (since + 1) / max(1, warmup))
    lower_precision = state.weights[0] is not state.params[0]
    if lower_precision:  # cast once, for all forwards of the step
        with torch.no_grad():
            training.foreach(torch._foreach_copy_, state.weights, state.params)
    else:
        state.optimizer.zero_grad(set_to_none=True)
    logs = []
    for batch in batches:
        state.computing.mask_keys = batch.get("keys")
        with state.cast:
            loss, terms = objective(
                state.model, state.schedule, args, classifier=classifier, **batch
            )
        state.scaler.scale(loss / len(batches)).backward()
        if lower_precision:
            training.move_gradients(state.weights, state.params, first=not logs)
        logs.append(dict(loss=loss.detach(), **terms))
    if state.world > 1:
        runtime.average([p.grad for p in state.params], state.world)
    state.scaler.unscale_(state.optimizer)
    most = args.clip_grad or float("inf")
    grad_norm = torch.nn.utils.clip_grad_norm_(state.params, most, foreach=True)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    decay = min(args.ema, training.EMA_RAMPS[args.ema_ramp](since))
    with torch.no_grad():
        torch._foreach_lerp_(list(state.ema.parameters()), state.params, 1 - decay)
    means = {name: sum(log[name] for log in logs) / len(logs) for name in logs[0]}
    return means | dict(grad_norm=grad_norm)


# --------------------------------------------------------------------------------------------------
# the run


def main():
    args = parse_args()
    started = time.time()
    path = Path(args.out) / "ckpt.pt"
    ckpt = training.resume(args, path, regulariser_begins) if args.resume else None
    device, rank, world = setup(args.device, True, args.compile)
    args.amp = runtime.amp_name(device, args.amp)  # a resumed run computes as it began
    training.check(args, world, OBJECTIVES)
    run = training.prepare_run(args, ckpt, device, rank, world)
    compiled = device.type == "cuda" if args.compile is None else args.compile
    state = prepare(run.net, args, device, world, "inductor" if compiled else None)
    first = training.restore(state, ckpt) if ckpt else 0
    batches = Batches(args, run, draw_numbers, state.schedule.T)
    interrupt = runtime.Interrupt(world)
    fp16 = state.scaler.is_enabled()
    begin = regulariser_begins(args)
    diagnose = functools.partial(metrics.diagnose, state, *metrics.probe(run.data, args.seed))
    log = runtime.Log(run.out / "metrics.jsonl", first, args.batch_size, device, rank, world, fp16)
    if rank == 0:
        training.describe(args, run, first, begin)
    step = first
    title = f"train {args.robust}"
    bar = tqdm(desc=title, initial=first, total=args.iters, unit="step", disable=rank > 0)
    with bar:
        while step < args.iters and not interrupt.asked(step):
            if args.robust == "addt":  # it draws as it goes
                torch.manual_seed(seed_at(args.seed, step, stream=3 + rank))
            log.add(train_step(state, args, step, batches(step), run.classifier))  # Algorithm 1
            step += 1
            bar.update()
            save_due = step % args.save_every == 0 or step == args.iters
            grid_due = args.sample_every and step % args.sample_every == 0 and step < args.iters
            if step % args.log_every == 0 or save_due or grid_due or step == begin:
                # before saving: a checkpoint never holds the result of a non-finite loss
                line = log.flush(step, training.advice(path), diagnose if save_due else dict)
                bar.set_postfix(loss=f"{line['loss']:.4f}", img_s=f"{line['img_per_s']:.0f}")
            if save_due or step == begin:  # also before what follows is compiled
                training.save(path, step, state, args, run)
            if grid_due:
                training.grid(step, state, args, run)
            if save_due or grid_due:
                log.restart_clock()
    log.flush(step, training.advice(path))
    if step < args.iters:  # a signal, perhaps to another process
        training.save(path, step, state, args, run)
        if rank == 0:
            print(f"stopped by a signal at step {step}; saved {path}; --resume continues")
    else:
        training.grid(step, state, args, run)
    if rank == 0:
        training.finish(args, run, step, started)
    batches.close()
    runtime.leave(world)
    if step < args.iters:
        sys.exit(128 + (interrupt.signal or signal.SIGTERM))  # so that `train && sample` stops here


if __name__ == "__main__":
    runtime.cli(main)
