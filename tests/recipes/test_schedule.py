"""Schedules: their text, their stages, and what the words after a recipe do to it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowprec import recipes
from lowprec.errors import UsageError
from lowprec.quantizers.blend import Blend
from lowprec.recipes import EXACT, KEEP, REUSE, LayerRule, OuterLayers, Phase, Schedule, Span, parse_schedule
from lowprec.recipes.modifiers import blended

RECIPES = st.sampled_from(["bf16", "nvfp4", "bitnet158", "fwd=int4@row dgrad=int8@row(stochastic hadamard16.random)"])
SPANS = st.one_of(st.integers(1, 10**9).map(str), st.floats(0.01, 99.9).map(lambda p: f"{p:.3f}%"))


@st.composite
def schedules(draw):
    def recipe():
        words = [draw(RECIPES), draw(st.sampled_from(["", "forward only"]))]
        words.append(draw(st.sampled_from(["", "keeping first 1", "keeping last 3", "keeping first 2 last 1"])))
        return " ".join(filter(None, words))

    parts = [recipe()]
    for _ in range(draw(st.integers(0, 2))):
        ramp, reset = draw(st.sampled_from(["", f"over {draw(SPANS)}"])), draw(st.sampled_from(["", "reset"]))
        parts.append(" ".join(filter(None, (recipe(), f"at {draw(SPANS)}", ramp, reset))))
    if draw(st.booleans()):
        parts.append(f"{recipe()} when drowned")
    return " then ".join(parts)


@settings(deadline=None, max_examples=200)
@given(schedules())
def test_the_text_of_a_schedule_parses_back(text):
    schedule = parse_schedule(text)
    assert parse_schedule(str(schedule)) == schedule and hash(schedule) == hash(parse_schedule(str(schedule)))
    assert str(parse_schedule(str(schedule))) == str(schedule)


def test_spellings_of_one_schedule_are_one():
    assert str(parse_schedule("  bf16   then  bitnet158 at 40.0%  over 010% ")) == "bf16 then bitnet158 at 40% over 10%"


@pytest.mark.parametrize("name", ["nvfp4", "fwd=int4@row"])
def test_a_recipe_is_a_schedule_of_one_phase(name):
    recipe = recipes.parse(name)
    assert parse_schedule(recipe) == parse_schedule(name) == Schedule((Phase(recipe),))
    (stage,) = parse_schedule(recipe).stages(10, 3)
    assert stage.recipe == recipe and stage.start == 0
    assert str(parse_schedule(recipe)) == str(recipe)


def test_stages_begin_where_the_text_says():
    stages = parse_schedule("f32 then bf16 at 3 then bitnet158 at 40% over 25% reset then bf16 at 90%").stages(20, 2)
    assert [(stage.start, stage.reset, stage.continues) for stage in stages] == [
        (0, False, False), (3, False, False), (8, True, False), (13, False, True), (18, False, False),
    ]  # fmt: skip
    assert [str(stage.recipe) for stage in stages] == ["f32", "bf16", "bf16 to bitnet158", "bitnet158", "bf16"]
    late = parse_schedule("bf16 then bitnet158 at 90% over 50%").stages(20, 2)
    assert [stage.start for stage in late] == [0, 18]  # the ramp does not end within the run
    (_, tail) = parse_schedule("nvfp4 then bf16 when drowned").stages(20, 2)
    assert tail.start is None and tail.trigger == "drowned"


def test_a_ramp_blends_the_rules_of_the_same_layer():
    """bf16 rounds the head's operands too, BitNet does not touch it."""
    _, ramp, _ = parse_schedule("bf16 then bitnet158 at 2 over 5").stages(10, 2)
    before, after = recipes.get("bf16"), recipes.get("bitnet158")
    for path in ("layers/1/mlp/up", "head"):
        rule, first, last = (recipe.rule_for(path) for recipe in (ramp.recipe, before, after))
        assert [q.scale for q in rule.fwd] == [
            Blend(first.fwd[0], last.fwd[0], 5, False, last.normalize_input),
            Blend(first.fwd[1], last.fwd[1], 5),
        ]
        assert not rule.normalize_input
        assert rule.dgrad == (first.dgrad[0], REUSE) and rule.wgrad == (first.wgrad[0], REUSE)
    assert ramp.recipe.rule_for("layers/0/attention/scores") == KEEP


def test_forward_only_keeps_the_forward_pass_and_nothing_else():
    recipe, tail = recipes.get("fp4_all_the_way"), recipes.parse("fp4_all_the_way forward only")
    rule, exact = recipe.rule_for("layers/0/mlp/up"), tail.rule_for("layers/0/mlp/up")
    assert exact.fwd == rule.fwd and exact.dgrad == exact.wgrad == (EXACT, REUSE)
    assert recipe.stochastic and not tail.stochastic
    for name in recipes.names():
        assert recipes.parse(f"{name} forward only").rules[0].gemm.dgrad[0] == EXACT


@pytest.mark.parametrize(
    ("words", "kept"),
    [("first 1", {0}), ("last 2", {10, 11}), ("first 2 last 1", {0, 1, 11})],
)
def test_outer_layers_are_kept(words, kept):
    recipe = recipes.parse(f"nvfp4 keeping {words}")
    resolved, plain = recipe.for_layers(12), recipes.get("nvfp4")
    found = {i for i in range(12) if resolved.rule_for(f"layers/{i}/mlp/up") == KEEP}
    assert found == kept and str(resolved) == str(recipe)
    assert resolved.rule_for("layers/5/mlp/up") == plain.rule_for("layers/5/mlp/up")
    with pytest.raises(UsageError, match=r"say of how many, recipe\.for_layers\(12\)"):
        recipe.rule_for("layers/0/mlp/up")


def test_keeping_all_layers_is_refused():
    with pytest.raises(UsageError, match="leaves no layer to quantize in a model of 3; at most 2 can be kept"):
        recipes.parse("nvfp4 keeping first 1 last 2").for_layers(3)
    assert recipes.parse("nvfp4 keeping first 1 last 1").for_layers(3).rules[0] == LayerRule(
        r"(.*/)?layers/(0|2)/.*", KEEP
    )
    with pytest.raises(UsageError, match="at least one layer is kept"):
        OuterLayers()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bf16 thn bitnet158 at 40%", "'thn'; did you mean then"),
        ("bf16 then bitnet159 at 40%", "unknown recipe 'bitnet159'; did you mean bitnet158"),
        ("bf16 then bitnet158", "say when, e.g. 'then bitnet158 at 90%'"),
        ("bf16 then bitnet158 at 40 %", "unknown word of a recipe '%'"),
        ("bf16 then bitnet158 at dawn", "'dawn' is no part of a run; say 40%"),
        ("bf16 then bitnet158 at 140%", "between 0% and 100%, not 140%"),
        ("bf16 then bitnet158 at 0", "whole and at least 1, not 0"),
        ("bf16 then bitnet158 at 1.5", "whole and at least 1, not 1.5"),
        ("bf16 then bitnet158 at", "ends after 'at'; it goes on like 'at 40%'"),
        ("bf16 then bitnet158 over 10%", "'over' stands in the wrong place"),
        ("bf16 then bf16 when drownd", "unknown trigger of a phase 'drownd'; did you mean drowned"),
        ("nvfp4 then bf16 when drowned then f32 at 90%", "nothing can follow 'bf16 when drowned'"),
        ("bf16 at 10 then f32 at 20", "the first phase of a schedule begins with the run"),
        ("nvfp4 keping first 1", "'keping'; did you mean keeping"),
        ("nvfp4 keeping frist 1", "'frist'; did you mean first"),
        ("nvfp4 keeping", "at least one layer is kept"),
        ("nvfp4 keeping first", "ends after 'first'; it goes on like 'first 1'"),
        ("nvfp4 keeping last two", "takes a number of layers, not 'two'"),
        ("nvfp4 forward onyl", "'onyl'; did you mean only"),
        ("nvfp4 keeping last 1 forward only", "'forward' stands in the wrong place"),
    ],
)
def test_errors_name_the_culprit_and_the_nearest(text, message):
    with pytest.raises(UsageError) as error:
        parse_schedule(text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bf16 then f32 at 10", "begins after 10 steps, but the run ends after 10"),
        ("bf16 then f32 at 7 then bf16 at 70%", "'bf16 at 70%' begins after 7 steps, not after 'f32' (7)"),
        ("bf16 then bitnet158 at 2 over 5 then f32 at 6", "begins after 6 steps, not after 'bitnet158' (7)"),
        ("nvfp4 keeping first 2 then bf16 at 5", "leaves no layer"),
    ],
)
def test_what_does_not_fit_into_the_run_is_refused(text, message):
    with pytest.raises(UsageError) as error:
        parse_schedule(text).stages(10, 2)
    assert message in str(error.value)


def test_a_model_takes_one_recipe():
    with pytest.raises(UsageError, match="is a schedule, which a run follows"):
        recipes.parse("bf16 then f32 at 40%")
    assert Span.parse("40%").steps(3) == 1 and Span(5).steps(3) == 5 and Span(1, percent=True).steps(3) == 1


@pytest.mark.parametrize("name", [name for name in recipes.names() if not name.startswith("qvgen")])  # bridges already
def test_every_recipe_can_go_over_into_another(name):
    before = recipes.get(name).for_layers(8)
    ramp = blended(before, recipes.get("bf16"), 10)
    was, now = before.rules[-1].gemm.dgrad[0], ramp.rules[-1].gemm.dgrad[0]
    rotated = was.rotation is not None and was.rotation.side == "inner"
    assert now.exact if rotated else now == was
