"""train.py and sample.py as commands: determinism, resuming, processes, bad input."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import call
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import metrics
import sample
import train
import training
from classifier import WideResNet
from data import CorruptedImages, Order, load_images
from unet import UNet

ROOT = Path(__file__).resolve().parents[1]
SMALL = "--model tiny --image-size 8 --data synthetic:64 --batch-size 8 --device cpu".split()
SMALL += "--sample-every 0 --log-every 1 --amp fp32".split()
NOISY = "--p 0.9 --sigma 0.2".split()
ADV = "--robust adv --paper".split()  # Eq. 10 as P1 prints it


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Bitwise equality holds for equal thread counts; torchrun gives its processes one
    thread each."""
    os.environ["OMP_NUM_THREADS"] = "1"
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for s, handler in handlers.items():
        signal.signal(s, handler)


def torchrun(script, *args, processes=2):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        "--",
    ]
    command.append(ROOT / script)
    done = subprocess.run([*command, *map(str, args)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def weights(out):
    ckpt = torch.load(out / "ckpt.pt", weights_only=True)
    return torch.cat([v.flatten() for part in ("model", "ema") for v in ckpt[part].values()]), ckpt


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Ten steps of Robust_adv, uninterrupted."""
    out = tmp_path_factory.mktemp("adv")
    assert call(train, *SMALL, *NOISY, *ADV, "--iters", 10, "--warmup", 2, "--out", out) == 0
    return out


def test_run_leaves_its_files(checkpoint):
    assert {"ckpt.pt", "metrics.jsonl", "metrics.json", "loss.png", "grid.png"} <= {
        f.name for f in checkpoint.iterdir()
    }
    lines = [json.loads(line) for line in (checkpoint / "metrics.jsonl").read_text().splitlines()]
    assert [d["step"] for d in lines] == list(range(1, 11))
    assert all(abs(d["loss"] - d["L_DM"] - d["L_reg"]) < 1e-5 and d["grad_norm"] > 0 for d in lines)
    record = json.loads((checkpoint / "metrics.json").read_text())
    assert {
        "command",
        "commit",
        "seed",
        "versions",
        "device",
        "n",
        "wall_seconds",
        "lambda_t",
        "delta",
    } <= record.keys()


def test_kill_and_resume_equals_uninterrupted(checkpoint, tmp_path):
    args = [*SMALL, *NOISY, *ADV, "--warmup", "2", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *args, "--iters", "100000", "--save-every", "3"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.time() + 120
    while not (tmp_path / "ckpt.pt").exists() and time.time() < deadline:
        time.sleep(0.002)
    process.kill()  # SIGKILL
    assert process.wait() == -signal.SIGKILL
    step = weights(tmp_path)[1]["step"]
    if step >= 10:
        pytest.skip("this machine trained 10 steps before the kill arrived")
    assert (
        call(
            train,
            "--resume",
            "--iters",
            10,
            "--out",
            tmp_path,
            "--device",
            "cpu",
            "--sample-every",
            0,
        )
        == 0
    )
    assert torch.equal(weights(tmp_path)[0], weights(checkpoint)[0])  # bit for bit


def test_sigterm_saves_and_exits_cleanly(checkpoint, tmp_path, monkeypatch):
    real, calls = train.seed_at, []

    def seed_at(seed, k, stream):  # the signal arrives in the middle of step 4
        calls.append(stream)
        if calls.count(2) == 4 and stream == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(seed, k, stream)

    monkeypatch.setattr(train, "seed_at", seed_at)
    args = [*SMALL, *NOISY, *ADV, "--iters", 10, "--warmup", 2, "--out", tmp_path]
    assert call(train, *args) == 128 + signal.SIGTERM  # so that `train && sample` stops
    assert weights(tmp_path)[1]["step"] == 4
    monkeypatch.setattr(train, "seed_at", real)
    assert call(train, *args, "--resume") == 0
    assert torch.equal(weights(tmp_path)[0], weights(checkpoint)[0])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(
        range(1, 11)
    )  # none lost, none twice


@pytest.mark.parametrize("stop", [3, 5, 8])
def test_resume_in_either_phase_equals_uninterrupted(stop, tmp_path, monkeypatch):
    """Plain DDPM up to step 5 of 10, then the regulariser on a quarter of the rows; stopped before,
    at and after the change."""
    late = "--robust adv --reg-last 0.5 --reg-share 0.25".split()
    args = [*SMALL, *NOISY, *late, "--iters", 10, "--warmup", 2]
    assert call(train, *args, "--out", tmp_path / "whole") == 0
    update, done = train.train_step, []

    def stopping(*inputs):
        done.append(1)
        if len(done) == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*inputs)

    monkeypatch.setattr(train, "train_step", stopping)
    assert call(train, *args, "--out", tmp_path / "parts") == 128 + signal.SIGTERM
    assert weights(tmp_path / "parts")[1]["step"] == stop
    assert call(train, "--resume", "--out", tmp_path / "parts", "--device", "cpu") == 0
    assert torch.equal(
        weights(tmp_path / "parts")[0], weights(tmp_path / "whole")[0]
    )  # bit for bit
    lines = [
        json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [("L_reg" in d) for d in lines] == [False] * 5 + [True] * 5


def test_first_phase_is_plain_ddpm(tmp_path):
    """Up to the step where the regulariser begins, --robust adv is --robust none, bit for bit."""
    args = [*SMALL, *NOISY, "--warmup", 2]
    assert call(train, *args, "--iters", 5, "--out", tmp_path / "none") == 0
    adv = [*args, "--robust", "adv", "--iters", 10, "--reg-last", 0.5, "--save-every", 5]
    real, kept = training.save_checkpoint, []

    def keep(path, ckpt):
        kept.append((ckpt["step"], {k: v.clone() for k, v in ckpt["model"].items()}))
        real(path, ckpt)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "save_checkpoint", keep)
        assert call(train, *adv, "--out", tmp_path / "adv") == 0
    step, at_change = kept[0]
    plain = weights(tmp_path / "none")[1]["model"]
    assert step == 5 and all(torch.equal(at_change[k], plain[k]) for k in plain)
    assert not all(torch.equal(kept[-1][1][k], plain[k]) for k in plain)


def test_growing_iters_past_the_change_is_refused(tmp_path, capsys):
    """--iters sets where the regulariser begins: a longer run would have begun later."""
    args = [*SMALL, *NOISY, "--robust", "adv", "--iters", 4, "--reg-last", 0.5, "--out", tmp_path]
    assert call(train, *args) == 0
    assert call(train, "--resume", "--iters", 40, "--out", tmp_path, "--device", "cpu") == 2
    assert "began at step 2 of 4 and would now at 20" in capsys.readouterr().err


def test_one_phase_is_the_training_of_the_papers_first_version():
    """--reg-last 1: the objective acts from step 0 on, at one rate, with one warm-up."""
    args = train.parse_args("--robust adv --paper --iters 10 --warmup 4 --lr 0.1".split())
    assert [train.phase(args, step) for step in range(10)] == [
        (True, step, 0.1, 4) for step in range(10)
    ]
    args = train.parse_args("--robust adv --reg-last 0.2 --iters 10 --warmup 40 --lr 0.1".split())
    phases = [train.phase(args, step) for step in range(10)]
    assert phases[:8] == [(False, step, 0.1, 40) for step in range(8)]
    assert phases[8:] == [(True, 0, 0.05, 4), (True, 1, 0.025, 4)]


def test_paper_is_eq10_as_printed_and_flags_beside_it_count():
    """At every step, on all rows, at all t; what the user types beside it stands."""
    names = "lam reg_last reg_share reg_from reg_until".split()

    def chosen(*flags):
        args = train.parse_args(["--robust", "adv", *flags])
        return [getattr(args, name) for name in names]

    assert chosen("--paper") == [0.3, 1, 1, 0, 1000]
    assert chosen() == [0.6, 0.1, 0.125, 5, 100]
    assert chosen("--paper", "--reg-last", "0.2") == [0.3, 0.2, 1, 0, 1000]


def test_a_setting_that_a_checkpoint_lacks_is_not_guessed(checkpoint, tmp_path, capsys):
    """As of an earlier version, where --reg-from was 0: the objective would change on the way."""
    ckpt = torch.load(checkpoint / "ckpt.pt", weights_only=True)
    del ckpt["args"]["reg_from"]
    torch.save(ckpt, tmp_path / "ckpt.pt")
    assert "lacks reg_from" in bad(capsys, train, "--resume", "--out", tmp_path)


def test_resume_across_memory_layouts(tmp_path):
    """Fused Adam walks over weights and moments in memory order: moments saved in another layout
    are laid out anew."""
    args = train.parse_args([*SMALL, "--warmup", "0", "--lr", "1e-2"])
    torch.manual_seed(0)
    net = training.UNet(**train.PRESETS["tiny"])
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 900])

    def step(run):
        train.train_step(run, args, 5, [dict(x0=x, t=t, eps=x.flip(0))])
        return [p.detach().contiguous() for p in run.params]

    run = train.prepare(
        copy.deepcopy(net).to(memory_format=torch.channels_last), args, torch.device("cpu")
    )
    step(run)
    state, saved = copy.deepcopy(run.net.state_dict()), copy.deepcopy(run.optimizer.state_dict())
    for moments in saved["state"].values():  # as a device with the other layout leaves them
        for key in ("exp_avg", "exp_avg_sq"):
            moments[key] = moments[key].contiguous()
    expected, ends = step(run), []
    for form in (torch.channels_last, torch.contiguous_format):
        resumed = train.prepare(
            copy.deepcopy(net).to(memory_format=form), args, torch.device("cpu")
        )
        resumed.net.load_state_dict(state)
        resumed.optimizer.load_state_dict(copy.deepcopy(saved))
        training.lay_out_moments(resumed.optimizer)
        ends.append(step(resumed))
    assert all(torch.equal(a, b) for a, b in zip(ends[0], expected))
    assert all(
        (a - b).abs().max() < 1e-3 for a, b in zip(ends[1], expected)
    )  # another layout, another rounding


def test_two_processes_and_accumulation_equal_one_process(tmp_path):
    """Sums are taken in another order, and Adam divides gradients near 0 by their own size: hence
    the small --lr."""
    args = [
        *SMALL,
        *NOISY,
        *ADV,
        "--iters",
        "5",
        "--warmup",
        "0",
        "--lr",
        "1e-4",
        "--dropout",
        "0.1",
    ]
    torchrun("train.py", *args, "--out", tmp_path / "two")
    assert call(train, *args, "--accum", 4, "--out", tmp_path / "accum") == 0
    assert call(train, *args, "--out", tmp_path / "one") == 0
    assert call(train, *args, "--seed", 1, "--out", tmp_path / "other") == 0
    one, two, accum, other = (
        weights(tmp_path / name)[0] for name in ("one", "two", "accum", "other")
    )
    assert (two - one).abs().max() < 1e-6
    assert (accum - one).abs().max() < 1e-6
    assert (other - one).abs().max() > 1e-4  # another seed does differ


def test_streamed_data_trains_the_same(checkpoint, tmp_path, monkeypatch):
    class Streamed(training.CorruptedImages):
        def __init__(self, *args):
            super().__init__(*args, budget=0)

    monkeypatch.setattr(training, "CorruptedImages", Streamed)
    assert call(train, *SMALL, *NOISY, *ADV, "--iters", 10, "--warmup", 2, "--out", tmp_path) == 0
    assert torch.equal(weights(tmp_path)[0], weights(checkpoint)[0])


def test_image_i_depends_on_seed_and_i_alone(checkpoint, tmp_path):
    def images(name, *args, run=call, script=sample):
        args = [
            "--ckpt",
            checkpoint / "ckpt.pt",
            "--steps",
            5,
            "--device",
            "cpu",
            "--amp",
            "fp32",
            "--out",
            tmp_path / name,
            "--no-png",
            *args,
        ]
        run(script, *args)
        return np.load(tmp_path / name / "samples.npz")["images"]

    reference = images("64", "--n", 16, "--batch-size", 64)
    assert reference.std() > 0
    assert np.array_equal(images("7", "--n", 16, "--batch-size", 7), reference)
    assert np.array_equal(images("1", "--n", 5, "--batch-size", 1), reference[:5])
    assert np.array_equal(images("two", "--n", 16, run=torchrun, script="sample.py"), reference)
    assert not np.array_equal(images("seed", "--n", 16, "--seed", 1), reference)


def test_a_smaller_sample_leaves_no_images_of_a_larger_one(checkpoint, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "mine.png").write_bytes(b"")  # not the script's to remove
    for n in (3, 2):  # the folder of a checkpoint will do
        assert (
            call(
                sample,
                "--ckpt",
                checkpoint,
                "--steps",
                2,
                "--device",
                "cpu",
                "--n",
                n,
                "--out",
                tmp_path,
            )
            == 0
        )
    left = sorted(p.name for p in (tmp_path / "images").glob("*.png"))
    assert left == ["000000.png", "000001.png", "mine.png"]


def test_pictures_of_another_origin_stay(checkpoint, tmp_path, capsys):
    mine = tmp_path / "images" / "000000.png"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    flags = ["--ckpt", checkpoint, "--steps", 2, "--device", "cpu", "--n", 2, "--out", tmp_path]
    assert "holds pictures of another origin" in bad(capsys, sample, *flags)
    assert call(sample, *flags, "--no-png") == 0
    assert mine.read_bytes() == b"mine"


def test_a_full_disk_costs_no_earlier_sample(checkpoint, tmp_path, capsys, monkeypatch):
    flags = ["--ckpt", checkpoint, "--steps", 2, "--device", "cpu", "--n", 2, "--out", tmp_path]
    assert call(sample, *flags) == 0
    before = {p.name: p.read_bytes() for p in tmp_path.rglob("*.*") if p.is_file()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    assert call(sample, *flags, "--seed", 1) == 1
    for path in (tmp_path / "samples.npz", tmp_path / "grid.png", tmp_path / "images/000001.png"):
        assert path.read_bytes() == before[path.name]


def test_ctrl_c_keeps_the_samples_so_far(checkpoint, tmp_path, monkeypatch):
    real = sample.generate
    calls = []

    def generate(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(sample, "generate", generate)
    flags = ["--ckpt", checkpoint, "--steps", 2, "--device", "cpu", "--out", tmp_path]
    assert call(sample, *flags, "--n", 8, "--batch-size", 2) == 128 + signal.SIGINT
    assert len(np.load(tmp_path / "samples.npz")["images"]) == 4
    assert json.loads((tmp_path / "metrics.json").read_text())["n"] == 4


def test_init_starts_from_the_ema_weights(checkpoint, tmp_path):
    assert (
        call(
            train,
            *SMALL,
            "--iters",
            1,
            "--lr",
            0,
            "--init",
            checkpoint / "ckpt.pt",
            "--out",
            tmp_path,
        )
        == 0
    )
    old, new = weights(checkpoint)[1]["ema"], weights(tmp_path)[1]["model"]
    assert all(torch.equal(old[k], new[k]) for k in old)


def test_compiled_attack_and_loss_equal_eager(tmp_path):
    """The frozen-weight graph of the attack and the training graph are two compilations of one
    module."""
    import losses
    from unet import PRESETS, UNet

    torch.manual_seed(0)
    net = UNet(**PRESETS["tiny"])
    torch.nn.init.normal_(
        net.conv_out.weight, std=0.02
    )  # the zero it starts with would hide the attack
    x0, eps, u = torch.randn(3, 2, 3, 8, 8)
    t, beta = torch.tensor([30, 600]), torch.tensor([0.7, 1.6])
    values = []
    for model in (net, torch.compile(net, backend="aot_eager")):
        loss, _ = losses.robust_loss(model, losses.NoiseSchedule(), x0, t, eps, beta=beta, u=u)
        grads = torch.autograd.grad(loss, list(net.parameters()))
        values.append(torch.cat([loss.flatten(), *[g.flatten() for g in grads]]))
    assert torch.allclose(*values, rtol=1e-4, atol=1e-6)


def test_the_average_of_the_weights_holds_no_graph(checkpoint, monkeypatch, tmp_path):
    """EMA tensors with a grad_fn would keep every step of the run in memory."""
    seen = []
    monkeypatch.setattr(
        training, "generate", lambda ema, *args, **kw: seen.append(ema) or torch.zeros(64, 3, 8, 8)
    )
    assert call(train, *SMALL, "--iters", 2, "--out", tmp_path) == 0
    assert seen and not any(p.requires_grad or p.grad_fn is not None for p in seen[0].parameters())


def test_half_written_log_line_does_not_stop_a_resume(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as f:
        f.write('{"step": 11, "lo')
    assert (
        call(
            train,
            "--resume",
            "--iters",
            11,
            "--device",
            "cpu",
            "--sample-every",
            0,
            "--out",
            tmp_path / "run",
        )
        == 0
    )
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 12))


def test_non_finite_loss_names_step_and_checkpoint(tmp_path, capsys):
    flags = "--iters 20 --lr 1e30 --warmup 0 --save-every 1".split()
    assert call(train, *SMALL, *flags, "--out", tmp_path) == 1
    message = capsys.readouterr().err
    assert "the loss or gradient of step" in message
    assert "not finite" in message and "ckpt.pt" in message
    assert torch.isfinite(weights(tmp_path)[0]).all() or weights(tmp_path)[1]["step"] == 1


def bad(capsys, script, *args, code=2):
    """This exit code and exactly one line on stderr, which is returned."""
    assert call(script, *args) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    lines = [line for line in lines if "step/s" not in line and "s/step" not in line]  # tqdm's bar
    assert len(lines) == 1, lines
    return lines[0]


def test_train_refuses_bad_input(capsys, tmp_path, checkpoint):
    def refuse(*args):
        return bad(capsys, train, *SMALL, "--iters", 1, "--out", tmp_path / "o", *args)

    assert "--p 1.5" in refuse("--p", 1.5, "--sigma", 0.2)
    assert "--sigma -0.1" in refuse("--p", 0.5, "--sigma", -0.1)
    assert "--p 0.9" in refuse("--p", 0.9)
    assert "--lr inf" in refuse("--lr", "inf") and "--lr nan" in refuse("--lr", "nan")
    assert "--dropout 2" in refuse("--dropout", 2) and "--iters -5" in refuse("--iters", -5)
    assert "--seed -1" in refuse("--seed", -1)
    assert "no such folder" in refuse("--data", "folder:/nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no images" in refuse("--data", f"folder:{tmp_path}/empty")
    assert "imagenet: unknown data set" in refuse("--data", "imagenet")
    assert "--image-size 10" in refuse("--image-size", 10)
    assert "larger than" in refuse("--batch-size", 65)
    assert "--batch-size 8" in refuse("--accum", 3)
    assert "--lam" in refuse("--lam", 0.5)  # without effect under --robust none
    assert "no such checkpoint" in refuse("--resume")
    assert "no such checkpoint" in refuse("--init", tmp_path / "nothing.pt")
    assert "--resume with --init" in bad(
        capsys, train, "--resume", "--init", "x", "--out", checkpoint
    )
    assert "was trained with adv" in bad(
        capsys, train, "--resume", "--robust", "ran", "--out", checkpoint
    )
    assert "holds a checkpoint" in bad(capsys, train, *SMALL, "--out", checkpoint)
    other = torch.load(checkpoint / "ckpt.pt", weights_only=True)
    other["config"] = other["config"] | {"channels": [32, 64, 64]}
    torch.save(other, tmp_path / "other.pt")
    assert "other.pt" in refuse("--init", tmp_path / "other.pt")
    if not torch.cuda.is_available():
        assert "no CUDA GPU" in refuse("--device", "cuda")
    (tmp_path / "file").write_text("")
    assert "file" in bad(capsys, train, *SMALL, "--out", tmp_path / "file" / "sub")
    assert not (tmp_path / "o" / "ckpt.pt").exists()


def test_sample_refuses_bad_input(capsys, tmp_path, checkpoint):
    def refuse(*args):
        return bad(capsys, sample, "--out", tmp_path / "s", "--device", "cpu", *args)

    good = checkpoint / "ckpt.pt"
    assert "--n 0" in refuse("--ckpt", good, "--n", 0)
    assert "--steps 0" in refuse("--ckpt", good, "--steps", 0)
    assert "--steps 0" in refuse("--ckpt", good, "--steps", 0, "--sampler", "ddim")
    assert "--device mps" in bad(capsys, sample, "--ckpt", good, "--device", "mps")
    assert "--steps 1001" in refuse("--ckpt", good, "--steps", 1001, "--sampler", "ddim")
    assert "--spacing naive" in refuse("--ckpt", good, "--spacing", "naive", "--sampler", "ddim")
    assert "--eta 2" in refuse("--ckpt", good, "--eta", 2, "--sampler", "ddim")
    assert "no such checkpoint" in refuse("--ckpt", tmp_path / "none.pt")
    (tmp_path / "short.pt").write_bytes(good.read_bytes()[:1000])
    assert "truncated" in refuse("--ckpt", tmp_path / "short.pt")
    assert "no config.json" in refuse("--ckpt", tmp_path)
    assert "--steps: invalid int value: 'x'; see --help" in refuse("--ckpt", good, "--steps", "x")
    assert "no such file" in refuse(
        "--ckpt", good, "--n", 4, "--fid", "--inception-weights", tmp_path / "none.pth"
    )


def test_full_disk_keeps_the_previous_checkpoint(capsys, tmp_path, checkpoint, monkeypatch):
    out = tmp_path / "run"
    assert call(train, *SMALL, "--iters", 2, "--out", out) == 0
    before = (out / "ckpt.pt").read_bytes()
    capsys.readouterr()

    def fsync(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    assert "No space left" in bad(
        capsys, train, "--resume", "--iters", 4, "--device", "cpu", "--out", out, code=1
    )
    assert (out / "ckpt.pt").read_bytes() == before
    assert not list(out.glob("*.tmp"))


RIVALS = {
    "ambient": "--robust ambient --sigma-scale 1.2",
    "huber": "--robust huber --corrupt outliers",
    "drop": "--robust ran --reg-last 1 --drop-noisy --noisy-above 0.1",
}


@pytest.fixture
def no_pictures(monkeypatch):
    """They take longer than the few steps of these runs."""
    monkeypatch.setattr(training, "generate", lambda *args, **kw: torch.zeros(64, 3, 8, 8))
    monkeypatch.setattr(training, "plot", lambda *args: None)


@pytest.mark.parametrize("name", RIVALS)
def test_rivals_resume_bit_for_bit(name, tmp_path, capsys, no_pictures):
    args = [
        *SMALL,
        "--p",
        "0.5",
        "--warmup",
        "2",
        *("--sigma 0.3".split() if name != "huber" else []),
    ]
    assert call(train, *args, *RIVALS[name].split(), "--iters", 3, "--out", tmp_path / "whole") == 0
    assert call(train, *args, *RIVALS[name].split(), "--iters", 2, "--out", tmp_path / "parts") == 0
    assert (
        call(train, "--resume", "--iters", 3, "--device", "cpu", "--out", tmp_path / "parts") == 0
    )
    assert torch.equal(weights(tmp_path / "whole")[0], weights(tmp_path / "parts")[0])
    record = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    assert {"ambient": "L_ambient", "huber": "L_Huber", "drop": "L_reg"}[name] in record
    if name != "huber":  # of 64 butterflies exactly the 32 noisy ones are found
        assert record["judged_noisy"] == 32
        assert capsys.readouterr().out.count("32 images are judged noisy") == 3
    for flag in ("--sigma-scale 1", "--huber-c 0.5", "--noisy-above 0.2", "--corrupt blur"):
        assert flag.split()[0] in bad(
            capsys, train, "--resume", *flag.split(), "--out", tmp_path / "parts"
        )


def test_rivals_on_clean_data(tmp_path, no_pictures):
    """Ambient training and --drop-noisy find no noise and are DDPM, bit for bit, on a folder of
    images as well."""
    from PIL import Image

    from data import synthetic_butterflies

    (tmp_path / "images").mkdir()
    for i, image in enumerate(synthetic_butterflies(8, 8)[0]):
        Image.fromarray(image).save(tmp_path / "images" / f"{i}.png")
    args = [*SMALL, "--data", f"folder:{tmp_path}/images", "--data-root", tmp_path, "--iters", 2]
    for name, flags in dict(
        plain=[], ambient=["--robust", "ambient"], drop=["--drop-noisy"]
    ).items():
        assert call(train, *args, *flags, "--out", tmp_path / name) == 0
    plain, ambient, drop = (weights(tmp_path / name)[0] for name in ("plain", "ambient", "drop"))
    assert torch.equal(plain, ambient) and torch.equal(plain, drop)


def test_noise_is_estimated_from_the_corrupted_images():
    """Not from the clean ones, for any number of images; at most `above` counts as clean."""
    from data import CorruptedImages, synthetic_butterflies

    data = CorruptedImages(synthetic_butterflies(700, 16)[0], None, 0.9, 0.2)
    sigma = metrics.estimate_noise(data, 0.1)
    assert torch.equal(sigma > 0, data.corrupted)
    assert sigma[data.corrupted].mean().item() == pytest.approx(0.21, abs=0.02)
    torch.testing.assert_close(
        sigma[data.corrupted], metrics.noise_mad(data.batch(torch.arange(700)))[data.corrupted]
    )
    assert (metrics.estimate_noise(data, 10) == 0).all()


def test_train_refuses_senseless_rivals(capsys, tmp_path):
    def refuse(*args):
        return bad(capsys, train, *SMALL, "--iters", 1, "--out", tmp_path / "o", *args)

    assert "--huber-c" in refuse("--huber-c", 0.5) and "--huber-c 0" in refuse(
        "--robust", "huber", "--huber-c", 0
    )
    assert "--sigma-scale" in refuse("--robust", "adv", "--sigma-scale", 1.2)
    assert "--sigma-scale -1" in refuse("--robust", "ambient", "--sigma-scale", -1)
    assert "--noisy-above" in refuse("--noisy-above", 0.1) and "--noisy-above -1" in refuse(
        "--drop-noisy", "--noisy-above", -1
    )
    assert "--drop-noisy" in refuse("--robust", "ambient", "--drop-noisy")
    assert "--drop-noisy" in refuse(
        "--drop-noisy", "--p", 0.9, "--sigma", 0.3
    )  # 6 images left for a batch of 8
    assert "--lam" in refuse("--robust", "ambient", "--lam", 0.5) and "--lam" in refuse(
        "--robust", "huber", "--lam", 0.5
    )
    assert "--corrupt blur" in refuse("--corrupt", "blur")
    assert "--p 0.5" in refuse("--corrupt", "blur", "--p", 0.5)
    assert "--sigma 0.2" in refuse("--corrupt", "outliers", "--p", 0.5, "--sigma", 0.2)
    assert "--sigma 2" in refuse("--corrupt", "patch", "--p", 0.5, "--sigma", 2)
    assert "--corrupt class" in refuse("--corrupt", "class", "--p", 0.5)
    assert not (tmp_path / "o" / "ckpt.pt").exists()


def test_draw_numbers_have_their_distributions():
    """t uniform on 0..T-1, beta on [0.5, 2], u on [-1, 1], eps standard normal, half the images
    mirrored; new in each step."""
    g, n = torch.Generator(), 4000
    flip, t, beta, eps, u = train.draw_numbers(g, 5, 7, 1000, n, 8).values()
    assert abs(flip.double().mean() - 0.5) < 0.04 and t.min() >= 0 and t.max() <= 999
    for x, low, high in (
        (t.double(), 0, 999),
        (beta.double(), 0.5, 2),
        (u.double().flatten(), -1, 1),
    ):
        x = ((x - low) / (high - low)).sort().values
        assert (x - torch.linspace(0, 1, len(x), dtype=torch.float64)).abs().max() < 1.95 / len(
            x
        ) ** 0.5  # Kolmogorov, 0.1 %
    assert (
        eps.shape == u.shape == (n, 3, 8, 8)
        and abs(eps.mean()) < 0.005
        and abs(eps.var() - 1) < 0.01
    )
    assert abs(eps.double().pow(4).mean() - 3) < 0.06
    again, other = (train.draw_numbers(g, 5, step, 1000, n, 8) for step in (7, 8))
    assert (
        torch.equal(eps, again["eps"])
        and not torch.equal(eps, other["eps"])
        and (t != other["t"]).float().mean() > 0.99
    )


def test_no_flip_mirrors_nothing(tmp_path, monkeypatch, no_pictures):
    """The batch is then what the set gives without flips; by default about half of it is
    mirrored."""
    batches, real = {}, train.ddpm_loss
    for flag in ("--flip", "--no-flip"):
        monkeypatch.setattr(
            train, "ddpm_loss", lambda *a, flag=flag: batches.update({flag: a[2]}) or real(*a)
        )
        assert (
            call(
                train,
                *SMALL,
                *NOISY,
                "--batch-size",
                64,
                "--iters",
                1,
                flag,
                "--out",
                tmp_path / flag,
            )
            == 0
        )
    same = (batches["--flip"] == batches["--no-flip"]).flatten(1).all(1)
    mirrored = (batches["--flip"].flip(3) == batches["--no-flip"]).flatten(1).all(1)
    assert (
        same | mirrored
    ).all() and 12 < same.sum() < 52  # a clean butterfly is its own mirror image
    images, _ = load_images("synthetic:64", 8)
    data = CorruptedImages(images, None, 0.9, 0.2, 0)
    assert torch.equal(batches["--no-flip"], data.batch(Order(64, 0)(0, 64)))


@pytest.mark.parametrize(
    "flags, beta1, shrink, ramp",
    [
        ("", 0.9, 0.0, lambda step: (1 + step) / (10 + step)),
        (
            "--optimizer adamw --beta1 0.95 --weight-decay 0.01 --ema-ramp power",
            0.95,
            0.01,
            lambda step: 1 - 1 / (1 + step) ** 0.75,
        ),
    ],
)
def test_update_is_adam_with_warmup_clipping_and_a_ramped_average(flags, beta1, shrink, ramp):
    """Three steps on eps_theta = w x_t, two of them clipped, against Adam (Kingma & Ba, Alg. 1)
    written out.

    AdamW first shrinks the weights by lr weight_decay (Loshchilov & Hutter, 2019, Alg. 2).
    """

    class Scale(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor([0.3, -0.7], dtype=torch.float64))

        def forward(self, x, t):
            return self.w[:, None, None] * x

    net, args = (
        Scale(),
        train.parse_args(f"--lr 0.1 --warmup 2 --clip-grad 0.4 --ema 0.5 {flags}".split()),
    )
    run, abar = train.prepare(net, args, torch.device("cpu")), train.NoiseSchedule().alphas_bar
    w, mean, square, average = np.array([0.3, -0.7]), 0.0, 0.0, np.array([0.3, -0.7])
    clipped = []
    for step, size in enumerate((1.0, 0.1, 2.0)):
        g = torch.Generator().manual_seed(step)
        x0, eps = (
            size * torch.randn(6, 2, 2, 2, dtype=torch.float64, generator=g) for _ in range(2)
        )
        t = torch.randint(1000, (6,), generator=g)
        parts = [dict(x0=x0[i : i + 3], t=t[i : i + 3], eps=eps[i : i + 3]) for i in (0, 3)]
        logged = train.train_step(run, args, step, parts)
        a = abar[t].view(-1, 1, 1, 1)
        x, e = (
            v.transpose(0, 1).flatten(1).numpy()
            for v in (a.sqrt() * x0 + (1 - a).sqrt() * eps, eps)
        )
        r = w[:, None] * x - e
        grad = (2 * r * x).sum(1) / r.size
        norm = np.linalg.norm(grad)
        clipped.append(norm > 0.4)
        assert float(logged["loss"]) == pytest.approx((r**2).mean()) and float(
            logged["grad_norm"]
        ) == pytest.approx(norm)
        grad = grad * min(1, 0.4 / (norm + 1e-6))
        mean = beta1 * mean + (1 - beta1) * grad
        square = 0.999 * square + 0.001 * grad**2
        k, lr = step + 1, 0.1 * min(1, (step + 1) / 2)
        w = w * (1 - lr * shrink)
        w = w - lr * (mean / (1 - beta1**k)) / (np.sqrt(square / (1 - 0.999**k)) + 1e-8)
        decay = min(0.5, ramp(step))
        average = decay * average + (1 - decay) * w
        np.testing.assert_allclose(net.w.detach().numpy(), w, rtol=1e-9)
        np.testing.assert_allclose(run.ema.w.numpy(), average, rtol=1e-9)
    assert clipped == [True, False, True]


@pytest.mark.parametrize("method", ["none", "adv"])
def test_bf16_update_is_autocast(method):
    """Weights cast once per step give the gradients and steps of autocast, which casts them at
    every call; two parts."""
    torch.manual_seed(0)
    net = UNet(channels=(32, 32), attention=(False, True), blocks=1, dropout=0.0)
    torch.nn.init.normal_(net.conv_out.weight, std=0.1)
    paper = [] if method == "none" else ["--paper"]
    args = train.parse_args(
        [*f"--lr 0.01 --warmup 0 --clip-grad 0 --amp bf16 --robust {method}".split(), *paper]
    )
    cpu = torch.device("cpu")
    run = train.prepare(copy.deepcopy(net), args, cpu, cast_once=True)  # as on a GPU
    plain = train.prepare(copy.deepcopy(net), args, cpu)
    assert run.weights[0].dtype == torch.bfloat16 and plain.weights[0] is plain.params[0]
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        numbers = train.draw_numbers(generator, 0, step, 1000, 4, 8)
        numbers["x0"] = torch.randn(4, 3, 8, 8, generator=generator)
        parts = [{k: v[i : i + 2] for k, v in numbers.items()} for i in (0, 2)]
        ours, theirs = (train.train_step(r, args, step, parts) for r in (run, plain))
        assert float(ours["loss"]) == pytest.approx(
            float(theirs["loss"]), rel=0 if method == "none" else 0.02
        )
        for p, q in zip(run.params, plain.params) if step == 0 or method == "none" else ():
            assert p.grad.dtype == torch.float32  # "adv" sums the gradients of two forwards in bf16
            assert (p.grad - q.grad).norm() <= (0 if method == "none" else 0.01) * q.grad.norm()
    assert (
        not torch.equal(run.params[0], net.conv_in.weight)
        and run.ema.conv_in.weight.dtype == torch.float32
    )


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    """Untrained ones of 3 and of 10 classes."""
    from runtime import save_checkpoint

    out = tmp_path_factory.mktemp("classifiers")
    torch.manual_seed(0)
    for classes in (3, 10):
        net = WideResNet(10, 1, classes)
        save_checkpoint(
            out / f"{classes}.pt",
            dict(kind="classifier", config=net.config, model=net.state_dict()),
        )
    return out


def test_addt_has_the_recipe_of_p2():
    """AdamW (.95, .999), 1e-6, 2e-4 without a warm-up, 100 epochs of 196 steps of 256, EMA 1 - (1 +
    step)^(-3/4) up to .9999; what is given stands, and without ADDT nothing of it holds."""
    args = train.parse_args(["--robust", "addt"])
    given = vars(args)
    recipe = dict(
        optimizer="adamw", beta1=0.95, weight_decay=1e-6, lr=2e-4, warmup=0, iters=19_600,
        batch_size=256, ema_ramp="power", ema=0.9999, clip_grad=1.0, flip=True, dropout=None,
    )  # fmt: skip
    assert {name: given[name] for name in recipe} == recipe
    assert 100 * -(-50_000 // 256) == args.iters
    decays = [min(args.ema, training.EMA_RAMPS["power"](step)) for step in (0, 1, 15, 10**9)]
    assert decays == pytest.approx([0, 1 - 2**-0.75, 1 - 1 / 8, 0.9999])
    small = train.parse_args("--robust addt --model mini --lr 1e-3 --optimizer adam".split())
    assert (small.iters, small.batch_size, small.lr, small.beta1) == (1200, 64, 1e-3, 0.95)
    assert small.optimizer == "adam" and small.weight_decay == 1e-6
    plain = train.parse_args([])
    assert (plain.optimizer, plain.beta1, plain.weight_decay) == ("adam", 0.9, 0.0)
    assert (plain.ema_ramp, plain.batch_size, plain.warmup) == ("tenth", 128, 5000)


def test_the_flags_of_addt_reach_its_loss(monkeypatch):
    """Table 15 varies lambda_unit."""
    seen = {}
    monkeypatch.setattr(train, "addt_loss", lambda *args, **kw: seen.update(args=args, kw=kw))
    line = "--robust addt --addt-guide mse --addt-perturb linf --addt-unit 0.05 --addt-max 0.2"
    args = train.parse_args(line.split())
    train.addt("model", "schedule", args, "x0", "t", "eps", "y", "classifier")
    assert seen["args"] == (
        "model", "schedule", "classifier", "x0", "y", "t", "eps", "mse", "linf"
    )  # fmt: skip
    assert seen["kw"] == dict(unit=0.05, high=0.2)


def test_addt_trains_with_a_compiled_classifier(checkpoint, classifiers, tmp_path, monkeypatch):
    """As on a GPU by default. Its truth value is an error: bool() asks it for its length."""
    compiled = []
    compile_ = torch.compile

    def compile_eagerly(net, **_):
        compiled.append(type(net))
        return compile_(net, backend="eager")

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    monkeypatch.setattr(training, "generate", lambda *args, **kw: torch.zeros(64, 3, 8, 8))
    flags = [*SMALL, "--robust", "addt", "--init", checkpoint / "ckpt.pt", "--compile"]
    flags += ["--classifier", classifiers / "10.pt", "--iters", 1, "--out", tmp_path]
    assert call(train, *flags) == 0
    assert WideResNet in compiled
    torch._dynamo.reset()


def test_addt_resumes_bit_for_bit_and_needs_its_classifier(
    checkpoint, classifiers, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(training, "generate", lambda *args, **kw: torch.zeros(64, 3, 8, 8))
    addt = [*SMALL, "--robust", "addt", "--init", checkpoint / "ckpt.pt", "--addt-max", 0.3]
    guided = [*addt, "--classifier", classifiers / "10.pt"]
    assert call(train, *guided, "--iters", 4, "--out", tmp_path / "whole") == 0
    torch.rand(7)  # the global generator's state must not matter
    assert call(train, *guided, "--iters", 2, "--out", tmp_path / "parts") == 0
    torch.rand(7)
    assert (
        call(
            train,
            "--resume",
            "--iters",
            4,
            "--device",
            "cpu",
            "--sample-every",
            0,
            "--out",
            tmp_path / "parts",
        )
        == 0
    )
    assert torch.equal(weights(tmp_path / "parts")[0], weights(tmp_path / "whole")[0])
    record = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    assert (
        record["L_guide"] > 0
        and 0 < record["lambda_t"] <= 0.3
        and record["L_ADDT"] == record["loss"]
    )
    assert (
        call(
            train,
            *addt,
            "--addt-guide",
            "mse",
            "--addt-perturb",
            "linf",
            "--iters",
            1,
            "--out",
            tmp_path / "mse",
        )
        == 0
    )

    capsys.readouterr()
    for message, args in {
        "needs --classifier PATH": addt,
        "takes no --classifier": [*guided, "--addt-guide", "none"],
        "--lam: has no effect": [*guided, "--lam", 1],
        "--addt-max 1.5": [*guided, "--addt-max", 1.5],
        "--addt-unit: has no effect": [*SMALL, "--addt-unit", 0.1],
        "--addt-guide: has no effect": [*SMALL, "--addt-guide", "mse"],
        "--objective: has no effect": [*SMALL, "--robust", "ran", "--objective", "ldm"],
        "no such checkpoint": [*addt, "--classifier", tmp_path / "no.pt"],
        "holds no classifier": [*addt, "--classifier", checkpoint / "ckpt.pt"],
        "knows 3 classes": [*addt, "--classifier", classifiers / "3.pt"],
    }.items():
        assert message in bad(capsys, train, *args, "--iters", 1, "--out", tmp_path / "o")
    from PIL import Image

    (tmp_path / "flat").mkdir()
    for i in range(8):
        Image.new("RGB", (8, 8), (30 * i, 0, 0)).save(tmp_path / "flat" / f"{i}.png")
    flat = f"folder:{tmp_path}/flat"
    training.load_images(flat, 8, root=tmp_path)  # decodes, with a bar on stderr
    capsys.readouterr()
    assert "has no labels" in bad(
        capsys, train, *guided, "--data", flat, "--data-root", tmp_path, "--out", tmp_path / "o"
    )


class Waits(TorchDispatchMode):
    """Notes in `found` each operator that makes the host wait for a GPU: one that reads a value,
    whose output has a size that depends on values, that takes a mask as index, or that makes a
    tensor of Python's numbers (a copy of pageable memory).

    It sees no calls from within kernels. There is one on a CPU, where fused Adam reads its step
    counters.
    """

    NAMES = (
        "_local_scalar_dense is_nonzero equal nonzero masked_select _unique2 unique_dim "
        "unique_consecutive lift_fresh"
    ).split()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masked = (
            "index" in name
            and isinstance(args[1], (list, tuple))
            and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        )
        if name in self.NAMES or masked or str(func) == "aten.repeat_interleave.Tensor":
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "flags",
    [
        "none --corrupt blur --p 0.9 --sigma 1",
        "ran --reg-last 1 --drop-noisy --p 0.5 --sigma 0.3",
        "adv --reg-last 1 --reg-share 0.25 --accum 2 --p 0.9 --sigma 0.2",
        "inv-adv --reg-last 1 --corrupt patch --p 0.9 --sigma 0.5",
        "ambient --corrupt salt-pepper --p 0.9 --sigma 0.2",
        "huber --corrupt outliers --p 0.9",
        "addt --init CHECKPOINT --classifier CLASSIFIER",
    ],
)
def test_step_never_waits_for_the_device(
    flags, checkpoint, classifiers, tmp_path, monkeypatch, no_pictures
):
    """From the first draw of a run to its last: two whole rounds of the loop, the draws, the update
    and what is logged."""
    waits, starts, draw_numbers = Waits(), [], train.draw_numbers
    waits.found = found = []
    monkeypatch.setattr(
        train, "draw_numbers", lambda *args: starts.append(len(found)) or draw_numbers(*args)
    )
    for name in ("cpu", "numpy", "tolist"):  # no operators where the tensor is on a CPU
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda *args, name=name, real=real: found.append(name) or real(*args),
        )
    flags = (
        flags.replace("CHECKPOINT", f"{checkpoint}/ckpt.pt")
        .replace("CLASSIFIER", f"{classifiers}/10.pt")
        .split()
    )
    args = [
        *SMALL,
        "--log-every",
        9,
        "--save-every",
        9,
        "--iters",
        3,
        "--out",
        tmp_path,
        "--robust",
        *flags,
    ]
    with waits:
        assert call(train, *args) == 0
    assert len(starts) == 3 and found[starts[0] : starts[2]] == []
    assert (
        "_local_scalar_dense" in found[: starts[0]] and "tolist" in found[starts[2] :]
    )  # it sees those before and after


def test_other_images_are_not_continued_on(tmp_path, capsys, no_pictures):
    """sigma_y and the corruption belong to images by their number."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    args = [*SMALL, "--data", f"folder:{folder}", "--data-root", tmp_path, "--out", tmp_path / "o"]
    assert call(train, *args, "--iters", 2) == 0
    Image.fromarray(255 - pixels).save(folder / "7.png")
    resume = ["--resume", "--iters", 3, "--device", "cpu", "--out", tmp_path / "o"]
    assert call(train, *resume) == 2
    assert "not the images that" in capsys.readouterr().err.splitlines()[-1]


def test_weights_that_are_not_finite_are_not_saved(tmp_path, capsys, monkeypatch, no_pictures):
    """The loss of the last step may be finite when its update is not."""
    args = [*SMALL, "--out", tmp_path / "o"]
    assert call(train, *args, "--iters", 2) == 0
    before = (tmp_path / "o" / "ckpt.pt").read_bytes()
    real = train.train_step

    def diverging(state, *rest):
        logs = real(state, *rest)
        with torch.no_grad():
            state.params[0][0] = float("inf")
        return logs

    monkeypatch.setattr(train, "train_step", diverging)
    resume = ["--resume", "--iters", 3, "--device", "cpu", "--out", tmp_path / "o"]
    assert "are not finite; the last good" in bad(capsys, train, *resume, code=1)
    assert (tmp_path / "o" / "ckpt.pt").read_bytes() == before


def test_shares_that_the_parts_would_round_are_refused(tmp_path, capsys):
    args = [*SMALL, "--robust", "adv", "--iters", 1, "--reg-share", 0.25, "--out", tmp_path / "o"]
    assert "2 rows must divide by" in bad(capsys, train, *args, "--accum", 4)


def test_the_same_line_with_resume_continues(tmp_path, no_pictures):
    """--amp auto is kept by the name of what it chose."""
    args = [*SMALL[:-1], "auto", "--out", tmp_path / "o"]
    assert call(train, *args, "--iters", 1) == 0
    assert call(train, *args, "--iters", 2, "--resume") == 0


def test_a_share_of_whole_rows_in_decimals():
    """0.28 * 100 is not quite 28 in binary; it divides by 4 all the same."""
    flags = "--robust ran --batch-size 100 --accum 4 --reg-share 0.28".split()
    training.check(train.parse_args([*SMALL, *flags]), 1, train.OBJECTIVES)
    with pytest.raises(ValueError, match="--reg-share 0.3: 30 rows"):
        training.check(train.parse_args([*SMALL, *flags[:-1], "0.3"]), 1, train.OBJECTIVES)


def test_a_resumed_run_compiles_as_it_began(tmp_path, monkeypatch):
    """Nothing, after --no-compile."""
    seen = []

    def watched(device, parallel, compiled):
        seen.append(compiled)
        raise ValueError("seen")

    monkeypatch.setattr(torch.compiler, "set_stance", lambda stance: None)  # of this process
    flags = [*SMALL, "--out", tmp_path / "o"]
    assert call(train, *flags, "--iters", 1, "--no-compile") == 0
    monkeypatch.setattr(train, "setup", watched)
    assert call(train, "--out", tmp_path / "o", "--resume", "--iters", 2) == 2
    assert seen == [False]
