"""How the values of a moment are scaled before they are rounded: by the largest of a block, and otherwise.

Blocks run along the last axis; the last one of a row may be shorter, and rows shorter than a block are one. Scales have
the rank of what they scale, so that both are sharded alike. A block of zeros is zeros again; a block with a NaN or an
infinity in it is NaN as a whole. What is subnormal in float32 counts as zero.
"""

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

from lowprec.formats.amax import amax_at, in_units, narrow_scale, place_by_magnitude
from lowprec.formats.blocks import BlockLayout, block_layout
from lowprec.typing import Array, Float

Arrays = tuple[Array, ...]

_LANES = 8  # XLA on CPUs vectorizes no maximum of integers along the last axis: so many side by side, then those


@runtime_checkable
class Scales(Protocol):
    @property
    def by_rows(self) -> bool:
        """Whether the rows of an array (along axis 0, of two axes or more) are scaled one by one."""

    def measure(self, x: Float[Array, "..."]) -> Arrays:
        """What is stored beside the codes of a float32 x, which has an axis at least."""

    def down(self, x: Float[Array, "..."], stored: Arrays, largest: float) -> Float[Array, "..."]:
        """x as elements, the largest magnitude of them `largest`."""

    def up(self, elements: Float[Array, "..."], stored: Arrays, largest: float) -> Float[Array, "..."]:
        """The inverse of `down`."""

    def zeros(self, shape: tuple[int, ...]) -> Arrays:
        """Of an array of zeros."""


@dataclass(frozen=True)
class AbsMax:
    """By the largest magnitude of a block: element = x · largest / s.

    Args:
      block: members, along the last axis.
      dtype: of the scales.
      signed: give the scale the sign of its element, so that this element is coded as 1 exactly, where a code book
        has 1 and not -1.
      root: scale and store the root of the values, none of which is negative.
    """

    block: int
    dtype: str = "float32"
    signed: bool = False
    root: bool = False

    by_rows = True

    def measure(self, x):
        layout = _layout(x.shape, self.block)
        scale = _largest(layout.split(x), layout.members, self.signed).reshape(layout.scale_shape)
        return (narrow_scale(_as_root(scale, self.root), self.dtype),)

    def down(self, x, stored, largest):
        layout = _layout(x.shape, self.block)
        scale = layout.broadcast_scale(stored[0].astype(jnp.float32))
        return layout.merge(in_units(layout.split(_as_root(x, self.root)), scale) * np.float32(largest))

    def up(self, elements, stored, largest):
        layout = _layout(elements.shape, self.block)
        scale = layout.broadcast_scale(stored[0].astype(jnp.float32) * np.float32(1 / largest))
        x = layout.merge(layout.split(elements) * scale)
        return x * x if self.root else x

    def zeros(self, shape):
        return (jnp.zeros(_layout(shape, self.block).scale_shape, self.dtype),)

    def of_block(self, block: int) -> "AbsMax":
        return replace(self, block=block)


@dataclass(frozen=True)
class Rank1:
    """By the least of the largest magnitudes of the lines through a value (rank-1: Li et al., arXiv 2309.01507).

    s[i, j] = min(max_j |x[i, :]|, max_i |x[:, j]|), and so for more axes. m + n numbers for m · n values.

    Args:
      of_lines: for arrays of one axis, which are scaled in blocks; its dtype and root hold for all.
    """

    of_lines: AbsMax

    by_rows = False

    def measure(self, x):
        if x.ndim == 1:
            return self.of_lines.measure(x)
        axes = range(x.ndim)
        others = [tuple(other for other in axes if other != axis) for axis in axes]
        lines = (_largest(x, other, keepdims=True) for other in others)
        return tuple(narrow_scale(_as_root(line, self.of_lines.root), self.of_lines.dtype) for line in lines)

    def down(self, x, stored, largest):
        if x.ndim == 1:
            return self.of_lines.down(x, stored, largest)
        return in_units(_as_root(x, self.of_lines.root), _smallest(stored)) * np.float32(largest)

    def up(self, elements, stored, largest):
        if elements.ndim == 1:
            return self.of_lines.up(elements, stored, largest)
        x = elements * (_smallest(stored) * np.float32(1 / largest))
        return x * x if self.of_lines.root else x

    def zeros(self, shape):
        if len(shape) == 1:
            return self.of_lines.zeros(shape)
        lines = (tuple(n if i == axis else 1 for i, n in enumerate(shape)) for axis in range(len(shape)))
        return tuple(jnp.zeros(line, self.of_lines.dtype) for line in lines)


@dataclass(frozen=True)
class Expanded:
    """Dynamic range expansion (COAT, arXiv 2410.19313): element = sign(x) · (|x| / s)^k · largest.

    k stretches the range of a block, from its least magnitude that is not zero, over that of FP8 E4M3:
    k = ⌊16 · log2(448² / 2) / log2(s / least)⌋ / 16, from 1/16 to 8, is kept in a byte. (COAT's kernel divides by
    √(s · least) and keeps that too, in float32: 12 bytes a block instead of 5, for the same values.)
    """

    block: int
    dtype: str = "float32"

    by_rows = True

    def measure(self, x):
        layout = _layout(x.shape, self.block)
        blocks = layout.split(x)
        scale = _largest(blocks, layout.members)
        # Negated, the least magnitude is the largest; zeros stand aside.
        magnitude = jnp.where(jnp.abs(blocks) == 0, jnp.inf, jnp.abs(blocks))
        least = jnp.min(magnitude, axis=layout.members, initial=jnp.inf)
        octaves = jnp.log2(jnp.where(scale == 0, 1, scale)) - jnp.log2(jnp.where(least < jnp.inf, least, 1))
        steps = np.float32(16 * np.log2(448.0**2 / 2)) / jnp.where(octaves > 0, octaves, 1)
        steps = jnp.where(octaves > 0, jnp.clip(jnp.floor(steps), 1, 128), 128)
        shape = layout.scale_shape
        return narrow_scale(scale.reshape(shape), self.dtype), steps.astype(jnp.uint8).reshape(shape)

    def down(self, x, stored, largest):
        layout = _layout(x.shape, self.block)
        scale, power = self._stored(layout, stored)
        ratio = in_units(layout.split(x), scale)
        return layout.merge(jnp.sign(ratio) * _power(jnp.abs(ratio), power) * np.float32(largest))

    def up(self, elements, stored, largest):
        layout = _layout(elements.shape, self.block)
        scale, power = self._stored(layout, stored)
        ratio = layout.split(elements) * np.float32(1 / largest)
        return layout.merge(jnp.sign(ratio) * _power(jnp.abs(ratio), 1 / power) * scale)

    def zeros(self, shape):
        scales = _layout(shape, self.block).scale_shape
        return jnp.zeros(scales, self.dtype), jnp.full(scales, 128, jnp.uint8)

    def of_block(self, block: int) -> "Expanded":
        return replace(self, block=block)

    def _stored(self, layout, stored):
        scale, steps = (layout.broadcast_scale(part.astype(jnp.float32)) for part in stored)
        return scale, steps * np.float32(1 / 16)


@dataclass(frozen=True)
class QuantileLog:
    """By the logarithm, to a base of the block's own (SOLO, arXiv 2505.00347): element = log_α(x / s), 0 … largest.

    α^largest is the quantile of the positive x / s of the block; what lies below it is stored as it. (SOLO counts the
    zeros too, and takes a block for its largest value where more than a tenth of it are zero.)
    """

    block: int
    dtype: str = "float32"
    quantile: float = 0.1
    steps: int = 3

    by_rows = True

    def measure(self, x):
        layout = _layout(x.shape, self.block)
        blocks = layout.split(x)
        scale = _largest(blocks, layout.members)
        (axis,) = layout.members
        positive = blocks > 0
        count = jnp.sum(positive, axis=axis, keepdims=True, dtype=jnp.int32)
        ascending = jnp.sort(jnp.where(positive, blocks, jnp.inf), axis=axis)
        place = np.float32(self.quantile) * jnp.maximum(count - 1, 0).astype(jnp.float32)
        lower = jnp.floor(place).astype(jnp.int32)
        upper = jnp.minimum(lower + 1, jnp.maximum(count - 1, 0))
        low, high = (jnp.take_along_axis(ascending, at, axis=axis)[..., 0] for at in (lower, upper))
        value = low + (place - jnp.floor(place))[..., 0] * (high - low)
        ratio = jnp.where(scale > 0, value / jnp.where(scale > 0, scale, 1), 1)
        base = _power(ratio, np.float32(1 / self.steps))
        return tuple(narrow_scale(part.reshape(layout.scale_shape), self.dtype) for part in (scale, base))

    def down(self, x, stored, largest):
        layout = _layout(x.shape, self.block)
        scale, base = (layout.broadcast_scale(part.astype(jnp.float32)) for part in stored)
        ratio, octaves = in_units(layout.split(x), scale), jnp.log2(base)
        steps = jnp.where(ratio > 0, jnp.log2(jnp.where(ratio > 0, ratio, 1)), -jnp.inf) / jnp.where(
            base < 1, octaves, -1
        )
        return layout.merge(jnp.where(base < 1, jnp.clip(steps, 0, largest), 0 * ratio))

    def up(self, elements, stored, largest):
        layout = _layout(elements.shape, self.block)
        scale, base = (layout.broadcast_scale(part.astype(jnp.float32)) for part in stored)
        return layout.merge(_power(base, layout.split(elements)) * scale)

    def zeros(self, shape):
        scales = _layout(shape, self.block).scale_shape
        return jnp.zeros(scales, self.dtype), jnp.ones(scales, self.dtype)

    def of_block(self, block: int) -> "QuantileLog":
        return replace(self, block=block)


def _layout(shape: tuple[int, ...], block: int) -> BlockLayout:
    return block_layout(shape, (1, max(1, min(block, shape[-1]))), -1, pad=True)


def _largest(x, axes, signed=False, keepdims=False):
    """`amax_at` of all that lies along the axes."""
    place = place_by_magnitude(x)
    if x.ndim - 1 in axes and x.shape[-1] % _LANES == 0:
        place = jnp.max(place.reshape(*x.shape[:-1], -1, _LANES), axis=-2, initial=np.uint32(0))
    return amax_at(jnp.max(place, axis=axes, keepdims=keepdims, initial=np.uint32(0)), signed)


def _smallest(lines):
    """The least of the scales of the lines through each value; NaN where one of them is."""
    first, *rest = (line.astype(jnp.float32) for line in lines)
    for line in rest:
        first = jnp.where(first < line, first, line) + (0 * first + 0 * line)
    return first


def _power(base, exponent):
    """base^exponent of what is not negative: 0 for 0."""
    return jnp.where(base == 0, 0, jnp.exp2(exponent * jnp.log2(jnp.where(base == 0, 1, base))))


def _as_root(x, root):
    return jnp.sqrt(x) if root else x
