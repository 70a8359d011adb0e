"""Recipes: named methods of low-precision training, and the means to write one's own in a few lines.

from lowprec import recipes
print(recipes.get("nvfp4").describe())
recipes.parse("fwd=int4@1x32 dgrad=int8@row(stochastic)")
"""

from lowprec.ops import KEEP, GemmRule
from lowprec.quantizers import EXACT, REUSE, Quantizer
from lowprec.recipes.comparison import comparison
from lowprec.recipes.hooks import LossScaling
from lowprec.recipes.recipe import ATTENTION_PRODUCTS, EMBEDDINGS_AND_HEAD, LayerRule, Recipe, SavedRule, everywhere
from lowprec.recipes.registry import get, names, parse

__all__ = [
    "ATTENTION_PRODUCTS",
    "EMBEDDINGS_AND_HEAD",
    "EXACT",
    "KEEP",
    "REUSE",
    "GemmRule",
    "LayerRule",
    "LossScaling",
    "Quantizer",
    "Recipe",
    "SavedRule",
    "comparison",
    "everywhere",
    "get",
    "names",
    "parse",
]
