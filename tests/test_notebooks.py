"""Notebooks are percent scripts: they run to the end without a display, and write only where they are told."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))


def cells(notebook):
    """(kind, source) of each cell: "markdown" or "code"."""
    parts = re.split(r"^# %%(.*)$", notebook.read_text(), flags=re.M)
    assert "format_name: percent" in parts[0]
    marked = zip(parts[1::2], parts[2::2], strict=True)
    return [("markdown" if "[markdown]" in mark else "code", body) for mark, body in marked]


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_cells_are_prose_and_code(notebook):
    kinds = {kind for kind, _ in cells(notebook)}
    assert kinds == {"markdown", "code"}
    for kind, body in cells(notebook):
        lines = body.strip().splitlines()
        assert lines
        if kind == "markdown":
            assert all(line.startswith("#") for line in lines)
        else:
            ast.parse(body)


@pytest.mark.slow  # half a minute, most of it XLA's compilation
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_writes_its_figures_where_it_is_told(notebook, tmp_path):
    work, figures = tmp_path / "work", tmp_path / "figures"
    work.mkdir()
    environment = os.environ | {"MPLBACKEND": "Agg", "LOWPREC_FIGURES": str(figures), "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, str(notebook)], cwd=work, env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    assert not list(work.iterdir())
    drawn = re.findall(r"^figure: (.*)$", result.stdout, flags=re.M)
    assert drawn and {Path(name) for name in drawn} == set(figures.iterdir())
