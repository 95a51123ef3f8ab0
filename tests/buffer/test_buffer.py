"""The buffer against a slow model over random histories; then its edges one by one."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.columns import RaggedColumn, Schema
from embodied_rft.buffer.memory import announce
from embodied_rft.buffer.ring import Ring
from embodied_rft.data import Decisions, Field, Ragged, Source
from tests.lab.buffer_model import DENSE, RICH, Model, run_history


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), capacity=st.integers(4, 40))
def test_reads_what_a_list_of_episodes_holds(seed, capacity):
    run_history(seed, DENSE, capacity)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), capacity=st.integers(4, 40))
def test_reads_ragged_text_and_images_and_leaks_none(seed, capacity):
    run_history(seed, RICH, capacity).check_images()


def break_alive(monkeypatch):
    monkeypatch.setattr(Ring, "alive", lambda self, serials: serials >= 0)


def break_windows(monkeypatch):
    """Counts the closing row, or the newest decision, as a step."""

    def windows(self, rows, num_steps):
        steps = [rows]
        for _ in range(num_steps - 1):
            following = self.next[steps[-1]]
            steps.append(np.where(following >= 0, following, steps[-1]))
        return np.stack(steps), np.ones((num_steps, len(rows)), bool)

    monkeypatch.setattr(Ring, "windows", windows)


def break_hide(monkeypatch):
    monkeypatch.setattr(Ring, "hide", lambda self, rows: None)


def break_link(monkeypatch):
    """Counts a row again that `peek` has linked before."""
    link = Ring.link

    def twice(self, rows, following, sides):
        self.side[rows] = 0
        link(self, rows, following, sides)

    monkeypatch.setattr(Ring, "link", twice)


@pytest.mark.parametrize("broken", [break_alive, break_windows, break_hide, break_link])
def test_the_model_notices_a_broken_ring(broken, monkeypatch):
    broken(monkeypatch)
    with pytest.raises((AssertionError, ValueError)):
        for seed in range(20):
            run_history(seed, DENSE, capacity=12)


# --- edges ------------------------------------------------------------------------------------------


def simple(capacity=100, **schema):
    return Buffer(Schema({"state": Field((2,))}, Field((1,)), **schema), capacity)


def state(count, value):
    return {"state": np.full((count, 2), value)}


def add(buffer, streams, value=0.0, *, terminated=False, truncated=False, reward=1.0, **columns):
    count = len(streams)
    zeros = np.zeros((count, 1))
    reward = reward if isinstance(reward, dict) else np.full(count, reward)
    ends = np.full(count, terminated), np.full(count, truncated)
    return buffer.add(np.asarray(streams), state(count, value), Decisions(zeros, zeros), reward, *ends, **columns)


def close(buffer, streams, value=9.0):
    buffer.close(np.asarray(streams), state(len(streams), value))


def episode(buffer, length, *, end="truncated", **columns):
    for i in range(length):
        last = i == length - 1
        add(buffer, [0], i, terminated=last and end == "terminated", truncated=last and end == "truncated", **columns)
    close(buffer, [0])


@pytest.mark.parametrize(("end", "discount"), [("terminated", 0.0), ("truncated", 0.81), ("cut", 0.81)])
def test_only_a_terminal_state_does_not_bootstrap(end, discount):
    buffer = simple()
    episode(buffer, 2, end=end)
    batch = buffer.batch(buffer.rows()[:1], num_steps=5, gamma=0.9)
    assert batch.reward.item() == pytest.approx(1.9)
    assert batch.discount.item() == pytest.approx(discount)
    assert batch.next_observation["state"].tolist() == [[9, 9]]
    assert buffer.batch(buffer.rows(), gamma=0.9).discount.tolist() == pytest.approx([0.9, 0.9 * (discount > 0)])
    (trajectory,) = buffer.trajectories()
    assert trajectory.end == end and len(trajectory) == 2


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize(
    ("end", "weights", "discount"),
    [
        ("terminated", {"success": 1.0}, 0.0),
        ("truncated", {"success": 1.0}, 0.0),  # it was paid for the last time: it is not counted again
        ("truncated", {"env": 0.1, "success": 1.0}, 0.0),
        ("truncated", {"env": 1.0, "success": 0.0}, 0.5),
        ("truncated", None, 0.5),
        ("cut", {"success": 1.0}, 0.5),  # the episode would have gone on
    ],
)
def test_a_stream_that_is_paid_at_the_end_ends_with_the_episode_whatever_ended_it(end, weights, discount, num_steps):
    buffer = simple(rewards=("env", "success"))
    reward = {"env": np.zeros(1), "success": np.ones(1)}
    for step in range(2):
        over = step == 1
        add(buffer, [0], reward=reward, terminated=over and end == "terminated", truncated=over and end == "truncated")
    close(buffer, [0])
    batch = buffer.batch(buffer.rows(), gamma=0.5, reward_weights=weights, num_steps=num_steps)
    assert batch.discount.tolist() == [0.5 if num_steps == 1 else 0.5 * discount, discount]


def test_the_next_decision_fills_the_row_that_was_looked_ahead_into():
    buffer = simple()
    add(buffer, [0, 1], 1.0)
    assert len(buffer) == 0 and buffer.size == 2
    buffer.peek(np.array([1]), state(1, 5.0))
    (row,) = buffer.rows()
    assert buffer.batch([row]).next_observation["state"].tolist() == [[5.0, 5.0]] and buffer.size == 3
    assert add(buffer, [0, 1], 5.0).tolist() == [3, 2] and buffer.size == 4 and len(buffer) == 2
    assert buffer.batch([row], num_steps=2).next_observation["state"].tolist() == [[5.0, 5.0]]
    buffer.peek(np.array([1]), state(1, 6.0))
    close(buffer, [1], 6.0)
    assert buffer.size == 5 and len(buffer) == 3
    with pytest.raises(ValueError, match="stream 1 has no open episode"):
        buffer.peek(np.array([1]), state(1, 6.0))


def test_offline_share_is_exact_wherever_the_rows_lie():
    buffer = simple(capacity=60)
    episode(buffer, 5, source=Source.DEMONSTRATION)
    buffer.pin()
    for source in (Source.OFFLINE, Source.ONLINE, Source.INTERVENTION):
        episode(buffer, 4, source=source)
    for share, offline in ((0.0, 0), (0.3, 77), (0.5, 128), (1.0, 256)):
        columns = buffer.sample(np.random.default_rng(0), 256, offline_share=share).columns
        assert (columns["source"] <= Source.OFFLINE).sum() == offline
    drawn = np.bincount(buffer.sample(np.random.default_rng(0), 20_000, offline_share=1.0).rows, minlength=buffer.size)
    rows = buffer.rows(source=[Source.DEMONSTRATION, Source.OFFLINE])
    assert drawn.sum() == drawn[rows].sum() and (abs(drawn[rows] - 20_000 / 9) < 200).all()


@pytest.mark.parametrize("hidden", [50, 450])
@pytest.mark.parametrize(
    ("share", "sources"), [(None, list(Source)), (0.0, [Source.ONLINE]), (1.0, [Source.DEMONSTRATION, Source.OFFLINE])]
)
def test_sampling_is_uniform(hidden, share, sources):
    # Episodes of one decision leave every second row unreadable; with 450 hidden rows the list of rows is drawn from.
    buffer = simple(capacity=700)
    for _ in range(20):
        episode(buffer, 1, source=Source.DEMONSTRATION)
    buffer.pin()
    for i in range(90):
        episode(buffer, 1, source=Source.OFFLINE if i % 3 else Source.ONLINE)
    for _ in range(hidden):
        add(buffer, [1])
    buffer.invalidate(np.array([1]))
    rows, rng = buffer.rows(source=sources), np.random.default_rng(1)
    drawn = np.bincount(buffer.sample(rng, 500 * len(rows), offline_share=share).rows, minlength=700)
    assert drawn.sum() == drawn[rows].sum()
    assert abs(drawn[rows] - 500).max() < 6 * 500**0.5


def test_decisions_are_numbered_from_0_in_each_episode():
    buffer = simple()
    for streams in ([0, 1], [1], [0, 1]):
        add(buffer, streams)
    close(buffer, [1])
    add(buffer, [1, 0])
    book = buffer.columns(np.array([0, 1, 2, 3, 4, 6, 7]))  # 5 closed the episode of stream 1
    assert book["step"].tolist() == [0, 0, 1, 1, 2, 0, 2] and book["episode"].tolist() == [0, 1, 1, 0, 1, 2, 0]


def test_a_side_without_rows_is_named():
    buffer = simple()
    with pytest.raises(ValueError, match="holds no decisions"):
        buffer.sample(np.random.default_rng(0), 8)
    episode(buffer, 3)
    with pytest.raises(ValueError, match="demonstrations or offline"):
        buffer.sample(np.random.default_rng(0), 8, offline_share=0.5)
    with pytest.raises(ValueError, match="share in"):
        buffer.sample(np.random.default_rng(0), 8, offline_share=1.5)


def test_pinned_rows_stay():
    buffer = simple(capacity=12)
    episode(buffer, 3, source=Source.DEMONSTRATION)
    buffer.pin()
    for _ in range(7):
        episode(buffer, 3)
    assert [t.source for t in buffer.trajectories()] == [Source.DEMONSTRATION, Source.ONLINE, Source.ONLINE]
    with pytest.raises(ValueError, match="pin\\(\\) earlier"):
        buffer.pin()
    with pytest.raises(ValueError, match="do not fit"):
        add(buffer, list(range(9)))


def test_pin_wants_closed_episodes():
    buffer = simple()
    add(buffer, [3])
    with pytest.raises(ValueError, match="stream 3 is open"):
        buffer.pin()


@pytest.mark.parametrize("kind", ["observation", "action", "reward"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_out(kind, bad):
    buffer = simple()
    add(buffer, [4, 5])
    before = copy.deepcopy(buffer.state_dict())
    values = {"observation": np.zeros((2, 2)), "action": np.zeros((2, 1)), "reward": np.zeros(2)}
    values[kind][1] = bad
    with pytest.raises(ValueError, match=f"{kind}.* of stream 5 is not finite"):
        buffer.add(
            np.array([4, 5]), {"state": values["observation"]}, Decisions(values["action"], np.zeros((2, 1))),
            values["reward"], np.zeros(2, bool), np.zeros(2, bool),
        )  # fmt: skip
    torch.testing.assert_close(flat(buffer.state_dict()), flat(before), rtol=0, atol=0)


def flat(tree):
    """A nested state as {path: value} of comparable leaves."""
    if isinstance(tree, dict):
        return {f"{k}/{path}": v for k, value in tree.items() for path, v in flat(value).items()}
    if isinstance(tree, Ragged):
        return {"values": torch.from_numpy(tree.values.copy()), "offsets": torch.from_numpy(tree.offsets.copy())}
    return {"": torch.from_numpy(np.array(tree)) if isinstance(tree, np.ndarray) else torch.tensor(hash(tree))}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"observation": {"stat": np.zeros((1, 2))}}, "did you mean 'state'"),
        ({"observation": {}}, "'state' is missing"),
        ({"observation": {"state": np.zeros((1, 3))}}, r"shape \(1, 3\), expected \(1, 2\)"),
        ({"observation": {"state": np.zeros((2, 2))}}, "2 rows, expected 1"),
        ({"observation": {"state": np.zeros((1, 2), complex)}}, "dtype complex128, expected float32"),
        ({"decisions": Decisions(np.zeros((1, 2)), np.zeros((1, 1)))}, r"'action' has shape \(1, 2\)"),
        ({"decisions": Decisions(np.zeros((1, 1)), np.zeros((1, 4)))}, r"'log_prob' has shape \(1, 4\)"),
        ({"decisions": Decisions(np.zeros((1, 1)), np.zeros((1, 1)), {"v": np.zeros((1, 1))})}, "trace 'v' is not in"),
        ({"reward": {"env": np.zeros(1), "style": np.zeros(1)}}, "reward 'style' is not in"),
        ({"terminated": np.zeros(3, bool)}, r"terminated has shape \(3,\)"),
        ({"streams": np.array([-1])}, "different numbers >= 0"),
        ({"version": np.zeros(2)}, r"version has shape \(2,\)"),
    ],
)
def test_wrong_input_is_named_and_changes_nothing(change, message):
    buffer = simple()
    arguments = {
        "streams": np.array([0]), "observation": state(1, 0),
        "decisions": Decisions(np.zeros((1, 1)), np.zeros((1, 1))),
        "reward": np.zeros(1), "terminated": np.zeros(1, bool), "truncated": np.zeros(1, bool),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        buffer.add(**arguments | change)
    assert buffer.size == 0
    buffer.add(**arguments)
    assert buffer.size == 1


def test_episodes_are_closed_in_order():
    buffer = simple()
    with pytest.raises(ValueError, match="no open episode"):
        close(buffer, [0])
    add(buffer, [0], terminated=True)
    with pytest.raises(ValueError, match="stream 0 has ended"):
        add(buffer, [0])
    close(buffer, [0])
    add(buffer, [0])
    with pytest.raises(ValueError, match="row 2 cannot be read"):
        buffer.batch(np.array([0, 2]))


def test_reward_streams_are_mixed_when_read():
    buffer = simple(rewards=("env", "success"))
    episode(buffer, 3, reward={"env": np.array([2.0]), "success": np.array([1.0])})
    rows = buffer.rows()
    assert buffer.batch(rows).reward.tolist() == [2, 2, 2]
    assert buffer.batch(rows, reward_weights={"env": 0.5, "success": 3}).reward.tolist() == [4, 4, 4]
    mixed = buffer.batch(rows, reward_weights={"success": 1}, num_steps=2, gamma=0.5)
    assert mixed.reward.tolist() == [1.5, 1.5, 1]
    with pytest.raises(ValueError, match="no reward stream 'sucess'; did you mean 'success'"):
        buffer.batch(rows, reward_weights={"sucess": 1})
    assert [t.success for t in buffer.trajectories()] == [True]


def test_notes_follow_their_rows():
    buffer = simple(capacity=6)
    episode(buffer, 3)
    rows = buffer.rows()
    buffer.annotate("advantage", rows[:2], np.array([1.0, 2.0]))
    buffer.annotate("pair", rows, np.ones((3, 2)))
    notes = buffer.batch(rows).notes
    assert notes["advantage"][:2].tolist() == [1, 2] and notes["advantage"][2].isnan()
    assert notes["pair"].shape == (3, 2)
    episode(buffer, 3)  # overwrites the first episode's first rows
    assert buffer.batch(buffer.rows()).notes["advantage"].isnan().all()
    with pytest.raises(ValueError, match="was of shape"):
        buffer.annotate("pair", rows, np.ones(3))
    with pytest.raises(ValueError, match="2 values for 3 rows"):
        buffer.annotate("pair", rows, np.ones((2, 2)))


def test_notes_of_ragged_units_are_padded_like_the_log_probabilities():
    model = Model(100, 0, RICH)
    for _ in range(5):
        model.add(np.arange(4))
    buffer, rows = model.buffer, model.buffer.rows()
    lengths = buffer.batch(rows).mask.sum(1).numpy()
    values = Ragged.of([np.full(n, i + 1.0, np.float32) for i, n in enumerate(lengths)], dtype=np.float32)
    buffer.annotate("reference", rows[2:], values.take(np.arange(2, len(rows))))
    batch = buffer.batch(rows)
    note = batch.notes["reference"]
    assert note.shape == batch.mask.shape and (note[~batch.mask] == 0).all()
    assert note[:2][batch.mask[:2]].isnan().all()
    assert (note[2:][batch.mask[2:]] == torch.from_numpy(np.repeat(np.arange(2, len(rows)) + 1.0, lengths[2:]))).all()
    with pytest.raises(ValueError, match="another number of values"):
        buffer.annotate("reference", rows[:1], Ragged.of([[0.0] * 9]))


def test_unknown_traces_do_not_look_like_known_ones():
    buffer = Buffer(Schema({"state": Field((2,))}, Field((1,)), {"u": Field((2,)), "token": Field((), "int64")}), 20)
    episode(buffer, 2)
    batch = buffer.batch(buffer.rows())
    assert batch.trace["u"].isnan().all() and batch.trace["token"].tolist() == [-1, -1]
    assert batch.next_trace["u"][-1].tolist() == [0, 0]  # of the closing row


def test_a_trajectory_is_traced_again_for_another_policy():
    source = simple()
    episode(source, 3)
    (trajectory,) = source.trajectories()
    buffer = Buffer(Schema({"state": Field((2,))}, Field((1,)), {"base": Field((2,))}), 20)
    rows = buffer.add_trajectory(trajectory, retrace=lambda observation, action: {"base": observation["state"] * 2})
    batch = buffer.batch(rows)
    assert batch.trace["base"].equal(batch.observation["state"] * 2)
    assert batch.next_trace["base"].equal(batch.next_observation["state"] * 2)


def test_restored_buffer_draws_the_same_batches_bit_for_bit():
    for schema in (DENSE, RICH):
        model = run_history(3, schema, 30, steps=60)
        buffer, rows = model.buffer, model.buffer.rows()
        buffer.annotate("advantage", rows, np.random.default_rng(0).normal(size=len(rows)))
        twin = Buffer(schema, 30)
        twin.load_state_dict(copy.deepcopy(buffer.state_dict()))
        torch.testing.assert_close(flat(twin.state_dict()), flat(buffer.state_dict()), rtol=0, atol=0, equal_nan=True)
        for one, two in zip(draws(buffer), draws(twin), strict=True):
            assert np.array_equal(one.rows, two.rows) and one.reward.equal(two.reward)
            assert one.observation["state"].equal(two.observation["state"]) and one.log_prob.equal(two.log_prob)
            assert one.notes["advantage"].equal(two.notes["advantage"])


def draws(buffer):
    rng = np.random.default_rng(7)
    return [buffer.sample(rng, 16, num_steps=n) for n in (1, 1, 3)]


def test_a_state_of_another_buffer_is_refused():
    state = simple(capacity=10).state_dict()
    with pytest.raises(ValueError, match="capacity"):
        simple(capacity=11).load_state_dict(state)
    with pytest.raises(ValueError, match="schema"):
        simple(capacity=10, units=2).load_state_dict(state)


def test_memory_is_announced_before_it_is_taken():
    cameras = {"front": Field((128, 128, 3), "uint8"), "wrist": Field((128, 128, 3), "uint8"), "state": Field((10,))}
    schema = Schema(cameras, Field((4,)))
    said = announce(schema, 30_000, available=10 * 10**9)
    assert said.startswith("this run needs 3.0 GB of replay (2 images of 128x128x3, 30,000 rows")
    with pytest.raises(ValueError, match="only 1.0 GB are free: at most 10,1"):
        announce(schema, 30_000, available=10**9)
    buffer = Buffer(schema, 300)
    assert f"needs {buffer.nbytes / 1e6:.0f} MB" in announce(schema, 300)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (lambda: Schema({}, Field((1,)), rewards=("success",)), "lack 'env'"),
        (lambda: Schema({"x": Field((), "flot32")}, Field()), "did you mean 'float32'"),
        (lambda: Schema({"x": Field((), "uint8", "image")}, Field()), "did you mean 'images'"),
        (lambda: Schema({"x": Field((), "float32", "images")}, Field()), "stored as uint8"),
        (lambda: Buffer(DENSE, 1), "at least 2"),
    ],
)
def test_impossible_columns_are_refused(schema, message):
    with pytest.raises(ValueError, match=message):
        schema()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (Field((), "str", "ragged"), [b"no"], "list of strings is expected"),
        (Field((), "int64", "ragged"), ["no"], "was given a string"),
        (Field((), "int64", "ragged"), [[0.5]], "dtype float64, expected int64"),
        (Field((2,), "float32", "ragged"), [np.zeros((3, 4))], "row of shape"),
        (Field((), "int64", "ragged"), Ragged(np.arange(3), np.array([0, 2])), "offsets from 0 to 2 for 3"),
        (Field((), "uint8", "images"), [[np.zeros((2, 2))]], "image of float64"),
        (Field((2, 2), "uint8"), np.full((1, 2, 2), 0.5), "dtype float64, expected uint8"),
    ],
)
def test_wrong_columns_of_every_kind_are_refused(field, value, message):
    buffer = Buffer(Schema({"x": field}, Field((1,))), 10)
    with pytest.raises(ValueError, match=message):
        buffer.add(
            np.array([0]),
            {"x": value},
            Decisions(np.zeros((1, 1)), np.zeros((1, 1))),
            np.zeros(1),
            np.zeros(1, bool),
            np.zeros(1, bool),
        )
    assert buffer.size == 0 and len(buffer.images) == 0


def test_ragged_rows_come_back_whatever_was_written_between():
    rng, column, held = np.random.default_rng(0), RaggedColumn(Field((), "int64", "ragged"), 50), {}
    for _ in range(200):  # the flat array is compacted many times
        rows = rng.choice(50, size=rng.integers(1, 9), replace=False)
        values = [rng.integers(0, 1000, rng.integers(0, 30)) for _ in rows]
        column.write(rows, Ragged.of(values, np.int64))
        held |= dict(zip(rows.tolist(), values, strict=True))
        seen = rng.permutation(sorted(held))
        assert [row.tolist() for row in column.read(seen)] == [held[row].tolist() for row in seen.tolist()]


def test_flat_storage_of_ragged_rows_stays_small():
    schema = Schema({"tokens": Field((), "int64", "ragged")}, Field((1,)))
    buffer = Buffer(schema, 10)
    for i in range(2_000):
        tokens = Ragged.of([np.arange(i % 50)], dtype=np.int64)
        buffer.add(
            np.array([0]), {"tokens": tokens}, Decisions(np.zeros((1, 1)), np.zeros((1, 1))), np.zeros(1), False, False
        )
    assert len(buffer._ragged["observation/tokens"].values) <= max(1024, 2 * 10 * 50)
