"""DiffQ against its formulas, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec import formats
from lowprec.quantizers.diffq import DiffQ

W = np.asarray(jax.random.normal(jax.random.key(5), (64, 32)), np.float64)
FMT = formats.parse("float32@1x8")
SPREAD = W.max() - W.min()
KEY = jax.random.key(1)


def values(rule, logit, key=KEY):
    params = {"logit": jnp.full((8, 32), logit, jnp.float32)}
    return np.asarray(rule.quantize(jnp.float32(W), FMT, 0, params, {}, key)[0], np.float64)


def test_bits_start_where_they_should():
    rule = DiffQ()
    params = rule.initial_params(jnp.float32(W), FMT, 0)
    assert params["logit"].shape == (8, 32)  # blocks of eight along the contraction axis
    np.testing.assert_allclose(rule.bits(params["logit"]), 8, rtol=1e-6)
    np.testing.assert_allclose(rule.bits(jnp.float32([-50, 50])), [2, 15], rtol=1e-6)


@pytest.mark.parametrize(("noise", "variance"), [("uniform", 1 / 12), ("gaussian", 1 / 4)])
def test_the_noise_is_that_of_steps_of_the_whole_tensor(noise, variance):
    rule = DiffQ(noise)
    logit = float(rule.initial_params(jnp.float32(W), FMT, 0)["logit"][0, 0])
    draws = np.stack([values(rule, logit, jax.random.key(i)) for i in range(30)])
    unit = (draws - W) / (SPREAD / 255)
    if noise == "uniform":
        assert np.abs(unit).max() <= 0.5 + 1e-3
    # 61 440 draws: the relative error of a variance is .6 % a sigma at most.
    assert np.var(unit) == pytest.approx(variance, rel=0.03)
    assert abs(unit.mean()) < 5 * np.sqrt(variance / unit.size)


def test_gradients_are_those_of_the_noise_at_fixed_draws_and_of_the_price():
    rule, g = DiffQ(price=0.5), np.sin(np.arange(2048.0)).reshape(64, 32)

    def loss(w, logit):
        return jnp.sum(jnp.float32(g) * rule.quantize(w, FMT, 0, {"logit": logit}, {}, KEY)[0])

    logit = jnp.full((8, 32), -1.5)
    dw, gradient = jax.grad(loss, (0, 1))(jnp.float32(W), logit)
    np.testing.assert_array_equal(dw, np.float32(g))
    step = 0.02
    moved = (values(rule, -1.5 + step) - values(rule, -1.5 - step)) / (2 * step)
    # A megabyte has 8 · 2^20 bits; a block has 8 weights; d bits / d logit = 13 · s · (1 - s).
    s = 1 / (1 + np.exp(1.5))
    price = 0.5 * 8 / (8 * 2**20) * 13 * s * (1 - s)
    expected = (g * moved).reshape(8, 8, 32).sum(1) + price
    np.testing.assert_allclose(gradient, expected, rtol=5e-3, atol=1e-5)
    still = jax.grad(lambda logit: loss(jnp.ones((64, 32)), logit))(logit)  # no spread: no noise, the price alone
    np.testing.assert_allclose(still, np.full((8, 32), price), rtol=1e-5)


def test_without_a_key_weights_are_rounded_to_whole_bits():
    rule = DiffQ()
    logit = np.log((3.4 - 2) / (15 - 3.4))  # 3.4 bits
    levels = W.min() + np.arange(8) * SPREAD / 7
    expected = levels[np.abs(W[..., None] - levels).argmin(-1)]
    np.testing.assert_allclose(values(rule, logit, None), expected, rtol=1e-5, atol=1e-6)
