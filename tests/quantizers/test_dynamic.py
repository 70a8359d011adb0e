"""Formats that are state: the values of the static formats, without a second compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec.errors import UsageError
from lowprec.formats import round_to
from lowprec.ops import GemmRule, initial_variables, next_state, qdot
from lowprec.quantizers import EXACT, REUSE, Quantizer, fake_quant
from lowprec.quantizers.dynamic import DynamicChoice, DynamicFixedPoint

X, W = jax.random.normal(jax.random.key(0), (6, 33)), 0.1 * jax.random.normal(jax.random.key(1), (33, 5))
ELEMENTS = ("int4", "int8", "e4m3fn", "e2m1fn")


def rule_of(w):
    return GemmRule(fwd=(EXACT, w), dgrad=(EXACT, REUSE))


def products(rule):
    """y and its gradients, compiled, and how often."""
    compilations = []

    @jax.jit
    def run(x, w, state, key):
        compilations.append(1)
        variables = initial_variables(x, w, rule)._replace(state=state)
        y, vjp = jax.vjp(lambda x, w: qdot(x, w, rule, variables=variables, key=key), x, w)
        return y, *vjp(jnp.ones_like(y))

    return run, compilations


def test_fixed_point_by_its_state_is_the_static_format():
    rule = rule_of(Quantizer("fx8.4", scale=DynamicFixedPoint("nearest_even")))
    run, compilations = products(rule)
    for bits, fraction_bits in ((8, 4), (8, 7), (4, 3), (16, 12), (3, 1)):
        state = {"fwd.w": {"bits": jnp.float32(bits), "fraction_bits": jnp.float32(fraction_bits)}}
        rounded = round_to(W, f"fx{bits}.{fraction_bits}")
        y, dx, dw = run(X, W, state, jax.random.key(2))
        np.testing.assert_allclose(y, X @ rounded, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(dx, jnp.ones_like(y) @ rounded.T, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(dw, X.T @ jnp.ones_like(y), rtol=1e-5, atol=1e-5)  # straight through
    assert len(compilations) == 1


def test_fixed_point_starts_from_the_format_and_stays_there():
    rule = rule_of(Quantizer("fx8.4", scale=DynamicFixedPoint()))
    variables = initial_variables(X, W, rule)
    assert {name: float(value) for name, value in variables.state["fwd.w"].items()} == {"bits": 8, "fraction_bits": 4}
    loss = lambda slots: jnp.sum(qdot(X, W, rule, variables=variables._replace(slots=slots), key=jax.random.key(0)))
    after = next_state(rule, variables.state, jax.grad(loss)(variables.slots))
    jax.tree.map(np.testing.assert_array_equal, after, variables.state)


def test_stochastic_rounding_of_fixed_point_is_unbiased():
    """4096 draws of |error| < step 1/16: the mean is off by less than 5 · (1/16)/2/sqrt(4096) = 2.5e-3."""
    quantizer = Quantizer("fx8.4", scale=DynamicFixedPoint())
    state = quantizer.scale.initial_state(quantizer.format)
    one = lambda key: quantizer.scale.quantize(W, quantizer.format, -2, {}, state, key)[0]
    draws = jax.vmap(one)(jax.random.split(jax.random.key(3), 4096))
    assert set(np.unique(draws * 16 % 1)) == {0}
    np.testing.assert_allclose(jnp.mean(draws, 0), W, atol=2.5e-3)


@pytest.mark.parametrize("block", ["row", "1x16", "tensor"])
def test_a_choice_by_its_state_is_the_static_format(block):
    rule = rule_of(Quantizer(f"int8@{block}", scale=DynamicChoice(ELEMENTS)))
    run, compilations = products(rule)
    for index, element in enumerate(ELEMENTS):
        rounded = fake_quant(W, f"{element}@{block}", axis=0, pad=True)
        y, _, _ = run(X, W, {"fwd.w": {"choice": jnp.float32(index)}}, jax.random.key(2))
        np.testing.assert_allclose(y, X @ rounded, rtol=1e-5, atol=1e-5)
    assert len(compilations) == 1


def test_what_cannot_change_is_refused():
    with pytest.raises(UsageError, match=r"starts from a signed one, e\.g\. fx8\.4, not from uint8"):
        initial_variables(X, W, rule_of(Quantizer("uint8", scale=DynamicFixedPoint())))
    with pytest.raises(UsageError, match=r"say, e\.g\., int8@row, not int8"):
        initial_variables(X, W, rule_of(Quantizer("int8", scale=DynamicChoice(ELEMENTS))))
    with pytest.raises(UsageError, match="at least one format"):
        DynamicChoice(())
    with pytest.raises(UsageError, match="blocks are the quantizer's"):
        DynamicChoice(("int4@row",))
    with pytest.raises(UsageError, match="needs a key"):
        quantizer = Quantizer("fx8.4", scale=DynamicFixedPoint())
        quantizer.scale.quantize(W, quantizer.format, -2, {}, quantizer.scale.initial_state(quantizer.format), None)
