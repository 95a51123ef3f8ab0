"""Stages that hand a skill on: environment (the same task, shown or set differently), student (another policy).

A teacher that reads the simulator's state teaches a student that sees pixels (Chen et al. 2019, learning by cheating;
Ankile et al. 2024, ResiP, section 5.3):

    - environment: {options: {cameras: [front], image_size: 64}}
    - collect: {episodes: 400}
    - student: {agent: {id: diffusion, horizon: 4, keys: [image/front, robot_state]}}
    - pretrain: {objective: {id: bc, selection: {min_return: 1}}}
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic.dataclasses import dataclass

from embodied_rft.agent import build_policy
from embodied_rft.chunking import fit_pool
from embodied_rft.config import plugin_spec
from embodied_rft.registry import register
from embodied_rft.stages.base import Stage
from embodied_rft.stages.experience import STRICT

if TYPE_CHECKING:
    from embodied_rft.session import Session


@register("stage", "environment")
class Environment(Stage):
    """The environments go on with other options, such as cameras or a tighter hole; the policy stays as it is.

    It goes on reading the keys that it read. Experience without what is observed from here on is dropped.
    """

    @dataclass(config=STRICT, kw_only=True)
    class Config:
        """What changes."""

        options: dict[str, Any]  # keyword arguments of the environment, on top of those so far

    @property
    def title(self) -> str:
        """How the report names this stage."""
        return "environment: " + ", ".join(f"{k} {v}" for k, v in self.config.options.items())

    def prepare(self, session: Session) -> None:
        """Make the environments anew."""
        session.replace_env(self.config.options)

    def run(self, session: Session) -> None:
        """Nothing is left to do."""


@register("stage", "student")
class Student(Stage):
    """A new policy takes over, with the experience so far as its lesson; the old one and its critics are gone."""

    @dataclass(config=STRICT, kw_only=True)
    class Config:
        """Who."""

        agent: Annotated[dict[str, Any], plugin_spec("agent")]  # as in the recipe; its `keys` say what it reads

    @property
    def title(self) -> str:
        """How the report names this stage."""
        return f"student: {self.config.agent['id']}"

    def prepare(self, session: Session) -> None:
        """Build the student, hand it the teacher's experience in its own form."""
        agent, spec = session.agent, self.config.agent
        pool = fit_pool(session.step_pool("training"), spec)
        policy = build_policy(spec, pool.observation_space, pool.action_space, session.generator("agent"))
        agent.parts.clear()
        agent.part_specs.clear()
        session.replace_policy(policy.to(agent.device))

    def run(self, session: Session) -> dict[str, Any]:
        """Say what there is to learn from."""
        weights = sum(p.numel() for p in session.agent.policy.parameters())
        return {"trainable parameters": weights, "decisions to learn from": len(session.buffer.rows())}
