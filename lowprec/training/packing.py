"""Several small runs trained by one compiled program: seeds, learning rates and element formats are its arguments.

    configs = [replace(base, seed=seed, recipe=f"fwd={name}@row") for seed in (0, 1) for name in ("int4", "int3")]
    train_packed(configs, workdirs, lanes=8)

What a process pays before its first step (starting, opening data, tracing, compiling) is paid once for all. Each run is
then trained as `train` does it, step for step, and as many at a time as there are cores: each result depends on its
config alone, whatever it is packed with. (One program that takes all runs at once by `vmap` was measured too: on a CPU
its steps take 1.6 times the time of one run after the other.)
"""

import contextlib
import hashlib
import json
import os
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import IO, Any, cast

from lowprec import recipes
from lowprec.errors import UsageError
from lowprec.training import multihost
from lowprec.training.checkpoints import Checkpoints
from lowprec.training.config import RunConfig, flatten, resolve
from lowprec.training.launch import open_training, write_summary
from lowprec.training.loop import Training
from lowprec.training.packing_formats import open_recipe
from lowprec.training.packing_program import PackedProgram, recipe_of
from lowprec.training.run_directory import RunDirectory
from lowprec.training.stop import StopRequest
from lowprec.training.summary import Status

# In which the runs of a program may differ: what it is told of a run, and what is done outside of it.
_FREE = (
    *("seed", "recipe", "optimizer.lr", "optimizer.weight_decay"),
    *("eval.every", "eval.health", "eval.outliers", "eval.sharpness"),
    *("checkpoint.every", "checkpoint.keep", "log.every", "data.download"),
)
# Optimizers that draw no random numbers and store all moments in float32.
_OPTIMIZERS = ("adamw", "sgd")


def pack_key(config: RunConfig) -> str | None:
    """Runs with the same key can be trained by one program; None: this one is trained alone.

    Free are the seed, optimizer.lr, optimizer.weight_decay, how often and what is evaluated and logged; and of recipes
    the element formats of operands with absmax scales, among floats, integers and fixed point: fwd=int3@1x32 and
    fwd=e2m1fn@1x32 have the same key. What XLA multiplies as int8 (integers of up to 8 bits scaled by row or tensor)
    has a program of its own. Not free are blocks, scales, rounding, rotations and the rest of a recipe: recipes with
    tables, ternary values, learned steps or delayed scaling have the key of that recipe, over seeds and rates.

    Alone are runs with a schedule of recipes, a controller, an objective with a name, an optimizer other than adamw and
    sgd or one with stored moments, stored weights, frozen oscillations or a selection, a profile or TensorBoard.
    """
    return None if why_alone(config) else _digest(config)


def why_alone(config: RunConfig) -> str | None:
    """What keeps a run from being packed."""
    optimizer = config.optimizer
    special = {
        "objective.name": config.objective.name,
        "train.update": config.train.update,
        "optimizer.name": "" if optimizer.name in _OPTIMIZERS else optimizer.name,
        "optimizer.settings": optimizer.settings,
        "optimizer.mu_format": optimizer.mu_format,
        "optimizer.nu_format": optimizer.nu_format,
        "optimizer.weights": "" if optimizer.weights == "f32" else optimizer.weights,
        "optimizer.freeze_oscillations": optimizer.freeze_oscillations,
        "profile.steps": config.profile.steps,
        "log.tensorboard": config.log.tensorboard,
    }
    for key, value in special.items():
        if value:
            return f"{key}={value}"
    stages = recipes.parse_schedule(config.recipe).stages(config.train.steps, config.model.layers)
    if len(stages) > 1 or stages[0].recipe.control:
        return f"recipe={config.recipe}, which changes while it trains"
    return None


def train_packed(
    configs: Sequence[RunConfig],
    workdirs: Sequence[str | os.PathLike[str]],
    *,
    lanes: int,
    stop: StopRequest | None = None,
    stream: IO[str] | None = None,
) -> list[dict[str, Any]]:
    """Trains runs of the same `pack_key`, each in a directory of its own, which is left as `train` leaves it.

    Finished runs are not repeated. checkpoint.every is taken for 0: a run is saved when it ends and when it is told to
    stop, and one that was killed starts again, to the same results. A run that diverges, or fails, does not disturb the
    others.

    Args:
      configs: see `resolve`.
      lanes: how many runs at most share the program.
      stop: where the wish to stop comes from; that of this process when None.
      stream: where progress is shown; standard error when None.
    Returns:
      The contents of the summary.json files, in order; "packed" is `lanes`.
    Raises:
      UsageError: (a ValueError) what was asked for cannot be served; nothing has been changed then.
      Exception: that of the first run that failed, once the others have ended.
    """
    runs = [RunDirectory(workdir) for workdir in workdirs]
    configs = [resolve(config) for config in configs]
    _check(configs, runs, lanes)
    for config, run in zip(configs, runs, strict=True):
        run.check(config)
    finished = [run.finished() for run in runs]
    waiting = [index for index, summary in enumerate(finished) if summary is None]
    if not waiting:
        return [summary for summary in finished if summary is not None]
    shared = PackedProgram(configs[waiting[0]])
    lock, shown = threading.Lock(), sys.stderr if stream is None else stream
    with contextlib.ExitStack() as stack:
        for index in waiting:
            stack.enter_context(runs[index].claimed())
        wish = stack.enter_context(StopRequest()) if stop is None else stop
        workers = stack.enter_context(ThreadPoolExecutor(min(len(waiting), cores())))
        shared.compile(workers, [configs[index] for index in waiting])

        def train_one(index: int) -> dict[str, Any]:
            config = replace(configs[index], checkpoint=replace(configs[index].checkpoint, every=0))
            screen = cast(IO[str], _Prefixed(shown, runs[index].path.name))
            training = open_training(shared.of(config), runs[index], wish, screen)
            training.checkpoints = _OneAtATime(training.checkpoints, lock)
            return _run(training, runs[index], lanes)

        started = {index: workers.submit(train_one, index) for index in waiting}
        errors = [error for index in waiting if (error := started[index].exception()) is not None]
    if errors:
        raise errors[0]
    return [started[index].result() if index in started else summary for index, summary in enumerate(finished)]


def _run(training: Training, run: RunDirectory, lanes: int) -> dict[str, Any]:
    try:
        status: Status = training.run()
    except Exception as error:
        write_summary(training, run, "failed", packed=lanes)
        error.add_note(f"in {run.path}")
        raise
    finally:
        training.close()
    return write_summary(training, run, status, packed=lanes)


def _check(configs: Sequence[RunConfig], runs: Sequence[RunDirectory], lanes: int) -> None:
    if not multihost.alone():
        raise UsageError("packed runs are trained by one process, not by several that share a run")
    if len(configs) != len(runs):
        raise UsageError(f"{len(configs)} configs have {len(runs)} workdirs")
    if not 1 <= len(configs) <= lanes:
        raise UsageError(f"{len(configs)} runs do not fit into {lanes} lanes")
    paths = [str(run.path.absolute()) for run in runs]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice:
        raise UsageError(f"two runs cannot train in {twice}")
    for config in configs:
        reason = why_alone(config)
        if reason:
            raise UsageError(f"a run with {reason} is trained alone")
        if _digest(config) != _digest(configs[0]):
            raise UsageError(f"these runs are not one program: {'; '.join(_differences(configs[0], config))}")


def _differences(first: RunConfig, other: RunConfig) -> list[str]:
    before, after = _fixed(first), _fixed(other)
    found = [f"{key}: {before[key]!r} and {after[key]!r}" for key in before if before[key] != after[key]]
    if _signature(first) != _signature(other):
        found.append(f"recipe: {first.recipe!r} and {other.recipe!r} differ in more than element formats")
    return found


def _digest(config: RunConfig) -> str:
    text = json.dumps([_fixed(config), _signature(config)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _fixed(config: RunConfig) -> dict[str, Any]:
    return {key: value for key, value in flatten(config.to_dict()) if key not in _FREE}


def _signature(config: RunConfig) -> str:
    return open_recipe(recipe_of(config)).signature


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _OneAtATime(Checkpoints):
    """Checkpoints that are saved by one thread at a time, as Orbax has to be kept quiet for all of them."""

    def __init__(self, checkpoints: Checkpoints, lock: threading.Lock):
        self.__dict__.update(vars(checkpoints))
        self._lock = lock

    def save(self, *arguments: Any) -> str:
        with self._lock:
            return super().save(*arguments)


class _Prefixed:
    """A stream that names the run before each line."""

    def __init__(self, stream: IO[str], name: str):
        self._stream, self._name = stream, name

    def write(self, text: str) -> int:
        return self._stream.write(f"{self._name}: {text}" if text.strip() else text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return False
