"""Choices of formats for layers: the published example, the best by brute force, and recipes that mean just that."""

import itertools
import re
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowprec import recipes
from lowprec.analysis.allocation import (
    Allocation,
    CostTable,
    bisect_loss,
    by_sensitivity,
    exact_pattern,
    measured_interactions,
    solve_exactly,
    solve_greedily,
)
from lowprec.recipes import KEEP

# ResNet-18: traces, ‖ΔW‖² at 8 and 4 bits and parameters of the layers, from the ILP notebook of Zhen-Dong/HAWQ.
TRACE = np.array(
    [.06857826, .03162379, .03298575, .01205663, .02222431, .00596336, .06931772, .00807129, .00372905, .00530698,
     .00209011, .00737569, .00210454, .00151197, .00158041, .00078146, .00451841, .00098745, .00072944]
)  # fmt: skip
DELTA_8 = np.array(
    [.0235, .0125, .0102, .0082, .0145, .0344, .0023, .0287, .0148, .0333, .0682, .0027, .0448, .0336, .0576, .1130,
     .0102, .0947, .0532]
)  # fmt: skip
DELTA_4 = np.array(
    [6.7430, 3.9691, 3.3281, 2.6796, 4.7277, 10.5966, .6827, 9.0942, 4.8857, 10.7599, 21.7546, .8603, 14.5324, 10.9651,
     18.7706, 36.4044, 3.1572, 29.6994, 17.4016]
)  # fmt: skip
PARAMETERS = np.array(
    [*[36864] * 4, 73728, 147456, 8192, 147456, 147456, 294912, 589824, 32768, 589824, 589824, 1179648, 2359296, 131072,
     2359296, 2359296]
)  # fmt: skip


def resnet18():
    cost = TRACE[:, None] * np.stack([DELTA_4, DELTA_8], axis=1)
    size = PARAMETERS[:, None] * np.array([4, 8]) / 8 / 2**20
    return CostTable(tuple(f"layer/{i}" for i in range(19)), ("int4", "int8"), cost, size)


def test_the_integer_program_of_resnet18():
    table = resnet18()
    all_4, all_8 = table.allocation([0] * 19), table.allocation([1] * 19)
    assert all_4.cost == pytest.approx(1.307713, abs=1e-6)
    assert all_8.cost == pytest.approx(0.004258, abs=1e-6)
    budget = (all_4.size + all_8.size) / 2
    assert budget == pytest.approx(7.9805, abs=1e-4)
    found = solve_exactly(table, budget)
    assert [int(choice[3:]) for choice in found.choices.values()] == [*[8] * 15, 4, 8, 4, 4]
    assert found.size == pytest.approx(7.2656, abs=1e-4)
    assert found.cost == pytest.approx(0.074506, abs=1e-6)


@st.composite
def tables(draw):
    layers, choices = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    numbers = lambda low: draw(
        st.lists(st.integers(low, 60), min_size=layers * choices, max_size=layers * choices).map(
            lambda values: np.reshape(values, (layers, choices))
        )
    )
    scale = draw(st.sampled_from([1e-9, 1.0, 1e9]))
    table = CostTable(
        tuple(f"layers/{i}" for i in range(layers)), tuple("abc"[:choices]), numbers(-10) * scale, numbers(1)
    )
    least, most = np.sum(np.min(table.size, axis=1)), np.sum(np.max(table.size, axis=1))
    return table, float(draw(st.integers(int(least), int(most))))


@settings(deadline=None, max_examples=100)
@given(tables())
def test_the_integer_program_is_the_best_of_all_and_greed_at_most_as_good(given_table):
    table, budget = given_table
    layers, choices = table.cost.shape
    every = (table.allocation(picked) for picked in itertools.product(range(choices), repeat=layers))
    best = min(each.cost for each in every if each.size <= budget)
    exact, greedy = solve_exactly(table, budget), solve_greedily(table, budget)
    scale = np.max(np.abs(table.cost))
    assert exact.size <= budget and greedy.size <= budget
    assert exact.cost == pytest.approx(best, abs=1e-9 * scale)
    assert greedy.cost >= exact.cost - 1e-9 * scale


def test_greed_takes_the_best_rate_first():
    """Per byte layer a gains 10, layer b 6: of three bytes a takes two, and b's two no longer fit."""
    table = CostTable(("a", "b"), ("low", "high"), [[20, 0], [12, 0]], [[1, 3], [1, 3]])
    assert solve_greedily(table, 5).choices == {"a": "high", "b": "low"}
    assert solve_greedily(table, 6).choices == {"a": "high", "b": "high"}


def test_a_budget_below_all_choices_is_an_error():
    for solve in (solve_exactly, solve_greedily):
        with pytest.raises(ValueError, match=r"the smallest takes 5\.32031, the budget is 5"):
            solve(resnet18(), 5.0)


def test_without_scipy_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ValueError, match=r"pip install 'lowprec\[scaling\]'"):
        solve_exactly(resnet18(), 8.0)
    solve_greedily(resnet18(), 8.0)


@pytest.mark.parametrize("bound", [0, 1, 7, 12, 13, 100])
def test_bisection_goes_as_far_as_the_bound(bound):
    order, measured = [f"layers/{i}" for i in range(13)], []

    def loss(choices):
        measured.append(sum(choice == "int2" for choice in choices.values()))
        return measured[-1]

    found = bisect_loss(order, "int2", "int8", loss, bound)
    assert [layer for layer, choice in found.items() if choice == "int2"] == order[:bound]
    assert len(measured) <= 5
    with pytest.raises(ValueError, match="above the bound -1"):
        bisect_loss(order, "int2", "int8", loss, -1)


def pairwise(seed, count=6):
    """A loss with terms of layers and of pairs of layers: (paths, terms of layers, terms of pairs, loss)."""
    random = np.random.default_rng(seed)
    alone, pairs = random.exponential(1, count), np.triu(random.normal(size=(count, count)), 1)
    layers = [f"layers/{index}/up" for index in range(count)]

    def loss(choices):
        lowered = np.array([choices[layer] == "int2" for layer in layers], float)
        return 3.0 + alone @ lowered + lowered @ pairs @ lowered

    return layers, alone, pairs + pairs.T, loss


@pytest.mark.parametrize("seed", range(5))
def test_interactions_are_what_pairs_cost_beyond_each_alone(seed):
    layers, _, pairs, loss = pairwise(seed)
    measured = []
    found = measured_interactions(layers, "int2", "int8", lambda choices: measured.append(1) or loss(choices))
    np.testing.assert_allclose(found, pairs, atol=1e-12)
    assert len(measured) == 1 + 6 * 7 / 2


@pytest.mark.parametrize("seed", range(5))
def test_the_order_is_that_of_shapley_values(seed):
    """By brute force: the mean over all orders of what a layer adds to the loss when its turn comes."""
    layers, alone, pairs, loss = pairwise(seed)
    values, orders = np.zeros(6), list(itertools.permutations(range(6)))
    for order in orders:
        choices = dict.fromkeys(layers, "int8")
        before = loss(choices)
        for index in order:
            choices[layers[index]] = "int2"
            after = loss(choices)
            values[index] += (after - before) / len(orders)
            before = after
    assert by_sensitivity(layers, alone, pairs) == tuple(layers[index] for index in np.argsort(values))
    assert by_sensitivity(layers, alone) == tuple(layers[index] for index in np.argsort(alone))
    assert by_sensitivity(layers, np.zeros(6)) == tuple(layers)


def test_layers_that_hurt_each_other_are_not_lowered_together():
    """0 and 1 look harmless alone; together they cost 10. Bisection down the order of costs stops after one."""
    layers = [f"layers/{index}/up" for index in range(4)]

    def loss(choices):
        lowered = [choices[layer] == "int2" for layer in layers]
        return 10.0 * (lowered[0] and lowered[1]) + 0.1 * sum(lowered[:2]) + 0.5 * sum(lowered[2:])

    cost, pairs = [0.1, 0.1, 0.5, 0.5], measured_interactions(layers, "int2", "int8", loss)
    count = lambda order: sum(choice == "int2" for choice in bisect_loss(order, "int2", "int8", loss, 1.2).values())
    assert count(by_sensitivity(layers, cost)) == 1
    assert count(by_sensitivity(layers, cost, pairs)) == 3


NAMES = st.sampled_from(["0", "1", "10", "attention", "mlp", "up", "Dense_0", "a.b", "x+", "(y)"])
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)


@settings(deadline=None)
@given(st.sets(PATHS, min_size=1, max_size=12), PATHS)
def test_a_pattern_matches_its_paths_and_no_other(paths, other):
    pattern = exact_pattern(sorted(paths))
    assert all(re.fullmatch(pattern, path) for path in paths)
    assert (re.fullmatch(pattern, other) is not None) == (other in paths)


def test_equal_layers_stand_together():
    paths = [f"layers/{i}/{name}" for i in (10, 2) for name in ("mlp/up", "mlp/down", "attention/key")]
    assert exact_pattern([*paths, "layers/3/mlp/up"]) == "layers/((2|10)/(attention/key|mlp/(down|up))|3/mlp/up)"


def test_the_recipe_of_an_allocation_parses_back_and_serves_just_its_layers():
    chosen = {"layers/0/up": "int4@row", "layers/1/up": "nvfp4", "layers/2/up": "int4@row"}
    recipe = Allocation(chosen, 0.0, 0.0).recipe()
    text = str(recipe)
    assert text == (
        "layers/(0|2)/up: fwd=exact,int4@row dgrad=exact,reuse; layers/1/up: fwd=exact,nvfp4 dgrad=exact,reuse"
        .replace("nvfp4", str(recipe.rule_for("layers/1/up").fwd[1].format))
    )  # fmt: skip
    assert recipes.parse(text) == recipe and str(recipes.parse(text)) == text
    assert recipe.rule_for("layers/2/up") == recipes.parse("fwd=exact,int4@row dgrad=exact,reuse").rule_for("x")
    assert recipe.rule_for("head") == recipe.rule_for("layers/0/attention/scores") == KEEP
    with pytest.raises(ValueError, match="no rule for layer 'layers/3/up'"):
        recipe.rule_for("layers/3/up")
    assert all(pattern in recipe.describe() for pattern in ("layers/(0|2)/up", "layers/1/up"))
    with pytest.raises(ValueError, match="where the format goes"):
        Allocation(chosen, 0.0, 0.0).recipe("fwd=int4@row")
    both = Allocation(chosen, 0.0, 0.0).recipe("fwd={}")
    assert both.rule_for("layers/0/up") == recipes.parse("fwd=int4@row").rule_for("x")
