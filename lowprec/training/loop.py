"""The training loop. The order of its steps is what makes a resumed run equal, bit for bit, to one never stopped:

    evaluate the old state → save it → take the next batch → step → log the metrics of the step before

A checkpoint of step s is left after everything that belongs to s was written: its line of metrics, and its evaluation.
Metrics are read one step late, so that the device always has the next step to do.
"""

import math
from typing import IO, Any

import jax
import numpy as np

from lowprec.errors import UsageError
from lowprec.models import count_parameters
from lowprec.training.checkpoints import Checkpoints
from lowprec.training.config import RunConfig, resolve
from lowprec.training.metrics import JsonLines, TensorBoard, Writers, read_lines
from lowprec.training.progress import Clock, Progress
from lowprec.training.program import Program
from lowprec.training.run_directory import RunDirectory, write_json
from lowprec.training.state import TrainState
from lowprec.training.step import STEP_METRICS
from lowprec.training.stop import StopRequest
from lowprec.training.summary import Status, summarize


class Diverged(Exception):
    """A loss or a gradient is not finite.

    Attributes:
      step: the first whose numbers are not good.
    """

    def __init__(self, what: str, value: float, step: int):
        super().__init__(f"{what} of step {step} is {value}")
        self.step = step


def train(config, workdir, *, stream: IO[str] | None = None) -> dict[str, Any]:
    """Trains, or goes on with, the run of a config in a directory of its own.

    Args:
      config: RunConfig, ConfigDict or dict.
      workdir: empty, absent, or holding this config's run; a finished run is not repeated.
      stream: where progress is shown; standard error when None.
    Returns:
      The content of summary.json; "status" says how it ended: done, diverged or interrupted.
    Raises:
      UsageError: (a ValueError) what was asked for cannot be served; nothing has been changed then.
    """
    config, run = resolve(config), RunDirectory(workdir)
    run.check(config)
    finished = run.finished()
    if finished is not None:
        return finished
    program = Program(config)
    with run.claimed(), StopRequest() as stop:
        training = Training(program, run, stop, stream)
        try:
            training.start()
            status = training.run()
        except UsageError:
            raise
        except Exception:
            training.write_summary("failed")
            raise
        finally:
            training.close()
        return training.write_summary(status)


class Training:
    """The state of the loop."""

    def __init__(self, program: Program, run: RunDirectory, stop: StopRequest, stream: IO[str] | None):
        self.program, self.config, self.run_directory, self.stop = program, program.config, run, stop
        self.stream = stream
        self.checkpoints = Checkpoints(run.checkpoints, self.config.checkpoint.keep)
        self.step, self.resumed_at = 0, 0
        self.state: TrainState | None = None
        self.batches = self.display = self.writers = None
        self.clock = Clock()
        # What a checkpoint remembers beside state and data.
        self.progress: dict[str, Any] = {"train_loss": None, "evaluation": None, "best": None, "health": None}
        self.pending: tuple[int, jax.Array] | None = None  # (step, metrics) not read back yet
        self.tracing = False

    def start(self) -> None:
        """Takes the newest good checkpoint, or the initial state; from here on the directory is written to."""
        restored = self.checkpoints.restore(self.program.abstract_state())
        self.batches = self.program.batches()
        notes = []
        if restored is None:
            refuse_lost_checkpoints(self.run_directory)
            self.state = self.program.initial_state()
        else:
            checkpoint, damaged = restored
            self.batches.set_state(checkpoint.data)
            self.checkpoints.set_aside(damaged)
            notes += [f"checkpoint {path} cannot be read ({reason}); it was set aside" for path, reason in damaged]
            notes.append(f"going on from the checkpoint of step {checkpoint.step}")
            self.step = self.resumed_at = checkpoint.step
            self.state = checkpoint.state
            self.progress = {name: checkpoint.progress.get(name) for name in (*self.progress, "state_sha256")}
            self.clock = Clock(**{name: checkpoint.progress[name] for name in self.clock.state()})
        write_json(self.run_directory.config, self.config.to_dict())
        writers = [JsonLines(self.run_directory.metrics, self.step)]
        if self.config.log.tensorboard:
            writers.append(TensorBoard(self.run_directory.tensorboard, self.step))
        self.writers = Writers(*writers)
        self.display = Progress(self.config.train.steps, self.step, self.stream)
        for note in (*notes, describe(self.program)):
            self.display.note(note)

    def run(self) -> Status:
        """Trains to the end, to a stop or to divergence."""
        steps = self.config.train.steps
        try:
            while True:
                stopping = self.stop.requested
                if self.step > self.resumed_at:
                    self.settle(stopping is not None)
                if self.step == steps:
                    return "done"
                if stopping:
                    self.display.note(f"{stopping}: stopped after step {self.step}; the same command goes on from there")
                    return "interrupted"
                tokens = self.program.put(next(self.batches))
                self.trace()
                self.state, metrics = self.program.train_step(self.state, tokens)
                self.step += 1
                if self.pending:
                    self.log(self.read_pending())
                self.pending = (self.step, metrics)
        except Diverged as diverged:
            self.step = diverged.step - 1
            self.progress["diverged"] = str(diverged)
            saved = self.checkpoints.steps()
            kept = f"the newest checkpoint is of step {saved[-1]}" if saved else "there is no checkpoint"
            self.display.note(f"diverged: {diverged}; step {self.step} was the last good one; {kept}")
            return "diverged"

    def settle(self, stopping: bool) -> None:
        """Evaluates and saves the state of this step, if it is time to."""
        last = self.step == self.config.train.steps
        evaluating, saving = last or is_due(self.step, self.config.eval.every), last or stopping
        saving = saving or is_due(self.step, self.config.checkpoint.every)
        if not evaluating and not saving:
            return
        line = self.read_pending()
        if evaluating:
            line |= self.evaluate()
        self.log(line, always=True)
        if evaluating and not math.isfinite(line["eval_loss"]):
            raise Diverged("the evaluation loss", line["eval_loss"], self.step)
        if saving:
            self.writers.flush()
            state = {**self.progress, **self.clock.state()}
            self.progress["state_sha256"] = self.checkpoints.save(self.step, self.state, self.batches.get_state(), state)
        self.clock.restart()

    def read_pending(self) -> dict[str, Any]:
        """Waits for the metrics of the last step not read yet: a line for metrics.jsonl."""
        step, metrics = self.pending
        self.pending = None
        measured = dict(zip(STEP_METRICS, np.asarray(metrics, np.float64).tolist(), strict=True))
        rate = self.clock.step_done(self.program.tokens_per_step)
        line = {
            "step": step,
            "loss": measured.pop("loss"),
            "tokens": step * self.program.tokens_per_step,
            **measured,
            "tokens_per_second": round(rate, 1),
            "seconds": round(self.clock.seconds, 3),
        }
        line["bits_per_byte"] = self.program.data.bits_per_byte(line["loss"], split="train")
        for name in ("loss", "grad_norm"):
            if not math.isfinite(line[name]):
                self.writers.write(line)
                raise Diverged(f"the {name.replace('_', ' ')}", line[name], step)
        self.progress["train_loss"] = line["loss"]
        return line

    def log(self, line: dict[str, Any], always: bool = False) -> None:
        if always or is_due(line["step"], self.config.log.every):
            self.writers.write(line)
        self.display.step(line)

    def evaluate(self) -> dict[str, Any]:
        """Numbers for the line of this step."""
        evaluation = self.program.evaluate(self.state.params).metrics(self.program.data)
        self.progress["evaluation"] = {"step": self.step, **evaluation}
        best = self.progress["best"]
        if best is None or evaluation["eval_loss"] < best["eval_loss"]:
            self.progress["best"] = {"step": self.step, "eval_loss": evaluation["eval_loss"]}
        text = (
            f"evaluation at step {self.step}: loss {evaluation['eval_loss']:.4f}, "
            f"{evaluation['eval_bits_per_byte']:.4f} bits/byte "
            f"({evaluation['eval_bits_per_byte_full_precision']:.4f} with the full-precision forward pass)"
        )
        health: dict[str, Any] = {}
        if self.config.eval.health:
            measured = self.program.measure_health(self.state.params)
            health = measured.metrics()
            self.progress["health"] = measured.summary()
            worst = measured.worst()
            if worst:
                text += f"; SQNR {health['sqnr_db']:.1f} dB, least {worst[2]:.1f} dB: {worst[1]} of {worst[0]}"
        self.display.note(text)
        return evaluation | health

    def trace(self) -> None:
        """Starts and ends the profiler's trace, if one is wanted."""
        profile, done = self.config.profile, self.step - self.resumed_at
        if profile.steps and done == profile.skip:
            jax.profiler.start_trace(self.run_directory.profile)
            self.tracing = True
        elif self.tracing and done == profile.skip + profile.steps:
            self.end_trace()

    def end_trace(self) -> None:
        if self.tracing:
            jax.block_until_ready(self.state)
            jax.profiler.stop_trace()
            self.tracing = False

    def write_summary(self, status: Status) -> dict[str, Any]:
        progress = {**self.progress, **self.clock.state()}
        summary = summarize(self.program, status, self.step, progress)
        write_json(self.run_directory.summary, summary)
        return summary

    def close(self) -> None:
        self.end_trace()
        for resource in (self.writers, self.batches):
            if resource is not None:
                resource.close()


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def describe(program: Program) -> str:
    """What is about to be trained, in one line."""
    config, mesh = program.config, program.mesh.shape
    parameters = count_parameters(config.model, program.data.vocab_size)
    return (
        f"{config.recipe} on {program.data.name}: {parameters.total:,} parameters ({parameters.non_embedding:,} without "
        f"embeddings), {config.train.steps} steps of {program.tokens_per_step} tokens, {mesh['data']}×{mesh['fsdp']} "
        f"{jax.devices()[0].device_kind}; compiling"
    )


def refuse_lost_checkpoints(run: RunDirectory) -> None:
    """Does not start over where a checkpoint must have been: its metrics would be cut off.

    Raises:
      UsageError: (a ValueError) if the run had come past its first checkpoint.
    """
    lines, stored = read_lines(run.metrics), run.read_config()
    every = stored.checkpoint.every if stored else 0
    if lines and every and lines[-1]["step"] > every:
        raise UsageError(
            f"{run.checkpoints} has no checkpoint, although {run.metrics} goes to step {lines[-1]['step']}; nothing was "
            f"changed. Put the checkpoints back, or train into another --workdir"
        )
