"""jit, vmap, eager: the same bits. Inputs of other dtypes: refused or exact."""

import jax
import jax.numpy as jnp
import numpy as np
import op_by_op
import pytest
from number_line import DETERMINISTIC, NumberLine

from lowprec import fake_quant, formats, quantize
from lowprec.formats import parse

ELEMENTS = [
    name
    for name in formats.names()
    if not isinstance(parse(name), formats.BlockFormat)
    and not (isinstance(parse(name), formats.IntFormat) and parse(name).bits not in (2, 4, 8, 16))  # the rest are alike
]

ALL_MODES = (*DETERMINISTIC, "stochastic", "stochastic[4B]", "stochastic[4]", "stochastic_equal")
# One of each kind: these have kernels or constants of their own.
ALL_MODES_OF = ("e4m3fn", "e8m0fnu", "bfloat16", "e5m2fnuz", "int8", "int4_midrise", "uint3", "nf4", "binary")


def probes(name):
    fmt = parse(name)
    x = NumberLine(fmt).probes(1024) if fmt.bits <= 16 else np.random.default_rng(0).normal(size=1024)
    return jnp.asarray(x, jnp.float32).reshape(8, 128)


def assert_same_bits(a, b, message=""):
    """Of all but NaN, whose sign and payload mean nothing."""
    a, b = (np.where(np.isnan(y), np.float32(np.nan), y).view(np.uint32) for y in (a, b))
    np.testing.assert_array_equal(a, b, err_msg=message)


@pytest.mark.parametrize("name", [*ELEMENTS, "int4_midrise"])
def test_jit_and_vmap_give_the_bits_of_eager(name):
    x, key = probes(name), jax.random.key(0)
    modes = ALL_MODES if name in ALL_MODES_OF else ("nearest_even",)
    call = jax.jit(lambda x, key: [formats.round_to(x, name, rounding=mode, key=key) for mode in modes])
    expected = [op_by_op.round_to(x, name, rounding=mode, key=key) for mode in modes]
    for mode, y, y_eager in zip(modes, call(x, key), expected, strict=True):
        assert_same_bits(y, y_eager, mode)
    assert_same_bits(formats.round_to(x, name), expected[0])
    assert_same_bits(jax.vmap(lambda x: formats.round_to(x, name))(x), expected[0])
    codes = op_by_op.encode(x, name)
    np.testing.assert_array_equal(jax.jit(lambda x: formats.encode(x, name))(x), codes)
    decode = lambda c: formats.decode(c, name)
    assert_same_bits(jax.jit(decode)(codes), decode(codes))


@pytest.mark.parametrize("name", ["e4m3fn", "bfloat16", "int8", "nf4"])
def test_a_row_of_a_batch_has_the_noise_of_its_own_key(name):
    x = probes(name)
    keys = jax.random.split(jax.random.key(0), len(x))
    call = lambda x, key: formats.round_to(x, name, rounding="stochastic", key=key)
    assert_same_bits(jax.vmap(call)(x, keys), jnp.stack([call(*row) for row in zip(x, keys, strict=True)]))


@pytest.mark.parametrize("function", [formats.round_to, formats.encode])
@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.bool_, np.complex64, jnp.float8_e4m3fn])
def test_other_dtypes_are_refused_by_name(function, dtype):
    with pytest.raises(TypeError, match=f"round float32, bfloat16 and float16, not {jnp.dtype(dtype)}"):
        function(jnp.ones(3, dtype), "e4m3fn")


def test_float64_is_refused_because_it_would_be_rounded_twice():
    with jax.enable_x64(True), pytest.raises(TypeError, match="not float64"):
        formats.round_to(jnp.ones(3, jnp.float64), "e4m3fn")


def test_python_numbers_and_numpy_arrays_are_taken_but_nothing_is_rounded_twice():
    assert formats.round_to(3.3, "e4m3fn") == 3.25
    np.testing.assert_array_equal(formats.round_to(np.array([3.3, -0.1], np.float32), "int4"), [3, 0])
    for function in (formats.round_to, formats.encode, quantize, fake_quant):  # jax would make it float32, unasked
        with pytest.raises(TypeError, match="not float64"):
            function(np.array([3.3, -0.1]), "e4m3fn")
    with pytest.raises(TypeError, match="not int32"):
        formats.round_to(3, "e4m3fn")


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 4), (2, 3, 4)])
@pytest.mark.parametrize("name", ["e4m3fn", "bfloat16", "int4", "nf4"])
def test_any_shape_keeps_its_shape(name, shape):
    x = jnp.full(shape, 0.3, jnp.float32)
    for mode in ("nearest_even", "odd", "stochastic"):
        assert formats.round_to(x, name, rounding=mode, key=jax.random.key(0)).shape == shape
    codes = formats.encode(x, name)
    assert codes.shape == shape and formats.decode(codes, name).shape == shape


@pytest.mark.parametrize(
    "name,dtype",
    [("int4", "uint8"), ("e4m3fn", "uint8"), ("int9", "uint16"), ("bfloat16", "uint16"), ("tf32", "uint32")],
)
def test_codes_have_the_narrowest_unsigned_type(name, dtype):
    assert formats.encode(jnp.ones(3), name).dtype == dtype


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_decode_gives_the_dtype_that_was_asked_for(dtype):
    y = formats.decode(jnp.arange(16, dtype=jnp.uint8), "e2m1fn", dtype)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y.astype(jnp.float32), formats.decode(jnp.arange(16), "e2m1fn"))
