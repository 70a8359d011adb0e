"""Two things timed in turn, call by call, so that other load on the machine hits both."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

# (process CPU seconds, wall seconds) of one call
Times = tuple[float, float]


def timed(function: Callable[[], Any], repeats: int = 1) -> Times:
    """Of one call, when what it returns is ready: the mean of several."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(repeats):
        result = function()
    jax.block_until_ready(result)
    return (time.process_time() - cpu) / repeats, (time.perf_counter() - wall) / repeats


def paired(ours: Callable[[], Times], theirs: Callable[[], Times], seconds: float, least: int) -> np.ndarray:
    """Times of both, called in turn after a call each that does not count.

    Args:
      seconds: for how long.
      least: pairs, however long they take.
    Returns:
      (pairs, 2, 2): ours and theirs, CPU and wall.
    """
    for warm_up in (theirs, ours):
        warm_up()
    pairs: list[tuple[Times, Times]] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(pairs) < least:
        base = theirs()
        pairs.append((ours(), base))
    return np.array(pairs)


def step_ratios(ours: Callable[[], Times], theirs: Callable[[], Times], seconds: float, least: int) -> dict[str, float]:
    """Ratios of medians: "cpu" and "wall"; "cpu_ms" of ours, and how many "steps" were timed."""
    times = paired(ours, theirs, seconds, least)
    (cpu, wall), (base_cpu, base_wall) = np.median(times, axis=0)
    return {"cpu": cpu / base_cpu, "wall": wall / base_wall, "cpu_ms": 1e3 * cpu, "steps": len(times)}
