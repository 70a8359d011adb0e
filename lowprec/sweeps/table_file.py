"""Tables as files: CSV and parquet that are equal byte for byte where the runs are."""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowprec.errors import UsageError, unknown
from lowprec.training.run_directory import written_whole

KINDS = (".csv", ".parquet")


def check_output(path: str | os.PathLike[str]) -> None:
    """Refuses what cannot be written, before any work is done.

    Raises:
      UsageError: (a ValueError) neither CSV nor parquet; parquet without pyarrow.
    """
    suffix = Path(path).suffix
    if suffix not in KINDS:
        raise unknown("kind of table", suffix or str(path), KINDS, "by the end of the file's name")
    if suffix == ".parquet":
        _pyarrow()


def write_table(path: str | os.PathLike[str], columns: Mapping[str, Sequence[Any]]) -> None:
    """Writes the file whole: readers see the old or the new one. Floats are written so that they read back the same.

    Args:
      path: ends in .csv or .parquet; its directory is made.
      columns: of equal length, of ints, floats, bools or strings; None: empty.
    """
    check_output(path)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    typed = {name: _of_one_type(values) for name, values in columns.items()}
    with written_whole(path) as temporary:
        (_write_parquet if path.suffix == ".parquet" else _write_csv)(temporary, typed)


def _of_one_type(values: Sequence[Any]) -> list[Any]:
    """Floats where there is one among the numbers; strings where there is one at all."""
    kinds = {type(value) for value in values if value is not None}
    kind = kinds.pop() if len(kinds) == 1 else float if kinds == {int, float} else str
    return [None if value is None else kind(value) for value in values]


def _write_csv(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_text(value) for value in row] for row in zip(*columns.values(), strict=True))


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, float) else str(value)


def _write_parquet(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    pyarrow, parquet = _pyarrow()
    arrays = {}
    for name, values in columns.items():
        # An empty column would have no type, and readers that join tables would stumble over it.
        empty = all(value is None for value in values)
        arrays[name] = pyarrow.array(values, pyarrow.float64() if empty else None)
    parquet.write_table(pyarrow.table(arrays), path)


def _pyarrow() -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UsageError(
            "parquet tables need pyarrow: pip install pyarrow, or write a .csv, which any reader takes"
        ) from None
    return pyarrow, parquet
