"""Bridges between codes and jax's own narrow dtypes, bit for bit: no value passes through a cast."""

from functools import cache

import jax.numpy as jnp
from jax import lax

from lowprec.errors import UsageError
from lowprec.formats import catalog
from lowprec.formats.elements import code_dtype, element_of
from lowprec.formats.types import ElementFormat, Format
from lowprec.typing import Array, UInt


def to_native(codes: UInt[Array, "..."], fmt: str | Format) -> Array:
    """Codes as an array of the format's native dtype, e.g. float8_e4m3fn, float4_e2m1fn, int4.

    Raises:
      UsageError: (a ValueError) if jax has no dtype for the format.
    """
    element = element_of(fmt)
    if element.dtype is None:
        raise UsageError(f"jax has no dtype for {element}; it has one for {', '.join(sorted(_formats().values()))}")
    return lax.bitcast_convert_type(jnp.asarray(codes).astype(_unsigned(element.bits)), element.dtype)


def from_native(array: Array) -> UInt[Array, "..."]:
    """The codes of an array of a narrow dtype, as uint8 (up to 8 bits), uint16 or uint32.

    Raises:
      UsageError: (a ValueError) if its dtype is not that of a format.
    """
    bits = element_of(format_of(array.dtype)).bits
    return lax.bitcast_convert_type(array, _unsigned(bits)).astype(code_dtype(bits))


def format_of(dtype: jnp.dtype) -> ElementFormat:
    """The format with the values and codes of a dtype.

    Raises:
      UsageError: (a ValueError) if there is none.
    """
    name = _formats().get(str(jnp.dtype(dtype)))
    if name is None:
        raise UsageError(f"no format has the dtype {jnp.dtype(dtype)}; there are {', '.join(sorted(_formats()))}")
    return catalog.ELEMENTS[name]


@cache
def _formats():
    return {str(fmt.dtype): name for name, fmt in reversed(catalog.ELEMENTS.items()) if fmt.dtype is not None}


def _unsigned(bits):
    return getattr(jnp, f"uint{bits}")
