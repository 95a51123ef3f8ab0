"""How small an error the tests see: edits of the library, one at a time, each with the tests that must then fail.

    python -m benchmarks.mutants [--only TEXT] [--sample N] [--workers 2] [--check]

`mutants.yaml` beside this file lists them. Every edit is made in a copy of the repository, never in it; an edit that no
longer applies, or whose tests fail without it, is an error of the list. `--check` only asks whether all of them apply.
The last line is a JSON object with the score: the share of edits that a test caught.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import yaml
from rich.console import Console

ROOT = Path(__file__).parent.parent
LIST = Path(__file__).with_suffix(".yaml")
COPIED = ("embodied_rft", "envs", "agents", "configs", "tests", "benchmarks", "docs")
FILES = ("pyproject.toml", "README.md", "CHANGELOG.md", "constraints.txt", "Makefile")


@dataclass(frozen=True)
class Mutant:
    """One edit: in `file`, `find` (which occurs once) becomes `put`; one of `tests` must fail then."""

    what: str  # the error in words: "IQL's critic bootstraps V(o) instead of V(o')"
    file: str
    find: str
    put: str
    tests: tuple[str, ...]
    late: bool = False  # written after the tests that catch it

    def apply(self, folder: Path) -> str:
        """Make the edit; gives the text as it was."""
        path = folder / self.file
        text = path.read_text(encoding="utf-8")
        if text.count(self.find) != 1:
            raise ValueError(
                f"{self.what!r}: {self.find!r} occurs {text.count(self.find)} times in {self.file}, not once"
            )
        path.write_text(text.replace(self.find, self.put), encoding="utf-8")
        return text


def read(path: Path = LIST) -> list[Mutant]:
    """The list; ValueError where two entries are the same edit."""
    mutants = [Mutant(**{**each, "tests": tuple(each["tests"])}) for each in yaml.safe_load(path.read_text("utf-8"))]
    edits = [(m.file, m.find, m.put) for m in mutants]
    if len({*edits}) < len(edits):
        raise ValueError(f"{path.name} holds the same edit twice: {next(e for e in edits if edits.count(e) > 1)}")
    return mutants


def copy_to(folder: Path) -> None:
    """What the tests need of the repository."""
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)


def passes(folder: Path, tests: Sequence[str], *, seconds: float = 900) -> bool:
    """Whether these tests pass in a copy; one that hangs has failed."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--timeout", str(seconds), *tests]
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):  # not a verdict: no such test, no such option
        raise ValueError(f"pytest {' '.join(tests)} ended with {done.returncode}: {(done.stdout + done.stderr)[-600:]}")
    return done.returncode == 0


class Copies:
    """A few copies of the repository, lent to one mutant at a time."""

    def __init__(self, count: int, folder: Path) -> None:
        self.free: SimpleQueue[Path] = SimpleQueue()
        for i in range(count):
            copy_to(folder / str(i))
            self.free.put(folder / str(i))

    @contextmanager
    def lend(self) -> Iterator[Path]:
        """A copy; it comes back unchanged."""
        copy = self.free.get()
        try:
            yield copy
        finally:
            self.free.put(copy)


def caught(mutant: Mutant, copies: Copies) -> bool:
    """Whether a test failed with the edit."""
    with copies.lend() as folder:
        original = mutant.apply(folder)
        try:
            return not passes(folder, mutant.tests)
        finally:
            (folder / mutant.file).write_text(original, encoding="utf-8")


def check(mutants: Sequence[Mutant]) -> None:
    """All of them apply to the code as it is."""
    with tempfile.TemporaryDirectory() as name:
        copy_to(Path(name))
        for mutant in mutants:
            (Path(name) / mutant.file).write_text(mutant.apply(Path(name)), encoding="utf-8")


def main() -> None:
    """Try all, print the survivors and the score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only whether all edits apply; the same as --check")
    parser.add_argument("--check", action="store_true", help="only whether all edits apply")
    parser.add_argument("--only", default="", help="those whose text or file holds this")
    parser.add_argument("--sample", type=int, help="so many of them, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    mutants, console = read(), Console()
    mutants = [m for m in mutants if options.only in m.what or options.only in m.file]
    if options.sample is not None:
        mutants = random.Random(options.seed).sample(mutants, min(options.sample, len(mutants)))
    check(mutants)
    if options.quick or options.check:
        print(json.dumps({"benchmark": "mutants", "edits": len(mutants), "late": sum(m.late for m in mutants)}))
        return
    start, survivors = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(options.workers) as executor:
        copies = Copies(options.workers, Path(name))

        def sound(tests: tuple[str, ...]) -> bool:
            with copies.lend() as folder:
                return passes(folder, tests)

        sets = sorted({m.tests for m in mutants})
        failing = [tests for tests, good in zip(sets, executor.map(sound, sets), strict=True) if not good]
        if failing:
            raise SystemExit(f"these tests fail without any edit: {failing}")
        for mutant, seen in zip(mutants, executor.map(lambda m: caught(m, copies), mutants), strict=True):
            console.print(f"{'caught  ' if seen else 'SURVIVED'}  {mutant.file}: {mutant.what}", markup=False)
            if not seen:
                survivors.append(mutant)
    late = [m for m in mutants if m.late]
    score = 1 - len(survivors) / max(1, len(mutants))
    numbers = {"edits": len(mutants), "late": len(late), "survived": len(survivors), "ratio": round(score, 4)}
    numbers["ratio_late"] = round(1 - sum(m.late for m in survivors) / max(1, len(late)), 4)
    print(json.dumps({"benchmark": "mutants", **numbers, "seconds": round(time.perf_counter() - start)}))


if __name__ == "__main__":
    main()
