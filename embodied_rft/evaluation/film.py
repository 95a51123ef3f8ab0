"""Films single episodes of a policy for the report. A machine that cannot render gets a sentence, never a crash."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from embodied_rft.experience.schedule import Act, Schedule
from embodied_rft.policy import Policy
from embodied_rft.pools.config import EnvConfig
from embodied_rft.pools.making import make_single
from embodied_rft.pools.pool import VectorPool
from embodied_rft.pools.singles import Singles


@dataclass(frozen=True)
class Rolled:
    """One episode: what was drawn, what it gave, whether it succeeded."""

    frames: np.ndarray  # [T + 1, H, W, 3] uint8; none in a window
    total: float
    success: bool
    told: bool  # whether the environment says anything about success


def roll_out(act: Act, env: EnvConfig, seed: int, policy: Policy, *, render_mode: str | None = "rgb_array") -> Rolled:
    """One episode in the single environment; render_mode "human" draws in a window, None not at all."""
    single = functools.partial(make_single, env.id, options=env.options, wrappers=env.wrappers, render_mode=render_mode)
    envs = Singles(single, 1, deadline=env.deadline)
    pool = policy.fit_pool(VectorPool(envs, purpose="evaluation"))
    todo = iter([(0, seed)])
    schedule = Schedule(pool, lambda count: list(itertools.islice(todo, count)), past=policy.reads_past)
    frames: list[Any] = []
    success = None

    def draw() -> None:
        frame = None if render_mode is None else envs.render(0)
        frames.extend([] if frame is None else [frame])

    try:
        schedule.fill()
        draw()
        while schedule.playing.any():
            played = schedule.play(act)
            success = played.result.info.get("success")
            draw()
            schedule.fill(played.over)
    finally:
        pool.close()
    drawn = np.stack(frames).astype(np.uint8) if frames else np.zeros((0, 0, 0, 3), np.uint8)
    return Rolled(drawn, float(schedule.returned[0]), bool(success is not None and success[0]), success is not None)
