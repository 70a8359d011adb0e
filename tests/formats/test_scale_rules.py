"""Scales of blocks against their definitions in exact rational arithmetic, and against published contract cases."""

import math
from fractions import Fraction
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec import formats, quantizers
from lowprec.formats import parse
from lowprec.formats.scaling import power_of_two_rule, store_scale
from lowprec.formats.types import E8M0, E8M0_RULES, ScaleSpec

ELEMENTS = (
    "e4m3fn",
    "e5m2",
    "e3m2fn",
    "e2m3fn",
    "e2m1fn",
    "int8",
    "fx8.6",
    "fx8.9",
    "int4",
    "nf4",
    "e4m3_ieee",
    "e5m10_ieee",
)


def amaxes() -> np.ndarray:
    """Positive float32 numbers: every binade, subnormals too, round and random significands and their neighbours."""
    random = np.random.default_rng(0)
    fractions = np.concatenate([[0, 1, 2, 0x400000, 0x3504F3, 0x3504F4, 0x600000, 0x7FFFFE, 0x7FFFFF], [0] * 7])
    bits = (np.arange(255, dtype=np.uint32)[:, None] << 23) + fractions.astype(np.uint32)
    bits[:, 9:] += random.integers(0, 1 << 23, (255, 7), dtype=np.uint32)
    # The largest element times a power of two, where each rule changes its mind.
    tops = np.array([np.float32(parse(name).max).view(np.uint32) & 0x7FFFFF for name in ELEMENTS])
    edges = ((np.arange(1, 255, dtype=np.uint32)[:, None, None] << 23) + tops[:, None] + np.arange(-2, 3)).astype(
        np.uint32
    )
    subnormal = np.uint32(1) << np.arange(23, dtype=np.uint32)
    around = np.concatenate([subnormal, subnormal + 1, subnormal - 1])
    bits = np.unique(np.concatenate([bits.ravel(), edges.ravel(), around]))
    return bits[(bits > 0) & (bits < 0x7F800000)].view(np.float32)


AMAX = amaxes()


def floor_log2(x: Fraction) -> int:
    n = x.numerator.bit_length() - x.denominator.bit_length()
    return n if x >= Fraction(2) ** n else n - 1


def ceil_log2(x: Fraction) -> int:
    n = floor_log2(x)
    return n + (x > Fraction(2) ** n)


def mantissa_bits(fmt):
    if isinstance(fmt, formats.FloatFormat):
        return fmt.mantissa_bits
    return fmt.bits - 2 if isinstance(fmt, formats.IntFormat) else 0


def exponent_by_definition(amax: float, fmt, rule: str) -> int:
    """spec: with E = floor(log2 amax), e = floor(log2 max)."""
    a, largest = Fraction(float(amax)), Fraction(fmt.max)
    e = floor_log2(largest)
    match rule:
        case "floor":
            c = floor_log2(a) - e
        case "ceil":
            c = ceil_log2(a) - e
        case "even":  # half up, at the last bit of the element's significand
            quantum = Fraction(2) ** (floor_log2(a) - mantissa_bits(fmt))
            c = floor_log2(math.floor(a / quantum + Fraction(1, 2)) * quantum) - e
        case "nearest":  # round(log2(a / max)): compare squares, no logarithm
            n = floor_log2(a / largest)
            c = n + ((a / largest) ** 2 > Fraction(2) ** (2 * n + 1))
        case "rceil":  # in float32 with subnormals, as a CPU computes it with numpy
            with np.errstate(over="ignore", under="ignore"):
                product = np.float32(amax) * (np.float32(1) / np.float32(fmt.max))
            c = 128 if np.isinf(product) else ceil_log2(Fraction(float(product))) if product > 0 else -127
        case "rceil_exact":
            c = ceil_log2(a / largest)
    return min(max(c, -127), 127)


@pytest.mark.parametrize("rule", E8M0_RULES)
@pytest.mark.parametrize("element", ELEMENTS)
def test_power_of_two_scales_follow_their_definition(element, rule):
    fmt = parse(element)
    sample = AMAX[:: 3 if rule != "rceil" else 1]
    expected = [exponent_by_definition(a, fmt, rule) for a in sample]
    eager = power_of_two_rule(jnp.asarray(AMAX), fmt, rule)[:: 3 if rule != "rceil" else 1]
    np.testing.assert_array_equal(eager, expected)


@pytest.mark.parametrize("rule", E8M0_RULES)
def test_scales_wanted_as_numbers_round_in_log2(rule):
    expected = [exponent_by_definition(a, parse("fx2.0"), rule) for a in AMAX[::5]]  # a largest element of 1
    scale = jax.jit(lambda w: store_scale(w, ScaleSpec(E8M0, rule)))(jnp.asarray(AMAX))
    np.testing.assert_array_equal(scale.exponent[::5], expected)
    np.testing.assert_array_equal(np.asarray(scale.block, np.float64), np.exp2(np.asarray(scale.exponent, np.float64)))


@pytest.mark.parametrize("name", [n for n in formats.names() if isinstance(parse(n), formats.BlockFormat)])
@pytest.mark.parametrize("rule", E8M0_RULES)
def test_no_rule_but_floor_even_and_nearest_lets_amax_overflow(name, rule):
    element = parse(name).element
    exponent = np.asarray(power_of_two_rule(jnp.asarray(AMAX), element, rule), np.float64)
    ratio = AMAX.astype(np.float64) / np.exp2(exponent) / element.max
    ratio = ratio[(exponent > -127) & (exponent < 127)]
    if rule == "rceil_exact":
        assert ratio.max() <= 1
    elif rule == "rceil":
        assert ratio.max() <= 1 + 2**-22
    assert ratio.max() < 2 and ratio.min() > 0.25


@cache
def compiled(fmt):
    return jax.jit(lambda x: (quantizers.quantize(x, fmt), quantizers.fake_quant(x, fmt)))


def quantize(x, fmt):
    return compiled(fmt)(jnp.asarray(x, jnp.float32))[0]


def fake_quant(x, fmt):
    return np.asarray(compiled(fmt)(jnp.asarray(x, jnp.float32))[1])


# The semantics that torchao states for its MXFP8 casts: name -> (block, scale code by floor, by rceil, values or None).
SMALLEST = float(np.float32(2.0**-149))
MXFP8_CONTRACT = {
    "zeros": ([0.0, -0.0], 0, 0),
    "smallest normal": ([2.0**-126], 0, 0),
    "smallest subnormal": ([SMALLEST, -SMALLEST], 0, 0),
    "bfloat16 subnormal": ([2.0**-133], 0, 0),
    "one": ([1.0], 127 - 8, 127 - 8),
    "448": ([448.0], 127, 127),
    "480": ([480.0], 127, 128),
    "512": ([512.0], 128, 128),
    "the largest float32": ([3.4028234663852886e38], 246, 247),
    "infinity": ([1.0, np.inf], 255, 255),
    "NaN": ([1.0, np.nan, -np.inf], 255, 255),
}


@pytest.mark.parametrize("case", MXFP8_CONTRACT)
def test_mxfp8_contract_cases(case):
    values, floor, rceil = MXFP8_CONTRACT[case]
    block = np.resize(np.float32(values), 32)
    for rule, code in (("floor", floor), ("rceil", rceil)):
        q = quantize(block, f"e4m3fn@1x32/e8m0.{rule}")
        assert int(q.scales[0]) == code
        y = np.asarray(q.dequantize())
        if code == 255:
            assert np.isnan(y).all() and np.all(np.asarray(q.codes) & 0x7F == 0x7F)


def test_mxfp8_codes_of_the_contract():
    code = lambda x, rule: int(quantize(np.full(32, x), f"e4m3fn@1x32/e8m0.{rule}").codes[0])
    assert code(480.0, "floor") == 0x7E and code(480.0, "rceil") == 0x77  # saturates at 448; 240 · 2
    assert code(2.0**-133, "floor") == 0x08  # 2^-6 · 2^-127: exact, though no product of floats on a CPU shows it
    assert code(SMALLEST, "floor") == 0x00 and code(-SMALLEST, "floor") == 0x80


def test_microscaling_saturates_where_a_logarithm_would_take_the_next_scale():
    # log2(31.999998) rounds to 5 in float32; the exponent field says 4 (a fault of microxcaling).
    x = np.full(32, -np.nextafter(np.float32(32), np.float32(0)))
    saturated = {"mxfp8": -28.0, "mxfp8_e5m2": -28.0, "mxfp6_e3m2": -28.0, "mxfp6_e2m3": -30.0, "mxfp4": -24.0}
    assert {name: fake_quant(x, name)[0] for name in saturated} == saturated


SCALES = (
    "f32",
    "bf16",
    "e4m3fn",
    "e5m2",
    "e4m3fn.tensor",
    "e5m3fn_unsigned",
    "tf32",
    "float16",
    "e8m0.floor",
    "e8m0.nearest",
)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_an_infinity_or_nan_makes_its_block_nan_and_no_other(scale, bad):
    x = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    fmt = f"int8@1x16/{scale}"
    x[0, 0] = 9  # the largest, also of the second level
    clean = fake_quant(x, fmt)
    x[1, 20] = bad
    for y in (fake_quant(x, fmt), np.asarray(quantize(x, fmt).dequantize())):
        broken = np.isnan(y)
        assert broken[1, 16:32].all() and broken.sum() == 16
        np.testing.assert_array_equal(y[~broken], clean[~broken])


@pytest.mark.parametrize("scale", SCALES)
def test_the_stored_scale_is_the_nearest_in_its_format(scale):
    spec = parse(f"int8@row/{scale}").scale
    if spec.power_of_two:
        return  # stated above, by rule
    wanted = np.exp(np.random.default_rng(0).normal(size=512) * 3).astype(np.float32)
    stored = np.asarray(store_scale(jnp.asarray(wanted), spec, tensor=jnp.float32(1)).block)
    clipped = np.clip(wanted, spec.format.min_normal, spec.format.max)
    np.testing.assert_array_equal(stored, formats.round_to(jnp.asarray(clipped), spec.format))


def nvfp4_by_definition(x):
    """In float32, operation by operation, as NVIDIA states it: g = amax / (448 · 6), s = e4m3(amax_b / 6 / g)."""
    f = np.float32
    g = f(np.abs(x).max()) / f(448 * 6)
    blocks = x.reshape(-1, 16)
    amax = np.abs(blocks).max(1, keepdims=True)
    wanted = np.clip(amax / f(6) / g, f(2**-6), f(448))
    s = np.asarray(formats.round_to(jnp.asarray(wanted), "e4m3fn"))
    scaled = np.clip(blocks * ((f(1) / g) / s), -6, 6)
    elements = np.asarray(formats.round_to(jnp.asarray(scaled), "e2m1fn"))
    return (elements * s * g).reshape(x.shape), s, g


@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
def test_nvfp4_is_the_two_level_formula(spread):
    random = np.random.default_rng(0)
    x = (random.normal(size=(64, 128)) * np.exp(spread * random.normal(size=(64, 1)))).astype(np.float32)
    values, s, g = nvfp4_by_definition(x)
    q = quantize(x, "nvfp4")
    assert np.float32(q.tensor_scale) == g
    np.testing.assert_array_equal(np.asarray(formats.decode(q.scales, "e4m3fn")).reshape(-1, 1), s)
    np.testing.assert_array_equal(q.dequantize(), values)


POWER_OF_TWO = {"mxfp8": -118, "mxfp4": -123, "mxint8": -125, "dfp16": -112, "e3m2fn@1x32/e8m0.rceil": -121}


@pytest.mark.parametrize("name", POWER_OF_TWO)
def test_power_of_two_scaled_formats_follow_the_scale_of_their_input(name):
    # Q(2^n x) = 2^n Q(x), down among the subnormals of float32, where products of floats vanish on CPUs.
    x = np.random.default_rng(0).normal(size=(4, 64)).astype(jnp.bfloat16).astype(np.float32)
    base = fake_quant(x, name).astype(np.float64)
    for n in (POWER_OF_TWO[name], -60, 3, 100):
        scaled = np.ldexp(x, n)
        np.testing.assert_array_equal(fake_quant(scaled, name).astype(np.float64), np.ldexp(base, n))
        np.testing.assert_array_equal(np.asarray(quantize(scaled, name).dequantize(), np.float64), np.ldexp(base, n))


@pytest.mark.parametrize("name", ["e4m3fn@row", "int8@1x16", "nvfp4", "int8@row/bf16", "e2m1fn@1x16/e4m3fn"])
def test_the_smallest_tensors_keep_their_relative_error(name):
    # Down to amax 2^-120: amax / max is a subnormal, which CPUs flush to zero.
    x = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    tiny = np.ldexp(x, -120).astype(np.float64)
    error = np.linalg.norm(fake_quant(tiny, name) - tiny) / np.linalg.norm(tiny)
    if name == "e2m1fn@1x16/e4m3fn":  # whose scales end at 2^-6
        assert error == 1
    else:
        assert error < 0.15
