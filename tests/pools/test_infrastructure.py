"""The third outcome: servers that die, sockets that close, answers that never come. Void, counted, played again."""

import pickle
import socket
import subprocess
import sys
import threading

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from embodied_rft.data import Decisions
from embodied_rft.envs.serving import EnvBatch, Outcome, serve
from embodied_rft.evaluation.evaluate import evaluate, evaluation_seeds
from embodied_rft.experience.collect import Collector
from embodied_rft.pools.incidents import EnvironmentFailure, Infrastructure, kind_of
from embodied_rft.pools.pool import make_pool

LENGTH = 4  # decisions of an episode
SERVER = "import sys\nfor line in sys.stdin:\n  n = int(line)\n  if n == {dies}: sys.exit()\n  print(n + 1, flush=True)"
TROUBLED = {}  # {place: seeds}: what has failed once works the next time


def troubled(place, seed):
    """One episode in five, the first time that it is played."""
    tried = TROUBLED.setdefault(place, set())
    again, _ = seed in tried, tried.add(seed)
    return seed % 5 == 0 and not again


class Served(gymnasium.Env):
    """Counts to LENGTH on a server of its own: a process, or a socket that closes or falls silent."""

    def __init__(self, *, by: str, place: str = "here") -> None:
        self.by, self.place, self.server = by, place, None
        self.observation_space, self.action_space = spaces.Box(0, 9, (1,), np.float32), spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.close()
        self.count, self.succeeds = 0, seed % 2 == 0
        dies = 2 if troubled(self.place, seed) else -1
        if self.by == "process":
            command = [sys.executable, "-S", "-c", SERVER.format(dies=dies)]
            self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        elif self.by != "itself":
            self.socket, theirs = socket.socketpair()
            self.socket.settimeout(0.05)
            threading.Thread(target=self.answer, args=(theirs, dies), daemon=True).start()
        self.dies = dies
        return np.zeros(1, np.float32), {}

    def answer(self, theirs, dies):
        while data := theirs.recv(1):
            if data[0] == dies:
                if self.by == "silent":
                    continue
                break
            theirs.send(bytes([data[0] + 1]))
        theirs.close()

    def ask(self):
        if self.by == "itself":
            if self.count == self.dies:
                raise Infrastructure("crashed", "the tab is gone")
            return self.count + 1
        if self.by == "process":
            self.server.stdin.write(f"{self.count}\n")
            self.server.stdin.flush()
            if not (line := self.server.stdout.readline()):
                raise EOFError("the server has ended")
            return int(line)
        self.socket.send(bytes([self.count]))
        if not (data := self.socket.recv(1)):
            raise ConnectionResetError("closed by the server")
        return data[0]

    def step(self, action):
        self.count = self.ask()
        over = self.count == LENGTH
        return np.full(1, self.count, np.float32), 1.0, over, False, {"is_success": over and self.succeeds}

    def close(self):
        if self.server is not None:
            self.server.kill()
            self.server.communicate()
            self.server = None
        if getattr(self, "socket", None) is not None:
            self.socket.close()


class ServedBatch(EnvBatch):
    """The same as a batch, of which single rows break; in their start, too, if `early`."""

    arrays = ("count", "succeeds", "dies")

    def __init__(self, *, num_envs: int, place: str = "here", early: bool = False) -> None:
        super().__init__(num_envs=num_envs)
        self.place, self.early, self.steps = place, early, []
        self.count, self.succeeds, self.dies = np.zeros((3, num_envs), np.int64)
        self.observation_space, self.action_space = spaces.Box(0, 9, (1,), np.float32), spaces.Discrete(2)

    def start(self, rows, seeds, options):
        for row, seed in zip(rows.tolist(), seeds):
            seed = 1 if seed is None else seed
            bad = troubled(self.place, seed)
            self.count[row], self.succeeds[row], self.dies[row] = 0, seed % 2 == 0, 2 if bad else -1
            if bad and self.early:
                self.fail(row, TimeoutError("no tab within 30 s"))

    def step(self, rows, actions):
        self.steps += rows.tolist()
        for row in rows[self.count[rows] == self.dies[rows]].tolist():
            self.fail(row, Infrastructure("dead_server", "no answer on port 8000"))
        self.count[rows] += 1
        over = self.count[rows] == LENGTH
        return Outcome(np.ones(len(rows)), over, over & self.succeeds[rows].astype(bool))

    def observe(self, rows):
        return self.count[:, None].astype(np.float32)


gymnasium.register("served/Single-v0", Served)
serve("served/Batch-v0", ServedBatch)
CASES = [
    ("served/Single-v0", {"by": "process"}, "sync", "dead_server"),
    ("served/Single-v0", {"by": "socket"}, "sync", "dead_server"),
    ("served/Single-v0", {"by": "silent"}, "sync", "timeout"),
    ("served/Single-v0", {"by": "itself"}, "sync", "crashed"),
    ("tests.pools.test_infrastructure:served/Single-v0", {"by": "itself"}, "workers", "crashed"),
    ("served/Batch-v0", {}, "native", "dead_server"),
    ("served/Batch-v0", {}, "sync", "dead_server"),
    ("served/Batch-v0", {"early": True}, "native", "timeout"),
    ("served/Batch-v0", {"early": True}, "sync", "timeout"),
]


def act(observation):
    count = len(observation["observation"])
    return Decisions(np.zeros(count, np.int64), np.zeros((count, 1), np.float32))


@pytest.fixture(autouse=True)
def fresh():
    TROUBLED.clear()


@pytest.mark.parametrize(("id", "options", "kind", "reason"), CASES, ids=lambda case: str(case))
def test_a_fifth_of_broken_episodes_changes_no_verdict(id, options, kind, reason):
    """The same denominator, the same successes, as if nothing had happened; and how often it happened."""
    seeds = evaluation_seeds(30)
    pool = make_pool(
        id, 3, kind=kind, num_workers=2 if kind == "workers" else None, options=options, purpose="evaluation"
    )
    try:
        outcome = evaluate(act, pool, seeds)
        assert outcome.episodes == 30 and outcome.seeds == seeds and outcome.left_out == []
        assert outcome.results == [seed % 2 == 0 for seed in seeds] and set(outcome.lengths) == {LENGTH}
        broken = sum(seed % 5 == 0 for seed in seeds)
        assert outcome.invalid == broken == 6 and outcome.incidents == {f"infrastructure/{reason}": broken}
        assert f"6 episodes were void and played again (6 infrastructure/{reason})" in str(outcome)
        assert evaluate(act, pool, seeds).invalid == 0  # nothing is broken any more: nothing is said of it
    finally:
        pool.close()


@pytest.mark.parametrize("options", [{}, {"early": True}], ids=str)
def test_void_episodes_are_refilled_and_leave_no_row(options):
    pool = make_pool("served/Batch-v0", 4, kind="native", options=options)
    recording = Collector(pool, run_seed=0).collect(act, episodes=40)
    assert len(recording.successes) == len(recording.returns) == 40 and set(recording.returns) == {LENGTH}
    assert recording.invalid == pool.incidents.counts.total() > 2
    metrics = recording.metrics()
    assert metrics["collect/invalid_episodes"] == recording.invalid
    assert metrics["collect/success"] == np.mean(recording.successes)


def test_the_rows_that_are_not_broken_go_on():
    pool = make_pool("served/Batch-v0", 3, kind="native")
    pool.reset(np.array([1, 5, 2]))
    results = [pool.step(np.zeros(3, np.int64)) for _ in range(4)]
    assert [result.valid.tolist() for result in results] == [[True] * 3] * 2 + [[True, False, True]] * 2
    assert results[2].truncated.tolist() == [False, True, False] and results[3].terminated.tolist() == [
        True,
        False,
        True,
    ]
    assert "environment 1: Infrastructure: no answer on port 8000" in pool.incidents.latest[0]


def test_single_environments_and_loops_of_gymnasium_hear_of_it():
    with pytest.raises(Infrastructure, match="no tab within 30 s") as raised:
        gymnasium.make("served/Batch-v0", early=True).reset(seed=5)
    assert raised.value.reason == "timeout"
    env = gymnasium.make_vec("served/Batch-v0", num_envs=2, place="there")
    env.reset(seed=[5, 1])
    for _ in range(3):
        _, _, terminated, truncated, info = env.step(np.zeros(2, np.int64))
    assert truncated.tolist() == [True, False] and info["_broken"].tolist() == [True, False] and not terminated.any()
    assert env.step(np.zeros(2, np.int64))[0][:, 0].tolist() == [0, 4]  # and starts again


def test_too_much_of_it_stops_the_run(monkeypatch):
    monkeypatch.setattr("tests.pools.test_infrastructure.troubled", lambda place, seed: True)
    pool = make_pool("served/Batch-v0", 4, kind="native")
    with pytest.raises(EnvironmentFailure, match="infrastructure/dead_server"):
        Collector(pool, run_seed=0).collect(act, episodes=200)


def test_kinds_of_errors():
    assert kind_of(TimeoutError()) == kind_of(subprocess.TimeoutExpired("x", 1)) == "infrastructure/timeout"
    assert kind_of(BrokenPipeError()) == kind_of(EOFError()) == "infrastructure/dead_server"
    assert kind_of(ValueError()) == kind_of(OSError()) == "error"
    again = pickle.loads(pickle.dumps(Infrastructure("crashed", "the tab is gone")))
    assert (again.reason, str(again)) == ("crashed", "the tab is gone") and str(Infrastructure("crashed")) == "crashed"
    with pytest.raises(ValueError, match="expected a word like dead_server"):
        Infrastructure("Dead server!")
