"""Rounding float32 to any FloatFormat, and its codes: one integer kernel, exact for every input and mode.

|x| is m · 2^(e - 23) with an integer m < 2^24; a target cell has the quantum 2^(max(e, e_min) - M); the bits of m
below it are dropped: k = (m + increment) >> shift, and k · quantum is the result. Carries into the exponent and
promotions from subnormal to normal need no special case.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from lowprec.formats.bits import (
    EXPONENT,
    MAGNITUDE,
    SIGN,
    exponent_field,
    from_bits,
    pattern,
    power_of_two,
    scaled_pattern,
    times_power_of_two,
    to_bits,
)
from lowprec.formats.rounding import Rounding, increment
from lowprec.formats.types import FloatFormat
from lowprec.typing import Array, Float, Int, UInt32

_ZERO = np.uint32(0)


@dataclass
class Cell:
    """A magnitude rounded to k quanta of its cell, before any limit is applied."""

    k: UInt32[Array, "..."]
    shift: UInt32[Array, "..."]  # bits dropped
    base: Int[Array, "..."]  # exponent field of the unit of m
    binade: Int[Array, "..."]  # binades above the smallest normal one

    def pattern(self) -> UInt32[Array, "..."]:
        """float32 bits of k · quantum."""
        beyond = jnp.maximum(self.shift, 24) - 24  # k is 0 or 1 there, and the quantum lies above the binade of m
        bits = ((self.base + beyond.astype(jnp.int32) - 1).astype(jnp.uint32) << 23) + (self.k << (self.shift - beyond))
        return jnp.where(self.k == 0, _ZERO, bits)


def round_magnitude(
    a: UInt32[Array, "..."],
    *,
    mantissa_bits: int | Int[Array, ""],
    min_exponent: int | Int[Array, "..."],
    subnormals: bool,
    rounding: Rounding,
    negative,
    random: UInt32[Array, "..."] | None,
) -> Cell:
    """Rounds the magnitudes of finite float32 patterns; mantissa_bits and min_exponent may be traced."""
    # Only formats whose cells end among float32's subnormals look at the binades of these.
    deep = not isinstance(min_exponent, int) or min_exponent < (-126 if subnormals else -125)
    base = jnp.maximum((a >> 23).astype(jnp.int32), 1)
    m = a - ((base - 1).astype(jnp.uint32) << 23)
    field = exponent_field(a) if deep else base
    smallest = min_exponent + 127
    binade = jnp.maximum(field - smallest, 0)
    cell_bits = mantissa_bits if subnormals else jnp.where(field >= smallest, mantissa_bits, 0)
    dropped = jnp.maximum(binade + smallest - cell_bits - (base - 23), 0).astype(jnp.uint32)
    shift = jnp.minimum(dropped, 31)
    if rounding.stochastic:
        # Below 2^-8 quanta δ is kept to 31 bits, so that far values round up as rarely as they should.
        beyond = jnp.minimum(dropped - shift, 31)
        kept = m >> beyond
        if rounding.kind == "stochastic_equal" or rounding.random_bits:
            kept = kept | (kept << beyond != m).astype(jnp.uint32)  # ties and zero are told from what lies above them
        m = kept
    m, plus = increment(rounding, m, shift, negative, random)
    return Cell((m + plus) >> shift, dropped, base, binade)


def round_float(
    x: Float[Array, "..."],
    fmt: FloatFormat,
    rounding: Rounding,
    random: UInt32[Array, "..."] | None = None,
    saturate: bool = True,
    exponent: Int[Array, "..."] | None = None,
) -> Float[Array, "..."]:
    """x rounded to the values fmt · 2^exponent, as float32.

    Args:
      x: float32. NaN stays NaN, whatever the format; see `special_values` for infinities and signs.
      exponent: of a power-of-two scale, broadcast against x; the grid is scaled rather than x, so no product
        can leave float32's normal range, where CPUs flush to zero.
    """
    if exponent is None and rounding.kind == "nearest_even" and _magic_addition_is_exact(fmt):
        return _round_nearest_even(x, fmt, saturate)
    u = to_bits(x)
    a, negative = u & MAGNITUDE, (u & SIGN) != 0
    limit = pattern(fmt.max) if exponent is None else scaled_pattern(fmt.max, exponent)
    bounded = jnp.minimum(a, limit if saturate else pattern(float(np.finfo(np.float32).max)))
    if not fmt.has_zero:
        bounded = jnp.maximum(
            bounded, pattern(fmt.min_normal) if exponent is None else scaled_pattern(fmt.min_normal, exponent)
        )
    cell = round_magnitude(
        bounded,
        mantissa_bits=fmt.mantissa_bits,
        min_exponent=fmt.min_exponent if exponent is None else fmt.min_exponent + exponent,
        subnormals=fmt.subnormals or not fmt.has_zero,
        rounding=rounding,
        negative=negative,
        random=random,
    )
    y = cell.pattern()
    if not saturate:
        y = _overflow(y, y > limit, a, negative, limit, fmt, rounding)
    return from_bits(_special_values(y, u, fmt))


def _magic_addition_is_exact(fmt):
    # (a + C) - C rounds to the quantum that C = 2^(e + 23 - M) leaves, as long as a < C; C must be finite and the
    # quantum far enough above float32's subnormals for flushing to zero not to matter.
    return (
        fmt.has_zero
        and fmt.subnormals
        and fmt.signed
        and fmt.mantissa_bits < 23
        and fmt.max_exponent + 24 - fmt.mantissa_bits <= 127
        and fmt.min_exponent - fmt.mantissa_bits >= -124
        and fmt.min_exponent + 23 - fmt.mantissa_bits <= 127
    )


def _round_nearest_even(x, fmt, saturate):
    u = to_bits(x)
    top = fmt.max if saturate else fmt.max * 2
    a = jnp.minimum(jnp.abs(x), top)  # NaN passes
    binade = jnp.maximum(to_bits(a) & EXPONENT, pattern(fmt.min_normal))
    magic = from_bits(binade + np.uint32((23 - fmt.mantissa_bits) << 23))
    y = to_bits((a + magic) - magic)
    if not saturate:
        y = _overflow(y, y > pattern(fmt.max), u & MAGNITUDE, None, pattern(fmt.max), fmt, Rounding())
    return from_bits(_special_values(y, u, fmt))


def _overflow(y, over, a, negative, limit, fmt, rounding):
    """What lies beyond the largest value without saturation: infinity, else NaN, else (no code left) the largest.

    Modes that round a finite value back toward the format keep the largest value.
    """
    beyond = EXPONENT if fmt.has_inf else (EXPONENT | np.uint32(1 << 22) if fmt.nan != "none" else limit)
    finite = a < EXPONENT
    if rounding.kind == "toward_zero":
        back = finite
    elif rounding.kind == "up":
        back = finite & negative
    elif rounding.kind == "down":
        back = finite & ~negative
    else:
        back = False
    return jnp.where(over | ~finite, jnp.where(back, limit, beyond), y)


def _special_values(y, u, fmt):
    """Puts back signs and NaN. Unsigned formats take negative values as zero, or, without a zero, as NaN."""
    a = u & MAGNITUDE
    if fmt.signed:
        sign = u & SIGN
        if not fmt.negative_zero:
            sign = jnp.where(y == 0, _ZERO, sign)
        y = y | sign
    elif fmt.has_zero:
        y = jnp.where(u >= SIGN, _ZERO, y)
    else:
        y = jnp.where((u >= SIGN) | (a == 0), EXPONENT | np.uint32(1 << 22), y)
    return jnp.where(a > EXPONENT, a | np.uint32(1 << 22), y)


def encode_float(y: Float[Array, "..."], fmt: FloatFormat) -> UInt32[Array, "..."]:
    """The codes of values that lie on the grid already, as uint32; NaN to the canonical NaN, else to zero."""
    u = to_bits(y)
    a = u & MAGNITUDE
    cell = round_magnitude(
        jnp.minimum(a, pattern(fmt.max)),
        mantissa_bits=fmt.mantissa_bits,
        min_exponent=fmt.min_exponent,
        subnormals=fmt.subnormals or not fmt.has_zero,
        rounding=Rounding("toward_zero"),
        negative=None,
        random=None,
    )
    # k carries the implicit bit; without a zero the smallest normal number has code 0.
    first = 0 if fmt.has_zero else 1 << fmt.mantissa_bits
    magnitude = (cell.binade << fmt.mantissa_bits).astype(jnp.uint32) + cell.k - np.uint32(first)
    if fmt.inf_code is not None:
        magnitude = jnp.where(a == EXPONENT, np.uint32(fmt.inf_code), magnitude)
    sign_bit = np.uint32(1 << (fmt.bits - 1)) if fmt.signed else _ZERO
    sign = jnp.where((u >= SIGN) & ((magnitude != 0) | fmt.negative_zero | (not fmt.has_zero)), sign_bit, _ZERO)
    nan = np.uint32(0 if fmt.nan_code is None else fmt.nan_code)
    return jnp.where(a > EXPONENT, nan, magnitude | sign)


def decode_float(codes: UInt32[Array, "..."], fmt: FloatFormat) -> Float[Array, "..."]:
    """The float32 values of codes, by arithmetic on their fields."""
    m = fmt.mantissa_bits
    magnitude = codes & np.uint32((1 << (fmt.exponent_bits + m)) - 1)
    field = (magnitude >> m).astype(jnp.int32)
    fraction = magnitude & np.uint32((1 << m) - 1)
    if not fmt.has_zero:
        y = to_bits(power_of_two(field - fmt.bias))
    else:
        unit = jnp.maximum(field, 1) - fmt.bias - m  # the exponent of the fraction's last bit
        significand = fraction + jnp.where(field > 0, np.uint32(1 << m), _ZERO)
        if not fmt.subnormals:
            significand = jnp.where(field > 0, significand, _ZERO)
        y = to_bits(times_power_of_two(significand.astype(jnp.int32).astype(jnp.float32), unit))
    if fmt.inf_code is not None:
        y = jnp.where(magnitude == fmt.inf_code, EXPONENT, y)
    if fmt.nan == "ieee":
        y = jnp.where(magnitude > fmt.max_code + fmt.has_inf, EXPONENT | np.uint32(1 << 22), y)
    if fmt.signed:
        y = y | (((codes >> (fmt.bits - 1)) & 1) << 31)
    if fmt.nan in ("fn", "fnuz"):
        nan = codes if fmt.nan == "fnuz" else magnitude
        y = jnp.where(nan == fmt.nan_code, EXPONENT | np.uint32(1 << 22), y)
    return from_bits(y)
