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
from embodied_rft.options import ConfigError
from embodied_rft.pools.incidents import EnvironmentFailure
from embodied_rft.report.page import write_report
from embodied_rft.runs import inputs
from embodied_rft.runs.folder import RunFolder
from embodied_rft.runs.lock import RunLock
from embodied_rft.runs.log import LogConfig, warnings_kept
from embodied_rft.runs.recipe import Recipe, dump_recipe, recipe_of
from embodied_rft.runs.session import Session


def train(recipe: Recipe, folder: str | Path, *, quiet: bool = False, report: bool = True) -> Session:
    """Run a recipe in a folder, or continue it there. Returns the closed session, its agent trained.

    Raises:
        ValueError: the folder holds a run of another recipe, another process is working in it, or there are no stages.
        EnvironmentFailure: the environments fail too often to go on.
        Interrupted: Ctrl-C or SIGTERM; the run was saved and the same call continues it.
    """
    if not recipe.stages:
        raise ConfigError(f"{recipe.name} has no stages: it is there to be extended (`extends:`) by a recipe with some")
    rank = distributed.rank()
    main = RunFolder(Path(folder).absolute())  # an environment may change the current folder
    run = main.of_process(rank)
    run.path.mkdir(parents=True, exist_ok=True)
    if rank:  # rank 0 speaks for all; the others keep only what they need to be continued
        quiet, report, recipe = True, False, replace(recipe, logging=LogConfig(console=False, csv=False))
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    with RunLock(run), warnings_kept(run):
        run.refuse_links()
        text, changed = keep_inputs(recipe, main)
        session = Session(recipe_of(text, main.path, trust=True), run, quiet=quiet, text=text)
        try:
            session.checkpoints.clean()
            if session.restore() and changed:
                session.logger.message(f"warning: plug-ins have changed since this run began: {', '.join(changed)}")
            session.keep_recipe()
            with stop_on_interrupt(session):
                session.run()
        except EnvironmentFailure as failure:
            session.note_incidents()
            session.logger.message(f"stopped: {failure}", style="red")
            raise
        finally:
            session.close()
    if report:
        write_report(run)
    return session


def keep_inputs(recipe: Recipe, folder: RunFolder) -> tuple[str, list[str]]:
    """Copy the files that the recipe names into the run folder: the recipe that names them there, changed plug-ins."""
    changed = []
    if not distributed.rank():  # the others find everything there
        inputs.keep(recipe, folder)
        changed = inputs.keep_plugins(recipe, folder)
    distributed.gather(None)
    return dump_recipe(inputs.keep(recipe, folder)), changed


@contextmanager
def stop_on_interrupt(session: Session) -> Iterator[None]:
    """Ctrl-C or SIGTERM asks the session to stop at the next safe point; the same signal again stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: set[int] = set()  # a launcher may answer Ctrl-C, which all its processes get, with a SIGTERM to each

    def ask(signum: int, frame: Any) -> None:
        if signum in asked:
            raise KeyboardInterrupt
        asked.add(signum)
        session.stopping = True
        session.logger.message(
            "stopping at the next safe point (once more to stop at once, losing the work since the last one)"
        )

    old = {signum: signal.signal(signum, ask) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        with suppress(ValueError):
            for signum, handler in old.items():
                signal.signal(signum, handler)
