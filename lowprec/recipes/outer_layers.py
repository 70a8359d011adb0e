"""The first and the last layers of a model, which many methods leave in high precision."""

from dataclasses import dataclass

from lowprec.errors import UsageError


@dataclass(frozen=True)
class OuterLayers:
    """So many layers at the beginning and at the end of a stack "layers".

    Args:
      first, last: how many; not both none.
    """

    first: int = 0
    last: int = 0

    def __post_init__(self):
        if min(self.first, self.last) < 0 or not (self.first or self.last):
            raise UsageError(f"at least one layer is kept, first or last, not first {self.first} last {self.last}")

    def pattern(self, layers: int) -> str:
        """Of their paths, in a model of so many layers.

        Raises:
          UsageError: (a ValueError) if these are all of them.
        """
        if self.first + self.last >= layers:
            raise UsageError(
                f"'{self}' leaves no layer to quantize in a model of {layers}; at most {layers - 1} can be kept"
            )
        indices = [*range(self.first), *range(layers - self.last, layers)]
        return rf"(.*/)?layers/({'|'.join(map(str, indices))})/.*"

    def describe(self) -> str:
        """In words."""
        parts = [f"the {end} {count}" for end, count in (("first", self.first), ("last", self.last)) if count]
        return f"{' and '.join(parts)} layers"

    def __str__(self):
        """As in the text of a recipe."""
        parts = [f"{end} {count}" for end, count in (("first", self.first), ("last", self.last)) if count]
        return " ".join(("keeping", *parts))
