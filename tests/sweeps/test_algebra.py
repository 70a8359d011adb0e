"""Laws of the algebra of sweeps, on random sweeps; and what it refuses."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowprec import sweeps
from lowprec.errors import UsageError

# Disjoint keys: any two of these sweeps can be multiplied.
KEYS = ("seed", "train.steps", "model.layers", "eval.every")


@st.composite
def axes(draw, key):
    return sweeps.axis(key, *draw(st.lists(st.integers(1, 50), min_size=1, max_size=4, unique=True)))


def three():
    return st.tuples(*(axes(key) for key in KEYS[:3]))


def plain(sweep):
    return [dict(point) for point in sweep]


@given(three())
def test_a_product_has_every_combination_once_and_its_last_factor_turns_fastest(factors):
    a, b, c = factors
    expected = [{**x, **y, **z} for x in a for y in b for z in c]
    assert plain(sweeps.prod(a, b, c)) == expected
    assert len(expected) == len(a) * len(b) * len(c)


@given(three())
def test_products_and_chains_are_associative(factors):
    a, b, c = factors
    assert plain((a * b) * c) == plain(a * (b * c)) == plain(sweeps.prod(a, b, c))
    assert plain((a + b) + c) == plain(a + (b + c)) == plain(sweeps.chain(a, b, c))


@given(three())
def test_a_product_distributes_over_a_chain_on_its_left(factors):
    a, b, c = factors
    assert plain((a + b) * c) == plain(a * c + b * c)


@given(three(), st.randoms())
def test_the_order_of_factors_changes_the_order_of_points_alone(factors, random):
    shuffled = list(factors)
    random.shuffle(shuffled)
    as_set = lambda points: {tuple(sorted(point.items())) for point in points}
    assert as_set(plain(sweeps.prod(*shuffled))) == as_set(plain(sweeps.prod(*factors)))


@given(st.integers(1, 6), st.data())
def test_zip_goes_side_by_side(length, data):
    values = [data.draw(st.lists(st.integers(1, 50), min_size=length, max_size=length, unique=True)) for _ in range(2)]
    together = sweeps.zip(sweeps.axis("seed", *values[0]), sweeps.axis("train.steps", *values[1]))
    assert plain(together) == [{"seed": a, "train.steps": b} for a, b in zip(*values, strict=True)]


@given(axes("seed"), axes("train.steps"))
def test_where_keeps_the_points_for_which_the_predicate_holds_in_their_order(a, b):
    even = lambda point: (point["seed"] + point["train.steps"]) % 2 == 0
    expected = [point for point in plain(a * b) if even(point)]
    if expected:
        assert plain((a * b).where(even)) == expected
    else:
        with pytest.raises(UsageError, match=r"where leaves none of \d+ points of seed and train\.steps"):
            sweeps.where(a * b, even)


@given(three(), st.integers(0, 5), st.data())
def test_a_subsample_is_a_part_in_order_and_grows_by_one(factors, seed, data):
    whole = sweeps.prod(*factors)
    n = data.draw(st.integers(1, len(whole)))
    drawn = plain(whole.subsample(n, seed))
    assert len(drawn) == n
    assert drawn == plain(sweeps.subsample(sweeps.prod(*factors), n, seed))  # the same every time
    assert drawn == [point for point in plain(whole) if point in drawn]
    if n < len(whole):
        assert all(point in plain(whole.subsample(n + 1, seed)) for point in drawn)


def test_a_subsample_is_the_same_on_every_machine():
    """Written down once: a change of the drawing would train other runs of a sweep that was begun."""
    drawn = (sweeps.seeds(10) * sweeps.axis("train.steps", 1, 2)).subsample(4, seed=3)
    assert [(point["seed"], point["train.steps"]) for point in drawn] == [(3, 2), (6, 2), (9, 1), (9, 2)]


def test_another_seed_draws_other_points():
    whole = sweeps.seeds(50)
    assert len({tuple(point["seed"] for point in whole.subsample(5, seed)) for seed in range(10)}) == 10


@settings(max_examples=20)
@given(axes("seed"))
def test_a_longer_axis_keeps_most_of_what_was_drawn(a):
    """A point is drawn by its own contents: a new one can only take the place of one that was drawn."""
    whole = sweeps.seeds(20)
    longer = sweeps.seeds(21)
    before, after = ({point["seed"] for point in sweep.subsample(10)} for sweep in (whole, longer))
    assert len(before & after) >= 9


def test_sweeps_are_sequences_and_lists_of_dicts_are_sweeps():
    sweep = [{"seed": 1}, {"seed": 2, "recipe": "bf16"}] * sweeps.axis("train.steps", 5)
    assert plain(sweep) == [{"seed": 1, "train.steps": 5}, {"seed": 2, "recipe": "bf16", "train.steps": 5}]
    assert sweep[1]["recipe"] == "bf16" and len(sweep[:1]) == 1 and sweep[:1] == sweeps.Sweep(sweep.points[:1])
    # The sums are what is tested here (RUF005 would unpack them).
    assert plain(sweeps.seeds(1, first=3) + [{"seed": 0}]) == [{"seed": 3}, {"seed": 0}]  # noqa: RUF005
    assert plain([{"seed": 0}] + sweeps.seeds(1, first=3)) == [{"seed": 0}, {"seed": 3}]  # noqa: RUF005


def test_what_two_factors_agree_upon_is_no_conflict():
    assert plain(sweeps.always({"seed": 1, "train.steps": 3}) * sweeps.axis("seed", 1)) == [
        {"seed": 1, "train.steps": 3}
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sweeps.seeds(2) * sweeps.seeds(2, first=5), "two axes of the sweep set seed, to 0 and to 5"),
        (lambda: sweeps.sizes("S0") * sweeps.axis("model.width", 64),
         "two axes of the sweep set model.width, to 32 and to 64"),
        (lambda: sweeps.tokens_per_parameter(5) * sweeps.tokens(1000),
         "train.steps is computed by two axes of the sweep"),
        (lambda: sweeps.axis("train.steps", 7) * sweeps.tokens_per_parameter(5),
         "train.steps is set to 7 by one axis and computed by another"),
        (lambda: sweeps.learning_rates(1e-3) * sweeps.lr_factors(2),
         "optimizer.lr is set to 0.001 by one axis and computed by another"),
        (lambda: sweeps.zip(sweeps.seeds(2), sweeps.sizes("S0", "S1", "S2")),
         "zip needs sweeps of equal length, not 2 of seed, 3 of size"),
        (lambda: sweeps.zip(sweeps.seeds(2), sweeps.seeds(2, first=1)),
         "two axes of the sweep set seed, to 0 and to 1"),
        (lambda: sweeps.Sweep(()), "a sweep has at least one point; this one is empty"),
        (lambda: sweeps.chain(sweeps.seeds(1), []), "a sweep has at least one point; this one is empty"),
        (lambda: sweeps.prod(), "prod needs at least one sweep"),
        (lambda: sweeps.prod(sweeps.seeds(1), 3),
         "a sweep is made of axes such as seeds(3), or is a list of dicts, not 3"),
        (lambda: sweeps.Sweep(({"seed": 1}, "S0")), "a point of a sweep is a dict of config keys to values, not 'S0'"),
        (lambda: sweeps.Sweep(({"optimizer.learning_rate": 1},)),
         "unknown config key 'optimizer.learning_rate'"),
        (lambda: sweeps.Sweep(({"model": 1},)), "config key 'model' is a group of model.name"),
        (lambda: sweeps.seeds(3).subsample(4), "subsample draws 1 … 3 points of a sweep of 3, not 4"),
        (lambda: sweeps.seeds(3).subsample(0), "subsample draws 1 … 3 points of a sweep of 3, not 0"),
        (lambda: sweeps.sizes("S0").where(lambda point: point["siz"] == "S0"),
         "unknown key of a point in where 'siz'; did you mean size?"),
        (lambda: sweeps.tokens_per_parameter(5).where(lambda point: point["train.steps"] > 3),
         "train.steps is computed from the rest of the config later; a point has tokens_per_parameter"),
    ],
)  # fmt: skip
def test_what_is_refused(make, message):
    with pytest.raises(UsageError) as error:
        make()
    assert message in str(error.value)
