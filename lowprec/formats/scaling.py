"""Scales: from the statistic of a block to the number that is stored with it.

Two questions are kept apart: which scale a block should have (amax / max, or what another rule asks for), and how
that number is rounded to the scale's own format (`ScaleSpec`). All of it in float32.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from lowprec.errors import UsageError
from lowprec.formats.bits import (
    EXPONENT,
    MAGNITUDE,
    divide,
    from_bits,
    grid_factors,
    off_grid,
    onto_grid,
    pattern,
    power_of_two,
    rescale,
    significand_and_field,
    to_bits,
)
from lowprec.formats.blocks import BlockLayout
from lowprec.formats.floats import round_float
from lowprec.formats.rounding import Rounding
from lowprec.formats.traced import TracedFormat
from lowprec.formats.types import FLOAT32, ElementFormat, FloatFormat, IntFormat, ScaleSpec
from lowprec.typing import Array, Float, Int

_SMALLEST = np.float32(2.0**-126)  # below, 1 / scale would overflow and CPUs flush the scale to zero
_LARGEST = np.finfo(np.float32).max


class Scale(NamedTuple):
    """The scale of each block: value = element · block (· tensor).

    Args:
      block: float32, shaped to broadcast against the split array; exactly the stored numbers.
      exponent: log2 of `block`, int32, when it is a power of two by its format.
      tensor: the second level, a float32 scalar.

    The scale NaN marks a block that holds an infinity or NaN: all its values are NaN.
    """

    block: Float[Array, "..."]
    exponent: Int[Array, "..."] | None = None
    tensor: Float[Array, ""] | None = None

    def divide(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """x / scale: exact for powers of two, else a product with the reciprocal of the scale."""
        return self.scaler().divide(x)

    def multiply(self, elements: Float[Array, "..."]) -> Float[Array, "..."]:
        """elements · scale, the values."""
        return self.scaler().multiply(elements)

    def scaler(self, element: ElementFormat | TracedFormat | None = None) -> "Scaler":
        """Ready to scale many values, which are rounded to `element`."""
        if self.exponent is None:
            inverse = 1 / self.block if self.tensor is None else (1 / self.tensor) / self.block
            levels = [level for level in (self.block, self.tensor) if level is not None]
            return Scaler("product", (inverse,), tuple(levels))
        broken = jnp.isnan(self.block)
        if not ordinary(element):
            return Scaler("exact", (-self.exponent, broken), (self.exponent, broken))
        down, up = grid_factors(self.exponent)
        return Scaler("grid", *(tuple(jnp.where(broken, jnp.nan, f) for f in factors) for factors in (down, up)))

    def total(self) -> Float[Array, "..."]:
        return self.block if self.tensor is None else self.block * self.tensor


@dataclass(frozen=True)
class Scaler:
    """A scale with all that is computed once a block.

    Args:
      kind: how values are scaled: "product": by products; "exact": by powers of two, on bit patterns; "grid": by
        powers of two, as far as rounding to an ordinary format can tell, which is cheaper.
      down, up: the operands of `divide` and of `multiply`, one an entry a block.
    """

    kind: str
    down: tuple[Array, ...]
    up: tuple[Array, ...]

    def settled(self) -> "Scaler":
        """The same, kept from being computed again for every value, as XLA's fusions do."""
        return Scaler(self.kind, *lax.optimization_barrier((self.down, self.up)))

    def divide(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        return self._scaled(x, self.down, onto_grid)

    def multiply(self, elements: Float[Array, "..."]) -> Float[Array, "..."]:
        return self._scaled(elements, self.up, off_grid)

    def _scaled(self, x, operands, by_grid):
        if self.kind == "grid":
            return by_grid(x, operands)
        if self.kind == "exact":
            exponent, broken = operands
            return jnp.where(broken, jnp.nan, rescale(x, exponent))
        for factor in operands:
            x = x * factor
        return x


def ordinary(element: ElementFormat | TracedFormat | None) -> bool:
    """Whether all values lie between 2^-60 and 2^60, far from the ends of float32."""
    if element is None or isinstance(element, TracedFormat):
        return False
    return element.min_subnormal >= 2.0**-60 and max(element.max, -element.min) <= 2.0**60


def block_amax(
    x: Float[Array, "..."],
    layout: BlockLayout,
    spec: ScaleSpec | None = None,
    element: ElementFormat | TracedFormat | None = None,
) -> Float[Array, "..."]:
    """max |x| of each block of a split array; infinity or NaN when the block holds one of them.

    Args:
      spec, element: what the scale is for. Scales that cannot be so small do not tell a block of subnormals, which CPUs
        take for zero, from zeros, and XLA's float maximum is several times faster than the integer one. None: exact.
    """
    # Powers of two end at 2^-127: with a largest element of 2 or more, all subnormal maxima have that scale.
    if spec is not None and (not spec.power_of_two or (ordinary(element) and element.max >= 2)):
        # XLA's maximum on CPUs takes no notice of NaN, but of infinity.
        magnitudes = from_bits(jnp.minimum(to_bits(x) & MAGNITUDE, EXPONENT))
        return jnp.max(magnitudes, axis=layout.members, keepdims=True, initial=0)
    # On bit patterns the order is that of the magnitudes, with NaN above all: nothing is flushed to zero.
    return from_bits(_max_bits(to_bits(x) & MAGNITUDE, axis=layout.members, keepdims=True))


def scale_from_amax(
    amax: Float[Array, "..."],
    element: ElementFormat | TracedFormat,
    spec: ScaleSpec,
    headroom: float = 1.0,
    limit: float | np.float32 | None = None,
) -> Scale:
    """The scale that maps amax to the largest element value.

    A block that holds an infinity or a NaN gets the scale NaN, and no other block notices.

    Args:
      amax: of each block, non-negative.
      headroom: amax maps to max / headroom: above 1 leaves room, below 1 clips.
      limit: of two-level scales: the largest block scale used; the format's maximum when None.
    """
    if spec.power_of_two and headroom == 1.0:
        return _power_of_two_scale(power_of_two_rule(amax, element, spec.rule), amax)
    top = jnp.float32(element.max / headroom)
    bits = to_bits(amax)
    finite = bits < EXPONENT
    # Exactly zero only where amax is: a quotient that a CPU flushes to zero still wants the smallest scale.
    wanted = jnp.where(bits == 0, 0.0, jnp.where(finite, jnp.clip(divide(amax, top), _SMALLEST, _LARGEST), jnp.nan))
    if not spec.per_tensor:
        return store_scale(wanted, spec)
    largest = np.float32(spec.format.max if limit is None else limit)
    return store_scale(wanted, spec, largest, _tensor_scale(bits, largest * top))


def store_scale(
    wanted: Float[Array, "..."],
    spec: ScaleSpec,
    limit: float | np.float32 | None = None,
    tensor: Float[Array, ""] | None = None,
) -> Scale:
    """A wanted scale, rounded to the scale's format; zero becomes 1 (any scale serves a block of zeros), infinity NaN.

    Powers of two: floor, ceil, nearest (in log2) … of the wanted scale itself, whatever the element.

    Args:
      limit: the largest block scale; the format's maximum when None.
      tensor: of two-level scales: the second level; when None it maps the largest wanted scale to `limit`.
    """
    bits = to_bits(wanted)
    if spec.power_of_two:
        return _power_of_two_scale(jnp.where(bits == 0, 0, power_of_two_rule(wanted, None, spec.rule)), wanted)
    largest = np.float32(spec.format.max if limit is None else limit)
    if spec.per_tensor:
        tensor = _tensor_scale(bits, largest) if tensor is None else tensor
        wanted = divide(wanted, tensor)
    # Narrow scales stay at or above the smallest normal number: a subnormal one would itself be inexact.
    lowest = max(spec.format.min_normal, float(_SMALLEST))
    scale = jnp.clip(jnp.where(bits == 0, 1.0, wanted), lowest, largest)
    if spec.format != FLOAT32:
        scale = round_float(scale, spec.format, Rounding())
    return Scale(jnp.where(bits >= EXPONENT, jnp.nan, scale), tensor=tensor if spec.per_tensor else None)


def _tensor_scale(bits, largest):
    """The second level: the largest of finite numbers, given by their bits, over `largest`; 1 where all are zero."""
    top = _max_bits(jnp.where(bits < EXPONENT, bits, np.uint32(0)))
    return jnp.where(top == 0, 1.0, jnp.maximum(divide(from_bits(top), largest), _SMALLEST))


def power_of_two_rule(
    amax: Float[Array, "..."], element: ElementFormat | TracedFormat | None, rule: str
) -> Int[Array, "..."]:
    """The exponent of an e8m0 scale, -127 to 127 (OCP Microscaling 1.0; the rules as torchao names them).

    With amax = 2^E (1 + f) and the largest element 2^e (1 + f_max): floor: E - e (OCP; may clip). ceil: one more when
    f > 0. even: floor, after rounding amax to the element's mantissa. nearest: round(log2(amax / max)).
    rceil: ceil(log2(fl(amax · fl(1 / max)))), as hardware does it. rceil_exact: ceil(log2(amax / max)).

    Args:
      element: None stands for a largest element of 1: the rules then round log2(amax) itself.
    """
    if isinstance(element, TracedFormat):
        if rule in ("nearest", "rceil"):
            raise UsageError(f"the scale rule {rule!r} needs a format that is not traced; rceil_exact does not")
        largest: Any = to_bits(element.max).astype(jnp.int32)
    else:
        largest = int(pattern(1.0 if element is None else element.max))
    top, top_field = (largest & 0x7FFFFF) | 0x800000, largest >> 23
    significand, field = significand_and_field(to_bits(amax))
    floor = field - top_field
    above, below = _significands(rule, top, _mantissa_bits(element, top_field))
    if rule == "rceil":
        # There the product is subnormal: float32 rounds it to a multiple of 2^-149.
        above = jnp.where(floor == -127, np.uint32(_last_without_carry(top, 24)), np.uint32(above))
    return jnp.clip(
        floor + (significand > above).astype(jnp.int32) - (significand < below).astype(jnp.int32), -127, 127
    )


def _significands(rule, top, mantissa_bits):
    """The significands of amax, as integers of 24 bits, above and below which the exponent is not floor's."""
    never = 1 << 24
    match rule:
        case "floor":
            return never, 0
        case "ceil":
            return 1 << 23, 0
        case "even":
            return never - 1 - ((1 << 23) >> (mantissa_bits + 1)), 0
        case "nearest":  # (amax / max)² beyond 2 or ½
            return math.isqrt(2 * top * top), math.isqrt((top * top - 1) // 2) + 1
        case "rceil":
            return _last_without_carry(top, 23), 0
        case "rceil_exact":
            return top, 0


def _last_without_carry(top, half):
    """The largest s whose product with fl(1 / max), rounded to 24 bits (23 if `half` is 24), is the power of two."""
    if top == 1 << 23:
        return top + (half == 24)
    inverse = int(pattern(np.float32(1) / np.float32(top))) & 0x7FFFFF | 0x800000
    return ((1 << 47) + (1 << half)) // inverse


def _max_bits(magnitude, **over):
    """The largest of float32 magnitude bits; 0 of an empty array."""
    return jnp.max(magnitude.astype(jnp.int32), initial=0, **over).astype(jnp.uint32)


def _power_of_two_scale(exponent, amax):
    # An infinity or NaN makes the whole block NaN, as the code 255 of e8m0 does.
    broken = to_bits(amax) >= EXPONENT
    return Scale(jnp.where(broken, jnp.nan, power_of_two(exponent)), exponent)


def _mantissa_bits(element, top_field):
    """Explicit bits of the significand of the largest element."""
    if isinstance(element, TracedFormat):
        return element.mantissa_bits - jnp.maximum(element.min_exponent + 127 - top_field, 0)
    if isinstance(element, FloatFormat):
        return element.mantissa_bits
    return element.bits - 2 if isinstance(element, IntFormat) else 0
