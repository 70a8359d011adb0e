"""Outliers of runs that measured them (eval.outliers): how they grow during training, side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lowprec.analysis.figures import new_figure, save_figure
from lowprec.analysis.runs import Run
from lowprec.errors import UsageError

# What is drawn, and how it is called there.
NUMBERS = {
    "residual_kurtosis": "kurtosis of the residual stream",
    "residual_infinity_norm": "infinity norm of the residual stream",
    "attention_infinity_norm": "infinity norm of attention's output",
    "sink_rate": "sink rate",
    "sparsity": "attention weights that are 0",
}


def outlier_curve(run: Run, number: str, over_layers: Literal["mean", "max"] = "mean") -> list[tuple[int, float]]:
    """(step, value) of each evaluation that measured it; `nn.outliers` says what the numbers are.

    Args:
      number: e.g. "sink_rate", or another one of `NUMBERS`.
      over_layers: what is taken of the values of the layers.
    """
    values = [(line["step"], line.get("outliers", {}).get(over_layers, {}).get(number)) for line in run.lines]
    return [(step, value) for step, value in values if isinstance(value, int | float)]


def draw_outliers(runs: Sequence[Run], output: Path, names: Sequence[str] | None = None) -> None:
    """Writes a picture: each of `NUMBERS` against the steps, a line a run; norms and kurtosis are largest over layers.

    Args:
      names: of the runs; None: of their directories.
    Raises:
      UsageError: (a ValueError) no run measured outliers.
    """
    if not any(outlier_curve(run, number) for run in runs for number in NUMBERS):
        raise UsageError("none of these runs measured outliers; train with eval.outliers=true")
    figure = new_figure(4 * len(NUMBERS), 4)
    for axes, (number, title) in zip(figure.subplots(1, len(NUMBERS)), NUMBERS.items(), strict=True):
        fraction = number in ("sink_rate", "sparsity")
        for run, name in zip(runs, names or [run.path.absolute().name for run in runs], strict=True):
            curve = outlier_curve(run, number, "mean" if fraction else "max")
            axes.plot([step for step, _ in curve], [value for _, value in curve], "o-", markersize=3, label=name)
        axes.set(xlabel="step", title=title)
        if fraction:
            axes.set_ylim(-0.03, 1.03)
        else:
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, output)
