"""Arrays served as environments: what single and vector forms of a batch share."""

from __future__ import annotations

from typing import Any

import numpy as np

from embodied_rft.names import UserError


def check_render_mode(mode: str | None) -> str | None:
    """The mode, or ValueError if it is neither None nor "rgb_array"."""
    if mode not in (None, "rgb_array"):
        raise UserError(f"unknown render_mode {mode!r}; expected None or 'rgb_array'")
    return mode


def check_mask(mask: Any, num_envs: int) -> np.ndarray:
    """`options["reset_mask"]` [N] bool as Gymnasium defines it. Raises ValueError otherwise."""
    if not isinstance(mask, np.ndarray) or mask.shape != (num_envs,) or mask.dtype != np.bool_ or not mask.any():
        raise UserError(
            f"options['reset_mask'] is {mask!r}; expected a bool array of shape ({num_envs},) with at least one True"
        )
    return mask


def spread_seeds(seed: Any, num_envs: int) -> list[int | None]:
    """One seed for each environment from Gymnasium's forms: None, one number s (s, s+1, ...), or one for each."""
    if seed is None:
        return [None] * num_envs
    if isinstance(seed, (int, np.integer)):
        return [int(seed) + i for i in range(num_envs)]
    seeds = [None if s is None else int(s) for s in seed]
    if len(seeds) != num_envs:
        raise UserError(f"{len(seeds)} seeds were given for {num_envs} environments")
    return seeds
