"""Writes the tables of README.md and docs from the registries: `python -m docs.tables [--measure [PAGE …]]`.

A test holds that they are current. With --measure the errors of products are measured too, which takes some minutes.
"""

import argparse
import importlib
import itertools
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lowprec import formats, recipes
from lowprec.analysis.format_table import bits_per_value
from lowprec.analysis.optimizer_table import optimizers_table, states_table
from lowprec.analysis.product_errors import errors_table
from lowprec.analysis.table import markdown_table
from lowprec.ops import GemmRule
from lowprec.quantizers import DifferentiableGradient, Quantizer
from lowprec.recipes import Recipe, library

README = Path(__file__).parents[1] / "README.md"
PAGES = Path(__file__).parent / "recipes"
OPTIMIZERS = Path(__file__).parent / "optimizers.md"

Row = tuple[str, ...]

# What the scale rules are called in a table; absmax goes without saying.
SCALES = {
    "FourOverSix": "4/6",
    "RootMeanSquare": "rms",
    "AbsMean": "absmean",
    "CrossQuant": "row·column",
    "PowerOfTwoRatios": "ratios of 2",
    "LeastSquares": "searched",
    "Delayed": "delayed",
    "RunningRange": "running range",
    "LearnedStep": "learned step",
    "LearnedClip": "learned clip",
    "Elastic": "learned scale",
    "LearnedExponentBias": "learned bias",
    "LearnedBits": "noise",
    "DoubleRounding": "learned steps",
    "SampledDoubleRounding": "learned steps",
    "SoftClusters": "clusters",
    "DiffQ": "noise",
    "DynamicFixedPoint": "changing",
    "DynamicChoice": "or another",
    "Sparse": "2:4 sparse",
    "RankDecay": "learned step and rank 32",
}


def families() -> dict[str, tuple[Recipe, ...]]:
    """The recipes of each file of the library; each has a page in docs/recipes."""
    modules = [info.name for info in pkgutil.iter_modules(library.__path__)]
    return {name: importlib.import_module(f"{library.__name__}.{name}").RECIPES for name in modules}


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
    rows = [(*_row(recipes.get(name)), recipes.get(name).source.replace("|", r"\|")) for name in recipes.names()]
    header = ("recipe", "forward x, w", "dgrad dy, w", "wgrad dy, x", "what it is")
    return markdown_table(header, _by_bits(rows), left=5)


def family_table(family: Sequence[Recipe]) -> str:
    rows = [_row(recipe) for recipe in family]
    return markdown_table(("recipe", "forward x, w", "dgrad dy, w", "wgrad dy, x"), _by_bits(rows), left=4)


def _row(recipe: Recipe) -> Row:
    return (recipe.name, *_products(recipe.rules[-1].gemm))


def _by_bits(rows: Sequence[Row]) -> list[Row]:
    """Neighbours that differ in a number alone, the one in their names, as one row."""

    def without_number(row):
        number = _number(row[0])
        return tuple(re.sub(rf"(?<![\d.]){number}(?![\d.])", "{b}", cell) for cell in row) if number else row

    merged = []
    for pattern, group in itertools.groupby(rows, key=without_number):
        alike = list(group)
        merged.append((f"{pattern[0]}, b = {_listed(alike)}", *pattern[1:]) if len(alike) > 1 else alike[0])
    return merged


def _listed(rows: Sequence[Row]) -> str:
    numbers = [int(_number(row[0])) for row in rows]
    in_turn = len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{numbers[0]} … {numbers[-1]}" if in_turn else ", ".join(map(str, numbers))


def _number(name: str) -> str:
    found = re.findall(r"\d+", name)
    return found[0] if len(found) == 1 else ""


def _products(gemm: GemmRule) -> list[str]:
    cell = lambda q: "reuse" if q.source == "reuse" else "–" if q.exact else _short(q)
    products = [[cell(q) for q in operands] for operands in (gemm.fwd, gemm.dgrad, gemm.wgrad)]
    return [", ".join(dict.fromkeys(pair)) for pair in products]


def _short(q: Quantizer) -> str:
    named = {str(formats.parse(name)): name for name in formats.names()}
    text = named.get(str(q.format), str(q.format))
    rotation = q.rotation and f"H{q.rotation.size}".replace("Hfull", "H")
    marks = [
        SCALES.get(type(q.scale).__name__, ""),
        f"{rotation}{' on rows' if q.rotation.side == 'outer' else ''}" if rotation else "",
        "clamped" if q.clamp else "",
        "SR" if q.rounding.stochastic else "",
        "eden" if q.correction and str(q.correction).startswith("eden") else "",
        "dge" if isinstance(q.estimator, DifferentiableGradient) else "",
    ]
    return " ".join(filter(None, (text, *marks)))


Tables = Mapping[str, Callable[[], str]]

TABLES: Tables = {"formats": formats_table, "recipes": recipes_table, "optimizers": optimizers_table}
# Of docs/optimizers.md.
STATES: Tables = {"states": states_table}


def page_tables(family: Sequence[Recipe], measure: bool) -> Tables:
    """The tables of a page of docs/recipes."""
    measured = {"errors": lambda: errors_table([recipe.name for recipe in family])} if measure else {}
    return {"recipes": lambda: family_table(family)} | measured


def with_tables(text: str, tables: Tables = TABLES) -> str:
    """The text with what stands between <!-- NAME --> and <!-- end --> written anew."""
    for name, table in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text, count = re.subn(pattern, lambda match, table=table: f"{match[1]}{table()}\n{match[2]}", text, flags=re.S)
        assert count == 1, f"there is no place for the table of {name}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the tables of README.md and docs.")
    parser.add_argument(
        "--measure", nargs="*", metavar="PAGE", help="measure errors anew, on these pages or on all (minutes)"
    )
    measure = parser.parse_args().measure
    README.write_text(with_tables(README.read_text()))
    OPTIMIZERS.write_text(with_tables(OPTIMIZERS.read_text(), STATES))
    for name, family in families().items():
        page = PAGES / f"{name}.md"
        wanted = measure is not None and (not measure or name in measure)
        page.write_text(with_tables(page.read_text(), page_tables(family, measure=wanted)))


if __name__ == "__main__":
    main()
