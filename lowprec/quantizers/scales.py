"""Which scale a block gets: one small rule each. A rule sees the blocks of an operand and returns their `Scale`.

Every scale is computed in float32 and rounded to the scale format of the block format (`formats.scaling`).
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

from lowprec.errors import UsageError
from lowprec.formats.bits import divide
from lowprec.formats.blocks import BlockLayout
from lowprec.formats.elements import round_elements
from lowprec.formats.rounding import Rounding
from lowprec.formats.scaling import Scale, block_amax, scale_from_amax, store_scale
from lowprec.formats.types import BlockFormat
from lowprec.typing import Array, Float


@runtime_checkable
class ScaleRule(Protocol):
    def __call__(self, blocks: Float[Array, "..."], layout: BlockLayout, fmt: BlockFormat) -> Scale: ...


@dataclass(frozen=True)
class AbsMax:
    """The largest magnitude of a block maps to the largest element.

    Args:
      headroom: it maps to max / headroom instead. Stochastic rounding must never clip: where a narrow scale may be
        rounded down by 1/16, headroom 17/16 sees to that.
      limit: the largest block scale of a two-level format; None takes the scale format's maximum.
      floor: the smallest amax considered (DeepSeek-V3 takes 1e-4).
    """

    headroom: float = 1.0
    limit: float | None = None
    floor: float = 0.0

    def __call__(self, blocks, layout, fmt):
        amax = block_amax(blocks, layout, exact=fmt.scale.power_of_two)
        if self.floor:
            amax = jnp.maximum(amax, np.float32(self.floor))
        return scale_from_amax(amax, fmt.element, fmt.scale, self.headroom, self.limit)

    def __str__(self):
        headroom = "" if self.headroom == 1 else f" · {self.headroom:.4g}"
        return f"absmax{headroom}" + (f", block scale ≤ {self.limit:g}" if self.limit else "")


@dataclass(frozen=True)
class FourOverSix:
    """E2M1 blocks take the better of two scales: amax on 6 or amax on 4, by squared error.

    The second candidate is 1.5 times the first, before either is rounded; `limit` 256 leaves it room in the e4m3 block
    scales of NVFP4. (Quartet II, arXiv 2601.22813.)
    """

    limit: float = 256.0

    def __call__(self, blocks, layout, fmt):
        if fmt.scale.power_of_two:
            raise UsageError(f"powers of two cannot choose between amax on 6 and amax on 4: {fmt}")
        amax = block_amax(blocks, layout, exact=False)
        six = scale_from_amax(amax, fmt.element, fmt.scale, limit=self.limit)
        wanted = divide(amax, np.float32(fmt.element.max)) * np.float32(1.5)
        four = store_scale(wanted, fmt.scale, tensor=six.tensor)
        errors = [self._squared_error(blocks, scale, layout, fmt) for scale in (six, four)]
        return six._replace(block=jnp.where(errors[0] <= errors[1], six.block, four.block))

    def _squared_error(self, blocks, scale, layout, fmt):
        rounded = scale.multiply(round_elements(scale.divide(blocks), fmt.element, Rounding()))
        return jnp.sum((rounded - blocks) ** 2, axis=layout.members, keepdims=True)

    def __str__(self):
        return "absmax on 6 or 4"


@dataclass(frozen=True)
class RootMeanSquare:
    """The largest element stands at `clip` root mean squares of the block (QuEST, arXiv 2502.05003).

    Args:
      clip: in root mean squares.
      offset: added to where the largest element stands, so that a block of zeros has a scale.
      centered: take the standard deviation of the block instead (Quartet, arXiv 2505.14669).
    """

    clip: float
    offset: float = 1e-8
    centered: bool = False

    def __call__(self, blocks, layout, fmt):
        square = _mean(blocks * blocks, layout)
        if self.centered:
            square = jnp.maximum(square - _mean(blocks, layout) ** 2, 0)
        top = np.float32(self.clip) * jnp.sqrt(square) + np.float32(self.offset)
        return store_scale(divide(top, jnp.float32(fmt.element.max)), fmt.scale)

    def __str__(self):
        return f"{self.clip:.5g} · {'deviation' if self.centered else 'rms'}"


@dataclass(frozen=True)
class AbsMean:
    """The element 1 stands at the mean magnitude of the block (BitNet b1.58)."""

    floor: float = 1e-5

    def __call__(self, blocks, layout, fmt):
        return store_scale(jnp.maximum(_mean(jnp.abs(blocks), layout), np.float32(self.floor)), fmt.scale)

    def __str__(self):
        return "absmean"


def _mean(blocks, layout):
    """The mean of each block, without the zeros that fill it up."""
    if layout.padded == layout.shape:
        return jnp.mean(blocks, axis=layout.members, keepdims=True)
    total, count = (
        jnp.sum(v, axis=layout.members, keepdims=True) for v in (blocks, layout.split(jnp.ones(layout.shape)))
    )
    return total / count
