"""The products themselves. `emulate` multiplies dequantized values in float32 and defines the result; `native` gives
XLA codes to multiply; `auto` takes native where it pays. Who cannot serve a pair of operands says why.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import lax

from lowprec.errors import UsageError, unknown
from lowprec.formats import FloatFormat, Format, IntFormat, element_of
from lowprec.formats.blocks import BlockLayout
from lowprec.formats.scaling import Scale
from lowprec.ops.operand import Operand
from lowprec.quantizers import Rounded
from lowprec.typing import Array, Float

BACKENDS = ("auto", "emulate", "native")


def multiply(a: Operand, b: Operand, backend: str) -> Float[Array, "..."]:
    """The product of two operands along their contraction axes, float32: (…, rows of a, columns of b)."""
    if backend not in BACKENDS:
        raise unknown("backend", backend, BACKENDS)
    if backend == "emulate" or a.rounded is b.rounded is None:
        return _emulate(a, b)
    reason = why_not_native(a, b)
    if backend == "native" and reason:
        raise UsageError(f"backend 'native' cannot multiply {a.name} and {b.name}: {reason}")
    if reason or (backend == "auto" and not _native_pays(a)):
        return _emulate(a, b)
    return _native(a, b)


def why_not_native(a: Operand, b: Operand) -> str | None:
    """The reason why XLA has no product for these operands, or None."""
    for operand in (a, b):
        if operand.rounded is None:
            return f"{operand.name} is not quantized"
        fmt = operand.rounded.fmt
        if native_dtype(fmt) is None:
            return f"XLA multiplies no {element_of(fmt)}"
        scale = operand.rounded.scale
        if scale is not None and (isinstance(fmt.block, tuple) or not _constant_along(operand)):
            return f"the scales of {operand.name} ({fmt}) vary along the contraction axis"
    kinds = [jnp.issubdtype(native_dtype(operand.rounded.fmt), jnp.integer) for operand in (a, b)]
    if kinds[0] != kinds[1]:
        return f"one of {a.name} and {b.name} is an integer and the other is not"
    return None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Kept:
    """A quantized operand between the forward and the backward pass: as codes where products take codes, else values.

    Args:
      array: the elements in the dtype in which XLA multiplies them, split into blocks; or the values.
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
        elements = self.array.astype(jnp.float32)
        scaled = elements if self.scale is None else self.scale.scaler(self.fmt.element).multiply(elements)
        return Operand(name, self.layout.merge(scaled), Rounded(self.fmt, self.layout, elements, self.scale, scaled))


def keep(operand: Operand, backend: str) -> Kept:
    """The least that restores an operand for a product on this backend."""
    rounded = operand.rounded
    codes = None if rounded is None else native_dtype(rounded.fmt)
    if codes is None or backend == "emulate" or (backend == "auto" and not _native_pays(operand)):
        return Kept(operand.values, None, None, None)
    return Kept(rounded.elements.astype(codes), rounded.scale, rounded.fmt, rounded.layout)


def native_dtype(fmt) -> jnp.dtype | None:
    """The dtype in which XLA multiplies elements of a format exactly; int8 for narrower integers."""
    element = element_of(fmt)
    if isinstance(element, IntFormat):
        narrow = element.bits <= 8 and element.signed and not element.midrise and element.fraction_bits == 0
        return jnp.dtype(jnp.int8) if narrow else None
    if isinstance(element, FloatFormat) and element.dtype in (jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e5m2):
        return element.dtype
    return None


def _native_pays(a):
    # XLA's CPU backend has fast int8 products, and converts fp8 before it multiplies; GPUs and TPUs have all of them.
    return jax.default_backend() != "cpu" or native_dtype(a.rounded.fmt) == jnp.int8


def _constant_along(operand):
    """Whether one scale serves the whole contraction axis: the operand was scaled by tensor, or by rows along it."""
    scale_shape = operand.rounded.layout.scale_shape
    return scale_shape[operand.axis] == 1


def _emulate(a, b):
    return lax.dot_general(
        a.values.astype(jnp.float32), b.values.astype(jnp.float32), _dimension_numbers(a, b), precision="highest"
    )


def _native(a, b):
    a_codes, b_codes = _codes(a), _codes(b)
    total = jnp.int32 if a_codes.dtype == jnp.int8 else jnp.float32
    y = lax.dot_general(a_codes, b_codes, _dimension_numbers(a, b), preferred_element_type=total)
    return y.astype(jnp.float32) * _output_scale(a, -1) * _output_scale(b, -2)


def _codes(operand):
    rounded = operand.rounded
    return rounded.layout.merge(rounded.elements).astype(native_dtype(rounded.fmt))


def _output_scale(operand, axis):
    """The scale of an operand as a factor of the product: its contraction axis becomes the other operand's axis."""
    scale = operand.rounded.scale
    if scale is None:
        return jnp.float32(1)
    total = scale.total().reshape(operand.rounded.layout.scale_shape)
    return jnp.expand_dims(jnp.squeeze(total, operand.axis), axis)


def _dimension_numbers(a, b):
    batch = tuple(range(a.source.ndim - 2))
    return ((a.axis % a.source.ndim,), (b.axis % b.source.ndim,)), (batch, batch)
