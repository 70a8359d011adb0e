"""What a training step changes: parameters, optimizer state and the number of updates. Everything else is static."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowprec.training.loss_scaling import LossScale
from lowprec.typing import Array, Int


class Quantizers(NamedTuple):
    """What a recipe adds to the state; empty where it adds nothing.

    Attributes:
      params: learned by gradient ("quant_params").
      opt_state: of their optimizer.
      state: remembered from step to step ("quant").
      loss_scale: a `LossScale`.
    """

    params: Any = ()
    opt_state: optax.OptState = ()
    state: Any = ()
    loss_scale: Any = ()


class TrainState(NamedTuple):
    """A pytree; checkpoints hold exactly this.

    Attributes:
      step: int32, updates so far.
      params: the plain model's, in float32.
      opt_state: of the optimizer.
      quantizers: of the recipe.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    quantizers: Quantizers = Quantizers()

    @property
    def variables(self) -> dict[str, Any]:
        """The collections that the quantized model is applied to."""
        collections = {"params": self.params, "quant_params": self.quantizers.params, "quant": self.quantizers.state}
        return {name: tree for name, tree in collections.items() if tree}


class Keys(NamedTuple):
    """The run's independent random streams, all from its seed; none is state, so none is saved."""

    params: jax.Array
    noise: jax.Array  # folded by step and microbatch
    evaluation: jax.Array  # folded by batch


def run_keys(seed: int) -> Keys:
    """Of a seed."""
    return Keys(*(jax.random.fold_in(jax.random.key(seed), index) for index in range(len(Keys._fields))))


def initial_state(model, optimizer: optax.GradientTransformation, key: jax.Array, seq_len: int) -> TrainState:
    """Before the first step, without quantizers. `model` may be plain or quantized: the parameters are the same."""
    params = model.init({"params": key, "quant": key}, jnp.zeros((1, seq_len), jnp.int32))["params"]
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def initial_quantizers(
    quantized, optimizer: optax.GradientTransformation, params, tokens: Int[Array, "B T"], key: jax.Array
) -> Quantizers:
    """What the recipe of a quantized model adds, started from the parameters and a batch."""
    recipe, made = quantized.recipe, {}
    if recipe.learns or recipe.remembers:
        made = quantized.init_quantizers(params, tokens, rngs={"quant": key})
    learned = made.get("quant_params", ())
    return Quantizers(
        params=learned,
        opt_state=optimizer.init(learned) if learned else (),
        state=made.get("quant", ()),
        loss_scale=LossScale.start(recipe.loss_scaling) if recipe.loss_scaling else (),
    )


def parameter_bytes(state: TrainState) -> dict[str, int]:
    """Bytes of parameters and of optimizer state, from arrays or shapes."""
    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    found = {"params": size(state.params), "optimizer": size(state.opt_state)}
    return found | ({"quantizers": size(state.quantizers)} if jax.tree.leaves(state.quantizers) else {})
