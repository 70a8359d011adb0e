"""Whole tiles: zeros, or scales of one, beyond the end of an array."""

import jax.numpy as jnp

from lowprec.typing import Array


def pad_to(x: Array, shape: tuple[int, ...], value: float = 0) -> Array:
    """x with `value` beyond its end, up to a shape; x itself where it has that shape already."""
    if x.shape == tuple(shape):
        return x
    return jnp.pad(x, [(0, new - old) for old, new in zip(x.shape, shape, strict=True)], constant_values=value)
