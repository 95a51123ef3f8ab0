"""What holds for every environment of another package: seeds, exact states, words, pictures, experts, clear errors."""

import subprocess
import sys
import warnings

import gymnasium
import numpy as np
import pytest

from embodied_rft.envs.worlds.world import World
from embodied_rft.experience.demonstrate import make_demonstrator
from embodied_rft.names import UserError
from embodied_rft.pools.pool import make_pool
from embodied_rft.pools.promises import random_actions, same
from embodied_rft.seeding import evaluation_seed
from embodied_rft.testing.check_env import check_env
from tests.lab.worlds import PACKAGES, QUICK, make, story


@pytest.mark.parametrize("name", PACKAGES)
def test_the_checker_passes(name):
    pytest.importorskip(PACKAGES[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(f"embodied_rft/{name}-v0", options=QUICK[name])


@pytest.mark.parametrize("name", PACKAGES)
def test_a_seed_is_an_episode_and_training_never_begins_where_evaluation_does(name):
    first, second = make(name), make(name)
    assert same(story(first, 12, seed=3), story(second, 12, seed=3))
    assert any(not same(story(first, 3, seed=3), story(first, 3, seed=seed)) for seed in (4, 5, 6, 7))
    starts = {seed: first.reset(seed=seed) and first.start for seed in range(6)}
    held_out = {first.reset(seed=evaluation_seed(index)) and first.start for index in range(6)}
    assert not held_out & set(starts.values())
    first.reset()  # goes on with the generator, and with the purpose
    assert first.start % 2 == 1


@pytest.mark.parametrize("name", PACKAGES)
def test_a_state_goes_on_bit_by_bit_in_another_environment(name):
    first, second = make(name), make(name)
    actions = random_actions(first.action_space, 30)
    story(first, 9, seed=1, actions=actions)
    state = {key: value.copy() for key, value in first.get_state().items()}
    assert all(isinstance(value, np.ndarray) for value in state.values())
    after = story(first, 20, actions=actions[9:]) + [first.reset()[0]]
    story(second, 4, seed=2)
    second.set_state(state)
    assert same(story(second, 20, actions=actions[9:]) + [second.reset()[0]], after)
    second.set_state({**state, "start": state["start"] + [2, 0]})  # the twin that begins elsewhere
    assert not same(story(second, 20, actions=actions[9:]), after[:-1])


@pytest.mark.parametrize("name", PACKAGES)
def test_words_pictures_and_ends(name):
    env = make(name, render_mode="ansi")
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(env.action_space.sample())
    env.reset(seed=0)
    said = env.describe()
    assert said.rules and said.state and env.render() == said.text
    if isinstance(env.action_space, gymnasium.spaces.Discrete):
        (words,) = said.words
        assert len(words) == len(set(words)) == env.action_space.n and set(said.legal) == set(words)
        with pytest.raises(UserError, match="is not in Discrete"):
            env.step(99)
        picture = make(name, render_mode="rgb_array")
        picture.reset(seed=0)
        assert picture.render().dtype == np.uint8 and picture.render().ndim == 3
    with pytest.raises(UserError, match="unknown reset option 'seed_of_level'"):
        env.reset(options={"seed_of_level": 3})
    with pytest.raises(UserError, match="unknown render_mode 'svg'"):
        make(name, render_mode="svg")


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_named_with_the_extra(name, monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    with pytest.raises(UserError, match=r"comes with the package .*pip install 'embodied-rft\[tasks\]'"):
        gymnasium.make(f"embodied_rft/{name}-v0")


def test_nothing_is_imported_before_it_is_made():
    script = "import sys, embodied_rft.envs; from embodied_rft.registry import load_plugins; load_plugins()"
    script += (
        f"; print([name for name in {sorted({*PACKAGES.values(), 'websockets', 'openenv'})} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name, levels", [
    ("BabyAI", [{"level": f"{level}-v0"} for level in ("GoToRedBallGrey", "PickupLoc", "PutNextLocal", "UnlockLocal")]),
    ("TextGame", [{"games": 3}, {"games": 2, "quest_length": 3, "reward": "progress"}]),
])  # fmt: skip
def test_experts_solve_their_worlds_from_the_observation(name, levels):
    pytest.importorskip(PACKAGES[name])
    for level in levels:
        solved, noisy = (play(name, 6, {**level, "expert": True}, noise=noise) for noise in (0.0, 0.5))
        assert solved[0] == 6 and noisy[1] > solved[1]  # it finds back from wrong moves, which take time
    with pytest.raises(UserError, match=r"set env\.options\.expert to true"):
        make_demonstrator(f"embodied_rft/{name}-v0").act({}, np.random.default_rng(0))


def play(name, episodes, options, *, noise):
    """How many episodes an expert solves, and decisions of all."""
    pool = make_pool(f"embodied_rft/{name}-v0", 1, options=options, kind="sync")
    expert, rng = make_demonstrator(f"embodied_rft/{name}-v0", noise=noise), np.random.default_rng(0)
    solved = decisions = 0
    try:
        for seed in range(episodes):
            observation, over = pool.reset(np.array([seed])), False
            while not over:
                told = pool.step(expert.act(observation, rng))
                observation, over, decisions = told.observation, bool(told.terminated | told.truncated), decisions + 1
            solved += int(told.info["success"][0])
        return solved, decisions
    finally:
        pool.close()


def test_an_expert_that_gives_up_says_done(monkeypatch):
    env = make("BabyAI")
    env.reset(seed=0)
    monkeypatch.setattr(env.bot, "replan", lambda action: 1 / 0)
    assert env.step(0)[0]["expert"] == env.step(0)[0]["expert"] == 6
    assert isinstance(env, World) and env.reset(seed=0)[0]["expert"] != 6
