"""Rounding float32 to the values of a code book, and its codes."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from lowprec.formats.rounding import Rounding
from lowprec.formats.types import TableFormat

_COMPARISONS_UP_TO = 32  # below this many values, comparing with each beats a binary search on every backend


def round_table(
    x: Float[Array, "..."], fmt: TableFormat, rounding: Rounding, random: UInt32[Array, "..."] | None = None
) -> Float[Array, "..."]:
    """x rounded to the table, as float32; saturates; NaN stays NaN. Ties to even mean an even code."""
    return jnp.where(jnp.isnan(x), x, decode_table(_nearest_code(x, fmt, rounding, random), fmt))


def encode_table(y: Float[Array, "..."], fmt: TableFormat) -> UInt32[Array, "..."]:
    """The codes of values that are in the table; NaN to the code nearest zero."""
    return _nearest_code(jnp.where(jnp.isnan(y), 0, y), fmt, Rounding(), None)


def decode_table(codes: UInt32[Array, "..."], fmt: TableFormat) -> Float[Array, "..."]:
    if len(fmt.values) > _COMPARISONS_UP_TO:
        return jnp.take(jnp.asarray(fmt.values, jnp.float32), codes.astype(jnp.int32), mode="clip")
    y = jnp.full(codes.shape, fmt.values[0], jnp.float32)
    for code, value in enumerate(fmt.values[1:], 1):
        y = jnp.where(codes >= code, np.float32(value), y)
    return y


def _nearest_code(x, fmt, rounding, random):
    values = np.asarray(fmt.values, np.float32)
    x = jnp.clip(x, values[0], values[-1])
    if rounding.kind in ("nearest_even", "nearest_away", "nearest_zero"):
        return _code_by_midpoints(x, values, rounding.kind)
    lower = _count_reached(x, values[1:])
    table = TableFormat("neighbours", tuple(values.tolist()))
    low, high = decode_table(lower, table), decode_table(jnp.minimum(lower + 1, len(values) - 1), table)
    inexact = x > low
    match rounding.kind:
        case "up":
            up = inexact
        case "down":
            up = jnp.zeros_like(inexact)
        case "away":
            up = inexact & (x > 0)
        case "toward_zero":
            up = inexact & (x < 0)
        case "odd":
            up = inexact & (lower % 2 == 0)
        case "stochastic_equal":
            up = inexact & (random >> 31 == 1)
        case "stochastic":
            fraction = (x - low) / jnp.where(high > low, high - low, 1)
            bits = rounding.random_bits or 24
            uniform = (random >> np.uint32(32 - bits)).astype(jnp.float32) * np.float32(2.0**-bits)
            up = inexact & (uniform < fraction)
    return lower + up.astype(jnp.uint32)


def _code_by_midpoints(x, values, kind):
    """Counts the midpoints that x has passed; what happens at a midpoint depends on the mode."""
    middles = ((values[:-1].astype(np.float64) + values[1:]) / 2).astype(np.float32)
    codes = np.arange(len(middles))
    inclusive = {
        "nearest_even": codes % 2 == 1,  # from an odd code the tie goes up to the even one
        "nearest_away": middles >= 0,
        "nearest_zero": middles < 0,
    }[kind]
    # x reaches a midpoint that counts the tie, and must exceed one that does not: compare with the next float.
    thresholds = np.where(inclusive, middles, np.nextafter(middles, np.float32(np.inf)))
    return _count_reached(x, thresholds)


def _count_reached(x, thresholds):
    if len(thresholds) >= _COMPARISONS_UP_TO:
        return jnp.searchsorted(jnp.asarray(thresholds), x, side="right").astype(jnp.uint32)
    count = jnp.zeros(x.shape, jnp.uint32)
    for threshold in thresholds:
        count = count + (x >= threshold).astype(jnp.uint32)
    return count
