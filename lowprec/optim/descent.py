"""What ends every optimizer: decoupled decay, the learning rate, the dtype of the parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowprec.optim.labels import Elementwise, elementwise
from lowprec.optim.specs import DecaySpec, IdentitySpec, RateSpec

# A tree of booleans like the parameters (or a prefix of it), or a function from the parameters to one.
Mask = Any | Callable[[Any], Any] | None


def descent(
    learning_rate: optax.ScalarOrSchedule, weight_decay: optax.ScalarOrSchedule = 0.0, mask: Mask = None
) -> tuple[Elementwise, ...]:
    """The last parts of a chain: u ← -lr · (u + weight_decay · w) in float32, then in the dtype of w.

    With p ← p + u it is the same as to shrink p by 1 - lr · weight_decay before the step, as torch does.

    Args:
      mask: of the parameters that decay, as `optax.add_decayed_weights` takes it; None: all do.
    """
    return (
        elementwise(_decay(weight_decay, mask), DecaySpec(weight_decay, mask)),
        elementwise(optax.scale_by_learning_rate(learning_rate), RateSpec(learning_rate)),
        elementwise(optax.stateless(_in_dtype_of_params), IdentitySpec()),
    )


def as_float32(tree: Any) -> Any:
    """The leaves in float32, in which all arithmetic of optimizers is done."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def zero_by_leaf(tree: Any) -> Any:
    """A float32 zero in the place of each leaf: what is known of each parameter before the first step."""
    return jax.tree.map(lambda _: jnp.zeros((), jnp.float32), tree)


def _decay(weight_decay, mask):
    if isinstance(weight_decay, int | float) and weight_decay == 0:
        return optax.identity()  # needs no parameters
    decay = optax.add_decayed_weights(weight_decay, mask)
    # In bfloat16 the product of decay and weight would be rounded.
    return optax.GradientTransformation(
        decay.init, lambda updates, state, params=None: decay.update(updates, state, as_float32(params))
    )


def _in_dtype_of_params(updates, params):
    return updates if params is None else jax.tree.map(lambda u, w: u.astype(w.dtype), updates, params)
