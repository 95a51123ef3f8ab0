"""No option without effect, of environments of other packages and those who show how they are played."""

import functools
import importlib.util

import gymnasium
import numpy as np
import pytest

from embodied_rft import Infrastructure, registry
from embodied_rft.experience.demonstrate import make_demonstrator
from embodied_rft.seeding import evaluation_seed
from tests.lab.effects import Walk, listed, tally
from tests.lab.open_env import HERE, shared
from tests.lab.worlds import IDS, PACKAGES, QUICK, SERVED, story

BASE = {**QUICK, "Arcade": {"size": 16, "wait": 3, "length": 20}, "Crafter": {"area": 16, "length": 20}}
VALUES = {
    "BabyAI": {"level": "GoToObj-v0", "observation": "state", "view": "whole"},
    "MiniGrid": {"level": "Empty-5x5-v0", "observation": "state", "view": "whole"},
    "Arcade": {"game": "Breakout", "goal": -100, "size": 20, "length": 5},
    "Crafter": {"goal": "collect_sapling", "length": 5, "size": 80},
    "TextGame": {"reward": "progress", "length": 1},
}
SERVER = "a server's"  # stands for the address of one
SERVES = {"url": "http://127.0.0.1:9", "action": "json", "message": "reply", "success": "solved", "refused": -0.5}
SERVES |= {"length": 2, "timeout": 0.2, "max_chars": 30}
EXEMPT = {"folder": "where files are kept is no business of what they hold"}


def visit(id, options, situation):
    """A few steps from seeds of training and of evaluation."""
    env = gymnasium.make(id, **options)
    try:
        seeds = (1, 2, evaluation_seed(2)) if "expert" in env.observation_space.spaces else (1, evaluation_seed(2))
        told = [follow(env, seed) for seed in seeds]
        return [*told, env.unwrapped.describe().text, str(env.observation_space)]
    finally:
        env.close()


def follow(env, seed):
    """What an expert meets where there is one, else what a few actions do."""
    if "expert" not in env.observation_space.spaces:
        return story(env.unwrapped, 24, seed=seed)
    observation, over = env.reset(seed=seed)[0], False
    told = [observation]
    while not over and len(told) < 12:
        told.append(env.step(observation["expert"]))
        observation, over = told[-1][0], told[-1][2] or told[-1][3]
    return told


def talk(id, options, situation):
    """What a client of OpenEnv hears: wrong and slow actions, and guesses until one is right."""
    url = shared("text").url if options["url"] == SERVER else options["url"]
    told = []
    with gymnasium.make(id, **{**options, "url": url}) as env:
        for said in (["9" * 41, "1", "hang"], [*map(str, range(10)), '{"word": "3"}']):
            try:
                told.append(env.reset(seed=1))
                for word in said:
                    told.append(env.step(word))
                    if any(told[-1][2:4]):
                        break
            except Infrastructure as error:
                told.append(error.reason)
    return [*told, str(env.observation_space)]


def demonstrate(id, options, situation):
    """What a demonstrator does in twelve steps."""
    env = gymnasium.make(id, **BASE[IDS[id]]).unwrapped
    demonstrator, rng, observation = make_demonstrator(id, **options), np.random.default_rng(0), env.reset(seed=0)[0]
    done = []
    for _ in range(12):
        done.append(demonstrator.act({"expert": [observation["expert"]]}, rng)[0])
        observation, *_, over, late, _ = env.step(done[-1])
        if over or late:
            observation, _ = env.reset()
    env.close()
    return [str(each) for each in done]


def walks():
    """All of this file whose package is installed."""
    found = []
    for id, name in IDS.items():
        if importlib.util.find_spec(PACKAGES[name]) is None:
            continue
        options = listed("env", id, id)
        found.append(Walk(f"env {id}", options, functools.partial(visit, id), BASE[name], VALUES[name], exempt=EXEMPT))
        if id in registry.shipped("demonstrator"):
            options = listed("demonstrator", id, f"demonstrator {id}")
            found.append(Walk(f"demonstrator {id}", options, functools.partial(demonstrate, id)))
    if HERE:
        (id,) = SERVED
        found.append(Walk(f"env {id}", listed("env", id, id), functools.partial(talk, id), {"url": SERVER}, SERVES))
    return found


def test_options_of_worlds():
    if not (known := walks()):
        pytest.skip("no package of another world is installed")
    found = tally(known)
    print(found)
    assert not found["dead"], found["dead"]
