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

from lowprec.errors import UsageError, unknown
from lowprec.typing import Array, UInt32

GENERATORS = ("hash", "threefry")

_CONSTANTS = np.uint32(0x9E3779B9), np.uint32(0x85EBCA77), np.uint32(0xC2B2AE3D)  # odd, of random bits


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


def counter_key(seed: jax.Array | int, step: jax.Array | int, salt: int) -> DrawnKey:
    """A key for each step of each of many arrays, at the cost of a few scalars: the hash of seed, step and salt.

    Args:
      seed: an integer, or a typed or legacy key.
      step: counts, modulo 2^32.
      salt: tells arrays apart, below 2^32.
    """
    return _counter_key(*_seed_words(seed), jnp.asarray(step).astype(jnp.uint32), np.uint32(salt))


@jax.jit
def _counter_key(first, second, step, salt):
    # Either word depends on both of the seed: streams of seeds that shared one would be shifted copies.
    first, second = _mix(first + _mix(second ^ _CONSTANTS[0])), _mix(second + _mix(first ^ _CONSTANTS[1]))
    first, second = _mix(first + step), _mix(second ^ step)
    salts = salt, salt ^ _CONSTANTS[2]
    return DrawnKey(*(jnp.stack([_mix(first ^ word), _mix(second + word)]) for word in salts))


def _seed_words(seed):
    if isinstance(seed, int):
        return np.uint32(seed % (1 << 32)), np.uint32((seed >> 32) % (1 << 32))
    words = jax.random.key_data(seed) if jnp.issubdtype(seed.dtype, jax.dtypes.prng_key) else seed.astype(jnp.uint32)
    words = words.reshape(-1)
    return words[0], words[-1]


def random_bits(
    key: Key, shape: tuple[int, ...], generator: str = "hash", rows: tuple[Array | int, int] | None = None
) -> UInt32[Array, "..."]:
    """32 random bits for each element of an array.

    Args:
      key: a typed key, a legacy uint32 key or a drawn one; the same key and shape give the same bits.
      shape: of the whole (global) array, but for `rows`.
      generator: "hash" (fast, fused) or "threefry" (jax.random.bits, the reference).
      rows: (first, total) where the shape is that of a part of an array along axis 0, to give the part its bits of the
        whole array. The first may be traced. Hashes only.
    """
    if generator == "threefry" and not isinstance(key, DrawnKey):
        if rows is not None:
            raise UsageError("only hashes give a part of an array its bits of the whole, not threefry")
        return jax.random.bits(key, shape, jnp.uint32)
    if generator not in GENERATORS[: 1 if isinstance(key, DrawnKey) else 2]:
        raise unknown("random generator", generator, GENERATORS)
    words = key.words if isinstance(key, DrawnKey) else jax.random.bits(key, (2,), jnp.uint32)
    first, total = rows or (0, None)
    low, high = _flat_index(tuple(shape), total=total, first=first)
    return jnp.broadcast_to(bits_at(words, low, high), shape)


def bits_at(
    words: UInt32[Array, " 2"], low: UInt32[Array, "..."], high: UInt32[Array, "..."] | np.uint32 | int = 0
) -> UInt32[Array, "..."]:
    """The random bits of the elements at flat indices, high · 2^32 + low: `random_bits` for a tile of an array.

    Args:
      words: of a `DrawnKey`; of another key, `jax.random.bits(key, (2,), uint32)`.
    """
    return _mix(_mix(low + words[0]) ^ (words[1] + jnp.uint32(high)))


def _flat_index(shape, limit=1 << 32, total=None, first=0):
    """The row-major index of each element, in an array of `total` rows from row `first` on if there is a total.

    Past 2^32 elements the leading axes count in a second word: (low, high).
    """
    whole = shape if not shape or total is None else (total, *shape[1:])
    split = len(whole)
    while split and math.prod(whole[split - 1 :]) <= limit:
        split -= 1
    return tuple(_index(shape, whole, axes, first) for axes in (range(split, len(whole)), range(split)))


def _index(shape, whole, axes, first):
    index: Array | np.uint32 = np.uint32(0)
    stride = 1
    for axis in reversed(axes):
        place = lax.broadcasted_iota(jnp.uint32, shape, axis)
        if axis == 0 and shape != whole:
            place = place + jnp.asarray(first).astype(jnp.uint32)
        index = index + place * np.uint32(stride)
        stride *= whole[axis]
    return index


def _mix(v):
    v = (v ^ (v >> 16)) * np.uint32(0x7FEB352D)
    v = (v ^ (v >> 15)) * np.uint32(0x846CA68B)
    return v ^ (v >> 16)
