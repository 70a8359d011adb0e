"""What a model is asked, and what training makes of a model with a state of its own."""

import json
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowprec.analysis.report import draw_curves, report_table
from lowprec.analysis.runs import find_runs
from lowprec.errors import UsageError
from lowprec.models import ModelConfig
from lowprec.training import resolve, train
from lowprec.training.evaluation import describe, evaluate, make_window_losses
from lowprec.training.metrics import read_lines
from lowprec.training.objectives import TaskLoss
from lowprec.training.program import Program
from lowprec.training.standalone_evaluation import evaluate_run
from lowprec.training.state import initial_state
from lowprec.training.step import STEP_METRICS, Update, make_train_step
from lowprec.training.tasks import CLASSIFICATION, NEXT_TOKEN, task_of

RUN = {
    "data.name": "digits",
    "data.shift": 1,
    "model.name": "resnet",
    "model.layers": 1,
    "model.width": 4,
    "train.steps": 6,
    "train.batch_size": 8,
    "eval.every": 3,
    "eval.batches": 4,
    "eval.health": False,
    "checkpoint.every": 3,
}


class Normed(nn.Module):
    """A batch norm and a linear layer: the least that has a state."""

    @nn.compact
    def __call__(self, images):
        running = not self.is_mutable_collection("batch_stats")
        x = nn.BatchNorm(running, momentum=0.75, name="norm")(images.reshape(images.shape[0], -1))
        return nn.Dense(3, name="head")(x)


MODEL = Normed()
RNG = np.random.default_rng(0)
EXAMPLES = {
    "image": RNG.normal(2, 3, (8, 2, 2, 1)).astype(np.float32),
    "label": RNG.integers(0, 3, 8, dtype=np.int32),
}
UPDATE = Update(optax.sgd(0.1), lambda count: 0.1)


@pytest.fixture(scope="module")
def state():
    return initial_state(MODEL, UPDATE.optimizer, jax.random.key(0), (2, 2, 1), jnp.float32)


def logits_of(params, statistics, images):
    """In float64, of running or the batch's statistics (mean, variance)."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    mean, var = statistics
    x = (images.reshape(len(images), -1).astype(np.float64) - mean) / np.sqrt(var + 1e-5)
    x = x * params["norm"]["scale"] + params["norm"]["bias"]
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def cross_entropy(logits, labels):
    return np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(labels)), labels]


def test_which_models_are_asked_what():
    assert task_of(ModelConfig()) == NEXT_TOKEN
    assert {task_of(ModelConfig(name)) for name in ("resnet", "vit")} == {CLASSIFICATION}


def test_the_loss_in_training_is_that_of_the_statistics_of_the_batch(state):
    images, labels = EXAMPLES["image"], EXAMPLES["label"]
    flat = images.reshape(8, -1).astype(np.float64)
    expected = cross_entropy(logits_of(state.params, (flat.mean(0), flat.var(0)), images), labels).mean()
    loss, changed = CLASSIFICATION.loss(MODEL, state.variables, EXAMPLES, jax.random.key(0))
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(changed["norm"]["mean"], 0.25 * flat.mean(0), rtol=1e-5)
    np.testing.assert_allclose(changed["norm"]["var"], 0.75 + 0.25 * flat.var(0), rtol=1e-5)


def test_the_state_of_the_model_is_the_mean_over_the_microbatches(state):
    """Each begins with the state of the step; the step's loss is the mean of theirs."""
    parts = jax.tree.map(lambda rows: rows.reshape(2, 4, *rows.shape[1:]), EXAMPLES)
    step = jax.jit(make_train_step(MODEL, UPDATE, jax.random.key(1), objective=TaskLoss(CLASSIFICATION)))
    new, metrics = step(state, parts)
    flat = parts["image"].reshape(2, 4, -1).astype(np.float64)
    found = new.model_state["norm"]
    np.testing.assert_allclose(found["mean"], 0.25 * flat.mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(found["var"], 0.75 + 0.25 * flat.var(1).mean(0), rtol=1e-5)
    losses = [
        cross_entropy(logits_of(state.params, (rows.mean(0), rows.var(0)), images), labels).mean()
        for rows, images, labels in zip(flat, parts["image"], parts["label"], strict=True)
    ]
    assert float(metrics[STEP_METRICS.index("loss")]) == pytest.approx(np.mean(losses), rel=1e-5)
    assert int(new.step) == 1


def test_a_model_without_a_state_has_none():
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, images):
            return nn.Dense(3)(images.reshape(images.shape[0], -1))

    first = initial_state(Plain(), UPDATE.optimizer, jax.random.key(0), (2, 2, 1), jnp.float32)
    assert first.model_state == () and set(first.variables) == {"params"}
    step = make_train_step(Plain(), UPDATE, jax.random.key(1), objective=TaskLoss(CLASSIFICATION))
    new, _ = step(first, jax.tree.map(lambda rows: rows[None], EXAMPLES))
    assert new.model_state == ()


def test_evaluation_takes_the_running_statistics_and_counts_right_answers(state):
    statistics = (np.full(4, 1.5), np.full(4, 4.0))
    running = {"norm": {"mean": jnp.full(4, 1.5), "var": jnp.full(4, 4.0)}}
    variables = {"params": state.params, "batch_stats": running}
    batches = [{**EXAMPLES, "weight": np.array([1.0] * 7 + [0.0])}]
    losses = make_window_losses(MODEL, MODEL, CLASSIFICATION)
    found = evaluate(losses, variables, batches, jax.random.key(0), CLASSIFICATION)
    logits = logits_of(state.params, statistics, EXAMPLES["image"][:7])
    labels = EXAMPLES["label"][:7]
    each = cross_entropy(logits, labels)
    assert found.quantized.loss == pytest.approx(each.mean(), rel=1e-5)
    assert found.quantized.sem == pytest.approx(each.std(ddof=1) / np.sqrt(7), rel=1e-4)
    accuracy = (logits.argmax(-1) == labels).mean()
    assert found.accuracy == pytest.approx((accuracy, accuracy)) and found.tokens == 7
    metrics = found.metrics(None)
    assert "eval_bits_per_byte" not in metrics
    assert metrics["eval_accuracy"] == metrics["eval_accuracy_full_precision"] == pytest.approx(accuracy)
    expected = f"{accuracy:.4f} accuracy ({accuracy:.4f} with the full-precision forward pass)"
    assert describe(metrics) == expected


@pytest.fixture(scope="module")
def runs(shared_directory, tmp_path_factory):
    """A directory with a finished run: a resnet on the digits, quantized, with running ranges."""
    pytest.importorskip("sklearn")
    directory = tmp_path_factory.mktemp("runs")
    train({**RUN, "data.data_dir": str(shared_directory / "data"), "recipe": "int8_qat"}, directory / "whole")
    return directory


def test_a_run_on_images_says_what_it_did(runs):
    summary = json.loads((runs / "whole/summary.json").read_text())
    lines = read_lines(runs / "whole/metrics.jsonl")
    assert summary["status"] == "done" and summary["unit"] == "image"
    assert [line["tokens"] for line in lines] == [8, 16, 24, 32, 40, 48] and summary["tokens"] == 48
    assert summary["accuracy"] == lines[-1]["eval_accuracy"] and 0 <= summary["accuracy"] <= 1
    assert "bits_per_byte" not in lines[-1] and "bits_per_byte" not in summary
    assert summary["memory"]["model_state"] == 4 * 2 * (3 * 4 + 2 * 8 + 2 * 16)
    assert summary["flops"] > 48 * 6 * summary["parameters"]


def test_a_run_that_was_killed_goes_on_bitwise(runs):
    """The state of the batch norms, of the running ranges and of the augmented images' order with it."""
    shutil.copytree(runs / "whole", runs / "killed")
    (runs / "killed/summary.json").unlink()
    shutil.rmtree(runs / "killed/checkpoints/6")
    config = json.loads((runs / "whole/config.json").read_text())
    again = train(config, runs / "killed")
    whole = json.loads((runs / "whole/summary.json").read_text())
    assert again["state_sha256"] == whole["state_sha256"]
    exact = ("step", "loss", "grad_norm", "eval_loss", "eval_accuracy", "eval_gap")
    numbers = lambda name: [[line.get(key) for key in exact] for line in read_lines(runs / name / "metrics.jsonl")]
    assert numbers("killed") == numbers("whole")


@pytest.mark.slow
def test_eval_and_report_know_accuracies(runs, tmp_path):
    summary = json.loads((runs / "whole/summary.json").read_text())
    text = evaluate_run(runs / "whole")
    assert "nats/image" in text and "32 images of digits/1.0.0" in text
    # The health of operands is that of a backward pass in training.
    assert "fwd.w" in text and "least: " in text
    (line,) = (line for line in text.splitlines() if line.startswith("quantized"))
    assert float(line.split()[-1]) == pytest.approx(summary["accuracy"], abs=5e-5)
    other = evaluate_run(runs / "whole", recipe="f32")
    (line,) = (line for line in other.splitlines() if line.startswith("difference"))
    assert [float(number) for number in line.split()[1:]] == [0, 0, 0]
    found = find_runs([runs / "whole"])
    table = report_table(found)
    assert "| accuracy |" in table and "images/s" in table and "bits/byte" not in table
    assert f"{summary['accuracy']:.4f}" in table
    draw_curves(found, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_data_that_the_model_cannot_read_is_refused(shared_directory):
    place = {"data.data_dir": str(shared_directory / "data")}
    with pytest.raises(UsageError, match="'stdlib_text' is a set of text"):
        Program(resolve({**RUN, **place, "data.name": "stdlib_text"}))
    with pytest.raises(UsageError, match="'digits' is a set of images"):
        Program(resolve({**RUN, **place, "model.name": "llama", "model.heads": 1, "data.shift": 0}))
