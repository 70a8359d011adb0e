"""Short forms with a rule for each pattern of layers: what they mean, and that their text parses back."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowprec import recipes
from lowprec.recipes import KEEP, GemmRule, Quantizer
from lowprec.recipes.short import layer_rules

INT8, INT4 = (GemmRule(fwd=(Quantizer(f"int{bits}@row", pad=True),) * 2) for bits in (8, 4))


def test_the_first_pattern_that_matches_wins():
    recipe = recipes.parse("layers/[03]/.*: fwd=int8@row; .*: fwd=int4@row")
    assert recipe.rule_for("layers/3/mlp/up") == recipe.rule_for("layers/0/attention/key") == INT8
    assert recipe.rule_for("layers/1/mlp/up") == recipe.rule_for("layers/30/mlp/up") == INT4
    assert recipe == layer_rules({"layers/[03]/.*": INT8, ".*": INT4})


@pytest.mark.parametrize("path", ["head", "embed", "layers/0/attention/scores"])
def test_what_is_kept_as_always_stays_so(path):
    assert recipes.parse("layers/0/.*: fwd=int8@row; .*: fwd=int4@row").rule_for(path) == KEEP


def test_a_layer_that_no_pattern_names_is_an_error():
    with pytest.raises(ValueError, match="no rule for layer 'layers/1/up'"):
        recipes.parse("layers/0/.*: fwd=int8@row").rule_for("layers/1/up")


def test_spaces_and_a_closing_semicolon_are_free_and_a_rule_for_all_needs_no_pattern():
    assert str(recipes.parse(" a:  fwd=int8@row ;.*: fwd=int4@row; ")) == "a: fwd=int8@row; .*: fwd=int4@row"
    assert recipes.parse(".*: fwd=int4@row") == recipes.parse("fwd=int4@row")
    assert str(recipes.parse(".*: fwd=int4@row")) == "fwd=int4@row"


PATTERNS = st.from_regex(r"[a-z0-9/.*|()?:=\\-]{1,12}", fullmatch=True).filter(
    lambda text: not text.startswith(":") and _compiles(text)
)
RULES = st.sampled_from(
    ["fwd=int4@row", "fwd=exact,nvfp4 dgrad=exact,reuse", "fwd=mxfp8(hadamard32) wgrad=bf16(stochastic)", "fwd=exact"]
)


def _compiles(text):
    try:
        return bool(re.compile(text))
    except re.error:
        return False


@settings(deadline=None)
@given(st.dictionaries(PATTERNS, RULES, min_size=1, max_size=4))
def test_the_text_of_clauses_parses_back(clauses):
    gemms = {pattern: recipes.parse(rule).rules[-1].gemm for pattern, rule in clauses.items()}
    recipe = layer_rules(gemms)
    assert recipes.parse(str(recipe)) == recipe
    assert {rule.pattern: rule.gemm for rule in recipe.rules[2:]} == gemms


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x: fwd=int4@row; fwd=int8@row", "'fwd=int8@row' is not 'pattern: fwd=…"),
        ("x: fwd=int4@row; x: fwd=int8@row", "gives the pattern 'x' twice"),
        ("x: fdw=int4@row; y: fwd=int8@row", "did you mean fwd"),
        ("x/(: fwd=int4@row", "not a regular expression"),
        ("x: fwd=int4@row;; y: fwd=int8@row", "'' is not 'pattern:"),
    ],
)
def test_errors_name_the_clause(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        recipes.parse(text)


def test_patterns_that_a_text_cannot_hold_are_refused():
    with pytest.raises(ValueError, match="neither blanks nor semicolons, unlike 'a b'"):
        layer_rules({"a b": INT8})
