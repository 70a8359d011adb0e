"""What the quantizer kernels share: a tile of 64 rows in the registers of a warpgroup becomes codes and scales."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lowprec.formats.elements import round_elements
from lowprec.formats.random import bits_at
from lowprec.formats.types import FLOAT32
from lowprec.pallas.block_rounding import BlockRounding
from lowprec.pallas.tile_math import (
    SHARED,
    absmax_scale,
    divide_rows,
    element_codes,
    row_amax,
    scale_codes,
    shared_bits,
)
from lowprec.typing import Array, Float, UInt32

ROWS, COLUMNS = 64, 128  # of a tile: those of one wgmma, and those of the widest block
LAYOUT = plgpu.Layout.WGMMA


class Indices(NamedTuple):
    """The flat indices of the elements of a tile in the whole array: first + row · down + column · across."""

    first: Array
    down: int
    across: int

    def of(self, columns: int) -> UInt32[Array, "64 n"]:
        row, column = (plgpu.broadcasted_iota(jnp.uint32, (ROWS, columns), axis, layout=LAYOUT) for axis in (0, 1))
        return self.first.astype(jnp.uint32) + row * np.uint32(self.down) + column * np.uint32(self.across)


class Quantized(NamedTuple):
    """A tile as codes, the scales of each block of columns, and Σz², Σz·q of each row if they are wanted."""

    codes: Array
    scales: list[Array]
    sums: list[Array]


@dataclass(frozen=True)
class TileQuantizer:
    """How the rows of a tile are quantized."""

    how: BlockRounding

    @property
    def blocks(self) -> int:
        """Of a row of a tile."""
        return COLUMNS // self.how.group

    @property
    def code_dtype(self):
        return jnp.uint4 if self.how.fmt.element.bits == 4 else jnp.uint8

    @property
    def scale_dtype(self):
        return jnp.float32 if self.how.fmt.scale.format == FLOAT32 else jnp.uint8

    def __call__(
        self, y: Float[Array, "64 128"], tensor: Array | None, words: tuple[Array, Array] | None, indices: Indices
    ) -> Quantized:
        """Codes and scales of a tile.

        Args:
          tensor: the second level of two-level formats.
          words: of the key, for stochastic rounding.
        """
        fmt, rounding = self.how.fmt, self.how.rounding
        rule: Any = self.how.rule  # an AbsMax: `why_not_sm90` sees to it
        random = self._random(words, indices)
        codes, scales, squares, products = [], [], [], []
        for start in range(0, COLUMNS, self.how.group):
            block = y[:, start : start + self.how.group]
            scale = absmax_scale(row_amax(block, fmt, rule), fmt, rule, tensor)
            z = divide_rows(block, scale, fmt.element)
            bits = None if random is None else random[:, start : start + self.how.group]
            codes.append(element_codes(z, fmt.element, rounding, bits).astype(self.code_dtype))
            scales.append(scale_codes(scale, fmt.scale).astype(self.scale_dtype))
            if self.how.sums:
                squares.append(jnp.sum(z * z, axis=1))
                products.append(jnp.sum(z * round_elements(z, fmt.element, rounding, bits), axis=1))
        sums = [reduce(jnp.add, squares), reduce(jnp.add, products)] if self.how.sums else []
        return Quantized(jnp.concatenate(codes, axis=1), scales, sums)

    def _random(self, words, indices):
        if not self.how.rounding.stochastic:
            return None
        if self.how.noise == "shared":
            return shared_bits(words, indices.of(SHARED))
        return bits_at(words, indices.of(COLUMNS))


def rotated(part: Callable[[int], Any], matrix: Any, size: int) -> Float[Array, "64 128"]:
    """A tile times a block-diagonal matrix of normalized Hadamard blocks, each block a product of its own.

    A product with the whole matrix would bring an infinity or NaN, times the zeros beside the blocks, into the others.

    Args:
      part: of the tile in shared memory, `size` columns, by their number.
      matrix: the blocks one below the other in shared memory, (128, size), of ±1.
    """

    def products(*accumulators):
        for i, accumulator in enumerate(accumulators):
            plgpu.wgmma(accumulator, part(i), matrix.at[pl.ds(i * size, size)])
        return jnp.concatenate([accumulator[...] for accumulator in accumulators], axis=1)

    accumulators = [plgpu.ACC((ROWS, size), jnp.float32) for _ in range(COLUMNS // size)]
    return pl.run_scoped(products, *accumulators) * np.float32(size**-0.5)


def transforms(columns: int, bits: int, widest: int = 128) -> tuple[Any, ...]:
    """How rows of so many values of so many bits lie in shared memory.

    Args:
      widest: bytes of a swizzle, those that are sliced apart at most.
    """
    swizzle = min(plgpu.find_swizzle(columns * bits), widest)
    tiling, swizzling = plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)  # type: ignore[abstract]
    return tiling, swizzling
