"""Adam element by element, and moments as codes: what the reference and the kernels of `adam_update` share.

Scales come broadcast to the elements, and random bits are made by whoever knows where an element lies.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lowprec.formats.amax import in_units
from lowprec.formats.bits import carry_to_bfloat16
from lowprec.formats.rounding import Rounding
from lowprec.formats.tables import decode_table, round_to_codes
from lowprec.formats.types import TableFormat
from lowprec.typing import Array, Float, UInt32


@dataclass(frozen=True)
class MomentCode:
    """How a moment is stored: x ≈ element · scale / (largest element), the scale a block's largest magnitude.

    Args:
      element: of the scaled values.
      block: members that share a scale, along the last axis.
      scale_dtype: "float32" or "bfloat16".
      signed_scale: the scale has the sign of its element.
      stochastic: whether codes are rounded stochastically, else to nearest.
      keeps_positive: what is above zero never gets the code of zero.
    """

    element: TableFormat
    block: int
    scale_dtype: str = "float32"
    signed_scale: bool = False
    stochastic: bool = False
    keeps_positive: bool = False

    @property
    def packed(self) -> int:
        """Codes in a byte."""
        return 8 // self.element.bits

    def decode(self, codes: UInt32[Array, "..."], scale: Float[Array, "..."]) -> Float[Array, "..."]:
        return decode_table(codes, self.element) * (scale * np.float32(1 / self.element.max))

    def encode(
        self, x: Float[Array, "..."], scale: Float[Array, "..."], random: UInt32[Array, "..."] | None
    ) -> UInt32[Array, "..."]:
        y = in_units(x, scale) * np.float32(self.element.max)
        if self.keeps_positive:
            smallest = np.float32(self.element.min_subnormal)
            y = jnp.where((x > 0) & (y < smallest), smallest, y)
        rounding = Rounding("stochastic" if self.stochastic else "nearest_even")
        return round_to_codes(y, self.element, rounding, random)


class Moment(NamedTuple):
    """A stored moment of a parameter of shape (…, n).

    Attributes:
      codes: (…, n · bits / 8) uint8, packed along the last axis, the first code in the lowest bits.
      scales: (…, n / block), in the dtype of scales.
    """

    codes: Any
    scales: Any


class AdamScalars(NamedTuple):
    """float32 scalars of one update.

    Attributes:
      b1, rest1: decay of the first moment, and 1 - b1 as the caller rounds it.
      b2, rest2: of the second one.
      eps: of the denominator.
      correct1, correct2: 1 / (1 - b1^t), 1 / (1 - b2^t).
      step: by which the update is multiplied, minus the learning rate.
      weight_decay: decoupled; None: weights do not decay.
    """

    b1: Any
    rest1: Any
    b2: Any
    rest2: Any
    eps: Any
    correct1: Any
    correct2: Any
    step: Any
    weight_decay: Any = None


def moments_after(
    g: Float[Array, "..."], m: Float[Array, "..."], v: Float[Array, "..."], scalars: AdamScalars
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """(m, v) with a gradient in them."""
    return scalars.b1 * m + scalars.rest1 * g, scalars.b2 * v + scalars.rest2 * g * g


def weights_after(
    w: Array, m: Float[Array, "..."], v: Float[Array, "..."], scalars: AdamScalars, random: UInt32[Array, "..."] | None
) -> Array:
    """The weights moved by the new moments, in their dtype; bfloat16 is rounded stochastically."""
    wide = w.astype(jnp.float32)
    update = m * scalars.correct1 / (jnp.sqrt(v * scalars.correct2) + scalars.eps)
    if scalars.weight_decay is not None:
        update = update + scalars.weight_decay * wide
    total = wide + scalars.step * update
    if w.dtype == jnp.float32:
        return total
    # As a difference that is added again: what `optax.apply_updates` would make of it.
    return (wide + (carry_to_bfloat16(total, random) - wide)).astype(w.dtype)
