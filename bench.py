"""Speed in numbers: the training step of each method, its modes, diffusers' network beside it, sampling, loader, scaling.

    python bench.py                                                       # methods, modes, sampling, loader; for a GPU
    python bench.py --model tiny --image-size 16                          # the same on a CPU, in a few minutes
    python bench.py --against diffusers --batch-size 8 --threads 1        # UNet2DModel of equal shape, side by side
    python bench.py --what scaling --processes 8                          # 1, 2, 4, 8 processes; --nodes 2: as two nodes
    python bench.py --what profile --methods none adv                     # where the time goes; host syncs per step
    python bench.py --what kernels --methods none ran adv                 # what a step launches on a GPU; needs none

The claim (P1): a step of Robust_adv costs 2.5 times one of DDPM. In FLOPs it is 8 / 3: three forwards (the attack reuses the
clean one), two full backwards of twice a forward each, and the attack's, which leaves out the weights. What is timed is
train.py's step, from zeroed gradients to the averaged weights, on a fixed batch; `loader` adds the rest. The candidates of a
section take turns in --repeats rounds, so that a drifting clock hits all alike; ratios are taken within a round, then their
median and quartiles over the rounds (but `scaling` runs one number of processes after the other). fp32 on a GPU is TF32.

Leaves --out/table.csv, table.md, bench.png and metrics.json; profile.txt if asked for.
"""

import argparse
import contextlib
import csv
import itertools
import json
import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import runtime
import train
from data import CorruptedImages, Order, load_images
from losses import NoiseSchedule
from runtime import autocast, layout, memory, precision, setup
from sample import generate
from samplers import heun_timesteps
from train import OBJECTIVES, RECIPES
from unet import PRESETS, UNet

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

METHODS = ["none", *(name for name, (_, flags, _) in OBJECTIVES.items() if "reg_last" in flags)]

# ---------------------------------------------------------------------------------------------------------------------
# the step of train.py


def draws(data, B, device, seed=0):
    """-> draw(step) -> dict(x0, t, eps, beta, u): the batch of a step and its random numbers, (B, 3, S, S) or (B,)."""
    order, generator, T = Order(len(data), seed, device), torch.Generator(device), NoiseSchedule().T

    def draw(step):
        numbers = train.draw_numbers(generator, seed, step, T, B, data.shape[1])
        return dict(x0=data.batch(order(step * B, B), numbers.pop("flip")), **numbers)

    return draw


def settings(method, amp="auto"):
    """train.py's own for --robust `method` and --model ddpm, without the warm-up; the regulariser on every row, as in P1."""
    return train.parse_args(
        ["--robust", method, "--amp", amp, "--warmup", "0", "--reg-last", "1", "--reg-share", "1"]
    )


def training(net, device, amp="auto", backend=None, world=1):
    """-> step(method, batch) -> dict(loss, .., grad_norm), one step on `net`; backend: that of torch.compile."""
    args, done = {method: settings(method, amp) for method in METHODS}, itertools.count()
    run = train.prepare(net.train(), args["none"], device, world, backend)
    return lambda method, batch: train.train_step(run, args[method], next(done), [batch])


# ---------------------------------------------------------------------------------------------------------------------
# measuring


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(calls, args, device, world=1):
    """Seconds per call, {name: (repeats,) array}. Every round times each of `calls` once, for about --seconds-per."""
    counts, seconds = {}, {name: [] for name in calls}
    for name, call in calls.items():
        call()  # compiles and tunes
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        once = torch.tensor(time.perf_counter() - start)
        if world > 1:  # all processes must make the same number of calls
            dist.all_reduce(once, op=dist.ReduceOp.MAX)
        counts[name] = max(1, round(args.seconds_per / max(once.item(), 1e-9)))
    for _ in tqdm(
        range(args.repeats),
        desc=", ".join(calls),
        unit="round",
        leave=False,
        disable=bool(args.worker),
    ):
        for name, call in calls.items():
            call()  # warm-up
            synchronize(device)
            start = time.perf_counter()
            for _ in range(counts[name]):
                call()
            synchronize(device)
            seconds[name].append((time.perf_counter() - start) / counts[name])
    return {name: np.array(s) for name, s in seconds.items()}


def rows_of(section, seconds, images, reference, **columns):
    """Table rows: medians over the rounds with quartiles; `speed` is relative to `reference` in the same round."""
    rows = []
    for name, s in seconds.items():
        row = dict(section=section, name=name)
        for key, values in (("img_s", images[name] / s), ("speed", seconds[reference] / s)):
            low, row[key], high = np.percentile(values, [25, 50, 75])
            row |= {f"{key}_q25": low, f"{key}_q75": high}
        rows.append(row | dict(ms=1e3 * np.median(s)) | {k: v[name] for k, v in columns.items()})
    return rows


def flops_of(net, method, batch):
    """FLOPs of the passes of one step, 2 per multiply-add of a matrix product or convolution, backward included."""
    with FlopCounterMode(display=False) as counter:
        objective = OBJECTIVES[method][0]
        objective(net, NoiseSchedule().to(batch["x0"].device), settings(method), **batch)[
            0
        ].backward()
    net.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def ceiling(device, dtype):
    """FLOP/s of a large matrix product, the best of 30: what this device can give in this precision.

    Written also as a 1x1 convolution: on some CPUs PyTorch's library for convolutions is twice as fast as that for products.
    """
    n = 8192 if device.type == "cuda" else 1024
    a, best = torch.randn(n, n, device=device, dtype=dtype), float("inf")
    x = a.view(n // 32, 1, 32, n).permute(0, 3, 1, 2)  # channels_last
    for k in range(30):
        synchronize(device)
        start = time.perf_counter()
        a @ a if k % 2 else torch.nn.functional.conv2d(x, a[:, :, None, None])
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


# ---------------------------------------------------------------------------------------------------------------------
# the sections: each returns table rows


def new_net(args, device):
    torch.manual_seed(0)
    return UNet(**PRESETS[args.model]).to(device, memory_format=layout(device, args.amp))


def methods(args, device, draw):
    """none, ran, adv, ... on one network. cost: time relative to the first; peak_GB: on a CPU that of the process so far."""
    net, batch = new_net(args, device), draw(0)
    step = training(net, device, args.amp, args.backend)
    calls = {m: lambda m=m: step(m, batch) for m in args.methods}
    flops, peak = (
        {m: flops_of(net, m, {k: v[:1] for k, v in batch.items()}) for m in calls},
        {},
    )  # per image
    for m, call in calls.items():
        call()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        call()
        synchronize(device)
        peak[m] = memory(device)
    limit = ceiling(device, precision(device, args.amp))
    seconds = interleaved(calls, args, device)
    B = args.batch_size
    return rows_of(
        "methods",
        seconds,
        dict.fromkeys(calls, B),
        args.methods[0],
        cost={m: np.median(s / seconds[args.methods[0]]) for m, s in seconds.items()},
        GFLOP_img={m: f / 1e9 for m, f in flops.items()},
        utilisation={m: B * flops[m] / np.median(s) / limit for m, s in seconds.items()},
        peak_GB=peak,
    )


def modes(args, device, draw):
    """torch.compile, channels_last and bf16, singly and together, for the step of `none`."""
    batch, calls = draw(0), {}
    table = {
        "eager": (False, "fp32", None),
        "channels_last": (True, "fp32", None),
        "bf16": (False, "bf16", None),
        "channels_last, bf16": (True, "bf16", None),
    }
    if args.backend:
        table |= {
            "compile": (False, "fp32", args.backend),
            "all three": (True, "bf16", args.backend),
        }
    for name, (channels_last, amp, backend) in table.items():
        form = torch.channels_last if channels_last else torch.contiguous_format
        x0, t, eps, beta, u = batch
        mine = [x0.contiguous(memory_format=form), t, eps.contiguous(memory_format=form), beta, u]
        step = training(new_net(args, device).to(memory_format=form), device, amp, backend)
        calls[name] = lambda step=step, mine=mine: step("none", mine)
    return rows_of(
        "modes", interleaved(calls, args, device), dict.fromkeys(calls, args.batch_size), "eager"
    )


class Reference(torch.nn.Module):
    """diffusers' UNet2DModel of the preset's shape, google/ddpm-cifar10-32's config for `ddpm`."""

    def __init__(self, size, channels, attention, blocks, dropout):
        super().__init__()
        from diffusers import UNet2DModel

        self.net = UNet2DModel(
            sample_size=size,
            layers_per_block=blocks,
            block_out_channels=channels,
            dropout=dropout,
            down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attention],
            up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)],
            attention_head_dim=None,
            downsample_padding=0,
            norm_eps=1e-6,
            flip_sin_to_cos=False,
            freq_shift=1,
        )

    def forward(self, x, t):
        return self.net(x, t).sample


def against(args, device, draw):
    """The same step with diffusers' network, in both memory formats; the ratio is to its better one."""
    rows, x0 = [], draw(0)["x0"]
    for amp in ("fp32", "bf16") if args.amp == "auto" else (args.amp,):
        for backend in (None, args.backend) if args.backend else (None,):
            calls = {}
            for name, form in (
                ("ours", layout(device, amp)),
                ("diffusers", torch.contiguous_format),
                ("diffusers, channels_last", torch.channels_last),
            ):
                torch.manual_seed(0)
                net = (
                    new_net(args, device)
                    if name == "ours"
                    else Reference(args.image_size, **PRESETS[args.model])
                )
                step = training(net.to(device, memory_format=form), device, amp, backend)
                batch = {
                    k: v.contiguous(memory_format=form) if v.shape == x0.shape else v
                    for k, v in draw(0).items()
                }
                calls[f"{amp}{', compile' if backend else ''}: {name}"] = (
                    lambda step=step, batch=batch: step("none", batch)
                )
            seconds = interleaved(calls, args, device)
            better = min(list(calls)[1:], key=lambda name: np.median(seconds[name]))
            rows += rows_of("against", seconds, dict.fromkeys(calls, args.batch_size), better)
    return rows


def sampling(args, device, draw):
    """A few network calls of each sampler are timed; the numbers for whole samples are computed from them, not measured."""
    net = new_net(args, device).eval().cast(precision(device, args.amp))  # as sample.py
    schedule = NoiseSchedule().to(device)
    mode = "reduce-overhead" if device.type == "cuda" else None  # as sample.py
    model = torch.compile(net, mode=mode) if args.backend else net
    shape, B = draw(0)["x0"].shape[1:], args.batch_size
    timed, whole = (
        {"ddpm": 4, "ddim": 4, "heun": 2},
        {"ddpm": 1000, "ddim": 100, "heun": 18},
    )  # steps

    def call(sampler):
        with autocast(device, args.amp):
            generate(model, schedule, range(B), shape, 0, device, sampler, steps=timed[sampler])

    def network_calls(steps):
        return steps | dict(heun=2 * len(heun_timesteps(schedule, steps["heun"])) - 1)

    n, N = network_calls(timed), network_calls(whole)
    seconds = interleaved({s: lambda s=s: call(s) for s in timed}, args, device)
    seconds = {s: v / n[s] * N[s] for s, v in seconds.items()}
    return rows_of(
        "sampling (computed)",
        seconds,
        dict.fromkeys(timed, B),
        "ddpm",
        network_calls=N,
        timed_calls=n,
    )


def loader(args, device, draw):
    """Share of the step that goes into reading and corrupting the batch, drawing the random numbers, and logging."""
    step, batch, pending, done = (
        training(new_net(args, device), device, args.amp, args.backend),
        draw(0),
        [],
        0,
    )

    def real():
        nonlocal done
        pending.append(step("none", draw(done)))
        done += 1
        if done % 10 == 0:  # one host sync for many steps
            values = torch.stack([torch.stack(list(d.values())) for d in pending]).tolist()
            with (Path(args.out) / "loader.jsonl").open("a") as f:
                f.write(json.dumps(values) + "\n")
            pending.clear()

    seconds = interleaved(
        {"fixed batch": lambda: step("none", batch), "batch, draws, log": real}, args, device
    )
    (Path(args.out) / "loader.jsonl").unlink(missing_ok=True)
    share = {name: np.median(1 - seconds["fixed batch"] / s) for name, s in seconds.items()}
    return rows_of(
        "loader", seconds, dict.fromkeys(seconds, args.batch_size), "fixed batch", share=share
    )


def scaling(args, device, draw):
    """Weak scaling: this script under torchrun in 1, 2, 4, .. --processes, --batch-size each, gradients averaged."""
    seconds, images, n = {}, {}, 1
    while n <= args.processes:
        nodes = args.nodes if n % args.nodes == 0 else 1
        name = f"{n} process{'es' * (n > 1)}" + f", {nodes} nodes" * (nodes > 1)
        seconds[name], images[name] = torchrun(args, device, n, nodes), n * args.batch_size
        n = args.processes if n < args.processes < 2 * n else 2 * n
    first = next(iter(seconds))
    efficiency = {name: np.median(seconds[first]) / np.median(s) for name, s in seconds.items()}
    rows = rows_of("scaling", seconds, images, first, efficiency=efficiency)
    for row in rows:  # throughput, not time per step
        for key in ("speed", "speed_q25", "speed_q75"):
            row[key] *= images[row["name"]] / args.batch_size
    return rows


def torchrun(args, device, n, nodes):
    """Seconds per step in n processes; `nodes` agents on this machine meet over c10d as two machines would."""
    result, log, agents = Path(args.out) / "worker.json", Path(args.out) / "torchrun.log", []
    result.unlink(missing_ok=True)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nnodes={nodes}",
        f"--nproc-per-node={n // nodes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}",
        "--local-addr=127.0.0.1",
        "--",
        __file__,
        "--worker",
        result,
        "--compile" if args.backend else "--no-compile",
        "--device",
        device.type,
    ]
    for key in ("model", "image_size", "batch_size", "amp", "repeats", "seconds_per"):
        command += [f"--{key.replace('_', '-')}", getattr(args, key)]
    try:
        for node in range(nodes):
            env = os.environ | dict(OMP_NUM_THREADS=str(args.threads or 1))
            if device.type == "cuda":  # each agent has its own GPUs
                gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(
                    map(str, range(torch.cuda.device_count()))
                )
                env["CUDA_VISIBLE_DEVICES"] = ",".join(
                    gpus.split(",")[node * n // nodes : (node + 1) * n // nodes]
                )
            with log.open("a") as f:
                agents.append(
                    subprocess.Popen(list(map(str, command)), env=env, stdout=f, stderr=f)
                )
        failed = any(agent.wait() for agent in agents)
    finally:
        for agent in agents:
            agent.terminate()
    if failed or not result.exists():
        raise ValueError(f"--what scaling: {n} processes failed; see {log}")
    return np.array(json.loads(result.read_text()))


def worker(args):
    """One process of `scaling`."""
    device, rank, world = setup(args.device)
    step = training(new_net(args, device), device, args.amp, args.backend, world)
    batch = draws(dataset(args, device), args.batch_size, device, seed=rank)(0)
    (seconds,) = interleaved({"step": lambda: step("none", batch)}, args, device, world).values()
    if rank == 0:
        Path(args.worker).write_text(json.dumps(seconds.tolist()))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def profile(args, device, draw):
    """OUT/profile.txt: operators by their own time; prints the host syncs of a step (on a CPU, fused Adam's item() alone)."""
    step, n = training(new_net(args, device), device, args.amp, args.backend), 3
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] * (device.type == "cuda")
    with (Path(args.out) / "profile.txt").open("w") as f:
        for method in args.methods:
            for k in range(2):
                step(method, draw(k))
            synchronize(device)
            with torch.profiler.profile(activities=activities) as record:
                for k in range(n):
                    step(method, draw(k))
            events = record.key_averages()
            by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
            f.write(
                f"{method}, {n} steps of {args.batch_size}\n{events.table(sort_by=by, row_limit=30)}\n"
            )
            syncs = {
                key: sum(e.count for e in events if e.key == key) / n
                for key in ("cudaStreamSynchronize", "aten::item", "aten::_local_scalar_dense")
            }
            print(
                f"{method}: host syncs per step: "
                + ", ".join(f"{k} {v:g}" for k, v in syncs.items())
            )
    return []


def kernels(args, device, draw):
    """What a step launches on a GPU, read from Inductor's code for a pretended H200 (see kernels.py): nothing is run.

    triton: generated kernels; small: those that move less than 2 MB; copies: those that only cast or copy one parameter;
    library: products, convolutions and attentions; eager: operators outside the compiled graphs. GB are those of triton
    and eager. ms: if every kernel is bound by --bandwidth or --peak, and takes --shortest at least (ours).
    """
    import kernels as pretended  # private names of PyTorch: no other section should fail with them
    from kernels import CPU, CUDA

    amp, codes, rows = "bf16" if args.amp == "auto" else args.amp, {}, []

    def row(name, eager, calls):
        triton, library = [], []
        for key, call in [(pretended.key_of(*call), call) for call in calls]:
            if key not in codes:
                codes[key] = pretended.code_of(*call)
            for code in codes[key]:
                triton += [
                    k for k in pretended.triton_kernels(code.text) for _ in range(k.launches)
                ]
                library += pretended.externs(code)
        work = [(0, k.gb) for k in triton] + [(0, gb) for _, gb in eager] + library
        rows.append(
            dict(
                section="kernels",
                name=name,
                triton=len(triton),
                small=sum(k.gb < 2e-3 for k in triton),
                copies=sum(k.copies and k.size in sizes for k in triton),
                library=len(library),
                eager=len(eager),
                GB=sum(gb for flop, gb in work if not flop),
                GFLOP=sum(flop for flop, _ in work),
                ms=sum(
                    max(flop / args.peak, gb / args.bandwidth, 1e-3 * args.shortest)
                    for flop, gb in work
                ),
            )
        )

    with pretended.pretended_gpu() as mode, mode:
        B, S = args.batch_size, args.image_size
        net = pretended.fake_parameters(UNet(**PRESETS[args.model]), CPU)
        sizes = {p.numel() for p in net.parameters()}
        for method in args.methods:
            x0, eps, u = (torch.empty(B, S, S, 3).permute(0, 3, 1, 2) for _ in range(3))
            batch = dict(
                x0=x0, t=torch.zeros(B, dtype=torch.int64), eps=eps, beta=torch.ones(B), u=u
            )

            def make(method=method, batch=batch):
                step = training(net, CPU, amp, "inductor")
                return lambda: step(method, batch)

            row(f"{method}, B = {B}", *pretended.record(make, CPU))
        eval_net = (
            pretended.fake_parameters(UNet(**PRESETS[args.model]), CUDA)
            .eval()
            .requires_grad_(False)
        )
        eval_net.cast(precision(CUDA, amp))  # as sample.py

        def sample(steps):
            model, schedule = torch.compile(eval_net), NoiseSchedule().to(CUDA)
            index = torch.zeros(16, dtype=torch.int64, device=CUDA)

            def call():
                with autocast(CUDA, amp):
                    generate(model, schedule, index, (3, S, S), 0, CUDA, "ddpm", steps=steps)

            return call

        one, two = (pretended.record(lambda n=n: sample(n), CUDA) for n in (1, 2))
        row("sampling step, B = 16", *(b[len(a) :] for a, b in zip(one, two)))
    return rows


SECTIONS = dict(
    methods=methods,
    modes=modes,
    against=against,
    sampling=sampling,
    loader=loader,
    scaling=scaling,
    profile=profile,
    kernels=kernels,
)

# ---------------------------------------------------------------------------------------------------------------------


def dataset(args, device):
    """Procedural images, 90 % of them noisy; large enough for a batch."""
    images, labels = load_images(f"synthetic:{max(256, args.batch_size)}", args.image_size)
    return CorruptedImages(images, labels, 0.9, 0.2, 0, device)


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--what", nargs="+", choices=SECTIONS, help="default: methods modes sampling loader")
    add("--against", choices=["diffusers"], help="the same as --what against")
    add(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=["none", "ran", "adv", "inv-adv"],
        help="ratios are to the first",
    )
    add("--model", choices=PRESETS, default="ddpm")
    add("--image-size", type=int, metavar="S", help="default: 32, ddpm64 64")
    add("--batch-size", type=int, help="default: train.py's; of each process in scaling")
    add("--device", default="auto", help="auto | cpu | cuda | cuda:N")
    add(
        "--amp",
        choices=["auto", "bf16", "fp16", "fp32"],
        default="auto",
        help="modes has its own; against: both if auto",
    )
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default: on a GPU")
    add(
        "--threads",
        type=int,
        metavar="N",
        help="CPU threads; default torch's, in scaling 1 per process",
    )
    add("--repeats", type=int, default=5, help="rounds")
    add(
        "--seconds-per",
        type=float,
        default=2.0,
        metavar="SEC",
        help="length of one measurement, at least one step",
    )
    add(
        "--bandwidth",
        type=float,
        default=4.8,
        metavar="TB/s",
        help="kernels: of the memory; default: an H200's",
    )
    add(
        "--peak",
        type=float,
        default=989.0,
        metavar="TFLOP/s",
        help="kernels: in bf16; default: an H200's",
    )
    add(
        "--shortest",
        type=float,
        default=2.0,
        metavar="US",
        help="kernels: microseconds that any kernel takes",
    )
    add("--processes", type=int, help="scaling: up to so many; default: the GPUs, or the CPU cores")
    add(
        "--nodes",
        type=int,
        default=1,
        choices=[1, 2],
        help="scaling: 2 simulates two machines on this one",
    )
    add("--out", default="out_bench")
    add("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.what = args.what or ([] if args.against else ["methods", "modes", "sampling", "loader"])
    args.what = list(dict.fromkeys(args.what + ["against"] * bool(args.against)))
    for key, value in dict(
        image_size=64 if args.model == "ddpm64" else 32,
        batch_size=RECIPES[args.model]["batch_size"],
        processes=torch.cuda.device_count() or os.cpu_count(),
    ).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    for key in ("batch_size", "threads", "repeats", "processes"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            raise ValueError(f"--{key.replace('_', '-')} {getattr(args, key)}: must be at least 1")
    if not 0 < args.seconds_per < float("inf"):
        raise ValueError(f"--seconds-per {args.seconds_per}: must be > 0")
    with torch.device("meta"):
        factor = UNet(**PRESETS[args.model]).factor
    if args.image_size < 4 or args.image_size % factor:
        raise ValueError(
            f"--image-size {args.image_size}: --model {args.model} needs a multiple of {factor}, at least 4"
        )
    if len(set(args.methods)) < len(args.methods):
        raise ValueError(f"--methods {' '.join(args.methods)}: names one twice")
    if args.nodes > args.processes:
        raise ValueError(
            f"--nodes {args.nodes}: needs at least as many --processes, not {args.processes}"
        )
    on_gpu = args.device.startswith("cuda") or args.device == "auto" and torch.cuda.is_available()
    if on_gpu and "scaling" in args.what and args.processes > torch.cuda.device_count():
        raise ValueError(
            f"--processes {args.processes}: there are {torch.cuda.device_count()} GPUs here"
        )
    args.backend = "inductor" if args.compile or args.compile is None and on_gpu else None
    if "against" in args.what:
        if "patch" in PRESETS[args.model]:
            raise ValueError(
                f"--against diffusers: has no counterpart of --model {args.model}; choose another"
            )
        try:
            import diffusers  # noqa: F401
        except ImportError:
            raise ValueError("--against diffusers: takes `pip install diffusers`") from None
    return args


def main():
    args = parse_args()
    if args.worker:
        return worker(args)
    started = time.time()
    device, _, _ = setup(args.device)
    precision(device, args.amp)
    if args.threads:
        torch.set_num_threads(args.threads)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if device.type == "cpu" and args.model.startswith("ddpm"):
        print(
            "note: a step of this network takes seconds on a CPU; --model tiny --image-size 16 is quick"
        )
    draw, rows = draws(dataset(args, device), args.batch_size, device), []
    for name in args.what:
        rows += SECTIONS[name](args, device, draw)
        torch.compiler.reset()
    write_tables(rows, out)
    timed = [row for row in rows if "img_s" in row]
    if timed:
        plot(timed, out / "bench.png", args)
    runtime.write_metrics(
        out,
        started,
        seed=0,
        device=device,
        n=args.repeats,
        hardware=hardware(),
        rows=rows,
        diffusers=getattr(sys.modules.get("diffusers"), "__version__", None),
        args={k: v for k, v in vars(args).items() if k not in ("worker", "out")},
    )
    print((out / "table.md").read_text() + f"-> {out}/table.csv, {out}/bench.png")


def hardware():
    cpu = platform.processor()
    with contextlib.suppress(OSError, StopIteration):  # /proc is Linux's
        cpu = next(
            line.split(":")[1].strip()
            for line in open("/proc/cpuinfo")
            if line.startswith("model name")
        )
    return dict(
        cpu=cpu, cores=os.cpu_count(), threads=torch.get_num_threads(), cuda=torch.version.cuda
    )


def write_tables(rows, out):
    """table.csv holds all; table.md a table per section, quartiles in brackets."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with (out / "table.csv").open("w", newline="") as f:
        writer = csv.DictWriter(f, columns)
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )
    text = []
    for section in dict.fromkeys(row["section"] for row in rows):
        mine = [row for row in rows if row["section"] == section]
        keys = [k for k in mine[0] if not k.endswith(("_q25", "_q75", "section"))]
        text += ["| " + " | ".join([section, *keys[1:]]) + " |", "|---" * len(keys) + "|"]
        for row in mine:
            cells = [
                f"{row[k]:.3g} ({row[k + '_q25']:.3g} to {row[k + '_q75']:.3g})"
                if k + "_q25" in row
                else f"{row[k]:.4g}"
                if isinstance(row[k], float)
                else str(row[k])
                for k in keys
            ]
            text.append("| " + " | ".join(cells) + " |")
        text.append("")
    (out / "table.md").write_text("\n".join(text) + "\n" * bool(text))


def plot(rows, path, args):
    """Images per second and the ratio to the section's reference; bars are medians, whiskers quartiles."""
    sections = {
        s: [r for r in rows if r["section"] == s] for s in dict.fromkeys(r["section"] for r in rows)
    }
    heights = [len(mine) + 1.2 for mine in sections.values()]
    fig, axes = plt.subplots(
        len(sections),
        2,
        figsize=(9, 0.8 + 0.36 * sum(heights)),
        layout="constrained",
        squeeze=False,
        height_ratios=heights,
    )
    for pair, (section, mine) in zip(axes, sections.items()):
        names = [r["name"] for r in mine][::-1]
        for ax, key, colour, label in zip(
            pair, ("img_s", "speed"), ("#0072B2", "#D55E00"), ("images / s", "relative speed")
        ):
            low, mid, high = np.array(
                [[r[f"{key}_q25"], r[key], r[f"{key}_q75"]] for r in mine[::-1]]
            ).T
            ax.barh(
                names,
                mid,
                xerr=[mid - low, high - mid],
                color=colour,
                height=0.7,
                error_kw=dict(ecolor="black", lw=1),
            )
            ax.set_title(f"{section}: {label}", fontsize=9, loc="left")
            ax.tick_params(labelsize=8)
            ax.grid(axis="x", alpha=0.3)
        pair[1].axvline(1, color="black", lw=0.8, ls="--")
        pair[1].set_yticklabels([])
    fig.suptitle(
        f"{args.model}, {args.image_size}×{args.image_size}, batch {args.batch_size}: medians and quartiles of "
        f"{args.repeats} rounds",
        fontsize=10,
    )
    fig.savefig(path, dpi=110)
    plt.close(fig)


if __name__ == "__main__":
    runtime.cli(main)
