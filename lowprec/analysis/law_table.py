"""Tables of runs from files, and the rows and columns of them that a law is fitted to."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lowprec.errors import UsageError, unknown
from lowprec.sweeps.table_file import KINDS

Table = dict[str, np.ndarray]


def read_table(path: str | Path) -> Table:
    """The columns of a CSV or parquet file: numbers where all cells are numbers or empty (NaN), else strings.

    Raises:
      UsageError: (a ValueError) if there is no such file, it is of another kind, or it is not a table.
    """
    path = Path(path)
    if not path.is_file():
        beside = [file.name for file in sorted(path.parent.glob("*")) if file.suffix in KINDS]
        there = f"; {path.parent} has {', '.join(beside)}" if beside else ""
        raise UsageError(f"there is no table {path}{there}")
    if path.suffix not in KINDS:
        raise unknown("kind of table", path.suffix or path.name, KINDS, "by the end of the file's name")
    columns = _read_csv(path) if path.suffix == ".csv" else _read_parquet(path)
    if not columns or not len(next(iter(columns.values()))):
        raise UsageError(f"{path} has no row")
    return columns


def _read_csv(path: Path) -> Table:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} is not a CSV file: {error}") from None
    rows = [row for row in rows if row]
    if not rows:
        raise UsageError(f"{path} is empty")
    header = [name.strip() for name in rows[0]]
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise UsageError(f"{path} has two columns {twice[0]!r}")
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(header):
            raise UsageError(f"{path}, row {number}, has {len(row)} cells; the header has {len(header)}")
    return {name: _typed([row[at] for row in rows[1:]]) for at, name in enumerate(header)}


def _typed(cells: Sequence[str]) -> np.ndarray:
    try:
        return np.array([float(cell) if cell.strip() else np.nan for cell in cells])
    except ValueError:
        return np.array([cell.strip() for cell in cells])


def _read_parquet(path: Path) -> Table:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UsageError("parquet tables need pyarrow: pip install pyarrow, or use a .csv") from None
    try:
        found = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"{path} is not a parquet file: {str(error).splitlines()[0]}") from None
    columns = {}
    for name in found.column_names:
        values = found[name].to_pylist()
        labels = any(isinstance(value, str) for value in values)
        columns[name] = np.array(
            ["" if v is None else str(v) for v in values]
            if labels
            else [np.nan if v is None else float(v) for v in values]
        )
    return columns


def renamed(table: Table, names: Mapping[str, str]) -> Table:
    """The table with further columns: name of a law's column -> column of the file.

    Raises:
      UsageError: for a column that the table lacks.
    """
    for name, column in names.items():
        if column not in table:
            raise unknown("column", column, table, f"for {name}")
    return table | {name: table[column] for name, column in names.items()}


def selected(table: Table, conditions: Sequence[tuple[str, str]]) -> Table:
    """The rows that meet all conditions (column, value); of one column any of its values will do.

    Raises:
      UsageError: for a column that the table lacks, or a value that no row has.
    """
    wanted: dict[str, list[str]] = {}
    for column, value in conditions:
        if column not in table:
            raise unknown("column", column, table)
        wanted.setdefault(column, []).append(value)
    keep = np.ones(len(next(iter(table.values()))), bool)
    for column, values in wanted.items():
        keep &= np.any([_equal(table[column], column, value) for value in values], axis=0)
    if not keep.any():
        raise UsageError(f"no row has {' and '.join(f'{c} = {" or ".join(v)}' for c, v in wanted.items())}")
    return {name: values[keep] for name, values in table.items()}


def _equal(values: np.ndarray, column: str, value: str) -> np.ndarray:
    if values.dtype.kind == "U":
        if value not in values:
            raise unknown(f"{column}", value, set(values.tolist()))
        return values == value
    try:
        number = float(value)
    except ValueError:
        raise UsageError(f"column {column} holds numbers; {value!r} is none") from None
    return np.isnan(values) if np.isnan(number) else values == number


def finished(table: Table, target: str, needed: Sequence[str] = ()) -> tuple[Table, tuple[str, ...]]:
    """The rows with a result, and what was left out, in words: runs that diverged are no rows of a law.

    Args:
      table: columns; "status", where there is one, says "done".
      target: the column that is fitted.
      needed: the columns that the law reads besides.
    """
    notes, rows = [], len(next(iter(table.values())))
    keep = np.ones(rows, bool)
    if "status" in table and table["status"].dtype.kind == "U":
        ended = table["status"]
        for status in sorted(set(ended.tolist()) - {"done", ""}):
            notes.append(f"{_runs(int((ended == status).sum()))} {status}: left out")
        keep &= np.isin(ended, ("done", ""))
    if target in table and table[target].dtype.kind == "f":
        lost = keep & ~np.isfinite(table[target])
        if lost.any():
            notes.append(f"{_runs(int(lost.sum()))} without a finite {target}: left out")
        keep &= ~lost
    for name in needed:
        if name in table and table[name].dtype.kind == "f":
            lost = keep & ~np.isfinite(table[name])
            if lost.any():
                notes.append(f"{_runs(int(lost.sum()))} without {name}: left out")
            keep &= ~lost
    if not keep.any():
        raise UsageError(f"no run of {rows} has all that is needed ({'; '.join(notes)})")
    return {name: values[keep] for name, values in table.items()}, tuple(notes)


def _runs(count: int) -> str:
    return f"{count} run{'s' if count != 1 else ''}"
