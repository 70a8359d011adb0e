"""The benchmarks run and write what they print; how long things take is not tested."""

import json
import os
import subprocess
import sys
from pathlib import Path

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
