"""MS-EDEN: rounding to nearest that random rotations make unbiased, with the numbers of Quartet II's own code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec import formats
from lowprec.errors import UsageError
from lowprec.quantizers import AbsMax, Eden, Hadamard, Quantizer, hadamard, inverse_hadamard

# Clipping a little is best (the factor 0.93 is the authors'); scales stay below 256 so that they have room to grow.
SCALE = AbsMax(headroom=17 / 16 * 0.93, limit=255.99)
MS_EDEN = Quantizer("nvfp4", Hadamard(128, "random"), scale=SCALE, correction=Eden(128))
NEAREST = Quantizer("nvfp4", Hadamard(128, "random"), scale=SCALE)


def gaussian(shape=(256, 1024)):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def draws(q, x, count):
    """Each time: rotated by new signs, quantized, rotated back."""

    @jax.jit
    def draw(key):
        for_signs, for_rounding = jax.random.split(key)
        signs = q.rotation.draw_signs(x.shape[-1], for_signs)
        rounded = q.round(hadamard(x, q.rotation.size, signs), -1, for_rounding)
        return inverse_hadamard(rounded.values, q.rotation.size, signs)

    for key in jax.random.split(jax.random.key(0), count):
        yield np.asarray(draw(key), np.float64)


def errors(x, values):
    x = x.astype(np.float64)
    return ((values - x) ** 2).sum() / (x**2).sum(), 1 - (values * x).sum() / (x**2).sum()


def test_error_and_alignment_of_single_draws():
    x = gaussian((2048, 1024))
    relative, misaligned = np.mean([errors(x, q) for q in draws(MS_EDEN, x, 2)], axis=0)
    assert relative == pytest.approx(0.00971, rel=0.02)
    assert misaligned == pytest.approx(0.0007, abs=2e-4)
    assert np.mean([errors(x, q)[1] for q in draws(NEAREST, x, 2)]) > 0.007


def test_the_mean_of_draws_approaches_the_source():
    x = gaussian()
    total, checked = np.zeros(x.shape), {}
    for n, q in enumerate(draws(MS_EDEN, x, 64), 1):
        total += q
        checked[n] = errors(x, total / n)[0]
    # Independent errors: 1/n of one. What does not shrink is the square of the misalignment, below 10^-6.
    for n in (4, 16, 64):
        assert checked[n] == pytest.approx(checked[1] / n, rel=0.05)


@pytest.mark.parametrize("axis", [-1, 0])
def test_the_scales_are_rounded_without_bias_around_the_corrected_ones(axis):
    x = jnp.asarray(gaussian((256, 128)) if axis else gaussian((128, 256)))
    x = x if axis else x.T[:128]
    q = Quantizer("nvfp4", scale=SCALE)
    plain = q.round(x, axis)
    correct = jax.jit(lambda key: Eden(128)(x, plain, axis, key).scale.block)
    blocks = np.stack([np.asarray(correct(key), np.float64) for key in jax.random.split(jax.random.key(0), 256)])
    # c of each chunk of 128, in float64: sum of z² over sum of z · q, z in units of the scale.
    z = np.asarray(plain.scale.divide(plain.layout.split(x)), np.float64)
    elements = np.asarray(plain.elements, np.float64)
    member = plain.layout.members[0]
    chunks = lambda v: v.sum(member, keepdims=True).sum(member - 1, keepdims=True)  # one chunk along the axis
    wanted = np.asarray(plain.scale.block, np.float64) * chunks(z * z) / chunks(z * elements)
    gap = np.asarray(
        formats.round_to(jnp.asarray(wanted, jnp.float32), "e4m3fn", rounding="away"), np.float64
    ) - np.asarray(formats.round_to(jnp.asarray(wanted, jnp.float32), "e4m3fn", rounding="toward_zero"), np.float64)
    assert np.all(np.abs(blocks - wanted) <= gap)
    deviation = (blocks.mean(0) - wanted) / (gap / 2 / np.sqrt(len(blocks)))  # a coin's deviation is at most gap / 2
    assert np.abs(deviation).max() < 5
    assert abs(deviation.mean()) < 5 / np.sqrt(deviation.size)


def test_elements_are_not_changed_and_zeros_are_left_alone():
    x = jnp.zeros((2, 256)).at[1].set(gaussian((256,)))
    q = Quantizer("nvfp4", scale=SCALE)
    plain, corrected = q.round(x, -1), Eden(128)(x, q.round(x, -1), -1, jax.random.key(0))
    np.testing.assert_array_equal(corrected.elements, plain.elements)
    assert not np.any(corrected.values[0])
    np.testing.assert_array_equal(corrected.values, corrected.layout.merge(corrected.scale.multiply(plain.elements)))


def test_a_chunk_cut_short_by_the_end_of_the_axis_is_a_chunk():
    x = jnp.asarray(gaussian((4, 192)))
    q = Quantizer("nvfp4", scale=AbsMax(limit=256), correction=Eden(128))
    alone = Quantizer("nvfp4", scale=AbsMax(limit=256), correction=Eden(64))
    values, last = q.round(x, -1, jax.random.key(0)), alone.round(x, -1, jax.random.key(0))
    np.testing.assert_array_equal(values.values[:, 128:], last.values[:, 128:])


@pytest.mark.parametrize(
    "fmt,chunk,message",
    [
        ("e2m1fn", 128, "eden corrects the scales of 1x<g> blocks; e2m1fn has none"),
        ("e2m1fn@16x16/e4m3fn.tensor", 128, "eden corrects the scales of 1x<g> blocks"),
        ("nvfp4", 24, "blocks that divide its chunk of 24"),
        ("mxfp4", 128, "narrow float scales"),
        ("e2m1fn@1x16", 128, "narrow float scales"),
    ],
)
def test_formats_whose_scales_cannot_be_corrected_are_refused(fmt, chunk, message):
    with pytest.raises(UsageError, match=message):
        Quantizer(fmt, correction=Eden(chunk))


def test_it_needs_a_key():
    with pytest.raises(ValueError, match="stochastic rounding needs a key"):
        MS_EDEN.round(jnp.ones((1, 128)), -1)
