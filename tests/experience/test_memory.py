"""What happened before in an episode: acting and reading the buffer show the same, and nothing else."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.columns import Schema
from embodied_rft.buffer.ring import Ring
from embodied_rft.data import PAST, Decisions, Field, Past, Ragged
from embodied_rft.experience.collect import Collector
from embodied_rft.pools.pool import VectorPool
from embodied_rft.pools.singles import Singles
from embodied_rft.pools.text_spaces import AnyText

SCHEMA = Schema(
    observation={"message": Field((), "str", "ragged"), "image": Field((), "uint8", "images")},
    action=Field((), "str", "ragged"),
    trace={"reply": Field((), "int64", "ragged"), "cut": Field((), "bool")},
    units=None,
)


class Echo(gym.Env):
    """Says how often it was spoken to, and shows it; ends after as many turns as its seed says."""

    observation_space = gym.spaces.Dict({"message": AnyText(99), "image": gym.spaces.Box(0, 255, (4, 4, 3), np.uint8)})
    action_space = AnyText(99)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.turns, self.last = 0, int(self.np_random.integers(1, 6))
        return self._seen(), {}

    def step(self, action):
        self.turns += 1
        return self._seen(), float(len(action)), self.turns == self.last, False, {}

    def _seen(self):
        return {"message": f"{self.last}:{self.turns}", "image": np.full((4, 4, 3), self.turns, np.uint8)}


def plain(past: Past, row: int) -> list[tuple]:
    """The past of one row, as values that can be compared."""
    return [
        (
            past.observation["message"][i],
            past.observation["image"][i][0].tolist(),
            past.action[i],
            past.trace["reply"].row(i).tolist(),
            bool(past.trace["cut"][i]),
        )
        for i in past.index.row(row).tolist()
    ]


class Reader:
    """Acts by saying what it saw before; remembers what it was shown at every decision, by episode and step."""

    def __init__(self) -> None:
        self.seen: dict[str, list[list[tuple]]] = {}
        self.asked: list[int] = []

    def __call__(self, observation):
        past, count = observation[PAST], len(observation["message"])
        self.asked.append(count)
        action = []
        for row in range(count):
            before = plain(past, row)
            action.append(f"{observation['message'][row]}/{len(before)}")
            self.seen.setdefault(observation["message"][row], []).append(before)
        reply = Ragged.of([list(text.encode()) for text in action], np.int64)
        log_prob = Ragged.of([np.zeros(len(text)) for text in action], np.float32)
        return Decisions(action, log_prob, {"reply": reply, "cut": np.arange(count) % 2 == 0})


def run(decisions: int, *, num_envs: int = 3, capacity: int = 500, episodes: int | None = None):
    pool = VectorPool(Singles(Echo, num_envs), purpose="training")
    reader, buffer = Reader(), Buffer(SCHEMA, capacity, past=True)
    collector = Collector(pool, run_seed=0, past=True)
    recording = collector.collect(reader, decisions=None if episodes else decisions, episodes=episodes)
    rows = recording.write(buffer).rows
    return pool, collector, reader, buffer, rows


def test_a_batch_shows_what_was_shown_when_the_decision_was_taken():
    pool, _, reader, buffer, _ = run(60)
    rows = buffer.rows()
    batch = buffer.batch(rows)
    for row in range(len(rows)):
        before = plain(batch.observation[PAST], row)
        assert len(before) == batch.columns["step"][row]
        assert batch.action[row].endswith(f"/{len(before)}")
        assert before in reader.seen[batch.observation["message"][row]]
    following = batch.next_observation[PAST]
    for row in range(len(rows)):
        assert plain(following, row)[:-1] == plain(batch.observation[PAST], row)
        assert plain(following, row)[-1][2] == batch.action[row]
    pool.close()


def test_nothing_is_in_the_table_twice_and_parts_of_a_batch_keep_their_past():
    pool, _, _, buffer, _ = run(60)
    batch = buffer.batch(buffer.rows(), next_observation=False)
    past = batch.observation[PAST]
    assert len(past.action) < past.index.offsets[-1]
    assert len(past.action) == len(np.unique(past.index.values))
    for part, rows in ((batch.take(np.array([5, 2])), [5, 2]), (batch.split(4)[1], range(4, 8))):
        for place, row in enumerate(rows):
            assert plain(part.observation[PAST], place) == plain(past, row)
    pool.close()


def test_pictures_are_stored_once_by_content():
    pool, _, _, buffer, _ = run(200, num_envs=8)
    assert len(buffer) >= 200
    assert buffer.images.nbytes == 6 * 4 * 4 * 3  # pictures of turns 0 to 5
    pool.close()


def test_nobody_is_asked_for_environments_that_are_idle():
    pool, _, reader, buffer, rows = run(0, episodes=4)
    assert sum(reader.asked) == len(rows) == len(buffer)
    assert reader.asked[-1] < 3
    pool.close()


def test_the_past_of_running_episodes_survives_a_checkpoint():
    pool, collector, reader, *_ = run(20)
    state = collector.state_dict()
    goes_on = collector.collect(reader, decisions=20)
    other = VectorPool(Singles(Echo, 3), purpose="training")
    again, second = Collector(other, run_seed=0, past=True), Reader()
    again.load_state_dict(state)
    if "pool" in state:
        repeated = again.collect(second, decisions=20)
        first = [each.decisions.action for each in goes_on.rows if hasattr(each, "decisions")]
        assert [each.decisions.action for each in repeated.rows if hasattr(each, "decisions")] == first
    assert again.schedule.memory is not None
    pool.close()
    other.close()


def test_of_an_episode_that_begins_to_be_overwritten_nothing_is_read():
    pool, collector, reader, buffer, _ = run(20, capacity=60)
    for _ in range(20):
        collector.collect(reader, decisions=10).write(buffer)
        batch = buffer.batch(buffer.rows())
        past = batch.observation[PAST]
        assert (past.index.lengths == batch.columns["step"]).all()
    pool.close()


def test_a_buffer_that_is_too_small_for_an_episode_says_so():
    buffer = Buffer(SCHEMA, 4, past=True)
    for number in range(8):
        taken = Decisions(["x"], Ragged.of([[0.0]], np.float32), {"reply": Ragged.of([[1]])})
        seen = {"message": [str(number)], "image": [[np.zeros((4, 4, 3), np.uint8)]]}
        buffer.add(np.array([0]), seen, taken, [0.0], np.array([False]), np.array([False]))
    with pytest.raises(ValueError, match="too small for whole conversations"):
        buffer.batch(buffer.rows()[-1:])


@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.data())
def test_earlier_rows_are_those_that_lead_to_a_row(lengths, data):
    ring, chains = Ring(64), []
    for length in lengths:
        rows, _ = ring.claim(length + 1)
        ring.link(rows[:-1], rows[1:], np.ones(length, np.int8))
        chains.append(rows.tolist())
    chosen = [(data.draw(st.sampled_from(chain)), chain) for chain in chains]
    found, offsets = ring.earlier(np.array([row for row, _ in chosen]))
    for i, (row, chain) in enumerate(chosen):
        assert found[offsets[i] : offsets[i + 1]].tolist() == chain[: chain.index(row)]
