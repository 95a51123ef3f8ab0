"""What a policy is, and how one is made by id."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import torch
from torch import nn

from embodied_rft import registry
from embodied_rft.data import Tree
from embodied_rft.device import device_of
from embodied_rft.names import UserError
from embodied_rft.networks.tensors import as_tensors
from embodied_rft.networks.trainable import retune
from embodied_rft.options import validate_plugin_config
from embodied_rft.pools.spaces import check_action_space

Spec = Mapping[str, Any]


def build_policy(spec: Spec, observation_space: gym.Space, action_space: gym.Space, rng: torch.Generator) -> nn.Module:
    """The policy that {"id": ..., **options} describes, with weights drawn from `rng`."""
    if "id" not in spec:
        raise UserError(f"agent {dict(spec)!r} has no id; known: {', '.join(registry.known('agent'))}")
    options = {k: v for k, v in spec.items() if k not in ("id", "tuned")}
    check_action_space(action_space)
    config = validate_plugin_config("agent", spec["id"], options)
    policy = registry.find("agent", spec["id"])(
        config, observation_space=observation_space, action_space=action_space, rng=rng
    )
    policy.spec = {k: v for k, v in spec.items() if k != "tuned"}
    if "tuned" in spec:
        retune(policy, spec["tuned"], rng=rng)
    return policy


def require_rng(rng: torch.Generator | None) -> torch.Generator:
    """The generator, or a ValueError: randomness never comes from the global one."""
    if rng is None:
        raise UserError("a random decision needs rng=torch.Generator(...); pass one, or greedy=True")
    return rng


def observe(tree: Tree, policy: nn.Module) -> dict[str, Any]:
    """Observation arrays [N, ...] as tensors on the policy's device; texts stay what they are."""
    return {**tree, **as_tensors(tree, device_of(policy))}
