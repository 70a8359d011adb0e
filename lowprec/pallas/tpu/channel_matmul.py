"""The product of operands with one scale a row and a column, and what follows it, on a TPU; the reference defines it.

The last step of K scales the sum, adds the bias, applies the activation and rounds, before anything leaves the chip.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lowprec.formats.native import format_of
from lowprec.formats.rounding import Rounding
from lowprec.pallas.reference import ACTIVATIONS
from lowprec.pallas.tile_math import element_codes
from lowprec.pallas.tpu.block_matmul import product
from lowprec.pallas.tpu.tiles import SUBLANES, Tiles, filled, tile
from lowprec.typing import Array, Float


def channel_matmul(
    a: Array,
    b: Array,
    a_scale: Float[Array, " M"],
    b_scale: Float[Array, " N"],
    bias: Float[Array, " N"] | None,
    factor: Float[Array, " 1"] | None,
    *,
    activation: str | None,
    out_dtype: jnp.dtype,
    config: Tiles | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> Array:
    """(M, K) · (N, K)ᵀ, any M, N and K.

    Args:
      a, b: int8, float8_e4m3fn or float8_e5m2.
      factor: the reciprocal of the scale of the output.
      activation: of `reference.ACTIVATIONS`.
      out_dtype: float32, bfloat16, or one of those of a and b.
    """
    tiles = config or Tiles()
    (rows, depth), columns = a.shape, b.shape[0]
    m, n, k = tile(rows, tiles.m), tile(columns, tiles.n), tile(depth, tiles.k)
    a, b = filled(a, m, k), filled(b, n, k)
    vectors = [(a_scale, m, 0), (b_scale, n, 1), *([] if bias is None else [(bias, n, 1)])]
    operands = [filled(vector[None], 1, size) for vector, size, _ in vectors]
    specs = [pl.BlockSpec((1, size), lambda *at, axis=axis: (0, at[axis])) for _, size, axis in vectors]
    if factor is not None:
        operands.append(factor)
        specs.append(pl.BlockSpec(memory_space=pltpu.SMEM))
    narrow = jnp.dtype(out_dtype).itemsize == 1
    out = jax.ShapeDtypeStruct((a.shape[0], b.shape[0]), jnp.uint8 if narrow else out_dtype)
    grid = (a.shape[0] // m, b.shape[0] // n, a.shape[1] // k)
    y = pl.pallas_call(
        partial(_step, given=(bias is not None, factor is not None), activation=activation, out_dtype=out_dtype),
        out_shape=out,
        grid=grid,
        in_specs=[
            pl.BlockSpec((m, k), lambda i, j, step: (i, step)),
            pl.BlockSpec((n, k), lambda i, j, step: (j, step)),
            *specs,
        ],
        out_specs=pl.BlockSpec((m, n), lambda i, j, step: (i, j)),
        scratch_shapes=[pltpu.VMEM((m, n), jnp.int32 if a.dtype == jnp.int8 else jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * a.size * b.shape[0],
            transcendentals=0 if activation is None else a.shape[0] * b.shape[0],
            bytes_accessed=a.size * grid[1]
            + b.size * grid[0]
            + a.shape[0] * b.shape[0] * jnp.dtype(out_dtype).itemsize,
        ),
        interpret=interpret,
    )(a, b, *operands)[:rows, :columns]
    return lax.bitcast_convert_type(y, out_dtype) if narrow else y


def _step(a_ref, b_ref, a_scale_ref, b_scale_ref, *refs, given, activation, out_dtype):
    *given_refs, out_ref, sum_ref = refs
    has_bias, has_factor = given

    @pl.when(pl.program_id(2) == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    sum_ref[...] += product(a_ref[...], b_ref[...])

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        a_scale = jnp.broadcast_to(a_scale_ref[...], (SUBLANES, a_ref.shape[0])).T[:, :1]
        y = sum_ref[...].astype(jnp.float32) * (a_scale * b_scale_ref[...])
        if has_bias:
            y = y + given_refs[0][...]
        if activation is not None:
            y = ACTIVATIONS[activation](y)
        if has_factor:
            y = y * given_refs[-1][0]
        if jnp.dtype(out_dtype).itemsize == 1:
            codes = element_codes(y, format_of(out_dtype), Rounding())
            out_ref[...] = codes.astype(jnp.int32).astype(jnp.uint8)
        else:
            out_ref[...] = y.astype(out_dtype)
