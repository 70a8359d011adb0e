"""A blend of two quantizers: its ends are those quantizers, bit for bit, and its state counts the steps between."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec.errors import UsageError
from lowprec.ops import GemmRule, initial_variables, next_state, qdot
from lowprec.quantizers import EXACT, REUSE, AbsMean, Clip, Hadamard, Quantizer
from lowprec.quantizers.affine import RunningRange
from lowprec.quantizers.blend import BEFORE, Blend, part_of
from lowprec.quantizers.delayed import Delayed
from lowprec.quantizers.learned_rules import LearnedStep
from lowprec.quantizers.rank_decay import RankDecay

STEPS = 4
X, W = jax.random.normal(jax.random.key(0), (6, 32)), 0.1 * jax.random.normal(jax.random.key(1), (32, 5))
TERNARY = Quantizer("ternary@tensor", scale=AbsMean(floor=1e-5))
AFTER = {
    "ternary": TERNARY,
    "clipped": Quantizer("int4@row", estimator=Clip()),
    "rotated": Quantizer("int4@row", Hadamard(16, signs="fixed"), estimator=Clip()),
    "learned": Quantizer("int4@tensor", scale=LearnedStep()),
    "range": Quantizer("uint8@tensor", scale=RunningRange()),
}
BRIDGE = Quantizer("int4@row", scale=RankDecay())


def rule_of(x, w):
    return GemmRule(fwd=(x, w), dgrad=(EXACT, EXACT if w.exact else REUSE), wgrad=(EXACT, EXACT if x.exact else REUSE))


def product(rule, x, w, variables):
    def run(x, w, params):
        return qdot(x, w, rule, variables=variables._replace(params=params), key=jax.random.key(7))

    y, vjp = jax.vjp(run, x, w, variables.params)
    return y, *vjp(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape).astype(y.dtype))


def at(share, rule, variables):
    """The variables at a share of the blend's steps."""
    state = {
        name: {**state, "blend_steps": jnp.float32(share * STEPS)} if "blend_steps" in state else state
        for name, state in variables.state.items()
    }
    return variables._replace(state=state)


# Either operand goes the same way, and clips are tried on one of them; running ranges are of inputs.
ON_ONE_OPERAND = {"clipped": "w", "range": "x"}
CASES = [(name, operand) for name in AFTER for operand in ON_ONE_OPERAND.get(name, "xw")]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("name", "operand"), CASES)
def test_the_ends_of_a_blend_are_its_quantizers(name, operand, dtype):
    after = AFTER[name]
    x, w = X.astype(dtype), W.astype(dtype)
    mixed = Quantizer(after.format, scale=Blend(EXACT, after, STEPS))
    pair = (lambda q: rule_of(q, EXACT)) if operand == "x" else (lambda q: rule_of(EXACT, q))
    blend, variables = pair(mixed), initial_variables(x, w, pair(mixed))
    plain = product(pair(EXACT), x, w, initial_variables(x, w, pair(EXACT)))
    for found, expected in zip(product(blend, x, w, variables), plain, strict=True):
        if not isinstance(expected, dict):
            np.testing.assert_array_equal(found, expected)
    if after.rotation is not None:
        # A product of rotated operands against one of operands rotated back: the same but for the order of sums.
        both = GemmRule(fwd=(after, after), dgrad=(EXACT, REUSE), wgrad=(EXACT, REUSE))
        blend = GemmRule(fwd=(mixed, mixed), dgrad=(EXACT, REUSE), wgrad=(EXACT, REUSE))
        variables = initial_variables(x, w, blend)
        quantized = product(both, x, w, initial_variables(x, w, both))
        relative = 1e-5 if dtype == jnp.float32 else 0.02
        wide = lambda a: np.asarray(a, np.float32)
        close = lambda a, b: np.testing.assert_allclose(wide(a), wide(b), atol=relative * np.max(np.abs(wide(b))))
    else:
        quantized = product(pair(after), x, w, initial_variables(x, w, pair(after)))
        close = np.testing.assert_array_equal
    jax.tree.map(close, product(blend, x, w, at(1, blend, variables)), quantized)


def test_halfway_is_halfway():
    blend = Blend(EXACT, TERNARY, STEPS)
    state = {"blend_steps": jnp.float32(STEPS / 2)}
    value, vjp = jax.vjp(lambda w: blend.quantize(w, TERNARY.format, -2, {}, state, None)[0], W)
    np.testing.assert_allclose(value, (W + TERNARY.round(W, -2).values) / 2, rtol=1e-6)
    np.testing.assert_allclose(vjp(W)[0], W, rtol=1e-6)  # straight through, whatever λ


def test_the_normalized_end_is_differentiated_through_the_norm():
    """BitNet's linear layer divides its input by its root mean square; the model before did not."""
    mixed = Quantizer("int8@row", scale=Blend(EXACT, Quantizer("int8@row"), STEPS, normalize_after=True))
    blend = rule_of(mixed, EXACT)
    bitnet = GemmRule(fwd=(Quantizer("int8@row"), EXACT), wgrad=(EXACT, REUSE), normalize_input=True)
    variables = initial_variables(X, W, blend)
    for share, rule in ((0, GemmRule()), (1, bitnet)):
        expected = product(rule, X, W, initial_variables(X, W, rule))
        for a, b in zip(product(blend, X, W, at(share, blend, variables))[:3], expected[:3], strict=True):
            np.testing.assert_array_equal(a, b)


def test_steps_are_counted_and_lambda_stays_at_one():
    mixed = Quantizer("ternary@tensor", scale=Blend(EXACT, TERNARY, STEPS))
    rule = rule_of(EXACT, mixed)
    variables = initial_variables(X, W, rule)
    seen = []
    for _ in range(STEPS + 2):
        loss = lambda slots, now: jnp.sum(qdot(X, W, rule, variables=now._replace(slots=slots)))
        values = mixed.scale.quantize(W, mixed.format, -2, {}, variables.state["fwd.w"], None)[0]
        full = TERNARY.round(W, -2).values
        seen.append(float(jnp.vdot(values - W, full - W) / jnp.vdot(full - W, full - W)))
        observed = jax.grad(loss)(variables.slots, variables)
        variables = variables._replace(state=next_state(rule, variables.state, observed))
    np.testing.assert_allclose(seen, [0, 0.25, 0.5, 0.75, 1, 1], atol=1e-6)
    unseen = next_state(rule, variables.state, jax.tree.map(jnp.zeros_like, observed))
    assert float(unseen["fwd.w"]["blend_steps"]) == STEPS + 2  # no call, no step


def test_what_a_blend_remembers_goes_on():
    """The running range behind a blend is that of the plain quantizer."""
    after = AFTER["range"]
    mixed = Quantizer(after.format, scale=Blend(EXACT, after, STEPS))
    state, plain = mixed.scale.initial_state(mixed.format), after.scale.initial_state(after.format)
    for size in (1.0, 3.0):
        state = mixed.scale.next_state(state, mixed.scale.observe(size * X), mixed.format)
        plain = after.scale.next_state(plain, after.scale.observe(size * X), after.format)
    assert float(state.pop("blend_steps")) == 2
    jax.tree.map(np.testing.assert_array_equal, state, plain)


BEFORES = {
    "learned": Quantizer("int3@tensor", scale=LearnedStep()),
    "range": Quantizer("uint4@tensor", scale=RunningRange()),
    "delayed": Quantizer("e4m3fn@tensor", scale=Delayed(history=4)),
}


@pytest.mark.parametrize("last", ["learned", "range"])
@pytest.mark.parametrize("first", BEFORES)
def test_both_ends_may_learn_and_remember(first, last):
    """At λ = 0 values and gradients are those of the first, with its variables; both go on as they would alone."""
    before, after = BEFORES[first], AFTER[last]
    mixed = Quantizer(after.format, scale=Blend(before, after, STEPS))
    rules = {"before": rule_of(before, EXACT), "after": rule_of(after, EXACT), "mixed": rule_of(mixed, EXACT)}
    variables = {name: initial_variables(X, W, rule) for name, rule in rules.items()}
    for _ in range(2):
        for share, name, prefix in ((0, "before", BEFORE), (1, "after", "")):
            blended = at(share, rules["mixed"], variables["mixed"])
            y, dx, dw, learned = product(rules["mixed"], X, W, blended)
            expected = product(rules[name], X, W, variables[name])
            # A delayed scale stands outside of a plain product, and inside of a blend's.
            tolerance = 1e-6 if (first, name) == ("delayed", "before") else 0
            for a, b in zip((y, dx, dw), expected, strict=False):
                np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
            of_x = part_of(learned.get("fwd.x", {}), prefix)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), of_x, expected[3].get("fwd.x", {}))
        for name, rule in rules.items():
            now = variables[name]
            loss = lambda slots, rule=rule, now=now: jnp.sum(qdot(X, W, rule, variables=now._replace(slots=slots)))
            seen = jax.grad(loss)(now.slots)
            variables[name] = now._replace(state=next_state(rule, now.state, seen))
        of_x = variables["mixed"].state["fwd.x"]
        assert float(of_x["blend_steps"]) > 0
        for name, prefix in (("before", BEFORE), ("after", "")):
            alone = variables[name].state.get("fwd.x", {})
            jax.tree.map(np.testing.assert_array_equal, part_of(of_x, prefix), dict(alone))


def test_impossible_blends_are_refused():
    with pytest.raises(UsageError, match="at least one step, not 0"):
        Blend(EXACT, TERNARY, 0)
    for before, after in ((BRIDGE, TERNARY), (EXACT, BRIDGE)):
        with pytest.raises(UsageError, match="is a bridge between two quantizers already"):
            Blend(before, after, 1)
