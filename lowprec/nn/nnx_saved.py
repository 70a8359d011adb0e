"""Norms, gates and attention of NNX models whose inputs are saved by a recipe's policies."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lowprec.nn.gates import silu_gate
from lowprec.nn.nnx_nodes import Node, QuantState
from lowprec.nn.saved_forms import SavedForms
from lowprec.ops.saved import Policy, RunningUint8, slot_name
from lowprec.typing import Array, Float


class SavedInputs(SavedForms, Node):
    """A function of a layer whose inputs are kept by a policy.

    Args:
      path, lead, key: see `Node`.
      policy: of the inputs.
      shapes: of the inputs of one call; only the heads of attention matter.
    """

    def __init__(
        self,
        path: str,
        policy: Policy,
        shapes: tuple[tuple[int, ...], ...],
        lead: tuple[int, ...],
        key: jax.Array | None,
    ):
        self.policy = policy
        state: dict[str, Any] = {}
        slots: dict[str, Array] = {}
        if isinstance(policy, RunningUint8):
            for index, shape in enumerate(shapes):
                name = slot_name(index)
                state[name], slots[name] = policy.initial_memory(shape)
        super().__init__(path, True, lead, key, state, slots)

    def options(self, inputs):
        return {"key": self.key(), "state": self.one_layer(self.state), "slots": self.one_layer(self.slots)}

    def after(self, state, observed):
        if not isinstance(self.policy, RunningUint8):
            return state
        return {name: self.policy.next_state(state[name], observed[name]) for name in state}


class SavedAttention(SavedInputs):
    """A function of queries, keys and values, e.g. `nnx.dot_product_attention`, whose inputs are kept by a policy.

    Args:
      path, policy, shapes, lead, key: see `SavedInputs`.
      plain: the function.
    """

    def __init__(self, path, policy, shapes, lead, key, plain: Callable):
        self.plain = plain
        super().__init__(path, policy, shapes, lead, key)

    def __call__(self, query, key, value, **options):
        return self.core(self.plain)(query, key, value, **options)


class SiluGate(nnx.Module):
    """`silu_gate` as a module, whose inputs a recipe can save: "gating" in the recipes of the library."""

    def __init__(self):
        self.layers = QuantState(jnp.zeros(()))  # has the axes of stacked layers, which a gate has no other sign of

    def __call__(self, gate: Float[Array, "... F"], up: Float[Array, "... F"]) -> Float[Array, "... F"]:
        return silu_gate(gate, up)


class SavedGate(SiluGate):
    """Its inputs are kept by a policy."""

    saved_inputs: SavedInputs

    def __call__(self, gate, up):
        return self.saved_inputs.call(silu_gate, (gate, up))


PLAIN = "plain"  # of a norm: its graph as it was before


class _SavedNorm(nnx.Module):
    """A norm as a pure function of its parameters and its input.

    Attributes:
      plain: the norm without what it holds.
    """

    saved_inputs: SavedInputs
    plain: nnx.GraphDef

    def __call__(self, x, mask=None):
        def function(x, params, mask):
            return nnx.merge(self.plain, params)(x, mask=mask)

        return self.saved_inputs.call(function, (x,), (nnx.state(self, nnx.Param), mask))


class SavedRMSNorm(_SavedNorm, nnx.RMSNorm):
    pass


class SavedLayerNorm(_SavedNorm, nnx.LayerNorm):
    pass


class SavedGroupNorm(_SavedNorm, nnx.GroupNorm):
    pass


# Who serves which layer. A subclass may do something else, and is left alone.
SAVED_NORMS = {nnx.RMSNorm: SavedRMSNorm, nnx.LayerNorm: SavedLayerNorm, nnx.GroupNorm: SavedGroupNorm}
