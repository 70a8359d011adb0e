"""Operands as codes that hardware multiplies: their dtype, their scales as factors of the product, their layout."""

import math
from functools import cache

import jax.numpy as jnp
import numpy as np

from lowprec.formats import FloatFormat, IntFormat, element_of, value_table
from lowprec.formats.types import ElementFormat
from lowprec.ops.operand import Operand
from lowprec.typing import Array, Float

_FLOATS = (jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.bfloat16, jnp.float16)


def native_dtype(fmt) -> jnp.dtype | None:
    """The narrowest dtype that XLA multiplies and that has all elements of a format; None: there is none.

    Signed integers of up to 8 bits are int8; other elements e4m3fn, e5m2, bfloat16 or float16.
    """
    if whole_numbers(fmt, 8):
        return jnp.dtype(jnp.int8)
    element = element_of(fmt)
    return next((jnp.dtype(dtype) for dtype in _FLOATS if _holds(jnp.dtype(dtype), element)), None)


def whole_numbers(fmt, bits: int) -> bool:
    """Whether the elements of a format are signed integers of at most so many bits."""
    element = element_of(fmt)
    whole = isinstance(element, IntFormat) and not element.midrise and element.fraction_bits == 0
    return whole and element.signed and element.bits <= bits


def significand_bits(fmt) -> int | None:
    """How many bits the significand of an element has at most; None of formats of which no bfloat16 has all values."""
    element = element_of(fmt)
    if not _holds(jnp.dtype(jnp.bfloat16), element):
        return None
    if isinstance(element, FloatFormat):
        return element.mantissa_bits + 1
    numerators = [abs(float(v).as_integer_ratio()[0]) for v in value_table(element) if v]
    return max((n // (n & -n)).bit_length() for n in numerators)


@cache
def _holds(dtype: jnp.dtype, element: ElementFormat) -> bool:
    """Whether a float dtype has all values of a format, infinities included."""
    if isinstance(element, FloatFormat):
        if element.dtype == dtype:
            return True
        limits = jnp.finfo(dtype)
        fine = element.mantissa_bits <= limits.nmant and element.min_subnormal >= float(limits.smallest_subnormal)
        return fine and element.max <= float(limits.max) and not (element.has_inf and dtype == jnp.float8_e4m3fn)
    if element.bits > 8:
        return False
    values = value_table(element)
    return bool(np.all(values.astype(dtype).astype(np.float64) == values))


def codes(operand: Operand) -> Float[Array, "..."]:
    """The elements without their scales, in float32 and in the shape of the operand."""
    return operand.rounded.layout.merge(operand.rounded.elements)


def why_no_codes(operand: Operand) -> str | None:
    """The reason why the elements of an operand are not all that it is, or None."""
    rounded = operand.rounded
    if rounded is None:
        return f"{operand.name} is not quantized"
    return f"{operand.name} keeps a part in high precision" if rounded.residual is not None else None


def why_scales_stay(operand: Operand) -> str | None:
    """The reason why the scales of an operand are no factor of its product, or None."""
    reason = why_no_codes(operand)
    if reason:
        return reason
    if scales_vary(operand):
        return f"the scales of {operand.name} ({operand.rounded.fmt}) vary along the contraction axis"
    return None


def scales_vary(operand: Operand) -> bool:
    """Whether the block scales vary along the contraction axis; they do not where a tensor has one, or each row."""
    rounded = operand.rounded
    if rounded.scale is None:
        return False
    return isinstance(rounded.fmt.block, tuple) or rounded.scale.block.shape[operand.axis] != 1


def output_scale(operand: Operand, axis: int) -> Float[Array, "..."]:
    """What the scale of an operand leaves as a factor of the product, to whose axis its contraction axis turns.

    All of it but for block scales that vary along the contraction axis.
    """
    scale = None if operand.rounded is None else operand.rounded.scale
    if scale is None:
        return jnp.float32(1)
    if scales_vary(operand):
        return jnp.float32(1) if scale.tensor is None else scale.tensor
    total = scale.total().reshape(operand.rounded.layout.scale_shape)
    return jnp.expand_dims(jnp.squeeze(total, operand.axis), axis)


def scaled_output(y: Float[Array, "..."], a: Operand, b: Operand) -> Float[Array, "..."]:
    """The product of two operands from that of their codes."""
    return y * output_scale(a, -1) * output_scale(b, -2)


def dimension_numbers(a: Operand, b: Operand):
    """Of the product of two operands, as `lax.dot_general` takes them."""
    batch = tuple(range(a.source.ndim - 2))
    return ((a.axis % a.source.ndim,), (b.axis % b.source.ndim,)), (batch, batch)


def rows_of(operand: Operand) -> int:
    """The length of the axis that the product keeps."""
    return operand.source.shape[-3 - operand.axis]


def k_major(operand: Operand, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x, in the shape of an operand, with the contraction axis last."""
    return jnp.moveaxis(x, operand.axis, -1)


def why_no_blocks(operand: Operand) -> str | None:
    """The reason why an operand has no scales by blocks of its contraction axis, or None."""
    reason = why_no_codes(operand)
    if reason:
        return reason
    scale, layout, fmt = operand.rounded.scale, operand.rounded.layout, operand.rounded.fmt
    # Some rules give scales of other shapes than their format says.
    blocks = scale is not None and isinstance(fmt.block, tuple) and scale.block.size == math.prod(layout.scale_shape)
    return None if blocks else f"{operand.name} ({fmt}) has no scales by blocks"


def scales_by_blocks(operand: Operand, *, tiles: bool = False) -> Float[Array, "... lines blocks"]:
    """The scales (…, rows, ⌈K / g⌉) of blocks of g along the contraction axis, without the second level.

    Args:
      tiles: leave those of square tiles by tiles, (…, ⌈rows / g⌉, ⌈K / g⌉), rather than give each row its own.
    """
    rounded = operand.rounded
    scales = k_major(operand, rounded.scale.block.reshape(rounded.layout.scale_shape))
    if tiles or rounded.fmt.block[0] == 1:
        return scales
    return jnp.repeat(scales, rounded.fmt.block[0], axis=-2)[..., : rows_of(operand), :]
