"""Rotations of a whole axis: matrices of orders that are no power of two, and their use on any axis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec.errors import UsageError
from lowprec.quantizers import Hadamard, hadamard, hadamard_matrix, inverse_hadamard

# The base matrices of HALO (arXiv 2501.02625), and those of fields of 25, 27, 49 and 125 elements.
BASES = (12, 20, 28, 36, 40, 52, 60, 108, 140, 156, 172, 100, 252)


@pytest.mark.parametrize("order", sorted({*BASES, *range(4, 185, 4), 1376}))
def test_rows_are_orthogonal_and_entries_are_signs(order):
    matrix = hadamard_matrix(order)
    assert matrix.shape == (order, order)
    assert np.all(np.abs(matrix) == 1)
    np.testing.assert_array_equal(matrix @ matrix.T, order * np.eye(order))  # exact: sums of ±1


@pytest.mark.parametrize(("order", "nearest"), [(188, "184 and 192"), (13, "12 and 16"), (3, "2 and 4"), (0, "1")])
def test_an_order_without_a_matrix_names_the_nearest(order, nearest):
    with pytest.raises(UsageError, match=f"no Hadamard matrix of order {order} .* the nearest are {nearest}"):
        hadamard_matrix(order)
    with pytest.raises(UsageError, match="the nearest are 12 and 16"):
        hadamard(jnp.ones((2, 13)), Hadamard("full").block(13))


@pytest.mark.parametrize("axis", [-1, 0, 1])
@pytest.mark.parametrize("length", [1, 12, 24, 64, 112, 172, 208, 1024])
def test_a_whole_axis_is_multiplied_by_the_normalized_matrix_and_back(length, axis):
    shape = [2, 2, 3]
    shape[axis] = length
    random = np.random.default_rng(length)
    x, signs = random.normal(size=shape).astype(np.float32), random.choice([-1.0, 1.0], length).astype(np.float32)
    expected = np.moveaxis(x, axis, -1).astype(np.float64) * signs @ hadamard_matrix(length) / np.sqrt(length)
    rotated = jax.jit(hadamard, static_argnames=("size", "axis"))(x, length, signs, axis=axis)
    # At most 172 roundings in a row, of sums that grow as √n: together √(172 / 2) · 2^-25 = 3e-7 of the result.
    assert np.linalg.norm(np.moveaxis(rotated, axis, -1) - expected) < 1e-6 * np.linalg.norm(expected)
    back = jax.jit(inverse_hadamard, static_argnames=("size", "axis"))(rotated, length, signs, axis=axis)
    assert np.linalg.norm(back - x) < 1e-6 * np.linalg.norm(x)


def test_blocks_of_any_order_rotate_parts_of_an_axis():
    x = np.random.default_rng(0).normal(size=(3, 36)).astype(np.float32)
    expected = x.reshape(3, 3, 12).astype(np.float64) @ hadamard_matrix(12) / np.sqrt(12)
    np.testing.assert_allclose(hadamard(jnp.asarray(x), 12), expected.reshape(3, 36), rtol=0, atol=1e-6)


def test_no_entries():
    assert hadamard(jnp.ones((0, 24)), 24).shape == (0, 24)
    assert inverse_hadamard(jnp.ones((24, 0)), 24, axis=0).shape == (24, 0)


def test_lengths_are_filled_up_to_the_next_that_works():
    full = Hadamard("full")
    assert [full.padded(n) for n in (1, 3, 5, 13, 37, 185, 187, 4097)] == [1, 4, 8, 16, 40, 192, 192, 4128]
    assert full.block(40) == 40
    assert [Hadamard(16).padded(n) for n in (0, 1, 16, 17)] == [0, 16, 16, 32]


def test_the_text_and_the_errors():
    assert str(Hadamard("full")) == "full H"
    assert str(Hadamard("full", "random", "outer")) == "random signs · full H (undone on the product)"
    assert hash(Hadamard("full", side="outer")) != hash(Hadamard("full"))
    with pytest.raises(UsageError, match="side of a rotation is 'inner' or 'outer', not 'left'"):
        Hadamard("full", side="left")
    with pytest.raises(UsageError, match="power of two, not ful; 'full' rotates"):
        Hadamard("ful")


def test_one_outlier_spreads_evenly_over_the_whole_axis():
    """Of H every entry has the same magnitude: a spike of size n becomes √n everywhere, whatever the base."""
    for length in (172, 1536):
        spike = jnp.zeros((1, length)).at[0, 7].set(float(length))
        np.testing.assert_allclose(np.abs(hadamard(spike, length)), np.full((1, length), length**0.5), rtol=1e-6)
