"""What kernels compute on tiles is, bit for bit, what the formats say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec.formats import parse, random_bits
from lowprec.formats.blocks import block_layout
from lowprec.formats.elements import encode_rounded, round_elements, value_table
from lowprec.formats.rounding import parse_rounding
from lowprec.formats.scaling import store_scale
from lowprec.formats.types import ScaleSpec
from lowprec.pallas.tile_math import absmax_scale, divide_rows, element_codes, row_amax, scale_codes, shared_bits
from lowprec.quantizers.scales import AbsMax

ELEMENTS = ("e4m3fn", "e5m2", "e2m1fn", "e3m2fn", "e2m3fn", "int8", "int4", "fx1.6")
SPECIAL = np.array([0.0, -0.0, 1e-45, -1e-45, 1e-38, 1.2e-38, 3.4e38, -3.4e38, np.inf, -np.inf, np.nan], np.float32)
ROUNDINGS = ("nearest_even", "stochastic", "toward_zero", "stochastic[8]", "stochastic_equal")
BLOCKS = (
    *("fp8_block128", "e5m2@1x16", "int8@1x128", "e2m1fn@1x16/e4m3fn", "nvfp4", "int8@1x16/e4m3fn.tensor"),
    *("mxfp8", "mxfp4", "mxfp8_e5m2", "mxint8"),
    *(f"e2m1fn@1x32/e8m0.{rule}" for rule in ("floor", "ceil", "even", "nearest", "rceil", "rceil_exact")),
)


def inputs(element):
    """All values and the midpoints between them, what lies beside these, random bits and special values."""
    values = value_table(element)
    near = np.concatenate([values, (values[1:] + values[:-1]) / 2]).astype(np.float32)
    near = np.concatenate([near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))])
    bits = np.random.default_rng(0).integers(0, 1 << 32, 100_000, dtype=np.uint32)
    ordinary = np.random.default_rng(1).normal(size=20_000).astype(np.float32) * element.max
    return jnp.asarray(np.concatenate([near, bits.view(np.float32), ordinary, SPECIAL, -SPECIAL]))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", ELEMENTS)
def test_element_codes_are_those_of_the_format(name, rounding):
    element, mode = parse(name), parse_rounding(rounding)
    x = inputs(element)
    random = random_bits(jax.random.key(3), x.shape) if mode.stochastic else None
    want = encode_rounded(round_elements(x, element, mode, random), element)
    np.testing.assert_array_equal(element_codes(x, element, mode, random), want)


def special_blocks(group, rows=24):
    """Rows of blocks: ordinary, wide-ranging, tiny, zeros, subnormals, infinities and NaN, the largest numbers."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(rows, group)).astype(np.float32) * np.float32(2.0) ** rng.integers(-120, 120, (rows, 1))
    x[1] *= np.float32(2.0) ** rng.integers(-30, 6, group)
    x[2] = 0
    x[3] = np.float32(1e-40) * rng.normal(size=group)
    x[4] = -0.0
    x[5, 3], x[6, 0], x[7, -1] = np.inf, -np.inf, np.nan
    x[8] = np.finfo(np.float32).max
    x[9] = np.float32(2.0**-126)
    x[10, 1:] = 0
    return jnp.asarray(x)


@pytest.mark.parametrize(
    "rule", [AbsMax(), AbsMax(floor=1e-4), AbsMax(offset=1e-10), AbsMax(headroom=17 / 16)], ids=str
)
@pytest.mark.parametrize("name", BLOCKS)
def test_scales_and_quotients_are_those_of_the_rule(name, rule):
    fmt = parse(name)
    x = special_blocks(fmt.block[1])
    layout = block_layout(x.shape, fmt.block, -1)
    want = rule(layout.split(x), layout, fmt)
    scale = absmax_scale(row_amax(x, fmt, rule), fmt, rule, want.tensor)
    np.testing.assert_array_equal(scale.block, want.block.reshape(-1))
    quotient = want.scaler(fmt.element).divide(layout.split(x)).reshape(x.shape)
    np.testing.assert_array_equal(divide_rows(x, scale, fmt.element), quotient)


@pytest.mark.parametrize("spec", [ScaleSpec(), parse("nvfp4").scale, parse("mxfp4").scale], ids=str)
def test_scale_codes_are_those_of_the_scale_format(spec):
    wanted = jnp.asarray(np.concatenate([np.geomspace(1e-38, 1e38, 5000), SPECIAL[:1], SPECIAL[-3:]]), jnp.float32)
    scale = store_scale(jnp.abs(wanted), spec, tensor=jnp.float32(1) if spec.per_tensor else None)
    want = scale.block if spec.format == parse("float32") else encode_rounded(scale.block, spec.format)
    np.testing.assert_array_equal(scale_codes(scale, spec), want)


def test_shared_bits_are_uniform_in_their_first_eight_and_centred():
    first = jnp.arange(64 * 32, dtype=jnp.uint32).reshape(64, 32)
    bits = np.asarray(shared_bits(jnp.array([1, 2], jnp.uint32), first))
    assert bits.shape == (64, 128) and np.all(bits & 0xFFFFFF == 0x800000)
    # 8192 draws of 256 values: a chi-square of 255 degrees of freedom lies below 380 but once in a million times.
    counts = np.bincount(bits.reshape(-1) >> 24, minlength=256)
    assert np.sum((counts - 32) ** 2 / 32) < 380
