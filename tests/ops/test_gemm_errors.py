"""Errors of quantized products of Gaussian matrices: constants that follow from the formats, and no bias where none is.

Expected values: exact integrals and simulations over the definitions of the methods; relative squared error of the
product. 512 × 512 results of sums over 512 leave a sampling error below 1 %; 3 % are allowed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec import recipes
from lowprec.ops import GemmRule, qdot
from lowprec.quantizers import AbsMax, Quantizer, inside

N = 512
X, W, DY = (np.asarray(jax.random.normal(jax.random.key(i), (N, N)), np.float64) for i in range(3))


def relative(a, b):
    return float(np.sum((np.asarray(a, np.float64) - b) ** 2) / np.sum(b**2))


def alignment(a, b):
    return float(np.sum(np.asarray(a, np.float64) * b) / np.sum(b**2))


def gradients(rule):
    x, w, dy = (jnp.float32(a) for a in (X, W, DY))

    @jax.jit
    def run(key):
        y, vjp = jax.vjp(lambda x, w: qdot(x, w, rule, key=key), x, w)
        return y, *vjp(dy)

    return run


def rule_of(name):
    return recipes.get(name).rules[-1].gemm


def operand(quantizer, x, axis):
    return np.asarray(quantizer.round(jnp.float32(x), axis).values, np.float64)


def test_fp8():
    y, dx, _ = gradients(rule_of("fp8"))(jax.random.key(0))
    assert relative(y, X @ W) == pytest.approx(0.00138, rel=0.03)
    assert relative(dx, DY @ W.T) == pytest.approx(0.00344, rel=0.03)


def mean_of(run, draws, which):
    total = [0.0] * len(which)
    for i in range(draws):
        results = run(jax.random.key(i))
        total = [t + np.asarray(results[j], np.float64) for t, j in zip(total, which, strict=True)]
    return [t / draws for t in total]


def test_nvfp4_rounded_stochastically_with_headroom_is_unbiased():
    """With the scale rounded down by up to 1/16, headroom 17/16 keeps every value inside: the error falls as 1/n."""
    q = Quantizer("nvfp4", rounding="stochastic", scale=AbsMax(17 / 16))
    run = gradients(GemmRule(fwd=(q, q)))
    assert relative(run(jax.random.key(0))[0], X @ W) == pytest.approx(0.0475, rel=0.03)
    (mean,) = mean_of(run, 64, [0])
    assert relative(mean, X @ W) == pytest.approx(0.0475 / 64, rel=0.12)
    assert alignment(mean, X @ W) == pytest.approx(1, abs=0.001)


def test_nvidia_recipe_has_an_unbiased_dgrad_and_a_biased_wgrad():
    """dy is rounded stochastically, but the activations of wgrad to nearest: their error stays, however many draws."""
    rule = rule_of("nvfp4")
    run = gradients(rule)
    used_w = operand(rule.fwd[1], W, 0)
    _, dx, dw = run(jax.random.key(0))
    _, mean_dx, mean_dw = (None, *mean_of(run, 64, [1, 2]))
    # The recipe has no headroom: amax / scale may exceed 6 and clips, a bias of -.0035 of dy that averaging leaves.
    single = relative(dx, DY @ used_w.T)
    assert single == pytest.approx(0.0189, rel=0.03)
    assert alignment(mean_dx, DY @ used_w.T) == pytest.approx(1 - 0.0035, abs=0.001)
    assert relative(mean_dx, DY @ used_w.T) < 0.0189 / 64 + 0.0035**2 + 0.0004
    assert relative(dw, X.T @ DY) == pytest.approx(0.0189 + 0.0090, rel=0.03)
    assert relative(mean_dw, X.T @ DY) == pytest.approx(0.0094, rel=0.05)


@pytest.mark.parametrize(
    ("name", "error", "tolerance", "aligned"),
    [
        ("quartet2", 0.0198, 0.1, 0.999),  # as published: .9985 to .9995
        ("tetrajet", 0.0475, 0.12, 1.0),  # as two operands rounded stochastically
    ],
)
def test_the_backward_products_are_unbiased_given_the_forward_values(name, error, tolerance, aligned):
    rule = rule_of(name)
    run = gradients(rule)
    used_x, used_w = operand(rule.fwd[0], X, 1), operand(rule.fwd[1], W, 0)
    _, dx, dw = run(jax.random.key(0))
    mean_dx, mean_dw = mean_of(run, 64, [1, 2])
    for single, mean, exact in ((dx, mean_dx, DY @ used_w.T), (dw, mean_dw, used_x.T @ DY)):
        assert relative(single, exact) == pytest.approx(error, rel=0.03)
        assert relative(mean, exact) == pytest.approx(error / 64, rel=tolerance)
        assert alignment(mean, exact) == pytest.approx(aligned, abs=0.001)


def test_fp4_all_the_way_has_an_unbiased_wgrad_and_a_biased_dgrad():
    """Both operands of wgrad are rounded stochastically; the weights of dgrad to nearest, whose error stays."""
    run = gradients(rule_of("fp4_all_the_way"))
    mean_dx, mean_dw = mean_of(run, 64, [1, 2])
    assert relative(mean_dw, X.T @ DY) == pytest.approx(0.0475 / 64, rel=0.12)
    assert alignment(mean_dw, X.T @ DY) == pytest.approx(1, abs=0.001)
    assert relative(mean_dx, DY @ W.T) == pytest.approx(0.00903 + 0.0239 / 64, rel=0.05)
    assert alignment(mean_dx, DY @ W.T) == pytest.approx(1 - 0.0045, abs=0.001)


def test_ternary_weights_of_trilm_alone():
    y, dx, dw = gradients(rule_of("trilm"))(jax.random.key(0))
    used_w = operand(rule_of("trilm").fwd[1], W, 0)
    assert relative(y, X @ used_w) < 1e-10 and relative(dx, DY @ used_w.T) < 1e-10
    assert relative(dw, X.T @ DY) < 1e-10


@pytest.mark.parametrize("bits", [1, 4, 7])
def test_cut_mantissas_are_those_of_masked_bits(bits):
    y, dx, dw = gradients(rule_of(f"mantissa_{bits}"))(jax.random.key(0))
    mask = np.uint32(0xFFFFFFFF << (23 - bits) & 0xFFFFFFFF)
    cut = lambda a: (np.float32(a).view(np.uint32) & mask).view(np.float32).astype(np.float64)
    for found, exact in ((y, cut(X) @ cut(W)), (dx, cut(DY) @ cut(W).T), (dw, cut(X).T @ cut(DY))):
        assert relative(found, exact) < 1e-10


@pytest.mark.parametrize("name", ["int8_full", "nvfp4", "quartet2"])
def test_the_gradient_error_falls_as_one_over_the_number_of_draws_where_rounding_is_stochastic(name):
    run = gradients(rule_of(name))
    mean_of_many = mean_of(run, 64, [1])[0]
    one, eight = np.asarray(run(jax.random.key(100))[1], np.float64), mean_of(run, 8, [1])[0]
    ratio = np.sum((eight - mean_of_many) ** 2) / np.sum((one - mean_of_many) ** 2)
    # Var(mean of 8 - mean of 64, overlapping) / Var(one - mean of 64) = (1/8 - 1/64) / (1 + 1/64)
    assert ratio == pytest.approx((1 / 8 - 1 / 64) / (1 + 1 / 64), rel=0.1)


@pytest.mark.parametrize(
    ("bits", "error"), [(1, 0.363380), (2, 0.118846), (3, 0.0374397), (4, 0.0115429), (8, 8.76862e-5)]
)
def test_quest_reaches_the_least_error_of_its_grid_and_masks_what_it_should(bits, error):
    q = rule_of(f"quest_{bits}").fwd[0]
    x = jax.random.normal(jax.random.key(9), (2048, 1024))
    rounded = jax.jit(lambda x: q.round(x, -1).values)(x)
    assert relative(rounded, np.asarray(x, np.float64)) == pytest.approx(error, rel=0.01)
    everywhere = jnp.concatenate([jnp.zeros(2**18), jnp.linspace(-9, 9, 2**13)])[None]  # rms 0.9: beyond every clip
    assert len(np.unique(q.round(everywhere, -1).values)) == 2**bits
    kept = float(jnp.mean(inside(x, q.round(x, -1), q.estimator.margin)))
    published = {1: 0.8895, 2: 0.9536, 3: 0.9809, 4: 0.9927, 8: 0.99992}[bits]
    assert kept == pytest.approx(published, abs=0.001)


def test_bitnet_weights():
    q = rule_of("bitnet158").fwd[1]
    w = jax.random.normal(jax.random.key(5), (1024, 1024))
    rounded = q.round(w, 0).values
    assert float(jnp.mean(rounded == 0)) == pytest.approx(0.310, abs=0.003)
    assert float(jnp.mean((rounded - w) ** 2)) == pytest.approx(0.2634, abs=0.001)
