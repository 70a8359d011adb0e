"""bfloat16 parameters and the rest of each weight in the optimizer's state: 24 or 32 bits a weight, no float32 copy."""

from dataclasses import dataclass

import jax.numpy as jnp
import optax

from lowprec.errors import UsageError
from lowprec.optim.narrow_weights import Narrow, narrow_weights
from lowprec.optim.split_floats import join, leading, rest_dtype, rest_of
from lowprec.optim.stochastic_weights import is_narrow


def split_weights(tx: optax.GradientTransformation, bits: int = 32) -> Narrow:
    """An optimizer of bfloat16 parameters that are the leading part of wider weights; the rest is in its state.

    The optimizer sees the whole weights. With 32 bits they are float32 weights, bit for bit (`split`). With 24, the
    rest is an int8 in units of 1/254 of a spacing of bfloat16 (FlashOptim, arXiv 2602.23349); it is rounded to nearest,
    so that updates below 2^-17 of a weight are lost. Parameters in float32 stay as they are.

    Args:
      tx: the whole optimizer, its learning rate and decay among it.
      bits: of a weight, 24 or 32.
    Raises:
      UsageError: (a ValueError) for other bits, and for parameters in other narrow dtypes.
    """
    return narrow_weights(tx, Split(rest_dtype(bits)))


@dataclass(frozen=True)
class Split:
    """`narrow_weights.Storage` by a rest in integers."""

    dtype: jnp.dtype
    seed = None

    def stores(self, w):
        if is_narrow(w) and w.dtype != jnp.bfloat16:
            raise UsageError(f"weights are split into bfloat16 and a rest; there are {w.dtype} parameters")
        return is_narrow(w)

    def start(self, w):
        return jnp.zeros(w.shape, self.dtype)

    def load(self, w, rest):
        return join(w, rest)

    def rounded(self, total, like, key, rows):
        return leading(total, self.dtype)

    def rest(self, total, w):
        return rest_of(total, w, self.dtype)
