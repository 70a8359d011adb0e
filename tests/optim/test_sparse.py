"""2:4 sparsity with masked decay: against the vector of the paper's repository, brute force and its update in numpy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowprec import recipes
from lowprec.errors import UsageError
from lowprec.ops import initial_variables, qdot
from lowprec.optim.sparse import magnitude_masks, masked_decay, scale_by_sparse_adam, sparse_adamw
from lowprec.quantizers.blend import Blend
from lowprec.quantizers.sparsity import Sparse, block_means, nm_mask

W = jax.random.normal(jax.random.key(0), (24, 16))
X = jax.random.normal(jax.random.key(1), (8, 24))


def test_the_vector_of_the_paper():
    w = jnp.array([0.1, -0.5, 0.3, 0.2, 1.0, -0.9, 0.8, 0.05])
    np.testing.assert_array_equal(nm_mask(w, axis=0), [0, 1, 1, 0, 1, 1, 0, 0])


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (4, 8), (4, 4)])
def test_exactly_n_of_m_are_kept_and_no_other_choice_is_larger(n, m):
    w = jnp.round(4 * jax.random.normal(jax.random.key(2), (3, 16, 5))) / 4  # many ties, many zeros
    mask = nm_mask(w, n, m, axis=1)
    groups, kept = (np.moveaxis(np.asarray(a), 1, -1).reshape(-1, m) for a in (jnp.abs(w), mask))
    np.testing.assert_array_equal(kept.sum(-1), n)
    every = np.stack([groups[:, list(choice)].sum(-1) for choice in itertools.combinations(range(m), n)])
    np.testing.assert_array_equal((groups * kept).sum(-1), every.max(0))


def test_of_equal_values_the_first_stay_and_a_short_last_group_keeps_at_most_two():
    np.testing.assert_array_equal(nm_mask(jnp.ones(9), axis=0), [1, 1, 0, 0, 1, 1, 0, 0, 1])
    np.testing.assert_array_equal(nm_mask(jnp.zeros(7), axis=0), [1, 1, 0, 0, 1, 1, 0])
    with pytest.raises(UsageError, match="keeps n of m values, 0 < n <= m, not 5:4"):
        nm_mask(jnp.ones(8), 5, 4)


def product(name, w):
    rule = recipes.get(name).rule_for("layers/0/mlp/up")
    return qdot(X, w, rule, variables=initial_variables(X, w, rule))


def test_the_exact_recipe_multiplies_by_masked_weights_and_gives_all_of_them_a_gradient():
    kept = np.asarray(W) * np.asarray(nm_mask(W))
    y, gradient = jax.value_and_grad(lambda w: jnp.sum(jnp.sin(product("ast_2_4", w))))(W)
    expected = np.asarray(X, np.float64) @ kept
    np.testing.assert_allclose(y, np.sum(np.sin(expected)), rtol=1e-5)
    # dense: the gradient with respect to the masked weights, not masked itself
    np.testing.assert_allclose(gradient, np.asarray(X, np.float64).T @ np.cos(expected), atol=1e-5)
    assert np.all(np.asarray(gradient)[kept == 0] != 0)


def test_wanda_keeps_the_weights_with_the_largest_norms_of_products():
    """By brute force over the six pairs of a group: |w| times the norm of its input, measured on the first batch."""
    inputs = np.asarray(X, np.float64) * np.exp(np.random.default_rng(0).normal(size=24))
    scores = np.abs(np.asarray(W, np.float64)) * np.linalg.norm(inputs, axis=0)[:, None]
    mask = np.zeros(W.shape, bool)
    for column in range(16):
        for start in range(0, 24, 4):
            pairs = itertools.combinations(range(start, start + 4), 2)
            mask[list(max(pairs, key=lambda pair: scores[list(pair), column].sum())), column] = True
    assert 0.05 < np.mean(mask != np.asarray(nm_mask(W))) < 0.5
    rule = recipes.get("ast_2_4_wanda").rule_for("layers/0/mlp/up")
    given = jnp.asarray(inputs, jnp.float32)
    variables = initial_variables(given, W, rule)
    run = lambda w, params: jnp.sum(qdot(X, w, rule, variables=variables._replace(params=params)))
    read = qdot(jnp.eye(24), W, rule, variables=variables)
    np.testing.assert_array_equal(np.asarray(read) != 0, mask)
    to_w, to_params = jax.grad(run, argnums=(0, 1))(W, variables.params)
    # Masked or not, weights have a gradient; the norms have none.
    np.testing.assert_allclose(to_w, np.tile(np.asarray(X, np.float64).sum(0)[:, None], (1, 16)), atol=1e-5)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(to_params))


@pytest.mark.parametrize(("size", "inner"), [(8, None), (16, None), (64, None), (8, "int4@row")])
def test_a_block_branch_adds_a_weight_for_the_sum_of_every_block_of_inputs(size, inner):
    """24 inputs: blocks of 16 leave a short one, one of 64 is all of them. Against the two products of SLoRB."""
    rule = recipes.get("ast_2_4_slorb").rule_for("layers/0/mlp/up")
    x_rule, w_rule = rule.fwd
    fmt = inner or "float32"
    w_rule = type(w_rule)(fmt, scale=Sparse(blocks=size))
    rule = type(rule)(fwd=(x_rule, w_rule), dgrad=rule.dgrad)
    variables = initial_variables(X, W, rule)
    branch = variables.params["fwd.w"]["block_weights"]
    mask, starts = np.asarray(nm_mask(W)), range(0, 24, size)
    pruned = np.where(mask, 0, np.asarray(W, np.float64))
    expected = np.stack([pruned[start : start + size].mean(0) for start in starts])
    np.testing.assert_allclose(branch, expected, atol=1e-6)
    # The first values are the best of least squares.
    member = np.stack([(np.arange(24) // size == index).astype(float) for index in range(len(starts))], axis=1)
    np.testing.assert_allclose(branch, np.linalg.lstsq(member, pruned, rcond=None)[0], atol=1e-6)

    plain = recipes.parse(f"fwd=exact,{inner}").rule_for("x") if inner else recipes.get("f32").rule_for("x")
    sparse = np.asarray(qdot(X, jnp.where(mask, W, 0), plain), np.float64)
    sums = np.asarray(X, np.float64) @ member
    run = lambda x, params: qdot(x, W, rule, variables=variables._replace(params=params))
    y, vjp = jax.vjp(run, X, variables.params)
    np.testing.assert_allclose(y, sparse + sums @ np.asarray(branch, np.float64), atol=2e-5)
    dy = jnp.cos(y)
    to_x, to_params = vjp(dy)
    np.testing.assert_allclose(to_params["fwd.w"]["block_weights"], sums.T @ np.asarray(dy, np.float64), atol=1e-4)
    kept = np.asarray(qdot(jnp.eye(24), jnp.where(mask, W, 0), plain), np.float64) + member @ np.asarray(branch)
    np.testing.assert_allclose(to_x, np.asarray(dy, np.float64) @ kept.T, atol=1e-4)


def test_on_a_ramp_inputs_are_measured_too():
    (x_rule, after), fmt = recipes.get("ast_2_4_wanda").rule_for("layers/0/mlp/up").fwd, None
    blend = Blend(x_rule, after, steps=10)
    found = blend.calibrated_params(W, X, fmt, -2)
    np.testing.assert_allclose(found["input_squares"], np.mean(np.asarray(X, np.float64) ** 2, axis=0), rtol=1e-5)


def test_means_of_blocks_along_any_axis():
    w = np.random.default_rng(1).normal(size=(2, 7, 3))
    for axis, length in ((0, 2), (1, 7), (2, 3), (-2, 7)):
        found = block_means(jnp.asarray(w, jnp.float32), 3, axis)
        parts = [np.take(w, range(s, min(s + 3, length)), axis).mean(axis, keepdims=True) for s in range(0, length, 3)]
        np.testing.assert_allclose(found, np.concatenate(parts, axis), atol=1e-6)


def test_what_a_sparse_rule_is_not():
    with pytest.raises(UsageError, match="unknown importance of a weight 'wnda'; did you mean wanda"):
        Sparse(importance="wnda")
    with pytest.raises(UsageError, match="sums 1 input or more"):
        Sparse(blocks=-1)
    with pytest.raises(UsageError, match="2:4 sparse by wanda are measured with their inputs"):
        Sparse(importance="wanda").initial_params(W, recipes.parse("fwd=int8@row").rule_for("x").fwd[1].format, -2)


@pytest.mark.parametrize("name", ["ast_2_4", "ast_2_4_wanda", "ast_2_4_int8", "ast_2_4_int4"])
def test_two_of_four_weights_of_every_recipe_take_part(name):
    """A unit vector on the left reads the weights that are multiplied."""
    rule = recipes.get(name).rule_for("layers/0/mlp/up")
    read = qdot(jnp.eye(24), W, rule, variables=initial_variables(jnp.eye(24), W, rule))
    assert np.all(np.sum((np.asarray(read) != 0).reshape(6, 4, 16), axis=1) <= 2)
    error = {"ast_2_4": 1e-12, "ast_2_4_wanda": 1e-12, "ast_2_4_int8": 1e-4, "ast_2_4_int4": 2e-2}[name]
    kept = np.asarray(W * nm_mask(W))
    assert np.sum((np.asarray(read) - kept) ** 2) <= error * np.sum(kept**2)


def test_a_masked_outlier_does_not_exist_and_small_weights_set_the_scale():
    """Scales are those of what is left: a channel of which the largest stays is quantized as that channel alone."""
    rule = recipes.get("ast_2_4_int8").rule_for("layers/0/mlp/up")
    w = jnp.where(nm_mask(W), W, 0.9 * W)
    a, b = (qdot(X, v, rule, variables=initial_variables(X, v, rule)) for v in (w * nm_mask(w), w))
    np.testing.assert_array_equal(a, b)


def reference(w, gradients, *, lr, b1=0.9, b2=0.999, eps=1e-8, decay):
    """The update of the authors' repository in float64, its mask a boolean."""
    w = np.asarray(w, np.float64)
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(np.asarray(gradients, np.float64), start=1):
        mask = np.asarray(nm_mask(jnp.asarray(w, jnp.float32)), np.float64)
        m = b1 * m + (1 - b1) * g
        u = m + decay(t - 1) * (1 - mask) * w
        v = b2 * v + (1 - b2) * u * u
        w = w - lr * (u / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    return w


def test_the_update_is_that_of_the_paper_and_dense_parameters_see_adam():
    params = {"layer": {"kernel": W}, "head": {"kernel": W}, "norm": {"scale": jnp.ones(16)}}
    ramp = masked_decay(4, 0.3)
    optimizer = sparse_adamw(0.01, weight_decay=0.0, decay=ramp)
    adam = optax.adam(0.01)
    state, adam_state, adam_params = optimizer.init(params), adam.init(params), params
    gradients = jax.random.normal(jax.random.key(3), (6, *W.shape))
    for g in gradients:
        full = {"layer": {"kernel": g}, "head": {"kernel": g}, "norm": {"scale": jnp.mean(g, 0)}}
        updates, state = optimizer.update(full, state, params)
        params = optax.apply_updates(params, updates)
        updates, adam_state = adam.update(full, adam_state, adam_params)
        adam_params = optax.apply_updates(adam_params, updates)
    expected = reference(W, gradients, lr=0.01, decay=lambda t: 0.3 * min(t / 4, 1))
    np.testing.assert_allclose(params["layer"]["kernel"], expected, atol=2e-6)
    assert float(jnp.max(jnp.abs(params["layer"]["kernel"] - adam_params["layer"]["kernel"]))) > 1e-3
    for layer in ("head", "norm"):
        # Optax forms 1 - b2^t in float32, 6e-5 off of 0.001: half of it in each of six updates of 0.01.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), params[layer], adam_params[layer])


def test_masked_weights_decay_and_the_masks_settle():
    """Regression by a 2:4 sparse matrix that exists: masked weights fall to zero and the flip rate falls."""
    truth = jnp.where(nm_mask(W), W, 0)
    inputs = jax.random.normal(jax.random.key(4), (256, 24))
    rule = recipes.get("ast_2_4").rule_for("layers/0/mlp/up")
    loss = lambda p: jnp.mean((qdot(inputs, p["kernel"], rule) - inputs @ truth) ** 2)

    def train(peak):
        params = {"kernel": 0.3 * jax.random.normal(jax.random.key(5), W.shape)}
        schedule = optax.linear_schedule(0.02, 1e-4, 300)
        optimizer = optax.chain(
            scale_by_sparse_adam(decay=masked_decay(50, peak), masks=magnitude_masks()),
            optax.scale_by_learning_rate(schedule),
        )

        def step(carry, _):
            params, state = carry
            value, gradient = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), (value, state[0].flip_rate)

        (params, _), (losses, flips) = jax.lax.scan(step, (params, optimizer.init(params)), None, 300)
        return params["kernel"], losses, flips

    pulled, losses, flips = jax.jit(train)(0.1)
    free, free_losses, _ = jax.jit(train)(0.0)
    masked = lambda w: float(jnp.sqrt(jnp.sum(jnp.where(nm_mask(w), 0, w) ** 2) / jnp.sum(w**2)))
    assert masked(pulled) < 0.5 * masked(free)
    assert float(jnp.mean(flips[-50:])) < 0.2 * float(jnp.mean(flips[:50]))
    assert float(losses[-1]) < 0.3 * float(losses[0])
    assert bool(jnp.all(jnp.isfinite(free_losses)))


def test_a_pattern_without_a_parameter_says_what_there_is():
    with pytest.raises(UsageError, match="no parameter matches 'kernels'; there are a/kernel"):
        magnitude_masks(pattern="kernels")({"a": {"kernel": W}})
