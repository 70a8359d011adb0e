"""Sweep files: a config file that has get_sweep beside get_config. Both take the ARG of FILE:ARG, if they want it."""

import hashlib
import inspect
import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowprec.errors import UsageError
from lowprec.sweeps.algebra import as_sweep
from lowprec.sweeps.plan import Plan
from lowprec.sweeps.settle import settled
from lowprec.training.config_file import config_name, config_of, import_file, overridden, require_file

_OPTION = re.compile(r"--(?:no)?config\.([\w.]+)")


def load_plan(file: str, overrides: Sequence[str] = ()) -> Plan:
    """The plan of a sweep file.

    Args:
      file: "path.py" or "path.py:arg"; its get_config(arg) returns the base ConfigDict, its get_sweep(arg) the sweep.
      overrides: of the base, "--config.a.b=value", as for `lowprec train`; they are part of the plan's name.
    Raises:
      UsageError: (a ValueError) what is wrong with the file, and in which line; with the sweep; with an override.
    """
    path, colon, argument = file.partition(":")
    require_file(path, "sweep file")
    module = _called(file, path, lambda: import_file(Path(path)))
    functions = {name: getattr(module, name, None) for name in ("get_config", "get_sweep")}
    for name, function in functions.items():
        if not callable(function):
            raise UsageError(f"sweep file {path} has no {name}(); docs/sweeps.md shows one that has")
    wants = {name: _takes_argument(function) for name, function in functions.items()}
    if colon and not any(wants.values()):
        raise UsageError(f"sweep file {path}: neither get_config nor get_sweep takes the argument {argument!r}")
    config = overridden(config_of(file if wants["get_config"] else path, module), overrides)
    arguments = (argument,) if colon and wants["get_sweep"] else ()
    points = _called(file, path, lambda: as_sweep(functions["get_sweep"](*arguments)))
    given = {match[1] for text in overrides if (match := _OPTION.match(text))}
    return Plan.of(_plan_name(file, overrides), settled(config.to_dict(), points, given))


def _plan_name(file: str, overrides: Sequence[str]) -> str:
    """Plans of the same file that differ by overrides are different files of a store."""
    if not overrides:
        return config_name(file)
    return f"{config_name(file)}-{hashlib.sha256(' '.join(overrides).encode()).hexdigest()[:6]}"


def _called(file: str, path: str, function: Any) -> Any:
    """What a function of the file returns; its errors become messages with the line of the file."""
    try:
        return function()
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == Path(path).resolve()]
        lines += [error.lineno] if isinstance(error, SyntaxError) and error.lineno else []
        where = f"{file}, line {lines[-1]}" if lines else file
        kind = "" if isinstance(error, UsageError) else f"{type(error).__name__}: "
        raise UsageError(f"sweep file {where}: {kind}{error}") from error


def _takes_argument(function: Any) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(each.kind is not each.KEYWORD_ONLY and each.kind is not each.VAR_KEYWORD for each in parameters)
