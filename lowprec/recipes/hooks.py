"""What a method asks of the training loop beyond its products."""

from dataclasses import dataclass

from lowprec.errors import UsageError


@dataclass(frozen=True)
class LossScaling:
    """Dynamic loss scaling: the loss is multiplied before, and the gradients divided after differentiation.

    A step whose gradients are not all finite changes neither parameters nor optimizer, and the scale is divided by
    `factor`; after `period` finite steps in a row it is multiplied. (Micikevicius et al., arXiv 1710.03740.)

    Args:
      initial: scale of the first step.
      factor: by which it changes.
      period: finite steps before it grows.
      smallest: the scale falls no further.
    """

    initial: float = 2.0**15
    factor: float = 2.0
    period: int = 2000
    smallest: float = 1.0

    def __post_init__(self):
        if not (self.initial >= self.smallest > 0 and self.factor > 1 and self.period >= 1):
            raise UsageError(f"loss scaling starts at `smallest` or above and has a factor above 1, not {self}")

    def __str__(self):
        return f"the loss is scaled by {self.initial:g}, times {self.factor:g} after {self.period} finite steps"
