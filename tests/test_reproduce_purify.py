"""reproduce_purify.py, purify_cost.py: every table and figure of P2 has its commands, every command
its flags, and the cost is what a count by hand gives."""

import json
import sys
from pathlib import Path

import pytest
import torch
from cli import call
from torch import nn

import classifier
import purify
import purify_cost
import reproduce
import reproduce_purify
import runner

ROOT = Path(reproduce.__file__).parent


def found(tmp_path, *argv):
    args = reproduce_purify.parse_args([*argv, "--work", f"{tmp_path}/w"])
    return reproduce_purify.commands(args)


@pytest.mark.parametrize("size", reproduce_purify.SIZES)
def test_every_table_and_figure_of_p2_is_named(tmp_path, size):
    lines = reproduce_purify.purposes(found(tmp_path, size))
    for name in [f"Table {i}" for i in range(1, 16)] + [f"Fig. {i}" for i in range(1, 10)]:
        assert len([line for line in lines if line.startswith(name + ":")]) >= 1, name
    without = {line.split(":")[0] for line in lines if "not run" in line}
    only_full = {"Table 4", "Table 6"} if size == "toy" else set()
    assert without == {"Table 8", "Fig. 4", "Fig. 5"} | only_full


@pytest.mark.parametrize("size", reproduce_purify.SIZES)
def test_every_command_is_one_that_its_script_takes(tmp_path, size):
    """purify.py's are parsed; every flag of the others exists; a checkpoint is made before it is
    used."""
    specs = ["--classifiers", "torchvision:vgg16:v.pth"]
    made = {"v.pth"}
    for done, (script, *flags) in found(tmp_path, size, *specs).todo:
        source = "".join((ROOT / name).read_text() for name in (script, "sample.py"))
        for flag in (f.replace("--no-png", "--png") for f in flags if f.startswith("--")):
            assert f'"{flag}"' in source, (script, flag)
        if script == "purify.py":
            purify.parse(flags)
        for path in [f for f in flags if f.startswith(f"{tmp_path}/w/") and f != str(done.parent)]:
            assert any(path == folder or path.startswith(folder + "/") for folder in made), path
        assert str(done.parent) not in made
        made.add(str(done.parent))


def test_full_has_the_settings_of_p2(tmp_path):
    lines = [" ".join(argv) for _, argv in found(tmp_path, "full").todo]
    methods = next(line for line in lines if line.endswith("w/methods"))
    assert "--norm linf l2" in methods and "--n 1024" in methods and "--nfe" not in methods
    for nfe in (5, 10, 20, 50):
        assert sum(f"--nfe {nfe} " in line for line in lines) == 5
    eots = [line for line in lines if "/eot-sweep-" in line]
    assert [int(line.split("--eot ")[1].split()[0]) for line in eots] == [2**i for i in range(10)]
    assert any("semi-128" in line and "--landscape" in line for line in lines)
    for flag in (
        "--addt-guide none",
        "--addt-guide mse",
        "--addt-perturb linf",
        "--addt-unit 0.02",
    ):
        assert any(flag in line for line in lines), flag
    aa = [line for line in lines if "aa-rand" in line]
    assert len(aa) == 3 and "--knowledge both semi-8" in aa[2] and "--eot 1 " in aa[1]
    assert "--eot" not in aa[0].replace("--eot-batch", "")  # its own default, 20
    for data in ("cifar100", "tiny-imagenet"):
        assert any(line.startswith("train.py") and f"--data {data} " in line for line in lines)


def test_a_trained_ddpm_is_used_where_it_is(tmp_path):
    (tmp_path / "ddpm-cifar10-32").mkdir()
    todo = found(tmp_path, "full", "--ddpm", f"{tmp_path}/ddpm-cifar10-32").todo
    assert "--robust" in todo[1][1] and todo[0][1][0] == "classifier.py"
    argv = next(argv for done, argv in todo if done.parent.name == "methods")
    assert argv[argv.index("--ckpt") + 1] == f"{tmp_path}/ddpm-cifar10-32"
    with pytest.raises(ValueError, match="--ddpm"):
        found(tmp_path, "full", "--ddpm", f"{tmp_path}/none")


def test_dry_run_of_the_command(tmp_path, capsys):
    argv = ["purify", "toy", "--data", "synthetic:64", "--work", tmp_path / "w", "--dry-run"]
    assert call(reproduce, *argv) == 0
    out = capsys.readouterr().out
    assert "Table 15: units-nfe-5" in out and "FLOP" in out and "python purify.py" in out
    assert not (tmp_path / "w").exists()
    assert call(reproduce, "purify", "toy", "--data", "folder:none", "--dry-run") == 2


# the cost -----------------------------------------------------------------------------------------


def test_calls_of_a_purification():
    wanted = {"ddpm": 101, "ddim": 101, "gdmp-ssim": 4 * 37, "edm-sde": 99, "vp-sde-corrector": 202}
    for sampler, number in wanted.items():
        assert purify_cost.calls(sampler, None) == number, sampler
    assert purify_cost.calls("ddpm", 5) == 6


def test_flop_of_a_network_by_hand():
    """Two for each multiplication of a convolution and of the last layer."""
    net = classifier.WideResNet(**classifier.PRESETS["small"], classes=10).eval()
    counted = []

    def count(module, inputs, output):
        each = module.weight[0].numel()
        counted.append(2 * each * output[0].numel())

    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    with torch.no_grad():
        net(torch.zeros(1, 3, 32, 32))
    assert purify_cost.flops("classifier", "small", 32) == sum(counted)


def test_a_white_box_row_is_three_quarters_of_an_exaflop():
    """1,024 images, PGD-20, EoT-10, 101 calls, each gradient three passes; 32 more of the
    judges."""
    flags = "--ckpt a --classifier c --data cifar10 --n 1024 --purifier none ddpm --knowledge white"
    passes, flop = purify_cost.cost_of(["purify.py", *flags.split()], "ddpm", 32, "wrn-28-10")
    assert passes == 1024 * 101 * (20 * 10 * 3 + 4 + 2 * 10)
    assert 0.7e18 < flop < 0.85e18
    more, _ = purify_cost.cost_of(["purify.py", *flags.split(), "both"], "ddpm", 32, "wrn-28-10")
    assert more - passes == 1024 * 101 * (20 * 3 + 4 + 2)


def test_cost_in_words():
    assert purify_cost.in_words(1.25e14) == "125 TFLOP" and purify_cost.in_words(0) == "0 FLOP"
    assert purify_cost.in_words(3.43e19).startswith("34.3 EFLOP, 1 days of an H100")


def test_cost_of_training():
    one = purify_cost.flops("unet", "mini", 16)
    argv = "train.py --model mini --iters 10".split()
    assert purify_cost.cost_of(argv, "mini", 16, "small") == (10 * 64 * 3, 10 * 64 * 3 * one)
    argv = "train.py --robust addt --model mini --iters 10 --addt-guide none".split()
    assert purify_cost.cost_of(argv, "mini", 16, "small")[0] == 10 * 64 * 3
    argv = "train.py --robust addt --model mini --iters 10 --classifier c".split()
    assert purify_cost.cost_of(argv, "mini", 16, "small")[0] == 10 * 64 * 13


# what comes out -----------------------------------------------------------------------------------


def test_the_table_names_its_tables_and_p2s_number(tmp_path):
    todo = found(tmp_path, "toy")
    row = dict(purifier="ddpm", norm="l2", knowledge="white", clean=0.5, robust=0.25, calls=6)
    row |= dict(clean_ci=(0.4, 0.6), robust_ci=(0.2, 0.3), checkpoint="addt")
    for folder, kind in (("methods", "linf"), ("eot-sweep-1", "linf"), ("nfe-2", "linf")):
        out = tmp_path / "w" / folder
        out.mkdir(parents=True)
        runs = [row, row | dict(norm=kind, checkpoint="ddpm")]
        (out / "metrics.json").write_text(json.dumps(dict(runs=runs)))
    rows = reproduce_purify.read_rows(todo)
    lines = reproduce_purify.table(todo, rows)
    assert lines[2].startswith("| Table 1, Table 2, Table 9, Table 11 | methods | addt | ddpm | l2")
    assert lines[2].endswith("| 50.0 (40.0–60.0) | 25.0 (20.0–30.0) | 85.64 / 70.12 |")
    assert lines[3].endswith("| 85.94 / 47.27 |") and lines[4].endswith("| - |")
    reproduce_purify.plot_sweeps(rows, tmp_path / "sweeps.png")
    assert (tmp_path / "sweeps.png").stat().st_size > 5000


def test_a_stopped_attack_is_resumed_by_the_list(tmp_path, monkeypatch):
    seen = []

    class Popen:
        def __init__(self, command, preexec_fn=None):
            seen.append(command)
            (tmp_path / "metrics.json").write_text("{}")

        def wait(self, timeout=None):
            return 0

    monkeypatch.setattr(runner.subprocess, "Popen", Popen)
    argv = ["purify.py", "--out", str(tmp_path)]
    assert runner.run(tmp_path / "metrics.json", argv, None)
    (tmp_path / "rows-0.pt").touch()
    assert runner.run(tmp_path / "metrics.json", argv, None)
    start = [sys.executable, str(ROOT / "purify.py"), "--out", str(tmp_path)]
    assert seen == [start, [*start, "--resume"]]
