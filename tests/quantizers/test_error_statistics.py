"""What is measured of a quantized operand, against numpy in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec import formats
from lowprec.formats import parse
from lowprec.quantizers import (
    OPERANDS,
    OperandStatistics,
    RootMeanSquare,
    error_sums,
    inside,
    read_taps,
    round_blocks,
    tap_slot,
)
from lowprec.quantizers.error import SUMS


def data(shape=(32, 64)):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    x[0, :4] = [0, 300, -700, 1e-5]
    return x


def measured(x, name, **options):
    sums, values = summed(x, name, **options)
    return OperandStatistics.from_sums(sums), np.asarray(values, np.float64)


@partial(jax.jit, static_argnums=1, static_argnames="pad")
def summed(x, name, pad=False):
    rounded = round_blocks(x, parse(name), -1, pad=pad)
    return error_sums(x, rounded), rounded.values


@pytest.mark.parametrize(
    "name", ["e4m3fn", "e2m1fn", "int4", "uint4", "nf4", "e4m3fn_unsigned", "nvfp4", "mxfp4", "int4@row"]
)
def test_the_numbers_are_those_of_numpy(name):
    x = data()
    statistics, q = measured(x, name)
    wide = x.astype(np.float64)
    noise = ((q - wide) ** 2).sum()
    assert statistics.amax == 700
    assert statistics.sqnr_db == pytest.approx(10 * np.log10((wide**2).sum() / noise), abs=1e-3)
    assert statistics.cosine == pytest.approx((q * wide).sum() / np.linalg.norm(q) / np.linalg.norm(wide), rel=1e-5)
    assert statistics.alignment == pytest.approx((q * wide).sum() / (wide**2).sum(), rel=1e-5)
    assert statistics.underflowed == pytest.approx(((q == 0) & (wide != 0)).mean())
    values = formats.value_table(name)
    if "@" not in str(parse(name)):  # unscaled: outside the format is outside its values
        assert statistics.clipped == pytest.approx(((wide > values[-1]) | (wide < values[0])).mean())


def test_absmax_scales_clip_nothing_but_what_a_power_of_two_saturates():
    assert measured(data(), "int4@row")[0].clipped == 0
    assert measured(data(), "e2m1fn@1x32/e8m0.rceil")[0].clipped == 0
    x = np.full((1, 32), 1.0, np.float32)
    x[0, :3] = 7.9, 6.0, -6.5  # scale 1, largest element 6
    assert measured(x, "mxfp4")[0].clipped == 2 / 32


def test_exact_values_have_no_error():
    x = np.array([[1.0, -2.0, 0.5, 0.0]], np.float32)
    statistics, _ = measured(x, "e4m3fn")
    assert statistics.sqnr_db == np.inf and statistics.cosine == statistics.alignment == 1
    assert statistics.clipped == statistics.underflowed == 0


def test_padding_counts_for_nothing():
    x = data((3, 50))
    padded, q = measured(x, "e2m1fn@1x32/e8m0.floor", pad=True)
    assert padded.underflowed == pytest.approx(((q == 0) & (x != 0)).mean())
    assert q.shape == x.shape


def test_sums_of_calls_add_up():
    x, y = data(), 2 * data()
    name = "int4@row"
    together = OperandStatistics.from_sums(summed(x, name)[0] + summed(y, name)[0])
    both, _ = measured(np.concatenate([x, y]), name)
    assert together.sqnr_db == pytest.approx(both.sqnr_db, abs=1e-3)
    assert together.amax == (700 + 1400) / 2
    assert together.underflowed == pytest.approx(both.underflowed)


def test_a_tap_slot_carries_the_sums_of_the_operands_that_were_quantized():
    slot = tap_slot()
    assert slot.shape == (len(OPERANDS), len(SUMS)) == (6, 9) and not slot.any()
    row = summed(data(), "int8@row")[0]
    taps = read_taps(slot.at[OPERANDS.index("dgrad.dy")].set(row))
    assert list(taps) == ["dgrad.dy"]
    assert taps["dgrad.dy"] == OperandStatistics.from_sums(row)
    assert OperandStatistics.from_sums(np.zeros(len(SUMS))) is None


@pytest.mark.parametrize("margin", [0.0, 0.5])
@pytest.mark.parametrize("name", ["int4@row/e8m0.floor", "e2m1fn", "uint4", "int4_midrise@row"])
def test_inside_is_the_range_of_the_elements_and_a_margin(name, margin):
    @jax.jit
    def mask_and_scale(x):
        rounded = round_blocks(x, parse(name), -1, rule=RootMeanSquare(2.5))
        return inside(x, rounded, margin), jnp.float32(1) if rounded.scale is None else rounded.scale.block

    mask, scale = mask_and_scale(data())
    element = formats.element_of(name)
    scaled = data().astype(np.float64) / scale
    np.testing.assert_array_equal(mask, (scaled <= element.max + margin) & (scaled >= element.min - margin))
