"""A gradient a thousand times too large: what Adam does with it, and what Stable-SPAM does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowprec.optim.adam import scale_by_adam
from lowprec.optim.adaptive import adaptive_grad_norm, adaptive_spike_clip
from lowprec.optim.diagnostics import optimizer_diagnostics
from lowprec.optim.labels import chain
from lowprec.optim.spam import scale_by_spam

SIGMA, SPIKE, AFTER = 1e-3, 300, 45
NOISE = SIGMA * jax.random.normal(jax.random.key(0), (SPIKE + AFTER, 4096))
ELEMENT = NOISE.at[SPIKE, 7].set(1000 * SIGMA)
TENSOR = NOISE.at[SPIKE].multiply(1000)


def updates_of(transform, grads):
    def step(state, g):
        u, state = transform.update(g, state)
        return state, (u, optimizer_diagnostics(state))

    return jax.jit(lambda: jax.lax.scan(step, transform.init(grads[0]), grads)[1])()


def rms(u):
    """Of the updates before the spike, at it, and 1, 10 and 40 later."""
    sizes = np.sqrt(np.mean(np.square(u), axis=1))
    return np.array([sizes[SPIKE - 20 : SPIKE].mean(), *sizes[[SPIKE, SPIKE + 1, SPIKE + 10, SPIKE + 40]]])


def stable(**kwargs):
    return chain(adaptive_spike_clip(), adaptive_grad_norm(), scale_by_adam(**kwargs))


def test_one_element_moves_less_than_half_as_far():
    """Eight tensors. What an element does depends on its momentum: of ours the standard deviation is 0.25 in each."""
    keys = jax.random.split(jax.random.key(1), 8)
    grads = [jax.random.normal(key, (SPIKE + 2, 4096)).at[SPIKE, 7].set(1000.0) * SIGMA for key in keys]

    def means(transform):
        step = lambda state, g: transform.update(g, state)[::-1]
        _, u = jax.jit(lambda: jax.lax.scan(step, transform.init([g[0] for g in grads]), grads))()
        return np.mean(np.abs([tensor[SPIKE:, 7] for tensor in u]), axis=0)

    np.testing.assert_allclose(means(scale_by_adam()), [1.61, 1.45], atol=0.02)
    np.testing.assert_allclose(means(stable()), [0.69, 0.51], atol=3 * 0.25 / np.sqrt(8))


def test_a_spike_of_the_whole_tensor_starves_adam_and_not_stable_spam():
    before, at, after, _, later = rms(updates_of(scale_by_adam(), TENSOR)[0])
    np.testing.assert_allclose([before, at, after], [0.23, 1.59, 1.44], rtol=0.02)
    assert later == pytest.approx(0.039, rel=0.1)
    before, at, _, soon, later = rms(updates_of(stable(), TENSOR)[0])
    np.testing.assert_allclose([before, at, soon, later], [0.229, 0.236, 0.187, 0.223], rtol=0.05)
    assert at < 1.1 * before and later > 0.9 * before


def test_neither_front_end_does_it_alone():
    *_, later = rms(updates_of(chain(adaptive_grad_norm(), scale_by_adam()), TENSOR)[0])
    np.testing.assert_allclose(later, 0.0068, rtol=0.15)
    _, at, *_, later = rms(updates_of(chain(adaptive_spike_clip(), scale_by_adam()), TENSOR)[0])
    np.testing.assert_allclose([at, later], [0.48, 0.219], rtol=0.05)


def test_the_log_tells_of_the_spike():
    _, seen = updates_of(stable(), ELEMENT)
    # At the spike nothing but it exceeds the mean of the maxima.
    assert float(seen["clip_rate"][SPIKE]) == pytest.approx(1 / 4096)
    assert float(seen["clipped_tensors"][SPIKE]) == 1
    quiet = np.asarray(seen["norm_factor"][50:SPIKE])
    np.testing.assert_allclose(quiet, 1, atol=0.1)
    assert float(seen["resets"][-1]) == 0
    factory = lambda learning_rate: chain(stable(reset_every=1), optax.scale(learning_rate))
    wrapped = optax.inject_hyperparams(factory)(1.0)
    state = wrapped.init(NOISE[0])
    _, state = wrapped.update(NOISE[0], state)
    assert optimizer_diagnostics(state) == {
        "clip_rate": 0, "clipped_tensors": 0, "norm_factor": pytest.approx(1, abs=1e-5),
        "norm_factor_max": pytest.approx(1, abs=1e-5), "resets": 1,
    }  # fmt: skip


def test_the_clip_brings_the_largest_to_the_threshold_and_scales_others_with_it():
    """A first gradient is its own mean, and nothing is clipped. The second is ten times as large."""
    transform = adaptive_spike_clip(0.9)
    g = jnp.array([-1.0, 0.6, 0.25, 0.0])
    u, state = transform.update(g, transform.init(g))
    np.testing.assert_allclose(u, g, rtol=1e-6)
    u, state = transform.update(10 * g, state)
    threshold = (0.9 * 0.1 * 1 + 0.1 * 10) / (1 - 0.9**2)  # 5.7: two elements exceed it
    np.testing.assert_allclose(u, [-threshold, 0.6 * threshold, 2.5, 0.0], rtol=1e-5)
    assert float(state.clipped) == 0.5


@pytest.mark.parametrize("b1", [0.9, 0.99])
@pytest.mark.parametrize("b2", [0.95, 0.999])
def test_the_first_gradient_after_silence_moves_as_far_as_can_be(b1, b2):
    """Kingma & Ba, §2.1: (1 - b1) / √(1 - b2), and 1 where that is less; with the corrections of step 400."""
    steps = 400
    g = jnp.full((steps, 8), 1e-15).at[-1].set(jnp.logspace(-6, 6, 8))
    u, _ = updates_of(scale_by_adam(b1, b2, eps=0.0), g)
    reached = (1 - b1) / (1 - b1**steps) / np.sqrt((1 - b2) / (1 - b2**steps))
    np.testing.assert_allclose(u[-1], reached, rtol=1e-4)
    assert np.max(np.abs(u)) <= max((1 - b1) / np.sqrt(1 - b2), 1) * 1.0001


def test_zero_gradients_stay_zero_and_empty_tensors_pass():
    transform = stable()
    params = {"zero": jnp.zeros(3), "none": jnp.zeros((0, 4)), "one": jnp.ones(())}
    u, state = transform.update(params, transform.init(params))
    assert jax.tree.map(jnp.shape, u) == jax.tree.map(jnp.shape, params)
    np.testing.assert_array_equal(u["zero"], 0)
    assert float(u["one"]) == pytest.approx(1, abs=1e-5)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(state))


def test_spam_clips_by_the_second_moment():
    """An element 1000 times as large is cut to √5000 times its own root mean square, after the grace steps."""
    u, seen = updates_of(scale_by_spam(reset_every=10_000), ELEMENT)
    assert float(seen["clip_rate"][SPIKE]) == pytest.approx(1 / 4096)
    assert float(seen["clip_rate"][:SPIKE].max()) == 0
    assert abs(float(u[SPIKE, 7])) < abs(float(updates_of(scale_by_spam(threshold=1e9), ELEMENT)[0][SPIKE, 7]))


def test_a_spike_is_left_to_those_who_want_it_by_apply_if_finite():
    """An infinite gradient would stay in the means for ever."""
    transform = optax.apply_if_finite(stable(), max_consecutive_errors=5)
    g = NOISE[0]
    state = transform.init(g)
    _, state = transform.update(g, state)
    u, after = transform.update(g.at[3].set(jnp.inf), state)
    np.testing.assert_array_equal(u, 0)
    same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), after.inner_state, state.inner_state)
    assert all(jax.tree.leaves(same))
