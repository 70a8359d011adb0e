"""The study of recipes: its arithmetic, its records, and that its README tells what they say."""

import json
from pathlib import Path

import pytest

from experiments.recipes_tiny import study
from lowprec import recipes

HERE = Path(study.__file__).parent


def test_gaps_are_paired_by_seed():
    """Differences .1, .2, .3: mean .2, standard error .1 / √3."""
    losses = {"a": {0: 1.1, 1: 2.2, 2: 3.3}, "b": {0: 1.0, 1: 2.0, 2: 3.0}}
    gap = study.Gap.between(losses, "a", "b")
    assert gap.mean == pytest.approx(0.2) and gap.error == pytest.approx(0.1 / 3**0.5)


@pytest.mark.parametrize(
    ("mean", "error", "seen"), [(0.3, 0.1, "yes"), (0.1, 0.1, "undecided"), (-0.3, 0.1, "no, the reverse")]
)
def test_a_verdict_takes_two_standard_errors(mean, error, seen):
    assert study.verdict(study.Gap(mean, error)) == seen


def test_every_variant_is_a_recipe_and_every_claim_is_of_variants():
    for variant in study.VARIANTS.values():
        recipes.parse(variant.recipe)
    assert {label for _, *pair in study.CLAIMS for label in pair} <= set(study.VARIANTS)


def test_the_records_are_complete_and_the_readme_tells_what_they_say():
    losses = study.read(HERE / "results.jsonl")
    assert set(losses) == set(study.VARIANTS)
    assert all(set(found) == set(study.SEEDS) for found in losses.values())
    assert study.report(losses) in (HERE / "README.md").read_text()


def test_results_that_are_there_are_not_repeated(tmp_path):
    path, said = tmp_path / "results.jsonl", []
    with path.open("w") as file:
        for label in study.VARIANTS:
            for seed in study.SEEDS:
                file.write(json.dumps({"variant": label, "seed": seed, "eval_loss": 1.0 + seed}) + "\n")
    study.train(path, 1, said.append)
    assert said == [] and study.read(path)["bf16"] == {0: 1.0, 1: 2.0, 2: 3.0}
    study.draw(study.read(path), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
