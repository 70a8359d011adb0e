"""The arithmetic of paired runs."""

import pytest

from experiments.paired import Gap, verdict


def test_gaps_are_paired_by_seed():
    """Differences .1, .2, .3: mean .2, standard error .1 / √3."""
    losses = {"a": {0: 1.1, 1: 2.2, 2: 3.3}, "b": {0: 1.0, 1: 2.0, 2: 3.0}}
    gap = Gap.between(losses, "a", "b")
    assert gap.mean == pytest.approx(0.2) and gap.error == pytest.approx(0.1 / 3**0.5)


@pytest.mark.parametrize(
    ("mean", "error", "seen"), [(0.3, 0.1, "yes"), (0.1, 0.1, "undecided"), (-0.3, 0.1, "no, the reverse")]
)
def test_a_verdict_takes_two_standard_errors(mean, error, seen):
    assert verdict(Gap(mean, error)) == seen
