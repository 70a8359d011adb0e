"""Launchers by name. They only start workers and wait for them: the store decides who trains what.

tally = launchers.get("local").launch(Order(root="sweep", plan="sweep/grid.plan.json"), workers=4, say=print)
"""

import dataclasses
import importlib
import json
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from lowprec.errors import UsageError, lookup, require
from lowprec.sweeps.plan import Plan
from lowprec.sweeps.store import Seen, Store

# Each in the module of its name, imported when it is asked for.
_CLASSES = {"local": "LocalLauncher", "ray": "RayLauncher", "slurm": "SlurmLauncher"}


@dataclass(frozen=True)
class Order:
    """What every worker is told; picklable, and as JSON good for a command line.

    Attributes:
      root: the directory of the store.
      plan: the path of the plan's file.
      pack: how many runs are trained in one program, where they can be (`training.packing.pack_key`).
      retry_failed: whether failed and unreadable runs are tried again: each once for an order, by whichever worker.
      attempts: a run fails when so many of its workers in a row have died without a new checkpoint.
      patience: seconds without a heartbeat after which a lease is stale where locks do not tell.
      threads: of the CPU with which a worker computes; 0: as many as there are. XLA splits sums over many values among
        them, so that results depend on it: it is the same for any number of workers, on any machine.
      call: which order it is; workers of one order share it.
    """

    root: str
    plan: str
    pack: int = 1
    retry_failed: bool = False
    attempts: int = 5
    patience: float = 60.0
    threads: int = 1
    call: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self):
        require(self.pack >= 1, "pack", "at least 1", self.pack)
        require(self.attempts >= 1, "attempts", "at least 1", self.attempts)
        require(self.patience > 0, "patience", "above 0 seconds", self.patience)
        require(self.threads >= 0, "threads", "at least 0 (0: as many as there are)", self.threads)

    def has_ended(self, seen: Seen) -> bool:
        """Whether nothing is left to do for a run, as the store has it."""
        return seen.ended and not (self.retry_failed and seen.may_be_retried(self.call))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Order":
        """Of what `to_json` gave.

        Raises:
          UsageError: (a ValueError) it is something else.
        """
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise UsageError(f"{text!r} is not an order to a worker: {error}") from None


@dataclass(frozen=True)
class Tally:
    """How many runs of a plan ended in which way.

    Attributes:
      done: trained to the end.
      diverged: ended by a loss or gradient that is not finite, which is a result.
      failed: by an exception, or by the deaths of their workers.
      unreadable: with a summary or status that cannot be read.
      left: all others.
      messages: one line for each run that failed or is unreadable.
    """

    done: int = 0
    diverged: int = 0
    failed: int = 0
    unreadable: int = 0
    left: int = 0
    messages: tuple[str, ...] = ()

    @classmethod
    def of(cls, plan: Plan, store: Store) -> "Tally":
        """As the store now has it."""
        seen = [store.look(run) for run in plan.runs]
        ended = Counter[str](each.state for each in seen if each.ended)
        messages = tuple(
            f"{run.id} ({run.describe()}) {each.state}: {each.error}"
            for run, each in zip(plan.runs, seen, strict=True)
            if each.state in ("failed", "unreadable")
        )
        return cls(**ended, left=len(seen) - ended.total(), messages=messages)

    @property
    def total(self) -> int:
        return self.done + self.diverged + self.failed + self.unreadable + self.left

    def __str__(self) -> str:
        parts = [f"{self.done} of {self.total} runs done"]
        names = ("diverged", "failed", "unreadable", "left")
        return ", ".join(parts + [f"{count} {name}" for name in names if (count := getattr(self, name))])


class Launcher(Protocol):
    """A way of having workers."""

    def launch(self, order: Order, workers: int, say: Callable[[str], None]) -> Tally:
        """Returns when no run of the plan is left to do, or when it was told to stop.

        Args:
          order: what each worker is told.
          workers: how many there are at a time.
          say: takes each line of news.
        """
        ...


def names() -> tuple[str, ...]:
    return tuple(_CLASSES)


def get(name: str, options: Mapping[str, str] | None = None) -> Launcher:
    """The launcher of a name.

    Args:
      name: of `names()`.
      options: settings of its machines as text, e.g. {"num_gpus": "1"}; they are the fields of its class.
    Raises:
      UsageError: (a ValueError) there is no such launcher or option.
    """
    class_name = lookup("launcher", _CLASSES, name)
    launcher = getattr(importlib.import_module(f"{__name__}.{name}"), class_name)
    return launcher.from_options(options or {})
