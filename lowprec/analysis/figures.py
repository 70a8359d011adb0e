"""Figures without a display, written as files."""

from pathlib import Path
from typing import Any

from lowprec.errors import UsageError


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, output: Path) -> None:
    """Writes a figure; makes the directory.

    Raises:
      UsageError: (a ValueError) the name does not end as a picture's.
    """
    kinds = figure.canvas.get_supported_filetypes()
    if output.suffix[1:] not in kinds:
        raise UsageError(f"{output}: a picture ends in .{', .'.join(sorted(kinds))}")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=130)
