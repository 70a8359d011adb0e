"""Figures as files, without a display; and those of notebooks, which are shown as well where there is one."""

import functools
import os
import tempfile
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


def show(figure: Any, name: str) -> None:
    """Of a notebook: writes a figure of pyplot, shows it where there is a display, and says where it lies.

    Args:
      name: of the file, a PNG in the folder named by `LOWPREC_FIGURES`, or else in a temporary one.
    """
    import matplotlib
    import matplotlib.pyplot as plt

    output = _folder(os.environ.get("LOWPREC_FIGURES") or "") / f"{name}.png"
    save_figure(figure, output)
    if matplotlib.get_backend().lower() != "agg":
        plt.show()
    plt.close(figure)
    print(f"figure: {output}")


@functools.cache
def _folder(name: str) -> Path:
    """The same for all figures of a process."""
    return Path(name or tempfile.mkdtemp(prefix="lowprec-figures-"))
