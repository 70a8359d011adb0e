"""DiffQ (Défossez et al., arXiv 2104.09987): noise in place of rounding, bit widths learned under a price for size."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowprec.errors import UsageError, unknown
from lowprec.formats.bits import divide
from lowprec.formats.random import random_bits
from lowprec.quantizers.noisy_bits import bits_layout, uniform
from lowprec.quantizers.surrogate import with_price, with_slopes
from lowprec.quantizers.variables import Differentiable

_BITS_A_MEGABYTE = 8 * 2**20


@dataclass(frozen=True)
class DiffQ(Differentiable):
    """w plus noise as large as the rounding error of b bits on the range of the whole tensor; b is learned a block.

    ŵ = w + noise · (max w - min w) / (2^b - 1), noise U(-½, ½) (eq. 4) or N(0, ¼); b = lowest + (highest - lowest) ·
    sigmoid(logit). ∂ŵ/∂w = 1, ∂ŵ/∂logit is that of the noise at fixed draws. The loss has `price` · the model's size
    added to its gradient (eq. 7). Without a key, as in evaluation by the authors, w is rounded to whole bits instead.

    Args:
      noise: "uniform", the paper's, or "gaussian", the default of the authors' code.
      start, lowest, highest: of the bits.
      price: of a megabyte of quantized weights (the authors' 1e-3 is for a small model with a mean squared loss).
    """

    noise: Literal["uniform", "gaussian"] = "uniform"
    start: float = 8.0
    lowest: float = 2.0
    highest: float = 15.0
    price: float = 1e-3

    def __post_init__(self):
        if self.noise not in ("uniform", "gaussian"):
            raise unknown("noise of DiffQ", self.noise, ("uniform", "gaussian"))
        if not (1 <= self.lowest < self.start < self.highest and self.price >= 0):
            raise UsageError(f"bits of DiffQ start between the lowest, at least 1, and the highest, not as in {self}")

    @property
    def stochastic(self) -> bool:
        return True

    def initial_params(self, x, fmt, axis):
        fraction = (self.start - self.lowest) / (self.highest - self.lowest)
        logit = np.log(fraction / (1 - fraction))
        return {"logit": jnp.full(bits_layout(x, fmt, axis).scale_shape, logit, jnp.float32)}

    def bits(self, logit):
        """The bits of a block."""
        return self.lowest + (self.highest - self.lowest) * jax.nn.sigmoid(logit)

    def quantize(self, x, fmt, axis, params, state, key):
        layout = bits_layout(x, fmt, axis)
        size = np.prod(x.shape) / np.prod(layout.scale_shape)
        priced = with_price(self.bits(params["logit"]), np.float32(self.price * size / _BITS_A_MEGABYTE))
        bits = layout.broadcast_scale(priced)
        still = lax.stop_gradient(x.astype(jnp.float32))
        low, high = jnp.min(still), jnp.max(still)
        if key is None:
            levels = jnp.exp2(jnp.round(lax.stop_gradient(bits))) - 1
            step = jnp.where(high > low, divide(high - low, levels), 1.0)
            values, slope = low + jnp.round(divide(layout.split(still) - low, step)) * step, jnp.zeros(())
        else:
            random = layout.split(random_bits(key, x.shape))
            draw = uniform(random) if self.noise == "uniform" else jax.scipy.special.ndtri(uniform(random) + 0.5) / 2
            power = jnp.exp2(lax.stop_gradient(bits))
            noise = draw * (high - low) / (power - 1)
            values, slope = layout.split(still) + noise, -np.float32(np.log(2)) * noise * power / (power - 1)
        ones = jnp.ones((), jnp.float32)
        values = with_slopes(values, (ones, layout.split(x.astype(jnp.float32))), (slope, bits))
        return layout.merge(values), jnp.ones(x.shape, bool)

    def __str__(self):
        return f"{self.noise} noise of learned bits from {self.start:g}, at {self.price:g} a megabyte"
