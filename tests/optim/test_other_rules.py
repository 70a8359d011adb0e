"""Adam-mini, SGD-SaI, SPAM's sparse momentum and SOLO against their equations in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowprec import models
from lowprec.errors import UsageError
from lowprec.optim.adam_mini import adam_mini, scale_by_adam_mini
from lowprec.optim.sgd_sai import scale_by_sai
from lowprec.optim.solo import solo
from lowprec.optim.spam import scale_by_spam

STEPS = 4


def gradients(shape, seed=0):
    """Of unlike sizes."""
    draw = np.random.default_rng(seed).normal
    return jnp.asarray(np.exp(draw(size=shape)) * draw(size=(STEPS, *shape)), jnp.float32)


def last_update(transform, grads, params=None):
    state = transform.init(jax.tree.map(lambda g: g[0], grads))
    update = jax.jit(transform.update)
    for t in range(STEPS):
        u, state = update(jax.tree.map(lambda g, t=t: g[t], grads), state, params)
    return u, state


def reference(grads, mean, b1=0.9, b2=0.999, eps=1e-8):
    """Adam in float64 whose v averages what `mean` gives, in a shape that broadcasts."""
    m, v = 0.0, 0.0
    for g in np.asarray(grads, np.float64):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * mean(g**2)
    return m / (1 - b1 ** len(grads)) / (np.sqrt(v / (1 - b2 ** len(grads))) + eps)


def by_head(square):
    """Kernels (K, 2 heads of 6)."""
    heads = square.reshape(len(square), 2, 6).mean(axis=(0, 2))
    return np.repeat(heads, 6)


@pytest.mark.parametrize(
    ("path", "shape", "mean", "blocks"),
    [
        ("layer/attention/q/kernel", (8, 12), by_head, 2),
        ("layer/attention/out/kernel", (8, 12), lambda s: s.mean(axis=0), 12),
        ("layers/mlp/up/kernel", (3, 8, 12), lambda s: s.mean(axis=1, keepdims=True), 36),
        ("embed/embedding", (10, 4), lambda s: s.mean(axis=1, keepdims=True), 10),
        ("head/kernel", (4, 10), lambda s: s.mean(axis=0), 10),
        ("layer/mlp_norm/scale", (7,), lambda s: s.mean(), 1),
        ("layers/mlp_norm/scale", (3, 7), lambda s: s.mean(axis=1, keepdims=True), 3),
        ("layer/mlp/up/bias", (7,), lambda s: s, 7),
        ("temperature", (), lambda s: s, 1),
    ],
)
def test_adam_mini_has_one_v_a_block(path, shape, mean, blocks):
    grads = gradients(shape)
    params = {path: grads}
    u, state = last_update(scale_by_adam_mini(head_width=6), params)
    np.testing.assert_allclose(u[path], reference(grads, mean), rtol=1e-5, atol=1e-6)
    assert state.nu[path].size == blocks


def test_adam_mini_takes_axes_by_name_and_refuses_heads_that_are_none():
    grads = gradients((8, 2, 6))
    u, _ = last_update(scale_by_adam_mini(sharing=((".*query.*", (-3, -1)),)), {"query": grads})
    np.testing.assert_allclose(
        u["query"], reference(grads, lambda s: s.mean((0, 2), keepdims=True)), rtol=1e-5, atol=1e-6
    )
    with pytest.raises(UsageError, match=r"q/kernel of shape \(8, 12\) has no heads of width 5"):
        scale_by_adam_mini(head_width=5).init({"q/kernel": jnp.zeros((8, 12))})


def test_adam_mini_in_four_bits_is_half_a_byte_a_parameter_of_our_models():
    config = models.ModelConfig(layers=2, width=128, heads=2)
    model = models.build(config, 256)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    optimizer = adam_mini(1e-3, head_width=64, mu_format="de4", skip=None)
    sizes = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert sizes(jax.eval_shape(optimizer.init, params)) / total < 0.57


def test_sgd_sai_finds_its_factors_in_the_first_step():
    grads = {"w": gradients((4, 6)), "b": gradients((5,), 1)}
    u, state = last_update(scale_by_sai(), grads)
    for name, g in grads.items():
        g = np.asarray(g, np.float64)
        factor = np.linalg.norm(g[0]) / (np.std(g[0], ddof=1) + 1e-8)
        m = g[0]
        for later in g[1:]:
            m = 0.9 * m + 0.1 * later
        np.testing.assert_allclose(u[name], factor * m, rtol=1e-5)
        np.testing.assert_allclose(state.factor[name], factor, rtol=1e-6)


@pytest.mark.parametrize("first", [jnp.ones(()), jnp.ones((1, 1)), jnp.zeros((3, 4)), jnp.full((5,), 0.25)])
def test_sgd_sai_of_a_tensor_without_deviation_is_momentum(first):
    """Where the authors' code divides by 1e-8, or stops for ever."""
    transform = scale_by_sai()
    u, state = transform.update(first, transform.init(first))
    np.testing.assert_array_equal(u, first)
    u, _ = transform.update(jnp.ones_like(first), state)
    np.testing.assert_allclose(u, 0.9 * first + 0.1, rtol=1e-6)


def test_sparse_momentum_moves_a_part_and_draws_it_anew_at_each_reset():
    params, g = {"w": jnp.ones((64, 64)), "b": jnp.ones(64)}, {"w": jnp.ones((64, 64)), "b": jnp.ones(64)}
    transform = scale_by_spam(density=0.25, reset_every=2, seed=3)
    state, moved = transform.init(params), []
    for _ in range(5):
        u, state = jax.jit(transform.update)(g, state, params)
        assert np.all(u["b"] != 0)
        moved.append(np.asarray(u["w"] != 0))
    # 4096 draws of 1/4: standard deviation 0.007. Updates 1 | 2, 3 | 4, 5.
    np.testing.assert_allclose([part.mean() for part in moved], 0.25, atol=0.03)
    assert np.array_equal(moved[1], moved[2]) and np.array_equal(moved[3], moved[4])
    for a, b in ((0, 1), (2, 3)):
        np.testing.assert_allclose((moved[a] & moved[b]).mean(), 0.25**2, atol=0.02)


def test_solo_stores_three_quarters_of_a_byte():
    state = jax.eval_shape(solo(1e-3).init, {"kernel": jnp.zeros((256, 512))})
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert total / 256 / 512 == pytest.approx(0.844, abs=0.01)
    assert optax.tree_utils.tree_get(state, "nu")["kernel"].codes.size == 256 * 512 / 4
