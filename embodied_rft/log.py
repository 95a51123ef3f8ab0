"""Where a run's numbers go: JSON lines (the truth), CSV, TensorBoard, Weights & Biases, the terminal.

Every line holds the counters and the metrics; whatever depends on the clock has a key that begins with "wall/", so
all else can be compared bit for bit between a run that was killed and one that was not. `state_dict` remembers where
the file ended, and a resumed run cuts it there: no line is doubled, none is lost. Knows nothing of training.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

from embodied_rft import registry
from embodied_rft.checkpoint import write_atomically
from embodied_rft.console import Bar, Console, describe

METRICS, TABLE, MESSAGES = "metrics.jsonl", "metrics.csv", "run.log"


@dataclass
class LogConfig:
    """Which logs are written beside metrics.jsonl, which always is."""

    console: bool = True  # headings and progress bars
    csv: bool = True  # metrics.csv, one column a metric
    tensorboard: bool = False  # event files in tensorboard/
    wandb: Literal[False, "offline", "online"] = False  # offline runs lie in wandb/ until `wandb sync`
    project: str = "embodied_rft"  # of wandb
    plugins: dict[str, dict[str, Any]] = field(default_factory=dict)  # {id of a registered "logger": its options}


class Sink(Protocol):
    """A further place for log lines; register one with `@register("logger", id)`.

    It is made as `cls(folder, step=last_step, **options)`. A resumed run starts at an earlier step than it was killed
    at and repeats the lines in between exactly, so writing a step again changes nothing.
    """

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Take one line: counters, labels and finite numbers."""

    def close(self) -> None:
        """Flush and give back what is held."""


class Logger:
    """All logs of one run folder: `Logger(folder, LogConfig())`."""

    def __init__(self, folder: str | Path, config: LogConfig | None = None, *, quiet: bool = False) -> None:
        self.folder, self.config = Path(folder), config or LogConfig()
        self.console = Console(quiet=quiet or not self.config.console)
        self.bytes, self.lines = 0, 0  # where metrics.jsonl ends, for this run
        self._file: BinaryIO | None = None
        self._table: _Table | None = None
        self._sinks: list[Sink] = []

    # --- for people ---

    def message(self, text: str, *, style: str = "") -> None:
        """One line on the terminal and in run.log."""
        self.console.message(text, style=style)
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / MESSAGES, "a", encoding="utf-8") as file:
            file.write(text + "\n")

    def progress(self, title: str, total: int) -> AbstractContextManager[Bar]:
        """A progress bar: `with logger.progress("pretrain", 3000) as bar: bar.update(100, success=0.4)`."""
        return self.console.progress(title, total)

    def stage_started(self, path: Sequence[int], title: str) -> None:
        """The heading of a stage."""
        self.message(f"{'.'.join(str(i + 1) for i in path):>3}  {title}", style="bold")

    def stage_finished(self, record: Mapping[str, Any]) -> None:
        """What the stage did: one entry of stages.json."""
        done = {unit: record[unit] for unit in ("decisions", "updates") if record.get(unit)}
        amounts = [f"{amount:,} {unit}" for unit, amount in done.items()]
        parts = [f"{record['seconds']:.1f} s", *amounts, describe(record.get("metrics") or {})]
        self.message("     " + "  ".join(part for part in parts if part), style="green")

    # --- for machines ---

    def log(
        self,
        metrics: Mapping[str, Any],
        *,
        stage: Sequence[int] | str,
        decisions: int,
        updates: int,
        seconds: float,
        **labels: str,
    ) -> None:
        """One line in every log.

        Args:
            metrics: names like "critic/loss"; floats, ints, strings, 0-d arrays or tensors.
            stage: path of the stage.
            decisions: taken so far in the run.
            updates: made so far in the run.
            seconds: wall time of the run so far; written as "wall/seconds".
            labels: further text columns, such as the name of an evaluation.
        """
        record: dict[str, Any] = {
            "stage": list(stage) if not isinstance(stage, str) else stage,
            "decisions": int(decisions),
            "updates": int(updates),
            **labels,
            **{name: _plain(value) for name, value in metrics.items()},
            "wall/seconds": round(float(seconds), 3),
        }
        file = self._open()
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        file.write(line)
        file.flush()
        self.bytes += len(line)
        self.lines += 1
        if self._table is not None:
            self._table.add(record)
        for sink in self._sinks:
            sink.write(self.lines, record)
        self.console.measure(int(decisions), int(updates), float(seconds))

    def state_dict(self) -> dict[str, int]:
        """Where the log ends now; everything before is on the device when this returns."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        return {"bytes": self.bytes, "lines": self.lines}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from where `state_dict` was taken: what was written after it is cut off at the next line."""
        self._close_files()
        self.bytes, self.lines = int(state["bytes"]), int(state["lines"])

    def close(self) -> None:
        """Close all logs."""
        self._close_files()

    def _open(self) -> BinaryIO:
        """The log file, cut to where this run is, and the other logs, on the first line."""
        if self._file is not None:
            return self._file
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / METRICS
        self._file = open(path, "ab")
        if path.stat().st_size < self.bytes:
            self.message(f"warning: {path} lost lines since the last checkpoint; going on after those that are left")
            self.bytes = path.stat().st_size
        self._file.truncate(self.bytes)
        if self.config.csv:
            self._table = _Table(self.folder / TABLE, path)
        self._sinks = _make_sinks(self.folder, self.config, self.lines)
        return self._file

    def _close_files(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._table is not None:
            self._table.close()
        for sink in self._sinks:
            sink.close()
        self._file, self._table, self._sinks = None, None, []


class _Table:
    """metrics.csv: derived from the JSON lines, written anew when a resume or a new metric changes its past."""

    def __init__(self, path: Path, lines: Path) -> None:
        self.path, self.lines = path, lines
        self._rebuild()

    def add(self, record: Mapping[str, Any]) -> None:
        if any(name not in self.columns for name in record):
            self._file.close()
            self._rebuild()  # the JSON lines have this record already
            return
        self.writer.writerow(_cells(record))
        self._file.flush()

    def _rebuild(self) -> None:
        records = read_records(self.lines)
        self.columns = list(dict.fromkeys(name for record in records for name in record))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns)
        if self.columns:
            writer.writeheader()
        writer.writerows(_cells(record) for record in records)
        write_atomically(self.path, text.getvalue())
        self._file = open(self.path, "a", newline="", encoding="utf-8")
        self.writer = csv.DictWriter(self._file, self.columns)

    def close(self) -> None:
        self._file.close()


class TensorBoardSink:
    """Scalars in tensorboard/; a resumed run hides what it is going to repeat."""

    def __init__(self, folder: Path, *, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Every number of the line."""
        for name, value in _numbers(record).items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush."""
        self.writer.close()


class WandbSink:
    """Weights & Biases. The run's id is kept in the folder, so that a resumed run goes on in the same one."""

    def __init__(self, folder: Path, *, step: int, mode: Literal["offline", "online"], project: str) -> None:
        import wandb

        path = folder / "wandb_id"
        if not path.exists():
            write_atomically(path, uuid.uuid4().hex)
        self.run = wandb.init(
            project=project,
            name=folder.name,
            id=path.read_text().strip(),
            dir=str(folder),
            mode=mode,
            resume="allow" if mode == "online" else None,  # offline parts of one id are joined when they are synced
            settings=wandb.Settings(silent=True),
        )

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Every number of the line."""
        self.run.log(_numbers(record), step=step)

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()


def _make_sinks(folder: Path, config: LogConfig, step: int) -> list[Sink]:
    sinks: list[Sink] = []
    if config.tensorboard:
        sinks.append(TensorBoardSink(folder, step=step))
    if config.wandb:
        sinks.append(WandbSink(folder, step=step, mode=config.wandb, project=config.project))
    for id, options in config.plugins.items():
        sinks.append(registry.find("logger", id)(folder, step=step, **options))
    return sinks


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that was cut in half by a kill is left out."""
    try:
        text = Path(path).read_bytes()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]


def write_json(path: str | Path, content: Any) -> None:
    """A JSON file for people and machines, whole or not at all; NaN and infinities as strings."""
    write_atomically(path, json.dumps(_plain_tree(content), indent=1, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    """A metric as JSON: 0-d tensors and arrays as numbers, NaN and infinities as "NaN", "Infinity", "-Infinity"."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{'-' if value < 0 else ''}Infinity"
    return value


def _plain_tree(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain_tree(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_tree(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain_tree(value.tolist())
    return str(value) if isinstance(value, os.PathLike) else _plain(value)


def _cells(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: ".".join(map(str, value)) if isinstance(value, list) else value for name, value in record.items()}


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in record.items() if isinstance(value, (int, float))}
