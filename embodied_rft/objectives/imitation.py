"""`bc`: behaviour cloning. Fits the policy to the data's actions; needs no reward and no critic."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from embodied_rft.agent import Agent
from embodied_rft.data import Batch
from embodied_rft.objectives.common import STRICT, Losses, fit_normalizers
from embodied_rft.plans import Replay
from embodied_rft.registry import register


@dataclass(config=STRICT, kw_only=True)
class BehaviorCloningConfig:
    """Options of `bc`."""

    batch_size: int = 256
    num_updates: int = 1_000  # per learn call
    offline_share: float | None = None  # 1.0: demonstrations and offline data only


@register("objective", "bc")
class BehaviorCloning:
    """Pomerleau 1989: the policy's own `imitation_loss`, averaged over decisions."""

    Config = BehaviorCloningConfig

    def __init__(self, config: BehaviorCloningConfig) -> None:
        self.config = config
        self.losses: Losses = {"policy": self.policy_loss}
        self.reading = Replay(
            num_updates=config.num_updates, batch_size=config.batch_size, offline_share=config.offline_share
        )

    def setup(self, agent: Agent, rng: torch.Generator | None = None) -> None:
        """Check that the policy can imitate."""
        if not hasattr(agent.policy, "imitation_loss"):
            raise ValueError(f"policy {type(agent.policy).__name__} has no imitation_loss: bc cannot train it")

    def policy_loss(self, agent: Agent, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean imitation loss."""
        loss = agent.policy.imitation_loss(batch.observation, batch.action, rng=rng).sum() / batch.num_decisions
        return loss, {"policy/imitation": loss.detach()}

    def annotate(self, agent: Agent, buffer: Any, rows: np.ndarray, rng: torch.Generator) -> dict[str, float]:
        """Take the statistics of the observations, once."""
        fit_normalizers(agent, buffer, rows)
        return {}

    def after_update(self, agent: Agent, update: int) -> None:
        """Nothing."""
