"""Executing action chunks: one decision of a chunk policy is several environment steps.

Two pools around any pool. Under `ChunkPool` a decision is the whole chunk, so that every algorithm credits chunks
without knowing of them. Under `QueuedPool` decisions stay single steps, and the next action of a frozen chunk policy's
plan is an observation key: no policy holds a queue, and resets, resumes and replays are exact. Boundary: knows pools
and arrays; a policy is only what has `plan`.

Legend: N environments, A action dimensions, H horizon (steps that a chunk holds), E steps of it that are executed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import ArrayLike

from embodied_rft.data import Action, Field, Space, Tree, pick_tree
from embodied_rft.names import UserError
from embodied_rft.pools.protocol import Pool, Seeding, StepResult, merge, untold_value
from embodied_rft.pools.spaces import ActionBox, what_suits

BASE_ACTION = "base_action"  # the observation key of a queued plan


class ChunkBox(spaces.Box):
    """The action space of chunks: [H * A], H copies of the step's bounds one after the other.

    Args:
        step_space: of one environment step, a Box of shape (A,).
        horizon: H.
    """

    def __init__(self, step_space: Space, *, horizon: int) -> None:
        if not isinstance(step_space, spaces.Box) or len(step_space.shape) != 1:
            raise UserError(f"action space {step_space}: chunks need a Box of shape (A,). {what_suits(step_space)}")
        super().__init__(
            np.tile(step_space.low, horizon), np.tile(step_space.high, horizon), dtype=step_space.dtype.type
        )
        self.step_space, self.horizon = step_space, horizon


@dataclass(frozen=True)
class Chunk:
    """What one decision of a policy is: H steps, of which E are executed. Chunk() is a single step."""

    horizon: int = 1
    execute: int = 1

    @classmethod
    def of(cls, horizon: int, execute: int | None) -> Chunk:
        """From the options of an agent; `execute` None: all of it."""
        execute = horizon if execute is None else execute
        if not 1 <= execute <= horizon:
            raise UserError(f"execute {execute} of a chunk of {horizon} steps: 1 <= execute <= horizon is expected")
        return cls(horizon, execute)

    def space(self, space: Space) -> Space:
        """The action space of such decisions, from that of steps or of decisions.

        Raises:
            ValueError: the chunks of `space` have another horizon.
        """
        if self.horizon == 1:
            return space
        made = ChunkBox(step_space(space), horizon=self.horizon)
        if isinstance(space, ChunkBox) and space.horizon != self.horizon:
            raise UserError(f"the environments take chunks of {space.horizon} steps; the policy gives {self.horizon}")
        return made


def step_space(space: Space) -> Space:
    """The action space of one step, from that of steps or of decisions."""
    return space.step_space if isinstance(space, ChunkBox) else space


class Around(Pool):
    """A Pool of the environments of another one, which it is but for what it says otherwise."""

    def __init__(self, pool: Pool) -> None:
        self.pool, self.num_envs, self.incidents = pool, pool.num_envs, pool.incidents
        self.observation_space, self.fields = pool.observation_space, pool.fields
        self.action_space, self.action_field = pool.action_space, pool.action_field

    @property
    def can_save(self) -> bool:
        """Whether `get_state` works inside an episode."""
        return self.pool.can_save

    @property
    def seeding(self) -> Seeding | None:
        """What seeds promise."""
        return self.pool.seeding

    @property
    def observation(self) -> Tree:
        """The current observation of all N."""
        return self.pool.observation

    def reset(self, seeds: ArrayLike, mask: np.ndarray | None = None, options: Mapping[str, Any] | None = None) -> Tree:
        """As the pool inside."""
        return self.pool.reset(seeds, mask, options)

    def skip_images(self, skip: bool) -> None:
        """Likewise."""
        self.pool.skip_images(skip)

    def ask(self, name: str) -> Any:
        """Likewise."""
        return self.pool.ask(name)

    def get_state(self) -> dict[str, np.ndarray] | None:
        """That of the pool inside."""
        return self.pool.get_state()

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from what `get_state` gave."""
        self.pool.set_state(state)

    def close(self) -> None:
        """Free everything."""
        self.pool.close()


class ChunkPool(Around):
    """A Pool in which one decision is a chunk of which `execute` steps are carried out, open loop.

    The reward of a decision is the sum over the steps executed. A chunk stops where its episode ends or breaks. `info`
    has the success of the last step and "env_steps" [N], the number of steps executed.

    Args:
        pool: of single steps.
        horizon: H, steps of the action that arrives.
        execute: E <= H; default H.
    """

    def __init__(self, pool: Pool, *, horizon: int, execute: int | None = None) -> None:
        self.execute = Chunk.of(horizon, execute).execute
        super().__init__(pool)
        self.horizon = horizon
        chunks = ChunkBox(pool.action_space, horizon=horizon)
        self.action_space, self.action_field = chunks, Field(chunks.shape, "float32")
        self._size = chunks.shape[0]

    def step(self, action: Action) -> StepResult:
        """Execute `action` [N, H * A] (or [N, H, A])."""
        action = np.asarray(action)
        if action.shape[:1] != (self.num_envs,) or action.size != self.num_envs * self._size:
            raise UserError(f"chunks have shape {action.shape}; expected {(self.num_envs, self._size)}")
        steps = action.reshape(self.num_envs, self.horizon, -1)
        total: StepResult | None = None
        try:
            for index in range(self.execute):
                self.skip_images(index + 1 < self.execute)  # only those after a chunk are read
                result = self.pool.step(np.ascontiguousarray(steps[:, index]))
                total = self._first(result) if total is None else self._add(total, result)
                if (total.terminated | total.truncated).all():
                    break
        finally:
            self.skip_images(False)
        assert total is not None
        return total

    def _first(self, result: StepResult) -> StepResult:
        return replace(result, info={**result.info, "env_steps": result.valid.astype(np.int64)})

    def _add(self, total: StepResult, new: StepResult) -> StepResult:
        """A step on top of those before: only where the episode still ran (elsewhere the pool was idle)."""
        running = ~(total.terminated | total.truncated)
        fine = running & new.valid
        reward = total.reward + np.where(fine, new.reward, np.float32(0))
        info = dict(total.info)
        for key, value in new.info.items():
            info[key] = np.where(running, value, total.info.get(key, np.full_like(value, untold_value(value.dtype))))
        return StepResult(
            merge(running, new.observation, total.observation),
            reward.astype(np.float32),
            np.where(running, new.terminated, total.terminated),
            np.where(running, new.truncated, total.truncated),
            info | {"env_steps": total.info["env_steps"] + fine},
            np.where(running, new.valid, total.valid),
        )


class Planner(Protocol):
    """What a QueuedPool asks for plans: a frozen chunk policy (agent id "queued")."""

    execute: int  # E

    def plan(self, observation: Tree, *, rng: torch.Generator) -> np.ndarray:
        """Observation arrays [n, ...] to the next actions [n, E, A]."""


class QueuedPool(Around):
    """A Pool of single steps whose observation says what a frozen chunk policy would do now: key "base_action" [A].

    Where an episode starts, and whenever E planned steps have passed, the planner is asked for the next E actions of
    exactly those environments. An environment whose step was invalid keeps its plan.

    Args:
        pool: of single steps; its observations are a tree.
        planner: asked for plans.
    """

    def __init__(self, pool: Pool, planner: Planner) -> None:
        if BASE_ACTION in pool.fields:
            raise UserError(f"the observation has a key {BASE_ACTION!r} already: the pool is queued twice")
        if not isinstance(pool.action_space, spaces.Box) or len(pool.action_space.shape) != 1:
            raise UserError(f"action space {pool.action_space}: a queued plan needs a Box of shape (A,)")
        super().__init__(pool)
        self.planner = planner
        leaves = pool.observation_space
        inner = dict(leaves.spaces) if isinstance(leaves, spaces.Dict) else {"observation": leaves}
        shown = ActionBox(pool.action_space.low, pool.action_space.high, dtype=pool.action_space.dtype.type)
        self.observation_space = spaces.Dict({**inner, BASE_ACTION: shown})
        self.fields = {**pool.fields, BASE_ACTION: Field(pool.action_space.shape, "float32")}
        weights = planner.parameters() if isinstance(planner, torch.nn.Module) else iter(())
        self.rng = torch.Generator(next((w.device for w in weights), "cpu"))
        self._queue = np.zeros((self.num_envs, planner.execute, *pool.action_space.shape), dtype=np.float32)
        self._position = np.zeros(self.num_envs, dtype=np.int64)

    @property
    def observation(self) -> Tree:
        """The current observation of all N, with the planned action."""
        return self._observe(self.pool.observation)

    def reset(self, seeds: ArrayLike, mask: np.ndarray | None = None, options: Mapping[str, Any] | None = None) -> Tree:
        """Start new episodes where `mask`, each with a fresh plan.

        Where all start, so do the random numbers: equal seeds give equal plans, whatever came before.
        """
        if mask is None:
            state = np.random.SeedSequence([0, *np.asarray(seeds).tolist()]).generate_state(1, np.uint64)
            self.rng.manual_seed(int(state[0]))
        observation = self.pool.reset(seeds, mask, options)
        self._plan(observation, np.ones(self.num_envs, dtype=np.bool_) if mask is None else np.asarray(mask))
        return self._observe(observation)

    def step(self, action: Action) -> StepResult:
        """Execute one action [N, A] in every environment; the plans move on by one step."""
        result = self.pool.step(action)
        self._position = self._position + result.valid
        self._plan(result.observation, self._position >= self.planner.execute)
        return replace(result, observation=self._observe(result.observation))

    def _plan(self, observation: Tree, mask: np.ndarray) -> None:
        rows = np.flatnonzero(mask)
        if len(rows):
            self._queue = self._queue.copy()
            self._queue[rows] = self.planner.plan(pick_tree(observation, rows), rng=self.rng)
            self._position = np.where(mask, 0, self._position)

    def _observe(self, observation: Tree) -> Tree:
        return {**observation, BASE_ACTION: self._queue[np.arange(self.num_envs), self._position]}

    def get_state(self) -> dict[str, np.ndarray] | None:
        """The state of the pool inside, plans, positions and the random generator."""
        state = self.pool.get_state()
        if state is None:
            return None
        own = {"plan": self._queue, "position": self._position, "rng": self.rng.get_state().numpy()}
        return {**state, **{f"queue/{name}": np.array(value) for name, value in own.items()}}

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue bit for bit from what `get_state` gave."""
        if state["queue/plan"].shape != self._queue.shape:
            raise UserError(f"the saved plans have shape {state['queue/plan'].shape}; this pool's {self._queue.shape}")
        self.pool.set_state({k: v for k, v in state.items() if not k.startswith("queue/")})
        self._queue, self._position = state["queue/plan"].copy(), state["queue/position"].copy()
        before = torch.from_numpy(np.array(state["queue/rng"]))
        if before.shape == self.rng.get_state().shape:  # else it was on another kind of device
            self.rng.set_state(before)
