"""What environments tell of an episode at its end, under names with a slash: once for each, through every pool."""

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from embodied_rft.data import Decisions
from embodied_rft.envs.serving import EnvBatch, Outcome, serve
from embodied_rft.evaluation.evaluate import evaluate, evaluation_seeds
from embodied_rft.experience.collect import Collector
from embodied_rft.pools.chunks import ChunkPool
from embodied_rft.pools.pool import make_pool
from tests.pools.test_infrastructure import act as idle

PLACE = "tests.pools.test_statistics:"
BOX = spaces.Box(-1, 1, (1,), np.float32)


def length(seed):
    return 2 + seed % 3


class Counting(gymnasium.Env):
    """Two to four steps; tells how many there were, and things that are no statistics."""

    observation_space = BOX

    def __init__(self, moves=False):
        self.action_space = BOX if moves else spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left, self.count = length(seed), 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.left, self.count = self.left - 1, self.count + 1
        told = {"steps/all": self.count, "steps/even": self.count % 2 == 0, "speed": 3.0, "steps/words": "many"}
        told |= {"steps/none": np.nan, "steps/some": np.ones(3), "steps/one": np.ones((1, 1))}
        return np.zeros(1, np.float32), 1.0, self.left == 0, False, told


class CountingBatch(EnvBatch):
    """The same as a batch."""

    arrays = ("left", "count")

    def __init__(self, *, num_envs):
        super().__init__(num_envs=num_envs)
        self.left, self.count = np.zeros((2, num_envs), np.int64)
        self.observation_space, self.action_space = BOX, spaces.Discrete(2)

    def start(self, rows, seeds, options):
        self.left[rows], self.count[rows] = [length(seed) for seed in seeds], 0

    def step(self, rows, actions):
        self.left[rows], self.count[rows] = self.left[rows] - 1, self.count[rows] + 1
        count = self.count[rows]
        told = {"steps/all": count, "steps/even": count % 2 == 0, "speed": 3.0 * count, "steps/none": count * np.nan}
        return Outcome(np.ones(len(rows)), self.left[rows] == 0, None, {**told, "steps/one": np.ones(len(rows))})

    def observe(self, rows):
        return np.zeros((self.num_envs, 1), np.float32)


gymnasium.register("toy/Counting-v0", Counting)
serve("toy/CountingBatch-v0", CountingBatch)
KINDS = [("Counting", "sync", None), ("Counting", "workers", 2), ("CountingBatch", "native", None)]
NAMES = {"steps/all", "steps/even", "steps/one"}


@pytest.mark.parametrize(("name", "kind", "workers"), KINDS)
def test_every_episode_is_told_of_once(name, kind, workers):
    pool = make_pool(f"{PLACE}toy/{name}-v0", 3, kind=kind, num_workers=workers)
    recording = Collector(pool, run_seed=0).collect(idle, episodes=10)
    pool.close()
    assert {key for key, values in recording.statistics.items() if values} == NAMES
    assert recording.statistics["steps/all"] == recording.lengths and len(recording.lengths) == 10
    metrics = recording.metrics()
    assert metrics["collect/steps/all"] == metrics["collect/length"] and metrics["collect/steps/one"] == 1
    assert metrics["collect/steps/even"] == np.mean([length % 2 == 0 for length in recording.lengths])
    assert not any("none" in key or "speed" in key for key in metrics)


def test_an_end_that_has_not_come_is_not_told_of():
    for name, kind, _ in KINDS[::2]:
        pool = make_pool(f"toy/{name}-v0", 2, kind=kind)
        pool.reset(np.array([0, 2]))  # of two and of four steps
        assert [list(pool.step(np.zeros(2, np.int64)).statistics(np.arange(2)).values()) for _ in range(2)] == [
            [],
            [[2.0], [1.0], [1.0]],
        ]


def test_evaluations_keep_their_means():
    pool = make_pool("toy/CountingBatch-v0", 3, purpose="evaluation")
    outcome = evaluate(idle, pool, evaluation_seeds(10))
    assert outcome.statistics.keys() == NAMES and outcome.statistics["steps/all"] == np.mean(outcome.lengths)
    assert outcome.to_json()["statistics"] == outcome.statistics and not outcome.told


def test_an_end_inside_a_chunk_is_told_of():
    pool = ChunkPool(make_pool("toy/Counting-v0", 3, options={"moves": True}), horizon=3)

    def act(observation):
        return Decisions(np.zeros((3, 3), np.float32), np.zeros((3, 1), np.float32))

    pool.reset(np.array([0, 1, 2]))  # of two, three and four steps
    first, second = (pool.step(act(None).action) for _ in range(2))
    assert first.statistics(np.arange(3))["steps/all"] == [2, 3] and second.statistics(np.arange(3))["steps/all"] == [4]
    assert np.isnan(first.info["steps/all"]).tolist() == [False, False, True]
