"""Products of 8 bits whose scales vary along the contraction axis: fp8 with scales by 1x128 and 128x128, mxfp8."""

from functools import partial

import jax
import jax.numpy as jnp

from lowprec.errors import UsageError
from lowprec.pallas import config as configs
from lowprec.pallas import reference
from lowprec.pallas.config import GROUPS, BlockMatmulConfig
from lowprec.pallas.dispatch import choose
from lowprec.pallas.interpreters import gpu_interpreter, tpu_interpreter
from lowprec.pallas.operands import check_float32, check_operands, check_out_dtype
from lowprec.pallas.padding import pad_to
from lowprec.pallas.target import target
from lowprec.pallas.tpu.tiles import Tiles
from lowprec.typing import Array, Float

TILE = 128  # rows and columns of b with one scale
OUTPUTS = ("float32", "bfloat16", "float16")


def block_matmul(
    a: Array,
    a_scale: Float[Array, "m groups"],
    b: Array,
    b_scale: Float[Array, "_ groups"],
    *,
    out_dtype=jnp.float32,
    impl: str = "auto",
    config: BlockMatmulConfig | Tiles | None = None,
) -> Float[Array, "m n"]:
    """Σ over groups g of k: a_scale[:, g] · b_scale[:, g] · (a[:, g] · b[:, g]ᵀ).

    Scales of a lie along lines of g elements of k. Those of b lie along lines too (wgrad; mxfp8 with g = 32), or on
    tiles of 128x128 (fwd and dgrad, g = 128). Every group's sum and the total are float32 (int8: the group's sum is
    int32). The last group or tile may be cut short by the end of an axis. NaN and infinities among the elements and
    scales come out as in float32 arithmetic.

    Not differentiable: `ops.qdot` has the gradients of a quantized product.

    Source: DeepSeek-V3 (arXiv 2412.19437, section 3.3); DeepGEMM; OCP Microscaling Formats 1.0.

    Args:
      a: (m, k) float8_e4m3fn, float8_e5m2 or int8.
      a_scale: (m, ⌈k/g⌉) float32, g = 128 or 32.
      b: (n, k); of the two float8 formats it may have the other one.
      b_scale: (n, ⌈k/g⌉) float32, or (⌈n/128⌉, ⌈k/128⌉).
      out_dtype: float32, bfloat16 or float16.
      impl: who computes it, see `dispatch.IMPLS`.
      config: of the kernel; None takes what is best for the shape on the device.
    Raises:
      UsageError: (a ValueError) that names the argument which does not suit.
    """
    check_operands("block_matmul", a, b)
    check_out_dtype("block_matmul", out_dtype, OUTPUTS)
    group, lines = _scales(a, a_scale, b, b_scale)
    if isinstance(config, BlockMatmulConfig) and config.group != group:
        raise UsageError(f"block_matmul has a config for groups of {config.group}, and scales of groups of {group}")
    chosen = choose("block_matmul", impl, why_not_block_matmul(a, b, out_dtype=out_dtype))
    (m, k), n = a.shape, b.shape[0]
    if 0 in (m, n, k):
        return jnp.zeros((m, n), out_dtype)
    if chosen == "xla":
        return reference.block_matmul(a, a_scale, b, b_scale, group=group, out_dtype=out_dtype)
    if chosen.endswith("tpu"):
        interpret = tpu_interpreter() if chosen == "interpret_tpu" else False
        return _on_tpu(a, a_scale, b, b_scale, group, lines, jnp.dtype(out_dtype), config, interpret)
    races = gpu_interpreter() if chosen == "interpret_gpu" else None
    return _on_sm90(a, a_scale, b, b_scale, group, lines, jnp.dtype(out_dtype), config, races)


def why_not_block_matmul(a: Array, b: Array, *, out_dtype=jnp.float32) -> dict[str, str | None]:
    """Why a kind of kernel cannot serve a call, or None. Looks at shapes and dtypes alone."""
    reason = None
    if jnp.dtype(out_dtype) == jnp.float16:
        reason = "it writes float32 and bfloat16, not float16"
    return {"mosaic_gpu": reason, "mosaic_tpu": reason}


def _scales(a, a_scale, b, b_scale):
    """(g, whether b's scales lie along lines)."""
    (m, k), n = a.shape, b.shape[0]
    along = {group: -(-k // group) for group in sorted(GROUPS, reverse=True)}
    check_float32("block_matmul", "a_scale", a_scale, tuple((m, groups) for groups in along.values()))
    group = next(group for group, groups in along.items() if groups == a_scale.shape[1])
    shapes = ((n, along[group]), (-(-n // TILE), along[group]))
    check_float32("block_matmul", "b_scale", b_scale, shapes if group == TILE else shapes[:1])
    return group, b_scale.shape[0] == n


def _on_sm90(a, a_scale, b, b_scale, group, lines, out_dtype, config, interpret):
    from lowprec.pallas.gpu_sm90 import block_matmul as kernel  # it needs Mosaic GPU

    (m, k), n, device = a.shape, b.shape[0], target()
    config = config or configs.block_matmul_config(m, n, k, group, device)
    if not isinstance(config, BlockMatmulConfig):
        raise UsageError(f"block_matmul takes a BlockMatmulConfig on GPUs, not {config!r}")
    rows, columns, depth = config.padded(m, n, k)
    groups = depth // group
    of_b = columns if lines else -(-columns // TILE)
    y = kernel.block_matmul(
        pad_to(a, (rows, depth)),
        pad_to(a_scale, (rows, groups), 1).T,
        pad_to(b, (columns, depth)),
        pad_to(b_scale, (of_b, groups), 1).T,
        lines=lines,
        out_dtype=out_dtype,
        config=config,
        cores=device.cores,
        interpret=interpret,
    )
    return y[:m, :n]


@partial(jax.jit, static_argnums=range(4, 9))
def _on_tpu(a, a_scale, b, b_scale, group, lines, out_dtype, config, interpret):
    from lowprec.pallas.tpu import block_matmul as kernel

    return kernel.block_matmul(
        a,
        a_scale.T,
        b,
        b_scale.T,
        group=group,
        lines=lines,
        out_dtype=out_dtype,
        config=config,
        interpret=interpret,
    )
