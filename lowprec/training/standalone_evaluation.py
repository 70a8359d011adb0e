"""`lowprec eval`: a checkpoint of a run on held-out text, under its own recipe or another."""

from dataclasses import replace
from pathlib import Path

from lowprec.errors import UsageError
from lowprec.recipes import parse
from lowprec.training.checkpoints import Checkpoints
from lowprec.training.config import MeshConfig, RunConfig, resolve
from lowprec.training.evaluation import Evaluation
from lowprec.training.health import Health
from lowprec.training.program import Program
from lowprec.training.run_directory import RunDirectory


def evaluate_run(
    workdir: Path, *, step: int | None = None, recipe: str | None = None, batches: int | None = None
) -> str:
    """Evaluates without changing anything in the directory.

    Args:
      step: of the checkpoint; the newest good one when None.
      recipe: of the forward pass; the run's own when None.
      batches: of held-out windows; as in the run's config when None.
    Returns:
      A text for people.
    Raises:
      UsageError: (a ValueError) no run or no checkpoint there, or it cannot be read.
    """
    own = _config(workdir, batches)
    program = Program(own)
    run = RunDirectory(workdir)
    restored = Checkpoints(run.checkpoints).restore(program.abstract_state(), step)
    if restored is None:
        raise UsageError(f"{workdir} has no checkpoint yet")
    checkpoint, damaged = restored
    variables = checkpoint.state.variables
    if recipe is not None and str(parse(recipe)) != own.recipe:
        program = Program(replace(own, recipe=recipe), program.data)
        variables = program.initial_variables(checkpoint.state.params)
    evaluation = program.evaluate(variables)
    health = program.measure_health(variables)
    lines = [
        *(f"checkpoint {path} cannot be read: {reason}" for path, reason in damaged),
        f"{workdir}, step {checkpoint.step}, recipe {program.config.recipe}, "
        f"{evaluation.tokens:,} tokens of {program.data.name}",
        "",
        *_losses(evaluation, program),
        *_operands(health),
    ]
    return "\n".join(lines)


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
    lines = ["forward pass     nats/token  std. error  bits/byte"]
    for name, value in (
        ("quantized", evaluation.quantized),
        ("full precision", evaluation.full_precision),
        ("difference", evaluation.gap),
    ):
        bits = program.data.bits_per_byte(value.loss, split="eval")
        lines.append(f"{name:15}  {value.loss:10.4f}  {value.sem:10.4f}  {bits:9.4f}")
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
