"""Evolution over what is to be trained: the best of all choices by brute force, and never worse than greed."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec.errors import UsageError
from lowprec.optim.selection_search import evolve, last_selections, ratio_selections
from lowprec.optim.sparse_update import Candidate, Selection, choose, contributions, update_bytes


def instance(seed, layers=6):
    """Groups of shares of a layer, gains with diminishing returns and a few losses, in the manner of the paper."""
    random = np.random.default_rng(seed)
    groups = []
    for layer in range(layers):
        scale, size = random.exponential(1), int(random.integers(8, 64))
        shares = (0.125, 0.25, 0.5, 1.0)
        gain = lambda share, scale=scale: scale * share**0.5 + random.normal(scale=0.05)
        groups.append(
            [Candidate(Selection((), ((f"{layer}/kernel", round(8 * s)),)), gain(s), int(size * s)) for s in shares]
        )
    return groups


def best_of_all(groups, limit, memory):
    every = itertools.product(*([None, *group] for group in groups))
    choices = ([c for c in choice if c is not None] for choice in every)
    return max(sum(c.gain for c in choice) for choice in choices if memory(choice) <= limit)


def adding_up(chosen):
    return sum(c.bytes for c in chosen)


def from_the_first(chosen):
    """Beside their own bytes, activations of every layer from the first trained one on are saved."""
    layers = [int(c.selection.channels[0][0][0]) for c in chosen]
    return adding_up(chosen) + (20 * (6 - min(layers)) if layers else 0)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("memory", "limit"), [(adding_up, 70), (from_the_first, 130)])
def test_it_finds_the_best_of_15625_choices(seed, memory, limit):
    groups = instance(seed)
    selection, chosen = evolve(groups, limit, memory=memory, population=128, generations=80)
    assert memory(chosen) <= limit
    assert selection.channels == tuple(part for c in chosen for part in c.selection.channels)
    assert all(sum(c in group for c in chosen) <= 1 for group in groups)
    assert sum(c.gain for c in chosen) == pytest.approx(best_of_all(groups, limit, memory), rel=1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_it_is_never_worse_than_greed_and_mostly_better(seed):
    """Single candidates, the same problem for both."""
    random = np.random.default_rng(seed)
    gains, sizes = random.exponential(1, 12), random.integers(1, 40, 12)
    candidates = [Candidate(Selection((str(i),)), g, int(b)) for i, (g, b) in enumerate(zip(gains, sizes, strict=True))]
    _, greedy = choose(candidates, limit=60)
    selection, chosen = evolve([[candidate] for candidate in candidates], limit=60)
    again, _ = evolve([[candidate] for candidate in candidates], limit=60)
    assert selection == again
    assert sum(c.gain for c in chosen) >= sum(c.gain for c in greedy) - 1e-12
    best = best_of_all([[candidate] for candidate in candidates], 60, adding_up)
    assert sum(c.gain for c in chosen) == pytest.approx(best, rel=1e-9)


def test_greed_is_beaten_where_rates_mislead():
    """By rate 6 / 5 first, which leaves no room for the two of 5 that fit together."""
    candidates = [
        Candidate(Selection((name,)), gain, size) for name, gain, size in (("a", 7, 6), ("b", 5, 5), ("c", 5, 5))
    ]
    assert sum(c.gain for c in choose(candidates, 10)[1]) == 7
    assert evolve([[c] for c in candidates], 10)[0] == Selection(("b", "c"))


def test_what_gains_nothing_is_left_alone_and_what_cannot_be_is_refused():
    useless = [[Candidate(Selection(("a",)), 0.0, 1)], [Candidate(Selection(("b",)), -1.0, 1)]]
    assert evolve(useless, 10) == evolve([], 10) == (Selection(), [])
    with pytest.raises(UsageError, match="training nothing takes 5 bytes, the limit is 4"):
        evolve(useless, 4, memory=lambda chosen: 5 + len(chosen))
    with pytest.raises(UsageError, match="2 genomes, a generation and a chance, not 1"):
        evolve(useless, 4, population=1)


PARAMS = {name: {"kernel": jnp.zeros((3, 10)), "bias": jnp.zeros(10)} for name in "abc"}


def test_the_alternatives_of_the_paper():
    groups = ratio_selections(PARAMS, ".*kernel")
    assert list(groups) == ["a/kernel", "b/kernel", "c/kernel"]
    sizes = [{path: leaf.shape for path, leaf in s.split(PARAMS)[0].items()} for s in groups["b/kernel"]]
    assert sizes == [{"b/kernel": (3, count)} for count in (2, 3, 5, 10)]
    biases = last_selections(["a/bias", "b/bias", "c/bias"])
    assert [set(s.split(PARAMS)[0]) for s in biases] == [
        {"c/bias"},
        {"b/bias", "c/bias"},
        {"a/bias", "b/bias", "c/bias"},
    ]
    with pytest.raises(UsageError, match="above 0 and is at most 1, not 0"):
        ratio_selections(PARAMS, ".*kernel", (0, 1))


def test_from_contributions_to_a_choice():
    """Gains of a quadratic after one exact step: each channel that is trained gains what it was off by."""
    target = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), PARAMS)
    target["a"]["kernel"] *= 2.0

    def score(selection):
        trained, frozen = selection.split(PARAMS)
        loss = lambda t: sum(
            jnp.sum((a - b) ** 2)
            for a, b in zip(jax.tree.leaves(selection.join(t, frozen)), jax.tree.leaves(target), strict=True)
        )
        return -float(loss(jax.tree.map(lambda w, g: w - 0.5 * g, trained, jax.grad(loss)(trained))))

    cost = lambda selection: update_bytes(selection, PARAMS)
    groups = [contributions(s, score, cost) for s in ratio_selections(PARAMS, ".*kernel").values()]
    groups.append(contributions(last_selections([f"{name}/bias" for name in "abc"]), score, cost))
    selection, chosen = evolve(groups, limit=4 * (30 + 9))
    # The kernel that is off by 2 first, then nine more values that are off by 1: of three channels of a kernel.
    assert sum(c.gain for c in chosen) == pytest.approx(30 * 4 + 9)
    assert ("a/kernel", 10) in selection.channels and sum(c.bytes for c in chosen) == 4 * 39
