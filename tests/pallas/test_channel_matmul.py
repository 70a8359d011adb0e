"""Products with scales by channel: the reference against float64, the kernel against it to the bit, its lowering."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lowprec.errors import UsageError
from lowprec.pallas import channel_matmul
from lowprec.pallas.config import BlockMatmulConfig, ChannelMatmulConfig, shipped

slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)
E4, E5, I8 = jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.int8
ACTIVATIONS = {
    None: lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def operands(m, n, k, a_dtype=E4, b_dtype=E4, seed=0):
    """Small integers: every sum over k is exact in float32, whatever its order; scaled rows are a few units wide."""
    rng = np.random.default_rng(seed)
    a, b = (rng.integers(-8, 9, shape).astype(dtype) for shape, dtype in (((m, k), a_dtype), ((n, k), b_dtype)))
    scale = lambda size: rng.uniform(0.5, 2, size).astype(np.float32) * np.float32((24 * k) ** -0.5)
    keywords = {"a_scale": scale(m), "b_scale": scale(n) * 5, "bias": rng.standard_normal(n).astype(np.float32)}
    return (jnp.asarray(a), jnp.asarray(b)), {name: jnp.asarray(v) for name, v in keywords.items()}


def float64(a, b, a_scale, b_scale, bias, activation=None):
    a, b, a_scale, b_scale, bias = (np.asarray(x).astype(np.float64) for x in (a, b, a_scale, b_scale, bias))
    return ACTIVATIONS[activation](a @ b.T * np.outer(a_scale, b_scale) + bias)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("a_dtype", "b_dtype"), [(E4, E5), (I8, I8)])
def test_the_reference_is_the_product_and_what_follows_it(a_dtype, b_dtype, activation):
    matrices, keywords = operands(40, 30, 200, a_dtype, b_dtype)
    y = channel_matmul(*matrices, **keywords, activation=activation, impl="xla")
    np.testing.assert_allclose(y, float64(*matrices, **keywords, activation=activation), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("impl", ["xla", "interpret"])
@pytest.mark.parametrize(
    ("out_dtype", "out_scale"), [(E4, 1.0), slow(E4, 1024.0), slow(E5, 2.0**-6), (E5, 2.0**17), (I8, 4.0)]
)
def test_eight_bits_are_rounded_to_nearest_even_and_saturate(out_dtype, out_scale, impl):
    """All integers from -1024 to 1023, by their digits: ties, subnormals and what lies beyond the range among them."""
    whole = np.arange(-1024, 1024)
    digits = np.stack([whole // 256, whole % 256 // 16, whole % 16], axis=-1)
    matrices = jnp.asarray(digits.astype(E4)), jnp.asarray(np.array([[256, 16, 1]]).astype(E4))
    y = channel_matmul(*matrices, out_dtype=out_dtype, out_scale=out_scale, impl=impl)
    exact = (whole / out_scale)[:, None]
    if out_dtype == I8:
        wanted = np.clip(np.round(exact), -128, 127)
    else:
        top = float(ml_dtypes.finfo(out_dtype).max)
        wanted = np.clip(exact, -top, top).astype(np.float32).astype(out_dtype).astype(np.float64)
    assert (wanted != exact).any()
    np.testing.assert_array_equal(np.asarray(y).astype(np.float64), wanted)


EPILOGUES = [
    ({}, jnp.float32),
    slow({"activation": "relu"}, jnp.bfloat16),
    ({"activation": "gelu", "out_scale": 0.013}, E4),
    slow({"activation": "silu", "out_scale": 0.013}, E5),
    ({"activation": "silu", "out_scale": 0.03}, I8),
]


@pytest.mark.parametrize(("keywords", "out_dtype"), EPILOGUES)
@pytest.mark.parametrize(("a_dtype", "b_dtype"), [(E5, E4), (I8, I8)])
def test_the_kernel_interpreted_agrees_to_the_bit(a_dtype, b_dtype, keywords, out_dtype):
    """Both are compiled: there a product and the sum that follows it may be rounded once."""
    matrices, scales = operands(100, 140, 900, a_dtype, b_dtype)
    run = lambda impl: channel_matmul(*matrices, **scales, **keywords, out_dtype=out_dtype, impl=impl)
    y, wanted = run("interpret"), run("xla")
    assert y.dtype == wanted.dtype == out_dtype
    np.testing.assert_array_equal(np.asarray(y).astype(np.float32), np.asarray(wanted).astype(np.float32))
    assert len(np.unique(np.asarray(y).astype(np.float32))) > 40


CONFIGS = [
    ChannelMatmulConfig(256, 128, 2),
    slow(ChannelMatmulConfig(128, 128, 3)),
    ChannelMatmulConfig(128, 64, 4, epilogue=64),
    slow(ChannelMatmulConfig(64, 128, 4, snake=1)),
    ChannelMatmulConfig(64, 256, 2),
    ChannelMatmulConfig(128, 128, 3, "rows"),
    slow(ChannelMatmulConfig(128, 128, 3, "columns")),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.rows}x{c.columns}-{c.cluster}")
def test_the_kernel_interpreted_agrees_whatever_its_tiles(config):
    """K takes more steps than there are stages, the output more tiles than one; races are detected, memory is NaN."""
    matrices, scales = operands(260, 200, 640)
    y = channel_matmul(*matrices, **scales, impl="interpret", config=config)
    np.testing.assert_array_equal(y, channel_matmul(*matrices, **scales, impl="xla"))


@pytest.mark.parametrize("impl", ["xla", "interpret"])
def test_scales_of_a_tensor_are_those_of_all_its_rows(impl):
    matrices, scales = operands(20, 30, 140)
    y = channel_matmul(*matrices, a_scale=jnp.float32(0.3), b_scale=scales["b_scale"], impl=impl)
    a, b = (np.asarray(x, np.float64) for x in matrices)
    np.testing.assert_allclose(y, a @ b.T * float(np.float32(0.3)) * np.asarray(scales["b_scale"]), rtol=1e-6)


def test_the_reference_is_the_same_inside_and_outside_of_jit():
    matrices, scales = operands(64, 64, 64)
    run = functools.partial(channel_matmul, **scales, impl="xla")
    np.testing.assert_array_equal(run(*matrices), jax.jit(run)(*matrices))


@pytest.mark.parametrize("impl", ["xla", "interpret"])
def test_what_is_not_finite(impl):
    """A NaN is the integer zero and a NaN of fp8; an infinity saturates."""
    matrices, scales = operands(9, 10, 130, E5, E4)
    scales["a_scale"] = scales["a_scale"].at[2].set(jnp.nan).at[3].set(jnp.inf)
    exact = float64(*matrices, **scales)
    assert np.isnan(exact[2]).all() and np.isinf(exact[3]).any()
    for out_dtype, of_nan, top in ((I8, 0, 127), (E4, np.nan, 448), (E5, np.nan, 57344)):
        y = np.asarray(channel_matmul(*matrices, **scales, out_dtype=out_dtype, impl=impl)).astype(np.float64)
        np.testing.assert_array_equal(y[np.isnan(exact)], of_nan)
        np.testing.assert_array_equal(y[exact == np.inf], top)


@pytest.mark.parametrize("shape", [(0, 5, 64), (5, 0, 64), (5, 6, 0)])
@pytest.mark.parametrize("impl", ["xla", "interpret"])
def test_empty_products(shape, impl):
    """Of no k at all what follows the product is still there."""
    matrices = jnp.zeros((shape[0], shape[2]), E4), jnp.zeros((shape[1], shape[2]), E4)
    y = channel_matmul(*matrices, bias=jnp.full(shape[1], 2.0), impl=impl)
    np.testing.assert_array_equal(y, np.full(shape[:2], 2.0))


LOWERED = [(config, dtype) for config in shipped("channel_matmul") for dtype in (E4, I8)]


@pytest.mark.parametrize(
    ("config", "dtype"), LOWERED, ids=[f"{c.rows}x{c.columns}-{c.cluster}-{d.__name__}" for c, d in LOWERED]
)
def test_every_config_lowers(config, dtype, lowers):
    matrices, scales = operands(512, 256, 1024, dtype, dtype)
    keywords = {"out_dtype": jnp.float32} if config.cluster else {"out_dtype": dtype, "out_scale": 0.5}
    run = lambda a, b: channel_matmul(a, b, **scales, **keywords, impl="mosaic_gpu", config=config)
    assert "mosaic_gpu" in lowers(run, *matrices)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, E5])
def test_every_activation_lowers(activation, out_dtype, lowers):
    matrices, scales = operands(100, 100, 100, E5, E4)
    run = lambda a, b: channel_matmul(a, b, **scales, activation=activation, out_dtype=out_dtype)
    assert "mosaic_gpu" in lowers(run, *matrices)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a_scale": jnp.ones(5)}, r"a_scale of shape \(\) or \(4,\), not \(5,\)"),
        ({"b_scale": jnp.ones((6, 1))}, r"b_scale of shape \(\) or \(6,\), not \(6, 1\)"),
        ({"bias": jnp.ones(6, jnp.bfloat16)}, "bias in float32, not bfloat16"),
        ({"out_scale": jnp.ones(4)}, r"out_scale of shape \(\), not \(4,\)"),
        ({"activation": "gelo"}, "unknown activation 'gelo'; did you mean gelu"),
        ({"out_dtype": jnp.uint8}, "writes float32, .*int8, not uint8"),
        ({"config": BlockMatmulConfig()}, "takes a ChannelMatmulConfig, not BlockMatmulConfig"),
        ({"out_dtype": jnp.float16, "impl": "mosaic_gpu"}, "it writes float32, bfloat16 and 8 bits, not float16"),
    ],
)
def test_what_does_not_suit_is_named(changes, message):
    with pytest.raises(UsageError, match=message):
        channel_matmul(jnp.zeros((4, 32), E4), jnp.zeros((6, 32), E4), **changes)
