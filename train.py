"""Train a diffusion model, plainly or adversarially.

    python train.py --robust adv --p 0.9 --sigma 0.2 --data cifar10          # P1's Robust_adv on corrupted CIFAR-10
    python train.py --robust none --p 0.9 --sigma 0.2 --data cifar10         # DDPM on the same images
    python train.py --model tiny --data synthetic --image-size 16            # minutes on a CPU
    torchrun --nproc-per-node 8 train.py --robust adv --p 0.9 --sigma 0.2 --data cifar10

The claim (P1): with 90 % of the training images noisy, plain DDPM learns to draw the noise; with the equivariance
regulariser of Eq. 10 the same network on the same images draws clean ones. --robust none | ran | adv is DDPM, Robust_ran,
Robust_adv; inv-ran and inv-adv are the invariance ablation (Eq. 9) that must fail. --robust addt fine-tunes --init for
purification, against --classifier (P2; see purify.py). Rivals that know neither p nor sigma either: --robust ambient (noise
estimated per image), --robust huber, --drop-noisy. --corrupt names other corruptions than Gaussian noise.

Leaves --out/ckpt.pt (raw and EMA weights, optimizer, settings), metrics.jsonl, loss.png, grid.png and metrics.json.
All randomness is a function of (--seed, step): a resumed run equals an uninterrupted one and, without dropout and ADDT, 2
processes equal one.
"""

import argparse
import contextlib
import copy
import json
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import torch
import torch.distributed as dist
from tqdm import tqdm

import metrics
from classifier import load_classifier
from data import CORRUPTIONS, NAMES, CorruptedImages, Order, load_images, seed_at
from losses import NoiseSchedule, addt_loss, ambient_loss, ddpm_loss, huber_loss, robust_loss
from sample import autocast, generate, layout, precision, save_grid, setup
from unet import PRESETS, UNet, load_checkpoint, save_checkpoint

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

METHODS = {  # --robust -> (perturb, constraint)
    "none": None,
    "ran": ("ran", "equivariance"),
    "adv": ("adv", "equivariance"),
    "inv-ran": ("ran", "invariance"),
    "inv-adv": ("adv", "invariance"),
}
RECIPES = {  # what --iters, --batch-size and --lr default to; DDPM's own, tiny and mini are ours
    "ddpm": dict(iters=800_000, batch_size=128, lr=2e-4),
    "ddpm64": dict(iters=500_000, batch_size=128, lr=2e-4),
    "tiny": dict(iters=1200, batch_size=64, lr=5e-4),
    "mini": dict(iters=1200, batch_size=64, lr=1e-3),
}
# what makes a run the run it is: --resume refuses to change these, and takes all other settings as they were unless given
FIXED = ("robust p sigma corrupt drop_noisy noisy_above sigma_scale huber_c lam omega gamma ray_units objective detach "
         "data image_size model batch_size lr warmup clip_grad "
         "dropout ema flip optimizer seed amp classifier addt_guide addt_perturb").split()


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--robust", choices=[*METHODS, "addt", "ambient", "huber"], default="none",
        help="DDPM (Eq. 4), delta_ran or delta_adv (Eq. 10), invariance (Eq. 9), or ADDT against a --classifier; "
        "rivals: ambient (the noise of each image is estimated from it), huber")
    add("--p", type=float, default=0.0, help="share of the training images that is corrupted")
    add("--sigma", type=float, default=0.0, help="std of their Gaussian noise on the [-1, 1] scale; SIGMA of --corrupt")
    add("--corrupt", choices=CORRUPTIONS, default="gauss", help="; ".join(f"{k}: {v}" for k, v in CORRUPTIONS.items()))
    add("--drop-noisy", action="store_true", help="train on those images alone that are judged clean (a rival, ours)")
    add("--noisy-above", type=float, default=0.08, metavar="STD", help="ambient, --drop-noisy: an image is judged noisy where "
        "the noise estimated from it (metrics.noise_mad) exceeds STD; needs neither p nor sigma (ours)")
    add("--sigma-scale", type=float, default=1.0, metavar="X", help="ambient: the estimates times X, to see what errors cost")
    add("--huber-c", type=float, default=0.1, help="huber: c_t = c^(t/T)")
    add("--lam", type=float, default=0.3, help="lambda, strength of the regulariser (Eq. 10)")
    add("--omega", type=float, default=2.0, help="omega, exponent of the ray (Eq. 7)")
    add("--gamma", type=float, default=8 / 255, help="gamma, floor of the ray (Eq. 7)")
    add("--ray-units", choices=["pixel", "eps"], default="pixel", help="units of the ray in lambda_t; pixel is ours")
    add("--objective", choices=["eq8", "ldm", "reg"], default="eq8", help="what delta_adv maximises; reg is ours")
    add("--detach", action="store_true", help="no gradient through eps(x_t) in the regulariser (ours)")
    add("--data", default="synthetic", metavar="NAME", help=NAMES)
    add("--data-root", default="data", help="downloads and decoded caches")
    add("--image-size", type=int, metavar="S", help="resize to S x S; default: the set's own size")
    add("--model", choices=PRESETS, default="ddpm", help="ddpm: 35.7 M parameters for 32x32; ddpm64; tiny, mini: for a CPU")
    add("--out", default="out")
    add("--iters", type=int, help="optimizer steps; default ddpm 800000, ddpm64 500000, tiny, mini 1200")
    add("--batch-size", type=int, help="over all processes and accumulation steps; default ddpm 128, tiny, mini 64")
    add("--accum", type=int, default=1, help="gradient accumulation steps within a batch")
    add("--lr", type=float, help="default ddpm 2e-4, tiny 5e-4, mini 1e-3")
    add("--warmup", type=int, help="linear warm-up steps; default 5000, at most a tenth of --iters")
    add("--optimizer", choices=["adam", "adamw"], default="adam")
    add("--clip-grad", type=float, default=1.0)
    add("--dropout", type=float, help="default ddpm 0.1, tiny, mini 0")
    add("--ema", type=float, default=0.9999, help="EMA decay, ramped up as (1 + step) / (10 + step) (ours)")
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="random mirror images")
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto | cpu | cuda | cuda:N")
    add("--amp", choices=["auto", "bf16", "fp16", "fp32"], default="auto", help="auto: bf16 on a GPU, fp32 on a CPU")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default: on a GPU")
    add("--save-every", type=int, metavar="K", help="steps between checkpoints; default 5000, at most a tenth of --iters")
    add("--sample-every", type=int, metavar="K",
        help="steps between EMA sample grids, besides that of the last step; default a quarter of --iters; 0: never")
    add("--log-every", type=int, metavar="K", help="steps between log lines and checks for NaN; default 50 (10 for tiny, mini)")
    add("--resume", action="store_true", help="continue from OUT/ckpt.pt with its settings; --iters may grow")
    add("--overwrite", action="store_true", help="start again although OUT holds a checkpoint")
    add("--init", metavar="PATH", help="start from the EMA weights of a checkpoint, or from a diffusers folder")
    add("--classifier", metavar="PATH", help="addt: a checkpoint of classifier.py")
    add("--addt-guide", choices=["classifier", "mse", "none"], default="classifier", help="addt: what its delta raises; P2 "
        "fine-tunes a trained --init with --optimizer adamw --lr 2e-4 --batch-size 256 --warmup 0 for 100 epochs")
    add("--addt-perturb", choices=["rbgm", "linf"], default="rbgm", help="addt: rank-based Gaussian, or P2's ablation")
    args = parser.parse_args(argv)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    args.given = set(vars(parser.parse_args(argv)))  # the flags the user typed

    def default(**values):
        vars(args).update({key: value for key, value in values.items() if getattr(args, key) is None})

    default(**RECIPES[args.model])
    default(warmup=min(5000, args.iters // 10), save_every=min(5000, max(1, args.iters // 10)),
            sample_every=max(1, args.iters // 4), log_every=10 if args.model in ("tiny", "mini") else 50)
    return args


def check(args, world):
    """Refuse what cannot work before any work is done."""
    for what, holds, names in (
            ("must be at least 1", lambda v: v >= 1, "iters batch_size accum save_every log_every omega"),
            ("must be >= 0", lambda v: v >= 0, "clip_grad warmup sample_every noisy_above"),
            ("must be >= 0 and finite", lambda v: 0 <= v < math.inf, "lam gamma lr"),
            ("must be > 0", lambda v: 0 < v < math.inf, "huber_c sigma_scale"),
            ("must lie in [0, 1]", lambda v: v is None or 0 <= v <= 1, "dropout"),
            ("must lie in 0..2^63 - 1", lambda v: 0 <= v < 2**63, "seed"),
            ("the noise level must be >= 0", lambda v: 0 <= v < math.inf, "sigma"),
            ("the share of corrupted images must lie in [0, 1]", lambda v: 0 <= v <= 1, "p"),
            ("the decay must lie in [0, 1)", lambda v: 0 <= v < 1, "ema")):
        for name in names.split():
            if not holds(value := getattr(args, name)):
                raise ValueError(f"--{name.replace('_', '-')} {value}: {what}")
    replaced = args.corrupt in ("outliers", "class")  # a corruption without a level
    if replaced and "sigma" in args.given:
        raise ValueError(f"--sigma {args.sigma}: has no effect with --corrupt {args.corrupt}")
    if args.corrupt in ("salt-pepper", "patch") and args.sigma > 1:
        raise ValueError(f"--sigma {args.sigma}: for --corrupt {args.corrupt} it is a share, at most 1")
    if args.corrupt == "class" and args.data.partition(":")[0] == "synthetic":
        raise ValueError(f"--corrupt class: would replace the butterflies of --data {args.data} by other butterflies")
    if not args.resume and "corrupt" in args.given and "p" not in args.given:
        raise ValueError(f"--corrupt {args.corrupt}: corrupts nothing without --p")
    if not args.resume and not replaced and (
            args.p > 0 and "sigma" not in args.given or args.sigma > 0 and "p" not in args.given):
        raise ValueError(f"--p {args.p} --sigma {args.sigma}: corruption takes both, the share and the noise level")
    users = dict(huber_c=["huber"], sigma_scale=["ambient"], noisy_above=["ambient"])
    users |= dict.fromkeys(["classifier", "addt_guide", "addt_perturb"], ["addt"])
    users |= dict.fromkeys("lam omega gamma ray_units objective detach".split(), [m for m in METHODS if METHODS[m]])
    for name in sorted(args.given & users.keys()):
        if args.robust not in users[name] and not (name == "noisy_above" and args.drop_noisy):
            raise ValueError(f"--{name.replace('_', '-')}: has no effect with --robust {args.robust}, only with "
                             f"{', '.join(users[name])}")
    if args.drop_noisy and args.robust == "ambient":
        raise ValueError("--drop-noisy: leaves --robust ambient nothing to do; choose one of them")
    if args.robust == "addt" and not (args.init or args.resume):
        raise ValueError("--robust addt: fine-tunes a trained model; give --init PATH")
    if args.robust == "addt" and (args.addt_guide == "classifier") != bool(args.classifier):
        raise ValueError(f"--addt-guide {args.addt_guide}: " + ("takes no --classifier" if args.classifier else
                         "needs --classifier PATH, a checkpoint of classifier.py; or choose mse or none"))
    if args.batch_size % (world * args.accum):
        raise ValueError(f"--batch-size {args.batch_size}: must divide by {world} processes x --accum {args.accum}")
    if args.resume and (args.init or args.overwrite):
        raise ValueError(f"--resume with --{'init' if args.init else 'overwrite'}: choose one of them")


def resume(args, path):
    """The checkpoint to continue from; its settings replace the defaults, a flag that contradicts them is refused."""
    ckpt = load_checkpoint(path)
    if ckpt.get("kind") != "unet" or "optimizer" not in ckpt:
        raise ValueError(f"{path}: not a checkpoint of train.py that can be resumed")
    for key, value in ckpt["args"].items():
        if key in FIXED and key in args.given and getattr(args, key) != value:
            raise ValueError(f"--{key.replace('_', '-')} {getattr(args, key)}: the checkpoint {path} was trained with "
                             f"{value}; drop the flag or start in another --out")
        if key not in args.given:
            setattr(args, key, value)
    return ckpt


def build(args):
    """The network: fresh, or of --init."""
    config = dict(PRESETS[args.model])
    if args.dropout is not None:
        config["dropout"] = args.dropout
    torch.manual_seed(args.seed)
    net = UNet(**config)
    args.dropout = net.config["dropout"]
    if args.init:
        source = UNet.from_diffusers(args.init) if os.path.isdir(args.init) else UNet.load(args.init)
        different = [k for k, v in net.config.items() if source.config[k] != v and k != "dropout"]
        if different:
            raise ValueError(f"--init {args.init}: has {different[0]} {source.config[different[0]]}, but --model {args.model} "
                             f"{net.config[different[0]]}; choose the --model it was trained as")
        net.load_state_dict(source.state_dict())
    return net


def draw_numbers(generator, seed, step, T, B, size):
    """All random numbers of a step, for the whole batch, so that they do not depend on how it is divided."""
    generator.manual_seed(seed_at(seed, step, stream=2))
    own, shape = dict(generator=generator, device=generator.device), (B, size, size, 3)
    flip = torch.rand(B, **own) < 0.5
    t = torch.randint(T, (B,), **own)  # t ~ U{0..T-1}
    beta = 0.5 + 1.5 * torch.rand(B, **own)  # beta ~ U[0.5, 2]
    eps = torch.randn(shape, **own).permute(0, 3, 1, 2)  # (B, 3, S, S), channels_last
    u = 2 * torch.rand(shape, **own).permute(0, 3, 1, 2) - 1
    return flip, t, eps, beta, u


def loss_of(model, schedule, args, x0, t, eps, beta, u, y=None, sigma_y=None, classifier=None):
    """The objective of --robust on one batch -> scalar, dict of detached scalars. y, classifier: addt; sigma_y: ambient."""
    if args.robust == "addt":
        return addt_loss(model, schedule, classifier, x0, y, t, eps, args.addt_guide, args.addt_perturb)
    if METHODS.get(args.robust):
        return robust_loss(model, schedule, x0, t, eps, *METHODS[args.robust], args.lam, args.omega, args.gamma,
                           args.ray_units, args.objective, args.detach, beta, u)  # Eq. 10
    if args.robust == "none":
        name, loss = "L_DM", ddpm_loss(model, schedule, x0, t, eps)  # Eq. 4
    elif args.robust == "ambient":
        name, loss = "L_ambient", ambient_loss(model, schedule, x0, t, eps, sigma_y)
    else:
        name, loss = "L_Huber", huber_loss(model, schedule, x0, t, eps, args.huber_c)
    return loss, {name: loss.detach()}


def prepare(net, args, device, world=1, backend=None):
    """What `update` works on: the network, its average and their optimizer; backend: that of torch.compile, if any."""
    params, adam = list(net.parameters()), dict(adam=torch.optim.Adam, adamw=torch.optim.AdamW)[args.optimizer]
    return SimpleNamespace(
        net=net, params=params, model=torch.compile(net, backend=backend, dynamic=False) if backend else net,
        ema=copy.deepcopy(net).eval().requires_grad_(False), optimizer=adam(params, lr=args.lr, fused=True),
        schedule=NoiseSchedule().to(device), world=world, cast=autocast(device, args.amp),
        scaler=torch.amp.GradScaler(device.type, enabled=precision(device, args.amp) == torch.float16))


def update(run, args, step, parts, classifier=None):
    """One step on a batch in parts, each loss_of's arguments -> scalars to log, on the device: nothing here waits for it."""
    optimizer, scaler, logs = run.optimizer, run.scaler, []
    for group in optimizer.param_groups:
        group["lr"] = args.lr * min(1.0, (step + 1) / max(1, args.warmup))
    optimizer.zero_grad(set_to_none=True)
    for part in parts:
        with run.cast:
            loss, terms = loss_of(run.model, run.schedule, args, *part, classifier=classifier)
        scaler.scale(loss / len(parts)).backward()
        logs.append(dict(loss=loss.detach(), **terms))
    if run.world > 1:
        average([p.grad for p in run.params], run.world)
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(run.params, args.clip_grad or float("inf"), foreach=True)
    scaler.step(optimizer)
    scaler.update()
    with torch.no_grad():
        torch._foreach_lerp_(list(run.ema.parameters()), run.params, 1 - min(args.ema, (1 + step) / (10 + step)))
    return {k: sum(d[k] for d in logs) / len(parts) for k in logs[0]} | dict(grad_norm=grad_norm)


def average(grads, world):
    """Gradients averaged over the processes. Not DDP: its hooks expect one forward per backward, the attack adds others."""
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    parts = (flat / world).split([g.numel() for g in grads])
    torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(parts, grads)])


def main():
    args = parse_args()
    started = time.time()
    device, rank, world = setup(args.device)
    out = Path(args.out)
    path = out / "ckpt.pt"
    ckpt = resume(args, path) if args.resume else None
    check(args, world)
    if path.exists() and not (args.resume or args.overwrite):
        raise ValueError(f"--out {out}: holds a checkpoint; --resume continues it, --overwrite starts again")
    precision(device, args.amp)  # refuses what this device has not
    net = build(args)
    classifier = load_classifier(args.classifier).to(device) if args.classifier else None
    out.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        (out / ".write-test").write_text("")  # fails here rather than at the first checkpoint
        (out / ".write-test").unlink()

    local = int(os.environ.get("LOCAL_RANK", 0))
    if world > 1 and local > 0:
        dist.barrier()  # one process of each machine decodes the images first
    images, labels = load_images(args.data, args.image_size, root=args.data_root, labels_needed=classifier is not None)
    if world > 1 and local == 0:
        dist.barrier()
    data = CorruptedImages(images, labels, args.p, args.sigma, args.seed, device, args.corrupt)
    size = data.shape[1]
    if classifier and (most := int(data.labels.max())) >= (classes := classifier.config["classes"]):
        raise ValueError(f"--classifier {args.classifier}: knows {classes} classes, but --data {args.data} has label {most}")
    if args.batch_size > len(data):
        raise ValueError(f"--batch-size {args.batch_size}: larger than --data {args.data} with its {len(data)} images")
    if size % net.factor:
        raise ValueError(f"--image-size {size}: --model {args.model} needs a multiple of {net.factor}")

    sigma_y, kept = None, None
    if args.robust == "ambient" or args.drop_noisy:
        # resumed as it was: a rounding that moves one image over the threshold would change the order of all
        sigma_y = ckpt["sigma_y"].to(device) if ckpt else args.sigma_scale * estimate_noise(data, args.noisy_above)
        if world > 1:
            dist.broadcast(sigma_y, 0)
        kept = (sigma_y == 0).nonzero().flatten().to("cpu" if data.streams else device)
        if args.drop_noisy and args.batch_size > len(kept):
            raise ValueError(f"--drop-noisy: judges {len(kept)} of {len(data)} images clean, fewer than --batch-size "
                             f"{args.batch_size}; a higher --noisy-above keeps more")

    settings = {k: v for k, v in vars(args).items() if k not in ("given", "out", "device", "resume", "overwrite", "init")}
    net = net.to(device, memory_format=layout(device, args.amp)).train()
    compiled = device.type == "cuda" if args.compile is None else args.compile
    run = prepare(net, args, device, world, "inductor" if compiled else None)
    first = ckpt["step"] if ckpt else 0
    if ckpt:
        run.net.load_state_dict(ckpt["model"])
        run.ema.load_state_dict(ckpt["ema"])
        run.optimizer.load_state_dict(ckpt["optimizer"])
        if ckpt["scaler"]:  # it is empty unless that was fp16
            run.scaler.load_state_dict(ckpt["scaler"])
    if world > 1:
        for p in [*run.params, *run.ema.parameters()]:
            dist.broadcast(p.data, 0)

    B, rows = args.batch_size, args.batch_size // (world * args.accum)
    order = Order(len(kept) if args.drop_noisy else len(data), args.seed, "cpu" if data.streams else device)
    generator = torch.Generator(device)

    mine_of = [slice(i * rows, (i + 1) * rows) for i in range(rank * args.accum, (rank + 1) * args.accum)]

    def read(step):
        """The images of a step: this process takes rows [rank B/W, (rank + 1) B/W) of the batch, in --accum parts."""
        index = [order(step * B + mine.start, rows) for mine in mine_of]
        index = [kept[i] for i in index] if args.drop_noisy else index
        return [(i, data.read(i)) for i in index]

    def draw(step, loaded):
        """The batch of a step: what read(step) loaded, corrupted, and the random numbers."""
        flip, *numbers = draw_numbers(generator, args.seed, step, run.schedule.T, B, size)
        parts = []
        for mine, (index, pixels) in zip(mine_of, loaded):
            x0 = data.batch(index, flip[mine] if args.flip else None, pixels)
            index = index.to(device, non_blocking=True)
            y = data.labels[index] if classifier else None
            noise = sigma_y[index] if args.robust == "ambient" else None
            parts.append((x0, *(v[mine] for v in numbers), y, noise))
        return parts

    def save(step):
        nonlocal saved
        saved = True
        if rank == 0:
            save_checkpoint(path, dict(
                kind="unet", config=net.config, image_size=size, step=step, model=net.state_dict(),
                ema=run.ema.state_dict(), optimizer=run.optimizer.state_dict(), scaler=run.scaler.state_dict(), args=settings,
                sigma_y=None if sigma_y is None else sigma_y.cpu()))

    def grid(step):
        if rank == 0:
            with run.cast:
                x0 = generate(run.ema, run.schedule, range(64), data.shape, args.seed, device, "ddim", steps=50)
            save_grid(x0, out / f"grid{step:07d}.png")
            (out / "grid.png").write_bytes((out / f"grid{step:07d}.png").read_bytes())

    saved = bool(ckpt)
    stop = []  # filled by SIGTERM or Ctrl-C; a second Ctrl-C ends the program at once (torchrun repeats SIGTERM by itself)
    for sig in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sig, lambda s, _: (stop.append(s), signal.signal(signal.SIGINT, signal.SIG_DFL)))

    def must_stop(step):
        if world == 1:
            return bool(stop)
        if step % 10:  # the processes agree every few steps
            return False
        flag = torch.tensor(float(bool(stop)))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    log_path = out / "metrics.jsonl"
    if rank == 0:
        print(f"{args.robust}: {sum(p.numel() for p in run.params) / 1e6:.1f} M parameters, {len(data)} images "
              f"{size}x{size} of {args.data}, {int(data.corrupted.sum())} with {args.corrupt}"
              f"{f' {args.sigma}' * (args.sigma > 0)}, {device} x {world}, steps {first}..{args.iters} -> {out}")
        if sigma_y is not None:
            print(f"{len(data) - len(kept)} images are judged noisy" + (", and left out" if args.drop_noisy else
                  f", with sigma_y {sigma_y.sum() / max(1, len(data) - len(kept)):.3f} on average"))
        if device.type == "cpu" and args.model.startswith("ddpm"):
            print("note: this network takes days on a CPU; --model tiny --image-size 16 takes minutes")
        old = read_log(log_path) if first else []
        log_path.with_suffix(".tmp").write_text("".join(json.dumps(d) + "\n" for d in old if d["step"] <= first))
        os.replace(log_path.with_suffix(".tmp"), log_path)

    pending, window_start, step = [], time.time(), first

    def flush(step):
        """One host sync for many steps: check the losses, write a line."""
        names = list(pending[0])
        values = torch.stack([torch.stack([d[k].float() for k in names]) for d in pending])  # (steps, names)
        if world > 1:
            dist.all_reduce(values)
            values /= world
        values = values.tolist()
        if run.scaler.is_enabled():  # fp16: the scaler skips steps whose gradients overflow
            values = [[0.0 if k == "grad_norm" and not math.isfinite(x) else x for k, x in zip(names, v)] for v in values]
        bad = [i for i, v in enumerate(values) if not all(map(math.isfinite, v))]
        if bad:
            last = f"the last good checkpoint is {path}" if saved else "there is no checkpoint yet"
            sys.exit(f"train.py: the loss or gradient of step {step - len(pending) + bad[0] + 1} is not finite; {last}. "
                     "Try a lower --lr, or --amp bf16 or fp32")
        line = {k: sum(v[i] for v in values) / len(values) for i, k in enumerate(names)}
        line = dict(step=step, **line, img_per_s=len(pending) * B / (time.time() - window_start), memory_gb=memory(device))
        pending.clear()
        if rank == 0:
            with log_path.open("a") as f:
                f.write(json.dumps(line) + "\n")
            bar.set_postfix(loss=f"{line['loss']:.4f}", img_s=f"{line['img_per_s']:.0f}")

    bar = tqdm(total=args.iters, initial=first, desc=f"train {args.robust}", unit="step", disable=rank > 0)
    on_device = torch.cuda.set_device if device.type == "cuda" else torch.device  # a thread starts on GPU 0
    pool = ThreadPoolExecutor(1, initializer=on_device, initargs=(device,))
    ahead = pool.submit(read, first) if data.streams else None
    with bar:
        while step < args.iters and not must_stop(step):
            if data.streams:  # a thread reads the next batch from disk meanwhile; what may be compiled runs here alone
                loaded, ahead = ahead.result(), pool.submit(read, step + 1)
            else:
                loaded = read(step)
            parts = draw(step, loaded)
            if args.dropout > 0 or args.robust == "addt":  # ADDT draws as it goes: equal for equal --accum and processes
                torch.manual_seed(seed_at(args.seed, step, stream=3 + rank))
            pending.append(update(run, args, step, parts, classifier))
            step += 1
            bar.update()
            save_due = step % args.save_every == 0
            grid_due = args.sample_every and step % args.sample_every == 0 and step < args.iters
            if step % args.log_every == 0 or save_due or grid_due or step == args.iters:
                flush(step)  # before saving: a checkpoint never holds the result of a non-finite loss
                if save_due:
                    save(step)
                if grid_due:
                    grid(step)
                window_start = time.time()  # img/s is that of training alone
        if pending:
            flush(step)
        if step % args.save_every or step == first:
            save(step)
    if step < args.iters:  # a signal, perhaps to another process
        if rank == 0:
            print(f"stopped by a signal at step {step}; saved {path}; --resume continues")
    else:
        grid(step)
    if rank == 0:
        lines = read_log(log_path)
        if lines:
            plot(lines, out / "loss.png", args)
            metrics.write_metrics(out, started, seed=args.seed, device=device, n=len(data), world=world,
                                  args=settings, **({} if kept is None else dict(judged_noisy=len(data) - len(kept))),
                                  **lines[-1])
        print(f"step {step}: {path}, {out}/grid.png, {out}/loss.png")
    pool.shutdown(cancel_futures=True)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def estimate_noise(data, above):
    """metrics.noise_mad of every training image as it is, corruption included: (N,) float32, 0 where it is <= above."""
    sigma = torch.empty(len(data), device=data.device)
    parts = torch.arange(len(data), device=data.device).split(500)
    for index in tqdm(parts, "estimate the noise", leave=False, disable=len(parts) == 1):
        sigma[index] = metrics.noise_mad(data.batch(index))
    return torch.where(sigma > above, sigma, 0)


def read_log(path):
    """The lines of metrics.jsonl; one that a kill or a full disk cut short is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def memory(device):
    """Peak memory in GB: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def plot(lines, path, args):
    steps = [d["step"] for d in lines]
    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    labels = dict(L_DM="$L_{DM}$ (Eq. 4)", L_ambient="$L_{ambient}$", L_Huber="$L_{Huber}$", L_ADDT="$L_{ADDT}$ (P2 Eq. 8)",
                  L_reg="$L_{reg}$ (Eq. 10, with $\\lambda_t$)", grad_norm="gradient norm")
    for key, label in labels.items():
        if key in lines[-1]:
            ax.plot(steps, [d.get(key) for d in lines], label=label, lw=1.2)
    ax.set(xlabel="step", ylabel="mean since the last log line", yscale="log",
           title=f"{args.model}, --robust {args.robust}, {args.data.split('/')[-1]}, p = {args.p}, "
                 f"{'σ =' if args.corrupt == 'gauss' else args.corrupt} {args.sigma}")
    ax.legend()
    ax.grid(alpha=0.3)
    fig.savefig(path, dpi=120)
    plt.close(fig)


if __name__ == "__main__":
    metrics.cli(main)
