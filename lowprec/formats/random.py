"""Random bits for stochastic rounding: a keyed hash of the global element index.

h(i; k0, k1) = L(L(i + k0) ^ k1), L the lowbias32 mixer. It fuses into the rounding, so no array of random bits is
ever stored; being a function of the index in the whole array, it gives the same bits on one and on many devices.
Both key words pass through a full mixing round: with one round, consecutive seeds give shifted copies of one stream.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowprec.errors import unknown
from lowprec.typing import Array, UInt32

GENERATORS = ("hash", "threefry")


class DrawnKey(NamedTuple):
    """A key whose two random words are drawn already, and those of fold_in(key, 1): many keys draw theirs at once."""

    words: UInt32[Array, " 2"]
    next_words: UInt32[Array, " 2"]


Key = jax.Array | DrawnKey


def draw_keys(key: jax.Array, count: int) -> list[DrawnKey]:
    """fold_in(key, 0), fold_in(key, 1), … with their words, at the cost of one."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))
    after = jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
    draw = jax.vmap(lambda key: jax.random.bits(key, (2,), jnp.uint32))
    words, next_words = draw(keys), draw(after)
    return [DrawnKey(words[i], next_words[i]) for i in range(count)]


def next_key(key: Key) -> Key:
    """fold_in(key, 1)."""
    if isinstance(key, DrawnKey):
        return key._replace(words=key.next_words)
    return jax.random.fold_in(key, 1)


def random_bits(key: Key, shape: tuple[int, ...], generator: str = "hash") -> UInt32[Array, "..."]:
    """32 random bits for each element of an array.

    Args:
      key: a typed key, a legacy uint32 key or a drawn one; the same key and shape give the same bits.
      shape: of the whole (global) array.
      generator: "hash" (fast, fused) or "threefry" (jax.random.bits, the reference).
    """
    if generator == "threefry" and not isinstance(key, DrawnKey):
        return jax.random.bits(key, shape, jnp.uint32)
    if generator not in GENERATORS[: 1 if isinstance(key, DrawnKey) else 2]:
        raise unknown("random generator", generator, GENERATORS)
    words = key.words if isinstance(key, DrawnKey) else jax.random.bits(key, (2,), jnp.uint32)
    low, high = _flat_index(shape)
    return jnp.broadcast_to(_mix(_mix(low + words[0]) ^ (words[1] + high)), shape)


def _flat_index(shape, limit=1 << 32):
    """The row-major index of each element. Past 2^32 elements the leading axes count in a second word."""
    split = len(shape)
    while split and math.prod(shape[split - 1 :]) <= limit:
        split -= 1
    return _index(shape, range(split, len(shape))), _index(shape, range(split))


def _index(shape, axes):
    index: Array | np.uint32 = np.uint32(0)
    stride = 1
    for axis in reversed(axes):
        index = index + lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride)
        stride *= shape[axis]
    return index


def _mix(v):
    v = (v ^ (v >> 16)) * np.uint32(0x7FEB352D)
    v = (v ^ (v >> 15)) * np.uint32(0x846CA68B)
    return v ^ (v >> 16)
