"""Rounding float32 to the values of a code book, and its codes.

Values are compared as integers in the order of float32: comparisons of floats take subnormals for zero on CPUs.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax

from lowprec.formats.bits import EXPONENT, MAGNITUDE, to_bits
from lowprec.formats.closed_forms import select
from lowprec.formats.rounding import Rounding
from lowprec.formats.types import TableFormat
from lowprec.typing import Array, Bool, Float, Int, UInt32

_COMPARISONS_UP_TO = 32  # below this many values, comparing with each beats a binary search on every backend


def round_table(
    x: Float[Array, "..."], fmt: TableFormat, rounding: Rounding, random: UInt32[Array, "..."] | None = None
) -> Float[Array, "..."]:
    """x rounded to the table, as float32; saturates; NaN stays NaN. Ties to even mean an even code."""
    # isnan(x) would let LLVM turn the comparisons below into float ones, which see no subnormals.
    is_nan = (to_bits(x) & MAGNITUDE) > EXPONENT
    return jnp.where(is_nan, x, _look_up(_nearest_index(x, fmt, rounding, random), fmt))


def round_to_codes(
    x: Float[Array, "..."], fmt: TableFormat, rounding: Rounding, random: UInt32[Array, "..."] | None = None
) -> UInt32[Array, "..."]:
    """The codes of what `round_table` gives; of NaN its code, or that of the value nearest zero."""
    is_nan = (to_bits(x) & MAGNITUDE) > EXPONENT
    return jnp.where(is_nan, _code_of_nan(fmt), _code(_nearest_index(x, fmt, rounding, random), fmt))


def encode_table(y: Float[Array, "..."], fmt: TableFormat) -> UInt32[Array, "..."]:
    """The codes of values that are in the table; NaN to its code, or to that of the value nearest zero."""
    return round_to_codes(y, fmt, Rounding())


def _code(index, fmt):
    return (index + np.uint32(fmt.first_code)) & np.uint32((1 << fmt.bits) - 1)


def _code_of_nan(fmt):
    if fmt.nan_code is not None:
        return np.uint32(fmt.nan_code)
    distance = np.abs(fmt.values)
    nearest = _code(np.flatnonzero(distance == distance.min()).astype(np.uint32), fmt)
    return min(nearest, key=lambda code: code % 2)


def decode_table(codes: UInt32[Array, "..."], fmt: TableFormat) -> Float[Array, "..."]:
    index = (codes - np.uint32(fmt.first_code)) & np.uint32((1 << fmt.bits) - 1)
    y = _look_up(index, fmt)
    return y if fmt.nan_code is None else jnp.where(codes == fmt.nan_code, jnp.nan, y)


def _look_up(index, fmt):
    if fmt.closed_form is not None:
        return fmt.closed_form.value(index)
    if len(fmt.values) > _COMPARISONS_UP_TO:
        return jnp.take(jnp.asarray(fmt.values, jnp.float32), index.astype(jnp.int32), mode="clip")
    padding = (0, (1 << fmt.bits) - len(fmt.values))
    return select(index, np.pad(np.asarray(fmt.values, np.float32), padding, mode="edge"))


def _nearest_index(x, fmt, rounding, random):
    values = np.asarray(fmt.values, np.float32)
    place = jnp.clip(_order(x), _order_of(values[0]), _order_of(values[-1]))
    if rounding.kind in ("nearest_even", "nearest_away", "nearest_zero"):
        return _index_by_midpoints(place, fmt, rounding.kind)
    lower = _lower_index(place, fmt)
    low, high = _look_up(lower, fmt), _look_up(jnp.minimum(lower + 1, len(values) - 1), fmt)
    negative = place < 0
    around_zero = (low < 0) & (high > 0)
    up: Array
    match rounding.kind:
        case "up":
            up = jnp.ones_like(negative)
        case "down":
            up = jnp.zeros_like(negative)
        case "away":
            up = ~negative
        case "toward_zero":
            # Between -a and b there is nothing toward zero: the sign stays, as in floats without a zero.
            up = negative ^ around_zero
        case "odd":
            up = (lower + fmt.first_code) % 2 == 0
        case "stochastic_equal":
            up = random >> 31 == 1
        case "stochastic":
            # As for floats δ is the fraction dropped from the magnitude: the way from the neighbour toward zero.
            x, gap = jnp.clip(x, values[0], values[-1]), jnp.where(high > low, high - low, 1)
            if values[0] >= 0:
                up = _moves_away((x - low) / gap, rounding, random)
            else:
                mirrored = negative & ((low >= 0) | (high <= 0))
                up = mirrored ^ _moves_away(jnp.where(mirrored, high - x, x - low) / gap, rounding, random)
    return lower + ((place > _order(low)) & up).astype(jnp.uint32)


def _lower_index(place, fmt):
    if fmt.closed_form is not None:
        return fmt.closed_form.lower(place, _order_of(np.asarray(fmt.values[1:]))).astype(jnp.uint32)
    return _count_reached(place, np.asarray(fmt.values[1:]))


def _moves_away(fraction: Float[Array, "..."], rounding, random) -> Bool[Array, "..."]:
    """True with probability `fraction`, or what few random bits make of it: see `Rounding`."""
    k = rounding.random_bits
    if k is None:
        threshold = jnp.minimum(fraction, np.float32(1 - 2**-24)) * np.float32(2**32)
        return random < threshold.astype(jnp.uint32)
    steps = fraction * np.float32(2**k)
    steps = {"A": jnp.floor(steps), "B": jnp.floor(steps + 0.5), "C": jnp.round(steps)}[rounding.variant]
    return (random >> np.uint32(32 - k)) + steps.astype(jnp.uint32) >= np.uint32(1 << k)


def _index_by_midpoints(place, fmt, kind):
    """Counts the midpoints that x has passed; what happens at a midpoint depends on the mode."""
    values = np.asarray(fmt.values, np.float32)
    halfway = (values[:-1].astype(np.float64) + values[1:]) / 2
    exact = halfway if fmt.midpoints is None else np.asarray(fmt.midpoints)
    middles = exact.astype(np.float32)
    codes = np.arange(len(middles)) + fmt.first_code
    inclusive = {
        "nearest_even": codes % 2 == 1,  # from an odd code the tie goes up to the even one
        "nearest_away": middles >= 0,
        "nearest_zero": middles < 0,
    }[kind]
    # x must reach the first float32 that counts: the midpoint, the one after it, or what lies above one in between.
    beyond = np.where(middles == exact, ~inclusive, middles < exact)
    first = np.where(beyond, np.nextafter(middles, np.float32(np.inf)), middles)
    # A midpoint may be a value itself (a posit never rounds to zero), and values stay.
    first = np.clip(first, np.nextafter(values[:-1], np.float32(np.inf)), values[1:])
    if fmt.closed_form is not None:
        return fmt.closed_form.nearest(place, _order_of(first), kind).astype(jnp.uint32)
    return _count_reached(place, first)


def _count_reached(place: Int[Array, "..."], thresholds: np.ndarray) -> UInt32[Array, "..."]:
    thresholds = _order_of(thresholds)
    if len(thresholds) >= _COMPARISONS_UP_TO:
        return _count_by_prefix(place, thresholds)
    count = jnp.zeros(place.shape, jnp.uint32)
    for threshold in thresholds:
        count = count + (place >= threshold).astype(jnp.uint32)
    return count


def _count_by_prefix(place, thresholds):
    """The leading 16 bits look up how many thresholds lie below their cell; those inside it are compared with."""
    starts = np.arange(-(1 << 15), 1 << 15, dtype=np.int64) << 16
    below = np.searchsorted(thresholds, starts, side="right")
    inside = int(np.max(np.diff(np.append(below, len(thresholds)))))
    padded = np.append(thresholds, np.full(inside, np.iinfo(np.int32).max)).astype(np.int32)
    first = jnp.asarray(below.astype(np.int32))[(place >> 16) + (1 << 15)]
    count = first
    for step in range(inside):
        count = count + (place >= jnp.asarray(padded)[first + step])
    return count.astype(jnp.uint32)


def _order(x: Float[Array, "..."]) -> Int[Array, "..."]:
    """Integers in the order of float32 values, equal for the two zeros."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, -(bits & np.int32(0x7FFFFFFF)), bits)


def _order_of(values: np.ndarray | np.float32) -> np.ndarray:
    bits = np.asarray(values, np.float32).view(np.int32)
    return np.where(bits < 0, -(bits & np.int32(0x7FFFFFFF)), bits)
