"""`--config=FILE[:ARG] --config.a.b=value`: config files and overrides, as ml_collections' users know them."""

import contextlib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from lowprec.errors import UsageError, unknown
from lowprec.training.config import check_keys, default

if TYPE_CHECKING:
    from ml_collections import ConfigDict

# Booleans can be switched off by --noconfig.a.b.
_OVERRIDE = re.compile(r"--(no)?config\.")


def load_config(file: str | None, overrides: Sequence[str] = ()) -> "ConfigDict":
    """The ConfigDict of a file after command-line overrides.

    Args:
      file: "path.py" or "path.py:arg"; its get_config(arg) returns a ConfigDict. None: the default config.
      overrides: arguments "--config.a.b=value", or "--config.a.b" and "value".
    Raises:
      UsageError: (a ValueError) no such file or argument; unknown key or a value that cannot be read.
    """
    config = default() if file is None else config_of(file, _executed(file))
    return overridden(config, overrides)


def config_name(file: str | None) -> str:
    """What a run of the file is called: lm_ladder-S1 for configs/lm_ladder.py:S1."""
    if file is None:
        return "default"
    path, _, argument = file.partition(":")
    return "-".join(filter(None, (Path(path).stem, argument.replace("/", "_"))))


def require_file(name: str, kind: str) -> None:
    """
    Raises:
      UsageError: (a ValueError) if there is no such file of this kind; it names those beside it.
    """
    path = Path(name)
    if not path.is_file():
        beside = [str(other) for other in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise unknown(kind, name, beside)


def import_file(path: Path) -> ModuleType:
    """Executes a Python file as a module that nobody else can import; what it raises is its own."""
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _executed(file: str) -> ModuleType:
    name, _, _ = file.partition(":")
    require_file(name, "config file")
    with _errors_of(file):
        return import_file(Path(name))


def config_of(file: str, module: ModuleType) -> "ConfigDict":
    """What get_config of a file gives, for the ARG of FILE:ARG where there is one.

    Raises:
      UsageError: (a ValueError) what goes wrong in it, or that it is no ConfigDict.
    """
    from ml_collections import ConfigDict

    _, colon, argument = file.partition(":")
    with _errors_of(file):
        config = module.get_config(argument) if colon else module.get_config()
    if not isinstance(config, ConfigDict):
        raise UsageError(f"config file {file}: get_config returned {type(config).__name__}, not a ConfigDict")
    return config


@contextlib.contextmanager
def _errors_of(file: str) -> Iterator[None]:
    """What is raised inside becomes an error that names the file."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"config file {file}: {type(error).__name__}: {error}") from error


def overridden(config: "ConfigDict", overrides: Sequence[str]) -> "ConfigDict":
    """A config after arguments of the command line, see `load_config`."""
    from absl import flags
    from ml_collections import config_flags

    options = [argument.partition("=")[0] for argument in overrides if argument.startswith("--")]
    for option in options:
        if not _OVERRIDE.match(option):
            raise unknown("option", option, ["--config", "--workdir", "--config.KEY=VALUE"])
    check_keys([_OVERRIDE.sub("", option) for option in options])
    _fill(config, default())
    # Flags of our own: absl's are the process's.
    values, argv = flags.FlagValues(), ["lowprec", *overrides]
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv, lock_config=False)
    try:
        rest = values(argv)
    except (flags.Error, TypeError, ValueError) as error:
        raise UsageError(str(error).strip().partition("\n")[0]) from None
    if len(rest) > 1:
        raise UsageError(f"{rest[1]!r} is neither an option nor the value of one; options read --config.KEY=VALUE")
    return values.config


def _fill(config: "ConfigDict", defaults: "ConfigDict") -> None:
    """Gives the config the keys that its file left out, so that they can be overridden."""
    with config.unlocked():
        for key, value in defaults.items():
            if key not in config:
                config[key] = value
            elif isinstance(value, type(defaults)) and isinstance(config[key], type(defaults)):
                _fill(config[key], value)
