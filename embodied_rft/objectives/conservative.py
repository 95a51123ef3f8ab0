"""`cql` and `cal_ql`: soft actor-critic with values pushed down where the data has no actions; offline pre-training.

Cal-QL does not push below the data's own return, so its critic keeps the right scale and fine-tuning does not first
have to unlearn pessimism. It keeps working online with the same losses.
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from embodied_rft.buffer.buffer import Buffer
from embodied_rft.data import Batch, Tree
from embodied_rft.learning import losses
from embodied_rft.learning.agent import Agent
from embodied_rft.learning.objective import fit_normalizers
from embodied_rft.networks.critics import Critic, Temperature
from embodied_rft.objectives.common import annotate_returns, preset
from embodied_rft.objectives.soft_actor_critic import SAC, SACConfig, sample
from embodied_rft.options import STRICT
from embodied_rft.pools.spaces import ActionScale


@dataclass(config=STRICT, kw_only=True)
class CQLConfig(SACConfig):
    """Options of `cql` and `cal_ql`: SAC's and these."""

    conservative_weight: float = 5.0  # alpha of CQL
    num_sampled_actions: PositiveInt = 10  # of each kind: uniform, the policy's now, the policy's next
    importance_sampling: bool = True  # weigh sampled actions by their density; without, they all count the same
    gap_temperature: PositiveFloat = 1.0  # of the soft maximum over sampled actions
    max_target: bool = False  # targets are of the best of `num_sampled_actions` next actions
    lagrange_gap: float | None = None  # the weight is multiplied by what keeps the gap here; None: it stays as it is


@preset("cql", backup_entropy=False)
class CQL(SAC):
    """Conservative Q-learning, CQL(H) with importance sampling (Kumar et al. 2020, eq. 4 and appendix F).

    The squared error of TD counts fully, as in the authors' code, from which the weight of 5 is; their equation has
    half of it. They train the policy at a third of the critic's rate: `learner: {learning_rates: {policy: 1e-4}}`.
    """

    Config: type = CQLConfig
    config: CQLConfig
    needs_entropy = False  # chains without one, such as ConRFT's, may propose actions
    td_weight = 1.0

    def setup(self, agent: Agent, rng: torch.Generator | None = None) -> None:
        """As SAC; with `lagrange_gap` the part "conservatism", too, a multiplier that begins at 1."""
        super().setup(agent, rng)
        if self.config.lagrange_gap is not None:
            agent.ensure("conservatism", "temperature", fresh=not self.config.warm_start)
            self.losses["conservatism"] = self.multiplier_loss

    def next_value(self, agent: Agent, batch: Batch, rng: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """As SAC, or with `max_target` the value of the best of several next actions (appendix F)."""
        if not self.config.max_target:
            return super().next_value(agent, batch, rng)
        count, size = self.config.num_sampled_actions, len(batch)
        observation = _repeat(batch.next_observation, count)
        action, log_prob = self.decide(agent, observation, rng)
        value, best = self.target_value(agent, observation, action, rng).unflatten(0, (count, size)).max(0)
        if log_prob is not None:
            log_prob = log_prob.unflatten(0, (count, size)).gather(0, best[None])[0]
        return value, log_prob

    def critic_penalty(self, agent: Agent, batch: Batch, q: Tensor, rng: torch.Generator) -> Tensor:
        """The conservative gap, its mean over rows, summed over members and weighed.

        Args:
            agent: its critic is penalised, its policy proposes actions.
            batch: B rows.
            q: [E, B] values of the data's actions.
            rng: draws the actions.
        """
        c, critic = self.config, agent.part("critic", Critic)
        action, log_density = propose(agent, batch, c.num_sampled_actions, rng)
        features = critic.encoder(batch.observation)
        features = features.expand(len(action), *features.shape).flatten(0, 1)
        sampled = critic.of_features(features, action.flatten(0, 1)).unflatten(1, (len(action), len(batch)))
        if (floor := self.floor(batch)) is not None:
            uniform, own = sampled.split([c.num_sampled_actions, 2 * c.num_sampled_actions], dim=1)
            sampled = torch.cat([uniform, losses.calibrated(own, floor)], dim=1)
        if not c.importance_sampling:
            log_density = torch.zeros_like(log_density)
        gap = losses.conservative(sampled, log_density, q, temperature=c.gap_temperature)
        weight: float | Tensor = c.conservative_weight
        if c.lagrange_gap is not None:
            gap = gap - c.lagrange_gap
            batch.notes["excess_gap"] = gap.detach().mean(0)  # the multiplier's loss of this update reads it
            weight = weight * agent.part("conservatism", Temperature).alpha.clamp_max(1e6)
        return weight * gap.sum() / batch.num_decisions

    def multiplier_loss(self, agent: Agent, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Raise the multiplier while the gap is above `lagrange_gap` (appendix F, dual gradient descent)."""
        excess = batch.notes.get("excess_gap")
        if excess is None:
            with torch.no_grad():
                q = agent.part("critic", Critic)(batch.observation, self.taken(batch))
                self.critic_penalty(agent, batch, q, rng)
            excess = batch.notes["excess_gap"]
        multiplier = agent.part("conservatism", Temperature).log_alpha.exp().clamp_max(1e6)
        loss = -multiplier * self.config.conservative_weight * excess.sum() / batch.num_decisions
        return loss, {"conservatism/multiplier": multiplier.detach(), "conservatism/excess": excess.mean()}

    def floor(self, batch: Batch) -> Tensor | None:
        """[B]: what values of the policy's actions count as at least, not those of uniform ones; None: nothing."""
        return None


@preset("cal_ql", backup_entropy=False, max_target=True)
class CalQL(CQL):
    """Calibrated Q-learning (Nakamoto et al. 2023): CQL + a floor at the return of the data, eq. 5.

    Targets are of the best of ten next actions, as in the authors' code.
    """

    def floor(self, batch: Batch) -> Tensor | None:
        """The noted return (rows without one have no floor)."""
        return batch.notes.get("mc_return")

    def annotate(self, agent: Agent, buffer: Buffer, rows: np.ndarray, rng: torch.Generator) -> dict[str, float]:
        """Note the discounted return of each decision."""
        fit_normalizers(agent, buffer, rows)
        return annotate_returns(buffer, rows, gamma=self.config.gamma, reward_weights=self.config.reward_weights)


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
