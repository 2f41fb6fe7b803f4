"""A script's output: a folder with one owner at a time, streams that nobody may be reading, tables,
the colours of figures."""

import contextlib
import json
import os
import sys
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows, where two runs in one folder go unnoticed
    fcntl = None


class Failed(Exception):
    """Work that failed for no fault of the input: its message is the line to show, its exit code 1."""


LOCKS = {}  # of this process: folder -> the open file that holds the lock


def claim(out, overwrite=False):
    """Make the folder OUT this script's own until it ends -> its Path.

    Raises ValueError for a folder that another script wrote, unless overwrite, and for one that a
    running process writes.
    """
    out = Path(out)
    me = os.path.basename(sys.argv[0])
    if out.resolve() in LOCKS:
        return out
    owner = owner_of(out)
    if owner not in (None, me) and not overwrite:
        raise ValueError(f"--out {out}: holds the output of {owner}; choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / ".owner", "a+")
    except OSError as e:
        raise ValueError(f"--out {out}: cannot be written to ({e.strerror})") from None
    try:
        if fcntl:
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


def owner_of(out):
    """The script that wrote the folder, or None."""
    with contextlib.suppress(OSError, IndexError):
        return (out / ".owner").read_text().split()[0]
    # from before there were owners
    with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
        return json.loads((out / "metrics.json").read_text())["command"].split()[1]
    return None


def release():
    """Give all folders back, as the end of the process does."""
    while LOCKS:
        LOCKS.popitem()[1].close()


class Unread:
    """A stream whose reader may go away, as `| head` does: what is written then is dropped."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")

    def write(self, text):
        try:
            return self.stream.write(text)
        except UnicodeEncodeError:
            coding = self.stream.encoding
            return self.stream.write(text.encode(coding, "replace").decode(coding))
        except (BrokenPipeError, ValueError):  # ValueError: a closed file
            self.drop()
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except (BrokenPipeError, ValueError):
            self.drop()

    def drop(self):
        with contextlib.suppress(OSError, ValueError):  # or Python complains once more at its end
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
    "drop": ("#0072B2", "drop-noisy"),
    "addt": ("#56B4E9", "ADDT"),
}


def styles(methods):
    """{name of a checkpoint: its --robust or None} -> {name: (colour, label)}.

    METHOD_STYLE's where every checkpoint has its own method, else colours in turn and the names.
    """
    if len(set(methods.values())) == len(methods) and set(methods.values()) <= set(METHOD_STYLE):
        return {name: METHOD_STYLE[method] for name, method in methods.items()}
    return {name: (COLOURS[i % len(COLOURS)], name) for i, name in enumerate(methods)}
