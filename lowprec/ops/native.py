"""XLA's own products of low precision: of int8, of fp8, of scaled blocks, and of 16 bits where that is exact."""

import jax
import jax.numpy as jnp
from jax import lax

from lowprec.formats import element_of
from lowprec.formats.elements import encode_rounded
from lowprec.formats.scaling import ordinary
from lowprec.formats.types import E4M3FN
from lowprec.ops.codes import (
    codes,
    dimension_numbers,
    k_major,
    native_dtype,
    scaled_output,
    scales_by_blocks,
    scales_vary,
    significand_bits,
    why_no_blocks,
    why_no_codes,
    why_scales_stay,
)
from lowprec.ops.multiplier import Multiplier
from lowprec.ops.operand import Operand
from lowprec.pallas.target import target
from lowprec.typing import Array, Float

_INT8, _FLOAT16, _BFLOAT16 = (jnp.dtype(dtype) for dtype in (jnp.int8, jnp.float16, jnp.bfloat16))
_E4M3, _E5M2 = jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2)
_BFLOAT16_BITS = 8  # of its significand


def why_not_codes(a: Operand, b: Operand, dtypes: tuple[jnp.dtype, ...]) -> str | None:
    """The reason why the elements of two operands, of these dtypes, are no factors of their product, or None."""
    for operand in (a, b):
        reason = why_scales_stay(operand)
        if reason:
            return reason
        if native_dtype(operand.rounded.fmt) not in dtypes:
            return f"the elements of {operand.name} ({operand.rounded.fmt}) are none of {', '.join(map(str, dtypes))}"
    return None


def _why_not_int8(a, b):
    return why_not_codes(a, b, INT8.dtypes)


def _multiply_int8(a, b):
    return scaled_output(_dot(a, b, _INT8, _INT8, jnp.int32).astype(jnp.float32), a, b)


def _why_not_fp8(a, b):
    reason = why_not_codes(a, b, FP8.dtypes)
    if reason is None and all(native_dtype(operand.rounded.fmt) == _E5M2 for operand in (a, b)):
        return f"of {a.name} and {b.name} one has to be e4m3fn"
    return reason


def _multiply_fp8(a, b):
    # At the default precision XLA's fp8 products on GPUs have the sums of the tensor cores, of some 14 bits.
    a_dtype, b_dtype = native_dtype(a.rounded.fmt), native_dtype(b.rounded.fmt)
    return scaled_output(_dot(a, b, a_dtype, b_dtype, jnp.float32, lax.Precision.HIGHEST), a, b)


def _why_not_float16(a, b):
    return why_not_codes(a, b, FLOAT16.dtypes)


def _multiply_float16(a, b):
    return scaled_output(_dot_in_16_bits(codes(a).astype(_FLOAT16), codes(b).astype(_FLOAT16), a, b), a, b)


def _dot(a, b, a_dtype, b_dtype, total, precision=None):
    a_codes, b_codes = codes(a).astype(a_dtype), codes(b).astype(b_dtype)
    if target().platform == "cpu":
        return lax.dot_general(a_codes, b_codes, dimension_numbers(a, b), precision, total)
    # Tensor cores take codes of eight bits with the contraction axis last alone; so the operands are written that way
    # where they are rounded, rather than transposed before the product.
    last, batch = a_codes.ndim - 1, tuple(range(a_codes.ndim - 2))
    numbers = (((last,), (last,)), (batch, batch))
    return lax.dot_general(k_major(a, a_codes), k_major(b, b_codes), numbers, precision, total)


def _why_not_bfloat16(a, b):
    return next((reason for reason in map(_why_no_bfloat16, (a, b)) if reason), None)


def _why_no_bfloat16(operand):
    """The reason why no bfloat16 has all values of an operand, up to what is a factor of the product, or None."""
    rounded = operand.rounded
    if rounded is None and operand.source.dtype == _BFLOAT16:
        return None
    reason = why_no_codes(operand)
    if reason:
        return reason
    bits = significand_bits(rounded.fmt)
    if bits is None:
        return f"no bfloat16 has all elements of {operand.name} ({rounded.fmt})"
    if not scales_vary(operand):
        return None
    spec = rounded.fmt.scale
    bits += 0 if spec.power_of_two else spec.format.mantissa_bits + 1
    if bits > _BFLOAT16_BITS or not ordinary(rounded.fmt.element):
        return (
            f"the scales of {operand.name} ({rounded.fmt}) vary along the contraction axis, and no bfloat16 has all "
            "elements times scales"
        )
    return None


def _multiply_bfloat16(a, b):
    return scaled_output(_dot_in_16_bits(_unscaled_bfloat16(a), _unscaled_bfloat16(b), a, b), a, b)


def _dot_in_16_bits(a_values, b_values, a, b):
    # XLA's CPU backend refuses some shapes of 16 bits with sums of 32.
    wide = jnp.float32 if target().platform == "cpu" else a_values.dtype
    a_values, b_values = a_values.astype(wide), b_values.astype(wide)
    return lax.dot_general(
        a_values, b_values, dimension_numbers(a, b), lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def _unscaled_bfloat16(operand) -> Float[Array, "..."]:
    """Elements times the block scales that vary along the contraction axis."""
    rounded = operand.rounded
    if rounded is None:
        return operand.source
    elements = rounded.elements
    if scales_vary(operand):
        elements = rounded.scale._replace(tensor=None).scaler(rounded.fmt.element).multiply(elements)
    return rounded.layout.merge(elements).astype(_BFLOAT16)


def _why_not_scaled(a, b):
    capability = target().capability or ""
    if not capability.startswith("10."):
        return f"{target().kind} has no products of scaled blocks"
    for operand in (a, b):
        reason = why_no_blocks(operand)
        if reason:
            return reason
        if _hardware_blocks(operand.rounded.fmt) is None:
            return f"{operand.name} ({operand.rounded.fmt}) is neither MXFP8 nor NVFP4"
    kinds = [_hardware_blocks(operand.rounded.fmt) for operand in (a, b)]
    if kinds[0] != kinds[1]:
        return f"{a.name} is {kinds[0]} and {b.name} is {kinds[1]}"
    if all(element_of(operand.rounded.fmt).dtype == _E5M2 for operand in (a, b)):
        return f"of {a.name} and {b.name} one has to be e4m3fn"
    return None


def _hardware_blocks(fmt):
    """ "MXFP8" or "NVFP4", the blocks that Blackwell's tensor cores scale; else None."""
    inner, spec, dtype = fmt.block[1], fmt.scale, element_of(fmt).dtype
    if inner == 32 and spec.power_of_two and dtype in (_E4M3, _E5M2):
        return "MXFP8"
    return "NVFP4" if inner == 16 and spec.format == E4M3FN and dtype == jnp.float4_e2m1fn else None


def _multiply_scaled(a, b):
    operands = [part for operand in (a, b) for part in _as_hardware_has_them(operand)]
    if a.source.ndim == 2:
        operands = [part[None] for part in operands]
    a_codes, a_scales, b_codes, b_scales = operands
    y = jax.nn.scaled_matmul(a_codes, b_codes, a_scales, b_scales, preferred_element_type=jnp.float32)
    return scaled_output(y[0] if a.source.ndim == 2 else y, a, b)


def _as_hardware_has_them(operand):
    fmt = operand.rounded.fmt
    elements = k_major(operand, codes(operand))
    short = -elements.shape[-1] % fmt.block[1]
    elements = jnp.pad(elements, [*[(0, 0)] * (elements.ndim - 1), (0, short)])
    # By their codes: a cast to powers of two would flush the smallest ones.
    scales = encode_rounded(scales_by_blocks(operand), fmt.scale.format).astype(jnp.uint8)
    return elements.astype(element_of(fmt).dtype), lax.bitcast_convert_type(scales, fmt.scale.format.dtype)


INT8 = Multiplier("XLA's int8 product", _multiply_int8, _why_not_int8, (_INT8,))
FP8 = Multiplier("XLA's fp8 product", _multiply_fp8, _why_not_fp8, (_E4M3, _E5M2))
SCALED = Multiplier("XLA's scaled_matmul", _multiply_scaled, _why_not_scaled, (_E4M3, _E5M2))
FLOAT16 = Multiplier("XLA's float16 product", _multiply_float16, _why_not_float16, (_FLOAT16,))
BFLOAT16 = Multiplier("XLA's bfloat16 product", _multiply_bfloat16, _why_not_bfloat16, (_INT8, _E4M3, _E5M2, _BFLOAT16))
