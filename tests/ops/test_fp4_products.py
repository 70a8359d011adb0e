"""Products of the four-bit-float recipes: what is unbiased, and how large the bias is where something is not.

The error of the mean of n draws falls as 1/n down to the square of the bias. Relative squared errors of 512 × 512
products of Gaussian matrices; their sampling error is below 1 %, 3 % are allowed. Expected values: simulations over the
definitions of Quartet (arXiv 2505.14669), of Tseng et al. (2502.20586), UFP4 (2606.20381) and of FP4 training
(2501.17116).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec import recipes
from lowprec.ops import GemmRule, qdot
from lowprec.quantizers import Hadamard, OctaveMax, Quantizer, hadamard, inverse_hadamard

N = 512
X, W, DY = (np.asarray(jax.random.normal(jax.random.key(10 + i), (N, N)), np.float64) for i in range(3))


def relative(a, b):
    return float(np.sum((np.asarray(a, np.float64) - b) ** 2) / np.sum(b**2))


def alignment(a, b):
    return float(np.sum(np.asarray(a, np.float64) * b) / np.sum(b**2))


def products(rule, key):
    """(y, dx, dw)."""
    return _products(rule, key, *(jnp.float32(a) for a in (X, W, DY)))


# The matrices are arguments: of constants, XLA would sort the rows itself, which takes a minute.
@partial(jax.jit, static_argnums=0)
def _products(rule, key, x, w, dy):
    y, vjp = jax.vjp(lambda x, w: qdot(x, w, rule, key=key), x, w)
    return y, *vjp(dy)


def mean_of(rule, draws):
    """Of (y, dx, dw)."""
    total = [0.0] * 3
    for i in range(draws):
        found = products(rule, jax.random.key(i))
        total = [t + np.asarray(v, np.float64) for t, v in zip(total, found, strict=True)]
    return [t / draws for t in total]


def rule_of(name):
    return recipes.get(name).rules[-1].gemm


def both(rounding, rotation):
    q = Quantizer("mxfp4", rotation, rounding=rounding, scale=OctaveMax())
    return GemmRule(fwd=(q, q))


RHT32 = Hadamard(32, signs="random")


def test_mxfp4_rounded_stochastically_is_unbiased():
    rule = both("stochastic", RHT32)
    assert relative(products(rule, jax.random.key(0))[0], X @ W) == pytest.approx(0.0570, rel=0.03)
    mean = mean_of(rule, 64)[0]
    assert relative(mean, X @ W) == pytest.approx(0.0570 / 64, rel=0.05)
    assert alignment(mean, X @ W) == pytest.approx(1, abs=0.002)


def test_mxfp4_rounded_to_nearest_shrinks_though_signs_are_drawn_anew():
    rule = both("nearest_even", RHT32)
    assert relative(products(rule, jax.random.key(0))[0], X @ W) == pytest.approx(0.0276, rel=0.03)
    mean = mean_of(rule, 64)[0]
    assert 0.981 < alignment(mean, X @ W) < 0.985
    assert relative(mean, X @ W) == pytest.approx(0.0276 / 64 + (1 - alignment(mean, X @ W)) ** 2, rel=0.05)


def quartet_operands():
    """The saved operands of the forward product, in rotated coordinates, and where the gradient passes."""
    q = rule_of("quartet").fwd[0]
    x = hadamard(jnp.float32(X), 32, axis=1)
    w = hadamard(jnp.float32(W), 32, axis=0)
    rounded = q.round(x, 1), q.round(w, 0)
    masks = q.estimator.factor(x, rounded[0]), q.estimator.factor(w, rounded[1])
    return [np.asarray(v, np.float64) for v in (rounded[0].values, rounded[1].values, *masks)]


@pytest.mark.parametrize(
    ("name", "error", "aligned"),
    [("quartet", 0.057, (0.998, 1.002)), ("quartet_rtn", 0.0276, (0.981, 0.986))],
)
def test_the_backward_products_of_quartet_given_the_forward_values(name, error, aligned):
    """Of both gradients: without bias, or with that of rounding to nearest. Masked, then rotated back."""
    rule, draws = rule_of(name), 64
    means = mean_of(rule, draws)
    used_x, used_w, mask_x, mask_w = quartet_operands()
    back = lambda g, axis: np.asarray(inverse_hadamard(jnp.float32(g), 32, axis=axis), np.float64)
    exact = {1: back((DY @ used_w.T) * mask_x, 1), 2: back((used_x.T @ DY) * mask_w, 0)}
    y = products(rule, jax.random.key(0))[0]
    np.testing.assert_allclose(y, used_x @ used_w, atol=1e-3)
    for which, expected in exact.items():
        # Masked entries have no error: that of the others is of the same size as without a mask.
        assert relative(products(rule, jax.random.key(1))[which], expected) == pytest.approx(error, rel=0.05)
        mean = means[which]
        assert aligned[0] < alignment(mean, expected) < aligned[1]
        bias = 0 if name == "quartet" else (1 - alignment(mean, expected)) ** 2
        assert relative(mean, expected) == pytest.approx(error / draws + bias, rel=0.08)


def test_signs_work_only_before_the_rotation():
    """With new signs x · D · H has new rounding errors, whose mean vanishes; x · H · D has the same ones each time."""
    q = Quantizer("mxfp4", scale=OctaveMax())
    x = jnp.float32(X)

    @jax.jit
    def draw(key):
        signs = jnp.where(jax.random.bernoulli(key, 0.5, (N,)), 1.0, -1.0)
        before = inverse_hadamard(q.round(hadamard(x, 32, signs), -1).values, 32, signs)
        after = hadamard(q.round(hadamard(x, 32) * signs, -1).values * signs, 32)
        return before, after

    draws = [[np.asarray(v, np.float64) for v in draw(jax.random.key(i))] for i in range(64)]
    before, after = (np.mean([d[i] for d in draws], axis=0) for i in (0, 1))
    assert all(np.array_equal(d[1], draws[0][1]) for d in draws)
    assert relative(draws[0][0], X) == pytest.approx(0.0137, rel=0.03)
    assert relative(after, X) == pytest.approx(0.0137, rel=0.03)
    assert relative(before, X) < 0.4 * relative(after, X)


def test_tseng_has_an_exact_forward_and_an_unbiased_backward():
    rule = rule_of("tseng_mxfp4")
    y, dx, dw = products(rule, jax.random.key(0))
    assert relative(y, X @ W) < 1e-10
    means = mean_of(rule, 64)
    for which, single, exact in ((1, dx, DY @ W.T), (2, dw, X.T @ DY)):
        assert relative(single, exact) == pytest.approx(0.0570, rel=0.03)
        mean = means[which]
        assert relative(mean, exact) == pytest.approx(0.0570 / 64, rel=0.05)
        assert alignment(mean, exact) == pytest.approx(1, abs=0.002)


def test_the_uniform_grid_shrinks_less_than_that_of_e2m1():
    """Both rotated and rounded to nearest. The gradients of UFP4: dy without bias, the other operand nearly so."""
    rule = rule_of("ufp4")
    uniform, floats = ((replaced, replaced) for replaced in (rule.fwd[0], Quantizer("nvfp4", Hadamard(16, "random"))))
    shrinks = [1 - alignment(mean_of(GemmRule(fwd=pair), 16)[0], X @ W) for pair in (uniform, floats)]
    assert shrinks[1] == pytest.approx(0.009, abs=0.001) and abs(shrinks[0]) < 0.002
    means = mean_of(rule, 64)
    for which, exact in ((1, DY @ W.T), (2, X.T @ DY)):
        mean = means[which]
        assert alignment(mean, exact) == pytest.approx(1, abs=0.002)
        # Both rotations are drawn anew: the error of rounding to nearest averages away as well.
        assert relative(mean, exact) < 0.1 * relative(products(rule, jax.random.key(0))[which], exact)


def test_microsoft_fp4_by_its_definition():
    """FP4 forward with the outliers of x kept; FP8 backward of the forward values; the slope on dw alone."""
    rule = rule_of("ms_fp4")
    y, dx, dw = products(rule, None)
    x, w = rule.fwd[0].round(jnp.float32(X), 1), rule.fwd[1].round(jnp.float32(W), 0)
    used_x, used_w = (np.asarray(v.values, np.float64) for v in (x, w))
    np.testing.assert_allclose(y, used_x @ used_w, atol=1e-3)
    # Outliers beyond the 1 % quantiles are exact, and no scale is set by them.
    outer = np.abs(X) > 3
    assert np.max(np.abs(used_x - X)[outer]) < 0.45  # half of the widest gap, 2 · 2.6 / 6
    slope = np.asarray(rule.fwd[1].estimator.factor(jnp.float32(W), w), np.float64)
    # Two operands in fp8, the gradient in e5m2: .0028, the other in e4m3: .0007 or, of few-valued weights, less.
    assert relative(dx, DY @ used_w.T) == pytest.approx(0.0034, rel=0.2)
    assert relative(dw, (used_x.T @ DY) * slope) == pytest.approx(0.0034, rel=0.2)
    assert np.min(slope) == pytest.approx(0.2, rel=1e-3) and np.max(slope) == 3


def test_quest_of_four_bit_floats_has_the_least_error_of_its_grid_twice():
    assert relative(products(rule_of("quest_fp4"), None)[0], X @ W) == pytest.approx(2 * 0.0126849, rel=0.03)


@pytest.mark.parametrize("name", ["crossquant_int8", "zeroquant_fp", "zeroquant_fp_m1", "llm_fp4", "bitnet1"])
def test_recipes_for_the_forward_product_alone_have_the_gradients_of_its_operands(name):
    rule = rule_of(name)
    y, dx, dw = products(rule, None)
    x = X / np.sqrt(np.mean(X**2, axis=1, keepdims=True) + 1e-5) if rule.normalize_input else X
    used_x, used_w = (
        np.asarray(q.round(jnp.float32(v), axis).values, np.float64)
        for q, v, axis in zip(rule.fwd, (x, W), (1, 0), strict=True)
    )
    # An element or two of a tie may fall otherwise: one step of int8 in one of 512 terms.
    assert relative(y, used_x @ used_w) < 1e-6
    assert relative(dw, used_x.T @ DY) < 1e-6
    if not rule.normalize_input:
        assert relative(dx, DY @ used_w.T) < 1e-6
