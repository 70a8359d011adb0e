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
from jaxtyping import Array, Bool, Float

from lowprec.errors import UsageError
from lowprec.ops.backends import Kept, keep, multiply
from lowprec.ops.canonical import canonical_form
from lowprec.ops.operand import Streams, gradient_mask, quantize_operand, rotate, unrotate
from lowprec.ops.rule import GemmRule
from lowprec.quantizers.error import SUMS

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
        that cannot serve the rule, with the reason.
    """
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
    """What the forward pass keeps for the backward one: only what the sources of its operands ask for."""

    x: Float[Array, "..."] | None  # the originals
    w: Float[Array, "..."] | None
    forward_x: Kept | None  # as the forward product used them
    forward_w: Kept | None
    mask_x: Bool[Array, "..."] | None  # where the gradient passes; None: everywhere
    mask_w: Bool[Array, "..."] | None
    key: jax.Array | None
    sums: tuple | None  # error sums of fwd.x and fwd.w


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _product(x, w, key, taps, call):
    return multiply(*_forward_operands(x, w, key, call.rule), call.backend)


def _forward_operands(x, w, key, rule):
    streams = Streams(key)
    return quantize_operand(rule.fwd[0], x, "fwd.x", streams), quantize_operand(rule.fwd[1], w, "fwd.w", streams)


def _forward(x, w, key, taps, call):
    rule = call.rule
    if rule.stochastic and key is None:
        raise UsageError(
            "the rule rounds or rotates at random, so its products need a key: in Flax rngs={'quant': key}, "
            "and split_rngs={'quant': True} in a model's own nn.scan"
        )
    fx, fw = _forward_operands(x, w, key, rule)
    from_original = [operand.source == "original" for operand in (rule.wgrad[1], rule.dgrad[1])]
    residuals = Residuals(
        x=x if from_original[0] else None,
        w=w if from_original[1] else None,
        forward_x=None if from_original[0] else keep(fx, call.backend),
        forward_w=None if from_original[1] else keep(fw, call.backend),
        mask_x=gradient_mask(rule.fwd[0], fx),
        mask_w=gradient_mask(rule.fwd[1], fw),
        key=key,
        sums=None if taps is None else (fx.error_sums(), fw.error_sums()),
    )
    return multiply(fx, fw, call.backend), residuals


def _backward(call, kept, dy):
    rule, streams = call.rule, Streams(kept.key)
    dgrad_dy = quantize_operand(rule.dgrad[0], dy, "dgrad.dy", streams)
    reuses_dy = rule.wgrad[0].source == "reuse"
    wgrad_dy = (
        replace(dgrad_dy, name="wgrad.dy") if reuses_dy else quantize_operand(rule.wgrad[0], dy, "wgrad.dy", streams)
    )
    dgrad_w = _from_source(rule.dgrad[1], "dgrad.w", kept.w, kept.forward_w, streams)
    wgrad_x = _from_source(rule.wgrad[1], "wgrad.x", kept.x, kept.forward_x, streams)
    dx = multiply(dgrad_dy, dgrad_w, call.backend)
    dw = multiply(wgrad_x, wgrad_dy, call.backend)
    dx = _through_quantizer(dx, rule.fwd[0], "fwd.x", rule.dgrad[1], kept.mask_x, streams, call.inputs)
    dw = _through_quantizer(dw, rule.fwd[1], "fwd.w", rule.wgrad[1], kept.mask_w, streams, call.inputs)
    taps = None
    if kept.sums is not None:
        fresh = [
            operand if quantizer.source != "reuse" else None
            for operand, quantizer in zip(
                (dgrad_dy, dgrad_w, wgrad_dy, wgrad_x), (*rule.dgrad, *rule.wgrad), strict=True
            )
        ]
        sums = (*kept.sums, *(operand and operand.error_sums() for operand in fresh))
        taps = jnp.stack([jnp.zeros(len(SUMS)) if s is None else s for s in sums])
    return dx.astype(call.x_dtype), dw.astype(call.w_dtype), None, taps


_product.defvjp(_forward, _backward)


def _from_source(q, name, original, forward, streams):
    """The operand of a backward product that the forward one has seen before."""
    if q.source == "reuse":
        return forward.restore(name)
    return quantize_operand(q, original if q.source == "original" else forward.restore(name).values, name, streams)


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
