"""What holds for every recipe: a new entry of the library is tested by being there."""

import functools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec import recipes
from lowprec.nn import linen
from lowprec.nn.injection import Injection
from lowprec.nn.stack import LayerStack
from lowprec.ops import initial_variables, qdot
from lowprec.training.config import OptimizerConfig
from lowprec.training.optimizer import build_optimizer, build_quantizer_optimizer
from lowprec.training.state import initial_quantizers, initial_state
from lowprec.training.step import STEP_METRICS, Update, make_train_step

# Siblings of others, which differ in a number or in one operand: with the slow tests.
SIBLINGS = {
    *(f"quest_{bits}" for bits in (2, 3, 5, 6, 7, 8)),
    *(f"mantissa_{bits}" for bits in (1, 2, 3, 4, 5, 6)),
    *(f"int{bits}_qat" for bits in (2, 3, 4, 5, 6, 7)),
    *("lsq_2", "lsq_3", "lsq_8", "lsq_plus_2", "pact_2", "paretoq_1", "paretoq_3", "paretoq_4", "llm_fp4"),
    *("crossquant_int8", "lognet_4", "halo0", "halo1", "halo2_fp6", "zeroquant_fp_m1", "quartet_rtn"),
    *("fp8_block_promoted", "trilm", "bitnet1", "fliqs_fp6", "nested_8", "nested_6", "nested_4", "dkm_3_soft"),
    *("ast_2_4_int8", "qvgen_w2"),
}
EVERY = [pytest.param(name, marks=pytest.mark.slow if name in SIBLINGS else ()) for name in recipes.names()]
# One of each kind: noise, rotations, reuse, state, parameters, saved inputs, nothing at all.
KINDS = {"f32", "fp8_delayed", "nvfp4", "quest_4", "bitnet158", "lsq_4", "int8_qat", "pqt", "mesa", "halo2"}
SCANS = [pytest.param(name, marks=() if name in KINDS else pytest.mark.slow) for name in recipes.names()]


def rule_of(name):
    return recipes.get(name).rule_for("layers/0/mlp/up")


def compiled_products(name, x, w):
    rule = rule_of(name)
    variables = initial_variables(x, w, rule)

    def run(x, w, key):
        y, vjp = jax.vjp(lambda x, w: qdot(x, w, rule, key=key, variables=variables), x, w)
        return y, *vjp(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape).astype(y.dtype))

    return run


X, W = jax.random.normal(jax.random.key(0), (33, 49)), 0.1 * jax.random.normal(jax.random.key(1), (49, 23))
STRANGE = {
    "zero blocks": X.at[:, :20].set(0),
    "an outlier": X.at[3, 5].set(1000.0),
    "equal rows": jnp.full(X.shape, 0.37),
    "zeros": jnp.zeros(X.shape),
}


@pytest.mark.parametrize("name", EVERY)
def test_products_of_odd_and_strange_inputs(name):
    """33 × 49 × 23: no block divides these axes."""
    eager = compiled_products(name, X, W)
    run, key = jax.jit(eager), jax.random.key(2)
    found = run(X, W, key)
    assert [v.shape for v in found] == [(33, 23), X.shape, W.shape]
    for again, value in zip(run(X, W, key), found, strict=True):
        np.testing.assert_array_equal(again, value)
    for outside, value in zip(eager(X, W, key), found, strict=True):
        # The same operands, bit for bit; their products may be summed in another order.
        np.testing.assert_allclose(outside, value, rtol=1e-5, atol=1e-5 * float(jnp.max(jnp.abs(value))))
    other = run(X, W, jax.random.key(3))
    differs = any(bool(jnp.any(a != b)) for a, b in zip(other, found, strict=True))
    assert differs == rule_of(name).stochastic
    for what, x in STRANGE.items():
        assert all(bool(jnp.all(jnp.isfinite(v))) for v in run(x, W, key)), what
    x, w = X.astype(jnp.bfloat16), W.astype(jnp.bfloat16)
    for narrow in jax.jit(eager, compiler_options={"xla_backend_optimization_level": 0})(x, w, key):
        assert narrow.dtype == jnp.bfloat16 and bool(jnp.all(jnp.isfinite(narrow)))
    y, _, dw = run(STRANGE["zeros"], W, key)
    # Zeros stay zeros, but on grids without a zero: there they are lost in their smallest scale.
    largest = max(float(jnp.max(jnp.abs(v))) for v in (y, dw))
    assert largest < 1e-6 if name.startswith("quest") else largest == 0 or rule_of(name).learns


class Block(nn.Module):
    path_prefix: str = ""

    @nn.compact
    def __call__(self, x):
        x = nn.RMSNorm(name="norm")(x)
        return x + nn.Dense(32, name="down")(nn.relu(nn.Dense(48, name="up")(x)))


class Toy(nn.Module):
    """Each token predicts the next by itself, through three layers."""

    remat: bool = False

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(16, 32, name="embed")(tokens)
        x = LayerStack(Block, 3, self.remat, name="layers")(x)
        return nn.Dense(16, name="head")(nn.RMSNorm(name="final_norm")(x))


TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 16, (1, 4, 9), dtype=np.int32))
ADAM = OptimizerConfig(lr=1e-2, weight_decay=0.0, warmup_fraction=0.0, final_fraction=1.0, clip=0.0)
UPDATE = Update(build_optimizer(ADAM, 20), lambda count: ADAM.lr, build_quantizer_optimizer(ADAM, 20))


@functools.cache
def plain_state():
    return jax.jit(lambda: initial_state(Toy(), UPDATE.optimizer, jax.random.key(0), 8))()


def start(name):
    """The plain model's parameters under a recipe, and its training step."""
    model, state = linen.quantize(Toy(), name), plain_state()
    start = lambda params: initial_quantizers(
        model, UPDATE.quantizer_optimizer, params, TOKENS[0, :, :-1], jax.random.key(1)
    )
    state = state._replace(quantizers=jax.jit(start)(state.params))
    slots = model.state_slots(TOKENS[0, :, :-1])
    return state, jax.jit(make_train_step(model, UPDATE, jax.random.key(7), slots))


@pytest.mark.unoptimized
@pytest.mark.parametrize("name", EVERY)
def test_twenty_steps_from_plain_parameters_lower_the_loss(name):
    state, step = start(name)
    before, losses = state.quantizers, []
    for _ in range(20):
        state, metrics = step(state, TOKENS)
        assert bool(jnp.all(jnp.isfinite(metrics)))
        losses.append(float(metrics[STEP_METRICS.index("loss")]))
    assert losses[-1] < losses[0] - 0.1
    recipe = recipes.get(name)
    assert bool(state.quantizers.params) == recipe.learns
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(state.quantizers))
    changed = [bool(jnp.any(a != b)) for a, b in zip(*map(jax.tree.leaves, (before, state.quantizers)), strict=True)]
    assert any(changed) == (recipe.learns or recipe.remembers or recipe.loss_scaling is not None)


class LayerByLayer(Injection):
    """Every layer is a run of its own: the loop."""

    def _runs(self, stack, args, kwargs):
        return super()._runs(stack, args, kwargs) | {"segments": tuple((i, i + 1) for i in range(stack.length))}


def layer_by_layer(variables):
    """The collections of a stack in one run, as those of a run a layer."""

    def layer(tree, i):
        return jax.tree.map(lambda leaf: leaf[i : i + 1], tree)

    def split(tree):
        ((_, run),) = tree["layers"].items()
        return {**tree, "layers": {f"{i}:{i + 1}": layer(run, i) for i in range(3)}}

    return {name: tree if name == "params" or not tree else split(tree) for name, tree in variables.items()}


@pytest.mark.unoptimized
@pytest.mark.parametrize("name", SCANS)
def test_a_scan_and_a_scan_with_remat_are_the_loop(name):
    model = linen.quantize(Toy(), name)
    variables = start(name)[0].variables
    inputs, rngs = TOKENS[0, :, :-1], {"quant": jax.random.key(5)}

    def gradient(apply, variables):
        loss = lambda params: jnp.mean(apply({**variables, "params": params}) ** 2)
        return jax.jit(jax.grad(loss))(variables["params"])

    def loop(variables):
        with nn.intercept_methods(LayerByLayer(model.recipe, "auto")):
            return Toy().apply(variables, inputs, rngs=rngs)

    expected = gradient(loop, layer_by_layer(variables))
    for remat in (False, True):
        apply = partial(linen.quantize(Toy(remat), name).apply, rngs=rngs)
        found = gradient(lambda variables, apply=apply: apply(variables, inputs), variables)
        # One rounding that falls the other way moves an operand by a step; sums in another order may do that.
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.max(jnp.abs(b))) + 1e-9)
        jax.tree.map(close, found, expected)
