"""Learned quantizer parameters of one recipe, as far as another has the same ones."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from lowprec.nn.stack import is_run, run_layers
from lowprec.quantizers import OPERANDS, Quantizer
from lowprec.quantizers.variables import Differentiable
from lowprec.recipes import Recipe


def carried(
    recipe: Recipe, learned: Mapping[str, Any], before: Recipe, learned_before: Mapping[str, Any]
) -> dict[str, Any]:
    """The collection "quant_params" of a recipe, with what was learned under another one.

    Carried over, layer by layer, are the parameters of operands that both recipes quantize alike, or by rules that read
    the same parameters (`Differentiable.reads_parameters_of`): all widths of nested weights have one set of steps.
    Layers may be scanned together otherwise than before.

    Args:
      learned: as it starts under the recipe; where nothing is carried over it stays.
      before, learned_before: the other recipe, and its collection.
    """
    known = {place: (q, values) for place, q, values in _operands(before, learned_before)}
    return _walk(recipe, (), learned, known)


def _walk(recipe, path, tree, known):
    if set(tree) & set(OPERANDS):
        return {name: _carried_operand(recipe, path, name, values, known) for name, values in tree.items()}
    return {name: _walk(recipe, (*path, name), below, known) for name, below in tree.items()}


def _carried_operand(recipe, path, name, values, known):
    for index, layer in _layers(path):
        q = recipe.rule_for(layer).operands()[name]
        earlier, found = known.get((layer, name), (None, {}))
        if earlier is not None and _same_parameters(q, earlier) and _shapes(found) == _shapes(values, index):
            if index is None:
                return found
            values = jax.tree.map(lambda whole, own, index=index: whole.at[index].set(own), values, found)
    return values


def _operands(
    recipe: Recipe, tree: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, str], Quantizer, Any]]:
    """(layer path, operand), its quantizer, and its parameters, of every layer."""
    for name, below in tree.items():
        if name not in OPERANDS:
            yield from _operands(recipe, below, (*path, name))
            continue
        for index, layer in _layers(path):
            own = below if index is None else jax.tree.map(lambda leaf, index=index: leaf[index], below)
            yield (layer, name), recipe.rule_for(layer).operands()[name], own


def _layers(path: Sequence[str]) -> list[tuple[int | None, str]]:
    """(index in its run, path) of each layer of a product; None where layers are not stacked."""
    place = next((index for index, name in enumerate(path) if is_run(name)), None)
    if place is None:
        return [(None, "/".join(path))]
    rows = run_layers(path[place])
    named = lambda layer: "/".join((*path[:place], str(layer), *path[place + 1 :]))
    return [(index, named(layer)) for index, layer in enumerate(range(rows.start, rows.stop))]


def _same_parameters(q: Quantizer, before: Quantizer) -> bool:
    if not isinstance(q.scale, Differentiable) or not isinstance(before.scale, Differentiable):
        return False
    return q.format == before.format and q.scale.reads_parameters_of(before.scale)


def _shapes(tree, index: int | None = None):
    return {name: leaf.shape if index is None else leaf.shape[1:] for name, leaf in tree.items()}
