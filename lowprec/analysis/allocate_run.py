"""`lowprec allocate`: a format for each layer of a trained run, within a budget of bits or of loss, as a recipe."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowprec.analysis.allocation import (
    WEIGHTS_ALONE,
    Allocation,
    CostTable,
    bisect_loss,
    by_sensitivity,
    exact_pattern,
    measured_interactions,
    solve_exactly,
    solve_greedily,
)
from lowprec.analysis.layer_costs import LOSS_FACTOR, LayerCosts, layer_costs
from lowprec.analysis.product_weights import ProductWeights, mixed, rounded
from lowprec.analysis.table import markdown_table
from lowprec.errors import UsageError, unknown
from lowprec.training.program import Program
from lowprec.training.standalone_evaluation import open_run
from lowprec.training.state import MODEL_STATE

SOLVERS: dict[str, Callable[[CostTable, float], Allocation]] = {"milp": solve_exactly, "greedy": solve_greedily}
ORDERS = ("cost", "interactions")
_SPREAD = {"hessian": "trace ± std. error", "eigenvalue": "eigenvalue ± std. deviation"}


def allocate_run(
    workdir: Path,
    *,
    formats: Sequence[str],
    bits: float | None = None,
    increase: float | None = None,
    measure: str = "hessian",
    solver: str | None = None,
    order: str | None = None,
    samples: int = 16,
    batches: int | None = None,
    step: int | None = None,
    rule: str = WEIGHTS_ALONE,
) -> str:
    """Measures the plain model of a checkpoint on held-out data, and chooses. Changes nothing in the directory.

    Either within a budget of bits, or, of two formats, the smaller one in as many layers as keep the loss within a
    bound (`allocation.bisect_loss`).

    Args:
      formats: the candidates.
      bits: stored for a weight on average, scales counted in.
      increase: instead of bits: by how much the loss may rise above that of the plain model, in nats a prediction.
      measure: one of `layer_costs.MEASURES`.
      solver: of a budget: one of `SOLVERS`; milp when None.
      order: of a bound: one of `ORDERS`; cost when None. "interactions" measures the loss of every pair of layers too.
      samples, batches: of the measurement; batches as in the run's config when None.
      step: of the checkpoint; the newest good one when None.
      rule: see `Allocation.recipe`.
    Returns:
      A text for people: a table of the layers, and the recipe.
    Raises:
      UsageError: (a ValueError) what is asked for is not there, or no choice is within the budget or the bound.
    """
    _check(bits, increase, solver, order, formats)
    program, checkpoint, damaged = open_run(workdir, step=step, batches=batches)
    held_out = HeldOut(program, checkpoint.state.variables)
    found = held_out.costs(formats, measure, samples)
    total, bound = sum(found.weights.values()), []
    if bits is not None:
        chosen = SOLVERS[solver or "milp"](found.table, bits * total / 8)
    else:
        chosen, bound = _within_loss(held_out, found.table, LOSS_FACTOR[measure], increase, order or "cost")
    recipe = chosen.recipe(rule)
    lines = [
        *(f"checkpoint {path} cannot be read: {reason}" for path, reason in damaged),
        f"{workdir}, step {checkpoint.step}: cost of each format by {measure}, on {len(held_out.batches)} batches of "
        f"{program.data.name}",
        "",
        _table(found, chosen, _SPREAD.get(measure, "")),
        "",
        f"{chosen.size:,.0f} bytes, {8 * chosen.size / total:.3f} bits a weight; cost {chosen.cost:.4g}",
        *_alternatives(found.table, total),
        *bound,
        *_insensitive(found.curvature, measure),
        "",
        "recipe:",
        str(recipe),
    ]
    return "\n".join(lines)


class HeldOut:
    """The plain model of a run and its held-out data: its loss as a function of the weights of its products.

    Args:
      variables: of a training state; those of its recipe are left out.
    """

    def __init__(self, program: Program, variables: dict[str, Any]):
        self.program, self.batches = program, _examples(program)
        self._product = ProductWeights(program.model)
        self._variables = {name: tree for name, tree in variables.items() if name in ("params", MODEL_STATE)}
        inputs = program.task.inputs(self.batches[0])
        self.weights = jax.jit(self._product.weights)(self._variables, inputs)
        self._mean_loss = jax.jit(lambda weights, examples: jnp.mean(self._losses(weights, examples)))

    def costs(self, formats: Sequence[str], measure: str, samples: int) -> LayerCosts:
        """Of each format in each layer."""
        key = self.program.keys.evaluation
        return layer_costs(self._losses, self.weights, self.batches, formats, measure=measure, samples=samples, key=key)

    def loss(self, weights: Any) -> float:
        """Mean over the batches."""
        return float(np.mean([self._mean_loss(weights, examples) for examples in self.batches]))

    def _losses(self, weights, examples):
        task = self.program.task
        logits = self._product.apply(self._variables, weights, task.inputs(examples))
        of_predictions = task.losses(logits, examples)
        return jnp.mean(of_predictions, axis=tuple(range(1, of_predictions.ndim)))


def _check(bits, increase, solver, order, formats):
    if (bits is None) == (increase is None):
        raise UsageError("an allocation has a budget or a bound: say bits or increase, not both")
    if solver is not None and solver not in SOLVERS:
        raise unknown("solver", solver, SOLVERS)
    if order is not None and order not in ORDERS:
        raise unknown("order of layers", order, ORDERS)
    if bits is not None and order is not None:
        raise UsageError(f"order {order!r} is for a bound of the loss (increase); a budget of bits has a solver")
    if increase is not None and solver is not None:
        raise UsageError(f"solver {solver!r} is for a budget of bits; a bound of the loss is met by bisection")
    if increase is not None and len(formats) != 2:
        raise UsageError(f"a bound of the loss chooses between two formats, not {len(formats)}: {', '.join(formats)}")


def _within_loss(held_out: HeldOut, table: CostTable, factor: float, increase: float, order: str):
    """The allocation, and lines that say what the losses were."""
    low, high = np.argsort(np.sum(table.size, axis=0), kind="stable")
    names = (table.choices[low], table.choices[high])
    candidates = {name: jax.jit(rounded, static_argnums=1)(held_out.weights, name) for name in names}
    loss = lambda choices: held_out.loss(mixed(candidates, choices))
    pairs = measured_interactions(table.layers, *names, loss) if order == "interactions" else None
    # Beyond what the layer costs in the high format, as the interactions are.
    change = factor * (table.cost[:, low] - table.cost[:, high])
    plain = held_out.loss(held_out.weights)
    chosen = bisect_loss(by_sensitivity(table.layers, change, pairs), *names, loss, plain + increase)
    picked = [low if chosen[layer] == names[0] else high for layer in table.layers]
    text = f"loss {loss(chosen):.4f}, at most {plain + increase:.4f} allowed, {plain:.4f} with plain weights"
    return table.allocation(picked), [text]


def _insensitive(curvature, measure) -> list[str]:
    """The layers in which the loss is flat, as `objective.insensitive` takes them."""
    if measure != "hessian":
        return []
    mean = np.mean([value for value, _ in curvature.values()])
    flat = [layer for layer, (value, _) in curvature.items() if value < mean]
    return [f"trace below the mean (objective.insensitive): {exact_pattern(flat)}"] if flat else []


def _examples(program) -> list[Any]:
    """Of the full batches, all of one shape; of a single one that is not full, its rows again and again."""
    batches = program.eval_batches
    full = [program.task.examples(batch) for batch in batches if np.all(np.asarray(batch["weight"]) > 0)]
    if full:
        return full
    weight = np.asarray(batches[0]["weight"])
    rows = np.resize(np.flatnonzero(weight), weight.size)
    return [jax.tree.map(lambda leaf: leaf[rows], program.task.examples(batches[0]))]


def _table(found: LayerCosts, chosen: Allocation, curvature: str) -> str:
    header = ("layer", "weights", *([curvature] if curvature else []), *found.table.choices, "choice")
    rows = []
    for layer, costs in zip(found.table.layers, found.table.cost, strict=True):
        shown = [f"{mean:.3g} ± {spread:.2g}" for mean, spread in (found.curvature[layer],)] if curvature else []
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
