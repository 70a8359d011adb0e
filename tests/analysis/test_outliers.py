"""Outliers: the numbers on tensors whose answer is known, out of models, and from runs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lowprec import models
from lowprec.analysis.outliers import draw_outliers, outlier_curve
from lowprec.analysis.positions import shift_change
from lowprec.analysis.runs import read_run
from lowprec.models import ModelConfig
from lowprec.models.llama import Block
from lowprec.nn import linen
from lowprec.nn.outliers import COLLECTION, infinity_norm, kurtosis, sink_rate, sparsity
from lowprec.ops import KEEP
from lowprec.ops.saved import Recompute
from lowprec.recipes import Recipe
from lowprec.training.outliers import Outliers

CAUSAL = jnp.tril(jnp.ones((8, 8), bool))


def test_kurtosis_is_that_of_statistics_and_survives_large_values():
    x = np.random.default_rng(0).standard_t(5, (4, 500)).astype(np.float32)
    expected = stats.kurtosis(x.astype(np.float64), axis=None, fisher=False)
    for scale in (1.0, 1e-12, 1e12):
        np.testing.assert_allclose(kurtosis(jnp.float32(x * scale)), expected, rtol=1e-4)
    one = jnp.zeros(1000).at[3].set(7.0)
    np.testing.assert_allclose(kurtosis(one), 1000 - 2 + 1 / 999, rtol=1e-4)  # (1 - 3p + 3p²) / (p (1 - p)), p = 1/1000
    assert kurtosis(jnp.full((2, 3), 5.0)) == 0


def test_the_infinity_norm_is_a_mean_over_sequences():
    x = jnp.array([[[1.0, -4.0], [2.0, 0.0]], [[0.5, 0.0], [0.0, -1.0]]])
    assert infinity_norm(x) == 2.5
    assert infinity_norm(x.astype(jnp.bfloat16)) == 2.5


def test_sinks_are_heads_whose_queries_look_at_the_first_token_on_average():
    uniform = jnp.where(CAUSAL, 1 / jnp.sum(CAUSAL, axis=-1, keepdims=True), 0)  # 0.34 on the first token
    diagonal = jnp.eye(8)  # 1/8
    first = jnp.zeros((8, 8)).at[:, 0].set(1.0)
    weight = jnp.stack([jnp.stack([uniform, diagonal]), jnp.stack([first, diagonal])])  # 2 sequences, 2 heads
    assert sink_rate(weight, CAUSAL) == 0.5
    assert sink_rate(weight, CAUSAL, threshold=0.35) == 0.25
    assert sink_rate(weight, CAUSAL, threshold=0.1) == 1.0


def test_the_first_token_is_the_first_that_a_query_may_see():
    """Two documents of four tokens; all attention of the second goes to its own first token."""
    allowed = CAUSAL & (jnp.arange(8)[:, None] // 4 == jnp.arange(8) // 4)
    weight = jnp.zeros((1, 8, 8)).at[:, 4:, 4].set(1.0)  # nothing in the first document
    assert sink_rate(weight, allowed[None], threshold=0.49) == 1.0
    assert sink_rate(weight, allowed[None], threshold=0.51) == 0.0


def test_sparsity_counts_what_is_allowed():
    weight = jnp.where(CAUSAL, 1.0, 0.0).at[7, :4].set(0.0)
    np.testing.assert_allclose(sparsity(weight[None], CAUSAL), 4 / 36, rtol=1e-6)


CONFIG = ModelConfig(layers=3, width=32, heads=4, kv_heads=2, attention="softpick")
TOKENS = jax.random.randint(jax.random.key(0), (2, 12), 0, 16)


def parameters(model):
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(1), TOKENS))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.float32(0.3 * rng.standard_normal(leaf.shape)), shapes)


@pytest.fixture(scope="module")
def plain():
    model = models.build(CONFIG, 16)
    return model, parameters(model)


def observed(model, params):
    y, noted = jax.jit(lambda p: model.apply({"params": p}, TOKENS, mutable=[COLLECTION]))(params)
    return y, Outliers.from_observations(noted[COLLECTION])


def test_every_layer_of_a_stack_tells_of_its_own_activations(plain):
    model, params = plain
    logits, found = observed(model, params)
    np.testing.assert_allclose(logits, model.apply({"params": params}, TOKENS), rtol=1e-5, atol=1e-6)
    x = params["embed"]["embedding"][TOKENS]
    for i in range(3):
        layer = {"params": jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])}
        x, inside = Block(CONFIG).apply(layer, x, capture_intermediates=True, mutable=[COLLECTION])
        attention = inside[COLLECTION]["attention"]["__call__"][0]
        for path, name, values in ((f"layers/{i}", "residual", x), (f"layers/{i}/attention", "attention", attention)):
            numbers = found.layers[path]
            assert numbers[f"{name}_kurtosis"] == pytest.approx(
                stats.kurtosis(np.float64(values), axis=None, fisher=False), rel=1e-4
            )
            assert numbers[f"{name}_infinity_norm"] == pytest.approx(np.abs(values).max((1, 2)).mean(), rel=1e-5)
        assert 0 < found.layers[f"layers/{i}/attention"]["sparsity"] < 1  # softpick: scores below 0
    assert len(found.layers) == 6


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("runs", {"layers/1/.*": KEEP, ".*": KEEP}),
        Recipe("saved", {".*": KEEP}, saved={"layers/.*/attention/core": Recompute()}),
    ],
    ids=str,
)
def test_recipes_do_not_stand_in_the_way(plain, recipe):
    model, params = plain
    _, found = observed(linen.quantize(model, recipe), params)
    _, expected = observed(model, params)
    assert found.layers.keys() == expected.layers.keys()
    for path, numbers in found.layers.items():
        assert numbers == pytest.approx(expected.layers[path], rel=1e-4)


def test_nothing_is_computed_where_nobody_asks(plain):
    model, params = plain
    program = lambda **options: str(jax.make_jaxpr(lambda p: model.apply({"params": p}, TOKENS, **options))(params))
    assert "argmax" in program(mutable=[COLLECTION]) and "argmax" not in program()
    assert set(jax.eval_shape(lambda: model.init(jax.random.key(1), TOKENS))) == {"params"}


def test_metrics_are_means_and_largest_values():
    found = Outliers({"a": {"sink_rate": 0.25, "sparsity": 0.5}, "b": {"sink_rate": 0.75}, "c": {"kurtosis": np.inf}})
    line = json.loads(json.dumps(found.metrics(), allow_nan=False))["outliers"]
    assert line["mean"] == {"sink_rate": 0.5, "sparsity": 0.5, "kurtosis": None}
    assert line["max"] == {"sink_rate": 0.75, "sparsity": 0.5, "kurtosis": None}
    assert line["layers"]["b"] == {"sink_rate": 0.75}
    assert Outliers({}).metrics() == {}


def test_curves_of_a_run_are_those_of_its_evaluations(tmp_path):
    numbers = {"mean": {"sink_rate": 0.5}, "max": {"sink_rate": 1.0}}
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "outliers": numbers}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(tmp_path)
    assert outlier_curve(run, "sink_rate") == [(2, 0.5)]
    assert outlier_curve(run, "sink_rate", "max") == [(2, 1.0)]
    draw_outliers([run], tmp_path / "outliers.png", ["softpick"])
    assert (tmp_path / "outliers.png").stat().st_size > 10_000
    (tmp_path / "metrics.jsonl").write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(ValueError, match=r"eval\.outliers=true"):
        draw_outliers([read_run(tmp_path)], tmp_path / "none.png")


@pytest.mark.parametrize(("shift", "change"), [(1, 0.0036), (16, 0.0046), (100, 0.0046), (256, 0.0046), (5000, 0.0046)])
def test_rotations_in_bfloat16_depend_on_where_they_are(shift, change):
    """From the anchor paper's set-up, d = 128, 64 apart. It varies by 5 % from shift to shift; the error of this
    estimate is 1.1 %."""
    assert shift_change(shift, jnp.bfloat16) == pytest.approx(change, rel=0.08)


@pytest.mark.parametrize("shift", [1, 16, 64])
def test_rotations_in_float32_do_not(shift):
    assert shift_change(shift) < 1e-6


def test_nor_does_no_shift_at_all():
    assert shift_change(0, jnp.bfloat16) == 0
