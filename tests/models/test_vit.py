"""The vision transformer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec import models
from lowprec.errors import UsageError
from lowprec.models import ModelConfig, vit
from lowprec.models.vit import EncoderBlock, positions
from lowprec.nn import linen
from lowprec.nn.outliers import COLLECTION, ENTRY

CONFIG = ModelConfig("vit", layers=2, width=16, heads=2, patch=2)
IMAGES = np.random.default_rng(0).normal(size=(3, 8, 8, 2)).astype(np.float32)
MODEL = models.build(CONFIG, 10)


@pytest.fixture(scope="module")
def variables():
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), IMAGES)
    return jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(np.float32), shapes)


def test_parameters_counted_from_the_config_are_those_of_the_model():
    for config, shape in (
        (CONFIG, (8, 8, 2)),
        (ModelConfig("vit", layers=3, width=12, patch=3, mlp_width=20), (9, 7, 1)),
    ):
        shapes = jax.eval_shape(models.build(config, 5).init, jax.random.key(0), jnp.zeros((1, *shape)))
        total = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))
        assert models.count_image_parameters(config, 5, shape).total == total


@pytest.mark.parametrize(("layers", "width", "heads", "published"), [(12, 768, 12, 86), (24, 1024, 16, 307)])
def test_the_published_numbers_of_parameters(layers, width, heads, published):
    """ViT-B/16 and ViT-L/16 at 224 pixels, arXiv 2010.11929, table 1, in millions; with 1000 classes."""
    config = ModelConfig("vit", layers=layers, width=width, heads=heads, patch=16)
    total = models.count_image_parameters(config, 1000, (224, 224, 3)).total
    # The class token, of which there is none here, is 0.001 of these; the head of 1000 classes is not in the table.
    assert (total - 1001 * width) / 1e6 == pytest.approx(published, rel=0.015)


def test_every_patch_sees_every_patch(variables):
    block, x = EncoderBlock(CONFIG), np.random.default_rng(2).normal(size=(1, 5, 16)).astype(np.float32)
    inside = jax.tree.map(lambda leaf: leaf[0], variables["params"]["layers"])
    seen = jax.jit(jax.jacobian(lambda x: block.apply({"params": inside}, x)[0, :, 0]))(x)
    assert jnp.all(jnp.abs(seen).sum((1, 3)) > 0)


def test_positions_tell_patches_apart():
    """The nearest two are neighbours; each row and column turns at its own rates, from 1 to 1/10000."""
    table = positions(3, 5, 8)
    np.testing.assert_allclose(table[2, 3], [np.sin(3), np.sin(3e-4), np.cos(3), np.cos(3e-4),
                                             np.sin(2), np.sin(2e-4), np.cos(2), np.cos(2e-4)], rtol=1e-6)  # fmt: skip
    flat = table.reshape(15, 8)
    distances = np.linalg.norm(flat[:, None] - flat[None], axis=-1) + 9 * np.eye(15)
    assert distances.min() > 0.5
    with pytest.raises(UsageError, match=r"model.width of a vit is a multiple of 4"):
        positions(3, 5, 10)


def test_the_order_of_patches_matters_through_their_positions_alone(variables, monkeypatch):
    shuffle = lambda images: images.reshape(3, 4, 2, 4, 2, 2)[:, ::-1, :, [2, 0, 3, 1]].reshape(IMAGES.shape)
    logits = lambda images: jax.jit(lambda images: MODEL.apply(variables, images))(images)
    assert jnp.max(jnp.abs(logits(shuffle(IMAGES)) - logits(IMAGES))) > 1e-3
    monkeypatch.setattr(vit, "positions", lambda height, width, features: np.zeros((height, width, features)))
    np.testing.assert_allclose(logits(shuffle(IMAGES)), logits(IMAGES), rtol=0, atol=1e-5)


def test_recipes_serve_all_products_between_the_first_layer_and_the_head():
    rules = linen.quantize(MODEL, "int8_full").layers(IMAGES)
    served = {path.split("/", 2)[-1] for path, rule in rules.items() if not rule.exact}
    assert served == {"attention/query", "attention/key", "attention/value", "attention/out", "up", "down"}
    attention = linen.quantize(MODEL, "bf16").layers(IMAGES)
    assert {path for path, rule in attention.items() if rule.exact} == {
        f"layers/{i}/attention/{name}" for i in range(2) for name in ("scores", "context")
    }


def test_each_layer_notes_how_extreme_its_sum_and_its_attention_are(variables):
    _, noted = jax.jit(lambda images: MODEL.apply(variables, images, mutable=[COLLECTION]))(IMAGES)
    found = noted[COLLECTION]["layers"]["0:2"][ENTRY]
    assert set(found) == {f"{name}_{number}" for name in ("residual", "attention")
                          for number in ("kurtosis", "infinity_norm")}  # fmt: skip
    # Layer by layer, and the last one's sum is what the final norm is given.
    seen = {}

    def spy(next_function, args, kwargs, context):
        if context.module.name == "final_norm":
            seen["x"] = np.asarray(args[0])
        return next_function(*args, **kwargs)

    with nn.intercept_methods(spy):
        MODEL.apply(variables, IMAGES)
    largest = np.abs(seen["x"]).max((1, 2)).mean()
    np.testing.assert_allclose(found["residual_infinity_norm"][1], largest, rtol=1e-5)
    assert all(leaf.shape == (2,) and np.all(leaf > 0) for leaf in found.values())
