"""Environments in parts that do not wait for one another: the order of things is fixed, whichever part is faster."""

import itertools
import threading
import time
from collections import deque

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied_rft.data import Decisions, Field, Ragged
from embodied_rft.evaluation.evaluate import evaluate, evaluation_seeds
from embodied_rft.experience.collect import Collector
from embodied_rft.experience.recording import Broken, Last, Taken
from embodied_rft.policy import Policy
from embodied_rft.pools.chunks import Chunk, ChunkPool
from embodied_rft.pools.incidents import EnvironmentFailure, Infrastructure
from embodied_rft.pools.pool import VectorPool
from embodied_rft.pools.promises import same
from embodied_rft.pools.protocol import Seeding
from embodied_rft.pools.singles import Singles
from embodied_rft.pools.splits import Splits
from embodied_rft.pools.text_spaces import AnyText
from embodied_rft.seeding import training_seed
from tests.lab.toys import Corridor, SeedPool

PATIENCE = 20.0  # seconds until what does not happen has not happened


class Jittery(SeedPool):
    """Is told in words; takes a moment more or less for everything, by chance."""

    def __init__(self, num_envs, *, jitter=0, **options):
        super().__init__(num_envs, **options)
        self.action_space, self.action_field = AnyText(99), Field((), "str", "ragged")
        self.dice = np.random.default_rng(jitter)

    def reset(self, seeds, mask=None, options=None):
        time.sleep(self.dice.choice([0, 0, 1e-3, 3e-3]))
        return super().reset(seeds, mask, options)

    def step(self, action):
        time.sleep(self.dice.choice([0, 0, 1e-3, 3e-3]))
        return super().step(action)


class Actor:
    """Says a number that it draws; remembers what it was shown, call by call."""

    def __init__(self):
        self.dice, self.asked = np.random.default_rng(0), []

    def __call__(self, observation):
        seen = observation["observation"].astype(int).tolist()
        self.asked.append([tuple(row) for row in seen])
        said = [str(self.dice.integers(1_000_000)) for _ in seen]
        return Decisions(said, Ragged.of([[0.0]] * len(seen), np.float32))


def split(sizes, *, jitter=0, **options):
    return Splits([Jittery(size, jitter=(jitter, i), **options) for i, size in enumerate(sizes)])


def told(recording):
    """A recording as plain values, in its order: decisions, episodes that are void, and last observations."""
    rows = []
    for each in recording.rows:
        if isinstance(each, Taken):
            shown, said = each.observation["observation"].astype(int).tolist(), each.decisions.action
            book = each.streams, each.seed, each.step, each.terminated, each.reward["env"]
            rows += zip(*(column.tolist() for column in book), map(tuple, shown), said, strict=True)
        elif isinstance(each, Broken):
            rows += [("void", env) for env in each.streams.tolist()]
        elif isinstance(each, Last):
            shown = each.observation["observation"].astype(int).tolist()
            rows += zip(itertools.repeat("last"), each.streams.tolist(), map(tuple, shown))
    return rows


def plainly(sizes, amount, broken, dice):
    """What should be recorded, and what shown: one thing after the other, in the order that is promised."""
    rows, asked, taken, number = [], [], 0, 0
    decisions, last = amount.get("decisions", np.inf), amount.get("episodes", np.inf)
    firsts = np.cumsum([0, *sizes]).tolist()
    parts = [range(first, first + size) for first, size in zip(firsts, sizes, strict=False)]
    running = {}  # {environment: (seed, step)}

    def begin(envs):
        nonlocal number
        for env in envs:
            if number < last:
                running[env], number = (training_seed(0, 0, number), 0), number + 1

    def seen(env):
        return running[env][0] % 100_000, running[env][1]

    by_place = [env for place in itertools.zip_longest(*parts) for env in place if env is not None]
    begin(sorted(by_place[: int(min(len(by_place), last))]))
    waiting, under_way = deque(parts), deque()
    while running and taken < decisions:
        while waiting and sum(len(said) for _, said in under_way) < decisions - taken:
            part = waiting.popleft()
            if envs := [env for env in part if env in running]:
                asked.append([seen(env) for env in envs])
                under_way.append((part, {env: str(dice.integers(1_000_000)) for env in envs}))
        part, said = under_way.popleft()
        void = [env for env in said if running[env][0] in broken]
        fine = [env for env in said if env not in void]
        over = [env for env in fine if running[env][1] == running[env][0] % 5]
        rows += [(env, *running[env], env in over, 1.0, seen(env), said[env]) for env in fine]
        for env in fine:
            running[env] = running[env][0], running[env][1] + 1
        rows += [*(("void", env) for env in void), *(("last", env, seen(env)) for env in over)]
        taken, last = taken + len(fine), last + len(void)
        for env in (*void, *over):
            del running[env]
        begin(env for env in part if env not in running)
        waiting.append(part)
    return rows + [("last", env, seen(env)) for env in sorted(running) if running[env][1]], asked


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    amount=st.one_of(
        st.fixed_dictionaries({"decisions": st.integers(1, 60)}),
        st.fixed_dictionaries({"episodes": st.integers(1, 12)}),
    ),
    bad=st.sets(st.integers(0, 16), max_size=9),
    jitter=st.integers(0, 1_000),
)
def test_what_happens_and_in_which_order_is_that_of_a_plain_loop(sizes, amount, bad, jitter):
    broken = {training_seed(0, 0, number) for number in bad}
    pool, actor = split(sizes, jitter=jitter, break_always=broken), Actor()
    collector = Collector(pool, run_seed=0)
    recording = collector.collect(actor, **amount)
    rows = told(recording) + told(collector.cut())
    expected, asked = plainly(sizes, amount, broken, np.random.default_rng(0))
    assert actor.asked == asked
    assert rows == expected
    pool.close()


@pytest.mark.parametrize("amount", [{"decisions": 150}, {"episodes": 40}], ids=str)
def test_whoever_is_faster_the_recording_is_the_same_to_the_bit(amount):
    recordings = []
    for jitter in range(4):
        pool = split([3, 2, 3], jitter=jitter, break_once={training_seed(0, 0, 4)})
        recordings.append(told(Collector(pool, run_seed=0).collect(Actor(), **amount)))
        pool.close()
    assert recordings[1:] == recordings[:1] * 3


@pytest.mark.parametrize("piece", [1, 3, 16])
def test_it_goes_on_from_a_state_as_if_nothing_had_happened(piece):
    """Pieces smaller than a part, too: no part is left out for coming late."""
    pool, actor = split([2, 3]), Actor()
    collector, again = Collector(pool, run_seed=0), Collector(split([2, 3], jitter=1), run_seed=0)
    for _ in range(5):
        collector.collect(actor, decisions=piece)
    assert (collector.schedule.step[collector.schedule.playing] > 0).any()
    saved, then = collector.state_dict(), Actor()
    then.dice.bit_generator.state = actor.dice.bit_generator.state
    again.load_state_dict(saved)
    actor.asked.clear()
    for _ in range(20):
        assert told(collector.collect(actor, decisions=piece)) == told(again.collect(then, decisions=piece))
    assert then.asked == actor.asked and same(collector.state_dict(), again.state_dict())
    assert len({env for env, _ in enumerate(collector.schedule.episode) if collector.schedule.episode[env] >= 5}) == 5
    for each in (pool, again.schedule.pool):
        each.close()


def test_a_verdict_does_not_depend_on_parts():
    seeds, outcomes = evaluation_seeds(23), []
    for pool in (Jittery(7), split([3, 2, 2], break_once=evaluation_seeds(5))):
        outcomes.append(evaluate(Actor(), pool, seeds))
    whole, parts = outcomes
    assert whole.results == parts.results and whole.returns == parts.returns and whole.lengths == parts.lengths
    assert (whole.invalid, parts.invalid) == (0, 5) and whole.tasks == parts.tasks


class Gated(gymnasium.Env):
    """Two steps, each over when the gate is open; as many of them as `fails` is long fail."""

    observation_space, action_space = spaces.Box(0, 9, (1,), np.float32), spaces.Discrete(2)

    def __init__(self, began, gate, fails=()):
        self.began, self.gate, self.fails = began, gate, fails

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        self.began.set()
        assert self.gate.wait(PATIENCE), "nobody answered the other part meanwhile"
        if self.fails:
            self.fails.pop()
            raise Infrastructure("crashed", "the tab is gone")
        return np.full(1, self.t, np.float32), 1.0, self.t == 2, False, {"is_success": True}


def gated(fails):
    """Two parts of one environment; the first step of the first one ends when the policy is asked for the other one."""
    began, answered, free = threading.Event(), threading.Event(), threading.Event()
    free.set()
    made = [lambda: Gated(began, answered, fails), lambda: Gated(threading.Event(), free)]
    calls = itertools.count()

    def act(observation):
        if next(calls) == 1:
            assert began.wait(PATIENCE)
            answered.set()
        count = len(observation["observation"])
        return Decisions(np.zeros(count, np.int64), np.zeros((count, 1), np.float32))

    pools = [VectorPool(Singles(make, 1)) for make in made]
    for pool in pools:
        pool.host.seeding = Seeding()  # else it is tried, in steps that would wait for ever
    return act, pools


def test_the_policy_answers_one_part_while_the_other_steps():
    act, pools = gated(fails=[])
    pool = Splits(pools)
    recording = Collector(pool, run_seed=0).collect(act, episodes=4)
    assert recording.lengths == [2] * 4 and recording.invalid == 0
    pool.close()


def test_what_fails_in_one_part_costs_one_episode_and_nothing_of_the_other():
    act, pools = gated(fails=[1])
    pool = Splits(pools)
    recording = Collector(pool, run_seed=0).collect(act, episodes=4)
    assert recording.lengths == [2] * 4 and recording.invalid == 1 and recording.successes == [True] * 4
    assert pool.incidents.news()[0] == {"infrastructure/crashed": 1} and pool.incidents.news() == ({}, [])
    rows = [each for each in recording.rows if isinstance(each, Taken)]
    assert sorted(env for each in rows for env in each.streams.tolist()) == [0] * 4 + [1] * 4
    pool.close()


class Hopeless(Corridor):
    """Never works."""

    def step(self, action):
        raise Infrastructure("crashed", "the tab is gone")


def test_too_many_failures_in_one_part_stop_the_run():
    pool = Splits([VectorPool(Singles(make, 1)) for make in (Corridor, Hopeless)])

    def act(observation):
        return Decisions(np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32))

    with pytest.raises(EnvironmentFailure, match="none has ended well"):
        Collector(pool, run_seed=0).collect(act, episodes=400)
    pool.close()


def test_all_of_it_together_is_a_pool_like_any_other():
    corridors = [VectorPool(Singles(lambda: Corridor(length=3, spread=2), count)) for count in (2, 1, 2)]
    whole, parts = VectorPool(Singles(lambda: Corridor(length=3, spread=2), 5)), Splits(corridors)
    seeds, said = np.arange(5), []
    for pool in (whole, parts):
        seen = [pool.reset(seeds), pool.step(np.zeros((5, 1), np.float32))]
        pool.reset(seeds + 9, np.array([True, False, False, True, False]))
        seen += [pool.observation, *(pool.step(np.zeros((5, 1), np.float32)) for _ in range(2))]
        said.append([vars_of(each) for each in seen])
        assert pool.seeding.held_out and pool.ask("length") == 3 and pool.num_envs == 5
    assert same(*said)
    branch = parts.save(4)
    parts.restore(2, branch)
    assert same({k: v[2] for k, v in parts.observation.items()}, {k: v[4] for k, v in parts.observation.items()})
    policy = Policy()
    policy.chunk = Chunk(2, 2)
    chunks = policy.fit_pool(parts)
    assert all(isinstance(pool, ChunkPool) for pool in chunks.pools) and chunks.action_space.shape == (2,)
    assert chunks.incidents is parts.incidents and chunks.threads is parts.threads
    parts.close()


class Telling(Corridor):
    """Tells something of its episodes."""

    def step(self, action):
        shown, reward, terminated, truncated, info = super().step(action)
        return shown, reward, terminated, truncated, {**info, "laps/done": 3.0}


def test_what_one_part_tells_of_its_episodes_is_said_of_no_other():
    pool = Splits([VectorPool(Singles(lambda make=make: make(length=1), 2)) for make in (Corridor, Telling)])
    pool.reset(np.arange(4))
    result = pool.step(np.zeros((4, 1), np.float32))
    assert result.statistics(np.arange(2)) == {"laps/done": []}
    assert result.statistics(np.arange(4)) == {"laps/done": [3.0, 3.0]}
    recording = Collector(pool, run_seed=0).collect(
        lambda seen: Decisions(np.zeros((2, 1), np.float32), np.zeros((2, 1), np.float32)), episodes=8
    )
    assert recording.statistics == {"laps/done": [3.0] * 4}
    pool.close()


def vars_of(result):
    """A step result as a tree; a tree is one."""
    names = ("observation", "reward", "terminated", "truncated", "info", "valid")
    return result if isinstance(result, dict) else {name: getattr(result, name) for name in names}
