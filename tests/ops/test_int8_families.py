"""HALO, Jetfire and SwitchBack against their formulas in float64, and rotations undone on the product."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lowprec import recipes
from lowprec.errors import UsageError
from lowprec.ops import GemmRule, qdot
from lowprec.quantizers import EXACT, REUSE, Clip, Hadamard, Quantizer, hadamard_matrix
from lowprec.recipes.library.halo import halo

M, K, N = 37, 40, 24  # rows are filled up to 40 = 2 · 20, also a base of its own
X, W, DY = (
    np.asarray(jax.random.normal(jax.random.key(i), s), np.float64) for i, s in enumerate([(M, K), (K, N), (M, N)])
)


def gradients(rule, x=X, w=W, dy=DY, key=None):
    @jax.jit
    def run(x, w, dy):
        y, vjp = jax.vjp(lambda x, w: qdot(x, w, rule, key=key), x, w)
        return y, *vjp(dy)

    return run(*(jnp.float32(a) for a in (x, w, dy)))


def relative(a, b):
    return float(np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b))


def by_tensor(element):
    """absmax of the whole array, to nearest even."""
    largest, dtype = {
        "int8": (127, None),
        "e4m3fn": (448, ml_dtypes.float8_e4m3fn),
        "e3m2fn": (28, ml_dtypes.float6_e3m2fn),
    }[element]

    def quantize(a):
        scale = np.abs(a).max() / largest
        return (np.rint(a / scale) if dtype is None else (a / scale).astype(dtype).astype(np.float64)) * scale

    return quantize


def rotation(n):
    return hadamard_matrix(n).astype(np.float64) / np.sqrt(n)


HALO = {"halo0": (0, "e4m3fn"), "halo1": (1, "e4m3fn"), "halo2": (2, "int8"), "halo2_fp6": (2, "e3m2fn")}


@pytest.mark.parametrize("name", HALO)
def test_halo_is_its_table(name):
    level, element = HALO[name]
    Q, H = by_tensor(element), rotation(K)
    y = Q(X @ H) @ Q(H.T @ W) if level else Q(X) @ Q(W)
    dx, dw = Q(DY) @ Q(W).T, Q(X).T @ Q(DY)
    if level == 2:
        filled = np.concatenate([DY, np.zeros((3, N))])
        dx = (rotation(40) @ (Q(rotation(40).T @ filled) @ Q(W).T))[:M]
    rule = recipes.get(name).rule_for("layers/0/mlp/up")
    for ours, theirs in zip(gradients(rule), (y, dx, dw), strict=True):
        # No element of these operands lies so near a tie that float32 rounds it to another side than float64.
        assert relative(ours, theirs) < 1e-6


def test_halo_of_any_format_and_no_other_level():
    assert halo(1, "int8_symmetric").rule_for("a").fwd[0] == Quantizer(
        "int8_symmetric@tensor", Hadamard("full"), pad=True
    )
    with pytest.raises(UsageError, match="levels of HALO are 0, 1 and 2, not 3"):
        halo(3)


def test_level_two_brings_back_what_one_token_loses_for_all():
    """A gradient with one large row: a scale by tensor leaves nothing of the others, unless rows are mixed first."""
    dy = np.asarray(jax.random.normal(jax.random.key(5), (128, N)), np.float64)
    dy[17] *= 500
    x = np.zeros((128, K))
    others = np.arange(128) != 17
    errors = []
    for level in (1, 2):
        dx = gradients(halo(level, "int8_symmetric").rule_for("a"), x, W, dy)[1]
        errors.append(relative(np.asarray(dx)[others], dy[others] @ W.T))
    # Of an int8 step of 500 · 3 / 127 = 12 a normal number sees nothing; the rotation leaves a step √128 times smaller.
    assert errors[0] == pytest.approx(1, abs=0.05)
    assert errors[1] < 0.4


SHAPES = {"rows": (37, 40, 24), "a length that works": (48, 20, 16), "one row": (1, 8, 4)}


@pytest.mark.parametrize("signs", [None, "fixed", "random"])
@pytest.mark.parametrize("size", ["full", 8])
@pytest.mark.parametrize("where", [("fwd", 0), ("fwd", 1), ("dgrad", 0), ("dgrad", 1), ("wgrad", 0), ("wgrad", 1)])
def test_an_outer_rotation_is_undone_on_the_product(where, size, signs):
    """With a format that rounds nothing all three products are the plain ones, whichever operand is rotated."""
    product, index = where
    operands = [EXACT, EXACT]
    operands[index] = Quantizer("float32", Hadamard(size, signs, "outer"), pad=True)
    rule = GemmRule(**{product: tuple(operands)})
    for shape in SHAPES.values() if (size, signs) == ("full", None) else [SHAPES["rows"]]:
        m, k, n = shape
        x, w, dy = (np.random.default_rng(i).normal(size=s) for i, s in enumerate([(m, k), (k, n), (m, n)]))
        found = gradients(rule, x, w, dy, jax.random.key(3))
        for ours, theirs in zip(found, (x @ w, dy @ w.T, x.T @ dy), strict=True):
            assert relative(ours, theirs) < 2e-6
            assert ours.shape == theirs.shape


def test_outer_rotations_of_both_operands_and_of_a_batch():
    outer = Quantizer("float32", Hadamard("full", "random", "outer"), pad=True)
    x, w = np.random.default_rng(0).normal(size=(3, 11, 8)), np.random.default_rng(1).normal(size=(3, 8, 9))
    dims = (((2,), (1,)), ((0,), (0,)))
    y = qdot(
        jnp.float32(x), jnp.float32(w), GemmRule(fwd=(outer, outer)), dimension_numbers=dims, key=jax.random.key(0)
    )
    assert relative(y, x @ w) < 2e-6


def test_a_whole_axis_inside_a_product_cancels_and_its_gradient_comes_back():
    """K = 13 is filled up to 16; the mask of the estimator, which lets everything pass, acts on rotated values."""
    inner = Quantizer("float32", Hadamard("full"), pad=True)
    masked = Quantizer("int8@row", Hadamard("full"), estimator=Clip(margin=1e9), pad=True)
    x, w, dy = (np.random.default_rng(i).normal(size=s) for i, s in enumerate([(6, 13), (13, 5), (6, 5)]))
    for rule, bound in (
        (GemmRule(fwd=(inner, inner), dgrad=(EXACT, REUSE), wgrad=(EXACT, REUSE)), 2e-6),
        (GemmRule(fwd=(masked, masked)), 0.02),  # of the forward product: int8
    ):
        y, dx, dw = gradients(rule, x, w, dy)
        assert relative(y, x @ w) < bound
        assert relative(dx, dy @ w.T) < 2e-6 and relative(dw, x.T @ dy) < 2e-6


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"fwd": (Quantizer("int8", Hadamard("full")), Quantizer("int8"))}, "x is rotated by full H and w by None"),
        (
            {"dgrad": (Quantizer("int8", Hadamard("full", side="outer")), Quantizer("int8", Hadamard("full")))},
            "cancels only when both operands have the same",
        ),
        (
            {"fwd": (Quantizer("int8", Hadamard("full", side="outer")), EXACT), "wgrad": (EXACT, REUSE)},
            "x is rotated along an axis that its product keeps",
        ),
        (
            {"dgrad": (Quantizer("int8", Hadamard("full", side="outer")), EXACT), "wgrad": (REUSE, EXACT)},
            "dy cannot be reused from dgrad, where it is rotated",
        ),
    ],
)
def test_rotations_that_make_no_sense(rule, message):
    with pytest.raises(UsageError, match=message):
        GemmRule(**rule)


def test_a_length_without_a_matrix_is_refused_unless_it_may_be_filled_up():
    rule = GemmRule(dgrad=(Quantizer("int8@tensor", Hadamard("full", side="outer")), EXACT))
    with pytest.raises(UsageError, match=r"no Hadamard matrix of order 37 .* nearest are 36 and 40"):
        gradients(rule)


def test_full_and_outer_in_the_short_form():
    text = "dgrad=int8@tensor(hadamardfull.random.outer),int8@tensor wgrad=int8@row(hadamardfull)"
    recipe = recipes.parse(text)
    assert recipe.rule_for("a").dgrad[0].rotation == Hadamard("full", "random", "outer")
    assert recipes.parse(str(recipe)) == recipe


def test_jetfire_quantizes_all_six_operands_in_tiles():
    """Of 32 × 32, the last ones cut; what is reused equals what quantizing along the other axis would give."""
    m, k, n = 48, 64, 40
    x, w, dy = (
        np.random.default_rng(i).normal(size=s).astype(np.float32) for i, s in enumerate([(m, k), (k, n), (m, n)])
    )

    def tiles(a):
        y = np.zeros(a.shape)
        for i in range(0, a.shape[0], 32):
            for j in range(0, a.shape[1], 32):
                tile = a[i : i + 32, j : j + 32].astype(np.float64)
                scale = np.abs(tile).max() / 127
                y[i : i + 32, j : j + 32] = np.rint(tile / scale) * scale
        return y

    rule = recipes.get("jetfire").rule_for("a")
    found = gradients(rule, x, w, dy)
    for ours, theirs in zip(found, (tiles(x) @ tiles(w), tiles(dy) @ tiles(w).T, tiles(x).T @ tiles(dy)), strict=True):
        assert relative(ours, theirs) < 1e-6
    again = gradients(GemmRule(*[(rule.fwd[0],) * 2] * 3), x, w, dy)
    for ours, theirs in zip(found, again, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_switchback_keeps_its_weight_gradient_exact():
    row = lambda a: np.rint(a * 127 / np.abs(a).max(1, keepdims=True)) * np.abs(a).max(1, keepdims=True) / 127
    Q = by_tensor("int8")
    for ours, theirs in zip(
        gradients(recipes.get("int8").rule_for("a")), (row(X) @ Q(W), row(DY) @ Q(W).T, X.T @ DY), strict=True
    ):
        assert relative(ours, theirs) < 1e-6


def test_mxfp8_quantizes_each_orientation_from_the_original():
    """Blocks of 32 along the axis of the product, a power of two from the largest exponent: OCP MX, floor."""
    x, w, dy = (
        np.random.default_rng(i).normal(size=s).astype(np.float32) for i, s in enumerate([(64, 96), (96, 32), (64, 32)])
    )

    def mx(a, axis):
        blocks = np.moveaxis(a, axis, -1).astype(np.float64).reshape(-1, 32)
        scale = 2.0 ** (np.floor(np.log2(np.abs(blocks).max(1, keepdims=True))) - 8)
        values = np.clip(blocks / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale
        return np.moveaxis(values.reshape(np.moveaxis(a, axis, -1).shape), -1, axis)

    expected = mx(x, 1) @ mx(w, 0), mx(dy, 1) @ mx(w, 1).T, mx(x, 0).T @ mx(dy, 0)
    for ours, theirs in zip(gradients(recipes.get("mxfp8").rule_for("a"), x, w, dy), expected, strict=True):
        assert relative(ours, theirs) < 1e-6
