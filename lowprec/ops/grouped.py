"""qragged_dot: one quantized product for each group of rows, as mixtures of experts have them.

The definition is a loop: y_g = qdot(x_g, w_g, rule) for each group g. What a scale, a block or a rotation spans lies
within one group, in all three products. Along the rows, groups are filled up with zeros to whole blocks, as production
kernels do it; products are `lax.ragged_dot` of the quantized values.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lowprec.errors import UsageError, unknown
from lowprec.ops.backends import BACKENDS
from lowprec.ops.dot import from_source, through_quantizer
from lowprec.ops.group_scales import by_group, check_groups, row_alignment
from lowprec.ops.operand import Operand, Streams, gradient_factor, quantize_operand
from lowprec.ops.rule import GemmRule
from lowprec.pallas.dispatch import say_once
from lowprec.quantizers.estimators import Factor
from lowprec.quantizers.normalize import normalize_rows
from lowprec.typing import Array, Bool, Float, Int


def qragged_dot(
    x: Float[Array, "rows inputs"],
    w: Float[Array, "groups inputs outputs"],
    group_sizes: Int[Array, " groups"],
    rule: GemmRule,
    *,
    key: jax.Array | None = None,
    backend: str = "auto",
) -> Float[Array, "rows outputs"]:
    """`lax.ragged_dot`, quantized by the rule: `qdot(x_g, w_g, rule)` for each group of rows, forward and backward.

    "tensor" scales, and the second level of two-level ones, are one a group. So are "row" scales along the rows, in
    wgrad. Blocks and rotations along the rows, and tiles, start anew with each group: its last block is filled up with
    zeros, whatever `pad` says, since sizes are known to the device only. Stochastic rounding draws other bits than the
    loop would.

    Args:
      x: the rows, group after group.
      w: a matrix for each group.
      group_sizes: how many rows each has; none is fine. Rows beyond their sum give zeros and get no gradient.
      rule, key: see `qdot`.
      backend: "emulate", which "auto" and "pallas" take too.
    Returns:
      In the common dtype of x and w; an exact rule gives `lax.ragged_dot` itself.
    Raises:
      UsageError: (a ValueError) for shapes that do not fit, for backend "native", and for what has no meaning for
        groups of rows: an operand that learns or remembers, rotations along all rows, scales and clamps that count the
        values of a column.
    """
    if not isinstance(rule, GemmRule):
        raise TypeError(f"qragged_dot takes a GemmRule, not {rule!r}")
    _check_shapes(x, w, group_sizes)
    if backend not in BACKENDS:
        raise unknown("backend", backend, BACKENDS)
    if backend == "native":
        raise UsageError("backend 'native' has no products of groups; the others do")
    if backend == "pallas" and not rule.exact:
        say_once("a product of groups", "there are no kernels of groups")
    if rule.saved is not None:
        raise UsageError(f"qragged_dot keeps x as its products take it, not as the policy {rule.saved} says")
    if rule.exact:
        return lax.ragged_dot(x, w, group_sizes)
    check_groups(rule)
    if rule.normalize_input:
        x = normalize_rows(x, (1,))
    call = Call(rule, x.shape[0], x.shape[1], jnp.dtype(x.dtype), jnp.dtype(w.dtype))
    return _product(x, w, group_sizes, key, call).astype(jnp.result_type(x, w))


@dataclass(frozen=True)
class Call:
    """What is static about one product."""

    rule: GemmRule
    rows: int
    inputs: int
    x_dtype: jnp.dtype
    w_dtype: jnp.dtype


class Residuals(NamedTuple):
    """What the forward pass keeps for the backward one; see `ops.dot`."""

    x: Float[Array, "rows inputs"] | None  # the original
    forward_x: Float[Array, "places inputs"] | None  # as the forward product used it
    factor_x: Factor
    w: Float[Array, "groups inputs outputs"]
    group_sizes: Int[Array, " groups"]
    key: jax.Array | None


@partial(jax.custom_vjp, nondiff_argnums=(4,))
@partial(jax.jit, static_argnums=4)
def _product(x, w, group_sizes, key, call):
    return _forward(x, w, group_sizes, key, call)[0]


@partial(jax.jit, static_argnums=4)
def _forward(x, w, group_sizes, key, call):
    places = _place(group_sizes, call)
    rule, streams = by_group(call.rule, places.group, group_sizes.size), Streams(key)
    forward_x = quantize_operand(rule.fwd[0], places.put(x), "fwd.x", streams)
    forward_w = quantize_operand(rule.fwd[1], w, "fwd.w", streams)
    from_original = rule.wgrad[1].source == "original"
    residuals = Residuals(
        x=x if from_original else None,
        forward_x=None if from_original else forward_x.values,
        factor_x=gradient_factor(rule.fwd[0], forward_x),
        w=w,
        group_sizes=group_sizes,
        key=key,
    )
    return places.take(_times_matrices(forward_x, forward_w, places.sizes)), residuals


@partial(jax.jit, static_argnums=0)
def _backward(call, kept, dy):
    places = _place(kept.group_sizes, call)
    rule, streams = by_group(call.rule, places.group, kept.group_sizes.size), Streams(kept.key)
    forward_w = quantize_operand(rule.fwd[1], lax.optimization_barrier(kept.w), "fwd.w", streams)
    dgrad_w = from_source(rule.dgrad[1], "dgrad.w", kept.w, forward_w, streams)
    dy = places.put(dy)
    dgrad_dy = quantize_operand(rule.dgrad[0], dy, "dgrad.dy", streams)
    dx = _times_matrices(dgrad_dy, dgrad_w, places.sizes)
    dx = through_quantizer(dx, rule.fwd[0], "fwd.x", rule.dgrad[1], kept.factor_x, streams, call.inputs)
    x = None if kept.x is None else places.put(kept.x)
    forward_x = None if kept.forward_x is None else Operand("fwd.x", kept.forward_x, None)
    wgrad_x = from_source(rule.wgrad[1], "wgrad.x", x, forward_x, streams)
    wgrad_dy = from_source(rule.wgrad[0], "wgrad.dy", dy, dgrad_dy, streams)
    dw = _by_rows(wgrad_x, wgrad_dy, places.sizes)
    factor_w = gradient_factor(rule.fwd[1], forward_w)
    dw = through_quantizer(dw, rule.fwd[1], "fwd.w", rule.wgrad[1], factor_w, streams, call.inputs)
    return places.take(dx).astype(call.x_dtype), dw.astype(call.w_dtype), None, None


def _forward_with_key(x, w, group_sizes, key, call):
    if call.rule.stochastic and key is None:
        raise UsageError(
            "the rule rounds or rotates at random, so its products need a key once they are differentiated"
        )
    return _forward(x, w, group_sizes, key, call)


_product.defvjp(_forward_with_key, _backward)


def _times_matrices(rows, matrices, sizes):
    """Each group of rows times its matrix, along their contraction axes."""
    contracted = (((1,), (matrices.axis % 3,)), ((), ()))
    return _ragged(rows, matrices, sizes, lax.RaggedDotDimensionNumbers(contracted, (0,), (0,)))


def _by_rows(a, b, sizes):
    """aᵀ · b of each group of rows."""
    return _ragged(a, b, sizes, lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ()))


def _ragged(a, b, sizes, dimension_numbers):
    a, b = (operand.values.astype(jnp.float32) for operand in (a, b))
    return lax.ragged_dot_general(a, b, sizes, dimension_numbers, precision=lax.Precision.HIGHEST)


class Places(NamedTuple):
    """Rows in a buffer in which every group starts with a whole block, and is followed by zeros up to the next one."""

    row: Int[Array, " places"]  # which row stands at each place
    filled: Bool[Array, " places"]  # whether one does
    group: Int[Array, " places"]  # whose place it is; beyond the last one: nobody's
    sizes: Int[Array, " groups"]  # of the groups, in whole blocks
    place: Int[Array, " rows"]  # where each row stands
    taken: Bool[Array, " rows"]  # whether it belongs to a group

    def put(self, x: Float[Array, "rows n"]) -> Float[Array, "places n"]:
        return jnp.where(self.filled[:, None], x[self.row], 0)

    def take(self, y: Float[Array, "places n"]) -> Float[Array, "rows n"]:
        return jnp.where(self.taken[:, None], y[self.place], 0)


def _place(group_sizes, call):
    """The places of the rows; as many as the worst division into groups needs."""
    block, last = row_alignment(call.rule), group_sizes.size - 1
    sizes = -(-group_sizes // block) * block
    ends, place_ends = jnp.cumsum(group_sizes), jnp.cumsum(sizes)
    starts, place_starts = ends - group_sizes, place_ends - sizes
    places = jnp.arange((call.rows + group_sizes.size * (block - 1)) // block * block)
    group = jnp.searchsorted(place_ends, places, side="right")
    mine = jnp.minimum(group, last)
    offset = places - place_starts[mine]
    filled = (group <= last) & (offset < group_sizes[mine])
    rows = jnp.arange(call.rows)
    row_group = jnp.minimum(jnp.searchsorted(ends, rows, side="right"), last)
    taken = rows < ends[-1]
    return Places(
        row=jnp.where(filled, starts[mine] + offset, 0),
        filled=filled,
        group=group,
        sizes=sizes,
        place=jnp.where(taken, place_starts[row_group] + rows - starts[row_group], 0),
        taken=taken,
    )


def _check_shapes(x, w, group_sizes):
    if x.ndim != 2 or w.ndim != 3 or not w.shape[0]:
        raise UsageError(f"x is (rows, K) and w (groups, K, N), not {list(x.shape)} and {list(w.shape)}")
    if x.shape[1] != w.shape[1]:
        raise UsageError(f"K is {x.shape[1]} in x{list(x.shape)} and {w.shape[1]} in w{list(w.shape)}")
    if group_sizes.shape != w.shape[:1] or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise UsageError(
            f"group_sizes are {w.shape[0]} integers, one a matrix of w{list(w.shape)}, "
            f"not {group_sizes.dtype}{list(group_sizes.shape)}"
        )
