"""The variables of one place in a Linen model that a recipe serves: a product, or a function whose inputs are saved."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn

from lowprec.nn.products import STREAM

TAPS, LEARNED, STATE = "taps", "quant_params", "quant"

Collect = Literal["nothing", "observations", "everything"]


@dataclass
class Place:
    """Variables of a bound module, or of a part of it.

    Args:
      collect: which tap slots to make.
      module: bound.
      name: of the part of the module; "" for itself.
    """

    collect: Collect
    module: nn.Module
    name: str

    def key(self, needed: bool):
        """Of the recipe's noise; None where the model runs without."""
        return self.module.make_rng(STREAM) if needed and self.module.has_rng(STREAM) else None

    def slot(self, name: str, make: Callable, wanted: Collect):
        slot = self.get(TAPS, name)
        if slot is None and self.collect in (wanted, "everything"):
            slot = make()
            self.put(TAPS, name, slot)
        return slot

    def get(self, collection: str, name: str) -> Any:
        if self.name == "":
            return self.module.get_variable(collection, name)
        return self._part(collection).get(name)

    def put(self, collection: str, name: str, value) -> None:
        if self.name == "":
            self.module.put_variable(collection, name, value)
        else:
            self.module.put_variable(collection, self.name, {**self._part(collection), name: value})

    def _part(self, collection: str) -> dict[str, Any]:
        return self.module.get_variable(collection, self.name, {})
