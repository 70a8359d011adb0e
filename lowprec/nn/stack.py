"""A stack of equal blocks, scanned, whose layers may still follow different rules.

The parameters of all layers are stored stacked, whatever the recipe: checkpoints and initial values do not depend on
it. Runs of layers that a recipe treats alike are scanned together, each compiled once.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Segments = tuple[tuple[int, int], ...]


class LayerStack(nn.Module):
    """y = block_{L-1}(… block_0(x)); every leaf of the parameters has a leading axis of L layers.

    Args:
      block: makes a block for a path prefix: a module with a field `path_prefix`, called as block(x, *args) -> x.
      length: L.
      remat: recompute the inside of each block in the backward pass.
      segments: runs [start, stop) of layers scanned together; None: all of them. `nn.linen.quantize` sets it.
    """

    block: Callable[[str], nn.Module]
    length: int
    remat: bool = False
    segments: Segments | None = None

    @nn.compact
    def __call__(self, x, *args):
        if self.is_initializing():
            self._initialize(x, args)
        variables = dict(self.variables)
        streams = {name: self.make_rng(name) for name in ("quant", "dropout") if self.has_rng(name)}
        mutable = [name for name in variables if name != "params" and self.is_mutable_collection(name)]
        updates = []
        for start, stop in self.segments or ((0, self.length),):
            layers = jax.tree.map(lambda leaf: leaf[start:stop], variables)  # noqa: B023 (called at once)
            x, update = self._scan(x, args, layers, range(start, stop), streams, mutable)
            updates.append(update)
        for name in mutable:
            stacked = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(update[name] for update in updates))
            for key, value in stacked.items():
                self.put_variable(name, key, value)
        return x

    def _block_at(self, index: int) -> nn.Module:
        return self.block(f"{module_path(self)}/{index}")

    def _initialize(self, x, args):
        block = self._block_at(0)
        streams = {name: self.make_rng(name) for name in ("quant",) if self.has_rng(name)}
        keys = jax.random.split(self.make_rng("params"), self.length)
        stacked = jax.vmap(lambda key: block.init({"params": key, **streams}, x, *args))(keys)
        for collection, tree in stacked.items():
            for name, value in tree.items():
                if collection == "params":
                    self.param(name, lambda _, value=value: value)
                else:
                    self.put_variable(collection, name, value)

    def _scan(self, x, args, layers, indices, streams, mutable) -> tuple[Any, Any]:
        block = self._block_at(indices.start)

        def body(x, layer):
            variables, index = layer
            rngs = {name: jax.random.fold_in(key, index) for name, key in streams.items()}
            y, update = block.apply(variables, x, *args, rngs=rngs, mutable=mutable or ["nothing"])
            return y, {name: update.get(name, {}) for name in mutable}

        if self.remat:
            body = jax.checkpoint(body, prevent_cse=False)
        return jax.lax.scan(body, x, (layers, jnp.arange(indices.start, indices.stop)))


def module_path(module: nn.Module) -> str:
    """The path of a bound module in the whole model: that of its scope, after the prefix of the block it lies in."""
    root = module
    while isinstance(root.parent, nn.Module):
        root = root.parent
    return "/".join(filter(None, (getattr(root, "path_prefix", ""), *module.scope.path)))
