"""`density` and `spot`: learn where the data has actions, then keep the policy's actions there.

Fit `density` first (a conditional VAE); `spot` is TD3 plus a penalty on actions the density finds unlikely. Online the
penalty cools, so that the policy may leave the data once it knows better.
"""

from __future__ import annotations

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from embodied_rft.buffer.plans import Replay
from embodied_rft.data import Batch
from embodied_rft.learning.agent import Agent
from embodied_rft.learning.objective import Losses, Objective
from embodied_rft.names import UserError
from embodied_rft.networks.critics import Density
from embodied_rft.objectives.common import preset
from embodied_rft.objectives.deterministic import TD3
from embodied_rft.objectives.soft_actor_critic import SACConfig
from embodied_rft.options import STRICT, refuse_idle
from embodied_rft.registry import register


@dataclass(config=STRICT, kw_only=True)
class DensityConfig:
    """Options of `density`."""

    batch_size: int = 256  # decisions of one update
    offline_share: float | None = None  # share of each batch from demonstrations and offline data; null: uniform
    hidden: tuple[int, ...] = (750, 750)  # layers of the network
    beta: PositiveFloat = 0.5  # weight of the KL term


@register("objective", "density")
class DensityObjective(Objective):
    """Fits the part "density", a conditional VAE, to the data's actions (Wu et al. 2022, SPOT, eq. 8)."""

    Config = DensityConfig
    updates_per_decision: float = 1.0

    def __init__(self, config: DensityConfig) -> None:
        self.config = config
        self.losses: Losses = {"density": self.density_loss}
        self.reading = Replay(batch_size=config.batch_size, offline_share=config.offline_share)

    def setup(self, agent: Agent, rng: torch.Generator | None = None) -> None:
        """The density."""
        agent.ensure("density", "density", hidden=self.config.hidden)

    def density_loss(self, agent: Agent, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean negative evidence bound."""
        density, beta = agent.part("density", Density), self.config.beta
        each = density.negative_elbo(batch.observation, batch.action, beta=beta, rng=rng)
        loss = each.sum() / batch.num_decisions
        return loss, {"density/negative_elbo": loss.detach()}


@dataclass(config=STRICT, kw_only=True)
class SPOTConfig(SACConfig):
    """Options of `spot`: those of `td3` and these."""

    support_weight: NonNegativeFloat = 0.1  # lambda, in units of the mean |Q|
    final_support_weight: NonNegativeFloat | None = None  # None: lambda stays; else it cools to this
    cooling_updates: PositiveInt = 10_000  # linearly over this many updates
    beta: PositiveFloat = 0.5  # as in `density`

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.final_support_weight is None:
            refuse_idle(self, ["cooling_updates"], "without final_support_weight")


@preset("spot", policy_delay=2, policy_value="first", target_noise=0.2)
class SPOT(TD3):
    """Supported policy optimisation (Wu et al. 2022, eq. 11): TD3, Q of mean size 1, + lambda * -log density."""

    Config: type = SPOTConfig
    config: SPOTConfig

    def setup(self, agent: Agent, rng: torch.Generator | None = None) -> None:
        """As TD3; the density must exist."""
        super().setup(agent, rng)
        if "density" not in agent.parts:
            raise UserError(
                "spot needs a density of the data: put the stage `pretrain: {objective: density}` before it"
            )
        agent.part("density", Density).weight.fill_(self.config.support_weight)

    penalises = True

    def policy_penalty(self, agent: Agent, batch: Batch, action: Tensor, rng: torch.Generator) -> Tensor:
        """Lambda * negative evidence bound of the action."""
        density = agent.part("density", Density)
        each = density.negative_elbo(batch.observation, action, beta=self.config.beta, rng=rng)
        penalty = density.weight * each.sum() / batch.num_decisions
        imitation = super().policy_penalty(agent, batch, action, rng)
        return penalty if imitation is None else penalty + imitation

    def after_update(self, agent: Agent, update: int) -> None:
        """As TD3, and cool lambda."""
        super().after_update(agent, update)
        c = self.config
        if c.final_support_weight is not None:
            done = min(1.0, update / c.cooling_updates)
            weight = c.support_weight + done * (c.final_support_weight - c.support_weight)
            agent.part("density", Density).weight.fill_(weight)
