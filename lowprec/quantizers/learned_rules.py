"""Scale rules whose parameters are learned: step sizes, clips, offsets, exponent biases.

Each initialises itself from the first values it sees, as its source says, and gives its parameters the gradient of
its source.
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import lax

from lowprec.errors import UsageError, unknown
from lowprec.formats.blocks import BlockLayout
from lowprec.formats.types import BlockFormat, FloatFormat, IntFormat
from lowprec.quantizers.gaussian import optimal_clip
from lowprec.quantizers.learned import initial_scale, scaled_blocks, step_quant
from lowprec.quantizers.scales import block_mean
from lowprec.quantizers.surrogate import at_least, scale_gradient, with_slopes
from lowprec.quantizers.variables import Differentiable
from lowprec.typing import Array

Count = Literal["block", "features", "matrix"]

# Steps, clips and scales are held above it (ParetoQ's floor): an optimizer may not turn their signs.
SMALLEST = 1e-5
# Ranges that start at the extremes of the data are wider by this part of themselves: the extremes lie inside, and have
# a gradient, whatever the last bit of a scale.
HAIR = np.float32(2**-17)


@dataclass(frozen=True)
class LearnedStep(Differentiable):
    """LSQ (arXiv 1902.08153) and LSQ+ (arXiv 2004.09576): a learned step size, with or without a learned offset.

    With v = (x - offset) / step and q its rounded, clipped value, y = q · step + offset: ∂y/∂x = 1 inside the range,
    ∂y/∂step = q - v inside and the bound outside, ∂y/∂offset = 0 inside and 1 outside.

    Args:
      init: of the step: "lsq" 2·mean|x| / √Q; "gaussian" 2·A·rms / (2^b - 1), A being the clip of least error on
        Gaussian data for 2^b equally spaced levels in [-A, A] (LSQ+ for weights); "max" the largest magnitude over Q;
        "range" (max - min) / levels (LSQ+ for activations). Q: the largest element.
      offset: learned too, from min(x) - step · the lowest element.
      count: the gradient of the step is divided by √(count · Q), count being the values of a "block", the "features"
        (the length of the contraction axis: LSQ for activations) or the whole "matrix" (ParetoQ).
      floor: the step is at least that.
    """

    init: Literal["lsq", "gaussian", "max", "range"] = "lsq"
    offset: bool = False
    count: Count = "block"
    floor: float = SMALLEST

    def __post_init__(self):
        if self.init not in ("lsq", "gaussian", "max", "range"):
            raise unknown("start of a learned step", self.init, ("lsq", "gaussian", "max", "range"))

    def initial_params(self, x, fmt, axis):
        fmt, layout = scaled_blocks(x, fmt, axis)
        blocks, element = layout.split(x.astype(jnp.float32)), fmt.element
        low = jnp.min(blocks, axis=layout.members, keepdims=True)
        if self.init == "lsq":
            step = layout.broadcast_scale(initial_scale(x, fmt, axis=axis))
        elif self.init == "gaussian":
            clip = optimal_clip(f"int{element.bits}_midrise")
            step = _rms(blocks, layout) * np.float32(2 * clip / (2**element.bits - 1))
        elif self.init == "max":
            step = jnp.max(jnp.abs(blocks), axis=layout.members, keepdims=True) / np.float32(element.max)
        else:
            spread = jnp.max(blocks, axis=layout.members, keepdims=True) - low
            low, spread = low - HAIR * spread, (1 + 2 * HAIR) * spread
            step = spread / np.float32(element.max - element.min)
        step = jnp.where(step > 0, step, 1.0)
        params = {"step": step.reshape(layout.scale_shape)}
        if self.offset:
            params["offset"] = (low - step * np.float32(element.min)).reshape(layout.scale_shape)
        return params

    def quantize(self, x, fmt, axis, params, state, key):
        fmt, layout = scaled_blocks(x, fmt, axis)
        factor = gradient_factor(self.count, x, layout, axis, fmt.element.max)
        step = layout.broadcast_scale(scale_gradient(at_least(params["step"], self.floor), factor))
        blocks = layout.split(x.astype(jnp.float32))
        if not self.offset:
            values, inside = step_quant(blocks, step, fmt)
        else:
            offset = layout.broadcast_scale(scale_gradient(params["offset"], factor))
            values, inside = step_quant(blocks - offset, step, fmt)
            values = values + offset
        return layout.merge(values), layout.merge(inside)

    def __str__(self):
        return f"learned step{' and offset' if self.offset else ''}"


@dataclass(frozen=True)
class LearnedClip(Differentiable):
    """PACT (arXiv 1805.06085): a learned clip α stands at the largest element; what lies beyond it clips.

    ∂y/∂x = 1 inside the range; ∂y/∂α = 1 above it (and -1 below -α for signed elements). The paper holds α back by
    weight decay: `optimizer.quant_weight_decay` of a run.

    Args:
      init: of α; None takes the best clip for Gaussian data of the root mean square first seen (the paper: 10).
    """

    init: float | None = None

    def initial_params(self, x, fmt, axis):
        fmt, layout = scaled_blocks(x, fmt, axis)
        if self.init is not None:
            return {"clip": jnp.full(layout.scale_shape, self.init, jnp.float32)}
        clip = _rms(layout.split(x.astype(jnp.float32)), layout) * np.float32(optimal_clip(fmt))
        return {"clip": jnp.where(clip > 0, clip, 1.0).reshape(layout.scale_shape)}

    def quantize(self, x, fmt, axis, params, state, key):
        fmt, layout = scaled_blocks(x, fmt, axis)
        blocks = layout.split(x.astype(jnp.float32))
        clip = layout.broadcast_scale(at_least(params["clip"], SMALLEST))
        low = -clip if fmt.element.min < 0 else jnp.zeros_like(clip)
        values, _ = step_quant(lax.stop_gradient(blocks), lax.stop_gradient(clip) / np.float32(fmt.element.max), fmt)
        inside = (blocks > low) & (blocks < clip)
        beyond = (blocks >= clip).astype(jnp.float32) - ((blocks <= low) & (low < 0))
        return layout.merge(with_slopes(values, (inside, blocks), (beyond, clip))), layout.merge(inside)

    def __str__(self):
        return "learned clip"


@dataclass(frozen=True)
class Elastic(Differentiable):
    """ParetoQ (arXiv 2502.02631, §3): stretched elastic quantization for 2 bits and ternary, the sign for one bit.

    With v = w / α, of n levels and shift s: y = α · (round(clip(v, ±.99) · n - s) + s) / n; ternary: n = 1.5, s = 0,
    levels 0, ±2/3; b-bit mid-rise: n = 2^(b-1), s = ½; binary: y = α · sign(w). ∂y/∂w = 1 for |v| ≤ (n - s) / n;
    ∂y/∂α = y/α - v there and the outermost level beyond, divided by √(values of the matrix).

    Args:
      repo: ∂y/∂α of clipped ternary weights is ±1, as in the authors' repository, although their level is ±2/3.
    """

    repo: bool = False
    floor: float = SMALLEST

    def initial_params(self, x, fmt, axis):
        fmt, layout = scaled_blocks(x, fmt, axis)
        magnitudes = jnp.abs(layout.split(x.astype(jnp.float32)))
        reduce = jnp.mean if _levels(fmt) is None else jnp.max
        return {"scale": reduce(magnitudes, axis=layout.members, keepdims=True).reshape(layout.scale_shape)}

    def quantize(self, x, fmt, axis, params, state, key):
        fmt, layout = scaled_blocks(x, fmt, axis)
        blocks = layout.split(x.astype(jnp.float32))
        scale = at_least(params["scale"], self.floor)
        scale = layout.broadcast_scale(scale_gradient(scale, gradient_factor("matrix", x, layout, axis, 1.0)))
        v = lax.stop_gradient(blocks) / lax.stop_gradient(scale)
        if _levels(fmt) is None:
            bound, q = 1.0, jnp.where(v < 0, -1.0, 1.0)
            slope = q
        else:
            n, shift = _levels(fmt)
            bound = (n - shift) / n
            q = (jnp.round(jnp.clip(v, -0.99, 0.99) * n - shift) + shift) / n
            slope = jnp.where(jnp.abs(v) <= bound, q - v, jnp.sign(v) * bound if self.repo else q)
        inside = jnp.abs(v) <= bound
        values = with_slopes(q * lax.stop_gradient(scale), (inside, blocks), (slope, scale))
        return layout.merge(values), layout.merge(inside)

    def __str__(self):
        return "learned elastic scale" + (" (repo)" if self.repo else "")


@dataclass(frozen=True)
class LearnedExponentBias(Differentiable):
    """A float grid with a learned, real exponent bias b: its values are scaled by 2^(format's bias - b).

    The forward pass of LLM-FP4 (arXiv 2310.16836, eq. 5); the bias starts where the largest magnitude is the largest
    element, and is learned as LSQ learns a step: ∂y/∂b = -ln 2 · step · ∂y/∂step.
    """

    def initial_params(self, x, fmt, axis):
        fmt, layout = _float_blocks(x, fmt, axis)
        top = jnp.max(jnp.abs(layout.split(x.astype(jnp.float32))), axis=layout.members, keepdims=True)
        top = jnp.where(top > 0, (1 + HAIR) * top, fmt.element.max)
        return {"bias": (fmt.element.bias + jnp.log2(fmt.element.max / top)).reshape(layout.scale_shape)}

    def quantize(self, x, fmt, axis, params, state, key):
        fmt, layout = _float_blocks(x, fmt, axis)
        factor = gradient_factor("block", x, layout, axis, fmt.element.max)
        bias = layout.broadcast_scale(scale_gradient(params["bias"], factor))
        step = jnp.exp2(fmt.element.bias - bias)
        values, inside = step_quant(layout.split(x.astype(jnp.float32)), step, fmt)
        return layout.merge(values), layout.merge(inside)

    def __str__(self):
        return "learned exponent bias"


def gradient_factor(count: Count, x: Array, layout: BlockLayout, axis: int, largest: float) -> np.float32:
    """1 / √(count · largest element): what keeps the updates of a scale in proportion to those of its values."""
    sizes = {
        "block": math.prod(layout.shape) / math.prod(layout.scale_shape),
        "features": x.shape[axis],
        "matrix": x.size,
    }
    return np.float32(1 / math.sqrt(sizes[count] * max(largest, 1.0)))


def _levels(fmt: BlockFormat) -> tuple[float, float] | None:
    """(n, shift) of stretched elastic quantization; None for one bit."""
    values = tuple(getattr(fmt.element, "values", ()))
    if values == (-1.0, 1.0):
        return None
    if values == (-1.0, 0.0, 1.0):
        return 1.5, 0.0
    if isinstance(fmt.element, IntFormat) and fmt.element.midrise and fmt.element.fraction_bits == 0:
        return float(2 ** (fmt.element.bits - 1)), 0.5
    raise UsageError(f"elastic quantization takes binary, ternary and int<b>_midrise elements, not {fmt.element}")


def _rms(blocks, layout):
    return jnp.sqrt(block_mean(blocks * blocks, layout))


def _float_blocks(x, fmt, axis):
    fmt, layout = scaled_blocks(x, fmt, axis)
    if not isinstance(fmt.element, FloatFormat):
        raise UsageError(f"only a float format has an exponent bias; {fmt.element} has none")
    return fmt, layout
