"""Which values of an array share a scale: blocks become axes of their own, over which to reduce and broadcast."""

from dataclasses import dataclass

import jax.numpy as jnp

from lowprec.errors import UsageError
from lowprec.formats.types import Block
from lowprec.typing import Array


@dataclass(frozen=True)
class BlockLayout:
    """The blocks of an array of a given shape.

    Args:
      shape: of the array.
      padded: its shape once the blocks divide it.
      split_shape: with each blocked axis as two axes, (blocks, members).
      members: the axes of `split_shape` whose elements share a scale.
      scale_shape: one entry a block: the padded shape, each axis divided by its block; 1 where a whole axis shares.
    """

    shape: tuple[int, ...]
    padded: tuple[int, ...]
    split_shape: tuple[int, ...]
    members: tuple[int, ...]
    scale_shape: tuple[int, ...]

    def split(self, x: Array) -> Array:
        """x padded with zeros, blocks as axes."""
        if self.padded != self.shape:
            x = jnp.pad(x, [(0, new - old) for old, new in zip(self.shape, self.padded, strict=True)])
        return x.reshape(self.split_shape)

    def merge(self, x: Array) -> Array:
        """The inverse of `split`: padding is cut off."""
        x = jnp.broadcast_to(x, self.split_shape).reshape(self.padded)
        return x[tuple(slice(0, size) for size in self.shape)] if self.padded != self.shape else x

    def broadcast_scale(self, scale: Array) -> Array:
        """Entries of `scale_shape` as an array that broadcasts against `split(x)`."""
        return scale.reshape(tuple(1 if axis in self.members else size for axis, size in enumerate(self.split_shape)))


def block_layout(shape: tuple[int, ...], block: Block, axis: int, pad: bool = False) -> BlockLayout:
    """The layout of blocks on an array.

    Args:
      shape: of the array.
      block: "tensor", "row", (1, g) or (g, g); see `BlockFormat`.
      axis: the contraction axis. Tiles lie over it and the axis after it (before it, when it is the last).
      pad: fill up axes that the block does not divide with zeros.
    Raises:
      UsageError: (a ValueError) if a block does not divide its axis and `pad` is False, or there is no such axis.
    """
    shape = tuple(shape)
    if block == "tensor":
        return BlockLayout(shape, shape, shape, tuple(range(len(shape))), (1,) * len(shape))
    if not -len(shape) <= axis < len(shape):
        raise UsageError(f"an array of shape {shape} has no axis {axis}")
    axis %= len(shape)
    if block == "row":
        return BlockLayout(shape, shape, shape, (axis,), tuple(1 if i == axis else n for i, n in enumerate(shape)))
    outer, inner = block
    sizes = {axis: inner}
    if outer > 1:
        if len(shape) < 2:
            raise UsageError(f"{outer}x{inner} tiles need two axes; the array has shape {shape}")
        sizes[axis + 1 if axis + 1 < len(shape) else axis - 1] = outer
    padded, split, members = [], [], []
    for index, size in enumerate(shape):
        group = sizes.get(index)
        if group is None:
            padded.append(size)
            split.append(size)
            continue
        full = -(-size // group) * group
        if full != size and not pad:
            raise UsageError(
                f"blocks of {group} do not divide axis {index} of shape {shape}; "
                f"pad=True fills it with zeros up to {full}"
            )
        padded.append(full)
        members.append(len(split) + 1)
        split += [full // group, group]
    scales = tuple(size // sizes.get(index, 1) for index, size in enumerate(padded))
    return BlockLayout(shape, tuple(padded), tuple(split), tuple(members), scales)
