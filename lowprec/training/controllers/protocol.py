"""What a controller is, and where in the state it finds the products whose formats it sets."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax

from lowprec.nn.stack import is_run, layer_paths, run_start
from lowprec.quantizers import OPERANDS
from lowprec.typing import Array, Float

Tree = Any


class Signals(NamedTuple):
    """What a controller sees of a step."""

    loss: Float[Array, ""]
    params: Tree  # after the update
    gradients: Tree  # of the parameters
    key: jax.Array
    progress: Float[Array, ""]  # the part of the run before the step


class Controller(Protocol):
    """Pure functions of arrays; a frozen dataclass."""

    def init(self, params: Tree, quant: Tree, key: jax.Array) -> tuple[Tree, Tree]:
        """(memory, quant): before the first step."""

    def update(self, memory: Tree, quant: Tree, signals: Signals) -> tuple[Tree, Tree, dict[str, Array | Tree]]:
        """(memory, quant, metrics) after a step.

        Metrics are of the step that was taken: numbers, and trees over the products with a number a layer.
        """


def map_products(function: Callable, quant: Tree, *trees: Tree, path: tuple[str, ...] = ()) -> Tree:
    """function(path, state, *entries) for each product with state: a tree of the results, nested as "quant" is.

    Args:
      function: gets the path of the product, its operands' states by name, and the entries of the trees.
      trees: nested the same.
    """
    if set(quant) & set(OPERANDS):
        return function(path, quant, *trees)
    inner = {name: below for name, below in quant.items() if isinstance(below, Mapping)}
    return {
        name: map_products(function, below, *(tree[name] for tree in trees), path=(*path, name))
        for name, below in inner.items()
    }


def weights_at(tree: Tree, path: tuple[str, ...], stacked: tuple[int, ...]) -> Float[Array, "..."]:
    """The weights of a product in the parameters, or in their gradients: (*stacked, values), float32.

    Args:
      path: of the product in "quant", with the runs of a `LayerStack`.
      stacked: the axes of stacked layers, which the product's state has.
    """
    rows = slice(None)
    for name in path:
        if is_run(name):
            rows = slice(run_start(name), run_start(name) + stacked[0])
        else:
            tree = tree[name]
    weights = tree["kernel"] if "kernel" in tree else tree["embedding"]
    return weights[rows].astype("float32").reshape(*stacked, -1)


def by_layer(tree: Tree, path: tuple[str, ...] = ()) -> dict[str, float]:
    """Layer path -> number, of a tree over the products with a number a layer."""
    if isinstance(tree, Mapping):
        return {layer: value for name, below in tree.items() for layer, value in by_layer(below, (*path, name)).items()}
    return {layer: float(value) for layer, value in layer_paths(path, jax.device_get(tree), axes=0)}
