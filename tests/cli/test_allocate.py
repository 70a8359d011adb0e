"""`lowprec allocate` on a small run: a table, and a recipe that the other commands take."""

import json
import re

import pytest

from lowprec import recipes
from lowprec.training import train


@pytest.fixture(scope="module")
def text(trained):
    from lowprec.analysis.allocate_run import allocate_run

    return allocate_run(trained / "int4", formats=("int2@row", "int8@row"), bits=7.0, samples=4, batches=1)


def test_the_table_and_the_recipe_say_the_same(text, cells):
    rows, recipe = cells(text), recipes.parse(text.splitlines()[-1])
    assert [row["layer"] for row in rows] == [
        *(f"layers/0/attention/{name}" for name in ("key", "out", "query", "value")),
        *(f"layers/0/mlp/{name}" for name in ("down", "gate", "up")),
    ]
    assert {row["choice"] for row in rows} == {"int2@row", "int8@row"}
    for row in rows:
        chosen = recipes.parse(f"fwd=exact,{row['choice']} dgrad=exact,reuse")
        assert recipe.rule_for(row["layer"]) == chosen.rule_for(row["layer"])
        assert float(row["int8@row"]) <= float(row["int2@row"])


def test_the_sizes_are_within_the_budget_and_between_the_extremes(text):
    lines = {line.partition(":")[0]: line for line in text.splitlines() if "bits a weight" in line}
    bits = lambda line: float(line.partition(" bits a weight")[0].split()[-1])
    (chosen,) = (bits(line) for name, line in lines.items() if "everywhere" not in name)
    low, high = bits(lines["int2@row everywhere"]), bits(lines["int8@row everywhere"])
    # Rows of 16 or 48 weights and a float32 scale each.
    assert 2 + 32 / 48 < low < 2 + 32 / 16 and high == pytest.approx(low + 6, abs=2e-3)
    assert low < chosen <= 7


@pytest.mark.slow
def test_a_run_trains_with_the_recipe_that_was_found(text, trained, tmp_path):
    recipe = text.splitlines()[-1]
    config = json.loads((trained / "int4/config.json").read_text())
    config["recipe"] = recipe
    config["train"]["steps"] = 2
    assert train(config, tmp_path / "run")["status"] == "done"
    assert json.loads((tmp_path / "run/config.json").read_text())["recipe"] == recipe


def test_the_flat_layers_are_those_with_a_trace_below_the_mean(text, cells):
    line = next(line for line in text.splitlines() if line.startswith("trace below the mean"))
    pattern = line.rpartition(": ")[2]
    traces = {row["layer"]: float(row["trace ± std. error"].partition(" ")[0]) for row in cells(text)}
    mean = sum(traces.values()) / len(traces)
    assert {layer for layer in traces if re.fullmatch(pattern, layer)} == {
        layer for layer, value in traces.items() if value < mean
    }


def increase_of(text):
    """(loss, bound, loss with plain weights)"""
    line = next(line for line in text.splitlines() if line.startswith("loss "))
    return tuple(float(number) for number in re.findall(r"\d+\.\d+", line))


@pytest.mark.slow
@pytest.mark.parametrize("order", ["cost", "interactions"])
def test_a_bound_of_the_loss(lowprec, trained, cells, order):
    """By hand: within the bound, and one layer more down the order is beyond it; no bound at all lowers all layers."""
    arguments = ("allocate", trained / "bf16", "--formats=int2@row,int8@row", "--measure=eigenvalue", "--samples=4")
    status, everything, _ = lowprec(*arguments, "--batches=1", f"--order={order}", "--increase=1000")
    assert status == 0 and {row["choice"] for row in cells(everything)} == {"int2@row"}
    worst, _, plain = increase_of(everything)
    assert worst > plain
    status, half, _ = lowprec(*arguments, "--batches=1", f"--order={order}", f"--increase={(worst - plain) / 2}")
    loss, bound, _ = increase_of(half)
    assert status == 0 and loss <= bound < worst
    rows = cells(half)
    assert {row["choice"] for row in rows} == {"int2@row", "int8@row"}
    if order == "cost":
        change = lambda row: float(row["int2@row"]) - float(row["int8@row"])
        lowered = [change(row) for row in rows if row["choice"] == "int2@row"]
        assert max(lowered) <= min(change(row) for row in rows if row["choice"] == "int8@row")
    recipe = recipes.parse(half.splitlines()[-1])
    for row in rows:
        assert str(recipe.rule_for(row["layer"]).fwd[1].format) == row["choice"]


@pytest.mark.slow
def test_the_command(lowprec, trained):
    status, output, _ = lowprec(
        "allocate", trained / "bf16", "--formats=int4@row,nvfp4", "--bits=6", "--measure=fisher", "--solver=greedy",
        "--batches=1", "--rule=fwd={}",
    )  # fmt: skip
    assert status == 0
    recipe = recipes.parse(output.splitlines()[-1])
    assert not recipe.rule_for("layers/0/mlp/up").fwd[0].exact
    assert "trace" not in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--formats=int4@row", "--bits=5"], "two formats or more"),
        (["--formats=int4@row,int8@rwo", "--bits=5"], "int8@r"),
        (["--formats=int4@row,int8@row", "--bits=5", "--solver=mlp"], "unknown solver 'mlp'; did you mean milp"),
        (["--formats=int4@row,int8@row", "--bits=5", "--measure=hesse"], "did you mean hessian"),
        (["--formats=int4@row,int8@row", "--bits=5", "--increase=1"], "not allowed with"),
        (["--formats=int4@row,int8@row"], "one of the arguments --bits --increase is required"),
        (["--formats=int2@row,int4@row,int8@row", "--increase=1"], "chooses between two formats, not 3"),
        (["--formats=int4@row,int8@row", "--increase=1", "--solver=milp"], "is for a budget of bits"),
        (["--formats=int4@row,int8@row", "--bits=5", "--order=cost"], "is for a bound of the loss"),
        (["--formats=int4@row,int8@row", "--increase=1", "--order=costs"], "unknown order of layers 'costs'"),
        (["--formats=int2@row,int4@row", "--increase=-1", "--samples=2", "--measure=fisher"], "above the bound"),
        (["--formats=int4@row,int8@row", "--bits=2", "--measure=fisher"], "no choice of formats fits"),
    ],
)
def test_what_it_refuses(lowprec, trained, options, message):
    status, _, errors = lowprec("allocate", trained / "bf16", *options, "--batches=1")
    assert status == 2 and message in errors
