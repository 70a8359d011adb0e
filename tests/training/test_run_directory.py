"""Who may write where, and that files are written whole."""

import json
import os

import pytest

from lowprec.errors import UsageError
from lowprec.training.config import resolve
from lowprec.training.run_directory import RunDirectory, read_json, write_json


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"status": "interrupted"})
    before = path.stat().st_ino
    write_json(path, {"status": "done"})
    assert read_json(path) == {"status": "done"} and path.stat().st_ino != before
    assert os.listdir(tmp_path) == ["summary.json"]


def test_a_value_that_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"status": "done"})
    with pytest.raises(TypeError):
        write_json(path, {"status": object()})
    assert read_json(path) == {"status": "done"}
    assert os.listdir(tmp_path) == ["summary.json"]


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    return run


@pytest.mark.parametrize("content", ["", '{"seed": 1', "[]", '{"seeed": 1}', '{"train": {"steps": "many"}}'])
def test_a_config_that_cannot_be_understood_is_named(run, content):
    run.config.write_text(content)
    with pytest.raises(UsageError, match=r"config\.json"):
        run.check(resolve({}))
    assert run.config.read_text() == content


def test_a_directory_with_other_things_is_refused(run):
    (run.path / "thesis.tex").write_text("…")
    with pytest.raises(UsageError, match="holds other things than a run"):
        run.check(resolve({}))


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        RunDirectory(tmp_path / "run").check(resolve({}))


def test_an_empty_or_absent_directory_and_the_same_config_are_welcome(run, tmp_path):
    config = resolve({"seed": 3})
    run.check(config)
    RunDirectory(tmp_path / "absent").check(config)
    write_json(run.config, config.to_dict())
    run.check(config)
    run.check(resolve({"seed": 3, "log.every": 5}))


def test_two_processes_do_not_train_in_one_directory(run):
    refused = pytest.raises(UsageError, match="another process is training in")
    with run.claimed(), refused, RunDirectory(run.path).claimed():
        pass
    with run.claimed():
        pass


@pytest.mark.parametrize(
    ("status", "finished"), [("done", True), ("diverged", True), ("interrupted", False), ("failed", False)]
)
def test_results_are_kept_and_the_rest_goes_on(run, status, finished):
    run.summary.write_text(json.dumps({"status": status}))
    assert (run.finished() is not None) == finished
