"""qragged_dot against its definition: a loop over the groups, in qdot or in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lowprec.ops import KEEP, GemmRule, qdot, qragged_dot
from lowprec.quantizers import (
    EXACT,
    REUSE,
    AbsMean,
    Clip,
    FourOverSix,
    Hadamard,
    Percentile,
    Quantizer,
    RootMeanSquare,
    fake_quant,
)

SIZES = (13, 0, 18)  # no group is a multiple of any block
ROWS, INPUTS, OUTPUTS = 34, 32, 48  # three rows belong to no group
INT8 = Quantizer("int8_symmetric@row")


def arrays(dtype=jnp.float32):
    """Rows and matrices of unlike magnitudes, so that groups that shared a scale would show."""
    x, w, dy = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(ROWS, INPUTS), (len(SIZES), INPUTS, OUTPUTS), (ROWS, OUTPUTS)])
    )
    rows = jnp.exp(jax.random.normal(jax.random.key(3), (ROWS, 1)))
    matrices = jnp.array([1.0, 3.0, 0.1])[:, None, None]
    return [v.astype(dtype) for v in (x * rows, w * matrices, dy * rows[::-1])]


def groups(sizes=SIZES):
    ends = np.cumsum(sizes)
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def padded(fmt, rotation=None, **options):
    return Quantizer(fmt, rotation, pad=True, **options)


def six(q):
    return GemmRule((q, q), (q, q), (q, q))


H16 = Hadamard(16, "fixed")
RULES = {
    "row": six(INT8),
    "tensor": six(Quantizer("e4m3fn@tensor")),
    "tiles": six(padded("int8@8x8")),
    "rotated rows": six(padded("int4@row", Hadamard(8, "fixed"))),
    "nvfp4": GemmRule(
        (padded("nvfp4", scale=FourOverSix()), padded("e2m1fn@16x16/e4m3fn.tensor")),
        (padded("nvfp4"), REUSE),
        (padded("nvfp4", H16),) * 2,
    ),
    "requantized": GemmRule(
        (padded("mxfp4", H16, estimator=Clip()),) * 2,
        (padded("mxfp4", H16), padded("mxfp4", H16, source="requantize")),
        (padded("mxfp4", H16), padded("mxfp4", H16, source="requantize")),
    ),
    "reused": GemmRule((Quantizer("e4m3fn@tensor"),) * 2, (Quantizer("e5m2@tensor"), REUSE), (REUSE, REUSE)),
    "bitnet": GemmRule(
        (Quantizer("int8@row"), Quantizer("ternary@tensor", scale=AbsMean())),
        (EXACT, REUSE),
        (EXACT, REUSE),
        normalize_input=True,
    ),
}


# The others with the slow tests.
USUAL = ("row", "nvfp4", "requantized", "bitnet")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in USUAL else pytest.mark.slow) for name in RULES]
)
def test_each_group_is_a_product_of_its_own(name):
    x, w, dy = arrays()
    rule = RULES[name]

    @jax.jit
    def run(x, w, dy):
        y, vjp = jax.vjp(lambda x, w: qragged_dot(x, w, jnp.array(SIZES), rule), x, w)
        return y, *vjp(dy)

    @jax.jit
    def loop(x, w, dy):
        parts = []
        for g, rows in enumerate(groups()):
            if SIZES[g]:
                y, vjp = jax.vjp(lambda x, w: qdot(x, w, rule, backend="emulate"), x[rows], w[g])
                parts.append((rows, g, y, *vjp(dy[rows])))
        return [part[2:] for part in parts]

    y, dx, dw = run(x, w, dy)
    full = [(rows, g) for g, rows in enumerate(groups()) if SIZES[g]]
    for (rows, g), expected in zip(full, loop(x, w, dy), strict=True):
        for a, b in zip((y[rows], dx[rows], dw[g]), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=2**-20 * np.abs(b).max())  # of float32 sums
    assert not dw[1].any()  # the group without rows
    assert not y[sum(SIZES) :].any()
    assert not dx[sum(SIZES) :].any()


def int8_rows(v, axis):
    scale = np.abs(v).max(axis=axis, keepdims=True, initial=0) / np.float32(127)
    scale = np.where(scale == 0, np.float32(1), scale)
    return np.rint(v * (np.float32(1) / scale)).astype(np.float64) * scale


def test_one_program_serves_all_group_sizes():
    """Symmetric int8 by rows, in numpy, for random divisions of the rows; blocks of 4 along the rows in wgrad."""
    x, w, dy = arrays()
    blocks = padded("e4m3fn@1x4")
    rule = GemmRule(fwd=(INT8,) * 2, dgrad=(INT8,) * 2, wgrad=(blocks, INT8))

    @jax.jit
    def run(x, w, dy, sizes):
        y, vjp = jax.vjp(lambda x, w: qragged_dot(x, w, sizes, rule), x, w)
        return y, *vjp(dy)

    generator = np.random.default_rng(0)
    for _ in range(12):
        sizes = np.diff(np.sort(generator.integers(0, ROWS + 1, len(SIZES))), prepend=0)
        found = [np.asarray(v) for v in run(x, w, dy, jnp.asarray(sizes))]
        expected = [np.zeros(v.shape) for v in found]
        for g, rows in enumerate(groups(sizes)):
            a, b, c = (np.asarray(v) for v in (x[rows], w[g], dy[rows]))
            expected[0][rows] = int8_rows(a, 1) @ int8_rows(b, 0)
            expected[1][rows] = int8_rows(c, 1) @ int8_rows(b, 1).T
            filled = np.pad(c, ((0, -len(c) % 4), (0, 0)))
            in_blocks = filled.reshape(-1, 4, OUTPUTS)
            c = np.asarray(fake_quant(jnp.asarray(in_blocks), "e4m3fn@row", axis=1)).reshape(filled.shape)[: len(c)]
            expected[2][g] = int8_rows(a, 0).T @ c.astype(np.float64)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_rule_that_keeps_everything_is_lax_bit_for_bit(dtype):
    x, w, dy = arrays(dtype)
    sizes = jnp.array(SIZES)
    y, vjp = jax.vjp(lambda x, w: lax.ragged_dot(x, w, sizes), x, w)
    ours, our_vjp = jax.vjp(lambda x, w: qragged_dot(x, w, sizes, KEEP), x, w)
    for a, b in zip((ours, *our_vjp(dy)), (y, *vjp(dy)), strict=True):
        assert a.dtype == b.dtype == dtype
        np.testing.assert_array_equal(np.float32(a), np.float32(b))


def test_dtypes_are_kept():
    x, w, dy = arrays(jnp.bfloat16)
    y, vjp = jax.vjp(lambda x, w: qragged_dot(x, w, jnp.array(SIZES), RULES["row"]), x, w)
    assert {v.dtype for v in (y, *vjp(dy))} == {jnp.dtype(jnp.bfloat16)}


def test_what_stands_in_rows_of_no_group_is_not_looked_at():
    x, w, dy = arrays()
    spoilt = jnp.arange(ROWS)[:, None] >= sum(SIZES)

    @jax.jit
    def run(x, w, dy):
        y, vjp = jax.vjp(lambda x, w: qragged_dot(x, w, jnp.array(SIZES), RULES["nvfp4"]), x, w)
        return y, *vjp(dy)

    clean, other = run(x, w, dy), run(jnp.where(spoilt, jnp.nan, x), w, jnp.where(spoilt, jnp.inf, dy))
    for a, b in zip(clean, other, strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_overflow_stays_in_its_group():
    x, w, _ = arrays()
    run = jax.jit(lambda x: qragged_dot(x, w, jnp.array(SIZES), RULES["tensor"]))
    clean, broken = run(x), run(x.at[3, 3].set(jnp.inf))
    assert np.isnan(broken[:13]).all()
    np.testing.assert_array_equal(clean[13:], broken[13:])


def test_stochastic_rounding_lands_next_to_each_value_on_the_grid_of_its_group():
    """Against matrices that are the identity, y is q(x), and dw is q(dy) for rows of the identity."""
    _, _, dy = arrays()
    x = jax.random.normal(jax.random.key(5), (ROWS, INPUTS)) * jnp.arange(1, ROWS + 1)[:, None]
    eye = jnp.broadcast_to(jnp.eye(INPUTS), (len(SIZES), INPUTS, INPUTS))
    noisy = Quantizer("int4_symmetric@tensor", rounding="stochastic")
    lines = Quantizer("int4_symmetric@row", rounding="stochastic")
    sizes = jnp.array(SIZES)

    def check(found, source, axis):
        step = np.abs(source).max(axis=axis, keepdims=True) / 7
        np.testing.assert_allclose(found / step, np.rint(found / step), atol=1e-4)
        assert (np.abs(found - source) < step * (1 + 1e-5)).all()
        # Were it rounded to nearest, no value would lie further than half a step away: about a quarter do.
        assert (np.abs(found - source) > step / 2).mean() > 0.1

    y = np.asarray(qragged_dot(x, eye, sizes, GemmRule(fwd=(noisy, EXACT)), key=jax.random.key(6)))
    for rows in groups():
        if rows.start < rows.stop:
            check(y[rows], np.asarray(x[rows]), None)
    one_hot = jnp.concatenate(
        [jnp.eye(INPUTS)[: rows.stop - rows.start] for rows in groups()] + [jnp.zeros((3, INPUTS))]
    )
    w = jnp.zeros((len(SIZES), INPUTS, OUTPUTS))
    rule = GemmRule(wgrad=(lines, EXACT))
    _, vjp = jax.vjp(lambda w: qragged_dot(one_hot, w, sizes, rule, key=jax.random.key(6)), w)
    dw = np.asarray(vjp(dy)[0])
    for g, rows in enumerate(groups()):
        if rows.start < rows.stop:
            check(dw[g, : rows.stop - rows.start], np.asarray(dy[rows]), 0)


def test_random_rotations_cancel_and_noise_averages_out():
    x, w, dy = arrays()
    sizes = jnp.array(SIZES)
    exact_y, exact = jax.vjp(lambda x, w: lax.ragged_dot(x, w, sizes, precision=lax.Precision.HIGHEST), x, w)
    rotated = padded("float32", Hadamard(16, "random"))

    def run(rule):
        @jax.jit
        def gradients(key):
            y, vjp = jax.vjp(lambda x, w: qragged_dot(x, w, sizes, rule, key=key), x, w)
            return y, *vjp(dy)

        return gradients

    for a, b in zip(run(six(rotated))(jax.random.key(0)), (exact_y, *exact(dy)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-3)  # sums of magnitude up to 500
    noisy = Quantizer("int4_symmetric@row", rounding="stochastic")
    draws = np.asarray(lax.map(lambda key: run(six(noisy))(key)[2], jax.random.split(jax.random.key(1), 256)))
    sigma = draws.std(axis=0, ddof=1) / 16
    wrong = np.abs(draws.mean(axis=0) - np.asarray(exact(dy)[1]))
    # Of 4608 means, each beyond 5.5 sigma with probability 1e-7 (Student's t of 255), none; 1e-5 for float32 sums.
    assert (wrong <= 5.5 * sigma + 1e-5).all()


def test_a_stochastic_rule_without_a_key():
    x, w, _ = arrays()
    rule = GemmRule(dgrad=(Quantizer("e5m2@tensor", rounding="stochastic"), EXACT))
    run = lambda x: qragged_dot(x, w, jnp.array(SIZES), rule)
    run(x)
    with pytest.raises(ValueError, match="need a key"):
        jax.vjp(run, x)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (GemmRule(wgrad=(Quantizer("int8@row", scale=RootMeanSquare(3.0)), EXACT)), "wgrad.dy .* use absmax"),
        (GemmRule(fwd=(Quantizer("int8@tensor", scale=Percentile()), EXACT)), "fwd.x .* use absmax"),
        (GemmRule(wgrad=(Quantizer("int8@row", Hadamard("full")),) * 2), "wgrad.dy .* length that the groups decide"),
    ],
)
def test_what_groups_would_have_to_count_is_refused_by_operand(rule, message):
    x, w, _ = arrays()
    with pytest.raises(ValueError, match=message):
        qragged_dot(x, w, jnp.array(SIZES), rule)


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "sizes", "message"),
    [
        ((4, 3), (3, 5), [4], r"w \(groups, K, N\), not \[4, 3\] and \[3, 5\]"),
        ((2, 4, 3), (1, 3, 5), [4], r"x is \(rows, K\)"),
        ((4, 3), (2, 6, 5), [2, 2], r"K is 3 in x\[4, 3\] and 6 in w\[2, 6, 5\]"),
        ((4, 3), (2, 3, 5), [4], r"group_sizes are 2 integers.*not int32\[1\]"),
        ((4, 3), (2, 3, 5), [2.0, 2.0], r"group_sizes are 2 integers.*not float32\[2\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_name(x_shape, w_shape, sizes, message):
    with pytest.raises(ValueError, match=message):
        qragged_dot(jnp.ones(x_shape), jnp.ones(w_shape), jnp.array(sizes), RULES["row"])


def test_backends():
    x, w, _ = arrays()
    with pytest.raises(ValueError, match="'native' has no products of groups"):
        qragged_dot(x, w, jnp.array(SIZES), RULES["row"], backend="native")
    with pytest.raises(ValueError, match="unknown backend 'palas'"):
        qragged_dot(x, w, jnp.array(SIZES), KEEP, backend="palas")
    with pytest.raises(TypeError, match="GemmRule"):
        qragged_dot(x, w, jnp.array(SIZES), "mxfp4")
