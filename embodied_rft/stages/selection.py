"""Stages for learning from chosen experience: collect whole episodes first, choose among them when learning."""

from __future__ import annotations

from typing import Any

from pydantic.dataclasses import dataclass

from embodied_rft import distributed
from embodied_rft.options import STRICT
from embodied_rft.registry import register
from embodied_rft.session import Session
from embodied_rft.stages.base import Stage
from embodied_rft.stages.experience import whole_groups


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
                raise ValueError(f"episodes {self.episodes}, group_size {self.group_size}: at least 1 is expected")
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
