"""float32 numbers as a bfloat16 and the rest, in 8 or 16 bits."""

import jax.numpy as jnp
import numpy as np

from lowprec.errors import UsageError
from lowprec.formats.bits import MAGNITUDE, from_bits, to_bits
from lowprec.typing import Array, Float, Int


def split(w: Float[Array, "..."], bits: int = 32) -> tuple[Float[Array, "..."], Int[Array, "..."]]:
    """float32 weights as the nearest bfloat16 and an int16 (32 bits) or int8 (24 bits) rest.

    For 32 bits the rest is the difference of the two as integers, -2^15 to 2^15 - 1, and `join` gives every float32
    number back: where two bfloat16 are equally near, it is the one of larger magnitude. For 24 bits it is

        round(127 · clip((w - bfloat16) / (spacing / 2), -1, 1))
    """
    dtype = rest_dtype(bits)
    narrow = leading(w, dtype)
    return narrow, rest_of(w, narrow, dtype)


def join(w: Float[Array, "..."], rest: Array) -> Float[Array, "..."]:
    """float32 weights from what `split` made of them; a rest of floats, as in Kahan's sum, is added."""
    wide = w.astype(jnp.float32)
    if jnp.issubdtype(rest.dtype, jnp.floating):
        return wide + rest.astype(jnp.float32)
    if rest.dtype == jnp.int16:
        return from_bits(to_bits(wide) + rest.astype(jnp.int32).astype(jnp.uint32))
    return wide + rest.astype(jnp.float32) * (half_spacing(wide) / np.float32(127))


def rest_dtype(bits):
    if bits not in (24, 32):
        raise UsageError(f"a weight is split into bfloat16 and 8 or 16 bits more: bits is 24 or 32, not {bits}")
    return jnp.dtype(jnp.int8 if bits == 24 else jnp.int16)


def leading(w, dtype):
    if dtype == jnp.int8:
        return w.astype(jnp.bfloat16)
    rounded = from_bits((to_bits(w) + np.uint32(1 << 15)) & np.uint32(0xFFFF0000))
    return jnp.where(jnp.isnan(w), w, rounded).astype(jnp.bfloat16)


def rest_of(total, w, dtype):
    wide = w.astype(jnp.float32)
    if dtype == jnp.int8:
        return jnp.round(127 * jnp.clip((total - wide) / half_spacing(wide), -1, 1)).astype(dtype)
    return jnp.clip((to_bits(total) - to_bits(wide)).astype(jnp.int32), -(1 << 15), (1 << 15) - 1).astype(dtype)


def half_spacing(wide):
    """Half the spacing of bfloat16 in the binade of a number, a normal float32."""
    field = ((to_bits(wide) & MAGNITUDE) >> 23).astype(jnp.int32)
    return from_bits((jnp.maximum(field - 8, 1) << 23).astype(jnp.uint32))
