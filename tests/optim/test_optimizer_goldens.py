"""Optimizers against trajectories of their authors' torch code, and against optax."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowprec.optim.adam import adam, scale_by_adam
from lowprec.optim.sgd_sai import sgd_sai
from lowprec.optim.spam import reset_warmup, spam
from lowprec.optim.stable_spam import cosine_decay, stable_spam

PUBLISHED = Path(__file__).parents[3] / "shared/data/optimizer_goldens.json"
START = np.linspace(-1, 1, 6, dtype=np.float32)
TOLERANCE = 2e-6


def golden(name):
    if not PUBLISHED.exists():
        pytest.skip("the trajectories of the authors' code are not on this machine")
    return json.loads(PUBLISHED.read_text())[name]


def gradients(steps, spike_at=None, dtype=jnp.float32):
    """g_t[i] = sin(0.7 (i + 1) + 0.3 t) (1 + 0.1 i), t = 1, 2, …; the third element 1000-fold in one step."""
    i, t = np.arange(6), np.arange(1, steps + 1)[:, None]
    g = np.sin(0.7 * (i + 1) + 0.3 * t) * (1 + 0.1 * i)
    if spike_at is not None:
        g[spike_at - 1, 2] *= 1000
    return jnp.asarray(g, dtype)


def trajectory(optimizer, grads, start=START):
    """The parameters after each update, and the last state."""

    def step(carry, g):
        params, state = carry
        updates, state = optimizer.update(g.reshape(params.shape), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    params = jnp.asarray(start)
    (_, state), found = jax.jit(lambda: jax.lax.scan(step, (params, optimizer.init(params)), grads))()
    return np.asarray(found).reshape(len(grads), -1), state


LR = 1e-2
CASES = {
    "stablespam_noT_noreset": (stable_spam(LR, reset_every=None), gradients(12)),
    "stablespam_noT_noreset_spike_t8_x1000": (stable_spam(LR, reset_every=None), gradients(12, spike_at=8)),
    "stablespam_T20_reset5": (stable_spam(LR, reset_every=5, total_steps=20, reset="repo"), gradients(12)),
    "adam_torch": (adam(LR), gradients(12)),
    "adam_torch_spike_t8_x1000": (adam(LR), gradients(12, spike_at=8)),
    "sgd_sai": (sgd_sai(LR), gradients(12)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_trajectory_of_the_authors_code(name):
    found, state = trajectory(*CASES[name])
    np.testing.assert_allclose(found, golden(name), rtol=0, atol=TOLERANCE)
    expected = golden(f"{name}/state")
    for field, theirs in (("mu", "exp_avg"), ("mu", "momentum_buffer"), ("nu", "exp_avg_sq"), ("factor", "gsnr")):
        if theirs in expected:
            np.testing.assert_allclose(optax.tree_utils.tree_get(state, field), np.squeeze(expected[theirs]), rtol=1e-5)


def test_spam_with_its_resets_warmup_and_clipping():
    optimizer = spam(LR, reset_every=10, warmup_steps=3, grace_steps=2)
    found, _ = trajectory(optimizer, gradients(15), START.reshape(2, 3))
    np.testing.assert_allclose(found, golden("spam_density1_D10_w3"), rtol=0, atol=TOLERANCE)


def test_all_switches_off_is_adam_of_optax():
    plain = stable_spam(LR, gamma1=None, gamma3=None, reset_every=None)
    a, b = (trajectory(optimizer, gradients(12))[0] for optimizer in (plain, optax.adam(LR)))
    np.testing.assert_allclose(a, b, rtol=0, atol=1.5e-7)
    np.testing.assert_array_equal(a, trajectory(adam(LR), gradients(12))[0])


def test_b1_and_gamma1_decay_along_a_cosine_and_stay_at_half():
    found = [float(cosine_decay(1.0, 20)(t - 1)) for t in range(1, 31)]
    np.testing.assert_allclose(found[:21], golden("stablespam_scale_T20")[:21], atol=1e-6)
    np.testing.assert_allclose(found[20:], 0.5)


def test_the_warmup_of_spam_is_that_of_its_authors():
    factors = {since: float(reset_warmup(jnp.int32(500 + since), 500, 150)) for since in (0, 1, 75, 149, 150, 499)}
    expected = {0: 0.01, 1: 0.010107, 75: 0.49985, 149: 0.99957, 150: 1, 499: 1}
    assert factors == pytest.approx(expected, abs=1e-5)
    assert float(reset_warmup(jnp.int32(3), 500, 150)) == 1


def test_after_a_reset_the_paper_starts_anew_and_the_authors_code_does_not():
    """The largest steps of the resets, t = 5 and 10, in learning rates; those of the code as measured in torch."""
    steps = {}
    for reset in ("paper", "repo"):
        found, _ = trajectory(stable_spam(LR, reset_every=5, total_steps=20, reset=reset), gradients(12))
        sizes = np.max(np.abs(np.diff(found, axis=0)), axis=1) / LR
        steps[reset] = sizes[[3, 8]]
    np.testing.assert_allclose(steps["paper"], [1, 1], atol=1e-5)
    np.testing.assert_allclose(steps["repo"], [1.43, 1.25], atol=1e-2)


def test_a_reset_of_the_paper_forgets_all_that_was_before():
    transform = scale_by_adam(reset_every=5)
    found, state = trajectory(transform, gradients(7))
    fresh, _ = trajectory(scale_by_adam(), gradients(7)[4:])
    np.testing.assert_allclose(np.diff(found, axis=0)[3:], np.diff(fresh, axis=0, prepend=START[None]), atol=1e-6)
    assert int(state.resets) == 1 and int(state.count) == 7
