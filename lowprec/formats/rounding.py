"""Rounding modes. One integer kernel serves them all: k = (m + increment) >> shift; only the increment differs.

m is a significand of which the low `shift` bits are dropped; δ is the dropped fraction of a unit in the last place.
"""

import re
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from lowprec.errors import UsageError, unknown
from lowprec.typing import Array, Bool, UInt32

NEAREST = ("nearest_even", "nearest_away", "nearest_zero")
DIRECTED = ("toward_zero", "away", "up", "down", "odd")
STOCHASTIC = ("stochastic", "stochastic_equal")
KINDS = NEAREST + DIRECTED + STOCHASTIC


@dataclass(frozen=True)
class Rounding:
    """A rounding mode.

    nearest_even, nearest_away, nearest_zero: to the nearest value, ties as named. toward_zero, away, up, down:
    directed. odd: inexact results get an odd last bit. stochastic: up in magnitude with probability δ.
    stochastic_equal: either neighbour with probability ½.

    Args:
      kind: one of `KINDS`.
      random_bits: for "stochastic", how many random bits decide; None takes 32.
      variant: for few random bits (Fitzgibbon and Felix, arXiv 2504.20634): "A" truncates δ to the random bits
        (mean bias -2^-(k+1) ulp), "B" rounds it half up, "C" rounds it half to even (unbiased on finite grids too).
    """

    kind: str = "nearest_even"
    random_bits: int | None = None
    variant: str = "C"

    def __post_init__(self):
        if self.kind not in KINDS:
            raise unknown("rounding", self.kind, KINDS)
        if self.random_bits is not None and (self.kind != "stochastic" or not 1 <= self.random_bits <= 24):
            raise UsageError(
                "only stochastic rounding takes a number of random bits, 1 to 24; "
                f"not {self.random_bits} for {self.kind}"
            )
        if self.variant not in ("A", "B", "C"):
            raise UsageError(f"the variants of few-bit stochastic rounding are A, B and C, not {self.variant!r}")

    @property
    def stochastic(self) -> bool:
        return self.kind in STOCHASTIC

    def __str__(self):
        if self.random_bits is None:
            return self.kind
        return f"{self.kind}[{self.random_bits}{'' if self.variant == 'C' else self.variant}]"


def parse_rounding(rounding: "str | Rounding") -> Rounding:
    """The rounding mode of a name, e.g. "nearest_even", "stochastic", "stochastic[8]", "stochastic[8A]"."""
    if isinstance(rounding, Rounding):
        return rounding
    match = re.fullmatch(r"(\w+)(?:\[(\d+)([A-C]?)\])?", rounding)
    if not match:
        raise unknown("rounding", rounding, KINDS)
    kind, bits, variant = match.groups()
    return Rounding(kind, int(bits) if bits else None, variant or "C")


def increment(
    rounding: Rounding,
    m: UInt32[Array, "..."],
    shift: UInt32[Array, "..."],
    negative: Bool[Array, "..."] | None,
    random: UInt32[Array, "..."] | None,
) -> tuple[UInt32[Array, "..."], UInt32[Array, "..."]]:
    """Returns (m, what to add to it before the shift); m changes only where δ is rounded to few bits first.

    Args:
      m: significands below 2^24.
      shift: how many bits are dropped, 0 to 31.
      negative: the sign, for up and down.
      random: 32 random bits an element, for the stochastic modes.
    """
    mask = (np.uint32(1) << shift) - np.uint32(1)
    zero = np.uint32(0)
    last_bit = (m >> shift) & mask & 1  # 0 when nothing is dropped, so that exact values stay
    match rounding.kind:
        case "nearest_even":
            return m, (mask >> 1) + last_bit
        case "nearest_away":
            return m, (mask + 1) >> 1
        case "nearest_zero":
            return m, mask >> 1
        case "toward_zero":
            return m, jnp.zeros_like(m)
        case "away":
            return m, mask
        case "up":
            return m, jnp.where(negative, zero, mask)
        case "down":
            return m, jnp.where(negative, mask, zero)
        case "odd":
            return m, jnp.where((m >> shift) & 1, zero, mask)
        case "stochastic_equal":
            return m, jnp.where(random >> 31, mask, zero)
    if rounding.random_bits is None:
        # The leading bits: with one random word the results ascend with x, also where its binades share a cell.
        return m, (random >> 1) >> (31 - shift)
    return _few_bits(rounding, m, shift, random)


def _few_bits(rounding, m, shift, random):
    """Up iff the k leading bits of δ, truncated (A), half up (B) or half to even (C), plus R reach 2^k."""
    k = rounding.random_bits
    r = random >> np.uint32(32 - k)
    scale_up = lambda value, bits: jnp.where(
        shift >= bits,
        value << jnp.minimum(jnp.maximum(shift, bits) - bits, 31).astype(jnp.uint32),
        value >> jnp.minimum(bits - jnp.minimum(shift, bits), 31).astype(jnp.uint32),
    )
    if rounding.variant == "B":
        return m, scale_up(2 * r + 1, k + 1)
    if rounding.variant == "C":
        dropped = (jnp.maximum(shift, k) - np.uint32(k)).astype(jnp.uint32)
        mask = (np.uint32(1) << dropped) - np.uint32(1)
        m = ((m + (mask >> 1) + ((m >> dropped) & mask & 1)) >> dropped) << dropped
    return m, scale_up(r, k)
