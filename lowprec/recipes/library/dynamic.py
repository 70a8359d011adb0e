"""Formats that change while the model trains, layer by layer, as a controller of the training step decides."""

from dataclasses import replace

from lowprec.ops import GemmRule
from lowprec.quantizers import EXACT, REUSE, Quantizer
from lowprec.quantizers.dynamic import DynamicChoice, DynamicFixedPoint
from lowprec.recipes.controllers import FormatSearch, PrecisionSwitching
from lowprec.recipes.recipe import Recipe, everywhere, forward_only

adapt = replace(
    everywhere(
        "adapt",
        GemmRule(fwd=(EXACT, Quantizer("fx16.14", scale=DynamicFixedPoint())), dgrad=(EXACT, REUSE)),
        "AdaPT, arXiv 2107.13490: weights in fixed point, rounded at random, as long as each layer needs (its inputs "
        "as they are, without its sparsity)",
    ),
    control=PrecisionSwitching(),
)


def fliqs(name: str, elements: tuple[str, ...], target: float) -> Recipe:
    """One format a layer, for inputs by token and weights by output channel."""
    operand = Quantizer("int8@row", scale=DynamicChoice(elements))
    source = f"FLIQS, arXiv 2308.03290: {', '.join(elements)} searched in one run, {target:g} bits a weight in the mean"
    return replace(forward_only(name, operand, operand, source), control=FormatSearch(target))


RECIPES = (
    adapt,
    fliqs("fliqs_6", ("int4", "int5", "int6", "int7", "int8"), 6.0),
    fliqs("fliqs_fp6", ("e2m1fn", "e3m2fn", "e4m3fn"), 6.0),
)
