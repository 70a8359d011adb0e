"""MS-EDEN: rounding to nearest that random rotations make unbiased, with the numbers of Quartet II's own code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec import formats
from lowprec.errors import UsageError
from lowprec.formats.blocks import block_layout
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
    x = jnp.asarray(gaussian((256, 128) if axis else (128, 256)))  # one chunk along the axis
    plain, corrected = Quantizer("nvfp4", scale=SCALE), Quantizer("nvfp4", scale=SCALE, correction=Eden(128))

    @jax.jit
    def parts(x):
        rounded = plain.round(x, axis)
        return rounded.scale.block, rounded.scale.divide(rounded.layout.split(x)), rounded.elements

    scale, z, elements = (np.asarray(part, np.float64) for part in parts(x))
    member = block_layout(x.shape, (1, 16), axis).members[0]
    chunk = lambda v: v.sum((member, member - 1), keepdims=True)
    wanted = scale * chunk(z * z) / chunk(z * elements)  # c = Σz² / Σz·q, z and q in units of the scale
    draw = jax.jit(lambda key: corrected.round(x, axis, key).scale.block)
    blocks = np.stack([draw(key) for key in jax.random.split(jax.random.key(0), 256)]).astype(np.float64)
    to_e4m3 = lambda mode: np.asarray(formats.round_to(wanted.astype(np.float32), "e4m3fn", rounding=mode), np.float64)
    low, high = to_e4m3("down"), to_e4m3("up")
    assert np.all((blocks == low) | (blocks == high))
    deviation = (blocks.mean(0) - wanted) / ((high - low) / 2 / np.sqrt(len(blocks)))  # of a coin at most half the gap
    assert np.abs(deviation).max() < 5
    assert abs(deviation.mean()) < 5 / np.sqrt(deviation.size)


def test_elements_are_not_changed_and_zeros_are_left_alone():
    x = jnp.zeros((2, 256)).at[1].set(gaussian((256,)))
    plain, corrected = Quantizer("nvfp4", scale=SCALE), Quantizer("nvfp4", scale=SCALE, correction=Eden(128))

    @jax.jit
    def both(x, key):
        before, after = plain.round(x, -1), corrected.round(x, -1, key)
        return before.elements, after.elements, after.values, after.layout.merge(after.scale.multiply(before.elements))

    elements, same_elements, values, expected = both(x, jax.random.key(0))
    np.testing.assert_array_equal(elements, same_elements)
    np.testing.assert_array_equal(values, expected)
    assert not np.any(values[0])


def test_a_chunk_cut_short_by_the_end_of_the_axis_is_a_chunk():
    x = jnp.asarray(gaussian((4, 192)))
    q = Quantizer("nvfp4", scale=AbsMax(limit=256), correction=Eden(128))
    alone = Quantizer("nvfp4", scale=AbsMax(limit=256), correction=Eden(64))
    values, last = (jax.jit(lambda x, q=q: q.round(x, -1, jax.random.key(0)).values)(x) for q in (q, alone))
    np.testing.assert_array_equal(values[:, 128:], last[:, 128:])


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
        jax.eval_shape(lambda x: MS_EDEN.round(x, -1).values, jnp.ones((1, 128)))
