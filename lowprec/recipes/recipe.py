"""Recipe: which layer gets which GemmRule. A method is a value; the difference of two methods is one of two values."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from lowprec.errors import UsageError
from lowprec.ops import KEEP, GemmRule
from lowprec.ops.saved import Codes, Exact, Policy
from lowprec.quantizers import EXACT, REUSE, Quantizer
from lowprec.recipes.controllers import Control
from lowprec.recipes.hooks import LossScaling
from lowprec.recipes.outer_layers import OuterLayers


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
        _check_pattern(self.pattern)

    def matches(self, path: str) -> bool:
        return re.fullmatch(self.pattern, path) is not None


@dataclass(frozen=True)
class SavedRule:
    """How the inputs of the norms, gates and attentions are saved whose whole path matches a regular expression.

    Args:
      pattern: as in `LayerRule`; e.g. "layers/3/mlp_norm", "layers/3/mlp/gating", "layers/3/attention/core".
      policy: of `ops.saved`; what matches no pattern is differentiated as usual.
      optional: as in `LayerRule`.
    """

    pattern: str
    policy: Policy
    optional: bool = False

    def __post_init__(self):
        _check_pattern(self.pattern)
        if not isinstance(self.policy, Policy) or isinstance(self.policy, Codes):
            raise UsageError(
                f"saved inputs of {self.pattern!r}: Exact, Stored, RunningUint8 and Recompute are policies for them, "
                f"not {self.policy!r}"
            )

    def matches(self, path: str) -> bool:
        return re.fullmatch(self.pattern, path) is not None


def _check_pattern(pattern):
    try:
        re.compile(pattern)
    except re.error as error:
        raise UsageError(f"the layer pattern {pattern!r} is not a regular expression: {error}") from None


@dataclass(frozen=True)
class Recipe:
    """A method of low-precision training: ordered rules on layer paths.

    Args:
      name: by which it is known; of a short-form recipe, the text itself.
      rules: pairs (pattern, GemmRule) in order, as a mapping or a tuple of `LayerRule`.
      source: where the method is described.
      loss_scaling: done by the training step.
      saved: pairs (pattern, policy) in order, as a mapping or a tuple of `SavedRule`: what norms, gates and attentions
        keep of their inputs for the backward pass. (Of products a GemmRule says it.)
      keeping: layers at both ends of the model that are left as they are; `for_layers` says which these are.
      control: of formats that are state, by the training step.
    """

    name: str
    rules: Mapping[str, GemmRule] | tuple[LayerRule, ...]
    source: str = ""
    loss_scaling: LossScaling | None = None
    saved: Mapping[str, Policy] | tuple[SavedRule, ...] = ()
    keeping: OuterLayers | None = None
    control: Control | None = None

    def __post_init__(self):
        rules = self.rules
        if isinstance(rules, Mapping):
            rules = tuple(LayerRule(pattern, gemm) for pattern, gemm in rules.items())
        object.__setattr__(self, "rules", tuple(rules))
        saved = self.saved
        if isinstance(saved, Mapping):
            saved = tuple(SavedRule(pattern, policy) for pattern, policy in saved.items())
        object.__setattr__(self, "saved", tuple(saved))
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
        if self.keeping is not None:
            raise UsageError(f"recipe {self.name!r} keeps outer layers: say of how many, recipe.for_layers(12)")
        index = self.match(path)
        if index is None:
            patterns = ", ".join(repr(rule.pattern) for rule in self.rules)
            raise UsageError(
                f"recipe {self.name!r} has no rule for layer {path!r} (its patterns: {patterns}); "
                "close the list with '.*', or KEEP the layer"
            )
        return tuple(self.rules)[index].gemm

    def match_saved(self, path: str) -> int | None:
        """The index of the first of the `saved` rules that matches the path of a norm, a gate or an attention."""
        return next((index for index, rule in enumerate(self.saved) if rule.matches(path)), None)

    def saved_for(self, path: str) -> Policy:
        """How the inputs of a norm, a gate or an attention are saved; `Exact` where no pattern matches."""
        index = self.match_saved(path)
        return Exact() if index is None else tuple(self.saved)[index].policy

    def for_layers(self, layers: int) -> "Recipe":
        """The recipe for a model of so many layers, in which it keeps the first and the last of `keeping`.

        Raises:
          UsageError: (a ValueError) if no layer would be left to quantize.
        """
        if self.keeping is None:
            return self
        kept = LayerRule(self.keeping.pattern(layers), KEEP)
        return replace(self, rules=(kept, *self.rules), keeping=None)

    @property
    def stochastic(self) -> bool:
        """Whether training with it needs a key."""
        return any(rule.policy.stochastic for rule in self.saved) or any(rule.gemm.stochastic for rule in self.rules)

    @property
    def learns(self) -> bool:
        """Whether its quantizers have parameters."""
        return any(rule.gemm.learns for rule in self.rules)

    @property
    def remembers(self) -> bool:
        """Whether its quantizers have state."""
        return any(rule.policy.remembers for rule in self.saved) or any(rule.gemm.remembers for rule in self.rules)

    def describe(self, device: str | None = None, backend: str = "auto") -> str:
        """A table for people: which layers, which product, which operand, quantized how; who computes the products.

        Args:
          device: on which, e.g. "NVIDIA H200" (`pallas.target.KNOWN`); None: the one of this process.
          backend: see `ops.qdot`.
        """
        from lowprec.recipes.describe import describe  # reads nothing but this class

        return describe(self, device, backend)

    def __str__(self):
        return self.name


# Never quantized unless a recipe says so: the embedding table's product and the head (spec of every method here).
EMBEDDINGS_AND_HEAD = LayerRule(
    r"(.*/)?(embed|embedding|wte|wpe|tok_embeddings|head|lm_head|logits|classifier)(_\d+)?(/.*)?", KEEP, optional=True
)


# The two products of attention have activations on both sides.
ATTENTION_PRODUCTS = LayerRule(r"(.*/)?(scores|context)", KEEP, optional=True)


def everywhere(name: str, gemm: GemmRule, source: str = "") -> Recipe:
    """The usual scope: all linear layers except embeddings and the head, and not the products inside attention."""
    return Recipe(name, (EMBEDDINGS_AND_HEAD, ATTENTION_PRODUCTS, LayerRule(".*", gemm)), source)


def forward_only(name: str, x: Quantizer, w: Quantizer, source: str, *, normalize_input: bool = False) -> Recipe:
    """A quantized forward pass; gradients of the quantized operands in high precision."""
    backward = (EXACT, REUSE)
    gemm = GemmRule(fwd=(x, w), dgrad=backward, wgrad=backward, normalize_input=normalize_input)
    return everywhere(name, gemm, source)
