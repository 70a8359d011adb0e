"""Controllers: what changes the formats of a recipe while it trains. Their decisions are state, so nothing recompiles.

A controller is to the collection "quant" what an Optax transformation is to parameters: pure functions `init` and
`update`, called inside the training step, whose memory is part of the training state.
"""

from lowprec.recipes import FormatSearch, Recipe
from lowprec.training.controllers.adapt import Adapt
from lowprec.training.controllers.fliqs import Fliqs
from lowprec.training.controllers.protocol import Controller, Signals

__all__ = ["Adapt", "Controller", "Fliqs", "Signals", "build_controller"]


def build_controller(recipe: Recipe) -> Controller | None:
    """That of a recipe; None where it has none."""
    if recipe.control is None:
        return None
    if isinstance(recipe.control, FormatSearch):
        return Fliqs(recipe.control, recipe)
    return Adapt(recipe.control)
