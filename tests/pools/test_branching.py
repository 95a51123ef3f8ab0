"""Episodes that branch: one environment is saved, and goes on the same way in any place, however often."""

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

import embodied_rft.envs  # noqa: F401
from embodied_rft.pools.pool import make_pool

TOLD = {"of": "CartPole-v1", "observe": "text", "state": True}
CASES = [
    ("embodied_rft/TwentyFortyEight-v0", {"observation": "both"}, "native"),
    ("embodied_rft/Swap-v0", {"observation": "state"}, "sync"),
    ("embodied_rft/FrozenLake-v0", {"slip": 0.5}, "workers"),
    ("CartPole-v1", {}, "sync"),
    ("CartPole-v1", {}, "workers"),
    ("MiniGrid-Empty-Random-5x5-v0", {}, "sync"),
    ("embodied_rft/ToldSokoban-v0", {"observe": "both"}, "native"),
    ("embodied_rft/Told-v0", TOLD, "native"),
    ("embodied_rft/Told-v0", TOLD, "sync"),
    ("embodied_rft/FetchReach-v0", {}, "native"),
]


def row_of(result, row):
    seen = {key: value[row] for key, value in result.observation.items()}
    return repr((seen, result.reward[row], result.terminated[row], result.truncated[row], result.valid[row]))


@pytest.mark.parametrize(("id", "options", "kind"), CASES, ids=str)
def test_a_branch_goes_on_the_same_way_in_every_place(id, options, kind):
    pool = make_pool(id, 3, kind=kind, num_workers=2 if kind == "workers" else None, options=options)
    try:
        pool.reset(np.array([4, 9, 16]))
        text = isinstance(pool.action_space, spaces.Text)
        pool.action_space.seed(0)
        words = None if not text else ["0", "1"] if "of" in options else ["left", "right", "up", "down", "what"]

        def act(number):
            if text:
                return [f"<answer>{words[number % len(words)]}</answer>"] * 3
            return np.stack([actions[number]] * 3)

        actions = [pool.action_space.sample() for _ in range(9)]
        for number in range(2):
            pool.step(act(number))
        branch = pool.save(1)
        assert branch.seed == 9 and not branch.idle
        path = [row_of(pool.step(act(number)), 1) for number in range(2, 5)]
        before = {key: value[0] for key, value in pool.observation.items()}
        pool.restore(1, branch)
        pool.restore(2, branch)
        assert repr(before) == repr(
            {key: value[0] for key, value in pool.observation.items()}
        )  # others are not touched
        for number, expected in zip(range(2, 5), path, strict=True):
            result = pool.step(act(number))
            assert row_of(result, 1) == row_of(result, 2) == expected
        pool.restore(0, branch)  # once more, after it was gone on with
        assert row_of(pool.step(act(2)), 0) == path[0]
    finally:
        pool.close()


def test_an_episode_that_ended_comes_back_to_life():
    pool = make_pool("embodied_rft/NumberLine-v0", 2, options={"observation": "state"})
    pool.reset(np.array([3, 4]))
    target, current = pool.observation["state"][0]
    branch = pool.save(0)
    toward = int(target > current)
    while not pool.step(np.array([toward, 0])).terminated[0]:
        pass
    pool.restore(0, branch)
    assert pool.observation["state"][0].tolist() == [target, current]
    assert pool.step(np.array([toward, 0])).valid[0]


class Uncopied(gymnasium.Env):
    """Holds what cannot be copied."""

    observation_space, action_space = spaces.Box(0, 1, (1,), np.float32), spaces.Discrete(2)

    def __init__(self):
        self.iterator = (number for number in range(9))

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), 0.0, False, False, {}


gymnasium.register("branching/Uncopied-v0", Uncopied)


def test_what_cannot_branch_says_so():
    pool = make_pool("branching/Uncopied-v0", 1)
    with pytest.raises(ValueError, match="there is nothing to be saved"):
        pool.save(0)
    pool.reset(np.arange(1))
    with pytest.raises(ValueError, match="offers no get_state, and it cannot be copied"):
        pool.save(0)
    with pytest.raises(ValueError, match="call reset before restore"):
        make_pool("CartPole-v1", 1).restore(0, None)
