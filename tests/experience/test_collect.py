from dataclasses import replace

import numpy as np
import pytest

from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.columns import Schema
from embodied_rft.data import Decisions, Field
from embodied_rft.experience.collect import KEPT, Collector, action_field
from embodied_rft.pools.promises import same
from embodied_rft.pools.protocol import StepResult
from embodied_rft.pools.text_spaces import AnyText
from embodied_rft.seeding import training_seed
from tests.lab.toys import SeedPool


def act(observation):
    count = len(observation["observation"])
    action = observation["observation"][:, :1].astype(np.float32) % 7 / 7
    return Decisions(action, np.zeros((count, 1), np.float32))


def make(num_envs, **kwargs):
    pool = SeedPool(num_envs, **kwargs)
    schema = Schema(observation=pool.fields, action=action_field(pool.action_space), trace={}, units=1)
    return pool, Buffer(schema, 2_000)


def check(trajectories, run_seed, group_size=1):
    """Every trajectory is the whole episode of its seed, nothing of another one."""
    for t in trajectories:
        assert len(t) == 1 + t.seed % 5 and t.end == "terminated"
        assert (t.observation["observation"][:, 0] == t.seed % 100_000).all()
        assert t.observation["observation"][:, 1].tolist() == list(range(len(t) + 1))
        assert np.allclose(np.asarray(t.action)[:, 0], t.seed % 100_000 % 7 / 7)


@pytest.mark.parametrize("num_envs", [1, 4, 9])
def test_exactly_the_first_episodes_are_counted_none_favoured_for_being_short(num_envs):
    pool, buffer = make(num_envs)
    recording = Collector(pool, run_seed=5).collect(act, episodes=13)
    rows = recording.write(buffer).rows
    trajectories = list(buffer.trajectories())
    assert sorted(t.seed for t in trajectories) == sorted(training_seed(5, 0, e) for e in range(13))
    assert len(rows) == recording.decisions == sum(map(len, trajectories))
    assert len(recording.successes) == 13
    check(trajectories, 5)


def test_writing_a_recording_changes_nothing_of_it():
    pool, buffer = make(4)
    recording = Collector(pool, run_seed=5).collect(act, episodes=6)
    _, other = make(4)
    first, second = recording.write(buffer), recording.write(other)
    assert recording.rewards == ("env", "success") and len(first.rows) == recording.decisions <= recording.num_rows
    assert np.array_equal(first.rows, second.rows) and len(np.unique(first.episodes)) == 6
    for a, b in zip(buffer.trajectories(), other.trajectories(), strict=True):
        assert a.seed == b.seed and np.array_equal(a.observation["observation"], b.observation["observation"])


def test_siblings_share_their_initial_state():
    pool, buffer = make(6)
    Collector(pool, run_seed=1, group_size=3).collect(act, episodes=12).write(buffer)
    groups = {}
    for t in buffer.trajectories():
        groups.setdefault(t.group, []).append(t.seed)
    assert sorted(groups) == [0, 1, 2, 3]
    assert all(len(seeds) == 3 and len(set(seeds)) == 1 for seeds in groups.values())


def test_groups_are_whole_whatever_came_before():
    pool, buffer = make(3)
    Collector(pool, run_seed=1, group_size=4, first_episode=5).collect(act, episodes=8).write(buffer)
    assert sorted(t.group for t in buffer.trajectories()) == [2] * 4 + [3] * 4


def test_collecting_in_pieces_is_collecting_at_once():
    pool, buffer = make(4)
    collector = Collector(pool, run_seed=2)
    collector.collect(act, decisions=60).write(buffer)
    collector.cut().write(buffer)
    pool, other = make(4)
    collector = Collector(pool, run_seed=2)
    for _ in range(15):
        collector.collect(act, decisions=4).write(other)
    collector.cut().write(other)
    for a, b in zip(buffer.trajectories(), other.trajectories(), strict=True):
        assert a.seed == b.seed and a.end == b.end
        assert np.array_equal(a.observation["observation"], b.observation["observation"])


def test_a_broken_episode_never_reaches_the_learner_and_is_replaced_when_counted():
    bad = {training_seed(7, 0, 3), training_seed(7, 0, 6)}
    pool, buffer = make(3, break_always=bad)
    recording = Collector(pool, run_seed=7).collect(act, episodes=10)
    recording.write(buffer)
    trajectories = list(buffer.trajectories())
    assert recording.invalid == 2 and len(trajectories) == 10
    assert not bad & {t.seed for t in trajectories}
    check(trajectories, 7)


def test_state_is_restored_in_the_middle_of_an_episode():
    pool, buffer = make(5)
    collector = Collector(pool, run_seed=3)
    collector.collect(act, decisions=35).write(buffer)
    saved = collector.state_dict()
    collector.collect(act, decisions=40).write(buffer)
    pool, other = make(5)
    again = Collector(pool, run_seed=3)
    again.load_state_dict(saved)
    again.collect(act, decisions=40)
    assert again.next_episode == collector.next_episode
    assert same(*({name: getattr(c.schedule, name) for name in (*KEPT, "observation")} for c in (again, collector)))


def test_after_every_call_the_newest_decisions_can_be_read_and_no_row_is_stored_twice():
    pool, buffer = make(4)
    collector = Collector(pool, run_seed=2)
    recorded = []
    for _ in range(12):
        recorded += collector.collect(act, decisions=4).write(buffer).rows.tolist()
        assert sorted(buffer.rows()) == sorted(recorded)
        batch = buffer.batch(buffer.rows())
        now, after = (tree["observation"].numpy() for tree in (batch.observation, batch.next_observation))
        assert (after[:, 0] == now[:, 0]).all() and (after[:, 1] == now[:, 1] + 1).all()
        running = int((collector.schedule.playing & (collector.schedule.step > 0)).sum())
        assert buffer.size == len(recorded) + sum(1 for t in buffer.trajectories() if t.end == "terminated") + running


def test_running_episodes_that_no_checkpoint_can_hold_are_cut_counted_and_bootstrapped_when_it_is_loaded():
    pool, buffer = make(5, can_save=False)
    collector = Collector(pool, run_seed=3)
    collector.collect(act, decisions=35).write(buffer)
    saved, rows = collector.state_dict(), buffer.state_dict()
    running = int((collector.schedule.playing & (collector.schedule.step > 0)).sum())
    assert "pool" not in saved and running

    def go_on():
        pool, other = make(5, can_save=False)
        other.load_state_dict(rows)
        again = Collector(pool, run_seed=3)
        again.load_state_dict(saved)
        recording = again.begin_anew()
        assert recording.lost == running and again.next_episode == saved["next_episode"]
        recording.write(other)
        ends = [t.end for t in other.trajectories()]
        assert ends.count("cut") == running
        last = np.array([run[-1] for run in other.segments(other.rows())])
        assert ((other.batch(last).discount.numpy() > 0) == [end == "cut" for end in ends]).all()
        assert again.begin_anew().lost == 0  # once is enough
        again.collect(act, decisions=40).write(other)
        check([t for t in other.trajectories() if t.end == "terminated"], 3)
        return [(t.seed, t.end, len(t)) for t in other.trajectories()]

    assert go_on() == go_on()


def test_nothing_is_lost_where_no_episode_runs():
    pool, buffer = make(3, can_save=False)
    collector = Collector(pool, run_seed=7)
    collector.collect(act, episodes=5).write(buffer)
    saved = collector.state_dict()
    pool, other = make(3, can_save=False)
    again = Collector(pool, run_seed=7)
    again.load_state_dict(saved)
    assert again.begin_anew().lost == 0
    both = []
    for one, into in ((collector, buffer), (again, other)):
        one.collect(act, episodes=5).write(into)
        both.append([(t.seed, t.observation["observation"].tolist()) for t in into.trajectories()][-5:])
    assert both[0] == both[1]


def test_an_environment_whose_episodes_never_end_is_told_with_what_to_do_less_and_less_often():
    pool, _ = make(2)
    pool.step = lambda action: StepResult(
        pool._observe(), np.ones(2, np.float32), np.zeros(2, bool), np.zeros(2, bool), {}, np.ones(2, bool)
    )
    said = []
    recording = Collector(pool, run_seed=0, say=said.append).collect(act, decisions=10_000)
    assert len(said) == 3 and "no episode has ended in the last 1,000 steps" in said[0] and "TimeLimit" in said[0]
    assert recording.metrics()["collect/episodes"] == 0 and "collect/success" not in recording.metrics()


def test_success_of_0_is_never_shown_where_nobody_told_it():
    pool, _ = make(2)
    told = Collector(pool, run_seed=0).collect(act, episodes=4).metrics()
    step = pool.step
    pool.step = lambda action: replace(step(action), info={})
    untold = Collector(pool, run_seed=0).collect(act, episodes=4).metrics()
    assert "collect/success" in told and "collect/success" not in untold
    assert untold["collect/return"] == told["collect/return"]


@pytest.mark.parametrize("units", [1, None])
def test_who_does_not_know_how_likely_he_was_is_recorded_and_may_leave_environments_idle(units):
    """As a player: what is unknown is stored as of demonstrations."""
    pool, schema = SeedPool(5), Schema(observation={"observation": Field((2,))}, action=Field((1,)), units=units)
    pool.action_space = AnyText(9)  # idle environments are not shown to who acts
    asked, buffer = [], Buffer(schema, 200)

    def play(observation):
        asked.append(len(observation["observation"]))
        return Decisions(act(observation).action, None)

    Collector(pool, run_seed=5).collect(play, episodes=7).write(buffer)
    trajectories = list(buffer.trajectories())
    assert min(asked) < 5 and len(trajectories) == 7
    check(trajectories, 5)
    assert all(np.size(row) == (units or 0) and not np.any(row) for t in trajectories for row in t.log_prob)
