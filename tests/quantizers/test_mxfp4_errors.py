"""MXFP4 scales on Gaussian data and on outliers: constants that follow from the formats.

Expected: exact integrals and simulations over the definitions of Quartet (arXiv 2505.14669) and QuEST (arXiv
2502.05003). With powers of two the error depends on where the deviation lies in its octave.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec import recipes
from lowprec.errors import UsageError
from lowprec.quantizers import OctaveMax, Quantizer, RootMeanSquare, hadamard

QUARTET = RootMeanSquare(2.92247856, offset=6e-8, centered=True)
SCALES = {
    "ocp": Quantizer("mxfp4"),
    "octave": Quantizer("mxfp4", scale=OctaveMax()),
    "ceil": Quantizer("e2m1fn@1x32/e8m0.rceil_exact"),
    "float32": Quantizer("e2m1fn@1x32"),
    "quartet floor": Quantizer("mxfp4", scale=QUARTET),
    "quartet nearest": Quantizer("e2m1fn@1x32/e8m0.nearest", scale=QUARTET),
    "quartet ceil": Quantizer("e2m1fn@1x32/e8m0.ceil", scale=QUARTET),
    "quartet float32": Quantizer("e2m1fn@1x32", scale=QUARTET),
    "octave stochastic": Quantizer("mxfp4", scale=OctaveMax(), rounding="stochastic"),
    "ocp stochastic": Quantizer("mxfp4", rounding="stochastic"),
}


@cache
def normal():
    return jax.random.normal(jax.random.key(0), (1024, 1024))


@partial(jax.jit, static_argnums=0)
def error_and_misalignment(q, x, seed=0):
    values = q.round(x, -1, jax.random.key(seed)).values
    return jnp.sum((values - x) ** 2) / jnp.sum(x**2), 1 - jnp.sum(values * x) / jnp.sum(x**2)


@pytest.mark.parametrize(
    ("scale", "error", "misalignment"),
    [
        ("ocp", 0.01334, 0.0218),
        ("octave", 0.01368, 0.0095),
        ("ceil", 0.01365, 0.0095),
        ("float32", 0.01023, 0.0058),
        ("quartet floor", 0.0223, 0.052),
        ("quartet nearest", 0.01336, 0.0152),
        ("quartet ceil", 0.01554, 0.0087),
        ("quartet float32", 0.01241, 0.0114),
        ("octave stochastic", 0.02779, 0.0),
        ("ocp stochastic", 0.02497, 0.0138),
    ],
)
def test_errors_averaged_over_an_octave_of_deviations(scale, error, misalignment):
    deviations = np.exp2(np.arange(8) / 8)
    # Stochastic rounding moves the alignment of a million values by 3e-4, of eight million by 1e-4.
    found = [error_and_misalignment(SCALES[scale], normal() * sigma, seed) for seed, sigma in enumerate(deviations)]
    found = np.mean(found, axis=0)
    assert found[0] == pytest.approx(error, rel=0.02)
    assert found[1] == pytest.approx(misalignment, abs=4e-4 if misalignment < 0.05 else 1e-3)


@pytest.mark.parametrize(
    ("sigma", "error", "kept"), [(1.0, 0.0269, 0.928), (1.2, 0.0170, 0.967), (1.5, 0.0208, 0.954), (1.8, 0.0297, 0.920)]
)
def test_quartet_forward_at_four_places_of_the_octave(sigma, error, kept):
    q = recipes.get("quartet").rules[-1].gemm.fwd[0]
    x = normal() * sigma
    assert float(error_and_misalignment(q, x)[0]) == pytest.approx(error, rel=0.02)
    mask = jax.jit(lambda x: q.estimator.factor(x, q.round(x, -1)))(x)
    assert mask.dtype == bool and float(jnp.mean(mask)) == pytest.approx(kept, abs=0.002)


def test_quartet_scales_are_the_powers_of_two_of_its_definition():
    x = np.asarray(normal()[:64], np.float32) * np.float32(1.3)
    x[0, :32] = 0
    blocks = x.reshape(64, 32, 32)
    wide = blocks.astype(np.float64)
    deviation = np.sqrt(np.maximum((wide**2).mean(-1) - wide.mean(-1) ** 2, 0))
    expected = np.exp2(np.floor(np.log2(2.92247856 / 6 * deviation + 1e-8)))
    found = np.asarray(SCALES["quartet floor"].round(jnp.asarray(x), -1).scale.block).squeeze()
    np.testing.assert_array_equal(found, expected)  # no deviation here lies within 1e-6 of a power of two


def test_nothing_exceeds_the_largest_element_under_the_scale_of_the_octave():
    exponents = np.random.default_rng(0).uniform(-100, 100, (64, 1))
    x = (np.asarray(normal()[:64]) * np.exp2(exponents)).astype(np.float32)
    rounded = SCALES["octave"].round(jnp.asarray(x), -1)
    z = np.asarray(rounded.scale.divide(rounded.layout.split(jnp.asarray(x))))
    largest = np.abs(z).max(-1)
    assert np.all((largest >= 3) & (largest < 6))
    total = np.asarray(rounded.scale.total()).squeeze()
    amax = np.abs(x.reshape(64, 32, 32).astype(np.float64)).max(-1)
    np.testing.assert_allclose(total, np.exp2(np.floor(np.log2(amax)) - 2) * 4 / 3, rtol=1e-6)
    assert np.abs(np.asarray(SCALES["ocp"].round(jnp.asarray(x), -1).scale.divide(rounded.layout.split(x)))).max() > 6


@pytest.mark.parametrize("top", [0.0, 1e-45, 1e-38, 1.0, 3e38])
def test_the_scale_of_the_octave_at_the_ends_of_float32(top):
    x = jnp.full((1, 32), np.float32(top))
    values = np.asarray(jax.jit(lambda x: SCALES["octave"].round(x, -1).values)(x))
    assert np.all(np.isfinite(values)) and np.all(np.abs(values - x) <= max(top / 2, 1e-37))


def test_what_is_no_number_spoils_its_block_alone():
    x = jnp.ones((2, 64)).at[0, 3].set(jnp.nan).at[1, 40].set(jnp.inf)
    broken = np.isnan(np.asarray(SCALES["octave"].round(x, -1).values))
    assert broken[0, :32].all() and broken[1, 32:].all() and broken.sum() == 64


def test_the_octave_belongs_to_powers_of_two():
    with pytest.raises(UsageError, match="the octave of amax is for powers of two"):
        Quantizer("nvfp4", scale=OctaveMax()).round(jnp.ones((1, 32)), -1)


def outliers():
    random, shape = np.random.default_rng(0), (1024, 1024)
    channels, spikes = random.normal(size=shape), random.normal(size=shape)
    channels[:, np.arange(8) * 128 + random.integers(0, 128, 8)] *= 50  # one channel in each run of 128
    spikes[np.arange(1024), random.integers(0, 1024, 1024)] = 100
    return {
        "8 of 1024 channels 50 times larger": channels,
        "a spike of 100 in each row": spikes,
        "Laplace": random.laplace(size=shape),
    }


@pytest.mark.parametrize(
    ("data", "quantizer", "errors"),
    [
        ("8 of 1024 channels 50 times larger", "octave", (0.0185, 0.0121, 0.0108, None, None)),
        ("8 of 1024 channels 50 times larger", "octave stochastic", (0.056, 0.025, 0.022, None, None)),
        ("8 of 1024 channels 50 times larger", "quest", (0.651, 0.158, 0.061, None, 0.0094)),
        ("a spike of 100 in each row", "octave", (0.0236, 0.0224, 0.0097, 0.0082, 0.0107)),
        ("a spike of 100 in each row", "octave stochastic", (0.060, 0.040, 0.018, 0.017, 0.022)),
        ("a spike of 100 in each row", "quest", (0.773, 0.418, 0.270, 0.022, 0.0094)),
        ("Laplace", "octave", (0.0176, 0.0135, 0.0133, 0.0134, 0.0135)),
        ("Laplace", "octave stochastic", (0.036, 0.027, 0.027, 0.027, 0.027)),
        ("Laplace", "quest", (0.037, 0.0128, 0.0121, 0.0116, 0.0114)),
    ],
)
def test_rotations_of_outliers(data, quantizer, errors):
    """No rotation, blocks of 16, 32, 128 and the whole row.

    4 %: half of it is the last digit of the expected values. None stands where it matters which channels are large.
    """
    q = SCALES.get(quantizer, Quantizer("int4_midrise@row", scale=RootMeanSquare()))
    x = jnp.asarray(outliers()[data], jnp.float32)
    found = [error_and_misalignment(q, hadamard(x, size) if size > 1 else x)[0] for size in (1, 16, 32, 128, 1024)]
    known = [(f, e) for f, e in zip(found, errors, strict=True) if e is not None]
    np.testing.assert_allclose(*zip(*known, strict=True), rtol=0.04)
