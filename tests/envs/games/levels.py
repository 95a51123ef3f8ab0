"""Difficulties that the tests and the pages speak of, and how games are played to their end."""

import gymnasium
import numpy as np

import embodied_rft.envs  # noqa: F401
from embodied_rft import registry

# {game: [(options, least success of its player over 100 episodes)]}; the easiest first
LEVELS = {
    "NumberLine": [({"max_position": 2}, 1.0), ({}, 1.0), ({"max_position": 30}, 1.0)],
    "EZPoints": [({"target": 5}, 1.0), ({}, 1.0), ({"target": 18}, 1.0)],
    "Points24": [({"solvable": True}, 1.0), ({"solvable": True, "face_cards": "rank", "target": 36}, 1.0), ({}, 0.6)],
    "BlackJack": [({"dealer_stands": 12}, 0.45), ({}, 0.33), ({"natural": True, "dealer_stands": 19}, 0.33)],
    "GeneralPoints": [
        ({"cards": 3, "target": 12}, 1.0),
        ({}, 1.0),
        ({"face_cards": "rank", "needs_face": True, "suits": "red", "tries": 1}, 1.0),
    ],
    "TwentyFortyEight": [({"goal": 64}, 1.0), ({"goal": 256}, 0.97), ({"goal": 512}, 0.9)],
    "ShisenSho": [({"size": 4}, 0.85), ({}, 0.9), ({"size": 6, "colors": 2, "shapes": 5}, 0.9)],
    "Swap": [({"size": 5, "kinds": 4}, 1.0), ({}, 0.9), ({"goal": 90}, 0.8)],
    "Sokoban": [({"size": 5}, 1.0), ({}, 1.0), ({"size": 7, "boxes": 2}, 1.0)],
    "FrozenLake": [({"size": 3}, 1.0), ({}, 1.0), ({"size": 8, "ice": 0.7}, 1.0)],
}
ALL = [(game, options) for game, levels in LEVELS.items() for options, _ in levels]


def make(game, num_envs, *, observation="state", **options):
    """The batch of a game as a vector environment that is reset by hand."""
    options |= {"num_envs": num_envs, "observation": observation, "autoreset_mode": "Disabled"}
    return gymnasium.make_vec(f"embodied_rft/{game}-v0", **options)


def player(game, **options):
    """Who plays it well."""
    return registry.find("demonstrator", f"embodied_rft/{game}-v0")(**options)


def play(env, act, *, seed=0, steps=4000):
    """One episode each: success [N], return [N], invalid moves [N]."""
    observation, _ = env.reset(seed=seed)
    running, success, total = np.ones(env.num_envs, bool), np.zeros(env.num_envs, bool), np.zeros(env.num_envs)
    invalid = np.zeros(env.num_envs, np.int64)
    for _ in range(steps):
        observation, reward, terminated, truncated, info = env.step(act(observation))
        total += np.where(running, reward, 0.0)
        success = np.where(running, info["is_success"] > 0, success)
        invalid = np.where(running, info["invalid/moves"], invalid)
        running &= ~(terminated | truncated)
        if not running.any():
            return success, total, invalid
        if (terminated | truncated).any():
            observation, _ = env.reset(options={"reset_mask": terminated | truncated})
    raise AssertionError(f"{running.sum()} episodes have no end")
