"""A number line: all values of a format from its definition, in float64, and rounding by search and comparison.

Slow and plain on purpose: nothing here comes from lowprec but the fields of the format.
"""

import numpy as np

from lowprec.formats import FloatFormat, IntFormat

DETERMINISTIC = ("nearest_even", "nearest_away", "nearest_zero", "toward_zero", "away", "up", "down", "odd")


def half_precision_patterns() -> np.ndarray:
    """All float16 and bfloat16 values with their float32 neighbours on both sides: 393 216 inputs."""
    codes = np.arange(1 << 16, dtype=np.uint16)
    with np.errstate(invalid="ignore"):
        x = np.concatenate(
            [codes.view(np.float16).astype(np.float32), (codes.astype(np.uint32) << 16).view(np.float32)]
        )
        return np.concatenate([x, *(np.nextafter(x, np.float32(side)) for side in (-np.inf, np.inf))])


def code_values(fmt: FloatFormat, codes: np.ndarray) -> np.ndarray:
    """The values of codes: (-1)^s · 2^(max(e, 1) - bias) · (f / 2^M + [e > 0]), infinity or NaN."""
    e_bits, m_bits = fmt.exponent_bits, fmt.mantissa_bits
    top = 2 ** (e_bits + m_bits) - 1
    magnitudes = codes % (top + 1)
    negative = codes > top if fmt.signed else np.zeros(codes.shape, bool)
    y = _magnitudes(fmt, magnitudes)
    if fmt.nan == "ieee":
        highest = magnitudes >> m_bits == 2**e_bits - 1
        y = np.where(highest, np.inf if fmt.has_inf else np.nan, y)
        y = np.where(highest & (magnitudes % 2**m_bits > 0), np.nan, y)
    elif fmt.has_inf:
        y = np.where(magnitudes == top - (fmt.nan == "fn"), np.inf, y)
    if fmt.nan == "fn":
        y = np.where(magnitudes == top, np.nan, y)
    if fmt.nan == "fnuz":
        y = np.where(negative & (magnitudes == 0), np.nan, y)
    return np.where(negative, -y, y)


def _magnitudes(fmt, codes):
    exponent, fraction = np.divmod(codes, 2**fmt.mantissa_bits)
    if fmt.mantissa_bits == 0 and not fmt.subnormals:  # no zero: every exponent is a power of two
        return np.ldexp(1.0, exponent - fmt.bias)
    y = np.ldexp(fraction / 2**fmt.mantissa_bits + (exponent > 0), np.maximum(exponent, 1) - fmt.bias)
    return y if fmt.subnormals else np.where(exponent == 0, 0.0, y)


class NumberLine:
    """The finite values of a format, ascending, and which of them count as odd.

    Args:
      fmt: an element format of up to 16 bits.
    """

    def __init__(self, fmt):
        self.fmt = fmt
        self.is_float = isinstance(fmt, FloatFormat)
        if self.is_float:
            self._lay_out_float(fmt)
        elif isinstance(fmt, IntFormat):
            codes = np.arange(2**fmt.bits) - (2 ** (fmt.bits - 1) if fmt.signed else 0)
            codes = codes[1:] if fmt.symmetric else codes
            self.values = (codes + 0.5 * fmt.midrise) * 2.0**-fmt.fraction_bits
            self.odd = codes % 2 == 1
        else:
            self.values = np.array(fmt.values)
            self.odd = (np.arange(len(fmt.values)) + fmt.first_code) % 2 == 1

    def _lay_out_float(self, fmt):
        codes = np.arange(2 ** (fmt.exponent_bits + fmt.mantissa_bits))
        magnitudes = code_values(fmt, codes)
        real = np.isfinite(magnitudes) & ((codes == 0) | (magnitudes > 0))  # without fractions of zero
        codes = codes[real]
        self.max = magnitudes[codes[-1]]
        # The number that would follow, were there one more code: rounding to it is overflow.
        codes = np.append(codes, codes[-1] + 1)
        line = _magnitudes(fmt, codes)
        # A significand of one bit is odd, always: IEEE 754-2019 §4.3.1 sends such ties away from zero.
        odd = codes % 2 == 1 if fmt.mantissa_bits else line > 0
        if fmt.signed:
            negatives = slice(1 if line[0] == 0 else 0, None)
            line, odd = np.append(-line[negatives][::-1], line), np.append(odd[negatives][::-1], odd)
        self.values, self.odd = line, odd

    @property
    def finite(self) -> np.ndarray:
        """All values, without the imagined ones beyond the ends."""
        return self.values[np.abs(self.values) <= self.max] if self.is_float else self.values

    def probes(self, size: int, seed: int = 0) -> np.ndarray:
        """float32 inputs where rounding may go wrong: every value, midpoint and quarter point with its neighbours."""
        random = np.random.default_rng(seed)
        points = self.values if len(self.values) <= 1024 else np.sort(random.choice(self.values, 1024, replace=False))
        low, high = points[:-1], points[1:]
        if len(points) < len(self.values):  # of a large format, true neighbours
            index = random.integers(0, len(self.values) - 1, 1024)
            low, high = self.values[index], self.values[index + 1]
        inner = [low + (high - low) * t for t in (0.25, 0.5, 0.75)]
        with np.errstate(over="ignore"):
            x = np.concatenate([points, *inner]).astype(np.float32)
        bits = np.array([0, 1, 2, 0x400000, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000, 0x7FC00000], np.uint32)
        special = np.concatenate([bits, bits | 0x80000000]).view(np.float32)
        around = [np.nextafter(x, np.float32(side), dtype=np.float32) for side in (-np.inf, np.inf)]
        spread = np.exp2(random.uniform(-149, 128, 512)) * random.choice([-1, 1], 512)
        x = np.concatenate([special, x, *around, spread.astype(np.float32)])
        if len(x) > size:
            x = np.concatenate([special, random.choice(x[len(special) :], size - len(special), replace=False)])
        return np.resize(x, size)

    def round(self, x: np.ndarray, mode: str, saturate: bool = True) -> np.ndarray:
        """float64 results for float32 x; zeros carry their sign."""
        with np.errstate(invalid="ignore"):  # signalling NaN
            x = np.asarray(x, np.float64)
        line, positive = self.values, ~np.signbit(x) if self.is_float else x >= 0
        inside = np.clip(np.nan_to_num(x, nan=0.0), line[0], line[-1])
        if self.is_float and 0 not in line:  # the smallest magnitude is the nearest to all that lies below it
            inside = np.copysign(np.maximum(np.abs(inside), np.abs(line).min()), inside)
        index = np.clip(np.searchsorted(line, inside, side="right") - 1, 0, len(line) - 2)
        low, high = line[index], line[index + 1]
        near = np.where(positive, index, index + 1)  # the neighbour toward zero, and the one away from it
        far = np.where(positive, index + 1, index)
        middle = (low + high) / 2  # exact: of neighbours in float64
        if getattr(self.fmt, "midpoints", None):
            middle = np.array(self.fmt.midpoints)[index]
        tie, past = inside == middle, np.where(positive, inside > middle, inside < middle)
        moves = {
            "nearest_even": past | (tie & self.odd[near]),
            "nearest_away": past | tie,
            "nearest_zero": past,
            "toward_zero": (low < 0) & (high > 0),  # there, nothing lies toward zero: the sign stays
            "away": True,
            "up": positive,
            "down": ~positive,
            "odd": ~self.odd[near],
        }[mode]
        y = np.where(moves, line[far], line[near])
        y = np.where(inside == low, low, np.where(inside == high, high, y))  # values stay
        if self.is_float:
            y = self._limit(y, x, mode, saturate)
        else:
            y = y + 0.0
        return np.where(np.isnan(x), np.nan, y)

    def _limit(self, y, x, mode, saturate):
        fmt = self.fmt
        over = np.abs(y) > self.max
        limit = np.copysign(self.max, x)
        if saturate:
            y = np.where(over, limit, y)
        else:
            back = {"toward_zero": True, "up": x < 0, "down": x > 0}.get(mode, False) & np.isfinite(x)
            otherwise = np.inf if fmt.has_inf else np.nan if fmt.nan != "none" else self.max
            y = np.where(over | np.isinf(x), np.where(back, limit, np.copysign(otherwise, x)), y)
        negative = np.signbit(x)
        if not fmt.signed and 0 in self.values:
            y = np.where(negative, 0.0, y)
        elif not fmt.signed:
            y = np.where(negative | (x == 0), np.nan, y)
        return np.where(y == 0, np.where(negative & fmt.negative_zero, -0.0, 0.0), y)
