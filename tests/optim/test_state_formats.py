"""Names of state formats, what they cost, and moments of every shape as they are stored."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec import formats
from lowprec.optim.state_formats import state_format, state_format_names
from lowprec.optim.state_scales import AbsMax, Rank1
from lowprec.optim.state_tensor import StateTensor, is_stored, leaf_key, load, store, zeros

SIGNED = ("de8", "de4", "cmp8", "fp8", "coat8")
UNSIGNED = (*SIGNED, "log8", "log4", "log2", "lin4", "lin4@rank1")
MOMENTS = [(name, True) for name in SIGNED] + [(name, False) for name in UNSIGNED]
KEY = leaf_key(0, 0, "kernel", "nu")


def moments(shape, signed, seed=0):
    """Normal gradients, or their squares, whose rows and columns differ in size."""
    random = np.random.default_rng(seed)
    g = random.normal(size=shape)
    for axis, n in enumerate(shape):
        g = g * np.exp(random.normal(size=[n if i == axis else 1 for i in range(len(shape))]))
    return jnp.asarray(g if signed else np.square(g), jnp.float32)


@pytest.mark.parametrize(("name", "signed"), MOMENTS)
def test_moments_keep_their_shape_and_are_float32(name, signed):
    fmt = state_format(name, signed=signed)
    shapes = (), (5,), (2, 3, 133), (3, 0), (0, 3)
    ones = [jnp.ones(shape, jnp.bfloat16) for shape in shapes]
    moments = jax.jit(lambda ones: [store(x, fmt) for x in ones])(ones)
    loaded = jax.jit(lambda moments: [load(moment) for moment in moments])(moments)
    described = lambda tree: jax.tree.map(lambda part: (part.shape, part.dtype), tree)
    for shape, stored, y in zip(shapes, moments, loaded, strict=True):
        assert y.shape == shape == stored.shape
        assert y.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(y), np.ones(shape))  # 1 is the largest of its block
        assert described(zeros(shape, fmt)) == described(stored)
        assert all(part.ndim == max(1, len(shape)) for part in jax.tree.leaves(stored))


@pytest.mark.parametrize(("name", "signed"), MOMENTS)
def test_zeros_are_zeros(name, signed):
    fmt = state_format(name, signed=signed)
    for stored in (zeros((3, 40), fmt), store(jnp.zeros((3, 40)), fmt), store(jnp.full((3, 40), -0.0), fmt)):
        np.testing.assert_array_equal(np.asarray(load(stored)), 0)


@pytest.mark.parametrize(("name", "signed"), MOMENTS)
def test_one_value_among_zeros_survives_and_zeros_do_where_the_book_has_one(name, signed):
    fmt = state_format(name, signed=signed)
    x = np.zeros((4, 256), np.float32)
    x[2, 17] = -3e-5 if signed and not name.startswith(("cmp", "fp8", "coat")) else 3e-5
    y = np.asarray(load(store(x, fmt)))
    np.testing.assert_allclose(y[2, 17], x[2, 17], rtol=2**-8)
    if fmt.element.min <= 0 and name != "log2":
        np.testing.assert_array_equal(y == 0, x == 0)
    assert np.all(y[[0, 1, 3]] == 0)


@pytest.mark.parametrize(("name", "signed"), MOMENTS)
def test_what_was_stored_is_stored_again_as_it_was(name, signed):
    """With the same scales: a state that is only read and written back does not drift."""
    fmt = state_format(name, signed=signed)
    stored = jax.jit(store, static_argnums=1)(moments((8, 300), signed), fmt)
    unpacked = lambda state: np.asarray(formats.unpack(state.codes, fmt.element.bits, 300))
    down = jax.jit(lambda stored: fmt.scales.down(load(stored), stored.scales, fmt.element.max))
    again = np.asarray(formats.encode(down(stored), fmt.element))
    same = unpacked(stored)
    if name.startswith("fp8") and signed:
        again, same = (np.where(codes == 0x80, 0, codes) for codes in (again, same))  # of two zeros
    np.testing.assert_array_equal(again, same)


@pytest.mark.parametrize("name", ["de8", "de4", "lin4", "log8", "log4", "cmp8"])
def test_codes_are_those_of_the_nearest_values(name):
    signed = name.startswith("de")
    fmt = state_format(name, signed=signed)
    x = np.asarray(moments((4, 512), signed))
    book = np.float64(fmt.element.values)
    blocks = x.reshape(4, -1, fmt.scales.block).astype(np.float64)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
    scale = np.float64(np.asarray(jnp.asarray(largest, jnp.float32).astype(fmt.scales.dtype), np.float32))
    y = np.asarray(load(store(x, fmt))).reshape(blocks.shape)
    ratio = blocks / scale
    if fmt.element.midpoints is None:
        found, best = (np.abs(value - ratio) for value in (y / scale, nearest(ratio, book)))
        # Float32 decides by the rounded ratio: within an ulp of a tie either neighbour will do.
        assert np.all((found <= best + 2.0**-23) | (ratio < book[1]))
    else:
        place = np.searchsorted(fmt.element.midpoints, ratio)
        clear = np.abs(ratio / np.take([*fmt.element.midpoints, 2], place) - 1) > 1e-6
        clear &= np.abs(ratio / np.take([1e-9, *fmt.element.midpoints], place) - 1) > 1e-6
        above_zero = np.maximum(place, book[0] == 0)
        np.testing.assert_allclose(y[clear], (book[above_zero] * scale)[clear], rtol=3e-7)


def nearest(x, book):
    return book[np.abs(x[..., None] - book).argmin(-1)]


@pytest.mark.parametrize(("name", "signed"), MOMENTS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_block_with_what_is_not_finite_is_not_a_number_and_no_other_is(name, signed, bad):
    fmt = state_format(name, signed=signed)
    x = np.ones((4, 512), np.float32)
    x[1, 300] = bad
    y = np.asarray(load(store(x, fmt)))
    lost = np.zeros(x.shape, bool)
    if isinstance(fmt.scales, Rank1):
        lost[1], lost[:, 300] = True, True
    else:
        block = fmt.scales.block
        lost[1, 300 // block * block :][:block] = True
    np.testing.assert_array_equal(np.isnan(y), lost)
    np.testing.assert_array_equal(y[~lost], 1)


@pytest.mark.parametrize("name", UNSIGNED)
@pytest.mark.parametrize("rounding", ["", "(stochastic)"])
def test_positive_values_stay_positive(name, rounding):
    """A second moment of zero would make a step of 1 / ε."""
    fmt = state_format(name + rounding, signed=False)
    x = np.exp2(np.random.default_rng(0).uniform(-40, 0, (8, 512))).astype(np.float32)
    assert np.all(np.asarray(load(store(x, fmt, KEY))) > 0)


@pytest.mark.parametrize(
    ("mu", "nu", "bytes_a_parameter"),
    [
        ("f32", "f32", 8.0),
        ("bf16", "f32", 6.0),
        ("de8", "de8", 2.03125),
        ("fp8", "fp8", 2.03125),
        ("cmp8", "cmp8", 2.125),
        ("coat8", "coat8", 2.078),
        ("de4", "log4", 1.0625),
        ("de4", "lin4", 1.0625),
        ("de4/bf16", "log4/bf16", 1.03125),
        ("de4", "lin4@rank1", 0.53125 + 0.5 + 4 * (512 + 1024) / (512 * 1024)),
        ("de4", "log2", 0.84375),
    ],
)
def test_two_moments_take_the_bytes_that_the_papers_state(mu, nu, bytes_a_parameter):
    shape = (512, 1024)
    state = jax.eval_shape(
        lambda: [zeros(shape, state_format(mu, signed=True)), zeros(shape, state_format(nu, signed=False))]
    )
    stored = sum(part.size * part.dtype.itemsize for part in jax.tree.leaves(state))
    np.testing.assert_allclose(stored / (512 * 1024), bytes_a_parameter, rtol=1e-3)
    parts = [leaf for leaf in jax.tree.leaves(state, is_leaf=is_stored) if is_stored(leaf)]
    assert all(leaf.nbytes == sum(part.size * part.dtype.itemsize for part in jax.tree.leaves(leaf)) for leaf in parts)


def test_names_say_blocks_scales_and_rounding():
    fmt = state_format("de4@64/bf16(stochastic)", signed=True)
    assert (fmt.scales, fmt.stochastic, str(fmt)) == (
        AbsMax(64, "bfloat16", signed=True),
        True,
        "de4@64/bf16(stochastic)",
    )
    assert fmt.element == formats.parse("de4")
    assert state_format("de4", signed=False).element == formats.parse("ude4")
    assert state_format("fp8@rank1", signed=False).scales == Rank1(AbsMax(128, root=True))
    assert state_format(fmt, signed=True) is fmt
    assert hash(fmt) == hash(state_format(str(fmt), signed=True))


@pytest.mark.parametrize(
    ("name", "signed", "message"),
    [
        ("log44", False, "unknown state format 'log44'; did you mean log4"),
        ("log4", True, "no negative values; those that have are de8, de4, cmp8, fp8, coat8, bf16, f32"),
        ("bf16@64", True, "bf16 has neither blocks nor scales"),
        ("f32(stochastic)", True, "nothing is rounded"),
        ("coat8@rank1", False, "coat8 has scales of its own, not @rank1"),
        ("de8@0", True, "unknown state format 'de8@0'"),
    ],
)
def test_names_that_mean_nothing_are_refused(name, signed, message):
    with pytest.raises(ValueError, match=message):
        state_format(name, signed=signed)


def test_every_name_stands_for_a_format_of_second_moments():
    for name in state_format_names():
        assert str(state_format(name, signed=False)) == name


def test_stochastic_formats_need_a_key_and_rank_1_all_rows():
    x = jnp.ones((4, 8))
    with pytest.raises(ValueError, match="needs a key"):
        store(x, state_format("de8(stochastic)", signed=True))
    with pytest.raises(ValueError, match="all rows"):
        store(x, state_format("lin4@rank1", signed=False), rows=(0, 8))


def test_fifty_leaves_of_a_million_parameters_are_initialized_by_constants():
    """Folding the block maxima of that many zeros would take XLA minutes: nothing is reduced, so nothing is folded."""
    for name, signed in MOMENTS:
        fmt = state_format(name, signed=signed)
        program = jax.jit(lambda fmt=fmt: [zeros((1024, 1024), fmt) for _ in range(50)])
        text = program.lower().as_text()
        assert "reduce" not in text
        assert "divide" not in text


def test_state_tensors_are_trees_whose_leading_axes_can_be_sliced_and_scanned():
    fmt = state_format("de4", signed=True)
    x = moments((6, 4, 200), signed=True)
    stored = store(x, fmt)
    assert isinstance(stored, StateTensor)
    part = jax.tree.map(lambda a: a[2:5], stored)
    assert part.shape == (3, 4, 200)
    np.testing.assert_array_equal(load(part), load(stored)[2:5])
    _, rows = jax.lax.scan(lambda carry, row: (carry, load(row)), 0, stored)
    np.testing.assert_array_equal(rows, load(stored))
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(stored)}
    assert names == {".codes", ".scales[0]"}
    assert jax.tree.structure(stored) != jax.tree.structure(store(x, replace(fmt, name="other")))
