"""Which rule of a recipe serves which product of a model, and what is said where one cannot: for every adapter."""

import difflib
from dataclasses import dataclass, field
from typing import Any

from lowprec.errors import UsageError
from lowprec.ops import GemmRule
from lowprec.ops.saved import Policy
from lowprec.recipes import Recipe


@dataclass
class RuleLookup:
    """The rules of a recipe, and which of them were asked for.

    Attributes:
      rules: of the products asked for, by path.
      used: indices of the rules that serve one.
      policies: of the norms, gates and attentions asked for, by path: how their inputs are saved.
      used_policies: indices of the recipe's `saved` rules that serve one.
    """

    recipe: Recipe
    rules: dict[str, GemmRule] = field(default_factory=dict)
    used: set[int] = field(default_factory=set)
    policies: dict[str, Policy] = field(default_factory=dict)
    used_policies: set[int] = field(default_factory=set)

    def rule_for(self, path: str) -> GemmRule:
        rule = self.recipe.rule_for(path)
        self.used.add(self.recipe.match(path))
        self.rules[path] = rule
        return rule

    def policy_for(self, path: str) -> Policy:
        self.policies[path] = self.recipe.saved_for(path)
        self.used_policies.add(self.recipe.match_saved(path))
        return self.policies[path]

    def check_every_rule_was_used(self) -> None:
        self._check_every_policy_was_used()
        rules: tuple[Any, ...] = tuple(self.recipe.rules)
        for index, rule in enumerate(rules):
            if index not in self.used and not rule.optional:
                near = difflib.get_close_matches(rule.pattern, self.rules, n=4, cutoff=0.3) or list(self.rules)[:8]
                advice = f"the nearest paths are {', '.join(near)}" if near else "the model has no linear layer"
                taken = [path for path in self.rules if rule.matches(path)]
                if taken:
                    advice = f"earlier rules take {', '.join(taken[:4])}"
                raise UsageError(f"rule {rule.pattern!r} of recipe {self.recipe.name!r} serves no layer; {advice}")

    def _check_every_policy_was_used(self):
        rules: tuple[Any, ...] = tuple(self.recipe.saved)
        for index, rule in enumerate(rules):
            if index not in self.used_policies and not rule.optional:
                paths = self.policies
                near = difflib.get_close_matches(rule.pattern, paths, n=4, cutoff=0.3) or list(paths)[:8]
                advice = f"the nearest paths are {', '.join(near)}" if near else "the model has none within reach"
                raise UsageError(
                    f"pattern {rule.pattern!r} of recipe {self.recipe.name!r} saves the inputs of no norm, gate or "
                    f"attention; {advice}"
                )

    def not_recomputed(self, path: str) -> UsageError:
        """Of a product outside of a `LayerStack` whose input is to be computed again."""
        return UsageError(
            f"recipe {self.recipe.name!r} has the input of {path!r} computed again, which only a block of a LayerStack "
            f"knows how to do; put a rule {path!r} with another policy before the others"
        )

    def saved_and_quantized(self, path: str) -> UsageError:
        """Of an attention whose products are quantized, and would be so again in the backward pass."""
        return UsageError(
            f"recipe {self.recipe.name!r} saves the inputs of {path!r} and quantizes its products: do one or the other"
        )

    def without_hook(self, path: str, kind: str) -> UsageError:
        """Of a layer that multiplies by weights and cannot be handed a product."""
        return UsageError(
            f"recipe {self.recipe.name!r} names layer {path!r}, an {kind}, whose product is not quantized; "
            f"put a rule {path!r}: KEEP before the others"
        )

    def own_product(self, path: str, hook: str) -> UsageError:
        """Of a layer whose hook is taken by the model."""
        return UsageError(f"layer {path!r} has a {hook} of its own; KEEP it in recipe {self.recipe.name!r}")


def product_path(path: str, name: str) -> str:
    """The path of a product of a layer; one that the layer has alone goes by its path."""
    return "/".join(filter(None, (path, name)))
