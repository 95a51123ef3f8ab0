"""`discrete_sac`: soft actor-critic for one choice among n, with exact expectations over the options.

Boundary: as `soft_actor_critic`, of which nothing is shared but the temperature: no action is ever sampled in a loss.
Legend: B rows, E members of the critic, n options.
"""

from __future__ import annotations

import math

import torch
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from embodied_rft.buffer.plans import Replay, Share
from embodied_rft.data import Batch, Tree
from embodied_rft.learning import losses
from embodied_rft.learning.agent import Agent
from embodied_rft.learning.objective import Losses, Objective
from embodied_rft.networks.critics import ActionValues, Temperature
from embodied_rft.networks.tensors import polyak
from embodied_rft.objectives.common import CriticOptions, ensure_critic, ensure_temperature, temperature_of
from embodied_rft.options import STRICT, refuse_idle
from embodied_rft.policy import Chooses, require
from embodied_rft.pools.spaces import one_choice
from embodied_rft.registry import register


@dataclass(config=STRICT, kw_only=True)
class DiscreteSACConfig(CriticOptions, Replay):
    """Options of `discrete_sac`: how the buffer is read, and these; None keeps what an existing critic has."""

    tau: Share = 1.0  # how far the target critic moves towards the critic
    target_every: PositiveInt = 8_000  # updates between moves of the target critic
    initial_temperature: float = 1.0  # of entropy
    train_temperature: bool = True  # towards target_entropy
    target_entropy: float | None = None  # None: 0.98 log n

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.train_temperature:
            refuse_idle(self, ["target_entropy"], "with train_temperature: false")


@register("objective", "discrete_sac")
class DiscreteSAC(Objective):
    """Christodoulou 2019: soft actor-critic for discrete actions.

    Small tasks learn sooner with {"id": "discrete_sac", "tau": 0.005, "target_every": 1} and one update a decision.
    """

    Config: type = DiscreteSACConfig
    updates_per_decision = 0.25  # appendix B: one update for four decisions

    def __init__(self, config: DiscreteSACConfig) -> None:
        self.config = config
        self.losses: Losses = {"critic": self.critic_loss, "policy": self.policy_loss}
        if config.train_temperature:
            self.losses["temperature"] = self.temperature_loss
        self.reading: Replay = config

    def setup(self, agent: Agent, rng: torch.Generator | None = None) -> None:
        """Critic, target critic and temperature."""
        c = self.config
        self.choices = one_choice(agent.spaces.action, "objective 'discrete_sac'").to(agent.device)
        why = f"objective 'discrete_sac' needs a probability of each option, {type(agent.policy).__name__} has none"
        require(agent.policy, Chooses, f"{why}: use the agent categorical")
        ensure_critic(agent, c, "action_values")
        ensure_temperature(agent, initial=c.initial_temperature, fresh=not c.warm_start)

    def critic_loss(self, agent: Agent, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Half the squared error of the taken option's value, summed over members (eq. 4)."""
        target, index = self.td_target(agent, batch), self.choices.index(batch.action)
        values = agent.part("critic", ActionValues)(batch.observation)
        q = values.gather(-1, index.expand(len(values), -1, -1))[..., 0]
        loss = 0.5 * losses.squared_error(q, target).sum() / batch.num_decisions
        return loss, {"critic/loss": loss.detach(), "critic/q_mean": q.detach().mean()}

    def policy_loss(self, agent: Agent, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Expectation over the options of alpha log pi - min Q (eq. 12)."""
        log_prob = self._log_prob(agent, batch.observation)
        with torch.no_grad():
            value = agent.part("critic", ActionValues)(batch.observation).amin(0)
        alpha = temperature_of(agent)
        loss = (log_prob.exp() * (alpha * log_prob - value)).sum() / batch.num_decisions
        batch.notes["policy_log_prob"] = log_prob.detach()  # the temperature loss of this update reads it
        return loss, {"policy/loss": loss.detach(), "policy/q_mean": (log_prob.exp() * value).sum(-1).detach().mean()}

    def temperature_loss(self, agent: Agent, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Raise alpha while the entropy is below its target (eq. 11)."""
        log_prob = batch.notes.get("policy_log_prob")
        if log_prob is None:
            with torch.no_grad():
                log_prob = self._log_prob(agent, batch.observation)
        size = self.choices.sizes[0]
        wanted = 0.98 * math.log(size) if self.config.target_entropy is None else self.config.target_entropy
        expected = (log_prob.exp() * log_prob).sum(-1)  # minus the entropy
        log_alpha = agent.part("temperature", Temperature).log_alpha
        loss = losses.temperature(log_alpha, expected, target_entropy=wanted).sum() / batch.num_decisions
        return loss, {"temperature/alpha": log_alpha.detach().exp(), "policy/entropy": -expected.mean()}

    @torch.no_grad()
    def td_target(self, agent: Agent, batch: Batch) -> Tensor:
        """[B]: r + gamma E[min Q' - alpha log pi] over the options of the next observation (eq. 3 and 10)."""
        log_prob = self._log_prob(agent, batch.next_observation)
        value = agent.part("target_critic", ActionValues)(batch.next_observation).amin(0)
        soft = (log_prob.exp() * (value - temperature_of(agent) * log_prob)).sum(-1)
        return losses.td_target(batch.reward, batch.discount, soft)

    def _log_prob(self, agent: Agent, observation: Tree) -> Tensor:
        """[B, n]."""
        return require(agent.policy, Chooses).log_probs(observation)[0]

    def after_update(self, agent: Agent, update: int) -> None:
        """Move the target critic when it is time."""
        if update % self.config.target_every == 0:
            polyak(agent.parts["target_critic"], agent.parts["critic"], self.config.tau)
