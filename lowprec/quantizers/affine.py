"""Affine quantization with running ranges: unsigned codes and an exact zero (arXiv 1712.05877, 1806.08342)."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import lax

from lowprec.errors import UsageError
from lowprec.formats.types import IntFormat
from lowprec.quantizers.surrogate import with_slopes
from lowprec.quantizers.variables import Differentiable, Remembering
from lowprec.typing import Array, Bool, Float


def affine_quant(
    x: Float[Array, "..."], low: Float[Array, "..."], high: Float[Array, "..."], bits: int
) -> tuple[Float[Array, "..."], Bool[Array, "..."]]:
    """s · (clip(round(x / s) + z, 0, 2^b - 1) - z) with s = (high - low) / (2^b - 1) and z = round(-low / s).

    The range is widened to contain zero, which is then a value. The gradient passes inside the range.

    Args:
      x: any shape, float32.
      low, high: broadcast to x.
      bits: 1 to 16.
    Returns:
      The values, and where x lies within the range.
    """
    low, high, steps = jnp.minimum(low, 0), jnp.maximum(high, 0), 2**bits - 1
    scale = (high - low) / np.float32(steps)
    scale = jnp.where(scale > 0, scale, 1.0)
    zero = jnp.round(-low / scale)
    code = jnp.round(lax.stop_gradient(x) / scale)
    inside = (code >= -zero) & (code <= steps - zero)
    return with_slopes(scale * jnp.clip(code, -zero, steps - zero), (inside, x)), inside


@dataclass(frozen=True)
class RunningRange(Differentiable, Remembering):
    """An affine range a tensor, the exponential moving average of the minima and maxima of earlier steps.

    The first step uses its own range. (Jacob et al., arXiv 1712.05877, §3.1; Krishnamoorthi, arXiv 1806.08342.)

    Args:
      decay: of the averages.
      start: steps during which the operand passes as it is while its range is being learned.
    """

    decay: float = 0.99
    start: int = 0
    learns = False

    def initial_state(self, fmt):
        self._bits(fmt)
        return {"low": jnp.zeros(()), "high": jnp.zeros(()), "steps": jnp.zeros(())}

    def initial_params(self, x, fmt, axis):
        return {}

    def observe(self, x):
        wide = x.astype(jnp.float32)
        return jnp.stack([jnp.float32(1), jnp.min(wide, initial=0), jnp.max(wide, initial=0)])

    def next_state(self, state, observed, fmt):
        calls = observed[..., 0]
        seen, first = calls > 0, state["steps"] == 0
        average = {"steps": jnp.where(seen, state["steps"] + 1, state["steps"])}
        for name, total in (("low", observed[..., 1]), ("high", observed[..., 2])):
            new = total / jnp.maximum(calls, 1)
            mixed = np.float32(self.decay) * state[name] + np.float32(1 - self.decay) * new
            usable = seen & jnp.isfinite(new)
            average[name] = jnp.where(usable, jnp.where(first, new, mixed), state[name])
        return average

    def quantize(self, x, fmt, axis, params, state, key):
        x = x.astype(jnp.float32)
        _, low, high = lax.stop_gradient(self.observe(x))
        first = state["steps"] == 0
        low, high = jnp.where(first, low, state["low"]), jnp.where(first, high, state["high"])
        values, inside = affine_quant(x, low, high, self._bits(fmt))
        if not self.start:
            return values, inside
        active = state["steps"] >= self.start
        return jnp.where(active, values, x), inside | ~active

    def _bits(self, fmt) -> int:
        element = getattr(fmt, "element", None)
        if not (isinstance(element, IntFormat) and not element.signed and fmt.block == "tensor"):
            raise UsageError(f"a running range takes unsigned integers, a scale a tensor: uint8@tensor; not {fmt}")
        return element.bits

    def __str__(self):
        return f"running range {self.decay:g}" + (f" from step {self.start}" if self.start else "")
