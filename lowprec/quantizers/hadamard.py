"""Hadamard rotations of blocks or of a whole axis: they spread an outlier, and cancel inside a product.

The signs D come first, x · D · H. In x · H · D they would only flip the signs of rotated values, which no odd
quantizer sees: drawing them anew would change nothing.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import lax

from lowprec.errors import UsageError
from lowprec.formats.random import Key, random_bits
from lowprec.quantizers.hadamard_orders import base_matrix, next_length, split_order
from lowprec.typing import Array, Float

# The sign vector that NVIDIA's NVFP4 recipe uses in all layers and steps (TransformerEngine, arXiv 2509.25149).
FIXED_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


@dataclass(frozen=True)
class Hadamard:
    """A rotation of one operand of a product.

    Args:
      size: of a block, a power of two; "full": the whole axis, whose length is a power of two times an order for which
        a Hadamard matrix is constructed here: 12, 20, 28, … (`hadamard_matrix`).
      signs: None: H alone; "fixed": always the same signs; "random": drawn for each call, one vector of the length of
        the axis, shared by the two operands of the product.
      side: "inner": along the contraction axis, where the rotations of both operands cancel; "outer": along the other
        axis of the operand, undone on the product (HALO, arXiv 2501.02625).
    """

    size: int | Literal["full"]
    signs: Literal["fixed", "random"] | None = None
    side: Literal["inner", "outer"] = "inner"

    def __post_init__(self):
        if self.size != "full" and (not isinstance(self.size, int) or self.size < 2 or self.size & (self.size - 1)):
            raise UsageError(
                f"the size of a Hadamard block is a power of two, not {self.size}; 'full' rotates a whole axis"
            )
        if self.signs not in (None, "fixed", "random"):
            raise UsageError(f"signs are None, 'fixed' or 'random', not {self.signs!r}")
        if self.side not in ("inner", "outer"):
            raise UsageError(f"the side of a rotation is 'inner' or 'outer', not {self.side!r}")

    def block(self, length: int) -> int:
        """The size of the blocks of an axis."""
        return length if self.size == "full" else self.size

    def padded(self, length: int) -> int:
        """The next length that can be rotated."""
        return next_length(max(length, 1)) if self.size == "full" else -(-length // self.size) * self.size

    def draw_signs(self, length: int, key: Key | None) -> Float[Array, " n"] | None:
        """The ±1 vector for an axis of this (padded) length."""
        if self.signs is None:
            return None
        if self.signs == "fixed":
            return jnp.asarray(np.resize(FIXED_SIGNS, length), jnp.float32)
        if key is None:
            raise ValueError("a rotation with random signs needs a key")
        return 1.0 - 2.0 * (random_bits(key, (length,)) >> 31).astype(jnp.float32)

    def __str__(self):
        matrix = "full H" if self.size == "full" else f"H{self.size}"
        signs = "" if self.signs is None else f"{self.signs} signs · "
        return f"{signs}{matrix}{' (undone on the product)' if self.side == 'outer' else ''}"


def hadamard(
    x: Float[Array, "..."], size: int, signs: Float[Array, " n"] | None = None, *, axis: int = -1
) -> Float[Array, "..."]:
    """Rotates an axis by blocks of the normalized Hadamard matrix: x · D · H.

    Args:
      x: any shape, float32 or bfloat16; the result has its dtype (sums are always float32).
      size: block length that divides the axis, an order of `hadamard_matrix`.
      signs: ±1, as long as the axis; None for none.
      axis: the axis that is rotated.
    Raises:
      UsageError: (a ValueError) if size does not divide the axis, or no matrix of that order is constructed here.
    """
    if signs is not None:
        x = x * _along(signs, axis, x)
    return _rotate(x, size, axis, base_matrix)


def inverse_hadamard(
    x: Float[Array, "..."], size: int, signs: Float[Array, " n"] | None = None, *, axis: int = -1
) -> Float[Array, "..."]:
    """Undoes `hadamard`: x · Hᵀ · D."""
    x = _rotate(x, size, axis, lambda order: base_matrix(order).T)
    return x if signs is None else x * _along(signs, axis, x)


def hadamard_matrix(size: int) -> np.ndarray:
    """A matrix H of ±1 with H · Hᵀ = size · 1: a base matrix ⊗ Sylvester's of a power of two.

    Args:
      size: a power of two, or one times the order of a base: 12, 20, 28, 36, … up to 184 all multiples of 4. The bases
        are those of Paley (1933) and, where they fail (92, 116, 156, 172), of circulant blocks.
    Raises:
      UsageError: (a ValueError) naming the nearest orders, if no such matrix is constructed here.
    """
    base, power = _orders(size)
    return np.kron(base_matrix(base), _sylvester(power))


def _orders(size):
    orders = split_order(size)
    if orders is None:
        near = [str(next_length(size, step)) for step in (-1, 1)] if size > 0 else ["1"]
        raise UsageError(
            f"no Hadamard matrix of order {size} is constructed here; the nearest are {' and '.join(near)}"
        )
    return orders


def _sylvester(size):
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _rotate(x, size, axis, base_of):
    axis %= x.ndim
    base, power = _orders(size)
    if x.shape[axis] % size:
        raise UsageError(f"Hadamard blocks of {size} do not divide axis {axis} of shape {x.shape}")
    rotated = x if base == 1 else _by_base(x, base_of(base), power, axis)
    rotated = _by_matrices(rotated, power) if axis == x.ndim - 1 else _by_butterflies(rotated, power, axis)
    # ±1 entries are exact in any dtype and the norm is applied in float32; with 1/√n entries bf16 would lose 1e-4.
    return (rotated * np.float32(size**-0.5)).astype(x.dtype)


def _by_base(x, matrix, power, axis):
    """The left factor of matrix ⊗ H_power."""
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    blocks = x.shape[axis] // (len(matrix) * power)
    parts = x.astype(jnp.float32).reshape(*before, blocks, len(matrix), power, *after)
    mixed = lax.dot_general(parts, matrix, (((axis + 1,), (0,)), ((), ())), precision="highest")
    return jnp.moveaxis(mixed, -1, axis + 1).reshape(x.shape)


def _by_matrices(x, size):
    """The last axis, as H_a ⊗ H_b (⊗ H_16 …): small products instead of one with size² entries."""
    factors = [min(size, 16)]
    while (rest := size // int(np.prod(factors))) > 1:
        factors.insert(0, rest if rest <= 64 else 16)
    blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // size, *factors)
    for i, factor in enumerate(factors):
        axis = blocks.ndim - len(factors) + i
        product = lax.dot_general(blocks, _sylvester(factor), (((axis,), (0,)), ((), ())), precision="highest")
        blocks = jnp.moveaxis(product, -1, axis)
    return blocks.reshape(x.shape)


def _by_butterflies(x, size, axis):
    """Any other axis: rounds of sums and differences, two at a time, in which the last axis stays contiguous."""
    y = x.astype(jnp.float32)
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    half = 1
    while half < size:
        radix = min(4, size // half)
        parts = y.reshape(*before, x.shape[axis] // (radix * half), radix, half, *after)
        parts = [lax.index_in_dim(parts, i, axis + 1, keepdims=False) for i in range(radix)]
        y = jnp.stack(_butterfly(parts), axis=axis + 1)
        half *= radix
    return y.reshape(x.shape)


def _butterfly(parts):
    """Their Walsh-Hadamard transform."""
    if len(parts) == 1:
        return parts
    even, odd = parts[::2], parts[1::2]
    sums = _butterfly([a + b for a, b in zip(even, odd, strict=True)])
    differences = _butterfly([a - b for a, b in zip(even, odd, strict=True)])
    return [part for pair in zip(sums, differences, strict=True) for part in pair]


def _along(signs, axis, x):
    return signs.astype(x.dtype).reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])
