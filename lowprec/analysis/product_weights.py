"""The weights of a model's products as variables: what sensitivities are measured of, and candidate formats tried on.

A recipe that puts a variable in the place of each product's weights makes the loss a function of them, whatever the
layers are, stacked or not: (…, K, N), K contracted, just as the quantizers of a recipe see them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lowprec.errors import unknown
from lowprec.formats.grammar import parse
from lowprec.nn.linen import LEARNED, QuantizedModule, quantize
from lowprec.nn.stack import layer_paths
from lowprec.ops import GemmRule
from lowprec.ops.operand import CONTRACTION
from lowprec.quantizers import EXACT, QTensor, Quantizer
from lowprec.quantizers import quantize as stored
from lowprec.quantizers.variables import Differentiable
from lowprec.recipes import Recipe, everywhere
from lowprec.typing import Array, Float

Tree = Any
_AXIS = CONTRACTION["fwd.w"]


@dataclass(frozen=True)
class AsVariable(Differentiable):
    """The weights are the learned parameter, which starts as the weights given."""

    def initial_params(self, x, fmt, axis):
        return {"weight": x.astype(jnp.float32)}

    def quantize(self, x, fmt, axis, params, state, key):
        return params["weight"], jnp.ones(x.shape, bool)

    def __str__(self):
        return "as a variable"


WEIGHTS = everywhere("weights as variables", GemmRule(fwd=(EXACT, Quantizer("float32", scale=AsVariable()))))


@dataclass(frozen=True)
class ProductWeights:
    """A Linen model whose products take their weights from a tree of their own.

    Args:
      model: plain.
      scope: the recipe that says which products; all but embeddings, head and attention unless given.
    """

    model: nn.Module
    scope: Recipe = WEIGHTS

    @property
    def module(self) -> QuantizedModule:
        return quantize(self.model, self.scope)

    def weights(self, variables: Mapping[str, Any], *inputs) -> Tree:
        """Those of a model's variables: leaves (…, K, N), float32, of stacked layers with their number in front."""
        return self.module.apply(variables, *inputs, mutable=[LEARNED])[1][LEARNED]

    def apply(self, variables: Mapping[str, Any], weights: Tree, *inputs, **kwargs):
        """The model with these weights; embeddings, biases and whatever else there is come from its variables."""
        return self.module.apply({**variables, LEARNED: weights}, *inputs, **kwargs)


def rounded(weights: Tree, fmt: str) -> Tree:
    """All weights in a format, by the absmax scales of a recipe's short form."""
    quantizer = Quantizer(fmt, pad=True)
    return jax.tree.map(lambda leaf: _each_matrix(lambda w: quantizer.round(w, _AXIS).values, leaf), weights)


def stored_bytes(weights: Tree, fmt: str) -> Tree:
    """Bytes of codes and scales of each layer in a format, an int a leaf."""

    def of_leaf(leaf):
        matrix = jax.ShapeDtypeStruct(leaf.shape[-2:], jnp.float32)
        q: QTensor = jax.eval_shape(partial(stored, fmt=parse(fmt), axis=_AXIS, pad=True), matrix)
        return sum(part.size * part.dtype.itemsize for part in jax.tree.leaves(q))

    return jax.tree.map(of_leaf, weights)


def mixed(candidates: Mapping[str, Tree], choices: Mapping[str, str]) -> Tree:
    """The weights of each layer from the tree that was chosen for it.

    Args:
      candidates: name of a choice -> weights, e.g. `rounded` to a format.
      choices: layer path -> name.
    """
    names = list(candidates)
    for name in choices.values():
        if name not in candidates:
            raise unknown("candidate", name, names)
    some, *_ = candidates.values()

    def pick(path, *leaves):
        owners = list(layer_paths(_names(path), jnp.arange(_layers(leaves[0])).reshape(leaves[0].shape[:-2]), axes=0))
        chosen = jnp.array([names.index(choices[owner]) for owner, _ in owners]).reshape(leaves[0].shape[:-2])
        return sum(jnp.where((chosen == i)[..., None, None], leaf, 0) for i, leaf in enumerate(leaves))

    return jax.tree_util.tree_map_with_path(pick, some, *list(candidates.values())[1:])


def by_layer(tree: Tree) -> dict[str, float]:
    """Layer path -> value, from a tree with an entry a layer as `sensitivity` gives it."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    return {owner: float(value) for path, leaf in leaves for owner, value in layer_paths(_names(path), leaf, axes=0)}


def _names(path) -> Sequence[str]:
    """Of the module of a leaf, below which stand the operand and the parameter."""
    return [str(entry.key) for entry in path][:-2]


def _layers(leaf) -> int:
    return leaf[..., 0, 0].size


def _each_matrix(function: Callable, leaf: Float[Array, "... K N"]) -> Array:
    """Along the leading axes: scales of one layer are not those of another."""
    for _ in range(leaf.ndim - 2):
        function = jax.vmap(function)
    return function(leaf)
