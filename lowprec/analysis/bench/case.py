"""A benchmark's case: a name, and what running it records."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from lowprec.analysis.bench.machine import Peaks
from lowprec.errors import UsageError, unknown

Record = dict[str, Any]
# Sizes of what a case computes on, e.g. (M, N, K).
Shape = tuple[int, ...]

# What a record's "status" says: timed; compared with the reference alone; not what the reference gives; faster than the
# device can be; not run to its end.
MEASURED, CHECKED, WRONG, IMPOSSIBLE, FAILED = "measured", "checked", "wrong", "impossible", "failed"


@dataclass(frozen=True)
class Conditions:
    """How cases are run.

    Args:
      seconds: of measuring, for each case.
      tiny: at their small shapes, kernels interpreted, nothing timed.
      peaks: of the device; None where they are not known.
    """

    seconds: float = 1.0
    tiny: bool = False
    peaks: Peaks | None = None


class Case(Protocol):
    """Something to measure.

    Attributes:
      name: its parts divided by "/", the first of which names its table.
    """

    @property
    def name(self) -> str: ...

    def run(self, conditions: Conditions) -> Record:
        """What was measured, with a "status"; raises what goes wrong."""


class Work(NamedTuple):
    """What there is to do at least, whoever does it.

    Attributes:
      flops: operations of matrix products.
      kind: in which of the device's units: "bfloat16", "float8" or "int8".
      bytes: read and written, each array once.
    """

    flops: float = 0.0
    kind: str = "bfloat16"
    bytes: float = 0.0

    def least_seconds(self, peaks: Peaks) -> float:
        """That a device can do it in: the longer of computing and moving."""
        return max(self.flops / peaks.flops(self.kind), self.bytes / peaks.bytes_per_second)


def product_work(shape: Shape, kind: str, a_bytes: float = 1, b_bytes: float = 1, out_bytes: float = 2) -> Work:
    """Of a matrix product (M, N, K); bytes are those of an element, with its part of a scale."""
    m, n, k = shape
    return Work(2.0 * m * n * k, kind, m * k * a_bytes + n * k * b_bytes + m * n * out_bytes)


def shape_name(shape: Shape) -> str:
    """As names of cases have it, e.g. "8192x28672x8192"."""
    return "x".join(map(str, shape))


def select[Each: Case](cases: Mapping[str, Each], only: str, always: Callable[[str], bool] = lambda _: False) -> list:
    """The cases that are asked for, in their order.

    Args:
      only: names or their first parts, divided by commas, e.g. "block_matmul/tiles,recipes"; "" for all.
      always: of a name: whether its case is run whatever is asked for.
    Raises:
      UsageError: (a ValueError) for a name that begins no case.
    """
    if not only.strip():
        return list(cases.values())
    asked = [part.strip().strip("/") for part in only.split(",") if part.strip().strip("/")]
    if not asked:
        raise UsageError(f"--only={only!r} names no benchmark")
    beginnings = {begin for name in cases for begin in _beginnings(name)}
    for part in asked:
        if part not in beginnings:
            raise unknown("benchmark", part, beginnings, "names of what this machine has")
    return [case for name, case in cases.items() if always(name) or not _beginnings(name).isdisjoint(asked)]


def by_name[Each: Case](cases: list[Each]) -> dict[str, Each]:
    """The cases under their names.

    Raises:
      UsageError: (a ValueError) if two have the same.
    """
    found: dict[str, Each] = {}
    for case in cases:
        if case.name in found:
            raise UsageError(f"two benchmarks are called {case.name!r}")
        found[case.name] = case
    return found


def _beginnings(name):
    parts = name.split("/")
    return {"/".join(parts[: i + 1]) for i in range(len(parts))}


def elements(shape: Shape) -> int:
    """Of an array."""
    return math.prod(shape)
