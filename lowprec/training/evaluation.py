"""The loss on held-out text, through the quantized forward pass and through the plain model with the same parameters.

The difference of the two is what quantizing the forward pass costs now; the rest of a recipe's gap to bf16 is in the
parameters that it trained.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lowprec.data import TextData
from lowprec.training.step import token_losses
from lowprec.typing import Array, Float, Int


@dataclass(frozen=True)
class MeanLoss:
    """Nats per token over windows, and the standard error of that mean."""

    loss: float
    sem: float

    @classmethod
    def of(cls, windows: np.ndarray) -> "MeanLoss":
        windows = np.asarray(windows, np.float64)
        sem = float(windows.std(ddof=1) / math.sqrt(windows.size)) if windows.size > 1 else 0.0
        return cls(float(windows.mean()), sem)


@dataclass(frozen=True)
class Evaluation:
    """Of one set of parameters.

    Attributes:
      quantized: by the recipe's forward pass.
      full_precision: by the plain model in the dtype of its config.
      gap: quantized - full_precision, window by window.
      tokens: predicted.
    """

    quantized: MeanLoss
    full_precision: MeanLoss
    gap: MeanLoss
    tokens: int

    def metrics(self, data: TextData) -> dict[str, float]:
        """As they stand in metrics.jsonl; losses in nats per token."""
        return {
            "eval_loss": self.quantized.loss,
            "eval_loss_sem": self.quantized.sem,
            "eval_bits_per_byte": data.bits_per_byte(self.quantized.loss, split="eval"),
            "eval_loss_full_precision": self.full_precision.loss,
            "eval_bits_per_byte_full_precision": data.bits_per_byte(self.full_precision.loss, split="eval"),
            "eval_gap": self.gap.loss,
            "eval_gap_sem": self.gap.sem,
        }


def make_window_losses(model, quantized) -> Callable:
    """(variables, tokens (B, T + 1), key) -> (2, B): mean loss of each window, quantized and in full precision."""

    def window_losses(variables, tokens: Int[Array, "B T"], key: jax.Array) -> Float[Array, "2 B"]:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        logits = (
            quantized.apply(variables, inputs, rngs={"quant": key}),
            model.apply({"params": variables["params"]}, inputs),
        )
        return jnp.stack([jnp.mean(token_losses(each, targets), axis=-1) for each in logits])

    return window_losses


def evaluate(window_losses: Callable, variables, batches: Sequence[dict], key: jax.Array) -> Evaluation:
    """Runs through all batches before it reads anything back.

    Args:
      window_losses: compiled.
      batches: of {"tokens": (B, T + 1), "weight": (B,)}; windows of weight 0 are left out.
      key: of a forward pass that rounds at random; the same at each evaluation, so that runs can be compared.
    """
    losses = [
        window_losses(variables, batch["tokens"], jax.random.fold_in(key, index)) for index, batch in enumerate(batches)
    ]
    counted = np.concatenate([np.asarray(batch["weight"]) for batch in batches]) > 0
    quantized, full = np.concatenate([np.asarray(each, np.float64) for each in losses], axis=1)[:, counted]
    return Evaluation(
        quantized=MeanLoss.of(quantized),
        full_precision=MeanLoss.of(full),
        gap=MeanLoss.of(quantized - full),
        tokens=int(counted.sum()) * (batches[0]["tokens"].shape[1] - 1),
    )
