"""Norms, gates and attention of Linen models whose inputs are saved by a recipe's policies, by their paths."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import flax.linen as nn

from lowprec.errors import UsageError
from lowprec.nn.attention import CausalSelfAttention
from lowprec.nn.gates import SiluGate
from lowprec.nn.places import STATE, Place
from lowprec.nn.saved_forms import CORE, SavedForms
from lowprec.ops.saved import Policy, RunningUint8, slot_name

NORMS = (nn.RMSNorm, nn.LayerNorm, nn.GroupNorm)


def saved_name(module: nn.Module, method: str) -> str | None:
    """The part of a module whose inputs can be saved: "" the whole of it, None: there is none."""
    if method != "__call__":
        return None
    if isinstance(module, (*NORMS, SiluGate)):
        return ""
    return CORE if isinstance(module, (nn.MultiHeadDotProductAttention, CausalSelfAttention)) else None


@dataclass
class SavedPlace(Place, SavedForms):
    """A function of a bound module whose inputs are kept by a policy."""

    policy: Policy

    def options(self, inputs):
        state, slots = self._memory(inputs)
        return {"key": self.key(self.policy.stochastic), "state": state, "slots": slots}

    def norm(self, call: Callable, aside: Callable[[], AbstractContextManager], x, **others):
        """A norm as a pure function of its parameters and its input.

        Args:
          call: the norm's own, which makes its parameters.
          aside: within it, the norm is applied as it is.
        """
        if self.module.is_initializing():
            self._memory((x,))
            return call()
        unbound = self.module.clone(parent=None)

        def function(x, params, others):
            with aside():
                return unbound.apply({"params": params}, x, **others)

        return self.call(function, (x,), (self.module.variables.get("params", {}), others))

    def _memory(self, inputs):
        state: dict[str, Any] = {}
        slots: dict[str, Any] = {}
        if not isinstance(self.policy, RunningUint8):
            return state, slots
        for index, x in enumerate(inputs):
            name = slot_name(index)
            start, zeros = self.policy.initial_memory(x.shape)
            if self.get(STATE, name) is None and self.module.is_mutable_collection(STATE):
                self.put(STATE, name, start)
            state[name] = self.get(STATE, name)
            if state[name] is None:
                raise UsageError(
                    f"saved inputs ({self.policy}) have state, which is missing: pass the collection {STATE!r} that "
                    "init returns, and list it in variable_axes of a model's own nn.scan"
                )
            slot = self.slot(name, lambda zeros=zeros: zeros, "observations")
            slots |= {} if slot is None else {name: slot}
        return state, slots
