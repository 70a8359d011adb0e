"""Traces, Fisher information and path integrals against exact derivatives; layers by their names; costs of formats."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec import fake_quant, quantize
from lowprec.analysis.layer_costs import layer_costs
from lowprec.analysis.product_weights import ProductWeights, by_layer, mixed, rounded, stored_bytes
from lowprec.analysis.sensitivity import (
    curvature,
    fisher,
    hessian_trace,
    matrix_sum,
    path_attributions,
    top_eigenvalues,
)
from lowprec.models import ModelConfig, build
from lowprec.nn import linen
from lowprec.nn.stack import LayerStack

A = np.array([[2.0, 1.0, 0.0], [1.0, 3.0, -1.0], [0.0, -1.0, 4.0]], np.float32)


def quadratic(w):
    return 0.5 * w @ jnp.asarray(A) @ w


def test_hutchinson_over_all_signs():
    draws = [float(curvature(quadratic, jnp.ones(3), jnp.array(v))) for v in itertools.product((-1.0, 1.0), repeat=3)]
    assert np.mean(draws) == pytest.approx(9, abs=1e-5)
    assert np.var(draws) == pytest.approx(8, abs=1e-4)


def test_hutchinson_estimates_with_the_error_it_reports():
    """Four standard errors, √(8 / 4096) each; the reported one within 10 %: its own relative error is 1.2 %."""
    found = jax.jit(lambda key: hessian_trace(quadratic, jnp.ones(3), key, 4096))(jax.random.key(0))
    assert abs(float(found.mean) - 9) < 4 * np.sqrt(8 / 4096)
    assert float(found.sem) == pytest.approx(np.sqrt(8 / 4096), rel=0.1)


def test_hutchinson_is_exact_for_a_diagonal_hessian():
    w = jnp.linspace(-1.0, 2.0, 24).reshape(2, 3, 4)
    found = hessian_trace(lambda w: jnp.sum(w**4), w, jax.random.key(0), 3, matrix_sum)
    np.testing.assert_allclose(found.mean, jnp.sum(12 * w**2, axis=(1, 2)), rtol=1e-5)
    assert float(jnp.max(found.sem)) < 1e-4


def test_power_iteration_finds_the_top_eigenvalue_of_each_layer():
    """Two layers in one leaf and one in another, coupled: those of the blocks, not of the whole."""
    rng = np.random.default_rng(0)
    h = rng.normal(size=(10, 10))
    h = jnp.asarray(h + h.T, jnp.float32)
    flat = lambda tree: jnp.concatenate([tree["a"].reshape(-1), tree["b"].reshape(-1)])
    params = {"a": jnp.zeros((2, 2, 2)), "b": jnp.zeros((2, 1))}
    found = jax.jit(
        lambda params: top_eigenvalues(
            lambda p: 0.5 * flat(p) @ h @ flat(p), params, jax.random.key(0), 300, matrix_sum
        )
    )(params)
    for value, block in zip([*found["a"], found["b"]], (slice(0, 4), slice(4, 8), slice(8, 10)), strict=True):
        eigenvalues = np.linalg.eigvalsh(np.asarray(h)[block, block])
        assert float(value) == pytest.approx(eigenvalues[np.argmax(np.abs(eigenvalues))], rel=1e-3)


def test_fisher_is_the_mean_of_the_squares_not_the_square_of_the_mean():
    rng = np.random.default_rng(0)
    x, y, w = rng.normal(size=(7, 4)), rng.normal(size=7), rng.normal(size=4)
    gradients = 2 * (x @ w - y)[:, None] * x
    loss = lambda w, example: (example["x"] @ w - example["y"]) ** 2
    found = fisher(loss, jnp.asarray(w, jnp.float32), {"x": jnp.asarray(x), "y": jnp.asarray(y)})
    np.testing.assert_allclose(found, np.mean(gradients**2, axis=0), rtol=1e-5)


def test_path_attributions_add_up_to_the_difference_of_the_losses_as_points_to_the_minus_two():
    with jax.enable_x64(True):
        w, target = jnp.array([0.3, -1.0, 2.0]), jnp.array([1.5, 0.0, 1.0])
        loss = lambda w: jnp.sum(jnp.exp(w)) * jnp.cos(w[0] - w[1])
        true = float(loss(target) - loss(w))
        errors = [abs(float(jnp.sum(path_attributions(loss, w, target, n))) - true) for n in (4, 8, 16, 32)]
    assert errors[-1] < 2e-3 * abs(true)
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 4, rtol=0.1)


def test_each_weight_of_a_separable_loss_is_charged_its_own_part():
    w, target = jnp.array([[0.3, -1.0], [2.0, 1.0]]), jnp.array([[0.5, -1.5], [2.0, 1.25]])
    found = path_attributions(lambda w: jnp.sum(w**2), w, target, 1)  # a line in w: the midpoint rule is exact
    np.testing.assert_allclose(found, target**2 - w**2, rtol=1e-6)
    assert float(found[1, 0]) == 0


class Block(nn.Module):
    path_prefix: str = ""

    @nn.compact
    def __call__(self, x):
        hidden = nn.tanh(nn.DenseGeneral((4, 8), name="up")(x))
        return x + nn.DenseGeneral(16, axis=(-2, -1), name="down")(hidden)


class Tokens(nn.Module):
    """Each token predicts the next by itself."""

    @nn.compact
    def __call__(self, tokens):
        x = LayerStack(Block, 2, name="layers")(nn.Embed(11, 16, name="embed")(tokens))
        return nn.Dense(11, name="head")(nn.Dense(16, name="middle")(x))


PRODUCT = ProductWeights(Tokens())
TOKENS = jax.random.randint(jax.random.key(0), (3, 7), 0, 11)
VARIABLES = jax.jit(Tokens().init)(jax.random.key(1), TOKENS)
WEIGHTS = jax.jit(PRODUCT.weights)(VARIABLES, TOKENS)
LAYERS = ("layers/0/down", "layers/0/up", "layers/1/down", "layers/1/up", "middle")


@jax.jit
def losses(weights, tokens):
    logits = PRODUCT.apply(VARIABLES, weights, tokens[:, :-1])
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
    return -jnp.mean(picked, axis=(1, 2))


def test_the_layers_of_a_llama_are_those_that_a_recipe_quantizes():
    model = build(ModelConfig(layers=2, width=16, heads=2), 11)
    variables = jax.eval_shape(model.init, jax.random.key(1), TOKENS)
    shapes = jax.eval_shape(ProductWeights(model).weights, variables, TOKENS)
    found = by_layer(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[:-2]), shapes))
    rules = linen.quantize(model, "fwd=int4@row").layers(TOKENS)
    assert set(found) == {path for path, rule in rules.items() if not rule.exact}
    assert "layers/1/attention/query" in found


def test_the_model_with_its_own_weights_is_the_model():
    assert tuple(sorted(by_layer(jax.tree.map(matrix_sum, WEIGHTS)))) == LAYERS
    apply = jax.jit(PRODUCT.apply)
    plain = jax.jit(Tokens().apply)(VARIABLES, TOKENS)
    np.testing.assert_allclose(apply(VARIABLES, WEIGHTS, TOKENS), plain, rtol=1e-6, atol=1e-6)
    assert not np.allclose(apply(VARIABLES, jax.tree.map(jnp.zeros_like, WEIGHTS), TOKENS), plain)


@pytest.mark.parametrize("fmt", ["int4@row", "nvfp4", "int3@tensor"])
def test_rounded_weights_are_those_of_the_recipe(fmt):
    """Layer by layer: the largest magnitude of a tensor is not that of the stack."""
    found = jax.jit(PRODUCT.apply)(VARIABLES, jax.jit(rounded, static_argnums=1)(WEIGHTS, fmt), TOKENS)
    recipe = linen.quantize(Tokens(), f"fwd=exact,{fmt}")
    np.testing.assert_allclose(found, jax.jit(recipe.apply)(VARIABLES, TOKENS), rtol=1e-5, atol=1e-6)


def test_a_mixture_takes_each_layer_from_its_choice():
    candidates = {"a": WEIGHTS, "b": jax.tree.map(lambda leaf: leaf + 1, WEIGHTS)}
    taken = {layer: "b" if layer in ("layers/1/up", "middle") else "a" for layer in LAYERS}
    found = mixed(candidates, taken)
    moved = by_layer(jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b), axis=(-2, -1)), found, WEIGHTS))
    assert {layer: round(by, 5) for layer, by in moved.items()} == {
        layer: float(choice == "b") for layer, choice in taken.items()
    }
    with pytest.raises(ValueError, match="unknown candidate 'c'"):
        mixed(candidates, dict.fromkeys(LAYERS, "c"))


class Narrow(nn.Module):
    path_prefix: str = ""

    @nn.compact
    def __call__(self, x):
        return x + nn.tanh(nn.DenseGeneral((2, 2), name="up")(x).reshape(x.shape))


class Toy(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="first")(LayerStack(Narrow, 2, name="layers")(x))


def test_traces_of_stacked_layers_are_those_of_the_blocks_of_the_exact_hessian():
    """All signs of all weights, 2^44, are too many: 4000 draws, four standard errors as reported."""
    x = jax.random.normal(jax.random.key(0), (5, 4))
    variables = Toy().init(jax.random.key(1), x)
    product = ProductWeights(Toy())
    weights = product.weights(variables, x)
    traced = []

    def loss(weights):
        traced.append(1)
        return jnp.mean(product.apply(variables, weights, x) ** 4)

    found = jax.jit(lambda key: hessian_trace(loss, weights, key, 4000, matrix_sum))(jax.random.key(2))
    assert len(traced) == 1
    leaves, tree = jax.tree.flatten(weights)
    hessian = jax.jit(jax.hessian(lambda leaves: loss(tree.unflatten(leaves))))(leaves)
    for i, (leaf, mean, sem) in enumerate(zip(leaves, *map(jax.tree.leaves, found), strict=True)):
        diagonal = jnp.diag(hessian[i][i].reshape(leaf.size, leaf.size)).reshape(leaf.shape)
        assert np.all(np.abs(mean - matrix_sum(diagonal)) < 4 * sem)
        assert np.all(np.asarray(sem) < 0.2 * np.abs(matrix_sum(diagonal)).max())
    assert set(by_layer(found.mean)) == {"first", "layers/0/up", "layers/1/up"}


@pytest.mark.parametrize("measure", ["hessian", "fisher", "path"])
def test_costs_and_sizes_of_the_layers_of_a_model(measure):
    formats = ("int8@row", "int4@row")
    found = layer_costs(losses, WEIGHTS, [TOKENS, TOKENS[::-1]], formats, measure=measure, key=jax.random.key(3))
    table = found.table
    assert table.layers == LAYERS and table.choices == formats
    sizes = dict(zip(table.layers, table.size.tolist(), strict=True))
    up = VARIABLES["params"]["layers"]["up"]["kernel"][1].reshape(16, 32)
    assert sizes["layers/1/up"] == [quantize(up, fmt, axis=0).nbytes for fmt in formats]
    assert found.weights["layers/1/up"] == up.size
    cost = dict(zip(table.layers, table.cost.tolist(), strict=True))
    if measure == "path":
        change = lambda fmt: float(jnp.mean(losses(rounded(WEIGHTS, fmt), TOKENS) - losses(WEIGHTS, TOKENS)))
        np.testing.assert_allclose(table.cost.sum(axis=0), [change(fmt) for fmt in formats], rtol=1e-2, atol=2e-6)
    else:
        assert np.all(table.cost[:, 0] <= table.cost[:, 1])
    error = (up - fake_quant(up, "int4@row", axis=0)) ** 2
    if measure == "hessian":
        mean, sem = found.curvature["layers/1/up"]
        assert cost["layers/1/up"][1] == pytest.approx(max(mean, 0) / up.size * float(jnp.sum(error)), rel=1e-4)
        assert sem > 0
    if measure == "fisher":
        gradients = jax.jit(jax.jacrev(losses))(WEIGHTS, TOKENS)["layers"]["0:2"]["up"]["fwd.w"]["weight"][:, 1]
        expected = jnp.sum(jnp.mean(gradients**2, axis=0) * error)
        assert cost["layers/1/up"][1] == pytest.approx(float(expected), rel=1e-3)


def test_costs_by_the_top_eigenvalue_are_those_of_the_blocks_of_the_hessian():
    """Two batches of one layer's exact block; power iteration reaches its eigenvalue from below."""
    batches, formats = [TOKENS, TOKENS[::-1] // 2], ("int4@row", "int8@row")
    found = layer_costs(losses, WEIGHTS, batches, formats, measure="eigenvalue", samples=60, key=jax.random.key(3))
    up = WEIGHTS["layers"]["0:2"]["up"]["fwd.w"]["weight"]

    def loss(own, batch):
        whole = jax.tree.map(lambda leaf: leaf, WEIGHTS)
        whole["layers"]["0:2"]["up"]["fwd.w"]["weight"] = up.at[1].set(own.reshape(up.shape[1:]))
        return jnp.mean(losses(whole, batch))

    hessians = [jax.jit(jax.hessian(loss))(up[1].ravel(), batch) for batch in batches]
    largest = []
    for hessian in hessians:
        values = np.linalg.eigvalsh(np.asarray(hessian, np.float64))
        largest.append(values[np.argmax(np.abs(values))])
    mean, std = found.curvature["layers/1/up"]
    assert mean == pytest.approx(np.mean(largest), rel=0.02)
    assert std == pytest.approx(np.std(largest), abs=0.03 * abs(np.mean(largest)))
    error = float(jnp.sum((up[1] - fake_quant(up[1], "int4@row", axis=0)) ** 2))
    row = found.table.cost[found.table.layers.index("layers/1/up")]
    assert row[0] == pytest.approx((abs(mean) + std) * error, rel=1e-4)


def test_stored_bytes_count_the_scales():
    assert stored_bytes({"w": jnp.zeros((3, 32, 8))}, "int4@row") == {"w": 32 * 8 // 2 + 4 * 8}


def test_what_costs_refuse():
    run = lambda formats, **options: layer_costs(losses, WEIGHTS, [TOKENS], formats, key=jax.random.key(0), **options)
    with pytest.raises(ValueError, match="unknown measure of sensitivity 'hesian'; did you mean hessian"):
        run(["int4@row"], measure="hesian")
    with pytest.raises(ValueError, match="each once; not int4@row, int4@row"):
        run(["int4@row", "int4@row"])
    with pytest.raises(ValueError, match="2 samples or more, not 1"):
        run(["int4@row"], samples=1)
