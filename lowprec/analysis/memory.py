"""Where the memory of a training step goes: what it is given, what it makes, what it keeps for the backward pass."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lowprec.analysis.table import markdown_table


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of one compiled step.

    Attributes:
      parts: of what the caller holds, by name: parameters, optimizer state, …, from their shapes.
      gradients: of what is trained.
      saved: activations that the forward pass hands to the backward pass, as autodiff lists them before XLA
        recomputes or fuses any; a loop of equal layers stacks them.
      arguments, outputs, aliased, temporary: as XLA allocates them. Of the outputs, those that are aliased take the
        place of arguments; gradients and saved activations are part of the temporary.
    """

    parts: dict[str, int]
    gradients: int
    saved: int
    arguments: int
    outputs: int
    aliased: int
    temporary: int

    @property
    def peak(self) -> int:
        """Of the step: arguments, outputs that take no argument's place, and temporaries."""
        return self.arguments + self.outputs - self.aliased + self.temporary

    def table(self) -> str:
        """For people; each line with its share of the peak."""
        rows = [
            *self.parts.items(),
            ("gradients", self.gradients),
            ("saved activations", self.saved),
            ("arguments (compiled)", self.arguments),
            ("outputs, not in place", self.outputs - self.aliased),
            ("temporary (compiled)", self.temporary),
            ("peak", self.peak),
        ]
        share = lambda size: f"{size / self.peak:.1%}" if self.peak else ""
        return markdown_table(("memory", "bytes", "of the peak"), [(n, f"{size:,}", share(size)) for n, size in rows])


def memory_report(
    compiled: jax.stages.Compiled, *, loss: Callable, trained: Any, others: tuple = (), parts: Mapping[str, Any]
) -> MemoryReport:
    """Reads XLA's own account of a compiled step; runs nothing.

    Args:
      compiled: the whole training step, `jax.jit(step, donate_argnums=0).lower(state, batch).compile()`.
      loss: (trained, *others) -> scalar, what the step differentiates for `trained`.
      trained, others: arrays or shapes.
      parts: trees by the names under which their bytes are listed.
    """
    memory = compiled.memory_analysis()
    return MemoryReport(
        parts={name: tree_bytes(tree) for name, tree in parts.items()},
        gradients=tree_bytes(trained),
        saved=saved_bytes(loss, trained, *others),
        arguments=int(memory.argument_size_in_bytes),
        outputs=int(memory.output_size_in_bytes),
        aliased=int(memory.alias_size_in_bytes),
        temporary=int(memory.temp_size_in_bytes),
    )


def saved_bytes(loss: Callable, trained: Any, *others: Any) -> int:
    """Bytes of what the forward pass of a loss hands to its backward pass; its arguments, which live anyway, left out.

    Args:
      loss: (trained, *others) -> scalar, differentiated for the first.
    """
    pullback = jax.eval_shape(lambda t, *rest: jax.vjp(lambda t: loss(t, *rest), t)[1], trained, *others)
    residuals = _kinds(pullback) - _kinds((trained, others))
    return sum(count * math.prod(shape) * dtype.itemsize for (shape, dtype), count in residuals.items())


def tree_bytes(tree: Any) -> int:
    """Of arrays or shapes; random keys left out."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in _arrays(tree))


def _kinds(tree) -> Counter:
    """How many leaves there are of each shape and dtype."""
    return Counter((leaf.shape, leaf.dtype) for leaf in _arrays(tree))


def _arrays(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)]
