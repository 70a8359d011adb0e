"""A matrix read once and quantized twice on Hopper: along its rows, and along its columns, these transposed.

A block of threads keeps to 128 rows, whose rotation for the columns it loads once, and walks across. Two warpgroups
share each tile of 128x128: either has 64 of its rows, then 64 of its columns, read from shared memory transposed.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lowprec.pallas.block_rounding import BlockRounding
from lowprec.pallas.gpu_sm90.quantize_tile import COLUMNS, LAYOUT, ROWS, Indices, TileQuantizer, rotated, transforms
from lowprec.pallas.quantize_config import QuantizeConfig
from lowprec.typing import Array, Float, UInt32

_PAIR = COLUMNS // ROWS  # warpgroups that share a tile


class Side(NamedTuple):
    """What the rows or the columns need besides the matrix: see `rotate_quantize`."""

    matrix: Float[Array, "stripes 128 size"] | None = None
    tensor: Float[Array, " 1"] | None = None
    words: UInt32[Array, " 2"] | None = None


def quantize_rows_and_columns(
    x: Float[Array, "m k"],
    rows: Side,
    columns: Side,
    *,
    row_how: BlockRounding,
    column_how: BlockRounding,
    stride: int,
    column_stride: int,
    config: QuantizeConfig,
    walkers: int,
    interpret=None,
) -> list[Array]:
    """Codes (m, k) and scales (k / g, m) of the rows; codes (k, m) and scales (m / g, k) of the columns.

    Args:
      x: bfloat16, m and k multiples of 128.
      rows, columns: what either needs; rows are not rotated.
      stride, column_stride: columns of the arrays whose flat indices the random bits of either belong to.
      walkers: blocks of threads across each stripe of 128 rows.
    """
    (m, k), pairs = x.shape, config.warpgroups // _PAIR
    tiles, stripes, workers = k // COLUMNS, m // COLUMNS, walkers * pairs
    of_rows, of_columns = TileQuantizer(row_how), TileQuantizer(column_how)
    operands = {"x": x, "matrix": columns.matrix}
    operands |= {f"{name}_of_rows": getattr(rows, name) for name in ("tensor", "words")}
    operands |= {f"{name}_of_columns": getattr(columns, name) for name in ("tensor", "words")}
    operands = {name: array for name, array in operands.items() if array is not None}

    def kernel(*refs):
        given = dict(zip(operands, refs, strict=False))
        row_outputs, column_outputs, x_s, row_buffers, column_buffers, loaded, freed, *rotation = _grouped(
            refs[len(operands) :]
        )
        stripe, warpgroup = lax.axis_index("stripe"), lax.axis_index("warpgroup")
        pair, half = warpgroup // _PAIR, lax.rem(warpgroup, _PAIR)
        worker = lax.axis_index("walker") * pairs + pair
        steps = jnp.maximum((tiles - worker + workers - 1) // workers, 0)
        mine = pl.ds(half * ROWS, ROWS)
        barrier = lambda barriers, slot: barriers.at[pair * config.stages + slot]
        tile = lambda step: worker + step * workers

        def load(step):
            slot = lax.rem(step, config.stages)
            source = given["x"].at[pl.ds(stripe * COLUMNS, COLUMNS), pl.ds(tile(step) * COLUMNS, COLUMNS)]
            plgpu.copy_gmem_to_smem(source, x_s.at[pair, slot], barrier(loaded, slot))

        def column_values(slot):
            if columns.matrix is None:
                return plgpu.load(x_s.at[pair, slot, :, mine].T, layout=LAYOUT).astype(jnp.float32)
            size = column_how.rotation
            return rotated(lambda i: x_s.at[pair, slot, pl.ds(i * size, size), mine].T, rotation[0], size)

        def scalars(side):
            tensor, words = given.get(f"tensor_of_{side}"), given.get(f"words_of_{side}")
            return None if tensor is None else tensor[0], None if words is None else (words[0], words[1])

        def store(quantized, buffers, outputs, line, along, blocks):
            """Of a tile whose rows, those of the result, begin at `line`, in the tile `along` of its columns."""
            (codes_s, scales_s), (codes_g, scales_g) = buffers, outputs
            codes_s[warpgroup] = quantized.codes
            for j, scale in enumerate(quantized.scales):
                scales_s[warpgroup, j] = scale
            plgpu.commit_smem()
            lines = pl.ds(line, ROWS)
            plgpu.copy_smem_to_gmem(
                scales_s.at[warpgroup], scales_g.at[pl.ds(along * blocks, blocks), lines], commit_group=False
            )
            plgpu.copy_smem_to_gmem(codes_s.at[warpgroup], codes_g.at[lines, pl.ds(along * COLUMNS, COLUMNS)])

        def step(i, _):
            slot = lax.rem(i, config.stages)
            row, column = stripe * COLUMNS + half * ROWS, tile(i) * COLUMNS + half * ROWS
            flat = lambda row, column, stride: row.astype(jnp.uint32) * np.uint32(stride) + column.astype(jnp.uint32)
            plgpu.barrier_wait(barrier(loaded, slot))
            y = plgpu.load(x_s.at[pair, slot, mine], layout=LAYOUT).astype(jnp.float32)
            indices = Indices(flat(row, tile(i) * COLUMNS, stride), stride, 1)
            tensor, words = scalars("rows")
            quantized = of_rows(y, tensor, words, indices)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the tile before: a whole one was rounded since
            store(quantized, row_buffers, row_outputs, row, tile(i), of_rows.blocks)

            y = column_values(slot)
            plgpu.commit_smem()  # what was read must not be loaded over
            plgpu.barrier_arrive(barrier(freed, slot))
            indices = Indices(flat(stripe * COLUMNS, column, column_stride), 1, column_stride)
            tensor, words = scalars("columns")
            quantized = of_columns(y, tensor, words, indices)
            store(quantized, column_buffers, column_outputs, column, stripe, of_columns.blocks)

            @pl.when((half == 0) & (i + config.stages < steps))
            def refill():
                plgpu.barrier_wait(barrier(freed, slot))
                load(i + config.stages)

        for i in range(config.stages):
            pl.when((half == 0) & (i < steps))(partial(load, jnp.int32(i)))
        if columns.matrix is not None:
            matrix = given["matrix"].at[stripe if len(columns.matrix) > 1 else 0]
            pl.when(warpgroup == 0)(lambda: plgpu.copy_gmem_to_smem(matrix, *rotation))
            plgpu.barrier_wait(rotation[1])
        lax.fori_loop(0, steps, step, None)
        plgpu.wait_smem_to_gmem(0)

    # Both operands of wgmma have one swizzle.
    slots, of_x = pairs * config.stages, transforms(COLUMNS, 16, widest=min(128, 2 * (column_how.rotation or COLUMNS)))
    scratch: list[Any] = [
        plgpu.SMEM((pairs, config.stages, COLUMNS, COLUMNS), jnp.bfloat16, transforms=of_x),
        *_buffers(of_rows, config.warpgroups),
        *_buffers(of_columns, config.warpgroups),
        plgpu.Barrier(num_barriers=slots),
        plgpu.Barrier(num_arrivals=_PAIR, num_barriers=slots),
    ]
    if columns.matrix is not None:
        of_matrix = transforms(column_how.rotation, 16)
        scratch += [plgpu.SMEM(columns.matrix.shape[1:], jnp.bfloat16, transforms=of_matrix), plgpu.Barrier()]
    return plgpu.kernel(
        kernel,
        out_type=[*_outputs(of_rows, m, k), *_outputs(of_columns, k, m)],
        grid=(stripes, walkers),
        grid_names=("stripe", "walker"),
        num_threads=config.warpgroups,
        thread_name="warpgroup",
        scratch_types=scratch,
        **({} if interpret is None else {"interpret": interpret}),
    )(*operands.values())


def _grouped(refs):
    return refs[:2], refs[2:4], refs[4], refs[5:7], refs[7:9], *refs[9:]


def _outputs(quantize, lines, length):
    return (
        jax.ShapeDtypeStruct((lines, length), quantize.code_dtype),
        jax.ShapeDtypeStruct((length // quantize.how.group, lines), quantize.scale_dtype),
    )


def _buffers(quantize, warpgroups):
    code_transforms = transforms(COLUMNS, quantize.how.fmt.element.bits)
    return (
        plgpu.SMEM((warpgroups, ROWS, COLUMNS), quantize.code_dtype, transforms=code_transforms),
        plgpu.SMEM((warpgroups, quantize.blocks, ROWS), quantize.scale_dtype),
    )
