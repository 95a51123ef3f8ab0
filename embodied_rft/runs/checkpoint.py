"""The checkpoints of a run: the newest two that are whole; a damaged one is passed over."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from embodied_rft.distributed import gather
from embodied_rft.names import UserError
from embodied_rft.runs.tree_file import CheckpointError, cannot_write, load, remove, save

logger = logging.getLogger(__name__)


class Checkpoints:
    """The newest `keep` checkpoints of a run; a damaged one is passed over for the one before it.

    `Checkpoints(folder).write(7, {"weights": w})` makes folder/000000000007; `newest()` then is (7, {"weights": w}).
    Who reads changes nothing and may do so while another process writes; only who holds the run's lock may write.

    Args:
        root: folder of the checkpoints.
        keep: how many.
        holds: keys of a whole tree; one without them was not written by a run.
    """

    def __init__(self, root: str | Path, *, keep: int = 2, holds: Iterable[str] = ()) -> None:
        if keep < 1:
            raise UserError(f"keep={keep}: at least one checkpoint must be kept")
        self.root, self.keep, self.holds = Path(root), keep, tuple(holds)
        self._mark = self.root.with_name(f".{self.root.name}-began")  # there once was one

    def steps(self) -> list[int]:
        """The steps of all checkpoints on disk, whole or not, oldest first."""
        try:
            with os.scandir(self.root) as entries:  # their kind comes with the listing: one removed since still counts
                return sorted(int(entry.name) for entry in entries if entry.name.isdigit() and entry.is_dir())
        except FileNotFoundError:
            return []

    def path(self, step: int) -> Path:
        """The folder of one checkpoint."""
        return self.root / f"{step:012d}"

    def write(self, step: int, tree: Mapping[str, Any]) -> Path:
        """Save a checkpoint, then remove those that are no longer needed. Raises CheckpointError like `save`."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self.clean()
        except OSError as error:
            raise cannot_write(self.path(step), 0, error) from error
        save(self.path(step), tree)
        self._mark.touch()
        for old in [s for s in self.steps() if s < step][: -(self.keep - 1) or None]:
            gone = self.root / f".{old:012d}.removing-{os.getpid()}"  # whole until it is gone, for who is reading
            os.rename(self.path(old), gone)
            remove(gone)
        return self.path(step)

    def newest(self, *, at_most: int | None = None) -> tuple[int, Any] | None:
        """(step, tree) of the newest whole checkpoint, None if there is none; damaged ones are named in a warning.

        Args:
            at_most: newer ones are passed over (other processes do not have them).

        Raises:
            CheckpointError: all are damaged or gone. Beginning anew would overwrite what is left of the run.
        """
        steps: list[int] | None = None
        while (now := [s for s in self.steps() if at_most is None or s <= at_most]) != steps:
            steps = now  # another process may write newer ones and remove those that were just listed, or all of them
            for step in reversed(steps):
                try:
                    return step, self._load(step)
                except CheckpointError as error:
                    if self.path(step).exists():
                        logger.warning("checkpoint %d cannot be used: %s", step, error)
        if steps or (self._mark.exists() and not self.steps()):
            raise CheckpointError(
                f"no checkpoint in {self.root} is whole, and nothing was changed: "
                f"{'' if steps else 'put them back, '}go on in another run folder, or remove this one to begin anew"
            )
        return None

    def _load(self, step: int) -> Any:
        tree = load(self.path(step))
        missing = [key for key in self.holds if not isinstance(tree, dict) or key not in tree]
        if missing:
            raise CheckpointError(f"{self.path(step)} is no checkpoint of a run: it does not hold {missing[0]!r}")
        return tree

    def clean(self) -> None:
        """Remove what an interrupted write left; bring back a checkpoint that was moved aside but never replaced.

        For the process that holds the run's lock: what another one is writing looks the same.
        """
        if not self.root.is_dir():
            return
        for path in self.root.glob(".*"):
            original = self.root / path.name.lstrip(".").split(".")[0]
            if ".replaced-" in path.name and not original.exists():
                os.rename(path, original)
            elif any(word in path.name for word in (".writing-", ".replaced-", ".removing-")):
                remove(path)


def common_newest(checkpoints: Checkpoints) -> tuple[int, Any] | None:
    """(step, tree) of the newest checkpoint that every process has; None: there is none."""
    found = checkpoints.newest()
    common = min(gather(0 if found is None else found[0]))
    return found if found is None or found[0] == common else checkpoints.newest(at_most=common)
