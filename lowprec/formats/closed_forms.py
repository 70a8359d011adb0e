"""Code books whose indices and values arithmetic gives: what a search and a look-up would give, without a gather.

Each form guesses an index that is right or one too low, and settles it by a comparison in which nothing is rounded. The
results are those of the table for every float32 number, ties and subnormals included.

Numbers come as `place`: integers in the order of float32 values, none beyond the ends of the table. Thresholds are
places too: whoever has reached threshold i has passed from index i to index i + 1.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

from lowprec.formats.bits import EXPONENT, divide, from_bits, to_bits
from lowprec.typing import Array, Float, Int, UInt32

_MARGIN = np.float32(2**-8)  # above the error of a guess in float32, below a step


@runtime_checkable
class ClosedForm(Protocol):
    def nearest(self, place: Int[Array, "..."], thresholds: np.ndarray, ties: str) -> Int[Array, "..."]:
        """The index of the nearest value: how many thresholds, one between two values each, are reached.

        Args:
          ties: the kind of rounding to nearest that the thresholds are of.
        """

    def lower(self, place: Int[Array, "..."], thresholds: np.ndarray) -> Int[Array, "..."]:
        """The index of the largest value that is not above; the thresholds are the values but the least."""

    def value(self, index: Int[Array, "..."] | UInt32[Array, "..."]) -> Float[Array, "..."]:
        """The values of indices."""


@dataclass(frozen=True)
class Octaves:
    """2^(k / steps), k = 1 - count … 0: the exponent field, and a comparison of the significand for each step.

    Args:
      steps: values an octave, a power of two.
      count: of values.
    """

    steps: int
    count: int

    def nearest(self, place, thresholds, ties):
        return self._count(place, thresholds[-self.steps :])

    def lower(self, place, thresholds):
        return self._count(place, thresholds[-self.steps : -1])

    def value(self, index):
        place = index.astype(jnp.int32) - (self.count - 1)
        significands = (2.0 ** (np.arange(self.steps) / self.steps)).astype(np.float32).view(np.int32) & 0x7FFFFF
        octave = (place >> (self.steps.bit_length() - 1)) + 127
        return from_bits(((octave << 23) | select(place, significands)).astype(jnp.uint32))

    def _count(self, place, top_octave):
        """Every octave has the thresholds of the one below 1."""
        index = self.count - 1 + self.steps * ((place >> 23) - 127)
        for threshold in top_octave:
            index = index + ((place & 0x7FFFFF) >= (threshold & 0x7FFFFF)).astype(jnp.int32)
        return index


@dataclass(frozen=True)
class EqualSteps:
    """i / count, i = 1 … count, count a power of two: in float32 every step of this arithmetic is exact."""

    count: int

    def nearest(self, place, thresholds, ties):
        steps = self._steps(place)
        index = jnp.floor(steps)
        return index.astype(jnp.int32) + _goes_up(steps - index, index + 1 - steps, index, ties)

    def lower(self, place, thresholds):
        return jnp.floor(self._steps(place)).astype(jnp.int32)

    def value(self, index):
        return (index.astype(jnp.int32) + 1).astype(jnp.float32) * np.float32(1 / self.count)

    def _steps(self, place):
        return from_bits(place.astype(jnp.uint32)) * np.float32(self.count) - 1


class _Magnitudes(ABC):
    """Zero, values above it and, where the book has a sign, the same below it.

    `center` is the index of zero. The methods of a family see magnitudes `a` alone, as places, and count from zero.
    """

    center: int

    def nearest(self, place, thresholds, ties):
        return self._with_sign(place, self._nearest(jnp.abs(place), thresholds[self.center :], ties))

    def lower(self, place, thresholds):
        a = jnp.abs(place)
        guess = self._guess_lower(a, thresholds[self.center :])
        low, high = _place(self._value(guess)), _place(self._value(guess + 1))
        away = (place < 0) & (a != low) & (a != high)  # below zero the lower value is the larger magnitude
        return self._with_sign(place, guess + (a >= high) + away)

    def value(self, index):
        offset = index.astype(jnp.int32) - self.center
        y = self._value(jnp.abs(offset))
        return jnp.where(offset < 0, -y, y) if self.center else y

    def _with_sign(self, place, magnitude):
        return jnp.where(place < 0, self.center - magnitude, self.center + magnitude) if self.center else magnitude

    @abstractmethod
    def _nearest(self, a: Int[Array, "..."], thresholds: np.ndarray, ties: str) -> Int[Array, "..."]:
        """The index of the value nearest to a magnitude, counted from zero."""

    @abstractmethod
    def _guess_lower(self, a: Int[Array, "..."], thresholds: np.ndarray) -> Int[Array, "..."]:
        """That of the value at or below a magnitude, or the one before it."""

    @abstractmethod
    def _value(self, magnitude: Int[Array, "..."]) -> Float[Array, "..."]:
        """The value of an index, 0 for 0."""


@dataclass(frozen=True)
class Decades(_Magnitudes):
    """Decades below 1 of equally spaced values, twice as many from one to the next, zero and 1 (dynamic exponent).

    The value j of the n = first · 2^i in decade i is 10^(i - decades) · (1 + 9 (j + ½) / n), j = 0 … n - 1. That is
    (18 (n + j) - 16 n + 9) · 5^(i - decades) / 2^(decades + first): whole numbers that float32 holds, divided once.

    Args:
      decades: how many, 2 or more: by a single power of five XLA would not divide.
      first: how many values the lowest has, 1 or 2.
      center: the index of zero.
    """

    decades: int
    first: int
    center: int

    def _nearest(self, a, thresholds, ties):
        x, (fives, size) = _number(a), self._decade(a, thresholds)
        steps = self._steps(x, fives, size)
        guess = jnp.minimum(jnp.floor(steps + (np.float32(0.5) - _MARGIN)), 2 * size - 1)
        numerator, unit = 18 * guess - 16 * size + 9, np.float32(1 / self._unit)
        from_low, to_high = x - numerator / fives * unit, (numerator + 18) / fives * unit - x  # exact within a decade
        magnitude = guess.astype(jnp.int32) - (self.first - 1)
        up = _goes_up(from_low, to_high, magnitude + self.center, ties) & (guess < 2 * size - 1)
        return self._with_ends(a, thresholds, magnitude + up)

    def _guess_lower(self, a, thresholds):
        fives, size = self._decade(a, thresholds)
        guess = jnp.minimum(jnp.floor(self._steps(_number(a), fives, size) - _MARGIN), 2 * size - 1)
        return jnp.where(a < thresholds[0], 0, guess.astype(jnp.int32) - (self.first - 1))

    def _value(self, magnitude):
        number = (magnitude + (self.first - 1)).astype(jnp.float32)
        size = from_bits(to_bits(number) & EXPONENT)
        fives = jnp.full(number.shape, 5**self.decades, jnp.float32)
        for decade in range(1, self.decades):
            fives = jnp.where(number >= self.first << decade, np.float32(5 ** (self.decades - decade)), fives)
        y = (18 * number - 16 * size + 9) / fives * np.float32(1 / self._unit)
        return jnp.where(magnitude == 0, 0, jnp.where(magnitude == self._last, 1, y))

    @property
    def _unit(self):
        return 2.0 ** (self.decades + self.first)

    @property
    def _last(self):
        """The magnitude of 1."""
        return (self.first << self.decades) - (self.first - 1)

    def _decade(self, a, thresholds):
        """(5^(decades - i), n) of the decade i of a, the lowest and the highest beyond their ends too."""
        fives = jnp.full(a.shape, 5**self.decades, jnp.float32)
        size = jnp.full(a.shape, self.first, jnp.float32)
        for decade in range(1, self.decades):
            reached = a >= thresholds[(self.first << decade) - self.first]
            fives = jnp.where(reached, np.float32(5 ** (self.decades - decade)), fives)
            size = jnp.where(reached, np.float32(self.first << decade), size)
        return fives, size

    def _steps(self, x, fives, size):
        """n + j of the formula for the value j."""
        return x * fives * np.float32(self._unit / 18) + (size * np.float32(16 / 18) - np.float32(0.5))

    def _with_ends(self, a, thresholds, magnitude):
        return jnp.where(a < thresholds[0], 0, jnp.where(a >= thresholds[self._last - 1], self._last, magnitude))


@dataclass(frozen=True)
class Softsign(_Magnitudes):
    """t / (2 - t) = q / (2 top - q) of equally spaced t = q / top, q = 0 … top; rounds in t.

    The threshold after q is u / (4 top - u), u = 2 q + 1, which no float32 number equals.
    """

    top: int
    center: int

    def _nearest(self, a, thresholds, ties):
        guess = (self._steps(a) + (np.float32(0.5) - _MARGIN)).astype(jnp.int32)  # above zero it drops the fraction
        u = 2 * guess + 1
        factor = (4 * self.top - u).astype(jnp.float32)
        high, low = _split(a, 12)
        # Products of 12 and 9 bits, and a difference of close numbers: all exact.
        return guess + (low * factor >= u.astype(jnp.float32) - high * factor)

    def _guess_lower(self, a, thresholds):
        return jnp.maximum(jnp.floor(self._steps(a) - _MARGIN).astype(jnp.int32), 0)

    def _value(self, magnitude):
        return magnitude.astype(jnp.float32) / (2 * self.top - magnitude).astype(jnp.float32)

    def _steps(self, a):
        x = _number(a)
        return np.float32(2 * self.top) * x / (1 + x)


@dataclass(frozen=True)
class Squares(_Magnitudes):
    """(q / top)², q = 0 … top; rounds in the root.

    The threshold after q is (u / 2 top)², u = 2 q + 1. Only that of u = top is a float32 number, 1/4: between an odd
    index and an even one.
    """

    top: int
    center: int = 0

    def _nearest(self, a, thresholds, ties):
        guess = jnp.floor(self._steps(a) + (np.float32(0.5) - _MARGIN)).astype(jnp.int32)
        square = jnp.square((2 * guess + 1).astype(jnp.float32))
        factor = np.float32(self.top**2)
        # Products of 8 and 16 bits, and differences of close numbers: all exact.
        high, rest = _split(a, 16)
        middle, low = _split(_place(rest), 8)
        beyond, missing = 4 * low * factor, (square - 4 * high * factor) - 4 * middle * factor
        return guess + (beyond > missing if ties == "nearest_zero" else beyond >= missing)

    def _guess_lower(self, a, thresholds):
        return jnp.maximum(jnp.floor(self._steps(a) - _MARGIN).astype(jnp.int32), 0)

    def _value(self, magnitude):
        return divide(jnp.square(magnitude.astype(jnp.float32)), np.float32(self.top**2))

    def _steps(self, a):
        return np.float32(self.top) * jnp.sqrt(_number(a))


def _goes_up(from_low, to_high, index, ties):
    """Whether what lies so far from its two neighbours goes to the upper one; index: of the lower one."""
    tie = {"nearest_even": index.astype(jnp.int32) % 2 == 1, "nearest_away": True, "nearest_zero": False}[ties]
    return (from_low > to_high) | ((from_low == to_high) & tie)


def _split(a, low_bits):
    """The number of a place as two: its leading bits, and the `low_bits` last ones of its significand."""
    high = _number(a & ~((1 << low_bits) - 1))
    return high, _number(a) - high


def _number(a):
    return from_bits(a.astype(jnp.uint32))


def _place(x):
    """Of numbers that are not negative."""
    return to_bits(x).astype(jnp.int32)


def select(index: Int[Array, "..."] | UInt32[Array, "..."], constants: np.ndarray) -> Array:
    """constants[index mod their number], a power of two, by the bits of the index."""
    chosen, bit = list(constants), 1
    while len(chosen) > 1:
        odd = (index & bit) != 0
        chosen = [jnp.where(odd, high, low) for low, high in zip(chosen[::2], chosen[1::2], strict=True)]
        bit <<= 1
    return jnp.broadcast_to(chosen[0], index.shape)
