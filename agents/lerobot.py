"""`lerobot`: a policy object with LeRobot's interface as a frozen base (`residual`, `queued` or evaluation as it is).

Any object with `predict_action_chunk(batch)` or `select_action(batch)` and `reset()` will do; LeRobot itself is
optional and imported only to find the class of a policy folder that names none. Boundary: names and units are
translated here; nothing is trained.

Legend: N environments, B rows, H horizon, A action dimensions.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from pydantic import Field as Option
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from embodied_rft.agent import observe
from embodied_rft.agents.parts import STRICT, freeze
from embodied_rft.chunking import step_space
from embodied_rft.data import Decisions, Field, Tree
from embodied_rft.registry import nearest, register


@dataclass(config=STRICT, kw_only=True)
class LeRobotConfig:
    """Options of a `lerobot` agent."""

    path: str  # folder (config.json, model.safetensors) or hub id, given to from_pretrained
    policy: str | None = None  # "package.module:Class"; None: LeRobot's class for the "type" in config.json
    horizon: int = 1  # H, steps of a predicted chunk that are used
    execute: int | None = None  # steps until the next prediction; None: all H
    # From our observation keys to the policy's: state vectors as they are, images as float [B, C, H, W] in [0, 1].
    keys: dict[str, str] = Option(default_factory=lambda: {"observation": "observation.state"})
    task: str | None = None  # instruction given with every observation, for policies that read language


@register("agent", "lerobot")
class LeRobotPolicy(nn.Module):
    """Acts as the wrapped policy does, always greedily; its log-probability is 0, because nothing is known of it.

    Queues inside the wrapped policy are not used: a chunk is predicted for every decision (or, where there is only
    `select_action`, the policy is reset before each call), so nothing is remembered between decisions.

    Example: {"id": "lerobot", "path": "my_robot/act", "horizon": 50, "execute": 10}.
    """

    Config = LeRobotConfig
    num_units = 1
    stochastic = False
    trace_fields: dict[str, Field] = {}  # noqa: RUF012
    spec: dict[str, Any]

    def __init__(
        self, config: LeRobotConfig, *, observation_space: gym.Space, action_space: gym.Space, rng: torch.Generator
    ) -> None:
        super().__init__()
        space = step_space(action_space, horizon=config.horizon)
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            raise ValueError(f"action space {space}: a Box of shape (A,) is expected")
        boxes = observation_space.spaces if isinstance(observation_space, gym.spaces.Dict) else {"observation": None}
        for key in config.keys:
            if key not in boxes:
                raise ValueError(f"keys of agent 'lerobot': there is no observation {key!r}; {nearest(key, boxes)}")
        self.config, self.horizon, self.action_dim = config, config.horizon, space.shape[0]
        self.execute = config.horizon if config.execute is None else config.execute
        if not 1 <= self.execute <= self.horizon:
            raise ValueError(f"execute {self.execute} of a chunk of {self.horizon}: 1 <= execute <= horizon")
        self.policy: Any = load_policy(config.path, config.policy)
        if self.horizon > 1 and not hasattr(self.policy, "predict_action_chunk"):
            raise ValueError(f"{type(self.policy).__name__} has no predict_action_chunk: set horizon to 1")
        if isinstance(self.policy, nn.Module):
            freeze(self.policy)

    def translate(self, observation: Mapping[str, Tensor]) -> dict[str, Any]:
        """Our tree of tensors [B, ...] as the batch that LeRobot's policies read."""
        batch: dict[str, Any] = {}
        for ours, theirs in self.config.keys.items():
            value = observation[ours]
            batch[theirs] = value.permute(0, 3, 1, 2).float() / 255 if value.dtype == torch.uint8 else value.float()
        if self.config.task is not None:
            batch["task"] = [self.config.task] * len(value)
        return batch

    @torch.no_grad()
    def mode(self, observation: Tree) -> Tensor:
        """The predicted chunk [B, H * A].

        Raises:
            ValueError: the prediction has another shape than the environment's actions.
        """
        batch = self.translate(observation)
        if hasattr(self.policy, "predict_action_chunk"):
            chunk = self.policy.predict_action_chunk(batch)[:, : self.horizon]
        else:
            self.policy.reset()
            chunk = self.policy.select_action(batch)[:, None]
        if tuple(chunk.shape[1:]) != (self.horizon, self.action_dim):
            raise ValueError(
                f"{type(self.policy).__name__} predicts {tuple(chunk.shape[1:])} (steps, action dimensions); this "
                f"agent needs ({self.horizon}, {self.action_dim}). Was the policy trained for another robot?"
            )
        return chunk.float().flatten(1)

    def act(self, observation: Tree, *, greedy: bool = False, rng: torch.Generator | None = None) -> Decisions:
        """N decisions for observation arrays [N, ...]; actions are [N, H * A]."""
        holder = self if next(self.parameters(), None) is not None else nn.Linear(1, 1)  # only its device is looked at
        action = self.mode(observe(observation, holder)).cpu().numpy()
        return Decisions(action, np.zeros((len(action), 1), dtype=np.float32))

    def log_prob(self, observation: Tree, action: Tensor, trace: Tree) -> tuple[Tensor, Tensor]:
        """Zeros [B, 1]: the wrapped policy has no log-probability."""
        zeros = torch.zeros(len(action), 1, device=action.device)
        return zeros, zeros


def load_policy(path: str, policy: str | None) -> Any:
    """The policy object of a folder or hub id, by `from_pretrained` of its class.

    Raises:
        ValueError: the class cannot be found, has not the interface, or LeRobot would be needed and is not installed.
    """
    cls = import_class(policy) if policy is not None else lerobot_class(path)
    if not hasattr(cls, "from_pretrained"):
        raise ValueError(f"{cls!r} has no from_pretrained: it does not follow LeRobot's policy interface")
    loaded = cls.from_pretrained(path)
    if not hasattr(loaded, "predict_action_chunk") and not (
        hasattr(loaded, "select_action") and hasattr(loaded, "reset")
    ):
        raise ValueError(f"{cls.__name__} has neither predict_action_chunk nor select_action and reset")
    return loaded


def import_class(name: str) -> Any:
    """The class that "package.module:Class" names."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"policy {name!r} cannot be imported ({error}); expected 'package.module:Class'") from None


def lerobot_class(path: str) -> Any:
    """LeRobot's own class for the "type" that the folder's config.json names."""
    file = Path(path) / "config.json"
    try:
        factory = importlib.import_module("lerobot.policies.factory")
    except ImportError:
        raise ValueError(
            f"the policy {path!r} names no class of its own and LeRobot is not installed: install it (pip install "
            "lerobot) or set policy: 'package.module:Class' to any class with LeRobot's interface"
        ) from None
    if not file.is_file():
        raise ValueError(f"{file} does not exist: give a local folder, or set policy to the class of the hub id")
    kind = json.loads(file.read_text()).get("type")
    if kind is None:
        raise ValueError(f"{file} has no 'type': set policy: 'package.module:Class'")
    return factory.get_policy_class(kind)
