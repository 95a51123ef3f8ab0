"""`archer`: a critic of whole decisions, learned off-policy, and a policy gradient inside them by its advantage.

The critic reads what it is given: an observation by the policy's features, an action as numbers, a choice or a text.
Legend: B decisions, U units, E ensemble members.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from embodied_rft.buffer.plans import Replay
from embodied_rft.data import Batch, Ragged
from embodied_rft.learning import losses
from embodied_rft.learning.agent import Agent
from embodied_rft.learning.objective import Losses, Objective
from embodied_rft.networks.critics import Critic, Value
from embodied_rft.networks.tensors import as_tensors, polyak
from embodied_rft.objectives.common import (
    CriticOptions,
    UnitWeights,
    critic_on_value,
    ensure_critic,
    refuse_unmarked,
    unit_weights,
)
from embodied_rft.options import STRICT
from embodied_rft.registry import register


@dataclass(config=STRICT, kw_only=True)
class ArCHerConfig(Replay, CriticOptions):
    """Options of `archer`: how the buffer is read, the critic, the policy's step."""

    gamma: float = 0.95  # discount of one decision
    policy_delay: PositiveInt = 1  # updates of the critic to one of the policy
    entropy_weight: float = 0.0  # bonus for entropy
    unit_weights: UnitWeights | None = None  # of thought and action units in a decision's log-probability


@register("objective", "archer")
class ArCHer(Objective):
    """Hierarchical actor-critic (Zhou et al. 2024, ArCHer): TD over utterances, REINFORCE over their tokens."""

    Config: type = ArCHerConfig
    config: ArCHerConfig

    def __init__(self, config: ArCHerConfig) -> None:
        self.config = config
        self.losses: Losses = {"critic": self.critic_loss, "value": self.value_loss, "policy": self.policy_loss}
        self.every = {"policy": config.policy_delay}
        self.reading: Replay = config

    def setup(self, agent: Agent, rng: torch.Generator | None = None) -> None:
        """Critic and value, each with a target."""
        c = self.config
        refuse_unmarked(agent.policy, c)
        ensure_critic(agent, c)
        agent.ensure("value", "value", hidden=c.critic_hidden, layer_norm=c.critic_layer_norm, fresh=not c.warm_start)
        agent.ensure_target("value", fresh=not c.warm_start)

    # --- losses, in update order ---------------------------------------------------------------------------------

    def critic_loss(self, agent: Agent, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """(Q(o, a) - r - gamma V'(o'))^2 of what was done (eq. 1), summed over members; V' is the target value."""
        with torch.no_grad():
            following = agent.part("target_value", Value)(batch.next_observation)
        return critic_on_value(agent, batch, following)

    def value_loss(self, agent: Agent, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """(V(o) - Q'(o, a))^2 (eq. 2): a is what the policy would do now, Q' the smaller of the target critics."""
        action, _, _ = self._drawn(agent, batch, rng)
        with torch.no_grad():
            q = losses.reduce_ensemble(agent.part("target_critic", Critic)(batch.observation, action), "min")
        value = agent.part("value", Value)(batch.observation)
        loss = losses.squared_error(value, q).sum() / batch.num_decisions
        return loss, {"value/loss": loss.detach(), "value/mean": value.detach().mean()}

    def policy_loss(self, agent: Agent, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """-A(o, a) sum over units of log pi, A = Q - V, of what the policy would do now (eq. 3)."""
        c, (action, trace, mask) = self.config, self._drawn(agent, batch, rng)
        with torch.no_grad():
            q = losses.reduce_ensemble(agent.part("critic", Critic)(batch.observation, action), "min")
            advantage = q - agent.part("value", Value)(batch.observation)
        log_prob, entropy = agent.policy.log_prob(batch.observation, action, trace)
        part = unit_weights(mask, trace, c.unit_weights)
        each = -advantage[:, None] * (log_prob if part is None else log_prob * part) - c.entropy_weight * entropy
        loss = losses.masked_sum(each, mask) / batch.num_decisions
        return loss, {"policy/loss": loss.detach(), "policy/advantage": advantage.abs().mean()}

    def _drawn(self, agent: Agent, batch: Batch, rng: torch.Generator) -> tuple[Any, dict[str, Any], Tensor]:
        """(action, trace, mask [B, U]) of decisions that the policy draws for the batch; once an update."""
        if "drawn" not in batch.notes:
            shown = {k: v.cpu().numpy() if isinstance(v, Tensor) else v for k, v in batch.observation.items()}
            made = agent.policy.act(shown, rng=rng)
            assert made.log_prob is not None  # a policy knows its own
            if isinstance(made.log_prob, Ragged):
                mask = torch.from_numpy(made.log_prob.pad()[1])
            else:
                mask = torch.ones(made.log_prob.shape, dtype=torch.bool)
            action = as_tensors({"action": made.action}, agent.device).get("action", made.action)
            trace = {**made.trace, **as_tensors(made.trace, agent.device)}
            batch.notes["drawn"] = cast("Tensor", (action, trace, mask.to(agent.device)))
        return cast("tuple[Any, dict[str, Any], Tensor]", batch.notes["drawn"])

    # --- around the losses ---------------------------------------------------------------------------------------

    def after_update(self, agent: Agent, update: int) -> None:
        """Move the targets."""
        for name in ("critic", "value"):
            polyak(agent.parts[f"target_{name}"], agent.parts[name], self.config.tau)
