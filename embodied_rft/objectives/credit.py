"""Credit functions: rewards to an advantage per decision or per unit. Found by id, so a third party adds one.

    @register("credit", "centred")
    def centred(agent, batch, lengths, config):
        return {"advantage": batch.reward - batch.reward.mean()}

A function may carry four attributes. `needs_groups`: it compares siblings; it sees whole episodes of whole groups
only, and `finetune` insists on those. `uses_value`: values are wanted; they come as the notes "value" [B], "next_value"
[B] and, where the policy has one for each unit, "unit_value" [B, U]. `per_unit`: the credit is one number a unit,
and rewards of single units (a KL penalty) come as the note "unit_reward" [B, U]; otherwise they are already part of
`batch.reward`, and the credit is [B]. `reads`: those of `OPTIONS` that it reads; others are refused beside it.
Legend: B decisions, S segments (runs of consecutive decisions of one episode), T decisions of a segment, U units.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from embodied_rft.data import Batch
from embodied_rft.learning import returns
from embodied_rft.learning.agent import Agent
from embodied_rft.names import UserError
from embodied_rft.registry import register

F = TypeVar("F", bound=Callable[..., Any])
OPTIONS = ("gamma", "trace_decay", "unit_gamma", "unit_trace_decay")  # of `ppo`, for some credits


class Credit(Protocol):
    """Rewards to credit."""

    def __call__(self, agent: Agent, batch: Batch, lengths: list[int], config: Any) -> dict[str, Tensor]:
        """Notes about decisions [B] that lie segment after segment.

        Args:
            agent: whose decisions they are.
            batch: all of them, with `reward`, `discount`, `mask`, `columns` and the notes named above.
            lengths: T of each segment.
            config: of the objective, such as `PPOConfig`.

        Returns:
            "advantage" [B], or [B, U] if `per_unit`; with a value, "value_target" of the same shape; and, if some
            decisions teach nothing, "dead" [B] bool: with `drop_even_groups` they are not read.
        """


def _wants(**attributes: Any) -> Callable[[F], F]:
    def mark(function: F) -> F:
        for name, value in attributes.items():
            setattr(function, name, value)
        return function

    return mark


# --- with a value ------------------------------------------------------------------------------------------------


@register("credit", "gae")
@_wants(uses_value=True, reads=("gamma", "trace_decay"))
def gae_credit(agent: Agent, batch: Batch, lengths: list[int], config: Any) -> dict[str, Tensor]:
    """Generalised advantage estimation over decisions; see `returns.gae`."""
    advantage = _gae(batch, lengths, config)
    return {"advantage": advantage, "value_target": advantage + batch.notes["value"]}


@register("credit", "bi_level_gae")
@_wants(uses_value=True, per_unit=True, reads=OPTIONS)
def bi_level_gae_credit(agent: Agent, batch: Batch, lengths: list[int], config: Any) -> dict[str, Tensor]:
    """GAE over decisions (turns), then inside each over its units (Wang et al. 2025, VAGEN, section 3).

    A unit reward counts for the units before it in its own decision, and for the decisions before.
    """
    reward = batch.notes.get("unit_reward")
    inside = torch.zeros_like(batch.reward) if reward is None else torch.where(batch.mask, reward, 0.0).sum(1)
    outer = _gae(batch, lengths, config, extra=inside)
    value = batch.notes.get("unit_value")
    if value is None:
        raise UserError("bi_level_gae needs a policy that has unit_values(observation, action, trace) -> [B, U]")
    advantage = returns.unit_advantages(
        outer + batch.notes["value"] - inside,
        value,
        batch.mask,
        reward,
        gamma=config.unit_gamma,
        trace_decay=config.unit_trace_decay,
    )
    return {"advantage": advantage, "value_target": advantage + value}


def _gae(batch: Batch, lengths: list[int], config: Any, extra: Tensor | None = None) -> Tensor:
    index, mask = (torch.from_numpy(a) for a in returns.pad_segments(lengths))
    reward = batch.reward if extra is None else batch.reward + extra
    columns = (reward, batch.discount, batch.notes["value"], batch.notes["next_value"])
    reward, discount, value, next_value = (c[index] for c in columns)
    return returns.gae(reward, discount, value, next_value, mask, trace_decay=config.trace_decay)[mask]


# --- without -----------------------------------------------------------------------------------------------------


@register("credit", "return")
@_wants(per_unit=True, reads=("gamma",))
def return_credit(agent: Agent, batch: Batch, lengths: list[int], config: Any) -> dict[str, Tensor]:
    """The discounted return from each unit on: its own decision's unit rewards, then all that follows.

    Without unit rewards, all units of a decision have the decision's return (Hu 2025, REINFORCE++, eq. 4).
    """
    index, mask = (torch.from_numpy(a) for a in returns.pad_segments(lengths))
    inside = batch.notes.get("unit_reward")
    inside = torch.zeros(batch.mask.shape) if inside is None else torch.where(batch.mask, inside, 0.0)
    own = inside.sum(1)
    total = returns.monte_carlo((batch.reward + own)[index], batch.discount[index], mask)[mask]
    return {"advantage": returns.unit_returns(total - own, inside, batch.mask)}


def _group_credit(batch: Batch, lengths: list[int], baseline: Literal["grpo", "dr_grpo", "rloo"]) -> dict[str, Tensor]:
    """Every decision of an episode gets the episode's advantage over its siblings."""
    index, mask = (torch.from_numpy(a) for a in returns.pad_segments(lengths))
    reward = torch.where(mask, batch.reward[index], 0.0).double()
    total, size = reward.sum(1).float(), reward.abs().sum(1)
    group = batch.columns["group"][index[:, 0].numpy()]
    repeats = torch.tensor(lengths)
    advantage = returns.group_advantages(total, group, baseline=baseline, size=size).repeat_interleave(repeats)
    dead = returns.without_spread(total, group, size)
    if len(dead) and np.unique(group).size == len(group):
        raise UserError(
            f"credit {baseline!r} compares siblings, but no episode has one: set group_size to at least 2 where "
            "experience is collected"
        )
    return {"advantage": advantage, "dead": torch.from_numpy(dead).repeat_interleave(repeats)}


@register("credit", "grpo")
@_wants(needs_groups=True, reads=())
def grpo_credit(agent: Agent, batch: Batch, lengths: list[int], config: Any) -> dict[str, Tensor]:
    """(R - mean) / std of the group (Shao et al. 2024, section 4.1.2)."""
    return _group_credit(batch, lengths, "grpo")


@register("credit", "dr_grpo")
@_wants(needs_groups=True, reads=())
def dr_grpo_credit(agent: Agent, batch: Batch, lengths: list[int], config: Any) -> dict[str, Tensor]:
    """R - mean of the group (Liu et al. 2025, section 3.2)."""
    return _group_credit(batch, lengths, "dr_grpo")


@register("credit", "rloo")
@_wants(needs_groups=True, reads=())
def rloo_credit(agent: Agent, batch: Batch, lengths: list[int], config: Any) -> dict[str, Tensor]:
    """R - mean of the siblings (Ahmadian et al. 2024, eq. 7)."""
    return _group_credit(batch, lengths, "rloo")
