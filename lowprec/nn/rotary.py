"""Rotary position embedding (Su et al., arXiv 2104.09864), in float32.

Angles, cosines and the rotation itself stay in float32 whatever the model's dtype: in bfloat16 q·k stops being a
function of the distance (arXiv 2411.13476). That fault can be had, to be studied.
"""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from lowprec.typing import Array, Float, Int


def rotary(
    x_BTHD: Float[Array, "B T H D"],
    positions_T: Int[Array, " T"],
    base: float = 10_000.0,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "B T H D"]:
    """Rotates the pairs (x_i, x_{i + D/2}) of each head by position · base^(-2i/D).

    Args:
      x_BTHD: queries or keys, D even.
      positions_T: of the tokens.
      dtype: to which x, cosines, sines and the result of each operation of the rotation are rounded. Positions and
        angles are float32 in any case.
    """
    half = x_BTHD.shape[-1] // 2
    frequency_F = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_TF = positions_T.astype(jnp.float32)[:, None] * frequency_F
    rounded = _rounding(dtype)
    cosine, sine = (rounded(f(angle_TF))[:, None, :] for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(rounded(x_BTHD.astype(jnp.float32)), 2, axis=-1)
    times = lambda a, b: rounded(a * b)
    rotated = jnp.concatenate(
        [times(first, cosine) - times(second, sine), times(second, cosine) + times(first, sine)], axis=-1
    )
    return rounded(rotated).astype(x_BTHD.dtype)


def _rounding(dtype: DTypeLike):
    """XLA may compute what is said to be bfloat16 in float32, but not this."""
    if jnp.dtype(dtype) == jnp.float32:
        return lambda x: x
    bits = jnp.finfo(dtype)
    return lambda x: lax.reduce_precision(x, bits.nexp, bits.nmant)
