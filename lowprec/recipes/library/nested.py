"""One model, many widths: weights stored in eight bits and read at eight, six, four or two (Double Rounding)."""

from lowprec.ops import GemmRule
from lowprec.quantizers import EXACT, REUSE, Quantizer
from lowprec.quantizers.nested import WIDTHS, DoubleRounding, NestedWidths, SampledDoubleRounding
from lowprec.recipes.recipe import Recipe, everywhere

STORED = f"int{WIDTHS[0]}@row"


def nested(name: str, scale: NestedWidths, what: str) -> Recipe:
    """Weights alone. All of the family have the same parameters: each reads a model that another has trained."""
    gemm = GemmRule(fwd=(EXACT, Quantizer(STORED, scale=scale)), dgrad=(EXACT, REUSE))
    return everywhere(name, gemm, f"Double Rounding, arXiv 2502.01199: weights stored in 8 bits, {what}")


RECIPES = (
    *(nested(f"nested_{width}", DoubleRounding(width=width), f"read at {width}") for width in WIDTHS),
    nested("nested", SampledDoubleRounding(), "read at a width that is drawn layer by layer"),
)
