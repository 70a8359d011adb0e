"""The packed text is the text, it is made once, and damage never goes unnoticed."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowprec.data import DataConfig, load
from lowprec.data.packing import CHUNK_BYTES, text_chunks
from lowprec.data.source import TextSource
from lowprec.errors import UsageError

NAME = "markov_text/vocab8-size4000"


@given(st.lists(st.binary(max_size=20), max_size=8), st.integers(0, 60))
def test_chunks_join_to_the_documents_with_nul_between(documents, max_bytes):
    expected = b"\0".join(documents)
    assert b"".join(text_chunks(documents, max_bytes)) == (expected[:max_bytes] if max_bytes else expected)


def test_chunks_end_where_documents_end():
    documents = [bytes([65 + index]) * (CHUNK_BYTES // 3) for index in range(10)]
    chunks = list(text_chunks(documents))
    assert len(chunks) > 2
    assert b"".join(chunks) == b"\0".join(documents)
    assert all(chunk.startswith(b"\0") for chunk in chunks[1:])
    assert not any(chunk.endswith(b"\0") for chunk in chunks)


def test_reading_stops_at_max_bytes():
    def endless():
        while True:
            yield b"word " * 100

    assert sum(map(len, text_chunks(endless(), 12_345))) == 12_345


def test_the_second_load_maps_files_and_reads_no_document(tmp_path, monkeypatch):
    first = load(DataConfig(NAME, data_dir=str(tmp_path)))
    monkeypatch.setattr(TextSource, "documents", lambda *_: pytest.fail("read again"))
    second = load(DataConfig(NAME, data_dir=str(tmp_path)))
    assert isinstance(second.train_tokens, np.memmap)
    assert not second.train_tokens.flags.writeable
    assert (second.train_tokens == first.train_tokens).all()
    assert second.sha256 == first.sha256


def test_every_cut_and_tokenizer_has_a_store_of_its_own(tmp_path):
    full = load(DataConfig(NAME, data_dir=str(tmp_path)))
    cut = load(DataConfig(NAME, data_dir=str(tmp_path), max_bytes=300))
    assert (cut.train_bytes, cut.eval_bytes) == (300, 300)
    assert (cut.train_tokens == full.train_tokens[:300]).all()
    assert load(DataConfig(NAME, data_dir=str(tmp_path))).train_bytes == 4000
    swapped = load(DataConfig(NAME, data_dir=str(tmp_path), train_split="validation", eval_split="train"))
    assert (swapped.train_tokens == full.eval_tokens).all()
    assert swapped.sha256 != full.sha256


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("suffix", ["tokens", "json"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-7]),
        lambda path: path.write_bytes(path.read_bytes() + b"}"),
        lambda path: path.write_bytes(b"\xff" * path.stat().st_size),
        lambda path: path.write_bytes(b"{}"),
        flip_a_bit,
    ],
    ids=["gone", "empty", "cut", "longer", "garbage", "braces", "bit"],
)
def test_a_damaged_store_is_made_again(tmp_path, suffix, damage):
    before = load(DataConfig(NAME, data_dir=str(tmp_path)))
    expected = np.array(before.train_tokens)
    for path in tmp_path.glob(f"lowprec_cache/*.{suffix}"):
        damage(path)
    after = load(DataConfig(NAME, data_dir=str(tmp_path)))
    assert (after.train_tokens == expected).all()
    assert after.sha256 == before.sha256


@pytest.mark.parametrize("killed_at", ["write_json", "hashlib.sha256"])
def test_a_killed_packing_leaves_nothing_that_is_taken_for_whole(tmp_path, killed_at):
    config = f"DataConfig({NAME!r}, data_dir={str(tmp_path)!r})"
    code = (
        "import os, signal, lowprec.data.packing as packing; from lowprec.data import DataConfig, load; "
        f"packing.{killed_at} = lambda *_: os.kill(os.getpid(), signal.SIGKILL); load({config})"
    )
    killed = subprocess.run([sys.executable, "-c", code], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert not list(tmp_path.glob("lowprec_cache/*.json"))
    assert load(DataConfig(NAME, data_dir=str(tmp_path))).train_bytes == 4000


def test_what_killed_packings_left_is_removed_after_a_day(tmp_path):
    load(DataConfig(NAME, data_dir=str(tmp_path)))
    paths = sorted(tmp_path.glob("lowprec_cache/*"))
    old, new = (paths[0].with_name(f".{paths[0].name}.{tail}") for tail in ("aaaaaaaa", "bbbbbbbb"))
    paths[0].rename(old)
    shutil.copy(old, new)
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (two_days_ago, two_days_ago))
    load(DataConfig(NAME, data_dir=str(tmp_path)))
    assert sorted(tmp_path.glob("lowprec_cache/*")) == sorted([*paths, new])


def test_where_the_data_directory_takes_no_cache_the_users_own_does(tmp_path, monkeypatch):
    load(DataConfig(NAME, data_dir=str(tmp_path)))
    shutil.rmtree(tmp_path / "lowprec_cache")
    (tmp_path / "lowprec_cache").write_bytes(b"in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert load(DataConfig(NAME, data_dir=str(tmp_path))).train_bytes == 4000
    assert list((tmp_path / "elsewhere").glob("lowprec/*/*.tokens"))


def test_negative_max_bytes_is_refused(tmp_path):
    with pytest.raises(UsageError, match="max_bytes"):
        load(DataConfig(NAME, data_dir=str(tmp_path), max_bytes=-1))
