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


def grid_factors(exponent: Int[Array, "..."]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """What `onto_grid` and `off_grid` multiply by, for -127 <= exponent <= 127.

    Two factors make 2^±exponent: CPUs would flush 2^-127 to zero. The third is for subnormals, in units of 2^-149.
    """
    half = exponent >> 1
    down = power_of_two(-half), power_of_two(half - exponent), power_of_two(jnp.maximum(-149 - exponent, -126))
    up = power_of_two(half), power_of_two(exponent - half), power_of_two(jnp.minimum(exponent + 149, 126))
    return down, up


def onto_grid(x: Float[Array, "..."], down: tuple[Array, ...]) -> Float[Array, "..."]:
    """x · 2^-exponent, as far as rounding to values between 2^-60 and 2^60 can tell; cheaper than `rescale`.

    Exact above 2^-120; what lies below, and is not zero, comes out below 2^-100 and is not zero.
    """
    bits = to_bits(x)
    a = bits & MAGNITUDE
    product = at_least(jnp.abs(x) * down[0] * down[1], np.float32(2.0**-120))
    units = a.astype(jnp.int32).astype(jnp.float32) * down[2]
    return from_bits(to_bits(jnp.where(a < IMPLICIT, units, product)) | (bits & SIGN))


def off_grid(y: Float[Array, "..."], up: tuple[Array, ...]) -> Float[Array, "..."]:
    """y · 2^exponent for zeros and numbers between 2^-60 and 2^60, float32's subnormals included."""
    bits = to_bits(y)
    product, units = jnp.abs(y) * up[0] * up[1], jnp.abs(y) * up[2]
    subnormal = jnp.round(units).astype(jnp.int32).astype(jnp.uint32)
    return from_bits(jnp.where(units < np.float32(2.0**23), subnormal, to_bits(product)) | (bits & SIGN))


def lesser(a: UInt32[Array, "..."], b: UInt32[Array, "..."] | np.uint32) -> UInt32[Array, "..."]:
    """min of numbers below 2^31, as signed ones: the compiler of TPU kernels has no minimum of unsigned ones."""
    return jnp.minimum(a.astype(np.int32), b.astype(np.int32)).astype(jnp.uint32)


def greater(a: UInt32[Array, "..."], b: UInt32[Array, "..."] | np.uint32) -> UInt32[Array, "..."]:
    """max of numbers below 2^31; see `lesser`."""
    return jnp.maximum(a.astype(np.int32), b.astype(np.int32)).astype(jnp.uint32)


def at_least(x: Float[Array, "..."], low: float | int | np.float32) -> Float[Array, "..."]:
    """max(x, low), NaN where x is: XLA's own maximum and minimum on CPUs may take the other argument."""
    return jnp.where(x < low, low, x)


def clip_keeping_nan(x: Float[Array, "..."], low: float, high: float) -> Float[Array, "..."]:
    """x within bounds, NaN where x is."""
    return jnp.where(x > high, high, at_least(x, low))


def divide(x: Float[Array, "..."], y: Float[Array, "..."] | np.float32) -> Float[Array, "..."]:
    """x / y correctly rounded, for finite x. XLA turns a division by a scalar into a product with its reciprocal,
    an ulp away in a third of the cases; it does not where the divisor is an array that it cannot see through. It
    sees through an x that is broadcast: divide first, broadcast then.
    """
    return x / (y + 0 * x)


def carry_to_bfloat16(x: Float[Array, "..."], random: UInt32[Array, "..."]) -> Float[Array, "..."]:
    """x rounded stochastically to bfloat16, as float32; up to infinity, and what is not finite stays.

    The 16 bits that are dropped, plus the 16 high ones of `random`, carry with the right probability.
    """
    bits = to_bits(x)
    carried = (bits + (random >> 16)) & np.uint32(0xFFFF0000)
    return from_bits(jnp.where((bits & MAGNITUDE) < EXPONENT, carried, bits))
