"""`gaussian`: a small network that outputs a tanh-squashed Gaussian over action vectors, or a deterministic actor.

With `deterministic: true` the same network is a TD3 actor: its action plus exploration noise of fixed width.
It knows no loss but imitation; the critic lives elsewhere.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from embodied_rft.agents.parts.actor import ActorConfig, decide, make_actor
from embodied_rft.data import Decisions, Field, Space, Tree
from embodied_rft.learning.losses import mean_where
from embodied_rft.options import STRICT
from embodied_rft.policy import Policy, observe, require_rng
from embodied_rft.pools.chunks import Chunk
from embodied_rft.pools.spaces import ActionScale
from embodied_rft.registry import register


@dataclass(config=STRICT, kw_only=True)
class GaussianConfig(ActorConfig):
    """Options of a `gaussian` agent; `last_gain: 0.01` suits on-policy learning from scratch."""

    horizon: int = 1  # environment steps that a decision holds: a chunk of them, executed open loop
    execute: int | None = None  # how many of them are executed before the next decision; None: all
    imitation: Literal["mse", "nll"] = "mse"  # squared error of the mode, or negative log-likelihood


@register("agent", "gaussian")
class GaussianPolicy(Policy):
    """One unit a decision; see docs/architecture.md for the methods.

    The trace holds `u`, the value before squashing: the log-probability is computed from it exactly, also where the
    action is saturated. It is measured in [-1, 1] units, whatever the units of the action space.
    """

    Config = GaussianConfig
    num_units = 1
    spec: dict[str, Any]

    def __init__(
        self, config: GaussianConfig, *, observation_space: Space, action_space: Space, rng: torch.Generator
    ) -> None:
        super().__init__()
        self.config = config
        self.chunk = Chunk.of(config.horizon, config.execute)
        self.scale = ActionScale(self.chunk.space(action_space))
        self.encoder, self.head = make_actor(config, observation_space, action_dim=self.scale.action_dim, rng=rng)
        self.stochastic = not config.deterministic
        self.unit_size = self.scale.action_dim
        self.trace_fields = {"u": Field((self.scale.action_dim,))}

    @torch.no_grad()
    def act(self, observation: Tree, *, greedy: bool = False, rng: torch.Generator | None = None) -> Decisions:
        """N decisions for observation arrays [N, ...]."""
        features = self.encoder(observe(observation, self))
        action, log_prob, u = decide(self.head, features, greedy=greedy, rng=rng)
        action = self.scale.to_env(action)
        return Decisions(action.cpu().numpy(), log_prob[:, None].cpu().numpy(), {"u": u.cpu().numpy()})

    def log_prob(self, observation: Tree, action: Tensor, trace: Tree) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy, [B, 1] each; without "u" in the trace it is recovered from the action.

        So it is where "u" is NaN: of decisions that something else took.
        """
        scaled = self.scale.from_env(action)
        if "u" in trace:
            u = torch.where(trace["u"].isnan(), self.head.unsquash(scaled), trace["u"])
        else:
            u = self.head.unsquash(scaled, margin=1e-6)
        log_prob, entropy = self.head.log_prob(self.encoder(observation), u)
        return log_prob[:, None], entropy[:, None]

    @torch.no_grad()
    def retrace(self, observation: Tree, action: np.ndarray) -> dict[str, np.ndarray]:
        """The trace of decisions that something else took: arrays [T, ...] in and out."""
        scaled = self.scale.from_env(torch.as_tensor(action, dtype=torch.float32, device=self.scale.center.device))
        return {"u": self.head.unsquash(scaled).cpu().numpy()}

    def rsample(self, observation: Tree, *, rng: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Reparametrised action [B, A] and its log-probability [B]."""
        action, log_prob, _ = self.head.rsample(self.encoder(observation), require_rng(rng))
        return self.scale.to_env(action), log_prob

    def mode(self, observation: Tree) -> Tensor:
        """Deterministic action [B, A], differentiable."""
        return self.scale.to_env(self.head.mode(self.encoder(observation)))

    def imitation_loss(
        self,
        observation: Tree,
        action: Tensor,
        *,
        rng: torch.Generator | None = None,
        trace: Tree | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """[B]: mean squared error of the mode in [-1, 1] units, or the negative log-likelihood of `action`."""
        target = self.scale.from_env(action)
        features = self.encoder(observation)
        if self.config.imitation == "mse":
            return mean_where((self.head.mode(features) - target).square(), mask)
        u = self.head.unsquash(target)
        return -self.head.log_prob(features, u)[0] if mask is None else -self.head.log_prob_where(features, u, mask)
