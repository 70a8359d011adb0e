"""Products of operands with their low mantissa bits cut off."""

from lowprec.ops import GemmRule
from lowprec.quantizers import REUSE, Quantizer
from lowprec.recipes.recipe import everywhere


def mantissa(bits: int):
    """All operands truncated to a few bits of mantissa, with the exponents of bfloat16."""
    cut = Quantizer(f"e8m{bits}_ieee", rounding="toward_zero")
    return everywhere(
        f"mantissa_{bits}",
        GemmRule(fwd=(cut, cut), dgrad=(cut, REUSE), wgrad=(REUSE, REUSE)),
        f"To FP8 and back again, arXiv 2405.18710: bfloat16 products with {bits} of 7 mantissa bits",
    )


RECIPES = tuple(mantissa(bits) for bits in range(1, 8))
