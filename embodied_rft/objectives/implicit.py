"""`iql`: implicit Q-learning. Values from the data's actions only, policy by weighted imitation; offline and online."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from embodied_rft.buffer.plans import Replay, Share
from embodied_rft.data import Batch
from embodied_rft.learning import losses
from embodied_rft.learning.agent import Agent
from embodied_rft.learning.objective import Losses, Objective
from embodied_rft.names import UserError
from embodied_rft.networks.critics import Critic, Value
from embodied_rft.networks.tensors import polyak
from embodied_rft.objectives.common import CriticOptions, critic_on_value, ensure_critic, imitation
from embodied_rft.options import STRICT
from embodied_rft.policy import Imitates, Retraces, able, require
from embodied_rft.registry import register


@dataclass(config=STRICT, kw_only=True)
class IQLConfig(CriticOptions, Replay):
    """Options of `iql`: how the buffer is read, and these; those of the critic are of the value, too."""

    expectile: Share = 0.7  # 0.5: the mean over the data's actions; towards 1: the best of them (AntMaze: 0.9)
    inverse_temperature: float = 3.0  # beta; 0 is behaviour cloning (AntMaze: 10)
    largest_weight: float = 100.0  # of one decision
    # what is weighted: the policy's own log-likelihood, or the `imitation_loss` that suits it (a squared error,
    # diffusion, flow matching)
    extraction: Literal["likelihood", "imitation"] = "likelihood"


@register("objective", "iql")
class IQL(Objective):
    """Kostrikov et al. 2021: expectile value, one-step critic, advantage-weighted likelihood of the data's actions."""

    Config = IQLConfig
    updates_per_decision: float = 1.0

    def __init__(self, config: IQLConfig) -> None:
        self.config = config
        self.losses: Losses = {"value": self.value_loss, "critic": self.critic_loss, "policy": self.policy_loss}
        self.reading: Replay = config

    def setup(self, agent: Agent, rng: torch.Generator | None = None) -> None:
        """Critic, target critic and value.

        Raises:
            ValueError: the policy does not know how likely the actions of others are, or cannot imitate.
        """
        c, name = self.config, type(agent.policy).__name__
        known = able(agent.policy, Retraces) is not None or not agent.policy.trace_fields  # of actions of others
        if c.extraction == "likelihood" and not known:
            raise UserError(
                f"{name} does not know how likely actions of others are: set extraction: imitation, which weighs its "
                "own imitation_loss instead"
            )
        if c.extraction == "imitation":
            require(agent.policy, Imitates, f"{name} has no imitation_loss: set extraction: likelihood")
        ensure_critic(agent, c)
        agent.ensure("value", "value", hidden=c.critic_hidden, layer_norm=c.critic_layer_norm, fresh=not c.warm_start)

    # --- losses, in update order ---------------------------------------------------------------------------------

    def value_loss(self, agent: Agent, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Expectile regression of V on the target critic (eq. 5)."""
        value = agent.part("value", Value)(batch.observation)
        loss = losses.expectile(self._data_value(agent, batch) - value, tau=self.config.expectile)
        loss = loss.sum() / batch.num_decisions
        return loss, {"value/loss": loss.detach(), "value/mean": value.detach().mean()}

    def critic_loss(self, agent: Agent, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """One-step regression of Q on V of the next observation (eq. 6), summed over members."""
        with torch.no_grad():
            value = agent.part("value", Value)(batch.next_observation)
        return critic_on_value(agent, batch, value)

    def policy_loss(self, agent: Agent, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Log-likelihood weighted by exp(beta A) (eq. 7), A of the target critic over the value just updated."""
        c = self.config
        with torch.no_grad():
            advantage = self._data_value(agent, batch) - agent.part("value", Value)(batch.observation)
        weight = losses.advantage_weights(
            advantage, inverse_temperature=c.inverse_temperature, largest=c.largest_weight
        )
        each = imitation(agent, batch, rng) if c.extraction == "imitation" else -self._log_likelihood(agent, batch)
        loss = (weight * each).sum() / batch.num_decisions
        return loss, {"policy/loss": loss.detach(), "policy/weight": weight.mean()}

    def _data_value(self, agent: Agent, batch: Batch) -> Tensor:
        """The smaller of the target critics' values of the data's actions [B]; computed once an update."""
        if "data_value" not in batch.notes:
            with torch.no_grad():
                q = agent.part("target_critic", Critic)(batch.observation, batch.action)
            batch.notes["data_value"] = losses.reduce_ensemble(q, "min")
        return batch.notes["data_value"]

    def _log_likelihood(self, agent: Agent, batch: Batch) -> Tensor:
        """Of the data's actions under the policy [B]."""
        log_prob, _ = agent.policy.log_prob(batch.observation, batch.action, batch.trace)
        return torch.where(batch.mask, log_prob, 0.0).sum(1)

    # --- around the losses ---------------------------------------------------------------------------------------

    def after_update(self, agent: Agent, update: int) -> None:
        """Move the target critic."""
        polyak(agent.parts["target_critic"], agent.parts["critic"], self.config.tau)
