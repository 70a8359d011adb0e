"""Products with batch axes, such as attention scores q · kᵀ, against a Python loop over the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec.ops import GemmRule, qdot
from lowprec.quantizers import EXACT, REUSE, Clip, Hadamard, Quantizer, fake_quant

# q (batch, heads, queries, features) and k (batch, heads, keys, features).
SCORES = (((3,), (3,)), ((0, 1), (0, 1)))
BATCH, QUERIES, KEYS, FEATURES = (2, 2), 12, 20, 16
H16 = Hadamard(16, "fixed")


def padded(fmt, rotation=None, **options):
    return Quantizer(fmt, rotation, pad=True, **options)


def six(q):
    return GemmRule((q, q), (q, q), (q, q))


def arrays():
    """Matrices of unlike magnitudes."""
    q, k, dy = (
        jax.random.normal(jax.random.key(i), (*BATCH, *shape))
        for i, shape in enumerate([(QUERIES, FEATURES), (KEYS, FEATURES), (QUERIES, KEYS)])
    )
    return q * jnp.array([1.0, 3.0])[:, None, None], k * jnp.array([0.1, 1.0])[:, None, None, None], dy


def scores(rule, q, k, **options):
    dimension_numbers = SCORES if q.ndim == 4 else (((1,), (1,)), ((), ()))
    return qdot(q, k, rule, dimension_numbers=dimension_numbers, **options)


def with_gradients(rule, **options):
    @jax.jit
    def run(q, k, dy):
        y, vjp = jax.vjp(lambda q, k: scores(rule, q, k, **options), q, k)
        return y, *vjp(dy)

    return run


def loop(run, *operands):
    each = [[run(*(v[b, h] for v in operands)) for h in range(BATCH[1])] for b in range(BATCH[0])]
    return jax.tree.map(lambda *rows: jnp.stack(rows), *[jax.tree.map(lambda *v: jnp.stack(v), *row) for row in each])


RULES = {
    "row": six(Quantizer("int8_symmetric@row")),
    "blocks": six(padded("int4@1x8")),
    "powers of two, requantized, rotated, clipped": GemmRule(
        (padded("mxfp4", H16, estimator=Clip()),) * 2,
        (padded("mxfp4", H16), padded("mxfp4", H16, source="requantize")),
        (padded("mxfp4", H16), padded("mxfp4", H16, source="requantize")),
    ),
    "tiles": six(padded("int8@8x8")),
    "reused": GemmRule(
        (Quantizer("e4m3fn@row"),) * 2, (Quantizer("e5m2"), REUSE), (REUSE, REUSE), normalize_input=True
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_each_matrix_of_the_batch_is_a_product_of_its_own(name):
    operands = arrays()
    run = with_gradients(RULES[name], backend="emulate")
    for a, b in zip(run(*operands), loop(run, *operands), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["row", "tensor"])
def test_native_products_of_a_batch_agree_with_emulation(name):
    rule = six(Quantizer(f"int8_symmetric@{name}"))
    operands = arrays()
    for a, b in zip(
        *(with_gradients(rule, backend=backend)(*operands) for backend in ("native", "emulate")), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("fmt", ["e4m3fn@tensor", "nvfp4"])
def test_tensor_scales_are_one_for_the_whole_batch_and_one_for_each_product_under_vmap(fmt):
    operands = q, k, dy = arrays()
    rule = six(padded(fmt))
    run = with_gradients(rule)

    def blocks(v, axis):
        """Of the whole batch: 16 along the axis, filled up with zeros."""
        short = -v.shape[axis] % 16
        filled = jnp.pad(v, [(0, short if i == axis else 0) for i in range(v.ndim)])
        rounded = fake_quant(filled, fmt, axis=axis)
        return np.asarray(jax.lax.slice_in_dim(rounded, 0, v.shape[axis], axis=axis), np.float64)

    expected = (
        np.einsum("bhqf,bhkf->bhqk", blocks(q, 3), blocks(k, 3)),
        np.einsum("bhqk,bhkf->bhqf", blocks(dy, 3), blocks(k, 2)),
        np.einsum("bhqk,bhqf->bhkf", blocks(dy, 2), blocks(q, 2)),
    )
    for a, b in zip(run(*operands), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)
    for a, b in zip(jax.vmap(jax.vmap(run))(*operands), loop(run, *operands), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("signs", [None, "random"])
def test_rotations_cancel_in_every_product_of_the_batch(signs):
    operands = q, k, dy = arrays()
    found = with_gradients(six(padded("float32", Hadamard(16, signs))), key=jax.random.key(7))(*operands)
    q, k, dy = (np.asarray(v, np.float64) for v in operands)
    exact = (
        np.einsum("bhqf,bhkf->bhqk", q, k),
        np.einsum("bhqk,bhkf->bhqf", dy, k),
        np.einsum("bhqk,bhqf->bhkf", dy, q),
    )
    for a, b in zip(found, exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


def test_noise_differs_between_the_products_of_a_batch_and_has_no_bias():
    operands = arrays()
    noisy = Quantizer("int4_symmetric@row", rounding="stochastic")
    rule = GemmRule(fwd=(noisy, EXACT), dgrad=(noisy, EXACT), wgrad=(noisy, noisy))
    same = [jnp.broadcast_to(v[:1, :1], v.shape) for v in operands]
    for v in with_gradients(rule, key=jax.random.key(1))(*same):
        assert (np.asarray(v[0, 0]) != np.asarray(v[1, 1])).mean() > 0.9
    # The batch is a sample: 1024 independent draws of one product.
    many = [jnp.broadcast_to(v[0, 0], (1024, 1, *v.shape[2:])) for v in operands]
    exact = [np.asarray(v) for v in with_gradients(GemmRule())(*(v[0, 0] for v in operands))]
    for draws, mean in zip(with_gradients(rule, key=jax.random.key(2))(*many), exact, strict=True):
        draws = np.asarray(draws, np.float64)[:, 0]
        sigma = draws.std(axis=0, ddof=1) / np.sqrt(len(draws))
        # Of 752 means none lies beyond 5 sigma (4e-4 in all), but for the rounding of float32 sums.
        assert (np.abs(draws.mean(axis=0) - mean) <= 5 * sigma + 1e-5).all()


def test_reused_noise_is_that_of_the_forward_product():
    q, k, dy = arrays()
    noisy = Quantizer("int4_symmetric@row", rounding="stochastic")
    rule = GemmRule(fwd=(noisy, noisy), dgrad=(EXACT, REUSE), wgrad=(EXACT, REUSE))
    eye = jnp.broadcast_to(jnp.eye(FEATURES), (*BATCH, FEATURES, FEATURES))
    on_grid = with_gradients(GemmRule(fwd=(noisy, EXACT)), key=jax.random.key(3))
    rounded_q = np.asarray(on_grid(q, eye, jnp.zeros((*BATCH, QUERIES, FEATURES)))[0], np.float64)
    _, dq, dk = with_gradients(rule, key=jax.random.key(3))(q, k, dy)
    expected = np.einsum("bhqk,bhqf->bhkf", np.asarray(dy, np.float64), rounded_q)
    np.testing.assert_allclose(dk, expected, rtol=0, atol=2e-5)
    assert np.abs(np.asarray(dq) - np.einsum("bhqk,bhkf->bhqf", dy, k)).max() > 1e-2  # k is not the original
