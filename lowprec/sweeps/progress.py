"""How far a store has come: states, steps, speed, time left; from its files alone, while others work on it."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowprec.errors import UsageError
from lowprec.sweeps.estimate import Estimator, Sample, at_once, from_store
from lowprec.sweeps.lease import Owner
from lowprec.sweeps.plan import Plan, PlannedRun, plans_in
from lowprec.sweeps.store import STATES, SUMMARIES, Seen, State, Store
from lowprec.training.packing import cores
from lowprec.training.run_directory import RunDirectory, read_json

# Of metrics.jsonl: lines are shorter than half of it.
_TAIL = 2**17


@dataclass(frozen=True)
class RunProgress:
    """One run.

    Attributes:
      run: None where its config cannot be read.
      name: of its directory.
      seen: state, owner, error.
      step: of the last line of its metrics.
      tokens_per_second: of its last steps.
      seconds_left: at that speed, or by the estimate if it has none; None if nobody knows.
    """

    run: PlannedRun | None
    name: str
    seen: Seen
    step: int = 0
    tokens_per_second: float | None = None
    seconds_left: float | None = None

    @property
    def state(self) -> State:
        return self.seen.state

    @property
    def steps(self) -> int:
        return self.run.config.train.steps if self.run else 0

    @property
    def fraction(self) -> float:
        """Of its steps; 1 of a run that has ended."""
        if self.state in ("done", "diverged"):
            return 1.0
        return min(self.step / self.steps, 1.0) if self.steps else 0.0


@dataclass(frozen=True)
class Progress:
    """All runs of a store.

    Attributes:
      runs: in the order of the plans, then those in no plan.
      problems: what cannot be read, but for runs.
      seconds_left: for all that is left, with as many workers as there are now; None if nobody knows.
      source: where estimates of runs that have not begun come from.
    """

    runs: tuple[RunProgress, ...]
    problems: tuple[str, ...]
    seconds_left: float | None
    source: str

    @property
    def counts(self) -> dict[State, int]:
        """Of states that occur."""
        counted = Counter(run.state for run in self.runs)
        return {state: counted[state] for state in STATES if counted[state]}

    def of(self, *states: State) -> list[RunProgress]:
        """The runs in one of these states."""
        return [run for run in self.runs if run.state in states]

    @property
    def workers(self) -> int:
        """That are at work."""
        return len({run.seen.owner for run in self.of("running")})

    @property
    def share(self) -> float:
        """Of all floating-point operations of the plan, those that are done; of runs that have ended, all."""
        known = [run for run in self.runs if run.run]
        total = sum(each.run.flops for each in known if each.run)
        done = sum(each.run.flops * each.fraction for each in known if each.run)
        return done / total if total else 0.0


def look(store: Store, plans: Sequence[Plan] | None = None, processors: int | None = None) -> Progress:
    """How far a store has come.

    Args:
      store: the same object each time, so that it notices heartbeats that stop.
      plans: whose runs are looked at; all that the store has, and runs without a plan, if not given.
      processors: of each machine at work; those of this process if not given.
    Raises:
      UsageError: (a ValueError) there is no such directory, or nothing in it.
    """
    problems: list[str] = []
    others: list[RunProgress] = []
    if plans is None:
        if not store.root.is_dir():
            raise UsageError(f"there is no directory {store.root}")
        plans, problems = _plans(store.root)
        planned = _unique(plans)
        others = _unplanned(store, {run.id for run in planned})
        if not planned and not others and not problems:
            raise UsageError(f"{store.root} holds neither a plan nor a run")
    else:
        planned = _unique(plans)
    begun = [_begun(run, store.look(run), store.directory(run.id)) for run in planned]
    everything = [*begun, *others]
    shared = _shared(everything, processors or cores())
    estimator = _estimator(store, everything, shared, processors)
    runs = tuple(_with_time(each, estimator, shared) for each in everything)
    return Progress(runs, tuple(problems), _seconds_left(runs, shared), estimator.source)


def _plans(root: Path) -> tuple[list[Plan], list[str]]:
    plans, problems = [], []
    for path in plans_in(root):
        try:
            plans.append(Plan.load(path))
        except UsageError as error:
            problems.append(str(error))
    return plans, problems


def _unique(plans: Iterable[Plan]) -> list[PlannedRun]:
    return list({run.id: run for plan in plans for run in plan.runs}.values())


def _unplanned(store: Store, planned: set[str]) -> list[RunProgress]:
    """Runs that lie in the store but in no plan; their directories may have other names."""
    found = []
    for path in sorted(store.root.iterdir()):
        if path.name in planned or path.name.startswith(".") or not path.is_dir():
            continue
        directory = RunDirectory(path)
        try:
            config = directory.read_config()
        except UsageError as error:
            found.append(RunProgress(None, path.name, Seen("unreadable", error=str(error))))
            continue
        if config is None:
            continue
        run = PlannedRun(config)
        seen = store.look(run) if run.id == path.name else _plain(directory)
        found.append(_begun(run, seen, directory))
    return found


def _plain(directory: RunDirectory) -> Seen:
    """Of a directory that `lowprec train` made."""
    try:
        status = (read_json(directory.summary) or {}).get("status")
    except UsageError as error:
        return Seen("unreadable", error=str(error))
    if status in SUMMARIES:
        return Seen(status)
    return Seen("interrupted" if directory.metrics.exists() else "waiting")


def _begun(run: PlannedRun, seen: Seen, directory: RunDirectory) -> RunProgress:
    line = last_line(directory.metrics) or {}
    rate = line.get("tokens_per_second")
    known = rate if isinstance(rate, int | float) and rate > 0 else None
    return RunProgress(run, directory.path.name, seen, line.get("step", 0), known)


def last_line(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The last whole line of a metrics.jsonl, however long the file is; None if it has none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - _TAIL, 0))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return None
    for raw in reversed(lines[:-1]):  # what follows the last newline is being written
        try:
            line = json.loads(raw)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            return line
    return None


def _shared(runs: Sequence[RunProgress], processors: int) -> dict[Owner | None, int]:
    """Worker -> how many of the runs that it has it trains at a time."""
    held = Counter(each.seen.owner for each in runs if each.state == "running")
    return {owner: at_once(count, processors) for owner, count in held.items()}


def _estimator(
    store: Store, runs: Sequence[RunProgress], shared: Mapping[Owner | None, int], processors: int | None
) -> Estimator:
    """From finished runs; before there are any, from those that are running."""
    estimator = from_store(store, [each.run for each in runs if each.run], processors)
    if estimator.samples:
        return estimator
    running = tuple(
        Sample(each.run.config, 1 / each.tokens_per_second / shared[each.seen.owner], 0.0)
        for each in runs
        if each.run and each.tokens_per_second and each.state == "running"
    )
    return Estimator(running, "from the speed of running runs, without compiling" if running else "")


def _with_time(each: RunProgress, estimator: Estimator, shared: Mapping[Owner | None, int]) -> RunProgress:
    if each.run is None or each.seen.ended:
        return each
    seconds: float | None
    if each.state == "running" and each.tokens_per_second:
        seconds = (each.steps - each.step) * each.run.cost.tokens_per_step / each.tokens_per_second
    else:
        whole = estimator.seconds(each.run.config)
        seconds = None if whole is None else whole * (1 - each.fraction)
        if seconds is not None and each.state == "running":
            seconds *= shared[each.seen.owner]
    return replace(each, seconds_left=seconds)


def _seconds_left(runs: Sequence[RunProgress], shared: Mapping[Owner | None, int]) -> float | None:
    left = [each for each in runs if each.run and not each.seen.ended]
    if any(each.seconds_left is None for each in left):
        return None
    running = [each for each in left if each.state == "running"]
    # What is running is known by the time that it will take, what waits by its share of the time of a worker.
    busy = sum((each.seconds_left or 0.0) / shared[each.seen.owner] for each in running)
    waiting = sum(each.seconds_left or 0.0 for each in left if each.state != "running")
    longest = max((each.seconds_left or 0.0 for each in running), default=0.0)
    return max((busy + waiting) / max(len(shared), 1), longest)
