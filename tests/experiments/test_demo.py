"""`make demo` in miniature: it trains all four, can be stopped and goes on, and is not repeated."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = {
    "data.name": "markov_text/size16384", "data.seq_len": 16, "model.layers": 1, "model.width": 16, "model.heads": 1,
    "train.steps": 30, "train.batch_size": 4, "eval.every": 10, "eval.batches": 2, "eval.health": False,
}  # fmt: skip


@pytest.fixture
def demo(tmp_path):
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    config = {**SMALL, "data.data_dir": str(tmp_path / "data")}
    overrides = [f"--config.{key}={value}" for key, value in config.items()]
    command = [sys.executable, "-m", "experiments.demo", f"--workdir={tmp_path / 'runs'}", *overrides]
    return lambda: subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_trains_all_recipes_survives_ctrl_c_and_is_not_repeated(demo, tmp_path):
    first = demo()
    while first.poll() is None and not list(tmp_path.glob("runs/*/metrics.jsonl")):
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 130 and "the same command goes on from here" in output and "Traceback" not in output

    output, _ = demo().communicate(timeout=240)
    assert "Traceback" not in output
    rows = [line.split("|") for line in output.splitlines() if line.startswith("| ")]
    assert [row[2].strip() for row in rows[2:]] == ["bf16", "fp8", "nvfp4", "quartet2"]
    assert {row[-2].strip() for row in rows[2:]} == {"done"}
    assert (tmp_path / "runs/report.png").stat().st_size > 10_000

    again = demo()
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0 and output.count("done before:") == 4
