"""qdot: the only place where a training product is quantized. One custom_vjp, three products, six operands.

A product is brought to the form (batch, M, K) · (batch, K, N); the axes of each operand are then known, and every
quantizer is told the contraction axis of its own product.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lowprec.errors import UsageError
from lowprec.formats.scaling import Scale
from lowprec.ops.backends import multiply
from lowprec.ops.canonical import DimensionNumbers, canonical_form, default_dimension_numbers
from lowprec.ops.kept import Kept, keep
from lowprec.ops.operand import Operand, Streams, gradient_factor, quantize_operand, rotate, unrotate
from lowprec.ops.rule import GemmRule
from lowprec.ops.saved import KEPT, SAVED_X, Codes, Exact, Recompute, keep_input, saved, slot_name
from lowprec.ops.variables import ProductVariables, Variables, check_variables, through_differentiable
from lowprec.quantizers.error import SUMS
from lowprec.quantizers.estimators import Factor
from lowprec.quantizers.normalize import normalize_rows
from lowprec.quantizers.variables import Differentiable
from lowprec.typing import Array, Float


def qdot(
    x: Float[Array, "..."],
    w: Float[Array, "..."],
    rule: GemmRule,
    *,
    key: jax.Array | None = None,
    dimension_numbers: DimensionNumbers | None = None,
    taps: Float[Array, "operands sums"] | None = None,
    variables: Variables = None,
    backend: str = "auto",
) -> Float[Array, "..."]:
    """The product x · w, quantized by the rule in the forward pass and in both backward products.

    Args:
      x: (..., K) by default: the activations.
      w: (K, N) by default: the weights.
      rule: which operand is quantized how; `KEEP` gives `lax.dot_general` itself.
      key: typed or legacy; needed where the rule is stochastic, for a backward product only once it is differentiated.
        Each of the six operands has a stream of its own.
      dimension_numbers: as in `lax.dot_general`, any.
      taps: zeros of shape (6, 9), `quantizers.tap_slot()`; their cotangent carries the error sums of the operands.
      variables: of quantizers that learn or remember (`ops.initial_variables`): parameters get their gradient, the
        cotangent of a slot says what its operand looked like. Or a function that gives them for x and w in canonical
        form, (…, M, K) and (…, K, N).
      backend: "emulate": values on the grid, multiplied in float32 (defines the result); "native": XLA's own products
        of int8, fp8, scaled blocks and 16 bits; "pallas": our kernels, and where none serves, XLA's products or
        emulation, which is said once; "auto": by the device, the formats and the shapes (`backends.AUTO`).
    Returns:
      As `lax.dot_general`, in the common dtype of x and w; products are accumulated in float32, or as the rule
      says.
    Raises:
      ValueError: stochastic rounding without a key; a block that does not divide its axis and has no `pad`; a backend
        "native" that cannot serve the rule, with the reason; operands whose contraction axes differ in length.
      TypeError: `rule` is not a GemmRule.
    """
    if not isinstance(rule, GemmRule):
        raise TypeError(f"qdot takes a GemmRule, e.g. recipes.parse('fwd=mxfp4').rule_for(path), not {rule!r}")
    if dimension_numbers is None:
        dimension_numbers = default_dimension_numbers(x)
    if rule.exact_products:
        product = lambda x, w: lax.dot_general(x, w, dimension_numbers)
        return saved_product(product, x, w, rule, key, variables)
    if isinstance(rule.saved, Recompute):
        y = qdot(
            x,
            w,
            replace(rule, saved=None),
            key=key,
            dimension_numbers=dimension_numbers,
            taps=taps,
            variables=variables,
            backend=backend,
        )
        return checkpoint_name(y, KEPT)
    if rule.normalize_input:
        x = normalize_rows(x, tuple(dimension_numbers[0][0]))
    form = canonical_form(x.shape, w.shape, dimension_numbers)
    x_MK, w_KN = form.collapse_x(x), form.collapse_w(w)
    variables = variables(x_MK, w_KN) if callable(variables) else variables or ProductVariables()
    check_variables(rule, variables)
    if any(isinstance(q.scale, Differentiable) for q in rule.fwd):
        x_MK, w_KN, rule, variables = through_differentiable(x_MK, w_KN, rule, key, taps, variables)
    if rule.exact:
        y = multiply(Operand("fwd.x", x_MK, None), Operand("fwd.w", w_KN, None), backend)
    else:
        call = Call(rule, backend, form.shape_x[-1], x_MK.dtype, w_KN.dtype)
        y = _product(x_MK, w_KN, key, taps, variables, call)
    return form.expand_y(y).astype(jnp.result_type(x, w))


def saved_product(product: Callable, x, w, rule: GemmRule, key, variables: Variables = None) -> Float[Array, "..."]:
    """An exact product of x and w, whose gradient takes x as the rule's policy keeps it."""
    if rule.saved is None:
        return product(x, w)
    if isinstance(rule.saved, Recompute):
        return checkpoint_name(product(x, w), KEPT)
    variables = variables(x, w) if callable(variables) else variables or ProductVariables()
    check_variables(rule, variables)
    own = lambda tree: {slot_name(0): tree[SAVED_X]} if SAVED_X in tree else {}
    own_key = Streams(key).saved() if rule.saved.stochastic else None
    state, slots = own(variables.state), own(variables.slots)
    return saved(product, rule.saved, Exact())(x, w, key=own_key, state=state, slots=slots)


@dataclass(frozen=True)
class Call:
    """What is static about one product."""

    rule: GemmRule
    backend: str
    inputs: int  # K
    x_dtype: jnp.dtype
    w_dtype: jnp.dtype


class Residuals(NamedTuple):
    """What the forward pass keeps for the backward one.

    Of the activations, what the sources ask for. The weights are parameters and live anyway: their forward operand is
    quantized again, by the same scales and from the same random stream, rather than kept.
    """

    x: Any  # the original, as the rule's policy keeps it
    forward_x: Kept | None  # as the forward product used it
    factor_x: Factor  # of the gradient, by its estimator
    w: Float[Array, "..."]
    scale_w: Scale | None
    key: jax.Array | None
    sums: tuple | None  # error sums of fwd.x and fwd.w
    variables: ProductVariables
    seen: dict[str, Float[Array, " seen"]]  # what was observed of the forward operands


# Jitted, so that a call outside of jit compiles one program rather than a hundred small ones.
@partial(jax.custom_vjp, nondiff_argnums=(5,))
@partial(jax.jit, static_argnums=5)
def _product(x, w, key, taps, variables, call):
    forward_x, forward_w = _forward_operands(x, w, Streams(key, variables.state), call)
    return multiply(forward_x, forward_w, call.backend, call.rule.accumulation)


def _forward_operands(x, w, streams, call):
    operands = zip(call.rule.fwd, (x, w), ("fwd.x", "fwd.w"), strict=True)
    return [quantize_operand(q, v, name, streams, backend=call.backend) for q, v, name in operands]


@partial(jax.jit, static_argnums=5)
def _forward(x, w, key, taps, variables, call):
    rule = call.rule
    if rule.stochastic and key is None:
        raise UsageError(
            "the rule rounds or rotates at random, so its products need a key: in Linen rngs={'quant': key}, and "
            "split_rngs={'quant': True} in a model's own nn.scan; in NNX model.train() and rngs=nnx.Rngs(quant=seed)"
        )
    streams = Streams(key, variables.state)
    fx, fw = _forward_operands(x, w, streams, call)
    observed = {SAVED_X: rule.saved.observe(x)} if SAVED_X in variables.slots else {}
    from_original = rule.wgrad[1].source == "original"
    narrow, policy = isinstance(rule.saved, Codes), rule.saved or Exact()
    own = streams.saved() if policy.stochastic else None
    residuals = Residuals(
        x=keep_input(policy, x, own, variables.state.get(SAVED_X)) if from_original else None,
        forward_x=None if from_original else keep(fx, call.backend, rule.accumulation, narrow=narrow),
        factor_x=gradient_factor(rule.fwd[0], fx),
        w=w,
        # A correction has changed the scales since the elements were rounded.
        scale_w=None if fw.rounded is None or rule.fwd[1].correction else fw.rounded.scale,
        key=key,
        sums=None if taps is None else (fx.error_sums(), fw.error_sums()),
        variables=variables,
        seen=_observe(zip(rule.fwd, (fx, fw), strict=True), variables.slots) | observed,
    )
    return multiply(fx, fw, call.backend, rule.accumulation), residuals


@partial(jax.jit, static_argnums=0)
def _backward(call, kept, dy):
    rule, streams = call.rule, Streams(kept.key, kept.variables.state)
    # The product was cast to this dtype, and so was its gradient.
    dy = dy.astype(jnp.result_type(call.x_dtype, call.w_dtype))
    # Without the barrier XLA would find the forward operand again and keep it after all.
    again = lax.optimization_barrier(kept.w)
    forward_w = quantize_operand(rule.fwd[1], again, "fwd.w", streams, kept.scale_w, call.backend)
    dgrad_w = from_source(rule.dgrad[1], "dgrad.w", kept.w, forward_w, streams, call.backend)
    dgrad_dy = quantize_operand(rule.dgrad[0], dy, "dgrad.dy", streams, backend=call.backend)
    dx = multiply(dgrad_dy, dgrad_w, call.backend, rule.accumulation)
    dx = through_quantizer(dx, rule.fwd[0], "fwd.x", rule.dgrad[1], kept.factor_x, streams, call.inputs)
    # One product after the other: side by side, the temporaries of both would be alive at once.
    dx, dy, x, forward_x = lax.optimization_barrier((dx, dy, kept.x, kept.forward_x))
    forward_x = None if forward_x is None else forward_x.restore("fwd.x")
    x = None if x is None else (rule.saved or Exact()).restore(x)
    wgrad_x = from_source(rule.wgrad[1], "wgrad.x", x, forward_x, streams, call.backend)
    if rule.wgrad[0].source == "reuse":
        wgrad_dy = replace(dgrad_dy, name="wgrad.dy")
    else:
        wgrad_dy = quantize_operand(rule.wgrad[0], dy, "wgrad.dy", streams, backend=call.backend)
    dw = multiply(wgrad_x, wgrad_dy, call.backend, rule.accumulation)
    factor_w = gradient_factor(rule.fwd[1], forward_w)
    dw = through_quantizer(dw, rule.fwd[1], "fwd.w", rule.wgrad[1], factor_w, streams, call.inputs)
    dx, dw = lax.optimization_barrier((dx.astype(call.x_dtype), dw.astype(call.w_dtype)))
    operands = list(zip((*rule.dgrad, *rule.wgrad), (dgrad_dy, dgrad_w, wgrad_dy, wgrad_x), strict=True))
    fresh = [operand.error_sums() if q.source != "reuse" else None for q, operand in operands]
    taps = None if kept.sums is None else _stack_sums([*kept.sums, *fresh])
    seen = kept.seen | _observe(operands, kept.variables.slots)
    return dx, dw, None, taps, ProductVariables({}, None, seen)


_product.defvjp(_forward, _backward)


def _observe(operands, slots):
    """What the slots want to know of these operands."""
    return {operand.name: q.scale.observe(operand.source) for q, operand in operands if operand.name in slots}


def _stack_sums(rows):
    return jnp.stack([jnp.zeros(len(SUMS)) if row is None else row for row in rows])


def from_source(q, name, original, forward, streams, backend="emulate"):
    """The operand of a backward product that the forward one has seen before."""
    if q.source == "reuse":
        return replace(forward, name=name)
    source = original if q.source == "original" else forward.values
    return quantize_operand(q, source, name, streams, backend=backend)


def through_quantizer(g, q, name, other, factor, streams, inputs):
    """The gradient with respect to a forward operand: past the estimator, out of the rotation, as long as the input.

    `other` is the operand that g was multiplied from: taken from forward values it was rotated, and so is g.
    """
    if other.source == "original":
        if factor is None:
            return g
        g = rotate(q, g, name, streams)
    if factor is not None:
        # Where nothing passes it is zero, even if the gradient there is no number.
        g = jnp.where(factor, g, 0) if factor.dtype == bool else factor * g
    return unrotate(q, g, name, streams, inputs)
