"""What is shown while a run goes on: lines in a file, one line that changes on a terminal."""

import io
import time

import pytest

from lowprec.training.progress import Clock, Progress, duration

LINE = {"loss": 2.31, "bits_per_byte": 3.333, "grad_norm": 0.81, "lr": 3e-4, "tokens_per_second": 12_345.0}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(stream, steps=100):
    progress = Progress(steps, stream)
    progress.note("going on")
    for step in range(1, steps + 1):
        progress.step({"step": step, **LINE})
    return stream.getvalue()


def test_elsewhere_plain_lines_are_few():
    lines = shown(io.StringIO()).splitlines()
    assert lines[0] == "going on"
    assert lines[1].startswith("step 1/100    1%  loss 2.3100  bits/byte 3.333  grad 0.81  lr 3.0e-04  12.3k tok/s")
    assert lines[-1].startswith("step 100/100  100%") and lines[-1].endswith("eta 0:00")
    assert len(lines) == 3


@pytest.mark.parametrize("columns", [60, 80, 160])
def test_on_a_terminal_one_line_with_a_bar_changes_and_notes_stay(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = shown(Terminal())
    assert text.count("\n") == 2
    assert "\r\x1b[Kgoing on\n" in text
    last = text.split("\r")[-1].removesuffix("\x1b[K\n")
    assert last.startswith("step 100/100 100% |█") and last.endswith("tok/s eta 0:00")
    assert len(last) < columns
    assert ("lr 3.0e-04" in last) == (columns == 160)


def test_unknown_numbers_are_left_out():
    stream = io.StringIO()
    Progress(10, stream).step({"step": 3, "loss": None, "grad_norm": 1.0})
    assert stream.getvalue() == "step 3/10   30%  grad 1.00  eta ?\n"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (65, "1:05"), (59.6, "1:00"), (7_209, "2:00:09")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_the_clock_leaves_out_compiling_and_what_is_not_a_step():
    clock = Clock()
    time.sleep(0.05)
    clock.step_done(100)
    assert clock.tokens_per_second is None
    time.sleep(0.05)
    clock.restart()
    clock.step_done(100)
    assert clock.timed_tokens == 100 and clock.train_seconds < 0.04 < 0.1 <= clock.seconds


def test_the_clock_goes_on_where_it_stopped():
    clock = Clock.restore({"seconds": 100.0, "train_seconds": 50.0, "timed_tokens": 5000})
    assert clock.tokens_per_second == 100.0
    assert 100.0 <= clock.seconds < 110.0
    assert Clock.restore(clock.state()).state().keys() == clock.state().keys()
