"""Rounding to an element format, its codes and its values: one door to the float, int and table kernels."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from lowprec.formats import floats, integers, tables
from lowprec.formats.bits import rescale
from lowprec.formats.grammar import parse
from lowprec.formats.random import Key, random_bits
from lowprec.formats.rounding import Rounding, parse_rounding
from lowprec.formats.traced import TracedFormat
from lowprec.formats.types import BlockFormat, ElementFormat, FloatFormat, Format, IntFormat, TableFormat
from lowprec.typing import Array, Float, Int, UInt, UInt32

_FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)


def element_of(fmt: str | Format) -> ElementFormat:
    """The element format of a name, of a block format, or of itself."""
    fmt = parse(fmt)
    return fmt.element if isinstance(fmt, BlockFormat) else fmt


def has_blocks(fmt: Format | TracedFormat) -> bool:
    """Whether the elements of a format share scales."""
    return isinstance(fmt, BlockFormat) or (isinstance(fmt, TracedFormat) and fmt.block is not None)


def round_to(
    x: Float[Array, "..."],
    fmt: str | Format | TracedFormat,
    *,
    rounding: str | Rounding = "nearest_even",
    key: jax.Array | None = None,
    saturate: bool = True,
) -> Float[Array, "..."]:
    """The nearest values of a format, by the rounding mode; of a block format, values of its element, unscaled.

    Differentiating it gives zero almost everywhere; `quantizers.fake_quant` passes gradients.

    Args:
      x: float32, bfloat16 or float16, any shape.
      fmt: a format or its name; a `TracedFormat` where its parameters are to be arrays.
      rounding: see `Rounding`; the stochastic modes need a key.
      key: typed or legacy uint32 key.
      saturate: overflow gives the largest value; else infinity, NaN where there is none, as casts do. Integers and
        tables always saturate.
    Returns:
      The shape and dtype of x. NaN stays NaN.
    Raises:
      ValueError: stochastic rounding without a key; a name that is not known.
      TypeError: x is not of a supported dtype.
    """
    y = _rounded(x, fmt, rounding, key, saturate)
    return y.astype(jnp.asarray(x).dtype)


def encode(
    x: Float[Array, "..."],
    fmt: str | Format,
    *,
    rounding: str | Rounding = "nearest_even",
    key: jax.Array | None = None,
    saturate: bool = True,
) -> UInt[Array, "..."]:
    """The codes of the rounded values: unsigned integers, uint8 up to 8 bits, else uint16 or uint32.

    Floats: sign, exponent, mantissa; NaN has the canonical code, or 0 where the format has none. Integers: two's
    complement. Tables: the index. Arguments as in `round_to`.
    """
    return _encode_jitted(as_float32(x), key, element_of(fmt), parse_rounding(rounding), saturate)


def decode(codes: UInt[Array, "..."], fmt: str | Format, dtype=jnp.float32) -> Float[Array, "..."]:
    """The values of codes."""
    element = element_of(fmt)
    codes = jnp.asarray(codes).astype(jnp.uint32)
    if isinstance(element, FloatFormat):
        return floats.decode_float(codes, element).astype(dtype)
    if isinstance(element, IntFormat):
        return integers.decode_int(codes, element).astype(dtype)
    return tables.decode_table(codes, element).astype(dtype)


def value_table(fmt: str | Format) -> np.ndarray:
    """All finite values, ascending, as float64; of formats up to 16 bits. Zero appears once.

    Raises:
      ValueError: if the format has more than 2^16 codes.
    """
    element = element_of(fmt)
    if isinstance(element, IntFormat):
        return integers.value_list(element)
    if not isinstance(element, FloatFormat):
        return np.asarray(element.values, np.float64)
    if element.bits > 16:
        raise ValueError(f"{element} has 2^{element.bits} codes, too many for a table")
    positive = np.array([element.magnitude(code) for code in range(element.max_code + 1)])
    return np.unique(np.concatenate([-positive, positive]) if element.signed else positive) + 0.0


def code_dtype(bits: int) -> jnp.dtype:
    return jnp.dtype(jnp.uint8 if bits <= 8 else jnp.uint16 if bits <= 16 else jnp.uint32)


def round_elements(
    x: Float[Array, "..."],
    element: ElementFormat | TracedFormat,
    rounding: Rounding,
    random: UInt32[Array, "..."] | None = None,
    saturate: bool = True,
    exponent: Int[Array, "..."] | None = None,
) -> Float[Array, "..."]:
    """float32 x rounded to the values element · 2^exponent; `random`: 32 bits an element, for the stochastic modes."""
    if isinstance(element, FloatFormat):
        return floats.round_float(x, element, rounding, random, saturate, exponent)
    if isinstance(element, IntFormat):
        return integers.round_int(x, element, rounding, random, exponent)
    if isinstance(element, TracedFormat):
        return floats.round_on_grid(x, element.grid, rounding, random, saturate, exponent)
    if exponent is None:
        return tables.round_table(x, element, rounding, random)
    return rescale(tables.round_table(rescale(x, -exponent), element, rounding, random), exponent)


def encode_rounded(y: Float[Array, "..."], element: ElementFormat) -> UInt32[Array, "..."]:
    """The codes, as uint32, of float32 values that lie on the grid."""
    if isinstance(element, FloatFormat):
        return floats.encode_float(y, element)
    if isinstance(element, IntFormat):
        return integers.encode_int(y, element)
    return tables.encode_table(y, element)


def encode_elements(
    x: Float[Array, "..."],
    element: ElementFormat,
    rounding: Rounding,
    random: UInt32[Array, "..."] | None = None,
    saturate: bool = True,
) -> UInt32[Array, "..."]:
    """The codes, as uint32, of what float32 x rounds to; arguments as in `round_elements`."""
    if isinstance(element, TableFormat):
        return tables.round_to_codes(x, element, rounding, random)
    return encode_rounded(round_elements(x, element, rounding, random, saturate), element)


def noise(rounding: Rounding, key: Key | None, shape: tuple[int, ...]) -> UInt32[Array, "..."] | None:
    """The random bits that a rounding mode needs: None for the deterministic ones.

    Raises:
      ValueError: if the mode is stochastic and there is no key.
    """
    if not rounding.stochastic:
        return None
    if key is None:
        raise ValueError(f"{rounding} rounding needs a key")
    return random_bits(key, shape)


def as_float32(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The exact float32 of a supported input."""
    check_dtype(x)
    return jnp.asarray(x).astype(jnp.float32)


def check_dtype(x: Float[Array, "..."]) -> None:
    """Refuses what would be rounded twice: jax turns numpy's float64 into float32 without a word.

    Raises:
      TypeError: for other dtypes than float32, bfloat16 and float16.
    """
    dtype = getattr(x, "dtype", None) or jnp.asarray(x).dtype
    if dtype not in _FLOATS:
        raise TypeError(f"number formats round float32, bfloat16 and float16, not {dtype}: cast it first")


def _rounded(x, fmt, rounding, key, saturate):
    x, rounding = as_float32(x), parse_rounding(rounding)
    if isinstance(fmt, TracedFormat):
        return _round_jitted(x, key, fmt.element, None, rounding, saturate)
    return _round_jitted(x, key, None, element_of(fmt), rounding, saturate)


# Outside of jit, one program instead of dozens of small ones.
@partial(jax.jit, static_argnums=(2, 3, 4))
def _encode_jitted(x, key, element, rounding, saturate):
    codes = encode_elements(x, element, rounding, noise(rounding, key, x.shape), saturate)
    return codes.astype(code_dtype(element.bits))


@partial(jax.jit, static_argnums=(3, 4, 5))
def _round_jitted(x, key, traced, element, rounding, saturate):
    return round_elements(x, traced or element, rounding, noise(rounding, key, x.shape), saturate)
