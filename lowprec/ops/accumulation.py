"""How the sums of a product are accumulated: in float32, in the narrow registers of a tensor core, or by integers."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import lax

from lowprec.errors import UsageError
from lowprec.ops.codes import codes, dimension_numbers, output_scale, whole_numbers, why_scales_stay
from lowprec.ops.operand import Operand
from lowprec.typing import Array, Float


@dataclass(frozen=True)
class Accumulation:
    """Sums in float32, as XLA's own products have them. Every other accumulation is emulated."""

    def __call__(self, a: Operand, b: Operand) -> Float[Array, "..."]:
        """The product of two operands along their contraction axes."""
        wide_a, wide_b = (operand.values.astype(jnp.float32) for operand in (a, b))
        return lax.dot_general(wide_a, wide_b, dimension_numbers(a, b), precision="highest")

    def __str__(self):
        return "float32"


@dataclass(frozen=True)
class NarrowAccumulation(Accumulation):
    """Sums in a register of few bits, as the fp8 products of Hopper's tensor cores have them.

    The products of a step are summed up in float32 and added to the register, which drops what lies below its last
    bit. DeepSeek-V3 (arXiv 2412.19437, §3.3.2) found about 14 bits, and has the register promoted, that is added to a
    float32 sum and cleared, every 128 products. On Gaussian operands the root mean square error relative to that of
    the product is 4.3e-4 at K = 512 and 3.2e-3 at K = 4096 without promotion, 1.3e-4 with it.

    Values are multiplied after their scales: a scale that is no power of two shifts which bits are last.

    Args:
      bits: of the significand, the leading one among them.
      step: products added at once.
      promote: products after which the register is promoted, a multiple of step; None: never.
    """

    bits: int = 14
    step: int = 32
    promote: int | None = 128

    def __post_init__(self):
        if not 1 <= self.bits <= 24:
            raise UsageError(f"an accumulator has 1 to 24 bits of significand, not {self.bits}")
        if self.step < 1:
            raise UsageError(f"a step adds at least one product, not {self.step}")
        if self.promote is not None and (self.promote < 1 or self.promote % self.step):
            near = max(round(self.promote / self.step), 1) * self.step
            raise UsageError(f"promotion happens after whole steps of {self.step}: after {near}, not {self.promote}")

    def __call__(self, a, b):
        length = a.source.shape[a.axis]
        steps = -(-length // self.step)
        together = min(self.promote // self.step, steps) if self.promote else steps
        chunks = [_chunks(operand.values, operand.axis, self.step, together) for operand in (a, b)]
        dims = dimension_numbers(a, b)

        def add(register, operands):
            x, y = operands
            return self._cut(register + lax.dot_general(x, y, dims, precision="highest")), None

        def promote(total, operands):
            return total + lax.scan(add, jnp.zeros_like(total), operands)[0], None

        return lax.scan(promote, _zeros_of_product(a, b), tuple(chunks))[0]

    def _cut(self, x):
        mask = np.uint32(0xFFFFFFFF << (24 - self.bits) & 0xFFFFFFFF)
        return lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint32) & mask, jnp.float32)

    def __str__(self):
        promoted = f"promoted to float32 every {self.promote} products" if self.promote else "never promoted"
        return f"{self.bits} bits, {self.step} products at once, {promoted}"


@dataclass(frozen=True)
class IntegerAccumulation(Accumulation):
    """Integers of up to 16 bits, whose sums are exact over a chunk and spilled to float32 between chunks.

    The chained int32 products of dynamic fixed point (Das et al., arXiv 1802.00930). A product of two 16-bit codes
    does not fit into float32: each is split in two halves of 8 bits, of which all partial sums of a chunk are exact.

    Args:
      chunk: products summed exactly, at most 512.
    """

    chunk: int = 256

    def __post_init__(self):
        # Two sums of chunk products of at most 2^14 stay whole in float32: 2 · 512 · 2^14 = 2^24.
        if not 1 <= self.chunk <= 512:
            raise UsageError(f"a chunk of exact sums has 1 to 512 products, not {self.chunk}")

    def __call__(self, a, b):
        for operand in (a, b):
            reason = why_scales_stay(operand)
            if reason is None and not whole_numbers(operand.rounded.fmt, 16):
                reason = f"the elements of {operand.name} ({operand.rounded.fmt}) are no integers of at most 16 bits"
            if reason:
                raise UsageError(f"sums of integers cannot multiply {a.name} and {b.name}: {reason}")
        dims = dimension_numbers(a, b)
        halves = tuple(_halves(_chunks(codes(operand), operand.axis, self.chunk)) for operand in (a, b))

        def add(total, chunk):
            (a_high, a_low), (b_high, b_low) = chunk
            product = lambda x, y: lax.dot_general(x, y, dims, precision="highest")
            middle = product(a_high, b_low) + product(a_low, b_high)
            return total + ((256 * product(a_high, b_high) + middle) * 256 + product(a_low, b_low)), None

        total = lax.scan(add, _zeros_of_product(a, b), halves)[0]
        return total * output_scale(a, -1) * output_scale(b, -2)

    def __str__(self):
        return f"integers, exact over {self.chunk} products, then float32"


def _chunks(x, axis, *sizes):
    """The contraction axis in chunks of the (first) size, filled up with zeros; leading axes count the chunks.

    Sizes (n, m) give (rest, m) leading axes: m chunks of n go together.
    """
    axis %= x.ndim
    size, together = sizes[0], int(np.prod(sizes[1:]))
    short = -x.shape[axis] % (size * together)
    x = jnp.pad(x.astype(jnp.float32), [(0, short if i == axis else 0) for i in range(x.ndim)])
    counts = (x.shape[axis] // (size * together), *sizes[1:])
    x = x.reshape(*x.shape[:axis], *counts, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, range(axis, axis + len(counts)), range(len(counts)))


def _halves(whole):
    """high · 256 + low, both of at most 128 in magnitude."""
    high = jnp.floor((whole + 128) * np.float32(1 / 256))
    return high, whole - 256 * high


def _zeros_of_product(a, b):
    rows, columns = a.source.shape[-3 - a.axis], b.source.shape[-3 - b.axis]
    return jnp.zeros((*a.source.shape[:-2], rows, columns), jnp.float32)
