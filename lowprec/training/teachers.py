"""The teacher of a run: the newest checkpoint of another run, opened as `lowprec eval` does."""

from pathlib import Path

from lowprec.errors import UsageError
from lowprec.training.config import RunConfig
from lowprec.training.objective_choice import Teacher, check_objective, takes_teacher
from lowprec.training.standalone_evaluation import open_run
from lowprec.training.tasks import task_of


def open_teacher(config: RunConfig) -> Teacher | None:
    """The teacher that a run asks for; None where it asks for none. Writes nothing.

    Raises:
      UsageError: (a ValueError) there is no such run, it cannot be read, or it does not fit: other tokens or, where
        layers are compared one by one, another shape.
    """
    objective = config.objective
    check_objective(objective)
    if not takes_teacher(objective):
        return None
    try:
        program, checkpoint, _ = open_run(Path(objective.teacher))
    except UsageError as error:
        raise UsageError(f"objective.teacher: {error}") from None
    theirs = program.config
    if task_of(theirs.model) != task_of(config.model):
        raise UsageError(f"objective.teacher: {theirs.model.name} and {config.model.name} are asked different things")
    if task_of(config.model).unit == "token" and theirs.data.tokenizer != config.data.tokenizer:
        raise UsageError(
            f"objective.teacher: it reads tokens of {theirs.data.tokenizer!r}, not of {config.data.tokenizer!r}"
        )
    trained_on = lambda data: (data.name, data.train_split, data.max_bytes, data.text_key)
    if config.data.tokenizer.startswith("bpe") and trained_on(theirs.data) != trained_on(config.data):
        raise UsageError(f"objective.teacher: its {theirs.data.tokenizer} was trained on other text")
    if objective.hidden or objective.name == "teacher_intervention":
        for key in ("name", "layers", "width", "heads"):
            there, here = getattr(theirs.model, key), getattr(config.model, key)
            if there != here:
                raise UsageError(
                    f"objective.teacher: its model.{key} is {there!r}, not {here!r}; layers are compared one by one"
                )
    identity = f"{theirs.hash()}@{checkpoint.step}"
    return Teacher(program.now.quantized, checkpoint.state.variables, program.outputs, identity)
