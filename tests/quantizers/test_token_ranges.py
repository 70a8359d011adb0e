"""Ranges of tokens drawn in by learned factors: values against numpy, gradients against those of smooth pieces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec.errors import UsageError
from lowprec.formats.grammar import parse
from lowprec.quantizers.token_ranges import ClippedRange

X = np.random.default_rng(0).normal(0.4, 1.0, (6, 40)).astype(np.float32)
DY = np.cos(np.arange(X.size)).reshape(X.shape).astype(np.float32)


def reference(x, low_share, high_share, bits=4):
    """In float64: (values, codes from 0, scale of each token, what lies inside)."""
    x = np.asarray(x, np.float64)
    low = low_share * np.minimum(x.min(1, keepdims=True), 0)
    high = high_share * np.maximum(x.max(1, keepdims=True), 0)
    scale = (high - low) / (2**bits - 1)
    scale = np.where(scale > 0, scale, 1)
    zero = np.round(-low / scale)
    free = np.round(x / scale) + zero
    codes = np.clip(free, 0, 2**bits - 1)
    return scale * (codes - zero), codes, scale, codes == free


RULE = ClippedRange()


def quantized(x, params, rule=RULE, fmt="uint4@row"):
    return rule.quantize(jnp.asarray(x), parse(fmt), -1, params, {}, None)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_are_those_of_an_affine_grid_a_token(bits):
    rule, fmt = ClippedRange(), f"uint{bits}@row"
    params = rule.initial_params(jnp.asarray(X), parse(fmt), -1)
    assert {name: leaf.shape for name, leaf in params.items()} == {"lower": (), "upper": ()}
    np.testing.assert_allclose(jax.nn.sigmoid(params["lower"]), 0.95, rtol=1e-6)
    expected, codes, _, inside = reference(X, 0.95, 0.95, bits)
    values, found = quantized(X, params, rule, fmt)
    np.testing.assert_allclose(values, expected, atol=1e-6)
    np.testing.assert_array_equal(found, inside)
    assert codes.min() == 0 and codes.max() == 2**bits - 1
    # Other shares on either side.
    other = {"lower": jnp.float32(0.0), "upper": jnp.float32(np.log(4.0))}
    np.testing.assert_allclose(quantized(X, other, rule, fmt)[0], reference(X, 0.5, 0.8, bits)[0], atol=1e-6)


def test_zero_is_a_value_also_of_tokens_with_one_sign():
    x = np.stack([np.abs(X[0]) + 0.5, -np.abs(X[0]) - 0.5, 0 * X[0]])
    x[:, 3] = 0
    params = ClippedRange().initial_params(jnp.asarray(x), parse("uint4@row"), -1)
    values = np.asarray(quantized(x, params)[0])
    np.testing.assert_array_equal(values[:, 3], 0)
    np.testing.assert_array_equal(values[2], 0)
    np.testing.assert_allclose(values, reference(x, 0.95, 0.95)[0], atol=1e-6)
    assert np.abs(values[0]).max() > 0.9 * x[0].max() and values[1].min() < 0.9 * x[1].min()


def test_gradients_are_those_of_the_authors_code():
    """In numpy, as autograd differentiates it there: rounding as the identity, the zero point as a constant."""
    logits = {"lower": jnp.float32(1.0), "upper": jnp.float32(0.5)}
    shares = {name: 1 / (1 + np.exp(-np.float64(value))) for name, value in logits.items()}
    _, vjp = jax.vjp(lambda x, params: quantized(x, params)[0], jnp.asarray(X), logits)
    to_x, to_params = vjp(jnp.asarray(DY))
    x = X.astype(np.float64)
    values, _, scale, inside = reference(x, shares["lower"], shares["upper"])
    assert 0.5 < inside.mean() < 0.99
    slope = np.where(inside, values / scale - x / scale, values / scale)
    of_scale = (DY * slope).sum(1, keepdims=True) / 15
    ends = {"lower": (x.min(1, keepdims=True), -1), "upper": (x.max(1, keepdims=True), 1)}
    expected = DY * inside
    for name, (end, sign) in ends.items():
        s = shares[name]
        np.testing.assert_allclose(to_params[name], np.sum(sign * of_scale * end) * s * (1 - s), rtol=1e-4)
        expected = expected + np.where(x == end, sign * of_scale * s, 0)
    np.testing.assert_allclose(to_x, expected, atol=1e-5)


def test_the_share_that_clips_best_is_learned():
    """Tokens with an outlier on the upper side: the mean squared error falls, and the upper share with it."""
    x = np.concatenate([X, np.full((6, 1), 8.0, np.float32)], axis=1)
    weight = jnp.asarray(np.concatenate([np.ones((6, 40)), np.full((6, 1), 1e-3)], axis=1), jnp.float32)
    params = ClippedRange().initial_params(jnp.asarray(x), parse("uint2@row"), -1)
    loss = lambda p: jnp.sum(weight * (quantized(x, p, fmt="uint2@row")[0] - x) ** 2)
    step = jax.jit(lambda p: jax.tree.map(lambda v, g: v - 0.02 * g, p, jax.grad(loss)(p)))
    before = float(loss(params))
    for _ in range(200):
        params = step(params)
    assert float(loss(params)) < 0.7 * before
    assert float(jax.nn.sigmoid(params["upper"])) < 0.7


def test_what_it_does_not_serve():
    for fmt in ("int4@row", "nvfp4"):
        with pytest.raises(UsageError, match="takes unsigned integers with float scales"):
            ClippedRange().initial_params(jnp.asarray(X), parse(fmt), -1)
    with pytest.raises(UsageError, match="above 0 and below 1"):
        ClippedRange(start=1.0)
