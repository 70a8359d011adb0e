"""Which formats train as robustly as bf16, over learning rates and seeds? What the runs of sweep.py say.

    python -m experiments.stability_tiny.study [--store=runs/stability_tiny]

With a store, whose sweep has come to its end, results.jsonl is made from its runs. Prints the tables of what it holds,
and draws figure.png.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.paired import command_line, records
from experiments.stability_tiny.sweep import BEST, FACTORS, FORMATS, SEEDS

RATES = tuple(BEST * factor for factor in FACTORS)
WINDOW = 20  # of spikes
EPSILON = "0.01"  # of the sharpness in the logits
CURVATURES = ("largest", "of_adam_limit", "sam")


def record_of(run: Any) -> dict[str, Any]:
    """What one run says of stability."""
    import numpy as np

    from lowprec.analysis.spikes import spike_count, spike_rate, spikes
    from lowprec.analysis.stability_table import trials_of_runs

    (trial,) = trials_of_runs([run])
    losses, norms = (
        np.array([np.nan if line[name] is None else line[name] for line in run.lines]) for name in ("loss", "grad_norm")
    )
    sharpness = run.summary.get("logit_sharpness") or {}
    return {
        "format": next(name for name, recipe in FORMATS.items() if recipe == trial.format),
        "lr": trial.lr,
        "seed": trial.seed,
        "eval_loss": _short(trial.loss),
        "start": _short(trial.start),
        "finite": trial.finite,
        "never_below_start": trial.never_below_start,
        "spikes": spike_count(spikes(losses, WINDOW)),
        "grad_norm_spike_rate": _short(spike_rate(norms, WINDOW)),
        "sharpness": {name: sharpness.get(name, {}).get(EPSILON) for name in ("last", "all")},
    }


def records_of(store: Path) -> list[dict[str, Any]]:
    """Of all runs; those of seed 0 that came to their end with the curvature there, on 32 held-out windows."""
    from lowprec.analysis.runs import find_runs

    runs = [run for run in find_runs([store]) if run.summary is not None]
    found = {run.path: record_of(run) for run in runs}
    for name in FORMATS:
        paths = [path for path, of in found.items() if of["format"] == name and of["seed"] == 0 and of["finite"]]
        for path, measured in zip(paths, _curvatures(paths), strict=True):
            found[path] |= measured
    rank = {name: index for index, name in enumerate(FORMATS)}
    return sorted(found.values(), key=lambda of: (rank[of["format"]], of["lr"], of["seed"]))


def _curvatures(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Of runs that differ in nothing but their rate: λ_max, Adam's over its limit, and SAM's sharpness at the end."""
    import jax
    import numpy as np

    from lowprec.analysis.run_curvature import CurvatureMeter
    from lowprec.training.standalone_evaluation import open_run

    measured, meter = [], None
    for path in paths:
        program, checkpoint, _ = open_run(path)
        meter = meter or CurvatureMeter(program, iterations=100)
        batches = map(program.task.examples, program.eval_batches[:4])
        examples = jax.tree.map(lambda *rows: np.concatenate(rows), *batches)
        last_rate = float(program.update.schedule(checkpoint.state.step - 1))
        of_losses = meter(checkpoint.state, examples, lr=last_rate)
        measured.append(
            {f"{number}_{loss}": _short(getattr(of, number)) for loss, of in of_losses.items() for number in CURVATURES}
        )
    return measured


def _short(value: float | None) -> float | None:
    return None if value is None else round(float(value), 5)


def grid_of(path: Path) -> Any:
    """The records as a grid."""
    from lowprec.analysis.stability_table import Grid, trials

    found = records(path)
    names = ("format", "lr", "seed", "start", "finite", "never_below_start", "spikes")
    columns = {name: [record[name] for record in found] for name in names}
    return Grid.of(trials(columns | {"loss": [record["eval_loss"] for record in found]}))


def expected() -> set[tuple[str, float, int]]:
    """All runs: format, rate, seed."""
    return {(name, rate, seed) for name in FORMATS for rate in RATES for seed in range(SEEDS)}


def is_complete(path: Path) -> bool:
    """Whether all of them are there."""
    return {(record["format"], record["lr"], record["seed"]) for record in records(path)} >= expected()


def report(path: Path) -> str:
    """The tables of `analysis.stability_report`, what else was measured, and what is not run yet."""
    from lowprec.analysis.stability_report import stability_report

    there, whole = len(records(path)), len(expected())
    waiting = [] if is_complete(path) else [f"Not run yet: {whole - there} of {whole} runs."]
    return "\n\n".join([stability_report(grid_of(path)), *_measures(path), *waiting])


def _measures(path: Path) -> list[str]:
    """Adam's preconditioned sharpness over its limit and λ_max, of both losses, and spikes of gradients."""
    return [
        "Adam's preconditioned sharpness at the end over its limit at the last rate, quantized loss / full precision, "
        "seed 0:",
        _medians(path, "of_adam_limit_quantized", "of_adam_limit_full_precision"),
        "λ_max there, in the same order:",
        _medians(path, "largest_quantized", "largest_full_precision"),
        "Share of the steps in which the gradient norm spikes, median over the seeds:",
        _medians(path, "grad_norm_spike_rate"),
    ]


def _medians(path: Path, *columns: str) -> str:
    from statistics import median

    from lowprec.analysis.table import markdown_table

    found = records(path)

    def cell(name, rate):
        of_cell = [record for record in found if (record["format"], record["lr"]) == (name, rate)]
        known = [[record[column] for record in of_cell if record.get(column) is not None] for column in columns]
        return " / ".join(f"{median(values):.3g}" if values else "-" for values in known)

    rows = [(name, *(cell(name, rate) for rate in RATES)) for name in FORMATS]
    return markdown_table(("", *(f"lr {rate:g}" for rate in RATES)), rows)


def main(argv: Sequence[str] | None = None) -> int:
    from lowprec.analysis.stability_plots import draw_stability

    arguments = command_line("stability_tiny", __doc__, argv, jobs=False, store=True)
    if arguments.store:
        lines = (json.dumps(record) + "\n" for record in records_of(arguments.store))
        arguments.results.write_text("".join(lines))
    print(f"\n{report(arguments.results)}")
    draw_stability(grid_of(arguments.results), arguments.figure)
    print(f"\nfigure: {arguments.figure}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
