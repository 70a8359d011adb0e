"""Sharpness-aware minimisation, and quantizer scales held where it pulls them two ways (GAQAT)."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowprec.errors import UsageError
from lowprec.training.objectives import TASK_LOSS, Gradient, Objective


class Disorder(NamedTuple):
    """How often the two gradients of each quantizer parameter disagree.

    Attributes:
      steps: of the window so far.
      disagreements: in it, float32, like the quantizers' parameters.
      frozen: whether each is held now.
      inner: the memory of the inner objective.
    """

    steps: jax.Array
    disagreements: Any
    frozen: Any
    inner: Any


@dataclass(frozen=True)
class SharpnessAware(Objective):
    """The gradient at w + ρ g / ‖g‖ (SAM, Foret et al., arXiv 2010.01412), g = ∇L(w) over all microbatches.

    Weights are moved, quantizer parameters are not. Theirs are two gradients: g_task at w, g_smooth at the moved
    weights, by which all are trained. GAQAT (arXiv 2412.05551): the disorder of a scale is the fraction of a window in
    which the two point opposite ways; above a threshold the scale is held for the next window, in which it is measured
    again. With threshold 1 nothing is ever held: SAM-QAT.

    Args:
      inner: the loss.
      radius: ρ.
      threshold: of the disorder, 0 to 1.
      window: steps.
    """

    inner: Objective = TASK_LOSS
    radius: float = 0.05
    threshold: float = 1.0
    window: int = 350

    def __post_init__(self):
        if not 0 <= self.threshold <= 1 or self.window < 1:
            raise UsageError(f"a scale is held above a disorder of 0 to 1 in a window of at least one step, not {self}")

    @property
    def parts(self):
        return self.inner.parts

    @property
    def measures(self):
        return (*self.inner.measures, "sharpness", "frozen_scales")

    def init(self, quant_params):
        start = lambda value, dtype: jax.tree.map(lambda leaf: jnp.full(leaf.shape, value, dtype), quant_params)
        return Disorder(jnp.int32(0), start(0.0, jnp.float32), start(False, jnp.bool_), self.inner.init(quant_params))

    def loss(self, model, variables, examples, key, memory, constants):
        return self.inner.loss(model, variables, examples, key, memory.inner, constants)

    def gradient(self, gradient_of, trained, memory):
        here = self.inner.gradient(gradient_of, trained, memory.inner)
        norm = optax.global_norm(here.gradients.params)
        # At a minimum there is no way up: w stays.
        step = np.float32(self.radius) / jnp.where(norm > 0, norm, 1)
        moved = jax.tree.map(lambda w, g: w + step * g.astype(w.dtype), trained.params, here.gradients.params)
        there = self.inner.gradient(gradient_of, trained._replace(params=moved), memory.inner)
        task, smooth = here.gradients.quant_params, there.gradients.quant_params
        after = self._measured(memory, task, smooth)._replace(inner=here.memory)
        held = jnp.concatenate([jnp.zeros(1, bool), *(leaf.ravel() for leaf in jax.tree.leaves(after.frozen))])
        metrics = here.metrics | {
            "sharpness": there.loss - here.loss,
            "frozen_scales": jnp.sum(held, dtype=jnp.float32) / np.float32(max(held.size - 1, 1)),
        }
        # What quantizers observe, they observe at w.
        gradients = here.gradients._replace(params=there.gradients.params, quant_params=smooth)
        return Gradient(here.loss, here.observed, gradients, after, metrics)

    def _measured(self, memory: Disorder, task, smooth) -> Disorder:
        opposite = lambda count, a, b: count + (jnp.sign(a) * jnp.sign(b) < 0)
        steps, counts = memory.steps + 1, jax.tree.map(opposite, memory.disagreements, task, smooth)
        over = steps >= self.window
        judge = lambda count, frozen: jnp.where(over, count > np.float32(self.threshold * self.window), frozen)
        return memory._replace(
            steps=jnp.where(over, 0, steps),
            disagreements=jax.tree.map(lambda count: jnp.where(over, 0, count), counts),
            frozen=jax.tree.map(judge, counts, memory.frozen),
        )

    def hold(self, updates, memory):
        held = jax.tree.map(lambda frozen, update: jnp.where(frozen, 0, update), memory.frozen, updates)
        return self.inner.hold(held, memory.inner)
