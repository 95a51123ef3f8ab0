"""Spaces that are written down come back equal; what cannot be described says so."""

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from embodied_rft.pools.chunks import ChunkPool
from embodied_rft.pools.described import Described, describe, describe_pool, space_of
from embodied_rft.pools.pool import VectorPool
from embodied_rft.pools.spaces import ActionBox
from embodied_rft.pools.text_spaces import AnyText, ChatText
from embodied_rft.runs.tree_file import load, save

SPACES = [
    spaces.Box(-np.inf, np.array([1, 2, 3]), dtype=np.float64),
    spaces.Box(0, 255, (2, 4, 3), np.uint8),
    spaces.Discrete(4, start=-1),
    spaces.MultiDiscrete([[2, 3], [4, 5]], start=[[0, 1], [2, 3]]),
    spaces.MultiBinary((2, 3)),
    spaces.Text(7, min_length=2, charset="ab"),
    AnyText(99),
    ChatText(999),
    spaces.Dict({"b": spaces.Dict({"x": spaces.Discrete(2)}), "a": spaces.Box(-1, 1, (1,))}),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_a_space_comes_back_from_a_file(space, tmp_path):
    save(tmp_path / "file", describe(space))
    back = space_of(load(tmp_path / "file"))
    assert back == space and type(back) is type(space) and back.dtype == space.dtype
    space.seed(3), back.seed(3)
    np.testing.assert_equal(back.sample(), space.sample())
    if isinstance(space, spaces.Dict):
        assert list(back.spaces) == list(space.spaces)


def test_what_is_not_known_is_not_described():
    unknown = ActionBox(-1, 1, (2,))  # of another class: who reads it may ask for that class
    assert describe(unknown) is None and describe(spaces.Dict({"a": SPACES[0], "b": unknown})) is None


def test_a_described_pool_has_what_networks_ask_for_and_never_runs():
    env = gymnasium.make("MountainCarContinuous-v0")
    shown, taken = describe(env.observation_space), describe(env.action_space)
    pool = VectorPool(Described({"observation": shown, "action": taken}))
    assert describe_pool(pool)["action"]["low"] == [-1]
    assert ChunkPool(pool, horizon=4).action_space.shape == (4,)
    with pytest.raises(RuntimeError, match="were not made"):
        pool.reset([0])
