"""qconv against lax.conv_general_dilated, and against patches gathered by loops in numpy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lowprec import recipes
from lowprec.ops import KEEP, GemmRule, initial_variables, qconv, qdot
from lowprec.quantizers import EXACT, REUSE, Hadamard, Quantizer, fake_quant, tap_slot

INT8 = Quantizer("int8_symmetric@row")
SIX_INT8 = GemmRule((INT8,) * 2, (INT8,) * 2, (INT8,) * 2)
IDENTITY = GemmRule(*[(Quantizer("float32"),) * 2] * 3)
LINE, IMAGE = ("NWC", "WIO", "NWC"), ("NHWC", "HWIO", "NHWC")


def case(x, w, dimension_numbers=IMAGE, **arguments):
    return x, w, {"padding": "SAME", "dimension_numbers": dimension_numbers, **arguments}


# Features last.
CASES = {
    "line": case((2, 9, 3), (4, 3, 5), LINE, window_strides=(2,)),
    "image": case((2, 5, 6, 3), (3, 3, 3, 4), window_strides=(1, 1)),
    "strides": case((2, 7, 6, 3), (3, 2, 3, 4), window_strides=(2, 3)),
    "valid, dilated": case((2, 7, 6, 2), (3, 2, 2, 4), window_strides=(1, 2), padding="VALID", rhs_dilation=(2, 3)),
    "explicit": case((2, 5, 4, 3), (2, 2, 3, 4), window_strides=(1, 1), padding=[(2, 0), (-1, 1)]),
    "transposed": case(
        (1, 4, 3, 2), (3, 3, 2, 4), window_strides=(1, 1), padding=[(2, 1), (2, 2)], lhs_dilation=(2, 2)
    ),
    "groups": case((2, 5, 5, 4), (3, 3, 2, 6), window_strides=(2, 1), feature_group_count=2),
    "depthwise": case((2, 6, 3), (3, 1, 6), LINE, window_strides=(1,), feature_group_count=3),
}
# Any order of the axes, and what else only lax is a reference for.
LAYOUTS = {
    "default, low": case((2, 3, 7, 6), (4, 3, 2, 2), None, window_strides=(2, 3), padding="SAME_LOWER"),
    "out of order": case(
        (3, 5, 2, 4, 6),
        (2, 3, 2, 2, 4),
        ("CDNHW", "HIDWO", "DCNWH"),
        window_strides=(1, 2, 1),
        padding=[(1, 0), (-1, 2), (0, 0)],
    ),
}


def arrays(*shapes, dtype=jnp.float32):
    return [jax.random.normal(jax.random.key(i), shape).astype(dtype) for i, shape in enumerate(shapes)]


def with_gradients(run, x, w):
    """y, dx and dw, for the dy that `arrays` gives."""

    @jax.jit
    def gradients(x, w):
        y, vjp = jax.vjp(run, x, w)
        (dy,) = arrays(y.shape)
        return y, *vjp(dy.astype(y.dtype))

    return gradients(x, w)


@pytest.mark.parametrize(("name", "dtype"), [("strides", jnp.float32), ("out of order", jnp.bfloat16)])
def test_a_rule_that_keeps_everything_is_lax_bit_for_bit(name, dtype):
    x, w, arguments = (CASES | LAYOUTS)[name]
    x, w = arrays(x, w, dtype=dtype)
    ours = with_gradients(lambda x, w: qconv(x, w, KEEP, **arguments), x, w)
    lax_s = with_gradients(lambda x, w: lax.conv_general_dilated(x, w, **arguments), x, w)
    for a, b in zip(ours, lax_s, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.float32(a), np.float32(b))


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_product_of_patches_is_the_convolution(name):
    x, w, arguments = (CASES | LAYOUTS)[name]
    x, w = arrays(x, w)
    ours = with_gradients(lambda x, w: qconv(x, w, IDENTITY, **arguments), x, w)
    exact = with_gradients(lambda x, w: lax.conv_general_dilated(x, w, precision="highest", **arguments), x, w)
    for a, b in zip(ours, exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)  # sums of at most 100 products of normals


def patch_indices(shape, window, window_strides, padding, lhs_dilation=None, rhs_dilation=None):
    """For each image, output position, kernel position and feature: 1 + the flat index in x; 0 for a padded zero."""
    spatial, rank = shape[1:-1], len(window)
    lhs_dilation, rhs_dilation = lhs_dilation or (1,) * rank, rhs_dilation or (1,) * rank
    spans = [(k - 1) * d + 1 for k, d in zip(window, rhs_dilation, strict=True)]
    if padding == "SAME":
        whole = [
            max((-(-n // s) - 1) * s + span - n, 0) for n, s, span in zip(spatial, window_strides, spans, strict=True)
        ]
        padding = [(total // 2, total - total // 2) for total in whole]
    padding = [(0, 0)] * rank if padding == "VALID" else padding
    dilated = [(n - 1) * d + 1 for n, d in zip(spatial, lhs_dilation, strict=True)]
    outputs = [
        (n + low + high - span) // s + 1
        for n, (low, high), span, s in zip(dilated, padding, spans, window_strides, strict=True)
    ]
    flat = np.arange(1, np.prod(shape) + 1).reshape(shape)
    indices = np.zeros((shape[0], *outputs, *window, shape[-1]), np.int64)
    for out in itertools.product(*map(range, outputs)):
        for place in itertools.product(*map(range, window)):
            where = [
                o * s + k * r - low
                for o, s, k, r, (low, _) in zip(out, window_strides, place, rhs_dilation, padding, strict=True)
            ]
            if all(0 <= p < n and p % d == 0 for p, n, d in zip(where, dilated, lhs_dilation, strict=True)):
                at = tuple(p // d for p, d in zip(where, lhs_dilation, strict=True))
                indices[(slice(None), *out, *place)] = flat[(slice(None), *at)]
    return indices


def int8(v, axis):
    scale = np.abs(v).max(axis=axis, keepdims=True) / np.float32(127)
    scale = np.where(scale == 0, 1, scale)
    return np.rint(v * (np.float32(1) / scale)).astype(np.float64) * scale


def nvfp4(v, axis):
    """Blocks of the reference implementation along an axis filled up with zeros."""
    axis %= v.ndim
    short = -v.shape[axis] % 16
    padded = np.pad(v, [(0, short if i == axis else 0) for i in range(v.ndim)])
    rounded = np.asarray(fake_quant(jnp.asarray(padded), "nvfp4", axis=axis), np.float64)
    return rounded[tuple(slice(0, n) for n in v.shape)]


def reference(x, w, dy, arguments, quantize):
    """y, dx, dw of a convolution of one group, as the products of quantized matrices."""
    indices = patch_indices(x.shape, w.shape[:-2], **arguments)
    positions = indices.shape[: x.ndim - 1]
    patches = np.concatenate([[np.float32(0)], x.ravel()])[indices].reshape(np.prod(positions), -1)
    kernel, dy = w.reshape(-1, w.shape[-1]), dy.reshape(-1, w.shape[-1])
    y = quantize(patches, 1) @ quantize(kernel, 0)
    d_patches = quantize(dy, 1) @ quantize(kernel, 1).T
    dw = quantize(patches, 0).T @ quantize(dy, 0)
    dx = np.zeros(x.size + 1)
    np.add.at(dx, indices.ravel(), d_patches.ravel())
    return y.reshape(*positions, -1), dx[1:].reshape(x.shape), dw.reshape(w.shape)


def grouped_reference(x, w, dy, arguments, quantize):
    arguments = {name: value for name, value in arguments.items() if name != "dimension_numbers"}
    groups = arguments.pop("feature_group_count", 1)
    parts = lambda v: np.split(v, groups, axis=-1)
    each = [reference(*part, arguments, quantize) for part in zip(parts(x), parts(w), parts(dy), strict=True)]
    return [np.concatenate(arrays, axis=-1) for arrays in zip(*each, strict=True)]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("strides", "valid, dilated", "explicit") else ())
        for name in CASES
        if name != "image"
    ],
)
def test_rows_are_scaled_along_the_contraction_of_each_product(name):
    x, w, arguments = CASES[name]
    x, w = arrays(x, w)
    y, dx, dw = with_gradients(lambda x, w: qconv(x, w, SIX_INT8, backend="emulate", **arguments), x, w)
    (dy,) = arrays(y.shape)
    expected = grouped_reference(*(np.asarray(v) for v in (x, w, dy)), arguments, int8)
    for a, b in zip((y, dx, dw), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-5)


def test_blocks_of_odd_sizes_are_filled_up():
    x, w, arguments = CASES["valid, dilated"]
    x, w = arrays(x, w)
    q = Quantizer("nvfp4", pad=True)
    rule = GemmRule((q, q), (q, q), (q, q))
    y, dx, dw = with_gradients(lambda x, w: qconv(x, w, rule, **arguments), x, w)
    (dy,) = arrays(y.shape)
    expected = grouped_reference(*(np.asarray(v) for v in (x, w, dy)), arguments, nvfp4)
    for a, b in zip((y, dx, dw), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-5)
    with pytest.raises(ValueError, match="do not divide axis"):
        qconv(x, w, GemmRule(fwd=(Quantizer("nvfp4"), EXACT)), **arguments)


def test_rotations_cancel():
    x, w, arguments = CASES["groups"]
    x, w = arrays(x, w)
    rotated = Quantizer("float32", Hadamard(16, "random"), pad=True)
    rule = GemmRule((rotated,) * 2, (rotated,) * 2, (rotated,) * 2)
    ours = with_gradients(lambda x, w: qconv(x, w, rule, key=jax.random.key(5), **arguments), x, w)
    exact = with_gradients(lambda x, w: lax.conv_general_dilated(x, w, precision="highest", **arguments), x, w)
    for a, b in zip(ours, exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-5)


def test_the_backward_pass_finds_the_noise_of_the_forward_one():
    """A 1x1 identity gives q(x); reused in wgrad it must be the same, though patches are made anew."""
    (x,) = arrays((2, 3, 3, 4))
    rule = GemmRule(fwd=(Quantizer("fx8.1", rounding="stochastic"), EXACT), wgrad=(EXACT, REUSE))
    eye = jnp.eye(4)[None, None]
    arguments = CASES["image"][2]
    y, vjp = jax.vjp(lambda w: qconv(x, w, rule, key=jax.random.key(1), **arguments), eye)
    assert not (np.asarray(y) * 2 % 1).any()
    (dy,) = arrays(y.shape)
    expected = np.asarray(y, np.float64).reshape(-1, 4).T @ np.asarray(dy, np.float64).reshape(-1, 4)
    np.testing.assert_allclose(vjp(dy)[0][0, 0], expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="needs a key"):
        qconv(x, eye, rule, **arguments)


def test_gradients_of_overlapping_patches_are_added_in_float32():
    x, w, arguments = CASES["image"]
    x, w = arrays(x, w, dtype=jnp.bfloat16)
    wide = with_gradients(lambda x, w: qconv(x, w, IDENTITY, **arguments), x.astype(jnp.float32), w)
    (dy,) = arrays(wide[0].shape, dtype=jnp.bfloat16)
    run = lambda x: jax.vjp(lambda x: qconv(x, w, IDENTITY, **arguments), x)[1](dy.astype(jnp.result_type(x, w)))[0]
    narrow, exact = run(x), run(x.astype(jnp.float32))
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(narrow), np.float32(exact.astype(jnp.bfloat16)))


def test_an_infinity_does_not_become_nan_around_it():
    x, w, arguments = CASES["image"]
    x, w = arrays(x, w)
    y = qconv(x.at[0, 2, 2, 1].set(jnp.inf), w, IDENTITY, **arguments)
    assert not np.isnan(y).any()
    # Formats saturate: the largest float32 times a weight, where the 3 x 3 patches hold it, for each output.
    assert (np.abs(y) > 1e30).sum() == 9 * 4


def test_what_is_kept_for_the_backward_pass_is_x_and_not_its_patches():
    x, w, arguments = CASES["image"]
    x, w = arrays(x, w)
    _, vjp = jax.vjp(lambda x, w: qconv(x, w, SIX_INT8, **arguments), x, w)
    kept = sum(leaf.size for leaf in jax.tree.leaves(vjp))
    assert kept <= x.size + w.size + 8


def test_taps_see_the_patches_and_change_nothing():
    x, w, arguments = CASES["image"]
    x, w = arrays(x, w)
    run = lambda x, w, taps: qconv(x, w, SIX_INT8, taps=taps, **arguments)
    y, vjp = jax.vjp(run, x, w, tap_slot())
    dx, dw, taps = vjp(y)
    plain = jax.vjp(lambda x, w: qconv(x, w, SIX_INT8, **arguments), x, w)[1](y)
    np.testing.assert_allclose(dx, plain[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(dw, plain[1], rtol=0, atol=1e-5)
    values = np.asarray(taps)[:, 2]
    patches, outputs = 2 * 5 * 6 * 27, 2 * 5 * 6 * 4
    np.testing.assert_array_equal(values, [patches, w.size, outputs, w.size, outputs, patches])


def test_learned_scales_and_their_gradients_are_those_of_the_product():
    """A 1x1 convolution is the product itself; variables may be given, or made by a function of patches and kernel."""
    x, w, dy = arrays((2, 3, 3, 8), (8, 4), (2, 3, 3, 4))
    rule = recipes.get("lsq_4").rule_for("layer")
    assert rule.learns
    variables = initial_variables(x, w, rule)

    def product(x, w, params):
        return qdot(x, w, rule, variables=variables._replace(params=params))

    def convolution(x, w, params):
        made = lambda patches, kernel: variables._replace(params=params)
        return qconv(x, w[None, None], rule, variables=made, **CASES["image"][2])

    results = []
    for run in (product, convolution):
        gradients = jax.jit(lambda x, w, p, run=run: (run(x, w, p), jax.vjp(run, x, w, p)[1](dy)))
        results.append(jax.tree.leaves(gradients(x, w, variables.params)))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert all(leaf.any() for leaf in results[1][3:])


def test_an_empty_output_is_that_of_lax():
    arguments = {**CASES["image"][2], "padding": "VALID"}
    y, dx, dw = with_gradients(lambda x, w: qconv(x, w, SIX_INT8, **arguments), *arrays((1, 2, 2, 3), (3, 3, 3, 4)))
    assert y.shape == (1, 0, 0, 4)
    assert not dx.any() and not dw.any()


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "arguments", "message"),
    [
        ((1, 8, 8, 3), (3, 3, 4, 5), {}, r"qconv of x\[1, 8, 8, 3\] and w\[3, 3, 4, 5\].*3 // 1 != 4"),
        ((1, 8, 8, 3), (3, 3, 3), {}, "ndim to be equal"),
        ((1, 8, 8, 3), (3, 3, 3, 5), {"window_strides": (1,)}, "same number of dimensions"),
        (
            (1, 8, 8, 3),
            (3, 3, 3, 5),
            {"padding": "CIRCULAR"},
            "expected 'VALID', 'SAME', or 'SAME_LOWER', got CIRCULAR",
        ),
        ((1, 8, 8, 3), (3, 3, 3, 5), {"padding": [(1, 1)]}, "expected 2, got 1"),
        ((1, 8, 8, 4), (3, 3, 2, 5), {"feature_group_count": 2}, "5 is not a multiple of 2"),
        ((4, 8, 8, 3), (3, 3, 3, 4), {"batch_group_count": 2}, "batch_group_count is 1, not 2"),
    ],
)
@pytest.mark.parametrize("rule", [KEEP, SIX_INT8], ids=["exact", "quantized"])
def test_convolutions_that_do_not_fit_are_refused(x_shape, w_shape, arguments, message, rule):
    with pytest.raises(ValueError, match=message):
        qconv(jnp.ones(x_shape), jnp.ones(w_shape), rule, **{**case((), (), window_strides=(1, 1))[2], **arguments})


def test_a_rule_is_a_gemm_rule():
    with pytest.raises(TypeError, match="GemmRule"):
        qconv(jnp.ones((1, 4, 4, 1)), jnp.ones((2, 2, 1, 1)), "mxfp4", **CASES["image"][2])
