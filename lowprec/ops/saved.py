"""Saved activations: what the backward pass keeps of the inputs of a function, or of a product.

Values of the forward pass stay exact. The backward pass evaluates the function's vjp at inputs restored from what was
kept: narrow floats with scales (COAT, arXiv 2410.19313), or 8-bit integers in running ranges (Mesa, arXiv 2111.11124).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lowprec.errors import UsageError
from lowprec.formats.bits import divide
from lowprec.formats.grammar import parse
from lowprec.formats.random import random_bits
from lowprec.formats.types import Format
from lowprec.quantizers import QTensor, quantize
from lowprec.quantizers.scales import AbsMax
from lowprec.quantizers.variables import Arrays
from lowprec.typing import Array, Float

SAVED_X = "saved.x"  # the state and the slot of the saved input of a product
KEPT = "kept"  # what a block keeps that recomputes all else, as `jax.checkpoint_policies` name it


class Policy(ABC):
    """How an input of a function is kept for the backward pass.

    Attributes:
      stochastic: whether saving needs a key.
      remembers: whether it has state, from one step to the next.
    """

    stochastic = False
    remembers = False

    @abstractmethod
    def save(self, x: Float[Array, "..."], key: jax.Array | None = None, state: Arrays | None = None) -> Any:
        """What is kept: a pytree."""

    @abstractmethod
    def restore(self, kept: Any) -> Float[Array, "..."]:
        """The input, in its shape and dtype, as far as it was kept."""


class _Whole(Policy):
    def save(self, x, key=None, state=None):
        return x

    def restore(self, kept):
        return kept


@dataclass(frozen=True)
class Exact(_Whole):
    """As it is. A function all of whose inputs are kept so is differentiated as if nothing had been said."""

    def __str__(self):
        return "as it is"


@dataclass(frozen=True)
class Recompute(_Whole):
    """Nothing but what has to be kept anyway: the inside of a function is computed again from its inputs.

    Of a product in a `LayerStack`, the input is not kept either: a block with such products keeps what they put out,
    and computes again what lies between them.
    """

    def __str__(self):
        return "computed again"


@dataclass(frozen=True)
class Codes(_Whole):
    """Of a product whose backward pass takes its quantized input: the codes, in the narrowest dtype that holds them."""

    def __str__(self):
        return "the codes of the forward product"


@dataclass(frozen=True)
class Stored(Policy):
    """In a format: real codes and scales.

    Args:
      format: a format or its name, e.g. "e4m3fn@1x16/bf16".
      axis: the blocks run along it.
      scale: of a block; COAT's is `AbsMax(offset=1e-10)`.
      pad: let the last block of the axis be shorter than the others.
    """

    format: Format | str
    axis: int = -1
    scale: AbsMax = AbsMax()
    pad: bool = False

    def __post_init__(self):
        object.__setattr__(self, "format", parse(self.format))

    def save(self, x, key=None, state=None):
        return StoredTensor(quantize(x, self.format, axis=self.axis, scale=self.scale, pad=self.pad), x.dtype)

    def restore(self, kept):
        return kept.tensor.dequantize(kept.dtype)

    def __str__(self):
        along = "" if self.axis == -1 else f" along axis {self.axis}"
        return f"{self.format}{along}"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StoredTensor:
    """A QTensor and the dtype of the values it stands for."""

    tensor: QTensor
    dtype: jnp.dtype = field(metadata={"static": True})


@dataclass(frozen=True)
class RunningUint8(Policy):
    """Mesa: unsigned 8-bit codes in running ranges, stochastically rounded (arXiv 2111.11124, §3.2).

    q = ⌊clip((x - shift) · 255 / range + u, 0, 255)⌋, u uniform in [0, 1), is restored as q · range / 255 + shift.
    After a step range and shift become decay · old + (1 - decay) · (max - min, or min) of what it saw; the first step
    uses its own. Values beyond the running range clamp on both sides (in the authors' kernel those above wrap around).

    Args:
      decay: of range and shift.
      groups: each has a range and a shift: so many equal parts of the last axis, or the "heads", entries of the axis
        before it.
    """

    decay: float = 0.9
    groups: int | Literal["heads"] = 1

    stochastic = True
    remembers = True

    def __post_init__(self):
        if not (self.groups == "heads" or (isinstance(self.groups, int) and self.groups >= 1)):
            raise UsageError(f"groups of a running range are 'heads' or a number of parts, not {self.groups!r}")
        if not 0 <= self.decay < 1:
            raise UsageError(f"the decay of a running range lies in [0, 1), not {self.decay}")

    def initial_memory(self, shape: tuple[int, ...] = ()) -> tuple[dict[str, Array], Float[Array, " seen"]]:
        """The state before the first step, and its slot; only "heads" depend on the shape of the input."""
        count = self._shape(shape)[-2] if self.groups == "heads" else self.groups
        state = {"range": jnp.zeros(count), "shift": jnp.zeros(count), "steps": jnp.zeros(())}
        return state, jnp.zeros(1 + 2 * count)

    def observe(self, x: Float[Array, "..."]) -> Float[Array, " seen"]:
        """1, the minima of the groups and their maxima; sums over calls are divided by the sum of the ones."""
        low, high = self._extrema(x)
        return jnp.concatenate([jnp.ones(1), low, high])

    def next_state(self, state: Arrays, observed: Float[Array, "... seen"]) -> dict[str, Float[Array, "..."]]:
        """The state after a step; unchanged where nothing, or nothing finite, was observed."""
        calls = observed[..., :1]
        low, high = jnp.split(divide(observed[..., 1:], jnp.maximum(calls, 1)), 2, axis=-1)
        seen = (calls[..., 0] > 0) & jnp.all(jnp.isfinite(high - low), axis=-1)
        first = state["steps"] == 0
        decay, rest = np.float32(self.decay), np.float32(1 - self.decay)
        after = {"steps": jnp.where(seen, state["steps"] + 1, state["steps"])}
        for name, new in (("range", high - low), ("shift", low)):
            mixed = jnp.where(first[..., None], new, decay * state[name] + rest * new)
            after[name] = jnp.where(seen[..., None], mixed, state[name])
        return after

    def save(self, x, key=None, state=None):
        if key is None:
            raise UsageError(
                "saved activations are rounded at random, which needs a key: in Flax rngs={'quant': key}, and "
                "split_rngs={'quant': True} in a model's own nn.scan"
            )
        low, high = self._extrema(x)
        spread = high - low
        if state is not None:
            first = state["steps"] == 0
            spread, low = jnp.where(first, spread, state["range"]), jnp.where(first, low, state["shift"])
        spread = jnp.where(spread > 0, spread, 1.0)
        grouped = x.astype(jnp.float32).reshape(self._shape(x.shape))
        steps = (grouped - low[:, None]) * (np.float32(255) / spread)[:, None]
        uniform = (random_bits(key, grouped.shape) >> 8).astype(jnp.float32) * np.float32(2.0**-24)
        codes = jnp.clip(jnp.floor(steps + uniform), 0, 255).astype(jnp.uint8)
        return RangedTensor(codes.reshape(x.shape), spread, low, x.dtype)

    def restore(self, kept):
        codes = kept.codes.reshape(self._shape(kept.codes.shape)).astype(jnp.float32)
        values = codes * (kept.range / np.float32(255))[:, None] + kept.shift[:, None]
        return values.reshape(kept.codes.shape).astype(kept.dtype)

    def _extrema(self, x):
        grouped = x.astype(jnp.float32).reshape(self._shape(x.shape))
        others = tuple(axis for axis in range(grouped.ndim) if axis != grouped.ndim - 2)
        return jnp.min(grouped, axis=others), jnp.max(grouped, axis=others)

    def _shape(self, shape):
        """The groups on an axis of their own, the last but one."""
        if self.groups == "heads":
            if len(shape) < 2:
                raise UsageError(f"an input of shape {shape} has no heads, which are the last axis but one")
            return shape
        if not shape or shape[-1] % self.groups:
            raise UsageError(f"{self.groups} groups do not divide the last axis of an input of shape {shape}")
        return (*shape[:-1], self.groups, shape[-1] // self.groups)

    def __str__(self):
        groups = "by head" if self.groups == "heads" else f"in {self.groups} group{'s' if self.groups > 1 else ''}"
        return f"uint8 in running ranges {groups}, decay {self.decay:g}, stochastic"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RangedTensor:
    """8-bit codes, with a range and a shift a group, and the dtype of the values they stand for."""

    codes: Array
    range: Array
    shift: Array
    dtype: jnp.dtype = field(metadata={"static": True})


def saved(function: Callable, *policies: Policy) -> Callable:
    """A function with the values of `function`, which keeps of its arguments what the policies say.

    Its gradient is the vjp of `function` at the restored arguments. What is not kept exactly is recomputed too: nothing
    inside of the function is kept. Parameters among the arguments, which live anyway, are best kept by `Exact`.

    Args:
      function: of arrays or pytrees of them; it closes over nothing that is differentiated or mapped.
      policies: one an argument; policies other than `Exact` and `Recompute` take an array.
    Returns:
      A function of the same arguments and, by keyword, `key`, for stochastic policies; `state` and `slots`, of those
      that remember, by names "saved.0", "saved.1", …: the cotangent of a slot says what was observed.
    """
    exact = all(isinstance(policy, Exact) for policy in policies)

    def call(*arguments, key=None, state: Mapping[str, Arrays] | None = None, slots=None):
        if len(arguments) != len(policies):
            raise UsageError(f"a function of {len(arguments)} arguments has {len(policies)} policies to save them")
        if exact:
            return function(*arguments)
        return _saved(function, policies, arguments, key, state or {}, slots or {})

    return call


def slot_name(index: int) -> str:
    """Of the state and the slot of an argument."""
    return f"saved.{index}"


def is_slot_name(name: str) -> bool:
    return name.startswith("saved.") and name != SAVED_X


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _saved(function, policies, arguments, key, state, slots):
    return function(*arguments)


def _forward(function, policies, arguments, key, state, slots):
    kept, seen = [], {}
    for index, (policy, argument) in enumerate(zip(policies, arguments, strict=True)):
        name = slot_name(index)
        own = jax.random.fold_in(key, index) if policy.stochastic and key is not None else None
        kept.append(keep_input(policy, argument, own, state.get(name)))
        if name in slots:
            seen[name] = policy.observe(argument)
    return function(*arguments), (tuple(kept), seen)


def _backward(function, policies, residuals, cotangent):
    kept, seen = residuals
    # Without the barrier XLA would find the inside of the forward function again, and keep it after all.
    kept = lax.optimization_barrier(kept)
    restored = tuple(policy.restore(k) for policy, k in zip(policies, kept, strict=True))
    leaves, structure = jax.tree.flatten(restored)
    smooth = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]
    varying = [leaf for leaf, differentiable in zip(leaves, smooth, strict=True) if differentiable]

    def of_varying(*varying):
        given = iter(varying)
        mixed = [next(given) if differentiable else leaf for leaf, differentiable in zip(leaves, smooth, strict=True)]
        return function(*jax.tree.unflatten(structure, mixed))

    _, vjp = jax.vjp(of_varying, *varying)
    gradients = iter(vjp(cotangent))
    gradient = jax.tree.unflatten(structure, [next(gradients) if differentiable else None for differentiable in smooth])
    return gradient, None, None, seen


_saved.defvjp(_forward, _backward)


def keep_input(policy: Policy, x: Any, key: jax.Array | None, state: Arrays | None) -> Any:
    """What is kept, named for blocks that compute all else again."""
    kept = policy.save(x, key, state)
    return kept if isinstance(policy, _Whole) else jax.tree.map(lambda leaf: checkpoint_name(leaf, KEPT), kept)
