"""Weights in bfloat16 (float16, float8) without a float32 copy: the sum of weight and update is rounded stochastically.

A nearest bfloat16 swallows updates below 2^-9 of a weight; stochastic rounding keeps them on average:
P(up) = the fraction of the spacing that is dropped.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowprec.errors import UsageError
from lowprec.formats.bits import carry_to_bfloat16
from lowprec.formats.elements import encode_rounded, round_elements
from lowprec.formats.native import format_of, to_native
from lowprec.formats.random import Key, random_bits
from lowprec.formats.rounding import Rounding
from lowprec.formats.types import BFLOAT16, FloatFormat
from lowprec.optim.narrow_weights import Narrow, narrow_weights
from lowprec.optim.paths import path_name
from lowprec.optim.state_tensor import Rows, leaf_key
from lowprec.quantizers.qtensor import is_qtensor, quantize
from lowprec.typing import Array, Float

_STOCHASTIC = Rounding("stochastic")


def apply_updates(params: Any, updates: Any, key: jax.Array | None = None) -> Any:
    """params + updates, in the form of the parameters; where that is narrower than float32, stochastically rounded.

    float32 parameters become exactly what `optax.apply_updates` makes of them. Sums are made in float32. A QTensor gets
    new scales with its new values, and stays in its format. Sums beyond the range of a dtype are infinite, or the
    largest value where there is no infinity.

    Args:
      params: arrays, QTensors, or None.
      updates: arrays of their shapes.
      key: another one each step; each parameter draws noise of its own from it.
    Raises:
      UsageError: (a ValueError) if there is no key and a parameter is to be rounded.
    """

    def apply(path, w, update):
        return apply_update(w, update, None if key is None else leaf_key(key, 0, path, "weights"), path)

    is_leaf = lambda leaf: leaf is None or is_qtensor(leaf)
    return jax.tree_util.tree_map_with_path(apply, params, updates, is_leaf=is_leaf)


def apply_update(w: Any, update: Array, key: Key | None, path: tuple[Any, ...] = (), rows: Rows | None = None) -> Any:
    """`apply_updates` of one parameter, or of rows of it."""
    if w is None:
        return None
    if is_qtensor(w) or is_narrow(w):
        if key is None:
            name = path_name(path)
            raise UsageError(f"parameter {name!r} is {_form(w)}: it is rounded stochastically, which needs a key")
        if is_qtensor(w):
            return quantize(w.dequantize() + update, w.fmt, axis=w.axis, rounding=_STOCHASTIC, key=key, pad=True)
        return rounded_stochastically(w.astype(jnp.float32) + update.astype(jnp.float32), w, key, rows)
    return jnp.asarray(w + update).astype(jnp.asarray(w).dtype)


def with_stochastic_rounding(tx: optax.GradientTransformation, dtype: Any | None = None, *, seed: int = 0) -> Narrow:
    """An optimizer whose updates take the parameters to stochastically rounded values.

    The optimizer itself works in float32, its state too. Any loop that adds updates to parameters will do: a sum with
    these updates is exact. (`apply_updates` rounds where the sum is made, and needs a key.)

    Args:
      tx: the whole optimizer, its learning rate and decay among it.
      dtype: what is rounded to, by all parameters: those in a wider dtype stay on the grid of this one. None: its own
        for each that is narrower than float32.
      seed: of the noise, which depends on it, the step, the path and the index of the element alone.
    Raises:
      UsageError: (a ValueError) for a dtype that is no float.
    """
    fmt = None if dtype is None else format_of(dtype)
    if not isinstance(fmt, FloatFormat | None):
        raise UsageError(f"weights are rounded stochastically to floats, not to {fmt}; see optim.quantize_weights")
    return narrow_weights(tx, Stochastic(seed, fmt))


@dataclass(frozen=True)
class Stochastic:
    """`narrow_weights.Storage` by stochastic rounding, with nothing stored beside the weights."""

    seed: int
    fmt: FloatFormat | None = None

    def stores(self, w):
        return is_narrow(w) if self.fmt is None else jnp.issubdtype(w.dtype, jnp.floating)

    def start(self, w):
        return None

    def load(self, w, rest):
        return w.astype(jnp.float32)

    def rounded(self, total, like, key, rows):
        if self.fmt is None:
            return rounded_stochastically(total, like, key, rows)
        return _values(total, self.fmt, random_bits(key, total.shape, rows=rows)).astype(like.dtype)

    def rest(self, total, w):
        return None


def is_narrow(w: Any) -> bool:
    """Whether the dtype of an array is a float of fewer bits than float32."""
    return jnp.issubdtype(w.dtype, jnp.floating) and w.dtype.itemsize < 4


def rounded_stochastically(
    total: Float[Array, "..."], like: Array, key: Key, rows: Rows | None = None
) -> Float[Array, "..."]:
    """float32 values in the dtype of `like`, up in magnitude with the probability of the fraction that is dropped.

    Args:
      rows: (first, total) where the values are rows of an array: they get the noise that they have in it.
    """
    fmt = format_of(like.dtype)
    values = _values(total, fmt, random_bits(key, total.shape, rows=rows))
    return values.astype(like.dtype) if fmt.bits == 16 else to_native(encode_rounded(values, fmt), fmt)


def _values(total, fmt, random):
    """float32 values of the format."""
    if fmt == BFLOAT16:
        return carry_to_bfloat16(total, random)
    values = round_elements(total, fmt, _STOCHASTIC, random, saturate=not fmt.has_inf)
    return jnp.where(jnp.isfinite(total), values, total if fmt.has_inf else jnp.nan)


def _form(w):
    return f"a QTensor of {w.fmt}" if is_qtensor(w) else str(w.dtype)
