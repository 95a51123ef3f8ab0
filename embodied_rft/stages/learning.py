"""How a stage learns from what it collects: `FromReplay` or `FromFresh`, whichever the objective's reading asks for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from embodied_rft import distributed
from embodied_rft.buffer.buffer import Buffer
from embodied_rft.buffer.plans import Fresh
from embodied_rft.experience.recording import Recording, Written
from embodied_rft.learning.objective import Metrics, Objective
from embodied_rft.names import UserError
from embodied_rft.runs.progress import Progress
from embodied_rft.runs.session import Session


@dataclass(kw_only=True)
class LearningProgress(Progress):
    """Of a stage that learns."""

    decisions: int = 0  # collected so far
    annotated: bool = False  # what the buffer held when it began
    owed: float = 0.0  # of an update, by fractions of updates for each decision


class FromReplay:
    """`updates_per_decision` updates for each decision, drawn from all that the buffer holds."""

    refused: ClassVar[Mapping[str, str]] = {}  # options that have no effect here, and what to do instead

    def __init__(self, session: Session, options: Mapping[str, Any]) -> None:
        self.session, self.options = session, options

    def iteration(self, num_envs: int) -> int:
        """Decisions of an iteration where the recipe says nothing: few, since replay learns as it goes."""
        return math.ceil(50 / num_envs) * num_envs

    def add(self, recording: Recording) -> np.ndarray:
        """Put new experience into the buffer, annotate the episodes that have ended; the rows [decisions]."""
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
        learner, rng = session.running_learner, session.generator("learn")
        plan, sampler = session.objective.reading, session.numpy_generator("sample")
        batches = plan.batches(session.buffer, sampler, learner.version)
        for batch in itertools.islice(batches, int(owed)):
            learner.update(batch, rng)
        session.counters["updates"] += int(owed)
        return {}


class FromFresh:
    """Every decision once an epoch, as the objective's plan says, and then never again."""

    refused: ClassVar[Mapping[str, str]] = {
        "updates_per_decision": "set the objective's num_epochs",
        "overlap": "leave it out",
    }

    def __init__(self, session: Session, options: Mapping[str, Any]) -> None:
        self.session = session

    def iteration(self, num_envs: int) -> int:
        """As many as tell something of the policy."""
        return 50 * num_envs

    def add(self, recording: Recording) -> np.ndarray:
        """Put new experience into the buffer; the rows [decisions]."""
        return write(self.session, recording).rows

    def learn(self, decisions: int, rows: np.ndarray) -> Metrics:
        """Updates from the rows just written."""
        session, learner = self.session, self.session.running_learner
        before, sampler, rng = learner.updates, session.numpy_generator("sample"), session.generator("learn")
        noted = learner.read(session.buffer, rows, session.objective.reading, sampler=sampler, rng=rng)
        session.counters["updates"] += learner.updates - before
        return noted


Learning = FromReplay | FromFresh


def learning_of(objective: Objective) -> type[Learning]:
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
