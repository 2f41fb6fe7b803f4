"""What train.py needs and does not explain: defaults, the data, checks, checkpoints, the record."""

import copy
import os
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

import metrics
import outputs
import runtime
from classifier import load_classifier, refuse_labels
from data import CORRUPTIONS, CorruptedImages, load_images
from images import NATIVE_SIZE, refuse_other_classes
from outputs import plt
from runtime import flag, layout, load_checkpoint, precision, read_log, save_checkpoint
from sample import checkpoint_in, generate
from unet import PRESETS, UNet
from weights import refuse_other_shapes

# --------------------------------------------------------------------------------------------------
# defaults

EMA_RAMPS = {  # decay of the averaged weights after `step` steps, at most --ema
    "tenth": lambda step: (1 + step) / (10 + step),  # ours
    "power": lambda step: 1 - (1 + step) ** -0.75,  # P2's code
}
# how strongly, when, on which rows and at which t Eq. 10's second term acts: as P1 prints it, ours
PAPER = dict(lam=0.3, reg_last=1.0, reg_share=1.0, reg_from=0, reg_until=1000)
LATE = dict(lam=0.6, reg_last=0.1, reg_share=0.125, reg_from=5, reg_until=100)
# --robust addt, as in P2's code, whose schedule of a constant rate ignores the warm-up of 500 steps
# that it is given: so do we.
ADDT = dict(lr=2e-4, warmup=0, optimizer="adamw", beta1=0.95, weight_decay=1e-6, ema_ramp="power")
ADDT_DDPM = dict(iters=19_600, batch_size=256)  # 100 epochs of CIFAR-10; tiny, mini: their own


def complete(args, recipe):
    """Fill in what was not given. recipe: of the network, see train.RECIPES."""
    if args.robust == "addt":
        fill(args, **ADDT, **({} if args.model in ("tiny", "mini") else ADDT_DDPM))
    fill(args, **(PAPER if args.paper else LATE))
    fill(args, **recipe, optimizer="adam", beta1=0.9, ema_ramp="tenth")
    fill(args, weight_decay=0.01 if args.optimizer == "adamw" else 0.0)
    tenth = args.iters // 10
    fill(args, warmup=min(5000, tenth), save_every=min(5000, max(1, tenth)))
    fill(args, sample_every=max(1, args.iters // 4))
    fill(args, log_every=10 if args.model in ("tiny", "mini") else 50)


def fill(args, **defaults):
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


# --------------------------------------------------------------------------------------------------
# the network, the data, gradients in lower precision


def build(args):
    """The network: fresh, or of --init."""
    config = dict(PRESETS[args.model])
    if args.dropout is not None:
        config["dropout"] = args.dropout
    torch.manual_seed(args.seed)
    net = UNet(**config)
    args.dropout = net.config["dropout"]
    if args.init:
        path = checkpoint_in(args.init)
        source = UNet.from_diffusers(path) if os.path.isdir(path) else UNet.load(path)
        for name, value in net.config.items():
            if source.config[name] != value and name != "dropout":
                raise ValueError(
                    f"--init {args.init}: has {name} {source.config[name]}, but "
                    f"--model {args.model} {value}; choose the --model of its training"
                )
        net.load_state_dict(source.state_dict())
    return net


def load_data(args, net, classifier, ckpt, device, world):
    """The training images, with their corruption; refuses what does not fit the network."""
    size = args.image_size or NATIVE_SIZE.get(args.data, 0)
    net.refuse_size(size, size)  # before any decoding
    if classifier is not None:
        refuse_other_classes(f"--classifier {args.classifier}", classifier.classes, args.data)
    options = dict(root=args.data_root, labels_needed=classifier is not None)
    with runtime.machine_by_one(world):
        images, labels = load_images(args.data, args.image_size, **options)
    data = CorruptedImages(images, labels, args.p, args.sigma, args.seed, device, args.corrupt)
    some = images[:: len(images) // 2000 + 1]  # up to 2,000 of them, and their number, tell a set
    data.key = metrics.images_key(f"{len(images)}", some)
    if ckpt and ckpt.get("data_key", data.key) != data.key:
        what = f"not the images that {args.out} was trained on until step {ckpt['step']}"
        raise ValueError(f"--data {args.data}: {what}; start another --out")
    if classifier is not None:
        refuse_labels(classifier, args.classifier, data.labels, args.data)
    if args.batch_size > len(data):
        held = f"--data {args.data} with its {len(data)} images"
        raise ValueError(f"--batch-size {args.batch_size}: larger than {held}")
    net.refuse_size(*data.shape[1:])
    return data


def prepare_run(args, ckpt, device, rank, world):
    """What stays the same in a run: device, rank, world, out, net, classifier, data, sigma_y."""
    out = Path(args.out)
    if (out / "ckpt.pt").exists() and not (args.resume or args.overwrite):
        how = "--resume continues it, --overwrite starts again"
        raise ValueError(f"--out {out}: holds a checkpoint; {how}")
    net = build(args)
    classifier = load_classifier(args.classifier, device, args.compile) if args.classifier else None
    if rank == 0:
        outputs.claim(out, args.overwrite or args.resume)
    data = load_data(args, net, classifier, ckpt, device, world)
    sigma_y = judge(args, data, ckpt, device, world)
    net = net.to(device, memory_format=layout(device, args.amp)).train()
    if rank == 0 and args.overwrite:  # so that a later --resume cannot continue the old network
        (out / "ckpt.pt").unlink(missing_ok=True)
    return SimpleNamespace(
        device=device, rank=rank, world=world, out=out, net=net, classifier=classifier, data=data,
        sigma_y=sigma_y,
    )  # fmt: skip


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
        few = f"{clean} of {len(data)} images, fewer than --batch-size {args.batch_size}"
        raise ValueError(f"--drop-noisy: keeps {few}; raise --noisy-above or use --robust adv")
    return sigma_y


def foreach(function, ours, theirs):
    """function(ours, theirs) per pair of dtypes: a GPU runs a kernel per tensor of mixed lists."""
    groups = {}
    for a, b in zip(ours, theirs):
        group = groups.setdefault((a.dtype, b.dtype), ([], []))
        group[0].append(a)
        group[1].append(b)
    for a, b in groups.values():
        function(a, b)


def move_gradients(weights, params, first):
    """The gradients of the weights in lower precision become, or are added to, those of params."""
    for p in params:
        if p.grad is None:  # once: later steps write into the same memory
            p.grad = torch.empty_like(p)
    grads = [p.grad for p in params]
    lower = [weight.grad for weight in weights]
    foreach(torch._foreach_copy_ if first else torch._foreach_add_, grads, lower)
    for weight in weights:
        weight.grad = None


# --------------------------------------------------------------------------------------------------
# refusals


def check(args, world, objectives):
    """Refuse what cannot work before any work is done."""
    level = f"--sigma {args.sigma}"
    replaced = CORRUPTIONS[args.corrupt][1] is None  # a corruption without a level
    if replaced and "sigma" in args.given:
        raise ValueError(f"{level}: has no effect with --corrupt {args.corrupt}")
    if args.corrupt == "class" and args.data.partition(":")[0] == "synthetic":
        raise ValueError(f"--corrupt class: --data {args.data} holds butterflies already")
    if not args.resume:
        if "corrupt" in args.given and "p" not in args.given:
            raise ValueError(f"--corrupt {args.corrupt}: corrupts nothing without --p")
        share_alone = args.p > 0 and "sigma" not in args.given
        level_alone = args.sigma > 0 and "p" not in args.given
        if (share_alone or level_alone) and not replaced:
            raise ValueError(f"--p {args.p} {level}: corruption takes both, a share and a level")
    check_objective(args, objectives)
    if args.reg_from >= args.reg_until:
        raise ValueError(f"--reg-from {args.reg_from}: must lie below --reg-until {args.reg_until}")
    parts = f"{world} processes x --accum {args.accum}"
    if args.batch_size % (world * args.accum):
        raise ValueError(f"--batch-size {args.batch_size}: must divide by {parts}")
    rows = round(args.reg_share * args.batch_size, 6)  # those of a part are rounded by themselves
    if "reg_share" in objectives[args.robust][1] and world * args.accum > 1:
        if rows % (world * args.accum):
            raise ValueError(f"--reg-share {args.reg_share}: {rows:g} rows must divide by {parts}")
    if args.resume and (args.init or args.overwrite):
        raise ValueError(f"--resume with --{'init' if args.init else 'overwrite'}: choose one")


def check_objective(args, objectives):
    """Refuse flags that --robust does not read, and what ADDT and --drop-noisy cannot do."""
    mine = list(objectives[args.robust][1])
    if args.drop_noisy:
        mine.append("noisy_above")
    for name in sorted(args.given):
        users = [method for method, (_, flags, _) in objectives.items() if name in flags]
        if users and name not in mine:
            users += ["--drop-noisy"] if name == "noisy_above" else []
            what = f"has no effect with --robust {args.robust}, only with {', '.join(users)}"
            raise ValueError(f"{flag(name)}: {what}")
    if args.drop_noisy and args.robust == "ambient":
        raise ValueError("--drop-noisy: leaves --robust ambient nothing to do; choose one of them")
    if args.robust == "addt":
        if not (args.init or args.resume):
            raise ValueError("--robust addt: fine-tunes a trained model; give --init PATH")
        if args.addt_guide == "classifier" and not args.classifier:
            need = "needs --classifier PATH, of classifier.py; or choose mse or none"
            raise ValueError(f"--addt-guide classifier: {need}")
        if args.addt_perturb == "rbgm" and (args.addt_max or 0) > 1:
            raise ValueError(f"--addt-max {args.addt_max}: at most 1 with --addt-perturb rbgm")
        if args.addt_guide != "classifier" and args.classifier:
            raise ValueError(f"--addt-guide {args.addt_guide}: takes no --classifier")


# --------------------------------------------------------------------------------------------------
# checkpoints

LEFT_OUT = "given out device resume overwrite init".split()  # of a checkpoint's settings
# of the others, what --resume may change; the rest makes the run the run it is
FREE = "iters accum compile save_every sample_every log_every data_root".split()


def resume(args, path, regulariser_begins):
    """The checkpoint to continue from; its settings replace the defaults, a flag that contradicts
    them is refused. regulariser_begins: see train.py."""
    ckpt = load_checkpoint(path)
    kinds = dict(kind=str, step=int, args=dict, model=dict, ema=dict, optimizer=dict, scaler=dict)
    wrong = [name for name, kind in kinds.items() if not isinstance(ckpt.get(name), kind)]
    if not wrong:  # a setting that an earlier version did not have
        wrong = sorted(set(vars(args)) - set(LEFT_OUT) - set(ckpt["args"]))
    if wrong or ckpt["kind"] != "unet" or ckpt["step"] < 0:
        what = ", ".join(wrong) or "its kind and step"
        raise ValueError(f"{path}: not a checkpoint of this train.py: lacks {what}")
    for name, value in ckpt["args"].items():
        if name not in args.given or (name == "amp" and args.amp == "auto"):
            setattr(args, name, value)
        elif name not in FREE and getattr(args, name) != value:
            what = f"the checkpoint {path} was trained with {value}"
            how = "drop the flag or start in another --out"
            raise ValueError(f"{flag(name)} {getattr(args, name)}: {what}; {how}")
    if args.iters < ckpt["step"]:
        raise ValueError(f"--iters {args.iters}: {path} is at step {ckpt['step']} already")
    before = regulariser_begins(SimpleNamespace(**ckpt["args"]))
    begin = regulariser_begins(args)
    if begin != before and ckpt["step"] > min(before, begin):
        raise ValueError(
            f"--iters {args.iters}: the regulariser of {path} began at step {before} of "
            f"{ckpt['args']['iters']} and would now at {begin}, but step {ckpt['step']} is past "
            f"the earlier of the two; start another --out with --init {path}"
        )
    return ckpt


def restore(state, ckpt):
    """Put a checkpoint into the state -> its step."""
    try:
        refuse_other_shapes(state.net.state_dict(), ckpt["model"])
        state.net.load_state_dict(ckpt["model"])
        state.ema.load_state_dict(ckpt["ema"])
        state.optimizer.load_state_dict(ckpt["optimizer"])
        lay_out_moments(state.optimizer)
        if ckpt["scaler"]:  # it is empty unless that was fp16
            state.scaler.load_state_dict(ckpt["scaler"])
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as e:
        why = outputs.reason(e)
        raise ValueError(f"--resume: not a checkpoint of this network ({why})") from None
    return ckpt["step"]


def lay_out_moments(optimizer):
    """Adam's moments in the memory layout of their weights, which load_state_dict does not mind.

    Fused Adam walks over both in memory order, and a checkpoint may come from a device that prefers
    another layout.
    """
    for p, moments in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name] = torch.empty_like(p).copy_(moments[name])


def save(path, step, state, args, run):
    """Write the checkpoint, on process 0."""
    settings = {name: value for name, value in vars(args).items() if name not in LEFT_OUT}
    if not all(p.isfinite().all() for p in state.params):
        raise outputs.Failed(f"the weights of step {step} are not finite; {advice(path)}")
    if run.rank == 0:
        ckpt = dict(
            kind="unet",
            config=state.net.config,
            image_size=run.data.shape[1],
            step=step,
            model=state.net.state_dict(),
            ema=state.ema.state_dict(),
            optimizer=state.optimizer.state_dict(),
            scaler=state.scaler.state_dict(),
            data_key=run.data.key,
            sigma_y=None if run.sigma_y is None else run.sigma_y.cpu(),
            args=settings,
        )
        save_checkpoint(path, ckpt)


def advice(path):
    last = f"the last good checkpoint is {path}" if path.exists() else "there is no checkpoint yet"
    return f"{last}. Try a lower --lr, or --amp bf16 or fp32"


def grid(step, state, args, run):
    """64 images of the averaged weights by 50-step DDIM, on process 0."""
    if run.rank > 0:
        return
    net = copy.deepcopy(state.ema).cast(precision(run.device, args.amp))
    with state.cast:
        x0 = generate(
            net, state.schedule, range(64), run.data.shape, args.seed, run.device, "ddim", steps=50
        )
    outputs.save_grid(x0, run.out / f"grid{step:07d}.png")
    (run.out / "grid.png").write_bytes((run.out / f"grid{step:07d}.png").read_bytes())


# --------------------------------------------------------------------------------------------------
# what a run says and leaves


def describe(args, run, first, begin):
    """What will be trained, in a few lines. begin: the step at which the regulariser sets in."""
    size = sum(p.numel() for p in run.net.parameters()) / 1e6
    level = f" {args.sigma}" if args.sigma > 0 else ""
    S = run.data.shape[1]
    print(
        f"{args.robust}: {size:.1f} M parameters, {len(run.data)} images {S}x{S} of {args.data}, "
        f"{int(run.data.corrupted.sum())} with {args.corrupt}{level}, {run.device} x {run.world}, "
        f"steps {first}..{args.iters} -> {args.out}"
    )
    if begin > 0:
        print(
            f"plain DDPM up to step {begin}, then the regulariser (--reg-last {args.reg_last}) "
            f"on {args.reg_share:.3g} of the rows, at {args.reg_from} <= t < {args.reg_until}"
        )
    if run.sigma_y is not None:
        noisy = int((run.sigma_y > 0).sum())
        mean = float(run.sigma_y.sum() / max(1, noisy))
        what = "and left out" if args.drop_noisy else f"with sigma_y {mean:.3f} on average"
        print(f"{noisy} images are judged noisy, {what}")
    if run.device.type == "cpu" and args.model.startswith("ddpm"):
        print("note: this network takes days on a CPU; --model mini --image-size 16 takes minutes")


def finish(args, run, step, started):
    """OUT/loss.png and metrics.json."""
    lines = read_log(run.out / "metrics.jsonl")
    if lines:
        plot(lines, run.out / "loss.png", args)
        settings = {name: value for name, value in vars(args).items() if name != "given"}
        numbers = dict(world=run.world, args=settings, **lines[-1])
        if run.sigma_y is not None:
            numbers["judged_noisy"] = int((run.sigma_y > 0).sum())
        n = len(run.data)
        outputs.write_metrics(run.out, started, seed=args.seed, device=run.device, n=n, **numbers)
    files = [run.out / name for name in ("ckpt.pt", "grid.png", "loss.png")]
    print(f"step {step}: {', '.join(str(file) for file in files if file.exists())}")


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
