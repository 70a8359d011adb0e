"""Recipes on Flax Linen models: `quantize(module, recipe)` changes neither the model's code nor its parameters.

While the model runs, `nn.intercept_methods` hands each layer the products that its rule asks for (`nn.injection`).
Randomness comes from the stream "quant". Beside "params" there are the collections "quant_params", learned quantizer
parameters; "quant", what quantizers remember from step to step; and "taps", zeros whose cotangent carries statistics.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lowprec.nn.injection import Injection
from lowprec.nn.places import LEARNED, STATE, TAPS, Collect
from lowprec.nn.products import STREAM, SUMS
from lowprec.nn.stack import first_layer, layer_paths
from lowprec.ops import GemmRule, next_state
from lowprec.ops.saved import SAVED_X, is_slot_name
from lowprec.quantizers import OPERANDS, OperandStatistics, read_taps
from lowprec.recipes import Recipe, parse

__all__ = ["LEARNED", "STATE", "STREAM", "TAPS", "QuantizedModule", "quantize", "tap_statistics"]


def quantize(module: nn.Module, recipe: Recipe | str, *, backend: str = "auto") -> "QuantizedModule":
    """The model with its products quantized by a recipe.

    Served are nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Conv, nn.Embed.attend and the two products of
    nn.MultiHeadDotProductAttention, "<its path>/scores" and "<its path>/context", in loops, nn.scan and nn.remat. A
    model's own nn.scan must list "quant" in `split_rngs` when the recipe is stochastic, and in `variable_axes`
    "quant_params" and "quant" when it learns or remembers, "taps" to be measured.

    Args:
      module: any Linen module.
      recipe: a recipe, its name, or a short form.
      backend: see `ops.qdot`.
    Returns:
      An object with init and apply like the module's. Parameters, their names and initial values are the module's;
      stochastic recipes need `rngs={"quant": key}` once a gradient is taken.
    """
    return QuantizedModule(module, parse(recipe), backend)


@dataclass(frozen=True)
class QuantizedModule:
    """A Linen module under a recipe; see `quantize`."""

    module: nn.Module
    recipe: Recipe
    backend: str = "auto"

    def init(self, rngs, *args, **kwargs) -> dict[str, Any]:
        """As `module.init`, the same parameters; with "quant_params" and "quant" where the recipe has them.

        Learned quantizer parameters start from the parameters and from the inputs given: pass a batch of data.
        """
        return self._run(self.module.init, True, (rngs, *args), kwargs)

    def init_with_output(self, rngs, *args, **kwargs):
        return self._run(self.module.init_with_output, True, (rngs, *args), kwargs)

    def init_quantizers(
        self, params, *args, rngs=None, model_state: Mapping[str, Any] = MappingProxyType({}), **kwargs
    ) -> dict[str, Any]:
        """The collections "quant_params" and "quant" for parameters that are there already, e.g. a plain checkpoint.

        Args:
          model_state: the model's own collections beside the parameters (batch norms'), mutable as in training.
        """
        collections = (LEARNED, STATE)
        arguments = ({"params": params, **model_state}, *args)
        mutable = (*collections, *model_state)
        _, made = self._run(self.module.apply, True, arguments, kwargs | {"mutable": mutable, "rngs": rngs})
        return {name: made[name] for name in collections if made.get(name)}

    def apply(self, variables, *args, **kwargs):
        """As `module.apply`."""
        return self._run(self.module.apply, kwargs.get("method") is None, (variables, *args), kwargs)

    def layers(self, *args, **kwargs) -> dict[str, GemmRule]:
        """The path and rule of every product that a recipe can reach, for inputs as given."""
        return self._trace(args, kwargs, "nothing")[1].lookup.rules

    def tap_slots(self, *args, **kwargs) -> dict[str, Any]:
        """The collection "taps" for inputs as given: zeros, whose cotangent `tap_statistics` and `next_state` read."""
        return self._slots(args, kwargs, "everything")

    def state_slots(self, *args, **kwargs) -> dict[str, Any]:
        """Those of the taps that `next_state` needs; empty where the recipe remembers nothing."""
        return self._slots(args, kwargs, "observations")

    def next_state(self, quant: dict[str, Any], cotangents: dict[str, Any]) -> dict[str, Any]:
        """The collection "quant" after a step.

        Args:
          quant: before it.
          cotangents: the gradient with respect to the taps.
        """
        return _next_state(self.recipe, (), quant, cotangents)

    def _run(self, function: Callable, complete: bool, args, kwargs):
        injection = Injection(self.recipe, self.backend)
        with nn.intercept_methods(injection):
            result = function(*args, **kwargs)
        if complete:
            injection.lookup.check_every_rule_was_used()
        return result

    def _slots(self, args, kwargs, collect: Collect):
        shapes, _ = self._trace(args, kwargs, collect)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes.get(TAPS, {}))

    def _trace(self, args, kwargs, collect: Collect):
        injection = Injection(self.recipe, self.backend, collect)
        rngs = {"params": jax.random.key(0), STREAM: jax.random.key(0)}
        with nn.intercept_methods(injection):
            shapes = jax.eval_shape(lambda *args: self.module.init(rngs, *args, **kwargs), *args)
        injection.lookup.check_every_rule_was_used()
        return shapes, injection


def tap_statistics(cotangents: dict[str, Any]) -> dict[str, dict[str, OperandStatistics]]:
    """The error statistics of each product, by path and operand, from the gradient with respect to the taps."""
    statistics = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(cotangents):
        names = [str(getattr(entry, "key", entry)) for entry in path]
        if names.pop() == SUMS:
            for layer, slot in layer_paths(names, jax.device_get(leaf), axes=2):
                statistics[layer] = read_taps(slot)
    return statistics


def _next_state(recipe, path, quant, cotangents):
    """Walks down to the places: nodes whose entries are operands of a product, or saved inputs."""
    if set(quant) & {*OPERANDS, SAVED_X}:
        return next_state(recipe.rule_for(first_layer(path)), quant, cotangents)
    if any(map(is_slot_name, quant)):
        policy = recipe.saved_for(first_layer(path))
        after = {name: policy.next_state(quant[name], seen) for name, seen in cotangents.items() if name in quant}
        return {**quant, **after}
    return {name: _next_state(recipe, (*path, name), quant[name], cotangents.get(name, {})) for name in quant}
