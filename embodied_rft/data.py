"""The types that cross room boundaries. Imports nothing of ours and knows no algorithm.

Legend of all shapes: N environments stepped together, B rows (decisions) of a batch, T decisions of an episode,
U units of a decision (whatever has one log-probability), G siblings of a group, A action dimensions.
A `Tree` is a flat dict; nesting is written in the key: {"observation": [N, 25], "image/front": [N, 128, 128, 3]}.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor

Space = gym.Space[Any]  # of observations or of actions; the type of its values is known only when it runs
Tree = Mapping[str, Any]
TensorTree = dict[str, Tensor]
TREES = ("observation", "next_observation", "trace", "next_trace", "notes", "columns")  # of a Batch, each of B rows
LEAVES = ("action", "reward", "discount", "log_prob", "mask")  # likewise


class Source(enum.IntEnum):
    """Where a decision came from."""

    DEMONSTRATION = 0
    OFFLINE = 1
    ONLINE = 2
    INTERVENTION = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check of `erft doctor` found: Finding("3.1.0", "broken", "pip install mujoco==3.3.0")."""

    value: str
    state: Literal["ok", "note", "broken"]  # note: works without
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Field:
    """What one row of a column holds.

    Field((25,), "float32") is a dense vector, Field((), "int64", "ragged") a list of token ids of any length,
    Field((), "str", "ragged") a text, Field((), "uint8", "images") a list of images of any number and size, stored once
    each (see `images`).
    """

    shape: tuple[int, ...] = ()
    dtype: str = "float32"
    kind: Literal["dense", "ragged", "images"] = "dense"


@dataclass(frozen=True, slots=True)
class Ragged:
    """Rows of different length, never padded at rest.

    Ragged.of([[7, 8], [], [9]]) has values [7, 8, 9] and offsets [0, 2, 2, 3].
    """

    values: np.ndarray  # [sum of lengths, ...]
    offsets: np.ndarray  # [rows + 1] int64, offsets[0] == 0

    @classmethod
    def of(cls, rows: Sequence[Any], dtype: DTypeLike | None = None, shape: tuple[int, ...] = ()) -> Ragged:
        """From a list of arrays; `dtype` and trailing `shape` matter only when there is no value at all."""
        arrays = [np.asarray(row, dtype=dtype).reshape(-1, *shape) for row in rows]
        offsets = np.zeros(len(arrays) + 1, dtype=np.int64)
        np.cumsum([len(a) for a in arrays], out=offsets[1:])
        values = np.concatenate(arrays) if arrays else np.zeros((0, *shape), dtype=dtype or np.float32)
        return cls(values, offsets)

    @classmethod
    def of_texts(cls, texts: Sequence[str]) -> Ragged:
        """Strings as UTF-8 bytes, one row each: how texts are stored."""
        return cls.of([np.frombuffer(text.encode(), np.uint8) for text in texts], np.uint8)

    def texts(self) -> list[str]:
        """The inverse of `of_texts`."""
        return [row.tobytes().decode() for row in self]

    @property
    def lengths(self) -> np.ndarray:
        """[rows] int64."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> np.ndarray:
        """The values of one row (a view)."""
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def take(self, rows: np.ndarray) -> Ragged:
        """Some rows, in the order given, repeats allowed."""
        rows = np.asarray(rows, dtype=np.int64)
        lengths = self.lengths[rows]
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        flat = np.repeat(self.offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Ragged(self.values[flat], offsets)

    def pad(self, value: float = 0, side: Literal["left", "right"] = "right") -> tuple[np.ndarray, np.ndarray]:
        """(values [rows, longest, ...], mask [rows, longest] bool), made only when a batch needs it."""
        lengths = self.lengths
        width = int(lengths.max(initial=0))
        position = np.arange(width)[None, :]
        mask = position < lengths[:, None] if side == "right" else position >= width - lengths[:, None]
        padded = np.full((len(self), width, *self.values.shape[1:]), value, dtype=self.values.dtype)
        padded[mask] = self.values
        return padded, mask

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.row(i) for i in range(len(self)))


def is_picture(shape: tuple[int, ...], dtype: DTypeLike) -> bool:
    """Whether values of this shape and dtype are pictures: (64, 64, 3), "uint8"."""
    return len(shape) == 3 and np.dtype(dtype) == np.uint8


PAST = "past"  # key of an observation: what happened before in its episode, for policies that read it


@dataclass(frozen=True, slots=True)
class Past:
    """The earlier decisions of the episodes that B rows belong to: a window over rows, in which nothing is twice.

    Of the third decision of an episode and the second of another one: Past(Ragged.of([[0, 1], [2]]), {"message":
    ["a", "b", "c"]}, ["left", "up", "down"], {"reply": Ragged.of([[7], [8, 9], [7]])}).
    """

    index: Ragged  # [B] numbers of decisions in the table below, oldest first
    observation: Tree  # the table: what D decisions were taken on, each [D, ...]
    action: Any  # [D, ...]
    trace: Tree  # each [D, ...]

    def __len__(self) -> int:
        return len(self.index)

    def take(self, rows: np.ndarray) -> Past:
        """Some rows; the table stays."""
        return replace(self, index=self.index.take(rows))


Action = np.ndarray | Sequence[str]  # what N environments receive: [N, A] numbers, [N, ...] choices, or N strings


def pick(value: Any, index: slice | np.ndarray) -> Any:
    """Some rows of a column of a batch, whatever its kind; views where `index` is a slice of a tensor or an array."""
    if isinstance(value, (Ragged, Past, list, tuple)):
        rows = np.arange(*index.indices(len(value))) if isinstance(index, slice) else np.arange(len(value))[index]
        return [value[i] for i in rows] if isinstance(value, (list, tuple)) else value.take(rows)
    if isinstance(value, Tensor) and isinstance(index, np.ndarray):
        return value[torch.from_numpy(index)]
    return value[index]


def pick_tree(tree: Tree, index: slice | np.ndarray) -> dict[str, Any]:
    """`pick` of every leaf."""
    return {key: pick(value, index) for key, value in tree.items()}


CUT = "cut"  # key of a trace, bool: the decision ran into a length limit
MARK = "mark"  # key of a trace, int8 a unit: 0 a part of a thought, 1 of the action


@dataclass(slots=True)
class Decisions:
    """N decisions as they were taken: one call of the policy.

    A Gaussian arm policy: Decisions(action=[N, 4], log_prob=[N, 1]). A flow head with K steps: log_prob [N, K], trace
    {"chain": [N, K + 1, A]}. A language policy: action is a list of N strings, log_prob a `Ragged` over reply tokens,
    trace {"prompt": Ragged, "reply": Ragged}.
    """

    action: Any  # what env.step receives: [N, A] array, [N] int array, or a list of N strings
    log_prob: np.ndarray | Ragged | None  # behaviour log-probability of each unit, [N, U] or ragged; None: unknown
    trace: dict[str, Any] = field(default_factory=dict)  # what is needed to score the same decision again; and `CUT`

    def take(self, index: slice | np.ndarray) -> Decisions:
        """Some of them."""
        log_prob = None if self.log_prob is None else pick(self.log_prob, index)
        return Decisions(pick(self.action, index), log_prob, pick_tree(self.trace, index))


End = Literal["terminated", "truncated", "cut"]


@dataclass(frozen=True, slots=True)
class Trajectory:
    """Consecutive decisions of one episode: a view for people and tests, and how offline data comes in.

    A 2-step episode that ran into its time limit has 3 observations, 2 actions, rewards [0, 0] and end "truncated".
    """

    observation: Tree  # each [T + 1, ...]; the last one only bootstraps
    action: Any  # [T, ...] or a list of T strings
    reward: np.ndarray  # [T] float32
    end: End
    log_prob: np.ndarray | Ragged | None = None  # [T, U]; None when unknown (demonstrations)
    trace: Tree = field(default_factory=dict)  # each [T, ...]
    rewards: Tree = field(default_factory=dict)  # further reward streams, each [T]
    source: Source = Source.ONLINE
    version: int = 0
    group: int = -1
    seed: int = -1  # initial state
    span: np.ndarray | None = None  # [T] steps of each chunk that were carried out; None: all, or unknown
    success: bool | None = None

    def __len__(self) -> int:
        return len(self.reward)


@dataclass(slots=True)
class Batch:
    """B decisions as tensors: all that a loss may read.

    `reward` is the discounted sum of the next n rewards, `discount` the factor on the bootstrap value of
    `next_observation`: gamma**n, 0 if the window ended by termination, unchanged if by truncation.
    """

    observation: TensorTree  # each [B, ...]; texts are lists of B strings
    action: Any  # [B, A] or [B], or a list of B strings
    reward: Tensor  # [B]
    discount: Tensor  # [B]
    next_observation: TensorTree  # each [B, ...]; empty when not asked for
    log_prob: Tensor  # [B, U] behaviour log-probability
    mask: Tensor  # [B, U] bool, False where U is padding
    trace: dict[str, Any] = field(default_factory=dict)
    next_trace: dict[str, Any] = field(default_factory=dict)
    notes: TensorTree = field(default_factory=dict)  # columns written by annotate: advantage, mc_return, ...
    rows: np.ndarray | None = None  # [B] where these decisions live in the buffer
    columns: dict[str, np.ndarray] = field(default_factory=dict)  # group, episode, step, version, source, end: each [B]
    num_decisions: int = 0  # of the whole batch; kept by split(), so that micro-batches sum up exactly
    num_units: int = 0
    num_episodes: int = 0  # counted where episodes are whole
    together: str | None = None  # column whose equal numbers, which are neighbours, no micro-batch separates

    def __len__(self) -> int:
        return len(self.reward)

    @property
    def normalizers(self) -> dict[str, int]:
        """By what losses divide, e.g. {"num_decisions": 256, "num_units": 256}."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name.startswith("num_")}

    @property
    def atoms(self) -> np.ndarray | None:
        """[B] numbers: decisions of one number belong into one micro-batch; None: each stands for itself."""
        return None if self.together is None else self.columns[self.together]

    def take(self, index: slice | np.ndarray) -> Batch:
        """Some decisions of this batch; the normalisers stay those of the whole batch."""
        parts: dict[str, Any] = {n: {k: pick(v, index) for k, v in getattr(self, n).items()} for n in TREES}
        parts |= {name: pick(getattr(self, name), index) for name in LEAVES}
        width = longest = self.mask.shape[1]
        if width > 1:
            used = parts["mask"].any(0).nonzero()
            longest = int(used[-1]) + 1 if len(used) else 0
        if longest < width:  # units of these rows only: what is computed for them is no wider
            parts |= {name: parts[name][:, :longest] for name in ("log_prob", "mask")}
            per_unit = {k for k, v in parts["notes"].items() if v.dim() == 2 and v.shape[1] == width}
            parts["notes"] |= {k: parts["notes"][k][:, :longest] for k in per_unit}
        return replace(self, **parts, rows=None if self.rows is None else self.rows[index])

    def split(self, max_decisions: int) -> list[Batch]:
        """Micro-batches of at most `max_decisions`; their losses and gradients add up to those of the whole.

        What belongs together and is longer is one of its own.
        """
        if (atoms := self.atoms) is None:
            return [self.take(slice(i, i + max_decisions)) for i in range(0, len(self), max_decisions)]
        ends = np.flatnonzero(np.append(np.diff(atoms) != 0, True)) + 1
        pieces, start = [], 0
        for end, following in zip(ends, [*ends[1:], np.inf], strict=True):
            if following - start > max_decisions:
                pieces.append(self.take(slice(start, int(end))))
                start = int(end)
        return pieces

    def cut(self, sizes: Sequence[int]) -> list[Batch]:
        """Batches of their own, of these sizes, one after the other: views; nothing of this batch may be padding."""
        ends = np.cumsum(sizes).tolist()
        places = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]

        def parts(value: Any) -> Sequence[Any]:
            return value.split(sizes) if isinstance(value, Tensor) else [pick(value, place) for place in places]

        trees = {n: {k: parts(v) for k, v in getattr(self, n).items()} for n in TREES}
        leaves = {name: parts(getattr(self, name)) for name in LEAVES}
        rows, units = None if self.rows is None else parts(self.rows), self.mask.shape[1]
        batches = []
        for i, size in enumerate(sizes):
            fields: dict[str, Any] = {name: {k: v[i] for k, v in tree.items()} for name, tree in trees.items()}
            fields |= {name: leaf[i] for name, leaf in leaves.items()}
            fields |= {"rows": None if rows is None else rows[i], "num_decisions": size, "num_units": units * size}
            batches.append(Batch(**fields))
        return batches
