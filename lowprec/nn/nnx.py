"""Recipes on Flax NNX models: `quantize(module, recipe, rngs)` gives the module's own layers quantized products.

Parameters stay the same `nnx.Param` at the same paths. Beside them the model gets `QuantParam`, learned quantizer
parameters; `QuantState`, what quantizers remember from step to step; `QuantTap`, zeros whose gradient carries
observations and statistics; and random streams "quant". A training step differentiates all it needs in one go:

    wrt = nnx.Any(flax.nnx.Param, QuantParam, QuantTap)
    gradients = flax.nnx.grad(loss, argnums=flax.nnx.DiffState(0, wrt))(module, batch)
    optimizer.update(module, flax.nnx.filter_state(gradients, flax.nnx.Param))  # and QuantParam, e.g. at its own rate
    nnx.next_state(module, gradients)
"""

from typing import Any

import jax
from flax import nnx

from lowprec.errors import UsageError
from lowprec.nn.nnx_layers import HOOKS, install, install_saved, policy_of, rules_of, stacked_axes
from lowprec.nn.nnx_nodes import Node, QuantParam, QuantState, QuantTap
from lowprec.nn.nnx_products import Product, Start
from lowprec.nn.nnx_saved import SiluGate
from lowprec.nn.products import STREAM, SUMS
from lowprec.nn.rules import RuleLookup
from lowprec.nn.stack import layer_paths
from lowprec.ops import GemmRule
from lowprec.ops.saved import Exact
from lowprec.quantizers import OperandStatistics, read_taps
from lowprec.recipes import Recipe, parse

__all__ = [
    "QuantParam",
    "QuantState",
    "QuantTap",
    "SiluGate",
    "add_taps",
    "initialize",
    "layers",
    "next_state",
    "quantize",
    "remove_taps",
    "tap_statistics",
]


def quantize[M: nnx.Module](
    module: M,
    recipe: Recipe | str,
    rngs: nnx.Rngs | None = None,
    *,
    example: tuple[Any, ...] | None = None,
    backend: str = "auto",
) -> M:
    """The module with its products quantized by a recipe; it is changed in place.

    Served are nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Conv, nnx.Embed.attend and the two products of
    nnx.MultiHeadAttention, "<its path>/scores" and "<its path>/context"; inputs are saved of nnx.RMSNorm, LayerNorm,
    GroupNorm, `SiluGate`, and the "core" of nnx.MultiHeadAttention. Paths are attribute names: "layers/0/up". The
    layers of a stack made by `nnx.vmap` along axis 0 share a path and so a rule, each with its own noise, parameters
    and state; scan it with axis 0 for every variable.

    Args:
      module: any NNX module.
      recipe: a recipe, its name, or a short form.
      rngs: where random streams start: its stream "quant", else its default one. Needed where a product is rounded or
        rotated at random. Every call of a layer draws from its stream; after `module.eval()` only those that are random
        in the forward pass do.
      example: inputs for `initialize`, where the recipe learns.
      backend: see `ops.qdot`.
    Raises:
      UsageError: (a ValueError) for a rule that serves no layer or one that cannot be served, for a random recipe
        without rngs, and for layers stacked along another axis than the first.
    """
    lookup = RuleLookup(parse(recipe))
    modules = _modules(module)
    planned = [(path, layer, rules_of(lookup, path, layer)) for path, layer in modules]
    kept = [(path, layer, policy_of(lookup, path, layer)) for path, layer in modules]
    lookup.check_every_rule_was_used()
    planned = [(path, layer, rules) for path, layer, rules in planned if not all(rule.exact for rule in rules.values())]
    kept = [(path, layer, policy) for path, layer, policy in kept if not isinstance(policy, Exact)]
    random = [path for path, _, rules in planned if any(rule.stochastic for rule in rules.values())]
    random += [path for path, _, policy in kept if policy.stochastic]
    if random and (rngs is None or not {STREAM, "default"} & set(rngs)):
        raise UsageError(
            f"recipe {lookup.recipe.name!r} rounds or rotates at random, e.g. in layer {random[0]!r}: pass "
            "rngs=nnx.Rngs(quant=seed)"
        )
    # All axes are looked at before anything is changed: a stack that is refused stays as it was.
    products = [(path, layer, rules, stacked_axes(path, layer)) for path, layer, rules in planned]
    saved = [(path, layer, policy, stacked_axes(path, layer)) for path, layer, policy in kept]
    for path, layer, rules, lead in products:
        install(path, layer, rules, lead, rngs, backend)
    for path, layer, policy, lead in saved:
        install_saved(path, layer, policy, lead, rngs)
    return module if example is None else initialize(module, *example)


def initialize[M: nnx.Module](module: M, *inputs, **options) -> M:
    """Gives learned quantizer parameters their first values, in place: from the parameters and from the inputs.

    Nothing else of the module changes: it is a copy that runs.

    Args:
      inputs, options: of a call of the module: pass a batch of data.
    """
    if not any(product.rule.learns for _, product in _products(module)):
        return module
    copy = nnx.clone(module)
    for _, product in _products(copy):
        product.starting, product.learned = Start(), nnx.data({})
    run = lambda module: (module(*inputs, **options), None)[1]
    graph, state = nnx.split(copy)
    jax.eval_shape(lambda state: run(nnx.merge(graph, state)), state)
    for (_, product), (_, running) in zip(_products(module), _products(copy), strict=True):
        for same in (product, running):
            same.make_learned(running.starting.shapes)
    nnx.jit(run)(copy)
    nnx.update(module, nnx.state(copy, QuantParam))
    return module


def layers(module: nnx.Module) -> dict[str, GemmRule]:
    """The path and rule of every quantized product."""
    return {_layer(names): product.rule for names, product in _products(module)}


def next_state(module: nnx.Module, gradients: nnx.State) -> None:
    """Takes in what a step observed: the `QuantState` of the module after it, in place.

    Args:
      gradients: those with respect to `QuantTap`; others are left alone.
    """
    observed = {names: leaf[...] for names, leaf in nnx.to_flat_state(gradients) if isinstance(leaf, QuantTap)}
    for names, node in _nodes(module):
        slots = {name: observed.get((*names, "slots", name)) for name in node.slots}
        if any(slot is None for slot in slots.values()):
            raise UsageError(
                f"layer {_layer(names)!r} remembers, and the gradient with respect to its QuantTap is missing: "
                "nnx.grad(..., argnums=nnx.DiffState(0, nnx.Any(nnx.Param, QuantTap)))"
            )
        before = {name: {leaf: value[...] for leaf, value in state.items()} for name, state in node.state.items()}
        for name, state in node.after(before, slots).items():
            for leaf, value in state.items():
                node.state[name][leaf][...] = value


def add_taps(module: nnx.Module) -> None:
    """Makes a `QuantTap` for the error statistics of every product; their gradient is for `tap_statistics`."""
    for _, product in _products(module):
        product.add_sums()


def remove_taps(module: nnx.Module) -> None:
    """Undoes `add_taps`; what recipes that remember need stays."""
    for _, product in _products(module):
        product.sums = nnx.data(None)


def tap_statistics(gradients: nnx.State) -> dict[str, dict[str, OperandStatistics]]:
    """The error statistics of each product, by path and operand, from the gradient with respect to `QuantTap`.

    The index of a layer in a stack stands after the first name: "layers/0/up".
    """
    statistics = {}
    for (*names, last), leaf in nnx.to_flat_state(gradients):
        if isinstance(leaf, QuantTap) and last == SUMS:
            for path, slot in layer_paths(_layer_names(names), jax.device_get(leaf[...]), axes=2):
                statistics[path] = read_taps(slot)
    return statistics


def _modules(module):
    return [("/".join(map(str, names)), layer) for names, layer in nnx.iter_modules(module)]


def _nodes(module):
    return [(names, part) for names, part in nnx.iter_modules(module) if isinstance(part, Node)]


def _products(module):
    return [(names, node) for names, node in _nodes(module) if isinstance(node, Product)]


def _layer_names(names):
    """Those of the product that hangs on a hook at the end of `names`."""
    return [str(name) for index, name in enumerate(names) if index < len(names) - 2 or name not in HOOKS]


def _layer(names) -> str:
    return "/".join(_layer_names(names))
