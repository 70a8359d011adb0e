"""One operand of a product: rotated, quantized, and ready for any backend."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lowprec.quantizers import OPERANDS, Clip, Quantizer, Rounded, error_sums, hadamard, inside, inverse_hadamard
from lowprec.typing import Array, Bool, Float

# The contraction axis of each operand, for x (…, M, K), w (…, K, N) and dy (…, M, N).
CONTRACTION = {"fwd.x": -1, "fwd.w": -2, "dgrad.dy": -1, "dgrad.w": -1, "wgrad.dy": -2, "wgrad.x": -2}
_SIGN_STREAM = {"fwd": 6, "dgrad": 7, "wgrad": 8}


@dataclass
class Operand:
    """An operand as a product uses it.

    Args:
      name: one of `quantizers.OPERANDS`.
      source: what was quantized, in the coordinates of the product (rotated, padded).
      rounded: its quantized form; None where the operand is left as it is.
    """

    name: str
    source: Float[Array, "..."]
    rounded: Rounded | None

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
    """The random streams of one call: one for each operand, and one for the signs of each product's rotation."""

    key: jax.Array | None

    def operand(self, name: str) -> jax.Array | None:
        return self._fold(OPERANDS.index(name))

    def signs(self, name: str) -> jax.Array | None:
        return self._fold(_SIGN_STREAM[name.partition(".")[0]])

    def _fold(self, index):
        return None if self.key is None else jax.random.fold_in(self.key, index)


def quantize_operand(q: Quantizer, x: Float[Array, "..."], name: str, streams: Streams) -> Operand:
    """x as the operand `name` of a product: rotated along the contraction axis, then rounded."""
    if q.exact:
        return Operand(name, x, None)
    axis = CONTRACTION[name]
    x = rotate(q, x.astype(jnp.float32), name, streams)
    key = streams.operand(name) if q.stochastic else None
    return Operand(name, x, q.round(x, axis, key))


def rotate(q: Quantizer, x: Float[Array, "..."], name: str, streams: Streams) -> Float[Array, "..."]:
    """x · D · H along the contraction axis of the operand, filled up with zeros where the quantizer allows it."""
    if q.rotation is None:
        return x
    axis = CONTRACTION[name]
    short = -x.shape[axis] % q.rotation.size if q.pad else 0
    if short:
        x = jnp.pad(x, [(0, short if i == axis % x.ndim else 0) for i in range(x.ndim)])
    return hadamard(x, q.rotation.size, _signs(q, x.shape[axis], name, streams), axis=axis)


def unrotate(q: Quantizer, g: Float[Array, "..."], name: str, streams: Streams, length: int) -> Float[Array, "..."]:
    """The inverse of `rotate` for a gradient with respect to the operand, cut to the length of its axis."""
    if q.rotation is None:
        return g
    axis = CONTRACTION[name]
    g = inverse_hadamard(g, q.rotation.size, _signs(q, g.shape[axis], name, streams), axis=axis)
    return jax.lax.slice_in_dim(g, 0, length, axis=axis % g.ndim)


def _signs(q, length, name, streams):
    return q.rotation.draw_signs(length, streams.signs(name))


def gradient_mask(q: Quantizer, operand: Operand) -> Bool[Array, "..."] | None:
    """Where the estimator of a forward operand lets the gradient pass, in rotated coordinates; None: everywhere."""
    if isinstance(q.estimator, Clip) and operand.rounded is not None:
        return inside(operand.source, operand.rounded, q.estimator.margin)
    return None
