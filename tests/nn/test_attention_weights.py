"""Weights from scores: the published vectors, what is masked, and gradients where the formulas would overflow."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec.nn import attention_weights
from lowprec.nn.attention_weights import clipped_softmax, length_clipped_softmax, softmax, softpick

KINDS = {"softmax": softmax, "clipped": partial(clipped_softmax, gamma=-0.1), "softpick": softpick}


def float64_softpick(x):
    """As it is written in the paper, without a trick."""
    e = np.exp(np.asarray(x, np.float64)) - 1
    return np.maximum(e, 0) / (np.sum(np.abs(e), axis=-1, keepdims=True) + 1e-8)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([-1, 0, 1, 2], [0, 0, 0.196612, 0.731059]),
        ([0, 1, 2, -1], [0, 0.196612, 0.731059, 0]),
        ([1000, 999, -1000], [0.731059, 0.268941, 0]),
        ([-1, -2, -0.5], [0, 0, 0]),
        ([-1000, -2000, -3000], [0, 0, 0]),
    ],
)
def test_softpick_of_known_scores(scores, expected):
    np.testing.assert_allclose(softpick(jnp.float32(scores), True), expected, atol=5e-7)


def test_softpick_is_the_formula_of_the_paper():
    x = 3 * np.random.default_rng(0).standard_normal((200, 32))
    np.testing.assert_allclose(softpick(jnp.float32(x), True), float64_softpick(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("scores", "gamma", "expected"),
    [
        ([0, 0, 0, 8], -0.025, [0, 0, 0, 0.998969]),
        ([0, 1, 2, -1], -0.1, [0, 0.160571, 0.608306, 0]),
        ([0, 1, 2, -1], 0.0, [0.087144, 0.236883, 0.643914, 0.032059]),
    ],
)
def test_clipped_softmax_of_known_scores(scores, gamma, expected):
    np.testing.assert_allclose(clipped_softmax(jnp.float32(scores), True, gamma=gamma), expected, atol=1e-6)


def test_uniform_scores_are_clipped_to_nothing_and_have_no_gradient():
    """512 equal weights are below 12/512 · 1/(1 + 12/512): a row that nobody wakes up any more."""
    weights = partial(length_clipped_softmax, alpha=12.0)
    np.testing.assert_array_equal(weights(jnp.zeros(512), True), 0)
    np.testing.assert_array_equal(jax.grad(lambda x: weights(x, True)[3])(jnp.zeros(512)), 0)
    assert weights(jnp.zeros(16), jnp.arange(16) < 2).sum() > 0


@pytest.mark.parametrize("name", KINDS)
def test_what_is_masked_is_as_if_it_were_not_there(name):
    weights, x = KINDS[name], jax.random.normal(jax.random.key(0), (8, 12))
    allowed = jax.random.bernoulli(jax.random.key(1), 0.6, x.shape).at[:, 0].set(True)
    found = weights(jnp.where(allowed, x, 1e9), allowed)
    for row, keep, given in zip(found, allowed, x, strict=True):
        np.testing.assert_allclose(row[keep], weights(given[keep], True), rtol=2e-6, atol=1e-7)
        np.testing.assert_array_equal(row[~keep], 0)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "scores",
    [[0.0, 0, 0], [-1.0, -2, -3], [-200.0, -300, -400], [1e30, 1e30, -1e30], [3e38, -3e38, 0], [-3e38, -3e38, -3e38]],
    ids=str,
)
@pytest.mark.parametrize("allowed", [[1, 1, 1], [1, 0, 0], [0, 0, 0]], ids=str)
def test_weights_and_gradients_are_finite(name, scores, allowed):
    mask, x = jnp.array(allowed, bool), jnp.float32(scores)
    weight = KINDS[name](x, mask)
    slopes = jax.jacobian(lambda x: KINDS[name](x, mask))(x)
    assert weight.dtype == jnp.float32
    assert jnp.all(jnp.isfinite(weight)) and jnp.all(jnp.isfinite(slopes))
    np.testing.assert_array_equal(weight[~mask], 0)
    np.testing.assert_array_equal(slopes[:, ~mask], 0)
    assert jnp.sum(weight) <= 1 + 1e-6


@pytest.mark.parametrize("name", KINDS)
def test_gradients_are_differences_of_float64(name):
    reference = {
        "softmax": lambda x: np.exp(x) / np.exp(x).sum(),
        "clipped": lambda x: np.clip(1.1 * np.exp(x) / np.exp(x).sum() - 0.1, 0, 1),
        "softpick": float64_softpick,
    }[name]
    x, step = np.array([1.5, -0.7, 0.4, 2.0]), 1e-6
    differences = [(reference(x + e) - reference(x - e)) / (2 * step) for e in step * np.eye(4)]
    found = jax.jacobian(lambda x: KINDS[name](x, True))(jnp.float32(x))
    np.testing.assert_allclose(found, np.transpose(differences), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", attention_weights.names())
def test_half_precision_scores_give_float32_weights(name):
    scores = jnp.array([[1.0, 2.0, -1.0]], jnp.bfloat16)
    weights = attention_weights.get(name, 0.5)
    np.testing.assert_array_equal(weights(scores, True), weights(scores.astype(jnp.float32), True))
    assert weights(scores, True).dtype == jnp.float32


def test_wrong_names_and_stretches():
    with pytest.raises(ValueError, match="unknown attention 'softpik'; did you mean softpick"):
        attention_weights.get("softpik")
    with pytest.raises(ValueError, match="gamma ≤ 0"):
        clipped_softmax(jnp.zeros(3), True, gamma=0.1)
