"""The way from one quantizer to another, a little further at each step: w_eff = w + λ · (Q(w) - w), λ from 0 to 1."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowprec.errors import UsageError
from lowprec.formats.random import Key, next_key
from lowprec.quantizers.estimators import inside
from lowprec.quantizers.hadamard import hadamard, inverse_hadamard
from lowprec.quantizers.normalize import normalize_rows
from lowprec.quantizers.quantizer import Quantizer
from lowprec.quantizers.rank_decay import RankDecay
from lowprec.quantizers.surrogate import with_slopes
from lowprec.quantizers.variables import Arrays, Differentiable, Remembering
from lowprec.typing import Array, Bool, Float

# Of the names of what the first of two quantizers learns and remembers.
BEFORE = "before_"


@dataclass(frozen=True)
class Blend(Differentiable, Remembering):
    """B(x) + λ · (Q(x) - B(x)) with λ = min(k / steps, 1) in the k-th step, counted from 0.

    Each part is differentiated as its estimator says; with straight-through ones the gradient is that of x, whatever λ.
    At λ = 0 values and gradients are those of B, bit for bit, and at λ = 1 those of Q. (The continual training of
    BitNet b1.58 after 16 bits, arXiv 2502.11895, with B(x) = x.)

    What Q learns and remembers has the names that it has without B; that of B is called "before_<name>", and learns and
    remembers on.

    Args:
      before, after: B and Q, quantizers of a forward product; they may learn and remember.
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
        for q in (self.before, self.after):
            if isinstance(q.scale, RankDecay):
                raise UsageError(f"{q} is a bridge between two quantizers already, and no part of another")

    @property
    def learns(self):
        return any(isinstance(q.scale, Differentiable) and q.scale.learns for q in (self.before, self.after))

    @property
    def stochastic(self):
        return self.before.stochastic or self.after.stochastic

    def initial_state(self, fmt):
        parts = {prefix: q.scale.initial_state(q.format) for prefix, q in self._parts(Remembering)}
        return {"blend_steps": jnp.zeros(()), **_joined(parts)}

    def initial_params(self, x, fmt, axis):
        parts = self._parts(Differentiable)
        return _joined({prefix: q.scale.initial_params(x, q.format, axis) for prefix, q in parts})

    def calibrated_params(self, w, inputs, fmt, axis):
        parts = self._parts(Differentiable)
        return _joined({prefix: q.scale.calibrated_params(w, inputs, q.format, axis) for prefix, q in parts})

    def observe(self, x):
        return jnp.concatenate([jnp.ones(1), *(q.scale.observe(x) for _, q in self._parts(Remembering))])

    def next_state(self, state, observed, fmt):
        steps = jnp.where(observed[..., 0] > 0, state["blend_steps"] + 1, state["blend_steps"])
        after, start = {}, 1
        for prefix, q in self._parts(Remembering):
            stop = start + jax.eval_shape(q.scale.observe, jnp.zeros((1, 1))).shape[0]
            after[prefix] = q.scale.next_state(part_of(state, prefix), observed[..., start:stop], q.format)
            start = stop
        return {"blend_steps": steps, **_joined(after)}

    def _parts(self, kind: type) -> list[tuple[str, Any]]:
        """(prefix of the names of its variables, quantizer) of the two, where the scale rule is of a kind."""
        return [(prefix, q) for prefix, q in ((BEFORE, self.before), ("", self.after)) if isinstance(q.scale, kind)]

    def quantize(self, x, fmt, axis, params, state, key):
        # What lies around is fused as without the blend: at λ = 0 the whole step is that of B, to the last bit.
        x = lax.optimization_barrier(x)
        given = lambda normalize: (normalize_rows(x, (axis,)) if normalize else x).astype(jnp.float32)
        own = lambda prefix: (part_of(params, prefix), part_of(state, prefix))
        first, first_inside = _quantized(self.before, given(self.normalize_before), axis, *own(BEFORE), key)
        last, last_inside = _quantized(self.after, given(self.normalize_after), axis, *own(""), key)
        share = jnp.minimum(state["blend_steps"] / np.float32(self.steps), 1)
        begun, done = share > 0, share >= 1
        values = jnp.where(begun, jnp.where(done, last, first + share * (last - first)), first)
        return lax.optimization_barrier(values), jnp.where(begun, last_inside, first_inside)

    def __str__(self):
        return f"from ({self.before}) to ({self.after}) in {self.steps} steps"


def part_of(variables: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The variables of B (`BEFORE`) or of Q (""), of those of a blend, under their own names."""
    if prefix:
        return {name.removeprefix(prefix): leaf for name, leaf in variables.items() if name.startswith(prefix)}
    return {name: leaf for name, leaf in variables.items() if name != "blend_steps" and not name.startswith(BEFORE)}


def _joined(parts: Mapping[str, Arrays]) -> dict[str, Any]:
    return {prefix + name: leaf for prefix, part in parts.items() for name, leaf in part.items()}


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
