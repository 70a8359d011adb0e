"""Runs that end otherwise than they should: divergence, a full disk, a failure nobody thought of."""

import json
import re
import shutil
import subprocess

import pytest

from lowprec.training.metrics import read_lines
from lowprec.training.run_directory import write_json


def finish(process, status):
    output, errors = process.communicate(timeout=240)
    assert process.returncode == status, errors
    assert "Traceback" not in output + errors
    return output, errors


# A learning rate that no model survives; clipping would hold the first steps back.
EXPLODING = {"optimizer.lr": 1e30, "optimizer.clip": 0.0, "checkpoint.every": 1, "recipe": "f32"}


@pytest.fixture(scope="module")
def diverged(training_command, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("diverged") / "run"
    return workdir, *finish(training_command(workdir, EXPLODING), 3)


def test_divergence_is_a_result(diverged):
    workdir, output, errors = diverged
    summary = json.loads((workdir / "summary.json").read_text())
    lines = read_lines(workdir / "metrics.jsonl")
    good = summary["step"]
    assert summary["status"] == "diverged" and output.startswith("diverged:")
    assert f"of step {good + 1} is " in summary["diverged"]
    assert f"step {good} was the last good one; the newest checkpoint is of step {good}" in errors
    assert [line["step"] for line in lines] == list(range(1, good + 2))
    assert all(line["loss"] is not None and line["grad_norm"] is not None for line in lines[:-1])
    assert lines[-1]["loss"] is None or lines[-1]["grad_norm"] is None
    assert summary["train_loss"] == lines[-2]["loss"]


def test_a_diverged_run_is_not_repeated(diverged, training_command):
    workdir, *_ = diverged
    output, _ = finish(training_command(workdir, EXPLODING), 3)
    assert output.startswith("diverged before:")


def test_a_failure_nobody_thought_of_leaves_its_traceback_in_the_directory(training_command, tiny, tmp_path):
    """A file lies where the checkpoints belong."""
    workdir, changes = tmp_path / "run", {"train.steps": 2, "recipe": "f32"}
    workdir.mkdir()
    write_json(workdir / "config.json", tiny(changes).to_dict())
    (workdir / "checkpoints").write_text("mine")
    _, errors = finish(training_command(workdir, changes), 1)
    assert errors.splitlines()[-1].startswith("lowprec: failed: ")
    assert f"(traceback: {workdir / 'traceback.txt'})" in errors.splitlines()[-1]
    assert "Traceback" in (workdir / "traceback.txt").read_text()
    assert (workdir / "checkpoints").read_text() == "mine"
    assert json.loads((workdir / "summary.json").read_text())["status"] == "failed"


FULL_DISK = """
set -e
mount -t tmpfs -o size=700k tmpfs "$DISK"
set +e
"$@"; echo "status $?"
cat "$DISK/run/config.json" > /dev/null && echo "config is there"
ls "$DISK/run/checkpoints"
mount -o remount,size=40m tmpfs "$DISK"
"$@"; echo "status $?"
cp -r "$DISK/run" "$COPY"
"""


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="needs a file system of its own (unshare -rm)")
def test_a_full_disk_is_said_clearly_and_costs_nothing(training_command, tmp_path):
    """A file system of 700 kB; then it grows, and the same command goes on."""
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    changes = {"train.steps": 60, "checkpoint.every": 10, "recipe": "f32"}
    prefix = ("unshare", "-rm", "sh", "-c", FULL_DISK, "sh")
    process = training_command(disk / "run", changes, prefix=prefix, DISK=str(disk), COPY=str(copy))
    output, errors = process.communicate(timeout=240)
    assert "Traceback" not in errors
    assert output.splitlines()[0] == "status 1" and "config is there" in output and "status 0" in output
    assert f"the disk of {disk / 'run'} is full" in errors
    assert re.search(r"going on from the checkpoint of step [1-5]0\n", errors)
    assert [line["step"] for line in read_lines(copy / "metrics.jsonl")] == list(range(1, 61))
    assert json.loads((copy / "summary.json").read_text())["status"] == "done"
