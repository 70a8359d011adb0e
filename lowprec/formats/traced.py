"""Formats whose parameters are arrays: one compiled program rounds to any of them, `vmap` to many at once.

    sweep = stack_traced(["e4m3fn", "e5m2", "int8", "fx8.4"])
    jax.jit(jax.vmap(lambda fmt: round_to(x, fmt)))(sweep)

The results are those of the static formats, bit for bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from lowprec.errors import UsageError
from lowprec.formats.bits import power_of_two, to_bits
from lowprec.formats.floats import Grid, float_grid
from lowprec.formats.grammar import parse
from lowprec.formats.integers import int_grid
from lowprec.formats.types import Block, BlockFormat, FloatFormat, Format, IntFormat, ScaleSpec
from lowprec.typing import Array, Bool, Float, Int, UInt32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TracedFormat:
    """A float, integer or fixed-point format as a pytree of scalars (of stacked arrays, under `vmap`).

    All values are multiples of 2^(max(e, min_exponent) - mantissa_bits) in the binade e. Integers are the subnormals of
    a format with one long cell.

    Args:
      mantissa_bits, min_exponent: of the cells.
      max, min: the largest and the lowest value.
      overflow: float32 bits of what lies beyond without saturation: infinity, NaN, or 0 for the largest value.
      subnormals, negative_zero: as in `FloatFormat`.
      block, scale: static; of a block format, whose blocks and scales cannot be traced. None: an element format.
    """

    mantissa_bits: Int[Array, "..."]
    min_exponent: Int[Array, "..."]
    max: Float[Array, "..."]
    min: Float[Array, "..."]
    overflow: UInt32[Array, "..."]
    subnormals: Bool[Array, "..."]
    negative_zero: Bool[Array, "..."]
    block: Block | None = field(default=None, metadata={"static": True})
    scale: ScaleSpec | None = field(default=None, metadata={"static": True})

    @property
    def element(self) -> "TracedFormat":
        return replace(self, block=None, scale=None)

    @property
    def grid(self) -> Grid:
        """What the rounding kernel takes."""
        return Grid(
            mantissa_bits=self.mantissa_bits,
            min_exponent=self.min_exponent,
            subnormals=self.subnormals,
            largest=to_bits(self.max),
            lowest=to_bits(0 - self.min),
            smallest=np.uint32(0),
            overflow=self.overflow,
            negative_zero=self.negative_zero,
        )


def traced(fmt: str | Format | TracedFormat) -> TracedFormat:
    """The traced form of a format; one that is traced passes through.

    Raises:
      UsageError: (a ValueError) for tables, mid-rise integers and floats without a zero, which have no such form.
    """
    if isinstance(fmt, TracedFormat):
        return fmt
    fmt = parse(fmt)
    element = fmt.element if isinstance(fmt, BlockFormat) else fmt
    block, scale = (fmt.block, fmt.scale) if isinstance(fmt, BlockFormat) else (None, None)
    if isinstance(element, FloatFormat) and element.has_zero:
        grid = float_grid(element)
    elif isinstance(element, IntFormat) and not element.midrise:
        grid = int_grid(element)
    else:
        raise UsageError(f"format {fmt} cannot be traced: floats with a zero, integers and fixed point can")
    return TracedFormat(
        mantissa_bits=jnp.int32(grid.mantissa_bits),
        min_exponent=jnp.int32(grid.min_exponent),
        max=jnp.float32(element.max),
        min=jnp.float32(element.min),
        overflow=jnp.uint32(grid.overflow),
        subnormals=jnp.bool_(grid.subnormals),
        negative_zero=jnp.bool_(grid.negative_zero),
        block=block,
        scale=scale,
    )


def stack_traced(fmts: Sequence[str | Format]) -> TracedFormat:
    """Formats stacked along a leading axis, to `vmap` or scan over; block formats with the same blocks and scales.

    Raises:
      UsageError: (a ValueError) if blocks or scales differ, or `fmts` is empty.
    """
    members = [traced(fmt) for fmt in fmts]
    if len({(member.block, member.scale) for member in members}) != 1:
        raise UsageError("stacked formats have the same blocks and the same scales (or none at all)")
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)


def traced_float(
    exponent_bits: Int[Array, "..."] | int,
    mantissa_bits: Int[Array, "..."] | int,
    bias: Int[Array, "..."] | int | None = None,
    max: Float[Array, "..."] | float | None = None,
) -> TracedFormat:
    """A signed float with subnormals, from parameters that may be tracers.

    Args:
      exponent_bits: E, 1 to 8.
      mantissa_bits: M, 0 to 23.
      bias: 2^(E-1) - 1 when None.
      max: the largest value; when None every code is a number, as in e2m1fn: (2 - 2^-M) · 2^(2^E - 1 - bias).
    """
    exponent_bits, mantissa_bits = jnp.int32(exponent_bits), jnp.int32(mantissa_bits)
    bias = (1 << (exponent_bits - 1)) - 1 if bias is None else jnp.int32(bias)
    if max is None:
        ones = (1 << (mantissa_bits + 1)) - 1
        max = ones.astype(jnp.float32) * power_of_two((1 << exponent_bits) - 1 - bias - mantissa_bits)
    return _signed(mantissa_bits, 1 - bias, max, -jnp.float32(max), negative_zero=True)


def traced_fixed(
    bits: Int[Array, "..."] | int, fraction_bits: Int[Array, "..."] | int = 0, symmetric: bool = False
) -> TracedFormat:
    """A signed integer or fixed-point format, from parameters that may be tracers: bits 1 to 16."""
    bits, fraction_bits = jnp.int32(bits), jnp.int32(fraction_bits)
    step, half = power_of_two(-fraction_bits), 1 << (bits - 1)
    return _signed(23, 23 - fraction_bits, (half - 1) * step, -(half - int(symmetric)) * step, negative_zero=False)


def _signed(mantissa_bits, min_exponent, max, min, negative_zero):
    leaves, structure = jax.tree.flatten(
        TracedFormat(
            mantissa_bits=jnp.int32(mantissa_bits),
            min_exponent=jnp.int32(min_exponent),
            max=jnp.float32(max),
            min=jnp.float32(min),
            overflow=jnp.uint32(0),
            subnormals=jnp.bool_(True),
            negative_zero=jnp.bool_(negative_zero),
        )
    )
    return jax.tree.unflatten(structure, jnp.broadcast_arrays(*leaves))
