"""Signs about the mean: the one-bit weights of BitNet."""

from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from lowprec.errors import UsageError
from lowprec.formats.elements import value_table
from lowprec.formats.random import Key
from lowprec.formats.types import BlockFormat, Format
from lowprec.quantizers.blockwise import Rounded
from lowprec.quantizers.scales import block_mean
from lowprec.typing import Array, Float


@dataclass(frozen=True)
class SignAboutMean:
    """Takes the signs of x - mean(x), the mean that of the block, under the scale of x itself.

    sign(w - mean(w)) · mean |w| of BitNet (arXiv 2310.11453, eq. 1 to 3); the mean is not added again, and the sign of
    zero is -1.
    """

    def check(self, fmt: Format | None) -> None:
        if not isinstance(fmt, BlockFormat) or not np.array_equal(value_table(fmt), [-1, 1]) or fmt.scale.per_tensor:
            raise UsageError(
                f"signs about the mean are those of a binary format with scales, e.g. binary@tensor, not of {fmt}"
            )

    def __call__(self, x: Float[Array, "..."], rounded: Rounded, axis: int, key: Key | None) -> Rounded:
        layout = rounded.layout
        blocks = layout.split(x.astype(jnp.float32))
        elements = jnp.where(blocks > block_mean(blocks, layout), np.float32(1), np.float32(-1))
        return replace(rounded, elements=elements, scaled=rounded.scale.multiply(elements))

    def __str__(self):
        return "sign about the mean"
