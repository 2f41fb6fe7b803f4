"""Speed: the training step of each method, its modes, diffusers' network beside it, sampling.

    python bench.py                                  # methods, modes, sampling; for a GPU
    python bench.py --model tiny --image-size 16     # the same on a CPU, in a few minutes
    python bench.py --what against --batch-size 8    # diffusers' UNet2DModel beside ours
    python bench.py --what kernels                   # a step's CUDA kernels, counted; needs no GPU

The claim (P1): a step of Robust_adv costs 2.5 times one of DDPM. In FLOPs it is 8 / 3: three
forwards (the attack reuses the clean one), two full backwards, and the attack's, which leaves out
the weights. Timed is train.py's step, from zeroed gradients to the averaged weights, on one batch.
The candidates of a section take turns in --repeats rounds, so that a drifting clock hits all alike;
ratios are taken within a round. fp32 on a GPU is TF32. Leaves --out/table.md and metrics.json.
"""

import argparse
import functools
import importlib.util
import itertools
import time

import numpy as np
import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import outputs
import runtime
import train
import training
from data import Batches, CorruptedImages, load_images
from losses import NoiseSchedule
from runtime import autocast, between, layout, precision, setup
from sample import generate
from samplers import heun_levels
from unet import PRESETS, UNet
from weights import unet2d_config

REGULARISED = [m for m, (_, flags, _) in train.OBJECTIVES.items() if "reg_last" in flags]
METHODS = ["none", *REGULARISED, "late"]


def settings(method, amp="auto"):
    """train.py's own, without warm-up: the regulariser always and everywhere, as in P1. late: adv
    as in the second phase of train.py's default."""
    if method == "late":
        flags = ["--robust", "adv", "--reg-last", "1"]
    else:
        flags = ["--robust", method, "--paper"]
    return train.parse_args([*flags, "--amp", amp, "--warmup", "0"])


def draws(data, B, device, dropout=0.0):
    """-> draw(step), the batch of a step: dict(x0, t, eps, beta, u), with dropout its keys."""
    args = settings("none")
    args.batch_size = B
    args.dropout = dropout
    run = argparse.Namespace(data=data, sigma_y=None, device=device, rank=0, world=1)
    batches = Batches(args, run, train.draw_numbers, NoiseSchedule().T)
    return lambda step: batches(step)[0]


def make_step(net, device, amp="auto", backend=None, cast_once=None):
    """-> step(method, batch) -> dict(loss, .., grad_norm), one step; the rest as train.prepare."""
    args = {method: settings(method, amp) for method in METHODS}
    state = train.prepare(net.train(), args["none"], device, 1, backend, cast_once)
    done = itertools.count()
    return lambda method, batch: train.train_step(state, args[method], next(done), [batch])


def new_net(args, device, amp, kind=UNet, form=None):
    torch.manual_seed(0)
    return kind(**PRESETS[args.model]).to(device, memory_format=form or layout(device, amp))


def steps_of_none(args, device, batch, kinds):
    """(mode, {name: step()}) for each precision and compiler; kinds: {name: (network, format)}."""
    amps = ("fp32", "bf16") if args.amp == "auto" else (args.amp,)
    backends = (None, args.backend) if args.backend else (None,)
    for amp, backend in itertools.product(amps, backends):
        steps = {}
        for name, (kind, form) in kinds.items():
            form = form or layout(device, amp)
            images = {k: batch[k].contiguous(memory_format=form) for k in ("x0", "eps", "u")}
            step = make_step(new_net(args, device, amp, kind, form), device, amp, backend)
            steps[name] = functools.partial(step, "none", batch | images)
        yield f"{amp}, compiled" if backend else amp, steps


def interleaved(calls, args):
    """Seconds per call, {name: (repeats,) array}; a round times each, warm, for --seconds-per."""
    seconds = {name: np.zeros(args.repeats) for name in calls}
    for i in tqdm(range(args.repeats), desc=", ".join(calls), unit="round", leave=False):
        for name, call in calls.items():
            timer = Timer("call()", globals=dict(call=call), num_threads=torch.get_num_threads())
            seconds[name][i] = timer.blocked_autorange(min_run_time=args.seconds_per).median
    return seconds


def rows_of(section, seconds, images, reference):
    """Table rows, medians over the rounds; images: of a call; speed: relative to `reference`."""
    rows = []
    for name, s in seconds.items():
        row = dict(section=section, name=name, ms=1e3 * np.median(s))
        for key, values in (("img_s", images / s), ("speed", seconds[reference] / s)):
            row[key] = np.median(values)
            row[f"{key} quartiles"] = "{:.3g}, {:.3g}".format(*np.percentile(values, [25, 75]))
        rows.append(row)
    return rows


def methods(args, device, batch):
    """none, ran, adv, .. on one network. cost: time relative to the first."""
    step = make_step(new_net(args, device, args.amp), device, args.amp, args.backend)
    calls = {method: functools.partial(step, method, batch) for method in args.methods}
    rows = rows_of("methods", interleaved(calls, args), args.batch_size, args.methods[0])
    eager = make_step(new_net(args, device, args.amp), device, args.amp)
    some = {name: value[:8] for name, value in batch.items()}  # late acts on an eighth of them
    for row in rows:
        with FlopCounterMode(display=False) as counter:
            eager(row["name"], some)
        row["cost"] = 1 / row["speed"]
        row["GFLOP_img"] = counter.get_total_flops() / len(some["t"]) / 1e9
        row["TFLOP_s"] = row["GFLOP_img"] * row["img_s"] / 1e3
    return rows


def modes(args, device, batch):
    """Precisions, eager and compiled, for the step of `none`."""
    modes = steps_of_none(args, device, batch, {"ours": (UNet, None)})
    calls = {mode: steps["ours"] for mode, steps in modes}
    return rows_of("modes", interleaved(calls, args), args.batch_size, next(iter(calls)))


class Reference(torch.nn.Module):
    """diffusers' UNet2DModel of the preset's shape, google/ddpm-cifar10-32's config for `ddpm`."""

    cast = UNet.cast

    def __init__(self, **preset):
        from diffusers import UNet2DModel

        super().__init__()
        self.net = UNet2DModel.from_config(unet2d_config(UNet(**preset).config, image_size=32))

    def forward(self, x, t):
        return self.net(x, t).sample


def against(args, device, batch):
    """The same step with diffusers' network, in two memory formats; speed: to its better one."""
    kinds = {
        "ours": (UNet, None),
        "diffusers": (Reference, torch.contiguous_format),
        "diffusers, channels_last": (Reference, torch.channels_last),
    }
    rows = []
    for mode, steps in steps_of_none(args, device, batch, kinds):
        seconds = interleaved({f"{mode}: {name}": step for name, step in steps.items()}, args)
        better = min(list(seconds)[1:], key=lambda name: np.median(seconds[name]))
        rows += rows_of("against", seconds, args.batch_size, better)
    return rows


def sampling(args, device, batch):
    """A few network calls of each sampler are timed; whole samples are computed from them."""
    net = new_net(args, device, args.amp).eval().cast(precision(device, args.amp))  # as sample.py
    mode = "reduce-overhead" if device.type == "cuda" else None  # as sample.py
    model = torch.compile(net, mode=mode) if args.backend else net
    schedule = NoiseSchedule().to(device)
    heun = 2 * len(heun_levels(schedule, 18)) - 1
    # network calls of a whole sample; of the few steps that are timed; these steps
    table = {"ddpm": (1000, 4, 4), "ddim": (100, 4, 4), "heun": (heun, 3, 2)}
    what = model, schedule, range(args.batch_size), batch["x0"].shape[1:], 0, device
    calls = {k: functools.partial(generate, *what, k, steps=table[k][2]) for k in table}
    with autocast(device, args.amp):
        seconds = interleaved(calls, args)
    whole = {name: s * table[name][0] / table[name][1] for name, s in seconds.items()}
    rows = rows_of("sampling (computed)", whole, args.batch_size, "ddpm")
    for row in rows:
        row["network_calls"], row["timed_calls"], _ = table[row["name"]]
    return rows


def kernels(args, device, batch):
    """What a step launches on a GPU, by Inductor's code for a pretended H200: nothing is run."""
    from kernels import rows  # private names of PyTorch: no other section should fail with them

    return rows(args, make_step)


SECTIONS = dict(methods=methods, modes=modes, against=against, sampling=sampling, kernels=kernels)


def parse_args():
    parser = runtime.parser(__doc__)
    add = parser.add_argument
    count, positive = between(1, kind=int), between(0, above=True)
    add("--what", nargs="+", choices=SECTIONS, default=["methods", "modes", "sampling"])
    add("--methods", nargs="+", choices=METHODS, default=["none", "ran", "adv", "late"])
    add("--model", choices=PRESETS, default="ddpm")
    some = between(1, 4096, int)
    add("--image-size", type=some, metavar="S", help="default: 32, ddpm64 64")
    add("--batch-size", type=count, help="default: train.py's")
    add("--device", default="auto", help="auto | cpu | cuda | cuda:N")
    add("--amp", choices=["auto", "bf16", "fp16", "fp32"], default="auto")
    add("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    add("--threads", type=some, metavar="N", default=torch.get_num_threads(), help="of a CPU")
    add("--repeats", type=count, default=5, help="rounds")
    add("--seconds-per", type=positive, default=2.0, metavar="SEC", help="one measurement")
    add("--bandwidth", type=positive, default=4.8, metavar="TB/s", help="kernels; an H200's")
    add("--peak", type=positive, default=989.0, metavar="TFLOP/s", help="kernels; an H200's, bf16")
    add("--out", default="out_bench")
    args = parser.parse_args()
    runtime.refuse_repeats(args, "what", "methods")
    idle = runtime.idle_flags(parser)
    trains = {"methods", "kernels"} & set(args.what)
    idle(not trains, "methods", "without --what methods or kernels")
    idle("kernels" not in args.what, "bandwidth peak", "without --what kernels")
    size = 64 if args.model == "ddpm64" else 32
    training.fill(args, image_size=size, batch_size=train.RECIPES[args.model]["batch_size"])
    with torch.device("meta"):
        factor = UNet(**PRESETS[args.model]).factor
    if args.image_size % factor:
        raise ValueError(f"--image-size {args.image_size}: must be a multiple of {factor}")
    if "against" in args.what and "patch" in PRESETS[args.model]:
        raise ValueError(f"--model {args.model}: diffusers has no counterpart of it")
    if "against" in args.what and importlib.util.find_spec("diffusers") is None:
        raise ValueError("--what against: takes `pip install diffusers`")
    return args


def main():
    args = parse_args()
    started = time.time()
    device, _, _ = setup(args.device, compiled=args.compile)
    precision(device, args.amp)  # refuses what this device has not
    training.fill(args, compile=device.type == "cuda")
    args.backend = "inductor" if args.compile else None
    torch.set_num_threads(args.threads)
    out = outputs.claim(args.out)
    images, labels = load_images(f"synthetic:{max(256, args.batch_size)}", args.image_size)
    data = CorruptedImages(images, labels, 0.9, 0.2, 0, device)
    batch = draws(data, args.batch_size, device, PRESETS[args.model]["dropout"])(0)
    rows = []
    for name in args.what:
        rows += SECTIONS[name](args, device, batch)
        (out / "table.md").write_text(markdown(rows))  # after each: Ctrl-C keeps those before
        torch.compiler.reset()
    more = dict(n=args.repeats, rows=rows, args=vars(args))
    outputs.write_metrics(out, started, seed=0, device=device, **more)
    print(f"{markdown(rows)}-> {out}/table.md")


def markdown(rows):
    """A table per section."""
    text = ""
    for section, group in itertools.groupby(rows, key=lambda row: row["section"]):
        group = [list(row.items())[1:] for row in group]
        lines = [[section, *[key for key, _ in group[0][1:]]], ["---"] * len(group[0])]
        lines += [[shown(value) for _, value in row] for row in group]
        text += "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"
    return text


def shown(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    runtime.cli(main)
