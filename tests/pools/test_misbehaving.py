"""Environments that misbehave, through every pool and through a run: named, counted, thrown away; too many stop it."""

import json
import signal
import subprocess
import sys
import time

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from embodied_rft.options import parse
from embodied_rft.pools.incidents import NEVER, EnvironmentFailure, Incidents
from embodied_rft.pools.pool import VectorPool, make_pool
from embodied_rft.pools.watch import Alarm, Hang
from embodied_rft.runs.recipe import Recipe
from embodied_rft.train import train
from tests.lab import ROOT
from tests.lab.helpers_zoo import FIRST, HEALTHY, SAID, TROUBLES

IN_RESET = ("exit_reset", "reset_alone")
KINDS = [("sync", None), ("workers", 2)]


@pytest.mark.parametrize(("kind", "num_workers"), KINDS)
def test_every_trouble_costs_one_episode_and_is_named(kind, num_workers):
    """All troubles at once, one in each environment, and healthy ones between: only the troubled ones are hurt."""
    troubles = [t for t in TROUBLES if kind == "sync" or t != "hang"]  # a hang in a worker: tests/pools/test_workers.py
    num_envs = len(troubles) + 2
    seeds = np.array([HEALTHY, *(FIRST + TROUBLES.index(t) for t in troubles), HEALTHY + 1])
    calm = np.array([True, *(False for _ in troubles), True])
    pool = make_pool("tests.lab.helpers_zoo:Zoo-v0", num_envs, kind=kind, num_workers=num_workers, deadline=5.0)
    try:
        pool.reset(seeds)
        action = np.full((num_envs, 1), 0.5, np.float32)
        first, second = pool.step(action), pool.step(action)
        assert (action == 0.5).all()  # nobody's writing reaches whoever keeps the action
        early = np.array([False, *(t in IN_RESET for t in troubles), False])
        assert np.array_equal(first.valid, ~early)
        assert np.array_equal(second.valid, calm)
        for result in (first, second):
            assert np.isfinite(result.observation["observation"]).all() and np.isfinite(result.reward).all()
            assert (result.truncated | result.valid).all() and not (result.terminated & ~result.valid).any()
        texts = {t: [x for x in pool.incidents.latest if f"seed {FIRST + TROUBLES.index(t)}" in x] for t in troubles}
        for index, trouble in enumerate(troubles):
            assert len(texts[trouble]) == 1, (trouble, texts[trouble])
            assert f"environment {index + 1} (seed" in texts[trouble][0]
            assert SAID.get(trouble, "") in texts[trouble][0]
        assert pool.incidents.counts.total() == len(troubles)
        again = pool.reset(np.arange(num_envs), ~calm)["observation"]
        alone = make_pool("Zoo-v0", num_envs, kind="sync").reset(np.arange(num_envs))["observation"]
        assert np.array_equal(again[~calm], alone[~calm])
        for _ in range(4):
            last = pool.step(action)
        assert last.valid.all() and last.info["success"][calm].all() and last.truncated[calm].all()
    finally:
        pool.close()


def test_an_alarm_of_somebody_else_does_not_switch_ours_off_and_rings_later():
    heard = []
    left, theirs = signal.getitimer(signal.ITIMER_REAL), signal.signal(signal.SIGALRM, lambda *_: heard.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        alarm = Alarm()
        with alarm:
            alarm.begin(0, 0.05)
            with pytest.raises(Hang, match="no answer within 0.05 s"):
                time.sleep(60)
        while not heard:  # a time limit of the whole test ends this, if nothing else does
            time.sleep(0.01)
        assert heard == [1]
    finally:
        signal.signal(signal.SIGALRM, theirs)
        signal.setitimer(signal.ITIMER_REAL, *left)


def recipe(pool="sync", *, stages=None, env=None, **options):
    env = {"id": "tests.lab.helpers_zoo:Zoo-v0", "num_envs": 6, "pool": pool, "options": options, **(env or {})}
    learn = {"finetune": {"objective": {"id": "ppo"}, "decisions": 600, "decisions_per_iteration": 200}}
    tree = {"env": env, "agent": {"id": "gaussian", "hidden": [8]}, "stages": stages or [learn]}
    return parse(Recipe, {**tree, "buffer": {"capacity": 2000}, "logging": {"console": False, "csv": False}})


@pytest.mark.parametrize("pool", ["sync", "workers"])
def test_a_run_goes_on_over_troubled_episodes_and_says_so(pool, tmp_path):
    session = train(recipe(pool, share=0.3), tmp_path, quiet=True, report=False)
    assert session.counters["decisions"] >= 600
    for each in session.buffer.trajectories():
        assert np.isfinite(each.reward).all() and np.isfinite(each.observation["observation"]).all()
        assert (each.reward == 1).all() and len(each) <= 6
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    counted = sum(value for line in lines for key, value in line.items() if key.startswith("incidents/"))
    kept = json.loads((tmp_path / "incidents.json").read_text())
    assert counted == sum(kept["counts"].values()) > 5
    assert "environment" in kept["latest"][-1]
    assert "incidents in environments so far (error " in (tmp_path / "run.log").read_text()


@pytest.mark.parametrize("trouble", ["reward_nan", "reward_none", "exit", "exit_reset", "four_values", "success_word"])
def test_a_run_in_which_every_episode_fails_stops_with_the_reason(trouble, tmp_path):
    with pytest.raises(EnvironmentFailure) as caught:
        train(recipe(always=trouble), tmp_path, quiet=True, report=False)
    assert SAID[trouble] in str(caught.value) and "none has ended well" in str(caught.value)
    assert SAID[trouble] in (tmp_path / "run.log").read_text()


def test_exit_codes_never_say_that_nothing_was_work(tmp_path):
    """`sys.exit(0)` in an environment, in its constructor, and in a plug-in."""
    (tmp_path / "quits.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "recipe.yaml").write_text(
        "plugins: [tests.lab.helpers_zoo]\nenv: {id: Zoo-v0, num_envs: 2, options: {always: exit}}\n"
        "agent: {id: gaussian, hidden: [8]}\nstages: [{collect: {episodes: 4}}]\n"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    for extra, text in (([], "SystemExit: 0"), (["plugins=[quits]"], "calls sys.exit(0)")):
        command = [sys.executable, "-m", "embodied_rft.cli", "train", "recipe.yaml", "--run", "run", *extra]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode == 2 and text in done.stderr and "Traceback" not in done.stderr


def test_the_share_that_may_fail_is_the_recipes(tmp_path):
    with pytest.raises(EnvironmentFailure, match=r"max_incidents allows 0.02"):
        train(recipe(share=0.3, env={"max_incidents": 0.02}), tmp_path, quiet=True, report=False)


def test_when_it_is_too_much():
    never = Incidents()
    for _ in range(NEVER - 1):
        never.judge(ended=0, failed=1)
    with pytest.raises(EnvironmentFailure, match="none has ended well"):
        never.judge(ended=0, failed=1)
    many = Incidents(num_envs=64)  # of episodes that cannot have ended yet
    many.judge(ended=0, failed=230)
    with pytest.raises(EnvironmentFailure, match="231 of the latest 231"):
        many.judge(ended=0, failed=1)
    often = Incidents(0.5)
    often.judge(ended=60, failed=0)
    often.judge(ended=0, failed=50)  # of the latest 100, half
    with pytest.raises(EnvironmentFailure, match=r"51 of the latest 100 .* allows 0.5"):
        often.judge(ended=0, failed=1)
    patient = Incidents(1.0)
    patient.judge(ended=0, failed=10_000)


def test_news_are_told_once():
    incidents = Incidents()
    for number in range(40):
        incidents.add("error", str(number))
    counts, texts = incidents.news()
    assert counts == {"error": 40} and texts[-1] == "error: 39" and len(texts) == 32
    assert incidents.news() == ({}, [])
    incidents.add("hang", "again")
    assert incidents.news() == ({"hang": 1}, ["hang: again"])


class Stack(gymnasium.vector.VectorEnv):
    """A vector form that raises in its second step, or says something odd about success, when told so by a seed."""

    broken_seed, odd_seed = 77, 78

    def __init__(self, *, num_envs=2, autoreset_mode=None):
        self.num_envs = num_envs
        self.single_observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.single_action_space = spaces.Box(-1, 1, (1,), np.float32)
        self.metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode(autoreset_mode or "NextStep")}
        self.seeds = np.zeros(num_envs, np.int64)
        self.steps = np.zeros(num_envs, np.int64)

    def reset(self, *, seed=None, options=None):
        mask = options["reset_mask"]
        self.seeds, self.steps = np.where(mask, seed, self.seeds), np.where(mask, 0, self.steps)
        return self._observe(), {}

    def _observe(self):
        return (self.seeds % 1000 + self.steps).astype(np.float32)[:, None]

    def step(self, actions):
        self.steps += 1
        if ((self.seeds == self.broken_seed) & (self.steps == 2)).any():
            raise FloatingPointError("the batch diverged")
        success = np.array([("perhaps" if s == self.odd_seed else True) for s in self.seeds], dtype=object)
        zeros = np.zeros(self.num_envs)
        return self._observe(), zeros, zeros > 0, self.steps >= 4, {"success": success}


if "Stack-v0" not in gymnasium.registry:
    gymnasium.register("Stack-v0", vector_entry_point=Stack)


def test_what_a_batch_raises_costs_its_episodes_and_it_is_made_again():
    pool = make_pool("Stack-v0", 2, kind="native")
    assert isinstance(pool, VectorPool)
    action = np.zeros((2, 1), np.float32)
    pool.reset(np.array([1, Stack.broken_seed]))
    assert pool.step(action).valid.all()
    assert not pool.step(action).valid.any()
    assert pool.incidents.counts == {"error": 1} and "the batch diverged" in pool.incidents.latest[0]
    assert pool.reset(np.array([3, 4]))["observation"][:, 0].tolist() == [3, 4]
    for _ in range(4):
        last = pool.step(action)
    assert last.valid.all() and last.truncated.all() and last.info["success"].all()
    pool.reset(np.array([5, Stack.odd_seed]))
    assert pool.step(action).valid.tolist() == [True, False]
    assert "info['success']" not in pool.incidents.latest[0] and "is 'perhaps'" in pool.incidents.latest[-1]
