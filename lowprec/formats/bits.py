"""Bit patterns of float32: the only door through which this package reads exponents or builds powers of two.

XLA on CPU flushes float32 subnormals in arithmetic, `log2` and `exp2` are wrong at powers of two, and casts to
narrow floats may be elided on GPU. Integer operations have none of these faults.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax

from lowprec.typing import Array, Float, Int, UInt32

SIGN = np.uint32(0x80000000)
MAGNITUDE = np.uint32(0x7FFFFFFF)
EXPONENT = np.uint32(0x7F800000)
IMPLICIT = np.uint32(0x00800000)


def to_bits(x: Float[Array, "..."]) -> UInt32[Array, "..."]:
    return lax.bitcast_convert_type(x, jnp.uint32)


def from_bits(u: UInt32[Array, "..."]) -> Float[Array, "..."]:
    return lax.bitcast_convert_type(u, jnp.float32)


def pattern(value: float | np.float32) -> np.uint32:
    """The bits of a Python number that float32 holds exactly."""
    return np.float32(value).view(np.uint32)


def exponent_field(magnitude: UInt32[Array, "..."]) -> Int[Array, "..."]:
    """floor(log2(a)) + 127 of float32 magnitude bits; at most 0 for subnormals, -23 for zero."""
    field = (magnitude >> 23).astype(jnp.int32)
    return jnp.where(field == 0, 9 - lax.clz(magnitude).astype(jnp.int32), field)


def power_of_two(exponent: Int[Array, "..."]) -> Float[Array, "..."]:
    """2^exponent as float32, exact for -149 <= exponent <= 127."""
    normal = (exponent + 127) << 23
    subnormal = 1 << jnp.maximum(exponent + 149, 0)
    return from_bits(jnp.where(exponent >= -126, normal, subnormal).astype(jnp.uint32))


def scaled_pattern(bits: np.uint32 | UInt32[Array, "..."], exponent: Int[Array, "..."] | int) -> UInt32[Array, "..."]:
    """The bits of value · 2^exponent, value not negative; truncated where the result is subnormal, the largest finite
    number beyond it.
    """
    bits = jnp.asarray(bits)
    significand, field = significand_and_field(bits)
    field = field + exponent
    normal = (field << 23).astype(jnp.uint32) + (significand - IMPLICIT)
    subnormal = significand >> jnp.clip(1 - field, 0, 31).astype(jnp.uint32)
    finite = jnp.where(field >= 1, normal, subnormal)
    return jnp.where(bits == 0, bits, jnp.where(field >= 255, np.uint32(0x7F7FFFFF), finite))


def times_power_of_two(x: Float[Array, "..."], exponent: Int[Array, "..."]) -> Float[Array, "..."]:
    """`rescale` for normal numbers and zeros whose product float32 (with its subnormals) holds exactly: cheaper."""
    bits = to_bits(x)
    a = bits & MAGNITUDE
    field = (a >> 23).astype(jnp.int32) + exponent
    normal = (a & np.uint32(0x7FFFFF)) | (field << 23).astype(jnp.uint32)
    subnormal = ((a & np.uint32(0x7FFFFF)) | IMPLICIT) >> jnp.clip(1 - field, 0, 31).astype(jnp.uint32)
    product = jnp.where(field >= 1, normal, subnormal)
    return from_bits(jnp.where(a == 0, a, product) | (bits & SIGN))


def significand_and_field(magnitude: UInt32[Array, "..."]) -> tuple[UInt32[Array, "..."], Int[Array, "..."]]:
    """(s, field) of magnitude bits: the value is s · 2^(field - 150), and 2^23 <= s < 2^24, or s = 0 for zero."""
    field = exponent_field(magnitude)
    fraction = magnitude & np.uint32(0x7FFFFF)
    return jnp.where(field >= 1, fraction | IMPLICIT, magnitude << jnp.clip(1 - field, 0, 31).astype(jnp.uint32)), field


def rescale(x: Float[Array, "..."], exponent: Int[Array, "..."]) -> Float[Array, "..."]:
    """x · 2^exponent for every float32, subnormals, infinity and NaN included: no arithmetic that could flush them.

    Exact where float32 holds the product; infinity beyond; below, rounded to odd, so that a later rounding to a coarser
    grid gives what the exact product would give.
    """
    bits = to_bits(x)
    a = bits & MAGNITUDE
    significand, field = significand_and_field(a)
    field = field + exponent
    normal = (jnp.minimum(field, 255) << 23).astype(jnp.uint32) + (significand - IMPLICIT)
    dropped = jnp.clip(1 - field, 0, 31).astype(jnp.uint32)
    kept = significand >> dropped
    subnormal = kept | (kept << dropped != significand).astype(jnp.uint32)
    product = jnp.where(field >= 255, EXPONENT, jnp.where(field >= 1, normal, subnormal))
    return from_bits(jnp.where((a == 0) | (a >= EXPONENT), a, product) | (bits & SIGN))


def divide(x: Float[Array, "..."], y: Float[Array, "..."] | np.float32) -> Float[Array, "..."]:
    """x / y correctly rounded, for finite x. XLA turns a division by a scalar into a product with its reciprocal,
    an ulp away in a third of the cases; it does not where the divisor is an array that it cannot see through.
    """
    return x / (y + 0 * x)
