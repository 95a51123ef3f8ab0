"""A corridor with a small prize near and a large one far: the smallest task that needs bootstrapping."""

import gymnasium
import numpy as np
from gymnasium import spaces


class Corridor(gymnasium.Env):
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


def register():
    """Corridor-v0."""
    if "Corridor-v0" not in gymnasium.registry:
        gymnasium.register("Corridor-v0", Corridor)
