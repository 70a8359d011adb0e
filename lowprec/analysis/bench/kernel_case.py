"""A case on an accelerator: a function checked against its reference, then timed, beside the least time possible."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax

from lowprec.analysis.bench.case import (
    CHECKED,
    IMPOSSIBLE,
    MEASURED,
    WRONG,
    Conditions,
    Record,
    Shape,
    Work,
    shape_name,
)
from lowprec.analysis.bench.checks import Check
from lowprec.analysis.bench.device_time import device_time
from lowprec.analysis.bench.machine import Peaks, clocks
from lowprec.errors import UsageError
from lowprec.pallas.dispatch import kernel_of
from lowprec.pallas.target import target

# Of the least time possible: what is faster was not computed.
_FASTEST = 1 / 1.05
DISTRIBUTION = "standard normal"


@dataclass(frozen=True)
class Program:
    """What a case runs.

    Args:
      function: of arrays.
      inputs: draws them; compiled as one program.
      work: what there is to do at least.
      reference: of the same arrays; None: nothing to compare with.
      check: of what both give.
      advance: see `device_time.looped`.
      calls: what the compiled program must call, by a part of its text; "" for anything.
    """

    function: Callable
    inputs: Callable[[], tuple[Any, ...]]
    work: Work
    reference: Callable | None = None
    check: Check | None = None
    advance: Callable | None = None
    calls: str = ""


@dataclass(frozen=True)
class KernelCase:
    """One function at one shape.

    Args:
      name: see `Case`.
      build: (shape, impl) -> its program; impl is that of a kernel where `kernel`, else "xla".
      shape: at which it is timed.
      small: at which it is tried out.
      kernel: whether it is one of ours. Asked for by name, it cannot become XLA's product unseen.
      timed: False: it is checked at its small shape and not timed.
      peers: names of the cases that do the same by other means.
    """

    name: str
    build: Callable[[Shape, str], Program] = field(repr=False)
    shape: Shape
    small: Shape
    kernel: bool = False
    timed: bool = True
    peers: tuple[str, ...] = ()

    @property
    def trial(self) -> str:
        """What cases have in common that are the same program where nothing is timed."""
        parts = [part for part in self.name.split("/") if part not in (shape_name(self.shape), "xla", "kernel")]
        return "/".join(parts)

    def run(self, conditions: Conditions) -> Record:
        tried_out = conditions.tiny or not self.timed
        program = self.build(self.small if tried_out else self.shape, self._impl(conditions))
        inputs = jax.jit(program.inputs)()
        record: Record = {"inputs": DISTRIBUTION} | ({"peers": list(self.peers)} if self.peers else {})
        compiled = jax.jit(program.function).lower(*inputs).compile()
        record |= _checked(program, compiled(*inputs), inputs)
        if program.calls and target().platform == "gpu":
            record |= called(program.calls, compiled.as_text())
        if tried_out:
            return {"status": CHECKED} | record
        timing = device_time(program.function, inputs, conditions.seconds, program.advance)
        return (
            {"status": MEASURED}
            | timing._asdict()
            | judged(timing.us, program.work, conditions.peaks)
            | record
            | {"clocks": clocks()}
        )

    def lower(self, platform: str = "cuda") -> str:
        """The text of the program that is timed, made for a device that need not be here (see `pallas.target.on`)."""
        program = self.build(self.shape, self._impl(Conditions()))
        inputs = jax.eval_shape(program.inputs)
        return jax.jit(program.function).trace(*inputs).lower(lowering_platforms=(platform,)).as_text()

    def _impl(self, conditions: Conditions) -> str:
        if not self.kernel:
            return "xla"
        if conditions.tiny:
            return "xla" if self.timed else "interpret"
        kernel = kernel_of(target())
        if kernel is None:
            raise UsageError(f"there is no kernel for {target().kind}")
        return kernel


def judged(us: float, work: Work, peaks: Peaks | None) -> Record:
    """Rates, and the part of the device's best they are; "status" if they cannot be."""
    seconds = us * 1e-6
    rates = {"tflops": work.flops / seconds / 1e12} if work.flops else {}
    rates |= {"gbps": work.bytes / seconds / 1e9} if work.bytes else {}
    record: Record = {**rates, "work": work._asdict()}
    if peaks is None or not (work.flops or work.bytes):
        return record
    least = work.least_seconds(peaks)
    record |= {"least_us": least * 1e6, "of_ceiling": least / seconds}
    if seconds < least * _FASTEST:
        error = f"{us:.1f} us for what takes {least * 1e6:.1f} us at best: it was not computed"
        return record | {"status": IMPOSSIBLE, "error": error}
    return record


def _checked(program, found, inputs):
    if program.reference is None:
        return {}
    checked = program.check(found, jax.jit(program.reference)(*inputs))
    if checked["ok"]:
        return {"check": checked}
    return {"check": checked, "status": WRONG, "error": f"not what the reference gives: {checked}"}


def called(needed: str, text: str) -> Record:
    """Whether a compiled program's text has a call; if not, which others it has."""
    if needed in text:
        return {"calls": needed}
    others = sorted(set(re.findall(r'custom_call_target="([^"]+)"', text)))
    error = f"the compiled program has no {needed}; it calls {', '.join(others) or 'nothing'}"
    return {"status": WRONG, "error": error}
