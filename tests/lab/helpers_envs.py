"""Small Gymnasium environments that misbehave on demand, for the tests of pools and workers.

`Moody` walks in the plane and does what its option `trouble` says when its episode was started from `TROUBLE_SEED`.
"""

import os
import string
import time

import gymnasium
import numpy as np
from gymnasium import spaces

from embodied_rft.seeding import pack_generator, unpack_generator

TROUBLE_SEED = 13
TROUBLE_STEP = 2


class Moody(gymnasium.Env):
    """State [2], action [2]; the reward is minus the distance to the origin; success within 0.5.

    Args:
        trouble: see above.
        stride: how far the largest action goes.
        pixels: whether an image that counts the steps is shown, too.
    """

    metadata = {"render_modes": []}

    def __init__(self, *, trouble: str = "", stride: float = 0.3, pixels: bool = True, render_mode=None):
        if trouble == "construct":
            raise ValueError("the gripper of this robot is not plugged in")
        image = {"pixels": spaces.Box(0, 255, (3, 3, 1), np.uint8)} if pixels else {}
        self.observation_space = spaces.Dict({"state": spaces.Box(-np.inf, np.inf, (2,), np.float32), **image})
        self.stride, self.pixels = stride, pixels
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.trouble, self.render_mode = trouble, render_mode
        self.position, self.steps, self.troubled = np.zeros(2), 0, False

    def _observe(self):
        image = {"pixels": np.full((3, 3, 1), self.steps % 256, dtype=np.uint8)} if self.pixels else {}
        return {"state": self.position.astype(np.float32), **image}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = self.np_random.normal(size=2) if not options else np.array(options["position"], dtype=float)
        self.steps, self.troubled = 0, seed == TROUBLE_SEED
        if self.troubled and self.trouble == "nan_reset":
            self.position[0] = np.nan
        if self.troubled and self.trouble == "crash_reset":
            os._exit(3)
        return self._observe(), {"is_success": False}

    def step(self, action):
        self.steps += 1
        self.position = self.position + self.stride * np.asarray(action) + 0.01 * self.np_random.normal(size=2)
        reward = -float(np.linalg.norm(self.position))
        if self.troubled and self.steps == TROUBLE_STEP:
            reward = self._make_trouble(reward)
        return self._observe(), reward, False, self.steps >= 8, {"is_success": bool(reward > -0.5)}

    def _make_trouble(self, reward):
        if self.trouble == "hang":
            time.sleep(600)
        if self.trouble == "crash":
            os._exit(5)
        if self.trouble == "raise":
            raise ArithmeticError("the simulated motor burnt out")
        if self.trouble == "nan":
            self.position[0] = np.nan
        return float("inf") if self.trouble == "inf_reward" else reward

    def get_state(self):
        rng = pack_generator(self.np_random)
        return {"position": self.position.copy(), "steps": np.array(self.steps), "rng": rng}

    def set_state(self, state):
        self.position, self.steps = state["position"].copy(), int(state["steps"])
        unpack_generator(self.np_random, state["rng"])


class Chatter(gymnasium.Env):
    """Text in, text out: it repeats what it heard, and the episode ends at "bye"."""

    metadata = {"render_modes": []}

    def __init__(self, *, render_mode=None):
        self.observation_space = spaces.Text(99, charset=string.printable + "üß")
        self.action_space = spaces.Text(64, charset=string.printable + "üß")
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return f"hello {self.np_random.integers(1000)}", {}

    def step(self, action):
        return f"you said {action}", float(len(action)), action == "bye", False, {"success": action == "bye"}


class Goal(gymnasium.Env):
    """A point on a plane must stop close to a goal; -1 a step until it does, nothing ends an episode but the clock."""

    def __init__(self, penalty=0.0):
        self.action_space, self.penalty = spaces.Box(-1, 1, (2,), np.float32), penalty
        keys = {"observation": 2, "achieved_goal": 2, "desired_goal": 2}
        self.observation_space = spaces.Dict({k: spaces.Box(-2, 2, (n,), np.float32) for k, n in keys.items()})

    def see(self):
        seen = {"observation": self.at, "achieved_goal": self.at, "desired_goal": self.goal}
        return {key: value.astype(np.float32) for key, value in seen.items()}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at, self.goal = np.zeros(2), self.np_random.uniform(-1, 1, 2)
        return self.see(), {}

    def step(self, action):
        self.at = np.clip(self.at + 0.2 * action, -1, 1)
        reward = float(self.compute_reward(self.at, self.goal, {}))
        return self.see(), reward - self.penalty, False, False, {"success": reward == 0}

    def compute_reward(self, achieved_goal, desired_goal, info):
        return -(np.linalg.norm(achieved_goal - desired_goal, axis=-1) > 0.15).astype(np.float32)


for name in ("Moody", "Chatter"):
    if f"{name}-v0" not in gymnasium.registry:
        gymnasium.register(f"{name}-v0", entry_point=f"tests.lab.helpers_envs:{name}", max_episode_steps=50)
if "Goal-v0" not in gymnasium.registry:
    gymnasium.register("Goal-v0", entry_point="tests.lab.helpers_envs:Goal", max_episode_steps=12)
