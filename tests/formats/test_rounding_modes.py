"""Rounding, against a search on the number line of each format: another algorithm, in float64, with other bits."""

import jax.numpy as jnp
import numpy as np
import pytest
from number_line import DETERMINISTIC, NumberLine, half_precision_patterns
from op_by_op import round_to

from lowprec import formats
from lowprec.formats import FloatFormat

PATTERNS = half_precision_patterns()
PROBES = 4096  # one shape for all formats: eager operations compile once

OTHERS = (
    "e4m3fn_nosubnormals",
    "e5m2_ieee_nosubnormals",
    "e4m3fn_unsigned",
    "e3m2fn_nonegzero",
    "e2m3fn_inf",
    "e0m5fn",
    "e0m7fnuz",
    "e3m0fn",
    "e4m0fn_nosubnormals",
    "e5m2_p3109e",
    "e4m3_p3109f",
    "e5m3_p3109ue",
    "e4m3b_12fn",
    "e8m7b133fn",
    "e8m3b140fn",
    "int3_symmetric",
    "int8_symmetric",
    "int4_midrise",
    "int2_midrise",
    "fx8.3_midrise",
    "fx8.6",
    "ufx6.-2",
    "fx16.20",
    "uint1",
)


def element_names():
    named = [name for name in formats.names() if isinstance(formats.parse(name), formats.BlockFormat) is False]
    return [name for name in (*named, *OTHERS) if formats.parse(name).bits <= 19]


def same_bits(actual, expected):
    """Equality of float32 values including the signs of zeros; all NaN are equal."""
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected).astype(np.float32)
    equal = actual.view(np.uint32) == expected.view(np.uint32)
    return equal | (np.isnan(actual) & np.isnan(expected))


@pytest.mark.parametrize("name", element_names())
def test_every_deterministic_mode_agrees_with_a_search_on_the_number_line(name):
    fmt = formats.parse(name)
    line = NumberLine(fmt)
    x = line.probes(PROBES)
    for mode in DETERMINISTIC:
        for saturate in (True, False) if isinstance(fmt, FloatFormat) else (True,):
            actual = round_to(x, fmt, rounding=mode, saturate=saturate)
            expected = line.round(x, mode, saturate)
            wrong = ~same_bits(actual, expected)
            assert not wrong.any(), (
                f"{mode} saturate={saturate}: {x[wrong][:5]!r} -> {np.asarray(actual)[wrong][:5]!r}, "
                f"not {expected[wrong][:5]!r} ({wrong.sum()} of {x.size})"
            )


@pytest.mark.parametrize("name", element_names())
def test_every_half_precision_pattern_and_its_neighbours_round_as_on_the_number_line(name):
    fmt = formats.parse(name)
    expected = NumberLine(fmt).round(PATTERNS, "nearest_even")
    wrong = ~same_bits(formats.round_to(PATTERNS, fmt), expected)
    assert not wrong.any(), f"{PATTERNS[wrong][:5]!r}, not {expected[wrong][:5]!r} ({wrong.sum()} wrong)"


@pytest.mark.parametrize("name", element_names())
def test_value_table_and_limits_are_those_of_the_number_line(name):
    fmt = formats.parse(name)
    if fmt.bits > 16:
        with pytest.raises(ValueError, match=f"{name} has 2\\^{fmt.bits} codes"):
            formats.value_table(fmt)
        return
    finite = NumberLine(fmt).finite
    np.testing.assert_array_equal(formats.value_table(fmt), np.unique(finite) + 0.0)
    assert fmt.min == finite.min()
    assert fmt.max == (finite.max() if not isinstance(fmt, formats.TableFormat) else np.abs(finite).max())
    if fmt.max > 0:
        assert fmt.min_subnormal == np.abs(finite[finite != 0]).min()


@pytest.mark.parametrize("mode", DETERMINISTIC)
def test_the_infinities_and_nan_of_float32_stay_what_they_are(mode):
    x = jnp.array([np.inf, -np.inf, np.nan, -0.0, 1e-45, -1e-45], jnp.float32)
    y = round_to(x, "float32", rounding=mode, saturate=False)
    assert same_bits(y, x).all()


def test_a_midrise_format_of_one_bit_is_the_sign():
    x = jnp.array([3.0, 1e-45, 0.0, -0.0, -1e-45, -3.0], jnp.float32)
    np.testing.assert_array_equal(formats.round_to(x, "int1_midrise"), [0.5, 0.5, 0.5, 0.5, -0.5, -0.5])


def test_without_mantissa_bits_ties_go_away_from_zero():
    # IEEE 754-2019 §4.3.1: where neither neighbour has an even last digit, the one larger in magnitude.
    x = jnp.array([1.5, 3.0, -1.5, -3.0], jnp.float32)
    np.testing.assert_array_equal(formats.round_to(x, "e3m0fn"), [2.0, 4.0, -2.0, -4.0])
