"""Stochastic rounding: exact probabilities, counted over all random words, not only averages over draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from number_line import NumberLine
from op_by_op import round_to
from scipy import stats

from lowprec import formats
from lowprec.formats import BlockFormat, FloatFormat, Rounding, TableFormat, elements, random_bits
from lowprec.formats.random import draw_keys, next_key

NAMES = [
    name
    for name in formats.names()
    if not isinstance(formats.parse(name), BlockFormat) and formats.parse(name).bits <= 16 and name != "e8m0fnu"
]
NAMES = [name for name in NAMES if "int" not in name or name in ("int2", "int4", "int8", "int16", "uint5", "uint8")]
FLOATS = [name for name in NAMES if isinstance(formats.parse(name), FloatFormat)]
PER_NAME = 512  # inputs


def inputs(name, grid_bits=None):
    """float32 numbers inside the range, exact ones too, and down to 2^-40 smallest values; with their neighbours.

    Returns (x, toward zero, away from zero, dropped fraction δ); all float64, δ exact. In a cell around zero, which
    formats without a zero have, its lower end stands for toward zero.
    """
    fmt, random = formats.parse(name), np.random.default_rng(len(name))
    line = NumberLine(fmt)
    values = line.finite
    index = random.integers(0, len(values) - 1, PER_NAME // 2)
    part = (
        random.random(index.size) if grid_bits is None else random.integers(0, 2**grid_bits, index.size) / 2**grid_bits
    )
    between = values[index] + (values[index + 1] - values[index]) * part
    below = fmt.min_subnormal * np.exp2(-40 * random.random(PER_NAME // 4)) * random.choice([-1, 1], PER_NAME // 4)
    if isinstance(fmt, TableFormat):  # whose δ is a float32 quotient, not exact near zero
        below = np.zeros_like(below)
    exact = random.choice(values, PER_NAME - between.size - below.size)
    x = np.concatenate([between, np.clip(below, values[0], values[-1]), exact]).astype(np.float32)
    x = np.clip(x.astype(np.float64), values[0], values[-1])
    down, up = line.round(x, "down"), line.round(x, "up")
    mirrored = (x < 0) & (up <= 0)
    near, far = np.where(mirrored, up, down), np.where(mirrored, down, up)
    gap = np.where(far == near, 1, far - near)
    return x, near, far, (x - near) / gap


def away(name, rounding, x, near, words):
    """Where the result is not the neighbour toward zero, for given 32-bit random words."""
    x, words = jnp.asarray(x, jnp.float32), jnp.asarray(words, jnp.uint32)
    y = elements.round_elements(x, formats.parse(name), rounding, words)
    return np.asarray(y) != np.float32(near)


@pytest.mark.parametrize("name", [*FLOATS, "int4", "int8", "uint8"])
def test_of_all_2_to_the_32_random_words_exactly_delta_move_the_value(name):
    x, near, _, delta = inputs(name)
    moving = np.floor(delta * 2.0**31) * 2  # words; δ is kept to 31 bits
    first = (2.0**32 - moving).astype(np.uint64)  # the smallest word that moves, if any does
    random = np.random.default_rng(0)
    for _ in range(4):
        below = (random.random(x.size) * first).astype(np.uint64)  # any word that must not move it
        above = first + (random.random(x.size) * (2**32 - first)).astype(np.uint64)
        for words, expected in ((below, False), (above, True), (first - 1, False), (first, True)):
            valid = (words < 2**32) & (moving > 0 if expected else True)
            moved = away(name, Rounding("stochastic"), x, near, np.where(valid, words, 0).astype(np.uint32))
            assert (moved == expected)[valid].all()


FORMULAS = {
    "A": lambda delta, k: np.floor(delta * 2**k),
    "B": lambda delta, k: np.floor(delta * 2**k + 0.5),
    "C": lambda delta, k: np.rint(delta * 2**k),  # half to even
}


@pytest.mark.parametrize("variant", FORMULAS)
@pytest.mark.parametrize("name", [*FLOATS, "int4", "int8", "uint8", "ternary", "binary"])
def test_few_random_bits_move_the_value_as_often_as_the_formula_says(name, variant):
    for grid_bits in (None, 9):  # any δ, and those with ties in the rounding of δ itself
        x, near, _, delta = inputs(name, grid_bits)
        for k in (1, 2, 3, 4, 8):
            r = np.arange(256, dtype=np.uint32)[:, None] % 2**k  # all R, each equally often
            words = np.broadcast_to(r << (32 - k), (256, x.size))
            moved = away(name, Rounding("stochastic", k, variant), x[None], near[None], words)
            np.testing.assert_array_equal(moved.sum(0) * 2**k // 256, FORMULAS[variant](delta, k))


@pytest.mark.parametrize("name", NAMES)
def test_equal_odds_for_both_neighbours_and_exact_values_stay(name):
    x, near, _, delta = inputs(name)
    rounding = Rounding("stochastic_equal")
    zeros, ones = (away(name, rounding, x, near, np.full(x.shape, word)) for word in (0, 0xFFFFFFFF))
    inexact = delta > 0
    assert (zeros ^ ones)[inexact].all() and not (zeros | ones)[~inexact].any()
    words = random_bits(jax.random.key(1), (1 << 16,))
    assert stats.binomtest(int((words >> 31).sum()), words.size).pvalue > 1e-6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "rounding", ["stochastic", "stochastic[1A]", "stochastic[4B]", "stochastic[8]", "stochastic_equal"]
)
def test_values_of_the_format_never_move_and_results_stay_in_it(name, rounding):
    finite = NumberLine(formats.parse(name)).finite
    values = np.resize(np.random.default_rng(0).permutation(finite), 4096).astype(np.float32)
    key = jax.random.key(0)
    np.testing.assert_array_equal(round_to(values, name, rounding=rounding, key=key), values)
    beyond = np.resize(np.array([1e30, -1e30, np.inf, -np.inf, 3e38, 1e-45], np.float32), 4096)
    y = round_to(beyond, name, rounding=rounding, key=key)
    assert np.isin(y, np.float32(finite)).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_mean_of_many_draws_is_the_value(name):
    # 2^18 draws of each; a fair coin fails this once in 3·10^6 numbers.
    x, near, far, delta = inputs(name)
    fmt = formats.parse(name)
    tiny = np.where((np.abs(x) < fmt.min_subnormal) & (delta > 2**-13) & (delta < 0.1))[0][:2]
    chosen = np.concatenate([np.where((delta > 0.1) & (delta < 0.9))[0][:4], tiny]).astype(int)
    chosen = np.resize(chosen, 6)
    rows = np.broadcast_to(np.float32(x[chosen])[:, None], (6, 1 << 18))
    y = round_to(rows, fmt, rounding="stochastic", key=jax.random.key(3))
    moved = y != np.float32(near[chosen])[:, None]
    assert np.isin(y, np.float32(np.stack([near[chosen], far[chosen]]))).all()
    for count, p in zip(moved.sum(1), delta[chosen], strict=True):
        assert stats.binomtest(int(count), 1 << 18, p).pvalue > 3e-7


def coin(key, shape=(1 << 20,)):
    """±1 of each element: whether ½ is rounded up."""
    return np.asarray(formats.round_to(jnp.full(shape, 0.5), "int4", rounding="stochastic", key=key)) * 2 - 1


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey], ids=["typed", "legacy"])
def test_keys_and_positions_are_independent(make_key):
    # Correlations of n fair coins are normal with deviation 1/√n; 5 deviations: one in 1.7 million.
    keys = [make_key(0), make_key(1), make_key(2), *jax.random.split(make_key(0)), jax.random.fold_in(make_key(0), 2)]
    streams = np.stack([coin(key) for key in keys])
    n = streams.shape[1]
    bound = 5 / np.sqrt(n)
    assert np.abs(streams.mean(1)).max() < bound
    correlation = streams @ streams.T / n
    assert np.abs(correlation - np.eye(len(keys))).max() < bound
    first = streams[0]
    for lag in (1, 2, 3, 16, 32, 128, 1024, 65536):
        assert abs((first[lag:] * first[:-lag]).mean()) < 5 / np.sqrt(n - lag)


def test_every_bit_of_the_random_words_is_a_fair_coin_and_bytes_are_uniform():
    words = np.asarray(random_bits(jax.random.key(7), (1 << 20,)))
    for bit in range(32):
        assert stats.binomtest(int(((words >> bit) & 1).sum()), words.size).pvalue > 1e-6
    counts = np.bincount(words.view(np.uint8), minlength=256)
    assert stats.chisquare(counts).pvalue > 1e-6


@pytest.mark.parametrize("generator", ["hash", "threefry"])
def test_typed_and_legacy_keys_give_the_same_bits(generator):
    for seed in (0, 1, 12345):
        typed = random_bits(jax.random.key(seed), (3, 5), generator)
        np.testing.assert_array_equal(typed, random_bits(jax.random.PRNGKey(seed), (3, 5), generator))


def test_the_bits_depend_on_the_index_in_the_whole_array_only():
    key = jax.random.key(0)
    flat = random_bits(key, (24,))
    np.testing.assert_array_equal(random_bits(key, (2, 3, 4)).reshape(-1), flat)
    np.testing.assert_array_equal(jax.jit(random_bits, static_argnums=1)(key, (24,)), flat)


@pytest.mark.parametrize("words", [1, 8, 24, 60, 1 << 32])
def test_no_index_repeats_where_one_word_cannot_count_the_elements(words):
    low, high = (np.broadcast_to(w, (3, 4, 5)) for w in formats.random._flat_index((3, 4, 5), words))
    assert low.max() < words
    assert len(set(zip(low.flat, high.flat, strict=True))) == 60


def test_stochastic_rounding_without_a_key_says_so():
    for call in (formats.round_to, formats.encode):
        with pytest.raises(ValueError, match=r"stochastic\[8\] rounding needs a key"):
            call(jnp.ones(3), "e4m3fn", rounding="stochastic[8]")


def test_keys_drawn_together_are_those_folded_one_by_one():
    for key in (jax.random.key(3), jax.random.PRNGKey(3)):
        drawn = draw_keys(key, 5)
        for index in (0, 1, 4):
            own = jax.random.fold_in(key, index)
            np.testing.assert_array_equal(random_bits(drawn[index], (7, 3)), random_bits(own, (7, 3)))
            np.testing.assert_array_equal(random_bits(next_key(drawn[index]), (5,)), random_bits(next_key(own), (5,)))
