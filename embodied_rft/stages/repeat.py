"""Stages that hold stages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import NonNegativeInt
from pydantic.dataclasses import dataclass

from embodied_rft.options import STRICT, Stages, StageSpec
from embodied_rft.registry import register


@register("stage", "repeat")
class Repeat:
    """Runs its stages `times` times in a row."""

    word: str = ""

    @dataclass(config=STRICT, kw_only=True)
    class Config:
        """How often, and what."""

        times: NonNegativeInt  # how often
        stages: Stages  # what is repeated

    def __init__(self, config: Any, path: tuple[int, ...]) -> None:
        self.config, self.path = config, path

    def expand(self) -> Iterator[tuple[tuple[int, ...], list[StageSpec]]]:
        """The body once for every round, each round under a path of its own."""
        for round in range(self.config.times):
            yield (*self.path, round), self.config.stages
