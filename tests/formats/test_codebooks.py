"""Posits, logarithmic numbers and optimizer maps against their definitions, in exact arithmetic."""

from bisect import bisect_left
from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec import formats

PUBLISHED = Path(__file__).parents[3] / "shared/data/optimizer_codebooks.npz"


def posit_value(code, bits, exponent_bits):
    """Posit Standard 2022 §3: the sign, a run of equal bits that counts 2^(2^es), exponent, fraction."""
    if code >> (bits - 1):
        return -posit_value((1 << bits) - code, bits, exponent_bits)
    if code == 0:
        return Fraction(0)
    digits = [code >> place & 1 for place in range(bits - 2, -1, -1)]
    run = 1
    while run < len(digits) and digits[run] == digits[0]:
        run += 1
    scale = (run - 1 if digits[0] else -run) << exponent_bits
    rest = digits[run + 1 :] + [0] * 32
    exponent = sum(bit << (exponent_bits - 1 - place) for place, bit in enumerate(rest[:exponent_bits]))
    fraction = sum(Fraction(bit, 2 << place) for place, bit in enumerate(rest[exponent_bits:]))
    return (1 + fraction) * Fraction(2) ** (scale + exponent)


def positive_posits(bits, exponent_bits):
    return [posit_value(code, bits, exponent_bits) for code in range(1, 1 << (bits - 1))]


def nearest_posit(x, longer):
    """The code of a positive number, rounded as a string of bits, to even; neither to zero nor to NaR.

    Args:
      longer: the positive posits of one more bit: the values and what lies between them.
    """
    top = len(longer) // 2
    place = bisect_left(longer, x)
    exact = place < len(longer) and longer[place] == x
    code, past = (place + 1, False) if exact else (place, True)  # x lies at, or above, the longer code
    up = code % 2 == 1 and (past or (code // 2) % 2 == 1)
    return min(max(code // 2 + up, 1), top)


@pytest.mark.parametrize(("bits", "exponent_bits"), [(8, 2), (8, 0), (6, 1), (5, 3), (3, 2)])
def test_posits_decode_and_round_as_the_standard_says(bits, exponent_bits):
    fmt = formats.parse(f"posit{bits}_es{exponent_bits}")
    codes = np.arange(1 << bits)
    values = np.asarray(formats.decode(codes, fmt))
    nar = 1 << (bits - 1)
    expected = [float(posit_value(code, bits, exponent_bits)) if code != nar else np.nan for code in codes.tolist()]
    np.testing.assert_array_equal(values, np.float32(expected))
    np.testing.assert_array_equal(formats.encode(values, fmt), codes)

    random = np.random.default_rng(0)
    longer = positive_posits(bits + 1, exponent_bits)
    middles = np.array([float(value) for value in longer], np.float32)
    x = np.concatenate([middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(np.inf))])
    x = np.concatenate([x, np.exp2(random.uniform(-40, 40, 300)).astype(np.float32)])
    x = x[x > 0]
    expected = [nearest_posit(Fraction(float(v)), longer) for v in x]
    np.testing.assert_array_equal(formats.encode(x, fmt), expected)
    np.testing.assert_array_equal(formats.encode(-x, fmt), (1 << bits) - np.array(expected))


def test_posit16_has_the_limits_of_the_standard():
    fmt = formats.parse("posit16")
    assert (fmt.max, fmt.min_normal) == (2.0**56, 2.0**-56)
    assert formats.decode(jnp.array([0x4000, 0x4001, 0xC000]), fmt).tolist() == [1.0, 1 + 2.0**-11, -1.0]
    assert formats.round_to(jnp.array([1e-30, -1e30, 0.0]), fmt).tolist() == [2.0**-56, -(2.0**56), 0.0]


def test_stochastic_rounding_of_posits_is_unbiased_also_where_exponent_bits_are_cut_off():
    x = jnp.full(1 << 18, 1.3 * 2.0**21)  # between 2^20 and 2^24
    y = formats.round_to(x, "posit8", rounding="stochastic", key=jax.random.key(0))
    assert set(np.unique(y)) == {2.0**20, 2.0**24}
    way = (float(x[0]) - 2.0**20) / (2.0**24 - 2.0**20)
    deviation = (2.0**24 - 2.0**20) * np.sqrt(way * (1 - way) / x.size)
    assert abs(float(np.mean(np.asarray(y, np.float64))) - float(x[0])) < 5 * deviation  # 6e-7 by chance


def test_logarithmic_numbers_round_in_the_logarithm():
    x = np.exp2(np.random.default_rng(0).uniform(-7, 7, 4096)).astype(np.float32)
    logs = np.log2(x.astype(np.float64)) * 8
    clear = np.abs(logs - np.floor(logs) - 0.5) > 1e-6
    y = np.asarray(formats.round_to(np.concatenate([x, -x]), "lns8.3"))
    expected = np.exp2(np.round(logs) / 8)
    np.testing.assert_allclose(y[: x.size][clear], expected[clear], rtol=1e-7)
    np.testing.assert_array_equal(y[x.size :], -y[: x.size])
    assert formats.round_to(jnp.float32(2.0**-8.5), "lns8.3") == 0


def test_powers_of_two_are_those_of_inq():
    assert formats.value_table("pow2_3").tolist() == [-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0]
    assert formats.round_to(jnp.array([0.74, 0.76, 0.12, 3.0]), "pow2_3").tolist() == [0.5, 1.0, 0.0, 1.0]


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the published tables are not here")
@pytest.mark.parametrize(
    ("name", "column"), [("de8", "s8"), ("ude8", "u8"), ("de4", "s4"), ("ude4", "u4"), ("lin4",) * 2]
)
def test_optimizer_maps_are_the_published_ones(name, column):
    expected = np.load(PUBLISHED)[column]
    np.testing.assert_allclose(formats.value_table(name), expected, rtol=0, atol=2.0**-24)  # they were built in float32


def test_the_four_bit_dynamic_map():
    positive = [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875]
    expected = [-v for v in positive[::-1]] + [0, *positive, 1]
    np.testing.assert_allclose(formats.value_table("de4"), expected, rtol=1e-7)


def test_companded_maps_invert_their_closed_form():
    q = np.arange(-127, 128) / 127
    np.testing.assert_allclose(formats.value_table("cmp8"), q / (2 - np.abs(q)), rtol=1e-7)
    x = np.linspace(-1, 1, 4001, dtype=np.float32)
    t = 127 * 2 * x.astype(np.float64) / (1 + np.abs(x.astype(np.float64)))
    clear = np.abs(t - np.floor(t) - 0.5) > 1e-4
    codes = np.asarray(formats.encode(x, "cmp8")).astype(int) - 127
    np.testing.assert_array_equal(codes[clear], np.round(t[clear]))


@pytest.mark.parametrize(
    "name", ["posit2", "posit17", "posit16_es4", "lns3.7", "pow2_9", "de9", "log1", "lin9", "cmp1"]
)
def test_tables_that_do_not_exist_are_refused_by_name(name):
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        formats.parse(name)
