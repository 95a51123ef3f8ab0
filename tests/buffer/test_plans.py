"""Reading plans: what is read, how often, in which batches."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.columns import Schema
from embodied_rft.buffer.plans import Fresh, Replay
from embodied_rft.data import Decisions, Field, Source


def filled(groups, *, version=0, source=Source.ONLINE, buffer=None):
    """One-decision episodes with these group numbers; the state tells them apart."""
    buffer = (
        Buffer(Schema({"state": Field((1,))}, Field((1,)), rewards=("env", "style")), 300) if buffer is None else buffer
    )
    for i, group in enumerate(groups):
        zeros, state = np.zeros((1, 1)), {"state": np.full((1, 1), i)}
        reward = {"env": np.zeros(1), "style": np.ones(1)}
        buffer.add(
            np.array([0]),
            state,
            Decisions(zeros, zeros),
            reward,
            True,
            False,
            group=group,
            version=version,
            source=source,
        )
        buffer.close(np.array([0]), state)
    return buffer


def test_replay_draws_what_sample_draws():
    buffer = filled([-1] * 20, source=Source.DEMONSTRATION)
    filled([-1] * 60, buffer=buffer)
    plan = Replay(batch_size=10, offline_share=0.5, num_steps=2, gamma=0.9, reward_weights={"style": 2.0})
    read = list(itertools.islice(plan.batches(buffer, np.random.default_rng(0), version=0), 3))
    rng = np.random.default_rng(0)
    for batch in read:
        expected = buffer.sample(rng, 10, offline_share=0.5)
        assert np.array_equal(batch.rows, expected.rows)
        assert (batch.columns["source"] == Source.DEMONSTRATION).sum() == 5
        assert batch.reward.tolist() == [2.0] * 10 and batch.discount.tolist() == [0.0] * 10
    assert len(read) == 3
    assert not np.array_equal(read[0].rows, read[1].rows)


def test_replay_sees_what_is_added_between_two_updates():
    buffer = filled([-1])
    batches = itertools.islice(Replay(batch_size=200).batches(buffer, np.random.default_rng(0), 0), 2)
    assert set(next(batches).rows) == {0}
    filled([-1], buffer=buffer)
    assert set(next(batches).rows) == {0, 2}


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(st.integers(-1, 6), min_size=1, max_size=60),
    batch_size=st.integers(1, 20),
    whole=st.booleans(),
    shuffle=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_fresh_reads_each_decision_once_per_epoch(groups, batch_size, whole, shuffle, seed):
    buffer = filled(groups)
    plan = Fresh(num_epochs=2, batch_size=batch_size, whole_groups=whole, shuffle=shuffle)
    parts = [b.rows for b in plan.batches(buffer, np.random.default_rng(seed), version=0)]
    again = [b.rows for b in plan.batches(buffer, np.random.default_rng(seed), version=0)]
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    assert np.bincount(np.concatenate(parts), minlength=buffer.size).tolist() == [2, 0] * len(groups)
    group_of = dict(zip(buffer.rows().tolist(), groups, strict=True))
    read = np.cumsum([len(p) for p in parts])  # epochs may be cut into different numbers of batches
    middle = int(np.searchsorted(read, len(groups))) + 1
    assert read[middle - 1] == len(groups)
    for epoch in (parts[:middle], parts[middle:]):
        if not whole:
            assert [len(p) for p in epoch[:-1]] == [batch_size] * (len(epoch) - 1) and len(epoch[-1]) <= batch_size
            continue
        homes = {}
        for number, part in enumerate(epoch):
            labels = [group_of[r] for r in part.tolist()]
            assert len(part) <= batch_size or len(set(labels)) == 1
            for label in set(labels) - {-1}:
                assert homes.setdefault(label, number) == number, "a group was torn"
    if not shuffle and not whole:
        assert np.concatenate(parts[:middle]).tolist() == buffer.rows().tolist()


@pytest.mark.parametrize(
    ("sizes", "batch_size", "read"),
    [
        ([3, 3], 4, [3, 3]),  # the border lies inside the second group
        ([3, 3], 6, [6]),
        ([3, 1, 3], 4, [4, 3]),  # the border lies between two groups
        ([2, 2, 2, 2], 5, [4, 4]),
        ([5, 1], 4, [5, 1]),  # longer than a batch
        ([1, 5, 1], 4, [1, 5, 1]),
    ],
)
def test_a_border_of_batches_never_lies_in_a_group(sizes, batch_size, read):
    buffer = filled([group for group, size in enumerate(sizes) for _ in range(size)])
    plan = Fresh(batch_size=batch_size, whole_groups=True, shuffle=False)
    parts = [batch.columns["group"].tolist() for batch in plan.batches(buffer, np.random.default_rng(0), version=0)]
    assert [len(part) for part in parts] == read
    assert sorted(sum(parts, [])) == sum(parts, [])


def test_shuffling_changes_the_order():
    buffer = filled([-1] * 50)
    batch = next(Fresh(batch_size=50).batches(buffer, np.random.default_rng(0), 0))
    assert batch.rows.tolist() != buffer.rows().tolist() == sorted(batch.rows.tolist())


def test_fresh_reads_only_recent_versions():
    buffer = filled([-1] * 4, version=5)
    filled([-1] * 3, version=6, buffer=buffer)
    for lag, count in ((0, 3), (1, 7), (9, 7)):
        (batch,) = Fresh(max_lag=lag).batches(buffer, np.random.default_rng(0), version=6)
        assert len(batch) == batch.num_decisions == count
    with pytest.raises(ValueError, match="no decision of policy version 7 or newer"):
        list(Fresh().batches(buffer, np.random.default_rng(0), version=7))


def test_reward_streams_are_mixed():
    (batch,) = Fresh(reward_weights={"env": 1.0, "style": 0.5}).batches(filled([-1] * 3), np.random.default_rng(0), 0)
    assert batch.reward.tolist() == [0.5] * 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Replay(batch_size=0), "batch_size 0: at least 1"),
        (lambda: Replay(hindsight=-1), "hindsight -1: at least 0"),
        (lambda: Fresh(num_epochs=0), "num_epochs 0"),
        (lambda: Fresh(max_lag=-1), "max_lag -1"),
        (lambda: Fresh(batchsize=3), "batchsize"),
    ],
)
def test_impossible_plans_are_refused(make, message):
    with pytest.raises((ValueError, ValidationError), match=message):
        make()


def test_decisions_of_whole_episodes_are_neighbours_in_their_order():
    buffer = Buffer(Schema({"state": Field((1,))}, Field((1,))), 100)
    zeros, streams = np.zeros((6, 1)), np.arange(6)
    for step in range(4):  # the episodes of all streams go on side by side
        over = np.full(6, step == 3)
        buffer.add(
            streams, {"state": zeros}, Decisions(zeros, zeros), np.zeros(6), over, ~over & over, group=streams // 3
        )
    buffer.close(streams, {"state": zeros})
    plan = Fresh(batch_size=12, whole_groups=True, whole_episodes=True)
    for batch in plan.batches(buffer, np.random.default_rng(0), version=0):
        assert batch.columns["step"].tolist() == [0, 1, 2, 3] * 3 and batch.num_episodes == 3
        assert (np.diff(batch.columns["episode"]) != 0).sum() == 2
