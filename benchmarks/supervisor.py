"""A process that measures, watched: when it hangs or dies of a case, another one goes on with the next case."""

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lowprec.analysis.bench.runner import Results
from lowprec.training.run_directory import read_json

# The exit status of a process whose device computes no more, for instance because a kernel read outside of its memory.
UNHEALTHY = 4
_POLL_SECONDS = 0.25


def supervise(
    command: Callable[[float], Sequence[str]],
    path: Path,
    *,
    end: float,
    case_seconds: float,
    environment: Mapping[str, str] | None = None,
) -> bool:
    """Runs a command until it ends with status 0, with as many processes as it takes.

    Args:
      command: seconds left -> its words. It keeps its `Results` at `path`.
      end: on `time.monotonic`'s clock, when it is killed.
      case_seconds: what a case, or starting, may take.
    Returns:
      Whether it ended by itself. False: the time is over, or a process ended without having started any case.
    """
    while (left := end - time.monotonic()) > 0:
        before = _progress(path)
        with subprocess.Popen(command(left), env=None if environment is None else dict(environment)) as process:
            reason = _watched(process, path, end, case_seconds)
        moved = _progress(path) != before
        if path.exists():
            Results(path).lose(None if time.monotonic() >= end else reason)
        if process.returncode == 0:
            return True
        print(f"the process {reason or 'was stopped'}", file=sys.stderr, flush=True)
        if not moved:
            return False
    return False


def _watched(process, path, end, case_seconds):
    """Why it ended, once it has."""
    seen, since = _progress(path), time.monotonic()
    while process.poll() is None:
        time.sleep(_POLL_SECONDS)
        now, progress = time.monotonic(), _progress(path)
        if progress != seen:
            seen, since = progress, now
        if now >= end or now - since > case_seconds:
            process.kill()
            process.wait()
            return f"took more than {case_seconds:.0f} s"
    return f"ended with status {process.returncode}"


def _progress(path):
    found = read_json(path) or {}
    return found.get("running"), len(found.get("cases", {}))
