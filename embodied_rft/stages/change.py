"""Stages that hand a skill on: environment (the same task, shown or set differently), student (another policy).

A teacher that reads the simulator's state teaches a student that sees pixels (Chen et al. 2019, learning by cheating;
Ankile et al. 2024, ResiP, section 5.3):

    - environment: {options: {cameras: [front], image_size: 64}}
    - collect: {episodes: 400}
    - student: {agent: {id: diffusion, horizon: 4, keys: [image/front, robot_state]}}
    - pretrain: {objective: {id: bc, selection: {min_return: 1}}}
"""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic.dataclasses import dataclass

from embodied_rft import registry
from embodied_rft.learning.agent import wrap_policy
from embodied_rft.names import UserError, nearest
from embodied_rft.networks import trainable
from embodied_rft.options import STRICT, parse, plugin_spec, validate_plugin_config
from embodied_rft.policy import Adapter, build_policy, tune
from embodied_rft.registry import register
from embodied_rft.runs.session import Session
from embodied_rft.runs.trained import opened
from embodied_rft.stages.base import Stage


@register("stage", "environment")
class Environment(Stage):
    """The environments go on with other options, such as cameras or a tighter hole; the policy stays as it is.

    It goes on reading the keys that it read. Experience without what is observed from here on is dropped.
    """

    replaces_env: ClassVar[bool] = True

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


@register("stage", "load_policy")
class LoadPolicy(Stage):
    """The policy of another run takes over, on request with its critics; those so far are gone."""

    @dataclass(config=STRICT, kw_only=True)
    class Config:
        """Of which run."""

        run: Path  # its folder; what is needed of it is kept in the folder of this run
        checkpoint: Literal["newest", "best"] = "newest"  # best: on its learning curve
        parts: list[str] = field(default_factory=lambda: ["policy"])  # policy, critic, value, ...

    @property
    def title(self) -> str:
        """How the report names this stage."""
        return f"load {', '.join(self.config.parts)} of {self.config.run.name}"

    def prepare(self, session: Session) -> None:
        """Take the networks over; both runs must show and take the same."""
        agent, names = session.agent, self.config.parts
        with opened(self.config.run, self.config.checkpoint, device=str(agent.device)) as other:
            theirs, ours = other.step_pool("training"), session.step_pool("training")
            if (theirs.fields, theirs.action_space) != (ours.fields, ours.action_space):
                raise UserError(
                    f"load_policy: the run in {self.config.run} sees {theirs.observation_space} and takes "
                    f"{theirs.action_space}, this one {ours.observation_space} and {ours.action_space}"
                )
            found = {"policy": other.agent.policy, **other.agent.parts}
            for name in names:
                if name not in found:
                    raise UserError(f"load_policy.parts: the run has no {name!r}; {nearest(name, found)}")
            if "policy" in names:
                agent.parts.clear()
                agent.part_specs.clear()
                session.replace_policy(other.agent.policy)
            for name in names:
                if name != "policy":
                    agent.parts[name] = found[name]
                    agent.part_specs[name] = other.agent.part_specs[name]

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
        pool = session.step_pool("training")
        policy = build_policy(spec, pool.observation_space, pool.action_space, session.generator("agent"))
        agent.parts.clear()
        agent.part_specs.clear()
        session.replace_policy(policy.to(agent.device))

    def run(self, session: Session) -> dict[str, Any]:
        """Say what there is to learn from."""
        weights = sum(p.numel() for p in session.agent.policy.parameters())
        return {"trainable parameters": weights, "decisions to learn from": len(session.buffer.rows())}


@register("stage", "adapt")
class Adapt(Stage):
    """Changes what learns: which weights of the policy (`with: lora`), or a new policy around it (`with: residual`)."""

    @dataclass(config=STRICT, kw_only=True)
    class Config:
        """Which weights, or which adapter."""

        # written `with`: full, lora, lora+head, head, frozen; or an agent id that takes a base, which is frozen
        with_: str = "residual"  # lora, head, frozen, full, or an agent around this one
        options: dict[str, Any] = field(default_factory=dict)  # of the adapters (rank, alpha, targets) or of the agent

        def __post_init__(self) -> None:
            if self.with_ in trainable.WORDS:
                if self.options and not self.with_.startswith("lora"):
                    raise UserError(f"adapt.options have no effect with {self.with_!r}: leave them out")
                parse(trainable.LoraOptions, self.options, "adapt.options")
                return
            around = [id for id in registry.known("agent") if issubclass(registry.find("agent", id), Adapter)]
            if self.with_ not in around:
                raise UserError(f"adapt.with is {self.with_!r}; {nearest(self.with_, [*trainable.WORDS, *around])}")
            if "base" in self.options:
                raise UserError("adapt.options.base: the base is the policy that there is; leave it out")
            validate_plugin_config("agent", self.with_, {**self.options, "base": {}}, path="adapt.options")

    @property
    def title(self) -> str:
        """How the report names this stage."""
        word = self.config.with_
        return f"adapt: train {word}" if word in trainable.WORDS else f"adapt: {word} on the frozen policy"

    def prepare(self, session: Session) -> None:
        """Choose the weights, or wrap the policy."""
        config, rng = self.config, session.generator("setup")
        if config.with_ in trainable.WORDS:
            lora = parse(trainable.LoraOptions, config.options) if config.options else None
            tune(session.agent.policy, config.with_, lora=lora, rng=rng)
        else:
            session.replace_policy(wrap_policy(config.with_, session.agent, rng, **config.options))

    def run(self, session: Session) -> dict[str, Any]:
        """The structure is all there is to it."""
        policy = session.agent.policy
        return {
            "trainable parameters": sum(p.numel() for p in policy.parameters() if p.requires_grad),
            "frozen parameters": sum(p.numel() for p in policy.parameters() if not p.requires_grad),
        }
