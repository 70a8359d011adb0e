"""The study of methods that change over time: its variants, its measures, and that its README tells the records."""

import json
from pathlib import Path

import pytest

from experiments.dynamics_tiny import report, study, variants
from experiments.paired import SEEDS, numbers, train_missing
from lowprec import recipes
from lowprec.training.config import resolve

HERE = Path(study.__file__).parent
RESULTS = HERE / "results.jsonl"


def test_every_variant_is_a_schedule_for_its_model_and_every_claim_is_of_variants():
    for variant in variants.VARIANTS.values():
        stages = recipes.parse_schedule(variant.recipe).stages(variants.STEPS, variants.CONFIG["model.layers"])
        assert stages[0].start == 0 and variant.baseline in variants.VARIANTS
    assert {label for *_, more, less in variants.CLAIMS for label in (more, less)} <= set(variants.VARIANTS)


def test_every_variant_is_a_config_and_differs_from_its_baseline():
    """In the recipe, the keys that are named or the start; "softmax" alone is what it is compared with."""
    for label, variant in variants.VARIANTS.items():
        named = {"recipe": variant.recipe} if isinstance(variant.recipe, str) else {}
        resolve({**variants.CONFIG, **variant.config, **named})
        plain = variants.VARIANTS[variant.baseline]
        if label not in (variant.baseline, "softmax"):
            same = lambda each: (str(each.recipe), dict(each.config), each.trained)
            assert same(variant) != same(plain)


def test_the_switch_is_where_the_study_looks_for_a_spike():
    stages = recipes.parse_schedule(variants.VARIANTS["switch, ramp"].recipe).stages(variants.STEPS, 2)
    assert [stage.start for stage in stages] == [0, variants.SWITCH, variants.SWITCH + variants.RAMP]


def test_a_spike_is_the_largest_excess_over_bf16_in_its_window(tmp_path):
    """Before the window 9, in it .25, after it 9."""
    path, end = tmp_path / "results.jsonl", variants.SWITCH + variants.RAMP + 10
    bumps = {variants.SWITCH - 1: 9.0, variants.SWITCH: 0.125, end - 1: 0.25, end: 9.0}
    losses = [2.0 + bumps.get(step, 0.0) for step in range(variants.STEPS)]
    with path.open("w") as file:
        for label in ("bf16", *variants.SWITCHES):
            record = {"variant": label, "seed": 0, "eval_loss": 2.0}
            record["train_loss"] = [2.0] * variants.STEPS if label == "bf16" else losses
            file.write(json.dumps(record) + "\n")
    assert report.measures(path)["spike"] == {label: {0: 0.25} for label in variants.SWITCHES}


def test_until_the_switch_a_run_is_the_bf16_run_bit_for_bit():
    losses = numbers(RESULTS, "train_loss")
    for label in variants.SWITCHES:
        for seed, found in losses[label].items():
            assert found[: variants.SWITCH] == losses["bf16"][seed][: variants.SWITCH]


def test_softmax_is_the_bf16_run_and_costs_what_the_records_say():
    losses, untrained = numbers(RESULTS), numbers(RESULTS, "eval_loss_int4")
    assert losses["softmax"] == losses["bf16"]
    costs = report.measures(RESULTS)["cost of int4"]["softmax"]
    assert costs == {seed: untrained["softmax"][seed] - losses["bf16"][seed] for seed in SEEDS}


def test_the_readme_tells_what_the_records_say_and_what_is_not_run_yet():
    losses, told = numbers(RESULTS), report.report(RESULTS)
    assert set(losses) <= set(variants.VARIANTS)
    assert told in (HERE / "README.md").read_text()
    waiting = [label for label in variants.VARIANTS if set(losses.get(label, ())) != set(SEEDS)]
    assert ("Not run yet" in told) == bool(waiting)
    assert all(label in told.rpartition("Not run yet")[2] for label in waiting)


def test_results_that_are_there_are_not_repeated(tmp_path):
    path, said = tmp_path / "results.jsonl", []
    path.write_text(RESULTS.read_text())
    finished = [label for label, losses in numbers(path).items() if set(losses) == set(SEEDS)]
    train_missing(path, study.run, finished, 1, said.append)
    assert said == [] and path.read_text() == RESULTS.read_text()
    report.draw(path, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.fixture
def short(monkeypatch, tmp_path):
    """Ten steps of the study, and its runs of bf16 elsewhere."""
    monkeypatch.setitem(variants.CONFIG, "train.steps", 10)
    monkeypatch.setattr(study, "TEACHERS", tmp_path)


@pytest.mark.slow  # half a minute, most of it XLA's compilation
def test_a_short_run_tells_what_its_family_is_asked_about(short):
    switched, searched = study.run("switch, ramp", 0), study.run("fliqs_6, fast", 0)
    assert len(switched["train_loss"]) == 10 and "bits" not in switched
    assert all(4 <= bits <= 8 for bits in searched["bits"]) and searched["entropy"] > 0


@pytest.mark.slow  # half a minute, most of it XLA's compilation
def test_a_short_run_begins_where_bf16_ended_and_has_it_as_a_teacher(short):
    study.train_teacher(0)
    frozen, taught = study.run("3-bit weights, frozen", 0), study.run("lsq_2, distillation", 0)
    # The first loss of a fresh model is ln 256 = 5.545 and a little; ten steps of bf16 end below 5.
    assert frozen["train_loss"][0] < 5 and 0 <= frozen["frozen_weights"] <= 1
    assert taught["train_loss"][0] < 5
