"""Where the state of an optimizer lies: with its parameters."""

import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from lowprec.optim.state_leaves import parameter_of
from lowprec.optim.state_scales import Rank1
from lowprec.optim.state_tensor import StateTensor, is_stored

Entry = str | tuple[str, ...] | None


def state_shardings(optimizer: Any, params: Any, shardings: Any = None) -> Any:
    """A sharding for each leaf of an optimizer's state, for `jax.jit(optimizer.init, out_shardings=…)` and checkpoints.

    (`jax.jit(optimizer.init)` by itself puts zeros on one device: they do not depend on the parameters.)

    A leaf whose path ends in that of a parameter lies as the parameter does, axis by axis:

    * an array of its shape has its PartitionSpec;
    * codes and scales of a `StateTensor` too, so that each device holds whole blocks, with their scales, of exactly the
      elements that it holds of the parameter. Where the shards of the last axis are not whole blocks (its length is no
      multiple of block · shards), that axis is not split: its mesh axes go to the first axis before it that is whole
      and that they divide, and where there is none the leaf is replicated over them. Each update then has an exchange
      of this leaf, which a shorter block avoids ("log4@64");
    * an array of other sizes and as many axes (rows of Adam-mini, gradients of low rank) follows along the axes that
      have the size of the parameter's.

    All else, counts and such, is replicated.

    Args:
      optimizer: anything with an `init`.
      params: arrays, or their shapes.
      shardings: of the parameters, in their structure; None: those that `params` have.
    """
    if shardings is None:
        shardings = jax.tree.map(lambda w: w.sharding, params)
    where = dict(jax.tree_util.tree_leaves_with_path(shardings))
    shapes = {path: tuple(w.shape) for path, w in jax.tree_util.tree_leaves_with_path(params)}
    everywhere = _everywhere(list(where.values()))

    def place(path, leaf):
        own = parameter_of(path, shapes)
        found = everywhere if own is None else where[own]
        if own is None or not isinstance(found, NamedSharding):
            return jax.tree.map(lambda _: found, leaf)
        spec = _common(found.spec, shapes[own], leaf.shape)
        if is_stored(leaf):
            spec = _of_blocks(spec, leaf, found.mesh)
        return jax.tree.map(
            lambda part: NamedSharding(found.mesh, _of_part(spec, leaf.shape, part.shape, found.mesh)), leaf
        )

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, params), is_leaf=is_stored)


def _everywhere(shardings: list[Sharding]) -> Sharding:
    """Replicated over the devices of the parameters."""
    named = next((sharding for sharding in shardings if isinstance(sharding, NamedSharding)), None)
    return shardings[0] if named is None else NamedSharding(named.mesh, PartitionSpec())


def _common(spec, parameter: tuple[int, ...], shape: tuple[int, ...]) -> list[Entry]:
    """How the axes are split that an array has in common with its parameter."""
    if len(shape) != len(parameter):
        return [None] * len(shape)
    entries = [*spec, *(None,) * (len(parameter) - len(spec))]
    return [entry if ours == theirs else None for entry, ours, theirs in zip(entries, shape, parameter, strict=True)]


def _of_blocks(spec: list[Entry], tensor: StateTensor, mesh) -> list[Entry]:
    """The split of a stored tensor, so that no block is."""
    if not spec or spec[-1] is None:
        return spec
    *leading, last = spec
    *sizes, length = tensor.shape
    parts = _parts(last, mesh)
    if length % parts == 0 and tensor.fmt.element is not None:
        whole = math.lcm(_block(tensor), math.lcm(8, tensor.fmt.element.bits) // tensor.fmt.element.bits)
        if length // parts % whole == 0:
            return spec
    free = (axis for axis, entry in enumerate(leading) if entry is None and sizes[axis] % parts == 0)
    other = next(free, None)
    return [last if axis == other else entry for axis, entry in enumerate(leading)] + [None]


def _block(tensor: StateTensor) -> int:
    """How many values share a scale: 1 where scales are those of lines."""
    scales: Any = tensor.fmt.scales
    if isinstance(scales, Rank1):
        return scales.of_lines.block if len(tensor.shape) == 1 else 1
    return scales.block


def _of_part(spec: list[Entry], shape: tuple[int, ...], part: tuple[int, ...], mesh) -> PartitionSpec:
    """Of codes or scales: along the last axis they have fewer entries than the array, and lines have one of an axis."""
    last = len(shape) - 1
    follows = (n == size or axis == last for axis, (n, size) in enumerate(zip(part, shape, strict=False)))
    kept = [
        entry if follow and n % _parts(entry, mesh) == 0 else None
        for entry, n, follow in zip(spec, part, follows, strict=False)
    ]
    return PartitionSpec(*kept)


def _parts(entry: Entry, mesh) -> int:
    names = () if entry is None else (entry,) if isinstance(entry, str) else entry
    return math.prod(mesh.shape[name] for name in names)
