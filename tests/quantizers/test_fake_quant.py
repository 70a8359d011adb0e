"""Fake quantization: its values are those of the format, its gradient is the one that was asked for, unrounded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec import formats
from lowprec.errors import UsageError
from lowprec.formats import parse
from lowprec.quantizers import fake_quant

NAMES = ["e4m3fn", "e5m2", "e2m1fn", "float16", "int8", "nf4", "mxfp8", "nvfp4", "int4@row", "e4m3fn@1x16/bf16"]
X = jax.random.normal(jax.random.key(8), (4, 64))


def pull_back(name, x, cotangent, **options):
    y, vjp = jax.vjp(lambda x: fake_quant(x, name, **options), x)
    return y, vjp(cotangent)[0]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_the_straight_through_cotangent_is_not_touched(name, dtype):
    # A cast to fp8 and back would round it too: 3.3 to 3.25, and 1000 to NaN in e4m3fn.
    x = jnp.linspace(-300, 300, 32, dtype=dtype)
    cotangent = jnp.resize(jnp.array([3.3, 1000.0, -1e-30, 3e38, 0.0, 7.7], dtype), (32,))
    y, gradient = pull_back(name, x, cotangent)
    assert y.dtype == gradient.dtype == dtype
    np.testing.assert_array_equal(gradient, cotangent)
    options = {"rounding": "stochastic", "key": jax.random.key(0)}
    np.testing.assert_array_equal(pull_back(name, x, cotangent, **options)[1], cotangent)


def test_the_rounding_itself_has_no_gradient():
    gradient = jax.grad(lambda x: formats.round_to(x, "e4m3_ieee", rounding="odd").sum())(jnp.linspace(-2, 2, 9))
    np.testing.assert_array_equal(gradient, np.zeros(9))


@pytest.mark.parametrize("name", ["e4m3fn", "e2m1fn", "int8", "int4_symmetric", "uint4", "nf4", "e4m3fn_unsigned"])
def test_the_clipped_gradient_is_zero_outside_the_format(name):
    fmt = parse(name)
    values = formats.value_table(fmt)
    low, high = values[0], values[-1]
    beyond = [low * (1 + 2**-22) if low else -(2.0**-126), high * (1 + 2**-22)]
    x = np.concatenate([np.linspace(2 * low - high, 2 * high - low, 61), [low, high], beyond]).astype(np.float32)
    cotangent = jnp.full(x.shape, 3.3)
    _, gradient = pull_back(name, jnp.asarray(x), cotangent, gradient="clipped")
    np.testing.assert_array_equal(gradient, np.where((x >= low) & (x <= high), np.float32(3.3), 0))


@pytest.mark.parametrize("name", ["e4m3fn@row", "int8@1x16", "nvfp4", "e2m1fn@1x32/e8m0.rceil", "int4@tensor/bf16"])
def test_with_absmax_scales_little_or_nothing_is_clipped(name):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(32, 64)), jnp.float32)
    _, gradient = pull_back(name, x, jnp.ones_like(x), gradient="clipped")
    blocks_with_narrow_scales = name in ("nvfp4", "int4@tensor/bf16")  # which may be rounded down
    assert (gradient == 0).mean() <= (1 / 16 if blocks_with_narrow_scales else 0)


def test_what_the_mx_scale_saturates_is_clipped():
    # floor: amax 7.9 has scale 1 in e2m1, so that 6 < |x| lies outside.
    x = jnp.zeros((1, 32)).at[0, :4].set(jnp.array([7.9, -6.5, 6.0, -5.9]))
    y, gradient = pull_back("mxfp4", x, jnp.ones_like(x), gradient="clipped")
    np.testing.assert_array_equal(gradient[0, :5], [0, 0, 1, 1, 1])
    np.testing.assert_array_equal(y[0, :4], [6, -6, 6, -6])


def test_gradients_flow_under_jit_vmap_and_scan():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 32)), jnp.float32)
    loss = lambda x: (fake_quant(x, "mxfp8") * 3.3).sum()
    expected = np.full((4, 32), np.float32(3.3))
    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(x), expected)
    np.testing.assert_array_equal(jax.vmap(jax.grad(loss))(x), expected)
    scanned = jax.grad(lambda x: jax.lax.scan(lambda total, row: (total + loss(row), None), 0.0, x)[0])(x)
    np.testing.assert_array_equal(scanned, expected)


def test_keys_of_both_kinds_give_the_same_values():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 32)), jnp.float32)
    typed, legacy = (
        fake_quant(x, "nvfp4", rounding="stochastic", key=key) for key in (jax.random.key(5), jax.random.PRNGKey(5))
    )
    np.testing.assert_array_equal(typed, legacy)


def test_what_is_wrong_is_named():
    with pytest.raises(UsageError, match="unknown gradient 'clip'; did you mean clipped"):
        fake_quant(jnp.ones(4), "int8", gradient="clip")
    with pytest.raises(ValueError, match="stochastic rounding needs a key"):
        fake_quant(jnp.ones(4), "int8", rounding="stochastic")
    with pytest.raises(TypeError, match="not int32"):
        fake_quant(jnp.ones(4, jnp.int32), "int8")
    with pytest.raises(ValueError, match="blocks of 32 do not divide axis 0"):
        fake_quant(jnp.ones(4), "mxfp8")


def test_the_cotangent_is_rounded_only_when_a_format_is_given_for_it():
    cotangent = jax.random.normal(jax.random.key(3), X.shape)
    pull = lambda **options: jax.vjp(lambda x: fake_quant(x, "e4m3fn@row", **options), X)[1](cotangent)[0]
    np.testing.assert_array_equal(pull(), cotangent)
    np.testing.assert_array_equal(pull(cotangent="e5m2@tensor"), fake_quant(cotangent, "e5m2@tensor"))
    drawn = lambda key: pull(cotangent="e5m2", cotangent_rounding="stochastic", key=key)
    draws = jax.jit(jax.vmap(drawn))(jax.random.split(jax.random.key(4), 400))
    assert len({float(draw[0, 0]) for draw in draws}) == 2
    step = 2.0 ** (np.floor(np.log2(np.abs(cotangent))) - 2)
    error = np.abs(np.mean(draws, axis=0) - cotangent)
    assert np.all(error < 6 * 0.5 * step / np.sqrt(400))  # Hoeffding: less than 2·exp(-18) an element
    clipped = jax.vjp(lambda x: fake_quant(x, "e4m3fn", gradient="clipped", cotangent="e5m2"), 400 * X)[1](cotangent)[0]
    np.testing.assert_array_equal(clipped, np.where(np.abs(400 * X) <= 448, fake_quant(cotangent, "e5m2"), 0))
    with pytest.raises(ValueError, match="needs a key"):
        fake_quant(X, "e4m3fn", cotangent="e5m2", cotangent_rounding="stochastic")


def test_permuting_blocks_permutes_results():
    x = X.reshape(-1, 64)
    order = np.random.default_rng(0).permutation(x.shape[1] // 32)
    permuted = lambda v: np.asarray(v).reshape(x.shape[0], -1, 32)[:, order].reshape(x.shape)
    for name in ("mxfp4", "e4m3fn@1x32", "int4@1x16/bf16"):
        np.testing.assert_array_equal(fake_quant(permuted(x), name), permuted(fake_quant(x, name)))
