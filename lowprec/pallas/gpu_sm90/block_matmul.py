"""Products of 8 bits whose scales vary along K: a partial sum by tensor cores, scaled and added in float32 registers.

Tensor cores of sm_90 add up fp8 products with fewer bits than float32 has, and know no scales: after every group of
K a sum leaves them, meets its scales and starts anew (DeepSeek-V3, arXiv 2412.19437, section 3.3.2). While one
warpgroup does that, the other multiplies.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lowprec.pallas.config import K_TILE, BlockMatmulConfig
from lowprec.pallas.gpu_sm90 import products
from lowprec.typing import Array, Float

_ROW, _COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
_TILE = 128  # rows of b with one scale
_COPIES = 4  # of a tile's scale: TMA copies no less than 16 bytes


@partial(jax.jit, static_argnames=("lines", "out_dtype", "config", "cores", "interpret"))
def block_matmul(
    a: Array,
    a_scale: Float[Array, "groups m"],
    b: Array,
    b_scale: Float[Array, "groups _"],
    *,
    lines: bool,
    out_dtype,
    config: BlockMatmulConfig,
    cores: int,
    interpret=None,
) -> Array:
    """(m, k) · (n, k)ᵀ in whole tiles; the scales' groups come first: copies want contiguous rows.

    Args:
      b_scale: with `lines` (groups, n), else (groups, n/128), at least one tile.
      cores: multiprocessors.
    """
    (m, k), n = a.shape, b.shape[0]
    if not lines:
        b_scale = jnp.broadcast_to(b_scale[:, :, None], (*b_scale.shape, _COPIES))
    steps = k // K_TILE
    specs = [*products.operand_specs(config, a.dtype, b.dtype, swizzle=config.group), *_scale_specs(config, lines)]

    def kernel(a_gmem, b_gmem, a_scale_gmem, b_scale_gmem, out_gmem):
        def operands(row, column):
            rows, columns = pl.ds(row * config.rows, config.rows), pl.ds(column * config.columns, config.columns)
            of_b = columns if lines else pl.ds(column * config.columns // _TILE, _tiles(config))
            return a_gmem.at[rows], b_gmem.at[columns], a_scale_gmem.at[:, rows], b_scale_gmem.at[:, of_b]

        body = _promote(config, lines, jnp.int32 if a.dtype == jnp.int8 else jnp.float32)
        allocate = products.pipeline(config, steps, specs, body, lambda run: None).get_allocations

        def scope(buffers, out_smem):
            def visit(row, column):
                def compute(run):
                    zero = plgpu.layout_cast(jnp.zeros((products.SLAB, config.warpgroup[1])), plgpu.Layout.WGMMA)
                    totals = run([zero] * (config.warpgroup[0] // products.SLAB))
                    first_row, first_column = products.share(config)
                    place = row * config.rows + first_row, column * config.columns + first_column
                    part = lambda slab, start: totals[slab][:, start : start + config.epilogue].astype(out_dtype)
                    products.send(config, part, out_smem, out_gmem, *place)

                products.pipeline(config, steps, specs, body, compute)(*operands(row, column), allocations=buffers)

            products.visit_tiles(config, m, n, visit)
            plgpu.wait_smem_to_gmem(0)

        out_smem = products.outbox(config, out_dtype)
        pl.run_scoped(scope, allocate(*operands(0, 0)), out_smem, collective_axes="warpgroup")

    out = jax.ShapeDtypeStruct((m, n), out_dtype)
    return products.launch(config, kernel, out, cores, interpret)(a, b, a_scale, b_scale)


def _tiles(config):
    """Tiles of scales beside each other in a block's columns."""
    return max(config.columns // _TILE, 1)


def _scale_specs(config, lines):
    groups = K_TILE // config.group
    of_a = plgpu.BlockSpec((groups, config.rows), lambda k: (k, 0))
    if lines:
        return of_a, plgpu.BlockSpec((groups, config.columns), lambda k: (k, 0))
    return of_a, plgpu.BlockSpec((groups, _tiles(config), _COPIES), lambda k: (k, 0, 0))


def _promote(config, lines, sum_dtype):
    """The step of the pipeline: totals + scaled sums of each group in a tile of K."""
    slabs, columns = config.warpgroup[0] // products.SLAB, config.warpgroup[1]

    def body(_, a_smem, b_smem, a_scale_smem, b_scale_smem, totals):
        first_row, first_column = products.share(config)
        totals = list(totals)
        for group in range(K_TILE // config.group):
            ks = pl.ds(group * config.group, config.group)
            of_b = b_smem.at[pl.ds(first_column, columns), ks]
            if lines:
                b_scale = plgpu.load(b_scale_smem.at[group, pl.ds(first_column, columns)], layout=_COLUMN)
            else:
                b_scale = b_scale_smem[group, first_column // _TILE, 0]
            for slab in range(slabs):
                rows = pl.ds(first_row + slab * products.SLAB, products.SLAB)
                a_scale = plgpu.load(a_scale_smem.at[group, rows], layout=_ROW)

                def multiply(accumulator, rows=rows, ks=ks, of_b=of_b):
                    plgpu.wgmma(accumulator, a_smem.at[rows, ks], of_b.T)
                    return accumulator[...]  # waits

                # One accumulator at a time: with two slabs of totals a second one would not fit into the registers.
                part = pl.run_scoped(multiply, plgpu.ACC((products.SLAB, columns), sum_dtype)).astype(jnp.float32)
                totals[slab] += part * _outer(a_scale, b_scale, part.shape)
        # The scales were read by ordinary loads; TMA, which writes their slot next, is ordered after those by a fence.
        plgpu.commit_smem()
        return totals

    return body


def _outer(a_scale, b_scale, shape):
    if b_scale.ndim == 0:
        return lax.broadcast_in_dim(a_scale * b_scale, shape, [0])
    return lax.broadcast_in_dim(a_scale, shape, [0]) * lax.broadcast_in_dim(b_scale, shape, [1])
