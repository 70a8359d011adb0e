"""How well each operand of each layer survives its quantization, forward and backward, measured during training.

The numbers leave the model as the gradient with respect to its taps (`nn.linen.tap_statistics`): one more forward and
backward pass at each evaluation, and none of it in the training step.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from lowprec.nn.linen import tap_statistics
from lowprec.quantizers import OPERANDS, OperandStatistics
from lowprec.training.metrics import short
from lowprec.training.step import mean_loss
from lowprec.training.tasks import Task

NUMBERS = ("sqnr_db", "cosine", "clipped", "underflowed", "amax")


def make_tap_gradient(quantized, task: Task) -> Callable:
    """(variables, taps, examples, key) -> cotangents of the taps."""

    def tap_gradient(variables, taps, examples, key: jax.Array):
        return jax.grad(lambda taps: mean_loss(quantized, variables | {"taps": taps}, examples, key, task))(taps)

    return tap_gradient


@dataclass(frozen=True)
class Health:
    """The statistics of one measurement: layer path -> operand (`quantizers.OPERANDS`) -> numbers."""

    layers: Mapping[str, Mapping[str, OperandStatistics]]

    @classmethod
    def from_cotangents(cls, cotangents) -> "Health":
        return cls({path: of_layer for path, of_layer in tap_statistics(cotangents).items() if of_layer})

    def by_operand(self) -> dict[str, dict[str, float | None]]:
        """Each operand's mean over the layers (amax: the maximum)."""
        found = {name: [of[name] for of in self.layers.values() if name in of] for name in OPERANDS}
        return {name: _summary(statistics) for name, statistics in found.items() if statistics}

    def overall(self) -> dict[str, float | None]:
        """Means over layers and operands (amax: the maximum)."""
        return _summary([each for of_layer in self.layers.values() for each in of_layer.values()])

    def worst(self) -> tuple[str, str, float] | None:
        """(layer, operand, sqnr_db) of the least signal to noise."""
        found = [
            (each.sqnr_db, path, name)
            for path, of_layer in self.layers.items()
            for name, each in of_layer.items()
            if not math.isnan(each.sqnr_db)
        ]
        if not found:
            return None
        sqnr, path, name = min(found)
        return path, name, sqnr

    def drowned(self) -> list[str]:
        """The gradients whose rounding noise is above 1/√3 of them: "layer operand", least signal first.

        There low precision no longer pays; the backward products want bf16 (FP4 All the Way, arXiv 2505.19115, §4).
        """
        return [where for ratio, where in sorted(self._gradients_to_noise()) if ratio < math.sqrt(3)]

    def drowning(self) -> bool:
        """Whether this is so of more than half of the gradients."""
        return 2 * len(self.drowned()) > len(self._gradients_to_noise())

    def _gradients_to_noise(self) -> list[tuple[float, str]]:
        return [
            (each.gradient_to_noise, f"{path} {name}")
            for path, of_layer in self.layers.items()
            for name, each in of_layer.items()
            if name.endswith(".dy")
        ]

    def metrics(self) -> dict[str, Any]:
        """As they stand in a line of metrics.jsonl; what is infinite or undefined is null."""
        if not self.layers:
            return {}
        overall = self.overall()
        return {
            **{name: overall[name] for name in ("sqnr_db", "clipped", "underflowed")},
            "quantization": {
                path: {name: _numbers(each) for name, each in of_layer.items()}
                for path, of_layer in self.layers.items()
            },
        }

    def summary(self) -> dict[str, Any]:
        """As it stands in summary.json."""
        if not self.layers:
            return {}
        worst = self.worst()
        return {
            **self.overall(),
            "by_operand": self.by_operand(),
            "drowned": self.drowned(),
            "worst": None if worst is None else {"layer": worst[0], "operand": worst[1], "sqnr_db": short(worst[2])},
        }


def _numbers(statistics: OperandStatistics) -> dict[str, float | None]:
    return {name: short(getattr(statistics, name)) for name in NUMBERS}


def _summary(statistics: Iterable[OperandStatistics]) -> dict[str, float | None]:
    columns = {name: [getattr(each, name) for each in statistics] for name in NUMBERS}
    return {name: short((max if name == "amax" else _mean)(column)) for name, column in columns.items() if column}


def _mean(values: Iterable[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
