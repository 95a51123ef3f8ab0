"""A recipe in, a run folder out: `train` runs or continues a recipe, and stops at a safe point when it is asked to."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from embodied_rft import distributed
from embodied_rft.checkpoint import RunLock
from embodied_rft.config import Recipe, dump_recipe, write_atomically
from embodied_rft.incidents import EnvironmentFailure
from embodied_rft.log import LogConfig
from embodied_rft.session import Session


def train(recipe: Recipe, folder: str | Path, *, quiet: bool = False, report: bool = True) -> Session:
    """Run a recipe in a folder, or continue it there. Returns the closed session, its agent trained.

    Raises:
        ValueError: the folder holds a run of another recipe, or another process is working in it.
        EnvironmentFailure: the environments fail too often to go on.
        Interrupted: Ctrl-C; the run was saved and the same call continues it.
    """
    rank = distributed.rank()
    folder = Path(folder) if not rank else Path(folder) / "ranks" / str(rank)
    folder = folder.absolute()  # an environment may change the working directory
    folder.mkdir(parents=True, exist_ok=True)
    if rank:  # rank 0 speaks for all; the others keep only what they need to be continued
        quiet, report, recipe = True, False, replace(recipe, logging=LogConfig(console=False, csv=False))
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    with RunLock(folder):
        session = Session(recipe, folder, quiet=quiet)
        try:
            session.restore()
            write_atomically(folder / "recipe.yaml", dump_recipe(recipe))
            with stop_on_interrupt(session):
                session.run()
        except EnvironmentFailure as failure:
            session.note_incidents()
            session.logger.message(f"stopped: {failure}", style="red")
            raise
        finally:
            session.close()
    if report:
        from embodied_rft.report import write_report

        write_report(folder)
    return session


@contextmanager
def stop_on_interrupt(session: Session) -> Iterator[None]:
    """The first Ctrl-C asks the session to stop at the next safe point, a second one stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(signum: int, frame: Any) -> None:
        if session.stopping:
            raise KeyboardInterrupt
        session.stopping = True
        session.logger.message(
            "stopping at the next safe point (Ctrl-C again to stop at once, losing the work since the last one)"
        )

    old = signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        with suppress(ValueError):
            signal.signal(signal.SIGINT, old)
