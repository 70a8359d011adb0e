"""Affine ranges of each token as it is, drawn in by two learned factors: the inputs of QVGen (arXiv 2505.11497)."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowprec.errors import UsageError
from lowprec.formats.bits import divide
from lowprec.formats.types import IntFormat
from lowprec.quantizers.learned import scaled_blocks
from lowprec.quantizers.surrogate import with_slopes
from lowprec.quantizers.variables import Differentiable


@dataclass(frozen=True)
class ClippedRange(Differentiable):
    """s · (clip(round(x / s) + z, 0, 2^b - 1) - z) of each block, a token for inputs, with

        low = σ(a) · min(x, 0),  high = σ(b) · max(x, 0),  s = (high - low) / (2^b - 1),  z = round(-low / s).

    The parameters a and b, "lower" and "upper", are two numbers for the whole operand. Roundings pass straight through
    and z is a constant: with q the clipped code less z, ∂y/∂x = 1 inside and 0 outside, ∂y/∂s = q - x / s inside and q
    outside; s passes its gradient on to a, b and the extremes of x, as the authors' code differentiates it. (There they
    learn at 1e-2, for each step of a diffusion. Zero is always within the range here, so that it is a value.)

    Args:
      start: σ(a) and σ(b) at first.
    """

    start: float = 0.95

    def __post_init__(self):
        if not 0 < self.start < 1:
            raise UsageError(f"a clipped range is a share above 0 and below 1 of that of the values, not {self.start}")

    def initial_params(self, x, fmt, axis):
        self._bits(fmt)
        logit = jnp.float32(math.log(self.start / (1 - self.start)))
        return {"lower": logit, "upper": logit}

    def quantize(self, x, fmt, axis, params, state, key):
        fmt, layout = scaled_blocks(x, fmt, axis)
        steps, blocks = np.float32(2 ** self._bits(fmt) - 1), layout.split(x.astype(jnp.float32))
        extreme = lambda reduce: reduce(blocks, axis=layout.members, keepdims=True, initial=0.0)
        low = jax.nn.sigmoid(params["lower"]) * extreme(jnp.min)
        spread = jax.nn.sigmoid(params["upper"]) * extreme(jnp.max) - low
        exact = divide(lax.stop_gradient(spread), steps)
        scale = jnp.where(exact > 0, with_slopes(exact, (jnp.float32(1) / steps, spread)), 1.0)
        fixed = lax.stop_gradient(scale)
        v, zero = lax.stop_gradient(blocks) / fixed, jnp.round(-lax.stop_gradient(low) / fixed)
        code = jnp.round(v)
        inside = (code >= -zero) & (code <= steps - zero)
        q = jnp.clip(code, -zero, steps - zero)
        values = with_slopes(q * fixed, (inside, blocks), (jnp.where(inside, q - v, q), scale))
        return layout.merge(values), layout.merge(inside)

    def _bits(self, fmt) -> int:
        element = getattr(fmt, "element", None)
        if not isinstance(element, IntFormat) or element.signed:
            raise UsageError(f"a clipped range takes unsigned integers with float scales, e.g. uint4@row; not {fmt}")
        return element.bits

    def __str__(self):
        return "learned share of the range"
