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

from lowprec.training.loss_scaling import all_finite
from lowprec.training.state import TrainState
from lowprec.typing import Array, Float, Int

# What a step measures, in the order of its vector of metrics (one array is one transfer).
STEP_METRICS = ("loss", "grad_norm", "lr", "param_norm", "update_norm")


def token_losses(logits_BTV: Float[Array, "B T V"], targets_BT: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Cross-entropy of each token in nats, in float32."""
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTV.astype(jnp.float32), targets_BT)


def mean_loss(model, variables, tokens, key) -> Float[Array, ""]:
    """Nats per token.

    Args:
      model: has `apply`; plain or quantized.
      variables: its collections.
      tokens: int32 (B, T + 1); the first T are read, the last T predicted.
      key: of the recipe's noise.
    """
    logits_BTV = model.apply(variables, tokens[:, :-1], rngs={"quant": key})
    return jnp.mean(token_losses(logits_BTV, tokens[:, 1:]))


@dataclass(frozen=True)
class Update:
    """What changes the state after a gradient.

    Args:
      optimizer: of the parameters.
      schedule: its learning rate, for the log.
      quantizer_optimizer: of learned quantizer parameters, where there are any.
    """

    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    quantizer_optimizer: optax.GradientTransformation | None = None


class Gradients(NamedTuple):
    """Of the trained collections, and what the steps of the quantizers observed (the cotangents of their slots)."""

    params: Any
    quant_params: Any
    taps: Any


def make_train_step(
    model, update: Update, noise_key: jax.Array, slots: Any = ()
) -> Callable[[TrainState, Int[Array, "A B T"]], tuple[TrainState, Float[Array, " metrics"]]]:
    """(state, tokens) -> (new state, metrics in the order of STEP_METRICS).

    tokens are (microbatches, windows, data.seq_len + 1); loss and gradient are means over all of them. grad_norm is
    that before clipping. A step that loss scaling skips changes neither parameters nor optimizers: its grad_norm and
    update_norm are 0.

    Args:
      model: quantized, or plain.
      slots: of a recipe that remembers (`QuantizedModule.state_slots`).
    """
    scaling = getattr(getattr(model, "recipe", None), "loss_scaling", None)

    def train_step(state: TrainState, tokens: Int[Array, "A B T"]):
        step_key = jax.random.fold_in(noise_key, state.step)
        quantizers = state.quantizers
        factor = quantizers.loss_scale.scale if scaling else 1.0
        loss, gradients = _accumulate(model, state, slots, tokens, step_key, factor)
        new, measured = _updated(state, gradients, update)
        if slots:
            observed = model.next_state(quantizers.state, gradients.taps)
            new = new._replace(quantizers=new.quantizers._replace(state=observed))
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
        measured |= {"loss": loss, "lr": update.schedule(state.step)}
        return new, jnp.stack([measured[name] for name in STEP_METRICS])

    return train_step


def _updated(state: TrainState, gradients: Gradients, update: Update):
    """The state after the optimizers, and the norms of the step."""
    updates, opt_state = update.optimizer.update(gradients.params, state.opt_state, state.params)
    params, quantizers = optax.apply_updates(state.params, updates), state.quantizers
    if gradients.quant_params:
        learned, learned_state = update.quantizer_optimizer.update(
            gradients.quant_params, quantizers.opt_state, quantizers.params
        )
        quantizers = quantizers._replace(
            params=optax.apply_updates(quantizers.params, learned), opt_state=learned_state
        )
    norms = {
        "grad_norm": optax.global_norm(gradients.params),
        "param_norm": optax.global_norm(params),
        "update_norm": optax.global_norm(updates),
    }
    return TrainState(state.step + 1, params, opt_state, quantizers), norms


def _skipped(state, measured):
    """The norms of a step that changes nothing."""
    return dict.fromkeys(measured, jnp.zeros(())) | {"param_norm": optax.global_norm(state.params)}


def _accumulate(model, state, slots, tokens, step_key, factor):
    """Mean loss and mean gradients over the microbatches, one after the other, summed in float32.

    Args:
      factor: by which the loss is multiplied while it is differentiated.
    """
    trained = Gradients(state.params, state.quantizers.params, slots)

    def microbatch(index, tokens):
        key = jax.random.fold_in(step_key, index)

        def scaled_loss(trained):
            given = {"params": trained.params, "quant_params": trained.quant_params, "taps": trained.taps}
            variables = state.variables | {name: tree for name, tree in given.items() if tree}
            loss = mean_loss(model, variables, tokens, key)
            return loss * factor, loss

        (_, loss), gradients = jax.value_and_grad(scaled_loss, has_aux=True)(trained)
        return loss, gradients

    count = tokens.shape[0]
    if count == 1:
        loss, gradients = microbatch(0, tokens[0])
        return loss, _divided(gradients, 1, factor)

    def add(sums, indexed):
        return jax.tree.map(jnp.add, sums, microbatch(*indexed)), None

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), (jnp.zeros(()), trained))
    (loss, gradients), _ = jax.lax.scan(add, zeros, (jnp.arange(count), tokens))
    return loss / count, _divided(gradients, count, factor)


def _divided(gradients: Gradients, count, factor):
    """Means of the sums, the loss unscaled. What was observed counts its own calls."""
    if count == 1 and isinstance(factor, float):
        return gradients
    mean = lambda tree: jax.tree.map(lambda leaf: leaf / (count * factor), tree)
    return Gradients(mean(gradients.params), mean(gradients.quant_params), gradients.taps)
