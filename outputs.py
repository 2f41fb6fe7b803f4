"""A script's output: a folder with one owner at a time, and streams that nobody may be reading."""

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
    out.mkdir(parents=True, exist_ok=True)
    if out.resolve() in LOCKS:
        return out
    owner = owner_of(out)
    if owner not in (None, me) and not overwrite:
        raise ValueError(f"--out {out}: holds the output of {owner}; choose another --out")
    file = open(out / ".owner", "a+")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise ValueError(f"--out {out}: {holder} is writing there; choose another --out") from None
    file.truncate(0)
    file.write(f"{me} (process {os.getpid()})\n")
    file.flush()
    LOCKS[out.resolve()] = file
    return out


def owner_of(out):
    """The script that wrote the folder, or None."""
    with contextlib.suppress(OSError, IndexError):
        return (out / ".owner").read_text().split()[0]
    with contextlib.suppress(
        OSError, ValueError, KeyError, IndexError
    ):  # from before there were owners
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
        except (OSError, ValueError):  # a broken pipe, a closed file
            self.drop()
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except (OSError, ValueError):
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
