"""A trace of a few steps for the jax profiler (`profile.*`): open it with xprof or Perfetto."""

from pathlib import Path

import jax

from lowprec.training.config import ProfileConfig


class Profiler:
    """Traces `steps` steps after the first `skip` of this process.

    Args:
      directory: where the trace goes.
      first_step: with which the process began.
    """

    def __init__(self, config: ProfileConfig, directory: Path, first_step: int):
        self._start = first_step + config.skip
        self._stop = self._start + config.steps
        self._directory, self._running = directory, False

    def before_step(self, step: int, state: object) -> None:
        """Starts or ends the trace if it is time to; `step` steps are done."""
        if step == self._start and self._stop > self._start:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._directory)
            self._running = True
        elif step >= self._stop:
            self.close(state)

    def close(self, state: object = None) -> None:
        """Ends the trace when the work in it is done."""
        if self._running:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._running = False
