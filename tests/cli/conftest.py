"""The command line in this process, and one small trained run to report on."""

import re

import pytest

from lowprec.cli import main
from lowprec.training import train

CONFIG = {
    "data.name": "markov_text/size16384", "data.seq_len": 16, "model.layers": 1, "model.width": 16, "model.heads": 1,
    "train.steps": 6, "train.batch_size": 4, "eval.every": 3, "eval.batches": 2, "checkpoint.every": 3,
}  # fmt: skip


@pytest.fixture
def lowprec(capsys):
    """lowprec(*arguments) -> (exit status, standard output, standard error); never a traceback."""

    def run(*arguments):
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return status, captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory, data_dir):
    """A directory with two finished runs that differ in their recipe alone: bf16 and int4."""
    directory = tmp_path_factory.mktemp("runs")
    for name, recipe in (("bf16", "bf16"), ("int4", "fwd=int4@row")):
        changes = {"data.data_dir": data_dir, "recipe": recipe, "eval.health": name == "int4"}
        train({**CONFIG, **changes}, directory / name)
    return directory


@pytest.fixture(scope="session")
def cells():
    """cells(table) -> its rows as dicts by the header."""

    def parse(text):
        rows = [re.split(r"\s*\|\s*", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
        return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]

    return parse
