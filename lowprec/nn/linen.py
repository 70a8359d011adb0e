"""Recipes on Flax Linen models: `quantize(module, recipe)` changes neither the model's code nor its parameters.

While the model runs, `nn.intercept_methods` hands each linear layer the product that its rule asks for, through the
layer's own `dot_general` hook. Randomness comes from the stream "quant"; error statistics leave as the cotangent of
the collection "taps".
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lowprec.errors import UsageError
from lowprec.nn.stack import LayerStack, Segments, module_path
from lowprec.ops import GemmRule, qdot
from lowprec.quantizers import OperandStatistics, read_taps, tap_slot
from lowprec.recipes import Recipe, parse

STREAM, TAPS = "quant", "taps"

# Layers that multiply by weights without a hook for the product.
_WITHOUT_HOOK = (nn.Einsum, nn.Conv, nn.ConvLocal, nn.ConvTranspose)


def quantize(module: nn.Module, recipe: Recipe | str, *, backend: str = "auto") -> "QuantizedModule":
    """The model with its linear layers quantized by a recipe.

    Served are nn.Dense, nn.DenseGeneral (hence the projections of nn.MultiHeadDotProductAttention) and
    nn.Embed.attend, in loops, nn.scan and nn.remat. A model's own nn.scan must list "quant" in `split_rngs` when the
    recipe is stochastic, and "taps" in `variable_axes` to be measured.

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
        """As `module.init`; the same values."""
        return self._run(self.module.init, True, (rngs, *args), kwargs)

    def init_with_output(self, rngs, *args, **kwargs):
        return self._run(self.module.init_with_output, True, (rngs, *args), kwargs)

    def apply(self, variables, *args, **kwargs):
        """As `module.apply`."""
        return self._run(self.module.apply, kwargs.get("method") is None, (variables, *args), kwargs)

    def layers(self, *args, **kwargs) -> dict[str, GemmRule]:
        """The path and rule of every layer that a recipe can reach, for inputs as given."""
        return self._trace(args, kwargs)[1].rules

    def tap_slots(self, *args, **kwargs) -> dict[str, Any]:
        """The collection "taps" for inputs as given: zeros, whose cotangent `tap_statistics` reads."""
        shapes, _ = self._trace(args, kwargs)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes.get(TAPS, {}))

    def _run(self, function: Callable, complete: bool, args, kwargs):
        injection = _Injection(self.recipe, self.backend)
        with nn.intercept_methods(injection):
            result = function(*args, **kwargs)
        if complete:
            injection.check_every_rule_was_used()
        return result

    def _trace(self, args, kwargs):
        injection = _Injection(self.recipe, self.backend, collect=True)
        rngs = {"params": jax.random.key(0), STREAM: jax.random.key(0)}
        with nn.intercept_methods(injection):
            shapes = jax.eval_shape(lambda *args: self.module.init(rngs, *args, **kwargs), *args)
        injection.check_every_rule_was_used()
        return shapes, injection


def tap_statistics(cotangents: dict[str, Any]) -> dict[str, dict[str, OperandStatistics]]:
    """The error statistics of each layer, by path and operand, from the gradient with respect to the taps."""
    statistics = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(cotangents):
        names = [str(getattr(entry, "key", entry)) for entry in path[:-1]]
        for prefix, slot in _unstacked("/".join(names), jax.device_get(leaf)):
            statistics[prefix] = read_taps(slot)
    return statistics


def _unstacked(path, leaf):
    """The slots of one layer; of a stack, one after the other, its index after the name of the stack."""
    if leaf.ndim == 2:
        return [(path, leaf)]
    head, _, tail = path.partition("/")
    return [
        pair
        for i, part in enumerate(leaf)
        for pair in _unstacked(f"{head}/{i}/{tail}" if tail else f"{path}/{i}", part)
    ]


@dataclass
class _Injection:
    """The interceptor of one run: gives layers their products and notes which rule served which layer."""

    recipe: Recipe
    backend: str
    collect: bool = False
    rules: dict[str, GemmRule] = field(default_factory=dict)
    used: set[int] = field(default_factory=set)
    seen_inside: list[str] | None = None  # while looking into a block of a stack: its linear layers

    def __call__(self, next_function, args, kwargs, context):
        module, method = context.module, context.method_name
        if self.seen_inside is not None:
            if method == "__call__" and isinstance(module, (nn.Dense, nn.DenseGeneral, *_WITHOUT_HOOK)):
                self.seen_inside.append(module_path(module))
            return next_function(*args, **kwargs)
        if method == "__call__" and isinstance(module, LayerStack):
            return self._run_with(module, "segments", self._segments(module, args, kwargs), next_function, args, kwargs)
        if method == "attend" and isinstance(module, nn.Embed):
            rule = self._rule_for(module_path(module))
            return next_function(*args, **kwargs) if rule.exact else self._attend(module, rule, *args, **kwargs)
        if method != "__call__":
            return next_function(*args, **kwargs)
        if isinstance(module, _WITHOUT_HOOK):
            self._refuse_unless_kept(module)
        elif isinstance(module, nn.Dense | nn.DenseGeneral):
            path = module_path(module)
            rule = self._rule_for(path)
            if not rule.exact:
                if module.dot_general is not None or module.dot_general_cls is not None:
                    raise UsageError(
                        f"layer {path!r} has a dot_general of its own; KEEP it in recipe {self.recipe.name!r}"
                    )
                return self._run_with(module, "dot_general", self._product(module, rule), next_function, args, kwargs)
        return next_function(*args, **kwargs)

    def check_every_rule_was_used(self) -> None:
        for index, rule in enumerate(self.recipe.rules):
            if index not in self.used and not rule.optional:
                near = difflib.get_close_matches(rule.pattern, self.rules, n=4, cutoff=0.3) or list(self.rules)[:8]
                advice = f"the nearest paths are {', '.join(near)}" if near else "the model has no linear layer"
                taken = [path for path in self.rules if rule.matches(path)]
                if taken:
                    advice = f"earlier rules take {', '.join(taken[:4])}"
                raise UsageError(f"rule {rule.pattern!r} of recipe {self.recipe.name!r} serves no layer; {advice}")

    def _rule_for(self, path: str) -> GemmRule:
        rule = self.recipe.rule_for(path)
        self.used.add(self.recipe.match(path))
        self.rules[path] = rule
        return rule

    def _product(self, module, rule):
        def dot_general(x, w, dimension_numbers, precision=None, preferred_element_type=None, **_):
            key = module.make_rng(STREAM) if rule.stochastic and module.has_rng(STREAM) else None
            taps = None
            if self.collect:
                taps = module.variable(TAPS, "sums", tap_slot).value
            elif module.has_variable(TAPS, "sums"):
                taps = module.get_variable(TAPS, "sums")
            return qdot(x, w, rule, key=key, dimension_numbers=dimension_numbers, taps=taps, backend=self.backend)

        return dot_general

    def _attend(self, module, rule, query):
        query, embedding = module.promote_dtype(query, module.embedding, dtype=module.dtype)
        dimension_numbers = (((query.ndim - 1,), (1,)), ((), ()))
        return self._product(module, rule)(query, embedding, dimension_numbers)

    def _refuse_unless_kept(self, module):
        path = module_path(module)
        if not self._rule_for(path).exact:
            kind = type(module).__name__
            raise UsageError(
                f"recipe {self.recipe.name!r} names layer {path!r}, an nn.{kind}, whose product is not quantized; "
                f"put a rule {path!r}: KEEP before the others, or write it with nn.DenseGeneral"
            )

    def _run_with(self, module, name, value, next_function, args, kwargs):
        before = getattr(module, name)
        object.__setattr__(module, name, value)
        try:
            return next_function(*args, **kwargs)
        finally:
            object.__setattr__(module, name, before)

    def _segments(self, stack: LayerStack, args, kwargs) -> Segments:
        """Runs of layers whose inner layers all follow the same rules."""
        prefix = module_path(stack)
        inner = self._inner_paths(stack, args, kwargs)
        kinds = [tuple(self.recipe.rule_for(f"{prefix}/{i}/{path}") for path in inner) for i in range(stack.length)]
        for index in range(stack.length):
            for path in inner:
                self._rule_for(f"{prefix}/{index}/{path}")
        starts = [i for i in range(stack.length) if i == 0 or kinds[i] != kinds[i - 1]]
        return tuple(zip(starts, [*starts[1:], stack.length], strict=True))

    def _inner_paths(self, stack, args, kwargs):
        self.seen_inside = []
        jax.eval_shape(lambda *args: stack.block("").init(jax.random.key(0), *args, **kwargs), *args)
        paths, self.seen_inside = tuple(dict.fromkeys(self.seen_inside)), None
        return paths
