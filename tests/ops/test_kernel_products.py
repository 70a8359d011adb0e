"""backend="pallas": products and roundings by kernels are those of `emulate`, but for the rounding of sums."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec import recipes
from lowprec.ops import GemmRule, initial_variables, qdot
from lowprec.ops.kernel_rounding import rounded_by_kernel, why_not_rounded
from lowprec.ops.kernels import BLOCKS, CHANNELS, multiply_by_blocks, multiply_by_channels
from lowprec.ops.operand import CONTRACTION, Operand, Streams, quantize_operand
from lowprec.pallas.dispatch import say_once
from lowprec.quantizers import AbsMax, Hadamard, Quantizer

# Of each kind of product and rounding one or two; the others are slow tests.
KINDS = ("fp8", "fp8_block", "int8", "jetfire", "nvfp4", "quartet2")
EVERY = [pytest.param(name, marks=() if name in KINDS else pytest.mark.slow) for name in recipes.names()]


def with_gradients(rule, backend, x, w, key):
    variables = initial_variables(x, w, rule)
    y, vjp = jax.vjp(lambda x, w: qdot(x, w, rule, key=key, variables=variables, backend=backend), x, w)
    return y, *vjp(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape).astype(y.dtype))


@pytest.mark.parametrize("name", EVERY)
def test_every_recipe_is_what_emulation_makes_it(name):
    """33 × 49 × 23: no block divides these axes; operands of float32, which no kernel rotates."""
    rule = recipes.get(name).rule_for("layers/0/mlp/up")
    x, w = jax.random.normal(jax.random.key(0), (33, 49)), 0.1 * jax.random.normal(jax.random.key(1), (49, 23))
    ours, theirs = jax.jit(
        lambda x, w, key: [with_gradients(rule, backend, x, w, key) for backend in ("pallas", "emulate")]
    )(x, w, jax.random.key(2))
    for a, b in zip(ours, theirs, strict=True):
        # The same operands: sums of up to 49 products differ by 49 · 2^-23 of the sum of magnitudes, some 7 times |y|.
        np.testing.assert_allclose(a, b, rtol=0, atol=4e-5 * float(jnp.max(jnp.abs(b))))


def operands(a, b, product="fwd", dtype=jnp.float32, shape=(40, 200, 24)):
    m, k, n = shape
    names = {"fwd": ("fwd.x", "fwd.w"), "dgrad": ("dgrad.dy", "dgrad.w"), "wgrad": ("wgrad.x", "wgrad.dy")}[product]
    shapes = {"fwd": ((m, k), (k, n)), "dgrad": ((m, k), (n, k)), "wgrad": ((k, m), (k, n))}[product]
    return [
        quantize_operand(
            Quantizer(q, pad=True), jax.random.normal(jax.random.key(i), s).astype(dtype), name, Streams(None)
        )
        for i, (q, s, name) in enumerate(zip((a, b), shapes, names, strict=True))
    ]


BY_BLOCKS = {
    "deepseek forward": ("e4m3fn@1x128", "e4m3fn@128x128", "fwd"),
    "deepseek dgrad": ("e5m2@1x128", "e4m3fn@128x128", "dgrad"),
    "deepseek wgrad": ("e4m3fn@1x128", "e4m3fn@1x128", "wgrad"),
    "mxfp8": ("mxfp8", "mxfp8", "fwd"),
    "mxfp4": ("mxfp4", "mxfp4", "fwd"),
    "tiles of int8": ("int8_symmetric@32x32", "int8_symmetric@32x32", "wgrad"),
    "two levels": ("e4m3fn@1x32/e4m3fn.tensor", "e4m3fn@1x32/e4m3fn.tensor", "dgrad"),
}
BY_CHANNELS = {
    "fp8 tensor": ("e4m3fn@tensor", "e4m3fn@tensor", "fwd"),
    "fp8 rows, reused": ("e5m2@row", "e4m3fn@row", "wgrad"),
    "int8 rows": ("int8_symmetric@row", "int8_symmetric@tensor", "dgrad"),
    "four bits": ("e2m1fn@row", "int4_midrise@row", "fwd"),
    "casts": ("e4m3fn", "e5m2", "fwd"),
}


def check_product(product, kernel, pair, impl):
    a, b = operands(*pair)
    assert product.why_not(a, b) is None
    values = [np.moveaxis(np.asarray(v.values, np.float64), v.axis, -1) for v in (a, b)]
    magnitudes = np.abs(values[0]) @ np.abs(values[1]).T
    # Sums of 200 products in float32, in any order: at most 200 · 2^-24 of the sum of magnitudes.
    assert np.max(np.abs(kernel(a, b, impl) - values[0] @ values[1].T) / magnitudes) < 200 * 2.0**-24


@pytest.mark.parametrize("name", BY_BLOCKS)
def test_products_by_blocks_are_those_of_the_values(name):
    check_product(BLOCKS, multiply_by_blocks, BY_BLOCKS[name], "xla")


@pytest.mark.parametrize("name", BY_CHANNELS)
def test_products_by_channels_are_those_of_the_values(name):
    check_product(CHANNELS, multiply_by_channels, BY_CHANNELS[name], "xla")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek forward", "deepseek wgrad", "mxfp8"])
def test_the_kernel_by_blocks_interpreted(name):
    check_product(BLOCKS, multiply_by_blocks, BY_BLOCKS[name], "interpret")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp8 tensor", "int8 rows"])
def test_the_kernel_by_channels_interpreted(name):
    check_product(CHANNELS, multiply_by_channels, BY_CHANNELS[name], "interpret")


ROUNDED = {
    "fp8_block": Quantizer("e4m3fn@1x128", scale=AbsMax(floor=1e-4), pad=True),
    "mxfp8": Quantizer("mxfp8", pad=True),
    "nvfp4": Quantizer("nvfp4", pad=True),
    "nvfp4 stochastic": Quantizer("nvfp4", rounding="stochastic", scale=AbsMax(headroom=17 / 16), pad=True),
    "int8": Quantizer("int8_symmetric@1x32", pad=True),
}


def source(name, dtype):
    """No number among them, zeros and the ends of the range."""
    x = jax.random.normal(jax.random.key(0), (40, 200) if CONTRACTION[name] == -1 else (200, 40)) * 3
    x = x.at[0, :150].set(0).at[3, 5].set(jnp.inf).at[4, 190].set(jnp.nan).at[7, 7].set(1e30).at[8, 8].set(1e-30)
    return x.astype(dtype)


def check_rounding(q, name, dtype, impl):
    x, streams, axis = source(name, dtype), Streams(jax.random.key(1)), CONTRACTION[name]
    key = streams.operand(name) if q.stochastic else None
    assert why_not_rounded(q, x, axis) is None
    found = rounded_by_kernel(q, x, axis, None, key, impl)
    expected = q.round(x.astype(jnp.float32), axis, key)
    for part in (lambda r: r.values, lambda r: r.scale.block, lambda r: r.scale.total()):
        np.testing.assert_array_equal(part(found), part(expected))
    broken = np.isnan(expected.scaled)  # what the elements of such a block are is left open
    np.testing.assert_array_equal(np.where(broken, 0, found.elements), np.where(broken, 0, expected.elements))
    assert found.layout == expected.layout
    assert (found.scale.exponent is None) == (expected.scale.exponent is None)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["fwd.x", "fwd.w"])
@pytest.mark.parametrize("q", ROUNDED)
def test_what_is_rounded_without_a_rotation_is_the_same_bit_for_bit(q, name, dtype):
    if ROUNDED[q].stochastic and name == "fwd.w":
        assert "random bits" in why_not_rounded(ROUNDED[q], source(name, dtype), CONTRACTION[name])
    else:
        check_rounding(ROUNDED[q], name, dtype, "auto")


@pytest.mark.slow
@pytest.mark.parametrize("q", ROUNDED)
def test_the_rounding_kernel_interpreted(q):
    check_rounding(ROUNDED[q], "fwd.x", jnp.bfloat16, "interpret")


@pytest.mark.parametrize("signs", [None, "fixed", "random"])
def test_what_is_rotated_first_differs_by_the_rounding_of_rotated_sums(signs):
    q = Quantizer("nvfp4", Hadamard(16, signs), pad=True)
    x, streams = jax.random.normal(jax.random.key(0), (40, 200)).astype(jnp.bfloat16), Streams(jax.random.key(1))
    ours, theirs = (quantize_operand(q, x, "fwd.x", streams, backend=backend) for backend in ("pallas", "emulate"))
    np.testing.assert_array_equal(ours.source, theirs.source)
    # Halfway between two elements one bit of a sum decides: of 8000 values hardly any.
    assert np.mean(np.asarray(ours.values != theirs.values)) < 1e-3
    np.testing.assert_allclose(ours.error_sums(), theirs.error_sums(), rtol=1e-3)


def test_what_no_kernel_serves_is_said_once(caplog):
    say_once.cache_clear()
    x, w = jnp.ones((16, 32)), jnp.ones((32, 16))
    rule = GemmRule(fwd=(Quantizer("nf4@row"), Quantizer("nf4@row")))
    with caplog.at_level(logging.INFO, "lowprec.pallas"):
        for _ in range(3):
            jax.jit(lambda x: qdot(x, w, rule, backend="pallas"))(x)
    messages = [record.getMessage() for record in caplog.records]
    assert sorted(messages) == sorted(set(messages))
    product = (
        "the product of fwd.x and fwd.w is left to XLA: pallas block_matmul: fwd.x (nf4@row) has no scales by blocks"
    )
    assert any(message.startswith(product) for message in messages)
    assert "the rounding of fwd.x is left to XLA: nf4@row has no blocks of a line" in messages


def test_an_operand_is_an_operand_whoever_rounded_it():
    """Estimators, corrections and error sums see what they see under emulation."""
    rule = recipes.get("quartet2").rule_for("layers/0/mlp/up")
    x = jax.random.normal(jax.random.key(0), (64, 256)).astype(jnp.bfloat16)
    streams = Streams(jax.random.key(1))
    ours, theirs = (
        quantize_operand(rule.dgrad[0], x, "dgrad.dy", streams, backend=backend) for backend in ("pallas", "emulate")
    )
    assert isinstance(ours, Operand)
    # Eden rounds corrected scales at random, by the same bits.
    assert np.mean(np.asarray(ours.rounded.scale.block != theirs.rounded.scale.block)) < 1e-2
    assert np.mean(np.asarray(ours.rounded.elements != theirs.rounded.elements)) < 1e-3
    np.testing.assert_allclose(ours.error_sums(), theirs.error_sums(), rtol=1e-3)
