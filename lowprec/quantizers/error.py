"""How far a quantized tensor is from its source: sums that add up over layers, calls and devices, and their meaning."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from lowprec.quantizers.blockwise import Rounded
from lowprec.quantizers.cells import cell, unscaled
from lowprec.quantizers.estimators import inside
from lowprec.typing import Array, Bool, Float

# What is accumulated for an operand; every entry is a sum, so that cotangents may add them.
SUMS = (
    "calls",
    "amax",
    "values",
    "source_square",
    "error_square",
    "product",
    "rounded_square",
    "clipped",
    "underflowed",
)
OPERANDS = ("fwd.x", "fwd.w", "dgrad.dy", "dgrad.w", "wgrad.dy", "wgrad.x")


def error_sums(x: Float[Array, "..."], rounded: Rounded) -> Float[Array, " sums"]:
    """The sums of one operand: float32, in the order of `SUMS`."""
    return value_sums(x, rounded.values, inside(x, rounded))


def value_sums(
    x: Float[Array, "..."], values: Float[Array, "..."], within: Bool[Array, "..."]
) -> Float[Array, " sums"]:
    """The sums of an operand x that became `values`; `within` says where it lay in the range."""
    source = x.astype(jnp.float32)
    return jnp.stack(
        [
            jnp.float32(1),
            jnp.max(jnp.abs(source)),
            jnp.float32(source.size),
            jnp.sum(source**2),
            jnp.sum((values - source) ** 2),
            jnp.sum(values * source),
            jnp.sum(values**2),
            jnp.sum(~within, dtype=jnp.float32),
            jnp.sum((values == 0) & (source != 0), dtype=jnp.float32),
        ]
    )


@dataclass(frozen=True)
class OperandStatistics:
    """The quantization error of one operand, from accumulated sums.

    Args:
      amax: the largest magnitude, averaged over the calls.
      sqnr_db: signal to quantization noise, 10·log10(Σx² / Σ(q - x)²); infinite for exact values.
      cosine: of the angle between x and q.
      clipped, underflowed: fractions of values beyond the range, and of nonzero values rounded to zero.
      alignment: ⟨q, x⟩ / ⟨x, x⟩; 1 where rounding does not shrink or stretch on average.
    """

    amax: float
    sqnr_db: float
    cosine: float
    clipped: float
    underflowed: float
    alignment: float

    @property
    def gradient_to_noise(self) -> float:
        """‖x‖ / ‖q - x‖. Of dy, below √3 training in low precision stops paying: switch the backward products to bf16.

        (FP4 All the Way, arXiv 2505.19115, §4; `rounding_noise` gives the noise that is expected, not drawn.)
        """
        return 10 ** (self.sqnr_db / 20)

    @classmethod
    def from_sums(cls, sums: np.ndarray) -> "OperandStatistics | None":
        """None where the operand was never quantized."""
        s = dict(zip(SUMS, np.asarray(sums, np.float64), strict=True))
        if not s["calls"]:
            return None
        with np.errstate(divide="ignore", invalid="ignore"):
            return cls(
                amax=float(s["amax"] / s["calls"]),
                sqnr_db=float(10 * np.log10(s["source_square"] / s["error_square"])),
                cosine=float(s["product"] / np.sqrt(s["source_square"] * s["rounded_square"])),
                clipped=float(s["clipped"] / s["values"]),
                underflowed=float(s["underflowed"] / s["values"]),
                alignment=float(s["product"] / s["source_square"]),
            )


def rounding_noise(x: Float[Array, "..."], rounded: Rounded) -> Float[Array, ""]:
    """The variance of rounding x stochastically, summed over the tensor: Σ (z - low)(high - z) s², z = x / s.

    Args:
      x: what was rounded, in the coordinates of the product.
      rounded: its rounded form, of which the scales and the grid count. Values beyond the grid clip: no variance.
    """
    element = rounded.element
    z = jnp.clip(unscaled(x, rounded), element.min, element.max)
    low, high = cell(z, element)
    deviation = jnp.sqrt((z - low) * (high - z))
    scaled = deviation if rounded.scale is None else rounded.scale.multiply(deviation)
    return jnp.sum(scaled**2)


def gradient_to_noise(x: Float[Array, "..."], rounded: Rounded) -> Float[Array, ""]:
    """‖x‖ / (σ √d), σ² the mean variance of stochastic rounding: the monitor of FP4 All the Way (arXiv 2505.19115).

    Below √3, training in low precision stops paying: switch the backward products to bf16.
    """
    return jnp.sqrt(jnp.sum(x.astype(jnp.float32) ** 2) / rounding_noise(x, rounded))


def tap_slot() -> Float[Array, "operands sums"]:
    """The zeros whose cotangent will carry the sums of a layer's six operands."""
    return jnp.zeros((len(OPERANDS), len(SUMS)), jnp.float32)


def read_taps(cotangent: np.ndarray) -> dict[str, OperandStatistics]:
    """The statistics of each quantized operand, from the cotangent of one tap slot."""
    statistics = {
        name: OperandStatistics.from_sums(row) for name, row in zip(OPERANDS, np.asarray(cotangent), strict=True)
    }
    return {name: value for name, value in statistics.items() if value is not None}
