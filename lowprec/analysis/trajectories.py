"""Bits by layer over the steps of a run whose formats a controller changes, from its metrics.jsonl.

python -m lowprec.analysis.trajectories RUN --out bits.png
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowprec.analysis.figures import new_figure, save_figure
from lowprec.errors import UsageError
from lowprec.training.metrics import read_lines

# A legend of more layers would hide them.
MOST_NAMED = 16


@dataclass(frozen=True)
class Trajectory:
    """Of one run.

    Attributes:
      steps: ascending, those of lines that have bits.
      bits: layer path -> one number a step, as the step used them; NaN where a line has none for this layer.
    """

    steps: np.ndarray
    bits: Mapping[str, np.ndarray]

    @property
    def mean(self) -> np.ndarray:
        """Over the layers, by step."""
        return np.nanmean(np.stack(list(self.bits.values())), axis=0)


def trajectory(lines: Sequence[Mapping[str, Any]]) -> Trajectory:
    """From the lines of a metrics.jsonl.

    Raises:
      UsageError: (a ValueError) if none has bits.
    """
    told = [line for line in lines if line.get("bits")]
    if not told:
        raise UsageError("no line has bits: the recipe has no controller, e.g. adapt or fliqs_6")
    layers = dict.fromkeys(layer for line in told for layer in line["bits"])
    return Trajectory(
        np.array([line["step"] for line in told]),
        {layer: np.array([line["bits"].get(layer, np.nan) for line in told], float) for layer in layers},
    )


def draw_trajectory(of_run: Trajectory, output: Path) -> None:
    """Writes a figure: a line a layer, and their mean.

    Raises:
      UsageError: (a ValueError) the name does not end as a picture's.
    """
    figure = new_figure(8, 5)
    axes = figure.subplots()
    for layer, bits in of_run.bits.items():
        axes.step(of_run.steps, bits, where="post", linewidth=0.8, alpha=0.7, label=layer)
    axes.step(of_run.steps, of_run.mean, where="post", color="black", linewidth=1.5, label="mean")
    axes.set(xlabel="step", ylabel="bits")
    axes.grid(alpha=0.3)
    if len(of_run.bits) <= MOST_NAMED:
        axes.legend(fontsize=7, ncols=2)
    save_figure(figure, output)


def main() -> None:
    """Draws the trajectory of a run."""
    parser = argparse.ArgumentParser(description="Bits by layer over the steps of a run.")
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="a picture, e.g. bits.png")
    arguments = parser.parse_args()
    draw_trajectory(trajectory(read_lines(arguments.workdir / "metrics.jsonl")), arguments.out)


if __name__ == "__main__":
    main()
