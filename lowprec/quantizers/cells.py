"""The cells of a grid: between which two neighbouring elements a scaled value lies."""

import jax.numpy as jnp
import numpy as np

from lowprec.errors import UsageError
from lowprec.formats.elements import value_table
from lowprec.formats.traced import TracedFormat
from lowprec.formats.types import ElementFormat
from lowprec.quantizers.blockwise import Rounded
from lowprec.typing import Array, Float

_COMPARISONS_UP_TO = 32  # below this many values, comparing with each beats a binary search


def unscaled(x: Float[Array, "..."], rounded: Rounded) -> Float[Array, "..."]:
    """x in units of the elements it was rounded to, split into blocks."""
    blocks = rounded.layout.split(x.astype(jnp.float32))
    return blocks if rounded.scale is None else rounded.scale.scaler(rounded.element).divide(blocks)


def cell(
    z: Float[Array, "..."], element: ElementFormat | TracedFormat
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """The neighbours (low, high) with low <= z < high; of what lies beyond the elements, the outermost two.

    Args:
      z: in units of the elements.
      element: of up to 16 bits.
    Raises:
      UsageError: (a ValueError) of a traced format, whose values are not known beforehand.
    """
    if isinstance(element, TracedFormat):
        raise UsageError("the cells of a grid are those of a format that is known, not of a traced one")
    values = np.asarray(value_table(element), np.float32)
    method = "compare_all" if len(values) <= _COMPARISONS_UP_TO else "scan"
    index = jnp.searchsorted(values[1:-1], z, side="right", method=method)
    return jnp.asarray(values)[index], jnp.asarray(values)[index + 1]
