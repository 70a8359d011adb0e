"""The two matrices of a product of 8 bits: what they may be, and that they are."""

import jax.numpy as jnp

from lowprec.errors import UsageError
from lowprec.typing import Array

FLOATS8 = ("float8_e4m3fn", "float8_e5m2")
ELEMENTS = (*FLOATS8, "int8")


def check_operands(operation: str, a: Array, b: Array) -> None:
    """Refuses what is no product (m, k) · (n, k)ᵀ of float8 or of int8.

    Raises:
      UsageError: (a ValueError) that names the operand.
    """
    for name, x in (("a", a), ("b", b)):
        if x.ndim != 2:
            raise UsageError(f"{operation} multiplies matrices (rows, k); {name} has shape {x.shape}")
        if str(x.dtype) not in ELEMENTS:
            raise UsageError(f"{operation} multiplies {', '.join(ELEMENTS)}; {name} is {x.dtype}")
    if (a.dtype == jnp.int8) != (b.dtype == jnp.int8):
        raise UsageError(f"{operation} multiplies float8 by float8 and int8 by int8, not {a.dtype} by {b.dtype}")
    if a.shape[1] != b.shape[1]:
        raise UsageError(
            f"{operation} contracts the last axes of a {a.shape} and b {b.shape}, which differ: {a.shape[1]} and "
            f"{b.shape[1]}; transpose b if it is (k, n)"
        )


def check_float32(operation: str, name: str, x: Array, shapes: tuple[tuple[int, ...], ...]) -> None:
    """Refuses what is not float32 of one of some shapes.

    Raises:
      UsageError: (a ValueError) that names the argument.
    """
    if x.shape not in shapes:
        raise UsageError(f"{operation} takes {name} of shape {' or '.join(map(str, shapes))}, not {x.shape}")
    if x.dtype != jnp.float32:
        raise UsageError(f"{operation} takes {name} in float32, not {x.dtype}")


def check_out_dtype(operation: str, dtype, choices: tuple[str, ...]) -> None:
    """Refuses other dtypes of the result.

    Raises:
      UsageError: (a ValueError) that names them.
    """
    if str(jnp.dtype(dtype)) not in choices:
        raise UsageError(f"{operation} writes {', '.join(choices)}, not {jnp.dtype(dtype)}")
