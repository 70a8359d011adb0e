"""`lowprec eval`: a checkpoint of a run on held-out data, under its own recipe or another."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from lowprec.errors import UsageError
from lowprec.nn.learned import carried
from lowprec.nn.places import LEARNED
from lowprec.recipes import Recipe, parse
from lowprec.training.checkpoints import Checkpoint, Checkpoints, Damaged
from lowprec.training.config import MeshConfig, ObjectiveConfig, OptimizerConfig, RunConfig, resolve
from lowprec.training.evaluation import Evaluation
from lowprec.training.health import Health
from lowprec.training.program import Program
from lowprec.training.run_directory import RunDirectory
from lowprec.training.state import TrainState
from lowprec.training.tasks import SCORES


def evaluate_run(
    workdir: Path, *, step: int | None = None, recipe: str | None = None, batches: int | None = None
) -> str:
    """Evaluates without changing anything in the directory.

    Under another recipe, learned quantizer parameters are those of the checkpoint where both recipes read the same ones
    (`nn.learned.carried`): a model trained under nested_8 is read at 4 bits with the steps it has learned for them. All
    others start from the parameters and the first held-out batch.

    Args:
      step: of the checkpoint; the newest good one when None.
      recipe: of the forward pass; the run's own when None.
      batches: of held-out examples; as in the run's config when None.
    Returns:
      A text for people.
    Raises:
      UsageError: (a ValueError) no run or no checkpoint there, or it cannot be read.
    """
    program, checkpoint, damaged = open_run(workdir, step=step, batches=batches)
    variables = checkpoint.state.variables
    if recipe is not None and str(parse(recipe)) != program.config.recipe:
        trained, program = program, Program(_untrained(program.config, recipe), program.data)
        variables = under_recipe(program, checkpoint.state, trained.recipe)
    evaluation = program.evaluate(variables)
    health = program.measure_health(variables)
    lines = [
        *(f"checkpoint {path} cannot be read: {reason}" for path, reason in damaged),
        f"{workdir}, step {checkpoint.step}, recipe {program.recipe}, "
        f"{evaluation.tokens:,} {program.task.unit}s of {program.data.name}",
        "",
        *_losses(evaluation, program),
        *_operands(health),
        "",
        *program.measure_outliers(variables).table(),
    ]
    return "\n".join(lines)


def under_recipe(program: Program, state: TrainState, trained: Recipe) -> dict[str, Any]:
    """The collections of a program's model, for a state that was trained under another recipe."""
    variables = program.initial_variables(state.params, state.model_state)
    learned, before = variables.get(LEARNED), state.quantizers.params
    if not learned or not before:
        return variables
    return variables | {LEARNED: carried(program.recipe, learned, trained, before)}


def open_run(
    workdir: Path, *, step: int | None = None, batches: int | None = None
) -> tuple[Program, Checkpoint, list[Damaged]]:
    """The program of a run on one device of this machine, a checkpoint, and the checkpoints that cannot be read, why.

    Args and errors are those of `evaluate_run`.
    """
    program = Program(_config(workdir, batches))
    restored = Checkpoints(RunDirectory(workdir).checkpoints).restore(program.abstract_state_at, step)
    if restored is None:
        raise UsageError(f"{workdir} has no checkpoint yet")
    checkpoint, damaged = restored
    program.stage = checkpoint.progress.get("stage") or 0
    return program, checkpoint, damaged


def _untrained(config: RunConfig, recipe: str) -> RunConfig:
    """With another recipe, and without what of the training might not fit it."""
    return replace(
        config,
        recipe=recipe,
        objective=ObjectiveConfig(),
        optimizer=OptimizerConfig(),
        train=replace(config.train, update=""),
    )


def _config(workdir: Path, batches: int | None) -> RunConfig:
    """The run's, on one device of this machine."""
    run = RunDirectory(workdir)
    if not run.path.is_dir():
        raise UsageError(f"there is no directory {workdir}")
    stored = run.read_config()
    if stored is None:
        raise UsageError(f"{workdir} is not the directory of a run: it has no config.json")
    return resolve(
        replace(
            stored,
            eval=replace(stored.eval, batches=stored.eval.batches if batches is None else batches),
            mesh=MeshConfig(data=1),
        )
    )


def _losses(evaluation: Evaluation, program: Program) -> list[str]:
    quantized, full_precision = evaluation.scores(program.data)
    lines = [f"forward pass     nats/{program.task.unit}  std. error  {SCORES[program.task.score]:>9}"]
    for name, value, score in (
        ("quantized", evaluation.quantized, quantized),
        ("full precision", evaluation.full_precision, full_precision),
        ("difference", evaluation.gap, quantized - full_precision),
    ):
        lines.append(f"{name:15}  {value.loss:10.4f}  {value.sem:10.4f}  {score:9.4f}")
    return lines


def _operands(health: Health) -> list[str]:
    if not health.layers:
        return []
    lines = ["", "operand    SQNR dB   cosine  clipped  underflowed   (means over the layers)"]
    shown = lambda value, fmt: "-" if value is None else format(value, fmt)
    for name, of in health.by_operand().items():
        lines.append(
            f"{name:9}  {shown(of['sqnr_db'], '.1f'):>7}  {shown(of['cosine'], '.5f'):>7}  "
            f"{shown(of['clipped'], '.2%'):>7}  {shown(of['underflowed'], '.2%'):>11}"
        )
    worst = health.worst()
    if worst:
        lines.append(f"least: {worst[2]:.1f} dB, {worst[1]} of {worst[0]}")
    drowned = health.drowned()
    if drowned:
        lines.append(f"gradients below √3 times their rounding noise: {', '.join(drowned[:4])}, {len(drowned)} in all")
    return lines
