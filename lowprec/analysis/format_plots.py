"""Pictures of number formats: number lines, the error of rounding, comparisons."""

from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from lowprec import formats
from lowprec.analysis.figures import new_figure, save_figure
from lowprec.analysis.format_comparison import DISTRIBUTIONS, Comparison
from lowprec.errors import UsageError
from lowprec.formats.types import ElementFormat

# Points at which the error is drawn: some dozens to each of the many binades of e5m2.
POINTS = 4000
MAX_BITS_DRAWN = 16
MARKERS = "osD^v<>PX*"
DB_PER_BIT = 20 * np.log10(2)


def draw_format(name: str, output: Path) -> None:
    """Writes a PNG: the values of the element format on a linear and a logarithmic line, and the relative error
    |q - x| / x of rounding to nearest with saturation.

    Raises:
      UsageError: (a ValueError) unknown name, or a format of more than 16 bits.
    """
    element = formats.element_of(name)
    if element.bits > MAX_BITS_DRAWN:
        raise UsageError(f"{element} has {element.bits} bits; number lines are drawn up to {MAX_BITS_DRAWN}")
    values = formats.value_table(element)
    positive = values[values > 0]
    figure = new_figure(10, 7)
    linear, logarithmic, error = figure.subplots(3, 1, height_ratios=(1, 1, 3))
    linear.eventplot(values, lineoffsets=0, linewidths=0.6)
    linear.set(
        title=f"{name}: the finite values" if name == str(element) else f"{name}: the finite values of {element}"
    )
    logarithmic.eventplot(positive, lineoffsets=0, linewidths=0.6)
    logarithmic.set(xscale="log", title="the positive ones, logarithmic")
    x, relative = relative_error(element)
    error.plot(x, relative, linewidth=0.6)
    error.set(
        xscale="log", yscale="log", xlabel="x", ylabel="|q - x| / x", title="relative error of rounding to nearest"
    )
    error.axvspan(element.min_normal, element.max, alpha=0.1, label="smallest normal to largest value")
    error.legend(fontsize=8, loc="lower left")
    error.grid(alpha=0.3)
    for axes in (linear, logarithmic):
        axes.set(yticks=[])
    save_figure(figure, output)


def relative_error(element: ElementFormat) -> tuple[np.ndarray, np.ndarray]:
    """(x, |q - x| / x), x in equal logarithmic steps from a quarter of the smallest value to twice the largest."""
    highest = min(2 * element.max, float(np.finfo(np.float32).max))
    x = np.geomspace(element.min_subnormal / 4, highest, POINTS).astype(np.float32)
    q = np.asarray(formats.round_to(jnp.asarray(x), element), np.float64)
    return x, np.abs(q - x) / x


def draw_comparison(results: Sequence[Comparison], output: Path) -> None:
    """Writes a PNG: SQNR against bits per value, a panel a distribution, without formats whose SQNR is infinite."""
    figure = new_figure(12, 8)
    panels = figure.subplots(2, 2, sharex=True, sharey=True).flat
    finite = [r for r in results if np.isfinite(r.sqnr_db)]
    names = list(dict.fromkeys(r.format for r in finite))
    lowest = min((r.bits_per_value for r in finite), default=0)
    for axes, distribution in zip(panels, DISTRIBUTIONS, strict=True):
        points = {r.format: r for r in finite if r.distribution == distribution}
        for index, name in enumerate(names):
            if name in points:
                x, y = points[name].bits_per_value, points[name].sqnr_db
                axes.plot(x, y, MARKERS[index % len(MARKERS)], color=f"C{index % 10}", fillstyle="none", label=name)
        line = {"linestyle": "--", "color": "grey", "linewidth": 0.8, "label": "6.02 dB a bit"}
        axes.axline((lowest, DB_PER_BIT * lowest), slope=DB_PER_BIT, **line)
        axes.set(xlabel="bits per value", ylabel="SQNR, dB", title=distribution)
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    save_figure(figure, output)
