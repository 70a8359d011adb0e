"""One run on two processes: the bits of one process with as many devices, and one end for both, whatever happens."""

import json
import random
import re
import signal
import socket
import time

import pytest

from lowprec.errors import UsageError
from lowprec.training import multihost
from lowprec.training.metrics import TIMINGS, read_lines
from lowprec.training.multihost import HEARTBEAT_SECONDS, Membership

# Parameters large enough to be split, noise, microbatches of both processes.
CHANGES = {
    "recipe": "fwd=int4@row(stochastic)",
    "model.width": 64,
    "mesh.fsdp": 2,
    "train.accumulate": 2,
    "train.steps": 60,
    "checkpoint.every": 7,
    "eval.every": 0,
}
TIMEOUT = 240


def pair(training_command, workdir, changes=CHANGES, of_second=None):
    """Both processes of a run, started."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    start = lambda process, changes: training_command(
        workdir,
        changes,
        LOWPREC_COORDINATOR=f"127.0.0.1:{port}",
        LOWPREC_PROCESSES="2",
        LOWPREC_PROCESS=str(process),
    )
    return [start(0, changes), start(1, of_second or changes)]


def finish(processes, status=0):
    """(output, errors) of each."""
    found = [process.communicate(timeout=TIMEOUT) for process in processes]
    assert [process.returncode for process in processes] == [status] * len(processes), found
    return found


def wait_for_step(processes, workdir, step):
    deadline = time.monotonic() + TIMEOUT
    while all(process.poll() is None for process in processes) and time.monotonic() < deadline:
        lines = read_lines(workdir / "metrics.jsonl")
        if lines and lines[-1]["step"] >= step:
            return
        time.sleep(0.005)
    raise AssertionError(f"ended before step {step}: {[process.communicate() for process in processes]}")


def results(workdir):
    summary = json.loads((workdir / "summary.json").read_text())
    names = ("status", "state_sha256", "evaluation", "final_loss", "best_step", "tokens", "mesh", "flops")
    lines = [
        {name: value for name, value in line.items() if name not in TIMINGS}
        for line in read_lines(workdir / "metrics.jsonl")
    ]
    return {name: summary[name] for name in names}, lines


@pytest.fixture(scope="module")
def one_process(training_command, tmp_path_factory):
    """What one process with two devices finds."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    finish([training_command(workdir, CHANGES, devices=2)])
    return results(workdir)


def test_two_processes_killed_and_started_again_find_the_bits_of_one(one_process, training_command, tmp_path):
    workdir = tmp_path / "run"
    processes = pair(training_command, workdir)
    wait_for_step(processes, workdir, random.randint(9, 50))
    for process in processes:
        process.kill()
    finish(processes, -signal.SIGKILL)
    assert not (workdir / "summary.json").exists()
    (_, told), (_, silent) = finish(pair(training_command, workdir))
    assert results(workdir) == one_process
    assert "going on from the checkpoint of step" in told and "evaluation at step 60" in told
    assert "step" not in silent
    assert [line["step"] for line in read_lines(workdir / "metrics.jsonl")] == list(range(1, 61))


def test_one_told_to_stop_stops_both_at_one_step(one_process, training_command, tmp_path):
    """One process with two devices can go on with what they saved, and ends with the same bits."""
    workdir = tmp_path / "run"
    processes = pair(training_command, workdir)
    wait_for_step(processes, workdir, 10)
    processes[1].send_signal(signal.SIGTERM)
    found = finish(processes)
    assert ["interrupted: " in output for output, _ in found] == [True, False]
    step = int(re.search(r"SIGTERM: stopped after step (\d+)", found[0][1])[1])
    assert step == json.loads((workdir / "summary.json").read_text())["step"] < 60
    assert (workdir / "checkpoints" / str(step)).is_dir()
    finish([training_command(workdir, CHANGES, devices=2)])
    assert results(workdir) == one_process


@pytest.mark.parametrize("dead", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_one_that_dies_ends_the_other_with_a_message(dead, training_command, tmp_path):
    workdir = tmp_path / "run"
    processes = pair(training_command, workdir, {"train.steps": 100_000, "eval.every": 0})
    wait_for_step(processes, workdir, 5)
    processes[dead].kill()
    died = time.monotonic()
    _, errors = processes[1 - dead].communicate(timeout=TIMEOUT)
    processes[dead].communicate()
    # Gloo sees it at once; without it, the heartbeat and jax's own message would.
    assert time.monotonic() - died < HEARTBEAT_SECONDS + 10
    assert processes[1 - dead].returncode != 0
    assert "another process of this run has ended" in errors or "another task died" in errors


def test_what_one_refuses_all_refuse(training_command, tmp_path):
    other = {**CHANGES, "seed": 7}
    for _, errors in finish(pair(training_command, tmp_path / "run", of_second=other), 2):
        assert "process 1 was given another config than process 0" in errors
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    for _, errors in finish(pair(training_command, tmp_path / "run"), 2):
        assert "holds other things than a run" in errors


def test_membership_comes_from_the_environment():
    environment = {"LOWPREC_COORDINATOR": "node0:8476", "LOWPREC_PROCESSES": "4", "LOWPREC_PROCESS": "3"}
    assert Membership.of_environment(environment) == Membership("node0:8476", 4, 3)
    assert Membership.of_environment({"LOWPREC_COORDINATOR": "auto"}) == Membership("auto")
    # Each task of a SLURM job may have a run of its own.
    assert Membership.of_environment({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}) is None


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"LOWPREC_PROCESSES": "2"}, "LOWPREC_PROCESSES is set, but not LOWPREC_COORDINATOR"),
        ({"LOWPREC_COORDINATOR": "node0:8476"}, "needs LOWPREC_PROCESSES and LOWPREC_PROCESS too"),
        ({"LOWPREC_COORDINATOR": "node0"}, "host:port of process 0, or auto, not 'node0'"),
        ({"LOWPREC_COORDINATOR": "auto", "LOWPREC_PROCESS": "0"}, "finds out LOWPREC_PROCESSES"),
        (
            {"LOWPREC_COORDINATOR": "a:1", "LOWPREC_PROCESSES": "2", "LOWPREC_PROCESS": "2"},
            "LOWPREC_PROCESS counts from 0 to LOWPREC_PROCESSES - 1 = 1, it is not 2",
        ),
        ({"LOWPREC_COORDINATOR": "a:1", "LOWPREC_PROCESSES": "two"}, "LOWPREC_PROCESSES is a number, not 'two'"),
    ],
)
def test_what_cannot_be_is_refused(environment, message):
    with pytest.raises(UsageError) as refused:
        Membership.of_environment(environment)
    assert message in str(refused.value)


def test_one_process_is_alone():
    """Nothing is asked of others, and errors are what they were."""
    assert multihost.alone() and multihost.is_first()
    assert multihost.first(lambda: 3) == multihost.together(lambda: 3) == 3
    multihost.require_same("config", object())
    assert [multihost.AgreedStop()(wish) for wish in (None, "SIGTERM")] == [None, "SIGTERM"]
    with pytest.raises(KeyError), multihost.bound_together():
        raise KeyError("mine")
