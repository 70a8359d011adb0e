"""The types of number formats: which values exist, how codes map to them, which values share a scale.

All are frozen and hashable, hence static under `jit`. `str(fmt)` is the canonical name, `parse(str(fmt)) == fmt`.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from lowprec.formats.closed_forms import ClosedForm

NanKind = Literal["ieee", "fn", "fnuz", "none"]
Block = Literal["tensor", "row"] | tuple[int, int]

# The native dtype of those formats that jax has one for: (exponent bits, mantissa bits, bias, nan, has_inf) -> name.
_NATIVE_FLOATS = {
    (8, 23, 127, "ieee", True): "float32",
    (5, 10, 15, "ieee", True): "float16",
    (8, 7, 127, "ieee", True): "bfloat16",
    (5, 2, 15, "ieee", True): "float8_e5m2",
    (4, 3, 7, "fn", False): "float8_e4m3fn",
    (4, 3, 7, "ieee", True): "float8_e4m3",
    (3, 4, 3, "ieee", True): "float8_e3m4",
    (4, 3, 8, "fnuz", False): "float8_e4m3fnuz",
    (5, 2, 16, "fnuz", False): "float8_e5m2fnuz",
    (4, 3, 11, "fnuz", False): "float8_e4m3b11fnuz",
    (2, 1, 1, "none", False): "float4_e2m1fn",
}


class _Named:
    def __str__(self: Any):
        from lowprec.formats import grammar  # the grammar needs the types

        return grammar.name_of(self)


@dataclass(frozen=True)
class FloatFormat(_Named):
    """A binary floating-point format: value = (-1)^s · 2^(max(e, 1) - bias) · (f / 2^M + [e > 0]).

    Args:
      exponent_bits: E, 0 to 8. With 0 the values are equally spaced.
      mantissa_bits: M, 0 to 23, the explicit bits of the significand.
      bias: of the exponent; 2^(E-1) - 1 when None.
      has_inf: whether the format has infinities; as `nan == "ieee"` when None.
      nan: "ieee": every code with the top exponent that is not infinity; "fn": the one with all bits set;
        "fnuz": the code of negative zero; "none": no code.
      signed: whether there is a sign bit.
      negative_zero: whether negative zero exists (never in unsigned and "fnuz" formats, or where there is no zero).
      subnormals: when False, nothing lies between zero and the smallest normal number; with M = 0 there is
        no zero either and exponent field 0 is a power of two as any other (e8m0).
    Raises:
      ValueError: if the fields contradict each other or float32 does not contain the format.
    """

    exponent_bits: int
    mantissa_bits: int
    bias: int | None = None
    has_inf: bool | None = None
    nan: NanKind = "ieee"
    signed: bool = True
    negative_zero: bool = True
    subnormals: bool = True

    def __post_init__(self):
        if not 0 <= self.exponent_bits <= 8 or not 0 <= self.mantissa_bits <= 23:
            raise ValueError(
                f"exponent_bits is 0 to 8 and mantissa_bits 0 to 23, not {self.exponent_bits}, {self.mantissa_bits}"
            )
        if self.nan not in ("ieee", "fn", "fnuz", "none"):
            raise ValueError(f"nan is ieee, fn, fnuz or none, not {self.nan!r}")
        if self.exponent_bits + self.mantissa_bits == 0:
            raise ValueError("a float format needs an exponent or a mantissa bit")
        if self.exponent_bits == 0 and (self.nan == "ieee" or not self.subnormals):
            raise ValueError("without exponent bits there is neither an ieee NaN nor a normal number")
        if self.bias is None:
            object.__setattr__(self, "bias", 2 ** (self.exponent_bits - 1) - 1 if self.exponent_bits else 0)
        if self.has_inf is None:
            object.__setattr__(self, "has_inf", self.nan == "ieee")
        if self.nan == "fnuz" and not self.signed:
            raise ValueError("fnuz puts its NaN at negative zero: an unsigned format has none (use fn)")
        if self.nan == "fnuz" and not self.has_zero:
            raise ValueError("fnuz puts its NaN at negative zero: a format without a zero has none (use fn)")
        if self.nan == "fnuz" or not self.signed or not self.has_zero:
            object.__setattr__(self, "negative_zero", False)
        if self.max_code < 1 or self.max == 0:
            raise ValueError(f"no code is left for a positive number in {self!r}")
        smallest = self.min_exponent - (self.mantissa_bits if self.subnormals else 0)
        if smallest < -149 or self.max_exponent > 127:
            raise ValueError(f"float32 does not contain the format {self!r}")

    @property
    def bits(self) -> int:
        return self.exponent_bits + self.mantissa_bits + self.signed

    @property
    def has_zero(self) -> bool:
        return self.subnormals or self.mantissa_bits > 0

    @property
    def min_exponent(self) -> int:
        """The exponent of the smallest normal number."""
        return (1 if self.has_zero else 0) - self.bias

    @property
    def max_exponent(self) -> int:
        """The exponent of the largest finite number (of the top binade, when there are no exponent bits)."""
        return max(self.max_code >> self.mantissa_bits, 1 if self.has_zero else 0) - self.bias

    @property
    def max_code(self) -> int:
        """The code of the largest finite number, without its sign."""
        codes = 1 << (self.exponent_bits + self.mantissa_bits)
        if self.nan == "ieee":
            return codes - (1 << self.mantissa_bits) - 1
        return codes - 1 - (self.nan == "fn") - self.has_inf

    @property
    def inf_code(self) -> int | None:
        return self.max_code + 1 if self.has_inf else None

    @property
    def nan_code(self) -> int | None:
        """The canonical NaN: the quiet one in ieee formats."""
        magnitude = self.exponent_bits + self.mantissa_bits
        if self.nan == "ieee":
            first = self.max_code + 1 + self.has_inf
            quiet = self.max_code + 1 + (1 << self.mantissa_bits >> 1)
            return max(first, quiet) if max(first, quiet) < 1 << magnitude else None
        return {"fn": (1 << magnitude) - 1, "fnuz": 1 << magnitude, "none": None}[self.nan]

    def magnitude(self, code: int) -> float:
        """The value of a finite non-negative code."""
        exponent, fraction = code >> self.mantissa_bits, code & ((1 << self.mantissa_bits) - 1)
        if not self.has_zero:
            return math.ldexp(1.0, exponent - self.bias)
        if exponent == 0 and not self.subnormals:
            return 0.0
        significand = fraction + ((1 << self.mantissa_bits) if exponent else 0)
        return math.ldexp(significand, max(exponent, 1) - self.bias - self.mantissa_bits)

    @property
    def max(self) -> float:
        return self.magnitude(self.max_code)

    @property
    def min(self) -> float:
        """The lowest finite value (`min_normal` and `min_subnormal` are the smallest magnitudes)."""
        if self.signed:
            return -self.max
        return 0.0 if self.has_zero else self.min_normal

    @property
    def min_normal(self) -> float:
        return math.ldexp(1.0, self.min_exponent)

    @property
    def min_subnormal(self) -> float:
        """The smallest positive value."""
        return math.ldexp(1.0, self.min_exponent - self.mantissa_bits) if self.subnormals else self.min_normal

    @property
    def dtype(self) -> jnp.dtype | None:
        """The native jax dtype with these values, or None."""
        if self == E8M0:
            return jnp.dtype(jnp.float8_e8m0fnu)
        if not (self.signed and self.subnormals and self.negative_zero == (self.nan != "fnuz")):
            return None
        name = _NATIVE_FLOATS.get((self.exponent_bits, self.mantissa_bits, self.bias, self.nan, self.has_inf))
        return jnp.dtype(getattr(jnp, name)) if name else None


@dataclass(frozen=True)
class IntFormat(_Named):
    """An integer or fixed-point format: value = code · 2^-fraction_bits, two's complement when signed.

    Args:
      bits: 1 to 16.
      symmetric: leave out the most negative value.
      fraction_bits: bits after the binary point.
      midrise: values lie half a step off zero, (code + ½) · 2^-fraction_bits (QuEST, arXiv 2502.05003).
    """

    bits: int
    signed: bool = True
    symmetric: bool = False
    fraction_bits: int = 0
    midrise: bool = False

    def __post_init__(self):
        if not 1 <= self.bits <= 16 or not -64 <= self.fraction_bits <= 64:
            raise ValueError(
                f"int formats have 1 to 16 bits and -64 to 64 fraction bits, not {self.bits}, {self.fraction_bits}"
            )
        if self.symmetric and (not self.signed or self.midrise or self.bits == 1):
            raise ValueError("only signed mid-tread formats of 2 bits or more can be symmetric")
        if self.midrise and not self.signed:
            raise ValueError("a mid-rise format is signed")

    @property
    def step(self) -> float:
        return math.ldexp(1.0, -self.fraction_bits)

    @property
    def min(self) -> float:
        low = -(1 << (self.bits - 1)) + self.symmetric if self.signed else 0
        return (low + 0.5 * self.midrise) * self.step

    @property
    def max(self) -> float:
        high = (1 << (self.bits - self.signed)) - 1
        return (high + 0.5 * self.midrise) * self.step

    @property
    def min_normal(self) -> float:
        """The smallest positive value: integers have no subnormals."""
        return self.step * (0.5 if self.midrise else 1.0)

    min_subnormal = min_normal

    @property
    def dtype(self) -> jnp.dtype | None:
        """The native jax integer dtype that holds exactly these codes, or None."""
        if self.fraction_bits or self.midrise or self.bits not in (2, 4, 8, 16):
            return None
        return jnp.dtype(getattr(jnp, f"{'' if self.signed else 'u'}int{self.bits}"))


@dataclass(frozen=True)
class TableFormat:
    """A code book: its values in ascending order, coded by consecutive numbers.

    Args:
      name: by which the grammar knows it; the name of a table of your own cannot be parsed back.
      values: 2 to 65536 distinct finite float32 values.
      midpoints: where rounding to nearest goes over from one value to the next, one fewer than values; halfway between
        them when None. (Posits, logarithmic and companded tables round in another domain than that of the values.)
      first_code: the code of the lowest value; the codes of the others follow it, modulo 2^bits.
      nan_code: the code that means NaN, if one does.
      closed_form: what computes indices and values, to the same results as the search and the look-up without it.
    """

    name: str
    values: tuple[float, ...]
    midpoints: tuple[float, ...] | None = None
    first_code: int = 0
    nan_code: int | None = None
    closed_form: ClosedForm | None = field(default=None, compare=False, repr=False)

    def __post_init__(self):
        values = np.asarray(self.values, np.float32)
        if values.ndim != 1 or values.size < 2 or values.size > 1 << 16 or not np.all(np.isfinite(values)):
            raise ValueError(f"table {self.name!r} needs 2 to 65536 finite values")
        if np.any(np.diff(values) <= 0):
            raise ValueError(f"the values of table {self.name!r} do not ascend")
        object.__setattr__(self, "values", tuple(values.tolist()))
        if self.midpoints is not None:
            middles = np.asarray(self.midpoints, np.float64)
            if middles.shape != (len(values) - 1,) or np.any(middles < values[:-1]) or np.any(middles > values[1:]):
                raise ValueError(f"each midpoint of table {self.name!r} lies between two neighbours of its values")
            object.__setattr__(self, "midpoints", tuple(middles.tolist()))
        if not 0 <= self.first_code < 1 << self.bits:
            raise ValueError(f"the first code of table {self.name!r} does not have {self.bits} bits")
        if self.nan_code is not None and (self.nan_code - self.first_code) % (1 << self.bits) < len(values):
            raise ValueError(f"code {self.nan_code} of table {self.name!r} means a number, not NaN")

    def __hash__(self):
        return hash((self.name, len(self.values)))  # that of 65536 values takes a millisecond

    @property
    def bits(self) -> int:
        return (len(self.values) - 1).bit_length()

    @property
    def min(self) -> float:
        return self.values[0]

    @property
    def max(self) -> float:
        """The largest magnitude."""
        return max(abs(self.values[0]), abs(self.values[-1]))

    @property
    def min_normal(self) -> float:
        """The smallest positive magnitude."""
        return min(abs(v) for v in self.values if v)

    min_subnormal = min_normal
    dtype = None

    def __str__(self):
        return self.name


ElementFormat = FloatFormat | IntFormat | TableFormat

FLOAT32 = FloatFormat(8, 23)
BFLOAT16 = FloatFormat(8, 7)
E8M0 = FloatFormat(8, 0, 127, False, "fn", signed=False, subnormals=False)
E4M3FN = FloatFormat(4, 3, 7, False, "fn")

E8M0_RULES = ("floor", "ceil", "even", "nearest", "rceil", "rceil_exact")


@dataclass(frozen=True)
class ScaleSpec(_Named):
    """How the scale of a block is stored.

    Args:
      format: float32, bfloat16, e8m0fnu (powers of two), e4m3fn, or any FloatFormat.
      rule: how a power of two is chosen from amax (e8m0fnu only): one of `E8M0_RULES`; see `scaling.power_of_two`.
      per_tensor: a second level, one float32 scale for the tensor, keeps the block scales in range (NVFP4).
    """

    format: FloatFormat = FLOAT32
    rule: str | None = None
    per_tensor: bool = False

    def __post_init__(self):
        if (self.format == E8M0) != (self.rule is not None) or (self.rule and self.rule not in E8M0_RULES):
            raise ValueError(
                f"an e8m0 scale, and no other, has a rule: one of {', '.join(E8M0_RULES)}; not {self.rule!r}"
            )
        if self.per_tensor and self.format in (FLOAT32, BFLOAT16, E8M0):
            raise ValueError(f"a second level makes sense for narrow scales only, not for {self.format}")

    @property
    def power_of_two(self) -> bool:
        return self.format == E8M0


@dataclass(frozen=True)
class BlockFormat(_Named):
    """Elements that share scales: value = element · scale.

    Args:
      element: the format of the codes.
      block: which values share a scale, relative to the (outer, contraction) axes: "tensor": all; "row": each
        line along the contraction axis; (1, g): g consecutive values along it; (g, g): tiles over both axes.
      scale: how the scale is stored.
    """

    element: ElementFormat
    block: Block = "tensor"
    scale: ScaleSpec = ScaleSpec()

    def __post_init__(self):
        if isinstance(self.block, tuple):
            outer, inner = self.block
            if inner < 1 or outer not in (1, inner):
                raise ValueError(f"a block is tensor, row, (1, g) or (g, g), not {self.block}")
        elif self.block not in ("tensor", "row"):
            raise ValueError(f"a block is tensor, row, (1, g) or (g, g), not {self.block!r}")
        if self.element.max <= 0:
            raise ValueError(f"{self.element} has no positive value to scale by")

    @property
    def bits(self) -> int:
        """Of an element."""
        return self.element.bits

    @property
    def bits_per_value(self) -> float:
        """Of an element and its share of the scale, for large tensors."""
        size = math.prod(self.block) if isinstance(self.block, tuple) else math.inf
        return self.bits + self.scale.format.bits / size

    @property
    def min(self) -> float:
        return self.element.min

    @property
    def max(self) -> float:
        return self.element.max

    @property
    def min_normal(self) -> float:
        return self.element.min_normal

    @property
    def min_subnormal(self) -> float:
        return self.element.min_subnormal

    @property
    def dtype(self) -> jnp.dtype | None:
        return self.element.dtype


Format = ElementFormat | BlockFormat
