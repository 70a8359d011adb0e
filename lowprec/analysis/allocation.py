"""Which layer gets which format: from a table of costs and sizes to a choice a layer, and to a recipe.

Three solvers. `solve_exactly`: an integer program (HAWQ-V3, arXiv 2011.10680, §3.4). `solve_greedily`: the best
decrease of cost per byte, one step after the other. `bisect_loss`: down an order of the layers, as far as a measured
loss allows; `by_sensitivity` is that order, in which pairs of layers may count (arXiv 2306.04879).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lowprec.errors import UsageError
from lowprec.ops import GemmRule
from lowprec.recipes import Recipe, parse
from lowprec.recipes.short import layer_rules

# The weights alone, straight-through: what the costs were measured of.
WEIGHTS_ALONE = "fwd=exact,{} dgrad=exact,reuse"


@dataclass(frozen=True, eq=False)
class CostTable:
    """What each choice would cost each layer.

    Args:
      layers: their paths.
      choices: format names.
      cost: (layers, choices), the sensitivity; what it adds up to is to be small.
      size: (layers, choices), in any unit, the budget's.
    Raises:
      UsageError: (a ValueError) if shapes do not fit or an entry is not finite.
    """

    layers: tuple[str, ...]
    choices: tuple[str, ...]
    cost: np.ndarray
    size: np.ndarray

    def __post_init__(self):
        shape = (len(self.layers), len(self.choices))
        for name in ("cost", "size"):
            values = np.asarray(getattr(self, name), np.float64)
            if values.shape != shape or not np.all(np.isfinite(values)):
                raise UsageError(f"{name} of {shape[0]} layers and {shape[1]} choices: {shape} finite numbers")
            object.__setattr__(self, name, values)

    def allocation(self, picked: Sequence[int] | np.ndarray) -> "Allocation":
        """Of the indices of a choice a layer."""
        rows = np.arange(len(self.layers))
        chosen = {layer: self.choices[index] for layer, index in zip(self.layers, picked, strict=True)}
        total = lambda table: float(np.sum(table[rows, list(picked)]))
        return Allocation(chosen, total(self.cost), total(self.size))


@dataclass(frozen=True)
class Allocation:
    """A choice a layer.

    Attributes:
      choices: layer path -> format name.
      cost: sum of their costs.
      size: sum of their sizes.
    """

    choices: Mapping[str, str]
    cost: float
    size: float

    def recipe(self, rule: str = WEIGHTS_ALONE) -> Recipe:
        """Rules on exactly these layers, one a format; its name is a text that `config.recipe` takes.

        Args:
          rule: a short form with {} in the place of the format, e.g. "fwd={}" for weights and inputs.
        Raises:
          UsageError: (a ValueError) if the rule has no place for a format.
        """
        if "{}" not in rule:
            raise UsageError(f"the rule of an allocation has {{}} where the format goes, e.g. 'fwd={{}}'; not {rule!r}")
        gemms: dict[str, GemmRule] = {}
        for fmt in dict.fromkeys(self.choices.values()):
            layers = [layer for layer, chosen in self.choices.items() if chosen == fmt]
            gemms[exact_pattern(layers)] = parse(rule.replace("{}", fmt)).rule_for(layers[0])
        return layer_rules(gemms)


def solve_exactly(table: CostTable, budget: float) -> Allocation:
    """The least cost whose size is within the budget (to a millionth of it), by integer programming.

    Raises:
      UsageError: (a ValueError) no choice fits, or scipy is not installed.
    """
    _check_budget(table, budget)
    optimize = _scipy_optimize()
    layers, choices = table.cost.shape
    # HiGHS works to absolute tolerances around 1e-6, which the cost of one layer may well be below.
    largest = np.max(np.abs(table.cost))
    cost = table.cost / largest * 1e4 if largest > 0 else table.cost
    one_each = np.kron(np.eye(layers), np.ones(choices))
    found = optimize.milp(
        cost.ravel(),
        integrality=np.ones(cost.size),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(one_each, 1, 1),
            optimize.LinearConstraint(table.size.reshape(1, -1) / budget, -np.inf, 1),
        ],
        options={"mip_rel_gap": 0},
    )
    if found.x is None:
        raise UsageError(f"the integer program was not solved: {found.message}")
    return table.allocation(np.argmax(found.x.reshape(layers, choices), axis=1))


def solve_greedily(table: CostTable, budget: float) -> Allocation:
    """From the smallest choices, step by step the change with the best decrease of cost per size that fits.

    Raises:
      UsageError: (a ValueError) no choice fits.
    """
    _check_budget(table, budget)
    rows = np.arange(len(table.layers))
    # Of equal sizes the cheapest.
    picked = np.lexsort((table.cost, table.size), axis=1)[:, 0]
    while True:
        now = (rows, picked)
        gain = table.cost[now][:, None] - table.cost
        growth = table.size - table.size[now][:, None]
        room = budget - np.sum(table.size[now])
        allowed = (gain > 0) & (growth > 0) & (growth <= room)
        if not np.any(allowed):
            return table.allocation(picked)
        rate = np.where(allowed, gain / np.where(allowed, growth, 1), -np.inf)
        layer, choice = np.unravel_index(np.argmax(rate), rate.shape)
        picked[layer] = choice


def measured_interactions(
    layers: Sequence[str], low: str, high: str, loss: Callable[[Mapping[str, str]], float]
) -> np.ndarray:
    """L(i, j) - L(i) - L(j) + L(): what two layers in the low format cost together beyond what each costs alone.

    Args:
      layers: n paths.
      low, high: format names; L(…) is the loss with these layers in the low one and all others in the high one.
      loss: of a choice a layer; it is measured 1 + n (n + 1) / 2 times.
    Returns:
      (n, n), symmetric, 0 on the diagonal.
    """
    lowered = lambda *those: loss({layer: low if layer in those else high for layer in layers})
    nothing, alone = lowered(), np.array([lowered(layer) for layer in layers])
    found = np.zeros((len(layers), len(layers)))
    for i, first in enumerate(layers):
        for j, second in enumerate(layers[:i]):
            found[i, j] = found[j, i] = lowered(first, second) - alone[i] - alone[j] + nothing
    return found


def by_sensitivity(
    layers: Sequence[str], cost: Sequence[float] | np.ndarray, interactions: np.ndarray | None = None
) -> tuple[str, ...]:
    """The layers, the least sensitive first: by cost_i + ½ Σ_j interaction_ij.

    With costs that are changes of the loss and interactions of pairs, that is the share of each layer in the change of
    them all (its Shapley value). The costs of a Hessian augmented by losses of pairs are those of "Augmenting Hessians
    with Inter-Layer Dependencies" (arXiv 2306.04879); the weight ½ is ours.

    Args:
      cost: of the low format in each layer, in the unit of the interactions.
      interactions: (layers, layers); None: none.
    """
    pairs = 0.0 if interactions is None else 0.5 * np.sum(interactions, axis=1)
    order = np.argsort(np.asarray(cost, np.float64) + pairs, kind="stable")
    return tuple(layers[index] for index in order)


def bisect_loss(
    order: Sequence[str], low: str, high: str, loss: Callable[[Mapping[str, str]], float], bound: float
) -> Mapping[str, str]:
    """As many layers in the low format, down an order, as keep the loss within a bound.

    The loss is taken to rise with their number, and is measured ⌈log₂(layers + 1)⌉ + 1 times at most.

    Args:
      order: layer paths, the least sensitive first.
      low, high: format names.
      loss: of a choice a layer, e.g. measured on held-out text with `product_weights.mixed`.
      bound: the largest loss allowed.
    Raises:
      UsageError: (a ValueError) if even the high format everywhere exceeds the bound.
    """
    choices = lambda count: {layer: low if index < count else high for index, layer in enumerate(order)}
    within, beyond = 0, len(order) + 1
    first = loss(choices(0))
    if first > bound:
        raise UsageError(f"with {high} everywhere the loss is {first:g}, above the bound {bound:g}")
    while beyond - within > 1:
        middle = (within + beyond) // 2
        if loss(choices(middle)) <= bound:
            within = middle
        else:
            beyond = middle
    return choices(within)


def exact_pattern(paths: Sequence[str]) -> str:
    """A regular expression that matches these layer paths and no other, e.g. layers/(0|3)/mlp/(down|up).

    Layers with the same paths below them stand together.
    """
    return _pattern(sorted({tuple(path.split("/")) for path in paths}, key=_in_order))


def _pattern(paths):
    below: dict[str, list] = {}
    for first, *rest in paths:
        below.setdefault(first, []).append(rest)
    together: dict[str, list[str]] = {}
    for name, rests in below.items():
        # A layer may have others below it.
        inner = _pattern([rest for rest in rests if rest]) if any(rests) else ""
        tail = "" if not inner else f"/{inner}" if all(rests) else f"(/{inner})?"
        together.setdefault(tail, []).append(_escaped(name))
    parts = [f"{names[0] if len(names) == 1 else f'({"|".join(names)})'}{tail}" for tail, names in together.items()]
    return parts[0] if len(parts) == 1 else f"({'|'.join(parts)})"


def _escaped(name):
    return "".join(f"\\{c}" if c in r".^$*+?{}[]\|()" else c for c in name)


def _in_order(path):
    """Numbers by size."""
    return [(0, int(name), "") if name.isdigit() else (1, 0, name) for name in path]


def natural_order(paths: Sequence[str]) -> tuple[str, ...]:
    """Layer paths sorted, numbers by size."""
    return tuple(sorted(paths, key=lambda path: _in_order(path.split("/"))))


def _check_budget(table, budget):
    least = float(np.sum(np.min(table.size, axis=1)))
    if least > budget:
        raise UsageError(f"no choice of formats fits: the smallest takes {least:,.6g}, the budget is {budget:,.6g}")


def _scipy_optimize():
    try:
        from scipy import optimize
    except ImportError as error:
        raise UsageError("the integer program needs scipy: pip install 'lowprec[scaling]'") from error
    return optimize
