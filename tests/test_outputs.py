"""A folder has one owner at a time, and output that nobody reads does not stop the work."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli import call

import classifier
import outputs
import runtime

ROOT = Path(__file__).resolve().parents[1]
PLAIN = "import sys, time, outputs, runtime; sys.argv[0] = 'one.py'\n"


def script(text, *args, **options):
    """Python code as a process, with this repository's modules."""
    command = [sys.executable, "-c", PLAIN + text, *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, text=True, **options)


def test_a_folder_of_another_script_is_refused(tmp_path, capsys):
    (tmp_path / ".owner").write_text("train.py (process 1)\n")
    assert call(classifier, "--data", "synthetic:16", "--out", tmp_path, "--device", "cpu") == 2
    error = capsys.readouterr().err
    assert "holds the output of train.py; choose another --out" in error
    assert error.count("\n") == 1


def test_two_processes_do_not_write_in_one_folder(tmp_path, monkeypatch):
    hold = f"outputs.claim({str(tmp_path)!r}); print('held', flush=True); time.sleep(60)"
    process = script(hold, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == "held\n"
        monkeypatch.setattr(sys, "argv", ["one.py"])
        with pytest.raises(ValueError, match=rf"one.py \(process {process.pid}\) is writing"):
            outputs.claim(tmp_path)
    finally:
        process.kill()
        process.wait()
    outputs.claim(tmp_path)  # the lock went with its process
    outputs.release()


def test_a_reader_that_goes_away_does_not_stop_the_work(tmp_path):
    """As `script.py | head -1`, and as with stderr closed."""
    text = (
        "def main():\n"
        "    for i in range(2000): print('x' * 100, flush=True)\n"
        "    print('y', file=sys.stderr)\n"
        f"    open({str(tmp_path / 'done')!r}, 'w')\n"
        "runtime.cli(main)"
    )
    process = script(text, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    process.stderr.close()
    assert process.wait(120) == 0
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize(
    "error, code, line",
    [
        (ValueError("--p 2: too much"), 2, "x.py: --p 2: too much"),
        (FileNotFoundError(2, "No such file", "a"), 2, "x.py: [Errno 2] No such file: 'a'"),
        (OSError(28, "No space left on device"), 1, "x.py: [Errno 28] No space left on device"),
        (outputs.Failed("a: not saved"), 1, "x.py: a: not saved"),
        (MemoryError(), 1, "x.py: failed (MemoryError: MemoryError); TRACEBACK=1 shows where"),
        (RuntimeError("a\nb"), 1, "x.py: failed (RuntimeError: a); TRACEBACK=1 shows where"),
        (KeyboardInterrupt(), 128 + signal.SIGINT, "x.py: interrupted"),
    ],
)
def test_exit_codes(error, code, line, monkeypatch, capsys):
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", [os.path.join("somewhere", "x.py")])
    with pytest.raises(SystemExit) as end:
        runtime.cli(main)
    assert end.value.code == code
    assert capsys.readouterr().err == line + "\n"


def test_a_table(tmp_path):
    rows = [dict(name="a", share=1 / 3, ci=(0.1, 0.25)), dict(name="b", violated=["x", "y"])]
    outputs.write_table(tmp_path / "table.csv", rows)
    lines = (tmp_path / "table.csv").read_text().splitlines()
    assert lines == ["name,share,ci,violated", "a,0.3333,0.1000..0.2500,", "b,,,2"]


def test_colours_of_checkpoints():
    """Their methods' where these differ; else in turn, with the folders' names."""
    assert outputs.styles(dict(x="none", y="adv")) == dict(
        x=("#000000", "DDPM"), y=("#D55E00", "Robust_adv")
    )
    for methods in (dict(x="adv", y="adv"), dict(x="adv", y=None)):
        assert outputs.styles(methods) == dict(x=("#000000", "x"), y=("#D55E00", "y"))


def test_a_value_given_twice_is_refused():
    import argparse

    args = argparse.Namespace(knowledge=["white", "both", "white"], norm=["l2"])
    runtime.refuse_repeats(args, "norm")
    with pytest.raises(ValueError, match="--knowledge: white is given twice"):
        runtime.refuse_repeats(args, "norm", "knowledge")
