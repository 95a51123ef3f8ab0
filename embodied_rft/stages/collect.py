"""Stages that put experience into the buffer without learning from it: demonstrate, load, warm_up."""

from __future__ import annotations

from dataclasses import field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from embodied_rft import distributed
from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.plans import Share
from embodied_rft.buffer.trajectories import OUTSIDE, read_trajectories
from embodied_rft.data import Source
from embodied_rft.experience.demonstrate import demonstrator_act, make_demonstrator, step_schema
from embodied_rft.names import UserError
from embodied_rft.options import STRICT
from embodied_rft.registry import register
from embodied_rft.runs.session import Session
from embodied_rft.stages.base import Stage


@register("stage", "demonstrate")
class Demonstrate(Stage):
    """A scripted demonstrator fills the buffer with whole episodes, failures included; they are never overwritten."""

    @dataclass(config=STRICT, kw_only=True)
    class Config:
        """Whose demonstrations, and how many."""

        episodes: PositiveInt = 200  # how many
        with_: str = "scripted"  # written `with`: a demonstrator id; scripted: the environment's own
        noise: NonNegativeFloat = 0.0  # standard deviation of Gaussian noise on the action, in action units
        options: dict[str, Any] = field(default_factory=dict)  # of the demonstrator

    @property
    def title(self) -> str:
        """How the report names this stage."""
        return f"demonstrate: {self.config.episodes} episodes, noise {self.config.noise:g}"

    def run(self, session: Session) -> dict[str, Any]:
        """Collect in one go (seconds), then pin the rows."""
        config = self.config
        demonstrator = make_demonstrator(
            session.env.id, config.with_, env_options=session.env.options, noise=config.noise, **config.options
        )
        chunk = session.agent.policy.chunk
        collector = session.make_collector(source=Source.DEMONSTRATION, pool=session.step_pool("training"))
        act = demonstrator_act(demonstrator, session.numpy_generator("demonstrate"))
        session.buffer  # noqa: B018  announces the memory before the first episode
        recording = collector.collect(act, episodes=distributed.share(config.episodes, "episodes"))
        count = sum(distributed.gather(recording.decisions))
        metrics = {**recording.metrics(), "demonstrations/decisions": float(count)}
        session.counters["decisions"] += count
        if chunk.horizon == 1:
            recording.write(session.buffer)
        else:
            room, rewards = recording.decisions + 2 * config.episodes, session.schema().rewards
            steps = Buffer(step_schema(session.step_pool("training"), rewards), room)
            recording.write(steps)
            session.add_trajectories(steps.trajectories(), chunk=chunk)
        session.buffer.pin()
        session.log(metrics)
        return {f"{name} of the demonstrations": value for name, value in told(metrics)} | {"episodes": config.episodes}


@register("stage", "load")
class Load(Stage):
    """Trajectories from a file (written by `erft demos`) fill the buffer; they are never overwritten."""

    @dataclass(config=STRICT, kw_only=True)
    class Config:
        """Which file."""

        file: Path  # written by `erft demos`
        max_episodes: PositiveInt | None = None  # of the file; null: all
        outside: Share = OUTSIDE  # of actions outside the action space, which are clipped; more are refused
        source: Literal["demonstration", "offline"] = "demonstration"  # what the data counts as

    @property
    def title(self) -> str:
        """How the report names this stage."""
        return f"load {self.config.file.name}"

    def run(self, session: Session) -> dict[str, Any]:
        """Read, check against the environment's spaces, add, pin."""
        pool, config = session.step_pool("training"), self.config
        trajectories = read_trajectories(
            config.file, schema=step_schema(pool), action_space=pool.action_space, outside=config.outside
        )[: config.max_episodes]
        trajectories = [replace(t, source=Source[self.config.source.upper()]) for t in trajectories]
        session.add_trajectories(trajectories, chunk=session.agent.policy.chunk)
        session.buffer.pin()
        return {"episodes": len(trajectories), "decisions": sum(len(t) for t in trajectories)}


@register("stage", "warm_up")
class WarmUp(Stage):
    """The current policy collects experience without learning, so that the critic first meets its own distribution."""

    @dataclass(config=STRICT, kw_only=True)
    class Config:
        """How much."""

        decisions: NonNegativeInt = 5_000  # of experience, in all
        greedy: bool = False  # without exploring

    @property
    def title(self) -> str:
        """How the report names this stage."""
        return f"warm up: {self.config.decisions} decisions"

    def run(self, session: Session) -> dict[str, Any]:
        """Collect in one go; a kill starts this stage again."""
        collector = session.make_collector()
        count = distributed.share(self.config.decisions, "decisions")
        recording = collector.collect(session.actor(greedy=self.config.greedy), decisions=count)
        metrics = recording.metrics()
        recording.write(session.buffer)
        collector.cut().write(session.buffer)
        session.counters["decisions"] += sum(distributed.gather(recording.decisions))
        session.log(metrics)
        return {f"{name} while warming up": value for name, value in told(metrics)}


def told(metrics: dict[str, float]) -> list[tuple[str, float]]:
    """The success of what was collected, or its return where nobody tells success; nothing if no episode ended."""
    for name in ("success", "return"):
        if f"collect/{name}" in metrics:
            return [(name, metrics[f"collect/{name}"])]
    return []


def whole_groups(option: str, episodes: int | None, group_size: int) -> None:
    """ValueError if so many episodes tear a group."""
    if episodes is not None and episodes % group_size:
        below = episodes - episodes % group_size
        near = f"{below} or {below + group_size}" if below else f"{group_size}"
        raise UserError(f"{option} {episodes} tears a group of {group_size}: set it to a multiple, such as {near}")


@register("stage", "collect")
class Collect(Stage):
    """Whole episodes of the current policy go into the buffer, in groups that share a start; nothing is learned."""

    @dataclass(config=STRICT, kw_only=True)
    class Config:
        """How many."""

        episodes: int = 256  # how many
        group_size: int = 1  # siblings: they are compared by raft, dpo and its kin
        greedy: bool = False  # without exploring

        def __post_init__(self) -> None:
            if self.episodes < 1 or self.group_size < 1:
                raise UserError(f"episodes {self.episodes}, group_size {self.group_size}: at least 1 is expected")
            whole_groups("episodes", self.episodes, self.group_size)

    @property
    def title(self) -> str:
        """How the report names this stage."""
        groups = f" in groups of {self.config.group_size}" if self.config.group_size > 1 else ""
        return f"collect: {self.config.episodes} episodes{groups}"

    def run(self, session: Session) -> dict[str, Any]:
        """Collect in one go; a kill starts this stage again."""
        config = self.config
        collector = session.make_collector(group_size=config.group_size)
        act, version = session.actor(greedy=config.greedy), int(session.agent.version)
        recording = collector.collect(act, episodes=distributed.share(config.episodes, "episodes"), version=version)
        metrics = recording.metrics()
        recording.write(session.buffer)
        session.counters["decisions"] += sum(distributed.gather(recording.decisions))
        session.log(metrics)
        return {name: metrics[f"collect/{name}"] for name in ("return", "success") if f"collect/{name}" in metrics}
