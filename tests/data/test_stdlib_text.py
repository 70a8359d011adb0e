"""stdlib_text is exactly the files of this Python's standard library, split by file, never stale."""

import hashlib
import sysconfig
from pathlib import Path

import pytest

from lowprec.data import DataConfig, load
from lowprec.data.builders import stdlib_text
from lowprec.data.builders.offline import prepared
from lowprec.data.catalog import open_text
from lowprec.data.stdlib import Corpus, Document, read_corpus
from lowprec.errors import UsageError


@pytest.fixture
def library(tmp_path) -> Path:
    """A standard library of 60 small modules and of files that do not belong to the corpus."""
    root = tmp_path / "lib"
    for index in range(60):
        path = root / f"package{index % 3}" / f"module{index}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"value = {index}\n".encode() * (index + 1))
    for other in [
        "test/test_os.py",
        "package1/tests/test_it.py",
        "idlelib/run.py",
        "lib2to3/main.py",
        "ensurepip/__init__.py",
        "site-packages/numpy/core.py",
        "package1/__pycache__/module1.py",
        "_sysconfigdata__linux_x86_64-linux-gnu.py",
        "sitecustomize.py",
        "config-3.12-x86_64-linux-gnu/python-config.py",
        "README.txt",
        "package2/data.pyc",
    ]:
        path = root / other
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not part of it")
    return root


def test_corpus_is_the_modules_without_tests_and_generated_files_sorted_by_path(library):
    corpus = read_corpus(library)
    paths = [document.path for document in corpus.documents]
    assert paths == sorted(f"package{index % 3}/module{index}.py" for index in range(60))
    assert all((library / document.path).read_bytes() == document.text for document in corpus.documents)


def test_a_file_is_in_one_split_and_stays_in_it_when_others_come_and_go(library):
    before = {document.path: document.split for document in read_corpus(library).documents}
    assert set(before.values()) == {"train", "validation"}
    (library / "aaa.py").write_bytes(b"new")
    (library / "package0" / "module0.py").unlink()
    (library / "package1" / "module1.py").write_bytes(b"changed")
    after = {document.path: document.split for document in read_corpus(library).documents}
    assert {path: before[path] for path in before if path in after} == {
        path: after[path] for path in after if path in before
    }


def test_one_path_in_twenty_is_for_validation():
    splits = [Document(f"package/module{index}.py", b"").split for index in range(20_000)]
    # Binomial(20000, 1/20): five standard deviations are 154.
    assert abs(splits.count("validation") - 1000) < 154


def test_the_corpus_name_changes_with_every_byte_path_and_python_version(library):
    name = read_corpus(library).name
    assert read_corpus(library).name == name
    documents = read_corpus(library).documents
    assert Corpus(documents, "3.99.0").name != name
    moved = (Document("package0/renamed.py", documents[0].text), *documents[1:])
    assert Corpus(moved, read_corpus(library).python).name != name
    (library / "package0" / "module3.py").write_bytes(b"value = 3")
    assert read_corpus(library).name != name


def test_bytes_that_move_between_neighbouring_files_change_the_hash():
    one = Corpus((Document("a.py", b"xy"), Document("b.py", b"z")), "3")
    other = Corpus((Document("a.py", b"x"), Document("b.py", b"yz")), "3")
    assert one.sha256 != other.sha256


def test_a_set_prepared_from_other_sources_is_never_read(library, tmp_path):
    first = prepared(lambda: stdlib_text.make("", tmp_path / "data", read_corpus(library)))
    (library / "package0" / "module0.py").write_bytes(b"print('new')\n")
    second = prepared(lambda: stdlib_text.make("", tmp_path / "data", read_corpus(library)))
    assert first.data_dir != second.data_dir
    texts = [
        example["text"]
        for split in ("train", "validation")
        for builder in (second,)
        for example in builder.as_data_source(split=split)
    ]
    assert b"print('new')\n" in texts
    assert b"value = 0\n" not in texts


def test_a_python_without_sources_is_told_so(tmp_path):
    with pytest.raises(UsageError, match="comes without those of its standard library"):
        read_corpus(tmp_path)


def test_the_prepared_set_is_the_standard_library_file_by_file(prepared_stdlib):
    source = open_text("stdlib_text", Path(prepared_stdlib))
    top = Path(sysconfig.get_paths()["stdlib"])
    read: dict[str, list[str]] = {}
    for split in ("train", "validation"):
        examples = list(source.builder.as_data_source(split=split))
        read[split] = [example["path"].decode() for example in examples]
        assert read[split] == sorted(read[split])
        for example in examples[::20]:
            assert (top / example["path"].decode()).read_bytes() == example["text"]
    assert not set(read["train"]) & set(read["validation"])
    assert len(read["train"]) + len(read["validation"]) == len(read_corpus().documents) > 300
    assert 0.02 < len(read["validation"]) / len(read["train"]) < 0.1


def test_the_recorded_hashes_are_those_of_the_text(prepared_stdlib):
    source = open_text("stdlib_text", Path(prepared_stdlib))
    assert source.builder.info.metadata["sha256"] == read_corpus().sha256
    text = b"\0".join(source.documents("validation"))
    assert source.text_sha256("validation") == hashlib.sha256(text).hexdigest()
    data = load(DataConfig("stdlib_text", data_dir=prepared_stdlib, train_split="validation"))
    assert data.tokenizer.decode(data.eval_tokens) == text
    assert data.eval_bytes == len(text) == data.eval_tokens.size


def test_two_loads_agree_and_another_text_has_another_hash(prepared_stdlib, tmp_path):
    config = DataConfig("stdlib_text", data_dir=prepared_stdlib, max_bytes=1000)
    here = load(config)
    assert load(config).sha256 == here.sha256
    elsewhere = load(DataConfig("stdlib_text", data_dir=str(tmp_path), max_bytes=1000))
    assert elsewhere.sha256 == here.sha256
    assert (elsewhere.train_tokens == here.train_tokens).all()
    assert load(DataConfig("stdlib_text", data_dir=prepared_stdlib, max_bytes=999)).sha256 != here.sha256


def test_it_takes_no_options(tmp_path):
    with pytest.raises(UsageError, match="takes no options"):
        load(DataConfig("stdlib_text/fast", data_dir=str(tmp_path)))
