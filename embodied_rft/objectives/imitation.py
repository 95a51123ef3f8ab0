"""`bc`: fits the policy to actions of the data; `raft`: to the best of its own. Needs no critic.

What the loss is says the policy (`imitation_loss`): likelihood of an action or of a reply's tokens, squared or absolute
error of a chunk, diffusion or flow matching. Which episodes it copies says a `Selection`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.plans import Drawn, Replay, Share
from embodied_rft.data import Batch
from embodied_rft.learning.agent import Agent
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
    successes: bool = False  # only those whose reward stream "success" was positive once

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
    if selection.best_of is not None and segments:
        group = buffer.columns(np.array([s[0] for s in segments]))["group"]
        group = np.where(group < 0, -1 - np.arange(len(group)), group)  # whoever has no group is the best of its own
        order = np.lexsort((-returned, group))
        first = np.flatnonzero(np.append(True, np.diff(group[order]) != 0))
        rank = np.arange(len(order)) - np.repeat(first, np.diff(np.append(first, len(order))))
        keep[order[rank >= selection.best_of]] = False
    if not keep.any():
        raise UserError(f"none of {len(segments)} episodes is selected by {selection}: collect more, or ask for less")
    return np.concatenate([s for s, kept in zip(segments, keep, strict=True) if kept])


@dataclass(config=STRICT, kw_only=True)
class BehaviorCloningConfig(Drawn):
    """Options of `bc`: how the buffer is read, and which episodes of it."""

    offline_share: Share | None = None  # 1.0: demonstrations and offline data only; without a selection
    selection: Selection = Selection()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.selection.min_return is None and self.selection.best_of is None:
            refuse_idle(self, ["reward_weights"], "where no selection looks at returns")
        if not self.selection.everything:
            refuse_idle(self, ["offline_share"], "on selected episodes")

    def batches(self, buffer: Buffer, rng: np.random.Generator, version: int) -> Iterator[Batch]:
        """Batches without end; what is selected is decided when the first one is asked for."""
        if self.selection.everything:
            plan = Replay(batch_size=self.batch_size, offline_share=self.offline_share)
            yield from plan.batches(buffer, rng, version)
        rows = select(buffer, self.selection, self.reward_weights)
        while True:
            yield buffer.batch(rows[rng.integers(len(rows), size=self.batch_size)], next_observation=False)


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
        """Mean imitation loss."""
        loss = imitation(agent, batch, rng).sum() / batch.num_decisions
        return loss, {"policy/loss": loss.detach()}


@preset("raft", selection=Selection(best_of=1))
class RAFT(BehaviorCloning):
    """Reward-ranked fine-tuning (Dong et al. 2023): sample several replies, copy the best, repeat.

    stages: [repeat: {times: 10, stages: [collect: {episodes: 256, group_size: 8}, pretrain: {objective: raft}]}]
    """
