"""Where an NNX model multiplies, and how a recipe gets in: by the hooks of its layers."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lowprec.errors import UsageError
from lowprec.nn.attention import CONTEXT, SCORES
from lowprec.nn.nnx_products import Attention, Product, QuantizedEmbed
from lowprec.nn.products import STREAM
from lowprec.nn.rules import RuleLookup, product_path
from lowprec.ops import GemmRule
from lowprec.ops.saved import Recompute

# The hooks of layers, with what stands there when a model says nothing; and the form of product that they take.
_HOOKS = (
    (nnx.Linear, "dot_general", jax.lax.dot_general, "dot_general"),
    (nnx.LinearGeneral, "dot_general", None, "dot_general"),
    (nnx.Einsum, "einsum_op", jnp.einsum, "einsum"),
    (nnx.Conv, "conv_general_dilated", jax.lax.conv_general_dilated, "conv"),
)
_EMBED_HOOK, _ATTENTION_HOOK = "attend_product", "attention_fn"
# Layers that multiply by weights without a hook for the product.
_WITHOUT_HOOK = (nnx.ConvTranspose, nnx.LoRA)

HOOKS = frozenset({hook for _, hook, _, _ in _HOOKS} | {_EMBED_HOOK, _ATTENTION_HOOK})


def rules_of(lookup: RuleLookup, path: str, layer: nnx.Module) -> dict[str, GemmRule]:
    """The rules of the products that a layer makes itself, by name; "" stands for the layer."""
    if isinstance(layer, nnx.MultiHeadAttention):
        rules = {name: lookup.rule_for(product_path(path, name)) for name in (SCORES, CONTEXT)}
        taken = _ATTENTION_HOOK if layer.attention_fn is not nnx.dot_product_attention else None
    elif hook := next((hook for hook in _HOOKS if isinstance(layer, hook[0])), None):
        rules = {"": lookup.rule_for(path)}
        _, name, plain, _ = hook
        own = getattr(layer, name) is not plain or getattr(layer, f"{name}_cls", None) is not None
        taken = name if own else None
    elif isinstance(layer, (nnx.Embed, *_WITHOUT_HOOK)):
        rules = {"": lookup.rule_for(path)}
        taken = "attend" if isinstance(layer, nnx.Embed) and type(layer) is not nnx.Embed else None
    else:
        return {}
    if not all(rule.exact for rule in rules.values()):
        if isinstance(layer, _WITHOUT_HOOK):
            raise lookup.without_hook(path, f"nnx.{type(layer).__name__}")
        if taken:
            raise lookup.own_product(path, taken)
        if any(isinstance(rule.saved, Recompute) for rule in rules.values()):
            raise lookup.not_recomputed(path)
    return rules


def install(
    path: str, layer: nnx.Module, rules: dict[str, GemmRule], lead: tuple[int, ...], rngs, backend: str
) -> None:
    """Hands a layer its products."""

    def product(name, form):
        rule = rules[name]
        key = rngs[STREAM]() if rule.stochastic else None
        return Product(product_path(path, name), form, rule, backend, lead, key)

    if isinstance(layer, nnx.MultiHeadAttention):
        layer.attention_fn = nnx.data(Attention(product(SCORES, "einsum"), product(CONTEXT, "einsum")))
    elif isinstance(layer, nnx.Embed):
        # The same object, so that whoever shares it has the product too.
        object.__setattr__(layer, "__class__", QuantizedEmbed)
        setattr(layer, _EMBED_HOOK, nnx.data(product("", "attend")))
    else:
        _, hook, _, form = next(hook for hook in _HOOKS if isinstance(layer, hook[0]))
        setattr(layer, hook, nnx.data(product("", form)))


def stacked_axes(path: str, layer: Any) -> tuple[int, ...]:
    """The leading axes that the parameters of a layer have beyond those of one layer."""
    if isinstance(layer, nnx.MultiHeadAttention):
        return stacked_axes(f"{path}/query", layer.query)
    if isinstance(layer, nnx.Embed):
        found, one = layer.embedding.shape, (layer.num_embeddings, layer.features)
    else:
        found = layer.kernel.shape
        if isinstance(layer, nnx.Linear):
            one = (layer.in_features, layer.out_features)
        elif isinstance(layer, nnx.LinearGeneral):
            one = (*layer.batch_axis.values(), *layer.in_features, *layer.out_features)
        else:
            one = tuple(layer.kernel_shape)
    lead = len(found) - len(one)
    if lead < 0 or found[lead:] != one:
        raise UsageError(
            f"layer {path!r} has a kernel of shape {found}, one such layer of {one}: a stack of layers has its axis "
            "first, nnx.vmap(..., out_axes=0)"
        )
    return found[:lead]
