"""Optimizer states in other formats, and the names of formats that a checkpoint keeps beside its arrays."""

import math
from collections.abc import Mapping
from typing import Any

import jax

from lowprec.errors import UsageError
from lowprec.optim.paths import path_name
from lowprec.optim.state_formats import StateFormat
from lowprec.optim.state_leaves import SIGNED, UNSIGNED, Choice, MomentLeaf, Rules, described, field_name, is_real
from lowprec.optim.state_tensor import is_stored, leaf_key, load, store
from lowprec.optim.stored_moments import MIN_SIZE, SKIPPED


def stored_formats(state: Any) -> dict[str, str]:
    """The format of each leaf of a state that is stored in one, by path: to be kept beside a checkpoint, as JSON.

    Codes do not say how they are read: those of "de8" and "log8" have the same shape and the same dtype.
    """
    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_stored)
    return {path_name(path): str(leaf.fmt) for path, leaf in leaves if is_stored(leaf)}


def require_formats(state: Any, recorded: Mapping[str, str]) -> None:
    """Refuses to read a checkpoint as what it is not.

    Args:
      state: into which it is to be restored; shapes will do.
      recorded: what `stored_formats` said of the state that was saved.
    Raises:
      UsageError: (a ValueError) that names the first leaf whose format is another one.
    """
    wanted = stored_formats(state)
    for path in sorted({*wanted, *recorded}):
        if wanted.get(path) != recorded.get(path):
            before, after = described(recorded.get(path)), described(wanted.get(path))
            raise UsageError(
                f"{path} was saved {before} and is to be restored {after}; restore it into the state of the optimizer "
                "that saved it, then change that with optim.convert_state"
            )


def convert_state(
    state: Any,
    to: Any = None,
    *,
    mu: Choice = None,
    nu: Choice = None,
    min_size: int = MIN_SIZE,
    skip: str | None = SKIPPED,
    seed: int = 0,
) -> Any:
    """A state whose moments are stored in other formats: loaded, and stored again. What has its format already keeps
    its bits, and so does all that is no moment.

    Args:
      to: the state that is wanted, of another optimizer of the same moments; its shapes will do:
        `convert_state(state, jax.eval_shape(other.init, params))`.
      mu: instead of `to`, a format for the leaves of fields that hold averages of gradients (`state_leaves.SIGNED`),
        or formats by path, as `quantize_state` takes them; None: they stay.
      nu: of those that hold averages of squares (`UNSIGNED`).
      min_size: with mu and nu: smaller leaves stay.
      skip: with mu and nu: so do those of parameters whose whole path matches; None: only small ones.
      seed: of stochastic rounding.
    Raises:
      UsageError: (a ValueError) if `to` has other leaves than the state; it names the first.
    """
    if (to is None) == (mu is None and nu is None):
        raise UsageError("convert_state takes either the state that is wanted, or formats: mu=…, nu=…")
    leaves, structure = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_stored)
    targets = _by_rules(leaves, Rules(mu, nu, None, min_size, skip)) if to is None else _like(leaves, to)
    converted = (_converted(path, leaf, fmt, seed) for (path, leaf), fmt in zip(leaves, targets, strict=True))
    return jax.tree.unflatten(structure, converted)


def _by_rules(leaves, rules) -> list[StateFormat | None]:
    formats: list[StateFormat | None] = []
    for path, leaf in leaves:
        # Fields of states are attributes; entries of dictionaries are names of parameters.
        fields = [i for i, entry in enumerate(path) if getattr(entry, "name", None) in SIGNED | UNSIGNED]
        if not fields or not is_real(leaf):
            formats.append(None)
            continue
        before, own = path[: fields[-1] + 1], path[fields[-1] + 1 :]
        size = math.prod(leaf.shape)
        formats.append(rules.format_of(MomentLeaf(field_name(before), path_name(own), "", 1, size), size))
    return formats


def _like(leaves, to) -> list[StateFormat | None]:
    """Of each leaf the format that it has in another state, an array's dtype among them."""
    wanted = dict(jax.tree_util.tree_leaves_with_path(to, is_leaf=is_stored))
    found = dict(leaves)
    for path in (*found, *wanted):
        ours, theirs = found.get(path), wanted.get(path)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            said = ["is missing" if leaf is None else f"has shape {tuple(leaf.shape)}" for leaf in (ours, theirs)]
            raise UsageError(f"{path_name(path)} {said[0]} in the state, and {said[1]} in the one that is wanted")

    return [_format_of(wanted[path]) for path in found]


def _format_of(leaf) -> StateFormat | None:
    if is_stored(leaf):
        return leaf.fmt
    return StateFormat(str(leaf.dtype), dtype=str(leaf.dtype)) if is_real(leaf) else None


def _converted(path, leaf, fmt, seed):
    if fmt is None or fmt == (leaf.fmt if is_stored(leaf) else None):
        return leaf
    if not is_stored(leaf) and fmt.element is None and leaf.dtype == fmt.dtype:
        return leaf
    return store(load(leaf), fmt, leaf_key(seed, 0, path, "conversion") if fmt.stochastic else None)
