"""Norms, gates and attention whose inputs are saved as a recipe says (`ops.saved`), by their paths in a model."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import flax.linen as nn

from lowprec.errors import UsageError
from lowprec.nn.attention import CausalSelfAttention
from lowprec.nn.gates import SiluGate
from lowprec.nn.places import STATE, Place
from lowprec.ops.saved import Exact, Policy, RunningUint8, saved, slot_name

CORE = "core"  # of attention: from queries, keys and values to the context, as recipes name it
NORMS = (nn.RMSNorm, nn.LayerNorm, nn.GroupNorm)
_ARRAYS_OF_ATTENTION = ("bias", "mask", "dropout_rng")


def saved_name(module: nn.Module, method: str) -> str | None:
    """The part of a module whose inputs can be saved: "" the whole of it, None: there is none."""
    if method != "__call__":
        return None
    if isinstance(module, (*NORMS, SiluGate)):
        return ""
    return CORE if isinstance(module, (nn.MultiHeadDotProductAttention, CausalSelfAttention)) else None


@dataclass
class SavedPlace(Place):
    """A function in a model whose inputs are kept by a policy."""

    policy: Policy

    def call(self, function: Callable, inputs: tuple, others: tuple = ()):
        """function(*inputs, *others), of which the inputs are kept by the policy and the others exactly."""
        state, slots = self._memory(inputs)
        policies = [self.policy] * len(inputs) + [Exact()] * len(others)
        key = self.key(self.policy.stochastic)
        return saved(function, *policies)(*inputs, *others, key=key, state=state, slots=slots)

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

    def core(self, plain: Callable) -> Callable:
        """The core of `CausalSelfAttention`, or the `attention_fn` of nn.MultiHeadDotProductAttention."""

        @functools.wraps(plain)  # Flax reads the signature to see which options it takes
        def attention(query, key, value, *products, **options):
            if options.get("module") is not None:
                raise UsageError("attention weights cannot be sown where the inputs of attention are saved")
            arrays = {name: options.pop(name, None) for name in _ARRAYS_OF_ATTENTION if name in options}

            def function(query, key, value, arrays):
                return plain(query, key, value, *products, **arrays, **options)

            return self.call(function, (query, key, value), (arrays,))

        return attention

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
