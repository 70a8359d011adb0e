"""A worker of a sweep: claims a run, trains it, records what became of it, and takes the next, until none is left.

`python -m lowprec.sweeps.worker ORDER` is one as a process of its own; ORDER is that of `Order.to_json`. Exit status:
0 nothing is left to do, 1 it cannot go on, 74 because the disk is full, 75 its lease was taken over, 130 it was told to
stop.
"""

import argparse
import contextlib
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from lowprec.errors import UsageError
from lowprec.sweeps.launchers import Order, Tally
from lowprec.sweeps.lease import BEATS_WITHIN_PATIENCE, Lease
from lowprec.sweeps.plan import Plan, PlannedRun
from lowprec.sweeps.store import State, Store
from lowprec.training import multihost
from lowprec.training.failures import explain, is_disk_full, keep_traceback
from lowprec.training.launch import train
from lowprec.training.packing import pack_key, train_packed

DONE, FAILED, BAD_USAGE, FULL, LOST, INTERRUPTED = 0, 1, 2, 74, 75, 130
# Between two looks at runs that others have, in seconds: after each look without news it is twice as long.
MIN_POLL, MAX_POLL = 0.1, 2.0
# A run whose workers have died so often in a row is not packed with others any more.
DEATHS_TOGETHER = 2

Say = Callable[[str], None]


def work(order: Order, *, say: Say = print) -> Tally:
    """Trains what is left of a plan, in its order, and waits for what others have: it takes over if they die.

    On SIGTERM and Ctrl-C the run is saved and given back, and the worker ends; other workers may go on with it. (In the
    main thread only: Python gives no signals to others.) A process whose lease is taken over, because it did not beat
    for `order.patience` seconds on a file system without locks, is ended at once by `os._exit`: whatever it still wrote
    would be written into the run of another. `order.threads` counts if jax has not computed in this process before.

    Args:
      order: see Order.
      say: takes each line of news.
    Returns:
      The state of the plan's runs; some are `left` only if it was told to stop.
    Raises:
      UsageError: (a ValueError) the plan cannot be read.
      OSError: the disk is full, or the store cannot be written; the runs it had can be claimed again.
    """
    plan, store = Plan.load(order.plan), Store(order.root, patience=order.patience)
    worker = _Worker(order, store, say)
    with _environment(order.threads), _signals(worker.check_leases), contextlib.suppress(KeyboardInterrupt):
        try:
            worker.train_all(list(plan.runs))
        finally:
            worker.give_back()
    return Tally.of(plan, store)


class _Worker:
    """What one worker has in hand."""

    def __init__(self, order: Order, store: Store, say: Say):
        self._order, self._store, self._say = order, store, say
        self._held: dict[str, tuple[PlannedRun, Lease]] = {}

    def train_all(self, waiting: list[PlannedRun]) -> None:
        """Returns when all have ended, or it was told to stop; what it still holds then is to be given back."""
        pause = MIN_POLL
        while waiting:
            claimed = self._claim_some(waiting)
            if claimed and not self._train(claimed):
                return
            if claimed:
                pause = MIN_POLL
            elif waiting:
                time.sleep(pause)
                pause = min(2 * pause, MAX_POLL)

    def _claim_some(self, waiting: list[PlannedRun]) -> list[PlannedRun]:
        """The first that can be had, with others that can be trained in one program with it; none if none can.

        Those that have ended are taken out of the list.
        """
        claimed: list[PlannedRun] = []
        key: str | None = None
        for run in list(waiting):
            if claimed and (pack_key(run.config) != key or self._is_suspect(run)):
                continue
            if not self._claim(run):
                if self._order.has_ended(self._store.look(run)):
                    waiting.remove(run)
                continue
            claimed.append(run)
            if len(claimed) == 1 and self._order.pack > 1 and not self._is_suspect(run):
                key = pack_key(run.config)
            if key is None or len(claimed) == self._order.pack:
                break
        return claimed

    def _is_suspect(self, run: PlannedRun) -> bool:
        """Whether it must be trained alone: if it kills its workers, it would take others with it."""
        seen = self._store.look(run)
        return seen.deaths + (seen.state == "stale") >= DEATHS_TOGETHER

    def _claim(self, run: PlannedRun) -> bool:
        order = self._order
        lease = self._store.claim(run, retry_failed=order.retry_failed, attempts=order.attempts, call=order.call)
        if lease is None:
            return False
        self._held[run.id] = run, lease
        lease.keep(order.patience / BEATS_WITHIN_PATIENCE, _end_lost)
        return True

    def _train(self, runs: list[PlannedRun]) -> bool:
        """Whether it may go on with others: it was not told to stop.

        Raises:
          OSError: the disk is full.
          KeyboardInterrupt: it was told to stop where nothing could be saved.
        """
        if len(runs) > 1:
            summaries = self._train_together(runs)
            if summaries is not None:
                ended = [self._ended(run, summary) for run, summary in zip(runs, summaries, strict=True)]
                return all(ended)
        return all(self._train_alone(run) for run in runs)

    def _train_together(self, runs: list[PlannedRun]) -> list[dict[str, Any]] | None:
        """The summaries; None if each must be trained alone: then the one that fails is known by its own message."""
        self._say(f"begins {len(runs)} runs in one program: {', '.join(run.id for run in runs)}")
        paths = [self._store.directory(run.id).path for run in runs]
        try:
            return train_packed([run.config for run in runs], paths, lanes=self._order.pack)
        except Exception as error:
            self._raise_if_full(error, runs[0])
            self._say(f"{_one_line(error)}; each of the {len(runs)} is trained alone")
            return None

    def _train_alone(self, run: PlannedRun) -> bool:
        self._say(f"begins {run.id}: {run.describe()}")
        directory = self._store.directory(run.id)
        try:
            summary = train(run.config, directory.path)
        except Exception as error:
            self._raise_if_full(error, run)
            message = explain(error, directory.path) or _one_line(error)
            kept = keep_traceback(error, directory.traceback)
            self._release(run.id, "failed", f"{message}{f' (traceback: {kept})' if kept else ''}")
            return True
        return self._ended(run, summary)

    def _ended(self, run: PlannedRun, summary: dict[str, Any]) -> bool:
        self._release(run.id, summary["status"])
        return summary["status"] != "interrupted"

    def give_back(self) -> None:
        """What is held, and has not ended by itself, can be claimed again."""
        for run_id in list(self._held):
            self._release(run_id, "interrupted")

    def _release(self, run_id: str, state: State, error: str | None = None) -> None:
        run, lease = self._held.pop(run_id)
        try:
            # A result stands in the summary; that the status cannot be written must not hide why.
            with contextlib.suppress(OSError):
                self._store.record(run, lease, state, error=error, call=self._order.call)
        finally:
            lease.release()
        self._say(f"{state}: {run.id}: {error or run.describe()}")

    def _raise_if_full(self, error: Exception, run: PlannedRun) -> None:
        """A full disk is no fault of the run: it can be claimed again, but not by a worker on this disk."""
        if is_disk_full(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._store.directory(run.id).path)) from error

    def check_leases(self) -> None:
        """Ends the process if a run that it has was taken over."""
        if not all(lease.is_mine() for _, lease in list(self._held.values())):
            _end_lost()


def _end_lost() -> NoReturn:
    _print("the lease was taken over: this process did not beat for too long. It ends")
    os._exit(LOST)


def _one_line(error: BaseException) -> str:
    first = str(error).strip().partition("\n")[0]
    return first if isinstance(error, UsageError) else f"{type(error).__name__}: {first}"


@contextlib.contextmanager
def _environment(threads: int) -> Iterator[None]:
    """Of a worker: a member of no run of several processes, whatever its driver is, with so many threads of the CPU.

    XLA's CPU client reads their number from NPROC when it is made; it has no other setting for it.
    """
    membership = (multihost.COORDINATOR, multihost.PROCESSES, multihost.PROCESS)
    before = {name: os.environ.get(name) for name in ("NPROC", *membership)}
    for name in membership:
        os.environ.pop(name, None)
    if threads:
        os.environ["NPROC"] = str(threads)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def _signals(check_leases: Callable[[], None]) -> Iterator[None]:
    """SIGTERM does what Ctrl-C does; a process that was suspended sees to its leases before it does anything else."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {
        signal.SIGTERM: signal.default_int_handler,
        signal.SIGINT: signal.default_int_handler,
        signal.SIGCONT: lambda number, frame: check_leases(),
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> int:
    """The process; see the top of this file."""
    from lowprec.training.host_memory import keep_freed_memory

    parser = argparse.ArgumentParser(prog="python -m lowprec.sweeps.worker", description="A worker of a sweep.")
    parser.add_argument("order", metavar="ORDER", help="as Order.to_json gives it")
    parser.add_argument(
        "--while-stdin-open", action="store_true", help="stop when it ends, that is, when who holds it has died"
    )
    arguments = parser.parse_args(argv)
    if arguments.while_stdin_open:
        threading.Thread(target=_stop_at_end_of_stdin, daemon=True, name="parent").start()
    keep_freed_memory()
    try:
        tally = work(Order.from_json(arguments.order), say=_print)
    except UsageError as error:
        return _ended_by(str(error), BAD_USAGE)
    except OSError as error:
        return _ended_by(explain(error, None) or _one_line(error), FULL if is_disk_full(error) else FAILED)
    except KeyboardInterrupt:
        return INTERRUPTED
    return INTERRUPTED if tally.left else DONE


def _stop_at_end_of_stdin() -> None:
    while os.read(0, 4096):
        pass
    _print("the process that started this worker is gone: it saves and stops")
    os.kill(os.getpid(), signal.SIGTERM)


def _print(text: str) -> None:
    with contextlib.suppress(OSError):  # on a full disk, say
        print(text, flush=True)


def _ended_by(message: str, status: int) -> int:
    _print(f"stopped: {message}")
    return status


if __name__ == "__main__":
    sys.exit(main())
