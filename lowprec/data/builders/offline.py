"""What our builders share: they are made from what the machine has, whole or not at all."""

import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import tensorflow_datasets as tfds

from lowprec.data.cache import is_abandoned
from lowprec.data.quiet import quiet
from lowprec.errors import UsageError


class OfflineBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """A set that needs no network. A subclass says its features and yields its examples."""

    def _log_download_bytes(self) -> None:
        """Silent: tfds would print that it downloads."""

    def _log_download_done(self) -> None:
        """Silent, see above."""


def prepared(make: Callable[[], OfflineBuilder]) -> OfflineBuilder:
    """The builder with its files on disk, written now if they are not there.

    tfds writes into a directory of its own and renames it when complete: a killed preparation leaves only an
    `incomplete.*` directory, which nothing reads, and of two that run at once the first to finish wins.

    Args:
      make: gives a new builder.
    Raises:
      UsageError: if the directory can't be written.
    """
    with quiet():
        builder = make()
        # In this order: a set that another process finishes in between is seen as complete, not as broken.
        if builder.data_path.exists() and not builder.is_prepared():
            discard(builder)
        if not builder.is_prepared():
            _write(builder, make)
        # A builder reads its info when it is made: this one was made before the files were there.
        return builder if builder.info.splits else make()


def discard(builder: OfflineBuilder) -> None:
    """Takes a broken set away: renamed first, so that no other process sees half of it."""
    path = Path(builder.data_path)
    aside = path.with_name(f"incomplete.{uuid.uuid4().hex[:6]}_{path.name}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"the broken data set in {path} can't be removed: {error}") from error
    shutil.rmtree(aside, ignore_errors=True)


def _write(builder: OfflineBuilder, make: Callable[[], OfflineBuilder]) -> None:
    path = Path(builder.data_path)
    try:
        _remove_abandoned(path)
        builder.download_and_prepare()
    except OSError as error:
        if make().is_prepared():  # another process was faster, and its directory can't be renamed over
            return
        raise UsageError(
            f"can't write the data set {builder.info.full_name} to {path}: {error}; "
            "choose another place: --config.data.data_dir=DIR or TFDS_DATA_DIR"
        ) from error


def _remove_abandoned(path: Path) -> None:
    """What killed preparations left."""
    for left in filter(is_abandoned, path.parent.glob(f"incomplete.*_{path.name}")):
        shutil.rmtree(left, ignore_errors=True)
