"""The variance of stochastic rounding, and the ratio of a gradient to it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec import formats
from lowprec.quantizers import (
    AbsMax,
    OctaveMax,
    OperandStatistics,
    Quantizer,
    error_sums,
    gradient_to_noise,
    rounding_noise,
)

NVFP4 = Quantizer("nvfp4", rounding="stochastic", scale=AbsMax(17 / 16))


def test_normal_values_in_nvfp4():
    g = jax.random.normal(jax.random.key(0), (1024, 1024))
    rounded = NVFP4.round(g, -1, jax.random.key(1))
    assert float(rounding_noise(g, rounded)) / g.size == pytest.approx(0.0235, rel=0.01)
    assert float(gradient_to_noise(g, rounded)) == pytest.approx(6.5, abs=0.05)
    # What a run measures: the error that was drawn instead of its variance.
    measured = OperandStatistics.from_sums(np.asarray(error_sums(g, rounded))).gradient_to_noise
    assert measured == pytest.approx(float(gradient_to_noise(g, rounded)), rel=0.005)


@pytest.mark.parametrize(
    "q",
    [
        NVFP4,
        Quantizer("mxfp4", rounding="stochastic", scale=OctaveMax()),
        Quantizer("int4@row", rounding="stochastic"),
        Quantizer("nf4@1x64", rounding="stochastic"),
        Quantizer("e4m3fn", rounding="stochastic"),
    ],
    ids=str,
)
def test_it_is_the_variance_of_what_is_drawn(q):
    x = jax.random.normal(jax.random.key(2), (16, 128))
    draws = jax.jit(jax.vmap(lambda key: q.round(x, -1, key).values))(jax.random.split(jax.random.key(3), 2000))
    drawn = float(jnp.sum(jnp.var(draws, axis=0)))
    # 2048 values of 2000 draws each: the sum of their variances is known to about 1 / sqrt(2000 · 2048) · 2 < 1 %.
    assert float(rounding_noise(x, q.round(x, -1, jax.random.key(0)))) == pytest.approx(drawn, rel=0.01)


def test_values_on_the_grid_have_no_noise():
    x = jnp.asarray(formats.value_table("e2m1fn"), jnp.float32)
    assert float(rounding_noise(x, Quantizer("e2m1fn").round(x, 0))) == 0
    assert float(gradient_to_noise(x, Quantizer("e2m1fn").round(x, 0))) == np.inf


def test_the_ratio_of_exact_values_is_infinite():
    x = jnp.ones(4)
    assert (
        OperandStatistics.from_sums(np.asarray(error_sums(x, Quantizer("int4").round(x, 0)))).gradient_to_noise
        == np.inf
    )
