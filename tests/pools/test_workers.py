"""Worker processes: the same trajectories as in process, supervision, clean ends."""

import functools
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import psutil
import pytest
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv

import embodied_rft.envs  # noqa: F401
from embodied_rft.pools.batches import Batch
from embodied_rft.pools.incidents import EnvironmentFailure
from embodied_rft.pools.making import find_spec
from embodied_rft.pools.pool import VectorPool, make_host, make_pool
from embodied_rft.pools.worker_process import SharedArrays
from embodied_rft.pools.workers import Workers
from tests.lab import ROOT
from tests.lab.helpers_envs import TROUBLE_SEED, TROUBLE_STEP

FETCH = "embodied_rft/FetchPickAndPlace-v0"


def worker_pool(num_envs=4, *, num_workers=2, deadline=30.0, max_restarts=3, **options):
    make_slice = functools.partial(make_host, find_spec("tests.lab.helpers_envs:Moody-v0"), options=options)
    settings = {"num_workers": num_workers, "deadline": deadline, "max_restarts": max_restarts}
    return VectorPool(Workers(make_slice, num_envs, **settings))


def moves(steps, num_envs, dim):
    return np.random.default_rng(7).uniform(-1, 1, size=(steps, num_envs, dim)).astype(np.float32)


def run(pool, steps, *, first_seed=0):
    """Random actions; whatever ends starts again with the next seed. Returns all that the pool said."""
    seeds = np.arange(pool.num_envs) + first_seed
    said = [pool.reset(seeds)]
    for action in moves(steps, pool.num_envs, pool.action_space.shape[0]):
        result = pool.step(action)
        said.append({**result.observation, "reward": result.reward, "success": result.info["success"]})
        said.append({"terminated": result.terminated, "truncated": result.truncated, "valid": result.valid})
        ended = result.terminated | result.truncated
        if ended.any():
            seeds = seeds + pool.num_envs
            said.append(pool.reset(seeds, ended))
    return said


def distance(ours, theirs):
    """Largest difference between two runs; inf where they do not even have the same form."""
    assert [list(a) for a in ours] == [list(b) for b in theirs]
    pairs = [(a[key], b[key]) for a, b in zip(ours, theirs) for key in a]
    assert all(a.dtype == b.dtype and a.shape == b.shape for a, b in pairs)
    return max(float(np.abs(a.astype(float) - b.astype(float)).max()) for a, b in pairs)


class Sketch(VectorEnv):
    """Shows whether it was told that nobody looks."""

    metadata: ClassVar = {"autoreset_mode": AutoresetMode.DISABLED}
    skip_images = False

    def __init__(self, num_envs):
        self.num_envs = num_envs
        self.single_observation_space = self.single_action_space = Box(0, 1, (1,))

    def reset(self, *, seed=None, options=None):
        return np.full((self.num_envs, 1), self.skip_images, np.float32), {}

    def step(self, action):
        ends = np.zeros(self.num_envs, bool)
        return self.reset()[0], np.zeros(self.num_envs), ends, ends, {}


def test_workers_hear_that_nobody_looks_at_images():
    pool = VectorPool(Workers(lambda n, **settings: Batch(Sketch(n), **settings), 2, num_workers=1))
    try:
        pool.reset(np.arange(2))
        for skip in (True, False):
            pool.skip_images(skip)
            assert pool.step(np.zeros((2, 1), np.float32)).observation["observation"][:, 0].tolist() == [skip] * 2
    finally:
        pool.close()


def test_workers_and_in_process_agree_bit_for_bit():
    pool, reference = worker_pool(5, num_workers=2), make_pool("Moody-v0", 5, kind="sync")
    try:
        expected = run(reference, 20)
        assert distance(run(pool, 20), expected) == 0
        assert distance(run(pool, 20, first_seed=1), expected) > 0  # the comparison can fail
    finally:
        pool.close()


def test_fetch_is_the_same_in_every_pool():
    """Bit-equal with per-environment state; the batched rollout engine loses the solver warm start (1e-6)."""
    runs = {}
    for name, kind, options in (
        ("sync", "sync", {}),
        ("native", "native", {"engine": "exact"}),
        ("rollout", "native", {"engine": "rollout"}),
        ("workers", "workers", {"engine": "exact"}),
        ("rollout workers", "workers", {"engine": "rollout"}),
    ):
        pool = make_pool(FETCH, 3, kind=kind, options=options, num_workers=2 if kind == "workers" else None)
        runs[name] = run(pool, 55)
        pool.close()
    assert distance(runs["sync"], runs["native"]) == 0
    assert distance(runs["sync"], runs["workers"]) == 0
    assert distance(runs["rollout"], runs["rollout workers"]) == 0
    assert distance(runs["sync"], runs["rollout"]) <= 1e-6


@pytest.mark.parametrize(
    ("trouble", "kind", "text"),
    [
        ("hang", "hang", "no answer within 2 s to step"),
        ("crash", "crash", "exited with code 5"),
        ("raise", "error", "the simulated motor burnt out"),
    ],
)
def test_a_failure_is_met_and_its_step_is_invalid(trouble, kind, text):
    """A dead process costs its slice; an exception costs the one environment that raised it."""
    pool = worker_pool(deadline=2.0, trouble=trouble)
    try:
        pool.reset(np.array([1, TROUBLE_SEED, 3, 4]))
        for step in range(1, TROUBLE_STEP + 1):
            result = pool.step(np.zeros((4, 2)))
            broken = step == TROUBLE_STEP
            assert result.valid.tolist() == [not broken or kind == "error", not broken, True, True]
        assert result.truncated.tolist() == [kind != "error", True, False, False]
        assert result.reward[1] == 0
        assert pool.incidents.counts == {kind: 1}
        said = pool.incidents.latest[0]
        assert f"environment 1 (seed {TROUBLE_SEED}" in said and text in said
        observation = pool.reset(np.array([5, 6, 0, 0]), np.array([True, True, False, False]))
        fresh = make_pool("Moody-v0", 2, kind="sync").reset(np.array([5, 6]))
        assert np.array_equal(observation["state"][:2], fresh["state"])
        assert pool.step(np.zeros((4, 2))).valid.all()
    finally:
        pool.close()


def test_one_of_two_environments_of_a_replaced_worker_may_stay_idle():
    pool = worker_pool(trouble="crash")
    try:
        pool.reset(np.array([1, TROUBLE_SEED, 3, 4]))
        for _ in range(TROUBLE_STEP):
            pool.step(np.zeros((4, 2)))
        pool.reset(np.array([5, 0, 0, 0]), np.array([True, False, False, False]))
        assert pool.step(np.zeros((4, 2))).valid.tolist() == [True, False, True, True]
    finally:
        pool.close()


def test_not_finite_numbers_are_reported_through_the_pipe():
    pool = worker_pool(trouble="nan")
    try:
        pool.reset(np.array([1, 2, 3, TROUBLE_SEED]))
        for _ in range(TROUBLE_STEP):
            result = pool.step(np.zeros((4, 2)))
        assert result.valid.tolist() == [True, True, True, False]
        assert pool.incidents.counts == {"non_finite": 1}
        assert f"environment 3 (seed {TROUBLE_SEED})" in pool.incidents.latest[0]
    finally:
        pool.close()


def test_a_worker_that_dies_at_a_reset_costs_its_episodes():
    pool = worker_pool(trouble="crash_reset")
    try:
        pool.reset(np.array([1, 2, 3, 4]))
        pool.step(np.zeros((4, 2)))
        pool.reset(np.array([TROUBLE_SEED, 0, 0, 0]), np.array([True, False, False, False]))
        assert pool.step(np.zeros((4, 2))).valid.tolist() == [False, False, True, True]
        assert "exited with code 3" in pool.incidents.latest[0]
        pool.reset(np.array([5, 6, 0, 0]), np.array([True, True, False, False]))
        assert pool.step(np.zeros((4, 2))).valid.all()
    finally:
        pool.close()


def test_processes_that_always_die_end_the_run_with_the_reason():
    pool = worker_pool(2, num_workers=1, trouble="crash_reset")
    try:
        with pytest.raises(EnvironmentFailure, match=r"(?s)20 of the latest 20 episodes .* exited with code 3"):
            for _ in range(11):
                pool.reset(np.array([TROUBLE_SEED, TROUBLE_SEED]))
                assert not pool.step(np.zeros((2, 2))).valid.any()
    finally:
        pool.close()


def test_a_state_is_continued_on_another_number_of_cores():
    first, second = worker_pool(4, num_workers=2), worker_pool(4, num_workers=1)
    try:
        first.reset(np.arange(4))
        actions = moves(6, 4, 2)
        for t in range(3):
            first.step(actions[t])
        second.set_state(first.get_state())
        assert second.host.num_workers == 2
        for t in range(3, 6):
            ours, theirs = second.step(actions[t]), first.step(actions[t])
            assert np.array_equal(ours.observation["state"], theirs.observation["state"]) and ours.valid.all()
    finally:
        first.close()
        second.close()


def test_the_original_error_of_a_construction_comes_at_once():
    with pytest.raises(ValueError, match="gripper of this robot is not plugged in") as caught:
        worker_pool(trouble="construct")
    assert any("worker process" in note for note in caught.value.__notes__)
    with pytest.raises(ValueError, match="refused its options"):
        worker_pool(colour="red")


def test_text_travels_through_the_pipe():
    pool, reference = make_pool("Chatter-v0", 3, kind="workers", num_workers=2), make_pool("Chatter-v0", 3)
    try:
        assert pool.reset(np.arange(3)) == reference.reset(np.arange(3))
        said = ["grüße", "bye", "x" * 40]
        ours, theirs = pool.step(said), reference.step(said)
        assert ours.observation == theirs.observation
        assert ours.terminated.tolist() == [False, True, False]
        assert ours.info["success"].tolist() == theirs.info["success"].tolist() == [False, True, False]
    finally:
        pool.close()


def test_state_round_trip_over_new_processes():
    first = worker_pool()
    second = worker_pool()
    try:
        first.reset(np.arange(4))
        actions = moves(10, 4, 2)
        for t in range(4):
            first.step(actions[t])
        state = first.get_state()
        second.set_state(state)
        for t in range(4, 8):
            ours, theirs = second.step(actions[t]), first.step(actions[t])
            assert np.array_equal(ours.observation["state"], theirs.observation["state"])
            assert np.array_equal(ours.reward, theirs.reward) and ours.valid.all()
        with pytest.raises(ValueError, match="num_envs"):
            second.set_state({**state, "pool/idle": np.zeros(3, bool)})
    finally:
        first.close()
        second.close()


def shared_blocks():
    return {p.name for p in Path("/dev/shm").glob("psm_*")}


def test_close_leaves_no_process_and_no_shared_memory():
    before = shared_blocks()
    pool = worker_pool()
    pool.reset(np.arange(4))
    processes = [psutil.Process(worker.process.pid) for worker in pool.host._workers]
    assert shared_blocks() - before
    pool.close()
    pool.close()
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)
    assert not shared_blocks() - before


def test_nothing_is_left_when_the_parent_is_killed():
    script = textwrap.dedent(
        f"""
        import functools, sys, time
        import numpy as np
        from embodied_rft.pools.pool import make_pool
        if __name__ == "__main__":
            options = {{"trouble": "hang"}}
            name = "tests.lab.helpers_envs:Moody-v0"
            pool = make_pool(name, 2, kind="workers", num_workers=2, deadline=300.0, options=options)
            print(*[w.process.pid for w in pool.host._workers], pool.host._shared[0].memory.name, flush=True)
            pool.reset(np.array([{TROUBLE_SEED}, 1]))
            for _ in range({TROUBLE_STEP}):
                pool.step(np.zeros((2, 2)))
        """
    )
    root = ROOT
    child = subprocess.Popen([sys.executable, "-c", script], cwd=root, stdout=subprocess.PIPE, text=True)
    *pids, block = child.stdout.readline().split()
    assert all(psutil.pid_exists(int(pid)) for pid in pids)
    time.sleep(0.5)  # into the step that hangs
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    end = time.monotonic() + 20
    while time.monotonic() < end and (any(psutil.pid_exists(int(p)) for p in pids) or Path("/dev/shm", block).exists()):
        time.sleep(0.05)
    assert not any(psutil.pid_exists(int(pid)) for pid in pids)
    assert not Path("/dev/shm", block).exists()


def test_stopped_workers_do_not_outlive_a_parent_that_was_killed():
    script = textwrap.dedent(
        """
        from embodied_rft.pools.pool import make_pool
        if __name__ == "__main__":
            pool = make_pool("tests.lab.helpers_envs:Moody-v0", 2, kind="workers", num_workers=2)
            print(*[w.process.pid for w in pool.host._workers], flush=True)
            input()
        """
    )
    root = ROOT
    child = subprocess.Popen(
        [sys.executable, "-c", script], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    pids = [int(pid) for pid in child.stdout.readline().split()]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    child.stdin.close()
    end = time.monotonic() + 60
    while time.monotonic() < end and any(psutil.pid_exists(pid) for pid in pids):
        time.sleep(0.05)
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_too_little_shared_memory_is_a_sentence():
    """Pictures beyond all that /dev/shm can hold."""
    before, room = shared_blocks(), os.statvfs("/dev/shm")
    too_much = room.f_blocks * room.f_frsize + 2**20
    with pytest.raises(ValueError, match=r"worker processes need .* MiB of shared memory, and /dev/shm has"):
        SharedArrays({"pixels": ((too_much,), "|u1", 0)})
    assert shared_blocks() <= before
