"""Oscillations: the paper's toy regression of one weight, counts by hand, and what freezing must not touch."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowprec.errors import UsageError
from lowprec.ops import GemmRule, qdot
from lowprec.optim.oscillation import (
    Grid,
    cosine_threshold,
    freeze_oscillations,
    oscillation_metrics,
    quantizer_grids,
)
from lowprec.quantizers import EXACT, REUSE, AbsMax, Hadamard, Quantizer
from lowprec.quantizers.learned_rules import LearnedStep


def round_grid(params, **_):
    return {"w": Grid(jnp.round(params["w"]), jnp.float32(1))}


def regression(target, threshold, steps=400, start=0.0, momentum=0.02):
    """min (q(w) - target)² / 2 with a straight-through gradient (§2 of the paper): codes and metrics of each step."""
    optimizer = freeze_oscillations(optax.sgd(0.03), round_grid, threshold=threshold, momentum=momentum)
    params = {"w": jnp.full(1, start)}

    def step(carry, _):
        params, state = carry
        gradient = {"w": jnp.round(params["w"]) - target}
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (jnp.round(params["w"][0]), params["w"][0], oscillation_metrics(state))

    _, trail = jax.jit(lambda: jax.lax.scan(step, (params, optimizer.init(params)), None, steps))()
    return trail


@pytest.mark.parametrize("target", [0.3, 0.7, -1.8])
def test_a_weight_between_two_codes_oscillates_until_it_is_frozen_at_the_nearer(target):
    codes, _, metrics = regression(target, threshold=None)
    late = np.asarray(codes[100:])
    assert set(late) == {np.floor(target), np.ceil(target)}
    # In the mean the codes are the target: the weight is pulled up as often as down, weighted by the distance.
    np.testing.assert_allclose(late.mean(), target, atol=0.02)
    assert float(metrics["oscillating"][-1]) == 1 and float(metrics["frozen"][-1]) == 0
    # Nine tenths of the frequency below: by then the average has forgotten where it began.
    limit = 1.8 * min(target % 1, 1 - target % 1)
    codes, weights, metrics = regression(target, threshold=limit)
    frozen = np.asarray(metrics["frozen"]) == 1
    assert frozen[-1] and not frozen[:10].any()
    np.testing.assert_array_equal(np.asarray(weights)[frozen], np.round(target))
    assert float(metrics["oscillating"][-1]) == 0


def test_the_frequency_is_that_of_the_theory():
    """Down by lr (1 - t), up by lr t: per step min(t, 1 - t) cycles, each of two oscillations."""
    _, _, metrics = regression(0.3, threshold=None, steps=2000, momentum=0.005)
    # 2 · .3; the average over some 200 steps of a cycle of 10 steps is within a few percent of it
    np.testing.assert_allclose(metrics["oscillation_frequency"][-1], 0.6, atol=0.03)


def test_a_weight_that_reaches_a_code_does_not_oscillate():
    codes, weights, metrics = regression(2.0, threshold=0.01, start=-1.0)
    assert float(codes[-1]) == 2 and not np.any(metrics["frozen"]) and not np.any(metrics["oscillation_frequency"])
    assert float(weights[-1]) < 2.0  # it rests where its code is right


def test_oscillations_are_changes_against_the_change_before():
    random = np.random.default_rng(0)
    codes = random.integers(-1, 2, (30, 5)).astype(np.float32)
    optimizer = freeze_oscillations(optax.identity(), round_grid, threshold=None, momentum=0.25)
    params = {"w": jnp.asarray(codes[0])}
    state = optimizer.init(params)
    frequency, average, direction = np.zeros(5), codes[0].astype(np.float64), np.zeros(5)
    for before, after in itertools.pairwise(codes):
        updates, state = optimizer.update({"w": jnp.asarray(after - before)}, state, {"w": jnp.asarray(before)})
        np.testing.assert_array_equal(updates["w"], after - before)
        for i in range(5):
            change = np.sign(after[i] - before[i])
            frequency[i] = 0.75 * frequency[i] + 0.25 * (change * direction[i] < 0)
            direction[i] = change or direction[i]
        average = 0.75 * average + 0.25 * after
    np.testing.assert_allclose(state.watched["w"].frequency, frequency, rtol=1e-5)
    np.testing.assert_allclose(state.watched["w"].average, average, atol=1e-5)


def test_the_threshold_falls_along_half_a_cosine():
    threshold = cosine_threshold(0.04, 0.01, 100)
    np.testing.assert_allclose([threshold(t) for t in (0, 50, 100, 200)], [0.04, 0.025, 0.01, 0.01], rtol=1e-6)
    _, _, metrics = regression(0.3, threshold=cosine_threshold(2.0, 0.1, 200))
    frozen = np.asarray(metrics["frozen"])
    assert not frozen[:60].any() and frozen[-1]


# A layer under a recipe.
W4 = Quantizer("int4@row")
RULE = GemmRule(fwd=(EXACT, W4), dgrad=(EXACT, REUSE))
X = jax.random.normal(jax.random.key(0), (64, 16))
TARGET = jax.random.normal(jax.random.key(1), (16, 8))


def train(threshold, steps=300):
    loss = lambda p: jnp.mean((qdot(X, p["a"]["kernel"], RULE) - X @ TARGET + p["head"]["kernel"]) ** 2)
    params = {"a": {"kernel": 0.3 * TARGET}, "head": {"kernel": jnp.zeros(8)}}
    grids = quantizer_grids(W4)
    optimizer = freeze_oscillations(optax.adam(0.02), grids, threshold=threshold, momentum=0.05)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        watch = state.watched["a/kernel"]
        seen = (grids(params)["a/kernel"].codes, watch.frozen, watch.held, oscillation_metrics(state))
        return (params, state), seen

    (params, _), trail = jax.jit(lambda: jax.lax.scan(step, (params, optimizer.init(params)), None, steps))()
    return params, trail


def test_frozen_weights_of_a_layer_keep_their_codes_and_the_others_train_on():
    params, (codes, frozen, held, metrics) = train(0.1)
    frozen, codes, held = map(np.asarray, (frozen, codes, held))
    assert 0.05 < frozen[-1].mean() < 0.95
    assert np.all(frozen[1:] >= frozen[:-1])  # for ever
    np.testing.assert_array_equal(codes[frozen], held[frozen])
    assert np.all(held[1:][frozen[:-1]] == held[:-1][frozen[:-1]])
    assert np.any(params["head"]["kernel"] != 0)
    _, (_, _, _, free_metrics) = train(None)
    assert float(metrics["oscillating"][-1]) < 0.5 * float(free_metrics["oscillating"][-1])


def test_watching_changes_no_bit_of_the_training():
    watched, _ = train(None, steps=20)
    loss = lambda p: jnp.mean((qdot(X, p["a"]["kernel"], RULE) - X @ TARGET + p["head"]["kernel"]) ** 2)
    params, optimizer = {"a": {"kernel": 0.3 * TARGET}, "head": {"kernel": jnp.zeros(8)}}, optax.adam(0.02)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda: jax.lax.scan(step, (params, optimizer.init(params)), None, 20))()
    jax.tree.map(np.testing.assert_array_equal, watched, params)


def test_a_grid_is_what_the_quantizer_multiplies():
    for fmt in ("int4@row", "int8@tensor", "int4@1x8"):
        quantizer = Quantizer(fmt)
        grid = quantizer_grids(quantizer, ".*")({"w": TARGET})["w"]
        np.testing.assert_array_equal(grid.codes, np.round(grid.codes))
        np.testing.assert_array_equal(grid.codes * grid.scale, quantizer.round(TARGET, -2).values)
    for refused in (
        Quantizer("int4@row", Hadamard(16)),
        Quantizer("nvfp4"),
        Quantizer("fx8.4"),
        Quantizer("int4@row", scale=LearnedStep(offset=True)),
        EXACT,
    ):
        with pytest.raises(UsageError, match="have no integer codes that follow from them alone"):
            quantizer_grids(refused)


@pytest.mark.parametrize("fmt", ["int4@tensor", "int3@row"])
def test_layers_of_a_stack_have_grids_of_their_own(fmt):
    """With scales from the weights, and with learned ones."""
    stacked = jnp.stack([TARGET, 7 * TARGET])
    steps = jax.vmap(lambda w: LearnedStep().initial_params(w, Quantizer(fmt).format, -2))(stacked)
    for rule, learned in ((AbsMax(), None), (LearnedStep(), {"w": steps})):
        quantizer = Quantizer(fmt, scale=rule)
        grid = quantizer_grids(quantizer, ".*")({"w": stacked}, learned=learned)["w"]
        np.testing.assert_array_equal(grid.codes, np.round(grid.codes))
        np.testing.assert_array_equal(grid.codes[1], grid.codes[0])
        for index, w in enumerate(stacked):
            if learned is None:
                values = quantizer.round(w, -2).values
            else:
                own = {"step": steps["step"][index]}
                values = quantizer.scale.quantize(w, quantizer.format, -2, own, {}, None)[0]
            np.testing.assert_array_equal(grid.codes[index] * grid.scale[index], values)


def test_codes_of_learned_steps_are_watched_from_the_first_update_on():
    """Before it no step is known: the first codes are neither a change nor far from their average."""
    quantizer = Quantizer("int4@tensor", scale=LearnedStep())
    optimizer = freeze_oscillations(optax.identity(), quantizer_grids(quantizer, ".*"), threshold=0.3, momentum=0.5)
    learned = {"w": {"step": jnp.full((1, 1), 0.5)}}
    at = lambda *codes: {"w": 0.5 * jnp.array([codes], jnp.float32)}
    params = at(3.0, -8.0)
    state = optimizer.init(params)
    codes, frozen = [], []
    for target in (at(3.0, -8.0), at(4.0, -8.0), at(3.0, -9.0), at(4.0, -8.0)):
        updates, state = optimizer.update(jax.tree.map(jnp.subtract, target, params), state, params, learned=learned)
        params = optax.apply_updates(params, updates)
        codes.append(state.watched["w"].codes[0].tolist())
        frozen.append(state.watched["w"].frozen[0].tolist())
    # 3, 4, 3 is an oscillation: a frequency of .5. The average is 3, 3.5, 3.25; what lies below -8 has the code -8.
    assert codes == [[3, -8], [4, -8], [3, -8], [3, -8]]
    assert frozen == [[False, False], [False, False], [True, False], [True, False]]
    assert params["w"][0].tolist() == [1.5, -4.0]
