"""GemmRule: one layer's three products and how their six operands are quantized."""

from dataclasses import dataclass

from lowprec.errors import UsageError
from lowprec.ops.accumulation import Accumulation
from lowprec.ops.saved import Codes, Exact, Policy, RunningUint8, Stored
from lowprec.quantizers import EXACT, Quantizer, StraightThrough
from lowprec.quantizers.variables import Differentiable, Remembering

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
      accumulation: how the sums of all three products are accumulated; in float32 unless said otherwise.
      saved: how x is kept for wgrad (`ops.saved`): the original as the policy says, its `Codes` where wgrad takes it
        as the forward product did. None: exactly, in the dtype of the products.
    Raises:
      UsageError: (a ValueError) where one operand of a product is rotated otherwise than the other, or where a source
        makes no sense, or a policy that keeps what wgrad does not take.
    """

    fwd: Operands = (EXACT, EXACT)
    dgrad: Operands = (EXACT, EXACT)
    wgrad: Operands = (EXACT, EXACT)
    normalize_input: bool = False
    accumulation: Accumulation = Accumulation()
    saved: Policy | None = None

    def __post_init__(self):
        self._check_saved()
        for product, (first, second, _) in PRODUCTS.items():
            a, b = getattr(self, product)
            if _inner(a) != _inner(b):
                raise UsageError(
                    f"{product}: {first} is rotated by {a.rotation} and {second} by {b.rotation}; "
                    "a rotation cancels only when both operands have the same"
                )
        if any(q.source != "original" for q in self.fwd):
            raise UsageError("fwd: the operands of the first product have no earlier values to take")
        if any(isinstance(q.scale, Differentiable) for q in (*self.dgrad, *self.wgrad)):
            raise UsageError("only operands of the first product learn: no gradient reaches those of the other two")
        kept = {"x": (self.fwd[0], self.wgrad[1]), "w": (self.fwd[1], self.dgrad[1])}
        for name, (forward, backward) in kept.items():
            if forward.rotation == _inner(forward):
                continue
            if backward.source != "original" or not isinstance(forward.estimator, StraightThrough):
                raise UsageError(
                    f"fwd: {name} is rotated along an axis that its product keeps: no backward product can take its "
                    "values, and its gradient passes straight through"
                )
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

    def _check_saved(self):
        if isinstance(self.saved, Exact):
            object.__setattr__(self, "saved", None)
        if self.saved is None:
            return
        if not isinstance(self.saved, Policy):
            raise UsageError(
                f"saved: x is kept by a policy of ops.saved, e.g. Stored('e4m3fn@1x16'), not {self.saved!r}"
            )
        from_original = self.wgrad[1].source == "original"
        learned = isinstance(self.fwd[0].scale, Differentiable)
        if isinstance(self.saved, Codes) and (from_original or learned or self.fwd[0].format is None):
            raise UsageError("saved: codes of x serve only where wgrad reuses or requantizes the quantized x of fwd")
        if isinstance(self.saved, Codes) and self.fwd[0].clamp is not None and self.fwd[0].clamp.residual == "keep":
            raise UsageError("saved: the codes of x are not all of it, the clamp of fwd keeps a part in high precision")
        if isinstance(self.saved, (Stored, RunningUint8)) and not from_original:
            raise UsageError(f"saved: wgrad takes the x of fwd, not the original that {self.saved} keeps: say Codes()")
        if isinstance(self.saved, RunningUint8) and self.saved.groups == "heads":
            raise UsageError("saved: x of a product has no heads; its ranges are those of a number of groups of inputs")

    @property
    def exact(self) -> bool:
        """Whether nothing is quantized and x is kept as it is."""
        return self.exact_products and self.saved is None

    @property
    def exact_products(self) -> bool:
        """Whether no operand is quantized."""
        as_they_are = not self.normalize_input and self.accumulation == Accumulation()
        return as_they_are and all(q.exact for q in self.operands().values())

    @property
    def learns(self) -> bool:
        """Whether a quantizer has parameters."""
        return any(isinstance(q.scale, Differentiable) and q.scale.learns for q in self.operands().values())

    @property
    def remembers(self) -> bool:
        """Whether a quantizer or the policy of x has state."""
        quantizers = self.operands().values()
        return any(isinstance(q.scale, Remembering) for q in quantizers) or bool(self.saved and self.saved.remembers)

    @property
    def stochastic(self) -> bool:
        """Whether the backward or the forward products need a key."""
        return bool(self.saved and self.saved.stochastic) or any(q.stochastic for q in self.operands().values())


def _inner(q):
    """The rotation that has to cancel inside the product."""
    return q.rotation if q.rotation is not None and q.rotation.side == "inner" else None


KEEP = GemmRule()
