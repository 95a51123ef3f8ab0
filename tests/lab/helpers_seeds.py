"""Environments whose initial state comes from elsewhere than `reset(seed=...)`; and wrappers of a third party."""

import random

import gymnasium
import numpy as np
from gymnasium import spaces


class Seeded(gymnasium.Env):
    """State [1], drawn at reset as `by` says; the reward of a step shows a hidden goal.

    Args:
        by: "np_random" (Gymnasium's), "method" (`seed()`), "flag" (Meta-World's), "space", "numpy", "random", "remake"
            (only when it is made), "nothing", "constant".
        bits: of the largest seed that its simulator takes.
    """

    def __init__(self, *, by="np_random", bits=64):
        self.observation_space = spaces.Box(-9, 9, (1,), np.float32)
        self.action_space = spaces.Box(-1, 1, (1,), np.float32)
        self.by, self.bits, self.steps = by, bits, 0
        self.seeded_rand_vec = False
        self.dice = np.random.default_rng()
        self.born = np.random.normal()

    def seed(self, seed):
        if self.by in ("method", "flag"):
            self.dice = np.random.default_rng(seed)

    def _draw(self):
        if self.by == "space":
            return float(self.observation_space.sample()[0])
        return {
            "np_random": self.np_random.normal,
            "method": self.dice.normal,
            "flag": self.dice.normal if self.seeded_rand_vec else np.random.default_rng().normal,
            "numpy": np.random.normal,
            "random": lambda: random.gauss(0, 1),
            "remake": lambda: self.born,
            "nothing": np.random.default_rng().normal,
            "constant": lambda: 0.5,
        }[self.by]()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None and not 0 <= seed < 2**self.bits:
            raise OverflowError(f"seed {seed} has more than {self.bits} bits")
        self.steps, self.state = 0, self._draw()
        return np.array([self.state], np.float32), {}

    def step(self, action):
        self.steps += 1
        if self.by in ("numpy", "random"):
            self.state += 0.1 * self._draw()
        return np.array([self.state], np.float32), float(action[0]), False, self.steps >= 5, {}


class Doubled(gymnasium.RewardWrapper):
    """Twice the reward; state saving cannot know what it holds."""

    def __init__(self, env, *, factor: float = 2.0):
        super().__init__(env)
        self.factor = factor

    def reward(self, reward):
        return self.factor * reward


if "Seeded-v0" not in gymnasium.registry:
    gymnasium.register("Seeded-v0", entry_point="tests.lab.helpers_seeds:Seeded")
