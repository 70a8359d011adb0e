"""Learned scales: the step size is a parameter of the model and gets a gradient of its own (LSQ, arXiv 1902.08153)."""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax

from lowprec.errors import UsageError
from lowprec.formats.blocks import BlockLayout, block_layout
from lowprec.formats.elements import round_elements
from lowprec.formats.grammar import parse
from lowprec.formats.rounding import Rounding
from lowprec.formats.scaling import store_scale
from lowprec.formats.types import BlockFormat
from lowprec.quantizers.surrogate import scale_gradient, with_slopes
from lowprec.typing import Array, Bool, Float


def learned_quant(
    x: Float[Array, "..."],
    scale: Float[Array, "..."],
    fmt: str | BlockFormat,
    *,
    axis: int = -1,
    gradient_scale: float | None = None,
) -> Float[Array, "..."]:
    """x rounded to elements · scale, with gradients for both (LSQ, eq. 2 and 3).

    With v = x / scale and q its rounded, clipped value: ∂y/∂x = 1 inside the range and 0 outside; ∂y/∂scale = q - v
    inside, the nearest bound outside, summed over the block and times `gradient_scale`. A scale stored in a narrow
    format is rounded to it in the forward pass; its gradient passes through.

    Args:
      x: any shape.
      scale: positive, float32, an entry a block; `initial_scale` gives the shape and a start.
      fmt: a block format with one level of scales.
      axis: the contraction axis.
      gradient_scale: 1 / sqrt(values a block · largest element) when None (LSQ, §2.2).
    Raises:
      UsageError: (a ValueError) if fmt has no scales or two levels of them, or the shape of `scale` is not theirs.
    """
    fmt, layout = scaled_blocks(x, fmt, axis)
    if scale.shape != layout.scale_shape:
        raise UsageError(f"{fmt} has scales of shape {layout.scale_shape} for {x.shape}, not {scale.shape}")
    if gradient_scale is None:
        gradient_scale = 1 / math.sqrt(x.size / scale.size * fmt.element.max)
    scale = scale_gradient(scale, np.float32(gradient_scale))
    values, _ = step_quant(layout.split(x.astype(jnp.float32)), layout.broadcast_scale(scale), fmt)
    return layout.merge(values).astype(x.dtype)


def step_quant(
    x: Float[Array, "..."], step: Float[Array, "..."], fmt: BlockFormat
) -> tuple[Float[Array, "..."], Bool[Array, "..."]]:
    """Elements · step, with LSQ's slopes for x and step, and where x lies within the range; step broadcasts to x."""
    stored = store_scale(lax.stop_gradient(step), fmt.scale).block
    v = lax.stop_gradient(x) / stored
    inside = (v > fmt.element.min) & (v < fmt.element.max)
    q = round_elements(jnp.clip(v, fmt.element.min, fmt.element.max), fmt.element, Rounding())
    return with_slopes(q * stored, (inside, x), (jnp.where(inside, q - v, q), step)), inside


def initial_scale(x: Float[Array, "..."], fmt: str | BlockFormat, *, axis: int = -1) -> Float[Array, "..."]:
    """2 · mean |x| / sqrt(largest element) of each block (LSQ, §2.1), float32."""
    fmt, layout = scaled_blocks(x, fmt, axis)
    magnitude = jnp.mean(jnp.abs(layout.split(x.astype(jnp.float32))), axis=layout.members, keepdims=True)
    scale = 2 * magnitude / math.sqrt(fmt.element.max)
    return jnp.where(scale > 0, scale, 1).reshape(layout.scale_shape)


def scaled_blocks(x: Float[Array, "..."], fmt: str | BlockFormat, axis: int) -> tuple[BlockFormat, BlockLayout]:
    """A format whose scales may be learned one by one, and its blocks on x."""
    parsed = parse(fmt)
    if not isinstance(parsed, BlockFormat) or parsed.scale.per_tensor:
        raise UsageError(f"{parsed} has no scales that could be learned one by one; say, e.g., int4@row")
    return parsed, block_layout(x.shape, parsed.block, axis)
