"""Stages that put experience into the buffer without learning from it: demonstrate, load, warm_up."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from embodied_rft.buffer import read_trajectories
from embodied_rft.collect import Act
from embodied_rft.data import Decisions, Source, Tree
from embodied_rft.demos import make_demonstrator
from embodied_rft.registry import register
from embodied_rft.stages.base import Stage

if TYPE_CHECKING:
    from embodied_rft.session import Session

STRICT = ConfigDict(extra="forbid")


@register("stage", "demonstrate")
class Demonstrate(Stage):
    """A scripted demonstrator fills the buffer with whole episodes, failures included; they are never overwritten."""

    @dataclass(config=STRICT, kw_only=True)
    class Config:
        """Whose demonstrations, and how many."""

        episodes: int = 200
        with_: str = "scripted"  # written `with`: a demonstrator id; scripted: the environment's own
        noise: float = 0.0  # standard deviation of Gaussian noise on the action, in action units
        options: dict[str, Any] = field(default_factory=dict)  # of the demonstrator

    @property
    def title(self) -> str:
        """How the report names this stage."""
        return f"demonstrate: {self.config.episodes} episodes, noise {self.config.noise:g}"

    def run(self, session: Session) -> dict[str, Any]:
        """Collect in one go (seconds), then pin the rows."""
        config = self.config
        demonstrator = make_demonstrator(session.recipe.env.id, config.with_, noise=config.noise, **config.options)
        collector = session.make_collector(source=Source.DEMONSTRATION)
        act = demonstrator_act(demonstrator, session.numpy_generator("demonstrate"), session.schema().units)
        session.buffer  # noqa: B018  announces the memory before the first episode
        recording = collector.collect(act, episodes=config.episodes)
        metrics = {**recording.metrics(), "demonstrations/decisions": float(recording.decisions)}
        recording.write(session.buffer)
        session.buffer.pin()
        session.counters["decisions"] += recording.decisions
        session.log(metrics)
        return {"success of the demonstrations": metrics["collect/success"], "episodes": config.episodes}


@register("stage", "load")
class Load(Stage):
    """Trajectories from a file (written by `erft demos`) fill the buffer; they are never overwritten."""

    @dataclass(config=STRICT, kw_only=True)
    class Config:
        """Which file."""

        file: Path
        max_episodes: int | None = None
        source: str = "demonstration"  # or offline

    @property
    def title(self) -> str:
        """How the report names this stage."""
        return f"load {self.config.file.name}"

    def run(self, session: Session) -> dict[str, Any]:
        """Read, check against the environment's spaces, add, pin."""
        trajectories = read_trajectories(self.config.file, schema=session.schema())[: self.config.max_episodes]
        for trajectory in trajectories:
            session.buffer.add_trajectory(trajectory, retrace=getattr(session.agent.policy, "retrace", None))
        session.buffer.pin()
        return {"episodes": len(trajectories), "decisions": sum(len(t) for t in trajectories)}


@register("stage", "warm_up")
class WarmUp(Stage):
    """The current policy collects experience without learning, so that the critic first meets its own distribution."""

    @dataclass(config=STRICT, kw_only=True)
    class Config:
        """How much."""

        decisions: int = 5_000
        greedy: bool = False

    @property
    def title(self) -> str:
        """How the report names this stage."""
        return f"warm up: {self.config.decisions} decisions"

    def run(self, session: Session) -> dict[str, Any]:
        """Collect in one go; a kill starts this stage again."""
        collector = session.make_collector()
        recording = collector.collect(session.actor(greedy=self.config.greedy), decisions=self.config.decisions)
        metrics = recording.metrics()
        recording.write(session.buffer)
        collector.cut().write(session.buffer)
        session.counters["decisions"] += recording.decisions
        session.log(metrics)
        return {"success while warming up": metrics.get("collect/success")}


def demonstrator_act(demonstrator: Any, rng: np.random.Generator, units: int | None) -> Act:
    """A demonstrator as something that acts. Its log-probabilities are unknown and stored as 0."""

    def act(observation: Tree) -> Decisions:
        action = demonstrator.act(observation, rng)
        return Decisions(action, np.zeros((len(action), units or 1), dtype=np.float32))

    return act
