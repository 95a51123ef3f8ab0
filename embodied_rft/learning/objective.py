"""What an objective is: the contract of whatever is learned, with a default for all that most of them leave out.

An objective owns losses and what they need, never a loop: the `Learner` steps its losses, stages collect for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.plans import Drawn, Fresh
from embodied_rft.data import Batch, Decisions, Tree
from embodied_rft.learning.agent import Agent
from embodied_rft.policy import Measures, able
from embodied_rft.registry import contract

Metrics = dict[str, float]
LossFunction = Callable[[Agent, Batch, torch.Generator], tuple[Tensor, dict[str, Tensor]]]
Losses = dict[str, LossFunction]


@contract("objective")
class Objective:
    """What is learned: `losses`, and how the buffer is read for them (`reading`); everything else has a default.

    A loss is a sum over the micro-batch divided by `batch.num_decisions` or `batch.num_units`, those of the whole
    batch, so that k micro-batches add up to one batch exactly.

        @register("objective", "cloning")
        class Cloning(Objective):
            Config = CloningConfig

            def __init__(self, config):
                self.config = config
                self.losses = {"policy": self.policy_loss}
                self.reading = Replay(batch_size=config.batch_size)

            def policy_loss(self, agent, batch, rng):
                loss = agent.policy.imitation_loss(batch.observation, batch.action, rng=rng).sum()
                return loss / batch.num_decisions, {}
    """

    Config: type  # a dataclass; all defaults live there
    config: Any
    losses: Losses  # in update order; the key names the part that a loss trains: "critic", "value", "policy", ...
    reading: Drawn | Fresh  # how the buffer is read

    every: dict[str, int] = {}  # noqa: RUF012  updates between two steps of a loss, e.g. {"policy": 2}
    independent: bool = False  # no loss reads what the step of another one changes: one backward pass does for all
    needs_groups: bool = False  # it compares siblings: `finetune` insists on whole episodes of whole groups
    updates_per_decision: float = 1.0  # of replay, as published
    foresees: bool = False  # it has a `foresee`

    # --- around the losses ---------------------------------------------------------------------------------------

    def setup(self, agent: Agent, rng: torch.Generator | None = None) -> None:
        """Make the parts that the losses need (`agent.ensure`), refuse a policy that cannot be trained so."""

    def annotate(self, agent: Agent, buffer: Buffer, rows: np.ndarray, rng: torch.Generator) -> Metrics:
        """Write notes that the losses read, and tell what was found; by default, take the statistics of observations.

        Fresh data: before it is read. Replay: for all rows when a stage starts, then for episodes that have ended.
        """
        fit_normalizers(agent, buffer, rows)
        return {}

    def before_step(self, name: str, agent: Agent, pieces: list[Batch], rng: torch.Generator) -> None:
        """Look at all micro-batches of a batch before the loss `name` is stepped: what no piece can see."""

    def after_update(self, agent: Agent, update: int) -> None:
        """Move target networks; `update` counts from 1."""

    def after_reading(self, agent: Agent, buffer: Buffer, rows: np.ndarray) -> None:
        """Change what had to stay as it was while fresh data was learned from."""

    # --- when ----------------------------------------------------------------------------------------------------

    def due(self, iteration: int) -> Sequence[str] | None:
        """Names of the losses that learn in an iteration (from 0) of a stage; None: all."""
        return None

    def enough(self, metrics: Mapping[str, Tensor]) -> bool:
        """Whether this step is not taken, nor any other on this experience."""
        return False

    def schedule(self, decisions: int) -> None:
        """The stage is so many decisions old."""

    # --- acting --------------------------------------------------------------------------------------------------

    def explore(self, agent: Agent, observation: Tree, rng: torch.Generator) -> Decisions:
        """How to act while learning: as the agent does, unless overridden."""
        return agent.act(observation, rng=rng)

    def foresee(self, agent: Agent, observation: Tree) -> np.ndarray:
        """[K] in [0, 1]: how likely episodes are to be successes that show first what these arrays [K, ...] say."""
        raise NotImplementedError


def fit_normalizers(agent: Agent, buffer: Buffer, rows: np.ndarray, *, limit: int = 20_000) -> None:
    """Give standardising encoders the statistics of at most `limit` rows, spread evenly; once."""
    if len(rows) and (own := able(agent.policy, Measures)) is not None:
        own.fit_statistics(buffer, rows)
    waiting = agent.normalizers()
    if waiting and len(rows):
        spread = rows[:: max(1, len(rows) // limit)][:limit]
        observation = buffer.batch(spread, next_observation=False).observation
        for encoder in waiting:
            encoder.fit({k: v.to(agent.device) for k, v in observation.items() if isinstance(v, Tensor)})
