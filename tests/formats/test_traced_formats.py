"""Formats as arrays: one program for all of them, and the bits of the static formats."""

import jax
import jax.numpy as jnp
import numpy as np
import op_by_op
import pytest
from number_line import NumberLine
from random_formats import inputs

from lowprec import fake_quant, formats
from lowprec.formats import FloatFormat, IntFormat, TracedFormat, parse, rounding, stack_traced, traced

KEY = jax.random.key(5)
TRACEABLE = [
    fmt
    for fmt in map(parse, formats.names())
    if (isinstance(fmt, FloatFormat) and fmt.has_zero) or (isinstance(fmt, IntFormat) and not fmt.midrise)
] + [parse(name) for name in ("fx8.4", "ufx6.8", "e5m10b20fn_unsigned", "e4m2_ieee_nosubnormals", "e3m2_p3109e")]
PROBES = np.concatenate(
    [inputs(fmt, seed=3, size=256) for fmt in TRACEABLE if fmt.bits in (4, 8, 16)]
    + [np.array([0, -0.0, np.inf, -np.inf, np.nan], np.float32)]
)


@pytest.mark.parametrize("mode", [*rounding.KINDS, "stochastic[4]", "stochastic[7A]"])
@pytest.mark.parametrize("saturate", [True, False])
def test_traced_formats_round_as_static_ones(mode, saturate):
    options = {"rounding": mode, "key": KEY, "saturate": saturate}
    sweep = jax.jit(jax.vmap(lambda fmt: formats.round_to(PROBES, fmt, **options)))
    results = np.asarray(sweep(stack_traced(TRACEABLE)))
    for fmt, result in zip(TRACEABLE, results, strict=True):
        expected = op_by_op.round_to(PROBES, fmt, **options)
        number = ~np.isnan(expected)
        np.testing.assert_array_equal(np.isnan(result), ~number, err_msg=str(fmt))
        np.testing.assert_array_equal(
            result.view(np.uint32)[number], expected.view(np.uint32)[number], err_msg=str(fmt)
        )


def test_a_sweep_compiles_once():
    compiled = jax.jit(lambda x, fmt: formats.round_to(x, fmt))
    for name in ("e4m3fn", "e5m2", "int8", "fx8.3", "bfloat16"):
        compiled(PROBES, traced(name))
    assert compiled._cache_size() == 1


SCALES = ["@tensor", "@row", "@1x32/bf16", "@1x16/e4m3fn.tensor", "@16x16"]
POWERS_OF_TWO = [f"@1x32/e8m0.{rule}" for rule in ("floor", "ceil", "even", "rceil_exact")]


@pytest.mark.parametrize("blocks", SCALES + POWERS_OF_TWO)
@pytest.mark.parametrize("mode", ["nearest_even", "away", "odd", "stochastic"])
def test_blocks_of_traced_elements_are_those_of_static_ones(blocks, mode):
    """Also: ordinary static elements are scaled by products, traced ones on a scaled grid, with the same bits."""
    x = jax.random.normal(jax.random.key(1), (32, 64)) * jnp.exp2(jnp.arange(-150.0, 130, 8.8))[:, None]
    names = [element + blocks for element in ("e2m1fn", "e4m3fn", "e5m2", "int4", "int8_symmetric", "fx8.6", "e3m2fn")]
    options = {"rounding": mode, "key": KEY}
    results = jax.jit(jax.vmap(lambda fmt: fake_quant(x, fmt, **options)))(stack_traced(names))
    for name, result in zip(names, results, strict=True):
        expected = np.asarray(fake_quant(x, name, **options)).view(np.uint32)
        np.testing.assert_array_equal(np.asarray(result).view(np.uint32), expected, err_msg=name)


def test_formats_from_numbers_are_those_from_names():
    exponent_bits, mantissa_bits, max = jnp.array([4, 5, 2, 3]), jnp.array([3, 2, 1, 2]), [448.0, 57344.0, 6.0, 28.0]
    made = jax.vmap(formats.traced_float)(exponent_bits, mantissa_bits, None, jnp.array(max))
    y = jax.vmap(lambda fmt: formats.round_to(PROBES, fmt))(made)
    for row, name in zip(y, ("e4m3fn", "e5m2", "e2m1fn", "e3m2fn"), strict=True):
        np.testing.assert_array_equal(row, formats.round_to(PROBES, name))
    whole = formats.traced_float(3, 2)  # every code a number
    assert whole.max == 28 and whole.min == -28
    fixed = jax.vmap(formats.traced_fixed)(jnp.array([8, 4, 16]), jnp.array([4, 0, 9]))
    y = jax.vmap(lambda fmt: formats.round_to(PROBES, fmt))(fixed)
    for row, name in zip(y, ("fx8.4", "int4", "fx16.9"), strict=True):
        np.testing.assert_array_equal(row, formats.round_to(PROBES, name))


def test_the_gradient_passes_straight_through_and_is_clipped():
    x = jnp.array([0.1, 3.0, 500.0])
    gradient = jax.grad(lambda x, fmt, kind: fake_quant(x, fmt, gradient=kind).sum())
    assert gradient(x, traced("e4m3fn"), "ste").tolist() == [1, 1, 1]
    assert gradient(x, traced("e4m3fn"), "clipped").tolist() == [1, 1, 0]


def test_a_search_over_formats_needs_one_program():
    """The use it is for: the narrowest mantissa of each layer whose error is small enough."""
    layers = jax.random.normal(jax.random.key(2), (3, 256)) * jnp.array([[1.0], [10.0], [100.0]])
    widths = jnp.arange(1, 8)

    @jax.jit
    def errors(x):
        round_to = lambda bits: formats.round_to(x, formats.traced_float(5, bits))
        return jax.vmap(lambda bits: jnp.mean((round_to(bits) - x) ** 2) / jnp.mean(x**2))(widths)

    found = jax.vmap(errors)(layers)
    assert np.all(np.diff(np.asarray(found), axis=1) < 0)
    assert NumberLine(parse("e5m1fn")).max == formats.traced_float(5, 1).max


def test_what_cannot_be_traced_says_so():
    for name in ("nf4", "e8m0fnu", "int4_midrise", "posit8"):
        with pytest.raises(ValueError, match="cannot be traced"):
            traced(name)
    with pytest.raises(ValueError, match="same blocks"):
        stack_traced(["mxfp4", "nvfp4"])
    with pytest.raises(ValueError, match="rceil_exact"):
        fake_quant(jnp.ones((2, 32)), traced("e4m3fn@1x32/e8m0.rceil"))
    assert isinstance(traced(traced("e4m3fn")), TracedFormat)
