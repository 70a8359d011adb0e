"""Moments of a tree of parameters, each leaf in a state format or, where it is small or named, in float32.

The arithmetic of every optimizer here is that of float32 arrays: a moment is loaded, used and changed, and stored.
Its dtype is never that of its parameter.
"""

import re
from dataclasses import dataclass
from typing import Any

import jax

from lowprec.errors import UsageError
from lowprec.optim.paths import path_name
from lowprec.optim.state_formats import StateFormat, state_format
from lowprec.optim.state_tensor import Rows, is_stored, leaf_key, load, store, zeros
from lowprec.typing import Array

# Smaller leaves are stored in float32: they are few bytes, and scales and biases are among them.
MIN_SIZE = 4096
# Embeddings, whose rows are seen rarely and in bursts, norms and biases.
SKIPPED = r"(.*/)?([^/]*(embed|norm)[^/]*|wte|wpe|scale|bias)(/.*)?"

_F32 = state_format("f32", signed=True)


@dataclass(frozen=True)
class MomentStore:
    """One moment of all parameters: how its leaves are stored.

    Args:
      role: its name; it salts the noise of stochastic rounding.
      fmt: of its leaves; a name, a format, or None for float32.
      signed: False for what is never negative.
      min_size: leaves of fewer elements are stored in float32; None: `MIN_SIZE`.
      skip: regular expression; leaves whose whole path matches are stored in float32. None: only small ones are.
      seed: of the noise.
    Raises:
      UsageError: (a ValueError) for a format that is unknown, or has no values of that sign, and for a traced min_size.
    """

    role: str
    fmt: str | StateFormat | None
    signed: bool
    min_size: int | None
    skip: str | None
    seed: int | Array

    def __post_init__(self):
        object.__setattr__(self, "fmt", state_format(self.fmt or "f32", signed=self.signed))

    def zeros(self, params: Any) -> Any:
        """A moment of zeros in the structure of the parameters."""
        return jax.tree_util.tree_map_with_path(lambda path, leaf: zeros(leaf.shape, self._format(path, leaf)), params)

    def load(self, moment: Any) -> Any:
        """float32 arrays in the structure of the parameters."""
        return jax.tree.map(load, moment, is_leaf=is_stored)

    def store(self, values: Any, before: Any, count: Array, rows: Rows | None = None) -> Any:
        """Values in the formats that the leaves of `before` have; the noise is that of step `count`.

        Args:
          values: float32 arrays in the structure of the parameters.
          before: the moment as it was stored.
          rows: (first, total) where each leaf is a part of a larger array along axis 0.
        """

        def stored(path, x, old):
            fmt = old.fmt if is_stored(old) else self._format_of_array(old)
            key = leaf_key(self.seed, count, path, self.role) if fmt.stochastic else None
            return store(x, fmt, key, rows)

        return jax.tree_util.tree_map_with_path(stored, values, before)

    def _format(self, path, leaf):
        named = self.skip is not None and re.fullmatch(self.skip, path_name(path))
        if isinstance(self.min_size, jax.core.Tracer):
            raise UsageError("min_size decides about shapes: name it among the static_args of optax.inject_hyperparams")
        small = leaf.size < (MIN_SIZE if self.min_size is None else self.min_size)
        return _F32 if small or named else self.fmt

    def _format_of_array(self, leaf):
        return self.fmt if self.fmt.element is None and leaf.dtype == self.fmt.dtype else _F32
