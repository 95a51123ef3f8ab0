"""Who plays which episode: each one once, started by its own seed, wherever there is room; nobody plays for nothing."""

import itertools

import numpy as np
import pytest

from embodied_rft.data import Decisions
from embodied_rft.evaluation.evaluate import evaluate, evaluation_seeds
from embodied_rft.evaluation.film import roll_out
from embodied_rft.experience.schedule import Schedule
from embodied_rft.policy import Policy
from embodied_rft.pools.config import EnvConfig
from embodied_rft.pools.pool import open_pool
from tests.lab.toys import SeedPool


class Watched(SeedPool):
    """Notes which seeds are started, and how many environments step."""

    def __init__(self, num_envs, **options):
        super().__init__(num_envs, **options)
        self.started, self.stepped = [], 0

    def reset(self, seeds, mask=None, options=None):
        self.started += np.asarray(seeds)[np.ones(self.num_envs, bool) if mask is None else mask].tolist()
        return super().reset(seeds, mask, options)

    def step(self, action):
        self.stepped += int((~self.over).sum())
        return super().step(action)


def still(observation):
    count = len(next(iter(observation.values())))
    return Decisions(np.zeros((count, 1), np.float32), np.zeros((count, 1), np.float32))


@pytest.mark.parametrize("num_envs", [1, 4, 13])
def test_each_episode_is_started_once_and_its_steps_are_all_that_is_stepped(num_envs):
    pool, todo, ended = Watched(num_envs), iter(enumerate(range(100, 113))), {}
    schedule = Schedule(pool, lambda count: list(itertools.islice(todo, count)))
    schedule.fill()
    while schedule.playing.any():
        played = schedule.play(still)
        for env in played.ended:
            ended[int(schedule.episode[env])] = int(schedule.seed[env]), int(schedule.step[env]), schedule.returned[env]
        schedule.fill(played.over)
    assert ended == {i: (seed, 1 + seed % 5, 1 + seed % 5) for i, seed in enumerate(range(100, 113))}
    assert pool.started == list(range(100, 113)) and pool.stepped == sum(1 + seed % 5 for seed in pool.started)


def test_a_broken_episode_is_void_and_its_environment_free():
    pool, todo = Watched(2, break_always={3}, break_at=2), iter([(0, 3), (1, 4), (2, 5)])
    schedule = Schedule(pool, lambda count: list(itertools.islice(todo, count)))
    schedule.fill()
    played = [schedule.play(still), schedule.play(still)]
    assert [list(one.broken) for one in played] == [[], [0]] and list(played[1].streams) == [1]
    schedule.fill(played[1].over)
    assert schedule.episode.tolist() == [2, 1] and schedule.step.tolist() == [0, 2]


def test_a_film_shows_the_episode_that_was_judged():
    env = EnvConfig(id="Corridor-v0", num_envs=3, options={"spread": 4, "success": "middle"})
    pool, seeds = open_pool(env, purpose="evaluation"), evaluation_seeds(6)
    judged = evaluate(still, pool, seeds)
    pool.close()
    for seed, success, returned in zip(seeds, judged.results, judged.returns, strict=True):
        rolled = roll_out(still, env, seed, Policy(), render_mode=None)
        assert (rolled.success, rolled.total, rolled.told) == (success, returned, True)
    assert len(set(judged.returns)) > 1
