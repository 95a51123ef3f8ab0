"""`cql` and `cal_ql`: soft actor-critic with values pushed down where the data has no actions; offline pre-training.

Cal-QL does not push below the data's own return, so its critic keeps the right scale and fine-tuning does not first
have to unlearn pessimism. It keeps working online with the same losses.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from embodied_rft import losses
from embodied_rft.agent import Agent
from embodied_rft.data import Batch, Tree
from embodied_rft.objectives.common import STRICT, annotate_returns, fit_normalizers, preset
from embodied_rft.objectives.soft_actor_critic import SAC, SACConfig, sample
from embodied_rft.spaces import ActionScale


@dataclass(config=STRICT, kw_only=True)
class CQLConfig(SACConfig):
    """Options of `cql` and `cal_ql`: SAC's and these."""

    conservative_weight: float = 5.0  # alpha of CQL
    num_sampled_actions: int = 4  # of each kind: uniform, the policy's now, the policy's next


@preset("cql", backup_entropy=False)
class CQL(SAC):
    """Conservative Q-learning, CQL(H) with importance sampling (Kumar et al. 2020, eq. 4 and appendix F)."""

    Config: type = CQLConfig

    def critic_penalty(self, agent: Agent, batch: Batch, q: Tensor, rng: torch.Generator) -> Tensor:
        """The conservative gap."""
        return conservative_penalty(agent, batch, q, self.config, rng)


@preset("cal_ql", backup_entropy=False)
class CalQL(SAC):
    """Calibrated Q-learning (Nakamoto et al. 2023): CQL + a floor at the return of the data."""

    Config: type = CQLConfig

    def critic_penalty(self, agent: Agent, batch: Batch, q: Tensor, rng: torch.Generator) -> Tensor:
        """The conservative gap, not below the noted return (rows without one have no floor)."""
        return conservative_penalty(agent, batch, q, self.config, rng, floor=batch.notes.get("mc_return"))

    def annotate(self, agent: Agent, buffer: Any, rows: np.ndarray, rng: torch.Generator) -> dict[str, float]:
        """Note the discounted return of each decision."""
        fit_normalizers(agent, buffer, rows)
        return annotate_returns(buffer, rows, gamma=self.config.gamma, reward_weights=self.config.reward_weights)


def conservative_penalty(
    agent: Agent, batch: Batch, q: Tensor, config: CQLConfig, rng: torch.Generator, *, floor: Tensor | None = None
) -> Tensor:
    """Weighted mean of the conservative gap over rows, summed over members.

    Args:
        agent: its critic is penalised, its policy proposes actions.
        batch: B rows.
        q: [E, B] values of the data's actions.
        config: weight and number of actions.
        rng: draws the actions.
        floor: [B]; values of the policy's actions count as at least this (not those of uniform actions).
    """
    critic, count = agent.parts["critic"], config.num_sampled_actions
    action, log_density = propose(agent, batch, count, rng)
    features = critic.encoder(batch.observation)
    features = features.expand(len(action), *features.shape).flatten(0, 1)
    sampled = critic.of_features(features, action.flatten(0, 1)).unflatten(1, (len(action), len(batch)))
    if floor is not None:
        uniform, own = sampled.split([count, len(action) - count], dim=1)
        sampled = torch.cat([uniform, losses.calibrated(own, floor)], dim=1)
    gap = losses.conservative(sampled, log_density, q)
    return config.conservative_weight * gap.sum() / batch.num_decisions


@torch.no_grad()
def propose(agent: Agent, batch: Batch, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Uniform actions, the policy's at this and at the next observation, with the log-density of each.

    Densities are measured in [-1, 1]^A units. A deterministic policy has none; it counts as uniform.

    Returns:
        (actions [3 count, B, A], log-densities [3 count, B]).
    """
    uniform_density = -agent.action_dim * float(np.log(2.0))
    scale = ActionScale(agent.spaces.action).to(agent.device)
    noise = torch.rand((count, len(batch), agent.action_dim), generator=rng, device=agent.device)
    actions, densities = [scale.to_env(2 * noise - 1)], [noise.new_full((count, len(batch)), uniform_density)]
    for observation in (batch.observation, batch.next_observation):
        action, log_prob = sample(agent.policy, _repeat(observation, count), rng)
        log_prob = action.new_full((len(action),), uniform_density) if log_prob is None else log_prob
        actions.append(action.unflatten(0, (count, len(batch))))
        densities.append(log_prob.unflatten(0, (count, len(batch))))
    return torch.cat(actions), torch.cat(densities)


def _repeat(observation: Tree, count: int) -> dict[str, Tensor]:
    """[B, ...] -> [count * B, ...], the whole batch `count` times."""
    return {k: v.expand(count, *v.shape).flatten(0, 1) for k, v in observation.items()}
