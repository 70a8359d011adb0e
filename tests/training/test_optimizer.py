"""The learning rate and the update, against formulas and Optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowprec import models
from lowprec.errors import UsageError
from lowprec.training import schedules
from lowprec.training.config import OptimizerConfig
from lowprec.training.optimizer import build_optimizer, decay_mask, reset_moments
from lowprec.training.schedules import learning_rate
from lowprec.training.update_rules import names


def rates(steps, **changes):
    schedule = learning_rate(OptimizerConfig(lr=1.0, **changes), steps)
    return np.asarray(jax.vmap(schedule)(jnp.arange(steps)))


def test_the_learning_rate_rises_from_a_hundredth_and_falls_to_a_tenth():
    rate = rates(1000)
    assert rate[0] == pytest.approx(0.01)
    assert rate[100] == pytest.approx(1.0)
    assert rate[50] == pytest.approx((0.01 + 1) / 2)
    assert rate[-1] == pytest.approx(0.1)
    assert np.all(np.diff(rate[:101]) > 0) and np.all(np.diff(rate[100:]) < 0)


def test_the_learning_rate_is_one_cycle_of_torch():
    """torch.optim.lr_scheduler.OneCycleLR(1.0, 41, pct_start=11/41, div_factor=100, final_div_factor=0.1) anneals by
    cosine, with the peak at pct_start · total_steps - 1; here it is at warmup_fraction · steps."""
    rate = rates(41, warmup_fraction=10 / 41)
    up = 0.01 + (1 - 0.01) * (1 - np.cos(np.pi * np.arange(11) / 10)) / 2
    down = 0.1 + (1 - 0.1) * (1 + np.cos(np.pi * np.arange(31) / 30)) / 2
    np.testing.assert_allclose(rate, [*up[:-1], *down], rtol=1e-5)


@pytest.mark.parametrize(("steps", "warmup", "final"), [(1, 0.1, 0.1), (2, 0.5, 0.0), (10, 0.0, 1.0), (10, 1.0, 0.1)])
def test_the_learning_rate_of_short_runs_is_finite_and_at_most_the_peak(steps, warmup, final):
    rate = rates(steps, warmup_fraction=warmup, final_fraction=final)
    assert np.all(np.isfinite(rate)) and np.all(rate >= 0) and np.all(rate <= 1)


def two_stage(steps, warmup, final, count):
    """The closed form, of a peak of 1."""
    rise = warmup * steps
    if count < rise:
        rate = 0.01 + 0.99 * count / rise
    else:
        rate = 1 - (1 - final) * (count - rise) / (steps - 1 - rise)
    return rate if count < steps / 2 else rate * 2 / 3


@pytest.mark.parametrize("name", ["bitnet", "trilm"])
def test_the_second_stage_of_ternary_training_has_two_thirds_of_the_peak(name):
    found = rates(100, schedule=name, warmup_fraction=0.1, final_fraction=0.0)
    np.testing.assert_allclose(found, [two_stage(100, 0.1, 0.0, count) for count in range(100)], rtol=1e-5, atol=1e-7)
    drops = -np.diff(found[10:])
    assert np.argmax(drops) == 39 and np.sum(drops > 0.1) == 1  # from the 50th update to the 51st, and nowhere else


@pytest.mark.parametrize(("name", "last"), [("one_cycle", 12), ("bitnet", 6), ("trilm", 8)])
def test_weight_decay_ends_when_the_schedule_says(name, last):
    """12 steps: until a half, until two thirds. Without gradients the weights move by lr · decay · w alone."""
    config = OptimizerConfig(lr=0.5, weight_decay=0.1, schedule=name, warmup_fraction=0.0, final_fraction=1.0)
    optimizer, weight = build_optimizer(config, 12), {"kernel": jnp.ones((2, 2))}
    state = optimizer.init(weight)
    for count in range(12):
        updates, state = optimizer.update(jax.tree.map(jnp.zeros_like, weight), state, weight)
        rate = 0.5 if name == "one_cycle" or count < 6 else 0.5 * 2 / 3
        np.testing.assert_allclose(updates["kernel"], -rate * 0.1 if count < last else 0, rtol=1e-6)


def test_an_unknown_schedule_names_the_nearest():
    with pytest.raises(UsageError, match="unknown schedule of the learning rate 'bitnett'; did you mean bitnet"):
        build_optimizer(OptimizerConfig(schedule="bitnett"), 10)


@pytest.mark.parametrize("schedule", schedules.names())
def test_a_reset_forgets_moments_and_keeps_the_place_in_the_schedule(schedule):
    optimizer, weight = build_optimizer(OptimizerConfig(schedule=schedule, clip=0.0), 12), {"kernel": jnp.ones((2, 2))}
    state = optimizer.init(weight)
    for _ in range(7):
        _, state = optimizer.update(weight, state, weight)
    fresh = reset_moments(optimizer, state, weight)
    updates, _ = optimizer.update(weight, fresh, weight)
    config = OptimizerConfig(schedule=schedule)
    decay = schedules.weight_decay(config, 12)
    decay = float(decay(7)) if callable(decay) else decay
    # Adam's first step is a step of the size of the learning rate: that of the eighth update.
    np.testing.assert_allclose(updates["kernel"], -learning_rate(config, 12)(7) * (1 + decay), rtol=1e-5)


def test_norms_alone_do_not_decay():
    model = models.build(models.ModelConfig(layers=2, width=16, heads=2), 32)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    mask = {
        "/".join(entry.key for entry in path): decays
        for path, decays in jax.tree_util.tree_leaves_with_path(decay_mask(params))
    }
    assert sorted(path for path, decays in mask.items() if not decays) == [
        "final_norm/scale", "layers/attention_norm/scale", "layers/mlp_norm/scale",
    ]  # fmt: skip
    assert mask["embed/embedding"] and mask["head/kernel"] and mask["layers/mlp/down/kernel"]
    assert not decay_mask({"dense": {"bias": 0.0}})["dense"]["bias"]


@pytest.mark.parametrize("scale", [1e-4, 1.0], ids=["below_the_clip", "above_the_clip"])
def test_adamw_is_optax_adamw_after_clipping(scale):
    draw = np.random.default_rng(0)
    tree = lambda size: {
        "embed": {"embedding": size * draw.normal(size=(8, 4)).astype(np.float32)},
        "norm": {"scale": size * draw.normal(size=(4,)).astype(np.float32)},
    }
    params = tree(1.0)
    config = OptimizerConfig(lr=0.01, eps=1e-6)
    ours = build_optimizer(config, 10)
    theirs = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(learning_rate(config, 10), 0.9, 0.95, 1e-6, weight_decay=0.1, mask=decay_mask),
    )
    states = [ours.init(params), theirs.init(params)]
    for _ in range(3):
        gradients = tree(scale)
        updates, states[0] = ours.update(gradients, states[0], params)
        expected, states[1] = theirs.update(gradients, states[1], params)
        jax.tree.map(np.testing.assert_array_equal, updates, expected)
    assert optax.global_norm(gradients) > 1 if scale == 1.0 else optax.global_norm(gradients) < 1


def test_sgd_is_momentum_and_decoupled_decay():
    config = OptimizerConfig("sgd", lr=0.5, b1=0.9, weight_decay=0.1, warmup_fraction=0.0, final_fraction=1.0, clip=0.0)
    optimizer = build_optimizer(config, 10)
    weight = {"kernel": jnp.float32(2.0)}
    state = optimizer.init(weight)
    for momentum in (3.0, 0.9 * 3.0 + 3.0):
        update, state = optimizer.update({"kernel": jnp.float32(3.0)}, state, weight)
        assert float(update["kernel"]) == pytest.approx(-0.5 * (momentum + 0.1 * 2.0))


def test_moments_of_bfloat16_gradients_are_float32():
    weight = {"kernel": jnp.ones((4, 4), jnp.float32)}
    for name in names():
        optimizer = build_optimizer(OptimizerConfig(name), 10)
        _, state = optimizer.update({"kernel": jnp.ones((4, 4), jnp.bfloat16)}, optimizer.init(weight), weight)
        # The masks of sparse_adamw are no moments.
        moments = {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim and leaf.dtype != bool}
        assert moments == {jnp.dtype("float32")}


def test_an_unknown_optimizer_names_the_nearest():
    with pytest.raises(UsageError, match="unknown optimizer 'adamv'; did you mean adam, adamw"):
        build_optimizer(OptimizerConfig("adamv"), 10)
