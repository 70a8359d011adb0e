"""Gradient estimators: what the cotangent of a rounded operand means for the operand before rounding.

Each has a `factor`: what the cotangent is multiplied by, given the operand (in the coordinates in which it was rounded)
and its rounded form. A factor of booleans says where it passes, None that it passes everywhere.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from lowprec.errors import UsageError
from lowprec.quantizers.blockwise import Rounded
from lowprec.quantizers.cells import cell, unscaled
from lowprec.typing import Array, Bool, Float

Factor = Bool[Array, "..."] | Float[Array, "..."] | None


@dataclass(frozen=True)
class StraightThrough:
    """The cotangent passes unchanged (Bengio et al., arXiv 1308.3432)."""

    def factor(self, x: Float[Array, "..."], rounded: Rounded) -> Factor:
        return None

    def __str__(self):
        return "straight-through"


@dataclass(frozen=True)
class Clip:
    """The cotangent passes where the value lies within the largest element, plus a margin in units of the element.

    Margin 0 is the clipped straight-through estimator. On an equally spaced grid half a step is QuEST's trust
    estimator, |q - h| <= half a step (arXiv 2502.05003, §3.2), free of its ties inside the range.
    """

    margin: float = 0.0

    def factor(self, x: Float[Array, "..."], rounded: Rounded) -> Factor:
        return inside(x, rounded, self.margin)

    def __str__(self):
        return f"clip{f' + {self.margin:g}' if self.margin else ''}"


@dataclass(frozen=True)
class Trust:
    """The cotangent passes where rounding moved the value by no more than a distance, in units of the element.

    QuEST's trust estimator (arXiv 2502.05003, §3.2) on grids whose steps differ; where they do not, see `Clip`.
    """

    distance: float

    def factor(self, x: Float[Array, "..."], rounded: Rounded) -> Factor:
        return rounded.layout.merge(jnp.abs(rounded.elements - unscaled(x, rounded)) <= np.float32(self.distance))

    def __str__(self):
        return f"trust {self.distance:g}"


@dataclass(frozen=True)
class DifferentiableGradient:
    """The cotangent times the slope of a smooth staircase, steep halfway between two elements (DGE, arXiv 2501.17116).

    In the cell [low, high) of a scaled value z, with u = |2z - low - high| / (high - low) the distance from its middle:
    f'(z) = min(u^(1/k - 1) / k, cap). At an element it is 1/k; its mean over a cell is 1 without the cap, and .5935
    with k = 5 and cap 3, by which gradients shrink. Beyond the elements it is 1/k.

    Args:
      k: how steep; 1 is straight-through.
      cap: the largest factor.
    """

    k: float = 5.0
    cap: float = 3.0

    def __post_init__(self):
        if self.k < 1 or self.cap <= 0:
            raise UsageError(f"the staircase of a differentiable gradient has k >= 1 and a positive cap, not {self}")

    def factor(self, x: Float[Array, "..."], rounded: Rounded) -> Factor:
        element = rounded.element
        z = jnp.clip(unscaled(x, rounded), element.min, element.max)
        low, high = cell(z, element)
        # 2z - (low + high) is exact near the middle, where the slope is steep.
        u = jnp.abs(2 * z - (low + high)) / (high - low)
        slope = jnp.power(u, np.float32(1 / self.k - 1)) / np.float32(self.k)
        return rounded.layout.merge(jnp.minimum(slope, np.float32(self.cap)))

    def __str__(self):
        return f"dge k={self.k:g}, at most {self.cap:g}"


Estimator = StraightThrough | Clip | Trust | DifferentiableGradient


def inside(x: Float[Array, "..."], rounded: Rounded, margin: float = 0.0) -> Bool[Array, "..."]:
    """Where x, unscaled, lies within the range of the elements extended by the margin."""
    low, high = rounded.element.min - margin, rounded.element.max + margin
    z = unscaled(x, rounded)
    if rounded.scale is not None:
        # amax times the reciprocal of its own scale may land one rounding past the largest element.
        z = z * np.float32(1 - 2**-20)
    return rounded.layout.merge((z <= high) & (z >= low))
