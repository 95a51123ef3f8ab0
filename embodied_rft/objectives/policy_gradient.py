"""`ppo` and `grpo`: the clipped surrogate on fresh decisions; the two differ in where the credit comes from.

A credit function turns rewards into an advantage per decision; it is found by id (kind "credit"), so a third party adds
one without touching this file. The ratio is taken per unit, whatever a unit is.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from embodied_rft import losses, returns
from embodied_rft.agent import Agent
from embodied_rft.data import Batch
from embodied_rft.objectives.common import STRICT, Losses, fit_normalizers
from embodied_rft.plans import Fresh
from embodied_rft.registry import find, register


@dataclass(config=STRICT, kw_only=True)
class PPOConfig:
    """Options of `ppo`."""

    # Reading
    num_epochs: int = 10
    batch_size: int = 256
    max_lag: int = 0  # oldest experience, in policy versions
    whole_groups: bool = False
    # Credit
    credit: str = "gae"  # "gae", "grpo", "dr_grpo", "rloo" or a third party's
    gamma: float = 0.99
    trace_decay: float = 0.95  # lambda of "gae"
    normalize_advantage: bool = True  # over all decisions read, not over a minibatch
    reward_weights: dict[str, float] | None = None
    # Losses
    clip_low: float = 0.2
    clip_high: float = 0.2
    entropy_weight: float = 0.0
    value_hidden: tuple[int, ...] | None = None  # a new value has (256, 256)


@dataclass(config=STRICT, kw_only=True)
class GRPOConfig(PPOConfig):
    """Options of `grpo`: those of `ppo` with group credit."""

    credit: str = "grpo"
    whole_groups: bool = True
    normalize_advantage: bool = False


class Credit(Protocol):
    """Rewards to credit. `uses_value` (default False) asks for the part "value" and its loss."""

    def __call__(self, agent: Agent, batch: Batch, lengths: list[int], config: PPOConfig) -> dict[str, Tensor]:
        """Notes {"advantage": [B]} (and "value_target": [B]) for segments of `lengths` that lie one after the other."""


@register("objective", "ppo")
class PPO:
    """Proximal policy optimisation (Schulman et al. 2017)."""

    Config: type = PPOConfig

    def __init__(self, config: Any) -> None:
        self.config = config
        self.credit: Credit = find("credit", config.credit)
        self.uses_value = getattr(self.credit, "uses_value", False)
        self.losses: Losses = {"value": self.value_loss} if self.uses_value else {}
        self.losses["policy"] = self.policy_loss
        self.reading = Fresh(
            num_epochs=config.num_epochs,
            batch_size=config.batch_size,
            max_lag=config.max_lag,
            whole_groups=config.whole_groups,
        )

    def setup(self, agent: Agent, rng: torch.Generator | None = None) -> None:
        """The value, where the credit needs one."""
        if self.uses_value:
            hidden = self.config.value_hidden
            agent.ensure("value", "value", hidden=None if hidden is None else list(hidden))

    # --- losses, in update order ---------------------------------------------------------------------------------

    def value_loss(self, agent: Agent, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Half the squared error to the noted target."""
        value = agent.parts["value"](batch.observation)
        loss = 0.5 * losses.squared_error(value, batch.notes["value_target"]).sum() / batch.num_decisions
        return loss, {"value/loss": loss.detach(), "value/mean": value.detach().mean()}

    def policy_loss(self, agent: Agent, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Clipped surrogate and entropy bonus, averaged over units (eq. 7 and 9)."""
        c = self.config
        log_prob, entropy = agent.policy.log_prob(batch.observation, batch.action, batch.trace)
        each = losses.clipped_surrogate(
            log_prob, batch.log_prob, batch.notes["advantage"], low=c.clip_low, high=c.clip_high
        )
        if c.entropy_weight:
            each = each - c.entropy_weight * entropy
        loss = losses.masked_sum(each, batch.mask) / batch.num_units
        kl = losses.masked_sum(losses.kl(batch.log_prob, log_prob.detach()), batch.mask) / batch.mask.sum().clamp_min(1)
        return loss, {"policy/loss": loss.detach(), "policy/kl": kl}

    # --- around the losses ---------------------------------------------------------------------------------------

    def annotate(self, agent: Agent, buffer: Any, rows: np.ndarray, rng: torch.Generator) -> dict[str, float]:
        """Write the notes "advantage" and, with a value, "value_target"."""
        segments = buffer.segments(rows)
        if not segments:
            return {}
        order = np.concatenate(segments)
        config = self.config
        batch = buffer.batch(
            order, gamma=config.gamma, reward_weights=config.reward_weights, next_observation=self.uses_value
        )
        notes = self.credit(agent, batch, [len(s) for s in segments], config)
        if config.normalize_advantage:
            advantage = notes["advantage"]
            notes["advantage"] = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
        for name, value in notes.items():
            buffer.annotate(name, order, value.cpu().numpy())
        # Last, so that ratios of this batch are taken with the statistics that it was acted with.
        fit_normalizers(agent, buffer, rows)
        return {"data/reward": float(batch.reward.mean())}

    def after_update(self, agent: Agent, update: int) -> None:
        """Nothing."""


@register("objective", "grpo")
class GRPO(PPO):
    """Clipped surrogate + group credit, no value (Shao et al. 2024). Nothing else differs."""

    Config = GRPOConfig


# --- credit ----------------------------------------------------------------------------------------------------------


@register("credit", "gae")
@torch.no_grad()
def gae_credit(agent: Agent, batch: Batch, lengths: list[int], config: PPOConfig) -> dict[str, Tensor]:
    """Generalised advantage estimation over segments; see `returns.gae`."""
    value, next_value = (
        _in_chunks(agent, observation, len(batch)) for observation in (batch.observation, batch.next_observation)
    )
    index, mask = (torch.from_numpy(a) for a in returns.pad_segments(lengths))
    reward, discount, before, after = (c[index] for c in (batch.reward, batch.discount, value, next_value))
    advantage = returns.gae(reward, discount, before, after, mask, trace_decay=config.trace_decay)[mask]
    return {"advantage": advantage, "value_target": advantage + value}


gae_credit.uses_value = True  # type: ignore[attr-defined]


def _in_chunks(agent: Agent, observation: dict[str, Tensor], count: int, *, size: int = 4096) -> Tensor:
    """Values [count] on the CPU, a bounded number of observations at a time."""
    chunks = ({k: v[i : i + size].to(agent.device) for k, v in observation.items()} for i in range(0, count, size))
    return torch.cat([agent.parts["value"](chunk).cpu() for chunk in chunks])


def _group_credit(batch: Batch, lengths: list[int], baseline: Any) -> dict[str, Tensor]:
    """Every decision of an episode gets the episode's advantage over its siblings."""
    index, mask = (torch.from_numpy(a) for a in returns.pad_segments(lengths))
    total = torch.where(mask, batch.reward[index], 0.0).sum(1)
    group = batch.columns["group"][index[:, 0].numpy()]
    advantage = returns.group_advantages(total, group, baseline=baseline)
    return {"advantage": advantage.repeat_interleave(torch.tensor(lengths))}


@register("credit", "grpo")
def grpo_credit(agent: Agent, batch: Batch, lengths: list[int], config: PPOConfig) -> dict[str, Tensor]:
    """(R - mean) / std of the group."""
    return _group_credit(batch, lengths, "grpo")


@register("credit", "dr_grpo")
def dr_grpo_credit(agent: Agent, batch: Batch, lengths: list[int], config: PPOConfig) -> dict[str, Tensor]:
    """R - mean of the group."""
    return _group_credit(batch, lengths, "dr_grpo")


@register("credit", "rloo")
def rloo_credit(agent: Agent, batch: Batch, lengths: list[int], config: PPOConfig) -> dict[str, Tensor]:
    """R - mean of the siblings."""
    return _group_credit(batch, lengths, "rloo")
