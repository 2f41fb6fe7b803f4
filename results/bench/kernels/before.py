"""The table of `bench.py --what kernels` for the code before the work on CUDA.

    git worktree add ../before 76eccf3
    python results/bench/kernels/before.py ../before --batch-size 128

Network, training step and samplers are those of that folder; how they are counted is this one's.
"""

import itertools
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [sys.argv[1]]
sys.path.append(str(ROOT))

import losses  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from unet import UNet  # noqa: E402

for name in ("runtime", "samplers"):  # they were not there yet
    sys.modules[name] = ModuleType(name)
sys.modules["runtime"].precision = sample.precision
sys.modules["runtime"].autocast = sample.autocast
sys.modules["samplers"].SAMPLERS = ("ddpm", "ddim")  # Heun read values from the GPU


def cast(net, dtype):
    return net


losses.NoiseSchedule.sigmas = []
UNet.mask_keys = None
UNet.cast = cast

import kernels  # noqa: E402


def make_step(net, device, amp, backend):
    flags = "--amp", amp, "--warmup", "0"
    args = {name: train.parse_args(["--robust", name, *flags]) for name in ("none", "adv")}
    run = train.prepare(net.train(), args["none"], device, 1, backend)
    done = itertools.count()

    def step(method, batch):
        part = [batch[name] for name in ("x0", "t", "eps", "beta", "u")]
        return train.update(run, args[method], next(done), [part])

    return step


B = int(sys.argv[sys.argv.index("--batch-size") + 1])
args = SimpleNamespace(
    amp="bf16",
    batch_size=B,
    image_size=32,
    model="ddpm",
    methods=["none", "adv"],
    peak=989.0,
    bandwidth=4.8,
)
for row in kernels.rows(args, make_step):
    print("| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
