"""`digirl`: likelihood of those decisions that a step value calls good, in episodes that went better than their task.

Both values are classifiers of success, fitted to what became of episodes; nothing is bootstrapped, so that old and new
experience teach alike. Which tasks are played next is a curriculum (`curricula`), which may ask for the task's value.
Legend: B decisions, S episodes, H decisions of an episode.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field as Option
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional as F

from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.plans import Drawn, Share
from embodied_rft.data import Batch, Source, Tree
from embodied_rft.learning import returns
from embodied_rft.learning.agent import Agent
from embodied_rft.learning.objective import Losses, Metrics, Objective
from embodied_rft.networks.critics import Value
from embodied_rft.networks.tensors import as_tensors
from embodied_rft.objectives.common import imitation, score_in_chunks, segment_returns
from embodied_rft.options import STRICT
from embodied_rft.policy import Imitates, require
from embodied_rft.registry import register

VALUES = ("step_value", "instruction_value")  # parts
UNKNOWN = 3.0  # promised by an episode whose beginning has been overwritten: more than any can keep, it ranks last


@dataclass(config=STRICT, kw_only=True)
class DigiRLConfig(Drawn):
    """Options of `digirl`. `batch_size` decisions are drawn for the values, and as many copied ones for the policy.

    An episode is a success if the sum of its rewards is positive: with success alone, reward_weights: {success: 1}.
    """

    demonstrations: bool = True  # they are episodes like any other; false: only what was collected since counts
    top: Annotated[float, Option(gt=0, le=1)] = 0.1  # share of the episodes that may be copied, the best; 1: all
    # what an episode is best by: its success less what its first observation promised, or its success alone
    baseline: Literal["instruction", "none"] = "instruction"
    decay: Share = 0.5  # lambda: how much the outcome counts in an advantage, to the power of the decisions until it
    margin: float | None = 0.05  # only decisions whose advantage exceeds it are copied; null: all of those episodes
    value_hidden: tuple[int, ...] | None = None  # of new values: (256, 256)
    value_keys: tuple[str, ...] | None = None  # of observations that new values read, as [state]; null: as the policy
    warm_start: bool = True  # keep values that an earlier stage trained

    def batches(self, buffer: Buffer, rng: np.random.Generator, version: int) -> Iterator[Batch]:
        """Two halves: decisions of all episodes that are over, and, with the note "copied", of the best ones.

        Nothing before an episode is over.
        """
        rows = self.over(buffer)
        if not len(rows):
            return
        best = rows[self.best(buffer, rows)]
        while True:
            drawn = [each[rng.integers(len(each), size=self.batch_size)] for each in (rows, best)]
            batch = buffer.batch(np.concatenate(drawn), reward_weights=self.reward_weights)
            batch.notes["copied"] = torch.arange(2 * self.batch_size) >= self.batch_size
            yield replace(batch, num_decisions=self.batch_size)

    def over(self, buffer: Buffer) -> np.ndarray:
        """[B] decisions of episodes that are over, of those that count."""
        sources = [source for source in Source if self.demonstrations or source != Source.DEMONSTRATION]
        rows = buffer.rows(source=sources)
        ended: np.ndarray = rows[np.isfinite(buffer.note("won", rows))]
        return ended

    def best(self, buffer: Buffer, rows: np.ndarray) -> np.ndarray:
        """[B] bool: decisions of the `top` episodes, and of those that are as good as the worst of them."""
        surplus, episode = buffer.note("surplus", rows), buffer.columns(rows)["episode"]
        _, first = np.unique(episode, return_index=True)
        ranked = np.sort(surplus[first])[::-1]
        return np.asarray(surplus >= ranked[math.ceil(self.top * len(ranked)) - 1])


@register("objective", "digirl")
class DigiRL(Objective):
    """Filtered likelihood by two success classifiers (Zhou, Bai et al. 2024, DigiRL, section 4.3)."""

    Config = DigiRLConfig
    config: DigiRLConfig
    foresees = True
    updates_per_decision = 0.125  # 20 batches of 128 after 16 episodes of 10 decisions

    def __init__(self, config: DigiRLConfig) -> None:
        self.config = config
        self.losses: Losses = {
            "step_value": self.step_value_loss,
            "instruction_value": self.instruction_value_loss,
            "policy": self.policy_loss,
        }
        self.reading: DigiRLConfig = config

    def setup(self, agent: Agent, rng: torch.Generator | None = None) -> None:
        """Two values; they are logits of success."""
        name = type(agent.policy).__name__
        require(agent.policy, Imitates, f"policy {name} has no imitation_loss: digirl cannot train it")
        c = self.config
        for part in VALUES:
            agent.ensure(part, "value", hidden=c.value_hidden, keys=c.value_keys, fresh=not c.warm_start)

    # --- losses, in update order ---------------------------------------------------------------------------------

    def step_value_loss(self, agent: Agent, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of V(o) and of V(o') with the episode's success."""
        part, counts = some(batch, ~batch.notes["copied"])
        value, won = agent.part("step_value", Value), part.notes["won"]
        each = [F.binary_cross_entropy_with_logits(value(o), won, reduction="none") for o in looked_at(part)]
        loss = torch.where(counts, each[0] + each[1], 0.0).sum() / batch.num_decisions
        return loss, {"step_value/loss": loss.detach()}

    def instruction_value_loss(
        self, agent: Agent, batch: Batch, rng: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of V(first observation) with the episode's success."""
        begins = torch.from_numpy(batch.columns["step"] == 0).to(batch.reward.device)
        part, counts = some(batch, begins & ~batch.notes["copied"])
        logit = agent.part("instruction_value", Value)(part.observation)
        each = F.binary_cross_entropy_with_logits(logit, part.notes["won"], reduction="none")
        loss = torch.where(counts, each, 0.0).sum() / batch.num_decisions
        return loss, {"instruction_value/loss": loss.detach()}

    def policy_loss(self, agent: Agent, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Imitation loss of the copied decisions whose advantage exceeds the margin, the others are 0."""
        part, counts = some(batch, batch.notes["copied"])
        if (margin := self.config.margin) is not None:
            part, counts = some(part, counts & (self.advantage(agent, part) > margin))
        loss = torch.where(counts, imitation(agent, part, rng), 0.0).sum() / batch.num_decisions
        return loss, {"policy/loss": loss.detach(), "policy/copied": counts.sum() / batch.num_decisions}

    @torch.no_grad()
    def advantage(self, agent: Agent, batch: Batch) -> Tensor:
        """[B]: `returns.doubly_robust` by the step value as it is now."""
        value, following = (torch.sigmoid(agent.part("step_value", Value)(o)) for o in looked_at(batch))
        return returns.doubly_robust(
            batch.reward, value, following, batch.notes["won"], batch.notes["ahead"], decay=self.config.decay
        )

    # --- around the losses ---------------------------------------------------------------------------------------

    def annotate(self, agent: Agent, buffer: Buffer, rows: np.ndarray, rng: torch.Generator) -> Metrics:
        """Write how episodes that are over ended, and how much better than expected all of the buffer's did.

        Notes: "won", 0 or 1; "ahead", decisions until the end; "surplus", success less its baseline.
        """
        super().annotate(agent, buffer, rows, rng)
        segments = [s for s in buffer.segments(rows) if buffer.ends(s[-1:])[0] != "cut"]
        if segments:
            order, lengths = np.concatenate(segments), [len(s) for s in segments]
            total = segment_returns(buffer, segments, reward_weights=self.config.reward_weights)
            buffer.annotate("won", order, np.repeat(total > 0, lengths).astype(np.float32))
            ahead = np.concatenate([np.arange(n)[::-1] for n in lengths])
            buffer.annotate("ahead", order, ahead.astype(np.float32))
        return self._rank(agent, buffer)

    @torch.no_grad()
    def _rank(self, agent: Agent, buffer: Buffer) -> Metrics:
        """The note "surplus" of everything: what was promised changes with the value."""
        rows = self.config.over(buffer)
        won = buffer.note("won", rows)
        if not len(rows):
            return {}
        surplus, found = won, {"data/won": float(won.mean())}
        if self.config.baseline == "instruction":
            book = buffer.columns(rows)
            first = np.flatnonzero(book["step"] == 0)
            batch = buffer.batch(rows[first], reward_weights=self.config.reward_weights, next_observation=False)
            value = score_in_chunks(lambda b: self._promise(agent, b.observation), batch, agent.device).numpy()
            promised = dict(zip(book["episode"][first].tolist(), value.tolist(), strict=True))
            surplus = won - np.array([promised.get(episode, UNKNOWN) for episode in book["episode"].tolist()])
            found |= {"data/promised": float(value.mean())}
        buffer.annotate("surplus", rows, surplus.astype(np.float32))
        return found

    # --- what a task promises ------------------------------------------------------------------------------------

    def _promise(self, agent: Agent, observation: Tree) -> Tensor:
        return torch.sigmoid(agent.part("instruction_value", Value)(dict(observation)))

    @torch.no_grad()
    def foresee(self, agent: Agent, observation: Tree) -> np.ndarray:
        """[K]: the instruction value."""
        shown = {**observation, **as_tensors(observation, agent.device)}
        return self._promise(agent, shown).cpu().numpy()


def looked_at(batch: Batch) -> tuple[Tree, Tree]:
    """What was seen before a decision, and after it."""
    return batch.observation, batch.next_observation


def some(batch: Batch, where: Tensor) -> tuple[Batch, Tensor]:
    """The decisions where [B] is True, and [K] ones; if there is none, one of the others, which does not count.

    So that a micro-batch without any has a loss of 0 with a gradient.
    """
    index = where.nonzero().flatten()
    counts = torch.ones(len(index), dtype=torch.bool, device=where.device)
    if not len(index):
        index, counts = index.new_zeros(1), torch.zeros(1, dtype=torch.bool, device=where.device)
    return batch.take(index.cpu().numpy()), counts
