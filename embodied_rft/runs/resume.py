"""What a checkpoint of a run holds, and how a session goes on from one.

A checkpoint holds everything from which the future of the run follows, so a run that was killed and started again ends
with the same bits as one that was not. Structure (which networks exist) is never stored: it follows from the recipe, by
`prepare` of every stage up to the current one; only weights and numbers are loaded into it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from embodied_rft import distributed
from embodied_rft.device import generator_state
from embodied_rft.experience.collect import Collector
from embodied_rft.learning.learner import Learner
from embodied_rft.names import UserError
from embodied_rft.options import parse_stages, to_plain, walk
from embodied_rft.pools.described import Description
from embodied_rft.runs.checkpoint import Checkpoints
from embodied_rft.runs.folder import RunFolder
from embodied_rft.runs.log import Logger
from embodied_rft.runs.progress import Progress
from embodied_rft.runs.recipe import Recipe, recipe_difference
from embodied_rft.runs.rig import Rig
from embodied_rft.runs.tree_file import load
from embodied_rft.runs.yaml_tree import read_yaml

HOLDS = ("format", "recipe", "path", "finished", "progress", "counters", "records", "agent", "buffer", "learner",
         "collector", "generators", "logger", "tail", "best")  # fmt: skip

Which = Literal["newest", "best"]
P = TypeVar("P", bound=Progress)


class State(Rig):
    """All that the future of a run follows from; `agent` is set by whoever builds on this."""

    def __init__(
        self, recipe: Recipe, folder: RunFolder, logger: Logger, *, text: str, described: Sequence[Description | None]
    ) -> None:
        super().__init__(recipe, logger, described)
        self.folder = folder
        self.recipe_text = text  # as it is kept: files by their names in the folder
        self.stages = recipe.stages
        self.counters: dict[str, Any] = {"decisions": 0, "updates": 0, "episodes": 0, "seconds": 0.0, "saves": 0}
        self.counters["incidents"] = {"counts": {}, "latest": []}  # of environments, and the latest texts
        self.records: list[dict[str, Any]] = []  # one for each finished stage
        self.path: tuple[int, ...] = ()  # of the running stage
        self.progress = Progress()  # how far the running stage is, in its own record
        self.generators: dict[str, np.random.Generator | torch.Generator] = {}
        self.tail: dict[str, Any] | None = None  # of the last stage that can be made longer, until another one learns
        self.best: dict[str, Any] | None = None  # point of the learning curve that the best checkpoint is of
        self.threads = torch.get_num_threads()  # they decide how sums are rounded
        self.collector: Collector | None = None
        self.learner: Learner | None = None

    def progress_as(self, kind: type[P]) -> P:
        """How far the running stage is, as the record of that stage."""
        assert isinstance(self.progress, kind), f"{type(self.progress).__name__} is no {kind.__name__}"
        return self.progress


def snapshot(session: State, *, finished: bool) -> dict[str, Any]:
    """The state of a session, as plain data for `checkpoint.save`; `finished`: the stage at `path` is over."""
    inside = {"learner": None, "collector": None, "generators": {}} if finished else going_on(session)
    return {
        "format": 1,
        "processes": distributed.size(),
        "threads": session.threads,
        "device": session.agent.device.type,
        "recipe": session.recipe_text,
        "path": list(session.path),
        "finished": finished,
        "progress": session.progress.plain(),
        **inside,
        "counters": session.counters,
        "records": session.records,
        "spaces": session.spaces,
        "agent": session.agent.finite_state(),
        "buffer": session.buffer_state(),
        "logger": session.logger.state_dict(),
        "tail": session.tail,
        "best": session.best,
    }


def going_on(session: State) -> dict[str, Any]:
    """What the running stage needs to go on."""
    return {
        "progress": session.progress.plain(),
        "learner": None if session.learner is None else session.learner.state_dict(),
        "collector": None if session.collector is None else session.collector.state_dict(),
        "generators": {name: generator_state(each) for name, each in session.generators.items()},
    }


def weights(session: State) -> dict[str, Any]:
    """What `load_weights` needs, and the averaged policy, which evaluations see; no buffer, no optimisers."""
    learner = None if session.learner is None else session.learner.state_dict()
    return only_weights(snapshot(session, finished=True) | {"learner": learner})


def only_weights(state: dict[str, Any]) -> dict[str, Any]:
    """The state without buffer, environments, optimisers and whatever else only training needs."""
    averaged = (state["learner"] or {}).get("averaged")
    emptied: dict[str, Any] = {"buffer": None, "collector": None, "tail": None, "progress": {}, "generators": {}}
    return state | emptied | {"learner": None if averaged is None else {"averaged": averaged}}


def read_state(folder: RunFolder, which: Which = "newest") -> dict[str, Any]:
    """The state in a checkpoint of a run.

    Raises:
        ValueError: there is no run, or no such checkpoint, in the folder; or its recipe.yaml is another one.
    """
    if not folder.checkpoints.is_dir():
        raise UserError(f"{folder} holds no run: there are no checkpoints in it. Give the folder of `erft train`.")
    if which == "best":
        if not folder.best.is_dir():
            raise UserError(f"{folder} has no best checkpoint: its recipe draws no learning curve (evaluate_every)")
        state: dict[str, Any] = load(folder.best)
    else:
        newest = Checkpoints(folder.checkpoints, holds=HOLDS).newest()
        if newest is None:
            raise UserError(f"{folder} holds no checkpoint yet; train it first")
        state = newest[1]
    if folder.recipe.is_file():
        difference = recipe_difference(state["recipe"], folder.recipe.read_text(encoding="utf-8", errors="replace"))
        if difference:
            raise UserError(
                f"{folder.recipe} is not the recipe that was trained ({'; '.join(difference[:6])}): undo the change, "
                "or remove the file; the checkpoint holds the right one"
            )
    return state


def restore(session: State, state: dict[str, Any]) -> dict[str, Any]:
    """Make a fresh session what it was when `state` was taken; that state, as the session goes on from it."""
    distributed.check_size(state.get("processes", 1), session.folder.path)
    state = continuation(state, session)
    _keep_threads(session, state.get("threads", session.threads))
    if state.get("device", "cpu") != session.agent.device.type:
        session.logger.message(
            f"warning: this run computed on {state['device']} and goes on with {session.agent.device.type}: not to the "
            "bit as it would have been"
        )
    load_weights(session, state)
    if state["buffer"] is not None:
        session.buffer.load_state_dict(state["buffer"])
    session.tail, session.best = state["tail"], state["best"]
    session.logger.load_state_dict(state["logger"])
    where = f"{'after' if state['finished'] else 'in'} stage {'.'.join(map(str, session.path))}"
    session.logger.message(f"continuing {where}, {session.counters['decisions']} decisions in")
    return state


def load_weights(session: State, state: dict[str, Any]) -> None:
    """Networks, counters and the place in the recipe; buffer and logs stay as they are."""
    target = tuple(state["path"])
    prepare_until(session, target)
    try:
        session.agent.load_state_dict(state["agent"])
    except RuntimeError as error:
        raise UserError(
            f"the checkpoint in {session.folder} holds other networks than this version makes: {error}"
        ) from None
    session.path = target
    session.counters, session.records = dict(state["counters"]), list(state["records"])


# --- a recipe that was changed meanwhile -------------------------------------------------------------------------


def continuation(state: dict[str, Any], session: State) -> dict[str, Any]:
    """The state from which a run goes on with the recipe that is given now.

    A run folder belongs to one recipe, but what has not begun may be changed, and the last stage that learned (only
    evaluations came after it) may be made longer: it goes on with its own optimisers and its own experience.

    Raises:
        ValueError: the recipes differ in what has been run already; names the difference.
    """
    if state["recipe"] == session.recipe_text:
        return state
    stages: list[list[Leaf]] = []
    for text in (state["recipe"], session.recipe_text):
        specs = parse_stages(read_yaml(text)["stages"])
        stages.append([Leaf(path, stage, to_plain(stage.config) or {}) for path, stage in walk(specs)])
    old, new = stages
    begun = [leaf for leaf in old if leaf.path <= tuple(state["path"])]
    pairs = zip(begun, [*new, *[None] * len(begun)], strict=False)
    first = next((index for index, (a, b) in enumerate(pairs) if b is None or a.key != b.key), None)
    difference = recipe_difference(state["recipe"], session.recipe_text, stages=False)
    if not difference and first is None:
        return state
    after = begun[first:] if first is not None else []
    rest = [leaf for leaf in after[1:] if not leaf.stage.measures]
    if not difference and after and not rest:
        assert first is not None
        if after[0].stage.measures:  # measured again: it changed nothing
            return _rewound(state, begun[first - 1].path if first else (), finished=True)
        going_on = len(after) == 1 and not state["finished"]
        if first < len(new) and _longer(after[0], new[first]) and (going_on or state["tail"] is not None):
            return state if going_on else _rewound(state, after[0].path, finished=False) | state["tail"]
    difference = difference or recipe_difference(state["recipe"], session.recipe_text)
    raise UserError(
        f"{session.folder} holds a run of another recipe ({'; '.join(difference[:6])}). Continue it with its own "
        "recipe or choose another folder. Of a run that has begun only what is still to come may be changed, and its "
        "last stage that learns may be made longer."
    )


@dataclass(frozen=True)
class Leaf:
    """A stage as it runs: where, which, with what options."""

    path: tuple[int, ...]
    stage: Any
    options: dict[str, Any]

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for equal stages."""
        return self.path, self.stage.word, self.options


def _longer(old: Leaf, new: Leaf) -> bool:
    """Whether a stage differs only in how long it goes on, and in how often it is measured."""
    if (old.path, old.stage.word) != (new.path, new.stage.word):
        return False
    changed = [key for key in old.options if old.options[key] != new.options[key]]
    return all(
        key in old.stage.adjustable or (key in old.stage.extendable and new.options[key] > old.options[key])
        for key in changed
    )


def _rewound(state: dict[str, Any], path: tuple[int, ...], *, finished: bool) -> dict[str, Any]:
    """The state at an earlier place, from which only measurements were made."""
    earlier = [each for each in state["records"] if tuple(each["path"]) <= path]
    done = [each for each in earlier if finished or tuple(each["path"]) < path]
    return state | {"path": list(path), "finished": finished, "records": done}


def _keep_threads(session: State, before: int) -> None:
    """Sums over another number of threads round otherwise: go on with as many as before, unless the recipe says."""
    if before == session.threads:
        return
    if session.recipe.threads is not None:
        session.logger.message(
            f"warning: this run used {before} threads and goes on with {session.threads}, as the recipe says: not to "
            "the bit as it would have been"
        )
        return
    session.logger.message(f"this run used {before} threads, not {session.threads}: going on with {before}")
    torch.set_num_threads(before)
    session.threads = before


def prepare_until(session: State, target: tuple[int, ...]) -> None:
    """Make the networks of all stages up to `target`, in order, without running them."""
    for path, stage in walk(session.stages):
        if path > target:
            return
        session.path = path
        session.generators = {}
        stage.prepare(session)
