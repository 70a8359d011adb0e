"""QAS: steps on codes are, in the units of the weights, steps on weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowprec.optim import quantization_aware_scaling


def test_a_step_on_codes_is_the_step_on_weights():
    """Without rounding, for weights by output channel and a bias in units of s_w · s_x."""
    key = jax.random.split(jax.random.key(0), 4)
    x, y = jax.random.normal(key[0], (32, 8)), jax.random.normal(key[1], (32, 4))
    weights = {"kernel": jax.random.normal(key[2], (8, 4)), "bias": jnp.arange(4.0)}
    channel = jnp.max(jnp.abs(weights["kernel"]), axis=0) / 127
    scales = {"kernel": channel[None, :], "bias": channel * 0.02}
    loss = lambda w: jnp.mean((x @ w["kernel"] + w["bias"] - y) ** 2)

    def step(params, transformation, loss):
        optimizer = optax.chain(transformation, optax.sgd(0.1))
        updates, _ = optimizer.update(jax.grad(loss)(params), optimizer.init(params))
        return optax.apply_updates(params, updates)

    expected = step(weights, optax.identity(), loss)
    codes = jax.tree.map(jnp.divide, weights, scales)
    back = lambda codes: jax.tree.map(jnp.multiply, codes, scales)
    found = back(step(codes, quantization_aware_scaling(scales), lambda codes: loss(back(codes))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), found, expected)
    unscaled = back(step(codes, optax.identity(), lambda codes: loss(back(codes))))
    assert float(jnp.max(jnp.abs(unscaled["kernel"] - weights["kernel"]))) < 1e-3  # it hardly moves
