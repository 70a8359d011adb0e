"""Which scale a block gets: one small rule each. A rule sees the blocks of an operand and returns their `Scale`.

Every scale is computed in float32 and rounded to the scale format of the block format (`formats.scaling`).
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowprec.errors import UsageError
from lowprec.formats.bits import at_least, divide, power_of_two
from lowprec.formats.blocks import BlockLayout
from lowprec.formats.elements import round_elements
from lowprec.formats.rounding import Rounding
from lowprec.formats.scaling import Scale, block_amax, power_of_two_rule, scale_from_amax, store_scale
from lowprec.formats.types import BlockFormat, FloatFormat
from lowprec.quantizers.gaussian import optimal_clip
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
      offset: added to amax (COAT takes 1e-10).
    """

    headroom: float = 1.0
    limit: float | None = None
    floor: float = 0.0
    offset: float = 0.0

    def __call__(self, blocks, layout, fmt):
        amax = block_amax(blocks, layout, fmt.scale, fmt.element if self.headroom == 1 else None)
        if self.floor:
            amax = at_least(amax, np.float32(self.floor))
        if self.offset:
            amax = amax + np.float32(self.offset)
        return scale_from_amax(amax, fmt.element, fmt.scale, self.headroom, self.limit)

    def __str__(self):
        headroom = "" if self.headroom == 1 else f" · {self.headroom:.4g}"
        return f"absmax{headroom}" + (f", block scale ≤ {self.limit:g}" if self.limit else "")


@dataclass(frozen=True)
class OctaveMax:
    """A power of two times a constant, the top of amax's octave on the largest element: 2^(⌊log2 amax⌋ + 1) / max.

    For e2m1fn that is the OCP scale 2^(⌊log2 amax⌋ - 2) times 4/3: values are scaled by 3/4, nothing clips and amax
    lands in [3, 6), as stochastic rounding needs it. (arXiv 2502.20586; Quartet, arXiv 2505.14669.) The stored scales
    are powers of two; the constant is the second level of the scale, and comes out of a product as 16/9.
    """

    def __call__(self, blocks, layout, fmt):
        if not fmt.scale.power_of_two:
            raise UsageError(f"the octave of amax is for powers of two, e.g. mxfp4, not {fmt}")
        amax = block_amax(blocks, layout, fmt.scale, fmt.element)
        octave = math.floor(math.log2(fmt.element.max))
        exponent = power_of_two_rule(amax, None, "floor") - octave
        # A CPU takes 2^-127 for zero, and the largest element must not stand at 2^128.
        block = jnp.where(jnp.isfinite(amax), power_of_two(jnp.clip(exponent, -126, 126 - octave)), jnp.nan)
        return Scale(block, tensor=jnp.float32(self._constant(fmt)))

    def _constant(self, fmt):
        return 2.0 ** (math.floor(math.log2(fmt.element.max)) + 1) / fmt.element.max

    def __str__(self):
        return "octave of absmax"


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
        amax = block_amax(blocks, layout, fmt.scale)
        six = scale_from_amax(amax, fmt.element, fmt.scale, limit=self.limit)
        wanted = divide(amax, np.float32(fmt.element.max)) * np.float32(1.5)
        four = store_scale(wanted, fmt.scale, tensor=six.tensor)
        errors = [squared_error(blocks, scale, layout, fmt) for scale in (six, four)]
        return six._replace(block=jnp.where(errors[0] <= errors[1], six.block, four.block))

    def __str__(self):
        return "absmax on 6 or 4"


@dataclass(frozen=True)
class RootMeanSquare:
    """The largest element stands at `clip` root mean squares of the block (QuEST, arXiv 2502.05003).

    Args:
      clip: in root mean squares; None takes what is best for the elements on Gaussian data (`optimal_clip`).
      offset: added to where the largest element stands, so that a block of zeros has a scale.
      centered: take the standard deviation of the block instead (Quartet, arXiv 2505.14669).
    """

    clip: float | None = None
    offset: float = 1e-8
    centered: bool = False

    def __call__(self, blocks, layout, fmt):
        square = block_mean(blocks * blocks, layout)
        if self.centered:
            square = at_least(square - block_mean(blocks, layout) ** 2, 0)
        clip = optimal_clip(fmt) if self.clip is None else self.clip
        top = np.float32(clip) * jnp.sqrt(square) + np.float32(self.offset)
        return store_scale(divide(top, jnp.float32(fmt.element.max)), fmt.scale)

    def __str__(self):
        clip = "best clip" if self.clip is None else f"{self.clip:.5g}"
        return f"{clip} · {'deviation' if self.centered else 'rms'}"


@dataclass(frozen=True)
class AbsMean:
    """The element 1 stands at the mean magnitude of the block (BitNet b1.58)."""

    floor: float = 1e-5

    def __call__(self, blocks, layout, fmt):
        return store_scale(at_least(block_mean(jnp.abs(blocks), layout), np.float32(self.floor)), fmt.scale)

    def __str__(self):
        return "absmean"


@dataclass(frozen=True)
class Percentile:
    """A percentile of the magnitudes of a block maps to the largest element; what lies beyond it clips.

    Args:
      percent: 0 to 100, interpolated as numpy does; 100 is `AbsMax`.
    """

    percent: float = 99.9

    def __post_init__(self):
        if not 0 < self.percent <= 100:
            raise UsageError(f"a percentile lies between 0 and 100, not at {self.percent}")

    def __call__(self, blocks, layout, fmt):
        magnitudes = jnp.abs(blocks)
        if layout.padded != layout.shape:
            magnitudes = jnp.where(layout.split(jnp.ones(layout.shape, bool)), magnitudes, jnp.nan)
        top = jnp.nanpercentile(magnitudes, self.percent, axis=layout.members, keepdims=True)
        broken = jnp.any(~jnp.isfinite(blocks), axis=layout.members, keepdims=True)
        return scale_from_amax(jnp.where(broken, jnp.nan, top), fmt.element, fmt.scale)

    def __str__(self):
        return f"{self.percent:g}th percentile"


@dataclass(frozen=True)
class LeastSquares:
    """Of several scales, fractions of the absmax one, the one with the least squared error of rounding to nearest.

    A search of the kind that GPTQ and AWQ do (arXiv 2210.17323, 2306.00978), block by block. It costs one rounding a
    candidate. Powers of two are searched from twice the absmax scale, which may clip, downwards. The scales of floats
    in float32 are real exponent biases (LLM-FP4, arXiv 2310.16836; see `exponent_bias`).

    Args:
      candidates: how many, equally spaced from `most` down to `least`; the absmax scale itself is one more if not
        among them.
      least: the smallest fraction.
      most: the largest.
    """

    candidates: int = 25
    least: float = 0.4
    most: float = 1.0

    def __post_init__(self):
        if self.candidates < 1 or not 0 < self.least <= 1 <= self.most:
            raise UsageError(
                "a search has one candidate or more, from a fraction between 0 and 1 of absmax to one of 1 or more; "
                f"not {self.candidates} from {self.least:g} to {self.most:g}"
            )

    def __call__(self, blocks, layout, fmt):
        amax = block_amax(blocks, layout, fmt.scale, fmt.element)
        first = scale_from_amax(amax, fmt.element, fmt.scale)
        fractions = np.linspace(self.most, self.least, self.candidates, dtype=np.float32)
        fractions = fractions[fractions != 1]
        if fmt.scale.power_of_two:
            exponents = np.arange(1, np.floor(np.log2(self.least)) - 1, -1)
            fractions = np.exp2(exponents[exponents != 0]).astype(np.float32)
        wanted = first.total()

        def better(best, fraction):
            scale = store_scale(wanted * fraction, fmt.scale, tensor=first.tensor)
            error = squared_error(blocks, scale, layout, fmt)
            choose = error < best[1]
            merged = jax.tree.map(lambda new, old: jnp.where(choose, new, old), scale._replace(tensor=None), best[0])
            return (merged, jnp.where(choose, error, best[1])), None

        start = (first._replace(tensor=None), squared_error(blocks, first, layout, fmt))
        (best, _), _ = lax.scan(better, start, fractions)
        return best._replace(tensor=first.tensor)

    def __str__(self):
        return f"least squares of {self.candidates}" + (f" up to {self.most:g} absmax" if self.most != 1 else "")


def exponent_bias(fmt: FloatFormat, largest: float) -> float:
    """The real exponent bias under which the largest value of a float format is `largest`.

    Scaling by s and shifting the bias by -log2(s) are one thing: a float32 scale is a real bias (LLM-FP4, arXiv
    2310.16836, eq. 8), and a power of two an integer one.
    """
    if largest <= 0:
        raise UsageError(f"the largest value of a format is positive, not {largest}")
    return fmt.bias + math.log2(fmt.max / largest)


def squared_error(
    blocks: Float[Array, "..."], scale: Scale, layout: BlockLayout, fmt: BlockFormat
) -> Float[Array, "..."]:
    """Of rounding each block to nearest with a scale."""
    scaler = scale.scaler(fmt.element).settled()
    rounded = scaler.multiply(round_elements(scaler.divide(blocks), fmt.element, Rounding()))
    return jnp.sum((rounded - blocks) ** 2, axis=layout.members, keepdims=True)


def block_mean(blocks, layout):
    """The mean of each block, without the zeros that fill it up."""
    if layout.padded == layout.shape:
        return jnp.mean(blocks, axis=layout.members, keepdims=True)
    total, count = (
        jnp.sum(v, axis=layout.members, keepdims=True) for v in (blocks, layout.split(jnp.ones(layout.shape)))
    )
    return total / count
