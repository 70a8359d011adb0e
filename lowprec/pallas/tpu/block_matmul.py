"""The product of operands with a scale for every g values along K, on a TPU; the reference defines it.

A step takes a block of K; for each group of g values the matrix unit gives the exact sum of products, which is scaled
and added to a float32 accumulator. Groups shorter than the matrix unit is deep (128 or 256) leave part of it idle.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lowprec.errors import require
from lowprec.pallas.tpu.tiles import LANES, SUBLANES, Tiles, filled, tile
from lowprec.typing import Array, Float


def block_matmul(
    a: Array,
    a_scale: Float[Array, "G M"],
    b: Array,
    b_scale: Float[Array, "G _"],
    *,
    group: int,
    lines: bool = True,
    out_dtype=jnp.float32,
    config: Tiles | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "M N"]:
    """Σ over groups of a_scale · b_scale · (a · bᵀ over the group), any M, N and K.

    Scales lie across, since blocks in memory are whole or multiples of 8 × 128, and a step has few groups.

    Args:
      a: (M, K) int8, float8_e4m3fn or float8_e5m2.
      a_scale: (⌈K/group⌉, M) float32.
      b: (N, K); a float8 need not be that of a.
      b_scale: (⌈K/group⌉, N), or where there are no lines a scale for each 128 rows of b, (⌈K/group⌉, ⌈N/128⌉).
      out_dtype: float32 or bfloat16.
      config: the largest blocks; 8 groups divide its k.
    """
    tiles = config or Tiles()
    (rows, depth), columns = a.shape, b.shape[0]
    require(tiles.k % (SUBLANES * group) == 0, "k of the tiles", f"a multiple of {SUBLANES * group}", tiles.k)
    if not lines:
        b_scale = jnp.repeat(b_scale, LANES, axis=1)[:, :columns]  # 3% of what b itself moves
    m, n, k = tile(rows, tiles.m), tile(columns, tiles.n), tile(depth, tiles.k)
    a, b = filled(a, m, k), filled(b, n, k)
    a_scale, b_scale = filled(a_scale, k // group, m), filled(b_scale, k // group, n)
    grid = (a.shape[0] // m, b.shape[0] // n, a.shape[1] // k)
    product = pl.pallas_call(
        partial(_step, group=group),
        out_shape=jax.ShapeDtypeStruct((a.shape[0], b.shape[0]), out_dtype),
        grid=grid,
        in_specs=[
            pl.BlockSpec((m, k), lambda i, j, step: (i, step)),
            pl.BlockSpec((k // group, m), lambda i, j, step: (step, i)),
            pl.BlockSpec((n, k), lambda i, j, step: (j, step)),
            pl.BlockSpec((k // group, n), lambda i, j, step: (step, j)),
        ],
        out_specs=pl.BlockSpec((m, n), lambda i, j, step: (i, j)),
        scratch_shapes=[pltpu.VMEM((m, n), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * a.size * b.shape[0],
            transcendentals=0,
            bytes_accessed=a.size * grid[1] + b.size * grid[0] + a.shape[0] * b.shape[0] * 4,
        ),
        interpret=interpret,
    )(a, a_scale, b, b_scale)
    return product[:rows, :columns]


def _step(a_ref, a_scale_ref, b_ref, b_scale_ref, out_ref, sum_ref, *, group):
    @pl.when(pl.program_id(2) == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    a_scale = a_scale_ref[...].T
    total = sum_ref[...]
    for index in range(a_ref.shape[1] // group):
        along = pl.ds(index * group, group)
        part = product(a_ref[:, along], b_ref[:, along]).astype(jnp.float32)
        total += part * (a_scale[:, index : index + 1] * b_scale_ref[index : index + 1, :])
    sum_ref[...] = total

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def product(a: Array, b: Array) -> Array:
    """a · bᵀ of two blocks: int32 sums of int8, float32 sums of float8, which bfloat16 holds exactly."""
    integers = a.dtype == jnp.int8
    # Matrix units without float8 (v5, v6) would have it converted anyway, and none takes two kinds of it.
    a, b = (v if integers else v.astype(jnp.bfloat16) for v in (a, b))
    over_last = (((1,), (1,)), ((), ()))
    return lax.dot_general(a, b, over_last, preferred_element_type=jnp.int32 if integers else jnp.float32)
