"""What the update of an element depends on, said by the type of a transformation, and a chain that keeps its parts.

`fused_step` updates a chain of such parts leaf by leaf, and large leaves in chunks of rows.
"""

from typing import Any

import optax


class Elementwise(optax.GradientTransformationExtraArgs):
    """A transformation that updates an element from itself, its block along the last axis, and scalars (a step count).

    Of its state, what has the structure of the parameters has arrays of the shapes of the parameters, or
    `StateTensor`s; all else is scalars, and the same whichever leaves it is updated with. How a leaf is stored is
    settled when the state is made: an update may see rows of a leaf alone, rows=(first, total) by name, while other
    leaves are masked. Noise is that of the element of the whole leaf.

    Attributes:
      spec: what it computes, a `specs.Spec`; None: only the function itself knows.
    """

    spec: Any = None


class Leafwise(optax.GradientTransformationExtraArgs):
    """A transformation that updates a leaf from this leaf alone, and scalars (a step count).

    Of its state, what has the structure of the parameters belongs to the leaves, in any shape; all else is scalars,
    and the same whichever leaves it is updated with.
    """


class Chain(optax.GradientTransformationExtraArgs):
    """An `optax.chain` that knows its parts; its state is the tuple of theirs."""

    parts: tuple[optax.GradientTransformation, ...]


def elementwise(tx: optax.GradientTransformation, spec: Any = None) -> Elementwise:
    """The transformation, labelled: see `Elementwise` for what this says."""
    labelled = Elementwise(*optax.with_extra_args_support(tx))
    labelled.spec = spec
    return labelled


def leafwise(tx: optax.GradientTransformation) -> Leafwise:
    """The transformation, labelled: see `Leafwise` for what this says."""
    return Leafwise(*optax.with_extra_args_support(tx))


def chain(*parts: optax.GradientTransformation) -> Chain:
    """`optax.chain` (same updates, same state), of which `fused_step` can see the parts.

    Args:
      parts: transformations, labelled or not, chains among them.
    """
    chained: Any = Chain(*optax.with_extra_args_support(optax.chain(*parts)))
    chained.parts = parts
    return chained


def parts_of(tx: optax.GradientTransformation) -> tuple[optax.GradientTransformation, ...]:
    """The parts of a chain, or the transformation as the only part of itself."""
    return tx.parts if isinstance(tx, Chain) else (tx,)
