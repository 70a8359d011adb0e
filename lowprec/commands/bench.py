"""The command that measures this machine: bench."""

import argparse
import sys
from pathlib import Path

from lowprec.commands.command import DONE, FAILED, add_command, refuse
from lowprec.errors import require


def add_to(commands) -> None:
    """Adds this command."""
    parser = add_command(
        commands,
        "bench",
        _bench,
        "how fast this machine is: steps of recipes and optimizers on a CPU, kernels beside XLA's on an accelerator",
        usage="lowprec bench [--only=NAME,NAME,...] [--seconds=S] [--json=FILE]\n       lowprec bench --list",
        epilog="On a CPU: ratios to float32 of steps that are timed in turn. On an accelerator: device times, beside "
        "what its memory and its products can do at best. A FILE with results is gone on with.",
    )
    parser.add_argument("--list", action="store_true", help="the names of what is measured on this machine")
    parser.add_argument("--only", default="", metavar="NAME,...", help="such names, or how they begin, e.g. optimizers")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="S", help="of measuring each; 1 if not given")
    parser.add_argument("--json", type=Path, metavar="FILE", help="what was measured, written after each")


def _bench(arguments: argparse.Namespace, extra: list[str]) -> int:
    refuse(extra)
    require(arguments.seconds >= 0, "seconds", "at least 0", arguments.seconds)
    from lowprec.analysis.bench import catalog
    from lowprec.analysis.bench.case import Conditions, select
    from lowprec.analysis.bench.machine import describe, peaks_of
    from lowprec.analysis.bench.runner import Results, run_cases
    from lowprec.analysis.bench.tables import one_line, results_tables
    from lowprec.pallas.target import target
    from lowprec.training.host_memory import keep_freed_memory

    device = target()
    cases = catalog.cases_of(device)
    if arguments.list:
        print("\n".join(cases))
        return DONE
    chosen = select(cases, arguments.only, always=catalog.is_calibration)
    keep_freed_memory()
    results = Results(arguments.json, describe())

    def report(name, record):
        print(one_line(name, record), file=sys.stderr, flush=True)
        catalog.warn_if_slow(results, lambda text: print(text, file=sys.stderr))

    run_cases(chosen, results, Conditions(arguments.seconds, peaks=peaks_of(device.kind)), report=report)
    print(results_tables(results), end="")
    return FAILED if all(record["status"] == "failed" for record in results.records.values()) else DONE
