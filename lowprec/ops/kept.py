"""A quantized operand between the forward and the backward pass: as codes, or as values."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from lowprec.formats import Format, element_of
from lowprec.formats.blocks import BlockLayout
from lowprec.formats.elements import code_dtype, decode, encode_rounded
from lowprec.formats.packing import pack, unpack
from lowprec.formats.scaling import Scale
from lowprec.ops.accumulation import Accumulation, IntegerAccumulation
from lowprec.ops.backends import may_take
from lowprec.ops.codes import native_dtype, whole_numbers
from lowprec.ops.operand import Operand
from lowprec.quantizers import Rounded
from lowprec.typing import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Kept:
    """A quantized operand between the forward and the backward pass: as codes, or as values.

    Args:
      array: the elements, split into blocks, in the dtype in which XLA multiplies them, or as (packed) unsigned codes;
        or the values.
      scale: of the elements; None with values.
      fmt, layout: of the elements; None with values.
    """

    array: Array
    scale: Scale | None
    fmt: Format | None = field(metadata={"static": True})
    layout: BlockLayout | None = field(metadata={"static": True})

    def restore(self, name: str) -> Operand:
        if self.fmt is None:
            return Operand(name, self.array, None)
        elements = self._elements()
        scaled = elements if self.scale is None else self.scale.scaler(self.fmt.element).multiply(elements)
        return Operand(name, self.layout.merge(scaled), Rounded(self.fmt, self.layout, elements, self.scale, scaled))

    def _elements(self):
        if not jnp.issubdtype(self.array.dtype, jnp.unsignedinteger):
            return self.array.astype(jnp.float32)
        element = element_of(self.fmt)
        packed = element.bits < 8
        return decode(unpack(self.array, element.bits, self.layout.split_shape[-1]) if packed else self.array, element)


def keep(operand: Operand, backend: str, accumulation: Accumulation = Accumulation(), *, narrow: bool = False) -> Kept:
    """What restores an operand for a product on this backend: as values where the product takes values.

    Args:
      narrow: as codes in the fewest bytes, whatever the product takes.
    """
    rounded = operand.rounded
    if narrow:
        element = element_of(rounded.fmt)
        dtype = native_dtype(rounded.fmt)
        if dtype is None or 8 * dtype.itemsize > element.bits:
            codes = encode_rounded(rounded.elements, element).astype(code_dtype(element.bits))
            codes = pack(codes, element.bits) if element.bits < 8 else codes
            return Kept(codes, rounded.scale, rounded.fmt, rounded.layout)
    else:
        dtype = _code_dtype(operand, backend, accumulation)
    if dtype is None:
        return Kept(operand.values, None, None, None)
    return Kept(rounded.elements.astype(dtype), rounded.scale, rounded.fmt, rounded.layout)


def _code_dtype(operand, backend, accumulation):
    """In which a product takes the operand; None where it takes values."""
    rounded = operand.rounded
    if rounded is None or rounded.residual is not None:
        return None
    if isinstance(accumulation, IntegerAccumulation):
        return jnp.dtype(jnp.int16) if whole_numbers(rounded.fmt, 16) else None
    dtype = native_dtype(rounded.fmt)
    return dtype if may_take(dtype, backend) else None
