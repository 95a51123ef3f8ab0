"""Stages that hold stages."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import NonNegativeInt
from pydantic.dataclasses import dataclass

from embodied_rft.options import STRICT, Stages, StageSpec
from embodied_rft.registry import register
from embodied_rft.stages.base import Stage


@register("stage", "repeat")
class Repeat(Stage):
    """Runs its stages `times` times in a row."""

    @dataclass(config=STRICT, kw_only=True)
    class Config:
        """How often, and what."""

        times: NonNegativeInt  # how often
        stages: Stages  # what is repeated

    def expand(self) -> Iterator[tuple[tuple[int, ...], list[StageSpec]]]:
        """The body once for every round, each round under a path of its own."""
        for round in range(self.config.times):
            yield (*self.path, round), self.config.stages
