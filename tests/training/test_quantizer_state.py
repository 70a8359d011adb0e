"""What recipes add to the training state: learned parameters, remembered state, the scale of the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from two_layers import TwoLayers

from lowprec import recipes
from lowprec.nn import linen
from lowprec.ops import qdot
from lowprec.recipes import GemmRule, LossScaling, Quantizer, Recipe
from lowprec.training.checkpoints import Checkpoints
from lowprec.training.config import OptimizerConfig
from lowprec.training.loss_scaling import LossScale
from lowprec.training.objectives import TeacherIntervention
from lowprec.training.optimizer import build_quantizer_optimizer
from lowprec.training.state import initial_quantizers, initial_state, run_keys
from lowprec.training.step import STEP_METRICS, Update, make_train_step, metric_names

MODEL = TwoLayers()
TOKENS = np.random.default_rng(0).integers(0, 32, (1, 8, 9), dtype=np.int32)
CONFIG = OptimizerConfig(lr=1e-2, warmup_fraction=0.0, final_fraction=1.0)
UPDATE = Update(optax.adam(1e-2), lambda count: 1e-2, build_quantizer_optimizer(CONFIG, 10))


def start(recipe, steps=0):
    """The state after so many steps, and the step."""
    model = linen.quantize(MODEL, recipe)
    state = initial_state(MODEL, UPDATE.optimizer, run_keys(0).params, 8)
    inputs = TOKENS[0, :, :-1]
    quantizers = initial_quantizers(model, UPDATE.quantizer_optimizer, state.params, inputs, jax.random.key(1))
    step = jax.jit(make_train_step(model, UPDATE, jax.random.key(2), model.state_slots(inputs)))
    state = state._replace(quantizers=quantizers)
    for _ in range(steps):
        state, _ = step(state, TOKENS)
    return state, step


@pytest.mark.parametrize("name", ["f32", "fp8_delayed", "lsq_4", "int8_qat", "pqt", "mesa", "fp16_loss_scaled"])
def test_the_state_of_a_recipe_is_saved_and_restored_bit_for_bit(name, tmp_path):
    state, step = start(name, steps=3)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state, {}, {})
    place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    restored, _ = checkpoints.restore(jax.tree.map(place, state))
    jax.tree.map(np.testing.assert_array_equal, restored.state, state)
    onward, again = step(state, TOKENS), step(restored.state, TOKENS)
    jax.tree.map(np.testing.assert_array_equal, again, onward)


def test_recipes_without_variables_add_nothing():
    assert not jax.tree.leaves(start("nvfp4")[0].quantizers)


def test_learned_parameters_have_a_learning_rate_relative_to_their_size():
    """Adam's first step is the learning rate times the sign of the gradient: here, times the size of the parameter."""
    params = {"small": jnp.full((1, 4), 1e-3), "large": jnp.full((1, 1), 50.0)}
    optimizer = build_quantizer_optimizer(OptimizerConfig(quant_lr=0.01, warmup_fraction=0.0), 10)
    gradients = jax.tree.map(lambda leaf: jnp.ones_like(leaf), params)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    np.testing.assert_allclose(updates["small"], -0.01 * 1e-3, rtol=1e-4)
    np.testing.assert_allclose(updates["large"], -0.01 * 50, rtol=1e-4)
    decayed = build_quantizer_optimizer(OptimizerConfig(quant_lr=0.01, quant_weight_decay=0.5, warmup_fraction=0.0), 10)
    updates, _ = decayed.update(jax.tree.map(jnp.zeros_like, params), decayed.init(params), params)
    np.testing.assert_allclose(updates["large"], -0.01 * 0.5 * 50, rtol=1e-5)


def test_the_scale_of_the_loss_halves_on_overflow_and_doubles_after_its_period():
    rule = LossScaling(initial=8.0, period=2, smallest=2.0)
    scale, seen = LossScale.start(rule), []
    for finite in (True, True, True, False, False, False, True, True):
        scale = scale.after(rule, jnp.array(finite))
        seen.append(float(scale.scale))
    assert seen == [8, 16, 16, 8, 4, 2, 2, 4]


HALF = Quantizer("float16", saturate=False)


def scaled(loss_scaling):
    gemm = GemmRule(fwd=(HALF, HALF), dgrad=(HALF, HALF), wgrad=(HALF, HALF))
    return Recipe("half", {".*": gemm}, loss_scaling=loss_scaling)


def test_a_step_that_overflows_changes_nothing_but_the_scale():
    """Gradients beyond 65504 are infinite in float16."""
    state, step = start(scaled(LossScaling(initial=2.0**60)))
    after, metrics = step(state, TOKENS)
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (state.params, state.opt_state))
    assert int(after.step) == 1 and float(after.quantizers.loss_scale.scale) == 2.0**59
    named = dict(zip(STEP_METRICS, np.asarray(metrics), strict=True))
    assert np.isfinite(list(named.values())).all() and named["grad_norm"] == named["update_norm"] == 0


def test_a_skipped_step_is_none_to_the_objective():
    """A teacher stands in for three steps that were taken, whatever was skipped before or between."""
    objective = TeacherIntervention(MODEL, (("inner", 3),))
    model, inputs = linen.quantize(MODEL, scaled(LossScaling(initial=2.0**60, period=100))), TOKENS[0, :, :-1]
    state = initial_state(MODEL, UPDATE.optimizer, run_keys(0).params, 8)
    made = initial_quantizers(model, UPDATE.quantizer_optimizer, state.params, inputs, jax.random.key(1))
    state = state._replace(quantizers=made._replace(objective=objective.init(())))
    step = jax.jit(make_train_step(model, UPDATE, jax.random.key(2), objective=objective))
    names, teacher, seen = metric_names(objective, UPDATE), {"params": state.params}, []
    for _ in range(80):
        before = int(state.quantizers.objective["step"])
        state, metrics = step(state, TOKENS, teacher)
        named = dict(zip(names, np.asarray(metrics), strict=True))
        skipped = named["update_norm"] == 0
        assert int(state.quantizers.objective["step"]) == before + (not skipped)
        seen.append((bool(skipped), float(named["teacher_share"])))
    first = seen.index((False, 1.0))
    assert first > 10 and all(skipped for skipped, _ in seen[:first])
    assert [share for skipped, share in seen if not skipped][:4] == [1, 1, 1, 0]


def test_small_gradients_survive_float16_by_the_scale_of_the_loss():
    """2^-26 is below the smallest float16, 2^-24; times 2^10 it is not. The scale leaves the gradient as it is."""
    rule = scaled(None).rule_for("x")
    x, w = jnp.ones((1, 1)), jnp.ones((1, 1))
    gradient = lambda factor: jax.grad(lambda w: qdot(x, w, rule)[0, 0] * 2.0**-26 * factor)(w)[0, 0] / factor
    assert gradient(1.0) == 0 and gradient(2.0**10) == 2.0**-26
    plain, _ = start(scaled(LossScaling(initial=1.0)), steps=1)
    lifted, _ = start(scaled(LossScaling(initial=256.0)), steps=1)
    differ = [
        float(jnp.max(jnp.abs(a - b)))
        for a, b in zip(*map(jax.tree.leaves, (plain.params, lifted.params)), strict=True)
    ]
    assert max(differ) < 1e-2  # Adam's first step turns tiny gradients into whole steps: no more than one of them


def test_recipes_evaluate_checkpoints_of_others():
    """The quantizers of a recipe that learns start from the parameters that another has trained."""
    state, _ = start("f32", steps=2)
    model = linen.quantize(MODEL, "lsq_4")
    made = model.init_quantizers(state.params, TOKENS[0, :, :-1])
    kernel = state.params["inner"]["kernel"]
    expected = 2 * jnp.mean(jnp.abs(kernel)) / np.sqrt(7)
    assert float(made["quant_params"]["inner"]["fwd.w"]["step"].reshape(())) == pytest.approx(float(expected), rel=1e-5)
    assert recipes.get("lsq_4").learns
