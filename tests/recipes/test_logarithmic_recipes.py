"""Logarithmic and power-law grids as recipes, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec import fake_quant, formats, recipes
from lowprec.recipes.library.logarithmic import power_law


@pytest.mark.parametrize(("name", "exponents"), [("lognet_4", 7), ("lognet_5", 15)])
def test_logarithmic_values_are_powers_of_two_rounded_in_the_logarithm(name, exponents):
    q = recipes.get(name).rules[-1].gemm.fwd[0]
    x = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    values = np.asarray(q.round(jnp.asarray(x), -1).values, np.float64)
    top = np.round(np.log2(np.abs(x).max()))
    logs = np.log2(np.abs(values[values != 0]))
    np.testing.assert_array_equal(logs, np.round(logs))
    assert logs.max() == top
    nearest = np.minimum(np.round(np.log2(np.abs(x.astype(np.float64)))), top)
    kept = nearest > top - exponents
    np.testing.assert_array_equal(np.abs(values[kept]), np.exp2(nearest[kept]))
    np.testing.assert_array_equal(np.sign(values[kept]), np.sign(x[kept]))
    assert np.all(values[~kept] == 0)


@pytest.mark.parametrize(("bits", "exponent"), [(4, 0.5), (3, 0.7), (8, 0.5)])
def test_a_power_law_rounds_where_it_is_equally_spaced(bits, exponent):
    grid, top = power_law(bits, exponent), 2 ** (bits - 1) - 1
    x = np.random.default_rng(0).uniform(-1, 1, 5000).astype(np.float32)
    steps = np.sign(x) * np.abs(x.astype(np.float64)) ** exponent * top
    clear = np.abs(np.abs(steps - np.trunc(steps)) - 0.5) > 1e-4  # no ties
    rounded = np.round(steps) / top
    expected = np.sign(rounded) * np.abs(rounded) ** (1 / exponent)
    np.testing.assert_allclose(np.asarray(formats.round_to(x, grid))[clear], expected[clear], rtol=1e-6)
    assert len(formats.value_table(grid)) == 2**bits - 1


def test_a_power_of_one_half_beats_equal_steps_on_heavy_tails():
    """What PowerQuant is for: four bits, one scale a tensor, Laplace."""
    q = recipes.get("powerquant_4").rules[-1].gemm.fwd[0]
    x = jax.random.laplace(jax.random.key(0), (256, 256))
    error = lambda y: float(jnp.sum((y - x) ** 2) / jnp.sum(x**2))
    equal = formats.parse("int4_symmetric@tensor")
    assert error(q.round(x, -1).values) < 0.5 * error(fake_quant(x, equal))
