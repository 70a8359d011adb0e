"""Quantizers with variables of their own: what is learned, and what is remembered from one step to the next.

Two kinds of scale rule have them. A `Remembering` rule scales by what earlier steps saw; a step reports what it saw
through the cotangent of a zero-valued slot, and `next_state` takes it in. A `Differentiable` rule quantizes by a
function that is differentiated as it stands, for its input and for its parameters.

State and parameters are dicts of float32 arrays; leading axes of stacked layers are allowed in `next_state`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from lowprec.formats.random import Key
from lowprec.formats.types import BlockFormat, Format
from lowprec.quantizers.scales import ScaleRule
from lowprec.typing import Array, Bool, Float

Arrays = Mapping[str, Float[Array, "..."]]


class Remembering(ABC):
    """A scale rule with state."""

    @abstractmethod
    def initial_state(self, fmt: BlockFormat) -> dict[str, Float[Array, "..."]]:
        """Before the first step."""

    @abstractmethod
    def observe(self, x: Float[Array, "..."]) -> Float[Array, " seen"]:
        """What a step reports of an operand. The first entry is 1, so that sums over calls have their mean."""

    @abstractmethod
    def next_state(
        self, state: Arrays, observed: Float[Array, "... seen"], fmt: BlockFormat
    ) -> dict[str, Float[Array, "..."]]:
        """The state after a step; unchanged where nothing was observed."""


class RememberedScale(Remembering):
    """A rule whose state alone gives the scales of a step."""

    @abstractmethod
    def bind(self, state: Arrays) -> ScaleRule:
        """The scale rule of one step."""


class Differentiable(ABC):
    """A rule that quantizes an operand of the forward product by a differentiable function."""

    @property
    def learns(self) -> bool:
        """Whether it has parameters."""
        return True

    @abstractmethod
    def initial_params(self, x: Float[Array, "..."], fmt: Format, axis: int) -> dict[str, Float[Array, "..."]]:
        """The learned parameters, from the first values of the operand."""

    def calibrated_params(
        self, w: Float[Array, "... K N"], inputs: Float[Array, "... M K"], fmt: Format, axis: int
    ) -> dict[str, Float[Array, "..."]]:
        """Those of weights, given also the first inputs that they are multiplied by."""
        return self.initial_params(w, fmt, axis)

    def reads_parameters_of(self, other: "Differentiable") -> bool:
        """Whether what the other rule has learned, in the same format, means the same to this one."""
        return self == other

    @abstractmethod
    def quantize(
        self,
        x: Float[Array, "..."],
        fmt: Format,
        axis: int,
        params: Arrays,
        state: Arrays,
        key: Key | None,
    ) -> tuple[Float[Array, "..."], Bool[Array, "..."]]:
        """The quantized values, float32, and where x lies within the range."""

    @property
    def stochastic(self) -> bool:
        return False
