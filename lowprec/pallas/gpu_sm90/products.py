"""What matrix products on sm_90 share: tiles in shared memory, the order in which they are visited, their way out.

A block has two warpgroups that multiply and one that copies (TMA). It stays on its multiprocessor and takes one tile
of the output after another; while it writes one, the copies for the next are under way.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lowprec.pallas.config import K_TILE, ProductConfig

SLAB = 64  # rows of one wgmma
MULTIPLYING = 2  # warpgroups
_COPYING_REGISTERS = 40  # a thread of the copying warpgroup; the others get what remains, 232


def transforms(columns: int, dtype, swizzle: int | None = None) -> tuple[Any, ...]:
    """How a tile with so many columns lies in shared memory: free of bank conflicts, as wgmma and TMA know it.

    Args:
      swizzle: in bytes, also the fewest columns that wgmma can take at once; None: the widest.
    """
    size = jnp.dtype(dtype).itemsize
    swizzle = swizzle or plgpu.find_swizzle(columns * size * 8)
    tiling, swizzling = plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)  # type: ignore[abstract]
    return tiling, swizzling


def operand_specs(config: ProductConfig, a_dtype, b_dtype, swizzle: int = K_TILE) -> list[plgpu.BlockSpec]:
    """Those of a and b in the pipeline over K; what blocks of a cluster share is copied once, to both."""
    specs = []
    for size, dtype, shared in ((config.rows, a_dtype, "columns"), (config.columns, b_dtype, "rows")):
        axes = ("cluster",) if config.cluster == shared else ()
        layout = transforms(K_TILE, dtype, swizzle)
        specs.append(plgpu.BlockSpec((size, K_TILE), lambda k: (0, k), transforms=layout, collective_axes=axes))
    return specs


def pipeline(config: ProductConfig, steps: int, specs, body: Callable, context: Callable):
    """The pipeline over K of one tile."""
    return plgpu.emit_pipeline_warp_specialized(
        body,
        grid=(steps,),
        memory_registers=_COPYING_REGISTERS,
        max_concurrent_steps=config.stages,
        num_compute_wgs=MULTIPLYING,
        wg_axis="warpgroup",
        compute_context=context,
        in_specs=specs,
    )


def share(config: ProductConfig) -> tuple[jax.Array | int, jax.Array | int]:
    """The first row and column, in its block's tile, of what this warpgroup computes."""
    warpgroup = lax.axis_index("warpgroup")
    rows, columns = config.warpgroup
    return (0, warpgroup * columns) if config.rows == SLAB else (warpgroup * rows, 0)


def visit_tiles(config: ProductConfig, m: int, n: int, visit: Callable[[Any, Any], None]) -> None:
    """visit(row, column): the indices of this block's tiles, in bands, so that neighbours find operands in L2."""
    down, across = config.clusters
    shape = m // (config.rows * down), n // (config.columns * across)

    @plgpu.nd_loop((shape[0] * shape[1],), collective_axes="block")
    def _(info):
        row, column = plgpu.planar_snake(info.index[0], shape, 1, config.snake)
        if config.cluster is not None:
            place = lax.axis_index("cluster")
            row, column = (row * down + place, column) if down > 1 else (row, column * across + place)
        visit(row, column)


def outbox(config: ProductConfig, dtype) -> Any:
    """Where each warpgroup puts results for TMA to take: two slots, one filled while the other is emptied."""
    return plgpu.SMEM((MULTIPLYING, 2, SLAB, config.epilogue), dtype, transforms=transforms(config.epilogue, dtype))


def send(config: ProductConfig, part: Callable[[int, int], jax.Array], out_smem, out_gmem, row, column) -> None:
    """Writes a warpgroup's results, slab by slab and some columns at a time.

    Args:
      part: (slab, first column) -> (64, epilogue) results in the dtype of the output.
      row, column: of the warpgroup's first element in the output.
    """
    warpgroup, (rows, columns) = lax.axis_index("warpgroup"), config.warpgroup
    places = [(slab, start) for slab in range(rows // SLAB) for start in range(0, columns, config.epilogue)]
    for i, (slab, start) in enumerate(places):
        slot = out_smem.at[warpgroup, i % 2]
        plgpu.wait_smem_to_gmem(min(i, 1), wait_read_only=True)
        slot[...] = part(slab, start)
        plgpu.commit_smem()
        target = out_gmem.at[pl.ds(row + slab * SLAB, SLAB), pl.ds(column + start, config.epilogue)]
        plgpu.copy_smem_to_gmem(slot, target)


def launch(config: ProductConfig, body: Callable, out: jax.ShapeDtypeStruct, cores: int, interpret=None) -> Callable:
    """The kernel: a block on each multiprocessor, or fewer if there are fewer tiles."""
    down, across = config.clusters
    tiles = out.shape[0] // config.rows * (out.shape[1] // config.columns)
    blocks = max(min(cores, tiles) // (down * across), 1)
    cluster: dict[str, Any] = {}
    if config.cluster is not None:
        cluster = {"cluster": (down * across,), "cluster_names": ("cluster",)}
    if interpret is not None:
        cluster["interpret"] = interpret
    return plgpu.kernel(
        body,
        out_type=out,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=MULTIPLYING + 1,
        thread_name="warpgroup",
        **cluster,
    )
