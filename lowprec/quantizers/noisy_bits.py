"""PQT (arXiv 2505.11170): pseudo-quantization noise by Gaussian weight sampling, with learned bit widths."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowprec.errors import UsageError
from lowprec.formats.blocks import BlockLayout, block_layout
from lowprec.formats.elements import round_elements
from lowprec.formats.random import random_bits
from lowprec.formats.rounding import Rounding
from lowprec.formats.types import BlockFormat, Format
from lowprec.quantizers.surrogate import with_slopes
from lowprec.quantizers.variables import Differentiable
from lowprec.typing import Array, Float

# Of round(N(0, 1) / 2): the probabilities that |R| is at least 1 and at least 2.
_AT_LEAST_ONE, _AT_LEAST_TWO = 0.31731050786, 0.00269979606


@dataclass(frozen=True)
class LearnedBits(Differentiable):
    """w plus noise as large as the rounding error of so many bits, then cast to the element format; bits are learned.

    Every block has bits b = target + t · (start - target), t starting at 1; decay of t (`optimizer.quant_weight_decay`
    of a run) pulls b to its target. The noise is R · max|w| · 2^(1-b), R = round(N(0,1) / 2), drawn anew in every step.
    ∂y/∂w = 1, ∂y/∂b is that of the noise at fixed draws.
    """

    start: float = 6.0
    target: float = 4.0

    @property
    def stochastic(self) -> bool:
        return True

    def initial_params(self, x, fmt, axis):
        return {"bits": jnp.ones(bits_layout(x, fmt, axis).scale_shape)}

    def quantize(self, x, fmt, axis, params, state, key):
        if key is None:
            raise UsageError("learned bits draw noise, also in evaluation: pass a key (in Flax rngs={'quant': key})")
        layout = bits_layout(x, fmt, axis)
        w = layout.split(x.astype(jnp.float32))
        fraction = layout.broadcast_scale(params["bits"])
        bits = lax.stop_gradient(self.target + fraction * (self.start - self.target))
        random = layout.split(random_bits(key, x.shape))
        top = jnp.max(jnp.abs(lax.stop_gradient(w)), axis=layout.members, keepdims=True)
        noise = _rounded_normal(random) * top * jnp.exp2(1 - bits)
        slope = -np.float32(np.log(2)) * noise
        values = round_elements(lax.stop_gradient(w) + noise, fmt.element, Rounding())
        ones = jnp.ones((), jnp.float32)
        values = with_slopes(values, (ones, w), (slope * np.float32(self.start - self.target), fraction))
        return layout.merge(values), jnp.ones(x.shape, bool)

    def __str__(self):
        return f"gaussian noise of learned bits, {self.start:g} to {self.target:g}"


def bits_layout(x: Float[Array, "..."], fmt: Format, axis: int) -> BlockLayout:
    """The blocks that have bits of their own."""
    if not isinstance(fmt, BlockFormat) or fmt.scale.per_tensor:
        raise UsageError(f"learned bits belong to blocks, e.g. bfloat16@32x32; {fmt} has none")
    return block_layout(x.shape, fmt.block, axis, pad=True)


def uniform(random: jax.Array) -> Float[Array, "..."]:
    """U(-½, ½) from 32 random bits."""
    return ((random >> 8).astype(jnp.float32) + 0.5) * np.float32(2.0**-24) - 0.5


def _rounded_normal(random: jax.Array):
    """round(N(0, 1) / 2): 0, ±1 and ±2 from 31 bits, the sign from the last. (Larger ones: 6e-7, left out.)"""
    magnitude = (random >> 1).astype(jnp.float32) * np.float32(2.0**-31)
    size = (magnitude < _AT_LEAST_ONE).astype(jnp.float32) + (magnitude < _AT_LEAST_TWO)
    return jnp.where(random & 1 == 1, size, -size)
