"""A matrix rotated and quantized in one pass: codes and scales of blocks along its rows."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowprec.errors import UsageError
from lowprec.formats.random import Key
from lowprec.formats.rounding import Rounding
from lowprec.formats.types import ElementFormat, Format
from lowprec.pallas import reference
from lowprec.pallas.block_rounding import (
    BlockRounding,
    Blocks,
    block_rounding,
    check_matrix,
    check_signs,
    why_not_sm90,
    why_not_tpu,
    words_of,
)
from lowprec.pallas.dispatch import choose
from lowprec.pallas.interpreters import gpu_interpreter, tpu_interpreter
from lowprec.pallas.padding import pad_to
from lowprec.pallas.quantize_config import PLAIN, ROTATED, WIDE, QuantizeConfig
from lowprec.pallas.target import target
from lowprec.pallas.tpu.tiles import Tiles
from lowprec.quantizers.hadamard import hadamard_matrix
from lowprec.quantizers.scales import AbsMax, ScaleRule
from lowprec.typing import Array, Float

ROWS, COLUMNS = 64, 128  # of a tile


def rotate_quantize(
    x: Float[Array, "m k"],
    fmt: str | Format,
    *,
    rotation: int | None = None,
    signs: Float[Array, " k"] | None = None,
    rounding: str | Rounding = "nearest_even",
    key: Key | None = None,
    rule: ScaleRule = AbsMax(),
    tensor_scale: Float[Array, ""] | None = None,
    noise: str = "each",
    sums: bool = False,
    impl: str = "auto",
    config: QuantizeConfig | Tiles | None = None,
) -> Blocks:
    """x · D · H in blocks of 1x<g>: codes and scales, of which `quantizers.round_blocks` makes the values.

    Without a rotation codes and scales are those of `quantizers.quantize(x, fmt, rounding=…, key=…, pad=True)`, bit for
    bit, on every device. Rotated values are float32 sums of 128 products or fewer, divided by √rotation; where float32
    does not hold such a sum exactly, devices differ in its last bits, and a sum of zeros may have either sign.

    What the blocks or the rotation do not divide is filled up with zeros. Blocks with an infinity or NaN are NaN.
    Not differentiable: `ops.qdot` has the gradients of a quantized product.

    Source: QuTLASS (rotation and quantization in one kernel); DeepSeek-V3, arXiv 2412.19437; NVFP4, arXiv 2509.25149;
    MS-EDEN's sums, arXiv 2601.22813.

    Args:
      x: bfloat16, float32 or float16.
      fmt: with blocks 1x<g>, or its name, e.g. "fp8_block128", "nvfp4", "mxfp8", "int8@1x128".
      rotation: the size of the Hadamard blocks along the rows: 16, 32, 64 or 128; None for none.
      signs: ±1 for each value of a row, filled up to a multiple of the rotation; None: the rotation is H alone.
      rounding: a mode or its name; the stochastic ones need a key.
      rule: of the scales.
      tensor_scale: the second level of two-level formats; None takes that of the rule, in a pass of its own.
      noise: "each" or "shared", see `BlockRounding`.
      sums: also Σz² and Σz·q over chunks of 128 values.
      impl: who computes it, see `dispatch.IMPLS`.
      config: of the kernel; None takes what fits.
    Raises:
      UsageError: (a ValueError) that names the argument which does not suit.
    """
    name = "rotate_quantize"
    check_matrix(name, x)
    how = block_rounding(name, fmt, rotation, rounding, rule, noise, sums)
    check_signs(name, how, signs, x.shape[1])
    words = words_of(name, how, key)
    chosen = choose(name, impl, why_not_rotate_quantize(x, how))
    tensor = second_level(name, x, signs, tensor_scale, how)
    if chosen == "xla":
        return reference.round_blocks(x, signs, words, tensor, how=how)
    if chosen.endswith("tpu"):
        interpret = tpu_interpreter() if chosen == "interpret_tpu" else False
        return _on_tpu(x, signs, words, tensor, how=how, config=config, interpret=interpret)
    if config is None:
        config = ROTATED if rotation else PLAIN if x.dtype == jnp.bfloat16 else WIDE
    on_gpu = gpu_interpreter() if chosen == "interpret_gpu" else None
    stripes, tiles = (-(-size // step) for size, step in ((how.padded(x.shape[1]), COLUMNS), (x.shape[0], ROWS)))
    walkers = config.walkers(stripes, tiles, target())
    return _on_sm90(x, signs, words, tensor, how=how, config=config, walkers=walkers, interpret=on_gpu)


def why_not_rotate_quantize(x: Array, how: BlockRounding) -> dict[str, str | None]:
    """Why a kind of kernel cannot serve a call, or None. Looks at shapes and dtypes alone."""
    size = x.shape[0], how.padded(x.shape[1])
    return {"mosaic_gpu": why_not_sm90(how, *size, x.dtype), "mosaic_tpu": why_not_tpu(how, *size, x.dtype)}


def second_level(
    operation: str, x: Array, signs: Array | None, given: Array | None, how: BlockRounding, axis: int = -1
) -> Float[Array, ""] | None:
    """The tensor scale of a two-level format: the given one, or the rule's.

    Raises:
      UsageError: (a ValueError) for one that the format or the rule has no use for.
    """
    if not how.fmt.scale.per_tensor:
        if given is not None:
            raise UsageError(f"{operation} has a tensor scale, and {how.fmt} no second level")
        return None
    if not isinstance(how.rule, AbsMax):
        if given is not None:
            raise UsageError(f"{operation}: {how.rule} takes no tensor scale, absmax does")
        return None
    if given is None:
        return reference.tensor_scale(x, signs, how=how, axis=axis)
    return jnp.asarray(given, jnp.float32).reshape(())


@partial(jax.jit, static_argnames=("how", "config", "walkers", "interpret"))
def _on_sm90(x, signs, words, tensor, *, how, config, walkers, interpret):
    from lowprec.pallas.gpu_sm90 import rotate_quantize as kernel  # it needs Mosaic GPU

    m, k = x.shape[0], how.padded(x.shape[1])
    rows, columns = (-(-size // step) * step for size, step in ((m, ROWS), (k, COLUMNS)))
    stride = -(-k // how.group) * how.group
    codes, scales, *sums = kernel.rotate_quantize(
        pad_to(x, (rows, columns)),
        None if how.rotation is None else rotations(how.rotation, signs, columns),
        None if tensor is None else tensor.reshape(1),
        words,
        how=how,
        stride=stride,
        config=config,
        walkers=walkers,
        interpret=interpret,
    )
    chunks = (sums[0][:, 0, :m].T, sums[0][:, 1, :m].T) if how.sums else None
    return Blocks(
        codes_of_kernel(codes, how.fmt.element)[:m, : -(-k * how.fmt.element.bits // 8)],
        scales[: stride // how.group, :m].T,
        tensor,
        chunks,
    )


@partial(jax.jit, static_argnames=("how", "config", "interpret"))
def _on_tpu(x, signs, words, tensor, *, how, config, interpret):
    from lowprec.pallas.tpu import rotate_quantize as kernel

    k = how.padded(x.shape[1])
    stride = -(-k // how.group) * how.group
    columns = -(-stride // COLUMNS) * COLUMNS
    codes, scales = kernel.rotate_quantize(
        pad_to(x, (x.shape[0], columns)),
        None if how.rotation is None else rotations(how.rotation, signs, columns),
        None if tensor is None else tensor.reshape(1),
        words,
        how=how,
        stride=stride,
        config=config,
        interpret=interpret,
    )
    codes = codes[:, : -(-k * how.fmt.bits // 8)]
    if how.fmt.bits == 8 and how.fmt.element.dtype is not None:
        codes = lax.bitcast_convert_type(codes, how.fmt.element.dtype)
    return Blocks(codes, scales[: stride // how.group].T, tensor)


def rotations(size: int, signs: Array | None, length: int) -> Float[Array, "stripes 128 size"]:
    """The blocks of D · H for each 128 values of a line, of ±1, exact in bfloat16; one for all if signs are None."""
    blocks = jnp.asarray(np.tile(hadamard_matrix(size), (COLUMNS // size, 1)), jnp.bfloat16)[None]
    if signs is None:
        return blocks
    return pad_to(signs, (length,)).astype(jnp.bfloat16).reshape(-1, COLUMNS, 1) * blocks


def codes_of_kernel(codes: Array, element: ElementFormat) -> Array:
    """uint4 or uint8 codes of a kernel as `Blocks` has them: no bit moves."""
    if element.bits == 4:
        return lax.bitcast_convert_type(codes.reshape(*codes.shape[:-1], codes.shape[-1] // 2, 2), jnp.uint8)
    return codes if element.dtype is None else lax.bitcast_convert_type(codes, element.dtype)
