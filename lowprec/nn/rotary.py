"""Rotary position embedding (Su et al., arXiv 2104.09864), in float32.

Angles, cosines and the rotation itself stay in float32 whatever the model's dtype: in bfloat16 integers above 256 are
inexact and q·k stops being a function of the distance (arXiv 2411.13476).
"""

import jax.numpy as jnp

from lowprec.typing import Array, Float, Int


def rotary(
    x_BTHD: Float[Array, "B T H D"], positions_T: Int[Array, " T"], base: float = 10_000.0
) -> Float[Array, "B T H D"]:
    """Rotates the pairs (x_i, x_{i + D/2}) of each head by position · base^(-2i/D).

    Args:
      x_BTHD: queries or keys, D even.
      positions_T: of the tokens.
    """
    half = x_BTHD.shape[-1] // 2
    frequency_F = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_TF = positions_T.astype(jnp.float32)[:, None] * frequency_F
    cosine, sine = jnp.cos(angle_TF)[:, None, :], jnp.sin(angle_TF)[:, None, :]
    first, second = jnp.split(x_BTHD.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return rotated.astype(x_BTHD.dtype)
