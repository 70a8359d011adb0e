"""GemmRule: one layer's three products and how their six operands are quantized."""

from dataclasses import dataclass

from lowprec.errors import UsageError
from lowprec.quantizers import EXACT, Quantizer

Operands = tuple[Quantizer, Quantizer]

PRODUCTS = {
    "fwd": ("x", "w", "y = x · w, over the inputs K"),
    "dgrad": ("dy", "w", "dx = dy · wᵀ, over the outputs N"),
    "wgrad": ("dy", "x", "dw = xᵀ · dy, over the rows M"),
}


@dataclass(frozen=True)
class GemmRule:
    """How the products of a linear layer are quantized. A product left out stays as it is.

    Args:
      fwd: the operands (x, w) of y = x · w; blocks and rotations run along its contraction axis K.
      dgrad: the operands (dy, w) of dx = dy · wᵀ, contracting N. The source of w says what is quantized: the original
        weights, or those the forward product used.
      wgrad: the operands (dy, x) of dw = xᵀ · dy, contracting the rows M. dy may reuse that of dgrad, x that of fwd.
      normalize_input: x / rms(x) before all else, differentiated as usual (BitNet's linear layer).
    Raises:
      UsageError: (a ValueError) where one operand of a product is rotated otherwise than the other, or where a source
        makes no sense.
    """

    fwd: Operands = (EXACT, EXACT)
    dgrad: Operands = (EXACT, EXACT)
    wgrad: Operands = (EXACT, EXACT)
    normalize_input: bool = False

    def __post_init__(self):
        for product, (first, second, _) in PRODUCTS.items():
            a, b = getattr(self, product)
            if a.rotation != b.rotation:
                raise UsageError(
                    f"{product}: {first} is rotated by {a.rotation} and {second} by {b.rotation}; "
                    "a rotation cancels only when both operands have the same"
                )
        if any(q.source != "original" for q in self.fwd):
            raise UsageError("fwd: the operands of the first product have no earlier values to take")
        if self.dgrad[0].source != "original":
            raise UsageError("dgrad: dy comes from the original gradient")
        if self.wgrad[0].source == "requantize":
            raise UsageError("wgrad: dy is original or reused from dgrad")
        if self.wgrad[0].source == "reuse" and self.dgrad[0].rotation is not None:
            raise UsageError("wgrad: dy cannot be reused from dgrad, where it is rotated along another axis")

    def operands(self) -> dict[str, Quantizer]:
        """The six quantizers by the names of `quantizers.OPERANDS`."""
        return {
            f"{product}.{operand}": quantizer
            for product, operands in PRODUCTS.items()
            for operand, quantizer in zip(operands[:2], getattr(self, product), strict=True)
        }

    @property
    def exact(self) -> bool:
        """Whether nothing is quantized."""
        return not self.normalize_input and all(q.exact for q in self.operands().values())

    @property
    def stochastic(self) -> bool:
        """Whether the backward or the forward products need a key."""
        return any(q.stochastic for q in self.operands().values())


KEEP = GemmRule()
