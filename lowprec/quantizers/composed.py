"""Rules inside of rules: an operand quantized by a scale rule or by a differentiable one, with its gradient."""

import jax.numpy as jnp
from jax import lax

from lowprec.formats.random import Key
from lowprec.formats.types import Format
from lowprec.quantizers.blockwise import round_blocks
from lowprec.quantizers.estimators import inside
from lowprec.quantizers.scales import ScaleRule
from lowprec.quantizers.surrogate import with_slopes
from lowprec.quantizers.variables import Arrays, Differentiable
from lowprec.typing import Array, Bool, Float

Inner = ScaleRule | Differentiable


def inner_learns(inner: Inner) -> bool:
    """Whether a rule has parameters."""
    return isinstance(inner, Differentiable) and inner.learns


def inner_params(inner: Inner, x: Float[Array, "..."], fmt: Format, axis: int) -> dict[str, Float[Array, "..."]]:
    """Its parameters, from the first values of x."""
    return dict(inner.initial_params(x, fmt, axis)) if isinstance(inner, Differentiable) else {}


def quantize_inner(
    inner: Inner, x: Float[Array, "..."], fmt: Format, axis: int, params: Arrays, key: Key | None = None
) -> tuple[Float[Array, "..."], Bool[Array, "..."]]:
    """As `Differentiable.quantize`; a scale rule rounds to nearest, and its gradient passes straight through."""
    if isinstance(inner, Differentiable):
        return inner.quantize(x, fmt, axis, params, {}, key)
    wide = x.astype(jnp.float32)
    rounded = round_blocks(lax.stop_gradient(wide), fmt, axis, rule=inner, pad=True)
    return with_slopes(rounded.values, (jnp.ones(()), wide)), inside(lax.stop_gradient(wide), rounded)
