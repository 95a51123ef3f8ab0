"""How rows become a batch: n-step windows, discounts, mixtures of reward streams, padding. Reads, never writes.

Legend: B rows of a batch, n steps of a window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from embodied_rft.buffer.columns import BOOKKEEPING, Column, DenseColumns, ImageColumn, Notes, RaggedColumn, Schema
from embodied_rft.buffer.ring import Ring
from embodied_rft.data import PAST, Batch, End, Past, Ragged, Source, Trajectory
from embodied_rft.names import UserError, nearest

ENDS: tuple[End, ...] = ("cut", "terminated", "truncated")  # of the code in `Store.end`, of an episode's last decision
TERMINATED, TRUNCATED = 1, 2
# Streams of reward that are paid once, with the last decision of an episode, whatever ended it. Nothing is paid behind
# that: where one of them counts, a time limit does not bootstrap either, or a success would be counted again.
FINAL = ("success",)


@dataclass(frozen=True, slots=True)
class Reading:
    """What a batch is asked for."""

    num_steps: int = 1  # n of the n-step window; it stops early at the end of the episode and at its newest decision
    gamma: float = 0.99  # discount of one decision
    next_observation: bool = True  # False leaves `next_observation` and `next_trace` empty
    reward_weights: Mapping[str, float] | None = None  # such as {"env": 1, "success": 0.5}; None: the environment's


class HowToRead(TypedDict, total=False):
    """The same, of which nothing need be given."""

    num_steps: int
    gamma: float
    next_observation: bool
    reward_weights: Mapping[str, float] | None


@dataclass(frozen=True, slots=True)
class Store:
    """Where the rows of a buffer lie: its columns and links, shared with it."""

    dense: DenseColumns
    ragged: dict[str, RaggedColumn | ImageColumn]
    notes: Notes
    labels: Notes  # streams of reward that are no column of the schema
    ring: Ring
    book: np.ndarray  # [C, len(BOOKKEEPING)]
    end: np.ndarray  # [C] index into ENDS
    past: bool = False  # whether an observation is read with what happened before in its episode

    def columns(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """group, episode, step, version, source, seed, span and end (index into ENDS; 0 before the end) of rows [B]."""
        book = self.book.take(rows, 0)
        return {name: book[:, i] for i, name in enumerate(BOOKKEEPING)} | {"end": self.end[rows]}

    def column(self, name: str, rows: np.ndarray) -> Column:
        """One column of rows [B]: "action/", "observation/KEY", "reward/env"."""
        column = self.ragged.get(name)
        return self.dense.column(name, rows) if column is None else column.read(rows)

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of all streams of reward: those of the schema, then those that were labelled."""
        sections = (name.split("/", 1) for name in self.dense.places)
        return (*(key for section, key in sections if section == "reward"), *self.labels.dense)

    def stream(self, name: str, rows: np.ndarray) -> np.ndarray:
        """One stream of reward, of rows [B]; NaN where it is unknown.

        Raises:
            ValueError: there is none of this name.
        """
        if name not in self.streams:
            raise UserError(f"there is no reward stream {name!r}; {nearest(name, self.streams)}")
        labels = self.labels.dense.get(name)
        return self.dense.column(f"reward/{name}", rows) if labels is None else labels[rows]


def episode(store: Store, schema: Schema, run: np.ndarray) -> Trajectory:
    """Consecutive decisions [T] of one episode, copied."""
    whole, last = np.append(run, store.ring.next[run[-1]]), run[-1]
    rewards = {name: store.stream(name, run) for name in store.streams}
    numbers, success = store.columns(run), rewards.get("success")
    first = {name: int(numbers[name][0]) for name in ("version", "group", "seed")}
    won = None if success is None else True if (success > 0).any() else None if np.isnan(success).any() else False
    log_prob = store.column("log_prob/", run)
    assert not isinstance(log_prob, list)
    return Trajectory(
        observation={key: store.column(f"observation/{key}", whole) for key in schema.observation},
        action=store.column("action/", run),
        reward=rewards.pop("env"),
        end=ENDS[store.end[last]],
        log_prob=log_prob,
        trace={key: store.column(f"trace/{key}", run) for key in schema.trace},
        rewards=rewards,
        source=Source(int(numbers["source"][0])),
        span=None if (numbers["span"] < 0).all() else numbers["span"],
        success=won,
        **first,
    )


def read(store: Store, rows: np.ndarray, reading: Reading) -> Batch:
    """Readable rows [B] as tensors."""
    now: dict[str, dict[str, Any]] = store.dense.read(rows)
    if reading.num_steps == 1:
        last, discount = rows, now["continues"][""] * reading.gamma
        weights = reading.reward_weights
        reward = now["reward"]["env"] if weights is None else torch.from_numpy(mix(store, rows, weights))
    else:
        reward, discount, last = _window(store, rows, reading)
    if reading.reward_weights and reward.isnan().any():  # what an environment pays is finite: checked when it is added
        _refuse_unknown(store, rows, reading)
    if any((reading.reward_weights or {}).get(name) for name in FINAL):
        discount = torch.where(torch.from_numpy(store.end[last] == TRUNCATED), 0.0, discount)
    after = store.ring.next[last]
    following: dict[str, dict[str, Any]] = {"observation": {}, "trace": {}}
    if reading.next_observation:
        following = store.dense.read(after, following=True)
    for name, ragged in store.ragged.items():
        section, key = name.split("/", 1)
        now.setdefault(section, {})[key] = ragged.read(rows)
        if reading.next_observation and section in following:
            following[section][key] = ragged.read(after)
    if store.past:
        now["observation"][PAST] = past(store, rows)
        if reading.next_observation:
            following["observation"][PAST] = past(store, after)
    log_prob, lengths = now["log_prob"][""], None
    if isinstance(log_prob, Ragged):
        lengths = log_prob.lengths
        log_prob, mask = (torch.from_numpy(a) for a in log_prob.pad())
    else:
        mask = torch.ones(log_prob.shape, dtype=torch.bool)
    return Batch(
        observation=now["observation"],
        action=now["action"][""],
        reward=reward,
        discount=discount,
        next_observation=following["observation"],
        log_prob=log_prob,
        mask=mask,
        trace=now["trace"],
        next_trace=following["trace"],
        notes=store.notes.read(rows, lengths),
        rows=rows,
        columns=store.columns(rows),
        num_decisions=len(rows),
        num_units=mask.numel() if lengths is None else int(lengths.sum()),
    )


def past(store: Store, rows: np.ndarray) -> Past:
    """What happened before rows [B] in their episodes.

    Raises:
        ValueError: a part of it has been overwritten.
    """
    table, offsets = store.ring.earlier(rows)
    step = store.columns(rows)["step"]
    short = np.flatnonzero(np.diff(offsets) != step)
    if len(short):
        raise UserError(
            f"row {rows[short[0]]} is decision {step[short[0]]} of its episode, of which the buffer still has "
            f"{offsets[short[0] + 1] - offsets[short[0]]} earlier ones: it is too small for whole conversations. "
            "Enlarge buffer.capacity."
        )
    every, index = np.unique(table, return_inverse=True)
    names = [*store.dense.places, *store.ragged]
    parts: dict[str, dict[str, Any]] = {"observation": {}, "trace": {}}
    for name in names:
        section, key = name.split("/", 1)
        if section in parts:
            parts[section][key] = store.column(name, every)
    return Past(
        Ragged(index.reshape(-1), offsets), parts["observation"], store.column("action/", every), parts["trace"]
    )


def _window(store: Store, rows: np.ndarray, reading: Reading) -> tuple[Tensor, Tensor, np.ndarray]:
    """Of windows of k <= n decisions: sum of gamma^i r_i [B]; gamma^k, or 0 after termination [B]; last row [B]."""
    gamma, n = reading.gamma, reading.num_steps
    steps, valid = store.ring.windows(rows, n)
    powers = gamma ** np.arange(n)[:, None]
    reward = np.where(valid, powers * mix(store, steps.ravel(), reading.reward_weights).reshape(steps.shape), 0).sum(0)
    discount = gamma ** valid.sum(0) * store.dense.column("continues/", steps[-1])
    return torch.from_numpy(reward.astype(np.float32)), torch.from_numpy(discount.astype(np.float32)), steps[-1]


def mix(store: Store, rows: np.ndarray, weights: Mapping[str, float] | None) -> np.ndarray:
    """The environment's reward [B], or the weighted sum of streams of reward; NaN where one of them is unknown."""
    if weights is None:
        return store.stream("env", rows)
    return np.asarray(sum(weight * store.stream(name, rows) for name, weight in weights.items()))


def _refuse_unknown(store: Store, rows: np.ndarray, reading: Reading) -> None:
    """Raise ValueError for the first unknown number of a stream that is read."""
    steps, valid = store.ring.windows(rows, reading.num_steps)
    for name in reading.reward_weights or ("env",):
        asked = np.unique(steps[valid])
        unknown = asked[np.isnan(store.stream(name, asked))]
        if len(unknown):
            raise UserError(
                f"reward stream {name!r} is unknown for {len(unknown)} of {len(asked)} decisions, row {unknown[0]} "
                "first: nobody said what they are paid. Record it (`erft demos` tells success, trajectories have "
                "`rewards`), label them (Buffer.label), or leave it out of reward_weights"
            )
