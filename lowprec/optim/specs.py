"""What a labelled transformation computes, said as a value: for who computes the same in another way.

A function says nothing about itself. `fused_step` reads these where one operation can take the place of several parts.
"""

from dataclasses import dataclass
from typing import Any

import jax
import optax

from lowprec.optim.stored_moments import MomentStore
from lowprec.typing import Array


@dataclass(frozen=True, eq=False)
class AdamSpec:
    """`scale_by_adam`: its arguments, and where its moments are stored."""

    b1: optax.ScalarOrSchedule
    b2: float | Array
    eps: float | Array
    first: MomentStore
    second: MomentStore
    reset_every: int | None = None


@dataclass(frozen=True, eq=False)
class DecaySpec:
    """u ← u + weight_decay · w in float32, of the leaves where `mask` is true; None: of all."""

    weight_decay: optax.ScalarOrSchedule
    mask: Any = None

    def leaves(self, params: Any) -> list[bool]:
        """Which decay, in order."""
        if self.mask is None:
            return [True] * len(jax.tree.leaves(params))
        mask = self.mask(params) if callable(self.mask) else self.mask
        return jax.tree.leaves(jax.tree.map(lambda decays, part: jax.tree.map(lambda _: decays, part), mask, params))


@dataclass(frozen=True, eq=False)
class RateSpec:
    """u ← -learning_rate · u."""

    learning_rate: optax.ScalarOrSchedule


@dataclass(frozen=True, eq=False)
class IdentitySpec:
    """u ← u, but that it may be cast to the dtype of the parameters as the optimizer sees them."""


Spec = AdamSpec | DecaySpec | RateSpec | IdentitySpec
