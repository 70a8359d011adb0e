"""Fake quantization: values on the grid in the input's dtype, with a gradient that passes through the rounding."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from lowprec.errors import unknown
from lowprec.formats.grammar import parse
from lowprec.formats.rounding import Rounding, parse_rounding
from lowprec.formats.types import Format
from lowprec.quantizers.blockwise import round_blocks
from lowprec.quantizers.estimators import inside
from lowprec.typing import Array, Float

GRADIENTS = ("ste", "clipped")


def fake_quant(
    x: Float[Array, "..."],
    fmt: str | Format,
    *,
    axis: int = -1,
    rounding: str | Rounding = "nearest_even",
    key: jax.Array | None = None,
    gradient: Literal["ste", "clipped"] = "ste",
    pad: bool = False,
) -> Float[Array, "..."]:
    """x rounded to a format with absmax scales; equal to `quantize(x, …).dequantize(x.dtype)`.

    The gradient is the cotangent itself, in its own precision (a cast to fp8 and back would round it too): everywhere
    ("ste", straight-through) or where |x| lies within the largest scaled value ("clipped", zero elsewhere).

    Args:
      x: float32, bfloat16 or float16, any shape.
      fmt: a format or its name.
      axis: the contraction axis: blocks and rows run along it.
      rounding: see `formats.Rounding`; the stochastic modes need a key.
      pad: let the last block of the axis be shorter than the others.
    Raises:
      ValueError: an unknown name, a block that does not divide the axis, stochastic rounding without a key.
    """
    if gradient not in GRADIENTS:
        raise unknown("gradient", gradient, GRADIENTS)
    return _fake_quant(x, key, parse(fmt), axis, parse_rounding(rounding), gradient, pad)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5, 6))
@partial(jax.jit, static_argnums=(2, 3, 4, 5, 6))
def _fake_quant(x, key, fmt, axis, rounding, gradient, pad):
    return round_blocks(x, fmt, axis, rounding=rounding, key=key, pad=pad).values.astype(x.dtype)


@partial(jax.jit, static_argnums=(2, 3, 4, 5, 6))
def _forward(x, key, fmt, axis, rounding, gradient, pad):
    rounded = round_blocks(x, fmt, axis, rounding=rounding, key=key, pad=pad)
    mask = inside(x, rounded) if gradient == "clipped" else None
    return rounded.values.astype(x.dtype), mask


def _backward(fmt, axis, rounding, gradient, pad, mask, cotangent):
    return (cotangent if mask is None else jnp.where(mask, cotangent, 0)), None


_fake_quant.defvjp(_forward, _backward)
