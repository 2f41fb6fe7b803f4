"""The list of commands, its stopping and continuing, and the verdicts of its table."""

import argparse
import json
import sys
import time
from pathlib import Path

import pytest
from cli import call

import reproduce
import runner
from outputs import Failed

ROOT = Path(reproduce.__file__).parent


def arguments(tmp_path, size="toy", **changes):
    args = dict(
        size=size,
        data="synthetic",
        test=None,
        data_root=f"{tmp_path}/data",
        inception_weights=None,
        skip=[],
        seed=0,
        memorization_features="pixels",
        device="cpu",
        work=f"{tmp_path}/runs",
        out=f"{tmp_path}/results",
    )
    return argparse.Namespace(**(args | changes))


@pytest.mark.parametrize("size", reproduce.SIZES)
def test_every_flag_exists(tmp_path, size):
    shared = (ROOT / "sample.py").read_text()
    for _, (script, *flags) in reproduce.commands(arguments(tmp_path, size, test="folder:x")):
        source = (ROOT / script).read_text()
        source += shared if "add_arguments(parser)" in source else ""
        source += (ROOT / "bench.py").read_text() if script == "bench.py" else ""
        for flag in (f.replace("--no-png", "--png") for f in flags if f.startswith("--")):
            assert f'"{flag}"' in source, (script, flag)


def test_paths_with_spaces_stay_whole(tmp_path):
    args = arguments(tmp_path / "my runs", data="folder:my images", test="folder:my test")
    flags = [flag for _, argv in reproduce.commands(args) for flag in argv]
    assert "folder:my images" in flags and not any(flag.startswith("images") for flag in flags)
    assert all(" " not in flag or "my " in flag for flag in flags)


@pytest.mark.parametrize("size", ["short", "full"])
def test_only_inception_is_called_fid(tmp_path, size):
    """Never a stand-in under that name, with or without a local copy of the weights."""
    for weights in (None, "w.pth"):
        todo = reproduce.commands(arguments(tmp_path, size, inception_weights=weights))
        assert not any("--features" in argv for _, argv in todo if argv[0] != "memorization.py")
        assert not any(argv[0] == "classifier.py" for _, argv in todo)


def test_full_holds_what_the_tables_of_p1_need(tmp_path):
    todo = [argv for _, argv in reproduce.commands(arguments(tmp_path, "full"))]
    lines = [" ".join(argv) for argv in todo]
    for data in ("celeba", "lsun-bedroom"):
        trained = [line for line in lines if f"--data {data} " in line and line[:5] == "train"]
        assert len(trained) == 3 and all("--model ddpm64" in line for line in trained)
    memorised = [line for line in lines if "--n 50000" in line]
    assert len(memorised) == 2 and all(line.startswith("sample.py") for line in memorised)
    assert any("naive truncated" in line and " 500 " in line for line in lines)
    for flag in ("--lam 0.1", "--lam 1 ", "inv-adv --paper --seed"):
        assert any(flag in line for line in lines), flag


def test_inception_replaces_the_classifier(tmp_path):
    todo = reproduce.commands(arguments(tmp_path, inception_weights="w.pth"))
    assert not any("classifier.py" in argv for _, argv in todo)
    assert (
        sum("--inception-weights w.pth" in " ".join(argv) for _, argv in todo)
        == 2 * len(reproduce.ROWS) + 2
    )


def record(path, **numbers):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(numbers))
    return path


def test_finished(tmp_path):
    assert not runner.finished(tmp_path / "metrics.json")
    assert not runner.finished(record(tmp_path / "metrics.json", step=7, args=dict(iters=8)))
    assert runner.finished(record(tmp_path / "metrics.json", step=8, args=dict(iters=8)))
    other = record(
        tmp_path / "b/metrics.json", FID=3.2, command="python train.py --seed 0 --resume"
    )
    assert runner.finished(other) and runner.finished(other, ["train.py", "--seed", "0"])
    with pytest.raises(ValueError, match="not of these settings"):
        runner.finished(other, ["train.py", "--seed", "1"])


def test_table_verdicts(tmp_path):
    """adv under noise must lower the distance, on clean data it raises it in P1; inv-adv must do
    worse."""
    values = {
        "none-0.9-0.2": 90,
        "adv-0.9-0.2": 30,
        "inv-adv-0.9-0.2": 80,
        "none-0": 10,
        "adv-0": 20,
        "adv-eps-0.9-0.2": 50,
    }
    for name, distance in values.items():
        record(
            tmp_path / f"runs/{name}/ddpm/metrics.json",
            **{"Fréchet distance in c.pt features": distance},
            class_score=2.0,
            n=4,
            noise_level=0.1,
            device="cpu",
        )
    lines = reproduce.table(arguments(tmp_path))
    verdict = {line.split("|")[1].strip(): line.split("|")[-2].strip() for line in lines[2:13]}
    assert verdict == {
        "none-0.9-0.2": "-",
        "adv-0.9-0.2": "yes",
        "late-0.9-0.2": "not run",
        "adv-eps-0.9-0.2": "-",
        "ran-0.9-0.2": "not run",
        "inv-adv-0.9-0.2": "no",
        "none-0": "-",
        "adv-0": "yes",
        "none-0.9-0.1": "not run",
        "adv-0.9-0.1": "not run",
        "ran-0.9-0.1": "not run",
    }
    assert "102.7 / 4.19" in lines[2] and "90 / 2" in lines[2] and "0.100" in lines[2]
    records = json.loads((tmp_path / "results/records.json").read_text())
    assert records["adv-0 ddpm"]["class_score"] == 2


def test_stops_and_continues(tmp_path):
    """At the deadline a training is stopped, and saves; the same line continues it from there."""
    out = tmp_path / "run"

    class Deadline(float):  # passes as soon as the first steps are logged
        def __sub__(self, now):
            for _ in range(600):
                if (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text():
                    break
                time.sleep(0.1)
            return 0.0

    argv = (
        "train.py --model mini --image-size 8 --data synthetic:64 --batch-size 4 --iters {} "
        f"--sample-every 0 --device cpu --data-root {tmp_path} --out {out}"
    )
    assert not runner.run(out / "metrics.json", argv.format(100_000).split(), Deadline(1))
    stopped = json.loads((out / "metrics.json").read_text())["step"]
    assert 0 < stopped < 100_000
    assert runner.run(out / "metrics.json", argv.format(stopped + 2).split(), None)
    assert json.loads((out / "metrics.json").read_text())["step"] == stopped + 2
    with pytest.raises(Failed, match="none/metrics.json is missing"):
        runner.run(tmp_path / "none/metrics.json", ["losses.py"], None)
    with pytest.raises(Failed, match="--minutes"):
        runner.run(
            tmp_path / "none/metrics.json",
            ["sample.py", "--ckpt", f"{out}/ckpt.pt", "--device", "cpu"],
            time.time(),
        )


@pytest.mark.parametrize(
    "flags, message",
    [
        ("toy --data folder:x", "--test"),
        ("toy --data folder:x --test folder:x", "no such folder"),
        ("full --inception-weights nowhere", "no such file"),
        ("toy --memorization-features nowhere", "no such file"),
        ("toy --skip adv-0", "--skip adv-0"),
    ],
)
def test_bad_input(monkeypatch, flags, message):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *flags.split(), "--dry-run"])
    with pytest.raises(ValueError, match=message):
        reproduce.main()


@pytest.mark.parametrize("flags", ["--data cifar10", "--data-root elsewhere", "--work w"])
def test_first_refuses_what_it_does_not_read(flags, capsys):
    """Also where it is the default of the other lists."""
    assert call(reproduce, "first", *flags.split()) == 2
    assert "has no effect with first" in capsys.readouterr().err


def test_first_writes_each_folder_once(tmp_path):
    """The samples do not fall on the networks they are of."""
    todo = reproduce.first(arguments(tmp_path, "first"))
    trained = [done.parent for done, argv in todo if argv[0] == "train.py"]
    (argv,) = [argv for _, argv in todo if argv[0] == "compare.py"]
    out = Path(argv[argv.index("--out") + 1])
    assert len(trained) == 2
    assert not {out / folder.name for folder in trained} & {out, *trained}
    assert all(str(folder) in argv for folder in trained)
