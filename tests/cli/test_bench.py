"""`lowprec bench`: what this machine measures, by name, and its tables."""

import json

import pytest

from lowprec.analysis.bench import catalog
from lowprec.pallas.target import target


def test_lists_what_it_measures(lowprec):
    status, output, _ = lowprec("bench", "--list")
    assert status == 0 and output.splitlines() == list(catalog.cases_of(target()))
    assert {"recipes/nvfp4", "recipes/fp8_e4m3fn_e5m2_stochastic", "optimizers/adam4/fused"} <= set(output.split())


def test_prints_ratios_and_goes_on_with_a_file(lowprec, cells, tmp_path):
    file = tmp_path / "results.json"
    status, output, errors = lowprec("bench", "--only=recipes/int8", "--seconds=0", f"--json={file}")
    (row,) = cells(output)
    assert status == 0 and row["recipes"] == "int8" and float(row["cpu"]) > 0 and float(row["memory"]) > 0
    assert errors.startswith("recipes/int8: ")
    found = json.loads(file.read_text())
    assert found["machine"]["platform"] == "cpu" and found["machine"]["versions"]["jax"]
    assert found["cases"]["recipes/int8"]["steps"] == 10  # at least, however long they take
    status, again, errors = lowprec("bench", "--only=recipes/int8", "--seconds=0", f"--json={file}")
    assert (status, again, errors) == (0, output, "")  # nothing is measured twice


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only=recipes/nvfp5"], "unknown benchmark 'recipes/nvfp5'; did you mean recipes/nvfp4"),
        (["--only=optimizers/adam8,optimisers"], "unknown benchmark 'optimisers'; did you mean optimizers"),
        (["--only=,"], "names no benchmark"),
        (["--seconds=-1"], "seconds is at least 0, not -1.0"),
        (["recipes"], "unknown argument 'recipes'"),
    ],
)
def test_says_what_would_be_valid(lowprec, arguments, message):
    status, output, errors = lowprec("bench", *arguments)
    assert status == 2 and output == ""
    assert errors.startswith("lowprec: ") and message in errors


def test_results_of_another_device_are_not_mixed_in(lowprec, tmp_path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"machine": {"device": "NVIDIA H200"}, "cases": {}}))
    status, _, errors = lowprec("bench", "--only=recipes/int8", f"--json={file}")
    assert status == 2 and "results of NVIDIA H200, not of cpu" in errors
