"""Files that are either whole or absent, beside the prepared sets."""

import contextlib
import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lowprec.errors import UsageError

ABANDONED_AFTER_SECONDS = 24 * 3600


def cache_directory(root: Path) -> Path:
    """<root>/lowprec_cache; where root is read-only (a shared copy of the sets), below ~/.cache/lowprec."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    elsewhere = home / "lowprec" / hashlib.sha256(str(root).encode()).hexdigest()[:12]
    for directory in (root / "lowprec_cache", elsewhere):
        with contextlib.suppress(OSError):
            directory.mkdir(parents=True, exist_ok=True)
            if os.access(directory, os.W_OK):
                return directory
    raise UsageError(
        f"neither {root} (data.data_dir) nor {home} (XDG_CACHE_HOME) can be written: the packed text needs a place"
    )


def cache_name(identity: dict) -> str:
    """A file name for the content that `identity` determines: a readable part, and a hash of all of it."""
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", f"{identity['set']}-{identity['split']}")[:80].strip("-")
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return f"{readable}-{digest[:16]}"


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its name only when the block ends well; until then, and if killed, it has another."""
    hidden = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    for left in filter(is_abandoned, path.parent.glob(f".{path.name}.*")):
        left.unlink(missing_ok=True)
    try:
        with hidden.open("wb") as file:
            yield file
        hidden.replace(path)
    finally:
        hidden.unlink(missing_ok=True)


def is_abandoned(path: Path) -> bool:
    """Whether nobody has written to this unfinished file or directory for a day: its process was killed."""
    try:
        return time.time() - path.stat().st_mtime > ABANDONED_AFTER_SECONDS
    except FileNotFoundError:
        return False


def write_json(path: Path, value: dict) -> None:
    with written_whole(path) as file:
        file.write(json.dumps(value, indent=1, sort_keys=True).encode())


def read_json(path: Path) -> dict | None:
    """The object in the file, or None where there is no such file or no such object in it."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
