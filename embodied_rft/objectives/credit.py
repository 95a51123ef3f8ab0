"""Credit: rewards to an advantage per decision or per unit. Found by id, so a third party adds one.

    @register("credit", "centred")
    class Centred(Credit):
        def __call__(self, agent, batch, lengths, config):
            return {"advantage": batch.reward - batch.reward.mean()}

Legend: B decisions, S segments (runs of consecutive decisions of one episode), T decisions of a segment, U units.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from embodied_rft.data import Batch
from embodied_rft.learning import returns
from embodied_rft.learning.agent import Agent
from embodied_rft.names import UserError
from embodied_rft.options import validate_plugin_config
from embodied_rft.registry import find, kept, register

Baseline = Literal["grpo", "dr_grpo", "rloo"]  # see `returns.group_advantages`
OPTIONS = ("gamma", "trace_decay", "unit_gamma", "unit_trace_decay")  # of `ppo`, for some credits


class Discounts(Protocol):
    """What credits read of an objective's options: `OPTIONS`."""

    gamma: float
    trace_decay: float
    unit_gamma: float
    unit_trace_decay: float


class Credit(ABC):
    """Rewards to credit, and what it wants for that.

    Options of its own are a dataclass `Config`; it is then made as `cls(config)`.
    """

    # Values: as the notes "value" [B], "next_value" [B] and, of policies with one for each unit, "unit_value" [B, U].
    uses_value: ClassVar[bool] = False
    # One number a unit: rewards of single units (a KL penalty) come as the note "unit_reward" [B, U]. Else they are
    # part of `batch.reward`, and the credit is [B].
    per_unit: ClassVar[bool] = False
    needs_groups: ClassVar[bool] = False  # it compares siblings, and sees whole episodes of whole groups only
    reads: ClassVar[tuple[str, ...]] = OPTIONS  # of OPTIONS; others are refused beside it

    @abstractmethod
    def __call__(self, agent: Agent, batch: Batch, lengths: list[int], config: Discounts) -> dict[str, Tensor]:
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


def make_credit(spec: str | Mapping[str, Any]) -> Credit:
    """The credit that "grpo" or {"id": "gigpo", "weight": 0.5} describes."""
    options = {"id": spec} if isinstance(spec, str) else dict(spec)
    id = str(options.pop("id", ""))
    config, made = validate_plugin_config("credit", id, options), find("credit", id)
    if isinstance(made, type):
        made = made() if config is None else made(config)
    return kept(Credit, made, f"credit {id!r}")


# --- with a value ------------------------------------------------------------------------------------------------


@register("credit", "gae")
class GAE(Credit):
    """Generalised advantage estimation over decisions; see `returns.gae`."""

    uses_value, reads = True, ("gamma", "trace_decay")

    def __call__(self, agent: Agent, batch: Batch, lengths: list[int], config: Discounts) -> dict[str, Tensor]:
        """See the class."""
        advantage = _gae(batch, lengths, config)
        return {"advantage": advantage, "value_target": advantage + batch.notes["value"]}


@register("credit", "bi_level_gae")
class BiLevelGAE(Credit):
    """GAE over decisions (turns), then inside each over its units (Wang et al. 2025, VAGEN, section 3).

    A unit reward counts for the units before it in its own decision, and for the decisions before.
    """

    uses_value = per_unit = True

    def __call__(self, agent: Agent, batch: Batch, lengths: list[int], config: Discounts) -> dict[str, Tensor]:
        """See the class."""
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


def _gae(batch: Batch, lengths: list[int], config: Discounts, extra: Tensor | None = None) -> Tensor:
    index, mask = (torch.from_numpy(a) for a in returns.pad_segments(lengths))
    reward = batch.reward if extra is None else batch.reward + extra
    columns = (reward, batch.discount, batch.notes["value"], batch.notes["next_value"])
    reward, discount, value, next_value = (c[index] for c in columns)
    return returns.gae(reward, discount, value, next_value, mask, trace_decay=config.trace_decay)[mask]


# --- without -----------------------------------------------------------------------------------------------------


@register("credit", "return")
class Return(Credit):
    """The discounted return from each unit on: its own decision's unit rewards, then all that follows.

    Without unit rewards, all units of a decision have the decision's return (Hu 2025, REINFORCE++, eq. 4).
    """

    per_unit, reads = True, ("gamma",)

    def __call__(self, agent: Agent, batch: Batch, lengths: list[int], config: Discounts) -> dict[str, Tensor]:
        """See the class."""
        index, mask = (torch.from_numpy(a) for a in returns.pad_segments(lengths))
        inside = batch.notes.get("unit_reward")
        inside = torch.zeros(batch.mask.shape) if inside is None else torch.where(batch.mask, inside, 0.0)
        own = inside.sum(1)
        total = returns.monte_carlo((batch.reward + own)[index], batch.discount[index], mask)[mask]
        return {"advantage": returns.unit_returns(total - own, inside, batch.mask)}


class GroupCredit(Credit):
    """Every decision of an episode gets the episode's advantage over its siblings."""

    needs_groups, reads = True, ()
    baseline: ClassVar[Baseline]

    def __call__(self, agent: Agent, batch: Batch, lengths: list[int], config: Discounts) -> dict[str, Tensor]:
        """See the class."""
        return among_siblings(batch, lengths, baseline=self.baseline, who=self.baseline)


def among_siblings(batch: Batch, lengths: list[int], *, baseline: Baseline, who: str) -> dict[str, Tensor]:
    """Notes [B]: the sum of an episode's rewards over that of its siblings, for all its decisions.

    Raises:
        ValueError: nobody has a sibling; `who` compares them.
    """
    index, mask = (torch.from_numpy(a) for a in returns.pad_segments(lengths))
    reward = torch.where(mask, batch.reward[index], 0.0).double()
    total, size = reward.sum(1).float(), reward.abs().sum(1)
    group = batch.columns["group"][index[:, 0].numpy()]
    repeats = torch.tensor(lengths)
    each = returns.group_advantages(total, group, baseline=baseline, size=size)
    dead = returns.without_spread(total, group, size)
    if len(dead) and np.unique(group).size == len(group):
        raise UserError(
            f"credit {who!r} compares siblings, but no episode has one: set group_size to at least 2 where experience "
            "is collected"
        )
    return {
        "advantage": each.repeat_interleave(repeats),
        "dead": torch.from_numpy(dead).repeat_interleave(repeats),
    }


@register("credit", "grpo")
class GRPOCredit(GroupCredit):
    """(R - mean) / std of the group (Shao et al. 2024, section 4.1.2)."""

    baseline = "grpo"


@register("credit", "dr_grpo")
class DrGRPOCredit(GroupCredit):
    """R - mean of the group (Liu et al. 2025, section 3.2)."""

    baseline = "dr_grpo"


@register("credit", "rloo")
class RLOOCredit(GroupCredit):
    """R - mean of the siblings (Ahmadian et al. 2024, eq. 7)."""

    baseline = "rloo"
