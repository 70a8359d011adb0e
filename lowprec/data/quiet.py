"""Keeps the chatter of the data libraries out of a training run."""

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside the block tfds draws no progress bars and absl logs only errors; both come back afterwards."""
    # tfds has a switch for its bars but no public way to ask how the switch stands.
    from tensorflow_datasets.core.utils import tqdm_utils

    logger = logging.getLogger("absl")
    level, bars = logger.level, getattr(tqdm_utils, "_active", True)
    logger.setLevel(logging.ERROR)
    tqdm_utils.display_progress_bar(False)
    try:
        yield
    finally:
        logger.setLevel(level)
        tqdm_utils.display_progress_bar(bars)
