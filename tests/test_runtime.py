"""The log's clock, signals that are ignored, and what the command line says."""

import codecs
import os
import signal

import pytest
import torch

import outputs
import runtime


def test_images_per_second_are_those_since_the_last_line(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(runtime.time, "time", lambda: clock[0])
    log = runtime.Log(tmp_path / "a.jsonl", 0, batch_size=10, device=torch.device("cpu"))
    rates = []

    def slow_diagnosis():
        clock[0] += 100.0
        return dict(found=1)

    for step in range(1, 10):
        clock[0] += 2.0
        log.add(dict(loss=torch.tensor(1.0)))
        if step % 3 == 0:
            line = log.flush(step, "", slow_diagnosis)
            rates.append(line["img_per_s"])
    assert rates == [5.0, 5.0, 5.0] and line["found"] == 1


@pytest.mark.parametrize("compiled", [None, False])
def test_no_compile_compiles_nothing(compiled):
    """Whatever a script hands to torch.compile."""
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph

    try:
        runtime.setup("cpu", compiled=compiled)
        torch.compile(lambda x: x + 1, backend=backend)(torch.zeros(2))
    finally:
        torch.compiler.set_stance("default")
    assert bool(calls) == (compiled is None)


@pytest.mark.parametrize("ignored", [True, False])
def test_an_ignored_signal_stays_ignored(ignored):
    """As under nohup, and of a shell's background job."""
    before = signal.getsignal(signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        interrupt = runtime.Interrupt()
        os.kill(os.getpid(), signal.SIGHUP)
        assert interrupt.asked(0) != ignored
    finally:
        signal.signal(signal.SIGHUP, before)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_text_that_a_terminal_cannot_show_is_shown_in_part(tmp_path):
    with open(tmp_path / "a", "w", encoding="ascii") as file:
        stream = outputs.Unread(file)
        stream.write("Fréchet\n")
        stream.write("distance\n")
    assert (tmp_path / "a").read_text() == "Fr\\xe9chet\ndistance\n"


def test_text_for_a_stream_that_cannot_be_reconfigured_is_shown_in_part(tmp_path):
    with codecs.open(str(tmp_path / "a"), "w", encoding="ascii") as file:
        stream = outputs.Unread(file)
        assert not hasattr(file, "reconfigure")
        stream.write("Fréchet\n")
        stream.write("distance\n")
    assert (tmp_path / "a").read_text() == "Fr\\xe9chet\ndistance\n"
