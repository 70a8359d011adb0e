"""qdot against lax.dot_general, against float64 references written out by hand, and against its own definition."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

from lowprec.ops import KEEP, GemmRule, qdot
from lowprec.quantizers import EXACT, REUSE, Clip, Hadamard, Quantizer, fake_quant, read_taps, tap_slot

INT8 = Quantizer("int8_symmetric@row")
NVFP4 = Quantizer("nvfp4", pad=True)
KEY = jax.random.key(3)

# (x shape, w shape, dimension numbers): plain, leading axes, several contracted axes, batched, out of order.
PRODUCTS = {
    "matrix": ((6, 8), (8, 4), (((1,), (0,)), ((), ()))),
    "leading axes": ((2, 3, 8), (8, 4), (((2,), (0,)), ((), ()))),
    "two contracted": ((5, 2, 4), (2, 4, 3), (((1, 2), (0, 1)), ((), ()))),
    "two features": ((5, 8), (8, 2, 3), (((1,), (0,)), ((), ()))),
    "batched": ((3, 4, 8), (3, 8, 2), (((2,), (1,)), ((0,), (0,)))),
    "transposed weights": ((6, 8), (4, 8), (((1,), (1,)), ((), ()))),
    "out of order": ((8, 3, 5), (4, 3, 8), (((0,), (2,)), ((1,), (1,)))),
    "attention scores": ((2, 5, 3, 4), (2, 6, 3, 4), (((3,), (3,)), ((0, 2), (0, 2)))),
}


def arrays(shapes, seed=0):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_rule_that_keeps_everything_is_dot_general_bit_for_bit(name, dtype):
    x_shape, w_shape, dims = PRODUCTS[name]
    x, w = (a.astype(dtype) for a in arrays([x_shape, w_shape]))
    y, vjp = jax.vjp(lambda x, w: lax.dot_general(x, w, dims), x, w)
    dy = arrays([y.shape], 1)[0].astype(dtype)
    ours, our_vjp = jax.vjp(lambda x, w: qdot(x, w, KEEP, dimension_numbers=dims), x, w)
    for a, b in zip((ours, *our_vjp(dy)), (y, *vjp(dy)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("name", PRODUCTS)
def test_any_dimension_numbers_with_the_gradients_of_the_exact_product(name):
    """float32 as a format rounds nothing: what remains is the handling of axes, to be exact up to summation order."""
    x_shape, w_shape, dims = PRODUCTS[name]
    x, w = arrays([x_shape, w_shape])
    identity = Quantizer("float32")
    rule = GemmRule(fwd=(identity,) * 2, dgrad=(identity,) * 2, wgrad=(identity,) * 2)
    y, vjp = jax.vjp(lambda x, w: lax.dot_general(x, w, dims, precision="highest"), x, w)
    dy = arrays([y.shape], 1)[0]
    ours, our_vjp = jax.vjp(lambda x, w: qdot(x, w, rule, dimension_numbers=dims), x, w)
    for a, b in zip((ours, *our_vjp(dy)), (y, *vjp(dy)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=4e-6)  # sums of at most 8 products of normals


def int8_rows(x, axis):
    """Symmetric int8 with a scale a line, in numpy's float32; the product of the results is exact in float64."""
    x = np.asarray(x, np.float32)
    scale = np.abs(x).max(axis=axis, keepdims=True) / np.float32(127)
    return np.rint(x * (np.float32(1) / scale)).astype(np.float64) * scale


def test_each_operand_is_quantized_along_the_contraction_axis_of_its_own_product():
    x, w, dy = arrays([(32, 16), (16, 24), (32, 24)])
    rule = GemmRule(fwd=(INT8,) * 2, dgrad=(INT8,) * 2, wgrad=(INT8,) * 2)
    y, vjp = jax.vjp(lambda x, w: qdot(x, w, rule, backend="emulate"), x, w)
    dx, dw = vjp(dy)
    np.testing.assert_allclose(y, int8_rows(x, 1) @ int8_rows(w, 0), rtol=0, atol=2e-5)
    np.testing.assert_allclose(dx, int8_rows(dy, 1) @ int8_rows(w, 1).T, rtol=0, atol=2e-5)
    np.testing.assert_allclose(dw, int8_rows(x, 0).T @ int8_rows(dy, 0), rtol=0, atol=2e-5)


def test_sources_original_requantized_and_reused():
    x, w, dy = arrays([(32, 16), (16, 48), (32, 48)])
    quantize = lambda v, axis: np.asarray(fake_quant(jnp.asarray(v), "nvfp4", axis=axis), np.float64)
    expected = {
        "original": (quantize(w, 1), quantize(x, 0)),
        "requantize": (quantize(quantize(w, 0).astype(np.float32), 1), quantize(quantize(x, 1).astype(np.float32), 0)),
        "reuse": (quantize(w, 0), quantize(x, 1)),
    }
    for source, (w_used, x_used) in expected.items():
        again = REUSE if source == "reuse" else Quantizer("nvfp4", source=source)
        rule = GemmRule(fwd=(NVFP4, NVFP4), dgrad=(EXACT, again), wgrad=(EXACT, again))
        _, vjp = jax.vjp(lambda x, w, rule=rule: qdot(x, w, rule), x, w)
        dx, dw = vjp(dy)
        np.testing.assert_allclose(dx, np.asarray(dy, np.float64) @ w_used.T, rtol=0, atol=2e-5)
        np.testing.assert_allclose(dw, x_used.T @ np.asarray(dy, np.float64), rtol=0, atol=2e-5)


def test_wgrad_can_reuse_the_gradient_of_dgrad():
    x, w, dy = arrays([(32, 16), (16, 32), (32, 32)])
    rule = GemmRule(dgrad=(Quantizer("e5m2@tensor"), EXACT), wgrad=(REUSE, EXACT))
    _, vjp = jax.vjp(lambda x, w: qdot(x, w, rule), x, w)
    rounded = np.asarray(fake_quant(dy, "e5m2@tensor"), np.float64)
    np.testing.assert_allclose(vjp(dy)[1], np.asarray(x, np.float64).T @ rounded, rtol=0, atol=2e-5)


@pytest.mark.parametrize("signs", [None, "fixed", "random"])
@pytest.mark.parametrize("product", ["fwd", "dgrad", "wgrad"])
def test_a_rotation_cancels_within_its_product(product, signs):
    """With a format that rounds nothing the rotated product and all gradients are those of the plain one."""
    x, w, dy = arrays([(24, 40), (40, 20), (24, 20)])  # no axis is a multiple of 16: all are filled up
    rotated = Quantizer("float32", Hadamard(16, signs), pad=True)
    rule = GemmRule(**{product: (rotated, rotated)})
    y, vjp = jax.vjp(lambda x, w: qdot(x, w, rule, key=KEY), x, w)
    for a, b in zip((y, *vjp(dy)), (x @ w, dy @ w.T, x.T @ dy), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-5)


@pytest.mark.parametrize("source", ["original", "reuse"])
def test_the_gradient_leaves_the_rotation_of_the_forward_operands(source):
    """The mask of the estimator acts on rotated coordinates, then the rotation is undone; both ways around."""
    x, w, dy = arrays([(16, 32), (32, 8), (16, 8)])
    operand = Quantizer("int2_symmetric@row", Hadamard(32), estimator=Clip(-0.5))
    again = REUSE if source == "reuse" else EXACT
    rule = GemmRule(fwd=(operand, operand), dgrad=(EXACT, again), wgrad=(EXACT, again))
    _, vjp = jax.vjp(lambda x, w: qdot(x, w, rule), x, w)
    dx, dw = vjp(dy)
    from scipy.linalg import hadamard

    H = hadamard(32) / np.sqrt(32)
    hx, hw = np.asarray(x, np.float64) @ H, H @ np.asarray(w, np.float64)
    quantize = lambda h, axis: np.clip(np.rint(h / (s := np.abs(h).max(axis, keepdims=True))), -1, 1) * s
    mask = lambda h, axis: np.abs(h) <= 0.5 * np.abs(h).max(axis, keepdims=True)
    used_w, used_x = (quantize(hw, 0), quantize(hx, 1)) if source == "reuse" else (hw, hx)
    dy = np.asarray(dy, np.float64)
    np.testing.assert_allclose(dx, ((dy @ used_w.T) * mask(hx, 1)) @ H, rtol=0, atol=2e-5)
    np.testing.assert_allclose(dw, H @ ((used_x.T @ dy) * mask(hw, 0)), rtol=0, atol=2e-5)


def test_padding_changes_no_product():
    x, w, dy = arrays([(10, 33), (33, 7), (10, 7)])
    rule = GemmRule(fwd=(NVFP4,) * 2, dgrad=(NVFP4,) * 2, wgrad=(NVFP4,) * 2)

    @jax.jit
    def run(x, w, dy):
        y, vjp = jax.vjp(lambda x, w: qdot(x, w, rule), x, w)
        return y, *vjp(dy)

    grow = lambda a, m, n: jnp.pad(a, ((0, m - a.shape[0]), (0, n - a.shape[1])))
    y, dx, dw = run(x, w, dy)
    padded = run(grow(x, 16, 48), grow(w, 48, 16), grow(dy, 16, 16))
    np.testing.assert_allclose(padded[0][:10, :7], y, rtol=0, atol=1e-5)
    np.testing.assert_allclose(padded[1][:10, :33], dx, rtol=0, atol=1e-5)
    np.testing.assert_allclose(padded[2][:33, :7], dw, rtol=0, atol=1e-5)


def test_without_padding_a_block_that_does_not_fit_is_refused_by_axis():
    x, w = arrays([(10, 33), (33, 7)])
    with pytest.raises(ValueError, match=r"16 do not divide axis 1 of shape \(10, 33\).*up to 48"):
        qdot(x, w, GemmRule(fwd=(Quantizer("nvfp4"), EXACT)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_jit_eager_and_vmap_agree_and_dtypes_are_kept(dtype):
    x, w, dy = (a.astype(dtype) for a in arrays([(3, 32, 32), (32, 16), (3, 32, 16)]))
    rule = GemmRule(
        fwd=(NVFP4, NVFP4),
        dgrad=(Quantizer("nvfp4", rounding="stochastic"), REUSE),
        wgrad=(Quantizer("e5m2@tensor", rounding="stochastic[8]"), Quantizer("mxfp8")),
    )

    def run(x, dy):
        y, vjp = jax.vjp(lambda x, w: qdot(x, w, rule, key=KEY), x, w)
        return y, *vjp(dy)

    eager = [run(x[i], dy[i]) for i in range(3)]
    assert all(a.dtype == dtype for a in eager[0])
    for other in (jax.jit(run), lambda x, dy: tuple(a[0] for a in jax.vmap(run)(x[None], dy[None]))):
        for i in range(3):
            for a, b in zip(other(x[i], dy[i]), eager[i], strict=True):
                # The operands have the same bits; only the summation of the products may be ordered otherwise.
                np.testing.assert_allclose(
                    np.float32(a), np.float32(b), rtol=2**-7 if dtype == jnp.bfloat16 else 1e-5, atol=1e-5
                )


def test_noise_is_a_function_of_the_key_and_independent_between_operands():
    x = jnp.full((64, 64), 0.3)
    half_way = Quantizer("fx16.1", rounding="stochastic")  # 0.3 lies between 0 and 0.5
    rule = GemmRule(dgrad=(half_way, EXACT), wgrad=(half_way, EXACT))
    eye = jnp.eye(64)

    def gradients(key):
        _, vjp = jax.vjp(lambda x, w: qdot(x, w, rule, key=key), eye, eye)
        return [np.asarray(g) != 0 for g in vjp(x)]

    dx, dw = gradients(KEY)
    again, other = gradients(KEY)[0], gradients(jax.random.key(4))[0]
    assert (dx == again).all()
    # Two independent fair-ish coins with p = 0.6 agree on a fraction 0.52; 4096 of them stay within 5 sigma = 0.039.
    for a, b in ((dx, other), (dx, dw)):
        assert abs((a == b).mean() - 0.52) < 0.039
    legacy = gradients(jax.random.PRNGKey(3))[0]
    assert (dx == legacy).all()


def test_a_stochastic_rule_without_a_key():
    x, w = arrays([(16, 16), (16, 16)])
    rule = GemmRule(dgrad=(Quantizer("nvfp4", rounding="stochastic"), EXACT))
    qdot(x, w, rule)  # the forward product is not stochastic: evaluation needs no key
    with pytest.raises(ValueError, match="need a key"):
        jax.grad(lambda x: qdot(x, w, rule).sum())(x)
    with pytest.raises(ValueError, match="needs a key"):
        qdot(x, w, GemmRule(fwd=(Quantizer("nvfp4", rounding="stochastic"), EXACT)))


def test_taps_carry_the_errors_and_change_nothing():
    x, w, dy = arrays([(32, 32), (32, 32), (32, 32)])
    rule = GemmRule(fwd=(NVFP4, INT8), dgrad=(Quantizer("e2m1fn@tensor"), REUSE), wgrad=(REUSE, EXACT))
    _, plain = jax.vjp(lambda x, w: qdot(x, w, rule), x, w)
    _, vjp = jax.vjp(lambda x, w, taps: qdot(x, w, rule, taps=taps), x, w, tap_slot())
    dx, dw, taps = vjp(dy)
    np.testing.assert_array_equal(dx, plain(dy)[0])
    np.testing.assert_array_equal(dw, plain(dy)[1])
    statistics = read_taps(taps)
    assert set(statistics) == {"fwd.x", "fwd.w", "dgrad.dy"}  # a reused operand has no error of its own
    for name, source, fmt, axis in (
        ("fwd.x", x, "nvfp4", 1),
        ("fwd.w", w, "int8_symmetric@row", 0),
        ("dgrad.dy", dy, "e2m1fn@tensor", 1),
    ):
        source = np.asarray(source, np.float64)
        rounded = np.asarray(fake_quant(jnp.float32(source), fmt, axis=axis), np.float64)
        found = statistics[name]
        snr = 10 * np.log10((source**2).sum() / ((rounded - source) ** 2).sum())
        cosine = (source * rounded).sum() / np.sqrt((source**2).sum() * (rounded**2).sum())
        np.testing.assert_allclose(
            [found.sqnr_db, found.cosine, found.amax], [snr, cosine, np.abs(source).max()], rtol=1e-5
        )
        assert found.underflowed == ((rounded == 0) & (source != 0)).mean()
        assert found.clipped == (0 if name != "fwd.x" else _beyond_six(source))


def _beyond_six(x):
    """NVFP4's e4m3 scales may round down: the fraction of values that then lie beyond 6 scales, and clip."""
    amax = np.abs(x).max()
    tensor = np.float32(amax) / np.float32(448 * 6)
    blocks = np.float32(x).reshape(-1, 16)
    scale = (np.abs(blocks).max(1) / np.float32(6) / tensor).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    unscaled = blocks * ((np.float32(1) / tensor) / scale)[:, None]
    return (np.abs(unscaled) > 6 * (1 + 2**-20)).mean()


def test_clipped_values_are_counted():
    x = jnp.array([[0.5, -9.0, 3.0, 100.0]])
    rule = GemmRule(fwd=(Quantizer("e2m1fn"), EXACT))
    _, vjp = jax.vjp(lambda taps: qdot(x, jnp.ones((4, 1)), rule, taps=taps), tap_slot())
    assert read_taps(vjp(jnp.ones((1, 1)))[0])["fwd.x"].clipped == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fwd": (Quantizer("nvfp4", Hadamard(16)), NVFP4)}, "cancels only when both operands have the same"),
        ({"dgrad": (Quantizer("nvfp4", Hadamard(16)), REUSE)}, "cancels only when both operands have the same"),
        ({"fwd": (REUSE, EXACT)}, "no earlier values"),
        ({"dgrad": (REUSE, EXACT)}, "original gradient"),
        ({"wgrad": (Quantizer("nvfp4", source="requantize"), EXACT)}, "original or reused from dgrad"),
        ({"dgrad": (Quantizer("nvfp4", Hadamard(16)),) * 2, "wgrad": (REUSE, EXACT)}, "rotated along another axis"),
    ],
)
def test_rules_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GemmRule(**arguments)


def test_what_cannot_be_multiplied_is_refused_by_name():
    x, w, rule = jnp.ones((3, 32)), jnp.ones((31, 4)), GemmRule(fwd=(NVFP4, NVFP4))
    with pytest.raises(ValueError, match=r"contraction axes of x\[3, 32\] and w\[31, 4\] differ: \(1,\) and \(0,\)"):
        qdot(x, w, rule)
    with pytest.raises(TypeError, match=r"qdot takes a GemmRule, .* not 'mxfp4'"):
        qdot(x, w, "mxfp4")
