"""bench.py: it times train.py's step, its FLOPs and ratios are right, and compiling changes no
result."""

import functools
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cli import call

import bench
import sample
import train
import training
from data import CorruptedImages, load_images
from unet import PRESETS, UNet

CPU = torch.device("cpu")
SMALL = "--model tiny --image-size 8 --batch-size 4 --device cpu --threads 1".split()
SMALL += "--repeats 2 --seconds-per 0.001".split()


SHAPE = dict(channels=(32, 32), attention=(False, False), blocks=1, dropout=0.0)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    yield torch.set_num_threads(1)
    torch.set_num_threads(threads)


@pytest.fixture
def smaller(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", dict(SHAPE))


def run(out, *args):
    assert call(bench, *SMALL, "--out", out, *args) == 0
    return {row["name"]: row for row in json.loads((out / "metrics.json").read_text())["rows"]}


def small_net():
    torch.manual_seed(0)
    net = UNet(**SHAPE)
    # the zero it starts with would hide the attack
    torch.nn.init.normal_(net.conv_out.weight, std=0.02)
    return net


def batches(B=4, dropout=0.0):
    data = CorruptedImages(*load_images("synthetic:64", 8), 0.9, 0.2)
    return bench.draws(data, B, CPU, dropout)


def test_step_and_draws_are_those_of_train(tmp_path, smaller, monkeypatch):
    """Three steps of both from the same weights: equal bit for bit; what is timed is what is
    trained."""

    def generate(*args, **kwargs):  # no time for its last grid
        return torch.zeros(64, 3, 8, 8)

    monkeypatch.setattr(training, "generate", generate)
    monkeypatch.setitem(PRESETS["tiny"], "dropout", 0.1)
    flags = """--model tiny --image-size 8 --data synthetic:64 --batch-size 4 --robust adv --p 0.9
        --sigma 0.2 --iters 3 --paper --lr 2e-4 --warmup 0
        --sample-every 0 --device cpu --amp fp32"""
    assert call(train, *flags.split(), "--out", tmp_path) == 0
    expected = torch.load(tmp_path / "ckpt.pt", weights_only=True)["model"]
    torch.manual_seed(0)
    net = UNet(**PRESETS["tiny"]).to(memory_format=torch.channels_last)
    step, draw = bench.make_step(net, CPU, "fp32"), batches(dropout=0.1)
    for k in range(3):
        step("adv", draw(k))
    assert all(torch.equal(expected[name], value) for name, value in net.state_dict().items())


def test_flops_are_counted_passes():
    """The forward's convolutions by hand, then every method's passes, 3 F, 6 F and 8 F but for a
    few layers."""
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
    product = 2 * 16 * 16 * 32  # one of the two of the 16 pixels' attention
    embedding = time_in + 2 * 128 * 128 + 8 * 2 * 128 * 32  # not part of the way from x_t to eps
    full = 2 * F - conv_in - time_in
    attack = F - embedding
    step = bench.make_step(net, CPU, "fp32")
    flops = {}
    for method in bench.METHODS:
        with bench.FlopCounterMode(display=False) as counter:
            step(method, batch)
        flops[method] = counter.get_total_flops()
    # PyTorch versions differ in what they count of attention's backward: up to three products more
    assert 0 <= flops["none"] - (F + full) <= product
    assert flops["ran"] == flops["inv-ran"] == 2 * flops["none"]
    assert flops["adv"] == flops["inv-adv"]
    # on one row of the batch, as an eighth of it is less
    assert flops["late"] - flops["none"] == (flops["adv"] - flops["none"]) / len(batch["t"])
    assert 0 <= flops["adv"] - (F + attack + 2 * flops["none"]) <= 3 * product < embedding

    with torch.device("meta"), bench.FlopCounterMode(display=False) as counter:
        UNet(**PRESETS["ddpm"])(torch.zeros(1, 3, 32, 32), torch.zeros(1))
    assert (
        12.1e9 < counter.get_total_flops() < 12.5e9
    )  # 6.1 G multiply-adds of its convolutions and linears, and attention


def test_rounds_take_turns_and_ratios_are_taken_within_them(monkeypatch):
    """With a clock that slows down from round to round, the ratio of two calls stays exact."""
    now, pace = [0.0], [1.0]
    log = ""

    def clock():
        return now[0]

    def work(name, cost):
        nonlocal log
        log += name
        if name == "a" and log[-2:-1] == "b":  # a round begins
            pace[0] += 0.5
        now[0] += cost * pace[0]

    monkeypatch.setattr(bench, "Timer", functools.partial(bench.Timer, timer=clock))
    args = SimpleNamespace(seconds_per=12.0, repeats=3)
    calls = {"a": functools.partial(work, "a", 1.0), "b": functools.partial(work, "b", 3.0)}
    seconds = bench.interleaved(calls, args)
    rounds = re.findall("a+b+", log)
    assert len(rounds) == 3
    assert "".join(rounds) == log
    assert len(set(seconds["a"])) == 3  # the pace changes
    assert seconds["b"] / seconds["a"] == pytest.approx([3, 3, 3])
    given = {"a": np.array([1.0, 2, 4]), "b": np.array([3.0, 6, 12])}
    rows = bench.rows_of("s", given, 6, "a")
    assert rows[1]["speed"] == pytest.approx(1 / 3)
    assert rows[1]["speed quartiles"] == "0.333, 0.333"
    assert (rows[0]["img_s"], rows[0]["ms"]) == (3, 2000)
    assert rows[0]["img_s quartiles"] == "2.25, 4.5"


def test_command_leaves_its_tables(tmp_path, capsys, smaller):
    what = ["methods", "modes", "sampling"]
    rows = run(tmp_path, "--methods", "none", "adv", "--what", *what)
    assert set(rows) == {"none", "adv", "fp32", "bf16", "ddpm", "ddim", "heun"}
    assert rows["adv"]["GFLOP_img"] / rows["none"]["GFLOP_img"] == pytest.approx(8 / 3, rel=0.03)
    assert rows["none"]["cost"] == rows["none"]["speed"] == 1
    assert rows["adv"]["cost"] > 1
    ddpm = rows["ddpm"]  # a whole sample, computed
    assert ddpm["img_s"] * ddpm["ms"] / 1e3 == pytest.approx(4, rel=0.5)
    assert ddpm["network_calls"] == 1000
    assert [rows[s]["timed_calls"] for s in ("ddpm", "ddim", "heun")] == [4, 4, 3]
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert "1 threads" in record["device"]
    table = (tmp_path / "table.md").read_text()
    assert "| none |" in table
    assert "| bf16 |" in table
    assert table in capsys.readouterr().out


def test_timed_calls_are_the_networks(smaller, monkeypatch):
    """What `sampling` divides by: the calls of the network that a short run of each
    sampler makes."""
    calls = dict.fromkeys(("ddpm", "ddim", "heun"), 0)

    def generate(model, schedule, index, shape, seed, device, sampler, **options):
        def counted(x, t):
            calls[sampler] += 1
            return model(x, t)

        return sample.generate(counted, schedule, index, shape, seed, device, sampler, **options)

    monkeypatch.setattr(bench, "generate", generate)
    monkeypatch.setattr(bench, "interleaved", once)
    args = SimpleNamespace(model="tiny", amp="fp32", backend=None, batch_size=2)
    rows = bench.sampling(args, CPU, batches(2)(0))
    assert {row["name"]: row["timed_calls"] for row in rows} == calls


def once(calls, args):
    """In the place of bench.interleaved: each call is made, its time is a second."""
    for timed in calls.values():
        timed()
    return {name: np.ones(1) for name in calls}


def test_against_times_networks_of_equal_shape(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    for name in ("ddpm", "ddpm64", "tiny"):
        with torch.device("meta"):
            pair = UNet(**PRESETS[name]), bench.Reference(**PRESETS[name])
        sizes = [{tuple(p.shape) for p in net.parameters() if p.dim() == 4} for net in pair]
        assert sizes[0] == sizes[1]
    monkeypatch.setitem(PRESETS, "tiny", SHAPE)
    given = ([1.0, 2.0], [2.0, 8.0], [3.0, 3.0])
    seconds = dict(zip(("ours", "diffusers", "diffusers, channels_last"), given))

    def interleaved(calls, args):
        once(calls, args)
        return {name: np.array(seconds[name.split(": ")[1]]) for name in calls}

    monkeypatch.setattr(bench, "interleaved", interleaved)
    rows = run(tmp_path, "--what", "against")
    # to the network with the lower median, in each round
    assert len(rows) == 6
    for amp in ("fp32", "bf16"):
        assert rows[f"{amp}: ours"]["speed"] == 2.25
        assert rows[f"{amp}: diffusers"]["speed"] == 0.9375
        assert rows[f"{amp}: diffusers, channels_last"]["speed"] == 1


@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")),
    reason="torch.compile takes a C++ compiler",
)
def test_compiling_changes_no_result():
    """50 steps, none and adv in turn: the traced graphs of forward, backward and attack. (Inductor
    takes minutes on a CPU.)"""
    losses, draw = [], batches(2)
    for backend in (None, "aot_eager"):
        step = bench.make_step(small_net(), CPU, backend=backend)
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
    assert "--model mini" in refuse("--model", "mini", "--what", "against")
    assert "--amp fp16" in refuse("--amp", "fp16")
    assert "--device mps" in refuse("--device", "mps")
    assert not (tmp_path / "o").exists()
