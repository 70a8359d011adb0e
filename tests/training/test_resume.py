"""A run that was killed, stopped or damaged, and then resumed, is bit for bit the run that was never touched."""

import json
import random
import shutil
import signal
import time

import pytest

from lowprec.errors import UsageError
from lowprec.training import train
from lowprec.training.metrics import TIMINGS, read_lines

# Long enough to be hit in the middle.
STEPS = {"train.steps": 120, "checkpoint.every": 7, "eval.every": 25, "checkpoint.keep": 3}
# In the end noise of each kind: of rounding, forward and backward, and of the signs of a rotation.
# On 120 steps the ramp lies from 48 to 72, and checkpoints are of 49, 56, 63, 70.
NOISY = "bitnet158 then fwd=int4@row(stochastic) dgrad=int8@row(stochastic hadamard16.random) at 40% over 20% reset"
WITHIN_THE_RAMP = 52
TIMEOUT = 240


def without_timings(workdir):
    return [
        {key: value for key, value in line.items() if key not in TIMINGS}
        for line in read_lines(workdir / "metrics.jsonl")
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


@pytest.fixture(scope="module")
def reference(training_command, tmp_path_factory):
    """(changes, directory) of a run never stopped."""
    changes, workdir = {**STEPS, "recipe": NOISY}, tmp_path_factory.mktemp("reference") / "run"
    finish(training_command(workdir, changes))
    return changes, workdir


def interrupt_at(step, number, training_command, workdir, changes):
    """Trains until a line of that step is there, sends the signal, and waits for the end."""
    process = training_command(workdir, changes)
    wait_for_step(process, workdir, step)
    process.send_signal(number)
    return finish(process, -signal.SIGKILL if number == signal.SIGKILL else 0)


def kill_and_finish(training_command, workdir, changes, steps):
    """The last line that was written before each kill."""
    seen = []
    for step in steps:
        interrupt_at(step, signal.SIGKILL, training_command, workdir, changes)
        assert not (workdir / "summary.json").exists(), f"killed at {steps}: it had ended before"
        seen.append(read_lines(workdir / "metrics.jsonl")[-1])
    finish(training_command(workdir, changes))
    return seen


def test_killed_at_a_random_step_and_within_a_ramp(reference, training_command, tmp_path):
    changes, expected = reference
    at_random = random.choice([step for step in range(1, 110) if abs(step - WITHIN_THE_RAMP) > 20])
    seen = kill_and_finish(training_command, tmp_path / "run", changes, sorted((at_random, WITHIN_THE_RAMP)))
    assert 1 in (line["phase"] for line in seen)
    assert_same_run(tmp_path / "run", expected)
    assert [line["phase"] for line in without_timings(expected)] == [0] * 48 + [1] * 24 + [2] * 48


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", ["bf16", "nvfp4", "quartet2", "fp8_delayed", "lsq_4", "int8_qat", "mesa", "fp16_loss_scaled"]
)
def test_killed_twice_at_random_steps_by_recipe(recipe, training_command, tmp_path):
    changes = {**STEPS, "recipe": recipe, "eval.health": True}
    finish(training_command(tmp_path / "expected", changes))
    kill_and_finish(training_command, tmp_path / "run", changes, sorted(random.sample(range(1, 110), 2)))
    assert_same_run(tmp_path / "run", tmp_path / "expected")


RAMP = "bf16 then bitnet158 at 40% over 20% reset"
# AdaPT decides after 50 and 100 steps.
# (recipe, the steps at whose lines it is killed, what its lines tell of the change)
DYNAMIC = {
    "within and after a ramp": (RAMP, (52, 80), lambda line: line["phase"]),
    "adapt": ("adapt", (55, 103), lambda line: sum(line["bits"].values())),
    "fliqs": ("fliqs_6", (30, 80), lambda line: sum(line["bits"].values())),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", DYNAMIC)
def test_killed_after_what_it_does_has_changed(kind, training_command, tmp_path):
    """Within a ramp and after it; after the decisions of a controller, which stand in the lines that are compared."""
    recipe, steps, told = DYNAMIC[kind]
    changes, workdir = {**STEPS, "recipe": recipe}, tmp_path / "run"
    seen = kill_and_finish(training_command, workdir, changes, steps)
    if recipe == RAMP:
        assert [told(line) for line in seen] == [1, 2]
    finish(training_command(tmp_path / "expected", changes))
    assert_same_run(workdir, tmp_path / "expected")
    decided = [told(line) for line in without_timings(workdir)]
    assert len(set(decided[: steps[0]])) > 1 and len(decided) == STEPS["train.steps"]


def test_signals_save_and_end_cleanly(reference, training_command, tmp_path):
    changes, expected = reference
    workdir = tmp_path / "run"
    for step, number in ((30, signal.SIGTERM), (75, signal.SIGINT)):
        output, errors = interrupt_at(step, number, training_command, workdir, changes)
        stopped = summary(workdir)
        assert stopped["status"] == "interrupted" and output.startswith("interrupted:")
        assert f"{number.name}: stopped after step {stopped['step']}" in errors and "Traceback" not in errors
        assert (workdir / "checkpoints" / str(stopped["step"])).is_dir()
        assert step <= read_lines(workdir / "metrics.jsonl")[-1]["step"] == stopped["step"] < 120
    finish(training_command(workdir, changes))
    assert_same_run(workdir, expected)


def unfinished_copy(reference, tmp_path):
    """The reference run as if it had been killed after its last checkpoint."""
    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)
    (workdir / "summary.json").unlink()
    steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert steps == [112, 119, 120]
    return workdir, steps


def truncate_files(checkpoint):
    """As a disk that filled up, or a copy that broke off."""
    for path in checkpoint.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_damaged_newest_checkpoints_are_passed_over(reference, training_command, tmp_path):
    """What makes one unreadable is varied in test_checkpoints.py."""
    changes, expected = reference
    workdir, steps = unfinished_copy(expected, tmp_path)
    for step in steps[1:]:
        truncate_files(workdir / "checkpoints" / str(step))
    _, errors = finish(training_command(workdir, changes))
    assert "going on from the checkpoint of step 112" in errors
    for step in steps[1:]:
        assert f"checkpoints/{step} cannot be read" in errors
        assert (workdir / "checkpoints" / f"{step}.damaged").is_dir()
    assert_same_run(workdir, expected)


def contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_without_a_good_checkpoint_nothing_is_changed(reference, tiny, tmp_path):
    changes, expected = reference
    workdir, steps = unfinished_copy(expected, tmp_path)
    for step in steps:
        truncate_files(workdir / "checkpoints" / str(step))
    before = contents(workdir)
    with pytest.raises(UsageError, match=r"no checkpoint in .*checkpoints can be read; nothing was changed"):
        train(tiny(changes), workdir)
    assert contents(workdir) == before


def test_lost_checkpoints_do_not_cost_the_metrics(reference, tiny, tmp_path):
    changes, expected = reference
    workdir, _ = unfinished_copy(expected, tmp_path)
    shutil.rmtree(workdir / "checkpoints")
    before = contents(workdir)
    with pytest.raises(UsageError, match=r"has no checkpoint, although .*metrics.jsonl goes to step 120"):
        train(tiny(changes), workdir)
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
    # How many checkpoints are kept is no part of what is computed, and may change.
    _, errors = finish(training_command(workdir, {**changes, "checkpoint.keep": 1}))
    assert "going on from the checkpoint of step 119" in errors
    assert_same_run(workdir, expected)
    assert [path.name for path in checkpoints.iterdir()] == ["120"]


def test_a_finished_run_is_not_repeated(reference, tiny):
    changes, expected = reference
    before = contents(expected)
    assert train(tiny(changes), expected) == summary(expected)
    assert contents(expected) == before


def test_another_configs_directory_is_refused(reference, tiny):
    changes, expected = reference
    before = contents(expected)
    with pytest.raises(UsageError) as refusal:
        train(tiny({**changes, "optimizer.lr": 0.001, "seed": 5, "log.every": 10}), expected)
    text = str(refusal.value)
    assert "optimizer.lr: 0.004 there, 0.001 asked for" in text and "seed: 0 there, 5 asked for" in text
    assert "log.every" not in text
    assert contents(expected) == before
