"""A batch norm and the kernel that it is folded into are one function."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec import models
from lowprec.errors import UsageError
from lowprec.models import ModelConfig
from lowprec.nn import linen
from lowprec.nn.folding import EPSILON, ConvNorm, fold

CONFIG = ModelConfig("resnet", layers=1, width=4)
MODELS = {kind: models.build(replace(CONFIG, batch_norm=kind), 10) for kind in ("plain", "folding", "none")}
IMAGES = np.random.default_rng(1).normal(1, 3, (6, 8, 8, 2)).astype(np.float32)


@pytest.fixture(scope="module")
def trained():
    """Variables with norms that are far from doing nothing."""

    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(MODELS["plain"].init, jax.random.key(0), IMAGES)
    params = jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(np.float32), shapes["params"])
    statistics = jax.tree.map(lambda leaf: rng.uniform(0.5, 2, leaf.shape).astype(np.float32), shapes["batch_stats"])
    return {"params": params, "batch_stats": statistics}


def assert_close(actual, expected, tolerance=1e-5):
    scale = float(jnp.max(jnp.abs(expected)))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


def test_a_folded_convolution_is_the_formula():
    layer, x = ConvNorm(3), IMAGES
    variables = layer.init(jax.random.key(0), x)
    gamma, beta, mean, var = np.array([[1.0, -2.0, 0.5], [0.1, 0.2, 0.3], [1.0, 2.0, 3.0], [0.5, 4.0, 9.0]], np.float32)
    params = {**variables["params"], "norm": {"scale": gamma, "bias": beta}}
    statistics = {"norm": {"mean": mean, "var": var}}
    folded = fold(params, statistics)
    sigma = np.sqrt(var.astype(np.float64) + EPSILON)
    np.testing.assert_allclose(folded["conv"]["kernel"], params["conv"]["kernel"] * (gamma / sigma), rtol=1e-6)
    np.testing.assert_allclose(folded["conv"]["bias"], beta - gamma * mean / sigma, rtol=1e-6)
    expected = layer.apply({"params": params, "batch_stats": statistics}, x)
    assert_close(ConvNorm(3, kind="none").apply({"params": folded}, x), expected)


def test_the_folded_model_gives_the_same_logits_and_has_no_norm(trained):
    params = fold(trained["params"], trained["batch_stats"])
    expected = jax.jit(MODELS["plain"].apply)(trained, IMAGES)
    assert_close(jax.jit(MODELS["none"].apply)({"params": params}, IMAGES), expected)
    shapes = jax.eval_shape(MODELS["none"].init, jax.random.key(0), IMAGES)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes["params"])
    assert set(shapes) == {"params"}


@pytest.mark.parametrize(("recipe", "bound"), [("int8_qat", 0.05), ("dfp16", 1e-3)])
def test_the_folded_model_can_be_quantized(trained, recipe, bound):
    """Eight bits have steps of 1/255 of the range of the inputs; six layers add their errors."""
    params = fold(trained["params"], trained["batch_stats"])
    quantized = linen.quantize(MODELS["none"], recipe)

    def both(params):
        variables = {"params": params, **quantized.init_quantizers(params, IMAGES)}
        return quantized.apply(variables, IMAGES), MODELS["none"].apply({"params": params}, IMAGES)

    found, expected = jax.jit(both)(params)
    assert jnp.any(found != expected)
    assert_close(found, expected, bound)


def test_folding_in_training_is_the_batch_norm(trained):
    """Outputs, running statistics and gradients, with the statistics of the batch and with the running ones."""

    def trained_by(kind):
        def loss(params):
            variables = {**trained, "params": params}
            logits, changed = MODELS[kind].apply(variables, IMAGES, mutable=["batch_stats"])
            return jnp.sum(logits * jnp.arange(10)), (logits, changed["batch_stats"])

        evaluated = jax.jit(MODELS[kind].apply)(trained, IMAGES)
        return *jax.jit(jax.grad(loss, has_aux=True))(trained["params"]), evaluated

    gradients, (logits, statistics), evaluated = trained_by("folding")
    plain_gradients, (plain_logits, plain_statistics), plain_evaluated = trained_by("plain")
    assert_close(logits, plain_logits)
    assert_close(evaluated, plain_evaluated)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), statistics, plain_statistics)
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(plain_gradients))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest)
    jax.tree.map(close, gradients, plain_gradients)


def test_what_is_quantized_while_folding_is_the_folded_kernel():
    """One scale serves two channels: that of the large kernel, unless the norm has made both of one size before."""
    plain, folding = (ConvNorm(2, kind=kind) for kind in ("plain", "folding"))
    variables = folding.init(jax.random.key(3), IMAGES)
    deviation = jnp.array([1.0, 0.02])
    kernel = variables["params"]["conv"]["kernel"] * deviation
    statistics = {"norm": {"mean": jnp.zeros(2), "var": deviation**2 - EPSILON}}
    given = {"params": {**variables["params"], "conv": {"kernel": kernel}}, "batch_stats": statistics}
    expected = plain.apply(given, IMAGES)
    recipe = "fwd=exact,int4@tensor dgrad=exact,reuse wgrad=exact,reuse"
    quantized = lambda module: linen.quantize(module, recipe).apply(given, IMAGES)
    error = lambda module: jnp.mean((quantized(module) - expected)[..., 1] ** 2) / jnp.mean(expected[..., 1] ** 2)
    # Steps of a seventh of the largest weight, or nothing but zeros.
    assert error(folding) < 0.05
    assert error(plain) > 0.9


def test_there_must_be_something_to_fold():
    with pytest.raises(UsageError, match="nothing to fold"):
        fold({"head": {"kernel": jnp.ones((2, 2))}}, {})
    with pytest.raises(UsageError, match="did you mean folding"):
        ConvNorm(2, kind="foldin").init(jax.random.key(0), IMAGES)
