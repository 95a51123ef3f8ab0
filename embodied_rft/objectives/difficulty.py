"""What is harder counts more: advantages weighted by something that the environment tells of an episode.

Boundary: pure functions of numbers of episodes; who tells them says `buffer.streams`. Legend: S episodes.
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import PositiveFloat
from pydantic.dataclasses import dataclass
from torch import Tensor

from embodied_rft.names import UserError
from embodied_rft.options import STRICT


@dataclass(config=STRICT, kw_only=True, frozen=True)
class Difficulty:
    """How hard an episode is: {stream: box/target, power: -1} counts small elements more."""

    stream: (
        str  # of `buffer.streams`, its sum over the episode: a positive number such as the size of what is looked for
    )
    power: float = -1.0  # of that number; -1: its inverse
    largest: PositiveFloat = 4.0  # weight, where 1 is the mean of all that is read at once

    def __post_init__(self) -> None:
        if not self.power:
            raise UserError("difficulty.power 0 weighs all alike: leave difficulty out")


def weights(number: np.ndarray, config: Difficulty) -> Tensor:
    """Weights [S] of episodes: number^power, of mean 1, at most `largest` (Zhou et al. 2025, GUI-G1, section 4.3).

    Raises:
        ValueError: a number is not positive, or unknown.
    """
    if not (number > 0).all():  # NaN included
        worst = number[~(number > 0)][0]
        raise UserError(f"difficulty: stream {config.stream!r} is {worst} in an episode; expected a number above 0")
    weight = number.astype(np.float64) ** config.power
    return torch.from_numpy(np.minimum(weight / weight.mean(), config.largest).astype(np.float32))
