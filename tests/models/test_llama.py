"""The Llama model, its stack of layers, and the counts that scaling laws are plotted against."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec import models, recipes
from lowprec.models import ModelConfig
from lowprec.models.llama import Block
from lowprec.nn import linen
from lowprec.nn.attention import grouped_attention
from lowprec.nn.rotary import rotary
from lowprec.nn.stack import LayerStack
from lowprec.recipes import KEEP

SMALL = ModelConfig(layers=3, width=32, heads=4, kv_heads=2)
TOKENS = jax.random.randint(jax.random.key(0), (2, 12), 0, 64)


def parameters(config=SMALL):
    return models.build(config, 64).init(jax.random.key(1), TOKENS)["params"]


@pytest.mark.parametrize("size", models.ladder.sizes())
def test_parameters_counted_from_the_config_are_those_of_the_model(size):
    config = models.ladder.get(size).model
    shapes = jax.eval_shape(models.build(config, 256).init, jax.random.key(0), TOKENS)
    total = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))
    assert models.count_parameters(config, 256).total == total


@pytest.mark.parametrize(
    ("size", "published"),
    [
        ("30M", 30_482_560),
        ("50M", 49_556_736),
        ("100M", 102_777_856),
        ("200M", 203_188_480),
        ("430M", 443_068_288),
        ("800M", 822_151_168),
    ],
)
def test_the_ladder_has_the_published_numbers_of_parameters(size, published):
    """QuEST's runs, arXiv 2502.05003."""
    assert models.count_parameters(models.ladder.get(size).model, 50_304).non_embedding == published


def test_flops_of_a_training_step_as_xla_counts_them():
    config = ModelConfig(layers=2, width=128, heads=2)
    model = models.build(config, 256)
    tokens = jnp.zeros((4, 256), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    unrolled = lambda p: jnp.sum(model.apply(p, tokens))
    compiled = jax.jit(jax.grad(unrolled)).lower(params).compile()
    # XLA counts the body of a scan once; so the layers enter once in its figure and twice in ours.
    ours = models.flops_per_token(config, 256, 256) * tokens.size
    layers = ours - 6 * 256 * config.width * tokens.size
    masked_half = 6 * config.layers * 256 * config.width * tokens.size
    expected = ours - layers / 2 + masked_half / 2
    assert compiled.cost_analysis()["flops"] == pytest.approx(expected, rel=0.1)  # elementwise work comes on top


def test_no_token_sees_its_future():
    model, params = models.build(SMALL, 64), parameters()
    logits = model.apply({"params": params}, TOKENS)
    changed = model.apply({"params": params}, TOKENS.at[:, 7].add(1) % 64)
    np.testing.assert_array_equal(logits[:, :7], changed[:, :7])
    assert jnp.all(jnp.any(logits[:, 7:] != changed[:, 7:], axis=-1))


def test_the_stack_is_the_loop_over_its_layers():
    model, params = models.build(SMALL, 64), parameters()
    x = params["embed"]["embedding"][TOKENS]
    for i in range(SMALL.layers):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
        x = Block(SMALL).apply({"params": layer}, x)
    x = nn.RMSNorm(epsilon=SMALL.norm_epsilon).apply({"params": params["final_norm"]}, x)
    expected = x @ params["head"]["kernel"]
    np.testing.assert_allclose(model.apply({"params": params}, TOKENS), expected, rtol=2e-5, atol=2e-6)


def test_layers_are_initialized_independently():
    kernels = parameters()["layers"]["mlp"]["up"]["kernel"]
    assert not jnp.array_equal(kernels[0], kernels[1])
    assert float(jnp.std(kernels)) == pytest.approx(SMALL.init_std, rel=0.05)


def loss_and_gradient(model, params):
    key = jax.random.key(5)
    loss = lambda p: jnp.mean(model.apply({"params": p}, TOKENS, rngs={"quant": key}) ** 2)
    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.slow
def test_remat_changes_no_gradient():
    params = parameters()
    for recipe in ("f32", "nvfp4"):
        plain, remat = (
            loss_and_gradient(linen.quantize(models.build(config, 64), recipe), params)
            for config in (SMALL, ModelConfig(layers=3, width=32, heads=4, kv_heads=2, remat=True))
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-7), plain, remat)


def test_layers_with_other_rules_are_scanned_in_segments_over_the_same_parameters():
    int2 = recipes.parse("fwd=int2@row").rule_for("x")
    recipe = recipes.Recipe("last kept", {"layers/2/.*": KEEP, "layers/.*": int2, "head": KEEP})
    model = linen.quantize(models.build(SMALL, 64), recipe)
    params = model.init(jax.random.key(1), TOKENS)["params"]
    jax.tree.map(np.testing.assert_array_equal, params, parameters())
    x = jax.random.normal(jax.random.key(3), (2, 12, 32))
    stack = LayerStack(partial(Block, SMALL), SMALL.layers, name="layers")

    class Wrapped(nn.Module):
        @nn.compact
        def __call__(self, x):
            return stack.clone(parent=self)(x)

    recipe = recipes.Recipe("last kept", {"layers/2/.*": KEEP, "layers/.*": int2})
    y = linen.quantize(Wrapped(), recipe).apply({"params": {"layers": params["layers"]}}, x)
    for i in range(3):
        layer = {"params": jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])}
        block = Block(SMALL) if i == 2 else linen.quantize(Block(SMALL), recipes.Recipe("all", {".*": int2}))
        x = block.apply(layer, x)
    np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-5)


def test_noise_does_not_depend_on_how_layers_are_grouped():
    """A rule that splits the stack elsewhere leaves the noise of the other layers as it is."""
    rounded = recipes.parse("fwd=fx16.2(stochastic)").rule_for("x")
    other = recipes.parse("fwd=fx16.2(stochastic),fx16.2(stochastic) wgrad=bf16").rule_for("x")  # the same forward
    params = parameters()
    outputs = []
    for rules in ({"head": KEEP, ".*": rounded}, {"head": KEEP, "layers/1/.*": other, ".*": rounded}):
        model = linen.quantize(models.build(SMALL, 64), recipes.Recipe("r", rules))
        outputs.append(
            jax.jit(lambda p, model=model: model.apply({"params": p}, TOKENS, rngs={"quant": jax.random.key(2)}))(
                params
            )
        )
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-6)


def test_rotary_scores_depend_on_the_distance_alone_at_any_position_and_dtype():
    q, k = (jax.random.normal(jax.random.key(i), (1, 4, 2, 64)) for i in (0, 1))

    def scores(shift):
        positions = jnp.arange(4) + shift
        return jnp.einsum("bthd,bshd->bhts", rotary(q, positions), rotary(k, positions)) / 8

    np.testing.assert_allclose(scores(0), scores(4096), rtol=0, atol=2e-3)
    np.testing.assert_allclose(scores(0), scores(64), rtol=0, atol=2e-5)
    assert rotary(q.astype(jnp.bfloat16), jnp.arange(4)).dtype == jnp.bfloat16
    np.testing.assert_allclose(rotary(q, jnp.zeros(4)), q)


def test_grouped_queries_are_full_attention_with_repeated_keys():
    q = jax.random.normal(jax.random.key(0), (2, 5, 6, 8))
    k, v = (jax.random.normal(jax.random.key(i), (2, 5, 3, 8)) for i in (1, 2))
    repeated = (jnp.repeat(a, 2, axis=2) for a in (k, v))
    mask = nn.make_causal_mask(jnp.ones((2, 5)))
    expected = nn.dot_product_attention(q, *repeated, mask=mask)
    np.testing.assert_allclose(grouped_attention(q, k, v), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 65}, "model.width 65 does not give 2 heads of an even size; the next width that does is 68"),
        ({"heads": 4, "kv_heads": 3}, "kv_heads 3 does not divide 4 heads; 1, 2, 4 do"),
        ({"layers": 0}, "model.layers is at least 1"),
        ({"dtype": "float16"}, "model.dtype is float32 or bfloat16"),
    ],
)
def test_impossible_shapes_are_refused_with_the_nearest_possible_one(fields, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**fields)


def test_an_unknown_model():
    with pytest.raises(ValueError, match="unknown model 'lama'; did you mean llama"):
        models.build(ModelConfig(name="lama"), 8)
