"""Delayed scaling: the scale of a step comes from the largest magnitudes of the steps before it."""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np

from lowprec.errors import UsageError
from lowprec.formats.bits import divide
from lowprec.formats.blocks import block_layout
from lowprec.formats.scaling import Scale, block_amax
from lowprec.formats.types import ScaleSpec
from lowprec.quantizers.variables import RememberedScale


@dataclass(frozen=True)
class Delayed(RememberedScale):
    """A scale a tensor, amax / largest element over a window of earlier steps; 1 before the first one.

    What lies beyond the scaled range saturates. The amax of a step is the mean over its calls and microbatches. A step
    without a finite, nonzero amax in its window keeps the scale; infinities and NaN are not remembered.
    (TransformerEngine's DelayedScaling.)

    Args:
      history: steps in the window.
      algorithm: "max" of the window, or the "most_recent" step alone.
      margin: the largest element is divided by 2^margin.
    """

    history: int = 1024
    algorithm: Literal["max", "most_recent"] = "max"
    margin: int = 0

    def __post_init__(self):
        if self.history < 1 or self.algorithm not in ("max", "most_recent"):
            raise UsageError(f"a history has 1 step or more, its algorithm is max or most_recent; not {self!r}")

    def initial_state(self, fmt):
        if getattr(fmt, "block", None) != "tensor" or fmt.scale.per_tensor or fmt.scale.power_of_two:
            raise UsageError(f"delayed scaling has a float scale a tensor, e.g. e4m3fn@tensor; not {fmt}")
        return {"history": jnp.zeros(self.history), "scale": jnp.ones(())}

    def bind(self, state):
        return lambda blocks, layout, fmt: Scale(state["scale"].reshape((1,) * blocks.ndim))

    def observe(self, x):
        layout = block_layout(x.shape, "tensor", -1)
        return jnp.stack([jnp.float32(1), block_amax(x.astype(jnp.float32), layout, ScaleSpec()).reshape(())])

    def next_state(self, state, observed, fmt):
        calls, total = observed[..., 0], observed[..., 1]
        amax = divide(total, jnp.maximum(calls, 1))
        rolled = jnp.concatenate(
            [jnp.where(jnp.isfinite(amax), amax, 0)[..., None], state["history"][..., :-1]], axis=-1
        )
        top = rolled[..., 0] if self.algorithm == "most_recent" else jnp.max(rolled, axis=-1)
        scale = jnp.where(
            top > 0, divide(top, np.float32(fmt.element.max)) * np.float32(2.0**self.margin), state["scale"]
        )
        scale = jnp.maximum(scale, np.float32(2.0**-126))
        seen = calls > 0
        return {
            "history": jnp.where(seen[..., None], rolled, state["history"]),
            "scale": jnp.where(seen, scale, state["scale"]),
        }

    def __str__(self):
        margin = f", margin {self.margin}" if self.margin else ""
        return f"delayed {self.algorithm} of {self.history}{margin}"
