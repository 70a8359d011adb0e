"""How long a device takes for a function: many calls in one program, none of which XLA may drop or move."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

# Of one program, beside which the microseconds of starting it do not count.
_PROGRAM_SECONDS = 0.03
_CALLS = (4, 400)
_LEAST_REPEATS = 3


class Timing(NamedTuple):
    """Of one call.

    Attributes:
      us: microseconds, the median over repeats.
      low_us, high_us: quartiles.
      inner: calls in one program.
      repeats: of that program.
      compile_s: of making it.
    """

    us: float
    low_us: float
    high_us: float
    inner: int
    repeats: int
    compile_s: float


def looped(function: Callable, calls: int, advance: Callable | None = None) -> Callable:
    """`function` so many times, each after the one before: inputs -> the outputs of the last.

    The barrier makes the inputs of a call wait for the outputs of the one before, so that no call can be hoisted out of
    the loop; the outputs are carried on, so that none is dropped.

    Args:
      function: of arrays.
      calls: 2 or more.
      advance: (inputs, outputs) -> the inputs of the next call; the same ones if None.
    """

    def many(*inputs):
        def body(_, carried):
            inputs, outputs = lax.optimization_barrier(carried)
            inputs = advance(inputs, outputs) if advance else inputs
            return inputs, function(*inputs)

        return lax.fori_loop(0, calls - 1, body, (inputs, function(*inputs)))[1]

    return many


def device_time(
    function: Callable, inputs: tuple[Any, ...], seconds: float = 1.0, advance: Callable | None = None
) -> Timing:
    """Of a function of arrays on the default device.

    Args:
      seconds: of measuring, after compiling; three repeats are timed however long they take.
      advance: see `looped`.
    """
    calls = _calls(function, inputs)
    start = time.perf_counter()
    compiled = jax.jit(looped(function, calls, advance)).lower(*inputs).compile()
    compile_s = time.perf_counter() - start
    run = lambda: _seconds(lambda: compiled(*inputs))
    run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < _LEAST_REPEATS or time.perf_counter() < end:
        times.append(run())
    low, us, high = np.percentile(times, (25, 50, 75)) / calls * 1e6
    return Timing(float(us), float(low), float(high), calls, len(times), compile_s)


def _calls(function, inputs):
    single = jax.jit(function)
    jax.block_until_ready(single(*inputs))
    once = min(_seconds(lambda: single(*inputs)) for _ in range(3))
    return max(_CALLS[0], min(_CALLS[1], math.ceil(_PROGRAM_SECONDS / once)))


def _seconds(call):
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start
