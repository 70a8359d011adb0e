"""The values of 4-bit codes, by arithmetic that every kernel language has, and where the codes lie in bytes."""

import jax.numpy as jnp
import numpy as np
from jax import lax

from lowprec.formats.bits import from_bits
from lowprec.formats.closed_forms import select
from lowprec.formats.elements import element_of
from lowprec.formats.types import ElementFormat, IntFormat, TableFormat
from lowprec.typing import Array, Float, UInt8

ELEMENTS = {name: element_of(name) for name in ("int4", "e2m1fn", "nf4")}


def code_dtype(element: ElementFormat):
    """The dtype of codes that a kernel reads: processors know how to extend the sign of integers."""
    return jnp.int4 if isinstance(element, IntFormat) else jnp.uint4


def separated(codes: UInt8[Array, "n bytes"], element: ElementFormat) -> Array:
    """Packed codes as an array of 4-bit numbers: no bit moves."""
    pairs = lax.bitcast_convert_type(codes, code_dtype(element))
    return pairs.reshape(codes.shape[0], 2 * codes.shape[1])


def values(codes: Array, element: ElementFormat) -> Float[Array, "..."]:
    """float32 values of codes in `code_dtype`; of e2m1fn with its negative zero."""
    if isinstance(element, IntFormat):
        return codes.astype(jnp.float32)
    codes = codes.astype(jnp.uint32)
    if isinstance(element, TableFormat):
        return select(codes, np.asarray(element.values, np.float32))
    # e2m1: two bits of exponent, of bias 1, and one of fraction stand where float32 has its own; below 1 is ½ or 0.
    magnitude = codes & 7
    normal = from_bits((magnitude << 22) + np.uint32(126 << 23))
    y = jnp.where(magnitude < 2, magnitude.astype(jnp.int32).astype(jnp.float32) * 0.5, normal)
    return jnp.where(codes >= 8, -y, y)
