"""`make demo`: one tiny language model, four number formats, the same seed and data.

    python -m experiments.demo --workdir=runs/demo

Trains configs/lm_tiny.py by each recipe in a process of its own, as many at a time as there are cores; then prints the
table of `lowprec report` and draws the curves. Runs that are finished are not repeated, interrupted ones go on.
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lowprec.analysis.report import default_output, draw_curves, report_table
from lowprec.analysis.runs import find_runs
from lowprec.training.progress import duration

ROOT = Path(__file__).parent.parent
# The slowest first, so that none is left alone at the end.
RECIPES = ("quartet2", "nvfp4", "fp8", "bf16")


class Runs:
    """The training processes, and their words line by line with the recipe in front."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._processes: list[subprocess.Popen] = []
        self._stopped = False

    def train(self, recipe: str, workdir: Path, overrides: Sequence[str]) -> int:
        """Trains to the end; the exit status of `lowprec train`."""
        command = [
            *(sys.executable, "-m", "lowprec", "train", f"--config={ROOT}/configs/lm_tiny.py"),
            *(f"--config.recipe={recipe}", f"--workdir={workdir}", *overrides),
        ]
        with self._lock:
            if self._stopped:
                return 1
            # In a group of its own: a Ctrl-C is passed on by `stop`, once.
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            self._processes.append(process)
        assert process.stdout is not None
        for line in process.stdout:
            print(f"{recipe:8} | {line}", end="", flush=True)
        return process.wait()

    def stop(self) -> None:
        """Lets each save and end."""
        with self._lock:
            self._stopped = True
            for process in self._processes:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)


def main(argv: Sequence[str] | None = None) -> int:
    """0 when all recipes were trained."""
    parser = argparse.ArgumentParser(prog="python -m experiments.demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo"), help="with a directory for each recipe")
    parser.add_argument("--jobs", type=int, default=min(len(RECIPES), os.cpu_count() or 1), help="runs at a time")
    arguments, overrides = parser.parse_known_args(argv)
    workdir = arguments.workdir.absolute()
    begin, runs = time.monotonic(), Runs()

    def terminate(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminate)
    with ThreadPoolExecutor(max(arguments.jobs, 1)) as pool:
        try:
            waiting = [pool.submit(runs.train, recipe, workdir / recipe, overrides) for recipe in RECIPES]
            statuses = [each.result() for each in waiting]
        except KeyboardInterrupt:
            print("stopping; the same command goes on from here", flush=True)
            runs.stop()
            return 130
    if 2 in statuses:
        return 2
    found = find_runs([workdir / recipe for recipe in reversed(RECIPES)])
    print(f"\nLosses on held-out text, nats/token, after {duration(time.monotonic() - begin)} in all:\n")
    print(report_table(found))
    output = default_output(found)
    draw_curves(found, output)
    print(f"\ncurves: {output}")
    return max(statuses)


if __name__ == "__main__":
    sys.exit(main())
