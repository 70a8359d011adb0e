"""Updating large arrays a few rows at a time, in place: what is computed on the way is as large as a chunk of rows."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from lowprec.optim.state_tensor import Rows, StateTensor, is_stored
from lowprec.typing import Array


def rows_of_chunk(w: Any, trees: Any, chunk: int) -> int | None:
    """How many rows are at most `chunk` elements, a row at least; None if one chunk holds all, or rows cannot be split.

    Rows are what is left of w without its last axis. They can be split if w has two axes, all arrays of the trees have
    the same rows, and stored moments have scales of their own for each row.
    """
    if not isinstance(w, jax.Array) or w.ndim < 2 or w.size <= chunk:
        return None
    moments = jax.tree.leaves(trees, is_leaf=is_stored)
    if not all(moment.fmt.scales.by_rows for moment in moments if isinstance(moment, StateTensor)):
        return None
    if not all(x.ndim == w.ndim and x.shape[:-1] == w.shape[:-1] for x in jax.tree.leaves(trees)):
        return None
    total, most = w.size // w.shape[-1], max(1, chunk // w.shape[-1])
    # A divisor leaves no rest, which would be one more program.
    return next((rows for rows in range(most, most // 4, -1) if total % rows == 0), most)


def update_by_rows(
    function: Callable[[Any, Any, Rows], tuple[Any, Any]], read: Any, changed: Any, others: Any, rows: int
) -> tuple[Any, Any]:
    """`function` of chunks of rows, one after another.

    Args:
      function: (rows of `read`, rows of `changed`, (first, total)) -> (rows of `changed`, others).
      read, changed: trees of arrays with the same axes but for the last.
      others: like what `function` gives, the same for all rows.
      rows: of a chunk.
    """
    shape = jax.tree.leaves(changed)[0].shape
    total = math.prod(shape[:-1])
    # All but the last axis as the first; the others stay, with one entry.
    flat = lambda x: x.reshape(total, *[1] * (len(shape) - 2), x.shape[-1])
    read, whole = jax.tree.map(flat, read), jax.tree.map(flat, changed)

    def step(first: Array | int, count: int, carry):
        whole, _ = carry
        part = lambda x: lax.dynamic_slice_in_dim(x, first, count)
        # Rows are read before any is written: what reads the array later makes XLA copy all of it in each round.
        old_read, old = lax.optimization_barrier((jax.tree.map(part, read), jax.tree.map(part, whole)))
        new, others = function(old_read, old, (first, total))
        return jax.tree.map(lambda x, y: lax.dynamic_update_slice_in_dim(x, y, first, 0), whole, new), others

    whole_chunks = total // rows
    carry = lax.fori_loop(0, whole_chunks, lambda i, carry: step(i * rows, rows, carry), (whole, others))
    if total % rows:
        carry = step(whole_chunks * rows, total % rows, carry)
    whole, others = carry
    return jax.tree.map(lambda x, old: x.reshape(old.shape), whole, changed), others
