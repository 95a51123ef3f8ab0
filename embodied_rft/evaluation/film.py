"""Films single episodes of a policy for the report. A machine that cannot render gets a sentence, never a crash."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from embodied_rft.experience.collect import Act
from embodied_rft.pools.config import EnvConfig
from embodied_rft.pools.making import make_single
from embodied_rft.pools.pool import VectorPool
from embodied_rft.pools.protocol import Pool
from embodied_rft.pools.singles import Singles


@dataclass(frozen=True)
class Rolled:
    """One episode: what was drawn, what it gave, whether it succeeded."""

    frames: np.ndarray  # [T + 1, H, W, 3] uint8; none in a window
    total: float
    success: bool
    told: bool  # whether the environment says anything about success


def roll_out(
    act: Act, env: EnvConfig, seed: int, fit: Callable[[Pool], Pool], *, render_mode: str | None = "rgb_array"
) -> Rolled:
    """One episode in the single environment; render_mode "human" draws in a window, None not at all."""
    single = functools.partial(make_single, env.id, options=env.options, wrappers=env.wrappers, render_mode=render_mode)
    envs = Singles(single, 1, deadline=env.deadline)
    pool = fit(VectorPool(envs, purpose="evaluation"))
    frames: list[Any] = []
    total, over, success = 0.0, False, None
    try:
        observation = pool.reset(np.array([seed]))
        while True:
            if render_mode is not None:
                frame = envs.render(0)
                frames += [] if frame is None else [frame]
            if over:
                break
            result = pool.step(act(observation).action)
            observation, total = result.observation, total + float(result.reward[0])
            over = bool(result.terminated[0] or result.truncated[0] or not result.valid[0])
            success = result.info.get("success")
    finally:
        pool.close()
    drawn = np.stack(frames).astype(np.uint8) if frames else np.zeros((0, 0, 0, 3), np.uint8)
    return Rolled(drawn, total, bool(success is not None and success[0]), success is not None)
