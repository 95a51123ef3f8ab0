"""Small things about tensors: observations as tensors, targets that follow slowly."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from embodied_rft.data import Tree


@torch.no_grad()
def polyak(target: nn.Module, online: nn.Module, tau: float) -> None:
    """Move target by tau (online - target) (Lillicrap et al. 2015, DDPG, algorithm 1); buffers are copied."""
    pairs = ((t.data, o.data) for t, o in zip(target.parameters(), online.parameters(), strict=True) if t is not o)
    moving, towards = zip(*pairs, strict=True)  # frozen weights are shared, they stay
    torch._foreach_lerp_(moving, towards, tau)
    for old, new in zip(target.buffers(), online.buffers(), strict=True):
        old.copy_(new)


def as_tensors(observation: Tree, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """A tree of arrays as tensors: floats become float32, integers stay; whatever is no array is left out."""
    tensors = {}
    for key, value in observation.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            value = torch.from_numpy(np.ascontiguousarray(value))
        if isinstance(value, Tensor):
            tensors[key] = value.to(device, torch.float32) if value.is_floating_point() else value.to(device)
    return tensors
