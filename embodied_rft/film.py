"""Films single episodes of a policy for the report. A machine that cannot render gets a sentence, never a crash."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embodied_rft.collect import Act
from embodied_rft.log import write_json
from embodied_rft.making import make_single
from embodied_rft.pool import Pool, VectorPool
from embodied_rft.seeding import evaluation_generator
from embodied_rft.singles import Singles

if TYPE_CHECKING:
    from embodied_rft.config import EnvConfig
    from embodied_rft.session import Session


def film(session: Session, seeds: Sequence[int], *, success: bool, name: str, tries: int = 4) -> str:
    """Film one episode that ends in success (or failure) from one of `seeds`; returns what to tell the user."""
    from embodied_rft.video import write_video

    wanted = "success" if success else "failure"
    if not seeds:
        return f"no {wanted} to film"
    env = session.env
    act = session.actor(greedy=True, rng=evaluation_generator())
    try:
        for seed in seeds[:tries]:
            rolled = roll_out(act, env, seed, session.fit)
            won = rolled.success
            if won == success:
                path = write_video(session.folder / "videos" / f"{name}.mp4", rolled.frames, fps=25)
                write_json(
                    Path(path).with_suffix(".json"), {"seed": int(seed), "success": won, "stage": list(session.path)}
                )
                return f"filmed a {wanted}: {path.name}"
        return f"nothing filmed: none of {min(tries, len(seeds))} episodes ended in {wanted} in the single environment"
    except Exception as error:  # a picture is never worth a run
        write_json(session.folder / "videos" / "unavailable.json", {"reason": str(error)})
        return f"no video: {error}"


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
    options = {k: v for k, v in env.options.items() if k not in ("num_threads", "engine")}
    single = functools.partial(make_single, env.id, options=options, wrappers=env.wrappers, render_mode=render_mode)
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
