"""Rows rotated by wgmma and quantized on the way, on Hopper.

A block of threads keeps to 128 columns: it loads their rotation once and walks down the rows. Each of its warpgroups
has 64 rows at a time and its own loads in flight, so that none waits for another.
"""

from functools import partial
from typing import Any

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


def rotate_quantize(
    x: Float[Array, "m k"],
    matrix: Float[Array, "stripes 128 size"] | None,
    tensor: Float[Array, " 1"] | None,
    words: UInt32[Array, " 2"] | None,
    *,
    how: BlockRounding,
    stride: int,
    config: QuantizeConfig,
    walkers: int,
    interpret=None,
) -> list[Array]:
    """Codes (m, k) as uint4 or uint8, scales (k / g, m), and sums (stripes, 2, m) if they are wanted.

    Args:
      x: m a multiple of 64, k of 128; bfloat16, or float32 without a rotation.
      matrix: D · H of each 128 columns, its blocks one below the other, or one for all, bfloat16, of ±1; None: no
        rotation.
      tensor: the second level of the scales, where the format has one.
      words: of the key, for stochastic rounding.
      stride: columns of the array whose flat indices the random bits belong to.
      walkers: blocks of threads down the rows of each stripe of 128 columns.
    """
    (m, k), quantize = x.shape, TileQuantizer(how)
    tiles, stripes, workers = m // ROWS, k // COLUMNS, walkers * config.warpgroups
    operands = {"x": x, "matrix": matrix, "tensor": tensor, "words": words}
    operands = {name: array for name, array in operands.items() if array is not None}
    outputs = [jax.ShapeDtypeStruct((m, k), quantize.code_dtype)]
    outputs.append(jax.ShapeDtypeStruct((k // how.group, m), quantize.scale_dtype))
    if how.sums:
        outputs.append(jax.ShapeDtypeStruct((stripes, 2, m), jnp.float32))

    def kernel(*refs):
        given = dict(zip(operands, refs, strict=False))
        codes_g, scales_g, *sums_g = refs[len(operands) : len(operands) + len(outputs)]
        x_s, codes_s, scales_s, loaded, *more = refs[len(operands) + len(outputs) :]
        stripe, warpgroup = lax.axis_index("stripe"), lax.axis_index("warpgroup")
        worker = lax.axis_index("walker") * config.warpgroups + warpgroup
        columns = pl.ds(stripe * COLUMNS, COLUMNS)
        steps = jnp.maximum((tiles - worker + workers - 1) // workers, 0)
        tensor = given["tensor"][0] if "tensor" in given else None
        words = (given["words"][0], given["words"][1]) if "words" in given else None
        first_row = lambda step: (worker + step * workers) * ROWS
        barrier = lambda slot: loaded.at[warpgroup * config.stages + slot]

        def load(step):
            slot = lax.rem(step, config.stages)
            rows = pl.ds(first_row(step), ROWS)
            plgpu.copy_gmem_to_smem(given["x"].at[rows, columns], x_s.at[warpgroup, slot], barrier(slot))

        def values(slot):
            if matrix is None:
                y = plgpu.load(x_s.at[warpgroup, slot], layout=LAYOUT).astype(jnp.float32)
                plgpu.commit_smem()  # what was read must not be loaded over
                return y

            columns_of = lambda i: pl.ds(i * how.rotation, how.rotation)
            return rotated(lambda i: x_s.at[warpgroup, slot, :, columns_of(i)], more[0], how.rotation)

        def store(row, quantized):
            codes_s[warpgroup] = quantized.codes
            targets = [(scales_s, scales_g.at[pl.ds(stripe * quantize.blocks, quantize.blocks), pl.ds(row, ROWS)])]
            if how.sums:
                targets.append((more[-1], sums_g[0].at[stripe, :, pl.ds(row, ROWS)]))
            for (vectors_s, _), vectors in zip(targets, (quantized.scales, quantized.sums), strict=False):
                for j, vector in enumerate(vectors):
                    vectors_s[warpgroup, j] = vector
            plgpu.commit_smem()
            for vectors_s, vectors_g in targets:
                plgpu.copy_smem_to_gmem(vectors_s.at[warpgroup], vectors_g, commit_group=False)
            plgpu.copy_smem_to_gmem(codes_s.at[warpgroup], codes_g.at[pl.ds(row, ROWS), columns])

        def step(i, _):
            slot, row = lax.rem(i, config.stages), first_row(i)
            plgpu.barrier_wait(barrier(slot))
            y = values(slot)
            pl.when(i + config.stages < steps)(partial(load, i + config.stages))
            first = row.astype(jnp.uint32) * np.uint32(stride) + (stripe * COLUMNS).astype(jnp.uint32)
            quantized = quantize(y, tensor, words, Indices(first, stride, 1))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # a whole tile was rounded since: it is long done
            store(row, quantized)

        for i in range(config.stages):
            pl.when(i < steps)(partial(load, jnp.int32(i)))
        if matrix is not None:
            _load_rotation(given["matrix"].at[stripe if len(matrix) > 1 else 0], more[0], more[1], warpgroup)
        lax.fori_loop(0, steps, step, None)
        plgpu.wait_smem_to_gmem(0)

    shape = (ROWS, COLUMNS)
    vectors = lambda count, dtype: plgpu.SMEM((config.warpgroups, count, ROWS), dtype)
    code_transforms = transforms(COLUMNS, how.fmt.element.bits)
    x_transforms = transforms(COLUMNS, x.dtype.itemsize * 8, widest=min(128, 2 * (how.rotation or COLUMNS)))
    scratch: list[Any] = [
        plgpu.SMEM((config.warpgroups, config.stages, *shape), x.dtype, transforms=x_transforms),
        plgpu.SMEM((config.warpgroups, *shape), quantize.code_dtype, transforms=code_transforms),
        vectors(quantize.blocks, quantize.scale_dtype),
        plgpu.Barrier(num_barriers=config.warpgroups * config.stages),
    ]
    if matrix is not None:
        scratch.append(plgpu.SMEM(matrix.shape[1:], jnp.bfloat16, transforms=transforms(how.rotation, 16)))
        scratch.append(plgpu.Barrier())
    if how.sums:
        scratch.append(vectors(2, jnp.float32))
    return plgpu.kernel(
        kernel,
        out_type=outputs,
        grid=(stripes, walkers),
        grid_names=("stripe", "walker"),
        num_threads=config.warpgroups,
        thread_name="warpgroup",
        scratch_types=scratch,
        **({} if interpret is None else {"interpret": interpret}),
    )(*operands.values())


def _load_rotation(matrix_g, matrix_s, barrier, warpgroup):
    @pl.when(warpgroup == 0)
    def _():
        plgpu.copy_gmem_to_smem(matrix_g, matrix_s, barrier)

    plgpu.barrier_wait(barrier)
