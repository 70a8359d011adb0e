"""Integers with a zero point, between the least and the largest value of a block: Q-GaLore's INT4 and INT8."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from lowprec.formats.bits import divide
from lowprec.formats.blocks import BlockLayout, block_layout
from lowprec.formats.elements import element_of
from lowprec.optim.state_formats import StateFormat


@dataclass(frozen=True)
class Affine:
    """`state_scales.Scales` by the range of a block: element = x / s + z, 0 … largest, with an integer z.

    s = max(max x - min x, 1e-5) / largest,  z = -round(min x / s), clipped to 0 … largest (Q-GaLore, arXiv 2407.08296).

    Args:
      block: members, along the last axis; the last block of a row may be shorter.
      largest: element, 2^bits - 1.
    """

    block: int
    largest: int

    by_rows = True

    def measure(self, x):
        layout = self._layout(x.shape)
        blocks = layout.split(x)
        inside = layout.split(jnp.ones(x.shape, bool))
        least, most = (
            reduce(jnp.where(inside, blocks, fill), axis=layout.members)
            for reduce, fill in ((jnp.min, jnp.inf), (jnp.max, -jnp.inf))
        )
        finite = jnp.all(jnp.isfinite(blocks), axis=layout.members)
        scale = divide(jnp.maximum(most - least, np.float32(1e-5)), np.float32(self.largest))
        scale = jnp.where(finite, scale, jnp.nan)
        zero = jnp.clip(-jnp.round(divide(jnp.where(finite, least, 0), jnp.where(finite, scale, 1))), 0, self.largest)
        return scale.reshape(layout.scale_shape), zero.astype(jnp.uint8).reshape(layout.scale_shape)

    def down(self, x, stored, largest):
        layout = self._layout(x.shape)
        scale, zero = (layout.broadcast_scale(part.astype(jnp.float32)) for part in stored)
        return layout.merge(jnp.clip(divide(layout.split(x), scale) + zero, 0, largest))

    def up(self, elements, stored, largest):
        layout = self._layout(elements.shape)
        scale, zero = (layout.broadcast_scale(part.astype(jnp.float32)) for part in stored)
        return layout.merge((layout.split(elements) - zero) * scale)

    def zeros(self, shape):
        scales = self._layout(shape).scale_shape
        return jnp.full(scales, np.float32(1e-5 / self.largest)), jnp.zeros(scales, jnp.uint8)

    def _layout(self, shape) -> BlockLayout:
        return block_layout(shape, (1, max(1, min(self.block, shape[-1]))), -1, pad=True)


def affine_format(bits: int, block: int = 256, stochastic: bool = False) -> StateFormat:
    """Integers of so many bits with a zero point: what a projection, or a weight, is stored as.

    Args:
      bits: 1 to 8.
      block: how many values share a scale and a zero point: 5 bytes.
      stochastic: round to one of both neighbours, with the probability of the nearness of the other.
    """
    name = f"affine{bits}@{block}{'(stochastic)' if stochastic else ''}"
    return StateFormat(name, element_of(f"uint{bits}"), Affine(block, 2**bits - 1), stochastic)
