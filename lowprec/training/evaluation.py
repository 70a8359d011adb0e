"""The loss on held-out data, through the quantized forward pass and through the plain model with the same parameters.

The difference of the two is what quantizing the forward pass costs now; the rest of a recipe's gap to bf16 is in the
parameters that it trained.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowprec.training.state import MODEL_STATE
from lowprec.training.tasks import NEXT_TOKEN, SCORES, Task
from lowprec.typing import Array, Float


@dataclass(frozen=True)
class MeanLoss:
    """Nats per prediction over examples (windows of text, images), and the standard error of that mean."""

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
      gap: quantized - full_precision, example by example.
      tokens: predictions made.
      accuracy: shares of right ones, quantized and in full precision, of a task that counts them.
      task: what was asked.
    """

    quantized: MeanLoss
    full_precision: MeanLoss
    gap: MeanLoss
    tokens: int
    accuracy: tuple[float, float] | None = None
    task: Task = NEXT_TOKEN

    def scores(self, data: Any) -> tuple[float, float]:
        """What stands beside the losses, `Task.score`, quantized and in full precision."""
        if self.accuracy is not None:
            return self.accuracy
        rate = lambda loss: self.task.rates(data, loss, split="eval")[self.task.score]
        return rate(self.quantized.loss), rate(self.full_precision.loss)

    def metrics(self, data: Any) -> dict[str, float]:
        """As they stand in metrics.jsonl; losses in nats per prediction."""
        quantized, full_precision = self.scores(data)
        return {
            "eval_loss": self.quantized.loss,
            "eval_loss_sem": self.quantized.sem,
            f"eval_{self.task.score}": quantized,
            "eval_loss_full_precision": self.full_precision.loss,
            f"eval_{self.task.score}_full_precision": full_precision,
            "eval_gap": self.gap.loss,
            "eval_gap_sem": self.gap.sem,
        }


def describe(metrics: Mapping[str, Any]) -> str:
    """Metrics of an evaluation in words: "0.9820 accuracy (0.9831 with the full-precision forward pass)"."""
    score = next(name for name in SCORES if f"eval_{name}" in metrics)
    value, full_precision = (metrics[f"eval_{score}{suffix}"] for suffix in ("", "_full_precision"))
    return f"{value:.4f} {SCORES[score]} ({full_precision:.4f} with the full-precision forward pass)"


def make_window_losses(model, quantized, task: Task = NEXT_TOKEN) -> Callable:
    """(variables, examples, key) -> (2, B): mean loss of each example, quantized and in full precision.

    A task that counts hits adds two rows: the share of each example's predictions that are right.
    """

    def per_example(predictions: Float[Array, "B ..."]) -> Float[Array, " B"]:
        return jnp.mean(predictions, axis=tuple(range(1, predictions.ndim)))

    def window_losses(variables, examples, key: jax.Array) -> Float[Array, "rows B"]:
        inputs = task.inputs(examples)
        plain = {name: tree for name, tree in variables.items() if name in ("params", MODEL_STATE)}
        logits = (quantized.apply(variables, inputs, rngs={"quant": key}), model.apply(plain, inputs))
        hits = [found for each in logits if (found := task.hits(each, examples)) is not None]
        return jnp.stack([per_example(rows) for rows in (*(task.losses(each, examples) for each in logits), *hits)])

    return window_losses


def evaluate(
    window_losses: Callable, variables, batches: Sequence[dict], key: jax.Array, task: Task = NEXT_TOKEN
) -> Evaluation:
    """Runs through all batches before it reads anything back.

    Args:
      window_losses: compiled.
      batches: of the task's data, e.g. {"tokens": (B, T + 1), "weight": (B,)}; rows of weight 0 are left out.
      key: of a forward pass that rounds at random; the same at each evaluation, so that runs can be compared.
    """
    rows = [
        window_losses(variables, task.examples(batch), jax.random.fold_in(key, index))
        for index, batch in enumerate(batches)
    ]
    counted = np.concatenate([np.asarray(batch["weight"]) for batch in batches]) > 0
    quantized, full, *hits = np.concatenate([np.asarray(each, np.float64) for each in rows], axis=1)[:, counted]
    return Evaluation(
        quantized=MeanLoss.of(quantized),
        full_precision=MeanLoss.of(full),
        gap=MeanLoss.of(quantized - full),
        tokens=int(counted.sum()) * task.predictions(task.inputs(task.examples(batches[0]))),
        accuracy=(float(hits[0].mean()), float(hits[1].mean())) if hits else None,
        task=task,
    )
