"""Outlier clamping and compensation, against numpy and published figures (arXiv 2501.17116)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec.errors import UsageError
from lowprec.ops import GemmRule, qdot
from lowprec.quantizers import EXACT, REUSE, AbsMean, ClampQuantiles, Quantizer, SignAboutMean


def cosine_and_snr(values, x):
    values, x = np.asarray(values, np.float64), np.asarray(x, np.float64)
    cosine = np.sum(values * x) / np.sqrt(np.sum(values**2) * np.sum(x**2))
    return cosine, 10 * np.log10(np.sum(x**2) / np.sum((values - x) ** 2))


@pytest.mark.parametrize(
    ("clamp", "cosine", "decibels", "spread"),
    [
        (None, 0.9799, 13.9, (2.6e-4, 0.06)),
        (ClampQuantiles(0.99, residual="drop"), 0.9660, 11.6, (7.4e-4, 0.09)),
        (ClampQuantiles(0.99, residual="keep"), 0.9950, 19.9, (1.1e-5, 0.01)),
    ],
)
def test_rows_of_student_t4(clamp, cosine, decibels, spread):
    """The heavy tail (infinite kurtosis) moves both figures from sample to sample by the deviations given as spread."""
    x = jnp.asarray(np.random.default_rng(0).standard_t(4, (4096, 1024)), jnp.float32)
    q = Quantizer("e2m1fn@row", clamp=clamp)
    found = cosine_and_snr(jax.jit(lambda x: q.round(x, -1).values)(x), x)
    # One in the last digit, and two deviations.
    assert found[0] == pytest.approx(cosine, abs=1e-4 + 2 * spread[0])
    assert found[1] == pytest.approx(decibels, abs=0.1 + 2 * spread[1])


@pytest.mark.parametrize("shape,axis", [((16, 1000), -1), ((100, 7), 0), ((2, 30, 5), 1), ((3, 1), -1)])
def test_lines_are_clamped_at_order_statistics(shape, axis):
    x = np.random.default_rng(1).standard_t(3, shape).astype(np.float32)
    found = jax.jit(lambda x: ClampQuantiles(0.9)(x, axis))(x)
    ordered, length = np.sort(x, axis), shape[axis]
    low, high = (np.take(ordered, [int(alpha * length)], axis) for alpha in (1 - 0.9, 0.9))
    np.testing.assert_array_equal(found, np.clip(x, low, high))


def test_a_kept_residual_leaves_outliers_as_they_are_and_rounds_the_rest_on_a_finer_grid():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(4, 200)), jnp.float32).at[:, 7].set(1000.0)
    rounded = Quantizer("e2m1fn@row", clamp=ClampQuantiles(0.99)).round(x, -1)
    scale = np.asarray(rounded.scale.total())
    assert np.all(scale < 4 / 6)
    assert np.max(np.abs(rounded.values - x)) <= np.max(scale) * 1.0001  # half the widest gap, 2
    np.testing.assert_allclose(rounded.values[:, 7], 1000.0, atol=np.max(scale))


@pytest.mark.parametrize("residual", ["keep", "drop"])
def test_the_product_is_that_of_the_values(residual):
    x, w = (
        jnp.asarray(np.random.default_rng(i).standard_t(3, s), jnp.float32) for i, s in enumerate([(8, 64), (64, 4)])
    )
    q, weights = Quantizer("int8@row", clamp=ClampQuantiles(0.95, residual)), Quantizer("int8@row")
    rule = GemmRule(fwd=(q, weights))
    values = np.asarray(q.round(x, -1).values, np.float64) @ np.asarray(weights.round(w, 0).values, np.float64)
    np.testing.assert_allclose(jax.jit(lambda x, w: qdot(x, w, rule))(x, w), values, rtol=1e-4, atol=1e-4)
    if residual == "keep":
        with pytest.raises(UsageError, match=r"fwd\.x keeps a part in high precision"):
            qdot(x, w, rule, backend="native")
    else:
        np.testing.assert_allclose(qdot(x, w, rule, backend="native"), values, rtol=1e-4, atol=1e-4)


def test_the_backward_product_takes_the_forward_values_with_their_residual():
    x, w, dy = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(8, 64), (64, 4), (8, 4)]))
    q = Quantizer("int8@row", clamp=ClampQuantiles(0.9))
    rule = GemmRule(fwd=(q, EXACT), wgrad=(EXACT, REUSE))
    dw = jax.jit(lambda w: jax.vjp(lambda w: qdot(x, w, rule), w)[1](dy)[0])(w)
    np.testing.assert_allclose(dw, q.round(x, -1).values.T @ dy, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClampQuantiles(1.0), "between 0.5 and 1"),
        (lambda: ClampQuantiles(0.99, "lose"), "kept or dropped"),
        (lambda: Quantizer(clamp=ClampQuantiles()), "left as it is"),
        (lambda: Quantizer(source="reuse", clamp=ClampQuantiles()), "reused operand"),
        (lambda: Quantizer("binary@tensor", correction=SignAboutMean(), clamp=ClampQuantiles()), "choose one"),
        (lambda: Quantizer("ternary@tensor", correction=SignAboutMean()), "binary format"),
    ],
)
def test_contradictions_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_signs_about_the_mean_by_the_definition_of_bitnet():
    w = np.random.default_rng(3).normal(0.3, 1, (128, 96)).astype(np.float32)
    q = Quantizer("binary@tensor", scale=AbsMean(), correction=SignAboutMean())
    assert not q.stochastic
    wide = w.astype(np.float64)
    expected = np.where(wide > wide.mean(), 1, -1) * np.abs(wide).mean()
    np.testing.assert_allclose(q.round(jnp.asarray(w), 0).values, expected, rtol=1e-6)
    assert 0.49 < np.mean(expected > 0) < 0.51  # without centring, 62 % would be positive


def test_signs_about_the_mean_have_the_error_of_the_best_binary_grid_on_normal_data():
    w = jax.random.normal(jax.random.key(0), (1024, 1024))
    values = Quantizer("binary@tensor", scale=AbsMean(), correction=SignAboutMean()).round(w, 0).values
    assert float(jnp.mean((values - w) ** 2)) == pytest.approx(1 - 2 / np.pi, abs=0.001)
