"""Packed codes: nothing lost at any length, and the order of bits that XLA uses for its own narrow integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lowprec import formats
from lowprec.formats.packing import packed_size

BITS = range(1, 17)
pack = jax.jit(formats.pack, static_argnums=1)
unpack = jax.jit(formats.unpack, static_argnums=(1, 2))


@pytest.mark.parametrize("bits", BITS)
def test_every_length_unpacks_to_what_was_packed(bits):
    random = np.random.default_rng(bits)
    for size in range(18) if bits in (1, 4, 6) else (0, 1, 9, 16):
        codes = random.integers(0, 1 << bits, (2, size)).astype(np.uint16)
        packed = pack(codes, bits)
        assert packed.dtype == jnp.uint8
        assert packed.shape == (2, packed_size(size, bits)) == (2, int(np.ceil(size * bits / 8)))
        np.testing.assert_array_equal(unpack(packed, bits, size), codes)


@pytest.mark.parametrize("bits", BITS)
def test_the_stream_is_little_endian_without_gaps(bits):
    codes = np.random.default_rng(bits).integers(0, 1 << bits, 41)
    number = sum(int(code) << (bits * i) for i, code in enumerate(codes))  # one long integer
    expected = number.to_bytes(packed_size(41, bits), "little")
    assert np.asarray(pack(codes, bits)).tobytes() == expected


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int2", "uint2", "float4_e2m1fn"])
def test_bytes_are_those_of_xla_for_native_narrow_types(dtype):
    native = jnp.dtype(getattr(jnp, dtype))
    fmt = formats.parse("e2m1fn" if dtype.startswith("float") else dtype)
    per_byte = 8 // fmt.bits
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 1 << fmt.bits, 64), jnp.uint8)
    native_values = lax.bitcast_convert_type(pack(codes, fmt.bits), native)
    assert native_values.shape == (64 // per_byte, per_byte)
    np.testing.assert_array_equal(native_values.reshape(-1).astype(jnp.float32), formats.decode(codes, fmt))


def test_packing_is_the_same_under_vmap_and_without_jit():
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 64, (3, 5)), jnp.uint8)
    packed = formats.pack(codes, 6)
    np.testing.assert_array_equal(pack(codes, 6), packed)
    np.testing.assert_array_equal(jax.vmap(lambda c: formats.pack(c, 6))(codes), packed)
    np.testing.assert_array_equal(jax.vmap(lambda p: formats.unpack(p, 6, 5))(packed), codes)


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="9 codes of 4 bits fill 5 bytes, not 4"):
        formats.unpack(jnp.zeros(4, jnp.uint8), 4, 9)
    for bits in (0, 17):
        with pytest.raises(ValueError, match=f"1 to 16 bits, not {bits}"):
            formats.pack(jnp.zeros(4, jnp.uint8), bits)
