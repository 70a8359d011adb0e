"""Runs an hour of several small runs in one program, as a ratio to one process a run on the same cores.

    python -m benchmarks.packing [--only short] [--runs 8] [--alone 4] [--steps 262] [--json FILE]

8 runs of S0 (configs/lm_ladder.py), 4 formats × 2 seeds: by `train_packed` in one process, and by `lowprec train`, one
process a run, as many processes at a time as there are cores. All that a user waits for counts: starting, compiling,
evaluation, checkpoints. "wall" is the ratio of runs an hour, for which the machine must be idle; "cpu" that of CPU
seconds a run, which other load on the machine changes little. Both kinds are run in turn.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.options import say_where

FORMATS = ("int2", "int3", "int4", "int8")
# Steps of S0 at 5 tokens a parameter instead of 20.
SHORT = 66
ONCE = {"eval.every": 0, "checkpoint.every": 0}
VARIANTS: dict[str, dict[str, Any]] = {
    "S0, short, evaluated once": {"train.steps": SHORT, **ONCE},
    "S0, evaluated once": ONCE,
    "S0 as its config says": {},
}


def overrides(changes: dict[str, Any], index: int) -> dict[str, Any]:
    return {**changes, "recipe": f"fwd={FORMATS[index % len(FORMATS)]}@row", "seed": index // len(FORMATS)}


def train_alone(workdir: Path, changes: dict[str, Any]) -> None:
    """One process, by the command line."""
    keys = [f"--config.{key}={value}" for key, value in changes.items()]
    _run([sys.executable, "-m", "lowprec", "train", "--config=configs/lm_ladder.py:S0", f"--workdir={workdir}", *keys])


def train_together(root: Path, changes: list[dict[str, Any]]) -> None:
    """One process for all."""
    _run([sys.executable, "-m", "benchmarks.packing", "--child", str(root), json.dumps(changes)])


def child(root: Path, changes: list[dict[str, Any]]) -> None:
    """What `train_together` starts."""
    from lowprec.training.config import resolve
    from lowprec.training.config_file import load_config
    from lowprec.training.host_memory import keep_freed_memory
    from lowprec.training.packing import train_packed

    keep_freed_memory()
    configs = [
        resolve(load_config("configs/lm_ladder.py:S0", [f"--config.{key}={value}" for key, value in each.items()]))
        for each in changes
    ]
    train_packed(configs, [root / str(index) for index in range(len(configs))], lanes=len(configs))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")


def timed(function: Callable[[], Any]) -> tuple[float, float]:
    """(wall seconds, CPU seconds of the processes that it starts)."""
    used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    wall, cpu = time.perf_counter(), used()
    function()
    return time.perf_counter() - wall, used() - cpu


def compare(changes: dict[str, Any], runs: int, alone: int) -> dict[str, float]:
    """Seconds a run in both ways, and their ratios.

    Args:
      runs: in one program.
      alone: of these, by processes of their own; the others would take as long.
    """
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        asked = [overrides(changes, index) for index in range(runs)]

        def one_by_one():
            with ThreadPoolExecutor(os.cpu_count()) as workers:
                list(workers.map(train_alone, [root / f"alone{index}" for index in range(alone)], asked))

        packed = timed(lambda: train_together(root / "packed", asked))
        single = timed(one_by_one)
        same = all(_results(root / f"alone{i}") == _results(root / "packed" / str(i)) for i in range(alone))
    wall, cpu = (seconds / runs for seconds in packed)
    alone_wall, alone_cpu = (seconds / alone for seconds in single)
    return {
        "packed_wall_s": wall,
        "packed_cpu_s": cpu,
        "alone_wall_s": alone_wall,
        "alone_cpu_s": alone_cpu,
        "wall": alone_wall / wall,
        "cpu": alone_cpu / cpu,
        "same_results": same,
    }


def _results(workdir: Path) -> tuple[Any, ...]:
    summary = json.loads((workdir / "summary.json").read_text())
    return summary["status"], summary["state_sha256"], summary["final_loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of the names of the variants to run")
    parser.add_argument("--runs", type=int, default=8, help="in one program")
    parser.add_argument("--alone", type=int, default=8, help="of these, by processes of their own")
    parser.add_argument("--steps", type=int, help="of each run, instead of what the variant says")
    parser.add_argument("--json", help="write the table to this file too")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(Path(options.child[0]), json.loads(options.child[1]))
        return
    say_where("jax", "jaxlib", "flax")
    print(f"seconds a run: {options.runs} packed, {options.alone} of them alone, {os.cpu_count()} at a time")
    print(f"{'':30s} {'packed':>8s} {'cpu':>7s} {'alone':>8s} {'cpu':>7s}   {'wall':>6s} {'cpu':>6s}  same results")
    rows = {}
    for name, changes in VARIANTS.items():
        if options.only not in name:
            continue
        steps = {"train.steps": options.steps} if options.steps else {}
        row = rows[name] = compare(changes | steps, options.runs, options.alone)
        seconds = "{packed_wall_s:8.1f} {packed_cpu_s:7.1f} {alone_wall_s:8.1f} {alone_cpu_s:7.1f}".format(**row)
        ratios = f"{row['wall']:6.2f} {row['cpu']:6.2f}  {row['same_results']}"
        print(f"{name:30s} {seconds}   {ratios}  (load {os.getloadavg()[0]:.1f})", flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
