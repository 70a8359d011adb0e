"""`--config=FILE[:ARG] --config.a.b=value`: config files and overrides, as ml_collections' users know them."""

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
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
    config = default() if file is None else _run_file(file)
    return _override(config, overrides)


def config_name(file: str | None) -> str:
    """What a run of the file is called: lm_ladder-S1 for configs/lm_ladder.py:S1."""
    if file is None:
        return "default"
    path, _, argument = file.partition(":")
    return "-".join(filter(None, (Path(path).stem, argument.replace("/", "_"))))


def _run_file(file: str) -> "ConfigDict":
    from ml_collections import ConfigDict

    name, colon, argument = file.partition(":")
    path = Path(name)
    if not path.is_file():
        beside = [str(other) for other in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise unknown("config file", name, beside)
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(argument) if colon else module.get_config()
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"config file {file}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise UsageError(f"config file {file}: get_config returned {type(config).__name__}, not a ConfigDict")
    return config


def _override(config: "ConfigDict", overrides: Sequence[str]) -> "ConfigDict":
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
