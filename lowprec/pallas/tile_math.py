"""What a kernel does with a tile of values: statistics of its rows, their scales, codes.

The same results, bit for bit, as `quantizers.round_blocks` followed by `encode_rounded`; only cheaper, because a code
is taken from the integers of the rounding itself. Every function works on plain arrays too.

Integer and float instructions an element, about, without the loads, the stores and what is done once a block: the
largest magnitude 3, the product with the reciprocal 1 (powers of two: 10); codes to nearest 5 of eight-bit floats, 11
of e2m1fn, 10 of integers; stochastic codes 22, and 14 for the random bits, or 5 where four elements share a hash.
"""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from jax import lax

from lowprec.formats.bits import (
    EXPONENT,
    MAGNITUDE,
    SIGN,
    at_least,
    clip_keeping_nan,
    from_bits,
    greater,
    lesser,
    pattern,
    to_bits,
)
from lowprec.formats.floats import round_magnitude
from lowprec.formats.random import bits_at
from lowprec.formats.rounding import Rounding
from lowprec.formats.scaling import Scale, ordinary, scale_from_amax, store_scale
from lowprec.formats.types import E4M3FN, FLOAT32, BlockFormat, ElementFormat, IntFormat, ScaleSpec
from lowprec.quantizers.scales import AbsMax
from lowprec.typing import Array, Float, UInt, UInt32

SHARED = 32  # with shared noise, columns this far apart within 128 have their random bits from one hash


def row_amax(x: Float[Array, "m n"], fmt: BlockFormat, rule: AbsMax) -> Float[Array, " m"]:
    """The largest magnitude of each row, as `block_amax` has it for `rule`: infinity or NaN where there is one."""
    element = fmt.element if rule.headroom == 1 else None
    magnitude = to_bits(x) & MAGNITUDE
    if not fmt.scale.power_of_two or (ordinary(element) and element.max >= 2):
        return jnp.max(from_bits(lesser(magnitude, EXPONENT)), axis=1)
    return from_bits(jnp.max(magnitude.astype(jnp.int32), axis=1).astype(jnp.uint32))


def absmax_scale(
    amax: Float[Array, "..."], fmt: BlockFormat, rule: AbsMax, tensor: Float[Array, ""] | None = None
) -> Scale:
    """The scale that `rule` gives blocks of these largest magnitudes.

    Args:
      tensor: of two-level formats: the second level, which the rule would take from the amax of all blocks.
    """
    if rule.floor:
        amax = at_least(amax, np.float32(rule.floor))
    if rule.offset:
        amax = amax + np.float32(rule.offset)
    if tensor is None:
        return scale_from_amax(amax, fmt.element, fmt.scale, rule.headroom, rule.limit)
    wanted = scale_from_amax(amax, fmt.element, ScaleSpec(), rule.headroom).block
    return store_scale(jnp.where(to_bits(amax) == 0, np.float32(0), wanted), fmt.scale, rule.limit, tensor)


def divide_rows(x: Float[Array, "m n"], scale: Scale, element: ElementFormat) -> Float[Array, "m n"]:
    """Each row divided by its scale, as `round_blocks` does it."""
    scaler = scale.scaler(element)
    down = tuple(lax.broadcast_in_dim(factor, x.shape, (0,)) for factor in scaler.down)
    return replace(scaler, down=down).divide(x)


def scale_codes(scale: Scale, spec: ScaleSpec) -> Float[Array, "..."] | UInt32[Array, "..."]:
    """What is stored of block scales: the float32 numbers, or the codes of e8m0 and e4m3 as uint32."""
    if spec.format == FLOAT32:
        return scale.block
    broken = jnp.isnan(scale.block)
    if spec.power_of_two:
        return jnp.where(broken, np.uint32(255), (scale.exponent + 127).astype(jnp.uint32))
    if spec.format != E4M3FN:
        raise NotImplementedError(f"no codes of {spec.format} scales")
    # Block scales are normal numbers: the bits of float32 with another bias.
    return jnp.where(broken, np.uint32(E4M3FN.nan_code), (to_bits(scale.block) >> 20) - np.uint32((127 - 7) << 3))


def element_codes(
    x: Float[Array, "..."], element: ElementFormat, rounding: Rounding, random: UInt32[Array, "..."] | None = None
) -> UInt[Array, "..."]:
    """The codes of what x rounds to, saturated: `encode_rounded(round_elements(x, …), element)`, as uint32 or uint8.

    Args:
      element: a signed float format with subnormals, or an integer format of 8 bits or less.
      random: 32 bits an element for stochastic rounding.
    """
    if isinstance(element, IntFormat):
        return _int_codes(x, element, rounding, random)
    if rounding.kind == "nearest_even" and element.bits == 8 and element.dtype is not None:
        return _native_codes(x, element)
    u = to_bits(x)
    a = u & MAGNITUDE
    magnitude = _nearest_codes if rounding.kind == "nearest_even" else _rounded_codes
    code = magnitude(lesser(a, pattern(element.max)), element, rounding, random)
    code = code | ((u & SIGN) >> (32 - element.bits))
    return jnp.where(a > EXPONENT, np.uint32(element.nan_code or 0), code)


def _native_codes(x, element):
    # The conversion is one instruction for two elements; XLA's own does not saturate. (The NaN of Hopper's in e5m2 is
    # 127, not 126.)
    bounded = jnp.where(jnp.isnan(x), jnp.float32(jnp.nan), jnp.clip(x, -element.max, element.max))
    return lax.bitcast_convert_type(bounded.astype(element.dtype), jnp.uint8)


def _nearest_codes(a, element, rounding, random):
    # (a + C) - C rounds to the quantum of C = 2^(e + 23 - M): the low bits of a + C are that many quanta.
    shift = 23 - element.mantissa_bits
    binade = greater(a & EXPONENT, pattern(element.min_normal))
    magic = binade + np.uint32(shift << 23)
    quanta = to_bits(from_bits(a) + from_bits(magic)) - magic
    return quanta + ((binade - pattern(element.min_normal)) >> shift)


def _rounded_codes(a, element, rounding, random):
    cell = round_magnitude(
        a,
        mantissa_bits=element.mantissa_bits,
        min_exponent=element.min_exponent,
        subnormals=True,
        rounding=rounding,
        negative=None,
        random=random,
    )
    return cell.k + (cell.binade << element.mantissa_bits).astype(jnp.uint32)


def _int_codes(x, element, rounding, random):
    mask = np.uint32((1 << element.bits) - 1)
    if rounding.kind == "nearest_even":
        y = clip_keeping_nan(jnp.round(x * (1 / element.step)), element.min / element.step, element.max / element.step)
        return jnp.where(jnp.isnan(y), np.float32(0), y).astype(jnp.int32).astype(jnp.uint32) & mask
    u = to_bits(x)
    a = u & MAGNITUDE
    cell = round_magnitude(
        lesser(a, jnp.where(u >= SIGN, pattern(-element.min), pattern(element.max))),
        mantissa_bits=23,
        min_exponent=23 - element.fraction_bits,
        subnormals=True,
        rounding=rounding,
        negative=None,
        random=random,
    )
    code = jnp.where(u >= SIGN, np.uint32(0) - cell.k, cell.k) & mask
    return jnp.where(a > EXPONENT, np.uint32(0), code)


def shared_bits(words: UInt32[Array, " 2"], first: UInt32[Array, "m 32"]) -> UInt32[Array, "m 128"]:
    """Random bits for 128 columns from one hash for every four: 8 bits each, and half a last bit.

    Args:
      first: the flat indices of the first 32 columns; columns c, c + 32, c + 64 and c + 96 share a hash.
    """
    word = bits_at(words, first)
    parts = [((word << (8 * i)) & np.uint32(0xFF000000)) | np.uint32(0x00800000) for i in range(128 // SHARED)]
    return jnp.concatenate(parts, axis=1)
