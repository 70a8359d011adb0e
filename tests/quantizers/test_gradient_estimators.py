"""Gradient estimators as factors of the cotangent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec import formats, recipes
from lowprec.errors import UsageError
from lowprec.ops import GemmRule, qdot
from lowprec.ops.operand import Streams, rotate, unrotate
from lowprec.quantizers import EXACT, REUSE, Clip, DifferentiableGradient, Hadamard, Quantizer, StraightThrough, Trust


def factor(estimator, z, name):
    z = jnp.asarray(z, jnp.float32)
    return np.asarray(estimator.factor(z, Quantizer(name).round(z, -1)), np.float64)


@pytest.mark.parametrize(
    ("k", "cap", "mean"), [(5, 3.0, 0.5935), (5, np.inf, 1.0), (3, 3.0, 0.7778), (10, 3.0, 0.3832), (1, 3.0, 1.0)]
)
def test_the_mean_slope_over_a_cell(k, cap, mean):
    # u = v^k makes the uncapped integrand constant; the cell from -½ to ½ is exact about its middle.
    v = (np.arange(4096) + 0.5) / 4096
    found = factor(DifferentiableGradient(k, cap), v**k / 2, "int4_midrise")
    assert np.mean(found * k * v ** (k - 1)) == pytest.approx(mean, abs=1e-4)


def test_how_much_of_a_cell_is_capped():
    z = (np.arange(1 << 16) + 0.5) / (1 << 16) - 0.5
    assert np.mean(factor(DifferentiableGradient(), z, "int4_midrise") >= 3) == pytest.approx(0.0339, abs=1e-4)


@pytest.mark.parametrize("name", ["e2m1fn", "int4", "nf4", "e4m3fn", "int8"])
def test_the_slope_is_that_of_the_staircase(name):
    """By central differences of f(z) = low + δ/2 (1 + sgn(2t - 1) |2t - 1|^(1/k)), t = (z - low) / δ."""
    values, k = formats.value_table(name), 5
    z = np.random.default_rng(0).uniform(values[0], values[-1], 2000).astype(np.float32).astype(np.float64)

    def staircase(z, low, high):
        t = 2 * (z - low) / (high - low) - 1
        return low + (high - low) / 2 * (1 + np.sign(t) * np.abs(t) ** (1 / k))

    index = np.clip(np.searchsorted(values, z, side="right") - 1, 0, len(values) - 2)
    low, high = values[index], values[index + 1]
    h = 1e-6 * (high - low)
    clear = np.minimum.reduce([z - low, high - z, np.abs(z - (low + high) / 2)]) > 0.02 * (high - low)
    slopes = (staircase(z + h, low, high) - staircase(z - h, low, high)) / (2 * h)
    found = factor(DifferentiableGradient(k, 1e9), z, name)
    np.testing.assert_allclose(found[clear], slopes[clear], rtol=1e-4)
    assert clear.mean() > 0.8


def test_the_slope_at_elements_in_the_middle_and_beyond():
    values = formats.value_table("e2m1fn")
    middles = (values[:-1] + values[1:]) / 2
    np.testing.assert_allclose(factor(DifferentiableGradient(), values, "e2m1fn"), 0.2, rtol=1e-6)
    np.testing.assert_array_equal(factor(DifferentiableGradient(), middles, "e2m1fn"), 3)
    np.testing.assert_allclose(factor(DifferentiableGradient(), [-9.0, 7.0, 1e30], "e2m1fn"), 0.2, rtol=1e-6)


def test_it_sees_scaled_values():
    w = jax.random.normal(jax.random.key(0), (64, 16))
    q = Quantizer("e2m1fn@row", estimator=DifferentiableGradient())
    found = q.estimator.factor(w, q.round(w, 0))
    scale = jnp.max(jnp.abs(w), axis=0) / 6
    np.testing.assert_allclose(found, factor(q.estimator, w / scale, "e2m1fn"), rtol=2e-3)  # an ulp of z, where steep


@pytest.mark.parametrize("other", [EXACT, REUSE], ids=["original", "reuse"])
@pytest.mark.parametrize("rotation", [None, Hadamard(16, "random")], ids=str)
def test_the_gradient_of_both_operands_is_multiplied_in_the_coordinates_of_the_product(rotation, other):
    q = Quantizer("e2m1fn@row", rotation, estimator=DifferentiableGradient())
    rule = GemmRule(fwd=(q, q), dgrad=(EXACT, other), wgrad=(EXACT, other))
    plain = GemmRule(fwd=(Quantizer("e2m1fn@row", rotation),) * 2, dgrad=(EXACT, other), wgrad=(EXACT, other))
    x, w, dy = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(8, 64), (64, 16), (8, 16)]))
    key = jax.random.key(9)

    @jax.jit
    def gradients(key):
        under = lambda rule: jax.vjp(lambda x, w: qdot(x, w, rule, key=key), x, w)[1](dy)
        return under(rule), under(plain)

    with_factor, without = gradients(key)
    # Rotated by hand: the factor lies between the rotation and its inverse.
    streams = Streams(key)
    for name, source, axis, g, expected in zip(("fwd.x", "fwd.w"), (x, w), (-1, 0), without, with_factor, strict=True):
        h = rotate(q, source, name, streams)
        by_hand = unrotate(q, q.estimator.factor(h, q.round(h, axis)) * rotate(q, g, name, streams), name, streams, 64)
        np.testing.assert_allclose(expected, by_hand, rtol=1e-3, atol=1e-3)


def test_trust_and_clip_agree_where_steps_are_equal_and_only_there():
    x = np.random.default_rng(0).normal(size=10_000) * 4
    # Not near half a step, where the last bit of a difference decides.
    x = x[np.abs(np.abs(x - np.round(x)) - 0.5) > 1e-3]
    np.testing.assert_array_equal(factor(Trust(0.5), x, "int4"), factor(Clip(0.5), x, "int4"))
    z = [2.3, 2.5, 3.45, 4.3, 5.0, 6.3, 6.5]
    np.testing.assert_array_equal(factor(Trust(0.4), z, "e2m1fn"), [1, 0, 0, 1, 0, 1, 0])
    np.testing.assert_array_equal(factor(Clip(0.4), z, "e2m1fn"), [1, 1, 1, 1, 1, 1, 0])


def test_quest_of_four_bit_floats_reaches_the_least_error_of_its_grid_and_keeps_what_it_trusts():
    q = recipes.get("quest_fp4").rules[-1].gemm.fwd[0]
    x = jax.random.normal(jax.random.key(0), (1024, 1024))
    rounded = jax.jit(lambda x: (lambda r: (r.values, q.estimator.factor(x, r)))(q.round(x, -1)))(x)
    assert float(jnp.sum((rounded[0] - x) ** 2) / jnp.sum(x**2)) == pytest.approx(0.0126849, rel=0.01)
    # The mass of N(0, 1) farther than 6/15 from the nearest element, with elements 0.487079 apart.
    grid = np.linspace(-12, 12, 2_000_001)
    density = np.exp(-((grid * 0.487079) ** 2) / 2) / np.sqrt(2 * np.pi) * 0.487079
    distance = np.min([np.abs(np.abs(grid) - v) for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)], axis=0)
    kept = np.sum(density * (distance <= 0.4)) * (grid[1] - grid[0])
    assert float(jnp.mean(rounded[1])) == pytest.approx(kept, abs=1e-3)


def test_the_straight_path_has_no_factor():
    assert StraightThrough().factor(jnp.ones(4), Quantizer("int4").round(jnp.ones(4), 0)) is None


def test_a_staircase_needs_steps():
    with pytest.raises(UsageError, match="k >= 1"):
        DifferentiableGradient(k=0.5)
