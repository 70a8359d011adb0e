"""What the places of an NNX model have in common that a recipe serves: variables, stacked as their layer, and noise."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lowprec.errors import UsageError
from lowprec.nn.products import STREAM
from lowprec.quantizers.variables import Arrays
from lowprec.typing import Array


class QuantParam(nnx.Variable):
    """A learned parameter of a quantizer: a step size, a clip, an offset."""


class QuantState(nnx.Variable):
    """What a quantizer remembers from step to step."""


class QuantTap(nnx.Variable):
    """Zeros, whose gradient carries statistics and observations of a step."""


class Node(nnx.Module):
    """A place under a recipe, a node of the model.

    Args:
      path: of the place in the model.
      backward_only: whether a forward pass alone draws nothing from the random stream.
      lead: the axes of stacked layers, before all others of every variable.
      key: of the random stream; None where there is none.
      state, slots: of one layer, see `ops.initial_memory`.
    """

    def __init__(
        self,
        path: str,
        backward_only: bool,
        lead: tuple[int, ...],
        key: jax.Array | None,
        state: dict[str, Any],
        slots: dict[str, Array],
    ):
        self.path, self.backward_only, self.lead = path, backward_only, lead
        self.deterministic = False  # set by model.eval()
        if key is not None and lead:
            key = jax.random.split(key, lead)
        self.stream = nnx.data(None if key is None else nnx.RngStream(key, tag=STREAM))
        self.state = nnx.data(jax.tree.map(lambda leaf: self.stacked(QuantState, leaf), state))
        self.slots = nnx.data({name: self.stacked(QuantTap, slot) for name, slot in slots.items()})

    @abstractmethod
    def after(self, state: Mapping[str, Arrays], observed: Mapping[str, Array]) -> Mapping[str, Arrays]:
        """The state after a step, from what its slots saw."""

    def set_view(self, deterministic: bool | None = None) -> None:
        """Called by `nnx.view`.

        Args:
          deterministic: whether what the backward pass alone draws is left out.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    def key(self) -> jax.Array | None:
        """Of this call's noise."""
        if self.stream is None or (self.deterministic and self.backward_only):
            return None
        if self.stream.key.ndim:
            raise self._not_sliced(self.stream.key)
        return self.stream()

    def stacked(self, kind, value):
        """A variable of every layer."""
        return kind(jnp.broadcast_to(value, (*self.lead, *value.shape)), own_axes=value.ndim)

    def one_layer(self, variables):
        """The values of the layer that is called."""
        return jax.tree.map(self._sliced, variables, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))

    def _sliced(self, variable):
        if variable.ndim != variable.get_metadata("own_axes"):
            raise self._not_sliced(variable)
        return variable[...]

    def _not_sliced(self, variable):
        return UsageError(
            f"layer {self.path!r} is one of a stack of {self.lead} and was called with all of their variables: give "
            f"axis 0 to {type(variable).__name__} too where the stack is scanned, e.g. nnx.scan(in_axes=(0, nnx.Carry))"
        )
