"""Formats that are state: a controller changes them while the program that was compiled once goes on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import jax
import jax.numpy as jnp
from jax import lax

from lowprec.errors import UsageError
from lowprec.formats.elements import element_of
from lowprec.formats.grammar import parse
from lowprec.formats.rounding import Rounding, parse_rounding
from lowprec.formats.traced import TracedFormat, stack_traced, traced_fixed
from lowprec.formats.types import BlockFormat, ElementFormat, IntFormat
from lowprec.quantizers.blockwise import round_blocks
from lowprec.quantizers.estimators import inside
from lowprec.quantizers.surrogate import with_slopes
from lowprec.quantizers.variables import Differentiable, Remembering


class _Dynamic(Differentiable, Remembering):
    """A rule whose state is a format, which steps leave as it is; gradients pass straight through."""

    rounding: Rounding | str
    learns = False

    @property
    def stochastic(self):
        return parse_rounding(self.rounding).stochastic

    def initial_params(self, x, fmt, axis):
        return {}

    def observe(self, x):
        return jnp.ones(1)

    def next_state(self, state, observed, fmt):
        return dict(state)

    def _rounded(self, x, fmt: TracedFormat, axis, key):
        if self.stochastic and key is None:
            raise UsageError("stochastic rounding needs a key, also in evaluation: in Flax rngs={'quant': key}")
        wide = x.astype(jnp.float32)
        still = lax.stop_gradient(wide)
        rounded = round_blocks(still, fmt, axis, rounding=parse_rounding(self.rounding), key=key, pad=True)
        return with_slopes(rounded.values, (jnp.ones((), jnp.float32), wide)), inside(still, rounded)


@dataclass(frozen=True)
class DynamicFixedPoint(_Dynamic):
    """Fixed point without scales, whose word and fraction lengths are state: "bits" and "fraction_bits".

    They start from the format of the quantizer, e.g. fx8.4. (AdaPT, arXiv 2107.13490, §3.1.)

    Args:
      rounding: a mode or its name.
    """

    rounding: Rounding | str = "stochastic"

    def initial_state(self, fmt):
        if not (isinstance(fmt, IntFormat) and fmt.signed and not fmt.midrise):
            raise UsageError(f"a fixed point that changes starts from a signed one, e.g. fx8.4, not from {fmt}")
        return {"bits": jnp.float32(fmt.bits), "fraction_bits": jnp.float32(fmt.fraction_bits)}

    def quantize(self, x, fmt, axis, params, state, key):
        now = traced_fixed(state["bits"].astype(jnp.int32), state["fraction_bits"].astype(jnp.int32))
        return self._rounded(x, now, axis, key)

    def __str__(self):
        return f"word and fraction lengths as a controller sets them, {self.rounding}"


@dataclass(frozen=True)
class DynamicChoice(_Dynamic):
    """One of several element formats, whose index is state: "choice". Blocks and scales are those of the quantizer.

    Args:
      elements: names of integers and floats, e.g. ("int4", "int8", "e4m3fn"); the first is where it starts.
      rounding: a mode or its name.
    """

    elements: Sequence[str]
    rounding: Rounding | str = "nearest_even"

    def __post_init__(self):
        object.__setattr__(self, "elements", tuple(str(parse(name)) for name in self.elements))
        if not self.elements:
            raise UsageError("a choice is one of at least one format")
        if any(isinstance(parse(name), BlockFormat) for name in self.elements):
            raise UsageError(f"a choice is among elements, e.g. int4; blocks are the quantizer's: {self.elements}")

    @cached_property
    def formats(self) -> tuple[ElementFormat, ...]:
        return tuple(element_of(name) for name in self.elements)

    def initial_state(self, fmt):
        if not isinstance(fmt, BlockFormat):
            raise UsageError(f"formats to choose from share blocks and scales: say, e.g., int8@row, not {fmt}")
        return {"choice": jnp.zeros(())}

    def quantize(self, x, fmt, axis, params, state, key):
        table = stack_traced([replace(fmt, element=element) for element in self.formats])
        pick = lambda leaf: leaf[state["choice"].astype(jnp.int32)]
        return self._rounded(x, jax.tree.map(pick, table), axis, key)

    def __str__(self):
        return f"one of {', '.join(self.elements)}, as a controller chooses"
