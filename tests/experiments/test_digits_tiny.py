"""The study of digits: its arithmetic, its records, and that its README tells what they say."""

import json
from pathlib import Path

from experiments.digits_tiny import study
from lowprec import recipes
from lowprec.nn import folding

HERE = Path(study.__file__).parent


def test_differences_are_paired_by_seed():
    """Differences 1, 2 and 3 points: mean 2, standard error 1 / √3 = 0.58."""
    row = lambda accuracy: {"accuracy": accuracy, "loss": 0.5}
    found = {label: {} for label in study.VARIANTS}
    found["f32"] = {0: row(0.9), 1: row(0.92), 2: row(0.94)}
    found["lsq_4"] = {0: row(0.89), 1: row(0.9), 2: row(0.91)}
    (line,) = (line for line in study.report(found).splitlines() if line.startswith("| lsq_4"))
    assert "-2.00 ± 0.58" in line and "90.00" in line


def test_every_variant_is_a_recipe_and_a_kind_of_batch_norm():
    for variant in study.VARIANTS.values():
        recipes.parse(variant.recipe)
        assert variant.batch_norm in folding.KINDS


def test_the_records_are_complete_and_the_readme_tells_what_they_say():
    found = study.read(HERE / "results.jsonl")
    assert set(found) == set(study.VARIANTS)
    for results in found.values():
        assert set(results) == set(study.SEEDS)
        assert {result["status"] for result in results.values()} == {"done"}
    assert study.report(found) in (HERE / "README.md").read_text()


def test_results_that_are_there_are_not_repeated(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    pairs = [(label, seed) for label in study.VARIANTS for seed in study.SEEDS]
    lines = [{"variant": label, "seed": seed, "accuracy": 0.9, "loss": 1.0} for label, seed in pairs]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert study.main([f"--results={path}"]) == 0
    assert len(path.read_text().splitlines()) == len(lines)
    assert "| int8_qat, folded |" in capsys.readouterr().out
