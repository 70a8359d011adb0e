"""Weights stored in fewer bits than float32 and updated in float32: what every way of doing so has in common.

total = load(w, rest) + update,   w ← rounded(total),   rest ← what is left of total - w

A way of storing says what `rest` is (stochastic rounding has none) and how the total is rounded. As transformations
they are wrapped around a whole optimizer, which sees float32 parameters and gradients. Their updates, added to the
parameters by `optax.apply_updates`, give the rounded weights and nothing else: no loop has to know of them.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from lowprec.errors import UsageError
from lowprec.formats.random import Key
from lowprec.optim.descent import as_float32
from lowprec.optim.split_floats import join
from lowprec.optim.state_tensor import Rows, leaf_key
from lowprec.typing import Array, Float


@runtime_checkable
class Storage(Protocol):
    """How one parameter is stored: functions of arrays, or of rows of them."""

    @property
    def seed(self) -> int | None:
        """Of the noise that rounds; None where there is none."""

    def stores(self, w: Array) -> bool:
        """Whether it does at all; others are float32 and stay so.

        Raises:
          UsageError: (a ValueError) for a dtype that it cannot serve.
        """

    def start(self, w: Float[Array, "..."]) -> Array | None:
        """What is stored beside a parameter before the first update; None: nothing."""

    def load(self, w: Float[Array, "..."], rest: Array | None) -> Float[Array, "..."]:
        """The weight in float32."""

    def rounded(
        self, total: Float[Array, "..."], like: Array, key: Key | None, rows: Rows | None
    ) -> Float[Array, "..."]:
        """The weight to be stored, in the dtype of `like`."""

    def rest(self, total: Float[Array, "..."], w: Float[Array, "..."]) -> Array | None:
        """What is stored beside it."""


class NarrowState(NamedTuple):
    """Of `narrow_weights`.

    Attributes:
      steps: updates so far.
      inner: of the optimizer.
      rest: in the structure of the parameters; None where nothing is stored beside one.
    """

    steps: jax.Array
    inner: Any
    rest: Any


class Narrow(optax.GradientTransformationExtraArgs):
    """An optimizer around which `narrow_weights` was wrapped, with both as attributes."""

    inner: optax.GradientTransformationExtraArgs
    storage: Storage


def narrow_weights(inner: optax.GradientTransformation, storage: Storage) -> Narrow:
    """The optimizer, its parameters stored in fewer bits."""
    inner = optax.with_extra_args_support(inner)

    def init(params):
        rest = jax.tree.map(lambda w: storage.start(w) if storage.stores(w) else None, params)
        return NarrowState(jnp.int32(0), inner.init(loaded(storage, params, rest)), rest)

    def update(updates, state, params, **extra):
        wide = loaded(storage, params, state.rest)
        updates, state_of_inner = inner.update(as_float32(updates), state.inner, wide, **extra)
        steps = optax.safe_increment(state.steps)

        def move(path, w, rest, update):
            if not storage.stores(w):
                return update, None
            _, by, rest = moved(storage, w, rest, update, weight_key(storage, steps, path))
            return by, rest

        pairs = jax.tree_util.tree_map_with_path(move, params, state.rest, updates)
        rest = jax.tree.map(lambda _, pair: pair[1], params, pairs)
        return jax.tree.map(lambda _, pair: pair[0], params, pairs), NarrowState(steps, state_of_inner, rest)

    wrapped: Any = Narrow(init, update)
    wrapped.inner, wrapped.storage = inner, storage
    return wrapped


def moved(
    storage: Storage, w: Array, rest: Array | None, update: Array, key: Key | None, rows: Rows | None = None
) -> tuple[Array, Array, Array | None]:
    """One parameter, or rows of it, after an update: (w, by what it moved, rest).

    w is what `optax.apply_updates` makes of the old one and of the second result: the rounded total itself, unless the
    total has less than 2^-16 of the old magnitude. Then it is off by less than what float32 would round away.
    """
    total = storage.load(w, rest) + update.astype(jnp.float32)
    by = storage.rounded(total, w, key, rows).astype(jnp.float32) - w.astype(jnp.float32)
    w = (w.astype(jnp.float32) + by).astype(w.dtype)
    return w, by, storage.rest(total, w)


def export_fp32(params: Any, state: Any) -> Any:
    """The weights in float32, with what the state of `split_weights` or `kahan` has beside the parameters.

    Args:
      state: of a transformation that they wrap, or which holds such a one.
    Raises:
      UsageError: (a ValueError) if there is none.
    """
    states = [node for node in jax.tree.leaves(state, is_leaf=_is_narrow_state) if _is_narrow_state(node)]
    if len(states) != 1:
        raise UsageError(
            f"a state has one part for narrow weights, as split_weights and kahan make it; not {len(states)}"
        )
    return jax.tree.map(lambda w, rest: w if rest is None else join(w, rest), params, states[0].rest)


def loaded(storage: Storage, params: Any, rest: Any) -> Any:
    """All parameters in float32."""
    load = lambda w, rest: storage.load(w, rest) if storage.stores(w) else w
    return jax.tree.map(load, params, rest)


def weight_key(storage: Storage, steps: Array, path: tuple[Any, ...]) -> Key | None:
    """Of the noise that rounds a parameter in a step."""
    return None if storage.seed is None else leaf_key(storage.seed, steps, path, "weights")


def _is_narrow_state(node):
    return isinstance(node, NarrowState)
