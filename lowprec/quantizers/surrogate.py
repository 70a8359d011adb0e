"""Values with gradients of one's own choice: what every straight-through estimator comes down to."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lowprec.typing import Array, Float


def with_slopes(value: Float[Array, "..."], *terms: tuple[Array, Float[Array, "..."]]) -> Float[Array, "..."]:
    """The value, whose derivative with respect to each variable is the given slope.

    Args:
      value: its own gradient is not asked for.
      terms: pairs (slope, variable), arrays that broadcast to the value; slopes are constants of the differentiation.
    """
    linear = sum(lax.stop_gradient(slope).astype(jnp.float32) * variable for slope, variable in terms)
    return _take_value(linear, lax.stop_gradient(value))


def at_least(x: Float[Array, "..."], floor: float) -> Float[Array, "..."]:
    """max(x, floor), through which the gradient passes everywhere: a scale that fell below can rise again."""
    return _take_value(x, lax.stop_gradient(jnp.maximum(x, jnp.float32(floor))))


@jax.custom_vjp
def scale_gradient(x: Float[Array, "..."], factor: Any) -> Float[Array, "..."]:
    """x, whose gradient is multiplied by a factor."""
    return x


scale_gradient.defvjp(lambda x, factor: (x, factor), lambda factor, cotangent: (cotangent * factor, None))


@jax.custom_vjp
def with_price(x: Float[Array, "..."], price: Any) -> Float[Array, "..."]:
    """x, whose gradient is that of the loss plus price · sum(x)."""
    return x


with_price.defvjp(lambda x, price: (x, price), lambda price, cotangent: (cotangent + price, None))


@jax.custom_vjp
def report(x: Float[Array, "..."], slot: Float[Array, "..."], value: Float[Array, "..."]) -> Float[Array, "..."]:
    """x; the cotangent of the zero-valued slot carries the value out of the differentiated function."""
    return x


report.defvjp(lambda x, slot, value: (x, value), lambda value, cotangent: (cotangent, value, jnp.zeros_like(value)))


@jax.custom_vjp
def _take_value(x, value):
    return value


_take_value.defvjp(lambda x, value: (value, None), lambda _, cotangent: (cotangent, None))
