"""Adam with its moments in few bits, beside Adam in float32; and what it does with unusual tensors and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowprec.errors import UsageError
from lowprec.optim.adam import adam, adam4, adam8, adamw, scale_by_adam
from lowprec.optim.diagnostics import optimizer_diagnostics
from lowprec.optim.stable_adam4 import stable_adam4
from lowprec.optim.stable_spam import stable_spam
from lowprec.optim.state_tensor import is_stored, load

QUICKLY = {"xla_backend_optimization_level": 0}
INPUTS = jax.random.normal(jax.random.key(0), (512, 128))
OUTPUTS = INPUTS @ jax.random.normal(jax.random.key(1), (128, 256)) / 12
OUTPUTS += 0.1 * jax.random.normal(jax.random.key(2), OUTPUTS.shape)


def least_squares(optimizer, steps=400):
    """The loss and the weights after so many steps from zero."""
    loss = lambda w: jnp.mean((INPUTS @ w - OUTPUTS) ** 2)

    def step(carry, _):
        w, state = carry
        updates, state = optimizer.update(jax.grad(loss)(w), state, w)
        return (optax.apply_updates(w, updates), state), None

    w = jnp.zeros((128, 256))
    (w, _), _ = jax.jit(lambda: jax.lax.scan(step, (w, optimizer.init(w)), None, steps))()
    return float(loss(w)), np.asarray(w)


@pytest.fixture(scope="module")
def in_float32():
    return least_squares(adam(3e-3))


@pytest.mark.parametrize(
    ("optimizer", "loss_within", "distance"),
    [
        (adam8(3e-3), 0.01, 0.01),
        (adam(3e-3, mu_format="de8", nu_format="de8"), 0.01, 0.01),
        (adam4(3e-3), 0.03, 0.06),
        (adam(3e-3, mu_format="de4", nu_format="lin4"), 0.03, 0.06),
    ],
    ids=["adam8", "de8", "adam4", "de4 lin4"],
)
def test_least_squares_end_where_float32_ends(in_float32, optimizer, loss_within, distance):
    loss, w = least_squares(optimizer)
    best, of_float32 = in_float32
    assert abs(loss / best - 1) < loss_within
    assert np.linalg.norm(w - of_float32) / np.linalg.norm(of_float32) < distance


TREE = {
    "embed": {"embedding": jnp.ones((64, 128))},
    "layer": {"kernel": jnp.ones((40, 200)), "scale": jnp.ones(8192), "bias": jnp.ones(5)},
    "empty": jnp.ones((0, 3)),
    "number": jnp.ones(()),
}


def stored(state):
    """Whether each leaf of the first moment is in few bits."""
    mu = optax.tree_utils.tree_get(state, "mu")
    return jax.tree.map(is_stored, mu, is_leaf=is_stored)


def test_small_and_named_leaves_stay_in_float32():
    every = stored(adam4(1e-3).init(TREE))
    assert every["layer"] == {"kernel": True, "scale": True, "bias": False}
    assert every["embed"]["embedding"] and not every["number"] and not every["empty"]
    ours = stored(stable_adam4(1e-3).init(TREE))
    assert ours["layer"] == {"kernel": True, "scale": False, "bias": False} and not ours["embed"]["embedding"]
    assert not any(jax.tree.leaves(stored(adam(1e-3).init(TREE))))
    # and they are what they are in plain Adam
    grads = jax.tree.map(lambda w: 0.01 * w, TREE)
    for optimizer in (adam4(1e-3, skip=".*"), adam(1e-3, mu_format="bf16", skip=".*")):
        updates, _ = optimizer.update(grads, optimizer.init(TREE), TREE)
        plain, _ = adam(1e-3).update(grads, adam(1e-3).init(TREE), TREE)
        jax.tree.map(np.testing.assert_array_equal, updates, plain)


@pytest.mark.parametrize(("optimizer", "most"), [(adam8(1e-3), 2.04), (adam4(1e-3), 1.07)], ids=["8", "4"])
def test_bytes_of_state(optimizer, most):
    state = jax.eval_shape(optimizer.init, {"kernel": jnp.zeros((512, 1024))})
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert total / 512 / 1024 <= most


@pytest.mark.parametrize("make", [adam8, adam4, stable_adam4])
def test_every_shape_has_a_first_update_of_one_learning_rate(make):
    """Ragged last axes, one element, none, scalars: all moments in few bits, the update from those that are not."""
    optimizer = make(1e-3, min_size=0)
    params = {"ragged": (3, 257), "one": (1, 1), "zero": (2, 130), "empty": (0, 3), "number": ()}
    params = {name: jnp.ones(shape) for name, shape in params.items()}
    grads = jax.tree.map(lambda w: 0.01 * w, params) | {"zero": jnp.zeros((2, 130))}
    updates, state = jax.jit(optimizer.update, compiler_options=QUICKLY)(grads, optimizer.init(params), params)
    for name, update in updates.items():
        for leaf in jax.tree.leaves(update):
            np.testing.assert_allclose(leaf, 0.0 if name == "zero" else -1e-3, rtol=1e-3)
    nu = optax.tree_utils.tree_get(state, "nu")
    loaded = jax.tree.map(load, nu, is_leaf=is_stored)
    assert jax.tree.map(jnp.shape, loaded) == jax.tree.map(jnp.shape, params)
    np.testing.assert_array_equal(loaded["zero"], 0)
    assert all(np.all(leaf > 0) for name, leaf in loaded.items() if name in ("ragged", "one"))


def test_a_gradient_that_is_not_finite_spoils_its_block_and_no_other():
    """Whoever wants to pass over such a step takes optax.apply_if_finite, which keeps codes and scales as they are."""
    w = jnp.ones((2, 512))
    optimizer = adam8(1e-3, min_size=0)
    _, state = optimizer.update(0.01 * w, optimizer.init(w), w)
    bad = (0.01 * w).at[1, 300].set(jnp.nan)
    _, after = optimizer.update(bad, state, w)
    nu = np.asarray(load(optax.tree_utils.tree_get(after, "nu")))
    assert np.all(np.isnan(nu[1, 256:])) and np.all(np.isfinite(nu[0])) and np.all(np.isfinite(nu[1, :256]))
    careful = optax.apply_if_finite(optimizer, 3)
    begun = careful.init(w)._replace(inner_state=state)
    updates, kept = careful.update(bad, begun, w)
    np.testing.assert_array_equal(updates, 0)
    jax.tree.map(np.testing.assert_array_equal, kept.inner_state, state)


def run(optimizer, params, grads, state=None):
    state = optimizer.init(params) if state is None else state
    update = jax.jit(optimizer.update, compiler_options=QUICKLY)
    for g in grads:
        _, state = update(g, state, params)
    return state


def test_noise_depends_on_seed_step_and_path_alone():
    params = {"a": jnp.ones((2, 128)), "b": jnp.ones((2, 128))}
    grads = [jax.tree.map(lambda w, s=s: w * jax.random.normal(jax.random.key(s), w.shape), params) for s in range(4)]
    optimizer = adam4(1e-3, min_size=0)
    whole = run(optimizer, params, grads)
    resumed = run(optimizer, params, grads[2:], jax.tree.map(jnp.asarray, run(optimizer, params, grads[:2])))
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    nu = optax.tree_utils.tree_get(whole, "nu")
    assert np.any(np.asarray(nu["a"].codes) != np.asarray(nu["b"].codes))  # the gradients are the same
    alone = run(optimizer, {"b": params["b"]}, [{"b": g["b"]} for g in grads])
    np.testing.assert_array_equal(optax.tree_utils.tree_get(alone, "nu")["b"].codes, nu["b"].codes)
    other = optax.tree_utils.tree_get(run(adam4(1e-3, min_size=0, seed=1), params, grads), "nu")
    assert np.any(np.asarray(nu["a"].codes) != np.asarray(other["a"].codes))


def test_resets_clear_moments_in_few_bits():
    formats = {"mu_format": "de4", "nu_format": "log4(stochastic)", "min_size": 0}
    w = jnp.ones((8, 128))
    grads = list(jax.random.normal(jax.random.key(0), (3, *w.shape)))
    after = run(scale_by_adam(reset_every=3, **formats), w, grads)
    fresh = run(scale_by_adam(**formats), w, grads[2:])
    np.testing.assert_array_equal(after.mu.codes, fresh.mu.codes)
    # Other noise, the same mean: the standard deviation of a value is at most 0.35 of it.
    assert float(jnp.sum(load(after.nu)) / jnp.sum(load(fresh.nu))) == pytest.approx(1, abs=0.1)
    assert float(optimizer_diagnostics(after)["resets"]) == 1 and int(after.count) == 3


def test_decay_is_masked_scheduled_and_exact_for_bfloat16():
    """1.0078125 is a bfloat16 whose product with 0.1 is not."""
    params = {"kernel": jnp.full((4,), 1.0078125, jnp.bfloat16), "bias": jnp.ones(4, jnp.bfloat16)}
    mask = lambda tree: {name: name == "kernel" for name in tree}
    optimizer = adamw(lambda count: 1.0, weight_decay=lambda count: 0.1 / (count + 1), mask=mask)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, state = optimizer.update(zero, optimizer.init(params), params)
    np.testing.assert_array_equal(updates["kernel"], jnp.full(4, -0.1 * 1.0078125, jnp.bfloat16))
    np.testing.assert_array_equal(updates["bias"], 0)
    updates, _ = optimizer.update(zero, state, params)
    np.testing.assert_array_equal(updates["kernel"], jnp.full(4, -0.05 * 1.0078125, jnp.bfloat16))


def test_what_cannot_be_is_refused():
    with pytest.raises(UsageError, match="log4"):
        adam(1e-3, mu_format="log4")
    with pytest.raises(UsageError, match="did you mean de8"):
        adam(1e-3, nu_format="de88")
    with pytest.raises(UsageError, match="unknown reset"):
        stable_spam(1e-3, reset="papers")
