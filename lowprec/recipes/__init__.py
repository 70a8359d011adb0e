"""Recipes: named methods of low-precision training, and the means to write one's own in a few lines.

from lowprec import recipes
print(recipes.get("nvfp4").describe())
recipes.parse("fwd=int4@1x32 dgrad=int8@row(stochastic)")
"""

from lowprec.ops import KEEP, GemmRule
from lowprec.quantizers import EXACT, REUSE, Quantizer
from lowprec.recipes.comparison import comparison
from lowprec.recipes.controllers import Control, FormatSearch, PrecisionSwitching
from lowprec.recipes.hooks import LossScaling
from lowprec.recipes.outer_layers import OuterLayers
from lowprec.recipes.recipe import ATTENTION_PRODUCTS, EMBEDDINGS_AND_HEAD, LayerRule, Recipe, SavedRule, everywhere
from lowprec.recipes.registry import get, names, parse
from lowprec.recipes.schedule import DROWNED, Phase, Schedule, Span, Stage, parse_schedule

__all__ = [
    "ATTENTION_PRODUCTS",
    "DROWNED",
    "EMBEDDINGS_AND_HEAD",
    "EXACT",
    "KEEP",
    "REUSE",
    "Control",
    "FormatSearch",
    "GemmRule",
    "LayerRule",
    "LossScaling",
    "OuterLayers",
    "Phase",
    "PrecisionSwitching",
    "Quantizer",
    "Recipe",
    "SavedRule",
    "Schedule",
    "Span",
    "Stage",
    "comparison",
    "everywhere",
    "get",
    "names",
    "parse",
    "parse_schedule",
]
