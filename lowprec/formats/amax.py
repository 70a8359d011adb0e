"""The largest magnitude of a block of float32 numbers, and the numbers in units of it: no NaN or infinity gets lost.

A maximum of floats may drop a NaN on CPUs. Integers in the order of magnitudes do not, and tell the sign too.
"""

import jax.numpy as jnp
import numpy as np

from lowprec.formats.bits import EXPONENT, IMPLICIT, divide, from_bits, to_bits
from lowprec.formats.elements import round_elements
from lowprec.formats.native import format_of
from lowprec.formats.rounding import Rounding
from lowprec.typing import Array, Float, UInt32


def place_by_magnitude(x: Float[Array, "..."]) -> UInt32[Array, "..."]:
    """Integers in the order of |x|; of two that differ in sign alone, the negative one comes later."""
    bits = to_bits(x)
    return (bits << 1) | (bits >> 31)


def amax_at(place: UInt32[Array, "..."], signed: bool = False) -> Float[Array, "..."]:
    """The largest magnitude, from the largest place of a block: zero for subnormals, NaN where anything is not finite.

    Args:
      signed: with the sign of its element.
    """
    magnitude = place >> 1
    value = from_bits(magnitude | (place << 31) if signed else magnitude)
    return jnp.where(magnitude < IMPLICIT, np.float32(0), jnp.where(magnitude >= EXPONENT, np.float32(np.nan), value))


def in_units(x: Float[Array, "..."], scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """x / scale correctly rounded, and 0 where the scale is 0."""
    return jnp.where(scale == 0, np.float32(0), divide(x, jnp.where(scale == 0, np.float32(1), scale)))


def narrow_scale(scale: Float[Array, "..."], dtype: str) -> Float[Array, "..."]:
    """A scale in its dtype, finite where it is finite."""
    if dtype != "float32":
        # Integers round: by a cast alone, XLA on GPUs would go on with the unrounded scale.
        scale = round_elements(scale, format_of(jnp.dtype(dtype)), Rounding())
    return scale.astype(dtype)
