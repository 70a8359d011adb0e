"""One step: its loss, its gradient, its noise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from two_layers import TwoLayers

from lowprec.nn import linen
from lowprec.training.config import OptimizerConfig
from lowprec.training.optimizer import build_optimizer
from lowprec.training.state import TrainState, initial_state, run_keys
from lowprec.training.step import STEP_METRICS, Update, make_train_step, mean_loss
from lowprec.training.tasks import cross_entropy

MODEL = TwoLayers()
TOKENS = np.random.default_rng(0).integers(0, 32, (8, 9), dtype=np.int32)
# Gradient descent with learning rate 1: the update is minus the gradient.
SGD = OptimizerConfig("sgd", lr=1.0, b1=0.0, weight_decay=0.0, clip=0.0, warmup_fraction=0.0, final_fraction=1.0)
OPTIMIZER = build_optimizer(SGD, 10)
UPDATE = Update(OPTIMIZER, lambda count: 1.0)


@pytest.fixture(scope="module")
def state() -> TrainState:
    return jax.jit(lambda: initial_state(MODEL, OPTIMIZER, run_keys(0).params, 8))()


@functools.cache
def compiled(recipe):
    model = linen.quantize(MODEL, recipe)
    return jax.jit(lambda state, tokens, key: make_train_step(model, UPDATE, key)(state, tokens))


def run(state, tokens, recipe="f32", noise_seed=0):
    """(new state, metrics) of a step."""
    new, metrics = compiled(recipe)(state, tokens, run_keys(noise_seed).noise)
    return new, dict(zip(STEP_METRICS, np.asarray(metrics), strict=True))


def test_the_loss_is_the_mean_cross_entropy_in_nats():
    logits = np.random.default_rng(1).normal(size=(2, 3, 5)).astype(np.float32)
    targets = np.array([[0, 4, 2], [1, 1, 3]])
    wide = logits.astype(np.float64)
    expected = np.log(np.exp(wide).sum(-1)) - np.take_along_axis(wide, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(cross_entropy(jnp.asarray(logits), targets), expected, rtol=1e-6)
    assert cross_entropy(jnp.asarray(logits, jnp.bfloat16), targets).dtype == jnp.float32


def test_a_model_that_knows_nothing_loses_the_logarithm_of_the_vocabulary(state):
    blank = jax.tree.map(jnp.zeros_like, state.params)
    assert float(mean_loss(MODEL, {"params": blank}, TOKENS, jax.random.key(0))) == pytest.approx(np.log(32), rel=1e-6)


def test_targets_are_the_inputs_one_later(state):
    logits = MODEL.apply({"params": state.params}, TOKENS[:, :-1])
    expected = jnp.mean(cross_entropy(logits, jnp.asarray(TOKENS[:, 1:])))
    assert mean_loss(MODEL, {"params": state.params}, TOKENS, jax.random.key(0)) == expected


def test_the_step_is_gradient_descent(state):
    new, metrics = run(state, TOKENS[None])
    loss, gradient = jax.value_and_grad(lambda p: mean_loss(MODEL, {"params": p}, TOKENS, jax.random.key(0)))(
        state.params
    )
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-6)
    assert metrics["grad_norm"] == pytest.approx(float(optax.global_norm(gradient)), rel=1e-5)
    assert metrics["update_norm"] == pytest.approx(metrics["grad_norm"], rel=1e-6)
    expected = jax.tree.map(jnp.subtract, state.params, gradient)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2**-23), new.params, expected)
    assert metrics["param_norm"] == pytest.approx(float(optax.global_norm(new.params)), rel=1e-6)
    assert int(new.step) == 1


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_microbatches_are_the_batch_itself(state, accumulate):
    """In float32, up to rounding: gradients are means of 64 products, parameters below 2 are rounded to 2^-24."""
    whole, metrics = run(state, TOKENS[None])
    parts, metrics_of_parts = run(state, TOKENS.reshape(accumulate, 8 // accumulate, 9))
    assert metrics["update_norm"] > 0.1
    for name in STEP_METRICS:
        assert metrics_of_parts[name] == pytest.approx(metrics[name], rel=1e-6), name
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2**-22), whole.params, parts.params)


STOCHASTIC = "fwd=int8@row dgrad=int8@row(stochastic) wgrad=int8@row(stochastic)"


def differs(first, second):
    return any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (first, second)), strict=True))


def test_noise_is_a_function_of_seed_and_step_alone(state):
    at = lambda seed: run(state._replace(step=jnp.int32(3)), TOKENS[None], STOCHASTIC, seed)[0].params
    assert not differs(at(0), at(0))
    assert differs(at(0), at(1))


def test_noise_differs_from_step_to_step_and_from_microbatch_to_microbatch(state):
    """The same microbatch twice gives the mean of two gradients with noise of their own."""
    model, keys = linen.quantize(MODEL, STOCHASTIC), run_keys(0)

    def gradient(step, microbatch):
        key = jax.random.fold_in(jax.random.fold_in(keys.noise, step), microbatch)
        return jax.grad(lambda p: mean_loss(model, {"params": p}, TOKENS, key))(state.params)

    gradient = jax.jit(gradient)
    assert differs(gradient(0, 0), gradient(1, 0))
    assert differs(gradient(0, 0), gradient(0, 1))
    twice, _ = run(state, np.stack([TOKENS, TOKENS]), STOCHASTIC)
    expected = jax.tree.map(lambda a, b: -(a + b) / 2, gradient(0, 0), gradient(0, 1))
    updates = jax.tree.map(jnp.subtract, twice.params, state.params)
    jax.tree.map(
        lambda update, value: np.testing.assert_allclose(update, value, rtol=0, atol=2**-22), updates, expected
    )


def test_streams_of_a_run_are_independent_of_each_other():
    keys = [jax.random.key_data(key).tolist() for seed in (0, 1) for key in run_keys(seed)]
    assert len({tuple(key) for key in keys}) == 6


def test_initial_values_do_not_depend_on_the_recipe(state):
    model = linen.quantize(MODEL, "nvfp4")
    quantized = jax.jit(lambda: initial_state(model, OPTIMIZER, run_keys(0).params, 8))()
    assert not differs(quantized.params, state.params)
