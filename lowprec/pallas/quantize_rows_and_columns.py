"""A matrix quantized along its rows and along its columns in one pass: the operands of forward and wgrad."""

from functools import partial

import jax
import jax.numpy as jnp

from lowprec.formats.random import Key
from lowprec.formats.rounding import Rounding, parse_rounding
from lowprec.formats.types import Format
from lowprec.pallas import reference
from lowprec.pallas.block_rounding import (
    BlockRounding,
    Blocks,
    block_rounding,
    check_matrix,
    check_signs,
    why_not_sm90,
    words_of,
)
from lowprec.pallas.dispatch import choose
from lowprec.pallas.interpreters import gpu_interpreter
from lowprec.pallas.padding import pad_to
from lowprec.pallas.quantize_config import BOTH_SIDES, ROTATED_COLUMNS, ROTATED_COLUMNS_128, QuantizeConfig
from lowprec.pallas.rotate_quantize import COLUMNS, codes_of_kernel, rotations, second_level
from lowprec.pallas.target import target
from lowprec.quantizers.scales import AbsMax, ScaleRule
from lowprec.typing import Array, Float


def quantize_rows_and_columns(
    x: Float[Array, "m k"],
    fmt: str | Format,
    *,
    column_fmt: str | Format | None = None,
    rotation: int | None = None,
    signs: Float[Array, " m"] | None = None,
    rounding: str | Rounding = "nearest_even",
    column_rounding: str | Rounding = "nearest_even",
    key: Key | None = None,
    column_key: Key | None = None,
    rule: ScaleRule = AbsMax(),
    column_rule: ScaleRule | None = None,
    tensor_scale: Float[Array, ""] | None = None,
    column_tensor_scale: Float[Array, ""] | None = None,
    noise: str = "each",
    impl: str = "auto",
    config: QuantizeConfig | None = None,
) -> tuple[Blocks, Blocks]:
    """The blocks of x along its rows, and those of (H · D · x)ᵀ along its rows, the columns of x.

    Without a rotation they are, bit for bit, those of `quantizers.quantize` along axes 1 and 0, the second transposed,
    so that a product contracts the last axis of either; a rotated zero may have either sign. See `rotate_quantize`.

    Source: DeepSeek-V3, arXiv 2412.19437 (dY and X anew for wgrad); NVFP4 with rotated wgrad, arXiv 2509.25149.

    Args:
      x: bfloat16, float32 or float16.
      fmt: of the rows, with blocks 1x<g>.
      column_fmt: of the columns; None: as the rows.
      rotation: of the columns: the size of the Hadamard blocks, 16, 32, 64 or 128; None for none.
      signs: ±1 for each value of a column, filled up to a multiple of the rotation.
      rounding, column_rounding: of either side.
      key, column_key: of either side, where it rounds stochastically.
      rule, column_rule: of the scales of either side; None: as the rows.
      tensor_scale, column_tensor_scale: second levels of either side; None: the rule's.
      noise: "each" or "shared", of the sides that round stochastically.
      impl: who computes it, see `dispatch.IMPLS`.
      config: of the kernel; None takes what fits.
    Returns:
      Blocks of shape (m, k), and of shape (k, m); m filled up to a multiple of the rotation.
    Raises:
      UsageError: (a ValueError) that names the argument which does not suit.
    """
    name = "quantize_rows_and_columns"
    check_matrix(name, x)
    column_rule = rule if column_rule is None else column_rule
    rows = block_rounding(name, fmt, None, rounding, rule, _noise(noise, rounding))
    columns = block_rounding(
        name,
        fmt if column_fmt is None else column_fmt,
        rotation,
        column_rounding,
        column_rule,
        _noise(noise, column_rounding),
    )
    check_signs(name, columns, signs, x.shape[0])
    words = words_of(name, rows, key), words_of(name, columns, column_key)
    chosen = choose(name, impl, why_not_quantize_rows_and_columns(x, rows, columns))
    tensors = (
        second_level(name, x, None, tensor_scale, rows),
        second_level(name, x, signs, column_tensor_scale, columns, axis=0),
    )
    if chosen == "xla":
        return (
            reference.round_blocks(x, None, words[0], tensors[0], how=rows),
            reference.round_blocks(x, signs, words[1], tensors[1], how=columns, axis=0),
        )
    if config is None:
        config = BOTH_SIDES if rotation is None else ROTATED_COLUMNS_128 if rotation == 128 else ROTATED_COLUMNS
    interpret = gpu_interpreter() if chosen == "interpret_gpu" else None
    stripes, tiles = (-(-size // COLUMNS) for size in (columns.padded(x.shape[0]), x.shape[1]))
    walkers = config.walkers(stripes, 2 * tiles, target())
    return _on_sm90(
        x, signs, words, tensors, rows=rows, columns=columns, config=config, walkers=walkers, interpret=interpret
    )


def _noise(noise, rounding):
    return noise if parse_rounding(rounding).stochastic else "each"


def why_not_quantize_rows_and_columns(x: Array, rows: BlockRounding, columns: BlockRounding) -> dict[str, str | None]:
    """Why a kind of kernel cannot serve a call, or None. Looks at shapes and dtypes alone."""
    m, k = x.shape
    reason = why_not_sm90(rows, m, k, x.dtype) or why_not_sm90(columns, k, columns.padded(m), x.dtype)
    if reason is None and x.dtype != jnp.bfloat16:
        reason = f"it reads bfloat16 transposed, not {x.dtype}"
    return {"mosaic_gpu": reason}


@partial(jax.jit, static_argnames=("rows", "columns", "config", "walkers", "interpret"))
def _on_sm90(x, signs, words, tensors, *, rows, columns, config, walkers, interpret):
    from lowprec.pallas.gpu_sm90 import quantize_rows_and_columns as kernel  # it needs Mosaic GPU

    m, k = x.shape
    length = columns.padded(m)
    down, across = (-(-size // COLUMNS) * COLUMNS for size in (length, k))
    matrix = None if columns.rotation is None else rotations(columns.rotation, signs, down)
    second = [None if tensor is None else tensor.reshape(1) for tensor in tensors]
    codes, scales, column_codes, column_scales = kernel.quantize_rows_and_columns(
        pad_to(x, (down, across)),
        kernel.Side(None, second[0], words[0]),
        kernel.Side(matrix, second[1], words[1]),
        row_how=rows,
        column_how=columns,
        stride=-(-k // rows.group) * rows.group,
        column_stride=k,
        config=config,
        walkers=walkers,
        interpret=interpret,
    )
    return (
        _cut(codes, scales, tensors[0], rows, m, k),
        _cut(column_codes, column_scales, tensors[1], columns, k, length),
    )


def _cut(codes, scales, tensor, how, lines, length):
    codes = codes_of_kernel(codes, how.fmt.element)[:lines, : -(-length * how.fmt.element.bits // 8)]
    return Blocks(codes, scales[: -(-length // how.group), :lines].T, tensor)
