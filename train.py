"""Train a diffusion model, plainly or adversarially.

    python train.py --robust adv --p 0.9 --sigma 0.2 --data cifar10       # corrupted CIFAR-10
    python train.py --robust none --p 0.9 --sigma 0.2 --data cifar10      # DDPM on the same images
    python train.py --model mini --data synthetic --image-size 16         # minutes on a CPU
    torchrun --nproc-per-node 8 train.py --robust adv --p 0.9 --sigma 0.2 --data cifar10

The claim (P1): with 90 % of the training images noisy, plain DDPM learns to draw the noise; with the
equivariance regulariser of Eq. 10 the same network on the same images draws clean ones. Here the
regulariser acts in the last share --reg-last of the steps, on a share --reg-share of each batch;
--reg-last 1 --reg-share 1 is the setting that P1 prints.

Leaves --out/ckpt.pt (raw and EMA weights, optimizer, settings), metrics.jsonl, loss.png, grid.png
and metrics.json. All randomness is a function of (--seed, step): a resumed run equals an
uninterrupted one and, but for ADDT, 2 processes equal one.
"""

import argparse
import copy
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import torch
import torch.distributed as dist
from tqdm import tqdm

import metrics
import runtime
from classifier import load_classifier
from data import CORRUPTIONS, NAMES, CorruptedImages, Order, load_images, seed_at
from losses import NoiseSchedule, addt_loss, ambient_loss, ddpm_loss, huber_loss, robust_loss
from runtime import (
    Interrupt,
    Log,
    autocast,
    average,
    between,
    given_flags,
    layout,
    load_checkpoint,
    precision,
    read_log,
    save_checkpoint,
    setup,
)
from sample import generate, save_grid
from unet import PRESETS, UNet

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# --------------------------------------------------------------------------------------------------
# objectives: (model, schedule, args, the batch by name) -> scalar, dict of detached scalars


def ddpm(model, schedule, args, x0, t, eps, **_):
    loss = ddpm_loss(model, schedule, x0, t, eps)  # Eq. 4
    return loss, dict(L_DM=loss.detach())


def regularised(perturb, constraint):
    def objective(model, schedule, args, x0, t, eps, beta, u, **_):
        return robust_loss(  # Eq. 10
            model,
            schedule,
            x0,
            t,
            eps,
            perturb,
            constraint,
            args.lam,
            args.omega,
            args.gamma,
            args.ray_units,
            args.objective,
            args.detach,
            beta,
            u,
            args.reg_share,
        )

    return objective


def ambient(model, schedule, args, x0, t, eps, sigma_y, **_):
    loss = ambient_loss(model, schedule, x0, t, eps, sigma_y)
    return loss, dict(L_ambient=loss.detach())


def huber(model, schedule, args, x0, t, eps, **_):
    loss = huber_loss(model, schedule, x0, t, eps, args.huber_c)
    return loss, dict(L_Huber=loss.detach())


def addt(model, schedule, args, x0, t, eps, y=None, classifier=None, **_):
    return addt_loss(  # P2 Algorithm 1
        model, schedule, classifier, x0, y, t, eps, args.addt_guide, args.addt_perturb
    )


REGULARISER = "lam omega gamma ray_units objective detach reg_last reg_share reg_lr".split()
OBJECTIVES = {  # --robust: (objective, the flags that it alone reads, what it is)
    "none": (ddpm, [], "DDPM (Eq. 4)"),
    "ran": (regularised("ran", "equivariance"), REGULARISER, "Robust_ran (Eq. 10)"),
    "adv": (regularised("adv", "equivariance"), REGULARISER, "Robust_adv (Eq. 10)"),
    "inv-ran": (regularised("ran", "invariance"), REGULARISER, "invariance (Eq. 9), must fail"),
    "inv-adv": (regularised("adv", "invariance"), REGULARISER, "the same, adversarial"),
    "addt": (addt, ["classifier", "addt_guide", "addt_perturb"], "fine-tunes --init (P2)"),
    "ambient": (ambient, ["sigma_scale", "noisy_above"], "rival: noise estimated per image"),
    "huber": (huber, ["huber_c"], "rival: pseudo-Huber loss"),
}
RECIPES = {  # what --iters, --batch-size and --lr default to; DDPM's own, tiny and mini are ours
    "ddpm": dict(iters=800_000, batch_size=128, lr=2e-4),
    "ddpm64": dict(iters=500_000, batch_size=128, lr=2e-4),
    "tiny": dict(iters=1200, batch_size=64, lr=5e-4),
    "mini": dict(iters=1200, batch_size=64, lr=1e-3),
}
# what --resume may change; every other flag makes the run the run it is
FREE = """out resume overwrite init iters accum device compile save_every sample_every log_every
          data_root""".split()

# --------------------------------------------------------------------------------------------------
# flags


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    share, positive = between(0, 1), between(0, above=True)
    count, steps = between(1, kind=int), between(0, kind=int)
    methods = "; ".join(f"{name}: {what}" for name, (_, _, what) in OBJECTIVES.items())
    kinds = "; ".join(f"{name}: {what}" for name, what in CORRUPTIONS.items())
    add("--robust", choices=OBJECTIVES, default="none", help=methods)
    add("--p", type=share, default=0.0, help="share of the training images that is corrupted")
    add("--sigma", type=between(0), default=0.0, help="std of their noise on the [-1, 1] scale")
    add("--corrupt", choices=CORRUPTIONS, default="gauss", help=kinds)
    add("--drop-noisy", action="store_true", help="leave out images judged noisy (a rival, ours)")
    add(
        "--noisy-above",
        type=between(0),
        default=0.08,
        metavar="STD",
        help="ambient, --drop-noisy: an image is judged noisy where its estimated noise exceeds STD",
    )
    add("--sigma-scale", type=positive, default=1.0, metavar="X", help="ambient: estimates times X")
    add("--huber-c", type=positive, default=0.1, help="huber: c_t = c^(t/T)")
    add("--lam", type=between(0), default=0.3, help="lambda, strength of the regulariser (Eq. 10)")
    add("--omega", type=between(1), default=2.0, help="omega, exponent of the ray (Eq. 7)")
    add("--gamma", type=between(0), default=8 / 255, help="gamma, floor of the ray (Eq. 7)")
    add(
        "--ray-units",
        choices=["pixel", "eps"],
        default="pixel",
        help="units of the ray in lambda_t; pixel is ours",
    )
    add(
        "--objective",
        choices=["eq8", "ldm", "reg"],
        default="eq8",
        help="what delta_adv maximises; reg is ours",
    )
    add("--detach", action="store_true", help="no gradient through eps(x_t) in L_reg (ours)")
    add(
        "--reg-last",
        type=between(0, 1, above=True),
        default=0.1,
        metavar="F",
        help="the regulariser acts in the last share F of the steps; 1: always, as P1 prints it",
    )
    add(
        "--reg-share",
        type=between(0, 1, above=True),
        default=0.25,
        metavar="Q",
        help="the regulariser acts on the first Q of the rows of a batch; 1: on all, as P1 (ours)",
    )
    add(
        "--reg-lr",
        type=between(0, 1, above=True),
        default=0.5,
        metavar="X",
        help="times --lr where the regulariser acts after plain DDPM (ours)",
    )
    add("--data", default="synthetic", metavar="NAME", help=NAMES)
    add("--data-root", default="data", help="downloads and decoded caches")
    add("--image-size", type=int, metavar="S", help="resize to S x S; default: the set's own size")
    add(
        "--model",
        choices=PRESETS,
        default="ddpm",
        help="ddpm: 35.7 M parameters for 32x32; ddpm64; tiny, mini: for a CPU",
    )
    add("--out", default="out")
    add("--iters", type=count, help="default ddpm 800000, ddpm64 500000, tiny, mini 1200")
    add("--batch-size", type=count, help="over all processes; default ddpm 128, tiny, mini 64")
    add("--accum", type=count, default=1, help="gradient accumulation steps within a batch")
    add("--lr", type=between(0), help="default ddpm 2e-4, tiny 5e-4, mini 1e-3")
    add("--warmup", type=steps, help="linear; default 5000, at most a tenth of --iters")
    add("--optimizer", choices=["adam", "adamw"], default="adam")
    add("--clip-grad", type=between(0), default=1.0, help="0: no clipping")
    add("--dropout", type=share, help="default ddpm 0.1, tiny, mini 0")
    add(
        "--ema",
        type=between(0, 1, below=True),
        default=0.9999,
        help="EMA decay, ramped up as (1 + step) / (10 + step) (ours)",
    )
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="random mirror images")
    add("--seed", type=between(0, 2**63 - 1, kind=int), default=0)
    add("--device", default="auto", help="auto | cpu | cuda | cuda:N")
    add(
        "--amp",
        choices=["auto", "bf16", "fp16", "fp32"],
        default="auto",
        help="auto: bf16 on a GPU, fp32 on a CPU",
    )
    add("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    add("--save-every", type=count, metavar="K", help="default 5000, at most iters / 10")
    add(
        "--sample-every", type=steps, metavar="K", help="grids; default iters / 4; 0: the last only"
    )
    add("--log-every", type=count, metavar="K", help="default 50 (10 for tiny, mini)")
    add("--resume", action="store_true", help="continue OUT/ckpt.pt; --iters may grow")
    add("--overwrite", action="store_true", help="start again although OUT holds a checkpoint")
    add("--init", metavar="PATH", help="start from a checkpoint's EMA weights or diffusers folder")
    add("--classifier", metavar="PATH", help="addt: a checkpoint of classifier.py")
    add(
        "--addt-guide",
        choices=["classifier", "mse", "none"],
        default="classifier",
        help="addt: what its delta raises",
    )
    add(
        "--addt-perturb",
        choices=["rbgm", "linf"],
        default="rbgm",
        help="addt: rank-based Gaussian, or P2's ablation",
    )
    args = parser.parse_args(argv)
    args.given = given_flags(parser, argv)
    fill(args, RECIPES[args.model])
    tenth = args.iters // 10
    fill(
        args,
        dict(
            warmup=min(5000, tenth),
            save_every=min(5000, max(1, tenth)),
            sample_every=max(1, args.iters // 4),
            log_every=10 if args.model in ("tiny", "mini") else 50,
        ),
    )
    return args


def fill(args, defaults):
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def flag(name):
    return f"--{name.replace('_', '-')}"


def check(args, world):
    """Refuse what cannot work before any work is done."""
    level = f"--sigma {args.sigma}"
    replaced = args.corrupt in ("outliers", "class")  # a corruption without a level
    if replaced and "sigma" in args.given:
        raise ValueError(f"{level}: has no effect with --corrupt {args.corrupt}")
    if args.corrupt in ("salt-pepper", "patch") and args.sigma > 1:
        raise ValueError(f"{level}: for --corrupt {args.corrupt} it is a share, at most 1")
    if args.corrupt == "class" and args.data.partition(":")[0] == "synthetic":
        raise ValueError(f"--corrupt class: --data {args.data} holds butterflies already")
    if not args.resume:
        if "corrupt" in args.given and "p" not in args.given:
            raise ValueError(f"--corrupt {args.corrupt}: corrupts nothing without --p")
        alone = args.p > 0 and "sigma" not in args.given or args.sigma > 0 and "p" not in args.given
        if alone and not replaced:
            raise ValueError(f"--p {args.p} {level}: corruption takes both, a share and a level")
    check_objective(args)
    if args.batch_size % (world * args.accum):
        raise ValueError(
            f"--batch-size {args.batch_size}: must divide by {world} processes "
            f"x --accum {args.accum}"
        )
    if args.resume and (args.init or args.overwrite):
        raise ValueError(f"--resume with --{'init' if args.init else 'overwrite'}: choose one")


def check_objective(args):
    """Refuse flags that --robust does not read, and what ADDT and --drop-noisy cannot do."""
    mine = OBJECTIVES[args.robust][1] + ["noisy_above"] * args.drop_noisy
    for name in sorted(args.given):
        users = [method for method, (_, flags, _) in OBJECTIVES.items() if name in flags]
        if users and name not in mine:
            raise ValueError(
                f"{flag(name)}: has no effect with --robust {args.robust}, only with "
                f"{', '.join(users)}"
            )
    if args.drop_noisy and args.robust == "ambient":
        raise ValueError("--drop-noisy: leaves --robust ambient nothing to do; choose one of them")
    if args.robust == "addt":
        if not (args.init or args.resume):
            raise ValueError("--robust addt: fine-tunes a trained model; give --init PATH")
        if args.addt_guide == "classifier" and not args.classifier:
            raise ValueError(
                "--addt-guide classifier: needs --classifier PATH, a checkpoint of "
                "classifier.py; or choose mse or none"
            )
        if args.addt_guide != "classifier" and args.classifier:
            raise ValueError(f"--addt-guide {args.addt_guide}: takes no --classifier")


# --------------------------------------------------------------------------------------------------
# one step


def phase(args, step):
    """-> whether the regulariser acts, steps since the phase began, its rate, its warm-up.

    Before the last share --reg-last of --iters, training is plain DDPM. The second phase warms up
    anew, its rate falls linearly to 0, and the average of the weights starts anew, which would hold
    those of the first phase for too long (all ours).
    """
    begin = change(args)
    if 0 < begin <= step:
        left = (args.iters - step) / (args.iters - begin)
        return True, step - begin, args.lr * args.reg_lr * left, args.warmup // 10
    return begin == 0, step, args.lr, args.warmup


def change(args):
    """The first step at which the regulariser acts; --iters, and so never, if there is none."""
    if "reg_last" not in OBJECTIVES[args.robust][1]:
        return args.iters
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
        u=2 * torch.rand(shape, **own).permute(0, 3, 1, 2) - 1,
    )  # delta_ran = r u


def prepare(net, args, device, world=1, backend=None):
    """What `train_step` works on; backend: that of torch.compile, if any.

    params: the float32 weights; weights: those that compute, their copies in lower precision unless
    that is float32.
    """
    optimizer = dict(adam=torch.optim.Adam, adamw=torch.optim.AdamW)[args.optimizer]
    params = list(net.parameters())
    dtype = precision(device, args.amp)
    model = net if dtype == torch.float32 else copy.deepcopy(net).cast(dtype)
    return SimpleNamespace(
        net=net,
        params=params,
        computing=model,
        weights=list(model.parameters()),
        world=world,
        model=torch.compile(model, backend=backend, dynamic=False) if backend else model,
        ema=copy.deepcopy(net).eval().requires_grad_(False),
        optimizer=optimizer(params, lr=args.lr, fused=True),
        schedule=NoiseSchedule().to(device),
        cast=autocast(device, args.amp),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
    )


def train_step(state, args, step, batches, classifier=None):
    """One update on a batch in parts -> scalars to log, on the device: nothing here waits for it.

    batches: dicts of x0, t, eps, beta, u and, if they are read, y, sigma_y, keys (of dropout).
    """
    acts, since, rate, warmup = phase(args, step)
    late = "reg_last" in OBJECTIVES[args.robust][1]
    objective = OBJECTIVES["none" if late and not acts else args.robust][0]
    for group in state.optimizer.param_groups:
        group["lr"] = rate * min(1.0, (since + 1) / max(1, warmup))
    lower_precision = state.weights[0] is not state.params[0]
    if lower_precision:  # cast once, for all forwards of the step
        with torch.no_grad():
            torch._foreach_copy_(state.weights, state.params)
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
            move_gradients(state.weights, state.params, first=not logs)
        logs.append(dict(loss=loss.detach(), **terms))
    if state.world > 1:
        average([p.grad for p in state.params], state.world)
    state.scaler.unscale_(state.optimizer)
    most = args.clip_grad or float("inf")
    grad_norm = torch.nn.utils.clip_grad_norm_(state.params, most, foreach=True)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    decay = min(args.ema, (1 + since) / (10 + since))
    with torch.no_grad():
        torch._foreach_lerp_(list(state.ema.parameters()), state.params, 1 - decay)
    means = {name: sum(log[name] for log in logs) / len(logs) for name in logs[0]}
    return means | dict(grad_norm=grad_norm)


def move_gradients(weights, params, first):
    """The gradients of the weights in lower precision become, or are added to, those of params."""
    for p in params:
        if p.grad is None:  # once: later steps write into the same memory
            p.grad = torch.empty_like(p)
    grads = [p.grad for p in params]
    lower = [weight.grad for weight in weights]
    if first:
        torch._foreach_copy_(grads, lower)
    else:
        torch._foreach_add_(grads, lower)
    for weight in weights:
        weight.grad = None


# --------------------------------------------------------------------------------------------------
# the run


def main():
    args = parse_args()
    started = time.time()
    device, rank, world = setup(args.device)
    out = Path(args.out)
    path = out / "ckpt.pt"
    ckpt = resume(args, path) if args.resume else None
    check(args, world)
    if path.exists() and not (args.resume or args.overwrite):
        raise ValueError(
            f"--out {out}: holds a checkpoint; --resume continues it, --overwrite starts again"
        )
    precision(device, args.amp)  # refuses what this device has not
    net = build(args)
    classifier = load_classifier(args.classifier, device, args.compile) if args.classifier else None
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".write-test").write_text("")  # fails here rather than at the first checkpoint
        (out / ".write-test").unlink()
    data = load_data(args, net, classifier, device, world)
    sigma_y = judge(args, data, ckpt, device, world)

    net = net.to(device, memory_format=layout(device, args.amp)).train()
    compiled = device.type == "cuda" if args.compile is None else args.compile
    state = prepare(net, args, device, world, "inductor" if compiled else None)
    first = restore(state, ckpt) if ckpt else 0
    batches = Batches(args, data, sigma_y, state.schedule.T, device, rank, world)
    interrupt = Interrupt(world)
    log = Log(
        out / "metrics.jsonl",
        first,
        args.batch_size,
        device,
        rank,
        world,
        may_skip=state.scaler.is_enabled(),
    )
    if rank == 0:
        describe(args, net, data, sigma_y, first, device, world)
    probed, gains = probe(data, args.seed)
    saved = bool(ckpt)
    step = first
    line = {}
    with tqdm(
        total=args.iters, initial=first, desc=f"train {args.robust}", unit="step", disable=rank > 0
    ) as bar:
        while step < args.iters and not interrupt.asked(step):
            numbers = batches(step)
            if args.robust == "addt":  # it draws as it goes
                torch.manual_seed(seed_at(args.seed, step, stream=3 + rank))
            log.add(train_step(state, args, step, numbers, classifier))  # Algorithm 1
            step += 1
            bar.update()
            save_due = step % args.save_every == 0 or step == args.iters
            grid_due = args.sample_every and step % args.sample_every == 0 and step < args.iters
            if step % args.log_every == 0 or save_due or grid_due or step == change(args):
                # before saving: a checkpoint never holds the result of a non-finite loss
                more = diagnose(state, probed, gains) if save_due else {}
                line = log.flush(step, advice(path, saved), **more)
                bar.set_postfix(loss=f"{line['loss']:.4f}", img_s=f"{line['img_per_s']:.0f}")
            if save_due:
                save(path, step, state, args, data, sigma_y, rank)
                saved = True
            if grid_due:
                grid(out, step, state, data, args, device, rank)
            if save_due or grid_due:
                log.restart_clock()
    line = log.flush(step, advice(path, saved)) or line
    if step < args.iters:  # a signal, perhaps to another process
        save(path, step, state, args, data, sigma_y, rank)
        if rank == 0:
            print(f"stopped by a signal at step {step}; saved {path}; --resume continues")
    else:
        grid(out, step, state, data, args, device, rank)
    if rank == 0:
        finish(args, out, step, sigma_y, data, device, world, started)
    batches.close()
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------
# plumbing


class Batches:
    """batches(step) -> the batch of a step in the --accum parts of this process, dicts by name.

    Part i of n holds the rows i, i + n, i + 2 n, ..: the first rows of all parts together are the
    first rows of the batch, those that --reg-share regularises.
    """

    def __init__(self, args, data, sigma_y, T, device, rank=0, world=1):
        self.args, self.data, self.sigma_y, self.T = args, data, sigma_y, T
        self.device = device
        where = "cpu" if data.streams else device
        self.kept = (sigma_y == 0).nonzero().flatten().to(where) if args.drop_noisy else None
        self.order = Order(len(data) if self.kept is None else len(self.kept), args.seed, where)
        parts = world * args.accum
        mine = range(rank * args.accum, (rank + 1) * args.accum)
        self.rows = [slice(i, args.batch_size, parts) for i in mine]
        self.generator = torch.Generator(device)
        on_device = torch.cuda.set_device if device.type == "cuda" else torch.device
        self.pool = ThreadPoolExecutor(1, initializer=on_device, initargs=(device,))
        self.ahead = None

    def __call__(self, step):
        if not self.data.streams:
            return self.draw(step, self.read(step))
        loaded = (self.ahead or self.pool.submit(self.read, step)).result()
        self.ahead = self.pool.submit(self.read, step + 1)  # reads from disk meanwhile, no more:
        return self.draw(step, loaded)  # what may be compiled runs in this thread alone

    def read(self, step):
        """[(image numbers, pixels)] of the parts."""
        index = self.order(step * self.args.batch_size, self.args.batch_size)
        index = index if self.kept is None else self.kept[index]
        return [(index[rows], self.data.read(index[rows])) for rows in self.rows]

    def draw(self, step, loaded):
        """The parts of the batch: the images with their corruption, and the random numbers."""
        args = self.args
        B, size = args.batch_size, self.data.shape[1]
        numbers = draw_numbers(self.generator, args.seed, step, self.T, B, size)
        flip = numbers.pop("flip")
        batches = []
        for rows, (index, pixels) in zip(self.rows, loaded):
            batch = {name: value[rows] for name, value in numbers.items()}
            batch["x0"] = self.data.batch(index, flip[rows] if args.flip else None, pixels)
            if args.dropout > 0:  # one mask per row and step, whatever the division
                keys = torch.arange(rows.start, B, rows.step, device=self.device)
                batch["keys"] = keys + seed_at(args.seed, step, stream=4)
            index = index.to(self.device, non_blocking=True)
            if args.classifier:
                batch["y"] = self.data.labels[index]
            if args.robust == "ambient":
                batch["sigma_y"] = self.sigma_y[index]
            batches.append(batch)
        return batches

    def close(self):
        self.pool.shutdown(cancel_futures=True)


def build(args):
    """The network: fresh, or of --init."""
    config = dict(PRESETS[args.model])
    if args.dropout is not None:
        config["dropout"] = args.dropout
    torch.manual_seed(args.seed)
    net = UNet(**config)
    args.dropout = net.config["dropout"]
    if args.init:
        folder = os.path.isdir(args.init)
        source = UNet.from_diffusers(args.init) if folder else UNet.load(args.init)
        for name, value in net.config.items():
            if source.config[name] != value and name != "dropout":
                raise ValueError(
                    f"--init {args.init}: has {name} {source.config[name]}, but "
                    f"--model {args.model} {value}; choose the --model of its training"
                )
        net.load_state_dict(source.state_dict())
    return net


def load_data(args, net, classifier, device, world):
    """The training images, with their corruption; refuses what does not fit the network."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    if world > 1 and local > 0:
        dist.barrier()  # one process of each machine decodes the images first
    images, labels = load_images(
        args.data, args.image_size, root=args.data_root, labels_needed=classifier is not None
    )
    if world > 1 and local == 0:
        dist.barrier()
    data = CorruptedImages(images, labels, args.p, args.sigma, args.seed, device, args.corrupt)
    if classifier:
        most, classes = int(data.labels.max()), classifier.config["classes"]
        if most >= classes:
            raise ValueError(
                f"--classifier {args.classifier}: knows {classes} classes, but "
                f"--data {args.data} has label {most}"
            )
    if args.batch_size > len(data):
        raise ValueError(
            f"--batch-size {args.batch_size}: larger than --data {args.data} with its "
            f"{len(data)} images"
        )
    if data.shape[1] % net.factor:
        raise ValueError(
            f"--image-size {data.shape[1]}: --model {args.model} needs a multiple of {net.factor}"
        )
    return data


def judge(args, data, ckpt, device, world):
    """The noise of each image for ambient and --drop-noisy, (N,), 0 where judged clean; or None."""
    if not (args.robust == "ambient" or args.drop_noisy):
        return None
    if ckpt:  # as it was: a rounding that moves one image would change the order of all
        sigma_y = ckpt["sigma_y"].to(device)
    else:
        sigma_y = args.sigma_scale * metrics.estimate_noise(data, args.noisy_above)
    if world > 1:
        dist.broadcast(sigma_y, 0)
    clean = int((sigma_y == 0).sum())
    if args.drop_noisy and args.batch_size > clean:
        raise ValueError(
            f"--drop-noisy: judges {clean} of {len(data)} images clean, fewer than "
            f"--batch-size {args.batch_size}; a higher --noisy-above keeps more"
        )
    return sigma_y


PROBED = (100, 300, 600, 900)  # t


def probe(data, seed):
    """A fixed batch for `diagnose`: dict(x0, eps, t), t over all steps, and the Gaussian gains."""
    x0 = data.batch(torch.arange(min(64, len(data)), device=data.device))
    generator = torch.Generator().manual_seed(seed_at(seed, 0, stream=5))
    eps = torch.randn(x0.shape, generator=generator).to(x0.device)
    many = data.batch(torch.arange(min(1000, len(data)), device=data.device))
    variance = many[0].numel() * many.mean((1, 2, 3)).var().item()
    schedule = NoiseSchedule()
    gains = {f"gauss_{t}": metrics.gaussian_gain(schedule, t, variance) for t in PROBED}
    t = torch.arange(len(x0), device=x0.device) * schedule.T // len(x0)
    return dict(x0=x0, eps=eps, t=t), gains


@torch.no_grad()
def diagnose(state, batch, gains):
    """Of the averaged weights: L_DM by quarter of t, and the gain of eps to brightness at a few t.

    gauss_t is the gain of the minimiser for Gaussian data; far below it, global content is missing.
    """
    x0, eps, t = batch["x0"], batch["eps"], batch["t"]
    with state.cast:
        answer = state.ema(state.schedule.q_sample(x0, t, eps), t)
        found = {
            f"gain_{k}": metrics.brightness_gain(state.ema, state.schedule, x0, eps, k).item()
            for k in PROBED
        }
    loss = (answer - eps).square().flatten(1).mean(1)
    quarters = {f"L_DM_q{i + 1}": part.mean().item() for i, part in enumerate(loss.chunk(4))}
    return quarters | found | gains


def resume(args, path):
    """The checkpoint to continue from; its settings replace the defaults, a flag that contradicts
    them is refused."""
    ckpt = load_checkpoint(path)
    if ckpt.get("kind") != "unet" or "optimizer" not in ckpt:
        raise ValueError(f"{path}: not a checkpoint of train.py that can be resumed")
    if "reg_last" not in ckpt["args"]:  # written before there was a second phase
        ckpt["args"] |= dict(reg_last=1.0, reg_share=1.0, reg_lr=1.0)
    for name, value in ckpt["args"].items():
        if name in args.given and name not in FREE and getattr(args, name) != value:
            raise ValueError(
                f"{flag(name)} {getattr(args, name)}: the checkpoint {path} was trained "
                f"with {value}; drop the flag or start in another --out"
            )
        if name not in args.given:
            setattr(args, name, value)
    before = change(argparse.Namespace(**ckpt["args"]))
    if change(args) != before and ckpt["step"] > min(before, change(args)):
        raise ValueError(
            f"--iters {args.iters}: the regulariser of {path} began at step {before} "
            f"of {ckpt['args']['iters']}, which step {ckpt['step']} has passed; start "
            f"another --out with --init {path}"
        )
    return ckpt


def restore(state, ckpt):
    """Put a checkpoint into the state -> its step."""
    state.net.load_state_dict(ckpt["model"])
    state.ema.load_state_dict(ckpt["ema"])
    state.optimizer.load_state_dict(ckpt["optimizer"])
    lay_out_moments(state.optimizer)
    if ckpt["scaler"]:  # it is empty unless that was fp16
        state.scaler.load_state_dict(ckpt["scaler"])
    return ckpt["step"]


def lay_out_moments(optimizer):
    """Adam's moments in the memory layout of their weights, which load_state_dict does not mind.

    Fused Adam walks over both in memory order, and a checkpoint may come from a device that prefers
    another layout.
    """
    for p, moments in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name] = torch.empty_like(p).copy_(moments[name])


def save(path, step, state, args, data, sigma_y, rank):
    left_out = ("given", "out", "device", "resume", "overwrite", "init")
    settings = {name: value for name, value in vars(args).items() if name not in left_out}
    if rank == 0:
        save_checkpoint(
            path,
            dict(
                kind="unet",
                config=state.net.config,
                image_size=data.shape[1],
                step=step,
                model=state.net.state_dict(),
                ema=state.ema.state_dict(),
                optimizer=state.optimizer.state_dict(),
                scaler=state.scaler.state_dict(),
                sigma_y=None if sigma_y is None else sigma_y.cpu(),
                args=settings,
            ),
        )


def advice(path, saved):
    last = f"the last good checkpoint is {path}" if saved else "there is no checkpoint yet"
    return f"{last}. Try a lower --lr, or --amp bf16 or fp32"


def grid(out, step, state, data, args, device, rank):
    """64 images of the averaged weights by 50-step DDIM."""
    if rank == 0:
        net = copy.deepcopy(state.ema).cast(precision(device, args.amp))
        with state.cast:
            x0 = generate(
                net, state.schedule, range(64), data.shape, args.seed, device, "ddim", steps=50
            )
        save_grid(x0, out / f"grid{step:07d}.png")
        (out / "grid.png").write_bytes((out / f"grid{step:07d}.png").read_bytes())


def describe(args, net, data, sigma_y, first, device, world):
    size = sum(p.numel() for p in net.parameters()) / 1e6
    level = f" {args.sigma}" if args.sigma > 0 else ""
    print(
        f"{args.robust}: {size:.1f} M parameters, {len(data)} images {data.shape[1]}x"
        f"{data.shape[1]} of {args.data}, {int(data.corrupted.sum())} with {args.corrupt}{level}, "
        f"{device} x {world}, steps {first}..{args.iters} -> {args.out}"
    )
    if 0 < change(args) < args.iters:
        print(
            f"plain DDPM up to step {change(args)}, then the regulariser (--reg-last "
            f"{args.reg_last}) on {args.reg_share:.0%} of the rows"
        )
    if sigma_y is not None:
        noisy = int((sigma_y > 0).sum())
        mean = float(sigma_y.sum() / max(1, noisy))
        what = "and left out" if args.drop_noisy else f"with sigma_y {mean:.3f} on average"
        print(f"{noisy} images are judged noisy, {what}")
    if device.type == "cpu" and args.model.startswith("ddpm"):
        print("note: this network takes days on a CPU; --model mini --image-size 16 takes minutes")


def finish(args, out, step, sigma_y, data, device, world, started):
    """OUT/loss.png and metrics.json."""
    lines = read_log(out / "metrics.jsonl")
    if lines:
        plot(lines, out / "loss.png", args)
        judged = {} if sigma_y is None else dict(judged_noisy=int((sigma_y > 0).sum()))
        settings = {name: value for name, value in vars(args).items() if name != "given"}
        runtime.write_metrics(
            out,
            started,
            seed=args.seed,
            device=device,
            n=len(data),
            world=world,
            args=settings,
            **judged,
            **lines[-1],
        )
    print(f"step {step}: {out}/ckpt.pt, {out}/grid.png, {out}/loss.png")


def plot(lines, path, args):
    labels = dict(
        L_DM="$L_{DM}$ (Eq. 4)",
        L_reg="$L_{reg}$ (Eq. 10, with $\\lambda_t$)",
        L_ambient="$L_{ambient}$",
        L_Huber="$L_{Huber}$",
        L_ADDT="$L_{ADDT}$ (P2 Eq. 8)",
        grad_norm="gradient norm",
    )
    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, label in labels.items():
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            ax.plot(*zip(*points), label=label, lw=1.2)
    level = f"σ = {args.sigma}" if args.corrupt == "gauss" else f"{args.corrupt} {args.sigma}"
    ax.set(
        xlabel="step",
        ylabel="mean since the last log line",
        yscale="log",
        title=f"{args.model}, --robust {args.robust}, {args.data.split('/')[-1]}, "
        f"p = {args.p}, {level}",
    )
    ax.legend()
    ax.grid(alpha=0.3)
    fig.savefig(path, dpi=120)
    plt.close(fig)


if __name__ == "__main__":
    runtime.cli(main)
