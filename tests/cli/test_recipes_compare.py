"""`lowprec recipes compare`: recipes side by side, a row an operand."""

import re

import pytest

from lowprec.quantizers import OPERANDS


def marks(table):
    """The mark of each row that begins one."""
    return {match[2]: match[1] for match in re.finditer(r"^([≠ ]) (\S+)", table, flags=re.M)}


def test_shows_the_six_operands_and_marks_those_that_differ(lowprec):
    status, output, errors = lowprec("recipes", "compare", "nvfp4", "quartet2")
    assert status == 0 and errors == ""
    assert output.split()[:2] == ["nvfp4", "quartet2"]
    # Of all six, the format is the same or not, but scale, rotation or source differ; the layers left out do not.
    assert {name: marks(output)[name] for name in OPERANDS} == dict.fromkeys(OPERANDS, "≠")
    assert marks(output)["not"] == " "


def test_what_is_the_same_bears_no_mark(lowprec):
    _, output, _ = lowprec("recipes", "compare", "fp8", "fp8_delayed")
    found = marks(output)
    # Both reuse the codes of the forward pass; only what has a scale of its own differs.
    assert [found[name] for name in OPERANDS] == ["≠", "≠", "≠", " ", " ", " "]


def test_a_recipe_does_not_differ_from_itself(lowprec):
    status, output, _ = lowprec("recipes", "compare", "mxfp8", "mxfp8")
    assert status == 0 and "≠" not in output


def test_sums_and_saved_inputs_are_compared_too(lowprec):
    _, output, _ = lowprec("recipes", "compare", "fp8_block", "fp8_tensor_core")
    assert marks(output)["sums"] == "≠" and "never promoted" in output
    _, output, _ = lowprec("recipes", "compare", "fp8", "coat")
    assert marks(output)["saved"] == "≠" and marks(output)["fwd.x"] == " "


def test_more_than_two_and_short_forms(lowprec):
    status, output, _ = lowprec("recipes", "compare", "bf16", "int8", "fwd=int8_symmetric@row")
    assert status == 0
    row = next(line for line in output.splitlines() if "fwd.x" in line)
    assert row.split() == ["≠", "fwd.x", "bfloat16", "int8_symmetric@row", "int8_symmetric@row"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["nvfp4", "quartett2"], "unknown recipe 'quartett2'; did you mean quartet2"),
        (["nvfp5", "quartet2"], "unknown recipe 'nvfp5'; did you mean nvfp4"),
        (["nvfp4"], "two recipes or more"),
        ([], "two recipes or more"),
    ],
)
def test_says_what_would_be_valid(lowprec, names, message):
    status, output, errors = lowprec("recipes", "compare", *names)
    assert status == 2 and output == ""
    assert errors.startswith("lowprec: ") and message in errors
