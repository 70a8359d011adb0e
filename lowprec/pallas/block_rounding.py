"""What the quantizer kernels are asked for, and what they give: blocks of codes with their scales."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lowprec.errors import UsageError, unknown
from lowprec.formats.grammar import parse
from lowprec.formats.random import DrawnKey, Key
from lowprec.formats.rounding import Rounding, parse_rounding
from lowprec.formats.types import E4M3FN, FLOAT32, BlockFormat, FloatFormat, Format, IntFormat
from lowprec.quantizers.scales import AbsMax, ScaleRule
from lowprec.typing import Array, Float, UInt32

ROTATIONS = (16, 32, 64, 128)
GROUPS = (16, 32, 64, 128)
NOISE = ("each", "shared")


class Blocks(NamedTuple):
    """A matrix as codes and scales, its blocks along the last axis.

    Args:
      codes: (m, k) in jax's dtype for the elements, e.g. float8_e4m3fn, int8; uint8 where there is none; below 8 bits
        uint8 packed along the last axis, as a `QTensor` has them: (m, ⌈k · bits / 8⌉).
      scales: (m, ⌈k/g⌉) float32, or the codes of the scale format as uint8.
      tensor: the second level of two-level formats, a float32 scalar; else None.
      sums: Σz² and Σz·q over chunks of 128, two arrays (m, ⌈k/128⌉), if they were asked for: z are the scaled values, q
        the elements they were rounded to.
    """

    codes: Array
    scales: Array
    tensor: Float[Array, ""] | None = None
    sums: tuple[Array, Array] | None = None


@dataclass(frozen=True)
class BlockRounding:
    """How the blocks of a matrix are rounded.

    Args:
      fmt: with blocks (1, g).
      rotation: the size of the Hadamard blocks along the axis of the blocks; None for none.
      rule: of the scales.
      noise: of stochastic rounding: "each" element has 32 random bits of its own, those of `random_bits`; "shared":
        four elements share a hash, 8 bits each and half a last bit, which is cheaper; the chance of rounding up is off
        by 1/512 at most.
      sums: whether Σz² and Σz·q are wanted.
    """

    fmt: BlockFormat
    rotation: int | None = None
    rule: ScaleRule = AbsMax()
    rounding: Rounding = Rounding()
    noise: str = "each"
    sums: bool = False

    @property
    def group(self) -> int:
        return self.fmt.block[1]  # type: ignore[return-value]

    def padded(self, length: int) -> int:
        """The length of the axis once rotations divide it."""
        step = self.rotation or 1
        return -(-length // step) * step


def block_rounding(operation: str, fmt: str | Format, rotation, rounding, rule, noise, sums=False) -> BlockRounding:
    """Raises: UsageError: (a ValueError) that names what does not fit."""
    parsed, mode = parse(fmt), parse_rounding(rounding)
    if not isinstance(parsed, BlockFormat) or not isinstance(parsed.block, tuple) or parsed.block[0] != 1:
        raise UsageError(f"{operation} is for blocks of 1x<g>, e.g. fp8_block128, nvfp4, mxfp8; not for {parsed}")
    if rotation is not None and rotation not in ROTATIONS:
        raise UsageError(f"{operation} rotates blocks of {', '.join(map(str, ROTATIONS))}, not of {rotation}")
    if noise not in NOISE:
        raise unknown("noise", noise, NOISE)
    if noise == "shared" and mode != Rounding("stochastic"):
        raise UsageError(f"only stochastic rounding with all its bits has shared noise, not {mode}")
    return BlockRounding(parsed, rotation, rule, mode, noise, sums)


def why_not_sm90(how: BlockRounding, rows: int, columns: int, dtype) -> str | None:
    """Why the kernels for Hopper cannot round a matrix so, or None; `columns` along the blocks."""
    element, spec = how.fmt.element, how.fmt.scale
    if 0 in (rows, columns):
        return "the matrix is empty"
    if str(dtype) not in ("bfloat16", "float32") or (how.rotation and str(dtype) != "bfloat16"):
        return f"wgmma rotates bfloat16, not {dtype}" if how.rotation else f"it reads bfloat16 and float32, not {dtype}"
    if not isinstance(how.rule, AbsMax):
        # 4/6 compares two sums of squares: summed in another order, ties and near-ties would go the other way.
        return f"scales are absmax's alone; {how.rule} would not come out bit for bit"
    simple = isinstance(element, IntFormat) and not element.midrise
    narrow = isinstance(element, FloatFormat) and element.has_zero and element.subnormals and element.negative_zero
    if element.bits not in (4, 8) or not (simple or narrow) or element.min == 0:
        return f"elements are signed floats and integers of 4 and 8 bits, not {element}"
    if how.group not in GROUPS:
        return f"blocks have {', '.join(map(str, GROUPS))} elements, not {how.group}"
    if spec.format not in (FLOAT32, E4M3FN) and not spec.power_of_two:
        return f"scales are float32, e8m0 or e4m3fn, not {spec}"
    if how.rounding not in (Rounding(), Rounding("stochastic")):
        return f"it rounds to nearest even or stochastically, not {how.rounding}"
    if how.rounding.stochastic and rows * columns > 1 << 32:
        return "beyond 2^32 elements an index has two words"
    return None


def why_not_tpu(how: BlockRounding, rows: int, columns: int, dtype) -> str | None:
    """Why the kernel for TPUs cannot round a matrix so, or None; `columns` along the blocks."""
    if how.sums:
        return "its sums are left to XLA"
    return why_not_sm90(how, rows, columns, dtype)


def words_of(operation: str, how: BlockRounding, key: Key | None) -> UInt32[Array, " 2"] | None:
    """The two words that `random_bits` takes of a key; None where nothing is random.

    Raises:
      UsageError: (a ValueError) for stochastic rounding without a key.
    """
    if not how.rounding.stochastic:
        return None
    if key is None:
        raise UsageError(f"{operation}: {how.rounding} rounding needs a key")
    return key.words if isinstance(key, DrawnKey) else jax.random.bits(key, (2,), jnp.uint32)


def check_signs(operation: str, how: BlockRounding, signs: Array | None, length: int) -> None:
    """Raises: UsageError: (a ValueError) unless signs are those of an axis of this length."""
    if signs is None:
        return
    if how.rotation is None:
        raise UsageError(f"{operation} has signs, and no rotation that they belong to")
    rotated = how.padded(length)
    if signs.shape != (rotated,):
        raise UsageError(f"{operation} takes a sign for each of {rotated} rotated values, not signs of {signs.shape}")


def check_matrix(operation: str, x: Array) -> None:
    """Raises: UsageError: (a ValueError) unless x is a matrix of floats that formats round."""
    if x.ndim != 2 or str(x.dtype) not in ("bfloat16", "float32", "float16"):
        raise UsageError(f"{operation} takes a matrix of bfloat16, float32 or float16, not {x.dtype}{list(x.shape)}")
