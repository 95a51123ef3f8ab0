"""`td3` and `td3_bc`: actor-critic for policies without entropy (Fujimoto et al. 2018, Fujimoto and Gu 2021)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from embodied_rft.buffer.buffer import Buffer
from embodied_rft.data import Batch, Tree
from embodied_rft.learning.agent import Agent
from embodied_rft.names import UserError
from embodied_rft.networks.critics import Critic
from embodied_rft.networks.tensors import polyak
from embodied_rft.objectives.common import preset
from embodied_rft.objectives.soft_actor_critic import SAC, is_stochastic, sample
from embodied_rft.policy import Policy


@preset("td3", policy_delay=2, policy_value="first", target_noise=0.2)
class TD3(SAC):
    """Twin delayed deterministic policy gradient (Fujimoto et al. 2018, algorithm 1).

    The policy climbs the first critic; it and the targets of actor and critics move at every second update; the next
    action is the target actor's, smoothed by clipped noise. The target actor starts as a copy of the policy in every
    stage, since what came before may have trained the policy in another way.
    """

    needs_entropy = False
    unused = ()  # but those of entropy
    td_weight = 1.0

    def setup(self, agent: Agent, rng: torch.Generator | None = None) -> None:
        """As SAC, for deterministic policies only, and the target actor."""
        if is_stochastic(agent.policy):
            raise UserError(
                f"objective {self.id!r} trains deterministic policies, this one is stochastic: set "
                "deterministic: true in the agent, or use sac"
            )
        super().setup(agent, rng)
        agent.ensure_copy("target_policy")

    def own_values(self, agent: Agent, observation: Tree, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values [E, B], or [1, B] where the first is all that counts, of the policy's own decisions [B, A]."""
        action, log_prob = self.decide(agent, observation, rng)
        members = torch.zeros(1, dtype=torch.int64, device=action.device)
        only = members if self.config.policy_value == "first" else None
        return agent.part("critic", Critic)(observation, action, only), action, log_prob

    def next_value(self, agent: Agent, batch: Batch, rng: torch.Generator) -> tuple[Tensor, None]:
        """The target critics' value [B] of the target actor's smoothed action."""
        c = self.config
        action, _ = sample(agent.part("target_policy", Policy), batch.next_observation, rng)
        if c.target_noise:
            noise = c.target_noise * torch.randn(action.shape, generator=rng, device=action.device)
            noise = noise.clamp(-c.target_noise_clip, c.target_noise_clip)
            action = self.scale.clip(action + self.scale.half_range * noise)
        return self.target_value(agent, batch.next_observation, action, rng), None

    def annotate(self, agent: Agent, buffer: Buffer, rows: np.ndarray, rng: torch.Generator) -> dict[str, float]:
        """Take the statistics of the observations, once; the target actor has those of the actor."""
        noted = super().annotate(agent, buffer, rows, rng)
        polyak(agent.parts["target_policy"], agent.policy, 0.0)
        return noted

    def after_update(self, agent: Agent, update: int) -> None:
        """Move both targets when the policy has moved."""
        if update % self.config.policy_delay == 0:
            super().after_update(agent, update)
            polyak(agent.parts["target_policy"], agent.policy, self.config.tau)


@preset("td3_bc", policy_delay=2, policy_value="first", target_noise=0.2, bc_weight=0.4)
class TD3BC(TD3):
    """A minimalist approach to offline learning (Fujimoto and Gu 2021): TD3, Q of mean size 1, and imitation.

    `bc_weight` is 1 / alpha of the paper, whose alpha is 2.5; the agent's `normalize: true` is the paper's, too. Online
    experience is not imitated. The imitation is the policy's own, the mean squared error of its mode.
    """
