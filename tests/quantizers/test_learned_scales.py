"""LSQ: values on the grid, and the gradients of the paper."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowprec import formats
from lowprec.quantizers import gaussian_error, initial_scale, learned_quant, optimal_clip

X = jax.random.normal(jax.random.key(0), (4, 64))


@pytest.mark.parametrize("name", ["int4_symmetric@row", "int2@1x16", "e2m1fn@tensor", "uint4@row", "int4@16x16"])
def test_values_and_gradients_are_those_of_the_paper(name):
    fmt = formats.parse(name)
    x = jnp.tile(X, (4, 1))
    scale = initial_scale(x, name)
    weight = jax.random.normal(jax.random.key(1), x.shape)
    loss = lambda x, scale: jnp.sum(weight * learned_quant(x, scale, name, gradient_scale=0.5))
    value, (dx, dscale) = jax.jit(jax.value_and_grad(loss, (0, 1)))(x, scale)

    repeats = [n // m for n, m in zip(x.shape, scale.shape, strict=True)]
    step = np.kron(np.asarray(scale, np.float64), np.ones(repeats))
    v = np.asarray(x) / step
    q = np.asarray(formats.round_to(np.float32(v), fmt.element), np.float64)
    inside = (v > fmt.element.min) & (v < fmt.element.max)
    weight = np.asarray(weight, np.float64)
    assert value == pytest.approx(np.sum(weight * q * step), rel=1e-5)
    np.testing.assert_allclose(dx, weight * inside, rtol=1e-6)
    each = weight * np.where(inside, q - v, q)
    shape = [n for pair in zip(scale.shape, repeats, strict=True) for n in pair]
    np.testing.assert_allclose(dscale, 0.5 * each.reshape(shape).sum((1, 3)), rtol=1e-4, atol=1e-4)


def test_the_gradient_is_scaled_by_the_size_of_the_block_and_the_levels():
    gradient = lambda g: jax.grad(lambda s: learned_quant(X, s, "int4_symmetric@row", gradient_scale=g).sum())
    scale = initial_scale(X, "int4_symmetric@row")
    np.testing.assert_allclose(gradient(None)(scale), gradient(1.0)(scale) / np.sqrt(64 * 7), rtol=1e-6)


def test_training_the_scale_finds_the_one_of_least_error():
    x = jax.random.normal(jax.random.key(2), (1, 1 << 16))
    scale = initial_scale(x, "int3_symmetric@row")
    optimizer = optax.adam(3e-3)
    error = lambda scale: jnp.mean((learned_quant(x, scale, "int3_symmetric@row") - x) ** 2)

    @jax.jit
    def step(scale, state):
        updates, state = optimizer.update(jax.grad(error)(scale), state)
        return optax.apply_updates(scale, updates), state

    state = optimizer.init(scale)
    for _ in range(400):
        scale, state = step(scale, state)
    best = gaussian_error("int3_symmetric", optimal_clip("int3_symmetric") / 3)
    assert error(scale) == pytest.approx(best, rel=0.03)  # of the sample, whose own error differs by 1 %


def test_formats_without_scales_of_their_own_and_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="int4@row"):
        initial_scale(X, "int4")
    with pytest.raises(ValueError, match="one by one"):
        learned_quant(X, jnp.ones((4, 4)), "nvfp4")
    with pytest.raises(ValueError, match=r"\(4, 1\)"):
        learned_quant(X, jnp.ones(()), "int4@row")
