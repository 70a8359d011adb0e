"""Outputs of modules inside a Linen model: seen from outside, and replaced by those of another model.

Two collections that nothing else uses: CAPTURED, written, and GIVEN, read. Both pass through a `LayerStack`; a model's
own nn.scan must list them in `variable_axes`.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lowprec.errors import UsageError
from lowprec.nn.attention import CausalSelfAttention, grouped_attention
from lowprec.nn.stack import CAPTURED, GIVEN, is_run, module_path, run_layers, run_start
from lowprec.typing import Array

_OUTPUT, _MAP = "output", "map"

# What is captured of an attention is its map; of other modules their output.
MAP_SUFFIX = "/map"


def capture(model: Any, variables: Mapping[str, Any], *args, pattern: str, mutable: tuple[str, ...] = (), **kwargs):
    """The model's outputs, the changed collections, and the outputs of all modules whose path matches.

    Args:
      model: a Linen module, or one under a recipe.
      variables: its collections.
      pattern: a regular expression of whole paths, e.g. "layers/\\d+" for the blocks of a stack,
        "layers/\\d+/attention" for what their attention adds, "layers/\\d+/attention/map" for its weights. Inside a
        stack the path of the first layer of a run stands for all: a pattern must not tell layers apart.
      mutable: further collections to be returned.
    Returns:
      (outputs, changed, captured); captured is the collection CAPTURED.
    Raises:
      UsageError: (a ValueError) if no module matches.
    """
    with nn.intercept_methods(_Capture(re.compile(pattern))):
        outputs, changed = model.apply(variables, *args, mutable=[*mutable, CAPTURED], **kwargs)
    captured = changed.pop(CAPTURED, {}) if isinstance(changed, dict) else {}
    if not jax.tree.leaves(captured):
        raise UsageError(f"no module whose output could be captured matches {pattern!r}")
    return outputs, changed, captured


@contextmanager
def replacing(shares: Sequence[tuple[str, Any]]) -> Iterator[None]:
    """Within it, a model applied with a collection GIVEN has outputs replaced by what the collection holds.

    y becomes y + share · (given - y); where the share is 0 it is y itself, bit for bit, and where it is 1 what is
    given: then no gradient reaches what made y.

    Args:
      shares: pairs (pattern as in `capture`, share, which may be traced); the largest of those that match counts.
    """
    with nn.intercept_methods(_Replace([(re.compile(pattern), share) for pattern, share in shares])):
        yield


def whole(captured: Mapping[str, Any]) -> dict[str, Any]:
    """The collection CAPTURED as the collection GIVEN: the runs of each stack joined, so that any recipe can cut it."""
    if captured and all(map(is_run, captured)):
        runs = [captured[name] for name in sorted(captured, key=run_start)]
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *runs)
    return {name: whole(tree) if isinstance(tree, Mapping) else tree for name, tree in captured.items()}


def by_layer(captured: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The captured values of each layer, by its path, runs of a stack taken apart."""
    found: dict[str, jax.Array] = {}
    for name, tree in captured.items():
        if is_run(name):
            layers = run_layers(name)
            for index in range(layers.start, layers.stop):
                layer = by_layer(jax.tree.map(lambda leaf, at=index - layers.start: leaf[at], tree))
                found |= {f"{index}/{path}": leaf for path, leaf in layer.items()}
        elif isinstance(tree, Mapping):
            found |= {f"{name}/{path}": leaf for path, leaf in by_layer(tree).items()}
        else:
            found[name] = tree
    return found


class _Interceptor(ABC):
    """Hands what modules make to `change`, where it serves."""

    @abstractmethod
    def serves(self, module: nn.Module, path: str, name: str) -> bool:
        """Whether the value of this name is asked for; the path is that of the module, or of its map."""

    @abstractmethod
    def change(self, module: nn.Module, path: str, name: str, y: Array) -> Array:
        """What takes the place of the value."""

    def __call__(self, next_function, args, kwargs, context):
        module = context.module
        if context.method_name != "__call__" or module.is_initializing():
            return next_function(*args, **kwargs)
        path = module_path(module)
        if isinstance(module, CausalSelfAttention) and self.serves(module, path + MAP_SUFFIX, _MAP):
            with _core(module, lambda weights: self.change(module, path + MAP_SUFFIX, _MAP, weights)):
                y = next_function(*args, **kwargs)
        else:
            y = next_function(*args, **kwargs)
        return self.change(module, path, _OUTPUT, y) if self.serves(module, path, _OUTPUT) else y


@dataclass
class _Capture(_Interceptor):
    pattern: re.Pattern

    def serves(self, module, path, name):
        return self.pattern.fullmatch(path) is not None

    def change(self, module, path, name, y):
        module.put_variable(CAPTURED, name, y)
        return y


@dataclass
class _Replace(_Interceptor):
    shares: list[tuple[re.Pattern, Any]]

    def serves(self, module, path, name):
        return module.has_variable(GIVEN, name) and any(pattern.fullmatch(path) for pattern, _ in self.shares)

    def change(self, module, path, name, y):
        matching = [jnp.asarray(share) for pattern, share in self.shares if pattern.fullmatch(path)]
        share, given = jnp.max(jnp.stack(matching)), module.get_variable(GIVEN, name).astype(y.dtype)
        mixed = y + share.astype(y.dtype) * (given - y)
        return jnp.where(share <= 0, y, jnp.where(share >= 1, given, mixed))


@contextmanager
def _core(module: CausalSelfAttention, change):
    """The attention's weights pass through `change` before they meet the values."""
    before = module.core

    def core(q, k, v, scores_einsum, context_einsum, **options):
        changed = lambda subscripts, weights, values: context_einsum(subscripts, change(weights), values)
        return (before or grouped_attention)(q, k, v, scores_einsum, changed, **options)

    object.__setattr__(module, "core", core)
    try:
        yield
    finally:
        object.__setattr__(module, "core", before)
