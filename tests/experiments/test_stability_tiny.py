"""The study of stability: its sweep, its records and report, and what its README says."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.stability_tiny import study, sweep
from lowprec.sweeps import load_plan
from lowprec.training import train

HERE = Path(study.__file__).parent
README = HERE / "README.md"


def write(path, formats=tuple(sweep.FORMATS)):
    """Losses least at the best rate; what is on purpose unstable diverges above it."""
    with path.open("w") as file:
        for name, rate, seed in sorted(study.expected()):
            if name in formats:
                finite = name != "int4 both ways" or rate <= study.BEST
                away = abs(np.log2(rate / study.BEST))
                loss = 2 + 0.02 * list(sweep.FORMATS).index(name) + 0.05 * away + 0.01 * seed
                measures = {"of_adam_limit_quantized": 0.5, "grad_norm_spike_rate": 0.01} if seed == 0 else {}
                record = {
                    "format": name, "lr": rate, "seed": seed, "eval_loss": loss if finite else None, "start": 5.5,
                    "finite": finite, "never_below_start": False, "spikes": 1, **measures,
                }  # fmt: skip
                file.write(json.dumps(record) + "\n")


def test_the_sweep_is_the_grid_of_the_protocol():
    plan = load_plan(sweep.__file__)
    runs = {(run.config.recipe, run.config.optimizer.lr, run.config.seed) for run in plan.runs}
    assert len(plan.runs) == len(runs) == len(study.expected()) == 7 * 7 * 5
    assert {rate for _, rate, _ in runs} == {rate for _, rate, _ in study.expected()}
    assert [rate / sweep.BEST for rate in study.RATES] == [0.25, 0.5, 1, 2, 4, 8, 16]
    assert {recipe for recipe, *_ in runs} == set(sweep.FORMATS.values())


def test_the_report_tells_what_diverged_and_what_is_missing(tmp_path):
    path = tmp_path / "results.jsonl"
    write(path)
    assert study.is_complete(path)
    text = study.report(path)
    assert "Not run yet" not in text and "0.5 / -" in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert any(row[:2] == ["int4 both ways", "undecided"] and "narrower in 5" in row[2] for row in rows)
    write(path, ("bf16", "fp8"))
    assert "Not run yet: 175 of 245 runs." in study.report(path) and not study.is_complete(path)


@pytest.mark.slow
def test_records_are_made_from_the_runs_of_a_store(tmp_path):
    """One run of bf16, shortened to six steps, and one that diverged at once."""
    config = sweep.get_config()
    config.data.name, config.data.data_dir = "markov_text/size16384", str(tmp_path / "data")
    config.data.seq_len, config.train.steps, config.eval.batches = 8, 6, 4
    config.optimizer.lr = study.BEST
    train(config, tmp_path / "store/a")
    config.recipe, config.optimizer.lr = sweep.FORMATS["int4 forward"], 1e30
    train(config, tmp_path / "store/b")
    done, diverged = study.records_of(tmp_path / "store")
    assert (done["format"], done["lr"], done["finite"]) == ("bf16", study.BEST, True)
    assert done["eval_loss"] > 0 and done["sharpness"]["all"] > 0 and done["largest_quantized"] > 0
    assert (diverged["format"], diverged["finite"], diverged["eval_loss"]) == ("int4 forward", False, None)
    assert "sam_quantized" not in diverged
    json.dumps([done, diverged])


@pytest.mark.skipif(not (HERE / "results.jsonl").exists(), reason="the study has not been run to its end")
def test_the_records_are_complete_and_the_readme_tells_what_they_say():
    assert study.is_complete(HERE / "results.jsonl")
    text = README.read_text()
    assert study.report(HERE / "results.jsonl") in text and "REPORT" not in text
