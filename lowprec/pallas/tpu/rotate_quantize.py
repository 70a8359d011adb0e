"""Rotation and quantization in one pass over an operand, on a TPU; the reference defines it.

The rotation is a product on the matrix unit, 128 columns at a time. Registers are not cut: the largest magnitude of a
group of lanes is that of a register in which the other groups are masked. Two 4-bit codes make a byte by a product with
a matrix of 1 and 16.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lowprec.formats.elements import encode_rounded
from lowprec.formats.random import bits_at
from lowprec.formats.types import FLOAT32
from lowprec.pallas.block_rounding import BlockRounding
from lowprec.pallas.tile_math import SHARED, absmax_scale, element_codes, row_amax, shared_bits
from lowprec.pallas.tpu.tiles import LANES, Tiles, filled, tile
from lowprec.typing import Array, Float, UInt8, UInt32


def rotate_quantize(
    x: Float[Array, "M K"],
    matrix: Float[Array, "stripes 128 size"] | None,
    tensor: Float[Array, " 1"] | None,
    words: UInt32[Array, " 2"] | None,
    *,
    how: BlockRounding,
    stride: int,
    config: Tiles | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[UInt8[Array, "M C"], Array]:
    """Codes and scales (K / g, M) of x · matrix / √size, blocks of g = 16, 32, 64 or 128 along K; any M.

    Args:
      x: bfloat16, or float32 where there is no matrix. Blocks divide K; so does 128 where there is a matrix.
      matrix: its diagonal blocks one below the other, of each 128 columns or one for all, entries that bfloat16 holds;
        None: no rotation.
      tensor: the second level of the scales, where the format has one.
      words: of the key, for stochastic rounding.
      how: elements of 8 or 4 bits.
      stride: columns of the array whose flat indices the random bits belong to.
    Returns:
      Codes of 8 bits, or two of 4 bits a byte, the even element in the low nibble; scales as they are stored.
    """
    rows, columns = x.shape
    group, a_byte = how.group, 8 // how.fmt.bits
    tiles = config or Tiles()
    m, k = tile(rows, tiles.m), tile(columns, tiles.k, LANES * a_byte)
    x = filled(x, m, k)
    grid = (x.shape[1] // k, x.shape[0] // m)  # down the rows first: the rotation of some columns is loaded once
    operands, specs = [x], [pl.BlockSpec((m, k), lambda j, i: (i, j))]
    if matrix is not None:
        own = len(matrix) > 1
        stripes = k // LANES if own else 1
        operands.append(filled(_whole(matrix), stripes, LANES, LANES).astype(jnp.bfloat16))
        specs.append(pl.BlockSpec((stripes, LANES, LANES), lambda j, i: (j if own else 0, 0, 0)))
    scalars = [scalar for scalar in (tensor, words) if scalar is not None]
    step = partial(
        _step,
        given=(matrix is not None, tensor is not None, words is not None),
        how=how,
        stride=stride,
    )
    codes, scales = pl.pallas_call(
        step,
        out_shape=(
            jax.ShapeDtypeStruct((x.shape[0], x.shape[1] // a_byte), jnp.uint8),
            jax.ShapeDtypeStruct((x.shape[1] // group, x.shape[0]), jnp.float32),
        ),
        grid=grid,
        in_specs=[*specs, *(pl.BlockSpec(memory_space=pltpu.SMEM) for _ in scalars)],
        # Scales leave across: a block in memory is whole or a multiple of 8 × 128, and a step has few groups.
        out_specs=(
            pl.BlockSpec((m, k // a_byte), lambda j, i: (i, j)),
            pl.BlockSpec((k // group, m), lambda j, i: (j, i)),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=2 * LANES * x.size,
            transcendentals=0,
            bytes_accessed=x.size * x.dtype.itemsize + x.size // a_byte + 4 * x.size // group,
        ),
        interpret=interpret,
    )(*operands, *scalars)
    scales = scales[: columns // group, :rows]
    if how.fmt.scale.format != FLOAT32:
        scales = encode_rounded(scales, how.fmt.scale.format).astype(jnp.uint8)
    return codes[:rows, : columns // a_byte], scales


def _whole(blocks):
    """The matrices, of their diagonal blocks."""
    size = blocks.shape[-1]
    inside = np.kron(np.eye(LANES // size), np.ones((size, size)))
    return jnp.tile(blocks, (1, 1, LANES // size)) * inside.astype(blocks.dtype)


def _step(x_ref, *refs, given, how, stride):
    *given_refs, codes_ref, scales_ref = refs
    rotated, two_level, random = given
    tensor = given_refs[rotated][0] if two_level else None
    words = (given_refs[-1][0], given_refs[-1][1]) if random else None
    rows, width = x_ref.shape
    group, a_byte = how.group, 8 // how.fmt.bits
    first_column, first_row = pl.program_id(0) * width, pl.program_id(1) * rows
    lane = lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)
    scales = jnp.ones((rows, LANES), jnp.float32)  # a column a group
    pending: list[Array] = []
    for start in range(0, width, LANES):
        x = x_ref[:, pl.ds(start, LANES)]
        if rotated:
            stripe = start // LANES if given_refs[0].shape[0] > 1 else 0
            x = _rotated(x, given_refs[0][stripe], how.rotation) * np.float32(how.rotation**-0.5)
        x = x.astype(jnp.float32)
        scale = absmax_scale(_group_amax(x, how, lane), how.fmt, how.rule, tensor)
        for index in range(LANES // group):
            first = scale.block[:, index * group : index * group + 1]
            scales = jnp.where(lane == start // group + index, first, scales)
        bits = _random_bits(words, first_row, first_column + start, rows, stride, how.noise) if random else None
        quotients = scale.scaler(how.fmt.element).divide(x)
        pending.append(element_codes(quotients, how.fmt.element, how.rounding, bits).astype(jnp.int32))
        if len(pending) == a_byte:
            codes_ref[:, pl.ds(start // (LANES * a_byte) * LANES, LANES)] = _bytes(pending).astype(jnp.uint8)
            pending = []
    scales_ref[...] = scales.T[: width // group]


def _rotated(x, matrix, rotation):
    if rotation == LANES:
        return jnp.dot(x, matrix, preferred_element_type=jnp.float32)
    # Infinity times the zeros between the diagonal blocks would be NaN, also where no block holds it.
    broken = ~(jnp.abs(x.astype(jnp.float32)) < jnp.inf)
    clean = jnp.where(broken, 0, x.astype(jnp.float32)).astype(x.dtype)
    mixed = jnp.abs(matrix.astype(jnp.float32)).astype(x.dtype)
    spread = jnp.dot(broken.astype(jnp.float32).astype(x.dtype), mixed, preferred_element_type=jnp.float32)
    return jnp.where(spread > 0, jnp.nan, jnp.dot(clean, matrix, preferred_element_type=jnp.float32))


def _group_amax(x, how, lane):
    """The largest magnitude of the group of each element: 128 columns, or one where they are one group."""
    if how.group == LANES:
        return row_amax(x, how.fmt, how.rule)[:, None]
    amax = jnp.zeros(x.shape, jnp.float32)
    for index in range(LANES // how.group):
        inside = lane // how.group == index
        amax = jnp.where(inside, row_amax(jnp.where(inside, x, 0.0), how.fmt, how.rule)[:, None], amax)
    return amax


def _random_bits(words, first_row, first_column, rows, stride, noise):
    """Those of 128 columns, by their places in the whole array."""
    shape = (rows, LANES if noise == "each" else SHARED)
    row, column = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    flat = (row + first_row).astype(jnp.uint32) * np.uint32(stride) + (column + first_column).astype(jnp.uint32)
    return bits_at(words, flat) if noise == "each" else shared_bits(words, flat)


def _bytes(codes):
    """128 bytes of 128 codes of 8 bits, or of 256 of 4 bits: sums of products below 256 are exact on a matrix unit."""
    if len(codes) == 1:
        return codes[0]
    halves = jnp.concatenate(codes, axis=1).astype(jnp.float32).astype(jnp.bfloat16)
    source, byte = (lax.broadcasted_iota(jnp.int32, (2 * LANES, LANES), axis) for axis in (0, 1))
    weight = jnp.where(source % 2 == 0, 1.0, 16.0)
    place = jnp.where(source // 2 == byte, weight, 0.0).astype(jnp.bfloat16)
    return jnp.dot(halves, place, preferred_element_type=jnp.float32).astype(jnp.int32)
