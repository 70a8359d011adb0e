"""`lowprec formats`: all named number formats on one page, or everything about one."""

import numpy as np

from lowprec import formats
from lowprec.analysis.table import markdown_table
from lowprec.formats import BlockFormat, FloatFormat, IntFormat, TableFormat

# Longer lists of values are no help to a reader.
MAX_BITS_LISTED = 8
VALUES_PER_LINE = 8


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
                f"{_bits_per_value(fmt):g}",
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
    element = fmt
    if isinstance(fmt, BlockFormat):
        element = fmt.element
        scale = fmt.scale
        levels = ", times one float32 scale of the tensor" if scale.per_tensor else ""
        rule = f", chosen by the rule {scale.rule!r}" if scale.rule else ""
        rows += [
            ("element", str(element)),
            ("block", _block(fmt.block)),
            ("scale", f"{scale.format}{rule}{levels}"),
        ]
    rows += [("bits", str(fmt.bits)), ("bits per value", f"{_bits_per_value(fmt):g}")]
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
        ("special values", _special(element) or "none"),
        ("native dtype", str(element.dtype or "none")),
    ]
    width = max(len(label) for label, _ in rows)
    text = "\n".join(f"{label.ljust(width)}  {value}" for label, value in rows)
    if element.bits > MAX_BITS_LISTED:
        return text
    values = formats.value_table(element)
    return f"{text}\n\n{len(values)} finite values\n{_values(values)}"


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


def _bits_per_value(fmt) -> float:
    return fmt.bits_per_value if isinstance(fmt, BlockFormat) else fmt.bits


def _special(fmt) -> str:
    if isinstance(fmt, BlockFormat):
        fmt = fmt.element
    if not isinstance(fmt, FloatFormat):
        return ""
    parts = []
    if fmt.inf_code is not None:
        parts.append(f"inf {fmt.inf_code:#x}")
    if fmt.nan_code is not None:
        parts.append(f"nan {fmt.nan_code:#x}")
    return ", ".join(parts)


def _number(value: float, exact: bool = False) -> str:
    short = f"{value:.6g}"
    if not exact or not value:
        return short
    mantissa, exponent = np.frexp(abs(value))
    return f"{short} = {2 * mantissa:.10g} · 2^{exponent - 1}"


def _values(values: np.ndarray) -> str:
    """Of a format whose negative values mirror the positive ones, only zero and the positive ones."""
    mirrored = np.array_equal(values, -values[::-1])
    shown = values[values >= 0] if mirrored else values
    cells = [f"{value:.8g}" for value in shown]
    width = max(map(len, cells))
    rows = [cells[i : i + VALUES_PER_LINE] for i in range(0, len(cells), VALUES_PER_LINE)]
    lines = ["  ".join(cell.rjust(width) for cell in row) for row in rows]
    return "\n".join([*(["the negative ones mirror these:"] if mirrored else []), *lines])
