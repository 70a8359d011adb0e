"""Scales by row and column, by ratios of powers of two, by search over exponent biases: published examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec import formats
from lowprec.errors import UsageError
from lowprec.formats import FloatFormat
from lowprec.ops import GemmRule, qdot
from lowprec.quantizers import AbsMax, CrossQuant, LeastSquares, PowerOfTwoRatios, Quantizer, exponent_bias


def waves():
    """64 tokens of 16 channels, the fourth eight times larger."""
    token, channel = np.arange(1, 65)[:, None], np.arange(1, 17)[None]
    x = np.cos(0.1 * token * channel) + 0.5 * np.cos(0.37 * token)
    x[:, 3] *= 8
    return x


@pytest.mark.parametrize(
    ("bits", "rule", "kernel", "error"),
    [
        (8, AbsMax(), 0.0205, 6.545e-5),
        (8, CrossQuant(), 0.0049, 1.614e-5),
        (4, AbsMax(), 0.3525, 2.113e-2),
        (4, CrossQuant(), 0.0879, 4.494e-3),
    ],
)
def test_what_crossquant_rounds_to_zero_and_its_error(bits, rule, kernel, error):
    x = waves()
    rounded = jax.jit(lambda x: Quantizer(f"int{bits}@row", scale=rule).round(x, -1).values)(
        jnp.asarray(x, jnp.float32)
    )
    assert float(np.mean(np.asarray(rounded) == 0)) == pytest.approx(kernel, abs=5e-5)
    assert np.sum((np.asarray(rounded, np.float64) - x) ** 2) / np.sum(x**2) == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("alpha", [0.0, 0.15, 1.0])
def test_crossquant_scales_by_their_definition_never_clip(alpha):
    x = np.random.default_rng(0).standard_t(2, (2, 32, 48)).astype(np.float32)
    rounded = Quantizer("int8@row", scale=CrossQuant(alpha)).round(jnp.asarray(x), -1)
    wide = np.abs(x.astype(np.float64))
    expected = wide.max(-1, keepdims=True) ** alpha * wide.max((0, 1), keepdims=True) ** (1 - alpha) / 127
    np.testing.assert_allclose(rounded.scale.block, expected, rtol=2e-6)
    assert np.max(np.abs(rounded.values - x) / expected) < 0.5001
    if alpha == 1:
        np.testing.assert_allclose(rounded.values, Quantizer("int8@row").round(jnp.asarray(x), -1).values, rtol=1e-6)


def test_zeros_and_what_is_no_number_under_crossquant():
    x = np.asarray(waves(), np.float32)
    x[5], x[:, 2] = 0, 0
    values = np.asarray(Quantizer("int8@row", scale=CrossQuant()).round(jnp.asarray(x), -1).values)
    assert np.all(np.isfinite(values)) and np.all(values[5] == 0) and np.all(values[:, 2] == 0)
    x[7, 9] = np.inf
    values = np.asarray(Quantizer("int8@row", scale=CrossQuant()).round(jnp.asarray(x), -1).values)
    clean = np.delete(np.delete(values, 7, 0), 9, 1)
    assert np.isnan(values[7, 9]) and np.all(np.isfinite(clean))


def test_no_integer_product_takes_scales_that_vary_along_the_contraction():
    x, w = jnp.asarray(waves(), jnp.float32), jax.random.normal(jax.random.key(0), (16, 8))
    q, weights = Quantizer("int8@row", scale=CrossQuant()), Quantizer("int8@row")
    rule = GemmRule(fwd=(q, weights))
    with pytest.raises(UsageError, match=r"the scales of fwd\.x .* vary along the contraction axis"):
        qdot(x, w, rule, backend="native")
    values = np.asarray(q.round(x, -1).values, np.float64) @ np.asarray(weights.round(w, 0).values, np.float64)
    np.testing.assert_allclose(qdot(x, w, rule), values, rtol=1e-4, atol=1e-4)


EXAMPLE = np.repeat([0.013, 0.021, 0.0175, 0.0333], 4)[None] * 6  # absmax scales of four blocks of four


@pytest.mark.parametrize(
    ("quantizer", "scales"),
    [
        (Quantizer("e2m1fn@1x4/e8m0.rceil_exact"), [0.015625, 0.03125, 0.03125, 0.0625]),
        (Quantizer("e2m1fn@1x4", scale=PowerOfTwoRatios("ceil")), [0.008325, 0.01665, 0.01665, 0.0333]),
        (Quantizer("e2m1fn@1x4", scale=PowerOfTwoRatios("floor")), [0.01665, 0.0333, 0.0333, 0.0333]),
        (Quantizer("e2m1fn@1x4", scale=PowerOfTwoRatios("nearest")), [0.01665, 0.01665, 0.01665, 0.0333]),
    ],
    ids=["M1", "M2 ceil", "M2 floor", "M2 nearest"],
)
def test_scales_constrained_to_powers_of_two_or_to_ratios_of_them(quantizer, scales):
    found = jax.jit(lambda x: quantizer.round(x, -1).scale.block)(jnp.asarray(EXAMPLE, jnp.float32))
    np.testing.assert_allclose(found.ravel(), scales, rtol=1e-6)


@pytest.mark.parametrize("rounding", ["floor", "ceil", "nearest"])
@pytest.mark.parametrize("axis", [0, 1])
def test_ratios_of_scales_in_numpy(rounding, axis):
    x = np.random.default_rng(0).normal(size=(64, 64)) * np.exp(np.random.default_rng(1).normal(size=(64, 64)))
    x = x.astype(np.float32)
    rounded = Quantizer("e2m1fn@1x16", scale=PowerOfTwoRatios(rounding)).round(jnp.asarray(x), axis)
    scales = np.abs(np.moveaxis(x, axis, -1).astype(np.float64)).reshape(64, 4, 16).max(-1) / 6
    logs = np.log2(scales.max(-1, keepdims=True) / scales)
    expected = scales.max(-1, keepdims=True) / np.exp2(
        {"floor": np.floor, "ceil": np.ceil, "nearest": np.round}[rounding](logs)
    )
    found = np.asarray(rounded.scale.block).reshape(rounded.layout.scale_shape)
    np.testing.assert_allclose(np.moveaxis(found, axis, -1), expected, rtol=1e-6)
    # Every element times the ratio of its scale is an fp8 number: one float32 scale a line.
    in_fp8 = np.moveaxis(np.asarray(rounded.values), axis, -1) / scales.max(-1, keepdims=True).astype(np.float32)
    np.testing.assert_allclose(formats.round_to(in_fp8, "e5m2"), in_fp8, rtol=1e-6)


def test_ratios_of_scales_leave_zeros_and_broken_blocks_to_themselves():
    x = jnp.ones((3, 32)).at[0, :16].set(0).at[1].set(0).at[2, 3].set(jnp.nan)
    values = np.asarray(Quantizer("e2m1fn@1x16", scale=PowerOfTwoRatios()).round(x, -1).values)
    assert np.all(values[0, :16] == 0) and np.all(values[1] == 0)
    np.testing.assert_allclose(values[[0, 2], 16:], 1, rtol=1e-6)
    assert np.isnan(values[2, :16]).all()


@pytest.mark.parametrize(
    ("fmt", "largest", "bias"),
    [
        (FloatFormat(2, 1, 1, False, "none"), 6, 1),
        (FloatFormat(4, 3, 7, False, "none"), 480, 7),
        (FloatFormat(5, 2, 15, False, "none"), 114688, 15),
        (FloatFormat(3, 2, 3, False, "none"), 28, 3),
        (FloatFormat(2, 1, 1, False, "none"), 1, 3.584962500721156),
    ],
)
def test_real_exponent_biases(fmt, largest, bias):
    assert exponent_bias(fmt, largest) == pytest.approx(bias, abs=1e-12)
    # The closed form of LLM-FP4, without infinities and NaN.
    e, m = fmt.exponent_bits, fmt.mantissa_bits
    assert exponent_bias(fmt, largest) == pytest.approx(2**e - np.log2(largest) + np.log2(2 - 2.0**-m) - 1, abs=1e-12)


def test_rounding_with_a_real_exponent_bias_is_rounding_with_a_scale():
    """The steps that LLM-FP4 defines: 2^(max(⌊log2|x| + b⌋, 1) - M - b), nothing beyond the largest value."""
    x = np.array([0.2, 0.3, 0.6, 1.2, 1.8, 2.4, 2.6, 3.4, 4.9, 5.1, 7.0])
    np.testing.assert_array_equal(
        formats.round_to(x.astype(np.float32), "e2m1fn"), [0, 0.5, 0.5, 1, 2, 2, 3, 3, 4, 6, 6]
    )
    for largest in (1.0, 3.7, 6.0):
        bias = exponent_bias(formats.parse("e2m1fn"), largest)
        clipped = np.minimum(x, largest)
        step = np.exp2(np.maximum(np.floor(np.log2(clipped) + bias), 1) - 1 - bias)
        by_scale = formats.round_to((x / (largest / 6)).astype(np.float32), "e2m1fn") * largest / 6
        np.testing.assert_allclose(by_scale, np.round(clipped / step) * step, rtol=1e-6)
        levels = np.array(formats.value_table("e2m1fn"))[7:] / 6
        np.testing.assert_allclose(levels, [0, 1 / 12, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1])


def test_the_search_over_a_hundred_biases_finds_the_best():
    x = np.random.default_rng(0).standard_t(3, (8, 512)).astype(np.float32)
    rule = LeastSquares(candidates=100, least=0.01, most=1.2)
    found = np.asarray(jax.jit(lambda x: Quantizer("e2m1fn@row", scale=rule).round(x, -1).values)(x), np.float64)
    amax = np.abs(x.astype(np.float64)).max(1, keepdims=True)

    def error_of(fraction):
        scale = fraction * amax / 6
        rounded = np.asarray(formats.round_to((x / scale).astype(np.float32), "e2m1fn"), np.float64)
        return np.sum((rounded * scale - x) ** 2, axis=1)

    fractions = np.append(np.linspace(1.2, 0.01, 100), 1.0)
    alone = np.array([error_of(fraction) for fraction in fractions])
    np.testing.assert_allclose(np.sum((found - x) ** 2, axis=1), alone.min(axis=0), rtol=1e-3)
    assert np.all(fractions[np.argmin(alone, axis=0)] < 0.9)  # heavy tails clip


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CrossQuant(1.5), "between 0 and 1"),
        (lambda: PowerOfTwoRatios("up"), "unknown rounding of a ratio"),
        (lambda: Quantizer("int8@tensor", scale=CrossQuant()).round(jnp.ones((2, 2)), -1), "scales rows in float32"),
        (lambda: Quantizer("mxfp4", scale=PowerOfTwoRatios()).round(jnp.ones((2, 32)), -1), "1x<g> blocks in float32"),
        (lambda: LeastSquares(10, most=0.5), "from a fraction"),
        (lambda: exponent_bias(FloatFormat(2, 1), 0.0), "positive"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()
