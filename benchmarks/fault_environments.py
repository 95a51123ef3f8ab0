"""Rows of `faults` about environments that misbehave: what a run keeps, what it counts, what it costs."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.fault_tools import Lab, Outcome, Walk, poisoned, recipe, row, said
from embodied_rft.data import Decisions
from embodied_rft.experience.collect import Collector
from embodied_rft.pools.pool import make_pool


def _troubled(lab: Lab, pool: str, trouble: str, share: float, **env: Any) -> tuple[bool, str]:
    """A run in an environment that misbehaves: whether it ended well and learned from numbers only, and the counts."""
    workers = {"num_workers": 2} if pool == "workers" else {}
    tree = recipe(env={"pool": pool, "options": {"share": share, "trouble": trouble}, **workers, **env})
    code, _ = lab.train(tree, run=pool)
    bad = poisoned(lab.folder / pool) if code == 0 else -1
    counts = json.loads(lab.read("incidents.json", pool) or '{"counts": {}}')["counts"]
    told = "incidents in environments" in lab.read("run.log", pool)
    text = ", ".join(f"{number} {kind}" for kind, number in counts.items())
    return code == 0 and bad == 0 and bool(counts) and told, f"{text}: {bad} poisoned rows, exit code {code}"


@row("infinity in 1 % of steps; sys.exit(0) in all of them")
def trouble_in_process(lab: Lab) -> Outcome:
    held, text = _troubled(lab, "sync", "infinity", 0.01)
    outcome = lab.train(recipe(env={"options": {"share": 1.0, "trouble": "exit"}}), run="exit")
    return f"{text}; sys.exit(0): exit code {outcome[0]}", held and said(outcome, "SystemExit: 0")


@row("NaN, infinity, text, exceptions, sys.exit, crashes in 1 % of steps in workers")
def trouble_in_workers(lab: Lab) -> Outcome:
    held, text = _troubled(lab, "workers", "any", 0.01)
    return text, held


@row("a hang in this process and in a worker: ends after env.deadline")
def hangs(lab: Lab) -> Outcome:
    both = [_troubled(lab, pool, "hang", 0.002, deadline=0.5) for pool in ("sync", "workers")]
    said_so = ["no answer within 0.5 s" in lab.read("incidents.json", pool) for pool in ("sync", "workers")]
    return "; ".join(text for _, text in both), all(held for held, _ in both) and all(said_so)


@row("a tenth of the held-out states always fails: left out, counted, the run ends")
def held_out_failures(lab: Lab) -> Outcome:
    stages = [{"warm_up": {"decisions": 80}}, {"evaluate": {"episodes": 40}}]
    code, output = lab.train(recipe(stages, {"options": {"trouble": "raise", "held_out": True}}))
    counted = "4 left out" in output
    return f"exit code {code}, the 4 of 40 {'are' if counted else 'are NOT'} counted", code == 0 and counted


@row("64 environments in 2 workers, 1 % of episodes raise: the run ends")
def faults_at_a_realistic_rate(lab: Lab) -> Outcome:
    stages = [{"warm_up": {"decisions": 64_000}}]
    env = {"num_envs": 64, "pool": "workers", "num_workers": 2, "options": {"trouble": "raise", "share": 0.0005}}
    code, _ = lab.train(recipe(stages, env))
    count = sum(json.loads(lab.read("incidents.json") or '{"counts": {}}')["counts"].values())
    return f"{count} failed episodes in 64,000 decisions, exit code {code}", code == 0 and count > 10


def _act(observation: Any) -> Decisions:
    count = len(observation["observation"])
    return Decisions(np.zeros((count, 2), np.float32), np.zeros((count, 1), np.float32))


@row("worker processes killed in the middle of steps: replaced, no wrong answer", quick=True)
def dead_workers(lab: Lab) -> Outcome:
    rng, deaths, wrong, right = random.Random(0), 0, 0, 0
    pool: Any = make_pool("Walk-v0", 8, kind="workers", num_workers=2, max_incidents=1.0, options={"micros": 200})
    seeds, steps = np.arange(8), np.zeros(8, np.int64)
    pool.reset(seeds)
    while deaths < 10 * lab.times:
        if rng.random() < 0.2:
            os.kill(pool._workers[rng.randrange(2)].process.pid, signal.SIGKILL)
            deaths += 1
        result = pool.step(np.zeros((8, 2), np.float32))
        steps += 1
        for i in np.flatnonzero(result.valid):
            want = Walk.expected(int(seeds[i]), int(steps[i]))
            good = np.allclose(result.observation["observation"][i], want, atol=1e-6)
            right, wrong = right + good, wrong + (not good)
        over = result.terminated | result.truncated
        if over.any():
            seeds, steps = np.where(over, seeds + 8, seeds), np.where(over, 0, steps)
            pool.reset(seeds, over)
    counted = pool.incidents.counts["crash"]
    pool.close()
    return f"{deaths} deaths, {counted} counted, {wrong} wrong of {right + wrong} rows", wrong == 0 and right > 0


@row("1 % of steps NaN: share of decisions per second that is kept (64 environments, 2 workers)", quick=True)
def throughput_with_nan(lab: Lab) -> Outcome:
    rounds, texts, last = (3 if lab.times < 3 else 7), [], 0.0
    for kind, micros in (("sync", 200), ("workers", 0), ("workers", 30), ("workers", 200)):
        runs: dict[str, Callable[[], float]] = {}
        pools = []
        for share in (0.0, 0.01):
            more: dict[str, Any] = {"num_workers": 2} if kind == "workers" else {}
            options = {"share": share, "micros": micros}
            pool = make_pool("Walk-v0", 64, kind=kind, options=options, **more)  # type: ignore[arg-type]
            pools.append(pool)
            collector = Collector(pool, run_seed=1)
            runs[str(share)] = lambda c=collector: common.rate(  # type: ignore[misc]
                lambda: c.collect(_act, decisions=640).decisions, seconds=0.2 if rounds < 5 else 1.0)  # fmt: skip
        last = common.ratio(common.measure(runs, rounds=rounds), "0.01", "0.0")
        texts.append(f"{kind} {micros} us a step {last:.2f}")
        for pool in pools:
            pool.close()
    return "; ".join(texts), last >= 0.9  # of steps of 0.2 ms: a simulator's are longer
