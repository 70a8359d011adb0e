"""What a training step changes: parameters, optimizer state and the number of updates. Everything else is static."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowprec.training.controllers import build_controller
from lowprec.training.loss_scaling import LossScale
from lowprec.training.weight_storage import read_weights, storage_of
from lowprec.typing import Array, Float, Int

# The collection of what a model itself remembers: the running means and variances of its batch norms.
MODEL_STATE = "batch_stats"


class Quantizers(NamedTuple):
    """What a recipe adds to the state; empty where it adds nothing.

    Attributes:
      params: learned by gradient ("quant_params").
      opt_state: of their optimizer.
      state: remembered from step to step ("quant").
      loss_scale: a `LossScale`.
      control: the memory of the recipe's controller.
      objective: the memory of the run's objective.
    """

    params: Any = ()
    opt_state: optax.OptState = ()
    state: Any = ()
    loss_scale: Any = ()
    control: Any = ()
    objective: Any = ()


class TrainState(NamedTuple):
    """A pytree; checkpoints hold exactly this.

    Attributes:
      step: int32, updates so far.
      params: the plain model's, in float32 or as `training.weight_storage` stores them.
      opt_state: of the optimizer.
      quantizers: of the recipe.
      model_state: the plain model's collection MODEL_STATE; empty for most.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    quantizers: Quantizers = Quantizers()
    model_state: Any = ()

    @property
    def weights(self) -> Any:
        """The parameters as the model reads them."""
        return read_weights(self.params)

    @property
    def variables(self) -> dict[str, Any]:
        """The collections that the quantized model is applied to."""
        collections = {
            "params": self.weights,
            "quant_params": self.quantizers.params,
            "quant": self.quantizers.state,
            MODEL_STATE: self.model_state,
        }
        return {name: tree for name, tree in collections.items() if tree}


class Keys(NamedTuple):
    """The run's independent random streams, all from its seed; none is state, so none is saved."""

    params: jax.Array
    noise: jax.Array  # folded by step and microbatch
    evaluation: jax.Array  # folded by batch


def run_keys(seed: int) -> Keys:
    """Of a seed."""
    return Keys(*(jax.random.fold_in(jax.random.key(seed), index) for index in range(len(Keys._fields))))


def initial_state(
    model,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    shape: int | tuple[int, ...],
    dtype: Any = jnp.int32,
    weights: str = "f32",
) -> TrainState:
    """Before the first step, without quantizers.

    Args:
      model: plain or quantized: the parameters are the same.
      shape, dtype: of what the model reads of one example.
      weights: how they are stored, see `training.weight_storage`.
    """
    variables = _initial_variables(model, key, shape, dtype)
    params = storage_of(weights).store(variables["params"])
    return TrainState(
        jnp.zeros((), jnp.int32), params, optimizer.init(params), model_state=variables.get(MODEL_STATE, ())
    )


def initial_params(model, key: jax.Array, shape: int | tuple[int, ...], dtype: Any = jnp.int32) -> Any:
    """Those of `initial_state`."""
    return _initial_variables(model, key, shape, dtype)["params"]


def _initial_variables(model, key, shape, dtype):
    example = jnp.zeros((1, *np.atleast_1d(shape)), dtype)
    return model.init({"params": key, "quant": key}, example)


def initial_quantizers(
    quantized,
    optimizer: optax.GradientTransformation,
    params,
    inputs: Int[Array, "B T"] | Float[Array, "B H W C"],
    key: jax.Array,
    model_state: Any = (),
) -> Quantizers:
    """What the recipe of a quantized model adds, started from the model's variables and a batch."""
    recipe, made = quantized.recipe, {}
    if recipe.learns or recipe.remembers:
        made = quantized.init_quantizers(
            params, inputs, rngs={"quant": key}, model_state={MODEL_STATE: model_state} if model_state else {}
        )
    learned, state, memory = made.get("quant_params", ()), made.get("quant", ()), ()
    controller = build_controller(recipe)
    if controller is not None:
        memory, state = controller.init(params, state, key)
    return Quantizers(
        params=learned,
        opt_state=optimizer.init(learned) if learned else (),
        state=state,
        loss_scale=LossScale.start(recipe.loss_scaling) if recipe.loss_scaling else (),
        control=memory,
    )


def parameter_bytes(state: TrainState) -> dict[str, int]:
    """Bytes of parameters and of optimizer state, from arrays or shapes."""
    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    found = {"params": size(state.params), "optimizer": size(state.opt_state)}
    others = {"quantizers": state.quantizers, "model_state": state.model_state}
    return found | {name: size(tree) for name, tree in others.items() if jax.tree.leaves(tree)}
