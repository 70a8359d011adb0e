"""Errors on Gaussian numbers: integrals known to many digits, and the tables of the papers whose rules these are.

2^21 numbers of N(0, 1); relMSE = Σ(x - q)² / Σx², misalignment = 1 - <x, q> / <x, x>. Where nothing else is said the
numbers are exact Gaussian integrals, or were measured with the authors' own code (Quartet II, notebooks/unbiasedness).
"""

from functools import cache

import jax
import numpy as np
import pytest
from scipy import stats

from lowprec.formats import BlockFormat, IntFormat, parse, parse_rounding
from lowprec.quantizers import AbsMax, AbsMean, FourOverSix, RootMeanSquare, round_blocks

ABSMAX = AbsMax()


@cache
def samples():
    return np.random.default_rng(0).normal(size=(2048, 1024)).astype(np.float32)


@cache
def quantiles():
    """As many Gaussian numbers in equal steps of probability: sums over them are integrals, without sampling noise."""
    n = samples().size
    return stats.norm.ppf((np.arange(n) + 0.5) / n).astype(np.float32).reshape(samples().shape)


@cache
def compiled(fmt, rule, mode):
    fmt, rounding = parse(fmt), parse_rounding(mode)
    noise = lambda key: {"key": key} if rounding.stochastic else {}
    return jax.jit(lambda x, key: round_blocks(x, fmt, -1, rule=rule, rounding=rounding, **noise(key)).values)


def errors(fmt, rule=ABSMAX, mode="nearest_even", sigma=1.0, numbers=samples):
    """(relMSE, misalignment), summed in float64."""
    x = numbers() * np.float32(sigma)
    q = np.asarray(compiled(fmt, rule, mode)(x, jax.random.key(0)))
    square = np.vdot(x, x.astype(np.float64))
    return np.vdot(x - q, (x - q).astype(np.float64)) / square, 1 - np.vdot(x.astype(np.float64), q) / square


def octave(fmt, rule=ABSMAX, mode="nearest_even"):
    """The mean over an octave of σ: errors with power-of-two scales depend on the place of σ in it."""
    return np.mean([errors(fmt, rule, mode, sigma) for sigma in 2.0 ** ((np.arange(8) + 0.5) / 8)], axis=0)


# Exact integrals: bits -> (the largest level in standard deviations, mean square error).
MIDRISE = {
    1: (0.797885, 0.363380),
    2: (1.493530, 0.118846),
    3: (2.051068, 0.0374397),
    4: (2.514005, 0.0115429),
    5: (2.916151, 0.00349521),
    6: (3.277985, 0.00104005),
    7: (3.611097, 3.04333e-4),
    8: (3.922205, 8.76862e-5),
}
SYMMETRIC = {
    2: (1.224006, 0.190174),
    3: (1.952309, 0.0468600),
    4: (2.473879, 0.0128894),
    5: (2.898728, 0.00369322),
    6: (3.270115, 0.00106929),
    7: (3.607461, 3.08622e-4),
    8: (3.920501, 8.83080e-5),
}
TWOS_COMPLEMENT = {  # bits -> (step, mean square error)
    2: (1.048385, 0.149431),
    3: (0.601824, 0.0406383),
    4: (0.338608, 0.0118640),
    8: (0.030766, 8.77069e-5),
}
FLOATS = {  # format -> (σ stands at this element, mean square error)
    "e2m1fn": (0.487079, 0.0126849),
    "e1m2fn": (0.706823, 0.0128894),
    "e3m0fn": (0.262101, 0.0377450),
    "e2m3fn": (0.499672, 8.29147e-4),
    "e3m2fn": (0.162206, 0.00276611),
    "e4m3fn": (0.0103923, 6.99019e-4),
    "e5m2": (7.9243e-5, 0.00276587),
}
OPTIMAL = {
    **{f"midrise {b}": (BlockFormat(IntFormat(b, midrise=True)), a, mse) for b, (a, mse) in MIDRISE.items()},
    **{f"symmetric {b}": (BlockFormat(IntFormat(b, symmetric=True)), a, mse) for b, (a, mse) in SYMMETRIC.items()},
    **{
        f"two's complement {b}": (BlockFormat(IntFormat(b)), step * (2 ** (b - 1) - 1), mse)
        for b, (step, mse) in TWOS_COMPLEMENT.items()
    },
    **{name: (BlockFormat(parse(name)), scale * parse(name).max, mse) for name, (scale, mse) in FLOATS.items()},
}


@pytest.mark.parametrize("case", OPTIMAL)
def test_optimal_clipping_has_the_error_of_the_integral_and_shrinks_by_it(case):
    fmt, clip, expected = OPTIMAL[case]
    error, misaligned = errors(fmt, RootMeanSquare(clip), numbers=quantiles)
    assert error == pytest.approx(expected, rel=2e-3)
    # For an optimal grid E[x · q] = 1 - MSE. Quantiles lack the far tails: their variance is 1 - 6·10^-7.
    assert misaligned == pytest.approx(expected, rel=2e-3, abs=2e-6)
    if case in ("midrise 4", "symmetric 4", "two's complement 4", "e2m1fn"):
        assert all(errors(fmt, RootMeanSquare(off * clip), numbers=quantiles)[0] > error for off in (0.95, 1.05))


def test_absmean_rules_of_bitnet():
    # E|x| = √(2/π). Ternary with threshold s/2: 31 % zeros. Binary: 1 - 2/π.
    error, _ = errors("ternary@tensor", AbsMean(), numbers=quantiles)
    assert error == pytest.approx(0.263382, rel=2e-3)
    q = np.asarray(compiled("ternary@tensor", AbsMean(), "nearest_even")(quantiles(), jax.random.key(0)))
    assert np.mean(q == 0) == pytest.approx(0.310, abs=1e-3)
    assert errors("binary@tensor", AbsMean(), numbers=quantiles)[0] == pytest.approx(1 - 2 / np.pi, rel=2e-3)


QUEST_FP4 = RootMeanSquare(2.922475, centered=True)
# case -> (format, rule, mode, relMSE, misalignment or None)
TABLE = {
    "e2m1 in blocks, float32 scale": ("e2m1fn@1x32", ABSMAX, "nearest_even", 0.01023, 0.0058),
    "quest, float32 scale": ("e2m1fn@1x32", QUEST_FP4, "nearest_even", 0.01241, 0.0114),
    "nvfp4": ("nvfp4", ABSMAX, "nearest_even", 0.00903, 0.0045),
    "nvfp4, four over six": ("nvfp4", FourOverSix(), "nearest_even", 0.00755, 0.0033),
    "nvfp4 tiles": ("e2m1fn@16x16/e4m3fn.tensor", ABSMAX, "nearest_even", 0.01239, 0.0091),
    "nvfp4 tiles, four over six": ("e2m1fn@16x16/e4m3fn.tensor", FourOverSix(), "nearest_even", 0.01238, None),
    "nvfp4 stochastic": ("nvfp4", AbsMax(17 / 16), "stochastic", 0.02354, 0.0),
    "nvfp4 stochastic that clips": ("nvfp4", ABSMAX, "stochastic", 0.01887, 0.0035),
    "int4 rows": ("int4@row", ABSMAX, "nearest_even", 0.0203, 0.0),
    "int4 1x128": ("int4@1x128", ABSMAX, "nearest_even", 0.0138, None),
    "int4 1x32": ("int4@1x32", ABSMAX, "nearest_even", 0.0094, None),
    "int4 rows, stochastic": ("int4@row", ABSMAX, "stochastic", 0.0405, 0.0),
    "int4 1x128, stochastic": ("int4@1x128", ABSMAX, "stochastic", 0.0275, 0.0),
    "int4 1x32, stochastic": ("int4@1x32", ABSMAX, "stochastic", 0.0188, 0.0),
    "int8 rows": ("int8@row", ABSMAX, "nearest_even", 6.2e-5, 0.0),
    "int8 rows, stochastic": ("int8@row", ABSMAX, "stochastic", 1.23e-4, 0.0),
    "e4m3": ("e4m3fn@tensor", ABSMAX, "nearest_even", 7.0e-4, None),
    "e4m3 1x128": ("e4m3fn@1x128", ABSMAX, "nearest_even", 6.6e-4, None),
    "e4m3 1x16": ("e4m3fn@1x16", ABSMAX, "nearest_even", 5.0e-4, None),
    "e5m2": ("e5m2@tensor", ABSMAX, "nearest_even", 2.8e-3, None),
}


@pytest.mark.parametrize("case", TABLE)
def test_errors_of_scaled_formats(case):
    fmt, rule, mode, error, misaligned = TABLE[case]
    measured = errors(fmt, rule, mode)
    assert measured[0] == pytest.approx(error, rel=0.02)
    if misaligned is not None:
        assert measured[1] == pytest.approx(misaligned, abs=4e-4)


OCTAVE = {
    "mxfp4": ("mxfp4", ABSMAX, "nearest_even", 0.01334, 0.0218),
    "mxfp4, rceil": ("e2m1fn@1x32/e8m0.rceil", ABSMAX, "nearest_even", 0.01365, 0.0095),
    "mxfp4, stochastic that clips": ("mxfp4", ABSMAX, "stochastic", 0.02497, 0.0138),
    "quest, floor": ("e2m1fn@1x32/e8m0.floor", QUEST_FP4, "nearest_even", 0.0223, 0.052),
    "quest, nearest": ("e2m1fn@1x32/e8m0.nearest", QUEST_FP4, "nearest_even", 0.01336, 0.0152),
    "quest, ceil": ("e2m1fn@1x32/e8m0.ceil", QUEST_FP4, "nearest_even", 0.01554, 0.0087),
}


@pytest.mark.parametrize("case", OCTAVE)
def test_errors_with_power_of_two_scales_over_an_octave(case):
    fmt, rule, mode, error, misaligned = OCTAVE[case]
    measured = octave(fmt, rule, mode)
    assert measured[0] == pytest.approx(error, rel=0.02)
    assert measured[1] == pytest.approx(misaligned, abs=5e-4)


@pytest.mark.parametrize("sigma,error", [(1.0, 0.0269), (1.2, 0.0170), (1.5, 0.0208), (1.8, 0.0297)])
def test_quest_with_floored_scales_depends_on_the_place_in_the_octave(sigma, error):
    assert errors("e2m1fn@1x32/e8m0.floor", QUEST_FP4, sigma=sigma)[0] == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_quest_has_all_its_levels_and_no_zero(bits):
    clip = MIDRISE[bits][0]
    q = compiled(BlockFormat(IntFormat(bits, midrise=True), "row"), RootMeanSquare(clip), "nearest_even")
    row = np.asarray(q(samples(), jax.random.key(0)))[0]
    rms = np.sqrt(np.mean(samples()[0].astype(np.float64) ** 2))
    levels = np.linspace(-clip, clip, 2**bits) * rms
    assert len(np.unique(row)) == (2**bits if bits <= 4 else len(np.unique(row)))
    np.testing.assert_allclose(np.abs(row[:, None] - levels).min(1), 0, atol=1e-6)
