"""Finds demonstrators by environment id and writes their episodes to a file."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from embodied_rft import registry
from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.columns import Schema
from embodied_rft.buffer.trajectories import OUTSIDE, within, write_trajectories
from embodied_rft.data import Action, Decisions, Source, Tree
from embodied_rft.experience.collect import Collector, action_field
from embodied_rft.experience.schedule import Act
from embodied_rft.names import UserError, nearest
from embodied_rft.pools.pool import make_pool
from embodied_rft.pools.protocol import Pool
from embodied_rft.seeding import spawn_generator


class Demonstrator(Protocol):
    """Whoever knows how a task is done."""

    def act(self, observation: Tree, rng: np.random.Generator) -> Action:
        """For observation arrays [N, ...]."""


def make_demonstrator(
    env_id: str, id: str = "scripted", *, env_options: Mapping[str, Any] | None = None, **options: Any
) -> Demonstrator:
    """The demonstrator `id`; "scripted" means the one registered for the environment.

    One that has an argument `environment` is told {"id": env_id, "options": env_options}.
    """
    known = registry.known("demonstrator")
    if id == "scripted":
        if env_id not in known:
            raise UserError(f"no scripted demonstrator for {env_id!r}; {nearest(env_id, known)}")
        id = env_id
    make = registry.find("demonstrator", id)
    if "environment" in inspect.signature(make).parameters:
        options["environment"] = {"id": env_id, "options": dict(env_options or {})}
    found: Demonstrator = make(**options)
    return found


def write_demos(
    env_id: str,
    out: str | Path,
    *,
    episodes: int = 100,
    noise: float = 0.0,
    seed: int = 0,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Run a demonstrator and write its episodes to `out`, atomically. Returns {"episodes", "decisions", "success"}."""
    if episodes < 1:
        raise UserError(f"episodes is {episodes}; expected at least 1")
    pool = make_pool(env_id, num_envs=min(64, episodes), options=options or {}, purpose="training")
    try:
        demonstrator = make_demonstrator(env_id, env_options=options, noise=noise)
        collector = Collector(pool, run_seed=seed, source=Source.DEMONSTRATION)
        recording = collector.collect(demonstrator_act(demonstrator, spawn_generator(seed, 1)), episodes=episodes)
        metrics = recording.metrics()
        buffer = Buffer(step_schema(pool, recording.rewards), recording.decisions + 2 * episodes)
        recording.write(buffer)
        inside = within(list(buffer.trajectories()), pool.action_space, outside=OUTSIDE, what="demonstrator 'scripted'")
        write_trajectories(Path(out), inside)
    finally:
        pool.close()
    return {
        "episodes": episodes,
        "decisions": recording.decisions,
        "success": metrics.get("collect/success"),
        "return": float(np.round(metrics["collect/return"], 3)),
    }


def step_schema(pool: Pool, rewards: tuple[str, ...] = ("env",)) -> Schema:
    """Columns of single steps of a pool: of experience that is still to be cut into chunks or written to a file."""
    return Schema(observation=dict(pool.fields), action=action_field(pool.action_space), rewards=rewards)


def demonstrator_act(demonstrator: Demonstrator, rng: np.random.Generator) -> Act:
    """A demonstrator as something that acts, and does not know how likely its decisions were."""
    return lambda observation: Decisions(demonstrator.act(observation, rng), None)
