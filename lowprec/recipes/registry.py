"""The recipes by name."""

from lowprec.errors import unknown
from lowprec.recipes.library import (
    baselines,
    fp4,
    fp8,
    halo,
    int8,
    learned,
    logarithmic,
    mantissa,
    mxfp4,
    qat,
    row_fp4,
    saved,
)
from lowprec.recipes.recipe import Recipe
from lowprec.recipes.short import parse_short

_FAMILIES = (baselines, fp8, fp4, mxfp4, row_fp4, int8, halo, qat, learned, logarithmic, mantissa, saved)
_RECIPES = {recipe.name: recipe for family in _FAMILIES for recipe in family.RECIPES}


def names() -> tuple[str, ...]:
    """The named recipes, by family."""
    return tuple(_RECIPES)


def get(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
      UsageError: (a ValueError) if there is none; it names the nearest.
    """
    if name not in _RECIPES:
        raise unknown("recipe", name, _RECIPES, f"lowprec recipes lists all {len(_RECIPES)}")
    return _RECIPES[name]


def parse(text: str | Recipe) -> Recipe:
    """The recipe of a name or of a short form such as "fwd=int4@row wgrad=bf16"; a recipe passes through."""
    if isinstance(text, Recipe):
        return text
    return parse_short(text) if "=" in text else get(text)
