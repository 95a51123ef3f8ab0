"""Ragged rows, batches and their pieces, and files of trajectories."""

import os

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.columns import Schema
from embodied_rft.buffer.trajectories import read_trajectories, write_trajectories
from embodied_rft.data import Batch, Field, Ragged, Source, Trajectory

lists = st.lists(st.lists(st.integers(-(2**40), 2**40), max_size=6), max_size=8)


@settings(deadline=None)
@given(rows=lists, data=st.data())
def test_ragged_is_a_list_of_lists(rows, data):
    ragged = Ragged.of(rows, dtype=np.int64)
    assert [row.tolist() for row in ragged] == rows and len(ragged) == len(rows)
    assert ragged.lengths.tolist() == [len(row) for row in rows]
    index = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=10)) if rows else []
    assert [row.tolist() for row in ragged.take(np.array(index, np.int64))] == [rows[i] for i in index]


@given(st.lists(st.text()))
def test_texts_survive_as_bytes(texts):
    assert Ragged.of_texts(texts).texts() == texts


@settings(deadline=None)
@given(rows=lists, side=st.sampled_from(["left", "right"]))
def test_padding_adds_nothing_but_the_value(rows, side):
    padded, mask = Ragged.of(rows, dtype=np.int64).pad(7, side)
    assert [values[valid].tolist() for values, valid in zip(padded, mask, strict=True)] == rows
    assert (padded[~mask] == 7).all()
    # Valid entries are in one piece, at the side away from the padding.
    assert (np.diff(mask.astype(int), axis=1) * (1 if side == "right" else -1) <= 0).all()


def make_batch(rng, count, units):
    lengths = rng.integers(0, units + 1, count)
    mask = torch.from_numpy(np.arange(units) < lengths[:, None])
    return Batch(
        observation={"state": torch.from_numpy(rng.normal(size=(count, 3)))},
        action=[f"action {i}" for i in range(count)],
        reward=torch.from_numpy(rng.normal(size=count)),
        discount=torch.ones(count),
        next_observation={},
        log_prob=torch.from_numpy(rng.normal(size=(count, units))),
        mask=mask,
        trace={"tokens": Ragged.of([np.arange(n) for n in lengths], dtype=np.int64)},
        notes={"advantage": torch.from_numpy(rng.normal(size=count))},
        rows=np.arange(count),
        columns={"group": np.arange(count) // 2},
        num_decisions=count,
        num_units=int(mask.sum()),
    )


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 20), size=st.integers(1, 25), seed=st.integers(0, 2**32))
def test_micro_batches_sum_up_to_the_batch(count, size, seed):
    batch = make_batch(np.random.default_rng(seed), count, 4)
    pieces = batch.split(size)
    assert sum(len(p) for p in pieces) == count and all(0 < len(p) <= size for p in pieces)
    assert {(p.num_decisions, p.num_units) for p in pieces} == {(batch.num_decisions, batch.num_units)}

    def loss(b):
        per_unit = (b.log_prob * b.mask).sum(1) * b.notes["advantage"]
        return per_unit.sum() / max(1, b.num_units) + b.reward.sum() / b.num_decisions

    torch.testing.assert_close(sum(loss(p) for p in pieces), loss(batch))
    assert [a for p in pieces for a in p.action] == batch.action
    assert np.concatenate([p.columns["group"] for p in pieces]).tolist() == batch.columns["group"].tolist()
    assert np.concatenate([p.trace["tokens"].values for p in pieces]).tolist() == batch.trace["tokens"].values.tolist()


def test_a_batch_gives_rows_in_any_order():
    batch = make_batch(np.random.default_rng(0), 5, 3)
    taken = batch.take(np.array([3, 1, 1]))
    assert taken.action == ["action 3", "action 1", "action 1"]
    assert taken.reward.equal(batch.reward[[3, 1, 1]])
    assert [len(t) for t in taken.trace["tokens"]] == [len(batch.trace["tokens"].row(i)) for i in (3, 1, 1)]


# --- files of trajectories ---------------------------------------------------------------------------

ARM = Schema({"state": Field((3,)), "front": Field((4, 4, 3), "uint8")}, Field((2,)))
AGENT = Schema(
    {"chat": Field((), "str", "ragged"), "screens": Field((), "uint8", "images")},
    Field((), "str", "ragged"),
    {"tokens": Field((), "int64", "ragged")},
    units=None,
)


def arm_episode(rng, length, end="truncated"):
    return Trajectory(
        observation={
            "state": rng.normal(size=(length + 1, 3)),
            "front": rng.integers(0, 256, (length + 1, 4, 4, 3), dtype=np.uint8),
        },
        action=rng.normal(size=(length, 2)).astype(np.float32),
        reward=rng.normal(size=length).astype(np.float32),
        end=end,
        rewards={"success": np.ones(length, np.float32)},
        source=Source.DEMONSTRATION,
        seed=7,
        success=True,
    )


def agent_episode(rng, length):
    screens = [[np.full((2, 3, 3), rng.integers(3), np.uint8)] * int(rng.integers(3)) for _ in range(length + 1)]
    tokens = Ragged.of([rng.integers(0, 9, rng.integers(4)) for _ in range(length)], dtype=np.int64)
    return Trajectory(
        observation={"chat": [f"turn {i} ü" for i in range(length + 1)], "screens": screens},
        action=[f"say {i}" for i in range(length)],
        reward=np.zeros(length, np.float32),
        end="terminated",
        log_prob=Ragged(rng.normal(size=len(tokens.values)).astype(np.float32), tokens.offsets),
        trace={"tokens": tokens},
        group=3,
        version=12,
    )


def plain(value):
    """Nested lists, for comparison."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, Ragged)) else getattr(value, "tolist", lambda: value)()


def content(trajectory):
    return {name: plain(getattr(trajectory, name)) for name in Trajectory.__dataclass_fields__}


@pytest.mark.parametrize(("make", "schema"), [(arm_episode, ARM), (agent_episode, AGENT)])
def test_trajectories_come_back_from_a_file(make, schema, tmp_path):
    rng = np.random.default_rng(0)
    episodes = [make(rng, length) for length in (3, 1, 5)]
    path = tmp_path / "sub" / "demos.safetensors"
    write_trajectories(path, episodes)
    loaded = read_trajectories(path, schema=schema)
    assert [content(t) for t in loaded] == [content(t) for t in episodes]
    assert [p.name for p in path.parent.iterdir()] == ["demos.safetensors"]
    first = path.read_bytes()
    write_trajectories(path, loaded)
    assert path.read_bytes() == first  # bit-equal


@pytest.mark.parametrize(("make", "schema"), [(arm_episode, ARM), (agent_episode, AGENT)])
def test_a_buffer_gives_back_the_trajectories_it_was_given(make, schema):
    rng = np.random.default_rng(1)
    episodes = [make(rng, length) for length in (3, 1, 5)]
    buffer = Buffer(Schema(**{**vars_of(schema), "rewards": ("env", *episodes[0].rewards)}), 40)
    for episode in episodes:
        buffer.add_trajectory(episode)
    for mine, theirs in zip(buffer.trajectories(), episodes, strict=True):
        assert (mine.end, mine.source, mine.group, mine.version, mine.seed) == (
            theirs.end, theirs.source, theirs.group, theirs.version, theirs.seed,
        )  # fmt: skip
        assert plain(mine.action) == plain(theirs.action) and plain(mine.trace) == plain(theirs.trace)
        for key, value in theirs.observation.items():
            stored = value.astype(np.float32) if key == "state" else value
            assert plain(mine.observation[key]) == plain(stored)
        if "success" in theirs.rewards:
            assert mine.success and plain(mine.rewards["success"]) == plain(theirs.rewards["success"])


def vars_of(schema):
    return {name: getattr(schema, name) for name in schema.__dataclass_fields__}


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_cut_file_is_named(keep, tmp_path):
    path = tmp_path / "demos.safetensors"
    write_trajectories(path, [arm_episode(np.random.default_rng(0), 4)])
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="is empty" if keep == 0 else "truncated or damaged"):
        read_trajectories(path)


def test_other_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="there is no demonstration file"):
        read_trajectories(tmp_path / "none.safetensors")
    path = tmp_path / "weights.safetensors"
    safetensors.numpy.save_file({"w": np.zeros(3)}, path)
    with pytest.raises(ValueError, match="not one of demonstrations"):
        read_trajectories(path)
    path.write_text("episode,reward\n0,1\n" * 20)
    with pytest.raises(ValueError, match="truncated or damaged"):
        read_trajectories(path)


@pytest.mark.parametrize(
    ("observation", "action", "message"),
    [
        (
            {"state": Field((4,)), "front": Field((4, 4, 3), "uint8")},
            Field((2,)),
            r"episode 0 .*'observation/state' has shape \(4, 3\)",
        ),
        (
            {"state": Field((3,))},
            Field((2,)),
            r"has the observations \['front', 'state'\], this environment \['state'\]",
        ),
        (
            {"state": Field((3,), "int64"), "front": Field((4, 4, 3), "uint8")},
            Field((2,)),
            "dtype float64, expected int64",
        ),
        (
            {"state": Field((3,)), "front": Field((4, 4, 3), "uint8")},
            Field((1,)),
            r"'action' has shape \(3, 2\), expected \(3, 1\)",
        ),
    ],
)
def test_a_file_for_another_environment_is_refused(observation, action, message, tmp_path):
    path = tmp_path / "demos.safetensors"
    write_trajectories(path, [arm_episode(np.random.default_rng(0), 3)])
    with pytest.raises(ValueError, match=message):
        read_trajectories(path, schema=Schema(observation, action))


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "demos.safetensors"
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="no trajectory"):
        write_trajectories(path, [])
    write_trajectories(path, [arm_episode(rng, 2)])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="trajectory 1 has columns"):
        write_trajectories(path, [arm_episode(rng, 2), agent_episode(rng, 2)])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_trajectories(path, [arm_episode(rng, 9)])
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_piece_is_as_wide_as_its_longest_row():
    mask = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
    batch = Batch(
        observation={},
        action=torch.zeros(3),
        reward=torch.zeros(3),
        discount=torch.ones(3),
        next_observation={},
        log_prob=torch.arange(9.0).reshape(3, 3),
        mask=mask,
        notes={"unit": torch.arange(9.0).reshape(3, 3), "decision": torch.arange(3.0)},
        num_decisions=3,
        num_units=6,
    )
    first, rest = batch.take(slice(0, 1)), batch.take(slice(1, 3))
    assert first.mask.shape == (1, 3) and rest.mask.shape == rest.log_prob.shape == rest.notes["unit"].shape == (2, 2)
    assert rest.notes["unit"].tolist() == [[3, 4], [6, 7]] and rest.notes["decision"].tolist() == [1, 2]
    assert rest.num_units == 6
