"""Runs cases one after another; what is measured is on the disk at once, and what fails is a record like any other."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lowprec.analysis.bench.case import FAILED, MEASURED, Case, Conditions, Record
from lowprec.errors import UsageError
from lowprec.training.run_directory import read_json, write_json

# Of an error's text in a record.
_LINES, _CHARACTERS = 12, 1500


class Results:
    """Records by the names of their cases, kept in a JSON file.

    Args:
      path: of the file; None: they are kept in memory alone. What lies there is gone on with: its cases are not run
        again.
      machine: what `machine.describe` says of this one; None: whatever the file says.
    Raises:
      UsageError: (a ValueError) if the file holds what another device measured.
    """

    def __init__(self, path: Path | None, machine: Record | None = None):
        found = (read_json(path) if path else None) or {}
        before = found.get("machine", {}).get("device")
        if machine is not None and before not in (None, machine.get("device")):
            raise UsageError(f"{path} holds results of {before}, not of {machine.get('device')}; choose another file")
        self.path = path
        self.machine: Record = found.get("machine") or machine or {}
        self.records: dict[str, Record] = found.get("cases", {})
        self.running: str | None = found.get("running")
        self.notes: list[str] = found.get("notes", [])

    def start(self, name: str) -> None:
        """Says on the disk that a case is running, for who watches this process."""
        self.running = name
        self.write()

    def add(self, name: str, record: Record) -> None:
        """Keeps the record of a case."""
        self.records[name], self.running = record, None
        self.write()

    def lose(self, reason: str | None) -> None:
        """The process that ran a case is gone: for a reason of the case's, which has failed, or None: for another."""
        if self.running and reason:
            self.add(self.running, failure(reason))
        self.running = None
        self.write()

    def note(self, text: str) -> None:
        """Keeps a remark on the whole, once."""
        if text not in self.notes:
            self.notes.append(text)
            self.write()

    def forget(self, statuses: Iterable[str]) -> None:
        """Leaves out the records with such a status, so that their cases are run again."""
        dropped = set(statuses)
        self.records = {name: each for name, each in self.records.items() if each["status"] not in dropped}

    def measured(self, name: str, value: str) -> float | None:
        """A number of a case; None unless it was measured."""
        record = self.records.get(name, {})
        return record.get(value) if record.get("status") == MEASURED else None

    def write(self) -> None:
        """To the file, whole."""
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """As the file has them."""
        return {"machine": self.machine, "notes": self.notes, "running": self.running, "cases": self.records}


def run_cases(
    cases: Iterable[Case],
    results: Results,
    conditions: Conditions,
    *,
    deadline: float = float("inf"),
    report: Callable[[str, Record], None] = lambda name, record: None,
    healthy: Callable[[], bool] = lambda: True,
) -> list[str]:
    """Runs those without a record.

    Args:
      deadline: on `time.monotonic`'s clock, after which no case is started.
      report: is told of each record.
      healthy: asked after a failure: whether the device still computes. If it does not, this process is of no more use.
    Returns:
      The names of cases that were not started.
    """
    left = [case for case in cases if case.name not in results.records]
    while left and time.monotonic() < deadline:
        case = left.pop(0)
        results.start(case.name)
        record = _run(case, conditions)
        results.add(case.name, record)
        report(case.name, record)
        if record["status"] == FAILED and not healthy():
            break
    return [case.name for case in left]


def _run(case, conditions):
    start = time.monotonic()
    try:
        record = case.run(conditions)
    except Exception as error:  # a case that fails is a record, not the end of the others
        record = failure(f"{type(error).__name__}: {error}")
    return record | {"seconds": time.monotonic() - start}


def failure(text: str) -> Record:
    """The record of a case that was not run to its end."""
    lines = text.strip().splitlines()[:_LINES]
    return {"status": FAILED, "error": "\n".join(lines)[:_CHARACTERS]}
