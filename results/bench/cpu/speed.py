"""CPU seconds of a training step, of the code in another folder and of this one, taking turns.

    git worktree add ../before 76eccf3
    python results/bench/cpu/speed.py ../before        # one thread; some minutes

A process each, as their modules share names; a round is some steps of one, then of the other. Times
are the processes' own, so that what else runs on the machine hardly matters.
"""

import itertools
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve()
CASES = {  # name: (model, image size, batch size, amp, steps in a round)
    "ddpm, B = 1, fp32": ("ddpm", 32, 1, "fp32", 3),
    "ddpm, B = 1, bf16": ("ddpm", 32, 1, "bf16", 3),
    "mini, B = 64, fp32": ("mini", 16, 64, "fp32", 6),
    "mini, B = 64, bf16": ("mini", 16, 64, "bf16", 6),
}
ROUNDS = 7


def worker(folder, name):
    """A line of CPU seconds per step for each line read."""
    sys.path.insert(0, folder)
    import torch

    import train
    from unet import PRESETS, UNet

    model, S, B, amp, n = CASES[name]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device("cpu")
    args = train.parse_args(["--amp", amp, "--warmup", "0"])
    last = torch.channels_last
    form = torch.contiguous_format if amp == "bf16" else last
    net = UNet(**PRESETS[model]).to(memory_format=form).train()
    run = train.prepare(net, args, device)
    x0, eps, u = (torch.randn(B, 3, S, S).contiguous(memory_format=last) for _ in range(3))
    batch = dict(x0=x0, t=torch.arange(B) * 15, eps=eps, beta=torch.ones(B), u=u)
    done = itertools.count()

    def step():
        if hasattr(train, "train_step"):
            keys = dict(keys=torch.arange(B)) if PRESETS[model]["dropout"] else {}
            train.train_step(run, args, next(done), [batch | keys])
        else:
            train.update(run, args, next(done), [list(batch.values())])

    step()
    for _ in sys.stdin:
        start = time.process_time()
        for _ in range(n):
            step()
        print((time.process_time() - start) / n, flush=True)


def compare(before, name):
    """-> seconds (rounds, 2), before and after."""
    workers = []
    for folder in (before, HERE.parents[3]):
        command = [sys.executable, HERE, "--worker", folder, name]
        pipe = subprocess.PIPE
        workers.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True))
    seconds = np.zeros((ROUNDS + 1, 2))
    for i, j in itertools.product(range(ROUNDS + 1), range(2)):
        workers[j].stdin.write("go\n")
        workers[j].stdin.flush()
        seconds[i, j] = float(workers[j].stdout.readline())
    for process in workers:
        process.stdin.close()
        process.wait()
    return seconds[1:]


if sys.argv[1] == "--worker":
    worker(sys.argv[2], sys.argv[3])
else:
    print("| step of `none` | before, s | after, s | after / before |\n|---|---|---|---|")
    for name in CASES:
        seconds = compare(sys.argv[1], name)
        before, after = np.median(seconds, axis=0)
        low, ratio, high = np.percentile(seconds[:, 1] / seconds[:, 0], [25, 50, 75])
        print(f"| {name} | {before:.3f} | {after:.3f} | {ratio:.3f} ({low:.3f} to {high:.3f}) |")
