"""Runs as their directories tell of them, whole or not."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowprec.errors import UsageError
from lowprec.training.config import RunConfig
from lowprec.training.metrics import read_lines
from lowprec.training.run_directory import RunDirectory, read_json


@dataclass(frozen=True, eq=False)
class Run:
    """What could be read.

    Attributes:
      config: None where the directory is broken.
      summary: None where the run has not ended, or was killed.
      lines: of metrics.jsonl.
      problem: what is wrong with the directory; "" if nothing is.
    """

    path: Path
    config: RunConfig | None
    summary: dict[str, Any] | None
    lines: list[dict[str, Any]]
    problem: str = ""

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if isinstance(line.get("eval_loss"), int | float)]

    @property
    def status(self) -> str:
        if self.problem:
            return f"broken: {self.problem}"
        step = self.lines[-1]["step"] if self.lines else 0
        steps = self.config.train.steps if self.config else 0
        if self.summary is None:
            return f"unfinished: step {step} of {steps}"
        status = str(self.summary.get("status"))
        if status == "diverged":
            return f"diverged after step {self.summary.get('step')}"
        return status if status == "done" else f"{status}: step {self.summary.get('step')} of {steps}"


def find_runs(directories: Iterable[str | Path]) -> list[Run]:
    """The runs in these directories and, where one is not a run itself, right below it.

    Raises:
      UsageError: (a ValueError) if a directory does not exist, or there is nothing at all to report.
    """
    runs = []
    for directory in map(Path, directories):
        if not directory.is_dir():
            raise UsageError(f"there is no directory {directory}")
        below = [] if _is_run(directory) else sorted(path for path in directory.iterdir() if _is_run(path))
        runs += [read_run(path) for path in below or [directory]]
    if not runs:
        raise UsageError("no run directory was given")
    return runs


def read_run(path: Path) -> Run:
    """Reads what can be read."""
    directory = RunDirectory(path)
    lines = read_lines(directory.metrics)
    try:
        config = directory.read_config()
        summary = read_json(directory.summary)
    except UsageError as error:
        return Run(path, None, None, lines, str(error))
    if config is None:
        return Run(path, None, summary, lines, "no config.json")
    return Run(path, config, summary, lines)


def baseline_of(run: Run, runs: Sequence[Run], recipe: str = "bf16") -> Run | None:
    """The run that differs from this one in nothing but its recipe."""
    if run.config is None:
        return None
    others = [other for other in runs if other.config is not None and other.config.recipe == recipe]
    return next((other for other in others if _all_but_recipe(other) == _all_but_recipe(run)), None)


def gaps(run: Run, baseline: Run) -> dict[int, float]:
    """Step -> held-out loss minus the baseline's at the same step, nats per token."""
    reference = {line["step"]: line["eval_loss"] for line in baseline.evaluations}
    return {
        line["step"]: line["eval_loss"] - reference[line["step"]]
        for line in run.evaluations
        if line["step"] in reference
    }


def _all_but_recipe(run: Run) -> dict[str, Any]:
    assert run.config is not None
    return {key: value for key, value in run.config.semantic().items() if key != "recipe"}


def _is_run(path: Path) -> bool:
    directory = RunDirectory(path)
    return any(file.exists() for file in (directory.config, directory.metrics, directory.summary))
