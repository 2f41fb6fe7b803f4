"""The README's commands exist, and no script writes over what another wrote."""

import re
import shlex
from pathlib import Path

import pytest
from cli import call

import outputs
import sample
import train

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = re.findall(r"python (\w+\.py)([^`\n|]*)", (ROOT / "README.md").read_text())


def shared_flags():
    """What add_arguments gives to the scripts that sample."""
    return (ROOT / "sample.py").read_text() + (ROOT / "runner.py").read_text()


@pytest.mark.parametrize("script, flags", sorted(set(COMMANDS)))
def test_commands_of_the_readme_exist(script, flags):
    source = (ROOT / script).read_text() + shared_flags()
    for flag in shlex.split(flags, comments=True):
        if flag.startswith("--"):
            assert f'"{flag}"' in source, (script, flag)


def test_a_sample_does_not_fall_on_a_training(tmp_path, capsys):
    """`sample.py --ckpt ddpm/ckpt.pt --out ddpm`: metrics.json and grid.png would be those of the sample."""
    flags = "--model tiny --image-size 8 --data synthetic:16 --batch-size 8 --device cpu --iters 1"
    run = tmp_path / "ddpm"
    assert call(train, *flags.split(), "--out", run) == 0
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    small = ["--n", 2, "--steps", 2, "--device", "cpu", "--ckpt", run]
    assert call(sample, *small, "--out", run) == 2
    assert "holds the output of train.py" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert call(sample, *small, "--out", run / "ddim", "--sampler", "ddim") == 0
    assert outputs.owner_of(run) == "train.py" and outputs.owner_of(run / "ddim") == "sample.py"
