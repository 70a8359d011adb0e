"""qdot: the only place where a training product is quantized. One custom_vjp, three products, six operands.

A product is brought to the form (batch, M, K) · (batch, K, N); the axes of each operand are then known, and every
quantizer is told the contraction axis of its own product.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowprec.errors import UsageError
from lowprec.ops.backends import Kept, keep, multiply
from lowprec.ops.canonical import canonical_form
from lowprec.ops.operand import Streams, gradient_mask, quantize_operand, rotate, unrotate
from lowprec.ops.rule import GemmRule
from lowprec.quantizers.error import SUMS
from lowprec.typing import Array, Bool, Float

DimensionNumbers = tuple[tuple, tuple]


def qdot(
    x: Float[Array, "..."],
    w: Float[Array, "..."],
    rule: GemmRule,
    *,
    key: jax.Array | None = None,
    dimension_numbers: DimensionNumbers | None = None,
    taps: Float[Array, "operands sums"] | None = None,
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
      backend: "emulate": values on the grid, multiplied in float32 (defines the result); "native": XLA's own int8,
        fp8 and bf16 products; "auto": native where it is known to pay on this device.
    Returns:
      As `lax.dot_general`, in the common dtype of x and w; products are accumulated in float32.
    Raises:
      ValueError: stochastic rounding without a key; a block that does not divide its axis and has no `pad`; a backend
        that cannot serve the rule, with the reason; operands whose contraction axes differ in length.
      TypeError: `rule` is not a GemmRule.
    """
    if not isinstance(rule, GemmRule):
        raise TypeError(f"qdot takes a GemmRule, e.g. recipes.parse('fwd=mxfp4').rule_for(path), not {rule!r}")
    if dimension_numbers is None:
        dimension_numbers = (((x.ndim - 1,), (0,)), ((), ()))
    if rule.exact:
        return lax.dot_general(x, w, dimension_numbers)
    if rule.normalize_input:
        x = _normalize(x, dimension_numbers[0][0])
    form = canonical_form(x.shape, w.shape, dimension_numbers)
    call = Call(rule, backend, form.shape_x[-1], jnp.dtype(x.dtype), jnp.dtype(w.dtype))
    y = _product(form.collapse_x(x), form.collapse_w(w), key, taps, call)
    return form.expand_y(y).astype(jnp.result_type(x, w))


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
    quantized again, from the same random stream, rather than kept.
    """

    x: Float[Array, "..."] | None  # the original
    forward_x: Kept | None  # as the forward product used it
    mask_x: Bool[Array, "..."] | None  # where the gradient passes; None: everywhere
    w: Float[Array, "..."]
    key: jax.Array | None
    sums: tuple | None  # error sums of fwd.x and fwd.w


# Jitted, so that a call outside of jit compiles one program rather than a hundred small ones.
@partial(jax.custom_vjp, nondiff_argnums=(4,))
@partial(jax.jit, static_argnums=4)
def _product(x, w, key, taps, call):
    forward_x, forward_w = _forward_operands(x, w, key, call.rule)
    return multiply(forward_x, forward_w, call.backend)


def _forward_operands(x, w, key, rule):
    streams = Streams(key)
    return quantize_operand(rule.fwd[0], x, "fwd.x", streams), quantize_operand(rule.fwd[1], w, "fwd.w", streams)


@partial(jax.jit, static_argnums=4)
def _forward(x, w, key, taps, call):
    rule = call.rule
    if rule.stochastic and key is None:
        raise UsageError(
            "the rule rounds or rotates at random, so its products need a key: in Flax rngs={'quant': key}, "
            "and split_rngs={'quant': True} in a model's own nn.scan"
        )
    fx, fw = _forward_operands(x, w, key, rule)
    from_original = rule.wgrad[1].source == "original"
    residuals = Residuals(
        x=x if from_original else None,
        forward_x=None if from_original else keep(fx, call.backend),
        mask_x=gradient_mask(rule.fwd[0], fx),
        w=w,
        key=key,
        sums=None if taps is None else (fx.error_sums(), fw.error_sums()),
    )
    return multiply(fx, fw, call.backend), residuals


@partial(jax.jit, static_argnums=0)
def _backward(call, kept, dy):
    rule, streams = call.rule, Streams(kept.key)
    # Without the barrier XLA would find the forward operand again and keep it after all.
    forward_w = quantize_operand(rule.fwd[1], lax.optimization_barrier(kept.w), "fwd.w", streams)
    dgrad_w = _from_source(rule.dgrad[1], "dgrad.w", kept.w, forward_w, streams)
    dgrad_dy = quantize_operand(rule.dgrad[0], dy, "dgrad.dy", streams)
    dx = multiply(dgrad_dy, dgrad_w, call.backend)
    dx = _through_quantizer(dx, rule.fwd[0], "fwd.x", rule.dgrad[1], kept.mask_x, streams, call.inputs)
    # One product after the other: side by side, the temporaries of both would be alive at once.
    dx, dy, x, forward_x = lax.optimization_barrier((dx, dy, kept.x, kept.forward_x))
    forward_x = None if forward_x is None else forward_x.restore("fwd.x")
    wgrad_x = _from_source(rule.wgrad[1], "wgrad.x", x, forward_x, streams)
    if rule.wgrad[0].source == "reuse":
        wgrad_dy = replace(dgrad_dy, name="wgrad.dy")
    else:
        wgrad_dy = quantize_operand(rule.wgrad[0], dy, "wgrad.dy", streams)
    dw = multiply(wgrad_x, wgrad_dy, call.backend)
    mask_w = gradient_mask(rule.fwd[1], forward_w)
    dw = _through_quantizer(dw, rule.fwd[1], "fwd.w", rule.wgrad[1], mask_w, streams, call.inputs)
    dx, dw = lax.optimization_barrier((dx.astype(call.x_dtype), dw.astype(call.w_dtype)))
    operands = zip((dgrad_dy, dgrad_w, wgrad_dy, wgrad_x), (*rule.dgrad, *rule.wgrad), strict=True)
    fresh = [operand.error_sums() if q.source != "reuse" else None for operand, q in operands]
    return dx, dw, None, None if kept.sums is None else _stack_sums([*kept.sums, *fresh])


_product.defvjp(_forward, _backward)


def _stack_sums(rows):
    return jnp.stack([jnp.zeros(len(SUMS)) if row is None else row for row in rows])


def _from_source(q, name, original, forward, streams):
    """The operand of a backward product that the forward one has seen before."""
    if q.source == "reuse":
        return replace(forward, name=name)
    return quantize_operand(q, original if q.source == "original" else forward.values, name, streams)


def _through_quantizer(g, q, name, other, mask, streams, inputs):
    """The gradient with respect to a forward operand: past the estimator, out of the rotation, as long as the input.

    `other` is the operand that g was multiplied from: taken from forward values it was rotated, and so is g.
    """
    if other.source == "original":
        if mask is None:
            return g
        g = rotate(q, g, name, streams)
    if mask is not None:
        g = jnp.where(mask, g, 0)
    return unrotate(q, g, name, streams, inputs)


def _normalize(x, axes):
    """x / rms(x) over the contraction axes, in float32."""
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(wide * wide, axis=tuple(axes), keepdims=True)
    return (wide * lax.rsqrt(mean_square + np.float32(1e-5))).astype(x.dtype)
