"""The low-rank bridge: by singular values at its start, by its schedule on the way, bit for bit gone at its end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec import models
from lowprec.errors import UsageError
from lowprec.formats.grammar import parse
from lowprec.models import ModelConfig
from lowprec.nn import linen
from lowprec.nn.rank_decay import halve_ranks
from lowprec.ops import GemmRule, ProductVariables, initial_variables, qdot
from lowprec.quantizers import EXACT, REUSE, AbsMax, Quantizer
from lowprec.quantizers.learned_rules import LearnedStep
from lowprec.quantizers.rank_decay import RankDecay
from lowprec.recipes.recipe import everywhere

W = jax.random.normal(jax.random.key(0), (24, 16))
X = jax.random.normal(jax.random.key(1), (5, 24))
INT3 = parse("int3@row")
INNER = {"absmax": AbsMax(), "learned": LearnedStep("max")}


def at(steps):
    return {"rank_steps": jnp.float32(steps)}


def quantized(rule, params, steps):
    return jax.jit(lambda p, s: rule.quantize(W, INT3, -2, p, s, None)[0])(params, at(steps))


@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
@pytest.mark.parametrize("rank", [2, 8, 32])
def test_at_the_start_the_first_part_of_the_error_is_gone(inner, rank):
    """What is left are the singular values from the rank on (Eckart and Young); 16 is all of them."""
    rule = RankDecay(rank, 10, inner)
    params = rule.initial_params(W, INT3, -2)
    alone = np.asarray(quantized(rule, params, 10**4), np.float64)
    singular = np.linalg.svd(np.asarray(W, np.float64) - alone, compute_uv=False)
    error = np.asarray(W, np.float64) - np.asarray(quantized(rule, params, 0), np.float64)
    np.testing.assert_allclose(
        np.linalg.svd(error, compute_uv=False)[: max(16 - rank, 1)], singular[rank:] if rank < 16 else [0], atol=1e-5
    )
    assert params["left"].shape == (24, min(rank, 16))


def test_half_of_the_columns_falls_by_a_cosine_and_the_rank_is_halved():
    rule = RankDecay(8, 10)
    expected = {
        0: [1] * 8,
        5: [1] * 4 + [0.5] * 4,
        10: [1] * 4 + [0] * 4,
        15: [1] * 2 + [0.5] * 2 + [0] * 4,
        20: [1] * 2 + [0] * 6,
        25: [1, 0.5] + [0] * 6,
        30: [0] * 8,
        99: [0] * 8,
    }
    for steps, alpha in expected.items():
        np.testing.assert_allclose(rule.alpha(jnp.float32(steps), 8), alpha, atol=1e-6)
    assert rule.steps == 30
    quarter = rule.alpha(jnp.float32(2.5), 8)[-1]
    np.testing.assert_allclose(quarter, 0.5 * (1 + np.cos(np.pi / 4)), rtol=1e-6)


def test_what_is_left_of_a_phase_is_turned_to_its_singular_vectors():
    rule = RankDecay(8, 10)
    random = jax.random.normal(jax.random.key(2), (3, 24, 8)), jax.random.normal(jax.random.key(3), (3, 8, 16))
    params = {"step": jnp.ones(16), "left": random[0], "right": random[1]}
    after = jax.jit(rule.halved)(params, at(10))
    kept = np.asarray(random[0], np.float64)[..., :4] @ np.asarray(random[1], np.float64)[:, :4]
    product = np.asarray(after["left"] @ after["right"], np.float64)
    np.testing.assert_allclose(product, kept, atol=2e-5)
    for layer in range(3):
        u, s, v = np.linalg.svd(kept[layer])
        best = (u[:, :2] * s[:2]) @ v[:2]
        found = after["left"][layer, :, :2] @ after["right"][layer, :2]
        np.testing.assert_allclose(found, best, atol=2e-5)  # half of the columns are the best half
    assert not np.allclose(random[0][0, :, :2] @ random[1][0, :2], best, atol=0.1)
    for steps in (0, 9, 11):
        jax.tree.map(np.testing.assert_array_equal, rule.halved(params, at(steps)), params)


def test_the_end_of_a_phase_moves_no_weight():
    """α of the columns that go is 0 by then: the forward weights before and after the turn are the same."""
    rule = RankDecay(8, 10, AbsMax())
    params = rule.initial_params(W, INT3, -2)
    before = quantized(rule, params, 10)
    after = quantized(rule, rule.halved(params, at(10)), 10)
    np.testing.assert_allclose(before, after, atol=1e-5)


@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
def test_at_the_end_the_product_and_its_gradients_are_those_without_a_bridge(inner):
    rule, plain = (
        GemmRule(fwd=(EXACT, Quantizer("int3@row", scale=scale)), dgrad=(EXACT, REUSE))
        for scale in (RankDecay(4, 5, inner), inner)
    )
    bridged, alone = (initial_variables(X, W, r) for r in (rule, plain))

    def run(rule, variables):
        def product(x, w, params):
            return qdot(x, w, rule, variables=ProductVariables(params, variables.state))

        y, pullback = jax.vjp(product, X, W, variables.params)
        return y, *pullback(jnp.cos(y))

    ended = bridged._replace(state={"fwd.w": at(10)})
    y, dx, dw, dparams = jax.jit(lambda: run(rule, ended))()
    expected = jax.jit(lambda: run(plain, alone))()
    for found, value in zip((y, dx, dw), expected, strict=False):
        np.testing.assert_array_equal(found, value)
    assert not np.any(dparams["fwd.w"]["left"]) and not np.any(dparams["fwd.w"]["right"])
    for name, value in expected[3].get("fwd.w", {}).items():
        np.testing.assert_array_equal(dparams["fwd.w"][name], value)
    started = jax.jit(lambda: run(rule, bridged))()
    assert np.any(started[0] != y) and np.any(started[3]["fwd.w"]["left"])


def test_the_bridge_is_differentiated_as_a_product():
    rule = RankDecay(4, 10, AbsMax())
    params = rule.initial_params(W, INT3, -2)
    cotangent = jax.random.normal(jax.random.key(5), W.shape)
    _, pullback = jax.vjp(lambda w, p: rule.quantize(w, INT3, -2, p, at(5), None)[0], W, params)
    dw, dparams = pullback(cotangent)
    alpha = np.array([1, 1, 0.5, 0.5])
    g = np.asarray(cotangent, np.float64)
    np.testing.assert_array_equal(dw, cotangent)
    np.testing.assert_allclose(dparams["left"], g @ np.asarray(params["right"]).T * alpha, atol=1e-5)
    np.testing.assert_allclose(dparams["right"], alpha[:, None] * (np.asarray(params["left"]).T @ g), atol=1e-5)


@pytest.mark.unoptimized
def test_the_bridges_of_a_stack_are_halved_layer_by_layer():
    """Through the training collections: counted by the state of the quantizers, turned in each layer of the stack."""
    scale = RankDecay(4, 2, AbsMax())
    gemm = GemmRule(fwd=(EXACT, Quantizer("int3@row", scale=scale)), dgrad=(EXACT, REUSE))
    recipe = everywhere("bridged", gemm)
    model = linen.quantize(models.build(ModelConfig(layers=2, width=16, heads=2, mlp_width=24), 11), recipe)
    tokens = jnp.zeros((1, 4), jnp.int32)
    variables = jax.jit(model.init)({"params": jax.random.key(0)}, tokens)
    up = lambda tree: tree["layers"]["0:2"]["mlp"]["up"]["fwd.w"]
    assert up(variables["quant_params"])["left"].shape == (2, 16, 4)
    quant, learned = variables["quant"], variables["quant_params"]
    seen = jax.tree.map(lambda leaf: jnp.ones((*leaf.shape, 1)), quant)
    slots = jax.tree_util.tree_map(lambda node: node["rank_steps"], seen, is_leaf=lambda n: "rank_steps" in n)
    changed = []
    for _ in range(4):
        quant = model.next_state(quant, slots)
        after = jax.jit(halve_ranks, static_argnums=0)(recipe, learned, quant)
        changed.append(bool(jnp.any(up(after)["left"] != up(learned)["left"])))
        learned = after
    assert changed == [False, True, False, True]
    np.testing.assert_array_equal(up(quant)["rank_steps"], [4, 4])
    ended = {**variables, "quant": quant, "quant_params": learned}
    plain = GemmRule(fwd=(EXACT, Quantizer("int3@row")), dgrad=(EXACT, REUSE))
    alone = linen.quantize(model.module, everywhere("alone", plain))
    found, expected = (
        jax.jit(m.apply)(v, tokens) for m, v in ((model, ended), (alone, {"params": variables["params"]}))
    )
    np.testing.assert_array_equal(found, expected)


def test_a_rank_below_two_is_refused():
    with pytest.raises(UsageError, match="a rank decays from 2 or more"):
        RankDecay(1)
