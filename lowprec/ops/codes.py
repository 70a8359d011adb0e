"""Operands as codes that hardware multiplies: their dtype, and their scale as a factor of the product."""

import jax.numpy as jnp

from lowprec.formats import FloatFormat, IntFormat, element_of
from lowprec.ops.operand import Operand
from lowprec.typing import Array, Float


def native_dtype(fmt) -> jnp.dtype | None:
    """The dtype in which XLA multiplies elements of a format exactly; int8 for narrower integers."""
    element = element_of(fmt)
    if isinstance(element, IntFormat):
        return jnp.dtype(jnp.int8) if whole_numbers(fmt, 8) else None
    if isinstance(element, FloatFormat) and element.dtype in (jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e5m2):
        return element.dtype
    return None


def whole_numbers(fmt, bits: int) -> bool:
    """Whether the elements of a format are signed integers of at most so many bits."""
    element = element_of(fmt)
    whole = isinstance(element, IntFormat) and not element.midrise and element.fraction_bits == 0
    return whole and element.signed and element.bits <= bits


def codes(operand: Operand) -> Float[Array, "..."]:
    """The elements without their scales, in float32 and in the shape of the operand."""
    return operand.rounded.layout.merge(operand.rounded.elements)


def why_scales_stay(operand: Operand) -> str | None:
    """The reason why the scales of an operand are no factor of its product, or None."""
    rounded = operand.rounded
    if rounded is None:
        return f"{operand.name} is not quantized"
    if rounded.residual is not None:
        return f"{operand.name} keeps a part in high precision"
    if rounded.scale is None:
        return None
    # One scale serves the whole contraction axis: the operand was scaled by tensor, or by rows along it.
    if isinstance(rounded.fmt.block, tuple) or rounded.scale.block.shape[operand.axis] != 1:
        return f"the scales of {operand.name} ({rounded.fmt}) vary along the contraction axis"
    return None


def output_scale(operand: Operand, axis: int) -> Float[Array, "..."]:
    """The scale of an operand as a factor of the product: its contraction axis becomes the other operand's axis."""
    scale = operand.rounded.scale
    if scale is None:
        return jnp.float32(1)
    total = scale.total().reshape(operand.rounded.layout.scale_shape)
    return jnp.expand_dims(jnp.squeeze(total, operand.axis), axis)


def dimension_numbers(a: Operand, b: Operand):
    """Of the product of two operands, as `lax.dot_general` takes them."""
    batch = tuple(range(a.source.ndim - 2))
    return ((a.axis % a.source.ndim,), (b.axis % b.source.ndim,)), (batch, batch)
