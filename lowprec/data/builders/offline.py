"""What our builders share: they are made from what the machine has, whole or not at all."""

import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import tensorflow_datasets as tfds

from lowprec.data.quiet import quiet
from lowprec.errors import UsageError

ABANDONED_AFTER_SECONDS = 24 * 3600


class OfflineBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A set that needs no network. A subclass says its features and yields its examples."""

    def _log_download_bytes(self) -> None:
        """Silent: tfds would print that it downloads."""

    def _log_download_done(self) -> None:
        """Silent, see above."""


def prepared(make: Callable[[], OfflineBuilder]) -> OfflineBuilder:
    """The builder with its files on disk, written now if they are not there.

    tfds writes into a directory of its own and renames it when it is complete: a killed preparation leaves only
    an `incomplete.*` directory, which nothing reads, and of two that run at once the first to finish wins.

    Args:
      make: gives a new builder; called again after writing, because a builder reads its info when it is made.
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
            builder = make()
    return builder


def discard(builder: OfflineBuilder) -> None:
    """Takes a broken set away: renamed first, so that no other process sees half of it."""
    path = Path(builder.data_path)
    aside = path.with_name(f"incomplete.{uuid.uuid4().hex[:6]}_{path.name}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
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
    """Directories of preparations that were killed at least a day ago."""
    for left in path.parent.glob(f"incomplete.*_{path.name}"):
        if time.time() - left.stat().st_mtime > ABANDONED_AFTER_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
