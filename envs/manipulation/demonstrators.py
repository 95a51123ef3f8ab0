"""Scripted demonstrators: memoryless closed-loop controllers over a batch of observations, with a noise knob.

They read nothing but the policy's own observation, so they can label any state. Found by id, or under the id of the
environment that they solve.

Shapes: N environments; observations as in `FetchTask`; lengths in metres.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np

from embodied_rft.names import UserError
from embodied_rft.registry import register

TABLE_HEIGHT = 0.42  # of the gripper when its fingers nearly touch the table
DECISION = 0.04  # seconds; observed velocities are displacements in one decision


class Scripted(ABC):
    """What they share: clip to [-1, 1], add Gaussian noise, clip again.

    Args:
        noise: standard deviation of the noise on every action dimension (an action spans [-1, 1]); 0 is deterministic.
    """

    def __init__(self, *, noise: float = 0.0) -> None:
        if not noise >= 0.0:
            raise UserError(f"noise is {noise}, expected a standard deviation >= 0 (0.4 makes most episodes fail)")
        self.noise = noise

    def act(self, observation: Mapping[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
        """Actions [N, 4] float32 for observations [N, ...]; `rng` is drawn from only if there is noise."""
        action = np.clip(self.command(observation), -1.0, 1.0)
        if self.noise:
            action = np.clip(action + rng.normal(0.0, self.noise, size=action.shape), -1.0, 1.0)
        return action.astype(np.float32)

    @abstractmethod
    def command(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """The intended actions [N, 4], before clipping and noise."""


@register("demonstrator", "fetch_reach", "embodied_rft/FetchReach-v0")
class FetchReachDemonstrator(Scripted):
    """Straight to the goal.

    Args:
        gain: action per metre (20 would cover the distance in one decision).
    """

    def __init__(self, *, noise: float = 0.0, gain: float = 10.0) -> None:
        super().__init__(noise=noise)
        self.gain = gain

    def command(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """Proportional control of the gripper."""
        error = observation["desired_goal"] - observation["achieved_goal"]
        return np.concatenate([self.gain * error, np.zeros((len(error), 1))], axis=1)


@register("demonstrator", "fetch_pick_and_place", "embodied_rft/FetchPickAndPlace-v0")
class FetchPickAndPlaceDemonstrator(Scripted):
    """Hover over the block with open fingers, descend, shut, carry it to the goal.

    Args:
        gain: action per metre.
        close_within: shut the fingers when the block's centre is this near to the grip point, metres.
    """

    def __init__(self, *, noise: float = 0.0, gain: float = 6.0, close_within: float = 0.022) -> None:
        super().__init__(noise=noise)
        self.gain, self.close_within = gain, close_within

    def command(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """See the class."""
        state, goal = observation["observation"], observation["desired_goal"]
        to_block, fingers = state[:, 6:9], state[:, 9:11].sum(axis=1)
        beside = np.linalg.norm(to_block[:, :2], axis=1)
        near = np.linalg.norm(to_block, axis=1) < self.close_within
        holds = near & (fingers < 0.055)  # the block is 50 mm wide, open fingers 100 mm apart
        hover = to_block + np.array([0.0, 0.0, 0.05])
        target = np.where((beside < self.close_within)[:, None], to_block, hover)
        target = np.where(holds[:, None], goal - observation["achieved_goal"], target)
        return np.concatenate([self.gain * target, np.where(near, -1.0, 1.0)[:, None]], axis=1)


@register("demonstrator", "fetch_push", "embodied_rft/FetchPush-v0")
class FetchPushDemonstrator(Scripted):
    """Go over the block to the side away from the goal, descend, push straight.

    Args:
        gain: action per metre.
        speed: largest action while pushing.
    """

    def __init__(self, *, noise: float = 0.0, gain: float = 15.0, speed: float = 0.7) -> None:
        super().__init__(noise=noise)
        self.gain, self.speed = gain, speed

    def command(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """See the class."""
        view = _Line(observation)
        behind = view.block[:, :2] - 0.06 * view.along - view.grip[:, :2]
        far = _norm(behind)
        low = view.grip[:, 2:3] < TABLE_HEIGHT + 0.025
        lined = (view.offset < 0.025) & (view.ahead > 0.02)
        push = np.minimum(self.gain * view.distance, self.speed) * view.along + 2 * self.gain * view.side
        blocked = low & (_norm(view.to_block) < 0.075)  # rise before anything else
        xy = np.where(lined & low, push, np.where(blocked, 0.0, self.gain * behind))
        height = np.where(lined | (far < 0.02), TABLE_HEIGHT, TABLE_HEIGHT + 0.08)
        z = self.gain * (height - view.grip[:, 2:3])
        action = np.concatenate([xy, z, np.zeros_like(z)], axis=1)
        return np.where(view.distance < 0.02, 0.0, action)


@register("demonstrator", "fetch_slide", "embodied_rft/FetchSlide-v0")
class FetchSlideDemonstrator(Scripted):
    """Line up behind the puck, hit it as hard as the distance asks for, let go.

    How hard the puck is hit depends on where in a decision the fingers meet it, which a controller of one action in
    40 ms cannot place better; and the far goals need more speed than the arm has. Without noise 31 % of 200 starts end
    at the goal (seeds 60000 to 60199) and half pass it: demonstrations to improve on, not to imitate.

    Args:
        gain: action per metre.
    """

    def __init__(self, *, noise: float = 0.0, gain: float = 16.6) -> None:
        super().__init__(noise=noise)
        self.gain = gain

    def command(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """See the class."""
        view, gap = _Line(observation), 0.085
        behind = view.block[:, :2] - gap * view.along - view.grip[:, :2]
        far = _norm(behind)
        low = view.grip[:, 2:3] < TABLE_HEIGHT + 0.02
        swinging = (view.grip_speed * view.along).sum(axis=1, keepdims=True) > 0.1
        in_reach = swinging & (view.ahead > 0.0) & (view.ahead < gap + 0.02)
        ready = low & (view.offset < 0.0165) & ((far < 0.014) | in_reach)
        power = 0.115 + 1.52 * view.distance + 0.178 * np.sqrt(view.distance)
        hit = power * view.along + self.gain * view.side
        blocked = low & (_norm(view.to_block) < 0.07) & (far > 0.03)  # rise before anything else
        xy = np.where(ready, hit, np.where(blocked, 0.0, self.gain * behind))
        height = np.where(ready | (far < 0.025), TABLE_HEIGHT, TABLE_HEIGHT + 0.067)
        sliding = _norm(view.block_speed) > 0.17
        xy, height = np.where(sliding, 0.0, xy), np.where(sliding, TABLE_HEIGHT, height)
        z = 10.0 * (height - view.grip[:, 2:3])
        return np.concatenate([xy, z, np.zeros_like(z)], axis=1)


class _Line:
    """The line from block to goal in the plane of the table, and where the gripper is beside it."""

    def __init__(self, observation: Mapping[str, np.ndarray]) -> None:
        state = observation["observation"]
        self.grip, self.block = state[:, 0:3], state[:, 3:6]
        self.grip_speed = state[:, 20:22] / DECISION  # metres per second
        self.block_speed = self.grip_speed + state[:, 14:16] / DECISION
        to_goal = (observation["desired_goal"] - self.block)[:, :2]
        self.distance = _norm(to_goal)
        self.along = to_goal / np.maximum(self.distance, 1e-6)
        self.to_block = (self.block - self.grip)[:, :2]
        self.ahead = (self.to_block * self.along).sum(axis=1, keepdims=True)
        self.side = self.to_block - self.ahead * self.along
        self.offset = _norm(self.side)


def _norm(vectors: np.ndarray) -> np.ndarray:
    """Lengths [N, 1] of vectors [N, D]."""
    return np.linalg.norm(vectors, axis=1, keepdims=True)
