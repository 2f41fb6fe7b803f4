"""A script's command line, run in this process."""

import sys

import runtime


def call(script, *args):
    """script.main() with these arguments -> exit code."""
    old, sys.argv = sys.argv, [f"{script.__name__}.py", *map(str, args)]
    try:
        runtime.cli(script.main)
    except SystemExit as e:
        return e.code
    finally:
        sys.argv = old
    return 0
