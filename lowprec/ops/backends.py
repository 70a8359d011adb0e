"""Who computes the products. `emulate` multiplies dequantized values in float32 and defines the result; all others
agree with it but for the rounding of sums. Who cannot serve a pair of operands says why.
"""

from typing import NamedTuple

import jax.numpy as jnp

from lowprec.errors import UsageError, unknown
from lowprec.ops.accumulation import Accumulation
from lowprec.ops.codes import rows_of
from lowprec.ops.kernels import BLOCKS, CHANNELS
from lowprec.ops.multiplier import Multiplier
from lowprec.ops.native import BFLOAT16, FLOAT16, FP8, INT8, SCALED
from lowprec.ops.operand import Operand
from lowprec.pallas.dispatch import say_once
from lowprec.pallas.target import Target, target
from lowprec.typing import Array, Float

BACKENDS = ("auto", "emulate", "native", "pallas")

NATIVE = (INT8, FP8, SCALED, FLOAT16, BFLOAT16)
KERNELS = (BLOCKS, CHANNELS)

# What `auto` takes on a kind of device: the first that serves, from the shortest side of the product on. What nobody
# serves is emulated in float32, which is faster than XLA's conversions on CPUs and far slower than all else elsewhere.
# Of our kernels none was measured yet: they stand where XLA has nothing, for whole tiles.
AUTO: dict[str, tuple[tuple[Multiplier, int], ...]] = {
    "cpu": ((INT8, 1),),
    "gpu": ((INT8, 16), (FLOAT16, 1), (BFLOAT16, 1)),
    "ada": ((INT8, 16), (FP8, 16), (FLOAT16, 1), (BFLOAT16, 1)),
    "hopper": ((INT8, 16), (FP8, 16), (FLOAT16, 1), (BFLOAT16, 1), (BLOCKS, 128)),
    "blackwell": ((INT8, 16), (FP8, 16), (SCALED, 128), (FLOAT16, 1), (BFLOAT16, 1)),
    "tpu": ((INT8, 1), (BFLOAT16, 1)),
}
_CAPABILITIES = {
    "8.9": "ada",
    "9.0": "hopper",
    "10.0": "blackwell",
    "10.3": "blackwell",
    "12.0": "ada",  # Blackwell for workstations: XLA's scaled products are those of 10
}


class Service(NamedTuple):
    """Who computes a product.

    Attributes:
      by: the multiplier; None: it is emulated.
      refused: who was asked before, and why it does not serve.
    """

    by: Multiplier | None
    refused: tuple[tuple[Multiplier, str], ...] = ()

    def reasons(self) -> str:
        return "; ".join(dict.fromkeys(f"{multiplier}: {reason}" for multiplier, reason in self.refused))


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
    if backend == "native" and accumulation != Accumulation():
        raise UsageError(f"backend 'native' accumulates in float32, not in {accumulation}; the others do")
    by, refused = service = served_by(a, b, backend, accumulation)
    quantized = not (a.rounded is b.rounded is None)
    if backend == "native" and by is None and quantized:
        raise UsageError(f"backend 'native' cannot multiply {a.name} and {b.name}: {refused[-1][1]}")
    if backend == "pallas" and by not in KERNELS and quantized:
        say_once(f"the product of {a.name} and {b.name}", service.reasons() or f"sums in {accumulation}")
    return accumulation(a, b) if by is None else by.multiply(a, b)


def served_by(a: Operand, b: Operand, backend: str, accumulation: Accumulation = Accumulation()) -> Service:
    """Who computes the product of two operands on the target device: from formats, shapes and the device alone.

    Raises:
      UsageError: (a ValueError) for an unknown backend.
    """
    candidates = _candidates(backend, target())
    if accumulation != Accumulation():
        return Service(None)
    shortest = min(rows_of(a), rows_of(b), a.source.shape[a.axis])
    refused: list[tuple[Multiplier, str]] = []
    for multiplier, least in candidates:
        small = f"no side of a product is shorter than {least} where it pays" if shortest < least else None
        reason = small or multiplier.why_not(a, b)
        if reason is None:
            return Service(multiplier, tuple(refused))
        refused.append((multiplier, reason))
    return Service(None, tuple(refused))


def may_take(dtype: jnp.dtype | None, backend: str) -> bool:
    """Whether a product on the target device may take elements of a dtype rather than values."""
    return any(dtype in multiplier.dtypes for multiplier, _ in _candidates(backend, target()))


def _candidates(backend: str, device: Target) -> tuple[tuple[Multiplier, int], ...]:
    """Whom a backend asks on a device, in this order, and from which length of the shortest side on."""
    if backend not in BACKENDS:
        raise unknown("backend", backend, BACKENDS)
    if backend == "auto":
        kind = _CAPABILITIES.get(device.capability or "", device.platform)
        return AUTO.get(kind, ())
    named = {"emulate": (), "native": NATIVE, "pallas": (*KERNELS, *NATIVE)}[backend]
    return tuple((multiplier, 1) for multiplier in named)
