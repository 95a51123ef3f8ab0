"""`dsrl_sac` and `dsrl_na`: learn from which noise a frozen policy starts (Wagenmaker et al. 2025, DSRL).

Both are soft actor-critic whose decision is the noise, for policies such as `steering`: `choose(observation, rng)`
gives noise, `from_noise(observation, noise)` the action, `draw_noise` the base's own noise; the trace keeps "noise".
Boundary: what is judged, and by which critic. Legend: B rows, D numbers of a noise.
"""

from __future__ import annotations

import torch
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from embodied_rft.buffer.plans import Share
from embodied_rft.data import Batch, Tree
from embodied_rft.learning import losses
from embodied_rft.learning.agent import Agent
from embodied_rft.names import UserError
from embodied_rft.networks.critics import Critic
from embodied_rft.objectives.common import preset
from embodied_rft.objectives.soft_actor_critic import SAC, SACConfig
from embodied_rft.options import STRICT
from embodied_rft.policy import Steered, require


@preset("dsrl_sac", target_entropy=0.0, critic_layer_norm=True)
class DSRLSAC(SAC):
    """DSRL-SAC: the environment together with the frozen base is an environment whose actions are noise.

    It learns from decisions whose noise is known: its own, no demonstrations. As the authors' code has it for
    manipulation: 5 updates a decision (a chunk), target entropy 0, LayerNorm in the critics.
    """

    judges = "noise"
    updates_per_decision = 5.0

    def setup(self, agent: Agent, rng: torch.Generator | None = None) -> None:
        """As SAC, for policies that choose noise only."""
        require_steering(agent, "dsrl_sac")
        super().setup(agent, rng)

    def taken(self, batch: Batch) -> Tensor:
        """The noise [B, D] from which the base started.

        Raises:
            ValueError: somebody else took these decisions.
        """
        noise: Tensor = batch.trace["noise"]
        if not noise.isfinite().all():
            raise UserError(
                "dsrl_sac cannot learn from decisions of others (demonstrations): nobody knows the noise that leads to "
                "their actions. Set offline_share: 0, or use dsrl_na, whose critic judges actions."
            )
        return noise

    def decide(self, agent: Agent, observation: Tree, rng: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """The policy's noise [B, D] and its log-probability [B]."""
        return require(agent.policy, Steered).choose(observation, rng=rng)


@dataclass(config=STRICT, kw_only=True)
class DSRLNAConfig(SACConfig):
    """Options of `dsrl_na`: those of `sac` and these."""

    noise_critic_delay: PositiveInt = 2  # critic updates per update of the noise critic
    own_noise: Share = 0.0  # share of the noises that the noise critic learns from which are the policy's


@preset("dsrl_na", target_entropy=0.0, critic_layer_norm=True)
class DSRLNA(SAC):
    """DSRL-NA: the critic judges actions, so it learns from everybody's; critics of noise are distilled from it.

    Noises that lead to the same action (aliases) then have the same value, whether or not they were tried. Each noise
    critic learns from the action critic of its number, at noises of the base's own distribution (algorithm 2), as far
    as the policy can choose them. Numbers as in `dsrl_sac`; 10 of 20 updates are of the noise critics, too.
    """

    Config: type = DSRLNAConfig
    config: DSRLNAConfig
    updates_per_decision = 5.0

    def __init__(self, config: DSRLNAConfig) -> None:
        super().__init__(config)
        self.every["noise_critic"] = config.noise_critic_delay

    def setup(self, agent: Agent, rng: torch.Generator | None = None) -> None:
        """As SAC, and the part "noise_critic"."""
        require_steering(agent, "dsrl_na")
        super().setup(agent, rng)
        c = self.config
        agent.ensure(
            "noise_critic",
            "critic",
            judges="noise",
            fresh=not c.warm_start,
            hidden=c.critic_hidden,
            num_members=agent.part("critic", Critic).num_members,
            layer_norm=c.critic_layer_norm,
        )
        first = {"critic": self.losses.pop("critic"), "noise_critic": self.noise_critic_loss}
        self.losses = first | self.losses

    def noise_critic_loss(self, agent: Agent, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Half the squared error of Q_e(o, w) to the value Q_e of the action that w leads to, at random w."""
        policy = require(agent.policy, Steered)
        with torch.no_grad():
            noise = policy.draw_noise(len(batch), rng=rng)
            if self.config.own_noise:
                own, _ = policy.choose(batch.observation, rng=rng)
                rows = torch.rand(len(batch), 1, generator=rng, device=noise.device) < self.config.own_noise
                noise = torch.where(rows, own, noise)
            action = policy.from_noise(batch.observation, noise)
            target = agent.part("critic", Critic)(batch.observation, action)
        q = agent.part("noise_critic", Critic)(batch.observation, noise)
        loss = 0.5 * losses.squared_error(q, target).sum() / batch.num_decisions
        return loss, {"noise_critic/loss": loss.detach()}

    def own_values(self, agent: Agent, observation: Tree, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values [E, B] of the policy's noise [B, D]; no gradient passes through the base."""
        noise, log_prob = require(agent.policy, Steered).choose(observation, rng=rng)
        return agent.part("noise_critic", Critic)(observation, noise), noise, log_prob


def require_steering(agent: Agent, objective: str) -> None:
    """Raise ValueError unless the policy chooses the noise of a frozen base."""
    why = f"objective {objective!r} trains the noise of a frozen policy, {type(agent.policy).__name__} has none"
    require(agent.policy, Steered, why + ": put `adapt: {with: steering}` before it")
