"""What every script needs and none explains: flags with a range, an orderly stop, a log, averaging over processes."""

import argparse
import contextlib
import json
import math
import os
import resource
import signal
import sys
import time

import torch
import torch.distributed as dist


def between(low, high=math.inf, kind=float, above=False, below=False):
    """A type for argparse: a finite number in [low, high]; above, below: the end itself is left out."""
    left, right = "(" if above else "[", ")" if below or high == math.inf else "]"

    def parse(text):
        value = kind(text)
        if not (low <= value <= high and abs(value) < math.inf):
            raise argparse.ArgumentTypeError(f"{text}: must lie in {left}{low}, {high}{right}")
        if (above and value == low) or (below and value == high):
            raise argparse.ArgumentTypeError(f"{text}: must lie in {left}{low}, {high}{right}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number
    return parse


def given_flags(parser, argv=None):
    """The names of the flags that the user typed."""
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_args(argv)))


class Interrupt:
    """`asked(step)` after SIGTERM or Ctrl-C; a second Ctrl-C ends the program at once."""

    def __init__(self, world=1):
        self.world = world
        self.signal = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number, frame):
        self.signal = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # torchrun repeats SIGTERM by itself

    def asked(self, step):
        if self.world == 1:
            return self.signal > 0
        if step % 10:  # the processes agree every few steps
            return False
        flag = torch.tensor(float(self.signal > 0))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)


class Log:
    """Scalars of every step, kept on the device; `flush` fetches them at once, checks them and writes their means as a line.

    path: a .jsonl file, written on process 0; lines after `first`, of an interrupted run, are dropped.
    """

    def __init__(self, path, first, batch_size, device, rank=0, world=1, may_skip=False):
        self.path, self.batch_size, self.device = path, batch_size, device
        self.rank, self.world, self.may_skip = rank, world, may_skip
        self.pending = []
        self.start = time.time()
        if rank == 0:
            kept = [line for line in read_log(path) if line["step"] <= first]
            tmp = path.with_suffix(".tmp")
            tmp.write_text("".join(json.dumps(line) + "\n" for line in kept))
            os.replace(tmp, path)

    def add(self, scalars):
        """scalars: {name: 0-dim tensor}, the same names until the next flush."""
        self.pending.append(scalars)

    def flush(self, step, advice, **more):
        """One host sync for many steps -> the line. Exits with `advice` where a loss or gradient is not finite."""
        if not self.pending:
            return {}
        names = list(self.pending[0])
        rows = [torch.stack([scalars[name].float() for name in names]) for scalars in self.pending]
        values = torch.stack(rows)  # (steps, names)
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world
        values = values.cpu()
        if self.may_skip:  # fp16: the scaler skips steps whose gradients overflow
            overflow = ~values[:, names.index("grad_norm")].isfinite()
            values[overflow, names.index("grad_norm")] = 0
        good = values.isfinite().all(1).tolist()
        if not all(good):
            first_bad = step - len(self.pending) + good.index(False) + 1
            name = os.path.basename(sys.argv[0])
            sys.exit(f"{name}: the loss or gradient of step {first_bad} is not finite; {advice}")
        line = dict(step=step, **dict(zip(names, values.mean(0).tolist())))
        line["img_per_s"] = (
            len(self.pending) * self.batch_size / max(time.time() - self.start, 1e-9)
        )
        line["memory_gb"] = memory(self.device)
        line |= more
        self.pending.clear()
        if self.rank == 0:
            with self.path.open("a") as f:
                f.write(json.dumps(line) + "\n")
        return line

    def restart_clock(self):
        """So that img_per_s leaves out what was done besides training."""
        self.start = time.time()


def read_log(path):
    """The lines of a .jsonl file; one that a kill or a full disk cut short is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def memory(device):
    """Peak memory in GB: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def average(grads, world):
    """Gradients averaged over the processes. Not DDP: it expects one forward per backward."""
    flat = torch.cat([g.flatten() for g in grads])
    if flat.is_cuda:  # NCCL divides on the way; gloo cannot
        dist.all_reduce(flat, op=dist.ReduceOp.AVG)
    else:
        dist.all_reduce(flat)
        flat /= world
    parts = flat.split([g.numel() for g in grads])
    torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(parts, grads)])


def fast_bf16():
    """Whether this CPU computes in bf16 faster than in float32: AVX-512 BF16 or AMX."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "amx_tile"))
