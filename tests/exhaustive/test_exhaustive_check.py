"""The exhaustive check itself: clean where it is run, whole after a kill, and able to find a fault."""

import json
import signal
import subprocess
import sys
import time

import check
import jax.numpy as jnp
import pytest
from jax import lax

from lowprec import formats


def run(state, *options) -> int:
    return check.main(["--state", str(state), "--chunk-bits", "16", "--limit", "1", *options])


def read(state) -> dict:
    return json.loads(state.read_text())["formats"]


def test_the_first_chunk_of_every_format_has_no_fault(tmp_path):
    state = tmp_path / "state.json"
    assert run(state) == 0
    assert read(state) == {name: {"chunks": 1, "culprits": []} for name in check.FORMATS}


def test_a_killed_check_goes_on_after_the_last_whole_chunk(tmp_path):
    state = tmp_path / "state.json"
    arguments = ["--formats", "e2m1fn", "--chunk-bits", "16", "--state", str(state)]
    with subprocess.Popen([sys.executable, check.__file__, *arguments], stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not state.exists() or read(state)["e2m1fn"]["chunks"] < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    done = read(state)["e2m1fn"]["chunks"]
    assert 3 <= done < 1 << 16
    assert run(state, "--formats", "e2m1fn") == 0
    assert read(state)["e2m1fn"]["chunks"] == done + 1


PLANTED = 0x3F880000  # 1.0625, halfway between two numbers of e4m3fn: 1 is even


@pytest.mark.parametrize(
    "function,view,expected,got",
    [
        ("round_to", "round_to, saturating", "0x3f800000", "0x3f900000"),
        ("encode", "encode", "0x00000038", "0x00000039"),
    ],
)
def test_a_fault_of_a_single_pattern_is_found(function, view, expected, got, tmp_path, monkeypatch, capsys):
    right = getattr(formats, function)

    def wrong(x, name, **options):
        up = jnp.where(lax.bitcast_convert_type(x, jnp.uint32) == PLANTED, x + 0.01, x)
        return right(up, name, **options)

    monkeypatch.setattr(formats, function, wrong)
    state = tmp_path / "state.json"
    assert run(state, "--formats", "e4m3fn") == 1
    culprit = {"view": view, "x": f"{PLANTED:#010x}", "expected": expected, "got": got}
    found = read(state)["e4m3fn"]["culprits"]
    assert culprit in found
    assert {each["x"] for each in found} == {culprit["x"]}
    assert {each["view"] for each in found} <= {view, function}
    assert f"{view} of 0x3f880000 gives {got}, not {expected}" in capsys.readouterr().out
    monkeypatch.undo()
    assert run(state, "--formats", "e4m3fn") == 1  # what was found is not forgotten
    assert read(state)["e4m3fn"]["chunks"] == 2


def test_other_sources_start_again_and_other_files_are_left_alone(tmp_path, capsys):
    state = tmp_path / "state.json"
    run(state, "--formats", "e5m2")
    stored = json.loads(state.read_text())
    stored["about"]["formats_sha256"] = "0"
    stored["formats"]["e5m2"]["chunks"] = 7
    state.write_text(json.dumps(stored))
    assert run(state, "--formats", "e5m2") == 0
    assert read(state)["e5m2"]["chunks"] == 1
    assert "starting again" in capsys.readouterr().out
    state.write_text('{"learning_rate": 1}')
    assert run(state) == 2
    assert state.read_text() == '{"learning_rate": 1}'
    assert "not the state of an exhaustive check" in capsys.readouterr().err
