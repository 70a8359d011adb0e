"""The words after a recipe's name, and those that join recipes to a schedule.

schedule := phase {" then " phase start}
phase    := name or short form ["forward only"] ["keeping" ["first" <n>] ["last" <n>]]
start    := ("at" span ["over" span] | "when" trigger) ["reset"]
span     := <steps> | <percent of the run>%
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from lowprec.errors import UsageError, unknown

OF_RECIPES = ("forward", "keeping")
OF_SCHEDULES = ("at", "over", "when", "reset")


@dataclass
class Words:
    """A phase, taken apart from the left.

    Attributes:
      base: the name or the short form of a recipe.
      rest: the words after it, which `take` and `number` eat up.
    """

    text: str
    base: str = field(init=False)
    rest: list[str] = field(init=False)

    def __post_init__(self):
        words = self.text.split()
        end = next((i for i, word in enumerate(words) if word in (*OF_RECIPES, *OF_SCHEDULES)), len(words))
        self.base, self.rest = " ".join(words[:end]), words[end:]
        if not self.base:
            raise UsageError(f"{self.text!r} names no recipe; it reads, e.g., 'bf16 then bitnet158 at 40%'")
        if "=" not in self.base and end > 1:
            raise unknown("word after a recipe", words[1], ("then", *OF_RECIPES, *OF_SCHEDULES), f"in {self.text!r}")

    def take(self, word: str) -> bool:
        """Whether the next word is this one; it is then gone."""
        found = bool(self.rest) and self.rest[0] == word
        if found:
            self.rest.pop(0)
        return found

    def following(self, word: str, example: str) -> str:
        """The word after one that was taken."""
        if not self.rest:
            raise UsageError(f"{self.text!r} ends after {word!r}; it goes on like {example!r}")
        return self.rest.pop(0)

    def count(self, word: str) -> int:
        """The number after a word."""
        number = self.following(word, f"{word} 1")
        if not re.fullmatch(r"\d+", number):
            raise UsageError(f"{self.text!r}: {word!r} takes a number of layers, not {number!r}")
        return int(number)

    def finish(self, choices: Sequence[str]) -> None:
        """That nothing is left."""
        if self.rest:
            known = self.rest[0] in (*OF_RECIPES, *OF_SCHEDULES)
            if known:
                raise UsageError(f"{self.text!r}: {self.rest[0]!r} stands in the wrong place; the order is {_ORDER}")
            raise unknown("word of a recipe", self.rest[0], choices, f"in {self.text!r}")


_ORDER = "recipe, forward only, keeping first … last …, at … over …, reset"
