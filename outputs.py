"""A script's output: a folder with one owner at a time, streams that nobody may be reading,
records, tables, samples, the colours of figures."""

import contextlib
import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.utils import save_image

os.environ["MPLBACKEND"] = "Agg"  # before the import: a notebook's may not be installed here
import matplotlib  # noqa: E402, F401, part of this file's interface
import matplotlib.pyplot as plt  # noqa: E402, F401


class Failed(Exception):
    """Work that failed for no fault of the input: its message is the line to show, exit code 1."""


def reason(e):
    """The first line of what an exception says."""
    return (str(e).strip().splitlines() or [type(e).__name__])[0]


LOCKS = {}  # of this process: folder -> the open file that holds the lock


def claim(out, overwrite=False):
    """Make the folder OUT this script's own until it ends -> its Path.

    Raises ValueError for a folder that another script wrote or that holds files of another origin,
    unless overwrite, and for one that a running process writes.
    """
    out = Path(out)
    me = os.path.basename(sys.argv[0])
    if out.resolve() in LOCKS:
        return out
    if not overwrite:
        refuse_foreign(out, me)
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / ".owner", "a+")
    except OSError as e:
        raise ValueError(f"--out {out}: cannot be written to ({e.strerror})") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # other errors: a file system without locks
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise ValueError(f"--out {out}: {holder} is writing there; choose another --out") from None
    except OSError:
        pass
    file.truncate(0)
    file.write(f"{me} (process {os.getpid()})\n")
    file.flush()
    LOCKS[out.resolve()] = file
    return out


def refuse_foreign(out, me):
    """Raises ValueError for a folder where the script `me` would write over what is not its own."""
    owner = owner_of(out)
    if owner not in (None, me):
        raise ValueError(f"--out {out}: holds the output of {owner}; choose another --out")
    if owner is None and out.is_dir() and any(path.is_file() for path in out.iterdir()):
        raise ValueError(f"--out {out}: holds files of another origin; choose another --out")


def owner_of(out):
    """The script that wrote the folder, or None."""
    with contextlib.suppress(OSError, IndexError):
        return (out / ".owner").read_text().split()[0]


def release():
    """Give all folders back, as the end of the process does."""
    while LOCKS:
        LOCKS.popitem()[1].close()


class Unread:
    """A stream whose reader may go away, as `| head` does: what is written then is dropped."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")
        if hasattr(self.stream, "reconfigure"):  # é in a terminal of ASCII
            self.attempt("reconfigure", errors="backslashreplace")

    def write(self, text):
        self.attempt("write", text)
        return len(text)

    def flush(self):
        self.attempt("flush")

    def attempt(self, action, *text, **options):
        try:
            getattr(self.stream, action)(*text, **options)
        except UnicodeEncodeError:  # of a stream that cannot be reconfigured
            self.attempt(action, *(t.encode("ascii", "backslashreplace").decode() for t in text))
        except (OSError, ValueError):  # a closed pipe, a full disk; ValueError: a closed file
            with contextlib.suppress(OSError, ValueError):  # or Python complains at its end
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            self.stream = open(os.devnull, "w")

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextlib.contextmanager
def unread_streams():
    """Output that nobody reads does not stop the work."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Unread(streams[0]), Unread(streams[1])
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = streams


# --------------------------------------------------------------------------------------------------
# records and tables


def write_metrics(out, started, *, seed, device, n, **numbers):
    """OUT/metrics.json: command, commit, seed, versions, device, n, wall time and the numbers.

    started: time.time() at the start.
    """
    device = torch.device(device)
    name = f"cpu ({torch.get_num_threads()} threads)"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    versions = dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__)
    record = dict(
        command=" ".join(["python", os.path.basename(sys.argv[0]), *sys.argv[1:]]),
        commit=commit(),
        seed=seed,
        n=n,
        wall_seconds=round(time.time() - started, 1),
        versions=versions,
        device=name,
        **numbers,
    )
    path = Path(out) / "metrics.json"
    tmp = path.with_suffix(".tmp")
    tmp.write_text(json.dumps(record, indent=2, default=float) + "\n")
    os.replace(tmp, path)
    return record


def commit():
    """Of this repository, as git describes it."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        git = subprocess.run(command, capture_output=True, text=True)
    except OSError:  # no git on this machine
        return "unknown"
    return git.stdout.strip() or "unknown"


def read_json(path):
    """The object in a .json file; ValueError, which names the file, where there is none."""
    try:
        content = json.loads(Path(path).read_text())
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not a whole JSON file ({reason(e)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no object, but a {type(content).__name__}")
    return content


def read_arrays(path, *names):
    """These arrays of an .npz file; ValueError, which names the file, for a damaged one."""
    try:
        with zipfile.ZipFile(path) as archive:  # numpy does not compare all checksums
            if archive.testzip():
                raise EOFError("damaged")
        with np.load(path) as f:
            return [f[name] for name in names]
    except Exception as e:  # each part of the file has its own ways to be damaged
        raise ValueError(f"{path}: no .npz with {', '.join(names)} ({reason(e)})") from None


def read_cache(path, *names):
    """As read_arrays; None where there is no such file, or a damaged one, which is announced."""
    if not Path(path).exists():
        return None
    try:
        return read_arrays(path, *names)
    except ValueError as e:
        print(f"{e}; computed anew")


def write_cache(path, **arrays):
    """An .npz file for read_cache; at every moment the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_suffix(f".{os.getpid()}.tmp.npz")
    np.savez(tmp, **arrays)
    os.replace(tmp, path)


def write_table(path, rows):
    """A .csv file of rows, dicts; of a column that a row lacks, nothing."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [",".join(columns)]
    for row in rows:
        lines.append(",".join(cell(row.get(name, "")) for name in columns))
    Path(path).write_text("\n".join(lines) + "\n")


def cell(value):
    """4 digits of a number, an interval (tuple) as low..high, the length of a list."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, tuple):
        return "..".join(f"{end:.4f}" for end in value)
    if isinstance(value, list):
        return str(len(value))
    return str(value)


# --------------------------------------------------------------------------------------------------
# samples


def save_grid(x, path):
    """The first 64 of x (n, 3, S, S) in [-1, 1] as a PNG, small images enlarged to be seen."""
    scale = max(1, 64 // x.shape[-1])
    x = (x[:64].clamp(-1, 1) + 1) / 2
    save_image(x.repeat_interleave(scale, 2).repeat_interleave(scale, 3), path, nrow=8)


def save_sample(images, x, out, png):
    """OUT/samples.npz, grid.png and, if png, images/*.png of a sample.

    images (n, S, S, 3) uint8; x: the same as (n, 3, S, S) in [-1, 1]. Written beside the old ones
    and then moved over them, so that a full disk costs no earlier sample. Of OUT/images only what
    an earlier call wrote is removed.
    """
    folder = out / "images"
    new = out / "images.new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    if png:
        for i, image in enumerate(images):
            Image.fromarray(image).save(new / f"{i:06d}.png", compress_level=1)
    with open(new / "samples.npz", "wb") as f:
        np.savez_compressed(f, images=images)
    save_grid(x, new / "grid.png")

    folder.mkdir(exist_ok=True)
    count = folder / ".count"  # how many of the images there are a sample's, at most
    earlier = int(count.read_text()) if count.exists() else 0
    count.write_text(str(max(earlier, len(images))))
    for i in range(earlier):
        (folder / f"{i:06d}.png").unlink(missing_ok=True)
    for i in range(len(images) if png else 0):
        os.replace(new / f"{i:06d}.png", folder / f"{i:06d}.png")
    count.write_text(str(len(images) if png else 0))
    for name in ("samples.npz", "grid.png"):
        os.replace(new / name, out / name)
    new.rmdir()


# --------------------------------------------------------------------------------------------------
# figures: the colour (Okabe and Ito's) and the label of a method, everywhere

COLOURS = ["#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
METHOD_STYLE = {
    "none": ("#000000", "DDPM"),
    "ran": ("#E69F00", "Robust_ran"),
    "adv": ("#D55E00", "Robust_adv"),
    "inv-ran": ("#56B4E9", "invariance, random"),
    "inv-adv": ("#0072B2", "invariance"),
    "ambient": ("#009E73", "ambient"),
    "huber": ("#CC79A7", "Huber"),
    "drop": ("#999999", "drop-noisy"),
    "addt": ("#882255", "ADDT"),
}


def method_of(trained):
    """The name in METHOD_STYLE of what a checkpoint's settings trained; None where it has none."""
    method = trained.get("robust")
    if not trained.get("drop_noisy"):
        return method
    return "drop" if method == "none" else None


def styles(methods):
    """{name of a checkpoint: `method_of` it} -> {name: (colour, label)}.

    METHOD_STYLE's where every checkpoint has its own method, else colours in turn and the names.
    """
    if len(set(methods.values())) == len(methods) and set(methods.values()) <= set(METHOD_STYLE):
        return {name: METHOD_STYLE[method] for name, method in methods.items()}
    return {name: (COLOURS[i % len(COLOURS)], name) for i, name in enumerate(methods)}
