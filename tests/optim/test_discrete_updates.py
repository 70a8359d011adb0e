"""Discrete updates of codes (PV-tuning), against numpy and against straight-through training of latent weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowprec import quantize
from lowprec.errors import UsageError
from lowprec.formats import element_of, value_table
from lowprec.optim import dense, discrete_updates, quantize_weights
from lowprec.quantizers.qtensor import quantize_like

KEY = jax.random.key(0)
STILL = optax.set_to_zero()
W = jax.random.normal(KEY, (32, 24))


def nearest(x, q):
    """By brute force: of all values of the element format times the scale of each element."""
    layout = q.layout
    scales = np.asarray(
        layout.merge(jnp.broadcast_to(layout.broadcast_scale(q.scales), layout.split_shape)), np.float64
    )
    grid = value_table(element_of(q.fmt)) * scales[..., None]
    return np.take_along_axis(grid, np.abs(grid - np.asarray(x, np.float64)[..., None]).argmin(-1)[..., None], -1)[
        ..., 0
    ]


@pytest.mark.parametrize("fmt", ["int4@1x8", "e2m1fn@1x8", "int8@row", "ternary@tensor"])
def test_with_all_codes_free_it_is_the_projection_of_the_stepped_weight(fmt):
    q = quantize(W, fmt, axis=0)
    optimizer = discrete_updates(optax.sgd(1.0), STILL, fraction=1.0)
    gradient = jax.random.normal(jax.random.key(1), W.shape)
    found, state = optimizer.step({"w": q}, {"w": gradient}, optimizer.init({"w": q}))
    np.testing.assert_allclose(found["w"].dequantize(), nearest(q.dequantize() - gradient, q), rtol=1e-6)
    np.testing.assert_array_equal(found["w"].scales, q.scales)
    assert 0 < state.changed["w"] < 1


@pytest.mark.parametrize("fraction", [0.003, 0.01, 0.5])
def test_at_most_a_fraction_of_the_codes_changes_and_those_with_the_largest_steps(fraction):
    q = quantize(W, "int4@1x8", axis=0)
    optimizer = discrete_updates(optax.sgd(1.0), STILL, fraction=fraction)
    gradient = jax.random.normal(jax.random.key(1), W.shape)  # of more than a spacing, mostly
    found, state = optimizer.step({"w": q}, {"w": gradient}, optimizer.init({"w": q}))
    before, after = np.asarray(q.dequantize()), np.asarray(found["w"].dequantize())
    size = int(np.ceil(fraction * W.size))
    stepped = nearest(before - np.asarray(gradient), q)
    changing = np.abs(stepped - before) > 1e-3  # others have no other value nearer, however large their step
    largest = np.argsort(-(np.abs(np.asarray(gradient)) * changing).ravel())[:size]
    expected = before.copy().ravel()
    expected[largest] = stepped.ravel()[largest]
    np.testing.assert_allclose(after.ravel(), expected, rtol=1e-6)
    assert np.sum(after != before) <= size
    np.testing.assert_allclose(state.changed["w"], np.mean(after != before), rtol=1e-6)


def test_without_decay_it_is_straight_through_training_bit_for_bit():
    x, y = jax.random.normal(jax.random.key(1), (64, 32)), jax.random.normal(jax.random.key(2), (64, 24))
    gradient = jax.jit(jax.grad(lambda w: jnp.mean((x @ w - y) ** 2)))
    tx = optax.adam(3e-2)
    q = quantize(W, "int4@1x8", axis=0)
    latent, state = q.dequantize(), tx.init(q.dequantize())
    optimizer = discrete_updates(tx, STILL, fraction=1.0, decay=0.0)
    params, ours = {"w": q}, optimizer.init({"w": q})
    for _ in range(10):
        updates, state = tx.update(gradient(quantize_like(latent, q).dequantize()), state, latent)
        latent = optax.apply_updates(latent, updates)
        params, ours = optimizer.step(params, {"w": gradient(params["w"].dequantize())}, ours)
        np.testing.assert_array_equal(params["w"].codes, quantize_like(latent, q).codes)
        np.testing.assert_array_equal(ours.latent["w"], latent)


def test_the_trust_ratio_bounds_the_change_but_allows_one():
    q = quantize(W, "int4@1x8", axis=0)
    gradient = jax.random.normal(jax.random.key(1), W.shape)
    before = np.asarray(q.dequantize())
    changes = []
    for trust in (1e-9, 0.1, 0.3, 10.0):
        optimizer = discrete_updates(optax.sgd(1.0), STILL, fraction=0.5, trust=trust)
        found, _ = optimizer.step({"w": q}, {"w": gradient}, optimizer.init({"w": q}))
        change = np.asarray(found["w"].dequantize()) - before
        changes.append(np.sum(change != 0))
        assert changes[-1] == 1 or np.linalg.norm(change) <= trust * np.linalg.norm(before) * (1 + 1e-6)
    assert changes[0] == 1 < changes[1] < changes[2] < changes[3]


def test_codes_are_drawn_by_the_power_of_their_step():
    """Two sizes of steps, 1 and 2, of many codes: with T = 1/2 the larger are drawn about four times as often."""
    q = quantize(jnp.ones((64, 64)), "int8@tensor")
    steps = jnp.where(jnp.arange(64) % 2 == 0, 1.0, 2.0) * jnp.ones((64, 1))
    optimizer = discrete_updates(optax.sgd(1.0), STILL, fraction=0.05, temperature=0.5)
    found, _ = optimizer.step({"w": q}, {"w": steps}, optimizer.init({"w": q}))
    changed = np.asarray(found["w"].dequantize() != q.dequantize())
    small, large = changed[:, 0::2].sum(), changed[:, 1::2].sum()
    assert small + large == np.ceil(0.05 * 4096)
    assert abs(large / (small + large) - 0.8) < 4 * np.sqrt(0.8 * 0.2 / 205)  # 4 sigma of 205 draws


def test_scales_and_arrays_are_trained_by_the_gradient_that_the_values_hand_on():
    q = quantize(W, "int4@1x8", axis=0)
    params = {"w": q, "b": jnp.ones(24), "fixed": quantize(W, "mxfp4", axis=0)}
    optimizer = discrete_updates(STILL, optax.sgd(0.1), fraction=1.0)
    gradient = jax.random.normal(jax.random.key(1), W.shape)
    grads = {"w": gradient, "b": jnp.full(24, 2.0), "fixed": gradient}
    found, _ = optimizer.step(params, grads, optimizer.init(params))
    of_scales = jax.grad(lambda s: jnp.sum(gradient * jnp.repeat(s, 8, axis=0) * W_CODES(q)))(q.scales)
    np.testing.assert_allclose(found["w"].scales, q.scales - 0.1 * of_scales, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["b"], 0.8, rtol=1e-6)
    np.testing.assert_array_equal(found["fixed"].dequantize(), params["fixed"].dequantize())


def W_CODES(q):
    return jnp.round(q.dequantize() / jnp.repeat(q.scales, 8, axis=0))


def test_a_layer_of_four_bits_is_trained_without_latent_weights():
    """From random codes to fewer than the error that rounding the true weights leaves: codes work together."""
    truth = jax.random.normal(jax.random.key(3), (32, 8))
    x = jax.random.normal(jax.random.key(4), (256, 32))
    loss = lambda params: jnp.mean((x @ (params["kernel"] - truth)) ** 2)
    params = quantize_weights({"kernel": jax.random.normal(KEY, (32, 8))}, "int4@row", ".*")
    optimizer = discrete_updates(optax.sgd(4.0), optax.adam(1e-3), fraction=0.02)

    def step(_, carry):
        params, state = carry
        return optimizer.step(params, jax.grad(loss)(dense(params)), state)

    found, state = jax.jit(lambda c: jax.lax.fori_loop(0, 400, step, c))((params, optimizer.init(params)))
    assert state.latent is None
    rounded = loss(dense(quantize_weights({"kernel": truth}, "int4@row", ".*")))
    assert loss(dense(found)) < rounded


def test_bad_settings_are_refused():
    with pytest.raises(UsageError, match="fraction lies in"):
        discrete_updates(STILL, STILL, fraction=0.0)
    with pytest.raises(UsageError, match="decay in"):
        discrete_updates(STILL, STILL, decay=2.0)
    with pytest.raises(UsageError, match="there is none"):
        discrete_updates(STILL, STILL).init({"w": W})
