"""LittleBit: ranks and bits as published, factors against numpy's decompositions, and that it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowprec.nn.littlebit import (
    LittleBitDense,
    bits_per_weight,
    factorize,
    factorize_with_residual,
    rank_for_bits,
    smooth_sign,
)

I, J = np.meshgrid(np.arange(8), np.arange(16), indexing="ij")
W = np.sin(1 + 3 * I + 5 * J + I * J)


@pytest.mark.parametrize(("bits", "rank", "stored"), [(1.0, 1000, 0.994095), (0.1, 80, 0.093903)])
def test_the_rank_of_a_4096_square_matrix(bits, rank, stored):
    assert rank_for_bits(4096, 4096, bits) == rank
    assert bits_per_weight(4096, 4096, rank) == pytest.approx(stored, abs=1e-6)


def test_the_layer_is_its_dense_matrix():
    factors = factorize(W, 4)
    x = jax.random.normal(jax.random.key(0), (5, 16))
    np.testing.assert_allclose(factors.apply(x), x @ factors.dense().T, rtol=1e-5, atol=1e-5)


def test_the_error_of_dual_svid_on_a_fixed_matrix():
    """Relative Frobenius error, beside that of the plain decomposition of rank 4; a residual lowers it."""
    error = lambda approximation: np.linalg.norm(W - np.asarray(approximation)) / np.linalg.norm(W)
    s = np.linalg.svd(W, compute_uv=False)
    assert np.sqrt((s[4:] ** 2).sum() / (s**2).sum()) == pytest.approx(0.583021, abs=1e-5)
    assert error(factorize(W, 4).dense()) == pytest.approx(0.902165, abs=1e-4)
    first, second = factorize_with_residual(W, 4)
    assert error(first.dense() + second.dense()) < 0.902165


def test_the_smooth_sign():
    x = jnp.array([-2.0, -0.01, 0.0, 0.01])
    assert smooth_sign(x).tolist() == [-1, -1, 1, 1]
    slope = jax.vmap(jax.grad(smooth_sign))(x)
    np.testing.assert_allclose(slope, 100 * (1 - np.tanh(100 * np.asarray(x)) ** 2), rtol=1e-4, atol=1e-30)


def test_a_layer_learns_what_a_layer_of_its_kind_does():
    layer = LittleBitDense(24, bits=2.0)
    x = jax.random.normal(jax.random.key(0), (64, 32))
    y = x @ (0.2 * jax.random.normal(jax.random.key(1), (32, 24)))
    params = layer.init(jax.random.key(2), x)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, state):
        loss, gradient = jax.value_and_grad(lambda p: jnp.mean((layer.apply(p, x) - y) ** 2))(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, loss

    state, losses = optimizer.init(params), []
    for _ in range(150):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.6 * losses[0]


def test_bits_are_positive():
    with pytest.raises(ValueError, match="above 0"):
        rank_for_bits(8, 8, 0)
