"""The products themselves. `emulate` multiplies dequantized values in float32 and defines the result; `native` gives
XLA codes to multiply; `auto` takes native where it pays. Who cannot serve a pair of operands says why.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import lax

from lowprec.errors import UsageError, unknown
from lowprec.formats import Format, element_of
from lowprec.formats.blocks import BlockLayout
from lowprec.formats.elements import code_dtype, decode, encode_rounded
from lowprec.formats.packing import pack, unpack
from lowprec.formats.scaling import Scale
from lowprec.ops.accumulation import Accumulation, IntegerAccumulation
from lowprec.ops.codes import codes, dimension_numbers, native_dtype, output_scale, whole_numbers, why_scales_stay
from lowprec.ops.operand import Operand
from lowprec.quantizers import Rounded
from lowprec.typing import Array, Float

BACKENDS = ("auto", "emulate", "native")


def multiply(a: Operand, b: Operand, backend: str, accumulation: Accumulation = Accumulation()) -> Float[Array, "..."]:
    """The product of two operands along their contraction axes, float32: (…, rows of a, columns of b).

    Rotations along their other axes are undone.
    """
    y = _multiply(a, b, backend, accumulation)
    for operand, axis in ((a, -2), (b, -1)):
        if operand.outer is not None:
            y = operand.outer.undo(y, axis)
    return y


def _multiply(a, b, backend, accumulation):
    if backend not in BACKENDS:
        raise unknown("backend", backend, BACKENDS)
    if backend == "native" and accumulation != Accumulation():
        raise UsageError(f"backend 'native' accumulates in float32, not in {accumulation}; 'emulate' and 'auto' do")
    if backend == "emulate" or accumulation != Accumulation() or a.rounded is b.rounded is None:
        return accumulation(a, b)
    reason = why_not_native(a, b)
    if backend == "native" and reason:
        raise UsageError(f"backend 'native' cannot multiply {a.name} and {b.name}: {reason}")
    if reason or (backend == "auto" and not _native_pays(a)):
        return accumulation(a, b)
    return _native(a, b)


def why_not_native(a: Operand, b: Operand) -> str | None:
    """The reason why XLA has no product for these operands, or None."""
    for operand in (a, b):
        if operand.rounded is not None and native_dtype(operand.rounded.fmt) is None:
            return f"XLA multiplies no {element_of(operand.rounded.fmt)}"
        reason = why_scales_stay(operand)
        if reason:
            return reason
    kinds = [jnp.issubdtype(native_dtype(operand.rounded.fmt), jnp.integer) for operand in (a, b)]
    if kinds[0] != kinds[1]:
        return f"one of {a.name} and {b.name} is an integer and the other is not"
    return None


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
        dtype = native_dtype(rounded.fmt) if element.bits >= 8 else None
        if dtype is None:
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
    if backend == "emulate" or native_dtype(rounded.fmt) is None or (backend == "auto" and not _native_pays(operand)):
        return None
    return native_dtype(rounded.fmt)


def _native_pays(a):
    # XLA's CPU backend has fast int8 products, and converts fp8 before it multiplies; GPUs and TPUs have all of them.
    return jax.default_backend() != "cpu" or native_dtype(a.rounded.fmt) == jnp.int8


def _native(a, b):
    a_codes, b_codes = (codes(operand).astype(native_dtype(operand.rounded.fmt)) for operand in (a, b))
    total = jnp.int32 if a_codes.dtype == jnp.int8 else jnp.float32
    y = lax.dot_general(a_codes, b_codes, dimension_numbers(a, b), preferred_element_type=total)
    return y.astype(jnp.float32) * output_scale(a, -1) * output_scale(b, -2)
