"""Recipe: which layer gets which GemmRule. A method is a value; the difference of two methods is one of two values."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lowprec.errors import UsageError
from lowprec.ops import KEEP, GemmRule


@dataclass(frozen=True)
class LayerRule:
    """The GemmRule of the layers whose whole path matches a regular expression.

    Args:
      pattern: matched against the path of a layer, e.g. "layers/3/attention/query"; the first rule that matches wins.
      gemm: what happens to its products.
      optional: whether it may match no layer of a model; any other rule that matches none is an error.
    """

    pattern: str
    gemm: GemmRule
    optional: bool = False

    def __post_init__(self):
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UsageError(f"the layer pattern {self.pattern!r} is not a regular expression: {error}") from None

    def matches(self, path: str) -> bool:
        return re.fullmatch(self.pattern, path) is not None


@dataclass(frozen=True)
class Recipe:
    """A method of low-precision training: ordered rules on layer paths.

    Args:
      name: by which it is known; of a short-form recipe, the text itself.
      rules: pairs (pattern, GemmRule) in order, as a mapping or a tuple of `LayerRule`.
      source: where the method is described.
    """

    name: str
    rules: Mapping[str, GemmRule] | tuple[LayerRule, ...]
    source: str = ""

    def __post_init__(self):
        rules = self.rules
        if isinstance(rules, Mapping):
            rules = tuple(LayerRule(pattern, gemm) for pattern, gemm in rules.items())
        object.__setattr__(self, "rules", tuple(rules))
        if not self.rules:
            raise UsageError(f"recipe {self.name!r} has no rule; leave everything as it is with {{'.*': KEEP}}")

    def match(self, path: str) -> int | None:
        """The index of the first rule that matches a layer path."""
        return next((index for index, rule in enumerate(self.rules) if rule.matches(path)), None)

    def rule_for(self, path: str) -> GemmRule:
        """The GemmRule of a layer.

        Raises:
          UsageError: (a ValueError) if no rule matches.
        """
        index = self.match(path)
        if index is None:
            patterns = ", ".join(repr(rule.pattern) for rule in self.rules)
            raise UsageError(
                f"recipe {self.name!r} has no rule for layer {path!r} (its patterns: {patterns}); "
                "close the list with '.*', or KEEP the layer"
            )
        return tuple(self.rules)[index].gemm

    @property
    def stochastic(self) -> bool:
        """Whether training with it needs a key."""
        return any(rule.gemm.stochastic for rule in self.rules)

    def describe(self) -> str:
        """A table for people: which layers, which product, which operand, quantized how."""
        from lowprec.recipes.describe import describe  # reads nothing but this class

        return describe(self)

    def __str__(self):
        return self.name


# Never quantized unless a recipe says so: the embedding table's product and the head (spec of every method here).
EMBEDDINGS_AND_HEAD = LayerRule(
    r"(.*/)?(embed|embedding|head|lm_head|logits|classifier)(_\d+)?(/.*)?", KEEP, optional=True
)


def everywhere(name: str, gemm: GemmRule, source: str = "") -> Recipe:
    """The usual scope: all linear layers except embeddings and the head."""
    return Recipe(name, (EMBEDDINGS_AND_HEAD, LayerRule(".*", gemm)), source)
