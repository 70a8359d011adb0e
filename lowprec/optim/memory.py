"""Bytes of an optimizer's state, as they are stored."""

import math
from typing import Any

import jax
import jax.numpy as jnp


def state_bytes(state: Any) -> int:
    """Of all leaves of a state, codes and scales of `StateTensor`s among them.

    Args:
      state: a tree of arrays, or of their shapes: `state_bytes(jax.eval_shape(optimizer.init, params))` makes none.
    """
    return sum(math.ceil(math.prod(leaf.shape) * _bits(leaf.dtype) / 8) for leaf in jax.tree.leaves(state))


def _bits(dtype) -> int:
    """Stored for an element: arrays of int4 and narrower are packed, though their itemsize says one byte."""
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return 8 * dtype.itemsize
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits
    return jnp.finfo(dtype).bits if jnp.issubdtype(dtype, jnp.floating) else 8 * jnp.dtype(dtype).itemsize
