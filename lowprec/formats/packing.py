"""Codes as a dense stream of bits: little-endian, the first code in the lowest bits.

4-bit codes put the even element in the low nibble; four 6-bit codes fill three bytes; bit k of a byte is code k of
a 1-bit format. The order is that of `lax.bitcast_convert_type` on native int4, int2 and float4 arrays.
"""

import math

import jax.numpy as jnp

from lowprec.typing import Array, UInt, UInt8


def packed_size(count: int, bits: int) -> int:
    """Bytes that hold `count` codes."""
    return -(-count * bits // 8)


def pack(codes: UInt[Array, "... n"], bits: int) -> UInt8[Array, "... bytes"]:
    """Packs codes below 2^bits along the last axis; the last byte is filled with zeros.

    Args:
      bits: 1 to 16.
    """
    _check(bits)
    size, (group, width) = codes.shape[-1], _group(bits)
    padding = [(0, 0)] * (codes.ndim - 1) + [(0, -size % group)]
    groups = jnp.pad(codes, padding).reshape(*codes.shape[:-1], -(-size // group), group).astype(jnp.uint32)
    columns = []
    for byte in range(width):
        column = jnp.zeros(groups.shape[:-1], jnp.uint32)
        for index in range(group):
            offset = index * bits - byte * 8
            if -bits < offset < 8:
                code = groups[..., index]
                column = column | (code << offset if offset >= 0 else code >> -offset)
        columns.append((column & 0xFF).astype(jnp.uint8))
    stream = jnp.stack(columns, axis=-1).reshape(*codes.shape[:-1], groups.shape[-2] * width)
    return stream[..., : packed_size(size, bits)]


def unpack(packed: UInt8[Array, "... bytes"], bits: int, size: int) -> UInt[Array, "... n"]:
    """The first `size` codes of a packed stream, as uint8 (up to 8 bits) or uint16.

    Raises:
      ValueError: if the stream does not have the length of `size` codes.
    """
    _check(bits)
    if packed.shape[-1] != packed_size(size, bits):
        raise ValueError(f"{size} codes of {bits} bits fill {packed_size(size, bits)} bytes, not {packed.shape[-1]}")
    group, width = _group(bits)
    count = -(-size // group)
    padding = [(0, 0)] * (packed.ndim - 1) + [(0, count * width - packed.shape[-1])]
    groups = jnp.pad(packed, padding).reshape(*packed.shape[:-1], count, width).astype(jnp.uint32)
    codes = []
    for index in range(group):
        code = jnp.zeros(groups.shape[:-1], jnp.uint32)
        for byte in range(width):
            offset = index * bits - byte * 8
            if -bits < offset < 8:
                value = groups[..., byte]
                code = code | (value >> offset if offset >= 0 else value << -offset)
        codes.append(code & ((1 << bits) - 1))
    dtype = jnp.uint8 if bits <= 8 else jnp.uint16
    return jnp.stack(codes, axis=-1).reshape(*packed.shape[:-1], count * group)[..., :size].astype(dtype)


def _group(bits):
    """The smallest run of codes that ends on a byte: (codes, bytes)."""
    common = math.gcd(8, bits)
    return 8 // common, bits // common


def _check(bits):
    if not 1 <= bits <= 16:
        raise ValueError(f"codes have 1 to 16 bits, not {bits}")
