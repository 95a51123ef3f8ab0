"""Environments of other packages: which package each needs, options that make it quick, and what an episode tells."""

import copy

import gymnasium
import pytest

import embodied_rft.envs  # noqa: F401
from embodied_rft import registry
from embodied_rft.pools.promises import random_actions

PACKAGES = {
    "BabyAI": "minigrid",
    "MiniGrid": "minigrid",
    "Arcade": "ale_py",
    "Crafter": "crafter",
    "TextGame": "textworld",
}
QUICK = {
    "BabyAI": {"level": "GoToLocal-v0", "observation": "both", "expert": True},
    "MiniGrid": {"level": "DoorKey-6x6-v0", "observation": "both", "mission": True},
    "Arcade": {"size": 42, "wait": 3},
    "Crafter": {"area": 16},
    "TextGame": {"games": 2, "held_out": 2, "expert": True},
}
SERVED = {"embodied_rft/OpenEnv-v0"}  # need a server
registry.load_plugins()
PAGES = {id for id in gymnasium.registry if id.startswith("embodied_rft/MiniWoB")}  # need a browser: tests/envs/gui
IDS = {f"embodied_rft/{name}-v0": name for name in PACKAGES}


def make(name, **options):
    """A world, or a skipped test where its package is not installed."""
    pytest.importorskip(PACKAGES[name])
    return gymnasium.make(f"embodied_rft/{name}-v0", **{**QUICK[name], **options}).unwrapped


def story(env, count, *, seed=None, actions=None):
    """What `count` steps tell, from a seed on or from where the environment is."""
    told = [] if seed is None else [env.reset(seed=seed)[0]]
    for action in (actions or random_actions(env.action_space, count))[:count]:
        told.append(copy.deepcopy(env.step(action)))
        if any(told[-1][2:4]):
            break
    return told
