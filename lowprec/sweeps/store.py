"""The store of a sweep: one directory a run, in which alone it stands what became of it.

    <root>/<run id>/summary.json    written last, and whole: the run is finished if it says done or diverged
                    status.json     state, owner, attempts, error: for people, and for what is not a result
                    leases/         who has the run; see `sweeps.lease`
                    config.json, metrics.jsonl, checkpoints/, …    as `lowprec train` leaves them

Any number of processes on any machines may work on one store, and any of them may be killed at any time.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lowprec.errors import UsageError
from lowprec.sweeps.lease import Lease, Observer, Owner, Record, newest
from lowprec.sweeps.plan import PlannedRun
from lowprec.training.checkpoints import Checkpoints
from lowprec.training.run_directory import RunDirectory, read_json, write_json

# waiting: nobody has begun it, or who did left it; running: a worker has it; stale: its worker died; interrupted: its
# worker was told to stop; unreadable: its summary or status cannot be read.
State = Literal["waiting", "running", "stale", "interrupted", "done", "diverged", "failed", "unreadable"]
STATES: tuple[State, ...] = get_args(State)
CLAIMABLE: tuple[State, ...] = ("waiting", "stale", "interrupted")
ENDED: tuple[State, ...] = ("done", "diverged", "failed", "unreadable")

# Of summaries.
SUMMARIES = ("done", "diverged", "failed", "interrupted")


@dataclass(frozen=True)
class Seen:
    """What a store says of a run.

    Attributes:
      state: see State.
      owner: the process that has it, or had it last.
      attempts: how often a worker has begun on it or gone on with it.
      deaths: how many of these in a row died without a new checkpoint, not counting the last.
      error: why it failed, is unreadable or was interrupted.
      call: of the order under which this was recorded.
      lease: the newest; None before the first claim.
      unreadable: the file that cannot be read.
    """

    state: State
    owner: Owner | None = None
    attempts: int = 0
    deaths: int = 0
    error: str | None = None
    call: str | None = None
    lease: Record | None = None
    unreadable: Path | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing is left to do for it, unless failed runs are tried again."""
        return self.state in ENDED

    def may_be_retried(self, call: str | None) -> bool:
        """Whether it failed, or is unreadable, and that was not recorded under this call."""
        return self.state == "unreadable" or (self.state == "failed" and (call is None or self.call != call))


class Store:
    """The runs below a directory.

    Args:
      root: the directory, which need not exist.
      patience: seconds for which this object must have seen a heartbeat unchanged to take its owner for dead, where
        locks do not tell.
      machine: where it is, see `Observer`; this machine if not given.
    """

    def __init__(self, root: str | os.PathLike[str], *, patience: float = 60.0, machine: str | None = None):
        self.root = Path(root)
        self._observer = Observer(patience, machine)

    def directory(self, run_id: str) -> RunDirectory:
        """Of a run; it need not exist."""
        return RunDirectory(self.root / run_id)

    def status_path(self, run_id: str) -> Path:
        return self.root / run_id / "status.json"

    def state(self, run: PlannedRun) -> State:
        """What became of a run. An unchanged heartbeat is noticed by asking again."""
        return self.look(run).state

    def look(self, run: PlannedRun) -> Seen:
        """The state of a run, and what is known about it."""
        # The lease first: a result that was written before it ended is then seen for certain.
        lease = newest(self._leases(run.id))
        alive = lease is not None and lease.held and self._observer.is_alive(lease)
        dead = lease is not None and lease.held and not alive
        known: dict[str, Any] = {"lease": lease}
        if lease is not None:
            known |= {"owner": lease.owner, "attempts": lease.number, "deaths": lease.deaths}
        try:
            summary = _read_summary(self.directory(run.id).summary)
        except UsageError as error:
            if not alive:
                return Seen("unreadable", error=str(error), unreadable=self.directory(run.id).summary, **known)
            summary = None
        if summary in ("done", "diverged"):
            return Seen(summary, **known)
        if alive:
            return Seen("running", **known)
        try:
            status = read_json(self.status_path(run.id)) or {}
        except UsageError as error:
            return Seen("unreadable", error=str(error), unreadable=self.status_path(run.id), **known)
        known |= {"error": status.get("error"), "call": status.get("call")}
        recorded = status.get("state")
        # A status that is older than the lease tells of an earlier attempt.
        if lease is not None and status.get("attempts") != lease.number:
            recorded, known["error"] = None, None
        if recorded == "failed":
            return Seen("failed", **known)
        if dead:
            return Seen("stale", **known)
        return Seen("interrupted" if recorded == "interrupted" else "waiting", **known)

    def claim(
        self, run: PlannedRun, *, retry_failed: bool = False, attempts: int = 5, call: str | None = None
    ) -> Lease | None:
        """Makes this process the one that trains a run, if nobody else does and it is not finished.

        The directory is then as `training.launch.train` expects it. A run whose workers have died too often is
        recorded as failed instead.

        Args:
          run: of a plan.
          retry_failed: whether a failed run is claimed too, and one whose summary or status cannot be read: that file
            gets another name then.
          attempts: deaths in a row, without a new checkpoint between them, after which the run has failed.
          call: a failed run that was recorded under this one is not claimed again.
        Returns:
          The lease, which the caller releases in the end; None if the run is not to be had.
        Raises:
          OSError: the store cannot be written.
        """
        seen = self.look(run)
        if seen.state not in CLAIMABLE and not (retry_failed and seen.may_be_retried(call)):
            return None
        directory = self.directory(run.id)
        leases = self._leases(run.id)
        leases.mkdir(parents=True, exist_ok=True)
        checkpoint = max(Checkpoints(directory.checkpoints).steps(), default=0)
        deaths = 0 if seen.state in ("failed", "unreadable") else _deaths(seen.lease, seen.state, checkpoint)
        after = seen.lease.number if seen.lease else 0
        lease = Lease.take(leases, after, deaths=deaths, checkpoint=checkpoint)
        if lease is None:
            return None
        try:
            if seen.unreadable:
                _move_aside(seen.unreadable)
            if not directory.config.exists():
                # Its own, without which `train` would take status and leases for somebody else's files.
                write_json(directory.config, run.config.to_dict())
            if deaths >= attempts:
                error = (
                    f"its worker died {deaths} times without coming to a new checkpoint (killed, out of memory, or "
                    f"crashed): see the logs in {self.root / 'logs'}"
                )
                self.record(run, lease, "failed", error=error, call=call)
                lease.release()
                return None
            self.record(run, lease, "running", call=call)
        except BaseException:
            lease.release()
            raise
        return lease

    def record(
        self, run: PlannedRun, lease: Lease, state: State, *, error: str | None = None, call: str | None = None
    ) -> None:
        """Writes status.json, unless the lease was lost.

        Raises:
          OSError: it cannot be written.
        """
        if not lease.is_mine():
            return
        owner = Owner.here()
        status = {
            "state": state,
            "owner": {"host": owner.host, "pid": owner.pid},
            "attempts": lease.number,
            "deaths": lease.deaths,
            "error": error,
            "call": call,
        }
        write_json(self.status_path(run.id), status)

    def _leases(self, run_id: str) -> Path:
        return self.root / run_id / "leases"


def _read_summary(path: Path) -> State | None:
    """How the run ended, or was left, by its summary; None if there is none.

    Raises:
      UsageError: (a ValueError) it does not say.
    """
    summary = read_json(path)
    if summary is None:
        return None
    if summary.get("status") not in SUMMARIES:
        raise UsageError(f"{path} does not say how the run ended: its status is {summary.get('status')!r}")
    return summary["status"]


def _deaths(lease: Record | None, state: State, checkpoint: int) -> int:
    """How many workers in a row have died on a run, with that of a stale lease, without a new checkpoint."""
    if lease is None or checkpoint > lease.checkpoint:
        return int(state == "stale")
    return lease.deaths + (state == "stale")


def _move_aside(path: Path) -> None:
    names = (path.with_name(f"{path.name}.unreadable{i or ''}") for i in range(1000))
    path.rename(next(name for name in names if not name.exists()))
