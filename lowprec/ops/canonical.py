"""Any dot_general as matrices: x (batch, M, K), w (batch, K, N), y (batch, M, N); without batch axes, two axes each."""

import math
from dataclasses import dataclass

from lowprec.errors import UsageError
from lowprec.typing import Array

DimensionNumbers = tuple[tuple, tuple]


@dataclass(frozen=True)
class CanonicalForm:
    """How operands become matrices and the product its own shape again. Plain reshapes where the axes are in order."""

    permute_x: tuple[int, ...]
    permute_w: tuple[int, ...]
    shape_x: tuple[int, ...]
    shape_w: tuple[int, ...]
    shape_y: tuple[int, ...]

    def collapse_x(self, x: Array) -> Array:
        return _permuted(x, self.permute_x).reshape(self.shape_x)

    def collapse_w(self, w: Array) -> Array:
        return _permuted(w, self.permute_w).reshape(self.shape_w)

    def expand_y(self, y: Array) -> Array:
        return y.reshape(self.shape_y)


def default_dimension_numbers(x: Array) -> DimensionNumbers:
    """Of x (…, K) and w (K, …)."""
    return (((x.ndim - 1,), (0,)), ((), ()))


def canonical_form(x_shape: tuple[int, ...], w_shape: tuple[int, ...], dimension_numbers) -> CanonicalForm:
    """The form of a product with the dimension numbers of `lax.dot_general`.

    Raises:
      UsageError: (a ValueError) if axes that are contracted or batched together differ in length.
    """
    (x_contract, w_contract), (x_batch, w_batch) = dimension_numbers
    x_contract, w_contract, x_batch, w_batch = map(tuple, (x_contract, w_contract, x_batch, w_batch))
    x_free = tuple(i for i in range(len(x_shape)) if i not in x_contract + x_batch)
    w_free = tuple(i for i in range(len(w_shape)) if i not in w_contract + w_batch)
    sizes = lambda shape, axes: tuple(shape[i] for i in axes)
    for what, x_axes, w_axes in (("contraction", x_contract, w_contract), ("batch", x_batch, w_batch)):
        if sizes(x_shape, x_axes) != sizes(w_shape, w_axes):
            raise UsageError(f"the {what} axes of x{list(x_shape)} and w{list(w_shape)} differ: {x_axes} and {w_axes}")
    count = lambda shape, axes: math.prod(sizes(shape, axes))
    batch = (count(x_shape, x_batch),) if x_batch else ()
    m, k, n = count(x_shape, x_free), count(x_shape, x_contract), count(w_shape, w_free)
    return CanonicalForm(
        permute_x=x_batch + x_free + x_contract,
        permute_w=w_batch + w_contract + w_free,
        shape_x=(*batch, m, k),
        shape_w=(*batch, k, n),
        shape_y=sizes(x_shape, x_batch) + sizes(x_shape, x_free) + sizes(w_shape, w_free),
    )


def _permuted(x, axes):
    return x if axes == tuple(range(x.ndim)) else x.transpose(axes)
