"""The training step: one optimizer update, averaged over microbatches, as a pure function of (state, batch).

Rounding noise comes from fold_in(fold_in(run key, step), microbatch): a function of seed and step alone, so that a
resumed run draws what it would have drawn.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from lowprec.training.state import TrainState
from lowprec.typing import Array, Float, Int

# What a step measures, in the order of its vector of metrics (one array is one transfer).
STEP_METRICS = ("loss", "grad_norm", "lr", "param_norm", "update_norm")


def token_losses(logits_BTV: Float[Array, "B T V"], targets_BT: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Cross-entropy of each token in nats, in float32."""
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTV.astype(jnp.float32), targets_BT)


def mean_loss(model, params, tokens, key, **collections) -> Float[Array, ""]:
    """Nats per token.

    Args:
      model: has `apply`; plain or quantized.
      tokens: int32 (B, T + 1); the first T are read, the last T predicted.
      key: of the recipe's noise.
      collections: further variables, e.g. taps.
    """
    logits_BTV = model.apply({"params": params, **collections}, tokens[:, :-1], rngs={"quant": key})
    return jnp.mean(token_losses(logits_BTV, tokens[:, 1:]))


def make_train_step(
    model, optimizer: optax.GradientTransformation, schedule: optax.Schedule, noise_key: jax.Array
) -> Callable[[TrainState, Int[Array, "A B T"]], tuple[TrainState, Float[Array, " metrics"]]]:
    """(state, tokens) -> (new state, metrics in the order of STEP_METRICS).

    tokens are (microbatches, windows, data.seq_len + 1); loss and gradient are means over all of them. grad_norm is
    that before clipping.
    """

    def train_step(state: TrainState, tokens: Int[Array, "A B T"]):
        step_key = jax.random.fold_in(noise_key, state.step)
        loss, gradients = _accumulate(model, state.params, tokens, step_key)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        measured = {
            "loss": loss,
            "grad_norm": optax.global_norm(gradients),
            "lr": schedule(state.step),
            "param_norm": optax.global_norm(params),
            "update_norm": optax.global_norm(updates),
        }
        metrics = jnp.stack([measured[name] for name in STEP_METRICS])
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


def _accumulate(model, params, tokens, step_key):
    """Mean loss and mean gradient over the microbatches, one after the other, summed in float32."""

    def microbatch(index, tokens):
        key = jax.random.fold_in(step_key, index)
        return jax.value_and_grad(lambda p: mean_loss(model, p, tokens, key))(params)

    count = tokens.shape[0]
    if count == 1:
        return microbatch(0, tokens[0])

    def add(sums, indexed):
        return jax.tree.map(jnp.add, sums, microbatch(*indexed)), None

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), (jnp.zeros(()), params))
    sums, _ = jax.lax.scan(add, zeros, (jnp.arange(count), tokens))
    return jax.tree.map(lambda leaf: leaf / count, sums)
