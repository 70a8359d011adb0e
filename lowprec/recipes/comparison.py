"""Recipes side by side, operand by operand."""

import textwrap
from collections.abc import Sequence

from lowprec.errors import UsageError
from lowprec.ops.accumulation import Accumulation
from lowprec.ops.rule import GemmRule
from lowprec.recipes.recipe import Recipe
from lowprec.recipes.registry import parse

_WIDTH = 34


def comparison(recipes: Sequence[str | Recipe]) -> str:
    """A table: a row for each operand of the three products, a column for each recipe; ≠ marks rows that differ.

    Shown is the rule of a recipe's last pattern, that of the bulk of the layers; below, the layers that other patterns
    take out.

    Raises:
      UsageError: (a ValueError) fewer than two recipes, or a name that is none.
    """
    chosen = [parse(recipe) for recipe in recipes]
    if len(chosen) < 2:
        raise UsageError("a comparison takes two recipes or more, e.g. lowprec recipes compare nvfp4 quartet2")
    rows = [_cells(recipe) for recipe in chosen]
    lines = [*_line("", "", [recipe.name for recipe in chosen]), _rule(len(chosen))]
    for what in rows[0]:
        cells = [cells[what] for cells in rows]
        if any(cells):
            lines += [*_line(" " if len(set(cells)) == 1 else "≠", what, cells), _rule(len(chosen))]
    return "\n".join(lines)


def _cells(recipe: Recipe) -> dict[str, str]:
    *others, bulk = recipe.rules
    gemm: GemmRule = bulk.gemm
    operands = {name: str(quantizer) for name, quantizer in gemm.operands().items()}
    return operands | {
        "input": "divided by its root mean square" if gemm.normalize_input else "",
        "sums": "" if gemm.accumulation == Accumulation() else str(gemm.accumulation),
        "x kept": str(gemm.saved) if gemm.saved else "",
        "saved": "; ".join(f"{rule.pattern}: {rule.policy}" for rule in recipe.saved),
        "loss": str(recipe.loss_scaling or ""),
        "not these": "; ".join(rule.pattern for rule in others if rule.gemm.exact),
    }


def _line(mark: str, what: str, cells: Sequence[str]) -> list[str]:
    wrapped = [textwrap.wrap(cell, _WIDTH, break_long_words=True) or [""] for cell in cells]
    height = max(map(len, wrapped))
    lines = []
    for i in range(height):
        columns = [(lines_of[i] if i < len(lines_of) else "").ljust(_WIDTH) for lines_of in wrapped]
        head = f"{mark} {what.ljust(9)}" if i == 0 else " " * 11
        lines.append(f"{head}  {'  '.join(columns)}".rstrip())
    return lines


def _rule(columns: int) -> str:
    return "-" * (11 + columns * (_WIDTH + 2))
