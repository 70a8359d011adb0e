"""Recipes and their list as tables that people read."""

from contextlib import nullcontext

from lowprec.formats.types import BlockFormat
from lowprec.ops.accumulation import Accumulation
from lowprec.ops.rule import PRODUCTS, GemmRule
from lowprec.ops.serving import who_serves
from lowprec.pallas.target import on, target
from lowprec.quantizers import Quantizer, StraightThrough
from lowprec.quantizers.variables import Differentiable


def describe(recipe, device: str | None = None, backend: str = "auto") -> str:
    """See `Recipe.describe`."""
    with nullcontext() if device is None else on(device):
        return _describe(recipe, backend)


def _describe(recipe, backend) -> str:
    lines = [recipe.name if not recipe.source else f"{recipe.name}: {recipe.source}", ""]
    if recipe.keeping:
        lines += [f"{recipe.keeping.describe()}: left as they are", ""]
    for rule in recipe.rules:
        lines.append(f"layers {rule.pattern}{'  (where there are any)' if rule.optional else ''}")
        lines += [f"  {line}" for line in _describe_rule(rule.gemm, backend)]
        lines.append("")
    if recipe.loss_scaling:
        lines.append(str(recipe.loss_scaling))
    if recipe.control:
        lines.append(str(recipe.control))
    lines += [f"inputs of {rule.pattern} saved: {rule.policy}" for rule in recipe.saved]
    return "\n".join(lines).rstrip()


def _describe_rule(gemm: GemmRule, backend: str) -> list[str]:
    kept = [f"x is kept for the backward pass: {gemm.saved}"] if gemm.saved else []
    if gemm.exact_products:
        return ["left as they are", *kept]
    rows: list[tuple[str, ...]] = [
        ("product", "operand", "format", "before", "scale", "rounding", "gradient", "taken from")
    ]
    for product, (first, second, _) in PRODUCTS.items():
        for operand, quantizer in zip((first, second), getattr(gemm, product), strict=True):
            rows.append((product, operand, *_columns(quantizer, product)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    if gemm.normalize_input:
        lines.append("x is divided by its root mean square first")
    if gemm.accumulation != Accumulation():
        lines.append(f"sums of all products: {gemm.accumulation}")
    served = who_serves(gemm, backend)
    width = max(len(formula) for *_, formula in PRODUCTS.values())
    products = [f"{name + ':':6} {formula:{width}}  {served[name]}" for name, (*_, formula) in PRODUCTS.items()]
    return [*lines, *kept, f"products, by whom on {target().kind} if large:", *products]


def _columns(q: Quantizer, product: str) -> tuple[str, ...]:
    if q.source == "reuse":
        return ("as before", "", "", "", "", "the values of the earlier product")
    source = {"original": "the original", "requantize": "the forward values"}[q.source]
    if q.exact:
        return ("as it is", "", "", "", "", source)
    scaled = isinstance(q.format, BlockFormat) or isinstance(q.scale, Differentiable)
    scale = str(q.scale) if scaled else "none"
    if q.correction:
        scale += f", {q.correction}"
    gradient = (
        ""
        if product != "fwd"
        else str(q.estimator if not isinstance(q.estimator, StraightThrough) else "straight-through")
    )
    before = ", ".join(str(step) for step in (q.rotation, q.clamp) if step)
    return (str(q.format), before, scale, str(q.rounding), gradient, source)
