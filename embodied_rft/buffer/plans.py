"""How a learner reads the buffer: `Replay` for off-policy objectives, `Fresh` for on-policy ones.

A plan is a small config that yields batches, of replay without end: whoever learns says how many it takes. It holds no
state: a run resumes from the buffer and the generator alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Unpack

import numpy as np
from pydantic import Field as Option
from pydantic.dataclasses import dataclass

from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.columns import Schema
from embodied_rft.buffer.hindsight import Goals
from embodied_rft.buffer.reading import HowToRead
from embodied_rft.data import Batch
from embodied_rft.names import UserError
from embodied_rft.options import STRICT

Share = Annotated[float, Option(ge=0, le=1)]  # an option in [0, 1], such as a discount


@dataclass(config=STRICT, kw_only=True)
class Drawn:
    """The contract of replay: batches drawn with replacement, without end."""

    batch_size: int = 256  # decisions of one update
    reward_weights: dict[str, float] | None = None  # mixture of reward streams; None: the environment's reward

    def __post_init__(self) -> None:
        _at_least(1, batch_size=self.batch_size)

    def require(self, schema: Schema, goals: Goals | None) -> None:
        """Refuse columns that cannot be read so; by default none are."""

    def batches(self, buffer: Buffer, rng: np.random.Generator, version: int) -> Iterator[Batch]:
        """Batches without end, each drawn when it is asked for. `version` does not matter."""
        raise NotImplementedError


@dataclass(config=STRICT, kw_only=True)
class Replay(Drawn):
    """Of everything that the buffer holds.

    RLPD (Ball et al. 2023) is Replay(offline_share=0.5).
    """

    offline_share: Share | None = None  # of demonstrations and offline data; None: uniform; 0.5: RLPD; 0: WSRL online
    num_steps: int = 1  # n of the n-step return
    gamma: Share = 0.99  # discount of one decision
    hindsight: int = 0  # HER, goal environments: of k + 1 decisions k have a goal that was reached later (usual: 4)

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(1, num_steps=self.num_steps)
        _at_least(0, hindsight=self.hindsight)
        if self.hindsight and self.reward_weights is not None:
            raise UserError("hindsight knows the environment's reward only: leave reward_weights out")

    def require(self, schema: Schema, goals: Goals | None) -> None:
        """Without goals there is no hindsight."""
        if self.hindsight and goals is not None:
            goals.require(schema.observation, schema.trace)

    def batches(self, buffer: Buffer, rng: np.random.Generator, version: int) -> Iterator[Batch]:
        """Each drawn when it is asked for."""
        while True:
            yield buffer.sample(
                rng,
                self.batch_size,
                offline_share=self.offline_share,
                hindsight=self.hindsight,
                num_steps=self.num_steps,
                gamma=self.gamma,
                reward_weights=self.reward_weights,
            )


@dataclass(config=STRICT, kw_only=True)
class Fresh:
    """Every decision of the current policy once per epoch, without replacement.

    PPO is Fresh(num_epochs=10, batch_size=2048); GRPO is Fresh(num_epochs=1, batch_size=512, whole_groups=True).
    """

    num_epochs: int = 1  # passes over an iteration
    batch_size: int = 256  # decisions
    max_lag: int = 0  # oldest policy version that is read, in versions behind the current one
    whole_groups: bool = False  # a group is never torn: batches may be smaller, or larger if one group is
    whole_episodes: bool = False  # beside it: nor is an episode by micro-batches
    min_groups: int = 0  # yield nothing before so many groups can be read: collecting goes on (DAPO)
    only: str | None = None  # name of a note: rows where it is not 1 are left out
    shuffle: bool = True
    next_observation: bool = True
    reward_weights: dict[str, float] | None = None  # as in Replay

    def __post_init__(self) -> None:
        _at_least(1, num_epochs=self.num_epochs, batch_size=self.batch_size)
        _at_least(0, max_lag=self.max_lag, min_groups=self.min_groups)

    def require(self, schema: Schema, goals: Goals | None) -> None:
        """Nothing: every schema can be read so."""

    def batches(self, buffer: Buffer, rng: np.random.Generator, version: int) -> Iterator[Batch]:
        """All readable decisions of policy versions >= version - max_lag, `num_epochs` times.

        Raises:
            ValueError: there is none.
        """
        rows = buffer.rows(min_version=version - self.max_lag)
        if not len(rows):
            raise UserError(
                f"the buffer holds no decision of policy version {version - self.max_lag} or newer: collect first, or "
                "raise max_lag"
            )
        if self.only is not None:
            rows = rows[buffer.note(self.only, rows) == 1]
        book = buffer.columns(rows)
        groups, episodes = book["group"], book["episode"]
        if not len(rows) or len(np.unique(groups)) < self.min_groups:
            return
        reading: HowToRead = {"reward_weights": self.reward_weights, "next_observation": self.next_observation}
        for _ in range(self.num_epochs):
            for batch in read_ahead(buffer, self._parts(rows, groups, episodes, rng), **reading):
                if self.whole_groups:
                    batch.num_episodes = len(np.unique(batch.columns["episode"]))
                    batch.together = "episode" if self.whole_episodes else None
                yield batch

    def _parts(
        self, rows: np.ndarray, groups: np.ndarray, episodes: np.ndarray, rng: np.random.Generator
    ) -> Iterator[np.ndarray]:
        """The rows of one epoch, cut into batches."""
        if not self.whole_groups:
            rows = rng.permutation(rows) if self.shuffle else rows
            yield from (rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size))
            return
        # An episode without a group is one of its own, with a number that no group has.
        labels = np.where(groups < 0, groups.max(initial=0) + 1 + episodes, groups)
        _, first, number, sizes = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
        order = rng.permutation(len(sizes)) if self.shuffle else np.argsort(first)
        rank = np.empty(len(sizes), np.int64)
        rank[order] = np.arange(len(sizes))
        rows = rows[np.lexsort((episodes, rank[number]))]  # the decisions of an episode are neighbours, in their order
        start = end = 0
        for size in sizes[order].tolist():
            if end > start and end + size - start > self.batch_size:
                yield rows[start:end]
                start = end
            end += size
        yield rows[start:end]


def read_ahead(
    buffer: Buffer, parts: Iterable[np.ndarray], *, rows: int = 1024, **reading: Unpack[HowToRead]
) -> Iterator[Batch]:
    """A batch for each of `parts`; small ones are gathered together and handed out as views.

    Args:
        buffer: where the rows are.
        parts: rows of each batch.
        rows: how many are gathered at a time, at most; buffers with ragged columns are read batch by batch, because
            padding would be that of the longest row.
        **reading: as in `Buffer.batch`.
    """
    waiting: list[np.ndarray] = []
    for part in parts:
        if waiting and (buffer.is_ragged or sum(map(len, waiting)) + len(part) > rows):
            yield from _together(buffer, waiting, reading)
            waiting = []
        waiting.append(part)
    if waiting:
        yield from _together(buffer, waiting, reading)


def _together(buffer: Buffer, parts: list[np.ndarray], reading: HowToRead) -> Iterator[Batch]:
    if len(parts) == 1:
        yield buffer.batch(parts[0], **reading)
        return
    yield from buffer.batch(np.concatenate(parts), **reading).cut([len(part) for part in parts])


def _at_least(least: int, **numbers: int) -> None:
    for name, number in numbers.items():
        if number < least:
            raise UserError(f"{name} {number}: at least {least} is expected")
