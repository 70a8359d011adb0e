"""Models from outside, written without a thought of quantization, under recipes by name: a few steps of each."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lowprec import recipes
from lowprec.nn import linen
from lowprec.nn import nnx as quant_nnx

IMAGES = jax.random.normal(jax.random.key(0), (8, 8, 8, 1))
LABELS = jnp.arange(8) % 4
TOKENS = jax.random.randint(jax.random.key(1), (4, 8), 0, 16)
STEPS = 4


class LinenCNN(nn.Module):
    """In the manner of Flax's MNIST example."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, kernel_size=(3, 3))(x))
        x = nn.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = nn.relu(nn.Conv(16, kernel_size=(3, 3))(x))
        x = nn.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(32)(x.reshape(len(x), -1)))
        return nn.Dense(4)(x)


class NnxCNN(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 16, kernel_size=(3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(16, 16, kernel_size=(3, 3), rngs=rngs)
        self.linear1 = nnx.Linear(64, 32, rngs=rngs)
        self.linear2 = nnx.Linear(32, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.avg_pool(nnx.relu(self.conv1(x)), window_shape=(2, 2), strides=(2, 2))
        x = nnx.avg_pool(nnx.relu(self.conv2(x)), window_shape=(2, 2), strides=(2, 2))
        return self.linear2(nnx.relu(self.linear1(x.reshape(len(x), -1))))


class NnxTransformer(nnx.Module):
    """A block before the norm, as tutorials write it."""

    def __init__(self, rngs):
        self.embedding = nnx.Embed(16, 16, rngs=rngs)
        self.norm1, self.norm2 = nnx.LayerNorm(16, rngs=rngs), nnx.LayerNorm(16, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=16, decode=False, rngs=rngs)
        self.mlp = nnx.Sequential(nnx.Linear(16, 32, rngs=rngs), nnx.gelu, nnx.Linear(32, 16, rngs=rngs))
        self.head = nnx.Linear(16, 16, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embedding(tokens)
        x = x + self.attention(self.norm1(x), mask=nnx.make_causal_mask(tokens))
        x = x + self.mlp(self.norm2(x))
        return self.head(x)


# A GPT-2 as hubs of pretrained models define it: a tree of modules made in setup, and logits from the embedding.


class FlaxAttention(nn.Module):
    width: int
    heads: int

    def setup(self):
        self.c_attn = nn.Dense(3 * self.width)
        self.c_proj = nn.Dense(self.width)

    def __call__(self, hidden):
        split = lambda x: x.reshape(*x.shape[:2], self.heads, -1)
        query, key, value = map(split, jnp.split(self.c_attn(hidden), 3, axis=-1))
        mask = nn.make_causal_mask(hidden[..., 0])
        context = nn.dot_product_attention(query, key, value, mask=mask)
        return self.c_proj(context.reshape(hidden.shape))


class FlaxMLP(nn.Module):
    width: int

    def setup(self):
        self.c_fc = nn.Dense(2 * self.width)
        self.c_proj = nn.Dense(self.width)

    def __call__(self, hidden):
        return self.c_proj(nn.gelu(self.c_fc(hidden)))


class FlaxBlock(nn.Module):
    width: int
    heads: int

    def setup(self):
        self.ln_1, self.ln_2 = nn.LayerNorm(), nn.LayerNorm()
        self.attn, self.mlp = FlaxAttention(self.width, self.heads), FlaxMLP(self.width)

    def __call__(self, hidden):
        hidden = hidden + self.attn(self.ln_1(hidden))
        return hidden + self.mlp(self.ln_2(hidden))


class FlaxBlockCollection(nn.Module):
    width: int
    heads: int
    layers: int = 1

    def setup(self):
        self.blocks = [FlaxBlock(self.width, self.heads, name=str(i)) for i in range(self.layers)]

    def __call__(self, hidden):
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


class FlaxTransformer(nn.Module):
    vocabulary: int
    width: int

    def setup(self):
        self.wte, self.wpe = nn.Embed(self.vocabulary, self.width), nn.Embed(32, self.width)
        self.h = FlaxBlockCollection(self.width, heads=2)
        self.ln_f = nn.LayerNorm()

    def __call__(self, tokens):
        hidden = self.wte(tokens) + self.wpe(jnp.arange(tokens.shape[1]))
        return self.ln_f(self.h(hidden))


class FlaxLMHeadModel(nn.Module):
    vocabulary: int = 16
    width: int = 16

    def setup(self):
        self.transformer = FlaxTransformer(self.vocabulary, self.width)

    def __call__(self, tokens):
        return self.transformer.wte.attend(self.transformer(tokens))


def keeping(recipe, *patterns):
    """A recipe of the library, with layers of a model kept as such models need it."""
    library = recipes.get(recipe)
    kept = dict.fromkeys(patterns, recipes.KEEP)
    return recipes.Recipe(recipe, (*recipes.Recipe("kept", kept).rules, *library.rules))


def losses_of_linen(model, recipe, x, labels):
    model = linen.quantize(model, recipe)
    variables = model.init(jax.random.key(0), x)
    params, state, slots = variables["params"], variables.get(linen.STATE, {}), model.state_slots(x)
    optimizer = optax.adam(1e-2)

    def loss_of(params, slots, state, key):
        variables = {"params": params, linen.STATE: state, linen.TAPS: slots}
        logits = model.apply(variables, x, rngs={linen.STREAM: key})
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(params, state, moments, key):
        loss, (gradients, seen) = jax.value_and_grad(loss_of, argnums=(0, 1))(params, slots, state, key)
        updates, moments = optimizer.update(gradients, moments)
        return optax.apply_updates(params, updates), model.next_state(state, seen), moments, loss

    moments, losses = optimizer.init(params), []
    for i in range(STEPS):
        params, state, moments, loss = step(params, state, moments, jax.random.key(i))
        losses.append(float(loss))
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves((params, state)))
    return losses


def losses_of_nnx(model, recipe, x, labels):
    quant_nnx.quantize(model, recipe, nnx.Rngs(quant=0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss_of(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()

        wrt = nnx.DiffState(0, nnx.Any(nnx.Param, quant_nnx.QuantTap))
        loss, gradients = nnx.value_and_grad(loss_of, argnums=wrt)(model)
        optimizer.update(model, nnx.filter_state(gradients, nnx.Param))
        quant_nnx.next_state(model, gradients)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(STEPS)]
    kinds = nnx.Any(nnx.Param, quant_nnx.QuantState)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(nnx.state(model, kinds)))
    return losses


def check(losses, plain):
    """The loss of a fixed batch falls; the first one is the plain model's up to the noise of rounding."""
    assert np.all(np.isfinite(losses))
    assert losses[-1] < losses[0] - 0.05
    assert losses[0] != plain
    assert losses[0] == pytest.approx(plain, rel=0.2)


# The patches of the first convolution have 9 entries, which blocks of 16 do not divide.
FIRST = {"linen": "Conv_0", "nnx": "conv1"}


@pytest.mark.parametrize("recipe", [pytest.param("nvfp4", marks=pytest.mark.slow), "fp8_delayed"])
def test_a_convolutional_net_in_linen(recipe):
    model = LinenCNN()
    plain = model.apply(model.init(jax.random.key(0), IMAGES), IMAGES)
    expected = float(optax.softmax_cross_entropy_with_integer_labels(plain, LABELS).mean())
    check(losses_of_linen(model, keeping(recipe, FIRST["linen"], "Dense_1"), IMAGES, LABELS), expected)


@pytest.mark.parametrize("recipe", [pytest.param("nvfp4", marks=pytest.mark.slow), "int8"])
def test_a_convolutional_net_in_nnx(recipe):
    model = NnxCNN(nnx.Rngs(0))
    expected = float(optax.softmax_cross_entropy_with_integer_labels(model(IMAGES), LABELS).mean())
    check(losses_of_nnx(model, keeping(recipe, FIRST["nnx"], "linear2"), IMAGES, LABELS), expected)


@pytest.mark.parametrize("recipe", [pytest.param("quest_4", marks=pytest.mark.slow), "fp8_delayed"])
def test_a_transformer_in_nnx(recipe):
    model = NnxTransformer(nnx.Rngs(0))
    expected = float(optax.softmax_cross_entropy_with_integer_labels(model(TOKENS), TOKENS).mean())
    check(losses_of_nnx(model, recipe, TOKENS, TOKENS), expected)
    served = {*(f"attention/{name}" for name in ("query", "key", "value", "out")), "mlp/layers/0", "mlp/layers/2"}
    assert set(quant_nnx.layers(model)) == served


@pytest.mark.parametrize(
    "recipe", ["int8", pytest.param("nvfp4", marks=pytest.mark.slow), pytest.param("quest_4", marks=pytest.mark.slow)]
)
def test_a_language_model_in_the_style_of_a_hub(recipe):
    model = FlaxLMHeadModel()
    plain = model.apply(model.init(jax.random.key(0), TOKENS), TOKENS)
    expected = float(optax.softmax_cross_entropy_with_integer_labels(plain, TOKENS).mean())
    # Its embedding goes by a name of its own, which no recipe knows.
    kept = keeping(recipe, ".*/wte")
    check(losses_of_linen(model, kept, TOKENS, TOKENS), expected)
    layers = linen.quantize(model, kept).layers(TOKENS)
    served = {f"transformer/h/0/{name}" for name in ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj")}
    assert {path for path, rule in layers.items() if not rule.exact} == served
