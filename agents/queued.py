"""`queued`: makes a frozen chunk policy a policy of single steps, so that a residual can correct every step (ResiP).

Ankile et al. 2024 (ResiP): the base plans a chunk, a small network corrects each step of it with fresh observations.
The queue of planned actions lives in `chunking.QueuedPool`, which asks `plan` and shows the next action as the
observation key "base_action"; this policy holds no state between calls. Boundary: planning and reading that key.

Legend: N environments, B rows, H horizon, E planned steps that are executed, A action dimensions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from pydantic.dataclasses import dataclass
from torch import Tensor

from embodied_rft.data import Decisions, Field, Space, Tree
from embodied_rft.names import UserError
from embodied_rft.options import STRICT
from embodied_rft.policy import Adapter, build_policy, observe
from embodied_rft.pools.chunks import BASE_ACTION, Chunk
from embodied_rft.registry import register


@dataclass(config=STRICT, kw_only=True)
class QueuedConfig:
    """Options of a `queued` agent."""

    base: dict[str, Any]  # spec of the frozen chunk policy
    execute: int | None = None  # planned steps until the next plan; None: what the base says
    greedy: bool = True  # plan as the base decides greedily (its quiet steps), else as it explores


@register("agent", "queued")
class QueuedPolicy(Adapter):
    """Acts as its frozen base planned; nothing in it can be trained, put `residual` around it.

    Example: {"id": "residual", "base": {"id": "queued", "base": {"id": "diffusion", "horizon": 8}}} in a QueuedPool.
    """

    Config = QueuedConfig
    num_units = 1
    stochastic = False
    trace_fields: dict[str, Field] = {}  # noqa: RUF012
    spec: dict[str, Any]

    def __init__(
        self, config: QueuedConfig, *, observation_space: Space, action_space: Space, rng: torch.Generator
    ) -> None:
        if isinstance(observation_space, spaces.Dict):  # the base was trained without the key that this adds
            observation_space = spaces.Dict({k: v for k, v in observation_space.spaces.items() if k != BASE_ACTION})
        super().__init__(build_policy(config.base, observation_space, action_space, rng))
        planned, self.chunk, self.config = self.chunk, Chunk(), config
        if planned.horizon == 1:
            raise UserError(f"agent {config.base.get('id')!r} plans no chunks: set its horizon, as of a diffusion")
        self.execute = planned.execute if config.execute is None else Chunk.of(planned.horizon, config.execute).execute

    @property
    def planner(self) -> QueuedPolicy:
        """This one."""
        return self

    def plan(self, observation: Tree, *, rng: torch.Generator) -> np.ndarray:
        """The base's next actions [n, E, A] for observation arrays [n, ...]."""
        taken = self.base.act(observation, greedy=self.config.greedy, rng=rng)
        return np.asarray(taken.action).reshape(len(taken.action), self.base.chunk.horizon, -1)[:, : self.execute]

    def mode(self, observation: Tree) -> Tensor:
        """The planned action [B, A].

        Raises:
            ValueError: the observation does not come from a QueuedPool.
        """
        if BASE_ACTION not in observation:
            raise UserError(
                f"the observation has no {BASE_ACTION!r}: put chunking.QueuedPool around the environments, it "
                "keeps the plans"
            )
        return observation[BASE_ACTION]

    @torch.no_grad()
    def act(self, observation: Tree, *, greedy: bool = False, rng: torch.Generator | None = None) -> Decisions:
        """N decisions for observation arrays [N, ...]: the planned actions, with log-probability 0."""
        action = self.mode(observe(observation, self.base))
        return Decisions(action.cpu().numpy(), np.zeros((len(action), 1), dtype=np.float32))

    def log_prob(self, observation: Tree, action: Tensor, trace: Tree) -> tuple[Tensor, Tensor]:
        """Zeros [B, 1]: nothing is random here."""
        zeros = torch.zeros(len(action), 1, device=action.device)
        return zeros, zeros
