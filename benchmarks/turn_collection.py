"""Which share of generated turns is learned from, where episodes of many turns end at different times.

    python -m benchmarks.turn_collection [--quick]

256 environments whose episodes end after each turn with probability p (0.05, 0.1, 0.2), after 15 at the latest; who
acts counts what it is asked to write. Ours is the product's collector on its pool. The loop that agent frameworks
write is lock-step: all environments begin together, every turn is generated for all of them, and what those that have
ended are given is thrown away; the next round begins when the last one has ended. Nothing here is timed, so that no
number depends on the machine; what slow environments cost is in `async_turns`.

`useful_share` is kept turns over generated ones, the least over p, of two ways to collect: so many decisions, and so
many whole episodes (`episodes=`, as groups of siblings are collected). `width` is generated turns over those that as
many calls could have held: whole episodes keep the share, their tail is in the width. Beside it stands the share while
1 % of turns break (a dead server: the episode is void, none of its turns is learned from).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np

from benchmarks import common
from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.columns import Schema
from embodied_rft.data import Decisions, Ragged
from embodied_rft.envs.serving import EnvBatch, Outcome, serve
from embodied_rft.experience.collect import Collector
from embodied_rft.pools.config import EnvConfig
from embodied_rft.pools.pool import open_pool
from embodied_rft.pools.text_spaces import AnyText

ID, NUM_ENVS, CAP = "benchmarks/Turns-v0", 256, 15
DECISIONS, BREAKING, LOCK_STEP = "ours, decisions", "ours, 1 % of turns break", "lock-step"
ENDS = (0.05, 0.1, 0.2)


class Turns(EnvBatch):
    """Conversations of a random number of turns.

    Args:
        num_envs: N.
        ends: probability that a turn is the last one.
        breaks: probability that the environment fails in a turn.
    """

    max_episode_steps = CAP

    def __init__(self, *, num_envs: int, ends: float = 0.1, breaks: float = 0.0) -> None:
        super().__init__(num_envs=num_envs)
        self.observation_space = gymnasium.spaces.Dict({"message": AnyText(20)})
        self.action_space = AnyText(20)
        self.ends, self.breaks = ends, breaks
        self.turn = np.zeros(num_envs, np.int64)
        self.arrays = ("turn",)

    def start(self, rows: np.ndarray, seeds: Sequence[int | None], options: Mapping[str, Any]) -> None:
        """See `EnvBatch`."""
        self.turn[rows] = 0

    def step(self, rows: np.ndarray, actions: Any) -> Outcome:
        """See `EnvBatch`."""
        self.turn[rows] += 1
        draws = np.array([self.generators[row].random(2) for row in rows])
        for row in rows[draws[:, 1] < self.breaks].tolist():
            self.fail(row, ConnectionError("the server is gone"))
        over = draws[:, 0] < self.ends
        return Outcome(np.ones(len(rows), np.float32), over, over, {})

    def observe(self, rows: np.ndarray) -> dict[str, list[str]]:
        """See `EnvBatch`."""
        return {"message": [f"turn {turn}" for turn in self.turn]}


if ID not in gymnasium.registry:  # this file is read twice: once as the program
    serve(ID, Turns)


class Writer:
    """A policy that counts what it is asked to write."""

    def __init__(self) -> None:
        self.generated, self.calls = 0, 0

    def __call__(self, observation: Mapping[str, Any]) -> Decisions:
        """One token for each message."""
        count = len(observation["message"])
        self.generated, self.calls = self.generated + count, self.calls + 1
        return Decisions(["x"] * count, Ragged.of([np.zeros(1, np.float32)] * count, np.float32))


def collected(seed: int, *, ends: float, breaks: float = 0.0, **how: int) -> tuple[float, float]:
    """(useful share, width) of one call of the product's collector: turns that can be read from the buffer count."""
    pool, writer = (
        open_pool(EnvConfig(ID, NUM_ENVS, options={"ends": ends, "breaks": breaks}), purpose="training"),
        Writer(),
    )
    recording = Collector(pool, run_seed=seed).collect(writer, **how)
    buffer = Buffer(Schema(pool.fields, pool.action_field, units=None), recording.num_rows)
    recording.write(buffer)
    pool.close()
    return len(buffer.rows()) / writer.generated, writer.generated / (writer.calls * NUM_ENVS)


def lock_step(ends: float, seed: int) -> float:
    """Useful share of one round in which all begin together and all are generated for until the last one has ended."""
    env = gymnasium.make_vec(ID, num_envs=NUM_ENVS, ends=ends)
    env.reset(seed=seed)
    running, kept, generated = np.ones(NUM_ENVS, bool), 0, 0
    while running.any():
        kept, generated = kept + int(running.sum()), generated + NUM_ENVS
        _, _, terminated, truncated, _ = env.step(("x",) * NUM_ENVS)
        running &= ~(terminated | truncated)
    env.close()
    return kept / generated


def main() -> None:
    """Count, print."""
    options = common.arguments(__doc__)
    seeds, turns = range(1 if options.quick else 5), NUM_ENVS * (40 if options.quick else 100)
    shares: dict[str, list[float]] = {}
    widths: dict[str, list[float]] = {}
    for seed, ends in itertools.product(seeds, ENDS):
        ways: dict[str, dict[str, Any]] = {
            DECISIONS: {"decisions": turns},
            **{f"ours, {n} episodes": {"episodes": n} for n in (NUM_ENVS, 4 * NUM_ENVS)},
            BREAKING: {"decisions": turns, "breaks": 0.01},
        }
        for name, how in ways.items():
            share, width = collected(seed, ends=ends, **how)
            shares.setdefault(f"{name}, p {ends}", []).append(share)
            widths.setdefault(f"{name}, p {ends}", []).append(width)
        shares.setdefault(f"{LOCK_STEP}, p {ends}", []).append(lock_step(ends, seed))
    results = {name: common.Result(name, found) for name, found in shares.items()}
    common.table(results, unit="kept / generated", title=f"Turns of {NUM_ENVS} environments", digits=3)
    held = {name: common.Result(name, found) for name, found in widths.items()}
    common.table(held, unit="share of environments", title="Width of a generation", digits=3)
    whole = [
        np.min(found) for name, found in shares.items() if name.startswith("ours") and not name.startswith(BREAKING)
    ]
    theirs = [np.median(found) for name, found in shares.items() if name.startswith(LOCK_STEP)]
    common.finish(
        name="turn_collection",
        results=results,
        ratio=float(np.min(whole) / np.max(theirs)),
        useful_share=float(np.min(whole)),
        useful_share_with_failures=float(np.min([r.median for n, r in results.items() if n.startswith(BREAKING)])),
        lock_step=[round(float(x), 3) for x in theirs],
        widths={name: round(one.median, 3) for name, one in held.items()},
    )


if __name__ == "__main__":
    main()
