"""Weights that are integer codes for good: only their scales are still trained."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import lax

from lowprec.formats.scaling import store_scale
from lowprec.formats.types import BlockFormat
from lowprec.quantizers.learned import scaled_blocks
from lowprec.quantizers.learned_rules import SMALLEST, Count, LearnedStep, gradient_factor
from lowprec.quantizers.surrogate import at_least, scale_gradient, with_slopes
from lowprec.quantizers.variables import Arrays, Differentiable
from lowprec.typing import Array, Float


@dataclass(frozen=True)
class FixedCodes(Differentiable):
    """y = codes · step: the operand holds the codes, ∂y/∂step = codes, and no gradient reaches them.

    The second phase of EfficientQAT (arXiv 2407.11062, §3.3). With a learned step and weights that are only left
    alone, codes would still change: they are round(w / step).

    Args:
      count: as in `LearnedStep`.
    """

    count: Count = "block"

    def initial_params(self, x, fmt, axis):
        _, layout = scaled_blocks(x, fmt, axis)
        return {"step": jnp.ones(layout.scale_shape, jnp.float32)}

    def quantize(self, x, fmt, axis, params, state, key):
        fmt, layout = scaled_blocks(x, fmt, axis)
        codes = layout.split(lax.stop_gradient(x).astype(jnp.float32))
        factor = gradient_factor(self.count, x, layout, axis, fmt.element.max)
        step = layout.broadcast_scale(scale_gradient(at_least(params["step"], SMALLEST), factor))
        stored = store_scale(lax.stop_gradient(step), fmt.scale).block
        values = with_slopes(codes * stored, (codes, step))
        return layout.merge(values), jnp.ones(x.shape, bool)

    def __str__(self):
        return "fixed codes, learned step"


def step_codes(
    w: Float[Array, "..."], rule: LearnedStep, fmt: BlockFormat, axis: int, params: Arrays
) -> Float[Array, "..."]:
    """The integers by which a learned step is multiplied where w stood, float32."""
    _, layout = scaled_blocks(w, fmt, axis)
    values, _ = rule.quantize(w, fmt, axis, params, {}, None)
    step = layout.broadcast_scale(jnp.maximum(params["step"], np.float32(rule.floor)))
    return layout.merge(jnp.round(layout.split(values) / store_scale(step, fmt.scale).block))
