"""Rounding float32 to integer and fixed-point formats, and their codes."""

import jax.numpy as jnp
import numpy as np

from lowprec.formats.bits import SIGN, clip_keeping_nan, pattern, rescale, to_bits
from lowprec.formats.floats import Grid, round_on_grid
from lowprec.formats.rounding import Rounding
from lowprec.formats.tables import round_table
from lowprec.formats.types import IntFormat, TableFormat
from lowprec.typing import Array, Float, Int, UInt32


def value_list(fmt: IntFormat) -> np.ndarray:
    count = int((fmt.max - fmt.min) / fmt.step) + 1
    return fmt.min + fmt.step * np.arange(count)


def round_int(
    x: Float[Array, "..."],
    fmt: IntFormat,
    rounding: Rounding,
    random: UInt32[Array, "..."] | None = None,
    exponent: Int[Array, "..."] | None = None,
) -> Float[Array, "..."]:
    """x rounded to the values fmt · 2^exponent, as float32. Always saturates: an integer has no code for overflow."""
    if fmt.midrise and exponent is None:
        return _round_midrise(x, fmt, rounding, random)
    if fmt.midrise:
        return rescale(_round_midrise(rescale(x, -exponent), fmt, rounding, random), exponent)
    if rounding.kind == "nearest_even" and exponent is None:
        y = clip_keeping_nan(jnp.round(x * (1 / fmt.step)), fmt.min / fmt.step, fmt.max / fmt.step) * fmt.step
        return jnp.where(y == 0, 0.0, y)  # integers have no negative zero, and XLA drops y + 0.0
    return round_on_grid(x, int_grid(fmt), rounding, random, exponent=exponent)


def int_grid(fmt: IntFormat) -> Grid:
    """Equally spaced values are the subnormals of a float format: one cell, whose quantum is the step."""
    zero = np.uint32(0)
    return Grid(
        mantissa_bits=23,
        min_exponent=23 - fmt.fraction_bits,
        subnormals=True,
        largest=pattern(fmt.max),
        lowest=pattern(-fmt.min) if fmt.min else zero,
        smallest=zero,
        overflow=zero,
        negative_zero=False,
    )


def _round_midrise(x, fmt, rounding, random):
    z = clip_keeping_nan(x * (1 / fmt.step), fmt.min / fmt.step, fmt.max / fmt.step)
    if rounding.kind != "nearest_even":
        return round_table(x, TableFormat(str(fmt), tuple(value_list(fmt).tolist())), rounding, random)
    # Cells are [n, n + 1) with the value n + ½; at an integer the even of the codes n - 1 and n wins.
    u = to_bits(x)
    floor = jnp.where((z == 0) & (u > SIGN), -1.0, jnp.floor(z))  # what a CPU flushed to -0 lies below it
    tie_to_lower = (z == floor) & (floor.astype(jnp.int32) % 2 != 0)
    return (floor + jnp.where(tie_to_lower, -0.5, 0.5)) * fmt.step


def encode_int(y: Float[Array, "..."], fmt: IntFormat) -> UInt32[Array, "..."]:
    """The codes of values on the grid: two's complement in the low bits, as uint32; NaN to zero."""
    code = jnp.floor(jnp.where(jnp.isnan(y), 0, y) * (1 / fmt.step)).astype(jnp.int32)
    return code.astype(jnp.uint32) & np.uint32((1 << fmt.bits) - 1)


def decode_int(codes: UInt32[Array, "..."], fmt: IntFormat) -> Float[Array, "..."]:
    code = codes.astype(jnp.int32)
    if fmt.signed:
        code = (code ^ (1 << (fmt.bits - 1))) - (1 << (fmt.bits - 1))
    return (code.astype(jnp.float32) + 0.5 * fmt.midrise) * fmt.step
