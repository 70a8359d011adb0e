"""`lowprec formats`: all named number formats on one page, or everything about one."""

import math
from bisect import bisect_right

import jax.numpy as jnp
import numpy as np

from lowprec import formats
from lowprec.analysis.table import markdown_table
from lowprec.formats import BlockFormat, FloatFormat, IntFormat, TableFormat
from lowprec.formats.types import ElementFormat

# Longer lists of codes are no help to a reader.
MAX_BITS_LISTED = 8
CODES_PER_LINE = 4


def format_table() -> str:
    """One row a format."""
    header = ("format", "kind", "bits", "bits/value", "max", "min normal", "min subnormal", "special values", "dtype")
    rows = []
    for name in formats.names():
        fmt = formats.parse(name)
        rows.append(
            (
                name,
                _kind(fmt),
                str(fmt.bits),
                f"{bits_per_value(fmt):g}",
                _number(fmt.max),
                _number(fmt.min_normal),
                _number(fmt.min_subnormal),
                _special(fmt),
                str(fmt.dtype or ""),
            )
        )
    return markdown_table(header, rows, left=2)


def format_details(name: str) -> str:
    """Everything about one format.

    Raises:
      UsageError: (a ValueError) unknown or ambiguous name.
    """
    fmt = formats.parse(name)
    canonical = str(fmt)
    rows = [("name", canonical if canonical == name else f"{name} = {canonical}"), ("kind", _kind(fmt))]
    element = formats.element_of(fmt)
    if isinstance(fmt, BlockFormat):
        scale = fmt.scale
        levels = ", times one float32 scale of the tensor" if scale.per_tensor else ""
        rule = f", chosen by the rule {scale.rule!r}" if scale.rule else ""
        rows += [
            ("element", str(element)),
            ("block", _block(fmt.block)),
            ("scale", f"{scale.format}{rule}{levels}"),
        ]
    rows += [("bits", str(fmt.bits)), ("bits per value", f"{bits_per_value(fmt):g}")]
    if isinstance(element, FloatFormat):
        sign = "1 sign, " if element.signed else ""
        rows += [
            ("layout", f"{sign}{element.exponent_bits} exponent, {element.mantissa_bits} mantissa"),
            ("bias", str(element.bias)),
        ]
    rows += [
        ("max", _number(element.max, exact=True)),
        ("min normal", _number(element.min_normal, exact=True)),
        ("min subnormal", _number(element.min_subnormal, exact=True)),
        ("ulp at 1 (epsilon)", _number(ulp(element, 1.0), exact=True) if element.min <= 1 <= element.max else "none"),
        ("ulp at max", _number(ulp(element, element.max), exact=True)),
        ("finite values", f"{count_finite(element):,}"),
        ("overflow", _overflow(element)),
        ("special values", _special(element) or "none"),
        ("native dtype", str(element.dtype or "none")),
    ]
    width = max(len(label) for label, _ in rows)
    text = "\n".join(f"{label.ljust(width)}  {value}" for label, value in rows)
    return text if element.bits > MAX_BITS_LISTED else f"{text}\n\n{code_table(element)}"


def ulp(element: ElementFormat, x: float) -> float:
    """The distance between the values of the format around x, 0 < x <= max; at the last value of a table, below it."""
    if isinstance(element, FloatFormat):
        exponent = math.frexp(x)[1] - 1
        return math.ldexp(1.0, max(exponent, element.min_exponent) - element.mantissa_bits)
    if isinstance(element, IntFormat):
        return element.step
    above = min(bisect_right(element.values, x), len(element.values) - 1)
    return element.values[above] - element.values[above - 1]


def count_finite(element: ElementFormat) -> int:
    """How many finite values there are; zero counts once."""
    if isinstance(element, IntFormat):
        return int((element.max - element.min) / element.step) + 1
    if isinstance(element, TableFormat):
        return len(element.values)
    flushed = 0 if element.subnormals else (1 << element.mantissa_bits) - 1
    positive = element.max_code + (not element.has_zero) - flushed
    return positive * (1 + element.signed) + element.has_zero


def overflow_threshold(element: ElementFormat) -> tuple[float, bool] | None:
    """Where rounding to nearest even leaves the range: (the magnitude, whether it overflows itself).

    None where there is no code for overflow, so that every cast saturates.
    """
    if not isinstance(element, FloatFormat) or (element.nan == "none" and not element.has_inf):
        return None
    last = ulp(element, element.max)
    return element.max + last / 2, element.max / last % 2 == 1  # from an odd value the tie goes up


def code_table(element: ElementFormat) -> str:
    """All codes and what they mean, e.g. "0x7e 448", in lines that align."""
    codes = np.arange(1 << element.bits)
    decoded = formats.decode(jnp.asarray(codes, jnp.uint32), element)
    values = np.asarray(decoded)
    used = (np.asarray(formats.encode(decoded, element)) == codes) | ~np.isfinite(values)
    digits = -(-element.bits // 4)
    meanings = [f"{value:.8g}" if meant else "unused" for value, meant in zip(values, used, strict=True)]
    cells = [f"0x{code:0{digits}x} {meaning}" for code, meaning in zip(codes, meanings, strict=True)]
    width = max(map(len, cells)) + 2
    lines = [cells[i : i + CODES_PER_LINE] for i in range(0, len(cells), CODES_PER_LINE)]
    return "\n".join("".join(cell.ljust(width) for cell in line).rstrip() for line in lines)


def _kind(fmt) -> str:
    if isinstance(fmt, BlockFormat):
        return f"blocks of {fmt.element}"
    if isinstance(fmt, IntFormat):
        return "fixed point" if fmt.fraction_bits else "integer"
    return "table" if isinstance(fmt, TableFormat) else "float"


def _block(block) -> str:
    if block == "tensor":
        return "the whole tensor shares a scale"
    if block == "row":
        return "each line along the contraction axis shares a scale"
    outer, inner = block
    return f"{inner} values along the contraction axis" if outer == 1 else f"tiles of {outer} × {inner}"


def bits_per_value(fmt) -> float:
    return fmt.bits_per_value if isinstance(fmt, BlockFormat) else fmt.bits


def _special(fmt) -> str:
    if isinstance(fmt, BlockFormat):
        fmt = fmt.element
    if isinstance(fmt, IntFormat):
        return ""
    parts = []
    if isinstance(fmt, FloatFormat) and fmt.inf_code is not None:
        parts.append(f"inf {fmt.inf_code:#x}")
    if fmt.nan_code is not None:
        parts.append(f"nan {fmt.nan_code:#x}")
    return ", ".join(parts)


def _overflow(element) -> str:
    threshold = overflow_threshold(element)
    if threshold is None:
        return "none: every cast saturates"
    magnitude, inclusive = threshold
    bounds = f"{'from' if inclusive else 'beyond'} {_number(magnitude, exact=True)}"
    return f"{bounds} a cast that does not saturate gives {'infinity' if element.has_inf else 'NaN'}"


def _number(value: float, exact: bool = False) -> str:
    short = f"{value:.6g}"
    if not exact or not value:
        return short
    mantissa, exponent = np.frexp(abs(value))
    return f"{short} = {2 * mantissa:.10g} · 2^{exponent - 1}"
