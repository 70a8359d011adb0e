"""Operands rotated and rounded by a kernel of ours, `pallas.rotate_quantize`, in place of XLA."""

import math

import jax
import jax.numpy as jnp

from lowprec.formats.bits import to_bits
from lowprec.formats.blocks import block_layout
from lowprec.formats.elements import decode
from lowprec.formats.packing import unpack
from lowprec.formats.random import Key
from lowprec.formats.scaling import Scale
from lowprec.formats.types import FLOAT32, BlockFormat
from lowprec.pallas.block_rounding import ROTATIONS, BlockRounding
from lowprec.pallas.dispatch import why_not_here
from lowprec.pallas.rotate_quantize import rotate_quantize, why_not_rotate_quantize
from lowprec.quantizers import AbsMax, Quantizer, Rounded
from lowprec.typing import Array, Float


def why_not_rounded(q: Quantizer, x: Float[Array, "..."], axis: int) -> str | None:
    """The reason why no kernel rounds an operand as its quantizer does, or None.

    Args:
      axis: the contraction axis.
    """
    fmt, rotation = q.format, q.rotation
    if not isinstance(fmt, BlockFormat) or not isinstance(fmt.block, tuple) or fmt.block[0] != 1:
        return f"{fmt} has no blocks of a line"
    if not isinstance(q.scale, AbsMax) or q.clamp is not None:
        return f"its scales are those of {q.scale if q.clamp is None else q.clamp}"
    if rotation is not None and (rotation.side == "outer" or rotation.size not in ROTATIONS):
        return f"the rotation {rotation} is not of {', '.join(map(str, ROTATIONS))} along the contraction axis"
    if q.rounding.stochastic and axis % x.ndim != x.ndim - 1:
        return "random bits are counted along the last axis, and the contraction has another one"
    matrix = jax.ShapeDtypeStruct((math.prod(x.shape) // max(x.shape[axis], 1), x.shape[axis]), x.dtype)
    how = BlockRounding(fmt, None if rotation is None else rotation.size, q.scale, q.rounding)
    return why_not_here(why_not_rotate_quantize(matrix, how))


def rounded_by_kernel(
    q: Quantizer,
    x: Float[Array, "..."],
    axis: int,
    signs: Float[Array, " n"] | None,
    key: Key | None,
    impl: str = "auto",
) -> Rounded:
    """x · D · H along an axis, as the quantizer rounds it; not corrected yet.

    Args:
      axis: the contraction axis.
      signs: D, as long as the rotated axis.
      key: for stochastic rounding.
      impl: of the kernel, see `pallas.dispatch.choose`.
    Raises:
      UsageError: (a ValueError) if blocks do not divide the axis and the quantizer does not pad.
    """
    fmt, rotation, shape = q.format, q.rotation, list(x.shape)
    if rotation is not None and q.pad:
        shape[axis] = rotation.padded(shape[axis])
    layout = block_layout(tuple(shape), fmt.block, axis, q.pad)
    lines = jnp.moveaxis(x, axis, -1)
    blocks = rotate_quantize(
        lines.reshape(-1, lines.shape[-1]),
        fmt,
        rotation=None if rotation is None else rotation.size,
        signs=signs,
        rounding=q.rounding,
        key=key,
        rule=q.scale,
        impl=impl,
    )

    def back(v):
        return jnp.moveaxis(v.reshape(*lines.shape[:-1], -1), -1, axis)

    elements = back(_values(blocks.codes, fmt.element, layout.shape[axis]))
    scales = blocks.scales if fmt.scale.format == FLOAT32 else decode(blocks.scales, fmt.scale.format)
    block = layout.broadcast_scale(back(scales))
    exponent = (to_bits(block) >> 23).astype(jnp.int32) - 127 if fmt.scale.power_of_two else None
    scale, elements = Scale(block, exponent, blocks.tensor), layout.split(elements)
    return Rounded(fmt, layout, elements, scale, scale.scaler(fmt.element).multiply(elements))


def _values(codes, element, columns):
    if not jnp.issubdtype(codes.dtype, jnp.unsignedinteger):
        return codes.astype(jnp.float32)
    return decode(unpack(codes, element.bits, columns) if element.bits < 8 else codes, element)
