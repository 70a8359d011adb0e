"""Our own sets are prepared whole or not at all, quietly, by any number of processes."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from lowprec.data import DataConfig, load
from lowprec.errors import UsageError

NAME = "markov_text/vocab8-size4000"


def load_command(directory, before: str = "") -> list[str]:
    code = (
        f"{before}\nfrom lowprec.data import DataConfig, load\n"
        f"print(load(DataConfig({NAME!r}, data_dir={str(directory)!r})).sha256)"
    )
    return [sys.executable, "-c", code]


KILL_WHILE_WRITING = """
import os, signal
from lowprec.data.builders.markov_text import MarkovText
def killed(self, size, stream):
    yield 0, {"text": b"half a te"}
    if stream == 2:
        os.kill(os.getpid(), signal.SIGKILL)
MarkovText._generate_examples = killed
"""


def test_a_killed_preparation_is_never_taken_for_a_finished_one(tmp_path):
    killed = subprocess.run(load_command(tmp_path, KILL_WHILE_WRITING), capture_output=True, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.glob("markov_text/*/*")
    assert left.name.startswith("incomplete.")
    data = load(DataConfig(NAME, data_dir=str(tmp_path)))
    assert (data.train_bytes, data.eval_bytes) == (4000, 500)


def test_what_killed_preparations_left_is_removed_after_a_day(tmp_path):
    load(DataConfig(NAME, data_dir=str(tmp_path)))
    (whole,) = tmp_path.glob("markov_text/*/1.0.0")
    old, new = whole.with_name("incomplete.AAAAAA_1.0.0"), whole.with_name("incomplete.BBBBBB_1.0.0")
    whole.rename(old)
    shutil.copytree(old, new)
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (two_days_ago, two_days_ago))
    load(DataConfig(NAME, data_dir=str(tmp_path)))
    assert sorted(path.name for path in whole.parent.iterdir()) == sorted([whole.name, new.name])


def test_processes_that_prepare_at_once_agree(tmp_path):
    running = [
        subprocess.Popen(load_command(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    results = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], results
    assert len({out for out, _ in results}) == 1
    assert not list(tmp_path.glob("markov_text/*/incomplete.*"))
    assert load(DataConfig(NAME, data_dir=str(tmp_path))).sha256 == results[0][0].strip()


def test_the_loser_of_a_race_reads_what_the_winner_wrote(tmp_path, monkeypatch):
    from lowprec.data.builders.markov_text import MarkovText

    generate, raced = MarkovText._generate_examples, []

    def overtaken(self, size, stream):
        if not raced:
            raced.append(True)
            load(DataConfig(NAME, data_dir=str(tmp_path)))
        return generate(self, size, stream)

    monkeypatch.setattr(MarkovText, "_generate_examples", overtaken)
    assert load(DataConfig(NAME, data_dir=str(tmp_path))).train_bytes == 4000
    assert not list(tmp_path.glob("markov_text/*/incomplete.*"))


@pytest.mark.parametrize("kept", [[], ["features.json"], ["dataset_info.json"]], ids=["nothing", "features", "info"])
def test_half_a_set_is_made_again(tmp_path, kept):
    before = load(DataConfig(NAME, data_dir=str(tmp_path)))
    (whole,) = tmp_path.glob("markov_text/*/1.0.0")
    for path in whole.iterdir():
        if path.name not in kept:
            path.unlink()
    shutil.rmtree(tmp_path / "lowprec_cache")
    assert load(DataConfig(NAME, data_dir=str(tmp_path))).sha256 == before.sha256


@pytest.mark.parametrize("damage", ["cut", "bit", "other text", "gone"])
def test_a_damaged_set_of_ours_is_made_again(tmp_path, damage, prepared_stdlib):
    shutil.copytree(f"{prepared_stdlib}/stdlib_text", tmp_path / "stdlib_text")
    (train,) = tmp_path.glob("stdlib_text/*/*/*train*")
    (validation,) = tmp_path.glob("stdlib_text/*/*/*validation*")
    content = bytearray(validation.read_bytes())
    if damage == "cut":
        validation.write_bytes(content[: len(content) // 2])
    elif damage == "bit":
        content[len(content) // 2] ^= 1
        validation.write_bytes(content)
    elif damage == "other text":
        shutil.copy(train, validation)
    else:
        validation.unlink()
    data = load(DataConfig("stdlib_text", data_dir=str(tmp_path), train_split="validation"))
    expected = load(DataConfig("stdlib_text", data_dir=prepared_stdlib, train_split="validation"))
    assert data.sha256 == expected.sha256


def test_nothing_is_printed_and_the_users_logging_stays_as_it_was(tmp_path, capfd):
    import logging

    from tensorflow_datasets.core.utils import tqdm_utils

    levels = {name: logging.getLogger(name).level for name in ("", "absl")}
    bars = tqdm_utils._active
    load(DataConfig(NAME, data_dir=str(tmp_path)))
    load(DataConfig(NAME, data_dir=str(tmp_path)))
    assert capfd.readouterr() == ("", "")
    assert {name: logging.getLogger(name).level for name in ("", "absl")} == levels
    assert tqdm_utils._active == bars


def test_a_directory_that_can_not_be_written_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match=r"can't write the data set markov_text.*data_dir"):
        load(DataConfig(NAME, data_dir=str(tmp_path / "file")))
