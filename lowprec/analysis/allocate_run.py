"""`lowprec allocate`: a format for each layer of a trained run, within a budget of bits, as a recipe to train with."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowprec.analysis.allocation import WEIGHTS_ALONE, Allocation, CostTable, solve_exactly, solve_greedily
from lowprec.analysis.layer_costs import LayerCosts, layer_costs
from lowprec.analysis.product_weights import ProductWeights
from lowprec.analysis.table import markdown_table
from lowprec.errors import UsageError, unknown
from lowprec.training.program import Program
from lowprec.training.standalone_evaluation import open_run
from lowprec.training.state import MODEL_STATE

SOLVERS: dict[str, Callable[[CostTable, float], Allocation]] = {"milp": solve_exactly, "greedy": solve_greedily}


def allocate_run(
    workdir: Path,
    *,
    formats: Sequence[str],
    bits: float,
    measure: str = "hessian",
    solver: str = "milp",
    samples: int = 16,
    batches: int | None = None,
    step: int | None = None,
    rule: str = WEIGHTS_ALONE,
) -> str:
    """Measures the plain model of a checkpoint on held-out data, and chooses. Changes nothing in the directory.

    Args:
      formats: the candidates.
      bits: stored for a weight on average, scales counted in.
      measure: one of `layer_costs.MEASURES`.
      solver: one of `SOLVERS`.
      samples, batches: of the measurement; batches as in the run's config when None.
      step: of the checkpoint; the newest good one when None.
      rule: see `Allocation.recipe`.
    Returns:
      A text for people: a table of the layers, and the recipe.
    Raises:
      UsageError: (a ValueError) what is asked for is not there, or no choice is within the budget.
    """
    if solver not in SOLVERS:
        raise unknown("solver", solver, SOLVERS)
    program, checkpoint, damaged = open_run(workdir, step=step, batches=batches)
    found = measure_run(program, checkpoint.state.variables, formats, measure, samples)
    total = sum(found.weights.values())
    chosen = SOLVERS[solver](found.table, bits * total / 8)
    recipe = chosen.recipe(rule)
    lines = [
        *(f"checkpoint {path} cannot be read: {reason}" for path, reason in damaged),
        f"{workdir}, step {checkpoint.step}: cost of each format by {measure}, on {len(_examples(program))} batches of "
        f"{program.data.name}",
        "",
        _table(found, chosen),
        "",
        f"{chosen.size:,.0f} bytes, {8 * chosen.size / total:.3f} bits a weight; cost {chosen.cost:.4g}",
        *_alternatives(found.table, total),
        "",
        "recipe:",
        str(recipe),
    ]
    return "\n".join(lines)


def measure_run(
    program: Program, variables: dict[str, Any], formats: Sequence[str], measure: str, samples: int
) -> LayerCosts:
    """The costs for the plain model of a run, on its held-out data.

    Args:
      variables: of a training state; those of its recipe are left out.
    """
    variables = {name: tree for name, tree in variables.items() if name in ("params", MODEL_STATE)}
    product, batches, task = ProductWeights(program.model), _examples(program), program.task

    def losses(weights, examples):
        of_predictions = task.losses(product.apply(variables, weights, task.inputs(examples)), examples)
        return jnp.mean(of_predictions, axis=tuple(range(1, of_predictions.ndim)))

    weights = jax.jit(product.weights)(variables, task.inputs(batches[0]))
    return layer_costs(losses, weights, batches, formats, measure=measure, samples=samples, key=program.keys.evaluation)


def _examples(program) -> list[Any]:
    """Of the full batches, all of one shape; of a single one that is not full, its rows again and again."""
    batches = program.eval_batches
    full = [program.task.examples(batch) for batch in batches if np.all(np.asarray(batch["weight"]) > 0)]
    if full:
        return full
    weight = np.asarray(batches[0]["weight"])
    rows = np.resize(np.flatnonzero(weight), weight.size)
    return [jax.tree.map(lambda leaf: leaf[rows], program.task.examples(batches[0]))]


def _table(found: LayerCosts, chosen: Allocation) -> str:
    trace = ("trace ± std. error",) if found.trace else ()
    header = ("layer", "weights", *trace, *found.table.choices, "choice")
    rows = []
    for layer, costs in zip(found.table.layers, found.table.cost, strict=True):
        shown = [f"{mean:.3g} ± {sem:.2g}" for mean, sem in (found.trace[layer],)] if found.trace else []
        numbers = [f"{cost:.3g}" for cost in costs]
        rows.append((layer, f"{found.weights[layer]:,}", *shown, *numbers, chosen.choices[layer]))
    return markdown_table(header, rows)


def _alternatives(table: CostTable, total: int) -> list[str]:
    """What one format everywhere would cost."""
    lines = []
    for index, name in enumerate(table.choices):
        all_of_it = table.allocation([index] * len(table.layers))
        lines.append(
            f"{name} everywhere: {all_of_it.size:,.0f} bytes, {8 * all_of_it.size / total:.3f} bits a weight; "
            f"cost {all_of_it.cost:.4g}"
        )
    return lines


def split_formats(text: str) -> tuple[str, ...]:
    """Names with commas between them."""
    names = tuple(filter(None, (name.strip() for name in text.split(","))))
    if len(names) < 2:
        raise UsageError(f"an allocation chooses between two formats or more, e.g. int4@row,int8@row; not {text!r}")
    return names
