"""The kernels for TPUs: interpreted, they give what the specifications give; and they lower for two kinds of TPU.

Where libtpu is installed its compiler, which knows more limits than the lowering does, makes programs of them too.
"""

import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec.pallas.block_matmul import block_matmul
from lowprec.pallas.channel_matmul import channel_matmul
from lowprec.pallas.rotate_quantize import rotate_quantize
from lowprec.pallas.target import on
from lowprec.pallas.tpu.tiles import Tiles

KINDS = {"TPU v5 lite": "v5e:2x2", "TPU v6 lite": "v6e:2x2"}
E4, E5, I8 = jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.int8
slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)


def interpreted(fn, *args, **kwargs):
    with on("TPU v5 lite"):
        return fn(*args, impl="interpret", **kwargs)


@pytest.fixture
def compiles(monkeypatch):
    """compiles(fn, *args, kind): by the compiler of libtpu, for a TPU that is not there."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    # What libtpu would ask of the machine it runs on.
    monkeypatch.setattr(os, "environ", os.environ | {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"})
    from jax.experimental import topologies

    def compile_(fn, *args, kind):
        device = topologies.get_topology_desc(KINDS[kind], "tpu").devices[0]
        here = jax.sharding.SingleDeviceSharding(device)
        with on(kind):
            lowered = jax.jit(fn, in_shardings=here, out_shardings=here).trace(*args)
            return lowered.lower(lowering_platforms=("tpu",)).compile()

    return compile_


# Block-scaled products.


def operands(m, n, k, group, lines=True, a_dtype=E4, b_dtype=E4):
    rng = np.random.default_rng(0)
    draw = lambda shape, dtype: jnp.asarray(
        rng.integers(-128, 128, shape) if dtype == I8 else rng.standard_normal(shape), dtype
    )
    scale = lambda rows: jnp.asarray(rng.uniform(0.25, 4, (rows, -(-k // group))), jnp.float32)
    return draw((m, k), a_dtype), scale(m), draw((n, k), b_dtype), scale(n if lines else -(-n // 128))


@pytest.mark.parametrize(
    ("shape", "group", "lines", "a_dtype", "b_dtype", "k"),
    [
        ((130, 260, 768), 32, True, E4, E4, 256),  # three steps of K, eight groups each, odd rows and columns
        ((128, 256, 2100), 128, False, E5, E4, 1024),  # a last group that is cut short
        ((40, 130, 300), 128, True, I8, I8, 1024),
    ],
)
def test_block_matmul_sums_scaled_groups(shape, group, lines, a_dtype, b_dtype, k):
    arguments = operands(*shape, group, lines, a_dtype, b_dtype)
    got = interpreted(block_matmul, *arguments, config=Tiles(128, 128, k))
    want = block_matmul(*arguments, impl="xla")
    # Two orders of some thousand float32 sums: 2^-24 · √2100 = 3e-6 of a term, less of the largest sum.
    assert np.abs(got - want).max() <= 1e-6 * np.abs(want).max()


def test_block_matmul_keeps_a_broken_scale_to_its_row():
    a, a_scale, b, b_scale = operands(130, 130, 256, 128)
    y = interpreted(block_matmul, a, a_scale.at[129, 1].set(jnp.nan), b, b_scale, config=Tiles(128, 128, 1024))
    assert np.isnan(y[129]).all() and np.isfinite(y[:129]).all()


BLOCK_MATMULS = [
    (group, lines, a_dtype, b_dtype)
    for group, lines in ((128, False), (128, True), (32, True))
    for a_dtype, b_dtype in ((E4, E4), (E5, E4), (E5, E5), (I8, I8))
]


def block_matmul_arguments(group, lines, a_dtype, b_dtype, shape=(512, 1024, 2048)):
    m, n, k = shape
    struct = jax.ShapeDtypeStruct
    scales = (m, k // group), (n if lines else n // 128, k // group)
    return (
        struct((m, k), a_dtype), struct(scales[0], jnp.float32), struct((n, k), b_dtype), struct(scales[1], jnp.float32)
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("group", "lines", "a_dtype", "b_dtype"), BLOCK_MATMULS)
def test_block_matmul_lowers(lowers, group, lines, a_dtype, b_dtype, kind):
    assert "tpu_custom_call" in lowers(block_matmul, *block_matmul_arguments(group, lines, a_dtype, b_dtype), kind=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("group", "lines", "a_dtype", "b_dtype"), BLOCK_MATMULS)
def test_block_matmul_compiles(compiles, group, lines, a_dtype, b_dtype, kind):
    compiles(block_matmul, *block_matmul_arguments(group, lines, a_dtype, b_dtype), kind=kind)


# Products with a scale a row and column.


def channel_options(m, n, activation, bias, out_scale):
    rng = np.random.default_rng(6)
    draw = lambda *shape: jnp.asarray(rng.uniform(0.5, 2, shape), jnp.float32)
    return {
        "a_scale": draw(m),
        "b_scale": draw(n),
        "bias": draw(n) if bias else None,
        "activation": activation,
        "out_scale": out_scale,
    }


@pytest.mark.parametrize(
    ("dtype", "activation", "bias", "out_dtype", "out_scale"),
    [
        (I8, None, True, jnp.float32, None),
        (E4, "gelu", True, jnp.float32, None),
        slow(E5, "silu", False, jnp.float32, 0.5),
        (E4, "relu", True, E4, 0.25),
        slow(I8, None, False, I8, 3e3),
    ],
)
def test_channel_matmul_finishes_what_it_has_summed(dtype, activation, bias, out_dtype, out_scale):
    """Three steps of K, two tiles either way, cut short."""
    a, _, b, _ = operands(140, 150, 300, 128, a_dtype=dtype, b_dtype=dtype)
    options = channel_options(140, 150, activation, bias, out_scale) | {"out_dtype": out_dtype}
    got = interpreted(channel_matmul, a, b, config=Tiles(128, 128, 128), **options)
    want = channel_matmul(a, b, impl="xla", **options)
    assert got.dtype == want.dtype
    if jnp.dtype(out_dtype).itemsize == 1:
        # Sums in another order, 1e-6 apart, fall on the two sides of a midpoint once in 2^-4 / 1e-6 = 60000 values.
        assert np.mean(np.asarray(got).view(np.uint8) != np.asarray(want).view(np.uint8)) < 1e-3
    else:
        assert np.abs(got - want).max() <= 1e-6 * np.abs(want).max()


CHANNEL_MATMULS = [
    (dtype, activation, out_dtype)
    for dtype in (E4, E5, I8)
    for activation, out_dtype in ((None, jnp.float32), ("gelu", jnp.bfloat16), ("silu", E4), ("relu", I8))
]


def channel_matmul_call(dtype, activation, out_dtype):
    options = channel_options(512, 1024, activation, True, None if out_dtype == jnp.float32 else 0.5)
    a, b = jax.ShapeDtypeStruct((512, 2048), dtype), jax.ShapeDtypeStruct((1024, 2048), dtype)
    return lambda a, b: channel_matmul(a, b, out_dtype=out_dtype, impl="mosaic_tpu", **options), (a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "activation", "out_dtype"), CHANNEL_MATMULS)
def test_channel_matmul_lowers(lowers, dtype, activation, out_dtype, kind):
    call, arguments = channel_matmul_call(dtype, activation, out_dtype)
    assert "tpu_custom_call" in lowers(call, *arguments, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "activation", "out_dtype"), CHANNEL_MATMULS)
def test_channel_matmul_compiles(compiles, dtype, activation, out_dtype, kind):
    call, arguments = channel_matmul_call(dtype, activation, out_dtype)
    compiles(call, *arguments, kind=kind)


# Rotation and quantization.


def exact_sums(rows, columns):
    """bfloat16 multiples of 2^-6 below 2: float32 holds every sum of 128 of them exactly, in any order."""
    return jnp.asarray(np.random.default_rng(0).integers(-127, 128, (rows, columns)) / 64, jnp.bfloat16)


def wide(rows, columns):
    """Magnitudes over many octaves, blocks of zeros, infinity, NaN."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((rows, columns)) * np.exp2(rng.integers(-30, 30, (rows, 1)))
    return with_special_rows(jnp.asarray(x, jnp.bfloat16))


def with_special_rows(x):
    x = x.at[1].set(0).at[2].set(-0.0).at[3, 5].set(jnp.inf).at[4, 40].set(-jnp.inf).at[5, 130].set(jnp.nan)
    return x.at[6, 1:].set(0).at[7].set(jnp.finfo(jnp.bfloat16).max)


def assert_same(got, want):
    for name in ("codes", "scales", "tensor"):
        a, b = getattr(got, name), getattr(want, name)
        assert (a is None) == (b is None)
        if a is not None:
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            bits = lambda v: np.atleast_1d(np.asarray(v)).view(np.uint8)
            np.testing.assert_array_equal(bits(a), bits(b), err_msg=name)


FORMATS = ("fp8_block128", "e5m2@1x32", "mxfp8", "mxfp4", "nvfp4", "int8@1x128", "int8@1x64", "int4@1x32")


@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
@pytest.mark.parametrize(
    "fmt", ["fp8_block128", "mxfp8", "nvfp4", *map(slow, FORMATS[1:2] + FORMATS[3:4] + FORMATS[5:])]
)
def test_quantized_blocks_are_the_reference_s_bit_for_bit(fmt, rounding):
    """Two steps along either axis; the last ones are cut short."""
    x, how = wide(136, 272), {"rounding": rounding, "key": jax.random.key(3)}
    got = interpreted(rotate_quantize, x, fmt, config=Tiles(128, 128, 256), **how)
    assert_same(got, rotate_quantize(x, fmt, impl="xla", **how))


@pytest.mark.parametrize(
    ("fmt", "rotation", "rounding", "noise"),
    [
        ("mxfp4", 32, "stochastic", "shared"),
        ("fp8_block128", 128, "nearest_even", "each"),
        slow("nvfp4", 16, "stochastic", "each"),
        slow("int8@1x64", 64, "nearest_even", "each"),
        slow("mxfp4", 128, "stochastic", "each"),
    ],
)
def test_rotated_blocks_are_the_reference_s_bit_for_bit(fmt, rotation, rounding, noise):
    x = with_special_rows(exact_sums(72, 256))
    signs = jnp.asarray(np.random.default_rng(2).choice([-1.0, 1.0], 256), jnp.float32)
    how = {"rotation": rotation, "signs": signs, "rounding": rounding, "key": jax.random.key(3), "noise": noise}
    got = interpreted(rotate_quantize, x, fmt, config=Tiles(128, 128, 256), **how)
    assert_same(got, rotate_quantize(x, fmt, impl="xla", **how))


def test_other_rotated_values_differ_in_no_more_codes_than_the_order_of_sums_moves():
    """Normal numbers: a sum of 128 moves by 2^-24 · √128 = 7e-7, e4m3's midpoints lie 2^-4 apart: 1e-5 of the codes."""
    x = jnp.asarray(np.random.default_rng(5).standard_normal((128, 256)), jnp.bfloat16)
    got = interpreted(rotate_quantize, x, "fp8_block128", rotation=128)
    want = rotate_quantize(x, "fp8_block128", rotation=128, impl="xla")
    np.testing.assert_allclose(got.scales, want.scales, rtol=1e-6)
    assert np.mean(np.asarray(got.codes).view(np.uint8) != np.asarray(want.codes).view(np.uint8)) < 1e-3


ROTATED = [("fp8_block128", 128, "each"), ("mxfp4", 32, "shared"), ("nvfp4", 16, "each"), ("int8@1x64", 64, "each")]
QUANTIZERS = [(fmt, None, "each") for fmt in FORMATS] + ROTATED


def quantizer(fmt, rotation, noise, rounding):
    """(a function of arrays, their shapes)"""
    signs = jnp.ones(2048) if rotation else None
    tensor = jnp.float32(1) if fmt == "nvfp4" else None

    def call(x, words):
        key = jax.random.wrap_key_data(words, impl="threefry2x32")
        return rotate_quantize(
            x, fmt, rotation=rotation, signs=signs, rounding=rounding, key=key, noise=noise, tensor_scale=tensor
        )

    return call, (jax.ShapeDtypeStruct((512, 2048), jnp.bfloat16), jax.ShapeDtypeStruct((2,), jnp.uint32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
@pytest.mark.parametrize(("fmt", "rotation", "noise"), QUANTIZERS)
def test_rotate_quantize_lowers(lowers, fmt, rotation, noise, rounding, kind):
    call, arguments = quantizer(fmt, rotation, noise if rounding == "stochastic" else "each", rounding)
    assert "tpu_custom_call" in lowers(call, *arguments, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
@pytest.mark.parametrize(("fmt", "rotation", "noise"), QUANTIZERS)
def test_rotate_quantize_compiles(compiles, fmt, rotation, noise, rounding, kind):
    call, arguments = quantizer(fmt, rotation, noise if rounding == "stochastic" else "each", rounding)
    compiles(call, *arguments, kind=kind)


def test_a_call_without_a_kernel_is_left_to_xla(lowers):
    call = lambda x: rotate_quantize(x, "nvfp4", sums=True)
    assert "tpu_custom_call" not in lowers(call, jax.ShapeDtypeStruct((64, 128), jnp.bfloat16), kind="TPU v6 lite")
