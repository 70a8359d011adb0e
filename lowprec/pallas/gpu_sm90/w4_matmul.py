"""x · wᵀ with w in 4 bits, on Hopper: weights become bfloat16 between their arrival and the tensor core.

The product is computed as its transpose, w · xᵀ: wgmma takes 64 rows of weights and from 8 columns on, so that a few
rows of x, as in decoding, leave nothing idle. Two warpgroups dequantize and multiply 64 rows of weights each; a third
copies. A step's weights go to shared memory, in turn to two places, while wgmma still reads those of the step before.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lowprec.formats.types import ElementFormat
from lowprec.pallas.four_bits import code_dtype, values
from lowprec.pallas.gpu_sm90.quantize_tile import transforms
from lowprec.pallas.w4_config import COLUMNS, DEPTH, W4Config
from lowprec.typing import Array, Float

_SLAB = 64  # rows of one wgmma
_WARPGROUPS = 2
_SLOTS = 2
_LAYOUT = plgpu.Layout.WGMMA


def w4_matmul(
    x: Float[Array, "M K"],
    codes: Array,
    scales: Float[Array, "G N"],
    *,
    element: ElementFormat,
    out_dtype=jnp.bfloat16,
    config: W4Config,
    interpret=None,
) -> Float[Array, "splits M N"]:
    """The products over each of the parts of K.

    Args:
      x: bfloat16; M a multiple of the config's rows.
      codes: (N, K) int4 or uint4; N and K multiples of 128, K a multiple of 128 · splits.
      scales: bfloat16 or float32, groups of 32, 64 or 128 along K.
      element: of the codes.
      out_dtype: bfloat16 or float32.
    """
    (m, k), n, group = x.shape, codes.shape[0], x.shape[1] // scales.shape[0]
    groups, steps, rows = DEPTH // group, k // DEPTH // config.splits, config.rows
    in_registers = config.operand == "registers"

    def kernel(codes_g, scales_g, x_g, out_g, weights_s, out_s):
        warpgroup = lax.axis_index("warpgroup")
        part, row, column = (lax.axis_index(name) for name in ("part", "row", "column"))
        slab = pl.ds(warpgroup * _SLAB, _SLAB)

        def context(pipeline):
            def product(acc):
                pipeline(acc)
                return acc[...]

            y = pl.run_scoped(product, plgpu.ACC((_SLAB, rows), jnp.float32)).astype(out_dtype)
            out_s.at[warpgroup].T[...] = plgpu.layout_cast(y, plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.commit_smem()
            columns = pl.ds(column * COLUMNS + warpgroup * _SLAB, _SLAB)
            plgpu.copy_smem_to_gmem(out_s.at[warpgroup], out_g.at[part, pl.ds(row * rows, rows), columns])
            plgpu.wait_smem_to_gmem(0)

        def step(index, codes_s, scales_s, x_s, acc):
            # Only 4-bit registers can be handed around between the layout of the load and that of wgmma.
            loaded = plgpu.load(codes_s.at[slab], layout=plgpu.Layout.WGMMA_UPCAST_4X)
            y = values(plgpu.layout_cast(loaded, _LAYOUT), element)
            parts = []
            for g in range(groups):
                scale = plgpu.load(scales_s.at[g, slab], layout=_LAYOUT.reduce(1)).astype(jnp.float32)
                part = y[:, g * group : (g + 1) * group]
                parts.append((part * lax.broadcast_in_dim(scale, part.shape, (0,))).astype(jnp.bfloat16))
            weights = jnp.concatenate(parts, axis=1)
            if in_registers:
                plgpu.commit_smem()  # what was read must not be loaded over
                plgpu.wgmma(acc, weights, x_s.T)
                plgpu.wgmma_wait(0)  # nor registers be reused before they are read
            else:
                place = weights_s.at[warpgroup, lax.rem(index[0], _SLOTS)]
                place[...] = weights
                plgpu.commit_smem()
                plgpu.wgmma(acc, place, x_s.T)
                plgpu.wgmma_wait(_SLOTS - 1)
            return acc

        spec = partial(plgpu.BlockSpec, delay_release=0 if in_registers else _SLOTS - 1)
        pipeline = plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(steps,),
            memory_registers=40,
            max_concurrent_steps=config.stages,
            num_compute_wgs=_WARPGROUPS,
            wg_axis="warpgroup",
            compute_context=context,
            in_specs=[
                spec((COLUMNS, DEPTH), lambda i: (0, part * steps + i), transforms=transforms(DEPTH, 4)),
                spec((groups, COLUMNS), lambda i: (part * steps + i, 0)),
                spec((rows, DEPTH), lambda i: (0, part * steps + i), transforms=transforms(DEPTH, 16)),
            ],
        )
        columns = pl.ds(column * COLUMNS, COLUMNS)
        pipeline(codes_g.at[columns], scales_g.at[:, columns], x_g.at[pl.ds(row * rows, rows)])

    slots = 1 if in_registers else _SLOTS
    out_bits = jnp.dtype(out_dtype).itemsize * 8
    scratch = [
        plgpu.SMEM((_WARPGROUPS, slots, _SLAB, DEPTH), jnp.bfloat16, transforms=transforms(DEPTH, 16)),
        plgpu.SMEM((_WARPGROUPS, rows, _SLAB), out_dtype, transforms=transforms(_SLAB, out_bits)),
    ]
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((config.splits, m, n), out_dtype),
        grid=(config.splits, m // rows, n // COLUMNS),
        grid_names=("part", "row", "column"),
        num_threads=_WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        **({} if interpret is None else {"interpret": interpret}),
    )(codes.astype(code_dtype(element)), scales, x)
