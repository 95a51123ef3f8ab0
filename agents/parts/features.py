"""What a value reads of a large model: the features that its policy computes, standardised, without gradient into it.

Legend: B rows, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from embodied_rft.data import Tree
from embodied_rft.networks.encoder import Features


class HasFeatures(Protocol):
    """A policy on a trunk."""

    def features(self, observation: Tree) -> Tensor:
        """What values are read from [B, H]."""


class FrozenFeatures(Features):
    """Features [B, H] of a policy, detached, so that a value costs one layer.

    Args:
        policy: whose they are.
        size: H.
    """

    def __init__(self, policy: HasFeatures, size: int) -> None:
        super().__init__()
        self.size = size
        self._policy: Callable[[], HasFeatures] = lambda: policy  # not a submodule: its weights are the policy's

    @torch.no_grad()
    def forward(self, observation: Tree) -> Tensor:
        """[B, H]."""
        return self._policy().features(observation)

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenFeatures:
        policy = self._policy()
        return FrozenFeatures(memo.get(id(policy), policy), self.size)  # of the copied policy where that is copied, too


def standardized(states: Tensor) -> Tensor:
    """Each state with mean 0 and variance 1, float32."""
    return nn.functional.layer_norm(states.float(), states.shape[-1:])
