"""Code books that arithmetic serves: the results of the search and the look-up, bit for bit."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lowprec import formats
from lowprec.formats import tables
from lowprec.formats.random import _flat_index
from lowprec.formats.rounding import Rounding

NAMES = ("de8", "ude8", "log8", "log4", "lin4", "cmp8", "ucmp8", "ude5", "cmp3")
ROUNDINGS = ("nearest_even", "nearest_away", "nearest_zero", "up", "down", "stochastic")


def probes(fmt, random):
    """Values, what lies between them, their neighbours in float32; numbers of all sizes, subnormal ones too."""
    values = np.asarray(fmt.values, np.float32)
    halfway = (values[:-1].astype(np.float64) + values[1:]) / 2
    x = np.concatenate([values, halfway.astype(np.float32), np.asarray(fmt.midpoints or (), np.float32)])
    x = np.concatenate([x, -x])
    x = np.concatenate([(x.view(np.int32) + step).view(np.float32) for step in range(-2, 3)])
    inside = np.exp2(random.uniform(-26, 0.1, 20000)) * random.choice([-1, 1], 20000)
    anything = random.integers(0, 1 << 32, 5000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    special = [0.0, -0.0, 1e-45, -1e-45, 1e-39, -1e-39, np.inf, -np.inf, np.nan]
    return np.concatenate([x, inside.astype(np.float32), anything, np.float32(special)])


@pytest.mark.parametrize("name", NAMES)
def test_arithmetic_gives_the_bits_of_the_table(name):
    fmt = formats.parse(name)
    assert fmt.closed_form is not None
    table = replace(fmt, closed_form=None)
    random = np.random.default_rng(0)
    x = probes(fmt, random)
    words = random.integers(0, 1 << 32, x.size, dtype=np.uint64).astype(np.uint32)

    def results(x, words, fmt):
        outcome = {}
        for kind in ROUNDINGS:
            y = tables.round_table(x, fmt, Rounding(kind), words)
            outcome[kind] = (
                lax.bitcast_convert_type(y, jnp.uint32),
                tables.round_to_codes(x, fmt, Rounding(kind), words),
            )
        return outcome, tables.decode_table(jnp.arange(len(fmt.values), dtype=jnp.uint32), fmt)

    computed, decoded = jax.jit(results, static_argnums=2)(x, words, fmt)
    found, _ = jax.jit(results, static_argnums=2)(x, words, table)
    np.testing.assert_array_equal(decoded, np.float32(fmt.values))
    for kind in ROUNDINGS:
        for ours, theirs in zip(computed[kind], found[kind], strict=True):
            np.testing.assert_array_equal(ours, theirs, err_msg=kind)


@pytest.mark.parametrize("name", ["de8", "log8", "cmp8", "ucmp8", "de4", "log4", "lin4"])
def test_neither_gathers_nor_loops_are_compiled(name):
    fmt = formats.parse(name)
    store_and_load = lambda x: tables.decode_table(tables.round_to_codes(x, fmt, Rounding()), fmt)
    text = jax.jit(store_and_load).lower(jax.ShapeDtypeStruct((64,), jnp.float32)).as_text()
    assert "gather" not in text
    assert "while" not in text


@pytest.mark.parametrize("name", ["de8", "ude8", "de4", "ude4", "lin4"])
def test_nearest_is_the_least_distance_in_float64(name):
    values = formats.value_table(name)
    x = np.random.default_rng(0).uniform(min(values[0], 0), 1, 4096).astype(np.float32)
    distance = np.abs(x.astype(np.float64)[:, None] - values)
    codes = np.asarray(formats.encode(x, name)).astype(int)
    np.testing.assert_array_equal(distance[np.arange(x.size), codes], distance.min(axis=1))


def test_parts_of_an_array_have_the_random_bits_of_the_whole():
    key = jax.random.key(3)
    whole = np.asarray(formats.random_bits(key, (6, 3, 5)))
    part = jax.jit(lambda first: formats.random_bits(key, (2, 3, 5), rows=(first, 6)))
    for first in range(5):
        np.testing.assert_array_equal(part(first), whole[first : first + 2])
    # Two rows of six, of which four elements fill the first word: as if there were more than 2^32.
    for ours, theirs in zip(_flat_index((2, 3), 4, 6, 1), _flat_index((6, 3), 4), strict=True):
        np.testing.assert_array_equal(np.broadcast_to(ours, (2, 3)), np.broadcast_to(theirs, (6, 3))[1:3])
    with pytest.raises(ValueError, match="threefry"):
        formats.random_bits(key, (2, 5), "threefry", rows=(0, 6))
