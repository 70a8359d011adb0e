"""Tokenizers lose nothing."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lowprec.data import DataConfig, load
from lowprec.data.tokenizer import SEPARATOR, ByteTokenizer, bpe_vocab
from lowprec.errors import UsageError

TRAINING = [
    b"for index in range(10):\n        print(index, 'the quick brown fox')\n" * 20,
    "für alle Wörter, naïveté — 日本語 λx.x\n".encode() * 20,
    bytes(range(256)) * 4,
]


@pytest.fixture(scope="module")
def bpe():
    pytest.importorskip("tokenizers")
    from lowprec.data.bpe import train_bpe

    return train_bpe(TRAINING, 320)


@given(st.binary(max_size=300))
def test_a_byte_is_a_token(text):
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.uint8
    assert tokens.tolist() == list(text)
    assert tokenizer.decode(tokens) == text


@given(text=st.binary(max_size=300))
@example(text=b"")
@example(text=b"\0")
@example(text=b"\0\0 \0")
@example(text=bytes(range(256)))
@example(text="naïve\r\n\t日本\u00a0語".encode())
@example(text=b"\xff\xfe broken utf-8 \xc3")
@settings(deadline=None)
def test_bpe_gives_every_byte_back(bpe, text):
    tokens = bpe.encode(text)
    assert tokens.dtype == np.uint16
    assert bpe.decode(tokens) == text
    assert bpe.decode(tokens.astype(np.int32)) == text
    assert (tokens < bpe.vocab_size).all()


@given(documents=st.lists(st.binary(max_size=60) | st.sampled_from(TRAINING[:2]), min_size=1, max_size=5))
@settings(deadline=None)
def test_bpe_of_joined_documents_is_the_joined_bpe(bpe, documents):
    nul = bpe.encode(SEPARATOR).tolist()
    assert len(nul) == 1
    joined = []
    for document in documents:
        joined += nul + bpe.encode(document).tolist()
    assert bpe.encode(SEPARATOR.join(documents)).tolist() == joined[1:]


def test_bpe_shortens_the_text_it_learnt(bpe):
    assert bpe.vocab_size == 320
    assert bpe.encode(TRAINING[0]).size < len(TRAINING[0]) / 3


def test_bpe_is_the_same_in_another_process(bpe):
    code = (
        f"import hashlib; from lowprec.data.bpe import train_bpe; t = train_bpe({TRAINING!r}, 320); "
        f"print(t.sha256, hashlib.sha256(t.encode({TRAINING[0]!r}).tobytes()).hexdigest())"
    )
    environment = {"RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7", "PATH": "/usr/bin:/bin"}
    environment["PYTHONPATH"] = ":".join(sys.path)
    other = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert other.stdout.split() == [bpe.sha256, hashlib.sha256(bpe.encode(TRAINING[0]).tobytes()).hexdigest()]


def test_too_large_a_vocabulary_for_the_text_says_what_fits():
    pytest.importorskip("tokenizers")
    from lowprec.data.bpe import train_bpe

    with pytest.raises(UsageError, match=r"only \d+ tokens; choose bpe\d+"):
        train_bpe([b"abab abab"], 4096)


@pytest.mark.parametrize(("name", "vocab"), [("byte", None), ("bpe257", 257), ("bpe65536", 65536)])
def test_names(name, vocab):
    assert bpe_vocab(name) == vocab


@pytest.mark.parametrize("name", ["", "bytes", "bpe", "bpe256", "bpe65537", "gpt2", "bpe-2048", "bpe1e3"])
def test_a_bad_name_says_the_form(name, tmp_path):
    with pytest.raises(UsageError, match=r"bpe<vocab>|257 … 65536"):
        load(DataConfig("markov_text", tokenizer=name, data_dir=str(tmp_path)))


def test_without_the_package_the_error_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UsageError, match=r"lowprec\[bpe\]"):
        load(DataConfig("markov_text/vocab8-size5000", tokenizer="bpe300", data_dir=str(tmp_path)))


def test_bpe_of_real_text_is_trained_once_and_its_bits_per_byte_compare(prepared_stdlib, monkeypatch):
    pytest.importorskip("tokenizers")
    config = DataConfig("stdlib_text", tokenizer="bpe400", data_dir=prepared_stdlib, max_bytes=60_000)
    data = load(config)
    assert data.vocab_size == 400
    assert data.train_tokens.dtype == np.uint16
    assert data.train_bytes == data.eval_bytes == 60_000
    plain = load(DataConfig("stdlib_text", data_dir=prepared_stdlib, max_bytes=60_000))
    assert data.tokenizer.decode(data.eval_tokens) == plain.tokenizer.decode(plain.eval_tokens)
    assert data.sha256 != plain.sha256
    # A model that knows nothing loses ln vocab a token: log2(400)·tokens/bytes bits a byte.
    assert data.bits_per_byte(np.log(400)) == pytest.approx(np.log2(400) * data.eval_tokens.size / 60_000)

    monkeypatch.setattr("lowprec.data.bpe.train_bpe", lambda *_: pytest.fail("trained again"))
    assert load(config).sha256 == data.sha256


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"definition": 3, "sha256": ""}', b'{"definition": "{}"}'])
def test_a_damaged_tokenizer_is_trained_again(damage, tmp_path):
    pytest.importorskip("tokenizers")
    config = DataConfig("markov_text/vocab8-size5000", tokenizer="bpe300", data_dir=str(tmp_path))
    before = load(config)
    (stored,) = tmp_path.glob("lowprec_cache/*.bpe300.json")
    stored.write_bytes(damage)
    assert load(config).sha256 == before.sha256
