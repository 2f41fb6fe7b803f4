"""Two nodes, simulated by two torchrun agents on this machine that meet over c10d."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from cli import call

import train

ROOT = Path(__file__).resolve().parent.parent
SMALL = """--model tiny --image-size 8 --data synthetic:16 --batch-size 4 --iters 2 --warmup 0
    --lr 1e-4 --sample-every 0 --device cpu --amp fp32""".split()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def weights(out):
    ckpt = torch.load(out / "ckpt.pt", weights_only=True)
    return torch.cat([v.flatten() for v in ckpt["model"].values()])


def test_two_nodes_train_as_one_process(tmp_path):
    """To rounding: sums are taken in another order."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc-per-node=1",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{free_port()}",
        "--local-addr=127.0.0.1",
        "--",
        str(ROOT / "train.py"),
        *SMALL,
        "--out",
        str(tmp_path / "two"),
    ]
    env = os.environ | dict(OMP_NUM_THREADS="1")
    agents = [subprocess.Popen(command, env=env) for _ in range(2)]
    try:
        assert [agent.wait(timeout=300) for agent in agents] == [0, 0]
    finally:
        for agent in agents:
            agent.terminate()
    assert call(train, *SMALL, "--out", tmp_path / "one") == 0
    assert (weights(tmp_path / "two") - weights(tmp_path / "one")).abs().max() < 1e-6
