"""Memory of conversations with pictures: each is kept once by its content, against rows of pixels.

    python -m benchmarks.image_memory [--quick]

Rollouts of Sokoban (6x6 squares, pictures of 96x96x3): 16 groups of 8 siblings, at most 15 turns, by an untrained
`categorical` policy and by one whose moves are half those of the oracle. What counts are all bytes that Python and
NumPy hold for the buffer after it was written (tracemalloc), whatever they are for: pictures, bookkeeping, tables of
the store. `unique` is that over the bytes of the distinct pictures; `rows` over one float32 picture a turn, as
frameworks store that keep a row a step, without the next picture. Bars: unique <= 1.1, rows <= 1/20.

The last line of the table is the worst case, in which no picture is like another: unique stays below 1.1, rows can be
no better than 1/4.
"""

from __future__ import annotations

import functools
import gc
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

import embodied_rft.envs  # noqa: F401  (registers)
from benchmarks import common
from embodied_rft import registry
from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.columns import Schema
from embodied_rft.data import Decisions, Field, Tree
from embodied_rft.experience.collect import Collector
from embodied_rft.experience.recording import Last, Taken
from embodied_rft.experience.schedule import Act
from embodied_rft.policy import build_policy
from embodied_rft.pools.config import EnvConfig
from embodied_rft.pools.pool import open_pool
from embodied_rft.pools.protocol import Pool

GROUPS, SIBLINGS, TURNS = 16, 8, 15
ID = "embodied_rft/Sokoban-v0"
UNTRAINED, HALF, WORST = "untrained policy", "half oracle", "no picture twice"


@dataclass(frozen=True)
class Kept:
    """What a buffer holds after some episodes."""

    rows: int
    pixels: int  # bytes of a picture
    distinct: int  # pictures
    traced: int  # bytes

    @property
    def unique(self) -> float:
        """Bytes held over those of the distinct pictures."""
        return self.traced / (self.distinct * self.pixels)

    @property
    def of_rows(self) -> float:
        """Bytes held over those of a float32 picture a turn."""
        return self.traced / (self.rows * self.pixels * 4)


def untrained(pool: Pool, seed: int) -> Act:
    """A network that was never trained, on pictures and symbols."""
    draws = torch.Generator().manual_seed(seed)
    policy = build_policy({"id": "categorical"}, pool.observation_space, pool.action_space, draws)
    return lambda observation: policy.act(observation, rng=draws)


def half_oracle(pool: Pool, seed: int) -> Act:
    """The shortest solution, of which every other move is drawn."""
    player, rng = registry.find("demonstrator", ID)(noise=0.5), np.random.default_rng(seed)

    def act(observation: Tree) -> Decisions:
        action = player.act(observation, rng)
        return Decisions(action, np.zeros((len(action), 1), np.float32))

    return act


def rollouts(make: Callable[[Pool, int], Act], seed: int, *, different: bool = False) -> Kept:
    """16 groups of 8 episodes, kept; `different`: with pictures of which no two are alike, as many and as large."""
    env = EnvConfig(
        ID, 32, options={"observation": "both"}, pool="sync", wrappers=[{"id": "TimeLimit", "max_episode_steps": TURNS}]
    )
    pool, rng = open_pool(env, purpose="training"), np.random.default_rng(seed)
    collector = Collector(pool, run_seed=seed, group_size=SIBLINGS)
    recording = collector.collect(make(pool, seed), episodes=GROUPS * SIBLINGS)
    for one in recording.rows:
        assert isinstance(one, Taken | Last)
        seen = one.observation["image"]
        one.observation.pop("state")  # type: ignore[attr-defined]
        if different:
            one.observation["image"] = rng.integers(256, size=seen.shape, dtype=np.uint8)  # type: ignore[index]
    pictures = {image.tobytes() for one in recording.rows for image in one.observation["image"]}  # type: ignore
    schema = Schema({"image": Field((), "uint8", "images")}, pool.action_field)
    gc.collect()
    tracemalloc.start()
    buffer = Buffer(schema, recording.num_rows)
    recording.write(buffer)
    gc.collect()
    traced, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(buffer.images) == len(pictures)
    pool.close()
    return Kept(recording.decisions, seen[0].nbytes, len(pictures), traced)


def main() -> None:
    """Count, print."""
    options = common.arguments(__doc__)
    torch.set_num_threads(1)
    runs: dict[str, Callable[[int], Kept]] = {
        UNTRAINED: functools.partial(rollouts, untrained),
        HALF: functools.partial(rollouts, half_oracle),
        WORST: functools.partial(rollouts, half_oracle, different=True),
    }
    found = {name: [run(seed) for seed in range(1 if options.quick else 5)] for name, run in runs.items()}
    for name, kept in found.items():
        rows, distinct = (int(np.median([getattr(one, what) for one in kept])) for what in ("rows", "distinct"))
        print(f"{name}: {rows:,} turns, {distinct:,} distinct pictures")
    unique = {name: common.Result(name, [one.unique for one in kept]) for name, kept in found.items()}
    of_rows = {name: common.Result(name, [one.of_rows for one in kept]) for name, kept in found.items()}
    common.table(unique, unit="x distinct pictures as uint8", title="Memory of pictures", digits=3)
    common.table(of_rows, unit="x a float32 picture a turn", title="Memory of pictures", digits=4)
    common.finish(
        name="image_memory",
        results=unique,
        ratio=1 / max(of_rows[UNTRAINED].rounds + of_rows[HALF].rounds),
        unique=max(max(one.rounds) for one in unique.values()),
        of_rows={name: round(one.median, 4) for name, one in of_rows.items()},
    )


if __name__ == "__main__":
    main()
