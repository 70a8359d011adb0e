"""Gradient estimators: what the cotangent of a rounded operand means for the operand before rounding."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from lowprec.quantizers.blockwise import Rounded
from lowprec.typing import Array, Bool, Float


@dataclass(frozen=True)
class StraightThrough:
    """The cotangent passes unchanged (Bengio et al., arXiv 1308.3432)."""

    def __str__(self):
        return "straight-through"


@dataclass(frozen=True)
class Clip:
    """The cotangent passes where the value lies within the largest element, plus a margin in units of the element.

    Margin 0 is the clipped straight-through estimator. On an equally spaced grid half a step is QuEST's trust
    estimator, |q - h| <= half a step (arXiv 2502.05003, §3.2), free of its ties inside the range.
    """

    margin: float = 0.0

    def __str__(self):
        return f"clip{f' + {self.margin:g}' if self.margin else ''}"


Estimator = StraightThrough | Clip


def inside(x: Float[Array, "..."], rounded: Rounded, margin: float = 0.0) -> Bool[Array, "..."]:
    """Where x, unscaled, lies within the range of the elements extended by the margin."""
    low, high = rounded.element.min - margin, rounded.element.max + margin
    unscaled = rounded.layout.split(x.astype(jnp.float32))
    if rounded.scale is not None:
        # amax times the reciprocal of its own scale may land one rounding past the largest element.
        unscaled = rounded.scale.scaler(rounded.element).divide(unscaled) * np.float32(1 - 2**-20)
    return rounded.layout.merge((unscaled <= high) & (unscaled >= low))
