"""The variables of a product's quantizers: what they learn, what they remember, and the slots through which they see.

x and w stand here as in the canonical product, (…, M, K) and (…, K, N): one set of scales serves every shape of call.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lowprec.errors import UsageError
from lowprec.ops.canonical import DimensionNumbers, canonical_form, default_dimension_numbers
from lowprec.ops.operand import CONTRACTION, Streams
from lowprec.ops.rule import GemmRule
from lowprec.ops.saved import SAVED_X, RunningUint8
from lowprec.quantizers import EXACT, OPERANDS
from lowprec.quantizers.error import value_sums
from lowprec.quantizers.surrogate import report
from lowprec.quantizers.variables import Arrays, Differentiable, Remembering
from lowprec.typing import Array, Float


class ProductVariables(NamedTuple):
    """Of one product, by operand ("fwd.w", "dgrad.dy", …).

    Attributes:
      params: learned by gradient.
      state: read by a step, and written between steps by `next_state`.
      slots: zeros, whose cotangent says what a step observed; leave them out where nothing is to be remembered.
    """

    params: Mapping[str, Arrays] = {}
    state: Mapping[str, Arrays] = {}
    slots: Mapping[str, Float[Array, " seen"]] = {}


# What products take: the variables, or a function that gives them for x (…, M, K) and w (…, K, N), or nothing.
Variables = ProductVariables | Callable[[Array, Array], ProductVariables] | None


def initial_variables(
    x: Float[Array, "..."], w: Float[Array, "..."], rule: GemmRule, dimension_numbers: DimensionNumbers | None = None
) -> ProductVariables:
    """The variables that `qdot(x, w, rule)` needs, initialised as their sources say from x and w."""
    form = canonical_form(x.shape, w.shape, dimension_numbers or default_dimension_numbers(x))
    return canonical_variables(form.collapse_x(x), form.collapse_w(w), rule)


def canonical_variables(x: Float[Array, "..."], w: Float[Array, "..."], rule: GemmRule) -> ProductVariables:
    """`initial_variables` for x (…, M, K) and w (…, K, N)."""
    params: dict[str, Arrays] = {}
    for name, q in rule.operands().items():
        if isinstance(q.scale, Differentiable) and not q.exact:
            where = (q.format, CONTRACTION[name])
            weights = name == "fwd.w"
            learned = q.scale.calibrated_params(w, x, *where) if weights else q.scale.initial_params(x, *where)
            _check_independent_of_batch(name, learned, q)
            params |= {name: learned} if learned else {}
    return ProductVariables(params, *initial_memory(rule))


def initial_memory(rule: GemmRule) -> tuple[dict[str, Arrays], dict[str, Array]]:
    """The state and the slots of the rule's product, which depend on no operand."""
    state: dict[str, Arrays] = {}
    slots: dict[str, Array] = {}
    for name, q in rule.operands().items():
        if isinstance(q.scale, Remembering) and not q.exact:
            state[name] = q.scale.initial_state(q.format)
            slots[name] = jnp.zeros(jax.eval_shape(q.scale.observe, jnp.zeros((1, 1))).shape)
    if isinstance(rule.saved, RunningUint8):
        state[SAVED_X], slots[SAVED_X] = rule.saved.initial_memory()
    return state, slots


def next_state(rule: GemmRule, state: Mapping[str, Arrays], observed: Mapping[str, Array]) -> dict[str, Arrays]:
    """The state after a step, from the cotangents of its slots. Leading axes of stacked layers are allowed."""
    quantizers, after = rule.operands(), dict(state)
    for name in set(state) & set(observed):
        if name == SAVED_X:
            after[name] = rule.saved.next_state(state[name], observed[name])
        else:
            q = quantizers[name]
            after[name] = q.scale.next_state(state[name], observed[name], q.format)
    return after


def check_variables(rule: GemmRule, variables: ProductVariables) -> None:
    """That nothing is missing which the rule needs."""
    for name, q in rule.operands().items():
        if isinstance(q.scale, Remembering) and name not in variables.state:
            _missing(name, q, "state", "quant")
        if isinstance(q.scale, Differentiable) and q.scale.learns and name not in variables.params:
            _missing(name, q, "learned parameters", "quant_params")
    if isinstance(rule.saved, RunningUint8) and SAVED_X not in variables.state:
        _missing(SAVED_X, rule.saved, "state", "quant")


def through_differentiable(x, w, rule: GemmRule, key, taps, variables: ProductVariables):
    """The operands past their differentiable quantizers; the rule and the variables left for the product.

    The values stay in float32: in a narrower dtype of the model they would not lie on the grid.
    """
    streams, left = Streams(key), list(rule.fwd)
    values = [x, w]
    for index, (name, q) in enumerate(zip(("fwd.x", "fwd.w"), rule.fwd, strict=True)):
        if not isinstance(q.scale, Differentiable):
            continue
        source = values[index]
        own = streams.operand(name) if q.stochastic else None
        params, state = variables.params.get(name, {}), variables.state.get(name, {})
        rounded, inside = q.scale.quantize(source, q.format, CONTRACTION[name], params, state, own)
        if taps is not None:
            sums = jnp.zeros_like(taps).at[OPERANDS.index(name)].set(value_sums(source, rounded, inside))
            rounded = report(rounded, taps, sums)
        if name in variables.slots:
            rounded = report(rounded, variables.slots[name], q.scale.observe(source))
        values[index], left[index] = rounded, EXACT
    rule = _without_needless_reuse(replace(rule, fwd=tuple(left)))
    remembering = [name for name, q in rule.operands().items() if isinstance(q.scale, Remembering)] + [SAVED_X]
    pick = lambda tree: {name: tree[name] for name in remembering if name in tree}
    return *values, rule, ProductVariables({}, pick(variables.state), pick(variables.slots))


def _without_needless_reuse(rule):
    """What is reused as it was, is as it is."""
    (dy, w), (wgrad_dy, x) = rule.dgrad, rule.wgrad
    exact = lambda q, earlier: EXACT if q.source == "reuse" and earlier.exact else q
    return replace(
        rule,
        dgrad=(dy, exact(w, rule.fwd[1])),
        wgrad=(exact(wgrad_dy, dy), exact(x, rule.fwd[0])),
    )


def _missing(name, q, what, collection):
    raise UsageError(
        f"operand {name} ({q}) needs {what}: pass `variables` (ops.initial_variables); in Flax pass "
        f"the collection {collection!r} that init returns, and list it in variable_axes of a model's own nn.scan"
    )


def _check_independent_of_batch(name, params, q):
    if name == "fwd.x" and any(leaf.size > 1 for leaf in params.values()):
        raise UsageError(f"parameters of x are learned a tensor, whatever the batch; {q.format} has more: say @tensor")
