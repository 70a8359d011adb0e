"""The way from one quantizer to another, a little further at each step: w_eff = w + λ · (Q(w) - w), λ from 0 to 1."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from lowprec.errors import UsageError
from lowprec.formats.random import Key, next_key
from lowprec.quantizers.estimators import inside
from lowprec.quantizers.hadamard import hadamard, inverse_hadamard
from lowprec.quantizers.normalize import normalize_rows
from lowprec.quantizers.quantizer import Quantizer
from lowprec.quantizers.surrogate import with_slopes
from lowprec.quantizers.variables import Arrays, Differentiable, Remembering
from lowprec.typing import Array, Bool, Float


@dataclass(frozen=True)
class Blend(Differentiable, Remembering):
    """B(x) + λ · (Q(x) - B(x)) with λ = min(k / steps, 1) in the k-th step, counted from 0.

    Each part is differentiated as its estimator says; with straight-through ones the gradient is that of x, whatever λ.
    At λ = 0 values and gradients are those of B, bit for bit, and at λ = 1 those of Q. (The continual training of
    BitNet b1.58 after 16 bits, arXiv 2502.11895, with B(x) = x.)

    Args:
      before: B, which neither learns nor remembers.
      after: Q, any quantizer of a forward product; it may learn and remember.
      steps: after which λ is 1.
      normalize_before, normalize_after: whether B and Q take x / rms(x) (`GemmRule.normalize_input`).
    """

    before: Quantizer
    after: Quantizer
    steps: int
    normalize_before: bool = False
    normalize_after: bool = False

    def __post_init__(self):
        if self.steps < 1:
            raise UsageError(f"a blend takes at least one step, not {self.steps}")
        if isinstance(self.before.scale, (Differentiable, Remembering)):
            raise UsageError(f"a blend starts from a quantizer without variables, not from {self.before}")

    @property
    def learns(self):
        return isinstance(self.after.scale, Differentiable) and self.after.scale.learns

    @property
    def stochastic(self):
        return self.before.stochastic or self.after.stochastic

    @property
    def _format(self) -> Any:
        return self.after.format

    def initial_state(self, fmt):
        own = {"blend_steps": jnp.zeros(())}
        rule = self.after.scale
        return own | rule.initial_state(self._format) if isinstance(rule, Remembering) else own

    def initial_params(self, x, fmt, axis):
        rule = self.after.scale
        return rule.initial_params(x, self._format, axis) if isinstance(rule, Differentiable) else {}

    def observe(self, x):
        rule = self.after.scale
        return rule.observe(x) if isinstance(rule, Remembering) else jnp.ones(1)

    def next_state(self, state, observed, fmt):
        counted = jnp.where(observed[..., 0] > 0, state["blend_steps"] + 1, state["blend_steps"])
        after, rule = dict(state), self.after.scale
        if isinstance(rule, Remembering):
            after |= rule.next_state(state, observed, self._format)
        return after | {"blend_steps": counted}

    def quantize(self, x, fmt, axis, params, state, key):
        # What lies around is fused as without the blend: at λ = 0 the whole step is that of B, to the last bit.
        x = lax.optimization_barrier(x)
        given = lambda normalize: (normalize_rows(x, (axis,)) if normalize else x).astype(jnp.float32)
        first, first_inside = _quantized(self.before, given(self.normalize_before), axis, {}, {}, key)
        last, last_inside = _quantized(self.after, given(self.normalize_after), axis, params, state, key)
        share = jnp.minimum(state["blend_steps"] / np.float32(self.steps), 1)
        begun, done = share > 0, share >= 1
        values = jnp.where(begun, jnp.where(done, last, first + share * (last - first)), first)
        return lax.optimization_barrier(values), jnp.where(begun, last_inside, first_inside)

    def __str__(self):
        return f"from ({self.before}) to ({self.after}) in {self.steps} steps"


def _quantized(
    q: Quantizer, x: Float[Array, "..."], axis: int, params: Arrays, state: Arrays, key: Key | None
) -> tuple[Float[Array, "..."], Bool[Array, "..."]]:
    """x as a quantizer leaves it, in the coordinates of x, with the gradient of its estimator, and where x was inside.

    What a rotation moved is inside everywhere.
    """
    everywhere = jnp.ones(x.shape, bool)
    if q.exact:
        return x, everywhere
    if isinstance(q.scale, Differentiable):
        fmt: Any = q.format
        return q.scale.quantize(x, fmt, axis, params, state, key)
    if q.rotation is None:
        rounded = q.round(lax.stop_gradient(x), axis, key, state)
        return _with_gradient(q, x, rounded), inside(lax.stop_gradient(x), rounded)
    along = axis if q.rotation.side == "inner" else -3 - axis
    length = x.shape[along]
    padded = q.rotation.padded(length) if q.pad else length
    signs = q.rotation.draw_signs(padded, None if key is None else next_key(key))
    fill = [(0, padded - length if i == along % x.ndim else 0) for i in range(x.ndim)]
    rotated = hadamard(jnp.pad(x, fill), q.rotation.block(padded), signs, axis=along)
    values = _with_gradient(q, rotated, q.round(lax.stop_gradient(rotated), axis, key, state))
    back = inverse_hadamard(values, q.rotation.block(padded), signs, axis=along)
    return lax.slice_in_dim(back, 0, length, axis=along % x.ndim), everywhere


def _with_gradient(q, x, rounded):
    factor = q.estimator.factor(lax.stop_gradient(x), rounded)
    return with_slopes(rounded.values, (jnp.ones((), jnp.float32) if factor is None else factor, x))
