"""Weights that cluster by differentiable k-means: DKM (arXiv 2108.12659), in the form of a table (eDKM, 2309.00964).

Soft clusters: a_ik = softmax_k(-|w_i - c_k| / τ), c_k = Σ_i a_ik w_i / Σ_i a_ik, ŵ_i = Σ_k a_ik c_k. All of it depends
on a weight through its value alone, and a bfloat16 has 65 536 values: it is computed once for each of them and looked
up by the 16 bits of the weight. The backward pass sums the cotangents of equal weights (`segment_sum`) and keeps the
indices alone, 2 bytes a weight, in place of several floats for each weight and cluster.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowprec.errors import UsageError, unknown
from lowprec.formats.types import BlockFormat, IntFormat
from lowprec.quantizers.surrogate import with_slopes
from lowprec.quantizers.variables import Differentiable
from lowprec.typing import Array, Float, UInt

PATTERNS = 1 << 16
FORMS = ("dense", "table")

# Of weights (n,) and parameters: rows (n,) or (n, m), each of its own weight and the parameters alone.
Rows = Callable[..., Array]


def pattern_index(w: Float[Array, "..."]) -> UInt[Array, "..."]:
    """The 16 bits of each weight as a bfloat16: uint16."""
    return lax.bitcast_convert_type(w.astype(jnp.bfloat16), jnp.uint16)


def all_patterns() -> Float[Array, " 65536"]:
    """The values in the order of their bits, float32; zero in the place of infinities and NaN."""
    values = lax.bitcast_convert_type(jnp.arange(PATTERNS, dtype=jnp.uint16), jnp.bfloat16).astype(jnp.float32)
    return jnp.where(jnp.isfinite(values), values, 0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def look_up(rows: Rows, w: Float[Array, " n"], index: UInt[Array, " n"], *parameters: Array) -> Float[Array, " n"]:
    """rows(w, *parameters), by the table.

    Args:
      rows: gives (n,).
      w: bfloat16 values in float32.
      index: their `pattern_index`.
    """
    return jnp.where(jnp.isfinite(w), rows(_used(index), *parameters)[index], jnp.nan)


def _look_up_forward(rows, w, index, *parameters):
    return look_up(rows, w, index, *parameters), (index, parameters)


def _look_up_backward(rows, kept, cotangent):
    index, parameters = kept
    _, vjp = jax.vjp(rows, _used(index), *parameters)
    slopes, *_ = vjp(jnp.ones(PATTERNS))
    _, *of_parameters = vjp(_sums_of_equals(cotangent, index))
    return cotangent * slopes[index], None, *of_parameters


look_up.defvjp(_look_up_forward, _look_up_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def sum_up(rows: Rows, w: Float[Array, " n"], index: UInt[Array, " n"], *parameters: Array) -> Float[Array, " m"]:
    """Σ_i rows(w, *parameters)_i, by the table: each pattern's (m,) times the number of its weights; see `look_up`."""
    return _counts(index) @ rows(_used(index), *parameters)


def _sum_up_forward(rows, w, index, *parameters):
    return sum_up(rows, w, index, *parameters), (index, parameters)


def _sum_up_backward(rows, kept, cotangent):
    index, parameters = kept
    _, vjp = jax.vjp(rows, _used(index), *parameters)
    each, *_ = vjp(jnp.broadcast_to(cotangent, (PATTERNS, cotangent.size)))
    _, *of_parameters = vjp(_counts(index)[:, None] * cotangent)
    return each[index], None, *of_parameters


sum_up.defvjp(_sum_up_forward, _sum_up_backward)


def _used(index):
    """The table without patterns that no weight has: a row may overflow there, and no number times zero is none."""
    return jnp.where(_counts(index) > 0, all_patterns(), 0)


def _counts(index):
    return _sums_of_equals(jnp.ones(index.shape, jnp.float32), index)


def _sums_of_equals(values, index):
    return jax.ops.segment_sum(values, index.astype(jnp.int32), PATTERNS)


def attention(w: Float[Array, " n"], centroids: Float[Array, " k"], tau: Float[Array, ""]) -> Float[Array, "n k"]:
    """softmax_k(-|w_i - c_k| / τ)."""
    return jax.nn.softmax(-jnp.abs(w[:, None] - centroids) / tau, axis=-1)


def _soft(w, centroids, tau):
    return jnp.sum(attention(w, centroids, tau) * centroids, axis=-1)


def _nearest(w, centroids):
    return centroids[jnp.argmin(jnp.abs(w[:, None] - centroids), axis=-1)]


def _moments(w, centroids, tau):
    a = attention(w, centroids, tau)
    return jnp.concatenate([a * w[:, None], a], axis=-1)


@dataclass(frozen=True)
class SoftClusters(Differentiable):
    """2^b centroids for a tensor, b the bits of the format: uint3@tensor stands for eight.

    They start at the quantiles of a Gaussian with the mean and the spread of the weights, and are iterated until none
    moves by more than a thousandth of the spread. The gradient passes through the attention and through the last
    iteration; the fixed point before it counts as constant. Weights are read as bfloat16, straight-through.

    Args:
      temperature: τ in units of the spread, the standard deviation of the weights.
      iterations: at most.
      snapped: the values are the nearest centroids, with the gradient of the soft ones: what is trained is what is
        stored. False: the soft values themselves, as in the papers, which snap them once the training is over.
      form: "dense": a row a weight; "table": a row a pattern; None: the one with fewer rows.
    """

    temperature: float = 0.05
    iterations: int = 30
    snapped: bool = True
    form: Literal["dense", "table"] | None = None
    learns = False

    def __post_init__(self):
        if self.temperature <= 0 or self.iterations < 1:
            raise UsageError(f"soft clusters have a positive temperature and an iteration at least, not {self!r}")
        if self.form is not None and self.form not in FORMS:
            raise unknown("form of soft clusters", self.form, FORMS)

    def initial_params(self, x, fmt, axis):
        return {}

    def quantize(self, x, fmt, axis, params, state, key):
        clusters = _cluster_count(fmt)
        w = x.astype(jnp.float32).reshape(-1)
        w = with_slopes(w.astype(jnp.bfloat16).astype(jnp.float32), (jnp.float32(1), w))
        still = lax.stop_gradient(w)
        mean, spread = jnp.mean(still), jnp.std(still)
        spread = jnp.where(spread > 0, spread, 1.0)
        tau = np.float32(self.temperature) * spread
        evaluate, total = self._by_form(w.size, pattern_index(still))
        quantiles = [NormalDist().inv_cdf((k + 0.5) / clusters) for k in range(clusters)]
        start = mean + spread * jnp.array(quantiles, jnp.float32)

        def update(w, centroids):
            weighted, weight = jnp.split(total(_moments, w, centroids, tau), 2)
            return jnp.where(weight > 0, weighted / jnp.where(weight > 0, weight, 1), centroids)

        settled = self._settled(lambda centroids: update(still, centroids), start, spread)
        centroids = update(w, settled)
        values = evaluate(_soft, w, centroids, tau)
        if self.snapped:
            nearest = evaluate(_nearest, still, lax.stop_gradient(centroids))
            values = with_slopes(nearest, (jnp.float32(1), values))
        return values.reshape(x.shape), jnp.ones(x.shape, bool)

    def _by_form(self, size, index):
        """Rows for all weights, and their sum."""
        table = size >= PATTERNS if self.form is None else self.form == "table"
        if table:
            return (lambda rows, w, *p: look_up(rows, w, index, *p)), (lambda rows, w, *p: sum_up(rows, w, index, *p))
        return (lambda rows, w, *p: rows(w, *p)), (lambda rows, w, *p: jnp.sum(rows(w, *p), axis=0))

    def _settled(self, update, start, spread):
        def moves(carry):
            before, now, count = carry
            return (count < self.iterations) & (jnp.max(jnp.abs(now - before)) > np.float32(1e-3) * spread)

        step = lambda carry: (carry[1], update(carry[1]), carry[2] + 1)
        return lax.stop_gradient(lax.while_loop(moves, step, (start, update(start), jnp.int32(1)))[1])

    def __str__(self):
        return f"{'' if self.snapped else 'soft '}clusters, τ {self.temperature:g} σ"


def _cluster_count(fmt) -> int:
    element = fmt.element if isinstance(fmt, BlockFormat) else None
    if not (isinstance(element, IntFormat) and not element.signed and fmt.block == "tensor" and element.bits <= 8):
        raise UsageError(f"clusters are numbered by unsigned integers of 8 bits at most, uint3@tensor; not by {fmt}")
    return 2**element.bits
