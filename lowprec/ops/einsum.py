"""qeinsum: any einsum of two operands as one quantized product."""

import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lowprec.errors import UsageError
from lowprec.ops.dot import qdot
from lowprec.ops.rule import GemmRule
from lowprec.ops.variables import Variables
from lowprec.typing import Array, Float

Label = str | int  # a letter, or an axis of the ellipsis, of which -1 is the last


def qeinsum(
    subscripts: str,
    x: Float[Array, "..."],
    w: Float[Array, "..."],
    rule: GemmRule,
    *,
    key: jax.Array | None = None,
    taps: Float[Array, "operands sums"] | None = None,
    variables: Variables = None,
    backend: str = "auto",
) -> Float[Array, "..."]:
    """`jnp.einsum(subscripts, x, w)`, quantized by the rule as `qdot` does, forward and backward.

    Labels of both operands that the output lacks are contracted: together they are K, in the order of x, and blocks,
    scales and rotations run along them. Labels of both operands and the output are batch axes: each index has a
    product of its own. The other labels of x are the rows M and those of w the columns N, in their own order.

    Args:
      subscripts: e.g. "btd,dnh->btnh". Without "->" the output has the labels that occur once, in the order of the
        alphabet; "..." stands for any number of axes. Labels of one operand alone that the output lacks are summed
        before the product, unquantized. As in `jnp.einsum`, an axis of length 1 fits any length.
      x: the activations.
      w: the weights.
      rule, key, taps, variables, backend: see `qdot`.
    Returns:
      As `jnp.einsum`, in the common dtype of x and w; an exact rule gives `lax.dot_general` itself.
    Raises:
      UsageError: (a ValueError) for subscripts that do not parse, do not fit the shapes, or take a diagonal.
    """
    labels = parse_subscripts(subscripts, x.ndim, w.ndim)
    _check_sizes(subscripts, labels, x.shape, w.shape)
    x_shape, w_shape = x.shape, w.shape
    x, x_labels = _essential(x, labels.x, dict(zip(labels.w, w_shape, strict=True)), labels.y)
    w, w_labels = _essential(w, labels.w, dict(zip(labels.x, x_shape, strict=True)), labels.y)
    shared = [label for label in x_labels if label in w_labels]
    batch = [label for label in shared if label in labels.y]
    contracted = [label for label in shared if label not in labels.y]
    dimension_numbers = (
        (_axes(x_labels, contracted), _axes(w_labels, contracted)),
        (_axes(x_labels, batch), _axes(w_labels, batch)),
    )
    y = qdot(x, w, rule, key=key, dimension_numbers=dimension_numbers, taps=taps, variables=variables, backend=backend)
    y_labels = batch + [label for label in (*x_labels, *w_labels) if label not in shared]
    order = _axes(y_labels, labels.y)
    return y if order == tuple(range(y.ndim)) else y.transpose(order)


def bias_shape(subscripts: str, x_ndim: int, w_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a bias that adds to an einsum's output: the lengths of the axes of w, 1 for all others."""
    labels = parse_subscripts(subscripts, x_ndim, len(w_shape))
    sizes = dict(zip(labels.w, w_shape, strict=True))
    return tuple(sizes.get(label, 1) for label in labels.y)


@dataclass(frozen=True)
class Labels:
    """What the axes of an einsum's operands and of its output are called."""

    x: tuple[Label, ...]
    w: tuple[Label, ...]
    y: tuple[Label, ...]


def parse_subscripts(subscripts: str, x_ndim: int, w_ndim: int) -> Labels:
    """The label of every axis, those of an ellipsis included.

    Raises:
      UsageError: (a ValueError) for other than two operands, characters that are no labels, a label twice in one
        place, a label of the output that no operand has, or a number of labels that is not the number of axes.
    """
    inputs, arrow, output = subscripts.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != 2:
        raise UsageError(f"einsum {subscripts!r} has {len(terms)} operand{'s'[: len(terms) > 1]}; qeinsum takes two")
    for term in (*terms, output):
        if not re.fullmatch(r"[A-Za-z]*(\.\.\.)?[A-Za-z]*", term):
            raise UsageError(f"einsum {subscripts!r}: labels are letters and one '...', which {term!r} is not")
    x, w = (
        _operand_labels(subscripts, name, term, ndim)
        for name, term, ndim in (("x", terms[0], x_ndim), ("w", terms[1], w_ndim))
    )
    ellipsis = sorted({label for label in x + w if isinstance(label, int)})
    if arrow:
        head, dots, tail = output.partition("...")
        y = (*head, *(ellipsis if dots else ()), *tail)
    else:
        y = (*ellipsis, *sorted(label for label in inputs if label.isalpha() and inputs.count(label) == 1))
    _refuse_repeated(subscripts, "the output", y)
    for label in y:
        if label not in x + w:
            raise UsageError(f"einsum {subscripts!r}: no operand has the label {label!r} of the output")
    return Labels(x, w, y)


def _operand_labels(subscripts, name, term, ndim):
    head, dots, tail = term.partition("...")
    rest = ndim - len(head) - len(tail)
    if rest < 0 or (rest and not dots):
        raise UsageError(f"einsum {subscripts!r}: {name} has {ndim} axes, which {term!r} does not fit")
    labels = (*head, *range(-rest, 0), *tail)
    _refuse_repeated(subscripts, name, labels)
    return labels


def _refuse_repeated(subscripts, where, labels):
    for label in labels:
        if labels.count(label) > 1:
            raise UsageError(
                f"einsum {subscripts!r}: {where} has the label {label!r} twice; take the diagonal before, "
                "e.g. with jnp.diagonal"
            )


def _check_sizes(subscripts, labels, x_shape, w_shape):
    w_sizes = dict(zip(labels.w, w_shape, strict=True))
    for label, size in zip(labels.x, x_shape, strict=True):
        other = w_sizes.get(label, size)
        if size != other and 1 not in (size, other):
            name = "an axis of '...'" if isinstance(label, int) else f"label {label!r}"
            raise UsageError(
                f"einsum {subscripts!r}: {name} is {size} in x{list(x_shape)} and {other} in w{list(w_shape)}"
            )


def _essential(operand, labels, other, output):
    """The operand without the axes that the product does not need: of length 1 against another length, or summed."""
    broadcast = tuple(i for i, label in enumerate(labels) if operand.shape[i] == 1 != other.get(label, 1))
    summed = tuple(
        i for i, label in enumerate(labels) if label not in output and _alone(operand.shape[i], label, other)
    )
    if broadcast or summed:
        operand = jnp.sum(operand, axis=broadcast + summed)
    return operand, tuple(label for i, label in enumerate(labels) if i not in broadcast + summed)


def _alone(size, label, other):
    """Whether the other operand does not vary along a label."""
    return label not in other or other[label] == 1 != size


def _axes(labels, names):
    return tuple(labels.index(name) for name in names)
