"""Scales that depend on more than their own block: on the other blocks of the line, or on the column as well."""

from dataclasses import dataclass, replace
from typing import Literal

import jax.numpy as jnp
import numpy as np

from lowprec.errors import UsageError, unknown
from lowprec.formats.bits import EXPONENT, divide, rescale, to_bits
from lowprec.formats.scaling import block_amax, power_of_two_rule, scale_from_amax, store_scale
from lowprec.formats.types import ScaleSpec


@dataclass(frozen=True)
class CrossQuant:
    """Every value has a scale of its own, from its row and its column: r^α · c^(1 - α) maps to the largest element.

    r is the absmax of the row along the contraction axis, c that of the column across it. Nothing clips, since |x| <= r
    and |x| <= c; α = 1 is the absmax of the row. The part c^(1 - α) belongs to the weights of a real product.
    (CrossQuant, arXiv 2410.07505.)
    """

    alpha: float = 0.15

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"crossquant weighs rows by an alpha between 0 and 1, not {self.alpha}")

    def __call__(self, blocks, layout, fmt):
        if fmt.block != "row" or fmt.scale != ScaleSpec():
            raise UsageError(f"crossquant scales rows in float32, e.g. int8@row, not {fmt}")
        across = tuple(axis for axis in range(blocks.ndim) if axis not in layout.members)
        rows, columns = block_amax(blocks, layout), block_amax(blocks, replace(layout, members=across))
        amax = jnp.power(rows, np.float32(self.alpha)) * jnp.power(columns, np.float32(1 - self.alpha))
        return scale_from_amax(amax, fmt.element, fmt.scale)

    def __str__(self):
        return f"row^{self.alpha:g} · column^{1 - self.alpha:g}"


@dataclass(frozen=True)
class PowerOfTwoRatios:
    """The absmax scales s of a line's blocks as the largest of them over powers of two: s_max / 2^⌊log2(s_max / s)⌋.

    With e2m1fn elements a whole line is then exact in fp8 under one float32 scale (M2 of ZeroQuant-FP, arXiv
    2307.09782, §3.3; M1 is the scale format e8m0.rceil_exact).

    Args:
      rounding: of the logarithm. "floor" makes scales larger and never clips; "ceil" makes them smaller, which cuts
        maxima by up to 2 and doubles the error of Gaussian values; "nearest" does either.
    """

    rounding: Literal["floor", "ceil", "nearest"] = "floor"

    def __post_init__(self):
        if self.rounding not in ("floor", "ceil", "nearest"):
            raise unknown("rounding of a ratio of scales", self.rounding, ("floor", "ceil", "nearest"))

    def __call__(self, blocks, layout, fmt):
        if not (isinstance(fmt.block, tuple) and fmt.block[0] == 1 and fmt.scale == ScaleSpec()):
            raise UsageError(f"ratios of scales are those of 1x<g> blocks in float32, e.g. e2m1fn@1x128, not {fmt}")
        wanted = divide(block_amax(blocks, layout), np.float32(fmt.element.max))
        finite = to_bits(wanted) < EXPONENT
        (member,) = layout.members
        largest = jnp.max(jnp.where(finite, wanted, 0), axis=member - 1, keepdims=True)
        ratio = divide(largest, jnp.where(finite & (wanted > 0), wanted, jnp.maximum(largest, np.float32(2**-126))))
        scale = rescale(jnp.broadcast_to(largest, wanted.shape), -power_of_two_rule(ratio, None, self.rounding))
        return store_scale(jnp.where(finite, scale, jnp.nan), fmt.scale)

    def __str__(self):
        return f"largest absmax of the line / 2^{self.rounding}"
