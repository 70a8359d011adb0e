"""Differentiable clusters: the table is the dense form, the clusters are those of k-means, little is kept for later."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec import recipes
from lowprec.quantizers.clustering import (
    PATTERNS,
    SoftClusters,
    _moments,
    _nearest,
    _soft,
    all_patterns,
    look_up,
    pattern_index,
    sum_up,
)

FORMAT = recipes.parse("fwd=uint3@tensor").rule_for("x").fwd[1].format
W = jnp.asarray(np.random.default_rng(0).normal(size=3000), jnp.bfloat16).astype(jnp.float32)
G = jnp.asarray(np.random.default_rng(1).normal(size=3000), jnp.float32)
# As many weights as there are patterns: XLA compiles the same loops for both forms, and bits can be compared.
ROW, ROW_G = jnp.resize(W, PATTERNS), jnp.asarray(np.random.default_rng(4).normal(size=PATTERNS), jnp.float32)
CENTROIDS, TAU = jnp.linspace(-1.5, 1.7, 8), jnp.float32(0.05)


def test_a_pattern_is_the_place_of_its_value_in_the_table():
    codes = np.arange(PATTERNS, dtype=np.uint16)
    values = (codes.astype(np.uint32) << 16).view(np.float32)
    finite = np.isfinite(values)
    found = np.asarray(jax.jit(all_patterns)())
    np.testing.assert_array_equal(found[finite].view(np.uint32), values[finite].view(np.uint32))
    assert not found[~finite].any()
    np.testing.assert_array_equal(pattern_index(jnp.asarray(values[finite])), codes[finite])


@pytest.mark.parametrize("rows", [_soft, lambda w, c, tau: _nearest(w, c)], ids=["soft", "nearest"])
def test_looking_up_is_computing_bit_for_bit(rows):
    """The values. Gradients but for float32 rounding: that of a weight is a difference of terms up to |g| · max|c| / τ,
    4.5 · 34, eight roundings of 2^-24 each are 7e-5; that of the centroids is a sum of 65536 terms in another order,
    √65536 of them off by 2^-24 · √65536 each.
    """
    form = jax.jit(lambda w, *p: look_up(rows, w, pattern_index(w), *p))
    np.testing.assert_array_equal(form(ROW, CENTROIDS, TAU), jax.jit(rows)(ROW, CENTROIDS, TAU))
    (_, vjp), (_, table_vjp) = (jax.vjp(each, ROW, CENTROIDS, TAU) for each in (jax.jit(rows), form))
    (dw, *rest), (table_dw, *table_rest) = vjp(ROW_G), table_vjp(ROW_G)
    np.testing.assert_allclose(table_dw, dw, rtol=0, atol=7e-5)
    for found, expected in zip(table_rest, rest, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=4e-3)


def test_summing_up_is_the_sum():
    """In another order, within the float32 rounding of sums of 65536; ten operations for the gradient of a weight."""
    g = jnp.asarray(np.random.default_rng(2).normal(size=16), jnp.float32)
    dense, vjp = jax.vjp(jax.jit(lambda *a: jnp.sum(_moments(*a), axis=0)), ROW, CENTROIDS, TAU)
    table, table_vjp = jax.vjp(jax.jit(lambda w, *p: sum_up(_moments, w, pattern_index(w), *p)), ROW, CENTROIDS, TAU)
    np.testing.assert_allclose(table, dense, rtol=1e-5, atol=1e-2)
    (dw, *rest), (table_dw, *table_rest) = vjp(g), table_vjp(g)
    np.testing.assert_allclose(table_dw, dw, rtol=1e-5, atol=1e-5)
    for found, expected in zip(table_rest, rest, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-2)


def outcome(rule, w, g):
    values, vjp = jax.vjp(lambda w: rule.quantize(w, FORMAT, -2, {}, {}, None)[0], w)
    return values, vjp(g)[0]


@pytest.mark.parametrize("snapped", [True, False])
def test_the_forms_agree_on_values_and_gradients(snapped):
    """Sums of 3000 in another order differ by 2^-24 · √3000 = 3e-6, which the iterations of the centroids may amplify
    tenfold; no weight here lies so near the middle of two centroids.
    """
    w, g = W.reshape(50, 60), G.reshape(50, 60)
    dense, table = (
        jax.jit(partial(outcome, SoftClusters(snapped=snapped, form=form)))(w, g) for form in ("dense", "table")
    )
    np.testing.assert_allclose(table[0], dense[0], rtol=0, atol=3e-5)
    np.testing.assert_allclose(table[1], dense[1], rtol=1e-3, atol=1e-4)


def test_the_gradient_is_that_of_the_soft_values_with_the_fixed_point_held():
    """By differences in float64; τ is wide, so that the attention is smooth on the way."""
    rule = SoftClusters(temperature=0.5, snapped=False, form="table")
    w, g = np.asarray(W[:40], np.float64), np.asarray(G[:40], np.float64)
    mean, spread = w.mean(), w.std()

    def attention(w, c):
        e = np.exp(-np.abs(w[:, None] - c) / (0.5 * spread))
        return e / e.sum(1, keepdims=True)

    def update(w, c):
        a = attention(w, c)
        return (a * w[:, None]).sum(0) / a.sum(0)

    from statistics import NormalDist

    c = mean + spread * np.array([NormalDist().inv_cdf((k + 0.5) / 8) for k in range(8)])
    for _ in range(30):
        before, c = c, update(w, c)
        if np.abs(c - before).max() <= 1e-3 * spread:
            break
    soft = lambda w: attention(w, update(w, c)) @ update(w, c)
    values, dw = jax.jit(partial(outcome, rule))(jnp.asarray(w, jnp.float32), jnp.asarray(g, jnp.float32))
    np.testing.assert_allclose(values, soft(w), rtol=1e-3, atol=1e-3)
    h, numeric = 1e-6, np.empty(40)
    for i in range(40):
        step = h * (np.arange(40) == i)
        numeric[i] = g @ (soft(w + step) - soft(w - step)) / (2 * h)
    # |w - c| has a kink where they meet: one weight a centroid may lie there.
    close = np.isclose(dw, numeric, rtol=2e-2, atol=5e-3)
    assert close.mean() > 0.85


def test_snapped_values_are_the_nearest_of_eight_and_soft_ones_lie_between():
    snapped = np.asarray(jax.jit(partial(outcome, SoftClusters()))(W, G)[0])
    centroids = np.unique(snapped)
    assert centroids.size == 8
    np.testing.assert_array_equal(snapped, centroids[np.abs(np.asarray(W)[:, None] - centroids).argmin(1)])
    soft = np.asarray(jax.jit(partial(outcome, SoftClusters(snapped=False)))(W, G)[0])
    assert np.unique(soft).size > 100 and soft.min() >= centroids[0] and soft.max() <= centroids[-1]


def test_sharp_clusters_of_gaussian_weights_have_the_error_of_the_best_eight_levels():
    """Lloyd and Max: 0.03454 of the variance; of 200 000 draws, and of centroids that settled to a thousandth."""
    w = jnp.asarray(np.random.default_rng(3).normal(size=200_000), jnp.float32)
    rule = SoftClusters(temperature=0.01, iterations=300)
    values, _ = jax.jit(lambda w: rule.quantize(w, FORMAT, -1, {}, {}, None))(w)
    assert float(jnp.mean((w - values) ** 2)) == pytest.approx(0.03454, rel=0.02)


def kept_bytes(form, size):
    """What the backward pass takes from the forward one, each array once."""
    rule = SoftClusters(form=form)
    _, vjp = jax.vjp(lambda w: rule.quantize(w, FORMAT, -1, {}, {}, None)[0], jnp.linspace(-1.0, 1.0, size))
    return sum({id(leaf): leaf.nbytes for leaf in jax.tree.leaves(vjp)}.values())


def test_the_table_keeps_two_bytes_a_weight():
    """And the dense form at least the attention, twice, and the distances: floats for each of the eight clusters."""
    small, large = 1 << 12, 1 << 13
    growth = {
        form: (kept_bytes(form, large) - kept_bytes(form, small)) / (large - small) for form in ("dense", "table")
    }
    assert growth["table"] == 2
    assert growth["dense"] > 3 * 8 * 4


def test_equal_and_broken_weights():
    equal = jnp.full((4, 4), 0.3)
    values, dw = outcome(SoftClusters(), equal, jnp.ones((4, 4)))
    np.testing.assert_allclose(values, 0.3, rtol=5e-3)
    assert np.all(np.isfinite(dw))
    assert np.isnan(SoftClusters().quantize(equal.at[0, 0].set(jnp.nan), FORMAT, -1, {}, {}, None)[0][0, 0])


@pytest.mark.parametrize("fmt", ["int3@tensor", "uint3@row", "e2m1fn@tensor", "uint3"])
def test_formats_that_number_no_clusters_are_refused(fmt):
    other = recipes.parse(f"fwd={fmt}").rule_for("x").fwd[1].format
    with pytest.raises(ValueError, match="clusters are numbered by unsigned integers"):
        SoftClusters().quantize(W, other, -1, {}, {}, None)
    with pytest.raises(ValueError, match="unknown form of soft clusters 'tabel'; did you mean table"):
        SoftClusters(form="tabel")
