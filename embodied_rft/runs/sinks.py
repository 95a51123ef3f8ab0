"""Where log lines go beside metrics.jsonl: a CSV table, TensorBoard, Weights & Biases, and what third parties register.

All are derived: they may be lost, and are made anew from the lines. The x-axis is decisions; numbers of lines that
learn without deciding (`pretrain`) go under "offline/" against updates. Knows log lines, nothing of training.
"""

from __future__ import annotations

import csv
import inspect
import io
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

from embodied_rft import registry
from embodied_rft.evaluation.samples import COLUMNS, Sample, as_markdown, pick, rows_of
from embodied_rft.files import write_atomically
from embodied_rft.names import UserError
from embodied_rft.runs.folder import RunFolder
from embodied_rft.runs.yaml_tree import dump_plain

OFFLINE = "offline/"  # before the names of numbers that are drawn against updates
NOT_FINITE = ("NaN", "Infinity", "-Infinity")  # as JSON lines and tables have them

Records = Callable[[], Sequence[Mapping[str, Any]]]


@registry.contract("logger")
class Sink(ABC):
    """A further place for log lines; register a class derived from this with `@register("logger", id)`.

    It is made as `cls(folder, step=last_step, **options)`; with a parameter `recipe` it is given the resolved recipe as
    plain data. A resumed run starts at an earlier step than it was killed at and repeats the lines in between exactly,
    so writing a step again changes nothing.
    """

    @abstractmethod
    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Take one line: counters, labels and finite numbers; `step` is its number."""

    def show_samples(self, name: str, samples: Sequence[Sample], decisions: int) -> None:  # noqa: B027  (a default)
        """Take what agents that write text said in an evaluation (see `samples`); nothing by default."""

    @abstractmethod
    def close(self) -> None:
        """Flush and give back what is held."""


class Axis:
    """Which numbers of a line are drawn against what: `Axis().points(record)` is ({name: number}, x)."""

    def __init__(self) -> None:
        self.decisions = self.updates = 0

    def points(self, record: Mapping[str, Any]) -> tuple[dict[str, float], int]:
        """Against decisions; against updates, under "offline/", where only those went on since the line before."""
        decisions, updates = int(record.get("decisions", 0)), int(record.get("updates", 0))
        offline = updates > self.updates and decisions == self.decisions
        self.decisions, self.updates = decisions, updates
        counters = ("decisions", "updates")
        values = {n: v for n, v in record.items() if isinstance(v, int | float) and n not in counters}
        if offline:
            return {OFFLINE + n: v for n, v in values.items() if not n.startswith("wall/")}, updates
        return values, decisions


class Table(Sink):
    """metrics.csv: derived from the JSON lines, written anew when a resume or a new metric changes its past."""

    def __init__(self, path: Path, records: Records) -> None:
        self.path, self.records = path, records
        self._file: BinaryIO | None = None
        self._rebuild()

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """One row; a new column writes the whole table."""
        if self._file is None or any(name not in self.columns for name in record):
            self.close()
            self._rebuild()  # the JSON lines have this record already
            return
        self._file.write(self._text([record]))

    def _rebuild(self) -> None:
        records = self.records()
        self.columns = list(dict.fromkeys(name for record in records for name in record))
        head = self._text([dict(zip(self.columns, self.columns, strict=True))]) if self.columns else b""
        write_atomically(self.path, head + self._text(records))
        self._file = open(self.path, "ab", buffering=0)

    def _text(self, records: Sequence[Mapping[str, Any]]) -> bytes:
        text = io.StringIO(newline="")
        csv.DictWriter(text, self.columns).writerows({n: cell(v) for n, v in record.items()} for record in records)
        return text.getvalue().encode("utf-8", "backslashreplace")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def cell(value: object) -> object:
    """A value as a spreadsheet may open it: a text that it would take for a formula begins with an apostrophe."""
    if isinstance(value, list):
        return ".".join(map(str, value))
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) and value not in NOT_FINITE:
        return f"'{value}"
    return value


class TensorBoardSink(Sink):
    """Scalars and samples in tensorboard/; written anew from the lines when a run is continued."""

    def __init__(self, folder: RunFolder, *, records: Records, recipe: Mapping[str, Any] | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        place = folder.tensorboard
        if place.is_symlink():
            raise UserError(f"{place} is a symbolic link: what lies there would be replaced. Remove the link.")
        shutil.rmtree(place, ignore_errors=True)
        self.writer, self.axis, self._stage = SummaryWriter(str(place)), Axis(), None
        if recipe is not None:
            self.writer.add_text("recipe", "    " + dump_plain(recipe).replace("\n", "\n    "), 0)
        for record in records():
            self.write(0, record)

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Every number of the line, and the name of a stage that begins."""
        points, x = self.axis.points(record)
        for name, value in points.items():
            self.writer.add_scalar(name, value, x)
        if (stage := record.get("stage_name")) and stage != self._stage:
            self._stage = stage
            self.writer.add_text("stage", f"    {stage}", int(record["decisions"]))

    def show_samples(self, name: str, samples: Sequence[Sample], decisions: int) -> None:
        """A table of best, worst and random ones."""
        self.writer.add_text(f"samples/{name}", as_markdown(samples), decisions)

    def close(self) -> None:
        """Flush."""
        self.writer.close()


class WandbSink(Sink):
    """Weights & Biases. The run's id is kept in the folder, so that a resumed run goes on in the same one."""

    def __init__(
        self,
        folder: RunFolder,
        *,
        step: int,
        mode: Literal["offline", "online"],
        project: str,
        recipe: Mapping[str, Any] | None,
    ) -> None:
        import wandb

        path = folder.wandb_id
        if not path.exists():
            write_atomically(path, uuid.uuid4().hex)
        self.run = wandb.init(
            project=project,
            name=folder.path.resolve().name,
            id=path.read_text(encoding="utf-8").strip(),
            dir=str(folder),
            mode=mode,
            config=None if recipe is None else dict(recipe),
            resume="allow" if mode == "online" else None,  # offline parts of one id are joined when they are synced
            settings=wandb.Settings(silent=True),
        )
        self.run.define_metric("*", step_metric="decisions")
        self.run.define_metric(f"{OFFLINE}*", step_metric="updates")
        self.axis, self.step = Axis(), step

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Every number of the line, its counters and the name of its stage."""
        points, _ = self.axis.points(record)
        labels = {name: record[name] for name in ("decisions", "updates", "stage_name") if name in record}
        self.step = step
        self.run.log({**points, **labels}, step=step)

    def show_samples(self, name: str, samples: Sequence[Sample], decisions: int) -> None:
        """A table of best, worst and random ones, with the next line."""
        import wandb

        table = wandb.Table(columns=list(COLUMNS), data=[list(row) for row in rows_of(pick(samples))])
        self.run.log({f"samples/{name}": table, "decisions": decisions}, step=self.step + 1)

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()


def make_plugin_sink(
    id: str, options: Mapping[str, Any], folder: Path, *, step: int, recipe: Mapping[str, Any] | None
) -> Sink:
    """The sink that a third party registered under `id`."""
    cls = registry.find("logger", id)
    given = {"recipe": recipe} if "recipe" in inspect.signature(cls).parameters else {}
    sink: Sink = cls(folder, step=step, **given, **options)
    return sink
