"""Which rows exist, which follow which, which may be read: the index arithmetic of the buffer, without any data.

Legend: C capacity, N rows claimed together, B rows drawn. Rows [0, pinned) are never claimed again; the rest is a ring.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from embodied_rft.names import UserError

ONLINE, OFFLINE, BOTH = 1, 2, 3  # sides of a readable row, as bits


class Ring:
    """Links between rows, and uniform draws from those that may be read.

    `next[row]` is the row of the same episode's following decision, -1 while there is none. Rows are claimed in order,
    so a next row is newer than its row and never overwritten before it: no pointer dangles, and no window crosses the
    write head.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.next = np.full(capacity, -1, np.int64)
        self.side = np.zeros(capacity, np.int8)  # ONLINE or OFFLINE if the row may be read, else 0
        self.pinned = 0
        self.head = 0  # the next row to claim
        self.written = 0  # rows ever claimed
        self._counts = np.zeros((2, 3), np.int64)  # readable rows of [pinned, ring] x side
        self._index: dict[int, np.ndarray] = {}  # all rows of a side, kept until something changes

    @property
    def size(self) -> int:
        """Rows in use: [0, size)."""
        return min(self.written, self.capacity)

    @property
    def num_readable(self) -> int:
        """Rows that may be read."""
        return int(self._counts.sum())

    def claim(self, count: int) -> tuple[np.ndarray, bool]:
        """The next N rows, unlinked, and whether they were in use before.

        Raises:
            ValueError: more rows than are not pinned.
        """
        if count > self.capacity - self.pinned:
            raise UserError(
                f"{count} rows do not fit: {self.pinned} of the buffer's {self.capacity} are pinned. Enlarge capacity."
            )
        rows = self.head + np.arange(count)
        if self.head + count > self.capacity:
            rows[rows >= self.capacity] -= self.capacity - self.pinned
        self.head = int(rows[-1]) + 1 if count else self.head
        reused = self.written + count > self.capacity
        self.written += count
        if reused:
            self.hide(rows)
            self.next[rows] = -1
        return rows, reused

    def alive(self, serials: np.ndarray) -> np.ndarray:
        """Whether rows of the ring, named by their place in the order of all claims, are not overwritten yet."""
        return serials >= self.written - (self.capacity - self.pinned)

    def link(self, rows: np.ndarray, following: np.ndarray, sides: np.ndarray) -> None:
        """Make `following` the next rows of rows [N], which may be read from now on, if they could not be before."""
        new = self.side[rows] == 0
        self.next[rows] = following
        self.side[rows] = sides
        self._count(rows[new], sides[new], 1)

    def hide(self, rows: np.ndarray) -> None:
        """These rows may not be read any more."""
        rows = rows[self.side[rows] > 0]
        if len(rows):
            self._count(rows, self.side[rows], -1)
            self.side[rows] = 0

    def _count(self, rows: np.ndarray, sides: np.ndarray, change: int) -> None:
        places = np.bincount(3 * (rows >= self.pinned) + sides, minlength=6)
        self._counts += change * places.reshape(2, 3)
        self._index.clear()

    def pin(self) -> None:
        """Keep all rows claimed so far. Raises ValueError once one has been claimed twice."""
        if self.written > self.capacity:
            raise UserError(
                f"more than the capacity of {self.capacity} rows has been written: pin() earlier, or enlarge the buffer"
            )
        self.pinned = self.head
        self._counts[0] += self._counts[1]
        self._counts[1] = 0

    def rows(self) -> np.ndarray:
        """All rows that may be read, oldest first."""
        ring = np.arange(self.pinned, self.size)
        if self.written > self.capacity:
            ring = np.roll(ring, self.pinned - self.head)
        rows = np.concatenate([np.arange(self.pinned), ring])
        return rows.compress(self.side[rows] > 0)

    def age_order(self, rows: np.ndarray) -> np.ndarray:
        """A number for each row that is smaller the older the row is."""
        wrapped = self.written > self.capacity
        return np.where(wrapped & (rows >= self.pinned) & (rows < self.head), rows + self.capacity, rows)

    def windows(self, rows: np.ndarray, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
        """The n decisions from each readable row on: (rows [n, B], valid [n, B]).

        A window ends early at the last decision of its episode and at the newest that something follows; from there on
        its last row is repeated and not valid.
        """
        steps = np.empty((num_steps, len(rows)), np.int64)
        valid = np.ones((num_steps, len(rows)), bool)
        steps[0] = rows
        for i in range(1, num_steps):
            following = self.next[steps[i - 1]]
            valid[i] = valid[i - 1] & (self.next[following] >= 0)
            steps[i] = np.where(valid[i], following, steps[i - 1])
        return steps, valid

    def earlier(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The decisions of the same episodes before rows [B], as far as they are linked: (rows, offsets [B + 1]).

        Those of row i are rows[offsets[i] : offsets[i + 1]], oldest first.
        """
        before = np.full(self.capacity, -1, np.int64)
        linked = np.flatnonzero(self.next >= 0)
        before[self.next[linked]] = linked
        steps = [before[rows]]
        while (steps[-1] >= 0).any():
            steps.append(np.where(steps[-1] >= 0, before[steps[-1]], -1))
        table = np.stack(steps[::-1], axis=1)  # [B, T]
        offsets = np.append(0, np.cumsum((table >= 0).sum(1)))
        return table[table >= 0], offsets

    def draw(self, rng: np.random.Generator, count: int, side: int) -> np.ndarray:
        """Rows [count] drawn uniformly with replacement from a side (or BOTH).

        Rejection: constant work a draw, since few rows between the first and the last of a side are not of it. Where
        many are not, the list of all rows of the side is made once and kept until the buffer changes.

        Raises:
            ValueError: there is none.
        """
        if not count:
            return np.zeros(0, np.int64)
        pinned, ring = (
            online * (side & ONLINE) + offline * (side // OFFLINE) for _, online, offline in self._counts.tolist()
        )
        low, high = 0 if pinned else self.pinned, self.size if ring else self.pinned
        if not pinned + ring:
            what = {ONLINE: "online experience", OFFLINE: "demonstrations or offline data", BOTH: "decisions"}[side]
            raise UserError(f"the buffer holds no {what} to sample; collect or load some, or change offline_share")
        if 4 * (pinned + ring) < high - low:
            if side not in self._index:
                self._index[side] = np.flatnonzero(self.side[: self.size] & side)
            return self._index[side][rng.integers(0, pinned + ring, count)]
        parts, missing = [], count
        while missing:
            candidates = rng.integers(low, high, missing + missing // 8 + 4)
            accepted = candidates[(self.side[candidates] & side).astype(bool)][:missing]
            parts.append(accepted)
            missing -= len(accepted)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def state_dict(self) -> dict[str, Any]:
        """Links and counters; the arrays are views of the rows in use."""
        return {
            "pinned": self.pinned,
            "head": self.head,
            "written": self.written,
            "next": self.next[: self.size],
            "side": self.side[: self.size],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken."""
        self.pinned, self.head, self.written = (int(state[name]) for name in ("pinned", "head", "written"))
        self.next[:], self.side[:] = -1, 0
        self.next[: self.size], self.side[: self.size] = state["next"], state["side"]
        self._counts[:] = 0
        rows = np.flatnonzero(self.side)
        self._count(rows, self.side[rows], 1)


class Streams:
    """Where the open episode of each stream stands. Stream numbers are small integers: those of the environments."""

    # Columns of the table. ROW is -1 while no episode is open, AHEAD while nothing is known of the next decision.
    ROW, SERIAL, EPISODE, STEP, ENDED, AHEAD, AHEAD_SERIAL = range(7)
    NONE = (-1, 0, 0, 0, 0, -1, 0)

    def __init__(self) -> None:
        self.table = np.zeros((0, len(self.NONE)), np.int64)

    def states(self, streams: np.ndarray, *, running: bool = False) -> np.ndarray:
        """A copy of the rows [N, 7] of the table.

        Raises:
            ValueError: a negative or repeated stream number; with `running`, an episode that ended and was not closed.
        """
        if streams.ndim != 1 or streams.dtype.kind not in "iu":
            raise UserError(f"streams have shape {streams.shape} and dtype {streams.dtype}: expected [N] integers")
        if len(streams) and (streams.min() < 0 or np.bincount(streams).max() > 1):
            raise ValueError(f"streams {streams.tolist()}: different numbers >= 0 are expected")
        needed = int(streams.max(initial=-1)) + 1
        if needed > len(self.table):
            self.table = np.concatenate([self.table, np.tile(self.NONE, (needed - len(self.table), 1))])
        states: np.ndarray = self.table[streams]
        if running and states[:, self.ENDED].any():
            stream = streams[states[:, self.ENDED] > 0][0]
            raise ValueError(f"the episode of stream {stream} has ended: close() it before its next decision")
        return states

    def advance(self, state: np.ndarray, first: int) -> int:
        """One decision on, in place: new episodes, numbered from `first`, where none is open. Returns how many."""
        new = state[:, self.ROW] < 0
        count = int(np.count_nonzero(new))
        state[:, self.STEP] = np.where(new, 0, state[:, self.STEP] + 1)
        state[new, self.EPISODE] = np.arange(first, first + count)
        return count

    def forget(self, streams: np.ndarray) -> None:
        """No episode is open any more."""
        self.table[streams] = self.NONE

    @property
    def open(self) -> np.ndarray:
        """The streams with an open episode."""
        return np.flatnonzero(self.table[:, self.ROW] >= 0)
