"""Multiplier: one way to compute a product of two operands, with the reason why it cannot."""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp

from lowprec.ops.operand import Operand
from lowprec.typing import Array


@dataclass(frozen=True)
class Multiplier:
    """What multiplies operands for their elements, and scales the products.

    Args:
      name: as people know it.
      multiply: the product of two operands, float32.
      why_not: the reason why it cannot multiply two operands, or None; from formats, shapes and the target alone.
      dtypes: those of the elements that it takes (`codes.native_dtype`).
    """

    name: str
    multiply: Callable[[Operand, Operand], Array]
    why_not: Callable[[Operand, Operand], str | None]
    dtypes: tuple[jnp.dtype, ...]

    def __str__(self):
        return self.name
