"""A stack of equal blocks, scanned, whose layers may still follow different rules.

The parameters of all layers are stored stacked, whatever the recipe: checkpoints and initial values do not depend on
it. Runs of layers that a recipe treats alike are scanned together, each compiled once. Collections which belong to the
recipe are stacked run by run, under the name "start:stop" of the run.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax

from lowprec.nn.outliers import COLLECTION
from lowprec.ops.saved import KEPT
from lowprec.typing import Array

Segments = tuple[tuple[int, int], ...]

# Outputs of modules (`nn.capture`): written by one model, run by run, and given to another, whatever its runs.
CAPTURED, GIVEN = "captured", "given"

_RUN = re.compile(r"(\d+):(\d+)")
# Collections that hold all layers stacked, whatever the recipe.
_WHOLE = ("params", GIVEN)


class LayerStack(nn.Module):
    """y = block_{L-1}(… block_0(x)); every leaf of the parameters has a leading axis of L layers.

    Args:
      block: makes a block for a path prefix: a module with a field `path_prefix`, called as block(x, *args) -> x.
      length: L.
      remat: recompute the inside of each block in the backward pass.
      segments: runs [start, stop) of layers scanned together; None: all of them. `nn.linen.quantize` sets it.
      recomputed: starts of the runs whose blocks keep only what is named `ops.saved.KEPT`. Set as segments are.
    """

    block: Callable[[str], nn.Module]
    length: int
    remat: bool = False
    segments: Segments | None = None
    recomputed: frozenset[int] = frozenset()

    @nn.compact
    def __call__(self, x, *args):
        if self.is_initializing():
            self._initialize(x, args)
        streams = {name: self.make_rng(name) for name in ("quant", "dropout") if self.has_rng(name)}
        for start, stop in self.segments or ((0, self.length),):
            x = self._scan(x, args, start, stop, streams)
        return x

    def _block_at(self, index: int) -> nn.Module:
        return self.block(f"{module_path(self)}/{index}")

    def _initialize(self, x, args):
        block = self._block_at(0)
        keys = jax.random.split(self.make_rng("params"), self.length)
        init = lambda key: block.init({"params": key}, x, *args, mutable=["params"])["params"]
        for name, value in jax.vmap(init)(keys).items():
            self.param(name, lambda _, value=value: value)

    def _scan(self, x, args, start, stop, streams):
        block, run = self._block_at(start), f"{start}:{stop}"
        own = {name: tree[run] for name, tree in self.variables.items() if name not in _WHOLE and run in tree}
        cut = lambda tree: jax.tree.map(lambda leaf: leaf[start:stop], tree)
        layers = own | {name: cut(tree) for name, tree in self.variables.items() if name in _WHOLE}
        written = ("quant_params", "quant", "taps", COLLECTION, CAPTURED)
        mutable = [name for name in written if self.is_mutable_collection(name)]

        def body(x, layer):
            variables, index = layer
            rngs = {name: jax.random.fold_in(key, index) for name, key in streams.items()}
            y, update = block.apply(variables, x, *args, rngs=rngs, mutable=mutable or ["nothing"])
            return y, {name: update[name] for name in mutable if name in update}

        if self.remat:
            body = jax.checkpoint(body, prevent_cse=False)
        elif start in self.recomputed:
            named = jax.checkpoint_policies.save_only_these_names(KEPT)
            body = jax.checkpoint(body, prevent_cse=False, policy=named)
        x, updates = jax.lax.scan(body, x, (layers, jax.numpy.arange(start, stop)))
        for name, value in updates.items():
            self.put_variable(name, run, value)
        return x


def is_run(name: str) -> bool:
    """Whether an entry of a collection holds a run of layers."""
    return _RUN.fullmatch(name) is not None


def run_start(name: str) -> int:
    """The first layer of the run of this name."""
    return run_layers(name).start


def run_layers(name: str) -> slice:
    """The layers of the run of this name."""
    return slice(*map(int, name.split(":")))


def module_path(module: nn.Module) -> str:
    """The path of a bound module in the whole model: that of its scope, after the prefix of the block it lies in."""
    return "/".join(filter(None, (_prefix(module), *module.scope.path)))


def is_stacked(module: nn.Module) -> bool:
    """Whether a bound module lies in a block of a `LayerStack`."""
    return bool(_prefix(module))


def _prefix(module):
    root = module
    while isinstance(root.parent, nn.Module):
        root = root.parent
    return getattr(root, "path_prefix", "")


def first_layer(names: Sequence[str]) -> str:
    """The module path of an entry of a collection; inside a stack, that of the first layer of its run."""
    return "/".join(match[1] if (match := _RUN.fullmatch(name)) else name for name in names)


def layer_paths(names: Sequence[str], leaf: Array, axes: int) -> Iterator[tuple[str, Any]]:
    """The module path and value of each layer that a leaf of a collection holds.

    Args:
      names: along the path of the leaf.
      leaf: of one layer it would have so many `axes`; those before are of stacks. Of a model's own nn.scan, which says
        nothing about itself, the index of a layer stands after the first name.
    """
    if leaf.ndim == axes:
        yield "/".join(names), leaf
        return
    place = next((i for i, name in enumerate(names) if _RUN.fullmatch(name)), None)
    if place is not None:
        start, before, after = int(names[place].partition(":")[0]), names[:place], names[place + 1 :]
    else:
        start, before, after = 0, names[:1], names[1:]
    for index, part in enumerate(leaf, start):
        yield from layer_paths([*before, str(index), *after], part, axes)
