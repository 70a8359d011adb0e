"""HALO: per-tensor scales, and whole-axis Hadamard rotations against the outliers of fine-tuned models."""

from lowprec.errors import UsageError
from lowprec.ops import GemmRule
from lowprec.quantizers import REUSE, Hadamard, Quantizer
from lowprec.recipes.recipe import Recipe, everywhere

LEVELS = (0, 1, 2)
_DEFAULT_FORMAT = {0: "e4m3fn", 1: "e4m3fn", 2: "int8_symmetric"}


def halo(level: int, element: str | None = None, name: str | None = None) -> Recipe:
    """A level of HALO with a number format.

    The activations and weights of y = x · w are rotated over the whole axis K from level 1 on. At level 2 the gradient
    of dx = dy · wᵀ is rotated over the rows, filled up with zeros, and dx rotated back: outliers of single tokens are
    spread over all of them. No random signs; the forward codes serve the backward products at level 0 only, as the
    rotated ones do not fit them.

    Args:
      level: 0 (no rotation), 1 or 2.
      element: a format of elements, all six operands with a scale a tensor; by default e4m3fn, at level 2 int8.
      name: of the recipe.
    Raises:
      UsageError: (a ValueError) for another level.
    """
    if level not in LEVELS:
        raise UsageError(f"the levels of HALO are 0, 1 and 2, not {level!r}")
    fmt = f"{element or _DEFAULT_FORMAT[level]}@tensor"
    plain, rotated = Quantizer(fmt, pad=True), Quantizer(fmt, Hadamard("full"), pad=True)
    over_rows = Quantizer(fmt, Hadamard("full", side="outer"), pad=True)
    gemm = {
        0: GemmRule(fwd=(plain, plain), dgrad=(plain, REUSE), wgrad=(REUSE, REUSE)),
        1: GemmRule(fwd=(rotated, rotated), dgrad=(plain, plain), wgrad=(REUSE, plain)),
        2: GemmRule(fwd=(rotated, rotated), dgrad=(over_rows, plain), wgrad=(plain, plain)),
    }[level]
    return everywhere(name or f"halo{level}", gemm, f"HALO-{level}, arXiv 2501.02625, {fmt} (a method for fine-tuning)")


RECIPES = (halo(0), halo(1), halo(2), halo(2, "e3m2fn", "halo2_fp6"))
