"""Curricula: tasks are played as often as their outcome is uncertain, by a value that reads them, or by their record.

Legend: K episodes that begin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import Field as Option
from pydantic.dataclasses import dataclass

from embodied_rft.data import Tree
from embodied_rft.experience.curriculum import Curriculum, Foresee
from embodied_rft.names import UserError, nearest
from embodied_rft.options import STRICT, validate_plugin_config
from embodied_rft.registry import find, register

Chance = Annotated[float, Option(gt=0, le=1)]


def informative(success: np.ndarray, least: float) -> np.ndarray:
    """[K]: 4 p (1 - p), the variance of success as a share of the largest that there is, and not below `least`."""
    return np.asarray(np.maximum(least, 4 * success * (1 - success)))


@dataclass(config=STRICT, kw_only=True)
class ValueCurriculumConfig:
    """Options of curriculum `value`."""

    least: Chance = 0.1  # chance of a task whose outcome is certain


@register("curriculum", "value")
class ValueCurriculum(Curriculum):
    """By what the objective's value promises of a task (DigiRL's instruction value), which it may never have met."""

    Config = ValueCurriculumConfig
    foresees = True

    def __init__(self, config: ValueCurriculumConfig) -> None:
        self.config = config

    def chances(self, names: Sequence[str], observation: Tree, foresee: Foresee) -> np.ndarray:
        """See the class."""
        return informative(foresee(observation), self.config.least)


@dataclass(config=STRICT, kw_only=True)
class RecordCurriculumConfig:
    """Options of curriculum `record`."""

    task: str = "task"  # observation key of a text that names the task, among few that come again
    least: Chance = 0.1  # chance of a task whose outcome is certain
    decay: Annotated[float, Option(gt=0, le=1)] = 0.98  # what an outcome counts after each further one of its task


@register("curriculum", "record")
class RecordCurriculum(Curriculum):
    """By the share of successes of each task so far, old ones fading; of one that was never played it is a half."""

    Config = RecordCurriculumConfig

    def __init__(self, config: RecordCurriculumConfig) -> None:
        self.config = config
        self.record: dict[str, tuple[float, float]] = {}  # weights of successes and of failures, by task

    def names(self, observation: Tree) -> Sequence[str]:
        """What the key says."""
        found = observation.get(self.config.task)
        if not isinstance(found, list | tuple):
            raise UserError(
                f"curriculum record needs a text {self.config.task!r} that names the task; "
                f"{nearest(self.config.task, observation)}"
            )
        return found

    def chances(self, names: Sequence[str], observation: Tree, foresee: Foresee) -> np.ndarray:
        """See the class."""
        return informative(np.array([self.success(name) for name in names]), self.config.least)

    def success(self, name: str) -> float:
        """The share of successes, as if one of each had been seen before (Laplace)."""
        won, lost = self.record.get(name, (0.0, 0.0))
        return (won + 1) / (won + lost + 2)

    def hear(self, names: Sequence[str], success: np.ndarray) -> None:
        """Count."""
        for name, now in zip(names, success.tolist(), strict=True):
            won, lost = (self.config.decay * each for each in self.record.get(name, (0.0, 0.0)))
            self.record[name] = (won + now, lost + (not now))

    def state_dict(self) -> dict[str, Any]:
        """The record."""
        return {"record": {name: list(weights) for name, weights in self.record.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.record = {name: (float(won), float(lost)) for name, (won, lost) in state["record"].items()}


def make_curriculum(spec: Mapping[str, Any]) -> Curriculum:
    """The curriculum that {"id": "record", "task": "message"} describes."""
    options = dict(spec)
    id = str(options.pop("id", ""))
    made: Curriculum = find("curriculum", id)(validate_plugin_config("curriculum", id, options))
    return made
