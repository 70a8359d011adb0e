"""Schedule: recipes one after the other. Most methods have one; a schedule says when the next begins, and how.

bf16 then bitnet158 at 40% over 10% reset
nvfp4 then bf16 at 90%
fp4_all_the_way then fp4_all_the_way forward only when drowned
"""

import re
from dataclasses import dataclass, replace

from lowprec.errors import UsageError, unknown
from lowprec.recipes.modifiers import blended
from lowprec.recipes.recipe import Recipe
from lowprec.recipes.registry import parse_words
from lowprec.recipes.words import OF_SCHEDULES, Words

# What may begin a phase: gradients below √3 times their rounding noise (FP4 All the Way, arXiv 2505.19115, §4).
DROWNED = "drowned"
TRIGGERS = (DROWNED,)


@dataclass(frozen=True)
class Span:
    """A length of training.

    Args:
      amount: of steps, or of percents of the run.
      percent: which of the two.
    """

    amount: float
    percent: bool = False

    def __post_init__(self):
        if self.percent and not 0 < self.amount < 100:
            raise UsageError(f"a part of a run lies between 0% and 100%, not {self}")
        if not self.percent and (self.amount < 1 or self.amount != int(self.amount)):
            raise UsageError(f"a number of steps is whole and at least 1, not {self}")

    @classmethod
    def parse(cls, text: str) -> "Span":
        if not re.fullmatch(r"\d+(\.\d+)?%?", text):
            raise UsageError(f"{text!r} is no part of a run; say 40% or, in steps, 500")
        return cls(float(text.removesuffix("%")), text.endswith("%"))

    def steps(self, total: int) -> int:
        """Of a run of so many steps; at least one."""
        return max(round(self.amount * total / 100), 1) if self.percent else int(self.amount)

    def __str__(self):
        return f"{self.amount:.12g}{'%' if self.percent else ''}"


@dataclass(frozen=True)
class Phase:
    """A recipe, and when and how it begins.

    Args:
      recipe: from its beginning on.
      start: the updates before it, or a trigger of `TRIGGERS`, seen in an evaluation; None: of the first phase.
      ramp: the steps in which the forward pass changes from the recipe before to this one; None: at once.
      reset: whether the optimizer forgets its moments at the beginning.
    """

    recipe: Recipe
    start: Span | str | None = None
    ramp: Span | None = None
    reset: bool = False

    def __post_init__(self):
        if isinstance(self.start, str) and self.start not in TRIGGERS:
            raise unknown("trigger of a phase", self.start, TRIGGERS)
        if self.ramp and not isinstance(self.start, Span):
            raise UsageError(f"only a phase that starts at a given step has a ramp: {self}")
        if self.reset and self.start is None:
            raise UsageError("the first phase has no optimizer state to reset")

    def __str__(self):
        parts = [str(self.recipe)]
        if self.start is not None:
            parts.append(f"when {self.start}" if isinstance(self.start, str) else f"at {self.start}")
        if self.ramp:
            parts.append(f"over {self.ramp}")
        return " ".join([*parts, *(["reset"] if self.reset else [])])


@dataclass(frozen=True)
class Stage:
    """A stretch of a run with one compiled step.

    Attributes:
      recipe: for the layers of the run's model.
      start: the updates before it; None: when it is triggered.
      trigger: what begins it, seen in an evaluation of the stage before.
      reset: whether the optimizer starts anew.
      ramp: whether it leads from the recipe before to the one after: quantizers have the variables of both.
      continues: whether the quantizers' variables go on from those of the stage before: the end of a ramp.
    """

    recipe: Recipe
    start: int | None
    trigger: str | None = None
    reset: bool = False
    ramp: bool = False
    continues: bool = False


@dataclass(frozen=True)
class Schedule:
    """Phases in order. `str` gives the text that `parse_schedule` reads.

    Raises:
      UsageError: (a ValueError) if none, or another than the first, has no start, or one follows upon a trigger.
    """

    phases: tuple[Phase, ...]

    def __post_init__(self):
        if not self.phases or self.phases[0].start is not None:
            raise UsageError("the first phase of a schedule begins with the run: it has no start")
        for phase in self.phases[1:]:
            if phase.start is None:
                raise UsageError(f"{phase} follows upon another recipe: say when, e.g. 'then {phase} at 90%'")
        for phase in self.phases[:-1]:
            if isinstance(phase.start, str):
                raise UsageError(f"nothing can follow '{phase}', which may never begin; put it last")

    def stages(self, steps: int, layers: int) -> tuple[Stage, ...]:
        """What is compiled: a stage a phase, and one more for each ramp.

        Args:
          steps: of the run.
          layers: of its model.
        Raises:
          UsageError: (a ValueError) if a phase does not begin after the one before, or not before the end of the run.
        """
        recipes = [phase.recipe.for_layers(layers) for phase in self.phases]
        stages = [Stage(recipes[0], 0)]
        for recipe, phase in zip(recipes[1:], self.phases[1:], strict=True):
            if not isinstance(phase.start, Span):
                stages.append(Stage(recipe, None, phase.start, phase.reset))
                continue
            start, before = phase.start.steps(steps), stages[-1]
            if start >= steps:
                raise UsageError(f"'{phase}' begins after {start} steps, but the run ends after {steps}")
            if start <= (before.start or 0):
                raise UsageError(f"'{phase}' begins after {start} steps, not after '{before.recipe}' ({before.start})")
            if phase.ramp is None:
                stages.append(Stage(recipe, start, None, phase.reset))
                continue
            length = phase.ramp.steps(steps)
            stages.append(Stage(blended(before.recipe, recipe, length), start, None, phase.reset, ramp=True))
            if start + length < steps:
                stages.append(Stage(recipe, start + length, continues=True))
        return tuple(stages)

    def __str__(self):
        return " then ".join(map(str, self.phases))


def parse_schedule(text: "str | Recipe | Schedule") -> Schedule:
    """The schedule of a text (see `recipes.words`); a recipe is one of one phase, a schedule passes through.

    Raises:
      UsageError: (a ValueError) naming the part that is wrong.
    """
    if isinstance(text, Schedule):
        return text
    if isinstance(text, Recipe):
        return Schedule((Phase(text),))
    return Schedule(tuple(_phase(part) for part in re.split(r"\s+then\s+", text.strip())))


def _phase(text: str) -> Phase:
    words = Words(text)
    phase = Phase(parse_words(words))
    if words.take("at"):
        phase = replace(phase, start=Span.parse(words.following("at", "at 40%")))
        if words.take("over"):
            phase = replace(phase, ramp=Span.parse(words.following("over", "over 10%")))
    elif words.take("when"):
        phase = replace(phase, start=words.following("when", "when drowned"))
    if words.take("reset"):
        phase = replace(phase, reset=True)
    words.finish(OF_SCHEDULES)
    return phase
