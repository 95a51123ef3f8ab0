"""What a run says on the terminal: stage headings, live progress bars with success and speed, plain lines in a pipe.

Knows nothing of files or training; `log.Logger` owns one.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

import rich.console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from embodied_rft.names import visible

LINE_SECONDS = 10.0  # between two progress lines where there is no terminal


class Console:
    """Writes for people. `quiet` says nothing at all."""

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        stream = stream or sys.stdout
        self.quiet = quiet
        self.rich = rich.console.Console(file=stream, highlight=False, emoji=False, soft_wrap=True)
        self.live = self.rich.is_terminal and not quiet
        self.speed = ""  # "3,120 decisions/s  240 updates/s", shown beside the bar
        self._last: tuple[int, int, float] | None = None

    def message(self, text: str, *, style: str = "") -> None:
        """One line; above the bar if one is running."""
        if not self.quiet:
            self.rich.print(self._writable(text), style=style or None, markup=False)

    def _writable(self, text: str) -> str:
        """What this terminal can show, whatever its locale; what would steer it is written out."""
        encoding = getattr(self.rich.file, "encoding", None) or "utf-8"
        return visible(text).encode(encoding, "backslashreplace").decode(encoding)

    def measure(self, decisions: int, updates: int, seconds: float) -> None:
        """Work out the speed from the counters of two successive log lines."""
        if self._last is not None and seconds > self._last[2]:
            elapsed = seconds - self._last[2]
            rates = {
                "decisions/s": (decisions - self._last[0]) / elapsed,
                "updates/s": (updates - self._last[1]) / elapsed,
            }
            self.speed = "  ".join(f"{rate:,.0f} {name}" for name, rate in rates.items() if rate > 0)
        self._last = (decisions, updates, seconds)

    @contextmanager
    def progress(self, title: str, total: int, *, speed: bool = True) -> Iterator[Bar]:
        """A bar for `total` things to do, gone when the block ends; in a pipe a line now and then.

        `speed`: with that of collecting and learning; not where neither goes on.
        """
        if not self.live:
            yield Bar(self, title, total, speed=speed)
            return
        columns = (
            TextColumn("  {task.description}", markup=False), BarColumn(bar_width=28), _Amount(), TimeElapsedColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[detail]}", markup=False),
        )  # fmt: skip
        with Progress(*columns, console=self.rich, transient=True, refresh_per_second=5) as live:
            yield Bar(self, title, total, speed=speed, live=live)


class Bar:
    """A running progress bar: `bar.update(300, success=0.4)`."""

    def __init__(
        self, console: Console, title: str, total: int, *, speed: bool = True, live: Progress | None = None
    ) -> None:
        self.console, self.title, self.total, self.speed, self.live = console, title, total, speed, live
        self._task = None if live is None else live.add_task(console._writable(title), total=total, detail="")
        self._spoke = time.monotonic()

    def update(self, done: int, **values: object) -> None:
        """How much is done, and numbers worth seeing beside it. Cheap: may be called often."""
        if self.live is not None and self._task is not None:
            self.live.update(self._task, completed=done, detail=self._detail(values))
        elif time.monotonic() - self._spoke >= LINE_SECONDS:
            self._spoke = time.monotonic()
            self.console.message(f"  {self.title}: {done:,} of {self.total:,}  {self._detail(values)}".rstrip())

    def _detail(self, values: Mapping[str, Any]) -> str:
        return "  ".join(part for part in (describe(values), self.console.speed if self.speed else "") if part)


class _Amount(ProgressColumn):
    """As in 1,200 / 3,000."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.completed:,.0f} / {task.total or 0:,.0f}")


def describe(values: Mapping[str, Any]) -> str:
    """Numbers for people: "success 0.431  episodes 200"; None and NaN are left out."""
    return "  ".join(f"{name} {number(value)}" for name, value in values.items() if not _is_empty(value))


def number(value: object) -> str:
    """Three places for fractions, thousands separated for the rest."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or value == 0 or abs(value) >= 1000 or (value.is_integer() and abs(value) >= 2):
        return f"{value:,.0f}"
    return f"{value:.3f}" if abs(value) >= 0.001 else f"{value:.2e}"


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
