"""Films single episodes of a policy for the report. A machine that cannot render gets a sentence, never a crash."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
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
            frames, won = roll_out(act, env, seed, session.fit)
            if won == success:
                path = write_video(session.folder / "videos" / f"{name}.mp4", frames, fps=25)
                write_json(
                    Path(path).with_suffix(".json"), {"seed": int(seed), "success": won, "stage": list(session.path)}
                )
                return f"filmed a {wanted}: {path.name}"
        return f"nothing filmed: none of {min(tries, len(seeds))} episodes ended in {wanted} in the single environment"
    except Exception as error:  # a picture is never worth a run
        write_json(session.folder / "videos" / "unavailable.json", {"reason": str(error)})
        return f"no video: {error}"


def roll_out(act: Act, env: EnvConfig, seed: int, fit: Callable[[Pool], Pool]) -> tuple[np.ndarray, bool]:
    """(frames [T + 1, H, W, 3] uint8, success) of one episode in the single environment."""
    options = {k: v for k, v in env.options.items() if k not in ("num_threads", "engine")}
    single = functools.partial(make_single, env.id, options=options, wrappers=env.wrappers, render_mode="rgb_array")
    envs = Singles(single, 1, deadline=env.deadline)
    pool = fit(VectorPool(envs, purpose="evaluation"))
    try:
        observation = pool.reset(np.array([seed]))
        frames: list[Any] = [envs.render(0)]
        while True:
            result = pool.step(act(observation).action)
            observation = result.observation
            frames.append(envs.render(0))
            if result.terminated[0] or result.truncated[0] or not result.valid[0]:
                success = result.info.get("success")
                return np.stack(frames).astype(np.uint8), bool(success is not None and success[0])
    finally:
        pool.close()
