"""What is done to whole recipes: the backward pass left exact, a gradual change from one to another."""

from dataclasses import replace
from typing import Any

from lowprec.ops import GemmRule
from lowprec.ops.accumulation import Accumulation
from lowprec.quantizers import EXACT, REUSE, Quantizer
from lowprec.quantizers.blend import Blend
from lowprec.recipes.recipe import LayerRule, Recipe

Operands = tuple[Quantizer, Quantizer]


def forward_only_of(recipe: Recipe) -> Recipe:
    """The recipe's forward pass, whose gradients are products in high precision of the operands it used.

    How 4-bit training ends once its gradients drown in their rounding noise (FP4 All the Way, arXiv 2505.19115, §4).
    """
    given: tuple[Any, ...] = tuple(recipe.rules)
    rules = tuple(replace(rule, gemm=_exact_backward(rule.gemm)) for rule in given)
    return replace(recipe, name=f"{recipe.name} forward only", rules=rules, saved=(), loss_scaling=None)


def _exact_backward(gemm: GemmRule) -> GemmRule:
    x, w = (_again(q) for q in gemm.fwd)
    return replace(gemm, dgrad=(EXACT, w), wgrad=(EXACT, x), saved=None)


def _again(forward: Quantizer) -> Quantizer:
    """The operand of a backward product that takes what the forward product used, as far as it can be had."""
    turned_outside = forward.rotation is not None and forward.rotation.side == "outer"
    return EXACT if forward.exact or turned_outside else REUSE


def blended(before: Recipe, after: Recipe, steps: int) -> Recipe:
    """From one recipe to another in so many steps: forward operands are `Blend`s of the two.

    The gradients that come from above are quantized as before, the other operands of the backward products are those
    blends. (A gradient that was rotated is not quantized: blends are not rotated, nothing would cancel.) So the first
    step is that of the recipe before: bit for bit where that one is of one precision (bf16, f32), and where its forward
    pass alone is quantized up to the last bits in which two compiled programs may differ. Controllers of either recipe
    rest meanwhile.
    """
    rules = tuple(
        LayerRule(f"(?=(?:{last.pattern})\\Z)(?:{first.pattern})", _blend(first.gemm, last.gemm, steps), optional=True)
        for last in after.rules
        for first in before.rules
    )
    return Recipe(
        f"{before.name} to {after.name}",
        rules,
        f"{steps} steps from {before.name} to {after.name}",
        loss_scaling=after.loss_scaling,
        saved=after.saved,
    )


def _blend(before: GemmRule, after: GemmRule, steps: int) -> GemmRule:
    if before == after:
        return before
    both = before.normalize_input and after.normalize_input
    first, last = (rule.normalize_input and not both for rule in (before, after))
    x = _blend_operand(before.fwd[0], after.fwd[0], steps, first, last)
    w = _blend_operand(before.fwd[1], after.fwd[1], steps, False, False)
    again = lambda q: EXACT if q.exact else REUSE
    return GemmRule(
        fwd=(x, w),
        dgrad=(_unless_rotated(before.dgrad[0]), again(w)),
        wgrad=(_unless_rotated(before.wgrad[0]), again(x)),
        normalize_input=both,
        accumulation=before.accumulation if before.accumulation == after.accumulation else Accumulation(),
    )


def _unless_rotated(q: Quantizer) -> Quantizer:
    return q if q.rotation is None or q.rotation.side == "outer" else EXACT


def _blend_operand(before: Quantizer, after: Quantizer, steps: int, normalize_before: bool, normalize_after: bool):
    if before == after and normalize_before == normalize_after:
        return before
    # Of two operands that are left as they are one is normalized; the format is a name for the place alone.
    fmt = after.format or before.format or "float32"
    return Quantizer(fmt, scale=Blend(before, after, steps, normalize_before, normalize_after))
