"""Rounding float32 to any FloatFormat, and its codes: one integer kernel, exact for every input and mode.

|x| is m · 2^(e - 23) with an integer m < 2^24; a target cell has the quantum 2^(max(e, e_min) - M); the bits of m
below it are dropped: k = (m + increment) >> shift, and k · quantum is the result. Carries into the exponent and
promotions from subnormal to normal need no special case.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from lowprec.formats.bits import (
    EXPONENT,
    MAGNITUDE,
    SIGN,
    exponent_field,
    from_bits,
    greater,
    lesser,
    pattern,
    power_of_two,
    scaled_pattern,
    times_power_of_two,
    to_bits,
)
from lowprec.formats.rounding import Rounding, increment
from lowprec.formats.types import FloatFormat
from lowprec.typing import Array, Bool, Float, Int, UInt32

NAN = EXPONENT | np.uint32(1 << 22)
_ZERO = np.uint32(0)
_FINITE = np.uint32(0x7F7FFFFF)


@dataclass
class Cell:
    """A magnitude rounded to k quanta of its cell, before any limit is applied."""

    k: UInt32[Array, "..."]
    shift: UInt32[Array, "..."]  # bits dropped
    base: Int[Array, "..."]  # exponent field of the unit of m
    binade: Int[Array, "..."]  # binades above the smallest normal one

    def pattern(self, normal: bool) -> UInt32[Array, "..."]:
        """float32 bits of k · quantum.

        Args:
          normal: no quantum is subnormal, so that a product of floats will do.
        """
        if normal:
            exponent = self.base + self.shift.astype(jnp.int32) - 23
            return to_bits(self.k.astype(jnp.int32).astype(jnp.float32) * from_bits(exponent.astype(jnp.uint32) << 23))
        beyond = jnp.maximum(self.shift, 24) - 24  # k is 0 or 1 there, and the quantum lies above the binade of m
        bits = ((self.base + beyond.astype(jnp.int32) - 1).astype(jnp.uint32) << 23) + (self.k << (self.shift - beyond))
        return jnp.where(self.k == 0, _ZERO, bits)


def round_magnitude(
    a: UInt32[Array, "..."],
    *,
    mantissa_bits: int | Int[Array, ""],
    min_exponent: int | Int[Array, "..."],
    subnormals: bool | Bool[Array, "..."],
    rounding: Rounding,
    negative,
    random: UInt32[Array, "..."] | None,
) -> Cell:
    """Rounds the magnitudes of finite float32 patterns; mantissa_bits and min_exponent may be traced."""
    # Only formats whose cells end among float32's subnormals look at the binades of these.
    deep = not isinstance(min_exponent, int) or min_exponent < (-126 if subnormals is True else -125)
    base = jnp.maximum((a >> 23).astype(jnp.int32), 1)
    m = a - ((base - 1).astype(jnp.uint32) << 23)
    field = exponent_field(a) if deep else base
    smallest = min_exponent + 127
    binade = jnp.maximum(field, smallest)
    cell_bits = jnp.where(subnormals | (field >= smallest), mantissa_bits, 0)
    dropped = jnp.maximum(binade - base + (23 - cell_bits), 0).astype(jnp.uint32)
    shift = lesser(dropped, np.uint32(31))
    if rounding.stochastic:
        # Below 2^-8 quanta δ is kept to 31 bits, so that far values round up as rarely as they should.
        beyond = lesser(dropped - shift, np.uint32(31))
        kept = m >> beyond
        if rounding.kind == "stochastic_equal" or rounding.random_bits:
            kept = kept | (kept << beyond != m).astype(jnp.uint32)  # ties and zero are told from what lies above them
        m = kept
    m, plus = increment(rounding, m, shift, negative, random)
    return Cell((m + plus) >> shift, dropped, base, binade - smallest)


class Grid(NamedTuple):
    """What the kernel knows of a format: Python numbers, or arrays for a traced one. Bounds are float32 bits.

    Args:
      mantissa_bits, min_exponent, subnormals: of the cells.
      largest, lowest: magnitudes of the largest and of the lowest value.
      smallest: the least magnitude of a format without a zero, else 0.
      overflow: infinity or NaN, for what lies beyond without saturation; 0 for the bound itself.
      negative_zero: whether zeros keep their sign.
    """

    mantissa_bits: int | Int[Array, "..."]
    min_exponent: int | Int[Array, "..."]
    subnormals: bool | Bool[Array, "..."]
    largest: np.uint32 | UInt32[Array, "..."]
    lowest: np.uint32 | UInt32[Array, "..."]
    smallest: np.uint32
    overflow: np.uint32 | UInt32[Array, "..."]
    negative_zero: bool | Bool[Array, "..."]


def float_grid(fmt: FloatFormat) -> Grid:
    largest = pattern(fmt.max)
    return Grid(
        mantissa_bits=fmt.mantissa_bits,
        min_exponent=fmt.min_exponent,
        subnormals=fmt.subnormals or not fmt.has_zero,
        largest=largest,
        lowest=largest if fmt.signed or not fmt.has_zero else _ZERO,
        smallest=_ZERO if fmt.has_zero else pattern(fmt.min_normal),
        overflow=EXPONENT if fmt.has_inf else _ZERO if fmt.nan == "none" else NAN,
        negative_zero=fmt.negative_zero or not fmt.has_zero,
    )


def round_on_grid(
    x: Float[Array, "..."],
    grid: Grid,
    rounding: Rounding,
    random: UInt32[Array, "..."] | None = None,
    saturate: bool = True,
    exponent: Int[Array, "..."] | None = None,
) -> Float[Array, "..."]:
    """float32 x rounded to the grid times 2^exponent: the one kernel of floats, integers and traced formats.

    Modes that round a finite value back toward the format give the largest value also without saturation. Below a
    lowest value of zero everything is zero. NaN stays NaN.

    Args:
      exponent: of a power-of-two scale, broadcast against x; the grid is scaled rather than x, so no product
        can leave float32's normal range, where CPUs flush to zero.
    """
    u = to_bits(x)
    a, negative = u & MAGNITUDE, u >= SIGN
    scaled = (lambda bound: bound) if exponent is None else (lambda bound: scaled_pattern(bound, exponent))
    limit = jnp.where(negative, scaled(grid.lowest), scaled(grid.largest))
    bounded = lesser(a, limit if saturate else jnp.where(limit == 0, limit, _FINITE))
    cell = round_magnitude(
        greater(bounded, scaled(grid.smallest)),
        mantissa_bits=grid.mantissa_bits,
        min_exponent=grid.min_exponent if exponent is None else grid.min_exponent + exponent,
        subnormals=grid.subnormals,
        rounding=rounding,
        negative=negative,
        random=random,
    )
    y = cell.pattern(normal=isinstance(grid.min_exponent, int) and exponent is None and _quanta_are_normal(grid))
    if not saturate:
        over = ((y > limit) | (a >= EXPONENT)) & (limit != 0)
        back = (a < EXPONENT) & _rounds_back(rounding, negative)
        y = jnp.where(over, jnp.where(back | (grid.overflow == 0), limit, grid.overflow), y)
    sign = jnp.where((y == 0) & ~jnp.bool_(grid.negative_zero), _ZERO, u & SIGN)
    return from_bits(jnp.where(a > EXPONENT, a | NAN, y | sign))


def _quanta_are_normal(grid):
    return grid.min_exponent - grid.mantissa_bits >= -126 and bool(grid.subnormals)


def _rounds_back(rounding, negative):
    """Where a mode never leaves the range of the format."""
    if rounding.kind in ("up", "down"):
        return negative == (rounding.kind == "up")
    return jnp.bool_(rounding.kind == "toward_zero")


def round_float(
    x: Float[Array, "..."],
    fmt: FloatFormat,
    rounding: Rounding,
    random: UInt32[Array, "..."] | None = None,
    saturate: bool = True,
    exponent: Int[Array, "..."] | None = None,
) -> Float[Array, "..."]:
    """float32 x rounded to the values fmt · 2^exponent; see `round_on_grid`.

    Unsigned formats take negative values as zero or, without a zero, zero and negative values as NaN.
    """
    if exponent is None and rounding.kind == "nearest_even" and _magic_addition_is_exact(fmt):
        return _round_nearest_even(x, fmt, saturate)
    y = round_on_grid(x, float_grid(fmt), rounding, random, saturate, exponent)
    if fmt.signed or fmt.has_zero:
        return y
    u = to_bits(x)
    return jnp.where((u >= SIGN) | (u == 0), jnp.nan, y)


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
    grid, u = float_grid(fmt), to_bits(x)
    top = fmt.max if saturate else fmt.max * 2
    a = jnp.minimum(jnp.abs(x), top)  # NaN passes
    binade = greater(to_bits(a) & EXPONENT, pattern(fmt.min_normal))
    magic = from_bits(binade + np.uint32((23 - fmt.mantissa_bits) << 23))
    y = to_bits((a + magic) - magic)
    if not saturate:
        beyond = grid.overflow or grid.largest
        y = jnp.where((y > grid.largest) & ((u & MAGNITUDE) <= EXPONENT), beyond, y)
    sign = u & SIGN if fmt.negative_zero else jnp.where(y == 0, _ZERO, u & SIGN)
    return from_bits(jnp.where((u & MAGNITUDE) > EXPONENT, (u & MAGNITUDE) | NAN, y | sign))


def encode_float(y: Float[Array, "..."], fmt: FloatFormat) -> UInt32[Array, "..."]:
    """The codes of values that lie on the grid already, as uint32; NaN to the canonical NaN, else to zero."""
    u = to_bits(y)
    a = u & MAGNITUDE
    cell = round_magnitude(
        lesser(a, pattern(fmt.max)),
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
        y = jnp.where(magnitude > fmt.max_code + fmt.has_inf, NAN, y)
    if fmt.signed:
        y = y | (((codes >> (fmt.bits - 1)) & 1) << 31)
    if fmt.nan in ("fn", "fnuz"):
        nan = codes if fmt.nan == "fnuz" else magnitude
        y = jnp.where(nan == fmt.nan_code, NAN, y)
    return from_bits(y)
