"""How operands are cut for a TPU: its registers hold 8 × 128 numbers, and blocks in memory are made of whole ones."""

from dataclasses import dataclass

import jax.numpy as jnp

from lowprec.typing import Array

LANES = 128
SUBLANES = 8


@dataclass(frozen=True)
class Tiles:
    """The largest blocks of a product (M, K) · (N, K)ᵀ. Nothing was measured: they fit 16 MiB, twice in flight."""

    m: int = 256
    n: int = 512
    k: int = 1024


def up_to(size: int, unit: int) -> int:
    """The next multiple of a unit."""
    return -(-size // unit) * unit


def tile(size: int, largest: int, unit: int = LANES) -> int:
    """The block of an axis: all of it where it is short, else the largest allowed."""
    return min(largest, up_to(size, unit))


def filled(x: Array, *units: int) -> Array:
    """x with zeros up to multiples of the units, one an axis."""
    widths = [(0, up_to(size, unit) - size) for size, unit in zip(x.shape, units, strict=True)]
    return jnp.pad(x, widths) if any(width for _, width in widths) else x
