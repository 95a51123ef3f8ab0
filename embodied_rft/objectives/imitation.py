"""`bc`: fits the policy to actions of the data; `raft`: to the best of its own. Needs no critic.

What the loss is says the policy (`imitation_loss`): likelihood of an action or of a reply's tokens, squared or absolute
error of a chunk, diffusion or flow matching. Which episodes it copies says a `Selection`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from pydantic import PositiveFloat
from pydantic.dataclasses import dataclass
from torch import Tensor

from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.plans import Drawn, Replay, Share
from embodied_rft.data import Batch
from embodied_rft.learning.agent import Agent
from embodied_rft.learning.anchors import anchors, number
from embodied_rft.learning.objective import Losses, Objective
from embodied_rft.names import UserError
from embodied_rft.objectives.common import imitation, preset, segment_returns
from embodied_rft.options import STRICT, refuse_idle
from embodied_rft.policy import Imitates, require
from embodied_rft.registry import register


@dataclass(config=STRICT, kw_only=True, frozen=True)
class Selection:
    """Which episodes are copied; every condition that is given must hold.

    The best of each group of siblings is Selection(best_of=1); rejection sampling is Selection(min_return=1.0).
    """

    newest: int | None = None  # only so many newest episodes are looked at; None: all
    min_return: float | None = None  # least sum of rewards
    best_of: int | None = None  # how many of each group, the best first
    per: Literal["episode", "state"] = "episode"  # best_of is of episodes, or of answers to one observation of a group
    where: str | None = None  # only decisions whose reward stream of this name is positive, such as "good"
    successes: bool = False  # only those whose reward stream "success" was positive once

    def __post_init__(self) -> None:
        if self.best_of is None:
            refuse_idle(self, ["per"], "without best_of")

    @property
    def everything(self) -> bool:
        """Whether no condition is given."""
        return self == Selection()


def select(buffer: Buffer, selection: Selection, reward_weights: dict[str, float] | None = None) -> np.ndarray:
    """The rows of the selected episodes, oldest episode first.

    Raises:
        ValueError: no episode is left, or there is no stream of success.
    """
    segments = buffer.segments(buffer.rows())
    if selection.newest is not None:
        segments = segments[-selection.newest :]
    returned = segment_returns(buffer, segments, reward_weights=reward_weights)
    keep = np.ones(len(segments), bool)
    if selection.min_return is not None:
        keep &= returned >= selection.min_return
    if selection.successes:
        if "success" not in buffer.rewards:
            raise UserError("the buffer has no reward stream 'success': set buffer.success, or select by min_return")
        keep &= segment_returns(buffer, segments, reward_weights={"success": 1.0}) > 0
    if selection.best_of is not None and selection.per == "episode" and segments:
        group = buffer.columns(np.array([s[0] for s in segments]))["group"]
        group = np.where(group < 0, -1 - np.arange(len(group)), group)  # whoever has no group is the best of its own
        keep &= rank(returned, group) < selection.best_of
    rows = np.concatenate([np.zeros(0, np.int64), *(s for s, kept in zip(segments, keep, strict=True) if kept)])
    if selection.best_of is not None and selection.per == "state" and len(rows):
        batch = buffer.batch(rows, reward_weights=reward_weights, next_observation=False)
        group, episode = batch.columns["group"], batch.columns["episode"]
        group = np.where(group < 0, -1 - episode, group)
        met = number(zip(group.tolist(), anchors(batch.observation).tolist(), strict=True))
        rows = rows[rank(batch.reward.numpy(), met) < selection.best_of]
    if selection.where is not None:
        rows = rows[np.nan_to_num(buffer.stream(selection.where, rows)) > 0]
    if not len(rows):
        raise UserError(
            f"nothing of {len(segments)} episodes is selected by {selection}: collect more, or ask for less"
        )
    return rows


def rank(score: np.ndarray, group: np.ndarray) -> np.ndarray:
    """[B]: how many of the same group have a larger score; of equal ones the first counts as larger."""
    order = np.lexsort((-score, group))
    first = np.flatnonzero(np.append(True, np.diff(group[order]) != 0))
    place = np.arange(len(order)) - np.repeat(first, np.diff(np.append(first, len(order))))
    ranks = np.empty(len(order), np.int64)
    ranks[order] = place
    return ranks


def helpful(won: np.ndarray) -> np.ndarray:
    """Which actions [T] of an expert's episode that failed are worth copying (Lan et al. 2025, EEF, section 3.2).

    helpful([0, 1, 0, 1, 0]) is [1, 1, 1, 0]: from the state before action 3 somebody still won, behind it nobody.

    Args:
        won: [T + 1] bool: whether the policy won when it went on from the state before each action, and from the last.

    Returns:
        [T] bool: from some later state it was won. Label it, `buffer.label("good", rows, helpful(won))`, and copy
        `selection: {where: good}`.
    """
    later = np.logical_or.accumulate(np.asarray(won, bool)[::-1])[::-1]
    return later[1:]


@dataclass(config=STRICT, kw_only=True)
class BehaviorCloningConfig(Drawn):
    """Options of `bc`: how the buffer is read, and which episodes of it."""

    offline_share: Share | None = None  # 1.0: demonstrations and offline data only; without a selection
    selection: Selection = Selection()
    temperature: PositiveFloat | None = None  # a decision counts exp(its reward / temperature); None: all the same

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.selection.min_return is None and self.selection.best_of is None and self.temperature is None:
            refuse_idle(self, ["reward_weights"], "where no selection looks at returns, and no temperature at rewards")
        if not self.selection.everything:
            refuse_idle(self, ["offline_share"], "on selected episodes")

    def batches(self, buffer: Buffer, rng: np.random.Generator, version: int) -> Iterator[Batch]:
        """Batches without end; what is selected is decided when the first one is asked for."""
        if self.selection.everything:
            mixed = self.reward_weights
            plan = Replay(batch_size=self.batch_size, offline_share=self.offline_share, reward_weights=mixed)
            yield from plan.batches(buffer, rng, version)
        rows = select(buffer, self.selection, self.reward_weights)
        while True:
            drawn = rows[rng.integers(len(rows), size=self.batch_size)]
            weights = None if self.temperature is None else self.reward_weights
            yield buffer.batch(drawn, reward_weights=weights, next_observation=False)


@register("objective", "bc")
class BehaviorCloning(Objective):
    """Pomerleau 1989: the policy's own `imitation_loss`, averaged over decisions."""

    Config = BehaviorCloningConfig

    def __init__(self, config: BehaviorCloningConfig) -> None:
        self.config = config
        self.losses: Losses = {"policy": self.policy_loss}
        self.reading: BehaviorCloningConfig = config

    def setup(self, agent: Agent, rng: torch.Generator | None = None) -> None:
        """Check that the policy can imitate."""
        name = type(agent.policy).__name__
        require(agent.policy, Imitates, f"policy {name} has no imitation_loss: bc cannot train it")

    def policy_loss(self, agent: Agent, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean imitation loss, of decisions as much as they are worth (Peters and Schaal 2007, reward weighting)."""
        each, warmth = imitation(agent, batch, rng), self.config.temperature
        each = each if warmth is None else each * (batch.reward / warmth).exp()
        loss = each.sum() / batch.num_decisions
        return loss, {"policy/loss": loss.detach()}


@preset("raft", selection=Selection(best_of=1))
class RAFT(BehaviorCloning):
    """Reward-ranked fine-tuning (Dong et al. 2023): sample several replies, copy the best, repeat.

    stages: [repeat: {times: 10, stages: [collect: {episodes: 256, group_size: 8}, pretrain: {objective: raft}]}]
    """


@preset("rise", selection=Selection(best_of=1, per="state"), temperature=1.0)
class RISE(BehaviorCloning):
    """Recursive introspection (Qu et al. 2024): of the answers to each turn the best, weighted by its reward.

    Answers to one turn are those of siblings that met the same observation; a turn that nobody else met has its own.
    """
