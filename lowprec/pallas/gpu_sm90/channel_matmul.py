"""Products of 8 bits with one scale a row and column: tensor cores add up all of K.

What follows happens on the way out, in registers, some columns at a time: scale, bias, activation, rounding to 8 bits.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lowprec.pallas.config import K_TILE, ChannelMatmulConfig
from lowprec.pallas.gpu_sm90 import products
from lowprec.pallas.reference import ACTIVATIONS, to_dtype
from lowprec.typing import Array, Float

_ROW, _COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


@partial(jax.jit, static_argnames=("activation", "out_dtype", "config", "cores", "interpret"))
def channel_matmul(
    a: Array,
    b: Array,
    a_scale: Float[Array, " m"],
    b_scale: Float[Array, " n"],
    bias: Float[Array, " n"] | None,
    factor: Float[Array, " 1"] | None,
    *,
    activation: str | None,
    out_dtype,
    config: ChannelMatmulConfig,
    cores: int,
    interpret=None,
) -> Array:
    """(m, k) · (n, k)ᵀ in whole tiles.

    Args:
      factor: the reciprocal of the scale of the output.
      cores: multiprocessors.
    """
    (m, k), n = a.shape, b.shape[0]
    vectors = [v for v in (a_scale, b_scale, bias) if v is not None]
    steps, specs = k // K_TILE, products.operand_specs(config, a.dtype, b.dtype)
    sum_dtype = jnp.int32 if a.dtype == jnp.int8 else jnp.float32

    def kernel(a_gmem, b_gmem, *rest):
        *vectors_gmem, out_gmem = rest
        factor_gmem = None if factor is None else vectors_gmem.pop()

        def operands(row, column):
            rows, columns = pl.ds(row * config.rows, config.rows), pl.ds(column * config.columns, config.columns)
            return a_gmem.at[rows], b_gmem.at[columns]

        body = _multiply(config)
        allocate = products.pipeline(config, steps, specs, body, lambda run: None).get_allocations

        def scope(buffers, out_smem, vectors_smem, arrived):
            warpgroup = lax.axis_index("warpgroup")

            def visit(row, column):
                def compute(run):
                    first_row, first_column = products.share(config)
                    place = row * config.rows + first_row, column * config.columns + first_column
                    # Each warpgroup has its own copies: nobody else may still read the last tile's.
                    for i, (source, copy) in enumerate(zip(vectors_gmem, vectors_smem, strict=True)):
                        mine = pl.ds(place[min(i, 1)], copy.shape[1])
                        plgpu.copy_gmem_to_smem(source.at[mine], copy.at[warpgroup], arrived.at[warpgroup])

                    def accumulate(accumulator):
                        run(accumulator)
                        return accumulator[...]

                    total = pl.run_scoped(accumulate, plgpu.ACC(config.warpgroup, sum_dtype))
                    plgpu.barrier_wait(arrived.at[warpgroup])

                    own = [copy.at[warpgroup] for copy in vectors_smem]
                    inverse = None if factor_gmem is None else factor_gmem[0]
                    part = _epilogue(config, total, own, inverse, activation, out_dtype)
                    products.send(config, part, out_smem, out_gmem, *place)

                products.pipeline(config, steps, specs, body, compute)(*operands(row, column), allocations=buffers)

            products.visit_tiles(config, m, n, visit)
            plgpu.wait_smem_to_gmem(0)

        rows, columns = config.warpgroup
        copies = [plgpu.SMEM((products.MULTIPLYING, size), jnp.float32) for size in (rows, columns, columns)]
        pl.run_scoped(
            scope,
            allocate(*operands(0, 0)),
            products.outbox(config, out_dtype),
            copies[: len(vectors)],
            plgpu.Barrier(num_arrivals=len(vectors), num_barriers=products.MULTIPLYING),
            collective_axes="warpgroup",
        )

    out = jax.ShapeDtypeStruct((m, n), out_dtype)
    arguments = [a, b, *vectors, *([] if factor is None else [factor])]
    return products.launch(config, kernel, out, cores, interpret)(*arguments)


def _multiply(config):
    """The step of the pipeline: accumulator + a tile of K."""
    rows, columns = config.warpgroup

    def body(_, a_smem, b_smem, accumulator):
        first_row, first_column = products.share(config)
        plgpu.wgmma(accumulator, a_smem.at[pl.ds(first_row, rows)], b_smem.at[pl.ds(first_column, columns)].T)
        # The slot is released next. That the last product is done by then costs little: the other warpgroup multiplies.
        plgpu.wgmma_wait(0)
        return accumulator

    return body


def _epilogue(config, total, vectors, factor, activation, out_dtype):
    """(slab, first column) -> a part of the output; the vectors are a_scale, b_scale and perhaps the bias."""

    def part(slab, start):
        rows, columns = pl.ds(slab * products.SLAB, products.SLAB), pl.ds(start, config.epilogue)
        y = total[slab * products.SLAB : (slab + 1) * products.SLAB, start : start + config.epilogue]
        y = y.astype(jnp.float32)
        along_rows = lambda ref: lax.broadcast_in_dim(plgpu.load(ref.at[rows], layout=_ROW), y.shape, [0])
        along_columns = lambda ref: lax.broadcast_in_dim(plgpu.load(ref.at[columns], layout=_COLUMN), y.shape, [1])
        y = y * (along_rows(vectors[0]) * along_columns(vectors[1]))
        for bias in vectors[2:]:
            y = y + along_columns(bias)
        if activation is not None:
            y = ACTIVATIONS[activation](y)
        return to_dtype(y if factor is None else y * factor, out_dtype)

    return part
