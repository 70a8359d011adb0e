"""Block Walsh–Hadamard rotations: they spread an outlier over its block, and cancel inside a product.

The signs D come first, x · D · H. In x · H · D they would only flip the signs of rotated values, which no odd
quantizer sees: drawing them anew would change nothing.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowprec.errors import UsageError
from lowprec.formats.random import random_bits
from lowprec.typing import Array, Float

# The sign vector that NVIDIA's NVFP4 recipe uses in all layers and steps (TransformerEngine, arXiv 2509.25149).
FIXED_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


@dataclass(frozen=True)
class Hadamard:
    """A rotation by blocks along the contraction axis of a product.

    Args:
      size: of a block, a power of two.
      signs: None: H alone; "fixed": always the same signs; "random": drawn for each call, one vector of the length of
        the axis, shared by the two operands of the product.
    """

    size: int
    signs: Literal["fixed", "random"] | None = None

    def __post_init__(self):
        if self.size < 2 or self.size & (self.size - 1):
            raise UsageError(f"the size of a Hadamard block is a power of two, not {self.size}")
        if self.signs not in (None, "fixed", "random"):
            raise UsageError(f"signs are None, 'fixed' or 'random', not {self.signs!r}")

    def draw_signs(self, length: int, key: jax.Array | None) -> Float[Array, " n"] | None:
        """The ±1 vector for an axis of this (padded) length."""
        if self.signs is None:
            return None
        if self.signs == "fixed":
            return jnp.asarray(np.resize(FIXED_SIGNS, length), jnp.float32)
        if key is None:
            raise ValueError("a rotation with random signs needs a key")
        return 1.0 - 2.0 * (random_bits(key, (length,)) >> 31).astype(jnp.float32)

    def __str__(self):
        return f"{'' if self.signs is None else f'{self.signs} signs · '}H{self.size}"


def hadamard(
    x: Float[Array, "..."], size: int, signs: Float[Array, " n"] | None = None, *, axis: int = -1
) -> Float[Array, "..."]:
    """Rotates an axis by blocks of the normalized Walsh–Hadamard matrix: x · D · H.

    Args:
      x: any shape, float32 or bfloat16; the result has its dtype (sums are always float32).
      size: block length, a power of two that divides the axis.
      signs: ±1, as long as the axis; None for none.
      axis: the axis that is rotated.
    Raises:
      UsageError: (a ValueError) if size does not divide the axis.
    """
    if signs is not None:
        x = x * _along(signs, axis, x)
    return _rotate(x, size, axis)


def inverse_hadamard(
    x: Float[Array, "..."], size: int, signs: Float[Array, " n"] | None = None, *, axis: int = -1
) -> Float[Array, "..."]:
    """Undoes `hadamard`: x · H · D (H is symmetric and its own inverse)."""
    x = _rotate(x, size, axis)
    return x if signs is None else x * _along(signs, axis, x)


def hadamard_matrix(size: int) -> np.ndarray:
    """Sylvester's matrix of ±1, size × size."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _rotate(x, size, axis):
    axis %= x.ndim
    if x.shape[axis] % size:
        raise UsageError(f"Hadamard blocks of {size} do not divide axis {axis} of shape {x.shape}")
    rotated = _by_matrices(x, size) if axis == x.ndim - 1 else _by_butterflies(x, size, axis)
    # ±1 entries are exact in any dtype and the norm is applied in float32; with 1/√n entries bf16 would lose 1e-4.
    return (rotated * np.float32(size**-0.5)).astype(x.dtype)


def _by_matrices(x, size):
    """The last axis, as H_a ⊗ H_b: two small products instead of one with size² entries."""
    inner = min(size, 16)
    blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // size, size // inner, inner)
    product = partial(jnp.einsum, precision="highest")
    if size > inner:
        blocks = product("...ab,ac->...cb", blocks, hadamard_matrix(size // inner))
    return product("...b,bc->...c", blocks, hadamard_matrix(inner)).reshape(x.shape)


def _by_butterflies(x, size, axis):
    """Any other axis: log2(size) rounds of sums and differences, in which the last axis stays contiguous."""
    y = x.astype(jnp.float32)
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    half = 1
    while half < size:
        pairs = y.reshape(*before, x.shape[axis] // (2 * half), 2, half, *after)
        first, second = (lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in (0, 1))
        y = jnp.stack([first + second, first - second], axis=axis + 1)
        half *= 2
    return y.reshape(x.shape)


def _along(signs, axis, x):
    return signs.astype(x.dtype).reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])
