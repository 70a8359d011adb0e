"""From weights with learned steps to integer codes with learned steps: the change between EfficientQAT's two phases."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax

from lowprec.errors import UsageError
from lowprec.nn.stack import first_layer, is_run, run_layers
from lowprec.quantizers.fixed_codes import FixedCodes, step_codes
from lowprec.quantizers.learned_rules import LearnedStep
from lowprec.recipes import LayerRule, Recipe


def with_fixed_codes(recipe: Recipe) -> Recipe:
    """The recipe whose weights with learned steps are codes.

    Raises:
      UsageError: (a ValueError) if it has none, or steps with an offset.
    """
    rules = tuple(LayerRule(rule.pattern, _fixed(rule.gemm), rule.optional) for rule in recipe.rules)
    if rules == tuple(recipe.rules):
        raise UsageError(f"recipe {recipe.name!r} has no weights with learned steps whose codes could be fixed")
    return replace(recipe, name=f"{recipe.name} with fixed codes", rules=rules)


def store_codes(recipe: Recipe, params: Mapping[str, Any], quant_params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with codes in the place of weights, for the model under `with_fixed_codes(recipe)`.

    Its "quant_params" are those of the recipe, and its forward pass is the same, bit for bit. To train nothing but
    scales, leave all of these parameters out of what is trained (`optim.sparse_update.SCALES_ALONE`).

    Raises:
      UsageError: (a ValueError) of a layer whose kernel is not (K, N).
    """
    return _walk(recipe, (), dict(params), quant_params)


def _fixed(gemm):
    x, w = gemm.fwd
    if not isinstance(w.scale, LearnedStep):
        return gemm
    if w.scale.offset:
        raise UsageError(f"{w.scale} has no codes without the offset: fix steps without one")
    return replace(gemm, fwd=(x, replace(w, scale=FixedCodes(w.scale.count))))


def _walk(recipe, path, params, learned):
    if "fwd.w" in learned:
        q = recipe.rule_for(first_layer(path)).fwd[1]
        if not isinstance(q.scale, LearnedStep):
            return params
        return {**params, "kernel": _codes("/".join(path), params.get("kernel"), q, learned["fwd.w"])}
    for name, tree in learned.items():
        if is_run(name):
            run = run_layers(name)
            changed = _walk(recipe, (*path, name), jax.tree.map(lambda leaf, run=run: leaf[run], params), tree)
            params = jax.tree.map(lambda whole, part, run=run: whole.at[run].set(part), params, changed)
        elif isinstance(tree, Mapping) and name in params:
            params = {**params, name: _walk(recipe, (*path, name), params[name], tree)}
    return params


def _codes(path, kernel, q, learned):
    axes = learned["step"].ndim
    one = lambda w, params: step_codes(w, q.scale, q.format, -2, params)
    if kernel is not None and kernel.ndim == 2 and axes == 2:
        return one(kernel, learned)
    if kernel is not None and kernel.ndim == 3 and axes == 3:
        return jax.vmap(one)(kernel, learned)
    raise UsageError(f"layer {path!r} has no kernel (K, N) whose codes could be stored")
