"""Quantizer: what happens to one operand of a product. rotate ∘ scale ∘ round (∘ correct), and its gradient."""

from dataclasses import dataclass
from typing import Literal

import jax

from lowprec.errors import UsageError
from lowprec.formats.grammar import parse
from lowprec.formats.rounding import Rounding, parse_rounding
from lowprec.formats.types import BlockFormat, Format
from lowprec.quantizers.blockwise import Rounded, round_blocks
from lowprec.quantizers.eden import Eden
from lowprec.quantizers.estimators import Estimator, StraightThrough
from lowprec.quantizers.hadamard import Hadamard
from lowprec.quantizers.scales import AbsMax, ScaleRule
from lowprec.typing import Array, Float

Source = Literal["original", "requantize", "reuse"]


@dataclass(frozen=True)
class Quantizer:
    """How one operand of a matrix product is quantized.

    Args:
      format: a format or its name; None leaves the operand as it is.
      rotation: a Hadamard rotation along the contraction axis, the same for both operands of a product.
      rounding: a mode or its name.
      scale: which scale a block gets.
      estimator: how the gradient passes (operands of the forward product only).
      correction: rescales blocks after rounding, e.g. `Eden`.
      source: of an operand of a backward product: "original": the tensor before the forward product quantized it;
        "requantize": its forward values, quantized again along the new contraction axis; "reuse": its values as the
        product before quantized them (then nothing else may be said).
      pad: fill up axes that blocks do not divide with zeros, which changes neither scales nor products.
    """

    format: Format | str | None = None
    rotation: Hadamard | None = None
    rounding: Rounding | str = "nearest_even"
    scale: ScaleRule = AbsMax()
    estimator: Estimator = StraightThrough()
    correction: Eden | None = None
    source: Source = "original"
    pad: bool = False

    def __post_init__(self):
        if self.format is not None:
            object.__setattr__(self, "format", parse(self.format))
        object.__setattr__(self, "rounding", parse_rounding(self.rounding))
        if self.source not in ("original", "requantize", "reuse"):
            raise UsageError(f"the source of an operand is original, requantize or reuse, not {self.source!r}")
        says_more = self.rotation or self.correction or self.rounding.kind != "nearest_even"
        if self.source == "reuse" and (self.format is not None or says_more):
            raise UsageError("a reused operand is taken as it is: it has no format, rotation, rounding or correction")
        if self.format is None and says_more:
            raise UsageError("an operand without a format is left as it is: it has no rotation, rounding or correction")
        if self.correction is not None:
            self.correction.check(self.format)

    @property
    def exact(self) -> bool:
        """Whether the operand is left as it is."""
        return self.format is None and self.source != "reuse"

    @property
    def stochastic(self) -> bool:
        """Whether it needs a key."""
        rotation = self.rotation is not None and self.rotation.signs == "random"
        return self.rounding.stochastic or rotation or self.correction is not None

    def round(self, x: Float[Array, "..."], axis: int, key: jax.Array | None = None) -> Rounded:
        """x, already rotated, on the grid.

        Args:
          x: any shape.
          axis: the contraction axis of the product.
          key: for stochastic rounding and corrections.
        """
        rounded = round_blocks(x, self.format, axis, rule=self.scale, rounding=self.rounding, key=key, pad=self.pad)
        return rounded if self.correction is None else self.correction(x, rounded, axis, key)

    def __str__(self):
        if self.source == "reuse":
            return "reuse"
        if self.format is None:
            return "as it is"
        parts = [str(self.format)]
        if self.rotation:
            parts.append(str(self.rotation))
        if isinstance(self.format, BlockFormat) and str(self.scale) != "absmax":
            parts.append(str(self.scale))
        if self.rounding.kind != "nearest_even":
            parts.append(str(self.rounding))
        if self.correction:
            parts.append(str(self.correction))
        if not isinstance(self.estimator, StraightThrough):
            parts.append(f"gradient {self.estimator}")
        if self.source == "requantize":
            parts.append("from the forward values")
        return ", ".join(parts)


EXACT = Quantizer()
REUSE = Quantizer(source="reuse")
