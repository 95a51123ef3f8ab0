"""The order in which the stages of a recipe run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from embodied_rft import registry
from embodied_rft.options import StageSpec


def walk(stages: list[StageSpec], prefix: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Any]]:
    """All leaf stages in the order they run; a stage that holds stages says how (`expand`)."""
    for index, spec in enumerate(stages):
        path = (*prefix, index)
        stage = registry.find("stage", spec.word)(spec.config, path)
        stage.word = spec.word
        inside = stage.expand()
        if inside is None:
            yield path, stage
        else:
            for inner_path, inner in inside:
                yield from walk(inner, inner_path)
