"""Outlier clamping: each line of an operand is cut at two of its quantiles before it is quantized."""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from lowprec.errors import UsageError
from lowprec.typing import Array, Float


@dataclass(frozen=True)
class ClampQuantiles:
    """Each line along the contraction axis, clamped to its (1 - α) and α quantiles, no interpolation.

    Outlier clamping and compensation of FP4 training (arXiv 2501.17116, §3.2).

    Args:
      quantile: α, between ½ and 1.
      residual: of what clamping cuts off: "keep" adds it to the quantized values in high precision (about 2 % of the
        values; a sparse product in hardware), "drop" leaves it out.
    """

    quantile: float = 0.99
    residual: Literal["keep", "drop"] = "keep"

    def __post_init__(self):
        if not 0.5 < self.quantile < 1:
            raise UsageError(f"values are clamped at a quantile between 0.5 and 1, not at {self.quantile}")
        if self.residual not in ("keep", "drop"):
            raise UsageError(f"the residual of clamping is kept or dropped ('keep', 'drop'), not {self.residual!r}")

    def __call__(self, x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
        """x, clamped along the axis."""
        length = x.shape[axis]
        ordered = jnp.sort(x, axis=axis)
        low, high = (
            jnp.take(ordered, jnp.asarray([int(alpha * length)]), axis=axis)
            for alpha in (1 - self.quantile, self.quantile)
        )
        return jnp.clip(x, low, high)

    def __str__(self):
        return f"clamp {self.quantile:g}, {'residual kept' if self.residual == 'keep' else 'residual dropped'}"
