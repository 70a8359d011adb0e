"""Kernels on a GPU: whether they are right and how fast, beside XLA's and the device's best, in nine minutes at most.

    python -m benchmarks.gpu [--only=block_matmul,xla] [--wall=540] [--seconds=0.5] [--output=DIR] [--retry] [--tune]
    python -m benchmarks.gpu --cpu-selftest      every case at tiny shapes, kernels interpreted; nothing is timed
    python -m benchmarks.gpu --lower             every program as an H200 would get it, made on a machine without one
    python -m benchmarks.gpu --write-tuning=FILE.json

Writes DIR/<device>-<date>.json after every case and a Markdown table beside it; a file that is there is gone on with.
The device's copy and XLA's product of bfloat16 come first, then each kernel small beside its reference, then each
checked at the shape at which it is timed. With time left the configs of block_matmul are tried; --tune writes the
fastest into lowprec/pallas/tuning (--write-tuning does from results that were brought from elsewhere).

The cases run in a process of their own. One that hangs, or takes its process or the device's context down, is recorded
as failed, and a new process goes on with the next.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.supervisor import UNHEALTHY, supervise
from lowprec.analysis.bench import catalog, tuning
from lowprec.analysis.bench.case import FAILED, IMPOSSIBLE, WRONG, Case, Conditions, by_name, select
from lowprec.analysis.bench.kernel_case import KernelCase
from lowprec.analysis.bench.machine import describe, peaks_of
from lowprec.analysis.bench.runner import Results, run_cases
from lowprec.analysis.bench.tables import one_line, results_tables
from lowprec.errors import UsageError
from lowprec.pallas.config import slug
from lowprec.pallas.interpreters import reset_interpreters
from lowprec.pallas.target import on
from lowprec.training.run_directory import written_whole

RESULTS = Path(__file__).parent / "results"
TUNING = Path(__file__).parents[1] / "lowprec" / "pallas" / "tuning"
BAD = (FAILED, WRONG, IMPOSSIBLE)
# Between the last case that is started and the end of the time.
_RESERVE_SECONDS = 30.0
# Of the sweep, what stands for it where nothing is timed.
_TUNING_CASES_TRIED = 2


def all_cases() -> dict[str, Case]:
    """Those of the catalog, then the configs of block_matmul."""
    return by_name([*catalog.accelerator_cases().values(), *tuning.tuning_cases()])


def measure(options: argparse.Namespace) -> int:
    """A process that measures, and another one when it is lost, until all is done or the time is over."""
    end = time.monotonic() + options.wall
    chosen = select(all_cases(), options.only, always=catalog.is_calibration)
    path = options.json or options.output / f"{slug(_device_name())}-{time.strftime('%Y-%m-%d')}.json"
    if options.retry and path.exists():
        before = Results(path)
        before.forget(BAD)
        before.write()
    words = [sys.executable, "-m", "benchmarks.gpu", "--worker", f"--json={path}", f"--only={options.only}"]
    command = lambda left: [*words, f"--seconds={options.seconds}", f"--wall={left}"]
    with tempfile.TemporaryDirectory() as cache:
        # What one process has compiled, the references above all, the next one need not.
        environment = {"JAX_COMPILATION_CACHE_DIR": cache, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
        done = supervise(command, path, end=end, case_seconds=options.case_seconds, environment=environment)
    results = Results(path)
    table = results_tables(results, [case.name for case in chosen])
    if results.records:
        with written_whole(path.with_suffix(".md")) as temporary:
            temporary.write_text(table, encoding="utf-8")
    if options.tune:
        write_tuning(path)
    print(table, end="")
    return 0 if done else 1


def work(options: argparse.Namespace) -> int:
    """What `measure` starts."""
    deadline = time.monotonic() + options.wall - _RESERVE_SECONDS
    machine = describe() | {"date": time.strftime("%Y-%m-%d")}
    results = Results(options.json, machine)
    conditions = Conditions(options.seconds, peaks=peaks_of(machine["device"]))
    healthy = True

    def report(name, record):
        print(one_line(name, record), flush=True)
        catalog.warn_if_slow(results)

    def computes():
        nonlocal healthy
        healthy = _computes()
        return healthy

    chosen = select(all_cases(), options.only, always=catalog.is_calibration)
    run_cases(chosen, results, conditions, deadline=deadline, report=report, healthy=computes)
    return 0 if healthy else UNHEALTHY


def selftest(only: str, path: Path | None) -> int:
    """Every program of a case at its small shape, on any machine; 1 if one of them is not right."""
    swept = [case.name for case in tuning.tuning_cases()][_TUNING_CASES_TRIED:]
    chosen = [case for case in select(all_cases(), only) if case.name not in swept]
    once = list({case.trial: case for case in reversed(chosen)}.values())[::-1]
    results = Results(path, describe())

    def report(name, record):
        print(one_line(name, record), flush=True)
        if record["status"] in BAD:
            reset_interpreters()

    run_cases(once, results, Conditions(tiny=True), report=report)
    return _verdict([name for name, record in results.records.items() if record["status"] in BAD], len(results.records))


def lower(only: str, kind: str) -> int:
    """Every program that is timed, made for a device that is not here; 1 if one of them cannot be."""
    cases = [case for case in select(all_cases(), only) if isinstance(case, KernelCase)]
    bad = []
    with on(kind):
        for case in cases:
            try:
                case.lower()
            except Exception as error:  # the next one may do
                bad.append(case.name)
                print(f"{case.name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}", flush=True)
    return _verdict(bad, len(cases))


def write_tuning(path: Path) -> int:
    """The fastest configs that a file of results knows, into the package's table of its device."""
    results = Results(path)
    if not results.records:
        raise UsageError(f"{path} holds no results")
    table = TUNING / f"{slug(results.machine['device'])}.json"
    print(f"{tuning.write_tuning(results, table)} configs: {table}")
    return 0


def _verdict(bad, count):
    print(f"{count - len(bad)} of {count} are right{'; not: ' + ', '.join(bad) if bad else ''}")
    return 1 if bad else 0


def _computes():
    try:
        return bool(jnp.arange(3).sum() == 3)
    except jax.errors.JaxRuntimeError:
        return False


def _device_name():
    """Of the GPU, without taking it: a device has room for one process that measures."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        raise UsageError("nvidia-smi finds no GPU here; --cpu-selftest and --lower need none") from None


def _options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="names of cases, or how they begin, divided by commas")
    parser.add_argument("--wall", type=float, default=540.0, help="seconds for everything")
    parser.add_argument("--case-seconds", type=float, default=120.0, help="after which a case hangs")
    parser.add_argument("--seconds", type=float, default=0.5, help="of measuring each case")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the directory of the results")
    parser.add_argument("--json", type=Path, help="the file of the results, whatever the device and the date")
    parser.add_argument("--retry", action="store_true", help="run again what failed before")
    parser.add_argument("--tune", action="store_true", help="write the fastest configs into the package")
    parser.add_argument("--write-tuning", type=Path, metavar="FILE.json", help="the same from such results, at once")
    parser.add_argument("--cpu-selftest", action="store_true", help="every case at tiny shapes, nothing timed")
    parser.add_argument("--lower", nargs="?", const="NVIDIA H200", metavar="DEVICE", help="make every program for it")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = _options()
    try:
        if options.cpu_selftest:
            return selftest(options.only, options.json)
        if options.lower:
            return lower(options.only, options.lower)
        if options.write_tuning:
            return write_tuning(options.write_tuning)
        return work(options) if options.worker else measure(options)
    except UsageError as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
