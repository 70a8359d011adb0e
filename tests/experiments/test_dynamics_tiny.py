"""The study of methods that change over time: its variants, its measures, and that its README tells the records."""

import json
from pathlib import Path

import pytest

from experiments.dynamics_tiny import study
from experiments.paired import numbers, train_missing
from lowprec import recipes

HERE = Path(study.__file__).parent
RESULTS = HERE / "results.jsonl"


def test_every_variant_is_a_schedule_for_its_model_and_every_claim_is_of_variants():
    for variant in study.VARIANTS.values():
        stages = recipes.parse_schedule(variant.recipe).stages(study.STEPS, study.CONFIG["model.layers"])
        assert stages[0].start == 0 and variant.baseline in study.VARIANTS
    assert {label for *_, more, less in study.CLAIMS for label in (more, less)} <= set(study.VARIANTS)


def test_the_switch_is_where_the_study_looks_for_a_spike():
    stages = recipes.parse_schedule(study.VARIANTS["switch, ramp"].recipe).stages(study.STEPS, 2)
    assert [stage.start for stage in stages] == [0, study.SWITCH, study.SWITCH + study.RAMP]


def test_a_spike_is_the_largest_excess_over_bf16_in_its_window(tmp_path):
    """Before the window 9, in it .25, after it 9."""
    path, end = tmp_path / "results.jsonl", study.SWITCH + study.RAMP + 10
    bumps = {study.SWITCH - 1: 9.0, study.SWITCH: 0.125, end - 1: 0.25, end: 9.0}
    losses = [2.0 + bumps.get(step, 0.0) for step in range(study.STEPS)]
    with path.open("w") as file:
        for label in ("bf16", *study.SWITCHES):
            record = {"variant": label, "seed": 0, "eval_loss": 2.0}
            record["train_loss"] = [2.0] * study.STEPS if label == "bf16" else losses
            file.write(json.dumps(record) + "\n")
    assert study.measures(path)["spike"] == {label: {0: 0.25} for label in study.SWITCHES}


def test_until_the_switch_a_run_is_the_bf16_run_bit_for_bit():
    losses = numbers(RESULTS, "train_loss")
    for label in study.SWITCHES:
        for seed, found in losses[label].items():
            assert found[: study.SWITCH] == losses["bf16"][seed][: study.SWITCH]


def test_the_records_are_complete_and_the_readme_tells_what_they_say():
    losses = numbers(RESULTS)
    assert set(losses) == set(study.VARIANTS)
    assert all(set(found) == set(study.SEEDS) for found in losses.values())
    assert study.report(RESULTS) in (HERE / "README.md").read_text()


def test_results_that_are_there_are_not_repeated(tmp_path):
    path, said = tmp_path / "results.jsonl", []
    path.write_text(RESULTS.read_text())
    train_missing(path, study.run, study.VARIANTS, 1, said.append)
    assert said == [] and path.read_text() == RESULTS.read_text()
    study.draw(path, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.slow  # half a minute, most of it XLA's compilation
def test_a_short_run_tells_what_its_family_is_asked_about(monkeypatch):
    monkeypatch.setattr(study, "STEPS", 10)
    monkeypatch.setitem(study.CONFIG, "train.steps", 10)
    switched, searched = study.run("switch, ramp", 0), study.run("fliqs_6, fast", 0)
    assert len(switched["train_loss"]) == 10 and "bits" not in switched
    assert all(4 <= bits <= 8 for bits in searched["bits"]) and searched["entropy"] > 0
