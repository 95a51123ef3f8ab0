"""A point that walks to a goal, with a known best policy, and made-up batches, for tests of learning.

Pools as in docs/architecture.md, without physics. Legend: N environments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch

from embodied_rft.data import Batch, Field, Space, Tree
from embodied_rft.names import UserError
from embodied_rft.pools.incidents import Incidents
from embodied_rft.pools.protocol import Pool, StepResult, flatten_space
from embodied_rft.pools.spaces import DISCRETE, Choices
from embodied_rft.seeding import FIRST_EVALUATION_SEED


def random_batch(observation_space: Space, action_space: Space, *, size: int = 64, seed: int = 0) -> Batch:
    """A batch of made-up decisions that fits the spaces; the last tenth of the rows terminated.

    Args:
        observation_space: all of it but texts is filled.
        action_space: a Box, or choices (Discrete, MultiDiscrete, MultiBinary).
        size: B.
        seed: of the numbers.
    """
    rng = np.random.default_rng(seed)
    leaves = flatten_space(observation_space)

    def observe() -> dict[str, torch.Tensor]:
        tree = {}
        for key, leaf in leaves.items():
            if isinstance(leaf, DISCRETE):
                tree[key] = torch.from_numpy(_random_actions(leaf, size, rng)[0])
            if not isinstance(leaf, gym.spaces.Box):
                continue
            image = leaf.dtype == np.uint8
            values = rng.integers(0, 256, (size, *leaf.shape)) if image else rng.standard_normal((size, *leaf.shape))
            tree[key] = torch.from_numpy(values.astype(np.uint8 if image else np.float32))
        return tree

    action, units = _random_actions(action_space, size, rng)
    discount = np.where(np.arange(size) < 0.9 * size, 0.97, 0.0)
    return Batch(
        observation=observe(),
        action=torch.from_numpy(action),
        reward=torch.from_numpy(rng.standard_normal(size).astype(np.float32)),
        discount=torch.from_numpy(discount.astype(np.float32)),
        next_observation=observe(),
        log_prob=torch.zeros(size, units),
        mask=torch.ones(size, units, dtype=torch.bool),
        notes={"mc_return": torch.from_numpy(rng.standard_normal(size).astype(np.float32))},
        columns={"source": rng.integers(0, 3, size), "group": np.arange(size) // 4},
        num_decisions=size,
        num_units=size * units,
    )


def _random_actions(space: Space, size: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """(actions [size, ...], units of a decision)."""
    if isinstance(space, gym.spaces.Box):
        return rng.uniform(space.low, space.high, (size, *space.shape)).astype(np.float32), 1
    choices = Choices(space)
    index = rng.integers(0, choices.sizes, (size, len(choices.sizes)))
    return choices.action(torch.from_numpy(index)).numpy(), len(choices.sizes)


class PointReach(Pool):
    """A point in the unit square must come within `radius` of a goal; it moves by `speed` times the action a step.

    Observation {"observation": [x, y, goal x - x, goal y - y]}; the best policy is known: straight to the goal, which
    takes at most ceil((1.4 - radius) / speed) decisions.

    Args:
        num_envs: N.
        reward: "sparse" (1 when the goal is reached, which terminates, else 0), "steps" (-1 for each decision until it
            terminates), or "dense" (minus the distance; never terminates).
        num_steps: decisions until truncation.
        radius: of the goal.
        speed: distance a full action moves along each axis.
        trap: half width of a square around the centre that ends an episode without success; 0: none.
        purpose: "training" or "evaluation": which seeds are allowed.
    """

    can_save = True

    def __init__(
        self,
        num_envs: int = 16,
        *,
        reward: Literal["sparse", "steps", "dense"] = "sparse",
        num_steps: int = 12,
        radius: float = 0.1,
        speed: float = 0.2,
        trap: float = 0.0,
        purpose: Literal["training", "evaluation"] = "training",
    ) -> None:
        self.num_envs, self.reward, self.num_steps = num_envs, reward, num_steps
        self.radius, self.speed, self.trap, self.purpose = radius, speed, trap, purpose
        self.observation_space = gym.spaces.Box(-2, 2, (4,), np.float32)
        self.action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
        self.fields = {"observation": Field((4,))}
        self.action_field = Field((2,))
        self.incidents = Incidents()
        self.position = np.zeros((num_envs, 2))
        self.goal = np.zeros((num_envs, 2))
        self.elapsed = np.zeros(num_envs, dtype=np.int64)

    @property
    def observation(self) -> Tree:
        """The current observation of all N."""
        return self._observe()

    def reset(self, seeds: Any, mask: np.ndarray | None = None, options: Any = None) -> Tree:
        """Start and goal of each environment under `mask` from its seed alone."""
        for i in range(self.num_envs) if mask is None else np.flatnonzero(mask):
            if (int(seeds[i]) >= FIRST_EVALUATION_SEED) != (self.purpose == "evaluation"):
                raise UserError(f"seed {int(seeds[i])} is not for {self.purpose}; evaluation seeds are >= 2**31")
            self.position[i], self.goal[i] = self._start(np.random.default_rng(int(seeds[i])))
            self.elapsed[i] = 0
        return self._observe()

    def _start(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        while True:
            position, goal = rng.random(2), rng.random(2)
            far = np.linalg.norm(goal - position) > 2 * self.radius
            free = min(np.abs(position - 0.5).max(), np.abs(goal - 0.5).max()) > self.trap + self.radius
            if far and (free or not self.trap):
                return position, goal

    def _observe(self) -> dict[str, np.ndarray]:
        return {"observation": np.concatenate([self.position, self.goal - self.position], 1).astype(np.float32)}

    def step(self, action: Any) -> StepResult:
        """Move, judge."""
        self.position = (self.position + self.speed * np.clip(action, -1, 1)).clip(0, 1)
        self.elapsed += 1
        distance = np.linalg.norm(self.goal - self.position, axis=1)
        success = distance < self.radius
        trapped = (np.abs(self.position - 0.5).max(1) < self.trap) if self.trap else np.zeros(self.num_envs, dtype=bool)
        reward = {"sparse": success * 1.0, "steps": success - 1.0, "dense": -distance}[self.reward]
        terminated = np.zeros_like(success) if self.reward == "dense" else success | trapped
        truncated = (self.elapsed >= self.num_steps) & ~terminated
        return StepResult(
            observation=self._observe(),
            reward=reward.astype(np.float32),
            terminated=terminated,
            truncated=truncated,
            info={"success": success},
            valid=np.ones(self.num_envs, dtype=bool),
        )

    def get_state(self) -> dict[str, np.ndarray]:
        """Everything, as arrays."""
        return {"position": self.position.copy(), "goal": self.goal.copy(), "elapsed": self.elapsed.copy()}

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from `get_state`."""
        self.position, self.goal, self.elapsed = (state[k].copy() for k in ("position", "goal", "elapsed"))

    def close(self) -> None:
        """Nothing to close."""


class PointDemonstrator:
    """Walks to the goal of `PointReach`, imperfectly.

    Args:
        pool: gives speed.
        noise: standard deviation added to the action.
        wrong: share of decisions that walk straight away from the goal instead: their mean with the good ones is a
            policy that goes nowhere, so cloning fails where reinforcement learning need not.
        axes: which axes it controls; (0,) knows nothing about the second.
        skill: factor on the action; below 1 it is too slow to arrive in time.
    """

    def __init__(
        self,
        pool: PointReach,
        *,
        noise: float = 0.0,
        wrong: float = 0.0,
        axes: tuple[int, ...] = (0, 1),
        skill: float = 1.0,
    ) -> None:
        self.speed, self.noise, self.wrong, self.axes, self.skill = pool.speed, noise, wrong, axes, skill

    def act(self, observation: Tree, rng: np.random.Generator) -> np.ndarray:
        """Actions [N, 2] for observations [N, 4]."""
        offset = observation["observation"][:, 2:]
        action = np.zeros_like(offset)
        for axis in self.axes:
            action[:, axis] = offset[:, axis]
        action = self.skill * action / np.maximum(np.abs(action).max(1, keepdims=True), self.speed)
        action = np.where(rng.random((len(action), 1)) < self.wrong, -action, action)
        noisy: np.ndarray = action + self.noise * rng.standard_normal(action.shape)
        return noisy.clip(-1, 1).astype(np.float32)
