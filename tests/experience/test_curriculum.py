"""A curriculum decides which episodes are played, whole groups at a time, and a killed run goes on with it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied_rft.data import Decisions
from embodied_rft.experience.collect import Collector
from embodied_rft.experience.curriculum import Curriculum, Sieve
from embodied_rft.experience.recording import Taken
from embodied_rft.names import UserError
from embodied_rft.objectives.curricula import informative, make_curriculum
from embodied_rft.options import parse_stages
from embodied_rft.pools.pool import make_pool
from embodied_rft.seeding import training_seed
from tests.lab.moves import Moves

SECRETS = 4


class Some(Curriculum):
    """Tasks are numbers that are shown; each has a chance of its own."""

    def __init__(self, chances=(1.0, 1.0, 1.0, 1.0)):
        self.by_task, self.heard = np.array(chances), []

    def names(self, observation):
        return [str(each) for each in observation["observation"][:, -SECRETS:].argmax(1)]

    def chances(self, names, observation, foresee):
        return self.by_task[[int(name) for name in names]]

    def hear(self, names, success):
        self.heard += zip(names, success.tolist(), strict=True)


def moves(num_envs):
    """Two moves; a secret of four is shown, and an odd one is won."""

    def pay(moves, turn, secret):
        won = secret % 2 == 1
        return (won & (turn == 2)).astype(np.float64), won

    return Moves(num_envs, length=2, kinds=2, pay=pay, tell=lambda m, t, s: np.eye(4)[s], told=4, secrets=SECRETS)


def act(observation):
    count = len(observation["observation"])
    return Decisions(np.zeros(count, np.int64), np.zeros((count, 1), np.float32))


def secret(seed):
    return int(np.random.default_rng(int(seed)).integers(SECRETS))


def collector(curriculum, num_envs=6, group_size=1):
    sieve = None if curriculum is None else Sieve(curriculum, lambda o: np.zeros(0), run_seed=3, num_envs=num_envs)
    return Collector(moves(num_envs), run_seed=3, group_size=group_size, sieve=sieve)


def played(recording):
    """(group, seed) of the episodes that ended, one each."""
    rows = [each for each in recording.rows if isinstance(each, Taken)]
    first = [(g, s) for each in rows for g, s, t in zip(each.group, each.seed, each.step, strict=True) if t == 1]
    return [(int(g), int(s)) for g, s in first]


def test_whoever_is_sure_to_be_played_changes_nothing():
    plain, sieved = (collector(each).collect(act, episodes=40) for each in (None, Some()))
    assert played(plain) == played(sieved) and sieved.passed_over == 0 and plain.passed_over is None
    assert "collect/passed_over" not in plain.metrics() and sieved.metrics()["collect/passed_over"] == 0


@given(
    num_envs=st.integers(1, 7),
    group_size=st.integers(1, 4),
    groups=st.integers(1, 9),
    chances=st.lists(st.sampled_from([0.05, 0.3, 1.0]), min_size=4, max_size=4),
)
@settings(deadline=None, max_examples=60)
def test_groups_are_played_whole_and_as_many_as_were_asked_for(num_envs, group_size, groups, chances):
    made = collector(Some(chances), num_envs, group_size)
    for _ in range(2):
        before = made.next_episode
        recording = made.collect(act, episodes=groups * group_size)
        found = played(recording)
        assert len(found) == groups * group_size == len(recording.returns)
        for group, seed in found:
            assert seed == training_seed(3, 0, group)
        numbers, counts = np.unique([group for group, _ in found], return_counts=True)
        assert (counts == group_size).all()
        assert made.next_episode == before + groups * group_size + recording.passed_over
        assert numbers.min() * group_size >= before


def test_tasks_are_played_as_often_as_their_chance_says():
    recording = collector(Some((1.0, 0.5, 0.1, 0.02)), num_envs=16).collect(act, episodes=800)
    share = np.bincount([secret(seed) for _, seed in played(recording)], minlength=4) / 800
    assert share == pytest.approx(np.array([1, 0.5, 0.1, 0.02]) / 1.62, abs=0.05)


def test_it_hears_what_became_of_each_task():
    curriculum = Some((1.0, 0.3, 0.3, 1.0))
    recording = collector(curriculum).collect(act, episodes=60)
    assert len(curriculum.heard) == 60
    assert all(won == (int(name) % 2 == 1) for name, won in curriculum.heard)
    assert sorted(int(name) for name, _ in curriculum.heard) == sorted(secret(seed) for _, seed in played(recording))


def test_it_goes_on_where_it_was_killed():
    """Of real environments, in the middle of groups and of episodes."""
    pools = []

    def make():
        pool = make_pool(
            "embodied_rft/ClickScreen-v0",
            num_envs=3,
            options={"tasks": ["icon", "ticks"], "observe": "text", "style": "short", "expert": True},
            purpose="training",
        )
        pools.append(pool)
        curriculum = make_curriculum({"id": "record", "least": 0.2, "decay": 0.9})
        sieve = Sieve(curriculum, lambda o: np.zeros(0), run_seed=3, num_envs=3)
        return Collector(pool, run_seed=3, group_size=2, sieve=sieve)

    def play(made):
        recording = made.collect(lambda o: Decisions(list(o["expert"]), None), decisions=40)
        return [(each.seed.tolist(), each.group.tolist()) for each in recording.rows if isinstance(each, Taken)]

    whole, second = make(), make()
    play(whole)
    second.load_state_dict(whole.state_dict())
    assert len(second.begin_anew().rows) == 0
    assert play(whole) == play(second)
    assert whole.sieve.curriculum.record == second.sieve.curriculum.record
    assert set(whole.sieve.curriculum.record) == {"icon", "ticks"}
    for pool in pools:
        pool.close()


def test_a_chance_of_nothing_is_refused():
    with pytest.raises(UserError, match=r"waited for without end"):
        collector(Some((0.0, 0.0, 0.0, 0.0))).collect(act, episodes=1)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.01, 1))
@settings(deadline=None)
def test_what_is_uncertain_is_played_most(success, least):
    found = informative(np.array(success), least)
    assert ((found >= least) & (found <= 1)).all()
    near = np.argsort(np.abs(np.array(success) - 0.5))
    assert (np.diff(found[near]) <= 1e-12).all()


def test_a_record_fades_and_begins_with_a_half():
    curriculum = make_curriculum({"id": "record", "decay": 0.5})
    assert curriculum.success("new") == 0.5
    for won in (True, True, False):
        curriculum.hear(["pair"], np.array([won]))
    assert curriculum.success("pair") == pytest.approx((0.25 + 0.5 + 1) / (1.75 + 2))
    with pytest.raises(UserError, match="'task'.*"):
        curriculum.names({"tusk": ["pair"]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "sac"}, "digirl does"),
        ({"objective": "digirl", "overlap": True}, "overlap"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(options, message):
    with pytest.raises(UserError, match=message):
        parse_stages([{"finetune": {"curriculum": "value", **options}}])
