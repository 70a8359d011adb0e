"""`lowprec report`: runs side by side, as a table and as curves."""

from collections.abc import Sequence
from os.path import commonpath
from pathlib import Path

import numpy as np

import lowprec
from lowprec import recipes
from lowprec.analysis.figures import new_figure, save_figure
from lowprec.analysis.page import Page
from lowprec.analysis.runs import Run, baseline_of, gaps
from lowprec.analysis.spikes import exponential_average
from lowprec.analysis.table import markdown_table
from lowprec.errors import UsageError
from lowprec.training.tasks import NEXT_TOKEN, SCORES, task_of

# Training losses are averaged over this part of the run to be seen as curves.
SMOOTHING = 0.02


def report_table(runs: Sequence[Run]) -> str:
    """Held-out losses, nats per token or image, at the last evaluation; the gap is that of the losses."""
    header, *rows = report_rows(runs)
    return markdown_table(header, rows, left=2)


def report_rows(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """The cells of the table, its header first."""
    scores = [name for name in SCORES if any(f"eval_{name}" in line for run in runs for line in run.evaluations)]
    columns = [(SCORES[name], f"eval_{name}") for name in scores or ["bits_per_byte"]]
    columns += [(f"{label}, full-precision forward", f"{key}_full_precision") for label, key in columns]
    labels = [label for label, _ in columns]
    header = ("run", "recipe", "steps", "loss", *labels, "gap to bf16", "SQNR dB", f"{_unit(runs)}s/s", "status")
    keys = [key for _, key in columns]
    return [header, *(_row(run, runs, keys) for run in runs)]


def _row(run: Run, runs: Sequence[Run], scores: Sequence[str]) -> tuple[str, ...]:
    summary = run.summary or {}
    last = run.evaluations[-1] if run.evaluations else {}
    baseline = baseline_of(run, runs)
    gap = gaps(run, baseline).get(last["step"]) if last and baseline is not None else None
    return (
        _name(run, runs),
        run.config.recipe if run.config else "?",
        str(run.lines[-1]["step"] if run.lines else 0),
        _number(last.get("eval_loss"), ".4f"),
        *(_number(last.get(key), ".4f") for key in scores),
        _number(gap, "+.4f"),
        _number(last.get("sqnr_db"), ".1f"),
        _number(summary.get("tokens_per_second"), ",.0f"),
        run.status,
    )


def _unit(runs: Sequence[Run]) -> str:
    """What is predicted: "image" where all runs are of images."""
    configs = [run.config for run in runs if run.config]
    units = {task_of(config.model).unit for config in configs}
    return units.pop() if len(units) == 1 else NEXT_TOKEN.unit


def _name(run: Run, runs: Sequence[Run]) -> str:
    """The path from where all of them lie."""
    if len(runs) == 1:
        return run.path.absolute().name
    return str(run.path.absolute().relative_to(commonpath([other.path.absolute() for other in runs])))


def _number(value: object, fmt: str) -> str:
    return format(value, fmt) if isinstance(value, int | float) else ""


def draw_curves(runs: Sequence[Run], output: Path) -> None:
    """Writes a PNG: training and held-out loss against tokens (or images), and the gap to bf16 where there is one."""
    figure = new_figure(12, 4.5)
    losses, gap_axes = figure.subplots(1, 2)
    for index, run in enumerate(runs):
        color, name = f"C{index % 10}", _name(run, runs)
        if not run.config:
            continue
        tokens_at = {line["step"]: line["tokens"] for line in run.lines}
        points = [(line["tokens"], line["loss"]) for line in run.lines if _is_number(line.get("loss"))]
        tokens, smooth = [x for x, _ in points], _smoothed([y for _, y in points])
        losses.plot(tokens, smooth, color=color, alpha=0.4, linewidth=1)
        held_out = [(line["tokens"], line["eval_loss"]) for line in run.evaluations]
        _plot(losses, held_out, color, name)
        baseline = baseline_of(run, runs)
        if baseline is not None and baseline is not run:
            points = [(tokens_at[step], gap) for step, gap in gaps(run, baseline).items()]
            _plot(gap_axes, points, color, name)
    unit = _unit(runs)
    losses.set(xlabel=f"{unit}s", ylabel=f"loss, nats/{unit}", title="held-out (points) and training loss")
    gap_axes.set(xlabel=f"{unit}s", ylabel=f"held-out loss - bf16, nats/{unit}", title="gap to bf16")
    gap_axes.axhline(0, color="grey", linewidth=0.8)
    for axes in (losses, gap_axes):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    save_figure(figure, output)


def write_page(runs: Sequence[Run], curves: Path) -> Path:
    """Writes the table, the curves and the recipes as a page of HTML that needs no other file.

    Args:
      runs: to report.
      curves: the PNG that `draw_curves` wrote; the page has its name but for its end.
    """
    header, *rows = report_rows(runs)
    page = Page(f"{len(runs)} run{'s' if len(runs) > 1 else ''}").table(header, rows, left=2)
    page = page.heading("Curves")
    if curves.suffix == ".png":
        page = page.picture(curves.read_bytes(), "loss against tokens, and the gap to bf16")
    page = page.heading("Recipes")
    for recipe in dict.fromkeys(run.config.recipe for run in runs if run.config):
        page = page.code(_described(recipe))
    where = commonpath([run.path.absolute() for run in runs])
    path = curves.with_suffix(".html")
    page.text(f"lowprec {lowprec.__version__}; runs in {where}", "note").write(path)
    return path


def _described(recipe: str) -> str:
    """What a recipe does; its words alone where it is of several phases."""
    try:
        return recipes.parse(recipe).describe()
    except UsageError:
        return recipe


def _plot(axes, points: Sequence[tuple[float, float]], color: str, name: str) -> None:
    axes.plot([x for x, _ in points], [y for _, y in points], "o-", color=color, markersize=3, label=name)


def default_output(runs: Sequence[Run]) -> Path:
    """report.png, beside the runs."""
    paths = [run.path.absolute() for run in runs]
    return (paths[0] if len(paths) == 1 else Path(commonpath(paths))) / "report.png"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _smoothed(values: Sequence[float]) -> np.ndarray:
    """An exponential average, unbiased at the beginning."""
    return exponential_average(values, max(0.0, 1 - 1 / max(SMOOTHING * len(values), 1)))
