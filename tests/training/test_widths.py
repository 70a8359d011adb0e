"""Nested weights in a run: widths drawn layer by layer, and a checkpoint read at another width with what it learned."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec import recipes
from lowprec.cli import main
from lowprec.errors import UsageError
from lowprec.nn.learned import carried
from lowprec.quantizers.nested import WIDTHS
from lowprec.training import train
from lowprec.training.config import resolve
from lowprec.training.metrics import TIMINGS, read_lines
from lowprec.training.program import Program
from lowprec.training.standalone_evaluation import evaluate_run, open_run, under_recipe

SHORT = {"train.steps": 4, "eval.every": 0, "eval.batches": 1, "checkpoint.every": 2, "optimizer.quant_lr": 0.05}
DRAWN = {"recipe": "nested", "objective.name": "widths"}


def steps_of(program, count):
    """(metrics of each step, the state after them)."""
    state, batches, lines = program.initial_state(), program.batches(), []
    for _ in range(count):
        state, metrics = program.train_step(state, program.put(next(batches)))
        lines.append(program.now.read_metrics(np.asarray(metrics)))
    return lines, state


@pytest.mark.slow
def test_a_certain_draw_is_training_at_that_width(tiny):
    """One width to be drawn from: step for step the loss of the recipe that reads it, and the same parameters after."""
    drawn, state = steps_of(Program(tiny({**SHORT, **DRAWN, "objective.widths": "4"})), 3)
    static, expected = steps_of(Program(tiny({**SHORT, "recipe": "nested_4"})), 3)
    np.testing.assert_allclose([line["loss"] for line in drawn], [line["loss"] for line in static], rtol=1e-6)
    assert [line["mean_width"] for line in drawn] == [4, 4, 4]
    for trees in ((state.params, expected.params), (state.quantizers.params, expected.quantizers.params)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *trees)
    # The state stays at the stored width, at which the model is evaluated.
    assert all(np.all(np.asarray(width) == 8) for width in jax.tree.leaves(state.quantizers.state))


def test_the_widths_of_a_step_are_drawn_by_layer_and_their_steps_alone_learn(tiny):
    """First step, no momentum: a step has moved if its width was drawn for its layer. Seven products a layer."""
    program = Program(tiny({**SHORT, **DRAWN, "model.layers": 4, "optimizer.warmup_fraction": 0.0}))
    before = jax.tree.map(np.asarray, program.initial_state().quantizers.params)
    (line, *_), state = steps_of(program, 1)
    drawn = []
    for path, old in jax.tree_util.tree_leaves_with_path(before):
        new = state.quantizers.params
        for entry in path:
            new = new[entry.key]
        moved = np.any(np.asarray(new) != old, axis=tuple(range(1, old.ndim)))
        drawn.append((path[-1].key, moved))
    totals = {width: sum(int(moved.sum()) for name, moved in drawn if name == f"step_{width}") for width in WIDTHS}
    assert sum(totals.values()) == 4 * 7 and len([width for width in WIDTHS if totals[width]]) > 1
    mean = sum(width * count for width, count in totals.items()) / 28
    assert line["mean_width"] == pytest.approx(mean, rel=1e-6)


def test_flat_layers_prefer_low_widths_and_others_high_ones(tiny):
    """The first layer kept, two runs: chances are those of the path, wherever its layer is scanned."""
    changes = {**SHORT, **DRAWN, "recipe": "nested keeping first 1", "model.layers": 3}
    program = Program(tiny({**changes, "objective.insensitive": r"layers/(1/mlp/up|2/attention/.*)"}))
    objective, quant = program.now.objective, program.initial_state().quantizers.state
    chances = objective._chances(quant)["layers"]["1:3"]
    high, low = [0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]
    np.testing.assert_allclose(chances["mlp"]["up"]["fwd.w"]["width"], [low, high], rtol=1e-6)
    np.testing.assert_allclose(chances["attention"]["key"]["fwd.w"]["width"], [high, low], rtol=1e-6)
    np.testing.assert_allclose(chances["mlp"]["down"]["fwd.w"]["width"], [high, high], rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {**DRAWN, "objective.insensitive": "layers/7/.*"},
            "is the path of no layer; there are layers/0/attention/key",
        ),
        ({**DRAWN, "objective.insensitive": "layers/("}, "'layers/(' is not a regular expression"),
        ({**DRAWN, "objective.widths": "8,5"}, "weights are read at one of 8, 6, 4, 2, not 5"),
        ({**DRAWN, "recipe": "nested_8", "objective.insensitive": "layers/.*"}, "take nested"),
    ],
)
def test_what_cannot_be_drawn_is_refused(changes, message, tiny):
    with pytest.raises(UsageError) as refusal:
        Program(tiny({**SHORT, **changes}))
    assert message in str(refusal.value)


@pytest.mark.slow
def test_a_run_with_drawn_widths_is_killed_and_resumed_bitwise(tiny, tmp_path):
    config = tiny({**SHORT, **DRAWN, "train.accumulate": 2})
    assert train(config, tmp_path / "run")["status"] == "done"
    lines, before = read_lines(tmp_path / "run/metrics.jsonl"), open_run(tmp_path / "run")[1].progress["state_sha256"]
    assert len({line["mean_width"] for line in lines}) > 1
    (tmp_path / "run/summary.json").unlink()
    shutil.rmtree(tmp_path / "run/checkpoints/4")
    assert train(config, tmp_path / "run")["state_sha256"] == before
    untimed = lambda found: [{name: line[name] for name in line if name not in TIMINGS} for line in found]
    assert untimed(read_lines(tmp_path / "run/metrics.jsonl")) == untimed(lines)


@pytest.fixture(scope="module")
def many(tiny, tmp_path_factory):
    """A run trained for 8 and 4 bits together, whose steps have moved."""
    workdir = tmp_path_factory.mktemp("widths") / "run"
    widths = {"recipe": "nested_8", "objective.name": "widths", "objective.widths": "8,4", "model.layers": 2}
    train(tiny({**SHORT, **widths}), workdir)
    return workdir


def losses(text):
    """Name of the forward pass -> nats a token, of what `lowprec eval` prints."""
    rows = (line.split() for line in text.splitlines() if line.startswith(("quantized", "full precision")))
    return {row[0]: float(row[-3]) for row in rows}


@pytest.mark.slow
def test_another_width_of_a_checkpoint_is_read_with_the_steps_it_has_learned(many, capsys):
    own, checkpoint, _ = open_run(many)
    state = checkpoint.state
    trained = jax.tree.map(np.asarray, state.quantizers.params)
    in_training = read_lines(many / "metrics.jsonl")[-1]["eval_loss"]
    stored = json.loads((many / "config.json").read_text())
    plain = {"name": "", "widths": "8,6,4,2"}
    expected = {}
    for width in (8, 4, 2):
        config = {**stored, "recipe": f"nested_{width}", "objective": {**stored["objective"], **plain}}
        program = Program(resolve(config), own.data)
        variables = under_recipe(program, state, own.recipe)
        # All steps of all widths are those of the checkpoint, which are not those of a new start.
        jax.tree.map(np.testing.assert_array_equal, variables["quant_params"], trained)
        anew = program.initial_variables(state.params, state.model_state)
        moved = jax.tree.map(lambda a, b: np.any(np.asarray(a) != b), anew["quant_params"], trained)
        assert all(moved["layers"]["0:2"]["mlp"]["up"]["fwd.w"][f"step_{w}"] for w in (8, 4))
        evaluation = program.evaluate({**state.variables})
        expected[width] = evaluation.quantized.loss
        assert program.evaluate(anew).quantized.loss != expected[width]
        found = losses(evaluate_run(many, recipe=f"nested_{width}"))["quantized"]
        assert found == pytest.approx(expected[width], abs=5.1e-5)  # four decimals are printed
    assert expected[4] != expected[8]
    assert losses(evaluate_run(many))["quantized"] == pytest.approx(expected[8], abs=5.1e-5)
    assert in_training == pytest.approx(expected[8], rel=1e-6)
    assert main(["eval", f"--workdir={many}", "--recipe=nested_4"]) == 0
    assert losses(capsys.readouterr().out)["quantized"] == pytest.approx(expected[4], abs=5.1e-5)


def learned_by(program, value):
    """The recipe's collection, all of it one number."""
    return jax.tree.map(lambda leaf: jnp.full(leaf.shape, value), program._shapes.quantizers.params)


def test_what_is_carried_over_is_what_both_recipes_mean_alike(tiny):
    """Layers may be scanned otherwise; other widths, other formats and other rules start anew."""
    shapes = {}
    for name in ("nested", "nested_4", "nested_4 keeping first 1", "lsq_4", "lsq_4 keeping last 1", "lsq_2"):
        stage = Program(tiny({**SHORT, "recipe": name, "model.layers": 3})).now
        shapes[name] = (stage.recipe, learned_by(stage, 1.0), learned_by(stage, 0.0))

    def all_of(before, after):
        (first, ones, _), (second, _, zeros) = shapes[before], shapes[after]
        found = carried(second, zeros, first, ones)
        assert jax.tree.structure(found) == jax.tree.structure(zeros)
        return {float(value) for leaf in jax.tree.leaves(found) for value in np.ravel(leaf)}

    assert all_of("nested", "nested_4") == all_of("nested_4", "nested") == {1.0}
    assert all_of("nested", "nested_4 keeping first 1") == all_of("lsq_4", "lsq_4 keeping last 1") == {1.0}
    # The layer that was kept has learned nothing.
    assert all_of("nested_4 keeping first 1", "nested") == all_of("lsq_4 keeping last 1", "lsq_4") == {0.0, 1.0}
    assert all_of("lsq_4", "lsq_2") == all_of("nested", "lsq_4") == {0.0}
    assert recipes.get("nested").rule_for("x/up") != recipes.get("nested_4").rule_for("x/up")
