"""Families of code books whose values a rule makes: posits, logarithmic numbers, the maps of low-bit optimizers.

`FAMILIES` maps the pattern of a name to what builds the table; the grammar asks it for every name it cannot read.
"""

import re
from collections.abc import Callable
from functools import cache

import numpy as np

from lowprec.formats.closed_forms import Decades, EqualSteps, Octaves, Softsign, Squares
from lowprec.formats.types import TableFormat


def posit(bits: int, exponent_bits: int = 2) -> TableFormat:
    """Posit<bits, exponent_bits> of the Posit Standard (2022), where exponent_bits is 2.

    Codes are two's complement, NaR is 10…0. Rounding to nearest goes by the code that one more bit would give, and
    never to zero or NaR; the other modes go by value.
    """
    if not 3 <= bits <= 16 or not 0 <= exponent_bits <= 3:
        raise ValueError(f"posits have 3 to 16 bits and 0 to 3 exponent bits, not {bits}, {exponent_bits}")
    if (bits - 2) << exponent_bits > 126:
        raise ValueError("float32 does not contain this posit")
    positive = _posit_values(bits, exponent_bits)
    # The code between two neighbours, one bit longer; what is not zero stays off it.
    middles = np.concatenate([[0.0], _posit_values(bits + 1, exponent_bits)[2:-1:2]])
    name = f"posit{bits}" + ("" if exponent_bits == 2 else f"_es{exponent_bits}")
    not_a_real = 1 << (bits - 1)
    return _symmetric(name, positive, middles, first_code=not_a_real + 1, nan_code=not_a_real)


def _posit_values(bits, exponent_bits):
    """The values of the positive codes, 1 to 2^(bits-1) - 1."""
    values = []
    for code in range(1, 1 << (bits - 1)):
        text = f"{code:0{bits - 1}b}"
        run = len(text) - len(text.lstrip(text[0]))
        regime = run - 1 if text[0] == "1" else -run
        rest = text[run + 1 :]
        exponent = int(rest[:exponent_bits].ljust(exponent_bits, "0") or "0", 2)
        fraction = rest[exponent_bits:]
        significand = 1 + int(fraction or "0", 2) / (1 << len(fraction))
        values.append(np.ldexp(significand, regime * (1 << exponent_bits) + exponent))
    return np.array(values)


def logarithmic(bits: int, fraction_bits: int) -> TableFormat:
    """A sign and log2 |x| as a fixed-point number of bits - 1 bits, whose lowest code means zero; rounds in the log."""
    if not 2 <= bits <= 16 or not 0 <= fraction_bits < bits:
        raise ValueError(f"logarithmic formats have 2 to 16 bits, fraction bits among them: not {bits}.{fraction_bits}")
    half = 1 << (bits - 2)
    if half >> fraction_bits > 126:
        raise ValueError("float32 does not contain this logarithmic format")
    logs = np.arange(1 - half, half) / (1 << fraction_bits)
    middles = np.concatenate([[logs[0] - 0.5 / (1 << fraction_bits)], (logs[:-1] + logs[1:]) / 2])
    return _symmetric(f"lns{bits}.{fraction_bits}", 2.0**logs, 2.0**middles)


def powers_of_two(bits: int) -> TableFormat:
    """0 and ±2^-k, k = 0 … 2^(bits-1) - 2 (INQ, arXiv 1702.03044); rounds to the nearest value."""
    if not 2 <= bits <= 8:
        raise ValueError(f"power-of-two tables have 2 to 8 bits, not {bits}")
    return _symmetric(f"pow2_{bits}", 2.0 ** np.arange(2 - (1 << (bits - 1)), 1))


def dynamic_exponent(bits: int, signed: bool) -> TableFormat:
    """The dynamic exponent map of 8-bit optimizers (Dettmers et al., arXiv 2110.02861): decades of equal steps.

    Zero and 1 are in it; -1 is not. Tables that others build in float32 differ from it by up to an ulp.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"dynamic exponent maps have 2 to 8 bits, not {bits}")
    exponents = bits - 1
    values = [0.0, 1.0]
    for index in range(exponents):
        count = 1 << (index if signed else index + 1)
        decade = 10.0 ** (index - exponents + 1) * (0.1 + 0.9 * (np.arange(count) + 0.5) / count)
        values += [*decade, *(-decade if signed else [])]
    ascending = tuple(np.unique(np.asarray(values, np.float32)).tolist())
    center = (1 << exponents) - 1 if signed else 0
    form = Decades(exponents, first=1 if signed else 2, center=center) if bits > 4 else None  # few are compared with
    return TableFormat(f"{'' if signed else 'u'}de{bits}", ascending, closed_form=form)


def log_map(bits: int) -> TableFormat:
    """2^-k down to about 2^-16, without zero, for second moments: k = 0 … 15 (4 bits), in steps of 1/16 (8 bits)."""
    if not 2 <= bits <= 8:
        raise ValueError(f"log maps have 2 to 8 bits, not {bits}")
    step = 2.0 ** (4 - bits)
    logs = -step * np.arange((1 << bits) - 1, -1, -1)
    form = Octaves(int(1 / step), len(logs)) if step <= 1 else None
    return TableFormat(f"log{bits}", tuple(2.0**logs), tuple(2.0 ** ((logs[:-1] + logs[1:]) / 2)), closed_form=form)


def linear_map(bits: int) -> TableFormat:
    """i / 2^bits, i = 1 … 2^bits: without zero, for second moments (Li et al., arXiv 2309.01507)."""
    if not 2 <= bits <= 8:
        raise ValueError(f"linear maps have 2 to 8 bits, not {bits}")
    count = 1 << bits
    return TableFormat(f"lin{bits}", tuple(np.arange(1, count + 1) / count), closed_form=EqualSteps(count))


def companded(bits: int, signed: bool) -> TableFormat:
    """FlashOptim, arXiv 2602.23349: signed, t / (2 - |t|) of equally spaced t; unsigned, t². Rounds in t."""
    if not 2 <= bits <= 8:
        raise ValueError(f"companded maps have 2 to 8 bits, not {bits}")
    top = (1 << (bits - signed)) - 1
    expand = (lambda t: t / (2 - np.abs(t))) if signed else np.square
    steps = np.arange(-top if signed else 0, top + 1)
    values, middles = expand(steps / top), expand((steps[:-1] + 0.5) / top)
    form = Softsign(top, center=top) if signed else Squares(top)
    return TableFormat(f"{'' if signed else 'u'}cmp{bits}", tuple(values), tuple(middles), closed_form=form)


def _symmetric(name, positive, middles=None, **codes):
    """A table of zero, positive values and their mirror images; middles begins with the one above zero."""
    values = np.concatenate([-positive[::-1], [0.0], positive])
    if middles is not None:
        middles = tuple(np.concatenate([-middles[::-1], middles]) + 0.0)
    return TableFormat(name, tuple(values), middles, **codes)


FAMILIES: dict[str, Callable[..., TableFormat]] = {
    r"posit(?P<bits>\d+)(?:_es(?P<exponent_bits>\d+))?": posit,
    r"lns(?P<bits>\d+)\.(?P<fraction_bits>\d+)": logarithmic,
    r"pow2_(?P<bits>\d+)": powers_of_two,
    r"(?P<unsigned>u?)de(?P<bits>\d+)": dynamic_exponent,
    r"log(?P<bits>\d+)": log_map,
    r"lin(?P<bits>\d+)": linear_map,
    r"(?P<unsigned>u?)cmp(?P<bits>\d+)": companded,
}


@cache
def build(name: str) -> TableFormat | None:
    """The table of a name, None if no family has such names.

    Raises:
      ValueError: a family has, but there is no such table.
    """
    for pattern, family in FAMILIES.items():
        match = re.fullmatch(pattern, name)
        if match:
            fields = {field: text for field, text in match.groupdict().items() if text is not None}
            sign = {"signed": not fields.pop("unsigned")} if "unsigned" in fields else {}
            return family(**{field: int(text) for field, text in fields.items()}, **sign)
    return None
