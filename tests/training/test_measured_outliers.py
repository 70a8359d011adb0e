"""Outliers at the evaluations of a run: in its metrics, and without a trace in what it trains."""

import pytest

from lowprec import training
from lowprec.models import IMAGE_MODELS
from lowprec.training.metrics import read_lines
from lowprec.training.program import Program
from lowprec.training.standalone_evaluation import evaluate_run

SOFTPICK = {"model.attention": "softpick", "recipe": "f32"}


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """(summary, lines, directory) of a run that measures, or not."""

    def make(measured: bool):
        workdir = tmp_path_factory.mktemp("run")
        changes = {"train.steps": 3, "eval.every": 2, "eval.outliers": measured}
        summary = training.train(tiny({**SOFTPICK, **changes}), workdir)
        return summary, read_lines(workdir / "metrics.jsonl"), workdir

    return make


@pytest.mark.slow
def test_measuring_changes_nothing_else(run):
    (with_them, lines, _), (without, plain_lines, workdir) = run(True), run(False)
    assert with_them["state_sha256"] == without["state_sha256"]
    assert with_them["config_hash"] == without["config_hash"]
    assert [line["step"] for line in lines if "outliers" in line] == [2, 3]
    assert not any("outliers" in line for line in plain_lines)
    assert [line["eval_loss"] for line in lines[1:]] == [line["eval_loss"] for line in plain_lines[1:]]
    found = lines[-1]["outliers"]
    assert set(found["layers"]) == {"layers/0", "layers/0/attention"}
    assert found["mean"]["residual_kurtosis"] == found["layers"]["layers/0"]["residual_kurtosis"]
    assert 0 < found["mean"]["sparsity"] < 1  # softpick: negative scores have no weight
    assert with_them["outliers"] == {"mean": found["mean"], "max": found["max"]} and without["outliers"] == {}
    # `lowprec eval` measures the same of any run.
    words = {line.split()[0]: line.split()[1:] for line in evaluate_run(workdir).splitlines() if line}
    for name, mean in found["mean"].items():
        assert [float(word) for word in words[name]] == pytest.approx([mean, found["max"][name]], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "numbers"),
    [("resnet", {"residual"}), ("vit", {"residual", "attention"}), ("unit_llama", {"residual", "attention"})],
)
def test_every_model_is_measured(name, numbers, tiny):
    changes = {"data.name": "digits"} if name in IMAGE_MODELS else {}
    if changes:
        pytest.importorskip("sklearn")
    program = Program(tiny({"model.name": name, "recipe": "f32", **changes}))
    found = program.measure_outliers(program.initial_state().variables).by_number()
    assert set(found) == {f"{of}_{number}" for of in numbers for number in ("kurtosis", "infinity_norm")}
    assert all(value > 0 for values in found.values() for value in values)


def test_rows_that_fill_up_a_batch_are_not_measured(tiny):
    program = Program(tiny({"recipe": "f32"}))
    variables = program.initial_state().variables
    batch = program.eval_batches[0]
    batch["tokens"][1:], batch["weight"][1:] = 0, 0
    found = program.measure_outliers(variables).layers
    batch["tokens"][1:] = batch["tokens"][0]
    batch["weight"][:] = 1
    assert found == program.measure_outliers(variables).layers
