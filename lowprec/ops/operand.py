"""One operand of a product: rotated, quantized, and ready for any backend."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lowprec.formats.random import DrawnKey, Key, draw_keys
from lowprec.formats.scaling import Scale
from lowprec.ops.kernel_rounding import rounded_by_kernel, why_not_rounded
from lowprec.pallas.dispatch import say_once
from lowprec.quantizers import OPERANDS, Quantizer, Rounded, error_sums, hadamard, inverse_hadamard
from lowprec.quantizers.estimators import Factor
from lowprec.quantizers.variables import Arrays
from lowprec.typing import Array, Float

# The contraction axis of each operand, for x (…, M, K), w (…, K, N) and dy (…, M, N).
CONTRACTION = {"fwd.x": -1, "fwd.w": -2, "dgrad.dy": -1, "dgrad.w": -1, "wgrad.dy": -2, "wgrad.x": -2}
_SIGN_STREAM = {"fwd": 6, "dgrad": 7, "wgrad": 8}
_SAVED_STREAM = 9


class Outer(NamedTuple):
    """A rotation of an operand along its other axis than the contraction axis, which the product still has."""

    block: int
    signs: Float[Array, " n"] | None
    length: int  # of the axis before it was filled up

    def undo(self, y: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
        y = inverse_hadamard(y, self.block, self.signs, axis=axis)
        return jax.lax.slice_in_dim(y, 0, self.length, axis=axis % y.ndim)


@dataclass
class Operand:
    """An operand as a product uses it.

    Args:
      name: one of `quantizers.OPERANDS`.
      source: what was quantized, in the coordinates of the product (rotated, padded).
      rounded: its quantized form; None where the operand is left as it is.
      outer: a rotation to be undone on the product; None where there is none.
    """

    name: str
    source: Float[Array, "..."]
    rounded: Rounded | None
    outer: Outer | None = None

    @property
    def axis(self) -> int:
        return CONTRACTION[self.name]

    @property
    def values(self) -> Float[Array, "..."]:
        return self.source if self.rounded is None else self.rounded.values

    def error_sums(self) -> Float[Array, " sums"] | None:
        return None if self.rounded is None else error_sums(self.source, self.rounded)


@dataclass
class Streams:
    """What the operands of one call draw on: a random stream each, one for the signs of each product's rotation, and
    the state of those that remember.
    """

    key: jax.Array | None
    state: Mapping[str, Arrays] = field(default_factory=dict)

    def operand(self, name: str) -> Key | None:
        return self._drawn[OPERANDS.index(name)]

    def signs(self, name: str) -> Key | None:
        return self._drawn[_SIGN_STREAM[name.partition(".")[0]]]

    def saved(self) -> jax.Array | None:
        return None if self.key is None else jax.random.fold_in(self.key, _SAVED_STREAM)

    @cached_property
    def _drawn(self) -> list[DrawnKey] | list[None]:
        return [None] * _SAVED_STREAM if self.key is None else draw_keys(self.key, _SAVED_STREAM)


def quantize_operand(
    q: Quantizer,
    x: Float[Array, "..."],
    name: str,
    streams: Streams,
    scale: Scale | None = None,
    backend: str = "emulate",
) -> Operand:
    """x as the operand `name` of a product: rotated, then rounded along the contraction axis, by `scale` if given.

    Args:
      backend: "pallas": by a kernel, where one serves, which finds the same scale again.
    """
    if q.exact:
        return Operand(name, x, None)
    rotated = rotate(q, x.astype(jnp.float32), name, streams)
    key = streams.operand(name) if q.stochastic else None
    if backend == "pallas" and _by_kernel(q, x, name):
        signs = None if q.rotation is None else _signs(q, rotated.shape[CONTRACTION[name]], name, streams)
        rounded = rounded_by_kernel(q, x, CONTRACTION[name], signs, key if q.rounding.stochastic else None)
        rounded = rounded if q.correction is None else q.correction(rotated, rounded, CONTRACTION[name], key)
    else:
        rounded = q.round(rotated, CONTRACTION[name], key, streams.state.get(name), scale)
    if q.rotation is None or q.rotation.side == "inner":
        return Operand(name, rotated, rounded)
    axis = _rotated_axis(q, name)
    length = rotated.shape[axis]
    outer = Outer(q.rotation.block(length), _signs(q, length, name, streams), x.shape[axis])
    return Operand(name, rotated, rounded, outer)


def _by_kernel(q, x, name):
    reason = why_not_rounded(q, x, CONTRACTION[name])
    if reason:
        say_once(f"the rounding of {name}", reason)
    return reason is None


def rotate(q: Quantizer, x: Float[Array, "..."], name: str, streams: Streams) -> Float[Array, "..."]:
    """x · D · H along an axis of the operand, filled up with zeros where the quantizer allows it."""
    if q.rotation is None:
        return x
    axis = _rotated_axis(q, name)
    short = q.rotation.padded(x.shape[axis]) - x.shape[axis] if q.pad else 0
    if short:
        x = jnp.pad(x, [(0, short if i == axis % x.ndim else 0) for i in range(x.ndim)])
    length = x.shape[axis]
    return hadamard(x, q.rotation.block(length), _signs(q, length, name, streams), axis=axis)


def unrotate(q: Quantizer, g: Float[Array, "..."], name: str, streams: Streams, length: int) -> Float[Array, "..."]:
    """The inverse of `rotate` for a gradient with respect to the operand, cut to the length of its axis."""
    if q.rotation is None:
        return g
    axis = _rotated_axis(q, name)
    rotated = g.shape[axis]
    g = inverse_hadamard(g, q.rotation.block(rotated), _signs(q, rotated, name, streams), axis=axis)
    return jax.lax.slice_in_dim(g, 0, length, axis=axis % g.ndim)


def _rotated_axis(q, name):
    return CONTRACTION[name] if q.rotation.side == "inner" else -3 - CONTRACTION[name]


def _signs(q, length, name, streams):
    return q.rotation.draw_signs(length, streams.signs(name))


def gradient_factor(q: Quantizer, operand: Operand) -> Factor:
    """What the estimator of a forward operand multiplies its gradient by, in rotated coordinates.

    Booleans say where the gradient passes; None: everywhere as it is.
    """
    return None if operand.rounded is None else q.estimator.factor(operand.source, operand.rounded)
