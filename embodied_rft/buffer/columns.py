"""How the columns of a buffer lie in memory: dense ones packed in one matrix a dtype, ragged ones in flat arrays.

Knows rows and bytes; knows nothing of episodes, streams or sampling (that is `buffer`).
Legend: C rows of capacity, B rows read or written, W width of a packed row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embodied_rft.buffer.images import BlobStore
from embodied_rft.data import Field, Ragged
from embodied_rft.names import UserError, nearest

# float64 observations (the default of MuJoCo environments) are stored as float32: networks read float32.
STORED_AS = {name: name for name in ("float16", "float32", "bool", "uint8", "int8", "int16", "int32", "int64")} | {
    "float64": "float32",
    "uint16": "int32",  # torch computes with signed integers
    "uint32": "int64",
}
Column = np.ndarray | Ragged | list[str] | list[list[np.ndarray]]  # of B rows: numbers, units, texts, images
BOOKKEEPING = ("group", "episode", "step", "version", "source", "seed", "span")  # int64 columns of every buffer
BOOKKEEPING_BYTES = len(BOOKKEEPING) * 8 + 8 + 2  # a row: columns, next row, flags
KINDS = ("dense", "ragged", "images")


@dataclass(frozen=True, slots=True)
class Schema:
    """The columns of a buffer.

    A robot arm with two cameras: Schema(observation={"state": Field((10,)), "front": Field((128, 128, 3), "uint8"),
    "wrist": Field((128, 128, 3), "uint8")}, action=Field((4,)), units=1).
    A language agent: Schema(observation={"chat": Field((), "str", "ragged")}, action=Field((), "str", "ragged"),
    trace={"prompt": Field((), "int64", "ragged"), "reply": Field((), "int64", "ragged")}, units=None).
    """

    observation: dict[str, Field]
    action: Field
    trace: dict[str, Field] = field(default_factory=dict)  # what a policy keeps to score its decision again
    units: int | None = 1  # U: log-probabilities of a decision; None: ragged
    rewards: tuple[str, ...] = ("env",)  # reward streams, each a column; what nobody says of the others is NaN

    def __post_init__(self) -> None:
        if "env" not in self.rewards:
            raise UserError(f"reward streams {self.rewards} lack 'env', the environment's own reward")
        for name, column in self.columns().items():
            if column.kind not in KINDS:
                raise UserError(f"column {name!r} has kind {column.kind!r}; {nearest(column.kind, KINDS)}")
            if column.kind == "images" and column.dtype != "uint8":
                raise UserError(f"column {name!r} holds images of {column.dtype}; images are stored as uint8")
            if column.dtype not in STORED_AS and not (column.dtype == "str" and column.kind == "ragged"):
                raise UserError(f"column {name!r} has dtype {column.dtype!r}; {nearest(column.dtype, STORED_AS)}")

    @property
    def log_prob(self) -> Field:
        """One number a unit."""
        return Field((), "float32", "ragged") if self.units is None else Field((self.units,))

    def no_log_prob(self, count: int) -> np.ndarray | Ragged:
        """How unknown log-probabilities of so many decisions are stored: as 0, or empty."""
        if self.units is None:
            return Ragged.of([[]] * count, np.float32)
        return np.zeros((count, self.units), np.float32)

    def columns(self) -> dict[str, Field]:
        """All columns, named "section/key". What the next row is asked for comes first."""
        return {
            **{f"observation/{k}": f for k, f in self.observation.items()},
            **{f"trace/{k}": f for k, f in self.trace.items()},
            "action/": self.action,
            **{f"reward/{k}": Field() for k in self.rewards},
            "log_prob/": self.log_prob,
            "continues/": Field(),  # 0 if the decision terminated its episode, else 1
        }


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a column lies in a packed row: the view of B rows of block [B, W] needs only B."""

    section: str
    key: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements: W, then those of the value
    start: int
    stop: int


class DenseColumns:
    """Columns of fixed shape. All of one dtype share a matrix [C, W], so that one gather reads them together."""

    def __init__(self, columns: Mapping[str, Field], capacity: int) -> None:
        widths: dict[str, int] = {}
        starts = {}
        for name, column in columns.items():
            dtype = STORED_AS[column.dtype]
            starts[name] = (dtype, widths.get(dtype, 0))
            widths[dtype] = widths.get(dtype, 0) + math.prod(column.shape)
        # np.zeros takes pages only when they are first written.
        self.matrices = {dtype: np.zeros((capacity, width), dtype) for dtype, width in widths.items()}
        self.places: dict[str, tuple[str, _Place]] = {}
        self._now: dict[str, list[_Place]] = {dtype: [] for dtype in widths}
        self._next: dict[str, list[_Place]] = {}
        for name, (dtype, start) in starts.items():
            section, key = name.split("/", 1)
            shape = columns[name].shape
            strides = (widths[dtype], *(math.prod(shape[i + 1 :]) for i in range(len(shape))))
            place = _Place(section, key, shape, strides, start, start + math.prod(shape))
            self.places[name] = (dtype, place)
            self._now[dtype].append(place)
            if section in ("observation", "trace"):
                self._next.setdefault(dtype, []).append(place)

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices."""
        return sum(m.nbytes for m in self.matrices.values())

    def write(self, name: str, rows: np.ndarray | slice, values: np.ndarray | float) -> None:
        """Put values [B, *shape], or one scalar for all, into rows [B]."""
        dtype, place = self.places[name]
        if isinstance(values, np.ndarray) and values.ndim:
            values = values.reshape(len(values), place.stop - place.start)
        self.matrices[dtype][rows, place.start : place.stop] = values

    def write_unknown(self, name: str, rows: np.ndarray | slice, value: float | None) -> None:
        """One scalar for all; None: NaN, or -1 where there is no NaN (0 without a sign)."""
        kind = self.matrices[self.places[name][0]].dtype.kind
        self.write(name, rows, {"f": np.nan, "i": -1}.get(kind, 0) if value is None else value)

    def column(self, name: str, rows: np.ndarray) -> np.ndarray:
        """A copy of one column [B, *shape]."""
        dtype, place = self.places[name]
        return self.matrices[dtype][rows, place.start : place.stop].reshape(len(rows), *place.shape)

    def read(self, rows: np.ndarray, *, following: bool = False) -> dict[str, dict[str, Tensor]]:
        """All columns of rows [B], by section and key; `following`: only what a next row is asked for.

        One gather a dtype, then strided views of its result; the rows must be in range.
        """
        sections: dict[str, dict[str, Tensor]] = {"observation": {}, "trace": {}}
        for dtype, places in (self._next if following else self._now).items():
            block = self._gather(dtype, rows)
            for p in places:
                view = torch.as_strided(block, (len(rows), *p.shape), p.strides, p.start)
                sections.setdefault(p.section, {})[p.key] = view
        return sections

    def _gather(self, dtype: str, rows: np.ndarray) -> Tensor:
        # On one thread, since physics may run on the others; "clip" is the mode that copies straight into the result.
        return torch.from_numpy(self.matrices[dtype].take(rows, 0, mode="clip"))


class RaggedColumn:
    """Rows of any length in one flat array: written at its end, compacted when it is full."""

    def __init__(self, column: Field, capacity: int) -> None:
        self.text = column.dtype == "str"
        dtype = "uint8" if self.text else STORED_AS[column.dtype]
        self.values = np.zeros((1024, *column.shape), dtype)
        self.starts = np.zeros(capacity, np.int64)
        self.lengths = np.zeros(capacity, np.int64)
        self.used = 0

    @property
    def nbytes(self) -> int:
        """Bytes of values and offsets, free space included."""
        return self.values.nbytes + self.starts.nbytes + self.lengths.nbytes

    def write(self, rows: np.ndarray, values: Ragged) -> None:
        """Put one value each into rows [B]."""
        self.lengths[rows] = 0
        count = len(values.values)
        if self.used + count > len(self.values):
            self._compact(count)
        self.values[self.used : self.used + count] = values.values
        self.starts[rows] = self.used + values.offsets[:-1]
        self.lengths[rows] = values.lengths
        self.used += count

    def clear(self, rows: np.ndarray) -> None:
        """Forget rows [B]."""
        self.lengths[rows] = 0

    def take(self, rows: np.ndarray) -> Ragged:
        """A copy of rows [B] as they are stored."""
        lengths = self.lengths[rows]
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        flat = np.repeat(self.starts[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Ragged(self.values[flat], offsets)

    def read(self, rows: np.ndarray) -> Ragged | list[str]:
        """Rows [B] as a `Ragged`, or a list of B strings for a text column."""
        taken = self.take(rows)
        return taken.texts() if self.text else taken

    def _compact(self, extra: int) -> None:
        live = np.flatnonzero(self.lengths)
        kept = self.take(live)
        size = max(1024, 2 * (len(kept.values) + extra))
        self.values = np.zeros((size, *self.values.shape[1:]), self.values.dtype)
        self.used = len(kept.values)
        self.values[: self.used] = kept.values
        self.starts[live] = kept.offsets[:-1]

    def state_dict(self, size: int) -> dict[str, Any]:
        """The first `size` rows."""
        taken = self.take(np.arange(size))
        return {"values": taken.values, "offsets": taken.offsets}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace everything by what `state_dict` gave."""
        self.lengths[:] = 0
        self.used = 0
        self.write(np.arange(len(state["offsets"]) - 1), Ragged(state["values"], state["offsets"]))


class ImageColumn:
    """Lists of images of any number and size: rows hold references into a `BlobStore`."""

    def __init__(self, column: Field, capacity: int, store: BlobStore) -> None:
        self.store = store
        self.ids = RaggedColumn(Field((), "int64", "ragged"), capacity)

    @property
    def nbytes(self) -> int:
        """Bytes of the references; the images are counted by their store."""
        return self.ids.nbytes

    def write(self, rows: np.ndarray, values: Sequence[Sequence[np.ndarray]]) -> None:
        """Put one list of images each into rows [B]."""
        ids = Ragged.of([[self.store.put(image) for image in images] for images in values], dtype=np.int64)
        self.clear(rows)
        self.ids.write(rows, ids)

    def clear(self, rows: np.ndarray) -> None:
        """Forget rows [B]; images that nobody else refers to are freed."""
        self.store.release(self.ids.take(rows).values)
        self.ids.clear(rows)

    def read(self, rows: np.ndarray) -> list[list[np.ndarray]]:
        """The images of rows [B], read-only, not copied."""
        return [self.store.get(ids) for ids in self.ids.take(rows)]

    def state_dict(self, size: int) -> dict[str, Any]:
        """The references of the first `size` rows."""
        return self.ids.state_dict(size)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the references; the store must have been restored with them."""
        self.ids.load_state_dict(state)


class Notes:
    """Columns that objectives write after the fact: float32, NaN where nothing was written."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.dense: dict[str, np.ndarray] = {}  # each [C] or [C, k]
        self.ragged: dict[str, RaggedColumn] = {}  # one number a unit

    @property
    def nbytes(self) -> int:
        """Bytes of all notes."""
        return sum(a.nbytes for a in self.dense.values()) + sum(c.nbytes for c in self.ragged.values())

    def write(self, name: str, rows: np.ndarray, values: np.ndarray | Ragged) -> None:
        """Write one value each for rows [B]: [B], [B, k] or a `Ragged`."""
        if len(values) != len(rows):
            raise UserError(f"note {name!r} has {len(values)} values for {len(rows)} rows: one each is expected")
        if isinstance(values, Ragged):
            if name in self.dense:
                raise UserError(f"note {name!r} is ragged now, but was written with one shape for all rows before")
            if name not in self.ragged:
                self.ragged[name] = RaggedColumn(Field((), "float32", "ragged"), self.capacity)
            self.ragged[name].write(rows, values)
            return
        values = np.asarray(values, np.float32)
        if name not in self.dense and name not in self.ragged:
            self.dense[name] = np.full((self.capacity, *values.shape[1:]), np.nan, np.float32)
        if name in self.ragged or self.dense[name].shape[1:] != values.shape[1:]:
            before = "ragged" if name in self.ragged else f"of shape [rows, {self.dense[name].shape[1:]}]"
            raise UserError(f"note {name!r} is of shape {values.shape} now, but was {before} before")
        self.dense[name][rows] = values

    def clear(self, rows: np.ndarray) -> None:
        """Rows that are used again hold no notes."""
        for array in self.dense.values():
            array[rows] = np.nan
        for column in self.ragged.values():
            column.clear(rows)

    def read(self, rows: np.ndarray, lengths: np.ndarray | None) -> dict[str, Tensor]:
        """Notes of rows [B]: [B], [B, k], or padded with 0 to [B, U] where `lengths` [B] units are valid."""
        notes = {name: torch.from_numpy(array[rows]) for name, array in self.dense.items()}
        for name, column in self.ragged.items():
            assert lengths is not None
            mask = np.arange(lengths.max(initial=0)) < lengths[:, None]
            padded = np.where(mask, np.float32(np.nan), np.float32(0))
            taken = column.take(rows)
            padded[mask & (taken.lengths > 0)[:, None]] = taken.values
            notes[name] = torch.from_numpy(padded)
        return notes

    def state_dict(self, size: int) -> dict[str, Any]:
        """The first `size` rows; dense ones are views."""
        return {
            "dense": {name: array[:size] for name, array in self.dense.items()},
            "ragged": {name: column.state_dict(size) for name, column in self.ragged.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace everything by what `state_dict` gave."""
        self.dense, self.ragged = {}, {}
        for name, array in state["dense"].items():
            self.write(name, np.arange(len(array)), array)
        for name, column in state["ragged"].items():
            rows = np.arange(len(column["offsets"]) - 1)
            self.write(name, rows, Ragged(column["values"], column["offsets"]))
