"""How long runs will take on this machine, from runs that were measured; no formula knows that of small models."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from lowprec.errors import UsageError
from lowprec.sweeps.costs import cost
from lowprec.sweeps.plan import PlannedRun
from lowprec.sweeps.store import Store
from lowprec.training.config import RunConfig
from lowprec.training.packing import cores
from lowprec.training.run_directory import read_json


@dataclass(frozen=True)
class Sample:
    """A measured run. Of runs that shared a program, the times are shares: what the machine spent on this one.

    Attributes:
      config: of it.
      seconds_per_token: of its training steps.
      overhead: seconds for all else: compiling, evaluating, saving.
      packed: how many runs, at most, shared its program.
    """

    config: RunConfig
    seconds_per_token: float
    overhead: float
    packed: int = 1

    @property
    def shape(self) -> tuple[Any, ...]:
        """What its speed depends on, but for the recipe."""
        return shape_of(self.config)


def shape_of(config: RunConfig) -> tuple[Any, ...]:
    """Runs of one shape and recipe are equally fast."""
    return config.model, config.data.seq_len, config.data.tokenizer, config.train.batch_size, config.train.accumulate


@dataclass(frozen=True)
class Estimator:
    """Expects of a run what was measured of the most similar ones.

    Args:
      samples: what was measured; without any, nothing is known.
      source: where they are from, in words.
    """

    samples: tuple[Sample, ...] = ()
    source: str = ""

    def seconds(self, config: RunConfig) -> float | None:
        """Of the whole run, by itself on the machine; None if nothing was measured."""
        if not self.samples:
            return None
        of = cost(config)
        alike = self._alike(config)
        if alike:
            per_token = median(sample.seconds_per_token for sample in alike)
        else:
            per_token = of.flops_per_token / self._nearest_rate(of.flops_per_token)
        return median(sample.overhead for sample in alike or self.samples) + of.tokens * per_token

    def total(self, configs: Iterable[RunConfig]) -> float | None:
        """Of runs one after the other."""
        each = [self.seconds(config) for config in configs]
        return None if any(seconds is None for seconds in each) else sum(filter(None, each))

    def rate(self, config: RunConfig) -> float | None:
        """Useful floating-point operations a second in the steps of such a run."""
        alike = self._alike(config)
        return cost(config).flops_per_token / median(s.seconds_per_token for s in alike) if alike else None

    def _alike(self, config: RunConfig) -> list[Sample]:
        """Samples of its shape, with its recipe where there are such."""
        same = [sample for sample in self.samples if sample.shape == shape_of(config)]
        return [sample for sample in same if sample.config.recipe == config.recipe] or same

    def _nearest_rate(self, flops_per_token: float) -> float:
        """Operations a second of those samples whose models are the nearest in size."""
        sized = [(cost(sample.config).flops_per_token, sample) for sample in self.samples]
        distance: Callable[[float], float] = lambda flops: abs(math.log(flops / flops_per_token))
        nearest = min((flops for flops, _ in sized), key=distance)
        return median(flops / sample.seconds_per_token for flops, sample in sized if flops == nearest)


def at_once(packed: int, processors: int) -> int:
    """How many of its packed runs a worker trains at a time: one on each processor (see `training.packing`)."""
    return max(min(packed, processors), 1)


def finished_samples(store: Store, runs: Iterable[PlannedRun], processors: int) -> tuple[Sample, ...]:
    """Of the runs of a store that are done."""
    samples = (sample_of(run.config, _summary(store, run), processors) for run in runs)
    return tuple(sample for sample in samples if sample is not None)


def sample_of(config: RunConfig, summary: Mapping[str, Any], processors: int) -> Sample | None:
    """What the summary of a finished run tells of its speed; None where it tells nothing."""
    rate, seconds, training = (summary.get(name) for name in ("tokens_per_second", "seconds", "train_seconds"))
    if summary.get("status") != "done" or not rate or seconds is None or training is None:
        return None
    packed = summary.get("packed") or 1
    shared = at_once(packed, processors)
    return Sample(config, 1 / rate / shared, max(seconds - training, 0.0) / shared, packed)


def _summary(store: Store, run: PlannedRun) -> Mapping[str, Any]:
    try:
        return read_json(store.directory(run.id).summary) or {}
    except UsageError:
        return {}


def from_store(store: Store, runs: Iterable[PlannedRun], processors: int | None = None) -> Estimator:
    """From the finished runs of a store; without samples if there are none.

    Args:
      processors: of the machine; those of this process if not given.
    """
    samples = finished_samples(store, runs, processors or cores())
    shapes = len({sample.shape for sample in samples})
    counted = (
        f"{len(samples)} finished run{'s' if len(samples) > 1 else ''} of {shapes} size{'s' if shapes > 1 else ''}"
    )
    packed = max((sample.packed for sample in samples), default=1)
    together = f", up to {packed} in a program" if packed > 1 else ""
    return Estimator(samples, f"from the speed of {counted}{together}" if samples else "")
