"""The scale-only phase: codes never change, whatever happens to their scales."""

import hashlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowprec import recipes
from lowprec.errors import UsageError
from lowprec.nn import linen
from lowprec.nn.fixed_codes import store_codes, with_fixed_codes
from lowprec.nn.stack import LayerStack
from lowprec.ops import GemmRule, ProductVariables, qdot
from lowprec.optim.sparse_update import SCALES_ALONE
from lowprec.quantizers import EXACT, REUSE, Quantizer
from lowprec.quantizers.learned_rules import LearnedStep
from lowprec.recipes.recipe import everywhere

RECIPE = everywhere(
    "efficient", GemmRule(fwd=(EXACT, Quantizer("int2@1x8", scale=LearnedStep("max"))), dgrad=(EXACT, REUSE))
)
X, Y = jax.random.normal(jax.random.key(0), (32, 16)), jax.random.normal(jax.random.key(1), (32, 16))


class Block(nn.Module):
    path_prefix: str = ""

    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(16, name="down")(nn.relu(nn.Dense(24, name="up")(x)))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(16, name="last")(LayerStack(Block, 3, name="layers")(x))


def start():
    model = linen.quantize(Net(), RECIPE)
    variables = jax.jit(model.init)({"params": jax.random.key(2)}, X)
    return model, variables["params"], variables["quant_params"]


def loss_of(model):
    return lambda params, learned: jnp.mean((model.apply({"params": params, "quant_params": learned}, X) - Y) ** 2)


def train(loss, params, learned, steps=30):
    """Scales alone: nothing of the parameters is trained."""
    optimizer = optax.adam(3e-3)
    trained, frozen = SCALES_ALONE.split(params)
    assert trained == {}

    def step(carry, _):
        learned, state = carry
        value, gradient = jax.value_and_grad(lambda l: loss(SCALES_ALONE.join(trained, frozen), l))(learned)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(learned, updates), state), value

    (learned, _), losses = jax.jit(lambda: jax.lax.scan(step, (learned, optimizer.init(learned)), None, steps))()
    return learned, losses


def multiplied_codes(model, params, learned):
    """A digest of the integers that the products of each layer use: what a unit matrix reads, in units of the step."""
    digest = hashlib.sha256()
    rule = model.recipe.rule_for("layers/0/up")
    for name in ("up", "down"):
        for layer in range(3):
            kernel = params["layers"][name]["kernel"][layer]
            step = learned["layers"]["0:3"][name]["fwd.w"]["step"][layer]
            variables = ProductVariables({"fwd.w": {"step": step}})
            values = qdot(jnp.eye(kernel.shape[0]), kernel, rule, variables=variables)
            codes = np.asarray(values) / np.repeat(np.asarray(step), 8, axis=0)
            np.testing.assert_allclose(codes, np.round(codes), atol=1e-5)
            digest.update(np.round(codes).astype(np.int8).tobytes())
    return digest.hexdigest()


def test_stored_codes_are_the_same_model_and_two_bit_integers():
    model, params, learned = start()
    fixed, codes = linen.quantize(Net(), with_fixed_codes(RECIPE)), store_codes(RECIPE, params, learned)
    before, after = (
        jax.jit(m.apply)({"params": p, "quant_params": learned}, X) for m, p in ((model, params), (fixed, codes))
    )
    np.testing.assert_array_equal(before, after)
    for name in ("up", "down"):
        kernel = np.asarray(codes["layers"][name]["kernel"])
        assert set(np.unique(kernel)) <= {-2.0, -1.0, 0.0, 1.0} and len(np.unique(kernel)) > 2
        np.testing.assert_array_equal(codes["layers"][name]["bias"], params["layers"][name]["bias"])
    assert multiplied_codes(model, params, learned) == multiplied_codes(fixed, codes, learned)


def test_training_scales_alone_changes_no_code_and_lowers_the_loss():
    model, params, learned = start()
    fixed, codes = linen.quantize(Net(), with_fixed_codes(RECIPE)), store_codes(RECIPE, params, learned)
    before = multiplied_codes(fixed, codes, learned)
    trained, losses = train(loss_of(fixed), codes, learned)
    assert float(losses[-1]) < float(losses[0])
    assert multiplied_codes(fixed, codes, trained) == before
    steps = zip(jax.tree.leaves(learned), jax.tree.leaves(trained), strict=True)
    assert all(np.any(a != b) for a, b in steps)
    # What the phase is for: with weights left alone, the codes of learned steps do change.
    trained, _ = train(loss_of(model), params, learned)
    assert multiplied_codes(model, params, trained) != before


def test_the_gradient_of_a_step_is_the_sum_of_its_codes():
    fixed = with_fixed_codes(RECIPE).rule_for("up")
    codes = jnp.asarray(np.random.default_rng(0).integers(-2, 2, (16, 5)), jnp.float32)
    step, cotangent = jnp.full((2, 5), 0.1), jax.random.normal(jax.random.key(3), (16, 5))
    read = lambda w, s: qdot(jnp.eye(16), w, fixed, variables=ProductVariables({"fwd.w": {"step": s}}))
    values, pullback = jax.vjp(read, codes, step)
    np.testing.assert_allclose(values, 0.1 * codes, rtol=1e-6)
    dw, ds = pullback(cotangent)
    assert not np.any(dw)
    expected = (np.asarray(cotangent) * np.asarray(codes)).reshape(2, 8, 5).sum(1) / np.sqrt(8 * 1.0)
    np.testing.assert_allclose(ds, expected, atol=1e-5)


def test_what_has_no_codes_is_refused():
    with pytest.raises(UsageError, match="recipe 'int8' has no weights with learned steps"):
        with_fixed_codes(recipes.get("int8"))
    offset = everywhere("off", GemmRule(fwd=(EXACT, Quantizer("int4@row", scale=LearnedStep(offset=True)))))
    with pytest.raises(UsageError, match="has no codes without the offset"):
        with_fixed_codes(offset)
