"""qeinsum against numpy.einsum, and against the six operands written out label by label in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowprec.ops import KEEP, GemmRule, qeinsum
from lowprec.ops.einsum import bias_shape
from lowprec.quantizers import Hadamard, Quantizer

INT8 = Quantizer("int8_symmetric@row")
ROLES = ("batch", "contracted", "row", "column", "summed in x", "summed in w")


@st.composite
def einsums(draw):
    """Random subscripts with the role of each label, and shapes."""
    labels = draw(st.lists(st.sampled_from("abcdxyzABXYZ"), min_size=2, max_size=6, unique=True))
    roles = {label: draw(st.sampled_from(ROLES)) for label in labels}
    sizes = {label: draw(st.integers(1, 4)) for label in labels}
    those = lambda *wanted: "".join(draw(st.permutations([label for label in labels if roles[label] in wanted])))
    x, w = those("batch", "contracted", "row", "summed in x"), those("batch", "contracted", "column", "summed in w")
    y = those("batch", "row", "column")
    return x, w, y, roles, sizes


def normal(seed, labels, sizes):
    return np.asarray(jax.random.normal(jax.random.key(seed), tuple(sizes[label] for label in labels)))


def int8(x, labels, roles, role):
    """Symmetric int8, a scale for each line over the labels of a role together."""
    along = tuple(i for i, label in enumerate(labels) if roles[label] == role)
    scale = np.abs(x).max(axis=along, keepdims=True) / np.float32(127)
    return np.rint(x * (np.float32(1) / scale)).astype(np.float64) * scale


@settings(max_examples=20, deadline=None)
@given(einsums())
def test_a_rule_that_keeps_everything_is_einsum(case):
    x_labels, w_labels, y_labels, _, sizes = case
    x, w = normal(0, x_labels, sizes), normal(1, w_labels, sizes)
    for output in (f"->{y_labels}", ""):
        subscripts = f"{x_labels}, {w_labels} {output}"
        ours = qeinsum(subscripts, jnp.asarray(x), jnp.asarray(w), KEEP)
        # At most 4^6 products of normals, summed in float32.
        expected = np.einsum(subscripts.replace(" ", ""), x.astype(np.float64), w.astype(np.float64))
        assert ours.shape == expected.shape
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=2e-4)


@settings(max_examples=8, deadline=None)
@given(einsums())
def test_each_operand_is_quantized_along_the_labels_that_its_own_product_contracts(case):
    x_labels, w_labels, y_labels, roles, sizes = case
    x, w, dy = (normal(i, labels, sizes) for i, labels in enumerate((x_labels, w_labels, y_labels)))
    rule = GemmRule(fwd=(INT8,) * 2, dgrad=(INT8,) * 2, wgrad=(INT8,) * 2)
    subscripts = f"{x_labels},{w_labels}->{y_labels}"
    run = lambda x, w: qeinsum(subscripts, x, w, rule, backend="emulate")
    y, vjp = jax.vjp(run, jnp.asarray(x), jnp.asarray(w))
    dx, dw = vjp(jnp.asarray(dy))

    def summed(v, labels, role):
        kept = "".join(label for label in labels if roles[label] != role)
        return np.einsum(f"{labels}->{kept}", v), kept

    (x, x_kept), (w, w_kept) = summed(x, x_labels, "summed in x"), summed(w, w_labels, "summed in w")
    q = lambda v, labels, role: int8(v, labels, roles, role)
    expected = (
        np.einsum(f"{x_kept},{w_kept}->{y_labels}", q(x, x_kept, "contracted"), q(w, w_kept, "contracted")),
        np.einsum(f"{y_labels},{w_kept}->{x_kept}", q(dy, y_labels, "column"), q(w, w_kept, "column")),
        np.einsum(f"{x_kept},{y_labels}->{w_kept}", q(x, x_kept, "row"), q(dy, y_labels, "row")),
    )
    spread = lambda g, kept, labels: np.broadcast_to(
        np.expand_dims(g, tuple(i for i, label in enumerate(labels) if label not in kept)) if kept != labels else g,
        tuple(sizes[label] for label in labels),
    )
    found = (y, dx, dw)
    wanted = (
        expected[0],
        spread(expected[1], x_kept, x_labels),
        spread(expected[2], w_kept, w_labels),
    )
    for a, b in zip(found, wanted, strict=True):
        # float32 sums of magnitude below 100. Labels summed in float32 may move a value across a rounding boundary.
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-4)


ELLIPSES = [
    ("...d,df->...f", (2, 3, 4), (4, 5)),
    ("...d,df", (2, 3, 4), (4, 5)),
    ("...ij,...jk->...ik", (2, 1, 3, 4), (5, 4, 2)),
    ("i...,...k->k...i", (2, 3), (1, 4)),
    ("...,...->...", (), ()),
    ("ij...,jk->ik...", (2, 3), (3, 4)),
]


@pytest.mark.parametrize(("subscripts", "x_shape", "w_shape"), ELLIPSES)
def test_ellipses_stand_for_any_axes_and_broadcast(subscripts, x_shape, w_shape):
    x, w = (np.asarray(jax.random.normal(jax.random.key(i), s)) for i, s in enumerate((x_shape, w_shape)))
    expected = np.einsum(subscripts, x.astype(np.float64), w.astype(np.float64))
    ours = qeinsum(subscripts, jnp.asarray(x), jnp.asarray(w), KEEP)
    assert ours.shape == expected.shape
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_an_ellipsis_that_the_output_lacks_is_summed_as_jax_does():
    x, w = (jax.random.normal(jax.random.key(i), (2, 3, 4)) for i in range(2))
    expected = np.einsum("bij,bij->b", *(np.asarray(v, np.float64) for v in (x, w)))
    np.testing.assert_allclose(qeinsum("b...,b...->b", x, w, KEEP), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("subscripts", "dtype"),
    [("btnh,nhd->btd", jnp.float32), ("btnh,bsnh->bnts", jnp.float32), ("bnts,bsnh->btnh", jnp.bfloat16)],
)
def test_the_products_of_attention_are_those_of_jax(subscripts, dtype):
    sizes = {"b": 2, "t": 5, "s": 6, "d": 8, "n": 3, "h": 4}
    x_labels, w_labels = subscripts.partition("->")[0].split(",")
    x, w = (jnp.asarray(normal(i, labels, sizes)).astype(dtype) for i, labels in enumerate((x_labels, w_labels)))
    y, vjp = jax.vjp(lambda x, w: jnp.einsum(subscripts, x, w), x, w)
    ours, our_vjp = jax.vjp(lambda x, w: qeinsum(subscripts, x, w, KEEP), x, w)
    for a, b in zip((ours, *our_vjp(y)), (y, *vjp(y)), strict=True):
        assert a.dtype == b.dtype == dtype
        # Another order of the operands of a product may round another way.
        np.testing.assert_allclose(
            np.float32(a), np.float32(b), rtol=2**-7 if dtype == jnp.bfloat16 else 1e-6, atol=1e-5
        )


def test_rotations_cancel_within_each_product():
    rotated = Quantizer("float32", Hadamard(8, "random"), pad=True)
    rule = GemmRule((rotated,) * 2, (rotated,) * 2, (rotated,) * 2)
    x, w = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(2, 5, 3, 4), (3, 4, 6)]))
    run = lambda product: jax.vjp(lambda x, w: product("btnh,nhd->dbt", x, w), x, w)
    y, vjp = run(lambda s, x, w: jnp.einsum(s, x, w, precision="highest"))
    ours, our_vjp = run(lambda s, x, w: qeinsum(s, x, w, rule, key=jax.random.key(3)))
    for a, b in zip((ours, *our_vjp(y)), (y, *vjp(y)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("subscripts", "x_ndim", "w_shape", "shape"),
    [
        ("btd,dnh->btnh", 3, (8, 3, 4), (1, 1, 3, 4)),
        ("...d,df->...f", 4, (8, 6), (1, 1, 1, 6)),
        ("bgi,gio->gbo", 3, (5, 2, 7), (5, 1, 7)),
        ("ab,cb", 2, (3, 4), (1, 3)),
    ],
)
def test_a_bias_has_the_axes_of_the_weights(subscripts, x_ndim, w_shape, shape):
    assert bias_shape(subscripts, x_ndim, w_shape) == shape


@pytest.mark.parametrize(
    ("subscripts", "x_shape", "w_shape", "message"),
    [
        ("ij->ij", (2, 3), (3, 4), "has 1 operand; qeinsum takes two"),
        ("ij,jk,kl", (2, 3), (3, 4), "has 3 operands; qeinsum takes two"),
        ("ij,j1->i1", (2, 3), (3, 4), "labels are letters and one '...', which 'j1' is not"),
        ("ij,jk->ik->k", (2, 3), (3, 4), "'ik->k' is not"),
        ("i..j,jk->ik", (2, 3), (3, 4), "'i..j' is not"),
        ("ijk,kl->il", (2, 3), (3, 4), "x has 2 axes, which 'ijk' does not fit"),
        ("ij,j->i", (2, 3), (3, 4), "w has 2 axes, which 'j' does not fit"),
        ("iij,jk->ik", (2, 2, 3), (3, 4), "x has the label 'i' twice; take the diagonal before"),
        ("ij,jk->iki", (2, 3), (3, 4), "the output has the label 'i' twice"),
        ("ij,jk->iq", (2, 3), (3, 4), "no operand has the label 'q' of the output"),
        ("ij,jk->ik", (2, 3), (5, 4), r"label 'j' is 3 in x\[2, 3\] and 5 in w\[5, 4\]"),
        ("...j,...j->...", (2, 3), (5, 3), r"an axis of '...' is 2 in x\[2, 3\] and 5 in w\[5, 3\]"),
    ],
)
def test_subscripts_that_do_not_fit_are_refused_by_name(subscripts, x_shape, w_shape, message):
    with pytest.raises(ValueError, match=message):
        qeinsum(subscripts, jnp.ones(x_shape), jnp.ones(w_shape), KEEP)
