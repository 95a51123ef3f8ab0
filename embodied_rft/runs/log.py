"""Where a run's numbers go: JSON lines (the truth), what is derived from them (`sinks`), the terminal.

Every line holds the counters and the metrics; whatever depends on the clock has a key that begins with "wall/", so
all else can be compared bit for bit between a run that was killed and one that was not. `state_dict` remembers where
the file ended, and a resumed run cuts it there: no line is doubled, none is lost. Files are UTF-8 whatever the locale.
Knows nothing of training.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import BeforeValidator

from embodied_rft.evaluation.samples import Sample
from embodied_rft.files import plain_number, write_atomically
from embodied_rft.names import UserError, visible
from embodied_rft.options import refuse_idle
from embodied_rft.runs.console import Bar, Console, describe
from embodied_rft.runs.folder import RunFolder
from embodied_rft.runs.sinks import Sink, Table, TensorBoardSink, WandbSink, make_plugin_sink


def _wandb_mode(given: Any) -> Any:
    """YAML reads `on` and `off` as true and false; "on" is meant for "online"."""
    return "online" if given is True or given == "on" else False if given in ("off", None) else given


@dataclass
class LogConfig:
    """Which logs are written beside metrics.jsonl, which always is."""

    console: bool = True  # headings and progress bars
    csv: bool = True  # metrics.csv, one column a metric
    tensorboard: bool = False  # event files in tensorboard/
    wandb: Annotated[Literal[False, "offline", "online"], BeforeValidator(_wandb_mode)] = False  # offline: `wandb sync`
    project: str = "embodied_rft"  # of wandb
    plugins: dict[str, dict[str, Any]] = field(default_factory=dict)  # {id of a registered "logger": its options}

    def __post_init__(self) -> None:
        if not self.wandb:
            refuse_idle(self, ["project"], "without wandb")


@contextmanager
def warnings_kept(folder: RunFolder) -> Iterator[None]:
    """Warnings of the package go to run.log, too; the terminal gets them from the program's own handlers."""

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            with suppress(OSError), _open_to_append(folder.messages) as file:
                file.write(visible(f"warning: {record.getMessage()}").encode("utf-8", "backslashreplace") + b"\n")

    keep, ours = Keep(logging.WARNING), logging.getLogger("embodied_rft")
    ours.addHandler(keep)
    try:
        yield
    finally:
        ours.removeHandler(keep)


class Logger:
    """All logs of one run folder: `Logger(folder, LogConfig())`; `recipe`: resolved, as plain data, for W&B."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        config: LogConfig | None = None,
        *,
        quiet: bool = False,
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.config, self.recipe = RunFolder(Path(folder).absolute()), config or LogConfig(), recipe
        self.console = Console(quiet=quiet or not self.config.console)
        self.bytes, self.lines = 0, 0  # where metrics.jsonl ends, for this run
        self._file: BinaryIO | None = None
        self._sinks: list[Any] = []

    # --- for people ---

    def message(self, text: str, *, style: str = "") -> None:
        """One line on the terminal and in run.log."""
        self.console.message(text, style=style)
        try:
            self.folder.path.mkdir(parents=True, exist_ok=True)
            with _open_to_append(self.folder.messages) as file:
                file.write(visible(text).encode("utf-8", "backslashreplace") + b"\n")
        except OSError as error:  # for people only: the run goes on
            self.console.message(f"warning: {_sentence(self.folder.messages, error)}; the run goes on without it")

    def progress(self, title: str, total: int, *, speed: bool = True) -> AbstractContextManager[Bar]:
        """A progress bar: `with logger.progress("pretrain", 3000) as bar: bar.update(100, success=0.4)`."""
        return self.console.progress(title, total, speed=speed)

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
            **{name: plain_number(value) for name, value in metrics.items()},
            "wall/seconds": round(float(seconds), 3),
        }
        file = self._open()
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            _write_all(file, line)
        except OSError as error:
            raise OSError(
                f"{_sentence(self.folder.metrics, error)}. Checkpoints are whole: make room, and the same command "
                "continues after the newest"
            ) from error
        self.bytes += len(line)
        self.lines += 1
        self._derive(lambda sink: sink.write(self.lines, record))
        self.console.measure(int(decisions), int(updates), float(seconds))

    def show_samples(self, name: str, samples: Sequence[Sample], *, decisions: int) -> None:
        """What agents that write text said in an evaluation, for the logs that show it."""
        if samples:
            self._open()
            tag = re.sub(r"[^\w .:+-]", "_", name).strip(". ") or "policy"  # it becomes part of the name of a file
            self._derive(lambda sink: sink.show_samples(tag, samples, decisions))

    def _derive(self, write: Callable[[Any], None]) -> None:
        """Write to what is derived from the lines; a full disk ends such a log, not the run."""
        for sink in list(self._sinks):
            try:
                write(sink)
            except OSError as error:
                self._sinks.remove(sink)
                with suppress(OSError):
                    sink.close()
                what = _sentence(self.folder.path, error, what=type(sink).__name__)
                self.message(f"warning: {what}; the run goes on without it, and a resume writes it again")

    def state_dict(self) -> dict[str, int]:
        """Where the log ends now; everything before is on the device when this returns."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        return {"bytes": self.bytes, "lines": self.lines}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from where `state_dict` was taken: what was written after it is cut off at the next line."""
        self.close()
        self.bytes, self.lines = int(state["bytes"]), int(state["lines"])

    def _open(self) -> BinaryIO:
        """The log file, cut to where this run is, and the other logs, on the first line."""
        if self._file is not None:
            return self._file
        self.folder.path.mkdir(parents=True, exist_ok=True)
        path = self.folder.metrics
        self._file = _open_to_append(path)
        whole, lines = _whole_lines(path, self.bytes)
        if len(whole) < self.bytes:
            self.message(
                f"warning: {path} lost lines or was damaged since the last checkpoint; {lines} of {self.lines} lines "
                "are left, and the run goes on after them"
            )
            write_atomically(path, whole)
            self._file.close()
            self._file = _open_to_append(path)
            self.bytes = len(whole)
        self._file.truncate(self.bytes)
        self._sinks = self._make_sinks()
        return self._file

    def _make_sinks(self) -> list[Sink]:
        def records() -> Sequence[Mapping[str, Any]]:
            return read_records(self.folder.metrics)

        config, folder, sinks = self.config, self.folder, list[Any]()
        if config.csv:
            sinks.append(Table(folder.table, records))
        if config.tensorboard:
            sinks.append(TensorBoardSink(folder, records=records, recipe=self.recipe))
        if config.wandb:
            sinks.append(
                WandbSink(folder, step=self.lines, mode=config.wandb, project=config.project, recipe=self.recipe)
            )
        for id, options in config.plugins.items():
            sinks.append(make_plugin_sink(id, options, folder.path, step=self.lines, recipe=self.recipe))
        return sinks

    def close(self) -> None:
        """Close all logs; the next line opens them again."""
        if self._file is not None:
            self._file.close()
        for sink in self._sinks:
            with suppress(OSError):  # a full disk; a resume writes it again
                sink.close()
        self._file, self._sinks = None, []


def _open_to_append(path: Path) -> BinaryIO:
    """Unbuffered, so that a full disk is seen where a line is written; never through a link that leads elsewhere."""
    if path.is_symlink():
        raise UserError(f"{path} is a symbolic link: the file that it leads to would be changed. Remove the link.")
    return open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o644), "ab", buffering=0)


def _write_all(file: BinaryIO, content: bytes) -> None:
    """All of it: an unbuffered file may take a part."""
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]


def _sentence(path: Path, error: OSError, *, what: str = "") -> str:
    return f"{what or path} cannot be written ({error.strerror or error})"


def _whole_lines(path: Path, size: int) -> tuple[bytes, int]:
    """Of the first `size` bytes of a log, the lines that are whole, and how many."""
    with open(path, "rb") as file:
        content = file.read(size)
    lines = [line for line in content.splitlines(keepends=True) if _record(line) is not None]
    return b"".join(lines), len(lines)


def _record(line: bytes) -> dict[str, Any] | None:
    """One log line; None if it is damaged, cut in half, or two that are glued together."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl; one that a kill has cut in half, or that is damaged, is left out."""
    try:
        lines = Path(path).read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [record for record in map(_record, lines) if record is not None]
