"""A run that was killed, stopped or damaged, and then resumed, is bit for bit the run that was never touched."""

import json
import random
import shutil
import signal
import time

import pytest

from lowprec.training.metrics import TIMINGS, read_lines

# Long enough to be hit in the middle; every operand rounds at random in the second.
STEPS = {"train.steps": 120, "checkpoint.every": 7, "eval.every": 25, "checkpoint.keep": 3}
RECIPES = ("quartet2", "fwd=int4@row(stochastic) dgrad=int8@row(stochastic) wgrad=int8@row(stochastic)")
TIMEOUT = 240


def without_timings(workdir):
    return [
        {key: value for key, value in line.items() if key not in TIMINGS} for line in read_lines(workdir / "metrics.jsonl")
    ]


def summary(workdir):
    return json.loads((workdir / "summary.json").read_text())


def finish(process, status=0):
    output, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == status, errors
    return output, errors


def wait_for_step(process, workdir, step):
    """Returns when that step's line is written, or the process has ended."""
    deadline = time.monotonic() + TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        lines = read_lines(workdir / "metrics.jsonl")
        if lines and lines[-1]["step"] >= step:
            return
        time.sleep(0.002)
    raise AssertionError(f"the process ended before step {step}: {process.communicate()}")


def assert_same_run(workdir, reference):
    assert without_timings(workdir) == without_timings(reference)
    assert [line["step"] for line in read_lines(workdir / "metrics.jsonl")] == list(range(1, STEPS["train.steps"] + 1))
    result, expected = summary(workdir), summary(reference)
    assert result["status"] == expected["status"] == "done"
    for key in ("state_sha256", "evaluation", "final_loss", "best_loss", "best_step", "tokens", "config_hash"):
        assert result[key] == expected[key], key


@pytest.fixture(scope="module", params=RECIPES, ids=["quartet2", "stochastic_everywhere"])
def reference(request, training_command, tmp_path_factory):
    """(changes, directory) of a run never stopped."""
    changes, workdir = {**STEPS, "recipe": request.param}, tmp_path_factory.mktemp("reference") / "run"
    finish(training_command(workdir, changes))
    return changes, workdir


def test_killed_twice_at_random_steps(reference, training_command, tmp_path):
    changes, expected = reference
    first, second = sorted(random.sample(range(1, 110), 2))
    for step in (first, second):
        process = training_command(tmp_path / "run", changes)
        wait_for_step(process, tmp_path / "run", step)
        process.send_signal(signal.SIGKILL)
        finish(process, -signal.SIGKILL)
        assert not (tmp_path / "run" / "summary.json").exists(), f"killed at {first}, {second}: ended before the signal"
    finish(training_command(tmp_path / "run", changes))
    assert_same_run(tmp_path / "run", expected)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_saves_and_ends_cleanly(reference, training_command, tmp_path, number):
    changes, expected = reference
    workdir = tmp_path / "run"
    process = training_command(workdir, changes)
    wait_for_step(process, workdir, 30)
    process.send_signal(number)
    output, errors = finish(process)
    stopped = summary(workdir)
    assert stopped["status"] == "interrupted" and "interrupted" in output
    assert f"stopped after step {stopped['step']}" in errors
    assert (workdir / "checkpoints" / str(stopped["step"])).is_dir()
    assert read_lines(workdir / "metrics.jsonl")[-1]["step"] == stopped["step"] < 120
    finish(training_command(workdir, changes))
    assert_same_run(workdir, expected)


def damage_truncate(checkpoint):
    """As a disk that filled up, or a copy that broke off."""
    for path in checkpoint.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_flip(checkpoint):
    """As a bad sector: the largest file of the state has other bits in its middle."""
    path = max((p for p in (checkpoint / "state" / "d").iterdir()), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    for offset in range(len(content) // 2, len(content) // 2 + 64):
        content[offset] ^= 0xFF
    path.write_bytes(bytes(content))


def damage_remove_item(checkpoint):
    shutil.rmtree(checkpoint / "data")


def damage_empty(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


DAMAGES = (damage_truncate, damage_flip, damage_remove_item, damage_empty)


def unfinished_copy(reference, tmp_path):
    """The reference run as if it had been killed after its last checkpoint."""
    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)
    (workdir / "summary.json").unlink()
    steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert steps == [112, 119, 120]
    return workdir, steps


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.removeprefix("damage_"))
def test_a_damaged_newest_checkpoint_is_passed_over(reference, training_command, tmp_path, damage):
    changes, expected = reference
    workdir, steps = unfinished_copy(expected, tmp_path)
    for step in steps[1:]:
        damage(workdir / "checkpoints" / str(step))
    _, errors = finish(training_command(workdir, changes))
    assert "going on from the checkpoint of step 112" in errors
    for step in steps[1:]:
        assert f"checkpoints/{step} cannot be read" in errors
        assert (workdir / "checkpoints" / f"{step}.damaged").is_dir()
    assert_same_run(workdir, expected)


def contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_without_a_good_checkpoint_nothing_is_changed(reference, training_command, tmp_path):
    changes, expected = reference
    workdir, steps = unfinished_copy(expected, tmp_path)
    for step in steps:
        damage_truncate(workdir / "checkpoints" / str(step))
    before = contents(workdir)
    _, errors = finish(training_command(workdir, changes), 2)
    assert f"no checkpoint in {workdir / 'checkpoints'} can be read" in errors and "Traceback" not in errors
    assert contents(workdir) == before


def test_lost_checkpoints_do_not_cost_the_metrics(reference, training_command, tmp_path):
    changes, expected = reference
    workdir, _ = unfinished_copy(expected, tmp_path)
    shutil.rmtree(workdir / "checkpoints")
    before = contents(workdir)
    _, errors = finish(training_command(workdir, changes), 2)
    assert "has no checkpoint, although" in errors and "Traceback" not in errors
    assert contents(workdir) == before


def test_half_a_save_and_half_a_line_are_cleared_away(reference, training_command, tmp_path):
    """What a kill leaves in the worst moment: Orbax's unfinished directory, and a line without its end."""
    changes, expected = reference
    workdir, _ = unfinished_copy(expected, tmp_path)
    checkpoints = workdir / "checkpoints"
    checkpoints.joinpath("120").rename(checkpoints / "120.orbax-checkpoint-tmp")
    shutil.rmtree(checkpoints / "120.orbax-checkpoint-tmp" / "progress")
    with (workdir / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 121, "loss": 3.')
    _, errors = finish(training_command(workdir, changes))
    assert "going on from the checkpoint of step 119" in errors
    assert_same_run(workdir, expected)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["112", "119", "120"]


def test_a_finished_run_is_not_repeated(reference, training_command):
    changes, expected = reference
    before = contents(expected)
    output, _ = finish(training_command(expected, changes))
    assert output.startswith("done before:")
    assert contents(expected) == before


def test_another_configs_directory_is_refused(reference, training_command):
    changes, expected = reference
    before = contents(expected)
    other = {**changes, "optimizer.lr": 0.001, "seed": 5, "log.every": 10}
    _, errors = finish(training_command(expected, other), 2)
    assert "optimizer.lr: 0.004 there, 0.001 asked for" in errors
    assert "seed: 0 there, 5 asked for" in errors
    assert "log.every" not in errors and "Traceback" not in errors
    assert contents(expected) == before
