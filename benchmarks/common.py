"""Shared by all benchmarks: interleaved rounds, medians with spread, a table, one JSON object as the last line.

A benchmark names its competitors and how to measure each; the rest is here:

    def main() -> None:
        options = arguments(__doc__)
        runs = {"ours": lambda: rate(step_ours, seconds=1.0), "peer": lambda: rate(step_peer, seconds=1.0)}
        results = measure(runs, rounds=3 if options.quick else 9)
        table(results, unit="steps/s", title="Steps", baseline="peer")
        finish(name="steps", results=results, ratio=ratio(results, "ours", "peer"))

All competitors run once in every round, one after the other, so that a slow minute of the machine hits all of them;
ratios are taken inside each round, and the median over rounds is reported.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Result:
    """What one competitor scored in each round: Result("ours", [10.0, 12.0, 11.0]).median is 11.0."""

    name: str
    rounds: list[float]

    @property
    def median(self) -> float:
        """Median over the rounds."""
        return float(np.median(self.rounds))


Results = dict[str, Result]


def arguments(description: str | None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """The command line of a benchmark: `--quick` (must end within 50 s); give a parser to add options of your own."""
    parser = parser or argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds; ends within 50 seconds")
    return parser.parse_args()


def measure(runs: Mapping[str, Callable[[], float]], *, rounds: int, warm_up: bool = True) -> Results:
    """Run every competitor once in each round, interleaved, in alternating order; each gives its score for the round.

    Args:
        runs: name to a function that measures once (for example with `rate`).
        rounds: how often.
        warm_up: an unrecorded round first (compilation, caches, first allocation).
    """
    scores: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(-1 if warm_up else 0, rounds):
        names = list(runs) if i % 2 == 0 else list(runs)[::-1]
        for name in names:
            gc.collect()
            score = runs[name]()
            if i >= 0:
                scores[name].append(score)
    return {name: Result(name, values) for name, values in scores.items()}


def rate(work: Callable[[], float], *, seconds: float, clock: Callable[[], float] = time.perf_counter) -> float:
    """Units of work in a second: calls `work` (which gives how many units it did) for at least `seconds` of a clock."""
    start, done = clock(), 0.0
    while (elapsed := clock() - start) < seconds:
        done += work()
    return done / elapsed


def ratio(results: Results, ours: str, theirs: str | Sequence[str]) -> float:
    """Median over rounds of ours / theirs; with several peers, against the one with the best median."""
    names = [theirs] if isinstance(theirs, str) else list(theirs)
    best = max(names, key=lambda name: results[name].median)
    return float(np.median(np.array(results[ours].rounds) / np.array(results[best].rounds)))


def table(results: Results, *, unit: str, title: str, baseline: str | None = None, digits: int = 0) -> None:
    """Print one row a competitor: median, range over rounds, and the ratio to `baseline`."""
    grid = Table(title=title)
    grid.add_column("", justify="left")
    for heading in (f"median, {unit}", "range", *([f"x {baseline}"] if baseline else [])):
        grid.add_column(heading, justify="right")
    for name, result in results.items():
        row = [name, f"{result.median:,.{digits}f}"]
        row.append(f"{min(result.rounds):,.{digits}f} - {max(result.rounds):,.{digits}f}")
        if baseline:
            row.append(f"{ratio(results, name, baseline):.2f}")
        grid.add_row(*row)
    Console(width=110).print(grid)


def finish(*, name: str, results: Results, ratio: float, **numbers: Any) -> None:
    """Print the JSON object that must be the last line: `ratio` is ours over the best peer, higher is better."""
    summary = {"benchmark": name, "ratio": round(ratio, 3)}
    summary |= {key: round(value, 4) if isinstance(value, float) else value for key, value in numbers.items()}
    summary["medians"] = {key: round(result.median, 4) for key, result in results.items()}
    summary["machine"] = machine()
    print(json.dumps(summary), flush=True)


def machine() -> dict[str, Any]:
    """What the numbers depend on: cores, processor, versions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {}
    for package in ("torch", "numpy", "mujoco", "gymnasium", "stable-baselines3"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {"cores": cores, "processor": _processor(), "python": platform.python_version(), **versions}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor()
