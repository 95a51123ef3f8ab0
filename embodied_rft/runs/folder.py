"""A run folder: what its files are called, and who may write them. Nothing else spells these names.

What lies in it:

    recipe.yaml             the resolved recipe, defaults included; it names files below `inputs/`
    run.json                command, commit, machine, versions of the run's start; optional
    run.log                 what was said on the terminal; optional
    metrics.jsonl           one line a measurement, see `log`; metrics.csv, tensorboard/ and W&B derive from it
    stages.json             [{"path", "word", "title", "decisions", "updates", "seconds", "metrics": {}}]
    incidents.json          {"counts", "latest"}: what went wrong in the environments; optional
    checkpoints/            the newest two, and best/, the best policy of the learning curve; see `checkpoint`
    evaluations/*.json      {"name", "stage", "sheet", "seeds", "results", "episodes", "successes", "success", "low",
                            "high", "decisions", "wall_seconds"}; sheet 0 is the verdict, others draw the curve;
                            those of `erft eval` have "environment" too; "samples" names a file beside it with what
                            was said
    pictures/*.png          what agents that write text saw in samples that are shown, once each, by their content
    videos/*.mp4, *.gif     with {"seed", "success", "stage"} beside it in .json; or unavailable.json {"reason"}
    play/                   videos of `erft play`
    inputs/                 the files that the recipe names, after their content; plugins/: sources of plug-ins
    sb3/                    models of stable-baselines3
    ranks/1/                the folder of another process of the same run
    report.html             the report, and summary.json, its numbers for machines
    .lock                   held by the process that works in the folder
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embodied_rft.evaluation.panels import changed_tasks
from embodied_rft.evaluation.pictures import write_pictures
from embodied_rft.evaluation.samples import write_samples
from embodied_rft.files import write_json
from embodied_rft.names import UserError

if TYPE_CHECKING:
    from embodied_rft.evaluation.evaluate import Evaluation


class RunFolder(os.PathLike[str]):
    """Where the files of a run are: `RunFolder("runs/demo").metrics`; it can be used as the path itself."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path = Path(path)
        self.recipe = path / "recipe.yaml"
        self.facts = path / "run.json"
        self.messages = path / "run.log"
        self.metrics = path / "metrics.jsonl"
        self.table = path / "metrics.csv"
        self.tensorboard = path / "tensorboard"
        self.wandb_id = path / "wandb_id"
        self.stages = path / "stages.json"
        self.incidents = path / "incidents.json"
        self.checkpoints = path / "checkpoints"
        self.best = self.checkpoints / "best"
        self.evaluations = path / "evaluations"
        self.pictures = path / "pictures"
        self.videos = path / "videos"
        self.no_videos = self.videos / "unavailable.json"
        self.played = path / "play"
        self.inputs = path / "inputs"
        self.plugins = self.inputs / "plugins"
        self.models = path / "sb3"
        self.ranks = path / "ranks"
        self.report = path / "report.html"
        self.summary = path / "summary.json"
        self.lock = path / ".lock"

    def __fspath__(self) -> str:
        return str(self.path)

    __str__ = __fspath__

    def of_process(self, rank: int) -> RunFolder:
        """The folder of one of several processes: the run's own for the first, which speaks for all."""
        return RunFolder(self.ranks / str(rank)) if rank else self

    # --- reading -------------------------------------------------------------------------------------------------

    def holds_run(self) -> bool:
        """Whether a run was begun here."""
        return any(path.exists() for path in (self.recipe, self.checkpoints, self.metrics))

    def evaluation_files(self) -> list[Path]:
        """What was measured, a file each."""
        return sorted(self.evaluations.glob("[!.]*.json"))

    def samples_of(self, evaluation: dict[str, Any]) -> Path:
        """What was said in an evaluation, for `samples.read_samples`."""
        return self.evaluations / Path(str(evaluation["samples"])).name

    def films(self) -> list[Path]:
        """All videos of the run, in their order."""
        return sorted([*self.videos.glob("[!.]*.mp4"), *self.videos.glob("[!.]*.gif")], key=lambda path: path.name)

    # --- writing -------------------------------------------------------------------------------------------------

    def refuse_links(self) -> None:
        """A run writes its own files only: what a symbolic link leads to belongs to others.

        Raises:
            ValueError: names the link.
        """
        inside = (
            path for folder in (self.evaluations, self.pictures, self.videos, self.models) for path in folder.glob("*")
        )
        for path in (*self.path.iterdir(), *inside):
            if path.is_symlink() and not path.is_dir():
                raise UserError(f"{path} is a symbolic link: a run writes its own files only. Remove it.")

    def add_evaluation(
        self,
        slug: str,
        outcome: Evaluation,
        *,
        stage: Sequence[int],
        sheet: int,
        decisions: int,
        wall_seconds: float,
        panel: str,
        **facts: Any,
    ) -> None:
        """Write `evaluations/slug.json`, and what was said beside it.

        Args:
            slug: name of the file; one that is there is replaced.
            outcome: what was measured.
            stage: path of the stage whose policy it was.
            sheet: of the initial states.
            decisions: that the policy had learned from.
            wall_seconds: that the run had used until then.
            panel: which environments it was in (`panels.panel_of`): seeds that show other tasks than in an earlier
                evaluation of them are said in `outcome.changed`.
            facts: whatever else is known.
        """
        earlier = (_record(path) for path in self.evaluation_files() if path.stem != slug)
        outcome.changed = changed_tasks(outcome.tasks, panel, earlier)
        given = {
            "stage": list(stage),
            "sheet": sheet,
            "decisions": decisions,
            "wall_seconds": wall_seconds,
            "panel": panel,
        }
        content = outcome.to_json() | given | facts
        if outcome.samples:
            content["samples"] = f"{slug}.samples.jsonl"
            write_samples(self.samples_of(content), outcome.samples)
            write_pictures(self.pictures, outcome.pictures, room=0.5 if sheet else 1.0)  # verdicts find room
        write_json(self.evaluations / f"{slug}.json", content)

    def add_film(self, path: Path, *, seed: int, success: bool, stage: Sequence[int]) -> None:
        """Write beside a video what it shows."""
        write_json(path.with_suffix(".json"), {"seed": seed, "success": success, "stage": list(stage)})


def _record(path: Path) -> dict[str, Any]:
    """A record that was written earlier; empty if the file is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
