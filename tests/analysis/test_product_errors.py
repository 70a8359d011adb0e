"""Errors of one product: against float64, and against what follows from the formats."""

import jax.numpy as jnp
import numpy as np
import pytest

from lowprec import formats
from lowprec.analysis.product_errors import errors_table, operands, product_errors
from lowprec.errors import UsageError
from lowprec.recipes import REUSE, GemmRule, Quantizer, everywhere

SIZE = 64


def test_against_float64():
    """Of e4m3 forward and e5m2 gradients, casts without scales: every product written out in numpy."""
    values, gradient = Quantizer("e4m3fn"), Quantizer("e5m2")
    recipe = everywhere("mine", GemmRule((values, values), (gradient, REUSE), (REUSE, REUSE)))
    x, w, dy = operands("gaussian", SIZE)
    cast = lambda a, name: np.asarray(formats.round_to(jnp.asarray(a), name), np.float64)
    qx, qw, qdy = cast(x, "e4m3fn"), cast(w, "e4m3fn"), cast(dy, "e5m2")
    x, w, dy = (a.astype(np.float64) for a in (x, w, dy))
    relative = lambda found, exact: np.sum((found - exact) ** 2) / np.sum(exact**2)
    errors = product_errors(recipe, size=SIZE)
    assert errors.y == pytest.approx(relative(qx @ qw, x @ w), rel=1e-3)
    assert errors.dx == pytest.approx(relative(qdy @ qw.T, dy @ w.T), rel=1e-3)
    assert errors.dw == pytest.approx(relative(qx.T @ qdy, x.T @ dy), rel=1e-3)
    # The backward pass alone: e5m2 of dy, with the forward operands as they were used.
    assert errors.mean_dx == (pytest.approx(relative(qdy @ qw.T, dy @ qw.T), rel=1e-3),)
    assert errors.mean_dw == (pytest.approx(relative(qx.T @ qdy, qx.T @ dy), rel=1e-3),)


def test_means_of_unbiased_gradients_improve_as_1_over_n():
    """int8 with dy random, and w reused: the mean of n draws has an n-th of the error, 4096 values give 5 %."""
    row, noisy = Quantizer("int8@row"), Quantizer("int8@row", rounding="stochastic")
    recipe = everywhere("mine", GemmRule((row, row), (noisy, REUSE), (noisy, REUSE)))
    errors = product_errors(recipe, size=SIZE, draws=32)
    for mean in (errors.mean_dx, errors.mean_dw):
        assert len(mean) == 32
        assert mean[0] / mean[-1] == pytest.approx(32, rel=0.15)


def test_what_is_remembered_is_that_of_many_steps():
    """Delayed scales of data that do not change are current ones; the first step, scale 1, would differ."""
    delayed, current = product_errors("fp8_delayed", size=SIZE), product_errors("fp8", size=SIZE)
    assert delayed == current
    assert product_errors("int8_qat", size=SIZE).mean_dw == (0,) and product_errors("int8_qat", size=SIZE).dw > 0


def test_nothing_is_quantized_in_f32():
    errors = product_errors("f32", size=SIZE)
    assert (errors.y, errors.dx, errors.dw, errors.mean_dx, errors.mean_dw) == (0, 0, 0, (0,), (0,))


def test_outliers_are_two_features_and_two_rows():
    x, w, dy = operands("outliers", SIZE)
    plain_x, plain_w, plain_dy = operands("gaussian", SIZE)
    np.testing.assert_array_equal(w, plain_w)
    np.testing.assert_array_equal(np.sort((x / plain_x).round(3), axis=1), SIZE * [[1] * (SIZE - 2) + [50] * 2])
    np.testing.assert_array_equal(np.sort((dy / plain_dy).round(3), axis=0).T, SIZE * [[1] * (SIZE - 2) + [50] * 2])
    assert len(set(np.argmax(x / plain_x > 2, axis=1))) == 1  # the same features in all rows


def test_the_table_has_a_row_a_recipe():
    lines = errors_table(["bf16", "int8_full"], size=SIZE, draws=2).splitlines()
    assert [line.split()[1] for line in lines[2:]] == ["bf16", "int8_full"]
    assert lines[2].count("–") == 2 and lines[3].count("–") == 0  # nothing is drawn in bf16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": "nvfp5"}, "did you mean nvfp4"),
        ({"recipe": "bf16", "data": "gausian"}, "did you mean gaussian"),
        ({"recipe": "bf16", "size": 0}, "one row"),
        ({"recipe": "bf16", "draws": 0}, "one draw"),
    ],
)
def test_says_what_would_be_valid(arguments, message):
    with pytest.raises(UsageError, match=message):
        product_errors(**arguments)


def test_draws_depend_on_the_seed_alone():
    a, b, other = (product_errors("int8_full", size=SIZE, seed=seed) for seed in (0, 0, 1))
    assert a == b and a != other
