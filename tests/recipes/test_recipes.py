"""Recipes: the registry, the rules on layer paths, the short text form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowprec import formats, recipes
from lowprec.ops import qdot
from lowprec.quantizers import gaussian_error, optimal_clip
from lowprec.recipes import EXACT, KEEP, REUSE, GemmRule, LayerRule, Quantizer, Recipe
from lowprec.recipes.library.qat import QUEST_REPO_CLIPS, quest

FOUNDATION = (
    *("f32", "bf16", "fp8", "fp8_block", "mxfp8", "int8", "int8_full"),
    *("nvfp4", "quartet2", "quest_4", "bitnet158"),
)


def test_the_named_recipes():
    assert set(FOUNDATION) <= set(recipes.names())
    assert all(recipes.get(name).name == name for name in recipes.names())


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_is_a_hashable_value_that_names_its_source(name):
    recipe = recipes.get(name)
    assert hash(recipe) == hash(recipes.parse(name))
    assert recipe.source


@pytest.mark.parametrize("name", recipes.names())
def test_the_description_names_every_format_and_rounding_in_it(name):
    recipe = recipes.get(name)
    text = recipe.describe()
    for rule in recipe.rules:
        for quantizer in rule.gemm.operands().values():
            if not rule.gemm.exact and quantizer.format is not None:
                assert str(quantizer.format) in text
                assert str(quantizer.rounding) in text
                assert str(quantizer.rotation or "") in text


def test_the_first_rule_that_matches_wins():
    fp8 = recipes.get("fp8").rules[-1].gemm
    recipe = Recipe("mine", {"head": KEEP, "layers/[01]/.*": KEEP, "layers/.*": fp8, ".*": KEEP})
    assert recipe.rule_for("layers/1/mlp/up") == KEEP
    assert recipe.rule_for("layers/11/mlp/up") == fp8
    assert recipe.rule_for("head") == KEEP


def test_a_layer_without_a_rule_is_an_error_that_names_the_patterns():
    recipe = Recipe("mine", {"layers/.*": KEEP})
    with pytest.raises(ValueError, match=r"'mine' has no rule for layer 'head' \(its patterns: 'layers/\.\*'\)"):
        recipe.rule_for("head")


@pytest.mark.parametrize("path", ["head", "lm_head", "embed", "decoder/embed_0", "head/attend"])
@pytest.mark.parametrize("name", ["fp8", "nvfp4", "quest_4"])
def test_embeddings_and_heads_stay_as_they_are(name, path):
    assert recipes.get(name).rule_for(path) == KEEP
    assert recipes.get(name).rule_for("ahead") != KEEP


def test_bad_patterns_and_empty_recipes():
    with pytest.raises(ValueError, match="not a regular expression"):
        LayerRule("layers/(", KEEP)
    with pytest.raises(ValueError, match="has no rule"):
        Recipe("empty", {})


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(ValueError, match="unknown recipe 'nvpf4'; did you mean nvfp4"):
        recipes.get("nvpf4")


def test_the_short_form_of_the_documentation():
    recipe = recipes.parse("fwd=int4@row dgrad=int8@row(stochastic) wgrad=bf16")
    gemm = recipe.rule_for("anything")
    assert gemm.fwd == (Quantizer("int4@row", pad=True),) * 2
    assert gemm.dgrad == (Quantizer("int8@row", rounding="stochastic", pad=True),) * 2
    assert gemm.wgrad == (Quantizer("bfloat16", pad=True),) * 2
    assert recipes.parse("fwd=mxfp4,int8@row").rule_for("x") == GemmRule(
        fwd=(Quantizer("mxfp4", pad=True), Quantizer("int8@row", pad=True))
    )


_FORMATS = st.sampled_from(
    ["int4@row", "nvfp4", "mxfp8", "bf16", "e4m3fn@1x128", "ternary@tensor/bf16", "int3_midrise@row"]
)
_ROUNDINGS = st.sampled_from(
    ["", "stochastic", "stochastic[8]", "toward_zero", "clip", "stochastic clip", "clamp[0.9] dge"]
)


@st.composite
def short_forms(draw):
    parts = []
    for product in draw(st.lists(st.sampled_from(["fwd", "dgrad", "wgrad"]), min_size=1, unique=True)):
        rotation = draw(st.sampled_from(["", "hadamard16", "hadamard32.random", "hadamard128.fixed"]))
        operands = []
        for _ in range(draw(st.integers(1, 2))):
            options = " ".join(filter(None, (rotation, draw(_ROUNDINGS))))
            operands.append(draw(_FORMATS) + (f"({options})" if options else ""))
        parts.append(f"{product}={','.join(operands)}")
    return " ".join(parts)


@settings(deadline=None, max_examples=200)
@given(short_forms())
def test_the_text_of_a_short_form_recipe_parses_back(text):
    recipe = recipes.parse(text)
    assert recipes.parse(str(recipe)) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fdw=int4", "unknown product in a recipe 'fdw'; did you mean fwd"),
        ("fwd=int4@rwo", "int4@r"),
        ("fwd=int4(stochastc)", "did you mean stochastic"),
        ("fwd=int4,int4,int4", "names 3 operands; a product has two, x and w"),
        ("fwd=int4 fwd=int8", "gives fwd twice"),
        ("fwd=nvfp4(hadamard12)", "power of two"),
        ("fwd=", "not an operand"),
        ("fwd=e4m3", "ambiguous"),
    ],
)
def test_errors_of_the_short_form(text, message):
    with pytest.raises(ValueError, match=message):
        recipes.parse(text)


def test_reuse_and_exact_in_the_short_form():
    gemm = recipes.parse("fwd=fp16 dgrad=exact,reuse wgrad=e5m2@tensor,exact").rule_for("x")
    assert gemm.dgrad == (EXACT, REUSE)
    assert gemm.wgrad[1] == EXACT


def test_bitnet_normalizes_its_input_and_differentiates_through():
    gemm = recipes.get("bitnet158").rule_for("x")
    x, w = jax.random.normal(jax.random.key(0), (8, 32)), jax.random.normal(jax.random.key(1), (32, 4))
    run = jax.jit(lambda x: qdot(x, w, gemm))
    np.testing.assert_allclose(
        run(x), run(2.0 * x), rtol=1e-4, atol=1e-5
    )  # invariant under the scale of x, up to epsilon
    # Euler: the gradient of a function of degree 0 is orthogonal to its argument, straight-through or not.
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(qdot(x, w, gemm) ** 2)))(x)
    assert float(jnp.max(jnp.abs(jnp.sum(gradient * x, axis=1)))) < 1e-3 * float(jnp.max(jnp.abs(gradient)))


def test_scales_and_estimators_of_the_short_form():
    gemm = recipes.parse("fwd=int3_midrise@row(hadamard128 rms trust) dgrad=exact,reuse wgrad=exact,reuse").rule_for(
        "x"
    )
    assert gemm == recipes.get("quest_3").rule_for("x")


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_clips_of_the_quest_repository_err_by_little(bits):
    """Up to five bits they are the best; from six on the squared error is larger, by less than .2 %."""
    fmt = f"int{bits}_midrise"
    top = formats.parse(fmt).max
    theirs, best = (gaussian_error(fmt, clip / top) for clip in (QUEST_REPO_CLIPS[bits - 1], optimal_clip(fmt)))
    assert 1 - 1e-6 <= theirs / best <= (1.002 if bits > 5 else 1 + 1e-6)
    operand = quest(bits, repo=True).rule_for("x").fwd[0]
    assert operand.scale.clip == QUEST_REPO_CLIPS[bits - 1]
