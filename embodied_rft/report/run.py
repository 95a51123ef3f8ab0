"""What a run folder holds, read for people: whatever is damaged is left out and named, the rest is shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from embodied_rft.names import UserError
from embodied_rft.runs.folder import RunFolder
from embodied_rft.runs.log import read_records


@dataclass
class Run:
    """What the folder holds."""

    folder: RunFolder
    recipe_text: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)
    verdicts: list[dict[str, Any]] = field(default_factory=list)  # the recipe's evaluations on sheet 0, in order
    curve: list[dict[str, Any]] = field(default_factory=list)  # its evaluations on other sheets
    later: list[dict[str, Any]] = field(default_factory=list)  # made by `erft eval` afterwards
    metrics: list[dict[str, Any]] = field(default_factory=list)
    messages: str = ""
    unavailable: dict[str, Any] = field(default_factory=dict)  # why there is no video
    incidents: dict[str, Any] = field(default_factory=dict)  # what went wrong in the environments

    damaged: list[str] = field(default_factory=list)  # files that cannot be read; they are left out

    @classmethod
    def read(cls, folder: RunFolder) -> Run:
        """Everything that is there and whole; ValueError if the folder is not a run's."""
        if not folder.holds_run():
            raise UserError(
                f"{folder} is not a run folder: it has no {folder.recipe.name}. "
                "Give the folder that `erft train` named."
            )
        files = _Files(folder.path)
        paths = folder.evaluation_files()
        evaluations = [e for path in paths if (e := files.read(path, json.loads, None, _is_evaluation)) is not None]
        evaluations.sort(key=lambda e: e.get("wall_seconds", 0))
        during = [e for e in evaluations if "environment" not in e]
        return cls(
            folder,
            folder.recipe.read_text("utf-8", "replace") if folder.recipe.exists() else "",
            files.read(folder.recipe, yaml.safe_load, {}, _is_mapping),
            files.read(folder.facts, json.loads, {}, _is_mapping),
            files.read(folder.stages, json.loads, [], _are_records),
            [e for e in during if e.get("sheet", 0) == 0],
            [e for e in during if e.get("sheet", 0) != 0],
            [e for e in evaluations if "environment" in e],
            files.read(folder.metrics, lambda _: read_records(folder.metrics), [], _are_mappings),
            files.read(folder.messages, str, "", lambda _: True),
            files.read(folder.no_videos, json.loads, {}, _is_mapping),
            files.read(folder.incidents, json.loads, {}, _is_mapping),
            damaged=files.damaged,
        )

    def about(self, film: Path) -> dict[str, Any]:
        """What is known of a film: seed, success, stage."""
        files = _Files(self.folder.path)
        found: dict[str, Any] = files.read(film.with_suffix(".json"), json.loads, {}, _is_mapping)
        self.damaged += files.damaged
        return found

    @property
    def told(self) -> bool:
        """Whether the environment said anything about success; if not, returns are all there is."""
        return any(e.get("told", True) for e in self.verdicts)

    @property
    def paired(self) -> bool:
        """Whether the first and the last verdict are on the same initial states."""
        first, last = self.verdicts[0], self.verdicts[-1]
        same = first.get("seeds") == last.get("seeds") and first.get("results") and last.get("results")
        return len(self.verdicts) > 1 and bool(same) and len(first["results"]) == len(last["results"])


class _Files:
    """Reads files of a run folder; what is damaged is noted and left out: it must not hide the rest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.damaged: list[str] = []

    def read(self, path: Path, parse: Callable[[str], Any], default: Any, valid: Callable[[Any], bool]) -> Any:
        try:
            content = parse(path.read_text(encoding="utf-8"))
            if valid(content):
                return content
            reason = "something else than expected"
        except FileNotFoundError:
            return default
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())[:200]
        self.damaged.append(f"{path.relative_to(self.folder)}: {reason}")
        return default


def _is_mapping(content: Any) -> bool:
    return isinstance(content, dict)


def _are_mappings(content: Any) -> bool:
    return isinstance(content, list) and all(isinstance(each, dict) for each in content)


def _are_records(content: Any) -> bool:
    numbers = ("decisions", "updates", "seconds")
    return _are_mappings(content) and all(
        isinstance(each.get("path", []), list)
        and isinstance(each.get("metrics") or {}, dict)
        and all(isinstance(each.get(name) or 0, (int, float)) for name in numbers)
        for each in content
    )


def _is_evaluation(content: Any) -> bool:
    numbers = ("success", "low", "high", "decisions", "wall_seconds")
    return (
        isinstance(content, dict)
        and isinstance(content.get("episodes"), int)
        and content["episodes"] > 0
        and all(isinstance(content.get(name, 0), (int, float)) for name in numbers)
        and all(name in content for name in numbers[:3])
        and all(isinstance(content.get(name, []), list) for name in ("seeds", "results", "returns", "lengths"))
    )
