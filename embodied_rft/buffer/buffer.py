"""The one buffer: decisions in a ring, linked to the row that follows each, read by index arithmetic.

Knows columns, episodes and batches. Which rows exist and follow which is `ring`, how columns lie in memory is
`columns`, how a learner reads is `plans`.
Legend: C capacity, N streams stepped together, B rows of a batch, T decisions of an episode, U units of a decision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Unpack

import numpy as np
from numpy.typing import ArrayLike

from embodied_rft.buffer.columns import BOOKKEEPING, Column, DenseColumns, ImageColumn, Notes, RaggedColumn, Schema
from embodied_rft.buffer.hindsight import Goals
from embodied_rft.buffer.images import BlobStore
from embodied_rft.buffer.intake import check_decisions, check_label, check_tree, per_row
from embodied_rft.buffer.reading import ENDS, TERMINATED, TRUNCATED, HowToRead, Reading, Store, episode, read
from embodied_rft.buffer.ring import BOTH, OFFLINE, ONLINE, Ring, Streams
from embodied_rft.data import Batch, Decisions, Ragged, Source, Trajectory, Tree, pick, pick_tree
from embodied_rft.names import UserError

SIDES = np.array([OFFLINE, OFFLINE, ONLINE, ONLINE], np.int8)  # of each Source
EPISODE, VERSION, SOURCE = (BOOKKEEPING.index(name) for name in ("episode", "version", "source"))  # of `_book`
Retrace = Callable[[Tree, Any], Tree]


class Buffer:
    """Experience of one schema.

    An episode ends with a closing row that holds only its last observation and is never sampled. A row can be read when
    it has a next row and its episode was not invalidated; `peek` gives the newest one of an episode that goes on its
    next row early.

        buffer = Buffer(Schema({"observation": Field((25,))}, action=Field((4,))), capacity=100_000)
        buffer.add(streams, observation, decisions, reward, terminated, truncated, version=3)     # N rows
        buffer.close(streams[ended], last_observation)
        batch = buffer.sample(np.random.default_rng(0), 256, offline_share=0.5, num_steps=3)

    Args:
        schema: the columns.
        capacity: rows C; each decision takes one, and each episode one more when it is closed.
        past: observations are read with what happened before in their episodes (`data.Past`); of an episode that begins
            to be overwritten nothing is read any more.
    """

    def __init__(self, schema: Schema, capacity: int, *, past: bool = False) -> None:
        if capacity < 2:
            raise UserError(f"capacity {capacity}: at least 2 rows are expected (a decision and what followed it)")
        self.schema, self.capacity = schema, capacity
        self.images = BlobStore()  # of "images" columns
        self._fields = schema.columns()
        self._dense = DenseColumns({n: f for n, f in self._fields.items() if f.kind == "dense"}, capacity)
        self._ragged: dict[str, RaggedColumn | ImageColumn] = {
            name: RaggedColumn(f, capacity) if f.kind == "ragged" else ImageColumn(f, capacity, self.images)
            for name, f in self._fields.items()
            if f.kind != "dense"
        }
        self._book = np.zeros((capacity, len(BOOKKEEPING)), np.int64)
        self._end = np.zeros(capacity, np.int8)  # index into ENDS
        self._notes, self._labels = Notes(capacity), Notes(capacity)
        self._ring, self._streams = Ring(capacity), Streams()
        where = (self._dense, self._ragged, self._notes, self._labels, self._ring, self._book, self._end)
        self._store = Store(*where, past)
        self._episodes = 0  # episodes ever begun
        self.goals: Goals | None = None  # how they are paid, for hindsight

    def __len__(self) -> int:
        """How many decisions can be read."""
        return self._ring.num_readable

    @property
    def is_ragged(self) -> bool:
        """Whether rows of some column differ in length."""
        return bool(self._ragged)

    @property
    def size(self) -> int:
        """Rows in use: decisions, closing rows, and decisions that cannot be read (yet)."""
        return self._ring.size

    @property
    def num_pinned(self) -> int:
        """Rows that are never overwritten: [0, num_pinned)."""
        return self._ring.pinned

    @property
    def nbytes(self) -> int:
        """Allocated bytes of all columns, images and links."""
        columns = (
            self._dense.nbytes
            + self._notes.nbytes
            + self._labels.nbytes
            + sum(column.nbytes for column in self._ragged.values())
        )
        links = (self._ring.next, self._ring.side, self._end, self._book)
        return columns + sum(a.nbytes for a in links) + self.images.nbytes

    # --- writing --------------------------------------------------------------------------------------------------

    def add(
        self,
        streams: np.ndarray,
        observation: Tree,
        decisions: Decisions,
        reward: ArrayLike | Tree,
        terminated: np.ndarray,
        truncated: np.ndarray,
        *,
        group: ArrayLike = -1,
        seed: ArrayLike = -1,
        step: ArrayLike | None = None,
        version: ArrayLike = 0,
        source: ArrayLike = Source.ONLINE,
        span: ArrayLike = -1,
    ) -> np.ndarray:
        """Store N rows, each the next decision of stream streams[i]; all of them or, on an error, none.

        Args:
            streams: [N] different stream numbers (environments).
            observation: what the policy saw, each [N, ...].
            decisions: what it decided. Keys missing in `trace` are stored as unknown: NaN, -1 or empty.
            reward: [N], or one array a stream of reward: {"env": [N], "success": [N]}. Of streams other than "env"
                what is missing, or NaN, is unknown: it may be told later (`label`), and is refused when it is read.
            terminated: [N] bool, the episode ended and is worth nothing more.
            truncated: [N] bool, the episode was stopped (a time limit); close() it all the same.
            group: [N] or one number for all: siblings share it; -1 is no group. Likewise:
            seed: of the initial state.
            step: of the decision in its episode; None counts.
            version: of the policy.
            source: a `Source`.
            span: steps of a chunk that were carried out, the others are not imitated; -1: all, or unknown.

        Returns:
            The rows' numbers [N].

        Raises:
            ValueError: wrong keys, shapes or dtypes; NaN or infinity; a stream whose ended episode was not closed.
        """
        streams = np.asarray(streams)
        state = self._streams.states(streams, running=True)
        values = check_decisions(self.schema, streams, observation, decisions, reward)
        numbers = {"group": group, "seed": seed, "version": version, "source": source, "span": span}
        numbers |= {"terminated": terminated, "truncated": truncated} | ({} if step is None else {"step": step})
        given = per_row(len(streams), numbers)
        end = np.where(given["terminated"], TERMINATED, np.where(given["truncated"], TRUNCATED, 0))
        values["continues/"] = end != TERMINATED

        self._episodes += self._streams.advance(state, self._episodes)
        state[:, Streams.STEP] = given.get("step", state[:, Streams.STEP])
        given |= {"episode": state[:, Streams.EPISODE], "step": state[:, Streams.STEP]}
        book = tuple(given[name] for name in BOOKKEEPING)
        rows, serials = self._rows_for(state)
        self._fill(rows, values, book, end, unknown=None)
        self._link(state, rows)
        state[:, Streams.ROW], state[:, Streams.SERIAL], state[:, Streams.ENDED] = rows, serials, end > 0
        state[:, Streams.AHEAD] = -1
        self._streams.table[streams] = state
        return rows

    def peek(self, streams: np.ndarray, observation: Tree, trace: Tree | None = None) -> None:
        """Let the newest decisions of episodes that go on be read now: this is what they led to.

        The observation takes the row that the stream's next decision (or closing row) will fill in: nothing is stored
        twice, and no episode ends.

        Args:
            streams: [N] streams with an open episode that has not ended.
            observation: what their next decisions will be taken on, each [N, ...].
            trace: as of `close`.
        """
        streams = np.asarray(streams)
        state = self._streams.states(streams, running=True)
        values, book = self._after(streams, state, observation, trace)
        rows, serials = self._rows_for(state)
        self._fill(rows, values, book, 0, unknown=0)
        self._link(state, rows)
        state[:, Streams.AHEAD], state[:, Streams.AHEAD_SERIAL] = rows, serials
        self._streams.table[streams] = state

    def close(self, streams: np.ndarray, observation: Tree, trace: Tree | None = None) -> np.ndarray:
        """Closing rows for streams whose episode just ended or is cut here; returns the episodes' numbers [N].

        Args:
            streams: [N] streams with an open episode.
            observation: the last one, each [N, ...]: what the bootstrap value is taken of.
            trace: of the policy at that observation, for objectives that read `next_trace`; zeros if not given.
        """
        streams = np.asarray(streams)
        state = self._streams.states(streams)
        values, book = self._after(streams, state, observation, trace)
        rows, _ = self._rows_for(state)
        self._fill(rows, values, book, 0, unknown=0)
        self._link(state, rows)
        self._streams.forget(streams)
        return state[:, Streams.EPISODE]

    def invalidate(self, streams: np.ndarray) -> None:
        """Forget the open episodes of these streams (a worker crashed): none of their decisions is ever read."""
        streams = np.asarray(streams)
        state = self._streams.states(streams)
        episodes = state[state[:, Streams.ROW] >= 0, Streams.EPISODE]
        self._ring.hide(np.flatnonzero(np.isin(self._book[: self.size, EPISODE], episodes)))
        self._streams.forget(streams)

    def add_trajectory(self, trajectory: Trajectory, *, retrace: Retrace | None = None) -> np.ndarray:
        """Store a whole episode; returns the rows of its decisions [T].

        Args:
            trajectory: T decisions and T + 1 observations.
            retrace: retrace(observation [T + 1, ...], action [T, ...]) gives the trace of another policy, each
                [T, ...], or [T + 1, ...] where it depends on the observation only; None keeps the trajectory's own.
        """
        count, schema, room = len(trajectory), self.schema, self.capacity - self.num_pinned
        if not 0 < count < room:
            raise UserError(f"an episode of {count} decisions was given: 1 to {room - 1} fit into the rows not pinned")
        trace = trajectory.trace if retrace is None else retrace(trajectory.observation, trajectory.action)
        trace = {key: value for key, value in trace.items() if key in schema.trace}
        streams, head, last = np.full(count, -1), slice(0, count), slice(count, None)
        reward = {**trajectory.rewards, "env": trajectory.reward}
        labels = {name: reward[name] for name in self._labels.dense.keys() & reward.keys()}
        reward = {name: reward[name] for name in schema.rewards if name in reward}
        decisions = Decisions(trajectory.action, trajectory.log_prob, pick_tree(trace, head))
        values = check_decisions(self.schema, streams, pick_tree(trajectory.observation, head), decisions, reward)
        final = pick_tree(trajectory.observation, last)
        closing = check_tree("observation", final, schema.observation, streams[:1])
        final = {key: pick(value, last) for key, value in trace.items() if len(value) == count + 1}
        closing |= check_tree("trace", final, schema.trace, streams[:1], partial=True)

        steps = np.arange(count)
        end = np.where(steps == count - 1, ENDS.index(trajectory.end), 0)
        values["continues/"] = end != TERMINATED
        span = -1 if trajectory.span is None else trajectory.span
        book = (trajectory.group, self._episodes, steps, trajectory.version, trajectory.source, trajectory.seed, span)
        rows = self._claim(count)
        self._fill(rows, values, book, end, unknown=None)
        close = self._claim(1)
        self._fill(close, closing, (-1, self._episodes, count, -1, -1, -1, -1), 0, unknown=0)
        self._ring.link(rows, np.concatenate([rows[1:], close]), SIDES[self._book[rows, SOURCE]])
        self._episodes += 1
        for name, values in labels.items():
            self.label(name, rows, values)
        return rows

    def pin(self) -> None:
        """Keep everything stored so far for good: the ring goes on behind it.

        Raises:
            ValueError: an episode is still open, or old rows have already been overwritten.
        """
        if len(self._streams.open):
            raise ValueError(f"the episode of stream {self._streams.open[0]} is open: close() it before pin()")
        self._ring.pin()

    def annotate(self, name: str, rows: np.ndarray, values: np.ndarray | Ragged) -> None:
        """Write a note: a column that an objective computes, such as the advantage.

        Args:
            name: of the note; what is written again is replaced.
            rows: [B].
            values: [B] or [B, k] numbers, or a `Ragged` with one number a unit. Rows never written read as NaN.
        """
        rows = np.asarray(rows, np.int64)
        if isinstance(values, Ragged):
            column = self._ragged.get("log_prob/")
            if not isinstance(column, RaggedColumn):
                raise UserError(f"note {name!r} is ragged, but decisions have {self.schema.units} units each")
            if len(values) == len(rows) and (values.lengths != column.lengths[rows]).any():
                raise UserError(f"note {name!r} has another number of values than its rows have units")
        self._notes.write(name, rows, values)

    def label(self, name: str, rows: np.ndarray, values: np.ndarray) -> None:
        """Say afterwards what rows are paid in a stream of reward: by a model, a judge, a person.

        Objectives read it with reward_weights={name: weight}. A new name begins a stream that is unknown elsewhere.

        Args:
            name: of the stream; "env" is what happened and stays.
            rows: [B].
            values: [B] numbers, NaN where it is not known; what is written again is replaced.
        """
        rows, values = np.asarray(rows, np.int64), check_label(name, rows, values, self.capacity)
        if name in self.schema.rewards:
            self._dense.write(f"reward/{name}", rows, values)
        else:
            self._labels.write(name, rows, values)

    @property
    def rewards(self) -> tuple[str, ...]:
        """Names of all streams of reward: those of the schema, then those that were labelled."""
        return self._store.streams

    def stream(self, name: str, rows: np.ndarray) -> np.ndarray:
        """One stream of reward, of rows [B]; NaN where it is unknown."""
        return self._store.stream(name, rows)

    def note(self, name: str, rows: np.ndarray) -> np.ndarray:
        """A note of one number a row, of rows [B]; NaN where it was never written."""
        column = self._notes.dense.get(name)
        return np.full(len(rows), np.nan, np.float32) if column is None else column[rows]

    def _after(
        self, streams: np.ndarray, state: np.ndarray, observation: Tree, trace: Tree | None = None
    ) -> tuple[dict[str, Any], tuple[Any, ...]]:
        """Columns and bookkeeping of rows that only hold an observation, behind the newest decisions of streams [N]."""
        if (state[:, Streams.ROW] < 0).any():
            raise ValueError(f"stream {streams[state[:, Streams.ROW] < 0][0]} has no open episode")
        values = check_tree("observation", observation, self.schema.observation, streams)
        values |= check_tree("trace", trace or {}, self.schema.trace, streams, partial=True)
        return values, (-1, state[:, Streams.EPISODE], state[:, Streams.STEP] + 1, -1, -1, -1, -1)

    def _claim(self, count: int) -> np.ndarray:
        """The next rows [N], empty."""
        rows, reused = self._ring.claim(count)
        if reused:
            if self._store.past:
                torn = np.isin(self._book[:, EPISODE], self._book[rows, EPISODE])
                self._ring.hide(np.flatnonzero(torn & (self._ring.side > 0)))
            self._notes.clear(rows)
            self._labels.clear(rows)
            for ragged in self._ragged.values():
                ragged.clear(rows)
        return rows

    def _rows_for(self, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the next thing of each stream goes, rows and serials [N]: what `peek` took for it, or a new row."""
        count, new = len(state), -1
        taken = state[:, Streams.AHEAD] >= 0
        while new < (new := count - int(taken.sum())):  # new rows may overwrite some of those: then more are needed
            taken &= self._ring.alive(state[:, Streams.AHEAD_SERIAL] - new)
        rows, serials = state[:, Streams.AHEAD].copy(), state[:, Streams.AHEAD_SERIAL].copy()
        rows[~taken], serials[~taken] = self._claim(new), self._ring.written - new + np.arange(new)
        return rows, serials

    def _fill(
        self, rows: np.ndarray, values: dict[str, Any], book: tuple[Any, ...], end: Any, *, unknown: int | None
    ) -> None:
        """Write into rows [N]. Traces without a value get `unknown`; None: NaN, or -1 where there is no NaN."""
        in_order = len(rows) and (rows[1:] == rows[:-1] + 1).all()
        where = slice(int(rows[0]), int(rows[-1]) + 1) if in_order else rows
        for name, value in values.items():
            if name in self._ragged:
                self._ragged[name].write(rows, value)
            else:
                self._dense.write(name, where, value)
        for key, column in self.schema.trace.items():
            name = f"trace/{key}"
            if name not in values and column.kind == "dense":
                self._dense.write_unknown(name, where, unknown)
        for i, value in enumerate(book):
            self._book[where, i] = value
        self._end[where] = end

    def _link(self, state: np.ndarray, rows: np.ndarray) -> None:
        """Make rows [N] the next ones of the streams' newest rows, where those exist and are not overwritten."""
        has = (state[:, Streams.ROW] >= 0) & self._ring.alive(state[:, Streams.SERIAL])
        previous = state[has, Streams.ROW]
        self._ring.link(previous, rows[has], SIDES[self._book[previous, SOURCE]])

    # --- reading --------------------------------------------------------------------------------------------------

    def rows(self, *, source: Source | Sequence[Source] | None = None, min_version: int | None = None) -> np.ndarray:
        """Readable decisions [B], oldest first; only of some sources, or of policy versions >= min_version."""
        rows = self._ring.rows()
        if source is not None:
            rows = rows[np.isin(self._book[rows, SOURCE], np.atleast_1d(source))]
        if min_version is not None:
            rows = rows[self._book[rows, VERSION] >= min_version]
        return rows

    def columns(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """group, episode, step, version, source, seed and end of rows [B]; see `Store.columns`."""
        return self._store.columns(rows)

    def ends(self, rows: np.ndarray | Sequence[int]) -> np.ndarray:
        """How each row's episode ended there [B]: "terminated", "truncated"; "cut": it goes on, or was broken off."""
        return np.array(ENDS)[self._end[np.asarray(rows, np.int64)]]

    def sample(
        self,
        rng: np.random.Generator,
        batch_size: int,
        *,
        offline_share: float | None = None,
        hindsight: int = 0,
        **reading: Unpack[HowToRead],
    ) -> Batch:
        """B decisions drawn with replacement, uniformly.

        Args:
            rng: draws them.
            batch_size: B.
            offline_share: in [0, 1]: exactly this share of them (rounded) is of demonstrations and offline data, the
                rest is experience; None: uniform over everything.
            hindsight: k: of k + 1 decisions k have a goal that was reached later, see `hindsight`.
            **reading: fields of a `Reading`.

        Raises:
            ValueError: there is nothing of the kind to draw from.
        """
        if offline_share is None:
            rows = self._ring.draw(rng, batch_size, BOTH)
        elif 0 <= offline_share <= 1:
            offline = round(offline_share * batch_size)
            sides = ((offline, OFFLINE), (batch_size - offline, ONLINE))
            rows = np.concatenate([self._ring.draw(rng, count, side) for count, side in sides])
        else:
            raise UserError(f"offline_share {offline_share}: a share in [0, 1] is expected")
        how = Reading(**reading)
        batch = read(self._store, rows, how)
        if not hindsight:
            return batch
        if self.goals is None:
            raise UserError("hindsight: this buffer does not know how goals are paid, set its `goals`")
        return self.goals.relabel(self._store, batch, how, rng, hindsight)

    def batch(self, rows: np.ndarray, **reading: Unpack[HowToRead]) -> Batch:
        """These decisions [B] as tensors.

        Args:
            rows: [B] rows that can be read.
            **reading: fields of a `Reading`: num_steps, gamma, next_observation, reward_weights.

        Raises:
            ValueError: a row that cannot be read.
        """
        rows = np.array(rows, np.int64)
        bad = rows[(rows < 0) | (rows >= self.capacity)]
        bad = bad if len(bad) else rows[self._ring.side[rows] == 0]
        if len(bad):
            raise UserError(
                f"row {bad[0]} cannot be read: it is empty or a closing row, was invalidated, or nothing follows it "
                f"yet; or newer ones took its place, because a capacity of {self.capacity} is too small for them all"
            )
        return read(self._store, rows, Reading(**reading))

    def segments(self, rows: np.ndarray) -> list[np.ndarray]:
        """The rows as runs of consecutive decisions of one episode, each in time order, in order of the episodes."""
        rows = np.asarray(rows, np.int64)
        if not len(rows):
            return []
        rows = rows[np.lexsort((self._ring.age_order(rows), self._book[rows, EPISODE]))]
        return np.split(rows, np.flatnonzero(self._ring.next[rows[:-1]] != rows[1:]) + 1)

    def trajectories(self, rows: np.ndarray | None = None) -> Iterator[Trajectory]:
        """Readable decisions (all, or these) as trajectories: copies, for people, files and tests."""
        for run in self.segments(self.rows() if rows is None else rows):
            yield episode(self._store, self.schema, run)

    def column(self, name: str, rows: np.ndarray) -> Column:
        """One column of rows [B]: "action/", "observation/KEY", "reward/env"."""
        return self._store.column(name, rows)

    # --- saving ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything, exactly: arrays and JSON scalars. Large arrays are views: save or copy them before you go on."""
        size = self.size
        return {
            "schema": repr(self.schema),
            "capacity": self.capacity,
            "ring": self._ring.state_dict(),
            "streams": self._streams.table.copy(),
            "episodes": self._episodes,
            "dense": {dtype: matrix[:size] for dtype, matrix in self._dense.matrices.items()},
            "ragged": {name: column.state_dict(size) for name, column in self._ragged.items()},
            "images": self.images.state_dict(),
            "book": self._book[:size],
            "end": self._end[:size],
            "notes": self._notes.state_dict(size),
            "labels": self._labels.state_dict(size),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken: the same generator draws the same batches.

        Raises:
            ValueError: the state is of another schema or capacity.
        """
        for name, mine in (("schema", repr(self.schema)), ("capacity", self.capacity)):
            if state[name] != mine:
                raise UserError(f"the saved buffer has {name} {state[name]}, this one {mine}: use the same")
        self._ring.load_state_dict(state["ring"])
        self._streams.table = np.array(state["streams"])
        self._episodes = int(state["episodes"])
        size = self.size
        for dtype, matrix in self._dense.matrices.items():
            matrix[:size] = state["dense"][dtype]
        self.images.load_state_dict(state["images"])
        for name, column in self._ragged.items():
            column.load_state_dict(state["ragged"][name])
        self._book[:size], self._end[:size] = state["book"], state["end"]
        self._notes.load_state_dict(state["notes"])
        self._labels.load_state_dict(state.get("labels", Notes(0).state_dict(0)))
