"""Attention of a Llama with other weights, gates, masks and positions: against dense references, under recipes."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowprec import models, recipes
from lowprec.models import ModelConfig
from lowprec.nn import linen
from lowprec.nn.attention import grouped_attention
from lowprec.nn.attention_gate import HeadGate
from lowprec.nn.attention_mask import document_mask
from lowprec.nn.attention_weights import softpick
from lowprec.ops import KEEP
from lowprec.ops.saved import Recompute
from lowprec.recipes import Recipe

VOCABULARY, SEPARATOR = 16, 0
CONFIG = ModelConfig(layers=2, width=32, heads=4, kv_heads=2)
# Three documents: 0 … 4 (without a separator before it), 5 … 9 and 10 … 15.
TOKENS = jax.random.randint(jax.random.key(0), (2, 16), 1, VOCABULARY).at[:, jnp.array([5, 10])].set(SEPARATOR)
VARIANTS = {
    "clipped": {"attention": "clipped", "attention_clip": 2.0},
    "softpick": {"attention": "softpick"},
    "gated": {"gate": "linear"},
    "gated by an mlp": {"gate": "mlp"},
    "bf16 positions": {"rotary_dtype": "bfloat16"},
    "separate documents": {"documents": "separate", "separator": SEPARATOR},
    "anchor": {"documents": "anchor", "separator": SEPARATOR},
    "all": {"attention": "softpick", "gate": "linear", "documents": "anchor", "separator": SEPARATOR},
}


def model_of(**fields):
    return models.build(replace(CONFIG, **fields), VOCABULARY)


# Compiling takes nearly all of the time of models this small.
compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def initial(model, tokens=TOKENS, std=0.05):
    """Parameters of a model, without the cost of compiling its own."""
    rng = np.random.default_rng(0)

    def make(path, leaf):
        values = {"kernel": lambda: std * rng.standard_normal(leaf.shape), "scale": lambda: np.ones(leaf.shape)}
        values |= {"embedding": values["kernel"], "bias": lambda: np.zeros(leaf.shape)}
        return jnp.float32(values[path[-1].key]())

    shapes = jax.eval_shape(lambda: model.init(jax.random.key(1), tokens))
    return jax.tree_util.tree_map_with_path(make, shapes)


@pytest.mark.parametrize("anchor", [False, True])
def test_masks_of_documents_are_those_of_the_definition(anchor):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 4, (6, 24))
    found = document_mask(jnp.array(tokens), 3, anchor=anchor)
    for row, mask in zip(tokens, np.asarray(found), strict=True):
        for t in range(24):
            for s in range(24):
                same_document = not (row[s + 1 : t + 1] == 3).any()
                assert mask[t, s] == (s <= t and (same_document or (anchor and s == 0)))


@pytest.mark.parametrize("anchor", [False, True])
def test_masked_attention_is_dense_attention_over_what_is_allowed(anchor):
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 16, h, 8)) for i, h in enumerate((4, 2, 2)))
    found = grouped_attention(q, k, v, mask=document_mask(TOKENS, SEPARATOR, anchor=anchor))
    for b in range(2):
        for t in range(16):
            start = 5 * min(t // 5, 2)
            seen = sorted({*range(start, t + 1), *([0] if anchor else [])})
            for h in range(4):
                scores = np.asarray(k, np.float64)[b, seen, h // 2] @ np.asarray(q, np.float64)[b, t, h] / 8**0.5
                weight = np.exp(scores) / np.exp(scores).sum()
                np.testing.assert_allclose(found[b, t, h], weight @ np.asarray(v)[b, seen, h // 2], atol=2e-6)


@pytest.mark.parametrize(("documents", "reached"), [("packed", 11), ("separate", 0), ("anchor", 0)])
def test_no_output_of_a_document_depends_on_another(documents, reached):
    """Tokens 6 … 9 are of the second document; `reached` outputs of other documents change with them."""
    model = model_of(documents=documents, separator=SEPARATOR)
    variables = initial(model)
    apply = compiled(model.apply)
    changed = TOKENS.at[:, 6:10].set(1 + TOKENS[:, 6:10] % (VOCABULARY - 1))
    differs = np.any(np.asarray(apply(variables, TOKENS) != apply(variables, changed)), axis=(0, 2))
    assert differs[6:10].all() and not differs[:6].any()
    assert differs[10:].sum() == min(reached, 6)


def test_the_anchor_reaches_every_document_and_the_rest_of_its_document_does_not():
    model = model_of(documents="anchor", separator=SEPARATOR)
    variables, apply = initial(model), compiled(model.apply)
    differs = lambda changed: np.any(np.asarray(apply(variables, TOKENS) != apply(variables, changed)), axis=(0, 2))
    other = lambda at: TOKENS.at[:, at].set(1 + TOKENS[:, at] % (VOCABULARY - 1))
    assert differs(other(0)).all()
    assert differs(other(2)).tolist() == [2 <= t < 5 for t in range(16)]


def test_documents_need_their_separator():
    for separator in (-1, VOCABULARY):
        with pytest.raises(ValueError, match=r"model.separator in 0 … 15"):
            initial(model_of(documents="anchor", separator=separator))


def test_a_head_is_gated_by_its_own_part_of_the_input():
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 8))
    for hidden in (0, 2):
        gate = HeadGate(hidden, init_std=0.5)
        params = gate.init(jax.random.key(1), x)["params"]
        found = gate.apply({"params": params}, x)
        for h in range(3):
            y = np.asarray(x, np.float64)[:, :, h]
            if hidden:
                y = np.maximum(y @ params["hidden"]["kernel"][h] + params["hidden"]["bias"][h], 0)
            y = y @ params["out"]["kernel"][h] + params["out"]["bias"][h]
            np.testing.assert_allclose(found[..., h], 1 / (1 + np.exp(-y[..., 0])), atol=1e-6)
        np.testing.assert_allclose(gate.apply({"params": params}, 0 * x), 0.25, atol=1e-6)  # σ(logit ¼)


def test_a_closed_gate_silences_its_head_and_an_open_one_changes_nothing():
    gated, plain = model_of(gate="linear"), model_of()
    params = initial(gated)["params"]
    bare = {**params, "layers": {**params["layers"]}}
    bare["layers"]["attention"] = {k: v for k, v in params["layers"]["attention"].items() if k != "head_gate"}
    expected = compiled(plain.apply)({"params": bare}, TOKENS)

    apply = compiled(gated.apply)

    def gates_at(bias):
        gate = params["layers"]["attention"]["head_gate"]["out"]
        gate = {"kernel": 0 * gate["kernel"], "bias": 0 * gate["bias"] + bias}
        attention = {**params["layers"]["attention"], "head_gate": {"out": gate}}
        return apply({"params": {**params, "layers": {**params["layers"], "attention": attention}}}, TOKENS)

    np.testing.assert_allclose(gates_at(40.0), expected, rtol=1e-5, atol=1e-6)
    silent = jax.tree.map(jnp.zeros_like, bare["layers"]["attention"]["value"])
    bare["layers"]["attention"] = {**bare["layers"]["attention"], "value": silent}
    np.testing.assert_allclose(gates_at(-200.0), compiled(plain.apply)({"params": bare}, TOKENS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_parameters_counted_from_the_config_are_those_of_the_model(fields):
    shapes = jax.eval_shape(lambda: model_of(**fields).init(jax.random.key(0), TOKENS))
    total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    counts = models.count_parameters(replace(CONFIG, **fields), VOCABULARY)
    assert counts.total == total
    kernels = sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes["params"]["layers"])
        if path[-1].key == "kernel"
    )
    assert counts.linear == kernels


def test_a_recipe_reaches_the_gate_and_leaves_it():
    layers = lambda recipe: linen.quantize(model_of(gate="mlp"), recipe).layers(TOKENS)
    gates = {f"layers/{i}/attention/head_gate/{part}" for i in (0, 1) for part in ("hidden", "out")}
    assert gates <= set(layers("int8"))
    assert not any(layers("int8")[path].exact for path in gates)
    kept = Recipe("kept", {"head|.*/(scores|context|head_gate/.*)": KEEP, ".*": recipes.get("int8").rule_for("x")})
    assert all(layers(kept)[path].exact for path in gates)


SAVED = Recipe("saved", {".*": KEEP}, saved={"layers/.*/attention/core": Recompute()})


@pytest.mark.parametrize("fields", [VARIANTS["clipped"], VARIANTS["all"]], ids=["clipped", "all"])
def test_saved_inputs_of_every_kind_of_attention_give_the_plain_gradient(fields):
    plain = model_of(**fields)
    saved = linen.quantize(plain, SAVED)
    variables = initial(plain)
    gradient = lambda m: compiled(jax.grad(lambda v: jnp.mean(m.apply(v, TOKENS) ** 2)))(variables)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-8), gradient(saved), gradient(plain))


@pytest.mark.parametrize("fields", [VARIANTS["clipped"], VARIANTS["all"]], ids=["clipped", "all"])
def test_recipes_take_the_products_of_every_kind_of_attention(fields):
    """8 bits a row: relative errors of 1/127 at most in each operand."""
    rule = recipes.parse("fwd=int8@row dgrad=bf16 wgrad=bf16").rule_for("x")
    plain = models.build(replace(CONFIG, **fields, layers=1), VOCABULARY)
    quantized = linen.quantize(plain, Recipe("attention", {".*/(scores|context)": rule, ".*": KEEP}))
    variables = initial(plain, std=0.3)
    exact, rounded = (compiled(m.apply)(variables, TOKENS) for m in (plain, quantized))
    assert 1e-4 < float(jnp.linalg.norm(exact - rounded) / jnp.linalg.norm(exact)) < 0.03


@pytest.mark.parametrize("fields", [{}, *VARIANTS.values()], ids=["plain", *VARIANTS])
def test_twenty_steps_lower_the_loss(fields):
    """Counting upwards, from one number modulo 15 to the next, with separators where documents want them."""
    model = model_of(**fields, layers=1)
    start = jnp.arange(8)[:, None]
    tokens = (1 + (start + jnp.arange(17)) % (VOCABULARY - 1)).at[:, 8].set(SEPARATOR)
    optimizer = optax.adam(1e-2)

    def loss(variables):
        logits = model.apply(variables, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @compiled
    def train(variables):
        def step(carry, _):
            variables, state = carry
            value, gradient = jax.value_and_grad(loss)(variables)
            updates, state = optimizer.update(gradient, state)
            query = gradient["params"]["layers"]["attention"]["query"]["kernel"]
            return (optax.apply_updates(variables, updates), state), (value, jnp.linalg.norm(query))

        return jax.lax.scan(step, (variables, optimizer.init(variables)), length=20)[1]

    losses, query_gradients = train(initial(model, tokens[:, :-1], std=0.02))
    assert float(losses[0]) == pytest.approx(np.log(VOCABULARY), rel=0.02)
    assert losses[-1] < 0.7 * losses[0]
    assert query_gradients[-1] > 1e-4


def test_softpick_in_a_model_is_softpick_of_its_scores():
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 6, 2, 8)) for i in range(3))
    found = grouped_attention(q, k, v, weights=softpick)
    scores = np.einsum("bthk,bshk->bhts", q, k) / 8**0.5
    e = np.tril(np.exp(np.asarray(scores, np.float64)) - 1)
    weight = np.maximum(e, 0) / (np.abs(e).sum(-1, keepdims=True) + 1e-8)
    np.testing.assert_allclose(found, np.einsum("bhts,bshk->bthk", weight, v), atol=2e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention": "softpic"}, "unknown model.attention 'softpic'; did you mean softpick"),
        ({"gate": "lineal"}, "unknown model.gate 'lineal'; did you mean linear"),
        ({"documents": "anchors"}, "unknown model.documents 'anchors'; did you mean anchor"),
        ({"rotary_dtype": "float16"}, "model.rotary_dtype is float32 or bfloat16"),
        ({"attention_clip": -1.0}, "model.attention_clip is at least 0"),
        ({"name": "unit_llama", "gate": "mlp"}, "model.gate='mlp' is for llama, not for unit_llama"),
    ],
)
def test_what_does_not_exist_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**fields)
