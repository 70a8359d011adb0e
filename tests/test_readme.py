"""What the README says is true: its examples run, its tables are those of the registries, its commands exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs.tables import README, with_tables

TEXT = README.read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)


def test_the_tables_are_current():
    assert with_tables(TEXT) == TEXT, "run python -m docs.tables"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: text.split("\n")[-2][:30])
def test_the_examples_run(example):
    result = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr


def test_the_first_example_learns():
    result = subprocess.run([sys.executable, "-c", EXAMPLES[0]], capture_output=True, text=True, timeout=600)
    assert float(result.stdout.split()[-1]) < 0.1  # the variance of the target is 0.43


def test_the_commands_exist():
    commands = set(re.findall(r"^lowprec (\w+)", TEXT, flags=re.M))
    catalogs, sweeps = {"recipes", "formats", "optimizers"}, {"sweep", "status", "collect", "fit"}
    assert commands == {"train", "eval", "report", "bench"} | catalogs | sweeps
    for command in commands:
        subprocess.run([sys.executable, "-m", "lowprec", command, "--help"], capture_output=True, check=True)


def test_the_files_it_names_exist():
    root = Path(README).parent
    for name in re.findall(r"(?:configs|experiments|lowprec)/[\w/]+(?:\.py)?", TEXT):
        assert (root / name).exists(), name
