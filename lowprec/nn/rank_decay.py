"""The low-rank bridges of a model (`quantizers.rank_decay`), taken down between its training steps."""

from collections.abc import Mapping
from typing import Any

from lowprec.nn.stack import first_layer
from lowprec.quantizers import OPERANDS
from lowprec.quantizers.rank_decay import RankDecay
from lowprec.recipes import Recipe


def decays(recipe: Recipe) -> bool:
    """Whether a recipe has such bridges."""
    return any(isinstance(q.scale, RankDecay) for rule in recipe.rules for q in rule.gemm.operands().values())


def halve_ranks(recipe: Recipe, quant_params: Mapping[str, Any], quant: Mapping[str, Any]) -> dict[str, Any]:
    """The collection "quant_params" for the next step: where a phase of a bridge has just ended, its rank is halved.

    Pure; to be called in the training step, after the optimizers and with the state of the quantizers after the step.
    The decomposition is under a `lax.cond`: most steps do not pay for it.
    """
    return _walk(recipe, (), quant_params, quant)


def _walk(recipe, path, params, quant):
    if set(params) & set(OPERANDS):
        operands = recipe.rule_for(first_layer(path)).operands()
        after = dict(params)
        for name in params:
            rule = operands[name].scale
            if isinstance(rule, RankDecay):
                after[name] = rule.halved(params[name], quant[name])
        return after
    return {name: _walk(recipe, (*path, name), tree, quant.get(name, {})) for name, tree in params.items()}
