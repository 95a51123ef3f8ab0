"""Who answers what the environment's own expert advises: demonstrations on screens and pages.

Boundary: reads "expert" of observations; what an answer looks like knows the environment, of which one is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from embodied_rft.envs.serving import make_batch
from embodied_rft.envs.turns.telling import EXPERT
from embodied_rft.names import UserError
from embodied_rft.options import check_share
from embodied_rft.pools.making import find_spec
from embodied_rft.registry import register

ADVISED = ("ClickScreen", "Desk", "Grounding", "RecordedSteps")


@runtime_checkable
class Guesses(Protocol):
    """A batch that knows what answers look like."""

    def guess(self, rng: np.random.Generator) -> str:
        """Any answer, in the form that is asked for."""


@register("demonstrator", "advised", *(f"embodied_rft/{name}-v0" for name in ADVISED))
class Advised:
    """Answers what the environment's expert advises; reads "expert", which must be shown.

    Args:
        noise: share of answers that are any other, in [0, 1]: a click, a box anywhere.
        environment: id and options of the environment, told by whoever makes demonstrators.
    """

    def __init__(self, *, noise: float = 0.0, environment: Mapping[str, Any]) -> None:
        self.noise = check_share("noise", noise, "answers that are any other")
        made = make_batch(**find_spec(environment["id"]).kwargs | dict(environment["options"]), num_envs=1)
        assert isinstance(made, Guesses)
        self.guesses: Guesses = made

    def act(self, observation: Mapping[str, Any], rng: np.random.Generator) -> list[str]:
        """One answer for each of N observations; `rng` is drawn from only if there is noise."""
        if EXPERT not in observation:
            raise UserError("the demonstrator reads 'expert': set env.options.expert to true")
        said = list(observation[EXPERT])
        if self.noise:
            wrong = rng.random(len(said)) < self.noise
            said = [self.guesses.guess(rng) if w else one for one, w in zip(said, wrong, strict=True)]
        return said
