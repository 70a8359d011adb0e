"""`lowprec formats compare` against errors that were measured with other code, on the same kinds of data.

Block formats on Gaussian data: exact integrals, and what the authors' notebooks of Quartet II store. Integers and NVFP4
on Laplace data and on outliers (8 of 1024 columns × 50): measured with a reference implementation in numpy.
"""

import numpy as np
import pytest

from lowprec.analysis.format_comparison import DISTRIBUTIONS, compare, samples

GAUSSIAN = {
    "mxfp4": 0.01334,
    "nvfp4": 0.00903,
    "e2m1fn@16x16/e4m3fn.tensor": 0.01239,
    "e2m1fn@1x32": 0.01023,
    "int4@row": 0.0203,
    "int4@1x128": 0.0138,
    "int4@1x32": 0.0094,
    "e4m3fn@tensor": 7.0e-4,
    "e5m2@tensor": 2.8e-3,
}
HARDER = {
    ("Laplace", "nvfp4"): 0.0086,
    ("Laplace", "int4@row"): 0.047,
    ("Student-t, 3 dof", "nvfp4"): 0.0083,
    ("Student-t, 3 dof", "int4@row"): 0.158,
    ("Gaussian with outliers", "nvfp4"): 0.0042,
    ("Gaussian with outliers", "int4@row"): 0.054,
}


@pytest.fixture(scope="module")
def results():
    return {(r.distribution, r.format): r for r in compare(list(GAUSSIAN))}


@pytest.mark.parametrize("name", GAUSSIAN)
def test_gaussian_errors(results, name):
    assert results["Gaussian", name].relative_mse == pytest.approx(GAUSSIAN[name], rel=0.02)


@pytest.mark.parametrize(("distribution", "name"), HARDER)
def test_errors_on_heavy_tails_and_outliers(results, distribution, name):
    assert results[distribution, name].relative_mse == pytest.approx(HARDER[distribution, name], rel=0.03)


def test_wide_cells_shrink_the_data_and_equal_steps_do_not(results):
    assert 1 - results["Gaussian", "nvfp4"].alignment == pytest.approx(0.0045, abs=2e-4)
    assert results["Gaussian", "int4@1x32"].alignment == pytest.approx(1, abs=1e-3)


def test_bits_count_the_scales(results):
    bits = {name: results["Gaussian", name].bits_per_value for name in ("mxfp4", "nvfp4", "int4@1x32", "e4m3fn@tensor")}
    assert bits == {"mxfp4": 4.25, "nvfp4": 4.5, "int4@1x32": 5, "e4m3fn@tensor": 8}


def test_an_element_format_is_compared_with_and_without_a_scale():
    rows = [r for r in compare(["int4", "float32"], size=2) if r.distribution == "Gaussian"]
    assert [r.format for r in rows] == ["int4", "int4@tensor", "float32", "float32@tensor"]
    assert rows[0].relative_mse == pytest.approx(1 / 12, rel=0.1)  # unit steps
    assert rows[2].relative_mse == 0 and rows[2].sqnr_db == np.inf


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_data_have_unit_variance_and_eight_columns_of_outliers(distribution):
    deviations = samples(distribution, 2048, 0).std(axis=0)
    outliers = 8 if distribution == "Gaussian with outliers" else 0
    assert np.sum(deviations > 40) == outliers
    assert np.median(deviations) == pytest.approx(1, rel=0.1)
