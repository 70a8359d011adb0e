"""Writes the tables of README.md from the registries: `python -m docs.tables` (a test holds that they are current)."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp

from lowprec import formats, recipes
from lowprec.analysis.format_table import bits_per_value
from lowprec.analysis.table import markdown_table
from lowprec.ops import GemmRule
from lowprec.quantizers import FourOverSix
from lowprec.training import optimizer
from lowprec.training.config import OptimizerConfig

README = Path(__file__).parents[1] / "README.md"


def formats_table() -> str:
    rows = []
    for name in formats.names():
        fmt = formats.parse(name)
        if re.fullmatch(r"u?int(?!2$|4$|8$|16$)\d+|msfp(?!12$|16$)\d+", name):
            continue  # the widths between are alike
        canonical = str(fmt)
        full = "" if canonical == name else f"`{canonical}`"
        rows.append((name, full, f"{bits_per_value(fmt):g}", f"{fmt.max:.6g}", f"{fmt.min_subnormal:.4g}"))
    return markdown_table(("format", "in full", "bits a value", "max", "smallest"), rows, left=2)


def recipes_table() -> str:
    rows = [(name, *_products(recipes.get(name).rules[-1].gemm), recipes.get(name).source) for name in recipes.names()]
    return markdown_table(("recipe", "forward x, w", "dgrad dy, w", "wgrad dy, x", "what it is"), rows, left=5)


def _products(gemm: GemmRule) -> list[str]:
    cell = lambda q: "reuse" if q.source == "reuse" else "–" if q.exact else _short(q)
    products = [[cell(q) for q in operands] for operands in (gemm.fwd, gemm.dgrad, gemm.wgrad)]
    return [", ".join(dict.fromkeys(pair)) for pair in products]


def _short(q) -> str:
    named = {str(formats.parse(name)): name for name in formats.names()}
    text = named.get(str(q.format), str(q.format))
    marks = [
        "4/6" if isinstance(q.scale, FourOverSix) else "",
        f"H{q.rotation.size}" if q.rotation else "",
        "SR" if q.rounding.stochastic else "",
        "eden" if q.correction else "",
    ]
    return " ".join(filter(None, (text, *marks)))


def optimizers_table() -> str:
    rows = []
    params = {"w": jnp.zeros((1000, 1000))}
    for name in optimizer.names():
        state = jax.eval_shape(optimizer.build_optimizer(OptimizerConfig(name=name), 100).init, params)
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        rows.append((name, f"{size / 1e6:.3g}"))
    return markdown_table(("optimizer", "bytes of state a parameter"), rows, left=1)


TABLES = {"formats": formats_table, "recipes": recipes_table, "optimizers": optimizers_table}


def with_tables(text: str) -> str:
    """The text with what stands between <!-- NAME --> and <!-- end --> written anew."""
    for name, table in TABLES.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text, count = re.subn(pattern, lambda match, table=table: f"{match[1]}{table()}\n{match[2]}", text, flags=re.S)
        assert count == 1, f"README.md has no place for the table of {name}"
    return text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
