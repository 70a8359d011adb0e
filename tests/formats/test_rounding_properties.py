"""What holds for every format that can be written down, not only for the named ones."""

import jax
import jax.numpy as jnp
import numpy as np
import op_by_op
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from number_line import DETERMINISTIC, NumberLine
from random_formats import element_formats, float_formats, inputs, int_formats

from lowprec import formats
from lowprec.formats import FloatFormat, Rounding, TableFormat, elements

KEY = jax.random.key(0)
SEEDS = st.integers(0, 2**32 - 1)
MODES = st.sampled_from(DETERMINISTIC)
NEAREST = ("nearest_even", "nearest_away", "nearest_zero")
ALL_MODES = st.sampled_from((*DETERMINISTIC, "stochastic", "stochastic_equal", "stochastic[3A]", "stochastic[5]"))
checked = settings(max_examples=100, deadline=None, derandomize=True)


def rounded(x, fmt, mode, saturate=True):
    return op_by_op.round_to(x, fmt, rounding=mode, key=KEY, saturate=saturate)


def bits(x):
    return np.asarray(x, np.float32).view(np.uint32)


@checked
@given(element_formats(), ALL_MODES, SEEDS)
def test_rounding_twice_changes_nothing(fmt, mode, seed):
    once = rounded(inputs(fmt, seed), fmt, mode)
    np.testing.assert_array_equal(bits(rounded(once, fmt, mode)), bits(once))


@checked
@given(element_formats(), ALL_MODES, SEEDS)
def test_every_code_is_a_value_that_rounds_and_encodes_to_itself(fmt, mode, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << fmt.bits, 512)
    if isinstance(fmt, TableFormat):
        codes = (codes % len(fmt.values) + fmt.first_code) % (1 << fmt.bits)
    codes = codes.astype(elements.code_dtype(fmt.bits))
    values = np.asarray(formats.decode(codes, fmt))
    finite = np.isfinite(values) & (values != 0)
    again = op_by_op.encode(values, fmt, rounding=mode, key=KEY)
    if not (isinstance(fmt, formats.IntFormat) and fmt.symmetric):  # which has a code too many
        np.testing.assert_array_equal(again[finite], codes[finite])
    np.testing.assert_array_equal(rounded(values, fmt, mode)[finite], np.clip(values, fmt.min, None)[finite])


@checked
@given(element_formats(), ALL_MODES, SEEDS, st.booleans())
def test_decoding_the_code_gives_the_rounded_value(fmt, mode, seed, saturate):
    x = inputs(fmt, seed)
    codes = op_by_op.encode(x, fmt, rounding=mode, key=KEY, saturate=saturate)
    values, expected = np.asarray(formats.decode(codes, fmt)), rounded(x, fmt, mode, saturate)
    # A NaN of overflow may have no code (then it has that of zero).
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(bits(values)[number], bits(expected)[number])


@checked
@given(element_formats(), MODES, SEEDS)
def test_the_larger_input_has_the_larger_result(fmt, mode, seed):
    x = np.sort(inputs(fmt, seed) + np.float32(0))  # no negative zeros, which cannot be sorted
    y = rounded(x, fmt, mode)
    assert np.all(np.diff(y[~np.isnan(y)]) >= 0)


@checked
@given(
    element_formats(),
    SEEDS,
    st.integers(0, 2**32 - 1),
    st.sampled_from(["stochastic", "stochastic[4]", "stochastic[2A]"]),
)
def test_the_larger_input_has_the_larger_result_for_one_random_word(fmt, seed, word, mode):
    x = np.sort(inputs(fmt, seed) + np.float32(0))
    rounding = formats.parse_rounding(mode)
    y = np.asarray(elements.round_elements(jnp.asarray(x), fmt, rounding, jnp.full(x.shape, word, jnp.uint32)))
    y = y[~np.isnan(y)]  # of negative numbers in unsigned formats without a zero
    assert np.all(np.diff(y) >= 0)


@checked
@given(st.one_of(float_formats(), int_formats()), MODES, SEEDS, st.booleans())
def test_the_opposite_input_has_the_opposite_result(fmt, mode, seed, saturate):
    assume(fmt.min == -fmt.max and not getattr(fmt, "midrise", False))
    x = inputs(fmt, seed)
    opposite = {"up": "down", "down": "up"}.get(mode, mode)
    y, mirrored = rounded(x, fmt, mode, saturate), rounded(-x, fmt, opposite, saturate)
    np.testing.assert_array_equal(y, -mirrored)
    if isinstance(fmt, FloatFormat) and fmt.negative_zero:
        number = ~np.isnan(y)
        np.testing.assert_array_equal(bits(y)[number], bits(-mirrored)[number])


@checked
@given(element_formats(), SEEDS)
def test_down_and_up_bracket_the_input_and_every_mode_gives_one_of_them(fmt, seed):
    x = inputs(fmt, seed)
    results = {
        mode: rounded(x, fmt, mode).astype(np.float64) for mode in (*DETERMINISTIC, "stochastic", "stochastic_equal")
    }
    inside = (x >= fmt.min) & (x <= (fmt.values[-1] if isinstance(fmt, TableFormat) else fmt.max))
    if isinstance(fmt, FloatFormat) and not fmt.has_zero:  # what lies nearer to zero goes to the smallest magnitude
        inside &= np.abs(x) >= fmt.min_normal
    x, results = x[inside].astype(np.float64), {mode: y[inside] for mode, y in results.items()}
    down, up = results["down"], results["up"]
    assert np.all(down <= x) and np.all(x <= up)
    for mode, y in results.items():
        assert np.all((y == down) | (y == up)), mode
        if mode in NEAREST:
            assert np.all(np.abs(y - x) <= np.minimum(x - down, up - x)), mode
    toward, away = np.abs(results["toward_zero"]), np.abs(results["away"])
    around_zero = (down < 0) & (up > 0)  # in formats without a zero nothing lies toward it
    assert np.all((toward <= np.abs(x))[~around_zero]) and np.all((np.abs(x) <= away)[~around_zero])


@checked
@given(float_formats(), st.integers(0, 21), SEEDS)
def test_odd_rounding_prevents_double_rounding(fmt, coarse_bits, seed):
    # Boldo and Melquiond 2008: with two more bits, odd then nearest is nearest.
    assume(fmt.mantissa_bits >= 2 and fmt.exponent_bits and fmt.subnormals)
    bits_left = min(coarse_bits, fmt.mantissa_bits - 2)
    try:
        coarse = FloatFormat(
            fmt.exponent_bits, bits_left, fmt.bias, fmt.has_inf, fmt.nan, fmt.signed, fmt.negative_zero
        )
    except ValueError:
        assume(False)
    x = inputs(fmt, seed)
    twice = rounded(rounded(x, fmt, "odd"), coarse, "nearest_even")
    np.testing.assert_array_equal(bits(twice), bits(rounded(x, coarse, "nearest_even")))


@checked
@given(st.one_of(float_formats(10), int_formats()), MODES, SEEDS, st.booleans())
def test_random_formats_agree_with_the_number_line(fmt, mode, seed, saturate):
    assume(fmt.bits <= 12)
    x = inputs(fmt, seed)
    y, expected = rounded(x, fmt, mode, saturate), NumberLine(fmt).round(x, mode, saturate).astype(np.float32)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
    number = ~np.isnan(y)
    np.testing.assert_array_equal(bits(y)[number], bits(expected)[number])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(element_formats(), ALL_MODES, SEEDS)
def test_random_formats_round_alike_under_jit(fmt, mode, seed):
    x, random = inputs(fmt, seed), np.random.default_rng(seed).integers(0, 2**32, 512, dtype=np.uint32)
    rounding = formats.parse_rounding(mode)
    random = jnp.asarray(random) if rounding.stochastic else None
    call = lambda x: elements.round_elements(x, fmt, rounding, random)
    np.testing.assert_array_equal(bits(jax.jit(call)(x)), bits(call(jnp.asarray(x))))


@checked
@given(float_formats(8), st.integers(-40, 40), SEEDS)
def test_a_grid_scaled_by_a_power_of_two_rounds_scaled_inputs_alike(fmt, exponent, seed):
    # Inputs and results far from float32's limits, so that scaling itself is exact.
    assume(fmt.max < 2.0**60 and fmt.min_subnormal > 2.0**-60)
    x = inputs(fmt, seed)
    x = np.where((np.abs(x) > 2.0**-70) & (np.abs(x) < 2.0**70), x, np.float32(1))
    for mode in ("nearest_even", "odd", "up"):
        scaled = elements.round_elements(
            jnp.asarray(x * np.float32(2.0**exponent)), fmt, Rounding(mode), exponent=jnp.int32(exponent)
        )
        np.testing.assert_array_equal(bits(scaled), bits(rounded(x, fmt, mode) * np.float32(2.0**exponent)))
