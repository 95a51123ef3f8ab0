"""Oracles of the text tasks: what a perfect student would reply, with a knob for how often it is wrong.

They read nothing but the prompt. Found by id, or under the id of the environment that they solve.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from embodied_rft.options import check_share
from embodied_rft.registry import register


@register("demonstrator", "text_sum", "embodied_rft/TextSum-v0")
class SumDemonstrator:
    """Adds the numbers in the prompt.

    Args:
        noise: share of replies that are off by one, in [0, 1].
    """

    def __init__(self, *, noise: float = 0.0) -> None:
        self.noise = check_share("noise", noise, "wrong replies")

    def act(self, observation: Mapping[str, Any], rng: np.random.Generator) -> list[str]:
        """One reply for each of N prompts; `rng` is drawn from only if there is noise."""
        sums = np.array([sum(map(int, re.findall(r"\d+", text))) for text in observation["prompt"]])
        if self.noise:
            sums = sums + (rng.random(len(sums)) < self.noise)
        return [str(total) for total in sums]
