"""A toy task that can be solved from its state or from its image: walk to the dot."""

import gymnasium
import numpy as np

from embodied_rft import registry

ID = "toy/WalkToDot-v0"
SPEED, RADIUS, SIZE = 0.25, 0.15, 16


class WalkToDot(gymnasium.Env):
    """A walker in the unit square. "state" [4] has walker and dot, "robot_state" [2] the walker, "image" the dot.

    Args:
        camera: observe the image.
        blank: the image shows nothing.
    """

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(self, *, camera=False, blank=False, render_mode=None):
        self.camera, self.blank = camera, blank
        spaces = {
            "state": gymnasium.spaces.Box(-1, 2, (4,), np.float32),
            "robot_state": gymnasium.spaces.Box(-1, 2, (2,), np.float32),
        }
        if camera:
            spaces["image"] = gymnasium.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)
        self.observation_space = gymnasium.spaces.Dict(spaces)
        self.action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.walker, self.dot = self.np_random.random(2), self.np_random.random(2)
        return self._observe(), {}

    def step(self, action):
        self.walker = (self.walker + SPEED * np.clip(action, -1, 1)).clip(0, 1)
        success = bool(np.linalg.norm(self.walker - self.dot) < RADIUS)
        return self._observe(), float(success), success, False, {"is_success": float(success)}

    def _observe(self):
        state = np.concatenate([self.walker, self.dot]).astype(np.float32)
        observation = {"state": state, "robot_state": state[:2].copy()}
        if self.camera:
            observation["image"] = self._picture()
        return observation

    def _picture(self):
        if self.blank:
            return np.zeros((SIZE, SIZE, 3), np.uint8)
        grid = np.stack(np.meshgrid(*[np.linspace(0, 1, SIZE)] * 2, indexing="ij"), -1)
        dot = np.exp(-((grid - self.dot) ** 2).sum(-1) / 0.02)
        return (255 * dot[..., None] * np.ones(3)).astype(np.uint8)


@registry.register("demonstrator", ID)
class Walker:
    """Straight to the dot, with Gaussian noise on the action."""

    def __init__(self, *, noise=0.0):
        self.noise = noise

    def act(self, observation, rng):
        way = (observation["state"][:, 2:] - observation["state"][:, :2]) / SPEED
        action = way / np.maximum(np.abs(way).max(1, keepdims=True), 1)
        return (action + self.noise * rng.standard_normal(action.shape)).clip(-1, 1).astype(np.float32)


gymnasium.register(id=ID, entry_point=WalkToDot, max_episode_steps=6)
