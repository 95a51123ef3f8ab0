"""Tiny environments: a chain of cells that needs bootstrapping, and observations that need to be standardised."""

import gymnasium
import numpy as np
from gymnasium import spaces


class Chain(gymnasium.Env):
    """Cells 0 to 6, a start in 2 or 3; cell 0 ends it with reward 0.2, cell 6 with 1 and success.

    Args:
        actions: "discrete" (1 is left, 2 is right) or "multi" (two switches; right where they differ).
    """

    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, *, actions="discrete", render_mode=None):
        self.observation_space = spaces.Discrete(7, start=-3)
        multi = spaces.MultiDiscrete([2, 2], start=[0, 5])
        self.action_space = spaces.Discrete(2, start=1) if actions == "discrete" else multi
        self.multi, self.render_mode, self.cell, self.steps = actions == "multi", render_mode, 2, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cell, self.steps = int(self.np_random.integers(2, 4)), 0
        return self.cell - 3, {}

    def step(self, action):
        assert self.action_space.contains(action)
        right = (action[0] != action[1] - 5) if self.multi else action == 2
        self.cell, self.steps = self.cell + (1 if right else -1), self.steps + 1
        reward = {0: 0.2, 6: 1.0}.get(self.cell, 0.0)
        return self.cell - 3, reward, self.cell in (0, 6), self.steps >= 20, {"success": self.cell == 6}

    def get_state(self):
        return {"where": np.array([self.cell, self.steps])}

    def set_state(self, state):
        self.cell, self.steps = (int(number) for number in state["where"])

    def render(self):
        frame = np.zeros((16, 112, 3), np.uint8)
        frame[:, 16 * self.cell : 16 * self.cell + 16] = 255
        return frame


class Faraway(gymnasium.Env):
    """Ten steps in which observations [3] lie far from zero and drift away; reward for action 1 (or a large vector)."""

    metadata = {"render_modes": []}

    def __init__(self, *, actions="box", render_mode=None):
        self.observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.action_space = spaces.Box(-1, 1, (2,), np.float32) if actions == "box" else spaces.Discrete(3)
        self.render_mode, self.steps, self.phase = render_mode, 0, 0.0

    def _observe(self):
        wave = np.sin(self.phase + 3.7 * (self.steps + 1) * np.arange(1, 4))
        return (30 + 5 * self.steps + 10 * wave).astype(np.float32)

    def get_state(self):
        return {"where": np.array([self.steps, self.phase])}

    def set_state(self, state):
        self.steps, self.phase = int(state["where"][0]), float(state["where"][1])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.phase = 0, float(self.np_random.uniform(0, 6.28))
        return self._observe(), {}

    def step(self, action):
        self.steps += 1
        return self._observe(), float(np.mean(action)), False, self.steps >= 10, {"success": True}


def register():
    """Chain-v0 and Faraway-v0."""
    for name, cls in {"Chain-v0": Chain, "Faraway-v0": Faraway}.items():
        if name not in gymnasium.registry:
            gymnasium.register(name, cls)
