"""How extreme activations and attention weights of a model are, measured during training.

The numbers are those of `nn.outliers`; they leave the model in a forward pass of their own at each evaluation, and
nothing of it is in the training step.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from lowprec.nn.outliers import COLLECTION, ENTRY
from lowprec.nn.stack import layer_paths
from lowprec.training.metrics import short
from lowprec.training.tasks import Task


def make_observation(quantized, task: Task) -> Callable:
    """(variables, examples, key) -> what the modules of the model note of their activations."""

    def observe(variables, examples, key: jax.Array) -> dict[str, Any]:
        _, noted = quantized.apply(variables, task.inputs(examples), rngs={"quant": key}, mutable=[COLLECTION])
        return noted.get(COLLECTION, {})

    return observe


@dataclass(frozen=True)
class Outliers:
    """The numbers of one measurement: module path -> name -> value. Modules of different kinds have different names."""

    layers: Mapping[str, Mapping[str, float]]

    @classmethod
    def from_observations(cls, noted: Mapping[str, Any]) -> "Outliers":
        """From what `make_observation` gives; what else lies in that collection is left out."""
        layers: dict[str, dict[str, float]] = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(noted):
            *names, entry, number = [str(getattr(key, "key", key)) for key in path]
            if entry == ENTRY:
                for layer, value in layer_paths(names, jax.device_get(leaf), axes=0):
                    layers.setdefault(layer, {})[number] = float(value)
        return cls(layers)

    def by_number(self) -> dict[str, list[float]]:
        """The values of all layers, by name."""
        values: dict[str, list[float]] = {}
        for of_layer in self.layers.values():
            for name, value in of_layer.items():
                values.setdefault(name, []).append(value)
        return values

    def summary(self) -> dict[str, Any]:
        """As it stands in summary.json: means over the layers, and maxima; what is infinite or undefined is null."""
        values = self.by_number()
        return {
            "mean": {name: short(sum(each) / len(each)) for name, each in values.items()},
            "max": {name: short(max(each)) for name, each in values.items()},
        }

    def metrics(self) -> dict[str, Any]:
        """As they stand in a line of metrics.jsonl: of each layer too."""
        if not self.layers:
            return {}
        layers = {
            path: {name: short(value) for name, value in of_layer.items()} for path, of_layer in self.layers.items()
        }
        return {"outliers": {**self.summary(), "layers": layers}}

    def table(self) -> list[str]:
        """Lines for people."""
        shown = lambda value: "-" if value is None else f"{value:.4g}"
        found = self.summary()
        return [
            f"{'outliers':24}  {'mean':>9}  {'maximum':>9}   (over the layers)",
            *(f"{name:24}  {shown(mean):>9}  {shown(found['max'][name]):>9}" for name, mean in found["mean"].items()),
        ]
