"""The study of recipes: its records, and that its README tells what they say."""

import json
from pathlib import Path

from experiments.paired import numbers, train_missing
from experiments.recipes_tiny import study
from lowprec import recipes

HERE = Path(study.__file__).parent


def test_every_variant_is_a_recipe_and_every_claim_is_of_variants():
    for variant in study.VARIANTS.values():
        recipes.parse(variant.recipe)
    assert {label for _, *pair in study.CLAIMS for label in pair} <= set(study.VARIANTS)


def test_the_records_are_complete_and_the_readme_tells_what_they_say():
    losses = numbers(HERE / "results.jsonl")
    assert set(losses) == set(study.VARIANTS)
    assert all(set(found) == set(study.SEEDS) for found in losses.values())
    assert study.report(losses) in (HERE / "README.md").read_text()


def test_results_that_are_there_are_not_repeated(tmp_path):
    path, said = tmp_path / "results.jsonl", []
    with path.open("w") as file:
        for label in study.VARIANTS:
            for seed in study.SEEDS:
                file.write(json.dumps({"variant": label, "seed": seed, "eval_loss": 1.0 + seed}) + "\n")
    train_missing(path, study.run, study.VARIANTS, 1, said.append)
    assert said == [] and numbers(path)["bf16"] == {0: 1.0, 1: 2.0, 2: 3.0}
    study.draw(numbers(path), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
