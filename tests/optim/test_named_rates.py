"""Updates of parameters, scaled by their names."""

import jax.numpy as jnp
import optax

from lowprec.optim.named_rates import scale_by_name
from lowprec.quantizers.nested import rate_factors


def test_after_adam_each_step_moves_by_its_factor_of_the_learning_rate():
    """The first update of Adam is the sign of the gradient, whatever its size."""
    params = {"up": {"fwd.w": {"step_8": jnp.ones(2), "step_4": jnp.ones(2)}}, "clip": jnp.ones(())}
    gradients = {"up": {"fwd.w": {"step_8": jnp.array([3.0, -1.0]), "step_4": jnp.array([1e-3, 5.0])}}, "clip": -2.0}
    optimizer = optax.chain(optax.scale_by_adam(), scale_by_name(rate_factors()), optax.scale_by_learning_rate(0.5))
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    steps = updates["up"]["fwd.w"]
    assert jnp.allclose(steps["step_8"], jnp.array([-0.5, 0.5]), rtol=1e-4)
    assert jnp.allclose(steps["step_4"], jnp.array([-0.005, -0.005]), rtol=1e-4)
    assert jnp.allclose(updates["clip"], 0.5, rtol=1e-4)
