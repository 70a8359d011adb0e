"""`lowprec train` and `lowprec eval` on a small run."""

import json
import shutil

import pytest

from lowprec.training.metrics import read_lines
from lowprec.training.run_directory import RunDirectory


def numbers(output, name):
    """The columns of `lowprec eval` after a name."""
    (line,) = (line for line in output.splitlines() if line.startswith(name))
    return [float(text) for text in line.removeprefix(name).replace("%", "").split()]


def test_eval_says_what_training_said(lowprec, trained):
    evaluation = json.loads((trained / "int4/summary.json").read_text())["evaluation"]
    status, output, _ = lowprec("eval", f"--workdir={trained / 'int4'}")
    assert status == 0
    loss, error, bits = numbers(output, "quantized")
    assert loss == pytest.approx(evaluation["eval_loss"], abs=5e-5)
    assert error == pytest.approx(evaluation["eval_loss_sem"], abs=5e-5)
    assert bits == pytest.approx(evaluation["eval_bits_per_byte"], abs=5e-5)
    assert numbers(output, "full precision")[0] == pytest.approx(evaluation["eval_loss_full_precision"], abs=5e-5)
    assert numbers(output, "difference")[0] == pytest.approx(evaluation["eval_gap"], abs=5e-5)
    assert "fwd.w" in output and "128 tokens" in output


def test_eval_under_another_recipe_and_of_an_earlier_step(lowprec, trained):
    workdir = trained / "bf16"
    status, output, _ = lowprec("eval", f"--workdir={workdir}", "--recipe=fwd=int2@row", "--step=3", "--batches=1")
    earlier = {line["step"]: line for line in read_lines(workdir / "metrics.jsonl")}[3]
    assert status == 0 and "step 3, recipe fwd=int2@row, 64 tokens" in output
    assert numbers(output, "full precision")[0] == pytest.approx(earlier["eval_loss_full_precision"], abs=0.1)
    assert abs(numbers(output, "difference")[0]) > 1e-4


def test_eval_changes_nothing(lowprec, trained):
    before = {path: path.stat().st_mtime_ns for path in (trained / "int4").rglob("*")}
    lowprec("eval", f"--workdir={trained / 'int4'}", "--recipe=f32")
    assert {path: path.stat().st_mtime_ns for path in (trained / "int4").rglob("*")} == before


def test_eval_refuses_what_is_not_there(lowprec, trained, tmp_path):
    assert "is not the directory of a run" in lowprec("eval", f"--workdir={trained}")[2]
    status, _, errors = lowprec("eval", f"--workdir={trained / 'int4'}", "--step=4")
    assert status == 2 and "no checkpoint of step 4; there are: 3, 6" in errors
    shutil.copytree(trained / "int4", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints")
    status, _, errors = lowprec("eval", f"--workdir={tmp_path / 'run'}")
    assert status == 2 and "has no checkpoint yet" in errors
    status, _, errors = lowprec("eval", f"--workdir={trained / 'int4'}", "--recipe=int44")
    assert status == 2 and "unknown recipe 'int44'" in errors


def test_train_names_a_directory_after_the_config_and_its_hash(lowprec, tmp_path, monkeypatch, data_dir):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.py").write_text(
        "from lowprec.training import default\n"
        "def get_config(steps='2'):\n"
        "    config = default()\n"
        "    config.data.name, config.data.seq_len = 'markov_text/size16384', 16\n"
        f"    config.data.data_dir = {data_dir!r}\n"
        "    config.model.layers, config.model.width, config.model.heads = 1, 16, 1\n"
        "    config.train.steps, config.train.batch_size, config.eval.batches = int(steps), 4, 1\n"
        "    return config\n"
    )
    status, output, errors = lowprec(
        "train", "--config=small.py:3", "--config.recipe=fwd=int8@row wgrad=bf16", "--config.log.tensorboard",
        "--config.profile.steps=1", "--config.profile.skip=1", "--noconfig.eval.health",
    )  # fmt: skip
    (workdir,) = (tmp_path / "runs").iterdir()
    config = RunDirectory(workdir).read_config()
    assert status == 0 and workdir.name == f"small-3-{config.hash()[:8]}"
    assert config.recipe == "fwd=int8@row wgrad=bfloat16"
    assert output.startswith(f"done: runs/{workdir.name}; fwd=int8@row") and "bits/byte" in output
    assert "step 3/3  100%" in errors
    found = sorted(path.name for path in workdir.iterdir())
    assert found == ["checkpoints", "config.json", "metrics.jsonl", "profile", "summary.json", "tensorboard"]
    assert list((workdir / "profile").rglob("*.xplane.pb"))


def test_the_files_of_a_run_say_what_they_promise(trained):
    """The keys of the API contract."""
    lines = read_lines(trained / "int4/metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert {"step", "loss", "bits_per_byte", "grad_norm", "lr", "tokens_per_second"} <= set(line)
        assert line["tokens"] == line["step"] * 4 * 16
    evaluated = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluated] == [3, 6]
    for line in evaluated:
        operands = line["quantization"]["layers/0/attention/query"]
        assert set(operands) == {"fwd.x", "fwd.w"}
        assert set(operands["fwd.w"]) == {"sqnr_db", "cosine", "clipped", "underflowed", "amax"}
    summary = json.loads((trained / "int4/summary.json").read_text())
    assert summary["status"] == "done" and summary["tokens"] == 6 * 64
    assert summary["parameters"] == 16 * 256 * 2 + summary["parameters_non_embedding"]
    assert summary["flops"] > 6 * summary["parameters_non_embedding"] * summary["tokens"] * 0.9
    assert {"final_loss", "best_loss", "seconds", "versions", "data_sha256", "memory", "config_hash"} <= set(summary)
    assert summary["final_loss"] == lines[-1]["eval_loss"]
    assert summary["best_loss"] == min(line["eval_loss"] for line in evaluated)
    assert {"python", "jax", "flax", "optax", "orbax-checkpoint", "lowprec"} <= set(summary["versions"])
    assert len(summary["data_sha256"]) == 64
