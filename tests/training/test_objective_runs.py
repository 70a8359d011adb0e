"""Objectives and the optimizer's special pieces, each in a tiny run from its config."""

import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec import recipes
from lowprec.errors import UsageError
from lowprec.nn import linen
from lowprec.optim.paths import leaves_by_path
from lowprec.quantizers.nested import rate_factors
from lowprec.recipes.library.bridged import bridged_weights
from lowprec.training import train
from lowprec.training.config import OptimizerConfig
from lowprec.training.learned_weights import by_kernel
from lowprec.training.metrics import TIMINGS, read_lines
from lowprec.training.objective_choice import Teacher, read_at
from lowprec.training.optimizer import build_optimizer, build_quantizer_optimizer
from lowprec.training.program import Program
from lowprec.training.standalone_evaluation import evaluate_run, open_run
from lowprec.training.state import TrainState, initial_quantizers, initial_state, run_keys
from lowprec.training.step import Update, make_train_step
from lowprec.training.teachers import open_teacher

SHORT = {"train.steps": 4, "eval.every": 0, "eval.batches": 1, "checkpoint.every": 2}


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """run(changes) -> (lines of metrics.jsonl, directory)."""

    def go(changes):
        workdir = tmp_path_factory.mktemp("runs") / "run"
        assert train(tiny({**SHORT, **changes}), workdir)["status"] == "done"
        return read_lines(workdir / "metrics.jsonl"), workdir

    return go


@pytest.fixture(scope="module")
def teacher(run):
    return run({"recipe": "f32", "train.steps": 2, "seed": 3})[1]


@pytest.fixture(scope="module")
def distilled(run, teacher):
    """(changes, lines, directory)."""
    changes = {
        "recipe": "fwd=int4@row",
        "objective.name": "distillation",
        "objective.teacher": str(teacher),
        "objective.alpha": 0.25,
        "objective.hidden": 0.5,
        "train.accumulate": 2,
    }
    return changes, *run(changes)


@pytest.mark.slow
def test_a_run_learns_from_another_and_tells_the_parts_of_its_loss(distilled):
    _, lines, _ = distilled
    for line in lines:
        parts = 0.75 * line["task_loss"] + 0.25 * line["teacher_divergence"] + 0.5 * line["hidden_error"]
        assert line["loss"] == pytest.approx(parts, rel=1e-6)
        assert line["teacher_divergence"] > 0 and line["hidden_error"] > 0
        # One token is one byte.
        assert line["bits_per_byte"] == pytest.approx(line["task_loss"] / np.log(2), rel=1e-6)


@pytest.mark.slow
def test_checkpoints_hold_no_teacher_and_are_read_without_one(distilled, teacher, tmp_path):
    shutil.move(teacher, tmp_path / "moved")
    try:
        program, checkpoint, _ = open_run(distilled[2])
    finally:
        shutil.move(tmp_path / "moved", teacher)
    assert program.teacher is None and checkpoint.state.quantizers.objective == ()
    assert checkpoint.progress["teacher"].endswith("@2")


@pytest.mark.slow
def test_a_run_does_not_go_on_with_another_teacher(distilled, teacher, tiny, tmp_path):
    changes, _, workdir = distilled
    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "run/summary.json").unlink()
    stored = (teacher / "config.json").read_text()
    (teacher / "config.json").write_text(stored.replace('"seed": 3', '"seed": 4'))
    try:
        with pytest.raises(UsageError, match=r"objective.teacher is at .*@2 .*, but the run has learned from .*@2"):
            train(tiny({**SHORT, **changes}), tmp_path / "run")
    finally:
        (teacher / "config.json").write_text(stored)


@pytest.mark.slow
def test_the_teacher_stands_in_for_the_first_half(run, teacher):
    lines, _ = run(
        {"recipe": "fwd=int4@row", "objective.name": "teacher_intervention", "objective.teacher": str(teacher)}
    )
    assert [line["teacher_share"] for line in lines] == [1, 1, 0, 0]


def test_the_teacher_stands_in_everywhere_then_for_attention_alone(tiny, teacher):
    """What is replaced, seen by what has no gradient: nothing reaches a place whose output is the teacher's."""
    phases = r"layers/\d+/mlp until 0.25; layers/\d+/attention until 0.5"
    changes = {"objective.name": "teacher_intervention", "objective.teacher": str(teacher), "objective.phases": phases}
    config = tiny({**SHORT, **changes, "recipe": "fwd=int4@row", "train.steps": 8, "objective.alpha": 0.0})
    program = Program(config, teacher=open_teacher(config))
    state, batches, silent = program.initial_state(), program.batches(), []

    def loss(params, examples, memory):
        first = jax.tree.map(lambda rows: rows[0], examples)
        model, constants = program.now.quantized, program.now.constants
        return program.now.objective.loss(model, {"params": params}, first, jax.random.key(0), memory, constants)[0]

    gradient = jax.jit(jax.grad(loss))
    for _ in range(6):
        examples = program.put(next(batches))
        found = gradient(state.params, examples, state.quantizers.objective)["layers"]
        silent.append({part for part in ("mlp", "attention") if not any(map(np.any, jax.tree.leaves(found[part])))})
        state, _ = program.train_step(state, examples)
    assert silent == [{"mlp", "attention"}] * 2 + [{"attention"}] * 2 + [set()] * 2


@pytest.mark.slow
def test_sharpness_is_measured_and_its_memory_survives_a_kill(run, tiny):
    """As if killed after the checkpoint of step 2, in the middle of a window of three."""
    changes = {"recipe": "lsq_4", "objective.name": "gaqat", "objective.threshold": 0.0, "objective.window": 3}
    lines, workdir = run(changes)
    assert all(line["sharpness"] > 0 for line in lines)
    assert [line["frozen_scales"] for line in lines[:2]] == [0, 0] and lines[2]["frozen_scales"] > 0
    before = open_run(workdir)[1].progress["state_sha256"]
    (workdir / "summary.json").unlink()
    shutil.rmtree(workdir / "checkpoints/4")
    assert train(tiny({**SHORT, **changes}), workdir)["state_sha256"] == before
    untimed = lambda found: [{name: line[name] for name in line if name not in TIMINGS} for line in found]
    assert untimed(read_lines(workdir / "metrics.jsonl")) == untimed(lines)


@pytest.mark.slow
def test_widths_share_one_model_and_each_has_its_loss(run):
    lines, workdir = run({"recipe": "nested_8", "objective.name": "widths", "objective.widths": "8,2"})
    for line in lines:
        assert line["loss"] == pytest.approx((line["loss_8_bits"] + line["loss_2_bits"]) / 2, rel=1e-6)
        assert line["loss_2_bits"] != line["loss_8_bits"]
    # Another recipe has no widths, and is not asked for any.
    assert "recipe bf16" in evaluate_run(workdir, recipe="bf16")
    assert read_at(recipes.get("nested_8"), 4).rules == recipes.get("nested_4").rules


@pytest.mark.slow
def test_sparse_adam_moves_its_masks_and_sharpness_needs_no_scales(run):
    changes = {"recipe": "ast_2_4", "optimizer.name": "sparse_adamw", "objective.name": "sam", "optimizer.lr": 0.05}
    lines, _ = run({**changes, "optimizer.masked_decay": 0.01, "optimizer.masked_decay_steps": 1})
    assert all(0 <= line["flip_rate"] < 1 and line["frozen_scales"] == 0 for line in lines)
    # Masks are those before the update, so that the first step has flipped nothing yet.
    assert lines[0]["flip_rate"] == 0 and lines[-1]["flip_rate"] > 0


@pytest.mark.slow
def test_weights_that_oscillate_are_frozen_on_their_grid(run):
    """Momentum 0.01: a single oscillation is a frequency of 0.01."""
    changes = {"recipe": "fwd=int4@row", "optimizer.freeze_oscillations": 0.005, "optimizer.lr": 0.3}
    lines, _ = run({**changes, "train.steps": 8, "optimizer.warmup_fraction": 0.0})
    shares = [line["frozen_weights"] for line in lines]
    assert shares[0] == 0 and 0 < shares[-1] < 1 and shares == sorted(shares)
    assert all(line["oscillating_weights"] == 0 for line in lines)


def test_weights_with_learned_steps_rest_on_their_codes(tiny):
    """An oscillation is a frequency of .01: above a threshold that falls from .025 to .005 after half of the run."""
    changes = {"recipe": "lsq_3", "optimizer.lr": 0.3, "optimizer.quant_lr": 0.05, "optimizer.warmup_fraction": 0.0}
    limits = {"optimizer.freeze_oscillations": 0.005, "optimizer.freeze_oscillations_start": 0.025}
    program = Program(tiny({**SHORT, **changes, **limits, "train.steps": 10}))
    state, batches, held, shares = program.initial_state(), program.batches(), {}, []
    fmt = program.recipe.rule_for("layers/0/mlp/up").fwd[1].format.element
    for _ in range(10):
        state, metrics = program.train_step(state, program.put(next(batches)))
        shares.append(program.now.read_metrics(np.asarray(metrics))["frozen_weights"])
        learned, kernels = by_kernel(state.quantizers.params), leaves_by_path(state.params)
        for path, watch in state.opt_state.watched.items():
            codes = np.clip(np.round(kernels[path] / np.asarray(learned[path]["step"])), fmt.min, fmt.max)
            frozen = np.asarray(watch.frozen)
            np.testing.assert_array_equal(codes[frozen], np.asarray(watch.held)[frozen])
            before, at_rest = held.get(path, (codes, np.zeros_like(frozen)))
            np.testing.assert_array_equal(codes[at_rest], before[at_rest])
            held[path] = codes, frozen
    assert shares[:4] == [0] * 4 and 0 < shares[-1] < 1 and shares == sorted(shares)


def test_only_the_chosen_parameters_are_trained_and_have_state(tiny):
    program = Program(tiny({**SHORT, "recipe": "f32", "train.update": "layers/mlp/.*"}))
    before, batches = program.initial_state(), program.batches()
    kept = jax.tree.map(np.asarray, before.params)
    after, _ = program.train_step(before, program.put(next(batches)))
    moved = jax.tree.map(lambda old, new: bool(np.any(old != np.asarray(new))), kept, after.params)
    assert all(jax.tree.leaves(moved["layers"]["mlp"]))
    moved["layers"]["mlp"] = False
    assert not any(jax.tree.leaves(moved))
    sizes = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    # Two moments, and two counts: of Adam and of the schedules.
    assert sizes(after.opt_state) - 2 * sizes(kept["layers"]["mlp"]) <= 3


# Of a layer of 48 tokens: query, key, value, out and down, gate and up, the head, scores and context.
FORWARD = ["[48,16]"] * 5 + ["[48,64]"] * 2 + ["[48,256]", "[4,12,12]", "[4,16,12]"]
# Back to the outputs of down, to its inputs; the gradients of gate, up and down.
BACK_TO_THE_MLP = ["[48,16]", "[48,64]", "[16,64]", "[16,64]", "[64,16]"]


@pytest.mark.parametrize(
    ("selected", "backward"),
    [
        ("layers/mlp/.*", BACK_TO_THE_MLP),
        pytest.param("head/.*", ["[16,256]"], marks=pytest.mark.slow),
        pytest.param("", None, marks=pytest.mark.slow),
    ],
)
def test_the_compiled_step_has_no_gradient_of_what_is_not_trained(selected, backward, tiny):
    """Nor a pass back to it: nothing before the MLP has one, and the embedding's sums over tokens are gone."""
    program = Program(tiny({**SHORT, "recipe": "f32", "data.seq_len": 12, "train.update": selected}))
    examples = jax.ShapeDtypeStruct((1, 4, 13), jnp.int32)
    compiled = program.train_step.lower(program.abstract_state(), examples).compile()
    text, flops = compiled.as_text(), compiled.cost_analysis()["flops"]
    products = re.findall(r"= \w+(\[[\d,]*\])\S* dot\(", text)
    if backward is None:
        # Twice the products of the forward pass more, and a second scatter: the first is that of the loss.
        assert len(products) == 3 * len(FORWARD) and text.count(" scatter(") == 2
        assert products.count("[16,16]") == 4  # the gradients of query, key, value and out
        return
    assert sorted(products) == sorted(FORWARD + backward) and text.count(" scatter(") == 1
    moments = [leaf for leaf in jax.tree.leaves(program.abstract_state().opt_state) if leaf.ndim]
    trained = program.update.selection.split(program.initial_state().params)[0]
    assert sorted(leaf.shape for leaf in moments) == sorted(2 * [leaf.shape for leaf in trained.values()])
    assert flops < 2.1e6  # of 3.0e6 with everything trained


def test_the_steps_of_narrow_widths_learn_more_slowly():
    params = {"step_8": jnp.ones(3), "step_2": jnp.ones(3), "left": jnp.ones(3)}
    rates = rate_factors((8, 2))
    updates = []
    for given in (None, rates):
        optimizer = build_quantizer_optimizer(OptimizerConfig(), 10, given)
        updates.append(optimizer.update(params, optimizer.init(params), params)[0])
    plain, scaled = updates
    for name, factor in {**rates, "left": 1.0}.items():
        np.testing.assert_allclose(scaled[name], factor * plain[name], rtol=1e-6)
    assert rates["step_2"] == pytest.approx(1e-3)


@pytest.mark.slow
def test_a_bridge_is_halved_where_its_phase_ends(tiny):
    """At a phase's end the factor is turned to singular vectors: its columns are orthogonal then, and not before."""
    program = Program(tiny({"recipe": "f32"}))
    recipe = bridged_weights("short", "int2@row", "", rank=4, interval=2)
    model, inputs = linen.quantize(program.model, recipe), jnp.zeros((4, 16), jnp.int32)
    config = OptimizerConfig(lr=0.05, quant_lr=0.05, warmup_fraction=0.0)
    optimizer, learned = build_optimizer(config, 4), build_quantizer_optimizer(config, 4)
    update = Update(optimizer, lambda count: 0.05, learned, 4)
    plain = initial_state(program.model, optimizer, run_keys(0).params, 16)
    made = initial_quantizers(model, learned, plain.params, inputs, jax.random.key(0))
    state: TrainState = plain._replace(quantizers=made)
    step = jax.jit(make_train_step(model, update, jax.random.key(1), model.state_slots(inputs)))
    batches, crossed = program.batches(), []
    for _ in range(3):
        state, _ = step(state, program.put(next(batches)))
        left = state.quantizers.params["layers"]["0:1"]["mlp"]["up"]["fwd.w"]["left"][0]
        gram = np.asarray(left.T @ left, np.float64)
        crossed.append(np.abs(gram - np.diag(np.diag(gram))).max() / np.diag(gram).max())
    assert crossed[0] > 1e-3 and crossed[1] < 1e-5 and crossed[2] > 1e-3


GRADUAL = {"objective.name": "teacher_intervention", "objective.teacher": "nowhere"}
REFUSED = [
    ({"objective.name": "destillation"}, "unknown objective 'destillation'; did you mean distillation"),
    ({"objective.rho": 0.1}, "objective.rho is 0.1, but the task's own loss does not use it; it is for sam, gaqat"),
    ({"objective.name": "sam", "objective.window": 7}, "objective 'sam' does not use it; it is for gaqat"),
    ({"objective.name": "distillation"}, "needs objective.teacher, the directory of a run"),
    ({"objective.name": "distillation", "objective.teacher": "nowhere"}, "there is no directory nowhere"),
    ({**GRADUAL, "objective.phases": "layers until 2"}, "a list of places and the fractions of the run"),
    ({**GRADUAL, "objective.phases": "a until 0.5", "objective.until": 0.3}, "what objective.until would: leave that"),
    ({"objective.name": "gaqat", "recipe": "nvfp4"}, "gaqat holds learned scales; recipe nvfp4 has none"),
    ({"objective.name": "widths", "recipe": "lsq_4"}, "take nested_8"),
    ({"objective.name": "widths", "recipe": "nested_8", "objective.widths": "8,5"}, "8, 6, 4, 2, not 5"),
    ({"objective.name": "widths", "recipe": "nested_8", "objective.widths": "8;4"}, "a list of bits, e.g. '8,6,4,2'"),
    ({"optimizer.freeze_oscillations": 0.1, "recipe": "qvgen_4"}, "does not serve recipe qvgen_4"),
    ({"optimizer.freeze_oscillations_start": 0.1}, "is 0, or from freeze_oscillations 0.0 > 0 to 1, not 0.1"),
    ({"optimizer.freeze_oscillations": 0.1, "recipe": "bf16 then lsq_4 at 50%"}, "freezes codes of one recipe"),
    ({"train.update": "layers/mpl/.*"}, "no parameter matches 'layers/mpl/.*'"),
    ({"train.update": "layers/.*", "recipe": "adapt"}, "the controller of recipe adapt needs all gradients"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_written(changes, message, tiny, tmp_path):
    with pytest.raises(UsageError) as refusal:
        train(tiny(changes), tmp_path / "run")
    assert message in str(refusal.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.width": 32, "objective.hidden": 1.0}, "its model.width is 16, not 32"),
        ({"data.tokenizer": "bpe300"}, "it reads tokens of 'byte', not of 'bpe300'"),
        ({"objective.top_k": 1000}, "the 1000 largest of"),
    ],
)
def test_a_teacher_of_another_kind_is_refused(changes, message, teacher, tiny, tmp_path):
    taught = {"objective.name": "distillation", "objective.teacher": str(teacher)}
    with pytest.raises(UsageError) as refusal:
        train(tiny({**taught, **changes}), tmp_path / "run")
    assert message in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_another_vocabulary_is_refused(tiny):
    config = tiny({"objective.name": "distillation", "objective.teacher": "there"})
    with pytest.raises(UsageError, match="it predicts one of 7 outcomes, this run one of"):
        Program(config, teacher=Teacher(None, {}, 7, "a@1"))
