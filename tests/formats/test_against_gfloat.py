"""gfloat, the reference implementation close to the P3109 standard: values, rounding modes and few-bit randomness."""

import gfloat
import numpy as np
import pytest
from gfloat import Domain, FormatInfo, RoundMode, Signedness
from gfloat.formats import format_info_p3109
from number_line import NumberLine
from op_by_op import round_to

from lowprec import formats
from lowprec.formats import FloatFormat, Rounding, elements

MODES = {
    "nearest_even": RoundMode.TiesToEven,
    "nearest_away": RoundMode.TiesToAway,
    "toward_zero": RoundMode.TowardZero,
    "up": RoundMode.TowardPositive,
    "down": RoundMode.TowardNegative,
}
VARIANTS = {"A": RoundMode.StochasticFastest, "B": RoundMode.StochasticFast, "C": RoundMode.Stochastic}
FLOATS = [name for name in formats.names() if isinstance(formats.parse(name), FloatFormat)]
P3109 = [
    (k, p, signedness, domain)
    for k in (3, 4, 6, 8)
    for p in range(1, k + 1)
    for signedness in Signedness
    for domain in Domain
    if k - p + (signedness == Signedness.Unsigned) <= 8  # exponent bits
]


def described_to_gfloat(fmt: FloatFormat) -> FormatInfo:
    return FormatInfo(
        str(fmt),
        k=fmt.bits,
        precision=fmt.mantissa_bits + 1,
        bias=fmt.bias,
        is_signed=fmt.signed,
        domain=Domain.Extended if fmt.has_inf else Domain.Finite,
        has_nz=fmt.negative_zero,
        num_high_nans={"ieee": (1 << fmt.mantissa_bits) - 1, "fn": 1, "fnuz": 0, "none": 0}[fmt.nan],
        has_subnormals=fmt.subnormals,
        is_twos_complement=False,
    )


def p3109_name(k, p, signedness, domain):
    signed = signedness == Signedness.Signed
    return f"e{k - p + (not signed)}m{p - 1}_p3109{'' if signed else 'u'}{'e' if domain == Domain.Extended else 'f'}"


def assert_rounds_alike(fmt: FloatFormat, info: FormatInfo):
    x = probes(fmt)
    for mode, theirs in MODES.items():
        for saturate in (True, False):
            known = x if fmt.has_inf or fmt.nan != "none" or saturate else x[np.abs(x) <= fmt.max]
            expected = gfloat.round_ndarray(info, known.astype(np.float64), theirs, saturate).astype(np.float32)
            padded = np.resize(known, x.shape)  # one shape, one compilation
            actual = round_to(padded, fmt, rounding=mode, saturate=saturate)[: known.size]
            np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
            number = ~np.isnan(actual)
            np.testing.assert_array_equal(actual.view(np.uint32)[number], expected.view(np.uint32)[number])


def probes(fmt):
    if fmt.bits <= 16:
        x = NumberLine(fmt).probes(4096)
    else:
        x = np.random.default_rng(0).integers(0, 1 << 32, 4096, dtype=np.uint32).view(np.float32)
    x = x[~np.isnan(x)]
    x = x if fmt.signed else x[~np.signbit(x)]  # gfloat takes no negative numbers there
    x = x if fmt.has_zero else x[x >= fmt.min_normal]
    return np.resize(x, 4096)


@pytest.mark.parametrize("name", FLOATS)
def test_named_formats_have_the_limits_and_the_rounding_of_gfloat(name):
    fmt = formats.parse(name)
    info = described_to_gfloat(fmt)
    assert fmt.max == info.max
    assert fmt.min_subnormal == info.smallest
    if fmt.mantissa_bits:
        assert_rounds_alike(fmt, info)


@pytest.mark.parametrize("k,p,signedness,domain", P3109)
def test_p3109_formats_decode_and_round_as_gfloat_does(k, p, signedness, domain):
    fmt = formats.parse(p3109_name(k, p, signedness, domain))
    info = format_info_p3109(k, p, signedness, domain)
    assert fmt.bits == k
    codes = np.arange(1 << k)
    np.testing.assert_array_equal(formats.decode(codes, fmt), gfloat.decode_ndarray(info, codes).astype(np.float32))
    if p > 1:  # with one digit gfloat breaks ties by the parity of the code, IEEE 754 (and we) away from zero
        assert_rounds_alike(fmt, info)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e2m1fn", "e3m4_ieee", "e4m3fnuz", "bfloat16"])
def test_few_bit_stochastic_rounding_is_that_of_gfloat_for_every_random_number(name, variant):
    fmt = formats.parse(name)
    info = described_to_gfloat(fmt)
    x = np.resize(probes(fmt), 2048)
    for k in (1, 3, 4):
        for r in range(2**k):
            expected = gfloat.round_ndarray(info, x.astype(np.float64), VARIANTS[variant], True, np.full(x.shape, r), k)
            words = np.full(x.shape, r << (32 - k), np.uint32)
            actual = elements.round_elements(x, fmt, Rounding("stochastic", k, variant), words)
            np.testing.assert_array_equal(actual, expected.astype(np.float32))
