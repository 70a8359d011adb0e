"""Which leaves of an optimizer's state are moments of a parameter, and in which format each is stored."""

import math
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowprec.errors import UsageError
from lowprec.optim.paths import path_name
from lowprec.optim.state_formats import StateFormat, state_format
from lowprec.optim.state_tensor import is_stored

# Fields of states, optax's and ours, by what they hold: averages of gradients, and what is never negative: averages or
# maxima of squares and magnitudes.
SIGNED = frozenset({"mu", "m", "m1", "m2", "trace", "momentum", "exp_avg"})
UNSIGNED = frozenset({"nu", "v", "nu_max", "sum_of_squares", "exp_avg_sq", "e_g", "e_x"})


class MomentLeaf(NamedTuple):
    """A leaf of a state that has the shape of a parameter.

    Attributes:
      field: of the state, e.g. "mu".
      path: of the parameter, its entries joined by slashes.
      role: the field, or, of a field that has been seen before, its whole path in the state. Noise is drawn by it.
      rows: the parameter's length along axis 0; 1 for scalars.
      size: how many elements the parameter has.
    """

    field: str
    path: str
    role: str
    rows: int
    size: int


# A format, formats by regular expressions of the paths of parameters, or none.
Choice = str | StateFormat | Mapping[str, str | StateFormat | None] | None


@dataclass(frozen=True)
class Rules:
    """The formats of the moments of a state.

    Args:
      mu: of fields in `SIGNED`; None: stored as they are. Of a mapping, the first pattern holds that matches the whole
        path of the parameter; what none does is stored as it is.
      nu: of fields in `UNSIGNED`.
      default: of other fields.
      min_size: moments of smaller parameters are stored as they are.
      skip: regular expression; so are those of parameters whose whole path matches. None: only small ones are.
    Raises:
      UsageError: (a ValueError) for a format that is unknown, or has no values of the sign; for a pattern that is none.
    """

    mu: Choice
    nu: Choice
    default: Choice
    min_size: int
    skip: str | None

    def __post_init__(self):
        patterns = [pattern for of_fields in self._formats() for pattern in of_fields]
        for pattern in (*patterns, *([] if self.skip is None else [self.skip])):
            try:
                re.compile(pattern)
            except re.error as error:
                raise UsageError(
                    f"the pattern of parameters {pattern!r} is not a regular expression: {error}"
                ) from None

    @property
    def by_rows(self) -> bool:
        """Whether rows of a parameter can be stored one by one."""
        formats = [fmt for of_fields in self._formats() for fmt in of_fields.values()]
        return all(fmt is None or fmt.scales.by_rows for fmt in formats)

    def format_of(self, leaf: MomentLeaf, size: int) -> StateFormat | None:
        """Of a moment whose parameter has `size` elements; None: it is stored as it is."""
        if size < self.min_size or (self.skip is not None and re.fullmatch(self.skip, leaf.path)):
            return None
        mu, nu, default = self._formats()
        of_field = nu if leaf.field in UNSIGNED else mu if leaf.field in SIGNED else default
        return next((fmt for pattern, fmt in of_field.items() if re.fullmatch(pattern, leaf.path)), None)

    def _formats(self) -> list[dict[str, StateFormat | None]]:
        """Of each kind of field, by pattern."""
        return [
            {
                pattern: None if fmt is None else state_format(fmt, signed=signed)
                for pattern, fmt in (choice if isinstance(choice, Mapping) else {".*": choice}).items()
            }
            for choice, signed in ((self.mu, True), (self.nu, False), (self.default, True))
        ]


def moment_leaves(state: Sequence[tuple[Any, Any]], params: Any) -> list[MomentLeaf | None]:
    """For each leaf of a state what it is a moment of; None where it is none.

    It is one if the path of a parameter ends its own, both have the same shape, and it holds real numbers. Masked
    parameters have no leaves, so that this holds inside of `optax.masked` and `optax.partition` too.

    Args:
      state: its leaves with their paths, as jax.tree_util.tree_leaves_with_path gives them.
      params: a tree of the structure and the shapes of the parameters.
    """
    shapes = {path: tuple(jnp.shape(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    seen: set[tuple[str, str]] = set()
    found: list[MomentLeaf | None] = []
    for path, leaf in state:
        own = parameter_of(path, shapes)
        if own is None or shapes[own] != tuple(leaf.shape) or not is_real(leaf):
            found.append(None)
            continue
        before, name, shape = path[: len(path) - len(own)], path_name(own), shapes[own]
        field = field_name(before)
        role = jax.tree_util.keystr(before) if (field, name) in seen else field
        seen.add((field, name))
        found.append(MomentLeaf(field, name, role, shape[0] if shape else 1, math.prod(shape)))
    return found


def parameter_of(path: tuple[Any, ...], parameters: Container[tuple[Any, ...]]) -> tuple[Any, ...] | None:
    """The path of the parameter with which a path in a state ends, the longest such; None if there is none."""
    return next((path[start:] for start in range(len(path) + 1) if path[start:] in parameters), None)


def field_name(path: Sequence[Any]) -> str:
    """The last name on a path in a state, indices left aside; "" if there is none."""
    names = (getattr(entry, "name", getattr(entry, "key", None)) for entry in reversed(path))
    return next((name for name in names if isinstance(name, str)), "")


def is_real(leaf: Any) -> bool:
    """Whether a leaf holds floats (a `StateTensor` does), not integers, keys or complex numbers."""
    return is_stored(leaf) or jnp.issubdtype(leaf.dtype, jnp.floating)


def described(fmt: StateFormat | str | None) -> str:
    """A format in a message; None: an array."""
    return "as an array" if fmt is None else f"as {fmt}"
