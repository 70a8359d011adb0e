"""The correction of MS-EDEN: rescaled blocks make rounding to nearest unbiased over random rotations."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from lowprec.errors import UsageError
from lowprec.formats.elements import noise
from lowprec.formats.floats import round_float
from lowprec.formats.random import Key, next_key
from lowprec.formats.rounding import Rounding
from lowprec.formats.types import BlockFormat, Format
from lowprec.quantizers.blockwise import Rounded
from lowprec.typing import Array, Float


@dataclass(frozen=True)
class Eden:
    """Multiplies the block scales of each chunk by c = Σz² / Σz·q, then rounds them stochastically.

    z are the scaled values of a chunk of the contraction axis and q the elements they were rounded to; with c the
    chunk keeps its inner product ⟨z, c·q⟩ = ⟨z, z⟩, which over random rotations means no bias. (MS-EDEN of Quartet II,
    arXiv 2601.22813.)

    Args:
      chunk: values that share c: the size of the rotation.
    """

    chunk: int = 128

    def check(self, fmt: Format) -> None:
        if not (isinstance(fmt, BlockFormat) and isinstance(fmt.block, tuple) and fmt.block[0] == 1):
            raise UsageError(f"eden corrects the scales of 1x<g> blocks; {fmt} has none")
        if self.chunk % fmt.block[1] or fmt.scale.power_of_two or fmt.scale.format.exponent_bits == 8:
            raise UsageError(
                f"eden needs blocks that divide its chunk of {self.chunk} and narrow float scales, not {fmt}"
            )

    def __call__(self, x: Float[Array, "..."], rounded: Rounded, axis: int, key: Key) -> Rounded:
        layout, scale = rounded.layout, rounded.scale
        z = scale.divide(layout.split(x.astype(jnp.float32)))
        (member,) = layout.members
        chunks = self.chunk // layout.split_shape[member]
        correction = _chunk_ratio(z, rounded.elements, member, chunks)
        wanted = scale.block * correction
        random = noise(Rounding("stochastic"), None if key is None else next_key(key), wanted.shape)
        block = round_float(wanted, rounded.fmt.scale.format, Rounding("stochastic"), random)
        scale = scale._replace(block=block)
        return replace(rounded, scale=scale, scaled=scale.multiply(rounded.elements))

    def __str__(self):
        return f"eden over {self.chunk}"


def _chunk_ratio(z, q, member, blocks_per_chunk):
    """Σz² / Σz·q over runs of blocks, one number a block; 1 where the denominator is 0."""
    squares, products = (jnp.sum(v, axis=member, keepdims=True) for v in (z * z, z * q))
    axis = member - 1
    count = squares.shape[axis]
    short = -count % blocks_per_chunk

    def total(v):
        v = jnp.pad(v, [(0, short if i == axis else 0) for i in range(v.ndim)])
        chunks = v.reshape(*v.shape[:axis], v.shape[axis] // blocks_per_chunk, blocks_per_chunk, *v.shape[axis + 1 :])
        spread = jnp.broadcast_to(jnp.sum(chunks, axis=axis + 1, keepdims=True), chunks.shape).reshape(v.shape)
        return jax.lax.slice_in_dim(spread, 0, count, axis=axis)

    numerator, denominator = total(squares), total(products)
    return jnp.where(denominator == 0, np.float32(1), numerator / jnp.where(denominator == 0, 1, denominator))
