"""The order of the training windows is a function of (seed, step) alone; evaluation windows never change."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowprec.data import eval_batches, train_batches
from lowprec.errors import UsageError

SEQ = 4


def take(iterator, count):
    return [batch["tokens"] for batch in itertools.islice(iterator, count)]


def starts(batches) -> list[int]:
    """Which windows they are."""
    return [int(row[0]) // SEQ for batch in batches for row in batch]


def test_each_token_but_the_first_is_a_target_once_an_epoch(numbered):
    data = numbered(24, SEQ)
    epoch = np.concatenate(take(train_batches(data, seq_len=SEQ, batch_size=6, seed=0), 4))
    assert epoch.shape == (24, SEQ + 1)
    assert epoch.dtype == np.int32
    assert sorted(epoch[:, 1:].ravel()) == list(range(1, 24 * SEQ + 1))
    assert (epoch[:, 1:] == epoch[:, :-1] + 1).all()


def test_a_remainder_shorter_than_a_window_is_left_out(numbered):
    data = numbered(24, SEQ)
    longer = np.concatenate(take(train_batches(data, seq_len=5, batch_size=19, seed=0), 1))
    assert sorted(longer[:, 0]) == [5 * index for index in range(19)]


def test_epochs_are_permutations_and_each_its_own(numbered):
    batches = train_batches(numbered(60, SEQ), seq_len=SEQ, batch_size=12, seed=0)
    epochs = [starts(take(batches, 5)) for _ in range(3)]
    assert all(sorted(epoch) == list(range(60)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != list(range(60))


def test_windows_are_not_repeated_within_an_epoch_that_batches_do_not_divide(numbered):
    order = starts(take(train_batches(numbered(25, SEQ), seq_len=SEQ, batch_size=6, seed=1), 25))
    assert all(sorted(order[25 * epoch : 25 * epoch + 25]) == list(range(25)) for epoch in range(6))


def test_seeds_give_orders_of_their_own(numbered):
    data = numbered(40, SEQ)
    orders = [starts(take(train_batches(data, seq_len=SEQ, batch_size=8, seed=seed), 10)) for seed in range(4)]
    epochs = {tuple(order[:40]) for order in orders} | {tuple(order[40:]) for order in orders}
    # Not even the second epoch of one seed is the first of the next.
    assert len(epochs) == 8
    again = starts(take(train_batches(data, seq_len=SEQ, batch_size=8, seed=0), 10))
    assert again == orders[0]


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_processes_share_the_batch_of_one(numbered, process_count):
    data = numbered(26, SEQ)
    alone = take(train_batches(data, seq_len=SEQ, batch_size=8, seed=3), 9)
    parts = [
        take(
            train_batches(data, seq_len=SEQ, batch_size=8, seed=3, process_index=index, process_count=process_count),
            9,
        )
        for index in range(process_count)
    ]
    for step in range(9):
        assert all(part[step].shape == (8 // process_count, SEQ + 1) for part in parts)
        # More than the same windows: in the order of the processes they are the same rows.
        np.testing.assert_array_equal(np.concatenate([part[step] for part in parts]), alone[step])


@given(cut=st.integers(0, 23), ahead=st.integers(0, 5), process_count=st.sampled_from([1, 2, 4]))
@settings(max_examples=15, deadline=None)
def test_resuming_continues_exactly(numbered, cut, ahead, process_count):
    def batches():
        return train_batches(
            numbered(21, SEQ), seq_len=SEQ, batch_size=8, seed=5, process_index=process_count - 1,
            process_count=process_count,
        )  # fmt: skip

    whole = take(batches(), cut + 6)
    stopped = batches()
    take(stopped, cut)
    state = json.loads(json.dumps(stopped.get_state()))
    resumed = batches()
    take(resumed, ahead)  # what was read before does not matter
    resumed.set_state(state)
    assert resumed.get_state() == state
    np.testing.assert_array_equal(take(resumed, 6), whole[cut:])
    for iterator in (stopped, resumed):
        iterator.close()


def test_state_is_of_the_batch_last_given_not_of_what_was_read_ahead(numbered):
    batches = train_batches(numbered(64, SEQ), seq_len=SEQ, batch_size=4, seed=0)
    take(batches, 3)
    state = batches.get_state()
    following = take(batches, 2)
    batches.set_state(state)
    np.testing.assert_array_equal(take(batches, 2), following)


def test_a_run_resumes_on_another_number_of_processes(numbered):
    data = numbered(26, SEQ)
    alone = train_batches(data, seq_len=SEQ, batch_size=8, seed=3)
    take(alone, 5)
    state = alone.get_state()
    parts = []
    for index in range(2):
        part = train_batches(data, seq_len=SEQ, batch_size=8, seed=3, process_index=index, process_count=2)
        part.set_state(state)
        parts.append(take(part, 1)[0])
    np.testing.assert_array_equal(np.concatenate(parts), take(alone, 1)[0])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed=0"),
        ({"batch_size": 4}, "batch_size=8"),
        ({"seq_len": 2}, "seq_len=4"),
        ({"data": "other"}, "data="),
    ],
)
def test_the_state_of_another_run_is_refused(numbered, change, named):
    arguments = {"seq_len": SEQ, "batch_size": 8, "seed": 0}
    state = train_batches(numbered(26, SEQ), **arguments).get_state()
    data = numbered(26, SEQ, change.pop("data", "numbered"))
    with pytest.raises(UsageError, match=named):
        train_batches(data, **{**arguments, **change}).set_state(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 27}, "26 training windows of 4 tokens, less than one batch"),
        ({"seq_len": 200}, "0 training windows"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 6, "process_count": 4}, "shared evenly by 4"),
        ({"process_index": 2, "process_count": 2}, "process 2 of 2"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"seq_len": 0}, "seq_len"),
    ],
)
def test_what_can_not_be_batched_is_named(numbered, change, message):
    arguments = {"seq_len": SEQ, "batch_size": 8, "seed": 0, **change}
    with pytest.raises(UsageError, match=message):
        train_batches(numbered(26, SEQ), **arguments)


def test_evaluation_windows_are_fixed_and_spread_over_the_split(numbered):
    data = numbered(100, SEQ)
    first = eval_batches(data, seq_len=SEQ, batch_size=5, batches=4)
    again = eval_batches(data, seq_len=SEQ, batch_size=5, batches=4)
    assert len(first) == 4
    assert all((a["tokens"] == b["tokens"]).all() for a, b in zip(first, again, strict=True))
    assert starts(batch["tokens"] for batch in first) == list(range(0, 100, 5))
    assert all(batch["tokens"].shape == (5, SEQ + 1) and batch["tokens"].dtype == np.int32 for batch in first)
    assert all(batch["weight"].dtype == np.float32 and (batch["weight"] == 1).all() for batch in first)


def test_a_short_evaluation_split_is_padded_with_weight_zero(numbered):
    batches = eval_batches(numbered(7, SEQ), seq_len=SEQ, batch_size=3, batches=10)
    assert [batch["weight"].tolist() for batch in batches] == [[1, 1, 1], [1, 1, 1], [1, 0, 0]]
    kept = [row for batch in batches for row, weight in zip(batch["tokens"], batch["weight"], strict=True) if weight]
    assert starts([kept]) == list(range(7))
    assert (batches[-1]["tokens"][1:] == 0).all()


@pytest.mark.parametrize("change", [{"seq_len": 1000}, {"batches": 0}, {"batch_size": 0}, {"seq_len": 0}])
def test_an_impossible_evaluation_is_refused(numbered, change):
    with pytest.raises(UsageError):
        eval_batches(numbered(7, SEQ), **{"seq_len": SEQ, "batch_size": 2, "batches": 2, **change})
