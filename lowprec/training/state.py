"""What a training step changes: parameters, optimizer state and the number of updates. Everything else is static."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class TrainState(NamedTuple):
    """A pytree; checkpoints hold exactly this.

    Attributes:
      step: int32, updates so far.
      params: the plain model's, in float32.
      opt_state: of the optimizer.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState


class Keys(NamedTuple):
    """The run's independent random streams, all from its seed; none is state, so none is saved."""

    params: jax.Array
    noise: jax.Array  # folded by step and microbatch
    evaluation: jax.Array  # folded by batch


def run_keys(seed: int) -> Keys:
    """Of a seed."""
    return Keys(*(jax.random.fold_in(jax.random.key(seed), index) for index in range(len(Keys._fields))))


def initial_state(model, optimizer: optax.GradientTransformation, key: jax.Array, seq_len: int) -> TrainState:
    """Before the first step. `model` may be plain or quantized: the parameters are the same."""
    params = model.init({"params": key, "quant": key}, jnp.zeros((1, seq_len), jnp.int32))["params"]
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def parameter_bytes(state: TrainState) -> dict[str, int]:
    """Bytes of parameters and of optimizer state, from arrays or shapes."""
    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    return {"params": size(state.params), "optimizer": size(state.opt_state)}
