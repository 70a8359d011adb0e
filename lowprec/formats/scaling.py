"""Scales: from the statistic of a block to the number that is stored with it.

Two questions are kept apart: which scale a block should have (amax / max, or what another rule asks for), and how
that number is rounded to the scale's own format (`ScaleSpec`). All of it in float32.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lowprec.formats.bits import (
    EXPONENT,
    MAGNITUDE,
    exponent_field,
    from_bits,
    pattern,
    power_of_two,
    to_bits,
)
from lowprec.formats.blocks import BlockLayout
from lowprec.formats.floats import round_float
from lowprec.formats.rounding import Rounding
from lowprec.formats.types import ElementFormat, FloatFormat, IntFormat, ScaleSpec

_SMALLEST = np.float32(2.0**-126)  # below, 1 / scale would overflow and CPUs flush the scale to zero


class Scale(NamedTuple):
    """The scale of each block: value = element · block (· tensor).

    Args:
      block: float32, shaped to broadcast against the split array; exactly the stored numbers.
      exponent: log2 of `block`, int32, when it is a power of two by its format.
      tensor: the second level, a float32 scalar.
    """

    block: Float[Array, "..."]
    exponent: Int[Array, "..."] | None = None
    tensor: Float[Array, ""] | None = None

    def divide(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """x / scale, as a product with the reciprocal of the scale."""
        inverse = 1 / self.block if self.tensor is None else (1 / self.tensor) / self.block
        return x * inverse

    def multiply(self, elements: Float[Array, "..."]) -> Float[Array, "..."]:
        y = elements * self.block
        return y if self.tensor is None else y * self.tensor

    def total(self) -> Float[Array, "..."]:
        return self.block if self.tensor is None else self.block * self.tensor


def block_amax(x: Float[Array, "..."], layout: BlockLayout) -> Float[Array, "..."]:
    """max |x| of each block of a split array; exact for subnormals; NaN when the block holds one."""
    # On bit patterns the order is that of the magnitudes, with NaN above all: nothing is flushed to zero.
    magnitude = (to_bits(x) & MAGNITUDE).astype(jnp.int32)
    return from_bits(jnp.max(magnitude, axis=layout.members, keepdims=True).astype(jnp.uint32))


def scale_from_amax(
    amax: Float[Array, "..."],
    element: ElementFormat,
    spec: ScaleSpec,
    headroom: float = 1.0,
    limit: float | None = None,
) -> Scale:
    """The scale that maps amax to the largest element value.

    Args:
      amax: of each block, non-negative.
      headroom: amax maps to max / headroom: above 1 leaves room, below 1 clips.
      limit: of two-level scales: the largest block scale used; the format's maximum when None.
    """
    if spec.power_of_two and headroom == 1.0:
        exponent = power_of_two_rule(amax, element, spec.rule)
        return _power_of_two_scale(exponent, amax)
    top = np.float32(element.max / headroom)
    if not spec.per_tensor:
        return store_scale(amax / top, spec)
    largest = np.float32(spec.format.max if limit is None else limit)
    tensor_amax = jnp.max(amax)
    tensor = jnp.where(tensor_amax > 0, jnp.maximum(tensor_amax / (largest * top), _SMALLEST), 1.0)
    return store_scale(amax / top / tensor, spec, largest)._replace(tensor=tensor)


def store_scale(wanted: Float[Array, "..."], spec: ScaleSpec, limit: float | None = None) -> Scale:
    """A wanted scale, rounded to the scale's format; zero becomes 1 (any scale serves a block of zeros).

    Powers of two: floor, ceil and nearest (in log2) of the wanted scale itself, whatever the element.
    """
    if spec.power_of_two:
        exponent = power_of_two_rule(wanted, None, spec.rule)
        return _power_of_two_scale(jnp.where(wanted == 0, 0, exponent), wanted)
    wanted = jnp.where(wanted == 0, 1.0, wanted)
    if spec.format.exponent_bits == 8:
        scale = jnp.maximum(wanted, _SMALLEST)
        return Scale(
            scale if spec.format.mantissa_bits == 23 else round_float(scale, spec.format, Rounding())
        )
    largest = spec.format.max if limit is None else limit
    # Narrow scales stay at or above the smallest normal number: a subnormal one would itself be inexact.
    return Scale(round_float(jnp.clip(wanted, spec.format.min_normal, largest), spec.format, Rounding()))


def power_of_two_rule(
    amax: Float[Array, "..."], element: ElementFormat | None, rule: str
) -> Int[Array, "..."]:
    """The exponent of an e8m0 scale, -127 to 127 (OCP Microscaling 1.0; the rules as torchao names them).

    With amax = 2^E (1 + f) and the largest element 2^e (1 + f_max): floor: E - e (OCP; may clip). ceil: one more when
    f > 0. even: floor, after rounding amax to the element's mantissa. nearest: round(log2(amax / max)).
    rceil: ceil(log2(fl(amax · fl(1 / max)))), as hardware does it. rceil_exact: ceil(log2(amax / max)).

    Args:
      element: None stands for a largest element of 1: the rules then round log2(amax) itself.
    """
    largest = 1.0 if element is None else element.max
    bits = to_bits(amax)
    top_field, top_fraction = int(pattern(largest) >> 23), int(pattern(largest) & 0x7FFFFF)
    fraction = (bits & np.uint32(0x7FFFFF)).astype(jnp.int32)
    floor = exponent_field(bits) - top_field
    match rule:
        case "floor":
            exponent = floor
        case "ceil":
            exponent = floor + (fraction > 0)
        case "even":
            half = np.uint32(1 << (22 - _mantissa_bits(element)))
            exponent = ((bits + half) >> 23).astype(jnp.int32) - top_field
        case "nearest":
            ratio = to_bits(amax / np.float32(largest))
            exponent = (
                exponent_field(ratio) - 127 + ((ratio & np.uint32(0x7FFFFF)) > (pattern(2**0.5) & 0x7FFFFF))
            )
        case "rceil":
            ratio = to_bits(amax * (np.float32(1) / np.float32(largest)))
            field, rest = (ratio >> 23).astype(jnp.int32), (ratio & np.uint32(0x7FFFFF)).astype(jnp.int32)
            exponent = field - 127 + jnp.where(field == 0, rest > 0x400000, rest > 0)
        case "rceil_exact":
            exponent = floor + (fraction > top_fraction)
    return jnp.clip(exponent.astype(jnp.int32), -127, 127)


def _power_of_two_scale(exponent, amax):
    # An infinity or NaN makes the whole block NaN, as the code 255 of e8m0 does.
    broken = to_bits(amax) >= EXPONENT
    return Scale(jnp.where(broken, jnp.nan, power_of_two(exponent)), exponent)


def _mantissa_bits(element):
    if isinstance(element, FloatFormat):
        return element.mantissa_bits
    return element.bits - 2 if isinstance(element, IntFormat) else 0
