"""Failures that are not the program's: what to tell the person whose disk is full."""

import errno
import os
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

from lowprec.training.multihost import MemberFailed

_DISK = {errno.ENOSPC, errno.EDQUOT}
_DISK_TEXTS = ("No space left on device", "Disk quota exceeded")


def explain(error: BaseException, workdir: Path | None) -> str | None:
    """One or two lines for a failure whose cause lies outside; None for any other."""
    return next(filter(None, (_explained(each, workdir) for each in _chain(error))), None)


def is_disk_full(error: BaseException) -> bool:
    """Whether what `explain` tells of is a disk, or a quota, that is full."""
    told = next((each for each in _chain(error) if _explained(each, None)), None)
    return told is not None and not isinstance(told, MemberFailed) and _says_full(told)


def _explained(error: BaseException, workdir: Path | None) -> str | None:
    place = f" {workdir}" if workdir else ""
    if isinstance(error, MemberFailed):
        return str(error)
    if _says_full(error):
        return (
            f"the disk of{place or ' the run'} is full; what was complete there is still good. "
            "Free some space and give the same command again"
        )
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"cannot write {error.filename or place}: {os.strerror(error.errno)}"
    if "RESOURCE_EXHAUSTED" in str(error) or isinstance(error, MemoryError):
        return "out of memory; smaller microbatches (train.accumulate), model.remat and mesh.fsdp need less"
    return None


def _says_full(error: BaseException) -> bool:
    return getattr(error, "errno", None) in _DISK or any(text in str(error) for text in _DISK_TEXTS)


def keep_traceback(error: BaseException, path: Path) -> Path | None:
    """Writes the traceback there, or among the temporary files; the path where it now is."""
    text = "".join(traceback.format_exception(error))
    for place in (path, Path(tempfile.gettempdir()) / f"lowprec-{os.getpid()}-traceback.txt"):
        try:
            if place.parent.is_dir():
                place.write_text(text)
                return place
        except OSError:
            continue
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and what happened while it was handled."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop(0)
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        waiting += [each.__cause__, each.__context__, *getattr(each, "exceptions", ())]
