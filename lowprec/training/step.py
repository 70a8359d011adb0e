"""The training step: one optimizer update, averaged over microbatches, as a pure function of (state, batch).

Rounding noise comes from fold_in(fold_in(run key, step), microbatch): a function of seed and step alone, so that a
resumed run draws what it would have drawn.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowprec.nn.rank_decay import decays, halve_ranks
from lowprec.optim.fused import Step
from lowprec.optim.sparse_update import Selection
from lowprec.training.controllers import Controller, Signals, build_controller
from lowprec.training.loss_scaling import all_finite
from lowprec.training.objectives import TASK_LOSS, Objective, Observed
from lowprec.training.state import TrainState
from lowprec.training.tasks import NEXT_TOKEN, Task
from lowprec.training.weight_storage import read_weights
from lowprec.typing import Array, Float

# What a step measures, in the order of its vector of metrics (one array is one transfer).
STEP_METRICS = ("loss", "grad_norm", "lr", "param_norm", "update_norm")
# Of the step's key; the streams of microbatches count up from 0.
_CONTROL_STREAM, _WEIGHT_STREAM = 2**31 - 1, 2**31 - 2


def mean_loss(model, variables, examples, key, task: Task = NEXT_TOKEN) -> Float[Array, ""]:
    """Nats per prediction; see `Task.loss`."""
    return task.loss(model, variables, examples, key)[0]


@dataclass(frozen=True)
class Update:
    """What changes the state after a gradient.

    Args:
      optimizer: of the parameters; of a selection, `optim.sparse_update.restricted` to it.
      schedule: its learning rate, for the log.
      quantizer_optimizer: of learned quantizer parameters, where there are any.
      steps: of the run, which controllers plan over.
      selection: the parameters that are trained; None: all.
      measures: pairs (name, function of the optimizer's state after the step), for the log.
      weights: how parameters are stored, see `training.weight_storage`.
      fused: the optimizer as one step that holds few moments in float32; None: it has none.
    """

    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    quantizer_optimizer: optax.GradientTransformation | None = None
    steps: int = 1
    selection: Selection | None = None
    measures: tuple[tuple[str, Callable[[Any], jax.Array]], ...] = ()
    weights: str = "f32"
    fused: Step | None = None

    def trained(self, params: Any) -> Any:
        """Those of the parameters that have a gradient."""
        return params if self.selection is None else self.selection.split(params)[0]

    def joined(self, trained: Any, params: Any) -> Any:
        """All parameters, with the trained ones in their places."""
        return trained if self.selection is None else self.selection.join(trained, jax.lax.stop_gradient(params))

    def apply(self, gradients: Any, opt_state: Any, params: Any, key: jax.Array, quant_params: Any):
        """(parameters, optimizer state, norm of the update) after a gradient.

        Args:
          key: of the rounding of parameters that are QTensors.
          quant_params: those of the next step, on whose grid weights are put that are put on their grid.
        """
        if self.fused is not None:
            new, opt_state = self.fused.step(params, gradients, opt_state, key, quant_params=quant_params)
            by = jax.tree.map(jnp.subtract, read_weights(new), read_weights(params))
            return new, opt_state, optax.global_norm(by)
        optimizer = optax.with_extra_args_support(self.optimizer)
        updates, opt_state = optimizer.update(gradients, opt_state, params, quant_params=quant_params)
        trained = optax.apply_updates(self.trained(params), updates)
        return self.joined(trained, params), opt_state, optax.global_norm(updates)


class Gradients(NamedTuple):
    """Of the trained collections, and what the steps of the quantizers observed (the cotangents of their slots)."""

    params: Any
    quant_params: Any
    taps: Any


def make_train_step(
    model,
    update: Update,
    noise_key: jax.Array,
    slots: Any = (),
    objective: Objective = TASK_LOSS,
) -> Callable[..., tuple[TrainState, Float[Array, " metrics"]]]:
    """(state, examples, constants of the objective) -> (new state, metrics in the order of `metric_names`, then what a
    controller measures, flat).

    examples are the task's with an axis of microbatches before their rows: of text, int32 (microbatches, windows,
    data.seq_len + 1). Loss and gradient are means over all of them, and so is the state of the model: each microbatch
    changes that which the step began with. grad_norm is that before clipping. A step that loss scaling skips changes
    neither parameters nor optimizers nor that state, nor what quantizers, controller and objective remember: its
    grad_norm and update_norm are 0.

    Args:
      model: quantized, or plain.
      slots: of a recipe that remembers (`QuantizedModule.state_slots`).
      objective: how loss and gradient come about; its memory is state.quantizers.objective.
    """
    recipe = getattr(model, "recipe", None)
    scaling = getattr(recipe, "loss_scaling", None)
    controller = None if recipe is None else build_controller(recipe)
    bridged = recipe is not None and decays(recipe)

    def train_step(state: TrainState, examples, constants: Any = ()):
        step_key = jax.random.fold_in(noise_key, state.step)
        quantizers = state.quantizers
        factor = quantizers.loss_scale.scale if scaling else 1.0
        memory, weights = quantizers.objective, state.weights

        def gradient_of(trained: Gradients):
            def loss_of(trained: Gradients, examples, key):
                given = {
                    "params": update.joined(trained.params, weights),
                    "quant_params": trained.quant_params,
                    "taps": trained.taps,
                }
                variables = state.variables | {name: tree for name, tree in given.items() if tree}
                return objective.loss(model, variables, examples, key, memory, constants)

            zeros = Observed(state.model_state, dict.fromkeys(objective.parts, jnp.zeros(())))
            return _accumulate(loss_of, trained, zeros, examples, step_key, factor)

        trained = Gradients(update.trained(weights), quantizers.params, slots)
        found = objective.gradient(gradient_of, trained, memory)
        loss, gradients = found.loss, found.gradients
        hold = lambda updates: objective.hold(updates, found.memory)
        new, measured = _updated(state, gradients, update, hold, jax.random.fold_in(step_key, _WEIGHT_STREAM))
        new = new._replace(
            quantizers=new.quantizers._replace(objective=found.memory), model_state=found.observed.model_state
        )
        if slots:
            remembered = model.next_state(quantizers.state, gradients.taps)
            new = new._replace(quantizers=new.quantizers._replace(state=remembered))
        if bridged:
            learned = halve_ranks(recipe, new.quantizers.params, new.quantizers.state)
            new = new._replace(quantizers=new.quantizers._replace(params=learned))
        decisions: Any = {}
        if controller is not None:
            signals = Signals(
                loss,
                new.weights,
                gradients.params,
                jax.random.fold_in(step_key, _CONTROL_STREAM),
                jnp.minimum(state.step / update.steps, 1),
            )
            new, decisions = _controlled(controller, new, signals)
        if scaling:
            finite = all_finite((gradients.params, gradients.quant_params))
            old = state._replace(step=new.step)
            new, measured = jax.tree.map(
                lambda after, before: jnp.where(finite, after, before),
                (new, measured),
                (old, _skipped(state, measured)),
            )
            after = quantizers.loss_scale.after(scaling, finite)
            new = new._replace(quantizers=new.quantizers._replace(loss_scale=after))
        measured |= {"loss": loss, "lr": update.schedule(state.step), **found.observed.parts, **found.metrics}
        measured |= {name: measure(new.opt_state) for name, measure in update.measures}
        flat = [jnp.ravel(leaf) for leaf in jax.tree.leaves(decisions)]
        return new, jnp.concatenate([jnp.stack([measured[name] for name in metric_names(objective, update)]), *flat])

    return train_step


def metric_names(objective: Objective, update: Update) -> tuple[str, ...]:
    """Of the numbers of a step, in their order; a controller's come after them."""
    return (*STEP_METRICS, *objective.parts, *objective.measures, *(name for name, _ in update.measures))


def _controlled(controller: Controller, state: TrainState, signals: Signals):
    """The state after its controller, and what that measured."""
    quantizers = state.quantizers
    memory, quant, decisions = controller.update(quantizers.control, quantizers.state, signals)
    return state._replace(quantizers=quantizers._replace(control=memory, state=quant)), decisions


def _updated(state: TrainState, gradients: Gradients, update: Update, hold: Callable[[Any], Any], key: jax.Array):
    """The state after the optimizers, and the norms of the step.

    Args:
      hold: what becomes of the updates of learned quantizer parameters.
      key: of the rounding of parameters.
    """
    quantizers = state.quantizers
    if gradients.quant_params:
        learned, learned_state = update.quantizer_optimizer.update(
            gradients.quant_params, quantizers.opt_state, quantizers.params
        )
        quantizers = quantizers._replace(
            params=optax.apply_updates(quantizers.params, hold(learned)), opt_state=learned_state
        )
    params, opt_state, update_norm = update.apply(
        gradients.params, state.opt_state, state.params, key, quantizers.params
    )
    norms = {
        "grad_norm": optax.global_norm(gradients.params),
        "param_norm": optax.global_norm(read_weights(params)),
        "update_norm": update_norm,
    }
    return state._replace(step=state.step + 1, params=params, opt_state=opt_state, quantizers=quantizers), norms


def _skipped(state, measured):
    """The norms of a step that changes nothing."""
    return dict.fromkeys(measured, jnp.zeros(())) | {"param_norm": optax.global_norm(state.weights)}


def _accumulate(loss_of, trained, observed, examples, step_key, factor):
    """Means over the microbatches, one after the other, summed in float32: (loss, what is beside it, gradients).

    Args:
      loss_of: (trained, examples, key) -> (loss, Observed).
      observed: like that which it returns.
      factor: by which the loss is multiplied while it is differentiated.
    """

    def microbatch(index, examples):
        key = jax.random.fold_in(step_key, index)

        def scaled_loss(trained):
            loss, observed = loss_of(trained, examples, key)
            return loss * factor, (loss, observed)

        (_, (loss, observed)), gradients = jax.value_and_grad(scaled_loss, has_aux=True)(trained)
        return loss, observed, gradients

    count = jax.tree.leaves(examples)[0].shape[0]
    if count == 1:
        loss, observed, gradients = microbatch(0, jax.tree.map(lambda rows: rows[0], examples))
        return loss, observed, _divided(gradients, 1, factor)

    def add(sums, indexed):
        return jax.tree.map(jnp.add, sums, microbatch(*indexed)), None

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), (jnp.zeros(()), observed, trained))
    (loss, observed, gradients), _ = jax.lax.scan(add, zeros, (jnp.arange(count), examples))
    mean_observed = jax.tree.map(lambda leaf: leaf / count, observed)
    return loss / count, mean_observed, _divided(gradients, count, factor)


def _divided(gradients: Gradients, count, factor):
    """Means of the sums, the loss unscaled. What was observed counts its own calls."""
    if count == 1 and isinstance(factor, float):
        return gradients
    mean = lambda tree: jax.tree.map(lambda leaf: leaf / (count * factor), tree)
    return Gradients(mean(gradients.params), mean(gradients.quant_params), gradients.taps)
