"""Products by kernels of ours: operands brought to the layout of `pallas.block_matmul` and `pallas.channel_matmul`.

On a CPU, which has no kernel, XLA computes their references.
"""

import jax
import jax.numpy as jnp

from lowprec.ops.codes import (
    codes,
    k_major,
    native_dtype,
    output_scale,
    rows_of,
    scaled_output,
    scales_by_blocks,
    why_no_blocks,
    why_scales_stay,
)
from lowprec.ops.multiplier import Multiplier
from lowprec.ops.operand import Operand
from lowprec.pallas.block_matmul import block_matmul, why_not_block_matmul
from lowprec.pallas.channel_matmul import channel_matmul, why_not_channel_matmul
from lowprec.pallas.dispatch import why_not_here
from lowprec.typing import Array, Float

_DTYPES = (jnp.dtype(jnp.int8), jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2))
_GROUPS = (32, 128)
_TILE = 128


def multiply_by_blocks(a: Operand, b: Operand, impl: str = "auto") -> Float[Array, "m n"]:
    """The product of two matrices with scales by blocks of 32 or 128 along the contraction axis.

    Args:
      impl: of the kernel, see `pallas.dispatch.choose`.
    """
    # Tiles are for weights, which stand on the right.
    tiles = b.rounded.fmt.block == (_TILE, _TILE)
    y = block_matmul(_elements(a), scales_by_blocks(a), _elements(b), scales_by_blocks(b, tiles=tiles), impl=impl)
    return scaled_output(y, a, b)


def multiply_by_channels(a: Operand, b: Operand, impl: str = "auto") -> Float[Array, "m n"]:
    """The product of two matrices whose scales do not vary along the contraction axis.

    Args:
      impl: of the kernel, see `pallas.dispatch.choose`.
    """
    scales = {"a_scale": _channels(output_scale(a, -1)), "b_scale": _channels(output_scale(b, -2))}
    return channel_matmul(_elements(a), _elements(b), **scales, impl=impl)


def why_not_by_blocks(a: Operand, b: Operand) -> str | None:
    """The reason why `multiply_by_blocks` does not serve two operands here, or None."""
    reason = _why_no_matrices(a, b, why_no_blocks)
    if reason:
        return reason
    groups = [operand.rounded.fmt.block[1] for operand in (a, b)]
    if groups[0] != groups[1] or groups[0] not in _GROUPS:
        return f"the blocks of {a.name} and {b.name} are of {groups[0]} and {groups[1]}, not both of 32 or of 128"
    return why_not_here(why_not_block_matmul(_static(a), _static(b)))


def why_not_by_channels(a: Operand, b: Operand) -> str | None:
    """The reason why `multiply_by_channels` does not serve two operands here, or None."""
    reason = _why_no_matrices(a, b, why_scales_stay)
    return reason or why_not_here(why_not_channel_matmul(_static(a), _static(b)))


def _why_no_matrices(a, b, why_not):
    if a.source.ndim > 2:
        return "kernels multiply matrices, no batches of them"
    for operand in (a, b):
        reason = why_not(operand)
        if reason:
            return reason
        if native_dtype(operand.rounded.fmt) not in _DTYPES:
            return f"the elements of {operand.name} ({operand.rounded.fmt}) are neither int8 nor fp8"
    if len({jnp.issubdtype(native_dtype(operand.rounded.fmt), jnp.integer) for operand in (a, b)}) > 1:
        return f"one of {a.name} and {b.name} is an integer and the other is not"
    return None


def _elements(operand):
    return k_major(operand, codes(operand)).astype(native_dtype(operand.rounded.fmt))


def _static(operand):
    shape = rows_of(operand), operand.source.shape[operand.axis]
    return jax.ShapeDtypeStruct(shape, native_dtype(operand.rounded.fmt))


def _channels(scale):
    return scale.reshape(()) if scale.size == 1 else scale.reshape(-1)


BLOCKS = Multiplier("pallas block_matmul", multiply_by_blocks, why_not_by_blocks, _DTYPES)
CHANNELS = Multiplier("pallas channel_matmul", multiply_by_channels, why_not_by_channels, _DTYPES)
