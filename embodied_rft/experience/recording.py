"""What a collector saw, as rows in the order they happened; their owner writes them into a buffer when it suits him.

Knows decisions and the buffer, no environments. Legend: K environments ("streams"), each at one place of its episode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from embodied_rft import distributed
from embodied_rft.buffer.buffer import Buffer
from embodied_rft.data import Decisions, Source, Tree
from embodied_rft.names import UserError, nearest


@dataclass(frozen=True, slots=True)
class Taken:
    """One decision of each of K environments, and what it was paid."""

    streams: np.ndarray  # [K] numbers of the environments; likewise in the other rows
    observation: Tree  # each [K, ...]
    decisions: Decisions
    reward: Mapping[str, np.ndarray]  # streams of reward, each [K]
    terminated: np.ndarray  # [K] bool
    truncated: np.ndarray
    group: np.ndarray  # [K] int64
    seed: np.ndarray
    step: np.ndarray  # of the decision in its episode
    version: int
    source: Source
    span: Any  # of chunks, how many steps were carried out [K]; -1: all
    told: Mapping[str, np.ndarray]  # of episodes that end here, by name [K]; NaN of others

    def write(self, buffer: Buffer) -> np.ndarray:
        """The rows [K]."""
        return buffer.add(
            self.streams,
            self.observation,
            self.decisions,
            self._kept(buffer.schema.rewards),
            self.terminated,
            self.truncated,
            group=self.group,
            seed=self.seed,
            step=self.step,
            version=self.version,
            source=self.source,
            span=self.span,
        )

    def _kept(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """The streams that a buffer keeps. Before an episode's end nobody has succeeded yet, told or not."""
        reward = dict(self.reward)
        if "success" in names and "success" not in reward:
            if (self.terminated | self.truncated).any():
                raise UserError(
                    "buffer.success asks for success, and an episode ended without a word about it: the environment "
                    "must say at the end of each episode whether it succeeded (info['is_success'] or info['success'])"
                )
            reward["success"] = np.zeros(len(self.streams), np.float32)
        return {name: reward[name] if name in reward else self._told(name) for name in names}

    def _told(self, name: str) -> np.ndarray:
        """A stream of what is told at the end of an episode: 0 before, NaN where it ends without that word."""
        over = self.terminated | self.truncated
        if name not in self.told and over.any():
            raise UserError(
                f"buffer.streams asks for {name!r}, and an episode ended without a word about it in info; "
                f"{nearest(name, self.told)}"
            )
        return np.where(over, self.told.get(name, np.float64(0)), 0).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Ahead:
    """What K environments show now, whose episodes go on: their newest decisions can be read already."""

    streams: np.ndarray
    observation: Tree

    def write(self, buffer: Buffer) -> None:
        """Nothing is stored twice, and no episode ends."""
        buffer.peek(self.streams, self.observation)


@dataclass(frozen=True, slots=True)
class Last:
    """What K environments show where their episode ends or is cut."""

    streams: np.ndarray
    observation: Tree

    def write(self, buffer: Buffer) -> np.ndarray:
        """The buffer's numbers of the episodes [K]."""
        return buffer.close(self.streams, self.observation)


@dataclass(frozen=True, slots=True)
class Broken:
    """K environments that failed: what was recorded of their running episodes is not to be read."""

    streams: np.ndarray

    def write(self, buffer: Buffer) -> None:
        """Forget the episodes."""
        buffer.invalidate(self.streams)


@dataclass(frozen=True, slots=True)
class Written:
    """Where a recording is now."""

    rows: np.ndarray  # of its decisions [decisions]
    episodes: np.ndarray  # the buffer's numbers of those that ended


@dataclass(slots=True)
class Recording:
    """Rows in the order they happened, and what became of the episodes that ended.

    After 64 environments ran one 50-step episode each: decisions 3200, successes [64] bool, returns [64].
    """

    decisions: int = 0
    successes: list[bool] = field(default_factory=list)  # of each ended episode, in order
    told: bool = False  # whether the environment said anything about success; if not, `successes` mean nothing
    returns: list[float] = field(default_factory=list)  # undiscounted sum of the environment's reward
    lengths: list[int] = field(default_factory=list)
    statistics: dict[str, list[float]] = field(default_factory=dict)  # what environments tell of them: "invalid/cut"
    invalid: int = 0  # episodes thrown away because their environment failed
    lost: int = 0  # running episodes that a checkpoint could not hold: they are cut, others begin in their place
    passed_over: int | None = None  # episodes that began and were not played; None: there is no curriculum
    cut: int | None = None  # decisions that ran into a length limit; None: the policy has none (trace "cut")
    rows: list[Taken | Ahead | Last | Broken] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        """Rows that `write` takes, at most."""
        return sum(len(each.streams) for each in self.rows if not isinstance(each, Broken))

    @property
    def rewards(self) -> tuple[str, ...]:
        """Names of the streams of reward: "env", and "success" where the environment tells it."""
        return tuple(dict.fromkeys(name for each in self.rows if isinstance(each, Taken) for name in each.reward))

    def write(self, buffer: Buffer) -> Written:
        """Put the rows into the buffer."""
        rows, episodes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for each in self.rows:
            if isinstance(each, Taken):
                rows.append(each.write(buffer))
            elif isinstance(each, Last):
                episodes.append(each.write(buffer))
            else:
                each.write(buffer)
        return Written(np.concatenate(rows), np.concatenate(episodes))

    def metrics(self) -> dict[str, float]:
        """Means over the episodes that ended while recording, those of all processes."""
        own: dict[str, list[Any]] = {"success": self.successes, "return": self.returns, "length": self.lengths}
        all_ = distributed.total({name: [float(v) for v in values] for name, values in (self.statistics | own).items()})
        if not distributed.any_of(self.told):
            del all_["success"]
        metrics = {f"collect/{name}": float(np.mean(values)) for name, values in all_.items() if values}
        metrics["collect/episodes"] = float(len(all_["return"]))
        metrics["collect/invalid_episodes"] = float(sum(distributed.gather(self.invalid)))
        if self.passed_over is not None:
            metrics["collect/passed_over"] = float(sum(distributed.gather(self.passed_over)))
        if self.cut is not None:
            metrics["collect/cut_decisions"] = float(sum(distributed.gather(self.cut)))
        return metrics
