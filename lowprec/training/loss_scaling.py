"""Dynamic loss scaling: gradients too small for the format of the backward pass are lifted into its range."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lowprec.recipes.hooks import LossScaling
from lowprec.typing import Array, Bool, Float, Int


class LossScale(NamedTuple):
    """The state of `recipes.LossScaling`: part of the training state."""

    scale: Float[Array, ""]
    finite_steps: Int[Array, ""]

    @classmethod
    def start(cls, rule: LossScaling) -> "LossScale":
        return cls(jnp.float32(rule.initial), jnp.int32(0))

    def after(self, rule: LossScaling, finite: Bool[Array, ""]) -> "LossScale":
        """After a step whose gradients were finite, or not."""
        steps = jnp.where(finite, self.finite_steps + 1, 0)
        grow = steps >= rule.period
        scale = jnp.where(grow, self.scale * rule.factor, self.scale)
        scale = jnp.where(finite, scale, jnp.maximum(self.scale / rule.factor, rule.smallest))
        # A scale that is not finite would never come back.
        return LossScale(jnp.where(jnp.isfinite(scale), scale, self.scale), jnp.where(grow, 0, steps))


def all_finite(tree) -> Bool[Array, ""]:
    """Whether no leaf holds an infinity or NaN."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))
