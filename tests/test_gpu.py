"""On a GPU: what runs compiled there gives what runs plainly on a CPU.

Collected only where there is a GPU (conftest.py). TEST_DEVICE=cpu in the environment puts the
compiled CPU in its place, which takes half an hour; with TORCHDYNAMO_DISABLE=1 as well, 3 minutes.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import runtime
import train
from classifier import WideResNet
from losses import NoiseSchedule
from rng import seed_at
from runtime import save_checkpoint
from unet import UNet

DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cuda"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="no GPU is here"
    ),
]
ROOT = Path(__file__).parent.parent
SHAPE = dict(channels=(32, 64), attention=(False, True), blocks=1, dropout=0.1)
METHODS = {
    "none": "--robust none",
    "ran": "--robust ran --paper",
    "adv": "--robust adv --paper",
    "late": "--robust adv --reg-last 1",
}


def network():
    torch.manual_seed(0)
    net = UNet(**SHAPE)
    torch.nn.init.normal_(net.conv_out.weight, std=0.02)  # zero would hide the attack
    return net


def batches(n, B=8, S=16):
    """n batches of all that a step reads, drawn on the CPU."""
    generator = torch.Generator()
    found = []
    for step in range(n):
        drawn = train.draw_numbers(generator, 0, step, NoiseSchedule().T, B, S)
        del drawn["flip"]
        drawn["x0"] = torch.rand(B, S, S, 3, generator=generator).permute(0, 3, 1, 2) * 2 - 1
        drawn["keys"] = torch.tensor([seed_at(0, step, stream=i) % 2**31 for i in range(B)])
        found.append(drawn)
    return found


@pytest.fixture(autouse=True)
def as_a_script():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    torch._dynamo.reset()
    runtime.setup(str(DEVICE))
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.benchmark = before[1]


def prepare(device, flags, backend):
    """As train.py; fp16 begins at a scale at which no step is left out."""
    args = train.parse_args(f"{flags} --warmup 0 --lr 1e-3".split())
    net = network().to(device, memory_format=runtime.layout(device, args.amp)).train()
    state = train.prepare(net, args, device, 1, backend)
    if state.scaler.is_enabled():
        state.scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    return state, args


def losses_of(device, method, amp, backend, n=4):
    """Loss and norm of the gradient over n steps, (n, 2); the last weights, flat."""
    state, args = prepare(device, f"{METHODS[method]} --amp {amp}", backend)
    found = []
    for step, batch in enumerate(batches(n)):
        batch = {name: value.to(device) for name, value in batch.items()}
        logs = train.train_step(state, args, step, [batch])
        found.append(torch.stack([logs["loss"].float(), logs["grad_norm"].float()]).cpu())
    weights = torch.cat([p.detach().float().cpu().flatten() for p in state.params])
    return torch.stack(found), weights


@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_step_is_that_of_the_cpu(method):
    plain, plain_weights = losses_of(torch.device("cpu"), method, "fp32", None)
    found, weights = losses_of(DEVICE, method, "fp32", "inductor")
    torch.testing.assert_close(found, plain, rtol=2e-2, atol=2e-3)
    start = torch.cat([p.detach().flatten() for p in network().parameters()])
    assert torch.corrcoef(torch.stack([weights - start, plain_weights - start]))[0, 1] > 0.95


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_lower_precision_trains(amp):
    if amp == "fp16" and DEVICE.type == "cpu":
        pytest.skip("fp16 is refused on a CPU")
    plain, plain_weights = losses_of(torch.device("cpu"), "late", "fp32", None)
    found, weights = losses_of(DEVICE, "late", amp, "inductor")
    torch.testing.assert_close(found[:, 0], plain[:, 0], rtol=0.1, atol=1e-2)
    start = torch.cat([p.detach().flatten() for p in network().parameters()])
    assert torch.corrcoef(torch.stack([weights - start, plain_weights - start]))[0, 1] > 0.8


def test_no_step_waits_for_the_gpu():
    """torch.cuda raises at every wait; the first steps compile and may."""
    state, args = prepare(DEVICE, "--robust adv --reg-last 1 --amp bf16", "inductor")
    on_device = [{name: value.to(DEVICE) for name, value in b.items()} for b in batches(5)]
    for step, batch in enumerate(on_device):
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("error" if step > 2 else "default")
        try:
            train.train_step(state, args, step, [batch])
        finally:
            if DEVICE.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


# --------------------------------------------------------------------------------------------------
# the scripts, each in a process of its own


def run(script, *args):
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu")
    net = network()
    common = dict(config=net.config, image_size=16, args=dict(data="synthetic:64"))
    state = net.state_dict()
    save_checkpoint(out / "ckpt.pt", dict(kind="unet", model=state, ema=state, **common))
    torch.manual_seed(0)
    net = WideResNet(10, 1, 10)
    found = dict(kind="classifier", config=net.config, model=net.state_dict())
    save_checkpoint(out / "classifier.pt", found)
    return out


def on_both(script, out, *flags):
    """The script plainly on the CPU, then compiled on DEVICE -> their folders."""
    run(script, *flags, "--device", "cpu", "--no-compile", "--amp", "fp32", "--out", out / "cpu")
    run(script, *flags, "--device", DEVICE, "--compile", "--amp", "fp32", "--out", out / "gpu")
    return out / "cpu", out / "gpu"


@pytest.mark.parametrize("sampler", ["ddpm --steps 20", "ddim --steps 10", "heun --steps 10"])
def test_a_sample_is_that_of_the_cpu(files, tmp_path, sampler):
    """Image i is a function of its seed, on every device; 5 images in batches of 2."""
    flags = f"--n 5 --batch-size 2 --sampler {sampler}".split()
    folders = on_both("sample.py", tmp_path, "--ckpt", files / "ckpt.pt", *flags)
    cpu, gpu = (np.load(f / "samples.npz")["images"].astype(int) for f in folders)
    grey = (cpu > 5) & (cpu < 250)  # most others are black or white whatever the network
    assert grey.sum() > 50
    assert (abs(cpu - gpu) <= 2)[grey].mean() > 0.9


def test_an_attacked_sample_is_that_of_the_cpu(files, tmp_path):
    """The sign of a gradient near 0 may turn: the changes are of one size, not the same."""
    flags = "--n 4 --steps 8 --attacked 0.5 --objective x0 --scale var".split()
    folders = on_both("attack.py", tmp_path, "--ckpt", files / "ckpt.pt", *flags)
    cpu, gpu = (changes(json.loads((f / "metrics.json").read_text())) for f in folders)
    assert len(cpu) == 3 and max(cpu) > 0.05  # no attack, at random, on x^_0
    assert gpu == pytest.approx(cpu, rel=0.2)


def changes(record):
    (rows,) = record["checkpoints"].values()
    return [row["change_rms"] for row in rows]


@pytest.mark.parametrize("purifier", ["ddpm", "ddim", "vp-sde", "edm-sde"])
def test_purification_under_attack_is_that_of_the_cpu(files, tmp_path, purifier):
    flags = ["--ckpt", files / "ckpt.pt", "--classifier", files / "classifier.pt"]
    flags += f"--data synthetic:64 --n 5 --batch-size 2 --purifier {purifier}".split()
    flags += "--nfe 2 --pgd 2 --eot 2 --knowledge white both".split()
    folders = on_both("purify.py", tmp_path, *flags)
    cpu, gpu = (json.loads((f / "metrics.json").read_text())["runs"] for f in folders)
    assert len(cpu) == len(gpu) == 2
    for a, b in zip(cpu, gpu):
        assert a["calls"] == b["calls"] and b["nonfinite"] == b["outside"] == 0
        assert b["loss_start"] == pytest.approx(a["loss_start"], rel=2e-2)
        assert b["loss_end"] == pytest.approx(a["loss_end"], rel=5e-2)


def test_training_resumes(tmp_path):
    """Compiled, over the change of phase: to rounding, as a GPU does not add in a fixed order."""
    flags = "--model tiny --image-size 16 --data synthetic:64 --batch-size 8 --robust adv"
    flags += f" --reg-last 0.5 --log-every 1 --save-every 3 --sample-every 0 --device {DEVICE}"
    flags = [*flags.split(), "--compile", "--amp", "fp32"]
    run("train.py", *flags, "--iters", 8, "--out", tmp_path / "whole")
    argv = ["train.py", *flags, "--iters", "8", "--out", str(tmp_path / "parts")]
    stop = "import train, runtime, sys; runtime.Interrupt.asked = lambda self, step: step == 5;"
    stop += f"sys.argv = {argv}; runtime.cli(train.main)"
    stopped = subprocess.run([sys.executable, "-c", stop], cwd=ROOT, capture_output=True)
    assert stopped.returncode == 128 + signal.SIGTERM
    before = weights_in(tmp_path / "parts", 5)
    run("train.py", "--resume", "--device", DEVICE, "--compile", "--out", tmp_path / "parts")
    parts, whole = (weights_in(tmp_path / name, 8) for name in ("parts", "whole"))
    assert (parts - whole).norm() < 0.1 * (whole - before).norm()


def weights_in(folder, step):
    """All weights of a checkpoint of that step, and their averages, flat."""
    ckpt = runtime.load_checkpoint(folder / "ckpt.pt")
    assert ckpt["step"] == step
    both = [*ckpt["model"].values(), *ckpt["ema"].values()]
    return torch.cat([value.double().flatten() for value in both])
