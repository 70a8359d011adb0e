"""Any TFDS text set comes through the same door; a missing one is explained at once."""

import json
import time
import urllib.error

import numpy as np
import pytest
import tensorflow_datasets as tfds

from lowprec.data import DataConfig, load, names
from lowprec.errors import UsageError

SENTENCES = [f"sentence number {index}, which is ünlike the others".encode() for index in range(30)]


class Lm1b(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A stand-in with the layout of the real lm1b: splits train and test, feature text."""

    name = "lm1b"
    VERSION = tfds.core.Version("1.1.0")

    def _info(self):
        features = {"text": tfds.features.Text(), "stars": tfds.features.Scalar(np.int64)}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 20), "test": self._generate_examples(20, 30)}

    def _generate_examples(self, start, stop):
        for index in range(start, stop):
            yield index, {"text": SENTENCES[index], "stars": index}


@pytest.fixture
def prepared(tmp_path):
    """A data directory in which somebody prepared lm1b."""
    Lm1b(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    return tmp_path


def lm1b(directory, **changes):
    return DataConfig("lm1b", **{"data_dir": str(directory), "eval_split": "test", **changes})


def test_a_prepared_set_is_read_without_asking_for_the_network(prepared):
    data = load(lm1b(prepared))
    assert data.name == "lm1b/1.1.0"
    assert data.tokenizer.decode(data.train_tokens) == b"\0".join(SENTENCES[:20])
    assert data.tokenizer.decode(data.eval_tokens) == b"\0".join(SENTENCES[20:])
    assert data.entropy_per_byte is None


def test_splits_may_be_slices_and_the_version_may_be_named(prepared):
    data = load(lm1b(prepared, train_split="train[:50%]", eval_split="train[90%:]"))
    assert data.tokenizer.decode(data.train_tokens) == b"\0".join(SENTENCES[:10])
    assert data.tokenizer.decode(data.eval_tokens) == b"\0".join(SENTENCES[18:20])
    assert load(DataConfig("lm1b:1.1.0", data_dir=str(prepared), eval_split="test")).name == "lm1b/1.1.0"


def test_the_default_directory_is_that_of_tfds(prepared, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    assert load(lm1b("")).train_bytes == len(b"\0".join(SENTENCES[:20]))


def test_a_split_that_the_set_lacks_is_named_with_those_it_has(prepared):
    message = r"no split 'validation' in lm1b/1.1.0, .* it has .*test \(10 examples\).*--config.data.eval_split"
    with pytest.raises(UsageError, match=message):
        load(lm1b(prepared, eval_split="validation"))


@pytest.mark.parametrize("split", ["", "tra in", "train[:0]", "train[60%:40%]", "train[:21]", "train[x]", "dev"])
def test_a_split_without_examples_is_refused(prepared, split):
    with pytest.raises(UsageError, match="no split"):
        load(lm1b(prepared, train_split=split))


def test_a_feature_that_the_set_lacks_or_that_is_no_text_is_named(prepared):
    with pytest.raises(UsageError, match=r"text_key\) 'txt'; did you mean text"):
        load(lm1b(prepared, text_key="txt"))
    with pytest.raises(UsageError, match=r"'stars' is int, not text"):
        load(lm1b(prepared, text_key="stars"))


def test_a_set_stored_in_tensorflows_format_is_explained(prepared):
    path = prepared / "lm1b" / "1.1.0" / "dataset_info.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    with pytest.raises(UsageError, match="only tensorflow reads; prepare it again with file_format='array_record'"):
        load(lm1b(prepared))


@pytest.mark.parametrize("damage", [b"", b"garbage" * 100])
def test_a_damaged_set_is_named_with_its_place(prepared, damage):
    (path,) = prepared.glob("lm1b/1.1.0/*train*")
    path.write_bytes(damage)
    with pytest.raises(UsageError, match=r"lm1b.*(can't be read|can't be opened).*prepare"):
        load(lm1b(prepared))


def test_a_damaged_description_is_named_with_its_place(prepared):
    (prepared / "lm1b" / "1.1.0" / "dataset_info.json").write_text("{ not json")
    with pytest.raises(UsageError, match=r"lm1b.*can't be read.*prepare it again"):
        load(lm1b(prepared))


@pytest.mark.parametrize("name", ["lm1b", "tiny_shakespeare", "c4/en", "wiki40b"])
def test_a_missing_set_says_at_once_how_to_get_it(name, tmp_path):
    start = time.monotonic()
    with pytest.raises(UsageError) as caught:
        load(DataConfig(name, data_dir=str(tmp_path)))
    assert time.monotonic() - start < 5
    message = str(caught.value)
    assert f"'{name}' is not prepared in {tmp_path}" in message
    assert "--config.data.download=True" in message
    assert f"tfds.builder('{name}', data_dir='{tmp_path}', file_format='array_record')" in message
    assert all(own in message for own in names())
    assert not list(tmp_path.iterdir())


def test_another_version_of_a_missing_set_is_mentioned(prepared):
    with pytest.raises(UsageError, match=r"but lm1b/1.1.0 is"):
        load(DataConfig("lm1b:9.0.0", data_dir=str(prepared)))


@pytest.mark.parametrize(
    ("name", "near"),
    [("stdlib_txt", "stdlib_text"), ("markov", "markov_text"), ("lm1bb", "lm1b"), ("tinyshakespeare", "tiny_shakesp")],
)
def test_an_unknown_set_is_answered_with_the_near_ones(name, near, tmp_path):
    with pytest.raises(UsageError, match=f"unknown data set '{name}'; did you mean .*{near}"):
        load(DataConfig(name, data_dir=str(tmp_path)))


@pytest.mark.parametrize("name", ["", "../secret", "a b", "huggingface:lm1b", "digits"])
def test_what_is_no_name_of_a_text_set_is_refused(name, tmp_path):
    with pytest.raises(UsageError):
        load(DataConfig(name, data_dir=str(tmp_path)))


def test_a_download_without_network_ends_at_once(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(UsageError, match=r"download=True, but http.*out of reach \(Name or service not known\)"):
        load(DataConfig("tiny_shakespeare", data_dir=str(tmp_path), download=True))


def test_a_download_from_a_silent_network_ends_soon(tmp_path, monkeypatch):
    monkeypatch.setattr("lowprec.data.external.PROBE_SECONDS", 0.1)
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: time.sleep(10))
    start = time.monotonic()
    with pytest.raises(UsageError, match="no answer"):
        load(DataConfig("tiny_shakespeare", data_dir=str(tmp_path), download=True))
    assert time.monotonic() - start < 5


def test_a_set_whose_preparation_fails_says_why(tmp_path, monkeypatch):
    def failing(self, *_, **__):
        raise ModuleNotFoundError("No module named 'apache_beam'")

    monkeypatch.setattr("lowprec.data.external._require_network", lambda *_: None)
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", failing)
    with pytest.raises(UsageError, match=r"could not be prepared here: ModuleNotFoundError.*apache_beam"):
        load(DataConfig("tiny_shakespeare", data_dir=str(tmp_path), download=True))


def test_tfds_mock_data_comes_through_the_same_door(prepared, tmp_path):
    """The metadata are real files, the examples are random strings of tfds."""
    directory = tmp_path / "mocked"
    with tfds.testing.mock_data(num_examples=12, data_dir=str(prepared)):
        data = load(lm1b(directory))
    text = data.tokenizer.decode(data.train_tokens)
    assert text.count(b"\0") == 11
    assert set(text) <= set(b"\0 abcdefghij")


def test_tfds_mock_data_comes_through_the_download_too(tmp_path, monkeypatch):
    monkeypatch.setattr("lowprec.data.external._require_network", lambda *_: None)
    with tfds.testing.mock_data(num_examples=12):
        data = load(DataConfig("lm1b", data_dir=str(tmp_path), download=True, eval_split="test"))
    assert data.tokenizer.decode(data.eval_tokens).count(b"\0") == 11
