"""metrics.jsonl: one object a line, one line a step, and never a step twice; TensorBoard events on request."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from lowprec.errors import UsageError
from lowprec.training.run_directory import finite_or_null

# Clock readings: all else is the same in a run that was resumed.
TIMINGS = ("tokens_per_second", "seconds")
# Enough to read, little enough that a line with numbers of every layer stays short.
DIGITS = 5


def short(value: float) -> float | None:
    """A measurement to `DIGITS` digits; null where it is infinite or undefined."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


class MetricsWriter(Protocol):
    """Takes one line after the other, in the order of their steps."""

    def write(self, line: dict[str, Any]) -> None:
        """Adds a line; its "step" is greater than that of the line before."""

    def flush(self) -> None:
        """Returns when what was written will survive the end of this process."""

    def close(self) -> None: ...


class JsonLines:
    """Appends to a file. What is not finite is written as null: other programs read these files.

    Args:
      path: of the file; lines of steps after `last_step`, and what is left of a half-written one, are cut off.
      last_step: up to where a resumed run keeps what is there.
    """

    def __init__(self, path: Path, last_step: int):
        cut_after(path, last_step)
        # Unbuffered: readers see each line at once, a killed process loses none, and nothing is left to be written
        # when the disk turns out to be full.
        self._file = path.open("ab", buffering=0)

    def write(self, line: dict[str, Any]) -> None:
        rest = json.dumps(finite_or_null(line)).encode() + b"\n"
        while rest:
            rest = rest[self._file.write(rest) :]

    def flush(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Scalars as TensorBoard events; nested numbers are joined by slashes.

    Raises:
      UsageError: if tensorboardX is not installed.
    """

    def __init__(self, directory: Path, last_step: int):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise UsageError(
                "log.tensorboard needs tensorboardX: pip install 'lowprec[tensorboard]', or leave log.tensorboard off"
            ) from None
        self._writer = SummaryWriter(str(directory), purge_step=last_step + 1)

    def write(self, line: dict[str, Any]) -> None:
        for name, value in _scalars(line):
            if name != "step":
                self._writer.add_scalar(name, value, line["step"])

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Writers:
    """Several writers as one."""

    def __init__(self, *writers: MetricsWriter):
        self._writers = writers

    def write(self, line: dict[str, Any]) -> None:
        for writer in self._writers:
            writer.write(line)

    def flush(self) -> None:
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl up to the first that is not whole; none if there is no such file."""
    return [line for line, _ in _whole_lines(path)]


def cut_after(path: Path, last_step: int) -> None:
    """Shortens the file to its lines of steps up to last_step. Nothing is rewritten, so that nothing can get lost."""
    end = 0
    for line, stop in _whole_lines(path):
        if line["step"] > last_step:
            break
        end = stop
    if path.exists() and path.stat().st_size > end:
        os.truncate(path, end)


def _whole_lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """(line, offset after it)."""
    if not path.exists():
        return
    end = 0
    with path.open("rb") as file:
        for raw in file:
            try:
                line = json.loads(raw)
            except ValueError:
                return
            if not raw.endswith(b"\n") or not isinstance(line, dict) or not isinstance(line.get("step"), int):
                return
            end += len(raw)
            yield line, end


def _scalars(line: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in line.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{key}", value
