"""A matrix quantized along rows and columns at once: the specification, and the kernel against it."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lowprec.errors import UsageError
from lowprec.formats import parse
from lowprec.pallas.block_rounding import BlockRounding
from lowprec.pallas.quantize_config import QuantizeConfig
from lowprec.pallas.quantize_rows_and_columns import (
    quantize_rows_and_columns,
    why_not_quantize_rows_and_columns,
)
from lowprec.quantizers import FIXED_SIGNS, FourOverSix, hadamard, quantize

PAIR = QuantizeConfig(warpgroups=2, stages=2, resident=1)
KEY, COLUMN_KEY = jax.random.split(jax.random.key(11))


def matrix(rows, columns):
    """bfloat16 multiples of 2^-6 below 2, with zeros, infinity, NaN and -0 among them."""
    x = np.random.default_rng(0).integers(-127, 128, (rows, columns)) / 64
    x[:, 3], x[4] = 0.0, -0.0
    x[5, 7], x[9, 1] = np.inf, np.nan
    return jnp.asarray(x, jnp.bfloat16)


def assert_same(got, want):
    for side, other in zip(got, want, strict=True):
        for a, b in zip(jax.tree.leaves(side), jax.tree.leaves(other), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            bits = lambda v: np.atleast_1d(np.asarray(v)).view(np.uint8)
            np.testing.assert_array_equal(bits(a), bits(b))


def test_columns_are_those_of_the_transposed_matrix():
    x = np.random.default_rng(3).normal(size=(192, 5)).astype(np.float32)
    _, columns = quantize_rows_and_columns(jnp.asarray(x), "e4m3fn@1x64", impl="xla")
    blocks = x.T.reshape(5, 3, 64)
    scale = np.abs(blocks).max(-1) / np.float32(448)
    np.testing.assert_array_equal(columns.scales, scale)
    codes = (blocks * (np.float32(1) / scale)[..., None]).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(columns.codes, codes.reshape(5, 192))


@pytest.mark.parametrize("fmt", ["fp8_block128", "int8@1x32", "mxfp8", pytest.param("mxint8", marks=pytest.mark.slow)])
def test_the_specification_is_quantize_along_either_axis(fmt):
    x = matrix(72, 140)
    options = {"rounding": "stochastic", "column_rounding": "stochastic", "key": KEY, "column_key": COLUMN_KEY}
    rows, columns = quantize_rows_and_columns(x, fmt, impl="xla", **options)
    for got, axis, key, last in ((rows, 1, KEY, lambda v: v), (columns, 0, COLUMN_KEY, lambda v: v.T)):
        want = quantize(x, fmt, axis=axis, rounding="stochastic", key=key, pad=True)
        np.testing.assert_array_equal(np.asarray(got.codes).view(np.uint8), last(want.codes))
        np.testing.assert_array_equal(got.scales, last(want.scales))


def test_four_bits_are_packed_along_the_last_axis_of_either_side():
    x = matrix(48, 32)
    rows, columns = quantize_rows_and_columns(x, "nvfp4", rotation=16, signs=jnp.resize(jnp.array(FIXED_SIGNS), 48))
    assert (rows.codes.shape, columns.codes.shape, columns.scales.shape) == ((48, 16), (32, 24), (32, 3))
    rotated = hadamard(x.astype(jnp.float32).T, 16, jnp.resize(jnp.array(FIXED_SIGNS, jnp.float32), 48))
    want = quantize(rotated, "nvfp4")
    np.testing.assert_array_equal(columns.codes, want.codes)
    np.testing.assert_array_equal(columns.scales, want.scales)
    np.testing.assert_array_equal(rows.codes, quantize(x, "nvfp4").codes)


STOCHASTIC = {"rounding": "stochastic", "column_rounding": "stochastic"}
# The kernel, interpreted: two stripes of rows, more tiles than stages, edges that tiles do not divide.
CASES = {
    "fp8": ("fp8_block128", (136, 264), STOCHASTIC),
    "nvfp4 wgrad": ("nvfp4", (144, 264), {"rotation": 16, "signs": 144, "column_rounding": "stochastic"}),
    "mixed": ("int8@1x128", (136, 264), {"column_fmt": "mxfp4", "noise": "shared", "column_rounding": "stochastic"}),
    "fp8 128": ("fp8_block128", (136, 264), {"rotation": 128, "signs": 256, "rounding": "stochastic"}),
    "mxfp8 32": ("mxfp8", (128, 384), {"rotation": 32}),
}
SLOW = ("nvfp4 wgrad", "mixed", "fp8 128", "mxfp8 32")


@pytest.mark.filterwarnings("ignore:invalid value")  # the interpreter multiplies in numpy
@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c in SLOW)) for c in CASES])
def test_the_kernel_gives_the_specified_bits(case):
    fmt, shape, options = CASES[case]
    x = matrix(*shape)
    if "rotation" in options:
        x = x.at[:, 3].set(x[:, 2])  # wgmma has +0 where a sum of nothing but -0 is -0
    call = partial(quantize_rows_and_columns, x, fmt, key=KEY, column_key=COLUMN_KEY, **drawn(options))
    assert_same(call(impl="interpret", config=PAIR), call(impl="xla"))


@pytest.mark.slow
def test_two_pairs_of_warpgroups_agree():
    call = partial(quantize_rows_and_columns, matrix(128, 128 * 7), "fp8_block128", rotation=64)
    assert_same(call(impl="interpret", config=QuantizeConfig(4, 2, 1)), call(impl="xla"))


def drawn(options):
    draw = lambda count: jnp.asarray(np.random.default_rng(4).choice([-1.0, 1.0], count), jnp.float32)
    return {name: draw(value) if name == "signs" else value for name, value in options.items()}


LOWERED = [
    ("fp8_block128", {}),
    ("fp8_block128", STOCHASTIC),
    *[("fp8_block128", dict(rotation=size, signs=256, **STOCHASTIC)) for size in (16, 32, 64, 128)],
    ("nvfp4", {"rotation": 16, "signs": 256, "column_rounding": "stochastic"}),
    ("nvfp4", dict(rotation=128, noise="shared", **STOCHASTIC)),
    ("mxfp8", {}),
    ("mxfp4", dict(rotation=32, signs=256, **STOCHASTIC)),
    ("int8@1x128", STOCHASTIC),
    ("int8@1x128", {"column_fmt": "e5m2@1x128", "rotation": 128}),
]
QUICK = (0, 5, 11)


@pytest.mark.parametrize(
    ("fmt", "options"),
    [pytest.param(*c, marks=[pytest.mark.slow] * (i not in QUICK)) for i, c in enumerate(LOWERED)],
    ids=str,
)
def test_every_configuration_that_is_shipped_lowers(lowers, fmt, options):
    call = partial(quantize_rows_and_columns, fmt=fmt, key=KEY, column_key=COLUMN_KEY, **drawn(options))
    assert "mosaic_gpu" in lowers(call, jnp.zeros((256, 384), jnp.bfloat16))


def test_what_the_kernel_does_not_serve_is_said():
    why = lambda x, rows, columns: why_not_quantize_rows_and_columns(x, rows, columns)["mosaic_gpu"]
    fp8 = BlockRounding(parse("fp8_block128"))
    x = jnp.zeros((256, 256), jnp.bfloat16)
    assert why(x, fp8, fp8) is None
    assert "transposed" in why(x.astype(jnp.float32), fp8, fp8)
    assert "absmax" in why(x, fp8, BlockRounding(parse("nvfp4"), rule=FourOverSix()))
    assert "empty" in why(x[:0], fp8, fp8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"column_rounding": "stochastic", "key": KEY}, "needs a key"),
        ({"rotation": 16, "signs": 64}, "a sign for each of 48"),
        ({"column_fmt": "e4m3fn"}, "1x<g>"),
        ({"tensor_scale": jnp.float32(1)}, "second level"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises(UsageError, match=message):
        quantize_rows_and_columns(matrix(40, 128), "fp8_block128", **drawn(options))
