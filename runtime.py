"""What every script needs and none explains: device and precision, flags, an orderly stop, logs,
checkpoints, records.
"""

import argparse
import contextlib
import datetime
import errno
import json
import math
import os
import pickle
import re
import resource
import signal
import sys
import time
import zipfile

import torch
import torch.distributed as dist

import outputs
from outputs import reason

# --------------------------------------------------------------------------------------------------
# device, precision, layout


def setup(device, parallel=False, compiled=None):
    """--device auto | cpu | cuda | cuda:N -> (device, rank, world); joins torchrun's process group.

    parallel: whether the script divides its work; one that does not is refused under torchrun.
    compiled: --compile; with False nothing is, the noise and the samplers' steps included.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d\d?)?", device):
        raise ValueError(f"--device {device}: need auto, cpu, cuda or cuda:N")
    device = torch.device(device)
    rank = env_int("RANK", 0)
    world = env_int("WORLD_SIZE", 1)
    env_int("LOCAL_RANK", 0)  # refused here if it is no number
    if rank >= world:
        raise ValueError(f"RANK={rank} WORLD_SIZE={world}: in the environment, but not of torchrun")
    if world > 1 and not parallel:
        raise ValueError("torchrun: this script runs in one process; start it with python")
    if device.index is not None and world > 1:
        raise ValueError(f"--device {device}: torchrun gives each process its GPU, write cuda")
    if device.type == "cuda":
        device = pick_gpu(device)
    if compiled is False:
        torch.compiler.set_stance("force_eager")
    if world > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        long = datetime.timedelta(hours=12)  # one may decode a large set while the others wait
        dist.init_process_group(backend, timeout=long)
    return device, rank, world


def env_int(name, default):
    """A whole number of the environment, else the default."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ValueError(f"{name}={text}: in the environment, but no whole number")
    return int(text)


def pick_gpu(device):
    if not torch.cuda.is_available():
        raise ValueError(f"--device {device}: no CUDA GPU here; use --device cpu")
    if device.index is None:
        device = torch.device("cuda", env_int("LOCAL_RANK", 0))
    if device.index >= torch.cuda.device_count():
        raise ValueError(f"--device {device}: there are {torch.cuda.device_count()} GPUs here")
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")  # TF32 where float32 is left
    return device


def precision(device, amp):
    """--amp auto | bf16 | fp16 | fp32 -> dtype of the autocast."""
    name = amp_name(device, amp)
    return dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)[name]


def amp_name(device, amp):
    """auto: bf16 where the device computes faster in it; else fp16 on a GPU, fp32 on a CPU."""
    if amp == "fp16" and device.type == "cpu":
        raise ValueError("--amp fp16: needs a GPU; use bf16 or fp32")
    if amp == "auto" and device.type == "cpu":
        amp = "bf16" if fast_bf16() else "fp32"
    if amp == "auto":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return amp


def fast_bf16():
    """Whether this CPU computes in bf16 faster than in float32: AVX-512 BF16 or AMX."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "amx_tile"))


def layout(device, amp):
    """channels_last; contiguous for bf16 on a CPU, where norms slow channels_last 1.7 times."""
    device = torch.device(device)
    slow = device.type == "cpu" and precision(device, amp) == torch.bfloat16
    return torch.contiguous_format if slow else torch.channels_last


def autocast(device, amp):
    dtype = precision(device, amp)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


@contextlib.contextmanager
def machine_by_one(world):
    """One process of each machine runs the body first, to decode images; then the others."""
    first = env_int("LOCAL_RANK", 0) == 0
    if world > 1 and not first:
        dist.barrier()
    yield
    if world > 1 and first:
        dist.barrier()


def leave(world):
    """The processes wait for each other, then part."""
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


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


def memory(device):
    """Peak memory in GB: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


# --------------------------------------------------------------------------------------------------
# the command line


def parser(doc, **options):
    """An argparse parser with the script's docstring as its help."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=doc, formatter_class=raw, **options)


def cli(main):
    """Run main() -> exit codes: 2 for bad input, 1 for failed work, 128 + n for signal n.

    Each ends in one line on stderr; TRACEBACK=1 in the environment shows where it came from.
    """
    argparse.ArgumentParser.error = refuse
    with outputs.unread_streams():
        try:
            main()
        except (Exception, KeyboardInterrupt) as e:
            if os.environ.get("TRACEBACK"):
                raise
            print(f"{os.path.basename(sys.argv[0])}: {one_line(e)}", file=sys.stderr)
            sys.exit(exit_code(e))
        finally:
            outputs.release()


def exit_code(e):
    if isinstance(e, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        return 1
    return 2 if isinstance(e, (ValueError, OSError)) else 1


def one_line(e):
    if isinstance(e, KeyboardInterrupt):
        return "interrupted"
    if isinstance(e, (ValueError, OSError, outputs.Failed)):
        return reason(e)
    return f"failed ({type(e).__name__}: {reason(e)}); TRACEBACK=1 shows where"


def refuse(parser, message):
    """argparse's error in one line; it would print its usage, of up to 20 lines, first."""
    message = re.sub(r"^argument (\S+): (?=\S+: )", r"\1 ", message)  # --p 1.5: must lie in ..
    parser.exit(2, f"{parser.prog}: {message}; see --help\n")


def between(low, high=None, kind=float, above=False, below=False):
    """A type for argparse: a finite number in [low, high]; above, below: without the end itself.

    high: by default none for a float, a million for a count, above which it is a slip.
    """
    if high is None:
        high = math.inf if kind is float else 10**6
    left, right = "(" if above else "[", ")" if below or high == math.inf else "]"

    def parse(text):
        value = kind(text)
        at_open_end = (above and value == low) or (below and value == high)
        if at_open_end or not (low <= value <= high and abs(value) < math.inf):
            raise argparse.ArgumentTypeError(f"{text}: must lie in {left}{low}, {high}{right}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number
    return parse


SEED = between(0, 2**32 - 1, kind=int)  # draws are numbered above its 32 bits


def flag(name):
    """reg_last -> --reg-last"""
    return "--" + name.lower().replace("_", "-")


def refuse_repeats(args, *names):
    """A value given twice would be one row of a table, or two of one name."""
    for name in names:
        values = getattr(args, name)
        twice = max(values, key=values.count)
        if values.count(twice) > 1:
            raise ValueError(f"{flag(name)}: {twice} is given twice")


def idle_flags(parser, argv=None):
    """-> idle(where, names, how), which refuses the names (apart by blanks) that the user typed, if
    `where`; `how` ends the message."""
    given = given_flags(parser, argv)

    def idle(where, names, how):
        found = sorted(given & set(names.split()))
        if where and found:
            raise ValueError(f"{flag(found[0])}: has no effect {how}")

    return idle


def given_flags(parser, argv=None):
    """The names of the flags that the user typed; the parser's defaults are gone afterwards."""
    parser._defaults.clear()  # of set_defaults
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_args(argv)))


class Interrupt:
    """`asked(step)` after SIGTERM, SIGHUP or Ctrl-C; a second Ctrl-C ends the program at once."""

    def __init__(self, world=1):
        self.world = world
        self.signal = 0
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup, or a shell's background job
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


# --------------------------------------------------------------------------------------------------
# the log of a training


class Log:
    """Scalars of every step, kept on the device; `flush` fetches them at once, checks them and
    writes their means as a line.

    path: a .jsonl file, written on process 0; lines after `first`, of an interrupted run, are
    dropped.
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

    def flush(self, step, advice, more=dict):
        """One host sync for many steps -> the line, with what more() adds. Raises Failed with
        `advice` where a loss or gradient is not finite."""
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
            what = f"the loss or gradient of step {first_bad}"
            raise outputs.Failed(f"{what} is not finite; {advice}")
        line = dict(step=step, **dict(zip(names, values.mean(0).tolist())))
        seconds = max(time.time() - self.start, 1e-9)
        line["img_per_s"] = len(self.pending) * self.batch_size / seconds
        line["memory_gb"] = memory(self.device)
        line |= more()  # after the clock is read
        self.pending.clear()
        self.restart_clock()
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


# --------------------------------------------------------------------------------------------------
# files


def save_checkpoint(path, ckpt):
    """Write tensors and plain values; `path` is at every moment the old or the new file."""
    tmp = f"{path}.tmp"
    try:
        with open(tmp, "wb") as f:
            torch.save(ckpt, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except (OSError, RuntimeError) as e:
        if os.path.exists(tmp):
            os.remove(tmp)
        if isinstance(e.__context__, OSError):  # torch hides a full disk behind its own error
            e = e.__context__
        raise outputs.Failed(
            f"{path}: could not save the checkpoint ({reason(e)}); the previous one is intact"
        ) from None


def load_checkpoint(path):
    """The dict in a checkpoint, on the CPU. Raises ValueError for what is missing, truncated or
    would execute code."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such checkpoint file")
    try:
        if zipfile.is_zipfile(path):  # torch does not compare the checksums
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():
                    raise EOFError("damaged")
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        why = "not a file of tensors and plain values (it may execute code)"
        raise ValueError(f"{path}: refused, {why}") from None
    except Exception as e:  # each part of the file has its own ways to be damaged
        raise ValueError(f"{path}: truncated or not a checkpoint ({reason(e)})") from None
    if not isinstance(ckpt, dict):
        raise ValueError(f"{path}: not a checkpoint (holds a {type(ckpt).__name__}, not a dict)")
    return ckpt
