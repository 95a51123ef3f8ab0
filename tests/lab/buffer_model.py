"""A slow model of the buffer that keeps every row in lists of episodes, and random histories that compare the two."""

import copy

import numpy as np
import pytest

from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.columns import Schema
from embodied_rft.data import Decisions, Field, Ragged, Source, Trajectory

DENSE = Schema(
    {"state": Field((2,)), "pixels": Field((2, 2, 1), "uint8")},
    Field((1,)),
    {"u": Field((3,))},
    units=2,
    rewards=("env", "success"),
)
RICH = Schema(
    {"state": Field((2,)), "chat": Field((), "str", "ragged"), "screens": Field((), "uint8", "images")},
    Field((), "str", "ragged"),
    {"reply": Field((), "int64", "ragged"), "u": Field((3,))},
    units=None,
    rewards=("env", "success"),
)


# Row contents are functions of the serial number of the row, so any row can be checked alone.
def state_of(serials):
    return np.stack([serials, -serials], 1).astype(np.float64)


def observation_of(serials, schema):
    if schema is DENSE:
        return {
            "state": state_of(serials),
            "pixels": (serials[:, None, None, None] % 251 * np.ones((2, 2, 1))).astype(np.uint8),
        }
    screens = [[np.full((2, 3, 1), (s + i) % 7, np.uint8) for i in range(s % 3)] for s in serials]
    return {"state": state_of(serials), "chat": [f"é{s}" * (s % 3) for s in serials], "screens": screens}


def trace_of(serials, schema):
    trace = {"u": np.stack([serials] * 3, 1).astype(np.float32)}
    if schema is RICH:
        trace["reply"] = Ragged.of([np.arange(s, s + s % 4) for s in serials], dtype=np.int64)
    return trace


def decisions_of(serials, schema):
    if schema is DENSE:
        return Decisions(serials[:, None] / 2, np.stack([serials, serials + 0.5], 1), trace_of(serials, schema))
    log_prob = Ragged.of([np.full(s % 4, s, np.float32) for s in serials], dtype=np.float32)
    return Decisions([f"do {s}" for s in serials], log_prob, trace_of(serials, schema))


def reward_of(serials):
    return {"env": (serials % 13).astype(np.float32), "success": (serials % 2).astype(np.float32)}


class Model:
    """What the buffer promises, kept as lists: episodes of serial numbers, the oldest serials forgotten."""

    def __init__(self, capacity, seed, schema):
        self.rng = np.random.default_rng(seed)
        self.schema, self.capacity = schema, capacity
        self.buffer = Buffer(schema, capacity)
        self.serial, self.pinned = 0, 0
        self.episodes = []  # {"rows": serials, "end": .., "closed": serial or None, "valid": bool, "source": ..}
        self.open = {}  # stream to episode
        self.ended = set()

    def alive(self, serial):
        return serial < self.pinned or serial >= self.serial - (self.capacity - self.pinned)

    def take(self, count):
        serials = np.arange(self.serial, self.serial + count)
        self.serial += count
        return serials

    def step(self):
        room = self.capacity - self.pinned
        choice = self.rng.choice(
            ["add"] * 8 + ["peek"] * 3 + ["close"] * 2 + ["invalidate", "trajectory", "pin", "restore"]
        )
        streams = self.rng.permutation(4)[: self.rng.integers(0, min(4, room) + 1)]
        getattr(self, choice)(streams)

    def next(self, streams):
        """A serial for the next thing of each stream; one that `peek` took before stays, if it is not too old."""
        held = [self.open[s]["ahead"] if s in self.open else None for s in streams]
        for _ in streams:  # new ones may push out some of those
            oldest = self.serial + held.count(None) - (self.capacity - self.pinned)
            held = [None if serial is None or serial < oldest else serial for serial in held]
        new = iter(self.take(held.count(None)))
        return np.array([next(new) if serial is None else serial for serial in held], np.int64)

    def peek(self, streams):
        streams = np.array([s for s in streams if s in self.open and s not in self.ended], np.int64)
        before = self.buffer.size
        serials = self.next(streams)
        self.buffer.peek(streams, observation_of(serials, self.schema), trace_of(serials, self.schema))
        for stream, serial in zip(streams, serials, strict=True):
            self.open[stream]["ahead"] = int(serial)
        self.buffer.peek(
            streams, observation_of(serials, self.schema), trace_of(serials, self.schema)
        )  # a second look changes nothing
        assert self.buffer.size == min(self.capacity, self.serial) >= before

    def add(self, streams):
        streams = np.array([s for s in streams if s not in self.ended], np.int64)
        serials = self.next(streams)
        terminated, truncated = self.rng.random((2, len(streams))) < 0.15
        source = Source(int(self.rng.integers(4)))
        new = [s for s in streams if s not in self.open]
        for stream in new:
            self.open[stream] = {"rows": [], "end": "cut", "closed": None, "ahead": None, "valid": True, "sources": []}
            self.episodes.append(self.open[stream])
        rows = self.buffer.add(
            streams, observation_of(serials, self.schema), decisions_of(serials, self.schema), reward_of(serials),
            terminated, truncated, version=serials, group=serials // 3, source=source,
        )  # fmt: skip
        assert len(rows) == len(streams)
        for stream, serial, a, b in zip(streams, serials, terminated, truncated, strict=True):
            episode = self.open[stream]
            episode["rows"].append(int(serial))
            episode["ahead"] = None
            episode["sources"].append(source)
            episode["end"] = "terminated" if a else "truncated" if b else "cut"
            if a or b:
                self.ended.add(stream)

    def close(self, streams):
        streams = np.array([s for s in streams if s in self.open], np.int64)
        serials = self.next(streams)
        self.buffer.close(streams, observation_of(serials, self.schema), trace_of(serials, self.schema))
        for stream, serial in zip(streams, serials, strict=True):
            self.open.pop(stream)["closed"] = int(serial)
            self.ended.discard(stream)

    def invalidate(self, streams):
        self.buffer.invalidate(np.asarray(streams, np.int64))
        for stream in streams:
            if stream in self.open:
                self.open.pop(stream)["valid"] = False
            self.ended.discard(stream)

    def trajectory(self, streams):
        count = int(self.rng.integers(1, 4))
        if count + 1 > self.capacity - self.pinned:
            return
        serials = self.take(count + 1)
        end = str(self.rng.choice(["terminated", "truncated", "cut"]))
        decisions, rewards = decisions_of(serials[:-1], self.schema), reward_of(serials[:-1])
        trajectory = Trajectory(
            observation_of(serials, self.schema), decisions.action, rewards.pop("env"), end, decisions.log_prob,
            trace_of(serials, self.schema), rewards, Source.OFFLINE,
        )  # fmt: skip
        self.buffer.add_trajectory(trajectory)
        self.episodes.append(
            {
                "rows": serials[:-1].tolist(),
                "end": end,
                "closed": int(serials[-1]),
                "ahead": None,
                "valid": True,
                "sources": [Source.OFFLINE] * count,
            }
        )

    def pin(self, streams):
        if self.open or self.serial > self.capacity:
            with pytest.raises(ValueError, match=r"close\(\) it|pin\(\) earlier"):
                self.buffer.pin()
        elif self.serial <= self.capacity - 4:  # else there would be no room to go on
            self.buffer.pin()
            self.pinned = self.serial

    def restore(self, streams):
        old, self.buffer = self.buffer, Buffer(self.schema, self.capacity)
        self.buffer.load_state_dict(copy.deepcopy(old.state_dict()))

    # --- what must be read -----------------------------------------------------------------------------

    def chains(self):
        """Of each valid episode the serials that are alive, and what closed it."""
        for episode in self.episodes:
            if episode["valid"]:
                rows = [s for s in episode["rows"] if self.alive(s)]
                last = episode["ahead"] if episode["closed"] is None else episode["closed"]
                yield episode, rows, [last] if last is not None and self.alive(last) else []

    def readable(self):
        return [s for _, rows, closed in self.chains() for s in (rows + closed)[:-1]]

    def window(self, serial, num_steps, gamma):
        """(reward, discount, serial of the next observation), step by step."""
        episode, rows, closed = next(chain for chain in self.chains() if serial in chain[1])
        following = rows + closed
        reward, discount, at = 0.0, 1.0, following.index(serial)
        for _ in range(num_steps):
            reward += discount * reward_of(np.array([following[at]]))["env"][0]
            discount *= gamma
            at += 1
            if following[at - 1] == rows[-1] and closed and episode["end"] == "terminated":
                return reward, 0.0, following[at]
            if at == len(following) - 1:
                break
        return reward, discount, following[at]

    def check(self):
        buffer, serials = self.buffer, self.readable()
        rows = buffer.rows()
        assert len(buffer) == len(rows) == len(serials)
        if not serials:
            return
        num_steps, gamma = int(self.rng.integers(1, 5)), float(self.rng.uniform(0.5, 1))
        self.check_batch(buffer.batch(rows, num_steps=num_steps, gamma=gamma), num_steps, gamma)
        self.check_batch(buffer.sample(self.rng, 7, num_steps=num_steps, gamma=gamma), num_steps, gamma)
        seen = batch_serials(buffer.batch(rows).observation)
        assert sorted(seen) == sorted(serials)
        unpinned = [s for s in seen if s >= self.pinned]
        assert unpinned == sorted(unpinned)  # oldest first
        expected = sorted(r for _, r, c in self.chains() for r in [(r + c)[:-1]] if r)
        runs = buffer.segments(self.rng.permutation(rows))
        assert sorted(batch_serials(buffer.batch(run).observation) for run in runs) == expected

    def check_batch(self, batch, num_steps, gamma):
        serials = np.array(batch_serials(batch.observation))
        assert set(serials.tolist()) <= set(self.readable())
        reference = [self.window(int(s), num_steps, gamma) for s in serials]
        reward, discount, following = (np.array(column) for column in zip(*reference, strict=True))
        np.testing.assert_allclose(batch.reward, reward, rtol=1e-5)
        np.testing.assert_allclose(batch.discount, discount, rtol=1e-5)
        check_tree(batch.observation, observation_of(serials, self.schema))
        check_tree(batch.next_observation, observation_of(following, self.schema))
        check_tree(batch.trace, trace_of(serials, self.schema))
        check_tree(batch.next_trace, trace_of(following, self.schema))
        decisions = decisions_of(serials, self.schema)
        check_tree({"action": batch.action}, {"action": decisions.action})
        if self.schema is RICH:
            padded, mask = decisions.log_prob.pad()
            assert np.array_equal(batch.log_prob, padded) and np.array_equal(batch.mask, mask)
        else:
            np.testing.assert_array_equal(batch.log_prob, decisions.log_prob)
            assert batch.mask.all()
        assert batch.num_decisions == len(serials) and batch.num_units == batch.mask.sum()
        assert sum(p.mask.sum() for p in batch.split(3)) == batch.num_units

    def check_images(self):
        """Each screen of a row in use is referred to once for each time it is shown, and nothing else is stored."""
        alive = np.array([s for s in range(self.serial) if self.alive(s)])
        shown = [image.tobytes() for images in observation_of(alive, RICH)["screens"] for image in images]
        store = self.buffer.images
        stored = {blob.image.tobytes(): blob.references for blob in store._blobs.values()}
        assert stored == {image: shown.count(image) for image in shown}


def batch_serials(observation):
    return np.asarray(observation["state"])[:, 0].astype(int).tolist()


def check_tree(given, expected):
    assert set(given) == set(expected)
    for key, value in expected.items():
        if isinstance(value, Ragged):
            assert np.array_equal(given[key].values, value.values) and np.array_equal(given[key].offsets, value.offsets)
        elif isinstance(value, list):
            assert [plain(row) for row in given[key]] == [plain(row) for row in value]
        else:
            np.testing.assert_array_equal(given[key], value.astype(given[key].numpy().dtype))


def plain(row):
    return [image.tolist() for image in row] if isinstance(row, list) else row


def run_history(seed, schema, capacity, steps=40):
    model = Model(capacity, seed, schema)
    for _ in range(steps):
        model.step()
        model.check()
    return model
