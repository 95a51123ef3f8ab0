"""How a stage learns from what it collects: `FromReplay` or `FromFresh`, whichever the objective's reading asks for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np

from embodied_rft import distributed, registry
from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.plans import Fresh, Replay
from embodied_rft.experience.recording import Recording, Written
from embodied_rft.learning.objective import Metrics, Objective
from embodied_rft.names import UserError
from embodied_rft.runs.progress import Progress
from embodied_rft.runs.session import Session

FRESH = {  # options of `finetune` for replay, and what objectives that learn from fresh experience have instead
    "batch_size": "set the objective's own batch_size",
    "updates_per_decision": "set the objective's num_epochs",
    "offline_share": "leave it out",
    "overlap": "leave it out",
}


@dataclass(kw_only=True)
class LearningProgress(Progress):
    """Of a stage that learns."""

    decisions: int = 0  # collected so far
    annotated: bool = False  # what the buffer held when it began
    owed: float = 0.0  # of an update, by fractions of updates for each decision


class Learning(Protocol):
    """What `finetune` asks of either way to learn."""

    def iteration(self, num_envs: int) -> int:
        """Decisions of an iteration where the recipe says nothing."""

    def add(self, recording: Recording) -> np.ndarray:
        """Put new experience into the buffer; its rows [decisions]."""

    def learn(self, decisions: int, rows: np.ndarray) -> Metrics:
        """Updates for so many new decisions of this process, `rows` of the buffer; what was found in the data."""


class FromReplay:
    """`updates_per_decision` updates for each decision, drawn from all that the buffer holds."""

    def __init__(self, session: Session, options: Mapping[str, Any]) -> None:
        self.session, self.options = session, options

    @staticmethod
    def check(objective: Objective, spec: dict[str, Any], options: Mapping[str, Any]) -> None:
        """Refuse what the stage and the objective do not agree on."""
        off_policy_plan(objective, options["batch_size"], options["offline_share"])
        say_once(spec, batch_size=options["batch_size"], offline_share=options["offline_share"])

    def iteration(self, num_envs: int) -> int:
        """Few: replay learns as it goes, close to what it has just seen."""
        return math.ceil(50 / num_envs) * num_envs

    def add(self, recording: Recording) -> np.ndarray:
        """Write, and annotate the episodes that have ended."""
        session, written = self.session, write(self.session, recording)
        if session.progress_as(LearningProgress).annotated and len(written.episodes):
            known = session.buffer.rows()
            over = known[np.isin(session.buffer.columns(known)["episode"], written.episodes)]
            session.objective.annotate(session.agent, session.buffer, over, session.generator("annotate"))
        return written.rows

    def learn(self, decisions: int, rows: np.ndarray | None = None) -> Metrics:
        """Updates for so many decisions of every process."""
        session, options, progress = self.session, self.options, self.session.progress_as(LearningProgress)
        annotate_once(session)
        ratio = options["updates_per_decision"]
        ratio = session.objective.updates_per_decision if ratio is None else ratio
        owed = progress.owed + sum(distributed.gather(decisions)) * ratio
        progress.owed = owed - int(owed)
        plan = off_policy_plan(session.objective, options["batch_size"], options["offline_share"])
        learner, rng = session.running_learner, session.generator("learn")
        batches = plan.batches(session.buffer, session.numpy_generator("sample"), learner.version)
        for batch in itertools.islice(batches, int(owed)):
            learner.update(batch, rng)
        session.counters["updates"] += int(owed)
        return {}


class FromFresh:
    """Every decision once an epoch, as the objective's plan says, and then never again."""

    def __init__(self, session: Session, options: Mapping[str, Any]) -> None:
        self.session = session

    @staticmethod
    def check(objective: Objective, spec: dict[str, Any], options: Mapping[str, Any]) -> None:
        """Refuse options that are those of replay."""
        for name, instead in FRESH.items():
            if options[name] not in (None, False):
                raise UserError(
                    f"{name} has no effect with objective {spec['id']!r}, which learns from fresh experience, not from "
                    f"replay: {instead}"
                )

    def iteration(self, num_envs: int) -> int:
        """As many as tell something of the policy."""
        return 50 * num_envs

    def add(self, recording: Recording) -> np.ndarray:
        """Write."""
        return write(self.session, recording).rows

    def learn(self, decisions: int, rows: np.ndarray) -> Metrics:
        """Updates from the rows just written."""
        session, learner = self.session, self.session.running_learner
        before, sampler, rng = learner.updates, session.numpy_generator("sample"), session.generator("learn")
        noted = learner.read(session.buffer, rows, session.objective.reading, sampler=sampler, rng=rng)
        session.counters["updates"] += learner.updates - before
        return noted


def learning_of(objective: Objective) -> type[FromReplay] | type[FromFresh]:
    """The way to learn that an objective's reading asks for."""
    return FromFresh if isinstance(objective.reading, Fresh) else FromReplay


# --- what they and other stages share ------------------------------------------------------------------------------


def annotate_once(session: Session) -> None:
    """Let the objective write its columns for what the buffer holds, once in a stage, however often that is resumed."""
    progress = session.progress_as(LearningProgress)
    if not progress.annotated:
        rows, rng = session.buffer.rows(), session.generator("annotate")
        session.objective.annotate(session.agent, session.buffer, rows, rng)
        distributed.equalize(session.agent.buffers())  # statistics of the data
        progress.annotated = True


def off_policy_plan(objective: Objective, batch_size: int | None, offline_share: float | None) -> Replay:
    """The objective's reading plan with the stage's numbers; a plan for fresh data is refused."""
    if not isinstance(objective.reading, Replay):
        raise UserError(
            f"objective {type(objective).__name__} learns from fresh experience only: use finetune, not pretrain"
        )
    share = objective.reading.offline_share if offline_share is None else offline_share
    batch_size = distributed.share(batch_size or objective.reading.batch_size, "batch_size")
    return replace(objective.reading, batch_size=batch_size, offline_share=share)


def say_once(spec: dict[str, Any], **options: Any) -> None:
    """Refuse options of a replayed objective {"id": ..., options} that its stage decides otherwise."""
    defaults = {f.name: f.default for f in fields(registry.find("objective", spec["id"]).Config)}
    for name, value in options.items():
        own = spec.get(name)
        if value is not None and own not in (value, defaults.get(name)):
            raise UserError(f"{name} is {value} for the stage and {own} for its objective: say it once")


def write(session: Session, recording: Recording) -> Written:
    """Put new experience into the buffer, if there is room."""
    room(session.buffer, recording.num_rows, "this iteration takes")
    return recording.write(session.buffer)


def room(buffer: Buffer, rows: int, what: str) -> None:
    """ValueError if so many rows are more than the buffer has place for."""
    free = buffer.capacity - buffer.num_pinned
    if rows > free:
        raise UserError(
            f"{what} {rows:,} rows (decisions, and one for each episode that ends), but the buffer has {free:,} that "
            f"are not pinned: set buffer.capacity to at least {rows + buffer.num_pinned:,}"
        )


def headline(metrics: dict[str, Any]) -> dict[str, Any]:
    """The few numbers worth a progress bar; the return where nobody tells success."""
    best = "collect/success" if "collect/success" in metrics else "collect/return"
    wanted = (best, "critic/loss", "policy/loss", "critic/q_mean")
    return {k: metrics[k] for k in wanted if k in metrics}
