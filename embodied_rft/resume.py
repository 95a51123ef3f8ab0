"""What a checkpoint of a run holds, and how a session goes on from one.

A checkpoint holds everything from which the future of the run follows, so a run that was killed and started again ends
with the same bits as one that was not. Structure (which networks exist) is never stored: it follows from the recipe, by
`prepare` of every stage up to the current one; only weights and numbers are loaded into it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from embodied_rft import distributed
from embodied_rft.config import Recipe, dump_recipe, recipe_difference
from embodied_rft.seeding import generator_state
from embodied_rft.stages.base import walk

if TYPE_CHECKING:
    from embodied_rft.session import Session


def snapshot(session: Session, *, finished: bool) -> dict[str, Any]:
    """The state of a session, as plain data for `checkpoint.save`; `finished`: the stage at `path` is over."""
    learner, collector = session.learner, session.collector
    return {
        "format": 1,
        "processes": distributed.size(),
        "recipe": dump_recipe(session.recipe),
        "path": list(session.path),
        "finished": finished,
        "progress": session.progress,
        "counters": session.counters,
        "records": session.records,
        "agent": session.agent.finite_state(),
        "buffer": session.buffer_state(),
        "learner": None if finished or learner is None else learner.state_dict(),
        "collector": None if finished or collector is None else collector.state_dict(),
        "generators": {} if finished else {k: generator_state(g) for k, g in session.generators.items()},
        "logger": session.logger.state_dict(),
    }


def restore(session: Session, state: dict[str, Any], *, weights_only: bool = False) -> None:
    """Make a fresh session what it was when `state` was taken; `weights_only` leaves buffer and logs alone."""
    if not weights_only:
        distributed.check_size(state.get("processes", 1), session.folder)
        check_recipe(state["recipe"], session.recipe, session.folder)
    target = tuple(state["path"])
    prepare_until(session, target)
    try:
        session.agent.load_state_dict(state["agent"])
    except RuntimeError as error:
        raise ValueError(
            f"the checkpoint in {session.folder} holds other networks than this version makes: {error}"
        ) from None
    averaged = (state["learner"] or {}).get("averaged")
    if weights_only and averaged is not None:  # who only looks sees what evaluations see
        session.agent.policy.load_state_dict(averaged)
    session.path, session.progress = target, dict(state["progress"])
    session.counters, session.records = dict(state["counters"]), list(state["records"])
    if weights_only:
        return
    if state["buffer"] is not None:
        session.buffer.load_state_dict(state["buffer"])
    session.logger.load_state_dict(state["logger"])
    where = "after" if state["finished"] else "in"
    session.logger.message(
        f"continuing {where} stage {'.'.join(map(str, target))}, {session.counters['decisions']} decisions in"
    )


def check_recipe(stored: str, recipe: Recipe, folder: Path) -> None:
    """A run folder belongs to one recipe."""
    difference = recipe_difference(stored, recipe)
    if difference:
        raise ValueError(
            f"{folder} holds a run of another recipe ({'; '.join(difference[:6])}). Continue it with its own recipe, "
            "or choose another folder."
        )


def prepare_until(session: Session, target: tuple[int, ...]) -> None:
    """Make the networks of all stages up to `target`, in order, without running them."""
    for path, stage in walk(session.stages):
        if path > target:
            return
        session.path = path
        session.generators = {}
        stage.prepare(session)
