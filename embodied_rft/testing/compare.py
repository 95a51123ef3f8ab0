"""What both checkers use: random actions, equality of whatever an environment or a policy says."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from embodied_rft.data import Space


def random_actions(space: Space, count: int) -> list[Any]:
    """`count` of them, always the same."""
    twin = copy.deepcopy(space)
    twin.seed(0)
    return [twin.sample() for _ in range(count)]


def same(a: Any, b: Any) -> bool:
    """Whether two nested values are equal; NaN equals nothing."""
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(np.array_equal(a, b, equal_nan=False)) if not isinstance(a, str | type(None)) else a == b


def generator(seed: int) -> torch.Generator:
    """Of this seed."""
    return torch.Generator().manual_seed(seed)
