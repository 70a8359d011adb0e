"""n:m sparsity: of every m neighbours along the contraction axis, only the n largest magnitudes are multiplied."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax

from lowprec.errors import UsageError
from lowprec.quantizers.composed import Inner, inner_learns, inner_params, quantize_inner
from lowprec.quantizers.scales import AbsMax
from lowprec.quantizers.surrogate import with_slopes
from lowprec.quantizers.variables import Differentiable
from lowprec.typing import Array, Bool, Float


def nm_mask(w: Float[Array, "..."], n: int = 2, m: int = 4, axis: int = -2) -> Bool[Array, "..."]:
    """Where the n largest magnitudes of every m consecutive values stand; of equal ones, the first.

    Args:
      w: any shape. The last group of the axis may be shorter than m: it keeps n values at most.
      axis: along which groups lie; of a kernel (…, K, N) the contraction axis is -2.
    Raises:
      UsageError: (a ValueError) unless 0 < n <= m.
    """
    if not 0 < n <= m:
        raise UsageError(f"n:m sparsity keeps n of m values, 0 < n <= m, not {n}:{m}")
    magnitude = jnp.moveaxis(jnp.abs(lax.stop_gradient(w)), axis, -1)
    length = magnitude.shape[-1]
    # What fills up the last group is smaller than any magnitude.
    filled = jnp.pad(magnitude, [(0, 0)] * (w.ndim - 1) + [(0, -length % m)], constant_values=-1)
    groups = filled.reshape(*filled.shape[:-1], -1, m)
    index = jnp.arange(m)
    own, other = groups[..., :, None], groups[..., None, :]
    before = (other > own) | ((other == own) & (index[None, :] < index[:, None]))
    kept = jnp.sum(before, axis=-1) < n
    return jnp.moveaxis(kept.reshape(filled.shape)[..., :length], -1, axis)


@dataclass(frozen=True)
class Sparse(Differentiable):
    """w ⊙ mask, quantized; the gradient of the product passes to all of w, masked or not (AST, arXiv 2407.20584).

    The mask is that of the magnitudes, made again at every call. What it cuts takes no part in the choice of scales.

    Args:
      n, m: how many of how many neighbours along the contraction axis are kept.
      inner: the scale rule of the values that are left, or a differentiable one, which may learn.
    """

    n: int = 2
    m: int = 4
    inner: Inner = AbsMax()

    @property
    def learns(self):
        return inner_learns(self.inner)

    def initial_params(self, x, fmt, axis):
        return inner_params(self.inner, self._masked(x, axis), fmt, axis)

    def quantize(self, x, fmt, axis, params, state, key):
        return quantize_inner(self.inner, self._masked(x, axis), fmt, axis, params, key)

    def _masked(self, x, axis):
        wide = x.astype(jnp.float32)
        return with_slopes(jnp.where(nm_mask(wide, self.n, self.m, axis), wide, 0), (jnp.ones(()), wide))

    def __str__(self):
        inner = "" if str(self.inner) == "absmax" else f", {self.inner}"
        return f"{self.n}:{self.m} sparse{inner}"
