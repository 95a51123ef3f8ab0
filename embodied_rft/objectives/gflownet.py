"""`gflownet`: ends of episodes in proportion to their reward, by balance of flows: many solutions, not only the best.

The policy is the forward policy of a tree: a state is the history of an episode (observations must tell it apart), so
that each has one parent and the backward policy is 1. The part "flow" is log F(o), the total reward behind o; at the
first observation it is log Z. Legend: B decisions, S episodes, T decisions of an episode.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.plans import Fresh, Share
from embodied_rft.data import Batch
from embodied_rft.learning.agent import Agent
from embodied_rft.learning.objective import Losses, Objective, fit_normalizers
from embodied_rft.learning.returns import pad_segments
from embodied_rft.networks.critics import Value
from embodied_rft.objectives.common import (
    UnitWeights,
    readable,
    refuse_unmarked,
    segment_returns,
    unit_weights,
    whole_groups,
)
from embodied_rft.options import STRICT, refuse_idle
from embodied_rft.registry import register


@dataclass(config=STRICT, kw_only=True)
class GFlowNetConfig:
    """Options of `gflownet`."""

    balance: Literal["trajectory", "sub_trajectory", "detailed"] = "trajectory"  # what is made equal
    sub_decay: Share = 0.9  # of "sub_trajectory": a stretch of k decisions counts this to the power of k
    reward: Literal["power", "exponential"] = "power"  # R = max(floor, sum of rewards) ** beta, or exp(beta sum)
    beta: PositiveFloat = 1.0  # how much more the better end is sought
    floor: PositiveFloat = 1e-3  # of "power": what is worth nothing, too, is reached at times
    reward_weights: dict[str, float] | None = None  # mixture of reward streams; None: the environment's reward
    unit_weights: UnitWeights | None = None  # of thought and action units in a decision's log-probability
    num_epochs: PositiveInt = 4  # passes over an iteration
    batch_size: PositiveInt = 256  # decisions
    max_lag: int = 0  # oldest experience, in policy versions: balance holds for whoever acted
    flow_hidden: tuple[int, ...] | None = None  # a new flow has (256, 256)

    def __post_init__(self) -> None:
        if self.balance != "sub_trajectory":
            refuse_idle(self, ["sub_decay"], f"with balance {self.balance!r}")
        if self.reward != "power":
            refuse_idle(self, ["floor"], f"with reward {self.reward!r}, which is never 0")


@register("objective", "gflownet")
class GFlowNet(Objective):
    """Flow balance (Bengio et al. 2021; Kang et al. 2025, GFlowVLM): pi(end) proportional to R(end)."""

    Config: type = GFlowNetConfig
    config: GFlowNetConfig
    independent = True

    def __init__(self, config: GFlowNetConfig) -> None:
        self.config = config
        self.losses: Losses = {"flow": self.flow_loss, "policy": self.policy_loss}
        self.reading = Fresh(
            num_epochs=config.num_epochs,
            batch_size=config.batch_size,
            max_lag=config.max_lag,
            whole_groups=True,
            whole_episodes=True,
            only="live",
            next_observation=False,
            reward_weights=config.reward_weights,
        )

    def setup(self, agent: Agent, rng: torch.Generator | None = None) -> None:
        """The flow."""
        refuse_unmarked(agent.policy, self.config)
        agent.ensure("flow", "value", hidden=self.config.flow_hidden)

    # --- losses --------------------------------------------------------------------------------------------------

    def flow_loss(self, agent: Agent, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The imbalance of episodes, as a loss of log F."""
        flow = agent.part("flow", Value)(batch.observation)
        loss = self._imbalance(batch, self._forward(agent, batch).detach(), flow)
        return loss, {"flow/loss": loss.detach()}

    def policy_loss(self, agent: Agent, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The same as a loss of the policy."""
        with torch.no_grad():
            flow = agent.part("flow", Value)(batch.observation)
        loss = self._imbalance(batch, self._forward(agent, batch), flow)
        return loss, {"policy/loss": loss.detach()}

    def _forward(self, agent: Agent, batch: Batch) -> Tensor:
        """Log-probability of each decision [B]; computed once an update."""
        if "log_forward" not in batch.notes:
            each, _ = agent.policy.log_prob(batch.observation, batch.action, batch.trace)
            part = unit_weights(batch.mask, batch.trace, self.config.unit_weights)
            each = each if part is None else each * part
            batch.notes["log_forward"] = torch.where(batch.mask, each, 0.0).sum(1)
        return batch.notes["log_forward"]

    def _imbalance(self, batch: Batch, forward: Tensor, flow: Tensor) -> Tensor:
        """Mean over episodes of weighted squares of log F(o_i) + sum_{i <= t < j} log pi_t - log F(o_j); F(end) = R.

        "trajectory": i = 0, j = T (Malkin et al. 2022, eq. 14); "detailed": j = i + 1 (Bengio et al. 2023, eq. 9);
        "sub_trajectory": all i < j with weights lambda^(j - i) that sum to 1 (Madan et al. 2023, eq. 10).
        """
        index, mask = (torch.from_numpy(a).to(flow.device) for a in pad_segments(_runs(batch.columns["episode"])))
        length, steps = mask.sum(1), mask.shape[1] + 1
        spent = torch.cat([torch.zeros_like(mask[:, :1]).float(), torch.where(mask, forward[index], 0.0).cumsum(1)], 1)
        place = torch.arange(steps, device=flow.device)
        potential = torch.cat([torch.where(mask, flow[index], 0.0), torch.zeros_like(spent[:, :1])], 1)
        potential = torch.where(place == length[:, None], batch.notes["log_reward"][index[:, :1]], potential) - spent
        apart = place[None, :] - place[:, None]  # j - i
        inside = (apart > 0) & (place <= length[:, None])[:, None, :]
        if self.config.balance == "detailed":
            weight = (inside & (apart == 1)).float()
        elif self.config.balance == "trajectory":
            weight = (inside & (apart == length[:, None, None])).float()
        else:
            weight = torch.where(inside, self.config.sub_decay ** apart.clamp_min(0), 0.0)
        squares = (potential[:, :, None] - potential[:, None, :]).square()
        each = (weight * squares).sum((1, 2)) / weight.sum((1, 2)).clamp_min(1e-30)
        return each.sum() / batch.num_episodes

    # --- around the losses ---------------------------------------------------------------------------------------

    def annotate(self, agent: Agent, buffer: Buffer, rows: np.ndarray, rng: torch.Generator) -> dict[str, float]:
        """Write "log_reward" and "live" for the decisions of whole episodes."""
        segments, c = whole_groups(buffer, buffer.segments(readable(buffer, rows))), self.config
        if not segments:
            return {}
        total = segment_returns(buffer, segments, reward_weights=c.reward_weights)
        log_reward = c.beta * (np.log(np.maximum(total, c.floor)) if c.reward == "power" else total)
        order, lengths = np.concatenate(segments), [len(s) for s in segments]
        buffer.annotate("log_reward", order, np.repeat(log_reward, lengths).astype(np.float32))
        buffer.annotate("live", order, np.ones(len(order), np.float32))
        return {"data/reward": float(total.mean() / np.mean(lengths)), "data/log_reward": float(log_reward.mean())}

    def after_reading(self, agent: Agent, buffer: Buffer, rows: np.ndarray) -> None:
        """Take the statistics of the observations now: while they were learned from, nothing else may move."""
        fit_normalizers(agent, buffer, readable(buffer, rows))


def _runs(numbers: np.ndarray) -> list[int]:
    """How many equal neighbours there are, run after run."""
    ends = np.flatnonzero(np.append(np.diff(numbers) != 0, True)) + 1
    lengths: list[int] = np.diff(ends, prepend=0).tolist()
    return lengths
