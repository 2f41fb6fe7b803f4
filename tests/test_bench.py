"""bench.py: it times train.py's step, its FLOPs and ratios are right, and compiling changes no result."""

import csv
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cli import call

import bench
import train
from data import CorruptedImages, load_images
from unet import PRESETS, UNet

CPU = torch.device("cpu")
SMALL = "--model tiny --image-size 8 --batch-size 4 --device cpu --repeats 2 --seconds-per 0.001 --threads 1".split()


SHAPE = dict(channels=(32, 32), attention=(False, False), blocks=1, dropout=0.0)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    yield torch.set_num_threads(1)
    torch.set_num_threads(threads)


@pytest.fixture
def smaller(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", SHAPE)


def run(out, *args):
    assert call(bench, *SMALL, "--out", out, *args) == 0
    with (out / "table.csv").open() as f:
        return {row["name"]: row for row in csv.DictReader(f)}


def small_net():
    torch.manual_seed(0)
    net = UNet(**SHAPE)
    torch.nn.init.normal_(
        net.conv_out.weight, std=0.02
    )  # the zero it starts with would hide the attack
    return net


def batches(B=4):
    return bench.draws(CorruptedImages(*load_images("synthetic:64", 8), 0.9, 0.2), B, CPU)


def test_step_and_draws_are_those_of_train(tmp_path, smaller, monkeypatch):
    """Three steps of both from the same weights: equal bit for bit, so that what is timed is what is trained."""
    monkeypatch.setattr(
        train, "generate", lambda *args, **kw: torch.zeros(64, 3, 8, 8)
    )  # no time for its last grid
    flags = "--model tiny --image-size 8 --data synthetic:64 --batch-size 4 --robust adv --p 0.9 --sigma 0.2 --iters 3"
    flags = [*flags.split(), "--reg-last", 1, "--reg-share", 1]
    assert (
        call(
            train,
            *flags,
            "--lr",
            2e-4,
            "--warmup",
            0,
            "--sample-every",
            0,
            "--device",
            "cpu",
            "--out",
            tmp_path,
        )
        == 0
    )
    expected = torch.load(tmp_path / "ckpt.pt", weights_only=True)["model"]
    torch.manual_seed(0)
    net = UNet(**PRESETS["tiny"]).to(memory_format=torch.channels_last)
    step, draw = bench.training(net, CPU), batches()
    for k in range(3):
        step("adv", draw(k))
    assert all(torch.equal(expected[name], value) for name, value in net.state_dict().items())


def test_flops_are_counted_passes():
    """The forward's convolutions by hand, then every method's passes, 3 F, 6 F and 8 F but for a few layers, exactly."""
    net, batch = small_net(), {k: v[:1] for k, v in batches()(0).items()}
    with bench.FlopCounterMode(display=False) as counter:
        net(batch["x0"], batch["t"])
    layers = (
        [(9, 8, 3, 32)] + 2 * [(9, 8, 32, 32)] + 7 * [(9, 4, 32, 32)]
    )  # taps, size, c_in, c_out: down and middle
    layers += 2 * [(9, 4, 64, 32), (1, 4, 64, 32), (9, 4, 32, 32)] + [(9, 8, 32, 32)]  # up
    layers += 2 * [(9, 8, 64, 32), (1, 8, 64, 32), (9, 8, 32, 32)] + [(9, 8, 32, 3)]
    convs = counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
    assert convs == 2 * sum(taps * s * s * i * o for taps, s, i, o in layers)

    F = counter.get_total_flops()
    conv_in, time_in = 2 * 8 * 8 * 9 * 3 * 32, 2 * 32 * 128  # their inputs need no gradient
    scores = (
        2 * 16 * 16 * 32
    )  # of the 16 pixels' attention, the first of its two products: its backward repeats it
    embedding = time_in + 2 * 128 * 128 + 8 * 2 * 128 * 32  # not part of the way from x_t to eps
    full, attack = (
        2 * F - conv_in - time_in + scores,
        F - embedding + 3 * scores,
    )  # backwards; both factors are activations
    flops = {m: bench.flops_of(net, m, batch) for m in bench.METHODS}
    assert flops["none"] == F + full
    assert flops["ran"] == flops["inv-ran"] == 2 * (F + full)
    assert flops["adv"] == flops["inv-adv"] == 3 * F + attack + 2 * full
    assert all(p.grad is None for p in net.parameters())

    with torch.device("meta"), bench.FlopCounterMode(display=False) as counter:
        UNet(**PRESETS["ddpm"])(torch.zeros(1, 3, 32, 32), torch.zeros(1))
    assert (
        12.1e9 < counter.get_total_flops() < 12.5e9
    )  # 6.1 G multiply-adds of its convolutions and linears, and attention


def test_rounds_take_turns_and_ratios_are_taken_within_them(monkeypatch):
    """With a clock that slows down from round to round, the ratio of two calls stays exact."""
    now, log, pace = [0.0], [], [1.0]
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def work(name, cost):
        log.append(name)
        pace[0] += 0.5 * (name == "b" and len(log) > 4)
        now[0] += cost * pace[0]

    args = SimpleNamespace(seconds_per=3.0, repeats=3, worker=None)
    seconds = bench.interleaved(
        {"a": lambda: work("a", 1.0), "b": lambda: work("b", 3.0)}, args, CPU
    )
    assert (
        "".join(log) == "aabb" + 3 * "aaaabb"
    )  # two to start; a warm-up before 3 or 1 timed calls
    rows = bench.rows_of(
        "s", {"a": np.array([1.0, 2, 4]), "b": np.array([3.0, 6, 12])}, dict(a=6, b=6), "a"
    )
    assert seconds["a"][0] == 1 and len(seconds["b"]) == 3 and seconds["a"][2] > seconds["a"][0]
    assert [rows[1][k] for k in ("speed", "speed_q25", "speed_q75")] == pytest.approx([1 / 3] * 3)
    assert [rows[0][k] for k in ("img_s_q25", "img_s", "img_s_q75", "ms")] == [2.25, 3, 4.5, 2000]


def test_command_leaves_its_tables(tmp_path, capsys, smaller):
    rows = run(
        tmp_path, "--methods", "none", "adv", "--what", "methods", "sampling", "loader", "profile"
    )
    assert set(rows) == {"none", "adv", "ddpm", "ddim", "heun", "fixed batch", "batch, draws, log"}
    assert float(rows["adv"]["GFLOP_img"]) / float(rows["none"]["GFLOP_img"]) == pytest.approx(
        8 / 3, rel=0.03
    )
    assert (
        float(rows["adv"]["cost"]) > 1
        and float(rows["none"]["cost"]) == float(rows["none"]["speed"]) == 1
    )
    assert all(
        float(r["img_s_q25"]) <= float(r["img_s"]) <= float(r["img_s_q75"]) for r in rows.values()
    )
    ddpm = rows["ddpm"]  # a whole sample, computed
    assert (
        float(ddpm["img_s"]) * float(ddpm["ms"]) / 1e3 == pytest.approx(4, rel=0.5)
        and ddpm["network_calls"] == "1000"
    )
    assert [rows[s]["timed_calls"] for s in ("ddpm", "ddim", "heun")] == ["4", "4", "3"]
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert (
        record["hardware"]["threads"] == 1
        and record["hardware"]["cpu"]
        and len(record["rows"]) == 7
    )
    assert (
        "| none |" in (tmp_path / "table.md").read_text()
        and (tmp_path / "bench.png").stat().st_size > 5000
    )
    assert "adv: host syncs per step" in capsys.readouterr().out
    assert "convolution_backward" in (tmp_path / "profile.txt").read_text()


def test_against_times_networks_of_equal_shape(tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    for name in ("ddpm", "ddpm64", "tiny"):
        with torch.device("meta"):
            sizes = [
                {tuple(p.shape) for p in net.parameters() if p.dim() == 4}
                for net in (UNet(**PRESETS[name]), bench.Reference(32, **PRESETS[name]))
            ]
        assert sizes[0] == sizes[1]
    monkeypatch.setitem(PRESETS, "tiny", SHAPE)
    seconds = dict(
        zip(("ours", "diffusers", "diffusers, channels_last"), ([1.0, 2.0], [2.0, 8.0], [3.0, 3.0]))
    )

    def interleaved(calls, args, device):  # each step is made, its time is given
        return {
            name: call() and np.array(seconds[name.removeprefix("fp32: ")])
            for name, call in calls.items()
        }

    monkeypatch.setattr(bench, "interleaved", interleaved)
    rows = run(tmp_path, "--against", "diffusers", "--amp", "fp32")
    speed = {
        name: float(row["speed"]) for name, row in rows.items()
    }  # to the network with the lower median, in each round
    assert speed == {
        "fp32: ours": 2.25,
        "fp32: diffusers": 0.9375,
        "fp32: diffusers, channels_last": 1,
    }
    assert json.loads((tmp_path / "metrics.json").read_text())["diffusers"] == diffusers.__version__


def test_scaling_over_two_nodes(tmp_path, monkeypatch):
    """Two agents, a process each, meet and step together; then the table's arithmetic with given times."""
    args = SimpleNamespace(
        out=tmp_path,
        backend=None,
        threads=1,
        model="tiny",
        image_size=8,
        batch_size=2,
        amp="fp32",
        repeats=2,
        seconds_per=0.001,
        processes=3,
        nodes=1,
    )
    seconds = bench.torchrun(args, CPU, 2, 2)
    assert len(seconds) == 2 and (seconds > 0).all()
    monkeypatch.setattr(
        bench, "torchrun", lambda args, device, n, nodes: np.array([1.0 + 0.25 * (n - 1)])
    )
    rows = {r["name"]: r for r in bench.scaling(args, CPU, None)}
    assert list(rows) == ["1 process", "2 processes", "3 processes"]
    assert [rows["3 processes"][k] for k in ("img_s", "speed", "efficiency")] == pytest.approx(
        [6 / 1.5, 2, 2 / 3]
    )


@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")),
    reason="torch.compile takes a C++ compiler",
)
def test_compiling_changes_no_result():
    """50 steps, none and adv in turn: the traced graphs of forward, backward and attack. (Inductor takes minutes on a CPU.)"""
    losses, draw = [], batches(2)
    for backend in (None, "aot_eager"):
        step = bench.training(small_net(), CPU, backend=backend)
        losses.append(
            torch.stack([step(("none", "adv")[k % 2], draw(k))["loss"] for k in range(50)])
        )
    assert losses[0].std() > 0.05
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)


def test_refuses_bad_input(tmp_path, capsys):
    def refuse(*args):
        assert call(bench, *SMALL, "--out", tmp_path / "o", *args) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "--repeats 0" in refuse("--repeats", 0)
    assert "--threads 0" in refuse("--threads", 0)
    assert "--batch-size -1" in refuse("--batch-size", -1)
    assert "--seconds-per nan" in refuse("--seconds-per", "nan")
    assert "--image-size 10" in refuse("--image-size", 10)
    assert "twice" in refuse("--methods", "none", "none")
    assert "--nodes 2" in refuse("--nodes", 2, "--processes", 1)
    assert "--model mini" in refuse("--model", "mini", "--against", "diffusers")
    assert "--amp fp16" in refuse("--amp", "fp16")
    assert "--device mps" in refuse("--device", "mps")
    assert not (tmp_path / "o").exists()
