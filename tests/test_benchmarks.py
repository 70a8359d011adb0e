"""The benchmarks run and write what they print; how long things take is not tested."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.supervisor import supervise

ROOT = Path(__file__).parents[1]


def benchmark(name: str, *arguments, **environment) -> list[str]:
    """The lines that it prints."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


def test_formats_gives_a_row_for_each_size(tmp_path):
    table = tmp_path / "table.json"
    lines = benchmark("formats", "--seconds", "0", "--only", "pack 4 bits", "--json", str(table))
    rows = json.loads(table.read_text())["pack 4 bits"]
    assert [row["elements"] for row in rows] == [1 << 24, 1 << 19]
    assert all(row[name] > 0 for row in rows for name in ("cpu_ns", "wall_ns", "cpu", "wall"))
    assert lines[-1].startswith("pack 4 bits")


def test_a_peer_that_fails_is_a_row_of_the_table(tmp_path):
    (tmp_path / "pychop").mkdir()
    (tmp_path / "pychop/__init__.py").write_text("raise RuntimeError('no such backend')")
    (tmp_path / "pychop-9.dist-info").mkdir()
    (tmp_path / "pychop-9.dist-info/METADATA").write_text("Name: pychop\nVersion: 9\n")
    lines = benchmark("formats", "--seconds", "0", "--only", "pychop", PYTHONPATH=str(tmp_path))
    assert "'pychop': '9'" in lines[0]
    failures = [line.partition("failed: ")[2] for line in lines[-2:]]
    assert failures == ["RuntimeError: no such backend"] * 2


def test_saved_activations_are_fewer_bytes(tmp_path):
    table = tmp_path / "table.json"
    small = ("--layers", "2", "--width", "32", "--heads", "2", "--batch", "2", "--seq-len", "32")
    benchmark("saved_activations", "--only", "fp8 all", *small, "--json", str(table))
    found = json.loads(table.read_text())
    assert found["fp8 all"]["residuals"] < 0.5 * found["plain"]["residuals"]


def test_optimizers_of_few_bits_have_few_bytes(tmp_path):
    table = tmp_path / "table.json"
    benchmark("optimizers", "--millions", "0.05", "--seconds", "0", "--only", "adam8", "--json", str(table))
    found = json.loads(table.read_text())
    assert set(found) == {"adam8", "adam8, fused"}
    # A scale for each of 64 columns: 4 bytes of v, 2 of m.
    assert all(row["state_bytes"] < 2.15 * 50_000 and row["cpu"] > 0 for row in found.values())


# Keeps its results as a process that measures does; cases called "hang" and "die" do so.
WORKER = """
import json, os, pathlib, sys, time
path, names = pathlib.Path(sys.argv[1]), sys.argv[2:]
found = json.loads(path.read_text())["cases"] if path.exists() else {}
def write(running):
    text = json.dumps({"machine": {"device": "stub"}, "running": running, "cases": found})
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").replace(path)
for name in names:
    if name not in found:
        write(name)
        if name == "hang":
            time.sleep(60)
        if name == "die":
            os.abort()
        found[name] = {"status": "measured"}
        write(None)
"""


def supervised(path, *names, wall=60.0, case_seconds=3.0):
    """(whether it ended by itself, {case: status or error})"""
    command = lambda left: [sys.executable, "-c", WORKER, str(path), *names]
    done = supervise(command, path, end=time.monotonic() + wall, case_seconds=case_seconds)
    cases = json.loads(path.read_text())["cases"] if path.exists() else {}
    return done, {name: record.get("error", record["status"]) for name, record in cases.items()}


def test_a_case_that_hangs_or_kills_its_process_loses_only_itself(tmp_path):
    assert supervised(tmp_path / "results.json", "first", "hang", "second", "die", "last") == (
        True,
        {
            "first": "measured",
            "hang": "took more than 3 s",
            "second": "measured",
            "die": "ended with status -6",
            "last": "measured",
        },
    )


def test_the_case_that_runs_when_the_time_is_over_has_not_failed(tmp_path):
    done, cases = supervised(tmp_path / "results.json", "first", "hang", wall=2.0, case_seconds=50.0)
    assert not done and cases == {"first": "measured"}
    assert json.loads((tmp_path / "results.json").read_text())["running"] is None


def test_a_process_that_cannot_start_is_not_started_again(tmp_path):
    started = []
    command = lambda left: started.append(left) or [sys.executable, "-c", "raise SystemExit(3)"]
    assert not supervise(command, tmp_path / "none.json", end=time.monotonic() + 60, case_seconds=50)
    assert len(started) == 1


def test_products_for_a_gpu_are_right_at_tiny_shapes(capsys):
    assert gpu.selftest("calibration,xla/int8", None) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "3 of 3 are right"


def test_a_gpu_that_is_not_there_is_bad_usage(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", f"--output={tmp_path}"]
    environment = os.environ | {"PATH": str(tmp_path)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and "nvidia-smi finds no GPU" in result.stderr and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_every_case_for_a_gpu_is_right_at_tiny_shapes():
    """Kernels interpreted; some two minutes."""
    assert gpu.selftest("", None) == 0


@pytest.mark.slow
def test_every_program_for_a_gpu_can_be_made():
    assert gpu.lower("", "NVIDIA H200") == 0
