"""Where a Linen model multiplies, and how a recipe gets in: an interceptor for `nn.intercept_methods`.

Each layer keeps its code and its parameters; for the time of a call it is handed the product that its rule asks for,
through a hook that Flax provides. A layer has one product, named by its path, or several, named below it.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax

from lowprec.nn.attention import CONTEXT, SCORES, CausalSelfAttention, grouped_attention
from lowprec.nn.gates import SiluGate, silu_gate
from lowprec.nn.places import LEARNED, STATE, TAPS, Collect, Place
from lowprec.nn.products import SUMS, ProductForms
from lowprec.nn.rules import RuleLookup, product_path
from lowprec.nn.saved_layers import NORMS, SavedPlace, saved_name
from lowprec.nn.stack import LayerStack, is_stacked, module_path
from lowprec.ops import GemmRule, ProductVariables, canonical_variables, initial_memory
from lowprec.ops.einsum import bias_shape
from lowprec.ops.saved import SAVED_X, Exact, Recompute
from lowprec.quantizers import tap_slot
from lowprec.recipes import Recipe

ATTENTIONS = (nn.MultiHeadDotProductAttention, CausalSelfAttention)
# Layers that multiply by weights without a hook for the product.
_WITHOUT_HOOK = (nn.ConvLocal, nn.ConvTranspose)


@dataclass
class Injection:
    """The interceptor of one run: gives layers their products, saves inputs, and notes which rule served which.

    Args:
      collect: which tap slots to make.
    """

    recipe: Recipe
    backend: str
    collect: Collect = "nothing"
    lookup: RuleLookup = field(init=False)
    seen_inside: list[tuple[str, str]] | None = None  # while looking into a block of a stack: what can be reached
    aside: bool = False  # while a layer is applied as it is

    def __post_init__(self):
        self.lookup = RuleLookup(self.recipe)

    def __call__(self, next_function, args, kwargs, context):
        module, method = context.module, context.method_name
        call = lambda: next_function(*args, **kwargs)
        if self.aside:
            return call()
        products, part = product_names(module, method), saved_name(module, method)
        if self.seen_inside is not None:
            path = module_path(module)
            self.seen_inside += [("product", product_path(path, name)) for name in products]
            self.seen_inside += [("saved", product_path(path, part))] if part is not None else []
            return call()
        if method == "__call__" and isinstance(module, LayerStack):
            with _fields(module, **self._runs(module, args, kwargs)):
                return call()
        rules = {name: self.lookup.rule_for(product_path(module_path(module), name)) for name in products}
        policy = Exact() if part is None else self.lookup.policy_for(product_path(module_path(module), part))
        if _only_parameters(module):
            return call()
        if not isinstance(policy, Exact):
            place = SavedPlace(self.collect, module, part, policy)
            return self._saved(place, rules, call, args, kwargs)
        if all(rule.exact for rule in rules.values()):
            return call()
        if any(isinstance(rule.saved, Recompute) for rule in rules.values()) and not is_stacked(module):
            raise self.lookup.not_recomputed(module_path(module))
        if isinstance(module, ATTENTIONS):
            return self._attention(module, rules, call)
        product = Product(self.collect, module, "", rules[""], self.backend)
        if method == "attend":
            return self._attend(module, product, *args, **kwargs)
        if isinstance(module, nn.Einsum):
            return self._einsum(module, product, call, *args, **kwargs)
        if isinstance(module, nn.Conv):
            self._refuse_own_product(module, "conv_general_dilated", module.conv_general_dilated)
            with _fields(module, conv_general_dilated=product.conv):
                return call()
        if isinstance(module, _WITHOUT_HOOK):
            raise self.lookup.without_hook(module_path(module), f"nn.{type(module).__name__}")
        self._refuse_own_product(module, "dot_general", module.dot_general)
        with _fields(module, dot_general=product.dot_general):
            return call()

    def _attention(self, module, rules, call):
        products = {name: Product(self.collect, module, name, rule, self.backend) for name, rule in rules.items()}
        if isinstance(module, CausalSelfAttention):
            with _fields(module, scores_einsum=products[SCORES].einsum, context_einsum=products[CONTEXT].einsum):
                return call()
        with _fields(
            module,
            qk_attn_weights_einsum_cls=lambda: products[SCORES].einsum,
            attn_weights_value_einsum_cls=lambda: products[CONTEXT].einsum,
        ):
            return call()

    def _saved(self, place: SavedPlace, rules, call, args, kwargs):
        """A norm, a gate or an attention whose inputs are saved."""
        module = place.module
        if isinstance(module, NORMS):
            return place.norm(call, self._stand_aside, *args, **kwargs)
        if isinstance(module, SiluGate):
            return place.call(silu_gate, args)
        if not all(rule.exact for rule in rules.values()):
            raise self.lookup.saved_and_quantized(module_path(module))
        if isinstance(module, CausalSelfAttention):
            with _fields(module, core=place.core(module.core or grouped_attention)):
                return call()
        with _fields(module, attention_fn=place.core(module.attention_fn)):
            return call()

    @contextmanager
    def _stand_aside(self):
        before, self.aside = self.aside, True
        try:
            yield
        finally:
            self.aside = before

    def _attend(self, module, product, query):
        query, embedding = module.promote_dtype(query, module.embedding, dtype=module.dtype)
        return product.attend(query, embedding)

    def _einsum(self, module, product, call, inputs, einsum_str=None):
        """nn.Einsum has no hook: its parameters are made by its own call, its product is made here."""
        if module.is_initializing():
            call()
        subscripts = (einsum_str or module.einsum_str).replace(" ", "")
        kernel = module.get_variable("params", "kernel")
        bias = module.get_variable("params", "bias") if module.use_bias else None
        shape = bias_shape(subscripts, inputs.ndim, kernel.shape)
        inputs, kernel, bias = module.promote_dtype(inputs, kernel, bias, dtype=module.dtype)
        y = product.einsum(subscripts, inputs, kernel)
        return y if bias is None else y + bias.reshape(shape)

    def _refuse_own_product(self, module, hook, value):
        if value is not None or getattr(module, f"{hook}_cls") is not None:
            raise self.lookup.own_product(module_path(module), hook)

    def _runs(self, stack: LayerStack, args, kwargs) -> dict[str, Any]:
        """Runs of layers that the recipe treats alike, as the fields of a stack."""
        prefix, ways = module_path(stack), {"product": self.lookup.rule_for, "saved": self.lookup.policy_for}
        inner = self._inner_paths(stack, args, kwargs)
        kinds = [tuple(ways[kind](f"{prefix}/{i}/{path}") for kind, path in inner) for i in range(stack.length)]
        starts = [i for i in range(stack.length) if i == 0 or kinds[i] != kinds[i - 1]]
        recomputed = lambda rule: isinstance(rule, GemmRule) and isinstance(rule.saved, Recompute)
        return {
            "segments": tuple(zip(starts, [*starts[1:], stack.length], strict=True)),
            "recomputed": frozenset(start for start in starts if any(map(recomputed, kinds[start]))),
        }

    def _inner_paths(self, stack, args, kwargs):
        self.seen_inside = []
        jax.eval_shape(lambda *args: stack.block("").init(jax.random.key(0), *args, **kwargs), *args)
        paths, self.seen_inside = tuple(dict.fromkeys(self.seen_inside)), None
        return paths


@dataclass
class Product(Place, ProductForms):
    """One product of a bound module under a rule."""

    rule: GemmRule
    backend: str

    def options(self) -> dict[str, Any]:
        rule = self.rule
        return {
            "key": self.key(rule.stochastic),
            "taps": self.slot(SUMS, tap_slot, "everything"),
            "variables": self._variables if rule.learns or rule.remembers else None,
            "backend": self.backend,
        }

    def _variables(self, x, w) -> ProductVariables:
        """Those of the module; made from x and w where Flax lets them be made."""
        names = (*self.rule.operands(), SAVED_X)
        learned = {name: values for name in names if (values := self.get(LEARNED, name)) is not None}
        state = {name: values for name in names if (values := self.get(STATE, name)) is not None}
        first_state, zeros = initial_memory(self.rule)
        self._make_missing(STATE, state, lambda: first_state)
        self._make_missing(LEARNED, learned, lambda: canonical_variables(x, w, self.rule).params)
        slots = {name: self.slot(name, lambda name=name: zeros[name], "observations") for name in zeros}
        return ProductVariables(learned, state, {name: slot for name, slot in slots.items() if slot is not None})

    def _make_missing(self, collection: str, have: dict[str, Any], make: Callable[[], Mapping[str, Any]]) -> None:
        if not self.module.is_mutable_collection(collection):
            return
        for name, values in make().items():
            if name not in have:
                self.put(collection, name, values)
                have[name] = values


def product_names(module: nn.Module, method: str) -> tuple[str, ...]:
    """The products that a call of a module's method makes itself, not its submodules; "" stands for the module."""
    if method == "attend" and isinstance(module, nn.Embed):
        return ("",)
    if method != "__call__":
        return ()
    if isinstance(module, ATTENTIONS):
        return (SCORES, CONTEXT)
    return ("",) if isinstance(module, (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Conv, *_WITHOUT_HOOK)) else ()


def _only_parameters(module: nn.Module) -> bool:
    """Whether only the parameters of the module are being made: what a `LayerStack` does for each of its layers."""
    others = (LEARNED, STATE, TAPS)
    return module.is_initializing() and not any(map(module.is_mutable_collection, others))


@contextmanager
def _fields(module: nn.Module, **values):
    """Fields of a frozen module, for the time of a call."""
    with ExitStack() as stack:
        for name, value in values.items():
            stack.callback(object.__setattr__, module, name, getattr(module, name))
            object.__setattr__(module, name, value)
        yield
