"""n:m sparsity: of every m neighbours along the contraction axis, only the n most important values are multiplied."""

from dataclasses import dataclass
from typing import Literal, get_args

import jax.numpy as jnp
from jax import lax

from lowprec.errors import UsageError, unknown
from lowprec.quantizers.composed import Inner, inner_learns, inner_params, quantize_inner
from lowprec.quantizers.scales import AbsMax
from lowprec.quantizers.surrogate import with_slopes
from lowprec.quantizers.variables import Differentiable
from lowprec.typing import Array, Bool, Float

Importance = Literal["magnitude", "wanda"]
# The parameters of `Sparse` beside those of its inner rule.
SQUARES, BLOCKS = "input_squares", "block_weights"


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


def wanda_scores(w: Float[Array, "... K N"], squares: Float[Array, "... K"]) -> Float[Array, "... K N"]:
    """w · √(mean square of its input): magnitudes are what Wanda ranks weights by (|W| · ‖x‖, arXiv 2306.11695, eq. 1).

    Args:
      squares: of the inputs, in any unit: those of a group are compared with each other.
    """
    return w * jnp.sqrt(squares)[..., None]


def input_squares(x: Float[Array, "... M K"], w: Float[Array, "... K N"]) -> Float[Array, "... K"]:
    """The mean square of each input of a product, over its rows, and over the leading axes that w does not have."""
    beyond = tuple(range(x.ndim - w.ndim))
    return jnp.mean(jnp.square(x.astype(jnp.float32)), axis=(*beyond, -2))


def block_means(w: Float[Array, "..."], size: int, axis: int = -2) -> Float[Array, "..."]:
    """The mean of every `size` consecutive values along an axis; the last block may be shorter."""
    lines = jnp.moveaxis(w, axis, -1)
    length = lines.shape[-1]
    filled = jnp.pad(lines, [(0, 0)] * (w.ndim - 1) + [(0, -length % size)])
    sums = jnp.sum(filled.reshape(*filled.shape[:-1], -1, size), axis=-1)
    counts = jnp.minimum(size, length - size * jnp.arange(sums.shape[-1]))
    return jnp.moveaxis(sums / counts, -1, axis)


@dataclass(frozen=True)
class Sparse(Differentiable):
    """w ⊙ mask, quantized; the gradient of the product passes to all of w, masked or not (AST, arXiv 2407.20584).

    The mask is made again at every call. What it cuts takes no part in the choice of scales. With `blocks`, k, of its
    SLoRB branch, Q(w ⊙ mask) + B: B is W_s, one learned weight for each k inputs of an output, at first the mean over
    them of what is cut (kept weights count as zeros): the best B of least squares. To add x · B is to multiply the sums
    of every k inputs by W_s, with the same gradient: those are the (out × in / k) weights that AST adds.

    Args:
      n, m: how many of how many neighbours along the contraction axis are kept.
      inner: the scale rule of the values that are left, or a differentiable one, which may learn.
      importance: what is compared: "magnitude", or "wanda", |w| · ‖x‖ with the norms of the inputs that the parameters
        start from; they are parameters without a gradient, measured anew where a stage of a schedule begins.
      blocks: k; 0: no branch.
    """

    n: int = 2
    m: int = 4
    inner: Inner = AbsMax()
    importance: Importance = "magnitude"
    blocks: int = 0

    def __post_init__(self):
        if self.importance not in get_args(Importance):
            raise unknown("importance of a weight", self.importance, get_args(Importance))
        if self.blocks < 0:
            raise UsageError(f"a block branch sums 1 input or more (0: no branch), not {self.blocks}")

    @property
    def learns(self):
        return inner_learns(self.inner) or self.importance == "wanda" or bool(self.blocks)

    def initial_params(self, x, fmt, axis):
        if self.importance == "wanda":
            raise UsageError(f"weights with {self} are measured with their inputs: they have no parameters without")
        return self._initial_params(x, fmt, axis, {})

    def calibrated_params(self, w, inputs, fmt, axis):
        own = {SQUARES: input_squares(inputs, w)} if self.importance == "wanda" else {}
        return self._initial_params(w, fmt, axis, own)

    def quantize(self, x, fmt, axis, params, state, key):
        values, inside = quantize_inner(self.inner, self._masked(x, axis, params), fmt, axis, params, key)
        if self.blocks:
            spread = jnp.repeat(params[BLOCKS], self.blocks, axis)
            values = values + lax.slice_in_dim(spread, 0, x.shape[axis], axis=axis % x.ndim)
        return values, inside

    def _initial_params(self, x, fmt, axis, own):
        kept = self._masked(x, axis, own)
        if self.blocks:
            own = own | {BLOCKS: block_means(x.astype(jnp.float32) - kept, self.blocks, axis)}
        return inner_params(self.inner, kept, fmt, axis) | own

    def _masked(self, x, axis, params):
        wide = x.astype(jnp.float32)
        scores = wanda_scores(wide, params[SQUARES]) if self.importance == "wanda" else wide
        return with_slopes(jnp.where(nm_mask(scores, self.n, self.m, axis), wide, 0), (jnp.ones(()), wide))

    def __str__(self):
        parts = [f"{self.n}:{self.m} sparse"]
        parts += [f"by {self.importance}"] * (self.importance != "magnitude")
        inner = [] if str(self.inner) == "absmax" else [str(self.inner)]
        branch = [f"block weights of {self.blocks} inputs"] * bool(self.blocks)
        return ", ".join([" ".join(parts), *inner, *branch])
