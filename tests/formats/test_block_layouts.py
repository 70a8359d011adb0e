"""Blocks of an array: which values share a scale, on any axis, with and without padding."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from lowprec.errors import UsageError
from lowprec.formats.blocks import block_layout

SHAPES = [(8,), (6, 8), (3, 8, 12), (2, 4, 4, 8)]
BLOCKS = ["tensor", "row", (1, 4), (4, 4), (1, 1)]


def block_number(index, block, axis, ndim):
    """Which block an element belongs to, by the words of the documentation."""
    axis %= ndim
    index = list(index)
    if block == "tensor":
        return ()
    if block == "row":
        index[axis] = 0
        return tuple(index)
    outer, inner = block
    index[axis] //= inner
    if outer > 1:
        other = axis + 1 if axis + 1 < ndim else axis - 1
        index[other] //= outer
    return tuple(index)


def layouts():
    for shape, block in itertools.product(SHAPES, BLOCKS):
        for axis in range(-len(shape), len(shape)):
            if block != (4, 4) or len(shape) > 1:
                yield shape, block, axis


@pytest.mark.parametrize("shape,block,axis", layouts())
def test_reducing_members_gives_one_number_a_block(shape, block, axis):
    layout = block_layout(shape, block, axis, pad=True)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    totals = {}
    for index in np.ndindex(shape):
        number = block_number(index, block, axis, len(shape))
        totals[number] = max(totals.get(number, 0), abs(x[index]))
    expected = np.array([totals[block_number(i, block, axis, len(shape))] for i in np.ndindex(shape)]).reshape(shape)
    amax = jnp.max(jnp.abs(layout.split(jnp.asarray(x))), axis=layout.members, keepdims=True)
    np.testing.assert_array_equal(layout.merge(amax), expected)
    assert amax.size == np.prod(layout.scale_shape) == len(totals)
    stored = amax.reshape(layout.scale_shape)
    np.testing.assert_array_equal(layout.broadcast_scale(stored), amax)


@pytest.mark.parametrize("shape,block,axis", layouts())
def test_merge_undoes_split(shape, block, axis):
    layout = block_layout(shape, block, axis, pad=True)
    x = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    np.testing.assert_array_equal(layout.merge(layout.split(x)), x)


def test_padding_is_zeros_at_the_end_of_the_blocked_axes_only():
    layout = block_layout((3, 10), (1, 4), 1, pad=True)
    assert layout.padded == (3, 12) and layout.scale_shape == (3, 3)
    padded = np.asarray(layout.split(jnp.ones((3, 10)))).reshape(3, 12)
    assert padded[:, :10].all() and not padded[:, 10:].any()
    tiles = block_layout((3, 10), (4, 4), 0, pad=True)
    assert tiles.padded == (4, 12) and tiles.scale_shape == (1, 3)


@pytest.mark.parametrize(
    "shape,block,axis,message",
    [
        ((3, 10), (1, 4), 1, r"blocks of 4 do not divide axis 1 of shape \(3, 10\); pad=True fills it .* up to 12"),
        ((3, 10), (1, 4), -2, r"blocks of 4 do not divide axis 0 of shape \(3, 10\); pad=True fills it .* up to 4"),
        ((8, 10), (4, 4), 0, r"blocks of 4 do not divide axis 1 of shape \(8, 10\)"),
        ((8,), (4, 4), 0, r"4x4 tiles need two axes; the array has shape \(8,\)"),
        ((8, 8), "row", 2, r"an array of shape \(8, 8\) has no axis 2"),
        ((8, 8), (1, 4), -3, r"an array of shape \(8, 8\) has no axis -3"),
        ((), "row", -1, r"an array of shape \(\) has no axis -1"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_axis_and_its_size(shape, block, axis, message):
    with pytest.raises(UsageError, match=message):
        block_layout(shape, block, axis)


def test_tensor_scales_need_no_axis():
    assert block_layout((), "tensor", -1).scale_shape == ()
    assert block_layout((2, 3), "tensor", -1).scale_shape == (1, 1)
