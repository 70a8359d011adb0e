"""Grids whose steps grow with the value: logarithmic and power-law numbers."""

import numpy as np

from lowprec.formats import BlockFormat, TableFormat
from lowprec.ops import GemmRule
from lowprec.quantizers import REUSE, Quantizer
from lowprec.recipes.recipe import everywhere, forward_only


def power_law(bits: int, exponent: float) -> TableFormat:
    """sign(x) |x|^exponent on an equally spaced symmetric grid, rounded there (PowerQuant, arXiv 2301.09858, eq. 4)."""
    top = 2 ** (bits - 1) - 1
    levels = np.arange(-top, top + 1) / top
    expand = lambda t: np.sign(t) * np.abs(t) ** (1 / exponent)
    middles = expand((levels[:-1] + levels[1:]) / 2)
    return TableFormat(f"power{bits}_{exponent:g}", tuple(expand(levels)), tuple(middles))


# The full scale is a power of two too, so that every value is one.
LOG4 = Quantizer("lns4.0@tensor/e8m0.nearest")
LOG5 = Quantizer("lns5.0@tensor/e8m0.nearest")

lognet_4 = forward_only(
    "lognet_4",
    LOG4,
    LOG4,
    "Miyashita et al., arXiv 1603.01025: a sign and a three-bit base-2 logarithm for weights and activations",
)

lognet_5 = everywhere(
    "lognet_5",
    GemmRule(fwd=(LOG5, LOG5), dgrad=(LOG5, REUSE), wgrad=(REUSE, REUSE)),
    "Miyashita et al., arXiv 1603.01025, §5: five-bit base-2 logarithms in the backward products too",
)


def powerquant(bits: int, exponent: float = 0.5):
    grid = power_law(bits, exponent)
    return forward_only(
        f"powerquant_{bits}",
        Quantizer(BlockFormat(grid, "tensor")),
        Quantizer(BlockFormat(grid, "row")),
        f"PowerQuant, arXiv 2301.09858: {bits} bits, equally spaced in sign(x) |x|^{exponent:g} (the exponent is not "
        "searched for)",
    )


RECIPES = (lognet_4, lognet_5, powerquant(4))
