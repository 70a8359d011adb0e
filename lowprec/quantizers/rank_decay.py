"""A low-rank bridge over the quantization error that is taken down while the model learns to do without (QVGen)."""

from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from lowprec.errors import UsageError
from lowprec.quantizers.composed import Inner, inner_params, quantize_inner
from lowprec.quantizers.learned_rules import LearnedStep
from lowprec.quantizers.variables import Arrays, Differentiable, Remembering
from lowprec.typing import Array, Float


@dataclass(frozen=True)
class RankDecay(Differentiable, Remembering):
    """Q(w) + (L ⊙ α) R, with L R the best approximation of rank r of w - Q(w) at the start (QVGen, arXiv 2505.11497).

    L and R are learned. In the phases of `interval` steps the rank is r, r / 2, r / 4, …: α is 1 for the first half of
    the columns of a phase and falls as ½ (1 + cos(π t / interval)) for the second, 0 beyond. At the end of a phase
    `halved` turns what is left so that the first half is the best one. A rank below 2 is none: Q(w) alone, bit for bit.

    Args:
      rank: r at the start; a matrix has not more than its smaller side.
      interval: steps a phase.
      inner: Q: a scale rule or a differentiable one.
    """

    rank: int = 32
    interval: int = 444
    inner: Inner = field(default_factory=lambda: LearnedStep("gaussian"))

    def __post_init__(self):
        if self.rank < 2 or self.interval < 1:
            raise UsageError(
                f"a rank decays from 2 or more, in phases of at least a step, not {self.rank} and {self.interval}"
            )

    @property
    def steps(self) -> int:
        """After which a branch of the full rank is gone."""
        return self.interval * (self.rank.bit_length() - 1)

    def initial_params(self, x, fmt, axis):
        params = inner_params(self.inner, x, fmt, axis)
        w = x.astype(jnp.float32)
        quantized, _ = quantize_inner(self.inner, w, fmt, axis, params)
        left, size, right = jnp.linalg.svd(w - quantized, full_matrices=False)
        return params | _factors(left, size, right, self.rank)

    def initial_state(self, fmt):
        return {"rank_steps": jnp.zeros(())}

    def observe(self, x):
        return jnp.ones(1)

    def next_state(self, state, observed, fmt):
        return {"rank_steps": jnp.where(observed[..., 0] > 0, state["rank_steps"] + 1, state["rank_steps"])}

    def alpha(self, steps: Float[Array, ""], rank: int) -> Float[Array, " rank"]:
        """The strength of each column after so many steps."""
        phase = jnp.floor(steps / np.float32(self.interval))
        left = jnp.floor(rank * jnp.exp2(-phase))
        index = jnp.arange(rank)
        falling = 0.5 * (1 + jnp.cos(np.float32(np.pi) * (steps / np.float32(self.interval) - phase)))
        return jnp.where(left < 2, 0, jnp.where(index < left / 2, 1, jnp.where(index < left, falling, 0)))

    def quantize(self, x, fmt, axis, params, state, key):
        values, within = quantize_inner(self.inner, x, fmt, axis, params, key)
        left, right = params["left"], params["right"]
        alpha = self.alpha(state["rank_steps"], left.shape[-1])
        bridged = values + jnp.matmul(left * alpha, right, precision=lax.Precision.HIGHEST)
        return jnp.where(alpha[0] > 0, bridged, values), within

    def halved(self, params: Arrays, state: Arrays) -> dict[str, Any]:
        """The parameters for the step after this state: where a phase begins, the product that is left of the one
        before, by its singular vectors; else as they are. Leading axes of stacked layers are allowed.
        """
        steps, left, right = jnp.max(state["rank_steps"]), params["left"], params["right"]
        phase = jnp.floor(steps / np.float32(self.interval))
        begins = (steps > 0) & (steps == phase * self.interval)
        kept = jnp.arange(left.shape[-1]) < jnp.floor(left.shape[-1] * jnp.exp2(-phase))

        def turned():
            q_left, r_left = jnp.linalg.qr(jnp.where(kept, left, 0))
            q_right, r_right = jnp.linalg.qr(jnp.swapaxes(right, -1, -2))
            product = lambda a, b: jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
            u, size, v = jnp.linalg.svd(product(r_left, jnp.swapaxes(r_right, -1, -2)), full_matrices=False)
            return _factors(product(q_left, u), size, product(v, jnp.swapaxes(q_right, -1, -2)), left.shape[-1])

        as_it_is = lambda: {"left": left, "right": right}
        return dict(params) | lax.cond(begins, turned, as_it_is)

    def __str__(self):
        return f"{self.inner} + rank {self.rank}, halved every {self.interval} steps"


def _factors(left, size, right, rank):
    """The first `rank` columns and rows, the singular values shared between them."""
    root = jnp.sqrt(size[..., :rank])
    return {"left": left[..., :rank] * root[..., None, :], "right": root[..., :, None] * right[..., :rank, :]}
