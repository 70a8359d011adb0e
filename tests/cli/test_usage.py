"""Bad usage: exit status 2, one clear message that names the nearest valid choice, and nothing written."""

import os
import subprocess
import sys

import pytest

import lowprec as package


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command 'trian'; did you mean train?"),
        (["train", "--config.recipe=nvfp5"], "unknown recipe 'nvfp5'; did you mean nvfp4"),
        (["train", "--config.recipe=fwd=int4@1x3x"], "1x<g> or <g>x<g>, not '1x3x'"),
        (["train", "--config.recipe=fwd=e4m3@row"], "'e4m3' is ambiguous: say e4m3fn"),
        (["train", "--config.recipe=fwd=int4@row(stochastik)"], "did you mean stochastic"),
        (["train", "--config.modle.width=3"], "unknown config key 'modle.width'; did you mean model.width?"),
        (["train", "--config.train.steps=many"], "train.steps=many"),
        (["train", "--config.train.steps=0"], "train.steps is at least 1, not 0"),
        (["train", "--config.data.name=markov_txt"], "unknown data set 'markov_txt'; did you mean markov_text"),
        (["train", "--config.data.tokenizer=bpe"], "tokenizer"),
        (["train", "--config.model.name=lama", "--config.data.name=markov_text/size4096"], "did you mean llama"),
        (["train", "--config.optimizer.name=adamv"], "unknown optimizer 'adamv'; did you mean adam, adamw"),
        (["train", "--config=nowhere/lm_tiny.py"], "unknown config file 'nowhere/lm_tiny.py'"),
        (["train", "--confg=x.py"], "unknown option '--confg'; did you mean --config"),
        (["train", "nvfp4"], "'nvfp4' is neither an option nor the value of one"),
        (["eval", "--workdir=nowhere"], "there is no directory nowhere"),
        (["report", "nowhere"], "there is no directory nowhere"),
        (["formats", "nvfp5"], "unknown format 'nvfp5'; did you mean nvfp4"),
        (["formats", "e4m3"], "ambiguous"),
        (["formats", "nvfp4", "mxfp4"], "unknown argument 'mxfp4'"),
        (["recipes", "quartet3"], "unknown recipe 'quartet3'; did you mean quartet, quartet2"),
    ],
)
def test_says_what_would_be_valid(lowprec, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    status, output, errors = lowprec(*arguments)
    assert status == 2 and output == ""
    assert errors.startswith("lowprec: ") and message in errors
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("arguments", [[], ["eval"], ["report"], ["eval", "--workdir=x", "--step=last"]])
def test_missing_and_malformed_arguments_show_the_usage(lowprec, arguments):
    status, _, errors = lowprec(*arguments)
    assert status == 2 and errors.startswith("usage: lowprec")


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["report", "--help"], ["--version"]])
def test_help_is_no_error(lowprec, arguments):
    status, output, _ = lowprec(*arguments)
    assert status == 0 and "lowprec" in output


def test_what_does_not_fit_this_machine_is_refused_before_anything_is_written(lowprec, tmp_path):
    status, _, errors = lowprec("train", f"--workdir={tmp_path / 'run'}", "--config.mesh.fsdp=3")
    assert status == 2 and "mesh.fsdp=3 needs 3 devices" in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "status"), [(["recipes", "bf16"], 0), (["recipes", "bf17"], 2)], ids=["good", "bad"]
)
def test_python_m_lowprec_is_lowprec(arguments, status):
    run = subprocess.run([sys.executable, "-m", "lowprec", *arguments], capture_output=True, text=True)
    assert run.returncode == status
    assert ("bfloat16" in run.stdout) if status == 0 else run.stderr.startswith("lowprec: unknown recipe 'bf17'")


def test_a_reader_that_stops_early_is_no_failure():
    root = os.path.dirname(os.path.dirname(package.__file__))
    run = subprocess.run(
        f"{sys.executable} -m lowprec formats e5m2 | head -n 1", shell=True, capture_output=True, text=True, cwd=root
    )
    assert run.stdout.split() == ["name", "e5m2"] and run.stderr == ""
