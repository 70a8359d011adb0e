"""The directory of one run: config.json, metrics.jsonl, summary.json, checkpoints/, and who may write there."""

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowprec.errors import UsageError
from lowprec.training.config import RunConfig, differences, resolve

# The results of a run that ended by itself: starting it again would only repeat them.
FINISHED = ("done", "diverged")


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Another name to write a file under: readers see the old or the new one, also when this process dies."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes the file whole, and to the disk."""
    with written_whole(path) as temporary, temporary.open("w") as file:
        json.dump(finite_or_null(value), file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def finite_or_null(value: Any) -> Any:
    """The value with null for every number that JSON does not have, inside dicts too."""
    if isinstance(value, dict):
        return {key: finite_or_null(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None if there is no such file.

    Raises:
      UsageError: (a ValueError) if it holds something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} does not hold a JSON object")
    return value


class RunDirectory:
    """Names of what is in a run's directory."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.summary = self.path / "summary.json"
        self.checkpoints = self.path / "checkpoints"
        self.profile = self.path / "profile"
        self.tensorboard = self.path / "tensorboard"
        self.traceback = self.path / "traceback.txt"

    def read_config(self) -> RunConfig | None:
        """Of the run that lies here; None if there is none.

        Raises:
          UsageError: (a ValueError) if config.json cannot be understood.
        """
        stored = read_json(self.config)
        if stored is None:
            return None
        try:
            return resolve(stored)
        except UsageError as error:
            raise UsageError(f"{self.config}: {error}") from None

    def check(self, config: RunConfig) -> None:
        """Refuses a directory that holds another config's run, or no run at all but other things; changes nothing.

        Raises:
          UsageError: (a ValueError) with the keys that differ.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"--workdir={self.path} is a file")
        stored = self.read_config()
        if stored is None:
            if self.path.is_dir() and any(self.path.iterdir()):
                raise UsageError(
                    f"{self.path} holds other things than a run (there is no config.json); nothing was changed"
                )
            return
        different = differences(stored, config)
        if different:
            lines = "".join(f"\n  {key}: {old!r} there, {new!r} asked for" for key, old, new in different)
            raise UsageError(
                f"{self.path} holds the run of another config; nothing was changed{lines}\n"
                "train into another --workdir, or ask for the same config to go on with this one"
            )

    def finished(self) -> dict[str, Any] | None:
        """The summary of a run that has nothing left to do."""
        summary = read_json(self.summary)
        return summary if summary is not None and summary.get("status") in FINISHED else None

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Makes the directory, and keeps other processes from training in it meanwhile.

        Raises:
          UsageError: (a ValueError) if one does already.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise UsageError(f"another process is training in {self.path}") from None
        except OSError:
            pass  # some network file systems have no locks
        try:
            yield
        finally:
            os.close(handle)
