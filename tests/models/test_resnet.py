"""The ResNet of small images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec import models
from lowprec.errors import UsageError
from lowprec.models import ModelConfig
from lowprec.models.resnet import ResidualBlock
from lowprec.nn import linen
from lowprec.nn.outliers import COLLECTION, ENTRY

IMAGES = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32)
SMALL = ModelConfig("resnet", layers=1, width=4)


def positive(module, x):
    """Variables drawn without the compiling that `init` takes; variances are positive."""
    rng = np.random.default_rng(2)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    return jax.tree.map(lambda leaf: rng.uniform(0.1, 1, leaf.shape).astype(np.float32), shapes)


@pytest.mark.parametrize(("layers", "published"), [(3, 0.27), (5, 0.46), (7, 0.66), (9, 0.85), (18, 1.7)])
def test_the_published_numbers_of_parameters(layers, published):
    """He et al., arXiv 1512.03385, table 6, in millions, for CIFAR-10."""
    total = models.count_image_parameters(ModelConfig("resnet", layers=layers, width=16), 10, (32, 32, 3)).total
    assert total / 1e6 == pytest.approx(published, abs=0.05 if published > 1 else 0.005)


@pytest.mark.parametrize("kind", ["plain", "none"])
@pytest.mark.parametrize("layers", [1, 3])
def test_parameters_counted_from_the_config_are_those_of_the_model(layers, kind):
    config = ModelConfig("resnet", layers=layers, width=8, batch_norm=kind)
    shapes = jax.eval_shape(models.build(config, 7).init, jax.random.key(0), jnp.zeros((1, 9, 9, 2)))
    leaves = jax.tree_util.tree_leaves_with_path(shapes["params"])
    counts = models.count_image_parameters(config, 7, (9, 9, 2))
    assert counts.total == sum(int(np.prod(leaf.shape)) for _, leaf in leaves)
    names = [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]
    inner = [leaf for name, leaf in names if "stage" in name and "kernel" in name]
    assert counts.linear == sum(int(np.prod(leaf.shape)) for leaf in inner)
    assert len(inner) + 2 == 6 * layers + 2


def test_flops_as_xla_counts_them():
    """Forward products are a third of a training step. XLA leaves out the taps of padding, here at most a fifth."""
    config = ModelConfig("resnet", layers=1, width=16, batch_norm="none")
    model = models.build(config, 10)
    images = jnp.zeros((8, 32, 32, 3))
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    counted = jax.jit(model.apply).lower(params, images).compile().cost_analysis()["flops"]
    assert counted == pytest.approx(models.flops_per_image(config, 10, (32, 32, 3)) / 3 * 8, rel=0.1)


def test_a_block_whose_convolutions_give_nothing_is_its_shortcut():
    """Every second pixel, and new channels of zeros on both sides (option A)."""
    x = np.random.default_rng(1).uniform(size=(2, 5, 5, 4)).astype(np.float32)
    block = ResidualBlock(SMALL, 8, 2)
    variables = positive(block, x)
    params = {**variables["params"]}
    params["second"] = {**params["second"], "norm": jax.tree.map(jnp.zeros_like, params["second"]["norm"])}
    y = jax.jit(block.apply)({**variables, "params": params}, x)
    expected = np.zeros((2, 3, 3, 8), np.float32)
    expected[..., 2:6] = x[:, ::2, ::2]
    np.testing.assert_array_equal(y, expected)


def test_running_statistics_are_used_in_evaluation_and_changed_in_training():
    model = models.build(SMALL, 10)
    variables = positive(model, IMAGES)
    in_training = jax.jit(lambda images: model.apply(variables, images, mutable=["batch_stats"]))
    evaluated = jax.jit(lambda statistics, images: model.apply({**variables, **statistics}, images))
    _, changed = in_training(IMAGES)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), variables["batch_stats"], changed["batch_stats"])
    assert all(jax.tree.leaves(moved))
    # An image's logits do not depend on the others of its batch.
    repeated = jnp.broadcast_to(IMAGES[:1], IMAGES.shape)
    np.testing.assert_array_equal(evaluated(changed, repeated)[0], evaluated(changed, IMAGES)[0])
    assert jnp.max(jnp.abs(in_training(repeated)[0][0] - in_training(IMAGES)[0][0])) > 1e-3


def test_recipes_serve_its_convolutions_and_leave_the_first_and_the_last_layer():
    model = models.build(SMALL, 10)
    rules = linen.quantize(model, "int8_full").layers(IMAGES)
    assert [path for path, rule in rules.items() if rule.exact] == ["embed/conv", "head"]
    assert len(rules) == 8


def test_its_width_is_no_multiple_of_heads_which_it_has_not():
    assert models.build(ModelConfig("resnet", layers=1, width=3), 10).config.width == 3
    for name in ("llama", "unit_llama", "vit"):
        with pytest.raises(UsageError, match=r"model.width 6 does not give 2 heads of an even size; .* is 8"):
            ModelConfig(name, width=6, heads=2)


def test_each_block_notes_how_extreme_its_sum_is():
    """The residual stream of a block is what it hands to the next; it is not measured where nobody asks."""
    model = models.build(SMALL, 10)
    variables = positive(model, IMAGES)
    _, noted = jax.jit(lambda images: model.apply(variables, images, mutable=[COLLECTION]))(IMAGES)
    blocks = [f"stage{stage}_block0" for stage in range(3)]
    assert sorted(noted[COLLECTION]) == blocks
    # Blocks are unrolled: the last one gives the head its means.
    pick = lambda block, method: block.name == "stage2_block0"
    _, seen = jax.jit(lambda images: model.apply(variables, images, capture_intermediates=pick))(IMAGES)
    y = np.asarray(seen[COLLECTION]["stage2_block0"]["__call__"][0], np.float64)
    found = noted[COLLECTION]["stage2_block0"][ENTRY]
    assert float(found["residual_infinity_norm"]) == pytest.approx(np.abs(y).max((1, 2, 3)).mean(), rel=1e-5)
    fourth = ((y - y.mean()) ** 4).mean() / y.var() ** 2
    assert float(found["residual_kurtosis"]) == pytest.approx(fourth, rel=1e-4)
    assert COLLECTION not in model.apply(variables, IMAGES, mutable=["batch_stats"])[1]
