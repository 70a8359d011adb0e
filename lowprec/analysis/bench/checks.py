"""Whether a kernel gives what its reference gives: records with what was found and what is allowed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lowprec.analysis.bench.case import Record

# (found, wanted) -> a record with "ok"
Check = Callable[[Any, Any], Record]


def close(allowed: float) -> Check:
    """‖found − wanted‖ / ‖wanted‖ of all arrays together is at most so much."""

    def check(found, wanted):
        _same_shapes(found, wanted)
        error = float(jax.jit(_relative_error)(jax.tree.leaves(found), jax.tree.leaves(wanted)))
        return {"relative_error": error, "allowed": allowed, "ok": error <= allowed}

    return check


def same_codes(allowed: float) -> Check:
    """Bytes and codes differ in at most such a part of their places; floats, as scales are, by that relative error.

    The sums of a product on tensor cores have an order of their own, so a value at a tie may go to its other neighbour.
    """

    def check(found, wanted):
        _same_shapes(found, wanted)
        pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True))
        codes = [(_bits(a), _bits(b)) for a, b in pairs if a.dtype.itemsize == 1]
        floats = [pair for pair in pairs if pair[0].dtype.itemsize > 1]
        differing = float(jax.jit(_part_differing)(codes)) if codes else 0.0
        error = float(jax.jit(_relative_error)(*map(list, zip(*floats, strict=True)))) if floats else 0.0
        ok = differing <= allowed and error <= allowed
        return {"codes_differing": differing, "scales_error": error, "allowed": allowed, "ok": ok}

    return check


def _relative_error(found, wanted):
    # float32: the sum of squares of 2^28 numbers of one size is good to 1e-4 as XLA's tree of partial sums has it.
    wide = lambda leaves: [leaf.astype(jnp.float32) for leaf in leaves]
    found, wanted = wide(found), wide(wanted)
    difference = sum(jnp.sum(jnp.square(a - b)) for a, b in zip(found, wanted, strict=True))
    size = sum(jnp.sum(jnp.square(b)) for b in wanted)
    return jnp.where(difference == 0, 0.0, jnp.sqrt(difference / size))


def _part_differing(pairs):
    return sum(jnp.sum(a != b, dtype=jnp.float32) for a, b in pairs) / sum(a.size for a, _ in pairs)


def _bits(codes):
    return codes if codes.dtype == jnp.uint8 else jax.lax.bitcast_convert_type(codes, jnp.uint8)


def _same_shapes(found, wanted):
    shapes = [[(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(tree)] for tree in (found, wanted)]
    if shapes[0] != shapes[1]:
        raise AssertionError(f"arrays {shapes[0]} where the reference has {shapes[1]}")
