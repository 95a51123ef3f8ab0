"""Streams of reward: what is unknown is refused, what is told afterwards is read, saved and carried along."""

import copy

import numpy as np
import pytest

from embodied_rft.data import Trajectory
from tests.buffer.test_buffer import add, close, simple

EPISODE = Trajectory({"state": np.zeros((3, 2))}, np.zeros((2, 1)), np.ones(2, np.float32), "terminated")


@pytest.mark.parametrize("num_steps", [1, 2])
def test_what_nobody_said_is_unknown_and_refused_when_it_is_read(num_steps):
    buffer = simple(rewards=("env", "success"))
    rows = buffer.add_trajectory(EPISODE)
    add(buffer, [0], reward={"env": np.ones(1)}, terminated=True)
    close(buffer, [0])
    assert buffer.batch(buffer.rows(), num_steps=num_steps).reward.min() >= 1  # who does not read it does not mind
    assert [t.success for t in buffer.trajectories()] == [None, None]
    with pytest.raises(ValueError, match="'success' is unknown for 1 of . decisions, row 1 first"):
        buffer.label("success", rows[:1], np.ones(1))
        buffer.batch(rows, reward_weights={"env": 1, "success": 1}, num_steps=num_steps)
    buffer.label("success", rows, np.array([0, 1]))
    assert buffer.batch(rows, reward_weights={"success": 2}).reward.tolist() == [0, 2]
    assert next(buffer.trajectories()).success


def test_labels_are_streams_of_reward_that_are_saved_and_go_with_their_rows():
    buffer = simple(capacity=8)
    rows = buffer.add_trajectory(EPISODE)
    with pytest.raises(ValueError, match="no reward stream 'judge'"):
        buffer.batch(rows, reward_weights={"judge": 1})
    buffer.label("judge", rows, np.array([0.5, 2.0]))
    other = simple(capacity=8)
    other.load_state_dict(copy.deepcopy(buffer.state_dict()))
    for each in (buffer, other):
        mixed = each.batch(rows, reward_weights={"env": 1, "judge": 2}, num_steps=2, gamma=0.5)
        assert mixed.reward.tolist() == [2 + 0.5 * 5, 5] and each.rewards == ("env", "judge")
    (told,) = other.trajectories()
    assert told.rewards["judge"].tolist() == [0.5, 2] and not mixed.notes
    again = other.add_trajectory(told)  # a label comes along where the stream is known
    assert other.batch(again, reward_weights={"judge": 1}).reward.tolist() == [0.5, 2]
    for _ in range(3):
        newest = other.add_trajectory(EPISODE)
    with pytest.raises(ValueError, match="'judge' is unknown"):  # rows are used again without their labels
        other.batch(newest, reward_weights={"judge": 1})


@pytest.mark.parametrize(
    ("name", "rows", "values", "message"),
    [
        ("env", [0], [1.0], "is what the environment paid"),
        ("judge", [0, 1], [1.0], "one number for each"),
        ("judge", [99], [1.0], "rows 99 to 99"),
        ("judge", [1], [np.inf], "row 1 is infinite"),
    ],
)
def test_labels_that_cannot_be_are_refused(name, rows, values, message):
    buffer = simple(capacity=8)
    buffer.add_trajectory(EPISODE)
    with pytest.raises(ValueError, match=message):
        buffer.label(name, np.array(rows), np.array(values))
    assert buffer.rewards == ("env",)
