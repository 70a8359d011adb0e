"""Where an NNX model multiplies, and how a recipe gets in: by the hooks of its layers."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lowprec.errors import UsageError
from lowprec.nn.attention import CONTEXT, SCORES
from lowprec.nn.nnx_products import Attention, Product, QuantizedEmbed
from lowprec.nn.nnx_saved import PLAIN, SAVED_NORMS, SavedAttention, SavedGate, SavedInputs, SiluGate
from lowprec.nn.products import STREAM
from lowprec.nn.rules import RuleLookup, product_path
from lowprec.nn.saved_forms import CORE
from lowprec.ops import GemmRule
from lowprec.ops.saved import Exact, Policy, Recompute

# The hooks of layers, with what stands there when a model says nothing; and the form of product that they take.
_HOOKS = (
    (nnx.Linear, "dot_general", jax.lax.dot_general, "dot_general"),
    (nnx.LinearGeneral, "dot_general", None, "dot_general"),
    (nnx.Einsum, "einsum_op", jnp.einsum, "einsum"),
    (nnx.Conv, "conv_general_dilated", jax.lax.conv_general_dilated, "conv"),
)
_EMBED_HOOK, _ATTENTION_HOOK, _SAVED_HOOK = "attend_product", "attention_fn", "saved_inputs"
# Layers that multiply by weights without a hook for the product.
_WITHOUT_HOOK = (nnx.ConvTranspose, nnx.LoRA)

HOOKS = frozenset({hook for _, hook, _, _ in _HOOKS} | {_EMBED_HOOK, _ATTENTION_HOOK, _SAVED_HOOK})


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


def policy_of(lookup: RuleLookup, path: str, layer: nnx.Module) -> Policy:
    """How the inputs of a norm, a gate or an attention are saved."""
    if isinstance(layer, nnx.MultiHeadAttention):
        policy = lookup.policy_for(product_path(path, CORE))
        if not isinstance(policy, Exact) and isinstance(layer.attention_fn, nnx.Module):
            raise lookup.own_product(path, _ATTENTION_HOOK)
        products = [lookup.recipe.rule_for(product_path(path, name)) for name in (SCORES, CONTEXT)]
        if not isinstance(policy, Exact) and not all(rule.exact for rule in products):
            raise lookup.saved_and_quantized(path)
        return policy
    return lookup.policy_for(path) if type(layer) in (*SAVED_NORMS, SiluGate) else Exact()


def install(
    path: str, layer: nnx.Module, rules: dict[str, GemmRule], lead: tuple[int, ...], rngs, backend: str
) -> None:
    """Hands a layer its products."""

    def product(name, form):
        rule = rules[name]
        return Product(product_path(path, name), form, rule, backend, lead, _key(rule, rngs))

    if isinstance(layer, nnx.MultiHeadAttention):
        layer.attention_fn = nnx.data(Attention(product(SCORES, "einsum"), product(CONTEXT, "einsum")))
    elif isinstance(layer, nnx.Embed):
        _become(layer, QuantizedEmbed)
        setattr(layer, _EMBED_HOOK, nnx.data(product("", "attend")))
    else:
        _, hook, _, form = next(hook for hook in _HOOKS if isinstance(layer, hook[0]))
        setattr(layer, hook, nnx.data(product("", form)))


def install_saved(path: str, layer: nnx.Module, policy: Policy, lead: tuple[int, ...], rngs) -> None:
    """Has a layer keep its inputs by a policy."""
    key = _key(policy, rngs)
    if isinstance(layer, nnx.MultiHeadAttention):
        shapes = tuple((1, heads, layer.head_dim) for heads in (layer.num_heads, *2 * [layer.num_kv_heads]))
        core = SavedAttention(product_path(path, CORE), policy, shapes, lead, key, layer.attention_fn)
        layer.attention_fn = nnx.data(core)
        return
    inputs = 2 if isinstance(layer, SiluGate) else 1
    if isinstance(layer, SiluGate):
        _become(layer, SavedGate)
    else:
        setattr(layer, PLAIN, nnx.graphdef(layer))
        _become(layer, SAVED_NORMS[type(layer)])
    setattr(layer, _SAVED_HOOK, nnx.data(SavedInputs(path, policy, ((),) * inputs, lead, key)))


def _key(place, rngs):
    return rngs[STREAM]() if place.stochastic else None


def _become(layer, kind):
    """The same object, so that whoever shares it has what was installed too."""
    object.__setattr__(layer, "__class__", kind)


def stacked_axes(path: str, layer: Any) -> tuple[int, ...]:
    """The leading axes that the parameters of a layer have beyond those of one layer."""
    if isinstance(layer, nnx.MultiHeadAttention):
        return stacked_axes(f"{path}/query", layer.query)
    if isinstance(layer, SiluGate):
        return layer.layers.shape
    if type(layer) in SAVED_NORMS:
        scale = layer.scale if layer.scale is not None else getattr(layer, "bias", None)
        return () if scale is None else scale.shape[:-1]
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
