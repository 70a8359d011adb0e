"""Root mean squares taken out of the rows of an operand, before anything is quantized."""

import jax.numpy as jnp
import numpy as np
from jax import lax

from lowprec.typing import Array, Float


def normalize_rows(x: Float[Array, "..."], axes: tuple[int, ...]) -> Float[Array, "..."]:
    """x / rms(x) over the contraction axes, in float32, then in the dtype of x (BitNet's linear layer)."""
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(wide * wide, axis=axes, keepdims=True)
    return (wide * lax.rsqrt(mean_square + np.float32(1e-5))).astype(x.dtype)
