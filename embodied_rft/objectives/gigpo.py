"""Group-in-group credit: siblings are compared as wholes, and once more wherever they met the same observation.

Legend: B decisions, S episodes, T decisions of an episode.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import NonNegativeFloat
from pydantic.dataclasses import dataclass
from torch import Tensor

from embodied_rft.data import Batch
from embodied_rft.learning import returns
from embodied_rft.learning.agent import Agent
from embodied_rft.learning.anchors import anchors, number
from embodied_rft.objectives.common import preset
from embodied_rft.objectives.credit import Baseline, Credit, Discounts, among_siblings
from embodied_rft.objectives.policy_gradient import PPO
from embodied_rft.options import STRICT
from embodied_rft.registry import register


@dataclass(config=STRICT, kw_only=True)
class GiGPOConfig:
    """Options of credit `gigpo`."""

    weight: NonNegativeFloat = 1.0  # omega: of the comparison at equal observations
    # by what an advantage is divided: the group's standard deviation, or nothing (leave-one-out, up to a factor)
    spread: Literal["std", "none"] = "std"
    anchor: tuple[str, ...] | None = None  # observation keys that are compared; null: "state" if there is one, else all


@register("credit", "gigpo")
class GiGPOCredit(Credit):
    """A(episode) + omega A(step) (Feng et al. 2025, GiGPO, eq. 3, 6, 7 and 8).

    A(episode) compares the sum of an episode's rewards with its siblings'; A(step) compares the discounted return
    from a decision on with that of all decisions of the group that were taken on the same observation (anchor).
    """

    Config = GiGPOConfig
    needs_groups, reads = True, ("gamma",)

    def __init__(self, config: GiGPOConfig | None = None) -> None:
        self.config = config or GiGPOConfig()

    def __call__(self, agent: Agent, batch: Batch, lengths: list[int], config: Discounts) -> dict[str, Tensor]:
        """See the class."""
        c = self.config
        baseline: Baseline = "grpo" if c.spread == "std" else "dr_grpo"
        episode = among_siblings(batch, lengths, baseline=baseline, who="gigpo")
        index, mask = (torch.from_numpy(a) for a in returns.pad_segments(lengths))
        after, size = (
            returns.monte_carlo(reward[index], batch.discount[index], mask)[mask]
            for reward in (batch.reward, batch.reward.abs())
        )
        met = anchors(batch.observation, c.anchor)
        met = number(zip(batch.columns["group"].tolist(), met.tolist(), strict=True))
        step = returns.group_advantages(after, met, baseline=baseline, size=size)
        alone = torch.from_numpy(returns.without_spread(after, met, size)) | (c.weight == 0)
        return {"advantage": episode["advantage"] + c.weight * step, "dead": episode["dead"] & alone}


@preset("gigpo", credit="gigpo", gamma=0.95, normalizer="decisions", normalize_advantage=False)
class GiGPO(PPO):
    """Group-in-group policy optimisation (Feng et al. 2025, eq. 9): every decision counts the same, no value."""
