"""`iql`: implicit Q-learning. Values from the data's actions only, policy by weighted imitation; offline and online."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from embodied_rft import losses
from embodied_rft.agent import Agent
from embodied_rft.data import Batch
from embodied_rft.networks import polyak
from embodied_rft.objectives.common import STRICT, Losses, fit_normalizers, imitation
from embodied_rft.plans import Replay, Share
from embodied_rft.registry import register


@dataclass(config=STRICT, kw_only=True)
class IQLConfig(Replay):
    """Options of `iql`: how the buffer is read, and these; the critic's are as in `sac`."""

    expectile: float = 0.8  # 0.5: the mean over the data's actions; towards 1: the best of them
    inverse_temperature: float = 3.0  # beta; 0 is behaviour cloning
    largest_weight: float = 100.0
    tau: Share = 0.005
    num_critics: int | None = None
    critic_hidden: tuple[int, ...] | None = None  # of critic and value
    critic_layer_norm: bool | None = None
    warm_start: bool = True


@register("objective", "iql")
class IQL:
    """Kostrikov et al. 2021: expectile value, one-step critic, advantage-weighted imitation."""

    Config = IQLConfig

    def __init__(self, config: IQLConfig) -> None:
        self.config = config
        self.losses: Losses = {"value": self.value_loss, "critic": self.critic_loss, "policy": self.policy_loss}
        self.reading: Replay = config

    def setup(self, agent: Agent, rng: torch.Generator | None = None) -> None:
        """Critic, target critic and value."""
        c = self.config
        fresh = not c.warm_start
        options: dict[str, Any] = {"layer_norm": c.critic_layer_norm, "fresh": fresh}
        options["hidden"] = None if c.critic_hidden is None else list(c.critic_hidden)
        agent.ensure("critic", "critic", num_members=c.num_critics, **options)
        agent.ensure_target("critic", fresh=fresh)
        agent.ensure("value", "value", **options)

    # --- losses, in update order ---------------------------------------------------------------------------------

    def value_loss(self, agent: Agent, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Expectile regression of V on the target critic (eq. 5)."""
        with torch.no_grad():
            q = losses.reduce_ensemble(agent.parts["target_critic"](batch.observation, batch.action), "min")
        value = agent.parts["value"](batch.observation)
        batch.notes["advantage_over_value"] = (q - value).detach()  # the policy loss of this update reads it
        loss = losses.expectile(q - value, tau=self.config.expectile).sum() / batch.num_decisions
        return loss, {"value/loss": loss.detach(), "value/mean": value.detach().mean()}

    def critic_loss(self, agent: Agent, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """One-step regression of Q on V of the next observation (eq. 6)."""
        with torch.no_grad():
            target = losses.td_target(batch.reward, batch.discount, agent.parts["value"](batch.next_observation))
        q = agent.parts["critic"](batch.observation, batch.action)
        loss = 0.5 * losses.squared_error(q, target).sum() / batch.num_decisions
        return loss, {"critic/loss": loss.detach(), "critic/q_mean": q.detach().mean()}

    def policy_loss(self, agent: Agent, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Imitation weighted by exp(beta A) (eq. 7)."""
        advantage = batch.notes.get("advantage_over_value")
        if advantage is None:
            with torch.no_grad():
                q = losses.reduce_ensemble(agent.parts["target_critic"](batch.observation, batch.action), "min")
                advantage = q - agent.parts["value"](batch.observation)
        c = self.config
        weight = losses.advantage_weights(
            advantage, inverse_temperature=c.inverse_temperature, largest=c.largest_weight
        )
        each = imitation(agent, batch, rng)
        loss = (weight * each).sum() / batch.num_decisions
        return loss, {"policy/loss": loss.detach(), "policy/weight": weight.mean()}

    # --- around the losses ---------------------------------------------------------------------------------------

    def annotate(self, agent: Agent, buffer: Any, rows: np.ndarray, rng: torch.Generator) -> dict[str, float]:
        """Take the statistics of the observations, once."""
        fit_normalizers(agent, buffer, rows)
        return {}

    def after_update(self, agent: Agent, update: int) -> None:
        """Move the target critic."""
        polyak(agent.parts["target_critic"], agent.parts["critic"], self.config.tau)
