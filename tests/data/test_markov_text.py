"""markov_text has the entropy that it claims."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowprec.data import DataConfig, load
from lowprec.data.markov import Markov, parse_markov
from lowprec.errors import UsageError

LANGUAGES = [
    Markov(vocab=8, order=1, alpha=1.0),
    Markov(vocab=16, order=1, alpha=1.5, seed=3),
    Markov(vocab=6, order=2, alpha=1.5, seed=1),
    Markov(vocab=2, order=2, alpha=0.7),
]
named = pytest.mark.parametrize("language", LANGUAGES, ids=str)


@pytest.mark.parametrize(("vocab", "alpha", "nats"), [(64, 1.5, 2.3812), (256, 1.5, 2.7142), (256, 2.0, 1.6068)])
def test_entropy_of_the_published_examples(vocab, alpha, nats):
    assert Markov(vocab=vocab, alpha=alpha).entropy == pytest.approx(nats, abs=5e-5)


@named
def test_entropy_rate_is_that_of_a_zipf_row(language):
    """Every context has the same probabilities in another order, so the rate needs no stationary distribution."""
    p = np.arange(1, language.vocab + 1.0) ** -language.alpha
    p /= p.sum()
    assert language.entropy == pytest.approx(-(p * np.log(p)).sum(), abs=1e-12)


@named
def test_stationary_distribution_is_kept_by_one_step(language):
    v, k = language.vocab, language.order
    following = np.zeros(v**k)
    for context in range(v**k):
        for token in range(v):
            following[(context * v + token) % v**k] += (
                language.stationary[context] * language.transition[context, token]
            )
    np.testing.assert_allclose(following, language.stationary, atol=1e-12)
    assert language.stationary.sum() == pytest.approx(1, abs=1e-12)


@named
def test_a_model_that_knows_the_table_loses_the_entropy_rate(language):
    n = 200_000
    text = np.frombuffer(language.sample(n, 1), np.uint8).astype(int)
    v, k = language.vocab, language.order
    context = text[k - 1 : -1] if k == 1 else text[:-2] * v + text[1:-1]
    loss = -np.log(language.transition[context, text[k:]])
    # The losses are independent draws of −ln Zipf: five standard errors.
    assert abs(loss.mean() - language.entropy) < 5 * loss.std() / np.sqrt(n)


@named
def test_counting_the_text_alone_finds_the_entropy_rate(language):
    """Conditional entropy from counts. Its bias is −(free parameters)/2n (Miller–Madow); noise as above."""
    n = 400_000
    text = np.frombuffer(language.sample(n, 1), np.uint8).astype(int)
    v, k = language.vocab, language.order
    context = text[:-1] if k == 1 else text[:-2] * v + text[1:-1]
    counts = np.zeros((v**k, v))
    np.add.at(counts, (context, text[k:]), 1)
    share = counts / counts.sum(axis=1, keepdims=True)
    estimate = -(counts * np.log(np.where(counts > 0, share, 1))).sum() / counts.sum()
    p = language.rank_probability
    spread = np.sqrt((p * np.log(p) ** 2).sum() - language.entropy**2)
    bias = v**k * (v - 1) / (2 * n)
    assert abs(estimate + bias - language.entropy) < 5 * spread / np.sqrt(n) + bias


@named
def test_context_is_worth_something(language):
    text = np.frombuffer(language.sample(200_000, 1), np.uint8)
    share = np.bincount(text, minlength=language.vocab) / text.size
    counted = -(share * np.log(share)).sum()
    assert counted == pytest.approx(language.unigram_entropy, abs=0.02)
    assert language.unigram_entropy > language.entropy + 0.01


def test_one_token_of_context_does_not_reveal_an_order_2_language():
    language = Markov(vocab=6, order=2, alpha=1.5)
    text = np.frombuffer(language.sample(200_000, 1), np.uint8).astype(int)
    counts = np.zeros((6, 6))
    np.add.at(counts, (text[:-1], text[1:]), 1)
    share = counts / counts.sum(axis=1, keepdims=True)
    assert -(counts * np.log(share)).sum() / counts.sum() > language.entropy + 0.1


def test_the_text_is_the_same_on_every_machine():
    text = Markov(vocab=64, order=1).sample(10_000, 1) + Markov(vocab=7, order=2, seed=5).sample(10_000, 2)
    assert hashlib.sha256(text).hexdigest() == "2c8a3a21fe742a6011cc5ec3c6a981538872cda368b3f42f012467be5d01f9d6"


def test_streams_and_seeds_differ():
    language = Markov(vocab=16)
    texts = {language.sample(500, 1), language.sample(500, 2), Markov(vocab=16, seed=1).sample(500, 1)}
    assert len(texts) == 3


@given(
    st.builds(
        Markov,
        vocab=st.integers(2, 64),
        order=st.integers(1, 2),
        alpha=st.floats(0, 4).map(lambda value: round(value, 3)),
        seed=st.integers(0, 999),
        size=st.integers(8, 10**7),
    )
)
def test_a_language_is_written_and_read(language):
    assert parse_markov(str(language)) == language


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vocab64-colour3", "unknown markov_text option 'colour3'"),
        ("vocab", "unknown markov_text option"),
        ("vocab1", "vocab is 2 … 256"),
        ("vocab300", "vocab is 2 … 256"),
        ("vocab65-order2", "2 … 64 at order 2"),
        ("order3", "order is 1 or 2"),
        ("alpha9", "alpha is 0 … 4"),
        ("size1.5", "size is int"),
        ("size3", "at least 8"),
    ],
)
def test_a_bad_option_is_named(text, message):
    with pytest.raises(UsageError, match=message):
        parse_markov(text)


def test_the_loaded_text_has_the_claimed_entropy_per_byte(tmp_path):
    data = load(DataConfig("markov_text/vocab16-size80000", data_dir=str(tmp_path)))
    language = Markov(vocab=16, size=80_000)
    assert data.entropy_per_byte == pytest.approx(language.entropy, abs=1e-12)
    assert data.name == "markov_text/vocab16-order1-alpha1.5-seed0-size80000/1.0.0"
    assert (data.train_bytes, data.eval_bytes) == (80_000, 10_000)
    # No separator: the text is one document, so that the entropy is exact.
    assert data.tokenizer.decode(data.train_tokens) == language.sample(80_000, 1)
    assert data.bits_per_byte(data.entropy_per_byte) == pytest.approx(language.entropy / np.log(2))
    assert data.tokenizer.decode(data.eval_tokens) not in data.tokenizer.decode(data.train_tokens)
