"""An agent: a policy plus the parts that objectives train beside it (critic, value, temperature, density).

Policies are found by id. A class registered as an "agent" has a `Config` dataclass and is called as
`cls(config, observation_space=..., action_space=..., rng=...)`; an adapter has a field `base` that holds another spec.
This file knows neither losses nor environments.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from embodied_rft import registry
from embodied_rft.data import Decisions, Space, Tree
from embodied_rft.device import device_of
from embodied_rft.names import UserError, nearest
from embodied_rft.networks import critics
from embodied_rft.networks.encoder import Encoder, Features
from embodied_rft.policy import Adapter, Policy, Spec, build_policy
from embodied_rft.pools.spaces import what_suits

M = TypeVar("M", bound=nn.Module)


@dataclasses.dataclass(frozen=True)
class Spaces:
    """Of a single environment."""

    observation: Space
    action: Space


class Agent(nn.Module):
    """`policy` acts, `parts` help to train it, `version` counts the policy's updates over all stages.

    Args:
        policy: see docs/architecture.md.
        spaces: of a single environment.
        rng: draws the weights of parts that objectives ask for later.
    """

    version: Tensor

    def __init__(self, policy: Policy, spaces: Spaces, *, rng: torch.Generator) -> None:
        super().__init__()
        self.policy = policy
        self.spaces = spaces
        self.parts = nn.ModuleDict()
        self.part_specs: dict[str, dict[str, Any]] = {}  # what each was made as
        self.rng = rng
        self.register_buffer("version", torch.ones((), dtype=torch.int64))  # of the policy; 0 is experience from before

    def finite_state(self) -> dict[str, Any]:
        """`state_dict`, if all weights are numbers: no checkpoint may replace a good one that cannot be continued.

        Raises:
            FloatingPointError: a weight is NaN or infinite.
        """
        for name, weight in self.named_parameters():
            if not bool(torch.isfinite(weight).all()):
                raise FloatingPointError(
                    f"weight {name!r} has become NaN or infinite; nothing was saved, the newest checkpoint is from "
                    "before. Lower its learning rate or set learner.clip_norm."
                )
        return self.state_dict()

    def act(
        self,
        observation: Tree,
        *,
        greedy: bool = False,
        rng: torch.Generator | None = None,
        policy: Policy | None = None,
    ) -> Decisions:
        """N decisions for observation arrays [N, ...]: the one way in which an agent acts, wherever it does.

        Args:
            observation: arrays (and texts) of N environments.
            greedy: take the likeliest decision, else draw one.
            rng: what is drawn from.
            policy: acts in place of the agent's own, such as its average.
        """
        return (self.policy if policy is None else policy).decide(observation, self.parts, greedy=greedy, rng=rng)

    @property
    def action_dim(self) -> int:
        """A, the length of an action vector."""
        space = self.spaces.action
        if not isinstance(space, gym.spaces.Box):
            raise UserError(f"action space {space}: this objective needs action vectors (a Box). {what_suits(space)}")
        return int(np.prod(space.shape or ()))

    def decision_space(self, judges: str = "action") -> Space:
        """The space of what a critic judges: "action", or the "noise" that a steering policy chooses."""
        space = self.spaces.action if judges == "action" else self.policy.noise_space
        assert space is not None, "the policy chooses no noise"
        return space

    @property
    def device(self) -> torch.device:
        """Where the policy's weights live."""
        return device_of(self.policy)

    def module(self, name: str) -> nn.Module:
        """The part that a loss of this name trains: "policy" or one of `parts`."""
        if name == "policy":
            return self.policy
        if name not in self.parts:
            raise UserError(f"the agent has no part {name!r}; {nearest(name, ['policy', *self.parts])}")
        return self.parts[name]

    def part(self, name: str, kind: type[M]) -> M:
        """The part `name`, which is a `kind`: `agent.part("critic", Critic)(observation, action)`."""
        found = self.parts[name]
        assert isinstance(found, kind), f"part {name!r} is a {type(found).__name__}, no {kind.__name__}"
        return found

    def trainable(self, name: str) -> list[nn.Parameter]:
        """The weights of a part that may change (a frozen base is none of them)."""
        return [p for p in self.module(name).parameters() if p.requires_grad]

    def ensure(self, name: str, kind: str, *, fresh: bool = False, **options: Any) -> nn.Module:
        """The part `name`; made if there is none, kept if there is one (so a critic survives a change of objective).

        Options that are None are open: an existing part keeps its own, a new one takes the default of its kind.

        Args:
            name: key in `parts`.
            kind: "critic", "action_values", "value", "temperature", "density" or "return_scale".
            fresh: replace an existing part by a new one.
            options: of the kind's constructor, as JSON.

        Raises:
            ValueError: an existing part was made with other options.
        """
        options = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items() if v is not None}
        if kind == "critic":
            options.setdefault("judges", "action")
        known = self.part_specs.get(name)
        if known is not None and not fresh:
            if known["kind"] != kind:
                raise UserError(
                    f"part {name!r} is a {known['kind']}, the objective needs a {kind}: set warm_start: false"
                )
            for key, value in options.items():
                if known.get(key, value) != value:
                    raise UserError(
                        f"part {name!r} was made with {key}={known[key]!r}, but the objective asks for {value!r}. "
                        "Leave the option out to keep the part, or start it anew (warm_start: false)."
                    )
            return self.parts[name]
        self.part_specs[name] = {"kind": kind, **options}
        self.parts[name] = _make_part(self, kind, options).to(self.device)
        return self.parts[name]

    def ensure_target(self, name: str, *, fresh: bool = False) -> nn.Module:
        """The slowly moving copy "target_<name>" of a part, without gradients."""
        target = f"target_{name}"
        if target not in self.parts or fresh:
            spec = self.part_specs[name]
            self.part_specs[target] = {"copy_of": name}
            self.parts[target] = _make_part(self, spec["kind"], {k: v for k, v in spec.items() if k != "kind"})
            self.parts[target].to(self.device).load_state_dict(self.parts[name].state_dict())
            self.parts[target].requires_grad_(False)
        return self.parts[target]

    def ensure_copy(self, name: str) -> Policy:
        """The part `name`: a copy of the policy as it is now, without gradients. Frozen weights are shared."""
        shared = {id(p): p for p in self.policy.parameters() if not p.requires_grad}
        self.part_specs[name] = {"copy_of": "policy"}
        copied = copy.deepcopy(self.policy, shared).requires_grad_(False)
        for module in copied.modules():
            if isinstance(module, Encoder) and module.normalize == "running":
                module.frozen = True  # as it is now, statistics included
        self.parts[name] = copied
        return copied

    def encoder(self, keys: Sequence[str] | None = None) -> Features:
        """A fresh encoder for a new part: of what the policy reads, its own way (`make_encoder`), or of these keys."""
        if keys is not None:
            return Encoder(self.spaces.observation, keys=keys, rng=self.rng)
        own = self.policy.make_encoder(rng=self.rng)
        return Encoder(self.spaces.observation, rng=self.rng) if own is None else own

    def normalizers(self) -> list[Encoder]:
        """Encoders that would take statistics of further data."""
        return [m for m in self.modules() if isinstance(m, Encoder) and m.waits]


def _make_part(agent: Agent, kind: str, options: Mapping[str, Any]) -> nn.Module:
    makers: dict[str, Callable[..., nn.Module]] = {
        "critic": lambda judges="action", **o: critics.Critic(
            agent.encoder(), agent.decision_space(judges), rng=agent.rng, **o
        ),
        "action_values": lambda **o: critics.ActionValues(agent.encoder(), agent.spaces.action, rng=agent.rng, **o),
        "value": lambda keys=None, **o: critics.Value(agent.encoder(keys), rng=agent.rng, **o),
        "density": lambda **o: critics.Density(agent.encoder(), agent.spaces.action, rng=agent.rng, **o),
        "temperature": critics.Temperature,
        "return_scale": critics.ReturnScale,
    }
    if kind not in makers:
        raise UserError(f"unknown kind of part {kind!r}; {nearest(kind, makers)}")
    return makers[kind](**options)


def build_agent(spec: Spec, observation_space: Space, action_space: Space, rng: torch.Generator) -> Agent:
    """The agent of a recipe: {"id": "gaussian", "hidden": [256, 256]}, or an adapter {"id": "residual", "base": {...}}.

    Raises:
        ValueError: unknown id or option (with the nearest known one), or spaces that the policy cannot serve.
    """
    policy = build_policy(spec, observation_space, action_space, rng)
    return Agent(policy, Spaces(observation_space, policy.chunk.space(action_space)), rng=rng)


def wrap_policy(id: str, agent: Agent, rng: torch.Generator, **options: Any) -> Adapter:
    """A new adapter policy around a copy of the agent's trained policy, which becomes its base.

    Args:
        id: of an `Adapter`, e.g. "residual".
        agent: whose policy becomes the base.
        rng: draws the adapter's new weights.
        options: of the adapter, without `base`.
    """
    if not issubclass(registry.find("agent", id), Adapter):
        raise UserError(f"agent {id!r} cannot be put around another policy: it takes no base (residual does)")
    spec = {"id": id, "base": agent.policy.spec, **options}
    policy = build_policy(spec, agent.spaces.observation, agent.spaces.action, rng)
    assert isinstance(policy, Adapter)
    policy.load_base(agent.policy)
    return policy.to(agent.device)
