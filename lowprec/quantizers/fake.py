"""Fake quantization: values on the grid in the input's dtype, with a gradient that passes through the rounding."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from lowprec.errors import unknown
from lowprec.formats.elements import check_dtype, noise
from lowprec.formats.grammar import parse
from lowprec.formats.rounding import Rounding, parse_rounding
from lowprec.formats.traced import TracedFormat
from lowprec.formats.types import Format
from lowprec.quantizers.blockwise import round_blocks
from lowprec.quantizers.estimators import inside
from lowprec.typing import Array, Float

GRADIENTS = ("ste", "clipped")


def fake_quant(
    x: Float[Array, "..."],
    fmt: str | Format | TracedFormat,
    *,
    axis: int = -1,
    rounding: str | Rounding = "nearest_even",
    key: jax.Array | None = None,
    gradient: Literal["ste", "clipped"] = "ste",
    pad: bool = False,
    cotangent: str | Format | None = None,
    cotangent_rounding: str | Rounding = "nearest_even",
) -> Float[Array, "..."]:
    """x rounded to a format with absmax scales; equal to `quantize(x, …).dequantize(x.dtype)`.

    The gradient is the cotangent itself, in its own precision (a cast to fp8 and back would round it too): everywhere
    ("ste", straight-through) or where |x| lies within the largest scaled value ("clipped", zero elsewhere). Only a
    format given for it rounds it.

    Args:
      x: float32, bfloat16 or float16, any shape.
      fmt: a format or its name; a `TracedFormat` where its parameters are to be arrays.
      axis: the contraction axis: blocks and rows run along it.
      rounding: see `formats.Rounding`; the stochastic modes need a key.
      pad: let the last block of the axis be shorter than the others.
      cotangent: the format to which the gradient is rounded, e.g. "e5m2@tensor"; None leaves it as it is.
      cotangent_rounding: its rounding mode; its noise is not that of x.
    Raises:
      ValueError: an unknown name, a block that does not divide the axis, stochastic rounding without a key.
    """
    check_dtype(x)
    if gradient not in GRADIENTS:
        raise unknown("gradient", gradient, GRADIENTS)
    how = _How(axis, parse_rounding(rounding), pad)
    back = None if cotangent is None else (parse(cotangent), _How(axis, parse_rounding(cotangent_rounding), pad))
    if back is not None and key is None:
        noise(back[1].rounding, key, ())  # says that it needs a key
    traced, static = (fmt, None) if isinstance(fmt, TracedFormat) else (None, parse(fmt))
    return _fake_quant(x, key, traced, static, how, gradient, back)


@dataclass(frozen=True)
class _How:
    axis: int
    rounding: Rounding
    pad: bool

    def round(self, x, fmt, key):
        return round_blocks(x, fmt, self.axis, rounding=self.rounding, key=key, pad=self.pad)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
@partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _fake_quant(x, key, traced, static, how, gradient, back):
    return how.round(x, traced or static, key).values.astype(x.dtype)


@partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _forward(x, key, traced, static, how, gradient, back):
    rounded = how.round(x, traced or static, key)
    mask = inside(x, rounded) if gradient == "clipped" else None
    return rounded.values.astype(x.dtype), (mask, None if back is None else key)


def _backward(static, how, gradient, back, residuals, cotangent):
    mask, key = residuals
    if back is not None:
        fmt, how = back
        key = None if key is None else jax.random.fold_in(key, 1)
        cotangent = how.round(cotangent, fmt, key).values.astype(cotangent.dtype)
    return (cotangent if mask is None else jnp.where(mask, cotangent, 0)), None, None


_fake_quant.defvjp(_forward, _backward)
